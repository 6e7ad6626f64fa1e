"""Sections of the page that hold figures: what was measured, benchmarks, gains, protocols, training, what was left out.

Each function returns plain values for the template; the pictures are drawn on the way.
"""

from collections.abc import Iterable
from typing import Any

from common.privacy import hide_paths
from eval.report_page.compare import (
    Condition,
    Pair,
    Series,
    blocks_of,
    gains_of,
    identity,
    main_pairs,
    model_label,
    points,
    protocol_rows,
    reading_order,
    value_text,
)
from eval.report_page.files import Found, shorten
from eval.report_page.pictures import Pictures
from records.plots import BarRow, plot_bars, plot_gains, plot_training_curves
from records.schema import MODEL_NAMES

METRIC_NAMES = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "mean_recall": "mean recall",
    "median_rank": "median rank",
    "mean_per_class_accuracy": "mean per class",
    "11point_mAP": "11-point mAP",
    "roc_auc": "ROC AUC",
    "top_5_accuracy": "top-5 accuracy",
}
DIRECTION_NAMES = {"text_to_image": "text\u00a0→\u00a0image", "image_to_text": "image\u00a0→\u00a0text"}
TASK_NAMES = {"classification": "Zero-shot classification", "linear_probe": "Linear probe"}
PROTOCOLS = {
    "ours": "ours: class names and templates written for this project",
    "authors": "authors: class names and templates of CAPIVARA's authors",
    "babel": "babel: class names of Babel-ImageNet",
    "full": "full: the regression saw all training images",
}
SHOWN_SKIPPED = 50  # of a file; the others are counted
HEADER = ("dataset_revision", "dataset_fingerprint", "precision", "seconds", "skipped_rows", "command")


def measured(found: Found) -> dict[str, Any]:
    """What stands at the head of the page: models, devices, versions, and the files with their headers."""
    models: dict[tuple[str, str], None] = {}
    versions: dict[str, dict[str, None]] = {}
    for result in found.results:
        for record in result.records:
            models.setdefault(identity(record, result.name)[:2])
        of_file = result.facts.get("versions")
        for package, version in (of_file if isinstance(of_file, dict) else {}).items():
            versions.setdefault(shorten(str(package), 60), {}).setdefault(shorten(str(version), 60))
    files = [
        {"name": result.name, "model": hide_paths(str(result.facts.get("model", ""))), "records": len(result.records)}
        | {key: shorten(str(result.facts.get(key, "")), 400) for key in HEADER}
        for result in found.results
    ]
    return {
        "models": [
            (MODEL_NAMES[role], [source for of, source in sorted(models) if of == role])
            for role in sorted({role for role, _ in models})
        ],
        "facts": [
            (title, values)
            for title, key in (("Device", "device"), ("Precision", "precision"), ("Date", "date"))
            if (values := _distinct(result.facts.get(key) for result in found.results))
        ],
        "versions": [(package, ", ".join(known)) for package, known in versions.items()],
        "files": files,
    }


def benchmarks(pairs: list[Pair], found: Found, pictures: Pictures) -> list[dict[str, Any]]:
    """A figure and a table of every group of pairs that belong together."""
    return [_block(block, found, pictures) for block in blocks_of(pairs)]


def headlines(pairs: list[Pair]) -> list[dict[str, Any]]:
    """The figures to look at first, Portuguese before others: mean recall, and the mean over the sets of a protocol."""
    cards = []
    for block in sorted(blocks_of(pairs), key=lambda block: reading_order(block[0].condition)[1:]):
        c, groups = block[0].condition, _by_models(main_pairs(block))
        for (_, model), both in groups.items():
            whose = f", {model}" * (len(groups) > 1)
            if c.task == "retrieval":
                for pair in both:
                    if pair.condition.metric == "mean_recall":
                        direction = DIRECTION_NAMES.get(pair.condition.direction, "")
                        cards.append(_card(f"{c.dataset}, {c.language}", f"{direction}, mean recall{whose}", [pair]))
            else:
                name = both[0].condition.dataset if len(both) == 1 else f"Mean over {len(both)} data sets"
                cards.append(_card(name, f"{TASK_NAMES.get(c.task, c.task)}, {shorten(c.protocol, 30)}{whose}", both))
    return cards


def gains(found: Found, pictures: Pictures) -> dict[str, Any] | None:
    """Gains in mean recall with their intervals; None where none was measured."""
    records = gains_of(found)
    if not records:
        return None
    several = len({source for _, source in records}) > 1
    rows, table = [], []
    for r, source in records:
        low, high = r.interval_95
        direction = DIRECTION_NAMES.get(r.direction, r.direction)
        seed = "" if r.seed is None else f", seed {r.seed}"
        label = f"{shorten(r.dataset, 24)}, {r.language}\n{direction}{seed}" + f"\n{source}" * several
        rows.append((shorten_lines(label), r.value, low, high))
        what = f"{r.dataset}, {r.language}, {direction}" + f" ({source})" * several
        interval = f"{points(low)} to {points(high)}"
        table.append((what, "" if r.seed is None else r.seed, points(r.value), interval, f"{r.n:g}"))
    alt = f"{len(rows)} gains with their 95 % intervals beside zero; the table has the same figures."
    anchor = pictures.anchor("gains")
    picture = pictures.draw(anchor, alt, lambda path: plot_gains(rows, path))
    return {"picture": picture, "rows": table, "protocols": _distinct(r.protocol for r, _ in records)}


