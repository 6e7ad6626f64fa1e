"""Store an index of pictures in LanceDB tables, in a folder of this machine or on object storage.

The table `pictures` has one row per picture. `left_out` lists the files that could not be read. `about` contains
key-value metadata of the index. Every method reads the newest version of a table.

A table with more than `MAX_EXACT_ROWS` pictures gets an approximate vector index of the type IVF-RQ: an inverted file
whose vectors are compressed to RaBitQ codes (arXiv 2405.12497).
"""

import itertools
import json
import logging
import os
import random
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date, datetime, timedelta
from functools import cached_property, partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capivara_common.files import CAN_OPEN_FOLDERS, acquire_folder_lock
from capivara_search import storage_errors
from capivara_search.folder_scan import FileState, to_absolute_path
from capivara_search.messages import log_message_from_code, make_error_from_code
from capivara_search.results import Hit, SkippedFile
from capivara_search.storage_errors import LANCEDB_ERRORS, DamagedIndexError

if TYPE_CHECKING:
    import lancedb

    from capivara_search.models import SearchModel

# Version of the layout of the tables, which is stored in each index. Raise it if older code can't read the new layout;
# older code then refuses the index instead of misreading it.
LAYOUT_VERSION = 1
LAYOUT_METADATA_KEY = b"capivara.layout"
PICTURES_TABLE, SKIPPED_FILES_TABLE, METADATA_TABLE = "pictures", "left_out", "about"
# {table: its key column}, in the order in which the tables are created. `pictures` is created last. So if it exists,
# the other tables exist as well, even if the creation of an index was interrupted before.
TABLE_KEY_COLUMNS = {SKIPPED_FILES_TABLE: "path", METADATA_TABLE: "key", PICTURES_TABLE: "path"}
# Keys of the metadata table `about`. Each indexed folder has an entry with the key `FOLDER_KEY_PREFIX` + its path.
FOLDER_KEY_PREFIX = "folder:"
TRAINED_ROWS_KEY = "approximate_rows"  # number of rows that the approximate vector index was trained on
THUMBNAIL_COLUMN = "thumbnail"
COLOR_SIGNATURE_COLUMN = "look"  # missing in indexes of older versions
# Columns that `convert_rows_to_hits` converts to a `Hit`.
HIT_COLUMNS = ("path", "width", "height", "taken", "latitude", "longitude", "size", "mtime_ns")
# If a date filter has a day outside of this range, the nearest day of the range is used instead. The reason: file times
# are stored as 64-bit integers in nanoseconds since 1970, which can't represent dates before 1677 and after 2262.
EARLIEST_DATE, LATEST_DATE = date(1800, 1, 1), date(2200, 1, 1)
# Makes a column the primary key. If two processes then insert the same key at the same time, one of the writes fails
# and is repeated. Without a primary key, both writes would succeed and leave two rows with this key.
PRIMARY_KEY_METADATA = {b"lance-schema:unenforced-primary-key:position": b"1"}

MAX_EXACT_ROWS = 50_000  # tables with more rows get an approximate vector index
# The next three settings of the approximate vector index (IVF-RQ) were chosen with 1,000,000 clustered vectors of width
# 512 on two busy CPU cores. Recall@10 is 0.999 for queries like sentences (cosine 0.37 to their picture) and 1.0 for
# queries like pictures (cosine 0.99). A search takes 17 ms (median; 95th percentile: 21 ms) and 0.55 GB.
# Other settings are worse: IVF_SQ takes 23 ms and 0.85 GB, `BITS_PER_DIMENSION = 1` has a recall of 0.985 even with 200
# probed partitions, and IVF_HNSW_SQ takes 3 minutes to build for 200,000 vectors.
BITS_PER_DIMENSION = 4  # number of bits to which each number of a vector is compressed
# The vector index divides the vectors into partitions of about 8,192 similar vectors. A search compares the query only
# with the vectors of this many partitions, the partitions that are nearest to the query. A search with an SQL condition
# may use more partitions.
PROBED_PARTITIONS = 64
# The compressed vectors in the vector index give only approximate distances. Therefore a search for k rows takes
# REFINE_FACTOR * k candidates from the vector index and compares their full vectors.
REFINE_FACTOR = 4
# Estimated time to build the vector index, in seconds per row. Measured with `benchmarks.search`: 3.2e-5 for a table of
# 100,000 rows, 6.9e-5 for 1,000,000 rows.
TRAINING_S_PER_ROW = 5e-5
# Rows that are not in the vector index yet make searches slow, because each search compares all of their vectors with
# the query. If there are more of these rows than this, `PictureTable.optimize` adds them to the vector index.
MAX_UNINDEXED_ROWS = 10_000
# Many small data files make reading slow. If the table `pictures` has at least this many of them,
# `PictureTable.optimize` merges them.
MAX_SMALL_FRAGMENTS = 24
# The vector index chooses its partitions when it is trained. They suit rows that are added later less well, so searches
# may miss more of these rows. Therefore, the vector index is trained again when the table has grown by this factor.
RETRAIN_GROWTH_FACTOR = 2
# Bytes of memory for caching the vector index. The vector index of 1,000,000 vectors of width 512 needs 520 MiB, so it
# fits as a whole.
VECTOR_INDEX_CACHE_BYTES = 640 << 20
# Old versions of tables on object storage are kept for this time, because other machines may still read them.
REMOTE_VERSION_LIFETIME = timedelta(minutes=10)
# For a table on object storage, LanceDB checks at most once in this time whether another process has written a newer
# version. Each check is a network request, so reads in between use the version that is already known.
REMOTE_READ_CONSISTENCY = timedelta(seconds=1)
MAX_PATHS_PER_CLAUSE = 500  # maximum number of paths in an SQL condition; longer lists are split
MAX_WRITE_ATTEMPTS = 12  # a write that conflicts with writes of other processes is tried this many times

