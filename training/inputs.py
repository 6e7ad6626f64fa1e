"""Load what a training run needs: datasets, model, and the embeddings or pixels of the images.

`load_inputs` does quick checks first, so that wrong arguments fail before long work starts. A view of an image is what
the model sees of the image at a training step. The setting `augmented_views` selects the views: 1 is the image itself;
V above 1 is V augmentations of the image that stay the same during the whole run; 0 is a new augmentation at every
step, as in the paper (arXiv 2310.13683). If `augmented_views` is at least 1, the frozen image tower can embed every
view once, and the embeddings are cached on disk.
"""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from capivara_common.environment import cache_home
from capivara_common.files import write_json
from capivara_common.image_files import BadImage, to_8_bit
from capivara_common.tasks import split_rows
from caption_data.pairs import (
    build_pair_table,
    check_bad_share,
    drop_invalid,
    list_skipped_rows,
    missing_columns,
    pairs_fingerprint,
)
from caption_data.rows import SkippedRow, json_digest
from caption_data.sources import Split, open_split
from eval.embeddings import EMBEDDING_FORMAT_VERSION, BadRows, EmbeddingCache, vectors_to_array
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import (
    IMAGE_ENCODER_PREFIXES,
    check_finite,
    compute_image_embeds,
    embed_images,
    embedding_width,
    split_for_device,
)
from training.arguments import RunArguments
from training.batches import BatchPlanner, StepPlan, apportion_batch, derive_seed
from training.trainable import prepare_trainable

PIXELS_VERSION = 1  # part of the cache key; increase it when preprocessing or augmentation changes the pixels
AUGMENTATION = {"resize": 250, "crop": 224, "scale": [0.9, 1.0], "augmix_severity": 2}  # arXiv 2310.13683, section 4
SHARD_ROWS = 2048  # images per file of the cache; a process that is killed loses at most one unfinished file
logger = logging.getLogger("capivara")
DATA_FLAGS_HINT = (
    "--dataset and --train_split choose the training data; --evaluation_dataset, --validation_split and --test_split "
    "the evaluation data; --image_column, --caption_column, --language and --eval_languages the columns. Without "
    "similarities, use --caption_strategy none --min_pair_similarity null."
)
Splits = dict[tuple[str, str], Split]  # (dataset, split name) -> opened split


@dataclass
class PairDataset:
    """Pairs of one dataset split, each an image with its captions. Indexing with a pair's number decodes its image."""

    source: Split  # the opened split, which reads and decodes images
    # One row for each pair. `row` is its row number in the split, `digest` identifies the image, and `captions` is a
    # list of texts. `reason` and `detail` say why the pair can't be used; they are empty for usable pairs. With an
    # embedding cache, the column `vectors` has the embeddings of all views, (views x width,), float16.
    table: Dataset
    processor: ProcessorMixin | None  # processor of the model; None if pairs are only counted
    # Views of every image. 1: the image itself. V above 1: V augmentations that stay the same during the whole run. 0:
    # a new augmentation at every step.
    augmented_views: int = 1
    seed: int = 0  # seed of the augmentation

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, pair: int) -> PIL.Image.Image:
        """Decode the image of a pair. Only for evaluation splits, because an unusable image is an error.

        Raises:
            ValueError: If the image can't be used. The message names the row.
        """
        row = self.table[pair]["row"]
        try:
            return self.source.load_image(row)
        except BadImage as bad:
            raise _bad_row_error(self.source, row, bad.reason, bad.detail) from bad

    def captions(self) -> list[list[str]]:
        """Return a list with the captions of each pair."""
        return self.table["captions"][:]

    def load_pixels(self, pair: int, view: int) -> Tensor:
        """Load a view of an image, and preprocess it for the model.

        The random augmentation depends on the digest of the image instead of the number of its pair, because this
        number changes when other rows are skipped.

        Args:
            pair: Number of the pair in this dataset.
            view: Number of the view; ignored if `augmented_views` is 1.

        Returns:
            Pixels, (3, height, width).

        Raises:
            BadImage: If the image can't be decoded, or the processor rejects it.
        """
        image = self.source.load_image(self.table[pair]["row"])
        try:
            if self.augmented_views != 1:
                image = to_8_bit(image)  # PIL's conversion to RGB would clip 16-bit images instead of scaling them
                image = augment_image(image, derive_seed(self.seed, int(self.table[pair]["digest"], 16), view))
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise BadImage("unreadable image", str(error)) from error

    @cached_property
    def vectors(self) -> Dataset | None:
        """Cached image embeddings: column `vectors` of the table, in Arrow format. None without an embedding cache."""
        names = self.table.column_names
        return self.table.select_columns("vectors").with_format("arrow") if "vectors" in names else None


