"""The image side of training: pixels as they are needed, or a frozen tower's embeddings computed once.

A view of an image is the image as it is (`augmented_views` 1), one of V fixed augmentations (V over 1), or a fresh
augmentation at every step (0), as in the paper.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from caption_data.image_files import decode_image
from caption_data.rows import BadImage, Skipped
from caption_data.sources import Source
from common.files import DIGEST_BYTES, check_free_space, has_digest, read_json, write_json, write_with_digest
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import weights_digest
from training.arguments import RunArguments

SHARD_ROWS = 2048  # images of one file of the cache: what a kill can lose
CACHE_VERSION = 1  # raise it when preprocessing or augmentation changes what an image becomes
AUGMENTATION = {"resize": 250, "crop": 224, "scale": [0.9, 1.0], "augmix_severity": 2}  # arXiv 2310.13683, section 4
logger = logging.getLogger("capivara")


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
    chain = transforms.Compose(
        [
            transforms.Resize(AUGMENTATION["resize"], interpolation=bicubic),
            transforms.RandomResizedCrop(AUGMENTATION["crop"], scale=AUGMENTATION["scale"], interpolation=bicubic),
            transforms.AugMix(severity=AUGMENTATION["augmix_severity"]),
        ]
    )
    return chain(image.convert("RGB"))


@dataclass
class Views:
    """Pixels of any view of any image of a source; travels to the workers of a `DataLoader`.

    Attributes:
        source: of the images.
        table: its rows, with `row` and `digest`.
        image_column: of the source.
        processor: the model's own.
        augmented_views: see the module's text.
        seed: of the augmentation.
    """

    source: Source
    table: Dataset
    image_column: str
    processor: CapivaraProcessor
    augmented_views: int
    seed: int

    def __getitem__(self, item: tuple[int, int]) -> Tensor | BadImage:
        """(3, height, width) of an image (its place in the table) and a view; what is wrong with it where it is bad."""
        place, view = item
        entry = self.table[place]
        try:
            image = decode_image(self.source.row(entry["row"])[self.image_column], self.source.files)
            return self.pixels(image, entry["digest"], view)
        except BadImage as bad:
            return bad

    def pixels(self, image: PIL.Image.Image, digest: str, view: int) -> Tensor:
        """(3, height, width). Raises BadImage where the processor refuses the image.

        An augmentation hangs on the image's digest, not on its place, which changes where other rows are left out.
        """
        try:
            if self.augmented_views != 1:
                image = self.processor.image_processor.process_image(image)  # 16 bits to 8; PIL would clip them
                image = augmented(image, random_state(self.seed, int(digest, 16), view))
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise BadImage("unreadable image", str(error)) from error

    def batches(self, items: Iterable[Sequence[tuple[int, int]]], workers: int) -> Iterator[list]:
        """Lists of what `__getitem__` gives, one a list of `items`, read ahead by `workers` processes."""
        context = "spawn" if workers else None  # a fork would inherit torch's threads, and can hang
        loader = DataLoader(
            self, batch_sampler=items, num_workers=workers, collate_fn=list, multiprocessing_context=context,
            prefetch_factor=4 if workers else None,
        )  # fmt: skip
        return iter(loader)

    def __len__(self) -> int:
        return len(self.table)

    def streamed(self, items: Iterable[Sequence[tuple[int, int]]]) -> Iterator[list]:
        """As `batches` for increasing places, in one pass over the source; ValueError where it ends early."""
        rows, number, image = None, -1, None
        for batch in items:
            pixels: list[Tensor | BadImage] = []
            for place, view in batch:
                entry = self.table[place]
                if rows is None:
                    rows, number = self.source.rows(entry["row"]), entry["row"] - 1
                while number < entry["row"]:  # the views of an image come one after the other
                    if (row := next(rows, None)) is None:
                        raise ValueError(f"{self.source.where} has changed: row {entry['row']} is gone. Start anew.")
                    number, image = number + 1, row[self.image_column]
                try:
                    pixels.append(self.pixels(decode_image(image, self.source.files), entry["digest"], view))
                except BadImage as bad:
                    pixels.append(bad)
            yield pixels


@torch.no_grad()
def embed_pixels(model: CapivaraModel, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """(images, width), unit length, float32, on the device: in the precision of the run."""
    with accelerator.autocast():
        return model(pixel_values=pixels.to(accelerator.device)).image_embeds.float()


class EmbeddingCache:
    """Embeddings of every view of every image of one source, float16, memory-mapped.

    One `shard-*.npy` (images, views, width) for `SHARD_ROWS` images, followed by the list of the bad ones as JSON and a
    digest of both; a shard is there whole or not at all. What made them is in `cache.json` and in the folder's name:
    weights, preprocessing, augmentation, precision, seed and images.

    Attributes:
        folder: of this cache.
        bad: place in the table -> what is wrong with the image.
    """

    def __init__(self, folder: Path, images: int, views: int, width: int):
        self.folder, self.images, self.views, self.width = folder, images, views, width
        self.bad: dict[int, tuple[str, str]] = {}
        self._shards: list[np.ndarray] = []

    def paths(self) -> list[Path]:
        return [self.folder / f"shard-{n:05d}.npy" for n in range(-(-self.images // SHARD_ROWS))]

    def missing(self) -> list[int]:
        """Shards that are still to be made, which one that is damaged or of an earlier version is, too."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
            whole = list(executor.map(has_digest, self.paths()))
        for path in [path for path, good in zip(self.paths(), whole, strict=True) if not good and path.exists()]:
            logger.warning("%s is damaged, or of an earlier version; it is made anew.", path)
        return [number for number, good in enumerate(whole) if not good]

    def places(self, shard: int) -> range:
        return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, self.images))

    def item_batches(self, shard: int, size: int) -> list[list[tuple[int, int]]]:
        """Place and view of all that a shard holds, `size` at once."""
        items = [(place, view) for place in self.places(shard) for view in range(self.views)]
        return [items[i : i + size] for i in range(0, len(items), size)]

    def open(self) -> None:
        """Map all shards. Raises ValueError where one is not what it should be."""
        for number, path in enumerate(self.paths()):
            expected = (len(self.places(number)), self.views, self.width)
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
            self.bad |= {place: (reason, detail) for place, reason, detail in bad}

    def embeds(self, places: Sequence[int], views: Sequence[int]) -> Tensor:
        """(places, width), float32, of a view of each."""
        rows = [self._shards[p // SHARD_ROWS][p % SHARD_ROWS, v] for p, v in zip(places, views, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def write(self, shard: int, embeds: np.ndarray, bad: list[tuple[int, str, str]]) -> None:
        """Put a shard in its place, in one piece."""
        file = io.BytesIO()
        np.save(file, embeds, allow_pickle=False)
        file.write(json.dumps(bad).encode())
        write_with_digest(self.paths()[shard], file.getvalue())


def cache_parts(model: CapivaraModel, views: Views, precision: str) -> dict[str, Any]:
    """What the embeddings of a cache depend on; any change of one is another cache."""
    images = hashlib.blake2b(digest_size=16)
    for chunk in views.table.select_columns(["digest"]).iter(10_000):
        images.update("".join(chunk["digest"]).encode())
    return {
        "version": CACHE_VERSION,
        "tower_weights": weights_digest(model, ("vision_model.", "visual_projection.")),
        "tower_config": hashlib.blake2b(model.config.vision_config.to_json_string().encode()).hexdigest()[:32],
        "preprocessing": json.loads(views.processor.image_processor.to_json_string()),
        "augmented_views": views.augmented_views,
        "augmentation": None if views.augmented_views == 1 else AUGMENTATION | {"torchvision": version("torchvision")},
        "seed": views.seed,
        "precision": precision,
        "images": images.hexdigest(),
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
        needed = sum(len(cache.places(number)) for number in missing) * cache.views * cache.width * 2
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


def bad_images(bad: dict[int, tuple[str, str]], views: Views) -> list[Skipped]:
    """The images that could not be used, as lines of `skipped.jsonl`."""
    rows = views.table
    return [
        Skipped(views.source.name, views.source.split, rows[place]["row"], reason, detail)
        for place, (reason, detail) in sorted(bad.items())
    ]


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
    total = sum(len(cache.places(number)) for number in numbers)
    with tqdm(
        total=total, desc=f"Images, {views.source.where}", unit="image", disable=not accelerator.is_main_process
    ) as bar:
        for number in numbers:
            places = cache.places(number)
            embeds = np.full((len(places), cache.views, cache.width), np.nan, dtype=np.float16)
            bad: dict[int, tuple[int, str, str]] = {}
            for items_of_batch in cache.item_batches(number, batch_size):
                batch = next(batches)
                good = [i for i, pixels in enumerate(batch) if isinstance(pixels, Tensor)]
                for (place, _), image in zip(items_of_batch, batch, strict=True):
                    if isinstance(image, BadImage):
                        bad[place] = (place, image.reason, image.detail)
                if good:
                    rows, columns = np.array([items_of_batch[i] for i in good]).T
                    pixels = torch.stack([batch[i] for i in good])
                    embeds[rows - places.start, columns] = embed_pixels(model, pixels, accelerator).half().cpu().numpy()
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
        cache_places: pair of a data set -> its place in the cache.
    """

    views: list[Views]
    caches: list[EmbeddingCache] | None = None
    cache_places: list[np.ndarray] | None = None

    def cached_embeds(self, sources: np.ndarray, places: np.ndarray, views: np.ndarray) -> Tensor:
        """(pairs, width), float32: data set, pair and view of each; only with caches."""
        embeds = torch.empty(len(sources), self.caches[0].width)
        for number in np.unique(sources):
            (at,) = np.nonzero(sources == number)
            embeds[at] = self.caches[number].embeds(self.cache_places[number][places[at]], views[at])
        return embeds

    def pixel_batches(self, items: Iterable[list[tuple[int, int, int]]], workers: int) -> Iterator[Tensor]:
        """(images, 3, height, width) for each list of data set, pair and view, read ahead by `workers` processes."""
        loader = DataLoader(
            _Pixels(self.views), batch_sampler=items, num_workers=workers,
            multiprocessing_context="spawn" if workers else None, prefetch_factor=4 if workers else None,
        )  # fmt: skip
        return iter(loader)


@dataclass
class _Pixels:
    views: list[Views]

    def __getitem__(self, item: tuple[int, int, int]) -> Tensor:
        pixels = self.views[item[0]][int(item[1]), int(item[2])]
        if isinstance(pixels, BadImage):
            raise pixels
        return pixels

    def __len__(self) -> int:
        return sum(len(views) for views in self.views)


def check_images(views: Views, root: Path) -> dict[int, tuple[str, str]]:
    """Decode and preprocess every image once, so that none ends a run in its middle; kept in a file under `root`.

    Returns:
        Place in the table -> what is wrong with the image.
    """
    images = hashlib.blake2b(digest_size=12)
    images.update(f"{CACHE_VERSION} {views.processor.image_processor.to_json_string()}".encode())
    for chunk in views.table.select_columns(["digest"]).iter(10_000):
        images.update("".join(chunk["digest"]).encode())
    path = root / f"checked-{images.hexdigest()}.json"
    if has_digest(path):
        return {place: (reason, detail) for place, reason, detail in json.loads(path.read_bytes()[:-DIGEST_BYTES])}
    bad, plain = [], replace(views, augmented_views=1)  # what can be preprocessed can be augmented, which takes longer
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as executor:  # PIL decodes and resizes side by side
        chunks = (range(start, min(start + 1000, len(views))) for start in range(0, len(views), 1000))
        checked = (pixels for chunk in chunks for pixels in executor.map(lambda place: plain[place, 0], chunk))
        bar = tqdm(checked, f"Checking images, {views.source.where}", len(views), unit="image", leave=False)
        for place, pixels in enumerate(bar):
            if isinstance(pixels, BadImage):
                bad.append((place, pixels.reason, pixels.detail))
    write_with_digest(path, json.dumps(bad).encode())
    return {place: (reason, detail) for place, reason, detail in bad}


def loading_workers(args: RunArguments, accelerator: Accelerator) -> int:
    """Processes that decode images: as asked for, else none beside a CPU that computes, up to 12 beside a GPU."""
    if args.loading_workers is not None:
        return args.loading_workers
    return 0 if accelerator.device.type == "cpu" else min(12, os.cpu_count() or 1)
