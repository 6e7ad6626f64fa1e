"""The translation memory: each distinct sentence is translated once, in this run, in the next one, on every machine.

    python -m captions.memory data/pt.memory

It is a folder with one SQLite file a shard, `0-of-4.sqlite`. A file has one writer, which holds a lock on it as long as
it lives, and a second one is refused; all others read it. The command merges the files of a folder into
`merged.sqlite`, which later runs read like any other. What a translation was made with (back end, model, languages,
settings) is part of its key.
"""

from common.start import start_command

if __name__ == "__main__":
    start_command()

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import sqlite3
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.cli import run_command

logger = logging.getLogger("capivara")

MERGED = "merged.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS translators (translator TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS translations (
    translator TEXT NOT NULL, source TEXT NOT NULL, translation TEXT NOT NULL, PRIMARY KEY (translator, source)
) WITHOUT ROWID;
"""
SENTENCES_A_QUERY = 500  # SQLite takes 32,766 parameters, builds of distributions fewer
WRITER_WAITS_S = 60  # for readers, who hold a file for the moment of a query
READER_WAITS_S = 2  # for the writer of another shard; what can't be read is translated
LISTED_EVERY_S = 60  # how soon files of shards that started later are found


def translator_key(fingerprint: dict[str, Any]) -> str:
    """Hex digest of what a translation depends on beside its sentence."""
    text = json.dumps(fingerprint, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class TranslationMemory:
    """The translations of one translator: those of this shard's file, which grows, and those of all others.

    Args:
        folder: of the files; made where it is missing.
        index: of this shard.
        count: of the shards.
        fingerprint: of the translator.

    Raises:
        ValueError: another process writes the file of this shard, or it is no file of this kind.
        OSError: the folder can't be written to, or its disk has no locks.
    """

    def __init__(self, folder: Path, index: int, count: int, fingerprint: dict[str, Any]):
        self.path = folder / f"{index}-of-{count}.sqlite"
        self.translator = translator_key(fingerprint)
        self._lock = _claim(self.path)
        self._others: dict[Path, sqlite3.Connection | None] = {}  # None: could not be read, and was named
        self._listed = -float("inf")
        try:
            self._own = _opened(self.path)
            with _told(self.path), self._own:
                row = (self.translator, json.dumps(fingerprint, sort_keys=True, ensure_ascii=False))
                self._own.execute("INSERT OR IGNORE INTO translators VALUES (?, ?)", row)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "TranslationMemory":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [self._own, *filter(None, self._others.values())]:
            connection.close()
        os.close(self._lock)

    def find(self, sentences: Iterable[str]) -> dict[str, str]:
        """Sentence -> translation, of those that are known."""
        missing = dict.fromkeys(sentences)
        with _told(self.path):
            found = _read(self._own, self.translator, missing)
        for path in self._readable():
            missing = [sentence for sentence in missing if sentence not in found]
            if not missing:
                break
            try:
                found |= _read(self._others[path], self.translator, missing)
            except sqlite3.Error as error:  # a killed writer left a half of a transaction, or a writer is slow
                self._give_up(path, error)
        return found

    def add(self, translations: dict[str, str]) -> None:
        """Keep translations, all or none of them.

        Raises:
            OSError: the disk is full.
        """
        rows = [(self.translator, source, translation) for source, translation in translations.items()]
        with _told(self.path), self._own:
            self._own.executemany("INSERT OR REPLACE INTO translations VALUES (?, ?, ?)", rows)

    def _readable(self) -> list[Path]:
        """Files of others, those that appeared meanwhile included."""
        if time.monotonic() - self._listed > LISTED_EVERY_S:
            self._listed = time.monotonic()
            for path in sorted(self.path.parent.glob("*.sqlite")):
                if path != self.path and self._others.get(path) is None:
                    self._open_other(path)
        return [path for path, connection in self._others.items() if connection]

    def _open_other(self, path: Path) -> None:
        # Not `immutable=1`: it reads without locks, and would see the halves of what the writer is writing.
        address = f"file:{urllib.parse.quote(str(path.resolve()))}?mode=ro"
        try:
            self._others[path] = sqlite3.connect(address, uri=True, timeout=READER_WAITS_S)
        except sqlite3.Error as error:
            self._give_up(path, error)

    def _give_up(self, path: Path, error: sqlite3.Error) -> None:
        """Until the next listing: what `path` knows is translated again."""
        if path not in self._others or self._others[path]:
            logger.warning("The translations in %s can't be read now (%s); it is done without them.", path, error)
        if self._others.get(path):
            self._others[path].close()
        self._others[path] = None


@dataclass(frozen=True)
class Merged:
    """What a merge did: files read, translations in the merged file, and sentences that files translate differently."""

    files: int
    translations: int
    conflicts: int


def merge(folder: Path) -> Merged:
    """Put the translations of all files of a folder into `merged.sqlite`, which appears whole or not at all.

    Where two files translate a sentence differently, because two shards met it at the same moment, an earlier merge has
    the first word, then the files have it by name. The files of the shards stay; nothing needs them any longer. Waits
    for another merge of the folder to end: two shards that end at once shall not give way to one another.

    Raises:
        ValueError: there is none, or a process is still writing one.
        OSError: the disk is full.
    """
    target = folder / MERGED
    if not any(folder.glob("*.sqlite")):
        raise ValueError(f"{folder} holds no translation memory, no file *.sqlite.")
    with ExitStack() as held:  # given up in reverse, so that who waits for the first finds all of them free
        held.callback(os.close, _claim(target, wait=True))
        paths = sorted(folder.glob("*.sqlite"), key=lambda path: (path != target, path.name))
        for path in paths:
            if path != target:
                held.callback(os.close, _claim(path))
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{MERGED}.")
        os.close(handle)
        held.callback(Path(name).unlink, missing_ok=True)
        with closing(_opened(Path(name))) as connection, _told(target):
            conflicts = sum(_take_over(connection, path) for path in paths)
            (translations,) = connection.execute("SELECT count(*) FROM translations").fetchone()
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, target)
    return Merged(len(paths), translations, conflicts)


def _take_over(connection: sqlite3.Connection, path: Path) -> int:
    """Add what a file has more; returns the number of sentences that it translates differently."""
    _opened(path).close()  # what a killed writer left is undone
    with _told(path):
        connection.execute("ATTACH ? AS other", (str(path),))
    with connection:
        (conflicts,) = connection.execute(
            "SELECT count(*) FROM translations AS one JOIN other.translations AS two USING (translator, source) "
            "WHERE one.translation != two.translation"
        ).fetchone()
        for table in ("translators", "translations"):
            connection.execute(f"INSERT OR IGNORE INTO main.{table} SELECT * FROM other.{table}")
    connection.execute("DETACH other")
    return conflicts


def _claim(path: Path, wait: bool = False) -> int:
    """A lock on a file, held until it is closed or this process ends, however it ends.

    Where another process has it, this one waits if it shall, else that is a ValueError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(handle, path, wait)
        os.ftruncate(handle, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%F %T} UTC"
        os.write(handle, owner.encode())
    except BaseException:
        os.close(handle)
        raise
    return handle


