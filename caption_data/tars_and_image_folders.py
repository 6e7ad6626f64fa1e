"""Read datasets that are WebDataset tars or image folders with a metadata file, without copying their images.

A dataset becomes a table with the columns of its JSON or CSV files, and a column with the position of each image: its
path or, in a tar, its offset and size. The table is cached until a file changes. The image bytes stay in the original
files.
"""

import csv
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from capivara_common.files import json_digest
from capivara_common.image_files import MAX_DETAIL_CHARACTERS
from caption_data.rows import CAPTION_COLUMN_RE, CAPTIONS_FEATURE, SIMILARITY_COLUMN_RE, replace_surrogates

METADATA_SUFFIXES = (".jsonl", ".csv")  # suffixes of metadata files, which list the images and captions of a folder
IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
MAX_ROW_JSON_BYTES = 1_000_000  # largest size of one row; twenty captions with similarities need less than 10 kB
# {type of a JSON value: feature (column type of `datasets`)}
JSON_FEATURES = {str: Value("string"), bool: Value("bool"), int: Value("int64"), float: Value("float64")}
SCHEMA_SAMPLE_ROWS = 100  # JSON and CSV have no schema, so column types are inferred from the first 100 rows
# Version of the tables, a part of their cache key. Increase it if a code change makes different rows from the same
# files, so that cached tables are built again.
FILE_TABLE_VERSION = 3
# Column of the cached table that records damaged files. After the last readable row of a damaged file, the table has an
# additional row, whose value in this column describes the damage. In all other rows, the value is null.
DAMAGE_COLUMN = "damaged archive"
IMAGE_FIELDS = {"bytes": Value("binary"), "path": Value("string")}  # fields of an image that is not decoded yet
# Additional fields of an image in a plain tar: path of the tar, and offset and size of the image in bytes.
ARCHIVE_FIELDS = {"archive": Value("string"), "offset": Value("int64"), "size": Value("int64")}


def load_rows_and_list_damaged_files(paths: list[Path], image_column: str) -> tuple[Dataset, list[tuple[int, str]]]:
    """Load the rows of tars or image folders into one table, and list the files that are damaged.

    The first `SCHEMA_SAMPLE_ROWS` rows determine the column types. A value of another type becomes None.

    Args:
        paths: Only uncompressed tars, only `metadata.jsonl` files or only `metadata.csv` files.
        image_column: Name of the image column, which has the path of each image or its position in a tar.

    Returns:
        The tuple (table, damages). For each damaged file, `damages` has a tuple (number of table rows before the
        damage, description).

    Raises:
        ValueError: If a tar is compressed, or a CSV file has an error.
    """
    # Images in a compressed tar can't be read by their offset.
    if compressed := [path for path in paths if path.suffix not in (".tar", *METADATA_SUFFIXES)]:
        raise ValueError(
            f"{compressed[0]} is compressed; only uncompressed tars can be read. Decompress it to a .tar file."
        )
    sample = list(itertools.islice(_iter_rows(paths, image_column), SCHEMA_SAMPLE_ROWS))
    if not sample:
        return Dataset.from_dict({image_column: []}), []
    image_fields = IMAGE_FIELDS if paths[0].suffix in METADATA_SUFFIXES else IMAGE_FIELDS | ARCHIVE_FIELDS
    names = dict.fromkeys(name for row in sample for name in row if name not in (image_column, DAMAGE_COLUMN))
    column_features = {name: _infer_feature(name, [row.get(name) for row in sample]) for name in names}
    column_features = {name: kind for name, kind in column_features.items() if kind is not None}
    features = Features({image_column: image_fields} | column_features | {DAMAGE_COLUMN: JSON_FEATURES[str]})
    states = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    table = Dataset.from_generator(
        _iter_table_rows,
        features=features,
        gen_kwargs={"paths": paths, "image_column": image_column, "features": features},
        fingerprint=json_digest([FILE_TABLE_VERSION, image_column, states, repr(features)]),
    )
    damage, rows = table.data.column(DAMAGE_COLUMN), table.remove_columns(DAMAGE_COLUMN)
    if damage.null_count == len(table):
        return rows, []
    places = np.flatnonzero(pc.is_valid(damage)) - np.arange(len(table) - damage.null_count)
    rows = rows.select(np.flatnonzero(pc.is_null(damage)))
    return rows, list(zip(places.tolist(), damage.drop_null().to_pylist(), strict=True))


def _iter_tar_sample_positions(path: Path) -> Iterator[dict[str, tuple[str, int, int]]]:
    """Iterate over the samples of a WebDataset tar, each as the positions of its members (files in the tar).

    A sample is a group of consecutive members that have the same folder and the same file name up to the first dot. A
    member whose extension is already in the sample begins a new sample.

    Args:
        path: An uncompressed tar.

    Yields:
        `{kind: (name of the member, offset in bytes, size in bytes)}` for each sample. `kind` is "image", "json" or
        "cls"; members of other kinds are skipped.

    Raises:
        tarfile.ReadError: If the archive is damaged. The samples before the damage are yielded first.
    """
    key, extensions, sample = None, set(), {}
    try:
        for name, offset, size in _iter_tar_member_positions(path):
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            if (folder, stem) != key or extension in extensions:
                if sample:
                    yield sample
                key, extensions, sample = (folder, stem), set(), {}
            extensions.add(extension)
            kind = "image" if extension in IMAGE_EXTENSIONS else extension
            # Skip hidden files, whose names begin with a dot (empty stem), for example `._a.jpg` of macOS.
            if stem and kind in ("image", "json", "cls"):
                sample.setdefault(kind, (name, offset, size))
    except tarfile.TarError:
        if len(sample) > 1:
            yield sample
        raise
    if sample:
        yield sample


