"""Recall@k of retrieval: share of queries whose best right item is among the k best-scored ones.

    evaluate.load("eval/evaluate_modules/recall_at_k").compute(predictions=..., references=...)

Run from the repository's root: the formula is `eval.metrics.recall_at_k`.
"""

import datasets
import evaluate
import torch

from eval.metrics import ranks_of_scores, recall_at_k

DESCRIPTION = """Recall@k of retrieval: share of queries whose best right item is among the k best-scored ones.

Ties count against the query."""
INPUTS = """
Args:
    predictions: (queries, items), scores.
    references: for each query, the indices of its right items.
    k: how many are looked at, at least 1.

Returns:
    `recall_at_k`.
"""


class RecallAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float32")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, k: int = 1) -> dict[str, float]:
        if k > len(predictions[0]):
            raise ValueError(f"k must be at most the number of items, {len(predictions[0])}, got {k}.")
        return {"recall_at_k": recall_at_k(ranks_of_scores(torch.tensor(predictions), references), k)}
