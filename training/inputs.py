"""Load what a training run needs: datasets, model, and the embeddings or pixels of the images.

A view is the version of an image that the model gets at a training step. The setting `augmented_views` selects the
views:

- 1: the image itself.
- V above 1: V augmentations, which stay the same during the whole run. Each step draws one.
- 0: a new augmentation at every step, as in CAPIVARA's paper (arXiv 2310.13683).

Unless `augmented_views` is 0, the frozen image tower can embed every view once, with a cache on disk.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin

from capivara_common.embedding_speed import CHUNK_SIZES, LONG_PASS_IMAGES, with_tuned_chunk_size
from capivara_common.embedding_store import EmbeddingStore, Place, vectors_to_array
from capivara_common.environment import cache_home
from capivara_common.files import json_digest
from capivara_common.image_files import BadImage
from caption_data.augmentation import describe_augmentation, make_augmented_view
from caption_data.embedded import EMBEDS_COLUMN
from caption_data.pairs import (
    check_bad_share,
    filter_usable_rows,
    find_missing_columns,
    list_skipped_rows_and_damaged_archives,
    load_or_build_pair_table,
    load_or_compute_pair_content_digest,
)
from caption_data.rows import SkippedRow
from caption_data.sources import Split, open_split
from modeling_capivara import two_towers
from modeling_capivara.loading import load_model, load_processor, weights_digest
from training.arguments import RunArguments, resolve_loading_workers
from training.batches import BatchPlanner, StepPlan, apportion_batch_to_datasets
from training.trainable import freeze_parameters_and_add_adapters

# Part of the key of the embedding cache. Increase it when a change of preprocessing or augmentation changes the pixels,
# so that embeddings of the old pixels are not used any more.
PIXELS_VERSION = 1
# Number of images per file of the image-embedding cache. A process that is killed loses at most one unfinished file.
SHARD_ROWS = 2048
logger = logging.getLogger("capivara")
DATA_FLAGS_HINT = (
    "--dataset and --train_split choose the training data; --evaluation_dataset, --validation_split and --test_split "
    "the evaluation data; --image_column, --caption_column, --language and --eval_languages the columns. If the "
    "data have no similarities of captions and images, use --caption_strategy none --min_pair_similarity null."
)
Splits = dict[tuple[str, str], Split]  # {(dataset, split name): opened split}


@dataclass
class PairDataset:
    """Pairs of one dataset split. A pair is an image with its captions.

    `pairs[i]` decodes and returns the image of the pair with index i.
    """

    source: Split  # the opened split, which reads and decodes images
    # One row for each pair. Columns: `row` is the row number of the pair in the split, `digest` is a hash of the image,
    # and `captions` is a list of texts. `reason` and `detail` say why the pair can't be used; they are empty for usable
    # pairs. With an embedding cache, the column `vectors` has the embeddings of all views, (views x width,), float16.
    table: Dataset
    processor: ProcessorMixin | None  # the model's processor; None if only the number of pairs is needed
    # Views of every image. 1: the image itself. V above 1: V augmentations that stay the same during the whole run. 0:
    # a new augmentation at every step.
    augmented_views: int = 1
    seed: int = 0  # seed of the augmentation

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, pair: int) -> PIL.Image.Image:
        """Decode the image of a pair. Use this only for evaluation splits, in which every image must be usable.

        Raises:
            ValueError: If the image can't be used. The message names the row.
        """
        row = self.table[pair]["row"]
        try:
            return self.source.load_image(row)
        except BadImage as bad:
            raise _bad_row_error(self.source, row, bad.reason, bad.detail) from bad

    def captions(self) -> list[list[str]]:
        """Return the captions of all pairs: for each pair, a list of texts."""
        return self.table["captions"][:]

    def load_pixels(self, pair: int, view: int) -> Tensor | BadImage:
        """Load the image of a pair, augment it if the run uses augmentation, and preprocess it for the model.

        Args:
            pair: Index of the pair in this dataset.
            view: Number that selects the augmented version of the image. It is ignored if `augmented_views` is 1.

        Returns:
            Pixels, (3, height, width). If the image can't be used, a `BadImage` exception is returned, not raised.
        """
        try:
            image = self.source.load_image(self.table[pair]["row"])
            if self.augmented_views != 1:
                # The augmentation depends on the digest of the image, not on the index of its pair, because the index
                # changes when other rows are skipped.
                image = make_augmented_view(image, self.table[pair]["digest"], view, self.seed)
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            # The exception is returned, because it would lose its attributes if it were raised in a worker process.
            return error if isinstance(error, BadImage) else BadImage("unreadable image", str(error))

    @cached_property
    def vectors(self) -> Dataset | None:
        """Embeddings of the images of all pairs; None if they have not been computed.

        A Hugging Face dataset in Arrow format with a single column, `vectors`. A row has the embeddings of all views of
        an image, (views x width,). A view is the image itself or an augmented copy of it.
        """
        names = self.table.column_names
        return self.table.select_columns("vectors").with_format("arrow") if "vectors" in names else None


@dataclass
class TrainingInputs:
    """Everything that a training run loads before its first step: processor, data and image embeddings.

    Rows that can't be used are already separated from the training pairs, and listed with their reasons.
    """

    processor: ProcessorMixin  # processor of the base model
    training: list[PairDataset]  # usable pairs of each training dataset
    validation: PairDataset  # validation split, which is evaluated during training
    validation_embeds: Tensor  # image embeddings of the validation split, (images, width)
    test: dict[str, PairDataset]  # {language code: test split with captions in this language}, for the final evaluation
    test_embeds: Tensor  # image embeddings of the test split, (images, width), float32
    skipped: list[SkippedRow]  # training rows that can't be used
    base_digest: str  # digest of the base model's weights

    def make_planner(self, args: RunArguments) -> BatchPlanner:
        """Return the planner that selects pairs, captions and image views for every training step.

        A view is the version of an image that the model sees: the image itself or an augmented copy of it.
        """
        captions = [pairs.table["captions"] for pairs in self.training]
        counts = apportion_batch_to_datasets(args.effective_batch_size, list(map(len, self.training)))
        # The planner runs in another thread, so it gets its own copy of the processor. A tokenizer stores the padding
        # and length settings of its last call, and calls from two threads would overwrite these settings.
        processor = copy.deepcopy(self.processor)
        return BatchPlanner(captions, counts, processor, args.micro_batch_size, args.augmented_views, args.seed)

    def fingerprints(self, args: RunArguments) -> dict[str, str]:
        """Return digests of the base model and the data. They must be the same when a run is resumed.

        Returns:
            A dict from names to digests. The names are "base model", "DATASET SPLIT" for the training and validation
            splits, and "DATASET SPLIT LANGUAGE" for the test split.
        """
        tables = {f"{pairs.source.name} {args.train_split}": pairs.table for pairs in self.training}
        tables[f"{args.evaluation_dataset} {args.validation_split}"] = self.validation.table
        for code, pairs in self.test.items():
            tables[f"{args.evaluation_dataset} {args.test_split} {code}"] = pairs.table
        digests = {name: load_or_compute_pair_content_digest(table) for name, table in tables.items()}
        return {"base model": self.base_digest} | digests


def load_inputs_and_embed_images(args: RunArguments, accelerator: Accelerator) -> TrainingInputs:
    """Load the data of a training run, and compute the image embeddings that are not in the cache yet.

    Args:
        args: Arguments of the run.
        accelerator: Device, precision and processes of the run.

    Returns:
        The usable training pairs, the validation and test pairs with image embeddings, and the skipped training rows.

    Raises:
        ValueError: If data or model are invalid, more than `args.max_bad_share` of the training rows can't be used, or
            too few pairs are left for a batch.
    """
    # The data are opened before a model is loaded, so that missing data, the most common error, is reported at once.
    splits = _open_and_check_splits(args)
    processor = load_processor(args.model)
    base = load_model(args.model)
    # This call checks the regular expressions of --frozen_parameters and --lora_targets before any long work. It
    # changes the model that it gets, so it gets a separate copy of the base model.
    freeze_parameters_and_add_adapters(load_model(args.model), args)
    base.to(accelerator.device).eval()
    for split in splits.values():
        if split.is_embedded:
            split.check_embeds(args.model, two_towers.embedding_width(base.config), views=split.embeds_shape[0])

    def load_evaluation(split: str, language: str) -> PairDataset:
        opened = splits[args.evaluation_dataset, split]
        return load_evaluation_pairs(opened, _get_caption_column(args, language), processor)

    validation = load_evaluation(args.validation_split, args.language)
    test = {language: load_evaluation(args.test_split, language) for language in args.eval_languages}
    training = load_training_pairs(args, splits, processor)
    # If too many rows can't be used, this call raises an error now, before the images are embedded. Its result is not
    # needed yet.
    _split_usable_and_skipped_pairs(training, args)

    def with_vectors(pairs: PairDataset, uses_cache: bool = args.image_embedding_cache != "off") -> PairDataset:
        if pairs.source.is_embedded:
            return _add_stored_embeddings_column(pairs)
        return embed_images_into_column(base, pairs, args, accelerator) if uses_cache else pairs

    def load_embeds(pairs: PairDataset, title: str) -> Tensor:
        if pairs.vectors is None:
            return two_towers.embed_images(base, processor, pairs, args.embedding_batch_size, title)
        _check_no_bad_rows(pairs)
        return torch.from_numpy(vectors_to_array(pairs.table.data.column("vectors")).astype(np.float32))

    # The cache stores embeddings rounded to float16. The test images are embedded without the cache, so that the
    # results of the final evaluation have no such rounding errors.
    test_embeds = load_embeds(with_vectors(test[args.language], uses_cache=False), "Images, test")
    validation = with_vectors(validation)
    validation_embeds = load_embeds(validation, "Images, validation")
    training, skipped = _split_usable_and_skipped_pairs(list(map(with_vectors, training)), args)
    digest = weights_digest(base)
    return TrainingInputs(processor, training, validation, validation_embeds, test, test_embeds, skipped, digest)


def _split_usable_and_skipped_pairs(
    training: list[PairDataset], args: RunArguments
) -> tuple[list[PairDataset], list[SkippedRow]]:
    """Divide the rows of the training datasets into usable pairs and skipped rows.

    Args:
        training: All pairs of each training dataset.
        args: Arguments of the run.

    Returns:
        The datasets with only their usable pairs, and the skipped rows of all datasets with reasons.

    Raises:
        ValueError: If more than `args.max_bad_share` of the rows can't be used, or too few pairs are left for a batch.
    """
    usable = [replace(pairs, table=filter_usable_rows(pairs.table)) for pairs in training]
    skipped = [row for pairs in training for row in list_skipped_rows_and_damaged_archives(pairs.table, pairs.source)]
    check_bad_share(skipped, sum(map(len, usable)) + len(skipped), args.max_bad_share)
    apportion_batch_to_datasets(args.effective_batch_size, list(map(len, usable)))
    return usable, skipped


def _open_and_check_splits(args: RunArguments) -> Splits:
    """Open each dataset split that the run uses, and check that it has the required columns. No image is read.

    Args:
        args: Arguments of the run.

    Returns:
        A dict `{(dataset, split name): opened split}`.

    Raises:
        ValueError: If a split or column is missing, or there are too few rows for a batch. The message about a missing
            split or column names the flags that choose splits and columns.
    """
    train_columns = _list_training_caption_columns(args)
    requested = [(name, args.train_split, train_columns, args.augmented_views) for name in args.dataset]
    evaluated = [(args.validation_split, args.language), *((args.test_split, code) for code in args.eval_languages)]
    requested += [(args.evaluation_dataset, split, [_get_caption_column(args, code)], 1) for split, code in evaluated]
    splits: Splits = {}
    for dataset, split, columns, views in requested:
        try:
            if (dataset, split) not in splits:
                splits[dataset, split] = open_split(dataset, split, args.image_column, **args.image_options())
            opened = splits[dataset, split]
            opened.check_columns([opened.image_column, *find_missing_columns(columns, opened.columns)])
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}. {DATA_FLAGS_HINT}") from error
        if opened.is_embedded:
            opened.check_views(views)
    training = [splits[name, args.train_split] for name in args.dataset]
    if args.image_embedding_cache == "off" and len({split.is_embedded for split in training}) > 1:
        raise ValueError(
            "With image_embedding_cache off, datasets with images and datasets with embeddings can't be mixed. Use "
            "--image_embedding_cache auto."
        )
    if sum(map(len, training)) < args.effective_batch_size:
        # There are fewer rows than pairs in a batch. This call raises an error whose message says how large a batch can
        # be. It reads all rows to count the usable pairs, which is quick for so few rows.
        _split_usable_and_skipped_pairs(load_training_pairs(args, splits, None), args)
    apportion_batch_to_datasets(args.effective_batch_size, list(map(len, training)))
    return splits


def _list_training_caption_columns(args: RunArguments) -> list[str]:
    """Return the names of the columns that are needed to choose the training captions.

    They are the caption columns, and the column with similarities between captions and image if `caption_strategy` or
    `min_pair_similarity` needs it.
    """
    _, *others = args.strategy_columns(args.language)
    similarities = [] if args.min_pair_similarity is None else [f"similarities-{args.language}"]
    return list(dict.fromkeys([_get_caption_column(args, args.language), *others, *similarities]))


def load_training_pairs(args: RunArguments, splits: Splits, processor: ProcessorMixin | None) -> list[PairDataset]:
    """Load all rows of every training dataset, and choose the captions to train on.

    Args:
        args: Arguments of the run.
        splits: The opened dataset splits, as a dict `{(dataset, split name): split}`.
        processor: Processor of the model. None is enough to count the pairs.

    Returns:
        One dataset for each name in `args.dataset`. Rows that can't be used are included; their column `reason` says
        why.
    """
    columns = _list_training_caption_columns(args)
    caption_column, standard_column = _get_caption_column(args, args.language), f"captions-{args.language}"
    choice = ("caption_strategy", "caption_count", "min_similarity", "min_pair_similarity")
    settings = {name: getattr(args, name) for name in ("language", "caption_column", *choice)}

    def choose(row: dict) -> list[str]:
        return args.choose_captions(row | {standard_column: row[caption_column]}, args.language)

    datasets = []
    for name in args.dataset:
        split = splits[name, args.train_split]
        table = load_or_build_pair_table(split, columns, choose, settings)
        datasets.append(PairDataset(split, table, processor, args.augmented_views, args.seed))
    return datasets


def load_evaluation_pairs(split: Split, caption_column: str, processor: ProcessorMixin | None) -> PairDataset:
    """Load the images and captions of a validation or test split, in one language.

    Args:
        split: The opened split.
        caption_column: Name of the column with the captions.
        processor: Processor of the model. If it is None, images can be decoded but not preprocessed for the model.

    Returns:
        One pair for each row of the split: its image and its captions.

    Raises:
        ValueError: If a row can't be used, because skipping it would change the results. The message names the row.
    """
    choose = partial(_get_nonempty_captions, caption_column)
    table = load_or_build_pair_table(split, [caption_column], choose, {"whole": caption_column})
    pairs = PairDataset(split, table, processor)
    _check_no_bad_rows(pairs)
    return pairs


def _get_caption_column(args: RunArguments, language: str) -> str:
    """Return the name of the column that holds the captions of a language.

    Args:
        args: Arguments of the run. The text "{language}" in `args.caption_column` stands for the language code.
        language: Language code, such as "pt".
    """
    return args.caption_column.replace("{language}", language)


def _get_nonempty_captions(column: str, row: dict) -> list[str]:
    """Return all captions in a column of a row. Raises ValueError if a caption is empty or not a text."""
    texts = row[column]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        # The caller adds the number of the row to this message.
        raise ValueError(f"a caption is empty or not a text: {texts!r}")
    return texts


def _check_no_bad_rows(pairs: PairDataset) -> None:
    """Raise ValueError if an evaluation split has a row that can't be used. The message names the first such row."""
    for skipped in list_skipped_rows_and_damaged_archives(pairs.table, pairs.source):
        raise _bad_row_error(pairs.source, skipped.row, skipped.reason, skipped.detail)


