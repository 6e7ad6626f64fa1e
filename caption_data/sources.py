"""Open caption datasets of every supported form as a `Split`, with the images still encoded.

A dataset has one of these forms:

- a saved `DatasetDict`;
- a folder of parquet files;
- folders of images with a `metadata.jsonl` or `metadata.csv`, in which the column `file_name` is the path of the image,
  and a single caption becomes a list with one caption;
- WebDataset tars in the layout of the CAPIVARA authors, with one image (`jpg` or `png`) and one `json` per sample;
- a Hub id.

Parquet files and datasets of the Hub are copied to the cache of `datasets`, which maps them into memory. Tars and image
folders are read in place: the cache holds only a table of their rows, which is built again if the size or the
modification time of a file changes. Nothing is extracted, and nothing is unpickled.

Names decide to which split a file belongs. If a folder of the file has the name of a split, the innermost such folder
decides. Otherwise the start of the file name decides, for example `test-0001.parquet`. The names of splits are
`SPLIT_NAMES` and the name of the requested split. If no file has the name of a split, all files belong to "train", as
on the Hub. Such files are not also used as "test", because a model would then be evaluated on its training data.
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
from caption_data.embedded import (
    DIGEST_COLUMN,
    EMBEDS_COLUMN,
    EMBEDS_DTYPE,
    ENCODER_COLUMN,
    embeds_shape,
    find_invalid_embeds,
    image_encoder_of,
)
from caption_data.file_tables import build_file_table
from caption_data.rows import SkippedRow

# Regular expressions for the file names of each supported form. All files of a dataset must have the same form.
FILE_FORM_PATTERNS = (r"\.parquet$", r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", r"^metadata\.jsonl$", r"^metadata\.csv$")
# Names of files and folders that are recognized as the name of a split.
SPLIT_NAMES = ("train", "training", "restval", "validation", "valid", "val", "dev", "test", "testing")
STAGE_FILE = "stage.json"  # file in each folder that a stage of `captions` writes
# Row numbers in the file name of a part (a parquet file that a stage of `captions` writes): the number of its first
# row, and the number of its last row plus 1.
PART_NAME_RE = re.compile(r"-(\d{9})-(\d{9})$")
DATASET_INFO_TIMEOUT_S = 20  # seconds to wait for the Hub to answer whether a dataset exists
PARQUET_BATCH_ROWS = 16  # rows that are decoded at the same time
COLUMN_CHUNK_ROWS = 4096  # rows of a column without images that are read at the same time
# Parquet stores a repeated value once, so a malicious file of 1 kB can expand to gigabytes of text. Parquet reduces the
# size of captions to about a tenth, and hardly reduces the size of images, so valid files stay far below this limit.
MAX_PARQUET_EXPANSION = 100  # decoded bytes per byte of the parquet files
UNLIMITED_EXPANSION_BYTES = 100_000_000  # files with at most this many decoded bytes may expand further


@dataclass(eq=False)
class Split:
    """One split of a dataset: its rows in a fixed order, with encoded images.

    Attributes:
        name: Path, pattern or Hub id of the dataset.
        split: Name of the split.
        image_column: Name of the image column.
        data: The rows. None in subclasses that read the rows without `datasets`.
        image_access: Rules for the image files: folders in which they may lie, and largest number of pixels.
        paths: Files that hold the rows. Empty for saved datasets and datasets of the Hub.
        damaged_archives: One record for each tar or JSON Lines file whose rows after a damaged place are missing.
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
        """Name of the dataset and of the split, for messages."""
        return f"{self.name}, split {self.split!r}"

    @property
    def features(self) -> Features:
        """Types of the columns, as a dict from column name to feature of `datasets`."""
        return self.data.features

    @property
    def is_embedded(self) -> bool:
        """True if the rows have embeddings instead of images (`caption_data.embedded`)."""
        return self.image_column == EMBEDS_COLUMN

    @property
    def columns(self) -> list[str]:
        """Names of all columns of the split, in order."""
        return list(self.features)

    def limited(self, limit: int | None) -> "Split":
        """Return the split with only `limit` rows, which are evenly spaced; None: return all rows."""
        if limit is None or limit >= len(self):
            return self
        return replace(self, data=self.data.select([row * len(self) // limit for row in range(limit)]))

    def check_columns(self, names: Iterable[str]) -> None:
        """Raise ValueError if the split lacks a column in `names`. The message lists the columns of the split."""
        for name in names:
            if name not in self.columns:
                raise ValueError(f"{self.display_name} has no column {name!r}; there are {self.columns}.")

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int = 0, column_names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over the rows as dicts, with images not decoded.

        Args:
            start: Number of the first row, counted from 0.
            column_names: Columns to read. Default: all columns.
        """
        data = self.data if column_names is None else self.data.select_columns(list(column_names))
        return iter(data.skip(start) if start < len(data) else ())

    def row(self, index: int) -> dict[str, Any]:
        """Return the row with number `index`, counted from 0, as a dict. The image is not decoded."""
        return self.data[index]

    def iter_column(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Iterate over the values of a column, some thousand rows at a time."""
        return (table[name] for table in self.data.select_columns([name]).with_format("arrow").iter(COLUMN_CHUNK_ROWS))

    @cached_property
    def image_encoders(self) -> set[str]:
        """Digests of the image encoders that made the embeddings of a split without images."""
        return {str(encoder) for chunk in self.iter_column(ENCODER_COLUMN) for encoder in chunk.unique().to_pylist()}

    @cached_property
    def invalid_embeds(self) -> dict[int, str]:
        """Faults of the embeddings of a split without images: number of each invalid row -> description."""
        _, width = embeds_shape(self.features, self.display_name)
        return find_invalid_embeds(self.iter_column(EMBEDS_COLUMN), width)

    @property
    def stored_views(self) -> int:
        """Number of embeddings per row of a split without images. 1: the image itself. Above 1: augmentations."""
        return embeds_shape(self.features, self.display_name)[0]

    def check_embeds(self, model: str, fingerprint: str = "", views: int = 1) -> None:
        """Check that a model can use the embeddings of a split without images.

        Args:
            model: Folder or Hub id of the model, or "open_clip:…".
            fingerprint: Fingerprint of an open_clip model (`Embedder.fingerprint`).
            views: Views that are needed, see `check_views`.

        Raises:
            ValueError: If the embeddings were made by another image encoder or by several, have another width, or lack
                the needed views. The message names the digests of the encoders.
        """
        from modeling_capivara.loading import load_config  # imports torch, which the stages do without
        from modeling_capivara.two_towers import embedding_width

        self.check_views(views)
        encoders, encoder = sorted(self.image_encoders), image_encoder_of(model, fingerprint)
        if encoders != [encoder]:
            raise ValueError(
                f"{self.display_name} has embeddings of the image encoder {' and '.join(encoders)}, but the image "
                f"encoder of {model} is {encoder}. Use the base model that the dataset card names, or embed the images "
                f"again: python -m captions.embed --model {model} --dataset IMAGES --output FOLDER"
            )
        _, width = embeds_shape(self.features, self.display_name)
        # The settings of open_clip models do not state the width.
        if not model.startswith("open_clip:"):
            expected = embedding_width(load_config(model))
            if width != expected:
                raise ValueError(
                    f"{self.display_name} has embeddings of width {width}, but those of {model} have width {expected}. "
                    "The dataset was changed after captions.embed wrote it. Make it again."
                )

    def check_views(self, views: int) -> None:
        """Check that a split without images has the needed views.

        Args:
            views: 1: the image itself. V above 1: V augmentations. 0: a new augmentation each time.

        Raises:
            ValueError: If the split has other views.
        """
        stored = self.stored_views
        if views == 1 < stored:
            raise ValueError(
                f"{self.display_name} has {stored} augmented views of each image, but the image itself is needed. "
                f"Train on it with --augmented_views {stored}, or embed the images without --views."
            )
        if views == 0 or views > stored:
            allowed = "1" if stored == 1 else f"2 to {stored}"
            raise ValueError(
                f"{self.display_name} has embeddings instead of images, so that augmented_views must be {allowed}, got "
                f"{views}. More views must be made from the images, with captions.embed --views."
            )

    def describe_embeds(self) -> dict[str, dict[str, str]]:
        """Return the key of a result file that says that images were embeddings in the dataset; empty for images."""
        if not self.is_embedded:
            return {}
        return {"image_embeds": {"dtype": EMBEDS_DTYPE, "encoder": " ".join(sorted(self.image_encoders))}}

    def load_image(self, row: int) -> PIL.Image.Image:
        """Decode the image of the row with number `row`. Raises BadImage if the image is missing or invalid."""
        if self.is_embedded:
            raise BadImage("no image", "the dataset has embeddings instead of images")
        return decode_image(self.data[row][self.image_column], self.image_access)

    def decode_images(self, rows: Sequence[int]) -> Iterator[tuple[int, PIL.Image.Image | BadImage]]:
        """Decode the images of rows with several threads.

        Yields:
            The tuple (number of the row, image) for each row, in order. For a missing or invalid image, the second
            value is a BadImage.
        """
        return decode_images(rows, lambda row: self.data[row][self.image_column], self.image_access)

    @cached_property
    def image_digests(self) -> list[str]:
        """BLAKE2b-128 hex digest of each image file, one per row. The first access reads all image files.

        For a missing or invalid image, the digest is computed from the error message. A split with embeddings instead
        of images has the digests in a column.
        """
        if self.is_embedded:
            return [digest or "" for chunk in self.iter_column(DIGEST_COLUMN) for digest in chunk.to_pylist()]
        digests, quiet = [], not process_state().is_main_process
        for row in tqdm(range(len(self)), desc="Reading images", unit="image", disable=quiet):
            try:
                image = read_image_bytes(self.data[row][self.image_column], self.image_access)
            except BadImage as bad:
                # The message does not contain the folder of the image, so that the digest is the same on every machine.
                image = self.describe_image_error(row, bad).encode("utf-8", "replace")
            digests.append(blake2b(image, digest_size=16).hexdigest())
        return digests

    def describe_image_error(self, row: int, bad: BadImage) -> str:
        """Return the message of an image error without the folder of the image file, for use in published results.

        Args:
            row: Number of the row with the image.
            bad: The error.
        """
        path = image_display_path(self.data[row][self.image_column])
        # Remove only the folder, because the file name may be escaped or shortened in the error.
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
    """Open one split of a dataset.

    The dataset can be a saved `DatasetDict`, a folder of parquet files, folders of images with a `metadata.jsonl` or
    `metadata.csv`, WebDataset tars, or a Hub id. It can have embeddings instead of images (`caption_data.embedded`):
    if it lacks the image column and has the column `image_embeds`, this becomes the image column of the split.

    Args:
        dataset: Folder, file, glob pattern or Hub id.
        split: Name of the split.
        image_column: Name of the image column. For tars and image folders, which have no such column, this is the name
            that the image column gets.
        image_roots: Folders outside of the dataset in which images may lie. Image paths and links to all other folders
            are refused.
        max_pixels: Largest number of pixels (width x height); larger images count as bad.
        parquet_type: Subclass of `Split` that reads the parquet files `paths` in place. Default: copy parquet files to
            the cache of `datasets`.

    Returns:
        The split, with at least one row.

    Raises:
        ValueError: If the dataset or the split does not exist (the message lists the splits), the split is empty, a tar
            is compressed, the images of a saved or parquet dataset are stored as positions in tars, a link leads out of
            the dataset, or the dataset is the output of an unfinished stage of a caption build.
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
    if image_column not in opened.columns and EMBEDS_COLUMN in opened.columns:
        embeds_shape(opened.features, opened.display_name)
        opened.image_column = EMBEDS_COLUMN
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


def list_splits(dataset: str) -> list[str]:
    """Return the names of all splits of a dataset, in the forms that `open_split` opens.

    Raises ValueError if the dataset does not exist.
    """
    path = Path(dataset)
    if (path / "dataset_dict.json").is_file():
        return read_json(path / "dataset_dict.json", splits=list)["splits"]
    if not path.exists() and not glob.has_magic(dataset):
        return list(_load_from_hub(dataset))
    return list(_group_by_split(*_find_local_files(dataset), "train"))


def find_missing_rows(folder: Path) -> tuple[int, str]:
    """Count the rows that a stage of a caption build has not written yet, by the names of its parquet files.

    Args:
        folder: Output folder of the stage, with a `stage.json`.

    Returns:
        The number of missing rows, and the shell command that writes them.

    Raises:
        ValueError: If the `stage.json` is damaged.
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
    """Raise ValueError if a folder is the output of an unfinished stage of a caption build.

    The message contains the command that finishes the stage. A folder without `stage.json` is accepted.
    """
    missing, command = find_missing_rows(folder) if (folder / STAGE_FILE).is_file() else (0, "")
    if missing > 0:
        raise ValueError(
            f"{folder} is unfinished: {missing} rows are missing. Other tasks may still be writing them. This command "
            f"writes the missing rows: {command}"
        )


def disable_decoding(data: Dataset, image_column: str) -> Dataset:
    """Return a dataset that does not decode its images, audio and video, even if they are nested in other columns.

    This is a safety measure, because `datasets` opens any path in the data for decoding. An image column of plain bytes
    or paths becomes a column of images that are not decoded.
    """
    plain = Features({name: _without_decoding(feature) for name, feature in data.features.items()})
    if isinstance(plain.get(image_column), Value):  # parquet files of other programs hold plain bytes or paths
        plain[image_column] = Image(decode=False)
    fingerprint = data._fingerprint
    for column in [name for name in plain if plain[name] != data.features[name]]:
        data = data.cast_column(column, plain[column])
    data._fingerprint = fingerprint  # the rows are unchanged, and existing builds record this value
    return data


def _without_decoding(feature: Any) -> Any:
    """Return a feature (column type of `datasets`) in which decoding is turned off, also in nested features."""
    if isinstance(feature, dict):
        return {name: _without_decoding(field_feature) for name, field_feature in feature.items()}
    if hasattr(feature, "feature"):  # the column types List and LargeList
        return replace(feature, feature=_without_decoding(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) else feature


def find_split_files(dataset: str, split: str, image_roots: Sequence[Path] = ()) -> tuple[list[Path], AllowedFolders]:
    """Find the data files of a split on this machine.

    Args:
        dataset: Folder, file or glob pattern.
        split: Name of the split.
        image_roots: Folders outside of the dataset in which files and images may lie.

    Returns:
        The files, and the folders in which these files and their images may lie.

    Raises:
        ValueError: If no file belongs to the split, the dataset has files of several forms (for example parquet and
            tar), or a link leads out of the allowed folders.
    """
    root, files = _find_local_files(dataset)
    rule = (
        f" A file belongs to the split that its folder or the start of its name states, for example {split}-0001; "
        "otherwise to train."
    )
    paths = select_split(_group_by_split(root, files, split), dataset, split, rule)
    # For a glob pattern, images may lie in the folders of all matching files.
    folders = [root] if Path(dataset).exists() else sorted({path.parent for path in paths})
    # If the dataset is a single file, the user chose it explicitly, so it may be a link to any folder.
    requested = [Path(dataset)] if Path(dataset).is_file() else []
    allowed_folders = AllowedFolders(folders[0], [*folders[1:], *requested, *image_roots])
    allowed_folders.check(paths)
    return paths, allowed_folders


def load_data_files(form: str, paths: Sequence[Path], dataset: str) -> Dataset:
    """Load data files with a loader of `datasets`.

    The files are passed one by one. With a folder, `datasets` would follow its README, which may name any other file or
    URL.

    Args:
        form: Name of the loader, for example "parquet" or "imagefolder".
        paths: Files to load.
        dataset: Name of the dataset, for errors.

    Returns:
        The rows of all files.

    Raises:
        ValueError: If a file cannot be loaded, or parquet files expand too much.
    """
    names = {"train": [glob.escape(str(path)) for path in paths]}
    try:
        return _call_loader(dataset, _load_checked_dataset, form, data_files=names, split="train")
    except ValueError:
        if form == "parquet":
            _check_expansion(paths)  # raises an error that names the damaged file; the current error does not
        raise


def _load_checked_dataset(*args: Any, split: str | None = None, **options: Any) -> Dataset | DatasetDict:
    """Load a dataset like `datasets.load_dataset`, but check the size of parquet files before they are decoded.

    Args:
        *args: Positional arguments of `load_dataset_builder`.
        split: Split to load. Default: all splits, as a `DatasetDict`.
        **options: Keyword arguments of `load_dataset_builder`.

    Raises:
        ValueError: If parquet files expand too much (`MAX_PARQUET_EXPANSION`).
    """
    builder = load_dataset_builder(*args, **options)
    if isinstance(builder, Parquet):  # `_generate_tables` only runs for files that are not cached
        builder._generate_tables = partial(_iter_checked_tables, builder._generate_tables)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _iter_checked_tables(generate: Callable, files: Sequence[str], **options: Any) -> Iterator[tuple[Any, pa.Table]]:
    """Check the decoded size of parquet files, then generate their tables.

    Args:
        generate: Method `_generate_tables` of the parquet builder of `datasets`.
        files: Paths of the parquet files.
        **options: Other arguments of `generate`.

    Yields:
        The tuples (key, table) that `generate` yields: the key of the table in `datasets`, and the Arrow table.
    """
    _check_expansion(files)
    yield from generate(files=files, **options)


def _check_expansion(paths: Sequence[str | Path]) -> None:
    """Raise ValueError if a parquet file is damaged, or if the files together are too large after decoding.

    The limit is the larger of `UNLIMITED_EXPANSION_BYTES` and `MAX_PARQUET_EXPANSION` times the size of the files. The
    files are decoded a few rows at a time, because the sizes in their metadata are only a lower bound: a value that
    dictionary or delta encoding stores once counts once there, even if many rows repeat it.
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
    """Return the size in bytes that an array has without dictionary encoding, so that repeated values are counted."""
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
    """Load a `DatasetDict` that was saved with `save_to_disk`.

    Args:
        folder: Folder of the dataset.
        image_roots: Other folders in which the Arrow files of the dataset may lie.

    Raises:
        ValueError: If a link or path leads out of these folders, or the dataset can't be loaded.
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
    """Return the folders in which the files of a dataset may lie.

    These are the folder of the dataset (for a Hub id, its folder in the Hub cache), the folders `image_roots`, and the
    folder into which `datasets` unpacks archives.

    Args:
        dataset: Folder or Hub id.
        image_roots: Additional folders.
    """
    cached = Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"
    folder = Path(dataset) if Path(dataset).exists() else cached
    return AllowedFolders(folder, [Path(datasets.config.EXTRACTED_DATASETS_PATH), *image_roots])


def select_split(splits: dict[str, Any], dataset: str, split: str, hint: str = "") -> Any:
    """Return the value of a split in a dict by split name.

    Args:
        splits: Values by split name, for example a `DatasetDict`.
        dataset: Name of the dataset, for the error message.
        split: Name of the split to return.
        hint: Text at the end of the error message.

    Raises:
        ValueError: If the split does not exist. The message lists the existing splits.
    """
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}; there are {sorted(splits)}.{hint}")
    return splits[split]


@contextmanager
def open_parquet(path: str | Path, hint: str = "") -> Iterator[pq.ParquetFile]:
    """Open a parquet file for reading, as a context manager.

    Raises ValueError if the file is missing or damaged, also while its rows are read. The message names the file and
    ends with the text `hint`.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be loaded: {_error_line(error)}{hint}") from error


def _load_from_hub(dataset: str) -> Any:
    """Load all splits of a dataset of the Hub, as a `DatasetDict`.

    Args:
        dataset: Hub id such as "laicsiifes/flickr30k-pt-br".

    Raises:
        ValueError: If the Hub id is invalid, or the dataset can't be loaded.
    """
    is_file_name = any(re.search(pattern, dataset) for pattern in FILE_FORM_PATTERNS)
    if is_file_name or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset):
        raise ValueError(f"{dataset} does not exist, and it is not a Hub id such as 'laicsiifes/flickr30k-pt-br'.")
    subject = f"{dataset} is not a path on this machine, and as a Hub id it"
    cached = dataset_folders(dataset).folder, Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
    if not any(map(Path.exists, cached)):
        # Fail after one request: `datasets` would retry six times, for half a minute.
        _call_loader(subject, HfApi().dataset_info, dataset, timeout=DATASET_INFO_TIMEOUT_S)
    return _call_loader(subject, _load_checked_dataset, dataset)


def _call_loader(subject: str, load: Callable, *args: Any, **options: Any) -> Any:
    """Call a function that loads data, and convert all its errors to ValueError.

    Args:
        subject: What is loaded, for example the name of a dataset; the error message begins with it.
        load: The function.
        *args: Positional arguments of the function.
        **options: Keyword arguments of the function.

    Returns:
        The result of the function.
    """
    try:
        return load(*args, **options)
    except Exception as error:  # `datasets` and its libraries raise many types of errors
        raise ValueError(f"{subject} can't be loaded: {_error_line(error)}") from error


def _error_line(error: BaseException) -> str:
    """Return the message of an error, or of the error that caused it, on a single line."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__  # MemoryError has no text


def _find_local_files(dataset: str) -> tuple[Path, list[Path]]:
    """Find all data files of a dataset on this machine.

    Args:
        dataset: Folder, file or glob pattern. In a folder, files are searched directly and one level below.

    Returns:
        The root folder and the sorted data files. Only the names of folders below the root can state the split of a
        file.

    Raises:
        ValueError: If there are no data files, or the data files have different forms (for example parquet and tar).
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
    """Group data files by the split to which they belong.

    The innermost folder with the name of a split decides, otherwise the start of the file name. Names of splits are
    `SPLIT_NAMES` and the requested split. A file without such a name is grouped under the name of its folder, or under
    the first word of its file name. If no file has the name of a split, all files belong to the split whose name the
    root folder has, or to "train" if the root folder has another name.

    Args:
        root: Folder below which the names of folders count.
        files: Data files below `root`.
        split: Name of the requested split.

    Returns:
        The files of each split, by split name.
    """
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
