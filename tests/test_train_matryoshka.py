"""A run that trains prefixes: the turned space, what is measured, and what is made of its model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_train_accelerate import flags

import train_accelerate
from benchmarks.matryoshka import main as benchmark
from benchmarks.matryoshka import matryoshka_table
from modeling_capivara.loading import load_model, load_processor
from records.schema import read_records
from training.interpolate import main as interpolate
from training.matryoshka import load_rotation, rotate_

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for name in ("plot_training_curves", "draw_sheet"):
        monkeypatch.setattr(train_accelerate, name, lambda *args, **options: None)


def trained(base, dataset, output, **overrides):
    values = {"max_steps": 2, "eval_steps": 2, "eval_languages": ["pt"], "matryoshka_dims": [8, 12]}
    values |= {"mixed_precision": "no", **overrides}  # in bf16 turned weights round otherwise
    return train_accelerate.main(flags(base, dataset, output, **{k: v for k, v in values.items() if v != []}))


def validation(out) -> list[dict]:
    return [p["validation"] for p in json.loads((out / "run.json").read_text())["curve"] if "validation" in p]


@pytest.mark.slow
def test_a_run_with_widths(tiny_folder, tiny_dataset_folder, tmp_path):
    plain = trained(tiny_folder, tiny_dataset_folder, tmp_path / "plain", matryoshka_dims=[])
    out = trained(tiny_folder, tiny_dataset_folder, tmp_path / "out")
    assert not (plain / "rotation.safetensors").exists() and load_model(plain).config.matryoshka_dims is None
    rotation, before, after = load_rotation(out), load_model(tiny_folder).eval(), load_model(out).eval()
    assert after.config.matryoshka_dims == [12, 8]
    with torch.no_grad():
        images = [model(pixel_values=PIXELS).image_embeds for model in (before, after)]
    torch.testing.assert_close(images[0] @ rotation.T, images[1], atol=1e-5, rtol=0)
    for measures in zip(validation(plain)[:1], validation(out)[:1], strict=True):
        assert measures[0] == pytest.approx(measures[1], abs=1e-5), "before training, whole embeddings are as they were"
    assert validation(plain)[1]["loss"] != pytest.approx(validation(out)[1]["loss"], abs=1e-7)

    records = read_records(next((out / "results").glob("*.json")))
    assert {(r.model, r.dim) for r in records} == {(m, d) for m in ("baseline", "capivara") for d in (None, 12, 8)}
    whole = [r.value for r in records if r.model == "baseline" and r.dim is None]
    plain_records = read_records(next((plain / "results").glob("*.json")))
    assert whole == [r.value for r in plain_records if r.model == "baseline"]
    assert "pt, first 8 dimensions" in (out / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_teacher_of_the_space_before_is_turned_with_it(tiny_folder, tiny_dataset_folder, tmp_path):
    taught = {"text_teacher": "base", "teacher_loss": "both"}
    curves = []
    for name, dims in (("plain", []), ("out", [12, 8])):
        out = trained(tiny_folder, tiny_dataset_folder, tmp_path / name, matryoshka_dims=dims, **taught)
        curves.append(json.loads((out / "run.json").read_text())["curve"])
    for curve in curves:
        assert curve[0]["teacher_language"]["cosine_to_base"] == pytest.approx(1, abs=1e-5)
    assert curves[0][1]["teacher_loss"] == pytest.approx(curves[1][1]["teacher_loss"], abs=1e-3)


@pytest.mark.slow
def test_views_that_no_cache_holds(tiny_folder, tiny_dataset_folder, tmp_path):
    out = trained(tiny_folder, tiny_dataset_folder, tmp_path / "out", augmented_views=0, image_embedding_cache="off")
    with torch.no_grad():
        images = [load_model(folder).eval()(pixel_values=PIXELS).image_embeds for folder in (tiny_folder, out)]
    torch.testing.assert_close(images[0] @ load_rotation(out).T, images[1], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_where_both_towers_learn_nothing_is_turned(tiny_folder, tiny_dataset_folder, tmp_path):
    more = {"towers": "both", "image_embedding_cache": "off"}
    out = trained(tiny_folder, tiny_dataset_folder, tmp_path / "out", **more)
    assert load_rotation(out) is None and load_model(out).config.matryoshka_dims == [12, 8]


@pytest.mark.slow
def test_the_way_back_is_to_the_turned_base(tiny_folder, tiny_dataset_folder, tmp_path):
    """Between weights of two spaces there would be nothing."""
    out = trained(tiny_folder, tiny_dataset_folder, tmp_path / "out")
    half = trained(tiny_folder, tiny_dataset_folder, tmp_path / "half", interpolate=0.5)
    interpolate([str(tiny_folder), str(out), "--share", "0.5", "--output", str(tmp_path / "same")])
    base = load_model(tiny_folder)
    rotate_(base, load_rotation(out))
    made = [load_model(folder).state_dict() for folder in (out, half, tmp_path / "same")]
    for name, weight in base.state_dict().items():
        if weight.is_floating_point():
            for found in made[1:]:
                torch.testing.assert_close(found[name], (weight + made[0][name]) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(load_rotation(tmp_path / "same"), load_rotation(out))
    with pytest.raises(SystemExit, match="rotated otherwise"):
        interpolate([str(tiny_folder), str(out), str(tiny_folder), "--output", str(tmp_path / "none")])


@pytest.mark.slow
def test_adapters_of_a_turned_base_are_merged_alone(tiny_folder, tiny_dataset_folder, tmp_path):
    pytest.importorskip("peft")
    out = trained(tiny_folder, tiny_dataset_folder, tmp_path / "out", lora_rank=2)
    assert not (out / "adapter").exists() and load_rotation(out) is not None
    with torch.no_grad():
        texts = load_processor(out)(text=["um gato"], return_tensors="pt")
        assert load_model(out).get_text_features(**texts, truncate_dim=8).pooler_output.shape == (1, 8)


@pytest.mark.slow
def test_the_benchmark_of_two_runs(tiny_folder, tiny_dataset_folder, tmp_path, capsys):
    folders = {"plain": tmp_path / "plain", "trained": tmp_path / "trained"}
    for name, dims in (("plain", []), ("trained", [12, 8])):
        trained(tiny_folder, tiny_dataset_folder, folders[name], matryoshka_dims=dims, runs=2)
    named = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    benchmark(named)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["widths"] == [24, 12, 8] and all(len(row["12"]) in (1, 2) for row in found["recall"].values())
    for kind in ("base", "plain"):
        assert found["recall"][f"{kind}, cut"]["24"] == found["recall"][f"{kind}, turned"]["24"]
    table = matryoshka_table(found)
    assert len(table.splitlines()) == 9 and "2 seed(s)" in table
    with pytest.raises(SystemExit, match="differ in matryoshka_dims alone, and differ in max_steps"):
        trained(tiny_folder, tiny_dataset_folder, tmp_path / "other", matryoshka_dims=[], runs=2, max_steps=3)
        benchmark(["--plain", str(tmp_path / "other"), *named[2:]])
    with pytest.raises(SystemExit, match="has no rotation"):
        benchmark([*named[:3], str(folders["plain"])])


@pytest.mark.slow
def test_the_rotation_is_one_tensor_of_its_own_name(tiny_folder, tiny_dataset_folder, tmp_path):
    out = trained(tiny_folder, tiny_dataset_folder, tmp_path / "out", max_steps=1, warmup_steps=0, eval_steps=1)
    assert list(load_file(out / "rotation.safetensors")) == ["rotation"]
