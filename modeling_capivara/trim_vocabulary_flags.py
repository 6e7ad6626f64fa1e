"""Flags of `trim_vocabulary`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

# Of the first language and of each further one, the most frequent: of long Portuguese sentences one in 400 loses a
# piece, and the model stays below 215 million parameters. docs/benchmarks.md has other numbers.
WORDS = (150_000, 50_000)


def parser() -> "argparse.ArgumentParser":
    """The flags of the command."""
    from capivara_common.cli import parser as one_line_parser  # here: by now Ctrl-C works

    flags = one_line_parser(
        [],
        prog="python -m modeling_capivara.trim_vocabulary",
        description="Write a model that has only the word pieces which some languages use, or, with --restore, give "
        "such a model its whole vocabulary back. A text whose pieces are all kept has the same embedding.",
    )
    flags.add_argument("model", metavar="MODEL", type=Path, help="folder of the model")
    flags.add_argument("output", metavar="OUTPUT", type=Path, help="folder to create; must not exist, or be empty")
    what = flags.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--languages",
        metavar="CODE",
        nargs="+",
        help="keep the pieces of these languages' most frequent words, of which the package wordfreq has lists, and "
        "all single letters, digits, punctuation marks and emoji: pt en",
    )
    what.add_argument(
        "--restore",
        metavar="BASE",
        type=Path,
        help="folder of the model that MODEL was trimmed from: rows that were cut are taken from there, all else from "
        "MODEL, as it was trained since",
    )
    flags.add_argument(
        "--words",
        metavar="N",
        type=_positive,
        nargs="+",
        default=list(WORDS),
        help="words of each language, in their order; the last number is that of all further languages "
        f"(default: {' '.join(map(str, WORDS))})",
    )
    flags.add_argument(
        "--texts",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="with --languages: keep the pieces of these files, too; UTF-8, a text a line",
    )
    flags.add_argument(
        "--held-out",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="with --languages: files that choose nothing; printed is how many of their texts have a piece that was "
        "cut, and how far the embeddings of those move",
    )
    return flags


def _positive(text: str) -> int:
    import argparse

    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)
