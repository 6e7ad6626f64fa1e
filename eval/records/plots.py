"""Draw PNG files: charts of measured values, and sheets of example queries.

A sheet is a grid of images with a row per query. It shows the images that a model ranks first for each query.
"""

import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from PIL import Image

from capivara_common.files import read_json, write_bytes
from capivara_common.image_files import BadImage
from eval.records.result_files import ROLE_NAMES
from eval.records.tables import make_short_plain_line

# The backend "Agg" only draws into files, so it also works on a machine without a screen.
matplotlib.use("Agg")

from matplotlib import font_manager
from matplotlib import pyplot as plt

# Only type checkers need this import. It is skipped at run time, because importing torch would make reports slow.
if TYPE_CHECKING:
    from torch import Tensor

BASELINE_COLOR = "#8a8f98"
MODEL_COLOR = "#1b7f5c"
CHANCE_COLOR = "#c9c9c9"
DIRECTION_COLORS = {"text_to_image": "#1b7f5c", "image_to_text": "#d98324"}
TEXT_COLOR = "#1f2933"
FAINT_TEXT_COLOR = "#6b7280"
# Width of bar charts. On a phone, a web page shrinks a wide chart; with this width, the text stays readable.
BARS_WIDTH_INCHES = 5.2
# Labels of training curves and of sheets with example queries, in English and Portuguese.
PLOT_LABELS = read_json(Path(__file__).with_name("words.json"))
RELEVANT_COLOR = "#1b7f5c"  # frame of the image that the query describes
OTHER_COLOR = "#d0d3d8"  # frame of all other images
IMAGES_PER_QUERY = 5  # number of highest-scored images that a sheet shows for a query
QUERIES_PER_END = 4  # number of best queries, and also of worst queries, on the sheet of one model
# Queries on a sheet that compares a model with a baseline: {kind of change: (sign of the model's rank minus the
# baseline's rank, number of queries to show)}. The best rank is 0, so a gain has the sign -1.
QUERY_CHANGES = {"gain": (-1, 3), "tie": (0, 1), "loss": (1, 1)}
# Matplotlib's default font lacks most scripts. It takes missing letters from these fonts if they are installed.
FALLBACK_FONTS = ("Noto Sans", "Noto Serif", "FreeSans", "Lohit", "Nirmala UI", "Mangal", "Arial Unicode", "WenQuanYi")


