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
from pathlib import Path

from capivara_common.files import write_text

COLUMNS = ("id", "source", "translation")
MAX_NAMED = 5  # rows without a translation that a message names; it gives the number of all
BLANKS = " \xa0\u3000"  # a cell of these alone is empty to who sees it
SHOWN = 40  # letters of a sentence in an error
UNQUOTED = "Spreadsheets that quote a column change it: open the file without a quoting sign."
AS_THEY_WENT = "The rows must be those that were written: put back what is missing, sort them by the number in the id."
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

    Raises ValueError where the file is no such table, a row is not the one that stood there, or has another source, or
    rows are missing, or without a translation.
    """
    rows, ids = _rows(path), [sentence_id(number, text) for number, text in enumerate(sentences, 1)]
    for place, (line, row) in enumerate(rows):
        name, source = (ids[place], sentences[place]) if place < len(ids) else ("nothing", "")
        if row["id"] != name:
            said = f"{row['id'][:SHOWN]!r} in place of {name} ({source[:SHOWN]!r}). {AS_THEY_WENT}"
            raise ValueError(f"{path}, line {line}: {said}")
        if row.get("source", source) != source:
            said = f"the source {row['source'][:SHOWN]!r} in place of {source[:SHOWN]!r}. {UNQUOTED}"
            raise ValueError(f"{path}, line {line}: {said}")
    if len(rows) < len(ids):
        raise ValueError(f"{path} ends before {ids[len(rows)]} ({sentences[len(rows)][:SHOWN]!r}). {AS_THEY_WENT}")
    if missing := untranslated(path):
        raise ValueError(f"{path}: {missing} Fill their last column.")
    return {source: row["translation"] for source, (_, row) in zip(sentences, rows, strict=True)}


def untranslated(path: Path) -> str:
    """Which rows of a table have no translation yet, in a sentence; empty where all have one.

    Raises ValueError where the file is no such table.
    """
    rows = _rows(path)
    names = [f"line {line} ({row['id'][:SHOWN]})" for line, row in rows if not row["translation"].strip(BLANKS)]
    more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    said = f"{len(names)} of {len(rows)} sentences have no translation yet: {', '.join(names[:MAX_NAMED])}{more}."
    return said if names else ""


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line numbers, from 1, and their columns. Raises ValueError where the file or a line is broken."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is no UTF-8, line {line}: {error.reason}. Save it as UTF-8.") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    header = lines[0].split("\t")
    if len(set(header)) < len(header) or not {"id", "translation"} <= set(header):
        rule = "must name the columns id and translation, and may name source, apart by tabs"
        raise ValueError(f"The first line of {path} {rule}; it is {lines[0][:80]!r}.")
    rows = []
    for number, line in ((number, line) for number, line in enumerate(lines[1:], 2) if line):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns, the first line has {len(header)}.")
        try:
            rows.append((number, dict(zip(header, map(unescape, cells), strict=True))))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
    return rows
