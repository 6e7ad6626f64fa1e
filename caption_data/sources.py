"""Open caption datasets of all supported file formats in the same way: as a `Split`, which gives access to the rows.

The main function is `open_split`. A dataset has one of these forms:

- a saved `DatasetDict`;
- a folder of parquet files;
- folders of images with a `metadata.jsonl` or `metadata.csv`, whose column `file_name` is the path of the image;
- WebDataset tars with one image and one `json` per sample;
- a Hub id.

A file belongs to the split that its folder or the start of its name states, for example `test-0001.parquet`. If no name
states a split, all files belong to "train".
"""

import glob
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
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

from capivara_common import image_files
from capivara_common.environment import get_or_init_distributed_state
from capivara_common.files import AllowedFolders, check_folder_for_outside_links_and_pipes, read_json
from capivara_common.image_files import BadImage, ImageAccess
from caption_data import embedded
from caption_data.rows import SkippedRow
from caption_data.tars_and_image_folders import load_rows_and_list_damaged_files

# Regular expressions for the file names of each supported form. All files of a dataset must have the same form. For
# security, no archive is extracted and no pickle file is loaded.
FILE_FORM_PATTERNS = (r"\.parquet$", r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", r"^metadata\.jsonl$", r"^metadata\.csv$")
# Names of splits that are recognized in the names of files and folders.
SPLIT_NAMES = ("train", "training", "restval", "validation", "valid", "val", "dev", "test", "testing")
# Each stage (command) of the caption pipeline `captions` writes its output to a folder. The folder contains the file
# `STAGE_FILE` with the settings of the stage, and several parquet files. The name of a parquet file ends with two
# numbers: the number of its first row, and the number of its last row plus 1.
STAGE_FILE = "stage.json"
PART_NAME_RE = re.compile(r"-(\d{9})-(\d{9})$")
DATASET_INFO_TIMEOUT_S = 20  # seconds to wait for the Hub to answer whether a dataset exists
PARQUET_BATCH_ROWS = 16  # rows that are decoded at the same time; few, because each row may hold a large image
COLUMN_CHUNK_ROWS = 4096  # rows that are read at the same time if a single column without images is read
# This limit protects against malicious files: parquet stores a repeated value once, so a file of 1 kB can expand to
# gigabytes of text. Valid files stay far below the limit: captions expand to about ten times their size in the file,
# and images hardly expand.
MAX_PARQUET_EXPANSION = 100  # largest allowed number of decoded bytes per byte of the parquet files
UNLIMITED_EXPANSION_BYTES = 100_000_000  # up to this decoded size, any expansion is allowed


@dataclass(eq=False)
class Split:
    """One split of a dataset: its rows in a fixed order, whose images are decoded only when needed.

    Attributes:
        name: Path, glob pattern or Hub id of the dataset.
        split: Name of the split.
        image_column: Name of the image column.
        data: The rows. None in subclasses that read the rows without the library `datasets`.
        image_access: Folders in which image files may lie, and largest number of pixels.
        paths: Files that hold the rows. Empty for a saved `DatasetDict` and for a dataset of the Hub.
        damaged_archives: One entry for each damaged tar or JSON Lines file, whose rows after the damage are missing.
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
        """Name of the dataset and of the split for messages, such as "flickr30k, split 'test'"."""
        return f"{self.name}, split {self.split!r}"

    @cached_property
    def features(self) -> Features:
        """Types of the columns: `{column name: feature}`, where a feature is a column type of `datasets`."""
        return self.data.features

    @property
    def is_embedded(self) -> bool:
        """True if the rows have precomputed image embeddings instead of images (see `caption_data.embedded`)."""
        return self.image_column == embedded.EMBEDS_COLUMN

    @property
    def columns(self) -> list[str]:
        """Names of all columns of the split, in order."""
        return list(self.features)

    def limited(self, limit: int | None) -> "Split":
        """Return a smaller split with `limit` evenly spaced rows of this split, for example for a quick trial run.

        If `limit` is None or not smaller than the number of rows, this split itself is returned.
        """
        if limit is None or limit >= len(self):
            return self
        return replace(self, data=self.data.select([row * len(self) // limit for row in range(limit)]))

    def check_columns(self, names: Iterable[str]) -> None:
        """Check that the split has all columns in `names`.

        Raises:
            ValueError: If a column is missing. The message lists the columns that the split has.
        """
        for name in names:
            if name not in self.columns:
                raise ValueError(f"{self.display_name} has no column {name!r}; its columns are {self.columns}.")

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int = 0, column_names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over the rows from row `start` to the end. The images are not decoded.

        Args:
            start: Index of the first row.
            column_names: Columns to read. None: all columns.

        Returns:
            Iterator over the rows, each as `{column name: value}`.
        """
        data = self.data if column_names is None else self.data.select_columns(list(column_names))
        return iter(data.skip(start) if start < len(data) else ())

    def iter_column(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Iterate over a column in chunks of at most `COLUMN_CHUNK_ROWS` rows, without reading other columns.

        Args:
            name: Name of the column.

        Returns:
            Iterator over Arrow arrays with the values of consecutive rows.
        """
        return (table[name] for table in self.data.select_columns([name]).with_format("arrow").iter(COLUMN_CHUNK_ROWS))

    @cached_property
    def image_encoders(self) -> set[str]:
        """Digests of the image encoders that computed the embeddings of this split; normally a single digest.

        Only for a split with embeddings instead of images. The first access reads the column `image_encoder`.
        """
        chunks = self.iter_column(embedded.ENCODER_COLUMN)
        return {str(encoder) for chunk in chunks for encoder in chunk.unique().to_pylist()}

    @cached_property
    def invalid_embeds(self) -> dict[int, str]:
        """Rows whose embedding is missing or not of unit length: `{row index: description of the fault}`.

        Only for a split with embeddings instead of images. The first access reads all embeddings.
        """
        return embedded.find_invalid_embeds(self.iter_column(embedded.EMBEDS_COLUMN), self.embeds_shape[1])

    @property
    def embeds_shape(self) -> tuple[int, int]:
        """Number and width of the embeddings in each row, as a tuple (views, width).

        Only for a split with embeddings instead of images. `views` is 1 if a row has the embedding of the image itself.
        Otherwise it is the number of augmented copies (views) of the image.
        """
        return embedded.check_embeds_columns_and_get_shape(self.features, self.display_name)

    def check_embeds(self, model: str, width: int, fingerprint: str = "", views: int = 1) -> None:
        """Check that a model can use the stored embeddings of this split instead of running its own image encoder.

        Args:
            model: Folder or Hub id of the model, or "open_clip:…" for a model of open_clip.
            width: Number of dimensions of the model's embeddings.
            fingerprint: String that identifies an open_clip model (`Embedder.fingerprint`). Ignored for other models.
            views: Number of augmented copies (views) of each image that are needed. 1: the unchanged image is needed.

        Raises:
            ValueError: If another image encoder has computed the embeddings, their width differs, or views are missing.
        """
        self.check_views(views)
        encoders, encoder = sorted(self.image_encoders), embedded.resolve_image_encoder_digest(model, fingerprint)
        if encoders != [encoder]:
            raise ValueError(
                f"{self.display_name} has embeddings of the image encoder {' and '.join(encoders)}, but the image "
                f"encoder of {model} is {encoder}. Use the base model that the dataset card names, or embed the images "
                f"again: python -m captions.embed --model {model} --dataset IMAGES --output FOLDER"
            )
        _, stored_width = self.embeds_shape
        if stored_width != width:
            raise ValueError(
                f"{self.display_name} has embeddings of width {stored_width}, but {model} has width {width}. The "
                "dataset was changed after captions.embed wrote it. Make the dataset again."
            )

    def check_views(self, views: int) -> None:
        """Check that this split has embeddings of all views (augmented copies of each image) that the caller needs.

        Args:
            views: Number of needed views. 1: the embedding of each image itself is needed. 0: a new view is needed in
                each training step, which stored embeddings never provide.

        Raises:
            ValueError: If the split does not have these views.
        """
        stored, _ = self.embeds_shape
        if views == 1 < stored:
            raise ValueError(
                f"{self.display_name} has {stored} augmented views of each image, but the image itself is needed. "
                f"Train on it with --augmented_views {stored}, or embed the images without --views."
            )
        if views == 0 or views > stored:
            allowed = "1" if stored == 1 else f"2 to {stored}"
            raise ValueError(
                f"{self.display_name} has embeddings instead of images, so augmented_views must be {allowed}, got "
                f"{views}. To get more views, embed the images again with captions.embed --views."
            )

    def describe_embeds(self) -> dict[str, dict[str, str]]:
        """Describe the embeddings of this split, so that a result file can record how they were computed.

        Returns:
            `{"image_embeds": {"dtype": type of the numbers, "encoder": digests of the image encoders, separated by
            blanks}}` if the split has embeddings. `{}` if it has images.
        """
        if not self.is_embedded:
            return {}
        return {"image_embeds": {"dtype": embedded.EMBEDS_DTYPE, "encoder": " ".join(sorted(self.image_encoders))}}

    def load_image(self, row: int) -> PIL.Image.Image:
        """Return the decoded image of the row with the index `row`.

        Raises:
            BadImage: If the image is missing or invalid, or the split has embeddings instead of images.
        """
        if self.is_embedded:
            raise BadImage("no image", "the dataset has embeddings instead of images")
        return image_files.decode_image(self.data[row][self.image_column], self.image_access)

    def decode_images(self, rows: Sequence[int]) -> Iterator[PIL.Image.Image | BadImage]:
        """Decode the images of several rows in parallel threads.

        Args:
            rows: Indices of the rows.

        Returns:
            Iterator over the images, in the order of `rows`. A `BadImage` error, which does not show the folder of the
            file, takes the place of a missing or invalid image.
        """
        return image_files.decode_row_images(
            rows, lambda row: self.data[row][self.image_column], self.image_access, self.describe_image_error
        )

    @cached_property
    def image_digests(self) -> list[str]:
        """Hex digests (BLAKE2b-128) that identify the content of the image files, one digest per row.

        The first access reads all image files. The entry of a missing or invalid image is the digest of the error
        message. If the split has embeddings, the digests are read from its column `image_digest`; a missing digest is
        "".
        """
        if self.is_embedded:
            return [digest or "" for chunk in self.iter_column(embedded.DIGEST_COLUMN) for digest in chunk.to_pylist()]
        digests, quiet = [], not get_or_init_distributed_state().is_main_process
        for row in tqdm(range(len(self)), desc="Reading images", unit="image", disable=quiet):
            try:
                image = image_files.read_image_bytes(self.data[row][self.image_column], self.image_access)
            except BadImage as bad:
                # This message does not name the folder of the image, so that its digest is the same on every machine.
                image = self.describe_image_error(row, bad).encode("utf-8", "replace")
            digests.append(blake2b(image, digest_size=16).hexdigest())
        return digests

    def describe_image_error(self, row: int, bad: BadImage) -> str:
        """Return the message of an image error without the folder of the image file, so that it can be published.

        Args:
            row: Index of the row with the image.
            bad: The error that was raised for the image.
        """
        path = image_files.image_display_path(self.data[row][self.image_column])
        # Remove only the folder from the text of the error, in plain and in escaped form. A search for the whole path
        # could fail, because the file name may be escaped or shortened in the text.
        folder = path.removesuffix(Path(path).name)
        return str(bad).replace(folder, "").replace(repr(folder)[1:-1], "")


def open_split(
    dataset: str,
    split: str,
    image_column: str,
    image_roots: Sequence[Path] = (),
    max_pixels: int = ImageAccess.max_pixels,
    parquet_type: type[Split] | None = None,
) -> Split:
    """Open one split of a dataset: a saved `DatasetDict`, parquet files, image folders, WebDataset tars, or a Hub id.

    If the dataset has precomputed image embeddings, the column `image_embeds` takes the place of the image column.

    Args:
        dataset: Folder, file, glob pattern or Hub id.
        split: Name of the split.
        image_column: Name of the image column. For tars and image folders, the image column gets this name.
        image_roots: Folders outside of the dataset in which images may lie.
        max_pixels: Largest number of pixels (width x height). Larger images count as bad.
        parquet_type: Subclass of `Split` that reads parquet files in place, such as `ParquetSplit`. None: the library
            `datasets` copies the files to its cache.

    Returns:
        The split, with at least one row.

    Raises:
        ValueError: If the split is missing or empty, or the dataset is unfinished or can't be read. The message names
            the cause.
    """
    path, paths, damages, data = Path(dataset), [], [], None
    check_stage_is_finished(path)
    if (path / "dataset_dict.json").is_file():
        data = select_split(check_paths_and_load_saved_dataset(path, image_roots), dataset, split)
        allowed_folders = AllowedFolders(path, image_roots)
    elif not path.exists() and not glob.has_magic(dataset):
        data = select_split(_load_from_hub(dataset), dataset, split)
        allowed_folders = get_allowed_folders_of_dataset(dataset, image_roots)
    else:
        paths, allowed_folders = _find_split_files_and_allowed_folders(dataset, split, image_roots)
        if paths[0].suffix != ".parquet":
            # Tars and image folders are read in place. The cache holds only a table of their rows, which is built again
            # if the size or the modification time of a file changes.
            data, damages = _call_loader(dataset, load_rows_and_list_damaged_files, paths, image_column)
        elif parquet_type is None:
            data = load_listed_files("parquet", paths, dataset)
    access = ImageAccess(allowed_folders, max_pixels)
    damaged = [SkippedRow(dataset, split, row, "damaged archive", detail) for row, detail in damages]
    if data is None:
        opened = parquet_type(dataset, split, image_column, data, access, paths)
    else:
        opened = Split(dataset, split, image_column, disable_decoding(data, image_column), access, paths, damaged)
    if image_column not in opened.columns and embedded.EMBEDS_COLUMN in opened.columns:
        embedded.check_embeds_columns_and_get_shape(opened.features, opened.display_name)
        opened.image_column = embedded.EMBEDS_COLUMN
    feature = opened.features.get(image_column)
    if isinstance(feature, dict) and "archive" in feature and (not paths or paths[0].suffix == ".parquet"):
        raise ValueError(
            f"{opened.display_name}: column {image_column!r} does not contain the images, but only their positions in "
            "tars, which may have changed since. Use the tars as the dataset, or store the image bytes in the column."
        )
    if not len(opened):
        damage_details = "; ".join(damage.detail for damage in damaged[:3])
        ending = f"; its archives are damaged: {damage_details}" if damage_details else ""
        raise ValueError(f"{opened.display_name} is empty{ending}.")
    return opened


def list_splits(dataset: str) -> list[str]:
    """Return the names of all splits of a dataset, such as `["train", "test"]`.

    Args:
        dataset: Folder, file, glob pattern or Hub id. All dataset formats that `open_split` opens are supported.

    Raises:
        ValueError: If the dataset does not exist.
    """
    path = Path(dataset)
    if (path / "dataset_dict.json").is_file():
        return read_json(path / "dataset_dict.json", splits=list)["splits"]
    if not path.exists() and not glob.has_magic(dataset):
        return list(_load_from_hub(dataset))
    return list(_group_by_split(*_find_root_and_data_files(dataset), "train"))


def count_missing_stage_rows_and_get_command(folder: Path) -> tuple[int, str]:
    """Count the rows that are missing from an output folder of the caption pipeline, and return the command for them.

    Args:
        folder: Output folder of a stage, that is, a command of the pipeline, such as translation. Its file `stage.json`
            states the command and the number of input rows.

    Returns:
        The tuple (number of missing rows, shell command that writes the missing rows).

    Raises:
        ValueError: If the file `stage.json` is damaged.
    """
    matches = map(PART_NAME_RE.search, (path.stem for path in folder.glob("*.parquet")))
    written = sum(int(match[2]) - int(match[1]) for match in matches if match)
    try:
        record = read_json(folder / STAGE_FILE, command=str, source=dict)
        return record["source"]["rows"] - written, record["command"]
    except (ValueError, KeyError, TypeError) as error:
        fault = f"{folder / STAGE_FILE}: {error}"
        raise ValueError(f"{fault}. Restore the file, or remove {folder} and run its stage again.") from error


def check_stage_is_finished(folder: Path) -> None:
    """Check that a dataset folder is complete, if a stage (command) of the caption pipeline `captions` has written it.

    A folder without the file `stage.json` was not written by a stage, and is accepted.

    Raises:
        ValueError: If rows are missing (the message contains the command that writes them), or `stage.json` is damaged.
    """
    missing, command = count_missing_stage_rows_and_get_command(folder) if (folder / STAGE_FILE).is_file() else (0, "")
    if missing > 0:
        raise ValueError(
            f"{folder} is unfinished: {missing} rows are missing. Other tasks may still be writing them. This command "
            f"writes the missing rows: {command}"
        )


def disable_decoding(data: Dataset, image_column: str) -> Dataset:
    """Turn off the automatic decoding of images, audio and video in all columns of a dataset.

    This is a safety measure: to decode a value, the library `datasets` would open any path that the data contains.

    Args:
        data: The dataset.
        image_column: Name of the image column, which may hold images, bytes or paths.

    Returns:
        The same rows, with each image as `{"bytes": content of the file or None, "path": path or None}`.
    """
    plain = Features({name: _without_decoding(feature) for name, feature in data.features.items()})
    if isinstance(plain.get(image_column), Value):  # parquet files of other programs hold plain bytes or paths
        plain[image_column] = Image(decode=False)
    fingerprint = data._fingerprint
    for column in [name for name in plain if plain[name] != data.features[name]]:
        data = data.cast_column(column, plain[column])
    # `cast_column` has changed the fingerprint, but not the rows. Restore the fingerprint: outputs of earlier runs have
    # recorded it, and would otherwise seem to come from other data.
    data._fingerprint = fingerprint
    return data


def _without_decoding(feature: Any) -> Any:
    """Return a feature (column type of `datasets`) in which decoding is turned off, also in nested features."""
    if isinstance(feature, dict):
        return {name: _without_decoding(field_feature) for name, field_feature in feature.items()}
    if hasattr(feature, "feature"):  # true for the column types List and LargeList
        return replace(feature, feature=_without_decoding(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) else feature


def _find_split_files_and_allowed_folders(
    dataset: str, split: str, image_roots: Sequence[Path] = ()
) -> tuple[list[Path], AllowedFolders]:
    """Find the data files of a split on this machine.

    Args:
        dataset: Folder, file or glob pattern.
        split: Name of the split.
        image_roots: Folders outside of the dataset in which files and images may lie.

    Returns:
        The tuple (files of the split, folders in which these files and their images may lie).

    Raises:
        ValueError: If no file belongs to the split, the dataset has files of several forms (for example parquet and
            tar), or a link leads out of the allowed folders.
    """
    root, files = _find_root_and_data_files(dataset)
    rule = (
        f" A file belongs to the split that its folder or the start of its name states, for example {split}-0001; "
        "otherwise to train."
    )
    paths = select_split(_group_by_split(root, files, split), dataset, split, rule)
    # For a glob pattern, images may lie in the folders of all matching files.
    folders = [root] if Path(dataset).exists() else sorted({path.parent for path in paths})
    # A single file that the user names is always allowed, even if it is a symbolic link to a file in another folder.
    requested = [Path(dataset)] if Path(dataset).is_file() else []
    allowed_folders = AllowedFolders(folders[0], [*folders[1:], *requested, *image_roots])
    allowed_folders.check(paths)
    return paths, allowed_folders


def load_listed_files(form: str, paths: Sequence[Path], dataset: str) -> Dataset:
    """Load exactly the given data files with the library `datasets`, and no other files.

    Args:
        form: Name of a loader of `datasets`, for example "parquet" or "imagefolder".
        paths: Files to load.
        dataset: Name of the dataset for error messages.

    Returns:
        The rows of all files.

    Raises:
        ValueError: If a file can't be loaded, or parquet files are too large after decoding.
    """
    # `datasets` gets a list of files. From a folder, it would also read the README, which may name any file or URL.
    names = {"train": [glob.escape(str(path)) for path in paths]}
    try:
        return _call_loader(dataset, _load_dataset_with_size_check, form, data_files=names, split="train")
    except ValueError:
        if form == "parquet":
            # The error of `datasets` does not say which file is damaged. The check reads all files again, and raises an
            # error with the path of the damaged file, if there is one.
            _check_decoded_size_of_parquet_files(paths)
        raise


def _load_dataset_with_size_check(*args: Any, split: str | None = None, **options: Any) -> Dataset | DatasetDict:
    """Load a dataset like `datasets.load_dataset`, but check the size of parquet files before they are decoded.

    Args:
        *args: Positional arguments of `load_dataset_builder`.
        split: Split to load. Default: all splits, as a `DatasetDict`.
        **options: Keyword arguments of `load_dataset_builder`.

    Raises:
        ValueError: If parquet files are too large after decoding (see `_check_decoded_size_of_parquet_files`).
    """
    builder = load_dataset_builder(*args, **options)
    # Files that are already in the cache of `datasets` are not checked, because `_generate_tables` does not run for
    # them.
    if isinstance(builder, Parquet):
        generate_tables = builder._generate_tables

        def check_size_and_generate_tables(files: Sequence[str], **options: Any) -> Iterator[tuple[Any, pa.Table]]:
            _check_decoded_size_of_parquet_files(files)
            yield from generate_tables(files=files, **options)

        builder._generate_tables = check_size_and_generate_tables
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _check_decoded_size_of_parquet_files(paths: Sequence[str | Path]) -> None:
    """Raise ValueError if a parquet file is damaged, or if the files together are too large after decoding.

    The limit is the larger of `UNLIMITED_EXPANSION_BYTES` and `MAX_PARQUET_EXPANSION` times the size of the files. The
    files are decoded a few rows at a time to add up their sizes. The sizes in the metadata of the files would only be a
    lower bound: a value that many rows repeat counts once there if it is stored once (dictionary or delta encoding).
    """
    stored, decoded = sum(map(os.path.getsize, paths)), 0
    limit = max(UNLIMITED_EXPANSION_BYTES, MAX_PARQUET_EXPANSION * stored)

    def check_size(path: str | Path, size: int) -> None:
        if size > limit:
            raise ValueError(
                f"{path} is too large after decoding: more than {limit:,} bytes, but only {stored:,} bytes on disk. "
                f"Decoded files may have {MAX_PARQUET_EXPANSION} times their size on disk, or "
                f"{UNLIMITED_EXPANSION_BYTES / 1e6:.0f} MB. If you trust the data, write the files again without "
                "compression and dictionary encoding."
            )

    for path in paths:
        with open_parquet(path) as file:
            groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
            check_size(path, sum(group.total_byte_size for group in groups))
            for batch in file.iter_batches(PARQUET_BATCH_ROWS):
                decoded += sum(map(_compute_decoded_array_size, batch.columns))
                check_size(path, decoded)


def _compute_decoded_array_size(array: pa.Array) -> int:
    """Return the size in bytes of an array without dictionary encoding: a value counts each time that it occurs."""
    if pa.types.is_dictionary(array.type):
        values = array.dictionary
        if pa.types.is_primitive(values.type):
            return len(array) * values.type.bit_width // 8
        return pc.sum(pc.take(pc.binary_length(values), array.indices)).as_py() or 0
    if pa.types.is_struct(array.type):
        return sum(map(_compute_decoded_array_size, array.flatten()))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _compute_decoded_array_size(array.flatten())
    return array.nbytes


def check_paths_and_load_saved_dataset(folder: Path, image_roots: Sequence[Path] = ()) -> DatasetDict:
    """Load a `DatasetDict` that was saved with `save_to_disk`, after checking that its files are in allowed folders.

    Args:
        folder: Folder of the dataset.
        image_roots: Other allowed folders, to which Arrow files of the dataset may be links.

    Raises:
        ValueError: If a link or path leads out of the allowed folders, or the dataset can't be loaded.
    """
    check_folder_for_outside_links_and_pipes(folder)
    allowed_folders = AllowedFolders(folder, image_roots)
    for split in read_json(folder / "dataset_dict.json", splits=list)["splits"]:
        state = folder / str(split) / "state.json"
        allowed_folders.check([state])
        tables = read_json(state, _data_files=list)["_data_files"] if state.is_file() else []
        names = [table.get("filename") if isinstance(table, dict) else None for table in tables]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{state} must list the files of the split in _data_files, each with its filename.")
        allowed_folders.check([state.parent / name for name in names])
        if missing := [name for name in names if not (state.parent / name).is_file()]:
            raise ValueError(f"{state} lists {missing[0]}, but there is no such file. Save or copy the dataset again.")
    data = _call_loader(str(folder), load_from_disk, str(folder))
    if not isinstance(data, DatasetDict):
        raise ValueError(f"{folder} is one split of a dataset. Use the folder of the whole dataset, {folder.parent}.")
    return data


def get_allowed_folders_of_dataset(dataset: str, image_roots: Sequence[Path] = ()) -> AllowedFolders:
    """Return the folders from which files of a dataset may be read; paths to all other folders are refused.

    They are the folder of the dataset (for a Hub id, in the Hub's cache), `image_roots`, and the folder into which the
    library `datasets` unpacks archives.

    Args:
        dataset: Folder or Hub id of the dataset.
        image_roots: Additional folders that the user allows.
    """
    cached = Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}"
    folder = Path(dataset) if Path(dataset).exists() else cached
    return AllowedFolders(folder, [Path(datasets.config.EXTRACTED_DATASETS_PATH), *image_roots])


def select_split(splits: dict[str, Any], dataset: str, split: str, hint: str = "") -> Any:
    """Return the value of one split from a dict of splits, or raise an error that lists the existing splits.

    Args:
        splits: `{split name: value}`, for example a `DatasetDict`.
        dataset: Name of the dataset for the error message.
        split: Name of the requested split.
        hint: Advice at the end of the error message.

    Raises:
        ValueError: If the split does not exist.
    """
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}; its splits are {sorted(splits)}.{hint}")
    return splits[split]


@contextmanager
def open_parquet(path: str | Path, hint: str = "") -> Iterator[pq.ParquetFile]:
    """Open a parquet file for reading in a `with` block, and report a damaged file with a clear message.

    Args:
        path: Path of the file.
        hint: Advice at the end of the error message. It must begin with a blank or punctuation.

    Yields:
        The opened file.

    Raises:
        ValueError: If the file is missing or damaged, also if the `with` block reads a damaged row.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be loaded: {_format_error_on_one_line(error)}{hint}") from error


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
    converted = Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
    if not (get_allowed_folders_of_dataset(dataset).folder.exists() or converted.exists()):
        # If the dataset does not exist or the Hub can't be reached, fail after one request. `datasets` would retry six
        # times, for half a minute.
        _call_loader(subject, HfApi().dataset_info, dataset, timeout=DATASET_INFO_TIMEOUT_S)
    return _call_loader(subject, _load_dataset_with_size_check, dataset)


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
        raise ValueError(f"{subject} can't be loaded: {_format_error_on_one_line(error)}") from error


def _format_error_on_one_line(error: BaseException) -> str:
    """Return the message of an error on a single line. If the error has a cause, return the message of the cause."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__  # for example, a MemoryError has no text


def _find_root_and_data_files(dataset: str) -> tuple[Path, list[Path]]:
    """Find all data files of a dataset on this machine.

    Args:
        dataset: Folder, file or glob pattern. Of a folder, the files in it and in its direct sub-folders are found.

    Returns:
        The tuple (root folder, sorted data files). Only the names of folders below the root can state the split of a
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
        if not candidates:
            raise ValueError(f"No file matches {dataset}. Check the pattern; in a shell, put it in quotes.")
    by_form = [
        sorted(file for file in candidates if re.search(form, file.name) and file.is_file())
        for form in FILE_FORM_PATTERNS
    ]
    forms = list(filter(None, by_form))
    if len(forms) != 1:
        raise ValueError(
            f"{dataset} must be a saved DatasetDict, or have data files of exactly one kind: parquet, tar, "
            "metadata.jsonl or metadata.csv. Subfolders are searched, too. Found: "
            f"{[str(files[0]) for files in forms] or 'none of these'}. A pattern such as 'folder/*.tar' selects files."
        )
    return root, forms[0]


def _group_by_split(root: Path, files: list[Path], split: str) -> dict[str, list[Path]]:
    """Group data files by the split to which they belong.

    If a folder above a file has the name of a split, the file belongs to this split; the innermost such folder counts.
    Otherwise the start of the file name counts. Names of splits are `SPLIT_NAMES` and the requested split. A file
    without such a name is grouped under the name of its folder or, directly in `root`, under the first word of its file
    name. If no file has the name of a split, all files belong to the split with the name of the root folder, or to
    "train" if the root folder does not have the name of a split.

    Args:
        root: Folder below which the names of folders count.
        files: Data files below `root`.
        split: Name of the requested split.

    Returns:
        `{split name: files}`.
    """
    split_names = [split, *SPLIT_NAMES]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        *folders, name = file.relative_to(root).parts
        name_starts = [word for word in split_names if re.match(rf"{re.escape(word)}(?![^\W\d_])", name)]
        stated = [folder for folder in reversed(folders) if folder in split_names] + name_starts
        other = folders[-1] if folders else re.split(r"[\W\d_]", name)[0]
        by_split.setdefault(stated[0] if stated else other, []).append(file)
    # If no name states a split, all files belong to "train", as on the Hub. The dataset then has no split "test", so
    # that a model is never evaluated on its training data by mistake.
    if by_split.keys().isdisjoint(split_names):
        return {root.name if root.name in split_names else "train": files}
    return by_split
