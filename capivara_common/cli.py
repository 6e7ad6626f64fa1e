"""Parse the flags of a command into a dataclass, and report user errors in one line instead of a traceback.

Each field of the dataclass defines a flag. A YAML config file can set values under the names of the fields.

Example:
    @dataclass
    class Arguments:
        steps: int = flag(100, "Number of steps.")

    def main(argv: list[str] | None = None) -> None:
        args = parse_arguments(Arguments, "Train a model.", argv)

    run_main_and_report_user_errors(main)
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from capivara_common.interrupt import raise_on_interrupt
from capivara_common.privacy import make_printable
from capivara_common.progress import set_progress_bar_timing

T = TypeVar("T")


class UsageError(ValueError):
    """Error for a wrong command line: an unknown flag, or a value of the wrong type or out of range.

    `run_main_and_report_user_errors` ends the process with exit code 2 for this error, and with 1 for other errors.
    """


def make_coded_error(
    error_type: Callable[[str], Exception], code: str | None, template: str, /, **values: object
) -> Exception:
    """Create an exception whose message the picture search `capivara_search` can show in the user's language.

    Args:
        error_type: Exception class, such as ValueError.
        code: Key of the message in the translations of `capivara_search`. None: the message is not translated.
        template: English message with placeholders such as `{path}`.
        **values: Value for each placeholder, such as `path="a.jpg"`.

    Returns:
        The exception with the English message, to be raised by the caller.
    """
    error = error_type(template.format(**values))
    error.code, error.values = code, values  # with these, `capivara_search` builds the translated message
    return error


def run_main_and_report_user_errors(main: Callable[[], object], resumable: bool = False) -> None:
    """Run the `main` function of a command and report user errors in one line instead of a traceback.

    User errors (ValueError, OSError, ImportError) end the process with exit code 1, or 2 for a `UsageError`. Ctrl-C
    raises KeyboardInterrupt in `main`, so that `main` can clean up. The process then ends with exit code 130.

    Args:
        main: Function without arguments that does the work of the command.
        resumable: Whether the same command continues the work if it is run again. The message after Ctrl-C then says
            so.
    """
    raise_on_interrupt()
    configure_console()
    set_progress_bar_timing()
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nStopped.{' Run the same command again to go on.' * resumable}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {make_printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def configure_console() -> None:
    r"""Set up stdout and stderr so that printing any text never fails. On Windows, their encoding becomes UTF-8.

    A character that the terminal can't show is printed as an escape such as `\u2026`, instead of raising
    UnicodeEncodeError.
    """
    # For output to a file or to another program, Windows would otherwise use a code page of 256 characters.
    options = {"encoding": "utf-8"} if sys.platform == "win32" else {}
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # the stream may be None (no console) or an object without `reconfigure`
            stream.reconfigure(errors="backslashreplace", **options)


def parse_arguments(
    arguments_type: type[T], description: str | None, argv: list[str] | None = None, config: bool = False
) -> T:
    """Parse the command line of this process into a dataclass with one field per flag.

    Args:
        arguments_type: Dataclass whose fields are created by `flag`. Its attribute `groups` may list base classes,
            whose flags `--help` then shows under separate titles.
        description: Text that `--help` shows above the flags.
        argv: Words of the command line, without the name of the program. Default: `sys.argv[1:]`.
        config: Whether to add the flag `--config FILE.yaml`. Flags on the command line override the file.

    Returns:
        An instance of `arguments_type`.

    Raises:
        UsageError: If a flag is unknown or missing, or a value is invalid, on the command line or in the file.
        SystemExit: After `--help`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _build_parser(arguments_type, description)
    try:
        if config:
            parser.add_argument("--config", help="YAML file with `flag: value` lines. Flags override it.")
            if file := parser.parse_known_args(words)[0].config:
                # The values of the file are placed as flags before the words of the command line, so that the same code
                # checks and converts both. PyYAML alone would read `1e-4` as text.
                words = config_to_flags(read_yaml_config(Path(file)), arguments_type, file) + words
        values = vars(parser.parse_args(words))
        return arguments_type(**{known.name: values[known.name] for known in fields(arguments_type)})
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _build_parser(arguments_type: Any, description: str | None) -> argparse.ArgumentParser:
    """Build an `HfArgumentParser` for the fields of a dataclass.

    In contrast to the base class, the parser accepts positional arguments, reads the word `null` as None, and raises
    ValueError for a wrong command line instead of ending the process.

    Args:
        arguments_type: Dataclass whose fields are created by `flag`.
        description: Text that `--help` shows above the flags.
    """
    # Imported here because the import takes half a second, too long for commands that don't need it.
    from transformers import HfArgumentParser

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
            # Error messages show only the part of a word before "=", because the value after it may be a secret.
            for name in (word.split("=")[0] for word in args):
                if re.fullmatch(r"--?[A-Za-z][\w-]*", name) and name not in self._option_string_actions:
                    flags = [action.option_strings[0] for action in self._actions if action.option_strings]
                    self.error(unknown_name_message(name, "flag", flags))
            values, remaining = super().parse_known_args(args, namespace)
            if remaining:
                self.error("The command line has a value without a flag")  # the value is not shown: it may be a secret
            return values, remaining

        def _get_value(self, action: argparse.Action, word: str) -> Any:
            is_none = word == "null" and action.default is None and not action.required
            return None if is_none else super()._get_value(action, word)

        def error(self, message: str) -> NoReturn:
            raise ValueError(message if message.endswith(".") else f"{message}. `--help` lists all flags.")

    # For a list of dataclasses, HfArgumentParser takes the titles in `--help` from their `_argument_group_name`.
    options = {"allow_abbrev": False, "formatter_class": CommandHelpFormatter}
    return Parser(getattr(arguments_type, "groups", arguments_type), description=description, **options)


class CommandHelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Formatter for the output of `--help`: lists required flags first, shows default values, and keeps line breaks."""

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Add the flags of a group to the help text, required flags first; argparse calls this method."""
        super().add_arguments(sorted(actions, key=lambda action: not action.required))

    def _get_help_string(self, action: argparse.Action) -> str:
        return (action.help or "") if action.default is None else super()._get_help_string(action) or ""


def flag(default: Any, help: str, **options: Any) -> Any:
    """Declare a command-line flag as a field of a dataclass that `parse_arguments` fills.

    For example, `steps: int = flag(100, "Number of steps.")` declares the flag `--steps`.

    Args:
        default: Default value. `...` (Ellipsis) makes the flag required.
        help: Description of the flag for `--help`.
        **options: Keyword arguments of `argparse.ArgumentParser.add_argument`. `positional=True` makes a positional
            argument instead. `group="title"` lists the flag under this title in `--help`.

    Returns:
        A dataclass field.
    """
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=MISSING if default is ... else default, metadata=metadata)


def check_at_least(arguments: Any, minimum: float, *names: str) -> None:
    """Check that numeric attributes of an object, such as command-line flags, are not too small.

    Args:
        arguments: Object with the attributes.
        minimum: Smallest allowed value.
        *names: Names of the attributes to check. The value None is accepted.

    Raises:
        ValueError: If an attribute is below `minimum` or NaN.
    """
    for name in names:
        if (value := getattr(arguments, name)) is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_between(arguments: Any, low: float, high: float, *names: str) -> None:
    """Check that numeric attributes of an object, such as command-line flags, lie in an allowed range.

    Args:
        arguments: Object with the attributes.
        low: Smallest allowed value.
        high: Largest allowed value.
        *names: Names of the attributes to check. The value None is accepted.

    Raises:
        ValueError: If an attribute is below `low`, above `high` or NaN.
    """
    for name in names:
        if (value := getattr(arguments, name)) is not None and not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}.")


def read_yaml_config(path: Path) -> dict[str, Any]:
    """Read a YAML config file into a dict, in which numbers and booleans stay text, such as "1e-4".

    Args:
        path: The YAML file, with lines of the form `key: value`.

    Returns:
        `{key: value}`. Empty if the file is empty.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file is not valid YAML, or its content is not a mapping.
    """
    import yaml

    try:
        # BaseLoader keeps all scalars as text, so that the parser converts `no` and `1e-4` like values of flags.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
    return content


def config_to_flags(content: dict[str, Any], arguments_type: type, subject: str) -> list[str]:
    """Convert the content of a config file to command-line flags, so that the flag parser checks it, too.

    Args:
        content: Keys and values of the config file, from `read_yaml_config`.
        arguments_type: Dataclass with the flags of the command. Its field names are the allowed keys.
        subject: Name of the file for error messages.

    Returns:
        Words of a command line, such as `["--steps=100", "--seeds", "0", "1"]`. Keys without a value (empty, `~`,
        `null` or an empty list) are skipped.

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
            flags.append(f"--{key}={value}")  # flag and value are a single word, because a value may begin with "-"
            continue
        for word in map(str, value):
            # Negative numbers are allowed: argparse recognizes them by this pattern and does not read them as flags.
            if word.startswith("-") and not re.fullmatch(r"-(\d+|\d*\.\d+)", word):
                raise ValueError(
                    f"{subject}: `{key}` lists {word!r}, which would be read as a flag. Values must not begin with -."
                )
        flags += [f"--{key}", *map(str, value)]
    return flags


def unknown_name_message(name: str, kind: str, known: list[str], advice: str = "`--help` lists all flags.") -> str:
    """Return the error message for a misspelled name, such as "Unknown flag: `--step`. Did you mean `--steps`? …".

    Args:
        name: The unknown name that the user wrote.
        kind: Noun for the name, for example "flag" or "key in config.yaml".
        known: All valid names. The message suggests the most similar name, if there is one.
        advice: Last sentence of the message.
    """
    known_by_bare_name = {key.lstrip("-"): key for key in known}
    matches = difflib.get_close_matches(name.lstrip("-"), known_by_bare_name, n=1)
    suggestion = f" Did you mean `{known_by_bare_name[matches[0]]}`?" if matches else ""
    return f"Unknown {kind}: `{name}`.{suggestion} {advice}"
