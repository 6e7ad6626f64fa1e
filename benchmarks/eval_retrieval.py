"""Recall at 1, 5 and 10 in both directions, against clip-benchmark's own functions on the same embeddings.

    python -m benchmarks.eval_retrieval --output benchmarks/results/eval_retrieval.json
    python -m benchmarks.eval_retrieval --images 100000 --captions 10 --worker   # ours alone; half an hour

Random unit embeddings of width 512, five captions an image. Ours runs first, for its peak of memory over them, and
both then in alternating runs. JSON is the last line.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import read_json
from eval.capivara_metrics.metrics import RECALL_CUTOFFS, cross_modal_ranks, recall_at_k

EMBEDDING_WIDTH = 512
Recalls = dict[str, float]  # such as "text_to_image@5" -> share from 0 to 1


@dataclass
class EvalRetrievalArguments:
    """Arguments of `benchmarks.eval_retrieval`."""

    images: int = flag(5000, "Images of the scores.")
    captions: int = flag(5, "Captions of each.")
    runs: int = flag(5, "Alternating runs.")
    worker: bool = flag(False, "Measure our seconds and memory alone.")
    output: Path | None = flag(None, "JSON file to put `scores`, or, of ours alone, `large`, into, beside the other.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse_arguments(EvalRetrievalArguments, __doc__, argv)
    embeddings = make_random_embeddings(args.images, args.captions)
    compute_our_recalls(*make_random_embeddings(64, args.captions))  # libraries are loaded
    before = timing.restart_peak_memory()  # making the embeddings held more than they are
    found = {
        **timing.describe_conditions(), "width": EMBEDDING_WIDTH, "images": args.images, "captions": args.images * args.captions,
        "seconds": timing.time_call(lambda: compute_our_recalls(*embeddings)),
        "memory_over_embeddings_bytes": timing.peak_resident_bytes() - before,
        "all_scores_bytes": 4 * len(embeddings[0]) * len(embeddings[1]),
    }  # fmt: skip
    part = {"large": found} if args.worker else {"scores": found | compare_recalls(embeddings, args.runs)}
    kept = read_json(args.output) if args.output and args.output.is_file() else {}
    timing.write_results(kept | part, args.output)


def make_random_embeddings(images: int, captions_per_image: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image embeddings, text embeddings near their image's, and the image of each text."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, EMBEDDING_WIDTH, generator=generator), dim=-1)
    image_of_text = torch.arange(images).repeat_interleave(captions_per_image)
    text_embeds = image_embeds[image_of_text]
    text_embeds += 0.3 * torch.randn(text_embeds.shape, generator=generator)  # in place: the largest tensor
    return image_embeds, torch.nn.functional.normalize(text_embeds, dim=-1), image_of_text


def compute_our_recalls(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> Recalls:
    """Our recalls of the same embeddings."""
    images = torch.arange(len(image_embeds))
    text_to_image, image_to_text = cross_modal_ranks(text_embeds, image_embeds, image_of_text, images)
    recalls = {f"text_to_image@{k}": recall_at_k(text_to_image, k) for k in RECALL_CUTOFFS}
    return recalls | {f"image_to_text@{k}": recall_at_k(image_to_text, k) for k in RECALL_CUTOFFS}


def compute_clip_benchmark_recalls(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> Recalls:
    """What clip-benchmark's `zeroshot_retrieval.evaluate` does once all is embedded, by its own functions."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k as theirs

    scores = text_embeds @ image_embeds.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_of_text] = True
    recalls = {}
    for name, s, p in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
        for k in RECALL_CUTOFFS:
            recalls[f"{name}@{k}"] = (batchify(theirs, s, p, 64, "cpu", k=k) > 0).float().mean().item()
    return recalls


def compare_recalls(embeddings: tuple[Tensor, Tensor, Tensor], runs: int) -> dict[str, Any]:
    """Median seconds of both, the ratio run by run, and how far their recalls are apart."""
    steps = {
        "clip_benchmark": lambda: compute_clip_benchmark_recalls(*embeddings),
        "ours": lambda: compute_our_recalls(*embeddings),
    }
    theirs, ours = (recalls() for recalls in steps.values())  # and the warm-up of both
    seconds = timing.time_alternating(steps, runs, "Alternating runs")
    return {
        "runs": runs,
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "ratio": timing.median_ratio(seconds["clip_benchmark"], seconds["ours"]),
        "largest_difference_of_a_recall": max(abs(ours[name] - theirs[name]) for name in theirs),
    }


if __name__ == "__main__":
    run_command(main)
