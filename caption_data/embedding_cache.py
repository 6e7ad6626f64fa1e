"""Embeddings in files, computed once, of training's and evaluation's images and texts.

    cache = EmbeddingCache(cache_home() / "evaluation" / key, all_parts(len(images), 256))
    cache.make(cache.missing(), embed)
    cache.open()

Rows go through in shards, files of their own: an interrupted run continues at the first one that is missing or damaged,
and the processes of a launch, or the tasks of an executor (`capivara_common.executors`), share them out. No
batch has rows of two shards, so that a shard does not depend on who makes it, nor on which others are made.
"""

import json
import logging
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from capivara_common.environment import cache_home, processes
from capivara_common.files import DIGEST_BYTES, add_digest, has_digest, whole_file
from capivara_common.image_files import by_threads

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
            found = [[number for number, good in enumerate(by_threads(has_digest, self.paths)) if not good]]
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
        with whole_file(self.paths[number]) as path:
            with path.open("wb") as file:
                np.save(file, embeds, allow_pickle=False)
                file.write(json.dumps(bad).encode())
            add_digest(path)

    def open(self, mapped: bool = False) -> None:
        """Read all shards, or leave them on the disk, memory-mapped. Raises ValueError where one is of other rows."""
        if mapped:  # each then is an open file: of two million images more than the usual limit of 1024
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for path, part in zip(self.paths, self.parts, strict=True):
            with path.open("rb") as file:
                array = np.load(path if mapped else file, "r" if mapped else None, allow_pickle=False)
                if mapped:
                    file.seek(array.offset + array.nbytes)
                bad = json.loads(file.read()[:-DIGEST_BYTES])
            if len(array) != len(part):
                raise ValueError(f"{path} should have {len(part)} rows, it has {len(array)}. Remove it.")
            self.arrays.append(array)
            self.bad |= {part[place]: what for place, what in bad}


def cache_folder(name: str) -> Path | None:
    """Root of the caches of an argument: "auto" is `cache_home`, "off" is none."""
    if name == "off":
        return None
    return cache_home() if name == "auto" else Path(name)
