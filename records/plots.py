"""Every picture the project draws."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

matplotlib.use("Agg")  # files only; a screen is not needed

from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

BASELINE_COLOUR, MODEL_COLOUR, CHANCE_COLOUR = "#8a8f98", "#1b7f5c", "#c9c9c9"
DIRECTION_COLOURS = {"text_to_image": "#1b7f5c", "image_to_text": "#d98324"}
RIGHT_COLOUR, WRONG_COLOUR = "#1b7f5c", "#d0d3d8"
DIRECTION_NAMES = {"text_to_image": "text to image", "image_to_text": "image to text"}


def plot_training_curves(curve: list[dict], language: str, path: Path) -> None:
    """Loss and learning rate of every step, recall of the validation split, as one PNG.

    Args:
        curve: of `run.json`: an entry a step with `step`, `loss`, `learning_rate` and, where the split was measured,
            `validation`: direction -> mean recall.
        language: of the validation captions.
        path: the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    trained = [point for point in curve if "loss" in point]
    left.plot([p["step"] for p in trained], [p["loss"] for p in trained], color=MODEL_COLOUR)
    left.set(xlabel="step", ylabel="contrastive loss (nats)", title="Training loss")
    rate = left.twinx()
    rate.plot([p["step"] for p in trained], [p["learning_rate"] for p in trained], color=CHANCE_COLOUR, linestyle="--")
    rate.set_ylabel("learning rate (dashed)")
    rate.set_ylim(bottom=0)
    measured = [point for point in curve if "validation" in point]
    for direction, colour in DIRECTION_COLOURS.items():
        values = [100 * p["validation"][direction] for p in measured]
        right.plot([p["step"] for p in measured], values, "o-", color=colour, label=DIRECTION_NAMES[direction])
    right.set(xlabel="step", ylabel="mean recall (%)", title=f"Validation concepts, captions in '{language}'")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top"]].set_visible(False)
        axis.grid(alpha=0.25)
    _save(figure, path)


def plot_retrieval_sheet(
    images: list[Image.Image], queries: list[str], right_images: list[int], scores: dict[str, Tensor], path: Path
) -> None:
    """A row a query: the five pictures each model ranks first, the right one framed, its rank beside the row.

    Args:
        images: the pool that is searched.
        queries: texts.
        right_images: for each query, the index of its image in the pool.
        scores: title of a model -> (queries, images), its similarities.
        path: the PNG.
    """
    shown, models = 5, list(scores)
    figure = plt.figure(figsize=(1.35 * shown * len(models) + 0.6, 1.72 * len(queries) + 0.7))
    grid = figure.add_gridspec(
        len(queries), shown * len(models) + len(models) - 1, wspace=0.12, hspace=0.3, left=0.01, right=0.99,
        width_ratios=([1] * shown + [0.25]) * (len(models) - 1) + [1] * shown, top=0.9, bottom=0.01,
    )  # fmt: skip
    for row, (query, right) in enumerate(zip(queries, right_images, strict=True)):
        for block, model in enumerate(models):
            order = scores[model][row].argsort(descending=True, stable=True)
            rank = int((order == right).nonzero()) + 1
            for column, index in enumerate(order[:shown].tolist()):
                axis = figure.add_subplot(grid[row, block * (shown + 1) + column])
                _picture(axis, images[index], index == right)
                if column == 0:
                    axis.set_title(f"“{query}”   right one at rank {rank}", loc="left", fontsize=8.5, parse_math=False)
    for block, model in enumerate(models):
        left = figure.axes[block * shown].get_position().x0
        figure.text(left, 0.955, model, fontsize=12, weight="bold", parse_math=False)
    _save(figure, path)


def similarity_scores(text_embeds: Tensor, image_embeds: Tensor, texts: list[int]) -> Tensor:
    """(queries, images), cosines of the chosen texts with every image."""
    return text_embeds[torch.tensor(texts)] @ image_embeds.T


