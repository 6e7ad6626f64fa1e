"""Tables of a suite: measured figures beside the published ones, as data and as Markdown."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from eval.benchmarks import METRICS, Average, Benchmark
from records.schema import MODEL_NAMES
from records.tables import markdown_table


class Figure(NamedTuple):
    """One measured figure of a suite: `value` and `n` as in a `Record`, `run` the number of the model of its role."""

    benchmark: str
    language: str
    direction: str
    metric: str
    role: str
    run: int
    value: float
    n: int


@dataclass(frozen=True)
class SuiteFigures:
    """What a suite has measured."""

    figures: Sequence[Figure]
    runs: dict[str, int]  # role -> number of its models

    def of(self, benchmark: str, language: str, direction: str, metric: str, role: str) -> list[Figure]:
        """A figure a run, in the order of runs; empty where a run has none, since a mean of fewer would mislead."""
        wanted = (benchmark, language, direction, metric, role)
        found = [figure for figure in self.figures if figure[: len(wanted)] == wanted]
        return sorted(found, key=lambda figure: figure.run) if len(found) == self.runs[role] else []


def suite_rows(
    benchmarks: Sequence[tuple[Benchmark, str]],
    measured: SuiteFigures,
    metrics: Sequence[str] = (),
    published: str = "capivara",
    protocol: str = "ours",
) -> list[dict[str, Any]]:
    """Rows of a suite's table, as data; all figures but median ranks in per cent.

    `metrics` get rows of their own beside the benchmark's; `published` names the model whose published figures stand
    beside CAPIVARA's.
    """
    rows = []
    for benchmark, language in benchmarks:
        further = [metric for metric in metrics if METRICS[metric] == benchmark.task]
        for metric in dict.fromkeys([benchmark.metric, *further]):
            for direction in benchmark.directions:
                found = {role: measured.of(benchmark.key, language, direction, metric, role) for role in measured.runs}
                if metric == benchmark.metric or any(found.values()):
                    rows.append(_suite_row(benchmark, language, metric, direction, found, published, protocol))
    return rows


def average_row(
    average: Average,
    rows: Sequence[dict[str, Any]],
    benchmarks: Sequence[Benchmark],
    measured: SuiteFigures,
    published: str = "capivara",
) -> dict[str, Any] | None:
    """The row of an average, or None unless each model has measured each of its benchmarks.

    `rows` are those of the suite, `benchmarks` the average's, as far as they are in it.
    """
    by_role = {
        role: [measured.of(b.key, b.language, "", b.metric, role) for b in benchmarks]
        for role, runs in measured.runs.items()
        if runs
    }
    if len(benchmarks) != average.count or not all(figures for found in by_role.values() for figures in found):
        return None
    cells = {role: _cell(average.published.get(_published_key(role, published)), []) for role in measured.runs}
    for role, found in by_role.items():
        values = [statistics.mean(figure.value for figure in of_run) for of_run in zip(*found, strict=True)]
        cells[role] = _cell(average.published.get(_published_key(role, published)), [100 * value for value in values])
    keys = {benchmark.key for benchmark in benchmarks}
    like = all(row["like_for_like"] for row in rows if row["benchmark"] in keys)
    about = {"benchmark": average.key, "title": average.title, "section": "paper", "language": "pt", "direction": ""}
    return about | {"metric": "average", "images": None, "test_images": None, "like_for_like": like, **cells}


def _suite_row(
    benchmark: Benchmark, language: str, metric: str, direction: str, found: dict[str, list[Figure]], published: str,
    protocol: str,
) -> dict[str, Any]:  # fmt: skip
    own = metric == benchmark.metric and language == benchmark.language
    cells = {}
    for role, figures in found.items():
        figure = benchmark.published_figure(_published_key(role, published), direction) if own else None
        cells[role] = _cell(figure, [f.value if metric == "median_rank" else 100 * f.value for f in figures])
    images = next((figures[0].n for figures in found.values() if figures), None)
    if direction == "text_to_image":
        images = None  # n counts captions
    same_images = benchmark.test_images is None or images in (None, benchmark.test_images)
    same_prompts = benchmark.task == "retrieval" or benchmark.protocol == "babel" or protocol == "authors"
    return {
        "benchmark": benchmark.key,
        "title": benchmark.title if benchmark.languages == (language,) else f"{benchmark.title} ({language})",
        "section": "beyond" if "beyond" in benchmark.suite else "paper",
        "language": language,
        "direction": direction,
        "metric": metric,
        "images": images,
        "test_images": benchmark.test_images,
        "like_for_like": benchmark.like_for_like and same_images and same_prompts,
        **cells,
    }


def _published_key(role: str, published: str) -> str:
    return "baseline" if role == "baseline" else published


def _cell(published: dict[str, float] | None, values: list[float]) -> dict[str, Any]:
    """Published and measured figure, and the measured minus the published one in points."""
    if not values:
        return {"published": published, "measured": None, "difference": None}
    mean = statistics.mean(values)
    measured = {"mean": mean, "std": statistics.stdev(values) if len(values) > 1 else None, "runs": len(values)}
    return {"published": published, "measured": measured, "difference": mean - published["mean"] if published else None}


def suite_table(summary: dict[str, Any]) -> str:
    """A suite's summary as Markdown: published and measured figures, their differences, and what was not run."""
    titles = {"paper": "The paper's benchmarks", "beyond": "Beyond the paper"}
    parts = []
    for section, title in titles.items():
        rows = [row for row in summary["rows"] if row["section"] == section]
        if rows:
            parts += [f"## {title}", _suite_lines(rows, summary)]
    return "\n\n".join([*parts, *_suite_notes(summary)]) + "\n"


