"""What each command of `capivara` takes and does, in the words of a language.

The index, and all that it needs, is imported when a command begins.
"""

import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import date, datetime
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

from capivara_search import command_line as cli
from capivara_search.command_line import Choice, Whole, argument, flag, switches
from capivara_search.results import SAME, TEMPLATE, Added
from capivara_search.show import PICTURES, open_pictures, say, show_hits, shown_path, table, write_csv
from capivara_search.words import UNSAFE, Words, failure, visible

if TYPE_CHECKING:
    import PIL.Image

    from capivara_search.index import PictureIndex

NOTHING = 1  # the exit code where nothing is found; the help explains them
LINES = {"auto": None, "yes": True, "no": False}
LINE = flag("--line", type=Choice(tuple(LINES)), default="auto", callback=lambda ctx, param, value: LINES[value])
DRAWN = flag("--pictures", type=Choice(PICTURES), default="auto")
LEFT_OUT_SHOWN = 5
BY_RULE = ("forgotten", "excluded", "hidden", "system")
SCREEN_SHOWN = 4  # lines of each list of `status`, which fits on a screen of 24
MAX_LETTERS = 4096  # of a query; the model reads no more of a text
CSV_COLUMNS = (
    *("rank", "score", "path", "taken", "width", "height", "latitude", "longitude", "size", "modified"),
    *("date", "date_source", "copies", "fits"),
)


@click.group("capivara", cls=cli.Group, invoke_without_command=True)
@click.version_option(package_name="modeling-capivara", message="capivara %(version)s", cls=cli.Flag)
@click.pass_context
def capivara(ctx: click.Context) -> None:
    """Without a command: what can be done next, make an index, or use the one that is there."""
    if ctx.invoked_subcommand:
        return
    words, pictures = ctx.obj, _index()
    key, count = "next_steps" if len(pictures) else "first_steps", words.count("pictures", len(pictures))
    print(words(key, pictures=count, where=shown_path(str(pictures.where))))


def command(name: str) -> Callable[[Callable], click.Command]:
    """Decorate the function of a command: it gets words and the values of its flags; None is exit code 0."""
    return lambda function: capivara.command(name, help="")(click.pass_obj(function))  # its help is in words.yaml


@command("index")
@argument("folders", metavar="folder", nargs=-1, type=cli.FOLDER)
@flag("--exclude", multiple=True, metavar="pattern")
@flag("--include", multiple=True, metavar="path", shell_complete=cli.ANY.shell_complete)
@switches("--exact")
@flag("--batch-size", type=Whole(1), default=32, metavar="number")
# Those of `ExecutorArguments`:
@flag("--executor", type=Choice(("local", "slurm", "ray")), default="local")
@flag("--tasks", type=Whole(1), metavar="number")
@flag("--workers", type=Whole(1), metavar="number")
@flag("--partition", metavar="partition")
@flag("--time", metavar="time")
@flag("--sbatch", multiple=True, metavar="pair")
@flag("--cpus-per-task", type=Whole(1), default=1, metavar="number")
@flag("--mem-per-cpu-gb", type=Whole(1), default=4, metavar="number")
@flag("--gpus-per-task", type=Whole(0), default=0, metavar="number")
@flag("--logging-dir", type=cli.ANY_FOLDER, metavar="folder")
def index(
    words: Words, folders: Sequence[Path], exclude: Sequence[str], include: Sequence[str], exact: bool, batch_size: int,
    **tasks: Any,
) -> None:  # fmt: skip
    """Add folders to the index, with progress and a summary."""
    executor = tasks["executor"]
    if executor == "local" and tasks["workers"] is not None:
        raise click.UsageError(words("gone", name="--workers", text=words("gone.workers")))
    needed = {"slurm": ("tasks", "partition", "time", "logging_dir"), "ray": ("tasks",)}.get(executor, ())
    if missing := ", ".join(f"--{name}".replace("_", "-") for name in needed if not tasks[name]):
        raise click.UsageError(words("needs_flags", executor=executor, flags=missing))
    pictures = _index()
    pictures.mend()
    folders = pictures.folders_to_add(folders, exclude, include)
    _say_model(pictures, words)
    say(words("looking", folders=", ".join(shown_path(str(folder)) for folder in folders)))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is under way is finished or undone
    how = {"exact": exact, "batch_size": batch_size, "exclude": list(exclude), "include": list(include)}
    if executor != "local" or tasks["tasks"]:
        from capivara_search.workers import WorkerArguments, add_with_workers

        how |= tasks | {name: cli.of_all(name) for name in ("model", "device")}
        how["sbatch"] = list(tasks["sbatch"])
        arguments = WorkerArguments(where=pictures.where, folders=list(map(str, folders)), **how)
        done = add_with_workers(arguments)
        logs = shown_path(str(arguments.logs))
        print(words.count("in_index", len(pictures)) + "." if done else words("jobs_sent", path=logs))
        return
    with progress_bar(words) as progress:
        added = pictures.add(*folders, on_progress=progress, **how)
    print(*summary(added, len(pictures), words), sep="\n")


