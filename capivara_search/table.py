"""The table that an index is: a row a picture, in LanceDB, in a folder of this machine or on object storage.

Beside `pictures` there are two small tables: `left_out`, the files that could not be read and why, and `about`, what is
known of the whole. Every call sees the newest version, whole. Up to `EXACT_ROWS` pictures all vectors are compared.
Above, an approximate index (IVF with RabitQ codes, then the vectors of its best candidates) answers, together with a
look at the rows that it does not have yet.
"""

import fcntl
import itertools
import json
import logging
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capivara_search import storage
from capivara_search.storage import FAILURES, DamagedIndex
from capivara_search.table_columns import (
    ABOUT,
    EMPTY,
    FOLDER_KEY,
    HIT_COLUMNS,
    KEYS,
    LAYOUT,
    LAYOUT_KEY,
    LOOK,
    MODEL_KEY,
    PICTURES,
    THUMBNAIL,
    VECTOR,
    among,
    as_array,
    quoted,
    schema,
    vector_column,
)
from capivara_search.words import failure, note

if TYPE_CHECKING:
    import lancedb

EXACT_ROWS = 50_000
TRAINED_KEY = "approximate_rows"  # of `about`: rows that the approximate index was learnt from
# Of the approximate index. Tried on 1,000,000 clustered vectors of 512, two cores at work on other things: to sentences
# (cosine 0.37) and pictures (0.99), recall@10 0.999 and 1.0, median 17 ms, p95 21 ms, 0.55 GB of memory. With IVF_SQ
# 23 ms and 0.85 GB, with codes of one bit recall 0.985 at 200 probes; IVF_HNSW_SQ took 3 minutes to build at 200,000.
CODE_BITS = 4  # a number of a vector
PROBES = 64  # partitions, of about 8,192 vectors each
REFINE = 4  # times the wanted rows
UNINDEXED_ROWS = 10_000  # that are looked at beside the approximate index; more are taken into it
SMALL_FILES = 24  # of the table; more are put together
GROWTH = 2  # the partitions are learnt anew when there are so many times the rows that they were learnt from
CACHE_BYTES = 640 << 20  # of the approximate index in memory; that of 1,000,000 pictures of 512 numbers needs 520 MiB
KEEP_VERSIONS = timedelta(minutes=10)  # on object storage, where others may write at the same time
REMOTE_AGE = timedelta(seconds=1)  # how old what is known of an object storage may be: to ask costs a request
IN_ONE_CLAUSE = 500  # paths
BATCH_ROWS = 4096
TRIES = 12  # of a write that others' writes get in the way of

T = TypeVar("T")


