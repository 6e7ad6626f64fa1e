"""Write and read translation tables: TSV files of sentences that people, or another program, translate.

`write_blank_translation_table` writes the sentences, with an empty last column for the translations. After people have
filled this column, `TranslationTable` reads the table, and checks that each translation still belongs to its sentence.
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

# Column names of a translation table, which people fill. In the first line of a table, a name can be followed by `:`
# and a value, for example `translation:pt`.
TABLE_COLUMNS = ("id", "source", "translation")
MAX_NAMED_ROWS = 5  # a message lists at most this many rows without a translation
BLANK_CHARACTERS = " \xa0\u3000"  # a cell with only these characters looks empty
MAX_QUOTED_CHARACTERS = 40  # largest number of characters of a sentence in an error message
UNCHANGED_ROWS_HINT = (
    "The table must have exactly the rows that were written, in the same order. Restore missing rows, and sort by "
    "the number in the id. If you use a spreadsheet, import the file without a text delimiter (quote character); "
    "otherwise, the spreadsheet changes quotes in the source column."
)
# Characters that are escaped in addition to the escapes of JSON:
# - `=`, `+`, `@` and `-` at the start of a cell, because a spreadsheet would run the cell as a formula;
# - control characters and line separators, because some programs take them for the end of a line;
# - byte-order marks, because editors remove them;
# - lone surrogates, because UTF-8 can't represent them.
UNSAFE_CELL_RE = re.compile("^[=+@-]|[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")


def escape_cell(text: str) -> str:
    """Escape a text so that it can be written to a cell of a translation table, which is a TSV file.

    Tabs and line breaks are written as JSON escapes. A first character such as `=` is escaped, too, because a
    spreadsheet would read the cell as a formula. Quotes are not escaped.
    """
    text = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    # Four hex digits are enough, because `UNSAFE_CELL_RE` matches only characters up to U+FFFF.
    return UNSAFE_CELL_RE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def unescape_cell(text: str) -> str:
    """Return the original text of a table cell that `escape_cell` has escaped.

    Raises ValueError if a backslash in the cell does not begin a JSON escape.
    """
    try:
        return json.loads('"' + text.replace('"', '\\"') + '"', strict=False)
    except ValueError as error:
        raise ValueError(
            f"{text[:MAX_QUOTED_CHARACTERS]!r} has a backslash that does not begin a JSON escape; double the backslash"
        ) from error


def _sentence_id(number: int, sentence: str) -> str:
    """Return the id of a sentence in a table, for example "s1_2cf24dba".

    The id contains the number of the sentence and the first 8 hex digits of its SHA-256 digest. It begins with a
    letter, because spreadsheets would convert some other ids to dates or times.

    Args:
        number: Number of the sentence in the table, counted from 1.
        sentence: The sentence.
    """
    return f"s{number}_{hashlib.sha256(sentence.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def write_blank_translation_table(path: Path, sentences: list[str], header: Sequence[str] = TABLE_COLUMNS) -> None:
    """Write a table of sentences with an empty last column, in which people will write the translations.

    The file is UTF-8 text with one sentence per line, and columns separated by tabs, without quoting.

    Args:
        path: TSV file to write.
        sentences: Sentences, in the order of the lines.
        header: Column names for the first line. Each name can be followed by `:` and a value, as in "translation:pt".
    """
    # The id contains a hash of the sentence, which shows if a translation stands next to the wrong sentence.
    lines = [f"{_sentence_id(number, text)}\t{escape_cell(text)}\t" for number, text in enumerate(sentences, 1)]
    write_text(path, "\n".join(["\t".join(header), *lines]) + "\n")


class TranslationTable:
    """A table of sentences and the translations that people have written next to them, read from a TSV file.

    Args:
        path: TSV file in UTF-8, with or without a byte-order mark. Any line endings are accepted.

    Attributes:
        path: TSV file.
        header: The first line as a dict `{column name: value}`. For example, the titles "id" and "translation:pt"
            become `{"id": "", "translation": "pt"}`.
        rows: List with a dict `{column name: text}` for each row.

    Raises:
        ValueError: If the file is not a translation table.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            table = pd.read_csv(
                path, sep="\t", dtype=str, quoting=csv.QUOTE_NONE, na_filter=False, encoding="utf-8-sig"
            )
            stated = {name.strip(): text.strip() for name, _, text in (str(column).partition(":") for column in table)}
            table.columns = list(stated) if len(stated) == len(table.columns) else table.columns
            records = table.fillna("").to_dict("records")
            self.rows = [{name: unescape_cell(cell) for name, cell in record.items()} for record in records]
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} can't be read: {reason}. It must be UTF-8, with columns separated by tabs."
            ) from error
        if not {"id", "translation"} <= set(table):
            raise ValueError(
                f"The first line of {path} must name the columns id, translation and optionally source, separated by "
                f"tabs, got {' '.join(map(str, table))[:80]!r}."
            )
        self.header = stated

    def describe_untranslated_rows(self) -> str:
        """Describe how many rows have no translation yet, and name the first of these rows.

        Returns "" if all rows have a translation.
        """
        names = [
            f"line {line} ({row['id'][:MAX_QUOTED_CHARACTERS]})"
            for line, row in enumerate(self.rows, 2)
            if not row["translation"].strip(BLANK_CHARACTERS)
        ]
        more = f", and {len(names) - MAX_NAMED_ROWS} more" if len(names) > MAX_NAMED_ROWS else ""
        shown = ", ".join(names[:MAX_NAMED_ROWS]) + more
        return f"{len(names)} of {len(self.rows)} sentences have no translation yet: {shown}." if names else ""

    def check_sentences(self, sentences: list[str]) -> None:
        """Check that the table has exactly the given sentences, in the same order.

        If the table has no column `source`, only the ids of the rows are compared, which contain a digest of the
        sentence.

        Args:
            sentences: Sentences that the table must have.

        Raises:
            ValueError: If a row is missing, added or changed. The message names the first such line.
        """
        for number, (row, text) in enumerate(itertools.zip_longest(self.rows, sentences), 1):
            expected = {"id": _sentence_id(number, text), "source": text} if text is not None else {}
            if row is None or not expected or any(row.get(name, value) != value for name, value in expected.items()):
                raise ValueError(
                    f"{self.path}, line {number + 1}: expected {_describe_cells(expected)}, got {_describe_cells(row)}."
                    f" {UNCHANGED_ROWS_HINT}"
                )

    def translations(self, sentences: list[str]) -> dict[str, str]:
        """Return the translations as a dict `{sentence: translation}`.

        Args:
            sentences: The sentences that were written to the table, in the same order.

        Raises:
            ValueError: If the rows do not match the sentences, or a sentence has no translation.
        """
        self.check_sentences(sentences)
        if missing := self.describe_untranslated_rows():
            raise ValueError(f"{self.path}: {missing} Fill the last column of these lines.")
        return {source: row["translation"] for source, row in zip(sentences, self.rows, strict=True)}


def _describe_cells(row: dict[str, str] | None) -> str:
    """Return the id of a table row and the beginning of its sentence, for error messages.

    Returns "no row" if `row` is None or empty.
    """
    return f"{row['id']} ({row.get('source', '')[:MAX_QUOTED_CHARACTERS]!r})" if row else "no row"
