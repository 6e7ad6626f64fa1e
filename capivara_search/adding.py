"""Folders into the table of an index: what is new is embedded, what is known stays, what is gone goes.

    added = add_folders(table, model, [Path("/home/maria/Fotos")])

Rows are written in commits of `COMMIT_ROWS` pictures or `COMMIT_S` seconds, and what is gone is removed at the end: a
kill at any moment loses no more than the last commit, and the next run does what is missing.
"""

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from capivara_common.image_files import DECODERS, BadImage, by_threads
from capivara_search.columns import (
    EMPTY,
    FOLDER_KEY,
    LEFT_OUT,
    MODEL_KEY,
    PICTURES,
    VECTOR,
    among,
    quoted,
    to_arrow,
    vector_column,
    within,
)
from capivara_search.index_plan import Plan, make_plan, note_asked
from capivara_search.picture_files import PASSING, FileState, Picture, read_bytes_digest, read_picture
from capivara_search.results import Added, LeftOut
from capivara_search.table import PictureTable

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

COMMIT_ROWS = 400  # pictures; with their thumbnails some 5 MB
COMMIT_S = 20.0  # seconds
BATCH_PIXELS = 100_000_000  # 3 bytes each, that a batch goes beyond by one picture at most

Read = tuple[FileState, Picture | Exception]
Progress = Callable[[int, int], None]
logger = logging.getLogger("capivara")