def _picture(axis: plt.Axes, image: Image.Image, right: bool) -> None:
    axis.imshow(image.convert("RGB"))
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=RIGHT_COLOUR if right else WRONG_COLOUR, linewidth=3.5 if right else 0.8)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_train_step(results: dict, titles: dict[str, str], path: Path) -> None:
    """Pairs per second of every trainer in every precision, as bars with the ratio and the memory beside them.

    Args:
        results: of `benchmarks.train_step`.
        titles: name of a program in them -> in words.
        path: the PNG.
    """
    measured = results["measured"]
    figure, axes = plt.subplots(1, len(measured), figsize=(6 * len(measured), 3.2), layout="constrained", sharex=True)
    for axis, (precision, programs) in zip(axes, measured.items(), strict=True):
        rates = [found["pairs_per_second"]["median"] for found in programs.values()]
        colours = [BASELINE_COLOUR if "optimiser_s" not in found else MODEL_COLOUR for found in programs.values()]
        names = [titles[name] for name in programs]
        bars = axis.barh(names, rates, color=colours)
        labels = [
            f"{found['pairs_per_second']['median']:.2f} pairs/s"
            + (f", x {found['ratio']:.1f}" if "ratio" in found else "")
            + f"\n{found['peak_memory_bytes'] / 2**30:.1f} GiB"
            for found in programs.values()
        ]
        axis.bar_label(bars, labels, padding=4, fontsize=8.5)
        axis.set(xscale="log", xlabel="pairs per second (log)", title=precision)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    rates = [found["pairs_per_second"]["median"] for programs in measured.values() for found in programs.values()]
    low, high = min(rates) / 2, max(rates)
    axes[0].set_xlim(low, high * (high / low) ** 0.5)  # room for the labels
    figure.suptitle(f"One step of {results['pairs']} pairs, {results['device']}", fontsize=10)
    _save(figure, path)