def _lock(handle: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(handle, 300, 0).decode("utf-8", "replace") or "another process"
        if not wait:
            raise ValueError(
                f"{path} is being written by {owner}, and a file has one writer. Wait for it, or give another --shard "
                "or another --memory."
            ) from error
        logger.info("%s is being written by %s. Waiting for it.", path, owner)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        raise OSError(
            error.errno, f"{path.parent} is on a disk without locks ({error.strerror}); give another --memory"
        ) from error


def _opened(path: Path) -> sqlite3.Connection:
    """For writing, with the tables; what a killed process left half-written is undone."""
    with _told(path):
        connection = sqlite3.connect(path, timeout=WRITER_WAITS_S)
        try:
            # A write-ahead log needs memory that all processes share, which machines do not.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.executescript(SCHEMA)
        except BaseException:
            connection.close()
            raise
    return connection


def _read(connection: sqlite3.Connection, translator: str, sentences: Iterable[str]) -> dict[str, str]:
    found, sentences = {}, list(sentences)
    for start in range(0, len(sentences), SENTENCES_A_QUERY):
        some = sentences[start : start + SENTENCES_A_QUERY]
        marks = ", ".join("?" * len(some))
        query = f"SELECT source, translation FROM translations WHERE translator = ? AND source IN ({marks})"
        found |= dict(connection.execute(query, (translator, *some)))
    return found


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into those of this project."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_FULL:
            raise OSError(
                errno.ENOSPC, f"No space left on the disk of {path}; what it holds stays. Free some, and run it again"
            ) from error
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise ValueError(f"{path} is damaged, or no translation memory ({error}). Move it away.") from error
        raise OSError(f"{path}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    try:
        merged = merge(Path(arguments[0]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{merged.translations:,} translations of {merged.files} files are in {Path(arguments[0]) / MERGED}; "
        f"{merged.conflicts:,} sentences had more than one, and the first was kept."
    )


if __name__ == "__main__":
    run_command(main)
