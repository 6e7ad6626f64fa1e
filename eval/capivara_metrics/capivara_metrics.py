"""The formulas of `metrics.py` as a module of Hugging Face's `evaluate`; its second argument names the metric.

    evaluate.load("/path/to/eval/capivara_metrics", "recall_at_k").compute(predictions=..., references=..., k=5)

The folder may be copied anywhere under its name, or uploaded to a Space of that name.
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
    ranks_of_scores,
    recall_at_k,
    roc_auc,
    top_k_accuracy,
)

SCORE, LABEL = datasets.Value("float32"), datasets.Value("int64")
SCORES, LABELS = datasets.Sequence(SCORE), datasets.Sequence(LABEL)


def _recall_at_k(scores: Tensor, right_items: list[list[int]], k: int = 1) -> float:
    if k > scores.shape[1]:
        raise ValueError(f"k must be at most the number of items, {scores.shape[1]}, got {k}.")
    return recall_at_k(ranks_of_scores(scores, right_items), k)


def _labelled(metric: Callable[..., float]) -> Callable[..., float]:
    """`metric` of labels that come as a list."""
    return lambda scores, labels, **options: metric(scores, torch.tensor(labels), **options)


RETRIEVAL = "predictions: (queries, items), scores. references: for each query, the indices of its right items."
CLASSES = "predictions: (images, classes), scores. references: (images,), index of the right class."
SETS = "predictions: (images, classes), scores. references: (images, classes), 1 where the image has the class."
BINARY = "predictions: (images,), higher for the positive class. references: (images,), 1 for positive, 0 for negative."
HOW_MANY = " k: how many are looked at, 1 where not given."
# Name -> formula, what a row of predictions and of references is, and both in words.
METRICS = {
    "recall_at_k": (_recall_at_k, SCORES, LABELS, RETRIEVAL + HOW_MANY),
    "mean_recall": (lambda scores, right: mean_recall(ranks_of_scores(scores, right)), SCORES, LABELS, RETRIEVAL),
    "median_rank": (lambda scores, right: median_rank(ranks_of_scores(scores, right)), SCORES, LABELS, RETRIEVAL),
    "top_k_accuracy": (_labelled(top_k_accuracy), SCORES, LABEL, CLASSES + HOW_MANY),
    "mean_per_class_accuracy": (_labelled(mean_per_class_accuracy), SCORES, LABEL, CLASSES),
    "eleven_point_map": (_labelled(eleven_point_map), SCORES, LABELS, SETS),
    "roc_auc": (_labelled(roc_auc), SCORE, LABEL, BINARY),
}


class CapivaraMetrics(evaluate.Metric):
    """One of `METRICS`, by its name. Ties count against the query; in `roc_auc` half."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise ValueError(f"Name one of {', '.join(METRICS)} as second argument of load, got {self.config_name!r}.")
        _, predictions, references, inputs = METRICS[self.config_name]
        return evaluate.MetricInfo(
            description=CapivaraMetrics.__doc__,
            citation="",
            inputs_description=inputs,
            features=datasets.Features({"predictions": predictions, "references": references}),
        )

    def _compute(self, predictions, references, **options) -> dict[str, float]:
        formula = METRICS[self.config_name][0]
        return {self.config_name: formula(torch.tensor(predictions), references, **options)}