@contextmanager
def progress_bar(words: Words, leave: bool = True) -> Iterator[Callable[[int, int], None]]:
    """`on_progress` of an index: a bar with rate and time left, which may `leave` its last line on the screen."""
    from tqdm.std import tqdm

    from capivara_search.estimates import Estimate

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            return super().format_dict | {"rate": estimate.rate}  # by which tqdm tells the time that is left

    options = {"bar_format": words.raw("bar"), "unit": words("unit"), "dynamic_ncols": True, "leave": leave}
    estimate, bars = Estimate(), list[Bar]()

    def show_progress(done: int, total: int) -> None:
        estimate.update(done)
        if not bars and total:
            bars.append(Bar(total=total, **options))
        for bar in bars:
            if not done:
                bar.reset(total)
            bar.update(done - bar.n)
        if done == total and bars:
            bars.pop().close()

    try:
        yield show_progress
    finally:
        for bar in bars:
            bar.close()


def summary(added: Added, pictures: int, words: Words) -> Iterable[str]:
    """What was done, in words: numbers, some of the files that were left out, and what can be done next."""
    keys = ("new", "changed", "moved", "again", "removed")
    parts = [words.count(key, n) for key in keys if (n := getattr(added, key))]
    parts = parts or [words("nothing_changed")]
    if added.left_out:
        parts.append(words.count("left_out", len(added.left_out)))
    yield f"{', '.join(parts)} ({words.duration(added.seconds)}){':' if added.left_out else '.'}"
    for left in added.left_out[:LEFT_OUT_SHOWN]:
        yield f"  {shown_path(left.path)}: {words.reason(left.reason)}"
    if (more := len(added.left_out) - LEFT_OUT_SHOWN) > 0:
        yield "  " + words.count("and_more", more, command=f"capivara {words.command('status')} --all")
    rules, videos = skipped(added.skipped, words)
    if rules:
        yield words("skipped", parts=rules)
    if videos:
        yield f"{videos}."
    yield words.count("in_index", pictures) + "."


def skipped(numbers: Mapping[str, int], words: Words) -> tuple[str, str]:
    """How much rules leave out, and how many videos; empty where there is none."""
    parts = (words.count(f"skipped.{why}", n) for why in BY_RULE if (n := numbers.get(why)))
    return ", ".join(parts), words.count("videos", n) if (n := numbers.get("video")) else ""


@command("watch")
@argument("folders", metavar="folder", nargs=-1, type=cli.FOLDER)
@switches("--poll")
def watch(words: Words, folders: Sequence[Path], poll: bool) -> None:
    """Follow folders, with a line for what is done each time, until Ctrl-C."""
    pictures = _index() if folders else _filled_index(or_filling=True)
    _say_model(pictures, words)
    _end_by_exception()
    with progress_bar(words, leave=False) as progress:
        for turn, added in enumerate(pictures.watch(*folders, poll=poll or None, on_progress=progress)):
            lines = list(summary(added, len(pictures), words))
            if turn == 0:
                print(*lines, sep="\n", flush=True)
                followed = ", ".join(shown_path(str(folder)) for folder in folders or pictures.asked_folders())
                say(words("watching", folders=followed))
            elif added.new or added.changed or added.moved or added.removed or added.left_out:
                print(*lines[:-1], sep="\n", flush=True)


