"""Writers of the export formats, one module for each format.

This module has the functions that several formats share. They write tokenizer files, and check that a model and its
base model have the same image encoder.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from capivara_common.files import read_json, write_json, write_text
from capivara_common.hub_cache import resolve_model_folder
from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_common.privacy import shorten_private_paths
from modeling_capivara import CapivaraProcessor
from modeling_capivara.convert_open_clip import convert_to_folder
from modeling_capivara.text_cleaning_capivara import CONTEXT_LENGTH

# Normalizer steps for programs that read tokenizer.json but don't run CAPIVARA's text cleaning code. The steps make
# curly quotes straight and normalize accents (NFC), which typed text needs. They do this in the same way as ftfy, which
# the cleaning code uses, so they don't change a text that is already cleaned. (Exception: ftfy leaves HTML entities
# next to "<" alone, and these may stand for curly quotes.) The tokenizer's own normalizer does the rest of the
# cleaning, except the repair of damaged text, which needs the code.
PLAIN_QUOTE_STEPS = [
    {"type": "NFC"},
    *(
        {"type": "Replace", "pattern": {"Regex": marks}, "content": mark}
        for marks, mark in (("[\u2018-\u201b\u02bc]", "'"), ("[\u201c-\u201f]", '"'))
    ),
]


def max_text_tokens(processor: ProcessorMixin) -> int:
    """Return the maximum number of tokens in a text. Longer texts are truncated by the processor.

    Args:
        processor: Processor of the model.
    """
    return CONTEXT_LENGTH if isinstance(processor, CapivaraProcessor) else processor.tokenizer.model_max_length


def resolve_compatible_base_folder(model: Path, base: str) -> Path:
    """Find the folder of the base model, and check that the base model has the same image encoder as the model.

    Args:
        model: Folder of the model.
        base: Folder or Hub id of the base model.

    Returns:
        Local folder of the base model. If the base is on the Hub, the base is downloaded.

    Raises:
        ValueError: If the image encoders are not bit-identical, so that the model's text embeddings can't be compared
            with image embeddings of the base.
    """
    folder = resolve_model_folder(base, convert_to_folder)
    if image_encoder_digest(model) != image_encoder_digest(folder):
        raise ValueError(
            f"The image encoder of {model} differs from that of {base}, so images embedded with this base must be "
            "embedded again: export both towers. Otherwise, give the base from which the model was trained with a "
            "frozen image tower."
        )
    return folder


def write_tokenizer_json(folder: Path, content: dict[str, Any], is_capivara: bool) -> None:
    """Write tokenizer.json.

    For CAPIVARA, add normalizer steps that straighten curly quotes and normalize accents (NFC).

    Args:
        folder: Folder to write to.
        content: Content of a tokenizer.json.
        is_capivara: Whether to add `PLAIN_QUOTE_STEPS`. They are not added twice if `content` already has them.
    """
    normalizer = content["normalizer"] or {}
    has_steps = normalizer.get("normalizers", [])[: len(PLAIN_QUOTE_STEPS)] == PLAIN_QUOTE_STEPS
    if is_capivara and not has_steps:
        steps = [*PLAIN_QUOTE_STEPS, *([normalizer] if normalizer else [])]
        content = content | {"normalizer": {"type": "Sequence", "normalizers": steps}}
    write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))


def save_tokenizer_for_publication(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Write the files of a tokenizer with its current settings, without paths of this machine.

    Args:
        tokenizer: Tokenizer to write.
        folder: Folder to write to.

    Returns:
        The content of the written tokenizer_config.json, including `model_input_names`.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = shorten_private_paths(read_json(path)) | {"model_input_names": tokenizer.model_input_names}
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
    write_json(path, settings)
    return settings
