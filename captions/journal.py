"""Append JSON records to a journal, a file with one record per line. If the process is killed, no record is lost."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON records, one per line. If the process that appends them is killed, the appended records survive.

    Only one process appends records to a journal. The file is created when the first record is appended.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, None

    def append(self, record: dict[str, Any]) -> None:
        """Append a record to the file.

        The record is written at once, so it survives if the process is killed. Only a crash of the machine can lose it.
        Raises OSError if the disk is full.

        Args:
            record: Dict of JSON values.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        # Begin with a line break, because the file may end with an incomplete line, which an interrupted write has
        # left. On the same line as this fragment, the new record could not be read.
        self._file.write(b"\n" + json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def remove(self) -> None:
        """Delete the file. Call this method after the records have been stored elsewhere."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.path.unlink(missing_ok=True)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the JSON records of a journal, a file that `Journal` has written.

    Incomplete lines, which killed processes leave, are skipped. If the file does not exist, there are no records.
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
