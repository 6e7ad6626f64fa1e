"""One step: the whole contrastive batch under one loss, and the recipe's optimiser around it."""

import math

import torch
from torch import Tensor
from transformers import BatchFeature

from modeling_capivara import CapivaraModel, CapivaraProcessor
from training.arguments import RunArguments

MAX_LOGIT_SCALE = math.log(100)  # CLIP (arXiv 2103.00020), section 2.5: logits are scaled by 100 at most


def resolve_precision(requested: str, device: torch.device) -> str:
    """ "auto" as "bf16" where the device computes in it natively, else "no"; anything else as it is.

    Without instructions of its own for bfloat16 a CPU emulates it, and is slower than in float32.
    """
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if native else "no"


def micro_batches(processor: CapivaraProcessor, captions: list[str], size: int) -> tuple[list[BatchFeature], list[int]]:
    """Captions tokenised and cut in order of length, each micro-batch padded to its own longest.

    Returns:
        The micro-batches, and the order: position in them -> index in `captions`.
    """
    tokens = [processor(text=caption) for caption in captions]
    order = sorted(range(len(captions)), key=lambda i: len(tokens[i]["input_ids"]))
    batches = []
    for start in range(0, len(order), size):
        rows = [dict(tokens[i]) for i in order[start : start + size]]
        batches.append(processor.tokenizer.pad(rows, return_tensors="pt"))
    return batches, order


def text_embeddings(model, batches: list[BatchFeature]) -> Tensor:
    """Texts of all micro-batches in the shared space; the graph of all of them is kept.

    Args:
        model: as Accelerate prepared it; it is called, never a method of it, so that gradients are averaged.
        batches: of `micro_batches`.

    Returns:
        (texts, width), unit length, in the order of the micro-batches.
    """
    return torch.cat([model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).text_embeds for b in batches])


def build_optimizer(model: CapivaraModel, args: RunArguments) -> torch.optim.Adam:
    """Adam with coupled L2 over everything that is trained (CAPIVARA, arXiv 2310.13683, appendix)."""
    return torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,  # one pass over the 100 million word embeddings instead of ten
    )


def learning_rate_at(step: int, args: RunArguments) -> float:
    """Learning rate of a step (counted from 0): linear from the floor to the top, then cosine back to the floor."""
    low, high = args.min_learning_rate, args.learning_rate
    if step < args.warmup_steps:
        return low + (high - low) * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(args.max_steps - args.warmup_steps, 1)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep the scale from 0 to ln 100, after every optimiser step."""
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)
