"""Formats of a repository, a file each, and what they share: the model is read without copying its weights, and every
tensor that is written is accounted for."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin

from capivara_common.files import seed_folders, write_text
from capivara_common.hub_cache import model_folder
from capivara_common.image_side_digest import image_difference
from capivara_search.models import CONVERTER
from modeling_capivara import CapivaraProcessor, loading
from modeling_capivara.text_repair_capivara import CONTEXT_LENGTH

# What a keyboard calls for of the text repair, for programs that run no code of a folder; as ftfy does it, so that it
# changes no text that is repaired. The other repairs are in the vocabulary's own normaliser, or of broken files' texts.
PLAIN_QUOTES = [
    {"type": "NFC"},
    *(
        {"type": "Replace", "pattern": {"Regex": marks}, "content": mark}
        for marks, mark in (("[\u2018-\u201b\u02bc]", "'"), ("[\u201c-\u201f]", '"'))
    ),
]


def read_config(folder: Path, form: str | None = None) -> PreTrainedConfig:
    """The configuration of a model folder, of any model of two towers; of CAPIVARA or SigLIP where a `form` is of them.

    Raises ValueError where it is none; a run's several seeds are named.
    """
    if not folder.is_dir():
        raise ValueError(f"The model folder {folder} does not exist.")
    if not (folder / "config.json").is_file():
        seeds = [path.name for path in seed_folders(folder) if (path / "config.json").is_file()]
        hint = f" It is a run of several seeds; name one of {', '.join(seeds)} in it." if seeds else ""
        raise ValueError(f"The folder {folder} holds no model (config.json is missing).{hint}")
    config = loading.two_towers_config(folder)
    if form and config.model_type not in ("capivara", "siglip"):
        raise ValueError(
            f"{form} is written of CAPIVARA and SigLIP alone, and {folder} is {config.model_type}. The whole model "
            "(--formats transformers,onnx) opens in place of its base, and finds the base's vectors."
        )
    return config


def text_length(processor: ProcessorMixin) -> int:
    """Tokens of the longest text."""
    return CONTEXT_LENGTH if isinstance(processor, CapivaraProcessor) else processor.tokenizer.model_max_length


def base_of(model: Path, base: str) -> Path:
    """The folder of the base, a folder or Hub id, whose embeddings of pictures stay with the text side of a model.

    Raises ValueError where the two embed pictures otherwise: the first tensor or setting that differs is named.
    """
    folder = model_folder(base, CONVERTER)
    if difference := image_difference(model, folder):
        raise ValueError(
            f"{model} embeds pictures otherwise than {base}: {difference}. Pictures embedded with that base must be "
            "embedded anew, by both towers of this model. Or name the base that it was trained from, its image tower "
            "frozen."
        )
    return folder


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


def write_tokenizer(folder: Path, content: dict[str, Any], is_own: bool) -> None:
    """Write a tokenizer.json; CAPIVARA's then reads curly quotation marks as plain ones, and accents in one form."""
    if is_own:
        steps = [*PLAIN_QUOTES, *([content["normalizer"]] if content["normalizer"] else [])]
        content = content | {"normalizer": {"type": "Sequence", "normalizers": steps}}
    write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))
