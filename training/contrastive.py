"""The contrastive loss of a large batch and its gradients, in tiles: memory grows with batch x tile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeling_capivara.loss_capivara import similarity_logits

TILE_ELEMENTS = 2**24  # of one tile of logits, 64 MiB in float32; four such tensors live at once


@dataclass(frozen=True)
class ContrastiveGradients:
    """The loss of `clip_loss` over a whole batch, and what flows back from it."""

    loss: Tensor  # scalar in nats, of the whole batch
    text_embeds: Tensor  # (texts, width), for the texts that were given
    image_embeds: Tensor | None  # (pairs, width), for all images; None where they were not asked for
    logit_scale: Tensor


@dataclass(frozen=True)
class TextTargets:
    """What a teacher makes of the texts of a batch, and how strongly the texts are held to it."""

    embeds: Tensor  # (texts, width), unit length, float32; of the whole batch, in its order
    weight: float  # of the teacher's loss, beside 1 of the contrastive loss with the images
    loss: Literal["contrastive", "cosine", "both"]


@torch.no_grad()
def contrastive_gradients(
    text_embeds: Tensor,
    image_embeds: Tensor,
    logit_scale: Tensor,
    image_of_text: Tensor,
    *,
    image_gradient: bool = False,
    tile_rows: int | None = None,
    gather: Callable[[Tensor], Tensor] = lambda own: own.unsqueeze(0),
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> ContrastiveGradients:
    """Loss and gradients of `modeling_capivara.clip_loss`, without ever holding all logits.

    Each process brings the texts it has embedded and every image of the batch. A first sweep over tiles of rows takes
    the log-sum-exp of rows and columns, a second makes the probabilities again, tile by tile.
    Source of the loss: CLIP (arXiv 2103.00020), section 2.3, figure 3.

    Args:
        text_embeds: (texts, width), unit length, float32; the texts of this process.
        image_embeds: (pairs, width), unit length, float32; the images of the whole batch.
        logit_scale: scalar, natural logarithm of the scale.
        image_of_text: (texts,), index of each text's image.
        image_gradient: also the gradient of the images.
        tile_rows: rows of one tile; what makes 64 MiB where None.
        gather: (columns,) of this process -> (processes, columns) of all.
        total: a tensor of this process -> its sum over all.

    Raises:
        ValueError: there are fewer than two pairs.
    """
    pairs = len(image_embeds)
    if pairs < 2:
        raise ValueError(f"The contrastive loss needs at least 2 pairs, got {pairs}.")
    tiles = torch.arange(len(text_embeds), device=text_embeds.device).split(tile_rows or max(1, TILE_ELEMENTS // pairs))
    scale = logit_scale.float().exp()
    right = scale * (text_embeds * image_embeds[image_of_text]).sum(dim=1)  # (texts,), logits of the true pairs
    row_sums = torch.empty_like(right)
    column_sums = torch.full((pairs,), -torch.inf, device=text_embeds.device)
    for tile in tiles:
        logits = similarity_logits(text_embeds[tile], image_embeds, logit_scale)  # (tile, pairs)
        row_sums[tile] = logits.logsumexp(dim=1)
        column_sums = torch.logaddexp(column_sums, logits.logsumexp(dim=0))
    column_sums = gather(column_sums).logsumexp(dim=0)
    loss = total((row_sums + column_sums[image_of_text] - 2 * right).sum()) / (2 * pairs)

    text_gradient = torch.empty_like(text_embeds)
    image_gradients = torch.zeros_like(image_embeds) if image_gradient else None
    scale_gradient = torch.zeros_like(loss)
    for tile in tiles:
        logits = similarity_logits(text_embeds[tile], image_embeds, logit_scale)
        by_row = (logits - row_sums[tile, None]).exp_()
        weights = (logits - column_sums).exp_().add_(by_row)  # both softmaxes; less the truth: d loss / d logits
        weights[torch.arange(len(tile), device=tile.device), image_of_text[tile]] -= 2
        weights /= 2 * pairs
        scale_gradient += (weights * logits).sum()
        text_gradient[tile] = scale * (weights @ image_embeds)
        if image_gradients is not None:
            image_gradients.addmm_(weights.T, text_embeds[tile] * scale)
    image_gradients = total(image_gradients) if image_gradient else None
    return ContrastiveGradients(loss, text_gradient, image_gradients, total(scale_gradient))


@torch.no_grad()
def teacher_gradients(
    text_embeds: Tensor,
    targets: TextTargets,
    logit_scale: Tensor,
    target_of_text: Tensor,
    *,
    gather: Callable[[Tensor], Tensor] = lambda own: own.unsqueeze(0),
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> tuple[Tensor, Tensor]:
    """Loss of the texts against a teacher's embeddings of what they translate, and its gradient; no weight is applied.

    "contrastive" is `clip_loss` with the teacher's embeddings in the place of the images, at the model's present scale,
    which gets no gradient from it: it belongs to the images. "cosine" is the mean of 1 - cosine. "both" is their sum.

    Args:
        text_embeds: (texts, width), unit length, float32; the texts of this process.
        targets: of the whole batch.
        logit_scale: scalar, natural logarithm of the scale.
        target_of_text: (texts,), index of each text's target.
        gather, total: as in `contrastive_gradients`.

    Returns:
        The loss, a scalar in nats (contrastive) or without unit (cosine), and (texts, width).
    """
    loss, gradient = torch.zeros((), device=text_embeds.device), torch.zeros_like(text_embeds)
    if targets.loss != "cosine":
        found = contrastive_gradients(
            text_embeds, targets.embeds, logit_scale, target_of_text, gather=gather, total=total
        )
        loss, gradient = loss + found.loss, gradient + found.text_embeds
    if targets.loss != "contrastive":
        right, texts = targets.embeds[target_of_text], len(targets.embeds)
        loss = loss + 1 - total((text_embeds * right).sum()) / texts
        gradient = gradient - right / texts
    return loss, gradient
