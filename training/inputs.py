"""What a run starts from, checked: data sets, model, processor, pairs and images; what is quick to fail comes first."""

import copy
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from capivara_common.environment import cache_home
from capivara_common.files import check_free_space
from caption_data.pairs import check_bad_share, lacking, pair_table, skipped_rows, usable
from caption_data.rows import Skipped
from caption_data.selection import WITH_SIMILARITIES
from caption_data.sources import NoSplit, Split, open_split
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor, weights_digest
from modeling_capivara.two_towers import embed_images
from training.arguments import RunArguments
from training.batches import Planner, batch_counts
from training.images import Pairs, build_cache, loading_workers
from training.trainable import prepare_trainable

COLUMN_NAMED = "--language, --eval_languages and --caption_column name it."
Splits = dict[tuple[str, str], Split]  # data set and split -> the rows


@dataclass
class Inputs:
    """What a run starts from."""

    base: CapivaraModel  # the model before training
    processor: CapivaraProcessor
    training: list[Pairs]  # the usable pairs of each data set
    counts: list[int]  # pairs of a batch from each
    validation: Pairs  # that choices are made on
    validation_embeds: Tensor  # (images, width) by the frozen image tower
    test: dict[str, Pairs]  # language -> the split of the final table
    test_embeds: Tensor  # (images, width) by the base's image tower, float32
    skipped: list[Skipped]  # training rows that were left out
    base_digest: str  # of the base's weights

    def planner(self, args: RunArguments) -> Planner:
        """What draws the batches of a run."""
        captions = [pairs.table["captions"] for pairs in self.training]
        # A copy: it plans in a thread, and a tokenizer remembers padding and length from its last call.
        processor = copy.deepcopy(self.processor)
        return Planner(captions, self.counts, processor, args.micro_batch_size, args.augmented_views, args.seed)

    def fingerprints(self, args: RunArguments) -> dict[str, str]:
        """Name of a data set and split -> digest of its images and captions."""
        named = {f"{pairs.source.name} {args.train_split}": pairs for pairs in self.training}
        named[f"{args.evaluation_dataset} {args.validation_split}"] = self.validation
        named |= {f"{args.evaluation_dataset} {args.test_split} {code}": pairs for code, pairs in self.test.items()}
        return {"base model": self.base_digest} | {name: pairs.fingerprint for name, pairs in named.items()}


def load_inputs(args: RunArguments, accelerator: Accelerator, output_dir: Path) -> Inputs:
    """Everything a run needs.

    Raises:
        ValueError: anything is missing or bad, the batch exceeds the pairs, or LoRA's names match nothing.
        OSError: the disk has too little space.
    """
    splits, root = open_splits(args), cache_root(args)  # before a model is loaded
    processor = load_processor(args.model)
    base = load_model(args.model)
    trial = load_model(args.model)
    prepare_trainable(trial, args)  # its names match, before any long work
    check_free_space(output_dir, _bytes_of_run(args, trial))
    del trial
    base.to(accelerator.device).eval()
    measured = [splits[args.evaluation_dataset, name] for name in (args.validation_split, args.test_split)]
    validation = evaluation_pairs(args, measured[0], [args.language], processor)[args.language]
    test = evaluation_pairs(args, measured[1], args.eval_languages, processor)
    training, skipped = training_pairs(args, splits, processor)
    rows = sum(map(len, training)) + len(skipped)
    listed = output_dir.with_name(f"{output_dir.name}.skipped.jsonl")  # beside the output folder
    check_bad_share(skipped, rows, args.max_bad_share, listed)
    batch_counts(args.effective_batch_size, list(map(len, training)))

    def cached(pairs: Pairs) -> tuple[Pairs, list[Skipped]]:
        """With the vectors of their images; the rows that have none."""
        options = args.embedding_batch_size, loading_workers(args, accelerator), accelerator
        return pairs.with_cache(build_cache(base, pairs, root, *options))

    if args.image_embedding_cache == "off":
        vectors = embed_images(base, processor, validation, args.embedding_batch_size, "Images, validation")
    else:
        training, bad = zip(*map(cached, training), strict=True)
        skipped += [line for lines in bad for line in lines]
        check_bad_share(skipped, rows, args.max_bad_share, listed)
        validation, bad = cached(validation)
        _refuse_bad(validation.source, bad)
        vectors = validation.vectors(range(len(validation)), [0] * len(validation))
    return Inputs(
        base=base,
        processor=processor,
        training=list(training),
        counts=batch_counts(args.effective_batch_size, list(map(len, training))),
        validation=validation,
        validation_embeds=vectors,
        test=test,
        test_embeds=embed_images(base, processor, test[args.language], args.embedding_batch_size, "Images, test"),
        skipped=skipped,
        base_digest=weights_digest(base),
    )


