"""Batching must not change an embedding, nor its place."""

import contextlib
import json

import pytest
import torch
from PIL import Image
from towers import MAKERS, as_published, gemma_like, siglip2
from transformers import AutoModel, AutoProcessor

from capivara_search.text_tower import load_text_tower
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import (
    IMAGE_ENCODER_PREFIXES,
    compute_image_embeds,
    embed_images,
    embed_texts,
    embedding_width,
    freeze_image_encoder,
    load_embedder,
    tokenize,
)

TEXTS = ["uma foto de uma capivara azul", "gato", "a casa verde", "são joão", "pão"]


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_batches(tiny_model, tiny_processor, batch_size):
    images = [Image.new("RGB", (40 + i, 33), (50 * i, 20, 200 - 40 * i)) for i in range(5)]
    one_by_one = [tiny_model(**tiny_processor(text=[text], return_tensors="pt")).text_embeds for text in TEXTS]
    expected = torch.cat(one_by_one).detach()
    torch.testing.assert_close(embed_texts(tiny_model, tiny_processor, TEXTS, batch_size), expected)
    expected = tiny_model(**tiny_processor(images=images, return_tensors="pt")).image_embeds.detach()
    torch.testing.assert_close(embed_images(tiny_model, tiny_processor, iter(images), batch_size), expected)


@pytest.fixture(params=["capivara", *MAKERS])
def kind_folder(request, tiny_folder, tmp_path):
    """A folder of each kind of model that is taken."""
    if request.param == "capivara":
        return tiny_folder
    MAKERS[request.param](tmp_path / "model")
    return tmp_path / "model"


def test_a_text_is_embedded_alone_as_beside_a_longer_one(kind_folder):
    embedder = load_embedder(str(kind_folder), "cpu")
    longer = " ".join(["uma foto de um gato azul na casa verde"] * 9)
    alone, both = embedder.embed_texts(["um gato"]), embedder.embed_texts(["um gato", longer])
    torch.testing.assert_close(alone[0], both[0], rtol=0, atol=1e-5)
    assert alone[0] @ both[1] < 0.999


def test_a_processor_of_another_model_is_one_line(tmp_path):
    """Before it: figures that mean nothing, or an error from the middle of a tower."""
    for kind in ("siglip", "clip"):
        MAKERS[kind](tmp_path / kind)
    siglip = load_processor(tmp_path / "siglip")
    siglip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="a SiglipProcessor is none of the model's kind, 'clip'"):
        load_processor(tmp_path / "clip")
    faults = {48: r"its images have .*48.*, the image tower takes 32 x 32 pixels", 32: r"its tokenizer has \d+ tokens"}
    for side, message in faults.items():
        siglip.image_processor.size = {"height": side, "width": side}
        siglip.save_pretrained(tmp_path / "siglip")
        with pytest.raises(ValueError, match=message):
            load_processor(tmp_path / "siglip")
        siglip.tokenizer.add_tokens([f"<{number}>" for number in range(300)])


def test_scores_are_those_of_the_models_own_forward(kind_folder):
    """Of transformers' own class, called as its documentation calls it."""
    model, processor = AutoModel.from_pretrained(kind_folder).eval(), AutoProcessor.from_pretrained(kind_folder)
    texts, images = ["um gato", "a casa azul e o carro"], [Image.new("RGB", (40, 33), c) for c in ("red", "blue")]
    padding = {"padding": "max_length", "max_length": 64} if "Siglip" in type(processor).__name__ else {"padding": True}
    inputs = processor(text=texts, images=images, return_tensors="pt", **padding)
    with torch.no_grad():
        expected = model(**inputs)
    embedder = load_embedder(str(kind_folder), "cpu")
    found = embedder.embed_texts(texts), embedder.embed_images(images)
    for side, right in zip(found, (expected.text_embeds, expected.image_embeds), strict=True):
        torch.testing.assert_close(side, right, rtol=0, atol=1e-5)
    assert embedding_width(model.config) == found[0].shape[1]


