"""Compute and cache embeddings, and run the command line that all evaluation commands share.

    store = EmbeddingStore(load_embedder("data/openmoji/base"), cache_home(), batch_size=32)
    images = store.embed_images(open_split("data/openmoji/dataset", "test", "image"))
    text_embeds = store.embed_texts(["uma foto de um gato"])

The cache is divided into shards. A shard is a file with the embeddings of up to 256 images or 2048 texts. If an
interrupted run is repeated, only the shards that are missing or damaged are computed. The processes of a distributed
launch divide the shards among themselves. All rows of a batch are in one shard, so a shard has the same bits whichever
process computes it.

In evaluation, the file name of a shard is a digest of its images or texts. If rows are appended to a dataset, the
shards that were full before stay valid. Training (`training.inputs`) uses `EmbeddingCache` with other file names.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from capivara_common.cli import check_at_least, flag, parse_arguments
from capivara_common.environment import cache_home, describe_device, process_state
from capivara_common.files import append_digest, atomic_file, digest_matches, read_json
from capivara_common.image_files import DECODER_THREADS, BadImage, ImageFileArguments
from capivara_common.tasks import split_rows
from caption_data.rows import json_digest
from caption_data.sources import Split
from eval.records.schema import Record, write_records
from modeling_capivara.two_towers import Embedder, load_embedder

# Rows of a shard. An interruption loses at most one shard per process.
IMAGES_PER_SHARD = 256
TEXTS_PER_SHARD = 2048
EMBEDDING_FORMAT_VERSION = 2  # part of the cache key; increase it when a code change alters the embeddings
BadRows = dict[int, tuple[str, str]]  # position of a row in its shard -> reason and detail
logger = logging.getLogger("capivara")


class EmbeddingCache:
    """Embeddings of the rows of a dataset, stored as one Arrow file per shard (consecutive rows).

    A table has the columns `vectors`, `reason` and `detail`. A bad row, for example one with an unreadable image, has
    an empty list in `vectors`; its `reason` and `detail` say what is wrong. Both are empty for all other rows. A file
    ends with a digest and is written atomically, so an incomplete or damaged file is detected. Existing files are used
    without comparing them with the data, so the names of folder and files must identify everything that the embeddings
    depend on.

    Args:
        folder: Folder of the shards.
        shards: Row numbers of each shard, as a range.
        shard_names: File name of each shard without extension. Default: `shard-00000`, `shard-00001` and so on.
    """

    def __init__(self, folder: Path, shards: list[range], shard_names: Sequence[str] | None = None):
        self.folder, self.shards = folder, shards
        self.paths = [
            folder / f"{name}.arrow" for name in shard_names or [f"shard-{n:05d}" for n in range(len(shards))]
        ]

    def find_missing(self) -> list[int]:
        """Return the numbers of all shards whose file is missing or damaged.

        The main process checks the files. All processes of a distributed launch must call the method, and get the same
        list.
        """
        missing: list[int] | None = None
        if process_state().is_main_process:
            with ThreadPoolExecutor(DECODER_THREADS) as threads:
                missing = [number for number, valid in enumerate(threads.map(digest_matches, self.paths)) if not valid]
            for path in filter(Path.exists, (self.paths[number] for number in missing)):
                logger.warning("%s is damaged. It will be computed again.", path)
            if missing and next(self.folder.parent.glob("*/*.npy"), None):  # files of an earlier version
                text = "%s has embeddings of an earlier version (*.npy), which are not used. You can delete them."
                logger.warning(text, self.folder.parent)
        return broadcast_object_list([missing])[0]

    def make_shards(
        self, shard_numbers: Sequence[int], embed: Callable[[list[int]], Iterator[tuple[np.ndarray, BadRows]]]
    ) -> None:
        """Compute and write shards, divided among the processes of a distributed launch.

        Each process gets consecutive shards, because some datasets can only be read in order.

        Args:
            shard_numbers: Numbers of all shards to compute.
            embed: Function that gets the numbers of the shards that this process must compute. For each of them, it
                yields the embeddings (rows, …) and the bad rows (position in the shard -> reason and detail).
        """
        state = process_state()
        chunks = np.array_split(np.array(shard_numbers, dtype=int), state.num_processes)
        local_numbers = chunks[state.process_index].tolist()
        for number, (embeds, bad_rows) in zip(local_numbers, embed(local_numbers), strict=True):
            self.write_shard(number, embeds, bad_rows)
        state.wait_for_everyone()

    def write_shard(self, shard_number: int, embeds: np.ndarray, bad_rows: BadRows) -> None:
        """Write one shard atomically.

        Args:
            shard_number: Number of the shard.
            embeds: Embeddings (rows, …). The values at the positions of bad rows are ignored.
            bad_rows: Position in the shard -> reason and detail.
        """
        good = np.array([position not in bad_rows for position in range(len(embeds))])
        ends = np.cumsum(good * embeds[0].size)
        faults = zip(*(bad_rows.get(position, ("", "")) for position in range(len(embeds))), strict=True)
        vectors = pa.LargeListArray.from_arrays(np.insert(ends, 0, 0), embeds[good].ravel())
        table = pa.table([vectors, *map(pa.array, faults)], ["vectors", "reason", "detail"])
        with atomic_file(self.paths[shard_number]) as path:
            with pa.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
            append_digest(path)

    def load_table(self) -> pa.Table:
        """Load all shards as one memory-mapped table with the columns `vectors`, `reason` and `detail`.

        Raises:
            ValueError: If a file is not an Arrow table, or has another number of rows than its shard.
        """
        tables = []
        for path, part in zip(self.paths, self.shards, strict=True):
            try:
                tables.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is not a table of embeddings ({error}). Delete it and run again.") from error
            if len(tables[-1]) != len(part):
                rows = len(tables[-1])
                raise ValueError(f"{path} must have {len(part)} rows, but has {rows}. Delete it and run again.")
        return pa.concat_tables(tables)


def vectors_to_array(table: pa.Table) -> np.ndarray:
    """Return the column `vectors` of a table as an array.

    Args:
        table: Table from `EmbeddingCache.load_table`, without bad rows, because these have no vector.

    Returns:
        Read-only array (rows, values per row).
    """
    vectors = table.column("vectors").combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(vectors), -1)


@dataclass(kw_only=True)
class EmbeddingArguments(ImageFileArguments):
    """Command-line arguments for embedding images and texts: batch size, precision, cache, device and image files."""

    batch_size: int = flag(32, "Images in a batch. A batch of texts is twice as large.")
    precision: Literal["float32", "bf16"] = flag("float32", "Precision. bf16 is faster; its results differ slightly.")
    cache_dir: str = flag("auto", "Cache folder; auto = $CAPIVARA_CACHE or ~/.cache/capivara, off = no cache is kept.")
    device: str | None = flag(None, "Device: cpu, cuda, or one GPU such as cuda:1. Default: the GPU if there is one.")

    def __post_init__(self) -> None:
        self.check_image_files()
        check_at_least(self, 1, "batch_size")


@dataclass(kw_only=True)
class ModelArguments(EmbeddingArguments):
    """Command-line arguments shared by the commands that measure one model on one dataset split."""

    role: Literal["baseline", "capivara"] = flag(
        "capivara", "Role of the model in tables: capivara or baseline. An open_clip model must be a baseline."
    )
    split: str = flag("test", "Split of the dataset to measure.")


@dataclass(frozen=True)
class EmbeddedImages:
    """Embeddings of all readable images of a dataset split, and the reasons why other images can't be read."""

    embeds: Tensor  # (readable images, width), unit length, float32
    rows: Tensor  # (readable images,), row number of each image in the split, ascending
    skipped: dict[int, str]  # row number of each unreadable image -> reason


