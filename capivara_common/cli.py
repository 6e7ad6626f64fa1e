"""Parse command lines: a dataclass of flags, YAML config files with the same names, `--help`, and one-line errors.

transformers' `HfArgumentParser` turns the fields of the dataclass into flags and checks the types of their values.

Example:
    @dataclass
    class Arguments:
        steps: int = flag(100, "Number of steps.")

    def main(argv: list[str] | None = None) -> None:
        args = parse_arguments(Arguments, "Train a model.", argv)

    run_command(main)
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from capivara_common.interrupt import raise_on_interrupt
from capivara_common.privacy import make_printable
from capivara_common.progress import configure_progress_bars

T = TypeVar("T")


class UsageError(ValueError):
    """A wrong command line: an unknown flag, or a value that breaks its type or rule. The exit code is 2."""


def coded_error(
    error_type: Callable[[str], Exception], code: str | None, template: str, /, **values: object
) -> Exception:
    """Create an error that the search can translate.

    Args:
        error_type: Exception class.
        code: Key of the translated message in the message file of `capivara_search`; None if it is not translated.
        template: English message with `{name}` for each value.
        **values: Values of the message.

    Returns:
        The exception, with the attributes `code` and `values`.
    """
    error = error_type(template.format(**values))
    error.code, error.values = code, values
    return error


def run_command(main: Callable[[], object], resumable: bool = False) -> None:
    """Run the `main` function of a process and report user errors in one line instead of a traceback.

    Wrong values, unreadable files and missing packages (ValueError, OSError, ImportError) end the process with exit
    code 1, or 2 for a `UsageError`. Ctrl-C ends it with 130 after `main` has cleaned up.

    Args:
        main: Function that does the work.
        resumable: Whether the same command continues after Ctrl-C; if so, the last line says it.
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
    """Parse a command line into a dataclass.

    Args:
        arguments_type: Dataclass with one `flag` per argument. If it inherits from several dataclasses, the class
            attribute `groups` may list them; each is a group of the help, titled by its `_argument_group_name`.
        description: Text of `--help`.
        argv: Words of the command line. Default: `sys.argv[1:]`.
        config: Whether `--config FILE.yaml` may provide values. Flags override the file.

    Returns:
        An instance of `arguments_type`.

    Raises:
        UsageError: If a key or flag is unknown (the message suggests the most similar name), a required flag is
            missing, or a value breaks its type or rule.
        SystemExit: After `--help`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _build_parser(arguments_type, description)
    try:
        if config:
            parser.add_argument("--config", help="YAML file with the names of the flags below. Flags override it.")
            if file := parser.parse_known_args(words)[0].config:
                # The file becomes flags before the others, so that the same code checks and converts both. PyYAML
                # alone would read `1e-4` as text.
                words = config_to_flags(read_yaml_config(Path(file)), arguments_type, file) + words
        values = vars(parser.parse_args(words))
        return arguments_type(**{known.name: values[known.name] for known in fields(arguments_type)})
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _build_parser(arguments_type: Any, description: str | None) -> argparse.ArgumentParser:
    """Build an `HfArgumentParser` that accepts positional arguments and `null`, and raises ValueError for errors."""
    from transformers import HfArgumentParser  # takes half a second, which `capivara` must not spend

    class Parser(HfArgumentParser):
        def add_argument(
            self, *names: str, positional: bool = False, group: str | None = None, **options: Any
        ) -> argparse.Action:
            if group:
                existing = [known for known in self._action_groups if known.title == group]
                return (existing or [self.add_argument_group(group)])[0].add_argument(*names, **options)
            if positional:
                options.pop("required", None)
                names = (names[0].lstrip("-"),)
            return super().add_argument(*names, **options)

        def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> tuple[Any, list[str]]:
            for name in (word.split("=")[0] for word in args):  # the value after "=" may be a secret
                if re.fullmatch(r"--?[A-Za-z][\w-]*", name) and name not in self._option_string_actions:
                    flags = [action.option_strings[0] for action in self._actions if action.option_strings]
                    self.error(unknown_name_message(name, "flag", flags))
            values, remaining = super().parse_known_args(args, namespace)
            if remaining:
                self.error("A value does not follow a flag")  # the value is not shown: it may be a secret
            return values, remaining

        def _get_value(self, action: argparse.Action, word: str) -> Any:
            is_none = word == "null" and action.default is None and not action.required
            return None if is_none else super()._get_value(action, word)

        def error(self, message: str) -> NoReturn:
            raise ValueError(message if message.endswith(".") else f"{message}. `--help` lists all flags.")

    options = {"allow_abbrev": False, "formatter_class": CommandHelpFormatter}
    return Parser(getattr(arguments_type, "groups", arguments_type), description=description, **options)


class CommandHelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with required flags first, default values, and the line breaks of the description."""

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Add the flags of a group, required flags first."""
        super().add_arguments(sorted(actions, key=lambda action: not action.required))

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or "") if action.default is None else super()._get_help_string(action) or ""


def flag(default: Any, help: str, **options: Any) -> Any:
    """Create a dataclass field that `parse_arguments` reads from the command line.

    Args:
        default: Default value; `...` makes the flag required.
        help: Text of `--help`.
        **options: Options of `argparse.ArgumentParser.add_argument`, `positional=True` for an argument without a flag,
            or `group="title"` to list the flag in a group of its own after the others.

    Returns:
        A dataclass field.
    """
    metadata = {"help": help, **options}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_at_least(arguments: Any, minimum: float, *names: str) -> None:
    """Raise ValueError if one of the named attributes of `arguments` is below `minimum` or NaN. None is allowed."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_between(arguments: Any, low: float, high: float, *names: str) -> None:
    """Raise ValueError if one of the named attributes of `arguments` is outside `low` to `high`. None is allowed."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}.")


def read_yaml_config(path: Path) -> dict[str, Any]:
    """Read a YAML config file. All scalars are returned as text.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is not valid YAML, or not a mapping.
    """
    import yaml

    try:
        # BaseLoader keeps all scalars as text, so that `no` and `1e-4` are converted like values of flags.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    return content


def config_to_flags(content: dict[str, Any], arguments_type: type, subject: str) -> list[str]:
    """Convert the content of a config file to flags.

    Args:
        content: Keys and values of the file.
        arguments_type: Dataclass whose fields are the allowed keys.
        subject: Name of the file; error messages begin with it.

    Returns:
        Words of a command line. Keys with an empty value are left out.

    Raises:
        ValueError: If a key is unknown, a value is a mapping, or a list contains a word that looks like a flag.
    """
    flags, names = [], [known.name for known in fields(arguments_type)]
    for key, value in content.items():
        if key not in names:
            raise ValueError(unknown_name_message(str(key), f"key in {subject}", names))
        if isinstance(value, dict):
            raise ValueError(f"{subject}: `{key}` must be a value or a list, got a mapping.")
        if value in ("", "~", "null", []):
            continue
        if not isinstance(value, list):
            flags.append(f"--{key}={value}")  # a single word, because a value may begin with "-"
            continue
        for word in map(str, value):
            if word.startswith("-") and not re.fullmatch(
                r"-(\d+|\d*\.\d+)", word
            ):  # negative numbers as argparse defines them
                raise ValueError(
                    f"{subject}: `{key}` lists {word!r}, which would be read as a flag. Values must not begin with -."
                )
        flags += [f"--{key}", *map(str, value)]
    return flags


def unknown_name_message(name: str, kind: str, known: list[str], advice: str = "`--help` lists all flags.") -> str:
    """Return the error message for an unknown flag or key.

    Args:
        name: The unknown name.
        kind: What it is, for example "flag".
        known: All known names; the most similar one is suggested.
        advice: Last sentence of the message.
    """
    known_by_bare_name = {key.lstrip("-"): key for key in known}
    matches = difflib.get_close_matches(name.lstrip("-"), known_by_bare_name, n=1)
    suggestion = f" Did you mean `{known_by_bare_name[matches[0]]}`?" if matches else ""
    return f"Unknown {kind}: `{name}`.{suggestion} {advice}"