def plot_scaling(results: dict, path: Path) -> None:
    """Cost a pair over the batch, and the loss's memory and share of a step beyond.

    Args:
        results: of `benchmarks.scaling`.
        path: the PNG.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps, losses = results["steps"], results["loss_alone"]
    sizes = [step["pairs"] for step in steps]
    left.plot(sizes, [1e3 * s["seconds_per_pair"] for s in steps], "o-", color=MODEL_COLOUR, label="whole step")
    without = [1e3 * s["seconds_per_pair_without_optimiser"] for s in steps]
    left.plot(sizes, without, "o--", color=BASELINE_COLOUR, label="without the optimiser")
    left.set(ylabel="ms a pair", title="Towers, full size")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    sizes = [loss["pairs"] for loss in losses]
    middle.plot(sizes, [loss["memory_over_embeddings_bytes"] / 2**20 for loss in losses], "o-", color=MODEL_COLOUR)
    all_logits = [loss["all_logits_bytes"] / 2**20 for loss in losses]
    middle.plot(sizes, all_logits, "--", color=BASELINE_COLOUR, label="one float32 matrix of all logits")
    middle.set(ylabel="MiB beside the embeddings", title="Loss alone", yscale="log")
    middle.legend(frameon=False)
    right.plot(sizes, [100 * loss["loss_share_of_extrapolated_step"] for loss in losses], "o-", color=MODEL_COLOUR)
    right.set(ylabel="% of an extrapolated step", title="Loss's share of the time")
    right.set_ylim(bottom=0)
    for axis in (left, middle, right):
        ticks = steps if axis is left else losses
        axis.set(xscale="log", xlabel="pairs of the batch (log)")
        axis.set_xticks([t["pairs"] for t in ticks], [f"{t['pairs']:,}" for t in ticks], rotation=30, minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    _save(figure, path)


# --- The report ------------------------------------------------------------------------------------------------------

LOSS_COLOUR, INK, FAINT = "#b3472f", "#1f2933", "#6b7280"
LABELLED_CLASSES, NUMBERED_CLASSES = 30, 12  # above, names and counts of a confusion matrix could not be read
DRAWN_CLASSES = 200  # above, a cell stands for several classes
REPORT_WIDTH = 5.2  # inches: narrow, so that the letters stay readable on a phone


@dataclass(frozen=True)
class BarRow:
    """A baseline and a model, as (mean, standard deviation or None) of shares; None where one was not measured."""

    label: str
    baseline: tuple[float, float | None] | None
    model: tuple[float, float | None] | None
    chance: float | None = None


def plot_bars(rows: list[BarRow | None], note: str, path: Path) -> None:
    """Baseline against model, a pair of bars a row, their difference in points at the right.

    Args:
        rows: from top to bottom; None is a gap.
        note: below the picture, such as what was left out.
        path: the PNG.
    """
    figure, axis = plt.subplots(figsize=(REPORT_WIDTH, 1.2 + 0.46 * len(rows)), layout="constrained")
    drawn = [(place, row) for place, row in enumerate(rows) if row]
    for name, offset, colour in (("baseline", -0.2, BASELINE_COLOUR), ("model", 0.2, MODEL_COLOUR)):
        found = [(place, getattr(row, name)) for place, row in drawn if getattr(row, name)]
        places, means = [place + offset for place, _ in found], [100 * value[0] for _, value in found]
        errors = [100 * (value[1] or 0) for _, value in found]
        bars = axis.barh(places, means, 0.36, color=colour)
        axis.errorbar(means, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
        labels = [f"{mean:.1f}" + f" ± {error:.1f}" * bool(error) for mean, error in zip(means, errors, strict=True)]
        for bar, label, error in zip(bars, labels, errors, strict=True):
            end = (bar.get_width() + error, bar.get_y() + bar.get_height() / 2)
            axis.annotate(label, end, (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    for place, row in drawn:
        if row.chance is not None:
            axis.plot([100 * row.chance] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.1)
    _difference_column(axis, drawn)
    highest = max((100 * (v[0] + (v[1] or 0)) for _, row in drawn for v in (row.baseline, row.model) if v), default=1)
    spread = any(v[1] for _, row in drawn for v in (row.baseline, row.model) if v)
    axis.set_xlim(0, max(1.0, min(highest, 100)) * (1.42 if spread else 1.22))  # room beside the longest bar
    axis.set_xticks([tick for tick in axis.get_xticks() if tick <= 100])
    axis.set_yticks([place for place, _ in drawn], [row.label for _, row in drawn], parse_math=False, fontsize=10)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("per cent" + (f"\n{note}" if note else ""), color=FAINT, fontsize=9, parse_math=False)
    axis.tick_params(length=0, labelcolor=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    _bar_legend(figure, [row for _, row in drawn])
    _save(figure, path)


def plot_gains(rows: list[tuple[str, float, float, float]], path: Path) -> None:
    """Gains with their 95 % intervals, beside zero.

    Args:
        rows: (label, gain, low end, high end), shares.
        path: the PNG.
    """
    lines = max(label.count("\n") + 1 for label, *_ in rows)
    figure, axis = plt.subplots(figsize=(REPORT_WIDTH, 1.0 + 0.38 * lines * len(rows) / 2), layout="constrained")
    axis.axvline(0, color=FAINT, linewidth=1)
    for place, (_, gain, low, high) in enumerate(rows):
        colour = BASELINE_COLOUR if low <= 0 <= high else MODEL_COLOUR if gain > 0 else LOSS_COLOUR
        axis.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
        axis.plot(100 * gain, place, "o", color=colour, markersize=7)
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows], parse_math=False, fontsize=9.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("gain in mean recall, points, with its 95 % interval", color=FAINT, fontsize=9)
    axis.tick_params(length=0, labelcolor=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    _save(figure, path)


def plot_confusion(confusion: Tensor, names: list[str], note: str, path: Path) -> None:
    """Heat map: of the images of each class (row), the share that was taken for each class (column).

    Args:
        confusion: (classes, classes), counts, a row a true class.
        names: (classes,), shown up to `LABELLED_CLASSES`.
        note: below the picture.
        path: the PNG.
    """
    shares = confusion / confusion.sum(dim=1, keepdim=True)  # NaN, drawn grey, where a class has no image
    classes, block = len(names), -(-len(names) // DRAWN_CLASSES)
    if block > 1:  # a cell of less than a pixel would vanish, and with it every confusion
        shares = F.max_pool2d(shares.nan_to_num()[None], block, ceil_mode=True)[0]
        note = f"a cell is the largest of {block} x {block}" + (f"\n{note}" if note else "")
    figure, axis = plt.subplots(figsize=(REPORT_WIDTH, REPORT_WIDTH * 0.92), layout="constrained")
    colours = LinearSegmentedColormap.from_list("share", ["#ffffff", "#bfe3d3", MODEL_COLOUR, "#0b3d2c"])
    colours = colours.with_extremes(bad="#e5e7eb")
    shown = axis.imshow(100 * shares.numpy(), cmap=colours, vmin=0, vmax=100)
    if classes <= LABELLED_CLASSES:
        size = 9 if classes <= NUMBERED_CLASSES else 6.5
        axis.set_xticks(range(classes), names, rotation=90, fontsize=size, parse_math=False)
        axis.set_yticks(range(classes), names, fontsize=size, parse_math=False)
    else:
        axis.set(xticks=[], yticks=[])
    if classes <= NUMBERED_CLASSES:
        for row, column in shares.isfinite().nonzero().tolist():
            share = 100 * shares[row, column].item()
            colour = "white" if share > 55 else INK
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axis.tick_params(length=0, labelcolor=INK)
    axis.set_ylabel("is" if classes <= LABELLED_CLASSES else f"is (one of {classes} classes)", color=FAINT, fontsize=9)
    axis.set_xlabel("was taken for" + (f"\n{note}" if note else ""), color=FAINT, fontsize=9, parse_math=False)
    axis.spines[:].set_color("#d0d3d8")
    bar = figure.colorbar(shown, ax=axis, shrink=0.6, pad=0.02)
    bar.set_label("% of the class's images", color=FAINT, fontsize=9)
    bar.outline.set_visible(False)
    _save(figure, path)


def plot_gallery(rows: list[tuple[str, list[tuple[Image.Image | None, bool]]]], path: Path) -> None:
    """A row a query: what it says, and the pictures that were found best, the right one framed.

    Args:
        rows: (title, [(picture or None where it can't be shown, whether it is the right one)]).
        path: the PNG.
    """
    columns = max(len(pictures) for _, pictures in rows)
    figure = plt.figure(figsize=(1.3 * columns, 1.45 * len(rows) + 0.1))
    grid = figure.add_gridspec(
        len(rows), columns, wspace=0.08, hspace=0.3, left=0.01, right=0.99, bottom=0.01,
        top=1 - 0.3 / figure.get_figheight(),
    )  # fmt: skip
    for row, (title, pictures) in enumerate(rows):
        for column, (image, right) in enumerate(pictures):
            axis = figure.add_subplot(grid[row, column])
            _picture(axis, image or Image.new("RGB", (8, 8), "#e5e7eb"), right)
            if column == 0:
                axis.set_title(title, loc="left", fontsize=8.5, parse_math=False)
    _save(figure, path)


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
    both = [(place, row.model[0] - row.baseline[0]) for place, row in drawn if row.model and row.baseline]
    style = {"xycoords": axis.get_yaxis_transform(), "annotation_clip": False, "va": "center", "fontsize": 9.5}
    for place, difference in both:
        rounded = round(100 * difference, 1)
        colour = MODEL_COLOUR if rounded > 0 else LOSS_COLOUR if rounded < 0 else FAINT
        text = f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"
        axis.annotate(text, (1.02, place), color=colour, weight="bold", **style)
    if both:
        axis.annotate("points", (1.02, -0.75), color=FAINT, **(style | {"fontsize": 8}))
