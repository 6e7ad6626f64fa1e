"""The miniature: put together once, whole or not at all, and as good as its benchmark says."""

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
from capivara_search import miniature
from capivara_search.miniature import PROJECTION_FILE
from capivara_search.models import find_model
from examples.openmoji.prepare import bidirectional_recall

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO)
from capivara_search.miniature import miniature_folder
print(miniature_folder())
"""


def start(cache: Path) -> subprocess.Popen:
    environment = {**os.environ, "CAPIVARA_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_projection_that_is_installed_is_small_and_whole():
    tensors = load_file(PROJECTION_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "visual": (384, 1280), "direction": (384,), "logit_scale": ()
    }  # fmt: skip
    assert PROJECTION_FILE.stat().st_size < 1_100_000
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["direction"].norm().item() == pytest.approx(1, abs=1e-6)


def test_another_projection_is_another_folder(monkeypatch, tmp_path):
    key = miniature._cache_key()
    (tmp_path / "other").write_bytes(PROJECTION_FILE.read_bytes() + b" ")
    monkeypatch.setattr(miniature, "PROJECTION_FILE", tmp_path / "other")
    assert miniature._cache_key() != key


@pytest.mark.slow
def test_put_together_once_by_two_at_once_and_killed_before(tmp_path):
    cache = tmp_path / "cache"
    process = start(cache)
    while not list(cache.glob("miniature/.*.tmp-*/*")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not [p for p in (cache / "miniature").iterdir() if p.name[0] != "."]
    ended = [process.communicate(timeout=300) for process in [start(cache), start(cache)]]
    assert ended[0][0] == ended[1][0]
    assert sum(errors.count("Putting the miniature together") for _, errors in ended) == 1
    folder = Path(ended[0][0].strip())
    assert is_complete_model(folder) and {p.name for p in folder.parent.iterdir()} == {
        folder.name,
        f".{folder.name}.lock",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 330_000_000
    assert "CC BY-SA 4.0" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_it_finds_photographs_in_portuguese():
    from examples.openmoji.proxies import load_photographs

    model, photos = find_model("miniature", device="cpu"), load_photographs()
    assert (model.width, model.image_size, model.name) == (384, 224, "miniature") and 1 < model.logit_scale < 100
    assert "miniatura" in model.get_notice("pt") and "--model hiaac-nlp/CAPIVARA" in model.get_notice("en")
    images = model.embed_images(photos["image"][:])
    names = list(photos["name"])
    wanted = {"um gato": "chelsea", "café": "coffee", "um cavalo": "horse", "uma moto": "stereo_motorcycle"}
    for text, name in wanted.items():
        best = (model.embed_texts([text]) @ images.T)[0].argsort()[::-1][:2]
        assert name in [names[number] for number in best], text
    measured = json.loads((ROOT / "benchmarks" / "results" / "miniature.json").read_text())["measured"]["miniature"]
    texts = model.embed_texts([captions[0] for captions in photos["captions-pt"]])
    found = 100 * bidirectional_recall(torch.from_numpy(images), torch.from_numpy(texts))
    expected = np.mean([measured["photo_names_pt"][way] for way in ("text_to_image", "image_to_text")])
    assert found == pytest.approx(expected, abs=2)  # the committed figures are of the committed projection
