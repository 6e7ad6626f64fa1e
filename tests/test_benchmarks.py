"""The import time of the package, and every benchmark at small size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import captions, search, tools, train_step
from capivara_common.files import write_json
from capivara_search.miniature_encoders import load_tokenizer
from capivara_search.table import pictures_schema


@pytest.mark.slow
def test_the_import_adds_little_to_transformers_and_loads_nothing_large():
    """Compares CPU time, best of three, because other processes disturb single measurements."""
    base = "import sys, time; from transformers import PreTrainedModel, AutoModel, AutoProcessor"
    code = f"{base}; s = time.process_time(); import modeling_capivara; print(time.process_time() - s, *sys.modules)"
    seconds = []
    while not seconds or (min(seconds) > 0.3 and len(seconds) < 3):
        spent, *modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        assert not {"open_clip", "datasets", "timm", "matplotlib"} & set(modules)
        seconds.append(float(spent))
    assert min(seconds) < 0.3


def test_programs_run_in_turns_and_the_ratio_is_the_median_of_the_runs():
    calls = []
    programs = {name: lambda name=name: calls.append(name) or len(calls) for name in ("a", "b")}
    assert tools.run_alternating(programs, 3, "Runs") == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert calls == ["a", "b"] * 3
    assert tools.median_ratio([2.0, 40.0, 3.0], [1.0, 10.0, 1.0]) == 3.0
    assert tools.summarize_rates([3.0, 1.0, 2.0]) == {"median": 2.0, "slowest": 1.0, "fastest": 3.0}


@pytest.mark.slow
def test_a_word_of_made_captions_is_a_token():
    captions, tokenizer = tools.make_captions(500), load_tokenizer()
    lengths = [len(ids) for ids in tokenizer(captions)["input_ids"]]
    assert lengths == [2 + len(text.split()) for text in captions] and abs(np.mean(lengths) - 20) < 1
    assert 7 <= min(lengths) < 12 and 28 < max(lengths) <= 70


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


@pytest.mark.parametrize("flag", ["images", "captions", "runs"])
def test_encode_refuses_empty_runs(flag):
    from benchmarks import encode

    with pytest.raises(ValueError, match=f"{flag} .*0"):
        encode.main([f"--{flag}", "0"])


@pytest.mark.slow
def test_encode_checks_its_flags_without_open_clip():
    program = "import sys; sys.modules['open_clip'] = None; from benchmarks import encode; encode.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "--part", "nonsense"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert "--part" in done.stderr and "ModuleNotFoundError" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("auto", ["float32", "bf16"])
def test_a_long_pass_embeds_the_same_as_open_clip(tmp_path, monkeypatch, auto):
    from benchmarks import encode
    from capivara_common import embedding_speed
    from modeling_capivara import CapivaraConfig

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    monkeypatch.setattr(encode, "CapivaraConfig", lambda: CapivaraConfig(vision_config=tower, text_config=tower))
    monkeypatch.setattr(encode, "choose_fastest_precision", lambda *_: auto)
    monkeypatch.setattr(embedding_speed, "LONG_PASS_IMAGES", 40)
    flags = ["--part", "pass", "--images", "40", "--runs", "1", "--output", str(tmp_path / "encode.json")]
    encode.main(flags)
    measured = json.loads((tmp_path / "encode.json").read_text())["measured"]
    assert measured["auto"] == auto and set(measured) - {"auto", "choices", "ratio_of_auto"} == {"float32", auto}
    assert measured["float32"]["smallest_cosine"] > 0.999999 and measured[auto]["smallest_cosine"] > 0.999
    assert len(measured["choices"]) == len({"float32", auto})
    assert measured["ratio_of_auto"] > 0 and measured["float32"]["ratio"] > 0


@pytest.mark.slow
def test_eval_retrieval_at_small_size(tmp_path):
    from benchmarks.eval_retrieval import main

    (tmp_path / "r.json").write_text('{"large": {"seconds": 9}}', encoding="utf-8")
    main(["--images", "40", "--captions", "3", "--runs", "1", "--output", str(tmp_path / "r.json")])
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert results.pop("large") == {"seconds": 9} and results.keys() == {"scores"}, "the other key is kept"
    result = results["scores"]
    assert result["largest_difference_of_a_recall"] < 1e-6 and result["ratio"] > 0 and result["captions"] == 120
    assert result["memory_over_embeddings_bytes"] >= 0


@pytest.mark.slow
def test_export_at_small_size(tiny_folder, tmp_path, capsys, monkeypatch):
    from benchmarks import export

    def copy_model(folder):
        return (shutil.copytree(tiny_folder, folder) / "model.safetensors").stat().st_size

    monkeypatch.setattr(tools, "save_random_model", copy_model)
    export.main(["--output", str(tmp_path / "export.json")])
    results = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results and {"device", "versions"} <= results.keys()
    exported = results["export"]
    assert 0 < exported["after_imports_bytes"] <= exported["peak_bytes"]
    additional = exported["peak_bytes"] - exported["after_imports_bytes"]
    assert exported["ratio_to_weights"] == additional / results["weights_bytes"]


def test_both_caption_programs_give_the_same_tokens(tmp_path, capsys):
    sizes = ["--widths", "16", "--layers", "12", "--images", "2", "--new_tokens", "3", "--runs", "1"]
    captions.main([*sizes, "--output", str(tmp_path / "c.json")])
    results = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    measured = results["measured"]["generate"]
    assert measured["same_tokens"] and measured["prefixes"] == 10
    assert set(measured["rows_per_second"]) == {"plain", "ours"} and measured["gain_ours"]["measured"] > 0


def test_requests_at_the_same_time_are_faster(tmp_path, monkeypatch):
    for name, value in {"CONCURRENCY": (1, 4), "ANSWER_S": 0.3, "ROUNDS": 2}.items():
        monkeypatch.setattr(captions, name, value)
    captions.main(["--parts", "chat", "--runs", "1", "--output", str(tmp_path / "c.json")])
    measured = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["measured"]["chat"]
    assert set(measured["sentences_per_second"]) == {"1", "4"} and measured["gain"]["measured"] > 2


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match=r"parts.*'nonsense'"):
        train_step.TrainStepArguments(parts=["nonsense"])


def test_the_demo_runs_twice_in_both_checkouts(tmp_path, monkeypatch):
    """The other checkout runs first, in its own folder and with its own modules; the second run reuses the cache."""
    calls = []

    def run(command, cwd, env, check):
        calls.append((command[2], cwd, env["PYTHONPATH"], env["CAPIVARA_CACHE"]))
        if "train_accelerate" in command:
            write_json(Path(command[-1]) / "results" / "r.json", {"records": [{"value": 0.25}]})

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        patch.setattr(tools, "describe_measurement_conditions", dict)
        results = train_step.run_requested_benchmarks(train_step.TrainStepArguments(parts=["demo"], beside=tmp_path))
    trees, names = (tmp_path, tools.CODE_ROOT), ("examples.openmoji.prepare", "train_accelerate") * 2
    assert [call[:3] for call in calls] == [(name, tree, str(tree)) for tree in trees for name in names]
    assert calls[0][3] == calls[3][3] != calls[4][3]
    first = results["demo"]["old"]["first"]
    assert first["records"] == [{"value": 0.25}] and first["seconds"].keys() == {*names, "total"}


def test_the_expected_answers_are_the_nearest_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "QUERY_COUNT", 3)
    search.write_random_vectors_and_queries(tmp_path, 50)
    vectors = np.load(tmp_path / "vectors-50.npy").astype(np.float32)
    answers = np.load(tmp_path / "answers-50.npz")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3) and len(answers["queries"]) == 3
    for query, rows in zip(answers["queries"], answers["nearest"], strict=True):
        assert rows.tolist() == np.argsort(-(vectors @ query), kind="stable")[: search.K].tolist()


def test_generated_rows_have_the_schema_of_the_index():
    rows = search.build_picture_rows(np.zeros((3, search.EMBEDDING_WIDTH), np.float16), 7, "0" * 32)
    assert rows.schema == pictures_schema(search.EMBEDDING_WIDTH) and rows["path"][0].as_py() == search.picture_path(7)
