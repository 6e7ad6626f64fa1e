"""Caption data sets: loaded, checked before any long work, and drawn from by counters alone."""

from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from tqdm.auto import tqdm

from modeling_capivara import repair_text


def load_splits(
    dataset: str, splits: list[str], language_of_split: dict[str, list[str]], image_column: str
) -> dict[str, Dataset]:
    """The splits of a saved or published data set, with every row checked.

    Args:
        dataset: folder of a saved `DatasetDict`, or a Hub id.
        splits: names.
        language_of_split: for each split, the languages whose captions are used.
        image_column: column of the images.

    Raises:
        ValueError: a split or column is missing (those that are there are named), an image can't be read, or a
            caption is empty; the row is named.
    """
    loaded = load_from_disk(dataset) if Path(dataset).is_dir() else load_dataset(dataset)
    if not isinstance(loaded, DatasetDict):
        raise ValueError(f"{dataset} holds a single split; a DatasetDict with {splits} is needed.")
    result = {}
    for split in splits:
        if split not in loaded:
            raise ValueError(f"{dataset} has no split {split!r}; there are {sorted(loaded)}.")
        _check_columns(loaded[split], f"{dataset}, split {split!r}", language_of_split[split], image_column)
        _check_captions(loaded[split], f"{dataset}, split {split!r}", language_of_split[split])
        result[split] = loaded[split]
    for split, rows in result.items():  # last, since it is the long part
        _check_images(rows, f"{dataset}, split {split!r}", image_column)
    return result


def caption_column(language: str) -> str:
    return f"captions-{language}"


def batch_indices(step: int, batch_size: int, number: int, seed: int) -> np.ndarray:
    """Rows of the batch of a step (counted from 0): a function of its arguments, so that a run can resume anywhere.

    Every epoch is a permutation of its own, cut into whole batches; its tail is left out, since a batch over the
    border could hold an image twice, as its own negative.
    """
    batches_per_epoch = number // batch_size
    epoch, position = divmod(step, batches_per_epoch)
    permutation = np.random.default_rng([seed, epoch]).permutation(number)
    return permutation[position * batch_size : (position + 1) * batch_size]


def drawn_captions(captions: list[list[str]], rows: np.ndarray, step: int, seed: int) -> list[str]:
    """One caption of each row, drawn at random: each step draws anew (CAPIVARA, arXiv 2310.13683, section 3)."""
    generator = np.random.default_rng([seed, step, 1])  # 1: a stream apart from that of `batch_indices`
    draws = generator.random(len(rows))
    return [captions[row][int(draw * len(captions[row]))] for row, draw in zip(rows, draws, strict=True)]


def _check_columns(dataset: Dataset, where: str, languages: list[str], image_column: str) -> None:
    for column in [image_column, *map(caption_column, languages)]:
        if column not in dataset.column_names:
            raise ValueError(f"{where} has no column {column!r}; there are {dataset.column_names}.")
    if not len(dataset):
        raise ValueError(f"{where} is empty.")


def _check_captions(dataset: Dataset, where: str, languages: list[str]) -> None:
    for language in languages:
        for row, texts in enumerate(dataset[caption_column(language)]):
            if not isinstance(texts, list):
                raise ValueError(
                    f"{where}: column {caption_column(language)!r} must hold lists of captions, row {row} holds "
                    f"{texts!r}."
                )
            if not texts or any(not isinstance(text, str) or not repair_text(text) for text in texts):
                raise ValueError(
                    f"{where}: row {row} has no caption or an empty one in {caption_column(language)!r}: {texts!r}. "
                    "Fill it, or remove the row."
                )


def _check_images(dataset: Dataset, where: str, image_column: str) -> None:
    """Decode every image once: a broken one must not end a run in its middle."""
    if not isinstance(dataset.features[image_column], Image):
        raise ValueError(
            f"{where}: column {image_column!r} must be of type Image, it is {dataset.features[image_column]}."
        )
    for row in tqdm(range(len(dataset)), desc=f"Checking images, {where}", unit="image", leave=False):
        try:
            image = dataset[row][image_column]
        except Exception as error:  # PIL raises a dozen kinds, SyntaxError among them
            raise ValueError(f"{where}: the image of row {row} can't be read ({error}). Remove the row.") from error
        if image is None:
            raise ValueError(f"{where}: row {row} has no image. Remove the row.")
