"""Damaged or harmful files at every entrance: one line that names the file, no traceback, and no long work."""

import json
import shutil
import time
from pathlib import Path

import datasets
import pytest
import torch
from killed_stage import run
from safetensors.torch import load_file, save_file
from test_train_accelerate import flags

import train_accelerate
from capivara_common.weight_file import weight_files
from captions import score, select
from captions.stages import check_complete
from eval import retrieval
from hub_upload import export
from modeling_capivara.loading import load_model, mapped_model, two_towers_config
from training import interpolate

SECONDS = 20  # a config of 10^7 layers takes hours; the longest of these takes three


def refused(main, argv: list) -> str:
    """What a command says where it ends in an error, which is one line."""
    started = time.monotonic()
    with pytest.raises(ValueError) as end:
        main([str(word) for word in argv])
    said = str(end.value)
    assert "\n" not in said and time.monotonic() - started < SECONDS, said
    return said


ENTRANCES = {
    "train_accelerate": lambda model, data, out: (train_accelerate.main, flags(model, data, out)),
    "eval.retrieval": lambda model, data, out: (
        retrieval.main,
        ["--model", model, "--dataset", data, "--output", out / "r.json", "--split", "test"],
    ),
    "captions.score": lambda model, data, out: (
        score.main, ["--model", model, "--dataset", data, "--output", out, "--language", "pt"]
    ),
    "training.interpolate": lambda model, data, out: (interpolate.main, [model, model, "--output", out]),
    "hub_upload.export": lambda model, data, out: (export.main, ["--model", model, "--output", out]),
}  # fmt: skip


def with_config(folder: Path, change) -> None:
    path = folder / "config.json"
    content = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def with_tower(name: str, **settings):
    return lambda config: config | {name: config[name] | settings}