@dataclass
class EmbeddingStore:
    """Embeddings of images and texts, which are computed with a model and cached on disk."""

    embedder: Embedder
    cache_folder: Path | None = None  # folder of all caches; None: a temporary folder that is deleted with this object
    batch_size: int = 32  # images in a batch; a batch of texts is twice as large

    def __post_init__(self) -> None:
        self._temporary = None if self.cache_folder else tempfile.TemporaryDirectory(prefix="capivara-embeddings-")
        if self.cache_folder is None:  # all processes use the temporary folder of the main process
            self.cache_folder = Path(broadcast_object_list([self._temporary.name])[0])

    def embed_images(self, images: Split, description: str = "Images") -> EmbeddedImages:
        """Embed the images of a dataset split, or load their embeddings from the cache.

        Args:
            images: The split.
            description: Label of the progress bar.

        Returns:
            Embeddings of the images that can be read, and the reasons why other images can't be read.

        Raises:
            ValueError: If no image can be read.
        """

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, BadRows]:
            embeds, bad_rows, decoded = np.zeros((len(rows), 0), dtype=np.float32), {}, images.decode_images(rows)
            # A batch is a fixed range of rows, so that a bad image does not move other images to other batches.
            while batch := list(islice(decoded, self.batch_size)):
                good = {row - rows.start: image for row, image in batch if not isinstance(image, BadImage)}
                for row, error in batch:
                    if isinstance(error, BadImage):
                        bad_rows[row - rows.start] = (error.reason, images.describe_image_error(row, error))
                if good:
                    batch_embeds = self.embedder.embed_images([*good.values()], self.batch_size).numpy()
                    embeds = embeds if embeds.size else np.zeros((len(rows), batch_embeds.shape[1]), np.float32)
                    embeds[[*good]] = batch_embeds
                bar.update(len(batch))
            return embeds, bad_rows

        model = self.embedder.image_fingerprint
        table = self._load_or_make_table("images", model, images.image_digests, IMAGES_PER_SHARD, embed, description)
        skipped = {row: detail for row, detail in enumerate(table["detail"].to_pylist()) if detail}
        if len(skipped) == len(images):
            raise ValueError(f"At least one image must be readable, but none of {len(images)} is. First: {skipped[0]}.")
        good = np.setdiff1d(np.arange(len(images)), [*skipped])
        embeds = vectors_to_array(table.filter(pc.equal(table["reason"], "")))
        return EmbeddedImages(torch.from_numpy(embeds.copy()), torch.from_numpy(good), skipped)

    def embed_texts(self, texts: Sequence[str], description: str = "Texts") -> Tensor:
        """Embed texts, or load their embeddings from the cache. A text that occurs several times is embedded once.

        Args:
            texts: The texts.
            description: Label of the progress bar.

        Returns:
            Unit-length embeddings (texts, width), float32, in the order of `texts`.
        """
        # Texts of similar length are in one batch, so that they need little padding.
        distinct = sorted(set(texts), key=lambda text: (len(text), text))

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, BadRows]:
            shard_texts = distinct[rows.start : rows.stop]
            return self.embedder.embed_texts(shard_texts, 2 * self.batch_size, bar.update).numpy(), {}

        model = self.embedder.fingerprint
        table = self._load_or_make_table("texts", model, distinct, TEXTS_PER_SHARD, embed, description)
        position = {text: number for number, text in enumerate(distinct)}
        return torch.from_numpy(vectors_to_array(table)[[position[text] for text in texts]])

    def _load_or_make_table(
        self,
        kind: str,
        model_fingerprint: str,
        items: list[str],
        rows_per_shard: int,
        embed: Callable,
        description: str,
    ) -> pa.Table:
        """Load the cached embeddings of all items, after computing the missing shards.

        Args:
            kind: "images" or "texts"; part of the file names.
            model_fingerprint: Digest of the weights and settings of the encoder.
            items: The texts, or the digests of the images.
            rows_per_shard: Number of items per shard.
            embed: Function that gets a range of positions in `items` and a progress bar, which it updates. It returns
                the embeddings and the bad rows of this range.
            description: Label of the progress bar.

        Returns:
            A table with a row per item and the columns `vectors`, `reason` and `detail`.
        """
        key = {"version": EMBEDDING_FORMAT_VERSION, "model": model_fingerprint, "batch_size": self.batch_size}
        key = json_digest(key, sort_keys=True)
        parts = split_rows(len(items), rows_per_shard)
        names = [f"{kind}-{json_digest(items[part.start : part.stop])}" for part in parts]
        cache = EmbeddingCache(self.cache_folder / "evaluation" / key, parts, names)

        def embed_all(numbers: list[int]) -> Iterator[tuple[np.ndarray, BadRows]]:
            rows, hidden = sum(len(parts[number]) for number in numbers), not process_state().is_main_process
            with tqdm(total=rows, desc=description, unit=kind[:-1], disable=hidden or not numbers) as bar:
                for number in numbers:
                    yield embed(parts[number], bar)

        cache.make_shards(cache.find_missing(), embed_all)
        table = cache.load_table()
        process_state().wait_for_everyone()  # the main process may delete the temporary folder after this
        return table


