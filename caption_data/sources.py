"""Caption data sets of every form as one: a `datasets.Dataset` with its images undecoded.

A dataset is a saved `DatasetDict`, parquet files, folders of images with a `metadata.jsonl` or `metadata.csv` (an image
is its `file_name`, a text in a cell becomes a list of one caption), WebDataset tars in the authors' layout (`jpg|png`
and `json`), or a Hub id. Parquet files and datasets of the Hub are copied to the cache of `datasets`, which maps them
into memory. Tars and lists of images stay where they are: the cache holds a table of them, until one has another size
or time; nothing is extracted, nothing is unpickled.

A file is of the split that its innermost folder, or else the start of its name, names: one of the usual names, or the
one asked for. Where no file names one, all are split "train", as on the Hub; they don't serve as "test" too, which
would measure a model on what it was trained on.
"""

import csv
import glob
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset_builder, load_from_disk
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from tqdm.auto import tqdm

from capivara_common.environment import processes
from capivara_common.files import Bounds, read_json, refuse_links_out
from capivara_common.image_files import (
    MAX_DETAIL,
    MAX_IMAGE_PIXELS,
    BadImage,
    ImageFiles,
    decode_image,
    decode_images,
    image_bytes,
    image_path,
)
from caption_data.rows import CAPTION_COLUMN, CAPTIONS, SIMILARITY_COLUMN, Skipped, digest_of, storable

