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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capivara_search import storage
from capivara_search.messages import localized_error, log_message
from capivara_search.results import Hit
from capivara_search.storage import LANCEDB_ERRORS, DamagedIndexError

if TYPE_CHECKING:
    import lancedb

LAYOUT_VERSION = 1  # of the tables; a later one that this version can't read has a larger number
LAYOUT_METADATA_KEY = b"capivara.layout"
PICTURES_TABLE, SKIPPED_FILES_TABLE, METADATA_TABLE = "pictures", "left_out", "about"
TABLE_KEY_COLUMNS = {
    SKIPPED_FILES_TABLE: "path",
    METADATA_TABLE: "key",
    PICTURES_TABLE: "path",
}  # an index is there when its pictures are, the last of them
FOLDER_KEY_PREFIX = (
    "folder:"  # in `about`, before the path of a folder that was added; JSON of what rules left out of it
)
RULES_KEY = "rules"  # JSON of what is left out of all folders
THUMBNAIL_COLUMN = "thumbnail"
COLOR_SIGNATURE_COLUMN = "look"  # which an index of before the column has not
HIT_COLUMNS = ("path", "width", "height", "taken", "latitude", "longitude", "size", "mtime_ns")

EARLIEST_DATE, LATEST_DATE = (
    date(1800, 1, 1),
    date(2200, 1, 1),
)  # days that a file's time in nanoseconds can be compared with
# Two who insert the same key at the same time are told apart by it.
PRIMARY_KEY_METADATA = {b"lance-schema:unenforced-primary-key:position": b"1"}

MAX_EXACT_ROWS = 50_000
TRAINED_ROWS_KEY = "approximate_rows"  # of `about`: rows that the approximate index was learnt from
# Of the approximate index. Tried on 1,000,000 clustered vectors of 512, two cores at work on other things: to sentences
# (cosine 0.37) and pictures (0.99), recall@10 0.999 and 1.0, median 17 ms, p95 21 ms, 0.55 GB of memory. With IVF_SQ
# 23 ms and 0.85 GB, with codes of one bit recall 0.985 at 200 probes; IVF_HNSW_SQ took 3 minutes to build at 200,000.
BITS_PER_DIMENSION = 4  # a number of a vector
PROBED_PARTITIONS = 64  # partitions, of about 8,192 vectors each
REFINE_FACTOR = 4  # times the wanted rows
LEARN_S = 5e-5  # seconds a row that it takes to build: 3.2e-5 of 100,000, 6.9e-5 of 1,000,000 (benchmarks.search)
MAX_UNINDEXED_ROWS = 10_000  # that are looked at beside the approximate index; more are taken into it
MAX_SMALL_FRAGMENTS = 24  # of the table; more are put together
RETRAIN_GROWTH_FACTOR = (
    2  # the partitions are learnt anew when there are so many times the rows that they were learnt from
)
VECTOR_INDEX_CACHE_BYTES = (
    640 << 20
)  # of the approximate index in memory; that of 1,000,000 pictures of 512 numbers needs 520 MiB
REMOTE_VERSION_LIFETIME = timedelta(minutes=10)  # on object storage, where others may write at the same time
REMOTE_READ_CONSISTENCY = timedelta(
    seconds=1
)  # how old what is known of an object storage may be: to ask costs a request
MAX_PATHS_PER_CLAUSE = 500  # paths
MAX_WRITE_ATTEMPTS = 12  # of a write that others' writes get in the way of

T = TypeVar("T")


