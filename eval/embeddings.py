"""Embeddings of a data set: computed once, cached by what they depend on, shared by all processes of a launch.

    store = EmbeddingStore(load_embedder("data/openmoji/base"), cache_folder("auto"), batch_size=32)
    images = store.images(ImageRows(rows.__getitem__, len(rows)))
    text_embeds = store.texts(["uma foto de um gato"])

Rows go through in shards, files of their own: an interrupted run continues at the first one that is missing or damaged
(by its digest), and the processes of `accelerate launch` share them out. A shard's batches do not depend on who
embeds it, so that one process and several give the same bits.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm

from caption_data.image_rows import ImageRows
from caption_data.rows import BadImage, digest_of
from common.files import DIGEST_BYTES, has_digest, write_with_digest
from eval.metrics import chance_recall, cross_modal_ranks
from modeling_capivara.embedder import Embedder, processes
from records.schema import DIRECTIONS

VERSION = 1  # of the files; raise it when their content changes
IMAGES_PER_SHARD, TEXTS_PER_SHARD = 256, 2048  # what an interruption loses, and processes share out
logger = logging.getLogger("capivara")


@dataclass(frozen=True)
class EmbeddedImages:
    """Images of a data set in the shared space.

    Attributes:
        embeds: (kept images, width), unit length, float32.
        rows: (kept images,), the row of each.
        skipped: row -> why its image is left out.
    """

    embeds: Tensor
    rows: Tensor
    skipped: dict[int, str]


@dataclass(frozen=True)
class RetrievalEmbeddings:
    """A split in the shared space.

    Attributes:
        text_embeds: (texts, width), unit length.
        image_embeds: (images, width), unit length.
        image_of_text: (texts,), index of the image that each text describes.
    """

    text_embeds: Tensor
    image_embeds: Tensor
    image_of_text: Tensor

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
    """A model whose embeddings are kept in files.

    Attributes:
        embedder: the model.
        root: folder of all caches; None for a temporary one that lasts as long as this object.
        batch_size: images that go through at once; twice as many texts.
    """

    embedder: Embedder
    root: Path | None = None
    batch_size: int = 32

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

        def embed(rows: range, bar: tqdm) -> tuple[Tensor, Tensor, dict[int, str]]:
            kept, parts, skipped = [], [], {}
            decoded = images.decoded(rows)
            while chunk := list(islice(decoded, self.batch_size)):  # by row, so that a bad one moves no other
                good = [(row, image) for row, image in chunk if not isinstance(image, BadImage)]
                skipped |= {row: images.fault(row, bad) for row, bad in chunk if isinstance(bad, BadImage)}
                if good:
                    kept += [row for row, _ in good]
                    parts.append(self.embedder.images([image for _, image in good], self.batch_size))
                bar.update(len(chunk))
            return torch.cat(parts) if parts else torch.empty(0, 0), torch.tensor(kept, dtype=torch.long), skipped

        shards = _shards(images.count, IMAGES_PER_SHARD)
        parts = self._through_files("images", images.digest, shards, images.count, embed, description)
        skipped = {row: reason for part in parts for row, reason in part[2].items()}
        embeds = [part[0] for part in parts if len(part[1])]
        if not embeds:
            raise ValueError(f"None of the {images.count} images can be read: {next(iter(skipped.values()))}.")
        return EmbeddedImages(torch.cat(embeds), torch.cat([part[1] for part in parts]), skipped)

    def texts(self, texts: Sequence[str], description: str = "Texts") -> Tensor:
        """(texts, width), unit length, float32. Equal texts are embedded once."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))  # neighbours are padded to the same length
        digest = digest_of(distinct)
        shards = _shards(len(distinct), TEXTS_PER_SHARD)

        def embed(rows: range, bar: tqdm) -> tuple[Tensor, Tensor, dict[int, str]]:
            some = distinct[rows.start : rows.stop]
            return self.embedder.texts(some, 2 * self.batch_size, bar.update), torch.tensor(list(rows)), {}

        parts = self._through_files("texts", digest, shards, len(distinct), embed, description)
        position = {text: number for number, text in enumerate(distinct)}
        return torch.cat([part[0] for part in parts])[torch.tensor([position[text] for text in texts])]

    def _through_files(self, kind, digest, shards, total, embed, description) -> list[tuple]:
        """The shards' (embeds, rows, skipped): those without a file are embedded, each by one of the processes."""
        model = self.embedder.image_fingerprint if kind == "images" else self.embedder.fingerprint
        parts = {"version": VERSION, "model": model, "batch_size": self.batch_size, kind: digest}
        key = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
        folder = (self.root or self._temporary) / "evaluation" / key
        state = processes()
        paths = [folder / f"{kind}-{number:05d}.safetensors" for number in range(len(shards))]
        missing = [number for number, path in enumerate(paths) if not has_digest(path)]
        for path in [paths[number] for number in missing if paths[number].exists() and state.is_main_process]:
            logger.warning("%s is damaged, or of an earlier version; it is made anew.", path)
        state.wait_for_everyone()  # before one of them writes what another would count as there
        mine = missing[state.process_index :: state.num_processes]
        rows = sum(len(shards[number]) for number in mine)
        with tqdm(total=rows, desc=description, unit=kind[:-1], disable=not mine or _quiet()) as bar:
            for number in mine:
                write_with_digest(paths[number], _packed(*embed(shards[number], bar)))
        state.wait_for_everyone()
        return [_unpacked(path) for path in paths]

    def close(self) -> None:
        """Remove the temporary folder, where there is one, once all processes have read it."""
        processes().wait_for_everyone()
        if self._temporary is not None and processes().is_main_process:
            shutil.rmtree(self._temporary, ignore_errors=True)


def cache_folder(name: str) -> Path | None:
    """Root of the caches of an argument: "auto" is $CAPIVARA_CACHE or ~/.cache/capivara, "off" is none."""
    if name == "off":
        return None
    if name == "auto":
        return Path(os.environ.get("CAPIVARA_CACHE") or Path.home() / ".cache" / "capivara")
    return Path(name)


def _shards(rows: int, size: int) -> list[range]:
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def _packed(embeds: Tensor, rows: Tensor, skipped: dict[int, str]) -> bytes:
    """A shard's file."""
    reasons = torch.frombuffer(bytearray(json.dumps(skipped).encode()), dtype=torch.uint8)
    return save({"embeds": embeds.contiguous(), "rows": rows, "skipped": reasons})


def _unpacked(path: Path) -> tuple[Tensor, Tensor, dict[int, str]]:
    tensors = load(path.read_bytes()[:-DIGEST_BYTES])
    skipped = json.loads(tensors["skipped"].numpy().tobytes())
    return tensors["embeds"], tensors["rows"], {int(row): why for row, why in skipped.items()}


def _quiet() -> bool:
    """One process shows its bars, the others do not."""
    return not processes().is_main_process
