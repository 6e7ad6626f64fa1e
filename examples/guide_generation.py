"""Optimize an image so that it matches a Portuguese sentence, with CAPIVARA's gradients (CLIP guidance).

    python -m examples.guide_generation --sentence "sol amarelo" --output_dir runs/guided

By default, a coarse grid of colors is optimized, and the model sees rotated, cropped and noisy copies (views) of the
image. This sometimes gives shapes that people recognize. If every pixel is optimized (`--cells` equal to `--size`,
`--views 0`), people see only noise.

The output folder gets `picture.png` (the result), `steps.png` (images during the optimization, side by side) and
`results.json` (cosine similarities of the image to the sentence and to other sentences, before and after).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional
from tqdm.auto import trange

from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import resolve_device
from capivara_common.files import atomic_folder, write_json
from examples import collect_run_conditions
from modeling_capivara import CapivaraImageProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

STRIP_IMAGES = 8  # number of images side by side in steps.png, which shows the progress
STRIP_SIDE = 128  # side of each image in steps.png, in pixels
# Standard deviation of the initial values. It is small, so that the sigmoid turns all into almost the same gray.
INITIAL_NOISE = 0.02
# Largest random changes of the image in a view, that is, in a randomly transformed copy of the image.
MAX_ROTATION = 0.15  # radians
MAX_ZOOM = 0.5  # fraction of the image's side that is cropped away
MAX_SHIFT = 0.25  # shift of the crop's center, as a fraction of half the image's side
VIEW_NOISE = 0.1  # standard deviation of the noise that is added to a view to hide patterns of single pixels
OTHER_SENTENCES = ["lua crescente", "coração azul", "coração vermelho", "gato", "carro", "rosto sorridente"]


@dataclass
class GuideArguments:
    """Command-line arguments of `examples.guide_generation`, which optimizes an image to match a sentence.

    Raises:
        ValueError: If a value is out of range or the sentence is empty.
    """

    sentence: str = flag(..., "What the image should show, in Portuguese.")
    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    output_dir: Path = flag(Path("runs/guided"), "Folder for the images and results.json.")
    overwrite_output_dir: bool = flag(False, "Replace the output folder if it exists.")
    others: list[str] = flag(OTHER_SENTENCES, "Other sentences whose similarity to the image is reported, too.")
    steps: int = flag(60, "Number of optimizer steps.")
    size: int = flag(224, "Side of the image in pixels.")
    cells: int = flag(
        24,
        "Side of the grid of colors that is optimized and then enlarged smoothly to --size. If equal to --size, every "
        "pixel is optimized.",
    )
    views: int = flag(4, "Number of random views (rotated, cropped, noisy) per step. 0 uses the image itself.")
    learning_rate: float = flag(0.1, "Learning rate of Adam.")
    seed: int = flag(0, "Seed of the initial image and of the random views.")
    device: str | None = flag(None, "cpu or cuda. Default: the GPU if there is one.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "size", "cells")
        check_at_least(self, 0, "views")
        if not self.sentence.strip():
            raise ValueError("The sentence is empty. Describe what the image should show.")


def _make_random_views(pixels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Make randomly transformed copies (views) of an image: rotated, cropped, resized to the original size, with noise.

    The operation is differentiable, so that gradients flow from the views to the image.

    Args:
        pixels: The image, (1, 3, side, side), values from 0 to 1.
        count: Number of views.
        generator: Random number generator.

    Returns:
        The views, (count, 3, side, side), values from 0 to 1.
    """

    def uniform(bound: float) -> Tensor:  # shape (count,), values from -bound to bound
        return bound * (2 * torch.rand(count, generator=generator) - 1)

    angle, shift = uniform(MAX_ROTATION), torch.stack([uniform(MAX_SHIFT), uniform(MAX_SHIFT)], dim=1)
    side = 1 - MAX_ZOOM * torch.rand(count, generator=generator)  # side of each crop, as a fraction of the image's side
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    affine = torch.cat([side[:, None, None] * rotation, shift[:, :, None]], dim=2).to(pixels.device)
    grid = F.affine_grid(affine, [count, *pixels.shape[1:]], align_corners=False)
    views = F.grid_sample(pixels.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
    noise = torch.randn(views.shape, generator=generator).to(pixels.device)
    return (views + VIEW_NOISE * noise).clamp(0, 1)


def preprocess_images_differentiably(pixels: Tensor, image_processor: CapivaraImageProcessor) -> Tensor:
    """Preprocess square images like the model's image processor, but so that gradients flow back to the pixels.

    Args:
        pixels: Images, (images, 3, side, side), values from 0 to 1.
        image_processor: The model's image processor. Its size, crop, mean and standard deviation are used.

    Returns:
        Normalized pixel values for the model, (images, 3, height, width).
    """
    # PyTorch's antialiased bicubic resize gives the same result as PIL's, but does not round values to 8 bits.
    side, crop = image_processor.size["shortest_edge"], image_processor.crop_size
    pixels = functional.resize(pixels, [side], functional.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    pixels = functional.center_crop(pixels, [crop["height"], crop["width"]])
    return functional.normalize(pixels, image_processor.image_mean, image_processor.image_std)


def convert_tensor_to_pil_image(pixels: Tensor) -> PIL.Image.Image:
    """Convert a tensor of pixel values to an 8-bit RGB image of PIL.

    Args:
        pixels: One image, (1, 3, height, width), values from 0 to 1.

    Returns:
        The RGB image.
    """
    return functional.to_pil_image((255 * pixels[0].detach()).round().clamp(0, 255).to(torch.uint8))


def main(argv: list[str] | None = None) -> None:
    """Run the command: optimize an image to match a sentence, and save it with its similarities to sentences.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(GuideArguments, __doc__, argv)
    with atomic_folder(args.output_dir, args.overwrite_output_dir) as folder:
        model, processor = load_model(args.model).eval().to(resolve_device(args.device)), load_processor(args.model)
        model.requires_grad_(False)  # only the image is optimized, so the weights need no gradients
        generator, started = torch.Generator().manual_seed(args.seed), time.perf_counter()
        cells = min(args.cells, args.size)
        # The colors of a grid of cells are optimized directly, without a generative model, so the result is hardly ever
        # a natural image. With one cell per pixel and without random views, it is an adversarial example.
        colors = INITIAL_NOISE * torch.randn(1, 3, cells, cells, generator=generator)
        colors = colors.to(model.device).requires_grad_()

        def draw_picture() -> Tensor:  # shape (1, 3, size, size), values from 0 to 1
            return F.interpolate(colors, size=(args.size, args.size), mode="bicubic").sigmoid()

        # The embedding was made in inference mode. Only its copy can be used in a backward pass, so it is cloned.
        target = embed_texts(model, processor, [args.sentence]).clone().to(model.device)
        optimizer = torch.optim.Adam([colors], lr=args.learning_rate)
        pictures = [convert_tensor_to_pil_image(draw_picture())]
        saved_steps = {round(step * args.steps / (STRIP_IMAGES - 1)) for step in range(1, STRIP_IMAGES)}
        bar = trange(1, args.steps + 1, desc="Optimizing", unit="step")
        for step in bar:
            views = _make_random_views(draw_picture(), args.views, generator) if args.views else draw_picture()
            embeds = model(pixel_values=preprocess_images_differentiably(views, processor.image_processor)).image_embeds
            cosine = (embeds @ target.T).mean()
            optimizer.zero_grad()
            (-cosine).backward()
            optimizer.step()
            bar.set_postfix(cosine=f"{cosine.item():.3f}")
            if step in saved_steps:
                pictures.append(convert_tensor_to_pil_image(draw_picture()))
        seconds = time.perf_counter() - started
        pictures[-1].save(folder / "picture.png")
        thumbnails = [np.asarray(picture.resize((STRIP_SIDE, STRIP_SIDE))) for picture in pictures]
        PIL.Image.fromarray(np.hstack(thumbnails)).save(folder / "steps.png")
        sentences = list(dict.fromkeys([args.sentence, *args.others]))
        # The pictures are 8-bit images, so the similarities are those of the saved files.
        first_and_last = embed_images(model, processor, [pictures[0], pictures[-1]])
        before, after = (first_and_last @ embed_texts(model, processor, sentences).T).tolist()
        cosines = {text: {"before": b, "after": a} for text, b, a in zip(sentences, before, after, strict=True)}
        results = {"cosines": cosines, "seconds": seconds} | collect_run_conditions(args, model.device)
        write_json(folder / "results.json", results)
    print("Cosine similarity of image and sentence, before and after:")
    for text, values in cosines.items():
        print(f"  {values['before']:6.3f}  {values['after']:6.3f}   {text}")
    print(f"Images: {args.output_dir}")


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
