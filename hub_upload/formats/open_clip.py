"""What transformers, open_clip and sentence-transformers read of a repository; every tensor is accounted for."""

import hashlib
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from capivara_common.files import write_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraTokenizer
from modeling_capivara.convert_open_clip import (
    BASE_TEXT_MODEL,
    BASE_TEXT_NAMES,
    SIZES,
    build_open_clip,
    capivara_state_dict,
    open_clip_model_cfg,
    preprocess_cfg_of,
    write_open_clip_weights,
)
from modeling_capivara.loading import WEIGHTS, mapped_model, mapped_tensors, model_of_tensors
from modeling_capivara.processing_capivara import CONTEXT_LENGTH
from modeling_capivara.two_towers import fills_up, random_texts

OPEN_CLIP_WEIGHTS = OPEN_CLIP_WEIGHT_FILES[0]
SENTENCE_MODULES = "sentence_transformers.base.modules"  # as version 6 writes and reads it
SENTENCE_EMBEDDING = "sentence_embedding"  # its name for a finished embedding, which Normalize scales to unit length
OWN_TOWER = "`modeling_capivara.convert_open_clip --to_open_clip` makes a folder for open_clip alone."
# What changes the tower's output; the rest of its configuration is about training and generation.
TEXT_FIELDS = (
    *("model_type", *SIZES, "num_attention_heads", "type_vocab_size", "layer_norm_eps", "hidden_act", "pad_token_id"),
)
# A type whose tokenizer is read as tokenizer.json has it; XLM-R's is rebuilt and loses its own normaliser.
PLAIN_TOKENIZER_TYPE = "xlm-roberta-xl"
ODD_TEXTS = (
    *("ﬁm de ﬁla", "Ｓão João", "a\u0301gua e a\u0303o", "zero\u200blargura"),
    *("dois  espaços", "½ xícara ☕", "日本語"),
)
logger = logging.getLogger("capivara")


def write_weights(model: Path, folder: Path, config: PreTrainedConfig, with_open_clip: bool) -> None:
    """Configuration, code and weights, for transformers and open_clip, each compared with the model by tensor.

    Memory holds one copy of the weights at a time: pages of the file that is read or compared.
    """
    mapped = mapped_model(model, config)
    expected = tensor_digests(mapped.state_dict())
    mapped.save_pretrained(folder)
    if with_open_clip:
        write_open_clip_weights(mapped, folder)
    del mapped
    check_tensors(folder / WEIGHTS, mapped_tensors([folder / WEIGHTS]), expected)
    if with_open_clip:
        written = capivara_state_dict(mapped_tensors([folder / OPEN_CLIP_WEIGHTS]))  # under transformers' names again
        check_tensors(folder / OPEN_CLIP_WEIGHTS, written, expected)
        logger.info("transformers and open_clip: %d tensors compared, all equal.", len(expected))


