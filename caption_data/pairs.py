"""What a run needs of a caption row, image and captions; a row that can't be used is listed, not fatal.

    table = caption_table(source, "image", ["captions-pt"], lambda row: row["captions-pt"], skipped := [])

The rows are those of a `caption_data.sources.Source`.
"""

import atexit
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from capivara_common.image_files import BadRow, ImageFiles, image_digest
from caption_data.columns import SIMILARITY_COLUMN, caption_texts, similarities
from caption_data.rows import NOT_CHOSEN, Skipped, rows_fingerprint
from caption_data.sources import Source
from modeling_capivara import repair_text

ROWS_PER_CHUNK = 1000  # of the table of captions; what of it is in memory while it is written
TEXTS = List(Value("string"))
TABLE_FEATURES = Features({"row": Value("int64"), "digest": Value("string"), "captions": TEXTS})


def caption_table(
    source: Source,
    image_column: str,
    caption_columns: list[str],
    choose: Callable[[dict], list[str]],
    skipped: list[Skipped],
    part: range | None = None,
) -> Dataset:
    """One pass over the rows: what a run needs to know of each but its pixels, in a memory-mapped temporary file.

    Args:
        source, image_column: of the images.
        caption_columns: columns that `choose` needs. A lone string in one of them becomes a list of one; where
            `lacking` does not miss it, one that is not there is an empty list.
        choose: gives the captions of a row; it gets the row without its image, and may raise ValueError.
        skipped: rows that have no image or no caption are appended, and the archives that were damaged.
        part: the rows that are read, of a source that is not streamed; all where None.

    Returns:
        Columns `row` (number in the source), `digest` (hex, BLAKE2b-128 of the file of the image), and
        `captions` (not empty, none of them empty). It lasts as long as the process.

    Raises:
        ValueError: the source lacks a column; those that are there are named.
    """
    source.check_columns([image_column, *lacking(caption_columns, source.columns)])
    if part is None and not source.streaming:
        part = range(len(source))

    def entries() -> Iterator[dict]:
        rows = source.rows() if part is None else itertools.islice(source.rows(part.start), len(part))
        total = None if part is None else len(part)
        bar = tqdm(rows, desc=f"Captions, {source.where}", total=total, unit="row", leave=False)
        for number, row in enumerate(bar, start=0 if part is None else part.start):
            try:
                yield {"row": number, **_entry(row, image_column, caption_columns, choose, source.files)}
            except BadRow as bad:
                skipped.append(Skipped(source.name, source.split, number, bad.reason, bad.detail))

    table = written_table(entries())
    if part is None or not part.start:  # every part sees the same archives
        skipped += source.damaged
    return table


def lacking(columns: Sequence[str], there: Iterable[str]) -> list[str]:
    """Those of `columns` that are missed where others are `there`: of columns of captions one is enough."""
    captions = [name for name in columns if not SIMILARITY_COLUMN.fullmatch(name)]
    enough = set() if set(captions).isdisjoint(there) else set(captions)
    return [name for name in columns if name not in there and name not in enough]


def written_table(entries: Iterator[dict]) -> Dataset:
    """Rows of a `caption_table`, as a memory-mapped temporary file that lasts as long as the process."""
    chunks = iter(lambda: list(itertools.islice(entries, ROWS_PER_CHUNK)), [])
    return _written(pa.RecordBatch.from_pylist(chunk, schema=TABLE_FEATURES.arrow_schema) for chunk in chunks)


def table_bytes(table: Dataset) -> bytes:
    """The file of a `caption_table`, to be sent to another process."""
    return Path(table.cache_files[0]["filename"]).read_bytes()


def joined_tables(parts: list[bytes]) -> Dataset:
    """One `caption_table` out of the files of its parts, in their order."""
    return _written(batch for part in parts for batch in pa.ipc.open_stream(part))


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
        f"{counts}. The first of them:\n{first}\nMend or remove such rows, or raise --max_bad_share."
    )


def tables_fingerprint(table: Dataset) -> str:
    """Hex digest of the images, captions and order of a `caption_table`; where the files lie does not matter."""
    chunks = table.select_columns(["digest", "captions"]).iter(ROWS_PER_CHUNK)
    return rows_fingerprint(row for chunk in chunks for row in zip(chunk["digest"], chunk["captions"], strict=True))


def _entry(
    row: dict,
    image_column: str,
    caption_columns: list[str],
    choose: Callable[[dict], list[str]],
    files: ImageFiles,
) -> dict:
    image = row.pop(image_column, None)
    for column in lacking(caption_columns, row):
        raise BadRow("missing column", f"no {column!r} in a JSON object of at most 1 MB; there are {sorted(row)}")
    for column in caption_columns:
        read = similarities if SIMILARITY_COLUMN.fullmatch(column) else caption_texts
        row[column] = read(row.get(column), column)
    try:
        chosen = choose(row)
    except (ValueError, TypeError) as error:  # such as fewer similarities than captions
        raise BadRow("no caption", f"{error}") from error
    captions = [text for text in chosen if repair_text(text)]
    texts = (text for column in caption_columns for text in row[column] if isinstance(text, str))
    if not captions and any(map(repair_text, texts)):
        raise BadRow(NOT_CHOSEN, "no caption passes the pair filter and the strategy")
    if not captions:
        raise BadRow("no caption", f"of { ({column: row[column] for column in caption_columns})!r} none is left")
    return {"digest": image_digest(image, files).hex(), "captions": captions}


def _written(batches: Iterable[pa.RecordBatch]) -> Dataset:
    """A memory-mapped table in a temporary file that lasts as long as the process."""
    folder = tempfile.mkdtemp(prefix="capivara-captions-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "captions.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TABLE_FEATURES.arrow_schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return Dataset.from_file(str(path))