def _suite_lines(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    asked = {model["role"] for model in summary["models"]}
    compared = MODEL_NAMES | ({"capivara": "CAPIVARA + Opt."} if summary["published"] == "capivara_opt" else {})
    lines = [["Benchmark", "Metric"]]
    for role, name in MODEL_NAMES.items():
        lines[0] += [f"{compared[role]}, published", f"{name}, measured", "difference"]
    for row in rows:
        what = " ".join(filter(None, (row["metric"].replace("_", " "), row["direction"].replace("_", "-"))))
        cells = [row["title"], what]
        for role in MODEL_NAMES:
            cell, star = row[role], "" if row["like_for_like"] else " *"
            measured = _mean_and_deviation(cell["measured"]) if cell["measured"] else "not run"
            cells += [_mean_and_deviation(cell["published"]), measured if role in asked else "–"]
            cells.append("" if cell["difference"] is None else f"{cell['difference']:+.2f}{star}")
        lines.append(cells)
    return markdown_table(lines, 2)


def _mean_and_deviation(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['mean']:.2f}" + ("" if figure.get("std") is None else f" ± {figure['std']:.2f}")


def _suite_notes(summary: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, and what was not run, as paragraphs and lists."""
    rows = summary["rows"]
    models = [f"{MODEL_NAMES[m['role']]} {m['name']}" for m in summary["models"]]
    notes = [
        f"In per cent; differences are measured minus published, in points. Names and prompts: {summary['protocol']}. "
        f"Precision {summary['precision']}. Models: {', '.join(models)}."
    ]
    if any(not row["like_for_like"] and row[role]["difference"] is not None for row in rows for role in MODEL_NAMES):
        notes.append(
            "\\* not like for like: other captions, another number of images, or other names and prompts than the "
            "published figure's, which was made with the authors' (`--protocol authors --authors_file FILE`)."
        )
    measured = {row["benchmark"] for row in rows if any(row[role]["measured"] for role in MODEL_NAMES)}
    of_protocols = [f"{title}: {note}" for key, (title, note) in summary["notes"].items() if note and key in measured]
    facts = [*_image_notes(summary), *of_protocols, *summary["averages_left_out"], *_not_run(summary)]
    return [*notes, "\n".join(f"- {fact}" for fact in facts)] if facts else notes


def _image_notes(summary: dict[str, Any]) -> list[str]:
    """Where the number of images is another than the published split's, and where some could not be read."""
    by_benchmark = {row["benchmark"]: row for row in summary["rows"] if row["images"] and row["test_images"]}
    return [
        f"{summary['notes'][key][0]}: {row['images']:,} images; the published split has {row['test_images']:,}."
        for key, row in by_benchmark.items()
        if row["images"] != row["test_images"]
    ] + [
        f"{m['file'].removesuffix('.json')}: {m['skipped']:,} images could not be read and are left out."
        for m in summary["measurements"]
        if m["skipped"]
    ]


def _not_run(summary: dict[str, Any]) -> list[str]:
    """Benchmarks that were not run, with the reason; of which models, where not of all."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for m in summary["measurements"]:
        if m["status"] != "measured":
            reasons.setdefault((m["benchmark"], m["reason"]), []).append(f"{m['language']}, {m['role']} {m['run']}")
    count = len({(m["role"], m["run"]) for m in summary["measurements"]})
    lines = []
    for (benchmark, reason), which in reasons.items():
        some = "" if len(which) % count == 0 else f" ({'; '.join(which)})"
        lines.append(f"{benchmark}{some}: not run: {reason.rstrip('.')}.")
    return lines