T = TypeVar("T")


def pictures_schema(width: int) -> pa.Schema:
    """Return the schema (names and types of the columns) of the table `pictures`, which has one row per picture.

    Args:
        width: Width of the model's vectors, which determines the name and type of the vector column.
    """
    columns = [
        pa.field("path", pa.string(), False, PRIMARY_KEY_METADATA),  # absolute path of the file
        pa.field("size", pa.int64(), False),  # size of the file in bytes
        pa.field("mtime_ns", pa.int64(), False),  # modification time, in nanoseconds since 1970
        pa.field("digest", pa.string(), False),  # BLAKE2b-128 digest of the file's content, in hexadecimal
        pa.field("width", pa.int32(), False),  # in pixels, of the picture rotated upright
        pa.field("height", pa.int32(), False),  # in pixels, of the picture rotated upright
        pa.field("taken", pa.timestamp("us")),  # when the picture was taken (EXIF), in the camera's local time
        pa.field("latitude", pa.float64()),  # degrees
        pa.field("longitude", pa.float64()),  # degrees
        pa.field(THUMBNAIL_COLUMN, pa.binary()),  # WebP file
        pa.field(COLOR_SIGNATURE_COLUMN, pa.binary()),  # result of `duplicates.compute_color_signature`
        pa.field("model", pa.string(), False),  # hash of the image encoder that made the vector (`image_digest`)
        pa.field(vector_column(width), pa.list_(pa.float16(), width)),  # vector (embedding) of unit length
    ]
    return pa.schema(columns, {LAYOUT_METADATA_KEY: str(LAYOUT_VERSION).encode()})


def vector_column(width: int) -> str:
    """Return the name of the column of the table `pictures` that contains vectors of a given width.

    Each width has its own column, because models differ in the width of their vectors.

    Args:
        width: Number of values per vector.
    """
    return f"vector_{width}"


def comparison_columns(width: int) -> list[str]:
    """Return the columns of the table `pictures` that search results (`Hit`) and the search for near-duplicates need.

    Args:
        width: Width of the model's vectors, which determines the name of the vector column.
    """
    return [*HIT_COLUMNS, vector_column(width), "model", COLOR_SIGNATURE_COLUMN]


TABLE_SCHEMAS = {
    PICTURES_TABLE: pictures_schema(1),
    SKIPPED_FILES_TABLE: pa.schema(
        [*map(pictures_schema(1).field, ("path", "size", "mtime_ns")), pa.field("reason", pa.string(), False)]
    ),
    METADATA_TABLE: pa.schema(
        [pa.field("key", pa.string(), False, PRIMARY_KEY_METADATA), pa.field("value", pa.string(), False)]
    ),
}


