"""Caption data sets of every form as one: a `datasets.Dataset` with its images undecoded.

    split = open_split("shards/train-*.tar", "train", "image")
    image_bytes(split.data[0]["image"], split.files)

A data set is a saved `DatasetDict`, parquet files, folders of images with a `metadata.jsonl` (an image is its
`file_name`), WebDataset tars in the authors' layout (`jpg|png` and `json`), or a Hub id. Parquet files and data sets of
the Hub are copied to the cache of `datasets`, which maps them into memory; of tars and lists of images it holds a table
alone, images stay where they are.

A file is of the split that its innermost folder, or else the start of its name, names: one of the usual names, or the
one asked for. Where no file names one, all are split "train", as on the Hub; they don't serve as "test" too, which
would measure a model on what it was trained on.
"""

import glob
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE

from capivara_common.files import read_json
from capivara_common.image_files import MAX_IMAGE_PIXELS, SUFFIXES, ImageFiles
from capivara_common.links import Bounds, refuse_links_out
from caption_data.rows import NO_TEXTS, Skipped
from caption_data.tars import table_of_files

FORMS = (r"\.parquet$", r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", r"^metadata\.jsonl$")  # how names of files end
SPLIT_NAMES = ("train", "training", "restval", "validation", "valid", "val", "dev", "test", "testing")
STAGE_FILE = "stage.json"  # of a folder that a stage of `captions` writes
SPLIT = r"\w+([.-]\w+)*"  # names of files begin with it
RECORD = {"version": int, "command": str, "source": dict, "rows_per_part": int}
RECORD |= {"settings": dict, "columns": dict, "versions": dict}
SOURCE = {"name": str, "split": str, "rows": int}
MAX_ROWS = 10**9  # names of parts have nine digits
MAX_SHOWN = 300  # letters of what a damaged file holds
HUB_TIMEOUT = 20  # seconds
READ_ROWS = 16  # of a parquet file at once


class NoSplit(ValueError):
    """A data set lacks a split; the message names those that it has."""

    def __init__(self, message: str, split: str = "") -> None:
        super().__init__(message)
        self.split = split

    def by_flag(self, args: Any) -> ValueError:
        """The same, with the flag of a command's arguments that named the split."""
        flags = (field.name for field in fields(args) if field.name.endswith("split"))
        flag = next(name for name in flags if getattr(args, name) == self.split)
        return ValueError(f"{self} Name another split by --{flag}.")


@dataclass(eq=False)
class Split:
    """One split of one data set, in a fixed order.

    An image of a row is left as it is, `{"bytes", "path"}` or its place in an archive: `capivara_common.image_files`
    opens it, with the `files` of the split.
    """

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
        return Features({name: kind for name, kind in self.data.features.items() if name != NO_TEXTS})

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


def open_split(
    dataset: str,
    split: str,
    image_column: str,
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Split:
    """One split of a data set.

    Args:
        dataset: folder of a saved `DatasetDict`; a file, glob or folder of parquet files or of uncompressed tars;
            folder of images with `metadata.jsonl`; or a Hub id. The module's text has the rule of splits.
        split: name.
        image_column: column of the images; in tars and image folders, the name their images get.
        image_roots: folders outside of the data set that image paths and links in it may lead into.
        max_pixels: of an image.

    Raises:
        ValueError: there is no such data set or split (those that are there are named), it is empty, its tars are
            compressed, a file of it is a link out of it, or it is the output of a stage that is unfinished.
    """
    path, paths, damages = Path(dataset), [], []
    refuse_unfinished(path)
    if (path / "dataset_dict.json").is_file():
        data = of_split(load_saved(path, image_roots), dataset, split)
        files = ImageFiles(Bounds(path, image_roots), max_pixels)
    elif not path.exists() and not glob.has_magic(dataset):
        data = of_split(_from_hub(dataset), dataset, split)
        files = ImageFiles(copied_bounds(dataset, image_roots), max_pixels, dataset)
    else:
        paths, bounds = files_of_split(dataset, split, image_roots)
        files = ImageFiles(bounds, max_pixels)
        if paths[0].suffix == ".parquet":
            data = load_files("parquet", paths, dataset)
        else:
            data, damages = _loaded(dataset, table_of_files, paths, image_column)
    damaged = [Skipped(dataset, split, row, "damaged archive", detail) for row, detail in damages]
    opened = Split(dataset, split, image_column, undecoded(data, image_column), files, paths, damaged)
    if not len(opened):
        told = "; ".join(damage.detail for damage in damaged[:3])
        raise ValueError(f"{opened.where} is empty{told and f', its archives are damaged: {told}'}.")
    return opened


def refuse_unfinished(folder: Path) -> None:
    """Raise ValueError, with the command that goes on, where a folder is of a stage that lacks parts, by their names.

    `captions.stages` writes such folders; an unfinished one must not be taken for the whole.
    """
    if not (folder / STAGE_FILE).is_file():
        return
    record = stage_record(folder)
    rows, end, gaps = record["source"]["rows"], 0, []
    names = (re.search(r"-(\d{9})-(\d{9})$", path.stem) for path in folder.glob("*.parquet"))
    for start, stop in [*sorted(tuple(map(int, name.groups())) for name in names if name), (rows, rows)]:
        gaps += [range(end, start)] if start > end else []
        end = max(end, stop)
    if gaps:
        named = ", ".join(f"{gap.start} to {gap.stop - 1}" for gap in gaps[:5]) + ", …" * (len(gaps) > 5)
        raise ValueError(
            f"{folder} is unfinished: of its {rows} rows, {sum(map(len, gaps))} are missing ({named}). Other tasks may "
            f"be at work on them; this command makes what is missing: {record['command']}"
        )


def stage_record(output: Path | str) -> dict[str, Any]:
    """`stage.json` of a folder. Raises ValueError where there is none, or it is not what a stage has written."""
    path = Path(output) / STAGE_FILE
    if not path.is_file():
        raise ValueError(f"{output} is no output of a stage, it has no {STAGE_FILE}.")
    try:
        record = read_json(path, **RECORD)
        source, rows_per_part = record["source"], record["rows_per_part"]
        good = all(type(source.get(name)) is kind for name, kind in SOURCE.items()) and rows_per_part > 0
        if not good or not 0 <= source["rows"] < MAX_ROWS or not re.fullmatch(SPLIT, source["split"]):
            raise ValueError(f"{path}: what it says of the source can't be, {str(source)[:MAX_SHOWN]}")
    except ValueError as error:
        raise ValueError(f"{error}. Put back a copy of it, or remove {output} and run its stage again.") from error
    return record


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
    parquet = [path for path in paths if path.suffix == ".parquet"]
    for path in parquet:
        with opened_parquet(path):  # a truncated one has no end
            pass
    try:
        return _loaded(dataset, load_dataset, form, data_files=names, split="train")
    except ValueError:
        for path in parquet:
            with opened_parquet(path) as file:
                for _ in file.iter_batches(READ_ROWS):
                    pass  # until the one that is damaged, which the error names
        raise


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


def load_embedded(folder: Path) -> DatasetDict:
    """A saved data set with all images in its tables, so that `datasets` may decode and copy them: it opens any path.

    Raises ValueError as `load_saved`, and where an image is a path alone.
    """
    data = load_saved(folder)
    for name, split in data.items():
        for column in [column for column, feature in split.features.items() if isinstance(feature, Image)]:
            if outside := pc.struct_field(split.data.column(column), "bytes").null_count:
                raise ValueError(f"{folder}, split {name!r}: {outside} of its images lie outside of its tables.")
    return data


def copied_bounds(dataset: str, image_roots: Sequence[Path] = ()) -> Bounds:
    """Where the files of a folder or Hub id that `datasets` reads lie: there, or in its cache; and what it unpacks."""
    cached = Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"
    folder = Path(dataset) if Path(dataset).exists() else cached
    return Bounds(folder, [Path(datasets.config.EXTRACTED_DATASETS_PATH), *image_roots])


def form_hint(folder: Path) -> str:
    """A sentence for where a folder of pictures was taken for something else; empty where it was not."""
    listed = not folder.is_dir() or any(folder.rglob("metadata.*"))  # its pictures are rows of the list
    if listed or not any(file.suffix.lower() in SUFFIXES for file in folder.rglob("*")):
        return ""
    return " The folder holds pictures, too: --form images takes these, and leaves all else."


def of_split(splits: dict[str, Any], dataset: str, split: str, rule: str = "") -> Any:
    """The split of a data set. Raises NoSplit where there is none of the name; `rule` ends the message."""
    if split not in splits:
        raise NoSplit(f"{dataset} has no split {split!r}; there are {sorted(splits)}.{rule}", split)
    return splits[split]


@contextmanager
def opened_parquet(path: Path, advice: str = "") -> Iterator[pq.ParquetFile]:
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
    return _loaded(subject, load_dataset, dataset)


def _loaded(subject: str, load: Callable, *args: Any, **options: Any) -> Any:
    """What `load` gives. Raises ValueError, which begins with `subject`, where it fails."""
    try:
        return load(*args, **options)
    except Exception as error:  # of datasets, pyarrow, fsspec and the HTTP client
        raise ValueError(f"{subject} can't be loaded: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """What an error says; pyarrow and `datasets` use several lines."""
    return " ".join(str(error.__cause__ or error).split())


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
    there = [files for files in by_form if files]
    if len(there) != 1:
        raise ValueError(
            f"{dataset} must be a saved DatasetDict, or hold files of one form, itself or in folders: parquet, tar, or "
            f"images with metadata.jsonl. It holds {[files[0].name for files in there] or 'none of them'}; a pattern "
            "such as 'folder/*.tar' chooses."
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
