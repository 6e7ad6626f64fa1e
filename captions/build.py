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
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capivara_common.cli import WrongUse, as_flags, flag, parse, read_config, run_command, unknown
from capivara_common.environment import require
from capivara_common.executors import Work, execute, failures
from capivara_common.tasks import ExecutorArguments
from caption_data.sources import STAGE_FILE, unfinished
from captions import dataset_folder, generate, score, select, stages, translate
from captions.dataset_folder import DATASET_FOLDER, Plan
from captions.generate import GenerateArguments
from captions.score import ScoreArguments
from captions.select import SelectArguments
from captions.stages import GONE, RowStage, StageArguments
from captions.translate import TranslateArguments, export, untranslated
from captions.translators import GOOGLE_MODULES

# In the order of the chain. A section may be left out; of `translate` there may be a list, one translator a time.
STAGES = {"generate": GenerateArguments, "translate": TranslateArguments}
STAGES |= {"score": ScoreArguments, "select": SelectArguments}
PHASES = {StageArguments: stages.PHASES, GenerateArguments: generate.PHASES, TranslateArguments: translate.PHASES}
PHASES |= {ScoreArguments: score.PHASES, SelectArguments: select.PHASES}
READ = "read"  # the stage of a split that no other one works on: its rows as they are
# docs/your_language.md says what they mean.
NEEDED_KEYS = ("dataset", "output", "language")
CONFIG_KEYS = (*NEEDED_KEYS, "source_language", "split", "evaluation_splits", "image_column", "rename", "card")
CARD_KEYS = ("pretty_name", "description", "license", "license_name", "license_link", "sources", "attribution")
SOURCE_KEYS = ("name", "url", "license")

logger = logging.getLogger("capivara")


@dataclass
class BuildArguments(ExecutorArguments):
    """Arguments of `captions.build`."""

    gone = GONE
    config: Path = flag(..., "YAML file of the stages, such as configs/captions_pt.yaml.")
    dataset: str | None = flag(None, "The images, in any form that a stage takes; goes before the config's.")
    output: Path | None = flag(None, "Folder of all that is made; goes before the config's.")
    language: str | None = flag(None, "Code of the language of the captions; goes before the config's.")
    dry_run: bool = flag(False, "Check the config, say what would be done, and end.")

    def __post_init__(self) -> None:
        self.check_executor()


class ManualStepRequired(Exception):
    """The build waits for translations that somebody has to write; the text says in which tables."""


def read_plan(config: Path, executor: dict[str, Any] | None = None, **given: str | Path | None) -> Plan:
    """The plan of a config file, whose keys are `CONFIG_KEYS` and the names of `STAGES`.

    `executor` are flags of `ExecutorArguments` for all stages; the section of a stage may have its own. What is `given`
    and not None goes before the file. Raises ValueError where a key is unknown or missing, or a value breaks a rule.
    """
    content = {key: value for key, value in read_config(config).items() if value not in ("", "~", "null")}
    content |= {key: str(value) for key, value in given.items() if value is not None}
    _check_keys(content, [*CONFIG_KEYS, *STAGES], str(config))
    for key in NEEDED_KEYS:
        if not content.get(key):
            raise ValueError(f"{config} lacks `{key}`. Write it there, or give --{key}.")
    card = _checked_card(content.get("card"), config)
    found = [(name, section) for name in STAGES for section in _listed(content.get(name, []))]
    if not found:
        raise ValueError(f"{config} has none of the stages {', '.join(STAGES)}; there is nothing to do.")
    for name, section in found:
        if not isinstance(section, dict):
            raise ValueError(f"{config}: `{name}` must hold `key: value` lines, got {section!r}.")
    chain = [(f"{number}-{name}", section) for number, (name, section) in enumerate(found, 1)]
    train, evaluation = content.get("split", "train"), _listed(content.get("evaluation_splits", []))
    if train in evaluation:
        raise ValueError(f"{config}: evaluation_splits has {train!r}, which is the split that all stages work on.")
    translations = [one for one in chain if one[0].endswith("translate")] or [(f"0-{READ}", {})]
    steps = {train: _steps(content, chain, train, executor or {}, config)}
    steps |= {split: _steps(content, translations, split, executor or {}, config) for split in evaluation}
    return Plan(steps, Path(content["output"]), content["language"], card)


def _steps(content: dict, chain: list[tuple[str, dict]], split: str, executor: dict, config: Path) -> list:
    """The (folder, flags) of a chain as `StageArguments`, each of which reads what the one before it writes.

    Raises ValueError where a key is unknown or a value is of the wrong type.
    """
    steps: list[StageArguments] = []
    dataset, output = content["dataset"], Path(content["output"])
    for title, section in chain:
        name, folder = title.partition("-")[2], output / title / split
        logs = Path(executor.get("logging_dir", output / "logs")) / title / split
        values = {**executor, "dataset": dataset, "output": str(folder), "split": split, "logging_dir": str(logs)}
        if not steps:  # the others read columns of our names
            values |= {key: content[key] for key in ("image_column", "rename") if key in content}
        if name in ("translate", "score", "select"):
            values["language"] = content["language"]
        if name == "translate":
            values["memory"] = str(output / title / "memory")
            values |= {key: content[key] for key in ("source_language",) if key in content}
        # `{split}` in a value stands for the split's name: tables of translations are of one split.
        values |= {k: v.replace("{split}", split) if isinstance(v, str) else v for k, v in section.items()}
        values = {"import_file" if key == "import" else key: value for key, value in values.items()}
        kind, where = STAGES.get(name, StageArguments), f"{config}, section {name}"
        flags = as_flags(values, kind, where)
        try:
            steps.append(parse(kind, None, flags))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        dataset = str(folder)
    return steps


