"""One stage of building a caption data set: rows in, the same rows with more columns out, in parts written whole.

    stage = RowStage(StageArguments("images", Path("generated")))
    stage.run({"captions-pt": CAPTIONS}, {"model": "…"}, process)
    python -c "from captions.stages import check_complete; print(check_complete('data/pt/3-score/train'))"

A part is a parquet file of consecutive rows of the source, named by their numbers, with the rows that were left out in
a list beside it. Where parts begin depends on `stage.json` alone, not on who writes them: the tasks of a stage share
them out by `rank` and `world_size`, with nothing between them but the file system. The names of whole files alone say
what is done, so that a task that was killed is run again, in any number of tasks, and no row is doubled or lost. The
parts of a folder are one data set for `open_split`, and for the next stage. Images pass through as their bytes, and no
more rows are in memory than are worked on at once.
"""

import itertools
import json
import logging
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image
from tqdm.auto import tqdm

from capivara_common.cli import parse, user_errors
from capivara_common.environment import package_versions
from capivara_common.executors import EXPECTED, TasksFailed, Work, execute
from capivara_common.files import no_space_left, read_json, write_json
from capivara_common.image_files import BadRow, image_bytes
from capivara_common.tasks import Phase, all_parts, share
from caption_data.rows import CAPTION_COLUMN, CAPTIONS, Skipped, caption_texts, digest_of, write_skipped
from caption_data.sources import STAGE_FILE, Split, opened_parquet, refuse_unfinished
from captions.in_place import fingerprint, open_in_place
from captions.languages import groups
from captions.stage_arguments import SPLIT, StageArguments

IMAGE = "image"  # the authors' name, which the image column has in every output
STAGE_VERSION = 1  # of the folder's form; raise it when parts change
IDENTITY = ("version", "source", "rows_per_part", "settings", "columns")  # what parts of one folder have in common
NOT_COMPARED = ("name", "damaged")  # of the source: another machine may reach it by another path
RECORD = {"version": int, "command": str, "source": dict, "rows_per_part": int}
RECORD |= {"settings": dict, "columns": dict, "versions": dict}
SOURCE = {"name": str, "split": str, "rows": int}
MAX_ROWS = 10**9  # names of parts have nine digits
MAX_SHOWN = 300  # letters of what a damaged file holds
DIGEST_KEY = b"capivara_stage"  # in the schema of a part: `identity_digest` of its stage.json
ROWS_PER_GROUP = 16  # of a parquet file: what a reader of one row reads
PREPARED_ROWS = 50_000  # whose translations are in memory at once
# What a stage does with some rows: for each, its new columns, or why it is left out.
Process = Callable[[list[dict[str, Any]]], list[dict[str, Any] | BadRow]]

logger = logging.getLogger("capivara")


@dataclass(frozen=True)
class StageReport:
    """What of a stage is done."""

    rows: int  # that were written
    skipped: dict[str, int]  # reason -> number of the rows that were left out
    missing: int = 0  # rows that no task has written yet

    def __str__(self) -> str:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.skipped.items())
        return (
            f"{self.rows:,} rows written, {sum(self.skipped.values()):,} left out"
            + f" ({reasons})" * bool(reasons)
            + f", {self.missing:,} not done yet" * bool(self.missing)
        )


