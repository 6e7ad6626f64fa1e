"""Recipe variants: what is trained is not trained again, and the table says what came of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import DatasetDict, load_from_disk

import train_accelerate
from benchmarks import recipe
from benchmarks.recipe import DRAWINGS, OURS, REFERENCE, SETS

LANGUAGES = ("pt", "en")
CONDITIONS = [f"{name}/{split}/{language}" for name, split in SETS for language in LANGUAGES]
KEYS = {f"{condition}/{way}" for condition in CONDITIONS for way in ("text_to_image", "image_to_text")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paper: {}", "must say `what` it is"),
        ("paper: {what: a, flag: {}}", "Unknown key of paper.*Did you mean `flags`"),
        ("paper: {what: a, share: 1.5}", "a number from 0 to 1, got 1.5"),
        ("paper: {what: a, share: half}", "'half'"),
        ("paper: {what: a}\nb: {what: b, of: paper, flags: {a: 1}}", "must have flags, or be `of` a variant above"),
        ("paper: {what: a}\nb: {what: b, of: papr}", "must have flags, or be `of` a variant above"),
        ("a: {what: a}", "must begin with 'paper'"),
    ],
)
def test_variants_that_can_not_be(text, message, tmp_path):
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.read_variants(tmp_path / "v.yaml")


def test_the_committed_variants_are_read():
    variants = recipe.read_variants(recipe.RecipeArguments().variants)
    assert variants[REFERENCE].flags == {} and variants[OURS].of == REFERENCE


def test_other_flags_or_another_config_are_another_run(tmp_path, monkeypatch):
    config = tmp_path / "c.yaml"
    config.write_text("max_steps: 3")
    args = recipe.RecipeArguments(config=config, work=tmp_path / "work")

    def folder(flags, base="0123"):
        return recipe.trained(recipe.Variant("paper", "as it is", flags), 0, args, base)

    def run(command, stdout, **_):
        (output,) = (Path(word.partition("=")[2]) for word in command if word.startswith("--output_dir="))
        output.mkdir()
        (output / "run.json").touch()
        stdout.write("Loading\nerror: Unknown flag: `--no_such`.\n")
        return SimpleNamespace(returncode=2 * ("--no_such=1" in command))

    monkeypatch.setattr(recipe, "subprocess", SimpleNamespace(run=run))
    found = [folder({}), folder({"learning_rate": "1e-4"}), folder({}, "4567")]
    with pytest.raises(ValueError, match=r"paper, seed 0 ended with 2, see .*seed-0.log: error: Unknown flag"):
        folder({"no_such": "1"})
    config.write_text("max_steps: 4")
    found.append(folder({}))
    monkeypatch.setattr(recipe, "subprocess", None)
    assert folder({}) == found[-1] and len(set(found)) == 4


@pytest.fixture
def data(tmp_path, tiny_dataset_folder):
    """Folders of a data set and of proxies."""
    rows = load_from_disk(tiny_dataset_folder)["train"]  # more than ten, or there is no recall at 10
    for name in ("openmoji", *(f"proxies/{name}" for name in (*DRAWINGS[1:], "photos"))):
        DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_command(data, tiny_folder, monkeypatch):
    (data / "c.yaml").write_text("effective_batch_size: 4\nmax_steps: 2\nwarmup_steps: 0\neval_languages: [pt, en]\n")
    (data / "v.yaml").write_text(
        "paper: {what: as it is, flags: {learning_rate: 1e-3, eval_languages: [pt]}}\n"
        "none: {what: the base, of: paper, share: 0}\n"
    )
    flags = ["--base", tiny_folder, "--openmoji", data / "openmoji", "--proxies", data / "proxies"]
    flags += ["--config", data / "c.yaml", "--variants", data / "v.yaml", "--work", data / "work"]
    flags = [str(flag) for flag in [*flags, "--output", data / "recipe.json", "--seeds", 0]]

    def in_this_process(command, **_):
        train_accelerate.main(command[2:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(recipe, "subprocess", SimpleNamespace(run=in_this_process))
    recipe.main(flags)
    content = json.loads((data / "recipe.json").read_text())
    base, paper, none = content["rows"]
    assert none["values"] == base["values"] != paper["values"], "of the one nothing was trained"
    assert paper["seconds"][0] > 0 and paper["seeds"] == [0] and not paper["gain"]
    assert all(gain[1] <= gain[0] <= gain[2] for gain in none["gain"].values())
    assert {key.split("/")[0] for key in none["gain"]} == set(DRAWINGS)
    assert set(base["values"]) == KEYS == set(content["n"])
    assert content["chance"]["openmoji/test/pt/text_to_image"] == pytest.approx(16 / 36)
    monkeypatch.setattr(recipe, "subprocess", None)  # nothing is trained again
    recipe.main([*flags, "--only", "none"])
    assert json.loads((data / "recipe.json").read_text())["rows"] == content["rows"]
    with pytest.raises(ValueError, match=r"Unknown variant: `papr`\. Did you mean `paper`"):
        recipe.main([*flags, "--only", "papr"])