class PictureTable:
    """The LanceDB tables of one index: methods to read, search, write, optimize and repair them.

    Args:
        where: Folder of the index, or an address on object storage such as s3://bucket/fotos. The index need not exist
            yet.

    Raises:
        ValueError: If the address is invalid, or the path is a file or a folder with other content.
        OSError: If there is no permission to read the folder.
    """

    def __init__(self, where: str | Path):
        self.where = str(where)
        storage_errors.check_address(self.where)
        self.is_remote = "://" in self.where
        if not self.is_remote:
            self.where = str(Path(self.where).expanduser().absolute())
            self._check_folder()
        self._open_tables: dict[str, Any] = {}
        self._cache: dict[str, tuple[int, Any]] = {}

    def _check_folder(self) -> None:
        """Raise ValueError if the path of the index can't be used for an index.

        This is the case for a file, a broken symbolic link, and a folder that contains something other than an index.
        """
        folder = Path(self.where)
        if os.path.isdir(folder):
            with storage_errors.wrap_storage_errors(self.where):
                names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            if names and not any(f"{name}.lance" in names for name in TABLE_KEY_COLUMNS):
                raise make_error_from_code(ValueError, "other_folder", path=folder, name=names[0])
        elif os.path.lexists(folder):  # False also if a parent folder can't be read; `open_table` reports that
            raise make_error_from_code(ValueError, "index_is_file", path=folder)

    @cached_property
    def _connection(self) -> "lancedb.DBConnection":
        """LanceDB's connection to the folder or address of the index, opened on first access."""
        # LanceDB's own warnings are turned off, because this module reports the important ones with
        # `log_message_from_code`.
        os.environ.setdefault("LANCEDB_LOG", "error")
        import lancedb  # imported late because the import takes a second

        if self.is_remote:
            storage_errors.check_endpoints()
        with storage_errors.wrap_storage_errors(self.where):
            return lancedb.connect(
                self.where,
                read_consistency_interval=REMOTE_READ_CONSISTENCY if self.is_remote else timedelta(0),
                # Permits object storage without TLS; https addresses are not affected.
                storage_options={"allow_http": "true"},
                session=lancedb.Session(index_cache_size_bytes=VECTOR_INDEX_CACHE_BYTES),
            )

    def _table_path(self, name: str) -> str:
        """Return the folder or address of a table, such as /home/ana/pictures.lance/about.lance for "about"."""
        return f"{self.where.rstrip('/')}/{name}.lance"

    def open_table(self, table_name: str) -> Any:
        """Open a table of the index. Later calls return the same object.

        Args:
            table_name: Name of the table, a key of `TABLE_KEY_COLUMNS`.

        Returns:
            The table as an object of LanceDB, or None if the table does not exist.

        Raises:
            ValueError: If the table is damaged (DamagedIndexError), or this version of the package can't read it.
            OSError: If the storage refuses access or does not answer.
        """
        if table_name in self._open_tables:
            return self._open_tables[table_name]
        path = self._table_path(table_name)
        with storage_errors.wrap_storage_errors(self.where, table_name):
            if not self.is_remote and not Path(path).is_dir():
                return None
            try:
                table = self._connection.open_table(table_name)
                if not table.schema.names:
                    # A power cut may leave a manifest (list of data files) of zeros. LanceDB then reads a table without
                    # columns.
                    raise RuntimeError("LanceError: the newest manifest (list of data files) has only zeros")
            except Exception as error:  # not only `LANCEDB_ERRORS`, because a damaged table may raise a RustPanic
                # "was not found" usually means that the table does not exist. But if there are data files, only the
                # manifest (list of data files) is missing, and the table is damaged.
                has_data = not self.is_remote and any(Path(path, "data").glob("*"))
                if "was not found" in str(error) and not has_data:
                    return None
                refusal = storage_errors.convert_storage_refusal_to_os_error_or_none(error, self.where)
                if isinstance(error, LANCEDB_ERRORS) and (self.is_remote or refusal):
                    raise
                raise make_error_from_code(DamagedIndexError, "damaged_record", path=self.where, part=path) from error
        if table_name == PICTURES_TABLE:
            self._check_layout(table.schema)
        self._open_tables[table_name] = table
        return table

    def _check_layout(self, schema: pa.Schema) -> None:
        """Raise ValueError if the table `pictures` was not made by this package, or by a newer version of it.

        Args:
            schema: Schema of the table. Its metadata contains the version of the layout.
        """
        number = (schema.metadata or {}).get(LAYOUT_METADATA_KEY, b"").decode(errors="replace")
        if not number.isdigit():
            raise make_error_from_code(ValueError, "other_table", path=self.where)
        if int(number) > LAYOUT_VERSION:
            raise make_error_from_code(ValueError, "newer_index", path=self.where, layout=number, known=LAYOUT_VERSION)

    @property
    def pictures(self) -> Any:
        """The table `pictures`, which has one row per picture, as an object of LanceDB.

        Raises:
            ValueError: If the index does not exist.
        """
        table = self.open_table(PICTURES_TABLE)
        if table is None:
            raise make_error_from_code(ValueError, "no_index", where=self.where)
        return table

    def exists(self) -> bool:
        """Return whether the index has been created."""
        return self.open_table(PICTURES_TABLE) is not None

    def create(self, width: int) -> None:
        """Create the tables of the index, and the column for the model's vectors, if they do not exist yet.

        Args:
            width: Width of the model's vectors.
        """
        for name in TABLE_KEY_COLUMNS:
            if self.open_table(name) is None:
                columns = pictures_schema(width) if name == PICTURES_TABLE else TABLE_SCHEMAS[name]
                create = partial(self._connection.create_table, name, schema=columns, exist_ok=True)
                self.run_write(lambda _, create=create: create(), name)
        if width not in self.widths():
            column = pa.schema([pictures_schema(width).field(vector_column(width))])
            self.run_write(lambda table: None if width in self.widths() else table.add_columns(column))

    def columns(self) -> pa.Schema:
        """Return the current schema of the table `pictures`: the names and types of its columns."""
        return self.run_read(lambda table: table.schema)

    def widths(self) -> list[int]:
        """Return the widths of the vectors that the table `pictures` can store.

        The table has one vector column per width, because models differ in the width of their vectors.
        """
        return [column.type.list_size for column in self.columns() if pa.types.is_fixed_size_list(column.type)]

    def version(self) -> int:
        """Return a number that grows with every change of the index: the sum of the version numbers of its tables."""
        with storage_errors.wrap_storage_errors(self.where):
            return sum(table.version for name in TABLE_KEY_COLUMNS if (table := self.open_table(name)) is not None)

    def cached(self, name: str, compute: Callable[[], T]) -> T:
        """Return a value that is computed from the table `pictures`, and keep it in memory until this table changes.

        Args:
            name: Key of the value in the cache.
            compute: Function that computes the value. It is called only if the cache has no current value.

        Returns:
            The cached or computed value.
        """
        version = self.run_read(lambda table: table.version) if self.open_table(PICTURES_TABLE) is not None else 0
        if self._cache.get(name, (None,))[0] != version:
            self._cache[name] = version, compute()
        return self._cache[name][1]

    def bytes(self) -> int | None:
        """Return the size of the index on disk in bytes, or None on object storage."""
        if self.is_remote:
            return None
        return sum(path.stat().st_size for path in Path(self.where).rglob("*") if path.is_file())

    # --- Reading

    def run_read(self, operation: Callable[[Any], T], table_name: str = PICTURES_TABLE) -> T:
        """Run a read operation on the newest version of a table. If it fails, it is run once more.

        Args:
            operation: Function that takes the table as an object of LanceDB, and returns a result.
            table_name: Name of the table.

        Returns:
            The result of the operation.

        Raises:
            ValueError: If the index does not exist, or one of its files is damaged (DamagedIndexError).
            OSError: If the storage refuses access or does not answer.
        """
        table = self.pictures if table_name == PICTURES_TABLE else self.open_table(table_name)
        with storage_errors.wrap_storage_errors(self.where, table_name):
            try:
                return operation(table)
            except LANCEDB_ERRORS as error:
                if storage_errors.convert_storage_refusal_to_os_error_or_none(error, self.where):
                    raise
                # Perhaps the read used an old version of the table, and another process has removed its files. The
                # files of the newest version exist, so this version is tried now.
                table.checkout_latest()
                return operation(table)

    def rows(self, columns: Sequence[str], clause: str | None = None, table: str = PICTURES_TABLE) -> pa.Table:
        """Read the rows of a table that match an SQL condition.

        Args:
            columns: Names of the columns to read. Names that the table does not have are ignored.
            clause: SQL condition. None: all rows.
            table: Name of the table.

        Returns:
            The rows, in any order. No rows if the table does not exist.
        """
        if self.open_table(table) is None:
            names = [name for name in columns if name in TABLE_SCHEMAS[table].names]
            return TABLE_SCHEMAS[table].empty_table().select(names)
        return self.run_read(lambda opened: _build_row_scan_query(opened, columns, clause).to_arrow(), table)

    def rows_of_paths(self, columns: Sequence[str], paths: Sequence[str]) -> pa.Table:
        """Read the rows of the pictures with the given paths.

        Args:
            columns: Names of the columns to read. Names that the table does not have are ignored.
            paths: Absolute paths of pictures. Paths that are not in the index are ignored.

        Returns:
            The rows, in any order.
        """
        parts = [paths[i : i + MAX_PATHS_PER_CLAUSE] for i in range(0, len(paths), MAX_PATHS_PER_CLAUSE)]
        tables = [self.rows(columns, _in_clause("path", part)) for part in parts]
        return pa.concat_tables(tables) if tables else self.rows(columns, "false")

    def batches(self, columns: Sequence[str], clause: str | None = None) -> Iterator[pa.RecordBatch]:
        """Iterate over the rows of the table `pictures` that match an SQL condition.

        All batches come from the same version of the table.

        Args:
            columns: Names of the columns to read. Names that the table does not have are ignored.
            clause: SQL condition. None: all rows.

        Yields:
            Batches of rows.
        """
        # `run_read` only starts the scan and converts errors of the start. Errors during the iteration are converted by
        # this `with` block.
        with storage_errors.wrap_storage_errors(self.where, PICTURES_TABLE):
            yield from self.run_read(lambda table: _build_row_scan_query(table, columns, clause).to_batches())

    def sample(self, model: "SearchModel", max_rows: int) -> np.ndarray:
        """Read the vectors of a sample of rows that are spread evenly over the table `pictures`.

        Args:
            model: Model in use. Vectors of other models are dropped, so the sample may be smaller.
            max_rows: Maximum number of rows to read.

        Returns:
            Array (rows, width), float32. Each vector has unit length.
        """
        row_count, column = self.count(), vector_column(model.width)
        if not row_count:
            return np.empty((0, model.width), np.float32)
        offsets = np.linspace(0, row_count - 1, min(row_count, max_rows)).astype(int).tolist()
        rows = self.run_read(lambda table: table.take_offsets(offsets).select(["model", column]).to_arrow())
        return l2_normalize(_vector_column_to_array(rows.filter(pc.equal(rows["model"], model.image_digest))[column]))

    def vectors_of_digests(self, digests: Collection[str], model: "SearchModel") -> dict[str, np.ndarray]:
        """Look up the stored vectors of pictures by the digests (hashes) of their file contents.

        Args:
            digests: Digests of the file contents.
            model: Model in use. Vectors of other models are not returned.

        Returns:
            Dictionary from digest to vector (width,), float16. Digests without a stored vector are missing.
        """
        # A file that was moved or copied has a stored vector, so it need not be embedded again.
        if not digests:
            return {}
        clause = f"{_in_clause('digest', digests)} AND model = {quote_sql(model.image_digest)}"
        column = vector_column(model.width)
        rows = self.rows(["digest", column], clause)
        return dict(zip(rows["digest"].to_pylist(), _vector_column_to_array(rows[column]), strict=True))

    def count(self, clause: str | None = None, table: str = PICTURES_TABLE) -> int:
        """Return the number of rows of a table that match an SQL condition.

        Args:
            clause: SQL condition. None: all rows.
            table: Name of the table.

        Returns:
            The number of rows, which is 0 if the table does not exist.
        """
        return 0 if self.open_table(table) is None else self.run_read(methodcaller("count_rows", clause), table)

    def count_other_models(self, image_digest: str) -> int:
        """Return the number of pictures whose vectors were made with a model other than the given model.

        Args:
            image_digest: Digest of the given model (`SearchModel.image_digest`).
        """
        return self.cached(image_digest, lambda: self.count(f"model != {quote_sql(image_digest)}"))

    def read_metadata(self) -> dict[str, str]:
        """Return the metadata of the index, a dictionary `{key: value}` that is stored in the table `about`."""
        rows = self.rows(["key", "value"], table=METADATA_TABLE)
        return dict(zip(rows["key"].to_pylist(), rows["value"].to_pylist(), strict=True))

    def folders(self) -> dict[str, str]:
        """Return the folders that were added to the index, with the numbers of ignored files and folders in them.

        Returns:
            Dictionary `{path of the folder: JSON object with the number of ignored files and folders by reason}`,
            sorted by path. The value is "" until the first update of the folder ends.
        """
        values = {key: value for key, value in self.read_metadata().items() if key.startswith(FOLDER_KEY_PREFIX)}
        return {key.removeprefix(FOLDER_KEY_PREFIX): values[key] for key in sorted(values)}

    def skipped_files(self, clause: str | None = None) -> dict[FileState, SkippedFile]:
        """Return the files and folders that could not be read when the index was updated.

        Args:
            clause: SQL condition for the rows of the table `left_out`. None: all rows.

        Returns:
            Dictionary `{state of the file when it was skipped: the skipped file}`. The state consists of the path, the
            size and the modification time.
        """
        rows = self.rows(["path", "size", "mtime_ns", "reason"], clause, SKIPPED_FILES_TABLE).to_pylist()
        return {FileState(row["path"], row["size"], row["mtime_ns"]): SkippedFile.from_row(row) for row in rows}

    def model(self) -> dict[str, Any]:
        """Return a description of the model that the latest update of the index used.

        Returns:
            Dictionary `{"source": folder or Hub id, "name": name for users, "width": width of the vectors,
            "image_digest": digest of the image encoder}` (see `SearchModel`). It is empty if the index has no model
            yet.
        """
        with suppress(KeyError, json.JSONDecodeError):
            return json.loads(self.read_metadata()["model"])
        return {}

    # --- Nearest neighbors

    def nearest(self, vector: np.ndarray, k: int, clause: str | None = None, exact: bool = False) -> pa.Table:
        """Return the pictures whose vectors are nearest to a query vector.

        Args:
            vector: Query vector (width,), of unit length.
            k: Maximum number of rows.
            clause: SQL condition that the rows must match. None: all rows.
            exact: True: compare every vector. False: use the approximate vector index if there is one.

        Returns:
            Rows with the columns of `comparison_columns` and the column `score` (cosine with the query vector). Rows
            are sorted by score, best first, then by path.
        """
        approximate = not exact and vector_column(len(vector)) in self.indices()
        rows = self.run_read(lambda table: _build_vector_query(table, vector, k, clause, approximate).to_arrow())
        scores = np.clip(l2_normalize(_vector_column_to_array(rows[vector_column(len(vector))])) @ vector, -1, 1)
        rows = rows.append_column("score", pa.array(scores, pa.float64()))
        return rows.sort_by([("score", "descending"), ("path", "ascending")])

    def indices(self) -> dict[str, Any]:
        """Return the indexes that LanceDB has for columns of the table `pictures`, such as the vector index.

        Returns:
            Dictionary `{name of the indexed column: LanceDB's description of the index}`. It is empty if the table does
            not exist.
        """
        indices = self.cached("indices", lambda: self.run_read(methodcaller("list_indices"))) if self.exists() else ()
        return {index.columns[0]: index for index in indices}

    # --- Writing

    def run_write(self, operation: Callable[[Any], T], table_name: str = PICTURES_TABLE) -> T:
        """Run a write operation on a table, and repeat it if it conflicts with a write of another process.

        Args:
            operation: Function that takes the table as an object of LanceDB, or None if the table does not exist.
            table_name: Name of the table.

        Returns:
            The result of the operation.

        Raises:
            ValueError: If a file of the index is damaged (DamagedIndexError).
            OSError: If the disk is full, the storage refuses access or does not answer, or all `MAX_WRITE_ATTEMPTS`
                attempts conflict.
        """
        with storage_errors.wrap_storage_errors(self.where, table_name):
            for attempt in itertools.count(1):
                try:
                    return operation(self.open_table(table_name))
                except LANCEDB_ERRORS as error:
                    if attempt == MAX_WRITE_ATTEMPTS or not storage_errors.WRITE_CONFLICT_RE.search(str(error)):
                        raise
                time.sleep(random.uniform(0.05, 0.2) * attempt)
                if table_name in self._open_tables:
                    self._open_tables[table_name].checkout_latest()

    def upsert(self, rows: pa.Table, table: str = PICTURES_TABLE) -> None:
        """Insert rows into a table in one commit, and replace existing rows that have the same keys.

        Args:
            rows: Rows to insert, with the columns of the table.
            table: Name of the table. Its key column is `path`, or `key` for the metadata table.
        """

        def merge(opened: Any) -> None:
            """Insert or replace the rows in LanceDB's table."""
            query = opened.merge_insert(TABLE_KEY_COLUMNS[table])
            query = query.when_matched_update_all().when_not_matched_insert_all()
            # The rows have no values in the vector columns of other widths. By default, LanceDB would treat the missing
            # values as bad vectors and refuse the rows.
            query.execute(rows, on_bad_vectors="null")

        self.run_write(merge, table)

    def delete_paths(self, paths: Sequence[str], table: str = PICTURES_TABLE) -> None:
        """Delete the rows of a table that have the given paths. Rows of the metadata table are deleted by their keys.

        Args:
            paths: Paths of the rows to delete. If `table` is the metadata table, whose rows have no path: keys.
            table: Name of the table.
        """
        for start in range(0, len(paths), MAX_PATHS_PER_CLAUSE):
            clause = _in_clause(TABLE_KEY_COLUMNS[table], paths[start : start + MAX_PATHS_PER_CLAUSE])
            self.run_write(methodcaller("delete", clause), table)

    def delete_matching(self, clause: str, table: str = PICTURES_TABLE) -> int:
        """Delete the rows of a table that match an SQL condition.

        Args:
            clause: SQL condition.
            table: Name of the table.

        Returns:
            The number of deleted rows.
        """
        if number := self.count(clause, table):
            self.run_write(methodcaller("delete", clause), table)
        return number

    def set_metadata(self, values: dict[str, str]) -> None:
        """Set entries of the key-value metadata of the index (the table `about`).

        Args:
            values: Dictionary `{key: new value}`. Entries that already have this value are not written again.
        """
        stored = self.read_metadata()
        if changed := {key: value for key, value in values.items() if stored.get(key) != value}:
            columns = {"key": list(changed), "value": list(changed.values())}
            self.upsert(pa.table(columns, schema=TABLE_SCHEMAS[METADATA_TABLE]), METADATA_TABLE)

    def set_skipped_files(self, skipped_files: Mapping[FileState, SkippedFile]) -> None:
        """Add skipped files to the table `left_out`. Existing rows with the same paths are replaced.

        Args:
            skipped_files: Dictionary `{state of the file: the skipped file}`, in the form that `skipped_files` returns.
        """
        rows = [asdict(file) | {"reason": skipped.reason} for file, skipped in skipped_files.items()]
        self.upsert(pa.Table.from_pylist(rows, TABLE_SCHEMAS[SKIPPED_FILES_TABLE]), SKIPPED_FILES_TABLE)

    def delete_skipped_files(self, paths: Sequence[str]) -> None:
        """Delete files from the table `left_out`, which lists skipped files. Nothing is deleted on the disk."""
        self.delete_paths(paths, SKIPPED_FILES_TABLE)

    def set_folders(self, values: Mapping[str, str]) -> None:
        """Add folders to the list of indexed folders, or change the numbers of ignored files that are stored for them.

        Args:
            values: Dictionary `{path of the folder: new value}`, in the form that `folders` returns.
        """
        self.set_metadata({FOLDER_KEY_PREFIX + folder: value for folder, value in values.items()})

    def delete_folders(self, folders: Iterable[str]) -> None:
        """Remove folders from the list of indexed folders. The rows of their pictures stay."""
        self.delete_paths([FOLDER_KEY_PREFIX + folder for folder in folders], METADATA_TABLE)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the index during the `with` block, so that only one process at a time writes to the index.

        If another process holds the lock, a warning is logged, and the call waits. An index on object storage has no
        lock.
        """
        # On object storage, the primary key prevents two processes from writing two rows for the same path.
        lock = None if self.is_remote else self._acquire_lock()
        try:
            yield
        finally:
            if lock is not None:
                # `_acquire_lock` creates the folder if necessary. If no table was created in it, it is empty and is
                # removed. Otherwise rmdir fails.
                with suppress(OSError):
                    Path(self.where).rmdir()
                os.close(lock)

    def _acquire_lock(self) -> int | None:
        """Lock the folder of the index, which is created if it does not exist.

        Returns:
            File descriptor that holds the lock until it is closed (see `acquire_folder_lock`). None if the file system
            does not support locks.
        """
        folder = Path(self.where)
        while True:
            with storage_errors.wrap_storage_errors(self.where):
                folder.mkdir(parents=True, exist_ok=True)
                os.scandir(folder).close()  # raises an error now if the folder can't be opened
            try:
                lock = acquire_folder_lock(folder)
            except BlockingIOError:
                log_message_from_code("waiting", self.where, level=logging.WARNING)
                lock = acquire_folder_lock(folder, wait=True)
            except OSError:
                return None
            # While this process waited, another process may have removed the folder and created a new folder at the
            # same path. A lock on the removed folder would protect nothing. So if the folder has been replaced, it is
            # locked again.
            with suppress(FileNotFoundError):
                if not CAN_OPEN_FOLDERS or os.path.samestat(os.fstat(lock), os.stat(folder)):
                    # On Windows, the lock belongs to the path, so it stays valid if the folder is removed. Then only
                    # the folder must be created again.
                    folder.mkdir(exist_ok=True)
                    return lock
            os.close(lock)

    # --- Maintenance

    def optimize(self, width: int) -> None:
        """Make searches fast: merge small data files, train or update the vector index, and remove old table versions.

        A step is skipped if the table is too small, or has changed too little, for the step to save time.

        Args:
            width: Width of the model's vectors.
        """
        from lancedb.index import BTree, IvfRq

        column, row_count = vector_column(width), self.count()
        if self._must_train_index(width, row_count):
            start = time.monotonic()
            quantization = IvfRq(distance_type="cosine", num_bits=BITS_PER_DIMENSION)
            for indexed_column, config in (("path", BTree()), (column, quantization)):
                self.run_write(methodcaller("create_index", indexed_column, config=config))
            self.set_metadata({TRAINED_ROWS_KEY: str(row_count)})
            log_message_from_code("approximate", row_count, time.monotonic() - start)
        unindexed = max((index.num_unindexed_rows for index in self.indices().values()), default=0)
        small = self.run_read(lambda table: table.stats()["fragment_stats"]["num_small_fragments"])
        if small >= MAX_SMALL_FRAGMENTS or unindexed > MAX_UNINDEXED_ROWS:
            max_age = REMOTE_VERSION_LIFETIME if self.is_remote else timedelta(0)
            self.run_write(partial(_compact, age=max_age))

    def _must_train_index(self, width: int, row_count: int) -> bool:
        """Return whether `optimize` would train the approximate vector index.

        Args:
            width: Width of the model's vectors.
            row_count: Number of rows of the table `pictures`.

        Returns:
            True if the table has more than `MAX_EXACT_ROWS` rows, the width is divisible by 8, and the table either has
            no vector index for this width or has grown by `RETRAIN_GROWTH_FACTOR` since the vector index was trained.
        """
        # IVF-RQ, the type of the vector index, requires a width divisible by 8.
        if row_count <= MAX_EXACT_ROWS or width % 8:
            return False
        trained_rows = int(self.read_metadata().get(TRAINED_ROWS_KEY, 0))
        return vector_column(width) not in self.indices() or row_count >= RETRAIN_GROWTH_FACTOR * trained_rows

    def estimate_optimize_seconds(self, width: int, row_count: int) -> float:
        """Estimate how many seconds `optimize` will take, for the progress that is shown to the user.

        Args:
            width: Width of the model's vectors.
            row_count: Number of rows that the table will have when `optimize` is called.

        Returns:
            Seconds to train the approximate vector index, or 0 if `optimize` will not train it.
        """
        return TRAINING_S_PER_ROW * row_count if self._must_train_index(width, row_count) else 0.0

    def purge(self) -> None:
        """Remove the data of deleted rows, for example thumbnails of forgotten pictures, from the disk for good.

        LanceDB only marks rows as deleted. This method rewrites the tables without these rows and removes all old
        versions.
        """
        for name in TABLE_KEY_COLUMNS:
            if self.open_table(name) is not None:
                self.run_write(partial(_compact, age=timedelta(0)), name)

    def repair(self) -> None:
        """Restore the newest readable version of each damaged table, and log what is lost.

        The folder of a table without a readable version is renamed, so that `create` makes the table again. Indexes on
        object storage are not repaired. The caller must hold the lock (`locked`).

        Raises:
            DamagedIndexError: If a table can't be read although it is complete, for example because a newer LanceDB
                wrote it.
        """
        for name in () if self.is_remote else reversed(TABLE_KEY_COLUMNS):
            self._repair_table(name)

    def _repair_table(self, name: str) -> None:
        """Restore the newest readable version of one table, as `repair` describes.

        Args:
            name: Name of the table.

        Raises:
            DamagedIndexError: If the newest manifest of the table is complete but can't be read.
        """
        folder = Path(self._table_path(name))
        try:
            table = self.open_table(name)
        except DamagedIndexError:
            # LanceDB names manifests by descending numbers, so the newest manifest has the lowest number.
            manifest = min(folder.glob("_versions/*.manifest"), default=None)
            if manifest is None:
                return self._set_aside(folder, None)
            # A manifest that was written completely ends with these bytes. If it can't be read, a newer version of
            # LanceDB may have written it, so it is kept.
            if manifest.read_bytes().endswith(b"LANC"):
                raise
            # The incomplete manifest is renamed. LanceDB then no longer finds it and opens the version before it.
            manifest.rename(manifest.with_name(f"{manifest.name}.damaged"))
            manifest.with_name("latest_version_hint.json").unlink(missing_ok=True)
            self._repair_table(name)
            if (table := self.open_table(name)) is not None:
                log_message_from_code("older_record", folder, table.count_rows(), level=logging.WARNING)
            return None
        if table is None or self._is_readable(table):
            return None
        row_count = table.count_rows()
        # Perhaps only an index of LanceDB (vector index or path index) is damaged, and the rows are intact. So all
        # indexes are dropped. `optimize` creates them again.
        for index in table.list_indices():
            self.run_write(methodcaller("drop_index", index.name), name)
        for version in sorted((entry["version"] for entry in table.list_versions()), reverse=True):
            with suppress(*LANCEDB_ERRORS):
                table.checkout(version)
                if self._is_readable(table):
                    table.restore()
                    if (restored := table.count_rows()) < row_count:
                        log_message_from_code("older_version", folder, restored, row_count, level=logging.WARNING)
                    return None
        del self._open_tables[name]
        return self._set_aside(folder, row_count)

    def _is_readable(self, table: Any) -> bool:
        """Return whether the current version of a table can be read.

        To find out, all columns except the thumbnails are read. To save time, only the column `size` is read if the
        table has more than `MAX_EXACT_ROWS` rows. If there is a vector index, one of its partitions is searched.

        Args:
            table: LanceDB's table.

        Returns:
            False if a read fails because a file is missing or damaged.

        Raises:
            OSError: If the disk or the operating system refuses access to the files.
        """
        names = [name for name in table.schema.names if name != THUMBNAIL_COLUMN]
        try:
            columns = names if table.count_rows() <= MAX_EXACT_ROWS else ["size"]
            for _ in _build_row_scan_query(table, columns).to_batches():
                pass
            for (column,) in (index.columns for index in table.list_indices()):
                if column == "path":
                    table.count_rows("path = ''")
                else:
                    query = np.ones(table.schema.field(column).type.list_size, np.float32)
                    _build_vector_query(table, query, 1, None, approximate=True).nprobes(1).to_arrow()
        except LANCEDB_ERRORS as error:
            if refused := storage_errors.convert_storage_refusal_to_os_error_or_none(error, self.where):
                raise refused from error
            return False
        return True

    def _set_aside(self, folder: Path, row_count: int | None) -> None:
        """Rename the folder of a table that can't be repaired to a free name ending in `.damaged`, and log a warning.

        Args:
            folder: Folder of the table.
            row_count: Number of rows of the table, for the warning. None if it is not known.
        """
        candidates = (Path(f"{folder}.damaged{number or ''}") for number in itertools.count())
        new_folder = next(candidate for candidate in candidates if not os.path.lexists(candidate))
        folder.rename(new_folder)
        del self._connection  # the next access opens a new connection, which has not cached the renamed files
        if row_count is None:
            log_message_from_code("set_aside_unknown", folder, new_folder, level=logging.WARNING)
        else:
            log_message_from_code("set_aside", folder, row_count, new_folder, level=logging.WARNING)


def _vector_column_to_array(column: pa.ChunkedArray) -> np.ndarray:
    """Convert a vector column to a NumPy array.

    Args:
        column: Vectors, float16, without missing values.

    Returns:
        Array (rows, width), float16.
    """
    column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def extract_unit_vectors_of_model_or_zeros(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """Return the vector of each row. Rows that were embedded with another model get a vector of zeros.

    Args:
        model: Model in use.
        rows: Rows of the table `pictures`, with the columns that `comparison_columns` lists.

    Returns:
        Array (rows, width), float32. Vectors of the model have unit length.
    """
    vectors, name = np.zeros((len(rows), model.width), np.float32), vector_column(model.width)
    if name in rows.column_names:
        has_vector = pc.and_(rows[name].is_valid(), pc.equal(rows["model"], model.image_digest))
        vectors[has_vector.to_numpy()] = l2_normalize(_vector_column_to_array(rows[name].filter(has_vector)))
    return vectors


def convert_rows_to_hits(rows: pa.Table, scores: Sequence[float] | None = None) -> list[Hit]:
    """Convert rows of the table `pictures` to hits, the results of a search.

    Args:
        rows: Rows with the columns that `HIT_COLUMNS` lists.
        scores: Score of each hit. None: the values of the column `score` if the rows have it, otherwise 0.

    Returns:
        Hits in the order of the rows.
    """
    if scores is None:
        scores = rows["score"].to_pylist() if "score" in rows.column_names else [0.0] * len(rows)
    hits = []
    for row, score in zip(rows.select(list(HIT_COLUMNS)).to_pylist(), scores, strict=True):
        modified = datetime.fromtimestamp(row.pop("mtime_ns") / 1e9)
        shown = {"date": row["taken"] or modified, "date_source": "camera" if row["taken"] else "file"}
        hits.append(Hit(score=float(score), modified=modified, **shown, **row))
    return hits


def newest_first_order(rows: pa.Table) -> pa.Array:
    """Return the order of rows by date, latest first. Rows with the same date are sorted by path.

    Args:
        rows: Rows with the columns path, taken (EXIF date) and mtime_ns (used if `taken` is missing).

    Returns:
        Indices of the rows, for `rows.take(indices)`.
    """
    # The dates of cameras are in local time, so the modification times of files (UTC) are converted to local time.
    offset_ns = time.localtime().tm_gmtoff * 10**9
    modified = ((rows["mtime_ns"].to_numpy() + offset_ns) // 1000).astype("datetime64[us]")
    dated = pa.table({"path": rows["path"], "date": pc.coalesce(rows["taken"], pa.array(modified))})
    return pc.sort_indices(dated, [("date", "descending"), ("path", "ascending")])


def quote_sql(text: str) -> str:
    """Return a text as an SQL string literal: in single quotes, with single quotes inside doubled."""
    return "'" + text.replace("'", "''") + "'"


def _in_clause(column: str, values: Iterable[str]) -> str:
    """Return the SQL condition that a column has one of several values.

    Args:
        column: Name of the column.
        values: Accepted values.

    Returns:
        The condition, such as "path IN ('/a.jpg', '/b.jpg')".
    """
    return f"{column} IN ({', '.join(map(quote_sql, values))})"


def folders_clause(*folders: str | Path) -> str:
    """Return the SQL condition for rows of the given files and of all files inside the given folders.

    Args:
        *folders: Absolute paths of folders or files. If no path is given, no row matches the condition.
    """
    paths = [str(folder).rstrip(os.sep) for folder in folders]
    clauses = [f"path = {quote_sql(path)} OR starts_with(path, {quote_sql(path + os.sep)})" for path in paths]
    return f"({' OR '.join(clauses) or 'false'})"


def filter_clause(
    folder: str | Path | None, since: date | None, until: date | None, other_clause: str | None = None
) -> str | None:
    """Return the SQL condition that limits a search to the pictures in a folder and of a range of days.

    Days refer to the EXIF date of a picture, or to the modification time of a file without one.

    Args:
        folder: Folder of the pictures, including its subfolders. None: all folders.
        since: First day. None: no limit.
        until: Last day, included. None: no limit.
        other_clause: Another SQL condition that the pictures must match.

    Returns:
        The SQL condition, or None if all arguments are None.

    Raises:
        ValueError: If the path of the folder is not valid UTF-8.
    """
    clauses = [other_clause] if other_clause else []
    if folder is not None:
        clauses.append(folders_clause(to_absolute_path(folder)))
    # To include the whole last day, the condition is "before the start of the next day".
    for day, sign, offset in ((since, ">=", 0), (until, "<", 1)):
        if day is not None:
            first_day = min(max(day, EARLIEST_DATE), LATEST_DATE) + timedelta(days=offset)
            start = datetime.combine(first_day, datetime.min.time())
            clauses.append(
                f"((taken IS NOT NULL AND taken {sign} timestamp '{start:%Y-%m-%d %H:%M:%S}')"
                f" OR (taken IS NULL AND mtime_ns {sign} {int(start.timestamp()) * 10**9}))"
            )
    return " AND ".join(clauses) or None


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to unit length (L2 norm of 1).

    Args:
        vectors: Array (..., width) of any float type.

    Returns:
        Array (..., width), float32.
    """
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _compact(table: Any, age: timedelta) -> None:
    """Merge the small data files of a LanceDB table, and remove old versions.

    Args:
        table: LanceDB's table.
        age: Versions of the table that are older than this duration are removed.
    """
    # LanceDB warns that other processes can't read the removed versions any more. The warning is hidden, because
    # `run_read` handles this case: it repeats a failed read with the newest version.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        table.optimize(cleanup_older_than=age)