CONFIGS = {
    "a thousand deep": lambda config: json.dumps(config)[:-1] + ', "x": ' + "[" * 1000 + "]" * 1000 + "}",
    "ten million layers of text": with_tower("text_config", num_hidden_layers=10**7),
    "ten thousand million positions": with_tower("text_config", max_position_embeddings=10**10),
    "a scale of a million": lambda config: config | {"logit_scale_init_value": 1e6},
    "empty": lambda config: "",
    "a list": lambda config: "[]",
    "a tower that is a list": lambda config: config | {"text_config": [1]},
    "no layers": with_tower("text_config", num_hidden_layers="x"),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_config_that_cannot_be(tiny_folder, tiny_dataset_folder, tmp_path, entrance):
    with_config(tiny_folder, CONFIGS["ten million layers of text"])
    main, argv = ENTRANCES[entrance](tiny_folder, tiny_dataset_folder, tmp_path / "out")
    assert f"{tiny_folder}" in (said := refused(main, argv)) and "config.json" in said
    assert not [path for path in tmp_path.glob("out*") if path.suffix != ".logs"]


@pytest.mark.parametrize("fault", CONFIGS)
def test_load_model_names_the_config(tiny_folder, fault):
    started = time.monotonic()
    with_config(tiny_folder, CONFIGS[fault])
    with pytest.raises(ValueError, match=r"^[^\n]*config\.json[^\n]*$"):
        load_model(tiny_folder)
    assert time.monotonic() - started < SECONDS


def test_a_scale_in_the_weights_that_cannot_be(tiny_folder):
    path = tiny_folder / "model.safetensors"
    save_file(load_file(path) | {"logit_scale": torch.tensor(1e6)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model: logit_scale must be from -20 to 20, got 1000000\.0\.$"):
        load_model(tiny_folder)
    with pytest.raises(ValueError, match=r"logit_scale must be from -20 to 20"):
        mapped_model(tiny_folder, two_towers_config(tiny_folder))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": [1]}', "{", "[" * 5000])
def test_an_index_of_weights_that_cannot_be(tiny_folder, content):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "model-00001-of-00001.safetensors")
    (tiny_folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*index\.json[: ][^\n]*$"):
        weight_files(tiny_folder)


TOKENIZERS = {
    "an exception": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    },
    "a panic of Rust": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
}


@pytest.mark.parametrize(("entrance", "fault"), zip(["eval.retrieval", "hub_upload.export"], TOKENIZERS, strict=True))
def test_a_tokenizer_that_cannot_be(tiny_folder, tiny_dataset_folder, tmp_path, entrance, fault):
    path = tiny_folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | TOKENIZERS[fault]), encoding="utf-8")
    main, argv = ENTRANCES[entrance](tiny_folder, tiny_dataset_folder, tmp_path / "out")
    assert f"{tiny_folder}" in (said := refused(main, argv)) and "tokenizer" in said


@pytest.fixture(scope="module")
def finished(tiny_dataset_folder, tmp_path_factory):
    """The data of a stage beside its output."""
    folder = tmp_path_factory.mktemp("finished")
    run(numbered(tiny_dataset_folder, folder), folder / "stage")
    assert len(list((folder / "stage").glob("*.parquet"))) == 2
    return folder


@pytest.fixture
def stage(finished, tmp_path, monkeypatch):
    """The output of a stage with two parts of a split "train"; the second has a list of rows that were left out."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return shutil.copytree(finished / "stage", tmp_path / "stage")


def numbered(dataset: Path, folder: Path) -> str:
    rows = datasets.load_from_disk(dataset)["train"]
    rows = rows.add_column("number", range(2, len(rows) + 2))  # rows whose number ends in 5 are left out
    datasets.DatasetDict(train=rows).save_to_disk(folder / "numbered")
    return str(folder / "numbered")


READERS = {
    "captions.select": lambda model, stage, out: (
        select.main, ["--dataset", stage, "--output", out, "--language", "pt", "--caption_strategy", "all"]
    ),
    "train_accelerate": lambda model, stage, out: (
        train_accelerate.main, flags(model, stage, out, validation_split="train", test_split="train")
    ),
    "eval.retrieval": lambda model, stage, out: (
        retrieval.main,
        ["--model", model, "--dataset", stage, "--output", out / "r.json", "--split", "train"],
    ),
}  # fmt: skip


def of_source(**values):
    return lambda record: record | {"source": record["source"] | values}


RECORDS = {
    "a list": lambda record: [],
    "no fields": lambda record: {},
    "empty": lambda record: "",
    "null": lambda record: None,
    "a thousand deep": lambda record: "[" * 1000 + "]" * 1000,
    "no source": lambda record: record | {"source": []},
    "rows that are no number": of_source(rows="x"),
    "rows below none": of_source(rows=-8),
    "more rows than can be": of_source(rows=10**12),
    "a split that is a path": of_source(split="../other/train"),
    "parts of no row": lambda record: record | {"rows_per_part": 0},
}


READ_BY = dict(zip(("a list", "no source", "rows that are no number"), READERS, strict=True))


@pytest.mark.parametrize("fault", RECORDS)
def test_a_stage_json_that_cannot_be(finished, stage, tiny_folder, tmp_path, fault):
    path = stage / "stage.json"
    changed = RECORDS[fault](json.loads(path.read_text(encoding="utf-8")))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed), encoding="utf-8")
    if reader := READ_BY.get(fault):
        main, argv = READERS[reader](tiny_folder, stage, tmp_path / "out")
        assert f"{path}" in (said := refused(main, argv)) and "run its stage again" in said
    for step in (check_complete, lambda folder: run(str(finished / "numbered"), folder)):
        with pytest.raises(ValueError, match=r"^[^\n]*stage\.json[^\n]*run its stage again\.$"):
            step(stage)


def truncated(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def overwritten(path: Path) -> None:
    """Noise in the first data page; the footer is whole."""
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 60)


DAMAGES = [lambda path: truncated(path, -100), lambda path: truncated(path, 0), overwritten]


@pytest.mark.parametrize(("reader", "damage"), zip(READERS, DAMAGES, strict=True))
def test_a_damaged_part_is_named(stage, tiny_folder, tmp_path, reader, damage):
    path = sorted(stage.glob("*.parquet"))[0]
    damage(path)
    main, argv = READERS[reader](tiny_folder, stage, tmp_path / "out")
    assert path.name in refused(main, argv)


@pytest.mark.parametrize("content", ["{", "[]\n", "{}\n", "x" * 9, "[" * 1000])
def test_a_damaged_list_of_rows_that_were_left_out_is_named(stage, content):
    (path,) = stage.glob("*.skipped.jsonl")
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]*skipped\.jsonl is damaged[^\n]*$"):
        check_complete(stage)
