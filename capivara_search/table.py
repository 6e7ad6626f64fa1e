"""The table that an index is: one row a picture, in LanceDB, in a folder of this machine or on object storage.

    table = PictureTable("fotos.lance")
    table.create(width=512)
    table.merge(rows)                                    # as `schema(512)` has them
    table.nearest(vector, k=12, where=within("/home/maria/Fotos"))

Beside `pictures` lie two small tables: `left_out`, the files that could not be read and why, and `about`, what is known
of the whole: the model, and the folders that were indexed. Every method sees the newest whole version.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, time, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from capivara_search.index_errors import explained

if TYPE_CHECKING:
    import lancedb

LAYOUT = 1  # of the tables; a later one that this version can't read has a larger number
LAYOUT_KEY = b"capivara.layout"
EXACT_ROWS = 50_000  # up to so many pictures every vector is compared
PICTURES, LEFT_OUT, ABOUT = "pictures", "left_out", "about"
REMOTE_AGE = timedelta(seconds=5)  # how old what is known of an object storage may be: to ask costs a request
IN_ONE_CLAUSE = 500  # names

logger = logging.getLogger("capivara")

LEFT_OUT_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), False),
        pa.field("size", pa.int64(), False),  # -1 where even that can't be read
        pa.field("mtime_ns", pa.int64(), False),
        pa.field("reason", pa.string(), False),
    ]
)
ABOUT_SCHEMA = pa.schema([pa.field("key", pa.string(), False), pa.field("value", pa.string(), False)])
KEYS = {PICTURES: "path", LEFT_OUT: "path", ABOUT: "key"}


def schema(width: int) -> pa.Schema:
    """The columns of `pictures`, with vectors of `width` numbers."""
    return pa.schema(
        [
            pa.field("path", pa.string(), False),  # absolute
            pa.field("size", pa.int64(), False),  # bytes
            pa.field("mtime_ns", pa.int64(), False),
            pa.field("digest", pa.string(), False),  # BLAKE2b-128 of the file, in hexadecimal
            pa.field("width", pa.int32(), False),  # pixels, upright
            pa.field("height", pa.int32(), False),
            pa.field("taken", pa.timestamp("us")),  # the camera's local time
            pa.field("latitude", pa.float64()),  # degrees
            pa.field("longitude", pa.float64()),
            pa.field("thumbnail", pa.binary()),  # WebP
            pa.field("model", pa.string(), False),  # SearchModel.image_digest
            pa.field(vector_column(width), pa.list_(pa.float16(), width)),  # unit length
        ],
        metadata={LAYOUT_KEY: str(LAYOUT).encode()},
    )


def vector_column(width: int) -> str:
    """The column of vectors of one width: a model of another width adds its own, and drops the old one when done."""
    return f"vector_{width}"


def quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def among(column: str, values: Iterable[str]) -> str:
    """The clause for rows whose column has one of some values."""
    return f"{column} IN ({', '.join(map(quoted, values))})"


def within(folder: str | Path) -> str:
    """The clause for rows of a folder, those of its folders included, or of one file."""
    path = str(folder).rstrip(os.sep)
    return f"(path = {quoted(path)} OR starts_with(path, {quoted(path + os.sep)}))"


def taken_between(since: date | None, until: date | None) -> list[str]:
    """The clauses for pictures of some days, both included; by the file's time where no camera says when."""
    clauses = []
    for day, sign in ((since, ">="), (until and until + timedelta(days=1), "<")):
        if day is not None:
            start = datetime.combine(day, time())
            modified = int(start.timestamp()) * 10**9
            clauses.append(
                f"((taken IS NOT NULL AND taken {sign} timestamp '{start:%Y-%m-%d %H:%M:%S}')"
                f" OR (taken IS NULL AND mtime_ns {sign} {modified}))"
            )
    return clauses


def is_remote(where: str) -> bool:
    """Whether an index lies on object storage."""
    return "://" in where


