"""What transformers, open_clip and sentence-transformers read of a repository; every tensor is accounted for."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from capivara_common.environment import require_packages
from capivara_common.files import write_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor
from modeling_capivara.convert_open_clip import (
    BASE_TEXT_MODEL,
    BASE_TEXT_NAMES,
    build_open_clip_model,
    to_capivara_state_dict,
    to_open_clip_model_cfg,
    to_open_clip_state_dict,
    to_preprocess_cfg,
)
from modeling_capivara.loading import (
    WEIGHTS_FILE,
    build_model_from_tensors,
    format_keys,
    load_mapped_model,
    load_mapped_tensors,
    load_model,
    load_processor,
)
from modeling_capivara.two_towers import (
    compute_image_embeds,
    compute_text_embeds,
    embed_texts,
    pad_batch,
    pads_to_max_length,
    random_texts,
    tokenize,
)

OPEN_CLIP_WEIGHTS_FILE = OPEN_CLIP_WEIGHT_FILES[0]
SENTENCE_TRANSFORMERS_MODULES = "sentence_transformers.base.modules"  # as version 6 writes and reads it
SENTENCE_EMBEDDING_KEY = (
    "sentence_embedding"  # its name for a finished embedding, which Normalize scales to unit length
)
# What changes the tower's output; the rest of its configuration is about training and generation.
TEXT_CONFIG_FIELDS = (
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
)
TEXT_CONFIG_FIELDS += "layer_norm_eps max_position_embeddings type_vocab_size pad_token_id"
# A type whose tokenizer is read as tokenizer.json has it; XLM-R's is rebuilt and loses its own normaliser. Without one
# open_clip reads config.json first, and asks on the terminal whether to run the code that it names.
TOKENIZER_SETTINGS = {"tokenizer_type": "xlm-roberta-xl"}
COSINE_TOLERANCE = 1e-4  # largest difference of embeddings of unit length, in float32
logger = logging.getLogger("capivara")


def write_weights(model: Path, folder: Path, config: PreTrainedConfig, with_open_clip: bool) -> None:
    """Configuration, code and weights, for transformers and open_clip, each compared with the model by tensor.

    All are views of their files, and memory holds the pages of one at a time.
    """
    mapped = load_mapped_model(model, config)
    expected = compute_tensor_digests(mapped.state_dict())
    mapped.save_pretrained(folder)
    if with_open_clip:
        save_state_dict(to_open_clip_state_dict(mapped), folder / OPEN_CLIP_WEIGHTS_FILE)
    del mapped
    check_tensors(folder / WEIGHTS_FILE, load_mapped_model(folder, config).state_dict(), expected)
    if with_open_clip:
        written = to_capivara_state_dict(
            load_mapped_tensors([folder / OPEN_CLIP_WEIGHTS_FILE])
        )  # under transformers' names again
        check_tensors(folder / OPEN_CLIP_WEIGHTS_FILE, written, expected)
        logger.info("transformers and open_clip: %d tensors compared, all equal.", len(written))


def save_state_dict(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; none is copied but what is no row after row in memory."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def compute_tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Name -> type, shape and SHA-256 of each tensor, to compare with where the tensors themselves are not held."""
    raw = {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return {name: (one.dtype, one.shape, hashlib.sha256(raw[name]).digest()) for name, one in tensors.items()}


def check_tensors(file: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple]) -> None:
    """Raise ValueError, naming the first, if tensors read from `file` are not those of the expected `digests`."""
    if wrong := {name for name, _ in compute_tensor_digests(tensors).items() ^ expected.items()}:
        raise ValueError(
            f"{file.name} does not hold the model as it was: {format_keys(wrong)} differ; nothing was kept."
        )


