"""What the commands of `capivara` have beyond click: two languages, two names each, several values after one flag.

A context's `obj` is the `Words` of a language. They have `help.NAME` and `about.NAME` of each command, `flag.NAME.FLAG`
or, of several commands, `flag.FLAG`, and `metavar.KEY`, what stands for a value in the help.
"""

import difflib
from calendar import monthrange
from collections.abc import Callable
from datetime import date
from functools import partial, reduce
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from capivara_search.results import TEMPLATE
from capivara_search.show import MOST_OPENED, shown_path
from capivara_search.words import COMMANDS, visible

COMPLETE = "_CAPIVARA_COMPLETE"  # variable by which a shell asks click what fits
ENGLISH = {portuguese: english for english, portuguese in COMMANDS.items()}
SEVERAL = ("--labels", "--sbatch", "--allow-host")  # flags whose values go on up to the next flag
SETTINGS = {
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 100,
    "help_option_names": ["-h", "--help"],
}


# --- values: what click checks, said in the language -----------------------------------------------------------------


class Place(click.Path):
    """A path, absolute, whose ~ is the user's folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context) -> Path:
        """Says what is not there, or of another kind."""
        path = Path(value).expanduser().absolute()
        try:
            return super().convert(path, param, ctx)
        except click.BadParameter as error:
            fault = f"{'not' if path.exists() else 'no'}_{'folder' if self.dir_okay else 'file'}"
            raise click.BadParameter(ctx.obj(fault, path=shown_path(str(path)))) from error


ANY_FOLDER = Place(file_okay=False, readable=False)
FOLDER = Place(exists=True, file_okay=False, readable=False)
FILE = Place(exists=True, dir_okay=False, readable=False)
EITHER = Place(exists=True, readable=False)
ANY = Place(readable=False)


class Said:
    """A type of click's, whose `fault` is a key of the words of a language."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context) -> Any:
        """The value. Raises click.BadParameter."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            fault = ctx.obj(self.fault, **vars(self) | {"value": visible(str(value))})
            raise click.BadParameter(fault) from error


class Whole(Said, click.IntRange):
    """A whole number."""

    fault = property(lambda self: "below" if self.max is None else "out_of_range")


class Similarity(Said, click.FloatRange):
    """A number from 0.01 to 1."""

    fault = "bad_similarity"


class Day(Said, click.DateTime):
    """A day; of a month or a year its first one, or its last one."""

    fault = "bad_date"

    def __init__(self, last: bool):
        super().__init__(["%Y", "%Y-%m", "%Y-%m-%d", "%d/%m/%Y"])
        self.last = last

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context) -> date:
        """The day."""
        day = super().convert(value, param, ctx).date()
        if self.last and "/" not in value and value.count("-") < 2:
            month = day.month if "-" in value else 12
            return date(day.year, month, monthrange(day.year, month)[1])
        return day


class Choice(click.Choice):
    """One of some words."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context) -> str:
        """Says all of them."""
        return ctx.obj("bad_choice", value=repr(visible(value)), choices=", ".join(map(repr, self.choices)))


# --- flags and commands ----------------------------------------------------------------------------------------------


class Parameter(click.Parameter):
    """A flag or argument with its help in the words of a language; `metavar` is a key of them."""

    def make_metavar(self, ctx: click.Context) -> str:
        """What stands for its value."""
        named = self.metavar and ctx.obj(f"metavar.{self.metavar}") + " …" * (self.nargs == -1)
        return named or super().make_metavar(ctx)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Its names and what the help says of it."""
        own = f"flag.{ctx.command.name}.{self.name}"
        self.help = ctx.obj(own if ctx.obj.has(own) else f"flag.{self.name}", most=MOST_OPENED, template=TEMPLATE)
        return super().get_help_record(ctx) if isinstance(self, click.Option) else (self.make_metavar(ctx), self.help)


class Argument(Parameter, click.Argument):
    """A value without a flag."""


class Flag(Parameter, click.Option):
    """A flag."""

    def get_help_extra(self, ctx: click.Context) -> dict[str, Any]:
        """Nothing in click's English."""
        return {}


argument, flag = partial(click.argument, cls=Argument), partial(click.option, cls=Flag)


def switches(*names: str) -> Callable[[Callable], Callable]:
    """Flags without a value."""
    return lambda function: reduce(lambda given, name: flag(name, is_flag=True)(given), reversed(names), function)


