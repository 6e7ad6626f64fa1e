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
from capivara_search.messages import Messages, localized_error
from capivara_search.results import Hit

# How a cell begins that a spreadsheet would run or compute; a single quote before it makes it a text.
FORMULA_PATTERN = r"^([=+\-@\t\r])"
MAX_OPENED_PICTURES = 12  # pictures, by --open, as its help says: more windows at once are of no use
print_notice = partial(click.echo, err=True)  # beside the results: what is no result goes to stderr
MIN_TILE_COLUMNS = 34  # least width of a picture: two pixels of a block are one character
TILE_ROWS_PER_COLUMN = 0.375  # rows by columns: 4 by 3, of characters that are twice as high as wide


def escape_csv_cell(text: str) -> str:
    """A text of somebody else's as a cell of CSV, which neither a terminal nor a spreadsheet obeys."""
    return re.sub(FORMULA_PATTERN, r"'\1", escape_control_characters(text))


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows with a head, texts as `text_cell` has them and times in ISO 8601; returns how many there are."""
    writer, number = csv.writer(file, lineterminator="\n"), 0
    writer.writerow(map(escape_csv_cell, columns))
    for row in rows:
        number += 1
        cells = [row[name].isoformat() if isinstance(row[name], datetime) else row[name] for name in columns]
        writer.writerow([escape_csv_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    file.flush()  # says now that a reader has gone
    return number


def shorten_path(path: str) -> str:
    """A path from the current folder where it lies below it, else from ~, else whole; `visible`."""
    for folder, name in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        if folder != "/" and path.startswith(folder.rstrip("/") + "/"):
            return escape_control_characters(name + path[len(folder.rstrip("/")) + 1 :])
    return escape_control_characters(path)


def display_width(text: str) -> int:
    """Columns that a text without control characters takes: none for a combining mark, two for a wide letter."""
    drawn = (c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in drawn)


def fit_to_columns(text: str, columns: int) -> str:
    """The text in exactly so many columns: padded, or ended by "…"."""
    if display_width(text) > columns:
        while text and display_width(text) >= columns:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - display_width(text))


def format_table(rows: Sequence[Sequence[str]], right_aligned: Sequence[int] = ()) -> Iterator[str]:
    """Lines of a table, all columns but the last of one width; the columns `right` are flush right."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            " " * (widths[number] - display_width(text)) + text
            if number in right_aligned
            else fit_to_columns(text, widths[number])
            for number, text in enumerate(row[:-1])
        ]
        yield "  ".join([*cells, row[-1]]).rstrip()


def format_link(path: str, text: str) -> str:
    """The text, which opens the file where the terminal lets links be clicked; without a link for a strange name."""
    return (
        f"\x1b]8;;file://{quote(path)}\x1b\\{text}\x1b]8;;\x1b\\" if escape_control_characters(path) == path else text
    )


def supports_true_color(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal of all colours, by the variables that it has set; links come with it."""
    known = environment.get("TERM", "dumb") != "dumb" and environment.get("COLORTERM") in ("truecolor", "24bit")
    return stream.isatty() and known


def supports_pictures(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether pictures are shown."""
    return (
        supports_true_color(stream, environment) and "NO_COLOR" not in environment and "utf" in stream.encoding.lower()
    )


def render_contact_sheet(
    pictures: Sequence[bytes | None], captions: Sequence[str], width: int, max_lines: int = 10**9
) -> str:
    """Pictures side by side in rows, each above its caption, as text for a terminal of `width` characters.

    A file that is None or broken leaves its place empty. Rows beyond `lines` are left out, but for the first.
    """
    across = max(1, (width - 1) // MIN_TILE_COLUMNS)
    columns = min((width - 1) // across, 60)
    rows = max(1, round(columns * TILE_ROWS_PER_COLUMN))
    shown = max(1, max_lines // (rows + 1)) * across
    text = ""
    for start in range(0, min(shown, len(pictures)), across):
        row = slice(start, min(start + across, shown))
        for parts in zip(*(_render_picture(data, columns, rows) for data in pictures[row]), strict=True):
            text += "".join(parts) + "\n"
        text += "".join(fit_to_columns(f" {caption}", columns) for caption in captions[row]).rstrip() + "\n"
    return text


def _render_picture(data: bytes | None, columns: int, rows: int) -> list[str]:
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


def show_hits(hits: Sequence[Hit], thumbnail: Callable[[str], bytes | None], messages: Messages) -> None:
    """Hits as a table; in a terminal that can, above it as many as pictures as fit in the window."""
    if supports_pictures(sys.stdout):
        columns, lines = shutil.get_terminal_size()
        thumbnails = [thumbnail(hit.path) for hit in hits]
        captions = [
            f"{rank} {escape_control_characters(os.path.basename(hit.path))}" for rank, hit in enumerate(hits, 1)
        ]
        click.echo(render_contact_sheet(thumbnails, captions, columns, lines - len(hits) - 3))
    rows = [[messages(f"column.{name}") for name in ("rank", "score", "date", "path")]]
    for rank, hit in enumerate(hits, 1):
        path = (
            format_link(hit.path, shorten_path(hit.path)) if supports_true_color(sys.stdout) else shorten_path(hit.path)
        )
        same = f"  ({messages.count('same', hit.copies + 1)})" if hit.copies else ""
        date = messages.date(hit.date) + messages("of_file") * (hit.date_source == "file")
        rows.append([str(rank), messages.score(hit.score), date, path + same])
    lines = list(format_table(rows, right_aligned=(0, 1)))
    if below := [place for place, hit in enumerate(hits, 1) if hit.above_threshold is False]:
        lines.insert(below[0], f"-- {messages('line')} --")
    click.echo("\n".join(lines))


def open_pictures(paths: Sequence[str], messages: Messages) -> None:
    """Open pictures in the system's viewer.

    An index may be of others, and its paths lead to anything: what is no picture any longer, or has no name of one, is
    not opened, since the system would start what it finds there, by its name. Raises RuntimeError: it has no viewer.
    """
    from capivara_search.folder_scan import is_picture_name
    from capivara_search.picture_reading import open_query_picture

    shown = []
    for path in paths[:MAX_OPENED_PICTURES]:
        with suppress(ValueError):
            if is_picture_name(path) and open_query_picture(path):
                shown.append(path)
                continue
        print_notice(messages("not_opened", path=shorten_path(path)))
    if any(map(click.launch, shown)):
        raise localized_error(RuntimeError, "no_viewer")
