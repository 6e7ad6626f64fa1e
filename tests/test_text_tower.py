"""The text encoders in NumPy match PyTorch for any text, and unsupported models are left to PyTorch."""

import io
import json
import random
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sampling import one_in
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tiny import TINY_TEXT, randomize, tiny_config, tiny_tokenizer
from towers import MAKERS, as_published, gemma_like, metaclip_2, siglip2
from transformers import AutoProcessor, SiglipModel, XLMRobertaTokenizer

from capivara_common.weight_file import WeightFile
from capivara_search.models import SearchModel, resolve_search_model
from capivara_search.text_tower import load_numpy_text_tower_or_none
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_texts

PLAIN = ["um gato dormindo", "a dog on the beach", "praia ao pôr do sol", "São João, 24 de junho", "AÇÃO", "coração"]
AWKWARD = [
    *("", " ", "\t\n", "<pad>", "um <pad> gato", "<pad><pad>", "<s>", "</s> gato <s>", "<mask>"),
    *("<unk>", "▁", "▁▁gato"),
    *("SÃ£o JoÃ£o &amp;amp; cia", "&lt;gato&gt;", "&amp;" * 40, "a\x00b", "\ud800 gato", "\udcff", "\u200bgato\ufeff"),
    *("😀", "👩🏽‍🚀 astronauta", "🇧🇷🇧🇷", "❤️‍🔥", "1️⃣", "ｇａｔｏ", "ﬁm", "½ ㎏"),
    *("日本の猫", "قطة", "кошка", "ไมว", "𝕘𝕒𝕥𝕠"),
    *("gato " * 200, "x" * 5000, "é" * 300, "a\n" * 600, "!?" * 100, "Ω≈ç√∫", "não-me-toques", "d'água"),
    *("...", "🐈" * 200),
]


def awkward_texts(number: int) -> list[str]:
    """Return the texts above, and mixtures of 1 to 60 parts of them, some in Unicode's decomposed form (NFD)."""
    rng = random.Random(0)
    texts = [*PLAIN, *AWKWARD]
    while len(texts) < number:
        parts = rng.choices(
            [*PLAIN, *AWKWARD[:30], "ção", "ões", "à", "lhe", "nº", ";", "R$ 5,00"], k=rng.randint(1, 60)
        )
        text = rng.choice(["", " ", "  ", "\n"]).join(parts)
        texts.append(unicodedata.normalize("NFD", text) if rng.random() < 0.2 else text)
    return texts[:number]


def embed_with_torch(folder: Path, texts: list[str]) -> np.ndarray:
    return embed_texts(load_model(folder).eval(), load_processor(folder), texts).numpy()


def change(path: Path, **fields) -> None:
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | fields))


def save(folder: Path, config: CapivaraConfig) -> Path:
    image_processor = CapivaraImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    randomize(CapivaraModel(config)).save_pretrained(folder)
    CapivaraProcessor(image_processor, tiny_tokenizer()).save_pretrained(folder)
    return folder


# --- XLM-RoBERTa ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_500_awkward_texts_match_pytorch(tiny_folder):
    texts = awkward_texts(500)
    assert len(set(texts)) > 480
    embeds = load_numpy_text_tower_or_none(tiny_folder).embed(texts)
    expected = embed_with_torch(tiny_folder, texts)
    assert embeds.dtype == np.float32 and np.abs(np.linalg.norm(embeds, axis=1) - 1).max() < 1e-6
    np.testing.assert_allclose(embeds, expected, rtol=0, atol=1e-5)
    assert np.abs(expected[0] - expected[1:6]).max(axis=1).min() > 0.01, "equal embeddings would prove nothing"


@pytest.mark.parametrize(
    "fields",
    [
        {"text_projection_type": "linear"},
        {"text_config": {**TINY_TEXT, "num_attention_heads": 1, "layer_norm_eps": 1e-3, "type_vocab_size": 2}},
        {"text_config": {**TINY_TEXT, "num_hidden_layers": 5, "intermediate_size": 33}, "matryoshka_dims": [12, 6]},
    ],
)
def test_supported_architectures_match_pytorch(tmp_path, fields):
    folder = save(tmp_path / "model", tiny_config(**fields))
    np.testing.assert_allclose(
        load_numpy_text_tower_or_none(folder).embed(AWKWARD), embed_with_torch(folder, AWKWARD), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "texts"), [("tiny_folder", AWKWARD), ("siglip2_folder", PLAIN)])
