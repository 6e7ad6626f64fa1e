"""The flags of the command `capivara`, in the words of a language, and what is wrong with them in one line.

    from capivara_search.command_flags import parsed
    from capivara_search.terminal import Words

    parsed(["buscar", "um", "gato", "-k", "3"], Words("pt")).query  # "um gato"

Values are checked as far as they can be without the index.
"""

import argparse
import difflib
import os
import re
from calendar import monthrange
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from datetime import date
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from capivara_common.tasks import ExecutorArguments
from capivara_search.results import TEMPLATE
from capivara_search.terminal import PICTURES, Words, harmless, shown_path

# English name -> Portuguese name; both work in both languages.
COMMANDS = {
    "index": "indexar",
    "search": "buscar",
    "classify": "classificar",
    "app": "abrir",
    "status": "estado",
    "forget": "esquecer",
    "export": "exportar",
    "duplicates": "duplicatas",
    "completion": "completar",
}
SHELLS = ("bash", "zsh", "fish")
MOST_OPENED = 12  # pictures, by --open: more windows at once are of no use
# What argparse says -> the text that says it; a text without a translation is shown as it is.
OF_ARGPARSE = {
    r"the following arguments are required: (?P<name>.+)": "missing",
    r"expected .*argument.*": "needs_value",
    r"invalid choice: (?P<value>.+) \(choose from (?P<choices>.+)\)": "bad_choice",
    r"invalid int value: (?P<value>.+)": "bad_integer",
    r"invalid float value: (?P<value>.+)": "bad_number",
    r"not allowed with argument (?P<other>.+)": "not_both",
}


class WrongUse(Exception):
    """The user has asked for what is not to be had; the text says it in the language."""


def language_of(argv: Sequence[str]) -> str:
    """ "pt" or "en": what `--lang` says, else the first of LC_ALL, LC_MESSAGES and LANG that is set."""
    for number, word in enumerate(argv):
        name, equals, value = word.partition("=")
        value = value if equals else "".join(argv[number + 1 : number + 2])
        if name == "--lang" and value in ("pt", "en"):
            return value
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "pt" if next(filter(None, names), "").startswith("pt") else "en"


def named(command: str, language: str) -> str:
    """The name of a command in a language."""
    return COMMANDS[command] if language == "pt" else command


def parsed(argv: Sequence[str], words: Words) -> argparse.Namespace:
    """The arguments; `command` is an English name, or None where there is none.

    Raises:
        WrongUse: a flag or command is unknown, or a value breaks its rule.
        SystemExit: `--help` or `--version`.
    """
    flags = parser(words)
    args, rest = flags.parse_known_args([_with_hyphens(word) for word in argv])
    if args.command == "search":  # words after a flag belong to the sentence, too
        args.query += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        name = rest[0].partition("=")[0]
        if not name.startswith("-"):
            raise WrongUse(words("left_over", name=harmless(name)) + words("see_help"))
        if words.has(f"gone.{name[2:]}"):
            raise WrongUse(words("gone", name=name, text=words(f"gone.{name[2:]}")))
        nearest = difflib.get_close_matches(name, flags.flags_of(args.command), n=1, cutoff=0.0)[0]
        raise WrongUse(words("unknown_flag", name=harmless(name), nearest=nearest) + words("see_help"))
    if args.command == "search":
        _check_search(args, words)
    elif args.command == "classify":
        _check_classify(args, words)
    elif args.command == "index":
        _check_executor(args, words)
    return args


