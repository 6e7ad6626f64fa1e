"""Seconds of the main job, `make demo` after the installation, end to end: the first run and a second one.

    python -m benchmarks.main_job
    python -m benchmarks.main_job --old_tree ../capivara-before

Everything is made in a temporary folder, cache included; the commands are timed from outside, imports included. JSON is
the last line.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import timing
from capivara_common.cli import flag, parse, run_command
from capivara_common.files import read_json


@dataclass
class MainJobArguments:
    """Arguments of `benchmarks.main_job`."""

    gone = {"without_bf16": "the processor computes in all that it has instructions for"}
    threads: int = flag(2, "CPU threads.")
    old_tree: Path | None = flag(None, "Checkout that is measured as well, before this one.")
    output: Path = flag(timing.RESULTS / "main_job.json", "JSON file.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(MainJobArguments, __doc__, argv)
    trees = {"old": args.old_tree, "new": timing.ROOT}
    measured = {name: main_job(tree.resolve(), args.threads) for name, tree in trees.items() if tree}
    timing.finish(timing.conditions() | {"threads": args.threads, "measured": measured}, args.output)


def main_job(tree: Path, threads: int) -> dict[str, Any]:
    """ "first" and "second" run of a checkout: seconds of the two commands, and the records of what was measured."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        own = {"CAPIVARA_CACHE": f"{folder}/cache", "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        made = ["--model", f"{folder}/base", "--dataset", f"{folder}/dataset"]
        for run in ("first", "second"):
            flags = ["--config", "configs/openmoji.yaml", *made, "--output_dir", f"{folder}/{run}"]
            seconds = {}
            for words in (["examples.openmoji.prepare", *made], ["train_accelerate", *flags]):
                command = [sys.executable, "-m", *words]
                job = partial(subprocess.run, command, cwd=tree, env=os.environ | own, check=True)
                seconds[words[0].removeprefix("examples.openmoji.")] = timing.seconds_of(job)
            paths = sorted(Path(folder, run, "results").glob("*.json"))
            records = [record for path in paths for record in read_json(path, records=list)["records"]]
            found[run] = {"seconds": seconds | {"total": sum(seconds.values())}, "records": records}
    return found


if __name__ == "__main__":
    run_command(main)
