"""Build a caption dataset: run all stages of a config, from images to a folder that is ready for the Hub.

    python -m captions.build --config configs/captions_pt.yaml --dataset "shards/*.tar" --output data/cc3m-pt
    python -m captions.build --config configs/captions_pt.yaml --dataset "shards/*.tar" --output data/cc3m-pt --dry_run
    python -m captions.build … --tasks 8 --workers 8       # on the GPUs of this machine
    python -m captions.build … --executor slurm --tasks 400 --partition gpu --gpus_per_task 1 --time 04:00:00
    python -m captions.build … --executor ray --tasks 64 --gpus_per_task 1

The stages (steps) are: generate captions, translate them, score them against their images, select the best, and replace
the images by embeddings. A stage runs only if the config has a section for it. It writes to
OUTPUT/<number>-<stage>/<split>. The built dataset, parquet files with a dataset card, is in OUTPUT/dataset.

To continue an interrupted build, run the same command again. docs/how-to/your_language.md describes the config, and
docs/how-to/cluster.md describes --executor.
"""

import itertools
import json
import logging
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import Features
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from capivara_common.cli import (
    UsageError,
    config_to_flags,
    flag,
    parse_arguments,
    read_yaml_config,
    run_main_and_report_user_errors,
    unknown_name_message,
)
from capivara_common.executors import PhaseStep, read_task_failures, run_phases
from capivara_common.files import atomic_folder, read_json, write_json, write_text
from capivara_common.privacy import get_publishable_model_or_dataset_name, shorten_absolute_paths
from capivara_common.tasks import ExecutorArguments, Phase
from caption_data.rows import CAPTION_COLUMN_RE, DATASET_HELP, NOT_CHOSEN, SkippedRow, write_skipped_rows
from caption_data.sources import STAGE_FILE, count_missing_stage_rows_and_get_command
from captions.embedding_stage import EmbedArguments
from captions.generate import GenerateArguments
from captions.quality import QUALITY_FILE
from captions.score import ScoreArguments
from captions.select import SelectArguments
from captions.stages import (
    RowStage,
    StageArguments,
    atomic_parquet,
    check_stage_and_count_rows,
    delete_parts_of_changed_rows_and_fingerprint,
    flatten_dict,
    identity_digest,
    read_stage_record,
)
from captions.translate import TranslateArguments
from eval.records.tables import escape_markdown

# The stages (steps) of a build, in the order in which they run. Each key is the name of the stage's section in the
# config, and each value is the class of the stage's flags. The section `translate` may also be a list of sections, one
# per translator.
STAGES = {
    "generate": GenerateArguments,
    "translate": TranslateArguments,
    "score": ScoreArguments,
    "select": SelectArguments,
    "embed": EmbedArguments,
}
# Keys that the YAML config of a build may have. docs/how-to/your_language.md describes them.
# - CONFIG_KEYS: top-level keys, in addition to the names of the stages. REQUIRED_KEYS must be in the config or flags.
# - CARD_KEYS: keys of the section `card`, which describes the dataset for its dataset card.
# - SOURCE_KEYS: keys of each entry in the list `sources` of the section `card`.
REQUIRED_KEYS = ("dataset", "output", "language")
CONFIG_KEYS = (*REQUIRED_KEYS, "source_language", "split", "evaluation_splits", "image_column", "rename", "card")
CARD_KEYS = ("pretty_name", "description", "license", "license_name", "license_link", "sources", "attribution")
SOURCE_KEYS = ("name", "url", "license")

# Approximate size of each parquet file of the built dataset. The Hugging Face Hub recommends some hundred megabytes.
TARGET_FILE_BYTES = 300_000_000
BUILD_FILE = "build.json"  # JSON file in the dataset with all values of the dataset card
SIMILARITY_PLOT_FILE = "similarities.png"  # histogram of image-caption similarities from the stage select
CARD_TEMPLATE = Path(__file__).parent / "dataset_card.md.j2"
# Matches the names of settings that the dataset card does not show: digests, long lists, and values that do not help a
# reader. Nested settings have dotted names, for example `translator.generation`.
HIDDEN_SETTINGS_RE = re.compile(r"(^|\.)(fingerprint|sha256|generation|prefixes|prompts|existing|target)(\.|$)")
logger = logging.getLogger("capivara")


