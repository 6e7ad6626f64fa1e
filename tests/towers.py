"""Tiny two-tower models of transformers, saved as their publishers save them, built without downloads."""

import json
from collections.abc import Iterable
from pathlib import Path

from tiny import randomize, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    AutoConfig,
    AutoModel,
    BertTokenizer,
    BitImageProcessor,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTImageProcessor,
    XLMRobertaTokenizer,
)
from transformers.initialization import no_init_weights

from hub_upload.formats import save_state_dict
from modeling_capivara import CapivaraTokenizer
from modeling_capivara.convert_open_clip import to_open_clip_model_cfg, to_open_clip_state_dict, to_preprocess_cfg
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import IMAGE_ENCODER_PREFIXES

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # of towers that are built like BERT
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIDE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def save(folder: Path, config: type, model: type, text: dict, processor: object, **sizes) -> None:
    model_config = config(text_config=TOWER | text, vision_config=VISION, **sizes)
    randomize(model(model_config)).save_pretrained(folder)
    processor.save_pretrained(folder)


def siglip(folder: Path) -> None:
    """Save a SigLIP model. Its processor has no padding setting, and its tokenizer returns no mask."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names, tokenizer.model_max_length = ["input_ids"], 64
    processor = SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    text = {"vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 1, "projection_size": 32}
    save(folder, SiglipConfig, SiglipModel, text, processor)


def clip(folder: Path) -> None:
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    text = {"vocab_size": len(pieces), "bos_token_id": 0, "eos_token_id": 1}
    save(folder, CLIPConfig, CLIPModel, text, CLIPProcessor(CLIPImageProcessor(**SIDE), tokenizer), projection_dim=24)


def chinese_clip(folder: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    processor = ChineseCLIPProcessor(ChineseCLIPImageProcessor(**SIDE), tokenizer)
    text = NO_DROPOUT | {"vocab_size": len(pieces), "pad_token_id": 0}
    save(folder, ChineseCLIPConfig, ChineseCLIPModel, text, processor, projection_dim=24)


def altclip(folder: Path) -> None:
    text = NO_DROPOUT | {"vocab_size": 300, "max_position_embeddings": 66, "pad_token_id": 1, "project_dim": 24}
    processor = AltCLIPProcessor(CLIPImageProcessor(**SIDE), tiny_tokenizer())
    save(folder, AltCLIPConfig, AltCLIPModel, text, processor, projection_dim=24)


def metaclip_2(folder: Path, tokenizer: XLMRobertaTokenizer | None = None) -> None:
    text = {"vocab_size": 300, "max_position_embeddings": 77, "pad_token_id": 1, "eos_token_id": 2}
    processor = CLIPProcessor(CLIPImageProcessor(**SIDE), tokenizer or tiny_tokenizer())
    save(folder, MetaClip2Config, MetaClip2Model, text, processor, projection_dim=24)


def dual_encoder(folder: Path, vision: str = "vit", text: str = "bert") -> None:
    """Save a VisionTextDualEncoder with the given types of towers, whose dropout is 0."""
    tokenizer, positions = tiny_tokenizer(), 80
    if text == "bert":
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
        tokenizer, positions = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}), 40
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
    options |= NO_DROPOUT | {"pad_token_id": tokenizer.pad_token_id}
    text_config = AutoConfig.for_model(text, **TOWER, **options)
    vision_config = AutoConfig.for_model(vision, **VISION | {"hidden_size": 48, "num_attention_heads": 4})
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision_config, text_config, projection_dim=24)
    randomize(VisionTextDualEncoderModel(config)).save_pretrained(folder)
    pixels = {"clip_vision_model": CLIPImageProcessor, "dinov2": BitImageProcessor, "vit": ViTImageProcessor}
    image_processor = pixels.get(vision, SiglipImageProcessor)
    sizes = SIDE if vision in ("clip_vision_model", "dinov2") else {"size": {"height": 32, "width": 32}}
    VisionTextDualEncoderProcessor(image_processor(**sizes), tokenizer).save_pretrained(folder)


MAKERS = {maker.__name__: maker for maker in (siglip, clip, chinese_clip, altclip, metaclip_2, dual_encoder)}


def gemma_like(texts: list[str], size: int, more: Iterable[str] = (), filled: int = 0) -> Siglip2Tokenizer:
    """Build a tokenizer like SigLIP 2's: BPE over whole lowercase texts, with a token for each byte.

    Training more than ten thousand tokens would take long, so prefixes of the texts `more` are added until the
    vocabulary has `filled` tokens.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, max_token_length=16)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    pairs = ((text[:end], text[end]) for text in more for end in range(1, len(text)))
    while len(vocab) < filled:
        left, right = next(pairs)
        if left in vocab and right in vocab and left + right not in vocab:
            merges.append((left, right))
            vocab[left + right] = len(vocab)
    return Siglip2Tokenizer(
        vocab=vocab, merges=merges, padding_side="right", model_max_length=64, model_input_names=["input_ids"]
    )


