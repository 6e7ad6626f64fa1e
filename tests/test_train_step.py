"""The training benchmark with tiny models: it times the real training step, and its figures follow from its runs."""

import json
import statistics

import pytest
import torch
from sampling import one_in
from tiny import tiny_config
from towers import TOWER, VISION
from transformers import SiglipConfig, SiglipModel

from benchmarks import tools
from benchmarks import train_step as bench
from benchmarks.train_step import (
    PEER_PROGRAM,
    PRECISION_NAMES,
    PROGRAMS,
    TrainingEngine,
    TrainStepArguments,
    measure_our_trainer,
)

SIGLIP = SiglipConfig(text_config=TOWER | {"vocab_size": 300, "projection_size": 32}, vision_config=VISION)


BUILD_PUBLISHED_CONFIG = bench.build_published_config


@pytest.fixture(autouse=True)
def config(monkeypatch):
    """Replace both architectures by tiny ones."""
    monkeypatch.setattr(bench, "build_published_config", lambda model: tiny_config() if model == "capivara" else SIGLIP)


def worker(name: str = "cache", **changes) -> TrainStepArguments:
    return TrainStepArguments(**{"worker": name, "pairs": 7, "micro": 3, "steps": 2, **changes})


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_weights(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of the weights that differ from a copy."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("program", "changes"),
    [("no_cache", {}), ("cache", {"precision": "bf16"}), ("cache_recomputed", {}), ("no_cache", {"model": "siglip2"})],
)
def test_a_measurement_of_our_trainer_is_complete(program, changes):
    results = measure_our_trainer(worker(program, **changes))
    json.dumps(results, allow_nan=False)
    assert len(results["step_s"]) == 2, "the warm-up is not among them"
    assert results["pairs_per_second"] == pytest.approx(7 / statistics.median(results["step_s"]))
    assert set(results["graphs_kept"]) == {0 if program == "cache_recomputed" else 3}
    assert results["peak_memory_bytes"] > 2**20


def test_texts_are_padded_to_the_longest_of_a_micro_batch():
    config = tiny_config()
    ids, (texts, _) = (
        bench.make_random_token_ids(config, 200),
        bench.make_random_batch(config, worker(pairs=200, micro=16)),
    )
    lengths = (ids != 1).sum(dim=1)
    assert ids.shape == (200, 77) and abs(lengths.float().mean() - 20) < 1 and lengths.tolist() == sorted(lengths)
    for batch, expected in zip(texts, lengths.split(16), strict=True):
        assert batch.input_ids.shape == batch.attention_mask.shape == (len(expected), expected.max())
        assert batch.attention_mask.sum(dim=1).tolist() == expected.tolist()


@pytest.mark.parametrize("cached", [True, False])
def test_only_the_text_encoder_is_trained_with_dropout(cached):
    config, args = tiny_config(), worker("cache" if cached else "no_cache")
    engine, batch = TrainingEngine(config, args), bench.make_random_batch(config, args)
    assert batch[1].ndim == (2 if cached else 4)
    engine.args.learning_rate, engine.args.min_learning_rate = 1e-3, 1e-3
    before = weights_of(engine.model)
    losses = [engine(number, *batch).loss for number in range(2)]
    trained = changed_weights(engine.model, before)
    assert {"logit_scale", "text_model.embeddings.word_embeddings.weight", "text_projection.0.weight"} <= trained
    assert not [name for name in trained if name.startswith("vis")]
    assert losses[0] != losses[1]
    assert engine.model.text_model.training and not engine.model.vision_model.training


def test_siglip_is_trained_with_its_sigmoid_loss():
    args = worker("no_cache", model="siglip2")
    engine, batch = TrainingEngine(SIGLIP, args), bench.make_random_batch(SIGLIP, args)
    texts = torch.cat([part.input_ids for part in batch[0]])
    assert texts.shape == (7, 64) and [part.attention_mask for part in batch[0]] == [None] * 3
    with torch.no_grad():
        expected = engine.model.eval()(texts, batch[1], return_loss=True).loss
    engine.args.learning_rate, engine.args.min_learning_rate = 1e-3, 1e-3
    before = weights_of(engine.model)
    assert engine(0, *batch).loss == pytest.approx(expected.item(), rel=1e-4)
    trained = changed_weights(engine.model, before)
    assert trained and all(name.startswith("text_model.") for name in trained), "scale and bias must not change"


