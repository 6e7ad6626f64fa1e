r"""Sentences on their way to a translation made elsewhere, and back: a TSV that nothing inside a caption can break.

    id      source  translation
    s1_8d4a53c0     a cat\ton a mat

One line a sentence, UTF-8, and no quoting: a tab, a line break, a backslash and whatever an editor may take for one of
them is written as `\t`, `\n`, `\r`, `\\` or `\u` and four hex digits; so is the first sign of a sentence that a
spreadsheet would take for a formula. The id has the number of the sentence and a digest of its text, so that a
translation can't reach another sentence. Back come the columns id and translation, in the order that they went; a
source column is compared where there is one.
"""

import hashlib
import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from capivara_common.files import write_text

COLUMNS = ("id", "source", "translation")
MAX_NAMED = 5  # faults of a kind that an error names; it gives the number of all
BLANKS = " \xa0\u3000"  # a cell of these alone is empty to who sees it
SHOWN = 40  # letters of a sentence in an error
WAYS_OUT = {  # of faults
    "out of order": "sort the rows by the number in the id",
    "with another source": "spreadsheets that quote a column change it: open the file without a quoting sign",
    "missing": "put the rows back as they were",
    "without a translation": "fill their last column",
}
_SHORT = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_LONG = {short: text for text, short in _SHORT.items()}
# Line ends of other systems, marks that editors drop or take for the start of a file, and halves of a letter, which
# UTF-8 has no bytes for.
_RISKY = ("Cc", "Zl", "Zp", "Cs")
_FORMULA = "=+-@"  # a cell that begins so is computed, and may fetch an address or start a program


def escape(text: str) -> str:
    """`text` on one line, without a tab, no formula to a spreadsheet; `unescape` gives it back exactly."""

    def escaped(place: int, letter: str) -> str:
        risky = letter == "\ufeff" or unicodedata.category(letter) in _RISKY or (place == 0 and letter in _FORMULA)
        return _SHORT.get(letter) or (f"\\u{ord(letter):04x}" if risky else letter)  # all have at most four digits

    return "".join(itertools.starmap(escaped, enumerate(text)))


def unescape(text: str) -> str:
    """What `escape` was given. Raises ValueError where a backslash begins none of the five signs."""

    def unescaped(found: re.Match) -> str:
        if found[1]:
            return chr(int(found[1], 16))
        if found[0] not in _LONG:
            raise ValueError(rf"'\{found[2]}' is none of \t, \n, \r, \\ and \u with four hex digits")
        return _LONG[found[0]]

    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.?))", unescaped, text, flags=re.DOTALL)


def sentence_id(number: int, sentence: str) -> str:
    """Of the `number`-th sentence, from 1. It begins with a letter: spreadsheets make dates and times of the rest."""
    return f"s{number}_{hashlib.sha256(sentence.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def write_sentences(path: Path, sentences: list[str]) -> None:
    """The table to be translated, its last column empty."""
    lines = [f"{sentence_id(number, text)}\t{escape(text)}\t" for number, text in enumerate(sentences, 1)]
    write_text(path, "\n".join(["\t".join(COLUMNS), *lines]) + "\n")


def read_translations(path: Path, sentences: list[str]) -> dict[str, str]:
    """Sentence -> translation, of a table of `sentences` that came back: UTF-8, byte-order mark or not, any line ends.

    Raises:
        ValueError: the file is no such table, or rows of it are missing, doubled, unknown, out of order, of another
            source, without a translation, or broken: all are counted and the first of each kind are named.
    """
    numbers = {sentence_id(number, text): number for number, text in enumerate(sentences, 1)}
    faults: dict[str, list[str]] = defaultdict(list)
    lines: dict[str, int] = {}  # id -> its line
    found, before = {}, None
    for line, row in _rows(path, faults):
        name = row["id"]
        if name not in numbers:
            faults["unknown"].append(f"line {line} ({name[:SHOWN]!r})")
            continue
        if name in lines:
            faults["doubled"].append(f"line {line} ({name}, as line {lines[name]})")
            continue
        source = sentences[numbers[name] - 1]
        if row.get("source", source) != source:
            shown = f"{row['source'][:SHOWN]!r} for {source[:SHOWN]!r}"
            faults["with another source"].append(f"line {line} ({name}, {shown})")
        if before and numbers[name] < numbers[before]:
            faults["out of order"].append(f"line {line} ({name} after {before})")
        if not row["translation"].strip(BLANKS):
            faults["without a translation"].append(f"line {line} ({name})")
        lines[name], found[source], before = line, row["translation"], name
    if missing := [name for name in numbers if name not in lines]:
        faults["missing"] = [f"{name} ({sentences[numbers[name] - 1][:SHOWN]!r})" for name in missing]
    if faults:
        raise ValueError(f"{path} does not fit these captions. {_named(faults)}")
    return found


def untranslated(path: Path) -> str:
    """Which rows of a table have no translation yet, in a sentence; empty where all have one.

    Raises ValueError where the file is no such table.
    """
    rows = list(_rows(path, defaultdict(list)))  # what is broken is told when the table is used
    names = [f"line {line} ({row['id'][:SHOWN]})" for line, row in rows if not row["translation"].strip(BLANKS)]
    return _named({f"of {len(rows)} sentences have no translation yet": names}) if names else ""


def _rows(path: Path, faults: dict[str, list[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers, from 1, and their columns; lines that can't be read are added to `faults`."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is no UTF-8, line {line}: {error.reason}. Save it as UTF-8.") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    header = lines[0].split("\t")
    if len(set(header)) < len(header) or not {"id", "translation"} <= set(header):
        raise ValueError(
            f"The first line of {path} must name the columns id and translation, and may name source, apart by tabs; "
            f"it is {lines[0][:80]!r}."
        )
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        try:
            if len(cells) == len(header):
                yield number, dict(zip(header, map(unescape, cells), strict=True))
            elif line:
                faults["broken"].append(f"line {number} ({len(cells)} columns, the first line has {len(header)})")
        except ValueError as error:
            faults["broken"].append(f"line {number} ({error})")


def _named(faults: dict[str, list[str]]) -> str:
    """Of each kind the number, and the first ones."""
    sentences = []
    for kind, names in faults.items():
        more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        hint = f" ({WAYS_OUT[kind]})" if kind in WAYS_OUT else ""
        sentences.append(f"{len(names)} {kind}: {', '.join(names[:MAX_NAMED])}{more}{hint}.")
    return " ".join(sentences)
