"""The end of a build: the rows of its last stages as one folder for the Hub, parquet files with a data set card.

It is written whole or not at all. All splits get the same columns, empty where a split has gone through fewer stages;
`datasets` would refuse the data set otherwise.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from capivara_common.files import read_json, whole_folder, write_json, write_text
from capivara_common.privacy import hide_paths
from capivara_common.tasks import Phase
from caption_data.rows import CAPTION_COLUMN
from captions.quality import REPORT_FILE
from captions.stages import StageArguments, check_complete, flat, identity_digest, stage_record, whole_parquet
from eval.records.tables import escape_markdown

DATASET_FOLDER = "dataset"
FILE_BYTES = 300_000_000  # of a file, about: the Hub advises some hundred megabytes
FACTS = "build.json"  # what the card says, as JSON
PICTURE = "similarities.png"  # of the selection's report
TEMPLATE = Path(__file__).parent / "dataset_card.md.j2"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# Digests and long lists of settings.
NOT_SHOWN = re.compile(r"(^|\.)(fingerprint|sha256|generation|prefixes|existing|target)(\.|$)")
MEANINGS = {
    "image": "picture, as the bytes of its source",
    "captions": "captions in {language}, of the source or translated",
    "generated-captions": "captions in {language} that a model generated, or translations of such",
    "similarities": "cosine of the image and each of its captions in {language}, captions first, then generated ones",
    "quality": "translations into {language} that look wrong, and why",
}


@dataclass(frozen=True)
class Plan:
    """A whole build."""

    steps: dict[str, list[StageArguments]]  # split -> its stages in order
    output: Path  # folder of all
    language: str  # of the captions
    card: dict[str, Any]  # facts of the card that only people know

    def all_steps(self) -> list[StageArguments]:
        """The stages of all splits, in the order in which they run."""
        return [step for steps in self.steps.values() for step in steps]


def write_dataset(plan: Plan, rank: int = 0, world_size: int = 1) -> Path:
    """Write the data set of a build whose stages are complete; returns its folder. One that is there stays.

    Raises ValueError where splits have columns of one name and different types, or no row is left.
    """
    output = plan.output / DATASET_FOLDER
    last = {split: steps[-1].output for split, steps in plan.steps.items()}
    digests = {split: identity_digest(stage_record(stage)) for split, stage in last.items()}
    if output.is_dir():
        if not (output / FACTS).is_file() or read_json(output / FACTS).get("stages_digest") != digests:
            raise ValueError(
                f"{output} was made from other stages than those that are there. Remove it, and run again."
            )
        return output
    files = {split: _files(split, stage) for split, stage in last.items()}
    schema = _common_schema(part for some in files.values() for parts in some.values() for part in parts)
    facts = {"card": plan.card, "language": plan.language, "splits": {}}
    with whole_folder(output) as folder:
        for split, some in files.items():
            for name, parts in tqdm(some.items(), desc="Data set", unit="file"):
                _write_file(folder / name, parts, schema)
            facts["splits"][split] = _split_facts([folder / name for name in some], plan.steps[split])
        facts["columns"] = list(Features.from_arrow_schema(schema))
        pictures = (step.output / "report" / PICTURE for step in plan.all_steps())
        if picture := next(filter(Path.is_file, pictures), None):
            shutil.copyfile(picture, folder / PICTURE)
        write_json(folder / FACTS, facts | {"stages_digest": digests})
        write_text(folder / "README.md", dataset_card(facts, picture and PICTURE))
    return output


def _files(split: str, stage: Path) -> dict[str, list[Path]]:
    """The files of a split, by their names in the folder, and the parts that each is made of, none without a row."""
    check_complete(stage)
    parts = [path for path in sorted(stage.glob(f"{split}-*.parquet")) if pq.read_metadata(path).num_rows]
    if not parts:
        raise ValueError(f"{stage} has no row that is left. Its *.skipped.jsonl say why.")
    ends = dict(zip(parts, accumulate(path.stat().st_size for path in parts), strict=True))
    files = [list(some) for _, some in groupby(parts, key=lambda path: (ends[path] - 1) // FILE_BYTES)]
    return {f"data/{split}-{n:05d}-of-{len(files):05d}.parquet": some for n, some in enumerate(files)}


def _common_schema(parts: Iterable[Path]) -> pa.Schema:
    """The columns of all parts."""
    features = Features()
    for part in parts:
        for name, feature in Features.from_arrow_schema(pq.read_schema(part)).items():
            if features.setdefault(name, feature) != feature:
                raise ValueError(f"The column {name!r} is {features[name]} in one split and {feature} in another.")
    return features.arrow_schema


def _write_file(path: Path, parts: list[Path], schema: pa.Schema) -> None:
    """A file of some parts, in the columns of all, which are empty where a part has not got them."""
    with whole_parquet(path, schema) as parquet:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    tables = [schema.empty_table(), file.read_row_group(group)]
                    parquet.write_table(pa.concat_tables(tables, promote_options="default"))


def _split_facts(files: Iterable[Path], steps: list[StageArguments]) -> dict[str, Any]:
    """Rows, captions that are not blank by column, and what the stages say of themselves."""
    rows, captions = 0, Counter()
    for path in files:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if CAPTION_COLUMN.fullmatch(name)]
            rows += file.metadata.num_rows
            for batch in file.iter_batches(columns=names):
                for name in names:
                    texts = batch.column(name).flatten().to_pylist()
                    captions[name] += sum(bool(text and text.strip()) for text in texts)
    return {"rows": rows, "captions": dict(captions), "steps": [_step_facts(step) for step in steps]}


def _step_facts(step: StageArguments) -> dict[str, Any]:
    """Of `stage.json`, the parts, and the counts of a translation's quality."""
    record, report, quality = stage_record(step.output), check_complete(step.output), step.output / REPORT_FILE
    found = read_json(quality, captions=int, flagged=int) if quality.is_file() else None
    return {
        "name": step.output.parent.name.partition("-")[2],
        "settings": hide_paths(record["settings"]),
        "rows_in": record["source"]["rows"],
        "rows_out": report.rows,
        "left_out": report.skipped,
        "quality": found and {key: found[key] for key in ("captions", "flagged")},
        "versions": record["versions"],
    }


