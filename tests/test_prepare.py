"""The embedded default's preparation: what is missing is made, once, whole or not at all."""

import pytest
import torch
from conftest import TINY_TEXT, randomise, tiny_config

from eval.metrics import recall_at_k, retrieval_ranks
from examples.openmoji import prepare
from modeling_capivara import CapivaraModel
from modeling_capivara.embedding import embed_texts


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


def test_alignment_repeats_to_the_bit_and_keeps_the_best(tiny_processor, monkeypatch):
    constants = {"BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 2, "EVAL_STEPS": 2, "PATIENCE": 1, "WARMUP_STEPS": 3}
    for name, value in constants.items():
        monkeypatch.setattr(prepare, name, value)
    captions = [[f"{colour} {thing}"] for colour in ("um", "água", "pão") for thing in ("gato", "carro", "azul", "são")]
    dataset = {split: {"captions-en": captions} for split in ("train", "validation")}
    pixels = torch.rand(12, 48, generator=torch.Generator().manual_seed(0))
    models, curves = [], []
    for _ in range(2):
        config = tiny_config(text_projection_type="linear", projection_dim=TINY_TEXT["hidden_size"])
        models.append(randomise(CapivaraModel(config)))
        features = {"train": pixels, "validation": pixels}
        curves.append(prepare.align(models[-1], tiny_processor, dataset, features))
    assert curves[0] == curves[1] and len(curves[0]) > 2
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    best = max(point["validation_mean_recall"] for point in curves[0])
    assert prepare.validation_recall(models[0], tiny_processor, dataset["validation"], pixels) == best


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch):
    def broken(dataset, folder):
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