class PictureTable:
    """The tables of one index.

    Args:
        where: folder, or address such as s3://bucket/fotos.

    Raises:
        ValueError: something else lies there, or an index of a newer version.
        OSError: it may not be read.
    """

    def __init__(self, where: str | Path):
        self.where = str(where)
        self.remote = is_remote(self.where)
        if not self.remote:
            self.where = str(Path(self.where).expanduser().absolute())
            self._check_folder()
        self._tables: dict[str, Any] = {}
        self._mixed: tuple[int, str, int] | None = None

    def _check_folder(self) -> None:
        folder = Path(self.where)
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise ValueError(f"The index {folder} is a file; an index is a folder. Choose another place.")
        with explained(self.where):
            names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if names and f"{PICTURES}.lance" not in names and not any(f"{name}.lance" in names for name in KEYS):
            raise ValueError(
                f"The folder {folder} is no index: it holds other files, such as {names[0]}. Choose another place for "
                "the index; pictures are added to it with `add`."
            )

    @cached_property
    def _connection(self) -> "lancedb.DBConnection":
        import lancedb  # here: it takes a second

        age = REMOTE_AGE if self.remote else timedelta(0)
        with explained(self.where):
            return lancedb.connect(self.where, read_consistency_interval=age, storage_options=storage_options())

    def exists(self) -> bool:
        """Whether there is an index yet."""
        return self._open(PICTURES) is not None

    def _open(self, name: str) -> Any:
        """One of the tables, or None where it is not there."""
        if name not in self._tables:
            if not self.remote and not Path(self.where, f"{name}.lance").is_dir():
                return None
            with explained(self.where, name):
                try:
                    table = self._connection.open_table(name)
                except ValueError as error:
                    if "was not found" in str(error):
                        return None
                    raise
            if name == PICTURES:
                self._check_layout(table.schema)
            self._tables[name] = table
        return self._tables[name]

    def _check_layout(self, found: pa.Schema) -> None:
        number = (found.metadata or {}).get(LAYOUT_KEY, b"").decode(errors="replace")
        if not number.isdigit():
            raise ValueError(f"The table at {self.where} was not made by capivara. Choose another place for the index.")
        if int(number) > LAYOUT:
            raise ValueError(
                f"The index {self.where} has layout {number}, this version of capivara reads up to {LAYOUT}. "
                "Install a newer one, or make an index of your own at another place."
            )

    def create(self, width: int) -> None:
        """Make what is missing of the tables, and the column for vectors of this width."""
        for name, columns in ((ABOUT, ABOUT_SCHEMA), (LEFT_OUT, LEFT_OUT_SCHEMA), (PICTURES, schema(width))):
            if self._open(name) is None:
                with explained(self.where, name):
                    Path(self.where).mkdir(parents=True, exist_ok=True) if not self.remote else None
                    self._connection.create_table(name, schema=columns, exist_ok=True)
            table = self._open(name)
            if b"lance-schema:unenforced-primary-key:position" not in (table.schema.field(KEYS[name]).metadata or {}):
                with explained(self.where, name):  # two who insert the same key at once are told apart by it
                    table.set_unenforced_primary_key(KEYS[name])
        if vector_column(width) not in self.pictures.schema.names:
            with explained(self.where, PICTURES):
                self.pictures.add_columns(pa.schema([schema(width).field(vector_column(width))]))

    @property
    def pictures(self) -> Any:
        """The table of pictures. Raises ValueError where there is no index."""
        table = self._open(PICTURES)
        if table is None:
            raise ValueError(f"There is no index at {self.where}. Make it by adding a folder of pictures.")
        return table

    def widths(self) -> list[int]:
        """Of the columns of vectors."""
        return [f.type.list_size for f in self.pictures.schema if pa.types.is_fixed_size_list(f.type)]

    # --- what is read

    def rows(self, columns: Sequence[str], where: str | None = None, table: str = PICTURES) -> pa.Table:
        """Some columns of all rows, or of those of a clause; empty where the table is not there."""
        opened = self._open(table)
        if opened is None:
            return {PICTURES: schema(1), LEFT_OUT: LEFT_OUT_SCHEMA, ABOUT: ABOUT_SCHEMA}[table].empty_table()
        with explained(self.where, table):
            query = opened.search().select(list(columns))
            return (query.where(where) if where else query).to_arrow()

    def batches(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """`rows`, a part at a time."""
        with explained(self.where, PICTURES):
            query = self.pictures.search().select(list(columns))
            yield from (query.where(where) if where else query).to_batches(batch_size=4096)

    def count(self, where: str | None = None, table: str = PICTURES) -> int:
        """Rows, all or those of a clause."""
        opened = self._open(table)
        if opened is None:
            return 0
        with explained(self.where, table):
            return opened.count_rows(where)

    def version(self) -> int:
        """A number that grows with every change."""
        return sum(table.version for name in KEYS if (table := self._open(name)) is not None)

    def of_other_models(self, image_digest: str) -> int:
        """How many rows hold vectors of other models."""
        version = self.pictures.version
        if self._mixed is None or self._mixed[:2] != (version, image_digest):
            self._mixed = version, image_digest, self.count(f"model != {quoted(image_digest)}")
        return self._mixed[2]

    def nearest(
        self, vector: np.ndarray, k: int, columns: Sequence[str], where: str | None = None, exact: bool = False
    ) -> pa.Table:
        """The rows nearest to a vector, nearest first, with their vectors as `vector`.

        Args:
            vector: (width,).
            k: rows at most.
            columns: that are wanted of them.
            where: clause that they meet.
            exact: compare every vector, in an index of any size.
        """
        column = vector_column(len(vector))
        with explained(self.where, PICTURES):
            query = self.pictures.search(np.asarray(vector, np.float32), vector_column_name=column)
            query = query.distance_type("cosine").limit(k).select([*columns, column, "_distance"])
            if where:
                query = query.where(where)
            if exact:
                query = query.bypass_vector_index()
            found = query.to_arrow()
        return found.rename_columns(["vector" if name == column else name for name in found.column_names])

    # --- what is written

    def merge(self, rows: pa.Table, table: str = PICTURES) -> None:
        """Write rows in one piece, in place of those of the same path."""
        with explained(self.where, table):
            merge = self._open(table).merge_insert(KEYS[table])
            merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def remove(self, paths: Sequence[str], table: str = PICTURES) -> None:
        """Remove the rows of some paths."""
        with explained(self.where, table):
            for start in range(0, len(paths), IN_ONE_CLAUSE):
                self._open(table).delete(among(KEYS[table], paths[start : start + IN_ONE_CLAUSE]))

    def remove_where(self, where: str, table: str = PICTURES) -> int:
        """Remove the rows of a clause; returns how many there were."""
        number = self.count(where, table)
        if number:
            with explained(self.where, table):
                self._open(table).delete(where)
        return number

    # --- what is known of the whole

    def about(self) -> dict[str, str]:
        """Key -> value."""
        rows = self.rows(["key", "value"], table=ABOUT)
        return dict(zip(rows["key"].to_pylist(), rows["value"].to_pylist(), strict=True))

    def note(self, values: dict[str, str]) -> None:
        """Set some of `about`."""
        known = self.about()
        if changed := {key: value for key, value in values.items() if known.get(key) != value}:
            columns = {"key": list(changed), "value": list(changed.values())}
            self.merge(pa.table(columns, schema=ABOUT_SCHEMA), ABOUT)

    def model(self) -> dict[str, Any] | None:
        """Source, name, width and image_digest of the model that pictures were embedded with last."""
        with suppress(KeyError, ValueError):
            return json.loads(self.about()["model"])
        return None


def storage_options() -> dict[str, str] | None:
    """For the driver of object storage: what boto's variables of the environment say and its own do not."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if endpoint is None:
        return None
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


@contextmanager
def locked(table: PictureTable) -> Iterator[None]:
    """Be the only one who adds to an index in a folder; who comes second waits, and says so.

    On object storage there is no lock: rows of the same path are told apart by their key.
    """
    from capivara_search.common.files import lock_folder

    if table.remote:
        yield
        return
    lock, said = None, False
    while lock is None:
        try:
            lock = lock_folder(Path(table.where))
        except BlockingIOError:
            if not said:
                logger.info("Another process is adding to %s; waiting until it has ended.", table.where)
                said = True
            import time as clock

            clock.sleep(0.2)
        except OSError:  # a disk without locks
            break
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
