"""CAPIVARA between open_clip's format and transformers', both ways, checked on random inputs before it is kept.

    python -m modeling_capivara.convert_open_clip hf-hub:hiaac-nlp/CAPIVARA capivara-transformers
    python -m modeling_capivara.convert_open_clip capivara-transformers capivara-open-clip --to-open-clip

It reads top to bottom: command, two directions, comparison. `open_clip_source.py` finds the models,
`open_clip_mapping.py` knows what is called how in the two programs.
"""

import copy
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .configuration_capivara import CapivaraConfig
from .convert_open_clip_flags import BASE_TEXT_MODEL, TOLERANCE, parser, run
from .loading import load_model, load_processor, read_config
from .loss_capivara import similarity_logits
from .modeling_capivara import CapivaraModel
from .open_clip_checkpoint import OPEN_CLIP_CONFIG, WEIGHT_FILES
from .open_clip_conversion import random_images, random_texts, read_open_clip, write_read
from .open_clip_mapping import BASE_TEXT_NAMES, open_clip_model_cfg, open_clip_state_dict, preprocess_cfg_of
from .open_clip_source import (
    TOKENIZER_FILES,
    OpenClipSource,
    find_capivara,
    find_open_clip,
    read_fields,
    read_open_clip_state,
)
from .processing_capivara import CapivaraProcessor


class Conversion(NamedTuple):
    """The result of a conversion."""

    largest_difference: float  # between the two programs: unit-length embeddings and logits, on random inputs
    notes: list[str]  # whole sentences for the person who asked


# --- Command ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parser().parse_args(argv)
    try:
        result = convert(args.source, args.output, args.to_open_clip, args.tokenizer, args.hf_model_name)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"convert_open_clip: {error}") from error
    print(*result.notes, sep="\n")
    print(f"Largest difference between open_clip and transformers: {result.largest_difference:.2e}")
    print(f"Written: {args.output}")


def convert(
    source: str,
    output: str | Path,
    to_open_clip: bool = False,
    tokenizer: str | None = None,
    hf_model_name: str | None = None,
    config: CapivaraConfig | None = None,
) -> Conversion:
    """Convert `source` into the new folder `output`, which appears whole and checked, or not at all.

    Args:
        source: as for the command line.
        output: folder that does not exist yet, or is empty.
        to_open_clip: from transformers to open_clip, not the other way.
        tokenizer: folder or Hub id, where `source` neither holds nor names a tokenizer.
        hf_model_name: with `to_open_clip`, Hub id of the text tower's configuration.
        config: architecture of a bare checkpoint file; None is the published base.

    Raises:
        ValueError: the source is not what it should be, holds what is not supported, or the two models differ.
        OSError: the output exists, or cannot be written (disk full).
        ImportError: open_clip is not installed.
    """
    output = free_output(output)
    if to_open_clip and (tokenizer or config):
        raise ValueError("--tokenizer is for the other direction; with --to-open-clip the tokenizer is SOURCE's own.")
    if hf_model_name and not to_open_clip:
        raise ValueError("--hf-model-name is for --to-open-clip only.")
    _open_clip()
    if to_open_clip:
        return _to_open_clip(source, output, hf_model_name)
    return _to_transformers(source, output, tokenizer, config)


# --- The two directions ----------------------------------------------------------------------------------------------


def _to_transformers(source: str, output: Path, tokenizer: str | None, config: CapivaraConfig | None) -> Conversion:
    found = find_open_clip(source, tokenizer)
    read = read_open_clip(found, config)
    with new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        write_read(read, found, folder)
        del read.state
        reference = _reference_folder(Path(scratch), found, read.config, read.processor.tokenizer.plain())
        difference = _checked_difference(folder, reference, found.weights)
    return Conversion(difference, read.notes)


def _to_open_clip(source: str, output: Path, hf_model_name: str | None) -> Conversion:
    folder = find_capivara(source)
    config, processor = read_config(folder), load_processor(folder)
    # What open_clip's configuration can't state is refused here, before the weights are read.
    size, preprocess_cfg = preprocess_cfg_of(processor.image_processor)
    text_name = hf_model_name or str(output / "text_model")  # where it will be, not the temporary folder
    model_cfg = open_clip_model_cfg(config, text_name, size)
    model_cfg["text_cfg"]["hf_tokenizer_name"] = hf_model_name or BASE_TEXT_MODEL  # read for the Hub only
    tensors = {k: v.contiguous() for k, v in open_clip_state_dict(load_model(folder)).items()}
    with new_folder(output) as target, tempfile.TemporaryDirectory() as scratch:
        _write_config(target, model_cfg, preprocess_cfg)
        save_file(tensors, target / WEIGHT_FILES[0], metadata={"format": "pt"})
        del tensors
        processor.tokenizer.plain().save_pretrained(target)  # open_clip repairs texts itself
        text_folder = Path(scratch) if hf_model_name else target / "text_model"
        config.text_config.save_pretrained(text_folder)
        difference = _checked_difference(folder, target, None, text_folder)
    return Conversion(difference, [_text_name_note(hf_model_name, text_name, config)])


def _write_config(folder: Path, model_cfg: dict, preprocess_cfg: dict) -> None:
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=2) + "\n"
    (folder / OPEN_CLIP_CONFIG).write_text(text, encoding="utf-8")


