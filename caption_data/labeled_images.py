"""Labelled images for classification, in every form that `datasets` has for them.

A data set is a folder with a sub-folder of images a class, a saved data set, a folder of parquet files or of WebDataset
tars (with `classnames.txt`, a name a line), or a Hub id.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from datasets import ClassLabel, Image
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from capivara_common.files import check_links_stay_inside
from capivara_common.image_files import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, ImageAccess
from caption_data.rows import json_digest
from caption_data.sources import Split, dataset_folders, disable_decoding, load_data_files, open_split, select_split

LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")  # where none is named; cls is WebDataset's
SPLIT_FOLDERS = {name: name for name in ("train", "validation", "test")}  # name of a folder -> split
SPLIT_FOLDERS |= {"training": "train", "testing": "test"} | dict.fromkeys(("valid", "val", "dev"), "validation")


@dataclass
class LabeledImages:
    """Images with their classes."""

    images: Split
    labels: list[int] | list[list[int]]  # of each row, a class or a list of classes

    def fingerprint(self) -> str:
        """Hex digest of images and labels."""
        images = blake2b(bytes.fromhex("".join(self.images.image_digests)), digest_size=16).hexdigest()
        return json_digest([images, self.labels])


def load_labeled_images(
    source: str,
    split: str,
    class_names: Sequence[str],
    image_column: str | None = None,
    label_column: str | None = None,
    class_indices: Sequence[int] | None = None,
    image_roots: Sequence[Path] = (),
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> LabeledImages:
    """Labelled images, their classes in the order of `names_en`, which are those of all classes of the data set.

    A data set that names its classes is matched by name, since orders differ; one of plain numbers is taken to have
    that order. `source` and `split` are as `--images` and `--split` take them, columns are found where None, and
    `image_roots` and `max_pixels` those of `open_split`. `indices`, in `names_en`, are of the classes that are
    distinguished, all where None: images of others are left out (Babel-ImageNet names a part of ImageNet).

    Raises ValueError where split or column is missing, or the class names do not match; those that differ are named.
    """
    path = Path(source)
    tables = ("**/*.tar", "**/*.parquet", "**/metadata.jsonl", "dataset_dict.json")
    if path.is_dir() and not any(file for pattern in tables for file in path.glob(pattern)):
        column, files = image_column or "image", ImageAccess(dataset_folders(source, image_roots), max_pixels)
        rows = load_data_files("imagefolder", _find_image_files(path, split), source)
        opened = Split(source, split, column, disable_decoding(rows, column), files)
    else:
        opened = open_split(source, split, image_column or "image", image_roots, max_pixels)
    rows = opened.data
    if image_column is None:
        of_images = [name for name, feature in rows.features.items() if isinstance(feature, Image) or name == "image"]
        if len(of_images) != 1:
            raise ValueError(
                f"{source} has {len(of_images)} columns of images, {rows.column_names}; say --image_column."
            )
        image_column = of_images[0]
    label_column = label_column or next((name for name in LABEL_COLUMNS if name in rows.column_names), "label")
    opened.check_columns([image_column, label_column])
    feature = getattr(rows.features[label_column], "feature", rows.features[label_column])
    names = feature.names if isinstance(feature, ClassLabel) else _read_class_names(source)
    mapping = _match_class_names(names, class_names, source) if names else dict(enumerate(range(len(class_names))))
    labels = rows[label_column][:]
    lists = [label if isinstance(label, list) else [label] for label in labels]
    if kinds := {type(x).__name__ for label in lists for x in label} - {"int"}:
        raise ValueError(f"{source}: labels must be whole numbers or lists of them; there are {sorted(kinds)}.")
    if outside := {x for label in lists for x in label} - mapping.keys():
        raise ValueError(f"{source}: labels {sorted(outside)[:10]} are outside the {len(mapping)} classes with a name.")
    class_of = {
        index: number
        for number, index in enumerate(range(len(class_names)) if class_indices is None else class_indices)
    }
    classes = [[class_of.get(mapping[x]) for x in label] for label in lists]
    kept = [row for row, found in enumerate(classes) if None not in found]
    if not kept:
        raise ValueError(f"{source} has no image of the {len(class_of)} classes that have a name.")
    images = replace(opened, image_column=image_column, data=rows.select(kept))
    return LabeledImages(images, [classes[row] if isinstance(labels[row], list) else classes[row][0] for row in kept])


def _find_image_files(folder: Path, split: str) -> list[Path]:
    """The pictures of a folder, a sub-folder a class, below one of the split where its folders are named for splits.

    By name, neither hidden ones nor links that lead out: `datasets` would unpack an archive among them, and open
    whatever a list names.
    """
    check_links_stay_inside(folder)
    root, names = folder, [inner.name for inner in folder.iterdir() if inner.is_dir()]
    if names and all(name.casefold() in SPLIT_FOLDERS for name in names):
        root = select_split({SPLIT_FOLDERS[name.casefold()]: folder / name for name in names}, str(folder), split)
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{root} holds no picture; names of pictures end in {', '.join(IMAGE_SUFFIXES)}.")
    return files


def _read_class_names(source: str) -> list[str]:
    """Of `classnames.txt`, a line a label, which clip-benchmark's copies have; empty where there is none."""
    path = Path(source) / "classnames.txt"
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, path.name, repo_type="dataset"))
        except LocalEntryNotFoundError:  # offline: whether there is one is not known, and the order must not be guessed
            raise
        except EntryNotFoundError:
            return []
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _match_class_names(names: Sequence[str], prompt_names: Sequence[str], source: str) -> dict[int, int]:
    """Label of the data set -> class of the prompts; a name that occurs twice, as in ImageNet, first to first."""
    classes: dict[str, list[int]] = {}
    for number, name in enumerate(prompt_names):
        classes.setdefault(_normalize_name(name), []).append(number)
    if unknown := [name for name in names if _normalize_name(name) not in classes]:
        missing = [name for name in prompt_names if _normalize_name(name) not in set(map(_normalize_name, names))]
        raise ValueError(
            f"{source} has {len(names)} classes, the prompts {len(prompt_names)}, and they don't match by name: "
            f"{unknown[:10]} are unknown, {missing[:10]} are missing. Rename the folders, "
            "choose another benchmark, or give the names of the data under `en` in a file of your own."
        )
    found = [(classes[_normalize_name(name)] or [None]).pop(0) for name in names]
    if twice := [name for name, number in zip(names, found, strict=True) if number is None]:
        raise ValueError(f"{source} names classes more often than the prompts do: {twice[:10]}. Rename them.")
    return dict(enumerate(found))


def _normalize_name(name: str) -> str:
    """Case, and the signs that stand for others in names of files, don't tell classes apart."""
    return " ".join(re.sub(r"[_/-]", " ", name.casefold()).split())
