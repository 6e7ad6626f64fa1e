"""Near-duplicate detection: find pictures that are resized, re-encoded or slightly edited copies of each other.

The module works for hundreds of thousands of pictures.

The model's vectors (embeddings) alone don't show reliably whether one picture is a copy of another. The vector of a
picture changes when the picture is reduced, whereas photographs of two different lawns have almost the same vector.
Therefore color signatures are compared as well. A color signature contains the colors of the picture at 6 x 6 pixels.
This is a tiny-image descriptor (Torralba et al., 80 Million Tiny Images, 2008).

Groups are formed by sequential leader clustering (Hartigan, Clustering Algorithms, 1975). The first picture of a group
is its leader, and every other picture of the group is similar to the leader. With connected components instead, a chain
of small differences could put pictures of different scenes into one group.

Flat pictures are pictures such as icons, charts and blank pages, in which many pixels have exactly the same color. Two
different flat pictures often share most pixels, and the model hardly distinguishes such pictures. Two flat pictures are
therefore compared by their details only, and a much smaller difference is allowed. The details of a picture are its
planes in the color space YCbCr: the brightness at 18 x 18 pixels, and the two color planes at 6 x 6 pixels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pyarrow as pa

from capivara_search.results import DUPLICATE_MIN_SIMILARITY
from capivara_search.table import COLOR_SIGNATURE_COLUMN, extract_unit_vectors_of_model_or_zeros

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

BLOCK_ROWS = 512  # number of vectors per block; all pairs in a block are compared in one matrix product
# Each block is also compared with all later vectors. To limit the memory, one matrix product covers this many of them.
LATER_BLOCK_ROWS = 2048
# Similarity thresholds are lowered by this value. Vectors are stored in float16, and without this tolerance, the
# rounding would move some pairs of pictures from just above a threshold to just below it.
FLOAT16_TOLERANCE = 1e-3
# A color signature is a picture shrunk to this many pixels per side. The value was chosen by the experiment in
# docs/reference/benchmarks.md, together with `DUPLICATE_MIN_SIMILARITY`.
SIGNATURE_SIDE = 6
SIGNATURE_WEIGHT = 2 / 3  # weight of the color signatures in the similarity; the model's vectors have the weight 1/3
# A color signature is ignored if the standard deviation of its colors (0 to 255) is lower than this. Such a picture
# has hardly any differences in color, and scaling its signature to unit length would only amplify noise.
MIN_SIGNATURE_STD = 2.0
SIGNATURE_BYTES = 3 * SIGNATURE_SIDE * SIGNATURE_SIDE  # bytes of a color signature's pixels (3 color channels)
# A picture is flat (see the module docstring) if at least this share of its pixels has exactly the same color. In the
# test pictures of `benchmarks.duplicates`, this share is at least 0.21 for icons, and at most 0.18 for photographs.
MIN_FLAT_PIXEL_SHARE = 0.2
# A picture is also flat if the standard deviation of its pixels (0 to 255) is lower than this in each color channel.
MAX_CONSTANT_STD = 4.0
# The details of a flat picture are its brightness plane (Y) and its two color planes (Cb and Cr), each resized to a
# square. These are the sides of the squares in pixels.
DETAIL_SIDES = (18, 6, 6)
DETAIL_BYTES = sum(side * side for side in DETAIL_SIDES)  # one byte per pixel
# Two flat pictures are near-duplicates if the root mean square difference of their details (values from 0 to 255) is at
# most this. `compute_duplicate_similarity` converts this difference to the similarity `DUPLICATE_MIN_SIMILARITY`, so
# that flat pictures and other pictures have the same threshold.
DUPLICATE_DETAIL_RMS = 1.2
DETAIL_COLUMNS = slice(-DETAIL_BYTES, None)  # columns of the details in the result of `combine_vectors_and_colors`


def compute_color_signature(image: PIL.Image.Image) -> bytes:
    """Compute the color signature of a picture: a small fingerprint of its colors for finding near-duplicates.

    Flat pictures are pictures such as icons and charts, in which many pixels have exactly the same color. Two different
    flat pictures often have almost the same colors at low resolution. The signature of a flat picture therefore also
    contains its details, in which the brightness has a higher resolution.

    Args:
        image: The picture, in any mode.

    Returns:
        The RGB values (one byte each) of the picture at `SIGNATURE_SIDE` x `SIGNATURE_SIDE` pixels. For a flat picture,
        its details follow: the values of its Y, Cb and Cr planes, resized to the sides in `DETAIL_SIDES`.
    """
    image = image.convert("RGB")
    signature = image.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), PIL.Image.Resampling.BOX).tobytes()
    if not _is_flat_picture(np.asarray(image)):
        return signature
    # A cell is the area of the picture that becomes one pixel of the details. In a smaller or larger copy of the
    # picture, other pixels lie on the borders of the cells. HAMMING gives pixels on the border of a cell less weight
    # than pixels in its middle, so the details hardly change. BOX weights all pixels of a cell equally.
    for plane, side in zip(image.convert("YCbCr").split(), DETAIL_SIDES, strict=True):
        signature += plane.resize((side, side), PIL.Image.Resampling.HAMMING).tobytes()
    return signature


def _is_flat_picture(pixels: np.ndarray) -> bool:
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


def combine_vectors_and_colors(vectors: np.ndarray, signatures: Sequence[bytes | None]) -> np.ndarray:
    """Combine the model's vectors and the color signatures of pictures into vectors for near-duplicate detection.

    The model's vectors alone do not show reliably whether one picture is a copy of another. A combined vector has three
    sections:

    - The model's vector, scaled.
    - The color signature, scaled: a copy of the picture that is shrunk to a few pixels. First, the average of the
      picture's mean color and its mean brightness is subtracted. Otherwise any two crops of a red picture would be
      similar.
    - The details: a copy of the picture whose brightness has a higher resolution, only for flat pictures such as icons,
      in which many pixels have exactly the same color.

    The dot product of the first two sections of two pictures is one third of the cosine of the model's vectors plus two
    thirds of the cosine of the color signatures. If a picture has no signature, or a uniform color, its first section
    is the model's vector without scaling, and its second section is zeros.

    Args:
        vectors: The model's vector of each picture: array (rows, width), of unit length.
        signatures: The color signature of each picture (`compute_color_signature`), or None if the picture has no
            signature.

    Returns:
        Array (rows, width + `SIGNATURE_BYTES` + `DETAIL_BYTES`), float32. The last columns (`DETAIL_COLUMNS`) contain
        the details of flat pictures as values from -127 to 128. They are zeros for other pictures.
    """
    # Missing bytes are filled with 127. So a missing signature becomes a uniform color. Missing details become zeros,
    # because 127 is subtracted from all details.
    size = SIGNATURE_BYTES + DETAIL_BYTES
    filled = [(signature or b"").ljust(size, b"\x7f")[:size] for signature in signatures]
    values = np.frombuffer(b"".join(filled), np.uint8).reshape(len(signatures), size)
    pixels = values[:, :SIGNATURE_BYTES].reshape(len(signatures), SIGNATURE_SIDE**2, 3).astype(np.float32)
    details = values[:, SIGNATURE_BYTES:] - np.float32(127)
    pixels -= (pixels.mean(axis=1, keepdims=True) + pixels.mean(axis=(1, 2), keepdims=True)) / 2
    pixels = pixels.reshape(len(signatures), SIGNATURE_BYTES)
    norms = np.linalg.norm(pixels, axis=1, keepdims=True)
    is_uniform = norms < MIN_SIGNATURE_STD * SIGNATURE_BYTES**0.5
    pixels *= np.where(is_uniform, 0, SIGNATURE_WEIGHT**0.5 / np.maximum(norms, 1)).astype(np.float32)
    vector_scale = np.where(is_uniform, 1, (1 - SIGNATURE_WEIGHT) ** 0.5).astype(np.float32)
    return np.concatenate([vectors * vector_scale, pixels, details], axis=1, dtype=np.float32)


def compute_duplicate_similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute how similar each picture of a first set is to each picture of a second set.

    The similarity of most pairs is the dot product of their vectors, without the columns of the details. The details
    are a copy of the picture whose brightness has a higher resolution (`compute_color_signature`). Only flat pictures
    have details: pictures such as icons, in which many pixels have exactly the same color.

    Two flat pictures are compared by their details only. Their similarity is 1 minus the scaled mean squared difference
    of the details. The scale is chosen so that a root mean square difference of `DUPLICATE_DETAIL_RMS` gives the
    similarity `DUPLICATE_MIN_SIMILARITY`.

    Args:
        vectors: First set: array (rows, columns), a result of `combine_vectors_and_colors`.
        others: Second set: array (others, columns), a result of `combine_vectors_and_colors`.

    Returns:
        Array (rows, others) of similarities, which are at most 1. The value in row i and column j compares `vectors[i]`
        and `others[j]`.
    """
    vectors, others = np.asarray(vectors, np.float32), np.asarray(others, np.float32)
    details, other_details = vectors[:, DETAIL_COLUMNS], others[:, DETAIL_COLUMNS]
    # All details are integers from -127 to 128, so all sums are integers below 2**24, which float32 represents exactly.
    # The difference of two equal pictures is therefore exactly 0.
    square_sums, other_square_sums = (details**2).sum(axis=1), (other_details**2).sum(axis=1)
    mean_squares = (square_sums[:, None] + other_square_sums - 2 * (details @ other_details.T)) / DETAIL_BYTES
    products = vectors[:, : DETAIL_COLUMNS.start] @ others[:, : DETAIL_COLUMNS.start].T
    flat_similarities = 1 - (1 - DUPLICATE_MIN_SIMILARITY) / DUPLICATE_DETAIL_RMS**2 * mean_squares
    return np.where(np.outer(square_sums, other_square_sums) > 0, flat_similarities, products)


