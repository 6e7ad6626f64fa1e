"""Immich's folder: the model's numbers by a reader of the published layout."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from immich_reader import ODD_TEXTS, LayoutReader, ServiceReader, is_cropped_beside, pictures
from tiny import TINY_TEXT, randomise, tiny_config
from towers import TOWER, gemma_like, other_texts, siglip2
from transformers import SiglipConfig

from benchmarks.timing import make_captions
from capivara_search.miniature_encoders import IMAGE_MEAN, IMAGE_STD, load_image_encoder, load_tokenizer
from hub_upload.export import export_model
from hub_upload.formats.immich import IMMICH_MODEL_NAMES
from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

FILES = {
    *("config.json", "textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json"),
    *("visual/model.onnx", "visual/preprocess_cfg.json"),
}
REPAIRED = ("mojibake", "entities of HTML")  # what Immich, which knows no text repair, reads as it stands


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_pages_exchange_keeps_the_original_when_it_is_repeated(tmp_path):
    page = (Path(__file__).parents[1] / "docs/immich.md").read_text(encoding="utf-8")
    there, settings = re.findall(r"sh -c '(.+)'", page)
    (back,) = re.findall(r"\*\*Para voltar atrás\*\*: `(.+?)`", page)
    (tmp_path / "textual").mkdir()
    (tmp_path / "textual/model.onnx").write_text("the base's")
    for new in ("first", "second"):
        (tmp_path / "novo").mkdir()
        (tmp_path / "novo/model.onnx").write_text(new)
        subprocess.run(["sh", "-c", there], cwd=tmp_path, check=True)
        assert files(tmp_path) == {"original/model.onnx", "textual/model.onnx"}
        assert (tmp_path / "textual/model.onnx").read_text() == new
    subprocess.run(["sh", "-c", back], cwd=tmp_path, check=True)
    assert files(tmp_path) == {"textual/model.onnx"}
    assert (tmp_path / "textual/model.onnx").read_text() == "the base's"
    (tmp_path / "config.json").write_text("the base's")
    for new in ("first", "second"):
        (tmp_path / "novo.json").write_text(new)
        subprocess.run(["sh", "-c", settings], cwd=tmp_path, check=True)
        found = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
        assert found == {"config.json": new, "original.json": "the base's"}


# --- The export -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=IMMICH_MODEL_NAMES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory):
    """A model. CAPIVARA's: a narrow text tower with the real vocabulary, and a real image tower, whose projection alone
    is random. SigLIP's: narrow towers, and beside it, in `base`, one with another text side."""
    folder = tmp_path_factory.mktemp("source") / "model"
    if kind == "siglip":
        tokenizer = gemma_like([*ODD_TEXTS.values(), *make_captions(500)], 600)
        text = TOWER | {"vocab_size": len(tokenizer), "pad_token_id": 0, "projection_size": 64}
        vision = TOWER | {"hidden_size": 64, "image_size": 224, "patch_size": 16}
        siglip2(folder.with_name("base"), tokenizer, SiglipConfig(text_config=text, vision_config=vision))
        return other_texts(folder.with_name("base"), folder)
    vision, text = load_image_encoder(), {**TINY_TEXT, "vocab_size": 250_002}
    model = randomise(CapivaraModel(tiny_config(vision_config=vision.config, text_config=text, projection_dim=64)))
    model.vision_model.load_state_dict(vision.state_dict())
    model.save_pretrained(folder)
    pixels = CapivaraImageProcessor(image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD))
    CapivaraProcessor(pixels, load_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(kind, source, tmp_path_factory):
    """CAPIVARA's whole; of SigLIP the base's with the text side exchanged, and a picture's vector from before.

    In the cache of a service of Immich, where IMMICH_CACHE names one; it is asked by its own requests where IMMICH_URL
    has it. Else it is read by the layout as published.
    """
    cache, url = os.environ.get("IMMICH_CACHE"), os.environ.get("IMMICH_URL")
    folder = (Path(cache) / "clip" if cache else tmp_path_factory.mktemp("immich")) / IMMICH_MODEL_NAMES[kind]
    read = (lambda: ServiceReader(folder, url)) if url else lambda: LayoutReader(folder)
    if kind == "capivara":
        export_model(source, folder, ["immich"])
        return folder, read(), None
    export_model(source.with_name("base"), folder, ["immich"])
    settings = json.loads((folder / "config.json").read_text())
    settings["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}  # as Immich's own has it
    (folder / "config.json").write_text(json.dumps(settings))
    visual, before = (folder / "visual/model.onnx").read_bytes(), read().picture(pictures()[0])
    export_model(source, folder.parent / "new", ["immich"], base=str(source.with_name("base")))
    assert files(folder.parent / "new") == {name for name in FILES if not name.startswith("visual/")}
    shutil.copytree(folder.parent / "new", folder, dirs_exist_ok=True)
    assert (folder / "visual/model.onnx").read_bytes() == visual
    return folder, read(), before


@pytest.fixture(scope="module")
def own(source):
    """The model and its processor."""
    return load_model(source).eval(), load_processor(source)


@pytest.mark.slow
def test_two_hundred_sentences_embed_as_the_models_own(kind, own, exported):
    (model, processor), (_, reader, _) = own, exported
    texts = make_captions(200)
    assert len(set(texts)) == 200
    texts += [text for name, text in ODD_TEXTS.items() if name not in REPAIRED]
    texts += [""] * (not isinstance(reader, ServiceReader))  # which refuses it (3.1)
    theirs = np.stack([reader.text(text) for text in texts])
    if kind == "siglip":  # whose tokenizer takes white space as it is
        texts = [" ".join(text.split()) for text in texts]
    ours = embed_texts(model, processor, texts).numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert np.ptp(ours, axis=0).max() > 0.05, "a model that embeds all alike would prove nothing"


@pytest.mark.slow
def test_texts_of_broken_files_are_read_as_they_stand(kind, own, exported):
    """What docs/immich.md says of the text repair."""
    (_, processor), (_, reader, _) = own, exported
    for name, text in ODD_TEXTS.items():
        text = text if kind == "capivara" else " ".join(text.split())
        ids = processor(text=text, padding="max_length", truncation=True)["input_ids"]
        assert (reader.ids(text) == ids) == (kind == "siglip" or name not in REPAIRED), name


@pytest.mark.slow
def test_files_are_immichs_and_whole(kind, exported):
    folder, side = exported[0], {"capivara": "shortest", "siglip": "squash"}[kind]
    length = {"capivara": 77, "siglip": 64}[kind]
    assert files(folder) == FILES
    assert json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"] == length
    assert json.loads((folder / "textual/tokenizer_config.json").read_text()) == {"pad_token": "<pad>"}
    settings = json.loads((folder / "visual/preprocess_cfg.json").read_text())
    assert (settings["size"], settings["resize_mode"], settings["interpolation"]) == ([224, 224], side, "bicubic")
    for name, shape in {"textual": [1, length], "visual": [1, 3, 224, 224]}.items():
        model = onnx.load(folder / name / "model.onnx", load_external_data=False)
        assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == shape
        assert [one.name for one in model.graph.input] == [{"textual": "text", "visual": "image"}[name]]
        assert not [one for one in model.graph.initializer if one.external_data]
        assert not [node for node in model.graph.node if node.metadata_props or node.doc_string]
        assert [one.name for one in model.graph.output] == [{"textual": "text_embeds", "visual": "image_embeds"}[name]]


@pytest.mark.slow
def test_pictures_by_immichs_own_steps(kind, own, exported):
    """Where Immich crops as open_clip does; of some shapes it takes the pixel beside, which its own base sees, too."""
    (model, processor), (_, reader, before), images = own, exported, pictures()[:32]
    ours = embed_images(model, processor, [image.convert("RGB") for image in images]).numpy()
    theirs = np.stack([reader.picture(image) for image in images])
    cosines, beside = (ours * theirs).sum(axis=1), np.array([is_cropped_beside(image) for image in images])
    if kind == "siglip":  # which squashes them; Immich itself crops them, whatever preprocess_cfg.json says (3.1)
        assert before.tobytes() == theirs[0].tobytes(), "the vectors that a library has stay"
        beside[:] = [isinstance(reader, ServiceReader) and image.width != image.height for image in images]
    else:
        assert 3 <= beside.sum() < 16 and 0.95 < cosines[beside].min() < 1 - 1e-5
    assert cosines[~beside].min() > 1 - 1e-3
    others = (ours @ ours.T)[~np.eye(len(ours), dtype=bool)]
    assert np.median(others) < 0.95, "pictures that are all alike would prove nothing"