@dataclass
class TrainingInputs:
    """Data and image embeddings that a training run needs."""

    processor: ProcessorMixin  # processor of the base model
    training: list[PairDataset]  # usable pairs of each training dataset
    validation: PairDataset  # validation split, which is evaluated during training
    validation_embeds: Tensor  # image embeddings of the validation split, (images, width)
    test: dict[str, PairDataset]  # language code -> test split with captions in this language, for the final evaluation
    test_embeds: Tensor  # image embeddings of the test split, (images, width), float32
    skipped: list[SkippedRow]  # training rows that can't be used
    base_digest: str  # digest of the base model's weights

    def make_planner(self, args: RunArguments) -> BatchPlanner:
        """Return the planner that selects the pairs, captions and image views for every step of the run."""
        captions = [pairs.table["captions"] for pairs in self.training]
        counts = apportion_batch(args.effective_batch_size, list(map(len, self.training)))
        # A copy, because the planner runs in a thread, and a tokenizer stores padding and length of its last call.
        processor = copy.deepcopy(self.processor)
        return BatchPlanner(captions, counts, processor, args.micro_batch_size, args.augmented_views, args.seed)

    def fingerprints(self, args: RunArguments) -> dict[str, str]:
        """Return the fingerprints of base model and data, which are compared when a run is resumed.

        Returns:
            Dict: name -> fingerprint. The names are "base model", "DATASET SPLIT" for the training and validation
            splits, and "DATASET SPLIT LANGUAGE" for the test split.
        """
        tables = {f"{pairs.source.name} {args.train_split}": pairs.table for pairs in self.training}
        tables[f"{args.evaluation_dataset} {args.validation_split}"] = self.validation.table
        for code, pairs in self.test.items():
            tables[f"{args.evaluation_dataset} {args.test_split} {code}"] = pairs.table
        return {"base model": self.base_digest} | {name: pairs_fingerprint(table) for name, table in tables.items()}


def load_inputs(args: RunArguments, accelerator: Accelerator) -> TrainingInputs:
    """Load the data and the image embeddings of a training run. Embeddings that are not cached are computed.

    Args:
        args: Arguments of the run.
        accelerator: Device, precision and processes of the run.

    Returns:
        The usable training pairs, the validation and test pairs with image embeddings, and the skipped training rows.

    Raises:
        ValueError: If data, columns or model are missing or invalid, or the usable pairs do not fill a batch.
    """
    splits = open_splits(args)  # before a model is loaded, because missing data is the most common error
    cache = args.image_embedding_cache
    root = cache_home() / "image_embeddings" if cache in ("auto", "off") else Path(cache)
    processor = load_processor(args.model)
    base = load_model(args.model)
    # Checks the regular expressions of --frozen_parameters and --lora_targets before any long work.
    prepare_trainable(load_model(args.model), args)
    base.to(accelerator.device).eval()
    validation_split = splits[args.evaluation_dataset, args.validation_split]
    test_split = splits[args.evaluation_dataset, args.test_split]
    validation = load_evaluation_pairs(args, validation_split, [args.language], processor)[args.language]
    test = load_evaluation_pairs(args, test_split, args.eval_languages, processor)
    training = load_training_pairs(args, splits, processor)
    drop_invalid_pairs(training, args)  # fails early if there are too many bad rows, before images are embedded
    test_embeds = embed_images(base, processor, test[args.language], args.embedding_batch_size, "Images, test")

    def embed_with_cache(pairs: PairDataset) -> PairDataset:
        workers = resolve_loading_workers(args, accelerator)
        return add_vectors(base, pairs, root, args.embedding_batch_size, workers, accelerator)

    if args.image_embedding_cache == "off":
        vectors = embed_images(base, processor, validation, args.embedding_batch_size, "Images, validation")
    else:
        validation = embed_with_cache(validation)
        _check_no_bad_rows(validation)
        vectors = torch.from_numpy(vectors_to_array(validation.table.data.table).astype(np.float32))
        training = list(map(embed_with_cache, training))
    training, skipped = drop_invalid_pairs(training, args)
    return TrainingInputs(
        processor=processor,
        training=training,
        validation=validation,
        validation_embeds=vectors,
        test=test,
        test_embeds=test_embeds,
        skipped=skipped,
        base_digest=weights_digest(base),
    )


