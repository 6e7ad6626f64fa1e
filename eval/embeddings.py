"""What all measurements share: embeddings of a data set, the result file, and what a command prints.

    store = EmbeddingStore(load_embedder("data/openmoji/base"), cache_folder("auto"), batch_size=32)
    images = store.images(open_split("data/openmoji/dataset", "test", "image"))
    text_embeds = store.texts(["uma foto de um gato"])

Embeddings are computed once, kept by what they depend on, and shared out to all processes of a launch. A shard of
`caption_data.embedding_cache` is named by its own images or texts: a data set that has grown has its first shards.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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

from capivara_common.cli import at_least, flag, parse
from capivara_common.environment import device_description, processes
from capivara_common.files import read_json
from capivara_common.image_files import BadImage, ImageFileArguments
from capivara_common.tasks import all_parts
from caption_data.embedding_cache import FILES_VERSION, Bad, EmbeddingCache, cache_folder, vectors_of
from caption_data.rows import digest_of
from caption_data.sources import Split
from eval.records.schema import Record, write_records
from modeling_capivara.two_towers import Embedder, load_embedder

IMAGES_PER_SHARD, TEXTS_PER_SHARD = 256, 2048  # what an interruption loses, and processes share out


@dataclass(kw_only=True)
class EmbeddingArguments(ImageFileArguments):
    """How images and texts are embedded."""

    batch_size: int = flag(32, "Images that go through at once; twice as many captions.")
    precision: Literal["float32", "bf16"] = flag("float32", "bf16 is faster; its figures differ a little.")
    cache_dir: str = flag("auto", "Folder of embeddings; auto = $CAPIVARA_CACHE or ~/.cache/capivara, off = none.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        self.check_image_files()
        at_least(self, 1, "batch_size")


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
    root: Path | None = None  # folder of all caches; None for a temporary one that lasts as long as this object
    batch_size: int = 32  # images that go through at once; twice as many texts

    def __post_init__(self) -> None:
        self._temporary = None if self.root else tempfile.TemporaryDirectory(prefix="capivara-embeddings-")
        self.root = self.root or Path(broadcast_object_list([self._temporary.name])[0])  # the main process's

    def images(self, images: Split, description: str = "Images") -> EmbeddedImages:
        """Embeddings of images, without those that can't be read; ValueError where none can."""

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, Bad]:
            embeds, bad, decoded = np.zeros((len(rows), 0), dtype=np.float32), {}, images.decoded(rows)
            while chunk := list(islice(decoded, self.batch_size)):  # by row, so that a bad one moves no other
                good = {row - rows.start: image for row, image in chunk if not isinstance(image, BadImage)}
                faults = ((row, why) for row, why in chunk if isinstance(why, BadImage))
                bad |= {row - rows.start: (why.reason, images.fault(row, why)) for row, why in faults}
                if good:
                    found = self.embedder.images([*good.values()], self.batch_size).numpy()
                    embeds = embeds if embeds.size else np.zeros((len(rows), found.shape[1]), np.float32)
                    embeds[[*good]] = found
                bar.update(len(chunk))
            return embeds, bad

        model = self.embedder.image_fingerprint
        table = self._opened("images", model, images.digests, IMAGES_PER_SHARD, embed, description)
        skipped = {row: why for row, why in enumerate(table["detail"].to_pylist()) if why}
        if len(skipped) == len(images):
            raise ValueError(f"None of the {len(images)} images can be read: {skipped[0]}.")
        good = np.setdiff1d(np.arange(len(images)), [*skipped])
        embeds = vectors_of(table.filter(pc.equal(table["reason"], "")))
        return EmbeddedImages(torch.from_numpy(embeds.copy()), torch.from_numpy(good), skipped)

    def texts(self, texts: Sequence[str], description: str = "Texts") -> Tensor:
        """(texts, width), unit length, float32. Equal texts are embedded once."""
        distinct = distinct_texts(texts)

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, Bad]:
            return self.embedder.texts(distinct[rows.start : rows.stop], 2 * self.batch_size, bar.update).numpy(), {}

        table = self._opened("texts", self.embedder.fingerprint, distinct, TEXTS_PER_SHARD, embed, description)
        position = {text: number for number, text in enumerate(distinct)}
        return torch.from_numpy(vectors_of(table)[[position[text] for text in texts]])

    def _opened(
        self, kind: str, model: str, items: list[str], shard: int, embed: Callable, description: str
    ) -> pa.Table:
        """The cached table of `items` (texts, or digests of images); `embed` makes missing shards, each of its rows."""
        key = digest_of({"version": FILES_VERSION, "model": model, "batch_size": self.batch_size}, sort_keys=True)
        parts = all_parts(len(items), shard)
        names = [f"{kind}-{digest_of(items[part.start : part.stop])}" for part in parts]
        cache = EmbeddingCache(self.root / "evaluation" / key, parts, names)

        def embed_all(numbers: list[int]) -> Iterator[tuple[np.ndarray, Bad]]:
            rows, quiet = sum(len(parts[number]) for number in numbers), not processes().is_main_process
            with tqdm(total=rows, desc=description, unit=kind[:-1], disable=quiet or not numbers) as bar:
                for number in numbers:
                    yield embed(parts[number], bar)

        cache.make(cache.missing(), embed_all)
        table = cache.table()
        processes().wait_for_everyone()  # the temporary folder goes with the store of the main process
        return table


def distinct_texts(texts: Sequence[str]) -> list[str]:
    """The different ones, so that neighbours are padded to the same length."""
    return sorted(set(texts), key=lambda text: (len(text), text))


def open_store(args: ModelArguments) -> EmbeddingStore:
    """The model of the arguments, its embeddings kept in their cache folder; raises as `load_embedder`."""
    embedder = load_embedder(args.model, args.device, args.role == "baseline", args.precision)
    return EmbeddingStore(embedder, cache_folder(args.cache_dir), args.batch_size)


def write_result(
    args: ModelArguments, records: list[Record], store: EmbeddingStore, started: float, **facts: Any
) -> None:
    """Write the result file of a command; `started`: `time.perf_counter()` before the first embedding."""
    seconds, device = time.perf_counter() - started, device_description(store.embedder.device)
    known = {"model": args.model, "device": device, "precision": args.precision, "seconds": seconds}
    write_records(args.output, records, **known, **store.embedder.facts, **facts)


def run_evaluation(
    kind: type[ModelArguments], doc: str, evaluate: Callable[[Any], list[Record]], argv: list[str] | None = None
) -> None:
    """The command of a measurement: read the flags, measure, print the figures and what their reader must know."""
    args = parse(kind, doc, argv)
    records = evaluate(args)
    if not processes().is_main_process:
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
