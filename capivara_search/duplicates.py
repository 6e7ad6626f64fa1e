"""Near-duplicate detection: group near-duplicates among hundreds of thousands of pictures.

A model's vector alone says little about whether a picture is a copy: it changes when a picture is reduced, and hardly
differs between two lawns. Color signatures are therefore compared as well: the colors of the picture at 6 x 6 pixels, a
tiny-image descriptor (Torralba et al., 80 Million Tiny Images, 2008).

Groups are formed by sequential leader clustering (Hartigan, Clustering Algorithms, 1975). Each group has a leader, and
every other picture of the group is similar to the leader and comes after it. So a chain of small differences can't lead
from one scene to another, as it would with connected components.

Flat pictures, such as icons, charts and blank pages, share most of their pixels with other pictures of their kind, and
a model hardly distinguishes them. Two flat pictures are compared by their details only, with a far stricter limit.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc

from capivara_search.results import DUPLICATE_MIN_SIMILARITY
from capivara_search.table import COLOR_SIGNATURE_COLUMN, l2_normalize, to_array, vector_column

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

BLOCK_ROWS = 512  # vectors that are compared with each other at once
LATER_BLOCK_ROWS = 2048  # later vectors that a block is compared with at once
FLOAT16_TOLERANCE = 1e-3  # vectors are stored as float16; the threshold is lowered by their rounding error
SIGNATURE_SIDE = 6  # pixels; chosen like `DUPLICATE_MIN_SIMILARITY` (docs/benchmarks.md)
SIGNATURE_WEIGHT = 2 / 3  # share of the color signature in the similarity; the rest is the cosine of the vectors
MIN_SIGNATURE_STD = 2.0  # standard deviation of the colors (0 to 255) below which a color signature is ignored
SIGNATURE_BYTES = 3 * SIGNATURE_SIDE * SIGNATURE_SIDE
# A picture is flat if this share of its pixels has exactly the same color. Of the pictures of `benchmarks.duplicates`,
# icons have 0.21 and more, and photographs at most 0.18.
MIN_FLAT_PIXEL_SHARE = 0.2
MAX_CONSTANT_STD = 4.0  # standard deviation of the pixels (0 to 255) below which a picture is flat, too
DETAIL_SIDES = (18, 6, 6)  # pixels of the luma and both chroma planes (YCbCr) that flat pictures are compared by
DETAIL_BYTES = sum(side * side for side in DETAIL_SIDES)
# Root mean square difference of the details (0 to 255) at which two flat pictures have `DUPLICATE_MIN_SIMILARITY`.
DUPLICATE_DETAIL_RMS = 1.2
DETAIL_COLUMNS = slice(-DETAIL_BYTES, None)  # columns of the details in the result of `add_color_signatures`


def color_signature(image: PIL.Image.Image) -> bytes:
    """Return the color signature of a picture.

    It is the picture at `SIGNATURE_SIDE` x `SIGNATURE_SIDE` pixels, RGB (`SIGNATURE_BYTES`). The signature of a flat
    picture also has its details (`DETAIL_BYTES`): the planes of YCbCr at `DETAIL_SIDES`.
    """
    image = image.convert("RGB")
    colors = image.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), PIL.Image.Resampling.BOX).tobytes()
    if not is_flat(np.asarray(image)):
        return colors
    planes = zip(image.convert("YCbCr").split(), DETAIL_SIDES, strict=True)
    # Unlike BOX, HAMMING weights the pixels on the border of a cell, so that an enlarged or reduced copy has the same
    # details.
    return colors + b"".join(
        plane.resize((side, side), PIL.Image.Resampling.HAMMING).tobytes() for plane, side in planes
    )


def is_flat(pixels: np.ndarray) -> bool:
    """Return whether a picture is flat: nearly constant, or with many pixels of exactly the same color.

    Args:
        pixels: (height, width, 3), 0 to 255.
    """
    if pixels.std(axis=(0, 1)).max() < MAX_CONSTANT_STD:
        return True
    red, green, blue = pixels.reshape(-1, 3).astype(np.int32).T
    counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)[1]
    return counts.max() >= MIN_FLAT_PIXEL_SHARE * counts.sum()


def add_color_signatures(vectors: np.ndarray, signatures: Sequence[bytes | None]) -> np.ndarray:
    """Return the vectors that pictures are compared by (`pairwise_similarity`).

    They are scaled so that a dot product is one third the cosine of the model's vectors plus two thirds the cosine of
    the color signatures. In a signature, half of the picture's mean color is subtracted, otherwise any two crops of a
    red picture would be similar. Pictures without a signature, or with the signature of a uniform picture, are compared
    by the model's vectors alone.

    Args:
        vectors: (rows, width), unit length.
        signatures: Results of `color_signature`; None if the row has none.

    Returns:
        (rows, width + `SIGNATURE_BYTES` + `DETAIL_BYTES`), float32. The columns of the details (`DETAIL_COLUMNS`) are
        zeros unless the picture is flat.
    """
    pixels = np.frombuffer(
        b"".join((signature or bytes(SIGNATURE_BYTES))[:SIGNATURE_BYTES] for signature in signatures), np.uint8
    )
    pixels = pixels.reshape(len(signatures), SIGNATURE_SIDE * SIGNATURE_SIDE, 3).astype(np.float32)
    pixels -= (pixels.mean(axis=1, keepdims=True) + pixels.mean(axis=(1, 2), keepdims=True)) / 2
    pixels = pixels.reshape(len(signatures), SIGNATURE_BYTES)
    norms = np.linalg.norm(pixels, axis=1, keepdims=True)
    is_uniform = norms < MIN_SIGNATURE_STD * SIGNATURE_BYTES**0.5
    pixels *= np.where(is_uniform, 0, SIGNATURE_WEIGHT**0.5 / np.maximum(norms, 1)).astype(np.float32)
    vector_scale = np.where(is_uniform, 1, (1 - SIGNATURE_WEIGHT) ** 0.5).astype(np.float32)
    return np.concatenate([vectors * vector_scale, pixels, _decode_details(signatures)], axis=1, dtype=np.float32)


def _decode_details(signatures: Sequence[bytes | None]) -> np.ndarray:
    """Return the details of flat pictures as (rows, `DETAIL_BYTES`), -127 to 128; zeros for other pictures."""
    details = np.zeros((len(signatures), DETAIL_BYTES), np.float32)
    for row, signature in enumerate(signatures):
        if signature and len(signature) == SIGNATURE_BYTES + DETAIL_BYTES:
            details[row] = np.frombuffer(signature, np.uint8, offset=SIGNATURE_BYTES) - np.float32(127)
    return details


def pairwise_similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the similarity of each picture to each other picture.

    The similarity of two flat pictures is 1 minus the mean squared difference of their details, scaled so that a root
    mean square difference of `DUPLICATE_DETAIL_RMS` has the similarity `DUPLICATE_MIN_SIMILARITY`. The similarity of
    all other pairs is the dot product of their vectors.

    Args:
        vectors: (rows, columns), result of `add_color_signatures`.
        others: (others, columns), likewise.

    Returns:
        (rows, others), at most 1.
    """
    vectors, others = np.asarray(vectors, np.float32), np.asarray(others, np.float32)
    details, other_details = vectors[:, DETAIL_COLUMNS], others[:, DETAIL_COLUMNS]
    # These are integers below 2**24, so float32 is exact.
    square_sums, other_square_sums = (details**2).sum(axis=1), (other_details**2).sum(axis=1)
    mean_squares = (square_sums[:, None] + other_square_sums - 2 * (details @ other_details.T)) / DETAIL_BYTES
    products = vectors[:, : DETAIL_COLUMNS.start] @ others[:, : DETAIL_COLUMNS.start].T
    flat_similarities = 1 - (1 - DUPLICATE_MIN_SIMILARITY) / DUPLICATE_DETAIL_RMS**2 * mean_squares
    return np.where(np.outer(square_sums, other_square_sums) > 0, flat_similarities, products)