class PictureTable:
    """The tables of one index, in a folder or at an address such as s3://bucket/fotos.

    Raises ValueError: something else lies there. OSError: it may not be read.
    """

    def __init__(self, where: str | Path):
        self.where = str(where)
        self.remote = "://" in self.where
        if not self.remote:
            self.where = str(Path(self.where).expanduser().absolute())
            self._check_folder()
        self._tables: dict[str, Any] = {}
        self._kept: dict[str, tuple[int, Any]] = {}
        self._broken: set[str] = set()  # approximate indices that could not be read

    def _check_folder(self) -> None:
        folder = Path(self.where)
        if os.path.isfile(folder) or (os.path.islink(folder) and not os.path.exists(folder)):
            raise failure(ValueError, "index_is_file", path=folder)
        if not os.path.isdir(folder):  # nor where nobody may look
            return
        with storage.explained(self.where):
            names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if names and not any(f"{name}.lance" in names for name in KEYS):
            raise failure(ValueError, "other_folder", path=folder, name=names[0])

    @cached_property
    def _connection(self) -> "lancedb.DBConnection":
        os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings are said by `note`, in a line of ours
        import lancedb  # here: it takes a second

        with storage.explained(self.where):
            return lancedb.connect(
                self.where,
                read_consistency_interval=REMOTE_AGE if self.remote else timedelta(0),
                storage_options=storage.storage_options() if self.remote else None,
                session=lancedb.Session(index_cache_size_bytes=CACHE_BYTES),
            )

    def _folder(self, name: str) -> str:
        return f"{self.where.rstrip('/')}/{name}.lance"

    def table(self, name: str) -> Any:
        """One of the tables, or None where it is not there. Raises ValueError: it is damaged, newer, or not ours."""
        if name not in self._tables:
            with storage.explained(self.where):
                if not self.remote and not Path(self._folder(name)).is_dir():
                    return None
            try:
                table = self._connection.open_table(name)
            except FAILURES as error:
                # Where pictures are there, only the record of their files is not.
                there = name == PICTURES and not self.remote and any(Path(self._folder(name), "data").glob("*"))
                if "was not found" in str(error) and not there:
                    return None
                if self.remote or storage.is_of_storage(error, self.where):
                    raise storage.explanation(error, self.where, name) from error
                raise failure(DamagedIndex, "damaged_record", path=self.where, part=self._folder(name)) from error
            if name == PICTURES:
                self._check_layout(table.schema)
            self._tables[name] = table
        return self._tables[name]

    def _check_layout(self, found: pa.Schema) -> None:
        """Raise ValueError where a table was not made by this project, or by a newer version of it."""
        number = (found.metadata or {}).get(LAYOUT_KEY, b"").decode(errors="replace")
        if not number.isdigit():
            raise failure(ValueError, "other_table", path=self.where)
        if int(number) > LAYOUT:
            raise failure(ValueError, "newer_index", path=self.where, layout=number, known=LAYOUT)

    @property
    def pictures(self) -> Any:
        """The table of pictures. Raises ValueError where there is no index."""
        table = self.table(PICTURES)
        if table is None:
            raise ValueError(f"There is no index at {self.where}. Make it by adding a folder of pictures.")
        return table

    def exists(self) -> bool:
        """Whether there is an index yet."""
        return self.table(PICTURES) is not None

    def create(self, width: int) -> None:
        """Make what is missing of the tables, and the column for vectors of this width."""
        for name in KEYS:
            if self.table(name) is None:
                columns = schema(width) if name == PICTURES else EMPTY[name]
                made = partial(self._connection.create_table, name, schema=columns, exist_ok=True)
                self.write(name, lambda _, made=made: made())
        if width not in self.widths():
            column = pa.schema([schema(width).field(vector_column(width))])
            self.write(PICTURES, lambda table: None if width in self.widths() else table.add_columns(column))

    def columns(self) -> pa.Schema:
        """Of the pictures, as they are now."""
        return self.read(PICTURES, lambda table: table.schema)

    def widths(self) -> list[int]:
        """Of the columns of vectors."""
        return [one.type.list_size for one in self.columns() if pa.types.is_fixed_size_list(one.type)]

    def version(self, *names: str) -> int:
        """A number that grows with every change of some tables, or of all."""
        with storage.explained(self.where):
            return sum(table.version for name in names or KEYS if (table := self.table(name)) is not None)

    def kept(self, name: str, make: Callable[[], T], *names: str) -> T:
        """What is made of the index, and of a model in use, until it, or some tables, change."""
        version = self.version(*names)
        if self._kept.get(name, (None,))[0] != version:
            self._kept[name] = version, make()
        return self._kept[name][1]

    def bytes(self) -> int | None:
        """Of its files; None on object storage."""
        if self.remote:
            return None
        return sum(path.stat().st_size for path in Path(self.where).rglob("*") if path.is_file())

    # --- reading

    def read(self, name: str, operation: Callable[[Any], T]) -> T:
        """What an operation on a table returns."""
        table = self.pictures if name == PICTURES else self.table(name)
        found, error = self._attempt(name, lambda: operation(table))
        if error is None:
            return found
        with storage.explained(self.where, name):  # its files may have been compacted away while they were read
            table.checkout_latest()
            return operation(table)

    def _attempt(self, name: str, call: Callable[[], T]) -> tuple[T, None] | tuple[None, Exception]:
        """What a call returns, or its error, as of a damaged file; what the disk or the storage refuses is raised."""
        try:
            return call(), None
        except FAILURES as error:
            if storage.is_of_storage(error, self.where):
                raise storage.explanation(error, self.where, name) from error
            return None, error

    def rows(self, columns: Sequence[str], where: str | None = None, table: str = PICTURES) -> pa.Table:
        """Some columns of all rows, or of those of a clause; empty where the table is not there."""
        if self.table(table) is None:
            return EMPTY[table].empty_table().select([name for name in columns if name in EMPTY[table].names])
        return self.read(table, lambda opened: _plain(opened, columns, where).to_arrow())

    def of_paths(self, columns: Sequence[str], paths: Sequence[str]) -> pa.Table:
        """`rows`, of some paths."""
        parts = [paths[i : i + IN_ONE_CLAUSE] for i in range(0, len(paths), IN_ONE_CLAUSE)]
        found = [self.rows(columns, among("path", part)) for part in parts]
        return pa.concat_tables(found) if found else self.rows(columns, "false")

    def batches(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns of all pictures, or of those of a clause, a batch at a time, of one version."""
        with storage.explained(self.where, PICTURES):  # it is read while it is asked for
            query = self.read(PICTURES, lambda table: _plain(table, columns, where).to_batches(batch_size=BATCH_ROWS))
            yield from query

    def sample(self, width: int, image_digest: str, most: int) -> np.ndarray:
        """Vectors (rows, width) of a model's pictures, of at most so many rows, spread evenly over the table."""
        rows, column = self.count(), vector_column(width)
        if not rows:
            return np.empty((0, width), np.float16)
        places = np.linspace(0, rows - 1, min(rows, most)).astype(int).tolist()
        found = self.read(PICTURES, lambda table: table.take_offsets(places).select(["model", column]).to_arrow())
        return as_array(found.filter(pc.equal(found["model"], image_digest))[column])

    def count(self, where: str | None = None, table: str = PICTURES) -> int:
        """Rows, all or those of a clause."""
        return 0 if self.table(table) is None else self.read(table, lambda opened: opened.count_rows(where))

    def of_other_models(self, image_digest: str) -> int:
        """How many rows hold vectors of other models."""
        return self.kept(image_digest, lambda: self.count(f"model != {quoted(image_digest)}"), PICTURES)

    def other_model(self, image_digest: str) -> str:
        """Name of a model, another one, that has embedded rows."""
        digests = self.rows(["model"], f"model != {quoted(image_digest)}")["model"].unique().to_pylist()
        names = [name for digest in digests if (name := self.about().get(MODEL_KEY + digest))]
        return names[0] if names else "another model"

    def first_and_last(self) -> tuple[datetime | None, datetime | None]:
        """When the oldest and the newest picture were taken."""
        bounds = pc.min_max(self.rows(["taken"], "taken IS NOT NULL")["taken"]).as_py()
        return bounds["min"], bounds["max"]

    def about(self) -> dict[str, str]:
        """What is known of the whole: key -> value."""
        rows = self.rows(["key", "value"], table=ABOUT)
        return dict(zip(rows["key"].to_pylist(), rows["value"].to_pylist(), strict=True))

    def folders(self) -> list[str]:
        """Those that were added."""
        return sorted(key.removeprefix(FOLDER_KEY) for key in self.about() if key.startswith(FOLDER_KEY))

    def model(self) -> dict[str, Any] | None:
        """Source, name, width and image_digest of the model that pictures were added with last."""
        with suppress(KeyError, json.JSONDecodeError):
            return json.loads(self.about()["model"])
        return None

    # --- the nearest rows

    def looks(self) -> list[str]:
        """The column of looks, where there is one."""
        return [LOOK] if LOOK in self.columns().names else []

    def nearest(
        self, vector: np.ndarray, k: int, where: str | None = None, exact: bool = False, more: Sequence[str] = ()
    ) -> pa.Table:
        """The k rows nearest to a vector (width,) of unit length, in no order, with their vectors in a column `vector`.

        They meet the clause `where`; `exact`: every vector is compared; `more` columns, beside `HIT_COLUMNS`.
        """
        column = vector_column(len(vector))
        if where and self.count(where) <= EXACT_ROWS:  # the engine would read the vectors of all rows
            rows = self.rows(["path", column], where)
            rows = rows.filter(rows[column].is_valid())
            scores = as_array(rows[column]).astype(np.float32) @ vector
            best = np.argpartition(-scores, k - 1)[:k] if k < len(scores) else np.arange(len(scores))
            found = self.of_paths([*HIT_COLUMNS, column, *more], rows["path"].take(best).to_pylist())
        elif exact or not self.is_approximate(len(vector)):
            found = self.read(PICTURES, lambda table: _search(table, vector, k, where, more).to_arrow())
        else:
            found = self._approximately(vector, k, where, more)
        return found.rename_columns([VECTOR if name == column else name for name in found.column_names])

    def _approximately(self, vector: np.ndarray, k: int, where: str | None, more: Sequence[str]) -> pa.Table:
        search = partial(_search, self.pictures, vector, k, where, more, approximate=True)
        found, error = self._attempt(PICTURES, lambda: search().to_arrow())
        if error:
            found = self.read(PICTURES, lambda table: _search(table, vector, k, where, more).to_arrow())
            self._broken.add(self.indices()[vector_column(len(vector))].index_uuid)
            note("approximate_damaged", self.where, storage.detail(error), level=logging.WARNING)
        return found

    def is_approximate(self, width: int) -> bool:
        """Whether an approximate index of vectors of this width answers."""
        found = self.indices().get(vector_column(width))
        return found is not None and found.index_uuid not in self._broken

    def indices(self) -> dict[str, Any]:
        """Column -> what LanceDB says of its index."""
        found = self.kept("indices", lambda: self.read(PICTURES, lambda table: table.list_indices()), PICTURES)
        return {one.columns[0]: one for one in found}

    # --- writing

    def write(self, name: str, operation: Callable[[Any], T]) -> T:
        """What an operation that changes a table returns; where another one writes at that moment, it is done again."""
        with storage.explained(self.where, name):
            for tries in itertools.count(1):
                try:
                    return operation(self.table(name))
                except FAILURES as error:
                    if tries == TRIES or not storage.is_conflict(error):
                        raise
                time.sleep(random.uniform(0.05, 0.2) * tries)
                if name in self._tables:
                    self._tables[name].checkout_latest()

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

    def note(self, values: dict[str, str]) -> None:
        """Set some of `about`."""
        known = self.about()
        if changed := {key: value for key, value in values.items() if known.get(key) != value}:
            columns = {"key": list(changed), "value": list(changed.values())}
            self.merge(pa.table(columns, schema=EMPTY[ABOUT]), ABOUT)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who adds to an index in a folder; who comes second waits, and says so.

        On object storage there is no lock: rows of one path are told apart by their key.
        """
        lock = None if self.remote else self._lock()
        try:
            yield
        finally:
            if lock is not None:
                with suppress(OSError):  # it is not empty, as it is where nothing was made
                    Path(self.where).rmdir()
                os.close(lock)

    def _lock(self) -> int | None:
        """The folder, made where it is missing, and locked; None on a disk without locks."""
        folder = Path(self.where)
        while True:
            with storage.explained(self.where):
                folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note("waiting", self.where, level=logging.WARNING)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                os.close(lock)
                return None
            with suppress(FileNotFoundError):  # who had it may have removed it
                if os.path.samestat(os.fstat(lock), os.stat(folder)):
                    return lock
            os.close(lock)

    # --- upkeep

    def tidy(self, width: int) -> None:
        """Put small files together, bring the indices up to date, and remove old versions, where that is due."""
        if self._is_to_be_built(width) or not self._answers(width):
            self._build(width)
        found = [self.indices().get(column) for column in ("path", vector_column(width))]
        behind = max((one.num_unindexed_rows for one in found if one), default=0)
        small = self.read(PICTURES, lambda table: table.stats()["fragment_stats"]["num_small_fragments"])
        if small >= SMALL_FILES or behind > UNINDEXED_ROWS:
            self.write(PICTURES, partial(_optimize, age=KEEP_VERSIONS if self.remote else timedelta(0)))

    def purge(self) -> None:
        """Remove from the disk what removed rows have left there, their thumbnails among it."""
        for name in KEYS:
            if self.table(name) is not None:
                self.write(name, partial(_optimize, age=timedelta(0)))

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
        query = _search(self.pictures, np.ones(width, np.float32), 1, None, approximate=True).nprobes(1)
        return self._attempt(PICTURES, query.to_arrow)[1] is None

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
            note("approximate_failed", self.where, storage.detail(error), level=logging.WARNING)
        else:
            note("approximate", rows, time.monotonic() - start)

    def mend(self) -> None:
        """Of a damaged index in a folder, take the newest version that can be read, and say what is lost with the rest.

        Called by who has the lock. Where there is no such version, the pictures are set aside, to be added again.
        Raises DamagedIndex where the record of the pictures is whole but can't be read, as of a newer LanceDB.
        """
        for name in () if self.remote else reversed(KEYS):
            try:
                table = self.table(name)
            except DamagedIndex:
                while _set_newest_aside(Path(self._folder(name))):
                    with suppress(DamagedIndex):
                        self.table(name)
                        break
                table = self._tables.get(name)
                if table is None:
                    if name == PICTURES and any(Path(self._folder(name), "_versions").glob("*.manifest")):
                        raise
                    self._give_up(name)
                    continue
            if table is not None and not self._can_read(table):
                self._restore(name, table)

    def _can_read(self, table: Any) -> bool:
        """Whether the rows of a table's version can be read, but for thumbnails; of a large one, one column."""
        names = [name for name in table.schema.names if name != THUMBNAIL]

        def read() -> None:
            for _ in _plain(table, names if table.count_rows() <= EXACT_ROWS else ["size"]).to_batches():
                pass
            if "path" in names:
                table.count_rows("path = ''")  # by its search index

        return self._attempt(table.name, read)[1] is None

    def _restore(self, name: str, table: Any) -> None:
        """Let the newest version of a table that can be read be the table."""
        rows = table.count_rows()
        for one in table.list_indices():  # they are built anew
            self.write(name, lambda opened, index=one.name: opened.drop_index(index))
        if self._can_read(table):
            return
        for version in sorted((one["version"] for one in table.list_versions()), reverse=True):
            with suppress(*FAILURES):
                table.checkout(version)
                if self._can_read(table):
                    table.restore()
                    note("older_version", self._folder(name), table.count_rows(), rows, level=logging.WARNING)
                    return
        del self._tables[name]
        self._give_up(name, rows)

    def _give_up(self, name: str, rows: int | str = "?") -> None:
        """Of a table of which nothing can be read: that of the pictures is set aside, a small one becomes empty."""
        if name == PICTURES:
            folder = self._folder(name)
            places = (f"{folder}.damaged{number or ''}" for number in range(10**6))
            os.rename(folder, aside := next(place for place in places if not os.path.lexists(place)))
            del self._connection  # which may remember files of that name
            note("set_aside", folder, rows, aside, level=logging.WARNING)
            return
        note("taken_for_empty", self._folder(name), level=logging.WARNING)
        with suppress(*FAILURES):
            self._connection.drop_table(name)
        self._tables[name] = self._connection.create_table(name, schema=EMPTY[name], mode="overwrite")


def _set_newest_aside(folder: Path) -> bool:
    """Let the version before the newest one be a table's, where the record of the newest one was not written whole.

    It keeps its content under another name. False where it is whole, as of a newer LanceDB, or there is none.
    """
    records = sorted((folder / "_versions").glob("*.manifest"), key=lambda path: (len(path.stem), path.stem))
    with suppress(OSError):
        if records and not records[0].read_bytes().endswith(b"LANC"):  # they are numbered downwards
            records[0].rename(records[0].with_name(records[0].name + ".damaged"))
            (folder / "_versions" / "latest_version_hint.json").unlink(missing_ok=True)
            return True
    return False


def _optimize(table: Any, age: timedelta) -> None:
    with warnings.catch_warnings():  # that who reads a version which goes will fail: `read` does it again
        warnings.simplefilter("ignore", UserWarning)
        table.optimize(cleanup_older_than=age)


def _plain(table: Any, columns: Sequence[str], where: str | None = None) -> Any:
    query = table.search().select(list(columns))
    return query.where(where) if where else query


def _search(
    table: Any, vector: np.ndarray, k: int, where: str | None, more: Sequence[str] = (), approximate: bool = False
) -> Any:
    column = vector_column(len(vector))
    query = table.search(np.asarray(vector, np.float32), vector_column_name=column).distance_type("cosine").limit(k)
    query = query.select([*HIT_COLUMNS, column, *more, "_distance"])
    query = query.where(where) if where else query
    if not approximate:
        return query.bypass_vector_index()
    query = query.refine_factor(REFINE)
    # With a clause, partitions are looked into until there are enough rows; without one that takes half as long again.
    return query.minimum_nprobes(PROBES).maximum_nprobes(0) if where else query.nprobes(PROBES)