def protocols(series: dict[Condition, list[Series]]) -> list[dict[str, Any]]:
    """`authors` against `ours` on the same model: how much of a figure is the prompts'."""
    rows = protocol_rows(series)
    sources = {role: {ours.source for _, _, ours in rows if ours.role == role} for role in MODEL_NAMES}
    return [
        {
            "what": f"{c.dataset}, {METRIC_NAMES.get(c.metric, c.metric)}",
            "model": model_label(ours.role, ours.source, sources[ours.role]),
            "authors": value_text(authors, False),
            "ours": value_text(ours, False),
            "difference": points(ours.mean - authors.mean),
            "n": f"{ours.n:g}" if ours.n == authors.n else f"{authors.n:g} and {ours.n:g}",
        }
        for c, authors, ours in rows
    ]


def training(found: Found, pictures: Pictures) -> list[dict[str, Any]]:
    """Curves and facts of every `run.json`."""
    sections = []
    for name, run in found.runs:
        config = run["config"] if isinstance(run.get("config"), dict) else {}
        language = config.get("language")
        language = language if isinstance(language, str) and language.isalpha() else "unknown"
        curve = run["curve"]
        anchor = pictures.anchor("training", name.removesuffix(".json"))
        alt = f"Loss and learning rate of {curve[-1]['step']:g} steps, and mean recall of the validation split."
        picture = pictures.draw(anchor, alt, lambda path, c=curve, la=language: plot_training_curves(c, la, path))
        facts = [
            ("Base", hide_paths(str(config.get("model", "")))),
            ("Data", ", ".join(map(str, config["dataset"])) if isinstance(config.get("dataset"), list) else ""),
            ("Captions in", language),
            ("Seed", str(run.get("seed", ""))),
            ("Steps", str(run.get("steps", ""))),
            ("Pairs", str(run.get("pairs", ""))),
            ("Device", str(run.get("device", ""))),
            ("Rows left out", _counts(run.get("skipped_rows"))),
        ]
        facts = [(title, shorten(text, 300)) for title, text in facts if text]
        sections.append({"name": name, "anchor": anchor, "picture": picture, "facts": facts})
    return sections


def left_out(found: Found) -> list[dict[str, Any]]:
    """Images that could not be read; files that miss the same ones are taken together."""
    groups: dict[tuple, list[str]] = {}
    for result in found.results:
        count = result.facts.get("skipped_rows")
        count = count if isinstance(count, int) and count > 0 else len(result.skipped)
        if count:
            shown = tuple((shorten(row, 40), shorten(why, 200)) for row, why in result.skipped[:SHOWN_SKIPPED])
            dataset = ", ".join(_distinct(record.dataset for record in result.records))
            groups.setdefault((dataset, count, shown), []).append(result.name)
    return [
        {"dataset": dataset, "count": count, "shown": shown, "files": files}
        for (dataset, count, shown), files in groups.items()
    ]


def title_of(c: Condition) -> str:
    """Heading of a group of figures."""
    captions = f", captions in {c.language}" if c.language else ""
    if c.task == "retrieval":
        return f"Retrieval, {c.dataset}{captions}, split {c.split}"
    prompts = f", prompts in {c.language}" if c.language else ""
    return f"{TASK_NAMES.get(c.task, c.task)}, {shorten(c.protocol, 40)}{prompts}, split {c.split}"


def name_parts(c: Condition) -> list[str]:
    """What tells the pictures of a report apart, for their names; a protocol of retrieval is a whole sentence."""
    return [c.task, c.dataset, c.language, "" if c.task == "retrieval" else c.protocol, c.split]


def protocol_text(protocol: str) -> str:
    """A protocol in words; those of retrieval are words already."""
    if protocol.endswith("-shot"):
        return f"{protocol}: the regression saw so many training images of each class; means over draws"
    return PROTOCOLS.get(protocol, protocol)


def figure_note(skipped: dict[str, int]) -> str:
    """What a figure says of images that could not be read; empty where all could."""
    counts = {dataset: count for dataset, count in skipped.items() if count}
    listed = ", ".join(f"{count} of {shorten(dataset, 30)}" for dataset, count in counts.items())
    if len(counts) > 2:  # a line of a figure holds no more
        listed = f"{sum(counts.values())}, of {len(counts)} data sets"
    return f"unreadable images left out: {listed}" if listed else ""


