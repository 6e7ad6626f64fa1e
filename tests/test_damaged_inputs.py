"""Damaged or malicious model and data files: commands fail soon, with one line that names the file."""

import json
import re
import shutil
import time
from itertools import cycle

import datasets
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from killed_stage import run
from safetensors.torch import load_file, save_file
from test_train_accelerate import flags
from transformers import AutoModel

import train_accelerate
from capivara_common.weight_file import find_weight_files
from capivara_search.models import SearchModel
from captions import score, select
from captions.stages import check_stage_and_count_rows
from eval import retrieval
from hub_upload import export
from modeling_capivara.loading import MAX_NAMED_KEYS, load_memory_mapped_model, load_model, load_two_towers_config
from modeling_capivara.two_towers import load_embedder
from training import interpolate
from training.inputs import embed_pixels

MAX_SECONDS = 20  # a model of 10^7 layers would take hours; these tests take at most three seconds


def refused(main, argv: list) -> str:
    """Run a command that must fail soon with a one-line error, and return the error."""
    started = time.monotonic()
    with pytest.raises(ValueError) as error:
        main([str(word) for word in argv])
    message = str(error.value)
    assert "\n" not in message and time.monotonic() - started < MAX_SECONDS, message
    return message


ENTRANCES = {
    "train_accelerate": lambda model, data, out: (train_accelerate.main, flags(model, data, out)),
    "eval.retrieval": lambda model, data, out: (
        retrieval.main, ["--model", model, "--dataset", data, "--output", out / "r.json"]
    ),
    "captions.score": lambda model, data, out: (
        score.main, ["--model", model, "--dataset", data, "--output", out, "--language", "pt"]
    ),
    "training.interpolate": lambda model, data, out: (interpolate.main, [model, model, "--output", out]),
    "hub_upload.export": lambda model, data, out: (export.main, ["--model", model, "--output", out]),
}  # fmt: skip


def with_tower(name: str, **settings):
    return lambda config: config | {name: config[name] | settings}


CONFIGS = {
    "a thousand deep": lambda config: json.dumps(config)[:-1] + ', "x": ' + "[" * 1000 + "]" * 1000 + "}",
    "ten million layers of text": with_tower("text_config", num_hidden_layers=10**7),
    "ten thousand million positions": with_tower("text_config", max_position_embeddings=10**10),
    "a scale of a million": lambda config: config | {"logit_scale_init_value": 1e6},
    "no image tower": lambda config: config | {"vision_config": None},
    "dropout that is NaN": with_tower("text_config", hidden_dropout_prob=float("nan")),
    "a list": lambda config: "[]",
    "a tower that is a list": lambda config: config | {"text_config": [1]},
}


@pytest.mark.parametrize(("entrance", "fault"), zip(cycle(ENTRANCES), CONFIGS, strict=False))
def test_an_impossible_config_is_refused(tiny_folder, tiny_dataset_folder, tmp_path, entrance, fault):
    path = tiny_folder / "config.json"
    content = CONFIGS[fault](json.loads(path.read_text(encoding="utf-8")))
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    main, argv = ENTRANCES[entrance](tiny_folder, tiny_dataset_folder, tmp_path / "out")
    message = refused(main, argv)
    assert str(tiny_folder) in message and "config.json" in message
    assert not [path for path in tmp_path.glob("out*") if path.suffix != ".logs"]


def test_an_impossible_logit_scale_in_the_weights_is_refused(tiny_folder):
    path = tiny_folder / "model.safetensors"
    save_file(load_file(path) | {"logit_scale": torch.tensor(1e6)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"logit_scale\b.*-20\b.*\b20\b.*1000000"):
        load_model(tiny_folder)
    with pytest.raises(ValueError, match=r"logit_scale\b.*-20\b.*\b20\b"):
        load_memory_mapped_model(tiny_folder, load_two_towers_config(tiny_folder))


def test_weights_of_another_architecture_are_refused_with_at_most_five_names(tiny_folder, capfd):
    """Hundreds of weights are missing, unexpected or have another shape; the message names only a few."""
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = 9
    config["vision_config"] |= {"num_hidden_layers": 1, "intermediate_size": 77}
    path.write_text(json.dumps(config), encoding="utf-8")
    for load in (load_model, lambda folder: load_memory_mapped_model(folder, load_two_towers_config(folder))):
        with pytest.raises(ValueError) as error:
            load(tiny_folder)
        message = str(error.value)
        assert all(word in message for word in (str(tiny_folder), "missing", "unexpected", "mismatched"))
        assert 3 <= len(re.findall(r"(?:text|vision)_model\.", message)) <= MAX_NAMED_KEYS and "\n" not in message
    assert not re.search(r"(?:text|vision)_model\.", "".join(capfd.readouterr()))


@pytest.mark.parametrize("name", ["logit_scale", "logit_bias"])
def test_a_logit_scale_of_two_numbers_is_refused_before_loading(tiny_folder, name, monkeypatch):
    path = tiny_folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(2)}, path, {"format": "pt"})
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=rf"^[^\n]*{name}\b[^\n]*\b2\b[^\n]*$"):
        load_model(tiny_folder)


