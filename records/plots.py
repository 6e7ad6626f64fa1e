"""Charts of measured figures: curves, bars, gains and histograms, each one PNG."""

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from capivara_common.files import write_bytes
from records.tables import points

matplotlib.use("Agg")  # files only; a screen is not needed

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

BASELINE_COLOUR, MODEL_COLOUR, CHANCE_COLOUR, LOSS_COLOUR = "#8a8f98", "#1b7f5c", "#c9c9c9", "#b3472f"
DIRECTION_COLOURS = {"text_to_image": "#1b7f5c", "image_to_text": "#d98324"}
KEPT_COLOUR, DROPPED_COLOUR, INK, FAINT = MODEL_COLOUR, "#b9bec6", "#1f2933", "#6b7280"
REPORT_WIDTH = 5.2  # inches: narrow, so that the letters stay readable on a phone
CURVE_WORDS = {
    "en": {
        "step": "step",
        "loss": "contrastive loss (nats; axis cut)",
        "loss_title": "Training loss",
        "rate": "learning rate (dashed)",
        "recall": "mean recall (%; axis cut)",
        "recall_title": "Validation concepts, captions in '{language}'",
        "text_to_image": "text to image",
        "image_to_text": "image to text",
    },
    "pt": {
        "step": "passo",
        "loss": "perda contrastiva (nats; eixo cortado)",
        "loss_title": "Perda no treinamento",
        "rate": "taxa de aprendizado (tracejada)",
        "recall": "revocação média (%; eixo cortado)",
        "recall_title": "Conceitos de validação, legendas em '{language}'",
        "text_to_image": "texto para imagem",
        "image_to_text": "imagem para texto",
    },
}


@dataclass(frozen=True)
class BarRow:
    """A baseline and a model, as (mean, standard deviation or None) of shares; None where one was not measured."""

    label: str
    baseline: tuple[float, float | None] | None
    model: tuple[float, float | None] | None
    chance: float | None = None


@dataclass(frozen=True)
class Histogram:
    """Bins of equal width over the cosines -1 to 1, of what was kept and what was dropped; `cut` lies between them."""

    title: str
    unit: str
    kept: list[int]
    dropped: list[int]
    cut: float | None


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure to a PNG of 130 dots per inch, whole or not at all, and close it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")  # a text in another script
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
    write_bytes(path, file.getvalue())


def tidy(axis: plt.Axes, grid: str, *bare_sides: str) -> None:
    """Faint lines of a grid ("x", "y" or "both") behind what is drawn, and no frame at some sides."""
    axis.spines[list(bare_sides)].set_visible(False)
    axis.grid(axis=grid, alpha=0.25)
    axis.set_axisbelow(True)


def plot_training_curves(curve: list[dict], language: str, path: Path, words: str = "en") -> None:
    """Loss and learning rate of every step, recall of the validation split.

    Args:
        curve: of `run.json`: an entry a step with `step`, `loss`, `learning_rate` and, where the split was measured,
            `validation`: direction -> mean recall.
        language: of the validation captions.
        path: the PNG.
        words: language of the labels, "pt" or another one for English.
    """
    labels = CURVE_WORDS.get(words, CURVE_WORDS["en"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    trained = [point for point in curve if "loss" in point]
    left.plot([p["step"] for p in trained], [p["loss"] for p in trained], color=MODEL_COLOUR)
    left.set(xlabel=labels["step"], ylabel=labels["loss"], title=labels["loss_title"])
    rate = left.twinx()
    rate.plot([p["step"] for p in trained], [p["learning_rate"] for p in trained], color=CHANCE_COLOUR, linestyle="--")
    rate.set_ylabel(labels["rate"])
    rate.set_ylim(bottom=0)
    measured = [point for point in curve if "validation" in point]
    for direction, colour in DIRECTION_COLOURS.items():
        values = [100 * p["validation"][direction] for p in measured]
        right.plot([p["step"] for p in measured], values, "o-", color=colour, label=labels[direction])
    right.set(xlabel=labels["step"], ylabel=labels["recall"], title=labels["recall_title"].format(language=language))
    right.legend(frameon=False)
    for axis in (left, right):
        tidy(axis, "both", "top")
    save_figure(figure, path)


def plot_similarities(histograms: list[Histogram], path: Path) -> None:
    """Kept over dropped, stacked, with the cut as a line; a panel a histogram, none all zero, as wide as its values."""
    size = (6 * len(histograms), 3.8)
    figure, axes = plt.subplots(1, len(histograms), figsize=size, layout="constrained", squeeze=False)
    for axis, histogram in zip(axes[0], histograms, strict=True):
        bins = len(histogram.kept)
        used = [number for number in range(bins) if histogram.kept[number] or histogram.dropped[number]]
        left, right = max(used[0] - 2, 0), min(used[-1] + 3, bins)
        step = max(1, math.ceil((right - left) / 60))  # wider bars where the values are far apart
        starts = range(left - left % step, right, step)
        edges = [2 * start / bins - 1 for start in starts]
        kept, dropped = (
            [sum(side[start : start + step]) for start in starts] for side in (histogram.kept, histogram.dropped)
        )
        bar = {"width": 2 * step / bins, "align": "edge"}
        axis.bar(edges, dropped, color=DROPPED_COLOUR, label=f"dropped: {sum(dropped):,}", **bar)
        axis.bar(edges, kept, bottom=dropped, color=KEPT_COLOUR, label=f"kept: {sum(kept):,}", **bar)
        if histogram.cut is not None:
            axis.axvline(histogram.cut, color=INK, linewidth=1.2, linestyle="--", label=f"cut: {histogram.cut:g}")
        axis.set(
            title=histogram.title,
            xlabel="similarity of image and caption (cosine, lowest to highest)",
            ylabel=histogram.unit,
        )
        tidy(axis, "y", "top", "right")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))  # no bar is below
    save_figure(figure, path)


