"""What datatrove costs: whole commands of two stages, as their users start them, in two checkouts by turns.

    python -m benchmarks.captions_engine --old_tree ../capivara-before-datatrove

The stages are those whose own work is least: select, and translate with a table. `start` is the time of one row, rows/s
those of all rows without it, `ratio` how much longer the whole command takes. The last line of the output is JSON.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.captions import sentences, write_rows
from benchmarks.timing import conditions, finish, median_ratio, rate_spread, table, timed_runs
from capivara_common.cli import at_least, flag, parse, run_command, user_errors
from captions.tsv import unescape


@dataclass
class EngineArguments:
    """Arguments of `benchmarks.captions_engine`. Raises ValueError where the old tree is none."""

    old_tree: Path = flag(..., "Checkout from before the stages ran on datatrove.")
    rows: int = flag(2000, "Rows, of two captions.")
    runs: int = flag(5, "Runs of each command, alternating.")
    output: Path | None = flag(None, "JSON file for the figures.")

    def __post_init__(self) -> None:
        at_least(self, 1, "rows", "runs")
        if not (self.old_tree / "captions").is_dir():
            raise ValueError(f"old_tree must be a checkout of this project, got {self.old_tree}.")


@user_errors
def main(argv: list[str] | None = None) -> None:
    """Measure and print the ratios."""
    args = parse(EngineArguments, __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        found = engine(args.old_tree, args.rows, args.runs, Path(folder))
    for stage, ratio in found["ratio"].items():
        starts = [found["start"][f"{stage} {tree}"] for tree in ("new", "old")]
        print(f"{stage}: new / old {ratio:.3f}; starts in {starts[0]:.1f} s, before in {starts[1]:.1f} s")
    finish(conditions() | {"runs": args.runs, "measured": {"engine": found}}, args.output)


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


def engine_table(results: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md, out of the JSON."""
    found, rows = results["measured"]["engine"], []
    for stage, ratio in found["ratio"].items():
        starts = [f"{found['start'][f'{stage} {tree}']:.2f}" for tree in ("new", "old")]
        rates = [f"{found['rows_per_second'][f'{stage} {tree}']['median']:,.0f}" for tree in ("new", "old")]
        rows.append((stage, f"{ratio:.2f}", *starts, *rates))
    facts = (
        f"Whole commands over {found['rows']:,} rows, median of {results['runs']} alternating runs on "
        f"{results['device']}. Start: the time of one row; rows/s without it."
    )
    heads = ("stage", "with datatrove / without", "start, s", "without, s", "rows/s", "without, rows/s")
    return table(heads, rows, facts)


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
    words = [sys.executable, "-m", "captions.translate", *flags, "--output", str(folder / "none")]
    subprocess.run([*words, "--export", str(table)], check=True, capture_output=True)
    head, *lines = table.read_text(encoding="utf-8").splitlines()
    filled = [line + unescape(line.split("\t")[1]).upper() for line in lines]
    table.write_text("\n".join([head, *filled]) + "\n", encoding="utf-8")
    return [*flags, "--import", str(table)]


COMMANDS = {"select": _select_flags, "translate": _translate_flags}

if __name__ == "__main__":
    run_command(main)
