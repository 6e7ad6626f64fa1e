"""Timings that users were promised, measured small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import timing


@pytest.mark.slow
def test_import_costs_little_over_transformers():
    """In CPU time, and once of three times: seconds of two imports differ by more where others use the machine."""
    base = "from transformers import PreTrainedModel, AutoModel, AutoProcessor"
    timed = f"import time; {base}; s = time.process_time(); import modeling_capivara; print(time.process_time() - s)"
    assert any(float(subprocess.check_output([sys.executable, "-c", timed], text=True)) < 0.3 for _ in range(3))


def test_programs_take_turns_and_the_warm_up_is_not_counted():
    seen = []
    programs = {name: lambda run, name=name: seen.append((run, name)) or len(seen) for name in ("a", "b")}
    assert timing.alternating(programs, 2, "Runs", warmup=1) == {"a": [3, 5], "b": [4, 6]}
    assert seen == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]


def test_a_ratio_is_the_median_of_the_runs():
    assert timing.median_ratio([2.0, 40.0, 3.0], [1.0, 10.0, 1.0]) == 3.0
    assert timing.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "slowest": 1.0, "fastest": 3.0}


@pytest.mark.slow
def test_encode_embeds_the_same_as_open_clip(tmp_path, monkeypatch):
    from benchmarks import encode
    from modeling_capivara import CapivaraConfig

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    monkeypatch.setattr(encode, "CapivaraConfig", lambda: CapivaraConfig(vision_config=tower, text_config=tower))
    encode.main(["--images", "2", "--captions", "4", "--runs", "1", "--output", str(tmp_path / "encode.json")])
    measured = json.loads((tmp_path / "encode.json").read_text())["measured"]
    assert set(measured) == {f"{what}_{p}" for what in ("images", "captions") for p in ("float32", "bfloat16")}
    assert all(measured[f"{what}_float32"]["largest_difference"] < 1e-5 for what in ("images", "captions"))


@pytest.mark.slow
def test_eval_retrieval_at_small_size(tmp_path):
    from benchmarks.eval_retrieval import main

    (tmp_path / "r.json").write_text('{"large": {"seconds": 9}}', encoding="utf-8")
    main(["--images", "40", "--captions", "3", "--runs", "1", "--output", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert found.pop("large") == {"seconds": 9} and found.keys() == {"scores"}, "the other part is kept"
    result = found["scores"]
    assert result["largest_difference_of_a_recall"] < 1e-6 and result["ratio"] > 0 and result["captions"] == 120
    assert result["memory_over_embeddings_bytes"] >= 0


@pytest.mark.slow
def test_pairs_at_small_size(tmp_path, monkeypatch):
    from benchmarks import pairs

    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path))  # is set, and put back after the test
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(pairs, "in_own_process", lambda words: pairs.measure_here(Path(words[-1])))
    pairs.main(["--rows", "300", "--output", str(tmp_path / "p.json")])
    found = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert 200 < found["pairs"] < 300 and found["measured"]["second"]["pairs"] == found["pairs"]
    assert found["minutes"] > 0 and 0 < found["imports_gib"] <= found["peak_gib"] < 4
