"""The table that an index is: a row a picture, in LanceDB, in a folder of this machine or on object storage.

    table = PictureTable("fotos.lance")
    table.create(width=512)
    table.merge(to_arrow(rows, table.columns()))
    table.nearest(vector, 12, within("/home/maria/Fotos"))

Up to `EXACT_ROWS` pictures all vectors are compared. Above, an approximate index (IVF with RabitQ codes, then the
vectors of its best candidates) answers, together with a look at the rows that it does not have yet.
"""

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capivara_search import damage
from capivara_search.index_errors import explained, is_of_storage
from capivara_search.picture_columns import (
    ABOUT,
    EMPTY,
    HIT_COLUMNS,
    KEYS,
    LEFT_OUT,
    MODEL_KEY,
    PICTURES,
    VECTOR,
    among,
    as_array,
    quoted,
    vector_column,
)  # fmt: skip
from capivara_search.table_files import FAILURES, Tables, plain

EXACT_ROWS = 50_000
# Of the approximate index. Tried on 1,000,000 clustered vectors of 512, two cores at work on other things: to sentences
# (cosine 0.37) and pictures (0.99), recall@10 0.999 and 1.0, median 17 ms, p95 21 ms, 0.55 GB of memory. With IVF_SQ
# 23 ms and 0.85 GB, with codes of one bit recall 0.985 at 200 probes; IVF_HNSW_SQ took 3 minutes to build at 200,000.
CODE_BITS = 4  # a number of a vector
PROBES = 64  # partitions, of about 8,192 vectors each
REFINE = 4  # times the wanted rows
UNINDEXED_ROWS = 10_000  # that are looked at beside the approximate index; more are taken into it
SMALL_FILES = 24  # of the table; more are put together
GROWTH = 2  # the partitions are learnt anew when there are so many times the rows that they were learnt from
TRAINED_KEY = "approximate_rows"  # of `about`
INDEX_KEY = "index_file:"  # of `about`, before the name of a file of a search index, whose digest is the value
INDEX_DAMAGED = (
    "The approximate index of %s is damaged (%s); all pictures are compared instead, which takes longer. Add a folder "
    "again to build it anew."
)
KEEP_VERSIONS = timedelta(minutes=10)  # on object storage, where others may write at the same time
IN_ONE_CLAUSE = 500  # paths

T = TypeVar("T")
logger = logging.getLogger("capivara")


