"""Export for Immich: a reader of Immich's file layout gets the embeddings of the model."""

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
from tiny import TINY_TEXT, randomize, tiny_config
from towers import TOWER, gemma_like, other_texts, siglip2
from transformers import SiglipConfig

from benchmarks.timing import make_captions
from capivara_common.model_kinds import KINDS
from capivara_search.miniature_encoders import IMAGE_MEAN, IMAGE_STD, load_image_encoder, load_tokenizer
from hub_upload.export import export_model
from hub_upload.formats.immich import find_immich_name
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

FILES = {
    *("config.json", "textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json"),
    *("visual/model.onnx", "visual/preprocess_cfg.json"),
}
REPAIRED = ("mojibake", "entities of HTML")  # texts that the model repairs and Immich does not


def files(folder: Path) -> set[str]:
    """Return the relative paths of all files in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_commands_in_the_docs_keep_the_original_if_they_are_repeated(tmp_path):
    page = (Path(__file__).parents[1] / "docs/how-to/immich.md").read_text(encoding="utf-8")
    replace_model, replace_settings = re.findall(r"sh -c '(.+)'", page)
    (restore,) = re.findall(r"\*\*Para voltar atrás\*\*: `(.+?)`", page)
    (tmp_path / "textual").mkdir()
    (tmp_path / "textual/model.onnx").write_text("the base's")
    for new in ("first", "second"):
        (tmp_path / "novo").mkdir()
        (tmp_path / "novo/model.onnx").write_text(new)
        subprocess.run(["sh", "-c", replace_model], cwd=tmp_path, check=True)
        assert files(tmp_path) == {"original/model.onnx", "textual/model.onnx"}
        assert (tmp_path / "textual/model.onnx").read_text() == new
    subprocess.run(["sh", "-c", restore], cwd=tmp_path, check=True)
    assert files(tmp_path) == {"textual/model.onnx"}
    assert (tmp_path / "textual/model.onnx").read_text() == "the base's"
    (tmp_path / "config.json").write_text("the base's")
    for new in ("first", "second"):
        (tmp_path / "novo.json").write_text(new)
        subprocess.run(["sh", "-c", replace_settings], cwd=tmp_path, check=True)
        contents = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
        assert contents == {"config.json": new, "original.json": "the base's"}


@pytest.mark.parametrize(
    ("vocab_size", "trimmed_of", "vision", "name"),
    [
        (250_002, None, (768, 32, 224), "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k"),
        (250_002, None, (1280, 14, 224), "XLM-Roberta-Large-ViT-H-14__frozen_laion5b_s13b_b90k"),
        (256_000, None, (768, 16, 224), "ViT-B-16-SigLIP2__webli"),
        (51_759, 256_000, (1152, 14, 384), "ViT-SO400M-14-SigLIP2-378__webli"),
        (256_000, None, (1536, 16, 384), "ViT-gopt-16-SigLIP2-384__webli"),
        (256_000, None, (768, 16, 384), None),  # open_clip has this model, but Immich's list does not
        (32_000, None, (768, 16, 224), None),  # the first SigLIP
    ],
)
def test_the_name_in_immichs_list_follows_from_the_architecture(vocab_size, trimmed_of, vision, name):
    text = {"vocab_size": vocab_size}
    sizes = dict(zip(("hidden_size", "patch_size", "image_size"), vision, strict=True))
    config = SiglipConfig(text_config=text, vision_config=sizes)
    if trimmed_of:
        config.trimmed_vocabulary = {"of": trimmed_of}
    assert find_immich_name(config) == name


def test_the_default_names_are_those_of_the_published_sizes():
    for model_type, config in (
        ("capivara", CapivaraConfig()),
        ("siglip", SiglipConfig(text_config={"vocab_size": 256_000})),
    ):
        assert find_immich_name(config) == KINDS[model_type].immich_name


# --- The export ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[kind.model_type for kind in KINDS.values() if kind.immich_name])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory):
    """Folder of a model.

    CAPIVARA: a narrow text tower with the real vocabulary, and a real image tower with a random projection.
    SigLIP: narrow towers; the folder `base` next to it has a model with another text encoder.
    """
    folder = tmp_path_factory.mktemp("source") / "model"
    if kind == "siglip":
        tokenizer = gemma_like([*ODD_TEXTS.values(), *make_captions(500)], 600)
        text = TOWER | {"vocab_size": len(tokenizer), "pad_token_id": 0, "projection_size": 64}
        vision = TOWER | {"hidden_size": 64, "image_size": 224, "patch_size": 16}
        siglip2(folder.with_name("base"), tokenizer, SiglipConfig(text_config=text, vision_config=vision))
        return other_texts(folder.with_name("base"), folder)
    vision, text = load_image_encoder(), {**TINY_TEXT, "vocab_size": 250_002}
    model = randomize(CapivaraModel(tiny_config(vision_config=vision.config, text_config=text, projection_dim=64)))
    model.vision_model.load_state_dict(vision.state_dict())
    model.save_pretrained(folder)
    pixels = CapivaraImageProcessor(image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD))
    CapivaraProcessor(pixels, load_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(kind, source, tmp_path_factory):
    """An exported folder, a reader of it, and the embedding of an image before the text encoder was replaced.

    CAPIVARA: the whole model. SigLIP: an export of the base in which the text encoder is replaced by the model's.
    If IMMICH_CACHE names the model cache of an Immich service, the export is written there. If IMMICH_URL names the
    service, it computes the embeddings. Otherwise, `LayoutReader` does.
    """
    cache, url = os.environ.get("IMMICH_CACHE"), os.environ.get("IMMICH_URL")
    folder = (Path(cache) / "clip" if cache else tmp_path_factory.mktemp("immich")) / KINDS[kind].immich_name

    def open_reader() -> LayoutReader:
        return ServiceReader(folder, url) if url else LayoutReader(folder)

    if kind == "capivara":
        export_model(source, folder, ["immich"])
        return folder, open_reader(), None
    export_model(source.with_name("base"), folder, ["immich"])
    settings = json.loads((folder / "config.json").read_text())
    settings["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}  # as in Immich's own export
    (folder / "config.json").write_text(json.dumps(settings))
    visual, before = (folder / "visual/model.onnx").read_bytes(), open_reader().picture(pictures()[0])
    export_model(source, folder.parent / "new", ["immich"], base=str(source.with_name("base")))
    assert files(folder.parent / "new") == {name for name in FILES if not name.startswith("visual/")}
    shutil.copytree(folder.parent / "new", folder, dirs_exist_ok=True)
    assert (folder / "visual/model.onnx").read_bytes() == visual
    return folder, open_reader(), before


@pytest.fixture(scope="module")
def loaded(source):
    """The model and its processor."""
    return load_model(source).eval(), load_processor(source)


@pytest.mark.slow
def test_texts_have_the_embeddings_of_the_model(kind, loaded, exported):
    (model, processor), (_, reader, _) = loaded, exported
    texts = make_captions(200)
    assert len(set(texts)) == 200
    texts += [text for name, text in ODD_TEXTS.items() if name not in REPAIRED]
    texts += [""] * (not isinstance(reader, ServiceReader))  # the service refuses empty texts (3.1)
    theirs = np.stack([reader.text(text) for text in texts])
    if kind == "siglip":  # Immich collapses white space, SigLIP's tokenizer does not
        texts = [" ".join(text.split()) for text in texts]
    ours = embed_texts(model, processor, texts).numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert np.ptp(ours, axis=0).max() > 0.05, "equal embeddings prove nothing"


@pytest.mark.slow
def test_immich_reads_damaged_texts_without_repair(kind, loaded, exported):
    """docs/how-to/immich.md states this limitation."""
    (_, processor), (_, reader, _) = loaded, exported
    for name, text in ODD_TEXTS.items():
        text = text if kind == "capivara" else " ".join(text.split())
        ids = processor(text=text, padding="max_length", truncation=True)["input_ids"]
        assert (reader.ids(text) == ids) == (kind == "siglip" or name not in REPAIRED), name


@pytest.mark.slow
def test_the_folder_has_the_files_and_settings_that_immich_reads(kind, exported):
    folder, resize_mode = exported[0], {"capivara": "shortest", "siglip": "squash"}[kind]
    length = {"capivara": 77, "siglip": 64}[kind]
    assert files(folder) == FILES
    assert json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"] == length
    assert json.loads((folder / "textual/tokenizer_config.json").read_text()) == {"pad_token": "<pad>"}
    settings = json.loads((folder / "visual/preprocess_cfg.json").read_text())
    assert (settings["size"], settings["resize_mode"], settings["interpolation"]) == (
        [224, 224],
        resize_mode,
        "bicubic",
    )
    for name, shape in {"textual": [1, length], "visual": [1, 3, 224, 224]}.items():
        model = onnx.load(folder / name / "model.onnx", load_external_data=False)
        assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == shape
        assert [node.name for node in model.graph.input] == [{"textual": "text", "visual": "image"}[name]]
        assert not [tensor for tensor in model.graph.initializer if tensor.external_data]
        assert not [node for node in model.graph.node if node.metadata_props or node.doc_string]
        assert [node.name for node in model.graph.output] == [
            {"textual": "text_embeds", "visual": "image_embeds"}[name]
        ]


@pytest.mark.slow
def test_images_have_the_embeddings_of_the_model(kind, loaded, exported):
    """For some image shapes, Immich crops one pixel beside open_clip, so the embeddings are less similar."""
    (model, processor), (_, reader, before), images = loaded, exported, pictures()[:32]
    ours = embed_images(model, processor, [image.convert("RGB") for image in images]).numpy()
    theirs = np.stack([reader.picture(image) for image in images])
    cosines, beside = (ours * theirs).sum(axis=1), np.array([is_cropped_beside(image) for image in images])
    if kind == "siglip":  # SigLIP squashes images; the Immich service crops them and ignores preprocess_cfg.json (3.1)
        assert before.tobytes() == theirs[0].tobytes(), "the image embeddings of the base have changed"
        beside[:] = [isinstance(reader, ServiceReader) and image.width != image.height for image in images]
    else:
        assert 3 <= beside.sum() < 16 and 0.95 < cosines[beside].min() < 1 - 1e-5
    assert cosines[~beside].min() > 1 - 1e-3
    others = (ours @ ours.T)[~np.eye(len(ours), dtype=bool)]
    assert np.median(others) < 0.95, "equal embeddings prove nothing"
