"""Terminal output of `capivara`: tables of paths, links to files, and pictures drawn with colored characters.

Example:
    print(render_contact_sheet(thumbnails, ["1 praia.jpg", "2 mar.jpg"], width=80, max_lines=24), end="")
"""

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

import click

from capivara_common.privacy import escape_control_characters
from capivara_search.messages import Messages, make_error_from_code
from capivara_search.results import Hit, SkippedFile

# Maximum number of pictures that the flag --open opens, because each picture may need its own window. The help of the
# flag states this number (`flag.open` in messages.yaml).
MAX_OPENED_PICTURES = 12
# Notices go to stderr, so that stdout contains results only and can be piped into other programs.
print_notice = partial(click.echo, err=True)
MIN_TILE_COLUMNS = 34  # minimum width of a drawn picture in characters; a character shows an upper and a lower pixel
# Height of a drawn picture in characters, divided by its width. A character is twice as high as wide, so the picture
# has the aspect ratio 4:3.
TILE_ROWS_PER_COLUMN = 0.375


def shorten_and_escape_path(path: str | Path) -> str:
    """Shorten a path for display in a terminal, and escape its control characters.

    Args:
        path: Absolute path.

    Returns:
        The text to display. A path inside the current folder becomes relative to the current folder. Otherwise, a path
        inside the home folder begins with `~`, and any other path stays absolute.
    """
    path = os.fspath(path)
    for folder, prefix in ((os.getcwd(), ""), (os.path.expanduser("~"), f"~{os.sep}")):
        start = folder.rstrip(os.sep) + os.sep
        if start != os.sep and path.startswith(start):
            return escape_control_characters(prefix + path.removeprefix(start))
    return escape_control_characters(path)


def format_skipped_files(files: Sequence[SkippedFile], messages: Messages) -> list[str]:
    """Describe files that an update of the index has skipped.

    Args:
        files: Files and folders that could not be read.
        messages: Texts to print, in the user's language.

    Returns:
        One line of text for each file: its path, and the reason why it was skipped.
    """
    return [f"{shorten_and_escape_path(file.path)}: {messages.skip_reason(file.code, file.reason)}" for file in files]


def display_width(text: str) -> int:
    """Return the number of terminal columns that a text occupies.

    A combining mark takes no column, a wide East Asian character takes two columns, and any other character takes one.
    """
    drawn = (c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in drawn)


def fit_to_columns(text: str, columns: int) -> str:
    """Pad a text with spaces, or shorten it and add "…", so that it takes a given number of terminal columns.

    Args:
        text: Text without control characters.
        columns: Number of terminal columns.

    Returns:
        A text that takes exactly `columns` columns.
    """
    if display_width(text) > columns:
        while text and display_width(text) >= columns:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - display_width(text))