def plot_bars(rows: list[BarRow], path: Path) -> None:
    """Baseline against model, a pair of bars a row, their difference in points at the right."""
    figure, axis = plt.subplots(figsize=(REPORT_WIDTH, 1.2 + 0.46 * len(rows)), layout="constrained")
    drawn = list(enumerate(rows))
    for name, offset, colour in (("baseline", -0.2, BASELINE_COLOUR), ("model", 0.2, MODEL_COLOUR)):
        found = [(height, getattr(row, name)) for height, row in drawn if getattr(row, name)]
        heights, means = [height + offset for height, _ in found], [100 * value[0] for _, value in found]
        errors = [100 * (value[1] or 0) for _, value in found]
        bars = axis.barh(heights, means, 0.36, color=colour)
        axis.errorbar(means, heights, xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
        labels = [f"{mean:.1f}" + f" ± {error:.1f}" * bool(error) for mean, error in zip(means, errors, strict=True)]
        for bar, label, error in zip(bars, labels, errors, strict=True):
            end = (bar.get_width() + error, bar.get_y() + bar.get_height() / 2)
            axis.annotate(label, end, (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    for height, row in drawn:
        if row.chance is not None:
            axis.plot([100 * row.chance] * 2, [height - 0.42, height + 0.42], color=INK, linewidth=1.1)
    _difference_column(axis, drawn)
    ends = [100 * (v[0] + (v[1] or 0)) for _, row in drawn for v in (row.baseline, row.model) if v]
    highest = max([*ends, *(100 * row.chance for _, row in drawn if row.chance is not None)], default=1)
    spread = any(v[1] for _, row in drawn for v in (row.baseline, row.model) if v)
    axis.set_xlim(0, max(1.0, min(highest, 100)) * (1.42 if spread else 1.22))  # room beside the longest bar
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 100])
    axis.set_yticks([height for height, _ in drawn], [row.label for _, row in drawn], parse_math=False, fontsize=10)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("per cent", color=FAINT, fontsize=9)
    axis.tick_params(length=0, labelcolor=INK)
    tidy(axis, "x", "top", "right", "left")
    _bar_legend(figure, rows)
    save_figure(figure, path)


def plot_gains(rows: list[tuple[str, float, float, float]], path: Path) -> None:
    """Gains with their 95 % intervals, beside zero; rows of (label, gain, low end, high end), shares."""
    lines = max(label.count("\n") + 1 for label, *_ in rows)
    figure, axis = plt.subplots(figsize=(REPORT_WIDTH, 1.0 + 0.38 * lines * len(rows) / 2), layout="constrained")
    axis.axvline(0, color=FAINT, linewidth=1)
    for height, (_, gain, low, high) in enumerate(rows):
        colour = BASELINE_COLOUR if low <= 0 <= high else MODEL_COLOUR if gain > 0 else LOSS_COLOUR
        axis.plot([100 * low, 100 * high], [height, height], color=colour, linewidth=2.5, solid_capstyle="round")
        axis.plot(100 * gain, height, "o", color=colour, markersize=7)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows], parse_math=False, fontsize=9.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("gain in mean recall, points, with its 95 % interval", color=FAINT, fontsize=9)
    axis.tick_params(length=0, labelcolor=INK)
    tidy(axis, "x", "top", "right", "left")
    save_figure(figure, path)


def _bar_legend(figure: plt.Figure, rows: list[BarRow]) -> None:
    """Of what occurs in the rows."""
    mark = Line2D([], [], color=INK, marker="|", markersize=11, linestyle="none")
    entries = [
        ("Baseline", Patch(color=BASELINE_COLOUR), any(row.baseline for row in rows)),
        ("CAPIVARA", Patch(color=MODEL_COLOUR), any(row.model for row in rows)),
        ("chance", mark, any(row.chance is not None for row in rows)),
    ]
    names, handles = zip(*[(name, handle) for name, handle, occurs in entries if occurs], strict=True)
    figure.legend(handles, names, loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def _difference_column(axis: plt.Axes, drawn: list[tuple[int, BarRow]]) -> None:
    """Model minus baseline of every row that has both, right of the axes."""
    both = [(height, row.model[0] - row.baseline[0]) for height, row in drawn if row.model and row.baseline]
    style = {"xycoords": axis.get_yaxis_transform(), "annotation_clip": False, "va": "center", "fontsize": 9.5}
    for height, difference in both:
        rounded = round(100 * difference, 1)
        colour = MODEL_COLOUR if rounded > 0 else LOSS_COLOUR if rounded < 0 else FAINT
        axis.annotate(points(difference), (1.02, height), color=colour, weight="bold", **style)
    if both:
        axis.annotate("points", (1.02, -0.75), color=FAINT, **(style | {"fontsize": 8}))