def get_model_vectors(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """Return the vectors of rows.

    Args:
        model: Model in use.
        rows: Rows with the columns `comparison_columns`.

    Returns:
        (rows, width), unit length; zeros for a row without a vector of this model.
    """
    vectors, name = np.zeros((len(rows), model.width), np.float32), vector_column(model.width)
    if name in rows.column_names:
        has_vector = pc.and_(rows[name].is_valid(), pc.equal(rows["model"], model.image_digest))
        vectors[has_vector.to_numpy()] = l2_normalize(to_array(rows[name].filter(has_vector)))
    return vectors


def get_comparison_vectors(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """Return the vectors that pictures are compared by, from the model's vectors and the color signatures of rows.

    Args:
        model: Model in use.
        rows: Rows with the columns `comparison_columns`; the color signatures may be missing.

    Returns:
        Result of `add_color_signatures`.
    """
    signatures = [None] * len(rows)
    if COLOR_SIGNATURE_COLUMN in rows.column_names:
        signatures = rows[COLOR_SIGNATURE_COLUMN].to_pylist()
    return add_color_signatures(get_model_vectors(model, rows), signatures)


def newest_first_order(rows: pa.Table) -> pa.Array:
    """Return the indices that sort rows by date, latest first, then by path.

    The date is the EXIF date, otherwise the modification time of the file.
    """
    offset_ns = time.localtime().tm_gmtoff * 10**9  # cameras record local time, so file times are converted to it
    modified = ((rows["mtime_ns"].to_numpy() + offset_ns) // 1000).astype("datetime64[us]")
    dated = pa.table({"path": rows["path"], "date": pc.coalesce(rows["taken"], pa.array(modified))})
    return pc.sort_indices(dated, [("date", "descending"), ("path", "ascending")])


class CachedRows:
    """Rows of an index or of a part of it in memory, sorted by path, for exact search and duplicate detection.

    Args:
        model: Model in use.
        rows: Rows with the columns `comparison_columns`.
    """

    def __init__(self, model: "SearchModel", rows: pa.Table):
        self.rows, self._model = rows.sort_by("path"), model
        self._vectors = get_model_vectors(model, self.rows)
        self._without_vector = ~self._vectors.any(axis=1)  # rows whose vectors are of other models

    @cached_property
    def comparison_vectors(self) -> np.ndarray:
        """Vectors that the rows are compared by (`get_comparison_vectors`)."""
        return get_comparison_vectors(self._model, self.rows)

    def nearest(self, vector: np.ndarray, k: int) -> pa.Table:
        """Return the rows whose vectors are nearest to a query vector, comparing all of them.

        Args:
            vector: (width,), unit length.
            k: Maximum number of rows.

        Returns:
            Rows with their cosine in the column `score`, best first; rows of equal score are sorted by path.
        """
        scores = np.clip(self._vectors @ vector, -1, 1)
        order = np.argsort(np.where(self._without_vector, np.inf, -scores), kind="stable")
        order = order[: min(k, len(order) - self._without_vector.sum())]
        return self.rows.take(order).append_column("score", pa.array(scores[order], pa.float64()))

    def newest(self, k: int) -> pa.Table:
        """Return the k newest rows, latest first."""
        return self.rows.take(newest_first_order(self.rows)[:k])


def is_duplicate(vectors: np.ndarray, others: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY) -> np.ndarray:
    """Return whether each picture is a near-duplicate of each other picture.

    Args:
        vectors: (rows, columns), result of `add_color_signatures`.
        others: (others, columns), likewise.
        threshold: Minimum similarity.

    Returns:
        (rows, others), boolean.
    """
    return pairwise_similarity(vectors, others) >= threshold - FLOAT16_TOLERANCE


def leaders(
    vectors: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY, max_groups: int | None = None
) -> np.ndarray:
    """Assign each row to the leader of its group of near-duplicates (sequential leader clustering).

    Rows are processed in order. A row that is similar to no earlier leader becomes a leader; any other row joins the
    first leader that it is similar to.

    Args:
        vectors: (rows, columns), result of `add_color_signatures`.
        threshold: Minimum similarity of a row to its leader.
        max_groups: Stop as soon as this number of leaders is known. Later rows may then be their own leaders although
            they are near-duplicates. None: process all rows.

    Returns:
        (rows,), row number of each row's leader; a leader has its own number.
    """
    rows = np.arange(len(vectors))
    leader_of = rows.copy()
    for start in range(0, len(vectors), BLOCK_ROWS):
        end = start + BLOCK_ROWS
        block_rows = start + np.flatnonzero(leader_of[start:end] == rows[start:end])  # no earlier leader is similar
        block = vectors[block_rows].astype(np.float32)
        for row, similar in zip(block_rows, is_duplicate(block, block, threshold), strict=True):
            if leader_of[row] == row:
                is_follower = similar & (block_rows > row) & (leader_of[block_rows] == block_rows)
                leader_of[block_rows[is_follower]] = row
        is_leader = leader_of[block_rows] == block_rows
        block, block_rows = block[is_leader], block_rows[is_leader]
        if max_groups and np.sum(leader_of[:end] == rows[:end]) >= max_groups:
            break
        for later_start in range(end, len(vectors) if len(block_rows) else 0, LATER_BLOCK_ROWS):
            later_end = later_start + LATER_BLOCK_ROWS
            is_unassigned = leader_of[later_start:later_end] == rows[later_start:later_end]
            later_rows = later_start + np.flatnonzero(is_unassigned)
            similar = is_duplicate(block, vectors[later_rows], threshold)
            leader_of[later_rows] = np.where(similar.any(axis=0), block_rows[similar.argmax(axis=0)], later_rows)
    return leader_of


def find_duplicate_groups(
    vectors: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY, max_groups: int | None = None
) -> list[np.ndarray]:
    """Group near-duplicates.

    Args:
        vectors: (rows, columns), result of `add_color_signatures`.
        threshold: Minimum similarity of a row to the leader of its group.
        max_groups: Return the first groups only, at most this number. None: all groups.

    Returns:
        The row numbers of each group in ascending order, sorted by the first row, which is the leader. A row without
        near-duplicates is a group of its own.
    """
    leader_of = leaders(vectors, threshold, max_groups)
    order = np.argsort(leader_of, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(leader_of[order])) + 1)[:max_groups] if len(order) else []
