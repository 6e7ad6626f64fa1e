"""What a terminal is shown: paths, tables, links, and pictures where it can show them.

print(contact_sheet(thumbnails, ["1 praia.jpg", "2 mar.jpg"], 80), end="")
"""

import csv
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, TextIO
from urllib.parse import quote

import click

from capivara_common.privacy import escape_control_characters
from capivara_search.results import Hit
from capivara_search.words import Words, failure

# How a cell begins that a spreadsheet would run or compute; a single quote before it makes it a text.
FORMULA = r"^([=+\-@\t\r])"
MOST_OPENED = 12  # pictures, by --open, as its help says: more windows at once are of no use
say = partial(click.echo, err=True)  # beside the results: what is no result goes to stderr
TILE_COLUMNS = 34  # least width of a picture: two pixels of a block are one character
TILE_SHAPE = 0.375  # rows by columns: 4 by 3, of characters that are twice as high as wide


def text_cell(text: str) -> str:
    """A text of somebody else's as a cell of CSV, which neither a terminal nor a spreadsheet obeys."""
    return re.sub(FORMULA, r"'\1", escape_control_characters(text))


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows with a head, texts as `text_cell` has them and times in ISO 8601; returns how many there are."""
    writer, number = csv.writer(file, lineterminator="\n"), 0
    writer.writerow(map(text_cell, columns))
    for row in rows:
        number += 1
        cells = [row[name].isoformat() if isinstance(row[name], datetime) else row[name] for name in columns]
        writer.writerow([text_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    file.flush()  # says now that a reader has gone
    return number


def shown_path(path: str) -> str:
    """A path from the current folder where it lies below it, else from ~, else whole; `visible`."""
    for folder, name in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        if folder != "/" and path.startswith(folder.rstrip("/") + "/"):
            return escape_control_characters(name + path[len(folder.rstrip("/")) + 1 :])
    return escape_control_characters(path)


def width(text: str) -> int:
    """Columns that a text without control characters takes: none for a combining mark, two for a wide letter."""
    drawn = (c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in drawn)


def cut(text: str, columns: int) -> str:
    """The text in exactly so many columns: padded, or ended by "…"."""
    if width(text) > columns:
        while text and width(text) >= columns:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - width(text))


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Lines of a table, all columns but the last of one width; the columns `right` are flush right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            " " * (widths[number] - width(text)) + text if number in right else cut(text, widths[number])
            for number, text in enumerate(row[:-1])
        ]
        yield "  ".join([*cells, row[-1]]).rstrip()


def link(path: str, text: str) -> str:
    """The text, which opens the file where the terminal lets links be clicked; without a link for a strange name."""
    return f"\x1b]8;;file://{quote(path)}\x1b\\{text}\x1b]8;;\x1b\\" if escape_control_characters(path) == path else text


def has_colours(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal of all colours, by the variables that it has set; links come with it."""
    known = environment.get("TERM", "dumb") != "dumb" and environment.get("COLORTERM") in ("truecolor", "24bit")
    return stream.isatty() and known


def draws(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether pictures are shown."""
    return has_colours(stream, environment) and "NO_COLOR" not in environment and "utf" in stream.encoding.lower()


def contact_sheet(pictures: Sequence[bytes | None], captions: Sequence[str], width: int, lines: int = 10**9) -> str:
    """Pictures side by side in rows, each above its caption, as text for a terminal of `width` characters.

    A file that is None or broken leaves its place empty. Rows beyond `lines` are left out, but for the first.
    """
    across = max(1, (width - 1) // TILE_COLUMNS)
    columns = min((width - 1) // across, 60)
    rows = max(1, round(columns * TILE_SHAPE))
    shown = max(1, lines // (rows + 1)) * across
    text = ""
    for start in range(0, min(shown, len(pictures)), across):
        row = slice(start, min(start + across, shown))
        for parts in zip(*(_blocks(data, columns, rows) for data in pictures[row]), strict=True):
            text += "".join(parts) + "\n"
        text += "".join(cut(f" {caption}", columns) for caption in captions[row]).rstrip() + "\n"
    return text


def _blocks(data: bytes | None, columns: int, rows: int) -> list[str]:
    """The lines of a picture in its place, as large as fits: two pixels a character, its colour and its ground's."""
    import numpy as np
    import PIL.Image

    from capivara_common.image_files import BadImage, decode_image

    try:
        picture = decode_image({"bytes": data, "path": None}).convert("RGB")
    except BadImage:
        return [" " * columns] * rows
    scale = min((columns - 1) / picture.width, 2 * rows / picture.height)
    wide, high = max(1, round(picture.width * scale)), max(2, round(picture.height * scale) // 2 * 2)
    picture = picture.resize((wide, high), PIL.Image.Resampling.LANCZOS)
    lines = []
    for upper, lower in np.asarray(picture).reshape(-1, 2, wide, 3).tolist():
        cells = ("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*a, *b) for a, b in zip(upper, lower, strict=True))
        lines.append(f" {''.join(cells)}\x1b[0m{' ' * (columns - 1 - wide)}")
    return [" " * columns] * (rows - len(lines)) + lines  # above the first letter of its caption


def show_hits(hits: Sequence[Hit], thumbnail: Callable[[str], bytes | None], words: Words) -> None:
    """Hits as a table; in a terminal that can, above it as many as pictures as fit in the window."""
    if draws(sys.stdout):
        columns, lines = shutil.get_terminal_size()
        thumbnails = [thumbnail(hit.path) for hit in hits]
        captions = [f"{rank} {escape_control_characters(os.path.basename(hit.path))}" for rank, hit in enumerate(hits, 1)]
        click.echo(contact_sheet(thumbnails, captions, columns, lines - len(hits) - 3))
    rows = [[words(f"column.{name}") for name in ("rank", "score", "date", "path")]]
    for rank, hit in enumerate(hits, 1):
        path = link(hit.path, shown_path(hit.path)) if has_colours(sys.stdout) else shown_path(hit.path)
        same = f"  ({words.count('same', hit.copies + 1)})" if hit.copies else ""
        date = words.date(hit.date) + words("of_file") * (hit.date_source == "file")
        rows.append([str(rank), words.score(hit.score), date, path + same])
    lines = list(table(rows, right=(0, 1)))
    if below := [place for place, hit in enumerate(hits, 1) if hit.fits is False]:
        lines.insert(below[0], f"-- {words('line')} --")
    click.echo("\n".join(lines))


def open_pictures(paths: Sequence[str], words: Words) -> None:
    """Open pictures in the system's viewer.

    An index may be of others, and its paths lead to anything: what is no picture any longer, or has no name of one, is
    not opened, since the system would start what it finds there, by its name. Raises RuntimeError: it has no viewer.
    """
    from capivara_search.picture_files import is_picture_name, open_query_picture

    shown = []
    for path in paths[:MOST_OPENED]:
        with suppress(ValueError):
            if is_picture_name(path) and open_query_picture(path):
                shown.append(path)
                continue
        say(words("not_opened", path=shown_path(path)))
    if any(map(click.launch, shown)):
        raise failure(RuntimeError, "no_viewer")