def schema(width: int) -> pa.Schema:
    """The columns of `pictures`, with vectors of `width` numbers."""
    return pa.schema(
        [
            pa.field("path", pa.string(), False, PRIMARY_KEY_METADATA),  # absolute
            pa.field("size", pa.int64(), False),  # bytes
            pa.field("mtime_ns", pa.int64(), False),
            pa.field("digest", pa.string(), False),  # BLAKE2b-128 of the file, in hexadecimal
            pa.field("width", pa.int32(), False),  # pixels, upright
            pa.field("height", pa.int32(), False),
            pa.field("taken", pa.timestamp("us")),  # the camera's local time
            pa.field("latitude", pa.float64()),  # degrees
            pa.field("longitude", pa.float64()),
            pa.field(THUMBNAIL_COLUMN, pa.binary()),  # WebP
            pa.field(COLOR_SIGNATURE_COLUMN, pa.binary()),  # `duplicates.look_of`
            pa.field("model", pa.string(), False),  # SearchModel.image_digest
            pa.field(vector_column(width), pa.list_(pa.float16(), width)),  # unit length
        ],
        metadata={LAYOUT_METADATA_KEY: str(LAYOUT_VERSION).encode()},
    )


def vector_column(width: int) -> str:
    """The column of vectors of one width: a model of another width adds its own."""
    return f"vector_{width}"


def comparison_columns(width: int) -> list[str]:
    """Those that `duplicates.compared_rows` takes, with those of hits; an older index has no `look`."""
    return [*HIT_COLUMNS, vector_column(width), "model", COLOR_SIGNATURE_COLUMN]


TABLE_SCHEMAS = {
    PICTURES_TABLE: schema(1),
    SKIPPED_FILES_TABLE: pa.schema([*(schema(1).field(name) for name in ("path", "size", "mtime_ns")),
                         pa.field("reason", pa.string(), False)]),
    METADATA_TABLE: pa.schema([pa.field("key", pa.string(), False, PRIMARY_KEY_METADATA), pa.field("value", pa.string(), False)]),
}  # fmt: skip


