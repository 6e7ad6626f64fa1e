r"""Measure cross-modal retrieval: find the image of each caption, and a caption of each image.

    python -m eval.retrieval --model data/openmoji/base --dataset data/openmoji/dataset --split test --language pt \
        --output retrieval_pt.json

Several processes can embed a large dataset together (docs/how-to/cluster.md), with bit-identical results:

    accelerate launch --multi_gpu --num_processes 8 -m eval.retrieval …
"""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from capivara_common.cli import flag, run_main_and_report_user_errors
from capivara_common.environment import get_or_init_distributed_state
from capivara_common.files import check_output_file
from capivara_common.image_files import BadRow
from capivara_common.privacy import get_publishable_model_or_dataset_name
from caption_data.rows import DATASET_HELP, compute_image_caption_rows_digest, convert_to_caption_list
from caption_data.sources import Split, open_split
from eval.capivara_metrics import metrics
from eval.capivara_metrics.metrics import RECALL_CUTOFFS
from eval.embeddings import MODEL_HELP, CachedEmbedder, EmbeddedImages, ModelArguments, run_evaluation_command
from eval.records.result_files import DIRECTIONS, GAIN_METRIC, Record
from eval.records.tables import build_mean_recall_record
from modeling_capivara.modeling_capivara import check_truncate_dim, l2_normalize
from modeling_capivara.two_towers import embed_texts

