"""Sections of the report with figures: what was measured, benchmarks, gains, protocols, training, what is left out.

Each function returns plain values for the template; the pictures are drawn on the way.
"""

from collections.abc import Iterable
from typing import Any

from capivara_common.privacy import hide_paths
from eval.report_folder import Found, skipped_rows
from records.plots import BarRow, plot_bars, plot_gains, plot_training_curves
from records.report_page import Cell, Pictures
from records.schema import MODEL_NAMES, TASKS, Condition
from records.series import Pair, Series, folder_and_seed
from records.tables import figure_text, one_line, points

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
DIRECTION_NAMES = {"text_to_image": "text\u00a0→\u00a0image", "image_to_text": "image\u00a0→\u00a0text", "": ""}
TASK_NAMES = {"classification": "Zero-shot classification", "linear_probe": "Linear probe"}
PROTOCOLS = {
    "ours": "ours: class names and templates written for this project",
    "authors": "authors: class names and templates of CAPIVARA's authors",
    "babel": "babel: class names of Babel-ImageNet",
    "own": "own: class names and templates of the benchmark's own file",
    "full": "full: the regression saw all training images",
}
SHOWN_SKIPPED = 50  # of a file; the others are counted


def measured(found: Found) -> dict[str, Any]:
    """What stands at the head of the page: models, devices, versions, and the files with their headers."""
    models = {(r.model, folder_and_seed(r, result.name)[0]) for result in found.results for r in result.records}
    versions: dict[str, dict[str, None]] = {}
    for result in found.results:
        known = result.header.get("versions")
        for package, version in (known if isinstance(known, dict) else {}).items():
            versions.setdefault(one_line(str(package), 60), {}).setdefault(one_line(str(version), 60))
    return {
        "models": [
            (MODEL_NAMES[role], [folder for of, folder in sorted(models) if of == role])
            for role in sorted({role for role, _ in models})
        ],
        "facts": [
            (title, values)
            for title, key in (("Device", "device"), ("Precision", "precision"))
            if (values := _distinct(result.header.get(key) for result in found.results))
        ],
        "versions": [(package, ", ".join(known)) for package, known in versions.items()],
        "files": [_file_cells(result.name, result.header) for result in found.results],
    }


def benchmarks(pairs: list[Pair], found: Found, pictures: Pictures) -> list[dict[str, Any]]:
    """A figure and a table of every group of pairs that belong together."""
    return [_block(block, found, pictures) for block in blocks_of(pairs)]


def headlines(pairs: list[Pair]) -> list[dict[str, Any]]:
    """The figures to look at first, Portuguese before others: mean recall, and the mean over the sets of a protocol.

    Of whole embeddings; those that were cut have blocks of their own.
    """
    cards = []
    whole = blocks_of(pair for pair in pairs if pair.condition.dim is None)
    for block in sorted(whole, key=lambda block: reading_order(block[0].condition)[1:]):
        c, groups = block[0].condition, _by_models(main_pairs(block))
        for (_, model), both in groups.items():
            suffix = f", {model}" * (len(groups) > 1)
            if c.task == "retrieval":
                for pair in both:
                    if pair.condition.metric == "mean_recall":
                        direction = DIRECTION_NAMES[pair.condition.direction]
                        cards.append(_card(f"{c.dataset}, {c.language}", f"{direction}, mean recall{suffix}", [pair]))
            else:
                name = both[0].condition.dataset if len(both) == 1 else f"Mean over {len(both)} data sets"
                cards.append(_card(name, f"{TASK_NAMES[c.task]}, {one_line(c.protocol, 30)}{suffix}", both))
    return cards