def _bad_row_error(split: Split, row: int, reason: str, detail: str) -> ValueError:
    """Create the error for a row of an evaluation split that can't be used.

    Args:
        split: The evaluation split.
        row: Number of the row.
        reason: Short reason, such as "unreadable image".
        detail: Further information for the user, such as the message of the image decoder.
    """
    return ValueError(
        f"{split.display_name}: row {row} can't be used, {reason} ({detail}). Every row of an evaluation split must be "
        "usable. Repair the row, or remove it."
    )


def read_cached_step_image_embeds(training: list[PairDataset], plan: StepPlan) -> Tensor:
    """Read the image embeddings of one training step, which were computed before training.

    Args:
        training: Training datasets, whose tables have the embeddings in the column `vectors`.
        plan: Plan of the step, which says for each pair its dataset, its row and the view (version) of its image.

    Returns:
        Embeddings in the order of the plan, (pairs, width), float32.
    """
    places_by_dataset = [np.flatnonzero(plan.dataset_indices == number) for number in range(len(training))]
    embeds = []
    for pairs, places in zip(training, places_by_dataset, strict=True):
        vectors = vectors_to_array(pairs.vectors[plan.rows[places]]["vectors"])
        vectors = vectors.reshape(len(places), pairs.augmented_views, -1)
        embeds.append(vectors[np.arange(len(places)), plan.views[places]])
    plan_order = np.argsort(np.concatenate(places_by_dataset))
    return torch.from_numpy(np.concatenate(embeds)[plan_order].astype(np.float32))


