"""Sections of the report that look closer: classes and their confusions, and what queries find."""

import statistics
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from torch import Tensor

from capivara_common.image_files import BadImage
from eval.report_folder import Found, Query, open_picture, skipped_rows
from eval.report_sections import figure_note, model_label, name_parts, protocol_text, reading_order, title_of
from records.picture_sheets import plot_gallery
from records.plots import BarRow, plot_bars, plot_confusion
from records.report_page import Picture, Pictures, thumbnail
from records.schema import MODEL_NAMES, Condition, ResultFile
from records.series import folder_and_seed
from records.tables import one_line, points

BEST_AND_WORST = 15  # classes at either end, where all would not fit
CONFUSED_PAIRS = 15
SHOWN_QUERIES = 12  # hits, and as many misses
DRAWN_QUERIES = 6  # of each, in the PNG
BEST = 5
THUMBNAIL = 200  # pixels of the longer side


@dataclass(frozen=True)
class ClassSeries:
    """Per-class accuracies (means over the seeds) and the summed confusion matrix of a model."""

    role: str
    folder: str
    names: list[str]
    accuracies: list[float | None]
    confusion: Tensor  # (classes, classes), a row a true class
    files: list[ResultFile]


@dataclass(frozen=True)
class ClassRow:
    """A class with its images (a mean over the seeds), and its accuracy under the baseline and under the model."""

    name: str
    images: float
    before: float | None
    after: float | None

    @property
    def gain(self) -> float | None:
        """Model minus baseline, a share; None where one is not known."""
        return None if self.before is None or self.after is None else self.after - self.before

    def bar(self, role: str, classes: int) -> BarRow:
        """Of a bar chart; a baseline alone has the baseline's colour."""
        values = [None if value is None else (value, None) for value in (self.before, self.after)]
        return BarRow(one_line(self.name, 30), *(values if role == "capivara" else values[::-1]), 1 / classes)

    def cells(self) -> list[str]:
        """The row as texts."""
        accuracies = ["–" if value is None else f"{100 * value:.1f}" for value in (self.before, self.after)]
        return [one_line(self.name, 80), f"{self.images:.0f}", *accuracies, points(self.gain)]


class Thumbnails:
    """Small copies of the pictures of a resolved folder, each opened once; what can't be shown is in `refused`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refused: dict[str, str] = {}
        self._small: dict[str, Image.Image | None] = {}

    def image(self, inside: str) -> Image.Image | None:
        """The picture at a path inside of the folder; None where it can't be shown."""
        if inside not in self._small:
            try:
                self._small[inside] = open_picture(self.folder, inside)
                self._small[inside].thumbnail((THUMBNAIL, THUMBNAIL))
            except ValueError as error:  # what a gallery's path says of this machine is not shown
                self._small[inside] = None
                self.refused[inside] = error.reason if isinstance(error, BadImage) else str(error)
        return self._small[inside]

    def picture(self, inside: str, alt: str) -> Picture | None:
        """The same for a page."""
        image = self.image(inside)
        return image and thumbnail(image, alt)


def class_sections(found: Found, pictures: Pictures) -> list[dict[str, Any]]:
    """Per-class accuracy and confusions of every data set and protocol, each model beside the baseline."""
    sections = []
    for condition, series in class_series(found).items():
        baseline = next((s for s in series if s.role == "baseline"), None)
        models = [s for s in series if s.role == "capivara"]
        folders = {s.folder for s in models}
        for model in models or [baseline]:
            beside = baseline if model is not baseline and baseline and baseline.names == model.names else None
            label = model_label(model.role, model.folder, folders)
            sections.append(_class_section(condition, label, model, beside, pictures))
    return sections


def gallery_sections(found: Found, pictures: Pictures) -> list[dict[str, Any]]:
    """Queries with the pictures that each model ranks first; pictures that can't be shown become problems."""
    thumbnails = Thumbnails(found.folder)
    sections = [_gallery_section(c, by_role, thumbnails, pictures) for c, by_role in galleries_of(found).items()]
    refused = thumbnails.refused.items()
    found.problems.extend((one_line(inside, 120), f"this picture is not shown: {why}") for inside, why in refused)
    return sections


