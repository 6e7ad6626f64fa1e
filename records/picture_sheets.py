"""Sheets of pictures with texts: what queries find, and captions at the cut of a selection, each one PNG."""

import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import font_manager
from matplotlib import pyplot as plt
from PIL import Image

from records.plots import DROPPED_COLOUR, INK, KEPT_COLOUR, save_figure
from records.tables import one_line

if TYPE_CHECKING:  # a report of captions draws without it
    from torch import Tensor

RIGHT_COLOUR, WRONG_COLOUR = "#1b7f5c", "#d0d3d8"
SHOWN = 5  # pictures that a model ranks first
KINDS = {"gain": 3, "tie": 1, "loss": 1}  # how many queries of a sheet the trained model ranks better, alike, worse
SHEET_WORDS = {
    "en": {
        "baseline": "Baseline",
        "capivara": "CAPIVARA",
        "rank": "right one at rank {rank}",
        "gain": "gain",
        "tie": "tie",
        "loss": "loss",
        "rule": "Chosen by rule: of the test captions, in an order drawn with seed {seed}, the first three that "
        "CAPIVARA ranks better than the baseline,\nthe first that it ranks alike and the first that it ranks worse; "
        "fewer where there are none. All captions: {gain} gains, {tie} ties, {loss} losses.",
    },
    "pt": {
        "baseline": "Base",
        "capivara": "CAPIVARA",
        "rank": "acerto na posição {rank}",
        "gain": "ganho",
        "tie": "empate",
        "loss": "perda",
        "rule": "Escolha por regra: das legendas de teste, em ordem sorteada com a semente {seed}, as três primeiras "
        "em que o CAPIVARA supera o modelo base,\na primeira em que empata e a primeira em que perde; menos, se não "
        "houver. Todas as legendas: {gain} ganhos, {tie} empates, {loss} perdas.",
    },
}
COLUMNS = 6  # pictures side by side
LINE, LINES, LETTER = 22, 3, 8.5  # letters at most and lines of a caption; points of a letter
# Matplotlib's own font has no letters of most scripts; of these, where they are installed, it takes what is missing.
OTHER_FONTS = ("Noto Sans", "Noto Serif", "FreeSans", "Lohit", "Nirmala UI", "Mangal", "Arial Unicode", "WenQuanYi")

Found = list[tuple[Image.Image | None, bool]]  # pictures, None where one can't be shown, and which is the right one


@dataclass(frozen=True)
class Example:
    """A caption near the cut, with its image, or None where that can't be shown."""

    row: int
    caption: str
    similarity: float
    image: Image.Image | None


def plot_gallery(rows: list[list[tuple[str, Found]]], path: Path, headings: Sequence[str] = (), note: str = "") -> None:
    """A row a query: a block a model with its title and the pictures that were found best, the right one framed."""
    columns, blocks = max(len(found) for row in rows for _, found in row), len(rows[0])
    above, below = 0.3 + 0.35 * bool(headings), 0.45 * bool(note)  # inches
    height = 1.45 * len(rows) + above + below
    with plt.rc_context({"font.family": _fonts()}):
        figure = plt.figure(figsize=(1.3 * columns * blocks + 0.3 * (blocks - 1), height))
        grid = figure.add_gridspec(
            len(rows), columns * blocks + blocks - 1, wspace=0.08, hspace=0.3, left=0.01, right=0.99,
            width_ratios=([1] * columns + [0.25]) * (blocks - 1) + [1] * columns,
            top=1 - above / height, bottom=max(0.01, below / height),
        )  # fmt: skip
        for number, row in enumerate(rows):
            for block, (title, found) in enumerate(row):
                for column, (image, right) in enumerate(found):
                    axis = figure.add_subplot(grid[number, block * (columns + 1) + column])
                    _draw_image(axis, image, RIGHT_COLOUR if right else WRONG_COLOUR, 3.5 if right else 0.8)
                    if column == 0:
                        axis.set_title(title, loc="left", fontsize=8.5, parse_math=False)
        for block, heading in enumerate(headings):
            left = grid[0, block * (columns + 1)].get_position(figure).x0
            figure.text(left, 1 - 0.27 / height, heading, fontsize=12, weight="bold", parse_math=False)
        figure.text(0.01, 0.1 / height, note, fontsize=8.5, color=INK, parse_math=False)
        save_figure(figure, path)