def align_columns(rows: Sequence[Sequence[str]], right_aligned: Sequence[int] = ()) -> Iterator[str]:
    """Format rows of texts as a table with aligned columns.

    Args:
        rows: Texts of the cells of each row. All rows have the same number of cells. The last column is not padded.
        right_aligned: Indices, from 0, of the columns that are aligned to the right.

    Yields:
        One line of text per row.
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for number, text in enumerate(row[:-1]):
            padding = " " * (widths[number] - display_width(text))
            cells.append(padding + text if number in right_aligned else text + padding)
        yield "  ".join([*cells, row[-1]]).rstrip()


def format_link(path: str, text: str) -> str:
    """Return a text that a terminal shows as a link to a file (escape sequence OSC 8).

    Args:
        path: Absolute path of the file.
        text: Text of the link.

    Returns:
        The text with escape sequences, or the plain text if the path contains control characters.
    """
    if escape_control_characters(path) != path:
        return text
    return f"\x1b]8;;file://{quote(path)}\x1b\\{text}\x1b]8;;\x1b\\"


def supports_true_color(stream: TextIO) -> bool:
    """Return whether a stream is a terminal with 24-bit colors. Such a terminal also supports links (`format_link`).

    Args:
        stream: Output stream.

    Returns:
        True if the stream is a terminal and the environment variables TERM and COLORTERM announce 24-bit colors.
    """
    has_colors = os.environ.get("TERM", "dumb") != "dumb" and os.environ.get("COLORTERM") in ("truecolor", "24bit")
    return stream.isatty() and has_colors


def supports_pictures(stream: TextIO) -> bool:
    """Return whether pictures can be drawn on a stream with colored characters.

    Args:
        stream: Output stream.

    Returns:
        True for a UTF-8 terminal with 24-bit colors, unless the environment variable NO_COLOR is set.
    """
    return supports_true_color(stream) and "NO_COLOR" not in os.environ and "utf" in stream.encoding.lower()


def render_contact_sheet(pictures: Sequence[bytes | None], captions: Sequence[str], width: int, max_lines: int) -> str:
    """Draw pictures in rows as text for a terminal, with a caption below each picture.

    Args:
        pictures: Content of image files. None or a damaged file leaves a blank space.
        captions: One caption per picture.
        width: Number of columns of the terminal.
        max_lines: Maximum number of lines of the result. Rows of pictures that do not fit are not drawn, but the first
            row always is.

    Returns:
        Text with escape sequences for 24-bit colors.
    """
    pictures_per_row = max(1, (width - 1) // MIN_TILE_COLUMNS)
    columns = min((width - 1) // pictures_per_row, 60)
    rows = max(1, round(columns * TILE_ROWS_PER_COLUMN))
    shown = max(1, max_lines // (rows + 1)) * pictures_per_row
    text = ""
    for start in range(0, min(shown, len(pictures)), pictures_per_row):
        row = slice(start, start + pictures_per_row)
        for parts in zip(*(_render_picture(data, columns, rows) for data in pictures[row]), strict=True):
            text += "".join(parts) + "\n"
        text += "".join(fit_to_columns(f" {caption}", columns) for caption in captions[row]).rstrip() + "\n"
    return text


def _render_picture(data: bytes | None, columns: int, rows: int) -> list[str]:
    """Draw a picture with colored characters, as large as possible in a block of given width and height.

    Each character is an upper half block (▀). Its foreground color shows one pixel, and its background color shows the
    pixel below.

    Args:
        data: Content of an image file. None or a damaged file gives a blank block.
        columns: Width of the block in characters.
        rows: Height of the block in characters.

    Returns:
        One text per row of the block, with escape sequences for 24-bit colors.
    """
    import numpy as np
    import PIL.Image

    from capivara_common.image_files import BadImage, decode_image

    try:
        picture = decode_image({"bytes": data, "path": None}).convert("RGB")
    except BadImage:
        return [" " * columns] * rows
    scale = min((columns - 1) / picture.width, 2 * rows / picture.height)
    width, height = max(1, round(picture.width * scale)), max(2, round(picture.height * scale) // 2 * 2)
    picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    lines = []
    for upper, lower in np.asarray(picture).reshape(-1, 2, width, 3).tolist():
        cells = ("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*a, *b) for a, b in zip(upper, lower, strict=True))
        lines.append(f" {''.join(cells)}\x1b[0m{' ' * (columns - 1 - width)}")
    # Blank rows are added above the picture, so that it stands directly above its caption.
    return [" " * columns] * (rows - len(lines)) + lines


def show_hits(hits: Sequence[Hit], thumbnail: Callable[[str], bytes | None], messages: Messages) -> None:
    """Print search hits as a table, with thumbnails above it if the terminal can draw pictures.

    As many rows of thumbnails are drawn as fit on the screen above the table, but at least one.

    Args:
        hits: Search hits, best first.
        thumbnail: Function that returns the thumbnail file content for the path of a picture, or None if it has no
            thumbnail.
        messages: Texts to print, in the user's language.
    """
    if supports_pictures(sys.stdout):
        columns, lines = shutil.get_terminal_size()
        thumbnails = [thumbnail(hit.path) for hit in hits]
        captions = [f"{rank} {escape_control_characters(Path(hit.path).name)}" for rank, hit in enumerate(hits, 1)]
        click.echo(render_contact_sheet(thumbnails, captions, columns, lines - len(hits) - 3))
    rows = [[messages(f"column.{name}") for name in ("rank", "score", "date", "path")]]
    for rank, hit in enumerate(hits, 1):
        path = shorten_and_escape_path(hit.path)
        if supports_true_color(sys.stdout):
            path = format_link(hit.path, path)
        duplicates = f"  ({messages.format_count('duplicate_count', hit.copies + 1)})" if hit.copies else ""
        date = messages.format_date(hit.date) + messages("of_file") * (hit.date_source == "file")
        rows.append([str(rank), messages.format_score(hit.score), date, path + duplicates])
    lines = list(align_columns(rows, right_aligned=(0, 1)))
    below_threshold = [rank for rank, hit in enumerate(hits, 1) if hit.above_threshold is False]
    if below_threshold:
        lines.insert(below_threshold[0], f"-- {messages('relevance_threshold')} --")
    click.echo("\n".join(lines))


def open_valid_pictures_in_viewer(paths: Sequence[str], messages: Messages) -> None:
    """Open the first `MAX_OPENED_PICTURES` pictures in the system's viewer.

    A file is opened only if its name has the extension of a picture format and its content can be decoded. For every
    other file, a notice is printed.

    Args:
        paths: Absolute paths of pictures.
        messages: Texts to print, in the user's language.

    Raises:
        RuntimeError: If the system has no viewer for pictures.
    """
    from capivara_search.folder_scan import is_picture_name
    from capivara_search.picture_reading import open_query_picture

    # An index may come from other people, and its paths may lead to any file. If it were a program, the system would
    # start it.
    valid_paths = []
    for path in paths[:MAX_OPENED_PICTURES]:
        with suppress(ValueError):
            if is_picture_name(path) and open_query_picture(path):
                valid_paths.append(path)
                continue
        print_notice(messages("not_opened", path=shorten_and_escape_path(path)))
    if any(map(click.launch, valid_paths)):
        raise make_error_from_code(RuntimeError, "no_viewer")