def open_store(args: ModelArguments) -> EmbeddingStore:
    """Load the model that the command-line arguments name, and open its embedding cache.

    Raises:
        ValueError, OSError, ImportError: If the model can't be loaded, as `load_embedder` raises them.
    """
    embedder = load_embedder(args.model, args.device, args.role == "baseline", args.precision)
    if args.cache_dir == "off":
        return EmbeddingStore(embedder, None, args.batch_size)
    return EmbeddingStore(embedder, cache_home() if args.cache_dir == "auto" else Path(args.cache_dir), args.batch_size)


def write_result(
    args: ModelArguments, records: list[Record], store: EmbeddingStore, start_time: float, **metadata: Any
) -> None:
    """Write the result file of an evaluation command to `args.output`.

    Args:
        args: Command-line arguments.
        records: The measured values.
        store: The model that was measured, with its cache.
        start_time: Value of `time.perf_counter()` before the first embedding.
        metadata: Further keyword arguments of `write_records`. `dataset` (folder, file pattern or Hub id of the images)
            and `fingerprint` (digest of the measured data) are required; `skipped` (row number -> reason) and `name`
            are optional. Any other keyword, such as `notes`, becomes a key of the result file.
    """
    seconds, device = time.perf_counter() - start_time, describe_device(store.embedder.device)
    shared = {"model": args.model, "device": device, "precision": args.precision, "seconds": seconds}
    write_records(args.output, records, **shared, **store.embedder.metadata, **metadata)


def run_evaluation(
    arguments_type: type[ModelArguments],
    doc: str,
    evaluate: Callable[[Any], list[Record]],
    argv: list[str] | None = None,
) -> None:
    """Run an evaluation command: parse the arguments, measure, and print results and notes.

    Args:
        arguments_type: Dataclass of the command's arguments.
        doc: Docstring of the command's module, shown by --help.
        evaluate: Function that gets the parsed arguments, measures, writes the result file, and returns the records.
        argv: Command-line arguments; the arguments of the program if None.
    """
    args = parse_arguments(arguments_type, doc, argv)
    records = evaluate(args)
    if not process_state().is_main_process:
        return
    for record in records:
        label = record.direction or f"{record.dataset} {record.protocol}"
        value = f"{record.value:8.1f}" if record.is_rank else f"{100 * record.value:6.2f} %"
        chance = "" if record.chance is None else f"   chance {100 * record.chance:.2f} %"
        print(f"{label:28} {record.metric:24} {value}{chance}")
    content = read_json(args.output)
    for note in content.get("notes", []):
        print(note)
    if skipped := len(content["skipped"]):
        print(f"{skipped} images could not be read and are not included in these results. {args.output} lists them.")
