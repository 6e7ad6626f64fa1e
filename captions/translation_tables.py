"""Translation tables: TSV files of sentences that people, or another program, translate.

`write_translation_table` writes the sentences with an empty last column. `read_translation_table` reads the filled
table, and checks that each translation still belongs to its sentence.
"""

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from capivara_common.files import write_text

# In the first line of a table, each name is followed by `:` and a value, see `TranslateArguments.table_header`.
TABLE_COLUMNS = ("id", "source", "translation")
MAX_NAMED_ROWS = 5  # rows without a translation that a message names
BLANK_CHARACTERS = " \xa0\u3000"  # a cell with only these characters looks empty
MAX_QUOTED_CHARACTERS = 40  # characters of a sentence that an error quotes
UNCHANGED_ROWS_HINT = (
    "All rows must be the ones that were written, in the same order. Restore missing rows, sort by the number in the "
    "id, and import the file into a spreadsheet without a text delimiter, which would change the source column."
)
# Characters to escape in addition to those of JSON: the start of a spreadsheet formula, which could open a URL or start
# a program; line separators of other systems; byte-order marks, which editors drop; lone surrogates, which are not
# UTF-8.
UNSAFE_CELL_RE = re.compile("^[=+@-]|[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")


def escape_cell(text: str) -> str:
    """Escape a text like a JSON string, but with bare quotes.

    The result has no tab and no line break, and a spreadsheet does not take it for a formula.
    """
    text = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    # All these characters have at most four hex digits.
    return UNSAFE_CELL_RE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def unescape_cell(text: str) -> str:
    """Undo `escape_cell`. Raises ValueError if a backslash does not begin a JSON escape."""
    try:
        return json.loads('"' + text.replace('"', '\\"') + '"', strict=False)
    except ValueError as error:
        raise ValueError(
            f"{text[:MAX_QUOTED_CHARACTERS]!r} has a backslash that does not begin a JSON escape; write it twice"
        ) from error


def sentence_id(number: int, sentence: str) -> str:
    """Return the id of a sentence: its number, counted from 1, and the start of its SHA-256 digest.

    The id begins with a letter, because spreadsheets convert other values to dates and times.
    """
    return f"s{number}_{hashlib.sha256(sentence.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def write_translation_table(path: Path, sentences: list[str], header: Sequence[str] = TABLE_COLUMNS) -> None:
    """Write a table to be translated: UTF-8, one sentence per line, columns separated by tabs, without quoting.

    The last column is empty. The digests in the ids prevent that a translation is assigned to another sentence.

    Args:
        path: TSV file to write.
        sentences: The sentences.
        header: Names of the columns.
    """
    lines = [f"{sentence_id(number, text)}\t{escape_cell(text)}\t" for number, text in enumerate(sentences, 1)]
    write_text(path, "\n".join(["\t".join(header), *lines]) + "\n")


def read_translation_table(path: Path, sentences: list[str]) -> dict[str, str]:
    """Read a filled table: UTF-8 with or without byte-order mark, with any line endings.

    Args:
        path: TSV file.
        sentences: The sentences that were written to it.

    Returns:
        The translation of each sentence.

    Raises:
        ValueError: If the rows do not match the sentences, or a sentence has no translation.
    """
    check_table_rows(path, sentences)
    if missing := describe_untranslated(path):
        raise ValueError(f"{path}: {missing} Fill the last column of these lines.")
    return {source: row["translation"] for source, row in zip(sentences, read_table(path)[1], strict=True)}


def check_table_rows(path: Path, sentences: list[str]) -> None:
    """Raise ValueError unless the table has exactly these sentences, in the same order, with their ids."""
    _, rows = read_table(path)
    for number, (row, text) in enumerate(itertools.zip_longest(rows, sentences), 1):
        expected = {"id": sentence_id(number, text), "source": text} if text is not None else {}
        if row is None or not expected or any(row.get(name, value) != value for name, value in expected.items()):
            raise ValueError(
                f"{path}, line {number + 1}: expected {_describe_cells(expected)}, got {_describe_cells(row)}. "
                f"{UNCHANGED_ROWS_HINT}"
            )


def _describe_cells(row: dict[str, str] | None) -> str:
    """Return the id and the beginning of the source of a row, for messages."""
    return f"{row['id']} ({row.get('source', '')[:MAX_QUOTED_CHARACTERS]!r})" if row else "no row"


def describe_untranslated(path: Path) -> str:
    """Describe which rows of a table have no translation yet, in one sentence; empty if all have one.

    Raises ValueError if the file is not a translation table.
    """
    _, rows = read_table(path)
    names = [
        f"line {line} ({row['id'][:MAX_QUOTED_CHARACTERS]})"
        for line, row in enumerate(rows, 2)
        if not row["translation"].strip(BLANK_CHARACTERS)
    ]
    more = f", and {len(names) - MAX_NAMED_ROWS} more" if len(names) > MAX_NAMED_ROWS else ""
    shown = ", ".join(names[:MAX_NAMED_ROWS]) + more
    return f"{len(names)} of {len(rows)} sentences have no translation yet: {shown}." if names else ""


def read_table(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the values that the first line states for the columns, and the rows.

    Raises ValueError if the file is not a table.
    """
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, quoting=csv.QUOTE_NONE, na_filter=False, encoding="utf-8-sig")
        stated = {name.strip(): text.strip() for name, _, text in (str(column).partition(":") for column in table)}
        table.columns = list(stated) if len(stated) == len(table.columns) else table.columns
        rows = [
            {name: unescape_cell(cell) for name, cell in row.items()} for row in table.fillna("").to_dict("records")
        ]
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} can't be read: {reason}. It must be UTF-8, with columns separated by tabs."
        ) from error
    if not {"id", "translation"} <= set(table):
        raise ValueError(
            f"The first line of {path} must name the columns id, translation and optionally source, separated by tabs, "
            f"got {' '.join(map(str, table))[:80]!r}."
        )
    return stated, rows
