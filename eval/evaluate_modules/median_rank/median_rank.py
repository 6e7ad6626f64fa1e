"""Median rank of the best right item of retrieval, 1 for the first place.

    evaluate.load("eval/evaluate_modules/median_rank").compute(predictions=..., references=...)

Run from the repository's root: the formula is `eval.metrics.median_rank`.
"""

import datasets
import evaluate
import torch

from eval.metrics import median_rank, ranks_of_scores

DESCRIPTION = (
    """Median rank of the best right item of retrieval, 1 for the first place. Ties count against the query."""
)
INPUTS = """
Args:
    predictions: (queries, items), scores.
    references: for each query, the indices of its right items.

Returns:
    `median_rank`.
"""


class MedianRank(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float32")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"median_rank": median_rank(ranks_of_scores(torch.tensor(predictions), references))}
