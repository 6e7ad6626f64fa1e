"""A latent diffusion pipeline of diffusers, steered by CAPIVARA towards a sentence in Portuguese.

    python -m examples.diffusion_guidance --pipeline PIPELINE --model MODEL --sentence "um gato na praia"

After each step but the first the latents are moved up the gradient of the cosine of the sentence and the picture that
they will become. Two latents in a row of DDIM (arXiv 2010.02502, equation 12, without its random part) tell which
picture that is: no second pass through the UNet is needed, and none is differentiated. The command makes the picture
twice with one seed, without and with `SentenceGuidance`, and prints the cosine of both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capivara_common.cli import at_least, between, flag, parse, run_command
from capivara_common.environment import require, torch_device
from capivara_common.files import whole_folder
from examples.guide_generation import to_pixel_values
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts


@dataclass
class DiffusionArguments:
    """Arguments of `examples.diffusion_guidance`."""

    pipeline: str = flag(..., "Folder or Hub id of a latent diffusion pipeline with weights in safetensors.")
    sentence: str = flag(..., "What the picture shall show, in Portuguese.")
    prompt: str = flag("", "What the pipeline itself is told, in its own language.")
    model: str = flag("data/openmoji/base", "Folder or Hub id of a CAPIVARA model.")
    output_dir: Path = flag(Path("runs/guided-pipeline"), "Folder for plain.png and guided.png.")
    steps: int = flag(50, "Steps of the pipeline; the first one is not guided.")
    size: int = flag(512, "Pixels a side.")
    scale: float = flag(0.1, "How far a step is moved, as a share of the latents' length.")
    seed: int = flag(0, "Seed of the noise.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        at_least(self, 2, "steps")
        between(self, 0, 1, "scale")


class SentenceGuidance:
    """`callback_on_step_end` of a latent diffusion pipeline with a `DDIMScheduler`, whose device the model is on.

    `scale` is how far a step is moved, as a share of the latents' length, where they are all noise; in proportion to
    the noise that is left it becomes less. `cosines` are those of the sentence and the picture that the latents would
    have become, after each step but the first.
    """

    def __init__(self, model: CapivaraModel, processor: CapivaraProcessor, sentence: str, scale: float = 0.1):
        self.model, self.image_processor, self.scale = model, processor.image_processor, scale
        self.target = embed_texts(model, processor, [sentence]).clone().to(model.device)  # a clone takes gradients
        self.cosines: list[float] = []
        self._last: Tensor | None = None  # the latents that the step in progress began with

    def __call__(self, pipe: Any, step: int, timestep: int | Tensor, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Move `latents`, (pictures, channels, height, width); diffusers calls this after each step.

        Raises:
            ValueError: the pipeline has no decoder of latents, or its scheduler is none that can be looked ahead of.
        """
        latents = callback_kwargs["latents"]
        if step == 0:
            _check(pipe)
            self.cosines, self._last = [], None
        if self._last is not None:
            latents = self._moved(pipe, self._last, latents, int(timestep))
        self._last = latents.detach().clone()
        return callback_kwargs | {"latents": latents}

    def _moved(self, pipe: Any, before: Tensor, latents: Tensor, timestep: int) -> Tensor:
        kept = signal_shares(pipe.scheduler, timestep)
        clean = clean_latents(before.float(), latents.float(), *kept)
        with torch.enable_grad():  # a pipeline runs without
            clean = clean.detach().requires_grad_()
            pixels = decoded(pipe.vae, clean)
            embeds = self.model(pixel_values=to_pixel_values(pixels, self.image_processor)).image_embeds
            cosine = (embeds @ self.target.T).squeeze(1)  # (pictures,)
            (gradient,) = torch.autograd.grad(cosine.sum(), clean)
        self.cosines.append(cosine.mean().item())
        share = self.scale * (1 - kept[1]) ** 0.5  # of the latents' length
        way = share * _lengths(latents.float()) * gradient / _lengths(gradient).clamp_min(1e-12)
        return latents + way.to(latents.dtype)


def _lengths(latents: Tensor) -> Tensor:
    """(pictures, 1, 1, 1), the Euclidean length of each."""
    return torch.linalg.vector_norm(latents, dim=(1, 2, 3), keepdim=True)


def signal_shares(scheduler: Any, timestep: int) -> tuple[float, float]:
    """Share of the picture's variance in the latents before and after DDIM's step at `timestep` (its alpha-bar)."""
    after = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    final = scheduler.final_alpha_cumprod if after < 0 else scheduler.alphas_cumprod[after]
    return float(scheduler.alphas_cumprod[timestep]), float(final)


def clean_latents(before: Tensor, after: Tensor, share_before: float, share_after: float) -> Tensor:
    """The latents without noise that DDIM's step has predicted, out of those before and after it.

    Both are sqrt(share) * clean + sqrt(1 - share) * noise, with the same clean latents and the same noise.
    """
    noise = (1 - share_before) ** 0.5, (1 - share_after) ** 0.5
    weight = noise[1] * share_before**0.5 - noise[0] * share_after**0.5
    return (noise[1] * before - noise[0] * after) / weight


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Latents without noise as pictures, (pictures, 3, height, width), 0 to 1."""
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


def _check(pipe: Any) -> None:
    if not hasattr(getattr(pipe, "vae", None), "decode"):
        raise ValueError(f"{type(pipe).__name__} has no `vae` that decodes latents; guidance needs a latent pipeline.")
    config = pipe.scheduler.config
    plain = not (getattr(config, "clip_sample", False) or getattr(config, "thresholding", False))
    if type(pipe.scheduler).__name__ != "DDIMScheduler" or not plain:
        raise ValueError(
            f"The pipeline's scheduler is a {type(pipe.scheduler).__name__}; guidance needs a DDIMScheduler that does "
            "not clip: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, "
            "thresholding=False)."
        )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(DiffusionArguments, __doc__, argv)
    require("examples.diffusion_guidance", "guidance", "diffusers")
    from diffusers import DDIMScheduler, DiffusionPipeline

    with whole_folder(args.output_dir) as folder:
        model, processor = load_model(args.model).eval().to(torch_device(args.device)), load_processor(args.model)
        model.requires_grad_(False)
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True).to(model.device)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)
        pipe.vae.requires_grad_(False)
        guidance = SentenceGuidance(model, processor, args.sentence, args.scale)
        texts = embed_texts(model, processor, [args.sentence])
        for name, callback in {"plain": None, "guided": guidance}.items():
            picture = pipe(
                args.prompt, num_inference_steps=args.steps, height=args.size, width=args.size,
                generator=torch.Generator().manual_seed(args.seed), callback_on_step_end=callback,
            ).images[0]  # fmt: skip
            picture.save(folder / f"{name}.png")
            print(f"{name}: cosine {(embed_images(model, processor, [picture]) @ texts.T).item():.3f}")


if __name__ == "__main__":
    run_command(main)
