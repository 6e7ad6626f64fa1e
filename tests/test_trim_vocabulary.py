"""Trimmed vocabularies: texts whose tokens are all kept have the same embedding as before."""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_TEXT, randomize, tiny_config
from tokenizers import Tokenizer, models
from towers import MAKERS, as_open_clip
from transformers import PreTrainedTokenizerFast

from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_search.text_tower import load_numpy_text_tower_or_none
from examples.openmoji.concepts import load_emoji_by_concept
from hub_upload.origins import read_origin_card_metadata
from modeling_capivara import CapivaraConfig, CapivaraModel, CapivaraProcessor, CapivaraTokenizer
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.trim_vocabulary import check_trimmed_tokenizer_matches_original, main, trim, trim_tokenizer
from modeling_capivara.two_towers import embed_texts

TABLE = "text_model.embeddings.word_embeddings.weight"
KEPT = ["uma foto de um gato", "São João, 24 de junho", "a cor de uma casa", "xyz 😀 &amp;", "", "<mask> e <pad>"]
WORDS = [20]  # number of Portuguese words to keep: a, o, de, um and uma are among them, but no noun
CHOSEN = ["uma foto de um gato", "São João", "a casa"]


@pytest.fixture(scope="module")
def trimmed(saved_tiny_folder, tmp_path_factory):
    """A tiny model, trimmed to a few Portuguese words and the tokens of CHOSEN; tests must not change it."""
    folder = tmp_path_factory.mktemp("trimmed")
    # Editors on Windows write a byte order mark (utf-8-sig).
    (folder / "texts.txt").write_text("\n\n".join(CHOSEN), encoding="utf-8-sig")
    trim(saved_tiny_folder, folder / "small", ["pt"], WORDS, [folder / "texts.txt"])
    return folder / "small"