def resolve_text_config(config: CapivaraConfig, text_config: str | None) -> str | None:
    """The Hub id where open_clip shall find the text tower's configuration: the one that is named, else the published
    one, and None where the model's tower is another.

    ValueError where it is no Hub id, or another text tower than the model's; the fields that differ are named.
    """
    base = CapivaraConfig().text_config  # known by heart: no network
    if text_config is None:
        return None if _config_differences(config.text_config, base) else BASE_TEXT_MODEL
    try:
        if Path(text_config).is_dir():
            raise ValueError("it is a folder, and everybody shall find it")
        is_base = text_config in BASE_TEXT_NAMES
        named = base if is_base else AutoConfig.from_pretrained(text_config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise ValueError(f"text_config {text_config!r} is no Hub id with a configuration: {fault}") from error
    if differences := _config_differences(config.text_config, named):
        raise ValueError(f"text_config {text_config} is not the model's text tower: {'; '.join(differences)}.")
    return text_config


def build_open_clip_config(
    config: CapivaraConfig, image_processor: CapivaraImageProcessor, text_config: str | None, repo_id: str | None
) -> dict[str, Any] | None:
    """open_clip's configuration of a model; None where the text tower has no name. Either way it is logged.

    Nothing is written, no weights are read. Where open_clip is installed its own model is built, without memory, and
    its tensors are compared by name and shape. ValueError where it has no such architecture, tower or preprocessing.
    """
    source = resolve_text_config(config, text_config)
    if source is None:
        pieces = f", trimmed to {config.text_config.vocab_size:,} word pieces" if config.trimmed_vocabulary else ""
        logger.info(
            "open_clip is left out: it takes the text tower's configuration from XLM-RoBERTa base, and this is another "
            "tower%s. Put its config.json on the Hub, and name the id by --text_config.", pieces,
        )  # fmt: skip
        return None
    preprocess_cfg = to_preprocess_cfg(image_processor)
    model_cfg = to_open_clip_model_cfg(config, source, dict(image_processor.size)["shortest_edge"])
    if find_spec("open_clip"):
        try:
            with torch.device("meta"):
                tensors = to_capivara_state_dict(build_open_clip_model(config).state_dict())
                build_model_from_tensors(tensors, config, "Its tensors")
        except (RuntimeError, ValueError) as error:  # a few timm models have, under open_clip, a head of another width
            raise ValueError(f"open_clip does not build this model: {' '.join(str(error).split())}") from error
    # `hf-hub:` takes the tokenizer from that repository; a folder's own is taken from there.
    tokenizer = model_cfg["text_cfg"]["hf_tokenizer_name"] = repo_id or source
    model_cfg["text_cfg"]["tokenizer_kwargs"] = TOKENIZER_SETTINGS
    logger.info("open_clip: configuration of the text tower from %s, tokenizer from %s.", source, tokenizer)
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def write_sentence_transformers(folder: Path, processor: ProcessorMixin) -> None:
    """Write `modules.json` of sentence-transformers and the files that it names: how to embed, and unit length."""
    kinds = [("", "transformer.Transformer"), ("1_Normalize", "normalize.Normalize")]
    write_sentence_modules(folder, [(path, f"{SENTENCE_TRANSFORMERS_MODULES}.{kind}") for path, kind in kinds])
    settings = {
        "transformer_task": "feature-extraction",
        # Without it sentence-transformers 6 takes the model for a text encoder, and does not say so.
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": SENTENCE_EMBEDDING_KEY,
    }
    if pads_to_max_length(processor):  # as SigLIP's texts are; others are padded as sentence-transformers does it
        rule = {"padding": "max_length", "max_length": processor.tokenizer.model_max_length}
        settings["processing_kwargs"] = {"text": rule}
    write_json(folder / "sentence_bert_config.json", settings)
    names = {"module_input_name": SENTENCE_EMBEDDING_KEY, "module_output_name": SENTENCE_EMBEDDING_KEY}
    write_json(folder / "1_Normalize/config.json", names)


def check_sentence_transformers(source: Path, folder: Path) -> None:
    """Compare the text embeddings that sentence-transformers gives of an exported folder with the model's.

    Skipped, with a log message, if sentence-transformers is not installed.

    Args:
        source: Folder of the model.
        folder: Folder that was exported of it.

    Raises:
        ValueError: If an embedding differs by more than `COSINE_TOLERANCE`.
    """
    if not find_spec("sentence_transformers"):
        logger.info("sentence-transformers is not installed: its text embeddings were not compared with the model's.")
        return
    from sentence_transformers import SentenceTransformer

    texts = [*random_texts(), "Uma FOTO de São João"]  # of all lengths, and with capital letters
    ours = embed_texts(load_model(source).eval(), load_processor(source), texts)
    # One at a time: in a batch, a long text would hide that short ones are not padded to the full length.
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=1, show_progress_bar=False)
    _check_difference("sentence-transformers", [(ours, torch.from_numpy(theirs))])


def write_sentence_modules(folder: Path, module_types: list[tuple[str, str]]) -> None:
    """Write which modules of sentence-transformers a text goes through: the folder and the class of each, in order."""
    modules = [{"idx": at, "name": str(at), "path": path, "type": kind} for at, (path, kind) in enumerate(module_types)]
    write_json(folder / "modules.json", modules)
    # No versions in it: an older sentence-transformers 6 would warn of a newer one.
    facts = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}
    write_json(folder / "config_sentence_transformers.json", facts)


