"""What a run starts from: data sets, model, pairs with their images; what is quick to fail comes first.

A view of an image is the image as it is (`augmented_views` 1), one of V fixed augmentations (V over 1), or a fresh
augmentation at every step (0), as in the paper. The frozen image tower's vectors of fixed views are made once.
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

PIXELS_VERSION = 1  # raise it when preprocessing or augmentation changes what an image becomes
AUGMENTATION = {"resize": 250, "crop": 224, "scale": [0.9, 1.0], "augmix_severity": 2}  # arXiv 2310.13683, section 4
SHARD_ROWS = 2048  # images of one file of the cache: what a kill can lose
logger = logging.getLogger("capivara")
DATA_FLAGS_HINT = (
    "--dataset and --train_split name what is trained on; --evaluation_dataset, --validation_split, --test_split what "
    "is measured on; --image_column, --caption_column, --language and --eval_languages the columns; --caption_strategy "
    "none --min_pair_similarity null do without similarities."
)
Splits = dict[tuple[str, str], Split]  # data set and split -> the rows


@dataclass
class PairDataset:
    """The pairs of one split of one data set, as a sequence of their images: all rows, or the usable ones."""

    source: Split
    table: Dataset  # `row`, `digest` and `captions` of each pair; with a cache `vectors`, (views x width,), float16
    processor: ProcessorMixin | None  # None where pairs are only counted
    augmented_views: int = 1  # see the module's text
    seed: int = 0  # of the augmentation

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, pair: int) -> PIL.Image.Image:
        """The image of a pair that is measured on, decoded. Raises ValueError where it can't be used."""
        row = self.table[pair]["row"]
        try:
            return self.source.load_image(row)
        except BadImage as bad:
            raise _bad_row_error(self.source, row, bad.reason, bad.detail) from bad

    def captions(self) -> list[list[str]]:
        """The captions of each image."""
        return self.table["captions"][:]

    def load_pixels(self, pair: int, view: int) -> Tensor:
        """(3, height, width) of a pair's image in a view. Raises BadImage where it or the processor refuses the image.

        An augmentation depends on the image's digest, not on its pair, whose number changes with the rows left out.
        """
        image = self.source.load_image(self.table[pair]["row"])
        try:
            if self.augmented_views != 1:
                image = to_8_bit(image)  # PIL would clip 16 bits
                image = augment_image(image, derive_seed(self.seed, int(self.table[pair]["digest"], 16), view))
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise BadImage("unreadable image", str(error)) from error

    @cached_property
    def vectors(self) -> Dataset | None:
        """The column `vectors` alone, as Arrow tables; None without a cache."""
        names = self.table.column_names
        return self.table.select_columns("vectors").with_format("arrow") if "vectors" in names else None


@dataclass
class TrainingInputs:
    """What a run starts from."""

    processor: ProcessorMixin
    training: list[PairDataset]  # the usable pairs of each data set
    validation: PairDataset  # that choices are made on
    validation_embeds: Tensor  # (images, width) by the frozen image tower
    test: dict[str, PairDataset]  # language -> the split of the final table
    test_embeds: Tensor  # (images, width) by the base's image tower, float32
    skipped: list[SkippedRow]  # training rows that were left out
    base_digest: str  # of the base's weights

    def make_planner(self, args: RunArguments) -> BatchPlanner:
        """What draws the batches of a run."""
        captions = [pairs.table["captions"] for pairs in self.training]
        counts = apportion_batch(args.effective_batch_size, list(map(len, self.training)))
        # A copy: it plans in a thread, and a tokenizer remembers padding and length from its last call.
        processor = copy.deepcopy(self.processor)
        return BatchPlanner(captions, counts, processor, args.micro_batch_size, args.augmented_views, args.seed)

    def fingerprints(self, args: RunArguments) -> dict[str, str]:
        """Name of a data set and split -> digest of its images and captions."""
        tables = {f"{pairs.source.name} {args.train_split}": pairs.table for pairs in self.training}
        tables[f"{args.evaluation_dataset} {args.validation_split}"] = self.validation.table
        tables |= {f"{args.evaluation_dataset} {args.test_split} {code}": of.table for code, of in self.test.items()}
        return {"base model": self.base_digest} | {name: pairs_fingerprint(table) for name, table in tables.items()}


