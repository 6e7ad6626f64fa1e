"""Pictures are prefetched in order, in batches, within a bound of memory."""

import random
import threading
import time
from contextlib import closing

import PIL.Image

from capivara_search.folder_scan import FileState
from capivara_search.indexing import prefetch_pictures
from capivara_search.picture_reading import Picture

SIDE = 10


def files(number: int) -> list[FileState]:
    return [FileState(f"/f/{i}", i, 0) for i in range(number)]


def picture(file: FileState) -> Picture:
    image = PIL.Image.new("RGB", (SIDE, SIDE))
    return Picture(str(file.size), SIDE, SIDE, None, None, None, image, b"")


def test_all_pictures_come_in_order_and_the_first_batch_is_small():
    rng = random.Random(0)

    def read(file: FileState) -> Picture:
        time.sleep(rng.random() / 500)
        if file.size % 7 == 3:
            raise ValueError(str(file.size))
        return picture(file)

    batches = list(prefetch_pictures(files(100), read, 8))
    results = [(file, result) for batch in batches for file, result in batch]
    assert [file for file, _ in results] == files(100)
    assert all(isinstance(result, ValueError) == (file.size % 7 == 3) for file, result in results)
    assert [len(batch) for batch in batches] == [4, *[8] * 12]


def test_at_most_two_batches_are_read_ahead():
    waiting, max_waiting, lock = 0, 0, threading.Lock()

    def read(file: FileState) -> Picture:
        nonlocal waiting, max_waiting
        with lock:
            waiting += 1
            max_waiting = max(max_waiting, waiting)
        return picture(file)

    for batch in prefetch_pictures(files(60), read, 8):
        time.sleep(0.005)  # stands for the model, while the threads continue
        with lock:
            waiting -= len(batch)
    assert 8 < max_waiting <= 2 * 8 + len(batch)


def test_closing_the_iterator_ends_the_threads():
    thread_count = threading.active_count()
    with closing(prefetch_pictures(files(1000), picture, 4)) as batches:
        next(batches)
    assert threading.active_count() == thread_count
