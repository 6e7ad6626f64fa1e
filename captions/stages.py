"""Base of all stages of a caption build: read rows, write the same rows with more columns.

Example:
    StageArguments("images", Path("read")).write_rows()  # copies the rows; subclasses add columns

A stage writes parts. A part is a parquet file of consecutive rows of the source, named for their numbers, with a JSON
Lines file of the skipped rows next to it. Each task writes the parts of its share (`rank` of `world_size`). Parts
appear under their name only when they are complete, and the names alone say what is done: a killed task can be
repeated, with any number of tasks, and no row is lost or doubled. The folder of a stage is the dataset of the next
stage. Its parquet files are read in place, because `datasets` would first copy each of them to its cache.
"""

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
from capivara_common.tasks import ExecutorArguments, Phase, split_rows
from caption_data.parquet_split import open_in_place, source_fingerprint
from caption_data.rows import (
    CAPTION_COLUMN_RE,
    CAPTIONS_FEATURE,
    DATASET_HELP,
    SkippedRow,
    json_digest,
    normalize_captions,
    write_skipped_rows,
)
from caption_data.sources import STAGE_FILE, Split, check_finished, open_parquet

SPLIT_NAME_PATTERN = r"\w+([.-]\w+)*"  # a split name must be valid at the start of a file name
IMAGE_COLUMN = "image"  # name of the image column in every output, as in the datasets of the CAPIVARA authors
DECODED_KEY = "decoded image"  # key of the decoded image in a row that a stage processes
STAGE_VERSION = 1  # version of the folder's format; increase it when the format of parts changes
IDENTITY_KEYS = ("version", "source", "rows_per_part", "settings", "columns")  # must be equal for all parts of a folder
IGNORED_SOURCE_KEYS = ("name", "damaged")  # may differ: another machine may reach the source by another path
# Types of the values in `stage.json`.
RECORD_TYPES = {"version": int, "command": str, "source": dict, "rows_per_part": int}
RECORD_TYPES |= {"settings": dict, "columns": dict, "versions": dict}
MAX_ROWS = 10**9  # row numbers in the names of parts have nine digits
ROWS_PER_GROUP = 16  # rows of a parquet row group, the smallest unit that a reader decodes
MAX_PREPARED_ROWS = 50_000  # rows whose translations are in memory at the same time
# Processes a batch of rows: returns the new columns of each row, or a BadRow if it must be skipped.
ProcessRows = Callable[[list[dict[str, Any]]], list[dict[str, Any] | BadRow]]

S = TypeVar("S", bound=Sized)
logger = logging.getLogger("capivara")


