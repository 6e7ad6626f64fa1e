"""Parts of the bilingual command line of `capivara`, built on click: types of values, shared flags, help, usage errors.

The texts in the user's language come from these keys of `messages.yaml`:

    about.COMMAND                      description of a command
    flag.COMMAND.FLAG or flag.FLAG     help of a flag, for one command or for all commands
    metavar.KEY                        placeholder of a value in the help; KEY is the click metavar or type of the flag
    bad.TYPE                           error message for a value that the type rejects
"""

import os
from calendar import monthrange
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from capivara_common.privacy import escape_control_characters
from capivara_search.messages import COMMAND_NAMES, Messages

# The attribute `obj` of a click context is the `Messages` object of the user's language.
CONTEXT_SETTINGS = {
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 100,
    "help_option_names": ["--help", "-h"],
}


def localize_click_type_errors(param_type: click.ParamType) -> click.ParamType:
    """Make a click type report rejected values in the user's language.

    Args:
        param_type: Type of a flag's value, such as `click.Choice(("a", "b"))`. It is changed in place. For a rejected
            value, it reports the text `bad.TYPE` of `messages.yaml`, where TYPE is the name of the type.

    Returns:
        The same type object.
    """
    convert = param_type.convert

    def convert_value(value: Any, param: click.Parameter | None, ctx: click.Context) -> Any:
        if isinstance(param_type, click.Path):
            value = os.path.expanduser(value)  # a shell does not expand "~" after `--flag=`
        try:
            return convert(value, param, ctx)
        except click.BadParameter as error:
            choices = ", ".join(getattr(param_type, "choices", ()))
            values = vars(param_type) | {"value": escape_control_characters(str(value)), "choices": choices}
            limits = {name: limit for name, limit in values.items() if isinstance(limit, float)}
            values |= {name: ctx.obj.format_number(limit, 2) for name, limit in limits.items()}
            raise click.BadParameter(ctx.obj(f"bad.{param_type.name}", **values)) from error

    param_type.convert = convert_value
    return param_type


class DateType(click.DateTime):
    """click type of the flags `--since` and `--until`, which take a day, a month or a year.

    A month or a year is converted to its first day for `--since`, and to its last day for `--until`. For example, 2024
    becomes 2024-01-01 or 2024-12-31.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> date:
        """Convert the text of `--since` or `--until` to a day.

        Args:
            value: Text of the flag, such as "2024-06".
            param: The flag, which decides whether a month or a year becomes its first or its last day.
            ctx: click context of the command.

        Returns:
            The day as a date.

        Raises:
            click.BadParameter: If the text is not a date.
        """
        day = super().convert(value, param, ctx).date()
        if param.name == "until" and len(value) < len("2024-1-1"):
            month = day.month if "-" in value else 12
            return date(day.year, month, monthrange(day.year, month)[1])
        return day


_path_type = partial(click.Path, readable=False, path_type=Path)
ANY_PATH = localize_click_type_errors(_path_type())
EXISTING_PATH = localize_click_type_errors(_path_type(exists=True))
EXISTING_FILE = localize_click_type_errors(_path_type(exists=True, dir_okay=False))
ANY_FOLDER = localize_click_type_errors(_path_type(file_okay=False))
EXISTING_FOLDER = localize_click_type_errors(_path_type(exists=True, file_okay=False))
DATE = localize_click_type_errors(DateType(["%Y", "%Y-%m", "%Y-%m-%d", "%d/%m/%Y"]))


def add_boolean_flags(*names: str) -> Callable[[Callable], Callable]:
    """Return a decorator that adds flags without a value to a command, such as `--json`.

    The command receives True for a flag that is given, and False otherwise.

    Args:
        *names: Flags, such as "--json", in the order of the help.

    Returns:
        Decorator for the function of a command.
    """

    def add(function: Callable) -> Callable:
        for name in reversed(names):  # click lists flags in the reverse order of the decorator calls
            function = click.option(name, is_flag=True)(function)
        return function

    return add


def _store_global_value(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Store the value of a shared flag in `ctx.meta` under the name of the flag, where the commands read it.

    Shared flags are the flags that every command has, such as `--index`. click calls this function for each of them.
    Users can write shared flags before or after the name of the command. If a flag is given twice, the later value is
    used.

    Args:
        ctx: click context of the command.
        param: The flag.
        value: Value of the flag; None if the flag was not given, which keeps a value that was stored before.
    """
    if value is not None:
        ctx.meta[param.name] = value


_folder_option_kwargs = {"metavar": "directory", "shell_complete": ANY_FOLDER.shell_complete}
GLOBAL_OPTIONS = [
    click.Option(["--index"], expose_value=False, callback=_store_global_value, **_folder_option_kwargs),
    click.Option(["--model"], expose_value=False, callback=_store_global_value, **_folder_option_kwargs),
    click.Option(["--device"], expose_value=False, callback=_store_global_value),
    # The value of `--lang` is not stored: `command.detect_user_language` reads it before click parses the command line.
    click.Option(["--lang"], expose_value=False, type=localize_click_type_errors(click.Choice(("pt", "en")))),
]