class RowStage:
    """The rows that a stage reads, opened and checked, and what it writes of them.

    Raises:
        ValueError: there is no such data set, it is an unfinished stage, or it lacks the images or the columns.
    """

    def __init__(self, args: StageArguments, read: bool = True):
        """`read` is False where an earlier phase has seen that the first row can be read."""
        StageArguments.__post_init__(args)  # in a process of its own PIL has its own limit, too
        self.args, self.source = args, stage_source(args)
        for damage in self.source.damaged:
            logger.warning("A damaged archive, read up to there: %s", damage.detail)
        if read:
            next(self.source.rows(), None)  # damage in the first rows is told before a model is loaded, or paid for
        self.features = passed_features(self.source, args.image_column, args.renamed())
        needed = args.needed_columns()
        if needed and self.features.keys().isdisjoint(needed):
            raise ValueError(
                f"{self.source.where} has no column {' or '.join(needed)}; there are {list(self.features)}. A column "
                f"of another name becomes one by --rename OLD={needed[0]}."
            )

    def run(
        self,
        columns: dict[str, Any],
        settings: dict[str, Any],
        process: Process,
        title: str = "Rows",
        rank: int = 0,
        world_size: int = 1,
        prepare: Callable[[list[range]], None] | None = None,
    ) -> StageReport:
        """Write the parts of one task that are missing.

        Args:
            columns: new column -> its feature of `datasets`. A column of the same name is replaced.
            settings: what the new columns depend on, such as the model; a folder holds parts of the same ones only.
            process: called with at most `args.batch_rows` rows. Their image is `{"bytes", "path"}`, undecoded but
                there; columns of captions are lists of texts, where the source has the column. It must not depend on
                how rows are batched, but in rounding.
            title, rank, world_size, prepare: as of `write_parts`.

        Raises:
            ValueError: the folder is of other settings or another source; what differs is named.
            OSError: the disk is full; the parts that are there are whole, and the same command makes the others.
        """
        features = Features(self.features | columns)
        record = plain_record(self.source, self.args, self.args.rows_per_part) | {
            "settings": settings | self.args.image_settings(),
            "columns": {name: repr(feature) for name, feature in features.items()},
            "versions": package_versions(),
        }

        def rows(part: range, skipped: list[Skipped], bar: tqdm) -> Iterator[dict[str, Any]]:
            for row in self._rows(process, part, skipped, bar):
                row[IMAGE] = row[self.args.image_column]
                yield {name: row.get(name) for name in features}

        return write_parts(self.args.output, record, features.arrow_schema, rows, title, rank, world_size, prepare)

    def _rows(self, process: Process, part: range, skipped: list[Skipped], bar: tqdm) -> Iterator[dict[str, Any]]:
        """Those that are not left out, with their new columns."""
        rows = itertools.islice(self.source.rows(part.start), len(part))
        numbered = zip(part, rows, strict=True)  # a source that has become shorter must not lose rows in silence
        while batch := list(itertools.islice(numbered, self.args.batch_rows)):
            results: list[dict[str, Any] | BadRow] = [self._prepared(row) for _, row in batch]
            good = [index for index, row in enumerate(results) if not isinstance(row, BadRow)]
            if good:
                done = process([dict(results[index]) for index in good])
                for index, new in zip(good, done, strict=True):
                    results[index] = new if isinstance(new, BadRow) else results[index] | new
            for (number, _), result in zip(batch, results, strict=True):
                if isinstance(result, BadRow):
                    skipped.append(Skipped(self.source.name, self.source.split, number, result.reason, result.detail))
                else:
                    yield result
            bar.update(len(batch))

    def _prepared(self, row: dict[str, Any]) -> dict[str, Any] | BadRow:
        """A row of the source with the bytes of its image, its captions as lists of texts; or what is wrong with it."""
        names, column = self.args.renamed(), self.args.image_column
        row = {names.get(old, old): value for old, value in row.items()}
        try:
            data = image_bytes(row.get(column), self.source.files)
            row[column] = {"bytes": data, "path": Path(row[column].get("path") or "").name or None}
            return row | {name: caption_texts(row[name], name) for name in row if CAPTION_COLUMN.fullmatch(name)}
        except BadRow as bad:
            return bad


def passed_features(source: Split, image_column: str, renamed: dict[str, str]) -> Features:
    """The columns that a stage passes on, by their names in its output: all but those without a plain type of Arrow.

    Raises:
        ValueError: there are no images, or a name stands for two columns.
    """
    names = renamed | {image_column: IMAGE}
    if image_column not in source.columns:
        raise ValueError(f"{source.where} has no image column {image_column!r}; there are {source.columns}.")
    for old in names:
        if old not in source.columns:
            raise ValueError(f"rename: {source.where} has no column {old!r}; there are {source.columns}.")
    features = Features()
    for old, feature in source.features.items():
        new = names.get(old, old)
        if new in features or (new != old and new in source.columns and new not in names):
            raise ValueError(f"{source.where}: two columns would be named {new!r}. Rename one with --rename OLD=NEW.")
        if CAPTION_COLUMN.fullmatch(new):
            features[new] = CAPTIONS
        elif "extension<" not in str(Features({new: feature}).arrow_schema.field(new).type):
            features[new] = feature
    return Features(features | {IMAGE: Image()})


