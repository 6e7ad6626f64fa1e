"""What each command of `capivara` does, in the words of a language.

    from capivara_search.command_flags import parsed
    from capivara_search.commands import run
    from capivara_search.terminal import Words

    words = Words("en")
    code = run(parsed(["search", "um gato", "--index", "fotos.lance"], words), words)  # prints; 0: found

The index, and all that it needs, is imported when a command begins.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capivara_search.command_flags import MOST_OPENED, WrongUse, named
from capivara_search.results import Added, Hit
from capivara_search.terminal import UNSAFE, Words, contact_sheet, harmless, link, screen, shown_path, table, text_cell

if TYPE_CHECKING:
    import PIL.Image

    from capivara_search.index import PictureIndex

DONE, NOTHING = 0, 1  # exit codes; the help explains them
LEFT_OUT_SHOWN = 5
MAX_LETTERS = 4096  # of a query; the model reads no more of a text
SHORT_WORK_S = 60  # no time is announced for what takes less
VIEWER_S = 3  # within which a viewer that can't open a picture has ended
VIEWERS = {"darwin": "open"}  # platform -> what opens a file in the system's viewer
HIT_COLUMNS = ("rank", "score", "path", "taken", "width", "height", "latitude", "longitude", "size", "modified")


class Unusable(Exception):
    """The index or the model can't be used; the text says it in the language."""


def run(args: argparse.Namespace, words: Words) -> int:
    """Do what the arguments say, and return the exit code.

    Raises:
        Unusable: there is no index yet, or a program of the system is missing.
        ValueError, OSError, ImportError, RuntimeError: of the index and the model.
    """
    return COMMANDS[args.command](args, words)


def index(args: argparse.Namespace, words: Words) -> int:
    """Add folders to the index, with progress and a summary."""
    pictures = _index(args)
    _say(words("model_line", model=harmless(pictures.model.name)))
    _say_note(pictures, words)
    _say(words("looking", folders=", ".join(shown_path(str(folder)) for folder in args.folders)))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is under way is finished or undone
    if args.executor != "local" or args.tasks or args.workers:
        added = _add_with_workers(args, pictures, words)
    else:
        with Progress(words) as progress:
            added = pictures.add(*args.folders, exact=args.exact, batch_size=args.batch_size, on_progress=progress)
    for line in summary(added, len(pictures), words) if added else ():
        print(line)
    return DONE


def _add_with_workers(args: argparse.Namespace, pictures: "PictureIndex", words: Words) -> Added | None:
    from capivara_search.workers import WorkerArguments, add_with_workers

    names = [known.name for known in fields(WorkerArguments) if known.name not in ("where", "folders")]
    given = {name: getattr(args, name) for name in names}
    arguments = WorkerArguments(where=pictures.where, folders=list(map(str, args.folders)), **given)
    added = add_with_workers(arguments)
    if added is None:
        print(words("jobs_sent", path=shown_path(str(arguments.logs))))
    return added


