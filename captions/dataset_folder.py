"""The end of a build: the rows of its last stages as one folder for the Hub, parquet files with a data set card.

Files are written one by one, whole or not at all, into a folder beside the final one, which gets its name when all are
there: the same command finishes an unfinished one. All splits get the same columns, empty where a split has gone
through fewer stages; `datasets` would refuse the data set otherwise.
"""

import shutil
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from tqdm.auto import tqdm

from caption_data.columns import CAPTION_COLUMN
from caption_data.stage_folder import check_complete, identity_digest, stage_record
from captions.build_plan import Plan
from captions.dataset_card import DatasetFacts, SplitFacts, StepFacts, dataset_card
from captions.stages import Phase
from common.files import finish_folder, no_space_left, partial_folder, read_json, write_json, write_text

DATASET_FOLDER = "dataset"
FILE_BYTES = 300_000_000  # of a file, about: the Hub advises some hundred megabytes
FACTS = "build.json"  # what the card says, as JSON
PICTURE = "similarities.png"  # of the selection's report


@dataclass(frozen=True)
class _Target:
    """A file of the data set, and the parts that it is made of."""

    path: Path
    parts: list[Path]


def write_dataset(plan: Plan) -> Path:
    """Write the data set of a build whose stages are complete; returns its folder. One that is there stays.

    Raises:
        ValueError: splits have columns of one name and different types, or no row is left.
        OSError: the disk is full; the same command does the rest.
    """
    output = plan.output / DATASET_FOLDER
    digests = {split: _digest(steps[-1].args.output) for split, steps in plan.steps.items()}
    if output.is_dir():
        if _digests_in(output) != digests:
            raise ValueError(
                f"{output} was made from other stages than those that are there. Remove it, and run again."
            )
        return output
    folder = partial_folder(output)
    if folder.is_dir() and _digests_in(folder) != digests:
        shutil.rmtree(folder)  # of stages that were made anew since
    targets = {split: _targets(folder / "data", split, steps[-1].args.output) for split, steps in plan.steps.items()}
    schema = _common_schema([part for some in targets.values() for target in some for part in target.parts])
    try:
        write_json(folder / FACTS, {"stages_digest": digests})
        _write_files([target for some in targets.values() for target in some], schema)
        facts = DatasetFacts(
            plan.card,
            plan.language,
            {split: _split_facts(some, plan, split) for split, some in targets.items()},
            list(Features.from_arrow_schema(schema)),
        )
        report = _report_folder(plan)
        if report is not None:
            shutil.copyfile(report / PICTURE, folder / PICTURE)
        write_json(folder / FACTS, facts.to_dict() | {"stages_digest": digests})
        write_text(folder / "README.md", dataset_card(facts, PICTURE if report is not None else None))
        finish_folder(output)
    except OSError as error:
        if no_space_left(error):
            raise OSError(f"No space left on the disk while writing {folder}; the same command goes on") from error
        raise
    return output


def _digest(stage: Path) -> str:
    """Of what a stage was made from, which its stage.json says."""
    return identity_digest(stage_record(stage))


def _digests_in(folder: Path) -> dict[str, str] | None:
    return read_json(folder / FACTS).get("stages_digest") if (folder / FACTS).is_file() else None


def _targets(folder: Path, split: str, stage: Path) -> list[_Target]:
    """The files of a split: parts that belong together, none of them without a row."""
    check_complete(stage)
    parts = [path for path in sorted(stage.glob(f"{split}-*.parquet")) if pq.read_metadata(path).num_rows]
    if not parts:
        raise ValueError(f"{stage} has no row that is left. Its *.skipped.jsonl say why.")
    ends = accumulate(path.stat().st_size for path in parts)
    groups: dict[int, list[Path]] = {}
    for path, end in zip(parts, ends, strict=True):
        groups.setdefault(int((end - 1) // FILE_BYTES), []).append(path)
    names = [f"{split}-{number:05d}-of-{len(groups):05d}.parquet" for number in range(len(groups))]
    return [_Target(folder / name, group) for name, group in zip(names, groups.values(), strict=True)]


def _common_schema(parts: list[Path]) -> pa.Schema:
    """The columns of all parts."""
    features = Features()
    for part in parts:
        schema = pq.read_schema(part)
        for name, feature in Features.from_arrow_schema(schema).items():
            if features.setdefault(name, feature) != feature:
                raise ValueError(f"The column {name!r} is {features[name]} in one split and {feature} in another.")
    return features.arrow_schema


def _write_files(targets: list[_Target], schema: pa.Schema) -> None:
    for target in tqdm(targets, desc="Data set", unit="file"):
        if target.path.is_file():
            continue
        target.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.path.with_name(f".{target.path.name}.tmp")
        try:
            with pq.ParquetWriter(temporary, schema, use_dictionary=False, write_statistics=False) as parquet:
                for part in target.parts:
                    with pq.ParquetFile(part) as file:
                        for group in range(file.num_row_groups):
                            parquet.write_table(_with_all_columns(file.read_row_group(group), schema))
            temporary.rename(target.path)
        finally:
            temporary.unlink(missing_ok=True)


def _with_all_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type) for field in schema
    ]
    return pa.table(columns, schema=schema)


def _split_facts(targets: list[_Target], plan: Plan, split: str) -> SplitFacts:
    """Counts out of the files and of the stages' JSON."""
    rows, captions = 0, Counter()
    for target in targets:
        with pq.ParquetFile(target.path) as file:
            names = [name for name in file.schema_arrow.names if CAPTION_COLUMN.fullmatch(name)]
            rows += file.metadata.num_rows
            for batch in file.iter_batches(columns=names):
                for name in names:
                    texts = batch.column(name).flatten().to_pylist()
                    captions[name] += sum(bool(text and text.strip()) for text in texts)
    steps = []
    for step in plan.steps[split]:
        record, report = stage_record(step.args.output), check_complete(step.args.output)
        quality = step.args.output / "quality.json"
        steps.append(StepFacts.of(step.name, record, report, quality))
    return SplitFacts(rows, dict(captions), steps)


def _report_folder(plan: Plan) -> Path | None:
    """Of the selection, where there was one with similarities."""
    for steps in plan.steps.values():
        for step in steps:
            if step.name == "select" and (step.args.output / "report" / PICTURE).is_file():
                return step.args.output / "report"
    return None


PHASES = {"dataset": Phase(lambda plan, rank, world_size: write_dataset(plan))}
