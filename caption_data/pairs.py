"""What a run needs of a caption row, image and captions: one `map` over a split, kept in a file."""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from capivara_common.environment import cache_home, processes
from capivara_common.files import add_digest, has_digest
from capivara_common.image_files import BadRow, image_bytes
from caption_data.rows import (
    CAPTIONS,
    NOT_CHOSEN,
    SIMILARITY_COLUMN,
    Skipped,
    caption_texts,
    digest_of,
    rows_fingerprint,
    storable,
)
from caption_data.sources import Split
from modeling_capivara import repair_text

TABLE_VERSION = 2  # raise it when a pair of a row becomes another
ROWS_AT_ONCE = 128  # whose images are in memory
KEPT_S = 30 * 24 * 3600  # that a table which no run reads any more stays on the disk
TABLE = Features(
    {name: Value("string") for name in ("digest", "reason", "detail")} | {"row": Value("int64"), "captions": CAPTIONS}
)
OF_TEXTS = ("", NOT_CHOSEN, "no caption")  # the other reasons are of images
PLACE = ("bytes", "path")  # of an image, one of them at least
ASCII_LETTER = re.compile("[0-9A-Za-z]")
Choose = Callable[[dict[str, Any]], list[str]]


def pair_table(split: Split, caption_columns: Sequence[str], choose: Choose, settings: dict[str, Any]) -> Dataset:
    """One pass over the rows: of each its number `row`, the `digest` of its image (hex, BLAKE2b-128 of the file) and
    its `captions`, or the `reason` and `detail` why it can't be used.

    The table is kept in the cache folder, named after all that it depends on. Of the processes of a launch one on each
    machine makes it. Raises ValueError where the split lacks a column; those that are there are named.

    `choose` gives the captions of a row without its image, and may raise ValueError; `settings` are all that it depends
    on, `caption_columns` what it reads: a lone string there becomes a list of one, and a column that is not there an
    empty list, where `lacking` does not miss it.
    """
    split.check_columns([split.image_column, *lacking(caption_columns, split.columns)])

    def line(number: int, row: dict[str, Any]) -> dict[str, Any]:
        found = {"row": number, "digest": "", "captions": [], "reason": "", "detail": ""}
        try:
            image = row.pop(split.image_column)
            captions = _captions(row, caption_columns, choose)
            data = image_bytes(image, split.files)
            return found | {"digest": blake2b(data, digest_size=16).hexdigest(), "captions": captions}
        except BadRow as bad:
            return found | {"reason": bad.reason, "detail": storable(bad.detail)}

    def lines(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = list(map(line, numbers, rows))
        return {name: [one[name] for one in found] for name in TABLE}

    def made() -> Dataset:
        return split.data.map(
            lines, with_indices=True, batched=True, batch_size=ROWS_AT_ONCE, features=TABLE,
            remove_columns=split.data.column_names, cache_file_name=str(path), load_from_cache_file=True,
            new_fingerprint=key, desc=f"Captions, {split.where}",
        )  # fmt: skip

    def readable_now(table: Dataset) -> bool:
        bad = (number for number, reason in enumerate(table["reason"]) if reason not in OF_TEXTS)
        return any(line(number, split.data[number])["reason"] in OF_TEXTS for number in bad)

    limits = [split.files.max_pixels, split.files.bounds and list(map(str, split.files.bounds.folders))]
    key = digest_of([TABLE_VERSION, _state(split), limits, list(caption_columns), settings], sort_keys=True)
    path = cache_home() / "pairs" / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    return _kept(path, made, readable_now)


def lacking(columns: Sequence[str], there: Iterable[str]) -> list[str]:
    """Those of `columns` that are missed where others are `there`: of columns of captions one is enough."""
    captions = [name for name in columns if not SIMILARITY_COLUMN.fullmatch(name)]
    enough = set() if set(captions).isdisjoint(there) else set(captions)
    return [name for name in columns if name not in there and name not in enough]


def usable(table: Dataset) -> Dataset:
    """The pairs of a `pair_table`: the rows without a reason against them."""
    good = np.flatnonzero(pc.equal(table.data.column("reason"), ""))
    return table if len(good) == len(table) else table.select(good)


def skipped_rows(table: Dataset, split: Split) -> list[Skipped]:
    """The other rows, and the archives that were damaged."""
    bad = table.select(np.flatnonzero(pc.not_equal(table.data.column("reason"), "")))
    return [Skipped(split.name, split.split, one["row"], one["reason"], one["detail"]) for one in bad] + split.damaged


def check_bad_share(skipped: list[Skipped], total: int, max_bad_share: float) -> None:
    """Raise ValueError when more than `max_bad_share` (0 to 1) of `total` rows are bad; those not chosen are not."""
    skipped = [line for line in skipped if line.reason != NOT_CHOSEN]
    share = len(skipped) / max(total, 1)
    if share <= max_bad_share:
        return
    counts = ", ".join(f"{number} {reason}" for reason, number in Counter(s.reason for s in skipped).most_common())
    first = "\n".join(f"  {s.source}, split {s.split!r}, row {s.row}: {s.reason} ({s.detail})" for s in skipped[:3])
    raise ValueError(
        f"{len(skipped)} of {total} rows ({share:.2%}) can't be used, and max_bad_share allows {max_bad_share:.2%}: "
        f"{counts}. The first of them:\n{first}\nMend or remove such rows, or raise --max_bad_share: all are then "
        "listed in skipped.jsonl."
    )


def pairs_fingerprint(pairs: Dataset) -> str:
    """Hex digest of the images, captions and order of pairs; where the files lie does not matter."""
    chunks = pairs.select_columns(["digest", "captions"]).iter(1000)
    return rows_fingerprint(row for chunk in chunks for row in zip(chunk["digest"], chunk["captions"], strict=True))


def _kept(path: Path, made: Callable[[], Dataset], readable_now: Callable[[Dataset], bool]) -> Dataset:
    """The table in the file `path`, by `made` where there is none; anew where it is damaged, or an image that could not
    be read now can: after a fault of the disk, or with another decoder."""
    state = processes()
    with state.local_main_process_first():
        kept = not state.is_local_main_process or has_digest(path)  # the others read what the first has left
        if not kept:
            path.unlink(missing_ok=True)
        table = made()
        if kept and state.is_local_main_process and readable_now(table):
            path.unlink()
            table, kept = made(), False
        if not kept:
            add_digest(path)
        if state.is_local_main_process:
            os.utime(path)
            for old in path.parent.iterdir():  # also what a kill has left of one
                with suppress(OSError):  # another run tidies, too; a folder is nobody's of ours
                    if time.time() - old.stat().st_mtime > KEPT_S:
                        old.unlink()
    return table


def _captions(row: dict[str, Any], columns: Sequence[str], choose: Choose) -> list[str]:
    """The captions of a row that are chosen, at least one. Raises BadRow where there is none."""
    for column in columns:
        is_number = SIMILARITY_COLUMN.fullmatch(column)
        row[column] = row.get(column) or [] if is_number else caption_texts(row.get(column), column)
    try:
        captions = [text for text in choose(row) if _says_something(text)]
    except (ValueError, TypeError) as error:  # such as fewer similarities than captions
        raise BadRow("no caption", f"{error}") from error
    texts = (text for column in columns for text in row[column] if isinstance(text, str))
    if not captions and any(map(_says_something, texts)):
        raise BadRow(NOT_CHOSEN, "no caption passes the pair filter and the strategy")
    if not captions:
        raise BadRow("no caption", f"of { ({column: row[column] for column in columns})!r} none is left")
    return captions


def _says_something(text: str) -> bool:
    """Whether anything is left of a text when it is repaired, which takes most of the time of a pass."""
    plain = text.isprintable() and "&" not in text and ASCII_LETTER.search(text)  # which no repair takes away
    return bool(plain or repair_text(text))


def _state(split: Split) -> list[Any]:
    """What the rows and image files of a split are told by; it changes where one of them does."""
    tables = [(file["filename"], os.stat(file["filename"])) for file in split.data.cache_files]
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in tables]
    digest, images = blake2b(digest_size=16), split.data.select_columns([split.image_column]).with_format("arrow")
    feature = split.data.features[split.image_column]
    for part in () if isinstance(feature, dict) and "archive" in feature else images.iter(10_000):
        outside = part.column(0)
        if not pa.types.is_struct(outside.type) or (fields := {field.name for field in outside.type}).isdisjoint(PLACE):
            rule = "images are bytes, a path, or an object of both; name theirs by --image_column"
            raise ValueError(f"{split.where}: column {split.image_column!r} is of {outside.type}; {rule}.")
        if "bytes" in fields:
            outside = outside.filter(pc.is_null(pc.struct_field(outside, "bytes")))
        if "path" not in fields:
            continue
        for path in filter(None, pc.struct_field(outside, "path").to_pylist()):
            digest.update(path.encode("utf-8", "replace"))
            for folder in (*split.files.bounds.folders, "."):
                with suppress(OSError, ValueError):
                    state = os.stat(os.path.join(folder, path))
                    digest.update(f" {state.st_size} {state.st_mtime_ns}\n".encode())
                    break
    return [split.name, split.split, split.image_column, split.data._fingerprint, states, digest.hexdigest()]
