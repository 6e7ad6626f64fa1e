"""What each command of `capivara` takes and does, in the words of a language; its function returns the exit code.

The index, and all that it needs, is imported when a command begins.
"""

import json
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

from capivara_search import command_line as cli
from capivara_search.results import SAME, TEMPLATE, Added, Hit
from capivara_search.show import (
    PICTURES,
    contact_sheet,
    link,
    open_pictures,
    say,
    screen,
    shown_path,
    table,
    write_csv,
)
from capivara_search.words import UNSAFE, Words, failure, visible

if TYPE_CHECKING:
    import PIL.Image

    from capivara_search.index import PictureIndex

DONE, NOTHING = 0, 1  # exit codes; the help explains them
WHOLE = cli.number(int, 1)
OUTPUT = cli.switches("--json", "--csv")
SHOWN = [cli.Flag("--pictures", type=cli.Choice(PICTURES), default="auto"), *cli.switches("--no-pictures")]
LINES = {"auto": None, "yes": True, "no": False}  # values of --line
LINE = cli.Flag("--line", type=cli.Choice(tuple(LINES)), default="auto")
LEFT_OUT_SHOWN = 5
BY_RULE = ("forgotten", "excluded", "hidden", "system")
SCREEN_SHOWN = 4  # lines of each list of `status`, which fits on a screen of 24
MAX_LETTERS = 4096  # of a query; the model reads no more of a text
CSV_COLUMNS = (
    *("rank", "score", "path", "taken", "width", "height", "latitude", "longitude", "size", "modified"),
    *("date", "date_source", "copies", "fits"),
)


@cli.command(
    "index",
    cli.Argument("folders", metavar="folder", nargs=-1, read=cli.existing("folder"), completes="dir"),
    cli.Flag("--exclude", multiple=True, metavar="pattern"),
    cli.Flag("--include", multiple=True, metavar="path", completes="file"),
    *cli.switches("--exact"),
    cli.Flag("--batch-size", read=WHOLE, default=32, metavar="number"),
    # Those of `ExecutorArguments`:
    cli.Flag("--executor", type=cli.Choice(("local", "slurm", "ray")), default="local"),
    cli.Flag("--tasks", read=WHOLE, metavar="number"),
    cli.Flag("--workers", read=WHOLE, metavar="number"),
    cli.Flag("--partition", metavar="partition"),
    cli.Flag("--time", metavar="time"),
    cli.Flag("--sbatch", multiple=True, metavar="pair"),
    cli.Flag("--cpus-per-task", read=WHOLE, default=1, metavar="number"),
    cli.Flag("--mem-per-cpu-gb", read=WHOLE, default=4, metavar="number"),
    cli.Flag("--gpus-per-task", read=cli.number(int, 0), default=0, metavar="number"),
    cli.Flag("--logging-dir", read=cli.absolute, metavar="folder", completes="dir"),
)
def index(args: SimpleNamespace, words: Words) -> int:
    """Add folders to the index, with progress and a summary."""
    if args.executor == "local" and args.workers is not None:
        raise click.UsageError(words("gone", name="--workers", text=words("gone.workers")))
    if args.executor != "local" and args.tasks is None:
        raise click.UsageError(words("needs_flags", executor=args.executor, flags="--tasks"))
    if args.executor == "slurm" and not (args.partition and args.time and args.logging_dir):
        raise click.UsageError(words("needs_flags", executor="slurm", flags="--partition, --time, --logging-dir"))
    pictures = _index(args)
    pictures.mend()
    folders = pictures.folders_to_add(args.folders, args.exclude, args.include)
    say(words("model_line", model=visible(pictures.model.name)))
    _say_note(pictures, words)
    say(words("looking", folders=", ".join(shown_path(str(folder)) for folder in folders)))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is under way is finished or undone
    if args.executor != "local" or args.tasks:
        from capivara_search.workers import WorkerArguments, add_with_workers

        names = [known.name for known in fields(WorkerArguments) if known.name not in ("where", "folders")]
        given = {name: getattr(args, name) for name in names}
        given |= {name: list(given[name]) for name in ("sbatch", "exclude", "include")}
        arguments = WorkerArguments(where=pictures.where, folders=list(map(str, folders)), **given)
        done = add_with_workers(arguments)
        logs = shown_path(str(arguments.logs))
        print(words.count("in_index", len(pictures)) + "." if done else words("jobs_sent", path=logs))
        return DONE
    with progress_bar(words) as progress:
        rules = {"exclude": args.exclude, "include": args.include}
        added = pictures.add(*folders, exact=args.exact, batch_size=args.batch_size, on_progress=progress, **rules)
    for line in summary(added, len(pictures), words):
        print(line)
    return DONE


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
    parts = [words.count(key, n) for key in ("new", "changed", "moved", "removed") if (n := getattr(added, key))]
    parts = parts or [words("nothing_changed")]
    if added.left_out:
        parts.append(words.count("left_out", len(added.left_out)))
    line = ", ".join(parts)
    yield f"{line} ({words.duration(added.seconds)}){':' if added.left_out else '.'}"
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


