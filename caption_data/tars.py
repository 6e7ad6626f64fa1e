"""Tars in WebDataset's layout and lists of images (`metadata.jsonl`) as a table that says where the images are.

    python -c "from caption_data.tars import samples; print(list(samples('shards/train-0000.tar')))"

The `Dataset` is made once, in the cache of `datasets`, and lasts until a tar or list has another size or time. Tars
stay where they are: nothing is extracted, nothing is unpickled. An image is its archive, offset and size, or the path
of a file; `capivara_common.image_files` reads it.
"""

import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from capivara_common.image_files import MAX_DETAIL
from caption_data.rows import CAPTION_COLUMN, CAPTIONS, NO_TEXTS, SIMILARITY_COLUMN, digest_of, storable

IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
COMPRESSED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd files begin
MAX_JSON_BYTES = 1_000_000  # of a row; twenty captions and their similarities have under 10 kB
NUMBERS = List(Value("float64"))
KINDS = {"texts": CAPTIONS, "numbers": NUMBERS} | {name: Value(name) for name in ("string", "bool", "int64", "float64")}
HEAD_ROWS = 100  # that columns are judged from, since nothing declares them
TABLE_VERSION = 2  # raise it when what the table holds of a row changes
DAMAGE = "damaged archive"  # column of the table: what is wrong with the rest of an archive, in a row of its own
PLACE = {"bytes": Value("binary"), "path": Value("string")}  # of an image, as `datasets` has it undecoded
IN_ARCHIVE = {"archive": Value("string"), "offset": Value("int64"), "size": Value("int64")}


def table_of_files(paths: list[Path], image_column: str) -> tuple[Dataset, list[tuple[int, str]]]:
    """The rows of tars or of lists of images: the columns of their JSON, and where the image is.

    Columns are judged by the first rows. What in a row is of another kind than its column counts as missing, and where
    that is a column of captions it is named in `NO_TEXTS`, which is empty where there is no JSON object at all.

    Returns:
        The rows, and of each archive that ends too early the number of rows before, and what is wrong with it.

    Raises:
        ValueError: a tar is compressed: its samples have no offset to be read at.
        OSError: a file can't be read.
    """
    for path in paths:
        with path.open("rb") as file:
            if file.read(8).startswith(COMPRESSED):
                raise ValueError(
                    f"{path} is compressed, and only plain tars can be read in place. Unpack it to a .tar."
                )
    head = list(itertools.islice(_rows(paths, image_column), HEAD_ROWS))
    if not head:
        return Dataset.from_dict({image_column: []}), []
    place = PLACE if paths[0].suffix == ".jsonl" else PLACE | IN_ARCHIVE
    features = {image_column: place} | _judged(head, {image_column, DAMAGE})
    features = Features(features | dict.fromkeys((NO_TEXTS, DAMAGE), Value("string")))
    states = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    table = Dataset.from_generator(
        _table_rows,
        features=features,
        gen_kwargs={"paths": paths, "image_column": image_column, "features": features},
        fingerprint=digest_of([TABLE_VERSION, image_column, states, repr(features)]),
    )
    damage, rows = table.data.column(DAMAGE), table.remove_columns(DAMAGE)
    if damage.null_count == len(table):
        return rows, []
    places = np.flatnonzero(pc.is_valid(damage)) - np.arange(len(table) - damage.null_count)
    rows = rows.select(np.flatnonzero(pc.is_null(damage)))
    return rows, list(zip(places.tolist(), damage.drop_null().to_pylist(), strict=True))


def samples(path: Path) -> Iterator[dict[str, tuple[str, int, int]]]:
    """Samples of a tar: "image", "json" and "cls", as far as there are, with the name, offset and size of each.

    Members in a row with one folder and one name up to its first dot are a sample; a repeated extension begins a new
    one. A sample that the end of a damaged archive may have cut is left out.

    Raises:
        tarfile.ReadError: the archive is damaged; the samples before the damage were given.
    """
    key, extensions, sample = None, set(), {}
    try:
        for name, offset, size in _members(path):
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            if (folder, stem) != key or extension in extensions:
                if sample:
                    yield sample
                key, extensions, sample = (folder, stem), set(), {}
            extensions.add(extension)
            kind = "image" if extension in IMAGE_EXTENSIONS else extension
            if stem and kind in ("image", "json", "cls"):  # files with no stem are hidden ones, such as macOS's
                sample.setdefault(kind, (name, offset, size))
    except tarfile.TarError:
        if len(sample) > 1:
            yield sample
        raise
    if sample:
        yield sample


