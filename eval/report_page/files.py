"""What a report is made of: a folder of result files, of runs and of pictures, none of which is trusted."""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from caption_data.image_files import ImageFiles, decode_image
from caption_data.links import Bounds
from records.schema import MODEL_NAMES, SCHEMA_VERSION, Record

MAX_JSON_BYTES = 64 * 2**20  # a 1000 x 1000 confusion matrix takes 12 MB, indented
MAX_CLASSES = 5000
RANK_METRICS = ("median_rank",)  # ranks from 1, the lower the better; every other metric is a share
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class ClassFigures:
    """Of one measurement: names (classes), accuracies (classes; None without images), counts (classes, classes)."""

    names: list[str]
    accuracies: list[float | None]
    confusion: Tensor


@dataclass(frozen=True)
class Query:
    """A text with what was found: rank of its own image from 1, and (image, score) of the best ones."""

    text: str
    rank: int
    right: str
    best: list[tuple[str, float]]


@dataclass
class ResultFile:
    """A result file that has the right form.

    Attributes:
        name: path within the folder.
        facts: the header.
        records: the figures.
        classes: None where the file has none.
        gallery: empty where the file has none.
        notes: what the prompts' source says of them.
        skipped: (row, reason) of images that could not be read.
    """

    name: str
    facts: dict[str, Any]
    records: list[Record]
    classes: ClassFigures | None = None
    gallery: list[Query] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        folder: resolved.
        results: in order of their names.
        runs: (name, content) of every `run.json`.
        unread: (name, reason) of the other JSON files, those of a model's folder left out.
        problems: (name, what is wrong) of parts that are not shown although their file is.
    """

    folder: Path
    results: list[ResultFile] = field(default_factory=list)
    runs: list[tuple[str, dict]] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)
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
            _sort_in(path, name.as_posix(), found)
        except RecursionError:
            found.unread.append((name.as_posix(), "nests too deep"))
        except OSError as error:
            found.unread.append((name.as_posix(), error.strerror or type(error).__name__))
        except ValueError as error:  # also text that is not UTF-8
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
    place = PurePosixPath(inside)
    if place.is_absolute() or ".." in place.parts or "\\" in inside or "://" in inside:
        raise ValueError("its path leads out of the folder")
    image = decode_image({"bytes": None, "path": str(folder / place)}, ImageFiles(Bounds(folder)))
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image.convert("RGBA"))
    return opaque.convert("RGB")


def without_paths(text: str) -> str:
    """`text` with absolute paths cut to their last part, and addresses of objects left out."""
    return re.sub(r" at 0x[0-9a-f]+", "", re.sub(r"(?<![\w.])/(?:[^\s/'\"<>]+/)+", "", text))


def shorten(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())  # half a surrogate pair can't be written
    return line if len(line) <= limit else line[: limit - 1] + "…"


# --- Forms -----------------------------------------------------------------------------------------------------------


def _sort_in(path: Path, name: str, found: Found) -> None:
    if not path.is_file():
        raise ValueError("is no regular file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"is larger than {MAX_JSON_BYTES / 2**20:.0f} MiB")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if isinstance(content, dict) and "summary_version" in content:
        return  # of a suite or of examples.real_images: the files that it sums up lie beside it
    if isinstance(content, dict) and "records" in content:
        found.results.append(_result(content, name, found.problems))
    elif isinstance(content, dict) and "curve" in content:
        _check_curve(content["curve"])
        found.runs.append((name, content))
    elif not (path.parent / "config.json").is_file():  # a model's folder: its configuration and tokenizer
        raise ValueError("holds neither records of a measurement nor the curve of a training run")


def _result(content: dict, name: str, problems: list[tuple[str, str]]) -> ResultFile:
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"is a result file of schema version {shorten(repr(version), 20)}; this report reads version "
            f"{SCHEMA_VERSION}. Measure it again with this package."
        )
    if not isinstance(content["records"], list) or not content["records"]:
        raise ValueError("is a result file without records")
    records = [_record(entry, number) for number, entry in enumerate(content["records"])]
    facts = {key: value for key, value in content.items() if isinstance(value, str | int | float | dict)}
    result = ResultFile(name, facts, records, notes=_texts(content.get("notes")))
    if isinstance(content.get("skipped"), dict):
        result.skipped = [(str(row), without_paths(str(why))) for row, why in content["skipped"].items()]
    for part, read in (("per_class_accuracy", _classes), ("gallery", _gallery)):
        if part in content:
            try:
                setattr(result, "classes" if read is _classes else part, read(content))
            except (ValueError, TypeError, KeyError, RuntimeError) as error:  # torch's of its own
                problems.append((name, f"its {part} has another form and is not shown: {error}"))
    return result


def _texts(entries: Any) -> list[str]:
    return [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []


def _record(entry: Any, number: int) -> Record:
    """A record of which every field has its type and its range."""
    if not isinstance(entry, dict):
        raise ValueError(f"is a result file whose record {number} is no object")
    values = {}
    for of in fields(Record):
        if of.name not in entry and of.default is MISSING:
            raise ValueError(f"is a result file whose record {number} has no {of.name!r}")
        values[of.name] = entry.get(of.name, None if of.default is MISSING else of.default)
    problem = next(_faults(values), None)
    if problem:
        raise ValueError(f"is a result file whose record {number} has {problem}")
    if values["interval_95"] is not None:
        values["interval_95"] = tuple(values["interval_95"])
    return Record(**values)


def _faults(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the fields of a record."""
    texts = ("task", "dataset", "split", "language", "protocol", "direction", "metric", "model", "model_folder")
    wrong = [name for name in texts if not isinstance(values[name], str)]
    wrong += [name for name in ("value", "n") if not _is_number(values[name])]
    wrong += [name for name in ("chance",) if values[name] is not None and not _is_number(values[name])]
    wrong += ["seed"] if values["seed"] is not None and not isinstance(values["seed"], int) else []
    interval = values["interval_95"]
    pair = isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))
    wrong += ["interval_95"] if interval is not None and not pair else []
    yield from (f"the {name} {shorten(repr(values[name]), 40)}" for name in wrong)
    if wrong:
        return
    if values["model"] not in MODEL_NAMES:
        yield f"the model {shorten(repr(values['model']), 40)}; it is one of {', '.join(MODEL_NAMES)}"
    value, low = values["value"], -1 if values["metric"].endswith("_gain") else 0
    is_rank = values["metric"] in RANK_METRICS
    if (is_rank and value < 1) or (not is_rank and not low <= value <= 1):
        yield f"the value {value:g} of {shorten(values['metric'], 40)}, which is {'no rank' if is_rank else 'no share'}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18  # false of NaN


