"""How a command begins and ends: flags are read before the imports that take seconds, and faults end in one line.

    from common.start import start_command

    if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
        start_command("captions.stage_arguments:ScoreArguments", __doc__)

    import torch

    from captions.stage_arguments import ScoreArguments
    from common.cli import parse, run_command


    def main(argv: list[str] | None = None) -> None:
        args = parse(ScoreArguments, __doc__, argv)


    if __name__ == "__main__":
        run_command(main)

The arguments are dataclasses of a module that imports neither torch nor datasets.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.progress import bars_for_terminals_only

T = TypeVar("T")


def run_command(main: Callable[[], object], resumes: bool = False) -> None:
    """`main()`; Ctrl-C ends it in one line with the exit code 130, once it has cleaned up, and no bar fills a log.

    Args:
        main: of the command.
        resumes: whether the same command goes on from what it has kept, which Ctrl-C then says.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    bars_for_terminals_only()
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nStopped.{' Run the same command again to go on.' * resumes}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def parse(
    kind: type[T],
    description: str | None,
    argv: list[str] | None = None,
    hide: Callable[[str], str] = str,
) -> T:
    """The arguments of a command line.

    Args:
        kind: dataclass with a field for each flag, as `transformers.HfArgumentParser` takes it. A field whose metadata
            have `"positional": True` is given without its name. Its `help_pt`, name of a flag -> text, replaces the
            help where the locale is Portuguese; the text of "" is the description.
        description: text of `--help`, the docstring of the command's module.
        argv: the words, `sys.argv[1:]` where None.
        hide: takes secrets out of what is said of a value.

    Raises:
        ValueError: a flag is unknown (the nearest one is named), or a value breaks its rule.
        SystemExit: `--help`, or a value is of the wrong type.
    """
    flags = parser(kind, hide, description=description)
    args, unknown = flags.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    refuse_unknown(unknown, [known.name for known in fields(kind)])
    return args


def parser(kinds: Any, hide: Callable[[str], str] = str, **options: Any) -> argparse.ArgumentParser:
    """An `HfArgumentParser` of this project's manners, for dataclasses."""

    help_pt = getattr(kinds, "help_pt", {}) if locale_is_portuguese() else {}

    class Parser(_hf_argument_parser()):
        def add_argument(self, *names: str, positional: bool = False, **options: Any) -> argparse.Action:
            if help_pt and options.get("action") == "help":
                options["help"] = "mostra esta ajuda e termina"
            elif help_pt:
                default = " (padrão: %(default)s)" if "default" in options else ""
                options["help"] = help_pt[names[0].removeprefix("--").removeprefix("no_")] + default
            if positional:
                options.pop("required", None)
                names = (names[0].lstrip("-"),)
            return super().add_argument(*names, **options)

        def error(self, message: str) -> NoReturn:
            self.exit(2, f"error: {hide(message)} (--help lists all)\n")

    options = {"prog": program(), "allow_abbrev": False, "formatter_class": CommandHelp} | options
    if help_pt:
        options |= {"description": help_pt[""], "formatter_class": argparse.RawDescriptionHelpFormatter}
    return Parser(kinds, **options)


def refuse_unknown(words: list[str], known: list[str]) -> None:
    """Raise ValueError where words of a command line are left over; values are not shown, one may be a secret."""
    flags = [word.split("=")[0] for word in words if word.startswith("-")]
    if flags:
        reject(flags[0], "flag", [f"--{name}" for name in known])
    if words:
        raise ValueError("There is a value without a flag. `--help` lists all flags.")


def reject(name: str, what: str, known: list[str]) -> NoReturn:
    """Raise ValueError about a flag or key that is not known; the nearest one is named."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"Unknown {what}: `{name}`. Did you mean `{nearest}`? `--help` lists all.")


def program() -> str:
    """The command as its user has called it, such as "python -m captions.score"."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def locale_is_portuguese() -> bool:
    """Whether messages are wanted in Portuguese: the first of LC_ALL, LC_MESSAGES and LANG that is set says so."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return next(filter(None, names), "").startswith("pt")


class CommandHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags, and the commands of the description on lines of their own."""


def _hf_argument_parser() -> type[argparse.ArgumentParser]:
    """transformers' class, out of its own file: the package around it takes half a second to import."""
    if "transformers" not in sys.modules:
        folder = find_spec("transformers").submodule_search_locations[0]
        spec = spec_from_file_location("hf_argparser", Path(folder) / "hf_argparser.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.HfArgumentParser
    from transformers import HfArgumentParser

    return HfArgumentParser
