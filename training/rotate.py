"""Turn a trained model's space so that the first numbers of an embedding hold most: a step after training.

    python -m training.rotate runs/pt --dataset DATA --dims 256 128 64 --output runs/pt-rotated

The rotation to the principal axes of a data set's images is folded into both projections: no cosine of whole embeddings
changes, and those that are cut to their first numbers lose little (docs/recipe.md). It lies beside the weights, as
`rotation.safetensors`: vectors of before are turned by `stored @ rotation.T`, or made anew, as an index is.
"""

from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import atomic_folder, check_output_folder, write_bytes
from capivara_common.image_files import BadImage
from caption_data.sources import open_split
from modeling_capivara.configuration_capivara import normalize_matryoshka_dims
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images

ROTATION_FILE = "rotation.safetensors"  # beside a model's weights
MAX_ROTATION_IMAGES = 2**14  # that the axes are taken of: enough for the second moments of a thousand dimensions


@dataclass
class RotateArguments:
    """Arguments of `training.rotate`."""

    model: str = flag(..., "Folder or Hub id of the trained model.", positional=True)
    dataset: str = flag(..., "Data set of the images, in the forms of a training's.")
    output: Path = flag(..., "Folder of the new model.")
    dims: list[int] = flag(..., "Widths that are to be embeddings, too, such as 256 128 64; each divides the whole.")
    split: str = flag("train", "Split of the data set.")
    image_column: str = flag("image", "Name of the image column.")


def main(argv: list[str] | None = None) -> None:
    """The command. Of more than `ROTATION_IMAGES` images so many are taken, evenly spaced; bad ones are left out."""
    args = parse_arguments(RotateArguments, __doc__, argv)
    check_output_folder(args.output)
    model, processor = load_model(args.model).eval(), load_processor(args.model)
    if load_rotation(args.model) is not None:
        raise ValueError(f"{args.model} was turned before: it has a {ROTATION_FILE}. Give the model as it was trained.")
    if not hasattr(model, "visual_projection"):
        kind = model.config.model_type
        raise ValueError(f"{args.model} is a {kind}, which has no projections that a rotation could be folded into.")
    width = model.config.projection_dim
    model.config.matryoshka_dims = normalize_matryoshka_dims(args.dims, width) or None
    source = open_split(args.dataset, args.split, args.image_column)
    source.check_columns([args.image_column])
    rows = np.linspace(0, len(source) - 1, min(len(source), MAX_ROTATION_IMAGES)).astype(np.int64)
    source.data = source.data.select(rows)
    good = (image for _, image in source.decode_images(range(len(source))) if not isinstance(image, BadImage))
    first = list(islice(good, 1))
    embeds = embed_images(model, processor, chain(first, good), progress="Images") if first else torch.empty(0)
    if len(embeds) <= width:
        raise ValueError(
            f"{source.display_name} has {len(embeds)} usable images, {width} axes are asked of them. Give more."
        )
    rotation = compute_principal_rotation(embeds)
    rotate_model_(model, rotation)
    with atomic_folder(args.output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        save_rotation(rotation, folder)
    print(f"Written to {args.output}.")


@torch.no_grad()
def compute_principal_rotation(image_embeds: Tensor) -> Tensor:
    """The orthogonal matrix that turns a space to the principal axes of its images, those of most variance first.

    Eigenvectors of the second moments: of all orthogonal bases, theirs keeps the most of the images' squared length in
    every prefix (Eckart and Young), and cosines are taken about the origin, not about the mean. Each has its largest
    number positive, so that the same images give the same matrix, (width, width), float32.

    `image_embeds` are (images, width), unit length, more than the width; ValueError where none is, or one not finite.
    """
    if not len(image_embeds) or not torch.isfinite(image_embeds).all():
        raise ValueError(f"The rotation needs finite embeddings of images, got {len(image_embeds)} of them.")
    embeds = image_embeds.cpu().double()
    axes = torch.linalg.eigh(embeds.T @ embeds / len(embeds)).eigenvectors.flip(1).T
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return (axes * largest.sign()).float().contiguous()


@torch.no_grad()
def rotate_model_(model: PreTrainedModel, rotation: Tensor) -> None:
    """Turn the space of a model without adapters, in place: the rotation becomes part of its two projections.

    It is (projection_dim, projection_dim), orthogonal. Raises ValueError where it is of another width.
    """
    width = model.config.projection_dim
    if rotation.shape != (width, width):
        raise ValueError(f"The rotation is of {len(rotation)} dimensions, the model's embeddings are of {width}.")
    text = model.text_projection
    for layer in (model.visual_projection, text[-1] if isinstance(text, nn.Sequential) else text):
        layer.weight.copy_(rotation.to(layer.weight.device).double() @ layer.weight.double())


def save_rotation(rotation: Tensor, folder: Path) -> None:
    """Write the rotation beside a model's weights."""
    write_bytes(folder / ROTATION_FILE, save({"rotation": rotation}))


def load_rotation(model: str | Path) -> Tensor | None:
    """The rotation between a model, a folder or Hub id, and its base, (width, width); None where there was none.

    Raises ValueError where its file can't be read.
    """
    path = cached_file(str(model), ROTATION_FILE, _raise_exceptions_for_missing_entries=False)
    try:
        return None if path is None else load_file(path)["rotation"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}. Fetch or make the model again.") from error


if __name__ == "__main__":
    run_command(main)
