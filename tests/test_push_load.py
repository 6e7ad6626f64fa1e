"""What was pushed is what is loaded: by transformers, by open_clip and by datasets, from an empty cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from hub_client import HubCommands, peak_of_a_push
from hub_server import HubServer

from modeling_capivara.loading import load_model

TEXT_MODEL = "them/text"
LOADING = """
import sys
from transformers import AutoModel, AutoProcessor

name = "us/capivara"
model = AutoModel.from_pretrained(name, trust_remote_code=True, revision=sys.argv[1]).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, revision=sys.argv[1])
assert model.__module__.startswith("transformers_modules"), model.__module__  # the code that was pushed
texts = processor(text=["uma capivara"], return_tensors="pt")
ours = model.get_text_features(**texts).pooler_output[0]
ours = ours / ours.norm()

import open_clip

peer, _, preprocess = open_clip.create_model_and_transforms(f"hf-hub:{name}")
theirs = peer.eval().encode_text(open_clip.get_tokenizer(f"hf-hub:{name}")(["uma capivara"]), normalize=True)[0]
print(ours.tolist(), theirs.tolist(), sep="\\n")
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def commands(hub, tmp_path):
    found = HubCommands(hub, tmp_path / "home")
    yield found
    found.close()


def loaded(hub: HubServer, home: Path, code: str, *arguments: str) -> list[str]:
    """Lines that a program prints, which knows of this project only what the Hub has."""
    environment = {**os.environ, **hub.environment(home)}
    del environment["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=home.parent, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_transformers_and_open_clip_load_what_was_pushed(hub, commands, tiny_folder, tmp_path):
    load_model(tiny_folder).config.text_config.save_pretrained(tmp_path / "text_model")
    hub.store(TEXT_MODEL, tmp_path / "text_model")
    formats = "transformers,open_clip,sentence_transformers"
    flags = ("--output", tmp_path / "repository", "--formats", formats, "--text_config", TEXT_MODEL)
    made = commands("--model", tiny_folder, "--repo_id", "us/capivara", *flags, call="hub_upload.export:main")
    assert made.code == 0, made.err
    done = commands("--model", tmp_path / "repository", "--repo-id", "us/capivara", "--push", "--tag", "v1.0")
    assert done.code == 0, done.err
    lines = loaded(hub, tmp_path / "reader", LOADING, "v1.0")
    ours, theirs = (np.array(json.loads(line)) for line in lines[-2:])
    assert np.abs(ours).max() > 0 and np.abs(ours - theirs).max() < 1e-5
    assert {"us/capivara/model.safetensors", "us/capivara/open_clip_model.safetensors"} <= {*hub.fetched}
    assert not [name for name in hub.fetched if name.startswith(TEXT_MODEL) and name.endswith(".safetensors")]


@pytest.mark.slow
def test_datasets_loads_what_was_pushed(hub, commands, tiny_dataset_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    whole = load_from_disk(tiny_dataset_folder)
    for name, split in whole.items():
        split.to_parquet(data / f"{name}.parquet")
    (data / "README.md").write_text("---\nlicense: mit\npretty_name: Squares\n---\n", encoding="utf-8")
    done = commands("--model", data, "--repo-id", "us/squares", "--repo-type", "dataset", "--push")
    assert done.code == 0, done.err
    code = (
        "import datasets; d = datasets.load_dataset('us/squares'); print(d['test'][3]['captions-pt'], len(d['train']))"
    )
    assert loaded(hub, tmp_path / "reader", code)[-1] == f"{whole['test'][3]['captions-pt']} 12"


@pytest.mark.slow
def test_a_large_file_is_never_in_memory(tmp_path):
    size = 300 * 2**20
    folder = tmp_path / "model"
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "U8", "shape": [size - 100], "data_offsets": [0, size - 100]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write((92).to_bytes(8, "little") + header.ljust(92))
        file.truncate(size)  # a hole, which reads as zeros
    with HubServer(tmp_path / "hub") as hub:
        after_imports, peak = peak_of_a_push(hub, folder, tmp_path / "home")
        assert hub.repo("us/large").at("main").files["model.safetensors"].size == size
    assert peak - after_imports < 0.2 * size  # 1.5 times the weights are allowed
