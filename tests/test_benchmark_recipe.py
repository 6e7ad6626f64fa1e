"""The runner of recipe variants: what is done is not done again, failures stop nobody."""

import json
import random
from functools import partial

import PIL.Image
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from benchmarks import recipe
from benchmarks.recipe import DRAWINGS, NAMES, SETS
from eval.capivara_metrics.metrics import paired_bootstrap

VARIANTS = """
paper: {what: as it is}
hotter: {what: warmer, flags: {learning_rate: 1e-4, eval_languages: [pt, en]}}
half: {what: half-way, of: paper, share: 0.5}
"""
CONDITIONS = [f"{name}/{split}/{language}" for name, split, languages in SETS for language in languages] + [NAMES]
KEYS = [f"{condition}/{way}" for condition in CONDITIONS for way in ("text_to_image", "image_to_text")]


class FakeMeasures:
    """Hits that the test names by the model: here a model is a number."""

    fingerprint, base_digest = "today", "of the base"
    chance = dict.fromkeys(KEYS, 0.1)

    def of(self, model):
        hits = [min(1.0, max(0.0, model + i / 40)) for i in range(8)]
        return {"hits": dict.fromkeys(KEYS, hits), "drift": 1 - model / 10, "data": self.fingerprint}

    def groups(self, key):
        return torch.arange(8)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """One whose models are numbers; `made` lists what was trained."""
    (tmp_path / "v.yaml").write_text(VARIANTS)
    config = tmp_path / "c.yaml"
    config.write_text("max_steps: 3")
    args = recipe.RecipeArguments(tmp_path / "v.yaml", config, seeds=[0, 1], work=tmp_path / "work", base="base")
    found = recipe.Runner(args, recipe.read_variants(args.variants), FakeMeasures())
    found.made = []

    def model(variant, seed):
        found.made.append((variant.name, seed))
        if variant.name == "hotter" and seed == "1":
            raise recipe.RunFailed("error: Unknown flag")
        return {"paper": 0.2, "hotter": 0.4, "half": 0.3}[variant.name], 60.0

    monkeypatch.setattr(found, "model", model)
    monkeypatch.setattr(recipe, "load_model", lambda folder: 0.1)
    monkeypatch.setattr(recipe, "paired_bootstrap", partial(paired_bootstrap, resamples=100))
    return found


def run(runner):
    for variant in runner.variants.values():
        runner.run(variant)
    rows = runner.rows()
    return json.loads(json.dumps({"n": dict.fromkeys(KEYS, 8), "chance": FakeMeasures.chance, "rows": rows}))


def test_what_is_done_is_not_done_again(runner):
    run(runner)
    assert runner.made == [*((name, seed) for name in ("paper", "hotter", "half") for seed in "01")]
    runner.made.clear()
    run(runner)
    assert runner.made == [("hotter", "1")], "only what failed is tried again"
    runner.measures.fingerprint = "tomorrow"
    run(runner)
    assert len(runner.made) == 7, "other data are measured anew"


def test_other_flags_are_another_run(runner):
    folders = {name: runner.folder(variant) for name, variant in runner.variants.items()}
    assert len(set(folders.values())) == 3
    changed = recipe.replace(runner.variants["hotter"], flags={"learning_rate": "2e-4"})
    assert runner.folder(changed) != folders["hotter"]
    runner.args.config.write_text("max_steps: 4")
    assert not {runner.folder(variant) for variant in runner.variants.values()} & set(folders.values())


