"""Export formats for models: one module for each format and, in this file, functions that several formats use.

The functions in this file write tokenizer files and tensors, and compare an export with the model. They also check that
a model and its base model have the same image encoder.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from capivara_common.files import read_json, write_json, write_text
from capivara_common.hub_cache import find_download_or_convert_model_folder
from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_common.privacy import shorten_absolute_paths
from modeling_capivara import CapivaraProcessor
from modeling_capivara.convert_open_clip import convert_to_folder
from modeling_capivara.loading import format_weight_names_for_error
from modeling_capivara.text_cleaning_capivara import CONTEXT_LENGTH


def build_replace_step(pattern: str, content: str) -> dict[str, Any]:
    """Build a normalizer step of tokenizer.json that replaces all matches of a regular expression with a text.

    A normalizer step changes a text before it is split into tokens.

    Args:
        pattern: The regular expression.
        content: Text that replaces a match.
    """
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


# Normalizer steps for programs that don't run CAPIVARA's text cleaning code. Like the code's library ftfy, they make
# curly quotes straight and normalize accents (Unicode NFC), so they don't change cleaned texts. The only exception is
# curly quotes from HTML entities, which the code decodes after ftfy has run, from the first line with "<" on. The
# tokenizer's own normalizer does the rest of the cleaning, except the repair of wrongly decoded characters.
PLAIN_QUOTE_STEPS = [
    {"type": "NFC"},
    build_replace_step("[\u2018-\u201b\u02bc]", "'"),
    build_replace_step("[\u201c-\u201f]", '"'),
]
EMBEDDING_TOLERANCE = 1e-4  # largest allowed difference of an embedding component between the model and an export


def max_text_tokens(processor: ProcessorMixin) -> int:
    """Return the maximum number of tokens of a text. The model's processor truncates longer texts to this number.

    Args:
        processor: Processor of the model.
    """
    return CONTEXT_LENGTH if isinstance(processor, CapivaraProcessor) else processor.tokenizer.model_max_length


def resolve_compatible_base_folder(model: Path, base: str) -> Path:
    """Find the folder of a base model, and check that its image encoder is the same as the trained model's.

    Args:
        model: Folder of the trained model.
        base: Folder or Hub id of the base model. A base model on the Hub is downloaded.

    Returns:
        Local folder of the base model.

    Raises:
        ValueError: If the image encoders are not bit-identical.
    """
    folder = find_download_or_convert_model_folder(base, convert_to_folder)
    # With different image encoders, text embeddings of the trained model could not be compared with image embeddings of
    # the base model.
    if image_encoder_digest(model) != image_encoder_digest(folder):
        raise ValueError(
            f"The image encoder of {model} differs from the image encoder of {base}. Either export both towers and "
            "embed the images again, or give the base model from which the model was trained with a frozen image tower."
        )
    return folder


def write_tokenizer_json_with_normalizer(folder: Path, content: dict[str, Any], is_capivara: bool) -> None:
    """Write tokenizer.json, with additional normalizer steps (`PLAIN_QUOTE_STEPS`) for a CAPIVARA model.

    These steps clean texts in programs that don't run CAPIVARA's text cleaning code.

    Args:
        folder: Folder to write to.
        content: Content of tokenizer.json, without or with the additional steps.
        is_capivara: Whether to add the steps, unless `content` already has them.
    """
    normalizer = content["normalizer"] or {}
    has_steps = normalizer.get("normalizers", [])[: len(PLAIN_QUOTE_STEPS)] == PLAIN_QUOTE_STEPS
    if is_capivara and not has_steps:
        steps = [*PLAIN_QUOTE_STEPS, *([normalizer] if normalizer else [])]
        content = content | {"normalizer": {"type": "Sequence", "normalizers": steps}}
    write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))


def read_publishable_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a tokenizer or processor, and remove what must not be published.

    Absolute paths are reduced to their last part. The entries "is_local" and "local_files_only" are removed, because
    they only say how the settings were loaded on this machine.

    Args:
        path: JSON file with the settings.
    """
    settings = shorten_absolute_paths(read_json(path))
    return {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}


def save_tokenizer_for_publication(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Write the files of a tokenizer, without absolute paths of this machine, which its settings may contain.

    Args:
        tokenizer: Tokenizer to write. Settings that were changed after it was loaded are written, too.
        folder: Folder to write to.

    Returns:
        The content of the written tokenizer_config.json, including `model_input_names`.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = read_publishable_settings(path) | {"model_input_names": tokenizer.model_input_names}
    write_json(path, settings)
    return settings


def save_state_dict(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write the tensors of a state dict to a safetensors file.

    To save memory, only tensors that are not contiguous are copied.

    Args:
        state_dict: Dict {tensor name: tensor}.
        path: File to write.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def compute_tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Compute a digest (hash) of each tensor, so that tensors can be compared later without keeping them in memory.

    Args:
        tensors: Dict {tensor name: tensor}.

    Returns:
        A dict {tensor name: (dtype, shape, SHA-256 of the values)}.
    """
    raw = {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return {name: (tensor.dtype, tensor.shape, hashlib.sha256(raw[name]).digest()) for name, tensor in tensors.items()}


def check_tensors(file: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple]) -> None:
    """Check that the tensors in an exported file are bit-identical to the tensors of the model.

    Args:
        file: File that the tensors were read from, for the error message.
        tensors: Dict {tensor name: tensor} with the content of the file.
        expected: Digests of the model's tensors, from `compute_tensor_digests`.

    Raises:
        ValueError: If a tensor differs from the model's, is missing, or does not exist in the model.
    """
    if wrong := {name for name, _ in compute_tensor_digests(tensors).items() ^ expected.items()}:
        names = format_weight_names_for_error(wrong)
        raise ValueError(
            f"The export was removed, because {file.name} differs from the model in {names}. Run it again, and report "
            "the error if it persists."
        )


def check_embedding_difference(program: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Check that the embeddings that another library computes with an export equal the embeddings of the model.

    Args:
        program: Name of the library, for the error message.
        pairs: Tuples (embeddings of the model, embeddings of the library). Both have the shape (texts or images,
            width).

    Raises:
        ValueError: If a component of an embedding differs by `EMBEDDING_TOLERANCE` or more.
    """
    difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    if not difference < EMBEDDING_TOLERANCE:
        raise ValueError(
            f"The export was removed, because embeddings computed by {program} differ from the model's by "
            f"{difference:.1e}, more than {EMBEDDING_TOLERANCE:.0e}. Leave this format out of --formats."
        )
