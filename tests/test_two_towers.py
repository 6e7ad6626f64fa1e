"""Embedding with any two-tower model: batching changes nothing, and damaged or foreign models are refused."""

import contextlib
import copy
import json

import pytest
import torch
from PIL import Image
from towers import MAKERS, as_published, gemma_like, siglip2
from transformers import AutoModel, AutoProcessor

from capivara_search.text_tower import load_numpy_text_tower_or_none
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
def test_batching_changes_neither_embeddings_nor_their_order(tiny_model, tiny_processor, batch_size):
    images = [Image.new("RGB", (40 + i, 33), (50 * i, 20, 200 - 40 * i)) for i in range(5)]
    one_by_one = [tiny_model(**tiny_processor(text=[text], return_tensors="pt")).text_embeds for text in TEXTS]
    expected = torch.cat(one_by_one).detach()
    torch.testing.assert_close(embed_texts(tiny_model, tiny_processor, TEXTS, batch_size), expected)
    expected = tiny_model(**tiny_processor(images=images, return_tensors="pt")).image_embeds.detach()
    torch.testing.assert_close(embed_images(tiny_model, tiny_processor, iter(images), batch_size), expected)


def test_a_processor_that_does_not_resize_is_an_error(tiny_model, tiny_processor):
    processor = copy.deepcopy(tiny_processor)
    processor.image_processor.do_resize = processor.image_processor.do_center_crop = False
    for count in (2, 9):  # with 9 images, a thread gets several
        images = [Image.new("RGB", (40 + i, 33)) for i in range(count)]
        with pytest.raises(ValueError):
            embed_images(tiny_model, processor, images)


@pytest.fixture(params=["capivara", *MAKERS])
def kind_folder(request, tiny_folder, tmp_path):
    """A folder with a model of each supported type."""
    if request.param == "capivara":
        return tiny_folder
    MAKERS[request.param](tmp_path / "model")
    return tmp_path / "model"


def test_a_text_has_the_same_embedding_alone_and_next_to_a_longer_one(kind_folder):
    embedder = load_embedder(str(kind_folder), "cpu")
    longer = " ".join(["uma foto de um gato azul na casa verde"] * 9)
    alone, both = embedder.embed_texts(["um gato"]), embedder.embed_texts(["um gato", longer])
    torch.testing.assert_close(alone[0], both[0], rtol=0, atol=1e-5)
    assert alone[0] @ both[1] < 0.999


def test_a_processor_of_another_model_is_refused(tmp_path):
    """Otherwise results would be meaningless, or an error would come from inside a tower."""
    for kind in ("siglip", "clip"):
        MAKERS[kind](tmp_path / kind)
    siglip = load_processor(tmp_path / "siglip")
    siglip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"SiglipProcessor.*'clip'"):
        load_processor(tmp_path / "clip")
    faults = {48: r"images .*48.* 32 x 32 pixels", 32: r"tokenizer .*id 440.* 300 tokens"}
    for side, message in faults.items():
        siglip.image_processor.size = {"height": side, "width": side}
        siglip.save_pretrained(tmp_path / "siglip")
        with pytest.raises(ValueError, match=message):
            load_processor(tmp_path / "siglip")
        siglip.tokenizer.add_tokens([f"<{number}>" for number in range(300)])


