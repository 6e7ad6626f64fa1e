"""The three tables of an index, opened and written: waiting for others, and going on without what is damaged.

    tables = Tables("fotos.lance")
    with tables.locked():
        tables.create(width=512)
        tables.write("left_out", lambda table: table.delete("true"))
    tables.read("pictures", lambda table: table.count_rows())

Every call sees the newest version, whole. What can't be read of a damaged index is named in the log, and the rest
serves; who holds the lock takes it out for good, so that its pictures are embedded again.
"""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

from capivara_common.files import lock_folder
from capivara_search import damage
from capivara_search.index_errors import DamagedIndex, explained, explanation, is_conflict, is_of_damage, is_of_storage
from capivara_search.picture_columns import EMPTY, KEYS, PICTURES, THUMBNAIL, check_layout, schema, vector_column

if TYPE_CHECKING:
    import lancedb

REMOTE_AGE = timedelta(seconds=1)  # how old what is known of an object storage may be: to ask costs a request
CACHE_BYTES = 640 << 20  # of the approximate index in memory; that of 1,000,000 pictures of 512 numbers needs 520 MiB
TRIES = 12  # of a write that others' writes get in the way of
LOCK_EVERY_S = 0.2
FAILURES = (RuntimeError, OSError, ValueError)  # what LanceDB raises
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
NO_ADDRESS = re.compile(r'[^!-~]|["<>\\^`{|}]')  # letters that stand in none: the driver of object storage panics

T = TypeVar("T")
logger = logging.getLogger("capivara")


