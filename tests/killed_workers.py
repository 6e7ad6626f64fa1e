"""Builds of two workers, one of which, or the whole run, gets SIGKILL in the middle of a part. Run by a test.

    python tests/killed_workers.py CONFIG worker:2-score/train run:2-score/train …

One build after the other, each killed once, in a part whose path has these words; prints a JSON list of [exit code,
stderr]. The processes are forks of one that has computed nothing yet, so that none of them has to import.
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
import captions.score  # before the forks, none of which then has to
import captions.select
import captions.stages
from capivara_common import executors
from capivara_common.cli import run_command

MAX_SAID = 5000  # letters, of the end
write_part, write_table = captions.stages.RowStage._write_part, pq.ParquetWriter.write_table


def dying(victim: str, place: str, mark: Path) -> tuple[Callable, Callable]:
    """`_write_part` and `write_table`, the second of which kills the first time that it writes into the place."""
    current, run = [""], os.getpid()

    def remembering(self, part: range, *args, **kwargs) -> None:
        current[0] = str(self.path(part))
        write_part(self, part, *args, **kwargs)

    def killing(*args, **kwargs) -> None:
        write_table(*args, **kwargs)
        if place in current[0]:
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(run if victim == "run" else os.getpid(), signal.SIGKILL)
            signal.pause()  # until this process ends with the run

    return remembering, killing


def build(config: str, victim: str, place: str, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of one build, in a fork, all of whose processes have ended."""
    said = folder / "said"
    number = os.fork()
    if number == 0:
        code = 70
        os.setpgid(0, 0)
        try:
            sys.stderr = said.open("w")
            killing = dying(victim, place, folder / "mark")
            captions.stages.RowStage._write_part, pq.ParquetWriter.write_table = killing
            executors.START_METHOD = "fork"
            run_command(lambda: captions.build.main(["--config", config, "--workers", "2"]))
            code = 0
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(number, 0)
            time.sleep(0.1)
        os.killpg(number, signal.SIGKILL)  # they hold the pipes that the test reads to their end
        sys.exit(f"after {victim}:{place} processes are left")
    return code, said.read_text()[-MAX_SAID:]


if __name__ == "__main__":
    results = []
    for scenario in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as folder:
            results.append(build(sys.argv[1], *scenario.split(":"), Path(folder)))
    print(json.dumps(results))
