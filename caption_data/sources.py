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

from capivara_common.environment import process_state
from capivara_common.files import AllowedFolders, check_links_stay_inside, read_json
from capivara_common.image_files import (
    MAX_DETAIL_CHARACTERS,
    MAX_IMAGE_PIXELS,
    BadImage,
    ImageAccess,
    decode_image,
    decode_images,
    image_display_path,
    read_image_bytes,
)
from caption_data.rows import (
    CAPTION_COLUMN_RE,
    CAPTIONS_FEATURE,
    SIMILARITY_COLUMN_RE,
    SkippedRow,
    json_digest,
    replace_surrogates,
)

FILE_FORM_PATTERNS = (r"\.parquet$", r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", r"^metadata\.jsonl$", r"^metadata\.csv$")
METADATA_SUFFIXES = (".jsonl", ".csv")  # suffixes of lists of image files
SPLIT_NAMES = ("train", "training", "restval", "validation", "valid", "val", "dev", "test", "testing")
STAGE_FILE = "stage.json"  # of a folder that a stage of `captions` writes
PART_NAME_RE = re.compile(r"-(\d{9})-(\d{9})$")  # rows of a part, in its name
DATASET_INFO_TIMEOUT_S = 20  # seconds
PARQUET_BATCH_ROWS = 16  # of a parquet file at once
# Parquet stores a repeated value once: a file of 1 kB can hold gigabytes of text. Captions shrink about tenfold, images
# hardly at all.
MAX_PARQUET_EXPANSION = 100  # decoded bytes per byte of the parquet files
UNLIMITED_EXPANSION_BYTES = 100_000_000  # decoded; a table of this size is read from files of any size
IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
MAX_ROW_JSON_BYTES = 1_000_000  # of a row; twenty captions and their similarities have under 10 kB
JSON_FEATURES = {str: Value("string"), bool: Value("bool"), int: Value("int64"), float: Value("float64")}
SCHEMA_SAMPLE_ROWS = 100  # that columns are judged from, since nothing declares them
FILE_TABLE_VERSION = 3  # raise it when what the table holds of a row changes
DAMAGE_COLUMN = "damaged archive"  # column of the table: what is wrong with the rest of an archive, in a row of its own
IMAGE_FIELDS = {"bytes": Value("binary"), "path": Value("string")}  # of an image, as `datasets` has it undecoded
ARCHIVE_FIELDS = {"archive": Value("string"), "offset": Value("int64"), "size": Value("int64")}


@dataclass(eq=False)
class Split:
    """One split of one data set, in a fixed order; an image of a row is as `capivara_common.image_files` opens it."""

    name: str  # of the data set
    split: str
    image_column: str
    data: Dataset
    image_access: ImageAccess  # which images may be opened
    paths: list[Path] = field(default_factory=list)  # of the files that hold the rows; none of what `datasets` saved
    damaged_archives: list[SkippedRow] = field(default_factory=list)  # archives that end too early

    @property
    def display_name(self) -> str:
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
                raise ValueError(f"{self.display_name} has no column {name!r}; there are {self.columns}.")

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int = 0, column_names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows from row `start` on, with none but the columns `only`."""
        data = self.data if column_names is None else self.data.select_columns(list(column_names))
        return iter(data.skip(start) if start < len(data) else ())

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`, from 0."""
        return self.data[index]

    def load_image(self, row: int) -> PIL.Image.Image:
        """Decoded. Raises BadImage where it can't be used."""
        return decode_image(self.data[row][self.image_column], self.image_access)

    def decode_images(self, rows: range) -> Iterator[tuple[int, PIL.Image.Image | BadImage]]:
        """Rows with their images or what is wrong with them, by `decode_images`."""
        return decode_images(rows, lambda row: self.data[row][self.image_column], self.image_access)

    @cached_property
    def image_digests(self) -> list[str]:
        """Hex, of each image's file, or of what is wrong with it; all files are read."""
        digests, quiet = [], not process_state().is_main_process
        for row in tqdm(range(len(self)), desc="Reading images", unit="image", disable=quiet):
            try:
                image = read_image_bytes(self.data[row][self.image_column], self.image_access)
            except BadImage as bad:
                image = self.describe_image_error(row, bad).encode(
                    "utf-8", "replace"
                )  # is cached, and must be of this data set
            digests.append(blake2b(image, digest_size=16).hexdigest())
        return digests

    def describe_image_error(self, row: int, bad: BadImage) -> str:
        """What is wrong with an image, without the folder that it lies in: results name no machine's paths."""
        path = image_display_path(self.data[row][self.image_column])
        folder = path.removesuffix(Path(path).name)  # not the path: odd signs in the name are escaped, long ones cut
        return str(bad).replace(folder, "").replace(repr(folder)[1:-1], "")


def open_split(
    dataset: str,
    split: str,
    image_column: str,
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
    parquet_type: type[Split] | None = None,
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
    check_finished(path)
    if (path / "dataset_dict.json").is_file():
        data = select_split(load_saved_dataset(path, image_roots), dataset, split)
        files = ImageAccess(AllowedFolders(path, image_roots), max_pixels)
    elif not path.exists() and not glob.has_magic(dataset):
        data = select_split(_load_from_hub(dataset), dataset, split)
        files = ImageAccess(dataset_folders(dataset, image_roots), max_pixels)
    else:
        paths, bounds = find_split_files(dataset, split, image_roots)
        files = ImageAccess(bounds, max_pixels)
        if paths[0].suffix != ".parquet":
            data, damages = _call_loader(dataset, build_file_table, paths, image_column)
        elif parquet_type is None:
            data = load_data_files("parquet", paths, dataset)
    damaged = [SkippedRow(dataset, split, row, "damaged archive", detail) for row, detail in damages]
    if data is None:
        opened = parquet_type(dataset, split, image_column, data, files, paths)
    else:
        opened = Split(dataset, split, image_column, disable_decoding(data, image_column), files, paths, damaged)
    feature = opened.features.get(image_column)
    if isinstance(feature, dict) and "archive" in feature and (not paths or paths[0].suffix == ".parquet"):
        raise ValueError(
            f"{opened.display_name}: the images of column {image_column!r} are places in tars, which may have changed since. "
            "Name the tars as the data set, or keep the bytes of the images in it."
        )
    if not len(opened):
        told = "; ".join(damage.detail for damage in damaged[:3])
        raise ValueError(f"{opened.display_name} is empty{told and f', its archives are damaged: {told}'}.")
    return opened


def find_missing_rows(folder: Path) -> tuple[int, str]:
    """Rows of a stage of `captions` that no task has written yet, by the names of its files, and its command.

    Raises ValueError where its stage.json is damaged.
    """
    names = map(PART_NAME_RE.search, (path.stem for path in folder.glob("*.parquet")))
    there = sum(int(name[2]) - int(name[1]) for name in names if name)
    try:
        record = read_json(folder / STAGE_FILE, command=str, source=dict)
        return record["source"]["rows"] - there, record["command"]
    except (ValueError, KeyError, TypeError) as error:
        fault = f"{folder / STAGE_FILE}: {error}"
        raise ValueError(f"{fault}. Put back a copy of it, or remove {folder} and run its stage again.") from error


def check_finished(folder: Path) -> None:
    """Raise ValueError, with the command that goes on, where a folder is of a stage that lacks parts."""
    missing, command = find_missing_rows(folder) if (folder / STAGE_FILE).is_file() else (0, "")
    if missing > 0:
        raise ValueError(
            f"{folder} is unfinished: {missing} rows are missing. Other tasks may be at work on them; this command "
            f"makes what is missing: {command}"
        )


def disable_decoding(data: Dataset, image_column: str) -> Dataset:
    """The same, images, sounds and films at any depth left as they are: `datasets` would open any path."""
    plain = Features({name: _without_decoding(feature) for name, feature in data.features.items()})
    if isinstance(plain.get(image_column), Value):  # bytes or paths, of parquet files that others wrote
        plain[image_column] = Image(decode=False)
    fingerprint = data._fingerprint
    for column in [name for name in plain if plain[name] != data.features[name]]:
        data = data.cast_column(column, plain[column])
    data._fingerprint = fingerprint  # that of the data, which builds of before have noted
    return data


def _without_decoding(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _without_decoding(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # List and its kin
        return replace(feature, feature=_without_decoding(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) else feature


def find_split_files(dataset: str, split: str, image_roots: Sequence[Path] = ()) -> tuple[list[Path], AllowedFolders]:
    """The files of a split, all of one form, and where they and their images may lie.

    Raises ValueError where there are none, of several forms, or links out of the folder.
    """
    root, found = _find_local_files(dataset)
    rule = (
        f" A file is of the split that its folder or the start of its name names, as {split}-0001 does; else of train."
    )
    paths = select_split(_group_by_split(root, found, split), dataset, split, rule)
    folders = [root] if Path(dataset).exists() else sorted({path.parent for path in paths})  # a pattern names no folder
    named = [Path(dataset)] if Path(dataset).is_file() else []  # by the user: it may lie anywhere
    bounds = AllowedFolders(folders[0], [*folders[1:], *named, *image_roots])
    bounds.check(paths)
    return paths, bounds


def load_data_files(form: str, paths: Sequence[Path], dataset: str) -> Dataset:
    """Files by the loader `form` of `datasets`: named, since a README in their folder may name any file or address."""
    names = {"train": [glob.escape(str(path)) for path in paths]}
    try:
        return _call_loader(dataset, _prepare_dataset, form, data_files=names, split="train")
    except ValueError:
        if form == "parquet":
            _check_expansion(paths)  # names the file that is damaged
        raise


def _prepare_dataset(*args: Any, split: str | None = None, **options: Any) -> Dataset | DatasetDict:
    """Do what `datasets.load_dataset` does, and raise ValueError if parquet files expand beyond `MAX_EXPANSION`."""
    builder = load_dataset_builder(*args, **options)
    if isinstance(builder, Parquet):  # it generates tables only if its cache does not have them yet
        builder._generate_tables = partial(_iter_checked_tables, builder._generate_tables)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _iter_checked_tables(generate: Callable, files: Sequence[str], **options: Any) -> Iterator[tuple[Any, pa.Table]]:
    _check_expansion(files)
    yield from generate(files=files, **options)


def _check_expansion(paths: Sequence[str | Path]) -> None:
    """Decode parquet files a few rows at a time, and raise ValueError if they are damaged or hold too much.

    Their metadata state sizes, but not those of values that dictionaries and deltas repeat.
    """
    stored, size = sum(map(os.path.getsize, paths)), 0
    for path in paths:
        with open_parquet(path) as file:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS):
                size += batch.nbytes
                if size > max(UNLIMITED_EXPANSION_BYTES, MAX_PARQUET_EXPANSION * stored):
                    raise ValueError(
                        f"{path} expands too much: parquet files may hold at most {MAX_PARQUET_EXPANSION} times their size, or "
                        f"{UNLIMITED_EXPANSION_BYTES / 1e6:.0f} MB, and these have {stored:,} bytes. If they are trusted, "
                        "write them again without compression and dictionaries."
                    )


def load_saved_dataset(folder: Path, image_roots: Sequence[Path] = ()) -> DatasetDict:
    """A saved data set, its tables within its folder (or `image_roots`), by whatever path its files name them.

    Raises ValueError where a link or a path leads out of the folder, or it can't be loaded.
    """
    check_links_stay_inside(folder)
    bounds = AllowedFolders(folder, image_roots)
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
    data = _call_loader(str(folder), load_from_disk, str(folder))
    if not isinstance(data, DatasetDict):
        raise ValueError(f"{folder} is one split of a data set; name the folder of the whole, {folder.parent}.")
    return data


def dataset_folders(dataset: str, image_roots: Sequence[Path] = ()) -> AllowedFolders:
    """Where the files of a folder or Hub id that `datasets` reads lie: there, or in its cache; and what it unpacks."""
    cached = Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"
    folder = Path(dataset) if Path(dataset).exists() else cached
    return AllowedFolders(folder, [Path(datasets.config.EXTRACTED_DATASETS_PATH), *image_roots])


def select_split(splits: dict[str, Any], dataset: str, split: str, hint: str = "") -> Any:
    """The split of a data set. Raises ValueError where there is none of the name; `rule` ends the message."""
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}; there are {sorted(splits)}.{hint}")
    return splits[split]


@contextmanager
def open_parquet(path: str | Path, hint: str = "") -> Iterator[pq.ParquetFile]:
    """A parquet file. Raises ValueError, which names it and ends with `advice`, where it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be loaded: {_error_line(error)}{hint}") from error


def _load_from_hub(dataset: str) -> Any:
    """All splits of a data set of the Hub."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset) or any(
        re.search(form, dataset) for form in FILE_FORM_PATTERNS
    ):
        raise ValueError(f"{dataset} does not exist, and is no Hub id such as 'laicsiifes/flickr30k-pt-br'.")
    subject = f"{dataset} is no path here, and as a Hub id it"
    kept = dataset_folders(dataset).folder, Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
    if not any(map(Path.exists, kept)):
        # One question: `datasets` asks six times, for half a minute.
        _call_loader(subject, HfApi().dataset_info, dataset, timeout=DATASET_INFO_TIMEOUT_S)
    return _call_loader(subject, _prepare_dataset, dataset)


def _call_loader(subject: str, load: Callable, *args: Any, **options: Any) -> Any:
    """What `load` gives. Raises ValueError, which begins with `subject`, where it fails."""
    try:
        return load(*args, **options)
    except Exception as error:  # of datasets, pyarrow, fsspec and the HTTP client
        raise ValueError(f"{subject} can't be loaded: {_error_line(error)}") from error


def _error_line(error: BaseException) -> str:
    """What an error says; pyarrow and `datasets` use several lines."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__  # MemoryError has no text


def _find_local_files(dataset: str) -> tuple[Path, list[Path]]:
    """The folder below which names decide the split, and the files of the only form in it."""
    path = Path(dataset)
    if path.is_dir():
        root, found = path, [*path.glob("*"), *path.glob("*/*")]
    elif path.exists():
        root, found = path.parent, [path]
    else:
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(name) for name in glob.iglob(dataset, recursive=True)]
    by_form = [
        sorted(file for file in found if re.search(form, file.name) and file.is_file()) for form in FILE_FORM_PATTERNS
    ]
    there = list(filter(None, by_form))
    if len(there) != 1:
        raise ValueError(
            f"{dataset} must be a saved DatasetDict, or hold files of one form, itself or in folders: parquet, tar, or "
            "images with metadata.jsonl or metadata.csv. It holds "
            f"{[files[0].name for files in there] or 'none of them'}; a pattern such as 'folder/*.tar' chooses."
        )
    return root, there[0]


def _group_by_split(root: Path, files: list[Path], split: str) -> dict[str, list[Path]]:
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


def build_file_table(paths: list[Path], image_column: str) -> tuple[Dataset, list[tuple[int, str]]]:
    """The rows of tars or of lists of images: the columns of their JSON, and where the image is.

    Columns are judged by the first rows; what in a row is of another kind than its column counts as missing. Returned
    are the rows, and of each archive that ends too early the number of rows before, and what is wrong with it. Raises
    ValueError where a tar is compressed: its samples have no offset to be read at.
    """
    if compressed := [path for path in paths if path.suffix not in (".tar", *METADATA_SUFFIXES)]:
        raise ValueError(
            f"{compressed[0]} is compressed, and only plain tars can be read in place. Unpack it to a .tar."
        )
    head = list(itertools.islice(_iter_rows(paths, image_column), SCHEMA_SAMPLE_ROWS))
    if not head:
        return Dataset.from_dict({image_column: []}), []
    place = IMAGE_FIELDS if paths[0].suffix in METADATA_SUFFIXES else IMAGE_FIELDS | ARCHIVE_FIELDS
    names = dict.fromkeys(name for row in head for name in row if name not in (image_column, DAMAGE_COLUMN))
    judged = {name: _infer_feature(name, [row.get(name) for row in head]) for name in names}
    judged = {name: kind for name, kind in judged.items() if kind is not None}
    features = Features({image_column: place} | judged | {DAMAGE_COLUMN: JSON_FEATURES[str]})
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
    """Samples of a tar: "image", "json" and "cls", as far as there are, with the name, offset and size of each.

    Members in a row with one folder and one name up to its first dot are a sample; a repeated extension begins a new
    one. Of a damaged archive the samples before the damage are given, then tarfile.ReadError is raised.
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
            if stem and kind in ("image", "json", "cls"):  # files with no stem are hidden ones, such as macOS's
                sample.setdefault(kind, (name, offset, size))
    except tarfile.TarError:
        if len(sample) > 1:
            yield sample
        raise
    if sample:
        yield sample


def _infer_feature(name: str, values: list[Any]) -> Any:
    """What a column holds, by its name or what most of its values are: text, numbers, lists of one of these, or None.

    A column with a list in any row is one of lists.
    """
    if CAPTION_COLUMN_RE.fullmatch(name):
        return CAPTIONS_FEATURE
    if SIMILARITY_COLUMN_RE.fullmatch(name):
        return List(JSON_FEATURES[float])
    lists = [value for value in values if isinstance(value, list)]
    counts = Counter(type(one) for one in (itertools.chain(*lists) if lists else values) if one is not None)
    usual = counts.most_common(1)[0][0] if counts else str
    kind = JSON_FEATURES.get(float if usual is int and float in counts else usual)
    return List(kind) if lists and kind else kind


def _cast_value(value: Any, feature: Any) -> Any:
    """A value out of JSON as its column has it; None where it is of another kind: then the row lacks it."""
    if isinstance(feature, List):
        values = [value] if isinstance(value, str) else value
        return [_cast_value(one, feature.feature) for one in values] if isinstance(values, list) else None
    if JSON_FEATURES.get(type(value)) != feature and (type(value), feature) != (int, JSON_FEATURES[float]):
        return None
    return replace_surrogates(value) if isinstance(value, str) else value


def _iter_table_rows(paths: list[Path], image_column: str, features: Features) -> Iterator[dict[str, Any]]:
    """Rows of the table; a damage is one, too."""
    for row in _iter_rows(paths, image_column):
        place = {image_column: row.pop(image_column, None)}
        yield {
            name: _cast_value(row.get(name), kind) for name, kind in features.items() if name != image_column
        } | place


def _iter_rows(paths: list[Path], image_column: str) -> Iterator[dict[str, Any]]:
    for path in paths:
        read = _iter_metadata_rows if path.suffix in METADATA_SUFFIXES else _iter_tar_rows
        try:
            for row, image in read(path):
                row = row if isinstance(row, dict) else {}  # its columns then count as missing
                yield {name: row[name] for name in row if name != DAMAGE_COLUMN} | {image_column: image}
        except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:  # of a header that is garbage
            if path.suffix == ".csv":  # people write these: a slip in a line must not end the dataset there in silence
                raise ValueError(f"{path}: {error}") from None
            yield {DAMAGE_COLUMN: replace_surrogates(f"{path}: {error}"[:MAX_DETAIL_CHARACTERS])}


def _iter_tar_rows(path: Path) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Of each sample, its JSON and where its image is."""
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
            if "cls" in sample:  # the number of a class, as clip-benchmark's tars have it
                row = (row if isinstance(row, dict) else {}) | {"cls": _read_json_at(file, *sample["cls"][1:])}
            yield row, image


def _iter_metadata_rows(path: Path) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Yield each row of a list and the image that is its `file_name`, relative to the list."""
    for row in (_iter_csv_rows if path.suffix == ".csv" else _iter_json_rows)(path):
        image, name = None, row.pop("file_name", None) if isinstance(row, dict) else None
        if isinstance(name, str):  # an address stays one, which is refused as such
            image = {"path": replace_surrogates(name if "://" in name else os.path.abspath(path.parent / name))}
        yield row, image


def _iter_json_rows(path: Path) -> Iterator[Any]:
    """Yield the JSON of each line. Raises ValueError as `_bounded_lines` does."""
    with path.open("rb") as file:
        yield from map(_parse_json, filter(bytes.strip, _iter_bounded_lines(file)))


def _iter_csv_rows(path: Path) -> Iterator[dict[str, str | None]]:
    """Yield the cells of each row by the names of their columns; an empty cell is None.

    Raises ValueError if the file is no CSV of UTF-8 whose first line names `file_name`, or as `_bounded_lines` does.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(_iter_bounded_lines(file), strict=True)
        try:
            if "file_name" not in (names := rows.fieldnames or []):
                raise ValueError(f"the first line must name the column file_name, columns apart by commas, got {names}")
            for row in rows:
                if row.pop(None, None) is not None:
                    raise ValueError(f"line {rows.line_num} has more cells than the first one; quote texts with commas")
                yield {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num}: {error}") from error


def _iter_bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of a list.

    Raises ValueError if one is longer than `MAX_JSON_BYTES`: the file may be sparse, and reading on may not end.
    """
    number = 0
    while line := file.readline(MAX_ROW_JSON_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_JSON_BYTES:
            raise ValueError(
                f"line {number} has more than {MAX_ROW_JSON_BYTES:,} bytes; it and what follows are left out"
            )
        yield line


def _iter_tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
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


def _read_json_at(file: BinaryIO, offset: int, length: int) -> Any:
    file.seek(offset)
    return _parse_json(file.read(min(length, MAX_ROW_JSON_BYTES + 1)))  # which sees whether there are too many


def _parse_json(data: bytes) -> Any:
    """The value, None where `data` is no JSON or too long; a whole number beyond 64 bits counts as missing."""
    try:
        return json.loads(data, parse_int=_parse_integer) if len(data) <= MAX_ROW_JSON_BYTES else None
    except (ValueError, RecursionError):
        return None


def _parse_integer(digits: str) -> int | None:
    return number if -(2**63) <= (number := int(digits)) < 2**63 else None
