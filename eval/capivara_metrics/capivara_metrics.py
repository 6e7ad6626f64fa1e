"""Metric module for Hugging Face's `evaluate` that computes the metrics of `metrics.py`.

The second argument of `evaluate.load` selects the metric, a key of `METRIC_DEFINITIONS`:

    evaluate.load("/path/to/eval/capivara_metrics", "recall_at_k").compute(predictions=..., references=..., k=5)

The folder `capivara_metrics` needs no other file of the project. It can be copied anywhere, or uploaded to a Space on
the Hub, but it must keep its name.
"""

from collections.abc import Callable

import datasets
import evaluate
import torch
from torch import Tensor

from .metrics import (
    eleven_point_map,
    mean_per_class_accuracy,
    mean_recall,
    median_rank,
    ranks_from_scores,
    recall_at_k,
    roc_auc,
    top_k_accuracy,
)

SCORE_FEATURE = datasets.Value("float32")
LABEL_FEATURE = datasets.Value("int64")
SCORES_FEATURE = datasets.Sequence(SCORE_FEATURE)
LABELS_FEATURE = datasets.Sequence(LABEL_FEATURE)


def _compute_recall_from_scores(scores: Tensor, relevant_items: list[list[int]], k: int = 1) -> float:
    """Compute recall@k from scores.

    Args:
        scores: Similarities (queries, items).
        relevant_items: For each query, the indices of its relevant items.
        k: Number of highest-scored items in which a relevant item counts as a hit.

    Raises:
        ValueError: If k is larger than the number of items, because recall@k would always be 1.
    """
    if k > scores.shape[1]:
        raise ValueError(f"k must be at most the number of items, {scores.shape[1]}, got {k}.")
    return recall_at_k(ranks_from_scores(scores, relevant_items), k)


def _with_label_tensor(metric: Callable[..., float]) -> Callable[..., float]:
    """Wrap a metric so that it accepts labels as a list, because `evaluate` passes lists instead of tensors."""
    return lambda scores, labels, **options: metric(scores, torch.tensor(labels), **options)


RETRIEVAL_INPUTS = (
    "predictions: scores (queries, items). references: for each query, the indices of its relevant items."
)
CLASSIFICATION_INPUTS = "predictions: scores (images, classes). references: index of the right class (images,)."
MULTILABEL_INPUTS = (
    "predictions: scores (images, classes). references: 1 if the image has the class, else 0 (images, classes)."
)
BINARY_INPUTS = (
    "predictions: scores (images,), higher for the positive class. references: 1 if positive, else 0 (images,)."
)
K_DESCRIPTION = " k: number of highest-scored items or classes that count, by default 1."
# {name of the metric: (function, `datasets` type of one prediction, `datasets` type of one reference, description of
# predictions and references)}
METRIC_DEFINITIONS = {
    "recall_at_k": (_compute_recall_from_scores, SCORES_FEATURE, LABELS_FEATURE, RETRIEVAL_INPUTS + K_DESCRIPTION),
    "mean_recall": (
        lambda scores, relevant_items: mean_recall(ranks_from_scores(scores, relevant_items)),
        SCORES_FEATURE,
        LABELS_FEATURE,
        RETRIEVAL_INPUTS,
    ),
    "median_rank": (
        lambda scores, relevant_items: median_rank(ranks_from_scores(scores, relevant_items)),
        SCORES_FEATURE,
        LABELS_FEATURE,
        RETRIEVAL_INPUTS,
    ),
    "top_k_accuracy": (
        _with_label_tensor(top_k_accuracy),
        SCORES_FEATURE,
        LABEL_FEATURE,
        CLASSIFICATION_INPUTS + K_DESCRIPTION,
    ),
    "mean_per_class_accuracy": (
        _with_label_tensor(mean_per_class_accuracy),
        SCORES_FEATURE,
        LABEL_FEATURE,
        CLASSIFICATION_INPUTS,
    ),
    "eleven_point_map": (_with_label_tensor(eleven_point_map), SCORES_FEATURE, LABELS_FEATURE, MULTILABEL_INPUTS),
    "roc_auc": (_with_label_tensor(roc_auc), SCORE_FEATURE, LABEL_FEATURE, BINARY_INPUTS),
}


class CapivaraMetrics(evaluate.Metric):
    """Retrieval and classification metrics of CAPIVARA. Ties count against the query; in `roc_auc`, they count half."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRIC_DEFINITIONS:
            names = ", ".join(METRIC_DEFINITIONS)
            raise ValueError(f"The second argument of evaluate.load must be one of {names}, got {self.config_name!r}.")
        _, predictions, references, inputs = METRIC_DEFINITIONS[self.config_name]
        return evaluate.MetricInfo(
            description=CapivaraMetrics.__doc__,
            citation="",
            inputs_description=inputs,
            features=datasets.Features({"predictions": predictions, "references": references}),
        )

    def _compute(self, predictions, references, **options) -> dict[str, float]:
        formula = METRIC_DEFINITIONS[self.config_name][0]
        return {self.config_name: formula(torch.tensor(predictions), references, **options)}