class Writer:
    """Collects rows and files that were left out, and writes them in commits."""

    def __init__(self, table: PictureTable):
        self.table, self.columns = table, table.columns()
        self.rows: dict[str, dict[str, Any]] = {}
        self.by_digest: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, dict[str, Any]] = {}
        self.all_left_out: set[str] = set()
        self.since = time.monotonic()

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, with its vector as `vector`."""
        self.rows[row["path"]] = self.by_digest[row["digest"]] = row

    def leave_out(self, file: FileState, reason: str) -> None:
        """Note a file that can't be read; a row that it has had is no longer true.

        What only could not be opened keeps its row: it may be as it was.
        """
        row = {"path": file.path, "size": file.size, "mtime_ns": file.mtime_ns, "reason": reason}
        self.left_out[file.path] = row
        self.all_left_out.add(file.path)

    def write_when_due(self) -> None:
        """Write where there is enough, or the last time is long ago."""
        if len(self.rows) + len(self.left_out) >= COMMIT_ROWS or time.monotonic() - self.since > COMMIT_S:
            self.write()

    def write(self) -> None:
        """Write what was collected."""
        if self.rows:
            self.table.merge(to_arrow(list(self.rows.values()), self.columns))
        if self.left_out:
            self.table.merge(pa.Table.from_pylist(list(self.left_out.values()), EMPTY[LEFT_OUT]), LEFT_OUT)
            self.table.remove([path for path, row in self.left_out.items() if not row["reason"].startswith(PASSING)])
        self.rows, self.by_digest, self.left_out, self.since = {}, {}, {}, time.monotonic()


class Adding:
    """Reads, embeds and writes the files of a plan.

    Args:
        table: of the index.
        model: that embeds.
        plan: what there is to do.
        batch_size: pictures that the model sees at once.
        progress: called with the files that are done, and all of the plan.
    """

    def __init__(
        self,
        table: PictureTable,
        model: "SearchModel",
        plan: Plan,
        batch_size: int = 32,
        progress: Progress = lambda done, total: None,
    ):
        self.table, self.model, self.plan = table, model, plan
        self.batch_size, self.progress = batch_size, progress
        self.digest, self.column = model.image_digest, vector_column(model.width)
        self.added, self.done = Added(unchanged=plan.unchanged), 0
        self.writer = Writer(table)
        self.gone = Counter(plan.known[path][2] for path in plan.gone)  # digests
        self.sizes = set(table.rows(["size"])["size"].unique().to_pylist())  # another size is another content

    def run(self, exact: bool = False) -> Added:
        """Do it; pictures are decoded at full size where `exact`."""
        read = partial(read_picture, side=self.model.side, exact=exact, folders=self.plan.roots)
        self.progress(0, len(self.plan.files))
        try:
            with closing(read_ahead(self._unknown(), read, self.batch_size, exact)) as batches:
                for batch in batches:
                    self._embed(batch)
                    self.progress(self.done, len(self.plan.files))  # not of each: a rate of these would mislead
                    self.writer.write_when_due()
        except KeyboardInterrupt:  # what was embedded is kept
            self.writer.write()
            raise
        self.writer.write()
        return self.added

    def _unknown(self) -> Iterator[FileState]:
        """The files that must be decoded; those whose content is in the table get their rows on the way."""
        for start in range(0, len(self.plan.files), COMMIT_ROWS):
            group = self.plan.files[start : start + COMMIT_ROWS]
            digests = dict(zip(group, by_threads(self._digest_before, group), strict=True))
            kept = self._kept(digests.values())
            for file in group:
                if row := kept.get(digests[file]):
                    self._put(file, row, row[VECTOR])
                else:
                    yield file
            self.progress(self.done, len(self.plan.files))
            self.writer.write_when_due()

    def _digest_before(self, file: FileState) -> str | None:
        """The digest of a file that may be known."""
        if self.plan.known.is_as(file):
            return self.plan.known[file.path][2]
        if file.size not in self.sizes:
            return None
        try:
            return read_bytes_digest(file.path, self.plan.roots)
        except (BadImage, OSError):
            return None  # reading it says why

    def _kept(self, digests: Sequence[str | None]) -> dict[str | None, dict[str, Any]]:
        """Digest -> a row of this model's with that content."""
        wanted = sorted(set(digests) - {None})
        if not wanted:
            return {}
        clause = f"{among('digest', wanted)} AND model = {quoted(self.digest)}"
        copies = self.table.rows(["digest", "path"], clause)  # of one picture there may be thousands
        paths = dict(zip(copies["digest"].to_pylist(), copies["path"].to_pylist(), strict=True))
        rows = self.table.of_paths(self.table.columns().names, list(paths.values())).to_pylist()
        return {row["digest"]: {**row, VECTOR: row[self.column]} for row in rows}

    def _embed(self, batch: Sequence[Read]) -> None:
        pictures: dict[FileState, Picture] = {}
        for file, picture in batch:
            if isinstance(picture, FileNotFoundError):  # gone since it was found; the next run sees that
                self.done += 1
            elif isinstance(picture, BadImage | OSError):
                self.writer.leave_out(file, str(picture))
                self.done += 1
            elif isinstance(picture, Exception):
                raise picture
            else:
                pictures[file] = picture
        # Copies of what this run has met meanwhile.
        known = (
            self._kept([one.digest for file, one in pictures.items() if file.size in self.sizes]) if pictures else {}
        )
        known |= self.writer.by_digest
        new = {one.digest: one for one in pictures.values() if one.digest not in known}
        vectors = self.model.images([one.image for one in new.values()], self.batch_size) if new else []
        of_digest = dict(zip(new, vectors, strict=True))
        self.added.embedded += len(new)
        for file, picture in pictures.items():
            vector = of_digest[picture.digest] if picture.digest in of_digest else known[picture.digest][VECTOR]
            self._put(file, picture_columns(picture), vector)

    def _put(self, file: FileState, row: dict[str, Any], vector: np.ndarray) -> None:
        """Add a row with the content of another one or of a picture, and count what it is."""
        state = {"path": file.path, "size": file.size, "mtime_ns": file.mtime_ns, "model": self.digest}
        self.writer.put({**row, **state, VECTOR: vector})
        self.sizes.add(file.size)
        self._count(file.path, row["digest"])
        self.done += 1

    def _count(self, path: str, digest: str) -> None:
        known = self.plan.known[path]
        if known is None and self.gone[digest] > 0:
            self.gone[digest] -= 1
            self.added.moved += 1
        elif known is None:
            self.added.new += 1
        elif known[2] != digest:
            self.added.changed += 1
        elif known[3]:
            self.added.unchanged += 1


def picture_columns(picture: Picture) -> dict[str, Any]:
    """What the table keeps of a picture, beside its file's state and its vector."""
    names = ("digest", "width", "height", "taken", "latitude", "longitude", "thumbnail")
    return {name: getattr(picture, name) for name in names}


