"""A caption data set from images to a folder that is ready for the Hub: all stages of a config, each resumable.

    python -m captions.build --config configs/captions_pt.yaml --dataset "shards/*.tar" --output data/cc3m-pt
    python -m captions.build --config configs/captions_pt.yaml --dataset "shards/*.tar" --output data/cc3m-pt --dry_run
    python -m captions.build … --tasks 8 --workers 8       # on the GPUs of this machine
    python -m captions.build … --executor slurm --tasks 400 --partition gpu --gpus_per_task 1 --time 04:00:00
    python -m captions.build … --executor ray --tasks 64 --gpus_per_task 1

The stages generate, translate, score and select run in this order, those that the config has a section for; each writes
OUTPUT/<number>-<stage>/<split>, and the last one's rows become OUTPUT/dataset: parquet files with a data set card. The
same command does what is missing. docs/your_language.md says how to write a config, docs/cluster.md how to run it.
"""

import itertools
import logging
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from capivara_common.cli import (
    UsageError,
    config_to_flags,
    flag,
    parse_arguments,
    read_yaml_config,
    run_command,
    unknown_name_message,
)
from capivara_common.executors import PhaseStep, failure_reasons, run_phases
from capivara_common.files import atomic_folder, read_json, write_json, write_text
from capivara_common.privacy import hide_paths
from capivara_common.tasks import ExecutorArguments, Phase
from caption_data.rows import CAPTION_COLUMN_RE, NOT_CHOSEN
from caption_data.sources import STAGE_FILE, find_missing_rows
from captions.generate import GenerateArguments
from captions.score import ScoreArguments
from captions.select import SelectArguments
from captions.stages import (
    GONE,
    RowStage,
    StageArguments,
    atomic_parquet,
    check_complete,
    flatten,
    identity_digest,
    read_stage_record,
    remove_rows,
)
from captions.translate import QUALITY_FILE, TranslateArguments
from eval.records.tables import escape_markdown

# In the order of the chain. A section may be left out; of `translate` there may be a list, one translator a time.
STAGES = {"generate": GenerateArguments, "translate": TranslateArguments}
STAGES |= {"score": ScoreArguments, "select": SelectArguments}
READ_STAGE = "read"  # the stage of a split that no other one works on: its rows as they are
# docs/your_language.md says what they mean.
REQUIRED_KEYS = ("dataset", "output", "language")
CONFIG_KEYS = (*REQUIRED_KEYS, "source_language", "split", "evaluation_splits", "image_column", "rename", "card")
CARD_KEYS = ("pretty_name", "description", "license", "license_name", "license_link", "sources", "attribution")
SOURCE_KEYS = ("name", "url", "license")

DATASET_FOLDER = "dataset"
TARGET_FILE_BYTES = 300_000_000  # of a file, about: the Hub advises some hundred megabytes
BUILD_FILE = "build.json"  # what the card says, as JSON
SIMILARITY_PLOT_FILE = "similarities.png"  # of the selection's report
CARD_TEMPLATE = Path(__file__).parent / "dataset_card.md.j2"
# Digests and long lists of settings.
HIDDEN_SETTINGS_RE = re.compile(r"(^|\.)(fingerprint|sha256|generation|prefixes|existing|target)(\.|$)")
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


@dataclass(frozen=True)
class BuildPlan:
    """A whole build."""

    steps: dict[str, list[StageArguments]]  # split -> its stages in order
    output: Path  # folder of all
    language: str  # of the captions
    card: dict[str, Any]  # facts of the card that only people know

    def all_steps(self) -> list[StageArguments]:
        """The stages of all splits, in the order in which they run."""
        return [step for steps in self.steps.values() for step in steps]


class ManualStepRequired(Exception):
    """The build waits for translations that somebody has to write; the text says in which tables."""


