"""Near-duplicate detection: find pictures that are resized, re-encoded or slightly edited copies of each other.

It works for hundreds of thousands of pictures.

The model's vectors alone don't show reliably whether one picture is a copy of another. The vector of a picture changes
when the picture is reduced, whereas photographs of two different lawns have almost the same vector. Therefore color
signatures are compared as well. A color signature contains the colors of the picture at 6 x 6 pixels; this is a
tiny-image descriptor (Torralba et al., 80 Million Tiny Images, 2008).

Groups are formed by sequential leader clustering (Hartigan, Clustering Algorithms, 1975). The first picture of a group
is its leader, and every other picture of the group is similar to the leader. With connected components instead, a chain
of small differences could put pictures of different scenes into one group.

Flat pictures are pictures such as icons, charts and blank pages, in which many pixels have exactly the same color. Two
different flat pictures often share most pixels, and the model hardly distinguishes such pictures. Two flat pictures are
therefore compared by their details only (a larger version of the picture in YCbCr), with a much stricter limit.
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

BLOCK_ROWS = 512  # number of vectors that are compared with each other in one step
LATER_BLOCK_ROWS = 2048  # number of later vectors that a block is compared with in one step
FLOAT16_TOLERANCE = 1e-3  # thresholds are lowered by this value, because vectors are rounded to float16 when stored
SIGNATURE_SIDE = (
    6  # side of a color signature in pixels; chosen like `DUPLICATE_MIN_SIMILARITY` (docs/reference/benchmarks.md)
)
SIGNATURE_WEIGHT = 2 / 3  # weight of the color signatures in the similarity; the model's vectors have the weight 1/3
MIN_SIGNATURE_STD = 2.0  # a color signature is ignored if the standard deviation of its colors (0 to 255) is lower
SIGNATURE_BYTES = 3 * SIGNATURE_SIDE * SIGNATURE_SIDE  # size of a color signature without details
# A picture is flat (see the module docstring) if at least this share of its pixels has exactly the same color. In the
# pictures of `benchmarks.duplicates`, this share is 0.21 and more for icons, and at most 0.18 for photographs.
MIN_FLAT_PIXEL_SHARE = 0.2
# A picture is also flat if the standard deviation of its pixels (0 to 255) is lower than this in each color channel.
MAX_CONSTANT_STD = 4.0
# The details of a flat picture are its luma plane and its two chroma planes (YCbCr), resized to these sides in pixels.
DETAIL_SIDES = (18, 6, 6)
DETAIL_BYTES = sum(side * side for side in DETAIL_SIDES)  # size of the details of a flat picture
# If the root mean square difference of the details of two flat pictures (values from 0 to 255) is this large, the
# similarity of the pictures is exactly `DUPLICATE_MIN_SIMILARITY`.
DUPLICATE_DETAIL_RMS = 1.2
DETAIL_COLUMNS = slice(-DETAIL_BYTES, None)  # columns of the details in the result of `add_color_signatures`


def color_signature(image: PIL.Image.Image) -> bytes:
    """Compute the color signature of a picture, which is compared to find near-duplicates.

    Args:
        image: The picture, in any mode.

    Returns:
        The RGB values (one byte each) of the picture at `SIGNATURE_SIDE` x `SIGNATURE_SIDE` pixels. For a flat picture,
        its details follow: the values of its Y, Cb and Cr planes, resized to the sides in `DETAIL_SIDES`.
    """
    image = image.convert("RGB")
    colors = image.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), PIL.Image.Resampling.BOX).tobytes()
    if not is_flat(np.asarray(image)):
        return colors
    planes = zip(image.convert("YCbCr").split(), DETAIL_SIDES, strict=True)
    # A cell is the area of the picture that becomes one pixel of the details. In a smaller or larger copy of the
    # picture, other pixels lie on the borders of the cells. HAMMING gives pixels on the border of a cell less weight
    # than pixels in its middle, so the details hardly change. BOX weights all pixels of a cell equally.
    return colors + b"".join(
        plane.resize((side, side), PIL.Image.Resampling.HAMMING).tobytes() for plane, side in planes
    )


def is_flat(pixels: np.ndarray) -> bool:
    """Return whether a picture is flat: nearly one color, or with many pixels of exactly the same color.

    Args:
        pixels: RGB array (height, width, 3) with values from 0 to 255.

    Returns:
        True if the standard deviation of each color channel is below `MAX_CONSTANT_STD`, or if the share of the pixels
        that have the most frequent color is at least `MIN_FLAT_PIXEL_SHARE`.
    """
    if pixels.std(axis=(0, 1)).max() < MAX_CONSTANT_STD:
        return True
    red, green, blue = pixels.reshape(-1, 3).astype(np.int32).T
    counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)[1]
    return counts.max() >= MIN_FLAT_PIXEL_SHARE * counts.sum()


def add_color_signatures(vectors: np.ndarray, signatures: Sequence[bytes | None]) -> np.ndarray:
    """Combine the model's vectors and the color signatures of pictures into vectors for near-duplicate detection.

    `pairwise_similarity` compares the result. The dot product of two combined vectors (without details) is one third of
    the cosine of the model's vectors plus two thirds of the cosine of the color signatures. To make the signature
    depend less on the main color, half of the picture's mean color and half of its mean brightness are subtracted from
    the signature first. Otherwise any two crops of a red picture would be similar. If a picture has no signature, or a
    uniform color, its combined vector contains only the model's vector.

    Args:
        vectors: The model's vector of each picture: array (rows, width), of unit length.
        signatures: The color signature of each picture (`color_signature`), or None if the picture has no signature.

    Returns:
        Array (rows, width + `SIGNATURE_BYTES` + `DETAIL_BYTES`), float32. The last columns (`DETAIL_COLUMNS`) contain
        the details of flat pictures and are zeros for other pictures.
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
    """Extract the details of flat pictures from color signatures.

    Args:
        signatures: The color signature of each picture, or None if the picture has no signature.

    Returns:
        Array (rows, `DETAIL_BYTES`), float32. The row of a flat picture has values from -127 to 128. The row of any
        other picture is all zeros.
    """
    details = np.zeros((len(signatures), DETAIL_BYTES), np.float32)
    for row, signature in enumerate(signatures):
        if signature and len(signature) == SIGNATURE_BYTES + DETAIL_BYTES:
            details[row] = np.frombuffer(signature, np.uint8, offset=SIGNATURE_BYTES) - np.float32(127)
    return details


