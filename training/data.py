"""Which pairs a step trains on: a function of seed and step alone, so that a run can resume at any step."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import PIL.Image
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from capivara_search.common.image_files import decode_image
from caption_data.pairs import caption_table, joined_tables, lacking, table_bytes, tables_fingerprint
from caption_data.rows import Skipped
from caption_data.selection import WITH_SIMILARITIES, taught_captions
from caption_data.sources import Source, open_source
from modeling_capivara import CapivaraProcessor
from training.arguments import RunArguments
from training.step import MicroBatch, micro_batches, padding_share
from training.teacher import TeacherTexts


@dataclass
class Split:
    """The usable pairs of one split of one data set, as a sequence of their images."""

    source: Source
    table: Dataset  # `row`, `digest` and `captions` of each pair
    image_column: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, pair: int) -> PIL.Image.Image:
        """The image of a pair, decoded. Raises BadImage where it can't be used."""
        return decode_image(self.source.row(self.table[int(pair)]["row"])[self.image_column], self.source.files)

    def captions(self) -> list[list[str]]:
        """The captions of each image."""
        return self.table["captions"][:]

    @property
    def fingerprint(self) -> str:
        """Hex digest of images, captions and their order."""
        return tables_fingerprint(self.table)


def check_data_sets(args: RunArguments) -> None:
    """Look for all that the settings ask of the data sets, in their first rows: it takes seconds.

    Raises:
        ValueError: a data set, split or column is missing, or there are fewer rows than a batch takes. All of it is
            told at once, a line each, with the setting that asks for it and the flag that does without.
    """
    faults: dict[str, list[str]] = {}  # what is missing -> which settings ask for it, and the way out

    def checked(dataset: str, split: str, asked: list[tuple[list[str], str]], way_out: str) -> Source | None:
        try:
            source = open_source(dataset, split, args.image_column, streaming=True, **args.limits())
        except ValueError as error:
            faults.setdefault(f"{str(error).rstrip('.')}.", []).append(way_out)
            return None
        except OSError:  # a damaged file: the reading of all rows names it
            return None
        for columns, reason in [([args.image_column], "--image_column names another one."), *asked]:
            if missing := lacking(columns, source.columns):
                fault = f"{source.where} has no column {' or '.join(map(repr, missing))}; there are {source.columns}."
                faults.setdefault(fault, []).append(reason)
        return source

    asked, named = _asked_of_training(args), "--dataset and --train_split name the training data."
    sources = [checked(name, args.train_split, asked, named) for name in args.dataset]
    named = "--evaluation_dataset, --validation_split and --test_split name what is measured on."
    for split, languages in measured_languages(args).items():
        asked = [([caption_column(args, code)], f"{_names_of(args, code)} {named}") for code in languages]
        checked(args.evaluation_dataset, split, asked, named)
    if None not in sources:
        try:
            batch_counts(args.effective_batch_size, [_first_rows(args, one) for one in sources], args.dataset_weights)
        except ValueError as error:
            faults[str(error)] = []
    if faults:
        raise ValueError("\n".join(" ".join([fault, *dict.fromkeys(reasons)]) for fault, reasons in faults.items()))


def _first_rows(args: RunArguments, source: Source) -> int:
    """How many rows there are, up to a whole batch, which is enough."""
    columns = [name for name in source.columns if name != args.image_column]
    try:
        return sum(1 for _ in itertools.islice(source.rows(only=columns), args.effective_batch_size))
    except OSError:  # a damaged file: the reading of all rows names it
        return args.effective_batch_size