def drop_invalid_pairs(training: list[PairDataset], args: RunArguments) -> tuple[list[PairDataset], list[SkippedRow]]:
    """Divide the rows of the training datasets into usable pairs and skipped rows.

    Args:
        training: All pairs of each training dataset.
        args: Arguments of the run.

    Returns:
        The datasets with only their usable pairs, and the skipped rows of all datasets with reasons.

    Raises:
        ValueError: If more than `args.max_bad_share` of the rows can't be used, or too few pairs are left for a batch.
    """
    usable = [replace(pairs, table=drop_invalid(pairs.table)) for pairs in training]
    skipped = [row for pairs in training for row in list_skipped_rows(pairs.table, pairs.source)]
    check_bad_share(skipped, sum(map(len, usable)) + len(skipped), args.max_bad_share)
    apportion_batch(args.effective_batch_size, list(map(len, usable)))
    return usable, skipped


def open_splits(args: RunArguments) -> Splits:
    """Open each dataset split that the run uses, and check that it has the required columns. No image is read.

    Args:
        args: Arguments of the run.

    Returns:
        (dataset, split name) -> opened split.

    Raises:
        ValueError: If a split or column is missing, or there are too few rows for a batch. The message about a missing
            split or column names the flags that choose splits and columns.
    """
    requested = [(name, args.train_split, _training_columns(args)) for name in args.dataset]
    evaluated = [(args.validation_split, args.language), *((args.test_split, code) for code in args.eval_languages)]
    requested += [(args.evaluation_dataset, split, [get_caption_column(args, code)]) for split, code in evaluated]
    splits: Splits = {}
    for dataset, split, columns in requested:
        try:
            if (dataset, split) not in splits:
                splits[dataset, split] = open_split(dataset, split, args.image_column, **args.image_options())
            opened = splits[dataset, split]
            opened.check_columns([args.image_column, *missing_columns(columns, opened.columns)])
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}. {DATA_FLAGS_HINT}") from error
    sizes = [len(splits[name, args.train_split]) for name in args.dataset]
    if sum(sizes) < args.effective_batch_size:
        # `drop_invalid_pairs` raises an error here. Its message names the largest possible batch, for which all rows
        # are read. This is quick, because there are fewer rows than one batch has pairs.
        drop_invalid_pairs(load_training_pairs(args, splits), args)
    apportion_batch(args.effective_batch_size, sizes)
    return splits


def _training_columns(args: RunArguments) -> list[str]:
    """Return the names of the columns from which the training captions are chosen.

    They are the caption columns, and the column of similarities if the strategy or the pair filter reads it.
    """
    _, *others = args.strategy_columns(args.language)
    similarities = [] if args.min_pair_similarity is None else [f"similarities-{args.language}"]
    return list(dict.fromkeys([get_caption_column(args, args.language), *others, *similarities]))