@cli.command(
    "watch",
    cli.Argument("folders", metavar="folder", nargs=-1, read=cli.existing("folder"), completes="dir"),
    *cli.switches("--poll"),
)
def watch(args: SimpleNamespace, words: Words) -> int:
    """Follow folders, with a line for what is done each time, until Ctrl-C."""
    pictures = _index(args) if args.folders else _filled_index(args, or_filling=True)
    say(words("model_line", model=visible(pictures.model.name)))
    _say_note(pictures, words)
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)
    is_first = True
    with progress_bar(words, leave=False) as progress:
        for added in pictures.watch(*args.folders, poll=args.poll or None, on_progress=progress):
            lines = list(summary(added, len(pictures), words))
            if is_first or added.new or added.changed or added.moved or added.removed or added.left_out:
                print("\n".join(lines if is_first else lines[:-1]), flush=True)
            if is_first:
                folders = ", ".join(shown_path(str(folder)) for folder in args.folders or pictures.asked_folders())
                say(words("watching", folders=folders))
            is_first = False
    return DONE


@cli.command(
    "search",
    cli.Argument("query", metavar="query", nargs=-1, callback=lambda ctx, param, parts: " ".join(parts).strip()),
    cli.Flag("--like", read=cli.existing("file"), metavar="file", completes="file"),
    cli.Flag("-k", read=cli.number(int, 1, 10_000), default=12, metavar="number"),
    cli.Flag("--folder", read=cli.absolute, metavar="folder", completes="dir"),
    cli.Flag("--since", read=cli.day(last=False), metavar="date"),
    cli.Flag("--until", read=cli.day(last=True), metavar="date"),
    cli.Flag("--more", "--mais", multiple=True, metavar="pull"),
    cli.Flag("--less", "--menos", multiple=True, metavar="pull"),
    LINE,
    *cli.switches("--exact", "--all", "--open"),
    *OUTPUT,
    *SHOWN,
)
def search(args: SimpleNamespace, words: Words) -> int:
    """Find pictures, and show or write them."""
    from capivara_search.asking import read_pull

    if not args.query and args.like is None and not args.more and not args.less:
        raise click.UsageError(words("empty_query"))
    if args.since and args.until and args.since > args.until:
        raise click.UsageError(words("dates_order", since=args.since, until=args.until))
    if len(args.query) > MAX_LETTERS:
        length, kept = words.number(len(args.query)), words.number(MAX_LETTERS)
        say(words("long_query", length=length, kept=kept))
        args.query = args.query[:MAX_LETTERS]
    for text in (*args.more, *args.less):
        read_pull(text)  # says what is wrong with it before any work
    pictures = _filled_index(args)
    _say_note(pictures, words)
    like = args.like and _query_picture(args.like, words)
    filters = {"folder": args.folder, "since": args.since, "until": args.until}
    how = {"exact": args.exact, "stacked": not args.all, "more": args.more, "less": args.less}
    hits = pictures.search(args.query or None, like, args.k, **filters, **how)
    if args.json:
        _write_json([asdict(hit) for hit in hits])
    elif args.csv:
        write_csv(sys.stdout, CSV_COLUMNS, [{"rank": rank} | asdict(hit) for rank, hit in enumerate(hits, 1)])
    elif hits:
        show(hits, pictures, args, words)
    else:
        say(words("no_hit_filtered" if any(filters.values()) else "no_hit"))
    if args.open:
        open_pictures([hit.path for hit in hits], words)
    return DONE if hits else NOTHING


def show(hits: Sequence[Hit], pictures: "PictureIndex", args: SimpleNamespace, words: Words) -> None:
    """Hits as a table; in a terminal that can, above it as many as pictures as fit in the window."""
    terminal = screen(sys.stdout, "no" if args.no_pictures else args.pictures)
    if terminal.pictures:
        thumbnails = [pictures.thumbnail(hit.path) for hit in hits]
        captions = [f"{rank} {visible(os.path.basename(hit.path))}" for rank, hit in enumerate(hits, 1)]
        print(contact_sheet(thumbnails, captions, terminal, terminal.lines - len(hits) - 3))
    head = [words(f"column.{name}") for name in ("rank", "score", "date", "path")]
    rows = []
    for rank, hit in enumerate(hits, 1):
        path = link(hit.path, shown_path(hit.path)) if terminal.links else shown_path(hit.path)
        same = f"  ({words.count('same', hit.copies + 1)})" if hit.copies else ""
        date = words.date(hit.date) + words("of_file") * (hit.date_source == "file")
        rows.append([str(rank), words.score(hit.score), date, path + same])
    lines = list(table([head, *rows], right=(0, 1)))
    if below := [place for place, hit in enumerate(hits, 1) if hit.fits is False]:
        lines.insert(below[0], f"-- {words('line' if below[0] > 1 else 'line_first')} --")
    for line in lines:
        print(line)


