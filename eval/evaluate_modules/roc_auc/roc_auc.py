"""Area under the ROC curve of two classes.

    evaluate.load("eval/evaluate_modules/roc_auc").compute(predictions=..., references=...)

Run from the repository's root: the formula is `eval.metrics.roc_auc`.
"""

import datasets
import evaluate
import torch

from eval.metrics import roc_auc

DESCRIPTION = """Area under the ROC curve of two classes. A tie counts half."""
INPUTS = """
Args:
    predictions: (images,), scores, higher for the positive class.
    references: (images,), 1 for positive and 0 for negative.

Returns:
    `roc_auc`.
"""


class RocAuc(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Value("float32"),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"roc_auc": roc_auc(torch.tensor(predictions), torch.tensor(references))}
