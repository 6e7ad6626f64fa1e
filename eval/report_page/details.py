"""Sections of the page that look closer: classes and their confusions, and what queries find."""

from typing import Any

from eval.report_page.compare import (
    ClassSeries,
    Condition,
    class_series,
    confused_pairs,
    galleries_of,
    model_label,
    points,
)
from eval.report_page.files import Found, Query, shorten
from eval.report_page.pictures import Pictures, Thumbnails
from eval.report_page.sections import figure_note, name_parts, protocol_text, title_of
from records.plots import BarRow, plot_bars, plot_confusion, plot_gallery
from records.schema import MODEL_NAMES

BEST_AND_WORST = 15  # classes at either end, where all would not fit
CONFUSED_PAIRS = 15
SHOWN_QUERIES = 12  # hits, and as many misses
DRAWN_QUERIES = 6  # of each, in the PNG
BEST = 5


def class_sections(found: Found, pictures: Pictures) -> list[dict[str, Any]]:
    """Per-class accuracy and confusions of every data set and protocol, each model beside the baseline."""
    sections = []
    for condition, series in class_series(found).items():
        baseline = next((s for s in series if s.role == "baseline"), None)
        models = [s for s in series if s.role == "capivara"]
        sources = {s.source for s in models}
        for model in models or [baseline]:
            beside = baseline if model is not baseline and baseline and baseline.names == model.names else None
            label = model_label(model.role, model.source, sources)
            sections.append(_class_section(condition, label, model, beside, found, pictures))
    return sections


def gallery_sections(found: Found, pictures: Pictures) -> list[dict[str, Any]]:
    """Queries with the pictures that each model ranks first; pictures that can't be shown become problems."""
    thumbnails = Thumbnails(found.folder)
    sections = []
    for condition, by_role in galleries_of(found).items():
        leading = "capivara" if "capivara" in by_role else "baseline"
        others = {role: {q.text: q for q in queries} for role, queries in by_role.items() if role != leading}
        hits = [query for query in by_role[leading] if query.rank == 1]
        misses = [query for query in by_role[leading] if query.rank > 1]
        groups = []
        for title, queries in (("Found first", hits), ("Not found first", misses)):
            cards = [_query_card(q, leading, others, thumbnails) for q in queries[:SHOWN_QUERIES]]
            groups.append({"title": title, "count": len(queries), "cards": cards})
        title = title_of(condition)
        anchor = pictures.anchor("gallery", *name_parts(condition)[1:])
        drawn = hits[:DRAWN_QUERIES] + misses[:DRAWN_QUERIES]
        rows = [(_drawn_title(q), [(thumbnails.image(i), i == q.right) for i, _ in q.best[:BEST]]) for q in drawn]
        rows = [row for row in rows if row[1]]
        if rows:
            plot_gallery(rows, pictures.folder / f"{anchor}.png")
        sections.append(
            {
                "title": title,
                "anchor": anchor,
                "protocol": condition.protocol,
                "language": condition.language,
                "model": MODEL_NAMES[leading],
            }
            | {"groups": groups, "queries": len(hits) + len(misses), "file": f"{anchor}.png" if rows else ""}
        )
    reasons = [
        (shorten(inside, 120), f"this picture is not shown: {why}") for inside, why in thumbnails.refused.items()
    ]
    found.problems.extend(reasons)
    return sections


def _class_section(
    condition: Condition, label: str, model: ClassSeries, baseline: ClassSeries | None, found: Found, pictures: Pictures
) -> dict[str, Any]:
    several = label not in MODEL_NAMES.values()
    task = title_of(condition)
    title = f"{condition.dataset}: {task[0].lower()}{task[1:]}" + f", {label}" * several
    files = model.files + (baseline.files if baseline else [])
    left_out = max(len(file.skipped) for file in files)
    note = figure_note({condition.dataset: left_out})
    order = _order(model, baseline)
    absent = [name for name, accuracy in zip(model.names, model.accuracies, strict=True) if accuracy is None]
    anchor = pictures.anchor("classes", *name_parts(condition)[1:])
    alt = f"Bars of the accuracy of {len(order)} classes: {title}. The table of all classes has the same figures."
    rows = [None if i is None else _class_row(i, model, baseline) for i in _ends(order)]
    bars = pictures.draw(anchor, alt, lambda path: plot_bars(rows, note, path)) if order else None
    return {
        "title": title,
        "anchor": anchor,
        "protocol": protocol_text(condition.protocol),
        "bars": bars,
        "cut": len(order) > len(rows),
        "ends": BEST_AND_WORST,
        "compared": baseline is not None,
        "note": note,
        "absent": [shorten(name, 60) for name in absent],
        "seeds": len(model.files),
        "label": label,
        "classes": [_class_cells(i, model, baseline) for i in order],
        "matrices": [_matrix(condition, series, note, pictures) for series in (baseline, model) if series],
        "confused": [
            _confused_cells(pair, model, baseline) for pair in confused_pairs(model.confusion, CONFUSED_PAIRS)
        ],
    }


