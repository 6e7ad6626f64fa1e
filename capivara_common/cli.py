"""Command lines: dataclasses of flags, YAML files of the same names, `--help`, and errors in one line.

transformers' `HfArgumentParser` makes the flags out of the dataclass, and checks the types of their values.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from capivara_common.interrupt import raise_on_interrupt
from capivara_common.privacy import make_printable
from capivara_common.progress import configure_progress_bars

T = TypeVar("T")


class UsageError(ValueError):
    """A command line that can't be: an unknown flag, a value that breaks its type or rule. The command ends with 2."""


def coded_error(
    error_type: Callable[[str], Exception], code: str | None, template: str, /, **values: object
) -> Exception:
    """An error of a text with `{name}` for each of the values, and a code: the key of `capivara_search/words.yaml`."""
    error = error_type(template.format(**values))
    error.code, error.values = code, values
    return error


def run_command(main: Callable[[], object], resumable: bool = False) -> None:
    """`main()` of a process: an error in what the user has given (a value, a file, a package) ends it with one line.

    So does Ctrl-C, once it has cleaned up, with 130; its line says that the same command goes on, where it `resumes`.
    """
    raise_on_interrupt()
    configure_progress_bars()
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nStopped.{' Run the same command again to go on.' * resumable}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {make_printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def parse_arguments(
    arguments_type: type[T], description: str | None, argv: list[str] | None = None, config: bool = False
) -> T:
    """The arguments of a command line.

    Args:
        kind: dataclass with a `flag` for each argument; `gone` in it has flags of earlier versions, with what there is
            instead, `groups` the dataclasses it consists of, each a group of the help by its `_argument_group_name`.
        description: text of `--help`.
        argv: the words, `sys.argv[1:]` where None.
        config: whether `--config FILE.yaml` gives values, too; flags win over it.

    Raises:
        WrongUse: a key or flag is unknown (the nearest is named) or missing, or a value breaks its type or rule.
        SystemExit: `--help`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    flags = _build_parser(arguments_type, description)
    try:
        if config:
            flags.add_argument("--config", help="YAML file of the same names as the flags below; flags win over it.")
            if file := flags.parse_known_args(words)[0].config:
                # Before the command line: values of both are read, checked and converted by the same code, so `1e-4`,
                # which PyYAML takes for text, becomes a number.
                words = config_to_flags(read_yaml_config(Path(file)), arguments_type, file) + words
        values = vars(flags.parse_args(words))
        return arguments_type(**{known.name: values[known.name] for known in fields(arguments_type)})
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _build_parser(arguments_type: Any, description: str | None) -> argparse.ArgumentParser:
    """An `HfArgumentParser` with positional arguments, `null` for none, and errors that are a ValueError."""
    from transformers import HfArgumentParser  # half a second, which `capivara` does not have

    class Parser(HfArgumentParser):
        def add_argument(self, *names: str, positional: bool = False, **options: Any) -> argparse.Action:
            if positional:
                options.pop("required", None)
                names = (names[0].lstrip("-"),)
            return super().add_argument(*names, **options)

        def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> tuple[Any, list[str]]:
            for name in (word.split("=")[0] for word in args):  # what is after the = may be a secret
                if re.fullmatch(r"--?[A-Za-z][\w-]*", name) and name not in self._option_string_actions:
                    if instead := getattr(arguments_type, "gone", {}).get(name.lstrip("-").replace("-", "_")):
                        self.error(f"`{name}` is gone: {instead}.")
                    self.error(
                        unknown_name_message(
                            name, "flag", [a.option_strings[0] for a in self._actions if a.option_strings]
                        )
                    )
            found, left = super().parse_known_args(args, namespace)
            return (found, left) if not left else self.error("There is a value without a flag")

        def _get_value(self, action: argparse.Action, word: str) -> Any:
            none = word == "null" and action.default is None and not action.required
            return None if none else super()._get_value(action, word)

        def error(self, message: str) -> NoReturn:
            raise ValueError(message if message.endswith(".") else f"{message} (--help lists all)")

    options = {"allow_abbrev": False, "formatter_class": CommandHelpFormatter}
    return Parser(getattr(arguments_type, "groups", arguments_type), description=description, **options)


class CommandHelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags that have one, and the description's commands on lines of their own."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or "") if action.default is None else super()._get_help_string(action) or ""


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field of a dataclass of arguments, for `parse`; without a default (`...`) the flag must be given.

    `options` are those of `argparse`, or `positional=True` for an argument without a flag.
    """
    kept = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help, **options}, **({} if default is ... else kept))


def check_at_least(arguments: Any, minimum: float, *names: str) -> None:
    """Raise ValueError where an argument of these names is below `minimum`, or not a number; None passes."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_between(arguments: Any, low: float, high: float, *names: str) -> None:
    """Raise ValueError where an argument of these names is not from `low` to `high`; None passes."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}.")


def read_yaml_config(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, every scalar as text. Raises OSError, ValueError where it is no mapping."""
    import yaml

    try:
        # BaseLoader: `no` stays "no", and `1e-4` is converted like a flag's value.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    return content


def config_to_flags(content: dict[str, Any], arguments_type: type, subject: str) -> list[str]:
    """Keys and values of a file as the flags that say the same; `where` is the subject of an error.

    Raises ValueError where a key is none of the dataclass `kind`, a value is a mapping, or a list has a flag.
    """
    flags = []
    for key, value in content.items():
        if instead := getattr(arguments_type, "gone", {}).get(key):
            raise ValueError(f"{subject}: `{key}` is gone: {instead}.")
        if key not in (names := [known.name for known in fields(arguments_type)]):
            raise ValueError(unknown_name_message(str(key), f"key in {subject}", names))
        if isinstance(value, dict):
            raise ValueError(f"{subject}: `{key}` must be a value or a list, got a mapping.")
        if value in ("", "~", "null", []):
            continue
        if not isinstance(value, list):
            flags.append(f"--{key}={value}")  # one word: a value may begin with "-"
            continue
        for word in map(str, value):
            if word.startswith("-") and not re.fullmatch(r"-(\d+|\d*\.\d+)", word):  # argparse's numbers
                raise ValueError(
                    f"{subject}: `{key}` lists {word!r}, which would be a flag; no value may begin with -."
                )
        flags += [f"--{key}", *map(str, value)]
    return flags


def unknown_name_message(name: str, kind: str, known: list[str], advice: str = "`--help` lists all.") -> str:
    """What is said of a flag or key that there is not; the nearest one is named if it is near."""
    bare = {key.lstrip("-"): key for key in known}
    nearest = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    return f"Unknown {kind}: `{name}`.{f' Did you mean `{bare[nearest[0]]}`?' if nearest else ''} {advice}"
