"""The index of the page: pictures as thumbnails, their captions, and both in a model's space; built once and kept.

    pictures = open_pictures("data/openmoji/dataset")
    album = open_album(pictures, cache_folder("auto"))
    index = build_index(album, load_embedder("data/openmoji/base"), cache_folder("auto"))
    print(index.search(index.embed_text("um gato"), 5))

A folder `space/<digest of the pictures>` of the cache holds `index.json` (captions, credit, what could not be read),
the thumbnails, and for each model `embeddings-<fingerprint>.safetensors`. It needs the pictures no more, so that it
travels as it is. Thumbnails are made in shards and embeddings by `eval.embeddings`, in shards as well: an interrupted
build resumes where it stopped.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import PIL.Image
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from capivara_search.common.files import read_json, write_bytes, write_json
from capivara_search.common.image_files import BadImage
from caption_data.image_rows import ImageRows
from eval.embeddings import EmbeddingStore
from hub_upload.space.collection import Credit, Pictures
from modeling_capivara.embedder import CapivaraEmbedder

VERSION = 1  # of the files; raise it when their content changes
THUMBNAIL_SIDE = 256  # pixels of the longer side
# WebP at 90 takes 4.0 kB a picture of OpenMoji and has a cosine of 0.994 to it under the demo model; JPEG at 85 takes
# 7.3 kB and has 0.950. A random picture that the page draws is a thumbnail, so it had better be found again.
THUMBNAIL_QUALITY = 90
ROWS_PER_SHARD = 1024
ROUNDING = 1e-5  # of a cosine in float32, amply


@dataclass(frozen=True)
class Album:
    """Pictures as the page shows them, whatever the model. Rows are numbered as the pictures were.

    Attributes:
        folder: where it is kept.
        captions: of each row.
        titles: of each row, where it has no caption.
        credit: whose pictures they are.
        skipped: row -> why its picture could not be read.
        images: the pictures themselves, for models that have not seen them; None where only the index is left.
    """

    folder: Path
    captions: list[list[str]]
    titles: list[str]
    credit: Credit
    skipped: dict[int, str]
    images: ImageRows | None = None

    @cached_property
    def distinct_captions(self) -> list[str]:
        """All different captions of pictures that can be read, in the order in which they first occur."""
        kept = (texts for row, texts in enumerate(self.captions) if row not in self.skipped)
        return list(dict.fromkeys(text for texts in kept for text in texts))

    @cached_property
    def _thumbnails(self) -> list[dict[str, Tensor]]:
        return [load_file(path) for path in sorted(self.folder.glob("thumbnails-*.safetensors"))]

    def thumbnail(self, row: int) -> bytes:
        """WebP file of a row; empty where its picture could not be read."""
        shard, number = self._thumbnails[row // ROWS_PER_SHARD], row % ROWS_PER_SHARD
        start = int(shard["ends"][number - 1]) if number else 0
        return shard["files"][start : int(shard["ends"][number])].numpy().tobytes()

    def title(self, row: int) -> str:
        """The first caption of a row, or the name of its file."""
        return next(iter(self.captions[row]), self.titles[row])


@dataclass(frozen=True)
class Hit:
    """A picture that was found: its row, and the cosine similarity to the query, -1 to 1."""

    row: int
    score: float


@dataclass(frozen=True)
class Index:
    """An album in the space of a model.

    Attributes:
        album: the pictures.
        embedder: the model.
        rows: (pictures that can be read,), the row of each.
        image_embeds: (pictures that can be read, width), unit length.
        caption_embeds: (`album.distinct_captions`, width), unit length.
    """

    album: Album
    embedder: CapivaraEmbedder
    rows: Tensor
    image_embeds: Tensor
    caption_embeds: Tensor

    def embed_text(self, text: str) -> Tensor:
        """(width,), unit length."""
        return self.embedder.texts([text])[0]

    def embed_image(self, image: PIL.Image.Image) -> Tensor:
        """(width,), unit length."""
        return self.embedder.images([image])[0]

    def search(self, query: Tensor, count: int) -> list[Hit]:
        """The pictures that are most similar to a query, best first; equal ones in the order of the rows."""
        best, scores = _best(self.image_embeds, query, count)
        return [Hit(row, score) for row, score in zip(self.rows[best].tolist(), scores.tolist(), strict=True)]

    def similar_captions(self, query: Tensor, count: int) -> list[tuple[str, float]]:
        """The captions that are most similar to a query, with their cosine similarity, best first."""
        best, scores = _best(self.caption_embeds, query, count)
        texts = self.album.distinct_captions
        return [(texts[number], score) for number, score in zip(best.tolist(), scores.tolist(), strict=True)]

    def classify(self, query: Tensor, prompts: Sequence[str]) -> Tensor:
        """(prompts,), shares that sum to 1: softmax of the model's logits between a picture and texts."""
        logits = self.embedder.model.logit_scale.detach().exp().cpu() * (self.embedder.texts(prompts) @ query)
        return logits.softmax(dim=0)


