"""Metrics of retrieval and classification: pure functions of embeddings, scores and ranks."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torch import Tensor

RECALL_CUTOFFS = (1, 5, 10)  # CAPIVARA (arXiv 2310.13683) reports the mean of these three
BLOCK_SCORES = 2**22  # scores of a block, 16 MiB in float32: so small, their memory is taken from the last block's
MAX_STORED_SCORES = 2**27  # scores that both directions are counted in, 512 MiB in float32; more are computed twice
COMPARISON_BLOCK_SCORES = 2**20  # scores at once where they are there: they stay in a processor's cache
MIN_BLOCK_QUERIES = 32  # at least, however many items there are: fewer would read all items for hardly any scores


def ranks_from_mask(scores: Tensor, is_relevant: Tensor) -> Tensor:
    """(queries,), how many wrong items score at least as high as the best right one: 0 is a hit at rank 1.

    Of scores (queries, items) and of which items are right (queries, items); a tie counts against the query.
    """
    wrong = ~is_relevant
    best = scores.masked_fill(wrong, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & wrong).sum(dim=1, dtype=torch.int32).long()


@torch.no_grad()
def retrieval_ranks(query_embeds: Tensor, item_embeds: Tensor, query_groups: Tensor, item_groups: Tensor) -> Tensor:
    """(queries,), `ranks_from_mask` unit-length embeddings (queries, width) among (items, width).

    An item is right when its group, of (items,), is the query's, of (queries,): an image and its captions share one.
    ValueError where a query has no right item, or an embedding is not finite.
    """
    _check_embeddings(query_embeds, item_embeds, query_groups, item_groups)
    block_size = max(MIN_BLOCK_QUERIES, BLOCK_SCORES // len(item_embeds))
    blocks = zip(query_embeds.split(block_size), query_groups.split(block_size), strict=True)
    return torch.cat(
        [ranks_from_mask(queries @ item_embeds.T, groups[:, None] == item_groups) for queries, groups in blocks]
    )


@torch.no_grad()
def cross_modal_ranks(
    query_embeds: Tensor, item_embeds: Tensor, query_groups: Tensor, item_groups: Tensor
) -> tuple[Tensor, Tensor]:
    """`retrieval_ranks` of the queries among the items (queries,), and of the items among the queries (items,)."""
    there = query_embeds, item_embeds, query_groups, item_groups
    back = item_embeds, query_embeds, item_groups, query_groups
    if len(query_embeds) * len(item_embeds) > MAX_STORED_SCORES:
        return retrieval_ranks(*there), retrieval_ranks(*back)
    _check_embeddings(*there)
    _check_embeddings(*back)
    scores, block_size = query_embeds @ item_embeds.T, max(1, COMPARISON_BLOCK_SCORES // len(item_embeds))

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for block, groups in zip(scores.split(block_size), query_groups.split(block_size), strict=True):
            yield block, groups[:, None] == item_groups

    of_queries = torch.cat([ranks_from_mask(block, right) for block, right in blocks()])
    # Blocks of items would be read across the rows: of each item, `ranks_from_mask` in two passes over all queries.
    best = torch.stack([block.masked_fill(~right, -torch.inf).amax(dim=0) for block, right in blocks()]).amax(dim=0)
    return of_queries, sum(((block >= best) & ~right).sum(dim=0) for block, right in blocks())


def _check_embeddings(query_embeds: Tensor, item_embeds: Tensor, query_groups: Tensor, item_groups: Tensor) -> None:
    for name, embeds in (("query", query_embeds), ("item", item_embeds)):
        if embeds.numel() and not torch.stack(embeds.aminmax()).isfinite().all():  # these pass NaN on, and copy nothing
            raise ValueError(f"A {name} embedding is NaN or infinite; the model's weights or precision are at fault.")
    if missing := (~torch.isin(query_groups, item_groups)).nonzero().flatten()[:10].tolist():
        raise ValueError(f"Queries {missing} have no right item to find.")


def _check_finite(scores: Tensor) -> None:
    if not torch.isfinite(scores).all():
        raise ValueError("A score is NaN or infinite; the embeddings are at fault.")


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Share (0 to 1) of queries whose best right item is among the k best-scored ones, by their ranks (queries,).

    Raises ValueError where k is below 1, or there is no query.
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
    items, right = len(item_groups), Counter(item_groups.tolist())
    k = min(k, items)
    misses = [math.comb(items - right[group], k) / math.comb(items, k) for group in query_groups.tolist()]
    return 1 - sum(misses) / len(misses)


def paired_bootstrap(
    baseline: Tensor, model: Tensor, groups: Tensor, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of model - baseline over the same queries, then the ends of its 95 % interval (2.5th, 97.5th percentile).

    `baseline` and `model` are each query's value (queries,). Whole groups of (queries,), an image with all its
    captions, are drawn with replacement, since their queries are not independent.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, percentile interval.
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


def ranks_from_scores(scores: Tensor, relevant_items: Sequence[Sequence[int]]) -> Tensor:
    """(queries,), `ranks_from_mask` scores (queries, items) by the indices of each query's right items, at least one."""
    _check_finite(scores)
    if len(scores) != len(relevant_items):
        raise ValueError(f"There are {len(scores)} rows of scores for {len(relevant_items)} queries.")
    right = torch.zeros(scores.shape, dtype=torch.bool)
    for query, items in enumerate(relevant_items):
        if not len(items):
            raise ValueError(f"Query {query} has no right item to find.")
        if not all(0 <= item < scores.shape[1] for item in items):
            raise ValueError(f"Query {query} has a right item outside the {scores.shape[1]} items: {list(items)}.")
        right[query, list(items)] = True
    return ranks_from_mask(scores, right)


