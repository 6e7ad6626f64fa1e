"""Pictures that are nearly the same: groups of them among hundreds of thousands, and each group once in an answer.

What a model sees in two pictures says little of whether one is a copy: its vector changes when a picture is reduced,
and hardly from one lawn to another. So their looks are compared, too: the colours of a few pixels. A picture leads its
group; every other one of it is similar to that one, and comes after it. So no chain of small differences leads from one
scene to another.

Flat pictures, such as icons, charts and blank pages, share most of their pixels with other pictures of their kind, and
a model hardly tells them apart. Two flat pictures are compared by their details alone, and far more strictly.
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

BLOCK_ROWS, LATER_BLOCK_ROWS = 512, 2048  # vectors that are compared with one another, and with later ones, at once
FLOAT16_TOLERANCE = 1e-3  # of float16
SIGNATURE_SIDE = 6  # pixels of a look; chosen as `SAME` was, among others (docs/benchmarks.md)
SIGNATURE_WEIGHT = 2 / 3  # of the similarity
MIN_SIGNATURE_STD = 2.0  # standard deviation of the colours, of 255, below which a picture has no look
SIGNATURE_BYTES = 3 * SIGNATURE_SIDE * SIGNATURE_SIDE
# A picture is flat if this share of its pixels has exactly the same color. Of the pictures of `benchmarks.duplicates`,
# icons have 0.21 and more, and photographs at most 0.18.
MIN_FLAT_PIXEL_SHARE = 0.2
MAX_CONSTANT_STD = 4.0  # standard deviation of the pixels, of 255, below which a picture is flat, too
DETAIL_SIDES = (18, 6, 6)  # pixels of the luma and both chroma planes (YCbCr) that flat pictures are compared by
DETAIL_BYTES = sum(side * side for side in DETAIL_SIDES)
DUPLICATE_DETAIL_RMS = (
    1.2  # root mean square difference of details, of 255, at which the similarity of flat pictures is `SAME`
)
DETAIL_COLUMNS = slice(-DETAIL_BYTES, None)  # the columns of details in `compared`


def color_signature(image: PIL.Image.Image) -> bytes:
    """Return the colors of a picture in `SIDE` x `SIDE` pixels, RGB; of a flat picture, its details after them."""
    image = image.convert("RGB")
    colors = image.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), PIL.Image.Resampling.BOX).tobytes()
    if not is_flat(np.asarray(image)):
        return colors
    planes = zip(image.convert("YCbCr").split(), DETAIL_SIDES, strict=True)
    # Unlike BOX, HAMMING weighs pixels on the edge of a cell, so that an enlarged or reduced copy has the same details.
    return colors + b"".join(plane.resize((n, n), PIL.Image.Resampling.HAMMING).tobytes() for plane, n in planes)


def is_flat(pixels: np.ndarray) -> bool:
    """Return whether pixels (height, width, 3) are nearly constant, or many of them have exactly the same color."""
    if pixels.std(axis=(0, 1)).max() < MAX_CONSTANT_STD:
        return True
    red, green, blue = pixels.reshape(-1, 3).astype(np.int32).T
    counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)[1]
    return counts.max() >= MIN_FLAT_PIXEL_SHARE * counts.sum()


def add_color_signatures(vectors: np.ndarray, signatures: Sequence[bytes | None]) -> np.ndarray:
    """Return what pictures are compared by: a third the cosine of their vectors, two thirds the cosine of their looks.

    The color that a picture has all over counts half, else any two cuts of a red one look alike. Where there is no
    look, or that of a grey picture, pictures are compared by their vectors alone. `similarity` compares the result.

    Args:
        vectors: (rows, width), unit length.
        looks: of `look_of`; None if the row has none.

    Returns:
        (rows, width + `LOOK_BYTES` + `DETAIL_BYTES`), float32. The last columns, `DETAILS`, are zeros unless the
        picture is flat.
    """
    pixels = np.frombuffer(
        b"".join((look or bytes(SIGNATURE_BYTES))[:SIGNATURE_BYTES] for look in signatures), np.uint8
    )
    pixels = pixels.reshape(len(signatures), SIGNATURE_SIDE * SIGNATURE_SIDE, 3).astype(np.float32)
    pixels -= (pixels.mean(axis=1, keepdims=True) + pixels.mean(axis=(1, 2), keepdims=True)) / 2
    pixels = pixels.reshape(len(signatures), SIGNATURE_BYTES)
    norms = np.linalg.norm(pixels, axis=1, keepdims=True)
    flat = norms < MIN_SIGNATURE_STD * SIGNATURE_BYTES**0.5
    pixels *= np.where(flat, 0, SIGNATURE_WEIGHT**0.5 / np.maximum(norms, 1)).astype(np.float32)
    own = np.where(flat, 1, (1 - SIGNATURE_WEIGHT) ** 0.5).astype(np.float32)
    return np.concatenate([vectors * own, pixels, _decode_details(signatures)], axis=1, dtype=np.float32)


def _decode_details(signatures: Sequence[bytes | None]) -> np.ndarray:
    """Return the details of looks as (rows, `DETAIL_BYTES`), -127 to 128; zeros if a look has none."""
    found = np.zeros((len(signatures), DETAIL_BYTES), np.float32)
    for row, look in enumerate(signatures):
        if look and len(look) == SIGNATURE_BYTES + DETAIL_BYTES:
            found[row] = np.frombuffer(look, np.uint8, offset=SIGNATURE_BYTES) - np.float32(127)
    return found


def pairwise_similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return how similar pictures are, as (rows, others), at most 1, by what `compared` made of them.

    Of two flat pictures it is 1 minus the mean square of the differences of their details, scaled by `DETAIL_RMS`.
    """
    vectors, others = (np.asarray(one, np.float32) for one in (vectors, others))
    details, other_details = vectors[:, DETAIL_COLUMNS], others[:, DETAIL_COLUMNS]
    # float32 holds these whole numbers exactly: they are below 2**24.
    lengths, other_lengths = ((one**2).sum(axis=1) for one in (details, other_details))
    squares = (lengths[:, None] + other_lengths - 2 * (details @ other_details.T)) / DETAIL_BYTES
    alike = vectors[:, : DETAIL_COLUMNS.start] @ others[:, : DETAIL_COLUMNS.start].T
    return np.where(
        np.outer(lengths, other_lengths) > 0,
        1 - (1 - DUPLICATE_MIN_SIMILARITY) / DUPLICATE_DETAIL_RMS**2 * squares,
        alike,
    )