def stage_source(args: StageArguments) -> Split:
    """The rows that a stage reads. Raises ValueError as `open_split` does."""
    return open_in_place(args.dataset, args.split, args.image_column, **args.limits())


def plain_record(source: Any, args: StageArguments, rows_per_part: int) -> dict[str, Any]:
    """What of `stage.json` is known before a model is loaded; `source` has the rows."""
    return {
        "version": STAGE_VERSION,
        "command": args.command(),
        "source": {
            "name": source.name,
            "split": source.split,
            "rows": len(source),
            "fingerprint": fingerprint(source) if isinstance(source, Split) else source.fingerprint(),
            "damaged": [damage.detail for damage in source.damaged],
        },
        "rows_per_part": rows_per_part,
    }


def write_parts(
    output: Path,
    record: dict[str, Any],
    schema: pa.Schema,
    rows: Callable[[range, list[Skipped], tqdm], Iterator[dict[str, Any]]],
    title: str,
    rank: int,
    world_size: int,
    prepare: Callable[[list[range]], None] | None = None,
) -> StageReport:
    """Write the parts of one task that are missing, each with the list of its rows that were left out, whole or not.

    Args:
        output, record, schema: folder of the stage, its `stage.json`, and what its parts are of.
        rows: of a part; those that are left out are appended to the list, and the bar is moved on.
        title: of the progress bar, which the first task has.
        rank, world_size: number of the task, from 0, and of all tasks.
        prepare: called before some neighbouring parts, `PREPARED_ROWS` rows at most, are made.

    Raises as `RowStage.run`; what `rows` raises passes, with a note that names the part.
    """
    record = claim(output, record)
    parts = share(all_parts(record["source"]["rows"], record["rows_per_part"]), rank, world_size)
    schema = schema.with_metadata({**(schema.metadata or {}), DIGEST_KEY: identity_digest(record).encode()})
    paths = {part: part_path(output, record["source"]["split"], part) for part in parts}
    missing = [part for part in parts if not paths[part].is_file()]
    total, left = sum(map(len, parts)), sum(map(len, missing))
    try:
        with tqdm(total=total, initial=total - left, desc=title, unit="row", disable=rank > 0) as bar:
            for group in groups(missing, PREPARED_ROWS):
                if prepare:
                    prepare(group)
                for part in group:
                    try:
                        _write_part(paths[part], schema, part, rows, bar)
                    except Exception as error:
                        error.add_note(f"rows {part.start} to {part.stop - 1} of {record['source']['split']}")
                        raise
        remove_leftovers(output)
    except BaseException as error:
        if no_space_left(error):
            raise OSError(
                f"No space left on the disk while writing {output}. What is there is whole; free some space, and "
                "run the same command again"
            ) from error
        raise
    return progress(output, record, parts)


def _write_part(path: Path, schema: pa.Schema, part: range, rows: Callable, bar: tqdm) -> None:
    skipped: list[Skipped] = []
    try:
        with whole_parquet(path, schema) as parquet:
            left = rows(part, skipped, bar)
            while group := list(itertools.islice(left, ROWS_PER_GROUP)):
                parquet.write_table(pa.Table.from_pylist(group, schema=schema))
            if path.is_file():
                raise FileExistsError
            if skipped:
                write_skipped(skipped_path(path), skipped)
            else:
                skipped_path(path).unlink(missing_ok=True)  # of a killed run that left out others
    except (FileExistsError, FileNotFoundError):
        if not path.is_file():
            raise
        # Another process has written the same part meanwhile, and maybe cleaned up.