def read_build_plan(
    config: Path, executor_flags: dict[str, Any] | None = None, **overrides: str | Path | None
) -> BuildPlan:
    """The plan of a config file, whose keys are `CONFIG_KEYS` and the names of `STAGES`.

    `executor` are flags of `ExecutorArguments` for all stages; the section of a stage may have its own. What is `given`
    and not None goes before the file. Raises ValueError where a key is unknown or missing, or a value breaks a rule.
    """
    content = {key: value for key, value in read_yaml_config(config).items() if value not in ("", "~", "null")}
    content |= {key: str(value) for key, value in overrides.items() if value is not None}
    _check_keys(content, [*CONFIG_KEYS, *STAGES], str(config))
    for key in REQUIRED_KEYS:
        if not content.get(key):
            raise ValueError(f"{config} lacks `{key}`. Write it there, or give --{key}.")
    card = _check_card(content.get("card"), config)
    found = [(name, section) for name in STAGES for section in _as_list(content.get(name, []))]
    if not found:
        raise ValueError(f"{config} has none of the stages {', '.join(STAGES)}; there is nothing to do.")
    for name, section in found:
        if not isinstance(section, dict):
            raise ValueError(f"{config}: `{name}` must hold `key: value` lines, got {section!r}.")
    chain = [(f"{number}-{name}", section) for number, (name, section) in enumerate(found, 1)]
    train, evaluation = content.get("split", "train"), _as_list(content.get("evaluation_splits", []))
    if train in evaluation:
        raise ValueError(f"{config}: evaluation_splits has {train!r}, which is the split that all stages work on.")
    translations = [one for one in chain if one[0].endswith("translate")] or [(f"0-{READ_STAGE}", {})]
    steps = {train: _plan_steps(content, chain, train, executor_flags or {}, config)}
    steps |= {split: _plan_steps(content, translations, split, executor_flags or {}, config) for split in evaluation}
    return BuildPlan(steps, Path(content["output"]), content["language"], card)


def _plan_steps(content: dict, chain: list[tuple[str, dict]], split: str, executor_flags: dict, config: Path) -> list:
    """The (folder, flags) of a chain as `StageArguments`, each of which reads what the one before it writes.

    Raises ValueError where a key is unknown or a value is of the wrong type.
    """
    steps: list[StageArguments] = []
    dataset, output = content["dataset"], Path(content["output"])
    for title, section in chain:
        name, folder = title.partition("-")[2], output / title / split
        logs = Path(executor_flags.get("logging_dir", output / "logs")) / title / split
        values = {**executor_flags, "dataset": dataset, "output": str(folder), "split": split, "logging_dir": str(logs)}
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
        if "import_file" in values:
            values["import_file"] = str(
                _translation_table_path(Path(str(values["import_file"])), output, output / title)
            )
        kind, where = STAGES.get(name, StageArguments), f"{config}, section {name}"
        flags = config_to_flags(values, kind, where)
        try:
            steps.append(parse_arguments(kind, None, flags))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        dataset = str(folder)
    return steps


def _translation_table_path(name: Path, output: Path, stage: Path) -> Path:
    """Return where a table of translations lies: below `output`, so that builds of two languages never share one.

    An absolute path stays as it is. A stage that an earlier version has begun keeps its table in the current folder.
    """
    if name.is_relative_to(output) or (not (output / name).is_file() and name.is_file() and stage.is_dir()):
        return name
    return output / name