def median_rank(ranks: Tensor) -> float:
    """Median over the queries of the rank of the best right item, 1 for the best."""
    return ranks.double().quantile(0.5).item() + 1


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of images whose class is among the k best-scored ones; a tie with a wrong class counts against it.

    Of scores (images, classes), finite, and labels (images,), the index of the right class.
    """
    ranks = _class_ranks(scores, labels)
    if k > scores.shape[1]:
        raise ValueError(f"k must be at most the number of classes, {scores.shape[1]}, got {k}.")
    return recall_at_k(ranks, k)


def mean_per_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Mean of the accuracies within each class that occurs: small classes count as much as large ones."""
    return per_class_accuracy(scores, labels).nanmean().item()


def per_class_accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """(classes,), top-1 accuracy within each class, NaN for a class without images; ties as in `top_k_accuracy`."""
    matrix = confusion_matrix(scores, labels).double()
    return matrix.diag() / matrix.sum(dim=1)


def confusion_matrix(scores: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes), how many images of the row's class are taken for the column's.

    A tie with a wrong class goes to that one, so that the diagonal holds what `top_k_accuracy` counts.
    """
    ranks, classes = _class_ranks(scores, labels), scores.shape[1]
    floating = scores.to(torch.promote_types(scores.dtype, torch.float))
    wrong = floating.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    taken = torch.where(ranks == 0, labels, wrong)
    return torch.bincount(labels * classes + taken, minlength=classes**2).reshape(classes, classes)


def eleven_point_map(scores: Tensor, targets: Tensor) -> float:
    """Mean over classes of the average precision at the recalls 0, 0.1, …, 1; images can have several classes.

    Of scores and targets, both (images, classes), 1 where the image has the class; a class without images is left out,
    images of equal score enter together.
    Source: Everingham et al., The PASCAL Visual Object Classes Challenge (2010), section 4.2.
    """
    if scores.shape != targets.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} must have the same shape.")
    _check_finite(scores)
    if not (present := targets.sum(dim=0).nonzero().flatten().tolist()):
        raise ValueError("No class has an image; are the targets empty?")
    points, means = np.linspace(0, 1, 11) - 1e-12, []
    for column in present:
        of_column = targets[:, column].numpy(), scores[:, column].numpy()
        # But for the last point, of recall 0, which scikit-learn adds
        precision, recall = (of[:-1] for of in precision_recall_curve(*of_column)[:2])
        means.append(np.mean([precision[recall >= point].max() for point in points]))
    return float(np.mean(means))


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Chance that a positive (label 1) scores above a negative (0), a tie counting half: area under the ROC curve."""
    positives = labels.bool()
    if not positives.any() or positives.all():
        raise ValueError("ROC AUC needs positives and negatives; only one of them occurs.")
    _check_finite(scores)
    return float(roc_auc_score(positives.numpy(), scores.numpy()))


def _class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """(images,), how many wrong classes score at least as high as the right one."""
    if len(scores) != len(labels):
        raise ValueError(f"There are {len(scores)} rows of scores for {len(labels)} labels.")
    _check_finite(scores)
    if outside := labels[(labels < 0) | (labels >= scores.shape[1])].unique().tolist():
        raise ValueError(f"Labels {outside[:10]} are outside the {scores.shape[1]} classes that have a name.")
    return (scores >= scores.gather(1, labels[:, None])).sum(dim=1) - 1