@contextmanager
def whole_parquet(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer of a parquet file that gets its name when the block ends, and vanishes when it fails."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname().replace('.', '-')}-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # No dictionary and no statistics: of images they cost time and serve nobody.
            with pq.ParquetWriter(file, schema, use_dictionary=False, write_statistics=False) as parquet:
                yield parquet
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def stage_record(output: Path | str) -> dict[str, Any]:
    """`stage.json` of a folder. Raises ValueError where there is none, or it is not what a stage has written."""
    path = Path(output) / STAGE_FILE
    if not path.is_file():
        raise ValueError(f"{output} is no output of a stage, it has no {STAGE_FILE}.")
    try:
        record = read_json(path, **RECORD)
        source, rows_per_part = record["source"], record["rows_per_part"]
        good = all(type(source.get(name)) is kind for name, kind in SOURCE.items()) and rows_per_part > 0
        if not good or not 0 <= source["rows"] < MAX_ROWS or not re.fullmatch(SPLIT, source["split"]):
            raise ValueError(f"{path}: what it says of the source can't be, {str(source)[:MAX_SHOWN]}")
    except ValueError as error:
        raise ValueError(f"{error}. Put back a copy of it, or remove {output} and run its stage again.") from error
    return record


def part_path(output: Path, split: str, part: range) -> Path:
    """The file of the rows of a part."""
    return output / f"{split}-{part.start:09d}-{part.stop:09d}.parquet"


def skipped_path(path: Path) -> Path:
    """Where the rows that a part goes without are listed; there is no file where there is none."""
    return path.with_suffix(".skipped.jsonl")


def remove_leftovers(output: Path) -> None:
    """Remove what killed runs left of parts that are there by now; other files may be of tasks at work."""
    for path in output.glob(".*.parquet.*.tmp"):
        if (output / re.sub(r"\.[^.]+\.tmp$", "", path.name[1:])).is_file():
            path.unlink(missing_ok=True)


def claim(output: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Make `output` the folder of this stage, or check that it is; returns the record that is there.

    Raises ValueError where it is of another stage, and what differs is named, or holds other parquet files.
    """
    path = output / STAGE_FILE
    if not path.is_file():
        if output.exists() and not output.is_dir():
            raise ValueError(f"The output folder {output} is a file. Choose another name.")
        if output.is_dir() and any(output.glob("*.parquet")):
            raise ValueError(f"{output} holds parquet files but no {STAGE_FILE}. Choose another --output.")
        write_json(path, record)  # several tasks write the same; else the comparison below fails
    there = stage_record(output)
    old, new = flat(_identity(there)), flat(_identity(json.loads(json.dumps(record))))
    differences = [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ValueError(
            f"{output} was made from {there['source']['name']} with other settings, and parts of two kinds must not "
            f"mix. {'; '.join(differences)}. Give these as they were, choose another --output, or remove this "
            "folder and what was made from it."
        )
    return there


def identity_digest(record: dict[str, Any]) -> str:
    """Of what two runs of a stage must have in common."""
    return digest_of(_identity(record), sort_keys=True)


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: record.get(key) for key in IDENTITY}
    return kept | {"source": {key: value for key, value in record["source"].items() if key not in NOT_COMPARED}}


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of objects within objects, by names with points between."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def missing_parts(output: Path, record: dict[str, Any]) -> list[range]:
    """The parts of a stage that no task has written yet, by the names of its files alone."""
    there, split = {path.name for path in output.glob("*.parquet")}, record["source"]["split"]
    parts = all_parts(record["source"]["rows"], record["rows_per_part"])
    return [part for part in parts if part_path(output, split, part).name not in there]


def unfinished(output: Path) -> int:
    """Rows of a stage that no task has written yet, by the names of its files alone."""
    return sum(map(len, missing_parts(output, stage_record(output))))


def finished_row_tasks(args: StageArguments, world_size: int) -> list[int]:
    """`Phase.finished` of a phase that is a `RowStage`; removes what kills have left of parts that are there."""
    remove_leftovers(args.output)
    try:
        source = stage_source(args)
    except (ValueError, OSError):  # the stage before is unfinished; any other fault is for the tasks to report
        return []
    return finished_ranks(args.output, plain_record(source, args, args.rows_per_part), world_size)


def finished_ranks(output: Path, record: dict[str, Any], world_size: int) -> list[int]:
    """The tasks of a stage that have nothing left to do, by the names of the files alone.

    `record` is of the `stage.json` that the tasks would write: at least `command`, `source` and `rows_per_part`. Parts
    of another command or other rows don't count; the tasks then compare the whole record.
    """
    is_same = False
    if (output / STAGE_FILE).is_file():
        old = stage_record(output)
        same_rows = all(old["source"].get(name) == record["source"][name] for name in ("rows", "fingerprint"))
        is_same = same_rows and old["command"] == record["command"]
    parts = all_parts(record["source"]["rows"], record["rows_per_part"])
    if not parts and not is_same:
        return list(range(1, world_size))  # one task has to say that there are no rows
    missing = set(missing_parts(output, record)) if is_same else set(parts)
    return [rank for rank in range(world_size) if missing.isdisjoint(share(parts, rank, world_size))]


def check_complete(output: Path | str) -> StageReport:
    """Of a stage that is done. Raises ValueError, with the command that goes on, where parts are missing or broken."""
    output, record = Path(output), stage_record(output)
    report = progress(output, record, all_parts(record["source"]["rows"], record["rows_per_part"]))
    refuse_unfinished(output)
    return report


def progress(output: Path, record: dict[str, Any], parts: Iterable[range]) -> StageReport:
    """What of some parts is done. Raises ValueError where one is broken, is of other settings, or has lost rows."""
    rows, skipped, missing, again = 0, Counter(), 0, f"and run again: {record['command']}"
    digests = (identity_digest(record), *record.get("earlier", []))  # those of folders whose tables were corrected
    for part in parts:
        path = part_path(output, record["source"]["split"], part)
        if not path.is_file():
            missing += len(part)
            continue
        with opened_parquet(path, f". Remove it, {again}") as file:
            digest, written = (file.schema_arrow.metadata or {}).get(DIGEST_KEY, b""), file.metadata.num_rows
        if digest.decode() not in digests:
            raise ValueError(
                f"{path} was made with other settings than those of {STAGE_FILE} beside it, or for another stage. "
                f"Remove it, {again}"
            )
        reasons = _reasons(skipped_path(path))
        if written + sum(reasons.values()) != len(part):
            raise ValueError(
                f"{path} has {written} rows and a list of {sum(reasons.values())} that were left out, of "
                f"{len(part)}. Remove both, {again}"
            )
        rows, skipped = rows + written, skipped + reasons
    return StageReport(rows, dict(skipped.most_common()), missing)


def _reasons(path: Path) -> Counter[str]:
    if not path.is_file():
        return Counter()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return Counter(str(json.loads(line)["reason"]) for line in lines)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it and the part beside it, and go on.") from error


def read_rows(args: StageArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """The stage of a split that no other stage works on: its rows as they are."""
    return RowStage(args).run({}, {}, lambda rows: [{} for _ in rows], rank=rank, world_size=world_size)


def run_stage_here(args: StageArguments) -> bool:
    """`execute` all phases of one stage."""
    try:
        return execute(Work.of(args), args)
    except EXPECTED as error:
        if not (args.output.exists() or isinstance(error, TasksFailed)):  # nothing was begun, the error says it all
            shutil.rmtree(args.logs, ignore_errors=True)
        raise


@user_errors
def stage_main(
    kind: type[StageArguments],
    description: str,
    argv: list[str] | None,
    run: Callable[[Any], bool] = run_stage_here,
) -> StageArguments | None:
    """Parse the flags of a stage, run it, and print what was done; an error ends the process in one line.

    Returns the arguments where the stage is complete, of which `run`, called with them, is the judge.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    args = parse(kind, description, argv)
    if not run(args):
        return None
    print(f"{args.output}: {check_complete(args.output)}")
    return args


PHASES = {"rows": Phase(read_rows, finished_row_tasks)}
