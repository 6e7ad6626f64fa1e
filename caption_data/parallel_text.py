"""Pairs of sentences without pictures, one in each of two languages: what a text teacher teaches beside the captions.

table = parallel_table("names.jsonl", "pt", "en", skipped := [])
"""

import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from capivara_common.image_files import BadRow
from caption_data.pairs import written_table
from caption_data.rows import Skipped, storable
from caption_data.source_files import load_by_datasets, load_files, load_saved, of_split
from caption_data.sources import undecoded
from modeling_capivara import repair_text

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TRANSLATION = "translation"  # column of many data sets on the Hub: language -> sentence


def parallel_table(name: str, language: str, teacher_language: str, skipped: list[Skipped]) -> Dataset:
    """The usable pairs of a file, of a saved data set or of one on the Hub, in its order.

    Args:
        name: JSONL, CSV or parquet file with a column for each language, named by its code, or with a column
            `translation` of both; or a data set of that form, of which the split `train` is read.
        language, teacher_language: codes.
        skipped: rows with an empty side, or whose sides are equal, are appended.

    Returns:
        Columns as of `caption_data.pairs.caption_table`; `captions` and `teacher_captions` have one text each.

    Raises:
        ValueError: there is no such file or data set, a column is missing, or no pair is usable.
    """
    data, languages = _opened(name), (language, teacher_language)
    for code in languages:
        if code not in data.column_names and TRANSLATION not in data.column_names:
            raise ValueError(
                f"parallel_text: {name} has no column {code!r}; there are {data.column_names}. It needs a column for "
                f"each language, {language!r} and {teacher_language!r}."
            )

    columns = languages if set(languages) <= set(data.column_names) else (TRANSLATION,)
    data = data.select_columns(list(columns))
    for column in columns:
        data = data.cast_column(column, undecoded(data.features[column]))

    def entries() -> Iterator[dict]:
        for number, row in enumerate(data):
            try:
                texts = _pair(row, languages)
            except BadRow as bad:
                skipped.append(Skipped(name, "train", number, bad.reason, bad.detail))
            else:
                yield {"row": number, "digest": "", "captions": texts[:1], "teacher_captions": texts[1:]}

    before, table = len(skipped), written_table(entries())
    if not len(table):
        first = f", the first because of {skipped[before].detail}" if len(skipped) > before else ""
        raise ValueError(f"parallel_text: {name} has no usable pair of sentences among {len(data)} rows{first}.")
    return table


def check_no_leak(table: Dataset, name: str, measured: dict[str, Iterable[list[str]]]) -> None:
    """Raise ValueError where a sentence is a caption that is measured on: the figures would be of what was trained.

    Args:
        table: of `parallel_table`.
        name: of the parallel text.
        measured: what the captions are of -> the captions of each image.
    """
    captions = {_folded(text): where for where, rows in measured.items() for texts in rows for text in texts}
    for column in ("captions", "teacher_captions"):
        for row, texts in zip(table["row"], table[column], strict=True):
            if where := captions.get(_folded(texts[0])):
                raise ValueError(
                    f"parallel_text: {texts[0]!r}, row {row} of {name}, is a caption of {where}, so that the figures "
                    "would be of what was trained. Remove such rows."
                )


def _opened(name: str) -> Dataset:
    path = Path(name)
    if path.is_dir():
        return of_split(load_saved(path), name, "train")
    if path.is_file():
        if path.suffix not in LOADERS:
            raise ValueError(f"parallel_text: {name} must end in one of {', '.join(LOADERS)}.")
        if not path.stat().st_size:
            raise ValueError(f"parallel_text: {name} is empty.")
        return load_files(LOADERS[path.suffix], [path], name)
    if path.suffix in LOADERS or name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"parallel_text: {name} does not exist, and is no Hub id.")
    return of_split(load_by_datasets(f"{name} is no path here, and as a Hub id it", name), name, "train")


def _pair(row: dict[str, Any], languages: tuple[str, str]) -> list[str]:
    sides = row if languages[0] in row else row.get(TRANSLATION) or {}
    if not isinstance(sides, dict):
        raise BadRow("no caption", f"{TRANSLATION!r} must hold a text for each language, it is {sides!r}")
    texts = [sides.get(code) for code in languages]
    for code, text in zip(languages, texts, strict=True):
        if not isinstance(text, str) or not repair_text(text):
            raise BadRow("no caption", f"the side {code!r} is empty in {sides!r}")
    if _folded(texts[0]) == _folded(texts[1]):
        raise BadRow("no caption", f"both sides are {texts[0]!r}")
    return [storable(text) for text in texts]


def _folded(text: str) -> str:
    """As the model sees it, but for capitals."""
    return unicodedata.normalize("NFKC", repair_text(text)).casefold()