# --- open_clip's trainer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accum", "precision"), one_in(3, [(3, "no"), (1, "no"), (3, "bf16")]))
def test_open_clips_trainer_trains_only_the_text_encoder(monkeypatch, accum, precision):
    import open_clip_train.scheduler

    from modeling_capivara import convert_open_clip

    models, build = [], convert_open_clip.new_open_clip_model

    def build_and_record(config):
        model = build(config)
        models.append((model, weights_of(model)))
        return model

    monkeypatch.setattr(convert_open_clip, "new_open_clip_model", build_and_record)
    # Without warm-up of the learning rate, so that the weights change.
    monkeypatch.setattr(open_clip_train.scheduler, "cosine_lr", lambda optimizer, *_: lambda step: None)
    args = worker(PEER_PROGRAM, pairs=2 * accum, peer_micro=2, precision=precision, steps=4)
    results = bench.measure_open_clip_trainer(args)
    ((model, before),) = models
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"logit_scale", "text.proj.0.weight"} <= changed_weights(model, before) <= trained
    assert not [name for name in trained if name.startswith("visual.")]
    assert model.text.transformer.is_gradient_checkpointing and model.visual.transformer.grad_checkpointing
    assert len(results["step_s"]) == 4, "the warm-up is not among them"
    assert results["pairs_per_second"] == pytest.approx(2 * accum / statistics.median(results["step_s"]))
    assert results["padded_tokens"] == 77 and results["peak_memory_bytes"] > 2**20


def test_open_clips_trainer_trains_siglip(monkeypatch):
    import open_clip
    import open_clip_train.scheduler

    vision = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
    text = {"context_length": 64, "vocab_size": 300, "width": 64, "heads": 2, "layers": 1, "no_causal_mask": True}
    text |= {"proj_bias": True, "pool_type": "last"}
    model = open_clip.CustomTextCLIP(64, vision | {"timm_model_pretrained": False}, text, init_logit_bias=-10)
    monkeypatch.setattr(open_clip, "create_model", lambda name: model if name == "ViT-B-16-SigLIP2" else None)
    monkeypatch.setattr(open_clip_train.scheduler, "cosine_lr", lambda optimizer, *_: lambda step: None)
    config = SiglipConfig(text_config=SIGLIP.text_config, vision_config=VISION | {"image_size": 160})
    before = weights_of(model)
    args = worker(PEER_PROGRAM, model="siglip2", pairs=4, peer_micro=2, precision="bf16")
    theirs = bench.build_open_clip_arguments(args)
    assert theirs.siglip and theirs.accum_freq == 2 and theirs.lock_image and theirs.grad_checkpointing
    monkeypatch.setattr(bench, "build_published_config", lambda model: config)
    results = bench.measure_open_clip_trainer(args)
    trained = changed_weights(model, before)
    assert {"logit_bias", "text.token_embedding.weight"} <= trained, "only the sigmoid loss has a bias"
    assert not [name for name in trained if name.startswith("visual.")]
    assert results["padded_tokens"] == 64 and len(results["step_s"]) == 2


def test_open_clips_arguments_and_optimizer_equal_its_command():
    theirs = bench.build_open_clip_arguments(TrainStepArguments(pairs=12, peer_micro=4, precision="bf16"))
    assert (theirs.batch_size, theirs.accum_freq, theirs.precision) == (4, 3, "amp_bfloat16")
    assert theirs.lock_image and theirs.grad_checkpointing and theirs.world_size == 1
    assert (theirs.beta1, theirs.beta2, theirs.eps, theirs.wd) == (0.9, 0.98, 1e-6, 0.2), (
        "open_clip's defaults for a ViT"
    )
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "ln": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].requires_grad_(False)
    free, decayed = bench.build_open_clip_optimizer(model, theirs).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model["a"].weight)] and decayed["weight_decay"] == 0.2
    assert len(free["params"]) == 3 and free["weight_decay"] == 0.0, "only matrices have weight decay"


@pytest.mark.parametrize("model", ["siglip2", "siglip2_large", "siglip2_so400m"])
def test_published_siglip_sizes_are_those_of_open_clip(model):
    """No memory is allocated for the weights: both libraries build the model on the meta device."""
    import open_clip
    from open_clip.model import CustomTextCLIP

    config = BUILD_PUBLISHED_CONFIG(model)
    theirs = open_clip.get_model_config(bench.OPEN_CLIP_FLAGS[model].split()[1])
    assert config.text_config.projection_size == config.vision_config.hidden_size == theirs["embed_dim"]
    assert bench.CAPTION_TOKENS[model] == config.text_config.max_position_embeddings == 64
    theirs.pop("custom_text")
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in built.parameters()) for built in (SiglipModel(config), CustomTextCLIP(**theirs))
        ]
    assert counts[0] == counts[1] > 3e8


