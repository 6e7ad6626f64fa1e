"""Rows of captions: their columns, what is read of one, those that can't be used, and the digest of those that can."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from datasets import List, Value

from capivara_common.files import write_text
from capivara_common.image_files import BadRow

CAPTIONS = List(Value("string"))
SIMILARITIES = List(Value("float32"))
CAPTION_COLUMN = re.compile(r"(generated-)?captions-[\w-]+")  # the authors' names
SIMILARITY_COLUMN = re.compile(r"similarities-[\w-]+")
NOT_CHOSEN = "not chosen"  # reason: by the pair filter or the caption strategy; left out, but not bad


@dataclass(frozen=True)
class Skipped:
    """One line of `skipped.jsonl`: a row, or the rest of an archive, that is left out."""

    source: str
    split: str
    row: int
    # not chosen, no image, unreadable image, absurd image size, no caption, damaged archive
    reason: str
    detail: str


def caption_texts(value: Any, column: str) -> list[str]:
    """The captions of a row, out of any column of a source: one text, a list of texts and None, or None.

    They are as many as there were, so that similarities stay beside theirs; "" for None. Lone surrogates, which JSON
    can hold and no tokenizer or Arrow file takes, are replaced. Raises BadRow where they are no texts.
    """
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or any(not isinstance(text, str | None) for text in values):
        raise BadRow("no caption", f"{column!r} must hold a list of texts, it is {value!r}")
    return [storable(text or "") for text in values]


def digest_of(value: Any, sort_keys: bool = False) -> str:
    """Hex digest of a JSON value."""
    return blake2b(json.dumps(value, sort_keys=sort_keys).encode(), digest_size=16).hexdigest()


def rows_fingerprint(rows: Iterable[tuple[str, list[str]]]) -> str:
    """Hex digest of rows, of each the hex `image_digest` and the captions, in their order."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def storable(text: str) -> str:
    """A text without lone surrogates, which JSON can hold and no Arrow file takes."""
    return text.encode("utf-8", "replace").decode()


def write_skipped(path: Path, skipped: list[Skipped]) -> None:
    """One JSON object a line; no file where nothing was skipped."""
    if skipped:  # ASCII: names of archive members can hold what is not UTF-8
        write_text(path, "".join(json.dumps(asdict(line)) + "\n" for line in skipped))
