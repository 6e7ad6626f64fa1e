"""Parts of a card that are made of figures: settings, architecture, results beside the baseline, energy, files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hub_upload.card_facts import RANK_METRICS, CardFacts, Fact, Measured, Series
from hub_upload.card_text import Writer, code, mark
from hub_upload.card_words import ONLY_WHERE, SETTINGS

DIRECTIONS = ("text_to_image", "image_to_text")
GAIN = "mean_recall_gain"
TOWER = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
ARCHITECTURE = {
    "vision_": (*TOWER, "architecture", "patch_size", "image_size"),
    "text_": (*TOWER, "vocab_size"),
    "": ("projection_dim", "text_projection_type"),
}


@dataclass(frozen=True)
class Energy:
    """Of all runs together, in kWh, kg of CO2e and hours; `about` is what the first of them says of it."""

    kwh: Fact
    kg_co2e: Fact
    hours: Fact
    about: Fact

    @property
    def estimated(self) -> bool:
        return "estimated" in str(self.about["method"].value)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], figures_from: int = 1) -> str:
    """A Markdown table; the columns from `figures_from` on are aligned to the right."""
    rule = ["---" if column < figures_from else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def settings(facts: CardFacts, write: Writer) -> str:
    """The hyperparameters as the run had them; what does not apply is left out."""
    config, rows = facts.run["config"], []
    for key, english, portuguese in SETTINGS:
        value = config.get(key)
        decisive, wanted = ONLY_WHERE.get(key, ("", ()))
        unused = decisive and config[decisive].value not in wanted
        unused = unused or (key.startswith("lora_") and not config["lora_rank"].value)
        if value is None or value.value is False or unused:
            continue
        if key == "image_embedding_cache" and value.value != "off":
            value = Fact("on", value.source)  # a folder of the machine, otherwise
        rows.append((english if write.language == "en" else portuguese, f"`{key}`", write.code(value)))
    return table((write.word("what"), write.word("setting"), write.word("value")), rows, figures_from=2)


def architecture(facts: CardFacts, write: Writer) -> dict[str, str]:
    """Figures of `config.json` by name; empty where it lacks them."""
    found = {f"{prefix}{key}": "" for prefix, keys in ARCHITECTURE.items() for key in keys}
    found["tokens"] = write.of(facts.tokens)
    found["parameters"] = write.of(facts.parameters) if facts.parameters else ""
    if facts.config is None:
        return found
    for prefix, keys in ARCHITECTURE.items():
        config = facts.config.get(f"{prefix}config") if prefix else facts.config
        for key in keys if config else ():
            if value := config.get(key):
                is_text = isinstance(value.value, str)
                found[f"{prefix}{key}"] = write.code(value) if is_text else write.of(value)
    return found


# --- Results ---------------------------------------------------------------------------------------------------------


def conditions(facts: CardFacts, task: str) -> list[tuple[str, ...]]:
    """What was measured of a task; what is in the language of training first."""
    found = dict.fromkeys(s.first.condition for s in facts.series if s.first.task == task)
    trained = facts.run["config"]["language"].value
    return sorted(found, key=lambda condition: condition[3] != trained)


def dataset_title(facts: CardFacts, record: Measured, write: Writer) -> str:
    """The title on the data set's own card where it is that of the run, else its name in the records."""
    about = (facts.run.get("origins") or Fact({}, "")).get("evaluation_dataset")
    if about and about["name"].value == record.dataset:
        return write.text(about["title"])
    return mark(code(record.dataset), record.value.source)


def retrieval_sections(facts: CardFacts, write: Writer) -> list[dict[str, Any]]:
    """A section a data set and language: title, table, and the gains with their intervals."""
    sections = []
    for condition in conditions(facts, "retrieval"):
        rows = []
        for direction in DIRECTIONS:
            rows += [
                (f"{write.direction(direction)}, {write.metric(s.first.metric)}", *_cells(facts, s.first, write))
                for s in _figures_of(facts, condition, direction)
            ]
        first = next(s.first for s in facts.series if s.first.condition == condition)
        words = {"dataset": dataset_title(facts, first, write), "split": code(first.split)}
        title = write.word("retrieval_title").format(**words, language=write.language_name(first.language))
        header = [write.word(key) for key in ("metric", "baseline", "capivara", "difference", "chance")]
        section = {"title": title, "table": table(*_without_empty(header, rows))}
        sections.append(section | {"gains": _gain_lines(facts, condition, write)})
    return sections


def image_sections(facts: CardFacts, write: Writer) -> list[dict[str, Any]]:
    """Zero-shot classification and linear probe: a section each, a row a data set, protocol and metric."""
    sections = []
    for task in ("classification", "linear_probe"):
        rows = []
        for condition in conditions(facts, task):
            for series in _figures_of(facts, condition, ""):
                record = series.first
                about = [dataset_title(facts, record, write), mark(code(record.protocol), record.value.source)]
                about += [write.metric(record.metric), write.of(record.n)]
                rows.append((*about, *_cells(facts, record, write)))
        names = ("dataset", "protocol", "metric", "images", "baseline", "capivara", "difference", "chance")
        if rows:
            made = table(*_without_empty([write.word(name) for name in names], rows), figures_from=3)
            sections.append({"title": write.word(f"{task}_title"), "table": made, "gains": []})
    return sections


