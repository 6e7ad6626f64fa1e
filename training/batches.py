"""Plan the batches of a training run: which pairs, captions and image views each optimizer step uses.

A pair is an image with its captions. A view of an image is the image itself or one of its augmentations. `BatchPlanner`
returns the plan of a step, which depends only on the seed and the step number. A run can therefore resume at any step,
and all processes compute the same plan.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from modeling_capivara.two_towers import pad_batch, tokenize


@dataclass
class MicroBatch:
    """Texts that go through the text encoder together: a part of the whole batch of an optimizer step.

    If the image encoder is trained as well, the micro-batch also holds the pixels of the images of these texts.
    """

    index: int  # position among all micro-batches of the step, on all processes; a part of the seed of dropout
    start: int  # position of the first text in the whole batch, whose texts are sorted by number of tokens
    input_ids: Tensor  # (texts, tokens)
    attention_mask: Tensor | None = None  # (texts, tokens); None for a model without attention mask, such as SigLIP
    pixel_values: Tensor | None = None  # (texts, 3, height, width) if the image encoder is trained, otherwise None

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of this micro-batch as keyword arguments of the model, moved to `device`.

        The keys are "input_ids", "attention_mask" and "pixel_values". Tensors that are None are left out.
        """
        tensors = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "pixel_values")}
        return {name: values.to(device) for name, values in tensors.items() if values is not None}

    @property
    def positions(self) -> Tensor:
        """Positions of this micro-batch's texts in the whole batch of the step, (texts,).

        They are counted from 0, in the order of the whole batch, whose texts are sorted by number of tokens.
        """
        return torch.arange(self.start, self.start + len(self.input_ids))


def tokenize_into_sorted_micro_batches(
    processor: ProcessorMixin, captions: Sequence[str], size: int
) -> tuple[list[MicroBatch], list[int]]:
    """Tokenize captions, sort them by number of tokens, and divide them into micro-batches.

    Sorting keeps padding short.

    Args:
        processor: Processor of the model; its tokenizer is used.
        captions: One caption for each pair of the batch.
        size: Maximum number of captions in a micro-batch.

    Returns:
        A tuple (micro-batches, order). Each micro-batch is padded to its longest caption. `order` has the indices of
        the sorted captions: `captions[order[0]]` is the first caption of the first micro-batch.
    """
    tokens = tokenize(processor, captions)
    order = sorted(range(len(captions)), key=lambda i: len(tokens[i]["input_ids"]))
    batches = []
    for start in range(0, len(order), size):
        batch = pad_batch(processor, [tokens[i] for i in order[start : start + size]])
        batches.append(MicroBatch(len(batches), start, **batch))
    return batches, order


def apportion_batch_to_datasets(batch_size: int, dataset_sizes: Sequence[int]) -> list[int]:
    """Decide how many pairs of a batch come from each dataset, in proportion to the sizes of the datasets.

    The method is largest-remainder apportionment.

    Args:
        batch_size: Pairs in a batch. A pair is an image with its captions.
        dataset_sizes: Usable pairs of each dataset.

    Returns:
        Pairs that each dataset contributes to every batch; they sum to `batch_size`.

    Raises:
        ValueError: If there are fewer than 2 or fewer than `batch_size` pairs, or if a dataset is too small to
            contribute a pair to every batch.
    """
    pairs = sum(dataset_sizes)
    if pairs < 2:
        raise ValueError(
            f"Training needs at least 2 usable pairs, got {pairs}. Add data, or relax --min_pair_similarity and "
            "--caption_strategy, which leave out rows."
        )
    if batch_size > pairs:
        raise ValueError(
            f"effective_batch_size must be at most the number of usable pairs, {pairs}, got {batch_size}. In a "
            "larger batch, an image would occur twice and be its own negative. The largest batch that fits is "
            f"--effective_batch_size {pairs}."
        )
    exact = [batch_size * size / pairs for size in dataset_sizes]
    counts = [int(share) for share in exact]
    # The shares were rounded down, so some pairs of the batch are not assigned yet. Each of these pairs goes to one of
    # the datasets whose shares lost the largest fractions.
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: batch_size - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise ValueError(
            f"effective_batch_size {batch_size} leaves no room for the dataset of {dataset_sizes[counts.index(0)]} "
            "pairs: every batch must hold at least one pair of each dataset. Use a larger batch, or remove the dataset."
        )
    return counts


