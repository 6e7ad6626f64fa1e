"""Splits of parquet files that are read in place, and fingerprints of the files of a split.

`open_split` copies parquet files to the cache of `datasets`, which is fast for random access. Stages of a caption build
read each file once, in order, so `open_in_place` does without the copy.
"""

import bisect
import hashlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Features
from tqdm.auto import tqdm

from caption_data.file_tables import METADATA_SUFFIXES
from caption_data.sources import PARQUET_BATCH_ROWS, Split, open_parquet, open_split

SAMPLE_COUNT, SAMPLE_BYTES = 64, 4096  # samples, evenly spread over a large file, that its fingerprint covers


@dataclass(eq=False)
class ParquetSplit(Split):
    """A split of parquet files that are read in place, a few rows at a time.

    Fast for passes in order, slow for random access. Opening reads no rows, so that damage in them is reported by the
    code that reads them.
    """

    def __post_init__(self) -> None:
        self._row_groups: list[tuple[Path, int, int]] = []  # file, index and number of rows of each row group
        schema = None
        for path in tqdm(self.paths, desc=f"Parquet files, {self.display_name}", unit="file", leave=False):
            with open_parquet(path) as file:
                schema = file.schema_arrow if schema is None else schema
                if not file.schema_arrow.equals(schema):
                    raise ValueError(f"{path} and {self.paths[0]} must have the same columns and types.")
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._row_groups += [(path, group, size) for group, size in enumerate(sizes)]
        # First row of each row group, and the end of the last group.
        self._row_group_starts = list(itertools.accumulate((size for *_, size in self._row_groups), initial=0))
        self._features = Features.from_arrow_schema(schema)

    @property
    def features(self) -> Features:
        """Types of the columns, from the schema of the files."""
        return self._features

    def __len__(self) -> int:
        return self._row_group_starts[-1]

    def row(self, index: int) -> dict[str, Any]:
        """Return row `index`, counted from 0."""
        return next(self.rows(index))

    def rows(self, start: int = 0, column_names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over the rows from row `start` on, with only the columns `column_names` (default: all columns)."""
        if start >= len(self):
            return
        first = bisect.bisect_right(self._row_group_starts, start) - 1
        to_skip = start - self._row_group_starts[first]  # rows of the first row group before `start`
        columns = None if column_names is None else list(column_names)
        for path, groups in itertools.groupby(self._row_groups[first:], key=lambda group: group[0]):
            numbers = [number for _, number, _ in groups]
            with open_parquet(path) as file:
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=numbers, columns=columns):
                    rows = batch.slice(min(to_skip, len(batch))).to_pylist()
                    to_skip -= len(batch) - len(rows)
                    for row in rows:
                        image = row.get(self.image_column)
                        if isinstance(image, bytes | str):  # parquet files of other tools hold plain bytes or paths
                            kind = "path" if isinstance(image, str) else "bytes"
                            row[self.image_column] = {"bytes": None, "path": None, kind: image}
                        yield row


open_in_place = partial(open_split, parquet_type=ParquetSplit)  # reads parquet files without a copy in the cache


def source_fingerprint(source: Split) -> str:
    """Return a BLAKE2b-128 hex digest of the content of a split, which does not depend on the folder of its files.

    Large files are digested by their size and by `SAMPLE_COUNT` samples. For saved datasets and datasets of the Hub,
    this is the fingerprint of `datasets`.
    """
    if not source.paths:
        return str(source.data._fingerprint)
    digest = hashlib.blake2b(digest_size=16)
    for path in tqdm(source.paths, desc="Fingerprint", unit="file", leave=False):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            # Metadata files are digested whole: a corrected caption may change a single byte.
            is_whole = path.suffix in METADATA_SUFFIXES or size <= SAMPLE_COUNT * SAMPLE_BYTES
            if is_whole:
                hashlib.file_digest(file, lambda: digest)
            for number in range(0 if is_whole else SAMPLE_COUNT):  # the last sample includes the footer of the file
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLE_COUNT - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
