"""Command lines: dataclasses of flags, YAML files of the same names, `--help`, and errors in one line.

    from capivara_common.start import start_command

    if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
        start_command("captions.stage_arguments:ScoreArguments", __doc__)

    import torch

    from captions.stage_arguments import ScoreArguments
    from capivara_common.cli import parse, run_command


    def main(argv: list[str] | None = None) -> None:
        args = parse(ScoreArguments, __doc__, argv)


    if __name__ == "__main__":
        run_command(main)

The arguments are dataclasses with a `flag` a field, in a module that imports neither torch nor datasets.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from functools import wraps
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from capivara_common.progress import prepare_bars

T = TypeVar("T")


class WrongUse(ValueError):
    """A value of a command line that is none, found after it was parsed: the command ends with 2 then, too."""


def run_command(main: Callable[[], object], resumes: bool = False) -> None:
    """`main()`; Ctrl-C ends it in one line with the exit code 130, once it has cleaned up, and no bar fills a log.

    Args:
        main: of the command.
        resumes: whether the same command, run again, resumes; the message of Ctrl-C then says so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_bars()
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
    groups: Sequence[type] = (),
    config: bool = False,
) -> T:
    """The arguments of a command line.

    Args:
        kind: dataclass with a `flag` for each argument.
        description: text of `--help`, the docstring of the command's module.
        argv: the words, `sys.argv[1:]` where None.
        hide: takes secrets out of what an error says of a value.
        groups: dataclasses that `kind` consists of, each a group of the help with its `_argument_group_name`.
        config: whether `--config FILE.yaml` gives values, too; flags win over it.

    Raises:
        ValueError: a key or flag is unknown (the nearest name is given), or a value breaks its rule.
        SystemExit: `--help`, a flag is missing, or a value is of the wrong type; without `argv` any of these faults,
            with 2.
    """
    gone = getattr(kind, "gone", {})
    flags = parser(groups or kind, hide, gone, description=description)
    names, words = [known.name for known in fields(kind)], sys.argv[1:] if argv is None else list(argv)
    try:
        if config:
            flags.add_argument("--config", help="YAML file of the same names as the flags below; flags win over it.")
            file = flags.parse_known_args(words)[0].config
            # The file stands before the command line: values of both are read, checked and converted by the same code,
            # so `1e-4`, which PyYAML takes for text, becomes a number.
            words = (as_flags(read_config(Path(file)), names, str(Path(file)), gone) if file else []) + words
        namespace, unknown = flags.parse_known_args(words)
        flags.refuse_unknown(unknown)
        values = vars(namespace)
        if config:
            del values["config"]
        return kind(**values)
    except (ValueError, OSError) as error:
        if argv is not None:
            raise
        flags.exit(2, f"error: {hide(str(error))}\n")


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, every scalar as text. Raises ValueError where it is none, or no mapping."""
    import yaml

    if not path.is_file():
        raise ValueError(f"The config file {path} does not exist.")
    try:
        # BaseLoader: `no` stays "no", and `1e-4` is converted like a flag's value.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    return content


def as_flags(content: dict[str, Any], names: list[str], where: str, gone: dict[str, str] | None = None) -> list[str]:
    """Keys and values as the flags that say the same; `where` is the subject of an error.

    Raises ValueError where a key is not among `names` (of those of earlier versions `gone` has what is used instead),
    or a value is neither text nor list.
    """
    flags = []
    for key, value in content.items():
        if instead := (gone or {}).get(key):
            raise ValueError(f"{where}: `{key}` is gone: {instead}.")
        if key not in names:
            reject(str(key), f"key in {where}", names)
        if isinstance(value, dict):
            raise ValueError(f"{where}: `{key}` must be a value or a list, got a mapping.")
        if value not in ("", "~", "null", []):
            flags += [f"--{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field of a dataclass of arguments, for `parse`.

    Args:
        default: a list is copied for every command line; `...` for a flag that must be given.
        help: what `--help` says of it.
        options: of `argparse`; `positional=True` for an argument without a flag.
    """
    metadata = {"help": help, **options}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def at_least(arguments: Any, minimum: float, *names: str) -> None:
    """Raise ValueError where an argument of these names is below `minimum`, or not a number; None passes."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def between(arguments: Any, low: float, high: float, *names: str) -> None:
    """Raise ValueError where an argument of these names is not from `low` to `high`; None passes."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}.")


