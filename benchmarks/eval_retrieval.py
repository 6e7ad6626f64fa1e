"""Recall at 1, 5 and 10 in both directions, against clip-benchmark's own functions on the same embeddings.

    python -m benchmarks.eval_retrieval
    python -m benchmarks.eval_retrieval --large   # also 1,000,000 captions x 100,000 images, ours alone; minutes

Random unit embeddings of width 512, five captions an image. Alternating runs, medians; our peak memory over the
embeddings is taken in a process of its own. JSON is the last line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from artifacts import device_description, package_versions, peak_resident_bytes, write_json
from eval.metrics import RECALL_CUTOFFS, recall_at_k, retrieval_ranks

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 512


def made(images: int, captions_per_image: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image embeddings, text embeddings near their image's, and the image of each text."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, WIDTH, generator=generator), dim=-1)
    image_of_text = torch.arange(images).repeat_interleave(captions_per_image)
    text_embeds = image_embeds[image_of_text]
    text_embeds += 0.3 * torch.randn(text_embeds.shape, generator=generator)  # in place: the largest tensor
    return image_embeds, torch.nn.functional.normalize(text_embeds, dim=-1), image_of_text


def ours(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> dict[str, float]:
    images = torch.arange(len(image_embeds))
    text_to_image = retrieval_ranks(text_embeds, image_embeds, image_of_text, images)
    image_to_text = retrieval_ranks(image_embeds, text_embeds, images, image_of_text)
    recalls = {f"text_to_image@{k}": recall_at_k(text_to_image, k) for k in RECALL_CUTOFFS}
    return recalls | {f"image_to_text@{k}": recall_at_k(image_to_text, k) for k in RECALL_CUTOFFS}


def clip_benchmark(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """What its `zeroshot_retrieval.evaluate` does once all is embedded, by its own functions, batches of 64."""
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


def timed(call, *args) -> tuple[float, dict[str, float]]:
    started = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - started, result


def memory_over_embeddings(images: int, captions: int) -> tuple[int, float]:
    """Bytes and seconds of ours in a process of its own: the most it held, less what it held before."""
    flags = ["--images", str(images), "--captions", str(captions), "--worker"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.eval_retrieval", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found["bytes"], found["seconds"]


def worker(images: int, captions: int) -> dict[str, float]:
    sides = made(images, captions)
    ours(*made(64, captions))  # libraries are loaded
    before = peak_resident_bytes()
    seconds, _ = timed(ours, *sides)
    return {"bytes": peak_resident_bytes() - before, "seconds": seconds}


def run(images: int, captions: int, runs: int, large: bool) -> dict:
    sides = made(images, captions)
    seconds: dict[str, list[float]] = {"ours": [], "clip_benchmark": []}
    difference = 0.0
    for _ in tqdm(range(runs), desc="Alternating runs", unit="run"):
        first, expected = timed(clip_benchmark, *sides)
        second, found = timed(ours, *sides)
        seconds["clip_benchmark"].append(first)
        seconds["ours"].append(second)
        difference = max(difference, *(abs(found[name] - expected[name]) for name in expected))
    ratios = [theirs / own for theirs, own in zip(seconds["clip_benchmark"], seconds["ours"], strict=True)]
    result = {
        "images": images, "captions": images * captions, "width": WIDTH, "runs": runs,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios), "largest_difference_of_a_recall": difference,
        "memory_over_embeddings_bytes": memory_over_embeddings(images, captions)[0],
        "device": device_description("cpu"), "versions": package_versions(),
    }  # fmt: skip
    if large:
        taken, duration = memory_over_embeddings(100_000, 10)
        result["large"] = {
            "images": 100_000, "captions": 1_000_000, "seconds": duration, "memory_over_embeddings_bytes": taken
        }  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs")
    parser.add_argument("--large", action="store_true", help="also a million captions x 100,000 images")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(worker(args.images, args.captions)))
        return
    result = run(args.images, args.captions, args.runs, args.large)
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