def save_png_and_close_figure(figure: plt.Figure, path: Path) -> None:
    """Write a matplotlib figure to a PNG file with 130 dots per inch, and close the figure. The write is atomic."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # If no installed font has the letters of a script, matplotlib warns about each of them. The charts are still
        # useful, so these warnings are hidden.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
    write_bytes(path, file.getvalue())


def draw_grid_and_hide_frame(axis: plt.Axes, grid: str, *hidden_sides: str) -> None:
    """Draw a faint grid behind the data of a plot, and hide the frame on some sides.

    Args:
        axis: Axes of the plot.
        grid: Axis whose ticks get grid lines: "x", "y" or "both".
        hidden_sides: Sides of the plot that get no frame: "top", "right", "bottom" or "left".
    """
    axis.spines[list(hidden_sides)].set_visible(False)
    axis.grid(axis=grid, alpha=0.25)
    axis.set_axisbelow(True)


def plot_training_curves(curve: list[dict], language: str, path: Path, label_language: str = "en") -> None:
    """Plot the curves of a training run: loss and learning rate on the left, validation recall on the right.

    Args:
        curve: The list `curve` of a run.json file, with one dict per step. Training steps have `step`, `loss` and
            `learning_rate`. Evaluations have `validation`, a dict `{search direction: mean recall}`, from 0 to 1.
        language: Language code of the validation captions.
        path: PNG file to write.
        label_language: Language of the labels, "pt" or "en"; any other is treated as "en".
    """
    labels = PLOT_LABELS.get(label_language, PLOT_LABELS["en"])["curves"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    trained = [point for point in curve if "loss" in point]
    left.plot([p["step"] for p in trained], [p["loss"] for p in trained], color=MODEL_COLOR)
    left.set(xlabel=labels["step"], ylabel=labels["loss"], title=labels["loss_title"])
    rate = left.twinx()
    rate.plot([p["step"] for p in trained], [p["learning_rate"] for p in trained], color=CHANCE_COLOR, linestyle="--")
    rate.set(ylabel=labels["rate"], ylim=(0, None))
    measured = [point for point in curve if "validation" in point]
    for direction, color in DIRECTION_COLORS.items():
        values = [100 * p["validation"][direction] for p in measured]
        right.plot([p["step"] for p in measured], values, "o-", color=color, label=labels[direction])
    right.set(xlabel=labels["step"], ylabel=labels["recall"], title=labels["recall_title"].format(language=language))
    right.legend(frameon=False)
    for axis in (left, right):
        draw_grid_and_hide_frame(axis, "both", "top")
    save_png_and_close_figure(figure, path)


def plot_baseline_and_model_bars(pairs: list[dict[str, Any]], path: Path) -> None:
    """Plot the results of baseline and trained model as horizontal bars next to each other, in percent.

    A dark mark shows the chance level, the result that random scores would reach.

    Args:
        pairs: Comparisons of baseline and model, from `pair_with_baselines`. Each also needs the key "short", the label
            of its two bars.
        path: PNG file to write.
    """
    figure, axis = plt.subplots(figsize=(BARS_WIDTH_INCHES, 1.2 + 0.46 * len(pairs)), layout="constrained")
    for role, offset, color in (("baseline", -0.2, BASELINE_COLOR), ("capivara", 0.2, MODEL_COLOR)):
        heights = [height + offset for height, pair in enumerate(pairs) if pair[role]]
        if heights:
            values = [pair[role] for pair in pairs if pair[role]]
            errors = [100 * (value.deviation or 0) for value in values]
            options = {"color": color, "ecolor": TEXT_COLOR, "label": ROLE_NAMES[role]}
            bars = axis.barh(heights, [100 * value.mean for value in values], 0.36, xerr=errors, **options)
            notes = [f" ± {error:.1f}" if error else "" for error in errors]
            labels = [f"{100 * value.mean:.1f}{note}" for value, note in zip(values, notes, strict=True)]
            axis.bar_label(bars, labels, padding=4, fontsize=9, color=TEXT_COLOR)
    chances = [(100 * pair["chance"], height) for height, pair in enumerate(pairs) if pair["chance"] is not None]
    if chances:
        axis.plot(*zip(*chances, strict=True), "|", color=TEXT_COLOR, markersize=26, label="chance")
    # The label of a bar is to the right of the bar. To leave room for it, the axis is 30 % longer than the longest bar.
    axis.set_xlim(0, max(1.0, 1.3 * axis.dataLim.x1))
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 100])
    # With parse_math=False, a $ in a label is shown as it is. Otherwise it would start a formula.
    axis.set_yticks(range(len(pairs)), [pair["short"] for pair in pairs], parse_math=False, fontsize=9.5)
    # The limits are in descending order, so that the first pair is at the top of the chart instead of the bottom.
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    axis.set_xlabel("percent", color=FAINT_TEXT_COLOR, fontsize=9)
    axis.tick_params(length=0, labelcolor=TEXT_COLOR)
    draw_grid_and_hide_frame(axis, "x", "top", "right", "left")
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", markerscale=0.4, ncols=3, frameon=False, fontsize=9)
    save_png_and_close_figure(figure, path)


# Images that a model ranks first for a query, best first. An entry is the tuple (image, whether the query describes the
# image). If an image can't be shown, its caption takes its place.
RankedImages = list[tuple[Image.Image | str, bool]]


def plot_ranked_image_grid(
    rows: list[list[tuple[str, RankedImages]]], path: Path, headings: Sequence[str] = (), note: str = ""
) -> None:
    """Draw the images that one or several models rank first for each query, as a grid with a row per query.

    The image that the query describes has a thick green frame.

    Args:
        rows: For each query, a list with one tuple (title, images) per model. `images` is a list of tuples (image,
            whether the query describes it), best image first. A text in place of an image is drawn as text.
        path: PNG file to write.
        headings: Heading above the images of each model. Empty: no headings.
        note: Text below the grid.
    """
    columns, blocks = max(len(images) for row in rows for _, images in row), len(rows[0])
    lines = note.count("\n") + bool(note)
    top_margin, bottom_margin = 0.3 + 0.35 * bool(headings), 0.15 * bool(note) + 0.15 * lines  # both in inches
    height = 1.45 * len(rows) + top_margin + bottom_margin
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fallbacks = sorted(name for name in installed if name.startswith(FALLBACK_FONTS))
    with plt.rc_context({"font.family": ["DejaVu Sans", *fallbacks]}):
        figure = plt.figure(figsize=(1.3 * columns * blocks + 0.3 * (blocks - 1), height))
        grid = figure.add_gridspec(
            len(rows), columns * blocks + blocks - 1, wspace=0.08, hspace=0.3, left=0.01, right=0.99,
            width_ratios=([1] * columns + [0.25]) * (blocks - 1) + [1] * columns,
            top=1 - top_margin / height, bottom=max(0.01, bottom_margin / height),
        )  # fmt: skip
        for number, row in enumerate(rows):
            for block, (title, images) in enumerate(row):
                for column, (image, is_relevant) in enumerate(images):
                    axis = figure.add_subplot(grid[number, block * (columns + 1) + column])
                    if isinstance(image, str):
                        text = textwrap.fill(make_short_plain_line(image, 60), 14)
                        axis.text(3.5, 3.5, text, ha="center", va="center", fontsize=7, parse_math=False)
                        image = Image.new("RGB", (8, 8), "#e5e7eb")
                    axis.imshow(image)
                    # The anchor "N" (north) keeps a wide image at the top of its cell, close to its title.
                    axis.set(xticks=[], yticks=[], anchor="N")
                    frame_color = RELEVANT_COLOR if is_relevant else OTHER_COLOR
                    axis.spines[:].set(color=frame_color, linewidth=3.5 if is_relevant else 0.8)
                    if column == 0:
                        axis.set_title(title, loc="left", fontsize=8.5, parse_math=False)
        for block, heading in enumerate(headings):
            left = grid[0, block * (columns + 1)].get_position(figure).x0
            figure.text(left, 1 - 0.27 / height, heading, fontsize=12, weight="bold", parse_math=False)
        figure.text(0.01, 0.1 / height, note, fontsize=8.5, color=TEXT_COLOR, parse_math=False)
        save_png_and_close_figure(figure, path)


def select_sheet_queries(before: "Tensor", after: "Tensor", seed: int) -> list[tuple[int, str]]:
    """Select example queries that show how a trained model differs from its baseline, without cherry-picking.

    From all queries in random order, the function takes the first three whose rank got better, the first with an equal
    rank and the first with a worse rank.

    Args:
        before: For each query, the rank of its right image with the baseline, (queries,).
        after: The same with the trained model, (queries,).
        seed: Seed of the random order.

    Returns:
        Tuples (index of the query, kind of change); the kind is "gain", "tie" or "loss".
    """
    order, change = _random_order(len(before), seed), (after - before).sign()
    selected = []
    for kind, (sign, shown) in QUERY_CHANGES.items():
        selected += [(query, kind) for query in order[change[order] == sign][:shown].tolist()]
    return selected


def plot_retrieval_sheet(
    path: Path,
    open_image: Callable[[int], Image.Image],
    queries: list[str],
    embeddings: dict[str, Any],
    seed: int = 0,
    language: str = "en",
) -> None:
    """Draw a sheet of example queries for text-to-image retrieval, each with the five images that a model ranks first.

    With two models, it shows random queries whose right image is now ranked higher, equally or lower than before
    training. With one model, it shows the four best and the four worst queries.

    Args:
        path: PNG file to write.
        open_image: Function that opens an image by its index. If it raises BadImage, a caption is drawn instead.
        queries: Texts of all queries.
        embeddings: `{role: eval.retrieval.RetrievalEmbeddings}` with the role "baseline", "capivara" or both.
        seed: Seed of the random choice.
        language: Language of the labels: "pt", otherwise English.
    """
    labels, rows, note = PLOT_LABELS.get(language, PLOT_LABELS["en"])["sheet"], [], ""
    reason = ""  # why captions are shown instead of images; empty if all images can be shown
    ranks = {role: split.ranks["text_to_image"] for role, split in embeddings.items()}
    is_comparison = len(ranks) > 1
    if is_comparison:
        selected = select_sheet_queries(ranks["baseline"], ranks["capivara"], seed)
        change = (ranks["capivara"] - ranks["baseline"]).sign()
        counts = {kind: int((change == sign).sum()) for kind, (sign, _) in QUERY_CHANGES.items()}
        note = labels["rule"].format(seed=seed, **counts)
    else:
        (model_ranks,) = ranks.values()
        order = _random_order(len(model_ranks), seed)
        # The sort is stable, so queries with equal ranks stay in random order.
        order = order[model_ranks[order].argsort(stable=True)].tolist()
        selected = [(query, "") for query in dict.fromkeys(order[:QUERIES_PER_END] + order[-QUERIES_PER_END:])]
    for query, kind in selected:
        row = []
        for role, split in embeddings.items():
            scores, relevant = split.image_embeds @ split.text_embeds[query], int(split.image_of_text[query])
            best = scores.argsort(descending=True, stable=True)[:IMAGES_PER_QUERY].tolist()
            # On the sheet of one model, the right image is added if it is not among the first five.
            if not is_comparison and relevant not in best:
                best.append(relevant)
            rank_label = labels["rank"].format(rank=int(ranks[role][query]) + 1)
            title = f"“{make_short_plain_line(queries[query], 40)}”   {rank_label}"
            title += f" ({labels[kind]})" if kind and role == "capivara" else ""
            images = []
            for index in best:
                try:
                    image = open_image(index).convert("RGB")
                    # A sheet has up to 48 images, each drawn only about 200 pixels wide. Smaller images save memory.
                    image.thumbnail((400, 400))
                    images.append((image, index == relevant))
                except BadImage:
                    # The dataset has embeddings instead of images, or the image file has changed since it was embedded.
                    # The measurement is already complete, so a missing image must not end the command.
                    reason = labels["no_images"]
                    images.append((queries[(split.image_of_text == index).nonzero()[0, 0]], index == relevant))
            row.append((title, images))
        rows.append(row)
    note = "\n".join(filter(None, (note, reason)))
    plot_ranked_image_grid(rows, path, [labels[role] for role in ranks] if is_comparison else (), note)


def _random_order(query_count: int, seed: int) -> "Tensor":
    """Return the query numbers from 0 to `query_count` - 1 in a random order given by `seed`, (queries,)."""
    import torch

    return torch.randperm(query_count, generator=torch.Generator().manual_seed(seed))