@dataclass
class _ViewDataset:
    """Dataset for PyTorch's `DataLoader` that loads, augments and preprocesses training images.

    The index of an item is the tuple (dataset index, number of the pair, number of the image's augmented version). If
    an image can't be used, the item is a `BadImage`.
    """

    training: list[PairDataset]  # training datasets

    def __getitem__(self, item: tuple[int, int, int]) -> Tensor | BadImage:
        number, pair, view = map(int, item)
        return self.training[number].load_pixels(pair, view)


def prefetch_pixels(
    training: list[PairDataset], items: Iterable[list[tuple[int, int, int]]], workers: int
) -> Iterator[list[Tensor | BadImage]]:
    """Load and preprocess images in worker processes, several batches ahead of their use.

    Args:
        training: Training datasets.
        items: Batches of images, as lists of tuples (dataset index, number of the pair, number of the image's augmented
            version).
        workers: Number of worker processes. With 0, this process loads each batch when it is needed.

    Returns:
        An iterator over the batches. For each image, a batch has the pixels, (3, height, width), or a `BadImage` if it
        can't be used.
    """
    # Workers are started with "spawn". A forked process would inherit the locks of torch's threads and could wait for
    # them forever.
    options = {"multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
    dataset = _ViewDataset(training)
    return iter(DataLoader(dataset, batch_sampler=items, num_workers=workers, collate_fn=list, **options))


@torch.no_grad()
def embed_pixels(
    model: PreTrainedModel,
    pixels: Tensor,
    accelerator: Accelerator,
    chunk_images: int = CHUNK_SIZES[0],
    use_autocast: bool = True,
) -> Tensor:
    """Embed images with the frozen image encoder, by default in the precision of the run.

    Args:
        model: The model.
        pixels: Preprocessed images, (images, 3, height, width).
        accelerator: Device and precision of the run.
        chunk_images: Number of images per forward pass on a CPU.
        use_autocast: False: use float32 instead of the precision of the run.

    Returns:
        Embeddings of unit length, (images, width), float32, on the device of the run.

    Raises:
        ValueError: If an embedding is not finite.
    """
    with accelerator.autocast() if use_autocast else nullcontext():
        embeds = two_towers.compute_image_embeds_in_chunks(model, pixels, accelerator.device, chunk_images)
        return two_towers.check_finite(embeds)


def _add_stored_embeddings_column(pairs: PairDataset) -> PairDataset:
    """Add the column `vectors` for a dataset that has embeddings instead of images. The embeddings stay on disk.

    Args:
        pairs: Dataset with all rows, including unusable rows.

    Returns:
        A copy of the dataset with the new column. Its `augmented_views` is the number of views in the dataset.
    """
    data = pairs.source.data.select_columns(EMBEDS_COLUMN)
    # If only some rows of a `datasets.Dataset` are selected, its attribute `_indices` lists them, but `data.data` still
    # has all rows. The embeddings of the selected rows are then copied.
    if data._indices is not None:
        data = data.flatten_indices()
    table = pairs.table.data.table.append_column("vectors", data.data.column(EMBEDS_COLUMN))
    fingerprint = json_digest([data._fingerprint, pairs.table._fingerprint])
    return replace(pairs, table=Dataset(table, fingerprint=fingerprint), augmented_views=pairs.source.embeds_shape[0])


def open_image_embedding_store(
    model: PreTrainedModel, pairs: PairDataset, args: RunArguments, precision: str
) -> EmbeddingStore:
    """Open the folder on disk that caches the image embeddings of a dataset.

    Each model, precision and kind of augmentation has its own folder, so that embeddings are never mixed up.

    Args:
        model: Model whose image tower is frozen and in evaluation mode.
        pairs: Dataset whose images are embedded.
        args: Arguments of the run. `image_embedding_cache` selects the parent folder.
        precision: Mixed precision, as named by Accelerate ("no", "bf16" or "fp16"). "auto": no embeddings, only a
            record of the chosen precision.

    Returns:
        An interface to the folder. It finds embeddings by the digests of the images.
    """
    settings = {
        "pixels_version": PIXELS_VERSION,
        "encoder": two_towers.image_encoder_fingerprint(model, pairs.processor, precision),
        "augmented_views": pairs.augmented_views,
        "augmentation": describe_augmentation(pairs.seed) if pairs.augmented_views != 1 else None,
        "precision": precision,
    }
    is_default = args.image_embedding_cache in ("auto", "off")
    root = cache_home() / "image_embeddings" if is_default else Path(args.image_embedding_cache)
    return EmbeddingStore(root, settings, args.embedding_batch_size, np.float16)


def _choose_embedding_precision(
    model: PreTrainedModel, pairs: PairDataset, args: RunArguments, accelerator: Accelerator
) -> str:
    """Choose the precision in which the images of a dataset are embedded. It is the same in all processes.

    Args:
        model: Model whose image tower is frozen and in evaluation mode.
        pairs: Dataset whose images are embedded.
        args: Arguments of the run.
        accelerator: Device, precision and processes of the run.

    Returns:
        Accelerate's name of the precision, normally that of the run. With `--mixed_precision auto` and many images,
        "bf16" changes to "no" (float32) if that is faster.
    """
    precision = accelerator.mixed_precision
    is_short = len(pairs) * pairs.augmented_views < LONG_PASS_IMAGES
    if precision != "bf16" or not args.has_auto_precision or is_short:
        return precision
    record = open_image_embedding_store(model, pairs, args, "auto").record_folder(pairs.table["digest"])
    # The main process chooses first and records its choice. The other processes then read it, so that all agree.
    with accelerator.main_process_first():
        choice = two_towers.choose_fastest_precision(model, pairs.processor, record)
    return "no" if choice == "float32" else precision


def embed_images_into_column(
    model: PreTrainedModel, pairs: PairDataset, args: RunArguments, accelerator: Accelerator
) -> PairDataset:
    """Add the image embeddings of a dataset to its table, as the column `vectors`.

    Embeddings are read from the cache on disk. Missing embeddings are computed; each process computes a share of them.

    Args:
        model: Model whose image tower is frozen and in evaluation mode.
        pairs: Dataset with all rows, including unusable rows.
        args: Arguments of the run.
        accelerator: Device, precision and processes of the run.

    Returns:
        A copy of the dataset with the new column. Rows whose image can't be used get a `reason` and a `detail`.
    """
    precision = _choose_embedding_precision(model, pairs, args, accelerator)
    store, views = open_image_embedding_store(model, pairs, args, precision), pairs.augmented_views
    if accelerator.is_main_process:
        size = len(pairs) * views * two_towers.embedding_width(model.config) * 2 / 1e6
        logger.info(f"Image-embedding cache: {len(pairs):,} images x {views} views, {size:,.1f} MB in {store.folder}.")

    def load(batches: Iterator[list[Place]]) -> Iterator[list[Tensor | BadImage]]:
        items = ([(0, *place) for place in batch] for batch in batches)
        return prefetch_pixels([pairs], items, resolve_loading_workers(args, accelerator.device))

    def embed(images: list[Tensor], chunk_images: int = CHUNK_SIZES[0]) -> np.ndarray:
        return embed_pixels(model, torch.stack(images), accelerator, chunk_images, precision != "no").cpu().numpy()

    title, digests = f"Images, {pairs.source.display_name}", pairs.table["digest"]
    encoder = store.settings["encoder"]
    embed = with_tuned_chunk_size(embed, len(pairs) * views, accelerator.device, encoder, store.record_folder(digests))
    cached = store.load_or_embed(digests, load, embed, title, rows_per_shard=SHARD_ROWS, views=views)
    table = pairs.table.data.table
    # For each row, the table of pairs and the table of embeddings both have a text that says why the row can't be used.
    # At least one of the two texts is empty, so joining them keeps the reason.
    for name in ("reason", "detail"):
        joined = pc.binary_join_element_wise(table[name], cached[name], "")
        table = table.set_column(table.column_names.index(name), name, joined)
    fingerprint = json_digest([store.folder.name, pairs.table._fingerprint])
    return replace(pairs, table=Dataset(table.append_column("vectors", cached["vectors"]), fingerprint=fingerprint))
