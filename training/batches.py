"""Which pairs a step trains on, in micro-batches: a function of seed and step alone, so that a run resumes anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from modeling_capivara.two_towers import pad, tokenise


@dataclass
class MicroBatch:
    """Texts that go through the tower at once."""

    index: int  # of the micro-batch within the whole batch, over all processes; its random state derives from it
    start: int  # row of its first text in the whole batch, which is in order of length
    input_ids: Tensor  # (texts, tokens)
    attention_mask: Tensor | None = None  # (texts, tokens); None where padding is read as any token
    pixel_values: Tensor | None = None  # (texts, 3, height, width), where the image tower is trained; else None

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """What the model is called with, on a device."""
        found = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "pixel_values")}
        return {name: values.to(device) for name, values in found.items() if values is not None}

    @property
    def positions(self) -> Tensor:
        """(texts,), its rows in the whole batch."""
        return torch.arange(self.start, self.start + len(self.input_ids))


def micro_batches(processor: ProcessorMixin, captions: Sequence[str], size: int) -> tuple[list[MicroBatch], list[int]]:
    """Captions tokenised and cut in order of length, each micro-batch padded to its own longest; and the order, of each
    row in them its index in `captions`.
    """
    tokens = tokenise(processor, captions)
    order = sorted(range(len(captions)), key=lambda i: len(tokens[i]["input_ids"]))
    batches = []
    for start in range(0, len(order), size):
        batch = pad(processor, [tokens[i] for i in order[start : start + size]])
        batches.append(MicroBatch(len(batches), start, **batch))
    return batches, order


def batch_counts(batch_size: int, sizes: Sequence[int]) -> list[int]:
    """Pairs of a batch from each data set, by their sizes; ValueError where one would give none, or has too few."""
    exact = [batch_size * size / sum(sizes) for size in sizes]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])  # largest remainder first
    for i in by_rest[: batch_size - sum(counts)]:
        counts[i] += 1
    for count, size in zip(counts, sizes, strict=True):
        if count > size:
            raise ValueError(
                f"effective_batch_size ({batch_size}) takes {count} pairs from a data set that has {size} usable ones; "
                f"an image would be its own negative. Choose a smaller batch."
            )
        if count == 0:
            raise ValueError(f"A batch of {batch_size} has no room for a data set of {size} pairs; raise the batch.")
    return counts


def batch_indices(step: int, batch_size: int, number: int, seed: int) -> np.ndarray:
    """Rows of the batch of a step (counted from 0).

    Every epoch is a permutation of its own, cut into whole batches; its tail is left out, since a batch over the
    border could hold an image twice, as its own negative.
    """
    batches_per_epoch = number // batch_size
    epoch, position = divmod(step, batches_per_epoch)
    return _permutation(seed, epoch, number)[position * batch_size : (position + 1) * batch_size]


def spare_index(step: int, batch_size: int, number: int, seed: int, count: int) -> int:
    """The row that follows the batch of a step by `count` (from 0) in its permutation, around its end; ValueError where
    all others were tried.
    """
    if count >= number - batch_size:
        raise ValueError(
            f"Step {step + 1}: images can't be used, and no pair is left to take the place of one: "
            f"effective_batch_size takes {batch_size} of {number}. Choose a smaller batch, or mend the images."
        )
    epoch, position = divmod(step, number // batch_size)
    return int(_permutation(seed, epoch, number)[((position + 1) * batch_size + count) % number])


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(number)


def drawn_captions(captions: Sequence[list[str]], rows: np.ndarray, step: int, seed: int) -> list[str]:
    """One caption of each row, drawn at random: each step draws anew (CAPIVARA, arXiv 2310.13683, section 3)."""
    draws = np.random.default_rng([seed, step, 1]).random(len(rows))  # 1: a stream apart from that of `batch_indices`
    # A column of `datasets` reads many rows at once.
    chosen = [captions[row] for row in rows] if isinstance(captions, list) else captions[rows.tolist()]
    return [texts[int(draw * len(texts))] for texts, draw in zip(chosen, draws, strict=True)]


def drawn_views(views: int, number: int, step: int, seed: int) -> np.ndarray:
    """(number,), a view of each image of a step; the step itself, a fresh view, where `views` is 0."""
    if views == 0:
        return np.full(number, step)
    return np.random.default_rng([seed, step, 2]).integers(views, size=number)


def random_state(*numbers: int) -> int:
    """A seed that depends on all `numbers`, each at least 0, and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class StepPlan:
    """All that is drawn for a step, in the order of its micro-batches."""

    step: int  # counted from 0
    sources: np.ndarray  # (pairs,), which data set each is from
    rows: np.ndarray  # (pairs,), its number there
    views: np.ndarray  # (pairs,), the view of its image
    texts: list[str]
    batches: list[MicroBatch]  # all micro-batches, of all processes
    spent: int = 0  # spares that were put in

    def items(self, places: Tensor) -> list[tuple[int, int, int]]:
        """Data set, row and view of the images at these places."""
        return [(self.sources[place], self.rows[place], self.views[place]) for place in places.tolist()]


@dataclass
class Planner:
    """Draws the batches of a run; step n is the same whatever was drawn before."""

    captions: list[Sequence[list[str]]]  # data set -> pair -> captions
    counts: list[int]  # pairs of a batch from each data set
    processor: ProcessorMixin
    micro_batch_size: int  # texts of a micro-batch
    augmented_views: int  # of every image
    seed: int

    def __call__(self, step: int) -> StepPlan:
        """The pairs of a step, counted from 0."""
        drawn, texts = [], []
        for number, count in enumerate(self.counts):
            seed = self.seed + (number << 32)  # the first data set is drawn from as if it were alone
            rows = batch_indices(step, count, len(self.captions[number]), seed)
            drawn.append((np.full(count, number), rows))
            texts += drawn_captions(self.captions[number], rows, step, seed)
        batches, order = micro_batches(self.processor, texts, self.micro_batch_size)
        sources, rows = (np.concatenate(column)[order] for column in zip(*drawn, strict=True))
        return StepPlan(
            step=step,
            sources=sources,
            rows=rows,
            views=drawn_views(self.augmented_views, len(order), step, self.seed)[order],
            texts=[texts[i] for i in order],
            batches=batches,
        )

    def replaced(self, plan: StepPlan, places: Sequence[int]) -> StepPlan:
        """A plan with the next spares of its permutations at these places, and their micro-batches tokenised anew."""
        rows, texts = plan.rows.copy(), [*plan.texts]
        for count, place in enumerate(places, plan.spent):
            number = int(plan.sources[place])
            captions, seed = self.captions[number], self.seed + (number << 32)
            rows[place] = spare_index(plan.step, self.counts[number], len(captions), seed, count)
            (texts[place],) = drawn_captions(captions, rows[[place]], plan.step, seed + count)
        batches = [*plan.batches]
        for i, batch in enumerate(batches):
            if not {*batch.positions.tolist()}.isdisjoint(places):
                tokens = tokenise(self.processor, [texts[place] for place in batch.positions])
                batches[i] = MicroBatch(i, batch.start, **pad(self.processor, tokens))
        return replace(plan, rows=rows, texts=texts, batches=batches, spent=plan.spent + len(places))
