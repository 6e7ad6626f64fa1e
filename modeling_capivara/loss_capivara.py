"""The contrastive loss of CLIP."""

import torch
from torch import Tensor
from torch.nn import functional as F


def similarity_logits(text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled cosines of every text with every image, in float32 also under autocast.

    Args:
        text_embeds: (texts, projection_dim), unit length.
        image_embeds: (images, projection_dim), unit length.
        logit_scale: scalar, natural logarithm of the scale.

    Returns:
        (texts, images), float32.
    """
    with torch.autocast(text_embeds.device.type, enabled=False):
        return logit_scale.float().exp() * text_embeds.float() @ image_embeds.float().T


def clip_loss(text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of the two cross-entropies over the whole batch: text to image and image to text.

    Source: CLIP (arXiv 2103.00020), section 2.3, figure 3. Row i of one side belongs to row i of the other.

    Args:
        text_embeds: (pairs, projection_dim), unit length.
        image_embeds: (pairs, projection_dim), unit length.
        logit_scale: scalar, natural logarithm of the scale.

    Returns:
        Scalar, float32, in nats.

    Raises:
        ValueError: the sides differ in number, or there are fewer than two pairs (no wrong answer to tell apart).
    """
    if len(text_embeds) != len(image_embeds):
        raise ValueError(
            f"The loss needs as many texts as images, pair by pair; got {len(text_embeds)} and {len(image_embeds)}."
        )
    if len(text_embeds) < 2:
        raise ValueError(f"The contrastive loss needs at least 2 pairs, got {len(text_embeds)}.")
    logits_per_text = similarity_logits(text_embeds, image_embeds, logit_scale)
    targets = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, targets) + F.cross_entropy(logits_per_text.T, targets)) / 2
