"""Whether decoding and augmenting images keeps up with the image tower, and how long the tower waits.

    python -m benchmarks.loading
    python -m benchmarks.loading --device cuda --workers 12 --images 4096

JPEG files of 500 x 375 pixels in a WebDataset tar go through the engine's own loading, plain and with the recipe's
augmentation, into the full-size image tower. Loading alone and the tower alone are measured in the same run. JSON is
the last line.
"""

import io
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.timing import conditions, finish
from capivara_common.cli import flag, parse, run_command
from capivara_common.environment import resolve_precision
from capivara_search.miniature_encoders import load_tokenizer
from caption_data.pairs import pair_table
from caption_data.sources import open_split
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from training.inputs import Pairs, embed_pixels, pixel_batches

SIZE = (500, 375)  # pixels; of a photo of Flickr30k
BATCH = 32


@dataclass
class LoadingArguments:
    """Arguments of `benchmarks.loading`."""

    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda.")
    workers: int = flag(1, "Processes that decode; 0 = none beside the tower's.")
    images: int = flag(512, "JPEG files.")
    output: Path | None = flag(None, "JSON file for the figures.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(LoadingArguments, __doc__, argv)
    finish(measure(args), args.output)


def photos(number: int) -> Iterator[bytes]:
    """JPEG files of smooth random pictures, each about as large as a photo's file."""
    generator = np.random.default_rng(0)
    for _ in range(number):
        coarse = PIL.Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize(SIZE, PIL.Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=92)
        yield file.getvalue()


def write_tar(path: Path, number: int) -> None:
    """Photos with a caption each, as WebDataset has them."""
    with tarfile.open(path, "w") as tar:
        for i, photo in enumerate(photos(number)):
            for name, data in ((f"{i:06d}.jpg", photo), (f"{i:06d}.json", b'{"captions-pt": ["x"]}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def measured(batches: Iterator[Tensor], embed) -> dict[str, float]:
    """Images per second, and the share of the time that went by waiting for pixels; the first batch is not timed."""
    pixels = next(batches)
    embed(pixels)
    images, waited, started = 0, 0.0, time.perf_counter()
    while pixels is not None:
        asked = time.perf_counter()
        pixels = next(batches, None)
        waited += time.perf_counter() - asked
        if pixels is not None:
            embed(pixels)
            images += len(pixels)
    seconds = time.perf_counter() - started
    return {"images_per_second": images / seconds, "share_waiting": waited / seconds}


def measure(args: LoadingArguments) -> dict[str, Any]:
    """Loading alone, the tower alone, and the one into the other, plain and augmented."""
    precision = resolve_precision("auto", torch.device(args.device))
    accelerator = Accelerator(mixed_precision=precision, cpu=args.device == "cpu")
    model = accelerator.prepare_model(CapivaraModel(CapivaraConfig()).eval(), evaluation_mode=True)
    processor, results = CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer()), {}
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder) / "train-0.tar", args.images)
        split = open_split(folder, "train", "image")
        table = pair_table(split, ["captions-pt"], lambda row: row["captions-pt"], {"captions": "all"})

        def batches(views: int) -> Iterator[Tensor]:
            starts = range(0, args.images, BATCH)
            items = [[(0, i, 0) for i in range(start, min(start + BATCH, args.images))] for start in starts]
            return pixel_batches([Pairs(split, table, processor, views)], items, args.workers)

        def embed(pixels: Tensor) -> None:
            embed_pixels(model, pixels, accelerator).cpu()

        results["tower_alone"] = measured(iter(list(batches(1))), embed)
        for name, views in (("plain", 1), ("augmented", 0)):
            results[f"{name}_loading_alone"] = measured(batches(views), lambda pixels: None)
            results[f"{name}_into_the_tower"] = measured(batches(views), embed)
    return {
        **conditions(accelerator.device), "images": args.images, "image_size": SIZE, "batch": BATCH,
        "workers": args.workers, "precision": precision, "measured": results,
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
