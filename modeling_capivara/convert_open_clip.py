"""CAPIVARA between open_clip's format and transformers', both ways, checked on random inputs before it is kept.

    python -m modeling_capivara.convert_open_clip hf-hub:hiaac-nlp/CAPIVARA capivara-transformers
    python -m modeling_capivara.convert_open_clip capivara-transformers capivara-open-clip --to-open-clip

`open_clip.py` reads and writes; here both programs are run on what was written, and their outputs compared.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capivara_common.cli import parser, run_command
from capivara_common.files import whole_folder, write_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, is_capivara, model_folder

from .configuration_capivara import CapivaraConfig
from .loading import load_model, load_processor, read_config
from .modeling_capivara import CapivaraModel, similarity_logits
from .open_clip import (
    BASE_TEXT_MODEL,
    BASE_TEXT_NAMES,
    CONVERTER,
    SIZES,
    TOKENIZER_SUFFIXES,
    find_open_clip,
    open_clip_model_cfg,
    preprocess_cfg_of,
    write_capivara,
    write_open_clip_weights,
)
from .two_towers import random_images, random_texts

TOLERANCE = 1e-4  # of cosines and logits in float32; the two programs differ by some 1e-6, a wrong layer by 1e-3 and up


class Conversion(NamedTuple):
    """The result of a conversion."""

    largest_difference: float  # between the two programs: unit-length embeddings and logits, on random inputs
    notes: list[str]  # whole sentences for the person who asked


def main(argv: list[str] | None = None) -> None:
    """The command."""
    flags = parser(
        [],
        prog="python -m modeling_capivara.convert_open_clip",
        description="Convert a CAPIVARA model from open_clip to transformers, or back. Both models are then loaded "
        f"from files and compared on random images and texts; above a difference of {TOLERANCE:g} nothing is kept.",
    )
    help = "hf-hub:OWNER/NAME, a folder, or a checkpoint file (.safetensors, .bin, .pt, .pth, .ckpt; tensors "
    help += "alone are read). A bare file is taken to have the published architecture. With --to-open-clip: a "
    flags.add_argument("source", metavar="SOURCE", help=help + "transformers model folder or a Hub id.")
    flags.add_argument("output", metavar="OUTPUT", type=Path, help="folder to create; must not exist, or be empty")
    flags.add_argument("--to-open-clip", action="store_true", help="convert from transformers to open_clip")
    help = "tokenizer where SOURCE neither holds nor names one, as a bare file does not "
    help += f"(default: {BASE_TEXT_MODEL}); not with --to-open-clip"
    flags.add_argument("--tokenizer", metavar="NAME_OR_FOLDER", help=help)
    help = "with --to-open-clip: Hub id from which open_clip shall take the text tower's configuration, such as "
    help += f"{BASE_TEXT_MODEL}: for a folder to be published. Without it the configuration is written to "
    help += "OUTPUT/text_model, and OUTPUT works offline but must stay where it is."
    flags.add_argument("--hf-model-name", metavar="ID", help=help)
    args = flags.parse_args(argv)
    try:
        result = convert(**vars(args))
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
        source, output, to_open_clip, tokenizer, hf_model_name: as for the command line.
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
    try:
        import open_clip  # noqa: F401 - missing, it is named before the work
    except ImportError as error:
        raise ImportError("open_clip is needed to compare the two models: pip install open_clip_torch") from error
    if to_open_clip:
        return _to_open_clip(source, output, hf_model_name)
    return _to_transformers(source, output, tokenizer, config)


def free_output(output: str | Path) -> Path:
    """Its absolute path. Raises FileExistsError where something is there."""
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"OUTPUT {output} exists and is not an empty folder; remove it or name another.")
    return output


def _to_transformers(source: str, output: Path, tokenizer: str | None, config: CapivaraConfig | None) -> Conversion:
    found = find_open_clip(source, tokenizer)
    with whole_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        model, state, notes = write_capivara(found, folder, config)
        # open_clip is given the source's own fields and tokenizer, and the text tower's configuration without the Hub.
        text_cfg = found.model_cfg["text_cfg"] | {"hf_model_name": f"{scratch}/text_model"}
        text_cfg |= {"hf_tokenizer_name": BASE_TEXT_MODEL}  # any name: a local folder's own tokenizer is taken
        settings = {"model_cfg": found.model_cfg | {"text_cfg": text_cfg}, "preprocess_cfg": found.preprocess_cfg}
        write_json(Path(scratch, OPEN_CLIP_CONFIG), settings)
        model.config.text_config.save_pretrained(f"{scratch}/text_model")
        if Path(found.tokenizer).is_dir():
            for path in Path(found.tokenizer).iterdir():
                if path.suffix in TOKENIZER_SUFFIXES and path.name not in (OPEN_CLIP_CONFIG, "config.json"):
                    shutil.copy(path, scratch)
        else:
            load_processor(folder).tokenizer.plain().save_pretrained(scratch)
        return Conversion(_checked_difference(model, folder, Path(scratch), text_cfg, state), notes)


def _to_open_clip(source: str, output: Path, hf_model_name: str | None) -> Conversion:
    if (Path(source) / OPEN_CLIP_CONFIG).is_file() and not is_capivara(Path(source)):
        raise ValueError(f"SOURCE {source} is an open_clip model already: leave out --to-open-clip.")
    folder = model_folder(source, CONVERTER)
    config, processor = read_config(folder), load_processor(folder)
    # What open_clip's configuration can't state is refused here, before the weights are read.
    size, preprocess_cfg = preprocess_cfg_of(processor.image_processor)
    model_cfg = open_clip_model_cfg(config, hf_model_name or str(output / "text_model"), size)  # where it will be
    model_cfg["text_cfg"]["hf_tokenizer_name"] = hf_model_name or BASE_TEXT_MODEL  # read for the Hub only
    model = load_model(folder)
    with whole_folder(output) as target, tempfile.TemporaryDirectory() as scratch:
        write_json(target / OPEN_CLIP_CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
        write_open_clip_weights(model, target)
        processor.tokenizer.plain().save_pretrained(target)  # open_clip repairs texts itself
        text_folder = scratch if hf_model_name else str(target / "text_model")
        config.text_config.save_pretrained(text_folder)
        text_cfg = model_cfg["text_cfg"] | {"hf_model_name": text_folder}  # where it lies for now
        difference = _checked_difference(model, folder, target, text_cfg)
    if not hf_model_name:
        note = (
            f"Text tower: open_clip reads its configuration from {output / 'text_model'}. The folder loads offline; if "
            f"moved, change text_cfg.hf_model_name in {OPEN_CLIP_CONFIG}. To publish it, convert with --hf-model-name."
        )
        return Conversion(difference, [note])
    note = (
        f"Text tower: open_clip fetches its configuration from the Hub repository {hf_model_name}. The folder can be "
        "published; it needs the network, or that repository in the cache, and was checked with the model's own copy."
    )
    base = CapivaraConfig().text_config
    if hf_model_name in BASE_TEXT_NAMES and any(getattr(config.text_config, k) != getattr(base, k) for k in SIZES):
        note += f" Careful: this text tower is not of the size of {hf_model_name}."
    return Conversion(difference, [note])


@torch.no_grad()
def _checked_difference(
    model: CapivaraModel,
    folder: Path,
    open_clip_folder: Path,
    text_cfg: dict[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> float:
    """Largest difference of unit-length embeddings and of logits; above `TOLERANCE` it raises ValueError.

    Of our `model`, its processor in `folder`, and open_clip's of `open_clip_folder`, given another `text_cfg` and,
    where they are not there, the weights `state`. Ours pads texts to the longest of a batch, open_clip to 77 tokens.
    """
    import open_clip  # takes seconds, and only this program needs it

    name, text_cfg = f"local-dir:{open_clip_folder}", text_cfg | {"hf_model_pretrained": False}
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # "no pretrained weights": they come two lines below
    try:
        theirs, _, preprocess = open_clip.create_model_and_transforms(
            name, load_weights=state is None, pretrained_text=False, text_cfg=text_cfg
        )
        if state is not None:
            theirs.load_state_dict(state, strict=True)
    except RuntimeError as error:  # a few timm models have, under open_clip, a head of another width
        raise ValueError(f"open_clip does not build this model: {' '.join(str(error).split())}") from error
    finally:
        logging.disable(silenced)
    model, theirs, processor = model.eval(), theirs.eval(), load_processor(folder)
    images, texts = random_images(), random_texts()
    # Short texts apart: beside a long one ours would be padded to 77 tokens as open_clip's are, and prove less.
    parts = [model(**processor(text=some, return_tensors="pt")).text_embeds for some in (texts[:3], texts[3:])]
    ours = model(**processor(images=images, return_tensors="pt")).image_embeds, torch.cat(parts)
    pixels, tokens = torch.stack([preprocess(image) for image in images]), open_clip.get_tokenizer(name)(texts)
    found = theirs.encode_image(pixels, normalize=True), theirs.encode_text(tokens, normalize=True)
    our_logits = similarity_logits(ours[1], ours[0], model.logit_scale)
    pairs = [*zip(ours, found, strict=True), (our_logits, theirs.logit_scale.exp() * found[1] @ found[0].T)]
    # torch's max, unlike Python's, passes NaN on.
    difference = torch.stack([(one - other).abs().max() for one, other in pairs]).max().item()
    if not difference <= TOLERANCE:  # also when it is not a number
        raise ValueError(
            f"The converted model differs from the original by {difference:.3g} on random inputs, above {TOLERANCE:g}; "
            "nothing was kept. One of the two programs reads this model in another way."
        )
    return difference


if __name__ == "__main__":
    run_command(main)
