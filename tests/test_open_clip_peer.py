"""The peer's side of the training benchmark: open_clip's real trainer, on a tiny model of its own classes."""

import math
import statistics

import pytest
import torch
from tiny import tiny_config

import benchmarks.open_clip_peer as peer
from benchmarks.open_clip_peer import PeerArguments, open_clip_arguments, open_clip_optimizer
from benchmarks.timing import in_own_process


@pytest.fixture
def tiny(monkeypatch):
    """`measure` at toy size; -> list that receives the model it trains, and its weights before."""
    seen = []
    build = peer.build_open_clip

    def build_tiny(_config):
        model = build(tiny_config())
        seen.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return model

    def tokens(args):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, 300, (args.pairs, 77), generator=generator)

    monkeypatch.setattr(peer, "build_open_clip", build_tiny)
    monkeypatch.setattr(peer, "caption_tokens", tokens)
    monkeypatch.setattr(peer, "IMAGE_SIZE", 32)
    monkeypatch.setattr(peer, "cosine_lr", lambda optimizer, *_: lambda step: None)  # no warm-up: the weights move
    return seen


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accum", [1, 3])
def test_the_real_trainer_trains_the_text_tower_alone(tiny, accum, precision):
    results = peer.measure(PeerArguments(pairs=2 * accum, peer_micro=2, precision=precision, steps=4))
    ((model, before),) = tiny
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved and moved <= trained
    assert {"logit_scale", "text.proj.0.weight"} <= moved
    assert trained and not [name for name in trained if name.startswith("visual.")]
    assert model.text.transformer.is_gradient_checkpointing and model.visual.transformer.grad_checkpointing
    assert len(results["step_s"]) == 4, "the warm-up is not among them"
    assert results["pairs_per_second"] == pytest.approx(2 * accum / statistics.median(results["step_s"]))
    assert 0 < results["setup_peak_memory_bytes"] <= results["peak_memory_bytes"]


def test_batches_are_the_same_at_every_step_and_time_whole_ones(monkeypatch):
    clock = iter([1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr(peer.time, "perf_counter", lambda: next(clock))
    numbers = torch.arange(4)
    batches = peer.InMemoryBatches(numbers, numbers, micro=2, steps=3)
    seen = [pixels.tolist() for pixels, _tokens in batches]
    assert seen == [[0, 1], [2, 3]] * 3
    assert batches.num_batches == 6 and batches.num_samples == 12
    assert batches.step_seconds() == [4.0, 8.0], "without the first step's 2"


def test_arguments_are_those_of_the_command_line():
    theirs = open_clip_arguments(PeerArguments(pairs=12, peer_micro=4, precision="bf16"))
    assert (theirs.batch_size, theirs.accum_freq, theirs.precision) == (4, 3, "amp_bfloat16")
    assert theirs.lock_image and theirs.grad_checkpointing and theirs.world_size == 1
    assert (theirs.beta1, theirs.beta2, theirs.eps, theirs.wd) == (0.9, 0.98, 1e-6, 0.2), "open_clip's for a ViT"


def test_optimizer_decays_matrices_alone():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "ln": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].requires_grad_(False)
    optimizer = open_clip_optimizer(model, open_clip_arguments(PeerArguments(pairs=16, peer_micro=8)))
    free, decayed = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model["a"].weight)] and decayed["weight_decay"] == 0.2
    assert len(free["params"]) == 3 and free["weight_decay"] == 0.0


@pytest.mark.slow
def test_full_size_in_a_process_of_its_own():
    flags = ["--pairs", "4", "--peer_micro", "2", "--steps", "1"]
    results = in_own_process(["benchmarks.open_clip_peer", *flags])
    assert results["parameters"] == 366_121_473 and results["padded_tokens"] == 77
    assert results["pairs_per_second"] > 0 and math.isfinite(results["pairs_per_second"])
    assert results["peak_memory_bytes"] > 16 * results["trained_parameters"], "weights, gradient and Adam's two states"
