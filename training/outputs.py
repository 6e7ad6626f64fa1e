"""What a training run writes beside its weights: `run.json` and a first model card."""

import copy
import difflib
import html
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from accelerate import Accelerator
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from torch import nn

from capivara_common.environment import device_description, package_versions
from capivara_common.files import write_text
from capivara_common.privacy import short_name
from caption_data.rows import Skipped
from modeling_capivara import CapivaraProcessor
from modeling_capivara.loading import card_metadata
from training.arguments import RunArguments
from training.checkpoints import TrainerState
from training.trainable import merge_adapters

# Licences that let what is made of several works carry the licence of the other ones, their notices kept.
PERMISSIVE = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "isc", "mit", "ncsa", "pddl"}
PERMISSIVE |= {"postgresql", "unlicense", "zlib"}

CARD = """---
{metadata}
---

# {title}

A [CAPIVARA](https://arxiv.org/abs/2310.13683) model: `{model}` fine-tuned on texts in "{language}" of
{dataset}; trained was {trained}. `run.json` has every setting and measurement of the run,
`results/` the evaluation. `python -m hub_upload.card` makes the full card of both.

{licence}
"""


def run_facts(
    args: RunArguments,
    state: TrainerState,
    accelerator: Accelerator,
    seconds: dict[str, float],
    skipped: list[Skipped],
    energy: dict[str, Any],
) -> dict[str, Any]:
    """Content of `run.json`: all that the run was and measured.

    Args:
        seconds: phase -> wall-clock seconds; "training" has the measurements of the validation split in it.
        energy: of `measure_energy`; empty where it was not measured.
    """
    pairs = state.step * args.effective_batch_size
    return {
        "schema_version": 2,
        "config": args.to_dict(),
        "origins": origins(args),
        "seed": args.seed,
        "dataset_fingerprints": state.data,
        "skipped_rows": dict(Counter(line.reason for line in skipped)),
        "versions": package_versions(),
        "device": device_description(accelerator.device),
        "processes": accelerator.num_processes,
        "steps": state.step,
        "pairs": pairs,
        "seconds": seconds,
        "pairs_per_second": pairs / seconds["training"],
        "energy": energy,
        "curve": state.curve,
    }


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
    found = {"model": origin(args.model, "model"), "datasets": [origin(name, "dataset") for name in args.dataset]}
    stated = [source["licenses"] for source in _works(found)]
    evaluation = origin(args.evaluation_dataset, "dataset")
    return {"license": inherited_license(stated), **found, "evaluation_dataset": evaluation}


def _works(found: dict[str, Any]) -> list[dict[str, Any]]:
    """All that a model is made from."""
    return [found["model"], *found["datasets"]]


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
    metadata = {"language": args.eval_languages, "library_name": "transformers"}
    metadata |= {"pipeline_tag": "zero-shot-image-classification", "tags": ["capivara", "clip"]}
    if base := [sources["model"]["hub_id"]] if sources["model"]["hub_id"] else sources["model"]["base_model"]:
        metadata["base_model"] = base
    trained = "the text tower, the image tower left as it was"
    if args.lora_rank:
        trained += f", through LoRA adapters of rank {args.lora_rank}"
    parts = _works(sources)
    stated = [f"{part['title']}: {', '.join(part['licenses']) or 'no licence stated'}." for part in parts]
    licence = "Base and data state these licences, check them before you share this model:"
    if sources["license"]:
        metadata["license"] = sources["license"]
        licence = f"This model is licensed {sources['license']}, as follows from the licences of its base and data:"
    credits = [part["attribution"] for part in parts if part["attribution"]]
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        title=html.escape(title),
        model=html.escape(sources["model"]["name"]),
        dataset=html.escape(", ".join(part["title"] for part in sources["datasets"])),
        language=args.language,
        trained=trained,
        licence=html.escape(" ".join([licence, *stated, *credits]), quote=False),
    )


def save_step(args: RunArguments, wrapped: nn.Module, processor: CapivaraProcessor, step: int, folder: Path) -> None:
    """Save the model as it is after a step of the training, with processor and card, into `folder`."""
    # Merging changes the weights that are being trained, so that it is done to a copy.
    model = merge_adapters(copy.deepcopy(wrapped)) if args.lora_rank else wrapped
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_text(folder / "README.md", model_card(args, f"CAPIVARA ({args.language}), step {step} of a run"))


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