@command("search")
@argument("query", metavar="query", nargs=-1)
@flag("--like", type=cli.FILE, metavar="file")
@flag("-k", type=Whole(1, 10_000), default=12, metavar="number")
@flag("--folder", type=cli.ANY_FOLDER, metavar="folder")
@flag("--since", type=cli.Day(last=False), metavar="date")
@flag("--until", type=cli.Day(last=True), metavar="date")
@flag("--more", "--mais", multiple=True, metavar="pull")
@flag("--less", "--menos", multiple=True, metavar="pull")
@LINE
@DRAWN
@switches("--no-pictures", "--exact", "--all", "--open", "--json", "--csv")
def search(
    words: Words, query: Sequence[str], like: Path | None, k: int, folder: Path | None, since: date | None,
    until: date | None, more: Sequence[str], less: Sequence[str], line: bool | None, exact: bool, all: bool, open: bool,
    json: bool, csv: bool, **drawn: Any,
) -> int:  # fmt: skip
    """Find pictures, and show or write them."""
    from capivara_search.asking import read_pull

    text = " ".join(query).strip()
    if not (text or like or more or less):
        raise click.UsageError(words("empty_query"))
    if since and until and since > until:
        raise click.UsageError(words("dates_order", since=since, until=until))
    if len(text) > MAX_LETTERS:
        say(words("long_query", length=words.number(len(text)), kept=words.number(MAX_LETTERS)))
    for pull in (*more, *less):
        read_pull(pull)  # says what is wrong with it before any work
    pictures = _filled_index(line=line)
    _say_note(pictures, words)
    how = {"exact": exact, "stacked": not all, "more": more, "less": less}
    picture = like and _query_picture(like, words)
    hits = pictures.search(text[:MAX_LETTERS] or None, picture, k, folder=folder, since=since, until=until, **how)
    if json:
        _write_json([asdict(hit) for hit in hits])
    elif csv:
        write_csv(sys.stdout, CSV_COLUMNS, [{"rank": rank} | asdict(hit) for rank, hit in enumerate(hits, 1)])
    elif hits:
        show_hits(hits, pictures.thumbnail, words, **drawn)
    else:
        say(words("no_hit_filtered" if folder or since or until else "no_hit"))
    if open:
        open_pictures([hit.path for hit in hits], words)
    return 0 if hits else NOTHING


@command("classify")
@argument("place", metavar="place", type=cli.EITHER)
@flag("--labels", multiple=True, required=True, metavar="label")
@flag("--template", default=TEMPLATE, metavar="text")
@switches("--json", "--csv")
def classify(words: Words, place: Path, labels: Sequence[str], template: str, json: bool, csv: bool) -> int:
    """The label of each picture of a folder, or of one picture."""
    from capivara_search.labelling import checked_labels

    labels, pictures = checked_labels(labels, template), _index()
    _say_note(pictures, words)
    found = pictures.classify(place, labels, template)
    if not found and place.is_file():
        _query_picture(place, words)  # says what is wrong with it
    if json:
        _write_json([asdict(one) for one in found])
    elif csv:
        columns = {label: f"share of {label}" if label in ("path", "label") else label for label in labels}
        rows = [{columns[label]: share for label, share in one.shares.items()} for one in found]
        rows = [row | {"path": one.path, "label": one.label} for row, one in zip(rows, found, strict=True)]
        write_csv(sys.stdout, ("path", "label", *columns.values()), rows)
    else:
        rows = [[words(f"column.{name}") for name in ("label", "share", "path")]]
        for one in found:
            share = words.number(100 * max(one.shares.values())) + " %"
            rows.append([one.label or words("none_fits"), share, shown_path(one.path)])
        print(*table(rows, right=(1,)), sep="\n")
        if len(found) > 1:
            times = Counter(label for label, *_ in rows[1:])
            say(", ".join(f"{label}: {words.number(n)}" for label, n in times.most_common()))
    return 0 if found else NOTHING


