"""Zero-shot classification: an image takes the class whose prompts lie nearest to it.

    python -m eval.classification --model data/openmoji/base --benchmark cifar-10 --images FOLDER \
        --output results/cifar-10.json
    python -m eval.classification --model MODEL --benchmark food-101 --images DATA --protocol authors \
        --authors_file portuguese_prompts.py --output results/food_authors.json

A class is the normalised mean of the normalised embeddings of its filled templates (CAPIVARA, arXiv 2310.13683,
section 4, after CLIP, arXiv 2103.00020, section 3.1.4).
"""

import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from torch import Tensor
from torch.nn import functional as F
from transformers import HfArgumentParser

from artifacts import device_description
from eval.metrics import (
    confusion_matrix,
    eleven_point_map,
    mean_per_class_accuracy,
    per_class_accuracy,
    roc_auc,
    top_k_accuracy,
)
from eval.models import Embedder, load_embedder
from eval.prompts import Prompts, load_prompts
from eval.results import Record, header, write_records


@dataclass
class ClassificationArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a CAPIVARA model; other kinds with --role baseline."})
    benchmark: str = field(metadata={"help": "Key of the data set in eval/prompts/pt, such as cifar-10."})
    images: str = field(
        metadata={"help": "Folder with a sub-folder of images a class, a saved HF data set, or a Hub id."}
    )
    output: Path = field(metadata={"help": "JSON file for the result."})
    split: str = field(default="test", metadata={"help": "Split of the data set."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the label, or of a list of labels."})
    protocol: Literal["ours", "authors", "babel"] = field(default="ours", metadata={"help": "Names and templates."})
    language: str = field(default="pt", metadata={"help": "Language of the protocol babel."})
    authors_file: str | None = field(default=None, metadata={"help": "Path or https address, for protocol authors."})
    role: Literal["baseline", "capivara"] = field(default="capivara", metadata={"help": "What records call the model."})
    batch_size: int = field(default=32, metadata={"help": "Images that go through at once."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; the GPU where there is one."})


@dataclass
class LabelledImages:
    """Images with their classes, read one by one; those that can't be read are left out and listed.

    Attributes:
        rows: of the data set, images undecoded.
        labels: of each row, a class or a list of classes.
        image_column: of the rows.
        skipped: row -> what is wrong with its image; complete once all were read.
    """

    rows: Dataset
    labels: list
    image_column: str

    def __post_init__(self) -> None:
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PIL.Image.Image]:
        for number in range(len(self.rows)):
            image = self.rows[number][self.image_column]
            try:
                opened = PIL.Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
                opened.load()
            except Exception as error:  # PIL raises a dozen kinds
                self.skipped[number] = f"{type(error).__name__}: {error}"
            else:
                yield opened

    def kept_labels(self) -> list:
        """Of the images that were read."""
        return [label for number, label in enumerate(self.labels) if number not in self.skipped]


def load_images(
    source: str, split: str, image_column: str, label_column: str, names_en: Sequence[str]
) -> LabelledImages:
    """Labelled images, their classes in the order of `names_en`.

    A data set that names its classes is matched by name, since orders differ; one of plain numbers is taken to have
    the same order.

    Raises:
        ValueError: split or column is missing, or the class names do not match; those that differ are named.
    """
    rows = _split_of(source, split)
    for column in (image_column, label_column):
        if column not in rows.column_names:
            raise ValueError(f"{source}, split {split!r} has no column {column!r}; there are {rows.column_names}.")
    feature = rows.features[label_column]
    feature = getattr(feature, "feature", feature)
    mapping = _by_name(feature.names, names_en, source) if isinstance(feature, ClassLabel) else range(len(names_en))
    labels = rows[label_column][:]
    outside = {x for label in labels for x in (label if isinstance(label, list) else [label])} - set(
        range(len(mapping))
    )
    if outside:
        raise ValueError(f"{source}: labels {sorted(outside)[:10]} are outside the {len(mapping)} classes with a name.")
    labels = [[mapping[x] for x in label] if isinstance(label, list) else mapping[label] for label in labels]
    return LabelledImages(rows.cast_column(image_column, Image(decode=False)), labels, image_column)


def class_embeddings(embedder: Embedder, prompts: Prompts, batch_size: int) -> Tensor:
    """(classes, width), unit length: the mean of each class's embedded prompts."""
    texts = [text for filled in prompts.filled for text in filled]
    embeds = embedder.texts(texts, batch_size, "Prompts")
    means = [part.mean(dim=0) for part in embeds.split([len(filled) for filled in prompts.filled])]
    return F.normalize(torch.stack(means), dim=-1)


def classification_metrics(scores: Tensor, labels: list, metric: str) -> dict[str, float]:
    """The data set's own metric first, then top-1 and top-5 where they make sense.

    Args:
        scores: (images, classes), cosines.
        labels: a class of each image, or a list of classes.
        metric: "accuracy", "mean-per-class", "11point_mAP" or "roc_auc".
    """
    if metric == "11point_mAP":
        targets = torch.zeros(scores.shape)
        for row, classes in enumerate(labels):
            targets[row, classes] = 1
        return {"11point_mAP": eleven_point_map(scores, targets)}
    right = torch.tensor(labels)
    if metric == "roc_auc":
        return {"roc_auc": roc_auc(scores[:, 1] - scores[:, 0], right), "accuracy": top_k_accuracy(scores, right)}
    values = {"accuracy": top_k_accuracy(scores, right)}
    if metric == "mean-per-class":
        values = {"mean_per_class_accuracy": mean_per_class_accuracy(scores, right)} | values
    if scores.shape[1] > 5:
        values["top_5_accuracy"] = top_k_accuracy(scores, right, 5)
    return values


def evaluate(args: ClassificationArguments) -> list[Record]:
    """Measure and write; returns the records."""
    prompts = load_prompts(args.benchmark, args.protocol, args.language, args.authors_file)
    names_en = prompts.names_en
    images = load_images(args.images, args.split, args.image_column, args.label_column, names_en)
    embedder = load_embedder(args.model, args.device, baseline=args.role == "baseline")
    started = time.perf_counter()
    image_embeds = embedder.images(images, args.batch_size, "Images")
    scores = image_embeds @ class_embeddings(embedder, prompts, args.batch_size).T
    labels = images.kept_labels()
    values = classification_metrics(scores, labels, prompts.metric)
    shared = {"task": "classification", "dataset": args.benchmark, "split": args.split, "direction": ""}
    shared |= {"language": "pt" if args.protocol != "babel" else args.language, "n": len(labels)}
    shared |= {"protocol": args.protocol, "model": args.role, "model_folder": args.model}
    records = [
        Record(**shared, metric=name, value=value, chance=1 / scores.shape[1] if name == "accuracy" else None)
        for name, value in values.items()
    ]
    parts = {"classes": prompts.names, "notes": list(prompts.notes), "skipped": images.skipped}
    if not isinstance(labels[0], list):
        right = torch.tensor(labels)
        per_class = [None if value != value else value for value in per_class_accuracy(scores, right).tolist()]
        parts |= {"per_class_accuracy": per_class, "confusion_matrix": confusion_matrix(scores, right).tolist()}
    facts = header(
        dataset=args.images,
        dataset_fingerprint=images.rows._fingerprint,
        model=args.model,
        device=device_description(embedder.device),
        precision="float32",
        seconds=time.perf_counter() - started,
        skipped=len(images.skipped),
    )
    write_records(args.output, records, facts, **parts)
    return records


def _split_of(source: str, split: str) -> Dataset:
    path = Path(source)
    if (path / "dataset_dict.json").is_file():
        loaded = load_from_disk(source)
    elif path.is_dir():
        loaded = load_dataset("imagefolder", data_dir=source)
        if list(loaded) == ["train"] and split not in loaded:  # no splits: the folder is the split
            return loaded["train"]
    elif path.exists():
        raise ValueError(f"{source} is a file; a folder, a saved data set or a Hub id is needed.")
    else:
        loaded = load_dataset(source)
    if not isinstance(loaded, DatasetDict) or split not in loaded:
        raise ValueError(f"{source} has no split {split!r}; there are {sorted(loaded)}.")
    return loaded[split]


def _by_name(names: Sequence[str], wanted: Sequence[str], source: str) -> list[int]:
    """Label of the data set -> class of the prompts."""
    place = {_plain(name): number for number, name in enumerate(wanted)}
    unknown = [name for name in names if _plain(name) not in place]
    if unknown:
        missing = [name for name in wanted if _plain(name) not in set(map(_plain, names))]
        raise ValueError(
            f"{source} has {len(names)} classes, the prompts {len(wanted)}, and they don't match by name: "
            f"{unknown[:10]} are unknown, {missing[:10]} are missing. Rename the folders, or choose another benchmark."
        )
    return [place[_plain(name)] for name in names]


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(ClassificationArguments, description=__doc__).parse_args_into_dataclasses(argv)
    try:
        records = evaluate(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    for record in records:
        chance = f"   chance {100 * record.chance:.2f} %" if record.chance else ""
        print(f"{record.dataset:20} {record.protocol:8} {record.metric:24} {100 * record.value:6.2f} %{chance}")


if __name__ == "__main__":
    main()