# --- Side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
def test_programs_alternate_and_ratios_are_medians_of_the_runs(beside, monkeypatch, tmp_path, capsys):
    """The simulated machine is half as fast in the second of three runs, which must not change the ratios."""
    calls, ours = [], {"no_cache": 4.0, "cache": 6.0, "cache_recomputed": 5.0}

    def run(module, root, worker, **flags):
        calls.append((worker, root != tools.CODE_ROOT))
        slowdown = 1 + ((len(calls) - 1) // (10 if beside else 9) == 1)
        rate = (1.0 if worker == PEER_PROGRAM else ours[worker]) / slowdown / (1 + (root != tools.CODE_ROOT))
        return {"pairs_per_second": rate, "peak_memory_bytes": 5 * 2**30}

    monkeypatch.setattr(tools, "run_module_in_subprocess", run)
    flags = ["--pairs", "8", "--micro", "4", "--peer_micro", "4", "--runs", "3", *["--beside", str(tmp_path)] * beside]
    bench.main([*flags, "--output", str(tmp_path / "o.json")])
    results = json.loads((tmp_path / "o.json").read_text())
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == results, "JSON is the last line"
    measured = results["measured"]["float32"]
    assert set(results["measured"]) == set(PRECISION_NAMES.values())
    assert results["recipe"]["step_s"] == 2816 / 5.0 and results["recipe"]["peak_memory_bytes"] == 5 * 2**30
    assert measured["cache"]["pairs_per_second"] == {"median": 6.0, "slowest": 3.0, "fastest": 6.0}
    if beside:
        assert measured["cache"]["ratio_to_before"] == 2.0 and "ratio_to_before" not in measured["cache_before"]
        assert results["recipe"]["ratio_to_before"] == 2.0
        assert len(calls) == 30 and sum(is_other_checkout for _, is_other_checkout in calls) == 15
    else:
        assert [worker for worker, _ in calls] == ["cache_recomputed", *PROGRAMS, *PROGRAMS] * 3
        assert measured["no_cache"]["ratio"] == 4.0 and measured["cache"]["ratio"] == 6.0
        assert results["peer_accum"] == 2 and measured[PEER_PROGRAM]["ratio"] == 1.0 and set(measured) == set(PROGRAMS)


def test_the_recipe_obeys_pairs_and_extrapolates_memory_to_2816(monkeypatch, tmp_path):
    """Each pair takes 1,000 bytes in this simulation, and everything else 5 GB."""
    calls = []

    def run(module, root, worker, **flags):
        calls.append({"worker": worker, **flags})
        return {"pairs_per_second": 2.0, "peak_memory_bytes": 5 * 10**9 + 1000 * flags["pairs"]}

    monkeypatch.setattr(tools, "run_module_in_subprocess", run)
    flags = ["--model", "siglip2_so400m", "--parts", "recipe", "--pairs", "257", "--runs", "2"]
    bench.main([*flags, "--output", str(tmp_path / "o.json")])
    recipe = json.loads((tmp_path / "o.json").read_text())["recipe"]
    assert [call["pairs"] for call in calls] == [128, 257] * 2
    assert {(call["worker"], call["model"], call["micro"], call["warmup"]) for call in calls} == {
        ("cache_recomputed", "siglip2_so400m", 64, 1)
    }
    assert recipe["pairs"] == 257 and recipe["step_s"] == 128.5 and recipe["smaller"]["pairs"] == 128
    assert recipe["extrapolated"] == {
        "pairs": 2816, "peak_memory_bytes": 5 * 10**9 + 2_816_000, "rule": bench.EXTRAPOLATION_RULE
    }  # fmt: skip
    calls.clear()
    bench.main(["--parts", "recipe", "--runs", "1", "--output", str(tmp_path / "full.json")])
    assert [(call["pairs"], call["warmup"]) for call in calls] == [(2816, 0)]
    calls.clear()
    bench.main(["--parts", "recipe", "--pairs", "2816", "--runs", "1", "--output", str(tmp_path / "full.json")])
    assert [(call["pairs"], call["warmup"]) for call in calls] == [(2816, 1)], "the second step"
    assert "extrapolated" not in json.loads((tmp_path / "full.json").read_text())["recipe"]


@pytest.mark.parametrize("flags", [{"pairs": 255, "parts": ["recipe"]}, {"pairs": 97}, {"pairs": 48}])
def test_wrong_numbers_of_pairs_are_refused(flags):
    with pytest.raises(ValueError, match=rf"\bpairs\b.*\b{flags['pairs']}\b"):
        TrainStepArguments(**flags)
