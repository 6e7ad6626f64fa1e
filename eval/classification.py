r"""Zero-shot classification: assign each image the class whose text embedding is most similar.

    python -m eval.classification --model data/openmoji/base --benchmark cifar-10 --images FOLDER \
        --output results/cifar-10.json
    python -m eval.classification --model MODEL --benchmark food-101 --images DATA --protocol authors \
        --authors_file portuguese_prompts.py --output results/food_authors.json

The prompts of a class are templates filled with the name of the class. The embedding of a class is the normalized mean
of the normalized embeddings of its prompts. This is called prompt ensembling (CLIP, arXiv 2103.00020, section 3.1.4;
CAPIVARA, arXiv 2310.13683, section 4).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from capivara_common.cli import flag, run_command
from capivara_common.environment import process_state
from capivara_common.files import check_output_file
from caption_data.labeled_images import LABEL_COLUMNS, LabeledImages, load_labeled_images
from eval.capivara_metrics import metrics
from eval.embeddings import CachedEmbedder, ModelArguments, open_store, run_evaluation, write_result
from eval.prompts import Prompts, load_prompts
from eval.records.schema import Record

# Factor by which cosines are multiplied before the softmax. It is the upper limit of CLIP's learned logit scale (arXiv
# 2103.00020, section 2.5).
CLIP_LOGIT_SCALE = 100
CHANCE_DRAWS = 20  # number of random score matrices; the mean of their 11-point mAPs estimates the chance level


@dataclass
class LabeledImageArguments(ModelArguments):
    """Command-line arguments shared by zero-shot classification and the linear probe."""

    model: str = flag(
        ...,
        "Folder or Hub id of a CLIP-like model. With the role baseline, also open_clip:NAME:PRETRAINED or "
        "open_clip:local-dir:FOLDER.",
    )
    benchmark: str = flag(
        ...,
        "A file in eval/prompts/pt, such as cifar-10, or a JSON file of your own classes (docs/how-to/evaluation.md).",
    )
    images: str = flag(
        ...,
        "Labeled images: a folder with one subfolder per class, a saved Hugging Face dataset, parquet files, tars with "
        "classnames.txt, or a Hub id.",
    )
    output: Path = flag(..., "JSON file to write the result to.")
    image_column: str | None = flag(None, "Name of the image column. Default: the only column with images.")
    label_column: str | None = flag(None, f"Column with a label or a list of labels. Default: one of {LABEL_COLUMNS}.")


@dataclass
class ClassificationArguments(LabeledImageArguments):
    """Command-line arguments of `eval.classification`."""

    protocol: Literal["ours", "authors", "babel"] = flag(
        "ours",
        "Source of names and prompts: this project (ours), CAPIVARA's authors (authors), Babel-ImageNet (babel).",
    )
    language: str | None = flag(None, "Language code of the class names, for protocol babel. Default: pt.")
    authors_file: str | None = flag(None, "Path of the authors' portuguese_prompts.py. Required for protocol authors.")
    seed: int | None = flag(None, "Seed of the training run, to be written to the records.")


def load_split(
    args: LabeledImageArguments, split: str, class_names: Sequence[str], class_indices: Sequence[int] | None = None
) -> LabeledImages:
    """Load a split of the dataset of labeled images that the arguments name.

    Args:
        args: Command-line arguments: the dataset, its columns and the options for reading image files.
        split: Name of the split.
        class_names: English names of all classes, in the order of the labels.
        class_indices: Indices into `class_names` of the classes to keep. Given if the prompts name only some of the
            classes; None keeps all classes.

    Returns:
        The images, which are decoded when they are needed, with their labels.
    """
    columns = (args.image_column, args.label_column)
    options = args.image_options() | {"limit": args.limit}
    return load_labeled_images(args.images, split, class_names, *columns, class_indices, **options)


def embed_classes(store: CachedEmbedder, prompts: Prompts) -> Tensor:
    """Embed the classes of a zero-shot classifier.

    Args:
        store: The model with its embedding cache.
        prompts: Prompts of each class.

    Returns:
        Unit-length embeddings (classes, width): the normalized mean of each class's prompt embeddings.
    """
    texts = [text for filled in prompts.class_prompts for text in filled]
    embeds = store.embed_texts(texts, "Prompts")
    means = [part.mean(dim=0) for part in embeds.split([len(filled) for filled in prompts.class_prompts])]
    return F.normalize(torch.stack(means), dim=-1)


def compute_classification_metrics(scores: Tensor, labels: list, metric: str) -> dict[str, float]:
    """Compute the metric that is usual for the dataset, and also top-1 and top-5 accuracy.

    Accuracies are only computed if each image has one label, and top-5 accuracy only for more than five classes.

    Args:
        scores: Cosine similarities (images, classes).
        labels: For each image its class index, or for images with several classes a list of class indices.
        metric: Metric of the dataset: "accuracy", "mean-per-class", "11point_mAP" or "roc_auc".

    Returns:
        Metric name, as in `Record.metric` -> value from 0 to 1. The dataset's metric comes first.

    Raises:
        ValueError: If labels are lists and the metric is not "11point_mAP", or if the metric is "11point_mAP" and
            labels are not lists.
    """
    is_multilabel = isinstance(labels[0], list)
    if is_multilabel != (metric == "11point_mAP"):
        expected, actual = ("one label", "a list") if is_multilabel else ("a list of labels", "one label")
        raise ValueError(f"{metric} needs {expected} per image, got {actual}. Check --label_column.")
    if metric == "11point_mAP":
        targets = torch.zeros(scores.shape)
        for row, classes in enumerate(labels):
            targets[row, classes] = 1
        # As in the published results, images are ranked by their class probabilities, since cosines of different images
        # are not on one scale.
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


def compute_chance(metric: str, labels: list, class_count: int) -> float:
    """Return the chance level of a metric: the value that random scores are expected to reach.

    Args:
        metric: A metric name that `compute_classification_metrics` returns.
        labels: For each image its class index, or for images with several classes a list of class indices.
        class_count: Number of classes.

    Returns:
        Expected value, from 0 to 1.
    """
    if metric == "11point_mAP":  # the interpolated precision has no closed form, so it is estimated
        generator = torch.Generator().manual_seed(0)
        draws = [torch.rand(len(labels), class_count, generator=generator) for _ in range(CHANCE_DRAWS)]
        return float(np.mean([compute_classification_metrics(scores, labels, metric)[metric] for scores in draws]))
    return {"roc_auc": 0.5, "top_5_accuracy": 5 / class_count}.get(metric, 1 / class_count)


def evaluate(args: ClassificationArguments) -> list[Record]:
    """Measure zero-shot classification, and write the result file.

    Args:
        args: Command-line arguments.

    Returns:
        One record per metric.

    Raises:
        ValueError: If the data, the prompts, the model or an argument is invalid.
    """
    check_output_file(args.output)
    prompts = load_prompts(args.benchmark, args.protocol, args.language, args.authors_file)
    data = load_split(args, args.split, prompts.english_names, prompts.class_indices)
    store = open_store(args)
    started = time.perf_counter()
    images = store.embed_images(data.images)
    scores = images.embeds @ embed_classes(store, prompts).T
    labels = [data.labels[row] for row in images.rows.tolist()]
    # The authors' list may lack a name for the last classes. They can't be predicted, so they score below any cosine.
    unnamed = max(0, len(prompts.english_names) - len(prompts.names)) if prompts.class_indices is None else 0
    scores = F.pad(scores, (0, unnamed), value=-2.0)
    values = compute_classification_metrics(scores, labels, prompts.metric)
    shared = {"task": "classification", "dataset": prompts.benchmark, "split": args.split, "direction": ""}
    shared |= {"language": prompts.language, "n": len(labels), "seed": args.seed}
    shared |= {"protocol": prompts.protocol, "model": args.role, "model_folder": args.model}
    records = [
        Record(**shared, metric=name, value=value, chance=compute_chance(name, labels, scores.shape[1]))
        for name, value in values.items()
    ]
    if process_state().is_main_process:
        parts = {"classes": prompts.names + ["(sem nome)"] * unnamed, "notes": list(prompts.notes)}
        # Accuracy per class and confusion matrix are defined only if each image has one class.
        if not isinstance(labels[0], list):
            label_tensor = torch.tensor(labels)
            accuracies = metrics.per_class_accuracy(scores, label_tensor).tolist()
            parts["per_class_accuracy"] = [None if math.isnan(accuracy) else accuracy for accuracy in accuracies]
            parts["confusion_matrix"] = metrics.confusion_matrix(scores, label_tensor).tolist()
        parts |= {"dataset": args.images, "fingerprint": data.fingerprint(), "skipped": images.skipped}
        write_result(args, records, store, started, **parts)
    return records


main = partial(run_evaluation, ClassificationArguments, __doc__, evaluate)

if __name__ == "__main__":
    run_command(main, resumable=True)
