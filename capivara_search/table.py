"""Storage of an index: LanceDB tables in a folder of this machine or on object storage.

The table `pictures` has one row per picture. Two small tables accompany it: `left_out` lists the files that could not
be read, with the reason, and `about` holds key-value metadata of the index. Every call reads the newest version of a
table.

Searches compare all vectors in tables of up to `MAX_EXACT_ROWS` rows. Larger tables get an approximate vector index,
IVF-RQ: an inverted file (IVF) whose vectors are quantized to RaBitQ codes (arXiv 2405.12497). The best candidates are
compared again by their full vectors, and rows that are not in the vector index yet are compared exactly.
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
from operator import methodcaller
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

# Version of the tables' layout. Raise it if the layout changes so that this version of the code can't read it.
LAYOUT_VERSION = 1
LAYOUT_METADATA_KEY = b"capivara.layout"
PICTURES_TABLE, SKIPPED_FILES_TABLE, METADATA_TABLE = "pictures", "left_out", "about"
# Key column of each table, in the order in which the tables are created. `pictures` is the last one, so an index with
# this table is complete.
TABLE_KEY_COLUMNS = {SKIPPED_FILES_TABLE: "path", METADATA_TABLE: "key", PICTURES_TABLE: "path"}
# Keys of the metadata table. The key of a folder is this prefix and its path; the value is JSON with the number of its
# ignored entries by reason.
FOLDER_KEY_PREFIX = "folder:"
RULES_KEY = "rules"  # JSON of the rules for ignoring files, for all folders
TRAINED_ROWS_KEY = "approximate_rows"  # number of rows that the approximate vector index was trained on
THUMBNAIL_COLUMN = "thumbnail"
COLOR_SIGNATURE_COLUMN = "look"  # missing in indexes of earlier versions
HIT_COLUMNS = ("path", "width", "height", "taken", "latitude", "longitude", "size", "mtime_ns")
# Dates are limited to this range, because a file's time is stored in nanoseconds as a 64-bit integer.
EARLIEST_DATE, LATEST_DATE = date(1800, 1, 1), date(2200, 1, 1)
# With a primary key, two processes that insert the same key at the same time conflict, instead of writing two rows.
PRIMARY_KEY_METADATA = {b"lance-schema:unenforced-primary-key:position": b"1"}

MAX_EXACT_ROWS = 50_000  # tables with more rows get an approximate vector index
# Settings of the approximate vector index, measured on 1,000,000 clustered vectors of width 512 on two busy cores:
# recall@10 of 0.999 for sentences (cosine 0.37) and 1.0 for pictures (cosine 0.99), median 17 ms, 95th percentile
# 21 ms, 0.55 GB of memory. IVF_SQ takes 23 ms and 0.85 GB, codes of one bit reach a recall of 0.985 with 200 probes,
# and IVF_HNSW_SQ takes 3 minutes to build for 200,000 vectors.
BITS_PER_DIMENSION = 4
PROBED_PARTITIONS = 64  # partitions that a search compares; each has about 8,192 vectors
REFINE_FACTOR = 4  # candidates per wanted row that are compared by their full vectors
# Time to build the vector index, per row: 3.2e-5 s for 100,000 rows, 6.9e-5 s for 1,000,000 (`benchmarks.search`).
TRAINING_S_PER_ROW = 5e-5
MAX_UNINDEXED_ROWS = 10_000  # rows outside the vector index that a search compares; more are added to the index
MAX_SMALL_FRAGMENTS = 24  # small data files of a table; more are merged
RETRAIN_GROWTH_FACTOR = 2  # the vector index is trained again when the table has grown by this factor
# Cache of the vector index in memory. The vector index of 1,000,000 pictures of width 512 needs 520 MiB.
VECTOR_INDEX_CACHE_BYTES = 640 << 20
# Old versions on object storage are kept for this time, because other machines may still read them.
REMOTE_VERSION_LIFETIME = timedelta(minutes=10)
REMOTE_READ_CONSISTENCY = timedelta(seconds=1)  # maximum age of cached state; each check of object storage is a request
MAX_PATHS_PER_CLAUSE = 500
MAX_WRITE_ATTEMPTS = 12  # attempts of a write that conflicts with writes of other processes

T = TypeVar("T")


def pictures_schema(width: int) -> pa.Schema:
    """Return the schema of the table `pictures` with vectors of one width."""
    return pa.schema(
        [
            pa.field("path", pa.string(), False, PRIMARY_KEY_METADATA),  # absolute
            pa.field("size", pa.int64(), False),  # bytes
            pa.field("mtime_ns", pa.int64(), False),  # nanoseconds since 1970
            pa.field("digest", pa.string(), False),  # BLAKE2b-128 digest of the file, in hexadecimal
            pa.field("width", pa.int32(), False),  # pixels, after rotating the picture upright
            pa.field("height", pa.int32(), False),
            pa.field("taken", pa.timestamp("us")),  # in the camera's local time
            pa.field("latitude", pa.float64()),  # degrees
            pa.field("longitude", pa.float64()),
            pa.field(THUMBNAIL_COLUMN, pa.binary()),  # WebP
            pa.field(COLOR_SIGNATURE_COLUMN, pa.binary()),  # `duplicates.color_signature`
            pa.field("model", pa.string(), False),  # digest of the model of the vector (`SearchModel.image_digest`)
            pa.field(vector_column(width), pa.list_(pa.float16(), width)),  # unit length
        ],
        metadata={LAYOUT_METADATA_KEY: str(LAYOUT_VERSION).encode()},
    )


def vector_column(width: int) -> str:
    """Return the name of the column with vectors of one width. Models of other widths have columns of their own."""
    return f"vector_{width}"


def comparison_columns(width: int) -> list[str]:
    """Return the columns that `duplicates.get_comparison_vectors` and hits need, for models of one width."""
    return [*HIT_COLUMNS, vector_column(width), "model", COLOR_SIGNATURE_COLUMN]


TABLE_SCHEMAS = {
    PICTURES_TABLE: pictures_schema(1),
    SKIPPED_FILES_TABLE: pa.schema(
        [
            *(pictures_schema(1).field(name) for name in ("path", "size", "mtime_ns")),
            pa.field("reason", pa.string(), False),
        ]
    ),
    METADATA_TABLE: pa.schema(
        [pa.field("key", pa.string(), False, PRIMARY_KEY_METADATA), pa.field("value", pa.string(), False)]
    ),
}


class PictureTable:
    """The tables of one index.

    Args:
        where: Folder, or address on object storage such as s3://bucket/fotos. Nothing needs to exist yet.

    Raises:
        ValueError: If the address is invalid, there is a file at this path, or a folder with something other than an
            index.
        OSError: If the folder may not be read.
    """

    def __init__(self, where: str | Path):
        self.where = str(where)
        storage.check_address(self.where)
        self.is_remote = "://" in self.where
        if not self.is_remote:
            self.where = str(Path(self.where).expanduser().absolute())
            self._check_folder()
        self._open_tables: dict[str, Any] = {}
        self._cache: dict[str, tuple[int, Any]] = {}

    def _check_folder(self) -> None:
        """Raise an error if the location is a file, a broken link, or a folder with something other than an index."""
        folder = Path(self.where)
        if os.path.isfile(folder) or (os.path.islink(folder) and not os.path.exists(folder)):
            raise localized_error(ValueError, "index_is_file", path=folder)
        if not os.path.isdir(folder):  # also if a parent folder may not be read; opening a table reports that
            return
        with storage.wrap_storage_errors(self.where):
            names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if names and not any(f"{name}.lance" in names for name in TABLE_KEY_COLUMNS):
            raise localized_error(ValueError, "other_folder", path=folder, name=names[0])

    @cached_property
    def _connection(self) -> "lancedb.DBConnection":
        os.environ.setdefault("LANCEDB_LOG", "error")  # `log_message` reports what matters of LanceDB's warnings
        import lancedb  # imported late because the import takes a second

        if self.is_remote:
            storage.check_endpoints()
        with storage.wrap_storage_errors(self.where):
            return lancedb.connect(
                self.where,
                read_consistency_interval=REMOTE_READ_CONSISTENCY if self.is_remote else timedelta(0),
                storage_options={"allow_http": "true"},  # applies only to http addresses
                session=lancedb.Session(index_cache_size_bytes=VECTOR_INDEX_CACHE_BYTES),
            )

    def _table_path(self, name: str) -> str:
        return f"{self.where.rstrip('/')}/{name}.lance"

    def open_table(self, table_name: str) -> Any:
        """Open a table, or return None if it does not exist.

        Raises:
            ValueError: If the table is damaged (DamagedIndexError), was made by a newer version, or was not made by
                this project.
            OSError: If the storage refuses access or does not answer.
        """
        if table_name not in self._open_tables:
            with storage.wrap_storage_errors(self.where, table_name):
                if not self.is_remote and not Path(self._table_path(table_name)).is_dir():
                    return None
                try:
                    table = self._connection.open_table(table_name)
                    if not table.schema.names:
                        # A power cut may leave a manifest of zeros, which LanceDB reads as a table without columns.
                        raise RuntimeError("LanceError: the newest record of its files holds zeros")
                except Exception as error:  # LanceDB's RustPanic, for example, is not one of `LANCEDB_ERRORS`
                    # If there are data files, the table does exist, and only its manifest is missing.
                    has_data = not self.is_remote and any(Path(self._table_path(table_name), "data").glob("*"))
                    if "was not found" in str(error) and not has_data:
                        return None
                    is_refused = self.is_remote or storage.to_access_error(error, self.where)
                    if isinstance(error, LANCEDB_ERRORS) and is_refused:
                        raise
                    raise localized_error(
                        DamagedIndexError, "damaged_record", path=self.where, part=self._table_path(table_name)
                    ) from error
            if table_name == PICTURES_TABLE:
                self._check_layout(table.schema)
            self._open_tables[table_name] = table
        return self._open_tables[table_name]

    def _check_layout(self, schema: pa.Schema) -> None:
        """Raise ValueError if a table was not made by this project, or was made by a newer version of it."""
        number = (schema.metadata or {}).get(LAYOUT_METADATA_KEY, b"").decode(errors="replace")
        if not number.isdigit():
            raise localized_error(ValueError, "other_table", path=self.where)
        if int(number) > LAYOUT_VERSION:
            raise localized_error(ValueError, "newer_index", path=self.where, layout=number, known=LAYOUT_VERSION)

    @property
    def pictures(self) -> Any:
        """The table `pictures`.

        Raises:
            ValueError: If there is no index.
        """
        table = self.open_table(PICTURES_TABLE)
        if table is None:
            raise localized_error(ValueError, "no_index", where=self.where)
        return table

    def exists(self) -> bool:
        """Return whether the index has been created."""
        return self.open_table(PICTURES_TABLE) is not None

    def create(self, width: int) -> None:
        """Create the tables that do not exist yet, and the column for vectors of this width."""
        for name in TABLE_KEY_COLUMNS:
            if self.open_table(name) is None:
                columns = pictures_schema(width) if name == PICTURES_TABLE else TABLE_SCHEMAS[name]
                create = partial(self._connection.create_table, name, schema=columns, exist_ok=True)
                self.run_write(name, lambda _, create=create: create())
        if width not in self.widths():
            column = pa.schema([pictures_schema(width).field(vector_column(width))])
            self.run_write(PICTURES_TABLE, lambda table: None if width in self.widths() else table.add_columns(column))

    def columns(self) -> pa.Schema:
        """Return the current schema of the table `pictures`."""
        return self.run_read(PICTURES_TABLE, lambda table: table.schema)

    def widths(self) -> list[int]:
        """Return the widths of the vector columns."""
        return [column.type.list_size for column in self.columns() if pa.types.is_fixed_size_list(column.type)]

    def version(self) -> int:
        """Return a number that grows with every change of a table."""
        with storage.wrap_storage_errors(self.where):
            return sum(table.version for name in TABLE_KEY_COLUMNS if (table := self.open_table(name)) is not None)

    def cached(self, name: str, compute: Callable[[], T]) -> T:
        """Return a value computed from the pictures, cached until the table `pictures` changes.

        Args:
            name: Key in the cache.
            compute: Computes the value.

        Returns:
            The value.
        """
        version = 0
        if self.open_table(PICTURES_TABLE) is not None:
            version = self.run_read(PICTURES_TABLE, lambda table: table.version)
        if self._cache.get(name, (None,))[0] != version:
            self._cache[name] = version, compute()
        return self._cache[name][1]

    def bytes(self) -> int | None:
        """Return the size of the index on disk in bytes, or None on object storage."""
        if self.is_remote:
            return None
        return sum(path.stat().st_size for path in Path(self.where).rglob("*") if path.is_file())

    # --- Reading

    def run_read(self, table_name: str, operation: Callable[[Any], T]) -> T:
        """Run a read operation on a table. It is run again if another process has removed files meanwhile.

        Args:
            table_name: Name of the table.
            operation: Function of the open table.

        Returns:
            The result of the operation.

        Raises:
            ValueError: If there is no index, or a file of it is damaged (DamagedIndexError).
            OSError: If the storage refuses access or does not answer.
        """
        table = self.pictures if table_name == PICTURES_TABLE else self.open_table(table_name)
        with storage.wrap_storage_errors(self.where, table_name):
            try:
                return operation(table)
            except LANCEDB_ERRORS as error:
                if storage.to_access_error(error, self.where):
                    raise
                table.checkout_latest()  # another process may have compacted the files away during the read
                return operation(table)

    def rows(self, columns: Sequence[str], clause: str | None = None, table: str = PICTURES_TABLE) -> pa.Table:
        """Return columns of the rows that match a clause.

        Args:
            columns: Names of columns; those that the table does not have are left out.
            clause: SQL condition. None: all rows.
            table: Name of the table.

        Returns:
            The rows; no rows if the table does not exist.
        """
        if self.open_table(table) is None:
            names = [name for name in columns if name in TABLE_SCHEMAS[table].names]
            return TABLE_SCHEMAS[table].empty_table().select(names)
        return self.run_read(table, lambda opened: _build_scan(opened, columns, clause).to_arrow())

    def rows_of_paths(self, columns: Sequence[str], paths: Sequence[str]) -> pa.Table:
        """Return columns of the pictures with the given paths.

        Args:
            columns: Names of columns; those that the table does not have are left out.
            paths: Absolute paths. Paths without a row are ignored.

        Returns:
            The rows, in any order.
        """
        parts = [paths[i : i + MAX_PATHS_PER_CLAUSE] for i in range(0, len(paths), MAX_PATHS_PER_CLAUSE)]
        tables = [self.rows(columns, in_clause("path", part)) for part in parts]
        return pa.concat_tables(tables) if tables else self.rows(columns, "false")

    def batches(self, columns: Sequence[str], clause: str | None = None) -> Iterator[pa.RecordBatch]:
        """Iterate over columns of the pictures that match a clause, in batches of one version of the table.

        Args:
            columns: Names of columns; those that the table does not have are left out.
            clause: SQL condition. None: all rows.

        Yields:
            Batches of rows.
        """
        with storage.wrap_storage_errors(self.where, PICTURES_TABLE):  # reading continues during the iteration
            yield from self.run_read(PICTURES_TABLE, lambda table: _build_scan(table, columns, clause).to_batches())

    def sample(self, width: int, image_digest: str, max_rows: int) -> np.ndarray:
        """Return vectors of pictures that are spread evenly over the table.

        Args:
            width: Width of the vectors.
            image_digest: Only vectors of this model (`SearchModel.image_digest`).
            max_rows: Maximum number of rows to read.

        Returns:
            (rows, width), float16.
        """
        row_count, column = self.count(), vector_column(width)
        if not row_count:
            return np.empty((0, width), np.float16)
        offsets = np.linspace(0, row_count - 1, min(row_count, max_rows)).astype(int).tolist()
        rows = self.run_read(
            PICTURES_TABLE, lambda table: table.take_offsets(offsets).select(["model", column]).to_arrow()
        )
        return to_array(rows.filter(pc.equal(rows["model"], image_digest))[column])

    def count(self, clause: str | None = None, table: str = PICTURES_TABLE) -> int:
        """Return the number of rows that match a clause.

        Args:
            clause: SQL condition. None: all rows.
            table: Name of the table.

        Returns:
            The number of rows; 0 if the table does not exist.
        """
        return 0 if self.open_table(table) is None else self.run_read(table, lambda opened: opened.count_rows(clause))

    def count_other_models(self, image_digest: str) -> int:
        """Return the number of pictures whose vectors come from a model with another digest."""
        return self.cached(image_digest, lambda: self.count(f"model != {quote_sql(image_digest)}"))

    def read_metadata(self) -> dict[str, str]:
        """Return the metadata of the index."""
        rows = self.rows(["key", "value"], table=METADATA_TABLE)
        return dict(zip(rows["key"].to_pylist(), rows["value"].to_pylist(), strict=True))

    def folders(self) -> list[str]:
        """Return the paths of the folders that were added to the index, sorted."""
        keys = [key for key in self.read_metadata() if key.startswith(FOLDER_KEY_PREFIX)]
        return sorted(key.removeprefix(FOLDER_KEY_PREFIX) for key in keys)

    def model(self) -> dict[str, Any] | None:
        """Return `source`, `name`, `width` and `image_digest` of the model of the latest run, or None."""
        with suppress(KeyError, json.JSONDecodeError):
            return json.loads(self.read_metadata()["model"])
        return None

    # --- Nearest neighbors

    def nearest(self, vector: np.ndarray, k: int, clause: str | None = None, exact: bool = False) -> pa.Table:
        """Return the pictures whose vectors are nearest to a query vector.

        Args:
            vector: (width,), unit length.
            k: Maximum number of rows.
            clause: SQL condition. None: all rows.
            exact: Compare every vector, even if there is an approximate vector index.

        Returns:
            Rows with the columns `comparison_columns` and `score`, their cosine with the vector. The best row comes
            first; rows of equal score are sorted by path.
        """
        approximate = not exact and self.has_approximate_index(len(vector))
        rows = self.run_read(
            PICTURES_TABLE, lambda table: _build_vector_query(table, vector, k, clause, approximate).to_arrow()
        )
        scores = np.clip(l2_normalize(to_array(rows[vector_column(len(vector))])) @ vector, -1, 1)
        rows = rows.append_column("score", pa.array(scores, pa.float64()))
        return rows.sort_by([("score", "descending"), ("path", "ascending")])

    def has_approximate_index(self, width: int) -> bool:
        """Return whether there is an approximate vector index for vectors of this width."""
        return vector_column(width) in self.indices()

    def indices(self) -> dict[str, Any]:
        """Return LanceDB's description of each index of the table `pictures`, by column."""
        indices = self.cached("indices", lambda: self.run_read(PICTURES_TABLE, lambda table: table.list_indices()))
        return {index.columns[0]: index for index in indices}

    # --- Writing

    def run_write(self, table_name: str, operation: Callable[[Any], T]) -> T:
        """Run a write operation on a table. It is run again if it conflicts with a write of another process.

        Args:
            table_name: Name of the table.
            operation: Function of the open table, or of None if the table does not exist.

        Returns:
            The result of the operation.

        Raises:
            ValueError: If a file of the index is damaged (DamagedIndexError).
            OSError: If there is no space left, no permission, no answer of the object storage, or the conflict lasts.
        """
        with storage.wrap_storage_errors(self.where, table_name):
            for attempt in itertools.count(1):
                try:
                    return operation(self.open_table(table_name))
                except LANCEDB_ERRORS as error:
                    if attempt == MAX_WRITE_ATTEMPTS or not storage.is_write_conflict(error):
                        raise
                time.sleep(random.uniform(0.05, 0.2) * attempt)
                if table_name in self._open_tables:
                    self._open_tables[table_name].checkout_latest()

    def upsert(self, rows: pa.Table, table: str = PICTURES_TABLE) -> None:
        """Insert rows, or replace those with the same key, in one commit.

        Args:
            rows: Rows in the schema of the table.
            table: Name of the table.
        """

        def merge(opened: Any) -> None:
            query = opened.merge_insert(TABLE_KEY_COLUMNS[table])
            query = query.when_matched_update_all().when_not_matched_insert_all()
            query.execute(rows, on_bad_vectors="null")  # vectors of other widths are missing in the rows

        self.run_write(table, merge)

    def delete_paths(self, paths: Sequence[str], table: str = PICTURES_TABLE) -> None:
        """Delete the rows with the given keys, which are paths in most tables.

        Args:
            paths: Keys of the rows.
            table: Name of the table.
        """
        for start in range(0, len(paths), MAX_PATHS_PER_CLAUSE):
            clause = in_clause(TABLE_KEY_COLUMNS[table], paths[start : start + MAX_PATHS_PER_CLAUSE])
            self.run_write(table, lambda opened, clause=clause: opened.delete(clause))

    def delete_matching(self, clause: str, table: str = PICTURES_TABLE) -> int:
        """Delete the rows that match a clause.

        Args:
            clause: SQL condition.
            table: Name of the table.

        Returns:
            The number of deleted rows.
        """
        if number := self.count(clause, table):
            self.run_write(table, lambda opened: opened.delete(clause))
        return number

    def set_metadata(self, values: dict[str, str]) -> None:
        """Set keys of the index metadata; keys with unchanged values are not written."""
        stored = self.read_metadata()
        if changed := {key: value for key, value in values.items() if stored.get(key) != value}:
            columns = {"key": list(changed), "value": list(changed.values())}
            self.upsert(pa.table(columns, schema=TABLE_SCHEMAS[METADATA_TABLE]), METADATA_TABLE)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the index, so that one process at a time writes to it. A second process logs that it waits.

        There is no lock on object storage, where the primary key prevents two rows of one path.
        """
        lock = None if self.is_remote else self._acquire_lock()
        try:
            yield
        finally:
            if lock is not None:
                with suppress(OSError):  # removes the folder if nothing was created in it; otherwise it is not empty
                    Path(self.where).rmdir()
                os.close(lock)

    def _acquire_lock(self) -> int | None:
        """Create the folder if it is missing, lock it and return its descriptor; None if the disk has no locks."""
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
            with suppress(FileNotFoundError):  # the process that held the lock may have removed the folder
                if os.path.samestat(os.fstat(lock), os.stat(folder)):
                    return lock
            os.close(lock)

    # --- Maintenance

    def optimize(self, width: int) -> None:
        """Merge small files, update the approximate vector index, and remove old versions, each only if it is due."""
        from lancedb.index import BTree, IvfRq

        column, row_count = vector_column(width), self.count()
        if self._must_train_index(width, row_count):
            start = time.monotonic()
            quantization = IvfRq(distance_type="cosine", num_bits=BITS_PER_DIMENSION)
            for indexed_column, config in (("path", BTree()), (column, quantization)):
                create = methodcaller("create_index", indexed_column, config=config)
                self.run_write(PICTURES_TABLE, create)
            self.set_metadata({TRAINED_ROWS_KEY: str(row_count)})
            log_message("approximate", row_count, time.monotonic() - start)
        unindexed = max((index.num_unindexed_rows for index in self.indices().values()), default=0)
        small = self.run_read(PICTURES_TABLE, lambda table: table.stats()["fragment_stats"]["num_small_fragments"])
        if small >= MAX_SMALL_FRAGMENTS or unindexed > MAX_UNINDEXED_ROWS:
            max_age = REMOTE_VERSION_LIFETIME if self.is_remote else timedelta(0)
            self.run_write(PICTURES_TABLE, partial(_compact, age=max_age))

    def _must_train_index(self, width: int, row_count: int) -> bool:
        """Return whether `optimize` trains the approximate vector index if the table has this number of rows."""
        if row_count <= MAX_EXACT_ROWS or width % 8:  # IVF-RQ requires a width divisible by 8
            return False
        trained_rows = int(self.read_metadata().get(TRAINED_ROWS_KEY, 0))
        return vector_column(width) not in self.indices() or row_count >= RETRAIN_GROWTH_FACTOR * trained_rows

    def estimate_optimize_seconds(self, width: int, row_count: int) -> float:
        """Estimate the duration of `optimize`.

        Args:
            width: Width of the vectors.
            row_count: Number of rows that the table will have.

        Returns:
            Seconds; 0 if the approximate vector index need not be trained.
        """
        return TRAINING_S_PER_ROW * row_count if self._must_train_index(width, row_count) else 0.0

    def purge(self) -> None:
        """Remove the data of deleted rows, for example their thumbnails, from the disk."""
        for name in TABLE_KEY_COLUMNS:
            if self.open_table(name) is not None:
                self.run_write(name, partial(_compact, age=timedelta(0)))

    def repair(self) -> None:
        """Restore the newest readable version of each damaged table and log what is lost.

        A table without a readable version is moved aside, so that it is created again. Indexes on object storage are
        not repaired. The caller must hold the lock (`locked`).

        Raises:
            DamagedIndexError: If the newest manifest of a table is complete but can't be read, for example because a
                newer LanceDB wrote it.
        """
        for name in () if self.is_remote else reversed(TABLE_KEY_COLUMNS):
            self._repair_table(name)

    def _repair_table(self, name: str) -> None:
        folder = Path(self._table_path(name))
        try:
            table = self.open_table(name)
        except DamagedIndexError:
            manifest = min(folder.glob("_versions/*.manifest"), default=None)  # the newest one has the lowest number
            if manifest is None:
                return self._set_aside(folder, None)
            if manifest.read_bytes().endswith(b"LANC"):  # this marks the end of a complete manifest
                raise
            # Without the incomplete manifest, the version before it is the newest.
            manifest.rename(manifest.with_name(f"{manifest.name}.damaged"))
            manifest.with_name("latest_version_hint.json").unlink(missing_ok=True)
            self._repair_table(name)
            if (table := self.open_table(name)) is not None:
                log_message("older_record", folder, table.count_rows(), level=logging.WARNING)
            return None
        if table is None or self._is_readable(table):
            return None
        row_count = table.count_rows()
        for index in table.list_indices():  # `optimize` creates them again
            self.run_write(name, methodcaller("drop_index", index.name))
        for version in sorted((entry["version"] for entry in table.list_versions()), reverse=True):
            with suppress(*LANCEDB_ERRORS):
                table.checkout(version)
                if self._is_readable(table):
                    table.restore()
                    if (restored := table.count_rows()) < row_count:
                        log_message("older_version", folder, restored, row_count, level=logging.WARNING)
                    return None
        del self._open_tables[name]
        return self._set_aside(folder, row_count)

    def _is_readable(self, table: Any) -> bool:
        """Return whether the current version of a table can be read.

        All columns except the thumbnails are read; in a large table, only one column. One partition of a vector index
        is searched.
        """
        names = [name for name in table.schema.names if name != THUMBNAIL_COLUMN]
        try:
            for _ in _build_scan(table, names if table.count_rows() <= MAX_EXACT_ROWS else ["size"]).to_batches():
                pass
            for (column,) in (index.columns for index in table.list_indices()):
                if column == "path":
                    table.count_rows("path = ''")
                else:
                    query = np.ones(table.schema.field(column).type.list_size, np.float32)
                    _build_vector_query(table, query, 1, None, approximate=True).nprobes(1).to_arrow()
        except LANCEDB_ERRORS as error:
            if refused := storage.to_access_error(error, self.where):
                raise refused from error
            return False
        return True

    def _set_aside(self, folder: Path, row_count: int | None) -> None:
        """Rename the folder of a table that can't be repaired, and log its number of rows, None if it is not known."""
        candidates = (Path(f"{folder}.damaged{number or ''}") for number in itertools.count())
        new_folder = next(candidate for candidate in candidates if not os.path.lexists(candidate))
        folder.rename(new_folder)
        del self._connection  # it may have cached the files of the old name
        if row_count is None:
            log_message("set_aside_unknown", folder, new_folder, level=logging.WARNING)
        else:
            log_message("set_aside", folder, row_count, new_folder, level=logging.WARNING)


