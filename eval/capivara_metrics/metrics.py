"""Metrics of cross-modal retrieval and of classification, as pure functions of embeddings, scores and ranks.

A query is compared with all items: a text with all images, or an image with all texts. Ranks count from 0: rank 0 means
that a relevant item has the highest score. A tie counts against the query, so that a model that gives every item the
same score does not look perfect.

Example:
    >>> import torch
    >>> from eval.capivara_metrics.metrics import ranks_from_scores, recall_at_k
    >>> scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.8, 0.7]])  # (queries, items)
    >>> ranks = ranks_from_scores(scores, relevant_items=[[0], [2]])
    >>> ranks.tolist()
    [0, 1]
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Values of k for recall@k. CAPIVARA (arXiv 2310.13683) reports the mean of these three recalls.
RECALL_CUTOFFS = (1, 5, 10)
# Number of scores that `compute_ranks_from_embeddings` computes at a time. They take 16 MiB in float32, and the memory
# allocator reuses this memory for the next scores.
BLOCK_SCORES = 2**22
# Largest number of scores that `cross_modal_ranks` stores: 512 MiB in float32. A larger score matrix is computed in
# blocks, once per direction.
MAX_STORED_SCORES = 2**27
# Number of stored scores that are compared at a time: 4 MiB in float32, which fits into the cache of a CPU.
COMPARISON_BLOCK_SCORES = 2**20
# Smallest number of queries in a block. In smaller blocks, reading the item embeddings would take longer than computing
# the scores.
MIN_BLOCK_QUERIES = 32


def _compute_ranks_with_mask(scores: Tensor, is_relevant: Tensor) -> Tensor:
    """Return the rank of each query's best relevant item.

    The rank is the number of wrong items that score at least as high as the best relevant item, so a tie counts against
    the query. Rank 0 is the best.

    Args:
        scores: Similarities (queries, items).
        is_relevant: Whether an item is relevant to a query, bool (queries, items).

    Returns:
        Ranks (queries,), int64, from 0.
    """
    is_wrong = ~is_relevant
    best = scores.masked_fill(is_wrong, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & is_wrong).sum(dim=1, dtype=torch.int32).long()


@torch.no_grad()
def compute_ranks_from_embeddings(
    query_embeds: Tensor, item_embeds: Tensor, query_groups: Tensor, item_groups: Tensor
) -> Tensor:
    """Return the rank of each query's best relevant item, computed from the embeddings of queries and items.

    The rank is the number of wrong items that score at least as high as the best relevant item. A score is the dot
    product of two embeddings.

    Args:
        query_embeds: Unit-length embeddings (queries, width).
        item_embeds: Unit-length embeddings (items, width).
        query_groups: Group of each query (queries,).
        item_groups: Group of each item (items,). An item is relevant to the queries of its group.

    Returns:
        Ranks (queries,), int64, from 0.

    Raises:
        ValueError: If a query has no relevant item, or if an embedding is not finite.
    """
    _check_finite_embeddings_and_relevant_items(query_embeds, item_embeds, query_groups, item_groups)
    block_size = max(MIN_BLOCK_QUERIES, BLOCK_SCORES // len(item_embeds))
    blocks = zip(query_embeds.split(block_size), query_groups.split(block_size), strict=True)
    ranks = [_compute_ranks_with_mask(part @ item_embeds.T, groups[:, None] == item_groups) for part, groups in blocks]
    return torch.cat(ranks)


@torch.no_grad()
def cross_modal_ranks(
    query_embeds: Tensor, item_embeds: Tensor, query_groups: Tensor, item_groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the retrieval ranks in both directions: each query searches all items, and each item searches all queries.

    A rank is the number of wrong results that score at least as high as the best relevant result. The ranks equal those
    of two calls of `compute_ranks_from_embeddings`.

    Args:
        query_embeds: Unit-length embeddings (queries, width), for example of texts.
        item_embeds: Unit-length embeddings (items, width), for example of images.
        query_groups: Group of each query (queries,). An image and its captions form a group.
        item_groups: Group of each item (items,).

    Returns:
        A tuple (query ranks, item ranks) with the shapes (queries,) and (items,), both int64, from 0.

    Raises:
        ValueError: If a query or item has no partner in its group, or if an embedding is not finite.
    """
    forward = query_embeds, item_embeds, query_groups, item_groups
    backward = item_embeds, query_embeds, item_groups, query_groups
    if len(query_embeds) * len(item_embeds) > MAX_STORED_SCORES:
        return compute_ranks_from_embeddings(*forward), compute_ranks_from_embeddings(*backward)
    _check_finite_embeddings_and_relevant_items(*forward)
    _check_finite_embeddings_and_relevant_items(*backward)
    scores, block_size = query_embeds @ item_embeds.T, max(1, COMPARISON_BLOCK_SCORES // len(item_embeds))

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (block, mask) for blocks of rows of the score matrix.

        Both tensors have the shape (rows, items). The mask is True where the item is relevant to the query.
        """
        for block, groups in zip(scores.split(block_size), query_groups.split(block_size), strict=True):
            yield block, groups[:, None] == item_groups

    query_ranks = torch.cat([_compute_ranks_with_mask(block, relevant) for block, relevant in blocks()])
    # The rank of an item depends on a column of the matrix, and reading columns is slow. Two passes over blocks of rows
    # give the same ranks as `_compute_ranks_with_mask`: the first pass finds the best relevant score of each item, the
    # second pass counts the wrong scores that are at least as high.
    best_of_blocks = [block.masked_fill(~relevant, -torch.inf).amax(dim=0) for block, relevant in blocks()]
    best = torch.stack(best_of_blocks).amax(dim=0)
    return query_ranks, sum(((block >= best) & ~relevant).sum(dim=0) for block, relevant in blocks())


def _check_finite_embeddings_and_relevant_items(
    query_embeds: Tensor, item_embeds: Tensor, query_groups: Tensor, item_groups: Tensor
) -> None:
    """Raise ValueError if an embedding is NaN or infinite, or if the group of a query has no item."""
    for name, embeds in (("query", query_embeds), ("item", item_embeds)):
        # Checking only the minimum and the maximum is enough, because `aminmax` returns NaN if an element is NaN.
        # Unlike `isfinite` on all elements, this check allocates no mask as large as the embeddings.
        if embeds.numel() and not torch.stack(embeds.aminmax()).isfinite().all():
            raise ValueError(f"A {name} embedding is NaN or infinite. Check the model's weights and the precision.")
    if missing := (~torch.isin(query_groups, item_groups)).nonzero().flatten()[:10].tolist():
        raise ValueError(f"Every query needs a relevant item, but there is none for queries {missing}.")


def _check_finite(scores: Tensor) -> None:
    """Raise ValueError if a score is NaN or infinite."""
    if not torch.isfinite(scores).all():
        raise ValueError("Scores must be finite, but one is NaN or infinite. Check the model's embeddings.")


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Return the share of queries with a relevant item among their k highest-scored items.

    Args:
        ranks: Rank of each query's best relevant item (queries,), from 0.
        k: Number of highest-scored items, at least 1.

    Returns:
        Recall@k, from 0 to 1.

    Raises:
        ValueError: If k is below 1, or if there is no query.

    Example:
        >>> import torch
        >>> from eval.capivara_metrics.metrics import recall_at_k
        >>> ranks = torch.tensor([0, 3, 1, 9])  # the best relevant item of the first query has the highest score
        >>> recall_at_k(ranks, k=1), recall_at_k(ranks, k=5)
        (0.25, 0.75)
    """
    return _compute_hits_per_query(ranks, k).mean().item()


def mean_recall(ranks: Tensor) -> float:
    """Return the mean of recall@1, recall@5 and recall@10, which CAPIVARA's paper reports per search direction.

    Args:
        ranks: Rank of each query's best relevant item (queries,), from 0.

    Returns:
        Mean recall, from 0 to 1.
    """
    return mean_hits(ranks).mean().item()


def _compute_hits_per_query(ranks: Tensor, k: int) -> Tensor:
    """Return for each query whether a relevant item is among its k highest-scored items.

    Args:
        ranks: Rank of each query's best relevant item (queries,), from 0.
        k: Number of highest-scored items in which a relevant item counts as a hit.

    Returns:
        1.0 for a hit, 0.0 otherwise, (queries,), float64.

    Raises:
        ValueError: If k is below 1, or if there is no query.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if not len(ranks):
        raise ValueError("There must be at least one query to average over, got none. Is the split empty?")
    return (ranks < k).double()


def mean_hits(ranks: Tensor) -> Tensor:
    """Return the mean recall of every single query, for example to compute a confidence interval.

    A query gets 1 if a relevant item is among its k highest-scored items, otherwise 0. Its mean recall is the mean over
    k = 1, 5 and 10.

    Args:
        ranks: Rank of each query's best relevant item (queries,), from 0.

    Returns:
        Values from 0 to 1, (queries,), float64. For example, a query with rank 3 gets 0, 1 and 1, so its value is 2/3.
    """
    return torch.stack([_compute_hits_per_query(ranks, k) for k in RECALL_CUTOFFS]).mean(dim=0)


def chance_recall(query_groups: Tensor, item_groups: Tensor, k: int) -> float:
    """Return the recall@k that random scores are expected to reach.

    Args:
        query_groups: Group of each query (queries,).
        item_groups: Group of each item (items,). An item is relevant to the queries of its group.
        k: Number of highest-scored items in which a relevant item counts as a hit.

    Returns:
        Mean over the queries, from 0 to 1.
    """
    items, relevant_counts = len(item_groups), Counter(item_groups.tolist())
    k = min(k, items)
    # k items drawn at random miss all relevant items with the probability C(wrong, k) / C(items, k).
    misses = [math.comb(items - relevant_counts[group], k) / math.comb(items, k) for group in query_groups.tolist()]
    return 1 - sum(misses) / len(misses)


def paired_bootstrap(
    baseline: Tensor, model: Tensor, groups: Tensor, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Compute how much better a model is than a baseline on the same queries, with a 95 % confidence interval.

    The interval is a percentile bootstrap interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13). Whole groups are resampled.

    Args:
        baseline: The baseline's value of the metric for each query (queries,).
        model: The model's value of the metric for each query (queries,).
        groups: Group of each query (queries,). An image and its captions form a group.
        resamples: Number of bootstrap samples.
        seed: Seed of the random draws.

    Returns:
        A tuple (gain, low, high): the mean of model minus baseline, and the ends of its interval.

    Raises:
        ValueError: If the three tensors differ in length.
    """
    if not len(baseline) == len(model) == len(groups):
        sizes = f"{len(baseline)}, {len(model)} and {len(groups)}"
        raise ValueError(f"baseline, model and groups must have the same length, got {sizes}.")
    difference = model.double() - baseline.double()
    _, index = groups.unique(return_inverse=True)
    sums, counts = torch.bincount(index, weights=difference), torch.bincount(index)
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.double)
    # Whole groups are drawn with replacement, because the captions of one image are not independent.
    for i in range(resamples):
        drawn = torch.randint(len(counts), counts.shape, generator=generator)
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return difference.mean().item(), low, high