def load_training_pairs(
    args: RunArguments, splits: Splits, processor: ProcessorMixin | None = None
) -> list[PairDataset]:
    """Load all rows of every training dataset, and choose the captions to train on.

    Args:
        args: Arguments of the run.
        splits: Opened splits, see `open_splits`.
        processor: Processor of the model. If it is None, the pairs can be counted but not trained on.

    Returns:
        The datasets in the order of `args.dataset`. They still contain unusable rows, see `drop_invalid_pairs`.
    """
    columns = _training_columns(args)
    caption_column, standard_column = get_caption_column(args, args.language), f"captions-{args.language}"
    choice = ("caption_strategy", "caption_count", "min_similarity", "min_pair_similarity")
    settings = {name: getattr(args, name) for name in ("language", "caption_column", *choice)}

    def choose(row: dict) -> list[str]:
        return args.choose_captions(row | {standard_column: row[caption_column]}, args.language)

    datasets = []
    for name in args.dataset:
        split = splits[name, args.train_split]
        table = build_pair_table(split, columns, choose, settings)
        datasets.append(PairDataset(split, table, processor, args.augmented_views, args.seed))
    return datasets


def load_evaluation_pairs(
    args: RunArguments, split: Split, languages: list[str], processor: ProcessorMixin
) -> dict[str, PairDataset]:
    """Load the pairs of an evaluation split. Every row must be usable, because skipping rows would change the results.

    Args:
        args: Arguments of the run.
        split: Opened validation or test split.
        languages: Codes of the caption languages.
        processor: Processor of the model.

    Returns:
        Language code -> pairs with the captions of that language.

    Raises:
        ValueError: If a row can't be used; the message names the row.
    """
    pairs = {}
    for language in languages:
        column = get_caption_column(args, language)
        table = build_pair_table(split, [column], lambda row, c=column: _check_complete(row[c]), {"whole": column})
        pairs[language] = PairDataset(split, table, processor, seed=args.seed)
        _check_no_bad_rows(pairs[language])
    return pairs


def get_caption_column(args: RunArguments, language: str) -> str:
    """Return the name of the column that holds the captions of a language.

    Args:
        args: Arguments of the run. In `args.caption_column`, {language} is replaced by the language code.
        language: Language code, such as "pt".
    """
    return args.caption_column.replace("{language}", language)


def _check_complete(texts: list[str]) -> list[str]:
    """Return the captions of a row unchanged. Raises ValueError if a caption is empty or not a text."""
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"an empty caption in {texts!r}")  # the caller adds the row to the message
    return texts


def _check_no_bad_rows(pairs: PairDataset) -> None:
    """Raise ValueError if an evaluation split has a row that can't be used. The message names the first such row."""
    for skipped in list_skipped_rows(pairs.table, pairs.source):
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


def load_cached_embeds(training: list[PairDataset], plan: StepPlan) -> Tensor:
    """Read the image embeddings of a step from the cache.

    Args:
        training: Training datasets, with the column `vectors`.
        plan: Plan of the step.

    Returns:
        Embeddings in the order of the plan, (pairs, width), float32.
    """
    places_by_dataset = [np.flatnonzero(plan.dataset_indices == number) for number in range(len(training))]
    embeds = []
    for pairs, places in zip(training, places_by_dataset, strict=True):
        vectors = vectors_to_array(pairs.vectors[plan.rows[places]]).reshape(len(places), pairs.augmented_views, -1)
        embeds.append(vectors[np.arange(len(places)), plan.views[places]])
    plan_order = np.argsort(np.concatenate(places_by_dataset))
    return torch.from_numpy(np.concatenate(embeds)[plan_order].astype(np.float32))


@dataclass
class _ViewDataset:
    """Dataset for PyTorch's `DataLoader` that loads and preprocesses views of training images.

    An item is selected by (dataset index, pair, view). If an image can't be used, the item is a `BadImage` object. The
    `BadImage` is not raised, because exceptions lose their attributes on the way out of a worker process.
    """

    training: list[PairDataset]  # training datasets

    def __getitem__(self, item: tuple[int, int, int]) -> Tensor | BadImage:
        number, pair, view = map(int, item)
        try:
            return self.training[number].load_pixels(pair, view)
        except BadImage as bad:
            return bad