def _check_card(card: Any, config: Path) -> dict[str, Any]:
    """Licence and sources are nothing that a program could know, and a data set without them must not be published."""
    if not isinstance(card, dict):
        raise ValueError(f"{config} lacks `card`, with license and sources: no data set without its sources.")
    _check_keys(card, CARD_KEYS, f"{config}, section card")
    sources = [source if isinstance(source, dict) else {} for source in _as_list(card.get("sources") or {})]
    for source in sources:
        _check_keys(source, SOURCE_KEYS, f"{config}, section card, sources")
    if not all(source.get("name") and source.get("license") for source in sources):
        raise ValueError(f"{config}: card.sources must list the sources, each with a name and a license.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(card.get("license", ""))):
        raise ValueError(
            f"{config}: card.license must be an identifier of the Hub such as cc-by-sa-4.0, or other (with "
            f"license_name and license_link), got {card.get('license')!r}."
        )
    return card | {"sources": sources}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_keys(content: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(
                unknown_name_message(str(key), f"key in {where}", list(known), f"Known are {', '.join(known)}.")
            )


def build_dataset(args: BuildArguments) -> Path | None:
    """Run what is not done yet; returns the folder of the data set, or None where Slurm has taken the jobs.

    Raises:
        ManualStepRequired: a table has to be filled.
        ValueError: the config breaks a rule, a folder is of other settings, or tasks have failed.
        ImportError: a stage needs a package that is not there.
        OSError: the disk is full; the same command does the rest.
    """
    given = {name: getattr(args, name) for name in REQUIRED_KEYS}
    try:
        plan = read_build_plan(args.config, args.executor_flags(), **given)
    except ValueError as error:  # a value of the config is one of the command's
        raise UsageError(str(error)) from error
    for steps in plan.steps.values():
        if _describe_state(steps[0]) != "done":
            check_columns(steps)  # before a model is looked for
    for line in describe_plan(plan):
        logger.info("%s", line)
    if args.dry_run:
        log_counts(plan)
        return None
    for steps in plan.steps.values():
        apply_corrections(steps, plan.output / DATASET_FOLDER)
    runnable, waiting = [], []  # the latter: of each split the first stage whose table is not there yet, or not filled
    for steps in plan.steps.values():
        ready = list(itertools.takewhile(lambda step: not step.pending_manual_step(), steps))
        runnable, waiting = runnable + ready, waiting + steps[len(ready) :][:1]
    # Slurm takes jobs for what is done as well; a table is asked for once none is needed.
    left = [step for step in runnable if not waiting or _describe_state(step) != "done"]
    logs = (args.logging_dir or plan.output / "logs") / "dataset"
    works = [work for step in left for work in PhaseStep.from_phases(step, step.phases, step.title)]
    works += [] if waiting else [PhaseStep(Phase(write_dataset), plan, logs, "dataset")]
    try:
        complete = not works or run_phases(works, args)
    except ValueError:  # such as a dataset without a row, since a filter has dropped all of them
        log_counts(plan)
        raise
    log_counts(plan)
    if not complete:
        logger.info("The jobs are submitted. This command with --dry_run says how far they are.")
        return None
    if waiting:  # the tables of all splits are written, so that they can be translated at once
        lines = [
            *(step.request_manual_step() for step in waiting),
            "Fill the last column, then run the same command again.",
        ]
        raise ManualStepRequired("\n".join(lines))
    return plan.output / DATASET_FOLDER


def check_columns(steps: list[StageArguments]) -> None:
    """Open the dataset of a split and follow its columns through the stages.

    Raises ValueError if the dataset or the split is missing, a stage would lack a column or write one twice, or a
    translation model on this machine does not know a language.
    """
    first, *later = steps
    stage = RowStage(first)
    columns = [*stage.features, *first.check_columns(stage.features, stage.source.display_name)]
    for step in later:
        columns += step.check_columns(columns, f"{step.title}: the output of the stages before it")
    for step in (step for step in steps if isinstance(step, TranslateArguments)):
        step.check_translator()


def apply_corrections(steps: list[StageArguments], dataset: Path) -> None:
    """Remove what was made from cells of a table that were corrected since: the build then makes it again.

    The stage of the table loses the parts with a row that changes, and so does a score right after it, which has the
    same rows. Later stages and the dataset are removed. The record of the table is written last, so that the same
    corrections are found again if this is interrupted.
    """
    for number, step in enumerate(steps):
        if step.pending_manual_step():
            return
        if corrections := step.corrections():
            changed, later = len(corrections.rows), steps[number + 1 :] if corrections.rows else []
            logger.info("%s was corrected: %s rows of %s change.", step.import_file, f"{changed:,}", step.title)
            if (dataset / BUILD_FILE).is_file():
                shutil.rmtree(dataset)
            for after in reversed(later):
                if after is later[0] and isinstance(after, ScoreArguments) and (after.output / STAGE_FILE).is_file():
                    remove_rows(after.output, corrections.rows)
                else:
                    shutil.rmtree(after.output, ignore_errors=True)
            corrections.apply()
        if _describe_state(step) != "done":
            return


def log_counts(plan: BuildPlan) -> None:
    """Log the rows that went into each complete stage and came out, and warn if a filter dropped more than half."""
    for step in (step for step in plan.all_steps() if _describe_state(step) == "done"):
        report, rows = check_complete(step.output), read_stage_record(step.output)["source"]["rows"]
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in report.skipped.items())
        ending = f" ({reasons})" if reasons else ""
        logger.info("%s: %s rows in, %s out%s", step.title, f"{rows:,}", f"{report.rows:,}", ending)
        filters, dropped, total, unit = "", 0, 0, ""
        if isinstance(step, SelectArguments):
            cuts = {"min_pair_similarity": step.min_pair_similarity, "min_similarity": step.strategy_cutoff}
            filters = " and ".join(f"{name} {cut:g}" for name, cut in cuts.items() if cut is not None)
            dropped, total, unit = report.skipped.get(NOT_CHOSEN, 0), rows, "rows"
        elif isinstance(step, TranslateArguments) and step.drop_flagged:
            quality = read_json(step.output / QUALITY_FILE, captions=int, flagged=int)
            filters, dropped, total, unit = "drop_flagged", quality["flagged"], quality["captions"], "translations"
        if dropped > total / 2:
            logger.warning(
                "WARNING: %s: %s dropped %s of %s %s, more than half. If good ones are among them, change it, remove "
                "%s, the stages after it and %s, and run the same command again. A base model that does not know the "
                "language gives low similarities to good captions, too.",
                *(step.title, filters, f"{dropped:,}", f"{total:,}", unit),
                *(step.output.parent, plan.output / DATASET_FOLDER),
            )  # fmt: skip


def describe_plan(plan: BuildPlan) -> list[str]:
    """What is done and what will be, a line a stage, and the tasks that have failed."""
    lines, all_done = [], (plan.output / DATASET_FOLDER).is_dir()
    for steps in plan.steps.values():
        is_current = True  # whether the stages before are done, so that this one has read what they hold now
        for step in steps:
            state = _describe_state(step)
            is_done = state == "done"
            again = ", again where the stages before it change" if is_done and not is_current else ""
            lines.append(f"{step.title}: {state}{again}\n    {step.command()}")
            is_current, all_done = is_current and is_done, all_done and is_done
            for work in PhaseStep.from_phases(step, step.phases, step.title):
                lines += [f"    {work}: task {rank}: {text}" for rank, text in failure_reasons(work.log_folder).items()]
    return [*lines, f"{plan.output / DATASET_FOLDER}: {'done' if all_done else 'to be made'}"]


def _describe_state(step: StageArguments) -> str:
    if waiting := step.pending_manual_step():
        return f"waits for {step.import_file}: {waiting.partition(':')[0]}"
    if not (step.output / STAGE_FILE).is_file():
        return "to be done"
    left, _ = find_missing_rows(step.output)
    if left:
        return f"{left:,} rows to be done"
    return f"to be done again where {step.import_file} was corrected" if step.is_corrected() else "done"


# The end: the rows of the last stages as one folder for the Hub, written whole or not at all. All splits get the same
# columns, empty where a split has gone through fewer stages; `datasets` would refuse the data set otherwise.


def write_dataset(plan: BuildPlan, rank: int = 0, world_size: int = 1) -> None:
    """Write the data set of a build whose stages are complete. One that is there stays.

    Raises ValueError where splits have columns of one name and different types, or no row is left.
    """
    output = plan.output / DATASET_FOLDER
    last = {split: steps[-1].output for split, steps in plan.steps.items()}
    digests = {split: identity_digest(read_stage_record(stage)) for split, stage in last.items()}
    if output.is_dir():
        if not (output / BUILD_FILE).is_file() or read_json(output / BUILD_FILE).get("stages_digest") != digests:
            raise ValueError(
                f"{output} was made from other stages than those that are there. Remove it, and run again."
            )
        return
    files = {split: _group_parts(split, stage) for split, stage in last.items()}
    schema = _common_schema(part for some in files.values() for parts in some for part in parts)
    facts = {"card": plan.card, "language": plan.language, "splits": {}}
    with atomic_folder(output) as folder:
        for split, some in files.items():
            names = [folder / "data" / f"{split}-{n:05d}-of-{len(some):05d}.parquet" for n in range(len(some))]
            progress = tqdm(zip(names, some, strict=True), desc="Data set", unit="file", total=len(some))
            counts = sum((_write_parquet_file(path, parts, schema) for path, parts in progress), Counter())
            steps = [_step_metadata(step) for step in plan.steps[split]]
            facts["splits"][split] = {"rows": counts.pop("rows"), "captions": dict(counts), "steps": steps}
        pictures = (step.output / "report" / SIMILARITY_PLOT_FILE for step in plan.all_steps())
        if picture := next(filter(Path.is_file, pictures), None):
            shutil.copyfile(picture, folder / SIMILARITY_PLOT_FILE)
        write_json(folder / BUILD_FILE, facts | {"stages_digest": digests})
        write_text(folder / "README.md", render_dataset_card(facts, picture and SIMILARITY_PLOT_FILE))


def _group_parts(split: str, stage: Path) -> list[list[Path]]:
    """For each file of a split the parts that it is made of, none without a row."""
    check_complete(stage)
    parts = [path for path in sorted(stage.glob(f"{split}-*.parquet")) if pq.read_metadata(path).num_rows]
    if not parts:
        raise ValueError(f"{stage} has no row that is left. Its *.skipped.jsonl say why.")
    ends = itertools.accumulate(path.stat().st_size for path in parts)
    numbers = {path: (end - 1) // TARGET_FILE_BYTES for path, end in zip(parts, ends, strict=True)}
    return [list(some) for _, some in itertools.groupby(parts, key=numbers.get)]


def _common_schema(parts: Iterable[Path]) -> pa.Schema:
    """The columns of all parts."""
    features = Features()
    for part in parts:
        for name, feature in Features.from_arrow_schema(pq.read_schema(part)).items():
            if features.setdefault(name, feature) != feature:
                raise ValueError(f"The column {name!r} is {features[name]} in one split and {feature} in another.")
    return features.arrow_schema


def _write_parquet_file(path: Path, parts: list[Path], schema: pa.Schema) -> Counter[str]:
    """A file of some parts, in the columns of all, which are empty where a part has not got them.

    Returns the number of its "rows", and by column of captions that of those that are not blank.
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


def _step_metadata(step: StageArguments) -> dict[str, Any]:
    """Of `stage.json`, the parts, and the counts of a translation's quality."""
    record, report, quality = read_stage_record(step.output), check_complete(step.output), step.output / QUALITY_FILE
    found = read_json(quality, captions=int, flagged=int) if quality.is_file() else None
    return {
        "name": step.output.parent.name.partition("-")[2],
        "settings": hide_paths(record["settings"]),
        "rows_in": record["source"]["rows"],
        "rows_out": report.rows,
        "left_out": report.skipped,
        "quality": found and {key: found[key] for key in ("captions", "flagged")},
        "translations": getattr(step, "translations", {}),
        "versions": record["versions"],
    }


def render_dataset_card(metadata: dict[str, Any], plot_file: str | None) -> str:
    """The data set's README.md, of the facts of build.json and the file with the similarities beside it."""
    card, language, splits = metadata["card"], metadata["language"], metadata["splits"].values()
    stages = {step["name"] for split in splits for step in split["steps"]}
    filled = [name for split in splits for name, n in split["captions"].items() if n]
    files = [{"split": name, "path": f"data/{name}-*"} for name in metadata["splits"]]
    languages = sorted({name.split("captions-", 1)[1] for name in filled}, key=lambda code: (code != language, code))
    translations = {
        code: who for split in splits for step in split["steps"] for code, who in step["translations"].items()
    }
    tags = ["translated", *(f"{who}-translated" for who in sorted(set(translations.values())))] if translations else []
    data = DatasetCardData(
        # The Hub takes codes of ISO 639 alone: `zh` of `zh-Hant`, `por` of `por_Latn`.
        language=list(dict.fromkeys(re.split(r"[-_]", code)[0].lower() for code in languages)),
        **{key: card.get(key) for key in ("license", "license_name", "license_link", "pretty_name")},
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["capivara", "image-text", *tags],
        translations=translations or None,  # which the card of a model that is trained on it states, too
        configs=[{"config_name": "default", "data_files": files}],
    )
    text = DatasetCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        metadata=metadata,
        title=card.get("pretty_name") or f"Images with captions in {', '.join(languages)}",
        description=card.get("description") or "Images with captions, to train image-text models on.",
        caption_columns=list(dict.fromkeys(filled)),
        stages=stages,
        translators=set(translations.values()),
        plot_file=plot_file,
        escape=escape_markdown,  # of all texts of others
        code=lambda name: "`" + re.sub(r"[`|\s]", "_", name) + "`",
        link=lambda name, url: f"[{name}](<{url}>)" if re.fullmatch(r"https?://[^\s<>]+", url) else name,
        settings=_describe_settings,
    )
    return f"{text}\n"


def _describe_settings(settings: dict[str, Any]) -> str:
    """Settings in words, the model first; digests and long lists are left to build.json."""
    leaves = sorted(flatten(settings).items(), key=lambda leaf: not leaf[0].endswith("model"))
    shown = [(k, v) for k, v in leaves if v is not None and v is not False and not HIDDEN_SETTINGS_RE.search(k)]
    return ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in shown)


def main(argv: list[str] | None = None) -> None:
    """The command; ends with 1 where tasks have failed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = build_dataset(parse_arguments(BuildArguments, __doc__, argv))
    except ManualStepRequired as required:
        print(f"waiting: {required}")  # no error: what could be done is done
        return
    if folder is not None:
        word = shlex.quote(str(folder))
        print(
            f"The data set is in {folder}; its README.md is the data set card. Train on it with --dataset {word}, "
            f"publish it with: python -m hub_upload.push --model {word} --repo_id YOU/NAME --repo_type dataset"
        )


if __name__ == "__main__":
    from captions import build as module  # by its name, as other machines find it

    run_command(module.main, resumable=True)
