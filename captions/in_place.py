"""The rows that a stage reads: parquet files where they lie, all else as `caption_data.sources` opens it.

A stage passes over its rows once, in order. `datasets` would copy parquet files to its cache first, images included,
which for a large set is as much disk again a stage.
"""

import bisect
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from datasets import Features
from tqdm.auto import tqdm

from caption_data.sources import READ_ROWS, Split, open_split, opened_parquet

SAMPLED_PIECES, SAMPLED_BYTES = 64, 4096  # of a file, evenly spread, for the fingerprint of a split


@dataclass(eq=False)
class ParquetSplit(Split):
    """A split whose rows are read a few at a time: good for few passes in order, slow for rows here and there.

    No row is read when it is opened, so that damage in the first ones is told by whoever reads them.
    """

    groups: list[tuple[Path, int, int]] = field(init=False)  # file, number and rows of each row group
    starts: list[int] = field(init=False)  # row that each begins with, and the end

    def __post_init__(self) -> None:
        self.groups, schema = [], None
        for path in tqdm(self.paths, desc=f"Parquet files, {self.where}", unit="file", leave=False):
            with opened_parquet(path) as file:
                schema = file.schema_arrow if schema is None else schema
                if not file.schema_arrow.equals(schema):
                    raise ValueError(f"{path} has other columns than {self.paths[0]}; make them alike.")
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self.groups += [(path, group, size) for group, size in enumerate(sizes)]
        self.starts = list(itertools.accumulate((size for *_, size in self.groups), initial=0))
        self._features = Features.from_arrow_schema(schema)

    @property
    def features(self) -> Features:
        """Of the schema of the files."""
        return self._features

    def __len__(self) -> int:
        return self.starts[-1]

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`, from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.where} has {len(self)} rows, there is no row {index}.")
        return next(self.rows(index))

    def rows(self, start: int = 0, only: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows from row `start` on, with none but the columns `only`."""
        if start >= len(self):
            return
        first = bisect.bisect_right(self.starts, start) - 1
        surplus = start - self.starts[first]  # rows of the first group that come before
        for path, groups in itertools.groupby(self.groups[first:], key=lambda group: group[0]):
            numbers, columns = [number for _, number, _ in groups], None if only is None else list(only)
            with opened_parquet(path) as file:
                for batch in file.iter_batches(READ_ROWS, row_groups=numbers, columns=columns):
                    rows = batch.slice(min(surplus, len(batch))).to_pylist()
                    surplus -= len(batch) - len(rows)
                    for row in rows:
                        image = row.get(self.image_column)
                        if isinstance(image, bytes | str):  # of files that others wrote
                            is_path = isinstance(image, str)
                            image = {"bytes": None if is_path else image, "path": image if is_path else None}
                            row[self.image_column] = image
                        yield row


open_in_place = partial(open_split, parquet=ParquetSplit)  # of parquet files without a copy


def fingerprint(source: Split) -> str:
    """Hex digest of the content, the same wherever the files lie.

    It is cheap: of a large file its size and pieces all over it, of a data set of `datasets` the fingerprint that the
    library keeps.
    """
    if not source.paths:
        return str(source.data._fingerprint)
    digest = blake2b(digest_size=16)
    for path in tqdm(source.paths, desc="Fingerprint", unit="file", leave=False):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            if path.suffix == ".jsonl" or size <= SAMPLED_PIECES * SAMPLED_BYTES:  # a list of captions: as a whole
                while data := file.read(1 << 20):
                    digest.update(data)
                continue
            for piece in range(SAMPLED_PIECES):  # the first and the last one included, where footers are
                file.seek((size - SAMPLED_BYTES) * piece // (SAMPLED_PIECES - 1))
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
