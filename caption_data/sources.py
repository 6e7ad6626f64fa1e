"""Caption data sets of every form as one: a `datasets.Dataset` with its images undecoded.

    split = open_split("shards/train-*.tar", "train", "image")
    image_bytes(split.data[0]["image"], split.files)

A data set is a saved `DatasetDict`, parquet files, folders of images with a `metadata.jsonl` (an image is its
`file_name`), WebDataset tars in the authors' layout (`jpg|png` and `json`), or a Hub id. Which file is of which split
is decided by `source_files`. Parquet files and data sets of the Hub are copied to the cache of `datasets`, which maps
them into memory; of tars and lists of images it holds a table alone, images stay where they are.
"""

import glob
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, Value
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from capivara_common.image_files import MAX_IMAGE_PIXELS, ImageFiles
from capivara_common.links import Bounds
from caption_data.columns import NO_TEXTS
from caption_data.rows import Skipped
from caption_data.source_files import (
    FORMS,
    copied_bounds,
    files_of_split,
    load_files,
    load_saved,
    loaded,
    of_split,
)
from caption_data.stage_record import STAGE_FILE, missing_parts, refuse_missing, stage_record
from caption_data.tars import table_of_files

HUB_TIMEOUT = 20  # seconds
SAMPLED_PIECES, SAMPLED_BYTES = 64, 4096  # of a file, evenly spread, for the fingerprint of a split


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

    def fingerprint(self) -> str:
        """Hex digest of the content, the same wherever the files lie.

        It is cheap: of a large file its size and pieces all over it, of a data set of `datasets` the fingerprint that
        the library keeps.
        """
        return _files_fingerprint(self.paths) if self.paths else str(self.data._fingerprint)


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
            folder of images with `metadata.jsonl`; or a Hub id. `source_files` has the rule of splits.
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
            data, damages = loaded(dataset, table_of_files, paths, image_column)
    damaged = [Skipped(dataset, split, row, "damaged archive", detail) for row, detail in damages]
    opened = Split(dataset, split, image_column, undecoded(data, image_column), files, paths, damaged)
    if not len(opened):
        told = "; ".join(damage.detail for damage in damaged[:3])
        raise ValueError(f"{opened.where} is empty{told and f', its archives are damaged: {told}'}.")
    return opened


def refuse_unfinished(path: Path) -> None:
    """Raise ValueError where a folder is the output of a stage that lacks parts."""
    if (path / STAGE_FILE).is_file():
        record = stage_record(path)
        refuse_missing(path, record, missing_parts(path, record))


def undecoded(data: Dataset, image_column: str) -> Dataset:
    """The same, images, sounds and films at any depth left as they are: `datasets` would open any path."""
    for column, feature in data.features.items():
        plain = _undecoded(feature)
        if column == image_column and isinstance(feature, Value):  # bytes or paths, of parquet files that others wrote
            plain = Image(decode=False)
        if plain != feature:
            fingerprint, data = data._fingerprint, data.cast_column(column, plain)
            data._fingerprint = fingerprint  # that of the data, which builds of before have noted
    return data


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):  # List and its kin
        return replace(feature, feature=_undecoded(feature.feature))
    return replace(feature, decode=False) if getattr(feature, "decode", False) else feature


def _from_hub(dataset: str) -> Any:
    """All splits of a data set of the Hub."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset) or any(re.search(form, dataset) for form in FORMS):
        raise ValueError(f"{dataset} does not exist, and is no Hub id such as 'laicsiifes/flickr30k-pt-br'.")
    subject = f"{dataset} is no path here, and as a Hub id it"
    kept = copied_bounds(dataset).folder, Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
    if not any(map(Path.exists, kept)):
        # One question: `datasets` asks six times, for half a minute.
        loaded(subject, HfApi().dataset_info, dataset, timeout=HUB_TIMEOUT)
    return loaded(subject, datasets.load_dataset, dataset)


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
