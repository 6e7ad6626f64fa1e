"""`capivara` by click, in two languages: two names a command, flags of all commands, help, and what is wrong.

A context's `obj` is the `Words` of a language. They have `about.NAME` of each command, whose first paragraph stands in
the list of commands, too, `flag.NAME.FLAG` or, of several commands, `flag.FLAG`, `metavar.KEY`, what stands for a value
in the help (by its type, where a flag names no KEY), and `bad.TYPE`, what a value must be.
"""

import os
from calendar import monthrange
from collections.abc import Callable
from datetime import date
from functools import partial, reduce
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from capivara_common.privacy import escape_control_characters
from capivara_search.messages import COMMAND_NAMES, Messages

CONTEXT_SETTINGS = {
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 100,
    "help_option_names": ["--help", "-h"],
}


def localized_type(param_type: click.ParamType) -> click.ParamType:
    """A type of click's, which says in the words of a language what a value must be."""
    convert = param_type.convert

    def checked(value: Any, param: click.Parameter | None, ctx: click.Context) -> Any:
        value = (
            os.path.expanduser(value) if isinstance(param_type, click.Path) else value
        )  # as no shell does after --flag=
        try:
            return convert(value, param, ctx)
        except click.BadParameter as error:
            values = vars(param_type) | {
                "value": escape_control_characters(str(value)),
                "choices": ", ".join(getattr(param_type, "choices", ())),
            }
            values |= {name: ctx.obj.number(one, 2) for name, one in values.items() if isinstance(one, float)}
            raise click.BadParameter(ctx.obj(f"bad.{param_type.name}", **values)) from error

    param_type.convert = checked
    return param_type


class DateType(click.DateTime):
    """A day; of a month or a year its first one, of `--until` its last one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> date:
        """The day. Raises click.BadParameter."""
        day = super().convert(value, param, ctx).date()
        if param.name == "until" and len(value) < len("2024-1-1"):
            month = day.month if "-" in value else 12
            return date(day.year, month, monthrange(day.year, month)[1])
        return day


_path_type = partial(click.Path, readable=False, path_type=Path)
ANY_PATH, EXISTING_PATH, EXISTING_FILE = (
    localized_type(_path_type()),
    localized_type(_path_type(exists=True)),
    localized_type(_path_type(exists=True, dir_okay=False)),
)
ANY_FOLDER, EXISTING_FOLDER = (
    localized_type(_path_type(file_okay=False)),
    localized_type(_path_type(exists=True, file_okay=False)),
)
DATE = localized_type(DateType(["%Y", "%Y-%m", "%Y-%m-%d", "%d/%m/%Y"]))


def add_switches(*names: str) -> Callable[[Callable], Callable]:
    """Flags without a value."""
    return lambda function: reduce(lambda given, name: click.option(name, is_flag=True)(given), names[::-1], function)


def _store_global_value(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Of a flag that may stand before the command and after it, where it wins."""
    if value is not None:
        ctx.meta[param.name] = value


def get_global_value(name: str) -> str | None:
    """The value of a flag of all commands."""
    return click.get_current_context().meta.get(name)


_folder_option_kwargs = {"metavar": "directory", "shell_complete": ANY_FOLDER.shell_complete}
GLOBAL_OPTIONS = [
    click.Option(["--index"], expose_value=False, callback=_store_global_value, **_folder_option_kwargs),
    click.Option(["--model"], expose_value=False, callback=_store_global_value, **_folder_option_kwargs),
    click.Option(["--device"], expose_value=False, callback=_store_global_value),
    # `command.language_of` has read it:
    click.Option(["--lang"], expose_value=False, type=localized_type(click.Choice(("pt", "en")))),
]