@dataclass
class StageArguments(ImageFileArguments, ExecutorArguments):
    """Flags of a stage, and the work of its tasks. This base class copies the rows; subclasses add columns.

    Raises ValueError if the value of a flag is invalid.
    """

    uses_model = False  # True: tasks need a GPU
    decodes_images = False  # True: rows have the decoded image in `DECODED_KEY`
    import_file = None  # only `captions.translate` has this flag
    dataset: str = flag(..., f"{DATASET_HELP} Can be the output folder of another stage.")
    output: Path = flag(..., "Output folder. To finish an interrupted run, run the same command again.")
    split: str = flag("train", "Split to read; output files are named after it.")
    image_column: str = flag("image", "Name of the image column.")
    rename: list[str] = flag([], "Columns to rename, as OLD=NEW, for example caption=captions-en.")
    batch_rows: int = flag(16, "Rows to process at the same time.")
    rows_per_part: int = flag(500, "Rows per output file. An interrupted task loses at most one file.")

    def __post_init__(self) -> None:
        self.dataset, self.output = self.dataset.rstrip("/") or self.dataset, Path(self.output)
        check_at_least(self, 1, "batch_rows", "rows_per_part")
        if not re.fullmatch(SPLIT_NAME_PATTERN, self.split):
            raise ValueError(
                "split must be letters, digits and underscores, with single dots or dashes in between, got "
                f"{self.split!r}."
            )
        folder, output = Path(self.dataset).resolve(), self.output.resolve()
        if Path(self.dataset).exists() and folder in (output, output.parent):  # the output would become input
            raise ValueError(
                f"The output folder {self.output} must not be the dataset folder or lie in it. Choose another --output."
            )
        self.column_renames()
        self.check_image_files()
        self.check_executor()

    def column_renames(self) -> dict[str, str]:
        """Return `rename` as a dict from old to new names. Raises ValueError if it is invalid."""
        pairs = [pair.split("=") for pair in self.rename]
        names = dict(pair for pair in pairs if len(pair) == 2 and all(pair))
        if len(names) < len(pairs) or len(set(names.values())) < len(names) or self.image_column in names:
            raise ValueError(
                f"rename must be OLD=NEW pairs such as caption=captions-en, with different names and without the image "
                f"column, got {self.rename}."
            )
        return names

    def required_columns(self) -> list[str]:
        """Return alternative columns, by their names in the output; the dataset must have at least one of them."""
        return []

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Check that the dataset has a required column.

        Args:
            columns: Columns of the dataset, by their names in the output.
            where: Start of the error message; names the dataset.

        Returns:
            The names of the columns that the stage adds.

        Raises:
            ValueError: If all columns that the stage could work on are missing.
        """
        needed = self.required_columns()
        if needed and set(columns).isdisjoint(needed):
            raise ValueError(
                f"{where} has no column {' or '.join(needed)}; there are {list(columns)}. If the column has another "
                f"name, rename it with --rename OLD={needed[0]}."
            )
        return []

    def known_settings(self) -> dict[str, Any]:
        """Return the settings of the stage that are known before a model is loaded."""
        return {}

    def source(self) -> Split:
        """Open the split to read. Raises ValueError if it does not exist or cannot be read."""
        return open_in_place(self.dataset, self.split, self.image_column, **self.image_options())

    def pending_manual_step(self) -> str:
        """Describe what a person must do before the stage can run; empty if nothing."""
        return ""

    def is_corrected(self) -> bool:
        """Tell whether an input that people may correct has changed since the parts were written."""
        return False

    def corrections(self) -> "Corrections | None":
        """Return what a corrected input changes in the written parts; None if no input was corrected."""
        return None

    def prepare_processing(self, stage: "RowStage") -> tuple[Any, ...]:
        """Load what the stage needs to process rows, for example a model.

        Args:
            stage: The opened rows.

        Returns:
            Arguments of `RowStage.run`: new columns, settings, `process`, and optionally `prepare`.
        """
        return {}, {}, lambda rows: [{} for _ in rows]

    def write_rows(self, rank: int = 0, world_size: int = 1) -> "StageReport":
        """Write the missing parts of one task.

        Args:
            rank: Number of the task, from 0.
            world_size: Number of tasks.

        Returns:
            The counts of the rows of the task.

        Raises:
            ValueError: If the dataset cannot be used, or the output folder holds the output of another stage or other
                settings.
        """
        # Open the data before the model is loaded, so that errors in the data appear at once.
        stage = RowStage(self, rank, world_size)
        return stage.report() if stage.is_done else stage.run(*self.prepare_processing(stage))

    def command(self) -> str:
        """Return the shell command of the stage, without default values and without executor flags."""
        words, executor_flags = ["python", "-m", type(self).__module__], vars(ExecutorArguments())
        for argument in fields(self):
            value = getattr(self, argument.name)
            default = argument.default_factory() if argument.default_factory is not MISSING else argument.default
            if argument.name in executor_flags or value == default or value is None or value is False:
                continue
            values = value if isinstance(value, list) else [value]
            words += [f"--{argument.name}", *([] if value is True else map(str, values))]
        return shlex.join(words)

    @property
    def phases(self) -> dict[str, Phase]:
        """Phases of the stage by name: `rows`, split over all tasks, then `report` if the stage has one."""
        rows = Phase(StageArguments.write_rows, is_parallel=True, uses_model=self.uses_model)
        return {"rows": rows} | ({"report": Phase(type(self).report)} if hasattr(self, "report") else {})

    @property
    def title(self) -> str:
        """Stage and split of a build, for messages."""
        return f"{self.output.parent.name}, {self.split}"


def output_features(source: Split, args: StageArguments) -> Features:
    """Return the features of the columns that a stage passes on, by their names in its output.

    Columns without a plain Arrow type are dropped. Raises ValueError if the images or all required columns are missing,
    or two columns would get the same name.
    """
    names = args.column_renames() | {args.image_column: IMAGE_COLUMN}
    source.check_columns(names)
    features = Features()
    for old, feature in source.features.items():
        new = names.get(old, old)
        if new in features or (new != old and new in source.columns and new not in names):
            raise ValueError(
                f"{source.display_name}: two columns would be named {new!r}. Rename one of them with --rename OLD=NEW."
            )
        if CAPTION_COLUMN_RE.fullmatch(new):
            features[new] = CAPTIONS_FEATURE
        elif "extension<" not in str(Features({new: feature}).arrow_schema.field(new).type):
            features[new] = feature
    args.check_columns(features, source.display_name)
    return Features(features | {IMAGE_COLUMN: Image()})


# Writing


@dataclass(frozen=True)
class StageReport:
    """Counts of a stage, or of one task of it.

    Attributes:
        rows: Rows written.
        skipped: Number of skipped rows by reason.
    """

    rows: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.skipped.items())
        return f"{self.rows:,} rows written, {sum(self.skipped.values()):,} left out" + (
            f" ({reasons})" if reasons else ""
        )


class RowStage:
    """One task of a stage: its opened source, and the parts that it writes.

    Attributes:
        source: The rows to read.
        features: Columns that the stage passes on, with their features.
        record: Content of `stage.json` that is known before a model is loaded.
        parts: Row ranges of the parts that this task writes.
        path: Function that returns the path of a part.

    Raises ValueError if there is no such dataset, it is the output of an unfinished stage, or it lacks required
    columns.
    """

    def __init__(self, args: StageArguments, rank: int = 0, world_size: int = 1):
        self.args, self.source, self.rank = args, args.source(), rank
        for damage in self.source.damaged_archives:
            logger.warning("Damaged archive; only the rows before the damage are read: %s", damage.detail)
        next(self.source.rows(), None)  # report damage in the first rows before a model is loaded or a service is paid
        self.features = output_features(self.source, args)
        self.record = {  # the keys of `stage.json` that are known before a model is loaded
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
        self.path = partial(part_path, args.output, self.source.split)  # path of a part from its row numbers
        # Each task gets consecutive parts, so that it reads files in order.
        parts = split_rows(len(self.source), args.rows_per_part)
        self.parts = parts[len(parts) * rank // world_size : len(parts) * (rank + 1) // world_size]

    @property
    def is_done(self) -> bool:
        """True if all parts of the task are written, judged by the names of the files.

        False if the folder was written with another command, other rows or other settings; `run` then names the
        differences.
        """
        if not (self.args.output / STAGE_FILE).is_file():
            return False
        recorded = read_stage_record(self.args.output)
        current = self.record | {"settings": recorded["settings"] | self.args.known_settings()}
        # Compare flags in any order, because earlier versions recorded them in another order.
        recorded, current = (
            {**record, "command": set(record["command"].split(" --"))} for record in (recorded, current)
        )
        return all(recorded[key] == current[key] for key in current) and all(
            self.path(part).is_file() for part in self.parts
        )

    def run(
        self,
        columns: dict[str, Any],
        settings: dict[str, Any],
        process: ProcessRows,
        prepare: Callable[[list[range]], None] = lambda parts: None,
    ) -> StageReport:
        """Write the missing parts of the task. A part is written completely or not at all.

        Args:
            columns: Feature of each new column. A new column replaces an existing column of the same name.
            settings: Everything that the new columns depend on; all parts of a folder must have the same settings.
            process: Function that returns the new columns of at most `args.batch_rows` rows; results must not depend on
                how rows are batched. The image of a row is `{"bytes", "path"}`, and decoded in `DECODED_KEY` if
                `args.decodes_images`; captions are lists of texts.
            prepare: Function that is called with the next parts (`MAX_PREPARED_ROWS` rows at most) before they are
                written.

        Returns:
            The counts of the rows of the task.

        Raises:
            ValueError: If the folder has other settings or another source; the message names the differences.
            OSError: If the disk is full. The same command then writes the missing parts.
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
        """Count the rows of the task, and delete temporary files of killed runs whose parts have been written since."""
        for path in self.args.output.glob(".*.parquet.*.tmp"):  # other temporary files may belong to running tasks
            if path.with_name(re.sub(r"\.[^.]+\.tmp$", "", path.name[1:])).is_file():
                path.unlink(missing_ok=True)
        return summarize_parts(self.args.output, self.record, self.parts)

    def _write_part(self, part: range, schema: pa.Schema, process: ProcessRows, bar: tqdm) -> None:
        """Write one part and the list of its skipped rows."""
        path, skipped = self.path(part), []
        try:
            with atomic_parquet(path, schema) as parquet:
                rows = self._process_rows(process, part, skipped, bar)
                while row_group := list(itertools.islice(rows, ROWS_PER_GROUP)):
                    for row in row_group:
                        row[IMAGE_COLUMN] = row[self.args.image_column]
                    parquet.write_table(pa.Table.from_pylist(row_group, schema=schema))
                if skipped:
                    write_skipped_rows(skipped_path(path), skipped)
                else:
                    skipped_path(path).unlink(missing_ok=True)  # a killed run may have left a list
        except FileNotFoundError:
            if not path.is_file():  # otherwise another process wrote the same part and removed our temporary file
                raise

    def _process_rows(
        self, process: ProcessRows, part: range, skipped: list[SkippedRow], bar: tqdm
    ) -> Iterator[dict[str, Any]]:
        """Iterate over the valid rows of a part with their new columns; append the other rows to `skipped`."""
        rows = itertools.islice(self.source.rows(part.start), len(part))
        numbered = zip(part, rows, strict=True)  # `strict` raises if the source has lost rows
        while batch := list(itertools.islice(numbered, self.args.batch_rows)):
            # The threads end before the model computes, because they would slow down its own threads.
            with ThreadPoolExecutor(DECODER_THREADS) as threads:
                results = list(threads.map(self._prepare_row, (row for _, row in batch)))
            valid_rows = [row for row in results if not isinstance(row, BadRow)]
            processed = iter(process([dict(row) for row in valid_rows]) if valid_rows else [])
            for (number, _), row in zip(batch, results, strict=True):
                result = row if isinstance(row, BadRow) else next(processed)
                if isinstance(result, BadRow):
                    skipped.append(
                        SkippedRow(self.source.name, self.source.split, number, result.reason, result.detail)
                    )
                else:
                    yield row | result
            bar.update(len(batch))

    def _prepare_row(self, row: dict[str, Any]) -> dict[str, Any] | BadRow:
        """Return a row with the bytes of its image and its captions as lists of texts, or a BadRow if it is invalid."""
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
    """Open a parquet writer whose file gets its name when the block ends, and is deleted if the block fails.

    Raises OSError if the disk is full.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        # Dictionaries and statistics of image bytes cost time and have no use.
        with pq.ParquetWriter(file, schema, use_dictionary=False, write_statistics=False) as parquet:
            yield parquet
        file.flush()
        os.fsync(file.fileno())


def batch_by_length(items: Iterable[S], max_length: int, max_items: int = sys.maxsize) -> Iterator[list[S]]:
    """Group items in order. A group has at most `max_items` items with a total length of at most `max_length`.

    An item that is longer than `max_length` is a group of its own.
    """
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


# The output folder


def part_path(output: Path, split: str, part: range) -> Path:
    """Return the path of the parquet file of a part."""
    return output / f"{split}-{part.start:09d}-{part.stop:09d}.parquet"


def skipped_path(path: Path) -> Path:
    """Return the path of the list of skipped rows of a part; the file exists only if rows were skipped."""
    return path.with_suffix(".skipped.jsonl")


def read_stage_record(output: Path | str) -> dict[str, Any]:
    """Read the `stage.json` of a folder. Raises ValueError if it is missing or was not written by a stage."""
    path = Path(output) / STAGE_FILE
    if not path.is_file():
        raise ValueError(f"{output} is not the output of a stage: it has no {STAGE_FILE}.")
    try:
        record = read_json(path, **RECORD_TYPES)
        rows, split, size = record["source"].get("rows"), record["source"].get("split"), record["rows_per_part"]
        is_valid = type(rows) is int and 0 <= rows < MAX_ROWS and size >= 1
        if not is_valid or not re.fullmatch(SPLIT_NAME_PATTERN, str(split)):
            raise ValueError(f"{path} has invalid values: {rows!r} rows of split {split!r}, {size} rows per part")
    except ValueError as error:
        raise ValueError(f"{error}. Restore the file, or remove {output} and run its stage again.") from error
    return record


def claim_folder(output: Path, record: dict[str, Any]) -> None:
    """Write `stage.json` into a new folder, or check that an existing folder belongs to the same stage and settings.

    Raises ValueError, which names the differences, if the folder has other settings, or if it holds other parquet
    files.
    """
    path = output / STAGE_FILE
    if not path.is_file():
        if output.exists() and not output.is_dir():
            raise ValueError(f"The output folder {output} is a file. Choose another --output.")
        if any(output.glob("*.parquet")):
            raise ValueError(
                f"{output} holds parquet files but no {STAGE_FILE}: no stage wrote them. Choose another --output."
            )
        # Several tasks may write this file. If another task has written other settings, the comparison below fails.
        write_json(path, record)
    recorded = read_stage_record(output)
    # `remove_rows` has deleted the parts with changed rows.
    is_invalidated = recorded["source"].get("fingerprint") is None
    if is_invalidated:
        recorded["source"]["fingerprint"] = record["source"]["fingerprint"]
    if differences := describe_differences(recorded, record):
        raise ValueError(
            f"{output} was made from {recorded['source'].get('name')} with other settings, and all parts of a folder "
            f"must have the same settings. {differences}. Use the old values, choose another --output, or remove this "
            "folder and everything that was made from it."
        )
    if is_invalidated:
        write_json(path, recorded)


def describe_differences(recorded: dict[str, Any], current: dict[str, Any]) -> str:
    """Describe how two stage records differ in values that must be equal (`IDENTITY_KEYS`); empty if they agree."""
    old, new = flatten(_identity(recorded)), flatten(_identity(json.loads(json.dumps(current))))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names)


@dataclass(frozen=True)
class Corrections:
    """Effect of a corrected input on a stage that was made from it.

    Attributes:
        output: Folder of the stage.
        record: Its new `stage.json`, with the corrected input.
        parts: Parquet files that hold a changed row.
        rows: Numbers of the changed rows, counted in the output of the stage.
    """

    output: Path
    record: dict[str, Any]
    parts: list[Path]
    rows: list[int]

    def apply(self) -> None:
        """Delete the changed parts, so that the stage writes them again.

        Lists of skipped rows stay, because corrections do not change them.
        """
        for path in self.parts:
            path.unlink(missing_ok=True)
        # Write the record last, so that an interrupted run finds the same corrections again.
        write_json(self.output / STAGE_FILE, self.record)


def remove_rows(output: Path, rows: Iterable[int]) -> None:
    """Delete the parts that hold changed rows of the source, and let `claim_folder` accept the changed source.

    Args:
        output: Folder of the stage.
        rows: Numbers of the changed rows in the source.
    """
    record = read_stage_record(output)
    write_json(output / STAGE_FILE, record | {"source": record["source"] | {"fingerprint": None}})
    size, total = record["rows_per_part"], record["source"]["rows"]
    for start in sorted({row // size * size for row in rows}):
        part = range(start, min(start + size, total))
        part_path(output, record["source"]["split"], part).unlink(missing_ok=True)


def identity_digest(record: dict[str, Any]) -> str:
    """Return a digest of the values that all parts of a folder must share."""
    return json_digest(_identity(record), sort_keys=True)


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a `stage.json` that all parts of a folder must share."""
    identity = {key: record.get(key) for key in IDENTITY_KEYS}
    return identity | {
        "source": {key: value for key, value in record["source"].items() if key not in IGNORED_SOURCE_KEYS}
    }


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts; the keys of the levels are joined with dots."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def check_complete(output: Path | str) -> StageReport:
    """Count the rows of a complete stage.

    Raises ValueError, with the command that continues, if parts are missing or damaged.
    """
    output, record = Path(output), read_stage_record(output)
    check_finished(output)
    return summarize_parts(output, record, split_rows(record["source"]["rows"], record["rows_per_part"]))


