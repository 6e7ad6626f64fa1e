"""Tables of the rows of WebDataset tars and of image folders with a metadata file, which are read in place.

`open_split` builds such a table for each split. It holds the columns of the JSON or CSV and the position of each image;
the cache of `datasets` keeps it until a file changes.
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

from capivara_common.image_files import MAX_DETAIL_CHARACTERS
from caption_data.rows import CAPTION_COLUMN_RE, CAPTIONS_FEATURE, SIMILARITY_COLUMN_RE, json_digest, replace_surrogates

METADATA_SUFFIXES = (".jsonl", ".csv")  # files that list images with their captions
IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
MAX_ROW_JSON_BYTES = 1_000_000  # limit for one row; twenty captions with similarities need less than 10 kB
JSON_FEATURES = {str: Value("string"), bool: Value("bool"), int: Value("int64"), float: Value("float64")}
SCHEMA_SAMPLE_ROWS = 100  # rows that the types of columns are inferred from, because no schema declares them
# Part of the fingerprint of a table. Increase it when the code makes other rows from the same files.
FILE_TABLE_VERSION = 3
# Column of the table for a row that stands for the rest of a damaged archive; it says what is wrong.
DAMAGE_COLUMN = "damaged archive"
IMAGE_FIELDS = {"bytes": Value("binary"), "path": Value("string")}  # an image that `datasets` has not decoded
# Where the image is in a plain tar; offset and size in bytes.
ARCHIVE_FIELDS = {"archive": Value("string"), "offset": Value("int64"), "size": Value("int64")}


def build_file_table(paths: list[Path], image_column: str) -> tuple[Dataset, list[tuple[int, str]]]:
    """Build the table of rows of tars, or of image folders with a metadata file.

    The columns are those of the JSON or CSV; the image column holds the position of the image. The types of the columns
    are inferred from the first rows; a value of another type counts as missing.

    Args:
        paths: Plain tars, or metadata files of one form.
        image_column: Name of the image column in the table.

    Returns:
        The rows, and for each archive that ends too early: the number of rows before the damage, and what is wrong.

    Raises:
        ValueError: If a tar is compressed. Its members cannot be read by their offset.
    """
    if compressed := [path for path in paths if path.suffix not in (".tar", *METADATA_SUFFIXES)]:
        raise ValueError(
            f"{compressed[0]} is compressed; only plain tars can be read in place. Decompress it to a .tar file."
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


def iter_samples(path: Path) -> Iterator[dict[str, tuple[str, int, int]]]:
    """Iterate over the samples of a WebDataset tar.

    Consecutive members with the same folder, and the same name up to the first dot, are one sample. A repeated
    extension begins a new sample.

    Args:
        path: A plain tar.

    Yields:
        The members "image", "json" and "cls" of a sample, as far as they exist, each as (name, offset, size) in bytes.

    Raises:
        tarfile.ReadError: If the archive is damaged, after the samples before the damage.
    """
    key, extensions, sample = None, set(), {}
    try:
        for name, offset, size in _iter_tar_members(path):
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            if (folder, stem) != key or extension in extensions:
                if sample:
                    yield sample
                key, extensions, sample = (folder, stem), set(), {}
            extensions.add(extension)
            kind = "image" if extension in IMAGE_EXTENSIONS else extension
            if stem and kind in ("image", "json", "cls"):  # files without a stem are hidden files, for example of macOS
                sample.setdefault(kind, (name, offset, size))
    except tarfile.TarError:
        if len(sample) > 1:
            yield sample
        raise
    if sample:
        yield sample


def _infer_feature(name: str, values: list[Any]) -> Any:
    """Return the feature of a column, from its name or the most common type of its values.

    Returns None if the type cannot be stored. A column with a list in any row is a column of lists.
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


def _cast_value(value: Any, feature: Any) -> Any:
    """Convert a JSON value to the feature of its column; None if it has another type."""
    if isinstance(feature, List):
        values = [value] if isinstance(value, str) else value
        return [_cast_value(item, feature.feature) for item in values] if isinstance(values, list) else None
    if JSON_FEATURES.get(type(value)) != feature and (type(value), feature) != (int, JSON_FEATURES[float]):
        return None
    return replace_surrogates(value) if isinstance(value, str) else value


def _iter_table_rows(paths: list[Path], image_column: str, features: Features) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of the table, including the rows that stand for damage."""
    for row in _iter_rows(paths, image_column):
        image = row.pop(image_column, None)
        values = {name: _cast_value(row.get(name), kind) for name, kind in features.items() if name != image_column}
        yield values | {image_column: image}


def _iter_rows(paths: list[Path], image_column: str) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of all files. A damaged tar or JSON file ends with a row that holds the damage.

    Raises ValueError if a CSV file has an error.
    """
    for path in paths:
        read = _iter_metadata_rows if path.suffix in METADATA_SUFFIXES else _iter_tar_rows
        try:
            for row, image in read(path):
                row = row if isinstance(row, dict) else {}  # otherwise all columns count as missing
                yield {name: row[name] for name in row if name != DAMAGE_COLUMN} | {image_column: image}
        except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:  # tarfile, for a damaged header
            if path.suffix == ".csv":  # people write these files: a typo must not silently drop the rest of the dataset
                raise ValueError(f"{path}: {error}.") from None
            ending = "; this line and all later lines are left out" if path.suffix == ".jsonl" else ""
            yield {DAMAGE_COLUMN: replace_surrogates(f"{path}: {error}{ending}"[:MAX_DETAIL_CHARACTERS])}


