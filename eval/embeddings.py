"""Cached embeddings, and the command line shared by all evaluation commands.

    store = EmbeddingStore(load_embedder("data/openmoji/base"), cache_home(), batch_size=32)
    images = store.embed_images(open_split("data/openmoji/dataset", "test", "image"))
    text_embeds = store.embed_texts(["uma foto de um gato"])

The cache is divided into shards, files with the embeddings of some hundreds of rows. An interrupted run computes only
the shards that are missing or damaged, and the processes of a distributed launch divide the shards among themselves. No
batch crosses the border of a shard, so a shard has the same bits whichever process computes it.

In evaluation, the name of a shard is a digest of its images or texts: if rows are appended to a dataset, its full
shards stay valid. Training (`training.inputs`) uses `EmbeddingCache` with names of its own.
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
EMBEDDING_FORMAT_VERSION = 2  # part of the cache key; increase it if the same inputs give other embeddings
BadRows = dict[int, tuple[str, str]]  # position of a row in its shard -> reason and detail
logger = logging.getLogger("capivara")


class EmbeddingCache:
    """Embeddings of the rows of a dataset, stored as one Arrow table per shard.

    A table has the columns `vectors` (an empty list if the row is bad), `reason` and `detail` (both empty unless it is
    bad). The names of the folder and of the files must identify everything that the embeddings depend on. A file ends
    with a digest and is written atomically, so an incomplete or damaged file is detected.

    Args:
        folder: Folder of the shards.
        shards: Rows of each shard.
        shard_names: File names without extension. Default: `shard-00000`, `shard-00001` and so on.
    """

    def __init__(self, folder: Path, shards: list[range], shard_names: Sequence[str] | None = None):
        self.folder, self.shards = folder, shards
        self.paths = [
            folder / f"{name}.arrow" for name in shard_names or [f"shard-{n:05d}" for n in range(len(shards))]
        ]

    def find_missing(self) -> list[int]:
        """Return the numbers of the shards that are missing or damaged, the same on all processes of a launch."""
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
        """Compute and write shards, divided among the processes of a launch.

        Each process gets consecutive shards, since some sources can only be read in order.

        Args:
            shard_numbers: Numbers of all shards to make.
            embed: Function that gets the shard numbers of this process. It yields, for each shard, its embeddings
                (rows, …) and its bad rows.
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
        """Load all shards as one memory-mapped table.

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
    """Return the `vectors` of a table as a read-only array (rows, values per row). Every row must have a vector."""
    vectors = table.column("vectors").combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(vectors), -1)


@dataclass(kw_only=True)
class EmbeddingArguments(ImageFileArguments):
    """Command-line arguments for embedding images and texts."""

    batch_size: int = flag(32, "Images in a batch. A batch of texts is twice as large.")
    precision: Literal["float32", "bf16"] = flag("float32", "Precision. bf16 is faster; its figures differ slightly.")
    cache_dir: str = flag("auto", "Cache folder; auto = $CAPIVARA_CACHE or ~/.cache/capivara, off = no cache is kept.")
    device: str | None = flag(None, "Device: cpu, cuda, or one GPU such as cuda:1. Default: the GPU if there is one.")

    def __post_init__(self) -> None:
        self.check_image_files()
        check_at_least(self, 1, "batch_size")


@dataclass(kw_only=True)
class ModelArguments(EmbeddingArguments):
    """Command-line arguments shared by all evaluation commands."""

    role: Literal["baseline", "capivara"] = flag(
        "capivara", "Role in tables. A baseline may also be open_clip:NAME:PRETRAINED or open_clip:local-dir:FOLDER."
    )
    split: str = flag("test", "Split of the dataset to measure.")


@dataclass(frozen=True)
class EmbeddedImages:
    """Embeddings of the readable images of a dataset."""

    embeds: Tensor  # (readable images, width), unit length, float32
    rows: Tensor  # (readable images,), row of each image in the dataset, ascending
    skipped: dict[int, str]  # row of each unreadable image -> reason


@dataclass
class EmbeddingStore:
    """A model with a cache of its embeddings on disk."""

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
            Embeddings of the images that can be read, and the reasons why others can't.

        Raises:
            ValueError: If no image can be read.
        """

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, BadRows]:
            embeds, bad_rows, decoded = np.zeros((len(rows), 0), dtype=np.float32), {}, images.decode_images(rows)
            # Batches are cut by row, so that a bad image does not move the others to other batches.
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
        """Embed texts, or load their embeddings from the cache. Equal texts are embedded once.

        Args:
            texts: The texts.
            description: Label of the progress bar.

        Returns:
            Unit-length embeddings (texts, width), float32.
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
        """Load the cached embeddings of all items, after making the shards that are missing.

        Args:
            kind: "images" or "texts".
            model_fingerprint: Digest of the weights and settings of the encoder.
            items: The texts, or the digests of the images.
            rows_per_shard: Number of items per shard.
            embed: Function that embeds a range of items, updates the progress bar, and returns embeddings and bad rows.
            description: Label of the progress bar.
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
    """Load the model that the arguments name, with its embedding cache.

    Raises:
        ValueError, OSError, ImportError: If `load_embedder` can't load the model.
    """
    embedder = load_embedder(args.model, args.device, args.role == "baseline", args.precision)
    if args.cache_dir == "off":
        return EmbeddingStore(embedder, None, args.batch_size)
    return EmbeddingStore(embedder, cache_home() if args.cache_dir == "auto" else Path(args.cache_dir), args.batch_size)


def write_result(
    args: ModelArguments, records: list[Record], store: EmbeddingStore, start_time: float, **metadata: Any
) -> None:
    """Write the result file of an evaluation command.

    Args:
        args: Command-line arguments, among them the path of the file.
        records: The measured figures.
        store: The model that was measured.
        start_time: Value of `time.perf_counter()` before the first embedding.
        metadata: Other arguments of `write_records`, such as dataset, fingerprint and skipped, and further keys of the
            result file.
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
    """Run an evaluation command: parse the arguments, measure, and print figures and notes.

    Args:
        arguments_type: Dataclass of the command's arguments.
        doc: Module docstring, shown by --help.
        evaluate: Function that measures and writes the result file.
        argv: Command-line arguments. Default: those of the program.
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
        print(f"{skipped} images could not be read and are not included in these figures. {args.output} lists them.")
