"""Photographs into an index, against open_clip's plain loop; `benchmarks.search` runs it.

    python -m benchmarks.search_photos --worker index --photos runs/search/photos --first 0 --count 400

The photographs are of 12 megapixels, made from real ones: crops, mirrored or not, brightened or not, enlarged, with the
noise of a sensor. Both programs hold the full-size published architecture with the same random weights, in float32.
"""

import datetime
import io
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from benchmarks.timing import finish, in_own_process, save_random_model
from capivara_common.cli import flag, parse, run_command
from capivara_common.files import write_bytes
from examples.real_images import PHOTOS, photo
from modeling_capivara import CapivaraConfig
from modeling_capivara.loading import load_model

SIZE = (4000, 3000)  # pixels, width and height: 12 megapixels
NOISE = 3.0  # standard deviation of a pixel, of 255
NOISES = (0.0, 3.0, 6.0, 12.0)  # of the photographs that are decoded at both sizes
QUALITY = 90  # of the JPEG files; they have 3 to 5 MB
BATCH = 32
PROGRAMS = ("open_clip", "index", "index_exact")


@dataclass
class PhotoArguments:
    """Arguments of `benchmarks.search_photos`."""

    photos: Path = flag(Path("runs/search/photos"), "Folder of the photographs.")
    model: Path = flag(Path("runs/search/model"), "Folder of the full-size model with random weights.")
    worker: str = flag("index", "Program that is measured, in this process.", choices=PROGRAMS)
    first: int = flag(0, "Number of the first photograph.")
    count: int = flag(400, "Photographs.")
    embeds: Path | None = flag(None, "Safetensors file to which the embeddings go.")


def main(argv: list[str] | None = None) -> None:
    """Measure one program once."""
    args = parse(PhotoArguments, __doc__, argv)
    paths = [photo_path(args.photos, number) for number in range(args.first, args.first + args.count)]
    measure = open_clip_loop if args.worker == "open_clip" else partial(into_index, exact=args.worker == "index_exact")
    seconds, embeds = measure(paths, args.model)
    if args.embeds:
        save_file({"embeds": embeds}, args.embeds)
    finish({"seconds": seconds, "photographs": len(paths)})


def measure_photos(work: Path, number: int, runs: int) -> dict[str, Any]:
    """All programs in turns, each time on the next photographs; and how near the embeddings of ours are to theirs.

    Args:
        work: folder of the photographs and the model, made where they are missing.
        number: photographs.
        runs: parts that they are divided into.
    """
    photos, model = work / "photos", work / "model"
    make_photos(photos, number)
    save_random_model(model)
    count = number // runs
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    cosines: dict[str, list[torch.Tensor]] = {name: [] for name in PROGRAMS[1:]}
    with tempfile.TemporaryDirectory() as folder:
        for run in tqdm(range(runs), desc="Photographs into the index", unit="run"):
            for name in PROGRAMS if run == 0 else PROGRAMS[:2]:  # once is enough to see what --exact costs
                file = Path(folder) / f"{name}.safetensors"
                flags = {"worker": name, "photos": photos, "model": model, "first": run * count, "count": count}
                words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
                found = in_own_process(["benchmarks.search_photos", *words, "--embeds", str(file)])
                seconds[name].append(found["seconds"])
                if name != "open_clip":
                    theirs = load_file(Path(folder) / "open_clip.safetensors")["embeds"]
                    cosines[name].append((load_file(file)["embeds"] * theirs).sum(dim=1))
    near = {name: torch.cat(found) for name, found in cosines.items()}
    return {
        "photographs": number, "photographs_a_run": count, "megapixels": SIZE[0] * SIZE[1] / 1e6,
        "megabytes_each": sum(photo_path(photos, n).stat().st_size for n in range(number)) / number / 1e6,
        "seconds": seconds,
        "cosine_to_open_clip": {n: {"lowest": c.min().item(), "mean": c.mean().item()} for n, c in near.items()},
    }  # fmt: skip