def get_model_vectors(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """Vectors (rows, width) of unit length; that of a picture that has none of this model's is zeros."""
    vectors, name = np.zeros((len(rows), model.width), np.float32), vector_column(model.width)
    if name in rows.column_names:
        own = pc.and_(rows[name].is_valid(), pc.equal(rows["model"], model.image_digest))
        vectors[own.to_numpy()] = l2_normalize(to_array(rows[name].filter(own)))
    return vectors


def get_comparison_vectors(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """`compared` of rows."""
    looks = (
        rows[COLOR_SIGNATURE_COLUMN].to_pylist() if COLOR_SIGNATURE_COLUMN in rows.column_names else [None] * len(rows)
    )
    return add_color_signatures(get_model_vectors(model, rows), looks)


def newest_first_order(rows: pa.Table) -> pa.Array:
    """The order of rows by when a picture was taken, else its file's time, latest first; of equal ones by path."""
    here = time.localtime().tm_gmtoff * 10**9  # cameras tell the time of the place
    modified = ((rows["mtime_ns"].to_numpy() + here) // 1000).astype("datetime64[us]")
    dated = pa.table({"path": rows["path"], "date": pc.coalesce(rows["taken"], pa.array(modified))})
    return pc.sort_indices(dated, [("date", "descending"), ("path", "ascending")])


class CachedRows:
    """All rows of an index, or of a part of it, in memory, by path: of `compared_columns`."""

    def __init__(self, model: "SearchModel", rows: pa.Table):
        self.rows, self._model = rows.sort_by("path"), model
        self._vectors = get_model_vectors(model, self.rows)
        self._without_vector = ~self._vectors.any(axis=1)  # which the model does not know

    @cached_property
    def comparison_vectors(self) -> np.ndarray:
        """`compared_rows` of all."""
        return get_comparison_vectors(self._model, self.rows)

    def nearest(self, vector: np.ndarray, k: int) -> pa.Table:
        """`PictureTable.nearest`, among these rows."""
        scores = np.clip(self._vectors @ vector, -1, 1)
        order = np.argsort(np.where(self._without_vector, np.inf, -scores), kind="stable")
        order = order[: min(k, len(order) - self._without_vector.sum())]
        return self.rows.take(order).append_column("score", pa.array(scores[order], pa.float64()))

    def newest(self, k: int) -> pa.Table:
        """The k rows of the latest date, latest first."""
        return self.rows.take(newest_first_order(self.rows)[:k])


def is_duplicate(vectors: np.ndarray, others: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY) -> np.ndarray:
    """Whether each of (rows, width) is nearly the same as each of (others, width): (rows, others)."""
    return pairwise_similarity(vectors, others) >= threshold - FLOAT16_TOLERANCE


def leaders(
    vectors: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY, max_groups: int | None = None
) -> np.ndarray:
    """(rows,): of each vector, the row of the first one that it is nearly the same as and that leads, or its own.

    Vectors (rows, width) are as `compared` makes them. Where `most` lead, it ends, and later ones may keep their own.
    """
    rows = np.arange(len(vectors))
    first = rows.copy()
    for start in range(0, len(vectors), BLOCK_ROWS):
        own = start + np.flatnonzero(first[start : start + BLOCK_ROWS] == rows[start : start + BLOCK_ROWS])
        block = vectors[own].astype(np.float32)
        for row, near in zip(own, is_duplicate(block, block, threshold), strict=True):
            if first[row] == row:
                first[own[near & (own > row) & (first[own] == own)]] = row
        block, own = block[first[own] == own], own[first[own] == own]
        if max_groups and np.sum(first[: start + BLOCK_ROWS] == rows[: start + BLOCK_ROWS]) >= max_groups:
            break
        for place in range(start + BLOCK_ROWS, len(vectors) if len(own) else 0, LATER_BLOCK_ROWS):
            others = place + np.flatnonzero(
                first[place : place + LATER_BLOCK_ROWS] == rows[place : place + LATER_BLOCK_ROWS]
            )
            near = is_duplicate(block, vectors[others], threshold)
            first[others] = np.where(near.any(axis=0), own[near.argmax(axis=0)], others)
    return first


def find_duplicate_groups(
    vectors: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY, max_groups: int | None = None
) -> list[np.ndarray]:
    """Row numbers of each group, rising, those of one row among them; by their first rows. Arguments: of `leaders`."""
    first = leaders(vectors, threshold, max_groups)
    order = np.argsort(first, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(first[order])) + 1)[:max_groups] if len(order) else []
