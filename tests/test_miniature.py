"""The miniature: built once, completely or not at all, and as accurate as its benchmark says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from capivara_common.hub_cache import is_complete_model
from capivara_search import miniature_model
from capivara_search.messages import Messages
from capivara_search.miniature_model import PROJECTION_FILE
from capivara_search.models import resolve_search_model
from examples.openmoji.prepare import compute_mean_bidirectional_recall

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO)
from capivara_search.miniature_model import get_or_build_miniature_folder
print(get_or_build_miniature_folder())
"""


def start(cache: Path) -> subprocess.Popen:
    environment = {**os.environ, "CAPIVARA_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_installed_projection_is_small_and_complete():
    tensors = load_file(PROJECTION_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "visual": (384, 1280), "direction": (384,), "logit_scale": ()
    }  # fmt: skip
    assert PROJECTION_FILE.stat().st_size < 1_100_000
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["direction"].norm().item() == pytest.approx(1, abs=1e-6)


def test_another_projection_has_another_folder(monkeypatch, tmp_path):
    key = miniature_model._compute_cache_folder_name()
    (tmp_path / "other").write_bytes(PROJECTION_FILE.read_bytes() + b" ")
    monkeypatch.setattr(miniature_model, "PROJECTION_FILE", tmp_path / "other")
    assert miniature_model._compute_cache_folder_name() != key


@pytest.mark.slow
def test_two_processes_build_it_once_even_after_an_earlier_one_was_killed(tmp_path):
    cache = tmp_path / "cache"
    process = start(cache)
    while not list(cache.glob("miniature/.*.tmp-*/*")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in (cache / "miniature").iterdir()), "an incomplete folder is visible"
    (first, first_log), (second, second_log) = [
        process.communicate(timeout=300) for process in [start(cache), start(cache)]
    ]
    assert first == second
    folder = Path(first.strip())
    assert (first_log + second_log).count(Messages("en")("note.miniature", folder)) == 1
    assert is_complete_model(folder)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 330_000_000
    assert "CC BY-SA 4.0" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_it_finds_photographs_in_portuguese():
    from examples.openmoji.proxies import load_photograph_dataset

    model, photos = resolve_search_model("miniature", device="cpu"), load_photograph_dataset()
    assert (model.width, model.image_size, model.name) == (384, 224, "miniature") and 1 < model.logit_scale < 100
    assert "miniatura" in model.get_notice("pt") and "--model hiaac-nlp/CAPIVARA" in model.get_notice("en")
    images = model.embed_images(photos["image"][:])
    names = list(photos["name"])
    expected_names = {"um gato": "chelsea", "café": "coffee", "um cavalo": "horse", "uma moto": "stereo_motorcycle"}
    for text, name in expected_names.items():
        best_two = (model.embed_texts([text]) @ images.T)[0].argsort()[::-1][:2]
        assert name in [names[number] for number in best_two], text
    measured = json.loads((ROOT / "benchmarks" / "results" / "miniature.json").read_text())["measured"]["miniature"]
    texts = model.embed_texts([captions[0] for captions in photos["captions-pt"]])
    recall = 100 * compute_mean_bidirectional_recall(torch.from_numpy(images), torch.from_numpy(texts))
    expected = np.mean([measured["photo_names_pt"][way] for way in ("text_to_image", "image_to_text")])
    assert recall == pytest.approx(expected, abs=2)  # the benchmark was run with the same projection
