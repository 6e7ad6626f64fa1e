"""The rows of an index as a file for other programs.

Thumbnails stay in the index. A text that a spreadsheet would run stands in CSV behind a single quote.
"""

from datetime import datetime
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetWriter

from capivara_common.files import atomic_file, check_output_file
from capivara_search.messages import localized_error
from capivara_search.table import COLOR_SIGNATURE_COLUMN, THUMBNAIL_COLUMN, PictureTable
from capivara_search.terminal import write_csv


def export_rows(table: PictureTable, path: str | Path) -> int:
    """Write all rows to a file, in one piece, in place of one that is there; returns how many there are.

    Raises ValueError: another suffix than .parquet or .csv, or no file can be made there.
    """
    path = Path(path).expanduser().absolute()
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise localized_error(ValueError, "bad_suffix", path=path.name)
    check_output_file(path)
    readable = partial(_to_export_rows, as_csv=path.suffix.lower() == ".csv")
    names = [name for name in table.columns().names if name not in (THUMBNAIL_COLUMN, COLOR_SIGNATURE_COLUMN)]
    known, batches = readable(table.rows(names, "false")).schema, map(readable, table.batches(names))
    with atomic_file(path) as temporary:
        if path.suffix.lower() == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                return write_csv(file, known.names, (row for batch in batches for row in batch.to_pylist()))
        number = 0
        with ParquetWriter(temporary, known) as writer:
            for batch in batches:
                writer.write(batch)
                number += batch.num_rows
        return number


def _to_export_rows(rows: pa.Table | pa.RecordBatch, as_csv: bool) -> pa.Table | pa.RecordBatch:
    """Times as times, in CSV as Arrow writes them, without vectors; these in float32, which every reader knows."""
    modified = pa.array([datetime.fromtimestamp(ns // 10**9) for ns in rows["mtime_ns"].to_pylist()], pa.timestamp("s"))
    rows = rows.set_column(rows.schema.get_field_index("mtime_ns"), "modified", modified)
    rows = rows.append_column("date", pc.coalesce(rows["taken"], modified.cast(pa.timestamp("us"))))
    rows = rows.append_column("date_source", pc.if_else(rows["taken"].is_valid(), "camera", "file"))
    types = {one.name: one.type for one in rows.schema}
    for name, kind in list(types.items()):
        if pa.types.is_fixed_size_list(kind):
            types[name] = None if as_csv else pa.list_(pa.float32(), kind.list_size)
        elif pa.types.is_timestamp(kind) and as_csv:
            types[name] = pa.string()
    columns = pa.schema([(name, kind) for name, kind in types.items() if kind])
    return rows.select(columns.names).cast(columns)
