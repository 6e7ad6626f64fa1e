"""What a terminal is shown: words in two languages, texts that can do it no harm, tables, and pictures where it can.

    from capivara_search.show import Words, contact_sheet, screen

    words = Words("pt")
    print(words.count("new", 213))  # 213 imagens novas
    print(contact_sheet(thumbnails, ["1 praia.jpg", "2 mar.jpg"], screen(sys.stdout)), end="")

Names of files are other people's: whatever in them a terminal would obey is shown as an escape such as `\\x1b`.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import quote

if TYPE_CHECKING:
    import PIL.Image

# English name of a command -> its Portuguese name; both work in both languages.
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
PICTURES = ("auto", "blocks", "no")  # how they may be shown
# What a terminal obeys or hides: control and format characters (marks of writing direction, soft hyphens, tag letters),
# separators of lines, and what is no character at all, such as a byte of a file's name that is no UTF-8. Format
# characters that names need stay: joiners (Arabic, Indic, emoji), and signs that are seen (numbers in Arabic).
UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)
# How a cell begins that a spreadsheet would run or compute; a single quote before it makes it a text.
FORMULA = r"^([=+\-@\t\r])"
MOST_OPENED = 12  # pictures, by --open: more windows at once are of no use
VIEWER_S = 3  # within which a viewer that can't open a picture has ended
VIEWERS = {"darwin": "open"}  # platform -> what opens a file in the system's viewer
TILE_COLUMNS = 34  # least width of a picture: two pixels of a block are one character
TILE_SHAPE = 0.375  # rows by columns: 4 by 3, of characters that are twice as high as wide


class Unusable(Exception):
    """The index, the model or a program of the system can't be used; the text says it in the language."""


class Words:
    """The texts of `words.yaml` in one language, with its numbers and dates."""

    def __init__(self, language: str):
        self.language = language  # "pt" or "en"
        self._texts = _texts()

    def raw(self, key: str) -> str | list[str]:
        """The text as it stands in the file; a list is its singular and plural."""
        return self._texts[key][self.language]

    def has(self, key: str) -> bool:
        """Whether there is such a text."""
        return key in self._texts

    def command(self, english: str) -> str:
        """The name of a command."""
        return COMMANDS[english] if self.language == "pt" else english

    def reason(self, text: str) -> str:
        """Why a file was left out, printable: `reason: detail`, of which other languages have the reason alone."""
        key = f"reason.{text.partition(':')[0]}"
        return self(key) if self.language != "en" and self.has(key) else printable(text)

    def __call__(self, key: str, **values: Any) -> str:
        """The text with its `{name}` filled in."""
        return self.raw(key).format(**values)

    def count(self, key: str, number: int, **values: Any) -> str:
        """The singular or plural of a text, with `{n}` filled in."""
        return self.raw(key)[number != 1].format(n=self.number(number), **values)

    def number(self, value: float, digits: int = 0) -> str:
        """1,234.5 or 1.234,5."""
        text = f"{value:,.{digits}f}"
        return text if self.language == "en" else text.translate(str.maketrans(",.", ".,"))

    def size(self, number: int) -> str:
        """Bytes, as 1.2 MB."""
        for unit, divisor in (("GB", 1e9), ("MB", 1e6)):
            if number >= divisor:
                return f"{self.number(number / divisor, 1)} {unit}"
        return f"{self.number(number / 1e3, 1)} kB"

    def duration(self, seconds: float) -> str:
        """Seconds, as 1 h 5 min."""
        if seconds < 60:
            return f"{self.number(seconds, 1 if seconds < 10 else 0)} s"
        minutes = round(seconds / 60)
        return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

    def date(self, moment: datetime | None) -> str:
        """The day, as it is written in the language; empty where none is known."""
        return "" if moment is None else moment.strftime("%d/%m/%Y" if self.language == "pt" else "%Y-%m-%d")


@cache
def _texts() -> dict[str, dict[str, str | list[str]]]:
    import yaml

    # The C loader takes a tenth of the time.
    content = Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
    return yaml.load(content, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))


def printable(text: str) -> str:
    """A text of somebody else's, in one line, with nothing in it that a terminal obeys."""
    return UNSAFE.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as Python keeps it in a name
        code -= 0xDC00
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def text_cell(text: str) -> str:
    """A text of somebody else's as a cell of CSV: printable to a terminal, and to a spreadsheet."""
    return re.sub(FORMULA, r"'\1", printable(text))


def shown_path(path: str) -> str:
    """A path from the current folder where it lies below it, else from ~, else whole; printable to a terminal."""
    for folder, name in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        if folder != "/" and path.startswith(folder.rstrip("/") + "/"):
            return printable(name + path[len(folder.rstrip("/")) + 1 :])
    return printable(path)


