"""Prepare the weights of a model for training, and update them.

The functions of this module select the trainable parameters, add LoRA adapters, build the optimizer, compute the
learning-rate schedule, and interpolate weights between base and trained model.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_capivara.two_towers import IMAGE_ENCODER_PREFIXES, freeze_image_encoder, uses_sigmoid_loss
from training.arguments import RunArguments

# Logarithm of the largest factor by which CLIP multiplies cosines to get logits (arXiv 2103.00020, section 2.5).
MAX_LOGIT_SCALE = math.log(100)
ADAM_BETAS = (0.9, 0.98)  # as in every recipe of CAPIVARA (arXiv 2310.13683)
# Modules that are trained in full while LoRA adapters are trained in other layers: the text projection, as in CAPIVARA
# (arXiv 2310.13683), and `text_model.head`, which is the text projection of SigLIP.
FULLY_TRAINED_MODULES = ["text_projection", "text_model.head"]
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
# Texts such as ".base_layer" that peft inserts into the names of parameters. They are removed from a name before it is
# compared with a user's regular expressions, so that the same expressions work with and without LoRA adapters.
_PEFT_INFIX_RE = re.compile(r"\.(base_layer|modules_to_save\.default|lora_[AB]\.default)")


def freeze_parameters_and_add_adapters(model: PreTrainedModel, args: RunArguments) -> nn.Module:
    """Freeze the image encoder and selected parameters, and add LoRA adapters if `args.lora_rank` is above 0.

    `args.frozen_parameters` has regular expressions for parameter names. With a sigmoid loss (SigLIP), logit scale and
    logit bias are frozen, too, unless "none" is in the list.

    Args:
        model: Model with a text encoder and an image encoder. It is changed in place.
        args: Arguments of the run.

    Returns:
        peft's wrapper around the model if adapters were added, otherwise the model itself.

    Raises:
        ValueError: If a regular expression is invalid or matches no parameter, or no parameter is left to train.
    """
    freeze_image_encoder(model)
    names, frozen = [name for name, _ in model.named_parameters()], args.frozen_parameters
    if "none" not in frozen and uses_sigmoid_loss(model):
        frozen = [*frozen, "logit_scale", "logit_bias"]
    frozen = [expression for expression in frozen if expression != "none"]
    for expression in frozen:
        if not _match_names(expression, names, "frozen_parameters"):
            examples = names[:: max(1, len(names) // 6)]
            raise ValueError(
                f"frozen_parameters must match names of parameters, got {expression!r}. Examples: {examples}."
            )
    wrapped = _add_adapters(model, args) if args.lora_rank else model
    # Parameters are frozen only after adapters are added. In the opposite order, peft would make the parameters of
    # `FULLY_TRAINED_MODULES` trainable again.
    for name, parameter in model.named_parameters():
        if any(re.fullmatch(expression, _PEFT_INFIX_RE.sub("", name)) for expression in frozen):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("No parameter is left to train: frozen_parameters matches all of them. Use fewer expressions.")
    return wrapped


def fixed_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the hyperparameters that are constants in the code. The file run.json stores them under the key `fixed`.

    Args:
        model: The model that is trained.

    Returns:
        A dict with "adam_beta1", "adam_beta2" and "lora_modules_to_save", the names of the modules that are trained in
        full while other layers have LoRA adapters.
    """
    # Together with the flags, which run.json stores too, these settings describe a run completely.
    beta1, beta2 = ADAM_BETAS
    return {"adam_beta1": beta1, "adam_beta2": beta2, "lora_modules_to_save": _find_fully_trained_modules(model)}


@torch.no_grad()
def interpolate_weights(model: PreTrainedModel, base: dict[str, Tensor], share: float) -> None:
    """Set the weights of a trained model to the weighted mean of trained and base weights.

    The method is WiSE-FT (arXiv 2109.01903, section 3).

    Args:
        model: Trained model. It is changed in place.
        base: State dict of the base model, with the same names and shapes as the state dict of `model`.
        share: Weight of the trained model, from 0 (base) to 1 (unchanged).
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(base[name].to(tensor.device), tensor, share))


def _add_adapters(model: PreTrainedModel, args: RunArguments) -> nn.Module:
    """Add LoRA adapters to linear layers of the text encoder. The image encoder never gets adapters.

    Args:
        model: The model. It is changed in place.
        args: Arguments of the run; `lora_rank`, `lora_alpha` and `lora_targets` are used.

    Returns:
        peft's wrapper around the model.

    Raises:
        ValueError: If `args.lora_targets` matches no linear layer of the text encoder.
    """
    from peft import LoraConfig, get_peft_model

    targets, modules = args.lora_targets, _find_fully_trained_modules(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if not name.startswith(IMAGE_ENCODER_PREFIXES)]
    if not _match_names(targets, linear, "lora_targets"):
        raise ValueError(
            f"lora_targets must name linear layers of the text tower, got {targets!r}. Example: {linear[-1]!r}."
        )
    config = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=targets, modules_to_save=modules)
    return get_peft_model(model, config)


def _find_fully_trained_modules(model: PreTrainedModel) -> list[str]:
    """Return which of the modules in `FULLY_TRAINED_MODULES` the model has, as a list of names."""
    return [name for name, _ in model.named_modules() if name in FULLY_TRAINED_MODULES]


def _match_names(expression: str, names: list[str], key: str) -> list[str]:
    """Return the names that a regular expression matches in full.

    Args:
        expression: The regular expression.
        names: Names of parameters or modules.
        key: Command-line argument that the expression comes from, for the error message.

    Raises:
        ValueError: If the regular expression is invalid.
    """
    try:
        return [name for name in names if re.fullmatch(expression, name)]
    except re.error as error:
        raise ValueError(f"{key} must be a valid regular expression, got {expression!r} ({error}).") from error


def build_optimizer(model: nn.Module, args: RunArguments) -> torch.optim.Optimizer:
    """Build the Adam or AdamW optimizer for all trainable parameters of a model.

    Args:
        model: Model whose parameters with `requires_grad` are trained.
        args: Arguments of the run. The optimizer "adam" is Adam with coupled L2 regularization, as in the appendix of
            CAPIVARA (arXiv 2310.13683). "adamw" is Adam with decoupled weight decay.
    """
    return OPTIMIZERS[args.optimizer](
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=ADAM_BETAS,
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        # A fused optimizer updates the weights in one pass instead of about ten. This matters, because the token
        # embeddings alone have 190 million numbers.
        fused=True,
    )


def learning_rate_at(step: int, args: RunArguments) -> float:
    """Return the learning rate of an optimizer step.

    The learning rate rises linearly from `args.min_learning_rate` to `args.learning_rate` in the first
    `args.warmup_steps` steps. It then falls along a cosine, back to `args.min_learning_rate` at `args.max_steps`.

    Args:
        step: Optimizer step, counted from 0.
        args: Arguments of the run.
    """
    low, high = args.min_learning_rate, args.learning_rate
    if step < args.warmup_steps:
        return low + (high - low) * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(args.max_steps - args.warmup_steps, 1)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Clamp the logit scale to the range from 0 to ln 100, in place, as CLIP does after every optimizer step.

    Args:
        logit_scale: Natural logarithm of the factor by which logits are multiplied, a scalar.
    """
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)
