"""The folder that a stage writes: its parts, what they were made from, and whether all of them are there.

    python -c "from captions.stage_folder import check_complete; print(check_complete('data/pt/3-score/train'))"

A part is a parquet file of consecutive rows of the source, named by their numbers, with the rows that were left out in
a list beside it. Where parts begin depends on `stage.json` alone, not on who writes them: any number of tasks can share
the work, and another number can finish it. The names of whole files alone say what is done.
"""

import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capivara_common.files import read_json, write_json
from capivara_common.tasks import all_parts, share
from caption_data.rows import digest_of
from caption_data.sources import STAGE_FILE, opened_parquet, refuse_unfinished

IDENTITY = ("version", "source", "rows_per_part", "settings", "columns")  # what parts of one folder have in common
NOT_COMPARED = ("name", "damaged")  # of the source: another machine may reach it by another path
SPLIT = r"\w+([.-]\w+)*"  # names of files begin with it
RECORD = {"version": int, "command": str, "source": dict, "rows_per_part": int}
RECORD |= {"settings": dict, "columns": dict, "versions": dict}
SOURCE = {"name": str, "split": str, "rows": int}
MAX_ROWS = 10**9  # names of parts have nine digits
MAX_SHOWN = 300  # letters of what a damaged file holds
DIGEST_KEY = b"capivara_stage"  # in the schema of a part: `identity_digest` of its stage.json


@dataclass(frozen=True)
class StageReport:
    """What of a stage is done."""

    rows: int  # that were written
    skipped: dict[str, int]  # reason -> number of the rows that were left out
    missing: list[range] = field(default_factory=list)  # rows that no task has written yet

    def __str__(self) -> str:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.skipped.items())
        left = sum(map(len, self.missing))
        return (
            f"{self.rows:,} rows written, {sum(self.skipped.values()):,} left out"
            + f" ({reasons})" * bool(reasons)
            + f", {left:,} not done yet" * bool(left)
        )


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


def missing_parts(output: Path, record: dict[str, Any]) -> list[range]:
    """The parts of a stage that no task has written yet, by the names of its files alone."""
    there, split = {path.name for path in output.glob("*.parquet")}, record["source"]["split"]
    parts = all_parts(record["source"]["rows"], record["rows_per_part"])
    return [part for part in parts if part_path(output, split, part).name not in there]


def joined(parts: list[range]) -> list[range]:
    """Neighbours as one range."""
    found: list[range] = []
    for part in parts:
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return found


def finished_ranks(output: Path, record: dict[str, Any], world_size: int) -> list[int]:
    """The tasks of a stage that have nothing left to do, by the names of the files alone.

    `record` is of the `stage.json` that the tasks would write: at least `command`, `source` and `rows_per_part`. Parts
    of another command or other rows don't count; the tasks then compare the whole record.
    """
    is_there, is_same = (output / STAGE_FILE).is_file(), False
    if is_there:
        old = stage_record(output)
        same_rows = all(old["source"].get(name) == record["source"][name] for name in ("rows", "fingerprint"))
        is_same = same_rows and old["command"] == record["command"]
    parts = all_parts(record["source"]["rows"], record["rows_per_part"])
    if not parts and not is_same:
        return list(range(1, world_size))  # one task has to say that there are no rows
    missing = set(missing_parts(output, record)) if is_same else set(parts)
    return [rank for rank in range(world_size) if missing.isdisjoint(share(parts, rank, world_size))]


def skipped_path(path: Path) -> Path:
    """Where the rows that a part goes without are listed; there is no file where there is none."""
    return path.with_suffix(".skipped.jsonl")


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
    if there["source"].get("fingerprint", "") is None:  # since `source_changes`
        there["source"]["fingerprint"] = record["source"]["fingerprint"]
        write_json(path, there)
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


def source_changes(output: Path) -> None:
    """Let the next `claim` take the source as it is by then, for the parts that are there and for new ones.

    Whoever calls it removes the parts of the rows that change. The others keep the digest of the folder's earlier
    `stage.json`, which joins a list in the new one.
    """
    record = stage_record(output)
    if record["source"].get("fingerprint") is not None:
        record["earlier"] = [*record.get("earlier", []), identity_digest(record)]
        record["source"]["fingerprint"] = None
        write_json(output / STAGE_FILE, record)


def identity_digest(record: dict[str, Any]) -> str:
    """Of what two runs of a stage must have in common."""
    return digest_of(_identity(record), sort_keys=True)


def progress(output: Path, record: dict[str, Any], parts: Iterable[range]) -> StageReport:
    """What of some parts is done. Raises ValueError where one is broken, is of other settings, or has lost rows."""
    rows, skipped, missing = 0, Counter(), []
    for part in parts:
        path = part_path(output, record["source"]["split"], part)
        if not path.is_file():
            missing.append(part)
            continue
        written, reasons = _checked(path, record), _reasons(skipped_path(path))
        if written + sum(reasons.values()) != len(part):
            raise ValueError(
                f"{path} has {written} rows and a list of {sum(reasons.values())} that were left out, of "
                f"{len(part)}. Remove both, and run again: {record['command']}"
            )
        rows, skipped = rows + written, skipped + reasons
    return StageReport(rows, dict(skipped.most_common()), joined(missing))


def check_complete(output: Path | str) -> StageReport:
    """Of a stage that is done. Raises ValueError, with the command that goes on, where parts are missing or broken."""
    output, record = Path(output), stage_record(output)
    report = progress(output, record, all_parts(record["source"]["rows"], record["rows_per_part"]))
    refuse_unfinished(output)
    return report


def unfinished(output: Path) -> list[range]:
    """Rows of a stage that no task has written yet, by the names of its files alone."""
    return joined(missing_parts(output, stage_record(output)))


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: record.get(key) for key in IDENTITY}
    return kept | {"source": {key: value for key, value in record["source"].items() if key not in NOT_COMPARED}}


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of objects within objects, by names with points between."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _checked(path: Path, record: dict[str, Any]) -> int:
    """Rows of a part, which is one of this stage."""
    with opened_parquet(path, f". Remove it, and run again: {record['command']}") as file:
        digest, rows = (file.schema_arrow.metadata or {}).get(DIGEST_KEY, b""), file.metadata.num_rows
    if digest.decode() not in (identity_digest(record), *record.get("earlier", [])):
        raise ValueError(
            f"{path} was made with other settings than those of {STAGE_FILE} beside it, or for another stage. Remove "
            f"it, and run again: {record['command']}"
        )
    return rows


def _reasons(path: Path) -> Counter[str]:
    if not path.is_file():
        return Counter()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return Counter(str(json.loads(line)["reason"]) for line in lines)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it and the part beside it, and go on.") from error