def width(text: str) -> int:
    """Columns that a printable text takes: none for a combining mark, two for a wide letter."""
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
    return f"\x1b]8;;file://{quote(path)}\x1b\\{text}\x1b]8;;\x1b\\" if printable(path) == path else text


@dataclass(frozen=True)
class Screen:
    """What a terminal can show.

    Attributes:
        pictures: whether it shows them, as blocks of colour, two pixels a character.
        columns: characters of a line.
        lines: that are seen at once.
        links: whether files can be clicked.
    """

    pictures: bool
    columns: int = 80
    lines: int = 24
    links: bool = False


def screen(stream: TextIO, pictures: str = "auto", environment: Mapping[str, str] = os.environ) -> Screen:
    """What the terminal behind `stream` can show, by the variables that it has set.

    Args:
        stream: that is written to; a file or a pipe shows no pictures, unless they are asked for.
        pictures: one of PICTURES; blocks are taken for granted.
        environment: as the terminal has set it.
    """
    colours = stream.isatty() and environment.get("TERM", "dumb") != "dumb"
    colours = colours and environment.get("COLORTERM", "") in ("truecolor", "24bit")
    shown = colours and "NO_COLOR" not in environment and "utf" in (stream.encoding or "").lower()
    return Screen(pictures == "blocks" or (pictures == "auto" and shown), *shutil.get_terminal_size(), links=colours)


def contact_sheet(pictures: Sequence[bytes | None], captions: Sequence[str], screen: Screen, lines: int = 10**9) -> str:
    """Pictures side by side in rows, each above its caption, as text for the terminal; empty where it shows none.

    Args:
        pictures: files of small pictures; one that is None or broken leaves its place empty.
        captions: one for each; printable.
        screen: of the terminal.
        lines: that the sheet may take; rows that do not fit are left out, but for the first.
    """
    if not screen.pictures:
        return ""
    across = max(1, (screen.columns - 1) // TILE_COLUMNS)
    columns = min((screen.columns - 1) // across, 60)
    rows = max(1, round(columns * TILE_SHAPE))
    shown = max(1, lines // (rows + 1)) * across
    text = ""
    for start in range(0, min(shown, len(pictures)), across):
        row = slice(start, min(start + across, shown))
        text += _blocks(_side_by_side(pictures[row], across, (columns, 2 * rows)))
        text += "".join(cut(f" {caption}", columns) for caption in captions[row]).rstrip() + "\n"
    return text


def _side_by_side(pictures: Sequence[bytes | None], across: int, place: tuple[int, int]) -> "PIL.Image.Image":
    """One transparent picture of a row of `across` places, in pixels; each picture as large as its place lets it be."""
    import PIL.Image

    from capivara_common.image_files import BadImage, decode_image

    sheet = PIL.Image.new("RGBA", (place[0] * across, place[1]))
    for number, data in enumerate(pictures):
        try:
            picture = decode_image({"bytes": data, "path": None}).convert("RGBA")
        except BadImage:
            continue
        scale = min((place[0] - 1) / picture.width, place[1] / picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        at = (number * place[0] + 1, place[1] - size[1])  # above the first letter of its caption
        sheet.paste(picture.resize(size, PIL.Image.Resampling.LANCZOS), at)
    return sheet


def _blocks(image: "PIL.Image.Image") -> str:
    """Two pixels a character: the letter's colour is that of the upper half, its ground's that of the lower one."""
    import numpy as np

    text = ""
    for upper, lower in np.asarray(image).reshape(-1, 2, image.width, 4):
        before = ""
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            drawn = top[3] > 127, bottom[3] > 127
            front, back = (top if drawn[0] else bottom), (bottom if all(drawn) else None)
            style = f"\x1b[0;38;2;{front[0]};{front[1]};{front[2]}" if any(drawn) else "\x1b[0"
            style += f";48;2;{back[0]};{back[1]};{back[2]}m" if back else "m"
            text += (style if style != before else "") + ("▀" if drawn[0] else "▄" if drawn[1] else " ")
            before = style
        text += "\x1b[0m\n"
    return text


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
        say(words("opening_most", most=MOST_OPENED))
    started = {}
    for path in paths[:MOST_OPENED]:
        try:
            open_query_picture(path)
            other = _format_unlike_name(path)
        except (BadImage, ValueError, OSError):
            say(words("not_opened", path=shown_path(path)))
            continue
        if other:
            say(words("not_opened_name", format=other, path=shown_path(path)))
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


def say(text: str) -> None:
    """Beside the results: what is no result goes to stderr."""
    print(text, file=sys.stderr)