def class_series(found: Found) -> dict[Condition, list[ClassSeries]]:
    """Class figures by condition (its direction and metric empty), seeds of a model taken together."""
    grouped: dict[Condition, dict[tuple[str, str], list[ResultFile]]] = {}
    for result in found.results:
        if result.name in found.classes:
            first = result.records[0]
            model = first.model, folder_and_seed(first, result.name)[0]
            grouped.setdefault(_without_metric(first.condition), {}).setdefault(model, []).append(result)
    return {
        condition: [_merged(role, folder, files, found) for (role, folder), files in of_condition.items()]
        for condition, of_condition in sorted(grouped.items(), key=lambda item: reading_order(item[0]))
    }


def galleries_of(found: Found) -> dict[Condition, dict[str, list[Query]]]:
    """Condition (direction and metric empty) -> role -> queries, of the first file of each role."""
    galleries: dict[Condition, dict[str, list[Query]]] = {}
    for result in found.results:
        if result.name in found.galleries:
            first, base = result.records[0], PurePosixPath(result.name).parent
            queries = [  # their pictures' paths relative to the whole folder, not to the result file
                Query(q.text, q.rank, str(base / q.right), [(str(base / image), score) for image, score in q.best])
                for q in found.galleries[result.name]
            ]
            galleries.setdefault(_without_metric(first.condition), {}).setdefault(first.model, queries)
    return dict(sorted(galleries.items(), key=lambda item: reading_order(item[0])))


def confused_pairs(confusion: Tensor, count: int) -> list[tuple[int, int]]:
    """(true class, taken for) of the largest counts off the diagonal of (classes, classes), those of none left out."""
    off = confusion.clone()
    off.fill_diagonal_(0)
    order = off.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [divmod(index, len(off)) for index in order if off.flatten()[index] > 0]


def _without_metric(condition: Condition) -> Condition:
    return condition._replace(direction="", metric="")


def _merged(role: str, folder: str, files: list[ResultFile], found: Found) -> ClassSeries:
    names = found.classes[files[0].name].names
    fitting = [file for file in files if found.classes[file.name].names == names]
    for file in files:
        if file not in fitting:
            reason = f"has other classes than {files[0].name}; its class figures are left out"
            found.problems.append((file.name, reason))
    figures = [found.classes[file.name] for file in fitting]
    accuracies = []
    for of_class in zip(*(f.accuracies for f in figures), strict=True):
        known = [accuracy for accuracy in of_class if accuracy is not None]
        accuracies.append(statistics.mean(known) if known else None)
    return ClassSeries(role, folder, names, accuracies, sum(f.confusion for f in figures), fitting)


def _gallery_section(
    condition: Condition, by_role: dict[str, list[Query]], thumbnails: Thumbnails, pictures: Pictures
) -> dict[str, Any]:
    leading = "capivara" if "capivara" in by_role else "baseline"
    others = {role: {q.text: q for q in queries} for role, queries in by_role.items() if role != leading}
    hits = [query for query in by_role[leading] if query.rank == 1]
    misses = [query for query in by_role[leading] if query.rank > 1]
    groups = []
    for title, queries in (("Found first", hits), ("Not found first", misses)):
        cards = [_query_card(q, leading, others, thumbnails) for q in queries[:SHOWN_QUERIES]]
        groups.append({"title": title, "count": len(queries), "cards": cards})
    anchor = pictures.anchor("gallery", *name_parts(condition)[1:])
    rows = []
    for q in hits[:DRAWN_QUERIES] + misses[:DRAWN_QUERIES]:
        if found := [(thumbnails.image(i), i == q.right) for i, _ in q.best[:BEST]]:
            rows.append([(f"“{one_line(q.text, 60)}”   right one at rank {q.rank:g}", found)])
    if rows:
        plot_gallery(rows, pictures.folder / f"{anchor}.png")
    return {
        "title": title_of(condition),
        "anchor": anchor,
        "protocol": condition.protocol,
        "language": condition.language,
        "model": MODEL_NAMES[leading],
        "groups": groups,
        "queries": len(hits) + len(misses),
        "file": f"{anchor}.png" if rows else "",
    }


