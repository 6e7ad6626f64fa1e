"""The command `capivara`: search your own pictures, in Portuguese or English.

    capivara index ~/Fotos                        # capivara indexar
    capivara search "cachorro correndo na praia"  # capivara buscar
    python -m capivara_search --help

    from capivara_search.command import main

    main(["buscar", "um gato dormindo", "--index", "fotos.lance", "--json"])

What it says stands in `words.yaml`. Nothing that takes time is imported before a command begins: `--help` and wrong use
are answered at once.
"""

import difflib
import errno
import logging
import os
import re
import signal
import sys
import warnings
from calendar import monthrange
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from capivara_common.files import no_space_left
from capivara_common.progress import prepare_bars
from capivara_search import commands
from capivara_search.commands import DONE, NOTHING, Unusable
from capivara_search.results import TEMPLATE
from capivara_search.show import MOST_OPENED, PICTURES, shown_path
from capivara_search.words import COMMANDS, Words, visible

SHELLS = ("bash", "zsh", "fish")
COMPLETE = "_CAPIVARA_COMPLETE"  # variable by which a shell asks click what fits
SHARED = ("index", "model", "device", "lang")  # flags before or after the command
WRONG_USE, UNUSABLE = 2, 3  # exit codes, beside those of `commands`; the help explains them
EXIT_CODES = {  # of errors with a code, where it is not UNUSABLE
    "no_picture": NOTHING,
    **dict.fromkeys(("folder_shut", "empty_label", "label_twice", "bad_template"), WRONG_USE),
}
OF_THE_SYSTEM = {  # number of an OSError -> its words
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "no_permission"),
    errno.EADDRINUSE: "port_in_use",
    errno.EADDRNOTAVAIL: "no_host",
}
EXPECTED = (click.UsageError, Unusable, ValueError, OSError, ImportError, RuntimeError)  # whose message is enough

# --- flags -----------------------------------------------------------------------------------------------------------


def language_of(argv: Sequence[str]) -> str:
    """ "pt" or "en": what `--lang` says, else the first of LC_ALL, LC_MESSAGES and LANG that is set."""
    for number, word in enumerate(argv):
        name, equals, value = word.partition("=")
        value = value if equals else "".join(argv[number + 1 : number + 2])
        if name == "--lang" and value in ("pt", "en"):
            return value
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "pt" if next(filter(None, names), "").startswith("pt") else "en"


def parsed(argv: Sequence[str], words: Words) -> SimpleNamespace:
    """The arguments; `command` is an English name, or None where there is none.

    Raises:
        click.UsageError: a flag or command is unknown, or a value breaks its rule.
        SystemExit: `--help` or `--version`.
    """
    found = command_line(words).main(list(argv), "capivara", complete_var=COMPLETE, standalone_mode=False)
    if isinstance(found, int):
        sys.exit(found)
    return found


