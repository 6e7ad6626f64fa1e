"""The recipe benchmark: finished runs are reused, and the results contain all conditions."""

import json
from pathlib import Path

import pytest
from datasets import DatasetDict, load_from_disk

import train_accelerate
from benchmarks import recipe
from benchmarks.recipe import DRAWING_SETS, EVALUATION_SPLITS

CONDITIONS = [f"{name}/{split}/{language}" for name, split in EVALUATION_SPLITS for language in ("pt", "en")]
KEYS = {f"{condition}/{way}" for condition in CONDITIONS for way in ("text_to_image", "image_to_text")}


def test_another_config_or_base_model_is_another_run(tmp_path, monkeypatch):
    config = tmp_path / "c.yaml"
    config.write_text("max_steps: 3")
    args = recipe.RecipeArguments(config=config, work=tmp_path / "work")

    def main(words):
        (output,) = (Path(word.partition("=")[2]) for word in words if word.startswith("--output_dir="))
        output.mkdir(parents=True)
        (output / "run.json").touch()

    monkeypatch.setattr(train_accelerate, "main", main)
    runs = [recipe.find_or_train_run(0, args, base) for base in ("0123", "4567")]
    config.write_text("max_steps: 4")
    assert len({*runs, recipe.find_or_train_run(0, args, "0123")}) == 3


@pytest.mark.slow
def test_the_command_measures_all_conditions_and_reuses_runs(tiny_dataset_folder, tiny_folder, monkeypatch, tmp_path):
    rows = load_from_disk(tiny_dataset_folder)["train"]  # recall at 10 needs more than ten images
    for name in ("openmoji", *(f"proxies/{name}" for name in (*DRAWING_SETS[1:], "photos"))):
        DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(tmp_path / name)
    (tmp_path / "c.yaml").write_text(
        "effective_batch_size: 4\nmax_steps: 2\nwarmup_steps: 0\nlearning_rate: 1e-3\neval_languages: [pt]\n"
    )
    flags = ["--base", tiny_folder, "--openmoji", tmp_path / "openmoji", "--proxies", tmp_path / "proxies"]
    flags += ["--config", tmp_path / "c.yaml", "--work", tmp_path / "work"]
    flags = [str(flag) for flag in [*flags, "--output", tmp_path / "recipe.json", "--seeds", 0]]

    monkeypatch.setattr(recipe, "TRAINED_SHARES", {"paper": 1.0, "none": 0.0})
    recipe.main(flags)
    content = json.loads((tmp_path / "recipe.json").read_text())
    base, paper, none = content["rows"]
    assert none["values"] == base["values"] != paper["values"], "a share of 0 gives the base model"
    assert paper["seconds"][0] > 0 and paper["seeds"] == [0] and not paper["gain"] and not base["gain"]
    assert all(gain[1] <= gain[0] <= gain[2] for gain in none["gain"].values())
    assert {key.split("/")[0] for key in none["gain"]} == set(DRAWING_SETS)
    assert set(base["values"]) == KEYS == set(content["n"])
    assert content["chance"]["openmoji/test/pt/text_to_image"] == pytest.approx(16 / 36)
    monkeypatch.setattr(train_accelerate, "main", None)  # a second training would fail
    recipe.main(flags)
    assert json.loads((tmp_path / "recipe.json").read_text())["rows"] == content["rows"]