def pairwise_similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the similarity of each picture in a first set to each picture in a second set.

    The similarity of two flat pictures is 1 minus the scaled mean squared difference of their details. The scale is
    chosen so that a root mean square difference of `DUPLICATE_DETAIL_RMS` gives the similarity
    `DUPLICATE_MIN_SIMILARITY`. The similarity of all other pairs is the dot product of their vectors without details.

    Args:
        vectors: First set: array (rows, columns), a result of `add_color_signatures`.
        others: Second set: array (others, columns), a result of `add_color_signatures`.

    Returns:
        Array (rows, others) of similarities, which are at most 1. Row i and column j compare `vectors[i]` and
        `others[j]`.
    """
    vectors, others = np.asarray(vectors, np.float32), np.asarray(others, np.float32)
    details, other_details = vectors[:, DETAIL_COLUMNS], others[:, DETAIL_COLUMNS]
    # All sums are integers below 2**24, so they are exact in float32.
    square_sums, other_square_sums = (details**2).sum(axis=1), (other_details**2).sum(axis=1)
    mean_squares = (square_sums[:, None] + other_square_sums - 2 * (details @ other_details.T)) / DETAIL_BYTES
    products = vectors[:, : DETAIL_COLUMNS.start] @ others[:, : DETAIL_COLUMNS.start].T
    flat_similarities = 1 - (1 - DUPLICATE_MIN_SIMILARITY) / DUPLICATE_DETAIL_RMS**2 * mean_squares
    return np.where(np.outer(square_sums, other_square_sums) > 0, flat_similarities, products)


def get_model_vectors(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """Return the model's vectors of rows of the table `pictures`.

    Args:
        model: Model in use.
        rows: Rows with the columns that `table.comparison_columns` lists.

    Returns:
        Array (rows, width), float32, of unit length. A row that was embedded with another model has zeros.
    """
    vectors, name = np.zeros((len(rows), model.width), np.float32), vector_column(model.width)
    if name in rows.column_names:
        has_vector = pc.and_(rows[name].is_valid(), pc.equal(rows["model"], model.image_digest))
        vectors[has_vector.to_numpy()] = l2_normalize(to_array(rows[name].filter(has_vector)))
    return vectors


def get_comparison_vectors(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """Return the vectors of rows for near-duplicate detection, made of the model's vectors and color signatures.

    Args:
        model: Model in use.
        rows: Rows with the columns that `table.comparison_columns` lists. The column of color signatures is optional.

    Returns:
        Array (rows, columns), the result of `add_color_signatures`.
    """
    signatures = [None] * len(rows)
    if COLOR_SIGNATURE_COLUMN in rows.column_names:
        signatures = rows[COLOR_SIGNATURE_COLUMN].to_pylist()
    return add_color_signatures(get_model_vectors(model, rows), signatures)


def newest_first_order(rows: pa.Table) -> pa.Array:
    """Return the order of rows by date, latest first. Rows with the same date are sorted by path.

    The date of a row is its EXIF date if it has one, otherwise the modification time of the file.

    Args:
        rows: Rows with the columns path, taken and mtime_ns.

    Returns:
        Indices of the rows in this order, for `rows.take`.
    """
    # Cameras record local time, so the modification times of files (UTC) are converted to local time.
    offset_ns = time.localtime().tm_gmtoff * 10**9
    modified = ((rows["mtime_ns"].to_numpy() + offset_ns) // 1000).astype("datetime64[us]")
    dated = pa.table({"path": rows["path"], "date": pc.coalesce(rows["taken"], pa.array(modified))})
    return pc.sort_indices(dated, [("date", "descending"), ("path", "ascending")])


class CachedRows:
    """Rows of the table `pictures` that are kept in memory, for exact search and near-duplicate detection.

    Args:
        model: Model in use.
        rows: All rows of an index, or the rows that match the filters of a search, with the columns that
            `table.comparison_columns` lists.

    Attributes:
        rows: The rows, sorted by path.
    """

    def __init__(self, model: "SearchModel", rows: pa.Table):
        self.rows, self._model = rows.sort_by("path"), model
        self._vectors = get_model_vectors(model, self.rows)
        self._without_vector = ~self._vectors.any(axis=1)  # True for rows that were embedded with other models

    @cached_property
    def comparison_vectors(self) -> np.ndarray:
        """Vectors (rows, columns) of the rows for near-duplicate detection, the result of `get_comparison_vectors`."""
        return get_comparison_vectors(self._model, self.rows)

    def nearest(self, vector: np.ndarray, k: int) -> pa.Table:
        """Return the rows whose vectors are nearest to a query vector. All vectors are compared.

        Args:
            vector: Query vector (width,), of unit length.
            k: Maximum number of rows.

        Returns:
            Rows with an additional column `score`, the cosine of the row's vector with the query vector. Rows are
            sorted by score, best first, then by path.
        """
        scores = np.clip(self._vectors @ vector, -1, 1)
        order = np.argsort(np.where(self._without_vector, np.inf, -scores), kind="stable")
        order = order[: min(k, len(order) - self._without_vector.sum())]
        return self.rows.take(order).append_column("score", pa.array(scores[order], pa.float64()))

    def newest(self, k: int) -> pa.Table:
        """Return the rows with the latest dates, latest first (`newest_first_order`).

        Args:
            k: Maximum number of rows.

        Returns:
            At most k rows.
        """
        return self.rows.take(newest_first_order(self.rows)[:k])


def is_duplicate(vectors: np.ndarray, others: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY) -> np.ndarray:
    """Compare each picture in a first set with each picture in a second set, and return which are near-duplicates.

    Args:
        vectors: First set: array (rows, columns), a result of `add_color_signatures`.
        others: Second set: array (others, columns), a result of `add_color_signatures`.
        threshold: Minimum similarity of near-duplicates (`pairwise_similarity`).

    Returns:
        Boolean array (rows, others): True where `vectors[i]` and `others[j]` are near-duplicates.
    """
    return pairwise_similarity(vectors, others) >= threshold - FLOAT16_TOLERANCE


def leaders(
    vectors: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY, max_groups: int | None = None
) -> np.ndarray:
    """Assign each row to the leader of its group of near-duplicates (sequential leader clustering).

    Rows are processed in order. If a row is similar to an earlier leader, it joins the group of the first such leader.
    Otherwise it becomes a leader itself.

    Args:
        vectors: Array (rows, columns), a result of `add_color_signatures`.
        threshold: Minimum similarity of a row to its leader (`pairwise_similarity`).
        max_groups: Stop as soon as this number of leaders is known. A row that was not processed then possibly counts
            as a leader, although it is a near-duplicate of an earlier row. None: process all rows.

    Returns:
        Array (rows,) with the row number of each row's leader. The entry of a leader is the leader's own row number.
    """
    rows = np.arange(len(vectors))
    leader_of = rows.copy()
    for start in range(0, len(vectors), BLOCK_ROWS):
        end = start + BLOCK_ROWS
        # Rows of this block that are not similar to the leaders of earlier blocks.
        block_rows = start + np.flatnonzero(leader_of[start:end] == rows[start:end])
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
    """Divide pictures into groups of near-duplicates. A picture without near-duplicates is a group by itself.

    Args:
        vectors: Array (rows, columns), a result of `add_color_signatures`.
        threshold: Minimum similarity of a row to the leader of its group, which is the first row of the group.
        max_groups: Maximum number of groups. Only the first groups are returned. None: all groups.

    Returns:
        For each group, an array of its row numbers in ascending order. Groups are sorted by their first row number.
    """
    leader_of = leaders(vectors, threshold, max_groups)
    order = np.argsort(leader_of, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(leader_of[order])) + 1)[:max_groups] if len(order) else []
