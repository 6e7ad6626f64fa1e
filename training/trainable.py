"""What of the model is trained: towers, layers or adapters; and the way back towards the base."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling_capivara import CapivaraModel
from training.arguments import FIXED, RunArguments

WHOLE = FIXED["lora_modules_to_save"]  # what is trained as a whole beside adapters, as in arXiv 2310.13683
_PEFT_NAMES = re.compile(r"\.(base_layer|modules_to_save\.default|lora_[AB]\.default)")  # in names of a wrapped model


def prepare_trainable(model: CapivaraModel, args: RunArguments) -> nn.Module:
    """Freeze what is not trained; with `lora_rank`, put adapters on the model.

    Returns:
        The model, or peft's wrapper around it. `model` itself has the adapters' layers then.

    Raises:
        ValueError: an expression matches nothing, a module does not exist, or nothing is left to train.
    """
    model.freeze_image_tower()
    names = [name for name, _ in model.named_parameters()]
    for expression in args.frozen_parameters:
        if not any(_full_match(expression, name, "frozen_parameters") for name in names):
            raise ValueError(
                f"frozen_parameters: {expression!r} matches no parameter. There are, among others, "
                f"{names[:: max(1, len(names) // 6)]}."
            )
    wrapped = _with_adapters(model, args) if args.lora_rank else model
    for name, parameter in model.named_parameters():  # also what peft has made trainable
        if any(re.fullmatch(expression, _PEFT_NAMES.sub("", name)) for expression in args.frozen_parameters):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing is left to train: frozen_parameters match everything that is not frozen already.")
    return wrapped


def set_training_mode(model: nn.Module) -> None:
    """Training mode, but batch norms keep their statistics: a batch is run in parts, some of them twice."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def merge_adapters(wrapped: nn.Module, folder: Path | None = None) -> CapivaraModel:
    """The plain model with the adapters' updates in its weights; the model itself where it has no adapters.

    In `folder`, if it is given, they are kept in peft's own format, safetensors.
    """
    if not hasattr(wrapped, "peft_config"):
        return wrapped
    if folder is not None:
        wrapped.save_pretrained(folder / "adapter")
    return wrapped.merge_and_unload()


@torch.no_grad()
def interpolate_weights(model: CapivaraModel, base: dict[str, Tensor], share: float) -> None:
    """Move the weights of a trained model back, in place: `share` (0 to 1) of them, the rest of the base's state.

    Source: Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT, arXiv 2109.01903), section 3.
    """
    if share == 1:
        return
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(base[name].to(tensor.device), tensor, share))


def _with_adapters(model: CapivaraModel, args: RunArguments) -> nn.Module:
    """peft's wrapper; of itself it passes over modules that are none, and over adapters of a tower that is frozen."""
    from peft import LoraConfig, get_peft_model

    modules, frozen = dict(model.named_modules()), ("vision_model", "visual_projection")
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    matched = [name for name in linear if _full_match(args.lora_targets, name, "lora_targets")]
    if not matched:
        raise ValueError(f"lora_targets: {args.lora_targets!r} matches no linear layer, such as {linear[-1]!r}.")
    if all(name.startswith(frozen) for name in matched):
        raise ValueError(
            f"lora_targets: {args.lora_targets!r} matches the frozen image tower alone, such as {matched[0]!r}."
        )
    config = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, bias="none", target_modules=args.lora_targets,
        modules_to_save=WHOLE,
    )  # fmt: skip
    return get_peft_model(model, config)


def _full_match(expression: str, name: str, key: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error as error:
        raise ValueError(f"{key}: {expression!r} is no regular expression ({error}).") from error
