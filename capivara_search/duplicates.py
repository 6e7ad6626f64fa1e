"""Groups of pictures that are nearly the same, among hundreds of thousands.

    groups = near_groups(vectors, threshold=0.97)  # [array([3, 17]), array([5, 40, 41])]
    best_first(to_hits(rows.take(groups[0])), vectors[groups[0]])

All pairs are compared, in blocks.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from capivara_search.results import Hit

BLOCK = 2048  # vectors
ROUNDING = 1e-3  # of float16


def near_groups(vectors: np.ndarray, threshold: float) -> list[np.ndarray]:
    """Groups of vectors, each of which is at least so similar to another one of its group.

    Args:
        vectors: (rows, width), unit length.
        threshold: least cosine similarity, above 0 to 1.

    Returns:
        Row numbers of each group of two and more, rising; the largest group first.
    """
    labels = np.arange(len(vectors))  # of each row, the first row of its group
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK].astype(np.float32)
        for other in range(start, len(vectors), BLOCK):
            scores = rows @ vectors[other : other + BLOCK].astype(np.float32).T
            left, right = np.nonzero(scores >= threshold - ROUNDING)
            pairs = np.stack([labels[left + start], labels[right + other]], axis=1)
            for pair in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0):
                first, second = sorted(labels[pair].tolist())  # which an earlier pair may have changed
                if first != second:
                    labels[labels == second] = first
    order = np.argsort(labels, kind="stable")
    starts = np.nonzero(np.diff(labels[order]))[0] + 1
    groups = [group for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))


def best_first(hits: Sequence[Hit], vectors: np.ndarray) -> list[Hit]:
    """A group with its largest picture first, then by similarity to it, which is their score.

    Args:
        hits: the pictures.
        vectors: (pictures, width), unit length.
    """
    best = min(range(len(hits)), key=lambda i: (-hits[i].width * hits[i].height, -hits[i].size, i))
    scores = np.clip(vectors @ vectors[best], -1, 1)
    scored = [replace(hit, score=float(score)) for hit, score in zip(hits, scores, strict=True)]
    first = scored.pop(best)
    return [first, *sorted(scored, key=lambda hit: (-hit.score, hit.path))]