def siglip2(folder: Path, tokenizer: Siglip2Tokenizer, config: SiglipConfig | None = None) -> None:
    """Save a SigLIP 2 of fixed resolution, which is transformers' SiglipModel with a tokenizer like Gemma's."""
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    config = config or SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=VISION)
    with no_init_weights():  # initializing a full-size model would take most of the time
        randomize(SiglipModel(config)).save_pretrained(folder)
    side = config.vision_config.image_size
    SiglipProcessor(SiglipImageProcessor(size={"height": side, "width": side}), tokenizer).save_pretrained(folder)


def other_texts(base: Path, folder: Path) -> Path:
    """Save a model with the image encoder of the model in `base` and another text encoder."""
    model = AutoModel.from_pretrained(base)
    image_encoder = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(IMAGE_ENCODER_PREFIXES)
    }
    randomize(model, seed=1).load_state_dict(image_encoder, strict=False)
    model.save_pretrained(folder)
    load_processor(base).save_pretrained(folder)
    return folder


def as_published(folder: Path) -> None:
    """Rewrite a model's files in the format of older versions of transformers, which most models on the Hub have.

    Default values are left out, the image processor has its own file, and SigLIP 2's tokenizer has the class name of
    Gemma's tokenizer and does not lowercase texts.
    """
    config = json.loads((folder / "config.json").read_text())
    default_config = AutoConfig.for_model(config["model_type"])
    for name in ("text_config", "vision_config"):
        defaults = getattr(default_config, name).to_dict() | {"model_type": None}
        config[name] = {field: value for field, value in config[name].items() if defaults.get(field) != value}
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "processor_config.json").read_text())
    steps = {
        name: value for name, value in processor["image_processor"].items() if not name.endswith(("rescale", "_factor"))
    }
    if "crop_size" in steps:
        steps |= {"size": steps["size"]["shortest_edge"], "crop_size": steps["crop_size"]["height"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    (folder / "processor_config.json").unlink()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if settings["tokenizer_class"] == "Siglip2Tokenizer":
        path.write_text(json.dumps(settings | {"tokenizer_class": "GemmaTokenizer"}))
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"normalizer": state["normalizer"]["normalizers"][1]}))


def without_cleaning(tokenizer: CapivaraTokenizer) -> PreTrainedTokenizerFast:
    """Copy a tokenizer, with the same vocabulary, but without its cleaning of texts."""
    settings = {name: getattr(tokenizer, name) for name in ("model_max_length", "padding_side", "truncation_side")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map, **settings
    )


def as_open_clip(source: Path, folder: Path) -> Path:
    """Write a CAPIVARA model in open_clip's format, with the configuration of its text tower in a subfolder."""
    model, processor = load_model(source), load_processor(source)
    without_cleaning(processor.tokenizer).save_pretrained(folder)  # open_clip cleans texts itself
    model.config.text_config.save_pretrained(folder / "text")
    pixels = to_preprocess_cfg(processor.image_processor)
    model_cfg = to_open_clip_model_cfg(
        model.config, str(folder / "text"), processor.image_processor.size["shortest_edge"]
    )
    settings = {"model_cfg": model_cfg, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_state_dict(to_open_clip_state_dict(model), folder / "open_clip_model.safetensors")
    return folder
