"""Open caption datasets of every supported form as a `Split`, with the images still encoded.

A dataset is a saved `DatasetDict`, a folder of parquet files, folders of images with a `metadata.jsonl` or
`metadata.csv` (the column `file_name` names the image; a text becomes a list with one caption), WebDataset tars in the
layout of the CAPIVARA authors (`jpg|png` and `json`), or a Hub id. Parquet files and datasets of the Hub are copied to
the cache of `datasets`, which maps them into memory. Tars and image folders are read in place: the cache holds a table
of their rows, which is made again if a file changes in size or time. Nothing is extracted, and nothing is unpickled.

A file belongs to the split that its innermost folder names, or else the start of its file name: one of `SPLIT_NAMES`,
or the requested split. If no file names a split, all files belong to "train", as on the Hub. They are not used as
"test" as well, because a model would then be evaluated on its training data.
"""

import glob
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset_builder, load_from_disk
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from tqdm.auto import tqdm

from capivara_common.environment import process_state
from capivara_common.files import AllowedFolders, check_links_stay_inside, read_json
from capivara_common.image_files import (
    MAX_IMAGE_PIXELS,
    BadImage,
    ImageAccess,
    decode_image,
    decode_images,
    image_display_path,
    read_image_bytes,
)
from caption_data.file_tables import build_file_table
from caption_data.rows import SkippedRow

