"""What a training run writes beside its weights: `run.json` and a first model card."""

import difflib
import html
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from artifacts import device_description, package_versions
from captions.rows import Skipped
from training.arguments import RunArguments
from training.checkpoints import TrainerState

CARD = """---
{metadata}
---

# {title}

A [CAPIVARA](https://arxiv.org/abs/2310.13683) model: `{model}` fine-tuned on captions in "{language}" of the data set
{dataset}; trained was {trained}. `run.json` has every setting and measurement of the run,
`results/` the evaluation.

{licence}
"""


def run_facts(
    args: RunArguments,
    seed: int,
    state: TrainerState,
    accelerator: Accelerator,
    seconds: dict[str, float],
    skipped: list[Skipped],
    energy: dict[str, Any],
) -> dict[str, Any]:
    """Content of `run.json`: all that the run was and measured.

    Args:
        args: of the run.
        seed: the one that this repetition used.
        state: at the end of training.
        accelerator: device and processes.
        seconds: phase -> wall-clock seconds; "training" has the measurements of the validation split in it.
        skipped: training rows that were left out.
        energy: of `energy_of`; empty where it was not measured.
    """
    pairs = state.step * args.effective_batch_size
    return {
        "schema_version": 2,
        "config": args.to_dict(),
        "seed": seed,
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
def energy_of(args: RunArguments, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
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
        if data is not None:  # codecarbon reports its own failures and goes on
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


def model_card(args: RunArguments, title: str) -> str:
    """A card that states where the model comes from and under which licence; no figures.

    The licence is that of the data set's own card, where it has one: a model trained on share-alike data inherits it.
    """
    data_card = _front_matter(Path(args.dataset[0]) / "README.md")
    others = [_front_matter(Path(name) / "README.md") for name in args.dataset[1:]]
    metadata = {"language": args.eval_languages, "library_name": "transformers"}
    metadata |= {"pipeline_tag": "zero-shot-image-classification", "tags": ["capivara", "clip"]}
    trained = "the text tower, the image tower left as it was" if args.towers == "text" else "both towers"
    if args.lora_rank:
        trained += f", through LoRA adapters of rank {args.lora_rank}"
    licence = "The data set states no licence; check it before you share this model."
    if others:
        stated = [str(card.get("license") or "none") for card in (data_card, *others)]
        licence = f"The data sets state these licences: {', '.join(stated)}. Check them before you share this model."
    elif data_card.get("license"):
        metadata["license"] = data_card["license"]
        licence = f"The data set is licensed {data_card['license']}, and so is this model, made from it."
        if data_card.get("attribution"):
            licence += f" {data_card['attribution']}"
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        title=html.escape(title),
        model=args.model if not Path(args.model).is_absolute() else Path(args.model).name,
        dataset=html.escape(", ".join(_titles(args.dataset, [data_card, *others]))),
        language=args.language,
        trained=trained,
        licence=html.escape(licence, quote=False),
    )


def _titles(names: list[str], cards: list[dict]) -> list[str]:
    return [str(card.get("pretty_name", Path(name).name)) for name, card in zip(names, cards, strict=True)]


def _front_matter(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        content = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
