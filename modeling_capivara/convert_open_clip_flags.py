"""Flags of `convert_open_clip`, which the package reads before the imports that take seconds; how commands end."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

TOLERANCE = 1e-4  # of cosines and logits in float32; the two programs differ by some 1e-6, a wrong layer by 1e-3 and up
BASE_TEXT_MODEL = "FacebookAI/xlm-roberta-base"


def parser() -> "argparse.ArgumentParser":
    """The flags of the command."""
    import argparse  # here: by now Ctrl-C works

    flags = argparse.ArgumentParser(
        prog="python -m modeling_capivara.convert_open_clip",
        description="Convert a CAPIVARA model from open_clip to transformers, or back. Both models are then loaded "
        f"from files and compared on random images and texts; above a difference of {TOLERANCE:g} nothing is kept.",
    )
    flags.add_argument(
        "source",
        metavar="SOURCE",
        help="hf-hub:OWNER/NAME, local-dir:FOLDER, or a checkpoint file (.safetensors, .bin, .pt, .pth, or the .ckpt "
        "of the authors' training program; read without executing anything). A bare file is taken to have the "
        "published architecture. With --to-open-clip: a transformers model folder or a Hub id.",
    )
    flags.add_argument("output", metavar="OUTPUT", type=Path, help="folder to create; must not exist, or be empty")
    flags.add_argument("--to-open-clip", action="store_true", help="convert from transformers to open_clip")
    flags.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="tokenizer where SOURCE neither holds nor names one, as a bare file does not "
        f"(default: {BASE_TEXT_MODEL}); not with --to-open-clip",
    )
    flags.add_argument(
        "--hf-model-name",
        metavar="ID",
        help="with --to-open-clip: Hub id from which open_clip shall take the text tower's configuration, such as "
        f"{BASE_TEXT_MODEL}: for a folder to be published. Without it the configuration is written to "
        "OUTPUT/text_model, and OUTPUT works offline but must stay where it is.",
    )
    return flags


def answer_flags(parser: Callable[[], "argparse.ArgumentParser"]) -> None:
    """End here by `--help` or a wrong flag; else let Ctrl-C end the imports that follow in one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell has it ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(_stopped()))
    parser().parse_args(sys.argv[1:])


def run(main: Callable[[], None]) -> None:
    """`main()`, which Ctrl-C ends in one line with the exit code 130, once it has cleaned up."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # bars are for terminals, not for logs
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(_stopped())


def _stopped() -> int:
    print("\nStopped; nothing was kept.", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT
