"""One stage of building a caption data set: rows in, the same rows with more columns out, in parts written whole.

    run_stage(StageArguments("images", Path("generated")), {"captions-pt": CAPTIONS}, {"model": "…"}, process)

The parts of a folder (`caption_data.stage_folder`) are one data set for `open_source`, and for the next stage.
Machines share a stage by `--shard i/n`, with nothing between them but the file system: each writes the parts of its
rows. What was killed goes on at the first part that is missing, so that no row is doubled or lost. Images pass through
as their original bytes, and no more rows are in memory than are worked on at once.
"""

import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from tqdm.auto import tqdm

from caption_data.columns import CAPTION_COLUMN, CAPTIONS, IMAGE, SIMILARITIES, caption_texts, fitting, passed_features
from caption_data.image_files import image_bytes
from caption_data.rows import BadRow, Skipped, write_skipped
from caption_data.sources import Source, open_source
from caption_data.stage_folder import (
    DIGEST_KEY,
    StageReport,
    all_parts,
    check_complete,
    claim,
    identity_digest,
    part_path,
    progress,
    remove_leftovers,
    skipped_path,
)
from captions.stage_arguments import Shard, StageArguments
from common.environment import package_versions
from common.files import no_space_left

__all__ = [
    "CAPTIONS",
    "SIMILARITIES",
    "Process",
    "Shard",
    "StageArguments",
    "StageReport",
    "caption_texts",
    "check_complete",
    "run_stage",
]

logger = logging.getLogger("capivara")

STAGE_VERSION = 1  # of the folder's form; raise it when parts change
ROWS_PER_GROUP = 16  # of a parquet file: what a reader of one row reads
# What a stage does with some rows: for each, its new columns, or why it is left out.
Process = Callable[[list[dict[str, Any]]], list[dict[str, Any] | BadRow]]


def run_stage(
    args: StageArguments,
    columns: dict[str, Any],
    settings: dict[str, Any],
    process: Process,
    title: str = "Rows",
    any_of: Sequence[str] = (),
) -> StageReport:
    """Write the parts of this shard that are missing.

    Args:
        args: of the command.
        columns: new column -> its feature of `datasets`. A column of the same name is replaced.
        settings: what the new columns depend on, such as the model; a folder holds parts of the same settings only.
        process: called with at most `args.batch_rows` rows. Their image is `{"bytes", "path"}`, undecoded but there;
            columns of captions are lists of texts, where the source has the column. It must not depend on how rows
            are batched, but in rounding.
        title: of the progress bar.
        any_of: columns of which the source must have one.

    Returns:
        Of this shard.

    Raises:
        ValueError: the folder is of other settings or another source (what differs is named), the source is an
            unfinished stage, it lacks the images or the columns, or a shard is no shard.
        OSError: the disk is full; the parts that are there are whole, and the same command goes on.
    """
    StageArguments.__post_init__(args)  # a subclass may have checks of its own in its place
    source, features = _opened(args, columns, any_of)
    record = claim(args.output, _record(args, source, features, settings | args.image_settings()))
    parts = Shard.of(args.shard).of_parts(all_parts(len(source), record["rows_per_part"]))
    try:
        _write_missing(_Writer(args, source, features, record, process), parts, title)
    except BaseException as error:
        if no_space_left(error):
            raise OSError(
                f"No space left on the disk while writing {args.output}. What is there is whole; free some space, and "
                "run the same command again"
            ) from error
        raise
    return progress(args.output, record, parts)


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


def _write_missing(writer: "_Writer", parts: list[range], title: str) -> None:
    args = writer.args
    with tqdm(total=sum(map(len, parts)), desc=title, unit="row") as bar:
        for part in parts:
            if part_path(args.output, args.split, part).is_file():
                bar.update(len(part))
            else:
                writer.write(part, bar)
    remove_leftovers(args.output)


@dataclass
class _Writer:
    """Writes parts; see `run_stage`."""

    args: StageArguments
    source: Source
    features: Features
    record: dict[str, Any]
    process: Process

    def write(self, part: range, bar: tqdm) -> None:
        """One part and the list of its rows that were left out, whole or not at all."""
        path = part_path(self.args.output, self.args.split, part)
        temporary = path.with_name(f".{path.name}.{socket.gethostname().replace('.', '-')}-{os.getpid()}.tmp")
        skipped: list[Skipped] = []
        schema = self.features.arrow_schema
        schema = schema.with_metadata({**schema.metadata, DIGEST_KEY: identity_digest(self.record).encode()})
        try:
            # No dictionary and no statistics: of images they cost time and serve nobody.
            options = {"use_dictionary": False, "write_statistics": False}
            with temporary.open("wb") as file:
                with pq.ParquetWriter(file, schema, **options) as parquet:
                    rows = self._rows(part, skipped, bar)
                    while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
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

    def _rows(self, part: range, skipped: list[Skipped], bar: tqdm) -> Iterator[dict[str, Any]]:
        """What is written, batch by batch; rows that are left out are appended to `skipped`."""
        rows = itertools.islice(self.source.rows(part.start), len(part))
        numbered = zip(part, rows, strict=True)  # a source that has become shorter must not lose rows in silence
        while batch := list(itertools.islice(numbered, self.args.batch_rows)):
            results: list[dict[str, Any] | BadRow] = [self._prepared(row) for _, row in batch]
            good = [place for place, row in enumerate(results) if not isinstance(row, BadRow)]
            if good:
                done = self.process([dict(results[place]) for place in good])
                for place, new in zip(good, done, strict=True):
                    results[place] = new if isinstance(new, BadRow) else results[place] | new
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


def _record(args: StageArguments, source: Source, features: Features, settings: dict[str, Any]) -> dict[str, Any]:
    """`stage.json`."""
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
        "settings": settings,
        "columns": {name: repr(feature) for name, feature in features.items()},
        "versions": package_versions(),
    }