def test_a_failed_seed_is_listed_and_the_others_go_on(runner):
    rows = {row["name"]: row for row in run(runner)["rows"]}
    assert list(rows) == ["base", "paper", "hotter", "half"]
    assert rows["hotter"]["seeds"] == ["0"] and rows["hotter"]["failed"] == "error: Unknown flag"
    assert rows["half"]["seeds"] == ["0", "1"] and rows["half"]["failed"] is None
    key = "openmoji/validation/pt/text_to_image"
    assert rows["paper"]["values"][key] == pytest.approx([0.2 + 3.5 / 40] * 2)
    gain, low, high = rows["half"]["gain"][key]
    assert gain == pytest.approx(0.1) and low <= gain <= high, "every query gained as much"
    assert rows["paper"]["gain"] == {} and not any(key.startswith("photos") for key in rows["half"]["gain"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paper: {}", "must say `what` it is"),
        ("paper: {what: a, flag: {}}", "Unknown key of paper.*Did you mean `flags`"),
        ("paper: {what: a, share: 1.5}", "a number from 0 to 1, got '1.5'"),
        ("paper: {what: a, share: half}", "a number from 0 to 1, got 'half'"),
        ("paper: {what: a}\nb: {what: b, of: paper, flags: {a: 1}}", "either flags or `of`"),
        ("paper: {what: a}\nb: {what: b, of: papr}", "of 'papr', which is no variant that is trained"),
        ("a: {what: a}", "has no 'paper'"),
        ("paper: {what: a, mean: seeds}", "Unknown key of paper"),
    ],
)
def test_variants_that_can_not_be(text, message, tmp_path):
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.read_variants(tmp_path / "v.yaml")


def test_the_committed_variants_are_read():
    variants = recipe.read_variants(recipe.RecipeArguments().variants)
    assert variants["paper"].flags == {} and len(variants) > 1


@pytest.fixture
def data(tmp_path):
    """Folders of a data set of twelve pictures a split, and of proxies."""
    noise, features = random.Random(0), {"image": Image()}
    features = Features(features | {f"captions-{code}": List(Value("string")) for code in ("pt", "en", "es", "fa")})

    def split():
        columns = {f"captions-{code}": [[f"{code} gato {i}"] for i in range(12)] for code in ("pt", "en", "es", "fa")}
        images = [PIL.Image.new("RGB", (32, 32), tuple(noise.randbytes(3))) for _ in range(12)]
        return Dataset.from_dict({"image": images, **columns}, features=features)

    folders = {name: tmp_path / "proxies" / name for name in (*DRAWINGS[1:], "photos", "neighbours")}
    for folder in [tmp_path / "openmoji", *folders.values()]:
        DatasetDict(train=split(), validation=split(), test=split()).save_to_disk(folder)
    lines = [json.dumps({"en": f"dog {i}", "hi": f"cão {i}"}) + "\n" for i in range(12)]
    (tmp_path / "proxies" / "parallel-hi.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.slow
def test_command(data, tiny_folder):
    (data / "c.yaml").write_text("effective_batch_size: 4\nmax_steps: 2\nwarmup_steps: 0\neval_languages: [pt, en]\n")
    (data / "v.yaml").write_text(
        "paper: {what: as it is, flags: {learning_rate: 1e-3}}\nwrong: {what: a, flags: {no_such: 1}}\n"
        "none: {what: the base, of: paper, share: 0}\n"
    )
    flags = ["--base", tiny_folder, "--openmoji", data / "openmoji", "--proxies", data / "proxies"]
    flags += ["--config", data / "c.yaml", "--variants", data / "v.yaml", "--work", data / "work"]
    flags = [str(flag) for flag in [*flags, "--output", data / "recipe.json", "--seeds", 0]]
    recipe.main(flags)
    content = json.loads((data / "recipe.json").read_text())
    base, paper, wrong, none = content["rows"]
    assert none["values"] == base["values"], "nothing of it was trained"
    assert none["drift"] == pytest.approx([1]) and max(paper["drift"]) < 0.9999
    assert wrong["failed"].startswith("error: Unknown flag: `--no_such`") and not wrong["seeds"]
    assert paper["seconds"][0] > 0 and none["gain"]
    assert set(base["values"]) == set(KEYS) == set(content["n"]) and content["chance"][KEYS[0]] == pytest.approx(
        16 / 36
    )
    with pytest.raises(SystemExit, match=r"Unknown variant: `papr`\. Did you mean `paper`"):
        recipe.main([*flags, "--only", "papr"])
