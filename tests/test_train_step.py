"""The training benchmark at toy width: what it times is the engine's own step, and its figures follow from its runs."""

import json
import statistics

import pytest
import torch
from tiny import tiny_config, tiny_tokenizer

from benchmarks import flop, scaling, timing
from benchmarks import train_step as bench
from benchmarks.flop import forward_flop, our_flop, peer_flop
from benchmarks.train_step import PEER, PRECISIONS, PROGRAMS, Engine, TrainStepArguments, measure_ours
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraProcessor
from training.contrastive import contrastive_gradients
from training.step import sparse_embedding_gradients

CAPTIONS = ["gato preto", "uma foto de um cachorro", "casa azul", "céu", "carro verde da água", "pão", "capivara"]


@pytest.fixture(autouse=True)
def captions(monkeypatch):
    """No picture package is needed."""

    def repeated(number, tokenizer, tokens=20, seed=0):
        return [CAPTIONS[i % len(CAPTIONS)] for i in range(number)]

    monkeypatch.setattr(bench, "benchmark_captions", repeated)
    monkeypatch.setattr(scaling, "benchmark_captions", repeated)


def worker(**changes) -> TrainStepArguments:
    return TrainStepArguments(**{"worker": "ours", "pairs": 7, "micro": 3, "steps": 2, **changes})


def batch_of(config, args):
    processor = CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer())
    return bench.random_batch(config, processor, CAPTIONS[: args.pairs], args.micro, args.cache == "on")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("accumulation", ["auto", "recompute"])
def test_a_run_of_ours(cache, precision, accumulation):
    args = worker(cache=cache, precision=precision, accumulation=accumulation)
    results = measure_ours(args, tiny_config(), tiny_tokenizer())
    json.dumps(results, allow_nan=False)
    assert len(results["steps"]) == 2, "the warm-up is not among them"
    assert results["pairs_per_second"] == pytest.approx(7 / statistics.median(s["step_s"] for s in results["steps"]))
    for step in results["steps"]:
        assert 0 < step["optimiser_s"] < step["step_s"]
        assert step["graphs_kept"] == (0 if accumulation == "recompute" else 3)
    assert 0 < results["setup_peak_memory_bytes"] <= results["peak_memory_bytes"]


@pytest.mark.parametrize("cache", ["on", "off"])
def test_the_text_tower_alone_is_trained_with_dropout(cache):
    config, args = tiny_config(), worker(cache=cache)
    engine, batch = Engine(config, args), batch_of(config, args)
    assert (batch.pixels is None) == (cache == "on") and (batch.image_embeds is None) == (cache == "off")
    engine.args.learning_rate, engine.args.min_learning_rate = 1e-3, 1e-3
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with sparse_embedding_gradients(engine.model, min_rows=0):
        losses = [engine(number, batch)["loss"] for number in range(2)]
    moved = {name for name, tensor in engine.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"logit_scale", "text_model.embeddings.word_embeddings.weight", "text_projection.0.weight"} <= moved
    assert not [name for name in moved if name.startswith("visi") or name.startswith("visual")]
    assert losses[0] != losses[1]
    assert engine.model.text_model.training and not engine.model.vision_model.training


def test_arithmetic_comes_from_the_model_and_counts_what_is_run_twice():
    text, image = forward_flop(CapivaraConfig())
    assert text == pytest.approx(2 * 85e6, rel=0.01)
    assert image == pytest.approx(8.8e9, rel=0.01)
    config = tiny_config()
    text, image = forward_flop(config)
    kept = batch_of(config, worker())
    assert our_flop(config, kept.texts, True, graphs_kept=3) == 3 * text * kept.tokens
    assert our_flop(config, kept.texts, True, graphs_kept=0) == 4 * text * kept.tokens
    assert our_flop(config, kept.texts, False, graphs_kept=3) == 3 * text * kept.tokens + 7 * image
    assert peer_flop(config, 7, 77) == 7 * (5 * 77 * text + 2 * image)


