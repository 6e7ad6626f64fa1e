"""Measure images and captions per second, compared with open_clip on the same weights.

    python -m benchmarks.encode --output benchmarks/results/encode.json

    python -m benchmarks.encode --part pass --images 2000 --runs 3 --output benchmarks/results/encode_pass.json

Both programs use the full published architecture with the same random weights, and get the same PIL images and the same
texts of 20 tokens. Preprocessing and tokenization are included. Each rate is the median of alternating runs.

The part "pass" embeds many images in batches, as indexing does: with the chunk size that
`capivara_common.embedding_speed` chooses on this CPU, in float32 and in the precision that `--precision auto` chooses.
The first run of each precision, which makes the choice, is reported separately.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from benchmarks.timing import (
    describe_conditions,
    make_captions,
    median_ratio,
    report_results,
    summarize_rates,
    time_alternating,
    time_call,
)
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.embedding_speed import tune_chunk_size
from capivara_common.embedding_store import embed_batch
from capivara_common.files import read_json
from capivara_search.miniature_encoders import load_tokenizer
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.convert_open_clip import new_open_clip_model, to_capivara_state_dict
from modeling_capivara.two_towers import choose_precision, embed_images

IMAGE_SIZE = (320, 240)  # pixels, width and height
CAPTION_TOKENS = 20  # tokens per caption, including begin and end


@dataclass
class EncodeArguments:
    """Command-line arguments of `benchmarks.encode`."""

    part: Literal["batches", "pass"] = flag("batches", "batches: one call per run. pass: a long pass over images.")
    images: int = flag(32, "Number of images per run.")
    captions: int = flag(64, "Number of captions per run.")
    runs: int = flag(5, "How often each program is timed; the programs take turns.")
    output: Path | None = flag(None, "JSON file for the results.")


def main(argv: list[str] | None = None) -> None:
    """Run the command: time the encoders of this project and of open_clip, and print the results as JSON."""
    args = parse_arguments(EncodeArguments, __doc__, argv)
    if args.part == "pass":
        measured = measure_pass(args)
    else:
        encoders = build_encoders(args)
        measured = {
            f"{what}_{precision}": compare_encoders(encoders[what], getattr(args, what), precision, args.runs)
            for precision in ("float32", "bfloat16")
            for what in ("images", "captions")
        }
    sizes = {name: getattr(args, name) for name in ("runs", "images", "captions")}
    sizes |= {"tokens": CAPTION_TOKENS, "image_size": IMAGE_SIZE}
    report_results(describe_conditions() | sizes | {"measured": measured}, args.output)


def build_models() -> tuple[CapivaraModel, nn.Module, CapivaraProcessor, Callable[[Image.Image], Tensor]]:
    """Build the models of both programs at full size, with the same random weights.

    Returns:
        Our model and open_clip's model, our processor, and open_clip's preprocessing of an image.
    """
    torch.manual_seed(0)
    config = CapivaraConfig()
    theirs = new_open_clip_model(config).eval()
    ours = CapivaraModel(config)
    ours.load_state_dict(to_capivara_state_dict(theirs.state_dict()))
    processor = CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer())
    return ours.eval(), theirs, processor, image_transform_v2(PreprocessCfg(), is_train=False)


def make_images(count: int) -> list[Image.Image]:
    """Generate images with random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *IMAGE_SIZE[::-1], 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def build_encoders(args: EncodeArguments) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Build the encoders to compare, with the same random weights and inputs.

    Args:
        args: Command-line arguments: numbers of images and captions.

    Returns:
        For "images" and "captions", a dict of the functions "ours" and "open_clip". Each function preprocesses and
        encodes all inputs, and returns embeddings of shape (inputs, width).
    """
    ours, theirs, processor, preprocess = build_models()
    images = make_images(args.images)
    texts = make_captions(args.captions, CAPTION_TOKENS - 2, deviation=0)
    with tempfile.TemporaryDirectory() as folder:
        processor.tokenizer.save_pretrained(folder)
        tokenize = HFTokenizer(folder)

    return {
        "images": {
            "ours": lambda: ours(**processor(images=images, return_tensors="pt")).image_embeds,
            "open_clip": lambda: theirs.encode_image(torch.stack([*map(preprocess, images)]), normalize=True),
        },
        "captions": {
            "ours": lambda: ours(**processor(text=texts, return_tensors="pt")).text_embeds,
            "open_clip": lambda: theirs.encode_text(tokenize(texts), normalize=True),
        },
    }


def compare_encoders(
    encoders: dict[str, Callable[[], Tensor]], item_count: int, precision: str, runs: int
) -> dict[str, Any]:
    """Time two encoders and compare their embeddings.

    Args:
        encoders: Functions "ours" and "open_clip", in this order; each returns embeddings of shape (items, width).
        item_count: Number of images or captions that one call encodes.
        precision: "float32" or "bfloat16".
        runs: Number of alternating runs.

    Returns:
        "ours" and "open_clip": median, slowest and fastest rate of the runs in items per second. "ratio": median over
        the runs of open_clip's seconds divided by our seconds, so that more than 1 means that ours is faster.
        "largest_difference": largest absolute difference between corresponding elements of the embeddings.
    """
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.inference_mode(), autocast:
        ours, theirs = (encode().float() for encode in encoders.values())  # these calls also warm up both programs
        seconds = time_alternating(encoders, runs, f"{item_count} items, {precision}")
    return {
        **{name: summarize_rates([item_count / elapsed for elapsed in times]) for name, times in seconds.items()},
        "ratio": median_ratio(seconds["open_clip"], seconds["ours"]),
        "largest_difference": (ours - theirs).abs().max().item(),
    }


def measure_pass(args: EncodeArguments) -> dict[str, Any]:
    """Time a long pass over images, which chooses its chunk size, in float32 and in the precision of "auto".

    Args:
        args: Command-line arguments: number of images and of runs.

    Returns:
        "float32", and "bf16" if "auto" chooses it: rates and ratio as `compare_encoders` returns them, with open_clip
        in the same precision; "first_seconds", the time of our first run, which chose the chunk size; and
        "smallest_cosine" between our embeddings and open_clip's. "auto": the precision that "auto" chooses. "choices":
        the kept files of all choices, with the seconds of each candidate. "ratio_of_auto": median over the runs of our
        seconds in float32 divided by our seconds in the precision of "auto"; 1 if it is float32.
    """
    ours, theirs, processor, preprocess = build_models()
    images = list(islice(cycle(make_images(min(args.images, 64))), args.images))  # few of them, to save memory
    batches = [images[start : start + 32] for start in range(0, args.images, 32)]

    def run_ours(precision: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            embed = partial(embed_images, ours, processor)
            embed = tune_chunk_size(embed, args.images, "cpu", f"benchmark in {precision}")
            return torch.stack([vector for batch in batches for vector in embed_batch(batch, embed)])

    @torch.inference_mode()
    def run_theirs(precision: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            parts = (torch.stack([*map(preprocess, batch)]) for batch in batches)
            return torch.cat([theirs.encode_image(pixels, normalize=True).float() for pixels in parts])

    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, CAPIVARA_CACHE=cache):
        auto, first, programs = choose_precision(ours, processor), {}, {}
        for precision in dict.fromkeys(["float32", auto]):
            first[precision] = time_call(partial(run_ours, precision))
            programs["ours", precision] = partial(run_ours, precision)
            programs["open_clip", precision] = partial(run_theirs, precision)
        seconds = time_alternating(programs, args.runs, f"{args.images} images")
        choices = [read_json(path) for path in Path(cache, "embedding_speed").iterdir()]
        results: dict[str, Any] = {"auto": auto, "choices": choices}
        for precision in first:
            times = {name: seconds[name, precision] for name in ("ours", "open_clip")}
            vectors = [program(precision) for program in (run_ours, run_theirs)]
            results[precision] = {
                **{name: summarize_rates([args.images / elapsed for elapsed in times[name]]) for name in times},
                "ratio": median_ratio(times["open_clip"], times["ours"]),
                "first_seconds": first[precision],
                "smallest_cosine": torch.cosine_similarity(*vectors).min().item(),
            }
        results["ratio_of_auto"] = median_ratio(seconds["ours", "float32"], seconds["ours", auto])
    return results


if __name__ == "__main__":
    run_command(main)
