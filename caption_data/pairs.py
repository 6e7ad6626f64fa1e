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

from capivara_common.environment import cache_home, process_state
from capivara_common.files import append_digest, digest_matches
from capivara_common.image_files import BadRow, read_image_bytes
from caption_data.rows import (
    CAPTIONS_FEATURE,
    NOT_CHOSEN,
    SIMILARITY_COLUMN_RE,
    SkippedRow,
    json_digest,
    normalize_captions,
    replace_surrogates,
    rows_fingerprint,
)
from caption_data.sources import Split
from modeling_capivara import clean_text

PAIR_TABLE_VERSION = 2  # raise it when a pair of a row becomes another
MAP_BATCH_ROWS = 128  # whose images are in memory
UNUSED_TABLE_LIFETIME_S = 30 * 24 * 3600  # that a table which no run reads any more stays on the disk
PAIR_TABLE_FEATURES = Features(
    {name: Value("string") for name in ("digest", "reason", "detail")}
    | {"row": Value("int64"), "captions": CAPTIONS_FEATURE}
)
TEXT_REASONS = ("", NOT_CHOSEN, "no caption")  # the other reasons are of images
IMAGE_KEYS = ("bytes", "path")  # of an image, one of them at least
ASCII_ALPHANUMERIC_RE = re.compile("[0-9A-Za-z]")
ChooseCaptions = Callable[[dict[str, Any]], list[str]]


