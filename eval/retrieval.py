r"""Cross-modal retrieval: texts find their image, images find one of their texts.

    python -m eval.retrieval --model data/openmoji/base --dataset data/openmoji/dataset --split test --language pt \
        --output retrieval_pt.json

A large data set is embedded by several processes, on one machine or on a cluster (docs/cluster.md). The figures are the
same to the bit.

    accelerate launch --multi_gpu --num_processes 8 -m eval.retrieval …
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from capivara_common.cli import flag, run_command
from capivara_common.environment import process_state
from capivara_common.files import check_output_file
from capivara_common.image_files import BadRow
from capivara_common.privacy import short_name
from caption_data.rows import DATASET_HELP, normalize_captions, rows_fingerprint
from caption_data.sources import Split, open_split
from eval.capivara_metrics import metrics
from eval.capivara_metrics.metrics import RECALL_CUTOFFS
from eval.embeddings import EmbeddedImages, EmbeddingStore, ModelArguments, open_store, run_evaluation, write_result
from eval.records.schema import DIRECTIONS, GAIN_METRIC, Record
from eval.records.tables import average_recalls
from modeling_capivara.modeling_capivara import check_truncate_dim, l2_normalize
from modeling_capivara.two_towers import embed_texts

RETRIEVAL_PROTOCOL = "all captions of all images of the split, one pool; a tie counts against the query"
LAUNCHED = "`accelerate launch --multi_gpu -m eval.retrieval` shares the work out to processes, see docs/cluster.md"
GONE = {  # flags of earlier versions -> what there is instead
    **dict.fromkeys(["executor", "tasks", "workers", "partition", "time", "sbatch", "logging_dir"], LAUNCHED),
    **dict.fromkeys(["cpus_per_task", "mem_per_cpu_gb", "gpus_per_task"], LAUNCHED),
    "gallery": "the best and the worst queries are drawn beside the result, OUTPUT.queries.png",
    "recall_at": "recall at 1, 5 and 10 is measured, as far as there are more images",
    "trust_remote_code": "a model's own code is not run; transformers' classes are read",
}
CAPTION_POSITIONS = {"all": slice(None), "first": slice(1), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


@dataclass
class RetrievalArguments(ModelArguments):
    """Flags of `eval.retrieval`."""

    gone = GONE
    model: str = flag(..., "Folder or Hub id of a model of two towers; open_clip's with --role baseline.")
    dataset: str = flag(..., DATASET_HELP)
    output: Path = flag(..., "JSON file for the result records.")
    image_column: str = flag("image", "Name of the image column.")
    language: str = flag("pt", "Language of the captions.")
    caption_column: str = flag("captions-{language}", "Name of the column of a caption or a list of captions an image.")
    caption_positions: Literal["all", "first", "even", "odd"] = flag(
        "all", "Which captions of an image. In the paper's files of ten captions, Marian's are even and Google's odd."
    )
    dim: int | None = flag(
        None, "Compare the first so many numbers of the embeddings, scaled to unit length; all where none is given."
    )
    seed: int | None = flag(None, "Seed of the training run, for the records.")
    dataset_name: str | None = flag(None, "What records call the data set; its last parts.")


@dataclass(frozen=True)
class RetrievalEmbeddings:
    """A split in the shared space."""

    text_embeds: Tensor  # (texts, width), unit length
    image_embeds: Tensor  # (images, width), unit length
    image_of_text: Tensor  # (texts,), index of the image that each text describes
    full_width: int | None = None  # of the embeddings that these are the first numbers of; None where they are whole

    def truncate(self, dim: int | None) -> "RetrievalEmbeddings":
        """The first `dim` numbers of every embedding, scaled to unit length; ValueError outside of 1 to the width."""
        width = self.text_embeds.shape[1]
        check_truncate_dim(dim, width, "dim")
        if dim in (None, width):
            return self
        sides = (l2_normalize(embeds[:, :dim]) for embeds in (self.text_embeds, self.image_embeds))
        return RetrievalEmbeddings(*sides, self.image_of_text, self.full_width or width)

    def query_groups(self, direction: str) -> Tensor:
        """(queries,), index of the image that each query belongs to."""
        return self.image_of_text if direction == "text_to_image" else torch.arange(len(self.image_embeds))

    def chance_recall(self, direction: str, k: int) -> float:
        """Expected recall@k of random scores, a share from 0 to 1."""
        other = DIRECTIONS[1 - DIRECTIONS.index(direction)]
        return metrics.chance_recall(self.query_groups(direction), self.query_groups(other), k)

    @cached_property
    def ranks(self) -> dict[str, Tensor]:
        """Direction -> (queries,), ranks as `retrieval_ranks` defines them."""
        groups = (self.query_groups(direction) for direction in DIRECTIONS)
        ranks = metrics.cross_modal_ranks(self.text_embeds, self.image_embeds, *groups)
        return dict(zip(DIRECTIONS, ranks, strict=True))


def flatten_captions(captions: list[list[str]]) -> tuple[list[str], Tensor]:
    """Lists of captions, one an image, as one list of texts and the image index (texts,) of each.

    Raises ValueError where an image has no caption, or an empty one.
    """
    for index, texts in enumerate(captions):
        if not texts or any(not (text or "").strip() for text in texts):
            raise ValueError(f"Row {index} has no caption or an empty one: {texts!r}. Fill it, or remove the row.")
    image_of_text = [index for index, texts in enumerate(captions) for _ in texts]
    return [text for texts in captions for text in texts], torch.tensor(image_of_text)


def embed_captions(
    model: PreTrainedModel, processor: ProcessorMixin, captions: list[list[str]], image_embeds: Tensor
) -> RetrievalEmbeddings:
    """Embed every caption of every image, beside images that are embedded already."""
    texts, image_of_text = flatten_captions(captions)
    return RetrievalEmbeddings(embed_texts(model, processor, texts), image_embeds, image_of_text)


def compute_retrieval_records(
    embeddings: RetrievalEmbeddings, protocol: str = RETRIEVAL_PROTOCOL, **record_fields: Any
) -> list[Record]:
    """Recall at 1, 5 and 10, their mean, and the median rank, in both directions, beside chance.

    Recall that the images are too few for, so that every query would be a hit, is left out, and so is the mean then.
    `facts` are the other fields of `Record`: dataset, split, language, model, model_folder and seed.
    """
    records, cutoffs = [], [k for k in RECALL_CUTOFFS if k < len(embeddings.image_embeds)]
    record_fields |= describe_truncation(embeddings, protocol)
    for direction in DIRECTIONS:
        ranks = embeddings.ranks[direction]
        record = partial(Record, "retrieval", direction=direction, n=len(ranks), **record_fields)
        recalls = [
            record(
                metric=f"recall@{k}", value=metrics.recall_at_k(ranks, k), chance=embeddings.chance_recall(direction, k)
            )
            for k in cutoffs
        ]
        if len(cutoffs) == len(RECALL_CUTOFFS):  # of fewer it would be another figure of the same name
            recalls.append(average_recalls(recalls))
        records += [*recalls, record(metric="median_rank", value=metrics.median_rank(ranks))]
    return records


def describe_truncation(embeddings: RetrievalEmbeddings, protocol: str) -> dict[str, Any]:
    """`protocol` and `dim` of a `Record`: figures of embeddings that were cut are not comparable to others."""
    if embeddings.full_width is None:
        return {"protocol": protocol, "dim": None}
    dim = embeddings.text_embeds.shape[1]
    return {"protocol": f"{protocol}; first {dim} of {embeddings.full_width} dimensions", "dim": dim}


@torch.no_grad()
def compute_validation_metrics(
    embeddings: RetrievalEmbeddings, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """Mean recall in each direction and of both, 0 to 1, and `loss`: of all images, each with its first caption."""
    measures = pd.Series({direction: metrics.mean_recall(embeddings.ranks[direction]) for direction in DIRECTIONS})
    first = torch.searchsorted(embeddings.image_of_text, torch.arange(len(embeddings.image_embeds)))
    measures["mean_recall"] = measures.mean()
    return measures.to_dict() | {"loss": loss(embeddings.text_embeds[first], embeddings.image_embeds).item()}


def compute_gain_records(before: RetrievalEmbeddings, after: RetrievalEmbeddings, **record_fields) -> list[Record]:
    """Mean recall after training minus that before, on the same split, with its paired-bootstrap interval; none where
    the split has too few images for a mean recall.
    """
    if len(after.image_embeds) <= max(RECALL_CUTOFFS):
        return []
    records, record_fields = [], record_fields | describe_truncation(after, RETRIEVAL_PROTOCOL)
    for direction in DIRECTIONS:
        hits = [metrics.mean_hits(embeddings.ranks[direction]) for embeddings in (before, after)]
        gain, *interval = metrics.paired_bootstrap(*hits, after.query_groups(direction))
        of = {
            "direction": direction,
            "metric": GAIN_METRIC,
            "value": gain,
            "n": len(hits[0]),
            "interval_95": tuple(interval),
        }
        records.append(Record(task="retrieval", **of, **record_fields))
    return records


@dataclass
class RetrievalData:
    """A split that is read: captions now, images when they are needed."""

    images: Split
    captions: list[list[str]]  # row -> its captions

    def embed(self, store: EmbeddingStore) -> tuple[RetrievalEmbeddings, EmbeddedImages]:
        """All images that can be read, with their captions, in the shared space."""
        images = store.embed_images(self.images)
        texts, row_of_text = flatten_captions(self.captions)
        good = torch.isin(row_of_text, images.rows)
        text_embeds = store.embed_texts(texts, "Captions")[good]  # of all: their cache does not depend on the images
        image_of_text = torch.searchsorted(images.rows, row_of_text[good])
        return RetrievalEmbeddings(text_embeds, images.embeds, image_of_text), images

    def fingerprint(self) -> str:
        """The one that a training run gives the same images and captions."""
        return rows_fingerprint(zip(self.images.image_digests, self.captions, strict=True))


def load_retrieval_data(args: RetrievalArguments) -> RetrievalData:
    """The split of the arguments; ValueError where a column or a caption is missing."""
    source = open_split(args.dataset, args.split, args.image_column, **args.image_options())
    column = args.caption_column.replace("{language}", args.language)
    source.check_columns([args.image_column, column])
    captions = [
        _select_captions(value, column, args.caption_positions, row) for row, value in enumerate(source.data[column][:])
    ]
    if source.damaged_archives:
        raise ValueError(
            f"{source.display_name} is damaged: {source.damaged_archives[0].detail}. Fetch or make it again."
        )
    flatten_captions(captions)
    return RetrievalData(source, captions)


def evaluate(args: RetrievalArguments, draw_sheet: bool = True) -> list[Record]:
    """Measure and write; returns the records. `pictures`: whether a sheet of queries is drawn beside the result."""
    check_output_file(args.output)
    data = load_retrieval_data(args)
    store = open_store(args)
    if args.dim is not None:  # before any long work
        check_truncate_dim(args.dim, store.embedder.embed_texts(["capivara"]).shape[1], "dim")
    started = time.perf_counter()
    whole, images = data.embed(store)
    embeddings = whole.truncate(args.dim)
    if len(images.rows) < 2:
        raise ValueError(f"{args.dataset} has one image that can be read: among so few, retrieval has no meaning.")
    name = args.dataset_name or args.dataset
    facts = {"dataset": short_name(name), "split": args.split, "language": args.language}
    facts |= {"seed": args.seed, "model": args.role, "model_folder": args.model}
    protocol = (
        RETRIEVAL_PROTOCOL
        if args.caption_positions == "all"
        else f"{RETRIEVAL_PROTOCOL}; captions: {args.caption_positions}"
    )
    records = compute_retrieval_records(embeddings, protocol, **facts)
    if process_state().is_main_process:
        facts = {"dataset": args.dataset, "name": name, "fingerprint": data.fingerprint(), "skipped": images.skipped}
        write_result(args, records, store, started, **facts)
        if draw_sheet:
            from eval.records.plots import plot_retrieval_sheet  # here: others of these commands draw nothing

            sheet, rows = args.output.with_suffix(".queries.png"), images.rows.tolist()
            queries = [text for row in rows for text in data.captions[row]]
            plot_retrieval_sheet(sheet, lambda i: data.images.load_image(rows[i]), queries, {args.role: embeddings})
    return records


def _select_captions(value: Any, column: str, positions: str, row: int) -> list[str]:
    try:
        captions = normalize_captions(value, column)
    except BadRow as bad:
        fault = f"Row {row} has captions that are no text: {str(value)[:100]}"
        raise ValueError(f"{fault}. Name another --caption_column.") from bad
    if captions and not captions[CAPTION_POSITIONS[positions]]:
        raise ValueError(f"Row {row} has {len(captions)} captions, none at the positions {positions!r}.")
    return captions[CAPTION_POSITIONS[positions]]


main = partial(run_evaluation, RetrievalArguments, __doc__, evaluate)

if __name__ == "__main__":
    run_command(main, resumable=True)
