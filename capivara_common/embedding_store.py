"""Compute embeddings of images or texts, and store them on disk, so that each embedding is computed only once.

    store = EmbeddingStore(cache_home() / "evaluation", {"encoder": digest}, batch_size=32)
    table = store.load_or_embed(image_digests, load, embed, "Images")
    vectors = vectors_to_array(table.filter(pc.equal(table["reason"], "")))  # (good rows, width)

The caller passes a function that loads items (images or texts) and a function that embeds a batch of loaded items.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from capivara_common.environment import get_or_init_distributed_state
from capivara_common.files import append_digest, atomic_file, json_digest, matches_appended_digest, write_json
from capivara_common.image_files import DECODER_THREADS, BadImage, BadRow
from capivara_common.tasks import split_rows

# This version is one of the settings that identify a store. Increase it when a code change alters embeddings or the
# file format, so that old files are not used.
STORE_VERSION = 4
# Glob patterns of files that earlier versions of this module wrote, relative to the parent folder of a store. These
# files are no longer used, and a warning tells the user that they can be deleted.
OLD_FILE_PATTERNS = ("*/*.npy", "*/shard-*.arrow")
Place = tuple[int, int]  # index of a row, and index of a view (augmented copy) of the image in this row
Embed = Callable[[list[Any]], Iterable[np.ndarray]]  # function from a list of loaded items to one vector per item
logger = logging.getLogger("capivara")


def embed_batch_except_bad_images(
    items: Sequence[Any], embed: Embed, skip_refused: bool = False
) -> list[np.ndarray | BadRow]:
    """Embed a batch in which some images could not be loaded, so that a bad image does not stop the whole run.

    Args:
        items: One entry per image: the loaded image, or the `BadRow` error if it could not be loaded.
        embed: Function that embeds a list of at least one image. It raises ValueError if it refuses an image.
        skip_refused: True: return a `BadImage` error for an image that `embed` refuses. False: raise the error.

    Returns:
        One entry per item: the embedding of shape (width,), or the error.

    Raises:
        ValueError: If `embed` refuses an image and `skip_refused` is False.
    """
    good = [item for item in items if not isinstance(item, BadRow)]
    try:
        vectors = iter(embed(good) if good else ())
    except ValueError as error:
        if not skip_refused:
            raise
        if len(good) == 1:
            vectors = iter([BadImage("unreadable image", f"the model refuses it: {error}")])
        else:
            vectors = (vector for item in good for vector in embed_batch_except_bad_images([item], embed, skip_refused))
    return [item if isinstance(item, BadRow) else next(vectors) for item in items]


class EmbeddingStore:
    """A cache of embeddings on disk, which computes each missing embedding once and then reads it from a file.

    If an interrupted run is repeated, only missing and damaged files are computed.

    Args:
        root: Folder of all stores. Each store is a folder in it, named by a digest of its settings.
        settings: Everything besides the images or texts that changes an embedding, as JSON values: the encoder with
            its preprocessing, the precision, and any augmentation with its seed and library version.
        batch_size: Number of items that are embedded together. Each batch size has its own store, because it changes
            the last bits of embeddings.
        dtype: NumPy type of the stored numbers.
    """

    def __init__(self, root: Path, settings: dict[str, Any], batch_size: int, dtype: type = np.float32):
        self.settings = {"version": STORE_VERSION, "batch_size": batch_size, "dtype": np.dtype(dtype).name, **settings}
        self.folder = root / json_digest(self.settings, sort_keys=True)
        self.batch_size, self.dtype = batch_size, dtype

    def record_folder(self, items: Sequence[str]) -> Path:
        """Return a folder in which callers can record how some items were embedded. The folder need not exist.

        For example, callers record the number of images per forward pass.

        Args:
            items: The same list of image digests or texts that is passed to `load_or_embed`.
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
        """Return the embeddings of all rows: read them from disk, after computing the embeddings that are missing.

        Args:
            items: One text per row that identifies its content: the digest of the image, or the text to embed. "" marks
                a bad row, which is not embedded.
            load: Function that gets an iterator over batches, that is, lists of tuples (row index, view index). It
                returns an iterable over the loaded batches in the same order: one item or `BadImage` error per tuple.
            embed: Function that gets a list of loaded items, and returns one vector of shape (width,) per item.
            title: Label of the progress bar.
            kind: Noun for a row, such as "image", for the progress bar and file names.
            rows_per_shard: Number of rows per file.
            views: Number of embeddings per row; more than 1 for several augmented copies (views) of each image.

        Returns:
            A memory-mapped table with one row per item and these columns:
                vectors: List of views * width numbers; empty for a bad row.
                reason: Why the row could not be embedded, such as "unreadable image". "" for a good row, and for a row
                    whose item was "".
                detail: Description of the problem, or "".

        Raises:
            ValueError: If a file has the wrong number of rows, or `embed` refuses an item.
            OSError: If the disk is full. Call the method again to compute the rest.
        """
        from tqdm.auto import tqdm  # imported here because only this method needs it

        items, parts, state = list(items), split_rows(len(items), rows_per_shard), get_or_init_distributed_state()
        # The file name of a shard (file) has a digest of its items. If rows are appended to a dataset, the shards that
        # were full before stay valid.
        digests = (json_digest(items[part.start : part.stop]) for part in parts)
        paths = [self.folder / f"{kind}s-{digest}.arrow" for digest in digests]

        # All items of a batch belong to the same shard, so its numbers do not depend on which process computes it.
        def plan_batches(part: range) -> list[list[Place]]:
            places = [(row, view) for row in part if items[row] for view in range(views)]
            return [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]

        # The processes of a distributed launch divide the shards. Each process gets consecutive shards, because some
        # datasets can only be read in order.
        missing = np.array_split(np.array(self._find_missing(paths), dtype=int), state.num_processes)
        local = [(paths[number], parts[number]) for number in missing[state.process_index]]
        # `load` is called once for all shards, because it may start worker processes, which takes seconds. It may load
        # batches before they are needed.
        loaded = iter(load(batch for _, part in local for batch in plan_batches(part)) if local else ())
        is_hidden = not (local and state.is_main_process)
        with tqdm(total=sum(len(part) for _, part in local), desc=title, unit=kind, disable=is_hidden) as bar:
            for path, part in local:
                vectors: dict[Place, np.ndarray | BadImage] = {}
                for batch, loaded_items in zip(plan_batches(part), loaded, strict=False):
                    vectors |= zip(batch, embed_batch_except_bad_images(loaded_items, embed), strict=True)
                    bar.update(len(batch) / views)
                self._write_shard(path, [[vectors[row, view] for view in range(views) if items[row]] for row in part])
        state.wait_for_everyone()
        table = pa.concat_tables(map(_load_shard, paths, map(len, parts)))
        # Wait until all processes have read the shards: the main process may delete them next, if they are temporary.
        state.wait_for_everyone()
        return table

    def _find_missing(self, paths: list[Path]) -> list[int]:
        """Return the positions of all shards whose file is missing or damaged. All processes get the same list.

        Args:
            paths: Files of the shards.
        """
        # Imported here because this import loads torch, which most functions of this module do not need.
        from accelerate.utils import broadcast_object_list

        missing: list[int] | None = None
        if get_or_init_distributed_state().is_main_process:
            with ThreadPoolExecutor(DECODER_THREADS) as threads:
                is_valid = list(threads.map(matches_appended_digest, paths))
            missing = [number for number in range(len(paths)) if not is_valid[number]]
            for path in filter(Path.exists, (paths[number] for number in missing)):
                logger.warning("%s is damaged. It will be computed again.", path)
            old_files = (self.folder.parent.glob(pattern) for pattern in OLD_FILE_PATTERNS)
            if missing and (old := next(itertools.chain(*old_files), None)):
                logger.warning("%s was written by an earlier version and is not used. You can delete it.", old.parent)
            if missing:
                write_json(self.folder / "settings.json", self.settings)
        return broadcast_object_list([missing])[0]

    def _write_shard(self, path: Path, rows: list[list[np.ndarray | BadImage]]) -> None:
        """Write one shard atomically, with a digest at its end.

        Args:
            path: File of the shard.
            rows: Embeddings of the views of each row. A row is bad if it has no views, or a view is a `BadImage`.
        """
        faults = [next((view for view in views if isinstance(view, BadImage)), None) for views in rows]
        vectors = [np.array([] if bad else views, self.dtype).ravel() for views, bad in zip(rows, faults, strict=True)]
        columns = {"vectors": pa.array(vectors, pa.large_list(pa.from_numpy_dtype(self.dtype)))}
        # The fault of a good row is None, which has neither attribute. `getattr` then returns the default, "".
        columns |= {name: [getattr(fault, name, "") for fault in faults] for name in ("reason", "detail")}
        table = pa.table(columns)
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
    """Convert an Arrow column of vectors, such as `vectors` in a table of `EmbeddingStore`, to a NumPy array.

    Args:
        column: Column of lists of numbers, all of the same length and none empty or null. Lists of lists are flattened.

    Returns:
        Read-only array of shape (rows, numbers per row).
    """
    values = column.combine_chunks()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