def embeds(folder: Path, texts: list[str]) -> torch.Tensor:
    """Embed texts with copied weights: the memory address of mapped weights can change the last bit of a product."""
    model = load_model(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return embed_texts(model, load_processor(folder), texts)


def error_of(*arguments) -> str:
    """Return the one-line error that the command ends with."""
    with pytest.raises((ValueError, OSError, ImportError)) as caught:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_texts_whose_pieces_are_kept_have_the_same_embedding(saved_tiny_folder, trimmed):
    original_processor, trimmed_processor = load_processor(saved_tiny_folder), load_processor(trimmed)
    tokens = trimmed_processor.tokenizer.get_vocab()
    assert "▁gato" in tokens and "▁uma" in tokens and "▁capivara" not in tokens and "▁árvore" not in tokens
    assert len(tokens) == load_model(trimmed).config.text_config.vocab_size < len(original_processor.tokenizer)
    torch.testing.assert_close(embeds(trimmed, KEPT), embeds(saved_tiny_folder, KEPT), atol=1e-6, rtol=0)
    torch.testing.assert_close(embeds(trimmed, ["um gato"]), embeds(saved_tiny_folder, ["um gato"]), atol=1e-6, rtol=0)
    assert not torch.allclose(embeds(trimmed, ["capivara"]), embeds(saved_tiny_folder, ["capivara"]), atol=1e-3)
    search_tower = load_numpy_text_tower_or_none(trimmed)  # runs without torch
    assert torch.allclose(torch.from_numpy(search_tower.embed(KEPT[:3])), embeds(trimmed, KEPT[:3]), atol=1e-5)


def test_metaclip_2_is_trimmed_and_its_card_keeps_the_non_commercial_license(tmp_path):
    """Its text embedding is the state at the end token, whose id must not change."""
    MAKERS["metaclip_2"](tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Theirs\n", encoding="utf-8")
    trim(tmp_path / "base", tmp_path / "small", ["pt"], WORDS)
    assert load_model(tmp_path / "small").config.text_config.vocab_size < 300
    texts = ["a de um", "o"]
    torch.testing.assert_close(embeds(tmp_path / "small", texts), embeds(tmp_path / "base", texts), atol=1e-6, rtol=0)
    assert read_origin_card_metadata(str(tmp_path / "small"), "model")["licenses"] == ["cc-by-nc-4.0"]


def test_only_the_embedding_table_changes(tiny_folder, tmp_path):
    """Image indexes stay valid, weights keep their dtype, and the card states the languages and the license."""
    weights = {name: tensor.half() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    (tiny_folder / "README.md").write_text("---\nlicense: mit\nlanguage: [pt, en]\n---\n# Theirs\n", encoding="utf-8")
    report = trim(tiny_folder, tmp_path / "small", ["pt", "es", "pt"], WORDS)
    assert image_encoder_digest(tmp_path / "small") == image_encoder_digest(tiny_folder)
    trimmed_weights = load_file(tmp_path / "small" / "model.safetensors")
    assert trimmed_weights.keys() == weights.keys()
    assert {tensor.dtype for tensor in trimmed_weights.values()} == {torch.float16}
    changed = {name for name in weights if not torch.equal(trimmed_weights[name], weights[name])}
    assert changed == {TABLE}
    before, after = (sum(tensor.numel() for tensor in tensors.values()) for tensors in (weights, trimmed_weights))
    kept_rows = len(trimmed_weights[TABLE])
    assert before - after == (300 - kept_rows) * TINY_TEXT["hidden_size"] > 0
    assert f"{kept_rows} of 300" in report[0] and f"{before:,}" in report[1] and f"{after:,}" in report[1]
    assert CapivaraConfig.from_pretrained(tmp_path / "small").trimmed_vocabulary["languages"] == ["pt", "es"]
    text = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "pt and es" in text and "license: mit" in text and "convert_open_clip" not in text


def tokens_of(processor: CapivaraProcessor, text: str) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(processor(text=text)["input_ids"])


@pytest.mark.slow
def test_added_tokens_keep_their_rows(tiny_folder, tmp_path):
    processor = load_processor(tiny_folder)
    processor.tokenizer.add_tokens(["<bicho>"])
    processor.tokenizer.add_special_tokens({"mask_token": "<mask>"})
    processor.save_pretrained(tiny_folder)
    assert len(processor.tokenizer) < TINY_TEXT["vocab_size"]
    trim(tiny_folder, tmp_path / "small", ["pt"], WORDS)
    texts = ["um <bicho> de uma cor", "a <mask>"]
    assert "<bicho>" in tokens_of(load_processor(tmp_path / "small"), texts[0])
    torch.testing.assert_close(embeds(tmp_path / "small", texts), embeds(tiny_folder, texts), atol=1e-6, rtol=0)
    rows = load_model(tmp_path / "small").config.text_config.vocab_size
    assert rows == len(load_processor(tmp_path / "small").tokenizer)
    processor.tokenizer.add_tokens([f"<bicho{number}>" for number in range(200)])
    processor.save_pretrained(tiny_folder)
    message = error_of(tiny_folder, tmp_path / "out", "--languages", "pt")
    assert "'<bicho" in message and "300" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("record", [None, {}, {"languages": ["pt"], "words": [1], "tokenizer": 1}])
def test_a_trimmed_model_is_not_trimmed_again(trimmed, tmp_path, record):
    """Not even if the record of the first trim is damaged."""
    model = shutil.copytree(trimmed, tmp_path / "model")
    if record is not None:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps(config | {"trimmed_vocabulary": record}), encoding="utf-8")
    message = error_of(model, tmp_path / "out", "--languages", "pt")
    assert re.search(r"already trimmed.*\bpt\b" if record is None else "trimmed_vocabulary.*languages, words", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("model model --languages pt", "not empty"),
        ("none out --languages pt", "none does not exist"),
        ("model out --languages pt xx", "'xx'.* ar, bg, bn,.*--texts"),
        ("model out --languages pt --texts none.txt", r"none\.txt can't be read"),
        ("model out --languages pt --texts blank.txt", r"blank\.txt has no text"),
        ("model out --languages pt --texts latin.txt", r"latin\.txt can't be read.*UTF-8"),
    ],
)
def test_wrong_arguments_are_an_error_of_one_line(tiny_folder, tmp_path, monkeypatch, flags, pattern):
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("\n \n", encoding="utf-8")
    Path("latin.txt").write_bytes("ação".encode("latin-1"))
    assert re.search(pattern, error_of(*flags.split()))
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    assert '.[trim]"' in error_of("model", "out", "--languages", "pt")
    assert not Path("out").exists()


@pytest.mark.slow
def test_trimmed_unigram_tokenizers_split_texts_of_kept_tokens_as_before():
    """Random vocabularies whose scores often tie, and in which some letters have no token."""
    rng, compared, differing = random.Random(0), 0, 0
    for _ in range(100):
        tokens = {"".join(rng.choices("abcd", k=rng.randint(1, 4))) for _ in range(25)} - {"a"}
        vocab = [("<unk>", 0.0), ("<pad>", 0.0), *((token, -float(rng.randint(1, 9))) for token in sorted(tokens))]
        lowest = min(range(len(vocab)), key=lambda token_id: vocab[token_id][1])
        kept_ids = sorted({0, 1, lowest, *rng.sample(range(len(vocab)), len(vocab) // 2)})
        backend = Tokenizer(models.Unigram(vocab, unk_id=0))
        original = CapivaraTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
        trimmed = trim_tokenizer(original, kept_ids)
        for _ in range(20):
            text = "".join(rng.choices("abcde", k=12))
            ids = original(text)["input_ids"]
            trimmed_ids = [kept_ids[token_id] for token_id in trimmed(text)["input_ids"]]
            compared += set(ids) <= set(kept_ids)
            differing += ids != trimmed_ids
            assert ids == trimmed_ids or not set(ids) <= set(kept_ids)
    assert compared > 30 and differing > 300


def test_tokenizers_of_other_types_are_not_trimmed():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "um": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="WordLevel"):
        trim_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), [0])


@pytest.mark.slow
def test_ten_thousand_sentences_with_the_real_vocabulary(xlmr, tmp_path):
    """Portuguese and English texts, with a narrow tower and the 250,002 tokens of XLM-R."""
    processor, _ = xlmr
    config = tiny_config(text_config={**TINY_TEXT, "vocab_size": 250_002})
    randomize(CapivaraModel(config)).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trim(tmp_path / "model", tmp_path / "small", ["pt", "en"], [20_000])
    original, trimmed_processor = (load_processor(tmp_path / name) for name in ("model", "small"))
    ids, trimmed_ids = original.tokenizer.get_vocab(), trimmed_processor.tokenizer.get_vocab()
    assert len(ids) == 250_002 and 20_000 < len(trimmed_ids) < 60_000
    kept_ids = [ids[token] for token in sorted(trimmed_ids, key=trimmed_ids.get)]
    pictures = [picture for concept in load_emoji_by_concept().values() for picture in concept]
    names = {caption for picture in pictures for caption in (*picture.captions_pt, *picture.captions_en)}
    patterns = ("uma foto de {}", "vemos {} ao pôr do sol", "two people and {}")
    texts = [pattern.format(name) for name in sorted(names) for pattern in patterns]
    rows, id_set = original(text=texts)["input_ids"], set(kept_ids)
    kept_texts = [text for text, row in zip(texts, rows, strict=True) if id_set.issuperset(row)]
    check_trimmed_tokenizer_matches_original(original, trimmed_processor, kept_ids, texts)
    assert len(texts) > len(kept_texts) >= 10_000
    sample = kept_texts[::10]  # the token ids of all texts are compared above
    torch.testing.assert_close(
        embeds(tmp_path / "small", sample), embeds(tmp_path / "model", sample), atol=1e-6, rtol=0
    )


@pytest.mark.slow
@torch.no_grad()
def test_every_export_that_a_smaller_vocabulary_allows(trimmed, tmp_path, caplog):
    import open_clip

    from hub_upload.export import export_model
    from hub_upload.formats.onnx import open_session

    caplog.set_level("INFO", "capivara")
    export_model(trimmed, tmp_path / "repository")
    messages = [line for line in caplog.messages if "open_clip" in line]
    assert len(messages) == 1 and "trimmed" in messages[0]
    expected = embeds(trimmed, KEPT[:3])
    torch.testing.assert_close(embeds(tmp_path / "repository", KEPT[:3]), expected, atol=1e-6, rtol=0)
    assert CapivaraConfig.from_pretrained(tmp_path / "repository").trimmed_vocabulary["of"] == 300
    graph = open_session(tmp_path / "repository/onnx/text_model.onnx")
    (onnx_embeds,) = graph.run(None, dict(load_processor(trimmed)(text=KEPT[:3], return_tensors="np")))
    torch.testing.assert_close(torch.from_numpy(onnx_embeds), expected, atol=1e-4, rtol=0)
    name = f"local-dir:{tmp_path / 'open_clip'}"  # the format of open_clip, with the configuration of the text tower
    as_open_clip(trimmed, tmp_path / "open_clip")
    model, tokenize = open_clip.create_model(name), open_clip.get_tokenizer(name)
    actual = model.eval().encode_text(tokenize(KEPT[:3]), normalize=True)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