def check_tensors(file: Path, tensors: Mapping[str, Tensor], expected: dict[str, str]) -> None:
    """Raise ValueError, naming them, where tensors read from `file` are not those of the digests."""
    found = tensor_digests(tensors)
    if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        raise ValueError(f"{file.name} does not hold the model as it was: {', '.join(wrong)} differ; nothing was kept.")


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hex digest of each tensor, of its type, shape and bytes."""
    digests = {}
    for name, tensor in tensors.items():
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
    return digests


def text_config_source(config: CapivaraConfig, text_config: str | None) -> str | None:
    """The Hub id where open_clip shall find the text tower's configuration: the one that is named, else the published
    one, and None where the model's tower is another.

    ValueError where it is no Hub id, or another text tower than the model's; the fields that differ are named.
    """
    if text_config is None:
        return None if _differences(config.text_config, CapivaraConfig().text_config) else BASE_TEXT_MODEL
    if Path(text_config).is_dir():
        raise ValueError(f"--text_config takes a Hub id, and {text_config} is a folder. {OWN_TOWER}")
    try:  # of the base it is known by heart: no network
        named = CapivaraConfig().text_config
        if text_config not in BASE_TEXT_NAMES:
            named = AutoConfig.from_pretrained(text_config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise ValueError(f"text_config {text_config!r} is no Hub id with a configuration: {fault}") from error
    if isinstance(named, CapivaraConfig):
        raise ValueError(
            f"text_config {text_config} is a whole CAPIVARA model, from which open_clip can't take a text tower; name "
            "a repository that holds the text tower's configuration alone."
        )
    if differences := _differences(config.text_config, named):
        raise ValueError(f"text_config {text_config} is not the model's text tower: {'; '.join(differences)}.")
    return text_config


def open_clip_settings(
    config: CapivaraConfig, image_processor: CapivaraImageProcessor, text_config: str | None, repo_id: str | None
) -> dict[str, Any] | None:
    """open_clip's configuration of a model; None where the text tower has no name. Either way it is logged.

    Nothing is written, no weights are read. Where open_clip is installed its own model is built, without memory, and
    its tensors are compared by name and shape. ValueError where it has no such architecture, tower or preprocessing.
    """
    source = text_config_source(config, text_config)
    if source is None:
        pieces = f", trimmed to {config.text_config.vocab_size:,} word pieces" if config.trimmed_vocabulary else ""
        logger.info(
            "open_clip is left out: it takes the text tower's configuration from XLM-RoBERTa base, and this is another "
            "tower%s. Name a Hub id that has it by --text_config. %s", pieces, OWN_TOWER,
        )  # fmt: skip
        return None
    size, preprocess_cfg = preprocess_cfg_of(image_processor)
    model_cfg = open_clip_model_cfg(config, source, size)
    if find_spec("open_clip"):
        try:
            with torch.device("meta"):
                tensors = capivara_state_dict(build_open_clip(config).state_dict())
                model_of_tensors(tensors, config, "Its tensors")
        except (RuntimeError, ValueError) as error:  # a few timm models have, under open_clip, a head of another width
            raise ValueError(f"open_clip does not build this model: {' '.join(str(error).split())}") from error
    # `hf-hub:` takes the tokenizer from that repository; a folder's own is taken from there.
    tokenizer = model_cfg["text_cfg"]["hf_tokenizer_name"] = repo_id or source
    logger.info("open_clip: configuration of the text tower from %s, tokenizer from %s.", source, tokenizer)
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def write_open_clip_config(
    folder: Path, config: CapivaraConfig, settings: dict[str, Any], tokenizer: CapivaraTokenizer
) -> None:
    """Write open_clip_config.json beside the tokenizer."""
    # Without it open_clip reads config.json first, and asks on the terminal whether to run the code it names.
    kwargs = {"tokenizer_type": tokenizer_type(folder, config, tokenizer)}
    settings["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = kwargs
    write_json(folder / OPEN_CLIP_CONFIG, settings)


def write_sentence_transformers(folder: Path, processor: ProcessorMixin) -> None:
    """Write `modules.json` of sentence-transformers and the files that it names: how to embed, and unit length."""
    kinds = [("", "transformer.Transformer"), ("1_Normalize", "normalize.Normalize")]
    write_modules(folder, [(path, f"{SENTENCE_MODULES}.{kind}") for path, kind in kinds])
    settings = {
        "transformer_task": "feature-extraction",
        # Without it sentence-transformers 6 takes the model for a text encoder, and does not say so.
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": SENTENCE_EMBEDDING,
    }
    if fills_up(processor):  # as SigLIP's texts are; others are padded as sentence-transformers does it
        rule = {"padding": "max_length", "max_length": processor.tokenizer.model_max_length}
        settings["processing_kwargs"] = {"text": rule}
    write_json(folder / "sentence_bert_config.json", settings)
    names = {"module_input_name": SENTENCE_EMBEDDING, "module_output_name": SENTENCE_EMBEDDING}
    write_json(folder / "1_Normalize/config.json", names)


def write_modules(folder: Path, kinds: list[tuple[str, str]]) -> None:
    """Write which modules of sentence-transformers a text goes through: the folder and the class of each, in order."""
    modules = [{"idx": at, "name": str(at), "path": path, "type": kind} for at, (path, kind) in enumerate(kinds)]
    write_json(folder / "modules.json", modules)
    # No versions in it: an older sentence-transformers 6 would warn of a newer one.
    facts = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}
    write_json(folder / "config_sentence_transformers.json", facts)


def tokenizer_type(folder: Path, config: CapivaraConfig, tokenizer: CapivaraTokenizer) -> str:
    """The kind by which open_clip shall load the folder's tokenizer, that gives the model's own ids, or ValueError."""
    texts = [*random_texts(), *ODD_TEXTS]
    expected = _ids(tokenizer.plain(), texts)  # open_clip repairs them before
    for kind in (config.text_config.model_type, PLAIN_TOKENIZER_TYPE):
        if _ids(AutoTokenizer.from_pretrained(folder, tokenizer_type=kind), texts) == expected:
            return kind
    raise ValueError(
        f"open_clip would read the tokenizer of {folder} as another one: neither {config.text_config.model_type!r} nor "
        f"{PLAIN_TOKENIZER_TYPE!r} gives its ids. Leave open_clip out of --formats."
    )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, truncation=True, max_length=CONTEXT_LENGTH)["input_ids"]


def _differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[str]:
    pairs = {name: (getattr(ours, name, None), getattr(theirs, name, None)) for name in TEXT_FIELDS}
    return [f"{name} is {theirs!r}, not {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
