"""What training, evaluation, search and export ask of a model of two towers, of this package or of transformers.

    model, processor = load_model(folder), load_processor(folder)
    text_embeds(model, **pad(processor, tokenise(processor, ["uma foto de um gato"])))  # (texts, width), unit length

The classes are transformers' own, without a wrapper: `get_text_features` and `get_image_features`, whose
`pooler_output` is the embedding before it is scaled to unit length, `logit_scale`, and `logit_bias` where the loss is
SigLIP's (arXiv 2303.15343, section 3).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from capivara_common.image_side_digest import IMAGE_SIDE

from .image_classification_capivara import unit_length
from .processing_capivara import CapivaraProcessor


def is_sigmoid(model: nn.Module) -> bool:
    """Whether the loss of its training is SigLIP's, over pairs, and not CLIP's, over rows."""
    return getattr(model, "logit_bias", None) is not None


def class_and_loss(model: nn.Module) -> dict[str, str]:
    """What records and cards say of a model: its `model_class`, and its `loss`, "sigmoid" or "contrastive"."""
    return {"model_class": type(model).__name__, "loss": "sigmoid" if is_sigmoid(model) else "contrastive"}


def embedding_width(config: PreTrainedConfig) -> int:
    """Numbers of one embedding."""
    return config.text_config.projection_size if config.model_type == "siglip" else config.projection_dim


def freeze_image_side(model: PreTrainedModel) -> None:
    """Let the image tower and its projection get no gradient; CAPIVARA's also stays in evaluation mode, then."""
    if hasattr(model, "freeze_image_tower"):
        return model.freeze_image_tower()
    for name, parameter in model.named_parameters():
        if name.startswith(IMAGE_SIDE):
            parameter.requires_grad_(False)


def text_embeds(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(texts, width), unit length, float32.

    Args:
        model: or a wrapper that has its methods, as peft's.
        input_ids: (texts, tokens), as `pad` gives them.
        attention_mask: (texts, tokens), 1 for a token and 0 for padding; None where padding is read as any token.
    """
    return unit_length(model.get_text_features(input_ids, attention_mask=attention_mask).pooler_output)


def image_embeds(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """(images, width), unit length, float32, of `pixel_values`, (images, 3, height, width)."""
    return unit_length(model.get_image_features(pixel_values).pooler_output)


def fills_up(processor: ProcessorMixin) -> bool:
    """Whether texts are filled up to one length without a mask, and padding is read as any token: SigLIP's are."""
    return type(processor).__name__.startswith("Siglip")


def tokenise(processor: ProcessorMixin, texts: Sequence[str]) -> list[dict[str, list[int]]]:
    """`input_ids` of each text, and its `attention_mask` but for SigLIP, each of its own length.

    Texts are cut, and SigLIP's filled up, as the processor that `loading.load_processor` gives does it.
    """
    rule: dict[str, Any] = {"padding": False}  # of CAPIVARA's processor, which cuts by itself
    if not isinstance(processor, CapivaraProcessor):
        # SigLIP reads the last token of a text that was filled up, unmasked; transformers' own pipeline asks for it.
        padding = "max_length" if fills_up(processor) else False
        rule = {"padding": padding, "truncation": True, "max_length": processor.tokenizer.model_max_length}
    tokens = processor(text=list(texts), **rule)
    names = ["input_ids"] if fills_up(processor) else ["input_ids", "attention_mask"]
    return [{name: list(tokens[name][i]) for name in names} for i in range(len(texts))]


def pad(processor: ProcessorMixin, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of `tokenise` as one batch, (texts, tokens) each, padded to its longest."""
    if fills_up(processor):
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    return dict(processor.tokenizer.pad([dict(row) for row in rows], return_tensors="pt"))


def check_fits(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Raise ValueError where transformers' processor is that of another model: its figures would mean nothing."""
    tokenizer, side, kind = processor.tokenizer, config.vision_config.image_size, type(processor).__name__
    steps = processor.image_processor.to_dict()
    size = dict((steps.get("crop_size") if steps.get("do_center_crop") else steps.get("size")) or {})
    if fills_up(processor) != (config.model_type == "siglip") or "max_num_patches" in steps:
        raise ValueError(f"a {kind} is none of the model's kind, {config.model_type!r}")
    if (size.get("height"), size.get("width")) != (side, side):
        raise ValueError(f"its images have {size}, the image tower takes {side} x {side} pixels")
    if len(tokenizer) > config.text_config.vocab_size or tokenizer.pad_token is None:
        known = f"{len(tokenizer)} tokens, {tokenizer.pad_token!r} for padding"
        raise ValueError(f"its tokenizer has {known}; the model knows {config.text_config.vocab_size}")


def limit_texts(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Let a tokenizer give no more tokens than the model has positions for, also one that was saved without a limit."""
    positions = config.text_config.max_position_embeddings
    if config.model_type == "altclip":  # as RoBERTa, it counts positions from behind the padding's number
        positions -= config.text_config.pad_token_id + 1
    own = getattr(processor, "text_kwargs", {}).get("max_length", positions)  # Siglip2Processor's, say
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, positions, own)
