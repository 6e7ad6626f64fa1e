"""Charts of measured values: curves, bars and gains, each one PNG."""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib

from capivara_common.files import read_json, write_bytes

matplotlib.use("Agg")  # files only; a screen is not needed

from matplotlib import pyplot as plt

BASELINE_COLOUR, MODEL_COLOUR, CHANCE_COLOUR, LOSS_COLOUR = "#8a8f98", "#1b7f5c", "#c9c9c9", "#b3472f"
DIRECTION_COLOURS = {"text_to_image": "#1b7f5c", "image_to_text": "#d98324"}
INK, FAINT = "#1f2933", "#6b7280"
WIDTH = 5.2  # inches: narrow, so that the letters stay readable on a phone
WORDS = read_json(Path(__file__).with_name("words.json"))  # of curves and sheets, in both languages


class BarRow(NamedTuple):
    """A baseline and a model, as (mean, standard deviation or None) of shares; None where one was not measured."""

    label: str
    baseline: tuple[float, float | None] | None
    model: tuple[float, float | None] | None
    chance: float | None = None


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
    labels = WORDS.get(words, WORDS["en"])["curves"]
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


def plot_bars(rows: list[BarRow], path: Path) -> None:
    """Baseline against model, a pair of bars a row, a mark where chance is."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.46 * len(rows)), layout="constrained")
    for name, offset, colour in (("Baseline", -0.2, BASELINE_COLOUR), ("CAPIVARA", 0.2, MODEL_COLOUR)):
        values = [(height + offset, row.baseline if offset < 0 else row.model) for height, row in enumerate(rows)]
        found = [(height, 100 * value[0], 100 * (value[1] or 0)) for height, value in values if value]
        if found:
            heights, means, errors = zip(*found, strict=True)
            bars = axis.barh(heights, means, 0.36, xerr=errors, color=colour, ecolor=INK, label=name)
            labels = [f"{mean:.1f}" + f" ± {error:.1f}" * bool(error) for _, mean, error in found]
            axis.bar_label(bars, labels, padding=4, fontsize=9, color=INK)
    chances = [(100 * row.chance, height) for height, row in enumerate(rows) if row.chance is not None]
    if chances:
        axis.plot(*zip(*chances, strict=True), "|", color=INK, markersize=26, label="chance")
    axis.set_xlim(0, max(1.0, 1.3 * axis.dataLim.x1))  # room beside the longest bar
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 100])
    _finish(axis, [row.label for row in rows], "per cent")
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", markerscale=0.4, ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_gains(rows: list[tuple[str, float, float, float]], path: Path) -> None:
    """Gains with their 95 % intervals, beside zero; rows of (label, gain, low end, high end), shares."""
    lines = max(label.count("\n") + 1 for label, *_ in rows)
    figure, axis = plt.subplots(figsize=(WIDTH, 1.0 + 0.38 * lines * len(rows) / 2), layout="constrained")
    axis.axvline(0, color=FAINT, linewidth=1)
    for height, (_, gain, low, high) in enumerate(rows):
        colour = BASELINE_COLOUR if low <= 0 <= high else MODEL_COLOUR if gain > 0 else LOSS_COLOUR
        axis.plot([100 * low, 100 * high], [height, height], color=colour, linewidth=2.5, solid_capstyle="round")
        axis.plot(100 * gain, height, "o", color=colour, markersize=7)
    _finish(axis, [label for label, *_ in rows], "gain in mean recall, points, with its 95 % interval")
    save_figure(figure, path)


def _finish(axis: plt.Axes, labels: list[str], what: str) -> None:
    """A label for each height, the first at the top; texts of data are no formulas."""
    axis.set_yticks(range(len(labels)), labels, parse_math=False, fontsize=9.5)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlabel(what, color=FAINT, fontsize=9)
    axis.tick_params(length=0, labelcolor=INK)
    tidy(axis, "x", "top", "right", "left")
