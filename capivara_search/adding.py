"""Folders into the table of an index: what is new is embedded, what is known stays, what is gone goes.

added = add_folders(table, model, [Path("/home/maria/Fotos")])

Rows are written in commits of `COMMIT_ROWS` pictures or `COMMIT_S` seconds, so that a kill loses no more than that.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from capivara_search.common.image_files import DECODERS, BadImage
from capivara_search.picture_files import FileState, Picture, find_pictures, read_bytes_digest, read_picture
from capivara_search.results import Added, LeftOut
from capivara_search.table import LEFT_OUT, LEFT_OUT_SCHEMA, PictureTable, among, schema, vector_column, within

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

COMMIT_ROWS = 400  # pictures; with their thumbnails some 5 MB
COMMIT_S = 20.0  # seconds
FOLDER_KEY = "folder:"  # of the folders in `about`

logger = logging.getLogger("capivara")


@dataclass(frozen=True)
class Known:
    """What the table says of a path."""

    size: int
    mtime_ns: int
    digest: str
    current: bool  # whether the vector is of the model in use


@dataclass
class Plan:
    """What there is to do.

    Attributes:
        files: to be read, new and changed ones, and those whose vector is of another model.
        known: path -> row, of the folders.
        gone: paths of rows whose file is no longer there.
        unchanged: number of rows that stay as they are.
        left_out: what could not even be looked at.
    """

    files: list[FileState] = field(default_factory=list)
    known: dict[str, Known] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    unchanged: int = 0
    left_out: list[LeftOut] = field(default_factory=list)


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
    found, left_out = find_pictures(folders)
    clause = " OR ".join(within(folder) for folder in folders)
    rows = table.rows(["path", "size", "mtime_ns", "digest", "model"], clause)
    plan = Plan(known={row["path"]: _known(row, image_digest) for row in rows.to_pylist()}, left_out=left_out)
    skipped = {(row["path"], row["size"], row["mtime_ns"]) for row in table.rows(["*"], clause, LEFT_OUT).to_pylist()}
    for file in found:
        known = plan.known.get(file.path)
        if known and known.current and (known.size, known.mtime_ns) == (file.size, file.mtime_ns):
            plan.unchanged += 1
        elif (file.path, file.size, file.mtime_ns) not in skipped and is_of_share(file.path, share):
            plan.files.append(file)
    there = {file.path for file in found}
    unread = tuple(one.path + os.sep for one in left_out)
    shut = {one.path for one in left_out}
    plan.gone = [p for p in plan.known if p not in there and p not in shut and not p.startswith(unread)]
    return plan


def is_of_share(path: str, share: tuple[int, int]) -> bool:
    """Whether a file is that of one rank; by its name, so that all ranks agree whatever they see."""
    rank, number = share
    return number == 1 or int.from_bytes(blake2b(path.encode(), digest_size=8).digest()) % number == rank


def _known(row: dict[str, Any], image_digest: str) -> Known:
    return Known(row["size"], row["mtime_ns"], row["digest"], row["model"] == image_digest)


class Writer:
    """Collects rows, and writes them in commits."""

    def __init__(self, table: PictureTable, model: "SearchModel"):
        self.table, self.model = table, model
        self.schema = table.pictures.schema
        self.rows: dict[str, dict[str, Any]] = {}  # by digest, for copies
        self.left_out: list[dict[str, Any]] = []
        self.since = time.monotonic()

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, as `row_of` makes it."""
        self.rows[row["path"]] = row
        self.write_when_due()

    def leave_out(self, file: FileState, reason: str) -> None:
        """Note a file that can't be read; a row that it has had is no longer true."""
        self.left_out.append({"path": file.path, "size": file.size, "mtime_ns": file.mtime_ns, "reason": reason})
        self.write_when_due()

    def write_when_due(self) -> None:
        """Write when there is enough, or it is long ago."""
        if len(self.rows) + len(self.left_out) >= COMMIT_ROWS or time.monotonic() - self.since > COMMIT_S:
            self.write()

    def write(self) -> None:
        """Write what was collected."""
        if self.rows:
            self.table.merge(to_arrow(list(self.rows.values()), self.schema, self.model.width))
        if self.left_out:
            self.table.merge(pa.Table.from_pylist(self.left_out, LEFT_OUT_SCHEMA), LEFT_OUT)
            self.table.remove([row["path"] for row in self.left_out])
        self.rows, self.left_out, self.since = {}, [], time.monotonic()


def to_arrow(rows: Sequence[dict[str, Any]], columns: pa.Schema, width: int) -> pa.Table:
    """Rows whose `vector` is an array, as a table of an index."""
    arrays = []
    for one in columns:
        if one.name == vector_column(width):
            flat = np.concatenate([row["vector"] for row in rows]).astype(np.float16)
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), width))
        else:
            arrays.append(pa.array([row.get(one.name) for row in rows], one.type))
    return pa.Table.from_arrays(arrays, schema=columns)


def row_of(picture: Picture, vector: np.ndarray, image_digest: str) -> dict[str, Any]:
    """The row of a picture and its vector."""
    file = picture.file
    return {
        "path": file.path,
        "size": file.size,
        "mtime_ns": file.mtime_ns,
        "digest": picture.digest,
        "width": picture.width,
        "height": picture.height,
        "taken": picture.taken,
        "latitude": picture.latitude,
        "longitude": picture.longitude,
        "thumbnail": picture.thumbnail,
        "model": image_digest,
        "vector": vector,
    }


