"""Rows and clocks of the benchmarks of captions: parquet files of photos with made-up captions, alternating runs."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image
from tqdm.auto import tqdm

from benchmarks.encode import seconds_of
from benchmarks.loading import write_tar
from caption_data.columns import CAPTIONS, SIMILARITIES
from caption_data.sources import open_source

WORDS = "a the of two old red small happy dog cat house tree child boat street table sits runs plays under near with"
SENTENCE_WORDS = 10  # of a caption; about COCO's
ORIGINALS, GENERATED = 1, 10  # captions an image


def timed_runs(steps: dict[str, Callable[[int], object]], runs: int, device: str, what: str) -> dict[str, list[float]]:
    """Seconds of every step in every run, alternating, after one run that is not counted; a step gets the run's number.

    Args:
        steps: name -> what is timed.
        runs: that are counted.
        device: whose queue is drained before and after.
        what: title of the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for run in tqdm(range(runs + 1), desc=what, unit="run"):
        for name, step in steps.items():
            seconds[name].append(seconds_of(lambda step=step, run=run: step(run), device))
    return {name: all_runs[1:] for name, all_runs in seconds.items()}


def rates(rows: int, seconds: list[float]) -> dict[str, float]:
    """Rows per second."""
    return {"median": rows / statistics.median(seconds), "slowest": rows / max(seconds), "fastest": rows / min(seconds)}


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Of the seconds, run by run."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def write_rows(folder: Path, columns: dict[str, list], rows: int) -> str:
    """A parquet file of JPEG images of a photo's size, as loading's, beside some columns; returns its folder."""
    folder.mkdir(parents=True)
    write_tar(folder / "train-0.tar", min(rows, 64))
    images = [row["image"] for row in open_source(str(folder), "train", "image").rows()]
    (folder / "train-0.tar").unlink()
    features = Features({"image": Image()} | {name: _feature(name) for name in columns})
    data = {"image": [images[row % len(images)] for row in range(rows)], **columns}
    Dataset.from_dict(data, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


def sentences(number: int, seed: int = 0) -> list[str]:
    """Different English word sequences."""
    draw, words = np.random.default_rng(seed), np.array(WORDS.split())
    found: dict[str, None] = {}
    while len(found) < number:
        found[" ".join(draw.choice(words, SENTENCE_WORDS))] = None
    return list(found)


def caption_lists(texts: list[str], language: str) -> dict[str, list[list[str]]]:
    """The columns of originals and generated captions, an image's in a row."""
    width = ORIGINALS + GENERATED
    rows = [texts[start : start + width] for start in range(0, len(texts), width)]
    return {
        f"captions-{language}": [row[:ORIGINALS] for row in rows],
        f"generated-captions-{language}": [row[ORIGINALS:] for row in rows],
    }


def _feature(column: str) -> Any:
    return SIMILARITIES if column.startswith("similarities") else CAPTIONS