class LocalizedCommand(click.Command):
    """click's, with the flags of all commands, and its help in the words of a language."""

    allow_extra_args = True

    def __init__(self, *names: Any, **options: Any):
        super().__init__(*names, **options)
        self.params += GLOBAL_OPTIONS

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--labels a b` becomes `--labels a --labels b`. Raises click.UsageError, which names what is left over."""
        found, several = list[str](), False
        for word in args:
            if word.startswith("-"):
                several = word == "--labels"
            elif several and found[-1] != "--labels":
                found.append("--labels")
            found.append(word)
        rest = super().parse_args(ctx, found)
        if rest and not isinstance(self, click.Group) and not ctx.resilient_parsing:
            raise click.UsageError(ctx.obj("left_over", name=escape_control_characters(rest[0])))
        if ctx.params.get("json") and ctx.params.get("csv"):
            raise click.UsageError(ctx.obj("json_or_csv"))
        return rest

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Usage, description, flags, commands and exit codes."""
        words, is_group, order = ctx.obj, isinstance(self, click.Group), 1 if ctx.obj.language == "en" else -1
        arguments, flags = [], []
        for param in self.get_params(ctx):
            (flags if isinstance(param, click.Option) else arguments).append(describe_parameter(param, ctx))
        usage = [words("metavar.flags"), *(name for name, _ in arguments), words("metavar.command") * is_group]
        formatter.write_usage(ctx.command_path, " ".join(usage), words("usage"))
        for piece in words(f"about.{self.name}").split("\n\n"):
            lines = piece if piece.startswith(" ") else click.wrap_text(" ".join(piece.split()), formatter.width)
            formatter.write(f"\n{lines}\n")
        with formatter.section(words("options")):
            formatter.write_dl(flags)
        if is_group:
            first = {names: words(f"about.{names[0]}").partition("\n\n")[0] for names in COMMAND_NAMES.items()}
            with formatter.section(words("commands")):
                formatter.write_dl([(", ".join(names[::order]), text) for names, text in first.items()])
            formatter.write(f"\n{click.wrap_text(words('exit_codes'), formatter.width)}\n")


class LocalizedGroup(LocalizedCommand, click.Group):
    """All commands."""

    command_class = LocalizedCommand

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Raises click.UsageError, which names the nearest command; of a sentence, the search for it."""
        if not self.get_command(ctx, args[0]) and not ctx.resilient_parsing:
            error = click.NoSuchOption(args[0], possibilities=self.list_commands(ctx))
            sentence = escape_control_characters(" ".join(takewhile(lambda word: not word.startswith("-"), args)))
            if not error.possibilities and " " in sentence:
                error.possibilities = [f'capivara {"search" if ctx.obj.language == "en" else "buscar"} "{sentence}"']
            raise error
        return super().resolve_command(ctx, args)


def describe_parameter(param: click.Parameter, ctx: click.Context) -> tuple[str, str]:
    """A flag or an argument, with what stands for its value, and what the help says of a flag."""
    words, name = ctx.obj, param.opts[0].lstrip("-").replace("-", "_")
    value = ""
    if not getattr(param, "is_flag", False):
        value = "|".join(getattr(param.type, "choices", ())) or words(f"metavar.{param.metavar or param.type.name}")
    if isinstance(param, click.Argument):
        value += " …" * (param.nargs == -1)
        return value if param.required else f"[{value}]", ""
    own = f"flag.{ctx.command.name}.{name}"
    return f"{', '.join(param.opts)} {value}".rstrip(), words(own if words.has(own) else f"flag.{name}")


def describe_usage_error(error: click.UsageError, messages: Messages) -> str:
    """What click says, or a command, in the words of a language."""
    option = isinstance(getattr(error, "param", None), click.Option) and error.param.opts[-1]
    match error:
        case click.NoSuchOption(option_name=name) if messages.has(f"gone.{name[2:]}"):
            return messages("gone", name=name, text=messages(f"gone.{name[2:]}"))
        case click.NoSuchOption():
            near = "".join(messages("nearest", name=one) for one in (error.possibilities or [])[:1])
            return messages("unknown", name=escape_control_characters(error.option_name)) + near
        case click.MissingParameter():
            return messages("missing", name=describe_parameter(error.param, error.ctx)[0])
        case click.BadOptionUsage():
            return messages("bad_usage", name=error.option_name)
    return f"{option}: {error.message}" if option else error.message
