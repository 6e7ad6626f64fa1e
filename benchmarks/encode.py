"""Measure images and captions per second, compared with open_clip on the same weights.

    python -m benchmarks.encode --output benchmarks/results/encode.json

Both programs use the full published architecture with the same random weights, and get the same PIL images and the same
texts of 20 tokens. Preprocessing and tokenization are included. Each rate is the median of alternating runs.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from benchmarks.timing import (
    describe_conditions,
    make_captions,
    median_ratio,
    report_results,
    summarize_rates,
    time_alternating,
)
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_search.miniature_encoders import load_tokenizer
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.convert_open_clip import new_open_clip_model, to_capivara_state_dict

IMAGE_SIZE = (320, 240)  # pixels, width and height
CAPTION_TOKENS = 20  # tokens per caption, including begin and end


@dataclass
class EncodeArguments:
    """Command-line arguments of `benchmarks.encode`."""

    images: int = flag(32, "Number of images per run.")
    captions: int = flag(64, "Number of captions per run.")
    runs: int = flag(5, "How often each program is timed; the programs take turns.")
    output: Path | None = flag(None, "JSON file for the results.")


def main(argv: list[str] | None = None) -> None:
    """Run the command: time the encoders of this project and of open_clip, and print the results as JSON."""
    args = parse_arguments(EncodeArguments, __doc__, argv)
    encoders = build_encoders(args)
    measured = {
        f"{what}_{precision}": compare_encoders(encoders[what], getattr(args, what), precision, args.runs)
        for precision in ("float32", "bfloat16")
        for what in ("images", "captions")
    }
    sizes = {name: getattr(args, name) for name in ("runs", "images", "captions")}
    sizes |= {"tokens": CAPTION_TOKENS, "image_size": IMAGE_SIZE}
    report_results(describe_conditions() | sizes | {"measured": measured}, args.output)


def build_encoders(args: EncodeArguments) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Build the encoders to compare, with the same random weights and inputs.

    Args:
        args: Command-line arguments: numbers of images and captions.

    Returns:
        For "images" and "captions", a dict of the functions "ours" and "open_clip". Each function preprocesses and
        encodes all inputs, and returns embeddings of shape (inputs, width).
    """
    torch.manual_seed(0)
    config, tokenizer = CapivaraConfig(), load_tokenizer()
    theirs = new_open_clip_model(config).eval()
    ours = CapivaraModel(config)
    ours.load_state_dict(to_capivara_state_dict(theirs.state_dict()))
    ours.eval()
    processor = CapivaraProcessor(CapivaraImageProcessor(), tokenizer)
    preprocess = image_transform_v2(PreprocessCfg(), is_train=False)
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, *IMAGE_SIZE[::-1], 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in pixels]
    texts = make_captions(args.captions, CAPTION_TOKENS - 2, deviation=0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
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


if __name__ == "__main__":
    run_command(main)
