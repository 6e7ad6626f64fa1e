"""Embeddings in files, computed once: what training keeps of a frozen image tower, and evaluation of images and texts.

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
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from capivara_common.environment import cache_home, processes
from capivara_common.files import DIGEST_BYTES, has_digest, write_with_digest
from caption_data.rows import digest_of

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
        names: the file name of each shard.
        arrays: of all shards, once they are open.
        bad: row -> what is wrong with it, of all shards, once they are open.
    """

    def __init__(self, folder: Path, parts: list[range], names: Sequence[str] | None = None):
        self.folder, self.parts = folder, parts
        self.names = names or [f"shard-{number:05d}.npy" for number in range(len(parts))]
        self.arrays: list[np.ndarray] = []
        self.bad: dict[int, Any] = {}

    def paths(self) -> list[Path]:
        """The files of all shards, whether they are there or not."""
        return [self.folder / name for name in self.names]

    def missing(self) -> list[int]:
        """Shards that are still to be made, damaged ones among them; the same on all processes of a launch."""
        found: list[Any] = [None]
        if processes().is_main_process:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
                whole = list(executor.map(has_digest, self.paths()))
            for path in [path for path, good in zip(self.paths(), whole, strict=True) if not good and path.exists()]:
                logger.warning("%s is damaged, or of an earlier version; it is made anew.", path)
            found = [[number for number, good in enumerate(whole) if not good]]
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
        write_with_digest(self.paths()[number], file.getvalue())

    def open(self, row: tuple[int, ...] | None = None, dtype: type = np.float32, mapped: bool = False) -> None:
        """Read all shards.

        Args:
            row: shape of the embeddings of a row; any where it is None.
            dtype: of the arrays.
            mapped: leave them on the disk, memory-mapped; each then counts as an open file.

        Raises:
            ValueError: a shard is not what it should be.
        """
        for path, part in zip(self.paths(), self.parts, strict=True):
            try:
                with path.open("rb") as file:
                    array = np.load(path if mapped else file, "r" if mapped else None, allow_pickle=False)
                    if mapped:
                        file.seek(array.offset + array.nbytes)
                    bad = json.loads(file.read()[:-DIGEST_BYTES])
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(f"{path} can't be read: {error}. Remove it.") from error
            expected = (len(part), *(array.shape[1:] if row is None else row))
            if array.shape != expected or array.dtype != dtype:
                kind = np.dtype(dtype).name
                raise ValueError(f"{path} should be {expected} {kind}, it is {array.shape} {array.dtype}. Remove it.")
            self.arrays.append(array)
            self.bad |= {part[place]: what for place, what in bad}


def cache_key(parts: dict[str, Any]) -> str:
    """The name of a folder of embeddings, after what they depend on."""
    return digest_of(parts, sort_keys=True)


def cache_folder(name: str) -> Path | None:
    """Root of the caches of an argument: "auto" is `cache_home`, "off" is none."""
    if name == "off":
        return None
    return cache_home() if name == "auto" else Path(name)