def test_half_precision_weights_match_pytorch(request, kind, texts, dtype):
    folder = request.getfixturevalue(kind)
    path = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    expected = embed_with_torch(folder, texts)
    np.testing.assert_allclose(load_numpy_text_tower_or_none(folder).embed(texts), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_real_weights_of_multilingual_e5_match_pytorch():
    """The miniature has 250,037 tokens, twelve layers, and token embeddings in float16."""
    folder, texts = resolve_search_model("miniature").folder, awkward_texts(200)
    np.testing.assert_allclose(
        load_numpy_text_tower_or_none(folder).embed(texts), embed_with_torch(folder, texts), rtol=0, atol=1e-5
    )


# --- SigLIP 2 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_siglip2(tmp_path_factory):
    """Save a tiny SigLIP 2 whose tokenizer was trained on some Portuguese and has two added tokens."""
    folder = tmp_path_factory.mktemp("siglip2") / "model"
    tokenizer = gemma_like([*PLAIN, "a casa azul e o carro"] * 3, 420)
    tokenizer.add_tokens(["<table>", "\n\n"])
    siglip2(folder, tokenizer)
    return folder


@pytest.fixture
def siglip2_folder(saved_siglip2, tmp_path):
    return shutil.copytree(saved_siglip2, tmp_path / "siglip2")


SETTINGS = {
    "as it is": {},
    "published": {"tokenizer_class": "GemmaTokenizer"},
    "padded at the left": {"padding_side": "left", "truncation_side": "left"},
    "shorter": {"model_max_length": 11},
    "without a limit": {"model_max_length": 10**30},
}


@pytest.mark.parametrize("case", one_in(2, SETTINGS))
def test_siglip_matches_pytorch_for_awkward_texts(siglip2_folder, case):
    if case == "published":
        as_published(siglip2_folder)
    change(siglip2_folder / "tokenizer_config.json", **SETTINGS[case])
    texts = ["<table>", "a\n\n\nb", "<eos> GATO", *awkward_texts(150)]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    tower = load_numpy_text_tower_or_none(siglip2_folder)
    embeds = tower.embed(texts)
    np.testing.assert_allclose(embeds, embed_with_torch(siglip2_folder, texts), rtol=0, atol=1e-5)
    np.testing.assert_allclose(tower.embed(["AÇÃO"]), tower.embed(["ação"]), rtol=0, atol=1e-6)
    assert np.abs(tower.embed(["ação"]) - tower.embed(["acao"])).max() > 0.01
    if case in ("as it is", "padded at the left"):  # transformers without our code, as its documentation shows
        processor, model = AutoProcessor.from_pretrained(siglip2_folder), SiglipModel.from_pretrained(siglip2_folder)
        inputs = processor(text=texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        with torch.no_grad():
            pooled = model.eval().get_text_features(inputs["input_ids"]).pooler_output
        expected = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        np.testing.assert_allclose(embeds, expected, rtol=0, atol=1e-5)


def test_half_a_surrogate_pair_is_replaced(siglip2_folder, tmp_path):
    MAKERS["clip"](tmp_path / "clip")
    for folder in (siglip2_folder, tmp_path / "clip"):
        embeds = SearchModel("siglip", str(folder), folder, device="cpu").embed_texts(["\udcff gato", "? gato"])
        np.testing.assert_allclose(embeds[0], embeds[1], rtol=0, atol=1e-6)


# --- MetaCLIP 2 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_metaclip(tmp_path_factory):
    """Save a tiny MetaCLIP 2 with a tokenizer like XLM-V's, which normalizes texts with a table of SentencePiece."""
    folder, buffer, model = tmp_path_factory.mktemp("metaclip") / "model", io.BytesIO(), ModelProto()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*PLAIN, "a casa azul e o carro"] * 3), model_writer=buffer, vocab_size=60,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model.ParseFromString(buffer.getvalue())
    vocab = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    charsmap = model.normalizer_spec.precompiled_charsmap
    tokens = [*map(tuple, vocab), ("<mask>", 0.0)]
    metaclip_2(folder, XLMRobertaTokenizer(vocab=tokens, _spm_precompiled_charsmap=charsmap))
    return folder


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])  # both are published
def test_metaclip_2_matches_pytorch_for_awkward_texts(saved_metaclip, tmp_path, activation):
    folder = shutil.copytree(saved_metaclip, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", text_config=config["text_config"] | {"hidden_act": activation})
    texts = [text.encode("utf-8", "replace").decode() for text in awkward_texts(200)]
    embeds = load_numpy_text_tower_or_none(folder).embed(texts)
    np.testing.assert_allclose(embeds, embed_with_torch(folder, texts), rtol=0, atol=1e-5)
    assert np.abs(embeds[0] - embeds[1:6]).max(axis=1).min() > 0.01, "equal embeddings would prove nothing"


@pytest.mark.parametrize("settings", [{"padding_side": "left"}, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_other_tokenizers_of_metaclip_2_are_left_to_pytorch(saved_metaclip, tmp_path, settings):
    folder = shutil.copytree(saved_metaclip, tmp_path / "model")
    change(folder / "tokenizer_config.json", **settings)
    assert load_numpy_text_tower_or_none(saved_metaclip) is not None and load_numpy_text_tower_or_none(folder) is None


# --- Unsupported models -----------------------------------------------------------------------------------------------


def with_more_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "text_model.encoder.layer.0.lora_A": torch.zeros(2)}, path, {"format": "pt"})


UNSUPPORTED = {
    "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "more tensors": with_more_tensors,
    "activation": lambda folder: change(
        folder / "config.json",
        text_config=json.loads((folder / "config.json").read_text())["text_config"] | {"hidden_act": "gelu_new"},
    ),
    "tokenizer": lambda folder: change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_models_are_embedded_by_pytorch(tiny_folder, case):
    assert load_numpy_text_tower_or_none(tiny_folder) is not None
    UNSUPPORTED[case](tiny_folder)
    assert load_numpy_text_tower_or_none(tiny_folder) is None
    if case in ("activation", "tokenizer"):
        texts = [*PLAIN, "um <mask> gato", "um <pad> gato"]
        embeds = SearchModel("tiny", str(tiny_folder), tiny_folder, device="cpu").embed_texts(texts)
        np.testing.assert_allclose(embeds, embed_with_torch(tiny_folder, texts), rtol=0, atol=1e-6)


def test_a_model_with_several_weight_files_is_embedded_by_pytorch(tiny_folder):
    expected = embed_with_torch(tiny_folder, PLAIN)
    model = load_model(tiny_folder)
    (tiny_folder / "model.safetensors").unlink()
    model.save_pretrained(tiny_folder, max_shard_size="50kB")
    assert len(list(tiny_folder.glob("model-*.safetensors"))) > 1 and load_numpy_text_tower_or_none(tiny_folder) is None
    search_model = SearchModel("tiny", str(tiny_folder), tiny_folder, device="cpu")
    np.testing.assert_allclose(search_model.embed_texts(PLAIN), expected, rtol=0, atol=1e-6)
    assert len(search_model.image_digest) == 32 and search_model.logit_scale > 1


# --- Damage -----------------------------------------------------------------------------------------------------------


WEIGHT_DAMAGES = {
    "cut": lambda data: data[:-8],
    "wrong offsets": lambda data: data.replace(b'"shape":[24,32]', b'"shape":[24,33]', 1),
    "a giant": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "deep": lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5,
}


@pytest.mark.parametrize("damage", WEIGHT_DAMAGES)
def test_damaged_weights_are_named(tiny_folder, damage):
    path = tiny_folder / "model.safetensors"
    path.write_bytes(WEIGHT_DAMAGES[damage](path.read_bytes()))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^[^\n]*model\.safetensors[^\n]*$") as caught:
        WeightFile(path)
    assert time.monotonic() - started < 5 and len(str(caught.value)) < 1000


def in_text_config(**values):
    return lambda config: config | {"text_config": config["text_config"] | values}


INVALID_CONFIGS = {
    "a thousand million layers": in_text_config(num_hidden_layers=10**9),
    "heads that are a fraction": in_text_config(num_attention_heads=4.0),
    "an epsilon that is an object": in_text_config(layer_norm_eps={}),
    "padding that is true": in_text_config(pad_token_id=True),
    "no padding": in_text_config(pad_token_id=None),
    "padding outside of the vocabulary": in_text_config(pad_token_id=10**6),
    "an epsilon below zero": in_text_config(layer_norm_eps=-1.0),
    "an epsilon that is NaN": in_text_config(layer_norm_eps=float("nan")),
    "no image tower": lambda config: config | {"vision_config": None},
    "deep": lambda config: "[" * 10**5,
}


@pytest.mark.parametrize(("pad_token", "named"), [("<nowhere>", "<nowhere>"), ("", "id 3"), (None, "padding token")])
def test_a_padding_token_that_is_not_the_models_is_refused_in_one_line(tiny_folder, pad_token, named):
    """The embedding table has more rows than the tokenizer has tokens, so that an added token would be in range."""
    path = tiny_folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad_token}))
    with pytest.raises(ValueError, match=rf"^[^\n]*{named}[^\n]*$"):
        load_processor(tiny_folder)


