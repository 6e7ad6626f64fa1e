"""The columns of an index, how rows are made of them, and the clauses that choose rows.

One table `pictures`, and two small ones beside it: `left_out`, the files that could not be read and why, and `about`,
what is known of the whole.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from capivara_search.results import Hit

LAYOUT = 1  # of the tables; a later one that this version can't read has a larger number
LAYOUT_KEY = b"capivara.layout"
PICTURES, LEFT_OUT, ABOUT = "pictures", "left_out", "about"
KEYS = {LEFT_OUT: "path", ABOUT: "key", PICTURES: "path"}  # an index is there when its pictures are, the last of them
FOLDER_KEY = "folder:"  # in `about`, before the path of a folder that was added; JSON of what rules left out of it
RULES_KEY = "rules"  # JSON of what is left out of all folders
MODEL_KEY = "model:"  # before the image_digest of a model whose name is the value
THUMBNAIL = "thumbnail"
LOOK = "look"  # which an index of before the column has not
VECTOR = "vector"  # in rows that are no part of a table: that of the model in use
HIT_COLUMNS = ("path", "width", "height", "taken", "latitude", "longitude", "size", "mtime_ns")

EARLIEST, LATEST = date(1800, 1, 1), date(2200, 1, 1)  # days that a file's time in nanoseconds can be compared with
# Two who insert the same key at the same time are told apart by it.
KEY = {b"lance-schema:unenforced-primary-key:position": b"1"}


def schema(width: int) -> pa.Schema:
    """The columns of `pictures`, with vectors of `width` numbers."""
    return pa.schema(
        [
            pa.field("path", pa.string(), False, KEY),  # absolute
            pa.field("size", pa.int64(), False),  # bytes
            pa.field("mtime_ns", pa.int64(), False),
            pa.field("digest", pa.string(), False),  # BLAKE2b-128 of the file, in hexadecimal
            pa.field("width", pa.int32(), False),  # pixels, upright
            pa.field("height", pa.int32(), False),
            pa.field("taken", pa.timestamp("us")),  # the camera's local time
            pa.field("latitude", pa.float64()),  # degrees
            pa.field("longitude", pa.float64()),
            pa.field(THUMBNAIL, pa.binary()),  # WebP
            pa.field(LOOK, pa.binary()),  # `duplicates.look_of`
            pa.field("model", pa.string(), False),  # SearchModel.image_digest
            pa.field(vector_column(width), pa.list_(pa.float16(), width)),  # unit length
        ],
        metadata={LAYOUT_KEY: str(LAYOUT).encode()},
    )


def vector_column(width: int) -> str:
    """The column of vectors of one width: a model of another width adds its own."""
    return f"vector_{width}"


EMPTY = {
    PICTURES: schema(1),
    LEFT_OUT: pa.schema([*(schema(1).field(name) for name in ("path", "size", "mtime_ns")),
                         pa.field("reason", pa.string(), False)]),
    ABOUT: pa.schema([pa.field("key", pa.string(), False, KEY), pa.field("value", pa.string(), False)]),
}  # fmt: skip


def to_arrow(rows: Sequence[Mapping[str, Any]], columns: pa.Schema) -> pa.Table:
    """Rows as a table; `vector` of each, (width,), goes where vectors of its width are."""
    arrays = []
    for one in columns:
        if one.name == vector_column(len(rows[0][VECTOR])):
            flat = np.concatenate([np.asarray(row[VECTOR], np.float16) for row in rows])
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), one.type.list_size))
        else:  # vectors of another width are of another model, and no longer true
            arrays.append(pa.array([row.get(one.name) for row in rows], one.type))
    return pa.Table.from_arrays(arrays, schema=columns)


def as_array(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors, without empty ones, as (rows, width) float16."""
    column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def to_hits(rows: pa.Table, scores: Sequence[float] | None = None) -> list[Hit]:
    """Rows with `HIT_COLUMNS` as hits; scores are these, those of a column `score`, or 0."""
    if scores is None:
        scores = rows["score"].to_pylist() if "score" in rows.column_names else [0.0] * len(rows)
    hits = []
    for row, score in zip(rows.select(list(HIT_COLUMNS)).to_pylist(), scores, strict=True):
        modified = datetime.fromtimestamp(row.pop("mtime_ns") / 1e9)
        dated = {"date": row["taken"] or modified, "date_source": "camera" if row["taken"] else "file"}
        hits.append(Hit(score=float(score), modified=modified, **dated, **row))
    return hits


def quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def among(column: str, values: Iterable[str]) -> str:
    """The clause for rows whose column has one of some values."""
    return f"{column} IN ({', '.join(map(quoted, values))})"


def all_of(clauses: Sequence[str]) -> str | None:
    """The clause for rows that meet all of some; None where there is none."""
    return " AND ".join(clauses) or None


def within(*folders: str | Path) -> str:
    """The clause for rows of folders, with the folders in them, or of single files."""
    paths = [str(folder).rstrip(os.sep) for folder in folders]
    return "(" + " OR ".join(f"path = {quoted(p)} OR starts_with(path, {quoted(p + os.sep)})" for p in paths) + ")"


def taken_between(since: date | None, until: date | None) -> list[str]:
    """The clauses for pictures of some days, both included; by the file's time where no camera says when."""
    clauses = []
    for day, sign, after in ((since, ">=", 0), (until, "<", 1)):
        if day is not None:
            start = datetime.combine(min(max(day, EARLIEST), LATEST) + timedelta(days=after), datetime.min.time())
            clauses.append(
                f"((taken IS NOT NULL AND taken {sign} timestamp '{start:%Y-%m-%d %H:%M:%S}')"
                f" OR (taken IS NULL AND mtime_ns {sign} {int(start.timestamp()) * 10**9}))"
            )
    return clauses


def looks_of(rows: pa.Table) -> list[bytes | None]:
    """The look of each row, where the index has them."""
    return rows[LOOK].to_pylist() if LOOK in rows.column_names else [None] * len(rows)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., width), of length 1, float32."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