def load_inputs(args: RunArguments, accelerator: Accelerator) -> TrainingInputs:
    """Everything a run needs. Raises ValueError where anything is missing or bad, or too little for a batch."""
    splits, named = open_splits(args), args.image_embedding_cache  # before a model is loaded
    root = cache_home() / "image_embeddings" if named in ("auto", "off") else Path(named)
    processor = load_processor(args.model)
    base = load_model(args.model)
    prepare_trainable(load_model(args.model), args)  # its names match, before any long work
    base.to(accelerator.device).eval()
    measured = [splits[args.evaluation_dataset, name] for name in (args.validation_split, args.test_split)]
    validation = load_evaluation_pairs(args, measured[0], [args.language], processor)[args.language]
    test = load_evaluation_pairs(args, measured[1], args.eval_languages, processor)
    training = load_training_pairs(args, splits, processor)
    drop_invalid_pairs(training, args)  # before the vectors are made
    test_embeds = embed_images(base, processor, test[args.language], args.embedding_batch_size, "Images, test")

    def cached(pairs: PairDataset) -> PairDataset:
        options = args.embedding_batch_size, resolve_loading_workers(args, accelerator), accelerator
        return add_vectors(base, pairs, root, *options)

    if args.image_embedding_cache == "off":
        vectors = embed_images(base, processor, validation, args.embedding_batch_size, "Images, validation")
    else:
        _check_no_bad_rows(validation := cached(validation))
        vectors = torch.from_numpy(vectors_to_array(validation.table.data.table).astype(np.float32))
        training = list(map(cached, training))
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
    """The usable pairs, and the other rows. Raises ValueError where these are too many, or those too few."""
    good = [replace(pairs, table=drop_invalid(pairs.table)) for pairs in training]
    skipped = [line for pairs in training for line in list_skipped_rows(pairs.table, pairs.source)]
    check_bad_share(skipped, sum(map(len, good)) + len(skipped), args.max_bad_share)
    apportion_batch(args.effective_batch_size, list(map(len, good)))
    return good, skipped


def open_splits(args: RunArguments) -> Splits:
    """All splits that the settings ask for, each opened once; no image is read.

    Raises ValueError, with the flags that name it, where one or a column is missing, or rows are too few for a batch.
    """
    asked = [(name, args.train_split, _training_columns(args)) for name in args.dataset]
    measured = [(args.validation_split, args.language), *((args.test_split, code) for code in args.eval_languages)]
    asked += [(args.evaluation_dataset, split, [get_caption_column(args, code)]) for split, code in measured]
    splits: Splits = {}
    for dataset, split, columns in asked:
        try:
            if (dataset, split) not in splits:
                splits[dataset, split] = open_split(dataset, split, args.image_column, **args.image_options())
            found = splits[dataset, split]
            found.check_columns([args.image_column, *missing_columns(columns, found.columns)])
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}. {DATA_FLAGS_HINT}") from error
    sizes = [len(splits[name, args.train_split]) for name in args.dataset]
    if sum(sizes) < args.effective_batch_size:
        drop_invalid_pairs(
            load_training_pairs(args, splits), args
        )  # raises and names the largest batch: few rows, so it is quick
    apportion_batch(args.effective_batch_size, sizes)
    return splits


def _training_columns(args: RunArguments) -> list[str]:
    """Columns that the captions of a pair are chosen by."""
    _, *others = args.strategy_columns(args.language)
    similarities = [] if args.min_pair_similarity is None else [f"similarities-{args.language}"]
    return list(dict.fromkeys([get_caption_column(args, args.language), *others, *similarities]))


