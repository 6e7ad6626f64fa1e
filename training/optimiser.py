"""The recipe's optimiser, its schedule and its clamp."""

import math

import torch
from torch import Tensor, nn

from training.arguments import FIXED, RunArguments

MAX_LOGIT_SCALE = math.log(100)  # CLIP (arXiv 2103.00020), section 2.5: logits are scaled by 100 at most
# Sum of the learning rates of the published 5863 steps (arXiv 2310.13683); their mean is that of floor and top.
PAPER_DISTANCE = 5863 * (1e-7 + 5e-7) / 2
BETAS = (FIXED["adam_beta1"], FIXED["adam_beta2"])  # of Adam, in every recipe of arXiv 2310.13683
LEAST_SHARE = 0.1  # of it; a run of less gets a warning
OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(model: nn.Module, args: RunArguments) -> torch.optim.Optimizer:
    """The optimiser over everything that is trained.

    "adam" is the paper's: Adam with coupled L2 (CAPIVARA, arXiv 2310.13683, appendix); "adamw" decouples it.
    """
    return OPTIMISERS[args.optimizer](
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=BETAS,
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,  # one pass over the 190 million word embeddings instead of ten
    )


def learning_rate_at(step: int, args: RunArguments) -> float:
    """Learning rate of a step (counted from 0): linear from the floor to the top, then cosine back to the floor."""
    low, high = args.min_learning_rate, args.learning_rate
    if step < args.warmup_steps:
        return low + (high - low) * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(args.max_steps - args.warmup_steps, 1)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def will_not_learn(args: RunArguments) -> str | None:
    """The warning for a run whose steps times rate are too few to change the model; None for any other.

    Adam's step is about the learning rate, whatever the gradient: their sum is how far a run can move a weight.
    """
    distance = sum(learning_rate_at(step, args) for step in range(args.max_steps))
    share = distance / PAPER_DISTANCE
    if share >= LEAST_SHARE:
        return None
    return (
        f"{args.max_steps} steps with a learning_rate of at most {args.learning_rate:g} move a weight by "
        f"{distance:.1g} at most, {100 * share:.1g} % of what the published recipe does: the model will hardly change. "
        f"For so few steps set --learning_rate to about {args.learning_rate / share:.0e}, or give more --max_steps."
    )


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep the scale from 0 to ln 100, after every optimiser step."""
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)
