"""A tiny training run whose base and data have cards, and folders made from it, for the tests of the model card."""

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

SEEDS = Path(__file__).parent / "golden" / "runs" / "seeds"  # a run of the seeds 0, 1 and 2, as the trainer lays it out
BASE_CARD = "---\nlicense: mit\n---\n\n# A tiny base\n"
DATA_CARD = """---
license: cc-by-sa-4.0
pretty_name: Quadrados coloridos
attribution: Squares by nobody in particular.
---
"""


_made: list[Path] = []


def trained_run(tmp_path_factory: pytest.TempPathFactory, dataset: Path, processor: CapivaraProcessor) -> Path:
    """Folder of a run, trained once in a session; tests change copies of it."""
    if not _made:
        folder = tmp_path_factory.mktemp("trained")
        _made.append(short_run(folder, dataset, lambda base: save_model(base, processor), max_steps=4))
    return _made[0]


def short_run(folder: Path, dataset: Path, make_base: Callable[[Path], Any], **more: Any) -> Path:
    """Train for a moment, from within `folder`, so that no path of the machine is in it; `base` and `data/squares` lie
    beside the run."""
    make_base(folder / "base")
    (folder / "base" / "README.md").write_text(BASE_CARD, encoding="utf-8")
    splits = load_from_disk(dataset)  # of pictures that recall@10 says something of
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
    """Edit a JSON file in place; `edit` changes what it is given."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    found = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(found[1]), text[found.end() :]


def results_of(folder: Path, language: str = "pt") -> Path:
    return next((folder / "results").glob(f"*_{language}.json"))


def record_of(folder: Path, metric: str, direction: str = "text_to_image", model: str = "capivara") -> dict:
    records = json.loads(results_of(folder).read_text(encoding="utf-8"))["records"]
    return next(r for r in records if (r["metric"], r["direction"], r["model"]) == (metric, direction, model))


def runs_of_seeds(folder: Path) -> Path:
    """The run `SEEDS`, each seed a run of its own in `seed-0`, `seed-1` and `seed-2` with its own results."""
    shutil.copytree(SEEDS, folder)
    for seed in range(3):
        shutil.copytree(folder / "results", folder / f"seed-{seed}" / "results")
        for path in (folder / f"seed-{seed}" / "results").glob("*.json"):
            of = [r for r in json.loads(path.read_text(encoding="utf-8"))["records"] if r["seed"] in (None, seed)]
            change(path, lambda results, of=of: results.update(records=of))
    shutil.rmtree(folder / "results")
    return folder