def _text_name_note(hf_model_name: str | None, text_name: str, config: CapivaraConfig) -> str:
    if not hf_model_name:
        return (
            f"Text tower: open_clip reads its configuration from {text_name}. The folder loads offline; if moved, "
            f"change text_cfg.hf_model_name in {OPEN_CLIP_CONFIG}. To publish it, convert with --hf-model-name."
        )
    note = (
        f"Text tower: open_clip fetches its configuration from the Hub repository {hf_model_name}. The folder can be "
        "published; it needs the network, or that repository in the cache, and was checked with the model's own copy."
    )
    base = CapivaraConfig().text_config
    if hf_model_name in BASE_TEXT_NAMES and any(getattr(config.text_config, k) != getattr(base, k) for k in SIZES):
        note += f" Careful: this text tower is not of the size of {hf_model_name}."
    return note


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")


def free_output(output: str | Path) -> Path:
    """Its absolute path. Raises FileExistsError where something is there."""
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"OUTPUT {output} exists and is not an empty folder; remove it or name another.")
    return output


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `output` that takes its name at the end, or is removed on any error."""
    there = next(parent for parent in output.parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.tmp-", dir=there) as scratch:
            folder = Path(scratch) / "folder"  # the temporary one is closed to other users, and would stay so
            folder.mkdir()
            yield folder
            for path in folder.rglob("*.safetensors"):
                path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            output.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder, output)
    except Exception as error:
        # safetensors reports the system's error as text inside its own exception.
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            raise OSError(
                errno.ENOSPC, f"no space left for OUTPUT {output}; nothing was kept. Free space or name another disk"
            ) from error
        raise


# --- Comparison ------------------------------------------------------------------------------------------------------


def _reference_folder(
    scratch: Path, found: OpenClipSource, config: CapivaraConfig, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """An open_clip folder without weights that needs no network: the source's own fields, the text tower's beside."""
    model_cfg = copy.deepcopy(found.model_cfg)
    model_cfg["text_cfg"]["hf_model_name"] = str(scratch / "text_model")
    model_cfg["text_cfg"]["hf_tokenizer_name"] = BASE_TEXT_MODEL  # any name: a local folder's own tokenizer is taken
    config.text_config.save_pretrained(scratch / "text_model")
    _write_config(scratch, model_cfg, found.preprocess_cfg)
    if Path(found.tokenizer).is_dir():
        for name in TOKENIZER_FILES:
            if (Path(found.tokenizer) / name).is_file():
                shutil.copy(Path(found.tokenizer) / name, scratch)
    else:
        tokenizer.save_pretrained(scratch)
    return scratch


def _checked_difference(
    capivara: Path, open_clip_folder: Path, weights: Path | None, text_folder: Path | None = None
) -> float:
    """Load both models from their folders and compare them; a difference above `TOLERANCE` raises ValueError.

    Args:
        capivara: transformers folder.
        open_clip_folder: open_clip folder.
        weights: open_clip's checkpoint file; None is the one in its folder, loaded by open_clip itself.
        text_folder: where the text tower's configuration lies for now, if not where the folder states.
    """
    open_clip = _open_clip()
    name, overrides = f"local-dir:{open_clip_folder}", {}
    if text_folder:
        text_cfg = read_fields(open_clip_folder / OPEN_CLIP_CONFIG)["model_cfg"]["text_cfg"]
        overrides["text_cfg"] = {**text_cfg, "hf_model_name": str(text_folder), "hf_model_pretrained": False}
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # "no pretrained weights": they come two lines below
    try:
        reference, _, preprocess = open_clip.create_model_and_transforms(
            name, load_weights=weights is None, pretrained_text=False, **overrides
        )
        model, processor = load_model(capivara), load_processor(capivara)
        if weights is not None:
            reference.load_state_dict(read_open_clip_state(weights, model.config)[0], strict=True)
    except RuntimeError as error:  # a few timm models have, under open_clip, a head of another width
        raise ValueError(f"open_clip does not build this model: {' '.join(str(error).split())}") from error
    finally:
        logging.disable(silenced)
    difference = largest_difference(model, processor, reference, preprocess, open_clip.get_tokenizer(name))
    if not difference <= TOLERANCE:  # also when it is not a number
        raise ValueError(
            f"The converted model differs from the original by {difference:.3g} on random inputs, above {TOLERANCE:g}; "
            "nothing was kept. One of the two programs reads this model in another way."
        )
    return difference


@torch.no_grad()
def largest_difference(
    model: CapivaraModel,
    processor: CapivaraProcessor,
    reference: nn.Module,
    preprocess: Callable[[Image.Image], Tensor],
    tokenize: Callable[[list[str]], Tensor],
) -> float:
    """Largest difference of unit-length embeddings and of logits, on the same random images and texts.

    Our processor pads to the longest of a batch, open_clip's `tokenize` to 77 tokens.
    """
    model.eval()
    reference.eval()
    images, texts = random_images(), random_texts()
    our_images = model(**processor(images=images, return_tensors="pt")).image_embeds
    # Short texts apart: beside a long one ours would be padded to 77 tokens as open_clip's are, and prove less.
    batches = (texts[:3], texts[3:])
    our_texts = torch.cat([model(**processor(text=batch, return_tensors="pt")).text_embeds for batch in batches])
    their_images = reference.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    their_texts = reference.encode_text(tokenize(texts), normalize=True)
    our_logits = similarity_logits(our_texts, our_images, model.logit_scale)
    their_logits = reference.logit_scale.exp() * their_texts @ their_images.T
    pairs = [(our_images, their_images), (our_texts, their_texts), (our_logits, their_logits)]
    # torch's max, unlike Python's, passes NaN on.
    return torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max().item()


def _open_clip() -> Any:
    try:
        import open_clip  # takes seconds, and only this program needs it
    except ImportError as error:
        raise ImportError("open_clip is needed to compare the two models: pip install open_clip_torch") from error
    return open_clip


if __name__ == "__main__":
    run(main)
