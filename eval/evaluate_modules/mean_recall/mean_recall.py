"""Mean of recall at 1, 5 and 10 of retrieval, the CAPIVARA paper's figure for one direction.

    evaluate.load("eval/evaluate_modules/mean_recall").compute(predictions=..., references=...)

Run from the repository's root: the formula is `eval.metrics.mean_recall`.
"""

import datasets
import evaluate
import torch

from eval.metrics import mean_recall, ranks_of_scores

DESCRIPTION = """Mean of recall at 1, 5 and 10 of retrieval, the CAPIVARA paper's figure for one direction.

Ties count against the query."""
INPUTS = """
Args:
    predictions: (queries, items), scores.
    references: for each query, the indices of its right items.

Returns:
    `mean_recall`.
"""


class MeanRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float32")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"mean_recall": mean_recall(ranks_of_scores(torch.tensor(predictions), references))}
