"""What of the model is trained and by which steps: layers or adapters, optimiser, schedule, and the way back."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_capivara.two_towers import IMAGE_ENCODER_PREFIXES, freeze_image_encoder, uses_sigmoid_loss
from training.arguments import RunArguments

MAX_LOGIT_SCALE = math.log(100)  # CLIP (arXiv 2103.00020), section 2.5: logits are scaled by 100 at most
ADAM_BETAS = (0.9, 0.98)  # of Adam, in every recipe of arXiv 2310.13683
# What is trained as a whole beside adapters: the projection as in arXiv 2310.13683, and what SigLIP has for it
FULLY_TRAINED_MODULES = ["text_projection", "text_model.head"]
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_PEFT_INFIX_RE = re.compile(
    r"\.(base_layer|modules_to_save\.default|lora_[AB]\.default)"
)  # in names of a wrapped model


def prepare_trainable(model: PreTrainedModel, args: RunArguments) -> nn.Module:
    """Freeze what is not trained; with `lora_rank`, put adapters on the model and return peft's wrapper around it.

    Raises ValueError where an expression matches nothing, or nothing is left to train.
    """
    freeze_image_encoder(model)
    names, frozen = [name for name, _ in model.named_parameters()], args.frozen_parameters
    if "none" not in frozen and uses_sigmoid_loss(model):
        frozen = [*frozen, "logit_scale", "logit_bias"]
    frozen = [expression for expression in frozen if expression != "none"]
    for expression in frozen:
        if not _match_names(expression, names, "frozen_parameters"):
            some = names[:: max(1, len(names) // 6)]
            raise ValueError(
                f"frozen_parameters: {expression!r} matches no parameter. There are, among others, {some}."
            )
    wrapped = _add_adapters(model, args) if args.lora_rank else model
    for name, parameter in model.named_parameters():  # also what peft has made trainable
        if any(re.fullmatch(expression, _PEFT_INFIX_RE.sub("", name)) for expression in frozen):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing is left to train: frozen_parameters match everything that is not frozen already.")
    return wrapped


def fixed_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What a run states beside its settings, under the names that it had when these were settings."""
    return {
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "lora_modules_to_save": find_fully_trained_modules(model),
    }


@torch.no_grad()
def interpolate_weights(model: PreTrainedModel, base: dict[str, Tensor], share: float) -> None:
    """Move the weights of a trained model back, in place: `share` (0 to 1) of them, the rest of the base's state.

    Source: Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT, arXiv 2109.01903), section 3.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(base[name].to(tensor.device), tensor, share))


def _add_adapters(model: PreTrainedModel, args: RunArguments) -> nn.Module:
    """peft's wrapper; of itself it would train adapters of the image tower alone, which is not run in training."""
    from peft import LoraConfig, get_peft_model

    rank, alpha, targets = args.lora_rank, args.lora_alpha, args.lora_targets
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if not name.startswith(IMAGE_ENCODER_PREFIXES)]
    if not _match_names(targets, linear, "lora_targets"):
        raise ValueError(f"lora_targets: {targets!r} matches no linear layer of the text tower, like {linear[-1]!r}.")
    return get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, modules_to_save=find_fully_trained_modules(model)),
    )


def find_fully_trained_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that are trained as a whole beside adapters."""
    return [name for name, _ in model.named_modules() if name in FULLY_TRAINED_MODULES]


def _match_names(expression: str, names: list[str], key: str) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(expression, name)]
    except re.error as error:
        raise ValueError(f"{key}: {expression!r} is no regular expression ({error}).") from error


def merge_adapters(wrapped: nn.Module, folder: Path | None = None) -> PreTrainedModel:
    """The plain model with the adapters' updates in its weights; the model itself where it has no adapters.

    In `folder`, if it is given, they are kept in peft's own format, safetensors.
    """
    if not hasattr(wrapped, "peft_config"):
        return wrapped
    if folder is not None:
        wrapped.save_pretrained(folder / "adapter")
    return wrapped.merge_and_unload()


def build_optimizer(model: nn.Module, args: RunArguments) -> torch.optim.Optimizer:
    """The optimiser over everything that is trained.

    "adam" is the paper's: Adam with coupled L2 (CAPIVARA, arXiv 2310.13683, appendix); "adamw" decouples it.
    """
    return OPTIMIZERS[args.optimizer](
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=ADAM_BETAS,
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


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep the scale from 0 to ln 100, after every optimiser step."""
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)