def test_matmul_peak_is_the_best_of_all(monkeypatch):
    seconds = iter([4.0, 2.0, 8.0, 1.0] * 2)
    monkeypatch.setattr(flop, "MATMUL_SIZES", {"cpu": (8, 16)})
    monkeypatch.setattr(flop, "MATMUL_REPEATS", 2)
    monkeypatch.setattr(flop, "seconds_of", lambda call, device: next(seconds))
    assert flop.matmul_peak("cpu") == {"float32": 2 * 16**3 / 1.0, "bfloat16": 2 * 16**3 / 1.0}


def fake_process(peer_rates, our_rates, seen):
    """Results of `in_own_process` in turn, without a process."""

    def run(command):
        seen.append(command)
        if command[0] == "benchmarks.open_clip_peer":
            return {
                "pairs_per_second": next(peer_rates), "effective_batch": 8, "padded_tokens": 77,
                "peak_memory_bytes": 7 * 2**30, "setup_peak_memory_bytes": 2**30,
            }  # fmt: skip
        rate = next(our_rates)
        step = {"step_s": 8 / rate, "optimiser_s": 2 / rate, "graphs_kept": 2, "loss": 2.0}
        return {
            "pairs": 8, "micro": 4, "accumulation": "auto", "precision": "no", "warmup": 0, "padding_share": 0.1,
            "pairs_per_second": rate, "flop_per_step": 10**9, "steps": [step], "peak_memory_bytes": 5 * 2**30,
            "setup_peak_memory_bytes": 2**30,
        }  # fmt: skip

    return run


def test_programs_alternate_and_the_ratio_is_the_median_of_the_rounds(monkeypatch, tmp_path, capsys):
    seen = []
    # a round is a precision of a run: the machine is twice as slow in the second run, the ratios are not
    peers = iter([1.0, 2.0, 0.5, 1.0, 1.0, 2.0])
    ours = iter([2.0, 4.0, 6.0, 5.0] + [20.0] * 3 + [2.0, 3.0, 2.5] + [10.0] * 3 + [5.0, 7.0, 6.0] + [20.0] * 3)
    monkeypatch.setattr(timing, "in_own_process", fake_process(peers, ours, seen))
    monkeypatch.setattr(bench, "matmul_peak", lambda device: {"float32": 1e11, "bfloat16": 2e11})
    output, plot = tmp_path / "train_step.json", tmp_path / "train_step.png"
    flags = ["--pairs", "8", "--micro", "4", "--peer_micro", "4", "--runs", "3"]
    bench.main([*flags, "--output", str(output), "--plot", str(plot)])
    results = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == results, "JSON is the last line"
    assert [command[0].split(".")[1] for command in seen[1:]] == ["open_clip_peer", *["train_step"] * 3] * 6
    measured = results["measured"]["float32"]
    assert measured["no_cache"]["ratio"] == 4.0 and measured["cache"]["ratio"] == 6.0
    assert measured["cache"]["pairs_per_second"] == {"median": 6.0, "slowest": 3.0, "fastest": 7.0}
    assert measured["cache"]["share_of_matmul_peak"] == pytest.approx(6.0 * 10**9 / 8 / 1e11)
    assert results["peer_accum"] == 2 and measured[PEER]["ratio"] == 1.0
    assert results["recipe"]["projected_hours"] == pytest.approx(8 / 2.0 * 5863 / 3600)
    assert set(results["measured"]) == set(PRECISIONS.values()) and set(measured) == set(PROGRAMS)
    table = bench.train_step_table(results)
    assert "| ours, cache | float32 | 6.00 | 6.0 | 5.0 | 1% |" in table
    assert plot.stat().st_size > 10_000


