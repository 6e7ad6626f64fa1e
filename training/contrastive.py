"""The contrastive loss of a large batch and its gradients, in tiles: memory grows with batch x tile."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from modeling_capivara.loss_capivara import similarity_logits

TILE_ELEMENTS = (
    2**24
)  # of one tile of logits, 64 MiB in float32; four such tensors live at once, with hard negatives nine


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


@dataclass(frozen=True)
class _Softmax:
    """Of the rows or of the columns of all logits: the log-sum-exp that each probability is taken from.

    With hard negatives a wrong pair of logit s has the weight exp(hardness * s), scaled to a mean of 1 over the wrong
    pairs of its row or column: their sum is (pairs - 1) * sum(exp((1 + hardness) * s)) / sum(exp(hardness * s)).
    """

    sums: Tensor  # (1, n) of all pairs; (2, n) of the wrong ones times 1 + hardness, and times hardness
    right: Tensor | None  # (n,), logits of the true pairs; needed with a hardness
    pairs: int
    hardness: float

    @staticmethod
    def log_sums(logits: Tensor, dim: int, hardness: float) -> Tensor:
        """`sums` of some logits; the true pairs' are -inf where there is a hardness."""
        factors = (1 + hardness, hardness) if hardness else (1,)
        return torch.stack([(logits if factor == 1 else factor * logits).logsumexp(dim) for factor in factors])

    @cached_property
    def whole(self) -> Tensor:
        """(n,), the logarithm of the softmax's denominator."""
        return torch.logaddexp(self.right, self._wrong) if self.hardness else self.sums[0]

    @property
    def _wrong(self) -> Tensor:
        return math.log(self.pairs - 1) + self.sums[0] - self.sums[1]

    def slopes(self, logits: Tensor, part: Tensor | slice, dim: int) -> Tensor:
        """Derivative of `whole[part]` by the logits: the probabilities, where there is no hardness."""
        sums, whole = self.sums[:, part].unsqueeze(dim + 1), self.whole[part].unsqueeze(dim)
        if not self.hardness:
            return (logits - whole).exp_()
        hard = (1 + self.hardness) * ((1 + self.hardness) * logits - sums[0]).exp_()
        weights = self.hardness * (self.hardness * logits - sums[1]).exp_()
        wrong = (hard - weights).mul_((self._wrong[part].unsqueeze(dim) - whole).exp())
        return wrong.where(logits != -torch.inf, (self.right[part].unsqueeze(dim) - whole).exp())


def _tiles(
    text_embeds: Tensor,
    image_embeds: Tensor,
    logit_scale: Tensor,
    image_of_text: Tensor,
    tile_rows: int | None,
    hide: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Some texts at a time: their indices, their logits (tile, pairs), these with -inf for the truth where it is to be
    hidden, and where the truth is in them."""
    tile_rows = tile_rows or max(1, TILE_ELEMENTS // len(image_embeds))
    for tile in torch.arange(len(text_embeds), device=text_embeds.device).split(tile_rows):
        logits = similarity_logits(text_embeds[tile], image_embeds, logit_scale)
        truth = torch.arange(len(tile), device=tile.device), image_of_text[tile]
        yield tile, logits, logits.index_put(truth, logits.new_tensor(-torch.inf)) if hide else logits, truth


@torch.no_grad()
def contrastive_gradients(
    text_embeds: Tensor,
    image_embeds: Tensor,
    logit_scale: Tensor,
    image_of_text: Tensor,
    *,
    image_gradient: bool = False,
    hard_negatives: float = 0.0,
    tile_rows: int | None = None,
    gather: Callable[[Tensor], Tensor] = lambda own: own.unsqueeze(0),
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> ContrastiveGradients:
    """Loss and gradients of `modeling_capivara.clip_loss`, without ever holding all logits.

    Each process brings the texts it has embedded and every image of the batch. A first sweep over tiles of rows takes
    the log-sum-exp of rows and columns, a second makes the probabilities again, tile by tile.
    Source: CLIP (arXiv 2103.00020), section 2.3, figure 3; of hard negatives Robinson et al. (2010.04592), section 3.

    Args:
        text_embeds: (texts, width), unit length, float32; the texts of this process.
        image_embeds: (pairs, width), unit length, float32; the images of the whole batch.
        logit_scale: scalar, natural logarithm of the scale.
        image_of_text: (texts,), index of each text's image.
        image_gradient: also the gradient of the images.
        hard_negatives: how much more a wrong pair counts the more similar it is, from 0: not at all, as in CLIP.
        tile_rows: rows of one tile; what makes 64 MiB where None.
        gather: (…) of this process -> (processes, …) of all.
        total: a tensor of this process -> its sum over all.

    Raises:
        ValueError: there are fewer than two pairs, or hard_negatives is below 0.
    """
    pairs = len(image_embeds)
    if pairs < 2 or not hard_negatives >= 0:
        raise ValueError(f"The loss needs at least 2 pairs, got {pairs}, and hard_negatives from 0, {hard_negatives}.")
    tiles = partial(_tiles, text_embeds, image_embeds, logit_scale, image_of_text, tile_rows, hard_negatives > 0)
    scale = logit_scale.float().exp()
    right = scale * (text_embeds * image_embeds[image_of_text]).sum(dim=1)  # (texts,), logits of the true pairs
    row_sums, column_sums = [], torch.full((1 + (hard_negatives > 0), pairs), -torch.inf, device=text_embeds.device)
    for _, _, compared, _ in tiles():
        row_sums.append(_Softmax.log_sums(compared, 1, hard_negatives))
        column_sums = torch.logaddexp(column_sums, _Softmax.log_sums(compared, 0, hard_negatives))
    rows = _Softmax(torch.cat(row_sums, dim=1), right, pairs, hard_negatives)
    right_of_image = total(right.new_zeros(pairs).index_put((image_of_text,), right)) if hard_negatives else None
    columns = _Softmax(gather(column_sums).logsumexp(dim=0), right_of_image, pairs, hard_negatives)
    loss = total((rows.whole + columns.whole[image_of_text] - 2 * right).sum()) / (2 * pairs)

    text_gradient, scale_gradient = torch.empty_like(text_embeds), torch.zeros_like(loss)
    image_gradients = torch.zeros_like(image_embeds) if image_gradient else None
    for tile, logits, compared, truth in tiles():
        by_row = rows.slopes(compared, tile, 1)
        weights = columns.slopes(compared, slice(None), 0).add_(by_row)  # less the truth: d loss / d logits
        weights[truth] -= 2
        weights /= 2 * pairs
        scale_gradient += (weights * logits).sum()
        text_gradient[tile] = scale * (weights @ image_embeds)
        if image_gradients is not None:
            image_gradients.addmm_(weights.T, text_embeds[tile] * scale)
    whole_gradients = total(image_gradients) if image_gradient else None
    return ContrastiveGradients(loss, text_gradient, whole_gradients, total(scale_gradient))


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