def _infer_feature(name: str, values: list[Any]) -> Any:
    """Infer the feature (column type of `datasets`) of a column from its name and some of its values.

    Caption and similarity columns are recognized by their name. The other columns get the most common type of their
    values, or a list of that type if any value is a list.

    Args:
        name: Name of the column.
        values: Values of the column in the sample rows.

    Returns:
        The feature. None if the most common type is not a text, number or bool; the column is then left out.
    """
    if CAPTION_COLUMN_RE.fullmatch(name):
        return CAPTIONS_FEATURE
    if SIMILARITY_COLUMN_RE.fullmatch(name):
        return List(JSON_FEATURES[float])
    lists = [value for value in values if isinstance(value, list)]
    counts = Counter(type(item) for item in (itertools.chain(*lists) if lists else values) if item is not None)
    most_common = counts.most_common(1)[0][0] if counts else str
    kind = JSON_FEATURES.get(float if most_common is int and float in counts else most_common)
    return List(kind) if lists and kind else kind


def _cast_value_or_none(value: Any, feature: Any) -> Any:
    """Return a JSON value in the type of its column, or None if the value does not have this type.

    A single text becomes a list with one text if the column holds lists.

    Args:
        value: Value from a JSON or CSV file.
        feature: Feature (column type of `datasets`) of the column.
    """
    if isinstance(feature, List):
        values = [value] if isinstance(value, str) else value
        return [_cast_value_or_none(item, feature.feature) for item in values] if isinstance(values, list) else None
    if JSON_FEATURES.get(type(value)) != feature and (type(value), feature) != (int, JSON_FEATURES[float]):
        return None
    return replace_surrogates(value) if isinstance(value, str) else value


def _iter_table_rows(paths: list[Path], image_column: str, features: Features) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of the table, with all values converted to the types of their columns.

    A row that describes the damage of a file has the description in `DAMAGE_COLUMN`, and None in all other columns.

    Args:
        paths: Files of one form, as for `load_rows_and_list_damaged_files`.
        image_column: Name of the image column in the table.
        features: Types of all columns of the table.
    """
    for row in _iter_rows(paths, image_column):
        image = row.pop(image_column, None)
        values = {name: _cast_value_or_none(row.get(name), kind) for name, kind in features.items()}
        yield values | {image_column: image}


def _iter_rows(paths: list[Path], image_column: str) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of all files, as dicts `{column name: JSON value}`.

    The value of `image_column` is None, or a dict with the position of the image: its path and, in a tar, also the path
    of the tar, the offset and the size. If a tar or JSON Lines file is damaged, its last row is
    `{DAMAGE_COLUMN: description of the damage}`.

    Raises:
        ValueError: If a CSV file has an error.
    """
    for path in paths:
        read = _iter_metadata_rows if path.suffix in METADATA_SUFFIXES else _iter_tar_rows
        try:
            for row, image in read(path):
                row = row if isinstance(row, dict) else {}  # only a JSON object has columns
                yield {name: row[name] for name in row if name != DAMAGE_COLUMN} | {image_column: image}
        # For a damaged header, `tarfile` also raises ValueError, LookupError and OverflowError.
        except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:
            # Stop at an error in a CSV file. People write CSV files by hand, so they should correct a typo, instead of
            # losing all rows after it without noticing.
            if path.suffix == ".csv":
                raise ValueError(f"{path}: {error}.") from None
            ending = "; this line and all later lines are skipped" if path.suffix == ".jsonl" else ""
            yield {DAMAGE_COLUMN: replace_surrogates(f"{path}: {error}{ending}"[:MAX_DETAIL_CHARACTERS])}


def _iter_tar_rows(path: Path) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Iterate over the samples of an uncompressed tar.

    Yields:
        The tuple (row, image) for each sample. `row` is the JSON value of the sample. If the sample has a class index,
        `row` is a dict that contains it as "cls". `image` is `{"path": name in the tar, "archive": path of the tar,
        "offset": first byte, "size": number of bytes}`; None if the sample has no image.
    """
    archive = os.path.abspath(path)
    with path.open("rb") as file:
        for sample in _iter_tar_sample_positions(path):
            image, row = None, {}
            if "image" in sample:
                name, offset, size = sample["image"]
                image = {"path": replace_surrogates(name), "archive": archive, "offset": offset, "size": size}
            if "json" in sample:
                row = _read_json_at_offset(file, *sample["json"][1:])
            if "cls" in sample:  # class index of the image, in tars that the tool clip-benchmark writes
                row = (row if isinstance(row, dict) else {}) | {"cls": _read_json_at_offset(file, *sample["cls"][1:])}
            yield row, image


def _iter_metadata_rows(path: Path) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Iterate over the rows of a `metadata.jsonl` or `metadata.csv` file.

    Yields:
        The tuple (row, image) for each row. `row` is the row without the column `file_name`. `image` is
        `{"path": absolute path or URL}`, made from `file_name`, a path relative to the folder of the metadata file;
        None if the row has no `file_name`.
    """
    for row in (_iter_csv_rows if path.suffix == ".csv" else _iter_json_rows)(path):
        image, name = None, row.pop("file_name", None) if isinstance(row, dict) else None
        if isinstance(name, str):  # a URL is kept unchanged; opening it is refused later
            image = {"path": replace_surrogates(name if "://" in name else os.path.abspath(path.parent / name))}
        yield row, image


