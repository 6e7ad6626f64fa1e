"""The model of an index: found by folder or Hub id, downloaded once, and identified by its image encoder."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file, save_file
from towers import MAKERS, as_published, gemma_like, siglip2

from capivara_common import image_encoder_digest as digests
from capivara_search.messages import Messages
from capivara_search.models import DEFAULT_MODEL, MAX_NUMPY_TEXTS, resolve_search_model
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts, embedding_width

TEXTS = ["um gato azul", "A casa do Carro"]
PROGRAM = """
import json, sys, time
started = time.perf_counter()
from capivara_search.models import resolve_search_model
try:
    model = resolve_search_model(*sys.argv[1:])
except ValueError as error:
    seconds = time.perf_counter() - started
    print(json.dumps({"error": str(error), "code": error.code, "seconds": seconds}))
else:
    texts = model.embed_texts(["um gato", "SÃ£o JoÃ£o"]).tolist()
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    print(json.dumps({"name": model.name, "source": model.source, "folder": str(model.folder),
                      "notice": [model.get_notice("en"), model.get_notice("pt")], "texts": texts,
                      "digest": model.image_digest, "heavy": heavy}))
"""


def run(*words: str, **environment: str) -> dict:
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields), encoding="utf-8")


def change_weights(folder: Path, start: str, by: float = 1.0) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.startswith(start))
    save_file({**state, name: state[name] + by}, path, {"format": "pt"})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CAPIVARA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- Find and use ---------------------------------------------------------------------------------------------------


def test_a_folder_is_found_by_path_and_environment_variable(tiny_folder, tiny_model, monkeypatch):
    model = resolve_search_model(str(tiny_folder), device="cpu")
    assert (model.name, model.source, model.folder) == ("model", str(tiny_folder), tiny_folder)
    assert model.get_notice("en") is None
    assert (model.width, model.image_size) == (24, 32)
    assert model.logit_scale == pytest.approx(tiny_model.logit_scale.exp().item())
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert resolve_search_model("~/model").folder == tiny_folder
    monkeypatch.chdir(tiny_folder.parent)
    assert resolve_search_model("model").source == str(
        tiny_folder
    )  # absolute, so that it is found from another current folder
    monkeypatch.setenv("CAPIVARA_MODEL", str(tiny_folder))
    assert resolve_search_model().folder == tiny_folder


def test_embeddings_match_those_of_the_model(tiny_folder, tiny_model, tiny_processor):
    model = resolve_search_model(str(tiny_folder), device="cpu")
    for invalid, message in (([], "empty list"), (["a", 3], "string.*int")):
        with pytest.raises(ValueError, match=message):
            model.embed_texts(invalid)
    images = [Image.effect_mandelbrot((60 + 7 * n, 45), (-2, -1.5, 1, 1.5), 20 + n).convert("RGB") for n in range(5)]
    texts = ["um gato", "São João", ""]
    without_torch = model.embed_texts(texts)
    image_embeds = model.embed_images(images, batch_size=2)
    assert image_embeds.dtype == without_torch.dtype == np.float32 and image_embeds.shape == (5, 24)
    np.testing.assert_allclose(
        image_embeds, embed_images(tiny_model, tiny_processor, images).numpy(), rtol=0, atol=1e-6
    )
    expected = embed_texts(tiny_model, tiny_processor, texts).numpy()
    for text_embeds in (without_torch, model.embed_texts(texts), model.embed_texts(tuple(texts))):
        np.testing.assert_allclose(text_embeds, expected, rtol=0, atol=1e-5)
    many = resolve_search_model(str(tiny_folder), device="cpu").embed_texts(["um gato"] * (MAX_NUMPY_TEXTS + 1))
    np.testing.assert_allclose(many, np.tile(expected[0], (len(many), 1)), rtol=0, atol=1e-5)
    assert model.embed_images([]).shape == (0, 24)


def test_unusable_folders_and_devices_are_named(tiny_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, code in (("/no/such", "no_model"), (str(tmp_path / "empty"), "not_a_model")):
        with pytest.raises(ValueError, match=re.escape(source)) as caught:
            resolve_search_model(source)
        assert caught.value.code == code
    for damage, code, message in [
        (
            lambda f: change(f / "config.json", model_type="siglip2"),
            "no_two_towers",
            r"'siglip2' .*NaFlex.* clip .CLIP.",
        ),
        (lambda f: (f / "config.json").unlink(), "not_a_model", "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "not_a_model", "model.safetensors"),
    ]:
        folder = shutil.copytree(tiny_folder, tmp_path / "copy", dirs_exist_ok=True)
        damage(folder)
        with pytest.raises(ValueError, match=message) as caught:
            resolve_search_model(str(folder))
        assert caught.value.code == code
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="abacus") as caught:
        resolve_search_model(str(tiny_folder), device="abacus").embed_images([Image.new("RGB", (40, 40))])
    assert caught.value.code == "device"


# --- Models of transformers -------------------------------------------------------------------------------------------


KINDS = {**MAKERS, "siglip2": lambda folder: siglip2(folder, gemma_like(TEXTS * 3, 400))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_has_the_same_digest_as_saved_and_as_published(kind, tmp_path, cache):
    """A published model has older settings files, but the same image encoder."""
    KINDS[kind](tmp_path / "model")
    published = shutil.copytree(tmp_path / "model", tmp_path / "published")
    as_published(published)
    model, processor = load_model(tmp_path / "model").eval(), load_processor(tmp_path / "model")
    search_models = [resolve_search_model(str(folder), device="cpu") for folder in (tmp_path / "model", published)]
    saved, other = search_models
    assert saved.image_digest == other.image_digest
    assert {(found.width, found.image_size) for found in search_models} == {(embedding_width(model.config), 32)}
    assert saved.logit_scale == other.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert saved.logit_bias == (None if "siglip" not in kind else pytest.approx(model.logit_bias.item()))
    images = [Image.effect_mandelbrot((60, 45), (-2, -1.5, 1, 1.5), 20 + n).convert("RGB") for n in range(2)]
    expected_images = embed_images(model, processor, images).numpy()
    expected_texts = embed_texts(model, processor, TEXTS).numpy()
    for found in search_models:
        np.testing.assert_allclose(found.embed_images(images), expected_images, atol=1e-5)
        np.testing.assert_allclose(found.embed_texts(TEXTS), expected_texts, atol=1e-5)
    vision = json.loads((published / "config.json").read_text())["vision_config"]
    assert "hidden_act" not in vision and not (published / "processor_config.json").exists()
    change(published / "config.json", vision_config=vision | {"hidden_act": "relu"})
    assert resolve_search_model(str(published)).image_digest != saved.image_digest
    change_weights(tmp_path / "model", "text_model.")
    assert resolve_search_model(str(tmp_path / "model")).image_digest == saved.image_digest


def test_the_default_width_of_siglip(tmp_path):
    KINDS["siglip2"](tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"].pop("projection_size")
    path.write_text(json.dumps(config))
    assert resolve_search_model(str(tmp_path / "model")).width == 32
    path.write_text(json.dumps(config | {"text_config": {}, "vision_config": {}}))
    change(tmp_path / "model" / "processor_config.json", image_processor={"size": {"height": 224, "width": 224}})
    found = resolve_search_model(str(tmp_path / "model"))
    assert (found.width, found.image_size, found.resize_filter) == (768, 224, 3)


@pytest.mark.slow
def test_weights_are_downloaded_for_supported_models_only(tmp_path):
    KINDS["siglip2"](tmp_path / "siglip2")
    as_published(tmp_path / "siglip2")
    change(shutil.copytree(tmp_path / "siglip2", tmp_path / "naflex") / "config.json", model_type="siglip2")
    expected = resolve_search_model(str(tmp_path / "siglip2"))
    with HubServer(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "home", token=None) | {"CAPIVARA_CACHE": str(tmp_path / "cache")}
        for name in ("siglip2", "naflex"):
            hub.store(f"us/{name}", tmp_path / name)
        found = run("us/siglip2", **environment)
        assert (found["name"], found["heavy"]) == ("us/siglip2", []) and found["digest"] == expected.image_digest
        np.testing.assert_allclose(found["texts"], expected.embed_texts(["um gato", "SÃ£o JoÃ£o"]), atol=1e-6)
        refused = run("us/naflex", **environment)
        assert refused["code"] == "no_two_towers" and re.search("us/naflex.*'siglip2'.*NaFlex", refused["error"])
    assert len([path for path in (tmp_path / "home").rglob("*") if path.name == "model.safetensors"]) == 1


# --- The Hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_of_the_hub_is_downloaded_once(tiny_folder, tmp_path):
    expected = resolve_search_model(str(tiny_folder))
    with HubServer(tmp_path / "hub") as hub:
        hub.store("us/model", tiny_folder)
        environment = hub.environment(tmp_path / "home", token=None) | {"CAPIVARA_CACHE": str(tmp_path / "cache")}
        found = run("us/model", **environment)
        assert (found["name"], found["source"], found["digest"]) == ("us/model", "us/model", expected.image_digest)
        np.testing.assert_allclose(found["texts"], expected.embed_texts(["um gato", "SÃ£o JoÃ£o"]), atol=1e-6)
        assert found["heavy"] == []  # downloaded without torch, too
        requests = len(hub.requests)
        again = run("us/model", **environment)
        assert len(hub.requests) == requests and again == {**found, "heavy": []}
        Path(found["folder"], "model.safetensors").unlink()  # as after a killed download
        assert Path(run("us/model", **environment)["folder"], "model.safetensors").is_file()
        hub.store(DEFAULT_MODEL, tiny_folder)
        assert run(**environment)["name"] == DEFAULT_MODEL, "the default model"
        missing = run("us/none", **environment)
        assert missing["code"] == "no_model_on_hub" and "us/none" in missing["error"]
    assert run("us/model", **environment) == again  # from the cache, without the Hub
    assert run(**{**environment, "HF_HUB_OFFLINE": "1"})["name"] == DEFAULT_MODEL
    offline = run("us/none", **environment)
    assert offline["code"] == "no_hub" and offline["seconds"] < 30


@pytest.mark.slow
def test_without_the_hub_the_default_model_is_the_miniature(tmp_path):
    found = run(HF_HOME=str(tmp_path / "home"), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")  # no server
    assert found["name"] == found["source"] == "miniature"
    assert found["notice"] == [Messages(language)("miniature") for language in ("en", "pt")]
    assert all("--model hiaac-nlp/CAPIVARA" in notice for notice in found["notice"])


# --- The digest of the image encoder ----------------------------------------------------------------------------------


def change_section(folder: Path, file: str, name: str, **fields) -> None:
    change(folder / file, **{name: json.loads((folder / file).read_text())[name] | fields})


VISION, PROCESSOR = ("config.json", "vision_config"), ("processor_config.json", "image_processor")
SAME_DIGEST = {  # changes that do not affect image embeddings
    **{
        name: lambda f, name=name: change_weights(f, name)
        for name in ("text_model.", "text_projection.", "logit_scale")
    },
    "copy": lambda f: None,
    "version": lambda f: change(f / "config.json", transformers_version="9.9"),
    "dropout": lambda f: change_section(f, *VISION, attention_dropout=0.1, dtype="bfloat16", initializer_range=1.0),
    "limit": lambda f: change_section(f, *PROCESSOR, max_resized_pixels=10_000_000),
    "numbers": lambda f: change_section(f, *PROCESSOR, size=32, crop_size=32),
}
OTHER_DIGEST = {  # changes that affect image embeddings
    **{name: lambda f, name=name: change_weights(f, name) for name in ("vision_model.", "visual_projection.")},
    "activation": lambda f: change_section(f, *VISION, hidden_act="quick_gelu"),
    "heads": lambda f: change_section(f, *VISION, num_attention_heads=2),
    "mean": lambda f: change_section(f, *PROCESSOR, image_mean=[0.5, 0.5, 0.5]),
    "crop": lambda f: change_section(f, *PROCESSOR, crop_size={"height": 32, "width": 31}),
    "resample": lambda f: change_section(f, *PROCESSOR, resample=2),
}


def test_models_with_the_same_image_encoder_have_the_same_digest(tiny_folder, cache, tmp_path):
    digest, digests_by_change = resolve_search_model(str(tiny_folder)).image_digest, {}
    for name, alter in (SAME_DIGEST | OTHER_DIGEST).items():
        alter(shutil.copytree(tiny_folder, tmp_path / name))
        digests_by_change[name] = resolve_search_model(str(tmp_path / name)).image_digest
    assert len(digest) == 32
    assert {name for name, changed in digests_by_change.items() if changed == digest} == SAME_DIGEST.keys()
    assert len(set(digests_by_change.values())) == 1 + len(OTHER_DIGEST)


def test_the_digest_is_computed_once(tiny_folder, cache, monkeypatch):
    digest = resolve_search_model(str(tiny_folder)).image_digest
    (cached,) = (cache / "image_digests").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_compute_weights_digest", lambda paths: pytest.fail("the weights were read again"))
        assert resolve_search_model(str(tiny_folder)).image_digest == digest
    with monkeypatch.context() as patch:
        # Not a folder: the digest is computed without the cache.
        patch.setenv("CAPIVARA_CACHE", str(tiny_folder / "config.json"))
        assert resolve_search_model(str(tiny_folder)).image_digest == digest
    cached.write_text('{"weights": "damaged"}')
    assert resolve_search_model(str(tiny_folder)).image_digest == digest and "damaged" not in cached.read_text()
    change_weights(tiny_folder, "vision_model.")  # the file keeps its size
    os.utime(tiny_folder / "model.safetensors", ns=(time.time_ns(), time.time_ns()))
    assert resolve_search_model(str(tiny_folder)).image_digest != digest
    assert len(list((cache / "image_digests").iterdir())) == 2


def test_another_file_of_the_same_size_and_date_has_its_own_digest(tiny_folder, cache, tmp_path):
    folder, other = (shutil.copytree(tiny_folder, tmp_path / name) for name in ("folder", "other"))
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["visual_projection.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for path in (folder, other):
        os.utime(path / "model.safetensors", (1e9, 1e9))  # as in reproducible archives
    assert len({path.stat().st_size for path in tmp_path.glob("*/model.safetensors")}) == 1
    before = digests.image_encoder_digest(folder)
    shutil.copy2(other / "model.safetensors", folder / "model.safetensors")
    assert digests.image_encoder_digest(folder) != before
