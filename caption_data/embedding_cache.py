"""Embeddings in files, computed once, of training's and evaluation's images and texts.

    cache = EmbeddingCache(cache_home() / "evaluation" / key, all_parts(len(images), 256))
    cache.make(cache.missing(), embed)
    vectors_of(cache.table())

Rows go through in shards, files of their own: an interrupted run continues at the first one that is missing or damaged,
and the processes of a launch share them out. No batch has rows of two shards, so that a shard does not depend on who
makes it, nor on which others are made.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.utils import broadcast_object_list

from capivara_common.environment import cache_home, processes
from capivara_common.files import add_digest, has_digest, whole_file
from capivara_common.image_files import by_threads

FILES_VERSION = 2  # of what the embeddings depend on; raise it when that changes
Bad = dict[int, tuple[str, str]]  # place of a row in its shard -> reason and detail
# What makes shards, by their numbers: of each the array (rows, …), and the rows that are bad.
Embed = Callable[[list[int]], Iterator[tuple[np.ndarray, Bad]]]
logger = logging.getLogger("capivara")


class EmbeddingCache:
    """Embeddings of rows, an Arrow table a shard: `vectors`, an empty list where a row is bad, `reason` and `detail`.

    The names of the folder and its files, `paths`, depend on all that the embeddings do; a file ends with a digest, and
    is there whole or not at all. `parts` are the rows of each shard.
    """

    def __init__(self, folder: Path, parts: list[range], names: Sequence[str] | None = None):
        self.folder, self.parts = folder, parts
        self.paths = [folder / f"{name}.arrow" for name in names or [f"shard-{n:05d}" for n in range(len(parts))]]

    def missing(self) -> list[int]:
        """Shards that are still to be made, damaged ones among them; the same on all processes of a launch."""
        found: list[Any] = [None]
        if processes().is_main_process:
            found = [[number for number, good in enumerate(by_threads(has_digest, self.paths)) if not good]]
            lost = [self.paths[number] for number in found[0]]
            for path in filter(Path.exists, lost):
                logger.warning("%s is damaged; it is made anew.", path)
            if old := [path for path in (path.with_suffix(".npy") for path in lost) if path.exists()]:
                logger.warning("%s has embeddings in files of an earlier version; they are made anew.", self.folder)
                for path in old:
                    path.unlink()
        return broadcast_object_list(found)[0]

    def make(self, numbers: Sequence[int], embed: Embed) -> None:
        """Make shards: each process of a launch a run of neighbours, since a source may be read to its end."""
        state = processes()
        own = np.array_split(np.array(numbers, dtype=int), state.num_processes)[state.process_index].tolist()
        for number, (embeds, bad) in zip(own, embed(own), strict=True):
            self.write(number, embeds, bad)
        state.wait_for_everyone()

    def write(self, number: int, embeds: np.ndarray, bad: Bad) -> None:
        """Write a shard whole; what `embeds` has in bad rows is left out."""
        good = np.array([place not in bad for place in range(len(embeds))])
        ends = np.cumsum(good * embeds[0].size)
        faults = zip(*(bad.get(place, ("", "")) for place in range(len(embeds))), strict=True)
        vectors = pa.LargeListArray.from_arrays(np.insert(ends, 0, 0), embeds[good].ravel())
        table = pa.table([vectors, *map(pa.array, faults)], ["vectors", "reason", "detail"])
        with whole_file(self.paths[number]) as path:
            with pa.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
            add_digest(path)

    def table(self) -> pa.Table:
        """All shards, left on the disk, memory-mapped. Raises ValueError where one is of other rows."""
        tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in self.paths]
        for path, part, table in zip(self.paths, self.parts, tables, strict=True):
            if len(table) != len(part):
                raise ValueError(f"{path} should have {len(part)} rows, it has {len(table)}. Remove it.")
        return pa.concat_tables(tables)


def vectors_of(table: pa.Table) -> np.ndarray:
    """(rows, numbers), read-only, of a table whose rows all have `vectors`, at least one."""
    vectors = table.column("vectors").combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(vectors), -1)


def cache_folder(name: str) -> Path | None:
    """Root of the caches of an argument: "auto" is `cache_home`, "off" is none."""
    if name == "off":
        return None
    return cache_home() if name == "auto" else Path(name)