def _figures_of(facts: CardFacts, condition: tuple[str, ...], direction: str) -> list[Series]:
    """One series a metric, whichever model has it, without gains."""
    found: dict[str, Series] = {}
    for series in facts.series:
        record = series.first
        if (record.condition, record.direction) == (condition, direction) and not record.metric.endswith("_gain"):
            found.setdefault(record.metric, series)
    return list(found.values())


def _cells(facts: CardFacts, record: Measured, write: Writer) -> list[str]:
    """Baseline, CAPIVARA, difference and chance of one figure; empty where there is none. The better one is bold."""
    where = (record.condition, record.direction, record.metric)
    baseline, model = (facts.find(*where, role) for role in ("baseline", "capivara"))
    known = next((s.first for s in (baseline, model) if s and s.first.chance), None)
    cells = [write.figure(series) if series else "" for series in (baseline, model)]
    if baseline and model and baseline.mean != model.mean:
        better = int(_falls(model, baseline) < 0)
        cells[better] = f"**{cells[better]}**"
    cells.append(write.difference(model, baseline) if model and baseline else "")
    return [*cells, write.chance(known) if known else ""]


def _falls(model: Series, baseline: Series) -> float:
    """By how much a model is worse than the baseline; below 0 where it is better."""
    falls = baseline.mean - model.mean
    return -falls if model.first.metric in RANK_METRICS else falls


