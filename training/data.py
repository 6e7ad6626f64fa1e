"""The splits of a run's data sets: rows whose captions were chosen, and their images."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import PIL.Image
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from capivara_common.image_files import decode_image
from caption_data.pairs import caption_table, joined_tables, lacking, table_bytes, tables_fingerprint
from caption_data.rows import Skipped
from caption_data.selection import WITH_SIMILARITIES
from caption_data.sources import Source, open_source
from training.arguments import RunArguments
from training.batches import batch_counts


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
            batch_counts(args.effective_batch_size, [_first_rows(args, one) for one in sources])
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
    similarities = [f"similarities-{args.language}"]
    captions = [name for name in _caption_columns(args) if name not in similarities]
    asked = [(captions, _names_of(args, args.language))]
    if (strategy := args.caption_strategy) in WITH_SIMILARITIES:
        asked.append((similarities, f"caption_strategy: {strategy} needs it, --caption_strategy none turns it off."))
    if (least := args.min_pair_similarity) is not None:
        way_out = "--min_pair_similarity null turns it off."
        asked.append((similarities, f"min_pair_similarity: {least:g} needs it, {way_out}"))
    return asked


def _names_of(args: RunArguments, language: str) -> str:
    """Which flags name a column of captions."""
    flag = "--language" if language == args.language else "--eval_languages"
    return f"{flag} {language} and --caption_column {args.caption_column} name it."


def measured_languages(args: RunArguments) -> dict[str, list[str]]:
    """The splits that are measured on, each with the languages of its captions."""
    return {args.validation_split: [args.language], args.test_split: args.eval_languages}


def training_splits(args: RunArguments, skipped: list[Skipped]) -> list[Split]:
    """The training split of every data set; what can't be used is appended to `skipped`.

    Raises:
        ValueError: a data set, split or column is missing; those that are there are named.
    """

    def choose(row: dict) -> list[str]:
        own = {f"captions-{args.language}": row[caption_column(args, args.language)]}
        return args.chosen(row | own, args.language)

    columns = _caption_columns(args)
    if args.min_pair_similarity is not None:
        columns = list(dict.fromkeys([*columns, f"similarities-{args.language}"]))
    sources = [open_source(name, args.train_split, args.image_column, **args.limits()) for name in args.dataset]
    read = partial(_shared_table, choose=choose, skipped=skipped)
    return [Split(source, read(source, args.image_column, columns), args.image_column) for source in sources]


def _shared_table(
    source: Source, image_column: str, columns: list[str], *, choose: Callable, skipped: list[Skipped]
) -> Dataset:
    """`caption_table` of all rows on every process, each of which reads its part."""
    state = PartialState()
    if state.num_processes == 1:
        return caption_table(source, image_column, columns, choose, skipped)
    bounds = [len(source) * i // state.num_processes for i in range(state.num_processes + 1)]
    part = range(bounds[state.process_index], bounds[state.process_index + 1])
    own_skipped: list[Skipped] = []
    own = caption_table(source, image_column, columns, choose, own_skipped, part)
    parts = gather_object([(table_bytes(own), own_skipped)])
    for _, lines in parts:
        skipped += lines
    return joined_tables([table for table, _ in parts])


def _caption_columns(args: RunArguments) -> list[str]:
    """The columns that the caption strategy looks at, by their names in the data set."""
    names, language = args.columns_of(args.language), args.language
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


def _complete(texts: list[str]) -> list[str]:
    """`texts`. Raises ValueError where one is empty."""
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"an empty caption in {texts!r}")
    return texts