def gains(found: Found, pictures: Pictures) -> dict[str, Any] | None:
    """Gains in mean recall with their intervals; None where none was measured."""
    records = [
        (record, folder_and_seed(record, result.name)[0])
        for result in found.results
        for record in result.records
        if record.is_gain and record.interval_95 is not None
    ]
    if not records:
        return None
    records.sort(key=lambda gain: reading_order(gain[0].condition))
    several = len({folder for _, folder in records}) > 1
    rows, table = [], []
    for r, folder in records:
        low, high = r.interval_95
        direction = DIRECTION_NAMES[r.direction]
        seed = "" if r.seed is None else f", seed {r.seed}"
        label = f"{one_line(r.dataset, 24)}, {r.language}\n{direction}{seed}" + f"\n{folder}" * several
        rows.append((shorten_lines(label), r.value, low, high))
        what = f"{r.dataset}, {r.language}, {direction}" + f" ({folder})" * several
        interval = f"{points(low)} to {points(high)}"
        table.append((what, "" if r.seed is None else r.seed, points(r.value), interval, f"{r.n:g}"))
    alt = f"{len(rows)} gains with their 95 % intervals beside zero; the table has the same figures."
    picture = pictures.draw(pictures.anchor("gains"), alt, lambda path: plot_gains(rows, path))
    return {"picture": picture, "rows": table, "protocols": _distinct(r.protocol for r, _ in records)}


def protocols(series: list[Series]) -> list[list[str]]:
    """`authors` against `ours` on the same model: how much of a figure is the prompts'."""
    rows = protocol_pairs(series)
    folders = {role: {ours.folder for _, ours in rows if ours.role == role} for role in MODEL_NAMES}
    return [
        [
            f"{ours.condition.dataset}, {metric_name(ours.condition)}",
            model_label(ours.role, ours.folder, folders[ours.role]),
            figure_text(authors),
            figure_text(ours),
            points(ours.mean - authors.mean, ours.first.is_rank),
            f"{ours.first.n:g}" if ours.first.n == authors.first.n else f"{authors.first.n:g} and {ours.first.n:g}",
        ]
        for authors, ours in rows
    ]


def training(found: Found, pictures: Pictures) -> list[dict[str, Any]]:
    """Curves and facts of every `run.json`."""
    sections = []
    for name, run in found.runs:
        config = run["config"] if isinstance(run.get("config"), dict) else {}
        language = config.get("language")
        language = language if isinstance(language, str) and language.isalpha() else "unknown"
        curve, skipped = run["curve"], run.get("skipped_rows")
        anchor = pictures.anchor("training", name.removesuffix(".json"))
        alt = f"Loss and learning rate of {curve[-1]['step']:g} steps, and mean recall of the validation split."
        picture = pictures.draw(anchor, alt, lambda path, c=curve, la=language: plot_training_curves(c, la, path))
        facts = [
            ("Base", hide_paths(str(config.get("model", "")))),
            ("Data", ", ".join(map(str, config["dataset"])) if isinstance(config.get("dataset"), list) else ""),
            ("Captions in", language),
            *((title, str(run.get(title.lower(), ""))) for title in ("Seed", "Steps", "Pairs", "Device")),
            ("Rows left out", ", ".join(f"{k}: {n}" for k, n in skipped.items()) if isinstance(skipped, dict) else ""),
        ]
        facts = [(title, one_line(text, 300)) for title, text in facts if text]
        sections.append({"name": name, "anchor": anchor, "picture": picture, "facts": facts})
    return sections


def left_out(found: Found) -> list[dict[str, Any]]:
    """Images that could not be read; files that miss the same ones are taken together."""
    groups: dict[tuple, list[str]] = {}
    for result in found.results:
        listed, count = skipped_rows(result), result.content.get("skipped_rows")
        count = count if isinstance(count, int) and count > 0 else len(listed)
        if count:
            shown = tuple((one_line(row, 40), one_line(why, 200)) for row, why in listed[:SHOWN_SKIPPED])
            dataset = ", ".join(_distinct(record.dataset for record in result.records))
            groups.setdefault((dataset, count, shown), []).append(result.name)
    return [
        {"dataset": dataset, "count": count, "shown": shown, "files": files}
        for (dataset, count, shown), files in groups.items()
    ]


# --- What is compared ------------------------------------------------------------------------------------------------


