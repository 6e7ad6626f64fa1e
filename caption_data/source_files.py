"""The files of a data set: which there are, of which split, and what is loaded of them by `datasets`.

A file is of the split that its innermost folder, or else the start of its name, names: one of the usual names, or the
one asked for. Where no file names one, all are split "train", as on the Hub; they don't serve as "test" too, which
would measure a model on what it was trained on.
"""

import glob
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub.constants import HF_HUB_CACHE

from capivara_common.files import read_json
from capivara_common.image_files import SUFFIXES
from capivara_common.links import Bounds, refuse_links_out

FORMS = (r"\.parquet$", r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", r"^metadata\.jsonl$")  # how names of files end
READ_ROWS = 16  # of a parquet file at once
SPLIT_NAMES = ("train", "training", "restval", "validation", "valid", "val", "dev", "test", "testing")


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
        return loaded(dataset, load_dataset, form, data_files=names, split="train")
    except ValueError:
        for _ in itertools.chain.from_iterable(map(parquet_batches, parquet)):
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
    data = loaded(str(folder), load_from_disk, str(folder))
    if not isinstance(data, DatasetDict):
        raise ValueError(f"{folder} is one split of a data set; name the folder of the whole, {folder.parent}.")
    return data


def load_embedded(folder: Path) -> DatasetDict:
    """A saved data set with all images in its tables, so that `datasets` may decode and copy them: it opens any path.

    Raises ValueError as `load_saved`, and where an image is a path alone.
    """
    data = load_saved(folder)
    for name, split in data.items():
        for column in [column for column, feature in split.features.items() if isinstance(feature, datasets.Image)]:
            if outside := pc.struct_field(split.data.column(column), "bytes").null_count:
                raise ValueError(f"{folder}, split {name!r}: {outside} of its images lie outside of its tables.")
    return data


def copied_bounds(dataset: str, image_roots: Sequence[Path] = ()) -> Bounds:
    """Where the files of a folder or Hub id that `datasets` reads lie: there, or in its cache; and what it unpacks."""
    cached = Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"
    folder = Path(dataset) if Path(dataset).exists() else cached
    return Bounds(folder, [Path(datasets.config.EXTRACTED_DATASETS_PATH), *image_roots])


def picture_files(folder: Path) -> list[Path]:
    """Pictures in a folder and its folders, by name; neither hidden ones nor links that lead out of it."""
    bounds = Bounds(folder)
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and bounds.hold(file)
        and file.is_file()
    )


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


def loaded(subject: str, load: Callable, *args: Any, **options: Any) -> Any:
    """What `load` gives. Raises ValueError, which begins with `subject`, where it fails."""
    try:
        return load(*args, **options)
    except Exception as error:  # of datasets, pyarrow, fsspec and the HTTP client
        raise ValueError(f"{subject} can't be loaded: {one_line(error)}") from error


@contextmanager
def opened_parquet(path: Path, advice: str = "") -> Iterator[pq.ParquetFile]:
    """A parquet file. Raises ValueError, which names it and ends with `advice`, where it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be loaded: {one_line(error)}{advice}") from error


def parquet_batches(
    path: Path, groups: list[int] | None = None, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows of a parquet file, of all its row groups or some, a few at once. Raises ValueError as `opened_parquet`."""
    with opened_parquet(path) as file:
        yield from file.iter_batches(READ_ROWS, row_groups=groups, columns=columns)


def one_line(error: BaseException) -> str:
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
