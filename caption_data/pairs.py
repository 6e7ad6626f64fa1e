"""Build pair tables, which tell training and evaluation which captions of each image to use and which rows to skip.

A pair is an image together with the captions that a run uses. A pair table has one row for each row of a dataset split:
the digest of the image and the chosen captions, or the reason why the row can't be used. The tables are cached, so a
second run with the same data and settings starts immediately.
"""

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

from capivara_common.environment import cache_home, get_or_init_distributed_state
from capivara_common.files import append_digest, json_digest, matches_appended_digest, read_appended_digest, write_text
from capivara_common.image_files import BadRow, read_image_bytes
from caption_data.embedded import DIGEST_COLUMN, EMBEDS_COLUMN, INVALID_EMBEDDING
from caption_data.rows import (
    CAPTIONS_FEATURE,
    NOT_CHOSEN,
    SIMILARITY_COLUMN_RE,
    SkippedRow,
    compute_image_caption_rows_digest,
    convert_to_caption_list,
    replace_surrogates,
)
from caption_data.sources import Split
from modeling_capivara import clean_text

# Version of the pair tables, a part of their cache key. Increase it if a code change makes different pairs from the
# same rows, so that cached tables are built again.
PAIR_TABLE_VERSION = 2
MAP_BATCH_ROWS = 128  # number of rows whose image files are in memory at the same time
# The content digest of a pair table is cached only if the table has at least this many rows. For a smaller table, it
# is computed again at every start, which takes only a second or two. For millions of rows, it takes a minute or more.
CACHED_FINGERPRINT_ROWS = 100_000
UNUSED_TABLE_LIFETIME_S = 30 * 24 * 3600  # a table is deleted if no run has read it for this number of seconds
PAIR_TABLE_FEATURES = Features(
    {name: Value("string") for name in ("digest", "reason", "detail")}
    | {"row": Value("int64"), "captions": CAPTIONS_FEATURE}
)
# Values of the column `reason` that have nothing to do with the image file. Any other value means that the image file
# could not be used.
FILELESS_REASONS = ("", NOT_CHOSEN, "no caption", INVALID_EMBEDDING)
IMAGE_KEYS = ("bytes", "path")  # keys of an encoded image in a row; at least one must be present
ASCII_ALPHANUMERIC_RE = re.compile("[0-9A-Za-z]")
ChooseCaptions = Callable[[dict[str, Any]], list[str]]  # function from a row to the captions to use