def _checked_card(card: Any, config: Path) -> dict[str, Any]:
    """Licence and sources are nothing that a program could know, and a data set without them must not be published."""
    if not isinstance(card, dict):
        raise ValueError(f"{config} lacks `card`, with license and sources: no data set without its sources.")
    _check_keys(card, CARD_KEYS, f"{config}, section card")
    sources = card.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise ValueError(f"{config}: card.sources must list the sources, each with {', '.join(SOURCE_KEYS)}.")
    for source in sources:
        _check_keys(source, SOURCE_KEYS, f"{config}, section card, sources")
        if not (source.get("name") and source.get("license")):
            raise ValueError(f"{config}: every one of card.sources needs a name and a license, got {source}.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(card.get("license", ""))):
        raise ValueError(
            f"{config}: card.license must be an identifier of the Hub such as cc-by-sa-4.0, or other (with "
            f"license_name and license_link), got {card.get('license')!r}."
        )
    return card


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_keys(content: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(unknown(str(key), f"key in {where}", list(known), f"Known are {', '.join(known)}."))


def build(args: BuildArguments) -> Path | None:
    """Run what is not done yet; returns the folder of the data set, or None where Slurm has taken the jobs.

    Raises:
        ManualStepRequired: a table has to be filled.
        ValueError: the config breaks a rule, a folder is of other settings, or tasks have failed.
        ImportError: a stage needs a package that is not there.
        OSError: the disk is full; the same command does the rest.
    """
    given = {name: getattr(args, name) for name in NEEDED_KEYS}
    try:
        plan = read_plan(args.config, args.executor_flags(), **given)
    except ValueError as error:  # a value of the config is one of the command's
        raise WrongUse(str(error)) from error
    check_packages(plan)
    for first in (steps[0] for steps in plan.steps.values()):
        if not args.dry_run and _state(first) != "done":
            RowStage(first)  # whether the data set is there, with its columns, before a model is looked for
    for line in described(plan):
        logger.info("%s", line)
    if args.dry_run:
        return None
    runnable, waiting = split_at_tables(plan)
    # Slurm takes jobs for what is done as well; a table is asked for once none is needed.
    left = [step for step in runnable if not waiting or _state(step) != "done"]
    logs = (args.logging_dir or plan.output / "logs") / "dataset"
    works = [work for step in left for work in _works(step)]
    works += [] if waiting else [Work(dataset_folder.PHASE, plan, logs, "dataset")]
    if works and not execute(works, args):
        logger.info("The jobs are submitted. This command with --dry_run says how far they are.")
        return None
    if waiting:  # the tables of all splits are written, so that they can be translated at once
        for step in waiting:
            if not step.import_file.is_file():
                export(step, step.import_file)
        tables = [(step.import_file, step.title) for step in waiting]
        lines = [f"{table} has the sentences of {title}: {untranslated(table)}" for table, title in tables]
        raise ManualStepRequired("\n".join(lines) + "\nFill the last column, then run the same command again.")
    return plan.output / DATASET_FOLDER


def split_at_tables(plan: Plan) -> tuple[list[StageArguments], list[StageArguments]]:
    """The stages that can run now, and of each split the first one whose table is not there yet, or not filled."""
    runnable, waiting = [], []
    for steps in plan.steps.values():
        ready = list(itertools.takewhile(_has_translations, steps))
        runnable, waiting = runnable + ready, waiting + steps[len(ready) :][:1]
    return runnable, waiting


def _has_translations(step: StageArguments) -> bool:
    return step.import_file is None or (step.import_file.is_file() and not untranslated(step.import_file))


def check_packages(plan: Plan) -> None:
    """Raise ImportError where an extra is missing that a stage would ask for, maybe after days of others."""
    for step in plan.all_steps():
        if isinstance(step, ScoreArguments) and step.model.startswith("open_clip:"):
            require("The stage score of the config", "open_clip", "open_clip")
        elif isinstance(step, TranslateArguments) and step.backend == "google":
            require("The stage translate of the config", "google", *GOOGLE_MODULES)


def described(plan: Plan) -> list[str]:
    """What is done and what will be, a line a stage, and the tasks that have failed."""
    lines = []
    for step in plan.all_steps():
        lines.append(f"{step.title}: {_state(step)}\n    {step.command()}")
        for work in _works(step):
            lines += [f"    {work}: task {rank}: {text}" for rank, text in failures(work.logs).items()]
    there = (plan.output / DATASET_FOLDER).is_dir()
    return [*lines, f"{plan.output / DATASET_FOLDER}: {'done' if there else 'to be made'}"]


def _works(step: StageArguments) -> list[Work]:
    return Work.of(step, PHASES[type(step)], step.title)


def _state(step: StageArguments) -> str:
    if not _has_translations(step):
        missing = untranslated(step.import_file) if step.import_file.is_file() else ""
        return ": ".join(filter(None, [f"waits for {step.import_file}", missing.partition(":")[0]]))
    if not (step.output / STAGE_FILE).is_file():
        return "to be done"
    left, _ = unfinished(step.output)
    return f"{left:,} rows to be done" if left else "done"


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