def reduced_cosines(number: int) -> dict[str, Any]:
    """How near the embeddings of photographs decoded at a reduced size are to those of the whole ones.

    Of the miniature, whose image tower is a trained one, and of photographs with more and more noise.
    """
    from capivara_search.models import find_model
    from capivara_search.picture_files import FileState, read_picture

    model, found = find_model("miniature"), {}
    for noise in tqdm(NOISES, desc="Photographs at two sizes", unit="noise"):
        with tempfile.TemporaryDirectory() as folder:
            make_photos(Path(folder), number, noise)
            paths = [photo_path(Path(folder), one) for one in range(number)]
            states = [FileState(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
            reduced, whole = (
                model.images([read_picture(state, model.side, exact).image for state in states])
                for exact in (False, True)
            )
        cosines = (reduced * whole).sum(axis=1)
        found[f"{noise:g}"] = {"lowest": float(cosines.min()), "mean": float(cosines.mean())}
    return {"photographs": number, "model": model.name, "cosine_by_noise": found}


# ---- what is measured ----


def into_index(paths: list[Path], model: Path, exact: bool) -> tuple[float, torch.Tensor]:
    """Seconds of `PictureIndex.add` on a new index, the model loaded before, and what the index then holds."""
    from capivara_search import PictureIndex

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
        vectors = index.vectors([str(chosen / path.name) for path in paths])
    return seconds, torch.nn.functional.normalize(torch.from_numpy(np.asarray(vectors, dtype=np.float32)), dim=1)


@torch.inference_mode()
def open_clip_loop(paths: list[Path], model: Path) -> tuple[float, torch.Tensor]:
    """Seconds of open_clip's loop: open, preprocess, stack, encode; and the embeddings."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from modeling_capivara.convert_open_clip import build_open_clip, open_clip_state_dict

    theirs = build_open_clip(CapivaraConfig()).eval()
    theirs.load_state_dict(open_clip_state_dict(load_model(model)))
    preprocess = image_transform_v2(PreprocessCfg(), is_train=False)
    theirs.encode_image(torch.zeros(1, 3, 224, 224))
    started, embeds = time.perf_counter(), []
    for start in range(0, len(paths), BATCH):
        batch = torch.stack([preprocess(PIL.Image.open(path)) for path in paths[start : start + BATCH]])
        embeds.append(theirs.encode_image(batch, normalize=True))
    return time.perf_counter() - started, torch.cat(embeds)


# ---- what it is measured on ----


def photo_path(folder: Path, number: int) -> Path:
    """Where a photograph lies."""
    return folder / f"{number // 100:03d}" / f"IMG_{number:05d}.jpg"


def make_photos(folder: Path, number: int, noise: float = NOISE) -> None:
    """The photographs that are missing, with noise of that standard deviation in every pixel, of 255."""
    missing = [n for n in range(number) if not photo_path(folder, n).is_file()]
    with ProcessPoolExecutor() as pool:
        for _ in tqdm(
            pool.map(partial(make_photo, folder, noise=noise), missing), total=len(missing), desc="Making photographs",
            unit="picture", disable=not missing,
        ):  # fmt: skip
            pass


@cache
def sources() -> list[PIL.Image.Image]:
    """The real photographs."""
    return [photo(name).convert("RGB") for name in PHOTOS]


def make_photo(folder: Path, number: int, noise: float = NOISE) -> None:
    """One photograph; the same number gives the same picture."""
    dice = np.random.default_rng(number)
    image = sources()[number % len(sources())]
    width = int(min(image.width, image.height * 4 / 3) * dice.uniform(0.6, 1))
    height = width * 3 // 4
    left, top = dice.integers(0, image.width - width + 1), dice.integers(0, image.height - height + 1)
    image = image.crop((left, top, left + width, top + height)).resize(SIZE, PIL.Image.Resampling.BICUBIC)
    if dice.random() < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    image = PIL.ImageEnhance.Brightness(image).enhance(dice.uniform(0.8, 1.2))
    grain = dice.standard_normal((SIZE[1] // 4, SIZE[0], 3), dtype=np.float32) * noise
    pixels = np.asarray(image).astype(np.float32) + np.tile(grain, (4, 1, 1))
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    exif = PIL.Image.Exif()
    taken = datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=int(number))
    exif[PIL.Image.ExifTags.Base.DateTime] = taken.strftime("%Y:%m:%d %H:%M:%S")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, exif=exif)
    write_bytes(photo_path(folder, number), buffer.getvalue())


def small_photos(folder: Path, number: int) -> None:
    """Photographs of 640 x 480 pixels, the crops and mirror images of real ones, where they are missing."""
    for n in range(number):
        path = folder / f"IMG_{n:05d}.jpg"
        if path.is_file():
            continue
        dice, image = np.random.default_rng(n), sources()[n % len(sources())]
        side = int(min(image.size) * dice.uniform(0.5, 1))
        left, top = (int(dice.integers(0, length - side + 1)) for length in image.size)
        buffer = io.BytesIO()
        image.crop((left, top, left + side, top + side * 3 // 4)).resize((640, 480)).save(buffer, "JPEG", quality=90)
        write_bytes(path, buffer.getvalue())


if __name__ == "__main__":
    run_command(main)
