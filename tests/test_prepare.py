"""Preparation of the demo: missing parts are built once, complete or not at all."""

import pytest
import torch
from datasets import Dataset
from tiny import TINY_TEXT, randomize, tiny_config

from eval.capivara_metrics.metrics import compute_ranks_from_embeddings, recall_at_k
from examples.openmoji import prepare
from modeling_capivara import CapivaraModel
from modeling_capivara.two_towers import embed_texts


def test_ridge_regression_finds_the_image_of_each_caption(tiny_processor):
    """With more features than images and almost no penalty, every caption finds its own image."""
    config = tiny_config(text_projection_type="linear", projection_dim=TINY_TEXT["hidden_size"])
    model = randomize(CapivaraModel(config)).eval()
    captions = ["um gato", "a casa verde", "pão", "água azul", "são joão", "carro"]
    features = torch.rand(6, 48, generator=torch.Generator().manual_seed(0))
    penalty, prepare.RIDGE_PENALTY = prepare.RIDGE_PENALTY, 1e-4
    try:
        prepare.initialize_projections(model, tiny_processor, features, captions)
    finally:
        prepare.RIDGE_PENALTY = penalty
    texts = embed_texts(model, tiny_processor, captions)
    images = torch.nn.functional.normalize(model.visual_projection(features), dim=-1).detach()
    rows = torch.arange(6)
    assert recall_at_k(compute_ranks_from_embeddings(texts, images, rows, rows), 1) == 1


@pytest.mark.slow
def test_the_alignment_returns_the_weights_of_the_highest_recall(tiny_processor, monkeypatch):
    """The curve also has the evaluations after it, and two runs give the same bits."""
    constants = {"BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 2, "EVAL_STEPS": 2, "PATIENCE": 1, "WARMUP_STEPS": 3}
    for name, value in constants.items():
        monkeypatch.setattr(prepare, name, value)
    captions = [[f"{first} {second}"] for first in ("um", "água", "pão") for second in ("gato", "carro", "azul", "são")]
    dataset = {split: {"captions-en": captions} for split in ("train", "validation")}
    pixels = torch.rand(12, 48, generator=torch.Generator().manual_seed(0))

    def run():
        config = tiny_config(text_projection_type="linear", projection_dim=TINY_TEXT["hidden_size"])
        model = randomize(CapivaraModel(config))
        return model, prepare.train_text_tower_until_recall_stops_rising(
            model, tiny_processor, dataset, {"train": pixels, "validation": pixels}
        )

    (model, curve), (second_model, second_curve) = run(), run()
    recalls = [point["validation_mean_recall"] for point in curve]
    assert len(curve) > 2 and recalls[-1] < max(recalls) > recalls[0] and second_curve == curve
    assert prepare.compute_validation_recall(model, tiny_processor, dataset["validation"], pixels) == max(recalls)
    assert all(torch.equal(tensor, second_model.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("loss", prepare.LOSS_CONFIGS)
def test_a_step_trains_with_the_loss_of_the_configuration(loss, tiny_processor, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_SIZE", 4)
    config = tiny_config(
        text_projection_type="linear", projection_dim=TINY_TEXT["hidden_size"], **prepare.LOSS_CONFIGS[loss]
    )
    model = randomize(CapivaraModel(config))
    optimizer, _ = prepare.build_alignment_optimizer_and_warmup(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pixels = torch.rand(4, 48, generator=torch.Generator().manual_seed(0))
    captions = [["um gato"], ["são"], ["água"], ["pão"]]
    prepare.train_text_tower_one_step(model, tiny_processor, captions, pixels, torch.zeros(48), optimizer, 0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert ("logit_bias" in changed) == (loss == "sigmoid") and "logit_scale" in changed
    assert not [name for name in changed if name.startswith("vision_model.")]


@pytest.mark.parametrize("file", ["dataset_dict.json", "train-0.parquet"])
def test_existing_datasets_and_models_are_not_changed(tmp_path, monkeypatch, file):
    """`--config configs/openmoji.yaml --dataset DATA` also trains on other datasets, of any format."""
    for folder, name in (("data", file), ("base", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("kept")
    monkeypatch.setattr(prepare, "build_dataset", lambda: pytest.fail("the dataset was built again"))
    monkeypatch.setattr(prepare, "train_and_save_base_model", lambda *_: pytest.fail("the base model was built again"))
    for dataset in (tmp_path / "data", tmp_path / "data" / file):
        prepare.build_missing_dataset_and_base_model(dataset, tmp_path / "base")
    assert [(path.name, path.read_text()) for path in (tmp_path / "data").iterdir()] == [(file, "kept")]
    assert (tmp_path / "base" / "config.json").read_text() == "kept"


def test_selected_tokens_are_cached_for_the_next_run(tmp_path, tiny_processor, monkeypatch):
    """A run that was stopped does not select them again; other settings do."""
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path))
    calls = []

    def select_token_ids(processor, languages, words, texts):
        calls.append(texts)
        return [1, 2]

    monkeypatch.setattr(prepare, "select_token_ids_to_keep", select_token_ids)
    dataset = {"train": Dataset.from_dict({"captions-en": [["a cat"]], "captions-pt": [["um gato"]]})}
    for _ in range(2):
        assert prepare.select_or_load_cached_vocabulary_ids(dataset, tiny_processor) == [1, 2]
    assert calls == [["a cat", "um gato"]]
    monkeypatch.setattr(prepare, "VOCABULARY_WORD_COUNTS", (10, 10))
    prepare.select_or_load_cached_vocabulary_ids(dataset, tiny_processor)
    assert len(calls) == 2


def test_time_and_space_are_announced_before_the_work(tmp_path, monkeypatch, caplog):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "build_dataset", stop)
    with caplog.at_level("INFO", "capivara"), pytest.raises(KeyboardInterrupt):
        prepare.build_missing_dataset_and_base_model(tmp_path / "data", tmp_path / "base")
    assert prepare.DATASET_COST_NOTE in caplog.text
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").touch()
    monkeypatch.setattr(prepare, "load_dataset_and_refuse_image_paths", stop)
    with caplog.at_level("INFO", "capivara"), pytest.raises(KeyboardInterrupt):
        prepare.build_missing_dataset_and_base_model(tmp_path / "data", tmp_path / "base")
    assert prepare.BASE_COST_NOTE in caplog.text and not (tmp_path / "base").exists()