def load_or_build_pair_table(
    split: Split, caption_columns: Sequence[str], choose: ChooseCaptions, settings: dict[str, Any]
) -> Dataset:
    """Choose the captions of all rows of a split and check all images, or load the result from the cache.

    The result, called the pair table, is built again if the rows, the image files, `split.image_access`,
    `caption_columns` or `settings` change. In a distributed launch, one process per machine builds it, and the others
    wait.

    Args:
        split: Dataset split with captions, and with images or embeddings of images.
        caption_columns: Names of the caption and similarity columns that `choose` reads. The split must have all
            similarity columns and at least one caption column.
        choose: Function that gets a row without its image, and returns the list of captions to use. Each column in
            `caption_columns` is a list; a missing one is empty. The function may raise ValueError.
        settings: All settings on which the result of `choose` depends, as JSON values for the cache key.

    Returns:
        A table with one row for each row of the split, and these columns:
            row: Index of the row in the split.
            digest: BLAKE2b-128 hex digest of the image file.
            captions: List of the chosen captions.
            reason: Why the row can't be used, as in `SkippedRow`; "" for a usable row.
            detail: Description of the problem; "" for a usable row.
        For an unusable row, `digest` is "" and `captions` is empty.

    Raises:
        ValueError: If the split lacks a required column.
    """
    split.check_columns([split.image_column, *find_missing_columns(caption_columns, split.columns)])

    def make_pair(number: int, row: dict[str, Any]) -> dict[str, Any]:
        pair = {"row": number, "digest": "", "captions": [], "reason": "", "detail": ""}
        try:
            image = row.pop(split.image_column, None)
            captions = _normalize_and_choose_captions(row, caption_columns, choose)
            if split.is_embedded:
                digest = row[DIGEST_COLUMN]
                if fault := split.invalid_embeds.get(number) or ("" if digest else f"{DIGEST_COLUMN} is empty"):
                    raise BadRow(INVALID_EMBEDDING, fault)
            else:
                digest = blake2b(read_image_bytes(image, split.image_access), digest_size=16).hexdigest()
            return pair | {"digest": digest, "captions": captions}
        except BadRow as bad:
            return pair | {"reason": bad.reason, "detail": replace_surrogates(bad.detail)}

    def make_pairs(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        pairs = list(map(make_pair, numbers, rows))
        return {name: [pair[name] for pair in pairs] for name in PAIR_TABLE_FEATURES}

    def make_table() -> Dataset:
        # Leave out the column of embeddings: it is not needed here, and converting its values to Python numbers would
        # take most of the time.
        data = split.data.remove_columns(EMBEDS_COLUMN) if split.is_embedded else split.data
        return data.map(
            make_pairs, with_indices=True, batched=True, batch_size=MAP_BATCH_ROWS, features=PAIR_TABLE_FEATURES,
            remove_columns=data.column_names, cache_file_name=str(path), load_from_cache_file=True,
            new_fingerprint=key, desc=f"Reading captions, {split.display_name}",
        )  # fmt: skip

    def has_recovered(table: Dataset) -> bool:
        # Images that could not be used when the table was built are read again. Return True if one of them can be used
        # now. The column `reason` of the table says which images these are. It is compared as an Arrow column, because
        # converting millions of rows to Python objects would take minutes at every start.
        is_fileless = pc.is_in(table.data.column("reason"), value_set=pa.array(FILELESS_REASONS))
        bad = map(int, np.flatnonzero(pc.invert(is_fileless)))
        return any(make_pair(number, split.data[number])["reason"] in FILELESS_REASONS for number in bad)

    access = split.image_access
    limits = [access.max_pixels, access.allowed_folders and list(map(str, access.allowed_folders.folders))]
    state = _get_row_and_image_state_for_cache_key(split)
    key = json_digest([PAIR_TABLE_VERSION, state, limits, list(caption_columns), settings], sort_keys=True)
    path = cache_home() / "pairs" / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    return _load_or_build_and_prune_cache(path, make_table, has_recovered)


def find_missing_columns(columns: Sequence[str], present: Iterable[str]) -> list[str]:
    """Return the names of the columns that are needed to choose captions, but that a dataset lacks.

    All similarity columns in `columns` are needed. Of the caption columns, such as `captions-pt`, any one suffices.

    Args:
        columns: Names of the columns that the caption strategy (rule that chooses captions of a row) reads.
        present: Names of the columns that the dataset has.

    Returns:
        Names of the missing columns, in the order of `columns`. All caption columns are listed if the dataset has none.
    """
    caption_columns = [name for name in columns if not SIMILARITY_COLUMN_RE.fullmatch(name)]
    optional = set() if set(caption_columns).isdisjoint(present) else set(caption_columns)
    return [name for name in columns if name not in present and name not in optional]


def filter_usable_rows(table: Dataset) -> Dataset:
    """Return only the usable rows of a pair table, that is, rows with a valid image and at least one chosen caption.

    Args:
        table: Pair table from `load_or_build_pair_table`. Its column `reason` says why a row can't be used, and is
            empty for a usable row.
    """
    valid_rows = np.flatnonzero(pc.equal(table.data.column("reason"), ""))
    return table if len(valid_rows) == len(table) else table.select(valid_rows)


def list_skipped_rows_and_damaged_archives(table: Dataset, split: Split) -> list[SkippedRow]:
    """List all rows of a dataset split that can't be used, to report them to the user.

    The unusable rows of the pair table come first. Then comes one entry for each damaged tar or JSON Lines file, which
    stands for all its unreadable rows.

    Args:
        table: Pair table from `load_or_build_pair_table`.
        split: Split from which the table was built.
    """
    invalid = table.select(np.flatnonzero(pc.not_equal(table.data.column("reason"), "")))
    skipped = [SkippedRow(split.name, split.split, row["row"], row["reason"], row["detail"]) for row in invalid]
    return skipped + split.damaged_archives


def check_bad_share(skipped: list[SkippedRow], total: int, max_bad_share: float) -> None:
    """Stop a run if too many rows of a dataset split are bad, that is, have a missing or invalid image or caption.

    Args:
        skipped: All skipped rows of the split. Rows with the reason "not chosen" are valid and don't count as bad.
        total: Number of rows in the split.
        max_bad_share: Largest accepted share of bad rows, from 0 to 1.

    Raises:
        ValueError: If the share is larger. The message counts the reasons and describes the first three bad rows.
    """
    bad = [row for row in skipped if row.reason != NOT_CHOSEN]
    share = len(bad) / max(total, 1)
    if share <= max_bad_share:
        return
    counts = ", ".join(f"{number} {reason}" for reason, number in Counter(row.reason for row in bad).most_common())
    first = "\n".join(f"  {s.source}, split {s.split!r}, row {s.row}: {s.reason} ({s.detail})" for s in bad[:3])
    raise ValueError(
        f"{len(bad)} of {total} rows ({share:.2%}) can't be used ({counts}); max_bad_share allows "
        f"{max_bad_share:.2%}. The first bad rows:\n{first}\nRepair or remove the bad rows, or raise --max_bad_share; "
        "the file skipped.jsonl then lists all bad rows."
    )


def load_or_compute_pair_content_digest(pairs: Dataset) -> str:
    """Return a digest that identifies the images and captions of a run, for example to record the data of a result.

    The digest depends on the order of the rows, but not on the paths of the image files.

    Args:
        pairs: Pair table from `load_or_build_pair_table`, or rows selected from it.

    Returns:
        BLAKE2b-128 hex digest.
    """
    path = cache_home() / "pairs" / f"{pairs._fingerprint}.txt"
    is_large = len(pairs) >= CACHED_FINGERPRINT_ROWS
    if is_large and path.is_file():
        return path.read_text(encoding="ascii")
    chunks = pairs.select_columns(["digest", "captions"]).iter(1000)
    rows = (row for chunk in chunks for row in zip(chunk["digest"], chunk["captions"], strict=True))
    fingerprint = compute_image_caption_rows_digest(rows)
    if is_large:
        write_text(path, fingerprint)
    return fingerprint


def _load_or_build_and_prune_cache(
    path: Path, make_table: Callable[[], Dataset], has_recovered: Callable[[Dataset], bool]
) -> Dataset:
    """Load a pair table from its cache file, or build it.

    The table is built again if the cache file is damaged. It is also built again if an image that could not be read
    when the table was built can be read now, for example after a disk fault. Other tables in the folder are deleted if
    no run has used them for `UNUSED_TABLE_LIFETIME_S`.

    Args:
        path: Cache file of the table.
        make_table: Function that loads the table from `path` if the file exists, and otherwise builds the file.
        has_recovered: Function that takes the table, and returns whether any image that the table lists as bad can be
            read now.
    """
    state = get_or_init_distributed_state()
    with state.local_main_process_first():
        # Only the first process of this machine checks the file. The other processes wait, and then read it.
        is_valid = not state.is_local_main_process or matches_appended_digest(path)
        if not is_valid:
            path.unlink(missing_ok=True)
        table = make_table()
        if is_valid and state.is_local_main_process and has_recovered(table):
            path.unlink()
            table, is_valid = make_table(), False
        if not is_valid:
            append_digest(path)
        # Use the digest of the file as the fingerprint of the table, instead of the fingerprint that `datasets`
        # computed: `load_or_compute_pair_content_digest` needs a cache key that depends on the content of the table.
        table._fingerprint = read_appended_digest(path)
        if state.is_local_main_process:
            os.utime(path)
            for old in path.parent.iterdir():  # delete old tables, and temporary files of killed runs
                with suppress(OSError):  # another run may delete the same file, and `unlink` fails for folders
                    if time.time() - old.stat().st_mtime > UNUSED_TABLE_LIFETIME_S:
                        old.unlink()
    return table


def _normalize_and_choose_captions(row: dict[str, Any], columns: Sequence[str], choose: ChooseCaptions) -> list[str]:
    """Return the captions to use from a row, without captions that are empty after text cleaning.

    Args:
        row: A row without its image. Its caption columns are converted in place to lists of texts.
        columns: Names of the caption and similarity columns.
        choose: Function that takes the row and returns the captions to use.

    Raises:
        BadRow: With the reason "not chosen" if the row has captions, but none of them is chosen. With the reason "no
            caption" if the row has no valid caption, or `choose` fails.
    """
    for column in columns:
        if SIMILARITY_COLUMN_RE.fullmatch(column):
            row[column] = row.get(column) or []
        else:
            row[column] = convert_to_caption_list(row.get(column), column)
    try:
        captions = [text for text in choose(row) if _has_text_after_cleaning(text)]
    except (ValueError, TypeError) as error:  # for example fewer similarities than captions
        raise BadRow("no caption", f"{error}") from error
    texts = (text for column in columns for text in row[column] if isinstance(text, str))
    if not captions and any(map(_has_text_after_cleaning, texts)):
        raise BadRow(NOT_CHOSEN, "no caption passes the pair filter and the strategy")
    if not captions:
        raise BadRow("no caption", f"no caption has any content: { ({column: row[column] for column in columns})!r}")
    return captions


def _has_text_after_cleaning(text: str) -> bool:
    """Return True if a text is not empty after text cleaning (`clean_text`)."""
    # Cleaning is slow, so it is skipped for most texts: a printable text that has an ASCII letter or digit, and no "&",
    # with which HTML entities begin, is never empty after cleaning.
    is_plain = text.isprintable() and "&" not in text and ASCII_ALPHANUMERIC_RE.search(text)
    return bool(is_plain or clean_text(text))


def _get_row_and_image_state_for_cache_key(split: Split) -> list[Any]:
    """Return a list of JSON values that changes if the rows or image files of a split change.

    The list is part of the cache key of a pair table. A change of an image file is recognized by its path, size and
    modification time.

    Raises:
        ValueError: If the image column holds neither bytes nor paths.
    """
    tables = [(file["filename"], os.stat(file["filename"])) for file in split.data.cache_files]
    states = [(name, state.st_size, state.st_mtime_ns) for name, state in tables]
    digest, feature = blake2b(digest_size=16), split.features[split.image_column]
    # Images in tars need no separate check: the fingerprint of the dataset already covers the size and modification
    # time of each tar.
    has_files = not split.is_embedded and not (isinstance(feature, dict) and "archive" in feature)
    for stored in split.iter_column(split.image_column) if has_files else ():
        fields = {field.name for field in stored.type} if pa.types.is_struct(stored.type) else set()
        if fields.isdisjoint(IMAGE_KEYS):
            raise ValueError(
                f"{split.display_name}: the image column {split.image_column!r} has the type {stored.type}; it must "
                "hold bytes, paths, or structs of bytes and path. Choose another column with --image_column."
            )
        if "bytes" in fields:
            stored = stored.filter(pc.is_null(pc.struct_field(stored, "bytes")))
        paths = pc.struct_field(stored, "path").to_pylist() if "path" in fields else []
        for path in filter(None, paths):
            digest.update(path.encode("utf-8", "replace"))
            for folder in (*split.image_access.allowed_folders.folders, "."):
                with suppress(OSError, ValueError):
                    state = os.stat(os.path.join(folder, path))
                    digest.update(f" {state.st_size} {state.st_mtime_ns}\n".encode())
                    break
    return [split.name, split.split, split.image_column, split.data._fingerprint, states, digest.hexdigest()]
