"""11-point mean average precision of images that can have several classes (PASCAL VOC 2007).

    evaluate.load("eval/evaluate_modules/eleven_point_map").compute(predictions=..., references=...)

Run from the repository's root: the formula is `eval.metrics.eleven_point_map`.
"""

import datasets
import evaluate
import torch

from eval.metrics import eleven_point_map

DESCRIPTION = """11-point mean average precision of images that can have several classes (PASCAL VOC 2007).

Equal scores enter together."""
INPUTS = """
Args:
    predictions: (images, classes), scores.
    references: (images, classes), 1 where the image has the class.

Returns:
    `eleven_point_map`.
"""


class ElevenPointMap(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float32")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"eleven_point_map": eleven_point_map(torch.tensor(predictions), torch.tensor(references))}
