"""Charts of measured values, and sheets of pictures with what queries find: each one PNG."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from PIL import Image

from capivara_common.files import read_json, write_bytes
from capivara_common.image_files import BadImage
from eval.records.schema import ROLE_NAMES
from eval.records.tables import to_one_line

matplotlib.use("Agg")  # files only; a screen is not needed

from matplotlib import font_manager
from matplotlib import pyplot as plt

if TYPE_CHECKING:  # a report of captions draws without it
    from torch import Tensor

BASELINE_COLOR, MODEL_COLOR, CHANCE_COLOR = "#8a8f98", "#1b7f5c", "#c9c9c9"
DIRECTION_COLORS = {"text_to_image": "#1b7f5c", "image_to_text": "#d98324"}
TEXT_COLOR, FAINT_TEXT_COLOR = "#1f2933", "#6b7280"
BARS_WIDTH_INCHES = 5.2  # inches: narrow, so that the letters stay readable on a phone
PLOT_LABELS = read_json(Path(__file__).with_name("words.json"))  # of curves and sheets, in both languages
RELEVANT_COLOR, OTHER_COLOR = "#1b7f5c", "#d0d3d8"
IMAGES_PER_QUERY, QUERIES_PER_END = 5, 4  # pictures that a model ranks first; best queries of a sheet, and worst ones
# Of a sheet of two models: sign of the difference of ranks, model minus baseline, and how many such queries are shown.
QUERY_CHANGES = {"gain": (-1, 3), "tie": (0, 1), "loss": (1, 1)}
# Matplotlib's own font has no letters of most scripts; of these, where they are installed, it takes what is missing.
FALLBACK_FONTS = ("Noto Sans", "Noto Serif", "FreeSans", "Lohit", "Nirmala UI", "Mangal", "Arial Unicode", "WenQuanYi")


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure to a PNG of 130 dots per inch, whole or not at all, and close it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")  # a text in another script
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
    write_bytes(path, file.getvalue())


def style_axis(axis: plt.Axes, grid: str, *hidden_sides: str) -> None:
    """Faint lines of a grid ("x", "y" or "both") behind what is drawn, and no frame at some sides."""
    axis.spines[list(hidden_sides)].set_visible(False)
    axis.grid(axis=grid, alpha=0.25)
    axis.set_axisbelow(True)


def plot_training_curves(curve: list[dict], language: str, path: Path, label_language: str = "en") -> None:
    """Loss and learning rate of every step, recall of the validation split, by the `curve` of run.json.

    `language` is that of the validation captions, `words` that of the labels, "pt" or another one for English.
    """
    labels = PLOT_LABELS.get(label_language, PLOT_LABELS["en"])["curves"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    trained = [point for point in curve if "loss" in point]
    left.plot([p["step"] for p in trained], [p["loss"] for p in trained], color=MODEL_COLOR)
    left.set(xlabel=labels["step"], ylabel=labels["loss"], title=labels["loss_title"])
    rate = left.twinx()
    rate.plot([p["step"] for p in trained], [p["learning_rate"] for p in trained], color=CHANCE_COLOR, linestyle="--")
    rate.set_ylabel(labels["rate"])
    rate.set_ylim(bottom=0)
    measured = [point for point in curve if "validation" in point]
    for direction, colour in DIRECTION_COLORS.items():
        values = [100 * p["validation"][direction] for p in measured]
        right.plot([p["step"] for p in measured], values, "o-", color=colour, label=labels[direction])
    right.set(xlabel=labels["step"], ylabel=labels["recall"], title=labels["recall_title"].format(language=language))
    right.legend(frameon=False)
    for axis in (left, right):
        style_axis(axis, "both", "top")
    save_figure(figure, path)


def plot_bars(pairs: list[dict[str, Any]], path: Path) -> None:
    """Baseline against model, a pair of bars a row of `pair_with_baselines` with a `short` label, a mark where chance is."""
    figure, axis = plt.subplots(figsize=(BARS_WIDTH_INCHES, 1.2 + 0.46 * len(pairs)), layout="constrained")
    for role, offset, colour in (("baseline", -0.2, BASELINE_COLOR), ("capivara", 0.2, MODEL_COLOR)):
        if found := [(height + offset, pair[role]) for height, pair in enumerate(pairs) if pair[role]]:
            heights, values = zip(*found, strict=True)
            errors = [100 * (of.deviation or 0) for of in values]
            options = {"color": colour, "ecolor": TEXT_COLOR, "label": ROLE_NAMES[role]}
            bars = axis.barh(heights, [100 * of.mean for of in values], 0.36, xerr=errors, **options)
            notes = [f" ± {error:.1f}" * bool(error) for error in errors]
            labels = [f"{100 * of.mean:.1f}{note}" for of, note in zip(values, notes, strict=True)]
            axis.bar_label(bars, labels, padding=4, fontsize=9, color=TEXT_COLOR)
    chances = [(100 * pair["chance"], height) for height, pair in enumerate(pairs) if pair["chance"] is not None]
    if chances:
        axis.plot(*zip(*chances, strict=True), "|", color=TEXT_COLOR, markersize=26, label="chance")
    axis.set_xlim(0, max(1.0, 1.3 * axis.dataLim.x1))  # room beside the longest bar
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 100])
    axis.set_yticks(range(len(pairs)), [pair["short"] for pair in pairs], parse_math=False, fontsize=9.5)  # no formulas
    axis.set_ylim(len(pairs) - 0.4, -0.6)  # the first at the top
    axis.set_xlabel("per cent", color=FAINT_TEXT_COLOR, fontsize=9)
    axis.tick_params(length=0, labelcolor=TEXT_COLOR)
    style_axis(axis, "x", "top", "right", "left")
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", markerscale=0.4, ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


RankedImages = list[
    tuple[Image.Image | None, bool]
]  # pictures, None where one can't be shown, and which is the right one


def plot_gallery(
    rows: list[list[tuple[str, RankedImages]]], path: Path, headings: Sequence[str] = (), note: str = ""
) -> None:
    """A row a query: a block a model with its title and the pictures that were found best, the right one framed."""
    columns, blocks = max(len(found) for row in rows for _, found in row), len(rows[0])
    above, below = 0.3 + 0.35 * bool(headings), 0.45 * bool(note)  # inches
    height = 1.45 * len(rows) + above + below
    installed = {font.name for font in font_manager.fontManager.ttflist}
    others = sorted(name for name in installed if name.startswith(FALLBACK_FONTS))
    with plt.rc_context({"font.family": ["DejaVu Sans", *others]}):
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
                    axis.imshow(image or Image.new("RGB", (8, 8), "#e5e7eb"))
                    # At the top of its place, so that the title above a wide one is not under the picture beside it.
                    axis.set(xticks=[], yticks=[], anchor="N")
                    for spine in axis.spines.values():
                        spine.set(color=RELEVANT_COLOR if right else OTHER_COLOR, linewidth=3.5 if right else 0.8)
                    if column == 0:
                        axis.set_title(title, loc="left", fontsize=8.5, parse_math=False)
        for block, heading in enumerate(headings):
            left = grid[0, block * (columns + 1)].get_position(figure).x0
            figure.text(left, 1 - 0.27 / height, heading, fontsize=12, weight="bold", parse_math=False)
        figure.text(0.01, 0.1 / height, note, fontsize=8.5, color=TEXT_COLOR, parse_math=False)
        save_figure(figure, path)


def select_sheet_queries(before: "Tensor", after: "Tensor", seed: int) -> list[tuple[int, str]]:
    """Queries for a sheet of two models by their ranks (queries,), and "gain", "tie" or "loss" of each, by a rule.

    Of the queries in an order that is drawn with the seed, the first three that the trained model ranks better, the
    first that it ranks alike, and the first that it ranks worse.
    """
    order, change = _random_order(len(before), seed), (after - before).sign()
    return [
        (q, kind)
        for kind, (sign, shown) in QUERY_CHANGES.items()
        for q in order[change[order] == sign][:shown].tolist()
    ]


def plot_retrieval_sheet(
    path: Path,
    open_image: Callable[[int], Image.Image],
    queries: list[str],
    embeddings: dict[str, Any],
    seed: int = 0,
    language: str = "en",
) -> None:
    """Queries, each with the five pictures that a model ranks first.

    Of two models they are those of `select_sheet_queries`; of one its best and its worst, of equal ones those drawn first, and
    beside each its right picture, too. `image` opens a picture by its index, of which none is shown where it raises
    BadImage; `embeddings` are of "baseline", "capivara" or both, as `eval.retrieval` has them.
    """
    words, rows, note = PLOT_LABELS.get(language, PLOT_LABELS["en"])["sheet"], [], ""
    ranks = {role: of_model.ranks["text_to_image"] for role, of_model in embeddings.items()}
    first, *others = ranks.values()
    if others:
        chosen = select_sheet_queries(ranks["baseline"], ranks["capivara"], seed)
        change = (ranks["capivara"] - ranks["baseline"]).sign()
        counts = {kind: int((change == sign).sum()) for kind, (sign, _) in QUERY_CHANGES.items()}
        note = words["rule"].format(seed=seed, **counts)
    else:
        order = _random_order(len(first), seed)
        order = order[first[order].argsort(stable=True)].tolist()
        chosen = [(query, "") for query in dict.fromkeys(order[:QUERIES_PER_END] + order[-QUERIES_PER_END:])]
    for query, kind in chosen:
        row = []
        for role, of_model in embeddings.items():
            scores, right = of_model.image_embeds @ of_model.text_embeds[query], int(of_model.image_of_text[query])
            best = scores.argsort(descending=True, stable=True)[:IMAGES_PER_QUERY].tolist()
            best += [] if others or right in best else [right]
            title = f"“{to_one_line(queries[query], 40)}”   {words['rank'].format(rank=int(ranks[role][query]) + 1)}"
            title += f" ({words[kind]})" if kind and role == "capivara" else ""
            found = []
            for index in best:
                try:
                    found.append((_shrink(open_image(index)), index == right))
                except BadImage:  # it has changed since it was embedded: no reason to lose what was measured
                    found.append((None, index == right))
            row.append((title, found))
        rows.append(row)
    plot_gallery(rows, path, [words[role] for role in ranks] if others else (), note)


def _shrink(image: Image.Image) -> Image.Image:
    """A copy: a photograph of 20 million pixels would be drawn at 200, and a sheet holds 48 of them."""
    image = image.convert("RGB")
    image.thumbnail((400, 400))
    return image


def _random_order(query_count: int, seed: int) -> "Tensor":
    """(queries,), in an order that is drawn."""
    import torch

    return torch.randperm(query_count, generator=torch.Generator().manual_seed(seed))