def get_comparison_vectors(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """Compute vectors for near-duplicate detection from rows of an index.

    Each vector combines the model's vector (embedding) of a picture with the picture's color signature.

    Args:
        model: Model in use.
        rows: Rows of the table `pictures`, with the columns that `table.comparison_columns` lists. The column of color
            signatures may be missing, as in indexes of older versions.

    Returns:
        Array (rows, columns), one vector per row: the result of `combine_vectors_and_colors`.
    """
    signatures = [None] * len(rows)
    if COLOR_SIGNATURE_COLUMN in rows.column_names:
        signatures = rows[COLOR_SIGNATURE_COLUMN].to_pylist()
    return combine_vectors_and_colors(extract_unit_vectors_of_model_or_zeros(model, rows), signatures)


def is_duplicate(vectors: np.ndarray, others: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY) -> np.ndarray:
    """Compare each picture of a first set with each picture of a second set, and mark the pairs of near-duplicates.

    Args:
        vectors: First set: array (rows, columns), a result of `combine_vectors_and_colors`.
        others: Second set: array (others, columns), a result of `combine_vectors_and_colors`.
        threshold: Minimum similarity of near-duplicates, at most 1 (`compute_duplicate_similarity`).

    Returns:
        Boolean array (rows, others): True where `vectors[i]` and `others[j]` are near-duplicates.
    """
    return compute_duplicate_similarity(vectors, others) >= threshold - FLOAT16_TOLERANCE


def assign_near_duplicate_leaders(vectors: np.ndarray, threshold: float, max_groups: int | None = None) -> np.ndarray:
    """Group near-duplicates by assigning each picture to the leader of its group (sequential leader clustering).

    The leader is the first picture of a group. Each row of the array is a picture, and rows are processed in order. If
    a row is similar to at least one earlier leader, it joins the group of the first such leader. Otherwise it becomes
    the leader of a new group.

    Args:
        vectors: Array (rows, columns), a result of `combine_vectors_and_colors`.
        threshold: Minimum similarity of a row to its leader (`compute_duplicate_similarity`).
        max_groups: Stop early, after the block of rows in which this number of leaders is reached. Later rows may then
            be returned as leaders, although they are near-duplicates of earlier rows. None: process all rows.

    Returns:
        Array (rows,) with the row index of each row's leader. The entry of a leader is the leader's own row index.
    """
    rows = np.arange(len(vectors))
    leader_of = rows.copy()
    for start in range(0, len(vectors), BLOCK_ROWS):
        end = start + BLOCK_ROWS
        # Rows of this block that already belong to a leader of an earlier block are left out.
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


def cluster_near_duplicates(
    vectors: np.ndarray, threshold: float = DUPLICATE_MIN_SIMILARITY, max_groups: int | None = None
) -> list[np.ndarray]:
    """Divide pictures into groups of near-duplicates. A picture without near-duplicates is a group by itself.

    Args:
        vectors: Array (rows, columns), a result of `combine_vectors_and_colors`.
        threshold: Minimum similarity of a row to the leader of its group, which is the first row of the group.
        max_groups: Maximum number of groups. Only the first groups are returned. None: all groups.

    Returns:
        For each group, an array of its row indices in ascending order. Groups are sorted by their first row index.
    """
    leader_of = assign_near_duplicate_leaders(vectors, threshold, max_groups)
    order = np.argsort(leader_of, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(leader_of[order])) + 1)[:max_groups] if len(order) else []
