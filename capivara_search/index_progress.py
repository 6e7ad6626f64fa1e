"""Measure the progress of an index update, estimate the time left, and make both available to other processes.

The process that updates an index writes its progress to a small file in the folder of the index. Other processes, such
as the server of the web page, read this file. An index on object storage has no progress file.
"""

import os
import time
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path

from capivara_common.files import locked_folder, read_json, write_json

PROGRESS_FILE = ".progress.json"
WRITE_INTERVAL_S = 0.5  # minimum seconds between two writes of the progress file, so that writing costs hardly any time
# The speed is measured over the second half of the time since the start, but at most over this many seconds. An average
# over the whole update would hardly show that the speed has changed, for example because the machine has become busy.
RATE_WINDOW_S = 120.0

ProgressCallback = Callable[[int, int], None]  # arguments: number of processed files, total number of files


class RateEstimator:
    """Estimator of the current speed of an index update, from which the remaining time is computed.

    Call `update` whenever pictures have been processed. `rate` is then the speed in pictures per second.
    """

    def __init__(self) -> None:
        self._measurements: list[tuple[float, int]] = []  # (time in seconds, pictures processed so far)

    def update(self, done: int) -> None:
        """Record how many pictures have been processed up to now.

        The same number as in the previous call means that the time since then was spent on something else, such as
        loading the model. In this case, earlier measurements are discarded.

        Args:
            done: Number of pictures that have been processed since the start of the update.
        """
        if self._measurements and done <= self._measurements[-1][1]:
            self._measurements.clear()
        self._measurements.append((time.monotonic(), done))

    @property
    def rate(self) -> float | None:
        """Current speed of the update in pictures per second, or None while there are fewer than two measurements.

        Each call of `update` is a measurement. The speed is computed over the second half of the time since the first
        measurement, but at most over the last `RATE_WINDOW_S` seconds.
        """
        if len(self._measurements) < 2:
            return None
        end, done = self._measurements[-1]
        window_start = max((end + self._measurements[0][0]) / 2, end - RATE_WINDOW_S)
        first = bisect(self._measurements[:-1], window_start, key=itemgetter(0)) - 1
        start, done_at_start = self._measurements[first]
        return (done - done_at_start) / max(end - start, 1e-9)


@contextmanager
def mirror_progress_to_file(where: str, progress: ProgressCallback | None) -> Iterator[ProgressCallback]:
    """Extend a progress callback so that each call also updates the progress file of an index.

    The file is removed at the end of the `with` block. For an index on object storage, no file is written. The caller
    must hold the lock of the index.

    Args:
        where: Folder or address of the index.
        progress: Callback that takes the number of processed pictures and the total number. None: only the file is
            written.

    Yields:
        The extended callback, which takes the same two numbers.
    """
    file, estimate, last_write = Path(where, PROGRESS_FILE), RateEstimator(), float("-inf")

    def report_progress(done: int, total: int) -> None:
        """Call `progress`. Write the progress file if it was not written in the last `WRITE_INTERVAL_S` seconds."""
        nonlocal last_write
        if progress:
            progress(done, total)
        estimate.update(done)
        now = time.monotonic()
        if total and now - last_write >= WRITE_INTERVAL_S and "://" not in where:
            rate = estimate.rate
            left_s = round((total - done) / rate) if rate else None
            # A full disk must not stop the update here. The error is reported later, when rows of pictures are written.
            with suppress(OSError):
                write_json(file, {"done": done, "total": total, "left_s": left_s})
                last_write = now

    try:
        yield report_progress
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def read_progress_of_running_update(where: str) -> dict[str, int | None] | None:
    """Return the progress of an index update that is running in any process.

    If a killed process has left its progress file behind, or the file system has no locks, the file is removed.

    Args:
        where: Folder or address of the index.

    Returns:
        A dictionary with the keys "done" (number of processed pictures), "total" (number of pictures to process) and
        "left_s" (estimated seconds left, or None while there is no estimate). None instead of a dictionary if no update
        is running, or the file system has no locks.
    """
    with suppress(OSError, ValueError):
        file = Path(where, PROGRESS_FILE)
        progress = read_json(file, done=int, total=int)
        try:
            # The lock is free if no update is running (the system frees the lock of a killed process), or if the file
            # system has no locks. The file is removed, so that later calls return without taking the lock. While a call
            # holds the lock, an update that starts has to wait.
            with locked_folder(file.parent):
                file.unlink()
        except BlockingIOError:
            # Another process holds the lock, so an update is running. The estimate was made when the file was written.
            # Therefore the age of the file is subtracted from the estimate.
            left_s, age_s = progress.get("left_s"), round(time.time() - os.stat(file).st_mtime)
            left_s = max(0, left_s - max(0, age_s)) if type(left_s) is int else None
            return {"done": progress["done"], "total": progress["total"], "left_s": left_s}
    return None