def _classes(content: dict) -> ClassFigures:
    names, accuracies = content["classes"], content["per_class_accuracy"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("classes must be a list of names")
    if not 2 <= len(names) <= MAX_CLASSES:
        raise ValueError(f"{len(names)} classes, from 2 to {MAX_CLASSES} are shown")
    if len(accuracies) != len(names) or any(a is not None and not (_is_number(a) and 0 <= a <= 1) for a in accuracies):
        raise ValueError(f"an accuracy from 0 to 1, or null, is needed for each of {len(names)} classes")
    confusion = torch.tensor(content["confusion_matrix"], dtype=torch.double)
    if confusion.shape != (len(names), len(names)) or not confusion.isfinite().all() or (confusion < 0).any():
        raise ValueError(f"a confusion matrix of {len(names)} x {len(names)} counts is needed")
    return ClassFigures(names, accuracies, confusion)


def _gallery(content: dict) -> list[Query]:
    queries = []
    for entry in content["gallery"]:
        best = [(found["image"], found["score"]) for found in entry["best"]]
        query = Query(entry["query"], entry["rank"], entry["right"], best)
        texts = [query.text, query.right, *(image for image, _ in best)]
        numbers = [query.rank, *(score for _, score in best)]
        if not all(isinstance(text, str) for text in texts) or not all(map(_is_number, numbers)) or query.rank < 1:
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
        if not all(map(_is_number, numbers)):
            raise ValueError(f"has a curve with an entry of another form: {shorten(repr(point), 80)}")
