"""Compute the exact gradients of a contrastive loss over a whole batch, in the memory of a few micro-batches.

    step = WholeBatch(model, accelerator, seed=0)
    report = step(0, batches, pairs=2816, image_embeds=embeds)  # step 0: adds the gradients to the parameters' `grad`

The method is gradient caching (GradCache, arXiv 2101.06983): embed every micro-batch, compute the loss of all
embeddings together, and run one backward pass per micro-batch, starting from the gradients of its embeddings. With
several processes, the loss covers the pairs of all processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from caption_data.augmentation import derive_seed
from modeling_capivara.two_towers import compute_image_embeds, compute_text_embeds, embedding_width, uses_sigmoid_loss
from training.batches import MicroBatch
from training.memory import available_memory, keep_freed_memory, measure_graph_bytes, return_freed_memory

# Largest number of logits that a loss computes at once: 64 MiB in float32. The logits of a larger batch are computed in
# tiles (blocks of rows), because all of them at once may not fit into memory.
MAX_TILE_LOGITS = 2**24
# Share of the memory that the autograd graphs of micro-batches may fill. The memory is measured after gradients and
# optimizer state were allocated. Graphs that do not fit are computed again in the backward pass, which needs the
# remaining 40 %. GradCache itself computes all graphs again.
GRAPH_MEMORY_SHARE = 0.6
# Function that returns this process's share of the loss as a scalar. Arguments: text embeddings and image embeddings of
# the whole batch, logit scale, and the indices of the pairs whose loss this process computes.
LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepReport:
    """Loss and memory use of one optimizer step. The gradients are stored in the parameters of the model, not here."""

    loss: float  # loss of the whole batch, in nats (computed with the natural logarithm)
    graphs_kept: int  # number of this process's micro-batches whose autograd graph was kept in memory, not recomputed


@dataclass
class WholeBatch:
    """Callable that computes the gradients of one optimizer step for all trained parameters of a model.

    The gradients are those of one contrastive loss over the batch of all processes. Only a micro-batch at a time goes
    through the model (gradient caching, arXiv 2101.06983). Do not wrap the model in `DistributedDataParallel`, because
    `WholeBatch` itself sums the gradients of all processes.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from modeling_capivara import CapivaraConfig, CapivaraModel
        >>> from training.batches import MicroBatch
        >>> from training.whole_batch import WholeBatch
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = CapivaraConfig(text_config=sizes, vision_config=sizes, projection_dim=8)
        >>> model = CapivaraModel(config).train()
        >>> model.freeze_image_encoder()
        >>> ids = torch.tensor([[0, 5, 2], [0, 6, 2], [0, 7, 2], [0, 8, 2]])
        >>> batches = [MicroBatch(0, 0, ids[:2], ids[:2] != 1), MicroBatch(1, 2, ids[2:], ids[2:] != 1)]
        >>> image_embeds = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
        >>> step = WholeBatch(model, Accelerator(cpu=True), seed=0)
        >>> report = step(0, batches, pairs=4, image_embeds=image_embeds)
        >>> report.loss > 0
        True
        >>> model.text_projection[0].weight.grad.shape
        torch.Size([12, 16])
    """

    model: nn.Module  # model with two encoders, in training mode, see `modeling_capivara.two_towers`
    accelerator: Accelerator  # Accelerate's object with device, precision and number of processes
    seed: int  # seed of dropout
    # Memory in bytes for autograd graphs that are kept until the backward pass. None: the first step sets it to the
    # share `GRAPH_MEMORY_SHARE` of the free memory.
    budget: float | None = None
    # Bytes of a micro-batch's autograd graph per token (including padding) and per text. They are measured on the first
    # micro-batch, and used to estimate how many graphs fit into `budget`.
    _bytes_per_token: float = 0.0
    _bytes_per_text: float = 1.0

    def __call__(
        self, step: int, batches: Sequence[MicroBatch], pairs: int, image_embeds: Tensor | None = None
    ) -> StepReport:
        """Compute the gradients of an optimizer step, and add them to the attribute `grad` of the model's parameters.

        Before the call, `grad` should be None or zero. In a distributed run, every process must make the call.

        Args:
            step: Optimizer step, counted from 0. It is part of the seed of dropout.
            batches: Micro-batches of this process. Their number can differ between processes, and can be zero.
            pairs: Number of pairs in the whole batch, over all processes.
            image_embeds: Unit-length embeddings of all images, (pairs, width), in the order of the whole batch. None:
                embed the pixels of the micro-batches, with gradients for the image encoder.

        Returns:
            The loss of the whole batch, and the number of micro-batches whose autograd graph was kept in memory.

        Raises:
            ValueError: If `pairs` is below 2.
            FloatingPointError: If the loss is not finite. No gradients are then computed.
        """
        if pairs < 2:
            raise ValueError(f"The loss needs at least 2 pairs, got {pairs}.")
        local_rows = torch.cat([torch.empty(0, dtype=torch.long), *(batch.positions for batch in batches)])
        local_rows = local_rows.to(self.accelerator.device)
        table = self.model.text_model.get_input_embeddings()
        word_rows = look_up_token_embeddings_once(table, [batch.input_ids.to(local_rows.device) for batch in batches])
        # All micro-batches are in one autocast block, so that each weight is cast only once per step.
        with word_rows, self.accelerator.autocast():
            parts, graphs_kept = self._embed_batches(step, batches)
            if graphs_kept == len(batches):
                keep_freed_memory()
            # The loss is computed from detached copies of the embeddings, so its backward pass ends at these copies.
            # The gradients of the copies are then propagated through the encoders, one micro-batch at a time.
            leaves = [[embeds.detach().requires_grad_(embeds.requires_grad) for embeds in part] for part in parts]
            texts = self._gather([leaf[0] for leaf in leaves], local_rows, pairs)
            if image_embeds is None:
                image_embeds = self._gather([leaf[1] for leaf in leaves], local_rows, pairs)
            loss = select_loss(self.model)(texts, image_embeds, self.model.logit_scale, local_rows)
            whole = self.accelerator.reduce(loss.detach(), "sum")
            if not torch.isfinite(whole):
                raise FloatingPointError(
                    f"The loss is {whole.item()}. No gradients were computed for this step. The learning rate may be "
                    "too high, or numbers may have overflowed in fp16."
                )
            with torch.autocast(local_rows.device.type, enabled=False):
                self.accelerator.backward(loss)
                # Each micro-batch has its own backward pass. All micro-batches share the bfloat16 copy of a weight, so
                # a common pass would sum their gradients in bfloat16, which has only 8 bits of precision.
                for part, leaf in zip(parts, leaves, strict=True):
                    trained = [i for i, embeds in enumerate(leaf) if embeds.grad is not None]
                    torch.autograd.backward([part[i] for i in trained], [leaf[i].grad for i in trained])
        if graphs_kept < len(batches):
            # Recomputed graphs leave gaps in the heap. Freed memory is returned to the system, so that Adam's moments
            # are not allocated in these gaps, which would fragment the heap.
            return_freed_memory()
        if self.accelerator.num_processes > 1:
            self._sum_gradients()
        return StepReport(whole.item(), graphs_kept)

    def _embed_batches(self, step: int, batches: Sequence[MicroBatch]) -> tuple[list[list[Tensor]], int]:
        """Embed all micro-batches, and keep the autograd graphs of as many micro-batches as fit into memory.

        Other graphs are computed again in the backward pass.

        Args:
            step: Optimizer step, counted from 0.
            batches: Micro-batches of this process, sorted by text length.

        Returns:
            The result of `_embed` for each micro-batch, in the order of `batches`, and the number of kept graphs.
        """
        parts, graphs_kept, bytes_used = [], 0, 0.0
        if self.budget is None and batches:
            first_ids = batches[0].input_ids
            size = measure_graph_bytes(lambda: self._embed(step, batches[0]), self.model)
            self._bytes_per_token, self._bytes_per_text = size / first_ids.numel(), size / len(first_ids)
            free = available_memory(self.accelerator.device) - self._pending_state_bytes()
            self.budget = GRAPH_MEMORY_SHARE * max(free, 0)
        # The longest texts come first, so that shorter texts fit into the memory that longer texts have freed.
        for batch in reversed(batches):
            ids = batch.input_ids
            size = max(self._bytes_per_token * ids.numel(), self._bytes_per_text * len(ids))
            if bytes_used + size <= self.budget:
                bytes_used += size
                parts.append(self._embed(step, batch))
                graphs_kept += 1
            else:
                # `_embed` sets the random state itself, so `checkpoint` does not need to store it
                # (preserve_rng_state=False).
                parts.append(checkpoint(self._embed, step, batch, use_reentrant=False, preserve_rng_state=False))
        return parts[::-1], graphs_kept

    def _embed(self, step: int, batch: MicroBatch) -> list[Tensor]:
        """Embed a micro-batch.

        Args:
            step: Optimizer step, counted from 0. It is part of the seed of dropout.
            batch: The micro-batch.

        Returns:
            A list with the text embeddings, (texts, width). If the micro-batch has pixels, the list also has the image
            embeddings, (texts, width).
        """
        # The seed makes dropout the same when a micro-batch is embedded again in the backward pass, and for any number
        # of processes. The gradients therefore do not depend on how many graphs are kept, down to the last bit.
        torch.manual_seed(derive_seed(self.seed, step, batch.index))
        inputs = batch.model_inputs(self.accelerator.device)
        pixels = inputs.pop("pixel_values", None)
        embeds = [compute_text_embeds(self.model, **inputs)]
        return embeds if pixels is None else [*embeds, compute_image_embeds(self.model, pixels)]

    def _gather(self, parts: Sequence[Tensor], local_rows: Tensor, pairs: int) -> Tensor:
        """Collect the embeddings of all processes. Gradients flow back to the embeddings of this process.

        Args:
            parts: Embeddings of the micro-batches of this process, each (texts, width).
            local_rows: Positions of the embeddings in the whole batch, (rows,).
            pairs: Number of pairs in the whole batch.

        Returns:
            Embeddings of the whole batch, (pairs, width).
        """
        if self.accelerator.num_processes == 1:
            return torch.cat(parts)
        model = self.accelerator.unwrap_model(self.model)
        options = {"device": local_rows.device, "dtype": torch.promote_types(model.dtype, torch.float32)}
        # Without requires_grad=True, a process without micro-batches would have no backward pass of `all_reduce`, and
        # the other processes would wait for it forever.
        whole = torch.zeros(pairs, embedding_width(model.config), requires_grad=True, **options)
        if parts:
            whole = whole.index_copy(0, local_rows, torch.cat(parts).to(whole.dtype))
        return all_reduce(whole)

    def _sum_gradients(self) -> None:
        """Replace the gradient of each parameter with the sum over all processes.

        If a process has no gradient for a parameter, it contributes zeros.
        """
        # `DistributedDataParallel` would average gradients at every micro-batch, and wait forever if one process has
        # fewer micro-batches than another.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    def _pending_state_bytes(self) -> int:
        """Return the number of bytes that the first step will allocate for Adam's two moments and missing gradients."""
        return sum(p.nbytes * (2 + (p.grad is None)) for p in self.model.parameters() if p.requires_grad)


