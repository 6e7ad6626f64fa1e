"""Progress of an update of an index, and the estimated time left.

The process that updates an index writes a small file into the folder of the index while it holds the lock. Other
processes, such as the page, read it. Indexes on object storage have no such file.
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
WRITE_INTERVAL_S = 0.5  # minimum time between two writes of the file
# The rate is measured over the second half of the elapsed time, but at most over this time.
RATE_WINDOW_S = 120.0

ProgressCallback = Callable[[int, int], None]  # (processed files, total)


class RateEstimator:
    """Recent number of processed pictures per second."""

    def __init__(self) -> None:
        self._measurements: list[tuple[float, int]] = []  # (time in seconds, pictures processed so far)

    def update(self, done: int) -> None:
        """Record the number of processed pictures.

        If it has not grown, the measurement starts again, because the time was spent on something else, such as loading
        the model.
        """
        if self._measurements and done <= self._measurements[-1][1]:
            self._measurements.clear()
        self._measurements.append((time.monotonic(), done))

    @property
    def rate(self) -> float | None:
        """Pictures per second, or None if there are not enough measurements."""
        if len(self._measurements) < 2:
            return None
        end, done = self._measurements[-1]
        window_start = max((end + self._measurements[0][0]) / 2, end - RATE_WINDOW_S)
        first = bisect(self._measurements[:-1], window_start, key=itemgetter(0)) - 1
        start, done_at_start = self._measurements[first]
        return (done - done_at_start) / max(end - start, 1e-9)


@contextmanager
def estimate_for(where: str, progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Extend a progress callback so that it also writes the progress file of an index, for `read_progress`.

    The file is removed at the end of the block. Nothing is written for an index on object storage. The caller must hold
    the lock of the index.

    Args:
        where: Folder or address of the index.
        progress: Callback with the number of processed pictures and the total.

    Yields:
        The extended callback.
    """
    file, estimate, last_write = Path(where, PROGRESS_FILE), RateEstimator(), float("-inf")

    def report_progress(done: int, total: int) -> None:
        nonlocal last_write
        progress(done, total)
        estimate.update(done)
        now = time.monotonic()
        if total and now - last_write >= WRITE_INTERVAL_S and "://" not in where:
            rate = estimate.rate
            left_s = round((total - done) / rate) if rate else None
            with suppress(OSError):  # if the disk is full, writing the pictures raises the error
                write_json(file, {"done": done, "total": total, "left_s": left_s})
                last_write = now

    try:
        yield report_progress
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def read_progress(where: str) -> dict[str, int | None] | None:
    """Read the progress of the update of an index that is running, or return None if none is running.

    A process that was killed leaves its progress file, but not the lock of the index.

    Returns:
        `done` and `total`, numbers of pictures, and `left_s`, the estimated seconds left (None: not known yet).
    """
    with suppress(OSError, ValueError):
        progress = read_json(Path(where, PROGRESS_FILE), done=int, total=int)
        folder = os.open(where, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            # The lock is held, so an update is running. The file is some seconds old by now.
            left_s, age_s = progress.get("left_s"), round(time.time() - os.stat(Path(where, PROGRESS_FILE)).st_mtime)
            left_s = max(0, left_s - max(0, age_s)) if type(left_s) is int else None
            return {"done": progress["done"], "total": progress["total"], "left_s": left_s}
        finally:
            os.close(folder)
    return None