class Command(click.Command):
    """click's, with its help in the words of a language; one flag may have several values after it."""

    allow_extra_args = True
    words: Words
    several: tuple[str, ...] = ()  # flags
    about: str  # key of its description

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--labels a b` becomes what click knows, `--labels a --labels b`; what is left over is named."""
        found, flag = [], None
        for place, word in enumerate(args):
            if word.startswith("-"):
                flag = word if word.replace("_", "-") in self.several and args[place + 1 : place + 2] else None
            if flag != word:
                found += [flag, word] if flag else [word]
        try:
            rest = super().parse_args(ctx, found)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        if rest and not isinstance(self, click.Group) and not ctx.resilient_parsing:
            name = visible(rest[0])
            raise click.UsageError(self.words("left_over", name=name) + self.words("see_help"), ctx)
        return rest

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Usage, description, arguments, flags, commands and exit codes."""
        words, params = self.words, self.get_params(ctx)
        formatter.write_usage(ctx.command_path, " ".join(self.collect_usage_pieces(ctx)), words("usage"))
        formatter.write(f"\n{words(self.about)}\n")
        parts = {
            "arguments": [
                (one.make_metavar(ctx), help_text(words, self.name, one.name))
                for one in params
                if isinstance(one, click.Argument)
            ],
            "options": [one.get_help_record(ctx) for one in params if isinstance(one, click.Option)],
            "commands": [],
        }
        if isinstance(self, click.Group):
            for names in COMMANDS.items():
                shown = names if words.language == "en" else names[::-1]
                parts["commands"].append((", ".join(shown), words(f"help.{names[0]}")))
        for part, rows in parts.items():
            if rows:
                with formatter.section(words(part)):
                    formatter.write_dl(rows)
        if isinstance(self, click.Group):
            formatter.write(f"\n{words('exit_codes')}\n")


class Group(Command, click.Group):
    """All commands."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Raises click.UsageError, which names the nearest command."""
        name = visible(args[0])
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, [*COMMANDS, *COMMANDS.values()], n=1)
            if " " in name:  # a sentence: what is meant is plain
                near = [f'{self.words.command("search")} "{name}"']
            shown = "".join(self.words("nearest", name=f"capivara {one}") for one in near)
            text = self.words("unknown_command", name=name) + shown + self.words("see_help")
            raise click.UsageError(text, ctx)
        return super().resolve_command(ctx, args)


class Choice(click.Choice):
    """click's, in the words of a language."""

    def __init__(self, choices: Sequence[str], words: Words):
        super().__init__(choices)
        self.words = words

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Names the value and the choices."""
        choices = ", ".join(map(repr, self.choices))
        return self.words("bad_choice", value=repr(visible(value)), choices=choices) + self.words("see_help")


def help_text(words: Words, command: str | None, name: str) -> str:
    """Of a flag or argument: `flag.COMMAND.NAME` of `words.yaml`, or `flag.NAME` of several commands."""
    own = f"flag.{command}.{name}"
    return words(own if words.has(own) else f"flag.{name}", most=MOST_OPENED, template=TEMPLATE)


def command_line(words: Words) -> Group:
    """All commands and flags, for click."""
    settings = {"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 100}
    shape = {"context_settings": settings, "add_help_option": False, "options_metavar": f"[{words('metavar.options')}]"}

    def flag(command: str | None, *names: str, **options: Any) -> click.Option:
        name = names[-1].lstrip("-").replace("-", "_")
        if "metavar" in options:
            options["metavar"] = words(f"metavar.{options['metavar']}")
        return click.Option(names, help=help_text(words, command, name), **options)

    def shared(command: str | None) -> list[click.Option]:
        def ended(ctx: click.Context, param: click.Parameter, value: bool) -> None:
            if value and not ctx.resilient_parsing:
                print(ctx.get_help() if param.name == "help" else _version())
                ctx.exit()

        told = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": ended}
        return [
            flag(command, "--index", metavar="where", shell_complete=_completes("dir")),
            flag(command, "--model", metavar="model", shell_complete=_completes("dir")),
            flag(command, "--device", metavar="device"),
            flag(command, "--lang", type=Choice(("pt", "en"), words)),
            flag(command, "-h", "--help", **told),
            *([] if command else [flag(command, "--version", **told)]),
        ]

    def made(kind: type[Command], name: str | None, params: list[click.Parameter], **options: Any) -> Any:
        def arguments(**values: Any) -> SimpleNamespace:
            before = click.get_current_context().find_root().params
            values |= {one: values[one] if values[one] is not None else before.get(one) for one in SHARED}
            return _checked(SimpleNamespace(command=name, **values), words)

        command = kind(name, params=params + shared(name), callback=arguments, **shape, **options)
        command.words, command.about = words, f"about.{name}" if name else "description"
        return command

    group = made(Group, None, [], invoke_without_command=True, subcommand_metavar=f"[{words('metavar.command')}]")
    for command, params in _params(words, flag).items():
        one = made(Command, command, params)
        one.several = tuple(p.opts[-1] for p in params if isinstance(p, click.Option) and p.multiple)
        for name in (command, COMMANDS[command]):
            group.add_command(one, name)
    return group


def _params(words: Words, flag: Callable[..., click.Option]) -> dict[str, list[click.Parameter]]:
    """English name of a command -> its flags and arguments."""

    def argument(name: str, metavar: str, **options: Any) -> click.Argument:
        shown = words(f"metavar.{metavar}") + " …" * ("nargs" in options)
        return click.Argument([name], metavar=shown, **options)

    def switches(command: str, *names: str) -> list[click.Option]:
        return [flag(command, name, is_flag=True) for name in names]

    folder, file, shown = _completes("dir"), _completes("file"), {"type": Choice(PICTURES, words), "default": "auto"}
    output = switches("", "--json", "--csv")
    pictures = [flag("", "--pictures", **shown), *switches("", "--no-pictures")]
    whole = _number(words, int, 1)
    return {
        "index": [
            argument("folders", "folder", nargs=-1, required=True, type=_path(words, "folder"), shell_complete=folder),
            *switches("index", "--exact"),
            flag("index", "--batch-size", type=whole, default=32, metavar="number"),
            *_machine_flags(words, flag),
        ],
        "search": [
            argument("query", "query", nargs=-1),
            flag("search", "--like", type=_path(words, "file"), metavar="file", shell_complete=file),
            flag("search", "-k", type=_number(words, int, 1, 10_000), default=12, metavar="number"),
            flag("search", "--folder", type=_absolute, metavar="folder", shell_complete=folder),
            flag("search", "--since", type=lambda text: _day(text, words, last=False), metavar="date"),
            flag("search", "--until", type=lambda text: _day(text, words, last=True), metavar="date"),
            *switches("search", "--exact", "--open"),
            *output,
            *pictures,
        ],
        "classify": [
            argument("place", "place", type=_path(words, "folder", "file"), shell_complete=file),
            flag("classify", "--labels", multiple=True, metavar="label"),
            flag("classify", "--template", default=TEMPLATE, metavar="text"),
            *output,
        ],
        "app": [
            flag("app", "--port", type=_number(words, int, 1, 65535), default=7860, metavar="number"),
            flag("app", "--host", default="127.0.0.1", metavar="address"),
            flag("app", "--allow-host", type=_host(words), multiple=True, metavar="name"),
            *switches("app", "--no-open"),
        ],
        "status": switches("status", "--json"),
        "forget": [argument("folder", "folder", type=_absolute, shell_complete=folder)],
        "export": [argument("file", "file", type=_path(words, "table"), shell_complete=file)],
        "duplicates": [
            flag("duplicates", "--threshold", type=_number(words, float, 0.01, 1), default=0.97, metavar="value"),
            *output,
            *pictures,
        ],
        "completion": [click.Argument(["shell"], type=Choice(SHELLS, words))],
    }


def _machine_flags(words: Words, flag: Callable[..., click.Option]) -> list[click.Option]:
    """Those of `ExecutorArguments`."""
    return [
        flag("index", "--executor", type=Choice(("local", "slurm", "ray"), words), default="local"),
        *(flag("index", f"--{name}", type=_number(words, int, 1), metavar="number") for name in ("tasks", "workers")),
        *(flag("index", f"--{name}", metavar=name) for name in ("partition", "time")),
        flag("index", "--sbatch", multiple=True, metavar="pair"),
        flag("index", "--cpus-per-task", type=_number(words, int, 1), default=1, metavar="number"),
        flag("index", "--mem-per-cpu-gb", type=_number(words, int, 1), default=4, metavar="number"),
        flag("index", "--gpus-per-task", type=_number(words, int, 0), default=0, metavar="number"),
        flag("index", "--logging-dir", type=_absolute, metavar="folder", shell_complete=_completes("dir")),
    ]


def _completes(kind: str) -> Callable[..., list[CompletionItem]]:
    return lambda ctx, param, incomplete: [CompletionItem(incomplete, type=kind)]


def _version() -> str:
    try:
        return f"capivara {metadata.version('modeling-capivara')}"
    except metadata.PackageNotFoundError:  # in a folder that is not installed
        return "capivara"


def _absolute(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _host(words: Words) -> Callable[[str], str]:
    def read(text: str) -> str:
        from capivara_search.page.guard import host_name  # here: the server comes with it

        if text == "*" or host_name(text):
            return text
        raise click.BadParameter(words("bad_host", value=visible(text)))

    return read


def _path(words: Words, *kinds: str) -> Callable[[str], Path]:
    """A path of a folder that is there, of a file that is there, or of a table that can be made."""

    def read(text: str) -> Path:
        path = _absolute(text)
        if "table" in kinds:
            fault = "bad_suffix" if path.suffix.lower() not in (".parquet", ".csv") else None
            fault, shown = (fault, path) if path.parent.is_dir() else ("no_folder", path.parent)
        else:
            right = ("folder" in kinds and path.is_dir()) or ("file" in kinds and path.is_file())
            fault, shown = None if right else f"{'not' if path.exists() else 'no'}_{kinds[0]}", path
        if fault:
            raise click.BadParameter(words(fault, path=shown_path(str(shown))))
        return path

    return read


def _number(words: Words, kind: type, low: float, high: float | None = None) -> Callable[[Any], float]:
    def read(text: Any) -> float:
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


def _day(text: str, words: Words, last: bool) -> date:
    """The day that a text names; of a month or a year its first day, or its last one."""
    found = re.fullmatch(
        r"(?P<y>\d{4})(-(?P<m>\d\d?)(-(?P<d>\d\d?))?)?|(?P<d2>\d\d?)/(?P<m2>\d\d?)/(?P<y2>\d{4})", text
    )
    try:
        year, month, day = (int(found[name] or found[f"{name}2"] or 0) for name in "ymd")
        month = month or (12 if last else 1)
        return date(year, month, day or (monthrange(year, month)[1] if last else 1))
    except (TypeError, ValueError) as error:
        raise click.BadParameter(words("bad_date", value=visible(text))) from error


def _checked(args: SimpleNamespace, words: Words) -> SimpleNamespace:
    """The arguments of a command, where they go together."""
    fault, given = None, vars(args)
    if given.pop("no_pictures", False):
        args.pictures = "no"
    if given.get("json") and given.get("csv"):
        fault = "--csv: " + words("not_both", other="--json") + words("see_help")
    elif args.command == "search":
        args.query = " ".join(args.query).strip()
        if not args.query and args.like is None:
            fault = words("empty_query")
        elif args.since and args.until and args.since > args.until:
            fault = words("dates_order", since=args.since, until=args.until)
    elif args.command == "classify" and not args.labels:
        fault = words("missing", name="--labels") + words("see_help")
    elif args.command == "index":
        if args.executor == "local" and args.workers is not None:
            fault = words("gone", name="--workers", text=words("gone.workers"))
        elif args.executor != "local" and args.tasks is None:
            fault = words("needs_flags", executor=args.executor, flags="--tasks")
        elif args.executor == "slurm" and not (args.partition and args.time and args.logging_dir):
            fault = words("needs_flags", executor="slurm", flags="--partition, --time, --logging-dir")
    if fault:
        raise click.UsageError(fault)
    return args


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
        switches = [p for p in error.ctx.command.params if getattr(p, "is_flag", False) and error.option_name in p.opts]
        return f"{error.option_name}: {words('no_value' if switches else 'needs_value')}{words('see_help')}"
    named = isinstance(error, click.BadParameter) and isinstance(error.param, click.Option)
    return f"{error.param.opts[-1]}: {error.message}" if named else error.message


# --- the command -----------------------------------------------------------------------------------------------------


def run() -> None:
    """The console script: `main`, which Ctrl-C ends in one line from the start."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        words = Words(language_of(sys.argv[1:]))

        def stop(*_: object) -> None:
            print("\n" + words("stopped"), file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGINT)

        # KeyboardInterrupt would get lost in the imports of C extensions; commands that clean up set a handler.
        signal.signal(signal.SIGINT, stop)
    prepare_bars()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a terminal with few letters
    main()


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Args:
        argv: its words, `sys.argv[1:]` where None.

    Raises:
        SystemExit: always, with the exit code that the help explains.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    words = Words(language_of(argv))
    try:
        with _notes_shown(words), warnings.catch_warnings():
            # PIL's, in English, of pictures that are refused next, in one line.
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
            args = parsed(argv, words)
            if args.command == "completion":
                print(get_completion_class(args.shell)(command_line(words), {}, "capivara", COMPLETE).source())
                code = DONE
            else:
                code = commands.run(args, words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        goes_on = {"index", COMMANDS["index"]} & set(argv)
        print("\n" + words("stopped_goes_on" if goes_on else "stopped"), file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # `capivara search … | head`; what is left must not be written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except EXPECTED as error:
        code, text = explained(error, words)
        print(words("error", text=text), file=sys.stderr)
    sys.exit(code)


def explained(error: Exception, words: Words) -> tuple[int, str]:
    """The exit code of an error, and one line about it; in the language, where the error has a code."""
    if isinstance(error, click.UsageError):
        return WRONG_USE, wrong_use(error, words)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return UNUSABLE, words("missing_package", name=error.name.partition(".")[0])
    if no_space_left(error):
        return UNUSABLE, words("no_space")
    code = getattr(error, "code", None)
    if words.language == "pt" and words.has(f"error.{code}"):
        values = {name: visible(str(value)) for name, value in error.values.items()}
        return EXIT_CODES.get(code, UNUSABLE), words(f"error.{code}", **values)
    if isinstance(error, OSError) and code is None:
        number = error.errno or 0
        if (key := OF_THE_SYSTEM.get(number)) and (key != "no_permission" or error.filename):
            return UNUSABLE, words(key, path=visible(str(error.filename)))
        if number < 0:  # socket.gaierror, whose numbers are the resolver's
            return UNUSABLE, words("no_host")
    text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    return EXIT_CODES.get(code, UNUSABLE), visible(" ".join(text.split())) or type(error).__name__


@contextmanager
def _notes_shown(words: Words) -> Iterator[None]:
    """What the library logs for people, such as that it waits, is shown on stderr, in the language."""
    handler, logger = logging.Handler(logging.INFO), logging.getLogger("capivara")

    def emit(record: logging.LogRecord) -> None:
        from tqdm.std import tqdm  # a bar goes on below it

        key = f"note.{getattr(record, 'code', None)}"
        text = record.getMessage()
        if words.language == "pt" and words.has(key):
            text = words.raw(key).format(*getattr(record, "values", record.args))
        tqdm.write(visible(" ".join(text.split())), file=sys.stderr)

    handler.emit, level = emit, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