def to_array(column: pa.ChunkedArray) -> np.ndarray:
    """Convert a column of vectors without missing values to (rows, width), float16."""
    column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def to_hits(rows: pa.Table, scores: Sequence[float] | None = None) -> list[Hit]:
    """Convert rows to hits.

    Args:
        rows: Rows with the columns `HIT_COLUMNS`.
        scores: Scores of the hits. None: the column `score` if there is one, otherwise 0.

    Returns:
        Hits in the order of the rows.
    """
    if scores is None:
        scores = rows["score"].to_pylist() if "score" in rows.column_names else [0.0] * len(rows)
    hits = []
    for row, score in zip(rows.select(list(HIT_COLUMNS)).to_pylist(), scores, strict=True):
        modified = datetime.fromtimestamp(row.pop("mtime_ns") / 1e9)
        date_source = "camera" if row["taken"] else "file"
        hit_date = row["taken"] or modified
        hits.append(Hit(score=float(score), modified=modified, date=hit_date, date_source=date_source, **row))
    return hits


def quote_sql(text: str) -> str:
    """Return a text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def in_clause(column: str, values: Iterable[str]) -> str:
    """Return the SQL clause for rows with certain values in a column.

    Args:
        column: Name of the column.
        values: Accepted values.

    Returns:
        The clause.
    """
    return f"{column} IN ({', '.join(map(quote_sql, values))})"


def join_clauses(clauses: Sequence[str]) -> str | None:
    """Join clauses with AND; return None if there is none."""
    return " AND ".join(clauses) or None


def folders_clause(*folders: str | Path) -> str:
    """Return the SQL clause for the rows of files and of folders, including their subfolders."""
    paths = [str(folder).rstrip(os.sep) for folder in folders]
    clauses = [f"path = {quote_sql(path)} OR starts_with(path, {quote_sql(path + os.sep)})" for path in paths]
    return "(" + " OR ".join(clauses) + ")"


def date_clauses(since: date | None, until: date | None) -> list[str]:
    """Return the SQL clauses for pictures of a range of days.

    The date of a picture is its EXIF date, otherwise the modification time of its file.

    Args:
        since: First day of the range. None: no limit.
        until: Last day of the range, included. None: no limit.

    Returns:
        No, one or two clauses.
    """
    clauses = []
    for day, sign, offset in ((since, ">=", 0), (until, "<", 1)):  # "until" ends before the start of the next day
        if day is not None:
            first_day = min(max(day, EARLIEST_DATE), LATEST_DATE) + timedelta(days=offset)
            start = datetime.combine(first_day, datetime.min.time())
            clauses.append(
                f"((taken IS NOT NULL AND taken {sign} timestamp '{start:%Y-%m-%d %H:%M:%S}')"
                f" OR (taken IS NULL AND mtime_ns {sign} {int(start.timestamp()) * 10**9}))"
            )
    return clauses


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors (..., width) to unit length, float32."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _compact(table: Any, age: timedelta) -> None:
    """Merge the files of a table and remove versions older than `age`."""
    with warnings.catch_warnings():  # LanceDB warns that readers of removed versions fail; `run_read` reads again
        warnings.simplefilter("ignore", UserWarning)
        table.optimize(cleanup_older_than=age)


def _build_scan(table: Any, columns: Sequence[str], clause: str | None = None) -> Any:
    """Build the LanceDB query for columns of the rows that match a clause."""
    query = table.search().select([name for name in columns if name in table.schema.names])
    return query.where(clause) if clause else query


def _build_vector_query(table: Any, vector: np.ndarray, k: int, clause: str | None, approximate: bool = False) -> Any:
    """Build the LanceDB query for the k rows nearest to a vector, by the approximate vector index or exactly."""
    column, columns = vector_column(len(vector)), comparison_columns(len(vector))
    query = table.search(np.asarray(vector, np.float32), vector_column_name=column).distance_type("cosine").limit(k)
    query = query.select([*(name for name in columns if name in table.schema.names), "_distance"])
    query = query.where(clause) if clause else query
    if not approximate:
        return query.bypass_vector_index()
    query = query.refine_factor(REFINE_FACTOR)
    # With a clause, more partitions are probed until there are enough rows. Without a clause, this would take 1.5 times
    # as long.
    return query.minimum_nprobes(PROBED_PARTITIONS).maximum_nprobes(0) if clause else query.nprobes(PROBED_PARTITIONS)
