"""Seconds of the main job, `make demo` after the installation, end to end: the first run and a second one.

    python -m benchmarks.main_job --without_bf16
    python -m benchmarks.main_job --without_bf16 --old_tree ../capivara-before

Everything is made in a temporary folder, cache included; the commands are timed from outside, imports included.
`--without_bf16` keeps torch to AVX2, as on a processor without instructions for bfloat16. JSON is the last line.
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

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
WITHOUT_BF16 = "torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False; "
RUN = "import sys, runpy, torch; {}del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


@dataclass
class MainJobArguments:
    """Arguments of `benchmarks.main_job`."""

    without_bf16: bool = flag(False, "Compute as a processor without bfloat16 does.")
    threads: int = flag(2, "CPU threads.")
    old_tree: Path | None = flag(None, "Checkout that is measured as well, before this one.")
    output: Path = flag(timing.RESULTS / "main_job.json", "JSON file.")

    def __post_init__(self) -> None:
        if self.old_tree and not (self.old_tree / "train_accelerate.py").is_file():
            raise ValueError(f"old_tree must be a checkout of this project, got {self.old_tree}.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(MainJobArguments, __doc__, argv)
    trees = {"old": args.old_tree, "new": timing.ROOT}
    measured = {name: main_job(tree.resolve(), args) for name, tree in trees.items() if tree}
    results = {**timing.conditions(), "threads": args.threads, "without_bf16": args.without_bf16, "measured": measured}
    timing.finish(results, args.output)


def main_job(tree: Path, args: MainJobArguments) -> dict[str, Any]:
    """ "first" and "second" run of a checkout: seconds of the two commands, and the records of what was measured."""
    code = RUN.format(WITHOUT_BF16 if args.without_bf16 else "")
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = {"CAPIVARA_CACHE": str(folder / "cache"), "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(args.threads)}
        environment = {**os.environ, **own, **(AVX2 if args.without_bf16 else {})}
        made = ["--model", str(folder / "base"), "--dataset", str(folder / "dataset")]
        for run in ("first", "second"):
            flags = ["--config", "configs/openmoji.yaml", *made, "--output_dir", str(folder / run)]
            commands = {"prepare": ["examples.openmoji.prepare", *made], "train": ["train_accelerate", *flags]}
            seconds = {}
            for name, words in commands.items():
                job = partial(
                    subprocess.run, [sys.executable, "-c", code, *words], cwd=tree, env=environment, check=True
                )
                seconds[name] = timing.seconds_of(job)
            paths = sorted((folder / run / "results").glob("*.json"))
            records = [record for path in paths for record in read_json(path, records=list)["records"]]
            found[run] = {"seconds": seconds | {"total": sum(seconds.values())}, "records": records}
    return found


if __name__ == "__main__":
    run_command(main)