class Adding:
    """One run of `add`, or one worker's share of it."""

    def __init__(
        self,
        table: PictureTable,
        model: "SearchModel",
        plan: Plan,
        exact: bool = False,
        batch_size: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        self.table, self.model, self.plan, self.exact, self.batch_size = table, model, plan, exact, batch_size
        self.on_progress = on_progress or (lambda done, total: None)
        self.added = Added(unchanged=plan.unchanged)
        self.writer = Writer(table, model)
        self.gone = {plan.known[path].digest: path for path in plan.gone}
        self.done = 0
        self.sizes = frozenset(table.rows(["size"])["size"].unique().to_pylist())

    def run(self) -> Added:
        """Read, embed and write the files of the plan."""
        with ThreadPoolExecutor(DECODERS) as threads:
            try:
                files, waiting = self._unknown(threads), []
                while True:
                    for file in islice(files, 2 * self.batch_size - len(waiting)):
                        waiting.append((file, threads.submit(read_picture, file, self.model.side, self.exact)))
                    if not waiting:
                        break
                    self._embed(waiting[: self.batch_size])
                    del waiting[: self.batch_size]
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
        self.writer.write()
        return self.added

    def _step(self, number: int = 1) -> None:
        self.done += number
        self.on_progress(self.done, len(self.plan.files))

    def _unknown(self, threads: ThreadPoolExecutor) -> Iterator[FileState]:
        """The files that must be decoded; those whose content is in the table get their rows on the way."""
        for start in range(0, len(self.plan.files), COMMIT_ROWS):
            group = self.plan.files[start : start + COMMIT_ROWS]
            maybe = [file for file in group if file.size in self.sizes]  # another size is another content
            digests = dict(zip(maybe, threads.map(_digest, maybe), strict=True))
            kept = self._kept({digest for digest in digests.values() if digest})
            for file in group:
                row = kept.get(digests.get(file))
                if row is None:
                    yield file
                else:
                    self._count(file.path, row["digest"])
                    self.writer.put({**row, "path": file.path, "size": file.size, "mtime_ns": file.mtime_ns})
                    self._step()

    def _kept(self, digests: set[str]) -> dict[str | None, dict[str, Any]]:
        """Digest -> a row of this model's with that content."""
        if not digests:
            return {}
        rows = self.table.rows(self.table.pictures.schema.names, among("digest", sorted(digests))).to_pylist()
        column = vector_column(self.model.width)
        return {
            row["digest"]: {**row, "vector": np.asarray(row[column], np.float16)}
            for row in rows
            if row["model"] == self.model.image_digest
        }

    def _embed(self, read: Sequence[tuple[FileState, "Future[Picture]"]]) -> None:
        pictures: list[Picture] = []
        for file, future in read:
            try:
                pictures.append(future.result())
            except FileNotFoundError:  # gone since it was found; the next run sees that
                self._step()
            except (BadImage, OSError) as error:
                self.writer.leave_out(file, str(error))
                self._step()
        distinct = {picture.digest: picture for picture in pictures}
        if not distinct:
            return
        vectors = self.model.images([picture.image for picture in distinct.values()], batch_size=self.batch_size)
        by_digest = dict(zip(distinct, vectors, strict=True))
        self.added.embedded += len(distinct)
        for picture in pictures:
            self._count(picture.file.path, picture.digest)
            self.writer.put(row_of(picture, by_digest[picture.digest], self.model.image_digest))
        self._step(len(pictures))

    def _count(self, path: str, digest: str) -> None:
        known = self.plan.known.get(path)
        if known is None and digest in self.gone:
            self.gone.pop(digest)
            self.added.moved += 1
        elif known is None:
            self.added.new += 1
        elif known.digest != digest:
            self.added.changed += 1
        elif known.current:
            self.added.unchanged += 1


def _digest(file: FileState) -> str | None:
    try:
        return read_bytes_digest(file.path)
    except (BadImage, OSError):
        return None  # reading it says why


def add_folders(
    table: PictureTable,
    model: "SearchModel",
    folders: Sequence[Path],
    exact: bool = False,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> Added:
    """`PictureIndex.add`, with the lock held."""
    start = time.monotonic()
    plan = make_plan(table, model.image_digest, folders)
    note_model(table, model)
    added = Adding(table, model, plan, exact, batch_size, on_progress).run()
    finish(table, plan, folders, added)
    added.seconds = time.monotonic() - start
    return added


def note_model(table: PictureTable, model: "SearchModel") -> None:
    """Write which model the index is of from now on."""
    facts = {"source": model.source, "name": model.name, "width": model.width, "image_digest": model.image_digest}
    table.note({"model": json.dumps(facts)})


def finish(table: PictureTable, plan: Plan, folders: Sequence[Path], added: Added) -> None:
    """Remove what is gone, and note what was left out."""
    table.remove(plan.gone)
    added.removed = len(plan.gone) - added.moved
    table.note({FOLDER_KEY + str(folder): "" for folder in folders})
    clause = " OR ".join(within(folder) for folder in folders)
    added.left_out = [LeftOut(**row) for row in table.rows(["path", "reason"], clause, LEFT_OUT).to_pylist()]
    added.left_out += plan.left_out