def _keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Of a flag that may stand before the command and after it, where it wins."""
    if value is not None:
        ctx.meta[param.name] = value


def of_all(name: str) -> str | None:
    """The value of a flag of all commands."""
    return click.get_current_context().meta.get(name)


OF_ALL = [
    Flag(["--index"], metavar="where", shell_complete=ANY_FOLDER.shell_complete, expose_value=False, callback=_keep),
    Flag(["--model"], metavar="model", shell_complete=ANY_FOLDER.shell_complete, expose_value=False, callback=_keep),
    Flag(["--device"], metavar="device", expose_value=False, callback=_keep),
    Flag(["--lang"], type=Choice(("pt", "en")), expose_value=False),  # `command.language_of` has read it
]


class Command(click.Command):
    """click's, with the flags of all commands, and its help in the words of a language."""

    allow_extra_args = True

    def __init__(self, name: str | None, params: list[click.Parameter] | None = None, **options: Any):
        super().__init__(name, params=[*(params or []), *OF_ALL], context_settings=SETTINGS, **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--labels a b` becomes what click knows, `--labels a --labels b`; what is left over is named."""
        found, several = list[str](), None
        for word in args:
            if word.startswith("-"):
                several = word if word.replace("_", "-") in SEVERAL else None
            elif several and found[-1] != several:
                found.append(several)
            found.append(word)
        try:
            rest = super().parse_args(ctx, found)
        except click.UsageError as error:
            raise click.UsageError(wrong_use(error, ctx)) from error
        if rest and not isinstance(self, click.Group) and not ctx.resilient_parsing:
            raise click.UsageError(ctx.obj("left_over", name=visible(rest[0])) + ctx.obj("see_help"))
        if ctx.params.get("json") and ctx.params.get("csv"):
            raise click.UsageError("--csv: " + ctx.obj("not_both", other="--json") + ctx.obj("see_help"))
        return rest

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Usage, description, arguments, flags, commands and exit codes."""
        words, is_group = ctx.obj, isinstance(self, click.Group)
        arguments = [one.get_help_record(ctx) for one in self.params if isinstance(one, Argument)]
        flags = [one.get_help_record(ctx) for one in self.params if isinstance(one, Flag)]
        flags.append(("-h, --help", words("flag.help")))
        order = 1 if words.language == "en" else -1
        commands = [(", ".join(names[::order]), words(f"help.{names[0]}")) for names in COMMANDS.items() if is_group]
        named = {one.make_metavar(ctx): one.required for one in self.params if isinstance(one, Argument)}
        usage = [f"[{words('metavar.options')}]", *(name if need else f"[{name}]" for name, need in named.items())]
        usage += [f"[{words('metavar.command')}]"] * is_group
        formatter.write_usage(ctx.command_path, " ".join(usage), words("usage"))
        for piece in words(f"about.{self.name}").split("\n\n"):
            lines = piece if piece.startswith(" ") else click.wrap_text(" ".join(piece.split()), formatter.width)
            formatter.write(f"\n{lines}\n")
        for part, rows in {"arguments": arguments, "options": flags, "commands": commands}.items():
            if rows:
                with formatter.section(words(part)):
                    formatter.write_dl(rows)
        if is_group:
            formatter.write(f"\n{words('exit_codes')}\n")


class Group(Command, click.Group):
    """All commands, each by its name in both languages."""

    command_class = Command

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """By either name."""
        return super().get_command(ctx, ENGLISH.get(name, name))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Both names of each."""
        return [*COMMANDS, *ENGLISH]

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Raises click.UsageError, which names the nearest command."""
        if self.get_command(ctx, args[0]) or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        name, words = visible(args[0]), ctx.obj
        near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
        sentence = visible(" ".join(takewhile(lambda word: not word.startswith("-"), args)))
        if not near and " " in sentence:  # what is meant is plain
            near = [f'{words.command("search")} "{sentence}"']
        shown = "".join(words("nearest", name=f"capivara {one}") for one in near)
        raise click.UsageError(words("unknown_command", name=name) + shown + words("see_help"))


def wrong_use(error: click.UsageError, ctx: click.Context) -> str:
    """What click says, in the words of a language."""
    words = ctx.obj
    if isinstance(error, click.NoSuchOption):
        name = visible(error.option_name)
        if words.has(f"gone.{name[2:]}"):
            return words("gone", name=name, text=words(f"gone.{name[2:]}"))
        shown = "".join(words("nearest", name=one) for one in (error.possibilities or [])[:1])
        return words("unknown_flag", name=name) + shown + words("see_help")
    option = isinstance(getattr(error, "param", None), click.Option) and error.param.opts[-1]
    if isinstance(error, click.MissingParameter):
        return words("missing", name=option or error.param.make_metavar(ctx)) + words("see_help")
    if isinstance(error, click.BadOptionUsage):
        takes_none = any(error.option_name in one.opts and one.is_flag for one in ctx.command.get_params(ctx))
        return f"{error.option_name}: {words('no_value' if takes_none else 'needs_value')}{words('see_help')}"
    return f"{option}: {error.message}" if option else error.message
