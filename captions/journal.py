"""Append JSON records to a journal, a file with one record per line, so that a killed process loses no record."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_to_journal(path: Path, record: dict[str, Any]) -> None:
    """Append a record to a journal, a file of JSON records with one record per line.

    The record is not lost if the process is killed, only if the machine crashes. Only one process may append to a
    journal.

    Args:
        path: Path of the journal. It is created if it does not exist.
        record: Dict of JSON values.

    Raises:
        OSError: If the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        # Begin with a line break, because the file may end with the incomplete line of an interrupted write. If the new
        # record were added to this line, it could not be parsed.
        file.write(b"\n" + json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the JSON records of a journal, a file that `append_to_journal` has written.

    Incomplete lines are skipped. A process leaves them if it is killed while it writes. If the file does not exist,
    there are no records.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
