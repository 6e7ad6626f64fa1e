"""Caption data sets of every form, read row by row with images as bytes.

    source = open_source("shards/train-*.tar", "train", "image", streaming=True)

A data set is a saved `DatasetDict`, parquet files, folders of images with a `metadata.jsonl` (an image is its
`file_name`), WebDataset tars in the authors' layout (`jpg|png` and `json`), or a Hub id. Which file is of which split
is decided by `source_files`.
"""

import bisect
import glob
import itertools
import json
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from datasets import Dataset, Features, IterableDataset
from tqdm.auto import tqdm

from capivara_common.image_files import MAX_DETAIL, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, ImageFiles
from capivara_common.links import Bounds
from caption_data.rows import Skipped
from caption_data.source_files import (
    FORMS,
    copied_bounds,
    files_of_split,
    load_by_datasets,
    load_files,
    load_saved,
    of_split,
)
from caption_data.stage_folder import STAGE_FILE, check_all_there, opened_parquet, parquet_batches
from caption_data.tars import refuse_compressed, samples

MAX_JSON_BYTES = 1_000_000  # of a row; twenty captions and their similarities have under 10 kB
HEAD_ROWS = 100  # that columns are judged from where no schema declares them
SAMPLED_PIECES, SAMPLED_BYTES = 64, 4096  # of a file, evenly spread, for the fingerprint of a source


class Source:
    """One split of one data set, in a fixed order.

    An image is left as it is, `{"bytes", "path"}`: `capivara_common.image_files` opens it, with the `files` of
    the source.
    """

    def __init__(self, name: str, split: str, streaming: bool, files: ImageFiles, image_column: str):
        self.name, self.split, self.streaming, self.files = name, split, streaming, files
        self.image_column = image_column
        self.columns: list[str] = []
        self.features: Features | None = None  # where the data set declares them
        self.damaged: list[Skipped] = []  # archives that end too early; complete once all rows were seen
        self._items: Dataset | IterableDataset | np.ndarray | None = None  # what `_read` makes rows of

    @property
    def where(self) -> str:
        """Data set and split, for messages."""
        return f"{self.name}, split {self.split!r}"

    def check_columns(self, names: Iterable[str]) -> None:
        """Raise ValueError where a column is missing; those that are there are named."""
        for name in names:
            if name not in self.columns:
                raise ValueError(f"{self.where} has no column {name!r}; there are {self.columns}.")

    def rows(self, start: int = 0, only: Collection[str] | None = None) -> Iterator[dict]:
        """The rows from row `start` on; where it saves reading, with none but the columns `only`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex digest of the content, the same wherever the files lie.

        It is cheap: of a large file its size and pieces all over it, of a data set of `datasets` the fingerprint that
        the library keeps.
        """
        return _files_fingerprint(self._paths)

    def row(self, index: int) -> dict:
        """Row `index`, from 0. Raises ValueError when streaming, IndexError where there is none."""
        if self.streaming:
            raise ValueError(f"{self.where} is streamed and has no random access. Open it without streaming.")
        if not 0 <= index < len(self):
            raise IndexError(f"{self.where} has {len(self)} rows, there is no row {index}.")
        return self._at(index)

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError(f"{self.where} is streamed and has no length. Open it without streaming.")
        return len(self._items)

    def _at(self, index: int) -> dict:
        return self._read(self._items[index])

    def _read(self, item: Any) -> dict:
        raise NotImplementedError


class _ArrowSource(Source):
    """Rows of the `datasets` library."""

    def __init__(self, *options: Any, data: Dataset | IterableDataset):
        super().__init__(*options)
        self.features, self._fingerprint = data.features, getattr(data, "_fingerprint", None)
        for column, feature in (data.features or {}).items():
            if (plain := undecoded(feature)) != feature:
                data = data.cast_column(column, plain)
        self._items = data
        self.columns = list(data.column_names or next(iter(data), {}))

    def rows(self, start: int = 0, only: Collection[str] | None = None) -> Iterator[dict]:
        if isinstance(self._items, Dataset) and start >= len(self._items):
            return iter(())  # where `skip` raises
        items = self._items if only is None else self._items.select_columns(list(only))
        return map(self._read, items.skip(start))

    def fingerprint(self) -> str:
        return str(self._fingerprint)  # of a saved data set, or of a revision on the Hub

    def _read(self, item: dict) -> dict:
        return _with_image_dict(item, self.image_column)


