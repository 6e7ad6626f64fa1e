"""The columns of caption rows: their names, what they hold, and of what kind they are where only JSON says so."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from datasets import Features, List, Value

from capivara_common.image_files import BadRow
from caption_data.rows import storable

CAPTIONS = List(Value("string"))
SIMILARITIES = List(Value("float32"))
NUMBERS = List(Value("float64"))
CAPTION_COLUMN = re.compile(r"(generated-)?captions-[\w-]+")  # the authors' names
SIMILARITY_COLUMN = re.compile(r"similarities-[\w-]+")
IMAGE = "image"  # the authors' name, which the image column has in every output
NO_TEXTS = "column without texts"  # of a table out of JSON: which column of captions holds anything else in a row
KINDS = {"texts": CAPTIONS, "numbers": NUMBERS} | {name: Value(name) for name in ("string", "bool", "int64", "float64")}


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


def judged_features(rows: Iterable[dict[str, Any]]) -> Features:
    """Features of rows out of JSON, by what most of them hold: texts, numbers, lists of one of these; no objects.

    A column with a list in any row is one of lists, and the columns of the authors' names are what these say.
    """
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, Counter())[_kind(value)] += 1
    features = Features()
    for name, kinds in found.items():
        nulls = kinds.pop("null", 0)
        lists = Counter({kind: kinds[kind] for kind in ("texts", "numbers") if kinds[kind]})
        kind = (lists or kinds or Counter(string=nulls)).most_common(1)[0][0]
        kind = "float64" if kind == "int64" and kinds["float64"] else kind
        kind = "texts" if CAPTION_COLUMN.fullmatch(name) else kind
        kind = "numbers" if SIMILARITY_COLUMN.fullmatch(name) else kind
        if kind in KINDS:
            features[name] = KINDS[kind]
    return features


def fitting(value: Any, feature: Any) -> Any:
    """A value out of JSON as its column has it; None where it is of another kind: then the row lacks it."""
    if feature == CAPTIONS:
        texts = [value] if isinstance(value, str) else value
        fits = isinstance(texts, list) and _kind(texts) == "texts"
        return [None if text is None else storable(text) for text in texts] if fits else None
    if feature == NUMBERS:
        fits = isinstance(value, list)
        return [number if _kind(number) in ("int64", "float64") else None for number in value] if fits else None
    if _kind(value) != feature.dtype and (_kind(value), feature.dtype) != ("int64", "float64"):
        return None
    if feature.dtype == "int64" and not -(2**63) <= value < 2**63:
        return None
    return storable(value) if isinstance(value, str) else value


def _kind(value: Any) -> str:
    """One of `KINDS`, "null", or "" of anything else."""
    if isinstance(value, list):
        kinds = {_kind(item) for item in value} - {"null"}
        if kinds <= {"string"}:
            return "texts"
        return "numbers" if kinds <= {"int64", "float64"} else ""
    names = {type(None): "null", str: "string", bool: "bool", int: "int64", float: "float64"}
    return names.get(type(value), "")