# File names of the supported forms; a dataset holds files of one form.
FILE_FORM_PATTERNS = (r"\.parquet$", r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", r"^metadata\.jsonl$", r"^metadata\.csv$")
# Split names that a file or folder name may state.
SPLIT_NAMES = ("train", "training", "restval", "validation", "valid", "val", "dev", "test", "testing")
STAGE_FILE = "stage.json"  # file in each folder that a stage of `captions` writes
PART_NAME_RE = re.compile(r"-(\d{9})-(\d{9})$")  # first row and end of a part, in its file name
DATASET_INFO_TIMEOUT_S = 20  # seconds
PARQUET_BATCH_ROWS = 16  # rows that are decoded at the same time
# Parquet stores a repeated value once, so a file of 1 kB can expand to gigabytes of text. Captions compress about
# tenfold, images hardly at all.
MAX_PARQUET_EXPANSION = 100  # decoded bytes per byte of the parquet files
UNLIMITED_EXPANSION_BYTES = 100_000_000  # decoded bytes that files of any size may expand to


@dataclass(eq=False)
class Split:
    """One split of a dataset: its rows in a fixed order, with encoded images.

    Attributes:
        name: Path, pattern or Hub id of the dataset.
        split: Name of the split.
        image_column: Name of the image column.
        data: The rows; None in subclasses that read them in another way.
        image_access: Which image files may be opened, and how large images may be.
        paths: Files that hold the rows; empty for saved datasets and datasets of the Hub.
        damaged_archives: Archives that end too early.
    """

    name: str
    split: str
    image_column: str
    data: Dataset
    image_access: ImageAccess
    paths: list[Path] = field(default_factory=list)
    damaged_archives: list[SkippedRow] = field(default_factory=list)

    @property
    def display_name(self) -> str:
        """Name of dataset and split, for messages."""
        return f"{self.name}, split {self.split!r}"

    @property
    def features(self) -> Features:
        """Types of the columns, by name."""
        return self.data.features

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self.features)

    def check_columns(self, names: Iterable[str]) -> None:
        """Raise ValueError if a column is missing; the message lists the columns of the split."""
        for name in names:
            if name not in self.columns:
                raise ValueError(f"{self.display_name} has no column {name!r}; there are {self.columns}.")

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int = 0, column_names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over the rows from row `start` on, with only the columns `column_names` (default: all columns)."""
        data = self.data if column_names is None else self.data.select_columns(list(column_names))
        return iter(data.skip(start) if start < len(data) else ())

    def row(self, index: int) -> dict[str, Any]:
        """Return row `index`, counted from 0."""
        return self.data[index]

    def load_image(self, row: int) -> PIL.Image.Image:
        """Decode the image of a row. Raises BadImage if it cannot be used."""
        return decode_image(self.data[row][self.image_column], self.image_access)

    def decode_images(self, rows: range) -> Iterator[tuple[int, PIL.Image.Image | BadImage]]:
        """Iterate over (row, image) in order, decoded by several threads; a bad image is a BadImage."""
        return decode_images(rows, lambda row: self.data[row][self.image_column], self.image_access)

    @cached_property
    def image_digests(self) -> list[str]:
        """BLAKE2b-128 hex digest of each image file, or of its error for a bad image. Reads all image files."""
        digests, quiet = [], not process_state().is_main_process
        for row in tqdm(range(len(self)), desc="Reading images", unit="image", disable=quiet):
            try:
                image = read_image_bytes(self.data[row][self.image_column], self.image_access)
            except BadImage as bad:
                # Without the folder of the image, so that the digest is the same on every machine.
                image = self.describe_image_error(row, bad).encode("utf-8", "replace")
            digests.append(blake2b(image, digest_size=16).hexdigest())
        return digests

    def describe_image_error(self, row: int, bad: BadImage) -> str:
        """Return the error of an image without the folder of the file: results contain no paths of a machine."""
        path = image_display_path(self.data[row][self.image_column])
        # Remove only the folder: the file name may be escaped or cut in the error.
        folder = path.removesuffix(Path(path).name)
        return str(bad).replace(folder, "").replace(repr(folder)[1:-1], "")


def open_split(
    dataset: str,
    split: str,
    image_column: str,
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
    parquet_type: type[Split] | None = None,
) -> Split:
    """Open one split of a dataset in any form that the module's docstring lists.

    Args:
        dataset: Folder, file, glob pattern or Hub id.
        split: Name of the split.
        image_column: Name of the image column. In tars and image folders, the images get this name.
        image_roots: Folders outside of the dataset that image paths and links may lead to.
        max_pixels: Images with more pixels (width x height) count as bad.
        parquet_type: Subclass of `Split` that reads parquet files in place, from `paths`. Default: copy them to the
            cache.

    Returns:
        The split, with at least one row.

    Raises:
        ValueError: If there is no such dataset or split (the message lists the splits), it is empty, its tars are
            compressed, its images are positions in tars that are not part of the dataset, a link leads out of the
            dataset, or it is the output of an unfinished stage.
    """
    path, paths, damages, data = Path(dataset), [], [], None
    check_finished(path)
    if (path / "dataset_dict.json").is_file():
        data = select_split(load_saved_dataset(path, image_roots), dataset, split)
        access = ImageAccess(AllowedFolders(path, image_roots), max_pixels)
    elif not path.exists() and not glob.has_magic(dataset):
        data = select_split(_load_from_hub(dataset), dataset, split)
        access = ImageAccess(dataset_folders(dataset, image_roots), max_pixels)
    else:
        paths, allowed_folders = find_split_files(dataset, split, image_roots)
        access = ImageAccess(allowed_folders, max_pixels)
        if paths[0].suffix != ".parquet":
            data, damages = _call_loader(dataset, build_file_table, paths, image_column)
        elif parquet_type is None:
            data = load_data_files("parquet", paths, dataset)
    damaged = [SkippedRow(dataset, split, row, "damaged archive", detail) for row, detail in damages]
    if data is None:
        opened = parquet_type(dataset, split, image_column, data, access, paths)
    else:
        opened = Split(dataset, split, image_column, disable_decoding(data, image_column), access, paths, damaged)
    feature = opened.features.get(image_column)
    if isinstance(feature, dict) and "archive" in feature and (not paths or paths[0].suffix == ".parquet"):
        raise ValueError(
            f"{opened.display_name}: the images in column {image_column!r} are positions in tars that may have changed "
            "since. Use the tars as the dataset, or store the image bytes in it."
        )
    if not len(opened):
        damage_details = "; ".join(damage.detail for damage in damaged[:3])
        ending = f"; its archives are damaged: {damage_details}" if damage_details else ""
        raise ValueError(f"{opened.display_name} is empty{ending}.")
    return opened


def find_missing_rows(folder: Path) -> tuple[int, str]:
    """Return how many rows of a stage are not written yet, and the command that writes them.

    The names of the parquet files in the stage's folder say which rows are written. Raises ValueError if its
    `stage.json` is damaged.
    """
    matches = map(PART_NAME_RE.search, (path.stem for path in folder.glob("*.parquet")))
    written = sum(int(match[2]) - int(match[1]) for match in matches if match)
    try:
        record = read_json(folder / STAGE_FILE, command=str, source=dict)
        return record["source"]["rows"] - written, record["command"]
    except (ValueError, KeyError, TypeError) as error:
        fault = f"{folder / STAGE_FILE}: {error}"
        raise ValueError(f"{fault}. Restore the file, or remove {folder} and run its stage again.") from error


def check_finished(folder: Path) -> None:
    """Raise ValueError, with the command that continues, if a folder is the output of an unfinished stage."""
    missing, command = find_missing_rows(folder) if (folder / STAGE_FILE).is_file() else (0, "")
    if missing > 0:
        raise ValueError(
            f"{folder} is unfinished: {missing} rows are missing. Other tasks may still be writing them. This command "
            f"writes the missing rows: {command}"
        )


def disable_decoding(data: Dataset, image_column: str) -> Dataset:
    """Turn off the decoding of images, audio and video at any depth; `datasets` would open any path in them."""
    plain = Features({name: _without_decoding(feature) for name, feature in data.features.items()})
    if isinstance(plain.get(image_column), Value):  # parquet files of other tools hold plain bytes or paths
        plain[image_column] = Image(decode=False)
    fingerprint = data._fingerprint
    for column in [name for name in plain if plain[name] != data.features[name]]:
        data = data.cast_column(column, plain[column])
    data._fingerprint = fingerprint  # the rows are the same, and existing builds have recorded it
    return data


def _without_decoding(feature: Any) -> Any:
    """Return a feature with decoding turned off at any depth."""
    if isinstance(feature, dict):
        return {name: _without_decoding(field_feature) for name, field_feature in feature.items()}
    if hasattr(feature, "feature"):  # List and LargeList
        return replace(feature, feature=_without_decoding(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) else feature


def find_split_files(dataset: str, split: str, image_roots: Sequence[Path] = ()) -> tuple[list[Path], AllowedFolders]:
    """Return the files of a split, all of one form, and the folders that the files and their images may lie in.

    Raises ValueError if there is no such file, there are several forms of files, or a link leads out of the folder.
    """
    root, files = _find_local_files(dataset)
    rule = (
        f" A file belongs to the split that its folder or the start of its name states, for example {split}-0001; "
        "otherwise to train."
    )
    paths = select_split(_group_by_split(root, files, split), dataset, split, rule)
    # A pattern has no folder of its own.
    folders = [root] if Path(dataset).exists() else sorted({path.parent for path in paths})
    # The user named this file, so it may be a link to anywhere.
    requested = [Path(dataset)] if Path(dataset).is_file() else []
    allowed_folders = AllowedFolders(folders[0], [*folders[1:], *requested, *image_roots])
    allowed_folders.check(paths)
    return paths, allowed_folders


def load_data_files(form: str, paths: Sequence[Path], dataset: str) -> Dataset:
    """Load files with the loader `form` of `datasets`, for example "parquet".

    The files are passed by name, because a README in their folder may name any file or address.
    """
    names = {"train": [glob.escape(str(path)) for path in paths]}
    try:
        return _call_loader(dataset, _prepare_dataset, form, data_files=names, split="train")
    except ValueError:
        if form == "parquet":
            _check_expansion(paths)  # its error names the damaged file
        raise


def _prepare_dataset(*args: Any, split: str | None = None, **options: Any) -> Dataset | DatasetDict:
    """Load a dataset like `datasets.load_dataset`. Raises ValueError if parquet files expand too much."""
    builder = load_dataset_builder(*args, **options)
    if isinstance(builder, Parquet):  # `_generate_tables` only runs for files that are not cached
        builder._generate_tables = partial(_iter_checked_tables, builder._generate_tables)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _iter_checked_tables(generate: Callable, files: Sequence[str], **options: Any) -> Iterator[tuple[Any, pa.Table]]:
    """Check the size of parquet files, then generate their tables."""
    _check_expansion(files)
    yield from generate(files=files, **options)


def _check_expansion(paths: Sequence[str | Path]) -> None:
    """Decode parquet files a few rows at a time. Raises ValueError if they are damaged or expand too much.

    The sizes in their metadata are a lower bound: they do not count values that dictionaries and deltas repeat.
    """
    stored, decoded = sum(map(os.path.getsize, paths)), 0
    limit = max(UNLIMITED_EXPANSION_BYTES, MAX_PARQUET_EXPANSION * stored)
    for path in paths:
        with open_parquet(path) as file:
            groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
            sizes = (sum(map(_decoded_bytes, batch.columns)) for batch in file.iter_batches(PARQUET_BATCH_ROWS))
            is_too_large = sum(group.total_byte_size for group in groups) > limit
            while not is_too_large and (size := next(sizes, None)) is not None:
                decoded += size
                is_too_large = decoded > limit
            if is_too_large:
                raise ValueError(
                    f"{path} expands too much: parquet files may expand to at most {MAX_PARQUET_EXPANSION} times "
                    f"their size, or {UNLIMITED_EXPANSION_BYTES / 1e6:.0f} MB; these files have {stored:,} bytes. "
                    "If you trust them, write them again without compression and dictionaries."
                )


def _decoded_bytes(array: pa.Array) -> int:
    """Return the size of an array in bytes after its dictionaries are replaced by the values that they repeat."""
    if pa.types.is_dictionary(array.type):
        values = array.dictionary
        if pa.types.is_primitive(values.type):
            return len(array) * values.type.bit_width // 8
        return pc.sum(pc.take(pc.binary_length(values), array.indices)).as_py() or 0
    if pa.types.is_struct(array.type):
        return sum(map(_decoded_bytes, array.flatten()))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _decoded_bytes(array.flatten())
    return array.nbytes


def load_saved_dataset(folder: Path, image_roots: Sequence[Path] = ()) -> DatasetDict:
    """Load a saved `DatasetDict` whose tables lie in its folder or in `image_roots`.

    Raises ValueError if a link or path leads out of these folders, or the dataset can't be loaded.
    """
    check_links_stay_inside(folder)
    allowed_folders = AllowedFolders(folder, image_roots)
    for split in read_json(folder / "dataset_dict.json", splits=list)["splits"]:
        state = folder / str(split) / "state.json"
        allowed_folders.check([state])
        tables = read_json(state, _data_files=list)["_data_files"] if state.is_file() else []
        names = [table.get("filename") if isinstance(table, dict) else None for table in tables]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{state} must list the tables of the split in _data_files, each with its filename.")
        allowed_folders.check([state.parent / name for name in names])
        if missing := [name for name in names if not (state.parent / name).is_file()]:
            raise ValueError(f"{state} names {missing[0]}, but there is no such file.")
    data = _call_loader(str(folder), load_from_disk, str(folder))
    if not isinstance(data, DatasetDict):
        raise ValueError(f"{folder} is one split of a dataset. Use the folder of the whole dataset, {folder.parent}.")
    return data


def dataset_folders(dataset: str, image_roots: Sequence[Path] = ()) -> AllowedFolders:
    """Return the folders that the files of a folder or Hub id may lie in.

    These are the folder or its Hub cache, `image_roots`, and the folder into which `datasets` unpacks archives.
    """
    cached = Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"
    folder = Path(dataset) if Path(dataset).exists() else cached
    return AllowedFolders(folder, [Path(datasets.config.EXTRACTED_DATASETS_PATH), *image_roots])


def select_split(splits: dict[str, Any], dataset: str, split: str, hint: str = "") -> Any:
    """Return a split by name. Raises ValueError, which ends with `hint`, if it does not exist."""
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}; there are {sorted(splits)}.{hint}")
    return splits[split]


@contextmanager
def open_parquet(path: str | Path, hint: str = "") -> Iterator[pq.ParquetFile]:
    """Open a parquet file. Raises ValueError, which names the file and ends with `hint`, if it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be loaded: {_error_line(error)}{hint}") from error


