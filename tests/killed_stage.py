"""Run a stage, alone or with other tasks, and kill it again and again until it is complete.

    python tests/killed_stage.py DATASET OUTPUT 1,3,2 …

A process gets SIGKILL after a random number of actions (a prepared row, a row group, a list of skipped rows, a rename,
a deletion). Each list of numbers writes its own folder OUTPUT-0, OUTPUT-1, …; its numbers say how many tasks run at the
same time in each round, and the last number is for all further rounds. -2 means two runs of all rows at the same time.
Prints the number of killed processes. All processes are forked from a process that has computed nothing yet.
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
from caption_data.sources import count_missing_stage_rows_and_get_command
from captions.stages import RowStage, StageArguments

MAX_ROUNDS = 200


def shout(rows: list[dict]) -> list[dict | BadRow]:
    """Return the captions in capitals; skip rows whose number ends in 5."""
    return [
        BadRow("ends in five", str(row["number"]))
        if row["number"] % 10 == 5
        else {"captions-xx": [text.upper() for text in row["captions-pt"]]}
        for row in rows
    ]


def arguments(dataset: str, output: str) -> StageArguments:
    return StageArguments(dataset, Path(output), batch_rows=3, rows_per_part=7)


def run(dataset: str, output: str, task: tuple[int, int] = (0, 1), process=shout):
    """Run one task (rank, world_size) of the stage."""
    return RowStage(arguments(dataset, output), *task).run(
        {"captions-xx": CAPTIONS_FEATURE}, {"voice": "loud"}, process
    )


def child(call: Callable[[], object], count: int) -> int:
    """Fork a process that calls `call` and is killed after `count` actions. Returns its process id."""
    process_id = os.fork()
    if process_id:
        return process_id
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
    RowStage._prepare_row = counted(RowStage._prepare_row)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - hides the progress bars until the process ends
    try:
        call()
    finally:
        os._exit(0)


def was_killed(process_id: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]) == -signal.SIGKILL


def kill_stage(dataset: str, output: str, generator: random.Random, numbers: list[int]) -> int:
    kills = 0
    for round_number in range(MAX_ROUNDS):
        count = numbers[min(round_number, len(numbers) - 1)]
        tasks = [(rank, count) for rank in range(count)] or [(0, 1)] * -count
        calls = [lambda task=task: run(dataset, output, task) for task in tasks]
        process_ids = [child(call, generator.randint(1, 16)) for call in calls]
        kills += sum([was_killed(process_id) for process_id in process_ids])
        if (Path(output) / "stage.json").is_file() and not count_missing_stage_rows_and_get_command(Path(output))[0]:
            return kills
    sys.exit(f"{output} is not complete after {MAX_ROUNDS} rounds")


if __name__ == "__main__":
    for place, text in enumerate(sys.argv[3:]):
        numbers = [int(number) for number in text.split(",")]
        kills = kill_stage(sys.argv[1], f"{sys.argv[2]}-{place}", random.Random(place), numbers)
        print(kills, flush=True)  # the next forks would also write what is still in the buffer