class PictureTable:
    """The tables of one index, in a folder or at an address such as s3://bucket/fotos.

    Raises ValueError: something else lies there. OSError: it may not be read.
    """

    def __init__(self, where: str | Path):
        self.where = str(where)
        self.is_remote = "://" in self.where
        if not self.is_remote:
            self.where = str(Path(self.where).expanduser().absolute())
            self._check_folder()
        self._open_tables: dict[str, Any] = {}
        self._cache: dict[str, tuple[int, Any]] = {}

    def _check_folder(self) -> None:
        folder = Path(self.where)
        if os.path.isfile(folder) or (os.path.islink(folder) and not os.path.exists(folder)):
            raise localized_error(ValueError, "index_is_file", path=folder)
        if not os.path.isdir(folder):  # nor where nobody may look
            return
        with storage.wrap_storage_errors(self.where):
            names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if names and not any(f"{name}.lance" in names for name in TABLE_KEY_COLUMNS):
            raise localized_error(ValueError, "other_folder", path=folder, name=names[0])

    @cached_property
    def _connection(self) -> "lancedb.DBConnection":
        os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings are said by `note`, in a line of ours
        import lancedb  # here: it takes a second

        if self.is_remote:
            storage.check_endpoints()
        with storage.wrap_storage_errors(self.where):
            return lancedb.connect(
                self.where,
                read_consistency_interval=REMOTE_READ_CONSISTENCY if self.is_remote else timedelta(0),
                storage_options={"allow_http": "true"},  # where the address begins so
                session=lancedb.Session(index_cache_size_bytes=VECTOR_INDEX_CACHE_BYTES),
            )

    def _table_path(self, name: str) -> str:
        return f"{self.where.rstrip('/')}/{name}.lance"

    def open_table(self, table_name: str) -> Any:
        """One of the tables, or None where it is not there. Raises ValueError: it is damaged, newer, or not ours."""
        if table_name not in self._open_tables:
            with storage.wrap_storage_errors(self.where, table_name):
                if not self.is_remote and not Path(self._table_path(table_name)).is_dir():
                    return None
                try:
                    table = self._connection.open_table(table_name)
                    if not table.schema.names:
                        # The engine reads a record of zeros, as a power cut may leave it, as a table without columns.
                        raise RuntimeError("LanceError: the newest record of its files holds zeros")
                except Exception as error:  # the engine's RustPanic among them, which is none of FAILURES
                    # If there are rows, only the record of their files is missing.
                    there = not self.is_remote and any(Path(self._table_path(table_name), "data").glob("*"))
                    if "was not found" in str(error) and not there:
                        return None
                    if isinstance(error, LANCEDB_ERRORS) and (
                        self.is_remote or storage.to_access_error(error, self.where)
                    ):
                        raise
                    raise localized_error(
                        DamagedIndexError, "damaged_record", path=self.where, part=self._table_path(table_name)
                    ) from error
            if table_name == PICTURES_TABLE:
                self._check_layout(table.schema)
            self._open_tables[table_name] = table
        return self._open_tables[table_name]

    def _check_layout(self, found: pa.Schema) -> None:
        """Raise ValueError where a table was not made by this project, or by a newer version of it."""
        number = (found.metadata or {}).get(LAYOUT_METADATA_KEY, b"").decode(errors="replace")
        if not number.isdigit():
            raise localized_error(ValueError, "other_table", path=self.where)
        if int(number) > LAYOUT_VERSION:
            raise localized_error(ValueError, "newer_index", path=self.where, layout=number, known=LAYOUT_VERSION)

    @property
    def pictures(self) -> Any:
        """The table of pictures. Raises ValueError where there is no index."""
        table = self.open_table(PICTURES_TABLE)
        if table is None:
            raise localized_error(ValueError, "no_index", where=self.where)
        return table

    def exists(self) -> bool:
        """Whether there is an index yet."""
        return self.open_table(PICTURES_TABLE) is not None

    def create(self, width: int) -> None:
        """Make what is missing of the tables, and the column for vectors of this width."""
        for name in TABLE_KEY_COLUMNS:
            if self.open_table(name) is None:
                columns = schema(width) if name == PICTURES_TABLE else TABLE_SCHEMAS[name]
                made = partial(self._connection.create_table, name, schema=columns, exist_ok=True)
                self.run_write(name, lambda _, made=made: made())
        if width not in self.widths():
            column = pa.schema([schema(width).field(vector_column(width))])
            self.run_write(PICTURES_TABLE, lambda table: None if width in self.widths() else table.add_columns(column))

    def columns(self) -> pa.Schema:
        """Of the pictures, as they are now."""
        return self.run_read(PICTURES_TABLE, lambda table: table.schema)

    def widths(self) -> list[int]:
        """Of the columns of vectors."""
        return [one.type.list_size for one in self.columns() if pa.types.is_fixed_size_list(one.type)]

    def version(self) -> int:
        """A number that grows with every change."""
        with storage.wrap_storage_errors(self.where):
            return sum(table.version for name in TABLE_KEY_COLUMNS if (table := self.open_table(name)) is not None)

    def cached(self, name: str, compute: Callable[[], T]) -> T:
        """What is made of the pictures, and of a model in use, until they change."""
        version = (
            0 if self.open_table(PICTURES_TABLE) is None else self.run_read(PICTURES_TABLE, lambda table: table.version)
        )
        if self._cache.get(name, (None,))[0] != version:
            self._cache[name] = version, compute()
        return self._cache[name][1]

    def bytes(self) -> int | None:
        """Of its files; None on object storage."""
        if self.is_remote:
            return None
        return sum(path.stat().st_size for path in Path(self.where).rglob("*") if path.is_file())

    # --- reading

    def run_read(self, table_name: str, operation: Callable[[Any], T]) -> T:
        """What an operation on a table returns."""
        table = self.pictures if table_name == PICTURES_TABLE else self.open_table(table_name)
        with storage.wrap_storage_errors(self.where, table_name):
            try:
                return operation(table)
            except LANCEDB_ERRORS as error:
                if storage.to_access_error(error, self.where):
                    raise
                table.checkout_latest()  # its files may have been compacted away while they were read
                return operation(table)

    def rows(self, columns: Sequence[str], clause: str | None = None, table: str = PICTURES_TABLE) -> pa.Table:
        """Some columns of all rows, or of those of a clause; empty where the table is not there."""
        if self.open_table(table) is None:
            return (
                TABLE_SCHEMAS[table]
                .empty_table()
                .select([name for name in columns if name in TABLE_SCHEMAS[table].names])
            )
        return self.run_read(table, lambda opened: _build_scan(opened, columns, clause).to_arrow())

    def rows_of_paths(self, columns: Sequence[str], paths: Sequence[str]) -> pa.Table:
        """`rows`, of some paths."""
        parts = [paths[i : i + MAX_PATHS_PER_CLAUSE] for i in range(0, len(paths), MAX_PATHS_PER_CLAUSE)]
        found = [self.rows(columns, in_clause("path", part)) for part in parts]
        return pa.concat_tables(found) if found else self.rows(columns, "false")

    def batches(self, columns: Sequence[str], clause: str | None = None) -> Iterator[pa.RecordBatch]:
        """Some columns of all pictures, or of those of a clause, a batch at a time, of one version."""
        with storage.wrap_storage_errors(self.where, PICTURES_TABLE):  # it is read while it is asked for
            yield from self.run_read(PICTURES_TABLE, lambda table: _build_scan(table, columns, clause).to_batches())

    def sample(self, width: int, image_digest: str, max_rows: int) -> np.ndarray:
        """Vectors (rows, width) of a model's pictures, of at most so many rows, spread evenly over the table."""
        rows, column = self.count(), vector_column(width)
        if not rows:
            return np.empty((0, width), np.float16)
        places = np.linspace(0, rows - 1, min(rows, max_rows)).astype(int).tolist()
        found = self.run_read(
            PICTURES_TABLE, lambda table: table.take_offsets(places).select(["model", column]).to_arrow()
        )
        return to_array(found.filter(pc.equal(found["model"], image_digest))[column])

    def count(self, clause: str | None = None, table: str = PICTURES_TABLE) -> int:
        """Rows, all or those of a clause."""
        return 0 if self.open_table(table) is None else self.run_read(table, lambda opened: opened.count_rows(clause))

    def count_other_models(self, image_digest: str) -> int:
        """How many rows hold vectors of other models."""
        return self.cached(image_digest, lambda: self.count(f"model != {quote_sql(image_digest)}"))

    def read_metadata(self) -> dict[str, str]:
        """What is known of the whole: key -> value."""
        rows = self.rows(["key", "value"], table=METADATA_TABLE)
        return dict(zip(rows["key"].to_pylist(), rows["value"].to_pylist(), strict=True))

    def folders(self) -> list[str]:
        """Those that were added."""
        return sorted(
            key.removeprefix(FOLDER_KEY_PREFIX) for key in self.read_metadata() if key.startswith(FOLDER_KEY_PREFIX)
        )

    def model(self) -> dict[str, Any] | None:
        """Source, name, width and image_digest of the model that pictures were added with last."""
        with suppress(KeyError, json.JSONDecodeError):
            return json.loads(self.read_metadata()["model"])
        return None

    # --- the nearest rows

    def nearest(self, vector: np.ndarray, k: int, clause: str | None = None, exact: bool = False) -> pa.Table:
        """The k rows nearest to a vector (width,) of unit length, best first, of equal ones by path.

        They meet the clause `where`, and have the `compared_columns`, and as `score` their cosines. `exact`: every
        vector is compared.
        """
        quick = not exact and self.has_approximate_index(len(vector))
        found = self.run_read(
            PICTURES_TABLE, lambda table: _build_vector_query(table, vector, k, clause, quick).to_arrow()
        )
        scores = np.clip(l2_normalize(to_array(found[vector_column(len(vector))])) @ vector, -1, 1)
        found = found.append_column("score", pa.array(scores, pa.float64()))
        return found.sort_by([("score", "descending"), ("path", "ascending")])

    def has_approximate_index(self, width: int) -> bool:
        """Whether an approximate index of vectors of this width answers."""
        return vector_column(width) in self.indices()

    def indices(self) -> dict[str, Any]:
        """Column -> what LanceDB says of its index."""
        found = self.cached("indices", lambda: self.run_read(PICTURES_TABLE, lambda table: table.list_indices()))
        return {one.columns[0]: one for one in found}

    # --- writing

    def run_write(self, table_name: str, operation: Callable[[Any], T]) -> T:
        """What an operation that changes a table returns; where another one writes at that moment, it is done again."""
        with storage.wrap_storage_errors(self.where, table_name):
            for tries in itertools.count(1):
                try:
                    return operation(self.open_table(table_name))
                except LANCEDB_ERRORS as error:
                    if tries == MAX_WRITE_ATTEMPTS or not storage.is_write_conflict(error):
                        raise
                time.sleep(random.uniform(0.05, 0.2) * tries)
                if table_name in self._open_tables:
                    self._open_tables[table_name].checkout_latest()

    def upsert(self, rows: pa.Table, table: str = PICTURES_TABLE) -> None:
        """Write rows in one piece, in place of those of the same key."""

        def merge(opened: Any) -> None:
            query = (
                opened.merge_insert(TABLE_KEY_COLUMNS[table]).when_matched_update_all().when_not_matched_insert_all()
            )
            query.execute(rows, on_bad_vectors="null")  # rows of another width have none

        self.run_write(table, merge)

    def delete_paths(self, paths: Sequence[str], table: str = PICTURES_TABLE) -> None:
        """Remove the rows of some paths."""
        for start in range(0, len(paths), MAX_PATHS_PER_CLAUSE):
            clause = in_clause(TABLE_KEY_COLUMNS[table], paths[start : start + MAX_PATHS_PER_CLAUSE])
            self.run_write(table, lambda opened, clause=clause: opened.delete(clause))

    def delete_matching(self, clause: str, table: str = PICTURES_TABLE) -> int:
        """Remove the rows of a clause; returns how many there were."""
        if number := self.count(clause, table):
            self.run_write(table, lambda opened: opened.delete(clause))
        return number

    def set_metadata(self, values: dict[str, str]) -> None:
        """Set some of `about`."""
        known = self.read_metadata()
        if changed := {key: value for key, value in values.items() if known.get(key) != value}:
            columns = {"key": list(changed), "value": list(changed.values())}
            self.upsert(pa.table(columns, schema=TABLE_SCHEMAS[METADATA_TABLE]), METADATA_TABLE)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who adds to an index in a folder; who comes second waits, and says so.

        On object storage there is no lock: rows of one path are told apart by their key.
        """
        lock = None if self.is_remote else self._acquire_lock()
        try:
            yield
        finally:
            if lock is not None:
                with suppress(OSError):  # it is not empty, as it is where nothing was made
                    Path(self.where).rmdir()
                os.close(lock)

    def _acquire_lock(self) -> int | None:
        """The folder, made where it is missing, and locked; None on a disk without locks."""
        folder = Path(self.where)
        while True:
            with storage.wrap_storage_errors(self.where):
                folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log_message("waiting", self.where, level=logging.WARNING)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                os.close(lock)
                return None
            with suppress(FileNotFoundError):  # who had it may have removed it
                if os.path.samestat(os.fstat(lock), os.stat(folder)):
                    return lock
            os.close(lock)

    # --- upkeep

    def optimize(self, width: int) -> None:
        """Put small files together, bring the indices up to date, and remove old versions, where that is due."""
        from lancedb.index import BTree, IvfRq

        column, rows = vector_column(width), self.count()
        if self._must_learn(width, rows):
            start = time.monotonic()
            code = IvfRq(distance_type="cosine", num_bits=BITS_PER_DIMENSION)
            for name, config in (("path", BTree()), (column, code)):
                self.run_write(
                    PICTURES_TABLE,
                    lambda table, table_name=name, config=config: table.create_index(name, config=config),
                )
            self.set_metadata({TRAINED_ROWS_KEY: str(rows)})
            log_message("approximate", rows, time.monotonic() - start)
        behind = max((one.num_unindexed_rows for one in self.indices().values()), default=0)
        small = self.run_read(PICTURES_TABLE, lambda table: table.stats()["fragment_stats"]["num_small_fragments"])
        if small >= MAX_SMALL_FRAGMENTS or behind > MAX_UNINDEXED_ROWS:
            self.run_write(
                PICTURES_TABLE, partial(_compact, age=REMOTE_VERSION_LIFETIME if self.is_remote else timedelta(0))
            )

    def _must_learn(self, width: int, rows: int) -> bool:
        """Return whether `tidy` builds the approximate index, if the table has so many rows."""
        column = vector_column(width)
        is_learnt = column in self.indices() and rows < RETRAIN_GROWTH_FACTOR * int(
            self.read_metadata().get(TRAINED_ROWS_KEY, 0)
        )
        return rows > MAX_EXACT_ROWS and not is_learnt and width % 8 == 0  # RabitQ codes require a width divisible by 8

    def tidy_seconds(self, width: int, rows: int) -> float:
        """Estimate how long `tidy` takes once the table has so many rows."""
        return LEARN_S * rows if self._must_learn(width, rows) else 0.0

    def purge(self) -> None:
        """Remove from the disk what removed rows have left there, their thumbnails among it."""
        for name in TABLE_KEY_COLUMNS:
            if self.open_table(name) is not None:
                self.run_write(name, partial(_compact, age=timedelta(0)))

    def repair(self) -> None:
        """Of a damaged index in a folder, take the newest version that can be read, and say what is lost with the rest.

        Called by who has the lock. A table of which no version can be read is set aside, to be made anew. Raises
        DamagedIndex where the newest record of a table is whole but can't be read, as of a newer LanceDB.
        """
        for name in () if self.is_remote else reversed(TABLE_KEY_COLUMNS):
            self._repair_table(name)

    def _repair_table(self, name: str) -> None:
        folder = Path(self._table_path(name))
        try:
            table = self.open_table(name)
        except DamagedIndexError:
            record = min(folder.glob("_versions/*.manifest"), default=None)  # they are numbered downwards
            if record is None:
                return self._set_aside(folder, "?")
            if record.read_bytes().endswith(b"LANC"):
                raise
            record.rename(record.with_name(f"{record.name}.damaged"))  # it was not written whole: the one before counts
            record.with_name("latest_version_hint.json").unlink(missing_ok=True)
            self._repair_table(name)
            if (table := self.open_table(name)) is not None:
                log_message("older_record", folder, table.count_rows(), level=logging.WARNING)
            return None
        if table is None or self._is_readable(table):
            return None
        rows = table.count_rows()
        for one in table.list_indices():  # they are built anew
            self.run_write(name, lambda opened, index=one.name: opened.drop_index(index))
        for version in sorted((one["version"] for one in table.list_versions()), reverse=True):
            with suppress(*LANCEDB_ERRORS):
                table.checkout(version)
                if self._is_readable(table):
                    table.restore()
                    if (kept := table.count_rows()) < rows:
                        log_message("older_version", folder, kept, rows, level=logging.WARNING)
                    return None
        del self._open_tables[name]
        return self._set_aside(folder, rows)

    def _is_readable(self, table: Any) -> bool:
        """Whether the rows of a table's version can be read, but for thumbnails; of a large one, one column."""
        names = [name for name in table.schema.names if name != THUMBNAIL_COLUMN]
        try:
            for _ in _build_scan(table, names if table.count_rows() <= MAX_EXACT_ROWS else ["size"]).to_batches():
                pass
            for (column,) in (one.columns for one in table.list_indices()):
                if column == "path":
                    table.count_rows("path = ''")
                else:  # one partition of it
                    query = np.ones(table.schema.field(column).type.list_size, np.float32)
                    _build_vector_query(table, query, 1, None, approximate=True).nprobes(1).to_arrow()
        except LANCEDB_ERRORS as error:
            if refused := storage.to_access_error(error, self.where):
                raise refused from error
            return False
        return True

    def _set_aside(self, folder: Path, rows: int | str) -> None:
        places = (Path(f"{folder}.damaged{number or ''}") for number in itertools.count())
        folder.rename(aside := next(place for place in places if not os.path.lexists(place)))
        del self._connection  # which may remember files of that name
        log_message("set_aside", folder, rows, aside, level=logging.WARNING)


