"""What a report is made of: a folder of result files, of runs and of pictures, none of which is trusted."""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from capivara_common.image_files import ImageFiles, decode_image
from capivara_common.links import Bounds
from records.schema import DIRECTIONS, SCHEMA_VERSION, ResultFile, is_number, parse_result, read_object
from records.tables import one_line

MAX_CLASSES = 5000


@dataclass(frozen=True)
class ClassFigures:
    """Of one measurement: names (classes), accuracies (classes; None without images), counts (classes, classes)."""

    names: list[str]
    accuracies: list[float | None]
    confusion: Tensor


@dataclass(frozen=True)
class Query:
    """A text and what a model found for it."""

    text: str
    rank: int  # of its own image, from 1
    right: str  # path of its own image
    best: list[tuple[str, float]]  # (image path, cosine similarity) of the images ranked first


@dataclass
class Found:
    """What a folder holds."""

    folder: Path  # resolved
    results: list[ResultFile] = field(default_factory=list)  # in order of their names
    # name of a result file -> its class figures, where it has them
    classes: dict[str, ClassFigures] = field(default_factory=dict)
    # name of a result file -> its queries, where it has them
    galleries: dict[str, list[Query]] = field(default_factory=dict)
    runs: list[tuple[str, dict]] = field(default_factory=list)  # (name, content) of every `run.json`
    # (name, reason) of the other JSON files, those of a model's folder left out
    unread: list[tuple[str, str]] = field(default_factory=list)
    # (name, what is wrong) of parts that are not shown although their file is
    problems: list[tuple[str, str]] = field(default_factory=list)


def read_folder(folder: Path) -> Found:
    """Read every JSON file of `folder` and below, hidden ones left out.

    Raises:
        ValueError: the folder is missing, or holds no result file; the first files that are none are named.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the one that the evaluations wrote their JSON files to.")
    found = Found(folder.resolve())
    for path in sorted(found.folder.rglob("*.json")):
        name = path.relative_to(found.folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        try:
            _read_file(path, name.as_posix(), found)
        except OSError as error:
            found.unread.append((name.as_posix(), error.strerror or type(error).__name__))
        except ValueError as error:
            found.unread.append((name.as_posix(), str(error)))
    if not found.results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.unread[:3])
        reasons = reasons or "there is no JSON file but those of models"
        raise ValueError(f"{folder} holds no result file of schema version {SCHEMA_VERSION} ({reasons}).")
    return found


def open_picture(folder: Path, inside: str) -> Image.Image:
    """The picture at the relative path `inside` of the resolved `folder`, in RGB; what is transparent is white.

    Raises:
        ValueError: the path leads out of the folder, or the file is no picture of a supported format, or too large.
    """
    path = PurePosixPath(inside)
    if path.is_absolute() or ".." in path.parts or "\\" in inside or "://" in inside:
        raise ValueError("its path leads out of the folder")
    image = decode_image({"bytes": None, "path": str(folder / path)}, ImageFiles(Bounds(folder)))
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image.convert("RGBA"))
    return opaque.convert("RGB")


def skipped_rows(result: ResultFile) -> list[tuple[str, str]]:
    """(row, reason) of the images that could not be read; reasons without folders of a machine."""
    skipped = result.content.get("skipped")
    return [(str(row), without_paths(str(why))) for row, why in skipped.items()] if isinstance(skipped, dict) else []


def without_paths(text: str) -> str:
    """`text` with absolute paths cut to their last part, and addresses of objects left out."""
    return re.sub(r" at 0x[0-9a-f]+", "", re.sub(r"(?<![\w.])/(?:[^\s/'\"<>]+/)+", "", text))


def _read_file(path: Path, name: str, found: Found) -> None:
    content, _ = read_object(path)
    if "summary_version" in content:
        return  # of a suite or of examples.real_images: the files that it sums up lie beside it
    if "records" in content:
        found.results.append(parse_result(content, name))
        for part, read, parts in (
            ("per_class_accuracy", _class_figures, found.classes),
            ("gallery", _queries, found.galleries),
        ):
            if content.get(part):
                try:
                    parts[name] = read(content)
                except (ValueError, TypeError, KeyError, RuntimeError) as error:  # torch's of its own
                    found.problems.append((name, f"its {part} has another form and is not shown: {error}"))
    elif "curve" in content:
        _check_curve(content["curve"])
        found.runs.append((name, content))
    elif not (path.parent / "config.json").is_file():  # a model's folder: its configuration and tokenizer
        raise ValueError("holds neither records of a measurement nor the curve of a training run")


def _class_figures(content: dict) -> ClassFigures:
    names, accuracies = content["classes"], content["per_class_accuracy"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("classes must be a list of names")
    if not 2 <= len(names) <= MAX_CLASSES:
        raise ValueError(f"{len(names)} classes, from 2 to {MAX_CLASSES} are shown")
    if len(accuracies) != len(names) or any(a is not None and not (is_number(a) and 0 <= a <= 1) for a in accuracies):
        raise ValueError(f"an accuracy from 0 to 1, or null, is needed for each of {len(names)} classes")
    confusion = torch.tensor(content["confusion_matrix"], dtype=torch.double)
    if confusion.shape != (len(names), len(names)) or not confusion.isfinite().all() or (confusion < 0).any():
        raise ValueError(f"a confusion matrix of {len(names)} x {len(names)} counts is needed")
    return ClassFigures(names, accuracies, confusion)


def _queries(content: dict) -> list[Query]:
    queries = []
    for entry in content["gallery"]:
        best = [(found["image"], found["score"]) for found in entry["best"]]
        query = Query(entry["query"], entry["rank"], entry["right"], best)
        texts = [query.text, query.right, *(image for image, _ in best)]
        numbers = [query.rank, *(score for _, score in best)]
        if not all(isinstance(text, str) for text in texts) or not all(map(is_number, numbers)) or query.rank < 1:
            raise ValueError(f"query {len(queries)} needs texts, a rank from 1 and scores")
        queries.append(query)
    return queries


def _check_curve(curve: Any) -> None:
    """Raise ValueError unless `curve` has the form that `plot_training_curves` draws."""
    if not isinstance(curve, list) or not any("loss" in point for point in curve if isinstance(point, dict)):
        raise ValueError("has a curve without a step of training")
    for point in curve:
        entry = point if isinstance(point, dict) else {}
        numbers = [entry.get("step")]
        if "loss" in entry:
            numbers += [entry["loss"], entry.get("learning_rate")]
        if "validation" in entry:
            measured = entry["validation"] if isinstance(entry["validation"], dict) else {}
            numbers += [measured.get(direction) for direction in DIRECTIONS]
        if not all(map(is_number, numbers)):
            raise ValueError(f"has a curve with an entry of another form: {one_line(repr(point), 80)}")
