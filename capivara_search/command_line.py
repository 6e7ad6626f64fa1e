"""The commands of `capivara` and their flags, on click; the language is that of the `Words` in a context's `obj`.

Both names of a command stand in `words.COMMANDS`, what its help says in `words.yaml`: `help.NAME`, `about.NAME`, and
`flag.NAME.FLAG`, or `flag.FLAG` of several commands.
"""

import difflib
import re
import sys
from calendar import monthrange
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from click.shell_completion import CompletionItem

from capivara_search.results import TEMPLATE
from capivara_search.show import MOST_OPENED, shown_path
from capivara_search.words import COMMANDS, Words, visible

COMPLETE = "_CAPIVARA_COMPLETE"  # variable by which a shell asks click what fits
ALONE = ("pattern", "path", "pull")  # values that take a flag each: what follows may be another argument
SHARED = ("index", "model", "device", "lang")  # flags before or after the command
SHAPE: dict[str, Any] = {
    "context_settings": {"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 100},
    "add_help_option": False,
}
Read = Callable[[str, Words], Any]  # a value of its text; raises click.BadParameter


def parsed(argv: Sequence[str], words: Words) -> SimpleNamespace:
    """The arguments; `command` is an English name, or None where there is none, `run` its function.

    Raises click.UsageError: a flag or command is unknown, or a value breaks its rule. SystemExit: `--help` or
    `--version`.
    """
    found = GROUP.main(list(argv), "capivara", complete_var=COMPLETE, standalone_mode=False, obj=words)
    if isinstance(found, int):
        sys.exit(found)
    return found


# --- values ----------------------------------------------------------------------------------------------------------


def absolute(text: str, words: Words) -> Path:
    """A path, which need not be there."""
    return Path(text).expanduser().absolute()


def existing(*kinds: str) -> Read:
    """A path that is there, of a "folder" or a "file"."""

    def read(text: str, words: Words) -> Path:
        path = absolute(text, words)
        if not ("folder" in kinds and path.is_dir()) and not ("file" in kinds and path.is_file()):
            fault = f"{'not' if path.exists() else 'no'}_{kinds[0]}"
            raise click.BadParameter(words(fault, path=shown_path(str(path))))
        return path

    return read


def table_file(text: str, words: Words) -> Path:
    """A file of a table that can be made."""
    path = absolute(text, words)
    if not path.parent.is_dir():
        raise click.BadParameter(words("no_folder", path=shown_path(str(path.parent))))
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise click.BadParameter(words("bad_suffix", path=shown_path(str(path))))
    return path


def number(kind: type, low: float, high: float | None = None) -> Read:
    """An int or a float within bounds."""

    def read(text: str, words: Words) -> float:
        try:
            value = kind(text)
        except ValueError:
            key = "bad_integer" if kind is int else "bad_number"
            raise click.BadParameter(words(key, value=repr(visible(text))) + words("see_help")) from None
        if value >= low and (high is None or value <= high):
            return value
        point = "," if words.language == "pt" else "."
        bounds = {name: str(bound).replace(".", point) for name, bound in (("low", low), ("high", high))}
        raise click.BadParameter(words("below" if high is None else "out_of_range", **bounds, value=text))

    return read


def day(last: bool) -> Read:
    """The day that a text names; of a month or a year its first day, or its last one."""
    form = re.compile(r"(?P<y>\d{4})(-(?P<m>\d\d?)(-(?P<d>\d\d?))?)?|(?P<d2>\d\d?)/(?P<m2>\d\d?)/(?P<y2>\d{4})")

    def read(text: str, words: Words) -> date:
        found = form.fullmatch(text)
        try:
            year, month, day = (int(found[name] or found[f"{name}2"] or 0) for name in "ymd")
            month = month or (12 if last else 1)
            return date(year, month, day or (monthrange(year, month)[1] if last else 1))
        except (TypeError, ValueError) as error:
            raise click.BadParameter(words("bad_date", value=visible(text))) from error

    return read


def host(text: str, words: Words) -> str:
    """A name or address that a page answers to, or "*"."""
    from capivara_search.page.guard import host_name  # here: the server comes with it

    if text == "*" or host_name(text):
        return text
    raise click.BadParameter(words("bad_host", value=visible(text)))


class Choice(click.Choice):
    """click's, in the words of a language."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context) -> str:
        """Names the value and the choices."""
        choices = ", ".join(map(repr, self.choices))
        return ctx.obj("bad_choice", value=repr(visible(value)), choices=choices) + ctx.obj("see_help")


class Value(click.ParamType):
    """What a function reads of a text."""

    name = "value"

    def __init__(self, read: Read):
        self.read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context) -> Any:
        """The value; a default is one already."""
        return self.read(value, ctx.obj) if isinstance(value, str) else value


# --- flags and commands ----------------------------------------------------------------------------------------------


class Parameter(click.Parameter):
    """A flag or argument with its help in the words of a language.

    `metavar` is the key of what stands for its value in the help, `read` makes the value of its text, and a shell
    completes it by "dir" or "file".
    """

    def __init__(self, *names: str, metavar: str = "", read: Read | None = None, completes: str = "", **options: Any):
        self.key = metavar
        if read:
            options["type"] = Value(read)
        if completes:
            options["shell_complete"] = lambda ctx, param, text: [CompletionItem(text, type=completes)]
        super().__init__(names, **options)

    def make_metavar(self, ctx: click.Context) -> str:
        """What stands for its value."""
        return ctx.obj(f"metavar.{self.key}") + " …" * (self.nargs == -1) if self.key else super().make_metavar(ctx)

    def about(self, ctx: click.Context) -> str:
        """What the help says of it."""
        own = f"flag.{ctx.command.name}.{self.name}"
        return ctx.obj(own if ctx.obj.has(own) else f"flag.{self.name}", most=MOST_OPENED, template=TEMPLATE)


class Argument(Parameter, click.Argument):
    """A value without a flag."""


class Flag(Parameter, click.Option):
    """A flag."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Its names and its help."""
        self.help = self.about(ctx)
        return super().get_help_record(ctx)


def switches(*names: str) -> list[Flag]:
    """Flags without a value."""
    return [Flag(name, is_flag=True) for name in names]


class Command(click.Command):
    """click's, with its help in the words of a language; one flag may have several values after it."""

    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--labels a b` becomes what click knows, `--labels a --labels b`; what is left over is named."""
        several = [one.opts[-1] for one in self.params if one.multiple and one.key not in ALONE]
        found, flag = [], None
        for place, word in enumerate(args):
            if word.startswith("-"):
                flag = word if word.replace("_", "-") in several and args[place + 1 : place + 2] else None
            if flag != word:
                found += [flag, word] if flag else [word]
        try:
            rest = super().parse_args(ctx, found)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        if rest and not isinstance(self, click.Group) and not ctx.resilient_parsing:
            raise click.UsageError(ctx.obj("left_over", name=visible(rest[0])) + ctx.obj("see_help"), ctx)
        return rest

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Usage, description, arguments, flags, commands and exit codes."""
        words, is_group = ctx.obj, isinstance(self, click.Group)
        arguments = [(one.make_metavar(ctx), one.about(ctx)) for one in self.params if isinstance(one, Argument)]
        options = [one.get_help_record(ctx) for one in self.params if isinstance(one, Flag)]
        names = [names if words.language == "en" else names[::-1] for names in COMMANDS.items() if is_group]
        commands = [(", ".join(shown), words(f"help.{name}")) for shown, name in zip(names, COMMANDS, strict=False)]
        pieces = [f"[{words('metavar.options')}]", *(name for name, _ in arguments)]
        pieces += [f"[{words('metavar.command')}]"] * is_group
        formatter.write_usage(ctx.command_path, " ".join(pieces), words("usage"))
        for piece in words(f"about.{self.name}" if self.name else "description").split("\n\n"):
            lines = piece if piece.startswith(" ") else click.wrap_text(" ".join(piece.split()), formatter.width)
            formatter.write(f"\n{lines}\n")
        for part, rows in {"arguments": arguments, "options": options, "commands": commands}.items():
            if rows:
                with formatter.section(words(part)):
                    formatter.write_dl(rows)
        if is_group:
            formatter.write(f"\n{words('exit_codes')}\n")


class Group(Command, click.Group):
    """All commands."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Raises click.UsageError, which names the nearest command."""
        name, words = visible(args[0]), ctx.obj
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, [*COMMANDS, *COMMANDS.values()], n=1)
            sentence = visible(" ".join(takewhile(lambda word: not word.startswith("-"), args)))
            if not near and " " in sentence:  # what is meant is plain
                near = [f'{words.command("search")} "{sentence}"']
            shown = "".join(words("nearest", name=f"capivara {one}") for one in near)
            raise click.UsageError(words("unknown_command", name=name) + shown + words("see_help"), ctx)
        return super().resolve_command(ctx, args)


def _ended(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """`--help` and `--version`."""
    if not value or ctx.resilient_parsing:
        return
    if param.name == "help":
        print(ctx.get_help())
    else:
        try:
            print(f"capivara {metadata.version('modeling-capivara')}")
        except metadata.PackageNotFoundError:  # in a folder that is not installed
            print("capivara")
    ctx.exit()


ENDING = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _ended}
OF_ALL = [  # flags of every command
    Flag("--index", metavar="where", completes="dir"),
    Flag("--model", metavar="model", completes="dir"),
    Flag("--device", metavar="device"),
    Flag("--lang", type=Choice(("pt", "en"))),
    Flag("-h", "--help", **ENDING),
]
GROUP = Group(None, params=[*OF_ALL, Flag("--version", **ENDING)], invoke_without_command=True, **SHAPE)


def command(name: str | None, *params: click.Parameter) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate the function of a command, by its English name, or of what is done without one.

    It gets its arguments, those of `params` and of all, and words, and returns the exit code.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        def collected(**values: Any) -> SimpleNamespace:
            ctx = click.get_current_context()
            before = ctx.find_root().params
            values |= {one: values[one] if values[one] is not None else before.get(one) for one in SHARED}
            if values.get("json") and values.get("csv"):
                raise click.UsageError("--csv: " + ctx.obj("not_both", other="--json") + ctx.obj("see_help"))
            return SimpleNamespace(command=name, run=function, **values)

        if name is None:
            GROUP.callback = collected
            return function
        one = Command(name, params=[*params, *OF_ALL], callback=collected, **SHAPE)
        for known in (name, COMMANDS[name]):
            GROUP.add_command(one, known)
        return function

    return decorate


def wrong_use(error: click.UsageError, words: Words) -> str:
    """What click says, in the words of a language."""
    if isinstance(error, click.NoSuchOption):
        name = visible(error.option_name)
        if words.has(f"gone.{name[2:]}"):
            return words("gone", name=name, text=words(f"gone.{name[2:]}"))
        options = [param for param in error.ctx.command.params if isinstance(param, click.Option)]
        known = {one.lstrip("-"): one for param in options for one in param.opts}
        near = difflib.get_close_matches(name.lstrip("-"), known, n=1)
        shown = "".join(words("nearest", name=known[one]) for one in near)
        return words("unknown_flag", name=name) + shown + words("see_help")
    if isinstance(error, click.MissingParameter):
        return words("missing", name=error.param.make_metavar(error.ctx)) + words("see_help")
    if isinstance(error, click.BadOptionUsage):
        takes_none = any(error.option_name in one.opts and one.is_flag for one in error.ctx.command.params)
        return f"{error.option_name}: {words('no_value' if takes_none else 'needs_value')}{words('see_help')}"
    named = isinstance(error, click.BadParameter) and isinstance(error.param, click.Option)
    return f"{error.param.opts[-1]}: {error.message}" if named else error.message
