"""Whether decoding and augmenting images keeps up with the image tower, and how long the tower waits.

    python -m benchmarks.loading
    python -m benchmarks.loading --device cuda --workers 12 --images 4096

JPEG files of 500 x 375 pixels in a WebDataset tar go through the engine's own loading, plain and with the recipe's
augmentation, into the full-size image tower. Loading alone and the tower alone are measured in the same run. JSON is
the last line.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from torch import Tensor

from caption_data.pairs import caption_table
from caption_data.sources import open_source
from common.environment import device_description, package_versions
from common.files import write_json
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel
from training.images import TrainingImages
from training.step import resolve_precision
from training.views import Views, embed_pixels

SIZE = (500, 375)  # pixels; of a photo of Flickr30k
BATCH = 32


class ImagesOnly:
    """The image side of a processor: what `Views` calls, without a tokenizer."""

    def __init__(self):
        self.image_processor = CapivaraImageProcessor()

    def __call__(self, images, return_tensors: str):
        return self.image_processor(images, return_tensors=return_tensors)


def write_tar(path: Path, number: int) -> None:
    """Smooth random pictures as JPEG, each about as large as a photo's file."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(number):
            coarse = PIL.Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize(SIZE, PIL.Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
            for name, data in ((f"{i:06d}.jpg", buffer.getvalue()), (f"{i:06d}.json", b'{"captions-pt": ["x"]}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def measured(batches: Iterator[Tensor], embed) -> dict[str, float]:
    """Images per second, and the share of the time that went by waiting for pixels; the first batch is not timed."""
    pixels = next(batches)
    embed(pixels)
    images, waited, started = 0, 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        pixels = next(batches, None)
        waited += time.perf_counter() - asked
        if pixels is None:
            break
        embed(pixels)
        images += len(pixels)
    seconds = time.perf_counter() - started
    return {"images_per_second": images / seconds, "share_waiting": waited / seconds}


def run(device: str, workers: int, number: int) -> dict:
    precision = resolve_precision("auto", torch.device(device))
    accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu")
    model = accelerator.prepare_model(CapivaraModel(CapivaraConfig()).eval(), evaluation_mode=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder) / "train-0.tar", number)
        source = open_source(folder, "train", "image")
        table = caption_table(source, "image", ["captions-pt"], lambda row: row["captions-pt"], [])

        def batches(views: int) -> Iterator[Tensor]:
            images = TrainingImages([Views(source, table, "image", ImagesOnly(), views, seed=0)])
            items = [[(0, i, 0) for i in range(n, min(n + BATCH, number))] for n in range(0, number, BATCH)]
            return images.pixel_batches(items, workers)

        def embed(pixels: Tensor) -> None:
            embed_pixels(model, pixels, accelerator).cpu()

        ready = list(batches(1))
        results["tower_alone"] = measured(iter(ready), embed)
        for name, views in (("plain", 1), ("augmented", 0)):
            results[f"{name}_loading_alone"] = measured(batches(views), lambda pixels: None)
            results[f"{name}_into_the_tower"] = measured(batches(views), embed)
    return {
        "images": number, "image_size": SIZE, "batch": BATCH, "workers": workers, "precision": precision,
        "measured": results, "device": device_description(accelerator.device), "versions": package_versions(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, default=1, help="processes that decode; 0 = none beside the tower's")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args(argv)
    result = run(args.device, args.workers, args.images)
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
