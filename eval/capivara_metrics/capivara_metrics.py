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
    ranks_from_scores,
    recall_at_k,
    roc_auc,
    top_k_accuracy,
)

SCORE_FEATURE, LABEL_FEATURE = datasets.Value("float32"), datasets.Value("int64")
SCORES_FEATURE, LABELS_FEATURE = datasets.Sequence(SCORE_FEATURE), datasets.Sequence(LABEL_FEATURE)


def _recall_at_k(scores: Tensor, relevant_items: list[list[int]], k: int = 1) -> float:
    if k > scores.shape[1]:
        raise ValueError(f"k must be at most the number of items, {scores.shape[1]}, got {k}.")
    return recall_at_k(ranks_from_scores(scores, relevant_items), k)


def _with_label_tensor(metric: Callable[..., float]) -> Callable[..., float]:
    """`metric` of labels that come as a list."""
    return lambda scores, labels, **options: metric(scores, torch.tensor(labels), **options)


RETRIEVAL_INPUTS = "predictions: (queries, items), scores. references: for each query, the indices of its right items."
CLASSIFICATION_INPUTS = "predictions: (images, classes), scores. references: (images,), index of the right class."
MULTILABEL_INPUTS = (
    "predictions: (images, classes), scores. references: (images, classes), 1 where the image has the class."
)
BINARY_INPUTS = (
    "predictions: (images,), higher for the positive class. references: (images,), 1 for positive, 0 for negative."
)
K_DESCRIPTION = " k: how many are looked at, 1 where not given."
# Name -> formula, what a row of predictions and of references is, and both in words.
METRIC_DEFINITIONS = {
    "recall_at_k": (_recall_at_k, SCORES_FEATURE, LABELS_FEATURE, RETRIEVAL_INPUTS + K_DESCRIPTION),
    "mean_recall": (
        lambda scores, right: mean_recall(ranks_from_scores(scores, right)),
        SCORES_FEATURE,
        LABELS_FEATURE,
        RETRIEVAL_INPUTS,
    ),
    "median_rank": (
        lambda scores, right: median_rank(ranks_from_scores(scores, right)),
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
    """One of `METRIC_DEFINITIONS`, by its name. Ties count against the query; in `roc_auc` half."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRIC_DEFINITIONS:
            raise ValueError(
                f"Name one of {', '.join(METRIC_DEFINITIONS)} as second argument of load, got {self.config_name!r}."
            )
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
