"""Mean of the accuracies within each class.

    evaluate.load("eval/evaluate_modules/mean_per_class_accuracy").compute(predictions=..., references=...)

Run from the repository's root: the formula is `eval.metrics.mean_per_class_accuracy`.
"""

import datasets
import evaluate
import torch

from eval.metrics import mean_per_class_accuracy

DESCRIPTION = """Mean of the accuracies within each class. Ties count against the query."""
INPUTS = """
Args:
    predictions: (images, classes), scores.
    references: (images,), index of the right class.

Returns:
    `mean_per_class_accuracy`.
"""


class MeanPerClassAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float32")),
                "references": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"mean_per_class_accuracy": mean_per_class_accuracy(torch.tensor(predictions), torch.tensor(references))}