def _judged(rows: list[dict[str, Any]], without: set[str]) -> dict[str, Any]:
    """Columns of rows out of JSON, by what most of them hold: texts, numbers, lists of one of these; no objects.

    A column with a list in any row is one of lists, and the columns of the authors' names are what these say.
    """
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, Counter())[_kind(value)] += 1
    features = {}
    for name, counts in found.items():
        kinds = [kind for kind, _ in counts.most_common() if kind != "null"]
        kind = next((kind for kind in kinds if kind in ("texts", "numbers")), [*kinds, "string"][0])
        kind = "float64" if kind == "int64" and "float64" in kinds else kind
        kind = "texts" if CAPTION_COLUMN.fullmatch(name) else kind
        kind = "numbers" if SIMILARITY_COLUMN.fullmatch(name) else kind
        if kind and name not in without:
            features[name] = KINDS[kind]
    return features


def _fitting(value: Any, feature: Any) -> Any:
    """A value out of JSON as its column has it; None where it is of another kind: then the row lacks it."""
    if feature == CAPTIONS:
        texts = [value] if isinstance(value, str) else value
        return [text and storable(text) for text in texts] if _kind(texts) == "texts" else None
    if feature == NUMBERS:
        fits = isinstance(value, list)
        return [number if _kind(number) in ("int64", "float64") else None for number in value] if fits else None
    if _kind(value) != feature.dtype and (_kind(value), feature.dtype) != ("int64", "float64"):
        return None
    return storable(value) if isinstance(value, str) else value


def _kind(value: Any) -> str:
    """One of `KINDS`, "null", or "" of anything else."""
    if isinstance(value, list):
        kinds = set(map(_kind, value)) - {"null"}
        return "texts" if kinds <= {"string"} else "numbers" if kinds <= {"int64", "float64"} else ""
    names = {type(None): "null", str: "string", bool: "bool", int: "int64", float: "float64"}
    return names.get(type(value), "")


def _table_rows(paths: list[Path], image_column: str, features: Features) -> Iterator[dict[str, Any]]:
    """Rows of the table; a damage is one, too."""
    texts = [name for name, kind in features.items() if kind == CAPTIONS]
    for row in _rows(paths, image_column):
        found = {name: _fitting(row.get(name), kind) for name, kind in features.items() if name != image_column}
        lost = (name for name in texts if found[name] is None and row.get(name) is not None)
        found[NO_TEXTS] = next(lost, None) if row.keys() - {image_column} else ""
        yield found | {image_column: row.get(image_column), DAMAGE: row.get(DAMAGE)}


def _rows(paths: list[Path], image_column: str) -> Iterator[dict[str, Any]]:
    for path in paths:
        read = _listed if path.suffix == ".jsonl" else _in_tar
        try:
            for row, image in read(path):
                row = row if isinstance(row, dict) else {}  # its columns then count as missing
                yield {name: row[name] for name in row if name != DAMAGE} | {image_column: image}
        except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:  # of a header that is garbage
            yield {DAMAGE: storable(f"{path}: {error}"[:MAX_DETAIL])}


def _in_tar(path: Path) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Of each sample, its JSON and where its image is."""
    with path.open("rb") as file:
        for sample in samples(path):
            image, row = None, {}
            if "image" in sample:
                name, offset, size = sample["image"]
                image = {"path": storable(name), "archive": os.path.abspath(path), "offset": offset, "size": size}
            if "json" in sample:
                row = _json_at(file, *sample["json"][1:])
            if "cls" in sample:  # the number of a class, as clip-benchmark's tars have it
                row = (row if isinstance(row, dict) else {}) | {"cls": _json_at(file, *sample["cls"][1:])}
            yield row, image


def _listed(path: Path) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Of each line, its JSON and the image that is its `file_name`, relative to the list."""
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            row, image = _json(line), None
            name = row.pop("file_name", None) if isinstance(row, dict) else None
            if isinstance(name, str):
                image = {"path": storable(name if "://" in name else os.path.abspath(path.parent / name))}
            yield row, image


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the plain files of a tar; tarfile alone takes most damages for the end."""
    length = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep all of them
            if not member.offset_data <= member.offset_data + member.size <= length:
                raise tarfile.ReadError(f"cut off at byte {length}, within {member.name!r}")
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset} of {length}")


def _json_at(file: BinaryIO, offset: int, length: int) -> Any:
    file.seek(offset)
    return _json(file.read(min(length, MAX_JSON_BYTES + 1)))  # which sees whether there are too many


def _json(data: bytes) -> Any:
    """The value, None where `data` is no JSON or too long; a whole number beyond 64 bits counts as missing."""
    try:
        return json.loads(data, parse_int=_number) if len(data) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        return None


def _number(digits: str) -> int | None:
    return number if -(2**63) <= (number := int(digits)) < 2**63 else None
