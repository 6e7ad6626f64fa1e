"""The images of a data set by their rows, read when they are needed, with a digest of each file."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
from tqdm.auto import tqdm

from capivara_common.environment import processes
from capivara_common.image_files import BYTES_ALONE, BadImage, ImageFiles, decode_image, image_digest, image_path

DECODED_AHEAD = 8  # images a thread; a photograph of 12 million pixels takes 36 MB


@dataclass(eq=False)
class ImageRows:
    """Images that are read when they are needed."""

    row_image: Callable[[int], dict | None]  # of a row's number: its image as `datasets` gives it undecoded
    count: int  # rows
    files: ImageFiles = BYTES_ALONE  # which images may be opened
    digest: str = field(init=False)  # hex, of the files of all images in their order
    _digests: bytes = field(init=False, repr=False)  # 16 each

    def __post_init__(self) -> None:
        digests = bytearray()
        shown = processes().is_main_process
        for row in tqdm(range(self.count), desc="Reading images", unit="image", disable=not shown):
            try:
                digests += image_digest(self.row_image(row), self.files)
            except BadImage as bad:
                reason = self.fault(row, bad).encode("utf-8", "replace")  # is cached, and must be of this data set
                digests += hashlib.blake2b(reason, digest_size=16).digest()
        self._digests, self.digest = bytes(digests), hashlib.blake2b(digests, digest_size=16).hexdigest()

    def image(self, row: int) -> PIL.Image.Image:
        """Decoded. Raises BadImage where it can't be used."""
        return decode_image(self.row_image(row), self.files)

    def row_digest(self, row: int) -> str:
        """Hex, of the file of an image, or of what is wrong with it."""
        return self._digests[16 * row : 16 * (row + 1)].hex()

    def decoded(self, rows: range) -> Iterator[tuple[int, PIL.Image.Image | BadImage]]:
        """Rows with their images or what is wrong with them, decoded ahead by a few threads."""

        def read(row: int) -> PIL.Image.Image | BadImage:
            try:
                return self.image(row)
            except BadImage as bad:
                return bad

        threads = max(1, min(8, (os.cpu_count() or 2) // processes().num_processes))
        with ThreadPoolExecutor(threads) as pool:
            ahead = deque(pool.submit(read, row) for row in rows[: threads * DECODED_AHEAD])
            for number, row in enumerate(rows):
                following = number + threads * DECODED_AHEAD
                if following < len(rows):
                    ahead.append(pool.submit(read, rows[following]))
                yield row, ahead.popleft().result()

    def fault(self, row: int, bad: BadImage) -> str:
        """What is wrong with an image, without the folder that it lies in: results name no machine's paths."""
        path = image_path(self.row_image(row))
        folder = path.removesuffix(Path(path).name)  # not the path: odd signs in the name are escaped, long ones cut
        return str(bad).replace(folder, "").replace(repr(folder)[1:-1], "")
