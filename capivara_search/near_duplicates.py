"""Groups of vectors that are nearly the same, among hundreds of thousands.

    groups = near_groups(vectors, threshold=0.97)  # [array([3, 17]), array([5, 40, 41])]

All pairs are looked at, in blocks, by an upper bound of their similarity that needs an eighth of the numbers: of the
part within the main directions the exact product, of the rest the product of the lengths. Pairs whose bound reaches the
threshold are compared in full.
"""

import numpy as np

DIRECTIONS = 64  # 100,000 vectors of 512 take 15 s of one core with it
SAMPLE = 20_000  # vectors that the directions are learnt from
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
    short, labels = _shortened(vectors), np.arange(len(vectors))
    for start in range(0, len(vectors), BLOCK):
        for other in range(start, len(vectors), BLOCK):
            bounds = short[start : start + BLOCK] @ short[other : other + BLOCK].T
            left, right = np.nonzero(bounds >= threshold - ROUNDING)
            left, right = left + start, right + other
            apart = (left < right) & (labels[left] != labels[right])
            left, right = left[apart], right[apart]
            if len(left):
                near = _similarities(vectors, left, right) >= threshold - ROUNDING
                _join(labels, left[near], right[near])
    return _groups(labels)


def _shortened(vectors: np.ndarray) -> np.ndarray:
    """Numbers whose product is at least that of the vectors: (rows, directions + 1)."""
    width = vectors.shape[1]
    if len(vectors) < 2 or width <= DIRECTIONS:
        return vectors.astype(np.float32)
    sample = vectors[:: max(1, len(vectors) // SAMPLE)].astype(np.float32)
    main = np.linalg.eigh(sample.T @ sample)[1][:, -DIRECTIONS:]  # (width, directions)
    short = np.empty((len(vectors), DIRECTIONS + 1), np.float32)
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK].astype(np.float32)
        part = rows @ main
        rest = np.sqrt(np.maximum((rows**2).sum(1) - (part**2).sum(1), 0))
        short[start : start + BLOCK] = np.concatenate([part, rest[:, None]], axis=1)
    return short


def _similarities(vectors: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of pairs, some thousand at a time."""
    found = np.empty(len(left), np.float32)
    for start in range(0, len(left), 2 * BLOCK):
        some = slice(start, start + 2 * BLOCK)
        pairs = vectors[left[some]].astype(np.float32), vectors[right[some]].astype(np.float32)
        found[some] = np.einsum("rw,rw->r", *pairs)
    return found


def _join(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Give the groups of each pair one label, the least one of them."""
    parents: dict[int, int] = {}

    def root(label: int) -> int:
        while (parent := parents.get(label, label)) != label:
            label = parent
        return label

    for one, other in np.unique(np.stack([labels[left], labels[right]], axis=1), axis=0).tolist():
        one, other = sorted((root(one), root(other)))
        parents[other] = one
    if parents:
        changed = np.isin(labels, list(parents))
        labels[changed] = [root(label) for label in labels[changed].tolist()]


def _groups(labels: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    starts = np.nonzero(np.diff(labels[order], prepend=-1))[0]
    groups = [group for group in np.split(order, starts[1:]) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))
