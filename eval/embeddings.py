"""What all measurements share: embeddings of a data set, the result file, and what a command prints.

    store = EmbeddingStore(load_embedder("data/openmoji/base"), cache_folder("auto"), batch_size=32)
    images = store.images(ImageRows(rows.__getitem__, len(rows)))
    text_embeds = store.texts(["uma foto de um gato"])

Embeddings are computed once, kept by what they depend on, and shared out to all processes of a launch. A shard of
`caption_data.embedding_cache` is named by its own images or texts: a data set that has grown has its first shards.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from capivara_common.cli import parse, user_errors
from capivara_common.environment import device_description, processes
from capivara_common.files import read_json
from capivara_common.image_files import BadImage
from capivara_common.tasks import all_parts
from caption_data.embedding_cache import FILES_VERSION, EmbeddingCache, ImageRows, cache_folder
from caption_data.rows import digest_of
from caption_data.sources import NoSplit
from eval.eval_arguments import ModelArguments
from eval.records.schema import Record, header, hub_revision, write_records
from modeling_capivara.two_towers import Embedder, load_embedder

IMAGES_PER_SHARD, TEXTS_PER_SHARD = 256, 2048  # what an interruption loses, and processes share out


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
        self._temporary = None
        if self.root is None:
            made = [tempfile.mkdtemp(prefix="capivara-embeddings-") if processes().is_main_process else None]
            self._temporary = Path(broadcast_object_list(made)[0])

    def images(self, images: ImageRows, description: str = "Images") -> EmbeddedImages:
        """Embeddings of images, without those that can't be read.

        Raises:
            ValueError: no image can be read.
        """

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, list[tuple[int, str]]]:
            good, parts, bad = [], [], []
            decoded = images.decoded(rows)
            while chunk := list(islice(decoded, self.batch_size)):  # by row, so that a bad one moves no other
                pictures = [image for _, image in chunk if not isinstance(image, BadImage)]
                good += [row - rows.start for row, image in chunk if not isinstance(image, BadImage)]
                bad += [(row - rows.start, images.fault(row, why)) for row, why in chunk if isinstance(why, BadImage)]
                if pictures:
                    parts.append(self.embedder.images(pictures, self.batch_size))
                bar.update(len(chunk))
            embeds = np.full((len(rows), parts[0].shape[1] if parts else 0), np.nan, dtype=np.float32)
            if parts:
                embeds[good] = torch.cat(parts)
            return embeds, bad

        parts = all_parts(images.count, IMAGES_PER_SHARD)
        digests = [digest_of(images.digests[part.start : part.stop]) for part in parts]
        cache = self._kept("images", self.embedder.image_fingerprint, parts, digests, embed, description)
        good = [[row for row in part if row not in cache.bad] for part in parts]
        if not any(good):
            raise ValueError(f"None of the {images.count} images can be read: {next(iter(cache.bad.values()))}.")
        shards = zip(cache.arrays, parts, good, strict=True)
        embeds = [array[[row - part.start for row in rows]] for array, part, rows in shards if rows]
        rows = torch.tensor([row for rows in good for row in rows])
        return EmbeddedImages(torch.from_numpy(np.concatenate(embeds)), rows, cache.bad)

    def texts(self, texts: Sequence[str], description: str = "Texts") -> Tensor:
        """(texts, width), unit length, float32. Equal texts are embedded once."""
        distinct = distinct_texts(texts)

        def embed(rows: range, bar: tqdm) -> tuple[np.ndarray, list]:
            return self.embedder.texts(distinct[rows.start : rows.stop], 2 * self.batch_size, bar.update).numpy(), []

        parts = all_parts(len(distinct), TEXTS_PER_SHARD)
        digests = [digest_of(distinct[part.start : part.stop]) for part in parts]
        cache = self._kept("texts", self.embedder.fingerprint, parts, digests, embed, description)
        position = {text: number for number, text in enumerate(distinct)}
        return torch.from_numpy(np.concatenate(cache.arrays)[[position[text] for text in texts]])

    def _kept(
        self, kind: str, model: str, parts: list[range], digests: list[str], embed: Callable, description: str
    ) -> EmbeddingCache:
        """The cache, opened, of which `embed` has made the shards that were missing, each from its rows."""
        key = digest_of({"version": FILES_VERSION, "model": model, "batch_size": self.batch_size}, sort_keys=True)
        folder = (self.root or self._temporary) / "evaluation" / key
        cache = EmbeddingCache(folder, parts, [f"{kind}-{digest}.npy" for digest in digests])

        def embed_all(numbers: list[int]) -> Iterator[tuple[np.ndarray, list]]:
            rows, quiet = sum(len(parts[number]) for number in numbers), not processes().is_main_process
            with tqdm(total=rows, desc=description, unit=kind[:-1], disable=quiet or not numbers) as bar:
                for number in numbers:
                    yield embed(parts[number], bar)

        cache.make(cache.missing(), embed_all)
        cache.open()
        return cache

    def close(self) -> None:
        """Remove the temporary folder, where there is one, once all processes have read it."""
        processes().wait_for_everyone()
        if self._temporary is not None and processes().is_main_process:
            shutil.rmtree(self._temporary, ignore_errors=True)


def distinct_texts(texts: Sequence[str]) -> list[str]:
    """The different ones, so that neighbours are padded to the same length."""
    return sorted(set(texts), key=lambda text: (len(text), text))


def open_store(args: ModelArguments) -> EmbeddingStore:
    """The model of the arguments, its embeddings kept in their cache folder.

    Raises:
        ValueError, OSError, ImportError: as of `load_embedder`.
    """
    embedder = load_embedder(args.model, args.device, args.role == "baseline", args.precision, args.trust_remote_code)
    return EmbeddingStore(embedder, cache_folder(args.cache_dir), args.batch_size)


def write_result(
    args: ModelArguments,
    records: list[Record],
    source: str,
    fingerprint: str,
    store: EmbeddingStore,
    started: float,
    **parts: Any,
) -> None:
    """Write the result file of a command.

    Args:
        source: folder or Hub id of the data.
        started: `time.perf_counter()` before the first embedding.
        parts: further keys of the file, `skipped` among them (row -> why it is not in the figures); of these, `name` is
            not written: it is what the header calls the data.
    """
    facts = header(
        dataset=parts.pop("name", source),
        dataset_revision=hub_revision(source, "dataset"),
        dataset_fingerprint=fingerprint,
        model=args.model,
        model_revision=hub_revision(args.model, "model"),
        device=device_description(store.embedder.device),
        precision=args.precision,
        seconds=time.perf_counter() - started,
        skipped=len(parts["skipped"]),
    )
    write_records(args.output, records, facts, **parts)


@user_errors
def run_evaluation(
    kind: type[ModelArguments], doc: str, evaluate: Callable[[Any], list[Record]], argv: list[str] | None = None
) -> None:
    """The command of a measurement: read the flags, measure, print the figures and what their reader must know."""
    args = parse(kind, doc, argv)
    try:
        records = evaluate(args)
    except NoSplit as error:
        raise error.by_flag(args) from error
    if not processes().is_main_process:
        return
    for record in records:
        what = f"{record.direction:14} {record.metric:12}"
        if record.task != "retrieval":
            what = f"{record.dataset:20} {record.protocol:8} {record.metric:24}"
        value = f"{record.value:8.1f}" if record.is_rank else f"{100 * record.value:6.2f} %"
        chance = "" if record.chance is None else f"   chance {100 * record.chance:.2f} %"
        print(f"{what} {value}{chance}")
    content = read_json(args.output)
    for note in content.get("notes", []):
        print(note)
    if skipped := len(content["skipped"]):
        print(f"{skipped} images could not be read and are not in these figures; {args.output} lists them.")
