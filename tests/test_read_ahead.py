"""Pictures decoded ahead of the model: in order, in batches, within a bound of memory."""

import random
import threading
import time
from contextlib import closing

import PIL.Image

from capivara_search.indexing import prefetch_pictures
from capivara_search.picture_files import FileState, Picture

SIDE = 10


def files(number: int) -> list[FileState]:
    return [FileState(f"/f/{i}", i, 0) for i in range(number)]


def picture(file: FileState) -> Picture:
    image = PIL.Image.new("RGB", (SIDE, SIDE))
    return Picture(str(file.size), SIDE, SIDE, None, None, None, image, b"")


def test_all_pictures_come_in_order_and_the_first_batch_is_small():
    times = random.Random(0)

    def read(file: FileState) -> Picture:
        time.sleep(times.random() / 500)
        if file.size % 7 == 3:
            raise ValueError(str(file.size))
        return picture(file)

    batches = list(prefetch_pictures(files(100), read, 8))
    got = [(file, found) for batch in batches for file, found in batch]
    assert [file for file, _ in got] == files(100)
    assert all(isinstance(found, ValueError) == (file.size % 7 == 3) for file, found in got)
    assert [len(batch) for batch in batches] == [4, *[8] * 12]


def test_no_more_wait_than_two_batches():
    held, most, lock = [0], [0], threading.Lock()

    def read(file: FileState) -> Picture:
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        return picture(file)

    for batch in prefetch_pictures(files(60), read, 8):
        time.sleep(0.005)  # the model computes, and the threads go on
        with lock:
            held[0] -= len(batch)
    assert 8 < most[0] <= 2 * 8 + len(batch)


def test_leaving_early_ends_the_threads():
    before = threading.active_count()
    with closing(prefetch_pictures(files(1000), picture, 4)) as batches:
        next(batches)
    assert threading.active_count() == before