def to_array(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors, without empty ones, as (rows, width) float16."""
    column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def to_hits(rows: pa.Table, scores: Sequence[float] | None = None) -> list[Hit]:
    """Rows with `HIT_COLUMNS` as hits; scores are these, those of a column `score`, or 0."""
    if scores is None:
        scores = rows["score"].to_pylist() if "score" in rows.column_names else [0.0] * len(rows)
    hits = []
    for row, score in zip(rows.select(list(HIT_COLUMNS)).to_pylist(), scores, strict=True):
        modified = datetime.fromtimestamp(row.pop("mtime_ns") / 1e9)
        dated = {"date": row["taken"] or modified, "date_source": "camera" if row["taken"] else "file"}
        hits.append(Hit(score=float(score), modified=modified, **dated, **row))
    return hits


def quote_sql(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def in_clause(column: str, values: Iterable[str]) -> str:
    """The clause for rows whose column has one of some values."""
    return f"{column} IN ({', '.join(map(quote_sql, values))})"


def join_clauses(clauses: Sequence[str]) -> str | None:
    """The clause for rows that meet all of some; None where there is none."""
    return " AND ".join(clauses) or None


def folders_clause(*folders: str | Path) -> str:
    """The clause for rows of folders, with the folders in them, or of single files."""
    paths = [str(folder).rstrip(os.sep) for folder in folders]
    return (
        "(" + " OR ".join(f"path = {quote_sql(p)} OR starts_with(path, {quote_sql(p + os.sep)})" for p in paths) + ")"
    )


def date_clauses(since: date | None, until: date | None) -> list[str]:
    """The clauses for pictures of some days, both included; by the file's time where no camera says when."""
    clauses = []
    for day, sign, after in ((since, ">=", 0), (until, "<", 1)):
        if day is not None:
            start = datetime.combine(
                min(max(day, EARLIEST_DATE), LATEST_DATE) + timedelta(days=after), datetime.min.time()
            )
            clauses.append(
                f"((taken IS NOT NULL AND taken {sign} timestamp '{start:%Y-%m-%d %H:%M:%S}')"
                f" OR (taken IS NULL AND mtime_ns {sign} {int(start.timestamp()) * 10**9}))"
            )
    return clauses


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., width), of length 1, float32."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _compact(table: Any, age: timedelta) -> None:
    with warnings.catch_warnings():  # that who reads a version which goes will fail: `read` does it again
        warnings.simplefilter("ignore", UserWarning)
        table.optimize(cleanup_older_than=age)


def _build_scan(table: Any, columns: Sequence[str], clause: str | None = None) -> Any:
    query = table.search().select([name for name in columns if name in table.schema.names])
    return query.where(clause) if clause else query


def _build_vector_query(table: Any, vector: np.ndarray, k: int, clause: str | None, approximate: bool = False) -> Any:
    column, columns = vector_column(len(vector)), comparison_columns(len(vector))
    query = table.search(np.asarray(vector, np.float32), vector_column_name=column).distance_type("cosine").limit(k)
    query = query.select([*(name for name in columns if name in table.schema.names), "_distance"])
    query = query.where(clause) if clause else query
    if not approximate:
        return query.bypass_vector_index()
    query = query.refine_factor(REFINE_FACTOR)
    # With a clause, partitions are looked into until there are enough rows; without one that takes half as long again.
    return query.minimum_nprobes(PROBED_PARTITIONS).maximum_nprobes(0) if clause else query.nprobes(PROBED_PARTITIONS)
