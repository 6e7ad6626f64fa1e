"""One stage of building a caption data set: rows in, the same rows with more columns out, in parts written whole.

    StageArguments("images", Path("read")).rows()  # a kind of its own for every stage: its flags, and its `process`

A part is a parquet file of consecutive rows of the source, named by their numbers, with a list of the rows that were
left out beside it. Tasks share the parts out by `rank` and `world_size`, with nothing between them but the file system:
the names of whole files alone say what is done, so that a task that was killed is run again, in any number of tasks,
and no row is doubled or lost. The parts of a folder are one data set for the next stage. Parquet files are read where
they lie: `datasets` would copy them to its cache first, which for a large set is as much disk again a stage.
"""

import bisect
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image
from tqdm.auto import tqdm

from capivara_common.cli import check_at_least, flag, parse_arguments
from capivara_common.environment import package_versions
from capivara_common.executors import PhaseStep, run_phases
from capivara_common.files import atomic_file, read_json, write_json
from capivara_common.image_files import (
    DECODER_THREADS,
    BadRow,
    ImageAccess,
    ImageFileArguments,
    decode_image,
    read_image_bytes,
)
from capivara_common.tasks import TASK_SHARING_HINT, ExecutorArguments, Phase, split_rows
from caption_data.rows import (
    CAPTION_COLUMN_RE,
    CAPTIONS_FEATURE,
    DATASET_HELP,
    SkippedRow,
    json_digest,
    normalize_captions,
    write_skipped_rows,
)
from caption_data.sources import (
    METADATA_SUFFIXES,
    PARQUET_BATCH_ROWS,
    STAGE_FILE,
    Split,
    check_finished,
    open_parquet,
    open_split,
)

GONE = {  # flags of earlier versions
    **dict.fromkeys(("shard", "wait_s"), f"{TASK_SHARING_HINT} (docs/cluster.md)"),
    "source_prefix": "models without codes of languages are not taken",
    "existing": "columns that are there get another name by --rename OLD=NEW",
    "export": "--import FILE.tsv writes the table where it is not there",
    "num_beams": "the search is as the model's generation_config says",
    **dict.fromkeys(("sampling", "temperature", "top_p", "seed"), "a caption is the model's likeliest text"),
    **dict.fromkeys(
        ("price_per_million", "max_cost", "characters_per_second", "max_tries", "first_wait_s", "timeout_s"),
        "a quota of characters, in the service's console, limits what it costs; after a refusal pauses double",
    ),
}
SPLIT_NAME_PATTERN = r"\w+([.-]\w+)*"  # names of files begin with it
IMAGE_COLUMN = "image"  # the authors' name, which the image column has in every output
DECODED_KEY = "decoded image"  # of a row that is worked on
STAGE_VERSION = 1  # of the folder's form; raise it when parts change
IDENTITY_KEYS = ("version", "source", "rows_per_part", "settings", "columns")  # what parts of one folder have in common
IGNORED_SOURCE_KEYS = ("name", "damaged")  # of the source: another machine may reach it by another path
RECORD_TYPES = {"version": int, "command": str, "source": dict, "rows_per_part": int}
RECORD_TYPES |= {"settings": dict, "columns": dict, "versions": dict}
MAX_ROWS = 10**9  # names of parts have nine digits
ROWS_PER_GROUP = 16  # of a parquet file: what a reader of one row reads
MAX_PREPARED_ROWS = 50_000  # whose translations are in memory at once
SAMPLE_COUNT, SAMPLE_BYTES = 64, 4096  # of a file, evenly spread, for the fingerprint of a split
# What a stage does with some rows: for each, its new columns, or why it is left out.
ProcessRows = Callable[[list[dict[str, Any]]], list[dict[str, Any] | BadRow]]

S = TypeVar("S", bound=Sized)
logger = logging.getLogger("capivara")


