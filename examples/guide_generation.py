r"""A picture that is steered towards a sentence in Portuguese, by CAPIVARA's gradients through `pixel_values`.

    python -m examples.guide_generation --sentence "sol amarelo" --output_dir runs/guided
    python -m examples.guide_generation --sentence "um gato na praia" --pipeline PIPELINE --steps 50 --size 512 \
        --model MODEL --output_dir runs/guided-pipeline

The first command optimises a picture out of faint noise. Of single pixels (`--cells` as many as `--size`, `--views 0`)
that gives noise which the model alone takes for the sentence; coarse cells, and random noisy views at each step, give
shapes that people see, too, at times, though hardly a picture: nothing here knows what pictures look like. A generator
does. The second command runs a latent diffusion pipeline of diffusers twice with one seed, without and with
`examples.diffusion_guidance.SentenceGuidance`.

The folder gets `picture.png`, `steps.png` and `results.json`: the cosine of picture and sentence, and of others, before
and after, as the processor sees the files.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

from capivara_common.cli import at_least, between, flag, parse, run_command, user_errors
from capivara_common.environment import device_description, package_versions, require, torch_device
from capivara_common.files import check_output_folder, whole_folder, write_json
from capivara_common.privacy import hide_paths
from examples.diffusion_guidance import (
    SentenceGuidance,
    guided_pipeline,
    run_pipeline,
    sentence_target,
    to_pixel_values,
)
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

SHOWN = 8  # pictures of the strip of steps
STRIP_SIDE = 128  # pixels of one of them
START = 0.02  # spread of the noise that the optimisation starts from
TURN, ZOOM, SHIFT = 0.15, 0.5, 0.25  # of a view, at most: radians, share of the side left out, share of half a side
NOISE = 0.1  # spread of what is added to views: what single pixels say is drowned in it


@dataclass
class GuideArguments:
    """Arguments of `examples.guide_generation`. Raises ValueError where a value breaks its rule."""

    sentence: str = flag(..., "What the picture shall show, in Portuguese.")
    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    output_dir: Path = flag(Path("runs/guided"), "Folder for the pictures and the figures.")
    overwrite_output_dir: bool = flag(False, "Replace what is in the output folder.")
    others: list[str] = flag(
        ["lua crescente", "coração azul", "coração vermelho", "gato", "carro", "rosto sorridente"],
        "Sentences that the picture is compared with as well.",
    )
    steps: int = flag(60, "Steps of the optimisation, or of the pipeline.")
    size: int = flag(224, "Pixels a side.")
    cells: int = flag(24, "Colours a side that are optimised, enlarged smoothly; as many as --size are single pixels.")
    views: int = flag(4, "Random crops, turned and noisy, that are judged at each step; 0 judges the picture itself.")
    learning_rate: float = flag(0.1, "Of the optimisation.")
    pipeline: str | None = flag(None, "Folder or Hub id of a latent diffusion pipeline of diffusers, guided instead.")
    prompt: str = flag("", "What the pipeline itself is told, in its own language.")
    scale: float = flag(0.1, "How far a step of the pipeline is moved, as a share of its latents' length.")
    seed: int = flag(0, "Seed of the start and of the views.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "size", "cells")
        at_least(self, 0, "views")
        between(self, 0, 1, "scale")
        if self.pipeline:
            at_least(self, 2, "steps")  # the first one is not guided
        if not self.sentence.strip():
            raise ValueError("The sentence is empty. Say what the picture shall show.")


class CellPicture(nn.Module):
    """A picture by the colours of `cells` x `cells` places, enlarged smoothly; it begins as grey with faint noise."""

    def __init__(self, size: int, cells: int, generator: torch.Generator):
        super().__init__()
        self.size = size
        self.colours = nn.Parameter(START * torch.randn(1, 3, cells, cells, generator=generator))

    def forward(self) -> Tensor:
        """(1, 3, size, size), 0 to 1."""
        return F.interpolate(self.colours, size=(self.size, self.size), mode="bicubic").sigmoid()


@dataclass(frozen=True)
class Guided:
    """A picture that was optimised: as it was after some of the steps, the last one included, and the cosines."""

    pictures: list[PIL.Image.Image]
    cosines: list[float]  # of each step's views and the sentence, before the step


def random_views(pixels: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """(1, 3, side, side) -> (number, 3, side, side): turned and noisy crops, enlarged to the whole side."""

    def drawn(most: float) -> Tensor:
        return most * (2 * torch.rand(number, generator=generator) - 1)

    turn, shift = drawn(TURN), torch.stack([drawn(SHIFT), drawn(SHIFT)], dim=1)
    side = 1 - ZOOM * torch.rand(number, generator=generator)  # share of the picture's side
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(-1, 2, 2)
    affine = torch.cat([side[:, None, None] * rotation, shift[:, :, None]], dim=2).to(pixels.device)
    grid = F.affine_grid(affine, [number, *pixels.shape[1:]], align_corners=False)
    views = F.grid_sample(pixels.expand(number, -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
    noise = torch.randn(views.shape, generator=generator).to(pixels.device)
    return (views + NOISE * noise).clamp(0, 1)


def optimise(model: CapivaraModel, processor: CapivaraProcessor, args: GuideArguments) -> Guided:
    """Move a picture up the gradient of its cosine with the sentence."""
    generator = torch.Generator().manual_seed(args.seed)
    picture = CellPicture(args.size, min(args.cells, args.size), generator).to(model.device)
    target = sentence_target(model, processor, args.sentence)
    optimiser = torch.optim.Adam(picture.parameters(), lr=args.learning_rate)
    kept, cosines = [as_image(picture())], []
    shown = {round(step * args.steps / (SHOWN - 1)) for step in range(1, SHOWN)}
    bar = trange(1, args.steps + 1, desc="Optimising", unit="step")
    for step in bar:
        pixels = picture()
        views = random_views(pixels, args.views, generator) if args.views else pixels
        embeds = model(pixel_values=to_pixel_values(views, processor.image_processor)).image_embeds
        cosine = (embeds @ target.T).mean()
        optimiser.zero_grad()
        (-cosine).backward()
        optimiser.step()
        cosines.append(cosine.item())
        bar.set_postfix(cosine=f"{cosines[-1]:.3f}")
        if step in shown:
            kept.append(as_image(picture()))
    return Guided(kept, cosines)


def as_image(pixels: Tensor) -> PIL.Image.Image:
    """(1, 3, height, width), 0 to 1, as a PIL image of eight bits."""
    array = (255 * pixels[0].detach()).round().clamp(0, 255).to(torch.uint8)
    return PIL.Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def strip(pictures: list[PIL.Image.Image]) -> PIL.Image.Image:
    """Pictures in a row, small."""
    row = PIL.Image.new("RGB", (STRIP_SIDE * len(pictures), STRIP_SIDE))
    for place, picture in enumerate(pictures):
        row.paste(picture.convert("RGB").resize((STRIP_SIDE, STRIP_SIDE)), (place * STRIP_SIDE, 0))
    return row


def cosines(
    model: CapivaraModel, processor: CapivaraProcessor, pictures: list[PIL.Image.Image], sentences: list[str]
) -> list[dict[str, float]]:
    """Of each picture, sentence -> cosine, by the processor, as anybody would measure them."""
    table = embed_images(model, processor, pictures) @ embed_texts(model, processor, sentences).T
    return [dict(zip(sentences, row, strict=True)) for row in table.tolist()]


def steered(args: GuideArguments, model: CapivaraModel, processor: CapivaraProcessor) -> list[PIL.Image.Image]:
    """Pictures from the first, without guidance, to the last."""
    if args.pipeline is None:
        return optimise(model, processor, args).pictures
    guidance = SentenceGuidance(model, processor, args.sentence, args.scale)
    pipe = guided_pipeline(args.pipeline, model.device)
    callbacks: list[Callable | None] = [None, guidance]
    return [run_pipeline(pipe, args.prompt, args.steps, args.size, args.seed, one) for one in callbacks]


def guide(args: GuideArguments) -> dict[str, dict[str, float]]:
    """Make the pictures and write them; returns sentence -> cosine `before` and `after`."""
    check_output_folder(args.output_dir, args.overwrite_output_dir)
    if args.pipeline:
        require("--pipeline", "guidance", "diffusers")
    model, processor = load_model(args.model).eval().to(torch_device(args.device)), load_processor(args.model)
    model.requires_grad_(False)  # gradients flow to the pixels alone
    with whole_folder(args.output_dir, args.overwrite_output_dir) as folder:
        started = time.perf_counter()
        pictures = steered(args, model, processor)
        seconds = time.perf_counter() - started
        pictures[-1].save(folder / "picture.png")
        strip(pictures).save(folder / "steps.png")
        sentences = list(dict.fromkeys([args.sentence, *args.others]))
        before, after = cosines(model, processor, [pictures[0], pictures[-1]], sentences)
        found = {text: {"before": before[text], "after": after[text]} for text in sentences}
        config = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
        facts = {"cosines": found, "seconds": seconds, "config": hide_paths(config)}
        facts |= {"device": device_description(model.device), "versions": package_versions("diffusers")}
        write_json(folder / "results.json", facts)
    return found


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(GuideArguments, __doc__, argv)
    found = guide(args)
    print("cosine of picture and sentence, before and after")
    for text, values in found.items():
        print(f"  {values['before']:6.3f}  {values['after']:6.3f}   {text}")
    print(f"Pictures: {args.output_dir}")


if __name__ == "__main__":
    run_command(main)