def select_loss(model: nn.Module) -> LossFunction:
    """Return the loss function of a model: SigLIP's loss if the model has a logit bias, otherwise CLIP's loss."""
    if uses_sigmoid_loss(model):
        return partial(compute_sigmoid_loss_share, logit_bias=model.logit_bias)
    return compute_contrastive_loss_share


def compute_contrastive_loss_share(
    text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor, local_rows: Tensor
) -> Tensor:
    """Compute this process's share of CLIP's contrastive loss (arXiv 2103.00020, section 2.3, figure 3).

    The sum of the shares of all processes is the loss of the whole batch, as `modeling_capivara.clip_loss` computes it.

    Args:
        text_embeds: Text embeddings of the whole batch, (pairs, width), unit length.
        image_embeds: Image embeddings of the whole batch, (pairs, width), unit length; row i belongs to text i.
        logit_scale: Scalar, the natural logarithm of the factor by which cosines are multiplied.
        local_rows: Indices of the pairs whose cross-entropies this process computes, (rows,).

    Returns:
        A scalar in nats, float32, or float64 for float64 inputs.
    """
    texts, images, scale = _to_common_device_and_precision(text_embeds, image_embeds, logit_scale)
    with torch.autocast(texts.device.type, enabled=False):
        text_to_image = _sum_loss_in_tiles(_cross_entropy, scale.exp() * texts[local_rows], images, local_rows)
        image_to_text = _sum_loss_in_tiles(_cross_entropy, scale.exp() * images[local_rows], texts, local_rows)
        return (text_to_image + image_to_text) / (2 * len(texts))


