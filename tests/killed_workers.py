"""A build of two workers, one of which, or the whole run, gets SIGKILL in the middle of a part. Run by a test.

    KILLED=worker PLACE=2-score/train MARK=FILE python tests/killed_workers.py --config CONFIG --workers 2

It happens once: the file MARK then exists. Workers import this file, so that what it changes is changed in them, too.
"""

import os
import signal
from pathlib import Path

import pyarrow.parquet as pq

import captions.build
import captions.stages

os.environ.setdefault("RUN", str(os.getpid()))  # of the run; its workers inherit it
write_part, write_table = captions.stages._write_part, pq.ParquetWriter.write_table
current = [""]


def remembering(path: Path, *args, **kwargs) -> None:
    current[0] = str(path)
    write_part(path, *args, **kwargs)


def dying(*args, **kwargs) -> None:
    write_table(*args, **kwargs)
    if os.environ["PLACE"] in current[0]:
        try:
            os.close(os.open(os.environ["MARK"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(int(os.environ["RUN"]) if os.environ["KILLED"] == "run" else os.getpid(), signal.SIGKILL)
        signal.pause()  # until this process ends with the run


captions.stages._write_part, pq.ParquetWriter.write_table = remembering, dying

if __name__ == "__main__":
    captions.build.main()
