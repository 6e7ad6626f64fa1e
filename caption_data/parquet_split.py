"""Read the rows of parquet datasets directly from their files, and compute a digest that detects changed files.

The commands of the caption pipeline `captions` read each file once and in order, so they open datasets with
`open_in_place`. In contrast to `open_split`, it does not copy the files to the cache of the library `datasets`.
"""

import bisect
import hashlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features
from tqdm.auto import tqdm

from caption_data.sources import COLUMN_CHUNK_ROWS, PARQUET_BATCH_ROWS, Split, open_parquet, open_split
from caption_data.tars_and_image_folders import METADATA_SUFFIXES

# The digest of a large file covers only `SAMPLE_COUNT` samples of `SAMPLE_BYTES` bytes, spread evenly over the file.
SAMPLE_COUNT, SAMPLE_BYTES = 64, 4096


@dataclass(eq=False)
class ParquetSplit(Split):
    """A dataset split that reads its parquet files directly, a few rows at a time, instead of copying them to a cache.

    `open_in_place` creates such a split. Reading rows in order is fast, but random access is slow. Damaged rows raise
    an error only when they are read.

    Raises:
        ValueError: If a file is damaged, or the files have different columns or types.
    """

    def __post_init__(self) -> None:
        self._row_groups: list[tuple[Path, int, int]] = []  # (file, index, number of rows) of each row group
        schema = None
        for path in tqdm(self.paths, desc=f"Parquet files, {self.display_name}", unit="file", leave=False):
            with open_parquet(path) as file:
                schema = file.schema_arrow if schema is None else schema
                if not file.schema_arrow.equals(schema):
                    raise ValueError(f"{path} and {self.paths[0]} must have the same columns and types.")
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._row_groups += [(path, group, size) for group, size in enumerate(sizes)]
        # Index of the first row of each row group, followed by the total number of rows.
        self._row_group_starts = list(itertools.accumulate((size for *_, size in self._row_groups), initial=0))
        self.features = Features.from_arrow_schema(schema)

    def __len__(self) -> int:
        return self._row_group_starts[-1]

    def rows(self, start: int = 0, column_names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over the rows from row `start` to the end. The images are not decoded.

        Args:
            start: Number of the first row, counted from 0.
            column_names: Columns to read. None: all columns.

        Yields:
            Each row as `{column name: value}`.
        """
        if start >= len(self):
            return
        first = bisect.bisect_right(self._row_group_starts, start) - 1
        to_skip = start - self._row_group_starts[first]  # rows of this group before row `start`
        columns = None if column_names is None else list(column_names)
        for path, groups in itertools.groupby(self._row_groups[first:], key=lambda group: group[0]):
            numbers = [number for _, number, _ in groups]
            with open_parquet(path) as file:
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=numbers, columns=columns):
                    rows = batch.slice(min(to_skip, len(batch))).to_pylist()
                    to_skip -= len(batch) - len(rows)
                    for row in rows:
                        image = row.get(self.image_column)
                        # Parquet files of other programs may hold bytes or a path. Convert them to the usual dict.
                        if isinstance(image, bytes | str):
                            kind = "path" if isinstance(image, str) else "bytes"
                            row[self.image_column] = {"bytes": None, "path": None, kind: image}
                        yield row

    def iter_column(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Iterate over a column in chunks of at most `COLUMN_CHUNK_ROWS` rows, without reading other columns.

        Args:
            name: Name of the column.

        Yields:
            Arrow arrays with the values of consecutive rows.
        """
        for path in self.paths:
            with open_parquet(path) as file:
                for batch in file.iter_batches(COLUMN_CHUNK_ROWS, columns=[name]):
                    yield pa.chunked_array([batch.column(0)])


# Like `open_split`, but reads parquet files directly instead of copying them to the cache of `datasets`.
open_in_place = partial(open_split, parquet_type=ParquetSplit)


def compute_split_content_digest(source: Split) -> str:
    """Return a digest of the files of a dataset split, so that changed data can be detected.

    The digest covers the name, size and content of each file, but not its folder. Large data files are only sampled, so
    a small change in them may go unnoticed.

    Args:
        source: The split.

    Returns:
        A BLAKE2b-128 hex digest. For a saved dataset or a dataset of the Hub: the fingerprint of the library
        `datasets`.
    """
    if not source.paths:
        return str(source.data._fingerprint)
    digest = hashlib.blake2b(digest_size=16)
    for path in tqdm(source.paths, desc="Fingerprint", unit="file", leave=False):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            # Read metadata files (JSON Lines or CSV) completely, because a corrected caption may change a single byte.
            is_whole = path.suffix in METADATA_SUFFIXES or size <= SAMPLE_COUNT * SAMPLE_BYTES
            if is_whole:
                hashlib.file_digest(file, lambda: digest)
            # The last sample ends at the end of the file, so it covers the footer with the metadata of a parquet file.
            for number in range(0 if is_whole else SAMPLE_COUNT):
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLE_COUNT - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