def ranks_from_scores(scores: Tensor, relevant_items: Sequence[Sequence[int]]) -> Tensor:
    """Return the rank of each query's best relevant item, computed from a matrix of scores.

    The rank is the number of wrong items that score at least as high as the best relevant item.

    Args:
        scores: Similarities (queries, items), finite.
        relevant_items: For each query, the indices of its relevant items, at least one.

    Returns:
        Ranks (queries,), int64, from 0.

    Raises:
        ValueError: If a score is not finite, `scores` and `relevant_items` differ in length, a query has no relevant
            item, or an index is out of range.
    """
    _check_finite(scores)
    if len(scores) != len(relevant_items):
        raise ValueError(f"scores must have one row per query, got {len(scores)} rows, {len(relevant_items)} queries.")
    is_relevant = torch.zeros(scores.shape, dtype=torch.bool)
    for query, items in enumerate(relevant_items):
        if not len(items):
            raise ValueError(f"Every query needs a relevant item, but query {query} has none.")
        if not all(0 <= item < scores.shape[1] for item in items):
            highest = scores.shape[1] - 1
            raise ValueError(f"Indices of items must be from 0 to {highest}, got {list(items)} for query {query}.")
        is_relevant[query, list(items)] = True
    return _compute_ranks_with_mask(scores, is_relevant)


