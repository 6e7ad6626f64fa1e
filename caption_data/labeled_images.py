"""Load images with class labels for the classification benchmarks.

A dataset is a folder with one sub-folder of images per class, a saved Hugging Face dataset, a folder of parquet files
or WebDataset tars, or a Hub id. If its labels are numbers without class names, its file `classnames.txt` can list one
class name per line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from datasets import ClassLabel, Image
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from capivara_common.files import check_folder_for_outside_links_and_pipes, json_digest
from capivara_common.image_files import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, ImageAccess
from caption_data import sources

LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")  # possible names of the label column; WebDataset uses cls
SPLIT_FOLDERS = {name: name for name in ("train", "validation", "test")}  # {folder name: split}
SPLIT_FOLDERS |= {"training": "train", "testing": "test"} | dict.fromkeys(("valid", "val", "dev"), "validation")


@dataclass
class LabeledImages:
    """Images of a classification dataset with their class labels.

    Attributes:
        images: Dataset split with only the images of the selected classes.
        labels: One entry per image. An entry is a class index, or a list of class indices if the dataset allows several
            classes per image.
    """

    images: sources.Split
    labels: list[int] | list[list[int]]

    def fingerprint(self) -> str:
        """Return a hex digest (BLAKE2b-128) that identifies the images and labels, so that results can record it.

        The first call reads all image files.
        """
        images = blake2b(bytes.fromhex("".join(self.images.image_digests)), digest_size=16).hexdigest()
        return json_digest([images, self.labels])


def load_images_with_prompt_class_labels(
    source: str,
    split: str,
    class_names: Sequence[str],
    image_column: str | None = None,
    label_column: str | None = None,
    class_indices: Sequence[int] | None = None,
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
    limit: int | None = None,
) -> LabeledImages:
    """Load the images of a classification dataset, with labels in the class order of a benchmark's prompt file.

    A prompt file lists the class names and the prompts for zero-shot classification. The classes of the dataset are
    matched by name. Label numbers without class names are used as indices into `class_names`.

    Args:
        source: Folder, glob pattern or Hub id of the dataset.
        split: Name of the split.
        class_names: English names of all classes, in the order of the prompt file.
        image_column: Name of the image column. Default: the only image column.
        label_column: Name of the label column. Default: the first of `LABEL_COLUMNS` that exists.
        class_indices: Classes to distinguish, as indices into `class_names`. Images of other classes are skipped.
            Default: all classes.
        image_roots: Folders outside of the dataset in which images may lie.
        max_pixels: Largest number of pixels (width x height). Larger images count as bad.
        limit: Number of rows to use, evenly spaced over the split. None: all rows.

    Returns:
        The images with their labels. A label is the position of its class in `class_indices` or, by default, in
        `class_names`.

    Raises:
        ValueError: If the split or a column is missing, a label is invalid, no image belongs to the classes, or class
            names can't be matched.
    """
    path = Path(source)
    tables = ("**/*.tar", "**/*.parquet", "**/metadata.jsonl", "dataset_dict.json")
    if path.is_dir() and not any(file for pattern in tables for file in path.glob(pattern)):
        column = image_column or "image"
        access = ImageAccess(sources.get_allowed_folders_of_dataset(source, image_roots), max_pixels)
        rows = sources.load_listed_files("imagefolder", _check_links_and_find_split_image_files(path, split), source)
        opened = sources.Split(source, split, column, sources.disable_decoding(rows, column), access)
    else:
        opened = sources.open_split(source, split, image_column or "image", image_roots, max_pixels)
    opened = opened.limited(limit)
    rows, features = opened.data, opened.features
    if opened.is_embedded:
        image_column = opened.image_column
    if image_column is None:
        image_columns = [name for name in features if isinstance(features[name], Image) or name == "image"]
        if len(image_columns) != 1:
            raise ValueError(
                f"{source} has {len(image_columns)} image columns among {rows.column_names}; choose one with "
                "--image_column."
            )
        image_column = image_columns[0]
    label_column = label_column or next((name for name in LABEL_COLUMNS if name in rows.column_names), "label")
    opened.check_columns([image_column, label_column])
    feature = getattr(features[label_column], "feature", features[label_column])
    names = feature.names if isinstance(feature, ClassLabel) else _read_or_download_class_names(source)
    all_classes = range(len(class_names))
    mapping = _map_labels_to_prompt_classes(names, class_names, source) if names else dict(enumerate(all_classes))
    labels = rows[label_column][:]
    label_lists = [label if isinstance(label, list) else [label] for label in labels]
    if kinds := {type(x).__name__ for label in label_lists for x in label} - {"int"}:
        raise ValueError(f"{source}: labels must be integers or lists of integers, got {sorted(kinds)}.")
    if outside := {x for label in label_lists for x in label} - mapping.keys():
        raise ValueError(
            f"{source}: labels must be at least 0 and less than the number of class names, {len(mapping)}, got "
            f"{sorted(outside)[:10]}. Add the missing class names, or remove the rows with these labels."
        )
    selected = all_classes if class_indices is None else class_indices
    positions = {index: position for position, index in enumerate(selected)}
    classes = [[positions.get(mapping[x]) for x in label] for label in label_lists]
    kept_rows = [row for row, row_classes in enumerate(classes) if None not in row_classes]
    if not kept_rows:
        raise ValueError(
            f"{source} has no image of the {len(positions)} classes to distinguish. Check that the dataset and the "
            "split belong to this benchmark."
        )
    images = replace(opened, image_column=image_column, data=rows.select(kept_rows))
    kept_labels = [classes[row] if isinstance(labels[row], list) else classes[row][0] for row in kept_rows]
    return LabeledImages(images, kept_labels)


def _check_links_and_find_split_image_files(folder: Path, split: str) -> list[Path]:
    """Return the image files of a classification dataset with one sub-folder per class.

    Only visible files with an image extension are returned. If other files were passed on to `datasets`, it would
    unpack archives, and open any path that a metadata file names.

    Args:
        folder: Folder with one sub-folder per class, or with one sub-folder per split (for example `train` and `val`),
            each with one sub-folder per class.
        split: Name of the split. Ignored if the folder has no sub-folders for splits.

    Returns:
        Paths of the image files of the split, sorted.

    Raises:
        ValueError: If there is no such split or no image file, or a link leads out of the folder.
    """
    check_folder_for_outside_links_and_pipes(folder)
    root, names = folder, [child.name for child in folder.iterdir() if child.is_dir()]
    if names and all(name.casefold() in SPLIT_FOLDERS for name in names):
        split_folders = {SPLIT_FOLDERS[name.casefold()]: folder / name for name in names}
        root = sources.select_split(split_folders, str(folder), split)
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{root} holds no image file. Names must end in {', '.join(IMAGE_SUFFIXES)}.")
    return files


def _read_or_download_class_names(source: str) -> list[str]:
    """Read the class names of a dataset from its file `classnames.txt`, a convention of clip-benchmark.

    Args:
        source: Folder or Hub id of the dataset.

    Returns:
        One class name per label, in the order of the labels; empty if the dataset has no such file.

    Raises:
        LocalEntryNotFoundError: If the Hub can't be reached and the file is not in the cache.
    """
    path = Path(source) / "classnames.txt"
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, path.name, repo_type="dataset"))
        # This error means that the dataset has no such file. If the Hub can't be reached, hf_hub_download raises
        # another error, which must not be ignored: without the file, the class order would be a guess.
        except RemoteEntryNotFoundError:
            return []
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _map_labels_to_prompt_classes(names: Sequence[str], prompt_names: Sequence[str], source: str) -> dict[int, int]:
    """Map each label number of a dataset to the index of the prompt class with the same name.

    Case and punctuation are ignored. If a name occurs twice, as in ImageNet, its occurrences are matched in order.

    Args:
        names: Class names of the dataset, in the order of its labels.
        prompt_names: Class names of the prompt file.
        source: Name of the dataset for error messages.

    Returns:
        `{label number: index of the prompt class}`.

    Raises:
        ValueError: If a name of the dataset does not exist in the prompt file, or occurs there less often.
    """
    classes: dict[str, list[int]] = {}
    for number, name in enumerate(prompt_names):
        classes.setdefault(_normalize_name(name), []).append(number)
    if unknown := [name for name in names if _normalize_name(name) not in classes]:
        missing = [name for name in prompt_names if _normalize_name(name) not in set(map(_normalize_name, names))]
        raise ValueError(
            f"{source} has {len(names)} classes, the prompts {len(prompt_names)}, and they don't match by name: "
            f"{unknown[:10]} are unknown, {missing[:10]} are missing. Rename the folders, choose another benchmark, or "
            "write a prompt file with the class names of the dataset under `en`."
        )
    matches = [(classes[_normalize_name(name)] or [None]).pop(0) for name in names]
    if surplus := [name for name, number in zip(names, matches, strict=True) if number is None]:
        raise ValueError(
            f"{source} uses a class name more often than the prompt file: {surplus[:10]}. Rename the extra classes."
        )
    return dict(enumerate(matches))


def _normalize_name(name: str) -> str:
    """Return a class name in lowercase, with blanks instead of `_`, `/` and `-`, so that spellings can be compared."""
    return " ".join(re.sub(r"[_/-]", " ", name.casefold()).split())
