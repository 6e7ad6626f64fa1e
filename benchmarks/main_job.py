"""Seconds of the main job, `make demo` after the installation, end to end: the first run and a second one.

    python -m benchmarks.main_job --without_bf16
    python -m benchmarks.main_job --without_bf16 --old_tree ../capivara-before

Everything is made in a temporary folder, cache included. The seconds of a phase are those between the first and the
last sign of its progress bar; `total` has all that has no bar, such as imports, checks and pictures. `--without_bf16`
keeps torch to AVX2, as on a processor without instructions for bfloat16. The last line of the output is JSON.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import timing
from capivara_common.cli import flag, parse, run_command
from capivara_common.files import read_json

PHASES = {
    "drawing": "Drawing emoji", "features": "Features", "alignment": "Aligning on English",
    "image_embeddings": "Images, ", "training": "Training, seed",
}  # fmt: skip
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
    """ "first" and "second" run of a checkout: seconds of the phases, and what the run measured."""
    code = RUN.format(WITHOUT_BF16 if args.without_bf16 else "")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = {"CAPIVARA_CACHE": str(folder / "cache"), "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(args.threads)}
        environment = {**os.environ, **own, **(AVX2 if args.without_bf16 else {})}
        for run in ("first", "second"):
            made = ["--model", str(folder / "base"), "--dataset", str(folder / "dataset")]
            flags = ["--config", "configs/openmoji.yaml", *made, "--output_dir", str(folder / run)]
            first, second = (
                phases_of([sys.executable, "-c", code, *words], tree, environment)
                for words in (["examples.openmoji.prepare", *made], ["train_accelerate", *flags])
            )
            seconds = first | second | {"total": first["total"] + second["total"]}
            found[run] = {"seconds": seconds, **figures(folder / run)}
    return found


def phases_of(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each of `PHASES` that the command shows a bar of, and the `total`.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    signs: dict[str, list[float]] = {}
    started, shown = time.perf_counter(), ""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=folder, env=environment, **output) as job:
        while chunk := os.read(job.stdout.fileno(), 65536).decode("utf-8", "replace"):
            shown, now = shown[-2000:] + chunk, time.perf_counter() - started
            for phase, title in PHASES.items():
                if re.search(rf"(^|[\r\n]){title}", chunk):
                    signs.setdefault(phase, [now, now])[1] = now
    if job.returncode:
        raise RuntimeError(f"The main job of {folder} ended with {job.returncode}:\n{shown}")
    seconds = {phase: last - first for phase, (first, last) in signs.items()}
    return seconds | {"total": time.perf_counter() - started}


def figures(folder: Path) -> dict[str, Any]:
    """Steps, and mean recall of each model, language and direction, of a run that is complete."""
    recalls = {}
    for path in sorted((folder / "results").glob("*.json")):
        for record in read_json(path, records=list)["records"]:
            if record["metric"] == "mean_recall":
                recalls["_".join(record[key] for key in ("model", "language", "direction"))] = record["value"]
    return {"steps": read_json(folder / "run.json", steps=int)["steps"], "mean_recall": recalls}


if __name__ == "__main__":
    run_command(main)
