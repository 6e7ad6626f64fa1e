"""transformers.js itself, out of npm, loads an export in Node and in Chromium, and computes what the model does."""

import base64
import json
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from browser import require_chromium
from PIL import Image
from test_text_tower import AWKWARD, PLAIN
from tiny import TINY_TEXT, TINY_VISION, randomise, tiny_config
from transformers import AutoModel, AutoProcessor, pipeline

from benchmarks.in_browser import LABELS, NAME, TEMPLATE, ask, compared, inputs_and_outputs, node_packages, served
from benchmarks.in_browser import request as asked_for
from hub_upload.allowed_files import allowed_files
from hub_upload.export import export, main
from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_processor

pytestmark = pytest.mark.slow
VISION = {**TINY_VISION, "hidden_size": 128, "intermediate_size": 256, "image_size": 224, "patch_size": 32}
TEXT = {**TINY_TEXT, "vocab_size": 250_002, "hidden_size": 64}
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
GRAPHS = [
    f"{kind}{end}.onnx" for kind in ("model", "text_model", "vision_model") for end in ("", "_fp16", "_quantized")
]


@pytest.fixture(scope="module")
def source(tmp_path_factory, xlmr):
    """A small model with the real vocabulary and pictures of the real size."""
    folder = tmp_path_factory.mktemp("source") / "model"
    randomise(CapivaraModel(tiny_config(vision_config=VISION, text_config=TEXT))).save_pretrained(folder)
    xlmr[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repository(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("js") / "repository"
    export(source, folder, ["transformers", "transformers_js"])
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Photographs as they are, and the middle of each in the size that needs no other."""
    from skimage import data

    folder = tmp_path_factory.mktemp("pictures")
    for name in PHOTOS:
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        photo.save(folder / f"{name}.png")
        left, top = (photo.width - 224) // 2, (photo.height - 224) // 2
        photo.crop((left, top, left + 224, top + 224)).save(folder / f"{name}-224.png")
    return folder


@pytest.fixture(scope="module")
def answer(repository, pictures):
    """Function of the place, the precision and a request, that returns the answer; each is asked once."""
    missing = " and ".join(name for name in ("node", "npm") if shutil.which(name) is None)
    if missing:
        refuse = pytest.fail if os.environ.get("CI_REQUIRES_NODE") == "1" else pytest.skip
        refuse(f"{missing} is not installed (apt-get install nodejs npm), so transformers.js can't be asked")
    packages, inputs = node_packages(), inputs_and_outputs(repository)[0]
    with served({NAME: repository}, packages, pictures=pictures) as address:

        @cache
        def asked(place: str, dtype: str | None) -> dict:
            if place == "chromium":
                require_chromium()
            about = {"labels": LABELS, "template": TEMPLATE, "texts": [*PLAIN, *AWKWARD]}
            addresses = [f"{address}pictures/{name}{end}.png" for end in ("-224", "") for name in PHOTOS]
            return ask(place, asked_for(address, dtype=dtype, inputs=inputs, pictures=addresses, **about), packages)

        yield asked


def softmax(scores: np.ndarray) -> np.ndarray:
    return np.exp(scores - scores.max(axis=1, keepdims=True)) / np.exp(scores - scores.max(axis=1, keepdims=True)).sum(
        axis=1, keepdims=True
    )


@pytest.mark.parametrize(
    ("place", "dtype", "taken"),
    [
        *(("node", None, "fp32"), ("node", "q8", "q8"), ("node", "fp16", "fp16")),
        *(("chromium", "fp32", "fp32"), ("chromium", None, "q8"), ("chromium", "fp16", "fp16")),
    ],
)
def test_scores_are_the_models(repository, pictures, answer, place, dtype, taken):
    found, expected = answer(place, dtype), inputs_and_outputs(repository)[1]
    assert found["dtype"] == taken and found["version"].startswith("4.")
    distances = compared(found, expected)
    assert distances["largest_score_difference"] < LARGEST[taken], distances
    assert min(distances["lowest_image_cosine"], distances["lowest_text_cosine"]) > LOWEST[taken], distances
    # The pipeline, with no option but the precision, on pictures that need no other size.
    classify = pipeline("zero-shot-image-classification", str(repository), trust_remote_code=True)
    files = [str(pictures / f"{name}-224.png") for name in PHOTOS]
    ours = classify(files, candidate_labels=LABELS, hypothesis_template=TEMPLATE)
    for mine, theirs in zip(ours, found["classes"], strict=False):  # the further ones are of other sizes
        theirs = {entry["label"]: entry["score"] for entry in theirs}
        assert theirs == pytest.approx({e["label"]: e["score"] for e in mine}, abs=0.03 if taken == "q8" else 1e-3)