def batch_indices(step: int, batch_size: int, dataset_size: int, seed: int) -> np.ndarray:
    """Return the indices of the dataset rows that a training step uses.

    The rows are shuffled again in each epoch and divided into batches. An incomplete last batch is dropped.

    Args:
        step: Optimizer step, counted from 0.
        batch_size: Rows of this dataset in each batch.
        dataset_size: Rows of the dataset.
        seed: Seed of the permutations.

    Returns:
        Row indices without repetition, (batch_size,).
    """
    # An incomplete batch is not filled up with rows of the next epoch. It could then hold an image twice, and the image
    # would be its own negative.
    batches_per_epoch = dataset_size // batch_size
    epoch, position = divmod(step, batches_per_epoch)
    return _epoch_permutation(seed, epoch, dataset_size)[position * batch_size : (position + 1) * batch_size]


def _replacement_index(step: int, batch_size: int, dataset_size: int, seed: int, attempt: int) -> int:
    """Return the number of the row that replaces a row of a batch if its image can't be used.

    Args:
        step: Optimizer step, counted from 0.
        batch_size: Rows of this dataset in each batch.
        dataset_size: Rows of the dataset.
        seed: Seed of the permutations, as in `batch_indices`.
        attempt: Number of replacements that this step has already used from this dataset.

    Returns:
        Row number of the replacement, which is not in the batch.

    Raises:
        ValueError: If every row outside the batch has already been used as a replacement.
    """
    if attempt >= dataset_size - batch_size:
        raise ValueError(
            f"Step {step + 1}: images can't be used, and no pair is left to replace them: a batch takes {batch_size} "
            f"of {dataset_size} pairs of the dataset. Choose a smaller effective_batch_size, or repair the images."
        )
    # Replacements are the rows that follow the batch in the shuffled order of its epoch, then the rows from its start.
    epoch, position = divmod(step, dataset_size // batch_size)
    return int(_epoch_permutation(seed, epoch, dataset_size)[((position + 1) * batch_size + attempt) % dataset_size])


@lru_cache(maxsize=8)
def _epoch_permutation(seed: int, epoch: int, dataset_size: int) -> np.ndarray:
    """Return the row numbers of a dataset in the shuffled order of an epoch, (dataset_size,).

    The last results are cached, because an epoch has many steps.
    """
    return np.random.default_rng([seed, epoch]).permutation(dataset_size)


def sample_captions(captions: Sequence[list[str]], rows: np.ndarray, step: int, seed: int) -> list[str]:
    """Draw one random caption for each image of a training step (CAPIVARA, arXiv 2310.13683, section 3).

    Args:
        captions: The captions of every row of a dataset: a list, or a column of a `datasets.Dataset`.
        rows: Indices of the rows that the step uses, (rows,).
        step: Optimizer step, counted from 0.
        seed: Seed of the draws.

    Returns:
        One caption for each row, in the order of `rows`.
    """
    # The row order in `batch_indices` also depends on random numbers from this seed. The additional number 1 makes the
    # draws of captions independent of the row order.
    draws = np.random.default_rng([seed, step, 1]).random(len(rows))
    # A column of `datasets` is read in one call for all rows, which is much faster than row by row.
    choices = [captions[row] for row in rows] if isinstance(captions, list) else captions[rows.tolist()]
    return [texts[int(draw * len(texts))] for texts, draw in zip(choices, draws, strict=True)]


def sample_view_numbers(views: int, number: int, step: int, seed: int) -> np.ndarray:
    """Draw for each image of a training step which of its views is used. A view is an augmented copy of an image.

    Args:
        views: Number of fixed views of every image. 0: a new augmentation at every step.
        number: Number of images in the step.
        step: Optimizer step, counted from 0.
        seed: Seed of the draws.

    Returns:
        Numbers from 0 to `views` - 1, (number,). If `views` is 0, every image gets the step number.
    """
    if views == 0:
        return np.full(number, step)
    return np.random.default_rng([seed, step, 2]).integers(views, size=number)


@dataclass
class StepPlan:
    """The images and captions that one optimizer step uses, as one batch of pairs.

    A pair is an image with one of its captions. The pairs are sorted by the number of tokens of the caption.
    """

    step: int  # counted from 0
    dataset_indices: np.ndarray  # (pairs,), position of each pair's dataset in the list of training datasets
    rows: np.ndarray  # (pairs,), row number of each pair in its dataset
    views: np.ndarray  # (pairs,), number of the augmented version of each image, see `sample_view_numbers`
    texts: list[str]  # caption of each pair
    batches: list[MicroBatch]  # the micro-batches of all processes
    # {position of a dataset in the list of training datasets: number of its pairs that have been replaced so far}
    replacement_counts: Counter[int] = field(default_factory=Counter)

    def items(self, places: Tensor) -> list[tuple[int, int, int]]:
        """Return where the images at some positions of the batch are stored, for `training.inputs.prefetch_pixels`.

        Args:
            places: Positions in the batch, (images,).

        Returns:
            One tuple per image: (index of its dataset, row number in the dataset, number of its augmented version).
        """
        return [(self.dataset_indices[place], self.rows[place], self.views[place]) for place in places.tolist()]


@dataclass
class BatchPlanner:
    """Planner that decides which images and captions each optimizer step uses.

    Call it with the number of a step to get the `StepPlan`. The plan depends only on this number and the seed, not on
    earlier calls, so a resumed run continues with the same batches.
    """

    captions: list[Sequence[list[str]]]  # for each dataset, the captions of each of its pairs
    pairs_per_dataset: list[int]  # pairs that each dataset contributes to a batch, see `apportion_batch_to_datasets`
    processor: ProcessorMixin
    micro_batch_size: int  # captions per micro-batch
    # Views of every image. 1: the image itself. V above 1: V augmentations that stay the same during the whole run, one
    # of which is drawn at every step. 0: a new augmentation at every step.
    augmented_views: int
    seed: int

    def __call__(self, step: int) -> StepPlan:
        """Return the plan of the optimizer step with the number `step`, counted from 0."""
        rows, texts = [], []
        for number, count in enumerate(self.pairs_per_dataset):
            seed = self.seed + (number << 32)  # the first dataset has the seed of the run, each other one its own
            rows.append(batch_indices(step, count, len(self.captions[number]), seed))
            texts += sample_captions(self.captions[number], rows[-1], step, seed)
        batches, order = tokenize_into_sorted_micro_batches(self.processor, texts, self.micro_batch_size)
        return StepPlan(
            step=step,
            dataset_indices=np.repeat(range(len(self.pairs_per_dataset)), self.pairs_per_dataset)[order],
            rows=np.concatenate(rows)[order],
            views=sample_view_numbers(self.augmented_views, len(order), step, self.seed)[order],
            texts=[texts[i] for i in order],
            batches=batches,
        )

    def replace_pairs(self, plan: StepPlan, places: Sequence[int]) -> StepPlan:
        """Replace those pairs of a batch whose images can't be used, for example because a file is damaged.

        Args:
            plan: Plan of a step. It is not changed.
            places: Positions of the pairs to replace, counted from 0 in the batch.

        Returns:
            A new plan. Each replacement comes from the same dataset as the pair that it replaces.

        Raises:
            ValueError: If a dataset has no unused pair left.
        """
        rows, texts, counts = plan.rows.copy(), [*plan.texts], Counter(plan.replacement_counts)
        for place in places:
            number = int(plan.dataset_indices[place])
            attempt = counts[number]
            counts[number] += 1
            captions, seed = self.captions[number], self.seed + (number << 32)
            rows[place] = _replacement_index(plan.step, self.pairs_per_dataset[number], len(captions), seed, attempt)
            (texts[place],) = sample_captions(captions, rows[[place]], plan.step, seed + attempt)
        batches = [*plan.batches]
        for i, batch in enumerate(batches):
            if not {*batch.positions.tolist()}.isdisjoint(places):
                tokens = tokenize(self.processor, [texts[place] for place in batch.positions])
                batches[i] = MicroBatch(i, batch.start, **pad_batch(self.processor, tokens))
        return replace(plan, rows=rows, texts=texts, batches=batches, replacement_counts=counts)
