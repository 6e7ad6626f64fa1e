"""The embedded default's preparation: what is missing is made, once, whole or not at all."""

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Image, load_from_disk
from tiny import TINY_TEXT, randomise, tiny_config

import training.inputs
from caption_data.sources import open_split
from eval.capivara_metrics.metrics import recall_at_k, retrieval_ranks
from examples.openmoji import prepare
from modeling_capivara import CapivaraModel
from modeling_capivara.embedder import embed_texts
from modeling_capivara.loading import load_model, load_processor
from training.arguments import RunArguments
from training.inputs import build_cache, cache_root, evaluation_pairs


def test_ridge_finds_the_pictures_of_its_captions(tiny_processor):
    """With as many features as pictures and next to no penalty, every caption finds its own picture."""
    config = tiny_config(text_projection_type="linear", projection_dim=TINY_TEXT["hidden_size"])
    model = randomise(CapivaraModel(config)).eval()
    captions = ["um gato", "a casa verde", "pão", "água azul", "são joão", "carro"]
    features = torch.rand(6, 48, generator=torch.Generator().manual_seed(0))
    penalty, prepare.RIDGE_PENALTY = prepare.RIDGE_PENALTY, 1e-4
    try:
        prepare.start_by_ridge(model, tiny_processor, features, captions)
    finally:
        prepare.RIDGE_PENALTY = penalty
    texts = embed_texts(model, tiny_processor, captions)
    images = torch.nn.functional.normalize(model.visual_projection(features), dim=-1).detach()
    rows = torch.arange(6)
    assert recall_at_k(retrieval_ranks(texts, images, rows, rows), 1) == 1


