"""Export the rows of an index to a Parquet or CSV file for other programs.

Thumbnails are not exported. Color signatures, which are used only to find near-duplicates, are not exported either. In
CSV files, a text that a spreadsheet would treat as a formula gets a single quote at the beginning.
"""

from datetime import datetime
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetWriter, read_metadata

from capivara_common.files import atomic_file, check_output_file
from capivara_search.csv_output import write_csv
from capivara_search.messages import make_error_from_code
from capivara_search.table import COLOR_SIGNATURE_COLUMN, THUMBNAIL_COLUMN, PictureTable


def export_all_rows(table: PictureTable, path: str | Path) -> int:
    """Write all rows of an index to a Parquet or CSV file, with one row of metadata per picture.

    An existing file is replaced only when the new file is complete.

    Args:
        table: LanceDB tables of the index.
        path: File to write. Its suffix selects the format: .parquet for Parquet with vectors, .csv for CSV without
            vectors.

    Returns:
        The number of rows that were written.

    Raises:
        ValueError: If the suffix is neither .parquet nor .csv, or the file can't be created.
    """
    path = Path(path).expanduser().absolute()
    is_csv = path.suffix.lower() == ".csv"
    if not is_csv and path.suffix.lower() != ".parquet":
        raise make_error_from_code(ValueError, "bad_suffix", path=path.name)
    check_output_file(path)
    convert = partial(_to_export_columns, as_csv=is_csv)
    names = [name for name in table.columns().names if name not in (THUMBNAIL_COLUMN, COLOR_SIGNATURE_COLUMN)]
    schema, batches = convert(table.rows(names, "false")).schema, map(convert, table.batches(names))
    with atomic_file(path) as temporary:
        if is_csv:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                return write_csv(file, schema.names, (row for batch in batches for row in batch.to_pylist()))
        with ParquetWriter(temporary, schema) as writer:
            for batch in batches:
                writer.write(batch)
        return read_metadata(temporary).num_rows


def _to_export_columns(rows: pa.Table | pa.RecordBatch, as_csv: bool) -> pa.Table | pa.RecordBatch:
    """Convert rows of an index to the columns of an exported file.

    The columns change as follows:

    - `modified` (timestamp) replaces `mtime_ns` (nanoseconds).
    - `date` is added: the EXIF date of the picture if there is one, otherwise the modification time.
    - `date_source` is added: "camera" or "file", depending on where `date` comes from.
    - For Parquet, vectors become float32, because not every reader supports float16.
    - For CSV, timestamps become strings, and vectors are dropped.

    Args:
        rows: Rows with columns of the table `pictures`, at least `mtime_ns` and `taken`.
        as_csv: True for a CSV file, False for a Parquet file.

    Returns:
        The same rows with the columns of the exported file. The result is a table if `rows` is a table, otherwise a
        record batch.
    """
    modified = pa.array([datetime.fromtimestamp(ns // 10**9) for ns in rows["mtime_ns"].to_pylist()], pa.timestamp("s"))
    rows = rows.set_column(rows.schema.get_field_index("mtime_ns"), "modified", modified)
    rows = rows.append_column("date", pc.coalesce(rows["taken"], modified.cast(pa.timestamp("us"))))
    rows = rows.append_column("date_source", pc.if_else(rows["taken"].is_valid(), "camera", "file"))
    types = {column.name: column.type for column in rows.schema}
    for name, column_type in list(types.items()):
        if pa.types.is_fixed_size_list(column_type):
            types[name] = None if as_csv else pa.list_(pa.float32(), column_type.list_size)
        elif pa.types.is_timestamp(column_type) and as_csv:
            types[name] = pa.string()
    columns = pa.schema([(name, column_type) for name, column_type in types.items() if column_type])
    return rows.select(columns.names).cast(columns)
