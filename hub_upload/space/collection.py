"""The images that the page searches: a plain folder, or a data set of any form that training reads.

    pictures = open_pictures("data/openmoji/dataset")
    print(len(pictures), pictures.captions[0])

Whose pictures they are is read from the README of their folder, in the form that the Hub gives it.
"""

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from tqdm.auto import tqdm

from capivara_search.common.files import read_json
from capivara_search.common.image_files import BYTES_ALONE, MAX_IMAGE_PIXELS, SUFFIXES, ImageFiles
from capivara_search.common.links import Bounds
from caption_data.source_files import FORMS, SPLIT_NAMES, form_hint, picture_files
from caption_data.sources import Source, open_source

logger = logging.getLogger("capivara")

CAPTION_COLUMNS = ("captions-pt", "caption", "captions", "text")  # where none is named, the first that there is
MAX_SHOWN = 300  # letters of a caption; one can be a book


@dataclass(frozen=True)
class Credit:
    """Whose pictures they are, as the data set's README says; empty where it says nothing.

    Attributes:
        name: of the data set.
        licence: identifier, such as "cc-by-sa-4.0".
        attribution: the sentence that the licence asks for.
    """

    name: str
    licence: str = ""
    attribution: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures that are read when they are needed.

    Attributes:
        row_image: number of a picture -> its image as `datasets` gives it undecoded, `{"bytes", "path"}`.
        captions: of each picture; an empty list where it has none.
        titles: of each picture, shown where it has no caption: the name of its file, or "".
        credit: whose they are.
        files: which of them may be opened.
    """

    row_image: Callable[[int], dict | None]
    captions: list[list[str]]
    titles: list[str]
    credit: Credit
    files: ImageFiles = BYTES_ALONE

    def __len__(self) -> int:
        return len(self.captions)


def open_pictures(
    where: str,
    splits: Sequence[str] = ("all",),
    image_column: str = "image",
    caption_column: str | None = None,
    form: str = "auto",
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Pictures:
    """Pictures with their captions.

    Args:
        where: folder of pictures, itself or in folders; or a data set as `caption_data.sources.open_source` takes it.
        splits: of a data set; "all" stands for those of the usual names that it has.
        image_column: column of the pictures.
        caption_column: column of a caption or a list of captions; the first of `CAPTION_COLUMNS` where None.
        form: "auto", or "images" for a folder of pictures whatever else it holds.
        image_roots: folders outside of `where` that image paths and links in it may lead into.
        max_pixels: of a picture.

    Raises:
        ValueError: there is no such folder, data set, split or column, or no picture in it.
    """
    folder, credit = Path(where), _credit(Path(where))
    if form == "images" or _is_plain_folder(folder):
        found = picture_files(folder)
        if not found:
            raise ValueError(f"{where} holds no picture. Names of pictures end in {', '.join(SUFFIXES)}.")
        images = [{"bytes": None, "path": str(file.absolute())} for file in found]
        files = ImageFiles(Bounds(folder, image_roots), max_pixels)
        return Pictures(images.__getitem__, [[] for _ in found], [file.stem for file in found], credit, files)
    limits = {"image_roots": image_roots, "max_pixels": max_pixels}
    try:
        sources = _sources(where, splits, image_column, limits)
    except ValueError as error:
        raise ValueError(f"{error}{form_hint(folder)}") from error
    if hint := form_hint(folder):
        logger.warning("%s is read as a data set.%s", where, hint)
    column = _caption_column(sources, image_column, caption_column)
    captions, titles = [], []
    for source in sources:
        for row in tqdm(source.rows(), total=len(source), desc=f"Reading captions, {source.split}", unit="row"):
            captions.append(_texts(row.get(column)) if column else [])
            titles.append(Path((row[image_column] or {}).get("path") or "").stem)
    return Pictures(_row_image(sources, image_column), captions, titles, credit, sources[0].files)


def _is_plain_folder(path: Path) -> bool:
    """A folder without any file that a data set is made of."""
    if not path.is_dir() or (path / "dataset_dict.json").is_file():
        return False
    return not any(re.search(form, file.name) for file in [*path.glob("*"), *path.glob("*/*")] for form in FORMS)


def _sources(where: str, splits: Sequence[str], image_column: str, limits: dict[str, Any]) -> list[Source]:
    saved = Path(where) / "dataset_dict.json"
    if list(splits) == ["all"] and saved.is_file():
        splits = read_json(saved, splits=list)["splits"]
    if list(splits) != ["all"]:
        return [open_source(where, split, image_column, **limits) for split in dict.fromkeys(splits)]
    sources, fault = [], None
    for split in SPLIT_NAMES:
        try:
            sources.append(open_source(where, split, image_column, **limits))
        except ValueError as error:
            if "has no split" not in str(error):
                raise
            fault = error
    if not sources:
        raise fault
    return sources


def _caption_column(sources: list[Source], image_column: str, asked: str | None) -> str | None:
    """The column of the captions; None where the data set has none and none was asked for."""
    for source in sources:
        for name in (image_column, asked):
            if name is not None and name not in source.columns:
                raise ValueError(f"{source.where} has no column {name!r}; there are {source.columns}.")
    there = [name for name in CAPTION_COLUMNS if all(name in source.columns for source in sources)]
    return asked or next(iter(there), None)


def _row_image(sources: list[Source], image_column: str) -> Callable[[int], dict | None]:
    ends = list(accumulate(len(source) for source in sources))

    def row_image(number: int) -> dict | None:
        source = bisect_right(ends, number)
        start = ends[source - 1] if source else 0
        return sources[source].row(number - start)[image_column]

    return row_image


def _texts(value: object) -> list[str]:
    """Captions of a row, cut; other values are left out."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text.strip()[:MAX_SHOWN] for text in texts if isinstance(text, str) and text.strip()]


def stated(card: Path) -> dict[str, Any]:
    """The front matter of a README; empty of one that is none of the Hub's."""
    try:
        return (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def _credit(path: Path) -> Credit:
    front_matter = stated(path / "README.md")
    keys = ("pretty_name", "license", "attribution")
    name, licence, attribution = (v if isinstance(v := front_matter.get(key), str) else "" for key in keys)
    return Credit(name or path.name, licence, attribution)