def test_both_sides_get_the_same_batch():
    args = TrainStepArguments(pairs=96, micro=16, peer_micro=48, tokens=21, steps=3)
    for precision, theirs in (("no", "fp32"), ("bf16", "amp_bfloat16")):
        peer = bench.command(PEER, precision, args)
        assert peer[peer.index("--precision") + 1] == theirs
        assert int(peer[peer.index("--micro") + 1]) * int(peer[peer.index("--accum") + 1]) == 96
        for name in set(PROGRAMS) - {PEER}:
            ours = bench.command(name, precision, args)
            for flag in ("--pairs", "--tokens", "--steps"):
                assert ours[ours.index(flag) + 1] == peer[peer.index(flag) + 1]


def test_a_gpu_leaves_the_peer_out(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "in_own_process", fake_process(iter([]), iter([3.0] * 100), seen))
    monkeypatch.setattr(bench, "matmul_peak", lambda device: {"float32": 1e11, "bfloat16": 2e11})
    monkeypatch.setattr(timing, "device_description", lambda device: "a GPU")
    monkeypatch.setattr(bench, "resolve_precision", lambda requested, device: "bf16")
    results = bench.compare(TrainStepArguments(pairs=9, device="cuda", runs=1))
    assert PEER not in results["measured"]["float32"] and "peer_micro" not in results
    assert "ratio" not in results["measured"]["float32"]["cache"]
    assert "hours" in bench.train_step_table(results)


@pytest.mark.parametrize("wrong", [{"pairs": 48}, {"pairs": 100}, {"micro": 0}, {"runs": 0}, {"steps": 0}])
def test_bad_sizes_fail_when_made(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        TrainStepArguments(**wrong)


def test_a_failed_process_is_no_figure():
    with pytest.raises(RuntimeError, match="No module named"):
        timing.in_own_process(["benchmarks.no_such_module"])


def test_steps_of_every_size():
    args = scaling.ScalingArguments(step_pairs=[4, 9], micro=3, precision="no")
    steps = scaling.measure_steps(args, tiny_config(), tiny_tokenizer())
    assert [step["pairs"] for step in steps] == [4, 9]
    assert all(step["graphs_kept"] == 0 for step in steps), "a small batch would be cheaper for keeping all"
    assert steps[0]["peak_memory_bytes"] <= steps[1]["peak_memory_bytes"]


def test_loss_alone():
    loss = scaling.measure_loss(300, scaling.ScalingArguments(), width=16)
    assert loss["pairs"] == 300 and loss["loss_s"] > 0 and loss["all_logits_bytes"] == 360_000


def test_scaling_sets_the_loss_against_a_step_of_its_size(tmp_path, monkeypatch, capsys):
    steps = [
        {"pairs": p, "tokens": 20 * p, "step_s": 0.1 * p + 2, "optimiser_s": 2.0, "padding_share": 0.1,
         "peak_memory_bytes": 2**30}
        for p in (10, 20)
    ]  # fmt: skip
    loss = {"loss_s": 5.0, "memory_over_embeddings_bytes": 2**20, "all_logits_bytes": 2**22}

    def run(command):
        return steps if "steps" in command else {"pairs": int(command[-1]), **loss}

    monkeypatch.setattr(timing, "in_own_process", run)
    flags = ["--step_pairs", "10", "20", "--loss_pairs", "30", "100", "--output", str(tmp_path / "scaling.json")]
    scaling.main([*flags, "--plot", str(tmp_path / "scaling.png")])
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == results
    assert results["spread"]["seconds_per_pair"] == pytest.approx(0.3 / 0.2 - 1)
    assert results["spread"]["seconds_per_pair_without_optimiser"] == pytest.approx(0, abs=1e-9)
    assert results["loss_alone"][1]["extrapolated_step_s"] == pytest.approx(100 * 0.1 + 2 + 5)
    assert results["loss_alone"][1]["loss_share_of_extrapolated_step"] == pytest.approx(5 / 17)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_loss_of_32768_pairs_takes_less_than_a_gib():
    assert contrastive_gradients is scaling.contrastive_gradients, "what the engine runs is what is measured"
    loss = timing.in_own_process(["benchmarks.scaling", "--worker", "loss", "--loss_pairs", "32768"])
    assert loss["memory_over_embeddings_bytes"] < 2**30
