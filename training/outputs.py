"""What a training run writes beside its weights: `run.json` and a first model card."""

import html
from pathlib import Path
from typing import Any

import yaml

from artifacts import device_description, package_versions
from training.arguments import RunArguments

CARD = """---
{metadata}
---

# {title}

A [CAPIVARA](https://arxiv.org/abs/2310.13683) model: the text tower of `{model}` fine-tuned on captions in "{language}"
of the data set {dataset}, its image tower left as it was. `run.json` has every setting and measurement of the run,
`results/` the evaluation.

{licence}
"""


def run_facts(
    args: RunArguments,
    seed: int,
    fingerprints: dict[str, str],
    device: Any,
    curve: list[dict],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Content of `run.json`: all that the run was and measured.

    Args:
        args: of the run.
        seed: the one that this repetition used.
        fingerprints: split -> fingerprint of its rows, from `datasets`.
        device: torch device.
        curve: an entry a step, see `eval.plots.plot_training_curves`.
        seconds: phase -> wall-clock seconds.
    """
    steps = sum("loss" in point for point in curve)
    return {
        "schema_version": 1,
        "config": args.to_dict(),
        "seed": seed,
        "dataset_fingerprints": fingerprints,
        "versions": package_versions(),
        "device": device_description(device),
        "steps": steps,
        "pairs": steps * args.effective_batch_size,
        "seconds": seconds,
        "pairs_per_second": steps * args.effective_batch_size / seconds["training"],
        "curve": curve,
    }


def model_card(args: RunArguments, title: str) -> str:
    """A card that states where the model comes from and under which licence; no figures.

    The licence is that of the data set's own card, where it has one: a model trained on share-alike data inherits it.
    """
    data_card = _front_matter(Path(args.dataset) / "README.md")
    metadata = {"language": args.eval_languages, "library_name": "transformers"}
    metadata |= {"pipeline_tag": "zero-shot-image-classification", "tags": ["capivara", "clip"]}
    licence = "The data set states no licence; check it before you share this model."
    if data_card.get("license"):
        metadata["license"] = data_card["license"]
        licence = f"The data set is licensed {data_card['license']}, and so is this model, made from it."
        if data_card.get("attribution"):
            licence += f" {data_card['attribution']}"
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        title=html.escape(title),
        model=args.model if not Path(args.model).is_absolute() else Path(args.model).name,
        dataset=html.escape(str(data_card.get("pretty_name", Path(args.dataset).name))),
        language=args.language,
        licence=html.escape(licence, quote=False),
    )


def _front_matter(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    return yaml.safe_load(text[4 : text.index("\n---", 4)]) or {}
