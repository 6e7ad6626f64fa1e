"""What the report of a selection draws: how similar captions are to their pictures, and the pictures at the cut."""

import math
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from PIL import Image

from eval.records.plots import INK, MODEL_COLOUR, draw_image, fonts, save_figure, tidy
from eval.records.tables import one_line

KEPT_COLOUR, DROPPED_COLOUR = MODEL_COLOUR, "#b9bec6"
COLUMNS = 6  # pictures side by side
LINE, LINES, LETTER = 22, 3, 8.5  # letters at most and lines of a caption; points of a letter


@dataclass(frozen=True)
class Histogram:
    """Bins of equal width over the cosines -1 to 1, of what was kept and what was dropped; `cut` lies between them."""

    title: str
    unit: str
    kept: list[int]
    dropped: list[int]
    cut: float | None


@dataclass(frozen=True)
class Example:
    """A caption near the cut, with its image, or None where that can't be shown."""

    row: int
    caption: str
    similarity: float
    image: Image.Image | None


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


def plot_examples(dropped: list[Example], kept: list[Example], path: Path) -> None:
    """A row of pictures with captions for each side of the cut, the nearest to it first."""
    rows = [("Dropped, the most similar first", DROPPED_COLOUR, dropped)] if dropped else []
    rows += [("Kept, the least similar first", KEPT_COLOUR, kept)] if kept else []
    height = 3.05 * len(rows)
    with plt.rc_context({"font.family": fonts()}):
        figure = plt.figure(figsize=(1.95 * COLUMNS, height))
        grid = figure.add_gridspec(
            len(rows), COLUMNS, left=0.01, right=0.99, wspace=0.08, hspace=0.55,
            top=1 - 0.45 / height, bottom=0.85 / height,
        )  # fmt: skip
        for number, (title, colour, found) in enumerate(rows):
            for column, example in enumerate(found[:COLUMNS]):
                axis = figure.add_subplot(grid[number, column])
                draw_image(axis, example.image, colour, 2.5)
                _write_caption(axis, example)
                if column == 0:
                    axis.set_title(title, loc="left", fontsize=11, color=INK)
        save_figure(figure, path)


def _write_caption(axis: plt.Axes, example: Example) -> None:
    lines = _wrapped(one_line(example.caption, 2 * LINE * LINES), axis)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1] + "…"]
    label = f"{example.similarity:.3f}\n" + "\n".join(lines)
    axis.set_xlabel(label, fontsize=LETTER, color=INK, parse_math=False)


def _wrapped(text: str, axis: plt.Axes) -> list[str]:
    """Lines that are no wider than the picture above them: signs of Chinese are twice as wide as Latin letters."""
    renderer, font = axis.figure.canvas.get_renderer(), font_manager.FontProperties(size=LETTER)
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        for letters in range(LINE, 0, -1):
            lines = textwrap.wrap(text, letters)
            widths = [renderer.get_text_width_height_descent(line, font, False)[0] for line in lines]
            if max(widths, default=0) <= axis.get_window_extent().width:
                break
    return lines
