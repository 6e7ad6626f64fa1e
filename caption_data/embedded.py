"""Define and check the columns of datasets that hold image embeddings instead of images.

`captions.embed` writes such datasets. Instead of an image, a row has these columns:

- `image_embeds`: float16 embedding of unit length and shape (width,). If the dataset has several augmented copies
  (views) of each image, the shape is (views, width).
- `image_digest`: BLAKE2b-128 hex digest of the image file.
- `image_encoder`: digest of the image encoder that computed the embedding, the same in all rows.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from capivara_common.embedding_store import vectors_to_array
from capivara_common.hub_cache import find_download_or_convert_model_folder
from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_common.image_files import BadRow

# Every row has the digest of the image encoder, so that it is not lost when datasets are concatenated, filtered, or
# uploaded to the Hub and downloaded.
EMBEDS_COLUMN, DIGEST_COLUMN, ENCODER_COLUMN = "image_embeds", "image_digest", "image_encoder"
EMBEDS_DTYPE = "float16"
MAX_NORM_ERROR = 0.01  # largest accepted difference between a norm and 1; float16 changes a norm by less than 0.001
INVALID_EMBEDDING = "invalid embedding"  # `SkippedRow.reason` of a row whose embedding can't be used


def embeds_feature(width: int, views: int = 1) -> List:
    """Return the type of the column `image_embeds`, which holds the embeddings of a dataset.

    Args:
        width: Width of an embedding.
        views: Number of embeddings per row, one per augmented copy (view) of the image. 1: the image itself.

    Returns:
        Feature (column type of `datasets`) for lists of shape (width,) or, for several views, (views, width).
    """
    vector = List(Value(EMBEDS_DTYPE), length=width)
    return vector if views == 1 else List(vector, length=views)


def check_embeds_columns_and_get_shape(features: Features, name: str) -> tuple[int, int]:
    """Check the columns of a dataset that has embeddings instead of images, and return the shape of the embeddings.

    Args:
        features: Types of the columns of the dataset.
        name: Name of the dataset for error messages.

    Returns:
        The tuple (views, width): number of embeddings per row, and width of an embedding. `views` is more than 1 if the
        dataset holds several augmented copies (views) of each image.

    Raises:
        ValueError: If `image_digest` or `image_encoder` is missing, or `image_embeds` is not float16 of a fixed shape.
    """
    for column in (DIGEST_COLUMN, ENCODER_COLUMN):
        if features.get(column) != Value("string"):
            raise ValueError(
                f"{name} has {EMBEDS_COLUMN!r} but no column {column!r} of strings; its columns are {list(features)}. "
                "Make the dataset again with captions.embed, which writes all three columns."
            )
    outer = features[EMBEDS_COLUMN]
    inner = getattr(outer, "feature", None)
    views, vector = (outer.length, inner) if isinstance(inner, List) else (1, outer)
    width = getattr(vector, "length", -1)
    if min(views, width) < 1 or outer != embeds_feature(width, views):
        raise ValueError(
            f"{name}: the column {EMBEDS_COLUMN!r} must hold {EMBEDS_DTYPE} lists of a fixed length, got {outer}. Make "
            "the dataset again with captions.embed."
        )
    return views, width


def resolve_image_encoder_digest(model: str, fingerprint: str) -> str:
    """Return the digest that identifies the image encoder of a model.

    A model can use the stored embeddings of a dataset if the digest is equal to the dataset's column `image_encoder`.
    The model is downloaded and converted if necessary.

    Args:
        model: Folder or Hub id of a model, or "open_clip:…" for a model of open_clip.
        fingerprint: Digest of an open_clip model (`Embedder.fingerprint`), which is returned. Ignored for other models.
    """
    from modeling_capivara.convert_open_clip import convert_to_folder

    if model.startswith("open_clip:"):
        return fingerprint
    return image_encoder_digest(find_download_or_convert_model_folder(model, convert_to_folder))


def has_unit_length(vectors: np.ndarray) -> np.ndarray:
    """Check for each row of a dataset whether its embeddings are valid, that is, have unit length.

    Args:
        vectors: Embeddings of shape (rows, views, width). A view is an augmented copy of an image.

    Returns:
        Boolean array of shape (rows,). False if any embedding of the row is not finite or not of unit length (tolerance
        `MAX_NORM_ERROR`).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(vectors.astype(np.float32), axis=-1)
        return (np.abs(norms - 1) <= MAX_NORM_ERROR).all(axis=-1)


def find_invalid_embeds(chunks: Iterable[pa.ChunkedArray], width: int) -> dict[int, str]:
    """Find the rows of a dataset whose embedding is missing, not finite or not of unit length.

    Args:
        chunks: The column `image_embeds`, in chunks of consecutive rows.
        width: Width of the embeddings.

    Returns:
        `{row index: description of the fault}` for each invalid row, counted from 0 over all chunks.
    """
    faults, start = {}, 0
    for chunk in chunks:
        is_valid = np.array(chunk.is_valid())
        if is_valid.any():
            vectors = vectors_to_array(chunk.drop_null()).reshape(int(is_valid.sum()), -1, width)
            is_valid[is_valid] = has_unit_length(vectors)
        faults |= {start + int(row): f"{EMBEDS_COLUMN} must have unit length" for row in np.flatnonzero(~is_valid)}
        start += len(chunk)
    return faults


def read_row_embedding(row: dict[str, Any]) -> np.ndarray:
    """Return the stored image embedding of a dataset row, after checking it.

    Args:
        row: Row with the columns `image_embeds` and `image_digest` (digest of the image file).

    Returns:
        float32 array of shape (width,), or (views, width) if the row has several augmented copies (views) of the image.

    Raises:
        BadRow: If the embedding is missing or not of unit length, or the digest is missing.
    """
    vector = np.array(row[EMBEDS_COLUMN] or [np.nan], np.float32)
    if not row[DIGEST_COLUMN] or not has_unit_length(vector.reshape(1, -1, vector.shape[-1])).all():
        raise BadRow(INVALID_EMBEDDING, f"{EMBEDS_COLUMN} must have unit length, and {DIGEST_COLUMN} must not be empty")
    return vector
