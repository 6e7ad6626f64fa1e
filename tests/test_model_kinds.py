"""Every kind of model keeps its digests, embeddings and exports. What is special about a kind is in one table."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from towers import MAKERS, gemma_like, other_texts, siglip2

from capivara_common.image_encoder_digest import image_encoder_digest
from hub_upload.export import export_model
from modeling_capivara.two_towers import load_embedder, random_images

GOLDEN = Path(__file__).parent / "golden" / "kinds.json"
TEXTS = ["uma foto de um gato", "pão", "A Casa VERDE, são joão"]
FROZEN = ("siglip", "clip", "chinese_clip", "altclip", "metaclip_2")
REPOSITORY_FORMATS = ["transformers", "open_clip", "sentence_transformers", "transformers_js"]


@pytest.fixture
def make_kind(saved_tiny_folder, tmp_path):
    """Function that returns a folder with a toy model of a kind."""

    def make(kind: str) -> Path:
        if kind == "capivara":
            return saved_tiny_folder
        folder = tmp_path / kind
        siglip2(folder, gemma_like(TEXTS * 3, 400)) if kind == "siglip2" else MAKERS[kind](folder)
        return folder

    return make


def compute_embeddings(folder: Path) -> dict[str, Any]:
    """Return what a model computes: the digest of its image encoder, and embeddings of texts and of random images."""
    embedder = load_embedder(str(folder), "cpu")
    images = [image.convert("RGB") for image in random_images()[:2]]
    rounded = {"texts": embedder.embed_texts(TEXTS), "images": embedder.embed_images(images)}
    embeds = {name: [[round(number, 6) for number in row] for row in rows.tolist()] for name, rows in rounded.items()}
    return {"image_digest": image_encoder_digest(folder), **embeds}


def compute_exports(folder: Path, scratch: Path) -> dict[str, Any]:
    """Return the files of all exports of a model, with a digest of the tensors in each weight file; null if refused."""
    other = other_texts(folder, scratch / "other")
    exports = {"repository": (folder, REPOSITORY_FORMATS, None), "immich": (folder, ["immich"], None)}
    exports["drop_in"] = other, ["drop_in"], str(folder)
    outputs = {}
    for name, (model, formats, base) in exports.items():
        try:
            files = export_model(model, scratch / name, formats, base=base)
        except ValueError:
            outputs[name] = None
            continue
        outputs[name] = {file: digest_tensors(scratch / name / file) for file, _ in files}
    return outputs


def digest_tensors(path: Path) -> str | None:
    """Return a digest of the names, shapes and numbers in a safetensors file; None for any other file."""
    if path.suffix != ".safetensors":
        return None
    digest = hashlib.blake2b(digest_size=16)
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", ["capivara", "siglip2", *FROZEN])
def test_digest_and_embeddings_are_unchanged(kind, make_kind):
    expected, actual = json.loads(GOLDEN.read_text())[kind], compute_embeddings(make_kind(kind))
    assert actual["image_digest"] == expected["image_digest"]
    for name in ("texts", "images"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["capivara", "siglip2", *FROZEN])
def test_exports_are_unchanged(kind, make_kind, tmp_path):
    assert compute_exports(make_kind(kind), tmp_path) == json.loads(GOLDEN.read_text())[kind]["exports"]