class LocalizedCommand(click.Command):
    """A click command with the flags that all commands share, and with help in the user's language.

    Args:
        *names: Positional arguments of `click.Command`.
        **options: Keyword arguments of `click.Command`.
    """

    allow_extra_args = True

    def __init__(self, *names: Any, **options: Any):
        super().__init__(*names, **options)
        self.params += GLOBAL_OPTIONS

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse a command line, in which `--labels` may be followed by several values.

        Args:
            ctx: click context of the command.
            args: Words of the command line after the name of the command.

        Returns:
            The words that were not parsed. A group passes them to its subcommand.

        Raises:
            click.UsageError: If a word is neither a flag nor a value of the command, or both `--json` and `--csv` are
                given.
        """
        # click takes one value per flag, so `--labels a b` is changed to `--labels a --labels b`.
        words, in_labels = list[str](), False
        for word in args:
            if word.startswith("-"):
                in_labels = word == "--labels"
            elif in_labels and words[-1] != "--labels":
                words.append("--labels")
            words.append(word)
        rest = super().parse_args(ctx, words)
        if rest and not isinstance(self, click.Group) and not ctx.resilient_parsing:
            raise click.UsageError(ctx.obj("left_over", name=escape_control_characters(rest[0])))
        if ctx.params.get("json") and ctx.params.get("csv"):
            raise click.UsageError(ctx.obj("json_or_csv"))
        return rest

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of a command: usage, description and flags.

        The help of the group `capivara` also lists its commands and the exit codes.

        Args:
            ctx: click context of the command.
            formatter: click object that the text is written to.
        """
        messages, is_group = ctx.obj, isinstance(self, click.Group)
        arguments, flags = [], []
        for param in self.get_params(ctx):
            (flags if isinstance(param, click.Option) else arguments).append(get_localized_help_record(param, ctx))
        usage = [messages("metavar.flags"), *(name for name, _ in arguments), messages("metavar.command") * is_group]
        formatter.write_usage(ctx.command_path, " ".join(usage), messages("usage"))
        for paragraph in messages(f"about.{self.name}").split("\n\n"):
            is_example = paragraph.startswith(" ")
            text = paragraph if is_example else click.wrap_text(" ".join(paragraph.split()), formatter.width)
            formatter.write(f"\n{text}\n")
        with formatter.section(messages("options")):
            formatter.write_dl(flags)
        if is_group:
            order = 1 if messages.language == "en" else -1  # the name in the user's language comes first
            names = [", ".join(both_names[::order]) for both_names in COMMAND_NAMES.items()]
            # The first paragraph of a command's description is its summary.
            summaries = [messages(f"about.{name}").partition("\n\n")[0] for name in COMMAND_NAMES]
            with formatter.section(messages("commands")):
                formatter.write_dl(list(zip(names, summaries, strict=True)))
            formatter.write(f"\n{click.wrap_text(messages('exit_codes'), formatter.width)}\n")


class LocalizedGroup(LocalizedCommand, click.Group):
    """The click group `capivara`. Its subcommands are `index`, `search` and all other commands."""

    command_class = LocalizedCommand

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command whose name is the first word of the command line.

        Args:
            ctx: Context of the group.
            args: Words of the command line.

        Returns:
            Tuple (name of the command, the command, remaining words of the command line).

        Raises:
            click.UsageError: If no command has this name. The message suggests the most similar name, or
                `capivara search` if the word is a whole sentence.
        """
        if not self.get_command(ctx, args[0]) and not ctx.resilient_parsing:
            error = click.NoSuchOption(args[0], possibilities=self.list_commands(ctx))
            sentence = escape_control_characters(" ".join(takewhile(lambda word: not word.startswith("-"), args)))
            if not error.possibilities and " " in sentence:
                error.possibilities = [f'capivara {"search" if ctx.obj.language == "en" else "buscar"} "{sentence}"']
            raise error
        return super().resolve_command(ctx, args)


def get_localized_help_record(param: click.Parameter, ctx: click.Context) -> tuple[str, str]:
    """Return the two texts that the help shows for a flag or an argument: its name and its description.

    Args:
        param: Flag or argument.
        ctx: Context of the command that has the flag or argument.

    Returns:
        Tuple (name, description). The name of a flag ends with a placeholder for its value, as in "--index FOLDER". For
        an argument, the name is only the placeholder, and the description is "".
    """
    messages, name = ctx.obj, param.opts[0].lstrip("-").replace("-", "_")
    placeholder = ""
    if not getattr(param, "is_flag", False):
        choices = "|".join(getattr(param.type, "choices", ()))
        placeholder = choices or messages(f"metavar.{param.metavar or param.type.name}")
    if isinstance(param, click.Argument):
        placeholder += " …" * (param.nargs == -1)
        return placeholder if param.required else f"[{placeholder}]", ""
    command_key = f"flag.{ctx.command.name}.{name}"
    key = command_key if messages.has(command_key) else f"flag.{name}"
    return f"{', '.join(param.opts)} {placeholder}".rstrip(), messages(key)


def describe_usage_error(error: click.UsageError, messages: Messages) -> str:
    """Describe in the user's language what is wrong with a command line.

    Args:
        error: Error that click or a command has raised because of the command line.
        messages: Texts to print, in the user's language.

    Returns:
        One line of text. It begins with the name of the flag if the value of a flag is wrong.
    """
    option = isinstance(getattr(error, "param", None), click.Option) and error.param.opts[-1]
    match error:
        case click.NoSuchOption():
            suggestion = "".join(messages("nearest", name=name) for name in (error.possibilities or [])[:1])
            return messages("unknown", name=escape_control_characters(error.option_name)) + suggestion
        case click.MissingParameter():
            return messages("missing", name=get_localized_help_record(error.param, error.ctx)[0])
        case click.BadOptionUsage():
            return messages("bad_usage", name=error.option_name)
    return f"{option}: {error.message}" if option else error.message
