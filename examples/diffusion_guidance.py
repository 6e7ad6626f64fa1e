"""A latent diffusion pipeline of diffusers, steered by CAPIVARA towards a sentence in Portuguese.

    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(...)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    guidance = SentenceGuidance(model, processor, "um gato na praia")
    pipe("", callback_on_step_end=guidance).images

After each step but the first the latents are moved up the gradient of the cosine of the sentence and the picture that
they will become. Two latents in a row of DDIM (arXiv 2010.02502, equation 12, without its random part) tell which
picture that is: no second pass through the UNet is needed, and none is differentiated.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from capivara_common.hub_cache import check_reachable
from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.two_towers import embed_texts


def sentence_target(model: CapivaraModel, processor: CapivaraProcessor, sentence: str) -> Tensor:
    """(1, width), the embedding of a sentence, a copy that gradients may be computed with: `embed_texts` makes none."""
    return embed_texts(model, processor, [sentence]).clone().to(model.device)


def to_pixel_values(pixels: Tensor, image_processor: CapivaraImageProcessor) -> Tensor:
    """What `CapivaraImageProcessor` does to square pictures, so that gradients flow back to them.

    The resize is torch's antialiased bicubic one, which is PIL's but for its roundings to eight bits.

    Args:
        pixels: (pictures, 3, side, side), 0 to 1.
        image_processor: the model's own.

    Returns:
        (pictures, 3, height, width) of its crop.

    Raises:
        ValueError: the pictures are not square.
    """
    if pixels.shape[-1] != pixels.shape[-2]:
        height, width = pixels.shape[-2:]
        raise ValueError(f"Pictures that are guided must be square, got {width} x {height} pixels.")
    side, crop = image_processor.size["shortest_edge"], image_processor.crop_size
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((side - crop["height"]) / 2), round((side - crop["width"]) / 2)
    pixels = pixels[..., top : top + crop["height"], left : left + crop["width"]]
    mean, std = (
        torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1)
        for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels - mean) / std


class SentenceGuidance:
    """`callback_on_step_end` of a latent diffusion pipeline with a `DDIMScheduler`.

    Args:
        model: in evaluation mode, on the pipeline's device; its parameters get no gradients where they need none.
        processor: the model's own.
        sentence: what the picture shall show.
        scale: how far a step is moved, as a share of the latents' length, where they are all noise; in proportion to
            the noise that is left it becomes less.

    Attributes:
        cosines: after each step but the first, of the sentence and the picture that the latents would have become.
    """

    def __init__(self, model: CapivaraModel, processor: CapivaraProcessor, sentence: str, scale: float = 0.1):
        self.model, self.image_processor, self.scale = model, processor.image_processor, scale
        self.target = sentence_target(model, processor, sentence)
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


def guided_pipeline(source: str, device: torch.device) -> Any:
    """A pipeline of diffusers, its scheduler replaced by DDIM, its weights safetensors.

    Raises:
        ValueError: there is none, or it is of another kind.
    """
    check_reachable(source, "model_index.json")
    from diffusers import DDIMScheduler, DiffusionPipeline  # here: the extra `guidance` has it, and it takes seconds

    try:
        pipe = DiffusionPipeline.from_pretrained(source, use_safetensors=True).to(device)
    except (OSError, ValueError, AttributeError) as error:  # the last one: a class that this version has not
        raise ValueError(
            f"{source} can't be loaded as a pipeline of diffusers: {' '.join(str(error).split())}"
        ) from error
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)
    _check(pipe)
    pipe.vae.requires_grad_(False)
    return pipe


def run_pipeline(pipe: Any, prompt: str, steps: int, size: int, seed: int, guidance: SentenceGuidance | None):
    """One picture, a PIL image of `size` pixels a side; the same noise for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    options = {"callback_on_step_end": guidance} if guidance else {}
    return pipe(prompt, num_inference_steps=steps, height=size, width=size, generator=generator, **options).images[0]
