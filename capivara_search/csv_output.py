"""CSV output of the search, with cells that are safe to open in a terminal and in a spreadsheet.

Example:
    write_csv(sys.stdout, ["path", "score"], [{"path": "praia.jpg", "score": 0.31}])
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TextIO

from capivara_common.privacy import escape_control_characters

# A spreadsheet program treats a cell that begins with one of these characters as a formula, for example "=1+1". A
# formula in a text from somebody else can do harm. A single quote at the beginning makes the cell plain text.
FORMULA_PATTERN = r"^([=+\-@\t\r])"


def escape_csv_cell(text: str) -> str:
    """Escape control characters and spreadsheet formulas in the text of a CSV cell.

    Args:
        text: Content of the cell.

    Returns:
        The safe text. Control characters are escaped, so that a terminal does not act on them. If a spreadsheet would
        compute the text as a formula, a single quote is added at the beginning.
    """
    return re.sub(FORMULA_PATTERN, r"'\1", escape_control_characters(text))


def write_csv(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as CSV with a header.

    Texts are made safe for terminals and spreadsheets by `escape_csv_cell`. Times are written in ISO 8601.

    Args:
        file: Open text file.
        columns: Names of the columns, in order.
        rows: Dictionaries `{name of a column: value}`. Keys that are not in `columns` are ignored.

    Returns:
        Number of rows that were written, without the header.
    """
    writer, row_count = csv.writer(file, lineterminator="\n"), 0
    writer.writerow(map(escape_csv_cell, columns))
    for row in rows:
        row_count += 1
        cells = [row[name].isoformat() if isinstance(row[name], datetime) else row[name] for name in columns]
        writer.writerow([escape_csv_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    # If the output goes through a pipe to a program that has already ended, such as `head`, this flush raises an error,
    # and click then ends the command silently. Without the flush, Python would print the error when it exits.
    file.flush()
    return row_count
