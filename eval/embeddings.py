"""What all measurements share: embeddings of a data set, the result file, and what a command prints.

    store = EmbeddingStore(load_embedder("data/openmoji/base"), cache_home(), batch_size=32)
    images = store.embed_images(open_split("data/openmoji/dataset", "test", "image"))
    text_embeds = store.embed_texts(["uma foto de um gato"])

Embeddings are computed once, and kept in files by what they depend on; training keeps its own so, too. Rows go through
in shards: an interrupted run continues at the first one that is missing or damaged, and the processes of a launch share
them out. No batch has rows of two shards, so that a shard depends neither on who makes it nor on which others are made.
One of a measurement is named by its own images or texts: a data set that has grown has its first shards.
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

IMAGES_PER_SHARD, TEXTS_PER_SHARD = 256, 2048  # what an interruption loses, and processes share out
EMBEDDING_FORMAT_VERSION = 2  # of what the embeddings depend on; raise it when that changes
BadRows = dict[int, tuple[str, str]]  # place of a row in its shard -> reason and detail
logger = logging.getLogger("capivara")


class EmbeddingCache:
    """Embeddings of rows, an Arrow table a shard: `vectors`, an empty list where a row is bad, `reason` and `detail`.

    The names of the folder and its files, `paths`, depend on all that the embeddings do; a file ends with a digest, and
    is there whole or not at all. `parts` are the rows of each shard.
    """

    def __init__(self, folder: Path, shards: list[range], shard_names: Sequence[str] | None = None):
        self.folder, self.shards = folder, shards
        self.paths = [
            folder / f"{name}.arrow" for name in shard_names or [f"shard-{n:05d}" for n in range(len(shards))]
        ]

    def find_missing(self) -> list[int]:
        """Shards that are still to be made, damaged ones among them; the same on all processes of a launch."""
        found: list[Any] = [None]
        if process_state().is_main_process:
            with ThreadPoolExecutor(DECODER_THREADS) as threads:
                found = [[number for number, good in enumerate(threads.map(digest_matches, self.paths)) if not good]]
            for path in filter(Path.exists, (self.paths[number] for number in found[0])):
                logger.warning("%s is damaged; it is made anew.", path)
            if found[0] and next(self.folder.parent.glob("*/*.npy"), None):  # their folders may have other names
                text = "%s has embeddings of an earlier version, *.npy: they are made anew, the files can be removed."
                logger.warning(text, self.folder.parent)
        return broadcast_object_list(found)[0]

    def make_shards(
        self, shard_numbers: Sequence[int], embed: Callable[[list[int]], Iterator[tuple[np.ndarray, BadRows]]]
    ) -> None:
        """Make shards: each process of a launch a run of neighbours, since a source may be read to its end.

        `embed` is given their numbers, and yields of each the array (rows, …), and the rows that are bad.
        """
        state = process_state()
        own = np.array_split(np.array(shard_numbers, dtype=int), state.num_processes)[state.process_index].tolist()
        for number, (embeds, bad) in zip(own, embed(own), strict=True):
            self.write_shard(number, embeds, bad)
        state.wait_for_everyone()

    def write_shard(self, shard_number: int, embeds: np.ndarray, bad_rows: BadRows) -> None:
        """Write a shard whole; what `embeds` has in bad rows is left out."""
        good = np.array([place not in bad_rows for place in range(len(embeds))])
        ends = np.cumsum(good * embeds[0].size)
        faults = zip(*(bad_rows.get(place, ("", "")) for place in range(len(embeds))), strict=True)
        vectors = pa.LargeListArray.from_arrays(np.insert(ends, 0, 0), embeds[good].ravel())
        table = pa.table([vectors, *map(pa.array, faults)], ["vectors", "reason", "detail"])
        with atomic_file(self.paths[shard_number]) as path:
            with pa.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
            append_digest(path)

    def load_table(self) -> pa.Table:
        """All shards, left on the disk, memory-mapped. Raises ValueError where one is of other rows."""
        tables = []
        for path, part in zip(self.paths, self.shards, strict=True):
            try:
                tables.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is no table of embeddings ({error}). Remove it.") from error
            if len(tables[-1]) != len(part):
                raise ValueError(f"{path} should have {len(part)} rows, it has {len(tables[-1])}. Remove it.")
        return pa.concat_tables(tables)


def vectors_to_array(table: pa.Table) -> np.ndarray:
    """(rows, numbers), read-only, of a table whose rows all have `vectors`, at least one."""
    vectors = table.column("vectors").combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(vectors), -1)


@dataclass(kw_only=True)
class EmbeddingArguments(ImageFileArguments):
    """How images and texts are embedded."""

    batch_size: int = flag(32, "Images that go through at once; twice as many captions.")
    precision: Literal["float32", "bf16"] = flag("float32", "bf16 is faster; its figures differ a little.")
    cache_dir: str = flag("auto", "Folder of embeddings; auto = $CAPIVARA_CACHE or ~/.cache/capivara, off = none.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        self.check_image_files()
        check_at_least(self, 1, "batch_size")


@dataclass(kw_only=True)
class ModelArguments(EmbeddingArguments):
    """What every measurement of a model takes."""

    role: Literal["baseline", "capivara"] = flag(
        "capivara", "What records call it. A baseline may be open_clip:NAME:PRETRAINED or open_clip:local-dir:FOLDER."
    )
    split: str = flag("test", "Split that is measured.")


@dataclass(frozen=True)
class EmbeddedImages:
    """Images of a data set in the shared space."""

    embeds: Tensor  # (kept images, width), unit length, float32
    rows: Tensor  # (kept images,), the row of each
    skipped: dict[int, str]  # row -> why its image is left out


@dataclass
class EmbeddingStore:
    """A model whose embeddings are kept in files."""

    embedder: Embedder
    cache_folder: Path | None = None  # folder of all caches; None for a temporary one that lasts as long as this object
    batch_size: int = 32  # images that go through at once; twice as many texts

    def __post_init__(self) -> None:
        self._temporary = None if self.cache_folder else tempfile.TemporaryDirectory(prefix="capivara-embeddings-")
        self.cache_folder = self.cache_folder or Path(
            broadcast_object_list([self._temporary.name])[0]
        )  # the main process's

    def embed_images(self, images: Split, description: str = "Images") -> EmbeddedImages:
        """Embeddings of images, without those that can't be read; ValueError where none can."""

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, BadRows]:
            embeds, bad, decoded = np.zeros((len(rows), 0), dtype=np.float32), {}, images.decode_images(rows)
            while chunk := list(islice(decoded, self.batch_size)):  # by row, so that a bad one moves no other
                good = {row - rows.start: image for row, image in chunk if not isinstance(image, BadImage)}
                faults = ((row, why) for row, why in chunk if isinstance(why, BadImage))
                bad |= {row - rows.start: (why.reason, images.describe_image_error(row, why)) for row, why in faults}
                if good:
                    found = self.embedder.embed_images([*good.values()], self.batch_size).numpy()
                    embeds = embeds if embeds.size else np.zeros((len(rows), found.shape[1]), np.float32)
                    embeds[[*good]] = found
                bar.update(len(chunk))
            return embeds, bad

        model = self.embedder.image_fingerprint
        table = self._load_or_make_table("images", model, images.image_digests, IMAGES_PER_SHARD, embed, description)
        skipped = {row: why for row, why in enumerate(table["detail"].to_pylist()) if why}
        if len(skipped) == len(images):
            raise ValueError(f"None of the {len(images)} images can be read: {skipped[0]}.")
        good = np.setdiff1d(np.arange(len(images)), [*skipped])
        embeds = vectors_to_array(table.filter(pc.equal(table["reason"], "")))
        return EmbeddedImages(torch.from_numpy(embeds.copy()), torch.from_numpy(good), skipped)

    def embed_texts(self, texts: Sequence[str], description: str = "Texts") -> Tensor:
        """(texts, width), unit length, float32. Equal texts are embedded once."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))  # neighbours are padded to one length

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, BadRows]:
            return self.embedder.embed_texts(
                distinct[rows.start : rows.stop], 2 * self.batch_size, bar.update
            ).numpy(), {}

        table = self._load_or_make_table(
            "texts", self.embedder.fingerprint, distinct, TEXTS_PER_SHARD, embed, description
        )
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
        """The cached table of `items` (texts, or digests of images); `embed` makes missing shards, each of its rows."""
        key = json_digest(
            {"version": EMBEDDING_FORMAT_VERSION, "model": model_fingerprint, "batch_size": self.batch_size},
            sort_keys=True,
        )
        parts = split_rows(len(items), rows_per_shard)
        names = [f"{kind}-{json_digest(items[part.start : part.stop])}" for part in parts]
        cache = EmbeddingCache(self.cache_folder / "evaluation" / key, parts, names)

        def embed_all(numbers: list[int]) -> Iterator[tuple[np.ndarray, BadRows]]:
            rows, quiet = sum(len(parts[number]) for number in numbers), not process_state().is_main_process
            with tqdm(total=rows, desc=description, unit=kind[:-1], disable=quiet or not numbers) as bar:
                for number in numbers:
                    yield embed(parts[number], bar)

        cache.make_shards(cache.find_missing(), embed_all)
        table = cache.load_table()
        process_state().wait_for_everyone()  # the temporary folder goes with the store of the main process
        return table


def open_store(args: ModelArguments) -> EmbeddingStore:
    """The model of the arguments, its embeddings kept in their cache folder; raises as `load_embedder`."""
    embedder = load_embedder(args.model, args.device, args.role == "baseline", args.precision)
    root = None if args.cache_dir == "off" else cache_home() if args.cache_dir == "auto" else Path(args.cache_dir)
    return EmbeddingStore(embedder, root, args.batch_size)


def write_result(
    args: ModelArguments, records: list[Record], store: EmbeddingStore, start_time: float, **metadata: Any
) -> None:
    """Write the result file of a command; `started`: `time.perf_counter()` before the first embedding."""
    seconds, device = time.perf_counter() - start_time, describe_device(store.embedder.device)
    known = {"model": args.model, "device": device, "precision": args.precision, "seconds": seconds}
    write_records(args.output, records, **known, **store.embedder.metadata, **metadata)


def run_evaluation(
    arguments_type: type[ModelArguments],
    doc: str,
    evaluate: Callable[[Any], list[Record]],
    argv: list[str] | None = None,
) -> None:
    """The command of a measurement: read the flags, measure, print the figures and what their reader must know."""
    args = parse_arguments(arguments_type, doc, argv)
    records = evaluate(args)
    if not process_state().is_main_process:
        return
    for record in records:
        what = record.direction or f"{record.dataset} {record.protocol}"
        value = f"{record.value:8.1f}" if record.is_rank else f"{100 * record.value:6.2f} %"
        chance = "" if record.chance is None else f"   chance {100 * record.chance:.2f} %"
        print(f"{what:28} {record.metric:24} {value}{chance}")
    content = read_json(args.output)
    for note in content.get("notes", []):
        print(note)
    if skipped := len(content["skipped"]):
        print(f"{skipped} images could not be read and are not in these figures; {args.output} lists them.")