def test_embeddings_that_are_not_finite_are_refused(tiny_folder):
    path = tiny_folder / "model.safetensors"
    tensors = load_file(path)
    for name in ("visual_projection.weight", "text_model.embeddings.LayerNorm.weight"):
        tensors[name] = tensors[name] * float("nan")
    save_file(tensors, path, {"format": "pt"})
    embedder, search = load_embedder(str(tiny_folder), "cpu"), SearchModel("tiny", "tiny", tiny_folder, "cpu")
    image = PIL.Image.new("RGB", (40, 40))
    for call in (embedder.embed_texts, search.embed_texts):
        with pytest.raises(ValueError, match="not finite"):
            call(["um gato"])
    for call in (embedder.embed_images, search.embed_images):
        with pytest.raises(ValueError, match="not finite"):
            call([image])
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="not finite"):
        embed_pixels(load_model(tiny_folder), pixels, Accelerator(cpu=True))


@pytest.mark.parametrize("content", ["[]", '{"weight_map": [1]}', "[" * 5000])
def test_a_damaged_weight_index_is_refused(tiny_folder, content):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "model-00001-of-00001.safetensors")
    (tiny_folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*index\.json[: ][^\n]*$"):
        find_weight_files(tiny_folder)


@pytest.fixture(scope="module")
def finished(tiny_dataset_folder, tmp_path_factory):
    """Folder with the input of a stage and its output: two parts, the second with skipped rows."""
    folder = tmp_path_factory.mktemp("finished")
    rows = datasets.load_from_disk(tiny_dataset_folder)["train"]
    rows = rows.add_column("number", range(2, len(rows) + 2))  # the stage skips rows whose number ends in 5
    datasets.DatasetDict(train=rows).save_to_disk(folder / "numbered")
    run(str(folder / "numbered"), folder / "stage")
    assert len(list((folder / "stage").glob("*.parquet"))) == 2
    return folder


@pytest.fixture
def stage(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return shutil.copytree(finished / "stage", tmp_path / "stage")


READERS = [
    lambda model, stage, out: (select.main, ["--dataset", stage, "--output", out, "--language", "pt"]),
    lambda model, stage, out: (
        train_accelerate.main, flags(model, stage, out, validation_split="train", test_split="train")
    ),
    lambda model, stage, out: (
        retrieval.main, ["--model", model, "--dataset", stage, "--output", out / "r.json", "--split", "train"]
    ),
]  # fmt: skip


RECORDS = {
    "a list": lambda record: [],
    "a thousand deep": lambda record: "[" * 1000 + "]" * 1000,
    "no source": lambda record: record | {"source": []},
    "more rows than can be": lambda record: record | {"source": record["source"] | {"rows": 10**12}},
    "parts of no row": lambda record: record | {"rows_per_part": 0},
}


@pytest.mark.parametrize("fault", RECORDS)
def test_an_impossible_stage_json_is_refused(finished, stage, fault):
    path = stage / "stage.json"
    changed = RECORDS[fault](json.loads(path.read_text(encoding="utf-8")))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed), encoding="utf-8")
    for step in (check_stage_and_count_rows, lambda folder: run(str(finished / "numbered"), folder)):
        with pytest.raises(ValueError, match=r"^[^\n]*stage\.json[^\n]*$"):
            step(stage)


# Truncated, empty, and with a damaged first data page but an intact footer.
DAMAGES = [lambda data: data[:-100], lambda data: b"", lambda data: data[:8] + b"\xff" * 60 + data[68:]]


@pytest.mark.parametrize(("reader", "damage"), zip(READERS, DAMAGES, strict=True))
def test_a_damaged_part_is_reported(stage, tiny_folder, tmp_path, reader, damage):
    path = sorted(stage.glob("*.parquet"))[0]
    path.write_bytes(damage(path.read_bytes()))
    main, argv = reader(tiny_folder, stage, tmp_path / "out")
    assert path.name in refused(main, argv)


@pytest.mark.parametrize("content", ["[]\n", "[" * 1000])
def test_a_damaged_list_of_skipped_rows_is_reported(stage, content):
    (path,) = stage.glob("*.skipped.jsonl")
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]*skipped\.jsonl\b[^\n]*$"):
        check_stage_and_count_rows(stage)
