"""Embeddings in files, computed once, of training's and evaluation's images and texts; and images by their rows.

    cache = EmbeddingCache(cache_home() / "evaluation" / key, all_parts(len(images), 256))
    cache.make(cache.missing(), embed)
    cache.open()

Rows go through in shards, files of their own: an interrupted run continues at the first one that is missing or damaged,
and the processes of a launch, or the tasks of an executor (`capivara_common.executors`), share them out. No
batch has rows of two shards, so that a shard does not depend on who makes it, nor on which others are made.
"""

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from capivara_common.environment import cache_home, processes
from capivara_common.files import DIGEST_BYTES, has_digest, write_with_digest
from capivara_common.image_files import BYTES_ALONE, BadImage, ImageFiles, decode_image, image_digest, image_path

DECODED_AHEAD = 64  # images; a photograph of 12 million pixels takes 36 MB
FILES_VERSION = 2  # of the shards; raise it when their form changes
# What makes shards, by their numbers: of each the array, and the bad rows, counted in the shard, with what is wrong.
Embed = Callable[[list[int]], Iterator[tuple[np.ndarray, list[tuple[int, Any]]]]]
logger = logging.getLogger("capivara")


class EmbeddingCache:
    """Embeddings of rows: a `.npy` file (rows, …) of each shard.

    After the array, which is NaN where a row is bad, come the list of the bad rows as JSON and a digest of both; a
    shard is there whole or not at all.

    Attributes:
        folder: of the shards; its name and theirs depend on all that the embeddings do.
        parts: the rows of each shard.
        paths: the file of each shard, whether it is there or not.
        arrays: of all shards, once they are open.
        bad: row -> what is wrong with it, of all shards, once they are open.
    """

    def __init__(self, folder: Path, parts: list[range], names: Sequence[str] | None = None):
        self.folder, self.parts = folder, parts
        self.paths = [folder / name for name in names or [f"shard-{n:05d}.npy" for n in range(len(parts))]]
        self.arrays: list[np.ndarray] = []
        self.bad: dict[int, Any] = {}

    def missing(self) -> list[int]:
        """Shards that are still to be made, damaged ones among them; the same on all processes of a launch."""
        found: list[Any] = [None]
        if processes().is_main_process:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
                found = [[number for number, good in enumerate(threads.map(has_digest, self.paths)) if not good]]
            for path in filter(Path.exists, [self.paths[number] for number in found[0]]):
                logger.warning("%s is damaged, or of an earlier version; it is made anew.", path)
        return broadcast_object_list(found)[0]

    def make(self, numbers: Sequence[int], embed: Embed) -> None:
        """Make shards: each process of a launch a run of neighbours, since a source may be read to its end."""
        state = processes()
        own = np.array_split(np.array(numbers, dtype=int), state.num_processes)[state.process_index].tolist()
        for number, (embeds, bad) in zip(own, embed(own), strict=True):
            self.write(number, embeds, bad)
        state.wait_for_everyone()

    def write(self, number: int, embeds: np.ndarray, bad: list[tuple[int, Any]]) -> None:
        """Write a shard whole."""
        file = io.BytesIO()
        np.save(file, embeds, allow_pickle=False)
        file.write(json.dumps(bad).encode())
        write_with_digest(self.paths[number], file.getvalue())

    def open(self, row: tuple[int, ...] | None = None, dtype: type = np.float32, mapped: bool = False) -> None:
        """Read all shards.

        Args:
            row: shape of the embeddings of a row; any where it is None.
            dtype: of the arrays.
            mapped: leave them on the disk, memory-mapped; each then counts as an open file.

        Raises:
            ValueError: a shard is not what it should be.
        """
        for path, part in zip(self.paths, self.parts, strict=True):
            with path.open("rb") as file:
                array = np.load(path if mapped else file, "r" if mapped else None, allow_pickle=False)
                if mapped:
                    file.seek(array.offset + array.nbytes)
                bad = json.loads(file.read()[:-DIGEST_BYTES])
            expected = (len(part), *(array.shape[1:] if row is None else row))
            if array.shape != expected or array.dtype != dtype:
                kind = np.dtype(dtype).name
                raise ValueError(f"{path} should be {expected} {kind}, it is {array.shape} {array.dtype}. Remove it.")
            self.arrays.append(array)
            self.bad |= {part[place]: what for place, what in bad}


@dataclass(eq=False)
class ImageRows:
    """Images that are read when they are needed."""

    row_image: Callable[[int], dict | None]  # of a row's number: its image as `datasets` gives it undecoded
    count: int  # rows
    files: ImageFiles = BYTES_ALONE  # which images may be opened
    digests: list[str] = field(init=False, repr=False)  # hex, of each file, or of what is wrong with it
    digest: str = field(init=False)  # hex, of all of them in their order

    def __post_init__(self) -> None:
        digests = []
        quiet = not processes().is_main_process
        for row in tqdm(range(self.count), desc="Reading images", unit="image", disable=quiet):
            try:
                digests.append(image_digest(self.row_image(row), self.files))
            except BadImage as bad:
                reason = self.fault(row, bad).encode("utf-8", "replace")  # is cached, and must be of this data set
                digests.append(blake2b(reason, digest_size=16).digest())
        self.digests = [digest.hex() for digest in digests]
        self.digest = blake2b(b"".join(digests), digest_size=16).hexdigest()

    def image(self, row: int) -> PIL.Image.Image:
        """Decoded. Raises BadImage where it can't be used."""
        return decode_image(self.row_image(row), self.files)

    def decoded(self, rows: range) -> Iterator[tuple[int, PIL.Image.Image | BadImage]]:
        """Rows with their images or what is wrong with them, decoded some at once by a few threads."""

        def read(row: int) -> PIL.Image.Image | BadImage:
            try:
                return self.image(row)
            except BadImage as bad:
                return bad

        with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // processes().num_processes))) as threads:
            for start in range(0, len(rows), DECODED_AHEAD):
                part = rows[start : start + DECODED_AHEAD]
                yield from zip(part, threads.map(read, part), strict=True)

    def fault(self, row: int, bad: BadImage) -> str:
        """What is wrong with an image, without the folder that it lies in: results name no machine's paths."""
        path = image_path(self.row_image(row))
        folder = path.removesuffix(Path(path).name)  # not the path: odd signs in the name are escaped, long ones cut
        return str(bad).replace(folder, "").replace(repr(folder)[1:-1], "")


def cache_folder(name: str) -> Path | None:
    """Root of the caches of an argument: "auto" is `cache_home`, "off" is none."""
    if name == "off":
        return None
    return cache_home() if name == "auto" else Path(name)
