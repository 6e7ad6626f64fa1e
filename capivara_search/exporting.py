"""The rows of an index as a file for other programs.

Thumbnails stay in the index. A text that a spreadsheet would run stands in CSV behind a single quote.
"""

from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetWriter

from capivara_common.files import check_output_file, whole_file
from capivara_search.show import write_csv
from capivara_search.table import PictureTable
from capivara_search.table_columns import LOOK, THUMBNAIL
from capivara_search.words import failure


def export_rows(table: PictureTable, path: str | Path) -> int:
    """Write all rows to a file, in one piece, in place of one that is there; returns how many there are.

    Raises ValueError: another suffix than .parquet or .csv, or no file can be made there.
    """
    path = Path(path).expanduser().absolute()
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise failure(ValueError, "bad_suffix", path=path.name)
    check_output_file(path)
    with whole_file(path) as temporary:
        return _write(table, str(temporary), path.suffix.lower() == ".csv")


def _write(table: PictureTable, temporary: str, as_csv: bool) -> int:
    columns = pa.schema(
        one.remove_metadata()
        for one in table.columns()
        if one.name not in (THUMBNAIL, LOOK) and not (as_csv and pa.types.is_fixed_size_list(one.type))
    )
    batches = (_readable(batch, as_csv) for batch in table.batches(columns.names))
    known = _readable(pa.RecordBatch.from_pylist([], columns), as_csv).schema
    if as_csv:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            return write_csv(file, known.names, (row for batch in batches for row in batch.to_pylist()))
    rows = 0
    with ParquetWriter(temporary, known) as writer:
        for batch in batches:
            writer.write(batch)
            rows += batch.num_rows
    return rows


def _readable(batch: pa.RecordBatch, as_csv: bool) -> pa.RecordBatch:
    """Times as times, in CSV as Arrow writes them, and vectors in float32, which every reader of parquet knows."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name == "mtime_ns":
            times = [datetime.fromtimestamp(ns.as_py() / 1e9).replace(microsecond=0) for ns in column]
            name, column = "modified", pa.array(times, pa.timestamp("s"))
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(pa.float32(), column.type.list_size))
        columns[name] = column
    columns["date"] = pc.coalesce(columns["taken"], columns["modified"].cast(pa.timestamp("us")))
    columns["date_source"] = pc.if_else(columns["taken"].is_valid(), "camera", "file")
    for name, column in columns.items():
        if as_csv and pa.types.is_timestamp(column.type):
            columns[name] = column.cast(pa.string())
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
