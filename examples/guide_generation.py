"""A picture that is steered towards a sentence in Portuguese, by CAPIVARA's gradients through `pixel_values`.

    python -m examples.guide_generation --sentence "sol amarelo" --output_dir runs/guided

The picture is optimised out of faint noise. Of single pixels (`--cells` as many as `--size`, `--views 0`) that gives
noise which the model alone takes for the sentence; coarse cells, and random noisy views at each step, give shapes that
people see, too, at times, though hardly a picture: nothing here knows what pictures look like.

The folder gets `picture.png`, `steps.png` and `results.json`: the cosine of picture and sentence, and of others, before
and after, as the processor sees the files.
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

from capivara_common.cli import check_at_least, flag, parse_arguments, run_command
from capivara_common.environment import resolve_device
from capivara_common.files import atomic_folder, write_json
from examples import describe_run
from modeling_capivara import CapivaraImageProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

STRIP_IMAGES, STRIP_SIDE = 8, 128  # pictures of the strip of steps; pixels of one of them
INITIAL_NOISE = 0.02  # spread of the noise that the optimisation starts from
MAX_ROTATION, MAX_ZOOM, MAX_SHIFT = (
    0.15,
    0.5,
    0.25,
)  # of a view, at most: radians, share of the side left out, share of half a side
VIEW_NOISE = 0.1  # spread of what is added to views: what single pixels say is drowned in it
OTHER_SENTENCES = ["lua crescente", "coração azul", "coração vermelho", "gato", "carro", "rosto sorridente"]


@dataclass
class GuideArguments:
    """Arguments of `examples.guide_generation`. Raises ValueError where a value breaks its rule."""

    gone = {"pipeline": "a pipeline of diffusers is no longer steered; without it, a picture is optimised"}
    sentence: str = flag(..., "What the picture shall show, in Portuguese.")
    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    output_dir: Path = flag(Path("runs/guided"), "Folder for the pictures and the figures.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")
    others: list[str] = flag(OTHER_SENTENCES, "Sentences that the picture is compared with as well.")
    steps: int = flag(60, "Steps of the optimisation.")
    size: int = flag(224, "Pixels a side.")
    cells: int = flag(24, "Colours a side that are optimised, enlarged smoothly; as many as --size are single pixels.")
    views: int = flag(4, "Random crops, turned and noisy, that are judged at each step; 0 judges the picture itself.")
    learning_rate: float = flag(0.1, "Of the optimisation.")
    seed: int = flag(0, "Seed of the start and of the views.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "size", "cells")
        check_at_least(self, 0, "views")
        if not self.sentence.strip():
            raise ValueError("The sentence is empty. Say what the picture shall show.")


def make_random_views(pixels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(1, 3, side, side) -> (number, 3, side, side): turned and noisy crops, enlarged to the whole side."""

    def drawn(most: float) -> Tensor:
        return most * (2 * torch.rand(count, generator=generator) - 1)

    turn, shift = drawn(MAX_ROTATION), torch.stack([drawn(MAX_SHIFT), drawn(MAX_SHIFT)], dim=1)
    side = 1 - MAX_ZOOM * torch.rand(count, generator=generator)  # share of the picture's side
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(-1, 2, 2)
    affine = torch.cat([side[:, None, None] * rotation, shift[:, :, None]], dim=2).to(pixels.device)
    grid = F.affine_grid(affine, [count, *pixels.shape[1:]], align_corners=False)
    views = F.grid_sample(pixels.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
    noise = torch.randn(views.shape, generator=generator).to(pixels.device)
    return (views + VIEW_NOISE * noise).clamp(0, 1)


def to_pixel_values(pixels: Tensor, image_processor: CapivaraImageProcessor) -> Tensor:
    """What the model's own processor does to square pictures, so that gradients flow back to them.

    (pictures, 3, side, side), 0 to 1 -> (pictures, 3, height, width) of its crop. The resize is torch's antialiased
    bicubic one, which is PIL's but for its roundings to eight bits.
    """
    side, crop = image_processor.size["shortest_edge"], image_processor.crop_size
    pixels = functional.resize(pixels, [side], functional.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    pixels = functional.center_crop(pixels, [crop["height"], crop["width"]])
    return functional.normalize(pixels, image_processor.image_mean, image_processor.image_std)


def to_image(pixels: Tensor) -> PIL.Image.Image:
    """(1, 3, height, width), 0 to 1, as a PIL image of eight bits."""
    array = (255 * pixels[0].detach()).round().clamp(0, 255).to(torch.uint8)
    return PIL.Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(GuideArguments, __doc__, argv)
    with atomic_folder(args.output_dir, args.overwrite_output_dir) as folder:
        model, processor = load_model(args.model).eval().to(resolve_device(args.device)), load_processor(args.model)
        model.requires_grad_(False)  # gradients flow to the pixels alone
        generator, started = torch.Generator().manual_seed(args.seed), time.perf_counter()
        cells = min(args.cells, args.size)
        colours = INITIAL_NOISE * torch.randn(
            1, 3, cells, cells, generator=generator
        )  # it begins as grey with faint noise
        colours = colours.to(model.device).requires_grad_()

        def picture() -> Tensor:  # (1, 3, size, size), 0 to 1
            return F.interpolate(colours, size=(args.size, args.size), mode="bicubic").sigmoid()

        target = embed_texts(model, processor, [args.sentence]).clone().to(model.device)  # a clone takes gradients
        optimiser = torch.optim.Adam([colours], lr=args.learning_rate)
        pictures = [to_image(picture())]
        shown = {round(step * args.steps / (STRIP_IMAGES - 1)) for step in range(1, STRIP_IMAGES)}
        for step in (bar := trange(1, args.steps + 1, desc="Optimising", unit="step")):
            views = make_random_views(picture(), args.views, generator) if args.views else picture()
            embeds = model(pixel_values=to_pixel_values(views, processor.image_processor)).image_embeds
            cosine = (embeds @ target.T).mean()
            optimiser.zero_grad()
            (-cosine).backward()
            optimiser.step()
            bar.set_postfix(cosine=f"{cosine.item():.3f}")
            if step in shown:
                pictures.append(to_image(picture()))
        seconds = time.perf_counter() - started
        pictures[-1].save(folder / "picture.png")
        small = [np.asarray(one.resize((STRIP_SIDE, STRIP_SIDE))) for one in pictures]
        PIL.Image.fromarray(np.hstack(small)).save(folder / "steps.png")
        sentences = list(dict.fromkeys([args.sentence, *args.others]))
        ends = embed_images(model, processor, [pictures[0], pictures[-1]])
        before, after = (ends @ embed_texts(model, processor, sentences).T).tolist()
        found = {text: {"before": b, "after": a} for text, b, a in zip(sentences, before, after, strict=True)}
        write_json(folder / "results.json", {"cosines": found, "seconds": seconds} | describe_run(args, model.device))
    print("cosine of picture and sentence, before and after")
    for text, values in found.items():
        print(f"  {values['before']:6.3f}  {values['after']:6.3f}   {text}")
    print(f"Pictures: {args.output_dir}")


if __name__ == "__main__":
    run_command(main)
