r"""Zero-shot classification: assign to each image the class whose text embedding is most similar.

    python -m eval.classification --model data/openmoji/base --benchmark cifar-10 --images FOLDER \
        --output results/cifar-10.json
    python -m eval.classification --model MODEL --benchmark food-101 --images DATA --protocol authors \
        --authors_file portuguese_prompts.py --output results/food_authors.json

The prompts of a class are templates filled with its name. The embedding of a class is the normalized mean of the
normalized embeddings of its prompts. This is called prompt ensembling (CLIP, arXiv 2103.00020, section 3.1.4; CAPIVARA,
arXiv 2310.13683, section 4).
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from capivara_common.cli import flag, run_main_and_report_user_errors
from capivara_common.environment import get_or_init_distributed_state
from capivara_common.files import check_output_file
from caption_data.labeled_images import LABEL_COLUMNS, LabeledImages, load_images_with_prompt_class_labels
from eval.capivara_metrics import metrics
from eval.embeddings import MODEL_HELP, CachedEmbedder, ModelArguments, run_evaluation_command
from eval.prompts import Prompts, load_prompts
from eval.records.result_files import Record

# Factor by which cosines are multiplied before the softmax, which would otherwise give all classes almost the same
# probability. It is the upper limit of CLIP's learned logit scale (arXiv 2103.00020, section 2.5).
CLIP_LOGIT_SCALE = 100
# Number of random score matrices. The mean of their 11-point mAPs estimates the value that random guessing reaches.
CHANCE_DRAWS = 20


@dataclass
class LabeledImageArguments(ModelArguments):
    """Command-line arguments shared by zero-shot classification and the linear probe."""

    model: str = flag(..., MODEL_HELP)
    benchmark: str = flag(
        ...,
        "Class names and prompts: name of a file in eval/prompts/pt without .json, such as cifar-10, or path of a JSON "
        "file with your own classes (docs/how-to/evaluation.md).",
    )
    images: str = flag(
        ...,
        "Labeled images: a folder with one subfolder per class, a saved Hugging Face dataset, parquet files, "
        "WebDataset tars with classnames.txt, or a Hub id.",
    )
    output: Path = flag(..., "JSON file to write the result to.")
    image_column: str | None = flag(None, "Name of the image column. Default: the only column with images.")
    label_column: str | None = flag(None, f"Column with a label or a list of labels. Default: one of {LABEL_COLUMNS}.")

    def load_images(self, split: str, class_names: list[str], class_indices: list[int] | None = None) -> LabeledImages:
        """Load one split of the dataset `images`, with a class index for each image.

        Args:
            split: Name of the split.
            class_names: English names of all classes, in the order of the labels.
            class_indices: Indices in `class_names` of the classes to keep. None keeps all classes.

        Returns:
            The images with their labels. An image is decoded only when it is used.
        """
        columns, options = (self.image_column, self.label_column), self.image_options() | {"limit": self.limit}
        return load_images_with_prompt_class_labels(self.images, split, class_names, *columns, class_indices, **options)


@dataclass
class ClassificationArguments(LabeledImageArguments):
    """Command-line arguments of `eval.classification`, which measures zero-shot image classification."""

    protocol: Literal["ours", "authors", "babel"] = flag(
        "ours",
        "Source of class names and prompts: this project (ours), CAPIVARA's authors (authors), Babel-ImageNet (babel).",
    )
    language: str | None = flag(None, "Language code of the class names; only for --protocol babel. Default: pt.")
    authors_file: str | None = flag(
        None, "Path of portuguese_prompts.py of CAPIVARA's authors, for --protocol authors."
    )
    seed: int | None = flag(None, "Seed with which the model was trained, to be stored in the result file.")


def _embed_classes(cached_embedder: CachedEmbedder, prompts: Prompts) -> Tensor:
    """Embed the classes of a zero-shot classifier.

    Args:
        cached_embedder: The model with its embedding cache.
        prompts: Prompts of each class.

    Returns:
        Unit-length embeddings (classes, width): the normalized mean of each class's prompt embeddings.
    """
    texts = [text for filled in prompts.class_prompts for text in filled]
    embeds = cached_embedder.embed_texts(texts, "Prompts")
    # The embeddings of the prompts have unit length, so each of them has the same weight in the mean.
    means = [part.mean(dim=0) for part in embeds.split([len(filled) for filled in prompts.class_prompts])]
    return F.normalize(torch.stack(means), dim=-1)


def compute_classification_metrics(scores: Tensor, labels: list, metric: str) -> dict[str, float]:
    """Compute the usual metric of a classification dataset, and also top-1 and top-5 accuracy.

    The two accuracies need one label per image. Top-5 accuracy also needs more than five classes.

    Args:
        scores: Cosine similarities (images, classes).
        labels: For each image its class index, or for images with several classes a list of class indices.
        metric: Metric of the dataset: "accuracy", "mean-per-class", "11point_mAP" or "roc_auc".

    Returns:
        A dict that maps metric names, as in `Record.metric`, to values from 0 to 1. The metric of the dataset comes
        first.

    Raises:
        ValueError: If "11point_mAP" gets single labels, or another metric gets lists.
    """
    is_multilabel = isinstance(labels[0], list)
    if is_multilabel != (metric == "11point_mAP"):
        expected, actual = ("one label", "a list") if is_multilabel else ("a list of labels", "one label")
        raise ValueError(f"{metric} needs {expected} per image, got {actual}. Check --label_column.")
    if metric == "11point_mAP":
        targets = torch.zeros(scores.shape)
        for row, classes in enumerate(labels):
            targets[row, classes] = 1
        # As in the published results, the images are ranked by the probability of a class. Their cosines are not used,
        # because cosines of different images are not on a common scale.
        return {"11point_mAP": metrics.eleven_point_map((CLIP_LOGIT_SCALE * scores).softmax(dim=-1), targets)}
    label_tensor = torch.tensor(labels)
    values = {"accuracy": metrics.top_k_accuracy(scores, label_tensor)}
    if metric == "roc_auc":
        return {"roc_auc": metrics.roc_auc(scores[:, 1] - scores[:, 0], label_tensor)} | values
    if metric == "mean-per-class":
        values = {"mean_per_class_accuracy": metrics.mean_per_class_accuracy(scores, label_tensor)} | values
    if scores.shape[1] > 5:
        values["top_5_accuracy"] = metrics.top_k_accuracy(scores, label_tensor, 5)
    return values


def compute_chance_level(metric: str, labels: list, class_count: int) -> float:
    """Return the chance level of a metric: the value that random scores are expected to reach.

    Args:
        metric: A metric name that `compute_classification_metrics` returns.
        labels: For each image its class index, or for images with several classes a list of class indices.
        class_count: Number of classes.

    Returns:
        Expected value, from 0 to 1.
    """
    # The 11-point mAP of random guessing has no simple formula, so it is estimated with random scores.
    if metric == "11point_mAP":
        generator = torch.Generator().manual_seed(0)
        draws = [torch.rand(len(labels), class_count, generator=generator) for _ in range(CHANCE_DRAWS)]
        return float(np.mean([compute_classification_metrics(scores, labels, metric)[metric] for scores in draws]))
    return {"roc_auc": 0.5, "top_5_accuracy": 5 / class_count}.get(metric, 1 / class_count)


def evaluate_zero_shot_and_write_result(args: ClassificationArguments) -> list[Record]:
    """Measure the zero-shot classification of a dataset, and write the result file.

    Each image is assigned to the class whose prompts have the most similar text embedding.

    Returns:
        The measured values, one record per metric.

    Raises:
        ValueError: If the data, the prompts, the model or an argument is invalid.
    """
    check_output_file(args.output)
    prompts = load_prompts(args.benchmark, args.protocol, args.language, args.authors_file)
    data = args.load_images(args.split, prompts.english_names, prompts.class_indices)
    cached_embedder = CachedEmbedder.load(args)
    images = cached_embedder.embed_images(data.images)
    scores = images.embeds @ _embed_classes(cached_embedder, prompts).T
    labels = [data.labels[row] for row in images.rows.tolist()]
    # CAPIVARA's authors name fewer classes than some datasets have. The last classes then have no name and can't be
    # predicted, so their score is set to -2, below any cosine.
    unnamed = max(0, len(prompts.english_names) - len(prompts.names)) if prompts.class_indices is None else 0
    scores = F.pad(scores, (0, unnamed), value=-2.0)
    values = compute_classification_metrics(scores, labels, prompts.metric)
    shared = {"task": "classification", "dataset": prompts.benchmark, "split": args.split, "direction": ""}
    shared |= {"language": prompts.language, "n": len(labels), "seed": args.seed}
    shared |= {"protocol": prompts.protocol, "model": args.role, "model_folder": args.model}
    records = [
        Record(**shared, metric=name, value=value, chance=compute_chance_level(name, labels, scores.shape[1]))
        for name, value in values.items()
    ]
    if get_or_init_distributed_state().is_main_process:
        parts = {"classes": prompts.names + ["(sem nome)"] * unnamed, "notes": list(prompts.notes)}
        # Accuracy per class and confusion matrix are defined only if each image has one class. If images have several
        # classes, each label is a list.
        if not isinstance(labels[0], list):
            label_tensor = torch.tensor(labels)
            accuracies = metrics.per_class_accuracy(scores, label_tensor).tolist()
            parts["per_class_accuracy"] = [None if math.isnan(accuracy) else accuracy for accuracy in accuracies]
            parts["confusion_matrix"] = metrics.confusion_matrix(scores, label_tensor).tolist()
        parts |= {"dataset": args.images, "fingerprint": data.fingerprint(), "skipped": images.skipped}
        cached_embedder.write_result_file(args, records, **parts)
    return records


main = partial(run_evaluation_command, ClassificationArguments, __doc__, evaluate_zero_shot_and_write_result)

if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
