"""Photographs into an index, against open_clip's plain loop; `benchmarks.search --parts photographs` runs it.

The photographs are of 12 megapixels, made from real ones: crops, enlarged, with the noise of a sensor. Both programs
hold the full-size published architecture with the same random weights, in float32.
"""

import datetime
import io
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from tqdm.auto import tqdm

from capivara_common.files import write_bytes
from capivara_search import PictureIndex
from examples.real_images import PHOTOS, photo
from modeling_capivara import CapivaraConfig
from modeling_capivara.convert_open_clip import build_open_clip, open_clip_state_dict
from modeling_capivara.loading import load_model

LARGE, SMALL = (4000, 3000), (640, 480)  # pixels, width and height; the large ones have 12 megapixels
NOISE = 3.0  # standard deviation of a pixel, of 255
QUALITY = 90  # of the JPEG files
BATCH = 32


def into_index(paths: list[Path], model: Path, exact: bool = False) -> tuple[float, np.ndarray]:
    """Seconds of `PictureIndex.add` on a new index, the model loaded before, and what the index then holds."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "photos"
        chosen.mkdir()
        for path in paths:
            shutil.copy(path, chosen)
        index = PictureIndex.open(Path(folder) / "index.lance", model=str(model))
        index.model.images([PIL.Image.new("RGB", (64, 64))])  # loads it
        started = time.perf_counter()
        index.add(chosen, exact=exact, batch_size=BATCH)
        seconds = time.perf_counter() - started
        vectors = np.asarray(index.vectors([str(chosen / path.name) for path in paths]), dtype=np.float32)
    return seconds, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@torch.inference_mode()
def open_clip_loop(paths: list[Path], model: Path) -> tuple[float, np.ndarray]:
    """Seconds of open_clip's loop: open, preprocess, stack, encode; and the embeddings."""
    theirs = build_open_clip(CapivaraConfig()).eval()
    theirs.load_state_dict(open_clip_state_dict(load_model(model)))
    preprocess = image_transform_v2(PreprocessCfg(), is_train=False)
    theirs.encode_image(torch.zeros(1, 3, 224, 224))
    started, embeds = time.perf_counter(), []
    for start in range(0, len(paths), BATCH):
        batch = torch.stack([preprocess(PIL.Image.open(path)) for path in paths[start : start + BATCH]])
        embeds.append(theirs.encode_image(batch, normalize=True))
    return time.perf_counter() - started, torch.cat(embeds).numpy()


PROGRAMS = {"open_clip": open_clip_loop, "index": into_index, "index_exact": partial(into_index, exact=True)}


def photo_path(folder: Path, number: int) -> Path:
    """Where a photograph lies."""
    return folder / f"{number // 100:03d}" / f"IMG_{number:05d}.jpg"


def make_photos(folder: Path, number: int, size: tuple[int, int] = LARGE) -> None:
    """The photographs that are missing, of such a size."""
    missing = [n for n in range(number) if not photo_path(folder, n).is_file()]
    with ProcessPoolExecutor() as pool:
        made = pool.map(partial(make_photo, folder, size), missing)
        list(tqdm(made, total=len(missing), desc="Making photographs", unit="picture", disable=not missing))


@cache
def sources() -> list[PIL.Image.Image]:
    """The real photographs."""
    return [photo(name).convert("RGB") for name in PHOTOS]


def make_photo(folder: Path, size: tuple[int, int], number: int) -> None:
    """One photograph; the same number gives the same picture."""
    dice, image = np.random.default_rng(number), sources()[number % len(sources())]
    width = int(min(image.width, image.height * 4 / 3) * dice.uniform(0.6, 1))
    height = width * 3 // 4
    left, top = dice.integers(0, image.width - width + 1), dice.integers(0, image.height - height + 1)
    image = image.crop((left, top, left + width, top + height)).resize(size, PIL.Image.Resampling.BICUBIC)
    noise = np.tile(dice.standard_normal((size[1] // 4, size[0], 3), dtype=np.float32), (4, 1, 1))
    pixels = np.asarray(image).astype(np.float32) + NOISE * noise
    exif = PIL.Image.Exif()
    taken = datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=number)
    exif[PIL.Image.ExifTags.Base.DateTime] = taken.strftime("%Y:%m:%d %H:%M:%S")
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY, exif=exif)
    write_bytes(photo_path(folder, number), buffer.getvalue())
