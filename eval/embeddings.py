"""Embeddings of a data set: computed once, kept by what they depend on, shared by all processes of a launch.

    store = EmbeddingStore(load_embedder("data/openmoji/base"), cache_folder("auto"), batch_size=32)
    images = store.images(ImageRows(rows.__getitem__, len(rows)))
    text_embeds = store.texts(["uma foto de um gato"])

A shard of `caption_data.embedding_cache` is named by its own images or texts: a data set that has grown has its first
shards.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from capivara_common.environment import processes
from capivara_common.image_files import BadImage
from capivara_common.tasks import all_parts
from caption_data.embedding_cache import FILES_VERSION, EmbeddingCache, cache_key
from caption_data.image_rows import ImageRows
from caption_data.rows import digest_of
from eval.capivara_metrics.metrics import chance_recall, cross_modal_ranks
from modeling_capivara.image_classification_capivara import check_truncate_dim, unit_length
from modeling_capivara.two_towers import Embedder
from records.schema import DIRECTIONS

IMAGES_PER_SHARD, TEXTS_PER_SHARD = 256, 2048  # what an interruption loses, and processes share out


@dataclass(frozen=True)
class EmbeddedImages:
    """Images of a data set in the shared space."""

    embeds: Tensor  # (kept images, width), unit length, float32
    rows: Tensor  # (kept images,), the row of each
    skipped: dict[int, str]  # row -> why its image is left out


@dataclass(frozen=True)
class RetrievalEmbeddings:
    """A split in the shared space."""

    text_embeds: Tensor  # (texts, width), unit length
    image_embeds: Tensor  # (images, width), unit length
    image_of_text: Tensor  # (texts,), index of the image that each text describes
    whole_width: int | None = None  # of the embeddings that these are the first numbers of; None where they are whole

    def cut(self, dim: int | None) -> "RetrievalEmbeddings":
        """The first `dim` numbers of every embedding, scaled to unit length; the same where it is None or the width.

        Raises:
            ValueError: `dim` is below 1 or above the width.
        """
        width = self.text_embeds.shape[1]
        check_truncate_dim(dim, width, "dim")
        if dim in (None, width):
            return self
        sides = (unit_length(embeds[:, :dim]) for embeds in (self.text_embeds, self.image_embeds))
        return RetrievalEmbeddings(*sides, self.image_of_text, self.whole_width or width)

    def ranks(self, direction: str) -> Tensor:
        """(queries,), ranks as `retrieval_ranks` defines them."""
        return self._ranks[direction]

    @cached_property
    def _ranks(self) -> dict[str, Tensor]:
        return dict(zip(DIRECTIONS, cross_modal_ranks(*self._sides("text_to_image")), strict=True))

    def chance(self, direction: str, k: int) -> float:
        """Expected recall@k of random scores, a share from 0 to 1."""
        _, _, query_groups, item_groups = self._sides(direction)
        return chance_recall(query_groups, item_groups, k)

    def groups(self, direction: str) -> Tensor:
        """(queries,), index of the image that each query belongs to."""
        return self._sides(direction)[2]

    def _sides(self, direction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images = torch.arange(len(self.image_embeds))
        if direction == "text_to_image":
            return self.text_embeds, self.image_embeds, self.image_of_text, images
        return self.image_embeds, self.text_embeds, images, self.image_of_text


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
        digests = [digest_of([images.row_digest(row) for row in part]) for part in parts]
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
        key = cache_key({"version": FILES_VERSION, "model": model, "batch_size": self.batch_size})
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
