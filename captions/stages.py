"""One stage of building a caption data set: rows in, the same rows with more columns out, in parts written whole.

    run_stage(StageArguments("images", Path("generated")), {"captions-pt": CAPTIONS}, {"model": "…"}, process)

The parts of a folder (`caption_data.stage_folder`) are one data set for `open_source`, and for the next stage. The
tasks of a stage share the parts out by `rank` and `world_size`, which `common.executors` gives them, with nothing
between them but the file system. A task that was killed is run again and writes the parts that are missing, so that no
row is doubled or lost. Images pass through as their original bytes, and no more rows are in memory than are worked on
at once.
"""

import itertools
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from tqdm.auto import tqdm

from caption_data.columns import CAPTION_COLUMN, IMAGE, caption_texts, fitting, passed_features
from caption_data.image_files import image_bytes
from caption_data.rows import BadRow, Skipped, write_skipped
from caption_data.sources import Source, open_source
from caption_data.stage_folder import (
    DIGEST_KEY,
    StageReport,
    all_parts,
    check_complete,
    claim,
    finished_ranks,
    identity_digest,
    part_path,
    progress,
    remove_leftovers,
    share,
    skipped_path,
)
from captions.stage_arguments import StageArguments
from common.cli import parse
from common.environment import package_versions
from common.executors import EXPECTED, TasksFailed, Work, execute
from common.files import no_space_left
from common.tasks import Phase

logger = logging.getLogger("capivara")

STAGE_VERSION = 1  # of the folder's form; raise it when parts change
ROWS_PER_GROUP = 16  # of a parquet file: what a reader of one row reads
PREPARED_ROWS = 50_000  # whose translations are in memory at once
# What a stage does with some rows: for each, its new columns, or why it is left out.
Process = Callable[[list[dict[str, Any]]], list[dict[str, Any] | BadRow]]


def run_stage(
    args: StageArguments,
    columns: dict[str, Any],
    settings: dict[str, Any],
    process: Process,
    title: str = "Rows",
    any_of: Sequence[str] = (),
    rank: int = 0,
    world_size: int = 1,
    prepare: Callable[[Source, list[range]], None] | None = None,
) -> StageReport:
    """Write the parts of one task that are missing.

    Args:
        args: of the command.
        columns: new column -> its feature of `datasets`. A column of the same name is replaced.
        settings: what the new columns depend on, such as the model; a folder holds parts of the same settings only.
        process: called with at most `args.batch_rows` rows. Their image is `{"bytes", "path"}`, undecoded but there;
            columns of captions are lists of texts, where the source has the column. It must not depend on how rows
            are batched, but in rounding.
        title: of the progress bar.
        any_of: columns of which the source must have one.
        rank: number of the task, from 0.
        world_size: number of tasks.
        prepare: called with the source and some neighbouring parts, `PREPARED_ROWS` rows at most, before they are made.

    Returns:
        Of this task.

    Raises:
        ValueError: the folder is of other settings or another source (what differs is named), the source is an
            unfinished stage, or it lacks the images or the columns.
        OSError: the disk is full; the parts that are there are whole, and the same command makes the others.
    """
    StageArguments.__post_init__(args)  # a subclass may have checks of its own in its place
    source, features = _opened(args, columns, any_of)
    record = claim(args.output, _record(args, source, features, settings | args.image_settings()))
    parts = share(all_parts(len(source), record["rows_per_part"]), rank, world_size)
    reader = _Reader(args, source, features, process)
    prepared = (lambda group: prepare(source, group)) if prepare else None
    write_parts(args.output, record, features.arrow_schema, parts, reader.rows, title, prepared, show=rank == 0)
    return progress(args.output, record, parts)


def finished_row_tasks(args: StageArguments, world_size: int) -> list[int]:
    """`Phase.finished` of a phase that is `run_stage`; removes what kills have left of parts that are there."""
    remove_leftovers(args.output)
    try:
        source = stage_source(args)
    except (ValueError, OSError):  # the stage before is unfinished; any other fault is for the tasks to report
        return []
    return finished_ranks(args.output, _plain_record(args, source), world_size)


