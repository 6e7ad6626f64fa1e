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
from safetensors.torch import load_file, save_file
from tiny import TINY_TEXT, randomise, tiny_config

from benchmarks.train_step import benchmark_captions
from capivara_common import environment
from capivara_search.miniature_encoders import IMAGE_MEAN, IMAGE_STD, load_image_encoder, load_tokenizer
from hub_upload.export import ExportArguments, export_alone, main
from hub_upload.formats.immich import BASE_NAME
from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.embedder import embed_images, embed_texts
from modeling_capivara.loading import load_model, load_processor

FILES = {
    *("config.json", "textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json"),
    *("visual/model.onnx", "visual/preprocess_cfg.json"),
}
REPAIRED = ("mojibake", "entities of HTML")  # what Immich, which knows no text repair, reads as it stands


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_pages_exchange_keeps_the_original_when_it_is_repeated(tmp_path):
    page = (Path(__file__).parents[1] / "docs/immich.md").read_text(encoding="utf-8")
    (there,) = re.findall(r"sh -c '(.+)'", page)
    (back,) = re.findall(r"\*\*Para voltar atrás\*\*: `(.+?)`", page)
    (tmp_path / "textual").mkdir()
    (tmp_path / "textual/model.onnx").write_text("the base's")
    for _ in range(2):
        for new in ("first", "second", "third"):
            (tmp_path / "novo").mkdir()
            (tmp_path / "novo/model.onnx").write_text(new)
            subprocess.run(["sh", "-c", there], cwd=tmp_path, check=True)
            assert files(tmp_path) == {"original/model.onnx", "textual/model.onnx"}
            assert (tmp_path / "textual/model.onnx").read_text() == new
        subprocess.run(["sh", "-c", back], cwd=tmp_path, check=True)
        assert files(tmp_path) == {"textual/model.onnx"}
        assert (tmp_path / "textual/model.onnx").read_text() == "the base's"


# --- The export -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A narrow text tower with the real vocabulary, and a real image tower, whose projection alone is random."""
    folder = tmp_path_factory.mktemp("source") / "model"
    vision, text = load_image_encoder(), {**TINY_TEXT, "vocab_size": 250_002}
    model = randomise(CapivaraModel(tiny_config(vision_config=vision.config, text_config=text, projection_dim=64)))
    model.vision_model.load_state_dict(vision.state_dict())
    model.save_pretrained(folder)
    pixels = CapivaraImageProcessor(image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD))
    CapivaraProcessor(pixels, load_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """In the cache of a service of Immich, where IMMICH_CACHE names one."""
    cache = os.environ.get("IMMICH_CACHE")
    folder = Path(cache) / "clip" / BASE_NAME if cache else tmp_path_factory.mktemp("immich") / "capivara"
    export_alone(ExportArguments(source, folder, formats="immich"))
    return folder


@pytest.fixture(scope="module")
def reader(exported):
    """Of the layout as published; or Immich's own service, where IMMICH_URL has one that reads IMMICH_CACHE."""
    url = os.environ.get("IMMICH_URL")
    return ServiceReader(url, exported) if url else LayoutReader(exported)


@pytest.fixture(scope="module")
def own(source):
    """The model and its processor."""
    return load_model(source).eval(), load_processor(source)


@pytest.mark.slow
def test_two_hundred_sentences_embed_as_the_models_own(own, reader):
    model, processor = own
    texts = benchmark_captions(200, processor.tokenizer)
    assert len(set(texts)) == 200
    texts += ["", *(text for name, text in ODD_TEXTS.items() if name not in REPAIRED)]
    ours, theirs = embed_texts(model, processor, texts).numpy(), np.stack([reader.text(text) for text in texts])
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert np.ptp(ours, axis=0).max() > 0.05, "a model that embeds all alike would prove nothing"


@pytest.mark.slow
def test_texts_of_broken_files_are_read_as_they_stand(own, reader):
    """What docs/immich.md says of the text repair."""
    _, processor = own
    for name, text in ODD_TEXTS.items():
        own = processor(text=text, padding="max_length")["input_ids"]
        assert (reader.ids(text) == own) == (name not in REPAIRED), name


@pytest.mark.slow
def test_files_are_immichs_and_whole(exported):
    assert files(exported) == FILES
    assert json.loads((exported / "config.json").read_text())["text_cfg"]["context_length"] == 77
    assert json.loads((exported / "textual/tokenizer_config.json").read_text()) == {"pad_token": "<pad>"}
    settings = json.loads((exported / "visual/preprocess_cfg.json").read_text())
    assert (settings["size"], settings["resize_mode"], settings["interpolation"]) == ([224, 224], "shortest", "bicubic")
    for name, shape in {"textual": [1, 77], "visual": [1, 3, 224, 224]}.items():
        model = onnx.load(exported / name / "model.onnx", load_external_data=False)
        assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == shape
        assert not [one for one in model.graph.initializer if one.external_data]
        assert not [node for node in model.graph.node if node.metadata_props or node.doc_string]
        assert [one.name for one in model.graph.output] == [{"textual": "text_embeds", "visual": "image_embeds"}[name]]


def test_the_text_side_alone_where_the_image_side_is_the_bases(tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    text = "text_model.encoder.layer.0.output.dense.weight"
    save_file({**weights, text: weights[text] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model", str(tiny_folder), "--formats", "immich", "--textual_only", "--base", str(base)]
    main([*flags, "--output", str(tmp_path / "alone")])
    assert files(tmp_path / "alone") == {name for name in FILES if name.startswith("textual/")}
    pixels = "visual_projection.weight"
    save_file({**weights, pixels: weights[pixels] + 1e-3}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"embeds pictures otherwise than .*by both towers of this model"):
        main([*flags, "--output", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--textual_only"], "textual_only is of --formats immich, got --formats transformers"),
        (["--formats", "immich", "--textual_only"], "--base.*which need it; got --base None with --formats immich"),
        (["--formats", "immich,onnx"], "immich is a folder of its own"),
        (["--formats", "immich", "--base", "BASE"], "is for --formats drop_in and for --textual_only"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        main(["--model", str(tmp_path), "--output", str(tmp_path / "made"), *flags])
    assert not (tmp_path / "made").exists()


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_installed", lambda module: module != "onnxscript")
    with pytest.raises(SystemExit, match=r"immich in --formats needs onnxscript, .*\[onnx\]"):
        main(["--model", str(tmp_path / "no"), "--output", str(tmp_path / "made"), "--formats", "immich"])
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_pictures_of_a_real_tower_by_immichs_own_steps(own, reader):
    """Where Immich crops as open_clip does; of some shapes it takes the pixel beside, which its own base sees, too."""
    (model, processor), images = own, pictures()[:32]
    ours = embed_images(model, processor, images).numpy()
    theirs = np.stack([reader.picture(image) for image in images])
    beside = np.array([is_cropped_beside(image) for image in images])
    cosines = (ours * theirs).sum(axis=1)
    assert 3 <= beside.sum() < 16
    assert cosines[~beside].min() > 1 - 1e-3
    assert 0.95 < cosines[beside].min() < 1 - 1e-5
    others = (ours @ ours.T)[~np.eye(len(ours), dtype=bool)]
    assert np.median(others) < 0.9, "pictures that are all alike would prove nothing"
