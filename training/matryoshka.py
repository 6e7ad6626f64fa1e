"""Embeddings whose first numbers are embeddings, too: the loss over prefixes, and the rotation that comes before it.

    rotation = principal_rotation(image_embeds)
    rotate_(model, rotation)  # no cosine of whole embeddings changes; the first numbers now hold most
    stored = stored @ rotation.T  # vectors of the model before

A frozen image tower can't learn which numbers come first, so its space is rotated to its principal axes beforehand; the
text tower then learns to be near the images in every prefix.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from capivara_common.files import write_bytes
from modeling_capivara import CapivaraModel
from training.arguments import RunArguments
from training.contrastive import ContrastiveGradients, contrastive_gradients
from training.images import TrainingImages, loading_workers
from training.views import embed_pixels

ROTATION_FILE = "rotation.safetensors"  # beside a model's weights
ROTATION_IMAGES = 2**14  # that the axes are taken of: enough for the second moments of a thousand dimensions


@torch.no_grad()
def principal_rotation(image_embeds: Tensor) -> Tensor:
    """The orthogonal matrix that turns a space to the principal axes of its images, those of most variance first.

    Eigenvectors of the second moments: of all orthogonal bases, theirs keeps the most of the images' squared length in
    every prefix (Eckart and Young), and cosines are taken about the origin, not about the mean. Each has its largest
    number positive, so that the same images give the same matrix.

    Args:
        image_embeds: (images, width), unit length; more images than the width, or the last axes are arbitrary.

    Returns:
        (width, width), float32: `embeds @ rotation.T` are the rotated embeddings.

    Raises:
        ValueError: there is no image, or an embedding is not finite.
    """
    if not len(image_embeds) or not torch.isfinite(image_embeds).all():
        raise ValueError(f"The rotation needs finite embeddings of images, got {len(image_embeds)} of them.")
    embeds = image_embeds.cpu().double()
    axes = torch.linalg.eigh(embeds.T @ embeds / len(embeds)).eigenvectors.flip(1).T
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return (axes * largest.sign()).float().contiguous()


@torch.no_grad()
def rotate_(model: CapivaraModel, rotation: Tensor) -> None:
    """Turn the space of a model, in place: the rotation becomes part of its two projections.

    Args:
        model: without adapters.
        rotation: (projection_dim, projection_dim), orthogonal.

    Raises:
        ValueError: the rotation is of another width.
    """
    width = model.config.projection_dim
    if rotation.shape != (width, width):
        raise ValueError(f"The rotation is of {len(rotation)} dimensions, the model's embeddings are of {width}.")
    text = model.text_projection
    for layer in (model.visual_projection, text[-1] if isinstance(text, nn.Sequential) else text):
        rotated = rotation.to(layer.weight.device).double() @ layer.weight.double()
        layer.weight.copy_(rotated)


def run_rotation(
    args: RunArguments, base: CapivaraModel, images: TrainingImages, accelerator: Accelerator, folder: Path
) -> Tensor:
    """The principal rotation of a run's training images, (width, width), which is in its `folder` from then on.

    A run that is resumed reads its own: on another machine axes of nearly equal variance may come out otherwise. Of
    more than `ROTATION_IMAGES` images so many are taken, evenly spaced, in their first view.
    """
    first = folder if args.resume in (None, "auto") else Path(args.resume).parent.parent  # of `checkpoints/step-…`
    if not (first / ROTATION_FILE).is_file() and (first.parent / ROTATION_FILE).is_file():
        first = first.parent  # of several seeds
    resumed = any(any(first.rglob(name)) for name in ("checkpoints/step-*", "records.json"))
    rotation = load_rotation(first) if resumed else None
    if rotation is None:
        starts = np.cumsum([0, *map(len, images.cache_rows or images.views)])
        chosen = np.linspace(0, starts[-1] - 1, min(starts[-1], ROTATION_IMAGES)).astype(np.int64)
        sources = np.searchsorted(starts, chosen, side="right") - 1
        items = sources, chosen - starts[sources], np.zeros_like(chosen)
        embeds = images.cached_embeds(*items) if images.caches else _embedded(args, base, images, items, accelerator)
        rotation = principal_rotation(embeds)
    rotation = broadcast(rotation.to(accelerator.device)).cpu()  # the same to the bit in all processes
    if accelerator.is_main_process:
        save_rotation(rotation, folder)
    return rotation


def _embedded(
    args: RunArguments,
    base: CapivaraModel,
    images: TrainingImages,
    items: Sequence[np.ndarray],
    accelerator: Accelerator,
) -> Tensor:
    """(images, width), of data sets, pairs and views, where nothing is cached."""
    rows, size = list(zip(*(numbers.tolist() for numbers in items), strict=True)), args.embedding_batch_size
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    pixels = images.pixel_batches(batches, loading_workers(args, accelerator))
    bar = tqdm(pixels, "Images, their axes", len(batches), unit="batch", disable=not accelerator.is_main_process)
    return torch.cat([embed_pixels(base, batch, accelerator).cpu() for batch in bar])


def save_rotation(rotation: Tensor, folder: Path) -> None:
    """Write the rotation beside a model's weights."""
    write_bytes(folder / ROTATION_FILE, save({"rotation": rotation}))