def user_errors(main: Callable[..., T]) -> Callable[..., T]:
    """Decorate `main` of a command: an error in what the user has given (a value, a file, a package) is one line."""

    @wraps(main)
    def command(*args: Any, **options: Any) -> T:
        try:
            return main(*args, **options)
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, WrongUse) and (not args or args[0] is None):  # not called with words, as tests do
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            sys.exit(f"error: {error}")

    return command


def parser(
    kinds: Any, hide: Callable[[str], str] = str, gone: dict[str, str] | None = None, **options: Any
) -> argparse.ArgumentParser:
    """An `HfArgumentParser` for dataclasses, with positional arguments, `null` for no number, and errors of one line.

    `gone` has flags of earlier versions, with what is used instead.
    """

    class Parser(_hf_argument_parser()):
        words: Sequence[str] = ()  # that are parsed

        def add_argument(self, *names: str, positional: bool = False, **options: Any) -> argparse.Action:
            if positional:
                options.pop("required", None)
                names = (names[0].lstrip("-"),)
            return super().add_argument(*names, **options)

        def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
            self.words = sys.argv[1:] if args is None else args
            return super().parse_known_args(args, namespace)

        def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
            found, unknown = self.parse_known_args(args, namespace)
            try:
                self.refuse_unknown(unknown)
            except ValueError as error:
                self.exit(2, f"error: {hide(str(error))}\n")
            return found

        def refuse_unknown(self, words: Sequence[str]) -> None:
            spellings = [[name for name in action.option_strings if name[:2] == "--"] for action in self._actions]
            refuse_unknown(words, [names[0] for names in spellings if names], gone)

        def error(self, message: str) -> NoReturn:
            flags = {name for action in self._actions for name in action.option_strings}
            wrong = [word for word in self.words if word.startswith("--") and word.split("=")[0] not in flags]
            try:
                self.refuse_unknown(wrong)
            except ValueError as error:  # a wrong flag is often the one that is missing
                self.exit(2, f"error: {hide(f'{message}. {error}')}\n")
            self.exit(2, f"error: {hide(message)} (--help lists all)\n")

    options = {"prog": program(), "allow_abbrev": False, "formatter_class": CommandHelp} | options
    flags = Parser(kinds, **options)
    for action in flags._actions:
        if action.type in (int, float) and action.default is None and not action.required:
            action.type = _number_or_null(action.type)
    return flags


def _number_or_null(kind: type) -> Callable[[str], float | None]:
    def number(word: str) -> float | None:
        return None if word == "null" else kind(word)

    number.__name__ = kind.__name__  # which argparse's error says
    return number


def refuse_unknown(words: Sequence[str], known: list[str], gone: dict[str, str] | None = None) -> None:
    """Raise ValueError where words of a command line are left over; values are not shown, one may be a secret.

    Args:
        words: that are left over.
        known: the flags.
        gone: flags of earlier versions, with what is used instead.
    """
    flags = [word.split("=")[0] for word in words if word.startswith("-")]
    for flag in flags:
        if instead := (gone or {}).get(flag.lstrip("-")):
            raise ValueError(f"`{flag}` is gone: {instead}.")
    if flags:
        reject(flags[0], "flag", known)
    if words:
        raise ValueError("There is a value without a flag. `--help` lists all flags.")


def reject(name: str, what: str, known: list[str], rest: str = "`--help` lists all.") -> NoReturn:
    """Raise ValueError about a flag or key that is not known; the nearest one is named if it is near."""
    bare = {key.lstrip("-"): key for key in known}
    nearest = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    hint = f" Did you mean `{bare[nearest[0]]}`?" if nearest else ""
    raise ValueError(f"Unknown {what}: `{name}`.{hint} {rest}")


def program() -> str:
    """The command as its user has called it, such as "python -m captions.score"."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def locale_is_portuguese() -> bool:
    """Whether messages are wanted in Portuguese: the first of LC_ALL, LC_MESSAGES and LANG that is set says so."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return next(filter(None, names), "").startswith("pt")


class CommandHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags that have one, and the description's commands on lines of their own."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or "") if action.required else super()._get_help_string(action) or ""


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