def open_splits(args: RunArguments) -> Splits:
    """All splits that the settings ask for, each opened once; no image is read.

    Raises:
        ValueError: a data set, split or column is missing, or there are fewer rows than a batch takes. All of it is
            told at once, a line each, with the setting that asks for it and the flag that does without.
    """
    named = "--dataset and --train_split name the training data."
    asked = [(name, args.train_split, _columns_of_training(args), named) for name in args.dataset]
    named = "--evaluation_dataset, --validation_split and --test_split name what is measured on."
    for split, languages in {args.validation_split: [args.language], args.test_split: args.eval_languages}.items():
        columns = [([caption_column(args, code)], f"{COLUMN_NAMED} {named}") for code in languages]
        asked.append((args.evaluation_dataset, split, columns, named))
    splits: Splits = {}
    faults: dict[str, list[str]] = {}  # what is missing -> which settings ask for it, and the way out
    missing: dict[str, ValueError] = {}  # data set -> why it can't be opened at all: the Hub is asked for it once
    for dataset, split, columns, named in asked:
        try:
            if dataset in missing:
                raise missing[dataset]
            found = splits[dataset, split] = open_split(dataset, split, args.image_column, **args.limits())
        except ValueError as error:
            missing |= {} if isinstance(error, NoSplit) else {dataset: error}
            faults.setdefault(f"{str(error).rstrip('.')}.", []).append(named)
            continue
        for names, reason in [([args.image_column], "--image_column names another one."), *columns]:
            if absent := lacking(names, found.columns):
                fault = f"{found.where} has no column {' or '.join(map(repr, absent))}; there are {found.columns}."
                faults.setdefault(fault, []).append(reason)
    try:
        trained = [splits.get((name, args.train_split)) for name in args.dataset]
        batch_counts(args.effective_batch_size, list(map(len, trained)) if None not in trained else [])
    except ValueError as error:
        faults[str(error)] = []
    if faults:
        raise ValueError("\n".join(" ".join([fault, *dict.fromkeys(reasons)]) for fault, reasons in faults.items()))
    return splits


def _columns_of_training(args: RunArguments) -> list[tuple[list[str], str]]:
    """Columns of the training data, each with the setting that asks for it and the flag that does without."""
    similarities = [f"similarities-{args.language}"]
    captions = [name for name in args.columns_of(args.language)[1:] if name not in similarities]
    columns, strategy = [([caption_column(args, args.language), *captions], COLUMN_NAMED)], args.caption_strategy
    if strategy in WITH_SIMILARITIES:
        columns.append((similarities, f"caption_strategy: {strategy} needs it, --caption_strategy none turns it off."))
    if (least := args.min_pair_similarity) is not None:
        columns.append((similarities, f"min_pair_similarity: {least:g} needs it, --min_pair_similarity null does not."))
    return columns


def training_pairs(
    args: RunArguments, splits: Splits, processor: CapivaraProcessor
) -> tuple[list[Pairs], list[Skipped]]:
    """The usable pairs of every training data set, and the rows that can't be used.

    Without a cache, which finds them, images whose pixels are damaged are found here: a step can't do without one.
    """
    columns = [name for names, _ in _columns_of_training(args) for name in names]
    column, own = caption_column(args, args.language), f"captions-{args.language}"
    choice = ("caption_strategy", "caption_count", "min_similarity", "min_pair_similarity")
    settings = {name: getattr(args, name) for name in ("language", "caption_column", *choice)}
    found, skipped = [], []
    for name in args.dataset:
        split = splits[name, args.train_split]
        decode = args.image_embedding_cache == "off"
        choose = lambda row: args.chosen(row | {own: row[column]}, args.language)  # noqa: E731
        table = pair_table(split, list(dict.fromkeys(columns)), choose, settings, decode)
        found.append(Pairs(split, usable(table), processor, args.augmented_views, args.seed))
        skipped += skipped_rows(table, split)
    return found, skipped


def evaluation_pairs(
    args: RunArguments, split: Split, languages: list[str], processor: CapivaraProcessor
) -> dict[str, Pairs]:
    """Language -> the pairs of a split that is measured on: all its rows, or figures would depend on what is left.

    Raises:
        ValueError: a row can't be used; it is named.
    """
    found = {}
    for language in languages:
        column = caption_column(args, language)
        table = pair_table(split, [column], lambda row, c=column: _complete(row[c]), {"whole": column}, decode=True)
        _refuse_bad(split, skipped_rows(table, split))
        found[language] = Pairs(split, table, processor, seed=args.seed)
    return found


def caption_column(args: RunArguments, language: str) -> str:
    """The column of the captions in a language."""
    return args.caption_column.replace("{language}", language)


def cache_root(args: RunArguments) -> Path:
    """Where image embeddings are kept. Raises ValueError where that is one cache of them."""
    if args.image_embedding_cache in ("auto", "off"):
        return cache_home() / "image_embeddings"
    root = Path(args.image_embedding_cache)
    if (root / "cache.json").is_file():
        raise ValueError(f"{root} is one cache of image embeddings. Name the folder that it lies in, {root.parent}.")
    return root


def _complete(texts: list[str]) -> list[str]:
    """`texts`. Raises ValueError where one is empty."""
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"an empty caption in {texts!r}")
    return texts


def _refuse_bad(split: Split, bad: list[Skipped]) -> None:
    """Raise ValueError where a row of a split that is measured on can't be used."""
    if bad:
        raise ValueError(
            f"{split.where}: row {bad[0].row} can't be used, {bad[0].reason} ({bad[0].detail}). A split that is "
            f"measured on must be whole; mend the row, or remove it. {len(bad)} rows are like this."
        )


def _bytes_of_run(args: RunArguments, model: CapivaraModel) -> int:
    """Disk that the models of a run take, and its checkpoints: weights and Adam's two moments, one in the making."""
    weights = sum(p.nbytes for p in model.parameters())
    moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    checkpoints = args.keep_last + 2 if args.max_steps > args.save_steps else 0
    return weights + checkpoints * (weights + moments)