def prefetch_pixels(
    training: list[PairDataset], items: Iterable[list[tuple[int, int, int]]], workers: int
) -> Iterator[list[Tensor | BadImage]]:
    """Load and preprocess images in worker processes, several batches ahead of their use.

    Args:
        training: Training datasets.
        items: Batches of images. A batch is a list of tuples: dataset index, number of the pair, number of the view.
        workers: Number of worker processes. With 0, this process loads each batch when it is needed.

    Returns:
        An iterator over the batches. A batch is a list that has for each image the pixels, (3, height, width), or a
        `BadImage` if the image can't be used.
    """
    options = {}
    if workers:  # spawn: a forked process would inherit the locks of torch's threads, and can hang
        options = {"multiprocessing_context": "spawn", "prefetch_factor": 4}
    dataset = _ViewDataset(training)
    return iter(DataLoader(dataset, batch_sampler=items, num_workers=workers, collate_fn=list, **options))


def resolve_loading_workers(args: RunArguments, accelerator: Accelerator) -> int:
    """Return the number of worker processes that decode images.

    It is `args.loading_workers` if this is set. Otherwise, it is 12 on a GPU, but at most the number of CPU cores. On a
    CPU it is 0, which means no worker process, because the model itself needs all cores.
    """
    if args.loading_workers is not None:
        return args.loading_workers
    return 0 if accelerator.device.type == "cpu" else min(12, os.cpu_count() or 1)


def augment_image(image: PIL.Image.Image, seed: int) -> PIL.Image.Image:
    """Augment an image as in CAPIVARA (arXiv 2310.13683), section 4.

    The image is resized to 250 pixels on its shorter side. A random crop with 90 to 100 % of the area is then resized
    to 224 x 224 pixels, and AugMix with severity 2 is applied.

    Args:
        image: Decoded image.
        seed: Seed of all random choices; the same seed gives the same result.

    Returns:
        The augmented image, 224 x 224 pixels, RGB.
    """
    from torchvision.transforms import v2 as transforms

    torch.manual_seed(seed)
    bicubic = transforms.InterpolationMode.BICUBIC
    image = image.convert("LA") if image.mode == "La" else image  # PIL cannot convert La to RGB
    image = transforms.Resize(AUGMENTATION["resize"], bicubic)(image.convert("RGB"))
    image = transforms.RandomResizedCrop(AUGMENTATION["crop"], AUGMENTATION["scale"], interpolation=bicubic)(image)
    return transforms.AugMix(severity=AUGMENTATION["augmix_severity"])(image)


