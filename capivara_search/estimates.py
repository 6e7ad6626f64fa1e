"""How far an indexing is, and when it will have ended: for the bar of a command, and for the page, in another process.

A small file in the folder of the index says it, as long as who writes it holds the index's lock.
"""

import fcntl
import os
import time
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path

from capivara_common.files import read_json, write_json

PROGRESS_FILE = ".progress.json"
WRITE_INTERVAL_S = 0.5  # that the file is written
RATE_WINDOW_S = 120.0  # a rate is that of the later half of the time so far, and of no more than this

ProgressCallback = Callable[[int, int], None]


class RateEstimator:
    """Pictures a second of late."""

    def __init__(self) -> None:
        self._measurements: list[tuple[float, int]] = []  # seconds, pictures done until then

    def update(self, done: int) -> None:
        """So many are done now; as many as before, and the time begins now: a model was loaded."""
        if self._measurements and done <= self._measurements[-1][1]:
            self._measurements.clear()
        self._measurements.append((time.monotonic(), done))

    @property
    def rate(self) -> float | None:
        """Pictures a second; None where that is not known yet."""
        if len(self._measurements) < 2:
            return None
        end, done = self._measurements[-1]
        since = max((end + self._measurements[0][0]) / 2, end - RATE_WINDOW_S)
        start, before = self._measurements[bisect(self._measurements[:-1], since, key=itemgetter(0)) - 1]
        return (done - before) / max(end - start, 1e-9)


@contextmanager
def estimate_for(where: str, progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """`progress`, which also writes how far it is beside the index, for `progress_of`; on object storage it does not.

    Called by who has the lock of the index.
    """
    file, estimate, written = Path(where, PROGRESS_FILE), RateEstimator(), float("-inf")

    def tell(done: int, total: int) -> None:
        nonlocal written
        progress(done, total)
        estimate.update(done)
        now = time.monotonic()
        if total and now - written >= WRITE_INTERVAL_S and "://" not in where:
            left_s = round((total - done) / rate) if (rate := estimate.rate) else None
            with suppress(OSError):  # a disk that is full is said where pictures are written
                write_json(file, {"done": done, "total": total, "left_s": left_s})
                written = now

    try:
        yield tell
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def read_progress(where: str) -> dict[str, int | None] | None:
    """What `told` says of an index; None where nobody adds to it: who was killed leaves the file, and no lock."""
    with suppress(OSError, ValueError):
        found = read_json(Path(where, PROGRESS_FILE), done=int, total=int)
        folder = os.open(where, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            left_s, age_s = found.get("left_s"), round(time.time() - os.stat(Path(where, PROGRESS_FILE)).st_mtime)
            left_s = max(0, left_s - max(0, age_s)) if type(left_s) is int else None
            return {"done": found["done"], "total": found["total"], "left_s": left_s}
        finally:
            os.close(folder)
    return None
