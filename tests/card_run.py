"""Helpers for the tests of the model card: a tiny training run whose base and data have cards, and changes of it."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import concatenate_datasets, load_from_disk
from tiny import draw_nothing, save_model

import train_accelerate
from modeling_capivara import CapivaraProcessor

SEEDS = Path(__file__).parent / "golden" / "runs" / "seeds"  # a run with the seeds 0, 1 and 2, as the trainer writes it
BASE_CARD = "---\nlicense: mit\n---\n\n# A tiny base\n"
DATA_CARD = """---
license: cc-by-sa-4.0
pretty_name: Quadrados coloridos
attribution: Squares by nobody in particular.
---
"""

_trained_runs: list[Path] = []  # the run of this session, once it is trained


def trained_run(tmp_path_factory: pytest.TempPathFactory, dataset: Path, processor: CapivaraProcessor) -> Path:
    """Return the folder of a run that is trained once per session. Tests must change copies of it only."""
    if not _trained_runs:
        folder = tmp_path_factory.mktemp("trained")
        _trained_runs.append(short_run(folder, dataset, lambda base: save_model(base, processor), max_steps=4))
    return _trained_runs[0]


def short_run(folder: Path, dataset: Path, make_base: Callable[[Path], Any], **more: Any) -> Path:
    """Train a few steps with relative paths, so that the run contains no path of this machine.

    The folders `base` and `data/squares` are written next to the run.
    """
    make_base(folder / "base")
    (folder / "base" / "README.md").write_text(BASE_CARD, encoding="utf-8")
    splits = load_from_disk(dataset)
    # The test split alone is too small for recall@10.
    splits["test"] = concatenate_datasets([splits["test"], splits["validation"]])
    splits.save_to_disk(folder / "data" / "squares")
    (folder / "data" / "squares" / "README.md").write_text(DATA_CARD, encoding="utf-8")
    values = {"model": "base", "dataset": "data/squares", "output_dir": "run"}
    values |= {"effective_batch_size": 10, "micro_batch_size": 4, "warmup_steps": 1, "eval_steps": 2}
    values |= {"learning_rate": 1e-3, "min_learning_rate": 0, "weight_decay": 0, "num_threads": 1} | more
    argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        train_accelerate.main([*argv, "--eval_languages", "pt", "en"])
    return folder / "run"


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change a JSON file; `edit` modifies its content in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def card_of(folder: Path) -> str:
    """Return the text of a folder's card."""
    return (folder / "README.md").read_text(encoding="utf-8")


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Return the front matter and the body of a card."""
    match = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(match[1]), text[match.end() :]


def results_of(folder: Path, language: str = "pt") -> Path:
    """Return the path of a run's result file for a language."""
    return next((folder / "results").glob(f"*_{language}.json"))


def record_of(folder: Path, metric: str, direction: str = "text_to_image", model: str = "capivara") -> dict:
    """Return a record of the Portuguese results."""
    records = json.loads(results_of(folder).read_text(encoding="utf-8"))["records"]
    return next(r for r in records if (r["metric"], r["direction"], r["model"]) == (metric, direction, model))


def runs_of_seeds(folder: Path) -> Path:
    """Copy the run `SEEDS` as three separate runs `seed-0`, `seed-1` and `seed-2`, each with its own results."""
    shutil.copytree(SEEDS, folder)
    for seed in range(3):
        shutil.copytree(folder / "results", folder / f"seed-{seed}" / "results")
        for path in (folder / f"seed-{seed}" / "results").glob("*.json"):
            all_records = json.loads(path.read_text(encoding="utf-8"))["records"]
            records = [record for record in all_records if record["seed"] in (None, seed)]
            change(path, lambda results, records=records: results.update(records=records))
    shutil.rmtree(folder / "results")
    return folder