RETRIEVAL_PROTOCOL = "all captions of all images of the split, one pool; a tie counts against the query"
CAPTION_POSITIONS = {"all": slice(None), "first": slice(1), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


@dataclass
class RetrievalArguments(ModelArguments):
    """Command-line arguments of `eval.retrieval`, which measures how well captions and images find each other."""

    model: str = flag(..., MODEL_HELP)
    dataset: str = flag(..., DATASET_HELP)
    output: Path = flag(..., "JSON file to write the result to. Sample queries are drawn in OUTPUT.queries.png.")
    image_column: str = flag("image", "Name of the image column.")
    language: str = flag("pt", "Language code of the captions.")
    caption_column: str = flag("captions-{language}", "Column with a caption or a list of captions per image.")
    caption_positions: Literal["all", "first", "even", "odd"] = flag(
        "all",
        "Captions of each image to use. Positions are counted from 0, so first means position 0. The paper's data have "
        "ten captions per image: those at even positions were translated by Marian, the others by Google.",
    )
    dim: int | None = flag(
        None, "Compare only the first DIM dimensions of the embeddings, normalized again. Default: all dimensions."
    )
    seed: int | None = flag(None, "Seed with which the model was trained, to be stored in the result file.")
    dataset_name: str | None = flag(None, "Name of the dataset in the records. Default: the end of its path or Hub id.")


@dataclass(frozen=True)
class RetrievalEmbeddings:
    """Embeddings of all captions and images of a dataset split, from which retrieval is measured.

    All embeddings have unit length, so the dot product of a caption and an image is their cosine similarity.
    """

    text_embeds: Tensor  # (texts, width), unit length
    image_embeds: Tensor  # (images, width), unit length
    image_of_text: Tensor  # (texts,), index of the image that each text describes
    full_width: int | None = None  # width before truncation; None if the embeddings are not truncated

    def truncate(self, dim: int | None) -> "RetrievalEmbeddings":
        """Keep the first dimensions of every embedding and normalize again (Matryoshka embeddings, arXiv 2205.13147).

        Args:
            dim: Number of dimensions to keep. None keeps all.

        Returns:
            The truncated embeddings, of unit length again, or this object if nothing is truncated.

        Raises:
            ValueError: If `dim` is below 1 or above the width of the embeddings.
        """
        width = self.text_embeds.shape[1]
        check_truncate_dim(dim, width, "dim")
        if dim in (None, width):
            return self
        text_embeds, image_embeds = (l2_normalize(embeds[:, :dim]) for embeds in (self.text_embeds, self.image_embeds))
        return RetrievalEmbeddings(text_embeds, image_embeds, self.image_of_text, self.full_width or width)

    def query_groups(self, direction: str) -> Tensor:
        """Return for each query the index of the image that it belongs to.

        A caption belongs to the image that it describes, and an image to itself. A search result is relevant if it
        belongs to the same image as the query.

        Args:
            direction: "text_to_image" (captions are the queries) or "image_to_text" (images are the queries).

        Returns:
            Image indices, (queries,).
        """
        return self.image_of_text if direction == "text_to_image" else torch.arange(len(self.image_embeds))

    def chance_recall(self, direction: str, k: int) -> float:
        """Return the recall@k that a model with random scores is expected to reach on this split.

        Args:
            direction: "text_to_image" (captions are the queries) or "image_to_text" (images are the queries).
            k: A query is a hit if a relevant item is among its `k` highest-scored items.

        Returns:
            Expected recall, from 0 to 1.
        """
        opposite = DIRECTIONS[1 - DIRECTIONS.index(direction)]
        return metrics.chance_recall(self.query_groups(direction), self.query_groups(opposite), k)

    @cached_property
    def ranks(self) -> dict[str, Tensor]:
        """For each query, the rank of its best correct result, in both search directions.

        A dict `{direction: ranks}`. Captions are the queries of "text_to_image", images are the queries of
        "image_to_text". The ranks are a tensor, (queries,), and count from 0.
        """
        groups = (self.query_groups(direction) for direction in DIRECTIONS)
        ranks = metrics.cross_modal_ranks(self.text_embeds, self.image_embeds, *groups)
        return dict(zip(DIRECTIONS, ranks, strict=True))


def check_and_flatten_captions(captions: list[list[str]]) -> tuple[list[str], Tensor]:
    """Flatten the captions of all images into one list, after checking that no caption is missing or empty.

    Args:
        captions: For each image, the list of its captions.

    Returns:
        A tuple (captions, image indices): the list, and for each caption the index of its image, (texts,), int64.

    Raises:
        ValueError: If an image has no caption, or an empty caption.
    """
    for index, texts in enumerate(captions):
        if not texts or any(not (text or "").strip() for text in texts):
            raise ValueError(
                f"Captions must not be missing or empty, got {texts!r} in row {index}. Fill in the caption or remove "
                "the row."
            )
    image_of_text = [index for index, texts in enumerate(captions) for _ in texts]
    return [text for texts in captions for text in texts], torch.tensor(image_of_text)


def embed_captions_for_retrieval(
    model: PreTrainedModel, processor: ProcessorMixin, captions: list[list[str]], image_embeds: Tensor
) -> RetrievalEmbeddings:
    """Embed captions, and combine them with image embeddings that have already been computed.

    Models with the same image encoder can share the image embeddings.

    Args:
        model: A model with `get_text_features`.
        processor: The processor of the model.
        captions: For each image, the list of its captions.
        image_embeds: Unit-length embeddings of the images (images, width), in the order of `captions`.

    Returns:
        The embeddings of all captions and images, ready for `compute_retrieval_records`.

    Raises:
        ValueError: If an image has no caption, or an empty caption.
    """
    texts, image_of_text = check_and_flatten_captions(captions)
    return RetrievalEmbeddings(embed_texts(model, processor, texts), image_embeds, image_of_text)


def compute_retrieval_records(
    embeddings: RetrievalEmbeddings, protocol: str = RETRIEVAL_PROTOCOL, **record_fields: Any
) -> list[Record]:
    """Compute the retrieval metrics of a split, for text-to-image and for image-to-text search.

    The metrics are recall@1, recall@5, recall@10, their mean, and the median rank. Recalls come with their chance
    level, the value for random scores. If the split has at most k images, recall@k and the mean are omitted.

    Args:
        embeddings: The embedded split.
        protocol: Description of the measurement. Only records with equal protocols are comparable.
        record_fields: Other fields of `Record`: dataset, split, language, model, model_folder and seed.

    Returns:
        One `Record` per direction and metric: the measured value with the conditions of its measurement.
    """
    # With at most k images, recall@k would always be 1, because each caption finds its image among the first k.
    records, cutoffs = [], [k for k in RECALL_CUTOFFS if k < len(embeddings.image_embeds)]
    record_fields |= _build_protocol_and_dim_fields(embeddings, protocol)
    for direction in DIRECTIONS:
        ranks = embeddings.ranks[direction]
        record = partial(Record, "retrieval", direction=direction, n=len(ranks), **record_fields)
        recalls = []
        for k in cutoffs:
            chance = embeddings.chance_recall(direction, k)
            recalls.append(record(metric=f"recall@{k}", value=metrics.recall_at_k(ranks, k), chance=chance))
        # The mean recall needs recall@1, recall@5 and recall@10. A mean of fewer recalls would have the same name, but
        # could not be compared.
        if len(cutoffs) == len(RECALL_CUTOFFS):
            recalls.append(build_mean_recall_record(recalls))
        records += [*recalls, record(metric="median_rank", value=metrics.median_rank(ranks))]
    return records


def _build_protocol_and_dim_fields(embeddings: RetrievalEmbeddings, protocol: str) -> dict[str, Any]:
    """Return the fields of `Record` that say whether the embeddings were truncated.

    Results of truncated and of full embeddings are not comparable, so they must differ in these fields.

    Args:
        embeddings: The embeddings that are measured.
        protocol: Description of the measurement for full embeddings.

    Returns:
        The fields `protocol` and `dim`. For full embeddings, `protocol` is unchanged and `dim` is None. For truncated
        embeddings, `dim` is their width, and `protocol` ends with a text such as "first 64 of 512 dimensions".
    """
    if embeddings.full_width is None:
        return {"protocol": protocol, "dim": None}
    dim = embeddings.text_embeds.shape[1]
    return {"protocol": f"{protocol}; first {dim} of {embeddings.full_width} dimensions", "dim": dim}


def compute_gain_records(before: RetrievalEmbeddings, after: RetrievalEmbeddings, **record_fields) -> list[Record]:
    """Compute how much training has improved the mean recall, in both search directions.

    Each gain has a 95 % confidence interval from a bootstrap over the images.

    Args:
        before: Embeddings of the baseline, the model before training.
        after: Embeddings of the trained model for the same split.
        record_fields: Other fields of `Record`: dataset, split, language, model, model_folder and seed.

    Returns:
        One record per direction, or an empty list if the split has at most 10 images, too few for recall@10.
    """
    if len(after.image_embeds) <= max(RECALL_CUTOFFS):
        return []
    records, record_fields = [], record_fields | _build_protocol_and_dim_fields(after, RETRIEVAL_PROTOCOL)
    for direction in DIRECTIONS:
        hits = [metrics.mean_hits(embeddings.ranks[direction]) for embeddings in (before, after)]
        gain, *interval = metrics.paired_bootstrap(*hits, after.query_groups(direction))
        record = partial(Record, "retrieval", direction=direction, metric=GAIN_METRIC, n=len(hits[0]), **record_fields)
        records.append(record(value=gain, interval_95=tuple(interval)))
    return records


@dataclass
class RetrievalData:
    """A dataset split for retrieval: captions are in memory, and each image is decoded when it is needed."""

    images: Split
    captions: list[list[str]]  # captions of each row

    def embed(self, cached_embedder: CachedEmbedder) -> tuple[RetrievalEmbeddings, EmbeddedImages]:
        """Embed all readable images and their captions.

        Args:
            cached_embedder: The model that embeds, with its embedding cache on disk.

        Returns:
            A tuple (embeddings, images). The embeddings cover all readable images and their captions. The images are
            the result of `CachedEmbedder.embed_images`; its field `skipped` gives the reason for each unreadable image.
        """
        images = cached_embedder.embed_images(self.images)
        texts, row_of_text = check_and_flatten_captions(self.captions)
        has_image = torch.isin(row_of_text, images.rows)
        # All captions are embedded, also those of unreadable images. The cached embeddings are then valid no matter
        # which images can be read.
        text_embeds = cached_embedder.embed_texts(texts, "Captions")[has_image]
        image_of_text = torch.searchsorted(images.rows, row_of_text[has_image])
        return RetrievalEmbeddings(text_embeds, images.embeds, image_of_text), images

    def fingerprint(self) -> str:
        """Return a digest of all images and captions. Two results with the same digest were measured on the same data.

        Training computes the digest in the same way, so its validation results can be compared with retrieval results.
        """
        return compute_image_caption_rows_digest(zip(self.images.image_digests, self.captions, strict=True))


def load_retrieval_data(args: RetrievalArguments) -> RetrievalData:
    """Open the dataset split that the arguments name, and read its captions. No image is decoded yet.

    Raises:
        ValueError: If a column is missing, an archive is damaged, or a caption is missing, empty or not a text.
    """
    source = open_split(args.dataset, args.split, args.image_column, **args.image_options()).limited(args.limit)
    column = args.caption_column.replace("{language}", args.language)
    source.check_columns([source.image_column, column])
    cells, positions = source.data[column][:], args.caption_positions
    captions = [select_captions_by_position(cell, column, positions, row) for row, cell in enumerate(cells)]
    if source.damaged_archives:
        fault = source.damaged_archives[0].detail
        raise ValueError(f"{source.display_name} is damaged: {fault}. Download or create it again.")
    check_and_flatten_captions(captions)
    return RetrievalData(source, captions)


def evaluate_retrieval_and_write_result(args: RetrievalArguments, draw_sheet: bool = True) -> list[Record]:
    """Measure how well captions and images of a dataset find each other, and write the result file.

    Args:
        args: Command-line arguments.
        draw_sheet: Whether to also draw OUTPUT.queries.png, an image of the best and worst queries with the images that
            the model ranks first.

    Returns:
        The measured values, one record per direction and metric.

    Raises:
        ValueError: If the data, the model or an argument is invalid.
    """
    check_output_file(args.output)
    data = load_retrieval_data(args)
    cached_embedder = CachedEmbedder.load(args)
    # A wrong --dim is reported here, before the dataset is embedded, which takes long.
    check_truncate_dim(args.dim, cached_embedder.embedder.width, "dim")
    full_embeddings, images = data.embed(cached_embedder)
    embeddings = full_embeddings.truncate(args.dim)
    if len(images.rows) < 2:
        raise ValueError(f"Retrieval needs at least two readable images, but {args.dataset} has one.")
    name = args.dataset_name or args.dataset
    record_fields = {"dataset": get_publishable_model_or_dataset_name(name), "split": args.split}
    record_fields |= {"language": args.language, "seed": args.seed, "model": args.role, "model_folder": args.model}
    protocol = RETRIEVAL_PROTOCOL
    if args.caption_positions != "all":
        protocol += f"; captions: {args.caption_positions}"
    records = compute_retrieval_records(embeddings, protocol, **record_fields)
    if get_or_init_distributed_state().is_main_process:
        metadata = {"dataset": args.dataset, "name": name, "fingerprint": data.fingerprint(), "skipped": images.skipped}
        cached_embedder.write_result_file(args, records, **metadata)
        if draw_sheet:
            # The import is here and not at the top, because it loads matplotlib, which is needed only for this sheet.
            from eval.records.plots import plot_retrieval_sheet

            sheet, rows = args.output.with_suffix(".queries.png"), images.rows.tolist()
            queries = [text for row in rows for text in data.captions[row]]
            plot_retrieval_sheet(sheet, lambda i: data.images.load_image(rows[i]), queries, {args.role: embeddings})
    return records


def select_captions_by_position(value: Any, column: str, positions: str, row: int) -> list[str]:
    """Return those captions of a dataset row that are at the selected positions in the list of captions.

    Args:
        value: Content of the caption column in this row: a text or a list of texts.
        column: Name of the caption column, for error messages.
        positions: A key of `CAPTION_POSITIONS`: "all", "first", "even" or "odd", counted from 0.
        row: Number of the row, for error messages.

    Raises:
        ValueError: If the value is not text, or the row has captions but none at these positions.
    """
    try:
        captions = convert_to_caption_list(value, column)
    except BadRow as bad:
        fault = f"Captions must be text, got {str(value)[:100]} in row {row} of the column {column!r}"
        raise ValueError(f"{fault}. Choose another --caption_column.") from bad
    if captions and not captions[CAPTION_POSITIONS[positions]]:
        fault = f"Row {row} has {len(captions)} captions, none at the positions {positions!r}"
        raise ValueError(f"{fault}. Choose other --caption_positions.")
    return captions[CAPTION_POSITIONS[positions]]


main = partial(run_evaluation_command, RetrievalArguments, __doc__, evaluate_retrieval_and_write_result)

if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