def test_an_unknown_padding_token_is_named_in_one_line(tiny_folder):
    processor, path = load_processor(tiny_folder), tiny_folder / "tokenizer_config.json"
    rows = json.loads((tiny_folder / "config.json").read_text())["text_config"]["vocab_size"]
    processor.tokenizer.add_tokens([f"<{number}>" for number in range(rows - len(processor.tokenizer))])
    processor.save_pretrained(tiny_folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<nowhere>"}))
    with pytest.raises(ValueError, match=r"^[^\n]*<nowhere>[^\n]*$"):
        SearchModel("tiny", str(tiny_folder), tiny_folder, device="cpu").embed_texts(["um gato", "um gato e um rato"])


@pytest.mark.parametrize("fault", INVALID_CONFIGS)
def test_an_invalid_config_is_named_in_one_line(tiny_folder, fault):
    path = tiny_folder / "config.json"
    content = INVALID_CONFIGS[fault](json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"^[^\n]*config\.json[^\n]*$"):
        SearchModel("tiny", str(tiny_folder), tiny_folder, device="cpu").embed_texts(["um gato"])


INVALID_TOKENIZERS = {
    "a panic of Rust": lambda state: state | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "no piece for unknown letters": lambda state: state | {"model": state["model"] | {"unk_id": None}},
}


@pytest.mark.parametrize("fault", INVALID_TOKENIZERS)
def test_an_invalid_tokenizer_is_named_in_one_line(tiny_folder, fault):
    path = tiny_folder / "tokenizer.json"
    path.write_text(json.dumps(INVALID_TOKENIZERS[fault](json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"^[^\n]*tokenizer[^\n]*$"):
        SearchModel("tiny", str(tiny_folder), tiny_folder, device="cpu").embed_texts(["um gato 日本"])


@pytest.mark.parametrize("scale", [torch.tensor(1e6), torch.tensor(torch.nan), torch.ones(2)])
def test_an_invalid_logit_scale_is_named_in_one_line(tiny_folder, scale):
    path = tiny_folder / "model.safetensors"
    save_file(load_file(path) | {"logit_scale": scale}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^[^\n]*logit_scale[^\n]*$"):
        _ = SearchModel("tiny", str(tiny_folder), tiny_folder).logit_scale


@pytest.mark.parametrize("width", [None, "24", 0, 10**9])
def test_an_invalid_width_is_named_in_one_line(tiny_folder, width):
    path = tiny_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"projection_dim": width}))
    with pytest.raises(ValueError, match=r"^[^\n]*projection_dim[^\n]*$"):
        _ = SearchModel("tiny", str(tiny_folder), tiny_folder).width


def test_tensors_are_read_from_the_mapped_file(tiny_folder):
    file, expected = WeightFile(tiny_folder / "model.safetensors"), load_file(tiny_folder / "model.safetensors")
    assert file.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(file.array(name), tensor.numpy())
    words = "text_model.embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(file.rows(words, np.array([7, 0, 299])), expected[words].numpy()[[7, 0, 299]])
    with pytest.raises(ValueError, match=r"\b300\b.*\b0\b.*\b300\b"):
        file.rows(words, np.array([0, 300]))


def test_a_siglip_with_another_tokenizer_is_embedded_by_pytorch(tmp_path):
    MAKERS["siglip"](tmp_path)
    assert load_numpy_text_tower_or_none(tmp_path) is None
    embeds = SearchModel("siglip", "siglip", tmp_path, device="cpu").embed_texts(PLAIN)
    np.testing.assert_allclose(embeds, embed_with_torch(tmp_path, PLAIN), rtol=0, atol=1e-6)
