"""Measure how fast this project computes retrieval recall, compared with the package clip-benchmark.

    python -m benchmarks.eval_retrieval --output benchmarks/results/eval_retrieval.json
    python -m benchmarks.eval_retrieval --images 100000 --captions 10 --worker   # only this project; half an hour

Both programs compute recall@1, recall@5 and recall@10 in both directions from the same random embeddings of width 512.
The peak memory is measured for this project only.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tools
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import read_json
from eval.capivara_metrics.metrics import RECALL_CUTOFFS, cross_modal_ranks, recall_at_k

EMBEDDING_WIDTH = 512
Recalls = dict[str, float]  # {direction and k, such as "text_to_image@5": recall from 0 to 1}


@dataclass
class EvalRetrievalArguments:
    """Command-line arguments of `benchmarks.eval_retrieval`, which times the computation of retrieval recall."""

    images: int = flag(5000, "Number of images.")
    captions: int = flag(5, "Number of captions per image.")
    runs: int = flag(5, "Number of timed runs of each program (this project, clip-benchmark), alternately.")
    worker: bool = flag(False, "Measure only the time and memory of this project, without clip-benchmark.")
    output: Path | None = flag(
        None,
        "JSON file for the results, which get the key `scores`, or `large` with --worker. Other keys of an existing "
        "file are kept.",
    )


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark: time the recall functions of this project and clip-benchmark, and print JSON results."""
    args = parse_arguments(EvalRetrievalArguments, __doc__, argv)
    embeddings = _make_random_embeddings(args.images, args.captions)
    _compute_our_recalls(*_make_random_embeddings(64, args.captions))  # untimed, because the first call loads libraries
    # The peak is reset, so that the memory that was needed to make the embeddings does not count.
    before = tools.reset_peak_memory()
    measured = {
        **tools.describe_measurement_conditions(), "width": EMBEDDING_WIDTH,
        "images": args.images, "captions": args.images * args.captions,
        "seconds": tools.time_call(lambda: _compute_our_recalls(*embeddings)),
        "memory_over_embeddings_bytes": tools.peak_resident_bytes() - before,
        "all_scores_bytes": 4 * len(embeddings[0]) * len(embeddings[1]),
    }  # fmt: skip
    if not args.worker:
        measured |= _compare_speed_and_recalls(embeddings, args.runs)
    existing = read_json(args.output) if args.output and args.output.is_file() else {}
    tools.output_results_as_json(existing | {"large" if args.worker else "scores": measured}, args.output)


def _make_random_embeddings(images: int, captions_per_image: int) -> tuple[Tensor, Tensor, Tensor]:
    """Generate random embeddings in which each text is near its image.

    Args:
        images: Number of images.
        captions_per_image: Number of texts per image.

    Returns:
        Image embeddings (images, width), text embeddings (texts, width), and the image index of each text (texts,).
    """
    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, EMBEDDING_WIDTH, generator=generator), dim=-1)
    image_of_text = torch.arange(images).repeat_interleave(captions_per_image)
    text_embeds = image_embeds[image_of_text]
    # The noise is added in place, because `text_embeds + noise` would allocate one more tensor of this size.
    text_embeds += 0.3 * torch.randn(text_embeds.shape, generator=generator)
    return image_embeds, torch.nn.functional.normalize(text_embeds, dim=-1), image_of_text


def _compute_our_recalls(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> Recalls:
    """Compute recall at 1, 5 and 10 in both directions with the functions of this project.

    Args:
        image_embeds: Image embeddings (images, width).
        text_embeds: Text embeddings (texts, width).
        image_of_text: Image index of each text (texts,).

    Returns:
        Recall from 0 to 1 by direction and cutoff, such as "text_to_image@5".
    """
    images = torch.arange(len(image_embeds))
    text_to_image, image_to_text = cross_modal_ranks(text_embeds, image_embeds, image_of_text, images)
    recalls = {f"text_to_image@{k}": recall_at_k(text_to_image, k) for k in RECALL_CUTOFFS}
    return recalls | {f"image_to_text@{k}": recall_at_k(image_to_text, k) for k in RECALL_CUTOFFS}


def _compute_clip_benchmark_recalls(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> Recalls:
    """Compute recall at 1, 5 and 10 in both directions with the functions of clip-benchmark.

    The code is that of `zeroshot_retrieval.evaluate` in clip-benchmark, without the computation of the embeddings.

    Args:
        image_embeds: Image embeddings (images, width).
        text_embeds: Text embeddings (texts, width).
        image_of_text: Image index of each text (texts,).

    Returns:
        Recall from 0 to 1 by direction and cutoff, such as "text_to_image@5".
    """
    from clip_benchmark.metrics.zeroshot_retrieval import batchify
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k as theirs

    scores = text_embeds @ image_embeds.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_of_text] = True
    recalls = {}
    directions = {"text_to_image": (scores, positive), "image_to_text": (scores.T, positive.T)}
    for name, tensors in directions.items():
        for k in RECALL_CUTOFFS:
            recalls[f"{name}@{k}"] = (batchify(theirs, *tensors, 64, "cpu", k=k) > 0).float().mean().item()
    return recalls


def _compare_speed_and_recalls(embeddings: tuple[Tensor, Tensor, Tensor], runs: int) -> dict[str, Any]:
    """Time the functions of clip-benchmark and of this project, and compare their recalls.

    Args:
        embeddings: Image embeddings, text embeddings, and image index of each text, from `_make_random_embeddings`.
        runs: Number of runs. Each run times both programs once.

    Returns:
        A dict with these keys:

        - "runs": number of runs.
        - "seconds": `{"clip_benchmark": median seconds, "ours": median seconds}`.
        - "ratio": median over the runs of clip-benchmark's seconds divided by our seconds.
        - "largest_difference_of_a_recall": largest absolute difference between the recalls of the two programs.
    """
    steps = {
        "clip_benchmark": lambda: _compute_clip_benchmark_recalls(*embeddings),
        "ours": lambda: _compute_our_recalls(*embeddings),
    }
    # The first call of a program is slower than later calls. These untimed calls therefore also serve as warm-up.
    theirs, ours = (recalls() for recalls in steps.values())
    seconds = tools.time_alternating(steps, runs, "Alternating runs")
    return {
        "runs": runs,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": tools.median_ratio(seconds["clip_benchmark"], seconds["ours"]),
        "largest_difference_of_a_recall": max(abs(ours[name] - theirs[name]) for name in theirs),
    }


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