def _without_empty(header: list[str], rows: list[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns that no row fills; other gaps become a dash."""
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return [header[column] for column in kept], [[row[column] or "–" for column in kept] for row in rows]


def _gain_lines(facts: CardFacts, condition: tuple[str, ...], write: Writer) -> list[str]:
    """The gain of each direction, with the interval of each seed."""
    lines = []
    for direction in DIRECTIONS:
        gain = facts.find(condition, direction, GAIN, "capivara")
        if gain is None:
            continue
        intervals = _intervals(gain, [record for record in gain.records if record.interval], write)
        points = write.number(100 * gain.mean, 2, sign=True)
        if gain.deviation is not None:
            points += f" ± {write.number(100 * gain.deviation, 2)}"
        words = {"what": write.direction(direction), "points": mark(points, gain.source)}
        lines.append(write.word("gain").format(**words, intervals=intervals))
    return lines


def several_seeds(facts: CardFacts, write: Writer) -> str:
    """The note on mean and standard deviation; empty where every figure is of one run."""
    longest = max(facts.series, key=lambda series: len(series.records))
    if len(longest.records) == 1:
        return ""
    seeds = mark(", ".join(str(record.seed) for record in longest.records), longest.source)
    count = mark(write.number(len(longest.records)), longest.source)
    return write.word("seeds_note").format(count=count, seeds=seeds)


def main_figures(facts: CardFacts) -> list[tuple[Series, Series]]:
    """(CAPIVARA, baseline) of what tells most: mean recalls, and each classification's first metric."""
    pairs = []
    for task, metrics in (("retrieval", ("mean_recall",)), ("classification", ()), ("linear_probe", ())):
        for condition in conditions(facts, task):
            for direction in DIRECTIONS if task == "retrieval" else ("",):
                names = metrics or [s.first.metric for s in _figures_of(facts, condition, direction)][:1]
                for metric in names:
                    model, baseline = (
                        facts.find(condition, direction, metric, role) for role in ("capivara", "baseline")
                    )
                    if model and baseline:
                        pairs.append((model, baseline))
    return pairs


def label(facts: CardFacts, record: Measured, write: Writer, with_metric: bool = True) -> str:
    """Which figure it is, in words; the data set is named where there are several."""
    parts = [write.direction(record.direction)] if record.direction else []
    parts += [write.metric(record.metric)] if with_metric else []
    if len({series.first.dataset for series in facts.series}) > 1:
        parts.append(dataset_title(facts, record, write))
    if record.task == "retrieval":
        parts.append(write.language_name(record.language))
    else:
        parts.append(mark(code(record.protocol), record.value.source))
    return ", ".join(parts)


def summary(facts: CardFacts, write: Writer) -> str:
    """Table of the main retrieval figures in the language of training; empty where there are none."""
    language = facts.run["config"]["language"].value
    rows = [
        (label(facts, model.first, write), *_cells(facts, model.first, write)[:3])
        for model, _ in main_figures(facts)
        if model.first.task == "retrieval" and model.first.language == language
    ]
    header = [write.word(key) for key in ("metric", "baseline", "capivara", "difference")]
    return table(header, rows) if rows else ""


def worse(facts: CardFacts, write: Writer) -> list[str]:
    """The main figures that are worse than the baseline's."""
    lines = []
    for model, baseline in main_figures(facts):
        if _falls(model, baseline) > 0:
            words = {"what": label(facts, model.first, write), "model": write.figure(model)}
            lines.append(write.word("beside_baseline").format(**words, baseline=write.figure(baseline)))
    return lines


def unsure(facts: CardFacts, write: Writer) -> list[str]:
    """The gains whose interval includes zero, with the intervals of the seeds of which that is so."""
    lines = []
    for series in facts.series:
        records = [r for r in series.records if series.first.metric == GAIN and r.interval]
        records = [r for r in records if r.interval[0].value <= 0 <= r.interval[1].value]
        if records:
            name = label(facts, series.first, write, with_metric=False)
            lines.append(f"{name}: {_intervals(series, records, write)}")
    return lines


def _intervals(series: Series, records: Sequence[Measured], write: Writer) -> str:
    """95 % intervals, each with its seed where there are several."""
    intervals = [write.interval(record) for record in records]
    if len(series.records) > 1:
        words = [{"interval": i, "seed": record.seed} for i, record in zip(intervals, records, strict=True)]
        intervals = [write.word("interval_of_seed").format(**of_seed) for of_seed in words]
    return "; ".join(intervals)


# --- Data, energy, versions, files -----------------------------------------------------------------------------------


def tested(facts: CardFacts, write: Writer) -> list[dict[str, str]]:
    """What was measured on: title, split, language, sizes, protocol, and what a reader of the figures must know."""
    found = []
    for task in ("retrieval", "classification", "linear_probe"):
        for condition in conditions(facts, task):
            series = [s.first for s in facts.series if s.first.condition == condition]
            first, about = series[0], series[0].about
            sizes = {record.direction: write.of(record.n) for record in series}
            found.append(
                {
                    "task": task,
                    "dataset": dataset_title(facts, first, write),
                    "split": code(first.split),
                    "language": write.language_name(first.language) if first.language else "",
                    "captions": sizes.get("text_to_image", ""),
                    "images": sizes.get("image_to_text") or sizes.get("", ""),
                    "protocol": write.phrase(Fact(first.protocol, first.value.source)),
                    "precision": write.code(about["precision"]),
                    "revision": write.code(revision) if (revision := facts.revision(first)) else "",
                    "skipped": write.of(about["skipped_rows"]) if about["skipped_rows"].value else "",
                }
            )
    return found


def energy(facts: CardFacts) -> Energy | None:
    """What all runs took; None unless each of them was measured.

    Raises:
        ValueError: a run lacks a figure, or does not say whether it was measured or estimated.
    """
    of_runs = [run.get("energy") for run in facts.runs]
    if not all(of_runs):
        return None
    for about in of_runs:
        if not any(word in str(about["method"].value) for word in ("estimated", "measured")):
            raise ValueError(f"{about['method'].source} must say whether energy was measured or estimated, by what.")
    sums = {}
    for key in ("kwh", "kg_co2e", "hours"):
        if min(about[key].number() for about in of_runs) < 0:
            raise ValueError(f"{of_runs[0][key].source} must be at least 0.")
        sums[key] = Fact(sum(about[key].value for about in of_runs), ", ".join(about[key].source for about in of_runs))
    return Energy(**sums, about=of_runs[0])


def graphs(facts: CardFacts, write: Writer) -> str:
    """Table of the ONNX graphs: bytes, and how far their embeddings are from the model's."""
    if facts.graphs is None:
        return ""
    rows = []
    for name in facts.graphs["graphs"].names():
        about = facts.graphs["graphs"][name]
        difference, cosine = about.get("largest_difference"), about.get("lowest_cosine")
        rows.append(
            (
                code(f"onnx/{name}"),
                mark(f"{write.number(about['bytes'].number() / 1e6, 1)} MB", about["bytes"].source),
                write.scientific(difference) if difference else "",
                write.of(cosine, 4) if cosine else "",
            )
        )
    return table(
        *_without_empty([write.word(key) for key in ("file", "size", "largest_difference", "lowest_cosine")], rows)
    )


def int8_lines(facts: CardFacts, write: Writer) -> list[str]:
    """Mean recall of the int8 graphs beside the float32 ones, a line a direction; empty where it was not measured."""
    recall = facts.graphs.get("recall") if facts.graphs else None
    lines = []
    for direction in DIRECTIONS if recall else ():
        ends = [recall[precision][direction]["mean_recall"] for precision in ("float32", "int8")]
        numbers = [mark(write.number(100 * end.number(), 2), end.source) for end in ends]
        where = f"{write.code(recall['dataset'])} {write.code(recall['split'])}, {write.of(recall['images'])}"
        words = {"what": write.direction(direction), "float32": numbers[0], "int8": numbers[1], "where": where}
        lines.append(write.word("int8").format(**words))
    return lines


def files(facts: CardFacts, write: Writer) -> str:
    """What the card was made from, with digests, so that any later change of a file is noticed."""
    rows = [(code(name), mark(f"`{digest.value[:32]}`", name)) for name, digest in sorted(facts.digests.items())]
    return table((write.word("file"), write.word("digest")), rows, figures_from=2)
