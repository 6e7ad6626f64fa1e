"""The two pictures of a selection's report."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import PIL.Image

from common.files import write_bytes

matplotlib.use("Agg")  # files only; a screen is not needed

from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

KEPT_COLOUR, DROPPED_COLOUR, INK, FAINT = "#1b7f5c", "#b9bec6", "#1f2933", "#6b7280"
COLUMNS = 6  # pictures side by side
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ue000-\uf8ff]")
LINE, LINES, LETTER = 22, 3, 8.5  # letters at most and lines of a caption; points of a letter
# Matplotlib's own font has no letters of most scripts; of these, where they are installed, it takes what is missing.
OTHER_FONTS = ("Noto Sans", "Noto Serif", "FreeSans", "Lohit", "Nirmala UI", "Mangal", "Arial Unicode", "WenQuanYi")


@dataclass(frozen=True)
class Histogram:
    """Bins of equal width over the cosines -1 to 1, of what was kept and what was dropped."""

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
    image: PIL.Image.Image | None


def plot_similarities(histograms: list[Histogram], path: Path) -> None:
    """Kept over dropped, stacked, with the cut as a line; a panel a histogram.

    Args:
        histograms: at least one, none of them all zero.
        path: the PNG.
    """
    figure, axes = plt.subplots(
        1, len(histograms), figsize=(6 * len(histograms), 3.8), layout="constrained", squeeze=False
    )
    for axis, histogram in zip(axes[0], histograms, strict=True):
        bins = len(histogram.kept)
        used = [place for place in range(bins) if histogram.kept[place] or histogram.dropped[place]]
        left, right = max(used[0] - 2, 0), min(used[-1] + 3, bins)
        step = max(1, math.ceil((right - left) / 60))  # wider bars where the values are far apart
        starts = range(left - left % step, right, step)
        edges = [2 * place / bins - 1 for place in starts]
        kept, dropped = ([sum(side[place : place + step]) for place in starts] for side in _sides(histogram))
        bar = {"width": 2 * step / bins, "align": "edge"}
        axis.bar(edges, dropped, color=DROPPED_COLOUR, label=f"dropped: {sum(dropped):,}", **bar)
        axis.bar(edges, kept, bottom=dropped, color=KEPT_COLOUR, label=f"kept: {sum(kept):,}", **bar)
        if histogram.cut is not None:
            axis.axvline(histogram.cut, color=INK, linewidth=1.2, linestyle="--", label=f"cut: {histogram.cut:g}")
        axis.set(title=histogram.title, xlabel="similarity of image and caption (cosine)", ylabel=histogram.unit)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))  # no bar is below
    _save(figure, path)


def plot_examples(dropped: list[Example], kept: list[Example], path: Path) -> None:
    """A row of pictures with captions for each side of the cut.

    Args:
        dropped: the nearest to the cut first.
        kept: likewise.
        path: the PNG.
    """
    rows = [
        (title, colour, found)
        for title, colour, found in (
            ("Dropped, the most similar first", DROPPED_COLOUR, dropped),
            ("Kept, the least similar first", KEPT_COLOUR, kept),
        )
        if found
    ]
    with plt.rc_context({"font.family": _fonts()}):
        figure = plt.figure(figsize=(1.95 * COLUMNS, 3.05 * len(rows)))
        grid = figure.add_gridspec(
            len(rows), COLUMNS, left=0.01, right=0.99, wspace=0.08, hspace=0.55,
            top=1 - 0.45 / (3.05 * len(rows)), bottom=0.85 / (3.05 * len(rows)),
        )  # fmt: skip
        for number, (title, colour, found) in enumerate(rows):
            for column, example in enumerate(found[:COLUMNS]):
                axis = figure.add_subplot(grid[number, column])
                _draw(axis, example, colour)
                if column == 0:
                    axis.set_title(title, loc="left", fontsize=11, color=INK)
        _save(figure, path)


def one_line(text: str, most: int) -> str:
    """A text of the data without line breaks, controls and marks that turn it around, cut to `most` letters."""
    text = "".join(letter for letter in " ".join(text[: 2 * most].split()) if not CONTROLS.match(letter))
    return text if len(text) <= most else text[: most - 1] + "…"


def _draw(axis: plt.Axes, example: Example, colour: str) -> None:
    image = example.image or PIL.Image.new("RGB", (8, 8), "#e5e7eb")
    image = image.convert("RGB")
    image.thumbnail((400, 400))  # a photograph of 20 million pixels would be drawn at 200
    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2.5)
    lines = _wrapped(one_line(example.caption, 2 * LINE * LINES), axis)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1] + "…"]
    label = f"{example.similarity:.3f}\n" + "\n".join(lines)
    axis.set_xlabel(label, fontsize=LETTER, color=INK, parse_math=False)


def _wrapped(text: str, axis: plt.Axes) -> list[str]:
    """Lines that are no wider than the picture above them: signs of Chinese are twice as wide as Latin letters."""
    renderer, font = axis.figure.canvas.get_renderer(), font_manager.FontProperties(size=LETTER)
    lines: list[str] = []
    with _missing_glyphs_ignored():
        for letters in range(LINE, 0, -1):
            lines = textwrap.wrap(text, letters)
            widths = [renderer.get_text_width_height_descent(line, font, False)[0] for line in lines]
            if max(widths, default=0) <= axis.get_window_extent().width:
                break
    return lines


def _sides(histogram: Histogram) -> tuple[list[int], list[int]]:
    return histogram.kept, histogram.dropped


def _fonts() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *sorted(name for name in installed if name.startswith(OTHER_FONTS))]


def _save(figure: plt.Figure, path: Path) -> None:
    file = io.BytesIO()
    with _missing_glyphs_ignored():
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
    write_bytes(path, file.getvalue())


@contextmanager
def _missing_glyphs_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")  # a caption in another script
        yield
