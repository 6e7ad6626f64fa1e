"""A caption data set from images to a folder that is ready for the Hub: all stages of a config, each resumable.

    python -m captions.build --config configs/captions_pt.yaml --dataset "shards/*.tar" --output data/cc3m-pt
    python -m captions.build --config configs/captions_pt.yaml --dataset "shards/*.tar" --output data/cc3m-pt --dry_run
    python -m captions.build … --shard 0/4        # and 1/4, 2/4, 3/4 on other machines that see the same disk

The stages generate, translate, score and select run in this order, those that the config has a section for; each writes
OUTPUT/<number>-<stage>/<split>, and the last one's rows become OUTPUT/dataset: parquet files with a data set card. The
same command goes on where it was interrupted. docs/your_language.md says how to write a config.
"""

from common.start import start_command

if __name__ == "__main__":  # Ctrl-C, --help and a wrong flag are answered before torch is imported
    start_command("captions.stage_arguments:BuildArguments", __doc__)

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from caption_data.stage_folder import STAGE_FILE, all_parts, check_complete, remove_leftovers, stage_record, unfinished
from captions.build_plan import READ, Plan, Step, read_plan
from captions.dataset_folder import DATASET_FOLDER, write_dataset
from captions.generate import generate
from captions.quality_report import write_quality_report
from captions.score import score
from captions.select import select, write_missing_report
from captions.stage_arguments import BuildArguments
from captions.stages import Shard, StageArguments, StageReport, run_stage, stage_source
from captions.translate import translate
from captions.translators.google_cloud import GOOGLE_MODULES
from common.cli import parse, run_command
from common.environment import require

POLL_S = 10.0  # between looks for what other shards have done
TOLD_EVERY_S = 60.0  # who is waited for
SHARDS_NAMED = 8

logger = logging.getLogger("capivara")


class Awaited(Exception):
    """A build can't go on before somebody has done something; the text says what."""


def build(args: BuildArguments) -> Path | None:
    """Run what is not done yet; returns the folder of the data set, or None where another shard makes it.

    Raises:
        Awaited: a table has to be translated.
        ValueError: the config breaks a rule, or a folder is of other settings.
        ImportError: a stage needs a package that is not there.
        OSError: the disk is full, or other shards write nothing for `wait_s` seconds; the same command goes on.
    """
    plan = read_plan(args.config, dataset=args.dataset, output=args.output, language=args.language)
    check_packages(plan)
    shard = Shard.of(args.shard)
    for line in described(plan):
        logger.info("%s", line)
    if args.dry_run:
        return None
    awaited = []
    for steps in plan.steps.values():
        try:
            for step in steps:
                report = run_step(step, shard, args.wait_s)
                logger.info("%s: %s", step.title, report)
        except Awaited as table:  # those of all splits are written, so that they can be translated at once
            awaited.append(str(table))
    if awaited:
        raise Awaited("\n".join(awaited))
    if shard.index:
        return None
    return write_dataset(plan)


def check_packages(plan: Plan) -> None:
    """Raise ImportError where an extra is missing that a stage would ask for, maybe after days of others."""
    for step in (step for steps in plan.steps.values() for step in steps):
        if step.name == "score" and step.args.model.startswith("open_clip:"):
            require("The stage score of the config", "open_clip", "open_clip")
        elif step.name == "translate" and step.args.backend == "google":
            require("The stage translate of the config", "google", *GOOGLE_MODULES)


def described(plan: Plan) -> list[str]:
    """What will be done, a line a stage."""
    lines = [
        f"{step.title}: {_state(step)}\n    {step.args.command()}" for some in plan.steps.values() for step in some
    ]
    there = (plan.output / DATASET_FOLDER).is_dir()
    return [*lines, f"{plan.output / DATASET_FOLDER}: {'done' if there else 'to be made'}"]


def run_step(step: Step, shard: Shard, wait_s: float) -> StageReport:
    """One stage of one split: this shard's share, then the wait for the others. Raises TimeoutError as that does."""
    args = replace(step.args, shard=f"{shard.index}/{shard.count}")
    if not is_done(step):
        _run(step, args, shard)
        _wait_for_others(step, shard, wait_s)
    if shard.index == 0 and step.name in ENDS:
        ENDS[step.name](args)
    remove_leftovers(args.output)
    return check_complete(args.output)