def shorten_lines(text: str, limit: int = 28) -> str:
    """Every line of a label cut to `limit` characters."""
    return "\n".join(shorten(line, limit) for line in text.split("\n"))


def _block(block: list[Pair], found: Found, pictures: Pictures) -> dict[str, Any]:
    c = block[0].condition
    shown, title = main_pairs(block), title_of(c)
    several = len({(p.baseline and p.baseline.source, p.model and p.model.source) for p in block}) > 1
    rows = [_bar_row(pair, several) for pair in shown]
    skipped: dict[str, int] = {}
    for pair in block:
        most = max(series.skipped for series in (pair.baseline, pair.model) if series)
        skipped[pair.condition.dataset] = max(skipped.get(pair.condition.dataset, 0), most)
    note = figure_note(skipped)
    anchor = pictures.anchor("bars", *name_parts(c._replace(dataset=c.dataset if c.task == "retrieval" else "")))
    picture = None
    if rows:
        alt = f"Bars of baseline and CAPIVARA, {len(rows)} rows: {title}. The table has the same figures."
        picture = pictures.draw(anchor, alt, lambda path: plot_bars(rows, note, path))
    means = [
        _card("", f"mean of {len(both)} data sets", both) | {"sources": model}
        for (_, model), both in _by_models(shown).items()
        if c.task != "retrieval" and len(both) > 1
    ]
    return {
        "title": title,
        "anchor": anchor,
        "what": "Direction, metric" if c.direction else "Data set, metric",
        "protocol": protocol_text(c.protocol),
        "picture": picture,
        "note": note,
        "several": several,
        "seeds": max(len(series.values) for pair in block for series in (pair.model, pair.baseline) if series),
        "rows": [_table_row(pair) | {"sources": _sources(pair, block)} for pair in block],
        "means": means,
        "notes": _notes(block, found),
    }


def _by_models(pairs: list[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """(baseline's folder, model's folder) -> the pairs that have both."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        if pair.baseline and pair.model:
            groups.setdefault((pair.baseline.source, pair.model.source), []).append(pair)
    return groups


def _sources(pair: Pair, block: list[Pair]) -> str:
    """Folder of the model, and that of the baseline where there are several."""
    baselines = {other.baseline.source for other in block if other.baseline}
    against = f" against {pair.baseline.source}" if pair.baseline and len(baselines) > 1 else ""
    return (pair.model.source if pair.model else "baseline alone") + against


def _bar_row(pair: Pair, several: bool) -> BarRow:
    c = pair.condition
    metric = METRIC_NAMES.get(c.metric, c.metric)
    label = f"{DIRECTION_NAMES.get(c.direction, c.direction)}, {metric}" if c.direction else f"{c.dataset}\n{metric}"
    if several:
        label += f"\n{(pair.model or pair.baseline).source}"
    values = [(series.mean, series.deviation) if series else None for series in (pair.baseline, pair.model)]
    return BarRow(shorten_lines(label), *values, pair.chance)


def _table_row(pair: Pair) -> dict[str, Any]:
    c, difference = pair.condition, pair.difference
    better = None if not difference else (difference < 0) == pair.is_rank
    chance = "–" if pair.chance is None else f"{100 * pair.chance:.1f}"
    series = pair.model or pair.baseline
    return {
        "what": f"{DIRECTION_NAMES.get(c.direction, c.direction) or c.dataset}, {METRIC_NAMES.get(c.metric, c.metric)}",
        "baseline": value_text(pair.baseline, pair.is_rank),
        "model": value_text(pair.model, pair.is_rank),
        "difference": points(difference, pair.is_rank),
        "better": better,
        "chance": chance,
        "n": f"{series.n:g}",
        "doubts": pair.doubts,
    }


def _card(title: str, what: str, pairs: list[Pair]) -> dict[str, Any]:
    """Means over pairs that have both a baseline and a model."""
    before = sum(pair.baseline.mean for pair in pairs) / len(pairs)
    after = sum(pair.model.mean for pair in pairs) / len(pairs)
    values = {"baseline": f"{100 * before:.1f}", "model": f"{100 * after:.1f}", "difference": points(after - before)}
    return {"title": title, "what": what, "better": after > before if values["difference"] != "0.0" else None} | values


def _notes(block: list[Pair], found: Found) -> list[str]:
    """What the prompts' source says of them, of the files of a block."""
    conditions = {(p.condition.task, p.condition.dataset, p.condition.protocol) for p in block}
    return _distinct(
        f"{result.records[0].dataset}: {shorten(note, 400)}"
        for result in found.results
        for note in result.notes
        if {(r.task, r.dataset, r.protocol) for r in result.records} & conditions
    )


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(shorten(value, 300) for value in values if isinstance(value, str) and value))


def _counts(reasons: Any) -> str:
    """Reasons with their counts, as `run.json` has them."""
    return ", ".join(f"{why}: {count}" for why, count in reasons.items()) if isinstance(reasons, dict) else ""
