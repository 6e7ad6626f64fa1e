"""What a run starts from, checked: model, processor, splits and images; what is quick to fail comes first."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from capivara_common.environment import cache_home
from capivara_common.files import check_free_space
from capivara_common.privacy import short_name
from caption_data.columns import CAPTION_COLUMN, caption_texts
from caption_data.pairs import check_bad_share, tables_fingerprint
from caption_data.parallel_text import check_no_leak, parallel_table
from caption_data.rows import Skipped, write_skipped
from caption_data.sources import open_source
from eval.retrieval import flat_captions
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.configuration_capivara import checked_widths
from modeling_capivara.embedding import embed_images, embed_texts
from modeling_capivara.loading import load_model, load_processor, weights_digest
from training.arguments import RunArguments
from training.data import (
    Planner,
    Split,
    batch_counts,
    caption_column,
    check_data_sets,
    evaluation_split,
    measured_languages,
    training_splits,
)
from training.images import TrainingImages, build_cache, cached_embeds, loading_workers
from training.matryoshka import rotate_
from training.teacher import Teacher, TeacherTexts
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
    validation_embeds: Tensor | None  # (images, width) by the frozen image tower; None where it is trained
    test: dict[str, Split]  # language -> the split of the final table
    test_embeds: Tensor  # (images, width) by the base's image tower, float32
    skipped: list[Skipped]  # training rows that were left out
    base_digest: str  # of the base's weights
    teacher_texts: list[TeacherTexts]  # of each data set and of the parallel text; none without a teacher
    parallel: Dataset | None  # sentences without images
    # the validation captions in the teacher's language, and the base's embeddings of them (captions, width)
    teacher_validation: tuple[list[list[str]], Tensor] | None
    rotation: Tensor | None = None  # (width, width), of the space that is trained in, not of `base` and `test_embeds`

    def turn(self, rotation: Tensor) -> None:
        """Turn the space that is trained in, once: models that start, and what they are trained and validated on."""
        self.rotation = self.images.rotation = rotation
        if self.validation_embeds is not None:
            self.validation_embeds = self.validation_embeds @ rotation.T
        if self.teacher_validation is not None:
            captions, embeds = self.teacher_validation
            self.teacher_validation = captions, embeds @ rotation.T

    def start_model(self, args: RunArguments) -> CapivaraModel:
        """The model that a training starts from: the base, rotated where its space is."""
        model = load_model(args.model)
        if self.rotation is not None:
            rotate_(model, self.rotation)
        model.config.matryoshka_dims = checked_widths(args.matryoshka_dims, model.config.projection_dim) or None
        return model

    def planner(self, args: RunArguments, seed: int) -> Planner:
        """What draws the batches of a run with this seed."""
        captions = [split.table["captions"] for split in self.training]
        # A copy: it plans in a thread, and a tokenizer remembers padding and length from its last call.
        processor = copy.deepcopy(self.processor)
        planner = Planner(captions, self.counts, processor, args.micro_batch_size, args.augmented_views, seed)
        if args.text_teacher:
            planner.teacher_texts, planner.anchor_share = self.teacher_texts, args.anchor_share
        if self.parallel is not None:
            planner.parallel, planner.parallel_count = self.parallel["captions"], args.parallel_batch_size
        return planner

    def fingerprints(self, args: RunArguments) -> dict[str, str]:
        """Name of a data set and split -> digest of its images and captions."""
        prints = {"base model": self.base_digest}
        prints |= {
            f"{name} {args.train_split}": s.fingerprint for name, s in zip(args.dataset, self.training, strict=True)
        }
        for number, texts in enumerate(self.teacher_texts):
            prints[f"teacher's texts {number}"] = texts.cache.folder.name if texts.cache else texts.fingerprint
        if self.parallel is not None:
            prints[f"parallel text {args.parallel_text}"] = tables_fingerprint(self.parallel)
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
    checked_widths(args.matryoshka_dims, base.config.projection_dim)  # before any long work
    if args.matryoshka_dims and not args.dataset:
        raise ValueError("matryoshka_dims are trained on images: give a --dataset of them, or no widths.")
    trial = load_model(args.model)
    prepare_trainable(trial, args)  # its names match, before any long work
    check_free_space(output_dir, _bytes_of_run(args, trial))
    del trial
    base.to(accelerator.device).eval()
    measured = {
        split: evaluation_split(args, split, languages) for split, languages in measured_languages(args).items()
    }
    skipped: list[Skipped] = []
    parallel = _parallel_text(args, skipped, output_dir)
    others = len(skipped)
    teacher = Teacher.load(args.text_teacher, base, processor) if args.text_teacher else None
    splits = training_splits(args, skipped)
    rows = sum(map(len, splits)) + len(skipped) - others
    _check_skipped(args, skipped[others:], rows, output_dir)
    batch_counts(args.effective_batch_size, list(map(len, splits)), args.dataset_weights)

    validation, test = measured[args.validation_split][args.language], measured[args.test_split][args.language]
    with accelerator.main_process_first():  # the first notes what it finds, the others read it
        for split in (validation, test):
            _require_good(split, processor, cache_root(args))
    splits, images = _training_images(args, base, processor, splits, skipped, accelerator)
    _check_skipped(args, skipped[others:], rows, output_dir)
    return Inputs(
        base=base,
        processor=processor,
        training=splits,
        counts=batch_counts(args.effective_batch_size, list(map(len, splits)), args.dataset_weights),
        images=images,
        validation=validation,
        validation_embeds=_validation_embeds(args, base, processor, validation, accelerator),
        test=measured[args.test_split],
        test_embeds=embed_images(base, processor, test, args.embedding_batch_size, "Images, test"),
        skipped=skipped,
        base_digest=weights_digest(base),
        teacher_texts=_teacher_texts(args, teacher, splits, parallel, accelerator) if teacher else [],
        parallel=parallel,
        teacher_validation=_teacher_validation(args, base, processor, measured) if teacher else None,
    )


def _parallel_text(args: RunArguments, skipped: list[Skipped], output_dir: Path) -> Dataset | None:
    """The usable pairs of the parallel text, none of which is measured on; None where there is none."""
    if not args.parallel_text:
        return None
    own: list[Skipped] = []
    table = parallel_table(args.parallel_text, args.language, args.teacher_language, own)
    _check_skipped(args, own, len(table) + len(own), output_dir)
    if len(table) < args.parallel_batch_size:
        raise ValueError(
            f"parallel_batch_size ({args.parallel_batch_size}) exceeds the {len(table)} usable pairs of "
            f"{args.parallel_text}. Choose a smaller one."
        )
    check_no_leak(table, args.parallel_text, _measured_captions(args))
    skipped += own
    return table


def _measured_captions(args: RunArguments) -> dict[str, list[list[str]]]:
    """All captions of the validation and test split, in whatever language, by what they are of."""
    named = {caption_column(args, language) for language in (args.language, args.teacher_language)}
    found = {}
    for split in (args.validation_split, args.test_split):
        source = open_source(args.evaluation_dataset, split, args.image_column, **args.limits())
        columns = [name for name in source.columns if name in named or CAPTION_COLUMN.fullmatch(name)]
        rows = list(source.rows(only=columns))
        for name in columns:
            where = f"the split {split!r}, column {name!r}"
            found[where] = [caption_texts(row.get(name), name) for row in rows]
    return found


def teacher_root(args: RunArguments) -> Path:
    """Where a text teacher's embeddings are kept: beside those of the images, or in the folder that is named."""
    root = cache_root(args)
    if args.image_embedding_cache not in ("auto", "off"):
        root = (root.parent if (root / "cache.json").is_file() else root) / "image_embeddings"
    return root.with_name("teacher_embeddings")