def load_training_pairs(
    args: RunArguments, splits: Splits, processor: ProcessorMixin | None = None
) -> list[PairDataset]:
    """Return all rows of every training dataset. Without a processor the pairs can be counted, not trained on."""
    columns = _training_columns(args)
    column, own = get_caption_column(args, args.language), f"captions-{args.language}"
    choice = ("caption_strategy", "caption_count", "min_similarity", "min_pair_similarity")
    settings = {name: getattr(args, name) for name in ("language", "caption_column", *choice)}
    found = []
    for name in args.dataset:
        split = splits[name, args.train_split]
        choose = lambda row: args.choose_captions(row | {own: row[column]}, args.language)  # noqa: E731
        table = build_pair_table(split, columns, choose, settings)
        found.append(PairDataset(split, table, processor, args.augmented_views, args.seed))
    return found


def load_evaluation_pairs(
    args: RunArguments, split: Split, languages: list[str], processor: ProcessorMixin
) -> dict[str, PairDataset]:
    """Language -> the pairs of a split that is measured on: all its rows, or figures would depend on what is left.

    Raises ValueError, which names it, where a row can't be used.
    """
    found = {}
    for language in languages:
        column = get_caption_column(args, language)
        table = build_pair_table(split, [column], lambda row, c=column: _check_complete(row[c]), {"whole": column})
        found[language] = PairDataset(split, table, processor, seed=args.seed)
        _check_no_bad_rows(found[language])
    return found


def get_caption_column(args: RunArguments, language: str) -> str:
    """The column of the captions in a language."""
    return args.caption_column.replace("{language}", language)


def _check_complete(texts: list[str]) -> list[str]:
    """`texts`. Raises ValueError where one is empty."""
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"an empty caption in {texts!r}")
    return texts


def _check_no_bad_rows(pairs: PairDataset) -> None:
    """Raise ValueError where a row of a split that is measured on can't be used."""
    for line in list_skipped_rows(pairs.table, pairs.source):
        raise _bad_row_error(pairs.source, line.row, line.reason, line.detail)


def _bad_row_error(split: Split, row: int, reason: str, detail: str) -> ValueError:
    return ValueError(
        f"{split.display_name}: row {row} can't be used, {reason} ({detail}). A split that is measured on must be whole; mend "
        "the row, or remove it."
    )


def load_cached_embeds(training: list[PairDataset], plan: StepPlan) -> Tensor:
    """(pairs, width), float32: of the images of a step, whose data sets have caches."""
    places = [np.flatnonzero(plan.dataset_indices == number) for number in range(len(training))]
    found = []
    for pairs, own in zip(training, places, strict=True):
        vectors = vectors_to_array(pairs.vectors[plan.rows[own]]).reshape(len(own), pairs.augmented_views, -1)
        found.append(vectors[np.arange(len(own)), plan.views[own]])
    return torch.from_numpy(np.concatenate(found)[np.argsort(np.concatenate(places))].astype(np.float32))


@dataclass
class _ViewDataset:
    """The views of images, as what a `DataLoader` reads; a bad one as a result, since exceptions lose what they say."""

    training: list[PairDataset]

    def __getitem__(self, item: tuple[int, int, int]) -> Tensor | BadImage:
        number, pair, view = map(int, item)
        try:
            return self.training[number].load_pixels(pair, view)
        except BadImage as bad:
            return bad


