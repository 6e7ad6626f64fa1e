"""Cross-modal retrieval: texts find their image, images find one of their texts.

    python -m eval.retrieval --model data/openmoji/base --dataset data/openmoji/dataset --split test --language pt \
        --output retrieval_pt.json
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch import Tensor
from transformers import HfArgumentParser

from artifacts import device_description
from eval.metrics import (
    RECALL_CUTOFFS,
    chance_recall,
    mean_hits,
    mean_recall,
    paired_bootstrap,
    recall_at_k,
    retrieval_ranks,
)
from eval.results import Record, header, write_records
from modeling_capivara import CapivaraModel, CapivaraProcessor, clip_loss
from modeling_capivara.embedding import embed_images, embed_texts
from modeling_capivara.loading import load_model, load_processor

PROTOCOL = "all captions of all images of the split, one pool; a tie counts against the query"
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass
class RetrievalArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a CAPIVARA model with its processor."})
    dataset: str = field(metadata={"help": "Folder of a saved HF data set, or its Hub id."})
    output: Path = field(metadata={"help": "JSON file for the result records."})
    role: Literal["baseline", "capivara"] = field(
        default="capivara", metadata={"help": "What the records call the model: baseline or capivara."}
    )
    split: str = field(default="test", metadata={"help": "Split that is searched."})
    language: str = field(default="pt", metadata={"help": "Language of the captions: column `captions-<language>`."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    batch_size: int = field(default=32, metadata={"help": "Images that go through at once."})


@dataclass(frozen=True)
class RetrievalEmbeddings:
    """A split in the shared space.

    Attributes:
        text_embeds: (texts, width), unit length.
        image_embeds: (images, width), unit length.
        image_of_text: (texts,), index of the image that each text describes.
    """

    text_embeds: Tensor
    image_embeds: Tensor
    image_of_text: Tensor

    def ranks(self, direction: str) -> Tensor:
        """(queries,), ranks as `retrieval_ranks` defines them."""
        queries, items, query_groups, item_groups = self._sides(direction)
        return retrieval_ranks(queries, items, query_groups, item_groups)

    def chance(self, direction: str, k: int) -> float:
        _, _, query_groups, item_groups = self._sides(direction)
        return chance_recall(query_groups, item_groups, k)

    def groups(self, direction: str) -> Tensor:
        """(queries,), index of the image that each query belongs to."""
        return self._sides(direction)[2]

    def _sides(self, direction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images = torch.arange(len(self.image_embeds))
        if direction == "text_to_image":
            return self.text_embeds, self.image_embeds, self.image_of_text, images
        return self.image_embeds, self.text_embeds, images, self.image_of_text


def flat_captions(captions: list[list[str]]) -> tuple[list[str], Tensor]:
    """Lists of captions, one list an image, as one list of texts and the image index (texts,) of each.

    Raises:
        ValueError: an image has no caption, or an empty one.
    """
    for index, texts in enumerate(captions):
        if not texts or any(not (text or "").strip() for text in texts):
            raise ValueError(f"Row {index} has no caption or an empty one: {texts!r}. Fill it, or remove the row.")
    image_of_text = [index for index, texts in enumerate(captions) for _ in texts]
    return [text for texts in captions for text in texts], torch.tensor(image_of_text)


def embed_captions(
    model: CapivaraModel, processor: CapivaraProcessor, captions: list[list[str]], image_embeds: Tensor
) -> RetrievalEmbeddings:
    """Embed every caption of every image, beside images that are embedded already."""
    texts, image_of_text = flat_captions(captions)
    return RetrievalEmbeddings(embed_texts(model, processor, texts), image_embeds, image_of_text)


def retrieval_records(embeddings: RetrievalEmbeddings, **facts) -> list[Record]:
    """Recall at 1, 5, 10 and their mean in both directions, beside chance.

    Args:
        embeddings: of the split.
        facts: the other fields of `Record`: dataset, split, language, model, model_folder and seed.
    """
    records = []
    for direction in DIRECTIONS:
        ranks = embeddings.ranks(direction)
        values = {f"recall@{k}": (recall_at_k(ranks, k), embeddings.chance(direction, k)) for k in RECALL_CUTOFFS}
        recalls, chances = zip(*values.values(), strict=True)
        values["mean_recall"] = (sum(recalls) / len(recalls), sum(chances) / len(chances))
        for metric, (value, chance) in values.items():
            records.append(
                Record(
                    task="retrieval", protocol=PROTOCOL, direction=direction, metric=metric, value=value, n=len(ranks),
                    chance=chance, **facts,
                )
            )  # fmt: skip
    return records


@torch.no_grad()
def validation_measures(embeddings: RetrievalEmbeddings, logit_scale: Tensor) -> dict[str, float]:
    """Mean recall in each direction, a share from 0 to 1, and `loss`: of all images, each with its first caption."""
    measures = {direction: mean_recall(embeddings.ranks(direction)) for direction in DIRECTIONS}
    first = torch.searchsorted(embeddings.image_of_text, torch.arange(len(embeddings.image_embeds)))
    loss = clip_loss(embeddings.text_embeds[first], embeddings.image_embeds, logit_scale.detach().cpu())
    return measures | {"loss": loss.item()}


def gain_records(before: RetrievalEmbeddings, after: RetrievalEmbeddings, **facts) -> list[Record]:
    """Mean recall after training minus that before, on the same split, with its paired-bootstrap interval."""
    records = []
    for direction in DIRECTIONS:
        hits = [mean_hits(embeddings.ranks(direction)) for embeddings in (before, after)]
        gain, low, high = paired_bootstrap(*hits, after.groups(direction))
        records.append(
            Record(
                task="retrieval", protocol=PROTOCOL, direction=direction, metric="mean_recall_gain", value=gain,
                n=len(hits[0]), interval_95=(low, high), **facts,
            )
        )  # fmt: skip
    return records


def dataset_name(dataset: str) -> str:
    """Name of a data set in records: a Hub id as it is, a local folder by its last parts, `openmoji/dataset`."""
    return "/".join(Path(dataset).parts[-2:])


def load_split(dataset: str, split: str, language: str, image_column: str) -> Dataset:
    """A split of a saved data set or of one on the Hub, its columns checked.

    Raises:
        ValueError: the split or a column is missing; those that are there are named.
    """
    loaded = load_from_disk(dataset) if Path(dataset).is_dir() else load_dataset(dataset)
    if not isinstance(loaded, DatasetDict):
        raise ValueError(f"{dataset} holds a single split; a DatasetDict with {split!r} is needed.")
    if split not in loaded:
        raise ValueError(f"{dataset} has no split {split!r}; there are {sorted(loaded)}.")
    columns = loaded[split].column_names
    for column in (image_column, f"captions-{language}"):
        if column not in columns:
            raise ValueError(f"{dataset} has no column {column!r} in split {split!r}; there are {columns}.")
    return loaded[split]


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(RetrievalArguments, description=__doc__).parse_args_into_dataclasses(argv)
    try:
        dataset = load_split(args.dataset, args.split, args.language, args.image_column)
        flat_captions(dataset[f"captions-{args.language}"])
        processor, model = load_processor(args.model), load_model(args.model).eval()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    started = time.perf_counter()
    image_embeds = embed_images(model, processor, dataset[args.image_column], args.batch_size, "Images")
    embeddings = embed_captions(model, processor, dataset[f"captions-{args.language}"], image_embeds)
    facts = {"dataset": dataset_name(args.dataset), "split": args.split, "language": args.language}
    records = retrieval_records(embeddings, **facts, model=args.role, model_folder=args.model)
    about = header(
        dataset=args.dataset,
        dataset_fingerprint=dataset._fingerprint,
        model=args.model,
        device=device_description(model.device),
        precision="float32",
        seconds=time.perf_counter() - started,
    )
    write_records(args.output, records, about)
    for record in records:
        print(
            f"{record.direction:14} {record.metric:12} {100 * record.value:6.2f} %   chance {100 * record.chance:.2f} %"
        )


if __name__ == "__main__":
    main()
