"""Formats of an export, a file each, and what those share that bring a text side to other programs."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from capivara_common.files import read_json, write_json, write_text
from capivara_common.hub_cache import resolve_model_folder
from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_common.privacy import hide_paths
from modeling_capivara import CapivaraProcessor
from modeling_capivara.convert_open_clip import convert_to_folder
from modeling_capivara.text_cleaning_capivara import CONTEXT_LENGTH

# The part of the text cleaning that typed text needs, for programs that do not run the code of a folder. It follows
# ftfy, so that it leaves a cleaned text as it is (except for curly quotes from HTML entities beside a "<", where ftfy
# leaves entities alone). The vocabulary's own normalizer does the rest, except for what only damaged text needs.
PLAIN_QUOTE_STEPS = [
    {"type": "NFC"},
    *(
        {"type": "Replace", "pattern": {"Regex": marks}, "content": mark}
        for marks, mark in (("[\u2018-\u201b\u02bc]", "'"), ("[\u201c-\u201f]", '"'))
    ),
]


def max_text_tokens(processor: ProcessorMixin) -> int:
    """Tokens of the longest text."""
    return CONTEXT_LENGTH if isinstance(processor, CapivaraProcessor) else processor.tokenizer.model_max_length


def resolve_base_folder(model: Path, base: str) -> Path:
    """The folder of the base, a folder or Hub id, whose embeddings of pictures stay with the text side of a model.

    Raises ValueError where the two embed pictures otherwise.
    """
    folder = resolve_model_folder(base, convert_to_folder)
    if image_encoder_digest(model) != image_encoder_digest(folder):
        raise ValueError(
            f"{model} embeds pictures otherwise than {base}. Pictures embedded with that base must be embedded anew, "
            "by both towers of this model. Or name the base that it was trained from, its image tower frozen."
        )
    return folder


def write_tokenizer_json(folder: Path, content: dict[str, Any], is_capivara: bool) -> None:
    """Write a tokenizer.json; CAPIVARA's then reads curly quotes as straight ones, and normalizes accents (NFC)."""
    normalizer = content["normalizer"] or {}
    if (
        is_capivara and normalizer.get("normalizers", [])[: len(PLAIN_QUOTE_STEPS)] != PLAIN_QUOTE_STEPS
    ):  # not yet, as in an export
        steps = [*PLAIN_QUOTE_STEPS, *([normalizer] if normalizer else [])]
        content = content | {"normalizer": {"type": "Sequence", "normalizers": steps}}
    write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Write the files of a tokenizer as it is configured now, without paths of this machine.

    Returns:
        The content of tokenizer_config.json, which names the inputs that the tokenizer gives (`model_input_names`).
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = hide_paths(read_json(path)) | {"model_input_names": tokenizer.model_input_names}
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
    write_json(path, settings)
    return settings
