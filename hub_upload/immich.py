"""A folder that Immich's machine-learning service reads, as a model of open_clip's kind, and the check of one.

    python -m hub_upload.export --model MODEL --output repository --formats immich
    python -m hub_upload.export --model MODEL --output repository --formats immich --textual_only --base BASE
    python -m hub_upload.immich --check repository

    config.json                                   text_cfg.context_length, the tokens of a text
    textual/model.onnx                            text (1, 77), int32 -> embedding (1, width)
    textual/tokenizer.json, tokenizer_config.json pad_token, which fills every text up
    visual/model.onnx                             image (1, 3, side, side), float32 -> embedding (1, width)
    visual/preprocess_cfg.json                    size, interpolation, mean, std, resize_mode

Immich finds it as clip/NAME in its model cache, under a name of its own list. The text side alone replaces that of the
base, whose embeddings of pictures stay, where both have the same image side. docs/immich.md has the steps.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from capivara_common.cli import flag, parse, run_command, user_errors
from capivara_common.environment import require
from capivara_common.hub_cache import model_folder
from capivara_common.image_side_digest import image_difference
from capivara_search.models import CONVERTER
from hub_upload.export_arguments import ExportArguments
from hub_upload.immich_folder import BASE_NAME, check

logger = logging.getLogger("capivara")


@dataclass
class CheckArguments:
    """Arguments of `hub_upload.immich`."""

    check: Path = flag(..., "Folder of one model: an export, or one in the cache of Immich; nothing is written.")


def write(args: ExportArguments, folder: Path) -> None:
    """Write the files of `--formats immich` to `folder`; see `export_alone`.

    Raises:
        ValueError: the model is damaged or can't be expressed, or, for the text side alone, the image side is not the
            base's.
        ImportError: a package of ONNX is missing.
    """
    require("immich in --formats", "onnx", "onnx", "onnxscript", "onnxruntime")
    if args.textual_only:
        check_image_side(args.model, args.base)
    from hub_upload.immich_graphs import write_towers  # torch: after what can be refused without it

    base = write_towers(args.model, folder, args.output, args.textual_only)
    if faults := check(folder):
        raise ValueError(f"Immich would not read what was made; nothing was kept. {' '.join(faults)}")
    if not base:
        logger.info("Immich's list has no model of this architecture; one of the same width lends its name, if any.")
    elif args.textual_only:
        logger.info("Immich: textual/ takes the place of clip/%s/textual in the model cache.", BASE_NAME)
    else:
        logger.info("Immich: the folder takes the place of clip/%s in the model cache.", BASE_NAME)


def check_image_side(model: Path, base: str) -> None:
    """Raise ValueError unless both models embed pictures alike, to the bit: tower, projection and preprocessing."""
    if difference := image_difference(model, model_folder(base, CONVERTER)):
        raise ValueError(
            f"The image side of {model} is not that of {base}: {difference}. Pictures that Immich has embedded with "
            "the base would not fit its texts. Leave --textual_only out, lay both towers into the cache, and run smart "
            "search for all."
        )


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(CheckArguments, __doc__, argv)
    require("hub_upload.immich", "onnx", "onnxruntime", "tokenizers")
    if faults := check(args.check):
        sys.exit("\n".join([*faults, f"error: Immich would not use {args.check} as it is; faults: {len(faults)}."]))
    both = (args.check / "visual").is_dir() and (args.check / "textual").is_dir()
    print(f"Immich reads {args.check}: {'both towers' if both else 'one tower, beside those in its cache'}.")


if __name__ == "__main__":
    run_command(main)
