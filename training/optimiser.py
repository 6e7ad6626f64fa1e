"""The recipe's optimiser, its schedule and its clamp."""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.arguments import RunArguments

MAX_LOGIT_SCALE = math.log(100)  # CLIP (arXiv 2103.00020), section 2.5: logits are scaled by 100 at most
# Sum of the learning rates of the published 5863 steps (arXiv 2310.13683); their mean is that of floor and top.
PAPER_REACH = 5863 * (1e-7 + 5e-7) / 2
LEAST_SHARE = 0.1  # of it; a run of less gets a warning
LAYER = re.compile(r"\blayers?\.(\d+)\.")  # number of a transformer's layer, in a parameter's name
OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(model: nn.Module, args: RunArguments) -> torch.optim.Optimizer:
    """The optimiser over everything that is trained; the `rate` of a group is its share of the learning rate.

    "adam" is the paper's: Adam with coupled L2 (CAPIVARA, arXiv 2310.13683, appendix); "adamw" decouples it. The decay
    is towards zero, or towards the weights that the parameters have now.
    """
    towards_base = args.decay_towards == "base" and args.weight_decay > 0
    optimizer = OPTIMISERS[args.optimizer](
        _groups(model, args.layer_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=0.0 if towards_base else args.weight_decay,
        fused=True,  # one pass over the 190 million word embeddings instead of ten
    )
    if towards_base:
        optimizer.register_step_pre_hook(_decay_towards_now(optimizer, args))
    return optimizer


def _groups(model: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """The trained parameters, those of a tower's layer at `layer_decay` times the rate of the layer above it.

    The projections have the whole rate, and the embeddings that of a layer below the first.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if layer_decay == 1:
        return [{"params": [parameter for _, parameter in trained], "rate": 1.0}]
    numbers = {name: int(found[1]) for name, _ in trained if (found := LAYER.search(name))}
    top = max(numbers.values(), default=-1) + 1
    by_depth: dict[int, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trained:
        by_depth[-1 if "embeddings" in name else numbers.get(name, top)].append(parameter)
    return [{"params": found, "rate": layer_decay ** (top - depth)} for depth, found in sorted(by_depth.items())]


def _decay_towards_now(optimizer: torch.optim.Optimizer, args: RunArguments) -> Callable:
    """A hook before each step: pulls parameters to what they are now, by the gradient or, with adamw, apart from it."""
    before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]

    @torch.no_grad()
    def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None and optimizer.found_inf.item():
            return  # fp16's scaler leaves this step out
        for group, bases in zip(optimizer.param_groups, before, strict=True):
            for parameter, base in zip(group["params"], bases, strict=True):
                if args.optimizer == "adamw":
                    parameter.lerp_(base, group["lr"] * args.weight_decay)
                elif parameter.grad is not None:
                    parameter.grad.add_(parameter - base, alpha=args.weight_decay)

    return pull


def learning_rate_at(step: int, args: RunArguments) -> float:
    """Learning rate of a step (counted from 0): linear from the floor to the top, then cosine back to the floor."""
    low, high = args.min_learning_rate, args.learning_rate
    if step < args.warmup_steps:
        return low + (high - low) * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(args.max_steps - args.warmup_steps, 1)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def reach(args: RunArguments) -> float:
    """How far a run can move a weight: Adam's step is about the learning rate, whatever the gradient."""
    return sum(learning_rate_at(step, args) for step in range(args.max_steps))


def hopeless_rate(args: RunArguments) -> str | None:
    """The warning for a run whose steps times rate are too few to change the model; None for any other."""
    share = reach(args) / PAPER_REACH
    if share >= LEAST_SHARE:
        return None
    return (
        f"{args.max_steps} steps with a learning_rate of at most {args.learning_rate:g} move a weight by "
        f"{reach(args):.1g} at most, {100 * share:.1g} % of what the published recipe does: the model will hardly "
        f"change. For so few steps set --learning_rate to about {args.learning_rate / share:.0e}, or give more "
        "--max_steps."
    )


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep the scale from 0 to ln 100, after every optimiser step."""
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)
