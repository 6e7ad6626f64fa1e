"""The pairs of a step, and one loss over all of them, in the memory of a few micro-batches, on any number of processes.

    step = WholeBatch(model, accelerator, seed=0)
    report = step(0, batches, pairs=2816, image_embeds=embeds)  # the gradients are in the parameters

What is drawn is a function of seed and step alone, so that a run resumes anywhere. The gradients are plain autograd's:
every micro-batch is embedded, those whose graph does not fit under `torch.utils.checkpoint`, the loss is taken of all
embeddings together, and each micro-batch has a backward pass of its own. One that is embedded again has the random
state of its first time, so the gradient is the same to the bit whatever was kept.
"""

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import ProcessorMixin

from modeling_capivara.two_towers import (
    compute_image_embeds,
    compute_text_embeds,
    embedding_width,
    pad_batch,
    tokenize,
    uses_sigmoid_loss,
)

CONTAINER_MEMORY_FILE = Path(
    "/sys/fs/cgroup/memory.max"
)  # in bytes, as a container sees it; other limits are not known
MAX_TILE_LOGITS = 2**24  # logits at once, 64 MiB in float32
GRAPH_MEMORY_SHARE = (
    0.6  # of the memory that is free beside optimiser and gradients; the rest is for one more micro-batch
)
LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # texts, images, logit_scale, own -> scalar


@dataclass
class MicroBatch:
    """Texts that go through the tower at once."""

    index: int  # of the micro-batch within the whole batch, over all processes; its random state derives from it
    start: int  # row of its first text in the whole batch, which is in order of length
    input_ids: Tensor  # (texts, tokens)
    attention_mask: Tensor | None = None  # (texts, tokens); None where padding is read as any token
    pixel_values: Tensor | None = None  # (texts, 3, height, width), where the image tower is trained; else None

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """What the model is called with, on a device."""
        found = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "pixel_values")}
        return {name: values.to(device) for name, values in found.items() if values is not None}

    @property
    def positions(self) -> Tensor:
        """(texts,), its rows in the whole batch."""
        return torch.arange(self.start, self.start + len(self.input_ids))


def make_micro_batches(
    processor: ProcessorMixin, captions: Sequence[str], size: int
) -> tuple[list[MicroBatch], list[int]]:
    """Captions tokenised and cut in order of length, each micro-batch padded to its own longest; and the order, of each
    row in them its index in `captions`.
    """
    tokens = tokenize(processor, captions)
    order = sorted(range(len(captions)), key=lambda i: len(tokens[i]["input_ids"]))
    batches = []
    for start in range(0, len(order), size):
        batch = pad_batch(processor, [tokens[i] for i in order[start : start + size]])
        batches.append(MicroBatch(len(batches), start, **batch))
    return batches, order


def apportion_batch(batch_size: int, dataset_sizes: Sequence[int]) -> list[int]:
    """Split a batch over the datasets in proportion to their sizes (largest-remainder apportionment).

    Raises ValueError if there are fewer pairs than a batch needs, or a dataset is too small to be in every batch.
    """
    if not (pairs := sum(dataset_sizes)):
        raise ValueError("No usable pair is left: --min_pair_similarity and --caption_strategy leave all others out.")
    if batch_size > pairs:
        raise ValueError(
            f"effective_batch_size must be at most the number of usable pairs, {pairs}, got {batch_size}: an image "
            f"would be its own negative. The largest batch that fits is --effective_batch_size {pairs}."
        )
    exact = [batch_size * size / pairs for size in dataset_sizes]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])  # largest remainder first
    for i in by_rest[: batch_size - sum(counts)]:
        counts[i] += 1
    for count, size in zip(counts, dataset_sizes, strict=True):
        if count == 0:
            raise ValueError(f"A batch of {batch_size} has no room for a data set of {size} pairs; raise the batch.")
    return counts


def batch_indices(step: int, batch_size: int, dataset_size: int, seed: int) -> np.ndarray:
    """Rows of the batch of a step (counted from 0).

    Every epoch is a permutation of its own, cut into whole batches; its tail is left out, since a batch over the
    border could hold an image twice, as its own negative.
    """
    batches_per_epoch = dataset_size // batch_size
    epoch, position = divmod(step, batches_per_epoch)
    return _epoch_permutation(seed, epoch, dataset_size)[position * batch_size : (position + 1) * batch_size]


