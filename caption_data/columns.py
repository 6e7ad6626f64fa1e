"""The columns of caption rows: their names, what they hold, and which of them a stage passes on."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import Features, Image, List, Value

from capivara_common.image_files import BadRow
from caption_data.rows import storable
from caption_data.sources import HEAD_ROWS, Source

CAPTIONS = List(Value("string"))
SIMILARITIES = List(Value("float32"))
CAPTION_COLUMN = re.compile(r"(generated-)?captions-[\w-]+")  # the authors' names
SIMILARITY_COLUMN = re.compile(r"similarities-[\w-]+")
IMAGE = "image"  # the authors' name, which the image column has in every output


def passed_features(source: Source, image_column: str, renamed: dict[str, str]) -> Features:
    """The columns that a stage passes on, by their names in its output.

    Of a data set that declares its columns these are all but those that Arrow has no plain type for. Where nothing
    declares them, in tars and lists of images, they are judged by the first rows: captions, similarities, and columns
    of one text or number a row.

    Raises:
        ValueError: there are no images, or a name stands for two columns.
    """
    if image_column not in source.columns:
        raise ValueError(f"{source.where} has no image column {image_column!r}; there are {source.columns}.")
    declared, names = source.features, renamed | {image_column: IMAGE}
    if declared is None:
        columns = {old: names.get(old, old) for old in source.columns}
        declared = _judged(itertools.islice(source.rows(), HEAD_ROWS), columns)
    for old in names:
        if old not in source.columns:
            raise ValueError(f"rename: {source.where} has no column {old!r}; there are {source.columns}.")
    features = Features()
    for old, feature in declared.items():
        new = names.get(old, old)
        if new in features or (new != old and new in declared and new not in names):
            raise ValueError(f"{source.where}: two columns would be named {new!r}. Rename one with --rename OLD=NEW.")
        if CAPTION_COLUMN.fullmatch(new):
            features[new] = CAPTIONS
        elif "extension<" not in str(Features({new: feature}).arrow_schema.field(new).type):
            features[new] = feature
    return Features(features | {IMAGE: Image()})


def caption_texts(value: Any, column: str) -> list[str]:
    """The captions of a row, out of any column of a source: one text, a list of texts and None, or None.

    They are as many as there were, so that similarities stay beside theirs; "" for None. Lone surrogates, which JSON
    can hold and no tokenizer or Arrow file takes, are replaced. Raises BadRow where they are no texts.
    """
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list):
        raise BadRow("no caption", f"{column!r} must be a list, it is {value!r}")
    if any(not isinstance(text, str | None) for text in values):
        raise BadRow("no caption", f"{column!r} must hold texts, it is {values!r}")
    return [storable(text or "") for text in values]


def similarities(value: Any, column: str) -> list[float | None]:
    """The similarities of a row, a number for each caption, None of an empty one. Raises BadRow if they are no list."""
    if not isinstance(value, list | None):
        raise BadRow("no caption", f"{column!r} must be a list, it is {value!r}")
    return value or []


def fitting(value: Any, feature: Any) -> Any:
    """A value out of JSON if it is of the kind that the first rows had, else None."""
    if feature == SIMILARITIES:
        numbers = value if isinstance(value, list) else []
        return [number if isinstance(number, int | float) else None for number in numbers]
    if not isinstance(feature, Value):
        return value
    kind = {"string": str, "bool": bool, "int64": int, "float64": int | float}.get(feature.dtype, object)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return None
    if feature.dtype == "int64" and not -(2**63) <= value < 2**63:
        return None
    return storable(value) if isinstance(value, str) else value


def _judged(rows: Iterator[dict[str, Any]], columns: dict[str, str]) -> Features:
    """Features of columns (name in the source -> in the output) that nothing declares, by what most of some rows hold;
    lists and objects are left out."""
    found: dict[str, Counter[type]] = {name: Counter() for name in columns}
    for row in rows:
        for name in columns:
            if row.get(name) is not None:
                found[name][type(row[name])] += 1
    features = Features()
    for name, types in found.items():
        numbers = types[int] + types[float]
        if CAPTION_COLUMN.fullmatch(columns[name]):
            features[name] = CAPTIONS
        elif SIMILARITY_COLUMN.fullmatch(columns[name]):
            features[name] = SIMILARITIES
        elif numbers > types.total() / 2:
            features[name] = Value("float64" if types[float] else "int64")
        elif max(types[str], types[bool]) >= types.total() / 2 > 0:
            features[name] = Value("string" if types[str] >= types[bool] else "bool")
    return features
