"""One optimiser step's gradients: the whole contrastive batch under one loss, in as little memory as there is.

Every micro-batch is embedded, the loss and its gradient are taken over the embeddings of the whole batch, then each
micro-batch gets the gradient of its own rows. Where the graphs of all micro-batches do not fit, those that do not are
run a second time with the random state of the first: the result is the same to the bit.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_capivara import CapivaraProcessor
from training.contrastive import TextTargets, teacher_gradients
from training.matryoshka import matryoshka_gradients

BUDGET_SHARE = 0.6  # of the memory that is free beside optimiser and gradients; the rest is for one more micro-batch
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # in bytes, as a container sees it; other limits are not known
logger = logging.getLogger("capivara")


def resolve_precision(requested: str, device: torch.device) -> str:
    """ "auto" as "bf16" where the device computes in it natively, else "no"; anything else as it is.

    Without instructions of its own for bfloat16 a CPU emulates it, and is slower than in float32.
    """
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if native else "no"


@dataclass
class MicroBatch:
    """Texts that go through the tower at once."""

    index: int  # of the micro-batch within the whole batch, over all processes; its random state derives from it
    start: int  # row of its first text in the whole batch, which is in order of length
    input_ids: Tensor  # (texts, tokens)
    attention_mask: Tensor  # (texts, tokens)
    pixel_values: Tensor | None = None  # (texts, 3, height, width), where the image tower is trained; else None

    @property
    def positions(self) -> Tensor:
        """(texts,), its rows in the whole batch."""
        return torch.arange(self.start, self.start + len(self.input_ids))


def micro_batches(
    processor: CapivaraProcessor, captions: Sequence[str], size: int, first_batch: int = 0, first_text: int = 0
) -> tuple[list[MicroBatch], list[int]]:
    """Captions tokenised and cut in order of length, each micro-batch padded to its own longest.

    `first_batch` micro-batches of `first_text` texts come before them in the whole batch.

    Returns:
        The micro-batches, and the order: row in them -> index in `captions`.
    """
    if not captions:
        return [], []
    tokens = processor(text=list(captions), padding=False)
    order = sorted(range(len(captions)), key=lambda i: len(tokens["input_ids"][i]))
    batches = []
    for start in range(0, len(order), size):
        rows = [{key: tokens[key][i] for key in ("input_ids", "attention_mask")} for i in order[start : start + size]]
        padded = processor.tokenizer.pad(rows, return_tensors="pt")
        place = first_batch + len(batches), first_text + start
        batches.append(MicroBatch(*place, padded["input_ids"], padded["attention_mask"]))
    return batches, order


def padding_share(batches: Sequence[MicroBatch]) -> float:
    """Share of the tokens that are padding, 0 to 1."""
    kept = sum(int(batch.attention_mask.sum()) for batch in batches)
    return 1 - kept / sum(batch.attention_mask.numel() for batch in batches)


@dataclass(frozen=True)
class StepReport:
    """What one step gave beside the gradients."""

    loss: float  # of the whole batch with its images, in nats; 0 where there are none
    teacher_loss: float | None  # of the whole batch against its teacher, not weighted; None without one
    graphs_kept: int  # micro-batches of this process whose graph was kept, not run again


@dataclass
class ExactStep:
    """Gradients of the contrastive loss over a whole batch, for every trained parameter of a model.

    The model is called, but not wrapped for gradient averaging: the processes' gradients are summed once, at the end.
    A wrapper would average them, at every micro-batch, and wait for ever where one process has fewer of them.
    """

    model: nn.Module  # as Accelerate prepared it, in training mode
    logit_scale: nn.Parameter  # the model's own parameter
    accelerator: Accelerator  # device, precision and processes
    seed: int
    # "keep" the graphs of all micro-batches, "recompute" them all, or "auto": keep what fits
    accumulation: str = "auto"
    dims: Sequence[int] = ()  # widths of the embeddings' prefixes that the loss is taken of, too
    hard_negatives: float = 0.0  # as of `contrastive_gradients`
    budget: float | None = None  # bytes of graphs; found at the first step
    _costs: tuple[float, float] | None = field(default=None, repr=False)  # bytes a token, bytes a text

    def __call__(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        pairs: int,
        image_embeds: Tensor | None,
        targets: TextTargets | None = None,
    ) -> StepReport:
        """Fill the gradients; they are zero or None before.

        Args:
            step: counted from 0.
            batches: the micro-batches of this process. Texts without an image come after all that have one, in
                micro-batches of their own.
            pairs: texts of the whole batch that have an image, over all processes; its first rows.
            image_embeds: (pairs, width), unit length, in the order of the micro-batches; None where the image tower is
                trained and each micro-batch has its pixels, or where there are no pairs.
            targets: what a teacher makes of all texts of the batch; needed for texts without an image.

        Raises:
            FloatingPointError: a loss is not finite. No gradient was computed.
        """
        outputs, graphs = self._embed(step, batches)
        device = self.accelerator.device
        own = torch.cat([batch.positions for batch in batches]) if batches else torch.empty(0, dtype=torch.long)
        own = own.to(device)
        width = self.accelerator.unwrap_model(self.model).config.projection_dim
        texts = torch.cat([text.detach().float() for text, _ in outputs] or [torch.empty(0, width, device=device)])
        trained_images = image_embeds is None and pairs > 0
        if trained_images:
            image_embeds = self.gather_rows(
                [image for _, image in outputs if image is not None], own[own < pairs], pairs
            )
        losses, text_rows, image_rows = self._losses(texts, image_embeds, own, pairs, trained_images, targets)
        text_rows = text_rows.split([len(batch.input_ids) for batch in batches])
        with self.accelerator.autocast():
            for i, batch in enumerate(batches):
                text, image = outputs[i] if i < graphs else self._forward(step, batch)
                outputs[i] = None  # its graph is freed with the backward pass
                weighted = (text * text_rows[i]).sum()
                if image is not None:
                    weighted = weighted + (image * image_rows[batch.positions.to(device)]).sum()
                with torch.autocast(device.type, enabled=False):
                    self.accelerator.backward(weighted)
        self._sum_over_processes()
        return StepReport(*losses, graphs)

    def _losses(
        self,
        texts: Tensor,
        image_embeds: Tensor | None,
        own: Tensor,
        pairs: int,
        image_gradient: bool,
        targets: TextTargets | None,
    ) -> tuple[tuple[float, float | None], Tensor, Tensor | None]:
        """Both losses, the gradient of this process's `texts` and, if asked for, of all images; the scale's is set."""
        whole = {"gather": self._gather, "total": self._total}
        loss, teacher_loss, image_rows, gradient = torch.zeros(()), None, None, torch.zeros_like(texts)
        scale_gradient = torch.zeros_like(self.logit_scale)
        if pairs:
            paired = own < pairs
            found = matryoshka_gradients(
                texts[paired], image_embeds.float(), self.logit_scale.detach(), own[paired],
                dims=self.dims, image_gradient=image_gradient, hard_negatives=self.hard_negatives, **whole,
            )  # fmt: skip
            loss, gradient[paired], image_rows = found.loss, found.text_embeds, found.image_embeds
            scale_gradient = found.logit_scale
        if targets is not None:
            teacher_loss, rows = teacher_gradients(texts, targets, self.logit_scale.detach(), own, **whole)
            gradient += targets.weight * rows
        for name, value in (("loss", loss), ("teacher's loss", teacher_loss)):
            if value is not None and not torch.isfinite(value):
                raise FloatingPointError(f"The {name} is {value.item()}.")
        if self.logit_scale.requires_grad:
            scaler = self.accelerator.scaler
            self.logit_scale.grad = scale_gradient * (scaler.get_scale() if scaler else 1)
        return (loss.item(), None if teacher_loss is None else teacher_loss.item()), gradient, image_rows

    def gather_rows(self, parts: Sequence[Tensor], own: Tensor, pairs: int) -> Tensor:
        """(pairs, width), of all processes in the order of the batch; this one's `parts`, (rows, width) each, are its
        rows `own`.
        """
        width = self.accelerator.unwrap_model(self.model).config.projection_dim
        embeds = torch.zeros(pairs, width, device=self.accelerator.device)
        if parts:
            embeds[own] = torch.cat([part.detach().float() for part in parts])
        return self._total(embeds)

    def _embed(self, step: int, batches: Sequence[MicroBatch]) -> tuple[list[tuple[Tensor, Tensor | None]], int]:
        """Embeddings of all micro-batches, and how many of them, from the first on, have kept their graph."""
        outputs, spent = [], 0.0
        # Two contexts: under autocast a weight is cast once, and one cast without gradient must not serve a graph.
        with self.accelerator.autocast():
            for batch in batches:
                spent += self._cost(step, batch)
                if spent > self.budget:
                    break
                outputs.append(self._forward(step, batch))
        graphs = len(outputs)
        with torch.no_grad(), self.accelerator.autocast():
            outputs += [self._forward(step, batch) for batch in batches[graphs:]]
        return outputs, graphs

    def _forward(self, step: int, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        state = np.random.SeedSequence([self.seed, step, batch.index]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(state >> np.uint64(1)))  # dropout: the same in both passes, on any number of processes
        device = self.accelerator.device
        pixels = {} if batch.pixel_values is None else {"pixel_values": batch.pixel_values.to(device)}
        outputs = self.model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), **pixels
        )
        return outputs.text_embeds, outputs.image_embeds

    def _cost(self, step: int, batch: MicroBatch) -> float:
        """Bytes of a micro-batch's graph, in terms of the first one, which was measured."""
        if self.budget is None:
            self.budget = {"keep": float("inf"), "recompute": 0.0}.get(self.accumulation)
        if self.budget in (0.0, float("inf")):
            return 1.0
        if self._costs is None:
            with GraphMeter(self.model) as meter, self.accelerator.autocast():
                first = self._forward(step, batch)  # its graph holds the weights' casts, too, which all graphs share
                shared = meter.bytes
                second = self._forward(step, batch)
            own = meter.bytes - shared
            del first, second
            self._costs = own / batch.input_ids.numel(), own / len(batch.input_ids)
        if self.budget is None:
            self.budget = BUDGET_SHARE * max(free_memory(self.accelerator.device) - self._state_bytes(), 0)
        by_token, by_text = self._costs
        return max(by_token * batch.input_ids.numel(), by_text * len(batch.input_ids))

    def _state_bytes(self) -> int:
        """Bytes of gradients and of Adam's moments that are still to be allocated."""
        return sum(p.nbytes * (2 + (p.grad is None)) for p in self.model.parameters() if p.requires_grad)

    def _sum_over_processes(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter is not self.logit_scale:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    def _total(self, own: Tensor) -> Tensor:
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(own)
        return own

    def _gather(self, own: Tensor) -> Tensor:
        return self.accelerator.gather(own.unsqueeze(0))


class _Lookup(torch.autograd.Function):
    """Embedding lookup whose backward pass adds to the rows of `weight.grad` that were looked up, and to no other."""

    @staticmethod
    def forward(ctx, weight: nn.Parameter, ids: Tensor, padding_idx: int) -> Tensor:
        ctx.weight, ctx.padding_idx = weight, padding_idx
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        kept = ids.flatten() != ctx.padding_idx  # as in nn.Embedding: padding has no gradient
        weight.grad.index_add_(0, ids.flatten()[kept], gradient.flatten(0, -2)[kept].to(weight.dtype))
        return None, None, None


@contextmanager
def sparse_embedding_gradients(model: nn.Module, min_rows: int = 10_000):
    """Within it, embeddings of `min_rows` and more cost a backward pass only the rows that were looked up.

    Autograd makes a gradient of the whole table for every micro-batch: 768 MB for the 250,002 pieces of XLM-R. On the
    CPU alone: a GPU's sum of rows would not be repeatable, and the table costs it a millisecond.
    """
    patched = []
    for module in model.modules():
        if (
            isinstance(module, nn.Embedding)
            and module.num_embeddings >= min_rows
            and module.weight.device.type == "cpu"
        ):
            padding = -1 if module.padding_idx is None else module.padding_idx
            module.forward = lambda ids, m=module, pad=padding: _Lookup.apply(m.weight, ids, pad)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, the limit of a container included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit, which is "max"
        limit = int(CONTAINER_LIMIT.read_text(encoding="ascii"))
        free = min(free, limit - psutil.Process().memory_info().rss)
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of one machine share it


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds on `device`; the most it has held, on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class GraphMeter(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves for the backward pass within it, the model's own tensors left out."""

    def __init__(self, model: nn.Module):
        self.bytes = 0
        self._seen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        super().__init__(self._count, lambda tensor: tensor)

    def __enter__(self) -> "GraphMeter":
        super().__enter__()
        return self

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