class _ParquetSource(Source):
    """Rows of parquet files, read in place a few at a time, where `datasets` would copy all of them to its cache."""

    def __init__(self, *options: Any, paths: list[Path]):
        super().__init__(*options)
        groups, schema = [], None
        for path in tqdm(paths, desc=f"Parquet files, {self.where}", unit="file", leave=False):
            with opened_parquet(path) as file:
                schema = file.schema_arrow if schema is None else schema
                if not file.schema_arrow.equals(schema):
                    raise ValueError(f"{path} has other columns than {paths[0]}; make them alike.")
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            groups += [(path, group, size) for group, size in enumerate(sizes)]
        self._groups, self._paths = groups, paths
        self._starts = list(itertools.accumulate((size for *_, size in groups), initial=0))
        self.features = Features.from_arrow_schema(schema)
        self.columns = list(self.features)

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> dict:
        return next(self.rows(index))

    def rows(self, start: int = 0, only: Collection[str] | None = None) -> Iterator[dict]:
        if start >= len(self):
            return
        first = bisect.bisect_right(self._starts, start) - 1
        surplus = start - self._starts[first]  # rows of the first group that come before
        for path, groups in itertools.groupby(self._groups[first:], key=lambda group: group[0]):
            numbers, columns = [number for _, number, _ in groups], None if only is None else list(only)
            for batch in parquet_batches(path, numbers, columns):
                rows = batch.slice(min(surplus, len(batch))).to_pylist()
                surplus -= len(batch) - len(rows)
                yield from (_with_image_dict(row, self.image_column) for row in rows)


class _FileSource(Source):
    """Rows that lie in files: some integers, the number of the file first, say where each is."""

    def __init__(self, *options: Any, paths: list[Path]):
        super().__init__(*options)
        self._paths = paths
        if not self.streaming:  # one array: a million rows are 40 MB, a tenth of what tuples take
            numbers = np.fromiter(itertools.chain.from_iterable(self._offsets()), dtype=np.int64)
            self._items = numbers.reshape(-1, self._width)
        head = itertools.islice(self.rows(), HEAD_ROWS)
        self.columns = list(dict.fromkeys(itertools.chain([self.image_column], *head)))

    def rows(self, start: int = 0, only: Collection[str] | None = None) -> Iterator[dict]:
        offsets = itertools.islice(self._offsets(), start, None) if self.streaming else self._items[start:]
        return map(self._read, offsets)

    def _offsets(self) -> Iterator[tuple[int, ...]]:
        raise NotImplementedError


class _ImageFolderSource(_FileSource):
    """Lines of `metadata.jsonl` files: JSON objects whose `file_name` is the image, relative to the file."""

    _width = 3  # file, offset and length of the line

    def _offsets(self) -> Iterator[tuple[int, ...]]:
        for number, path in enumerate(self._paths):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    if line.strip():
                        yield number, offset, len(line)
                    offset += len(line)

    def _read(self, item: tuple[int, ...]) -> dict:
        path = self._paths[item[0]]
        with path.open("rb") as file:
            row = _json_object(_read_at(file, item[1], item[2], MAX_JSON_BYTES))
        name, image = row.pop("file_name", None), None
        if isinstance(name, str):
            image = {"bytes": None, "path": name if "://" in name else str(path.parent / name)}
        return {**row, self.image_column: image}