def _asked_of_training(args: RunArguments) -> list[tuple[list[str], str]]:
    """Columns of the training data, each with the setting that asks for it and the flag that does without."""
    asked = [(_caption_columns(args, args.language, similarities=False), _names_of(args, args.language))]
    similarities = [f"similarities-{args.language}"]
    if (strategy := args.caption_strategy) in WITH_SIMILARITIES:
        asked.append((similarities, f"caption_strategy: {strategy} needs it, --caption_strategy none turns it off."))
    if (least := args.min_pair_similarity) is not None:
        way_out = "--min_pair_similarity null turns it off."
        asked.append((similarities, f"min_pair_similarity: {least:g} needs it, {way_out}"))
    if args.text_teacher:
        taught = _caption_columns(args, args.teacher_language, similarities=False)
        asked.append((taught, f"text_teacher: {args.text_teacher} needs it, --teacher_language names another one."))
    return asked


def _names_of(args: RunArguments, language: str) -> str:
    """Which flags name a column of captions."""
    flag = "--language" if language == args.language else "--eval_languages"
    return f"{flag} {language} and --caption_column {args.caption_column} name it."


def measured_languages(args: RunArguments) -> dict[str, list[str]]:
    """The splits that are measured on, each with the languages of its captions."""
    teacher = [args.teacher_language] if args.text_teacher else []
    return {args.validation_split: [args.language, *teacher], args.test_split: args.eval_languages}


def training_splits(args: RunArguments, skipped: list[Skipped]) -> list[Split]:
    """The training split of every data set; what can't be used is appended to `skipped`.

    Raises:
        ValueError: a data set, split or column is missing; those that are there are named.
    """

    def named(row: dict, language: str) -> dict:
        return {**row, f"captions-{language}": row[caption_column(args, language)]}

    def choose(row: dict) -> list[str]:
        return args.chosen(named(row, args.language), args.language)

    def teach(row: dict, captions: list[str]) -> list[str]:
        if not args.text_teacher:
            return []
        both = named(named(row, args.language), args.teacher_language)
        return taught_captions(both, captions, args.language, args.teacher_language, args)

    columns = _caption_columns(args, args.language)
    taught = _caption_columns(args, args.teacher_language, similarities=False) if args.text_teacher else []
    if args.min_pair_similarity is not None:
        columns = list(dict.fromkeys([*columns, f"similarities-{args.language}"]))
    sources = [
        open_source(name, args.train_split, args.image_column, args.streaming, **args.limits()) for name in args.dataset
    ]
    read = partial(_shared_table, choose=choose, skipped=skipped, teach=teach, teach_columns=taught)
    return [Split(source, read(source, args.image_column, columns), args.image_column) for source in sources]


