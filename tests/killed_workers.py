"""Kill caption builds in the middle of a part. Run by tests/test_executors.py.

    python tests/killed_workers.py CONFIG worker:2-score/train run:2-score/train …

Runs one build with two workers per argument. SIGKILL ends one worker, or the whole run, while it writes a part whose
path contains the text after the colon. Prints a JSON list of [exit code, stderr]. Builds are forks of this process,
which has imported everything but computed nothing.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

import captions.build
import captions.score  # imported before the forks, to save time
import captions.select
import captions.stages
from capivara_common import executors
from capivara_common.cli import run_main_and_report_user_errors

MAX_OUTPUT_CHARACTERS = 5000  # only the end of stderr is returned
write_part, write_table = captions.stages.RowStage._write_part, pq.ParquetWriter.write_table


def build_killers(victim: str, place: str, mark: Path) -> tuple[Callable, Callable]:
    """Return replacements of `_write_part` and `write_table` that kill at the first write to a part in `place`."""
    current, run = [""], os.getpid()

    def remember_part(self, part: range, *args, **kwargs) -> None:
        current[0] = str(self.path(part))
        write_part(self, part, *args, **kwargs)

    def kill_after_write(*args, **kwargs) -> None:
        write_table(*args, **kwargs)
        if place in current[0]:
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(run if victim == "run" else os.getpid(), signal.SIGKILL)
            signal.pause()  # wait until this process ends together with the run

    return remember_part, kill_after_write


def build(config: str, victim: str, place: str, folder: Path) -> tuple[int, str]:
    """Run one build in a fork, wait for all its processes, and return its exit code and stderr."""
    stderr = folder / "stderr"
    child = os.fork()
    if child == 0:
        code = 70
        os.setpgid(0, 0)
        try:
            sys.stderr = stderr.open("w")
            killers = build_killers(victim, place, folder / "mark")
            captions.stages.RowStage._write_part, pq.ParquetWriter.write_table = killers
            executors.START_METHOD = "fork"
            run_main_and_report_user_errors(lambda: captions.build.main(["--config", config, "--workers", "2"]))
            code = 0
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(child, 0)
            time.sleep(0.1)
        os.killpg(child, signal.SIGKILL)  # otherwise the test would wait for their pipes
        sys.exit(f"Processes are left after {victim}:{place}.")
    return code, stderr.read_text()[-MAX_OUTPUT_CHARACTERS:]


if __name__ == "__main__":
    results = []
    for scenario in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as folder:
            results.append(build(sys.argv[1], *scenario.split(":"), Path(folder)))
    print(json.dumps(results))
