"""The image side of training: pixels as they are needed, or a frozen tower's embeddings computed once."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from capivara_common.files import check_free_space, read_json, write_json
from capivara_common.image_files import BadImage
from capivara_common.tasks import all_parts
from caption_data.embedding_cache import FILES_VERSION, EmbeddingCache, cache_key
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import weights_digest
from training.arguments import RunArguments
from training.views import AUGMENTATION, PIXELS_VERSION, Views, embed_pixels, images_digest, read_ahead

SHARD_ROWS = 2048  # images of one file of the cache: what a kill can lose
logger = logging.getLogger("capivara")


def cache_parts(model: CapivaraModel, views: Views, precision: str) -> dict[str, Any]:
    """What the embeddings of a cache depend on; any change of one is another cache."""
    return {
        "version": PIXELS_VERSION,
        "files": FILES_VERSION,
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
    """The cache (pairs, views, width) of a source under `root`, float16: all processes make what is missing of it.

    Args:
        model: its image tower is frozen and in evaluation mode.
        views: of the source; at least one view.
        root: folder of all caches, or the folder of this very one.

    Raises:
        ValueError: `root` is the cache of something else; what differs is named.
        OSError: the disk has too little space.
    """
    parts = cache_parts(model, views, accelerator.mixed_precision)
    cache = EmbeddingCache(_cache_folder(root, parts), all_parts(len(views), SHARD_ROWS))
    row = (views.augmented_views, model.config.projection_dim)
    if missing := cache.missing():
        needed = sum(len(cache.parts[number]) for number in missing) * row[0] * row[1] * 2
        if accelerator.is_main_process:
            logger.info(
                "Image-embedding cache: %s images x %s views x %s x 2 bytes, %s MB to write to %s.",
                f"{len(views):,}", *row, f"{needed / 1e6:,.1f}", cache.folder,
            )  # fmt: skip
        check_free_space(cache.folder, needed)
        write_json(cache.folder / "cache.json", parts)

    options = model, views, row, batch_size, workers, accelerator
    cache.make(missing, lambda numbers: _embedded([cache.parts[number] for number in numbers], *options))
    cache.open(row, np.float16, mapped=True)
    return cache


def write_cache(model: CapivaraModel, views: Views, root: Path, precision: str, embeds: Tensor) -> None:
    """Write what `build_cache` would make, of embeddings that are known, (pairs, width): by this process alone.

    Args:
        model, views, root: as of `build_cache`; one view of every image, all of them good.
        precision: that the embeddings were computed in, as Accelerate names it.
        embeds: of the images of `views`, in their order.
    """
    parts = cache_parts(model, views, precision)
    cache = EmbeddingCache(_cache_folder(root, parts), all_parts(len(views), SHARD_ROWS))
    write_json(cache.folder / "cache.json", parts)
    for number, part in enumerate(cache.parts):
        cache.write(number, embeds[part.start : part.stop, None].half().numpy(), [])


def cached_embeds(cache: EmbeddingCache, pairs: Sequence[int], views: Sequence[int]) -> Tensor:
    """(pairs, width), float32: of each pair, one view of its image."""
    rows = [cache.arrays[p // SHARD_ROWS][p % SHARD_ROWS, v] for p, v in zip(pairs, views, strict=True)]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def _embedded(
    parts: list[range],
    model: CapivaraModel,
    views: Views,
    row: tuple[int, int],
    batch_size: int,
    workers: int,
    accelerator: Accelerator,
) -> Iterator[tuple[np.ndarray, list[tuple[int, tuple[str, str]]]]]:
    """Shards of pairs: (pairs, views, width) float16, and the bad ones with reason and detail.

    One pass over the source, and one set of workers, for all shards: opening either anew costs seconds, or all that
    was read before.
    """

    def batches_of(part: range) -> list[list[tuple[int, int]]]:
        items = [(pair, view) for pair in part for view in range(row[0])]
        return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]

    items = (batch for part in parts for batch in batches_of(part))
    batches = read_ahead(views, items, workers, list)
    total, title, quiet = sum(map(len, parts)), f"Images, {views.source.where}", not accelerator.is_main_process
    with tqdm(total=total, desc=title, unit="image", disable=quiet) as bar:
        for part in parts:
            embeds, bad = np.full((len(part), *row), np.nan, dtype=np.float16), {}
            for items_of_batch in batches_of(part):
                batch = next(batches)
                for (pair, _), image in zip(items_of_batch, batch, strict=True):
                    if isinstance(image, BadImage):
                        bad[pair - part.start] = image.reason, image.detail
                if good := [i for i, pixels in enumerate(batch) if isinstance(pixels, Tensor)]:
                    pairs, of_pairs = np.array([items_of_batch[i] for i in good]).T
                    pixels = torch.stack([batch[i] for i in good])
                    embeds[pairs - part.start, of_pairs] = embed_pixels(model, pixels, accelerator).half().cpu().numpy()
                bar.update(len(batch) / row[0])
            yield embeds, sorted(bad.items())


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
    return root / cache_key(parts)


@dataclass
class TrainingImages:
    """The images of the usable pairs of all data sets."""

    views: list[Views]  # of each data set, over its usable pairs
    caches: list[EmbeddingCache] | None = None  # of each data set; None where every image is embedded at every step
    cache_rows: list[np.ndarray] | None = None  # pair of a data set -> its row in the cache

    def cached_embeds(self, sources: np.ndarray, pairs: np.ndarray, views: np.ndarray) -> Tensor:
        """(pairs, width), float32: data set, pair and view of each; only with caches."""
        embeds = torch.empty(len(sources), self.caches[0].arrays[0].shape[2])
        for number in np.unique(sources):
            (at,) = np.nonzero(sources == number)
            embeds[at] = cached_embeds(self.caches[number], self.cache_rows[number][pairs[at]], views[at])
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