@cli.command(
    "classify",
    cli.Argument("place", metavar="place", read=cli.existing("folder", "file"), completes="file"),
    cli.Flag("--labels", multiple=True, metavar="label"),
    cli.Flag("--template", default=TEMPLATE, metavar="text"),
    *OUTPUT,
)
def classify(args: SimpleNamespace, words: Words) -> int:
    """The label of each picture of a folder, or of one picture."""
    if not args.labels:
        raise click.UsageError(words("missing", name="--labels") + words("see_help"))
    from capivara_search.labelling import checked_labels

    labels, pictures = checked_labels(args.labels, args.template), _index(args)
    _say_note(pictures, words)
    found = pictures.classify(args.place, labels, args.template)
    if not found and args.place.is_file():
        _query_picture(args.place, words)  # says what is wrong with it
    rows = [asdict(one) for one in found]
    if args.json:
        _write_json(rows)
    elif args.csv:
        columns = {label: f"share of {label}" if label in ("path", "label") else label for label in labels}
        shares = [{columns[label]: share for label, share in row.pop("shares").items()} for row in rows]
        write_csv(
            sys.stdout, ("path", "label", *columns.values()), [row | own for row, own in zip(rows, shares, strict=True)]
        )
    else:
        texts = [row["label"] or words("none_fits") for row in rows]
        shares = [words.number(100 * max(row["shares"].values())) + " %" for row in rows]
        head = [words(f"column.{name}") for name in ("label", "share", "path")]
        cells = [[text, share, shown_path(row["path"])] for text, share, row in zip(texts, shares, rows, strict=True)]
        for line in table([head, *cells], right=(1,)):
            print(line)
        if len(rows) > 1:
            say(", ".join(f"{text}: {words.number(n)}" for text, n in Counter(texts).most_common()))
    return DONE if rows else NOTHING


@cli.command(
    "app",
    cli.Flag("--port", read=cli.number(int, 1, 65535), default=7860, metavar="number"),
    cli.Flag("--host", default="127.0.0.1", metavar="address"),
    cli.Flag("--allow-host", read=cli.host, multiple=True, metavar="name"),
    LINE,
    *cli.switches("--no-open", "--watch"),
)
def app(args: SimpleNamespace, words: Words) -> int:
    """The page, until Ctrl-C."""
    pictures = _filled_index(args, or_filling=True)
    _say_note(pictures, words)
    from capivara_search.page.guard import allowed_hosts
    from capivara_search.page.server import is_loopback, serve_index  # here: what there is no index for waits less
    from capivara_search.watch import follower

    def tell(address: str) -> None:
        print(words("page_open", address=address), flush=True)
        if not is_loopback(args.host):
            say(words("open_to_all", names=", ".join(allowed_hosts(args.host, list(args.allow_host)))))

    unasked = sorted(filter(os.path.isdir, pictures.folders().keys() - pictures.asked_folders().keys()))
    if unasked:
        names = [shown_path(folder) for folder in unasked[:LEFT_OUT_SHOWN]]
        command = f"capivara {words.command('index')} {words('metavar.folder')}"
        say(words("thumbnails_alone", folders=", ".join(names), command=command))
    for ending in (signal.SIGTERM, signal.SIGINT):  # what visitors have sent is removed
        signal.signal(ending, signal.default_int_handler)
    options = {"language": words.language, "on_open": tell, "allow_hosts": list(args.allow_host)}
    own = {"--index": pictures.where, "--model": args.model, "--device": args.device, "--lang": words.language}
    flags = [f"{name}={value}" for name, value in own.items() if value]
    with follower(*flags) if args.watch else nullcontext():
        serve_index(pictures, args.host, args.port, open_browser=not args.no_open, **options)
    return DONE


