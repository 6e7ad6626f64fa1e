"""Retrieval metrics: pure functions of embeddings and ranks."""

import math

import torch
from torch import Tensor

RECALL_CUTOFFS = (1, 5, 10)  # CAPIVARA (arXiv 2310.13683) reports the mean of these three


def retrieval_ranks(
    query_embeds: Tensor, item_embeds: Tensor, query_groups: Tensor, item_groups: Tensor, block_size: int = 1024
) -> Tensor:
    """For every query, how many wrong items score at least as high as its best right one.

    An item is right when its group is the query's: an image and all of its captions share a group. Queries go through
    in blocks, so memory grows with `block_size` x items.

    Args:
        query_embeds: (queries, width), unit length.
        item_embeds: (items, width), unit length.
        query_groups: (queries,), integers.
        item_groups: (items,), integers.
        block_size: queries scored at once.

    Returns:
        (queries,), integers; 0 is a hit at rank 1. A tie with a wrong item counts against the query.

    Raises:
        ValueError: a query has no right item, or an embedding is not finite.
    """
    for name, embeds in (("query", query_embeds), ("item", item_embeds)):
        if not torch.isfinite(embeds).all():
            raise ValueError(f"A {name} embedding is NaN or infinite; the model's weights or precision are at fault.")
    missing = ~torch.isin(query_groups, item_groups)
    if missing.any():
        raise ValueError(f"Queries {missing.nonzero().flatten()[:10].tolist()} have no right item to find.")
    ranks = []
    for start in range(0, len(query_embeds), block_size):
        scores = query_embeds[start : start + block_size] @ item_embeds.T  # (block, items)
        right = query_groups[start : start + block_size, None] == item_groups  # (block, items)
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Share of queries whose best right item is among the k best-scored ones.

    Args:
        ranks: (queries,), from `retrieval_ranks`.
        k: how many items are looked at, at least 1.

    Returns:
        A share from 0 to 1, not a percentage.

    Raises:
        ValueError: k is below 1, or there is no query.
    """
    return hits_at_k(ranks, k).mean().item()


def mean_recall(ranks: Tensor) -> float:
    """Mean of recall at 1, 5 and 10, a share from 0 to 1: the paper's figure for one direction."""
    return mean_hits(ranks).mean().item()


def hits_at_k(ranks: Tensor, k: int) -> Tensor:
    """(queries,), 1.0 where the best right item is among the k best-scored ones, else 0.0."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if not len(ranks):
        raise ValueError("There is no query to average over; is the split empty?")
    return (ranks < k).double()


def mean_hits(ranks: Tensor) -> Tensor:
    """(queries,), each query's own share in the mean recall: its mean hit at 1, 5 and 10."""
    return torch.stack([hits_at_k(ranks, k) for k in RECALL_CUTOFFS]).mean(dim=0)


def chance_recall(query_groups: Tensor, item_groups: Tensor, k: int) -> float:
    """Expected recall@k of random scores: 1 - C(wrong, k) / C(items, k), averaged over the queries."""
    items = len(item_groups)
    groups, counts = item_groups.unique(return_counts=True)
    right_items = dict(zip(groups.tolist(), counts.tolist(), strict=True))
    k = min(k, items)
    misses = [math.comb(items - right_items.get(g, 0), k) / math.comb(items, k) for g in query_groups.tolist()]
    return 1 - sum(misses) / len(misses)


def paired_bootstrap(
    baseline: Tensor, model: Tensor, groups: Tensor, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two means over the same queries, with its 95 % interval.

    Whole groups (an image with all its captions) are drawn with replacement, since their queries are not independent.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, percentile interval.

    Args:
        baseline: (queries,), each query's value under the one model.
        model: (queries,), under the other.
        groups: (queries,), integers.
        resamples: how many samples are drawn.
        seed: of the draw.

    Returns:
        Mean of model - baseline, then the 2.5th and 97.5th percentile.

    Raises:
        ValueError: the three differ in length.
    """
    if not len(baseline) == len(model) == len(groups):
        raise ValueError(f"Paired values differ in number: {len(baseline)}, {len(model)} and {len(groups)}.")
    difference = model.double() - baseline.double()
    _, index = groups.unique(return_inverse=True)
    number = int(index.max()) + 1
    sums = torch.zeros(number, dtype=torch.double).index_add_(0, index, difference)
    counts = torch.zeros(number, dtype=torch.double).index_add_(0, index, torch.ones_like(difference))
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.double)
    for i in range(resamples):
        drawn = torch.randint(number, (number,), generator=generator)
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return difference.mean().item(), low, high