class _TarSource(_FileSource):
    """Samples of tars in WebDataset's layout, read in place: nothing is extracted, nothing is unpickled."""

    _width = 5  # file, offset and size of the image, offset and size of the JSON; -1 where there is none

    def _offsets(self) -> Iterator[tuple[int, ...]]:
        row = 0
        for number, path in enumerate(tqdm(self._paths, desc=f"Tars, {self.where}", unit="tar", leave=False)):
            try:
                for sample in samples(path):
                    yield number, *sample.get("image", (-1, -1)), *sample.get("json", (-1, -1))
                    row += 1
            except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:  # of a header that is garbage
                skipped = Skipped(self.name, self.split, row, "damaged archive", f"{path}: {error}"[:MAX_DETAIL])
                if skipped not in self.damaged:  # of an earlier pass
                    self.damaged.append(skipped)

    def _read(self, item: tuple[int, ...]) -> dict:
        number, image_offset, image_size, json_offset, json_size = item
        image, row = None, {}
        with self._paths[number].open("rb") as file:
            if image_offset >= 0:
                header = _read_at(file, image_offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
                member = header[:100].rstrip(b"\0").decode("utf-8", "replace")
                data = _read_at(file, image_offset, image_size, MAX_IMAGE_BYTES)
                image = {"bytes": data, "path": f"{file.name}/{member}"}
            if json_offset >= 0:
                row = _json_object(_read_at(file, json_offset, json_size, MAX_JSON_BYTES))
        return {**row, self.image_column: image}


def open_source(
    dataset: str,
    split: str,
    image_column: str,
    streaming: bool = False,
    in_place: bool = False,
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Source:
    """One split of a data set.

    Args:
        dataset: folder of a saved `DatasetDict`; a file, glob or folder of parquet files or of uncompressed tars;
            folder of images with `metadata.jsonl`; or a Hub id. `source_files` has the rule of splits.
        split: name.
        image_column: column of the images; in tars and image folders, the name their images get.
        streaming: read in order only. Otherwise tars are indexed once, and parquet files and data sets of the Hub
            are copied to the cache of `datasets`.
        in_place: parquet files are not copied: good for few passes in order, slow for many rows here and there. No row
            is read yet, so that damage in the first ones is told by whoever reads them.
        image_roots: folders outside of the data set that image paths and links in it may lead into.
        max_pixels: of an image.

    Raises:
        ValueError: there is no such data set or split (those that are there are named), it is empty, its tars are
            compressed, a file of it is a link out of it, or it is the output of a stage that is unfinished.
    """
    path = Path(dataset)
    if (path / STAGE_FILE).is_file():
        check_all_there(path)

    def opened(kind: type[Source], files: ImageFiles, **content: Any) -> Source:
        return _not_empty(kind(dataset, split, streaming, files, image_column, **content), read=not in_place)

    if (path / "dataset_dict.json").is_file():
        data = of_split(load_saved(path, image_roots), dataset, split)
        return opened(_ArrowSource, ImageFiles(Bounds(path, image_roots), max_pixels), data=data)
    if not path.exists() and not glob.has_magic(dataset):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset) or any(re.search(form, dataset) for form in FORMS):
            raise ValueError(f"{dataset} does not exist, and is no Hub id such as 'laicsiifes/flickr30k-pt-br'.")
        data = load_by_datasets(f"{dataset} is no path here, and as a Hub id it", dataset, streaming=streaming)
        files = ImageFiles(copied_bounds(dataset, image_roots), max_pixels, dataset)
        return opened(_ArrowSource, files, data=of_split(data, dataset, split))
    paths, bounds = files_of_split(dataset, split, image_roots)
    files = ImageFiles(bounds, max_pixels)
    if paths[0].suffix == ".parquet" and in_place:
        return opened(_ParquetSource, files, paths=paths)
    if paths[0].suffix == ".parquet":
        return opened(_ArrowSource, files, data=load_files("parquet", paths, dataset, streaming))
    if paths[0].suffix == ".jsonl":
        return opened(_ImageFolderSource, files, paths=paths)
    refuse_compressed(paths)
    return opened(_TarSource, files, paths=paths)


def _not_empty(source: Source, read: bool) -> Source:
    if next(source.rows(), None) is None if read else len(source) == 0:
        damages = "; ".join(damage.detail for damage in source.damaged[:3])
        raise ValueError(f"{source.where} is empty{damages and f', its archives are damaged: {damages}'}.")
    return source


def undecoded(feature: Any) -> Any:
    """The feature, its images, sounds and films at any depth left as they are: `datasets` would open any path."""
    if isinstance(feature, dict):
        return {name: undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):  # List and its kin
        return replace(feature, feature=undecoded(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) else feature


def _with_image_dict(row: dict, image_column: str) -> dict:
    image = row.get(image_column)
    if isinstance(image, bytes | str):  # parquet files that others wrote
        is_path = isinstance(image, str)
        row[image_column] = {"bytes": None if is_path else image, "path": image if is_path else None}
    return row


def _files_fingerprint(files: list[Path]) -> str:
    """Of their names, sizes and pieces all over them; a list of captions is read as a whole."""
    digest = blake2b(digest_size=16)
    for path in tqdm(files, desc="Fingerprint", unit="file", leave=False):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            if path.suffix == ".jsonl" or size <= SAMPLED_PIECES * SAMPLED_BYTES:
                while data := file.read(1 << 20):
                    digest.update(data)
                continue
            for piece in range(SAMPLED_PIECES):  # the first and the last one included, where footers are
                file.seek((size - SAMPLED_BYTES) * piece // (SAMPLED_PIECES - 1))
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def _read_at(file: BinaryIO, offset: int, length: int, limit: int) -> bytes:
    """`length` bytes, at most `limit` and one more, by which the caller sees that there are too many."""
    file.seek(offset)
    wanted = min(length, limit + 1)
    data = file.read(wanted)
    if len(data) < wanted:
        raise OSError(f"{file.name} has become shorter while it was in use.")
    return data


def _json_object(data: bytes) -> dict:
    """The object, or an empty one where `data` is something else or too long: its columns then count as missing."""
    try:
        value = json.loads(data) if len(data) <= MAX_JSON_BYTES else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
