"""Batches, schedule and step of the training."""

import math
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from modeling_capivara import clip_loss
from training.arguments import parse_arguments
from training.data import batch_indices, drawn_captions, load_splits
from training.loop import train
from training.step import build_optimizer, clamp_logit_scale, learning_rate_at, micro_batches, text_embeddings

CAPTIONS = ["gato", "uma foto de um gato azul", "a casa", "o carro verde e a árvore", "pão", "são joão", "água"]


def arguments(**values):
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return parse_arguments(["--model", "m", "--dataset", "d", *flags], "")


def test_an_epoch_holds_every_image_at_most_once():
    rows = np.concatenate([batch_indices(step, 4, 11, seed=0) for step in range(2)])
    assert len(set(rows)) == 8
    assert not np.array_equal(batch_indices(0, 4, 11, 0), batch_indices(2, 4, 11, 0)), "a new epoch, a new order"
    assert not np.array_equal(batch_indices(0, 4, 11, 0), batch_indices(0, 4, 11, 1)), "a new seed, a new order"
    assert np.array_equal(batch_indices(5, 4, 11, 0), batch_indices(5, 4, 11, 0))


def test_all_captions_are_drawn_in_time():
    captions = [["a", "b", "c"], ["d"]]
    drawn = [drawn_captions(captions, np.array([0, 1]), step, seed=0) for step in range(300)]
    shares = [sum(d[0] == text for d in drawn) / 300 for text in "abc"]
    assert min(shares) > 0.25 and all(d[1] == "d" for d in drawn)


def test_micro_batches_are_cut_by_length(tiny_processor):
    batches, order = micro_batches(tiny_processor, CAPTIONS, 3)
    assert sorted(order) == list(range(7)) and [len(b["input_ids"]) for b in batches] == [3, 3, 1]
    lengths = torch.cat([b["attention_mask"].sum(dim=1) for b in batches])
    assert (lengths.diff() >= 0).all()
    assert batches[0]["input_ids"].shape[1] < batches[-1]["input_ids"].shape[1]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_gradient_does_not_depend_on_the_micro_batch(tiny_model, tiny_processor, size):
    """The whole batch in one forward, in its own order, padded to 77, is the reference."""
    images = torch.nn.functional.normalize(torch.randn(7, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    whole = tiny_processor(text=CAPTIONS, padding="max_length", return_tensors="pt")
    clip_loss(tiny_model(**whole).text_embeds, images, tiny_model.logit_scale).backward()
    expected = {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}
    assert sum(g.abs().sum() for g in expected.values()) > 0, "an all-zero gradient would prove nothing"
    tiny_model.zero_grad()
    batches, order = micro_batches(tiny_processor, CAPTIONS, size)
    clip_loss(text_embeddings(tiny_model, batches), images[order], tiny_model.logit_scale).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(tiny_model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_schedule():
    args = arguments(learning_rate=5e-7, min_learning_rate=1e-7, warmup_steps=500, max_steps=5863)
    assert learning_rate_at(0, args) == 1e-7
    assert learning_rate_at(250, args) == pytest.approx(3e-7)
    assert learning_rate_at(500, args) == pytest.approx(5e-7)
    assert learning_rate_at((500 + 5863) / 2, args) == pytest.approx(3e-7)
    assert learning_rate_at(5863, args) == pytest.approx(1e-7)


def test_optimiser_is_adam_with_coupled_l2(tiny_model):
    """A penalty alone moves a weight by the whole learning rate under Adam, by a tiny share of it under AdamW."""
    tiny_model.freeze_image_tower()
    optimizer = build_optimizer(tiny_model, arguments(learning_rate=1e-3, weight_decay=0.2))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in tiny_model.parameters() if p.requires_grad}
    weight = tiny_model.text_projection[0].weight
    before = weight.detach().clone()
    for parameter in tiny_model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = (weight - before)[before.abs() > 1e-3]
    torch.testing.assert_close(moved, -1e-3 * before[before.abs() > 1e-3].sign(), rtol=1e-2, atol=0)


def test_clamp_binds():
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        scale = torch.nn.Parameter(torch.tensor(value))
        clamp_logit_scale(scale)
        assert scale.item() == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_moves_the_text_tower_alone(tiny_model, tiny_processor, precision):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    images = torch.nn.functional.normalize(torch.randn(7, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    args = arguments(
        effective_batch_size=7,
        micro_batch_size=3,
        max_steps=25,
        learning_rate=3e-3,
        min_learning_rate=0,
        warmup_steps=2,
    )
    args.weight_decay = 0.0
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    curve = train(
        args, 0, tiny_model, tiny_processor, [[c] for c in CAPTIONS], images, accelerator, lambda model: {"x": 0.0}
    )
    assert len(curve) == 26 and curve[-1]["loss"] < 0.5 * curve[1]["loss"]
    for name, tensor in tiny_model.state_dict().items():
        image_side = name.startswith(("vision_model", "visual_projection"))
        assert torch.equal(tensor, before[name]) == image_side or name.endswith("position_ids"), name
    assert not isinstance(tiny_model.forward, types.FunctionType) or "autocast" not in repr(tiny_model.forward)


def test_a_run_repeats_to_the_bit(tiny_folder, tiny_processor):
    from modeling_capivara.loading import load_model

    images = torch.nn.functional.normalize(torch.randn(7, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    args = arguments(effective_batch_size=6, micro_batch_size=4, max_steps=5, warmup_steps=1)
    weights = []
    for drawn_before in (1, 100):
        torch.rand(drawn_before)  # what was drawn before a run must not matter
        model = load_model(tiny_folder)
        train(args, 3, model, tiny_processor, [[c] for c in CAPTIONS], images, Accelerator(cpu=True), lambda m: {})
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_infinite_loss_stops(tiny_model, tiny_processor):
    images = torch.full((7, 24), float("inf"))
    args = arguments(effective_batch_size=7, max_steps=2, warmup_steps=0)
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        train(args, 0, tiny_model, tiny_processor, [[c] for c in CAPTIONS], images, Accelerator(cpu=True), lambda m: {})


def with_captions(row: int, captions: list[str]):
    """A data set whose Portuguese captions of one row are replaced."""
    return lambda d: d.map(lambda _, i: {"captions-pt": captions if i == row else ["ok"]}, with_indices=True)


BROKEN = {
    "no split": (lambda d: DatasetDict(train=d["train"]), "no split 'validation'.*'train'"),
    "no column": (lambda d: d.remove_columns("captions-pt"), "no column 'captions-pt'; there are .*'captions-en'"),
    "empty caption": (with_captions(3, ["ok", " "]), "row 3 has no caption or an empty one"),
    "no caption": (with_captions(2, []), "row 2 has no caption"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_bad_data(tiny_dataset_folder, tmp_path, fault):
    from datasets import load_from_disk

    break_it, message = BROKEN[fault]
    break_it(load_from_disk(tiny_dataset_folder)).save_to_disk(tmp_path / "broken")
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / "broken"), ["train", "validation"], {"train": ["pt"], "validation": ["pt"]}, "image")


def test_unreadable_image_is_named(tmp_path):
    features = Features({"image": Image(decode=False), "captions-pt": List(Value("string"))})
    rows = {"image": [{"bytes": b"no picture", "path": None}], "captions-pt": [["gato"]]}
    broken = Dataset.from_dict(rows, features=features).cast_column("image", Image())
    DatasetDict(train=broken).save_to_disk(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"image of row 0 can't be read"):
        load_splits(str(tmp_path / "broken"), ["train"], {"train": ["pt"]}, "image")