def test_embeddings_equal_those_of_the_models_forward(kind_folder):
    """The class of transformers is called as its documentation says."""
    model, processor = AutoModel.from_pretrained(kind_folder).eval(), AutoProcessor.from_pretrained(kind_folder)
    texts, images = ["um gato", "a casa azul e o carro"], [Image.new("RGB", (40, 33), c) for c in ("red", "blue")]
    padding = {"padding": "max_length", "max_length": 64} if "Siglip" in type(processor).__name__ else {"padding": True}
    inputs = processor(text=texts, images=images, return_tensors="pt", **padding)
    with torch.no_grad():
        expected = model(**inputs)
    embedder = load_embedder(str(kind_folder), "cpu")
    text_embeds, image_embeds = embedder.embed_texts(texts), embedder.embed_images(images)
    torch.testing.assert_close(text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(image_embeds, expected.image_embeds, rtol=0, atol=1e-5)
    assert embedding_width(model.config) == text_embeds.shape[1]


def test_image_embeddings_depend_only_on_the_image_encoder(kind_folder):
    """All other parameters may change without changing the embedding of an image."""
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


@pytest.mark.parametrize("published", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_siglip_2_lowercases_texts_and_keeps_punctuation_everywhere(published, tmp_path):
    """In training, evaluation and search, and by transformers after the model was saved."""
    base, saved, texts = tmp_path / "base", tmp_path / "saved", ["Um GATO, azul!", "um gato, azul!", "um gato azul"]
    siglip2(base, gemma_like(TEXTS * 3, 400))
    if published:
        as_published(base)
    load_model(base).save_pretrained(saved)
    load_processor(base).save_pretrained(saved)
    training_ids = [row["input_ids"] for row in tokenize(load_processor(base), texts)]
    transformers_ids = AutoProcessor.from_pretrained(saved)(text=texts, padding="max_length", max_length=64).input_ids
    assert training_ids == transformers_ids and training_ids[0] == training_ids[1] != training_ids[2]
    for folder in (base, saved):
        embeds = load_embedder(str(folder), "cpu").embed_texts(texts)
        torch.testing.assert_close(
            torch.from_numpy(load_numpy_text_tower_or_none(folder).embed(texts)), embeds, rtol=0, atol=1e-5
        )
        assert torch.equal(embeds[0], embeds[1]) and not torch.allclose(embeds[1], embeds[2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [("siglip2", "NaFlex"), ("bert", "'bert'.*capivara"), ("flava", "siglip .SigLIP and")],
)
def test_unsupported_model_types_are_an_error_of_one_line(kind, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_embedder(str(tmp_path), "cpu")


OPEN_CLIP = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"layers": 10**9}, "text_cfg": {}}}


def test_a_damaged_config_is_an_error_of_one_line(tmp_path):
    MAKERS["clip"](tmp_path / "clip")
    path = tmp_path / "clip" / "config.json"
    config = json.loads(path.read_text())
    for name, value in {"num_attention_heads": 0, "num_hidden_layers": 10**9, "vocab_size": "x"}.items():
        path.write_text(json.dumps(config | {"text_config": config["text_config"] | {name: value}}))
        with pytest.raises(ValueError, match=rf"^The config.json of [^\n]*{name}[^\n]*$"):
            load_embedder(str(tmp_path / "clip"), "cpu")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    with pytest.raises(ValueError, match=r"^open_clip[^\n]*: model_cfg\.vision_cfg\.layers [^\n]*1000[^\n]*$"):
        load_embedder(f"open_clip:local-dir:{tmp_path}", "cpu", baseline=True)


TOKENIZERS = [  # the first raises an exception in the tokenizers library, the second a panic in its Rust code
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
]


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_a_damaged_tokenizer_is_an_error_of_one_line(tmp_path, fault):
    MAKERS["siglip"](tmp_path / "clip")
    path = tmp_path / "clip" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fault))
    with pytest.raises(ValueError, match=r"^[^\n]*clip[^\n]*tokenizer[^\n]*$"):
        load_embedder(str(tmp_path / "clip"), "cpu")


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_code_in_a_model_folder_is_never_run_and_the_user_is_not_asked(tmp_path, name, monkeypatch):
    """A config.json of an unknown model type, or a processor, that names a Python file in the folder."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    MAKERS["siglip"](tmp_path / "evil")
    trace, path = tmp_path / "trace", tmp_path / "evil" / name
    for module in ("configuration_evil", "processing_evil"):
        (tmp_path / "evil" / f"{module}.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    content = json.loads(path.read_text())
    if name == "config.json":
        content |= {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}}
    else:
        content |= {"processor_class": "Evil", "auto_map": {"AutoProcessor": "processing_evil.Evil"}}
    path.write_text(json.dumps(content))
    with contextlib.suppress(ValueError):  # no error if transformers falls back to a class of its own
        load_embedder(str(tmp_path / "evil"), "cpu")
    assert not trace.exists()