@cli.command("status", *cli.switches("--all", "--json"))
def status(args: SimpleNamespace, words: Words) -> int:
    """What the index holds, and what was left out, on one screen."""
    pictures = _filled_index(args)
    found = pictures.status()
    if args.json:
        _write_json(asdict(found))
        return DONE
    facts = {
        "where": shown_path(found.where),
        "pictures": words.number(found.pictures),
        "model": visible(found.model or ""),
        "size": "" if found.bytes is None else words.size(found.bytes),
        "search": words("status.approximate" if found.approximate else "status.exact"),
    }
    if found.first:
        facts["taken"] = words("status.taken_range", first=words.date(found.first), last=words.date(found.last))
    lines = [[words(f"status.{name}"), value] for name, value in facts.items() if value]
    forget, why = words.command("forget"), Counter(one.reason.partition(":")[0] for one in found.left_out)
    lists = {
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
    for name, texts in lists.items():
        if not args.all and len(texts) > SCREEN_SHOWN:
            command = f"capivara {words.command('status')} --all"
            texts[SCREEN_SHOWN - 1 :] = [words.count("and_more", len(texts) - SCREEN_SHOWN + 1, command=command)]
        lines += [[words(f"status.{name}") * (row == 0), text] for row, text in enumerate(texts)]
    for line in table(lines):
        print(line)
    return DONE


@cli.command("forget", cli.Argument("place", metavar="place", read=cli.absolute, completes="file"))
def forget(args: SimpleNamespace, words: Words) -> int:
    """Take a folder or a picture out of the index, for good."""
    pictures = _filled_index(args)
    number, path = pictures.forget(args.place), shown_path(str(args.place))
    back = f"capivara {words.command('index')} --include {shlex.quote(str(args.place))}"
    if number:
        print(words.count("forgotten", number, path=path, command=visible(back)))
    elif os.path.lexists(args.place):
        say(words("nothing_yet_forgotten", path=path, command=visible(back)))
    else:
        say(words("nothing_forgotten", path=path))
    return DONE if number else NOTHING


@cli.command(
    "move",
    cli.Argument("old", metavar="old", read=cli.absolute, completes="dir"),
    cli.Argument("new", metavar="new", read=cli.existing("folder"), completes="dir"),
)
def move(args: SimpleNamespace, words: Words) -> int:
    """Tell the index that a folder of pictures lies elsewhere now."""
    number, there = _filled_index(args).move(args.old, args.new)
    print(words.count("moved_to", number, there=words.number(there), path=shown_path(str(args.new))))
    return DONE


@cli.command("export", cli.Argument("file", metavar="file", read=cli.table_file, completes="file"))
def export(args: SimpleNamespace, words: Words) -> int:
    """Write the index to a file."""
    number = _filled_index(args).export(args.file)
    print(words.count("exported", number, path=shown_path(str(args.file))))
    return DONE


@cli.command(
    "duplicates",
    cli.Flag("--threshold", read=cli.number(float, 0.01, 1), default=SAME, metavar="value"),
    *OUTPUT,
    *SHOWN,
)
def duplicates(args: SimpleNamespace, words: Words) -> int:
    """Groups of pictures that are nearly the same."""
    pictures = _filled_index(args)
    groups = pictures.duplicates(args.threshold)
    if args.json:
        _write_json([[asdict(hit) for hit in group] for group in groups])
    elif args.csv:
        rows = [
            {"group": n, "rank": r} | asdict(h) for n, group in enumerate(groups, 1) for r, h in enumerate(group, 1)
        ]
        write_csv(sys.stdout, ("group", *CSV_COLUMNS), rows)
    else:
        for number, group in enumerate(groups, 1):
            print(words("group", n=number))
            show(group, pictures, args, words)
        threshold = words.number(args.threshold, 2)
        say(words.count("groups", len(groups)) if groups else words("no_duplicates", threshold=threshold))
    return DONE if groups else NOTHING


@cli.command("completion", cli.Argument("shell", type=cli.Choice(("bash", "zsh", "fish"))))
def completion(args: SimpleNamespace, words: Words) -> int:
    """Print what completes commands and flags in a shell."""
    print(get_completion_class(args.shell)(cli.GROUP, {"obj": words}, "capivara", cli.COMPLETE).source())
    return DONE


@cli.command(None)
def overview(args: SimpleNamespace, words: Words) -> int:
    """What can be done next: make an index, or use the one that is there."""
    pictures = _index(args)
    where = shown_path(str(pictures.where))
    if not len(pictures):
        print(words("first_steps", where=where))
        return DONE
    print(words("next_steps", pictures=words.count("pictures", len(pictures)), where=where))
    return DONE


def _index(args: SimpleNamespace) -> "PictureIndex":
    from capivara_search.index import PictureIndex  # here: lancedb comes with it

    return PictureIndex.open(args.index or "auto", args.model, args.device)


def _filled_index(args: SimpleNamespace, or_filling: bool = False) -> "PictureIndex":
    """The index; raises RuntimeError where it holds nothing yet, unless it is being filled and that is enough."""
    pictures = _index(args)
    pictures.line = LINES[getattr(args, "line", "auto")]
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


def _say_note(pictures: "PictureIndex", words: Words) -> None:
    """What has to be said of the model every time: that it is a miniature."""
    if note := pictures.model.note_in(words.language):
        say(note)


def _write_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1, default=datetime.isoformat)
    # Letters that a terminal obeys stand in strings alone, where JSON has its own escape; lines end outside of them.
    print(UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1], text))