def _run(step: Step, args: StageArguments, shard: Shard) -> None:
    if step.table is not None and not step.table.is_file():
        if shard.index == 0:
            step.table.parent.mkdir(parents=True, exist_ok=True)
            translate(replace(args, export=step.table, import_file=None))
        raise Awaited(
            f"{step.table} has the sentences of {step.title}. Translate its last column, then run this again."
        )
    RUNS[step.name](args)


def is_done(step: Step) -> bool:
    """Whether a stage is complete, by the same command and from the same rows; if so its model need not be loaded."""
    output = step.args.output
    if not (output / STAGE_FILE).is_file() or unfinished(output):
        return False
    record = stage_record(output)
    source = stage_source(step.args)
    same_rows = record["source"]["rows"] == len(source) and record["source"]["fingerprint"] == source.fingerprint()
    return same_rows and record["command"] == step.args.command()


def _wait_for_others(step: Step, shard: Shard, wait_s: float) -> None:
    """Wait until all shards have done this stage. Raises TimeoutError where they write nothing for `wait_s` seconds."""
    seen, since, told = None, 0.0, -TOLD_EVERY_S
    while shard.count > 1 and (missing := unfinished(step.args.output)):
        now = time.monotonic()
        if (state := (missing, _being_written(step.args.output))) != seen:
            seen, since = state, now
        others = _missing_shards(step, shard.count, missing)
        if now - since >= wait_s:
            raise TimeoutError(
                f"{step.title}: {others} have written nothing for {wait_s:,.0f} s, and the next stage needs their "
                f"rows. Is each started, with --shard I/{shard.count}? Or do all that is left by --shard 0/1. What "
                f"shard {shard.index} has done stays; the same command goes on."
            )
        if now - told >= TOLD_EVERY_S:
            logger.info(
                "%s: shard %d is done and waits for %s, at most %s s without a new row.",
                step.title, shard.index, others, f"{wait_s - (now - since):,.0f}",
            )  # fmt: skip
            told = now
        time.sleep(POLL_S)


def _being_written(output: Path) -> set[tuple[str, int]]:
    """Name and time of the last change of the parts that others are at."""
    found = set()
    for path in output.glob(".*.parquet.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it is whole by now
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def _missing_shards(step: Step, count: int, missing: list[range]) -> str:
    """Those whose rows are not there, such as "shard 0 (1,000 rows), shard 1 (250 rows)"."""
    record = stage_record(step.args.output)
    parts = all_parts(record["source"]["rows"], record["rows_per_part"])
    named = []
    for index in range(count):
        left = [part for part in Shard(index, count).of_parts(parts) if any(part.start in gap for gap in missing)]
        named += [f"shard {index} ({sum(map(len, left)):,} rows)"] if left else []
    return ", ".join(named[:SHARDS_NAMED]) + f" and {len(named) - SHARDS_NAMED} more" * (len(named) > SHARDS_NAMED)


def _state(step: Step) -> str:
    output = step.args.output
    if not (output / STAGE_FILE).is_file():
        return "to be done"
    left = sum(map(len, unfinished(output)))
    return f"{left:,} rows to be done" if left else "done"


def _read(args: StageArguments) -> None:
    run_stage(args, {}, {}, lambda rows: [{} for _ in rows], "Rows")


RUNS: dict[str, Callable] = {
    "generate": generate,
    "translate": translate,
    "score": score,
    "select": select,
    READ: _read,
}
# What belongs to a stage that is complete, and may be missing after a kill.
ENDS: dict[str, Callable] = {
    "translate": lambda args: write_quality_report(args.output, args.language),
    "select": write_missing_report,
}


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args = parse(BuildArguments, __doc__, argv)
        folder = build(args)
    except Awaited as awaited:
        sys.exit(f"waiting: {awaited}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    if folder is not None:
        word = shlex.quote(str(folder))
        print(
            f"The data set is in {folder}; its README.md is the data set card. Train on it with --dataset {word}, "
            f"publish it with: hf upload YOU/NAME {word} --repo-type dataset"
        )


if __name__ == "__main__":
    run_command(main, resumes=True)