def replacement_index(step: int, batch_size: int, dataset_size: int, seed: int, attempt: int) -> int:
    """The row that follows the batch of a step by `count` (from 0) in its permutation, around its end; ValueError where
    all others were tried.
    """
    if attempt >= dataset_size - batch_size:
        raise ValueError(
            f"Step {step + 1}: images can't be used, and no pair is left to take the place of one: "
            f"effective_batch_size takes {batch_size} of {dataset_size}. Choose a smaller batch, or mend the images."
        )
    epoch, position = divmod(step, dataset_size // batch_size)
    return int(_epoch_permutation(seed, epoch, dataset_size)[((position + 1) * batch_size + attempt) % dataset_size])


@lru_cache(maxsize=8)
def _epoch_permutation(seed: int, epoch: int, dataset_size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(dataset_size)


def sample_captions(captions: Sequence[list[str]], rows: np.ndarray, step: int, seed: int) -> list[str]:
    """One caption of each row, drawn at random: each step draws anew (CAPIVARA, arXiv 2310.13683, section 3)."""
    draws = np.random.default_rng([seed, step, 1]).random(len(rows))  # 1: a stream apart from that of `batch_indices`
    # A column of `datasets` reads many rows at once.
    chosen = [captions[row] for row in rows] if isinstance(captions, list) else captions[rows.tolist()]
    return [texts[int(draw * len(texts))] for texts, draw in zip(chosen, draws, strict=True)]


def sample_views(views: int, number: int, step: int, seed: int) -> np.ndarray:
    """(number,), a view of each image of a step; the step itself, a fresh view, where `views` is 0."""
    if views == 0:
        return np.full(number, step)
    return np.random.default_rng([seed, step, 2]).integers(views, size=number)


def derive_seed(*numbers: int) -> int:
    """A seed that depends on all `numbers`, each at least 0, and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class StepPlan:
    """All that is drawn for a step, in the order of its micro-batches."""

    step: int  # counted from 0
    dataset_indices: np.ndarray  # (pairs,), which data set each is from
    rows: np.ndarray  # (pairs,), its number there
    views: np.ndarray  # (pairs,), the view of its image
    texts: list[str]
    batches: list[MicroBatch]  # all micro-batches, of all processes
    replacement_counts: Counter[int] = field(default_factory=Counter)  # data set -> its spares that were put in

    def items(self, places: Tensor) -> list[tuple[int, int, int]]:
        """Data set, row and view of the images at these places."""
        return [(self.dataset_indices[place], self.rows[place], self.views[place]) for place in places.tolist()]


@dataclass
class BatchPlanner:
    """Draws the batches of a run; step n is the same whatever was drawn before."""

    captions: list[Sequence[list[str]]]  # data set -> pair -> captions
    pairs_per_dataset: list[int]  # pairs of a batch from each data set
    processor: ProcessorMixin
    micro_batch_size: int  # texts of a micro-batch
    augmented_views: int  # of every image
    seed: int

    def __call__(self, step: int) -> StepPlan:
        """The pairs of a step, counted from 0."""
        drawn, texts = [], []
        for number, count in enumerate(self.pairs_per_dataset):
            seed = self.seed + (number << 32)  # the first data set is drawn from as if it were alone
            rows = batch_indices(step, count, len(self.captions[number]), seed)
            drawn.append((np.full(count, number), rows))
            texts += sample_captions(self.captions[number], rows, step, seed)
        batches, order = make_micro_batches(self.processor, texts, self.micro_batch_size)
        sources, rows = (np.concatenate(column)[order] for column in zip(*drawn, strict=True))
        return StepPlan(
            step=step,
            dataset_indices=sources,
            rows=rows,
            views=sample_views(self.augmented_views, len(order), step, self.seed)[order],
            texts=[texts[i] for i in order],
            batches=batches,
        )

    def replace_pairs(self, plan: StepPlan, places: Sequence[int]) -> StepPlan:
        """A plan with the next spares of its permutations at these places, and their micro-batches tokenised anew."""
        rows, texts, spent = plan.rows.copy(), [*plan.texts], Counter(plan.replacement_counts)
        for place in places:
            number = int(plan.dataset_indices[place])
            count, spent[number] = spent[number], spent[number] + 1
            captions, seed = self.captions[number], self.seed + (number << 32)
            rows[place] = replacement_index(plan.step, self.pairs_per_dataset[number], len(captions), seed, count)
            (texts[place],) = sample_captions(captions, rows[[place]], plan.step, seed + count)
        batches = [*plan.batches]
        for i, batch in enumerate(batches):
            if not {*batch.positions.tolist()}.isdisjoint(places):
                tokens = tokenize(self.processor, [texts[place] for place in batch.positions])
                batches[i] = MicroBatch(i, batch.start, **pad_batch(self.processor, tokens))
        return replace(plan, rows=rows, texts=texts, batches=batches, replacement_counts=spent)


@dataclass(frozen=True)
class StepReport:
    """What one step gave beside the gradients."""

    loss: float  # of the whole batch, in nats
    graphs_kept: int  # micro-batches of this process whose graph was kept, not made again


@dataclass
class WholeBatch:
    """The gradients of one optimiser step, for every trained parameter of a model.

    The model is called, but not wrapped for gradient averaging: a wrapper averages at every micro-batch, and waits for
    ever where one process has fewer of them. The processes' gradients are summed once, at the end.
    """

    model: nn.Module  # in training mode, of two towers (`modeling_capivara.two_towers`)
    accelerator: Accelerator  # device, precision and processes
    seed: int
    budget: float | None = None  # bytes of graphs that are kept; what is free at the first step where None
    _bytes_per_token: float = 0.0  # of a graph, as the first micro-batch has it
    _bytes_per_text: float = 1.0

    def __call__(
        self, step: int, batches: Sequence[MicroBatch], pairs: int, image_embeds: Tensor | None = None
    ) -> StepReport:
        """Fill the gradients of a step, counted from 0; they are zero or None before.

        `batches` are the micro-batches of this process, any number of them, also none; `pairs` those of the whole batch
        over all processes, at least 2, else ValueError. `image_embeds` are (pairs, width), unit length, in the order of
        the micro-batches; None where each has its pixels, whose embeddings then have a gradient.

        Raises FloatingPointError where the loss is not finite; no gradient was computed.
        """
        if pairs < 2:
            raise ValueError(f"The loss needs at least 2 pairs, got {pairs}.")
        own = torch.cat([torch.empty(0, dtype=torch.long), *(batch.positions for batch in batches)])
        own = own.to(self.accelerator.device)
        words = cached_word_rows(
            self.model.text_model.get_input_embeddings(), [batch.input_ids.to(own.device) for batch in batches]
        )
        with words, self.accelerator.autocast():  # one for all micro-batches: each weight is cast once a step
            parts, kept = self._embed_batches(step, batches)
            if kept == len(batches):
                keep_freed_memory()
            leaves = [[side.detach().requires_grad_(side.requires_grad) for side in part] for part in parts]
            texts = self._gather([leaf[0] for leaf in leaves], own, pairs)
            if image_embeds is None:
                image_embeds = self._gather([leaf[1] for leaf in leaves], own, pairs)
            loss = select_loss(self.model)(texts, image_embeds, self.model.logit_scale, own)
            whole = loss.detach().clone()
            if self.accelerator.num_processes > 1:
                torch.distributed.all_reduce(whole)
            if not torch.isfinite(whole):
                raise FloatingPointError(f"The loss is {whole.item()}.")
            with torch.autocast(own.device.type, enabled=False):
                self.accelerator.backward(loss)
                # One by one: of a weight's cast, which all share, a common pass would sum the gradients in 8 bits.
                for part, leaf in zip(parts, leaves, strict=True):
                    sides = [i for i, side in enumerate(leaf) if side.grad is not None]
                    torch.autograd.backward([part[i] for i in sides], [leaf[i].grad for i in sides])
        if kept < len(batches):  # graphs that are made again leave holes, beside which Adam's moments would come to lie
            return_freed_memory()
        if self.accelerator.num_processes > 1:
            self._sum_gradients()
        return StepReport(whole.item(), kept)

    def _embed_batches(self, step: int, batches: Sequence[MicroBatch]) -> tuple[list[list[Tensor]], int]:
        """The embeddings of each micro-batch, and how many of them, from the longest on, keep their graph."""
        parts, kept, spent = [], 0, 0.0
        if self.budget is None and batches:  # of the first micro-batch: its graph, and what is left beside Adam
            size, texts = measure_graph_bytes(lambda: self._embed(step, batches[0]), self.model), batches[0].input_ids
            self._bytes_per_token, self._bytes_per_text = size / texts.numel(), size / len(texts)
            self.budget = GRAPH_MEMORY_SHARE * max(
                available_memory(self.accelerator.device) - self._pending_state_bytes(), 0
            )
        for batch in reversed(batches):  # the longest texts first: what follows fits into the memory that they leave
            texts = batch.input_ids
            size = max(self._bytes_per_token * texts.numel(), self._bytes_per_text * len(texts))
            if spent + size <= self.budget:
                spent += size
                parts.append(self._embed(step, batch))
                kept += 1
            else:  # it sets its random state itself
                parts.append(checkpoint(self._embed, step, batch, use_reentrant=False, preserve_rng_state=False))
        return parts[::-1], kept

    def _embed(self, step: int, batch: MicroBatch) -> list[Tensor]:
        """(rows, width) of the texts, and of the images where the micro-batch has their pixels."""
        # Dropout: the same both times, on any number of processes.
        torch.manual_seed(derive_seed(self.seed, step, batch.index))
        inputs = batch.model_inputs(self.accelerator.device)
        pixels = inputs.pop("pixel_values", None)
        sides = [compute_text_embeds(self.model, **inputs)]
        return sides if pixels is None else [*sides, compute_image_embeds(self.model, pixels)]

    def _gather(self, parts: Sequence[Tensor], local_rows: Tensor, pairs: int) -> Tensor:
        """(pairs, width) of all processes; `parts` are this one's rows `own`, and gradients come back to them."""
        if self.accelerator.num_processes == 1:
            return torch.cat(parts)
        model = self.accelerator.unwrap_model(self.model)
        options = {"device": local_rows.device, "dtype": torch.promote_types(model.dtype, torch.float32)}
        # It requires a gradient by itself: a process without micro-batches takes part in the backward pass, too.
        whole = torch.zeros(pairs, embedding_width(model.config), requires_grad=True, **options)
        if parts:
            whole = whole.index_copy(0, local_rows, torch.cat(parts).to(whole.dtype))
        return all_reduce(whole)

    def _sum_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    def _pending_state_bytes(self) -> int:
        """Bytes of gradients and of Adam's moments that are still to be allocated."""
        return sum(p.nbytes * (2 + (p.grad is None)) for p in self.model.parameters() if p.requires_grad)


def select_loss(model: nn.Module) -> LossFunction:
    """The loss that a model of two towers is trained with: SigLIP's where it has a bias, else CLIP's."""
    return partial(sigmoid_loss, logit_bias=model.logit_bias) if uses_sigmoid_loss(model) else contrastive_loss


def contrastive_loss(text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor, local_rows: Tensor) -> Tensor:
    """This process's share of CLIP's loss: the sum over the processes is `clip_loss` of the whole batch.

    Source: CLIP (arXiv 2103.00020), section 2.3, figure 3. Of both sides of the whole batch, (pairs, width), unit
    length, row i of one belonging to row i of the other; the natural logarithm of the scale; and `own`, (rows,), those
    whose cross-entropies this process takes. A scalar, in nats, at least in float32.
    """
    texts, images, scale = _upcast(text_embeds, image_embeds, logit_scale)
    with torch.autocast(texts.device.type, enabled=False):
        to_images = _sum_tiles(_cross_entropy, scale.exp() * texts[local_rows], images, local_rows)
        return (to_images + _sum_tiles(_cross_entropy, scale.exp() * images[local_rows], texts, local_rows)) / (
            2 * len(texts)
        )


def sigmoid_loss(
    text_embeds: Tensor, image_embeds: Tensor, logit_scale: Tensor, local_rows: Tensor, logit_bias: Tensor
) -> Tensor:
    """This process's share of SigLIP's loss, of every text with every image: transformers' own of the whole batch.

    Source: SigLIP (arXiv 2303.15343), section 3.1, algorithm 1. Arguments and result as of `contrastive_loss`: `own`
    are the texts whose pairs this process takes, `logit_bias` is a scalar.
    """
    texts, images, scale, bias = _upcast(text_embeds, image_embeds, logit_scale, logit_bias)

    def pairs(some: Tensor, items: Tensor, right: Tensor) -> Tensor:
        signs = torch.full((len(some), len(items)), -1.0, dtype=some.dtype, device=some.device)
        signs[torch.arange(len(some)), right] = 1
        return -F.logsigmoid(signs * (some @ items.T + bias)).sum()

    with torch.autocast(texts.device.type, enabled=False):
        return _sum_tiles(pairs, scale.exp() * texts[local_rows], images, local_rows) / len(texts)


def _upcast(*tensors: Tensor) -> list[Tensor]:
    """`tensors` where the first is, in its precision, at least in float32."""
    first = tensors[0]
    return [tensor.to(first.device, torch.promote_types(first.dtype, torch.float32)) for tensor in tensors]


def _cross_entropy(queries: Tensor, items: Tensor, target_rows: Tensor) -> Tensor:
    return F.cross_entropy(queries @ items.T, target_rows, reduction="sum")


def _sum_tiles(loss: Callable[..., Tensor], queries: Tensor, items: Tensor, target_rows: Tensor) -> Tensor:
    """Sum over the queries; in tiles of rows, which are made again in the backward pass where there are several."""
    rows = max(1, MAX_TILE_LOGITS // len(items))
    if len(queries) <= rows:
        return loss(queries, items, target_rows)
    tiles = zip(queries.split(rows), target_rows.split(rows), strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return sum(checkpoint(loss, some, items, targets, **options) for some, targets in tiles)


@contextmanager
def cached_word_rows(table: nn.Embedding, input_ids: Sequence[Tensor]) -> Iterator[None]:
    """Within it `table` answers from the rows that a step's texts use, looked up once.

    The table then has one gradient, not one of its full size for every micro-batch: 768 MB for the 250,002 pieces of
    XLM-R. The backward pass has to be within it, too; after it, RuntimeError is raised.
    """
    ids = torch.cat([torch.empty(0, dtype=torch.long, device=table.weight.device), *map(torch.flatten, input_ids)])
    ids = ids.unique()
    before, table.sparse = table.sparse, True  # added to the gradient that is there; a dense one is as large again
    found = table(ids)  # by its own forward: some tables scale their rows, and padding's has a gradient of zero
    table.sparse = before
    rows = found.detach().requires_grad_(found.requires_grad)  # a leaf, where several backward passes are summed
    ended = False

    def within(gradient: Tensor) -> None:
        if ended:  # what was looked up again, meanwhile, was looked up in the whole table
            raise RuntimeError("The backward pass of texts belongs within `word_rows`.")

    if rows.requires_grad:
        rows.register_hook(within)
    table.forward = lambda wanted: F.embedding(torch.searchsorted(ids, wanted), rows)
    try:
        yield
    finally:
        del table.forward
        ended = True
    if rows.grad is not None:
        if table.weight.grad is None:
            table.weight.grad = torch.zeros_like(table.weight)
        found.backward(rows.grad)


def measure_graph_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd saves for the backward pass of `run`, the model's own tensors and their casts left out."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        results = [run()]  # alive until all is counted: freed storage would be given out again
        shared = sum(sizes)  # with the casts of weights, which another run has again
        results.append(run())
    return sum(sizes) - shared


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: given back, it would be fetched again, page by page, at the next training step."""
    with suppress(OSError, AttributeError):  # another system, or its C library
        for option, value in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: mallopt(3)
            ctypes.CDLL(None).mallopt(option, value)


def return_freed_memory() -> None:
    """Let glibc give free pages back to the system: what comes next may be of other sizes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, the limit of a container included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit, which is "max"
        limit = int(CONTAINER_MEMORY_FILE.read_text(encoding="ascii"))
        free = min(free, limit - psutil.Process().memory_info().rss)
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of one machine share it
