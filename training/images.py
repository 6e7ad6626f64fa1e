"""The pairs of a run: captions, digests and images; pixels as they are needed, or a frozen tower's vectors made once.

A view of an image is the image as it is (`augmented_views` 1), one of V fixed augmentations (V over 1), or a fresh
augmentation at every step (0), as in the paper.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from capivara_common.files import check_free_space, write_json
from capivara_common.image_files import BadImage, decode_image
from capivara_common.tasks import all_parts
from caption_data.embedding_cache import FILES_VERSION, EmbeddingCache
from caption_data.pairs import pairs_fingerprint
from caption_data.rows import Skipped, digest_of
from caption_data.sources import Split
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import weights_digest
from modeling_capivara.two_towers import image_parts
from training.arguments import RunArguments

PIXELS_VERSION = 1  # raise it when preprocessing or augmentation changes what an image becomes
AUGMENTATION = {"resize": 250, "crop": 224, "scale": [0.9, 1.0], "augmix_severity": 2}  # arXiv 2310.13683, section 4
SHARD_ROWS = 2048  # images of one file of the cache: what a kill can lose
logger = logging.getLogger("capivara")


@dataclass
class Pairs:
    """The usable pairs of one split of one data set, as a sequence of their images."""

    source: Split
    table: Dataset  # `row`, `digest` and `captions` of each pair
    processor: CapivaraProcessor
    augmented_views: int = 1  # see the module's text
    seed: int = 0  # of the augmentation
    cache: EmbeddingCache | None = None  # vectors of the images (images, views, width), float16
    cache_rows: np.ndarray | None = None  # (pairs,), the row of each in the cache

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, pair: int) -> PIL.Image.Image:
        """The image of a pair, decoded. Raises BadImage where it can't be used."""
        row = self.source.data[self.table[int(pair)]["row"]]
        return decode_image(row[self.source.image_column], self.source.files)

    def captions(self) -> list[list[str]]:
        """The captions of each image."""
        return self.table["captions"][:]

    @property
    def fingerprint(self) -> str:
        """Hex digest of images, captions and their order."""
        return pairs_fingerprint(self.table)

    def view(self, item: tuple[int, int]) -> Tensor | BadImage:
        """(3, height, width) of a pair's image in a view; what is wrong with the image where it is bad."""
        pair, view = map(int, item)
        try:
            return self.pixels(self[pair], self.table[pair]["digest"], view)
        except BadImage as bad:
            return bad

    def pixels(self, image: PIL.Image.Image, digest: str, view: int) -> Tensor:
        """(3, height, width). Raises BadImage where the processor refuses the image.

        An augmentation depends on the image's digest, not on its pair, whose number changes with the rows left out.
        """
        try:
            if self.augmented_views != 1:
                image = self.processor.image_processor.process_image(image)  # 16 bits to 8; PIL would clip them
                image = augmented(image, random_state(self.seed, int(digest, 16), view))
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise BadImage("unreadable image", str(error)) from error

    def vectors(self, pairs: Sequence[int], views: Sequence[int]) -> Tensor:
        """(pairs, width), float32: of each pair, one view of its image, from the cache."""
        places = zip(self.cache_rows[np.asarray(pairs)].tolist(), views, strict=True)
        rows = [self.cache.arrays[row // SHARD_ROWS][row % SHARD_ROWS, view] for row, view in places]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def with_cache(self, cache: EmbeddingCache) -> tuple["Pairs", list[Skipped]]:
        """The pairs whose image has a vector in a cache of these, and the rows of the others."""
        good, source = np.setdiff1d(np.arange(len(self)), sorted(cache.bad)), self.source
        bad = [(self.table[pair]["row"], *cache.bad[pair]) for pair in sorted(cache.bad)]
        table = self.table.select(good) if bad else self.table
        kept = replace(self, table=table, cache=cache, cache_rows=good)
        return kept, [Skipped(source.name, source.split, *line) for line in bad]


def cached_embeds(training: list[Pairs], sources: np.ndarray, pairs: np.ndarray, views: np.ndarray) -> Tensor:
    """(pairs, width), float32: data set of `training`, pair and view of each; only with caches."""
    embeds = torch.empty(len(sources), training[0].cache.arrays[0].shape[2])
    for number in np.unique(sources):
        (at,) = np.nonzero(sources == number)
        embeds[at] = training[number].vectors(pairs[at], views[at])
    return embeds


def pixel_batches(training: list[Pairs], items: Iterable[list[tuple[int, int, int]]], workers: int) -> Iterator[Tensor]:
    """(images, 3, height, width) for each list of data set, pair and view, read ahead by `workers` processes.

    Raises BadImage, with the row, where an image has changed since it was checked.
    """
    return map(_good, read_ahead(partial(_pixels, training), items, workers, _stacked))


def _pixels(training: list[Pairs], item: tuple[int, int, int]) -> Tensor | BadImage:
    pairs = training[item[0]]
    pixels = pairs.view(item[1:])
    if isinstance(pixels, BadImage):
        place = f"{pairs.source.where}, row {pairs.table[int(item[1])]['row']}"
        return BadImage(pixels.reason, f"{place}: {pixels.detail}")
    return pixels


def _stacked(pixels: list[Tensor | BadImage]) -> Tensor | BadImage:
    # A result, not raised: of an exception of two arguments a worker process brings back a traceback alone.
    return next((bad for bad in pixels if isinstance(bad, BadImage)), None) or default_collate(pixels)


def _good(batch: Tensor | BadImage) -> Tensor:
    if isinstance(batch, BadImage):
        raise batch
    return batch


@dataclass
class _Reader:
    """A function as what a `DataLoader` reads."""

    read: Callable[[Any], Any]

    def __getitem__(self, item: Any) -> Any:
        return self.read(item)


def read_ahead(read: Callable, items: Iterable, workers: int, collate: Callable | None = None) -> Iterator:
    """What `read` gives of each of some items, for each list of `items`, by `workers` processes."""
    # A fork would inherit torch's threads, and can hang.
    ahead = {"multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
    return iter(DataLoader(_Reader(read), batch_sampler=items, num_workers=workers, collate_fn=collate, **ahead))


def loading_workers(args: RunArguments, accelerator: Accelerator) -> int:
    """Processes that decode images: as asked for, else none beside a CPU that computes, up to 12 beside a GPU."""
    if args.loading_workers is not None:
        return args.loading_workers
    return 0 if accelerator.device.type == "cpu" else min(12, os.cpu_count() or 1)


def random_state(*numbers: int) -> int:
    """A seed that depends on all `numbers`, each at least 0, and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def augmented(image: PIL.Image.Image, state: int) -> PIL.Image.Image:
    """The recipe's augmentation: 250 pixels, a crop of 90 to 100 % to 224 pixels, AugMix of severity 2.

    Source: CAPIVARA (arXiv 2310.13683), section 4; the draws are a function of `state`.
    """
    from torchvision.transforms import v2 as transforms

    torch.manual_seed(state)
    bicubic = transforms.InterpolationMode.BICUBIC
    image = transforms.Resize(AUGMENTATION["resize"], bicubic)(image.convert("RGB"))
    image = transforms.RandomResizedCrop(AUGMENTATION["crop"], AUGMENTATION["scale"], interpolation=bicubic)(image)
    return transforms.AugMix(severity=AUGMENTATION["augmix_severity"])(image)


@torch.no_grad()
def embed_pixels(model: CapivaraModel, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """(images, width), unit length, float32, on the device: in the precision of the run."""
    with accelerator.autocast():
        parts = image_parts(pixels, accelerator.device)
        return torch.cat([model(pixel_values=part).image_embeds.float() for part in parts])


def cache_parts(model: CapivaraModel, pairs: Pairs, precision: str) -> dict[str, Any]:
    """What the vectors of a cache depend on; any change of one is another cache."""
    images = hashlib.blake2b(digest_size=16)
    for chunk in pairs.table.select_columns(["digest"]).iter(10_000):
        images.update("".join(chunk["digest"]).encode())
    return {
        "version": PIXELS_VERSION,
        "files": FILES_VERSION,
        "tower_weights": weights_digest(model, ("vision_model.", "visual_projection.")),
        "tower_config": hashlib.blake2b(model.config.vision_config.to_json_string().encode()).hexdigest()[:32],
        "preprocessing": json.loads(pairs.processor.image_processor.to_json_string()),
        "augmented_views": pairs.augmented_views,
        "augmentation": None if pairs.augmented_views == 1 else AUGMENTATION | {"torchvision": version("torchvision")},
        "seed": pairs.seed,
        "precision": precision,
        "images": images.hexdigest(),
    }


def build_cache(
    model: CapivaraModel, pairs: Pairs, root: Path, batch_size: int, workers: int, accelerator: Accelerator
) -> EmbeddingCache:
    """The cache (pairs, views, width) of a data set under `root`, float16: all processes make what is missing of it.

    Args:
        model: its image tower is frozen and in evaluation mode.
        pairs: of the data set; at least one view.
        root: folder of all caches; this one's is named after all that it depends on.

    Raises:
        OSError: the disk has too little space.
    """
    parts = cache_parts(model, pairs, accelerator.mixed_precision)
    cache = EmbeddingCache(root / digest_of(parts, sort_keys=True), all_parts(len(pairs), SHARD_ROWS))
    views, width = row = (pairs.augmented_views, model.config.projection_dim)
    missing = cache.missing()
    if missing:
        needed = sum(len(cache.parts[number]) for number in missing) * views * width * 2
        if accelerator.is_main_process:
            logger.info(
                "Image-embedding cache: %s images x %s views x %s x 2 bytes, %s MB to write to %s.",
                f"{len(pairs):,}", *row, f"{needed / 1e6:,.1f}", cache.folder,
            )  # fmt: skip
        check_free_space(cache.folder, needed)
        write_json(cache.folder / "cache.json", parts)

    def batches_of(part: range) -> list[list[tuple[int, int]]]:
        items = [(pair, view) for pair in part for view in range(views)]
        return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]

    def embedded(numbers: list[int]) -> Iterator[tuple[np.ndarray, list[tuple[int, tuple[str, str]]]]]:
        own = [cache.parts[number] for number in numbers]
        # One set of workers for all shards: opening them anew costs seconds.
        ahead = read_ahead(pairs.view, (batch for part in own for batch in batches_of(part)), workers, list)
        bar = {"desc": f"Images, {pairs.source.where}", "unit": "image", "disable": not accelerator.is_main_process}
        with tqdm(total=sum(map(len, own)), **bar) as progress:
            for part in own:
                embeds, bad = np.full((len(part), *row), np.nan, dtype=np.float16), {}
                for batch in batches_of(part):
                    good = []
                    for (pair, view), image in zip(batch, next(ahead), strict=True):
                        if isinstance(image, BadImage):
                            bad[pair - part.start] = image.reason, image.detail
                        else:
                            good.append((pair - part.start, view, image))
                    if good:
                        places, numbers_of_views, images = map(list, zip(*good, strict=True))
                        vectors = embed_pixels(model, torch.stack(images), accelerator)
                        embeds[places, numbers_of_views] = vectors.half().cpu().numpy()
                    progress.update(len(batch) / views)
                yield embeds, sorted(bad.items())

    cache.make(missing, embedded)
    cache.open(row, np.float16, mapped=True)
    return cache


def write_cache(model: CapivaraModel, pairs: Pairs, root: Path, precision: str, embeds: Tensor) -> None:
    """Write what `build_cache` would make, of vectors that are known, (pairs, width): by this process alone.

    Args:
        model, pairs, root: as of `build_cache`; one view of every image, all of them good.
        precision: that the vectors were computed in, as Accelerate names it.
        embeds: of the images of `pairs`, in their order.
    """
    parts = cache_parts(model, pairs, precision)
    cache = EmbeddingCache(root / digest_of(parts, sort_keys=True), all_parts(len(pairs), SHARD_ROWS))
    write_json(cache.folder / "cache.json", parts)
    for number, part in enumerate(cache.parts):
        cache.write(number, embeds[part.start : part.stop, None].half().numpy(), [])
