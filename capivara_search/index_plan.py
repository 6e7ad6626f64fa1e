"""What an index has to read of its folders: files and rows compared, before anything is read or written.

    plan = make_plan(table, model.image_digest, [Path("/home/maria/Fotos")])
    print(len(plan.files), "to read,", len(plan.gone), "to remove")

A file whose size and time are those of its row is not read again, nor is one that has not changed since it was no
picture that can be read; what only could not be opened is tried again.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

from capivara_common.cli import coded
from capivara_common.files import read_json, write_json
from capivara_search.columns import LEFT_OUT, quoted, within
from capivara_search.picture_files import PASSING, FileState, find_pictures
from capivara_search.results import LeftOut
from capivara_search.table import PictureTable

logger = logging.getLogger("capivara")


def asked_folders(table: PictureTable) -> dict[str, str]:
    """Folder -> its real path, of those that `add` was told of on this machine.

    What an index says of itself may be somebody else's word: "/" would make every picture of the machine one of its.
    """
    with suppress(OSError, ValueError):
        asked = read_json(_record(table), folders=dict)["folders"]
        return {folder: real for folder, real in asked.items() if isinstance(real, str)}
    return {}


def note_asked(table: PictureTable, folders: Sequence[Path]) -> None:
    """Write down that `add` was told of folders, and where they lie."""
    asked = asked_folders(table) | {str(folder): os.path.realpath(folder) for folder in folders}
    try:
        write_json(_record(table), {"index": table.where, "folders": asked})
    except OSError as error:
        logger.warning("The page will show thumbnails alone: %s can't be written: %s", _record(table), error)


def _record(table: PictureTable) -> Path:
    """Not beside the index, which may have come whole from elsewhere, nor in a cache, which may be emptied."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    where = table.where if table.remote else os.path.realpath(table.where)
    return Path(state, "capivara", "folders", f"{blake2b(where.encode(), digest_size=16).hexdigest()}.json")


class KnownRows:
    """What the table says of some paths, held in little memory: path -> (size, mtime_ns, digest, is_current).

    `is_current`: the vector is of the model in use.
    """

    def __init__(self, rows: pa.Table, image_digest: str):
        self.sizes, self.times = rows["size"].to_numpy(), rows["mtime_ns"].to_numpy()
        self.digests = rows["digest"].combine_chunks()
        self.current = np.equal(rows["model"].to_numpy(zero_copy_only=False), image_digest)
        self.places = {path: place for place, path in enumerate(rows["path"].to_pylist())}

    def __getitem__(self, path: str) -> tuple[int, int, str, bool] | None:
        place = self.places.get(path)
        if place is None:
            return None
        digest = self.digests[place].as_py()
        return int(self.sizes[place]), int(self.times[place]), digest, bool(self.current[place])

    def is_as(self, file: FileState) -> bool:
        """Whether a file has the size and time that its row says."""
        place = self.places.get(file.path)
        return place is not None and (self.sizes[place], self.times[place]) == (file.size, file.mtime_ns)

    def is_done(self, file: FileState) -> bool:
        """Whether a file is as its row says, and its vector is of the model in use."""
        return self.is_as(file) and bool(self.current[self.places[file.path]])


@dataclass
class Plan:
    """What there is to do.

    Attributes:
        folders: that were named.
        roots: real paths of these and of those that `add` was told of before; nothing is read outside of them.
        files: to be read, new and changed ones, and those whose vector is of another model.
        known: what the table says of the folders.
        gone: paths of rows whose file is no longer there.
        unchanged: number of rows that stay as they are.
        unseen: files and folders that could not even be looked at, and why.
        broken: files (path, size, mtime_ns) that could not be read an earlier time, and are as they were.
    """

    folders: Sequence[Path]
    roots: Sequence[str]
    files: list[FileState]
    known: KnownRows
    gone: list[str]
    unchanged: int
    unseen: list[LeftOut]
    broken: set[tuple[str, int, int]]


def make_plan(table: PictureTable, image_digest: str, folders: Sequence[Path], share: tuple[int, int] = (0, 1)) -> Plan:
    """Compare folders with the table.

    Args:
        table: of the index.
        image_digest: of the model in use.
        folders: absolute paths.
        share: rank and number of those who share the files among them.

    Raises:
        ValueError: a folder is not there, or holds no picture: nothing is removed for that.
    """
    try:
        found, unseen = find_pictures(folders)
    except ValueError as error:
        if kept := table.count(within(*folders)):
            text = "{error} The index keeps its {kept} pictures of these folders; `forget` removes them."
            values = {"error": error, "kept": kept} | getattr(error, "values", {})
            raise coded(ValueError, getattr(error, "code", None), text, **values) from error
        raise
    clause = within(*folders)
    columns = ["path", "size", "mtime_ns", "digest", "model"]
    known = KnownRows(table.rows(columns, f"{clause} OR model != {quoted(image_digest)}"), image_digest)
    left_out = table.rows([*columns[:3], "reason"], clause, LEFT_OUT).to_pylist()
    broken = {tuple(row.values())[:3] for row in left_out if not row["reason"].startswith(PASSING)}
    files = [file for file in found if not known.is_done(file)]
    unchanged = len(found) - len(files)
    as_before = {state for file in files if (state := (file.path, file.size, file.mtime_ns)) in broken}
    files = [file for file in files if (file.path, file.size, file.mtime_ns) not in as_before]
    asked = asked_folders(table)
    gone, elsewhere = _without_file(known, folders, asked, found, unseen)
    files = [file for file in files + elsewhere if is_of_share(file.path, share)]
    roots = [*map(os.path.realpath, folders), *asked.values()]
    return Plan(folders, roots, files, known, gone, unchanged, unseen, as_before)


def _without_file(
    known: KnownRows,
    folders: Sequence[Path],
    asked: Iterable[str],
    found: Sequence[FileState],
    unseen: Sequence[LeftOut],
) -> tuple[list[str], list[FileState]]:
    """Rows whose file was not found: paths that are gone from the folders, and files of other folders.

    What lies in a folder that can't be read may be there. The files of other folders are those whose vectors are of
    another model; where one is not there, or `add` was not told of its folder, its row waits for its folder's turn.
    """
    there = {file.path for file in found} | {one.path for one in unseen}
    inside, others = (tuple(str(one).rstrip(os.sep) + os.sep for one in group) for group in (folders, asked))
    unread = tuple(one.path + os.sep for one in unseen)
    gone, elsewhere = [], []
    for path in known.places:
        if path in there or path.startswith(unread):
            continue
        if path.startswith(inside):
            gone.append(path)
            continue
        if not path.startswith(others):
            continue
        with suppress(OSError):
            state = os.stat(path)
            elsewhere.append(FileState(path, state.st_size, state.st_mtime_ns))
    return gone, elsewhere


def is_of_share(path: str, share: tuple[int, int]) -> bool:
    """Whether a file is that of one rank; by its name, so that all ranks agree whatever each of them sees."""
    rank, number = share
    return number == 1 or int.from_bytes(blake2b(path.encode(), digest_size=8).digest(), "big") % number == rank