class PictureTable(Tables):
    """What is read from an index, and written to it. Arguments and errors are those of `Tables`."""

    def __init__(self, where: str):
        super().__init__(where)
        self._others: tuple[int, str, int] | None = None
        self._indices: tuple[int, dict[str, Any]] | None = None
        self._broken: set[str] = set()  # approximate indices that could not be read
        self._whole: dict[str, tuple[int, int]] = {}  # files of indices that were compared: name -> time and size
        self._compared: tuple[int, bool] | None = None  # of which version, and whether to repair it
        self._building: Thread | None = None

    def read(self, name: str, operation: Callable[[Any], T]) -> T:
        """`Tables.read`; without the search indices of the pictures where their files are not as they were written."""
        if name == PICTURES and not self.remote:
            with explained(self.where, PICTURES):
                self._compare_indices()
        return super().read(name, operation)

    def _compare_indices(self) -> None:
        now = (self.version_of(PICTURES), self.repairs)
        folder = Path(self.address(PICTURES))
        if self._compared == now or not (folder / "_indices").is_dir():
            return
        self._compared = now
        digests = self._index_digests()
        if not (changed := damage.changed_index_files(folder, digests, self._whole)):
            return
        logger.warning(INDEX_DAMAGED, self.address(PICTURES), changed[0])
        table = self.pictures
        if self.repairs:
            self.remove([INDEX_KEY + name for name in digests], ABOUT)
        else:  # a view of the same rows
            table = damage.without([], table, self.address(PICTURES), None)
            self._rests[PICTURES] = (now[0], table)
        for one in table.list_indices():
            table.drop_index(one.name)

    def _index_digests(self) -> dict[str, str]:
        """File of a search index -> its digest, as they were noted."""
        return {key.removeprefix(INDEX_KEY): value for key, value in self.about().items() if key.startswith(INDEX_KEY)}

    def _note_indices(self) -> None:
        """Note the digests of the files of search indices, each once."""
        if self.remote:
            return
        folder, noted = Path(self.address(PICTURES)), self._index_digests()
        files = damage.index_files(folder)
        if gone := [INDEX_KEY + name for name in noted if name not in files]:
            self.remove(gone, ABOUT)
        if new := {INDEX_KEY + name: damage.index_digest(folder / name) for name in files if name not in noted}:
            self.note(new)

    def rows(self, columns: Sequence[str], where: str | None = None, table: str = PICTURES) -> pa.Table:
        """Some columns of all rows, or of those of a clause; empty where the table is not there."""
        if self.table(table) is None:
            return EMPTY[table].empty_table().select([name for name in columns if name in EMPTY[table].names])
        return self.read(table, lambda opened: plain(opened, columns, where).to_arrow())

    def of_paths(self, columns: Sequence[str], paths: Sequence[str]) -> pa.Table:
        """`rows`, of some paths."""
        parts = [paths[i : i + IN_ONE_CLAUSE] for i in range(0, len(paths), IN_ONE_CLAUSE)]
        found = [self.rows(columns, among("path", part)) for part in parts]
        return pa.concat_tables(found) if found else self.rows(columns, "false")

    def batches(self, columns: Sequence[str], where: str | None = None, rows: int = 4096) -> Iterator[pa.RecordBatch]:
        """Some columns of all pictures, or of those of a clause, at most `rows` at a time, of one version."""
        with explained(self.where, PICTURES):  # it is read while it is asked for
            yield from self.read(PICTURES, lambda table: plain(table, columns, where).to_batches(batch_size=rows))

    def count(self, where: str | None = None, table: str = PICTURES) -> int:
        """Rows, all or those of a clause."""
        return 0 if self.table(table) is None else self.read(table, lambda opened: opened.count_rows(where))

    def of_other_models(self, image_digest: str) -> int:
        """How many rows hold vectors of other models."""
        version = self.version_of(PICTURES)
        if self._others is None or self._others[:2] != (version, image_digest):
            self._others = version, image_digest, self.count(f"model != {quoted(image_digest)}")
        return self._others[2]

    def first_and_last(self) -> tuple[datetime | None, datetime | None]:
        """When the oldest and the newest picture were taken."""
        bounds = pc.min_max(self.rows(["taken"], "taken IS NOT NULL")["taken"]).as_py()
        return bounds["min"], bounds["max"]

    def bytes(self) -> int | None:
        """Of its files; None on object storage."""
        if self.remote:
            return None
        return sum(path.stat().st_size for path in Path(self.where).rglob("*") if path.is_file())

    def other_model(self, image_digest: str) -> str:
        """Name of a model, another one, that has embedded rows."""
        digests = self.rows(["model"], f"model != {quoted(image_digest)}")["model"].unique().to_pylist()
        names = [name for digest in digests if (name := self.about().get(MODEL_KEY + digest))]
        return names[0] if names else "another model"

    # --- the nearest rows

    def nearest(self, vector: np.ndarray, k: int, where: str | None = None, exact: bool = False) -> pa.Table:
        """The rows nearest to a vector, in no order, with their vectors in a column `vector`.

        Args:
            vector: (width,), unit length.
            k: rows at most.
            where: clause that they meet.
            exact: compare every vector, in an index of any size.
        """
        column = vector_column(len(vector))
        if where and self.count(where) <= EXACT_ROWS:  # the engine would read the vectors of all rows
            found = self._best(vector, self.rows(["path", column], where), k)
            found = self.of_paths([*HIT_COLUMNS, column], found)
        elif exact or not self.is_approximate(len(vector)):
            found = self.read(PICTURES, lambda table: _search(table, vector, k, where).to_arrow())
        else:
            found = self._approximately(vector, k, where)
        return found.rename_columns([VECTOR if name == column else name for name in found.column_names])

    @staticmethod
    def _best(vector: np.ndarray, rows: pa.Table, k: int) -> list[str]:
        """Paths of the rows nearest to a vector."""
        if not rows.num_rows:
            return []
        rows = rows.filter(rows[1].is_valid())
        scores = as_array(rows[1]).astype(np.float32) @ vector
        best = np.argpartition(-scores, k - 1)[:k] if k < len(scores) else np.arange(len(scores))
        return rows["path"].take(best).to_pylist()

    def _approximately(self, vector: np.ndarray, k: int, where: str | None) -> pa.Table:
        try:
            return _search(self.pictures, vector, k, where, approximate=True).to_arrow()
        except FAILURES as error:
            if is_of_storage(error, self.where):
                raise
            found = self.read(PICTURES, lambda table: _search(table, vector, k, where).to_arrow())
            if not self.is_damaged(PICTURES):
                self._broken.add(self.indices()[vector_column(len(vector))].index_uuid)
                logger.warning(INDEX_DAMAGED, self.address(PICTURES), damage.detail(error))
            return found

    def is_approximate(self, width: int) -> bool:
        """Whether an approximate index of vectors of this width answers."""
        found = self.indices().get(vector_column(width))
        return found is not None and found.index_uuid not in self._broken and not self.is_damaged(PICTURES)

    def indices(self) -> dict[str, Any]:
        """Column -> what LanceDB says of its index."""
        version = self.version_of(PICTURES)
        if self._indices is None or self._indices[0] != version:
            found = self.read(PICTURES, lambda table: table.list_indices())
            self._indices = version, {one.columns[0]: one for one in found}
        return self._indices[1]

    # --- what is written

    def merge(self, rows: pa.Table, table: str = PICTURES) -> None:
        """Write rows in one piece, in place of those of the same key."""

        def merge(opened: Any) -> None:
            query = opened.merge_insert(KEYS[table]).when_matched_update_all().when_not_matched_insert_all()
            query.execute(rows, on_bad_vectors="null")  # rows of another width have none

        self.write(table, merge)

    def remove(self, paths: Sequence[str], table: str = PICTURES) -> None:
        """Remove the rows of some paths."""
        for start in range(0, len(paths), IN_ONE_CLAUSE):
            clause = among(KEYS[table], paths[start : start + IN_ONE_CLAUSE])
            self.write(table, lambda opened, clause=clause: opened.delete(clause))

    def remove_where(self, where: str, table: str = PICTURES) -> int:
        """Remove the rows of a clause; returns how many there were."""
        if number := self.count(where, table):
            self.write(table, lambda opened: opened.delete(where))
        return number

    def about(self) -> dict[str, str]:
        """What is known of the whole: key -> value."""
        rows = self.rows(["key", "value"], table=ABOUT)
        return dict(zip(rows["key"].to_pylist(), rows["value"].to_pylist(), strict=True))

    def note(self, values: dict[str, str]) -> None:
        """Set some of `about`."""
        known = self.about()
        if changed := {key: value for key, value in values.items() if known.get(key) != value}:
            columns = {"key": list(changed), "value": list(changed.values())}
            self.merge(pa.table(columns, schema=EMPTY[ABOUT]), ABOUT)

    def model(self) -> dict[str, Any] | None:
        """Source, name, width and image_digest of the model that pictures were added with last."""
        with suppress(KeyError, ValueError):
            return json.loads(self.about()["model"])
        return None

    # --- upkeep

    def build_meanwhile(self, width: int) -> None:
        """Build the approximate index in a thread where it is missing or has become too small; rows may be written."""
        if self._building is None or not self._building.is_alive():
            if not self._is_to_be_built(width):
                return
            self._building = Thread(target=self._build, args=(width,), daemon=True)
            self._building.start()

    def wait_for_build(self) -> None:
        """Let the thread of `build_meanwhile` end."""
        if self._building is not None:
            self._building.join()

    def tidy(self, width: int) -> None:
        """Put small files together, bring the indices up to date, and remove old versions, where that is due."""
        self.wait_for_build()
        if self._is_to_be_built(width) or not self._answers(width):
            self._build(width)
        found = [self.indices().get(column) for column in ("path", vector_column(width))]
        behind = max((one.num_unindexed_rows for one in found if one), default=0)
        small = self.read(PICTURES, lambda table: table.stats()["fragment_stats"]["num_small_fragments"])
        if small >= SMALL_FILES or behind > UNINDEXED_ROWS:
            self._compact(width)
        self._note_indices()

    def _compact(self, width: int) -> None:
        try:
            self.write(PICTURES, self._optimize)
        except FAILURES as error:
            if is_of_storage(error, self.where):
                raise
            self.repair()  # a thumbnail, which nothing else reads, or the approximate index
            for one in self.indices().values():
                self.write(PICTURES, lambda table, name=one.name: table.drop_index(name))
            if self._is_to_be_built(width):
                self._build(width)

    def purge(self) -> None:
        """Remove from the disk what removed rows have left there, their thumbnails among it."""
        for name in (PICTURES, LEFT_OUT, ABOUT):
            if self.table(name) is not None:
                self.write(name, lambda table: self._optimize(table, timedelta(0)))
        self._note_indices()

    def _optimize(self, table: Any, age: timedelta | None = None) -> None:
        with warnings.catch_warnings():  # that who reads a version which goes will fail: `read` does it again
            warnings.simplefilter("ignore", UserWarning)
            table.optimize(cleanup_older_than=(KEEP_VERSIONS if self.remote else timedelta(0)) if age is None else age)

    def _is_to_be_built(self, width: int) -> bool:
        rows = self.count()
        if rows <= EXACT_ROWS:
            return False
        found = self.indices().get(vector_column(width))
        if found is None or found.index_uuid in self._broken:
            return True
        return rows >= GROWTH * int(self.about().get(TRAINED_KEY, 0))

    def _answers(self, width: int) -> bool:
        """Whether the approximate index, where there is one, can be read; one partition of it is."""
        if vector_column(width) not in self.indices():
            return True
        try:
            _search(self.pictures, np.ones(width, np.float32), 1, None, approximate=True).nprobes(1).to_arrow()
        except FAILURES as error:
            if is_of_storage(error, self.where):
                raise
            return False
        return True

    def _build(self, width: int) -> None:
        from lancedb.index import BTree, IvfRq, IvfSq

        column, rows = vector_column(width), self.count()
        code = IvfSq(distance_type="cosine") if width % 8 else IvfRq(distance_type="cosine", num_bits=CODE_BITS)
        start = time.monotonic()
        try:
            for name, config in (("path", BTree()), (column, code)):
                self.write(PICTURES, lambda table, name=name, config=config: table.create_index(name, config=config))
            self.note({TRAINED_KEY: str(rows)})
        except FAILURES as error:
            logger.warning("The approximate index of %s was not built: %s", self.where, damage.detail(error))
            return
        logger.info("Approximate index of %d pictures built in %.0f s.", rows, time.monotonic() - start)


def _search(table: Any, vector: np.ndarray, k: int, where: str | None, approximate: bool = False) -> Any:
    column = vector_column(len(vector))
    query = table.search(np.asarray(vector, np.float32), vector_column_name=column).distance_type("cosine").limit(k)
    query = query.select([*HIT_COLUMNS, column, "_distance"])
    query = query.where(where) if where else query
    if not approximate:
        return query.bypass_vector_index()
    query = query.refine_factor(REFINE)
    # With a clause, partitions are looked into until there are enough rows; without one that takes half as long again.
    return query.minimum_nprobes(PROBES).maximum_nprobes(0) if where else query.nprobes(PROBES)