def _teacher_texts(
    args: RunArguments, teacher: Teacher, splits: list[Split], parallel: Dataset | None, accelerator: Accelerator
) -> list[TeacherTexts]:
    tables = [(split.source.where, split.table) for split in splits]
    if parallel is not None:
        tables.append((short_name(args.parallel_text), parallel))
    found = [TeacherTexts.of(table, "teacher_captions") for _, table in tables]
    if args.teacher_weight:
        for (where, _), texts in zip(tables, found, strict=True):
            texts.embed(teacher, teacher_root(args), accelerator, where)
    return found


def _teacher_validation(
    args: RunArguments, base: CapivaraModel, processor: CapivaraProcessor, measured: dict[str, dict[str, Split]]
) -> tuple[list[list[str]], Tensor]:
    captions = measured[args.validation_split][args.teacher_language].captions()
    return captions, embed_texts(base, processor, flat_captions(captions)[0], description="Captions, validation")


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
) -> Tensor | None:
    if args.towers == "both":
        return None
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
    return args.runs * (weights + checkpoints * (weights + moments))


def _require_good(split: Split, processor: CapivaraProcessor, root: Path) -> None:
    """Raise ValueError where an image of a split that is measured on can't be used."""
    views = Views(split.source, split.table, split.image_column, processor, augmented_views=1, seed=0)
    for bad in bad_images(check_images(views, root), views):
        raise ValueError(
            f"{split.source.where}: the image of row {bad.row} can't be used, {bad.reason} ({bad.detail}). A split "
            "that is measured on must be whole. Remove the row."
        )
