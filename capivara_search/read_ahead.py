"""Pictures decoded by threads while the model computes, in batches, within a bound of memory.

with ReadAhead(files, lambda file: read_picture(file, 224), batch_size=32) as batches:
    for batch in batches:  # of (file, picture or what was wrong with it)
        ...
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Condition

from capivara_common.image_files import DECODERS
from capivara_search.picture_files import FileState, Picture

MAX_PIXELS = 100_000_000  # that wait for the model, 3 bytes each; a picture at a time goes beyond

Read = tuple[FileState, Picture | Exception]


class ReadAhead:
    """Batches of pictures in the order of their files.

    Args:
        files: to be read; drawn from as they are needed.
        read: reads one, in a thread.
        batch_size: pictures in a batch; fewer where they are large.
    """

    def __init__(self, files: Iterable[FileState], read: Callable[[FileState], Picture], batch_size: int):
        self.files, self.read, self.batch_size = iter(files), read, batch_size
        self._threads = ThreadPoolExecutor(DECODERS)
        self._pixels, self._next = 0, 0  # that wait; number of the picture that is wanted next
        self._changed, self._ended = Condition(), False

    def __enter__(self) -> Iterator[list[Read]]:
        return self._batches()

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _batches(self) -> Iterator[list[Read]]:
        waiting: deque[tuple[FileState, Future[Picture]]] = deque()
        number = 0
        while True:
            for file in islice(self.files, 2 * self.batch_size - len(waiting)):
                future = self._threads.submit(self._read, file, number)
                future.add_done_callback(self._notify)
                waiting.append((file, future))
                number += 1
            if not waiting:
                return
            batch: list[Read] = []
            while waiting and len(batch) < self.batch_size and self._is_next(waiting[0][1], bool(batch)):
                file, future = waiting.popleft()
                batch.append((file, future.exception() or future.result()))
                with self._changed:
                    self._next += 1
                    self._changed.notify_all()
            yield batch
            with self._changed:
                self._pixels -= sum(_pixels(picture) for _, picture in batch)
                self._changed.notify_all()

    def _is_next(self, future: Future, is_some: bool) -> bool:
        """Wait for a picture; False where the bound is reached, and the pictures before it are to be embedded first."""
        with self._changed:
            self._changed.wait_for(lambda: future.done() or (is_some and self._pixels >= MAX_PIXELS))
            return future.done()

    def _read(self, file: FileState, number: int) -> Picture:
        with self._changed:  # the one that is waited for is always read, whatever later ones hold
            self._changed.wait_for(lambda: self._ended or self._pixels < MAX_PIXELS or number == self._next)
        picture = self.read(file)
        with self._changed:
            self._pixels += _pixels(picture)
        return picture

    def _notify(self, future: Future) -> None:
        with self._changed:
            self._changed.notify_all()


def _pixels(picture: Picture | Exception) -> int:
    return 0 if isinstance(picture, Exception) else picture.image.width * picture.image.height