def add_folders(
    table: PictureTable,
    model: "SearchModel",
    folders: Sequence[Path],
    exact: bool = False,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> Added:
    """`PictureIndex.add`; the table is made where it is missing, and locked."""
    start = time.monotonic()
    with table.locked():
        plan = make_plan(table, model.image_digest, folders)  # says what is wrong with the folders
        table.create(model.width)
        note_asked(table, folders)
        note_model(table, model)
        adding = Adding(table, model, plan, batch_size, progress)
        adding.run(exact)
        finish(table, model, plan, adding.added, adding.writer.all_left_out)
    adding.added.seconds = time.monotonic() - start
    return adding.added


def note_model(table: PictureTable, model: "SearchModel") -> None:
    """Write which model the index is of from now on, and say what that means for its pictures."""
    before, pictures = table.model(), table.count()
    facts = {"source": model.source, "name": model.name, "width": model.width, "image_digest": model.image_digest}
    if before == facts:
        return
    table.note({"model": json.dumps(facts), MODEL_KEY + model.image_digest: model.name})
    if not before or not pictures:
        return
    others = table.of_other_models(model.image_digest)
    if not others:
        logger.info("Exchange of the text side, %s for %s: 0 pictures embedded again.", model.name, before.get("name"),
                    extra={"code": "text_exchanged"})  # fmt: skip
    else:
        logger.info("%s has another image side than %s: %d pictures are embedded again.", model.name,
                    before.get("name"), others, extra={"code": "image_side"})  # fmt: skip


def finish(table: PictureTable, model: "SearchModel", plan: Plan, added: Added, left_out: Collection[str] = ()) -> None:
    """Remove what is gone, note the folders and what was left out, and tidy up.

    Args:
        table: of the index.
        model: in use.
        plan: made before files were added.
        added: what was counted then; the rest is filled in.
        left_out: paths of files that were left out this time.
    """
    table.remove(plan.gone)
    added.removed = len(plan.gone) - added.moved
    table.note({FOLDER_KEY + str(folder): "" for folder in plan.folders})
    added.left_out = _left_out(table, plan, left_out)
    if len(table.widths()) > 1 and not table.of_other_models(model.image_digest):
        columns = [vector_column(width) for width in table.widths() if width != model.width]
        table.write(PICTURES, lambda opened: opened.drop_columns(columns))
    table.tidy(model.width)


def _left_out(table: PictureTable, plan: Plan, new: Collection[str]) -> list[LeftOut]:
    """What was left out of the folders; the table of it is brought up to date."""
    columns = ["path", "size", "mtime_ns", "reason"]
    rows = table.rows(columns, within(*plan.folders), LEFT_OUT).to_pylist()
    true = {row["path"]: row for row in rows if row["path"] in new or tuple(row.values())[:3] in plan.broken}
    for one in plan.unseen:  # without size and time, so that they are looked at each time
        path = one.path.encode("utf-8", "replace").decode()  # of a name that is no text
        true[path] = {"path": path, "size": -1, "mtime_ns": -1, "reason": one.reason}
    table.remove([row["path"] for row in rows if row["path"] not in true], LEFT_OUT)
    if unknown := [row for row in true.values() if row not in rows]:
        table.merge(pa.Table.from_pylist(unknown, EMPTY[LEFT_OUT]), LEFT_OUT)
    return [LeftOut(path, true[path]["reason"]) for path in sorted(true)]


def embed_files(
    model: "SearchModel", files: Sequence[FileState], place: Path, batch_size: int = 32
) -> dict[str, np.ndarray]:
    """Path -> vector, of files of a place that can be read; nothing is written."""
    found = {}
    read = partial(read_picture, side=model.side, folders=[os.path.realpath(place)])
    for batch in read_ahead(files, read, batch_size):
        pictures = {file.path: one for file, one in batch if isinstance(one, Picture)}
        vectors = model.images([one.image for one in pictures.values()], batch_size)
        found |= dict(zip(pictures, vectors, strict=True))
    return found


def read_ahead(
    files: Iterable[FileState], read: Callable[[FileState], Picture], batch_size: int, whole: bool = False
) -> Iterator[list[Read]]:
    """Pictures, or what was wrong with them, in the order of their files, in batches; threads read while others work.

    Args:
        files: to be read; drawn from as they are needed.
        read: reads one, in a thread.
        batch_size: pictures in a batch; fewer where they are large.
        whole: pictures of any size are kept, so that no more wait than there are threads.
    """
    files, waiting = iter(files), deque[tuple[FileState, Future[Picture]]]()
    most = DECODERS if whole else 2 * batch_size
    threads = ThreadPoolExecutor(DECODERS)
    try:
        while True:
            batch: list[Read] = []
            pixels = 0
            while len(batch) < batch_size and pixels < BATCH_PIXELS:
                waiting.extend((file, threads.submit(read, file)) for file in islice(files, most - len(waiting)))
                if not waiting:
                    break
                file, future = waiting.popleft()
                picture = future.exception() or future.result()
                batch.append((file, picture))
                pixels += 0 if isinstance(picture, Exception) else picture.image.width * picture.image.height
            if not batch:
                return
            yield batch
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
