"""Sheets of pictures with texts: what queries find, each one PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import font_manager
from matplotlib import pyplot as plt
from PIL import Image

from eval.records.plots import INK, WORDS, save_figure
from eval.records.tables import one_line

if TYPE_CHECKING:  # a report of captions draws without it
    from torch import Tensor

RIGHT_COLOUR, WRONG_COLOUR = "#1b7f5c", "#d0d3d8"
SHOWN, BEST = 5, 4  # pictures that a model ranks first; best queries of a sheet, and worst ones
KINDS = {"gain": 3, "tie": 1, "loss": 1}  # how many queries of a sheet the trained model ranks better, alike, worse
# Matplotlib's own font has no letters of most scripts; of these, where they are installed, it takes what is missing.
OTHER_FONTS = ("Noto Sans", "Noto Serif", "FreeSans", "Lohit", "Nirmala UI", "Mangal", "Arial Unicode", "WenQuanYi")

Found = list[tuple[Image.Image | None, bool]]  # pictures, None where one can't be shown, and which is the right one


def plot_gallery(rows: list[list[tuple[str, Found]]], path: Path, headings: Sequence[str] = (), note: str = "") -> None:
    """A row a query: a block a model with its title and the pictures that were found best, the right one framed."""
    columns, blocks = max(len(found) for row in rows for _, found in row), len(rows[0])
    above, below = 0.3 + 0.35 * bool(headings), 0.45 * bool(note)  # inches
    height = 1.45 * len(rows) + above + below
    with plt.rc_context({"font.family": fonts()}):
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
                    draw_image(axis, image, RIGHT_COLOUR if right else WRONG_COLOUR, 3.5 if right else 0.8)
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
    order = _drawn(len(before), seed)
    of_kind = _kinds((after - before)[order])
    return [(query, kind) for kind, count in KINDS.items() for query in order[of_kind[kind]][:count].tolist()]


def plot_retrieval_sheet(
    images: Sequence[Image.Image] | Callable[[int], Image.Image],
    queries: list[str],
    right_images: Sequence[int],
    scores: "Callable[[str, int], Tensor]",
    ranks: dict[str, "Tensor"],
    seed: int,
    language: str,
    path: Path,
) -> None:
    """Queries, each with the five pictures that a model ranks first.

    Of two models they are those of `sheet_queries`; of one its best and its worst, of equal ones those drawn first, and
    beside each its right picture, too.

    Args:
        images: the pool that is searched, or what opens one of them by its index.
        queries: all texts.
        right_images: (queries,), the index of the image of each in the pool.
        scores: of "baseline" or "capivara" and a query -> (images,), similarities.
        ranks: "baseline", "capivara" or both -> (queries,), rank of the right image from 0.
        seed: of the draw of queries.
        language: of the labels, "pt" or another one for English.
        path: the PNG.
    """
    words, rows, note, (first, *others) = WORDS.get(language, WORDS["en"])["sheet"], [], "", ranks.values()
    image = images if callable(images) else images.__getitem__
    if others:
        chosen = sheet_queries(ranks["baseline"], ranks["capivara"], seed)
        counts = {kind: int(of.sum()) for kind, of in _kinds(ranks["capivara"] - ranks["baseline"]).items()}
        note = words["rule"].format(seed=seed, **counts)
    else:
        order = _drawn(len(first), seed)
        order = order[first[order].argsort(stable=True)].tolist()
        chosen = [(query, "") for query in dict.fromkeys(order[:BEST] + order[-BEST:])]
    for query, kind in chosen:
        row = []
        for role, of_model in ranks.items():
            best = scores(role, query).argsort(descending=True, stable=True)[:SHOWN].tolist()
            best += [] if others or right_images[query] in best else [right_images[query]]
            title = f"“{one_line(queries[query], 40)}”   {words['rank'].format(rank=int(of_model[query]) + 1)}"
            title += f" ({words[kind]})" if kind and role == "capivara" else ""
            row.append((title, [(image(index), index == right_images[query]) for index in best]))
        rows.append(row)
    plot_gallery(rows, path, [words[role] for role in ranks] if others else (), note)


def _drawn(queries: int, seed: int) -> "Tensor":
    """(queries,), in an order that is drawn."""
    import torch

    return torch.randperm(queries, generator=torch.Generator().manual_seed(seed))


def _kinds(change: "Tensor") -> "dict[str, Tensor]":
    """Which queries are of a kind, by the difference of their ranks."""
    return {"gain": change < 0, "tie": change == 0, "loss": change > 0}


def draw_image(axis: plt.Axes, image: Image.Image | None, colour: str, width: float) -> None:
    """A picture in a frame of a colour and width, grey where there is none."""
    image = (image or Image.new("RGB", (8, 8), "#e5e7eb")).convert("RGB")
    image.thumbnail((400, 400))  # a photograph of 20 million pixels would be drawn at 200
    axis.imshow(image)
    # At the top of its place, so that the title above a wide one is not under the picture beside it.
    axis.set(xticks=[], yticks=[], anchor="N")
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=width)


def fonts() -> list[str]:
    """Those of this machine that have the letters of more scripts, for `font.family`."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *sorted(name for name in installed if name.startswith(OTHER_FONTS))]
