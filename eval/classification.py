r"""Zero-shot classification: an image takes the class whose prompts lie nearest to it.

    python -m eval.classification --model data/openmoji/base --benchmark cifar-10 --images FOLDER \
        --output results/cifar-10.json
    python -m eval.classification --model MODEL --benchmark food-101 --images DATA --protocol authors \
        --authors_file portuguese_prompts.py --output results/food_authors.json

A class is the normalised mean of the normalised embeddings of its filled templates (CAPIVARA, arXiv 2310.13683,
section 4, after CLIP, arXiv 2103.00020, section 3.1.4).
"""

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
from eval.embeddings import EmbeddingStore, ModelArguments, open_store, run_evaluation, write_result
from eval.prompts import Prompts, load_prompts
from eval.records.schema import Record

CLIP_LOGIT_SCALE = (
    100  # of cosines before the softmax (CLIP, arXiv 2103.00020, section 2.5: where its scale is clipped)
)
CHANCE_DRAWS = 20  # of random scores


@dataclass
class LabeledImageArguments(ModelArguments):
    """What classification and linear probe have in common."""

    gone = {"form": "a folder of pictures holds no table, list or tar; keep the pictures in a folder of their own"}
    model: str = flag(..., "Folder or Hub id of a model of two towers; open_clip's with --role baseline.")
    benchmark: str = flag(
        ...,
        "Key in eval/prompts/pt, such as cifar-10, or a JSON file of your own classes (docs/evaluation.md has one).",
    )
    images: str = flag(
        ..., "Folder of a folder a class, a saved HF data set, parquet files, tars with classnames.txt, or a Hub id."
    )
    output: Path = flag(..., "JSON file for the result.")
    image_column: str | None = flag(None, "Name of the image column; the only one of images where none is given.")
    label_column: str | None = flag(None, f"Name of the column of a label or a list of labels; one of {LABEL_COLUMNS}.")


@dataclass
class ClassificationArguments(LabeledImageArguments):
    """Flags of `eval.classification`."""

    protocol: Literal["ours", "authors", "babel"] = flag("ours", "Names and templates: ours, the authors', or babel's.")
    language: str | None = flag(None, "Language of the protocol babel; else it is that of the benchmark's prompts.")
    authors_file: str | None = flag(None, "Path of the authors' portuguese_prompts.py, for protocol authors.")
    seed: int | None = flag(None, "Seed of the training run, for the records.")


def load_split(
    args: LabeledImageArguments, split: str, class_names: Sequence[str], class_indices: Sequence[int] | None = None
) -> LabeledImages:
    """A split of the images of the arguments; `load_images` has the rest."""
    columns = (args.image_column, args.label_column)
    return load_labeled_images(args.images, split, class_names, *columns, class_indices, **args.image_options())


def embed_classes(store: EmbeddingStore, prompts: Prompts) -> Tensor:
    """(classes, width), unit length: the mean of each class's embedded prompts."""
    texts = [text for filled in prompts.class_prompts for text in filled]
    embeds = store.embed_texts(texts, "Prompts")
    means = [part.mean(dim=0) for part in embeds.split([len(filled) for filled in prompts.class_prompts])]
    return F.normalize(torch.stack(means), dim=-1)


def compute_classification_metrics(scores: Tensor, labels: list, metric: str) -> dict[str, float]:
    """The data set's own metric, of `METRICS`, first, then top-1 and top-5 where they make sense.

    Of cosines (images, classes), and a class, or a list of classes, an image.
    """
    several = isinstance(labels[0], list)
    if several != (metric == "11point_mAP"):
        wanted = "one label" if several else "a list of labels"
        raise ValueError(f"{metric} needs {wanted} an image; look at --label_column.")
    if metric == "11point_mAP":
        targets = torch.zeros(scores.shape)
        for row, classes in enumerate(labels):
            targets[row, classes] = 1
        # of each image's probabilities, as published: cosines of different images are not compared as they are
        return {"11point_mAP": metrics.eleven_point_map((CLIP_LOGIT_SCALE * scores).softmax(dim=-1), targets)}
    right = torch.tensor(labels)
    values = {"accuracy": metrics.top_k_accuracy(scores, right)}
    if metric == "roc_auc":
        return {"roc_auc": metrics.roc_auc(scores[:, 1] - scores[:, 0], right)} | values
    if metric == "mean-per-class":
        values = {"mean_per_class_accuracy": metrics.mean_per_class_accuracy(scores, right)} | values
    if scores.shape[1] > 5:
        values["top_5_accuracy"] = metrics.top_k_accuracy(scores, right, 5)
    return values


def compute_chance(metric: str, labels: list, class_count: int) -> float:
    """Expected value of random scores for a metric of `compute_classification_metrics`."""
    if metric == "11point_mAP":  # interpolation has no formula: the mean of draws
        generator = torch.Generator().manual_seed(0)
        draws = [torch.rand(len(labels), class_count, generator=generator) for _ in range(CHANCE_DRAWS)]
        return float(np.mean([compute_classification_metrics(scores, labels, metric)[metric] for scores in draws]))
    return {"roc_auc": 0.5, "top_5_accuracy": 5 / class_count}.get(metric, 1 / class_count)


def evaluate(args: ClassificationArguments) -> list[Record]:
    """Measure and write; returns the records."""
    check_output_file(args.output)
    prompts = load_prompts(args.benchmark, args.protocol, args.language, args.authors_file)
    data = load_split(args, args.split, prompts.english_names, prompts.class_indices)
    store = open_store(args)
    started = time.perf_counter()
    images = store.embed_images(data.images)
    scores = images.embeds @ embed_classes(store, prompts).T
    labels = [data.labels[row] for row in images.rows.tolist()]
    # Classes that the list has no name for can't be predicted: they score below any cosine.
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
        parts = {"classes": [*prompts.names, *["(sem nome)"] * unnamed], "notes": list(prompts.notes)}
        if not isinstance(labels[0], list):  # else no image has one right class
            right = torch.tensor(labels)
            shares = metrics.per_class_accuracy(scores, right).tolist()
            parts["per_class_accuracy"] = [None if share != share else share for share in shares]
            parts["confusion_matrix"] = metrics.confusion_matrix(scores, right).tolist()
        parts |= {"dataset": args.images, "fingerprint": data.fingerprint(), "skipped": images.skipped}
        write_result(args, records, store, started, **parts)
    return records


main = partial(run_evaluation, ClassificationArguments, __doc__, evaluate)

if __name__ == "__main__":
    run_command(main, resumable=True)