class Tables:
    """The tables of one index.

    Args:
        where: folder, or address such as s3://bucket/fotos.

    Raises:
        ValueError: something else lies there.
        OSError: it may not be read.
    """

    def __init__(self, where: str | Path):
        self.where = str(where)
        self.remote = "://" in self.where
        if not self.remote:
            self.where = str(Path(self.where).expanduser().absolute())
            self._check_folder()
        self.repairs = False  # whether what is damaged is taken out, and not only left out
        self._tables: dict[str, Any] = {}
        self._rests: dict[str, tuple[int, Any]] = {}  # name -> version, and the view of what can be read of it

    def _check_folder(self) -> None:
        folder = Path(self.where)
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise ValueError(f"The index {folder} is a file; an index is a folder. Choose another place.")
        with explained(self.where):
            names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if names and not any(f"{name}.lance" in names for name in KEYS):
            raise ValueError(
                f"The folder {folder} is no index: it holds other files, such as {names[0]}. Choose another place for "
                "the index, and add the folder's pictures to it."
            )

    @cached_property
    def _connection(self) -> "lancedb.DBConnection":
        import lancedb  # here: it takes a second

        with explained(self.where):
            return lancedb.connect(
                self.where,
                read_consistency_interval=REMOTE_AGE if self.remote else timedelta(0),
                storage_options=storage_options() if self.remote else None,
                session=lancedb.Session(index_cache_size_bytes=CACHE_BYTES),
            )

    def address(self, name: str) -> str:
        """Of one of the tables."""
        return f"{self.where.rstrip('/')}/{name}.lance"

    def table(self, name: str) -> Any:
        """One of the tables, or None where it is not there.

        Raises:
            ValueError: it is damaged, of a newer version, or not ours.
            OSError: it may not be read.
        """
        if name not in self._tables:
            with explained(self.where):
                if not self.remote and not Path(self.address(name)).is_dir():
                    return None
            try:
                table = self._connection.open_table(name)
            except FAILURES as error:
                if "was not found" in str(error):
                    self._check_missing(name, error)
                    return None
                table = self._reopened(name, error)
            if name == PICTURES:
                check_layout(table.schema, self.where)
            self._tables[name] = table
        return self._tables[name]

    def _check_missing(self, name: str, error: Exception) -> None:
        """Raise DamagedIndex where pictures are there, and only the record of their files is not."""
        if name == PICTURES and not self.remote and any(Path(self.address(name), "data").glob("*")):
            raise DamagedIndex(self._without_record(name)) from error

    def _without_record(self, name: str) -> str:
        return (
            f"The index {self.where} is damaged: no record of its files is left in {self.address(name)}/_versions that "
            "this LanceDB can read. Upgrade lancedb where a newer one wrote it; else restore it from a copy, or remove "
            "the index and add the pictures again."
        )

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
        for name in (*sorted(KEYS.keys() - {PICTURES}), PICTURES):  # an index is there when its pictures are
            if self.table(name) is None:
                columns = schema(width) if name == PICTURES else EMPTY[name]
                self._again(name, partial(self._connection.create_table, name, schema=columns, exist_ok=True))
        if width not in self.widths():
            column = pa.schema([schema(width).field(vector_column(width))])
            self.write(PICTURES, lambda table: None if width in self.widths() else table.add_columns(column))

    def columns(self) -> pa.Schema:
        """Of the pictures, as they are now."""
        return self.read(PICTURES, lambda table: table.schema)

    def widths(self) -> list[int]:
        """Of the columns of vectors."""
        return [one.type.list_size for one in self.columns() if pa.types.is_fixed_size_list(one.type)]

    def version(self) -> int:
        """A number that grows with every change."""
        return sum(self.version_of(name) for name in KEYS)

    def version_of(self, name: str) -> int:
        """`version`, of one table."""
        table = self.table(name)
        with explained(self.where, name):
            return 0 if table is None else table.version

    # --- reading and writing

    def read(self, name: str, operation: Callable[[Any], T]) -> T:
        """What an operation on a table returns; where a part of the table is damaged, without that part."""
        table = self.pictures if name == PICTURES else self.table(name)
        with explained(self.where, name):
            if self.is_damaged(name):
                return operation(self._rests[name][1])
            try:
                return operation(table)
            except FAILURES as error:
                if is_of_storage(error, self.where):
                    raise
            try:
                table.checkout_latest()
                return operation(table)  # its files may have been compacted away while they were read
            except FAILURES as error:
                return operation(self._rest(name, table, error))

    def write(self, name: str, operation: Callable[[Any], T]) -> T:
        """What an operation that changes a table returns; where another one writes at that moment, it is done again."""

        def newest() -> T:
            return operation(self.table(name))

        return self._again(name, newest, lambda: self.table(name).checkout_latest())

    def _again(self, name: str, call: Callable[[], T], before: Callable[[], Any] | None = None) -> T:
        """What a call returns that changes a table; tried again while others' writes get in its way."""
        with explained(self.where, name):
            for left in reversed(range(TRIES)):
                try:
                    return call()
                except FAILURES as error:
                    if not is_conflict(error) or not left:
                        raise
                time.sleep(random.uniform(0.05, 0.2) * (TRIES - left))
                if before:
                    before()
        raise AssertionError("unreachable")

    @contextmanager
    def locked(self, repairs: bool = True) -> Iterator[None]:
        """Be the only one who adds to an index in a folder; who comes second waits, and says so.

        On object storage there is no lock: rows of one path are told apart by their key.

        Args:
            repairs: take out what is found to be damaged.
        """
        lock = None if self.remote else self._lock()
        self.repairs = repairs
        self._rests.clear()
        self._tables.clear()  # some may stand in for what can't be read
        try:
            yield
        finally:
            self.repairs = False
            if lock is not None:
                with suppress(OSError):  # it is not empty, as it is where nothing was made
                    Path(self.where).rmdir()
                os.close(lock)

    def _lock(self) -> int | None:
        """The folder, made where it is missing, and locked; None on a disk without locks."""
        folder, waits = Path(self.where), False
        while True:
            try:
                with explained(self.where):
                    folder.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(folder)
                with suppress(FileNotFoundError):  # who had it may have removed it
                    if os.path.samestat(os.fstat(lock), os.stat(folder)):
                        return lock
                os.close(lock)
            except BlockingIOError:
                if not waits:
                    logger.warning("Another process is adding to %s; waiting until it has ended.", self.where)
                waits = True
                time.sleep(LOCK_EVERY_S)
            except PermissionError as error:
                raise explanation(error, self.where) from error
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    return None
                raise

    # --- damaged parts

    def is_damaged(self, name: str) -> bool:
        """Whether a part of the table's present version is known to be damaged."""
        if name in self._rests and self._rests[name][0] != self.version_of(name):
            del self._rests[name]
        return name in self._rests

    def _reopened(self, name: str, error: Exception) -> Any:
        """A table that can't be opened as it is."""
        if is_of_storage(error, self.where) or self.remote:
            raise explanation(error, self.where, name) from error
        while record := damage.set_newest_aside(Path(self.address(name))):
            logger.warning(
                "%s is damaged: its file _versions/%s was set aside, and the version before it serves. Add the folders "
                "again.", self.address(name), record,
            )  # fmt: skip
            with suppress(*FAILURES):
                return self._connection.open_table(name)
        if name == PICTURES:
            raise DamagedIndex(self._without_record(name)) from error
        return self._emptied(name, error)

    def _rest(self, name: str, table: Any, error: Exception) -> Any:
        """What can be read of a damaged table; raises `error` where nothing is found to be damaged."""
        if name != PICTURES:
            return self._emptied(name, error)
        names = [column for column in table.schema.names if self.repairs or column != THUMBNAIL]
        lost = damage.damaged_fragments(table, names)
        if not lost:
            raise error
        number = sum(table.count_rows(damage.clause_of(fragment)) for fragment in lost)
        logger.warning(
            "%s is damaged: %d of %d pictures can't be read (%s). The others are found; add the folders again to embed "
            "those anew.", self.address(name), number, table.count_rows(), damage.detail(error),
        )  # fmt: skip
        if self.repairs:
            damage.remove(lost, table)
            return table
        self._rests[name] = (
            table.version,
            damage.without(lost, table, self.address(name), storage_options() if self.remote else None),
        )
        return self._rests[name][1]

    def repair(self) -> None:
        """Take out what can't be read, thumbnails included; every file is read."""
        with explained(self.where, PICTURES):
            damage.remove(damage.damaged_fragments(self.pictures, self.pictures.schema.names), self.pictures)

    def _emptied(self, name: str, error: Exception) -> Any:
        """An empty table in place of a damaged one, for good where repairs are made."""
        if not is_of_damage(error):
            raise error  # such as too many open files: what lies there may be whole
        logger.warning("%s is damaged and taken for empty: %s", self.address(name), damage.detail(error))
        if not self.repairs:
            return damage.empty_table(EMPTY[name])
        with suppress(*FAILURES):
            self._connection.drop_table(name)
        table = self._connection.create_table(name, schema=EMPTY[name], mode="overwrite")
        self._tables[name] = table
        return table


def storage_options() -> dict[str, str] | None:
    """For the driver of object storage: what boto's variables of the environment say and its own do not.

    Raises:
        ValueError: the address of the storage is none; it is not repeated, since a password may stand in it.
    """
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return None
    try:
        parts = urlsplit(endpoint)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # of the port, which a password with a slash is taken for
        known = False
    if not known or NO_ADDRESS.search(endpoint):
        raise ValueError(
            "AWS_ENDPOINT_URL must be an address such as https://host:9000. In a password, / is written %2F and @ %40."
        )
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


def plain(table: Any, columns: Sequence[str], where: str | None = None) -> Any:
    """A query for some columns of all rows, or of those of a clause."""
    query = table.search().select(list(columns))
    return query.where(where) if where else query
