"""What a run starts from, checked: model, processor, splits and images; what is quick to fail comes first."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from capivara_common.environment import cache_home
from capivara_common.files import check_free_space
from caption_data.pairs import check_bad_share
from caption_data.rows import Skipped, write_skipped
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import embed_images
from training.arguments import RunArguments
from training.batches import Planner, batch_counts
from training.data import Split, check_data_sets, evaluation_split, measured_languages, training_splits
from training.images import TrainingImages, build_cache, cached_embeds, loading_workers
from training.trainable import prepare_trainable
from training.views import Views, bad_images, check_images


@dataclass
class Inputs:
    """What a run starts from."""

    base: CapivaraModel  # the model before training
    processor: CapivaraProcessor
    training: list[Split]  # the usable pairs of each data set
    counts: list[int]  # pairs of a batch from each
    images: TrainingImages
    validation: Split  # that choices are made on
    validation_embeds: Tensor  # (images, width) by the frozen image tower
    test: dict[str, Split]  # language -> the split of the final table
    test_embeds: Tensor  # (images, width) by the base's image tower, float32
    skipped: list[Skipped]  # training rows that were left out
    base_digest: str  # of the base's weights

    def planner(self, args: RunArguments) -> Planner:
        """What draws the batches of a run."""
        captions = [split.table["captions"] for split in self.training]
        # A copy: it plans in a thread, and a tokenizer remembers padding and length from its last call.
        processor = copy.deepcopy(self.processor)
        return Planner(captions, self.counts, processor, args.micro_batch_size, args.augmented_views, args.seed)

    def fingerprints(self, args: RunArguments) -> dict[str, str]:
        """Name of a data set and split -> digest of its images and captions."""
        prints = {"base model": self.base_digest}
        prints |= {
            f"{name} {args.train_split}": s.fingerprint for name, s in zip(args.dataset, self.training, strict=True)
        }
        prints[f"{args.evaluation_dataset} {args.validation_split}"] = self.validation.fingerprint
        for language, split in self.test.items():
            prints[f"{args.evaluation_dataset} {args.test_split} {language}"] = split.fingerprint
        return prints


def cache_root(args: RunArguments) -> Path:
    """Where image embeddings are kept."""
    if args.image_embedding_cache not in ("auto", "off"):
        return Path(args.image_embedding_cache)
    return cache_home() / "image_embeddings"


def load_inputs(args: RunArguments, accelerator: Accelerator, output_dir: Path) -> Inputs:
    """Everything a run needs.

    Raises:
        ValueError: anything is missing or bad, the batch exceeds the pairs, or LoRA's names match nothing.
        OSError: the disk has too little space.
    """
    check_data_sets(args)  # before a model is loaded
    processor = load_processor(args.model)
    base = load_model(args.model)
    trial = load_model(args.model)
    prepare_trainable(trial, args)  # its names match, before any long work
    check_free_space(output_dir, _bytes_of_run(args, trial))
    del trial
    base.to(accelerator.device).eval()
    measured = {
        split: evaluation_split(args, split, languages) for split, languages in measured_languages(args).items()
    }
    skipped: list[Skipped] = []
    splits = training_splits(args, skipped)
    rows = sum(map(len, splits)) + len(skipped)
    _check_skipped(args, skipped, rows, output_dir)
    batch_counts(args.effective_batch_size, list(map(len, splits)))

    validation, test = measured[args.validation_split][args.language], measured[args.test_split][args.language]
    with accelerator.main_process_first():  # the first notes what it finds, the others read it
        for split in (validation, test):
            _require_good(split, processor, cache_root(args))
    splits, images = _training_images(args, base, processor, splits, skipped, accelerator)
    _check_skipped(args, skipped, rows, output_dir)
    return Inputs(
        base=base,
        processor=processor,
        training=splits,
        counts=batch_counts(args.effective_batch_size, list(map(len, splits))),
        images=images,
        validation=validation,
        validation_embeds=_validation_embeds(args, base, processor, validation, accelerator),
        test=measured[args.test_split],
        test_embeds=embed_images(base, processor, test, args.embedding_batch_size, "Images, test"),
        skipped=skipped,
        base_digest=weights_digest(base),
    )


def _training_images(
    args: RunArguments,
    base: CapivaraModel,
    processor: CapivaraProcessor,
    splits: list[Split],
    skipped: list[Skipped],
    accelerator: Accelerator,
) -> tuple[list[Split], TrainingImages]:
    """The splits without the pairs whose image is bad, and the images of the others."""
    all_views = [
        Views(split.source, split.table, split.image_column, processor, args.augmented_views, args.seed)
        for split in splits
    ]
    caches, kept = [], []
    for views in all_views:
        if args.image_embedding_cache == "off":
            with accelerator.main_process_first():
                bad = check_images(views, cache_root(args))
        else:
            cache = build_cache(
                base,
                views,
                cache_root(args),
                args.embedding_batch_size,
                loading_workers(args, accelerator),
                accelerator,
            )
            caches.append(cache)
            bad = cache.bad
        skipped += bad_images(bad, views)
        kept.append(np.array([pair for pair in range(len(views)) if pair not in bad], dtype=np.int64))
    good = [
        Split(split.source, split.table.select(pairs) if len(pairs) < len(split) else split.table, split.image_column)
        for split, pairs in zip(splits, kept, strict=True)
    ]
    if not caches:
        for views, split in zip(all_views, good, strict=True):
            views.table = split.table
    return good, TrainingImages(all_views, caches or None, kept if caches else None)


def _validation_embeds(
    args: RunArguments, base: CapivaraModel, processor: CapivaraProcessor, split: Split, accelerator: Accelerator
) -> Tensor:
    if args.image_embedding_cache == "off":
        return embed_images(base, processor, split, args.embedding_batch_size, "Images, validation")
    views = Views(split.source, split.table, split.image_column, processor, augmented_views=1, seed=args.seed)
    root = cache_root(args)
    root = root.parent if (root / "cache.json").is_file() else root  # that of the training images alone
    cache = build_cache(base, views, root, args.embedding_batch_size, loading_workers(args, accelerator), accelerator)
    return cached_embeds(cache, range(len(split)), [0] * len(split))


def _check_skipped(args: RunArguments, skipped: list[Skipped], rows: int, output_dir: Path) -> None:
    """Raise ValueError where too many rows are bad; all are then listed in a file beside the output folder."""
    try:
        check_bad_share(skipped, rows, args.max_bad_share)
    except ValueError as error:
        path = output_dir.with_name(f"{output_dir.name}.skipped.jsonl")
        write_skipped(path, skipped)
        raise ValueError(f"{error} All of them are listed in {path}.") from error


def _bytes_of_run(args: RunArguments, model: CapivaraModel) -> int:
    """Disk that the models of a run take, and its checkpoints: weights and Adam's two moments, one in the making."""
    weights = sum(p.nbytes for p in model.parameters())
    moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    checkpoints = args.keep_last + 2 if args.max_steps > args.save_steps else 0
    return weights + checkpoints * (weights + moments)


def _require_good(split: Split, processor: CapivaraProcessor, root: Path) -> None:
    """Raise ValueError where an image of a split that is measured on can't be used."""
    views = Views(split.source, split.table, split.image_column, processor, augmented_views=1, seed=0)
    for bad in bad_images(check_images(views, root), views):
        raise ValueError(
            f"{split.source.where}: the image of row {bad.row} can't be used, {bad.reason} ({bad.detail}). A split "
            "that is measured on must be whole. Remove the row."
        )
