"""An index of which some files are missing or broken: which ones, and a view of the rest.

    fragments = damaged_fragments(table, table.schema.names)
    rest = without(fragments, table, "fotos.lance/pictures.lance")

The rows of a table lie in fragments, one data file each. A row's number has its fragment's in the upper half, and a
clause on row numbers alone opens no other fragment's file: so the broken ones are found, left out and removed.
"""

import hashlib
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from capivara_common.privacy import redact

FRAGMENT_BITS = 32
READ_ROWS = 2048  # at once
MAX_DETAIL = 200  # letters
WHOLE = b"LANC"  # how a record ends that was written whole
SET_ASIDE = ".damaged"  # appended to the name of a file

logger = logging.getLogger("capivara")


def clause_of(fragment: int, number: int = 1) -> str:
    """The clause for the rows of a fragment, or of a `number` of them from it on."""
    return f"(_rowid >= {fragment << FRAGMENT_BITS} AND _rowid < {(fragment + number) << FRAGMENT_BITS})"


def fragments_of(table: Any) -> list[int]:
    """Numbers of the fragments that have rows, found without opening their files."""
    found, last = [], 0
    left = table.count_rows()
    while left > 0:
        step = 1  # numbers have gaps: small ones where rows were removed, large ones after a compaction
        while not table.count_rows(clause_of(last, step)):
            last, step = last + step, step * 2
        while step > 1:
            step //= 2
            if not table.count_rows(clause_of(last, step)):
                last += step
        rows = table.count_rows(clause_of(last))
        found.append(last)
        last, left = last + 1, left - rows
    return found


def damaged_fragments(table: Any, columns: Sequence[str]) -> list[int]:
    """Numbers of the fragments in which one of some columns can't be read."""
    damaged = []
    for fragment in fragments_of(table):
        rows = table.search().where(clause_of(fragment)).select(["_rowid"]).to_arrow()["_rowid"].to_pylist()
        try:
            for start in range(0, len(rows), READ_ROWS):  # a query would open the other fragments' files, too
                table.take_row_ids(rows[start : start + READ_ROWS]).select(list(columns)).to_arrow()
        except (RuntimeError, OSError, ValueError):
            damaged.append(fragment)
    return damaged


def without(fragments: Sequence[int], table: Any, address: str, options: dict[str, str] | None) -> Any:
    """A view of a table without some fragments: a copy of its record of files alone, in a temporary folder.

    Args:
        fragments: numbers.
        table: of LanceDB.
        address: of the table's folder.
        options: of its storage.
    """
    import lancedb

    folder = tempfile.TemporaryDirectory(prefix="capivara-")
    connection = lancedb.connect(folder.name, storage_options=options)
    rest = connection.clone_table("rest", address, source_version=table.version)
    rest.capivara_folder = folder  # removed with the view
    remove(fragments, rest)
    return rest


def remove(fragments: Sequence[int], table: Any) -> None:
    """Remove the rows of some fragments, whose files are not opened for that."""
    for fragment in fragments:
        table.delete(clause_of(fragment))


def changed_index_files(folder: Path, digests: Mapping[str, str], known: dict[str, tuple[int, int]]) -> list[str]:
    """Files of the search indices of a table that are not as they were written.

    The engine has no checksums of them: zeros in one are an error, a panic, or pictures that are not found.

    Args:
        folder: of the table.
        digests: name of a file below the folder -> its digest.
        known: what was found to be whole before, which is not read again: name -> time and size; more is added.
    """
    changed = []
    for name, digest in digests.items():
        with suppress(FileNotFoundError):  # of an older version, whose files were removed
            state = (folder / name).stat()
            if known.get(name) == (state.st_mtime_ns, state.st_size):
                continue
            if index_digest(folder / name) == digest:
                known[name] = (state.st_mtime_ns, state.st_size)
            else:
                changed.append(name)
    return changed


def index_files(folder: Path) -> list[str]:
    """Names, below the folder of a table, of the files of its search indices."""
    return sorted(str(path.relative_to(folder)) for path in (folder / "_indices").rglob("*") if path.is_file())


def index_digest(path: Path) -> str:
    """BLAKE2b of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def empty_table(columns: pa.Schema) -> Any:
    """A table without rows, in place of one that can't be read."""
    import lancedb

    folder = tempfile.TemporaryDirectory(prefix="capivara-")
    table = lancedb.connect(folder.name).create_table("empty", schema=columns)
    table.capivara_folder = folder
    return table


def set_newest_aside(folder: Path) -> str | None:
    """Let the version before the newest one be the table's, where the record of the newest one can't be read.

    Such a record is written whole or not at all, so that a broken one is an accident of the disk. It keeps its content
    under another name.

    Returns:
        The record's name; None where there is no other version.
    """
    records = sorted((folder / "_versions").glob("*.manifest"), key=lambda path: (len(path.stem), path.stem))
    if len(records) < 2:
        return None
    newest = records[0]  # they are numbered downwards
    with suppress(OSError):
        if newest.read_bytes().endswith(WHOLE):  # of a newer LanceDB, or what fails is the disk: it is left alone
            return None
        newest.rename(newest.with_name(newest.name + SET_ASIDE))
        (folder / "_versions" / "latest_version_hint.json").unlink(missing_ok=True)
        return newest.name
    return None


def detail(error: Exception) -> str:
    """What an error says of the part that is damaged, in a line: its file where that is named."""
    text = " ".join(str(error).split())
    if named := re.search(r"\S+\.lance/((data|_deletions|_indices|_versions)/\S+?)[,:]?(\s|$)", text):
        return named[1]
    return redact(text)[:MAX_DETAIL]
