"""Share of images whose class is among the k best-scored ones.

    evaluate.load("eval/evaluate_modules/top_k_accuracy").compute(predictions=..., references=...)

Run from the repository's root: the formula is `eval.metrics.top_k_accuracy`.
"""

import datasets
import evaluate
import torch

from eval.metrics import top_k_accuracy

DESCRIPTION = """Share of images whose class is among the k best-scored ones. Ties count against the query."""
INPUTS = """
Args:
    predictions: (images, classes), scores.
    references: (images,), index of the right class.
    k: how many are looked at, at least 1.

Returns:
    `top_k_accuracy`.
"""


class TopKAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float32")),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, k: int = 1) -> dict[str, float]:
        return {"top_k_accuracy": top_k_accuracy(torch.tensor(predictions), torch.tensor(references), k)}