def compute_sigmoid_loss_share(
    text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor, local_rows: Tensor, logit_bias: Tensor
) -> Tensor:
    """Compute this process's share of SigLIP's sigmoid loss (arXiv 2303.15343, section 3.1, algorithm 1).

    The sum of the shares of all processes is the loss of the whole batch, as `transformers.SiglipModel` computes it.

    Args:
        text_embeds: Text embeddings of the whole batch, (pairs, width), unit length.
        image_embeds: Image embeddings of the whole batch, (pairs, width), unit length; row i belongs to text i.
        logit_scale: Scalar, the natural logarithm of the factor by which cosines are multiplied.
        local_rows: Indices of the texts that this process compares with all images, (rows,).
        logit_bias: Scalar that is added to every scaled cosine.

    Returns:
        A scalar in nats, float32, or float64 for float64 inputs.
    """
    texts, images, scale, bias = _to_common_device_and_precision(text_embeds, image_embeds, logit_scale, logit_bias)

    def sum_over_pairs(queries: Tensor, items: Tensor, target_rows: Tensor) -> Tensor:
        signs = torch.full((len(queries), len(items)), -1.0, dtype=queries.dtype, device=queries.device)
        signs[torch.arange(len(queries)), target_rows] = 1
        return -F.logsigmoid(signs * (queries @ items.T + bias)).sum()

    with torch.autocast(texts.device.type, enabled=False):
        return _sum_loss_in_tiles(sum_over_pairs, scale.exp() * texts[local_rows], images, local_rows) / len(texts)


