"""Rotate the embedding space of a trained model so that truncated embeddings work well (uncentered PCA).

    python -m training.rotate runs/pt --dataset DATA --dims 256 128 64 --output runs/pt-rotated

After the rotation, the first dimensions contribute most to the cosines, so embeddings lose little if only these are
kept (docs/explanation/recipe.md). Cosines of whole embeddings stay the same.

The rotation is saved as `rotation.safetensors`. Older embeddings must be rotated (`stored @ rotation.T`) or computed
again, and search indexes must be built again.
"""

from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import atomic_folder, check_output_folder_and_clean_leftovers, write_bytes
from capivara_common.image_files import BadImage
from caption_data.sources import open_split
from modeling_capivara.configuration_capivara import check_and_sort_matryoshka_dims
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images

ROTATION_FILE = "rotation.safetensors"  # name of the file in the folder of the rotated model
# Largest number of images from which the rotation is computed. It is enough to estimate the matrix of second moments of
# embeddings with 1000 dimensions. More images would only take longer.
MAX_ROTATION_IMAGES = 2**14


@dataclass
class RotateArguments:
    """Command-line arguments of `training.rotate`, which prepares a model for truncated embeddings.

    Text and image embeddings are multiplied by the same rotation matrix, so their cosines stay the same. Their first
    dimensions then carry most of the information, and little is lost if only these are kept.
    """

    model: str = flag(..., "Trained model: folder or Hub id.", positional=True)
    dataset: str = flag(..., "Dataset whose images determine the axes, in any format that training accepts.")
    output: Path = flag(..., "Folder for the rotated model; it must be new or empty.")
    dims: list[int] = flag(..., "Widths of truncated embeddings, such as 256 128 64. Each must divide the full width.")
    split: str = flag("train", "Split of the dataset whose images are used.")
    image_column: str = flag("image", "Name of the image column.")


def main(argv: list[str] | None = None) -> None:
    """Run the command: rotate a model's embedding space, and write the rotated model to a new folder.

    The rotation is computed from at most `MAX_ROTATION_IMAGES` evenly spaced images of the dataset. Unreadable images
    are skipped.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Raises:
        ValueError: If the model can't be rotated or has been rotated before, or if there are not more usable images
            than embedding dimensions.
    """
    args = parse_arguments(RotateArguments, __doc__, argv)
    check_output_folder_and_clean_leftovers(args.output)
    model, processor = load_model(args.model).eval(), load_processor(args.model)
    if load_rotation(args.model) is not None:
        raise ValueError(f"{args.model} has been rotated before: it has a {ROTATION_FILE}. Give the original model.")
    if not hasattr(model, "visual_projection"):
        raise ValueError(
            f"{args.model} is a {model.config.model_type} model, which has no projections that could be rotated. "
            "Give a CAPIVARA or CLIP model."
        )
    width = model.config.projection_dim
    model.config.matryoshka_dims = check_and_sort_matryoshka_dims(args.dims, width) or None
    source = open_split(args.dataset, args.split, args.image_column)
    source.check_columns([args.image_column])
    rows = np.linspace(0, len(source) - 1, min(len(source), MAX_ROTATION_IMAGES)).astype(np.int64)
    source.data = source.data.select(rows)
    images = (image for image in source.decode_images(range(len(source))) if not isinstance(image, BadImage))
    # `embed_images` must get at least one image. The first image is decoded here to find out whether there is any.
    first = list(islice(images, 1))
    embeds = embed_images(model, processor, chain(first, images), progress="Images") if first else torch.empty(0)
    if len(embeds) <= width:
        raise ValueError(
            f"The rotation needs more than {width} usable images, one for each dimension; {source.display_name} has "
            f"{len(embeds)}. Give a larger dataset."
        )
    rotation = compute_principal_rotation(embeds)
    rotate_model_(model, rotation)
    save_model_folder(args.output, model, processor, rotation)
    print(f"Wrote the rotated model to {args.output}.")


@torch.no_grad()
def compute_principal_rotation(image_embeds: Tensor) -> Tensor:
    """Compute the rotation that moves most of the length of image embeddings into their first dimensions.

    The method is uncentered PCA. The new axes are the eigenvectors of the matrix of second moments, sorted by
    eigenvalue in descending order.

    Args:
        image_embeds: Unit-length embeddings, (images, width). There should be more images than dimensions.

    Returns:
        An orthogonal matrix, (width, width), float32. To rotate embeddings, compute `embeds @ rotation.T`.

    Raises:
        ValueError: If there are no embeddings, or an embedding is NaN or infinite.
    """
    if not len(image_embeds) or not torch.isfinite(image_embeds).all():
        raise ValueError(
            f"The rotation needs finite image embeddings, got {len(image_embeds)} of them. Check model and images."
        )
    embeds = image_embeds.cpu().double()
    # The mean is not subtracted, because cosines are measured from the origin. For any k, the first k eigenvectors keep
    # at least as much of the squared length as any other k orthogonal axes (Eckart-Young theorem).
    axes = torch.linalg.eigh(embeds.T @ embeds / len(embeds)).eigenvectors.flip(1).T
    # The coordinate with the largest absolute value of each axis is made positive, so that the same images always give
    # the same matrix.
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return (axes * largest.sign()).float().contiguous()


@torch.no_grad()
def rotate_model_(model: PreTrainedModel, rotation: Tensor) -> None:
    """Rotate the embedding space of a model in place, so that it returns rotated text and image embeddings.

    Cosines between embeddings do not change.

    Args:
        model: Model with a text and a visual projection, without LoRA adapters.
        rotation: Orthogonal matrix, (projection_dim, projection_dim).

    Raises:
        ValueError: If the rotation has another width than the embeddings of the model.
    """
    width = model.config.projection_dim
    if rotation.shape != (width, width):
        raise ValueError(
            f"The rotation must have the model's {width} dimensions, got {len(rotation)}. Use the file "
            "rotation.safetensors that was computed for this model."
        )
    # The rotation is multiplied into the last layer of both projections.
    text = model.text_projection
    for layer in (model.visual_projection, text[-1] if isinstance(text, nn.Sequential) else text):
        layer.weight.copy_(rotation.to(layer.weight.device).double() @ layer.weight.double())


def save_model_folder(output: Path, model: PreTrainedModel, processor: ProcessorMixin, rotation: Tensor | None) -> None:
    """Write a model, its processor and its rotation matrix to a new folder. The write is atomic.

    Args:
        output: Folder to write. It must be new or empty.
        model: The model.
        processor: The processor of the model.
        rotation: Matrix by which the embedding space of the model has been rotated, (width, width), to be stored in
            `rotation.safetensors`. None: the model has not been rotated.
    """
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if rotation is not None:
            write_bytes(folder / ROTATION_FILE, save({"rotation": rotation}))


def load_rotation(model: str | Path) -> Tensor | None:
    """Load the matrix by which `training.rotate` has rotated the embedding space of a model.

    Args:
        model: Folder or Hub id.

    Returns:
        The rotation, (width, width), or None if the model has no file `rotation.safetensors`.

    Raises:
        ValueError: If the file of the rotation is damaged.
    """
    path = cached_file(str(model), ROTATION_FILE, _raise_exceptions_for_missing_entries=False)
    try:
        return None if path is None else load_file(path)["rotation"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}. Download or rotate the model again.") from error


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