@command("app")
@flag("--port", type=Whole(1, 65535), default=7860, metavar="number")
@flag("--host", default="127.0.0.1", metavar="address")
@flag("--allow-host", multiple=True, metavar="name")
@LINE
@switches("--no-open", "--watch")
def app(
    words: Words, port: int, host: str, allow_host: Sequence[str], line: bool | None, no_open: bool, watch: bool
) -> None:
    """The page, until Ctrl-C."""
    from capivara_search.page.guard import allowed_hosts, host_name
    from capivara_search.page.server import is_loopback, serve_index
    from capivara_search.watch import follower

    if wrong := [name for name in allow_host if name != "*" and not host_name(name)]:
        raise click.UsageError(words("bad_host", value=visible(wrong[0])))
    pictures = _filled_index(or_filling=True, line=line)
    _say_note(pictures, words)

    def tell(address: str) -> None:
        print(words("page_open", address=address), flush=True)
        if not is_loopback(host):
            say(words("open_to_all", names=", ".join(allowed_hosts(host, allow_host))))

    unasked = sorted(filter(os.path.isdir, pictures.folders().keys() - pictures.asked_folders().keys()))
    if unasked:
        names = ", ".join(shown_path(folder) for folder in unasked[:LEFT_OUT_SHOWN])
        again = f"capivara {words.command('index')} {words('metavar.folder')}"
        say(words("thumbnails_alone", folders=names, command=again))
    _end_by_exception()  # what visitors have sent is removed
    options = {"language": words.language, "on_open": tell, "allow_hosts": list(allow_host)}
    own = {"index": pictures.where, "model": cli.of_all("model"), "device": cli.of_all("device")}
    flags = [f"--{name}={value}" for name, value in (own | {"lang": words.language}).items() if value]
    with follower(*flags) if watch else nullcontext():
        serve_index(pictures, host, port, open_browser=not no_open, **options)


@command("status")
@switches("--all", "--json")
def status(words: Words, all: bool, json: bool) -> None:
    """What the index holds, and what was left out, on one screen."""
    found = _filled_index().status()
    if json:
        _write_json(asdict(found))
        return
    forget, why = words.command("forget"), Counter(one.reason.partition(":")[0] for one in found.left_out)
    taken = {"first": words.date(found.first), "last": words.date(found.last)}
    lists = {
        "where": [shown_path(found.where)],
        "pictures": [words.number(found.pictures)],
        "model": [visible(found.model)] if found.model else [],
        "size": [] if found.bytes is None else [words.size(found.bytes)],
        "search": [words("status.approximate" if found.approximate else "status.exact")],
        "taken": [words("status.taken_range", **taken)] if found.first else [],
        "folders": [f"{shown_path(folder)}  {words.number(number)}" for folder, number in found.folders.items()],
        "skipped": [text for text in skipped(found.skipped, words) if text],
        "rules": [
            *(f"--exclude {visible(pattern)}" for pattern in found.exclude),
            *(f"{forget} {shown_path(path)}" for path in found.forgotten),
        ],
        "left_out": [
            *[", ".join(f"{words.number(n)} {words.reason(one)}" for one, n in why.most_common())] * (len(why) > 1),
            *(f"{shown_path(one.path)}: {words.reason(one.reason)}" for one in found.left_out),
        ],
    }
    lines = []
    for name, texts in lists.items():
        if not all and len(texts) > SCREEN_SHOWN:
            whole = f"capivara {words.command('status')} --all"
            texts[SCREEN_SHOWN - 1 :] = [words.count("and_more", len(texts) - SCREEN_SHOWN + 1, command=whole)]
        lines += [[words(f"status.{name}") * (row == 0), text] for row, text in enumerate(texts)]
    print(*table(lines), sep="\n")