def dataset_card(facts: dict[str, Any], picture: str | None) -> str:
    """The data set's README.md, of the facts of build.json and the file with the similarities beside it."""
    card, language, splits = facts["card"], facts["language"], facts["splits"].values()
    rows, stages = sum(split["rows"] for split in splits), {step["name"] for split in splits for step in split["steps"]}
    filled = [name for split in splits for name, n in split["captions"].items() if n and CAPTION_COLUMN.fullmatch(name)]
    files = [{"split": name, "path": f"data/{name}-*"} for name in facts["splits"]]
    languages = sorted({name.split("captions-", 1)[1] for name in filled}, key=lambda code: (code != language, code))
    data = DatasetCardData(
        # The Hub takes codes of ISO 639 alone: `zh` of `zh-Hant`, `por` of `por_Latn`.
        language=list(dict.fromkeys(re.split(r"[-_]", code)[0].lower() for code in languages)),
        **{key: card.get(key) for key in ("license", "license_name", "license_link", "pretty_name")},
        size_categories=[next((name for limit, name in SIZES if rows < limit), "n>10M")],
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["capivara", "image-text", *(["translated"] if "translate" in stages else [])],
        configs=[{"config_name": "default", "data_files": files}],
    )
    text = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        title=card.get("pretty_name") or f"Images with captions in {', '.join(languages)}",
        description=card.get("description") or "Images with captions, to train image-text models on.",
        caption_columns=list(dict.fromkeys(filled)),
        stages=stages,
        picture=picture,
        escape=escape_markdown,  # of all texts of others
        code=_code,
        link=lambda name, url: f"[{name}](<{url}>)" if re.fullmatch(r"https?://[^\s<>]+", url) else name,
        meaning=_meaning,
        settings=_settings,
    )
    return f"{text}\n"


def _code(name: str) -> str:
    """A name in backticks."""
    return "`" + re.sub(r"[`|\s]", "_", name) + "`"


def _settings(settings: dict[str, Any]) -> str:
    """Settings in words, the model first; digests and long lists are left to build.json."""
    leaves = sorted(flat(settings).items(), key=lambda leaf: not leaf[0].endswith("model"))
    shown = [(k, v) for k, v in leaves if v is not None and v is not False and not NOT_SHOWN.search(k)]
    return ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in shown)


def _meaning(column: str) -> str:
    """What a column holds, in words."""
    kind = next((kind for kind in MEANINGS if column.startswith(kind + "-")), column)
    return MEANINGS.get(kind, "as in the source").format(language=_code(column.removeprefix(kind + "-")))


PHASE = Phase(write_dataset)