@torch.no_grad()
def embed_pixels(model: PreTrainedModel, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """Embed images with the frozen image encoder, in the precision of the run.

    Args:
        model: The model.
        pixels: Preprocessed images, (images, 3, height, width).
        accelerator: Device and precision of the run.

    Returns:
        Embeddings of unit length, (images, width), float32, on the device of the run.

    Raises:
        ValueError: If an embedding is not finite.
    """
    with accelerator.autocast():
        parts = split_for_device(pixels, accelerator.device)
        return check_finite(torch.cat([compute_image_embeds(model, part) for part in parts]))


def open_image_cache(model: PreTrainedModel, pairs: PairDataset, root: Path, precision: str) -> EmbeddingCache:
    """Open the cache for the image embeddings of a dataset. The cache folder is created if it does not exist.

    The name of the cache folder is a hash of all data and settings that affect the embeddings, so a cache is never out
    of date.

    Args:
        model: Model whose image tower is frozen and in evaluation mode.
        pairs: Dataset with all rows, including unusable rows.
        root: Folder that holds all caches.
        precision: Mixed precision, as named by Accelerate: "no", "bf16" or "fp16".

    Returns:
        The cache, with one shard for every `SHARD_ROWS` images.
    """
    images = hashlib.blake2b(digest_size=16)
    for chunk in pairs.table.select_columns(["digest"]).iter(10_000):
        images.update("".join(digest or "-" for digest in chunk["digest"]).encode())
    parts = {
        "version": PIXELS_VERSION,
        "files": EMBEDDING_FORMAT_VERSION,
        "tower_weights": weights_digest(model, IMAGE_ENCODER_PREFIXES),
        "tower_config": hashlib.blake2b(model.config.vision_config.to_json_string().encode()).hexdigest()[:32],
        "preprocessing": json.loads(pairs.processor.image_processor.to_json_string()),
        "augmented_views": pairs.augmented_views,
        "augmentation": None if pairs.augmented_views == 1 else AUGMENTATION | {"torchvision": version("torchvision")},
        "seed": pairs.seed,
        "precision": precision,
        "images": images.hexdigest(),
    }
    cache = EmbeddingCache(root / json_digest(parts, sort_keys=True), split_rows(len(pairs), SHARD_ROWS))
    if not (cache.folder / "cache.json").exists():
        write_json(cache.folder / "cache.json", parts)
    return cache


def add_vectors(
    model: PreTrainedModel, pairs: PairDataset, root: Path, batch_size: int, workers: int, accelerator: Accelerator
) -> PairDataset:
    """Add the column `vectors` with image embeddings to a dataset, and mark rows with unreadable images as unusable.

    The embeddings are read from the cache. If embeddings are missing, all processes compute a share of them.

    Args:
        model: Model whose image tower is frozen and in evaluation mode.
        pairs: Dataset with all rows, including unusable rows.
        root: Folder that holds all caches.
        batch_size: Images that go through the image tower together.
        workers: Processes that decode images.
        accelerator: Device, precision and processes of the run.

    Returns:
        A copy of the dataset with the new column. Rows with unusable images have a `reason` and a `detail`.
    """
    cache = open_image_cache(model, pairs, root, accelerator.mixed_precision)
    views, width = pairs.augmented_views, embedding_width(model.config)
    missing, is_usable = cache.find_missing(), np.asarray(pc.equal(pairs.table.data.column("reason"), ""))
    if missing and accelerator.is_main_process:
        size = len(pairs) * views * width * 2 / 1e6
        logger.info(f"Image-embedding cache: {len(pairs):,} images x {views} views, {size:,.1f} MB in {cache.folder}.")

    def batches_of(part: range) -> list[list[tuple[int, int, int]]]:
        items = [(0, pair, view) for pair in part if is_usable[pair] for view in range(views)]
        return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]

    def embed_shards(numbers: list[int]) -> Iterator[tuple[np.ndarray, BadRows]]:
        local_shards = [cache.shards[number] for number in numbers]
        # One set of workers for all shards, because starting worker processes takes seconds.
        loaded = prefetch_pixels([pairs], (batch for part in local_shards for batch in batches_of(part)), workers)
        bar = {
            "desc": f"Images, {pairs.source.display_name}",
            "unit": "image",
            "disable": not accelerator.is_main_process,
        }
        with tqdm(total=sum(map(len, local_shards)), **bar) as progress:
            for part in local_shards:
                embeds = np.zeros((len(part), views, width), dtype=np.float16)
                bad = {place: ("", "") for place, pair in enumerate(part) if not is_usable[pair]}
                for batch, images in zip(batches_of(part), loaded, strict=False):
                    usable = []
                    for (_, pair, view), image in zip(batch, images, strict=True):
                        if isinstance(image, BadImage):
                            bad[pair - part.start] = image.reason, image.detail
                        else:
                            usable.append((pair - part.start, view, image))
                    if usable:
                        places, numbers_of_views, images = map(list, zip(*usable, strict=True))
                        vectors = embed_pixels(model, torch.stack(images), accelerator)
                        embeds[places, numbers_of_views] = vectors.half().cpu().numpy()
                    progress.update(len(batch) / views)
                yield embeds, bad

    cache.make_shards(missing, embed_shards)
    cached, table = cache.load_table(), pairs.table.data.table
    # A row has a reason in at most one of the two tables, so joining the texts keeps this reason.
    for name in ("reason", "detail"):
        joined = pc.binary_join_element_wise(table[name], cached[name], "")
        table = table.set_column(table.column_names.index(name), name, joined)
    table = Dataset(table.append_column("vectors", cached["vectors"]), fingerprint=cache.folder.name)
    return replace(pairs, table=table)
