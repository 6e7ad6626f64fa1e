"""Measure how many images and captions per second this project embeds, compared with open_clip on the same weights.

    python -m benchmarks.encode --output benchmarks/results/encode.json
    python -m benchmarks.encode --part pass --images 2000 --output benchmarks/results/encode_pass.json

Both programs get the same images, texts and random weights. The measured time includes preprocessing and tokenization.
By default, each run embeds one batch, in float32 and in bfloat16.

With `--part pass`, each run embeds many images in batches. These runs use float32 and the fastest precision on this
CPU. Before them, this project measures its fastest number of images per forward pass. This time is reported separately.
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
from PIL import Image
from torch import Tensor, nn

from benchmarks import tools
from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.embedding_speed import with_tuned_chunk_size
from capivara_common.embedding_store import embed_batch_except_bad_images
from capivara_common.files import read_json
from capivara_search.miniature_encoders import load_tokenizer
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.convert_open_clip import new_open_clip_model, to_capivara_state_dict
from modeling_capivara.two_towers import choose_fastest_precision, embed_images

IMAGE_SIZE = (320, 240)  # width and height in pixels
CAPTION_TOKENS = 20  # tokens per caption, including the start token and the end token


@dataclass
class EncodeArguments:
    """Command-line arguments of `benchmarks.encode`, which measures how fast images and captions are embedded."""

    part: Literal["batches", "pass"] = flag("batches", "batches: embed one batch per run. pass: embed many batches.")
    images: int = flag(32, "Number of images per run.")
    captions: int = flag(64, "Number of captions per run.")
    runs: int = flag(5, "Number of timed runs of each program (this project, open_clip), alternately.")
    output: Path | None = flag(None, "JSON file for the results.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "images", "captions", "runs")


def main(argv: list[str] | None = None) -> None:
    """Run the embedding benchmark: time this project and open_clip alternately, and print the results as JSON."""
    args = parse_arguments(EncodeArguments, __doc__, argv)
    if args.part == "pass":
        measured = _measure_embedding_many_images(args)
    else:
        encoders = _build_encoding_programs_to_compare(args)
        measured = {
            f"{what}_{precision}": _compare_encoders(encoders[what], getattr(args, what), precision, args.runs)
            for precision in ("float32", "bfloat16")
            for what in ("images", "captions")
        }
    sizes = {name: getattr(args, name) for name in ("runs", "images", "captions")}
    sizes |= {"tokens": CAPTION_TOKENS, "image_size": IMAGE_SIZE}
    tools.output_results_with_conditions(sizes | {"measured": measured}, args.output)


def _build_models_and_preprocessors() -> tuple[CapivaraModel, nn.Module, CapivaraProcessor, Callable]:
    """Build the models of both programs at full size, with the same random weights.

    Returns:
        Tuple of our model, open_clip's model, our processor, and open_clip's function that preprocesses one image.
    """
    # Imported here, so that --help works without open_clip.
    from open_clip.transform import PreprocessCfg, image_transform_v2

    torch.manual_seed(0)
    config = CapivaraConfig()
    theirs = new_open_clip_model(config).eval()
    ours = CapivaraModel(config)
    ours.load_state_dict(to_capivara_state_dict(theirs.state_dict()))
    processor = CapivaraProcessor(CapivaraImageProcessor(), load_tokenizer())
    return ours.eval(), theirs, processor, image_transform_v2(PreprocessCfg(), is_train=False)


def make_images(count: int) -> list[Image.Image]:
    """Generate `count` images of random pixels, all of size `IMAGE_SIZE`, as inputs of the benchmark."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *IMAGE_SIZE[::-1], 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def _build_encoding_programs_to_compare(args: EncodeArguments) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Build the encoding functions of both programs, with the same random weights and the same inputs.

    Args:
        args: Command-line arguments: numbers of images and captions.

    Returns:
        `{"images": {"ours": function, "open_clip": function}, "captions": {"ours": function, "open_clip": function}}`.
        Each function preprocesses and encodes all inputs, and returns embeddings of shape (inputs, width).
    """
    # Imported here, so that --help works without open_clip.
    from open_clip.tokenizer import HFTokenizer

    ours, theirs, processor, preprocess = _build_models_and_preprocessors()
    images = make_images(args.images)
    texts = tools.make_captions(args.captions, CAPTION_TOKENS - 2, deviation=0)
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


def _compare_encoders(encoders: dict[str, Callable], item_count: int, precision: str, runs: int) -> dict[str, Any]:
    """Time two encoders and compare their embeddings.

    Args:
        encoders: Functions "ours" and "open_clip" without arguments, in this order; each returns embeddings of shape
            (items, width).
        item_count: Number of images or captions that one call encodes.
        precision: "float32" or "bfloat16".
        runs: Number of runs. Each run times every program once.

    Returns:
        A dict with these keys:

        - "ours" and "open_clip": median, slowest and fastest rate of the runs in items per second.
        - "ratio": median over the runs of open_clip's seconds divided by our seconds; above 1 if ours is faster.
        - "largest_difference": largest absolute difference between corresponding elements of the embeddings.
    """
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.inference_mode(), autocast:
        # The first call of a program is slower than later calls. These untimed calls therefore also serve as warm-up.
        ours, theirs = (encode().float() for encode in encoders.values())
        seconds = tools.time_alternating(encoders, runs, f"{item_count} items, {precision}")
    return _summarize_times(seconds, item_count) | {"largest_difference": (ours - theirs).abs().max().item()}


def _summarize_times(seconds: dict[str, list[float]], item_count: int) -> dict[str, Any]:
    """Return the rates of both programs in items per second, and the ratio (see `_compare_encoders`).

    Args:
        seconds: Seconds of each run, under "ours" and "open_clip".
        item_count: Number of images or captions per run.
    """
    rates = {name: [item_count / elapsed for elapsed in times] for name, times in seconds.items()}
    summaries = {name: tools.summarize_rates(values) for name, values in rates.items()}
    return summaries | {"ratio": tools.median_ratio(seconds["open_clip"], seconds["ours"])}


def _measure_embedding_many_images(args: EncodeArguments) -> dict[str, Any]:
    """Time the embedding of many images in batches, in float32 and in the fastest precision ("auto").

    Args:
        args: Command-line arguments: number of images and of runs.

    Returns:
        A dict with these keys:

        - "auto": the fastest precision on this CPU, "float32" or "bf16".
        - "float32" and, if "auto" is "bf16", "bf16": rates and ratio (see `_compare_encoders`), "first_seconds" (time
          of our first run), and "smallest_cosine" between our embedding and open_clip's embedding of an image.
        - "choices": contents of the cache files with our choices and the seconds of each candidate.
        - "ratio_of_auto": median over the runs of our seconds in float32 divided by our seconds in precision "auto".
    """
    ours, theirs, processor, preprocess = _build_models_and_preprocessors()
    # At most 64 different images are made and then repeated, because many different images would need much memory.
    images = list(islice(cycle(make_images(min(args.images, 64))), args.images))
    batches = [images[start : start + 32] for start in range(0, args.images, 32)]

    embeddings: dict[tuple[str, str], Tensor] = {}

    def run_ours(precision: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            embed = partial(embed_images, ours, processor)
            embed = with_tuned_chunk_size(embed, args.images, "cpu", f"benchmark in {precision}")
            vectors = [vector for batch in batches for vector in embed_batch_except_bad_images(batch, embed)]
            embeddings["ours", precision] = torch.stack(vectors)

    @torch.inference_mode()
    def run_theirs(precision: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            parts = (torch.stack([*map(preprocess, batch)]) for batch in batches)
            vectors = [theirs.encode_image(pixels, normalize=True).float() for pixels in parts]
            embeddings["open_clip", precision] = torch.cat(vectors)

    run = {"ours": run_ours, "open_clip": run_theirs}
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, CAPIVARA_CACHE=cache):
        auto, first, programs = choose_fastest_precision(ours, processor), {}, {}
        for precision in dict.fromkeys(["float32", auto]):
            # The first run includes the choice of the images per forward pass (`capivara_common.embedding_speed`).
            first[precision] = tools.time_call(partial(run_ours, precision))
            programs |= {(name, precision): partial(run[name], precision) for name in run}
        seconds = tools.time_alternating(programs, args.runs, f"{args.images} images")
        choices = [read_json(path) for path in Path(cache, "embedding_speed").iterdir()]
        results: dict[str, Any] = {"auto": auto, "choices": choices}
        for precision in first:
            vectors = [embeddings[name, precision] for name in run]
            results[precision] = _summarize_times({name: seconds[name, precision] for name in run}, args.images) | {
                "first_seconds": first[precision],
                "smallest_cosine": torch.cosine_similarity(*vectors).min().item(),
            }
        results["ratio_of_auto"] = tools.median_ratio(seconds["ours", "float32"], seconds["ours", auto])
    return results


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
