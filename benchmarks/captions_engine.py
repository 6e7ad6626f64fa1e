"""What the engine costs: whole commands of two stages, as their users start them, in two checkouts by turns.

    python -m benchmarks.captions --parts engine --old_tree ../capivara-before-datatrove

The stages are those whose own work is least: select, and translate with a table.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.caption_rows import sentences, write_rows
from benchmarks.timing import median_ratio, rate_spread, timed_runs
from captions.tsv import unescape


def engine(old_tree: Path, rows: int, runs: int, folder: Path) -> dict[str, Any]:
    """Start, rows per second and ratio of whole commands, in this tree and in another one.

    Args:
        old_tree: checkout that is compared with.
        rows: of two captions.
        runs: of every command, alternating, after one that is not counted.
        folder: for data sets and outputs.
    """
    trees = {"new": Path(__file__).resolve().parent.parent, "old": old_tree.resolve()}
    sizes = {"start": 1, "all": rows}
    flags = {stage: {size: make(folder, n) for size, n in sizes.items()} for stage, make in COMMANDS.items()}
    rates_of: dict[str, Any] = {}
    found: dict[str, Any] = {"rows_per_second": rates_of, "rows": rows, "start": {}, "ratio": {}}
    for stage, commands in flags.items():
        steps = {
            f"{tree} {size}": _command(where, stage, commands[size], folder / f"{stage}-{tree}-{size}")
            for size in sizes
            for tree, where in trees.items()
        }
        seconds = timed_runs(steps, runs, "cpu", f"engine, {stage}")
        for tree in trees:
            start = statistics.median(seconds[f"{tree} start"])
            found["start"][f"{stage} {tree}"] = start
            working = [max(run - start, 1e-3) for run in seconds[f"{tree} all"]]
            rates_of[f"{stage} {tree}"] = rate_spread(rows, working)
        found["ratio"][stage] = median_ratio(seconds["new all"], seconds["old all"])
    return found


def engine_lines(found: dict[str, Any]) -> list[str]:
    """Rows of the README's table."""
    return [
        f"| engine | {stage}: whole command, new / old; starts in {found['start'][f'{stage} new']:.1f} s, before in "
        f"{found['start'][f'{stage} old']:.1f} s | - | {ratio:.3f} | - | - |"
        for stage, ratio in found["ratio"].items()
    ]


def _command(tree: Path, stage: str, flags: list[str], output: Path) -> Callable[[int], None]:
    def command(run: int) -> None:
        words = [sys.executable, "-m", f"captions.{stage}", *flags, "--output", f"{output}-{run}"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run(words, cwd=tree, env=environment, check=True, capture_output=True)

    return command


def _select_flags(folder: Path, rows: int) -> list[str]:
    columns: dict[str, list] = {"captions-pt": [[text] for text in sentences(rows)]}
    columns["similarities-pt"] = np.random.default_rng(0).random((rows, 1)).tolist()
    dataset = write_rows(folder / f"select-{rows}", columns, rows)
    return ["--dataset", dataset, "--language", "pt", "--min_pair_similarity", "0.2"]


def _translate_flags(folder: Path, rows: int) -> list[str]:
    """A table, filled: its sentences are translated by a look into it."""
    dataset = write_rows(folder / f"translate-{rows}", {"captions-en": [[text] for text in sentences(rows)]}, rows)
    table, flags = folder / f"{rows}.tsv", ["--dataset", dataset, "--language", "pt", "--backend", "file"]
    words = [
        sys.executable,
        "-m",
        "captions.translate",
        *flags,
        "--output",
        str(folder / "none"),
        "--export",
        str(table),
    ]
    subprocess.run(words, check=True, capture_output=True)
    head, *lines = table.read_text(encoding="utf-8").splitlines()
    filled = [line + unescape(line.split("\t")[1]).upper() for line in lines]
    table.write_text("\n".join([head, *filled]) + "\n", encoding="utf-8")
    return [*flags, "--import", str(table)]


COMMANDS = {"select": _select_flags, "translate": _translate_flags}
