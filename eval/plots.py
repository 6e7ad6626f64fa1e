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