@pytest.fixture
def small_alignment(tiny_processor, monkeypatch):
    """`align` on a tiny model: (kept) -> the model's weights and the curve."""
    constants = {"BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 2, "EVAL_STEPS": 2, "PATIENCE": 1, "WARMUP_STEPS": 3}
    for name, value in constants.items():
        monkeypatch.setattr(prepare, name, value)
    captions = [[f"{colour} {thing}"] for colour in ("um", "água", "pão") for thing in ("gato", "carro", "azul", "são")]
    dataset = {split: {"captions-en": captions} for split in ("train", "validation")}
    pixels = torch.rand(12, 48, generator=torch.Generator().manual_seed(0))

    def run(kept):
        config = tiny_config(text_projection_type="linear", projection_dim=TINY_TEXT["hidden_size"])
        model = randomise(CapivaraModel(config))
        curve = prepare.align(model, tiny_processor, dataset, {"train": pixels, "validation": pixels}, kept)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, curve

    return run


@pytest.mark.slow
def test_an_interrupted_alignment_goes_on_to_the_same_bits(tmp_path, small_alignment, monkeypatch):
    whole, curve = small_alignment(prepare.Kept(tmp_path / "whole", {"train": "a"}))
    assert len(curve) > 4, "too short to be interrupted twice"
    kept, one_step, steps = prepare.Kept(tmp_path / "kept", {"train": "a"}), prepare.align_step, []

    def interrupted(*arguments):
        steps.append(arguments[-1])
        if len(steps) in (4, 9):
            raise KeyboardInterrupt
        return one_step(*arguments)

    monkeypatch.setattr(prepare, "align_step", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            small_alignment(kept)
    again, same_curve = small_alignment(kept)
    assert steps[:4] == [0, 1, 2, 3] and 0 < steps[4] <= 2, "what was kept was not used"
    assert same_curve == curve
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    steps.clear()
    with pytest.raises(KeyboardInterrupt):  # of other data: begun anew
        small_alignment(prepare.Kept(tmp_path / "kept", {"train": "b"}))
    assert steps[0] == 0


def test_features_are_kept(tmp_path, tiny_model, tiny_processor, monkeypatch):
    pictures = [PIL.Image.new("RGB", (40, 40), (50 * number, 90, 10)) for number in range(5)]
    split = Dataset.from_dict({"image": pictures}).cast_column("image", Image())
    kept = prepare.Kept(tmp_path / "kept", {})
    found = prepare.pooled_features(tiny_model, tiny_processor, split, kept, "train")
    monkeypatch.setattr(prepare, "pooled_output", lambda *_: pytest.fail("computed again"))
    assert torch.equal(prepare.pooled_features(tiny_model, tiny_processor, split, kept, "train"), found)
    assert len(found) == 5 and [path.name for path in (tmp_path / "kept").iterdir()] == ["features-train.pt"]


@pytest.mark.slow
def test_a_run_finds_the_embeddings_of_the_pictures(tiny_folder, tiny_dataset_folder, tmp_path, monkeypatch):
    """The pictures go through the tower once: the cache of a run is there, and as the run would make it."""
    monkeypatch.setattr(prepare, "resolve_precision", lambda *_: "no")
    model, processor, data = load_model(tiny_folder), load_processor(tiny_folder), load_from_disk(tiny_dataset_folder)
    kept = prepare.Kept(tmp_path / "kept", {})
    features = {name: prepare.pooled_features(model, processor, data[name], kept, name) for name in data}
    prepare.keep_embeddings(tiny_dataset_folder, tiny_folder, features)
    args = RunArguments(model=str(tiny_folder), dataset=[str(tiny_dataset_folder)])
    for name in data:
        split = open_split(str(tiny_dataset_folder), name, "image")
        pairs = evaluation_pairs(args, split, ["pt"], processor)["pt"]
        options = 4, 0, Accelerator(cpu=True, mixed_precision="no")
        made = build_cache(model, pairs, tmp_path / "cache", *options)
        with monkeypatch.context() as patch:
            patch.setattr(training.inputs, "embed_pixels", lambda *_: pytest.fail("embedded again"))
            found = build_cache(model, pairs, cache_root(args), *options)
        np.testing.assert_allclose(found.arrays[0], made.arrays[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["features-train.pt", "aligned.pt"])
def test_what_is_kept_is_loaded_as_it_was_saved_or_made_anew(tmp_path, caplog, name):
    """Every byte flipped in turn, and cut at some places; the next save puts a good file in its place."""
    kept, saved = prepare.Kept(tmp_path, {"train": "a"}), [torch.arange(6.0), torch.ones(2, 3)]
    kept.save(name, saved)
    path = tmp_path / name
    whole = path.read_bytes()
    bad = [whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in range(len(whole))]
    bad += [whole[:place] for place in (0, 1, 63, 64, len(whole) // 2, len(whole) - 64, len(whole) - 1)]
    for content in bad:
        path.write_bytes(content)
        caplog.clear()
        assert kept.load(name) is None and f"{path} is damaged" in caplog.text
    kept.save(name, saved)
    assert all(map(torch.equal, kept.load(name), saved))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_damaged_features_and_states_are_computed_again(tmp_path, small_alignment, caplog):
    kept = prepare.Kept(tmp_path, {"train": "a"})
    whole, curve = small_alignment(kept)
    path = tmp_path / "aligned.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    again, same_curve = small_alignment(kept)
    assert "aligned.pt is damaged" in caplog.text and same_curve == curve
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch):
    def broken(dataset, folder, kept):
        (folder / "half").write_text("written")
        raise ValueError("no")

    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "dataset_dict.json").touch()
    monkeypatch.setattr(prepare, "load_embedded", lambda folder: {})
    monkeypatch.setattr(prepare, "build_base", broken)
    with pytest.raises(ValueError, match="no"):
        prepare.prepare(tmp_path / "dataset", tmp_path / "base")
    assert [p.name for p in tmp_path.iterdir()] == ["dataset"]


def test_another_data_set_is_left_alone(tmp_path, monkeypatch):
    """`--config configs/openmoji.yaml --dataset DATA` trains on what somebody else made, in any form."""
    for name, file in (("built", "train-0.parquet"), ("base", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("kept")
    monkeypatch.setattr(prepare, "build_dataset", lambda: pytest.fail("a data set was made"))
    prepare.prepare(tmp_path / "built", tmp_path / "base")
    prepare.prepare(tmp_path / "built" / "train-0.parquet", tmp_path / "base")
    assert [path.name for path in (tmp_path / "built").iterdir()] == ["train-0.parquet"]


def test_what_is_there_is_kept(tmp_path, monkeypatch):
    for name, file in (("dataset", "dataset_dict.json"), ("base", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("kept")
    monkeypatch.setattr(prepare, "build_dataset", lambda: pytest.fail("the data set was made again"))
    monkeypatch.setattr(prepare, "build_base", lambda *_: pytest.fail("the base was made again"))
    prepare.prepare(tmp_path / "dataset", tmp_path / "base")
    assert (tmp_path / "base" / "config.json").read_text() == "kept"
