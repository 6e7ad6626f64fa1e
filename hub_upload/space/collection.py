"""The pictures of a Space as a folder of files, which an index takes: a plain folder, or a data set of any form.

    folder, credit = picture_folder("data/openmoji/dataset", Path("cache"))

The pictures of a data set are written to files that are named by their captions. Whose pictures they are is read from
the README of their folder, in the form that the Hub gives it.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from capivara_common.files import read_json, write_bytes
from capivara_common.image_files import MAX_IMAGE_PIXELS, SUFFIXES, BadImage, image_bytes
from capivara_search.page.server import Credit
from caption_data.sources import FORMS, SPLIT_NAMES, Split, form_hint, open_split
from modeling_capivara.loading import card_metadata

logger = logging.getLogger("capivara")

CAPTION_COLUMNS = ("captions-pt", "caption", "captions", "text")  # where none is named, the first that there is
MAX_NAME = 100  # letters of a file's name; a caption can be a book
MAX_NAME_BYTES = 200  # with what is added to it; file systems take 255
MAX_SHOWN = 5  # rows without a picture that are named


def picture_folder(
    where: str,
    cache: Path,
    splits: Sequence[str] = ("all",),
    image_column: str = "image",
    caption_column: str | None = None,
    form: str = "auto",
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> tuple[Path, Credit]:
    """A folder of pictures, and whose they are.

    Args:
        where: folder of pictures, itself or in folders, which is taken as it is; or a data set as
            `caption_data.sources.open_split` takes it, whose pictures are written below `cache`.
        cache: root of all caches.
        splits: of a data set; "all" stands for those of the usual names that it has.
        image_column: column of the pictures.
        caption_column: column of a caption or a list of captions; the first of `CAPTION_COLUMNS` where None.
        form: "auto", or "images" for a folder of pictures whatever else it holds.
        image_roots: folders outside of `where` that image paths and links in it may lead into.
        max_pixels: of a picture.

    Raises:
        ValueError: there is no such folder, data set, split or column, or no picture in it.
    """
    folder = Path(where)
    credit = credit_of(folder)
    if form == "images" or _is_plain_folder(folder):
        return folder, credit
    limits = {"image_roots": image_roots, "max_pixels": max_pixels}
    try:
        sources = _sources(where, splits, image_column, limits)
    except ValueError as error:
        raise ValueError(f"{error}{form_hint(folder)}") from error
    if hint := form_hint(folder):
        logger.warning("%s is read as a data set.%s", where, hint)
    column = _caption_column(sources, image_column, caption_column)
    asked = [str(folder.resolve()) if folder.exists() else where, list(splits), image_column, column]
    key = hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()
    made = cache / "space" / key / "pictures"
    _write_pictures(_named_pictures(sources, image_column, column), made, sum(map(len, sources)))
    return made, credit


def _write_pictures(pictures: Iterator[tuple[str, bytes]], folder: Path, count: int) -> None:
    """Files of these names, and no others; those that are there are kept."""
    names: set[str] = set()
    for name, data in tqdm(pictures, total=count, desc="Pictures of the data set", unit="picture"):
        path = folder / name
        names.add(name)
        if not path.is_file() or path.read_bytes() != data:  # the same file is not embedded again
            write_bytes(path, data)
    if not names:
        raise ValueError("No row of the data set has a picture that can be read.")
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _named_pictures(sources: list[Split], image_column: str, caption_column: str | None) -> Iterator[tuple[str, bytes]]:
    """Name and content of each picture of a data set; what can't be read is left out, and the log says so."""
    taken, bad = Counter(), []
    for source in sources:
        for number, row in enumerate(source.rows()):
            image = row[image_column]
            try:
                data = image_bytes(image, source.files)
            except BadImage as error:
                bad.append(f"row {number} of {source.split}: {error}")
                continue
            path = Path((image or {}).get("path") or "")
            caption = next(iter(_texts(row.get(caption_column))), "")
            stem = _file_name(caption) or _file_name(path.stem) or f"{number + 1}"
            taken[stem.casefold()] += 1
            again = f" ({taken[stem.casefold()]})" if taken[stem.casefold()] > 1 else ""
            yield f"{stem}{again}{path.suffix.lower() if path.suffix.lower() in SUFFIXES else '.png'}", data
    for line in bad[:MAX_SHOWN]:
        logger.warning("Left out: %s", line)
    if len(bad) > MAX_SHOWN:
        logger.warning("Left out as well: %d more.", len(bad) - MAX_SHOWN)


def _file_name(caption: str) -> str:
    """A caption as a file of any system may be named, without its end; empty where nothing of it is left."""
    plain = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*\s]+', " ", caption)[:MAX_NAME]
    return plain.encode("utf-8", "ignore")[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip(" .")


def _is_plain_folder(path: Path) -> bool:
    """A folder without any file that a data set is made of."""
    if not path.is_dir() or (path / "dataset_dict.json").is_file():
        return False
    return not any(re.search(form, file.name) for file in [*path.glob("*"), *path.glob("*/*")] for form in FORMS)


def _sources(where: str, splits: Sequence[str], image_column: str, limits: dict[str, Any]) -> list[Split]:
    saved = Path(where) / "dataset_dict.json"
    if list(splits) == ["all"] and saved.is_file():
        splits = read_json(saved, splits=list)["splits"]
    if list(splits) != ["all"]:
        return [open_split(where, split, image_column, **limits) for split in dict.fromkeys(splits)]
    sources, fault = [], None
    for split in SPLIT_NAMES:
        try:
            sources.append(open_split(where, split, image_column, **limits))
        except ValueError as error:
            if "has no split" not in str(error):
                raise
            fault = error
    if not sources:
        raise fault
    return sources


def _caption_column(sources: list[Split], image_column: str, asked: str | None) -> str | None:
    """The column of the captions; None where the data set has none and none was asked for."""
    for source in sources:
        for name in (image_column, asked):
            if name is not None and name not in source.columns:
                raise ValueError(f"{source.where} has no column {name!r}; there are {source.columns}.")
    there = [name for name in CAPTION_COLUMNS if all(name in source.columns for source in sources)]
    return asked or next(iter(there), None)


def _texts(value: object) -> list[str]:
    """Captions of a row; other values are left out."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def credit_of(folder: Path) -> Credit:
    """Whose the pictures of a folder are, as its README says."""
    front_matter = card_metadata(folder / "README.md")
    keys = ("pretty_name", "license", "attribution")
    name, licence, attribution = (v if isinstance(v := front_matter.get(key), str) else "" for key in keys)
    return Credit(name or folder.resolve().name, licence, attribution)
