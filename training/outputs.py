"""What a run measures and writes beside its weights: result files, table, pictures, `run.json`, a first card."""

import difflib
import html
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from accelerate import Accelerator, PartialState
from huggingface_hub import ModelCardData, hf_hub_download, try_to_load_from_cache

from capivara_common.environment import device_description, package_versions
from capivara_common.files import read_json, write_json, write_text
from capivara_common.privacy import short_name
from eval.records.plots import plot_retrieval_sheet, plot_training_curves
from eval.records.schema import SCHEMA_VERSION, header, write_records
from eval.records.tables import retrieval_table
from eval.retrieval import embed_captions, gain_records, retrieval_records
from modeling_capivara import CapivaraModel
from modeling_capivara.loading import card_metadata, load_model
from training.arguments import RunArguments
from training.checkpoints import TrainerState
from training.inputs import Inputs

# Licences that let what is made of several works carry the licence of the other ones, their notices kept.
PERMISSIVE = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "isc", "mit", "ncsa", "pddl"}
PERMISSIVE |= {"postgresql", "unlicense", "zlib"}

CARD = """---
{metadata}
---

# {title}

A [CAPIVARA](https://arxiv.org/abs/2310.13683) model: `{model}` fine-tuned on texts in "{language}" of
{dataset}. `run.json` has every setting and measurement of the run, `results/` the evaluation.
`python -m hub_upload.card` makes the full card of both.

{licence}
"""


def measure(args: RunArguments, inputs: Inputs, accelerator: Accelerator, folder: Path) -> None:
    """Measure the base and the model that was saved in `folder` on the test split of every language.

    Result files, table and sheet of pictures are written beside the model, the seconds of measuring into `run.json`.
    """
    started, run = time.perf_counter(), read_json(folder / "run.json", seconds=dict)
    models = {"baseline": args.model, "capivara": folder}
    models = {role: load_model(name).eval().to(accelerator.device) for role, name in models.items()}
    table, measured = [], {}
    for language, split in inputs.test.items():
        both = measured[language] = {
            role: embed_captions(model, inputs.processor, split.captions(), inputs.test_embeds)
            for role, model in models.items()
        }
        facts = {"dataset": short_name(args.evaluation_dataset), "split": args.test_split, "language": language}
        trained = facts | {"model": "capivara", "model_folder": ".", "seed": args.seed}
        records = retrieval_records(both["baseline"], **facts, model="baseline", model_folder=args.model, seed=None)
        records += retrieval_records(both["capivara"], **trained) + gain_records(*both.values(), **trained)
        known = header(
            dataset=args.evaluation_dataset, dataset_fingerprint=split.fingerprint, model=".",
            device=device_description(accelerator.device), precision="float32",
        )  # fmt: skip
        name = f"retrieval_{facts['dataset'].replace('/', '_')}_{args.test_split}_{language}.json"
        write_records(folder / "results" / name, records, known)
        table += records
    run["seconds"]["evaluation"] = time.perf_counter() - started
    write_text(folder / "table.md", retrieval_table(table))
    split, shown = inputs.test[args.language], measured[args.language]
    queries = [text for texts in split.captions() for text in texts]
    plot_retrieval_sheet(folder / "retrieval.png", split.__getitem__, queries, shown, args.seed, args.language)
    write_json(folder / "run.json", run)


def write_run(args: RunArguments, state: TrainerState, inputs: Inputs, energy: dict[str, Any], folder: Path) -> None:
    """Write the curves of a training that is done, and `run.json`, all that it was; `energy` is of `measure_energy`."""
    plot_training_curves(state.curve, args.language, folder / "curves.png", words=args.language)
    pairs = state.step * args.effective_batch_size
    facts = {
        "schema_version": SCHEMA_VERSION,
        "config": args.to_dict(),
        "origins": origins(args),
        "seed": args.seed,
        "dataset_fingerprints": state.data,
        "skipped_rows": dict(Counter(line.reason for line in inputs.skipped)),
        "versions": package_versions(),
        "device": device_description(PartialState().device),
        "processes": PartialState().num_processes,
        "steps": state.step,
        "pairs": pairs,
        "seconds": {"training": state.seconds},  # with the measurements of the validation split in it
        "pairs_per_second": pairs / state.seconds,
        "energy": energy,
        "curve": state.curve,
    }
    write_json(folder / "run.json", facts)


def check_country(country: str) -> None:
    """Raise ValueError where codecarbon has no figures of a country; it would take the world's without a word."""
    from codecarbon.input import DataSource

    known = DataSource().get_global_energy_mix_data()
    if country not in known:
        nearest = difflib.get_close_matches(country, list(known), n=3, cutoff=0.0)
        raise ValueError(f"carbon_country {country!r} is unknown to codecarbon; the nearest are {nearest}.")