def write_parts(
    output: Path,
    record: dict[str, Any],
    schema: pa.Schema,
    parts: list[range],
    rows: Callable[[range, list[Skipped], tqdm], Iterator[dict[str, Any]]],
    title: str,
    prepare: Callable[[list[range]], None] | None = None,
    show: bool = True,
) -> None:
    """Write those of `parts` that are missing, each with the list of its rows that were left out, whole or not at all.

    Args:
        output: folder of the stage.
        record: its `stage.json`.
        schema: of the parts.
        parts: row numbers of the source.
        rows: of a part; those that are left out are appended to the list, and the bar is moved on.
        title: of the progress bar.
        prepare: called before some neighbouring parts, `PREPARED_ROWS` rows at most, are made.
        show: whether there is a progress bar.

    Raises:
        OSError: the disk is full. What `rows` raises passes, with a note that names the part.
    """
    schema = schema.with_metadata({**(schema.metadata or {}), DIGEST_KEY: identity_digest(record).encode()})
    paths = {part: part_path(output, record["source"]["split"], part) for part in parts}
    missing = [part for part in parts if not paths[part].is_file()]
    done = sum(map(len, parts)) - sum(map(len, missing))
    try:
        with tqdm(total=sum(map(len, parts)), initial=done, desc=title, unit="row", disable=not show) as bar:
            for group in _groups(missing):
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


def stage_source(args: StageArguments) -> Source:
    """The rows that a stage reads. Raises ValueError as `open_source` does."""
    return open_source(args.dataset, args.split, args.image_column, in_place=True, **args.limits())


def _opened(args: StageArguments, columns: dict[str, Any], any_of: Sequence[str]) -> tuple[Source, Features]:
    """The rows, and the columns of the output."""
    source = stage_source(args)
    for damage in source.damaged:
        logger.warning("A damaged archive, read up to there: %s", damage.detail)
    passed = passed_features(source, args.image_column, args.renamed())
    if any_of and passed.keys().isdisjoint(any_of):
        raise ValueError(
            f"{source.where} has no column {' or '.join(any_of)}; there are {list(passed)}. A column of another name "
            f"becomes one by --rename OLD={any_of[0]}."
        )
    return source, Features(passed | columns)