def open_album(pictures: Pictures, cache: Path) -> Album:
    """Pictures with their thumbnails, made where they are missing.

    Args:
        pictures: those that are searched.
        cache: root of all caches.
    """
    images = ImageRows(pictures.row_image, len(pictures), pictures.files)
    about = {"captions": pictures.captions, "titles": pictures.titles, "credit": asdict(pictures.credit)}
    parts = [VERSION, THUMBNAIL_SIDE, THUMBNAIL_QUALITY, ROWS_PER_SHARD, images.digest, about]
    folder = cache / "space" / hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    skipped = _make_thumbnails(folder, images)
    if not (folder / "index.json").is_file():
        write_json(folder / "index.json", {"version": VERSION, **about, "skipped": skipped})
    return Album(folder, pictures.captions, pictures.titles, pictures.credit, skipped, images)


def is_album(folder: Path) -> bool:
    """Whether a folder is an index that was kept, which needs no pictures."""
    return (folder / "index.json").is_file() and any(folder.glob("thumbnails-*.safetensors"))


def read_album(folder: Path) -> Album:
    """An index that was kept.

    Raises:
        ValueError: it is of another version of this program.
    """
    about = read_json(folder / "index.json")
    if about.get("version") != VERSION:
        raise ValueError(f"The index {folder} is of version {about.get('version')}, not {VERSION}. Build it again.")
    skipped = {int(row): reason for row, reason in about["skipped"].items()}
    return Album(folder, about["captions"], about["titles"], Credit(**about["credit"]), skipped)


def build_index(album: Album, embedder: CapivaraEmbedder, cache: Path | None, batch_size: int = 32) -> Index:
    """The album in the space of a model, embedded where the album has not kept it.

    Args:
        album: the pictures.
        embedder: the model.
        cache: root of all caches, where unfinished work is kept.
        batch_size: pictures that go through at once.

    Raises:
        ValueError: no picture can be read; or the album is a kept one, which this model has not seen.
    """
    path = embeddings_path(album, embedder)
    if not path.is_file():
        if album.images is None:
            raise ValueError(
                f"The index {album.folder} was not built with the model {embedder.name} in this version of "
                "transformers. Give the pictures instead of the index."
            )
        write_bytes(path, save(_embedded(album, EmbeddingStore(embedder, cache, batch_size))))
    with safe_open(path, framework="pt") as file:
        rows, image_embeds, caption_embeds = (file.get_tensor(name) for name in ("rows", "images", "captions"))
    return Index(album, embedder, rows, image_embeds, caption_embeds)


def embeddings_path(album: Album, embedder: CapivaraEmbedder) -> Path:
    """File of the album's embeddings by a model."""
    return album.folder / f"embeddings-{embedder.fingerprint}.safetensors"


def _embedded(album: Album, store: EmbeddingStore) -> dict[str, Tensor]:
    images = store.images(album.images, "Embedding pictures")
    captions = album.distinct_captions
    texts = store.texts(captions, "Embedding captions") if captions else torch.empty(0, images.embeds.shape[1])
    return {"rows": images.rows, "images": images.embeds, "captions": texts}


def _best(embeds: Tensor, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers and scores of the rows of `embeds` (rows, width) that are most similar to `query` (width,)."""
    scores = embeds @ query
    # A product's last bits depend on where a row lies, so that equal pictures get the same score by a sum of their own.
    near = (scores >= scores.topk(min(count, len(scores))).values[-1] - ROUNDING).nonzero().flatten()
    scores = (embeds[near] * query).sum(dim=-1)
    order = scores.argsort(descending=True, stable=True)[:count]
    return near[order], scores[order]


def _make_thumbnails(folder: Path, images: ImageRows) -> dict[int, str]:
    """Write the shards that are missing; returns what could not be read, of all shards."""
    skipped: dict[int, str] = {}
    shards = [
        range(start, min(start + ROWS_PER_SHARD, images.count)) for start in range(0, images.count, ROWS_PER_SHARD)
    ]
    paths = [folder / f"thumbnails-{number:05d}.safetensors" for number in range(len(shards))]
    missing = sum(len(rows) for rows, path in zip(shards, paths, strict=True) if not path.is_file())
    with tqdm(total=missing, desc="Thumbnails", unit="picture", disable=not missing) as bar:
        for rows, path in zip(shards, paths, strict=True):
            if not path.is_file():
                write_bytes(path, _thumbnail_shard(images, rows, bar))
            with safe_open(path, framework="pt") as file:
                skipped |= {int(row): reason for row, reason in json.loads(file.metadata()["skipped"]).items()}
    return skipped


def _thumbnail_shard(images: ImageRows, rows: range, bar: tqdm) -> bytes:
    files, skipped = [], {}
    for row, image in images.decoded(rows):
        if isinstance(image, BadImage):
            skipped[row] = images.fault(row, image)
        files.append(b"" if isinstance(image, BadImage) else thumbnail_file(image))
        bar.update()
    tensors = {
        "files": torch.frombuffer(bytearray(b"".join(files) or b"\0"), dtype=torch.uint8),
        "ends": torch.tensor([len(file) for file in files]).cumsum(0),
    }
    return save(tensors, metadata={"skipped": json.dumps(skipped)})


def thumbnail_file(image: PIL.Image.Image) -> bytes:
    """A thumbnail as WebP file, transparent images on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()