def _iter_json_rows(path: Path) -> Iterator[Any]:
    """Iterate over the JSON values of the lines of a JSON Lines file.

    An invalid line yields None, and blank lines are skipped. Raises ValueError if a line is longer than
    `MAX_ROW_JSON_BYTES`.
    """
    with path.open("rb") as file:
        yield from map(_parse_json, filter(bytes.strip, _iter_lines_with_length_check(file)))


def _iter_csv_rows(path: Path) -> Iterator[dict[str, str | None]]:
    """Iterate over the rows of a CSV file as dicts `{column name: text}`. The value of an empty cell is None.

    Raises:
        ValueError: If the file is not UTF-8 or not valid CSV, a line is too long, or a row has more cells than the
            first line. Also if the first line does not name the column `file_name`, or names a column twice.
    """
    first_line = 1  # number of the line in which the current row begins; a quoted cell may span several lines
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(_iter_lines_with_length_check(file), strict=True)
        try:
            names = next(rows, [])
            if "file_name" not in names:
                raise ValueError(
                    f"the first line must name the columns, separated by commas, and one must be file_name, got {names}"
                )
            if repeated := [name for name, number in Counter(names).items() if number > 1]:
                raise ValueError(
                    f"the first line names the column {repeated[0]!r} more than once; a cell holds one caption, so "
                    "use metadata.jsonl for several captions per image"
                )
            first_line = rows.line_num + 1
            for cells in rows:
                if len(cells) > len(names):
                    raise ValueError(
                        f"line {first_line} has more cells than the first line; quote texts that contain commas"
                    )
                if cells:  # skip blank lines
                    yield {name: cell or None for name, cell in itertools.zip_longest(names, cells)}
                first_line = rows.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"the row that begins in line {first_line} is not valid CSV ({error}); close each quote, and double "
                "quotes inside a quoted text"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError("the file must be UTF-8; in a spreadsheet, save it as CSV UTF-8") from error


def _iter_lines_with_length_check(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Iterate over the lines of an open text or binary file.

    Raises ValueError if a line is longer than `MAX_ROW_JSON_BYTES`, so that a file with an endless line, for example a
    sparse file, can't fill the memory.
    """
    number = 0
    while line := file.readline(MAX_ROW_JSON_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_JSON_BYTES:
            raise ValueError(f"line {number} has more than {MAX_ROW_JSON_BYTES:,} bytes")
        yield line


def _iter_tar_member_positions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Iterate over the regular files in an uncompressed tar, each as (name, offset in bytes, size in bytes).

    Raises tarfile.ReadError if the tar is damaged. This function checks for damage itself, because `tarfile` mistakes
    most kinds of damage for the end of the archive.
    """
    length = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # otherwise tarfile would keep all members in memory
            if not member.offset_data <= member.offset_data + member.size <= length:
                raise tarfile.ReadError(f"the tar is cut off at byte {length}, within {member.name!r}")
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(
                f"at byte {tar.offset} of {length} there is neither a file header nor the end mark of the archive"
            )


def _read_json_at_offset(file: BinaryIO, offset: int, length: int) -> Any:
    """Read and parse a JSON value that is stored inside a file, for example a member of a tar.

    Args:
        file: The file, opened in binary mode.
        offset: Position of the first byte of the value.
        length: Number of bytes of the value.

    Returns:
        The value; None if it is not valid JSON or longer than `MAX_ROW_JSON_BYTES`.
    """
    file.seek(offset)
    # Read one byte more than the limit, so that `_parse_json` notices a value that is too long.
    return _parse_json(file.read(min(length, MAX_ROW_JSON_BYTES + 1)))


def _parse_json(data: bytes) -> Any:
    """Parse a JSON value. An integer that does not fit into 64 bits becomes None.

    Returns None if the value is not valid JSON or longer than `MAX_ROW_JSON_BYTES`.
    """
    try:
        return json.loads(data, parse_int=_parse_int64_or_none) if len(data) <= MAX_ROW_JSON_BYTES else None
    except (ValueError, RecursionError):
        return None


def _parse_int64_or_none(digits: str) -> int | None:
    """Convert decimal digits to an integer; return None if it does not fit into 64 bits, which Arrow requires."""
    number = int(digits)
    return number if -(2**63) <= number < 2**63 else None
