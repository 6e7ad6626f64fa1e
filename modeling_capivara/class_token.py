"""Embed images faster: let the last layer of a CLIP image tower compute only the class token.

    with last_layer_for_class_token_only(model), torch.inference_mode():
        embeds = model.get_image_features(pixel_values).pooler_output

A CLIP image tower makes the embedding from the class token, the first token of the last layer. Leaving out the other
tokens of this layer saves 7 % of the operations of a ViT-B/32. The embeddings are the same, except for rounding errors
in the last bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from capivara_common.model_kinds import CLASS_TOKEN_VISION_TOWERS


@contextmanager
def last_layer_for_class_token_only(model: nn.Module) -> Iterator[None]:
    """Make the last layer of a model's image tower compute only the class token within a `with` block.

    Use the block only for inference. In it, the `last_hidden_state` of the image tower has only the class token. Models
    without a CLIP image tower stay as they are.

    Args:
        model: Two-tower model of transformers in evaluation mode, or a DistributedDataParallel wrapper of it.
    """
    model = getattr(model, "module", model)
    if model.config.vision_config.model_type not in CLASS_TOKEN_VISION_TOWERS:
        yield
        return
    layer = model.vision_model.encoder.layers[-1]
    layer.forward = partial(_compute_class_token, layer)  # the attribute of the object overrides the class's method
    try:
        yield
    finally:
        # If two threads embed images with the same model, the first thread to finish removes the attribute for both.
        # The other thread then computes all tokens of its next images, which gives the same embeddings.
        vars(layer).pop("forward", None)


def _compute_class_token(layer: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    """Compute the output of a CLIP layer for the class token only, which is the first token.

    Args:
        layer: Layer of a CLIP image tower of transformers, such as `CLIPEncoderLayer`.
        hidden_states: Input of the layer, (images, tokens, width).

    Returns:
        Output of the layer, (images, 1, width).
    """
    # The class token attends to all patches of the image, so the keys and values of all tokens are needed.
    attention, normalized = layer.self_attn, layer.layer_norm1(hidden_states)
    query, key, value = (
        states.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (images, heads, tokens, width of a head)
        for states in (attention.q_proj(normalized[:, :1]), attention.k_proj(normalized), attention.v_proj(normalized))
    )
    attended = scaled_dot_product_attention(query, key, value, scale=attention.scale).transpose(1, 2).flatten(2)
    class_token = hidden_states[:, :1] + attention.out_proj(attended)
    return class_token + layer.mlp(layer.layer_norm2(class_token))