def blocks_of(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs that share a figure: of retrieval those of a data set, of classification those of all data sets."""
    blocks: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        c = pair.condition
        dataset = c.dataset if c.task == "retrieval" else ""
        blocks.setdefault((c.task, dataset, c.split, c.language, c.protocol), []).append(pair)
    return sorted(blocks.values(), key=lambda block: reading_order(block[0].condition))


def reading_order(c: Condition) -> tuple[int, bool, bool]:
    """Tasks in their order, Portuguese before other languages, this project's prompts before others'."""
    return TASKS.index(c.task), c.language not in ("pt", ""), c.protocol in ("authors", "babel")


def main_pairs(block: list[Pair]) -> list[Pair]:
    """Those that a figure shows: shares; of classification the data set's own metric, which its file holds first."""
    shares = [pair for pair in block if not pair.is_rank]
    if block[0].condition.task == "retrieval":
        return shares
    first: dict[str, str] = {}
    for pair in shares:
        first.setdefault(pair.condition.dataset, pair.condition.metric)
    return [pair for pair in shares if pair.condition.metric == first[pair.condition.dataset]]


def protocol_pairs(series: list[Series]) -> list[tuple[Series, Series]]:
    """(of the protocol authors, of ours) of the same figure and model."""
    ours = {(s.condition, s.role, s.folder): s for s in series if s.condition.protocol == "ours"}
    keys = [
        (s, (s.condition._replace(protocol="ours"), s.role, s.folder))
        for s in series
        if s.condition.protocol == "authors"
    ]
    return [(authors, ours[key]) for authors, key in keys if key in ours]


# --- Words -----------------------------------------------------------------------------------------------------------


def metric_name(c: Condition) -> str:
    """The short name of a metric."""
    return METRIC_NAMES.get(c.metric, c.metric)


def title_of(c: Condition) -> str:
    """The title of a group of figures."""
    if c.task == "retrieval":
        width = f", first {c.dim} dimensions" if c.dim else ""
        return f"Retrieval, {c.dataset}{f', captions in {c.language}' if c.language else ''}, split {c.split}{width}"
    prompts = f", prompts in {c.language}" if c.language else ""
    return f"{TASK_NAMES[c.task]}, {one_line(c.protocol, 40)}{prompts}, split {c.split}"


def name_parts(c: Condition) -> list[str]:
    """What tells the pictures of a report apart, for their names; a protocol of retrieval is a whole sentence."""
    protocol = "" if c.task == "retrieval" else c.protocol
    return [c.task, c.dataset, c.language, protocol, c.split, *([f"first {c.dim}"] if c.dim else [])]


def protocol_text(protocol: str) -> str:
    """A protocol in words; those of retrieval are words already."""
    if protocol.endswith("-shot"):
        return f"{protocol}: the regression saw so many training images of each class; means over draws"
    return PROTOCOLS.get(protocol, protocol)


def figure_note(skipped: dict[str, int]) -> str:
    """What a figure says of images that could not be read, by data set; empty where all could."""
    counts = {dataset: count for dataset, count in skipped.items() if count}
    listed = ", ".join(f"{count} of {one_line(dataset, 30)}" for dataset, count in counts.items())
    if len(counts) > 2:  # a line of a figure holds no more
        listed = f"{sum(counts.values())}, of {len(counts)} data sets"
    return f"unreadable images left out: {listed}" if listed else ""


def model_label(role: str, folder: str, folders: set[str]) -> str:
    """Name of a model, with its folder where the `folders` of the same role are several."""
    return MODEL_NAMES[role] if len(folders) < 2 else f"{MODEL_NAMES[role]} ({folder})"


def shorten_lines(text: str, limit: int = 28) -> str:
    """Each line cut at `limit` letters."""
    return "\n".join(one_line(line, limit) for line in text.split("\n"))


# --- Parts of sections -----------------------------------------------------------------------------------------------


def _file_cells(name: str, header: dict[str, Any]) -> list[str | Cell]:
    shown = {key: one_line(str(value), 400) for key, value in header.items()}
    return [
        Cell(name, is_code=True),
        Cell(hide_paths(str(header.get("model", ""))), is_code=True),
        shown.get("dataset_revision") or "local",
        Cell(shown.get("dataset_fingerprint", ""), is_code=True),
        Cell(shown.get("command", ""), is_code=True),
        shown.get("seconds", ""),
        shown.get("skipped_rows", ""),
    ]


def _block(block: list[Pair], found: Found, pictures: Pictures) -> dict[str, Any]:
    c = block[0].condition
    shown, title = main_pairs(block), title_of(c)
    several = len({(p.baseline and p.baseline.folder, p.model and p.model.folder) for p in block}) > 1
    rows = [_bar_row(pair, several) for pair in shown]
    skipped: dict[str, int] = {}
    for pair in block:
        most = max(series.skipped for series in (pair.baseline, pair.model) if series)
        skipped[pair.condition.dataset] = max(skipped.get(pair.condition.dataset, 0), most)
    note = figure_note(skipped)
    anchor = pictures.anchor("bars", *name_parts(c._replace(dataset=c.dataset if c.task == "retrieval" else "")))
    alt = f"Bars of baseline and CAPIVARA, {len(rows)} rows: {title}. The table has the same figures."
    what = "Direction, metric" if c.direction else "Data set, metric"
    return {
        "title": title,
        "anchor": anchor,
        "protocol": protocol_text(c.protocol),
        "picture": pictures.draw(anchor, alt, lambda path: plot_bars(rows, note, path)) if rows else None,
        "note": note,
        "seeds": max(len(series.measured) for pair in block for series in (pair.model, pair.baseline) if series),
        "head": [what, *(["Models"] if several else []), "Baseline", "CAPIVARA", "Change", "Chance", "n"],
        "rows": [_cells(pair, block, several) for pair in block],
        "means": [_mean_cells(model, both, several) for (_, model), both in _by_models(shown).items() if len(both) > 1]
        if c.task != "retrieval"
        else [],
        "notes": _prompt_notes(block, found),
    }


def _by_models(pairs: list[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """(baseline's folder, model's folder) -> the pairs that have both."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        if pair.baseline and pair.model:
            groups.setdefault((pair.baseline.folder, pair.model.folder), []).append(pair)
    return groups


def _bar_row(pair: Pair, several: bool) -> BarRow:
    c = pair.condition
    label = f"{DIRECTION_NAMES[c.direction]}, {metric_name(c)}" if c.direction else f"{c.dataset}\n{metric_name(c)}"
    if several:
        label += f"\n{(pair.model or pair.baseline).folder}"
    values = [(series.mean, series.deviation) if series else None for series in (pair.baseline, pair.model)]
    return BarRow(shorten_lines(label), *values, pair.chance)


def _cells(pair: Pair, block: list[Pair], several: bool) -> list[str | Cell]:
    c, difference = pair.condition, pair.difference
    better = None if not difference else (difference < 0) == pair.is_rank
    baselines = {other.baseline.folder for other in block if other.baseline}
    against = f" against {pair.baseline.folder}" if pair.baseline and len(baselines) > 1 else ""
    return [
        Cell(f"{DIRECTION_NAMES[c.direction] or c.dataset}, {metric_name(c)}", notes=pair.doubts),
        *([Cell((pair.model.folder if pair.model else "baseline alone") + against, is_code=True)] if several else []),
        figure_text(pair.baseline),
        figure_text(pair.model),
        Cell(points(difference, pair.is_rank), better),
        "–" if pair.chance is None else f"{100 * pair.chance:.1f}",
        f"{(pair.model or pair.baseline).first.n:g}",
    ]


def _mean_cells(model: str, both: list[Pair], several: bool) -> list[str | Cell]:
    card = _card("", f"mean of {len(both)} data sets", both)
    folder = [Cell(model, is_code=True)] if several else []
    values = [card["baseline"], card["model"], Cell(card["difference"], card["better"])]
    return [card["what"], *folder, *values, "", ""]


def _card(title: str, what: str, pairs: list[Pair]) -> dict[str, Any]:
    """Means over pairs that have both a baseline and a model."""
    before = sum(pair.baseline.mean for pair in pairs) / len(pairs)
    after = sum(pair.model.mean for pair in pairs) / len(pairs)
    values = {"baseline": f"{100 * before:.1f}", "model": f"{100 * after:.1f}", "difference": points(after - before)}
    return {"title": title, "what": what, "better": after > before if values["difference"] != "0.0" else None} | values


def _prompt_notes(block: list[Pair], found: Found) -> list[str]:
    """What the prompts' source says of them, of the files of a block."""
    conditions = {(p.condition.task, p.condition.dataset, p.condition.protocol) for p in block}
    notes = []
    for result in found.results:
        listed = result.content.get("notes")
        if {(r.task, r.dataset, r.protocol) for r in result.records} & conditions and isinstance(listed, list):
            texts = [note for note in listed if isinstance(note, str)]
            notes += [f"{result.records[0].dataset}: {one_line(note, 400)}" for note in texts]
    return _distinct(notes)


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(one_line(value, 300) for value in values if isinstance(value, str) and value))
