"""A caption data set from images to a folder that is ready for the Hub: all stages of a config, each resumable.

    python -m captions.build --config configs/captions_pt.yaml --dataset "shards/*.tar" --output data/cc3m-pt
    python -m captions.build --config configs/captions_pt.yaml --dataset "shards/*.tar" --output data/cc3m-pt --dry_run
    python -m captions.build … --tasks 8 --workers 8       # on the GPUs of this machine
    python -m captions.build … --executor slurm --tasks 400 --partition gpu --gpus_per_task 1 --time 04:00:00
    python -m captions.build … --executor ray --tasks 64 --gpus_per_task 1

The stages generate, translate, score and select run in this order, those that the config has a section for; each writes
OUTPUT/<number>-<stage>/<split>, and the last one's rows become OUTPUT/dataset: parquet files with a data set card. The
same command does what is missing after a kill, whatever the number of tasks. docs/your_language.md says how to write a
config, docs/cluster.md how to run it on a cluster.
"""

import itertools
import logging
import shlex
import shutil
from pathlib import Path

from capivara_common.cli import WrongUse, parse, run_command, user_errors
from capivara_common.environment import require
from capivara_common.executors import Work, execute, failures
from capivara_common.files import partial_folder
from caption_data.sources import STAGE_FILE
from captions.build_plan import Plan, Step, read_plan
from captions.dataset_folder import DATASET_FOLDER
from captions.sentence_stage import corrected_sentences, remove_corrected
from captions.stage_arguments import BuildArguments
from captions.stage_folder import unfinished
from captions.stages import RowStage
from captions.translate import export
from captions.translators.google_cloud import GOOGLE_MODULES
from captions.tsv import untranslated

logger = logging.getLogger("capivara")


class ManualStepRequired(Exception):
    """The build waits for translations that somebody has to write; the text says in which tables."""


def build(args: BuildArguments) -> Path | None:
    """Run what is not done yet; returns the folder of the data set, or None where Slurm has taken the jobs.

    Raises:
        ManualStepRequired: a table has to be filled.
        ValueError: the config breaks a rule, a folder is of other settings, or tasks have failed.
        ImportError: a stage needs a package that is not there.
        OSError: the disk is full; the same command does the rest.
    """
    given = {name: getattr(args, name) for name in ("dataset", "output", "language")}
    try:
        plan = read_plan(args.config, args.executor_flags(), **given)
    except ValueError as error:  # a value of the config is one of the command's
        raise WrongUse(str(error)) from error
    check_packages(plan)
    if not args.dry_run:
        check_data(plan)
    for line in described(plan):
        logger.info("%s", line)
    if args.dry_run:
        return None
    runnable, waiting = split_at_tables(plan)
    remove_corrected_rows(plan, runnable)
    # Slurm takes jobs for what is done as well; a table is asked for once none is needed.
    left = [step for step in runnable if not waiting or _state(step) != "done"]
    works = [work for step in left for work in Work.of(step.args, step.title)]
    if not waiting:
        logs = (args.logging_dir or plan.output / "logs") / "dataset"
        works.append(Work("captions.dataset_folder", "dataset", plan, logs, "dataset"))
    if works and not execute(works, args):
        logger.info("The jobs are submitted. This command with --dry_run says how far they are.")
        return None
    if waiting:  # the tables of all splits are written, so that they can be translated at once
        for step in waiting:
            if not step.table.is_file():
                export(step.args, step.table)
        lines = [f"{step.table} has the sentences of {step.title}: {untranslated(step.table)}" for step in waiting]
        raise ManualStepRequired("\n".join(lines) + "\nFill the last column, then run the same command again.")
    return plan.output / DATASET_FOLDER


def split_at_tables(plan: Plan) -> tuple[list[Step], list[Step]]:
    """The steps that can run now, and of each split the first one whose table is not there yet, or not filled."""
    runnable, waiting = [], []
    for steps in plan.steps.values():
        ready = list(itertools.takewhile(_has_translations, steps))
        runnable, waiting = runnable + ready, waiting + steps[len(ready) :][:1]
    return runnable, waiting


def _has_translations(step: Step) -> bool:
    return step.table is None or (step.table.is_file() and not untranslated(step.table))


def remove_corrected_rows(plan: Plan, runnable: list[Step]) -> None:
    """Remove what was made of translations that a table has otherwise now: the run makes it again."""
    chains = [(steps[number:], step) for steps in plan.steps.values() for number, step in enumerate(steps)]
    corrected = [
        (chain, found)
        for chain, step in chains
        if step.table and step in runnable and (found := corrected_sentences(step.args))
    ]
    if corrected:
        for folder in (plan.output / DATASET_FOLDER, partial_folder(plan.output / DATASET_FOLDER)):
            shutil.rmtree(folder, ignore_errors=True)
    for (step, *later), found in reversed(corrected):  # of two tables in a row, the second one's rows are still there
        remove_corrected(step.args, found, [one.args for one in later])


def check_data(plan: Plan) -> None:
    """Raise ValueError where the data set is missing or lacks a split or columns, before a model is looked for."""
    for first in (steps[0] for steps in plan.steps.values()):
        if _state(first) != "done":
            RowStage(first.args)


def check_packages(plan: Plan) -> None:
    """Raise ImportError where an extra is missing that a stage would ask for, maybe after days of others."""
    for step in plan.all_steps():
        if step.name == "score" and step.args.model.startswith("open_clip:"):
            require("The stage score of the config", "open_clip", "open_clip")
        elif step.name == "translate" and step.args.backend == "google":
            require("The stage translate of the config", "google", *GOOGLE_MODULES)


def described(plan: Plan) -> list[str]:
    """What is done and what will be, a line a stage, and the tasks that have failed."""
    lines = []
    for step in plan.all_steps():
        lines.append(f"{step.title}: {_state(step)}\n    {step.args.command()}")
        found = corrected_sentences(step.args) if step.table and _has_translations(step) else {}
        if number := sum(map(bool, found.values())):
            lines.append(f"    {number:,} of its translations have changed; what depends on them will be made again")
        for work in Work.of(step.args, step.title):
            lines += [f"    {work.title}: task {rank} has failed: {text}" for rank, text in failures(work.logs).items()]
    there = (plan.output / DATASET_FOLDER).is_dir()
    return [*lines, f"{plan.output / DATASET_FOLDER}: {'done' if there else 'to be made'}"]


def _state(step: Step) -> str:
    output = step.args.output
    if not _has_translations(step):
        missing = untranslated(step.table) if step.table.is_file() else ""
        return ": ".join(filter(None, [f"waits for {step.table}", missing.partition(":")[0]]))
    if not (output / STAGE_FILE).is_file():
        return "to be done"
    left = sum(map(len, unfinished(output)))
    return f"{left:,} rows to be done" if left else "done"


@user_errors
def main(argv: list[str] | None = None) -> None:
    """The command; ends with 1 where tasks have failed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = build(parse(BuildArguments, __doc__, argv))
    except ManualStepRequired as required:
        print(f"waiting: {required}")  # no error: what could be done is done
        return
    if folder is not None:
        word = shlex.quote(str(folder))
        print(
            f"The data set is in {folder}; its README.md is the data set card. Train on it with --dataset {word}, "
            f"publish it with: hf upload YOU/NAME {word} --repo-type dataset"
        )


if __name__ == "__main__":
    run_command(main, resumes=True)