@contextmanager
def measure_energy(args: RunArguments, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """A dictionary that holds, after the block, what codecarbon measured within it; empty without `carbon_country`.

    Of the machine that the main process is on: one of several machines is not the whole.
    """
    energy: dict[str, Any] = {}
    if not args.carbon_country or not accelerator.is_main_process:
        yield energy
        return
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(country_iso_code=args.carbon_country, save_to_file=False, log_level="error")
    tracker.start()
    try:
        yield energy
    finally:
        tracker.stop()
        data = getattr(tracker, "final_emissions_data", None)
        if data is not None:  # codecarbon logs its own failures
            energy |= {
                "kwh": data.energy_consumed,
                "kg_co2e": data.emissions,
                "hours": data.duration / 3600,
                "country": args.carbon_country,
                "cpu": data.cpu_model,
                "gpu": data.gpu_model or None,
                "covers": "this session of the run, on the machine of the main process",
                "method": f"codecarbon {metadata.version('codecarbon')}, offline; estimated without a power meter",
            }


def origins(args: RunArguments) -> dict[str, Any]:
    """What the base and the data sets say of themselves on their own cards: titles, licences, Hub ids and commits.

    Returns:
        Under "license" what the model inherits from all of them: the one licence that binds it, or None where one of
        them states none, or where several bind it.
    """
    model, datasets = origin(args.model, "model"), [origin(name, "dataset") for name in args.dataset]
    return {
        "license": inherited_license([work["licenses"] for work in (model, *datasets)]),
        "model": model,
        "datasets": datasets,
        "evaluation_dataset": origin(args.evaluation_dataset, "dataset"),
    }


def inherited_license(stated: list[list[str]]) -> str | None:
    """The licence of a model made from works of the `stated` licences each; None where it does not follow from them."""
    if not all(stated):
        return None
    named = {licence for licences in stated for licence in licences}
    binding = named - PERMISSIVE or named
    return binding.pop() if len(binding) == 1 else None


def origin(name: str, repo_type: str) -> dict[str, Any]:
    """What the card of a model or data set states.

    Args:
        name: folder, pattern of files, or Hub id; `short_name` of it is kept.
        repo_type: "model" or "dataset".

    Returns:
        `name`, `title`, `hub_id` and `revision` (of one that was loaded from the Hub), `base_model` (Hub ids),
        `licenses`, `attribution`; None or an empty list for what it does not state.
    """
    of_hub = not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    is_of_files = not Path(name).is_dir() and "/" in name  # one file, or a pattern: its card lies beside it
    folder = Path(name).parent if is_of_files else Path(name)
    path = _card_from_hub(name, repo_type) if of_hub else folder / "README.md"
    card = card_metadata(path) if path else {}
    return {
        "name": short_name(name),
        "title": str(card.get("pretty_name") or (name if of_hub else _heading(path) or PurePosixPath(name).name)),
        "hub_id": name if path and of_hub else None,
        "revision": path.parent.name if path and of_hub else None,
        "base_model": _texts(card.get("base_model")),
        "licenses": _texts(card.get("license")),
        "attribution": str(card["attribution"]) if card.get("attribution") else None,
    }


def model_card(args: RunArguments, title: str) -> str:
    """A first card, that states where the model comes from and under which licence; no figures.

    The licence is the one of `origins`: a model trained on share-alike data inherits it.
    """
    sources = origins(args)
    model, works = sources["model"], [sources["model"], *sources["datasets"]]
    data = ModelCardData(
        language=args.eval_languages,
        license=sources["license"],
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["capivara", "clip"],
        base_model=[model["hub_id"]] if model["hub_id"] else model["base_model"] or None,
    )
    licence = "Base and data state these licences, check them before you share this model:"
    if sources["license"]:
        licence = f"This model is licensed {sources['license']}, as follows from the licences of its base and data:"
    stated = [f"{work['title']}: {', '.join(work['licenses']) or 'no licence stated'}." for work in works]
    credits = [work["attribution"] for work in works if work["attribution"]]
    return CARD.format(
        metadata=data.to_yaml(),
        title=html.escape(title),
        model=html.escape(model["name"]),
        dataset=html.escape(", ".join(work["title"] for work in sources["datasets"])),
        language=args.language,
        licence=html.escape(" ".join([licence, *stated, *credits]), quote=False),
    )


def save_model(args: RunArguments, model: CapivaraModel, inputs: Inputs, title: str, folder: Path) -> None:
    """Save a model with its processor and a first card into `folder`."""
    model.save_pretrained(folder)
    inputs.processor.save_pretrained(folder)
    write_text(folder / "README.md", model_card(args, title))


@cache  # `origins` is called twice at the end of a run
def _card_from_hub(name: str, repo_type: str) -> Path | None:
    """The card of what was loaded from the Hub before; None where it has none, or the Hub can't be reached."""
    try:
        cached = try_to_load_from_cache(name, "README.md", repo_type=repo_type)  # of the commit that was loaded
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, "README.md", repo_type=repo_type))
    except (OSError, ValueError):
        return None


def _texts(value: Any) -> list[str]:
    return [str(text) for text in (value if isinstance(value, list) else [value]) if text]


def _heading(card: Path) -> str | None:
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None
