"""What a terminal is shown: words in two languages, texts that can do it no harm, tables, and pictures where it can.

    from capivara_search.terminal import Words, contact_sheet, screen

    words = Words("pt")
    print(words.count("new", 213))  # 213 imagens novas
    print(contact_sheet(thumbnails, ["1 praia.jpg", "2 mar.jpg"], screen(sys.stdout)), end="")

Names of files are other people's: whatever in them a terminal would obey is shown as an escape such as `\\x1b`.
"""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import quote

if TYPE_CHECKING:
    import PIL.Image

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
TILE_COLUMNS = 34  # least width of a picture: two pixels of a block are one character
TILE_SHAPE = 0.375  # rows by columns: 4 by 3, of characters that are twice as high as wide


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

    def of_library(self, text: str) -> tuple[str, int | None]:
        """What the library says in English, harmless and in one line; in the language where `words.yaml` has it.

        The second is the exit code of the error, where it has one of its own.
        """
        text = harmless(" ".join(text.split()))
        for key, entry in self._texts.items():
            if key.startswith("library.") and (found := re.search(entry["match"], text)):
                code = int(entry["code"]) if "code" in entry else None
                return self(key, **found.groupdict()) if self.language in entry else text, code
        return text, None

    def reason(self, text: str) -> str:
        """Why a file was left out, harmless: `reason: detail`, of which other languages have the reason alone."""
        key = f"reason.{text.partition(':')[0]}"
        return self(key) if self.language != "en" and self.has(key) else harmless(text)

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


def harmless(text: str) -> str:
    """A text of somebody else's, in one line, with nothing in it that a terminal obeys."""
    return UNSAFE.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as Python keeps it in a name
        code -= 0xDC00
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def text_cell(text: str) -> str:
    """A text of somebody else's as a cell of CSV: harmless to a terminal, and to a spreadsheet."""
    return re.sub(FORMULA, r"'\1", harmless(text))


def shown_path(path: str) -> str:
    """A path from the current folder where it lies below it, else from ~, else whole; harmless to a terminal."""
    for folder, name in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        if folder != "/" and path.startswith(folder.rstrip("/") + "/"):
            return harmless(name + path[len(folder.rstrip("/")) + 1 :])
    return harmless(path)


def width(text: str) -> int:
    """Columns that a harmless text takes: none for a combining mark, two for a wide letter."""
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
    return f"\x1b]8;;file://{quote(path)}\x1b\\{text}\x1b]8;;\x1b\\" if harmless(path) == path else text


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
    import shutil

    colours = stream.isatty() and environment.get("TERM", "dumb") != "dumb"
    colours = colours and environment.get("COLORTERM", "") in ("truecolor", "24bit")
    shown = colours and "NO_COLOR" not in environment and "utf" in (stream.encoding or "").lower()
    return Screen(pictures == "blocks" or (pictures == "auto" and shown), *shutil.get_terminal_size(), links=colours)


def contact_sheet(pictures: Sequence[bytes | None], captions: Sequence[str], screen: Screen, lines: int = 10**9) -> str:
    """Pictures side by side in rows, each above its caption, as text for the terminal; empty where it shows none.

    Args:
        pictures: files of small pictures; one that is None or broken leaves its place empty.
        captions: one for each; harmless.
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