@dataclass
class BuildArguments(ExecutorArguments):
    """Command-line arguments of `captions.build`, which builds a caption dataset from images and a config."""

    config: Path = flag(..., "YAML config of the build, for example configs/captions_pt.yaml.")
    dataset: str | None = flag(None, f"{DATASET_HELP} Default: the value in the config.")
    output: Path | None = flag(None, "Folder for all stages and the built dataset. Default: the value in the config.")
    language: str | None = flag(None, "Language code of the captions, such as pt. Default: the value in the config.")
    without_images: bool = flag(
        False,
        "Add the stage embed, which replaces the images by embeddings, so that the dataset can be published without "
        "images. If the config has no section embed, the stage uses the model of the section score.",
    )
    dry_run: bool = flag(False, "Check the config and the data, print what would be done, and exit.")

    def __post_init__(self) -> None:
        self.check_executor()


@dataclass(frozen=True)
class BuildPlan:
    """Everything that a build will do: the stages (steps) to run for each split, and the values for the dataset card.

    Attributes:
        steps: Dict `{split name: stages}`. The stages are in the order in which they run, each as an object with its
            flags and methods.
        output: Folder of the build, which contains the folders of all stages.
        language: Language code of the captions.
        card: Section `card` of the config, for example with the license.
        dataset: Folder of the built dataset.
    """

    steps: dict[str, list[StageArguments]]
    output: Path
    language: str
    card: dict[str, Any]
    dataset: Path

    def all_steps(self) -> list[StageArguments]:
        """Return all stages of all splits, each as an object with its flags.

        The stages of a split are consecutive, in the order in which they run.
        """
        return [step for steps in self.steps.values() for step in steps]


class ManualStepRequired(Exception):
    """Exception that stops a build because people must first write translations into tables.

    The message names the tables. Nothing is wrong: when the tables are filled, the same command continues the build.
    """


def read_build_plan(
    config: Path,
    executor_flags: dict[str, Any] | None = None,
    without_images: bool = False,
    **overrides: str | Path | None,
) -> BuildPlan:
    """Read the YAML config of a build, and determine which stages (steps) to run for each split.

    Args:
        config: YAML file with the keys `CONFIG_KEYS` and one section per stage.
        executor_flags: Flags of `ExecutorArguments` for all stages, as a dict `{name: value}`. Flags in the config take
            precedence.
        without_images: Replace the images by embeddings, even if the config has no stage `embed`.
        **overrides: Values that replace the config's value of the same key, for example `language="pt"`. None has no
            effect.

    Returns:
        The plan of the build.

    Raises:
        ValueError: If a key of the config is unknown or missing, or a value is invalid.
    """
    content = {key: value for key, value in read_yaml_config(config).items() if value not in ("", "~", "null")}
    content |= {key: str(value) for key, value in overrides.items() if value is not None}
    for section in (content, *(part for value in content.values() for part in _as_list(value))):
        _refuse_keys_of_services(section, config)
    _check_keys(content, [*CONFIG_KEYS, *STAGES], str(config))
    for key in REQUIRED_KEYS:
        if not content.get(key):
            raise ValueError(f"{config} lacks `{key}`. Add it to the config, or set --{key}.")
    card = _validate_card_section(content.get("card"), config)
    if without_images and "embed" not in content:
        score = content.get("score")
        content["embed"] = {"model": score.get("model")} if isinstance(score, dict) else {}
    sections = [(name, section) for name in STAGES for section in _as_list(content.get(name, []))]
    if not sections:
        raise ValueError(f"{config} must have a section for at least one of the stages {', '.join(STAGES)}.")
    for name, section in sections:
        if not isinstance(section, dict):
            raise ValueError(f"{config}: `{name}` must hold `key: value` lines, got {section!r}.")
    chain = [(f"{number}-{name}", section) for number, (name, section) in enumerate(sections, 1)]
    train, evaluation = content.get("split", "train"), _as_list(content.get("evaluation_splits", []))
    if train in evaluation:
        raise ValueError(f"{config}: evaluation_splits must not contain {train!r}, the split to build.")
    # Evaluation splits are translated and embedded, but skip all other stages, because captions that a model generates
    # or selects would change what an evaluation measures.
    translations = [(title, section) for title, section in chain if title.endswith(("translate", "embed"))]
    # If the config has neither a stage `translate` nor a stage `embed`, evaluation splits get the stage `read`, which
    # only copies the rows.
    translations = translations or [("0-read", {})]
    chains = {train: chain} | dict.fromkeys(evaluation, translations)
    steps = {}
    for split, stages in chains.items():
        steps[split] = _build_steps(content, stages, split, executor_flags or {}, config)
    if evaluation and any(isinstance(step, EmbedArguments) and step.views > 1 for step in steps[train]):
        raise ValueError(
            f"{config}: embed.views must be 1 with evaluation_splits, because evaluation uses no augmented images."
        )
    output = Path(content["output"])
    return BuildPlan(steps, output, content["language"], card, output / "dataset")