def _config_differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[str]:
    pairs = {name: (getattr(ours, name, None), getattr(theirs, name, None)) for name in TEXT_CONFIG_FIELDS.split()}
    return [f"{name} is {theirs!r}, not {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]


# --- SigLIP: the layout of open_clip's own ViT-…-SigLIP2 -------------------------------------------------------------

# Towers of timm that are these, by width, layers and patch: its name, and pixels a side follow
TIMM_TOWERS = {(768, 12, 16): "vit_base_patch16_siglip", (768, 12, 32): "vit_base_patch32_siglip"}
TIMM_TOWERS |= {(1024, 24, 16): "vit_large_patch16_siglip", (1152, 27, 14): "vit_so400m_patch14_siglip"}


def check_siglip_supported(config: PreTrainedConfig) -> None:
    """Raise ValueError where open_clip has no such model, ImportError where it is not installed to be compared with."""
    if config.model_type != "siglip":
        raise ValueError(f"open_clip's layout is written of CAPIVARA and SigLIP alone, not of {config.model_type}.")
    if (
        _tower_sizes(config) not in TIMM_TOWERS
        or config.text_config.hidden_size % config.text_config.num_attention_heads
    ):
        known = ", ".join(map(str, TIMM_TOWERS))
        raise ValueError(
            f"open_clip has no SigLIP of width, layers and patch {_tower_sizes(config)}; there are {known}."
        )
    require_packages("open_clip's format", "open_clip", "open_clip")


def _tower_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    return config.vision_config.hidden_size, config.vision_config.num_hidden_layers, config.vision_config.patch_size


def write_open_clip_siglip(source: Path, folder: Path, tokenizer_repository: str) -> dict[str, Tensor]:
    """Write open_clip's files of a model that `check_siglip_supported` lets through; the tokenizer is that of the repository
    `name`. Returns the tensors of open_clip's model. Raises ValueError where its embeddings are others.
    """
    model, processor = load_model(source).eval(), load_processor(source)
    vision, text = model.config.vision_config, model.config.text_config
    side = {
        "image_size": vision.image_size,
        "timm_model_name": f"{TIMM_TOWERS[_tower_sizes(model.config)]}_{vision.image_size}",
    }
    side |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    texts = {
        "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
        "heads": text.num_attention_heads, "layers": text.num_hidden_layers, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": text.layer_norm_eps}, "act_kwargs": {"approximate": "tanh"},
        "mlp_ratio": text.intermediate_size / text.hidden_size, "hf_tokenizer_name": tokenizer_repository,
        "tokenizer_kwargs": {"clean": "whitespace"},  # small letters are the tokenizer's own affair
    }  # fmt: skip
    model_cfg = {"embed_dim": text.projection_size, "init_logit_bias": model.logit_bias.item(), "custom_text": True}
    model_cfg |= {"vision_cfg": side, "text_cfg": texts}
    state = to_open_clip_state_dict(model)
    save_state_dict(state, folder / OPEN_CLIP_WEIGHTS_FILE)
    preprocess_cfg = to_preprocess_cfg(processor.image_processor)
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    _compare_embeddings(model, processor, folder)
    return state


@torch.inference_mode()
def _compare_embeddings(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Raise ValueError where open_clip's embeddings, of the same pixels and ids, differ by more than rounding."""
    import open_clip

    try:
        theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    except RuntimeError as error:  # a size that timm lacks
        raise ValueError(f"open_clip can't build this model: {' '.join(str(error).split())}") from error
    ids = pad_batch(processor, tokenize(processor, random_texts()))["input_ids"]
    side = model.config.vision_config.image_size
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts, images = theirs.eval().encode_text(ids, normalize=True), theirs.encode_image(pixels, normalize=True)
    pairs = (compute_text_embeds(model, ids), texts), (compute_image_embeds(model, pixels), images)
    _check_difference("open_clip", pairs)


def _check_difference(program: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError if a program's embeddings, the second of each pair, differ from ours by `COSINE_TOLERANCE` or more."""
    difference = max((ours - found).abs().max().item() for ours, found in pairs)
    if not difference < COSINE_TOLERANCE:
        fault = f"the embeddings of {program} differ by {difference:.1e}, more than {COSINE_TOLERANCE:.0e}"
        raise ValueError(f"The export is wrong: {fault}; nothing was kept.")
