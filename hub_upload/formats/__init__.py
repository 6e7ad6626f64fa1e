"""Formats of an export, a file each, and what those share that bring a text side to other programs."""

import json
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from capivara_common.files import write_text
from capivara_common.hub_cache import model_folder
from capivara_common.image_side_digest import image_side_digest
from modeling_capivara import CapivaraProcessor
from modeling_capivara.convert_open_clip import convert_into
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


def text_length(processor: ProcessorMixin) -> int:
    """Tokens of the longest text."""
    return CONTEXT_LENGTH if isinstance(processor, CapivaraProcessor) else processor.tokenizer.model_max_length


def base_of(model: Path, base: str) -> Path:
    """The folder of the base, a folder or Hub id, whose embeddings of pictures stay with the text side of a model.

    Raises ValueError where the two embed pictures otherwise.
    """
    folder = model_folder(base, convert_into)
    if image_side_digest(model) != image_side_digest(folder):
        raise ValueError(
            f"{model} embeds pictures otherwise than {base}. Pictures embedded with that base must be embedded anew, "
            "by both towers of this model. Or name the base that it was trained from, its image tower frozen."
        )
    return folder


def write_tokenizer(folder: Path, content: dict[str, Any], is_own: bool) -> None:
    """Write a tokenizer.json; CAPIVARA's then reads curly quotation marks as plain ones, and accents in one form."""
    if is_own:
        steps = [*PLAIN_QUOTES, *([content["normalizer"]] if content["normalizer"] else [])]
        content = content | {"normalizer": {"type": "Sequence", "normalizers": steps}}
    write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))