def build_pair_table(
    split: Split, caption_columns: Sequence[str], choose: ChooseCaptions, settings: dict[str, Any]
) -> Dataset:
    """One pass over the rows: of each its number `row`, the `digest` of its image (hex, BLAKE2b-128 of the file) and
    its `captions`, or the `reason` and `detail` why it can't be used.

    The table is kept in the cache folder, named after all that it depends on. Of the processes of a launch one on each
    machine makes it. Raises ValueError where the split lacks a column; those that are there are named.

    `choose` gives the captions of a row without its image, and may raise ValueError; `settings` are all that it depends
    on, `caption_columns` what it reads: a lone string there becomes a list of one, and a column that is not there an
    empty list, where `lacking` does not miss it.
    """
    split.check_columns([split.image_column, *missing_columns(caption_columns, split.columns)])

    def line(number: int, row: dict[str, Any]) -> dict[str, Any]:
        found = {"row": number, "digest": "", "captions": [], "reason": "", "detail": ""}
        try:
            image = row.pop(split.image_column)
            captions = _choose_captions(row, caption_columns, choose)
            data = read_image_bytes(image, split.image_access)
            return found | {"digest": blake2b(data, digest_size=16).hexdigest(), "captions": captions}
        except BadRow as bad:
            return found | {"reason": bad.reason, "detail": replace_surrogates(bad.detail)}

    def lines(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = list(map(line, numbers, rows))
        return {name: [one[name] for one in found] for name in PAIR_TABLE_FEATURES}

    def made() -> Dataset:
        return split.data.map(
            lines, with_indices=True, batched=True, batch_size=MAP_BATCH_ROWS, features=PAIR_TABLE_FEATURES,
            remove_columns=split.data.column_names, cache_file_name=str(path), load_from_cache_file=True,
            new_fingerprint=key, desc=f"Captions, {split.display_name}",
        )  # fmt: skip

    def readable_now(table: Dataset) -> bool:
        bad = (number for number, reason in enumerate(table["reason"]) if reason not in TEXT_REASONS)
        return any(line(number, split.data[number])["reason"] in TEXT_REASONS for number in bad)

    limits = [
        split.image_access.max_pixels,
        split.image_access.allowed_folders and list(map(str, split.image_access.allowed_folders.folders)),
    ]
    key = json_digest(
        [PAIR_TABLE_VERSION, _source_state(split), limits, list(caption_columns), settings], sort_keys=True
    )
    path = cache_home() / "pairs" / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    return _load_or_make_table(path, made, readable_now)


def missing_columns(columns: Sequence[str], present: Iterable[str]) -> list[str]:
    """Those of `columns` that are missed where others are `there`: of columns of captions one is enough."""
    captions = [name for name in columns if not SIMILARITY_COLUMN_RE.fullmatch(name)]
    enough = set() if set(captions).isdisjoint(present) else set(captions)
    return [name for name in columns if name not in present and name not in enough]


def drop_invalid(table: Dataset) -> Dataset:
    """The pairs of a `pair_table`: the rows without a reason against them."""
    good = np.flatnonzero(pc.equal(table.data.column("reason"), ""))
    return table if len(good) == len(table) else table.select(good)


def list_skipped_rows(table: Dataset, split: Split) -> list[SkippedRow]:
    """The other rows, and the archives that were damaged."""
    bad = table.select(np.flatnonzero(pc.not_equal(table.data.column("reason"), "")))
    return [
        SkippedRow(split.name, split.split, one["row"], one["reason"], one["detail"]) for one in bad
    ] + split.damaged_archives


def check_bad_share(skipped: list[SkippedRow], total: int, max_bad_share: float) -> None:
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


def _load_or_make_table(
    path: Path, make_table: Callable[[], Dataset], has_recovered: Callable[[Dataset], bool]
) -> Dataset:
    """The table in the file `path`, by `made` where there is none; anew where it is damaged, or an image that could not
    be read now can: after a fault of the disk, or with another decoder."""
    state = process_state()
    with state.local_main_process_first():
        kept = not state.is_local_main_process or digest_matches(path)  # the others read what the first has left
        if not kept:
            path.unlink(missing_ok=True)
        table = make_table()
        if kept and state.is_local_main_process and has_recovered(table):
            path.unlink()
            table, kept = make_table(), False
        if not kept:
            append_digest(path)
        if state.is_local_main_process:
            os.utime(path)
            for old in path.parent.iterdir():  # also what a kill has left of one
                with suppress(OSError):  # another run tidies, too; a folder is nobody's of ours
                    if time.time() - old.stat().st_mtime > UNUSED_TABLE_LIFETIME_S:
                        old.unlink()
    return table


def _choose_captions(row: dict[str, Any], columns: Sequence[str], choose: ChooseCaptions) -> list[str]:
    """The captions of a row that are chosen, at least one. Raises BadRow where there is none."""
    for column in columns:
        is_number = SIMILARITY_COLUMN_RE.fullmatch(column)
        row[column] = row.get(column) or [] if is_number else normalize_captions(row.get(column), column)
    try:
        captions = [text for text in choose(row) if _has_content(text)]
    except (ValueError, TypeError) as error:  # such as fewer similarities than captions
        raise BadRow("no caption", f"{error}") from error
    texts = (text for column in columns for text in row[column] if isinstance(text, str))
    if not captions and any(map(_has_content, texts)):
        raise BadRow(NOT_CHOSEN, "no caption passes the pair filter and the strategy")
    if not captions:
        raise BadRow("no caption", f"of { ({column: row[column] for column in columns})!r} none is left")
    return captions


def _has_content(text: str) -> bool:
    """Whether anything is left of a text when it is repaired, which takes most of the time of a pass."""
    plain = text.isprintable() and "&" not in text and ASCII_ALPHANUMERIC_RE.search(text)  # which no repair takes away
    return bool(plain or clean_text(text))


def _source_state(split: Split) -> list[Any]:
    """What the rows and image files of a split are told by; it changes where one of them does."""
    tables = [(file["filename"], os.stat(file["filename"])) for file in split.data.cache_files]
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in tables]
    digest, images = blake2b(digest_size=16), split.data.select_columns([split.image_column]).with_format("arrow")
    feature = split.data.features[split.image_column]
    for part in () if isinstance(feature, dict) and "archive" in feature else images.iter(10_000):
        outside = part.column(0)
        if not pa.types.is_struct(outside.type) or (fields := {field.name for field in outside.type}).isdisjoint(
            IMAGE_KEYS
        ):
            rule = "images are bytes, a path, or an object of both; name theirs by --image_column"
            raise ValueError(f"{split.display_name}: column {split.image_column!r} is of {outside.type}; {rule}.")
        if "bytes" in fields:
            outside = outside.filter(pc.is_null(pc.struct_field(outside, "bytes")))
        if "path" not in fields:
            continue
        for path in filter(None, pc.struct_field(outside, "path").to_pylist()):
            digest.update(path.encode("utf-8", "replace"))
            for folder in (*split.image_access.allowed_folders.folders, "."):
                with suppress(OSError, ValueError):
                    state = os.stat(os.path.join(folder, path))
                    digest.update(f" {state.st_size} {state.st_mtime_ns}\n".encode())
                    break
    return [split.name, split.split, split.image_column, split.data._fingerprint, states, digest.hexdigest()]