def prefetch_pixels(
    training: list[PairDataset], items: Iterable[list[tuple[int, int, int]]], workers: int
) -> Iterator[list[Tensor | BadImage]]:
    """The pixels, or what is wrong with the image, for each list of data set, pair and view, by `workers` processes."""
    # A fork would inherit torch's threads, and can hang.
    ahead = {"multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
    return iter(DataLoader(_ViewDataset(training), batch_sampler=items, num_workers=workers, collate_fn=list, **ahead))


def resolve_loading_workers(args: RunArguments, accelerator: Accelerator) -> int:
    """Processes that decode images: as asked for, else none beside a CPU that computes, up to 12 beside a GPU."""
    if args.loading_workers is not None:
        return args.loading_workers
    return 0 if accelerator.device.type == "cpu" else min(12, os.cpu_count() or 1)


def augment_image(image: PIL.Image.Image, seed: int) -> PIL.Image.Image:
    """The recipe's augmentation: 250 pixels, a crop of 90 to 100 % to 224 pixels, AugMix of severity 2.

    Source: CAPIVARA (arXiv 2310.13683), section 4; the draws are a function of `state`.
    """
    from torchvision.transforms import v2 as transforms

    torch.manual_seed(seed)
    bicubic = transforms.InterpolationMode.BICUBIC
    image = image.convert("LA") if image.mode == "La" else image  # PIL has no way from La to RGB
    image = transforms.Resize(AUGMENTATION["resize"], bicubic)(image.convert("RGB"))
    image = transforms.RandomResizedCrop(AUGMENTATION["crop"], AUGMENTATION["scale"], interpolation=bicubic)(image)
    return transforms.AugMix(severity=AUGMENTATION["augmix_severity"])(image)


@torch.no_grad()
def embed_pixels(model: PreTrainedModel, pixels: Tensor, accelerator: Accelerator) -> Tensor:
    """(images, width), unit length, float32, on the device: in the precision of the run."""
    with accelerator.autocast():
        parts = split_for_device(pixels, accelerator.device)
        return check_finite(torch.cat([compute_image_embeds(model, part) for part in parts]))


def open_image_cache(model: PreTrainedModel, pairs: PairDataset, root: Path, precision: str) -> EmbeddingCache:
    """Where the vectors of all rows of a data set lie: under `root`, in a folder named after all that they depend on.

    The model's image tower is frozen and in evaluation mode; `precision` is as Accelerate names it.
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
    """All rows of a data set, with the column `vectors` and what is wrong with images in `reason` and `detail`.

    They come out of the cache, of which all processes make what is missing.
    """
    cache = open_image_cache(model, pairs, root, accelerator.mixed_precision)
    views, width = row = (pairs.augmented_views, embedding_width(model.config))
    missing, is_usable = cache.find_missing(), np.asarray(pc.equal(pairs.table.data.column("reason"), ""))
    if missing and accelerator.is_main_process:
        size = len(pairs) * views * width * 2 / 1e6
        logger.info(f"Image-embedding cache: {len(pairs):,} images x {views} views, {size:,.1f} MB in {cache.folder}.")

    def batches_of(part: range) -> list[list[tuple[int, int, int]]]:
        items = [(0, pair, view) for pair in part if is_usable[pair] for view in range(views)]
        return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]

    def embedded(numbers: list[int]) -> Iterator[tuple[np.ndarray, BadRows]]:
        own = [cache.shards[number] for number in numbers]
        # One set of workers for all shards: opening them anew costs seconds.
        ahead = prefetch_pixels([pairs], (batch for part in own for batch in batches_of(part)), workers)
        bar = {
            "desc": f"Images, {pairs.source.display_name}",
            "unit": "image",
            "disable": not accelerator.is_main_process,
        }
        with tqdm(total=sum(map(len, own)), **bar) as progress:
            for part in own:
                embeds = np.zeros((len(part), *row), dtype=np.float16)
                bad = {place: ("", "") for place, pair in enumerate(part) if not is_usable[pair]}
                for batch, images in zip(batches_of(part), ahead, strict=False):
                    good = []
                    for (_, pair, view), image in zip(batch, images, strict=True):
                        if isinstance(image, BadImage):
                            bad[pair - part.start] = image.reason, image.detail
                        else:
                            good.append((pair - part.start, view, image))
                    if good:
                        places, numbers_of_views, images = map(list, zip(*good, strict=True))
                        vectors = embed_pixels(model, torch.stack(images), accelerator)
                        embeds[places, numbers_of_views] = vectors.half().cpu().numpy()
                    progress.update(len(batch) / views)
                yield embeds, bad

    cache.make_shards(missing, embedded)
    made, table = cache.load_table(), pairs.table.data.table
    for name in ("reason", "detail"):  # a row has that of the table or that of the cache, never both
        both = pc.binary_join_element_wise(table[name], made[name], "")
        table = table.set_column(table.column_names.index(name), name, both)
    table = Dataset(table.append_column("vectors", made["vectors"]), fingerprint=cache.folder.name)
    return replace(pairs, table=table)
