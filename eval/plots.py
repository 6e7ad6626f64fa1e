"""Every picture the project draws."""

from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor

matplotlib.use("Agg")  # files only; a screen is not needed

from matplotlib import pyplot as plt

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