def _groups(parts: list[range]) -> Iterator[list[range]]:
    """Parts in their order, of `PREPARED_ROWS` rows at most, but for a single one."""
    group: list[range] = []
    for part in parts:
        if group and sum(map(len, group)) + len(part) > PREPARED_ROWS:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _write_part(path: Path, schema: pa.Schema, part: range, rows: Callable, bar: tqdm) -> None:
    temporary = path.with_name(f".{path.name}.{socket.gethostname().replace('.', '-')}-{os.getpid()}.tmp")
    skipped: list[Skipped] = []
    try:
        # No dictionary and no statistics: of images they cost time and serve nobody.
        options = {"use_dictionary": False, "write_statistics": False}
        with temporary.open("wb") as file:
            with pq.ParquetWriter(file, schema, **options) as parquet:
                left = rows(part, skipped, bar)
                while group := list(itertools.islice(left, ROWS_PER_GROUP)):
                    parquet.write_table(pa.Table.from_pylist(group, schema=schema))
            file.flush()
            os.fsync(file.fileno())
        if path.is_file():  # another process was quicker
            return
        if skipped:
            write_skipped(skipped_path(path), skipped)
        else:
            skipped_path(path).unlink(missing_ok=True)  # of a killed run that left out others
        temporary.rename(path)
    except FileNotFoundError:
        if not path.is_file():
            raise
        # Another process has written the same part meanwhile, and cleaned up.
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class _Reader:
    """Rows of the source with their new columns; see `run_stage`."""

    args: StageArguments
    source: Source
    features: Features
    process: Process

    def rows(self, part: range, skipped: list[Skipped], bar: tqdm) -> Iterator[dict[str, Any]]:
        """What is written, batch by batch; rows that are left out are appended to `skipped`."""
        rows = itertools.islice(self.source.rows(part.start), len(part))
        numbered = zip(part, rows, strict=True)  # a source that has become shorter must not lose rows in silence
        while batch := list(itertools.islice(numbered, self.args.batch_rows)):
            results: list[dict[str, Any] | BadRow] = [self._prepared(row) for _, row in batch]
            good = [index for index, row in enumerate(results) if not isinstance(row, BadRow)]
            if good:
                done = self.process([dict(results[index]) for index in good])
                for index, new in zip(good, done, strict=True):
                    results[index] = new if isinstance(new, BadRow) else results[index] | new
            for (number, _), result in zip(batch, results, strict=True):
                if isinstance(result, BadRow):
                    line = (self.source.name, self.source.split, number, result.reason, result.detail)
                    skipped.append(Skipped(*line))
                else:
                    yield self._output(result)
            bar.update(len(batch))

    def _prepared(self, row: dict[str, Any]) -> dict[str, Any] | BadRow:
        """A row of the source with the bytes of its image, its captions as lists of texts; or what is wrong with it."""
        names = self.args.renamed()
        row = {names.get(old, old): value for old, value in row.items()}
        try:
            image = row.get(self.args.image_column)
            row[self.args.image_column] = {
                "bytes": image_bytes(image, self.source.files),
                "path": Path(image.get("path") or "").name or None,
            }
            for name in row:
                if CAPTION_COLUMN.fullmatch(name):
                    row[name] = caption_texts(row[name], name)
        except BadRow as bad:
            return bad
        return row

    def _output(self, row: dict[str, Any]) -> dict[str, Any]:
        row = row | {IMAGE: row[self.args.image_column]}
        if self.source.features is not None:
            return {name: row.get(name) for name in self.features}
        return {name: fitting(row.get(name), feature) for name, feature in self.features.items()}


def _plain_record(args: StageArguments, source: Source) -> dict[str, Any]:
    """What of `stage.json` is known before a model is loaded."""
    return {
        "version": STAGE_VERSION,
        "command": args.command(),
        "source": {
            "name": args.dataset,
            "split": args.split,
            "rows": len(source),
            "fingerprint": source.fingerprint(),
            "damaged": [damage.detail for damage in source.damaged],
        },
        "rows_per_part": args.rows_per_part,
    }


def _record(args: StageArguments, source: Source, features: Features, settings: dict[str, Any]) -> dict[str, Any]:
    """`stage.json`."""
    return _plain_record(args, source) | {
        "settings": settings,
        "columns": {name: repr(feature) for name, feature in features.items()},
        "versions": package_versions(),
    }


def read_rows(args: StageArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """The stage of a split that no other stage works on: its rows as they are."""
    return run_stage(args, {}, {}, lambda rows: [{} for _ in rows], rank=rank, world_size=world_size)


def run_stage_here(args: StageArguments) -> bool:
    """`execute` all phases of one stage."""
    try:
        return execute(Work.of(args), args)
    except EXPECTED as error:
        if not (args.output.exists() or isinstance(error, TasksFailed)):  # nothing was begun, the error says it all
            shutil.rmtree(args.logs, ignore_errors=True)
        raise


def stage_main(
    kind: type[StageArguments],
    description: str,
    argv: list[str] | None,
    run: Callable[[Any], bool] = run_stage_here,
) -> StageArguments | None:
    """Parse the flags of a stage, run it, and print what was done; an error ends the process in one line.

    Args:
        kind: of the arguments.
        description: text of `--help`.
        argv: the words, `sys.argv[1:]` where None.
        run: called with the arguments; says whether the stage is complete.

    Returns:
        The arguments, where the stage is complete.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        args = parse(kind, description, argv)
        if not run(args):
            return None
        print(f"{args.output}: {check_complete(args.output)}")
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    return args


PHASES = {"rows": Phase(read_rows, finished_row_tasks)}