def _refuse_keys_of_services(section: Any, config: Path) -> None:
    """Raise ValueError if a section of a config contains an API key or a password. The message does not show it."""
    for name in section if isinstance(section, dict) else ():
        if re.fullmatch(r"((openai|google)_?)?(api_?)?(key|token|secret|password)", str(name).lower()):
            raise ValueError(
                f"{config} must not contain {name}: an API key belongs in the environment variable OPENAI_API_KEY or "
                "GOOGLE_API_KEY. Remove it from the file, and replace the API key if others could read the file."
            )


def _build_steps(content: dict, chain: list[tuple[str, dict]], split: str, executor_flags: dict, config: Path) -> list:
    """Build the steps of a split, that is, the flags of its stages. Each stage reads the output of the stage before it.

    Args:
        content: Content of the config.
        chain: One tuple (folder name, section of the config) per stage, in order. An example of a folder name is
            "2-translate".
        split: Name of the split.
        executor_flags: Dict `{flag name: value}` with flags of `ExecutorArguments` for all stages.
        config: Path of the config, for errors.

    Returns:
        One object of a subclass of `StageArguments` per stage, in order.

    Raises:
        ValueError: If a key in the section of a stage is unknown, or a value is invalid.
    """
    steps: list[StageArguments] = []
    dataset, output = content["dataset"], Path(content["output"])
    for title, section in chain:
        name, folder = title.partition("-")[2], output / title / split
        kind, where = STAGES.get(name, StageArguments), f"{config}, section {name}"
        flag_names = {field.name for field in fields(kind)}
        logs = Path(executor_flags.get("logging_dir", output / "logs")) / title / split
        values = {**executor_flags, "dataset": dataset, "output": folder, "split": split, "logging_dir": logs}
        # Only the first stage gets the name of the image column and the renames of the config. Its output already has
        # the new column names, which later stages read.
        shared = ["language", "source_language", *([] if steps else ["image_column", "rename"])]
        values |= {key: content[key] for key in shared if key in content and key in flag_names}
        if "memory" in flag_names:
            values["memory"] = output / title / "memory"
        # `{split}` in a value stands for the name of the split. With it, one config can name a file for each split, for
        # example the translation table `tables/{split}.tsv`.
        for key, value in section.items():
            values[key] = value.replace("{split}", split) if isinstance(value, str) else value
        values = {"import_file" if key == "import" else key: value for key, value in values.items()}
        if "import_file" in values:
            table = Path(str(values["import_file"]))
            values["import_file"] = _resolve_translation_table_path(table, output, output / title)
        flags = config_to_flags(values, kind, where)
        try:
            steps.append(parse_arguments(kind, None, flags))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        dataset = folder
    return steps


def _resolve_translation_table_path(name: Path, output: Path, stage: Path) -> Path:
    """Return the path of a translation table.

    A relative path is taken relative to the folder of the build, so that builds of two languages never share a table.
    An absolute path does not change. Earlier versions of the program took relative paths relative to the current
    folder. If such a version has begun the stage, the table in the current folder is still used.

    Args:
        name: Path of the table as the config states it.
        output: Folder of the build.
        stage: Folder of the translation stage.
    """
    path = output / name
    if name.is_relative_to(output) or name.is_absolute():
        return name
    if name.is_file() and not path.is_file():
        if stage.is_dir():
            return name
        logger.warning(
            f"The translation table {name} lies in the current folder and is not used. If it belongs to this build, "
            f"move it to {path} and state its languages in its first line (docs/how-to/your_language.md)."
        )
    return path


