"""How well the miniature finds pictures, beside the embedded default's base, and how long it takes to put together.

    python -m benchmarks.miniature --output benchmarks/results/miniature.json

Mean recall at 1, 5 and 10, text to picture and picture to text, in Portuguese and English: OpenMoji's test concepts, by
their first name, and 21 photographs, by a name and by a sentence each. The photographs have chosen one number of the
miniature (`examples.openmoji.fit_miniature`) and trained none; they are few: a difference of a few points says nothing.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from benchmarks.timing import conditions, finish
from capivara_common.cli import flag, parse, run_command
from capivara_search.models import MINIATURE, SearchModel, find_model
from eval.capivara_metrics.metrics import mean_recall, retrieval_ranks
from examples.openmoji.dataset import load_embedded
from examples.openmoji.proxies import photographs

LANGUAGES = ("pt", "en")


@dataclass
class MiniatureBenchmarkArguments:
    """Arguments of `benchmarks.miniature`."""

    base: str = flag("data/openmoji/base", "Model that the miniature is compared with.")
    dataset: Path = flag(Path("data/openmoji/dataset"), "OpenMoji data set, as prepared.")
    output: Path | None = flag(None, "JSON file for the figures.")


def main(argv: list[str] | None = None) -> None:
    """Measure both models and print the results."""
    args = parse(MiniatureBenchmarkArguments, __doc__, argv)
    results: dict[str, Any] = conditions("cpu")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CAPIVARA_CACHE"] = cache
        started = time.perf_counter()
        miniature = find_model(MINIATURE)
        results["seconds_to_put_together"] = time.perf_counter() - started
        results["megabytes"] = sum(path.stat().st_size for path in miniature.folder.iterdir()) / 1e6
        test, photos = load_embedded(args.dataset)["test"], photographs()
        results["measured"] = {
            name: measured(model, test, photos)
            for name, model in (("miniature", miniature), ("base", find_model(args.base)))
        }
    finish(results, args.output)


def measured(model: SearchModel, test: Dataset, photos: Dataset) -> dict[str, dict[str, float]]:
    """Set and language -> mean recall of both directions, in per cent."""
    found = {}
    for name, rows, place in (("openmoji_test", test, 0), ("photo_names", photos, 0), ("photo_sentences", photos, 1)):
        images = model.images(rows["image"][:])
        for code in LANGUAGES:
            texts = model.texts([captions[place] for captions in rows[f"captions-{code}"]])
            found[f"{name}_{code}"] = {
                "pictures": len(images),
                "text_to_image": recall(texts, images),
                "image_to_text": recall(images, texts),
            }
    return found


def recall(queries: np.ndarray, targets: np.ndarray) -> float:
    """Mean recall at 1, 5 and 10, in per cent; row i of the queries belongs to row i of the targets."""
    rows = torch.arange(len(queries))
    return 100 * mean_recall(retrieval_ranks(torch.from_numpy(queries), torch.from_numpy(targets), rows, rows))


if __name__ == "__main__":
    run_command(main)
