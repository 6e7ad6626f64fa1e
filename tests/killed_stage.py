"""A stage that is killed again and again, alone or with other tasks at its side, until it is complete.

    python tests/killed_stage.py DATASET OUTPUT 1,3,2 …

A process gets SIGKILL after some of the things that it does (a row batch, a row group, a list, a rename), how many is
random. Each list makes a folder OUTPUT-0, OUTPUT-1, … of its own; its numbers say how many tasks run at once in each
round, the last one in all further rounds; -2 is two runs of all rows at the same time. Prints how many were killed. The
processes are forks of one that has computed nothing yet.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

import captions.stages
from capivara_common.image_files import BadRow
from caption_data.rows import CAPTIONS_FEATURE
from caption_data.sources import find_missing_rows
from captions.stages import RowStage, StageArguments

MAX_ROUNDS = 200


def shout(rows: list[dict]) -> list[dict | BadRow]:
    """Captions in capitals; a row whose number ends in 5 is left out."""
    return [
        BadRow("ends in five", str(row["number"]))
        if row["number"] % 10 == 5
        else {"captions-xx": [text.upper() for text in row["captions-pt"]]}
        for row in rows
    ]


def arguments(dataset: str, output: str) -> StageArguments:
    return StageArguments(dataset, Path(output), batch_rows=3, rows_per_part=7)


def run(dataset: str, output: str, task: tuple[int, int] = (0, 1), process=shout):
    """One task, (rank, world_size), of the stage."""
    return RowStage(arguments(dataset, output), *task).run(
        {"captions-xx": CAPTIONS_FEATURE}, {"voice": "loud"}, process
    )


def child(call: Callable[[], object], count: int) -> int:
    """A process that does `call` until `count` things are done, or to the end; returns its number."""
    number = os.fork()
    if number:
        return number
    left = [count]

    def counted(function):
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    pq.ParquetWriter.write_table = counted(pq.ParquetWriter.write_table)
    captions.stages.write_skipped_rows = counted(captions.stages.write_skipped_rows)
    RowStage._prepared = counted(RowStage._prepared)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - the progress bars; it lasts as long as the process
    try:
        call()
    finally:
        os._exit(0)


def was_killed(number: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL


def kill_stage(dataset: str, output: str, generator: random.Random, numbers: list[int]) -> int:
    kills = 0
    for number in range(MAX_ROUNDS):
        together = numbers[min(number, len(numbers) - 1)]
        tasks = [(rank, together) for rank in range(together)] or [(0, 1)] * -together
        calls = [lambda task=task: run(dataset, output, task) for task in tasks]
        kills += sum([was_killed(number) for number in [child(call, generator.randint(1, 16)) for call in calls]])
        if (Path(output) / "stage.json").is_file() and not find_missing_rows(Path(output))[0]:
            return kills
    sys.exit(f"{output} is not complete after {MAX_ROUNDS} rounds")


if __name__ == "__main__":
    for place, text in enumerate(sys.argv[3:]):
        wanted = [int(number) for number in text.split(",")]
        kills = kill_stage(sys.argv[1], f"{sys.argv[2]}-{place}", random.Random(place), wanted)
        print(kills, flush=True)  # what is not written yet would be written by the next forks, too
