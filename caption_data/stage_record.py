"""What tells a folder of captions in the making: its `stage.json`, and by the names of its parts whether all are there.

`captions.stage_folder` writes such a folder; whoever reads a data set must not take an unfinished one for the whole.
"""

import re
from pathlib import Path
from typing import Any

from capivara_common.files import read_json
from capivara_common.tasks import all_parts

SPLIT = r"\w+([.-]\w+)*"  # names of files begin with it
STAGE_FILE = "stage.json"
RECORD = {"version": int, "command": str, "source": dict, "rows_per_part": int}
RECORD |= {"settings": dict, "columns": dict, "versions": dict}
SOURCE = {"name": str, "split": str, "rows": int}
MAX_ROWS = 10**9  # names of parts have nine digits
MAX_SHOWN = 300  # letters of what a damaged file holds


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


def refuse_missing(output: Path, record: dict[str, Any], missing: list[range]) -> None:
    """Raise ValueError, with the command that goes on, where parts are missing."""
    if missing:
        named = ", ".join(f"{part.start} to {part.stop - 1}" for part in joined(missing)[:5])
        raise ValueError(
            f"{output} is unfinished: of its {record['source']['rows']} rows, {sum(map(len, missing))} are missing "
            f"({named}{', …' * (len(joined(missing)) > 5)}). Other tasks may be at work on them; this command makes "
            f"what is missing: {record['command']}"
        )


def joined(parts: list[range]) -> list[range]:
    """Neighbours as one range."""
    found: list[range] = []
    for part in parts:
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return found