def _shared_table(
    source: Source, image_column: str, columns: list[str], *, choose: Callable, skipped: list[Skipped], **teaching: Any
) -> Dataset:
    """`caption_table` of all rows on every process, each of which reads its part; a streamed source is read by all."""
    state = PartialState()
    if state.num_processes == 1 or source.streaming:
        return caption_table(source, image_column, columns, choose, skipped, **teaching)
    bounds = [len(source) * i // state.num_processes for i in range(state.num_processes + 1)]
    part = range(bounds[state.process_index], bounds[state.process_index + 1])
    own_skipped: list[Skipped] = []
    own = caption_table(source, image_column, columns, choose, own_skipped, part, **teaching)
    parts = gather_object([(table_bytes(own), own_skipped)])
    for _, lines in parts:
        skipped += lines
    return joined_tables([table for table, _ in parts])


def _caption_columns(args: RunArguments, language: str, similarities: bool = True) -> list[str]:
    """The columns that the caption strategy looks at in a language, by their names in the data set."""
    names = [name for name in args.columns_of(language) if similarities or not name.startswith("similarities-")]
    return [caption_column(args, language) if name == f"captions-{language}" else name for name in names]


def evaluation_split(args: RunArguments, split: str, languages: list[str]) -> dict[str, Split]:
    """Language -> a split that is measured on: every row must be good, since a figure must not depend on what is left.

    Raises:
        ValueError: a row can't be used; it is named.
    """
    source = open_source(args.evaluation_dataset, split, args.image_column, **args.limits())
    result = {}
    for language in languages:
        skipped: list[Skipped] = []
        column = caption_column(args, language)
        table = caption_table(source, args.image_column, [column], lambda row, c=column: _complete(row[c]), skipped)
        if skipped:
            first = skipped[0]
            raise ValueError(
                f"{source.where}: row {first.row} can't be used, {first.reason} ({first.detail}). A split that is "
                f"measured on must be whole; fill it, or remove the row. {len(skipped)} rows are like this."
            )
        result[language] = Split(source, table, args.image_column)
    return result


def caption_column(args: RunArguments, language: str) -> str:
    """The column of the captions in a language."""
    return args.caption_column.replace("{language}", language)


def batch_counts(batch_size: int, sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Pairs of a batch from each of several data sets: by weight, by size where there are no weights.

    Raises:
        ValueError: a data set would give none, or more than it has.
    """
    if not sizes:  # parallel text alone
        return []
    weights = weights or sizes
    exact = [batch_size * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])  # largest remainder first
    for i in by_rest[: batch_size - sum(counts)]:
        counts[i] += 1
    for count, size in zip(counts, sizes, strict=True):
        if count > size:
            raise ValueError(
                f"effective_batch_size ({batch_size}) takes {count} pairs from a data set that has {size} usable ones; "
                f"an image would be its own negative. Choose a smaller batch{' or other weights' * (len(sizes) > 1)}."
            )
        if count == 0:
            raise ValueError(
                f"A batch of {batch_size} has no room for a data set of {size} pairs; raise its weight or the batch."
            )
    return counts


def batch_indices(step: int, batch_size: int, number: int, seed: int) -> np.ndarray:
    """Rows of the batch of a step (counted from 0): a function of its arguments, so that a run can resume anywhere.

    Every epoch is a permutation of its own, cut into whole batches; its tail is left out, since a batch over the
    border could hold an image twice, as its own negative.
    """
    batches_per_epoch = number // batch_size
    epoch, position = divmod(step, batches_per_epoch)
    return _permutation(seed, epoch, number)[position * batch_size : (position + 1) * batch_size]


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(number)


def drawn_captions(captions: Sequence[list[str]], rows: np.ndarray, step: int, seed: int) -> list[str]:
    """One caption of each row, drawn at random: each step draws anew (CAPIVARA, arXiv 2310.13683, section 3)."""
    draws = caption_draws(len(rows), step, seed)
    return [texts[int(draw * len(texts))] for texts, draw in zip(_at(captions, rows), draws, strict=True)]


def caption_draws(number: int, step: int, seed: int) -> np.ndarray:
    """(number,), from 0 to below 1: where in a row's captions the one of this step is."""
    return np.random.default_rng([seed, step, 1]).random(number)  # 1: a stream apart from that of `batch_indices`


def drawn_anchors(share: float, number: int, step: int, seed: int) -> np.ndarray:
    """Places of a step's pairs whose caption is the teacher's; `share` of `number`, from 0 to below 1."""
    return np.sort(np.random.default_rng([seed, step, 3]).permutation(number)[: round(share * number)])


def drawn_views(views: int, number: int, step: int, seed: int) -> np.ndarray:
    """(number,), a view of each image of a step; the step itself, a fresh view, where `views` is 0."""
    if views == 0:
        return np.full(number, step)
    return np.random.default_rng([seed, step, 2]).integers(views, size=number)


def _at(captions: Sequence[list[str]], rows: np.ndarray) -> list[list[str]]:
    if isinstance(captions, list):
        return [captions[row] for row in rows]
    return captions[[int(row) for row in rows]]  # a column of `datasets` reads many rows at once


@dataclass
class StepPlan:
    """All that is drawn for a step, in the order of its micro-batches: the pairs, then the texts without an image."""

    step: int  # counted from 0
    sources: np.ndarray  # (texts,), which data set each text is from; the one after the last is the parallel text
    rows: np.ndarray  # (texts,), the number of its pair there
    views: np.ndarray  # (pairs,), the view of its image
    taught: np.ndarray | None  # (texts,), number of what the teacher reads, among all of its source; None without one
    batches: list[MicroBatch]  # all micro-batches, of all processes
    tokens: int  # of the batch, padding left out
    padding: float  # share of the tokens that are padding, 0 to 1

    @property
    def pairs(self) -> int:
        """Texts that have an image: the first ones."""
        return len(self.views)


@dataclass
class Planner:
    """Draws the batches of a run; step n is the same whatever was drawn before."""

    captions: list[Sequence[list[str]]]  # data set -> pair -> captions
    counts: list[int]  # pairs of a batch from each data set
    processor: CapivaraProcessor
    micro_batch_size: int  # texts of a micro-batch
    augmented_views: int  # of every image
    seed: int
    teacher_texts: list[TeacherTexts] | None = None  # of each data set
    anchor_share: float = 0.0  # of the pairs, whose caption is the teacher's
    parallel: Sequence[list[str]] = ()  # sentences without an image; their teacher's texts come after the data sets'
    parallel_count: int = 0  # of a batch

    def texts(self) -> Iterator[str]:
        """All texts that a step may put through the tower that is trained."""
        anchors = self.teacher_texts[: len(self.captions)] if self.anchor_share else []
        for texts in itertools.chain(*self.captions, self.parallel, *(source.rows for source in anchors)):
            yield from texts

    def __call__(self, step: int) -> StepPlan:
        """The pairs of a step, counted from 0, and its parallel text."""
        drawn = [self._drawn(n, self.captions[n], count, step) for n, count in enumerate(self.counts)]
        paired = self._ordered(drawn, 0, 0)
        views = drawn_views(self.augmented_views, len(paired.order), step, self.seed)[paired.order]
        parts = [paired]
        if self.parallel_count:
            extra = self._drawn(len(self.captions), self.parallel, self.parallel_count, step)
            parts.append(self._ordered([extra], len(paired.batches), len(views)))
        batches = [batch for part in parts for batch in part.batches]
        return StepPlan(
            step=step,
            sources=np.concatenate([part.sources for part in parts]),
            rows=np.concatenate([part.rows for part in parts]),
            views=views,
            taught=np.concatenate([part.taught for part in parts]) if self.teacher_texts else None,
            batches=batches,
            tokens=sum(int(batch.attention_mask.sum()) for batch in batches),
            padding=padding_share(batches),
        )

    def _drawn(self, number: int, captions: Sequence[list[str]], count: int, step: int) -> "_Drawn":
        seed = self.seed + (number << 32)  # the first data set is drawn from as if it were alone
        rows = batch_indices(step, count, len(captions), seed)
        texts, taught = drawn_captions(captions, rows, step, seed), np.zeros(count, dtype=np.int64)
        if self.teacher_texts:
            source = self.teacher_texts[number]
            taught = source.drawn(rows, caption_draws(count, step, seed))
            share = self.anchor_share if number < len(self.captions) else 0
            for place in drawn_anchors(share, count, step, seed):
                texts[place] = source.text(rows[place], taught[place])
        return _Drawn(np.full(count, number), rows, taught, texts)

    def _ordered(self, drawn: list["_Drawn"], first_batch: int, first_text: int) -> "_Drawn":
        """All of them as one, in micro-batches; `order` says where in `drawn` each came from."""
        texts = [text for part in drawn for text in part.texts]
        batches, order = micro_batches(self.processor, texts, self.micro_batch_size, first_batch, first_text)
        joined = [np.concatenate([getattr(part, name) for part in drawn] or [np.empty(0, dtype=np.int64)])[order]
                  for name in ("sources", "rows", "taught")]  # fmt: skip
        return _Drawn(*joined, [], batches, order)


@dataclass
class _Drawn:
    """Texts of a step, and where each is from."""

    sources: np.ndarray
    rows: np.ndarray
    taught: np.ndarray
    texts: list[str]
    batches: Sequence[MicroBatch] = ()
    order: Sequence[int] = ()


def _complete(texts: list[str]) -> list[str]:
    """`texts`. Raises ValueError where one is empty."""
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"an empty caption in {texts!r}")
    return texts