def sheet_queries(before: "Tensor", after: "Tensor", seed: int) -> list[tuple[int, str]]:
    """Queries for a sheet of two models, and of which kind each is, chosen by a rule and not by how they look.

    Of the queries in an order that is drawn with the seed, the first three that the trained model ranks better, the
    first that it ranks alike, and the first that it ranks worse; fewer of a kind where there are fewer.

    Args:
        before: (queries,), rank of each query's right image under the baseline.
        after: (queries,), the same under the trained model.
        seed: of the draw.

    Returns:
        (index of the query, "gain", "tie" or "loss"), gains first.
    """
    import torch

    order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))
    of_kind = _kinds((after - before)[order])
    return [(query, kind) for kind, count in KINDS.items() for query in order[of_kind[kind]][:count].tolist()]


def _kinds(change: "Tensor") -> "dict[str, Tensor]":
    """Which queries are of a kind, by the difference of their ranks."""
    return {"gain": change < 0, "tie": change == 0, "loss": change > 0}


def plot_retrieval_sheet(
    images: list[Image.Image],
    queries: list[str],
    right_images: Sequence[int],
    scores: "Callable[[str, int], Tensor]",
    ranks: dict[str, "Tensor"],
    seed: int,
    language: str,
    path: Path,
) -> None:
    """The queries of `sheet_queries`, each with the five pictures that either model ranks first.

    Args:
        images: the pool that is searched.
        queries: all texts.
        right_images: (queries,), the index of the image of each in the pool.
        scores: of "baseline" or "capivara" and a query -> (images,), similarities.
        ranks: "baseline" and "capivara" -> (queries,), rank of the right image from 0.
        seed: of the draw of queries.
        language: of the labels, "pt" or another one for English.
        path: the PNG.
    """
    words, rows = SHEET_WORDS.get(language, SHEET_WORDS["en"]), []
    for query, kind in sheet_queries(ranks["baseline"], ranks["capivara"], seed):
        row = []
        for role in ("baseline", "capivara"):
            best = scores(role, query).argsort(descending=True, stable=True)[:SHOWN].tolist()
            rank = words["rank"].format(rank=int(ranks[role][query]) + 1)
            title = f"“{one_line(queries[query], 40)}”   {rank}" + f" ({words[kind]})" * (role == "capivara")
            row.append((title, [(images[index], index == right_images[query]) for index in best]))
        rows.append(row)
    counts = {kind: int(of.sum()) for kind, of in _kinds(ranks["capivara"] - ranks["baseline"]).items()}
    note = words["rule"].format(seed=seed, **counts)
    plot_gallery(rows, path, [words["baseline"], words["capivara"]], note)


def plot_examples(dropped: list[Example], kept: list[Example], path: Path) -> None:
    """A row of pictures with captions for each side of the cut, the nearest to it first."""
    rows = [("Dropped, the most similar first", DROPPED_COLOUR, dropped)] if dropped else []
    rows += [("Kept, the least similar first", KEPT_COLOUR, kept)] if kept else []
    height = 3.05 * len(rows)
    with plt.rc_context({"font.family": _fonts()}):
        figure = plt.figure(figsize=(1.95 * COLUMNS, height))
        grid = figure.add_gridspec(
            len(rows), COLUMNS, left=0.01, right=0.99, wspace=0.08, hspace=0.55,
            top=1 - 0.45 / height, bottom=0.85 / height,
        )  # fmt: skip
        for number, (title, colour, found) in enumerate(rows):
            for column, example in enumerate(found[:COLUMNS]):
                axis = figure.add_subplot(grid[number, column])
                _draw_image(axis, example.image, colour, 2.5)
                _write_caption(axis, example)
                if column == 0:
                    axis.set_title(title, loc="left", fontsize=11, color=INK)
        save_figure(figure, path)


def _draw_image(axis: plt.Axes, image: Image.Image | None, colour: str, width: float) -> None:
    image = (image or Image.new("RGB", (8, 8), "#e5e7eb")).convert("RGB")
    image.thumbnail((400, 400))  # a photograph of 20 million pixels would be drawn at 200
    axis.imshow(image)
    # At the top of its place, so that the title above a wide one is not under the picture beside it.
    axis.set(xticks=[], yticks=[], anchor="N")
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=width)


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


def _fonts() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *sorted(name for name in installed if name.startswith(OTHER_FONTS))]
