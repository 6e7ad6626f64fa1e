"""The image side of training: pixels as they are needed, or a frozen tower's embeddings computed once."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from caption_data.rows import BadImage
from common.files import DIGEST_BYTES, check_free_space, has_digest, read_json, write_json, write_with_digest
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import weights_digest
from training.arguments import RunArguments
from training.views import AUGMENTATION, PIXELS_VERSION, Views, embed_pixels, images_digest, read_ahead

SHARD_ROWS = 2048  # images of one file of the cache: what a kill can lose
logger = logging.getLogger("capivara")


class EmbeddingCache:
    """Embeddings of every view of every image of one source, float16, memory-mapped.

    One `shard-*.npy` (images, views, width) for `SHARD_ROWS` images, followed by the list of the bad ones as JSON and a
    digest of both; a shard is there whole or not at all. What made them is in `cache.json` and in the folder's name:
    weights, preprocessing, augmentation, precision, seed and images.

    Attributes:
        folder: of this cache.
        bad: number of a pair -> what is wrong with the image.
    """

    def __init__(self, folder: Path, images: int, views: int, width: int):
        self.folder, self.images, self.views, self.width = folder, images, views, width
        self.bad: dict[int, tuple[str, str]] = {}
        self._shards: list[np.ndarray] = []

    def paths(self) -> list[Path]:
        """The files of all shards, whether they are there or not."""
        return [self.folder / f"shard-{n:05d}.npy" for n in range(-(-self.images // SHARD_ROWS))]

    def missing(self) -> list[int]:
        """Shards that are still to be made, which one that is damaged or of an earlier version is, too."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
            whole = list(executor.map(has_digest, self.paths()))
        for path in [path for path, good in zip(self.paths(), whole, strict=True) if not good and path.exists()]:
            logger.warning("%s is damaged, or of an earlier version; it is made anew.", path)
        return [number for number, good in enumerate(whole) if not good]

    def pairs(self, shard: int) -> range:
        """The pairs whose images a shard holds."""
        return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, self.images))

    def item_batches(self, shard: int, size: int) -> list[list[tuple[int, int]]]:
        """Pair and view of all that a shard holds, `size` at once."""
        items = [(pair, view) for pair in self.pairs(shard) for view in range(self.views)]
        return [items[i : i + size] for i in range(0, len(items), size)]

    def open(self) -> None:
        """Map all shards. Raises ValueError where one is not what it should be."""
        for number, path in enumerate(self.paths()):
            expected = (len(self.pairs(number)), self.views, self.width)
            try:
                shard = np.load(path, mmap_mode="r", allow_pickle=False)
                with path.open("rb") as file:
                    file.seek(shard.offset + shard.nbytes)
                    bad = json.loads(file.read()[:-DIGEST_BYTES])
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(f"{path} can't be read: {error}. Remove it.") from error
            if shard.shape != expected or shard.dtype != np.float16:
                raise ValueError(f"{path} should be {expected} float16, it is {shard.shape} {shard.dtype}. Remove it.")
            self._shards.append(shard)
            self.bad |= {pair: (reason, detail) for pair, reason, detail in bad}

    def embeds(self, pairs: Sequence[int], views: Sequence[int]) -> Tensor:
        """(pairs, width), float32: of each pair, one view of its image."""
        rows = [self._shards[p // SHARD_ROWS][p % SHARD_ROWS, v] for p, v in zip(pairs, views, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def write(self, shard: int, embeds: np.ndarray, bad: list[tuple[int, str, str]]) -> None:
        """Write a shard whole."""
        file = io.BytesIO()
        np.save(file, embeds, allow_pickle=False)
        file.write(json.dumps(bad).encode())
        write_with_digest(self.paths()[shard], file.getvalue())


def cache_parts(model: CapivaraModel, views: Views, precision: str) -> dict[str, Any]:
    """What the embeddings of a cache depend on; any change of one is another cache."""
    return {
        "version": PIXELS_VERSION,
        "tower_weights": weights_digest(model, ("vision_model.", "visual_projection.")),
        "tower_config": hashlib.blake2b(model.config.vision_config.to_json_string().encode()).hexdigest()[:32],
        "preprocessing": json.loads(views.processor.image_processor.to_json_string()),
        "augmented_views": views.augmented_views,
        "augmentation": None if views.augmented_views == 1 else AUGMENTATION | {"torchvision": version("torchvision")},
        "seed": views.seed,
        "precision": precision,
        "images": images_digest(views.table),
    }


def build_cache(
    model: CapivaraModel, views: Views, root: Path, batch_size: int, workers: int, accelerator: Accelerator
) -> EmbeddingCache:
    """The cache of a source under `root`: what is missing of it is computed, by all processes, each its shards.

    Args:
        model: its image tower is frozen and in evaluation mode.
        views: of the source; at least one view.
        root: folder of all caches, or the folder of this very one.
        batch_size: images that go through the tower at once.
        workers: processes that decode.
        accelerator: device, precision and processes.

    Raises:
        ValueError: `root` is the cache of something else; what differs is named.
        OSError: the disk has too little space.
    """
    parts = cache_parts(model, views, accelerator.mixed_precision)
    folder = _cache_folder(root, parts)
    cache = EmbeddingCache(folder, len(views.table), views.augmented_views, model.config.projection_dim)
    found = [cache.missing() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    (missing,) = found
    if missing:
        needed = sum(len(cache.pairs(number)) for number in missing) * cache.views * cache.width * 2
        if accelerator.is_main_process:
            logger.info(
                "Image-embedding cache: %s images x %s views x %s x 2 bytes, %s MB to write to %s.",
                f"{cache.images:,}", cache.views, cache.width, f"{needed / 1e6:,.1f}", folder,
            )  # fmt: skip
        check_free_space(folder, needed)
        write_json(folder / "cache.json", parts)
        # A run of shards each: a streamed source is read to its end only by the last.
        own = np.array_split(missing, accelerator.num_processes)[accelerator.process_index].tolist()
        for number, embeds, bad in _embedded_shards(model, views, cache, own, batch_size, workers, accelerator):
            cache.write(number, embeds, bad)
    accelerator.wait_for_everyone()
    cache.open()
    return cache


def _embedded_shards(
    model: CapivaraModel,
    views: Views,
    cache: EmbeddingCache,
    numbers: Sequence[int],
    batch_size: int,
    workers: int,
    accelerator: Accelerator,
) -> Iterator[tuple[int, np.ndarray, list[tuple[int, str, str]]]]:
    """Number, (images, views, width) float16, NaN where an image is bad, and the bad ones, of each shard.

    One pass over the source, and one set of workers, for all shards: opening either anew costs seconds, or all that
    was read before. No batch has images of two shards, so that a shard does not depend on which others are made.
    """
    items = (batch for number in numbers for batch in cache.item_batches(number, batch_size))
    batches = views.streamed(items) if views.source.streaming else views.batches(items, workers)
    total = sum(len(cache.pairs(number)) for number in numbers)
    title, quiet = f"Images, {views.source.where}", not accelerator.is_main_process
    with tqdm(total=total, desc=title, unit="image", disable=quiet) as bar:
        for number in numbers:
            pairs = cache.pairs(number)
            embeds = np.full((len(pairs), cache.views, cache.width), np.nan, dtype=np.float16)
            bad: dict[int, tuple[int, str, str]] = {}
            for items_of_batch in cache.item_batches(number, batch_size):
                batch = next(batches)
                good = [i for i, pixels in enumerate(batch) if isinstance(pixels, Tensor)]
                for (pair, _), image in zip(items_of_batch, batch, strict=True):
                    if isinstance(image, BadImage):
                        bad[pair] = (pair, image.reason, image.detail)
                if good:
                    rows, columns = np.array([items_of_batch[i] for i in good]).T
                    pixels = torch.stack([batch[i] for i in good])
                    embeds[rows - pairs.start, columns] = embed_pixels(model, pixels, accelerator).half().cpu().numpy()
                bar.update(len(batch) / cache.views)
            yield number, embeds, sorted(bad.values())


def _cache_folder(root: Path, parts: dict[str, Any]) -> Path:
    """The folder for `parts`: one under `root` that is named after them, or `root` where it is a cache itself."""
    if (root / "cache.json").is_file():
        there = read_json(root / "cache.json", version=int)
        differing = [key for key in parts if there.get(key) != parts[key]]
        if differing:
            raise ValueError(
                f"{root} is the image-embedding cache of something else: {', '.join(differing)} differ. Name its "
                "parent folder, where caches lie side by side, or use --image_embedding_cache auto."
            )
        return root
    name = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()
    return root / name


@dataclass
class TrainingImages:
    """The images of the usable pairs of all data sets.

    Attributes:
        views: of each data set, over its usable pairs.
        caches: of each data set; None where every image is embedded at every step.
        cache_rows: pair of a data set -> its row in the cache.
    """

    views: list[Views]
    caches: list[EmbeddingCache] | None = None
    cache_rows: list[np.ndarray] | None = None

    def cached_embeds(self, sources: np.ndarray, pairs: np.ndarray, views: np.ndarray) -> Tensor:
        """(pairs, width), float32: data set, pair and view of each; only with caches."""
        embeds = torch.empty(len(sources), self.caches[0].width)
        for number in np.unique(sources):
            (at,) = np.nonzero(sources == number)
            embeds[at] = self.caches[number].embeds(self.cache_rows[number][pairs[at]], views[at])
        return embeds

    def pixel_batches(self, items: Iterable[list[tuple[int, int, int]]], workers: int) -> Iterator[Tensor]:
        """(images, 3, height, width) for each list of data set, pair and view, read ahead by `workers` processes."""
        return read_ahead(self, items, workers)

    def __getitem__(self, item: tuple[int, int, int]) -> Tensor:
        """(3, height, width) for a data set, a pair of it and a view. Raises BadImage where the image has changed."""
        source, pair, view = item
        pixels = self.views[source][int(pair), int(view)]
        if isinstance(pixels, BadImage):
            raise pixels
        return pixels

    def __len__(self) -> int:
        return sum(map(len, self.views))


def loading_workers(args: RunArguments, accelerator: Accelerator) -> int:
    """Processes that decode images: as asked for, else none beside a CPU that computes, up to 12 beside a GPU."""
    if args.loading_workers is not None:
        return args.loading_workers
    return 0 if accelerator.device.type == "cpu" else min(12, os.cpu_count() or 1)