class Progress:
    """`on_progress` of an index: a bar with rate and time left, and a line on how long it will take."""

    def __init__(self, words: Words):
        self.words = words
        self._bar: Any = None
        self._announced = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` pictures are in the index."""
        if self._bar is None:
            from tqdm.std import tqdm

            options = {"bar_format": self.words.raw("bar"), "unit": self.words("unit"), "dynamic_ncols": True}
            self._bar = tqdm(total=total, **options)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        with self._bar.get_lock():  # its clock asks, too
            rate = self._bar.format_dict["rate"]
        if rate and not self._announced and done < total:
            self._announced, seconds = True, (total - done) / rate
            if seconds >= SHORT_WORK_S:
                number, needed = self.words.number(total - done), self.words.duration(seconds)
                self._bar.write(self.words("will_take", number=number, time=needed), file=sys.stderr)


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
        yield "  " + words.count("and_more", more, command=f"capivara {named('status', words.language)}")
    yield words.count("in_index", pictures) + "."


def search(args: argparse.Namespace, words: Words) -> int:
    """Find pictures, and show or write them."""
    if len(args.query) > MAX_LETTERS:
        length, kept = words.number(len(args.query)), words.number(MAX_LETTERS)
        _say(words("long_query", length=length, kept=kept))
        args.query = args.query[:MAX_LETTERS]
    pictures = _filled_index(args, words)
    _say_note(pictures, words)
    like = args.like and _query_picture(args.like, words)
    filters = {"folder": args.folder, "since": args.since, "until": args.until}
    hits = pictures.search(args.query or None, like=like, k=args.k, exact=args.exact, **filters)
    if args.json:
        _write_json([asdict(hit) for hit in hits])
    elif args.csv:
        _write_csv(HIT_COLUMNS, [{"rank": rank} | asdict(hit) for rank, hit in enumerate(hits, 1)])
    elif hits:
        show(hits, pictures, args, words)
    else:
        _say(words("no_hit_filtered" if any(filters.values()) else "no_hit"))
    if args.open:
        open_pictures([hit.path for hit in hits], words)
    return DONE if hits else NOTHING


def show(hits: Sequence[Hit], pictures: "PictureIndex", args: argparse.Namespace, words: Words) -> None:
    """Hits as a table; in a terminal that can, above it as many as pictures as fit in the window."""
    terminal = screen(sys.stdout, args.pictures)
    if terminal.kind:
        thumbnails = [pictures.thumbnail(hit.path) for hit in hits]
        captions = [f"{rank} {harmless(os.path.basename(hit.path))}" for rank, hit in enumerate(hits, 1)]
        print(contact_sheet(thumbnails, captions, terminal, terminal.lines - len(hits) - 3))
    head = [words(f"column.{name}") for name in ("rank", "score", "taken", "path")]
    rows = [[str(rank), words.number(hit.score, 3), words.date(hit.taken), ""] for rank, hit in enumerate(hits, 1)]
    if not any(hit.taken for hit in hits):
        head.pop(2), [row.pop(2) for row in rows]
    for row, hit in zip(rows, hits, strict=True):
        row[-1] = link(hit.path, shown_path(hit.path)) if terminal.links else shown_path(hit.path)
    for line in table([head, *rows], right=(0, 1)):
        print(line)


def open_pictures(paths: Sequence[str], words: Words) -> None:
    """Open pictures in the system's viewer.

    An index may be of others, and its paths lead to anything: what is no picture any longer, or has another name than
    its format, is not opened, since the system would start what it finds there, by its name.

    Raises:
        Unusable: the system has no viewer, or it does not open the pictures.
    """
    from capivara_common.image_files import BadImage
    from capivara_search.picture_files import open_query_picture

    viewer = VIEWERS.get(sys.platform, "xdg-open")
    if shutil.which(viewer) is None:
        raise Unusable(words("no_viewer", name=viewer))
    if len(paths) > MOST_OPENED:
        _say(words("opening_most", most=MOST_OPENED))
    started = {}
    for path in paths[:MOST_OPENED]:
        try:
            open_query_picture(path)
            other = _format_unlike_name(path)
        except (BadImage, ValueError, OSError):
            _say(words("not_opened", path=shown_path(path)))
            continue
        if other:
            _say(words("not_opened_name", format=other, path=shown_path(path)))
            continue
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started[path] = subprocess.Popen([viewer, path], start_new_session=True, **quiet)
    deadline = time.monotonic() + VIEWER_S
    for path, process in started.items():
        with suppress(subprocess.TimeoutExpired):  # it shows the picture until it is closed
            if code := process.wait(max(0, deadline - time.monotonic())):
                raise Unusable(words("viewer_failed", path=shown_path(path), name=viewer, code=code))


def _format_unlike_name(path: str) -> str | None:
    """The format of the bytes of a picture, where its name ends as those of another one; else None.

    Raises:
        BadImage, OSError: it can't be read.
    """
    import PIL.Image

    from capivara_common.image_files import MAX_IMAGE_BYTES, open_image, open_regular_file
    from capivara_search.picture_files import MAX_PICTURE_PIXELS, RAW_SUFFIXES

    suffix = os.path.splitext(path)[1].lower()
    if suffix in RAW_SUFFIXES:  # as which it was read before
        return None
    with open_regular_file(path, "the file") as file:
        found = open_image(file.read(MAX_IMAGE_BYTES), "the file", MAX_PICTURE_PIXELS).format
    of_name = PIL.Image.registered_extensions().get(suffix)
    return None if of_name == {"MPO": "JPEG"}.get(found, found) else found  # phones' JPEG may hold a second picture


def classify(args: argparse.Namespace, words: Words) -> int:
    """The label of each picture of a folder, or of one picture."""
    pictures = _index(args)
    _say_note(pictures, words)
    found = pictures.classify(args.place, args.labels, args.template)
    if not found and args.place.is_file():
        _query_picture(args.place, words)  # says what is wrong with it
    rows = [asdict(one) for one in found]
    if args.json:
        _write_json(rows)
    elif args.csv:
        columns = {label: f"share of {label}" if label in ("path", "label") else label for label in args.labels}
        shares = [{columns[label]: share for label, share in row.pop("shares").items()} for row in rows]
        _write_csv(("path", "label", *columns.values()), [row | own for row, own in zip(rows, shares, strict=True)])
    else:
        texts = [row["label"] or words("none_fits") for row in rows]
        shares = [words.number(100 * max(row["shares"].values())) + " %" for row in rows]
        head = [words(f"column.{name}") for name in ("label", "share", "path")]
        cells = [[text, share, shown_path(row["path"])] for text, share, row in zip(texts, shares, rows, strict=True)]
        for line in table([head, *cells], right=(1,)):
            print(line)
        if len(rows) > 1:
            _say(", ".join(f"{text}: {words.number(n)}" for text, n in Counter(texts).most_common()))
    return DONE if rows else NOTHING


def app(args: argparse.Namespace, words: Words) -> int:
    """The page, until Ctrl-C."""
    pictures = _filled_index(args, words)
    _say_note(pictures, words)
    from capivara_search.page.guard import allowed_hosts
    from capivara_search.page.server import is_loopback, serve_index  # here: what there is no index for waits less

    def tell(address: str) -> None:
        print(words("page_open", address=address), flush=True)
        if not is_loopback(args.host):
            _say(words("open_to_all", names=", ".join(allowed_hosts(args.host, args.allow_host))))

    unasked = sorted(filter(os.path.isdir, pictures.folders().keys() - pictures.asked_folders().keys()))
    if unasked:
        names = [shown_path(folder) for folder in unasked[:LEFT_OUT_SHOWN]]
        command = f"capivara {named('index', words.language)} {words('metavar.folder')}"
        _say(words("thumbnails_alone", folders=", ".join(names), command=command))
    for number in (signal.SIGTERM, signal.SIGINT):  # what visitors have sent is removed
        signal.signal(number, signal.default_int_handler)
    options = {"language": words.language, "on_open": tell, "allow_hosts": args.allow_host}
    serve_index(pictures, args.host, args.port, open_browser=not args.no_open, **options)
    return DONE


def status(args: argparse.Namespace, words: Words) -> int:
    """What the index holds, and every file that was left out."""
    pictures = _filled_index(args, words)
    found = pictures.status()
    if args.json:
        _write_json(asdict(found))
        return DONE
    facts = {
        "where": shown_path(found.where),
        "pictures": words.number(found.pictures),
        "model": harmless(found.model or ""),
        "size": "" if found.bytes is None else words.size(found.bytes),
        "search": words("status.approximate" if found.approximate else "status.exact"),
    }
    if found.first:
        facts["taken"] = words("status.taken_range", first=words.date(found.first), last=words.date(found.last))
    lines = [[words(f"status.{name}"), value] for name, value in facts.items() if value]
    folders = [[shown_path(folder), words.number(number)] for folder, number in found.folders.items()]
    lines += [[words("status.folders") * (row == 0), "  ".join(cells)] for row, cells in enumerate(folders)]
    left = [f"{shown_path(one.path)}: {words.reason(one.reason)}" for one in found.left_out]
    lines += [[words("status.left_out") * (row == 0), text] for row, text in enumerate(left)]
    for line in table(lines):
        print(line)
    return DONE


def forget(args: argparse.Namespace, words: Words) -> int:
    """Take a folder out of the index."""
    pictures = _filled_index(args, words)
    number, path = pictures.forget(args.folder), shown_path(str(args.folder))
    if number:
        print(words.count("forgotten", number, path=path))
    else:
        _say(words("nothing_forgotten", path=path))
    return DONE if number else NOTHING


def export(args: argparse.Namespace, words: Words) -> int:
    """Write the index to a file."""
    number = _filled_index(args, words).export(args.file)
    print(words.count("exported", number, path=shown_path(str(args.file))))
    return DONE


def duplicates(args: argparse.Namespace, words: Words) -> int:
    """Groups of pictures that are nearly the same."""
    pictures = _filled_index(args, words)
    groups = pictures.duplicates(args.threshold)
    if args.json:
        _write_json([[asdict(hit) for hit in group] for group in groups])
    elif args.csv:
        rows = [
            {"group": n, "rank": r} | asdict(h) for n, group in enumerate(groups, 1) for r, h in enumerate(group, 1)
        ]
        _write_csv(("group", *HIT_COLUMNS), rows)
    else:
        for number, group in enumerate(groups, 1):
            print(words("group", n=number))
            show(group, pictures, args, words)
        threshold = words.number(args.threshold, 2)
        _say(words.count("groups", len(groups)) if groups else words("no_duplicates", threshold=threshold))
    return DONE if groups else NOTHING


def overview(args: argparse.Namespace, words: Words) -> int:
    """What can be done next: make an index, or use the one that is there."""
    pictures = _index(args)
    where = shown_path(str(pictures.where))
    if not len(pictures):
        print(words("first_steps", where=where))
        return DONE
    folder = next(iter(pictures.folders()), "~/Fotos")
    number = words.count("pictures", len(pictures))
    print(words("next_steps", pictures=number, where=where, folder=shown_path(folder)))
    return DONE


COMMANDS = {
    None: overview,
    "index": index,
    "search": search,
    "classify": classify,
    "app": app,
    "status": status,
    "forget": forget,
    "export": export,
    "duplicates": duplicates,
}


def _index(args: argparse.Namespace, model: str | None = None) -> "PictureIndex":
    from capivara_search.index import PictureIndex  # here: lancedb comes with it

    return PictureIndex.open(args.index or "auto", model or args.model, args.device)


def _filled_index(args: argparse.Namespace, words: Words) -> "PictureIndex":
    """The index; raises Unusable where it holds nothing yet."""
    pictures = _index(args)
    if not len(pictures):
        command = f"capivara {named('index', words.language)} {words('metavar.folder')}"
        raise Unusable(words("no_index", where=shown_path(str(pictures.where)), command=command))
    return pictures


def _query_picture(path: Path, words: Words) -> "PIL.Image.Image":
    """The picture of a file that the user names. Raises WrongUse where it is none that can be read."""
    from capivara_common.image_files import BadImage
    from capivara_search.picture_files import open_query_picture

    try:
        return open_query_picture(path)
    except BadImage as error:
        reason = words.reason(str(error))
        raise WrongUse(words("bad_picture", path=shown_path(str(path)), reason=reason)) from error


def _say_note(pictures: "PictureIndex", words: Words) -> None:
    """What has to be said of the model every time: that it is a miniature."""
    if note := pictures.model.note_in(words.language):
        _say(note)


def _say(text: str) -> None:
    """Beside the results: what is no result goes to stderr."""
    print(text, file=sys.stderr)


def _write_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1, default=datetime.isoformat)
    # Letters that a terminal obeys stand in strings alone, where JSON has its own escape; lines end outside of them.
    print(UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1], text))


def _write_csv(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    writer.writerows([_cell(row[name]) for name in columns] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return text_cell(value) if isinstance(value, str) else value
