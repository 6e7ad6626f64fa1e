"""The loop over optimiser steps."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from modeling_capivara import CapivaraModel, CapivaraProcessor, clip_loss
from training.arguments import RunArguments
from training.data import batch_indices, drawn_captions
from training.step import build_optimizer, clamp_logit_scale, learning_rate_at, micro_batches, text_embeddings


def train(
    args: RunArguments,
    seed: int,
    model: CapivaraModel,
    processor: CapivaraProcessor,
    captions: list[list[str]],
    image_embeds: Tensor,
    accelerator: Accelerator,
    validate: Callable[[CapivaraModel], dict[str, float]],
) -> list[dict]:
    """Fine-tune the text tower of `model`, in place, against the embeddings of a frozen image tower.

    Everything random is a function of seed and step, so that step n is the same whatever was computed before it.

    Args:
        args: of the run.
        seed: of order, captions and dropout.
        model: its image tower is frozen here.
        processor: the model's own.
        captions: a list of captions for each image.
        image_embeds: (images, projection_dim), unit length.
        accelerator: device, precision and processes.
        validate: measures the model, direction -> share; called before the first step and every `eval_steps`.

    Returns:
        The curve: an entry a step, see `eval.plots.plot_training_curves`.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    model.freeze_image_tower()
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    image_embeds = image_embeds.to(accelerator.device)
    curve = [{"step": 0, "validation": validate(model)}]
    pairs = args.max_steps * args.effective_batch_size
    with tqdm(total=pairs, desc=f"Training, seed {seed}", unit="pair", unit_scale=True) as bar:
        for step in range(args.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, args)
            rows = batch_indices(step, args.effective_batch_size, len(captions), seed)
            drawn = drawn_captions(captions, rows, step, seed)
            batches, order = micro_batches(processor, drawn, args.micro_batch_size)
            images = image_embeds[torch.as_tensor(rows[order])]  # (pairs, width), in the order of the texts
            torch.manual_seed((seed << 32) + step)  # dropout
            loss = optimiser_step(prepared, model.logit_scale, batches, images, optimizer, accelerator)
            curve.append({"step": step + 1, "loss": loss, "learning_rate": learning_rate_at(step, args)})
            curve[-1]["logit_scale"] = model.logit_scale.item()
            if (step + 1) % args.eval_steps == 0 or step + 1 == args.max_steps:
                curve[-1]["validation"] = validate(model)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{curve[-1]['learning_rate']:.1e}")
            bar.update(args.effective_batch_size)
    # Without Accelerate's autocast around `forward`: base and result are measured in the same precision.
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()
    return curve


def optimiser_step(
    model: torch.nn.Module,
    logit_scale: Tensor,
    batches: list[dict[str, Tensor]],
    image_embeds: Tensor,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> float:
    """One step on one contrastive batch; returns its loss in nats.

    Args:
        model: as Accelerate prepared it.
        logit_scale: the model's parameter.
        batches: micro-batches of token ids and masks.
        image_embeds: (pairs, width), unit length, in the order of the micro-batches.
        optimizer: as Accelerate prepared it.
        accelerator: of the run.
    """
    model.train()
    batches = [batch.to(accelerator.device) for batch in batches]
    loss = clip_loss(text_embeddings(model, batches), image_embeds, logit_scale)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"The loss is {loss.item()}. Lower the learning rate or use --mixed_precision no.")
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    clamp_logit_scale(logit_scale)
    return loss.item()