def test_the_image_side_is_what_images_depend_on(kind_folder):
    """Every parameter outside of it may change, and no image's embedding does."""
    model, pixels = load_model(kind_folder).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = compute_image_embeds(model, pixels)
        for name, parameter in model.named_parameters():
            parameter.add_(0 if name.startswith(IMAGE_ENCODER_PREFIXES) else 1)
        assert torch.equal(compute_image_embeds(model, pixels), before)
    freeze_image_encoder(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith(IMAGE_ENCODER_PREFIXES)
    }


@pytest.mark.parametrize("published", [False, True])
def test_the_canonical_form_of_a_text_is_the_tokenizers(published, tmp_path):
    """SigLIP 2's: small letters, punctuation kept. In training, evaluation, search, and by transformers once saved."""
    base, saved, texts = tmp_path / "base", tmp_path / "saved", ["Um GATO, azul!", "um gato, azul!", "um gato azul"]
    siglip2(base, gemma_like(TEXTS * 3, 400))
    if published:
        as_published(base)
    load_model(base).save_pretrained(saved)
    load_processor(base).save_pretrained(saved)
    of_training = [row["input_ids"] for row in tokenize(load_processor(base), texts)]
    alone = AutoProcessor.from_pretrained(saved)(text=texts, padding="max_length", max_length=64).input_ids
    assert of_training == alone and alone[0] == alone[1] != alone[2]
    for folder in (base, saved):
        found = load_embedder(str(folder), "cpu").embed_texts(texts)
        torch.testing.assert_close(torch.from_numpy(load_text_tower(folder).embed(texts)), found, rtol=0, atol=1e-5)
        assert torch.equal(found[0], found[1]) and not torch.allclose(found[1], found[2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [("siglip2", "NaFlex"), ("bert", "'bert'; taken are capivara"), ("flava", "siglip .SigLIP and")],
)
def test_another_kind_of_model_is_one_line(kind, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_embedder(str(tmp_path), "cpu")


OPEN_CLIP = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"layers": 10**9}, "text_cfg": {}}}


def test_a_clip_whose_config_can_not_be_is_one_line(tmp_path):
    MAKERS["clip"](tmp_path / "clip")
    path = tmp_path / "clip" / "config.json"
    config = json.loads(path.read_text())
    for name, value in {"num_attention_heads": 0, "num_hidden_layers": 10**9, "vocab_size": "x"}.items():
        path.write_text(json.dumps(config | {"text_config": config["text_config"] | {name: value}}))
        with pytest.raises(ValueError, match=rf"^The config.json of [^\n]*{name}[^\n]*$"):
            load_embedder(str(tmp_path / "clip"), "cpu")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    with pytest.raises(ValueError, match=r"^open_clip[^\n]*: model_cfg\.vision_cfg\.layers must be from 0 to[^\n]*$"):
        load_embedder(f"open_clip:local-dir:{tmp_path}", "cpu", baseline=True)


TOKENIZERS = [  # an exception, and a panic of Rust
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
]


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_a_tokenizer_that_can_not_be_is_one_line(tmp_path, fault):
    MAKERS["siglip"](tmp_path / "clip")
    path = tmp_path / "clip" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fault))
    with pytest.raises(ValueError, match=r"^The processor of [^\n]*its tokenizer can't be used: [^\n]*$"):
        load_embedder(str(tmp_path / "clip"), "cpu")


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_code_that_a_folder_brings_is_never_run_nor_asked_about(tmp_path, name, monkeypatch):
    """A config.json of an unknown kind, or a processor, that names a Python file beside it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    MAKERS["siglip"](tmp_path / "evil")
    ran, path = tmp_path / "ran", tmp_path / "evil" / name
    for module in ("configuration_evil", "processing_evil"):
        (tmp_path / "evil" / f"{module}.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    kind, change = ("AutoConfig", {"model_type": "evil"}) if name == "config.json" else ("AutoProcessor", {})
    module = "configuration_evil" if name == "config.json" else "processing_evil"
    content = json.loads(path.read_text()) | change | {"auto_map": {kind: f"{module}.Evil"}}
    path.write_text(json.dumps(content | ({"processor_class": "Evil"} if kind == "AutoProcessor" else {})))
    with contextlib.suppress(ValueError):  # where transformers has a class of its own for it, that is taken
        load_embedder(str(tmp_path / "evil"), "cpu")
    assert not ran.exists()
