"""Metric module for Hugging Face's `evaluate` that computes the metrics of `metrics.py`.

The second argument of `evaluate.load` selects the metric, a key of `METRIC_DEFINITIONS`:

    evaluate.load("/path/to/eval/capivara_metrics", "recall_at_k").compute(predictions=..., references=..., k=5)

The folder `capivara_metrics` needs no other file of the project, so it can be copied, or uploaded to a Space on the
Hub. It must keep its name, because `evaluate` looks for a Python file with the name of the folder.
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

# Types of one prediction or one reference in the library `datasets`: a number, or a list of numbers.
SCORE = datasets.Value("float32")
LABEL = datasets.Value("int64")
SCORES = datasets.Sequence(SCORE)
LABELS = datasets.Sequence(LABEL)


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


def _with_ranks(metric: Callable[[Tensor], float]) -> Callable[..., float]:
    """Wrap a metric of ranks so that it accepts scores and, for each query, the indices of its relevant items."""
    return lambda scores, relevant_items: metric(ranks_from_scores(scores, relevant_items))


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
K_DESCRIPTION = " k: a right answer counts as a hit if it is among the k highest-scored items or classes; by default 1."
# {name of the metric: (function, `datasets` type of one prediction, `datasets` type of one reference, description of
# predictions and references)}
METRIC_DEFINITIONS = {
    "recall_at_k": (_compute_recall_from_scores, SCORES, LABELS, RETRIEVAL_INPUTS + K_DESCRIPTION),
    "mean_recall": (_with_ranks(mean_recall), SCORES, LABELS, RETRIEVAL_INPUTS),
    "median_rank": (_with_ranks(median_rank), SCORES, LABELS, RETRIEVAL_INPUTS),
    "top_k_accuracy": (_with_label_tensor(top_k_accuracy), SCORES, LABEL, CLASSIFICATION_INPUTS + K_DESCRIPTION),
    "mean_per_class_accuracy": (_with_label_tensor(mean_per_class_accuracy), SCORES, LABEL, CLASSIFICATION_INPUTS),
    "eleven_point_map": (_with_label_tensor(eleven_point_map), SCORES, LABELS, MULTILABEL_INPUTS),
    "roc_auc": (_with_label_tensor(roc_auc), SCORE, LABEL, BINARY_INPUTS),
}


class CapivaraMetrics(evaluate.Metric):
    """Retrieval or classification metric for Hugging Face's `evaluate`, selected by its name in `evaluate.load`.

    If a right and a wrong result have the same score, the wrong result counts as the better one. Only in `roc_auc`,
    such a tie counts half.
    """

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