def _build_row_scan_query(table: Any, columns: Sequence[str], clause: str | None = None) -> Any:
    """Build a LanceDB query that reads the rows matching an SQL condition.

    Args:
        table: LanceDB's table.
        columns: Names of the columns to read. Names that the table does not have are ignored.
        clause: SQL condition. None: all rows.

    Returns:
        LanceDB's query, which has not been run yet.
    """
    query = table.search().select([name for name in columns if name in table.schema.names])
    return query.where(clause) if clause else query


def _build_vector_query(table: Any, vector: np.ndarray, k: int, clause: str | None, approximate: bool = False) -> Any:
    """Build a LanceDB query for the rows whose vectors are nearest to a vector.

    Args:
        table: LanceDB's table `pictures`.
        vector: Query vector (width,).
        k: Maximum number of rows.
        clause: SQL condition that the rows must match. None: all rows.
        approximate: True: use the approximate vector index. False: compare all vectors.

    Returns:
        LanceDB's query, which has not been run yet.
    """
    column, columns = vector_column(len(vector)), comparison_columns(len(vector))
    query = table.search(np.asarray(vector, np.float32), vector_column_name=column).distance_type("cosine").limit(k)
    query = query.select([*(name for name in columns if name in table.schema.names), "_distance"])
    query = query.where(clause) if clause else query
    if not approximate:
        return query.bypass_vector_index()
    query = query.refine_factor(REFINE_FACTOR)
    # With an SQL condition, the probed partitions may contain too few matching rows. `maximum_nprobes(0)` lets LanceDB
    # probe more partitions until it has k rows. Without a condition, it would make searches 1.5 times slower.
    return query.minimum_nprobes(PROBED_PARTITIONS).maximum_nprobes(0) if clause else query.nprobes(PROBED_PARTITIONS)