def _class_section(
    condition: Condition, label: str, model: ClassSeries, baseline: ClassSeries | None, pictures: Pictures
) -> dict[str, Any]:
    several = label not in MODEL_NAMES.values()
    task = title_of(condition)
    title = f"{condition.dataset}: {task[0].lower()}{task[1:]}" + f", {label}" * several
    files = model.files + (baseline.files if baseline else [])
    left_out = max(len(skipped_rows(file)) for file in files)
    note = figure_note({condition.dataset: left_out})
    rows = _class_rows(model, baseline)
    ends = rows if len(rows) <= 2 * BEST_AND_WORST else [*rows[:BEST_AND_WORST], None, *rows[-BEST_AND_WORST:]]
    absent = [name for name, accuracy in zip(model.names, model.accuracies, strict=True) if accuracy is None]
    anchor = pictures.anchor("classes", *name_parts(condition)[1:])
    alt = f"Bars of the accuracy of {len(rows)} classes: {title}. The table of all classes has the same figures."
    bars = [row and row.bar(model.role, len(model.names)) for row in ends]
    return {
        "title": title,
        "anchor": anchor,
        "protocol": protocol_text(condition.protocol),
        "bars": pictures.draw(anchor, alt, lambda path: plot_bars(bars, note, path)) if bars else None,
        "cut": len(rows) > len(ends),
        "ends": BEST_AND_WORST,
        "compared": baseline is not None,
        "note": note,
        "absent": [one_line(name, 60) for name in absent],
        "seeds": len(model.files),
        "label": label,
        "classes": [row.cells() for row in rows],
        "matrices": [_matrix(condition, series, note, pictures) for series in (baseline, model) if series],
        "confused": [
            _confused_cells(pair, model, baseline) for pair in confused_pairs(model.confusion, CONFUSED_PAIRS)
        ],
    }


def _class_rows(model: ClassSeries, baseline: ClassSeries | None) -> list[ClassRow]:
    """Classes with images, from the largest gain over the baseline to the smallest, without one by accuracy."""
    before = baseline.accuracies if baseline else [None] * len(model.names)
    images = (model.confusion.sum(dim=1) / len(model.files)).tolist()
    rows = map(ClassRow, model.names, images, before, model.accuracies)
    return sorted((row for row in rows if row.after is not None), key=lambda row: (-(row.gain or 0), -row.after))


def _confused_cells(pair: tuple[int, int], model: ClassSeries, baseline: ClassSeries | None) -> list[str]:
    """True class, taken for, and of each model the share of the class's images."""
    cells = [one_line(model.names[index], 60) for index in pair]
    for series in (baseline, model):
        total = series.confusion[pair[0]].sum().item() if series else 0
        share = f"{100 * series.confusion[pair].item() / total:.1f}" if total else "–"
        cells.append(share)
    return [*cells, f"{model.confusion[pair].item() / len(model.files):.0f}"]


def _matrix(condition: Condition, series: ClassSeries, note: str, pictures: Pictures) -> dict[str, Any]:
    name = MODEL_NAMES[series.role]
    anchor = pictures.anchor("confusion", *name_parts(condition)[1:], name)
    alt = f"Confusion matrix of {name}, {len(series.names)} classes of {condition.dataset}: {title_of(condition)}."
    names = [one_line(text, 24) for text in series.names]
    picture = pictures.draw(anchor, alt, lambda path: plot_confusion(series.confusion, names, note, path))
    total, right = series.confusion.sum().item(), series.confusion.trace().item()
    return {"model": name, "picture": picture, "diagonal": f"{100 * right / total:.1f}" if total else "–"}


def _query_card(
    query: Query, leading: str, others: dict[str, dict[str, Query]], thumbnails: Thumbnails
) -> dict[str, Any]:
    """A query, its own picture, and a line of found ones for every model that was asked the same."""
    asked = [(leading, query)] + [(role, known[query.text]) for role, known in others.items() if query.text in known]
    text = one_line(query.text, 300)
    lines = []
    for role, of_model in asked:
        found = []
        for number, (image, score) in enumerate(of_model.best[:BEST], start=1):
            right = image == of_model.right
            alt = f"Picture {number} for “{one_line(query.text, 80)}”" + ", the right one" * right
            picture = thumbnails.picture(image, alt)
            found.append({"picture": picture, "right": right, "score": f"{score:.3f}"})
        lines.append({"model": MODEL_NAMES[role], "rank": f"{of_model.rank:g}", "found": found})
    own = thumbnails.picture(query.right, f"The picture that “{one_line(query.text, 80)}” describes")
    return {"query": text, "own": own, "lines": lines}
