"""Views of images, and whether every image can be used.

A view of an image is the image as it is (`augmented_views` 1), one of V fixed augmentations (V over 1), or a fresh
augmentation at every step (0), as in the paper.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from capivara_common.files import DIGEST_BYTES, has_digest, write_with_digest
from capivara_common.image_files import BadImage, decode_image
from caption_data.rows import Skipped
from caption_data.sources import Source
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.two_towers import image_parts

PIXELS_VERSION = 1  # raise it when preprocessing or augmentation changes what an image becomes
AUGMENTATION = {"resize": 250, "crop": 224, "scale": [0.9, 1.0], "augmix_severity": 2}  # arXiv 2310.13683, section 4


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
    """Pixels of any view of any image of a source; travels to the workers of a `DataLoader`."""

    source: Source
    table: Dataset  # its rows, with `row` and `digest`
    image_column: str
    processor: CapivaraProcessor
    augmented_views: int  # see the module's text
    seed: int  # of the augmentation

    def __getitem__(self, item: tuple[int, int]) -> Tensor | BadImage:
        """(3, height, width) of a view of the image of a pair; what is wrong with the image where it is bad."""
        pair, view = item
        entry = self.table[pair]
        try:
            image = decode_image(self.source.row(entry["row"])[self.image_column], self.source.files)
            return self.pixels(image, entry["digest"], view)
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

    def __len__(self) -> int:
        return len(self.table)


@torch.no_grad()
def embed_pixels(model: CapivaraModel, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """(images, width), unit length, float32, on the device: in the precision of the run."""
    with accelerator.autocast():
        parts = image_parts(pixels, accelerator.device)
        return torch.cat([model(pixel_values=part).image_embeds.float() for part in parts])


def check_images(views: Views, root: Path) -> dict[int, tuple[str, str]]:
    """Decode and preprocess every image once, so that none ends a run in its middle; kept in a file under `root`.

    Returns:
        Number of a pair -> what is wrong with its image.
    """
    how = f"{PIXELS_VERSION} {views.processor.image_processor.to_json_string()}"
    path = root / f"checked-{images_digest(views.table, how, size=12)}.json"
    if has_digest(path):
        return {pair: (reason, detail) for pair, reason, detail in json.loads(path.read_bytes()[:-DIGEST_BYTES])}
    bad, plain = [], replace(views, augmented_views=1)  # what can be preprocessed can be augmented, which takes longer
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as executor:  # PIL decodes and resizes side by side
        chunks = (range(start, min(start + 1000, len(views))) for start in range(0, len(views), 1000))
        checked = (pixels for chunk in chunks for pixels in executor.map(lambda pair: plain[pair, 0], chunk))
        bar = tqdm(checked, f"Checking images, {views.source.where}", len(views), unit="image", leave=False)
        for pair, pixels in enumerate(bar):
            if isinstance(pixels, BadImage):
                bad.append((pair, pixels.reason, pixels.detail))
    write_with_digest(path, json.dumps(bad).encode())
    return {pair: (reason, detail) for pair, reason, detail in bad}


def bad_images(bad: dict[int, tuple[str, str]], views: Views) -> list[Skipped]:
    """The images that could not be used, as lines of `skipped.jsonl`."""
    rows = views.table
    return [
        Skipped(views.source.name, views.source.split, rows[pair]["row"], reason, detail)
        for pair, (reason, detail) in sorted(bad.items())
    ]


def read_ahead(images: Any, items: Iterable, workers: int, collate: Callable | None = None) -> Iterator:
    """Batches of `images`, one for each list of `items`, by `workers` processes."""
    # A fork would inherit torch's threads, and can hang.
    ahead = {"multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
    return iter(DataLoader(images, batch_sampler=items, num_workers=workers, collate_fn=collate, **ahead))


def images_digest(table: Dataset, how: str = "", size: int = 16) -> str:
    """Hex digest of a text and of the images of a table, in their order."""
    digest = hashlib.blake2b(how.encode(), digest_size=size)
    for chunk in table.select_columns(["digest"]).iter(10_000):
        digest.update("".join(chunk["digest"]).encode())
    return digest.hexdigest()
