"""Compute embeddings of images or texts, and store them on disk, so that each is computed only once.

    store = EmbeddingStore(cache_home() / "evaluation", {"encoder": digest}, batch_size=32)
    table = store.load_or_embed(image_digests, load, embed, "Images")
    vectors = vectors_to_array(table.filter(pc.equal(table["reason"], "")))  # (good rows, width)

This module knows neither models nor datasets. The caller gives it a function that loads items (images or texts) and a
function that embeds a batch of loaded items. Training, evaluation, caption scoring and the search all embed images with
`embed_batch`; training and evaluation also keep the embeddings in an `EmbeddingStore`.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from capivara_common.environment import process_state
from capivara_common.files import append_digest, atomic_file, digest_matches, json_digest, write_json
from capivara_common.image_files import DECODER_THREADS, BadImage
from capivara_common.tasks import split_rows

STORE_VERSION = 3  # part of the key; increase it when a code change alters embeddings or the format of the files
# Files of earlier versions, relative to the parent folder of a store. They are not used any more.
OLD_FILE_PATTERNS = ("*/*.npy", "*/shard-*.arrow")
Place = tuple[int, int]  # number of a row, and number of a view of the row's image
Embed = Callable[[list[Any]], Iterable[np.ndarray]]  # function from a list of loaded items to one vector per item
logger = logging.getLogger("capivara")


def embed_batch(items: Sequence[Any], embed: Embed, skip_refused: bool = False) -> list[np.ndarray | BadImage]:
    """Embed a batch of images, without the images that can't be used.

    Args:
        items: Loaded images. An image that could not be loaded is a `BadImage`.
        embed: Function that embeds a list of at least one loaded image. It raises ValueError if it refuses an image.
        skip_refused: If the function refuses the batch, embed its images one by one, so that only the refused images
            are bad. By default, the error is raised.

    Returns:
        For each item its embedding, (width,), or a `BadImage` if it can't be used.

    Raises:
        ValueError: If the function refuses an image and `skip_refused` is not set.
    """
    good = [item for item in items if not isinstance(item, BadImage)]
    try:
        vectors = iter(embed(good) if good else ())
    except ValueError as error:
        if not skip_refused:
            raise
        if len(good) == 1:
            vectors = iter([BadImage("unreadable image", f"the model refuses it: {error}")])
        else:
            vectors = (vector for item in good for vector in embed_batch([item], embed, skip_refused))
    return [item if isinstance(item, BadImage) else next(vectors) for item in items]


class EmbeddingStore:
    """Embeddings on disk, in shards of consecutive rows. All shards of a store were computed with the same settings.

    A shard is an Arrow file with the columns `vectors`, `reason` and `detail`. A bad row, for example one with an
    unreadable image, has an empty list in `vectors`; its `reason` and `detail` say what is wrong. The file name is a
    digest of the shard's items. If rows are appended to a dataset, the shards that were full before stay valid.

    A shard is written atomically and ends with a digest, so that an incomplete or damaged file is detected. If an
    interrupted run is repeated, only missing and damaged shards are computed. The processes of a distributed launch
    divide the shards among themselves. All items of a batch are in one shard, so a shard has the same bits whichever
    process computes it.

    Args:
        root: Folder of all stores. A store is a folder in it, named by a digest of the settings.
        settings: Everything besides the items that changes an embedding, as JSON values: the encoder with its
            preprocessing, the precision, and for augmented views the augmentation with its seed and library version.
        batch_size: Items that are embedded together. It changes the last bits of embeddings, so it is part of the key.
        dtype: Type of the stored numbers.
    """

    def __init__(self, root: Path, settings: dict[str, Any], batch_size: int, dtype: type = np.float32):
        self.settings = {"version": STORE_VERSION, "batch_size": batch_size, "dtype": np.dtype(dtype).name, **settings}
        self.folder = root / json_digest(self.settings, sort_keys=True)
        self.batch_size, self.dtype = batch_size, dtype

    def record_folder(self, items: Sequence[str]) -> Path:
        """Return the folder for records about the embeddings of these items, such as how they were computed.

        Args:
            items: Items as `load_or_embed` takes them.
        """
        return self.folder / f"records-{json_digest(list(items))}"

    def load_or_embed(
        self,
        items: Sequence[str],
        load: Callable[[Iterator[list[Place]]], Iterable[Sequence[Any]]],
        embed: Embed,
        title: str,
        kind: str = "image",
        rows_per_shard: int = 256,
        views: int = 1,
    ) -> pa.Table:
        """Load the embeddings of all rows, after computing the missing shards.

        Args:
            items: What identifies the content of each row: the digest of its image, or its text. A row with an empty
                string is bad and is not embedded.
            load: Function that gets the batches of this process in order, each as a list of places, and returns an
                iterable over the loaded batches. A loaded batch has an item for each place, or a `BadImage`. The
                function may load batches ahead of their use.
            embed: Function that embeds a list of loaded items; see `embed_batch`.
            title: Label of the progress bar.
            kind: What a row is, in the singular. Part of the file names.
            rows_per_shard: Rows per file. An interruption loses at most one file per process.
            views: Views per row.

        Returns:
            A memory-mapped table with one row per item. `vectors` has views * width numbers per row.

        Raises:
            ValueError: If a file has another number of rows than its shard, or the function `embed` refuses an item.
            OSError: If the disk is full. The same call then computes the missing shards.
        """
        from tqdm.auto import tqdm  # the search imports this module and must start fast

        parts, state = split_rows(len(items), rows_per_shard), process_state()
        digests = (json_digest(list(items[part.start : part.stop])) for part in parts)
        paths = [self.folder / f"{kind}s-{digest}.arrow" for digest in digests]

        def plan_batches(part: range) -> list[list[Place]]:
            rows = zip(part, items[part.start : part.stop], strict=True)
            places = [(row, view) for row, item in rows if item for view in range(views)]
            return [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]

        # Each process gets consecutive shards, because some datasets can only be read in order.
        missing = np.array_split(np.array(self._find_missing(paths), dtype=int), state.num_processes)
        local = [(paths[number], parts[number]) for number in missing[state.process_index]]
        # One iterator for all shards, because starting worker processes takes seconds.
        loaded = iter(load(batch for _, part in local for batch in plan_batches(part)) if local else ())
        is_hidden = not (local and state.is_main_process)
        with tqdm(total=sum(len(part) for _, part in local), desc=title, unit=kind, disable=is_hidden) as bar:
            for path, part in local:
                vectors, faults = {}, {}
                for batch, loaded_items in zip(plan_batches(part), loaded, strict=False):
                    for place, vector in zip(batch, embed_batch(loaded_items, embed), strict=True):
                        if isinstance(vector, BadImage):
                            faults[place[0]] = vector.reason, vector.detail
                        else:
                            vectors[place] = vector
                    bar.update(len(batch) / views)
                good = [row not in faults and (row, 0) in vectors for row in part]
                rows = [vectors[row, view] for row in itertools.compress(part, good) for view in range(views)]
                self._write_shard(path, rows, good, [faults.get(row, ("", "")) for row in part])
        state.wait_for_everyone()
        table = pa.concat_tables(map(_load_shard, paths, map(len, parts)))
        state.wait_for_everyone()  # the main process may delete a temporary folder after this
        return table

    def _find_missing(self, paths: list[Path]) -> list[int]:
        """Return the positions of all shards whose file is missing or damaged. All processes get the same list.

        Args:
            paths: Files of the shards.
        """
        from accelerate.utils import broadcast_object_list  # imports torch, which the search does without

        missing: list[int] | None = None
        if process_state().is_main_process:
            with ThreadPoolExecutor(DECODER_THREADS) as threads:
                missing = [number for number, valid in enumerate(threads.map(digest_matches, paths)) if not valid]
            for path in filter(Path.exists, (paths[number] for number in missing)):
                logger.warning("%s is damaged. It will be computed again.", path)
            old_files = (self.folder.parent.glob(pattern) for pattern in OLD_FILE_PATTERNS)
            if missing and (old := next(itertools.chain(*old_files), None)):
                logger.warning("%s was written by an earlier version and is not used. You can delete it.", old.parent)
            if missing:
                write_json(self.folder / "settings.json", self.settings)
        return broadcast_object_list([missing])[0]

    def _write_shard(
        self, path: Path, vectors: list[np.ndarray], good: list[bool], faults: list[tuple[str, str]]
    ) -> None:
        """Write one shard atomically.

        Args:
            path: File of the shard.
            vectors: Embeddings of the good rows, one per row and view.
            good: For each row, whether it has embeddings.
            faults: Reason and detail of each row; empty for good rows.
        """
        values = np.array(vectors, self.dtype).ravel()
        ends = np.cumsum(good) * (len(values) // max(1, sum(good)))
        lists = pa.LargeListArray.from_arrays(np.insert(ends, 0, 0), values)
        reasons = map(pa.array, zip(*faults, strict=True))
        table = pa.table([lists, *reasons], ["vectors", "reason", "detail"])
        with atomic_file(path) as temporary:
            with pa.ipc.new_stream(temporary, table.schema) as file:
                file.write_table(table)
            append_digest(temporary)


def _load_shard(path: Path, row_count: int) -> pa.Table:
    """Load one shard as a memory-mapped table. Raises ValueError if it does not have `row_count` rows."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a table of embeddings ({error}). Delete it and run again.") from error
    if len(table) != row_count:
        raise ValueError(f"{path} must have {row_count} rows, but has {len(table)}. Delete it and run again.")
    return table


def vectors_to_array(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of vectors as an array, for example the column `vectors` of `EmbeddingStore.load_or_embed`.

    Args:
        column: Lists of numbers, all of the same length, also nested. There must be no null and no empty list.

    Returns:
        Read-only array (rows, numbers per row).
    """
    values = column.combine_chunks()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
