"""Near-duplicate detection: find pictures that are resized, re-encoded or slightly edited copies of each other.

Two pictures are compared by the model's vectors (embeddings) and by color signatures: the pictures' colors at 6 x 6
pixels (tiny images: Torralba et al., 80 Million Tiny Images, 2008). Two flat pictures, such as icons and charts, are
compared by finer details instead. Similar pictures are then grouped by sequential leader clustering (Hartigan,
Clustering Algorithms, 1975). This works for hundreds of thousands of pictures.
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
# Weight of the color signatures in the similarity. The model's vectors have the weight 1/3. Vectors alone are not
# reliable: the vector changes when a picture is reduced, and two different lawns have almost the same vector.
SIGNATURE_WEIGHT = 2 / 3
# A color signature is ignored if the standard deviation of its colors (0 to 255) is lower than this. Such a picture
# has hardly any differences in color, and scaling its signature to unit length would only amplify noise.
MIN_SIGNATURE_STD = 2.0
SIGNATURE_BYTES = 3 * SIGNATURE_SIDE * SIGNATURE_SIDE  # bytes of a color signature's pixels (3 color channels)
# A picture is flat, such as an icon, a chart or a blank page, if at least this share of its pixels has exactly the same
# color. In the test pictures of `benchmarks.duplicates`, this share is at least 0.21 for icons, and at most 0.18 for
# photographs.
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

    Args:
        image: The picture, in any mode.

    Returns:
        The RGB values (one byte each) of the picture at `SIGNATURE_SIDE` x `SIGNATURE_SIDE` pixels. For a flat picture
        (nearly one color, or many pixels of exactly the same color, as in icons), its details follow: the values of its
        Y, Cb and Cr planes, resized to the sides in `DETAIL_SIDES`.
    """
    image = image.convert("RGB")
    signature = image.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), PIL.Image.Resampling.BOX).tobytes()
    if not _is_flat_picture(np.asarray(image)):
        return signature
    # Different flat pictures often have almost the same colors at low resolution, so details are added.
    # HAMMING gives pixels on the border of a cell (the area that becomes one pixel) less weight than pixels in its
    # middle. So the details of a smaller or larger copy are almost the same. BOX weights all pixels equally.
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

    Compare the results with `compute_duplicate_similarity`: one third of the similarity comes from the model's vectors,
    two thirds from the colors. Two flat pictures, such as icons, are compared by their details in the last columns.

    Args:
        vectors: The model's vector of each picture: array (rows, width), of unit length.
        signatures: The color signature of each picture (`compute_color_signature`), or None if it has no signature.
            Without a signature, or with a uniform color, only the model's vector counts.

    Returns:
        Array (rows, width + `SIGNATURE_BYTES` + `DETAIL_BYTES`), float32. The last columns (`DETAIL_COLUMNS`) are
        integers from -127 to 128 for flat pictures, and zeros for other pictures.
    """
    # Missing bytes are filled with 127. So a missing signature becomes a uniform color. Missing details become zeros,
    # because 127 is subtracted from all details.
    size = SIGNATURE_BYTES + DETAIL_BYTES
    filled = [(signature or b"").ljust(size, b"\x7f")[:size] for signature in signatures]
    values = np.frombuffer(b"".join(filled), np.uint8).reshape(len(signatures), size)
    pixels = values[:, :SIGNATURE_BYTES].reshape(len(signatures), SIGNATURE_SIDE**2, 3).astype(np.float32)
    details = values[:, SIGNATURE_BYTES:] - np.float32(127)
    # The average of the picture's mean color and its mean brightness is subtracted. Otherwise any two crops of a red
    # picture would be similar.
    pixels -= (pixels.mean(axis=1, keepdims=True) + pixels.mean(axis=(1, 2), keepdims=True)) / 2
    pixels = pixels.reshape(len(signatures), SIGNATURE_BYTES)
    norms = np.linalg.norm(pixels, axis=1, keepdims=True)
    is_uniform = norms < MIN_SIGNATURE_STD * SIGNATURE_BYTES**0.5
    pixels *= np.where(is_uniform, 0, SIGNATURE_WEIGHT**0.5 / np.maximum(norms, 1)).astype(np.float32)
    # Without a signature, or with a uniform color, only the model's vector counts, so it is not scaled.
    vector_scale = np.where(is_uniform, 1, (1 - SIGNATURE_WEIGHT) ** 0.5).astype(np.float32)
    return np.concatenate([vectors * vector_scale, pixels, details], axis=1, dtype=np.float32)


def compute_duplicate_similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute how similar each picture of a first set is to each picture of a second set.

    The similarity is the dot product of two vectors, without the columns of the details. Two flat pictures, such as
    icons, are compared by their details only. The similarity `DUPLICATE_MIN_SIMILARITY` then stands for a root mean
    square difference of `DUPLICATE_DETAIL_RMS`.

    Args:
        vectors: First set: array (rows, columns), a result of `combine_vectors_and_colors`.
        others: Second set: array (others, columns), a result of `combine_vectors_and_colors`.

    Returns:
        Array (rows, others) of similarities, which are at most 1.
    """
    vectors, others = np.asarray(vectors, np.float32), np.asarray(others, np.float32)
    details, other_details = vectors[:, DETAIL_COLUMNS], others[:, DETAIL_COLUMNS]
    # All details are integers from -127 to 128, so all sums are integers below 2**24, which float32 represents exactly.
    # The difference of two equal pictures is therefore exactly 0.
    square_sums, other_square_sums = (details**2).sum(axis=1), (other_details**2).sum(axis=1)
    mean_squares = (square_sums[:, None] + other_square_sums - 2 * (details @ other_details.T)) / DETAIL_BYTES
    products = vectors[:, : DETAIL_COLUMNS.start] @ others[:, : DETAIL_COLUMNS.start].T
    # Two different flat pictures often share most pixels, and the model hardly distinguishes them. Therefore only a
    # small difference of their details is allowed.
    flat_similarities = 1 - (1 - DUPLICATE_MIN_SIMILARITY) / DUPLICATE_DETAIL_RMS**2 * mean_squares
    return np.where(np.outer(square_sums, other_square_sums) > 0, flat_similarities, products)


def get_comparison_vectors(model: "SearchModel", rows: pa.Table) -> np.ndarray:
    """Compute vectors for near-duplicate detection from rows of an index.

    Args:
        model: Model in use.
        rows: Rows of the table `pictures`, with the columns that `table.comparison_columns` lists. The column of color
            signatures may be missing.

    Returns:
        Array (rows, columns), one vector per row: the result of `combine_vectors_and_colors`.
    """
    signatures = [None] * len(rows)  # indexes of older versions have no column of color signatures
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

    Rows are processed in order. Each row joins the first earlier leader that it is similar to. If there is no such
    leader, the row becomes a leader itself.

    Args:
        vectors: Array (rows, columns), a result of `combine_vectors_and_colors`.
        threshold: Minimum similarity of a row to its leader (`compute_duplicate_similarity`).
        max_groups: Stop early, when at least this number of leaders is found. Later rows may then be returned as
            leaders, although they are near-duplicates of earlier rows. None: process all rows.

    Returns:
        Array (rows,) with the row index of each row's leader. A leader has its own row index.
    """
    # Groups are not connected components, because a chain of small differences could then put pictures of different
    # scenes into one group.
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
