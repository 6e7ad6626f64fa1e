"""Queries with the pictures that a model ranks first, kept as small files beside a result for the report to show."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from eval.embeddings import RetrievalEmbeddings

BEST = 5  # pictures shown of a query
SIDE = 224  # pixels of a picture's longer side
SEED = 0  # of the draw: the figures' readers see the same queries for every model


def write_gallery(
    result: Path,
    queries: int,
    embeddings: RetrievalEmbeddings,
    texts: Sequence[str],
    rows: Sequence[int],
    open_image: Callable[[int], PIL.Image.Image],
) -> list[dict[str, Any]]:
    """Draw hits (rank 1) and misses, half of each, and write their pictures into `<result's name>.gallery/`.

    Args:
        texts: (texts,), the captions that were embedded.
        rows: (images,), the row of each embedded image in the data set.

    Returns:
        A dict a query: `query`, `rank` from 1, `right` and `best`, pictures by their path relative to the result.
    """
    ranks = embeddings.ranks("text_to_image")
    folder = result.parent / f"{result.stem}.gallery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def picture(index: int) -> str:
        path = folder / f"{rows[index]:06d}.jpg"
        if not path.is_file():
            image = open_image(rows[index]).convert("RGB")
            image.thumbnail((SIDE, SIDE))
            image.save(path, quality=85)
        return f"{folder.name}/{path.name}"

    entries = []
    for query in _drawn(ranks, queries):
        scores = embeddings.image_embeds @ embeddings.text_embeds[query]
        best = scores.argsort(descending=True, stable=True)[:BEST].tolist()
        entries.append(
            {
                "query": texts[query],
                "rank": int(ranks[query]) + 1,
                "right": picture(int(embeddings.image_of_text[query])),
                "best": [{"image": picture(index), "score": round(float(scores[index]), 4)} for index in best],
            }
        )
    return entries


def _drawn(ranks: torch.Tensor, queries: int) -> list[int]:
    """Half hits, half misses, as far as there are both."""
    order = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(SEED))
    hits, misses = order[ranks[order] == 0].tolist(), order[ranks[order] > 0].tolist()
    return hits[: max(queries - len(misses), (queries + 1) // 2)] + misses[: max(queries - len(hits), queries // 2)]