def summarize_parts(output: Path, record: dict[str, Any], parts: Iterable[range]) -> StageReport:
    """Count the rows of parts. Raises ValueError if a part is damaged or has lost rows."""
    rows, skipped, retry = 0, Counter(), f"and run again: {record['command']}"
    for part in parts:
        path = part_path(output, record["source"]["split"], part)
        with open_parquet(path, f". Remove it, {retry}") as file:
            written = file.metadata.num_rows
        reasons = Counter(reason for _, reason in read_skipped_rows(path))
        if written + sum(reasons.values()) != len(part):
            raise ValueError(
                f"{path} has {written} rows and lists {sum(reasons.values())} skipped rows; together there must be "
                f"{len(part)}. Remove both files, {retry}"
            )
        rows, skipped = rows + written, skipped + reasons
    return StageReport(rows, dict(skipped.most_common()))


def read_skipped_rows(part: Path) -> list[tuple[int, str]]:
    """Return the number and reason of each skipped row of a part. Raises ValueError if the list is damaged."""
    path = skipped_path(part)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [(int(line["row"]), str(line["reason"])) for line in map(json.loads, lines)]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove it and its parquet file, and run the stage again."
        ) from error


# The command line


def run_stage_command(
    arguments_type: type[StageArguments], description: str, argv: list[str] | None
) -> StageArguments | None:
    """Parse the flags of a stage, run it, and print the counts.

    Args:
        arguments_type: Class of the stage's flags.
        description: Text of `--help`.
        argv: Command-line words. Default: those of the process.

    Returns:
        The flags; None if the stage needs a manual step first, or if its jobs were submitted to Slurm.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    args = parse_arguments(arguments_type, description, argv)
    if args.pending_manual_step():
        logger.info(
            "Manual step: %s Fill its last column, then run the same command again.", args.request_manual_step()
        )
        return None
    if corrections := args.corrections():
        logger.info("%s was corrected: %s rows are written again.", args.import_file, f"{len(corrections.rows):,}")
        corrections.apply()
    if not run_phases(PhaseStep.from_phases(args, args.phases, arguments_type.__module__.rpartition(".")[2]), args):
        return None
    print(f"{args.output}: {check_complete(args.output)}")
    return args
