"""The machine-readable side of a card: its front matter with the model index, and `.eval_results/*.yaml`.

The formats: modelcard.md, docs/hub/model-cards-co2.md and docs/hub/eval-results.md of
https://github.com/huggingface/hub-docs.
Values are those of the JSON files, shares and not per cents, to the last digit.
"""

import re
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from eval.records.schema import GAIN, is_number
from hub_upload.card_facts import HUB_ID, CardFacts, Content
from hub_upload.card_text import Words, one_line

# Of the model index; retrieval is no task of the Hub's own, so its two directions are named as they are.
TASKS = {
    ("retrieval", "text_to_image"): ("text-to-image-retrieval", "Text-to-image retrieval"),
    ("retrieval", "image_to_text"): ("image-to-text-retrieval", "Image-to-text retrieval"),
    ("classification", ""): ("zero-shot-image-classification", "Zero-shot image classification"),
    ("linear_probe", ""): ("image-classification", "Linear probe"),
}
LOADERS = {
    "open_clip": "open_clip",
    "sentence_transformers": "sentence-transformers",
    "onnx": "onnx",
    "transformers_js": "transformers.js",
}
# Identifiers of https://huggingface.co/docs/hub/repositories-licenses, but for "unknown" and "other"
_LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl "
    "gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl lgpl-lr gemma"
)
LICENCES = frozenset(_LICENCES.split())


def metadata(facts: CardFacts, title: str) -> ModelCardData:
    """The front matter. What names no language, licence or Hub id as the Hub knows them is left out."""
    stated = [code.split("-")[0] for code in facts.run["config"]["eval_languages"] if isinstance(code, str)]
    languages = list(dict.fromkeys(stated))
    tags = ["capivara", "clip", "image-text-retrieval", "zero-shot"]
    tags += ["multilingual"] if len(languages) > 1 else []
    model = facts.origins.get("model") or {}
    # The base's own id, or those that the card of a local base names.
    base = hub_ids([model["hub_id"]] if model.get("hub_id") else model.get("base_model") or ())
    data = ModelCardData(
        language=[code for code in languages if re.fullmatch(r"[a-z]{2,3}", code)] or None,  # ISO 639-1 or -3
        license=licence(facts),
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=base[0] if len(base) == 1 else base or None,
        datasets=hub_ids(origin.get("hub_id") for origin in facts.origins.get("datasets", ())) or None,
        tags=tags + [tag for kind, tag in LOADERS.items() if kind in facts.formats],
        model_name=title,
        eval_results=[_index_entry(facts, measured) for measured in _published(facts)],
    )
    if used := energy(facts):
        hardware = used.get("gpu") or used.get("cpu") or facts.run["device"]
        emissions = {"emissions": 1000 * used["kg_co2e"], "source": str(used["method"]), "training_type": "fine-tuning"}
        emissions |= {"geographical_location": one_line(used["country"])} if used.get("country") else {}
        data["co2_eq_emissions"] = emissions | {"hardware_used": one_line(hardware)}
    return data


def licence(facts: CardFacts) -> str | None:
    """The model's licence: the inherited one, else the one that its publisher states."""
    return inherited_licence(facts) or facts.license


def inherited_licence(facts: CardFacts) -> str | None:
    """The inherited licence that the run noted, if it is one that the Hub knows; "other" says nothing."""
    noted = str(facts.origins.get("license"))
    return noted if noted in LICENCES else None


def with_licence(facts: CardFacts, name: str) -> CardFacts:
    """The facts with a licence that is stated. ValueError where the Hub knows none such, or another is inherited."""
    if str(name) not in LICENCES:
        raise ValueError(f"license must be an identifier of the Hub, such as cc-by-4.0 or mit, got {name!r:.60}.")
    if (inherited := inherited_licence(facts) or name) != name:
        raise ValueError(f"The licence {inherited} follows from the model's base and data, so {name} can't be stated.")
    return replace(facts, license=name)


def hub_ids(names: Any) -> list[str]:
    """Those of some names that are Hub ids."""
    return [name for name in names if isinstance(name, str) and HUB_ID.fullmatch(name)]


def energy(facts: CardFacts) -> Content | None:
    """What the first run says of its energy, with `kwh`, `kg_co2e` and `hours` of all; None where one has none."""
    of_runs = [run.get("energy") for run in facts.runs]
    if not all(of_runs):
        return None
    for about in of_runs:
        if not any(word in str(about["method"]) for word in ("estimated", "measured")):
            raise ValueError(f"{about.pointer}/method must say whether energy was measured or estimated, by what.")
        for key in ("kwh", "kg_co2e", "hours"):
            if not is_number(about[key]) or about[key] < 0:
                raise ValueError(f"{about.pointer}/{key} must be a number of at least 0, got {about[key]!r:.60}.")
    used = Content(of_runs[0])
    used.pointer = of_runs[0].pointer
    used |= {key: sum(about[key] for about in of_runs) for key in ("kwh", "kg_co2e", "hours")}
    return used


def eval_results(facts: CardFacts) -> dict[str, str]:
    """File in the repository -> its text in the Hub's `.eval_results` format; none for data that are not on the Hub.

    An entry needs a `task_id`, which a benchmark's own `eval.yaml` defines. No figure here comes with one, so it is
    the record's task and direction.
    """
    found: dict[str, list[EvalResultEntry]] = {}
    seen: set[tuple] = set()
    for measured in _published(facts):
        record, revision = measured.record, facts.revision(measured)
        # The figure that stands for the others on the Hub's page; classification's is the first.
        is_main = record.task != "retrieval" or record.metric == "mean_recall"
        where = (record.condition._replace(metric=""), measured.precision)
        if not revision or not is_main or where in seen:
            continue
        seen.add(where)
        notes = f"{record.metric}, language {record.language or '-'}, split {record.split}, {record.protocol}"
        task = "_".join(filter(None, (record.task, record.direction)))
        entry = EvalResultEntry(record.dataset, task, record.value, dataset_revision=revision, notes=one_line(notes))
        found.setdefault(f".eval_results/{_slug(record.dataset)}.yaml", []).append(entry)
    return {name: yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False) for name, entries in found.items()}


def _published(facts: CardFacts) -> list[Any]:
    """Of each of CAPIVARA's figures of whole embeddings the one of the weights in the folder; no gains."""
    of_model = [value for value in facts.values if value.model == "capivara" and value.metric != GAIN]
    seed = facts.run["seed"]
    return [one for value in of_model for one in value.measured if value.seeds == 1 or one.seed == seed]


def _index_entry(facts: CardFacts, measured: Any) -> EvalResult:
    """A figure for the model index; huggingface_hub puts those of one task and data set together."""
    record, revision = measured.record, facts.revision(measured)
    kind, task = TASKS[record.task, record.direction]
    arguments = {"protocol": one_line(record.protocol), "precision": one_line(measured.precision)}
    return EvalResult(
        task_type=kind,
        task_name=task,
        dataset_type=record.dataset if revision else _slug(one_line(record.dataset)),
        dataset_name=one_line(facts.dataset_title(record.dataset) or record.dataset),
        dataset_config=one_line(record.language) or None,
        dataset_split=one_line(record.split),
        dataset_revision=revision,
        metric_type=one_line(record.metric),
        metric_name=Words("en").name(record.metric),
        metric_value=record.value,
        metric_args=arguments if record.seed is None else {**arguments, "seed": record.seed},
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"
