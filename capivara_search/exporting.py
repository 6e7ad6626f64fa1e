"""The rows of an index as a file for other programs.

    export_rows(table, "fotos.parquet")  # with the vectors
    export_rows(table, "fotos.csv")      # without

Thumbnails stay in the index. A text that a spreadsheet would run stands in CSV behind a single quote.
"""

import os
import tempfile
from datetime import datetime
from pathlib import Path

import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from capivara_common.files import UMASK, check_output_file, no_space_left
from capivara_search.show import write_csv
from capivara_search.table import PictureTable
from capivara_search.table_columns import THUMBNAIL

SUFFIXES = (".parquet", ".csv")


def export_rows(table: PictureTable, path: str | Path) -> int:
    """Write all rows to a file, in one piece; returns how many there are.

    Args:
        table: of the index.
        path: of the file; one that is there is replaced.

    Raises:
        ValueError: another suffix than .parquet or .csv, or no file can be made there.
        OSError: no space left.
    """
    path = Path(path).expanduser().absolute()
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"The file to export to must end in {' or '.join(SUFFIXES)}, got {path.name}.")
    check_output_file(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        rows = _write(table, temporary, path.suffix.lower() == ".csv")
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if no_space_left(error):
            text = f"No space left for {path}; nothing was kept. Free some"
            raise OSError(getattr(error, "errno", None), text) from error
        raise
    return rows


def _write(table: PictureTable, temporary: str, as_csv: bool) -> int:
    columns = pa.schema(
        one.remove_metadata()
        for one in table.columns()
        if one.name != THUMBNAIL and not (as_csv and pa.types.is_fixed_size_list(one.type))
    )
    batches = (_readable(batch, as_csv) for batch in table.batches(columns.names))
    known = _readable(pa.RecordBatch.from_pylist([], columns), as_csv).schema
    rows = 0
    if as_csv:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            return write_csv(file, known.names, (row for batch in batches for row in batch.to_pylist()))
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
        if as_csv and pa.types.is_timestamp(column.type):
            column = column.cast(pa.string())
        columns[name] = column
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