def _load_from_hub(dataset: str) -> Any:
    """Load all splits of a dataset of the Hub. Raises ValueError if it does not exist."""
    is_file_name = any(re.search(pattern, dataset) for pattern in FILE_FORM_PATTERNS)
    if is_file_name or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset):
        raise ValueError(f"{dataset} does not exist, and it is not a Hub id such as 'laicsiifes/flickr30k-pt-br'.")
    subject = f"{dataset} is not a path on this machine, and as a Hub id it"
    cached = dataset_folders(dataset).folder, Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
    if not any(map(Path.exists, cached)):
        # Fail after one request: `datasets` would retry six times, for half a minute.
        _call_loader(subject, HfApi().dataset_info, dataset, timeout=DATASET_INFO_TIMEOUT_S)
    return _call_loader(subject, _prepare_dataset, dataset)


def _call_loader(subject: str, load: Callable, *args: Any, **options: Any) -> Any:
    """Call `load`. Raises ValueError, which begins with `subject`, if it fails."""
    try:
        return load(*args, **options)
    except Exception as error:  # datasets, pyarrow, fsspec and the HTTP client raise many types
        raise ValueError(f"{subject} can't be loaded: {_error_line(error)}") from error


def _error_line(error: BaseException) -> str:
    """Return the message of an error on one line; pyarrow and `datasets` use several lines."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__  # MemoryError has no text


def _find_local_files(dataset: str) -> tuple[Path, list[Path]]:
    """Return the data files of a local dataset, and the folder below which names decide the split.

    Raises ValueError unless all data files have the same form.
    """
    path = Path(dataset)
    if path.is_dir():
        root, candidates = path, [*path.glob("*"), *path.glob("*/*")]
    elif path.exists():
        root, candidates = path.parent, [path]
    else:
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        candidates = [Path(name) for name in glob.iglob(dataset, recursive=True)]
    by_form = [
        sorted(file for file in candidates if re.search(form, file.name) and file.is_file())
        for form in FILE_FORM_PATTERNS
    ]
    forms = list(filter(None, by_form))
    if len(forms) != 1:
        raise ValueError(
            f"{dataset} must be a saved DatasetDict, or hold data files of one form, directly or in folders: parquet, "
            "tar, metadata.jsonl or metadata.csv. It holds "
            f"{[str(files[0]) for files in forms] or 'none of these'}. A pattern such as 'folder/*.tar' selects files."
        )
    return root, forms[0]


def _group_by_split(root: Path, files: list[Path], split: str) -> dict[str, list[Path]]:
    """Group files by the split that they belong to; the rule is in the module's docstring."""
    split_names = [split, *SPLIT_NAMES]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        *folders, name = file.relative_to(root).parts
        name_starts = [word for word in split_names if re.match(rf"{re.escape(word)}(?![^\W\d_])", name)]
        stated = [folder for folder in reversed(folders) if folder in split_names] + name_starts
        other = folders[-1] if folders else re.split(r"[\W\d_]", name)[0]
        by_split.setdefault(stated[0] if stated else other, []).append(file)
    if by_split.keys().isdisjoint(split_names):
        return {root.name if root.name in split_names else "train": files}
    return by_split