@dataclass
class StageArguments(ImageFileArguments, ExecutorArguments):
    """A stage: its flags, and what its tasks do. This one passes rows on as they are.

    Raises ValueError where a value breaks its rule.
    """

    gone = GONE
    uses_model = decodes_images = False  # whether a task needs a GPU, and images decoded
    import_file = None  # a flag of `captions.translate` alone
    dataset: str = flag(..., f"{DATASET_HELP} The output of another stage is such a folder.")
    output: Path = flag(..., "Folder of the parts; the same command finishes an unfinished one.")
    split: str = flag("train", "Split that is read, and that the parts are named by.")
    image_column: str = flag("image", "Name of the image column.")
    rename: list[str] = flag([], "Columns that get another name, as OLD=NEW: caption=captions-en for most data sets.")
    batch_rows: int = flag(16, "Rows that are worked on at once.")
    rows_per_part: int = flag(500, "Rows of a file: at most what a kill loses, at least what a task takes.")

    def __post_init__(self) -> None:
        self.dataset, self.output = self.dataset.rstrip("/") or self.dataset, Path(self.output)
        check_at_least(self, 1, "batch_rows", "rows_per_part")
        if not re.fullmatch(SPLIT_NAME_PATTERN, self.split):
            raise ValueError(f"split must be a name such as train, got {self.split!r}.")
        folder, output = Path(self.dataset).resolve(), self.output.resolve()
        if Path(self.dataset).exists() and folder in (output, output.parent):  # its parts would be rows of the data set
            raise ValueError(f"The output folder {self.output} is the data set or lies in it. Choose another one.")
        self.column_renames()
        self.check_image_files()
        self.check_executor()

    def column_renames(self) -> dict[str, str]:
        """Old name -> new name, of `rename`."""
        pairs = [pair.split("=") for pair in self.rename]
        names = dict(pair for pair in pairs if len(pair) == 2 and all(pair))
        if len(names) < len(pairs) or len(set(names.values())) < len(names) or self.image_column in names:
            raise ValueError(
                f"rename must be different OLD=NEW such as caption=captions-en, none of the images, got {self.rename}."
            )
        return names

    def required_columns(self) -> list[str]:
        """Of which the data set must have one, by their names in the output."""
        return []

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Return the names of the columns that it adds to those of its source, `columns` by their names in the output.

        Raises ValueError, which begins with `where`, if none of the columns that it needs is there.
        """
        needed = self.required_columns()
        if needed and set(columns).isdisjoint(needed):
            raise ValueError(
                f"{where} has no column {' or '.join(needed)}; there are {list(columns)}. A column of another name "
                f"becomes one by --rename OLD={needed[0]}."
            )
        return []

    def known_settings(self) -> dict[str, Any]:
        """Of the settings of `process`, those that are known before it is made."""
        return {}

    def source(self) -> Split:
        """The rows that it reads. Raises ValueError as `open_split` does."""
        return open_in_place(self.dataset, self.split, self.image_column, **self.image_options())

    def pending_manual_step(self) -> str:
        """What a person has to do before it can run; empty where it can."""
        return ""

    def is_corrected(self) -> bool:
        """Tell whether an input that people may correct has changed since the parts were made."""
        return False

    def corrections(self) -> "Corrections | None":
        """Find what a corrected input changes in the parts that are there; None if nothing was corrected."""
        return None

    def prepare_processing(self, stage: "RowStage") -> tuple[Any, ...]:
        """What `RowStage.run` is given: new columns, settings, what makes them; a model is loaded here."""
        return {}, {}, lambda rows: [{} for _ in rows]

    def write_rows(self, rank: int = 0, world_size: int = 1) -> "StageReport":
        """Write the parts of one task that are missing. Raises as `RowStage` and `process` do."""
        stage = RowStage(self, rank, world_size)  # before the model: what is wrong with the data is said at once
        return stage.report() if stage.is_done else stage.run(*self.prepare_processing(stage))

    def command(self) -> str:
        """The command line, for a shell, without defaults and without where its tasks run."""
        words, elsewhere = ["python", "-m", type(self).__module__], vars(ExecutorArguments())
        for known in fields(self):
            value = getattr(self, known.name)
            default = known.default_factory() if known.default_factory is not MISSING else known.default
            if known.name in elsewhere or value == default or value is None or value is False:
                continue
            values = value if isinstance(value, list) else [value]
            words += [f"--{known.name}", *([] if value is True else map(str, values))]
        return shlex.join(words)

    @property
    def phases(self) -> dict[str, Phase]:
        """The work of a stage: its rows, shared out; then its report, where it has one."""
        rows = Phase(StageArguments.write_rows, is_parallel=True, uses_model=self.uses_model)
        return {"rows": rows} | ({"report": Phase(type(self).report)} if hasattr(self, "report") else {})

    @property
    def title(self) -> str:
        """Stage and split of a build, for messages."""
        return f"{self.output.parent.name}, {self.split}"


# What is read


@dataclass(eq=False)
class ParquetSplit(Split):
    """A split of parquet files, read a few rows at a time: good for few passes in order, slow for rows here and there.

    No row is read when it is opened, so that damage in the first ones is told by whoever reads them.
    """

    def __post_init__(self) -> None:
        self._row_groups: list[tuple[Path, int, int]] = []  # file, number and rows of each row group
        schema = None
        for path in tqdm(self.paths, desc=f"Parquet files, {self.display_name}", unit="file", leave=False):
            with open_parquet(path) as file:
                schema = file.schema_arrow if schema is None else schema
                if not file.schema_arrow.equals(schema):
                    raise ValueError(f"{path} has other columns than {self.paths[0]}; make them alike.")
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._row_groups += [(path, group, size) for group, size in enumerate(sizes)]
        self._row_group_starts = list(
            itertools.accumulate((size for *_, size in self._row_groups), initial=0)
        )  # and the end
        self._features = Features.from_arrow_schema(schema)

    @property
    def features(self) -> Features:
        """Of the schema of the files."""
        return self._features

    def __len__(self) -> int:
        return self._row_group_starts[-1]

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`, from 0."""
        return next(self.rows(index))

    def rows(self, start: int = 0, column_names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows from row `start` on, with none but the columns `only`."""
        if start >= len(self):
            return
        first = bisect.bisect_right(self._row_group_starts, start) - 1
        surplus = start - self._row_group_starts[first]  # rows of the first group that come before
        for path, some in itertools.groupby(self._row_groups[first:], key=lambda group: group[0]):
            numbers, columns = [number for _, number, _ in some], None if column_names is None else list(column_names)
            with open_parquet(path) as file:
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=numbers, columns=columns):
                    rows = batch.slice(min(surplus, len(batch))).to_pylist()
                    surplus -= len(batch) - len(rows)
                    for row in rows:
                        image = row.get(self.image_column)
                        if isinstance(image, bytes | str):  # of files that others wrote
                            kind = "path" if isinstance(image, str) else "bytes"
                            row[self.image_column] = {"bytes": None, "path": None, kind: image}
                        yield row


open_in_place = partial(open_split, parquet_type=ParquetSplit)  # parquet files without a copy


def source_fingerprint(source: Split) -> str:
    """Hex digest of the content, the same wherever files lie: of a large one by its size and pieces all over it; of
    a data set of `datasets` the fingerprint that the library keeps."""
    if not source.paths:
        return str(source.data._fingerprint)
    digest = hashlib.blake2b(digest_size=16)
    for path in tqdm(source.paths, desc="Fingerprint", unit="file", leave=False):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            whole = (
                path.suffix in METADATA_SUFFIXES or size <= SAMPLE_COUNT * SAMPLE_BYTES
            )  # the first: a list of captions
            if whole:
                hashlib.file_digest(file, lambda: digest)
            for piece in range(0 if whole else SAMPLE_COUNT):  # the first and the last one included, where footers are
                file.seek((size - SAMPLE_BYTES) * piece // (SAMPLE_COUNT - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def output_features(source: Split, args: StageArguments) -> Features:
    """The columns that a stage passes on, by their names in its output: all but those without a plain type of Arrow.

    Raises ValueError where there are no images or none of the columns that it needs, or a name stands for two columns.
    """
    names = args.column_renames() | {args.image_column: IMAGE_COLUMN}
    source.check_columns(names)
    features = Features()
    for old, feature in source.features.items():
        new = names.get(old, old)
        if new in features or (new != old and new in source.columns and new not in names):
            raise ValueError(
                f"{source.display_name}: two columns would be named {new!r}. Rename one with --rename OLD=NEW."
            )
        if CAPTION_COLUMN_RE.fullmatch(new):
            features[new] = CAPTIONS_FEATURE
        elif "extension<" not in str(Features({new: feature}).arrow_schema.field(new).type):
            features[new] = feature
    args.check_columns(features, source.display_name)
    return Features(features | {IMAGE_COLUMN: Image()})


# What is written


@dataclass(frozen=True)
class StageReport:
    """What of a stage is done."""

    rows: int  # that were written
    skipped: dict[str, int]  # reason -> number of the rows that were left out

    def __str__(self) -> str:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.skipped.items())
        return f"{self.rows:,} rows written, {sum(self.skipped.values()):,} left out" + f" ({reasons})" * bool(reasons)


class RowStage:
    """The rows that a stage reads, opened and checked, and what its task `rank` of `world_size` writes of them.

    Raises ValueError where there is no such data set, it is an unfinished stage, or lacks the images or the columns.
    """

    def __init__(self, args: StageArguments, rank: int = 0, world_size: int = 1):
        self.args, self.source, self.rank = args, args.source(), rank
        for damage in self.source.damaged_archives:
            logger.warning("A damaged archive, read up to there: %s", damage.detail)
        next(self.source.rows(), None)  # damage in the first rows is told before a model is loaded, or paid for
        self.features = output_features(self.source, args)
        self.record = {  # what of `stage.json` is known before a model is loaded
            "version": STAGE_VERSION,
            "command": args.command(),
            "source": {
                "name": self.source.name,
                "split": self.source.split,
                "rows": len(self.source),
                "fingerprint": source_fingerprint(self.source),
                "damaged": [damage.detail for damage in self.source.damaged_archives],
            },
            "rows_per_part": args.rows_per_part,
        }
        self.path = partial(part_path, args.output, self.source.split)  # of the rows of a part
        parts = split_rows(len(self.source), args.rows_per_part)  # a task has neighbours: files are read in order
        self.parts = parts[len(parts) * rank // world_size : len(parts) * (rank + 1) // world_size]

    @property
    def is_done(self) -> bool:
        """Whether the task has nothing left to do, by the names of its files. Parts of another command, of other rows
        or settings don't count: `run` then says what differs."""
        if not (self.args.output / STAGE_FILE).is_file():
            return False
        there = read_stage_record(self.args.output)
        now = self.record | {"settings": there["settings"] | self.args.known_settings()}
        # Flags in any order: earlier versions had another one.
        there, now = ({**record, "command": set(record["command"].split(" --"))} for record in (there, now))
        return all(there[key] == now[key] for key in now) and all(self.path(part).is_file() for part in self.parts)

    def run(
        self,
        columns: dict[str, Any],
        settings: dict[str, Any],
        process: ProcessRows,
        prepare: Callable[[list[range]], None] = lambda parts: None,
    ) -> StageReport:
        """Write the parts of the task that are missing, whole or not, each with a list of its rows that were left out.

        Args:
            columns: new column -> its feature of `datasets`; it replaces one of the same name.
            settings: what the new columns depend on; a folder holds parts of the same ones only.
            process: called with at most `args.batch_rows` rows, on which its results must not depend. Their image is
                `{"bytes", "path"}`, and decoded in `DECODED` where `args.decodes`; captions are lists of texts.
            prepare: called before some neighbouring parts, `PREPARED_ROWS` rows at most, are made.

        Raises:
            ValueError: the folder is of other settings or another source; what differs is named.
            OSError: the disk is full; the same command makes the parts that are missing.
        """
        features = Features(self.features | columns)
        added = {
            "settings": settings | self.args.image_settings(),
            "columns": {name: repr(feature) for name, feature in features.items()},
            "versions": package_versions(),
        }
        claim_folder(self.args.output, self.record | added)
        missing = [part for part in self.parts if not self.path(part).is_file()]
        total, left = sum(map(len, self.parts)), sum(map(len, missing))
        title = type(self.args).__module__.rpartition(".")[2].capitalize()
        with tqdm(total=total, initial=total - left, desc=title, unit="row", disable=self.rank > 0) as bar:
            for group in batch_by_length(missing, MAX_PREPARED_ROWS):
                prepare(group)
                for part in group:
                    try:
                        self._write_part(part, features.arrow_schema, process, bar)
                    except Exception as error:
                        error.add_note(f"rows {part.start} to {part.stop - 1} of {self.source.split}")
                        raise
        return self.report()

    def report(self) -> StageReport:
        """What of the task is done; removes what killed runs left of parts that are there by now."""
        for path in self.args.output.glob(".*.parquet.*.tmp"):  # others may be of tasks at work
            if path.with_name(re.sub(r"\.[^.]+\.tmp$", "", path.name[1:])).is_file():
                path.unlink(missing_ok=True)
        return summarize_parts(self.args.output, self.record, self.parts)

    def _write_part(self, part: range, schema: pa.Schema, process: ProcessRows, bar: tqdm) -> None:
        path, skipped = self.path(part), []
        try:
            with atomic_parquet(path, schema) as parquet:
                rows = self._process_rows(process, part, skipped, bar)
                while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
                    for row in group:
                        row[IMAGE_COLUMN] = row[self.args.image_column]
                    parquet.write_table(pa.Table.from_pylist(group, schema=schema))
                if skipped:
                    write_skipped_rows(skipped_path(path), skipped)
                else:
                    skipped_path(path).unlink(missing_ok=True)  # of a killed run that left out others
        except FileNotFoundError:
            if not path.is_file():  # else another process has written the same part meanwhile, and cleaned up
                raise

    def _process_rows(
        self, process: ProcessRows, part: range, skipped: list[SkippedRow], bar: tqdm
    ) -> Iterator[dict[str, Any]]:
        """Those that are not left out, with their new columns."""
        rows = itertools.islice(self.source.rows(part.start), len(part))
        numbered = zip(part, rows, strict=True)  # a source that has become shorter must not lose rows in silence
        while batch := list(itertools.islice(numbered, self.args.batch_rows)):
            with ThreadPoolExecutor(
                DECODER_THREADS
            ) as threads:  # ended before a model computes, whose own threads they slow
                results = list(threads.map(self._prepare_row, (row for _, row in batch)))
            good = [row for row in results if not isinstance(row, BadRow)]
            done = iter(process([dict(row) for row in good]) if good else [])
            for (number, _), row in zip(batch, results, strict=True):
                new = row if isinstance(row, BadRow) else next(done)
                if isinstance(new, BadRow):
                    skipped.append(SkippedRow(self.source.name, self.source.split, number, new.reason, new.detail))
                else:
                    yield row | new
            bar.update(len(batch))

    def _prepare_row(self, row: dict[str, Any]) -> dict[str, Any] | BadRow:
        """A row of the source with the bytes of its image, its captions as lists of texts; or what is wrong with it."""
        names, column = self.args.column_renames(), self.args.image_column
        row = {names.get(old, old): value for old, value in row.items()}
        try:
            data = read_image_bytes(row.get(column), self.source.image_access)
            row[column] = {"bytes": data, "path": Path(row[column].get("path") or "").name or None}
            if self.args.decodes_images:
                row[DECODED_KEY] = decode_image(row[column], ImageAccess(max_pixels=self.args.max_pixels))
            return row | {
                name: normalize_captions(row[name], name) for name in row if CAPTION_COLUMN_RE.fullmatch(name)
            }
        except BadRow as bad:
            return bad


@contextmanager
def atomic_parquet(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer of a parquet file that gets its name when the block ends, and vanishes when it fails.

    Raises OSError where the disk is full.
    """
    with atomic_file(path) as new, new.open("wb") as file:
        # No dictionary and no statistics: of images they cost time and serve nobody.
        with pq.ParquetWriter(file, schema, use_dictionary=False, write_statistics=False) as parquet:
            yield parquet
        file.flush()
        os.fsync(file.fileno())


def batch_by_length(items: Iterable[S], max_length: int, max_items: int = sys.maxsize) -> Iterator[list[S]]:
    """Items in their order, at most `size` at once and together no longer than `total`, but for a single one."""
    group: list[S] = []
    length = 0
    for item in items:
        if group and (len(group) == max_items or length + len(item) > max_length):
            yield group
            group, length = [], 0
        group.append(item)
        length += len(item)
    if group:
        yield group


# The folder


def part_path(output: Path, split: str, part: range) -> Path:
    """The file of the rows of a part."""
    return output / f"{split}-{part.start:09d}-{part.stop:09d}.parquet"


def skipped_path(path: Path) -> Path:
    """Where the rows that a part goes without are listed; there is no file where there is none."""
    return path.with_suffix(".skipped.jsonl")


def read_stage_record(output: Path | str) -> dict[str, Any]:
    """`stage.json` of a folder. Raises ValueError where there is none, or it is not what a stage has written."""
    path = Path(output) / STAGE_FILE
    if not path.is_file():
        raise ValueError(f"{output} is no output of a stage, it has no {STAGE_FILE}.")
    try:
        record = read_json(path, **RECORD_TYPES)
        rows, split, size = record["source"].get("rows"), record["source"].get("split"), record["rows_per_part"]
        if (
            type(rows) is not int
            or not 0 <= rows < MAX_ROWS
            or size < 1
            or not re.fullmatch(SPLIT_NAME_PATTERN, str(split))
        ):
            raise ValueError(f"{path}: {rows!r} rows of split {split!r}, {size} a part, can't be")
    except ValueError as error:
        raise ValueError(f"{error}. Put back a copy of it, or remove {output} and run its stage again.") from error
    return record


def claim_folder(output: Path, record: dict[str, Any]) -> None:
    """Make `output` the folder of this stage, or check that it is.

    Raises ValueError where it is of another stage, and what differs is named, or holds other parquet files.
    """
    path = output / STAGE_FILE
    if not path.is_file():
        if output.exists() and not output.is_dir():
            raise ValueError(f"The output folder {output} is a file. Choose another name.")
        if any(output.glob("*.parquet")):
            raise ValueError(f"{output} holds parquet files but no {STAGE_FILE}. Choose another --output.")
        write_json(path, record)  # several tasks write the same; else the comparison below fails
    there = read_stage_record(output)
    invalidated = there["source"].get("fingerprint") is None  # `remove_rows` has removed the parts of other rows
    if invalidated:
        there["source"]["fingerprint"] = record["source"]["fingerprint"]
    if named := describe_differences(there, record):
        raise ValueError(
            f"{output} was made from {there['source'].get('name')} with other settings, and parts of two kinds must "
            f"not mix. {named}. Give these as they were, choose another --output, or remove this folder and what "
            "was made from it."
        )
    if invalidated:
        write_json(path, there)


def describe_differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Name what the records of two runs of a stage must have in common and have not; empty if they agree."""
    old, new = flatten(_identity(there)), flatten(_identity(json.loads(json.dumps(now))))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names)


@dataclass(frozen=True)
class Corrections:
    """What a corrected input changes in a stage that was made from it."""

    output: Path  # folder of the stage
    record: dict[str, Any]  # its `stage.json`, with the input as it is now
    parts: list[Path]  # files with a row that changes
    rows: list[int]  # numbers of the rows that change, among the rows that the stage has written

    def apply(self) -> None:
        """Remove the parts, which the stage then makes again. Their lists of skipped rows stay: they do not change."""
        for path in self.parts:
            path.unlink(missing_ok=True)
        write_json(self.output / STAGE_FILE, self.record)  # last: until then a repeated run finds the same corrections


def remove_rows(output: Path, rows: Iterable[int]) -> None:
    """Remove the parts of a stage that hold these rows of its source, and let `claim` accept a changed source."""
    record = read_stage_record(output)
    write_json(output / STAGE_FILE, record | {"source": record["source"] | {"fingerprint": None}})
    size, total = record["rows_per_part"], record["source"]["rows"]
    for start in sorted({row // size * size for row in rows}):
        part = range(start, min(start + size, total))
        part_path(output, record["source"]["split"], part).unlink(missing_ok=True)


def identity_digest(record: dict[str, Any]) -> str:
    """Of what two runs of a stage must have in common."""
    return json_digest(_identity(record), sort_keys=True)


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: record.get(key) for key in IDENTITY_KEYS}
    return kept | {"source": {key: value for key, value in record["source"].items() if key not in IGNORED_SOURCE_KEYS}}


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of objects within objects, by names with points between."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def check_complete(output: Path | str) -> StageReport:
    """Of a stage that is done. Raises ValueError, with the command that goes on, where parts are missing or broken."""
    output, record = Path(output), read_stage_record(output)
    check_finished(output)
    return summarize_parts(output, record, split_rows(record["source"]["rows"], record["rows_per_part"]))


def summarize_parts(output: Path, record: dict[str, Any], parts: Iterable[range]) -> StageReport:
    """What of some parts is done. Raises ValueError where one is broken, or has lost rows."""
    rows, skipped, again = 0, Counter(), f"and run again: {record['command']}"
    for part in parts:
        path = part_path(output, record["source"]["split"], part)
        with open_parquet(path, f". Remove it, {again}") as file:
            written = file.metadata.num_rows
        reasons = Counter(reason for _, reason in read_skipped_rows(path))
        if written + sum(reasons.values()) != len(part):
            raise ValueError(
                f"{path} has {written} rows and a list of {sum(reasons.values())} that were left out, of "
                f"{len(part)}. Remove both, {again}"
            )
        rows, skipped = rows + written, skipped + reasons
    return StageReport(rows, dict(skipped.most_common()))


def read_skipped_rows(part: Path) -> list[tuple[int, str]]:
    """Number and reason of the rows that a part goes without. Raises ValueError where the list is broken."""
    path = skipped_path(part)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [(int(line["row"]), str(line["reason"])) for line in map(json.loads, lines)]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it and the part beside it, and go on.") from error


# The command


def run_stage_command(
    arguments_type: type[StageArguments], description: str, argv: list[str] | None
) -> StageArguments | None:
    """Parse the flags of a stage, run it, and print what was done.

    Returns the arguments; None where the stage waits for a person, or Slurm has taken its jobs.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    args = parse_arguments(arguments_type, description, argv)
    if args.pending_manual_step():
        logger.info("waiting: %s Fill the last column, then run the same command again.", args.request_manual_step())
        return None
    if corrections := args.corrections():
        logger.info("%s was corrected: %s rows change.", args.import_file, f"{len(corrections.rows):,}")
        corrections.apply()
    if not run_phases(PhaseStep.from_phases(args, args.phases, arguments_type.__module__.rpartition(".")[2]), args):
        return None
    print(f"{args.output}: {check_complete(args.output)}")
    return args
