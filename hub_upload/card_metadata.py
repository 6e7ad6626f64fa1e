"""The machine-readable side of a card: its front matter with the model index, and `.eval_results/*.yaml`.

The formats: modelcard.md, docs/hub/model-cards-co2.md and docs/hub/eval-results.md of
https://github.com/huggingface/hub-docs.
Values are those of the JSON files, shares and not per cents, to the last digit.
"""

import re
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as entries_as_data

from hub_upload.card_facts import HUB_ID, CardFacts, Fact, Measured
from hub_upload.card_schema import LANGUAGE, LICENCES
from hub_upload.card_tables import energy
from hub_upload.card_text import Writer, one_line

PIPELINE_TAG = "zero-shot-image-classification"
# Of the model index; retrieval is no task of the Hub's own, so its two directions are named as they are.
TASKS = {
    ("retrieval", "text_to_image"): ("text-to-image-retrieval", "Text-to-image retrieval"),
    ("retrieval", "image_to_text"): ("image-to-text-retrieval", "Image-to-text retrieval"),
    ("classification", ""): ("zero-shot-image-classification", "Zero-shot image classification"),
    ("linear_probe", ""): ("image-classification", "Linear probe"),
}
# The figure of a data set that stands for the others on the Hub's page; classification's is the first.
MAIN_METRICS = {"retrieval": "mean_recall"}


def metadata(facts: CardFacts, title: str) -> tuple[ModelCardData, list[str]]:
    """The front matter, and the source of each value of its model index, in their order."""
    results = index_results(facts)
    of = facts.run.get("origins")
    codes = [code.value for code in facts.run["config"]["eval_languages"]]
    languages = list(dict.fromkeys(code.split("-")[0] for code in codes if isinstance(code, str)))
    data = ModelCardData(
        language=[code for code in languages if LANGUAGE.fullmatch(code)] or None,
        license=licence(facts),
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=_one_or_all(base_models(of)),
        datasets=hub_ids(of["datasets"]) or None if of else None,
        tags=_tags(facts, languages),
        model_name=title,
        eval_results=[result for result, _ in results],
    )
    if emitted := _emissions(facts):
        data["co2_eq_emissions"] = emitted
    return data, [source for _, source in results]


def licence(facts: CardFacts) -> str | None:
    """The inherited licence that the run noted, if it is one that the Hub knows; "other" says nothing."""
    of = facts.run.get("origins")
    noted = of.get("license") if of else None
    return noted.value if noted and str(noted.value) in LICENCES - {"other", "unknown"} else None


def base_models(of: Fact | None) -> list[str]:
    """Hub ids of the base: its own, or those that the card of a local base names."""
    if of is None:
        return []
    model = of["model"]
    named = [model.get("hub_id")] if model.get("hub_id") else list(model.get("base_model") or ())
    return [fact.value for fact in named if isinstance(fact.value, str) and HUB_ID.fullmatch(fact.value)]


def hub_ids(origins: Fact) -> list[str]:
    """Hub ids of the data sets that were loaded from there."""
    ids = [origin.get("hub_id") for origin in origins]
    return [fact.value for fact in ids if fact and HUB_ID.fullmatch(str(fact.value))]


def index_results(facts: CardFacts) -> list[tuple[EvalResult, str]]:
    """CAPIVARA's figures for the model index with their sources, those of one task and data set together."""
    found = []
    for record in _published(facts):
        kind, task = TASKS.get((record.task, record.direction), (record.task, record.task))
        revision = facts.revision(record)
        args = {"protocol": one_line(record.protocol), "precision": one_line(record.precision)}
        result = EvalResult(
            task_type=kind,
            task_name=task,
            dataset_type=record.dataset if revision else _slug(one_line(record.dataset)),
            dataset_name=_dataset_name(facts, record),
            dataset_config=one_line(record.language) or None,
            dataset_split=one_line(record.split),
            dataset_revision=revision.value if revision else None,
            metric_type=one_line(record.metric),
            metric_name=Writer("en").metric(record.metric),
            metric_value=record.value.value,
            metric_args=args if record.seed is None else {**args, "seed": record.seed},
        )
        found.append((result, record.value.source))
    order = {result.unique_identifier: None for result, _ in found}  # as huggingface_hub groups them
    return [pair for identifier in order for pair in found if pair[0].unique_identifier == identifier]


def eval_results(facts: CardFacts) -> dict[str, list[dict[str, Any]]]:
    """File in the repository -> entries of the Hub's `.eval_results` format; none for data that are not on the Hub.

    An entry needs a `task_id`, which a benchmark's own `eval.yaml` defines. No figure here comes with one, so it is
    the record's task and direction.
    """
    found: dict[str, list[EvalResultEntry]] = {}
    seen: set[tuple[str, ...]] = set()
    for record in _published(facts):
        revision = facts.revision(record)
        where = (*record.condition, record.direction)
        main = MAIN_METRICS.get(record.task, record.metric)
        if not revision or record.metric != main or where in seen:
            continue
        seen.add(where)
        notes = f"{record.metric}, language {record.language or '-'}, split {record.split}, {record.protocol}"
        notes = one_line(notes)
        entry = EvalResultEntry(
            dataset_id=record.dataset,
            dataset_revision=revision.value,
            task_id="_".join(filter(None, (record.task, record.direction))),
            value=record.value.value,
            notes=notes,
        )
        found.setdefault(f".eval_results/{_slug(record.dataset)}.yaml", []).append(entry)
    return {name: entries_as_data(entries) for name, entries in found.items()}


def _published(facts: CardFacts) -> list[Measured]:
    """Of each of CAPIVARA's figures the one of the weights in the folder; no differences."""
    seed = facts.run["seed"].value
    found = []
    for series in facts.series:
        record = series.of_seed(seed)
        if record and record.model == "capivara" and not record.metric.endswith("_gain"):
            found.append(record)
    return found


def _dataset_name(facts: CardFacts, record: Measured) -> str:
    about = (facts.run.get("origins") or Fact({}, "")).get("evaluation_dataset")
    title = about["title"].value if about and about["name"].value == record.dataset else record.dataset
    return one_line(title)


def _tags(facts: CardFacts, languages: list[str]) -> list[str]:
    tags = ["capivara", "clip", "image-text-retrieval", "zero-shot"]
    tags += ["multilingual"] if len(languages) > 1 else []
    loaders = {"open_clip": "open_clip", "sentence_transformers": "sentence-transformers", "onnx": "onnx"}
    return tags + [tag for kind, tag in loaders.items() if kind in facts.formats]


def _emissions(facts: CardFacts) -> dict[str, Any] | None:
    used = energy(facts)
    if used is None:
        return None
    said = {key: used.about.get(key) for key in ("method", "country", "gpu", "cpu")}
    found = {
        "emissions": 1000 * used.kg_co2e.value,
        "source": str(said["method"].value),
        "training_type": "fine-tuning",
    }
    if said["country"]:
        found["geographical_location"] = one_line(said["country"].value)
    return found | {"hardware_used": one_line((said["gpu"] or said["cpu"] or facts.run["device"]).value)}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"


def _one_or_all(names: list[str]) -> str | list[str] | None:
    return names[0] if len(names) == 1 else names or None
