"""Rows for the benchmarks of captions: parquet files of photos with made-up captions."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image

from benchmarks.loading import write_tar
from caption_data.columns import CAPTIONS, SIMILARITIES
from caption_data.sources import open_source

WORDS = "a the of two old red small happy dog cat house tree child boat street table sits runs plays under near with"
SENTENCE_WORDS = 10  # of a caption; about COCO's
ORIGINALS, GENERATED = 1, 10  # captions an image


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