def _iter_tar_rows(path: Path) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Iterate over the JSON value and the image position of each sample of a tar."""
    with path.open("rb") as file:
        for sample in iter_samples(path):
            image, row = None, {}
            if "image" in sample:
                name, offset, size = sample["image"]
                image = {
                    "path": replace_surrogates(name),
                    "archive": os.path.abspath(path),
                    "offset": offset,
                    "size": size,
                }
            if "json" in sample:
                row = _read_json_at(file, *sample["json"][1:])
            if "cls" in sample:  # class index, as in the tars of clip-benchmark
                row = (row if isinstance(row, dict) else {}) | {"cls": _read_json_at(file, *sample["cls"][1:])}
            yield row, image


def _iter_metadata_rows(path: Path) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Iterate over the rows of a metadata file with their images.

    `file_name` is the path of the image, relative to the folder of the metadata file.
    """
    for row in (_iter_csv_rows if path.suffix == ".csv" else _iter_json_rows)(path):
        image, name = None, row.pop("file_name", None) if isinstance(row, dict) else None
        if isinstance(name, str):  # keep a URL as it is; opening it is refused later
            image = {"path": replace_surrogates(name if "://" in name else os.path.abspath(path.parent / name))}
        yield row, image


def _iter_json_rows(path: Path) -> Iterator[Any]:
    """Iterate over the JSON value of each line. Raises ValueError if a line is too long."""
    with path.open("rb") as file:
        yield from map(_parse_json, filter(bytes.strip, _iter_bounded_lines(file)))


def _iter_csv_rows(path: Path) -> Iterator[dict[str, str | None]]:
    """Iterate over the rows of a CSV file as dicts by column name; an empty cell is None.

    Raises ValueError if the file is not UTF-8, is not valid CSV, has a line that is too long, or if its first line does
    not name `file_name` or names a column twice.
    """
    first_line = 1  # line in which the current row begins; a quoted cell may span several lines
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(_iter_bounded_lines(file), strict=True)
        try:
            names = next(rows, [])
            if "file_name" not in names:
                raise ValueError(f"the first line must name the column file_name, columns apart by commas, got {names}")
            if repeated := [name for name, number in Counter(names).items() if number > 1]:
                raise ValueError(
                    f"the first line names the column {repeated[0]!r} more than once; a cell holds one caption, use "
                    "metadata.jsonl for several captions per image"
                )
            first_line = rows.line_num + 1
            for cells in rows:
                if len(cells) > len(names):
                    raise ValueError(f"line {first_line} has more cells than the first line; quote texts with commas")
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


def _iter_bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Iterate over the lines of a metadata file.

    Raises ValueError if a line is longer than `MAX_ROW_JSON_BYTES`: a sparse file could otherwise fill the memory.
    """
    number = 0
    while line := file.readline(MAX_ROW_JSON_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_JSON_BYTES:
            raise ValueError(f"line {number} has more than {MAX_ROW_JSON_BYTES:,} bytes")
        yield line


def _iter_tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Iterate over (name, offset, size) of the regular files of a tar. Raises tarfile.ReadError if the tar is damaged.

    `tarfile` alone takes most kinds of damage for the end of the archive.
    """
    length = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep all of them in memory
            if not member.offset_data <= member.offset_data + member.size <= length:
                raise tarfile.ReadError(f"cut off at byte {length}, within {member.name!r}")
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset} of {length}")


def _read_json_at(file: BinaryIO, offset: int, length: int) -> Any:
    """Read and parse the JSON value at a position of a file; None if it is invalid or too long."""
    file.seek(offset)
    # Read one byte more than the limit, so that `_parse_json` notices a value that is too long.
    return _parse_json(file.read(min(length, MAX_ROW_JSON_BYTES + 1)))


def _parse_json(data: bytes) -> Any:
    """Parse a JSON value; None if it is invalid or too long. Integers beyond 64 bits count as missing."""
    try:
        return json.loads(data, parse_int=_parse_integer) if len(data) <= MAX_ROW_JSON_BYTES else None
    except (ValueError, RecursionError):
        return None


def _parse_integer(digits: str) -> int | None:
    """Convert digits to an integer; None if it does not fit into 64 bits."""
    number = int(digits)
    return number if -(2**63) <= number < 2**63 else None