def median_rank(ranks: Tensor) -> float:
    """Return the median rank over all queries, counted from 1 as papers report it.

    Args:
        ranks: Rank of each query's best relevant item (queries,), from 0.
    """
    return ranks.double().quantile(0.5).item() + 1


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the share of images whose class is among the k highest-scored classes.

    A tie with a wrong class counts against the image.

    Args:
        scores: Finite scores (images, classes).
        labels: Index of the right class of each image (images,).
        k: Number of highest-scored classes, from 1 to the number of classes.

    Returns:
        Accuracy, from 0 to 1.

    Raises:
        ValueError: If a score is not finite, or if a label or k is out of range.
    """
    ranks = _compute_true_class_ranks(scores, labels)
    if k > scores.shape[1]:
        raise ValueError(f"k must be at most the number of classes, {scores.shape[1]}, got {k}.")
    return recall_at_k(ranks, k)


def mean_per_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the mean of the top-1 accuracies of all classes that have images.

    Every class has the same weight, however many images it has. Ties count against the image.

    Args:
        scores: Finite scores (images, classes).
        labels: Index of the right class of each image (images,).

    Returns:
        Mean accuracy, from 0 to 1.
    """
    return per_class_accuracy(scores, labels).nanmean().item()


def per_class_accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the top-1 accuracy of each class.

    A tie with a wrong class counts against the image.

    Args:
        scores: Finite scores (images, classes).
        labels: Index of the right class of each image (images,).

    Returns:
        Accuracies from 0 to 1, (classes,); NaN for a class without images.
    """
    matrix = confusion_matrix(scores, labels).double()
    return matrix.diag() / matrix.sum(dim=1)


def confusion_matrix(scores: Tensor, labels: Tensor) -> Tensor:
    """Count for each pair of classes how many images of the first class are classified as the second.

    A tie between the right class and a wrong class counts as the wrong class.

    Args:
        scores: Finite scores (images, classes).
        labels: Index of the right class of each image (images,).

    Returns:
        Counts (classes, classes), int64: rows are right classes, columns are predicted classes.
    """
    ranks, classes = _compute_true_class_ranks(scores, labels), scores.shape[1]
    # Scores are converted to floating-point numbers, because integers can't represent the -inf in the next line.
    floating = scores.to(torch.promote_types(scores.dtype, torch.float))
    best_wrong = floating.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    # As in `top_k_accuracy`, a tie counts against the image.
    predicted = torch.where(ranks == 0, labels, best_wrong)
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def eleven_point_map(scores: Tensor, targets: Tensor) -> float:
    """Return the 11-point interpolated mean average precision (mAP) for images with several classes.

    The average precision of a class is the mean of the interpolated precision at the recalls 0, 0.1, …, 1 (Everingham
    et al., The PASCAL Visual Object Classes Challenge, 2010, section 4.2). Classes without images do not count.

    Args:
        scores: Finite scores (images, classes).
        targets: 1 if the image has the class, else 0 (images, classes).

    Returns:
        Mean over classes, from 0 to 1.

    Raises:
        ValueError: If the shapes differ, if a score is not finite, or if no class has an image.
    """
    # scikit-learn is imported only here, because its import takes a second and retrieval does not need it.
    from sklearn.metrics import precision_recall_curve

    if scores.shape != targets.shape:
        raise ValueError(f"Shapes must be equal, got scores {tuple(scores.shape)}, targets {tuple(targets.shape)}.")
    _check_finite(scores)
    if not (present := targets.sum(dim=0).nonzero().flatten().tolist()):
        raise ValueError("At least one class must have an image, but targets has no 1.")
    # Levels of recall: 0, 0.1, 0.2, and so on to 1. They are lowered by 1e-12, because rounding can make a recall
    # slightly smaller than the level that it equals exactly.
    points, means = np.linspace(0, 1, 11) - 1e-12, []
    for column in present:
        # Images with equal scores share one point of the precision-recall curve.
        precision, recall, _ = precision_recall_curve(targets[:, column].numpy(), scores[:, column].numpy())
        # scikit-learn appends a point with precision 1 and recall 0, which was not measured. It is removed, because the
        # best precision at recall 0 would otherwise always be 1.
        precision, recall = precision[:-1], recall[:-1]
        means.append(np.mean([precision[recall >= point].max() for point in points]))
    return float(np.mean(means))


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve of a binary classifier.

    It equals the probability that a random positive image scores above a random negative image; a tie counts half.

    Args:
        scores: Finite scores (images,), higher for the positive class.
        labels: 1 for positive, 0 for negative (images,).

    Returns:
        Area, from 0 to 1.

    Raises:
        ValueError: If only one of the two labels occurs, or if a score is not finite.
    """
    # scikit-learn is imported only here, because its import takes a second and retrieval does not need it.
    from sklearn.metrics import roc_auc_score

    positives = labels.bool()
    if not positives.any() or positives.all():
        raise ValueError("ROC AUC needs positive and negative labels, but all labels are the same.")
    _check_finite(scores)
    return float(roc_auc_score(positives.numpy(), scores.numpy()))


def _compute_true_class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each image's right class: the number of wrong classes that score at least as high.

    Args:
        scores: Scores (images, classes).
        labels: Index of the right class of each image (images,).

    Returns:
        Ranks from 0, (images,).

    Raises:
        ValueError: If scores and labels differ in length, a score is not finite, or a label is out of range.
    """
    if len(scores) != len(labels):
        raise ValueError(f"scores must have one row per label, got {len(scores)} rows, {len(labels)} labels.")
    _check_finite(scores)
    if outside := labels[(labels < 0) | (labels >= scores.shape[1])].unique().tolist():
        raise ValueError(f"Labels must be from 0 to {scores.shape[1] - 1}, the last class, got {outside[:10]}.")
    return (scores >= scores.gather(1, labels[:, None])).sum(dim=1) - 1