FORMS = (r"\.parquet$", r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", r"^metadata\.jsonl$", r"^metadata\.csv$")
LISTS = (".jsonl", ".csv")  # suffixes of lists of image files
SPLIT_NAMES = ("train", "training", "restval", "validation", "valid", "val", "dev", "test", "testing")
STAGE_FILE = "stage.json"  # of a folder that a stage of `captions` writes
PART = re.compile(r"-(\d{9})-(\d{9})$")  # rows of a part, in its name
HUB_TIMEOUT = 20  # seconds
READ_ROWS = 16  # of a parquet file at once
# Parquet stores a repeated value once: a file of 1 kB can hold gigabytes of text. Captions shrink about tenfold, images
# hardly at all.
MAX_EXPANSION = 100  # decoded bytes per byte of the parquet files
SMALL_TABLE_BYTES = 100_000_000  # decoded; a table of this size is read from files of any size
IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
MAX_JSON_BYTES = 1_000_000  # of a row; twenty captions and their similarities have under 10 kB
KINDS = {str: Value("string"), bool: Value("bool"), int: Value("int64"), float: Value("float64")}
HEAD_ROWS = 100  # that columns are judged from, since nothing declares them
TABLE_VERSION = 3  # raise it when what the table holds of a row changes
DAMAGE = "damaged archive"  # column of the table: what is wrong with the rest of an archive, in a row of its own
PLACE = {"bytes": Value("binary"), "path": Value("string")}  # of an image, as `datasets` has it undecoded
IN_ARCHIVE = {"archive": Value("string"), "offset": Value("int64"), "size": Value("int64")}


@dataclass(eq=False)
class Split:
    """One split of one data set, in a fixed order; an image of a row is as `capivara_common.image_files` opens it."""

    name: str  # of the data set
    split: str
    image_column: str
    data: Dataset
    files: ImageFiles  # which images may be opened
    paths: list[Path] = field(default_factory=list)  # of the files that hold the rows; none of what `datasets` saved
    damaged: list[Skipped] = field(default_factory=list)  # archives that end too early

    @property
    def where(self) -> str:
        """Data set and split, for messages."""
        return f"{self.name}, split {self.split!r}"

    @property
    def features(self) -> Features:
        """What the columns hold, by their names."""
        return self.data.features

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return list(self.features)

    def check_columns(self, names: Iterable[str]) -> None:
        """Raise ValueError where a column is missing; those that are there are named."""
        for name in names:
            if name not in self.columns:
                raise ValueError(f"{self.where} has no column {name!r}; there are {self.columns}.")

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int = 0, only: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows from row `start` on, with none but the columns `only`."""
        data = self.data if only is None else self.data.select_columns(list(only))
        return iter(data.skip(start) if start < len(data) else ())

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`, from 0."""
        return self.data[index]

    def image(self, row: int) -> PIL.Image.Image:
        """Decoded. Raises BadImage where it can't be used."""
        return decode_image(self.data[row][self.image_column], self.files)

    def decoded(self, rows: range) -> Iterator[tuple[int, PIL.Image.Image | BadImage]]:
        """Rows with their images or what is wrong with them, by `decode_images`."""
        return decode_images(rows, lambda row: self.data[row][self.image_column], self.files)

    @cached_property
    def digests(self) -> list[str]:
        """Hex, of each image's file, or of what is wrong with it; all files are read."""
        digests, quiet = [], not processes().is_main_process
        for row in tqdm(range(len(self)), desc="Reading images", unit="image", disable=quiet):
            try:
                image = image_bytes(self.data[row][self.image_column], self.files)
            except BadImage as bad:
                image = self.fault(row, bad).encode("utf-8", "replace")  # is cached, and must be of this data set
            digests.append(blake2b(image, digest_size=16).hexdigest())
        return digests

    def fault(self, row: int, bad: BadImage) -> str:
        """What is wrong with an image, without the folder that it lies in: results name no machine's paths."""
        path = image_path(self.data[row][self.image_column])
        folder = path.removesuffix(Path(path).name)  # not the path: odd signs in the name are escaped, long ones cut
        return str(bad).replace(folder, "").replace(repr(folder)[1:-1], "")


def open_split(
    dataset: str,
    split: str,
    image_column: str,
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
    parquet: type[Split] | None = None,
) -> Split:
    """One split of a data set: a folder, file, glob or Hub id, in one of the forms of the module's text.

    `image_column` is the images' name, which those of tars and image folders get; `image_roots` are folders outside of
    the data set that image paths and links in it may lead into, `max_pixels` those of an image. `parquet` reads parquet
    files where they lie, from its `paths`; they are copied where None.

    Raises ValueError where there is no such data set or split (those that are there are named), it is empty, its tars
    are compressed, its images lie in tars without being in one, a file of it is a link out of it, or it is the output
    of a stage that is unfinished.
    """
    path, paths, damages, data = Path(dataset), [], [], None
    refuse_unfinished(path)
    if (path / "dataset_dict.json").is_file():
        data = of_split(load_saved(path, image_roots), dataset, split)
        files = ImageFiles(Bounds(path, image_roots), max_pixels)
    elif not path.exists() and not glob.has_magic(dataset):
        data = of_split(_from_hub(dataset), dataset, split)
        files = ImageFiles(copied_bounds(dataset, image_roots), max_pixels)
    else:
        paths, bounds = files_of_split(dataset, split, image_roots)
        files = ImageFiles(bounds, max_pixels)
        if paths[0].suffix != ".parquet":
            data, damages = _loaded(dataset, table_of_files, paths, image_column)
        elif parquet is None:
            data = load_files("parquet", paths, dataset)
    damaged = [Skipped(dataset, split, row, "damaged archive", detail) for row, detail in damages]
    if data is None:
        opened = parquet(dataset, split, image_column, data, files, paths)
    else:
        opened = Split(dataset, split, image_column, undecoded(data, image_column), files, paths, damaged)
    feature = opened.features.get(image_column)
    if isinstance(feature, dict) and "archive" in feature and (not paths or paths[0].suffix == ".parquet"):
        raise ValueError(
            f"{opened.where}: the images of column {image_column!r} are places in tars, which may have changed since. "
            "Name the tars as the data set, or keep the bytes of the images in it."
        )
    if not len(opened):
        told = "; ".join(damage.detail for damage in damaged[:3])
        raise ValueError(f"{opened.where} is empty{told and f', its archives are damaged: {told}'}.")
    return opened


def unfinished(folder: Path) -> tuple[int, str]:
    """Rows of a stage of `captions` that no task has written yet, by the names of its files, and its command.

    Raises ValueError where its stage.json is damaged.
    """
    names = map(PART.search, (path.stem for path in folder.glob("*.parquet")))
    there = sum(int(name[2]) - int(name[1]) for name in names if name)
    try:
        record = read_json(folder / STAGE_FILE, command=str, source=dict)
        return record["source"]["rows"] - there, record["command"]
    except (ValueError, KeyError, TypeError) as error:
        fault = f"{folder / STAGE_FILE}: {error}"
        raise ValueError(f"{fault}. Put back a copy of it, or remove {folder} and run its stage again.") from error


def refuse_unfinished(folder: Path) -> None:
    """Raise ValueError, with the command that goes on, where a folder is of a stage that lacks parts."""
    missing, command = unfinished(folder) if (folder / STAGE_FILE).is_file() else (0, "")
    if missing > 0:
        raise ValueError(
            f"{folder} is unfinished: {missing} rows are missing. Other tasks may be at work on them; this command "
            f"makes what is missing: {command}"
        )


def undecoded(data: Dataset, image_column: str) -> Dataset:
    """The same, images, sounds and films at any depth left as they are: `datasets` would open any path."""
    plain = Features({name: _undecoded(feature) for name, feature in data.features.items()})
    if isinstance(plain.get(image_column), Value):  # bytes or paths, of parquet files that others wrote
        plain[image_column] = Image(decode=False)
    fingerprint = data._fingerprint
    for column in [name for name in plain if plain[name] != data.features[name]]:
        data = data.cast_column(column, plain[column])
    data._fingerprint = fingerprint  # that of the data, which builds of before have noted
    return data


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # List and its kin
        return replace(feature, feature=_undecoded(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) else feature


def files_of_split(dataset: str, split: str, image_roots: Sequence[Path] = ()) -> tuple[list[Path], Bounds]:
    """The files of a split, all of one form, and where they and their images may lie.

    Raises ValueError where there are none, of several forms, or links out of the folder.
    """
    root, found = _local_files(dataset)
    rule = (
        f" A file is of the split that its folder or the start of its name names, as {split}-0001 does; else of train."
    )
    paths = of_split(_files_by_split(root, found, split), dataset, split, rule)
    folders = [root] if Path(dataset).exists() else sorted({path.parent for path in paths})  # a pattern names no folder
    named = [Path(dataset)] if Path(dataset).is_file() else []  # by the user: it may lie anywhere
    bounds = Bounds(folders[0], [*folders[1:], *named, *image_roots])
    bounds.check(paths)
    return paths, bounds


def load_files(form: str, paths: Sequence[Path], dataset: str) -> Dataset:
    """Files by the loader `form` of `datasets`: named, since a README in their folder may name any file or address."""
    names = {"train": [glob.escape(str(path)) for path in paths]}
    try:
        return _loaded(dataset, _prepared, form, data_files=names, split="train")
    except ValueError:
        if form == "parquet":
            _check_expansion(paths)  # names the file that is damaged
        raise


def _prepared(*args: Any, split: str | None = None, **options: Any) -> Dataset | DatasetDict:
    """Do what `datasets.load_dataset` does, and raise ValueError if parquet files expand beyond `MAX_EXPANSION`."""
    builder = load_dataset_builder(*args, **options)
    if isinstance(builder, Parquet):  # it generates tables only if its cache does not have them yet
        builder._generate_tables = partial(_checked_tables, builder._generate_tables)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _checked_tables(generate: Callable, files: Sequence[str], **options: Any) -> Iterator[tuple[Any, pa.Table]]:
    _check_expansion(files)
    yield from generate(files=files, **options)


def _check_expansion(paths: Sequence[str | Path]) -> None:
    """Decode parquet files a few rows at a time, and raise ValueError if they are damaged or hold too much.

    Their metadata state sizes, but not those of values that dictionaries and deltas repeat.
    """
    stored, size = sum(map(os.path.getsize, paths)), 0
    for path in paths:
        with opened_parquet(path) as file:
            for batch in file.iter_batches(READ_ROWS):
                size += batch.nbytes
                if size > max(SMALL_TABLE_BYTES, MAX_EXPANSION * stored):
                    raise ValueError(
                        f"{path} expands too much: parquet files may hold at most {MAX_EXPANSION} times their size, or "
                        f"{SMALL_TABLE_BYTES / 1e6:.0f} MB, and these have {stored:,} bytes. If they are trusted, "
                        "write them again without compression and dictionaries."
                    )


def load_saved(folder: Path, image_roots: Sequence[Path] = ()) -> DatasetDict:
    """A saved data set, its tables within its folder (or `image_roots`), by whatever path its files name them.

    Raises ValueError where a link or a path leads out of the folder, or it can't be loaded.
    """
    refuse_links_out(folder)
    bounds = Bounds(folder, image_roots)
    for split in read_json(folder / "dataset_dict.json", splits=list)["splits"]:
        state = folder / str(split) / "state.json"
        bounds.check([state])
        tables = read_json(state, _data_files=list)["_data_files"] if state.is_file() else []
        names = [table.get("filename") if isinstance(table, dict) else None for table in tables]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{state} must name the tables of the split, each with its filename.")
        bounds.check([state.parent / name for name in names])
        if strange := [name for name in names if not (state.parent / name).is_file()]:
            raise ValueError(f"{state} names {strange[0]}, which is no file there.")
    data = _loaded(str(folder), load_from_disk, str(folder))
    if not isinstance(data, DatasetDict):
        raise ValueError(f"{folder} is one split of a data set; name the folder of the whole, {folder.parent}.")
    return data


def copied_bounds(dataset: str, image_roots: Sequence[Path] = ()) -> Bounds:
    """Where the files of a folder or Hub id that `datasets` reads lie: there, or in its cache; and what it unpacks."""
    cached = Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"
    folder = Path(dataset) if Path(dataset).exists() else cached
    return Bounds(folder, [Path(datasets.config.EXTRACTED_DATASETS_PATH), *image_roots])


def of_split(splits: dict[str, Any], dataset: str, split: str, rule: str = "") -> Any:
    """The split of a data set. Raises ValueError where there is none of the name; `rule` ends the message."""
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}; there are {sorted(splits)}.{rule}")
    return splits[split]


@contextmanager
def opened_parquet(path: str | Path, advice: str = "") -> Iterator[pq.ParquetFile]:
    """A parquet file. Raises ValueError, which names it and ends with `advice`, where it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be loaded: {_one_line(error)}{advice}") from error


def _from_hub(dataset: str) -> Any:
    """All splits of a data set of the Hub."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset) or any(re.search(form, dataset) for form in FORMS):
        raise ValueError(f"{dataset} does not exist, and is no Hub id such as 'laicsiifes/flickr30k-pt-br'.")
    subject = f"{dataset} is no path here, and as a Hub id it"
    kept = copied_bounds(dataset).folder, Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
    if not any(map(Path.exists, kept)):
        # One question: `datasets` asks six times, for half a minute.
        _loaded(subject, HfApi().dataset_info, dataset, timeout=HUB_TIMEOUT)
    return _loaded(subject, _prepared, dataset)


def _loaded(subject: str, load: Callable, *args: Any, **options: Any) -> Any:
    """What `load` gives. Raises ValueError, which begins with `subject`, where it fails."""
    try:
        return load(*args, **options)
    except Exception as error:  # of datasets, pyarrow, fsspec and the HTTP client
        raise ValueError(f"{subject} can't be loaded: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """What an error says; pyarrow and `datasets` use several lines."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__  # MemoryError has no text


def _local_files(dataset: str) -> tuple[Path, list[Path]]:
    """The folder below which names decide the split, and the files of the only form in it."""
    path = Path(dataset)
    if path.is_dir():
        root, found = path, [*path.glob("*"), *path.glob("*/*")]
    elif path.exists():
        root, found = path.parent, [path]
    else:
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(name) for name in glob.iglob(dataset, recursive=True)]
    by_form = [sorted(file for file in found if re.search(form, file.name) and file.is_file()) for form in FORMS]
    there = list(filter(None, by_form))
    if len(there) != 1:
        raise ValueError(
            f"{dataset} must be a saved DatasetDict, or hold files of one form, itself or in folders: parquet, tar, or "
            "images with metadata.jsonl or metadata.csv. It holds "
            f"{[files[0].name for files in there] or 'none of them'}; a pattern such as 'folder/*.tar' chooses."
        )
    return root, there[0]


def _files_by_split(root: Path, files: list[Path], split: str) -> dict[str, list[Path]]:
    """Files by split, by the rule in the docstring of the module."""
    usual = [split, *SPLIT_NAMES]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        *folders, name = file.relative_to(root).parts
        starts = [word for word in usual if re.match(rf"{re.escape(word)}(?![^\W\d_])", name)]
        named = [folder for folder in reversed(folders) if folder in usual] + starts
        other = folders[-1] if folders else re.split(r"[\W\d_]", name)[0]
        by_split.setdefault(named[0] if named else other, []).append(file)
    if by_split.keys().isdisjoint(usual):
        return {root.name if root.name in usual else "train": files}
    return by_split


def table_of_files(paths: list[Path], image_column: str) -> tuple[Dataset, list[tuple[int, str]]]:
    """The rows of tars or of lists of images: the columns of their JSON, and where the image is.

    Columns are judged by the first rows; what in a row is of another kind than its column counts as missing. Returned
    are the rows, and of each archive that ends too early the number of rows before, and what is wrong with it. Raises
    ValueError where a tar is compressed: its samples have no offset to be read at.
    """
    if compressed := [path for path in paths if path.suffix not in (".tar", *LISTS)]:
        raise ValueError(
            f"{compressed[0]} is compressed, and only plain tars can be read in place. Unpack it to a .tar."
        )
    head = list(itertools.islice(_rows(paths, image_column), HEAD_ROWS))
    if not head:
        return Dataset.from_dict({image_column: []}), []
    place = PLACE if paths[0].suffix in LISTS else PLACE | IN_ARCHIVE
    names = dict.fromkeys(name for row in head for name in row if name not in (image_column, DAMAGE))
    judged = {name: _feature(name, [row.get(name) for row in head]) for name in names}
    judged = {name: kind for name, kind in judged.items() if kind is not None}
    features = Features({image_column: place} | judged | {DAMAGE: KINDS[str]})
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
    one. Of a damaged archive the samples before the damage are given, then tarfile.ReadError is raised.
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


def _feature(name: str, values: list[Any]) -> Any:
    """What a column holds, by its name or what most of its values are: text, numbers, lists of one of these, or None.

    A column with a list in any row is one of lists.
    """
    if CAPTION_COLUMN.fullmatch(name):
        return CAPTIONS
    if SIMILARITY_COLUMN.fullmatch(name):
        return List(KINDS[float])
    lists = [value for value in values if isinstance(value, list)]
    counts = Counter(type(one) for one in (itertools.chain(*lists) if lists else values) if one is not None)
    usual = counts.most_common(1)[0][0] if counts else str
    kind = KINDS.get(float if usual is int and float in counts else usual)
    return List(kind) if lists and kind else kind


def _fitting(value: Any, feature: Any) -> Any:
    """A value out of JSON as its column has it; None where it is of another kind: then the row lacks it."""
    if isinstance(feature, List):
        values = [value] if isinstance(value, str) else value
        return [_fitting(one, feature.feature) for one in values] if isinstance(values, list) else None
    if KINDS.get(type(value)) != feature and (type(value), feature) != (int, KINDS[float]):
        return None
    return storable(value) if isinstance(value, str) else value


def _table_rows(paths: list[Path], image_column: str, features: Features) -> Iterator[dict[str, Any]]:
    """Rows of the table; a damage is one, too."""
    for row in _rows(paths, image_column):
        place = {image_column: row.pop(image_column, None)}
        yield {name: _fitting(row.get(name), kind) for name, kind in features.items() if name != image_column} | place


def _rows(paths: list[Path], image_column: str) -> Iterator[dict[str, Any]]:
    for path in paths:
        read = _listed if path.suffix in LISTS else _in_tar
        try:
            for row, image in read(path):
                row = row if isinstance(row, dict) else {}  # its columns then count as missing
                yield {name: row[name] for name in row if name != DAMAGE} | {image_column: image}
        except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:  # of a header that is garbage
            if path.suffix == ".csv":  # people write these: a slip in a line must not end the dataset there in silence
                raise ValueError(f"{path}: {error}") from None
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
    """Yield each row of a list and the image that is its `file_name`, relative to the list."""
    for row in (_csv_rows if path.suffix == ".csv" else _json_rows)(path):
        image, name = None, row.pop("file_name", None) if isinstance(row, dict) else None
        if isinstance(name, str):  # an address stays one, which is refused as such
            image = {"path": storable(name if "://" in name else os.path.abspath(path.parent / name))}
        yield row, image


def _json_rows(path: Path) -> Iterator[Any]:
    """Yield the JSON of each line. Raises ValueError as `_bounded_lines` does."""
    with path.open("rb") as file:
        yield from map(_json, filter(bytes.strip, _bounded_lines(file)))


def _csv_rows(path: Path) -> Iterator[dict[str, str | None]]:
    """Yield the cells of each row by the names of their columns; an empty cell is None.

    Raises ValueError if the file is no CSV of UTF-8 whose first line names `file_name`, or as `_bounded_lines` does.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(_bounded_lines(file), strict=True)
        try:
            if "file_name" not in (names := rows.fieldnames or []):
                raise ValueError(f"the first line must name the column file_name, columns apart by commas, got {names}")
            for row in rows:
                if row.pop(None, None) is not None:
                    raise ValueError(f"line {rows.line_num} has more cells than the first one; quote texts with commas")
                yield {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num}: {error}") from error


def _bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of a list.

    Raises ValueError if one is longer than `MAX_JSON_BYTES`: the file may be sparse, and reading on may not end.
    """
    number = 0
    while line := file.readline(MAX_JSON_BYTES + 1):
        number += 1
        if len(line) > MAX_JSON_BYTES:
            raise ValueError(f"line {number} has more than {MAX_JSON_BYTES:,} bytes; it and what follows are left out")
        yield line


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