def _with_hyphens(word: str) -> str:
    """`--batch_size`, as the other commands of the project write it, as `--batch-size`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch("--[a-z_]+", name) else word


class Parser(argparse.ArgumentParser):
    """argparse's, in the words of a language; what is wrong is raised, as WrongUse."""

    def __init__(self, words: Words, **options: Any):
        self.words = words
        super().__init__(formatter_class=self._formatter, add_help=False, allow_abbrev=False, **options)
        self.by_name: dict[str, Parser] = {}  # English name of a command -> its parser
        self.texts: dict[str, str] = {}  # English name of a command -> what it does, in a line

    def _formatter(self, prog: str) -> argparse.HelpFormatter:
        return _Help(self.words, prog)

    def flag(self, *names: str, group: Any = None, **options: Any) -> None:
        """Add a flag or argument; its help is `flag.COMMAND.NAME` of `words.yaml`, or `flag.NAME` for several."""
        name = names[-1].lstrip("-").replace("-", "_")
        own = f"flag.{self.get_default('command')}.{name}"
        text = self.words(own if self.words.has(own) else f"flag.{name}", most=MOST_OPENED, template=TEMPLATE)
        (group or self).add_argument(*names, help=text, **options)

    def flags_of(self, command: str | None) -> list[str]:
        """The flags that a command takes, or that stand before every command."""
        one = self.by_name.get(command, self)
        return [name for action in one._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Raises WrongUse, which says what argparse says in English."""
        flag, text = re.fullmatch(r"(?:argument (.+?): )?(.*)", message, re.DOTALL).groups()
        prefix = f"{flag}: " if flag and flag.startswith("-") else ""
        for pattern, key in OF_ARGPARSE.items():
            if found := re.fullmatch(pattern, text, re.DOTALL):
                values = {name: harmless(value) for name, value in found.groupdict().items()}
                if key == "bad_choice" and set(COMMANDS) <= set(re.findall(r"\w+", values["choices"])):
                    prefix, text = "", self._unknown_command(values["value"].strip("'"))
                else:
                    text = self.words(key, **values)
                text += self.words("see_help")
                break
        raise WrongUse(prefix + text)

    def _unknown_command(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, [*COMMANDS, *COMMANDS.values()], n=1, cutoff=0.0)[0]
        if " " in name:  # a sentence: what is meant is plain
            nearest = f'{named("search", self.words.language)} "{name}"'
        return self.words("unknown_command", name=name, nearest=f"capivara {nearest}")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, words: Words, prog: str):
        super().__init__(prog, max_help_position=28)
        self._words = words

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, prefix or self._words("usage"))

    def start_section(self, heading: str | None) -> None:
        super().start_section(self._words(heading) if heading and self._words.has(heading) else heading)


def parser(words: Words) -> Parser:
    """All commands and flags."""
    main = Parser(words, prog="capivara", description=words("description"), epilog=words("exit_codes"))
    _shared_flags(main, None)
    main.flag("--version", action="version", version=_version())
    main.set_defaults(command=None)
    # Without `dest`, which would put the name that was written in the place of `command`, the English name.
    every = main.add_subparsers(title=words("commands"), metavar=words("metavar.command"), prog="capivara")
    for english, portuguese in COMMANDS.items():
        name, alias = (english, portuguese) if words.language == "en" else (portuguese, english)
        text = main.texts[english] = words(f"help.{english}")
        options = {"words": words, "help": text, "description": words(f"about.{english}")}
        one = main.by_name[english] = every.add_parser(name, aliases=[alias], **options)
        one.set_defaults(command=english)
        FLAGS[english](one, words)
        _shared_flags(one, argparse.SUPPRESS)  # what stands before the command is kept
    return main


def _version() -> str:
    try:
        return f"capivara {metadata.version('modeling-capivara')}"
    except metadata.PackageNotFoundError:  # in a folder that is not installed
        return "capivara"


def _shared_flags(one: Parser, default: Any) -> None:
    one.flag("-h", "--help", action="help")
    one.flag("--index", metavar=one.words("metavar.where"), default=default)
    one.flag("--model", metavar=one.words("metavar.model"), default=default)
    one.flag("--device", metavar="cpu|cuda", default=default)
    one.flag("--lang", choices=("pt", "en"), default=default)


def _index_flags(one: Parser, words: Words) -> None:
    one.flag("folders", nargs="+", type=_folder(words), metavar=words("metavar.folder"))
    one.flag("--exact", action="store_true")
    one.flag("--batch-size", type=_number(words, int, 1), default=32, metavar="N")
    machines = one.add_argument_group(words("many_machines"))
    for known in fields(ExecutorArguments):
        kinds = get_args(known.type) if isinstance(known.type, UnionType) else (known.type,)
        kind = next(kind for kind in kinds if kind is not type(None))
        options: dict[str, Any] = {"default": [] if known.default is MISSING else known.default}
        if get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            options |= {"nargs": "+", "metavar": "X=Y"}
        elif kind is int:
            options |= {"type": _number(words, int, int(known.name != "gpus_per_task")), "metavar": "N"}
        else:
            options |= {"type": kind, "metavar": words("metavar.folder" if kind is Path else f"metavar.{known.name}")}
        one.flag(f"--{known.name.replace('_', '-')}", group=machines, **options)


def _search_flags(one: Parser, words: Words) -> None:
    one.flag("query", nargs="*", metavar=words("metavar.query"))
    one.flag("--like", type=_file(words), metavar=words("metavar.file"))
    one.flag("-k", type=_number(words, int, 1, 10_000), default=12, metavar="N")
    one.flag("--folder", type=_absolute, metavar=words("metavar.folder"))
    one.flag("--since", type=lambda text: _day(text, words, last=False), metavar=words("metavar.date"))
    one.flag("--until", type=lambda text: _day(text, words, last=True), metavar=words("metavar.date"))
    one.flag("--exact", action="store_true")
    one.flag("--open", action="store_true")
    _output_flags(one)
    _picture_flags(one)


def _classify_flags(one: Parser, words: Words) -> None:
    place, label, text = (words(f"metavar.{name}") for name in ("place", "label", "text"))
    one.flag("place", type=_folder(words, or_file=True), metavar=place)
    one.flag("--labels", nargs="+", required=True, metavar=label)
    one.flag("--template", default=TEMPLATE, metavar=text)
    # argparse would show the place last, where --labels takes it for a label.
    one.usage = f"{one.prog} {place} --labels {label} [{label} ...] [--template {text}] [--json | --csv] [...]"
    _output_flags(one)


def _app_flags(one: Parser, words: Words) -> None:
    one.flag("--port", type=_number(words, int, 1, 65535), default=7860, metavar="N")
    one.flag("--host", default="127.0.0.1", metavar=words("metavar.address"))
    one.flag("--allow-host", type=_host(words), action="append", default=[], metavar=words("metavar.name"))
    one.flag("--no-open", action="store_true")


def _status_flags(one: Parser, words: Words) -> None:
    one.flag("--json", action="store_true")


def _forget_flags(one: Parser, words: Words) -> None:
    one.flag("folder", type=_absolute, metavar=words("metavar.folder"))


def _export_flags(one: Parser, words: Words) -> None:
    one.flag("file", type=_table_file(words), metavar=words("metavar.file"))


def _duplicates_flags(one: Parser, words: Words) -> None:
    one.flag("--threshold", type=_number(words, float, 0.01, 1), default=0.97, metavar="X")
    _output_flags(one)
    _picture_flags(one)


def _completion_flags(one: Parser, words: Words) -> None:
    one.flag("shell", choices=SHELLS)


def _output_flags(one: Parser) -> None:
    forms = one.add_mutually_exclusive_group()
    one.flag("--json", group=forms, action="store_true")
    one.flag("--csv", group=forms, action="store_true")


def _picture_flags(one: Parser) -> None:
    kinds = one.add_mutually_exclusive_group()
    one.flag("--pictures", group=kinds, choices=PICTURES, default="auto")
    one.flag("--no-pictures", group=kinds, dest="pictures", action="store_const", const="no")


FLAGS: dict[str, Callable[[Parser, Words], None]] = {
    "index": _index_flags,
    "search": _search_flags,
    "classify": _classify_flags,
    "app": _app_flags,
    "status": _status_flags,
    "forget": _forget_flags,
    "export": _export_flags,
    "duplicates": _duplicates_flags,
    "completion": _completion_flags,
}


def _absolute(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _host(words: Words) -> Callable[[str], str]:
    def read(text: str) -> str:
        from capivara_search.page.guard import host_name  # here: the server comes with it

        if text == "*" or host_name(text):
            return text
        raise argparse.ArgumentTypeError(words("bad_host", value=harmless(text)))

    return read


def _folder(words: Words, or_file: bool = False) -> Callable[[str], Path]:
    def read(text: str) -> Path:
        path = _absolute(text)
        if path.is_dir() or (or_file and path.is_file()):
            return path
        key = "not_folder" if path.exists() else "no_folder"
        raise argparse.ArgumentTypeError(words(key, path=shown_path(str(path))))

    return read


def _file(words: Words) -> Callable[[str], Path]:
    def read(text: str) -> Path:
        path = _absolute(text)
        if path.is_file():
            return path
        raise argparse.ArgumentTypeError(words("not_file" if path.exists() else "no_file", path=shown_path(str(path))))

    return read


def _table_file(words: Words) -> Callable[[str], Path]:
    def read(text: str) -> Path:
        path = _absolute(text)
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(words("no_folder", path=shown_path(str(path.parent))))
        if path.suffix.lower() in (".parquet", ".csv"):
            return path
        raise argparse.ArgumentTypeError(words("bad_suffix", path=shown_path(str(path))))

    return read


def _number(words: Words, kind: type, low: float, high: float | None = None) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if value >= low and (high is None or value <= high):
            return value
        key = "below" if high is None else "out_of_range"
        point = "," if words.language == "pt" else "."
        bounds = {name: str(bound).replace(".", point) for name, bound in (("low", low), ("high", high))}
        raise argparse.ArgumentTypeError(words(key, **bounds, value=text))

    read.__name__ = kind.__name__  # argparse names it where the text is no number
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
        raise argparse.ArgumentTypeError(words("bad_date", value=harmless(text))) from error


def _check_search(args: argparse.Namespace, words: Words) -> None:
    args.query = " ".join(args.query).strip()
    if not args.query and args.like is None:
        raise WrongUse(words("empty_query"))
    if args.since and args.until and args.since > args.until:
        raise WrongUse(words("dates_order", since=args.since, until=args.until))


def _check_classify(args: argparse.Namespace, words: Words) -> None:
    args.labels = [" ".join(label.split()) for label in args.labels]
    times = Counter(label.casefold() for label in args.labels)
    for label in args.labels:
        if not label or times[label.casefold()] > 1:
            raise WrongUse(words("label_twice" if label else "empty_label", label=harmless(label)))
    if args.template.count("{}") != 1:
        raise WrongUse(words("bad_template"))


def _check_executor(args: argparse.Namespace, words: Words) -> None:
    if args.executor == "local" and args.workers is not None:
        raise WrongUse(words("gone", name="--workers", text=words("gone.workers")))
    if args.executor != "local" and args.tasks is None:
        raise WrongUse(words("needs_flags", executor=args.executor, flags="--tasks"))
    if args.executor == "slurm" and not (args.partition and args.time and args.logging_dir):
        raise WrongUse(words("needs_flags", executor="slurm", flags="--partition, --time, --logging-dir"))