def load_rotation(model: str | Path) -> Tensor | None:
    """The rotation between a model, a folder or Hub id, and its base, (width, width); None where there was none.

    Raises ValueError where its file can't be read.
    """
    path = Path(model) / ROTATION_FILE
    if not Path(model).exists():
        with suppress(EntryNotFoundError):
            path = Path(hf_hub_download(str(model), ROTATION_FILE))
    if not path.is_file():
        return None
    try:
        return load_file(path)["rotation"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}. Fetch or make the model again.") from error


def matryoshka_gradients(
    text_embeds: Tensor,
    image_embeds: Tensor,
    logit_scale: Tensor,
    image_of_text: Tensor,
    *,
    dims: Sequence[int] = (),
    **options: Any,
) -> ContrastiveGradients:
    """`contrastive_gradients` of the mean loss over the whole embeddings and their prefixes, scaled to unit length.

    Source: Matryoshka representation learning (arXiv 2205.13147), section 3, equation 1, all weights alike. It sums;
    the mean keeps the size of the loss, and so what learning rate and weight decay mean.

    Args:
        dims: widths of the prefixes. The whole is always part of the loss, and all of it where there are none.

    The other arguments, and the errors: as of `contrastive_gradients`.
    """
    sides, options = (text_embeds, image_embeds), {"image_gradient": False, **options}
    widths = sorted({*dims, text_embeds.shape[1]}, reverse=True)
    if len(widths) == 1:
        return contrastive_gradients(*sides, logit_scale, image_of_text, **options)
    loss, scale_gradient = torch.zeros_like(logit_scale), torch.zeros_like(logit_scale)
    gradients = torch.zeros_like(text_embeds), torch.zeros_like(image_embeds) if options["image_gradient"] else None
    for width in widths:
        lengths = [side[:, :width].norm(dim=1, keepdim=True).clamp_min(1e-12) for side in sides]  # as F.normalize
        units = [side[:, :width] / length for side, length in zip(sides, lengths, strict=True)]
        found = contrastive_gradients(*units, logit_scale, image_of_text, **options)
        loss += found.loss / len(widths)
        scale_gradient += found.logit_scale / len(widths)
        for whole, of_unit, unit, length in zip(
            gradients, (found.text_embeds, found.image_embeds), units, lengths, strict=True
        ):
            if whole is not None:  # through the scaling to unit length
                along = (of_unit * unit).sum(dim=1, keepdim=True)
                whole[:, :width] += (of_unit - along * unit) / (length * len(widths))
    return ContrastiveGradients(loss, *gradients, scale_gradient)