def _order(model: ClassSeries, baseline: ClassSeries | None) -> list[int]:
    """Classes with images, from the largest difference to the baseline to the smallest, without one by accuracy."""
    known = [i for i, accuracy in enumerate(model.accuracies) if accuracy is not None]
    gain = {i: _gain(i, model, baseline) for i in known}
    return sorted(known, key=lambda i: (-(gain[i] if gain[i] is not None else 0), -model.accuracies[i]))


def _gain(index: int, model: ClassSeries, baseline: ClassSeries | None) -> float | None:
    before = baseline.accuracies[index] if baseline else None
    after = model.accuracies[index]
    return None if before is None or after is None else after - before


def _ends(order: list[int]) -> list[int | None]:
    """All classes, or the first and the last ones with a gap."""
    if len(order) <= 2 * BEST_AND_WORST:
        return list(order)
    return [*order[:BEST_AND_WORST], None, *order[-BEST_AND_WORST:]]


def _class_row(index: int, model: ClassSeries, baseline: ClassSeries | None) -> BarRow:
    values = [s.accuracies[index] if s else None for s in (baseline, model)]
    if model.role == "baseline":
        values.reverse()  # a baseline alone has the baseline's colour
    bars = [None if value is None else (value, None) for value in values]
    return BarRow(shorten(model.names[index], 30), *bars, 1 / len(model.names))


def _class_cells(index: int, model: ClassSeries, baseline: ClassSeries | None) -> list[str]:
    images = model.confusion[index].sum().item() / len(model.files)
    accuracies = [s.accuracies[index] if s else None for s in (baseline, model)]
    cells = ["–" if accuracy is None else f"{100 * accuracy:.1f}" for accuracy in accuracies]
    return [shorten(model.names[index], 80), f"{images:.0f}", *cells, points(_gain(index, model, baseline))]


def _confused_cells(pair: tuple[int, int], model: ClassSeries, baseline: ClassSeries | None) -> list[str]:
    """True class, taken for, and of each model the share of the class's images."""
    cells = [shorten(model.names[index], 60) for index in pair]
    for series in (baseline, model):
        total = series.confusion[pair[0]].sum().item() if series else 0
        share = f"{100 * series.confusion[pair].item() / total:.1f}" if total else "–"
        cells.append(share)
    return [*cells, f"{model.confusion[pair].item() / len(model.files):.0f}"]


def _matrix(condition: Condition, series: ClassSeries, note: str, pictures: Pictures) -> dict[str, Any]:
    name = MODEL_NAMES[series.role]
    anchor = pictures.anchor("confusion", *name_parts(condition)[1:], name)
    alt = f"Confusion matrix of {name}, {len(series.names)} classes of {condition.dataset}: {title_of(condition)}."
    names = [shorten(text, 24) for text in series.names]
    picture = pictures.draw(anchor, alt, lambda path: plot_confusion(series.confusion, names, note, path))
    return {"model": name, "picture": picture, "diagonal": _diagonal(series)}


def _diagonal(series: ClassSeries) -> str:
    """Share of all images that were taken for what they are."""
    total = series.confusion.sum().item()
    return f"{100 * series.confusion.trace().item() / total:.1f}" if total else "–"


def _query_card(
    query: Query, leading: str, others: dict[str, dict[str, Query]], thumbnails: Thumbnails
) -> dict[str, Any]:
    """A query, its own picture, and a line of found ones for every model that was asked the same."""
    asked = [(leading, query)] + [(role, known[query.text]) for role, known in others.items() if query.text in known]
    text = shorten(query.text, 300)
    lines = []
    for role, of_model in asked:
        found = []
        for place, (image, score) in enumerate(of_model.best[:BEST], start=1):
            right = image == of_model.right
            alt = f"Picture {place} for “{shorten(query.text, 80)}”" + ", the right one" * right
            picture = thumbnails.picture(image, alt)
            found.append({"picture": picture, "right": right, "score": f"{score:.3f}"})
        lines.append({"model": MODEL_NAMES[role], "rank": f"{of_model.rank:g}", "found": found})
    own = thumbnails.picture(query.right, f"The picture that “{shorten(query.text, 80)}” describes")
    return {"query": text, "own": own, "lines": lines}


def _drawn_title(query: Query) -> str:
    return f"“{shorten(query.text, 60)}”   right one at rank {query.rank:g}"