@command("forget")
@argument("place", metavar="place", type=cli.ANY)
def forget(words: Words, place: Path) -> int:
    """Take a folder or a picture out of the index, for good."""
    number, path = _filled_index().forget(place), shown_path(str(place))
    back = visible(f"capivara {words.command('index')} --include {shlex.quote(str(place))}")
    if number:
        print(words.count("forgotten", number, path=path, command=back))
        return 0
    say(words("nothing_yet_forgotten" if os.path.lexists(place) else "nothing_forgotten", path=path, command=back))
    return NOTHING


@command("move")
@argument("old", metavar="old", type=cli.ANY_FOLDER)
@argument("new", metavar="new", type=cli.FOLDER)
def move(words: Words, old: Path, new: Path) -> None:
    """Tell the index that a folder of pictures lies elsewhere now."""
    number, there = _filled_index().move(old, new)
    print(words.count("moved_to", number, there=words.count("moved_there", there), path=shown_path(str(new))))


@command("export")
@argument("file", metavar="file", type=cli.ANY)
def export(words: Words, file: Path) -> None:
    """Write the index to a file."""
    if not file.parent.is_dir():
        raise click.UsageError(words("no_folder", path=shown_path(str(file.parent))))
    print(words.count("exported", _filled_index().export(file), path=shown_path(str(file))))


@command("duplicates")
@flag("--threshold", type=cli.Similarity(0.01, 1), default=SAME, metavar="value")
@DRAWN
@switches("--no-pictures", "--json", "--csv")
def duplicates(words: Words, threshold: float, json: bool, csv: bool, **drawn: Any) -> int:
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
            print(words("group", n=number))
            show_hits(group, pictures.thumbnail, words, **drawn)
        least = words.number(threshold, 2)
        say(words.count("groups", len(groups)) if groups else words("no_duplicates", threshold=least))
    return 0 if groups else NOTHING


@command("completion")
@argument("shell", type=Choice(("bash", "zsh", "fish")))
def completion(words: Words, shell: str) -> None:
    """Print what completes commands and flags in a shell."""
    print(get_completion_class(shell)(capivara, {"obj": words}, "capivara", cli.COMPLETE).source())


def _index() -> "PictureIndex":
    from capivara_search.index import PictureIndex  # here: lancedb comes with it

    return PictureIndex.open(cli.of_all("index") or "auto", cli.of_all("model"), cli.of_all("device"))


def _filled_index(or_filling: bool = False, line: bool | None = None) -> "PictureIndex":
    """The index; raises RuntimeError where it holds nothing yet, unless it is being filled and that is enough."""
    pictures = _index()
    pictures.line = line
    if not len(pictures) and not (or_filling and pictures.progress()):
        raise failure(RuntimeError, "no_index", where=shown_path(str(pictures.where)))
    return pictures


def _query_picture(path: Path, words: Words) -> "PIL.Image.Image":
    """The picture of a file that the user names. Raises click.UsageError where it is none that can be read."""
    from capivara_common.image_files import BadImage
    from capivara_search.picture_files import open_query_picture

    try:
        return open_query_picture(path)
    except BadImage as error:
        reason = words.reason(str(error))
        raise click.UsageError(words("bad_picture", path=shown_path(str(path)), reason=reason)) from error


def _say_model(pictures: "PictureIndex", words: Words) -> None:
    say(words("model_line", model=visible(pictures.model.name)))
    _say_note(pictures, words)


def _say_note(pictures: "PictureIndex", words: Words) -> None:
    """What has to be said of the model every time: that it is a miniature."""
    if note := pictures.model.note_in(words.language):
        say(note)


def _end_by_exception() -> None:
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)


def _write_json(value: Any) -> None:
    text = dumps(value, ensure_ascii=False, indent=1, default=datetime.isoformat)
    # Letters that a terminal obeys stand in strings alone, where JSON has its own escape; lines end outside of them.
    print(UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else dumps(found[0])[1:-1], text))