def _to_common_device_and_precision(*tensors: Tensor) -> list[Tensor]:
    """Return all tensors on the device of the first tensor, in its data type, or in float32 if that is more precise."""
    first = tensors[0]
    return [tensor.to(first.device, torch.promote_types(first.dtype, torch.float32)) for tensor in tensors]


def _cross_entropy(queries: Tensor, items: Tensor, target_rows: Tensor) -> Tensor:
    """Sum the cross-entropies of all queries.

    Args:
        queries: Scaled embeddings, (queries, width).
        items: Embeddings that each query is compared with, (items, width).
        target_rows: Row of `items` that belongs to each query, (queries,).

    Returns:
        A scalar in nats.
    """
    return F.cross_entropy(queries @ items.T, target_rows, reduction="sum")


def _sum_loss_in_tiles(loss: Callable[..., Tensor], queries: Tensor, items: Tensor, target_rows: Tensor) -> Tensor:
    """Sum a loss over all queries, in tiles of at most `MAX_TILE_LOGITS` logits.

    If there are several tiles, the backward pass recomputes the logits of each tile, so that only one tile is in
    memory.

    Args:
        loss: Function of queries, items and target rows that returns the summed loss of the queries.
        queries: Scaled embeddings, (queries, width).
        items: Embeddings that each query is compared with, (items, width).
        target_rows: Row of `items` that belongs to each query, (queries,).

    Returns:
        A scalar.
    """
    rows = max(1, MAX_TILE_LOGITS // len(items))
    if len(queries) <= rows:
        return loss(queries, items, target_rows)
    tiles = zip(queries.split(rows), target_rows.split(rows), strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return sum(checkpoint(loss, tile, items, targets, **options) for tile, targets in tiles)


@contextmanager
def look_up_token_embeddings_once(table: nn.Embedding, input_ids: Sequence[Tensor]) -> Iterator[None]:
    """Look up the token embeddings of a training step only once, so that their gradient needs little memory.

    Inside of the `with` block, all lookups use the result of this one lookup. The backward passes must run in the
    block, too.

    Args:
        table: Embedding layer of the text encoder, with one row per token of the vocabulary.
        input_ids: Token ids of all micro-batches. Only these tokens can be looked up inside of the block.

    Raises:
        RuntimeError: If a backward pass through the token embeddings runs after the block has ended.
    """
    ids = torch.cat([torch.empty(0, dtype=torch.long, device=table.weight.device), *map(torch.flatten, input_ids)])
    ids = ids.unique()
    # With `sparse`, the gradient has only the rows that were looked up. A dense gradient would be as large as the
    # table, 768 MB for the 250,002 tokens of XLM-RoBERTa.
    was_sparse, table.sparse = table.sparse, True
    # The table is called instead of indexing its weight, because some tables scale their rows, and because the row of
    # the padding token must get no gradient.
    looked_up = table(ids)
    table.sparse = was_sparse
    # All micro-batches look up their tokens in this detached copy of the rows. Autograd sums their gradients in
    # `rows.grad`.
    rows = looked_up.detach().requires_grad_(looked_up.requires_grad)
    ended = False

    def check_context(gradient: Tensor) -> None:
        # The gradient of `rows` is added to the gradient of the table when the block ends, so a later gradient would be
        # lost. Besides, a micro-batch that is recomputed after the block looks up its tokens in the whole table. The
        # backward pass would apply the row indices of this lookup to `rows`, for which they are wrong.
        if ended:
            raise RuntimeError("The backward pass of the texts must run within `look_up_token_embeddings_once`.")

    if rows.requires_grad:
        rows.register_hook(check_context)
    table.forward = lambda wanted_ids: F.embedding(torch.searchsorted(ids, wanted_ids), rows)
    try:
        yield
    finally:
        del table.forward
        ended = True
    if rows.grad is not None:
        if table.weight.grad is None:
            table.weight.grad = torch.zeros_like(table.weight)
        looked_up.backward(rows.grad)