def _validate_card_section(card: Any, config: Path) -> dict[str, Any]:
    """Validate the section `card` of a config, which must state the license and the sources of the dataset.

    Args:
        card: Value of the section.
        config: Path of the config, for errors.

    Returns:
        The section, with its sources as a list of dicts.

    Raises:
        ValueError: If a key is unknown, or the license or a source is missing or invalid.
    """
    if not isinstance(card, dict):
        raise ValueError(f"{config} lacks the section `card`. Add it, with the license and the sources of the dataset.")
    _check_keys(card, CARD_KEYS, f"{config}, section card")
    sources = [source if isinstance(source, dict) else {} for source in _as_list(card.get("sources") or {})]
    for source in sources:
        _check_keys(source, SOURCE_KEYS, f"{config}, section card, sources")
    if not all(source.get("name") and source.get("license") for source in sources):
        raise ValueError(f"{config}: card.sources must be a list of sources, each with name and license.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(card.get("license", ""))):
        raise ValueError(
            f"{config}: card.license must be a license identifier of the Hub such as cc-by-sa-4.0, or `other` with "
            f"license_name and license_link, got {card.get('license')!r}."
        )
    return card | {"sources": sources}


def _as_list(value: Any) -> list[Any]:
    """Return the value itself if it is a list, otherwise a list with the value as its only element."""
    return value if isinstance(value, list) else [value]


def _check_keys(content: dict[str, Any], known: Sequence[str], where: str) -> None:
    """Raise ValueError if a dict has an unknown key. The message suggests the most similar known key.

    For example: "Unknown key in captions.yaml: `langauge`. Did you mean `language`? Known keys: language, output."

    Args:
        content: The dict.
        known: Names of the known keys.
        where: Description of the dict for the message, for example the path of the config.
    """
    advice = f"Known keys: {', '.join(known)}."
    for key in content:
        if key not in known:
            raise ValueError(unknown_name_message(str(key), f"key in {where}", list(known), advice))


def build_dataset(args: BuildArguments) -> Path | None:
    """Build a caption dataset: run all stages (steps) that are not complete, and write the dataset.

    Args:
        args: Command-line arguments.

    Returns:
        Folder of the dataset. None after a dry run, or if the jobs were submitted to Slurm.

    Raises:
        ManualStepRequired: If people must first fill a translation table.
        ValueError: If the config is invalid, existing output was made with other settings, or tasks failed.
        ImportError: If a package is missing.
        OSError: If the disk is full.
    """
    overrides = {name: getattr(args, name) for name in REQUIRED_KEYS}
    try:
        plan = read_build_plan(args.config, args.executor_flags(), args.without_images, **overrides)
    # Treat an invalid config like an invalid flag: the command ends with exit code 2.
    except ValueError as error:
        raise UsageError(str(error)) from error
    for steps in plan.steps.values():
        if _get_stage_status(steps[0]) != "done":
            # Report missing columns now, before a model is downloaded or loaded.
            _check_columns_of_all_stages(steps)
    for step in plan.all_steps():
        if _get_stage_status(step) != "done":
            step.backend_type.check(step)
    for line in _describe_progress(plan):
        logger.info("%s", line)
    if args.dry_run:
        _log_counts(plan)
        for line in itertools.chain.from_iterable(map(_describe_server_requests, plan.steps.values())):
            logger.info("%s", line)
        return None
    for steps in plan.steps.values():
        _apply_corrections(steps, plan.dataset)
    # Collect the stages of all splits that can run now (`runnable`), and for each split the first stage that waits for
    # a person (`waiting`).
    runnable, waiting = [], []
    for steps in plan.steps.values():
        ready = list(itertools.takewhile(lambda step: not step.pending_manual_step(), steps))
        runnable, waiting = runnable + ready, waiting + steps[len(ready) :][:1]
    # Normally, complete stages are run again, too: they find that nothing is missing, and return at once. If a stage
    # waits for a person to fill a translation table, skip complete stages, so that the build asks for the table soon.
    left = [step for step in runnable if not waiting or _get_stage_status(step) != "done"]
    logs = (args.logging_dir or plan.output / "logs") / "dataset"
    phases = [phase for step in left for phase in PhaseStep.from_phases(step, step.phases, step.title)]
    if not waiting:
        phases.append(PhaseStep(Phase(write_dataset), plan, logs, "dataset"))
    try:
        is_complete = not phases or run_phases(phases, args)
    # If tasks have failed, also log the row counts. They can explain the error: a filter may have dropped all rows.
    except ValueError:
        _log_counts(plan)
        raise
    _log_counts(plan)
    if not is_complete:
        logger.info("The Slurm jobs were submitted. To see their progress, run the same command with --dry_run.")
        return None
    if waiting:
        # A person must translate these tables. The tables of all splits are written now, so that the person can
        # translate them together.
        requests = [step.request_manual_step() for step in waiting]
        requests.append("Fill the last column of each table, then run the same command again.")
        raise ManualStepRequired("\n".join(requests))
    return plan.dataset


def _check_columns_of_all_stages(steps: list[StageArguments]) -> None:
    """Check, before anything runs, that each stage of a split has the columns that it needs.

    Args:
        steps: Flags of the stages of the split, in order.

    Raises:
        ValueError: If the dataset or the split does not exist, or if a stage lacks a required column or would overwrite
            an existing column.
    """
    first, *later = steps
    stage = RowStage(first)
    columns = [*stage.features, *first.check_columns(stage.features, stage.source.display_name)]
    for step in later:
        columns += step.check_columns(columns, f"{step.title}: the output of the stages before it")


def _apply_corrections(steps: list[StageArguments], dataset: Path) -> None:
    """Delete outputs that depend on corrected rows of a translation table, so that the build makes them again.

    The function deletes:

    - in the stage translate: the parquet files with a changed row;
    - in the next stage, if this is score: also the parquet files with a changed row, because both stages have the same
      rows;
    - all other later stages and the dataset: everything.

    The digest (hash) of the corrected table is recorded last, so that an interrupted run finds the same corrections
    again.

    Args:
        steps: Flags of the stages of a split, in order.
        dataset: Folder of the built dataset.
    """
    for number, step in enumerate(steps):
        if step.pending_manual_step():
            return
        if corrections := step.corrections():
            changed, later = f"{len(corrections.rows):,} rows", steps[number + 1 :] if corrections.rows else []
            logger.info(f"The table {step.import_file} was corrected; {changed} of {step.title} are now written again.")
            if (dataset / BUILD_FILE).is_file():
                shutil.rmtree(dataset)
            for step_after in reversed(later):
                has_same_rows = step_after is later[0] and isinstance(step_after, ScoreArguments)
                if has_same_rows and (step_after.output / STAGE_FILE).is_file():
                    delete_parts_of_changed_rows_and_fingerprint(step_after.output, corrections.rows)
                else:
                    shutil.rmtree(step_after.output, ignore_errors=True)
            corrections.apply()
        if _get_stage_status(step) != "done":
            return


def _log_counts(plan: BuildPlan) -> None:
    """Log how many rows each complete stage has read and written, and warn if a stage has dropped most of its data.

    A warning is logged if the stage select dropped more than half of the rows, or if the flag `drop_flagged` of the
    stage translate dropped more than half of the translations.
    """
    for step in (step for step in plan.all_steps() if _get_stage_status(step) == "done"):
        report, rows = check_stage_and_count_rows(step.output), read_stage_record(step.output)["source"]["rows"]
        logger.info(f"{step.title}: {rows:,} rows in, {report.rows:,} out{report.skip_reasons}")
        filters, dropped, total, unit = "", 0, 0, ""
        if isinstance(step, SelectArguments):
            cutoffs = {"min_pair_similarity": step.min_pair_similarity, "min_similarity": step.strategy_cutoff}
            filters = " and ".join(f"{name} {cutoff:g}" for name, cutoff in cutoffs.items() if cutoff is not None)
            dropped, total, unit = report.skipped.get(NOT_CHOSEN, 0), rows, "rows"
        elif isinstance(step, TranslateArguments) and step.drop_flagged:
            quality = read_json(step.output / QUALITY_FILE, captions=int, flagged=int)
            filters, dropped, total, unit = "drop_flagged", quality["flagged"], quality["captions"], "translations"
        if dropped > total / 2:
            logger.warning(
                f"WARNING: {step.title}: {filters} dropped {dropped:,} of {total:,} {unit}, more than half. If good "
                f"captions were dropped, change the setting, remove {step.output.parent}, the folders of all later "
                f"stages and {plan.dataset}, and run the same command again. A base model that was not trained on "
                "the language gives low similarities to good captions as well."
            )


def _describe_progress(plan: BuildPlan) -> list[str]:
    """Return lines of text that describe the progress of a build.

    The lines of a stage contain its state, the command that runs it, and the errors of its failed tasks. The last line
    contains the state of the dataset.
    """
    lines, all_done = [], plan.dataset.is_dir()
    for steps in plan.steps.values():
        is_current = True  # True if all earlier stages of the split are complete, so that their rows are final
        for step in steps:
            state = _get_stage_status(step)
            is_done = state == "done"
            ending = "; rows that change in earlier stages will be written again" if is_done and not is_current else ""
            lines.append(f"{step.title}: {state}{ending}\n    {step.command()}")
            is_current, all_done = is_current and is_done, all_done and is_done
            for phase in PhaseStep.from_phases(step, step.phases, step.title):
                reasons = read_task_failures(phase.log_folder)
                lines += [f"    {phase}: task {rank}: {reason}" for rank, reason in reasons.items()]
    return [*lines, f"{plan.dataset}: {'done' if all_done else 'not written yet'}"]


def _describe_server_requests(steps: list[StageArguments]) -> list[str]:
    """Return lines of text for `--dry_run` that estimate the requests of the stages of a split to servers.

    If the input of a stage does not exist yet, the estimate is made from the captions of the source dataset.
    """
    lines, first = [], steps[0]
    for number, step in enumerate(steps):
        if _get_stage_status(step) == "done" or not isinstance(step, GenerateArguments | TranslateArguments):
            continue
        is_ready = number == 0 or _get_stage_status(steps[number - 1]) == "done"
        source = {name: getattr(first, name) for name in ("dataset", "rename", "image_column")}
        args = step if is_ready else replace(step, **source)
        # Give no estimate if the source dataset lacks captions that an earlier stage will generate.
        with suppress(ValueError):
            lines += [f"{step.title}: {line}" for line in step.backend_type.describe_work(args, RowStage(args))]
    return lines


def _get_stage_status(step: StageArguments) -> str:
    """Return a short description of the state of a stage, for example "done", "not started" or "120 rows are missing".

    The description is "done" if all rows are written and the translation table, if any, has not been edited since then.
    """
    if request := step.pending_manual_step():
        return f"needs the translations in {step.import_file}: {request.partition(':')[0]}"
    if not (step.output / STAGE_FILE).is_file():
        return "not started"
    missing, _ = count_missing_stage_rows_and_get_command(step.output)
    if missing:
        return f"{missing:,} rows are missing"
    return f"rows that were corrected in {step.import_file} will be written again" if step.is_corrected() else "done"


# The functions below write the dataset: a folder for the Hub with the rows of the last stage of each split. The folder
# is written completely or not at all. All splits have the same columns, because `datasets` requires this. If a split
# has skipped a stage, the columns that this stage adds are empty in the split.


def write_dataset(plan: BuildPlan, rank: int = 0, world_size: int = 1) -> None:
    """Write the folder of the built dataset: the rows from the last stage of each split, and the dataset card.

    If the dataset already exists and was made from the same data, it does not change.

    Args:
        plan: Plan of the build.
        rank: Not used, because a single task (process) writes the dataset.
        world_size: Not used.

    Raises:
        ValueError: If a stage (step of the build) is incomplete or has skipped all rows, the existing dataset was made
            with other data or settings, or a column has different types in two splits.
    """
    output = plan.dataset
    last_stages = {split: steps[-1].output for split, steps in plan.steps.items()}
    digests = {split: identity_digest(read_stage_record(stage)) for split, stage in last_stages.items()}
    if output.is_dir() and any(output.iterdir()):
        if not (output / BUILD_FILE).is_file() or read_json(output / BUILD_FILE).get("stages_digest") != digests:
            raise ValueError(
                f"{output} was built with other data or settings than the stages have now. Remove this folder, and run "
                "the same command again."
            )
        return
    files = {split: _group_parts_into_dataset_files(split, stage) for split, stage in last_stages.items()}
    schema = _unify_schemas(part for split_files in files.values() for parts in split_files for part in parts)
    metadata = {"card": plan.card, "language": plan.language, "splits": {}}
    with atomic_folder(output) as folder:
        for split, split_files in files.items():
            counts = Counter()
            for number, parts in enumerate(tqdm(split_files, desc="Dataset", unit="file")):
                path = folder / "data" / f"{split}-{number:05d}-of-{len(split_files):05d}.parquet"
                counts += _merge_parquet_parts_and_count_captions(path, parts, schema)
            steps = [_summarize_stage_for_card(step) for step in plan.steps[split]]
            metadata["splits"][split] = {"rows": counts.pop("rows"), "captions": dict(counts), "steps": steps}
        plots = (step.output / "report" / SIMILARITY_PLOT_FILE for step in plan.all_steps())
        plot = next(filter(Path.is_file, plots), None)
        if plot is not None:
            shutil.copyfile(plot, folder / SIMILARITY_PLOT_FILE)
        write_skipped_rows(folder / "skipped.jsonl", _list_unembedded_rows(plan))
        write_json(folder / BUILD_FILE, metadata | {"stages_digest": digests})
        write_text(folder / "README.md", _render_dataset_card(metadata, plot and SIMILARITY_PLOT_FILE))


def _list_unembedded_rows(plan: BuildPlan) -> list[SkippedRow]:
    """Return the rows that the stage `embed` has skipped, for the file `skipped.jsonl` of the dataset.

    Local paths in the records are shortened, because the dataset may be published.
    """
    steps = [step for step in plan.all_steps() if isinstance(step, EmbedArguments)]
    paths = (path for step in steps for path in sorted(step.output.glob("*.skipped.jsonl")))
    records = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["source"] = get_publishable_model_or_dataset_name(record["source"])
        record["detail"] = shorten_absolute_paths(record["detail"])
    return [SkippedRow(**record) for record in records]


def _group_parts_into_dataset_files(split: str, stage: Path) -> list[list[Path]]:
    """Decide which parts (parquet files of a stage) each file of the dataset contains.

    Args:
        split: Name of the split.
        stage: Output folder of the last stage of the split.

    Returns:
        A list with one element for each file of the dataset: the list of paths of the parts that the file will
        contain. Their total size is about `TARGET_FILE_BYTES`. Parts without rows are omitted.

    Raises:
        ValueError: If the stage is not complete, or no row is left.
    """
    check_stage_and_count_rows(stage)
    parts = [path for path in sorted(stage.glob(f"{split}-*.parquet")) if pq.read_metadata(path).num_rows]
    if not parts:
        raise ValueError(f"{stage} has no rows: all were skipped. Its *.skipped.jsonl files list the reasons.")
    ends = itertools.accumulate(path.stat().st_size for path in parts)
    numbers = {path: (end - 1) // TARGET_FILE_BYTES for path, end in zip(parts, ends, strict=True)}
    return [list(group) for _, group in itertools.groupby(parts, key=numbers.get)]


def _unify_schemas(parts: Iterable[Path]) -> pa.Schema:
    """Return a schema with all columns that occur in any of the parquet files.

    Raises ValueError if a column has different types in two files.
    """
    features = Features()
    for part in parts:
        for name, feature in Features.from_arrow_schema(pq.read_schema(part)).items():
            if features.setdefault(name, feature) != feature:
                raise ValueError(
                    f"The column {name!r} must have the same type in all splits, got {features[name]} and {feature}."
                )
    return features.arrow_schema


def _merge_parquet_parts_and_count_captions(path: Path, parts: list[Path], schema: pa.Schema) -> Counter[str]:
    """Write one parquet file of the dataset.

    Args:
        path: File to write.
        parts: Parquet files of a stage, whose rows are written in order.
        schema: Columns of the file. If a part lacks a column, the column is null in its rows.

    Returns:
        The number of rows under the key "rows", and for each caption column the number of captions that are not blank.
    """
    counts = Counter()
    with atomic_parquet(path, schema) as parquet:
        for file in map(pq.ParquetFile, parts):
            for group in range(file.num_row_groups):
                table = pa.concat_tables([schema.empty_table(), file.read_row_group(group)], promote_options="default")
                parquet.write_table(table)
                counts["rows"] += len(table)
                for name in filter(CAPTION_COLUMN_RE.fullmatch, schema.names):
                    texts = pc.utf8_trim_whitespace(pc.list_flatten(table[name]))
                    counts[name] += pc.sum(pc.not_equal(texts, "")).as_py() or 0
            file.close()
    return counts


def _summarize_stage_for_card(step: StageArguments) -> dict[str, Any]:
    """Return information about a complete stage for the dataset card.

    Returns:
        A dict with these keys: "name" (name of the stage), "settings" (dict of its settings), "rows_in" and "rows_out"
        (numbers of rows read and written), "left_out" (`{reason: number of skipped rows}`), "quality" (dict with the
        numbers of captions and of flagged captions, or None), "translations" (`{language code: "human" or "machine"}`)
        and "versions" (`{package: version}`).
    """
    record, report = read_stage_record(step.output), check_stage_and_count_rows(step.output)
    quality, quality_counts = step.output / QUALITY_FILE, None
    if quality.is_file():
        report_of_quality = read_json(quality, captions=int, flagged=int)
        quality_counts = {key: report_of_quality[key] for key in ("captions", "flagged")}
        # "usage" has the numbers of tokens. Only backends that call a language model on a server report them.
        if usage := report_of_quality.get("usage"):
            flags = {name: flag["captions"] for name, flag in report_of_quality["flags"].items() if flag["captions"]}
            quality_counts |= {"flags": flags, "usage": usage}
    return {
        "name": step.output.parent.name.partition("-")[2],
        "settings": shorten_absolute_paths(record["settings"]),
        "rows_in": record["source"]["rows"],
        "rows_out": report.rows,
        "left_out": report.skipped,
        "quality": quality_counts,
        "translations": getattr(step, "translations", {}),
        "versions": record["versions"],
    }


def _render_dataset_card(metadata: dict[str, Any], plot_file: str | None) -> str:
    """Return the text of the dataset card (README.md) of a dataset.

    Args:
        metadata: Content of `build.json`: the section `card` of the config, the language, and information about splits
            and stages.
        plot_file: Name of the histogram of similarities in the folder of the dataset; None if there is no histogram.
    """
    card, language, splits = metadata["card"], metadata["language"], metadata["splits"].values()
    steps = [step for split in splits for step in split["steps"]]
    filled = [name for split in splits for name, n in split["captions"].items() if n]
    last_steps = [split["steps"][-1] for split in splits]
    files = [{"split": name, "path": f"data/{name}-*"} for name in metadata["splits"]]
    languages = sorted({name.split("captions-", 1)[1] for name in filled}, key=lambda code: (code != language, code))
    translations = {code: translator for step in steps for code, translator in step["translations"].items()}
    translators = sorted(set(translations.values()))
    tags = ["translated", *(f"{translator}-translated" for translator in translators)] if translators else []
    data = DatasetCardData(
        # The Hub only accepts ISO 639 codes without script or region: `zh` for `zh-Hant`, `por` for `por_Latn`.
        language=list(dict.fromkeys(re.split(r"[-_]", code)[0].lower() for code in languages)),
        **{key: card.get(key) for key in ("license", "license_name", "license_link", "pretty_name")},
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["capivara", "image-text", *tags],
        translations=translations or None,  # training copies this value to the cards of its models
        configs=[{"config_name": "default", "data_files": files}],
    )
    # Stage name -> prompts of its language model, as YAML text. All splits use the same prompts.
    prompts = {
        step["name"]: yaml.dump(content, Dumper=_TextDumper, allow_unicode=True, sort_keys=False)
        for step in steps
        if (content := (step["settings"].get("translator") or step["settings"]).get("prompts"))
    }
    text = DatasetCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        metadata=metadata,
        title=card.get("pretty_name") or f"Images with captions in {', '.join(languages)}",
        description=card.get("description") or "Images with captions, to train image-text models on.",
        caption_columns=list(dict.fromkeys(filled)),
        embeds=next((step["settings"] for step in last_steps if step["name"] == "embed"), None),
        stages={step["name"] for step in steps},
        translators=translators,
        plot_file=plot_file,
        prompts=prompts,
        escape=escape_markdown,  # texts from the config or the data must not act as Markdown
        code=lambda name: "`" + re.sub(r"[`|\s]", "_", name) + "`",
        link=lambda name, url: f"[{name}](<{url}>)" if re.fullmatch(r"https?://[^\s<>]+", url) else name,
        settings=_describe_settings,
    )
    return f"{text}\n"


class _TextDumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line texts in block style, which is easier to read than a quoted string."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Return the YAML node of a text, in block style if the text has several lines."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_TextDumper.add_representer(str, _represent_text)


def _describe_settings(settings: dict[str, Any]) -> str:
    """Return the settings of a stage as one line for the dataset card, for example "model openmoji, language pt".

    The name of the model is the first setting. Settings without a value, digests and long lists are omitted.
    """
    leaves = sorted(flatten_dict(settings).items(), key=lambda leaf: not leaf[0].endswith("model"))
    shown = [(k, v) for k, v in leaves if v is not None and v is not False and not HIDDEN_SETTINGS_RE.search(k)]
    return ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in shown)


def main(argv: list[str] | None = None) -> None:
    """Run the command: build a caption dataset from a config.

    If people must first fill translation tables, the command prints the paths of these tables, and ends without an
    error. If tasks failed, the command exits with status 1.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = build_dataset(parse_arguments(BuildArguments, __doc__, argv))
    except ManualStepRequired as required:
        print(f"Manual step: {required}")  # this is not an error: a person must now fill a translation table
        return
    if folder is not None:
        quoted = shlex.quote(str(folder))
        print(
            f"The dataset is in {folder}, with the dataset card README.md. Train on it with --dataset {quoted}. "
            f"Publish it with: python -m hub_upload.push --model {quoted} --repo_id YOU/NAME --repo_type dataset"
        )


if __name__ == "__main__":
    # When this file runs as a command, its classes belong to the module `__main__`, and other processes can't unpickle
    # them. Import the file again under its own name to avoid this.
    from captions import build as module

    run_main_and_report_user_errors(module.main, resumable=True)
