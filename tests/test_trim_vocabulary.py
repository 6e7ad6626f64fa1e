"""A vocabulary of some languages: texts whose pieces are kept are embedded as before to the bit."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_TEXT, randomise, tiny_config
from tokenizers import Tokenizer, models
from towers import as_open_clip
from transformers import PreTrainedTokenizerFast

from capivara_common.image_encoder_digest import image_encoder_digest
from capivara_search.text_tower import load_text_tower
from examples.openmoji.concepts import load_concepts
from modeling_capivara import CapivaraConfig, CapivaraModel, CapivaraProcessor, CapivaraTokenizer
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.trim_vocabulary import check_tokenization, main, trim, trim_tokenizer
from modeling_capivara.two_towers import embed_texts

TABLE = "text_model.embeddings.word_embeddings.weight"
KEPT = ["uma foto de um gato", "São João, 24 de junho", "a cor de uma casa", "xyz 😀 &amp;", "", "<mask> e <pad>"]
WORDS = [20]  # of Portuguese: a, o, de, um and uma among them, no noun
CHOSEN = ["uma foto de um gato", "São João", "a casa"]


@pytest.fixture(scope="module")
def trimmed(saved_tiny_folder, tmp_path_factory):
    """A tiny model, trimmed to a few Portuguese words and the pieces of CHOSEN; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("trimmed")
    (folder / "texts.txt").write_text("\n\n".join(CHOSEN), encoding="utf-8-sig")  # as Windows' editors write
    trim(saved_tiny_folder, folder / "small", ["pt"], WORDS, [folder / "texts.txt"])
    return folder / "small"


def embeds(folder: Path, texts: list[str]) -> torch.Tensor:
    """With the weights copied: the address of those in a file can decide on the last bit of a product."""
    model = load_model(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return embed_texts(model, load_processor(folder), texts)


def stopped(*words) -> str:
    """What the command says when it refuses."""
    with pytest.raises((ValueError, OSError, ImportError)) as ended:
        main([str(word) for word in words])
    assert "\n" not in str(ended.value)
    return str(ended.value)


def test_texts_whose_pieces_are_kept_have_the_same_embedding(saved_tiny_folder, trimmed):
    whole, small = load_processor(saved_tiny_folder), load_processor(trimmed)
    pieces = small.tokenizer.get_vocab()
    assert "▁gato" in pieces and "▁uma" in pieces and "▁capivara" not in pieces and "▁árvore" not in pieces
    assert len(pieces) == load_model(trimmed).config.text_config.vocab_size < len(whole.tokenizer)
    torch.testing.assert_close(embeds(trimmed, KEPT), embeds(saved_tiny_folder, KEPT), atol=1e-6, rtol=0)
    torch.testing.assert_close(embeds(trimmed, ["um gato"]), embeds(saved_tiny_folder, ["um gato"]), atol=1e-6, rtol=0)
    assert not torch.allclose(embeds(trimmed, ["capivara"]), embeds(saved_tiny_folder, ["capivara"]), atol=1e-3)
    small = load_text_tower(trimmed)  # the search's, without torch
    assert torch.allclose(torch.from_numpy(small.embed(KEPT[:3])), embeds(trimmed, KEPT[:3]), atol=1e-5)


def test_all_else_stays_as_it_was(tiny_folder, tmp_path):
    """Indexes of pictures stay valid, weights keep their precision; the card says what was done."""
    weights = {name: tensor.half() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    (tiny_folder / "README.md").write_text("---\nlicense: mit\nlanguage: [pt, en]\n---\n# Theirs\n", encoding="utf-8")
    said = trim(tiny_folder, tmp_path / "small", ["pt", "es", "pt"], WORDS)
    assert image_encoder_digest(tmp_path / "small") == image_encoder_digest(tiny_folder)
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert small.keys() == weights.keys() and {tensor.dtype for tensor in small.values()} == {torch.float16}
    assert {name for name in small if not torch.equal(small[name], weights[name])} == {TABLE}
    before, after = (sum(tensor.numel() for tensor in found.values()) for found in (weights, small))
    kept = len(small[TABLE])
    assert before - after == (300 - kept) * TINY_TEXT["hidden_size"] > 0
    assert said[:2] == [f"{kept} of 300 word pieces are kept.", f"Parameters: {before:,} before, {after:,} after."]
    assert CapivaraConfig.from_pretrained(tmp_path / "small").trimmed_vocabulary["languages"] == ["pt", "es"]
    text = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "those are left that pt and es use" in text and "license: mit" in text and "convert_open_clip" not in text


def pieces_of(processor: CapivaraProcessor, text: str) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(processor(text=text)["input_ids"])


def test_added_tokens_keep_their_rows(tiny_folder, tmp_path):
    processor = load_processor(tiny_folder)
    processor.tokenizer.add_tokens(["<bicho>"])
    processor.tokenizer.add_special_tokens({"mask_token": "<mask>"})
    processor.save_pretrained(tiny_folder)
    assert len(processor.tokenizer) < TINY_TEXT["vocab_size"]
    trim(tiny_folder, tmp_path / "small", ["pt"], WORDS)
    texts = ["um <bicho> de uma cor", "a <mask>"]
    assert "<bicho>" in pieces_of(load_processor(tmp_path / "small"), texts[0])
    torch.testing.assert_close(embeds(tmp_path / "small", texts), embeds(tiny_folder, texts), atol=1e-6, rtol=0)
    rows = load_model(tmp_path / "small").config.text_config.vocab_size
    assert rows == len(load_processor(tmp_path / "small").tokenizer)
    processor.tokenizer.add_tokens([f"<bicho{number}>" for number in range(200)])
    processor.save_pretrained(tiny_folder)
    said = stopped(tiny_folder, tmp_path / "out", "--languages", "pt")
    assert "The added token '<bicho" in said and "has 300 rows" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("facts", [None, {}, {"languages": ["pt"], "words": [1], "tokenizer": 1}])
def test_a_model_is_trimmed_once(trimmed, tmp_path, facts):
    """Also where the facts about its trim are damaged."""
    model = shutil.copytree(trimmed, tmp_path / "model")
    if facts is not None:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps(config | {"trimmed_vocabulary": facts}), encoding="utf-8")
    said = stopped(model, tmp_path / "out", "--languages", "pt")
    fault = "can't be used: trimmed_vocabulary must hold languages, words, "
    assert ("is trimmed already, for pt." if facts is None else fault) in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("model model --languages pt", "is not empty. Choose another one"),
        ("none out --languages pt", "does not exist"),
        ("model out --languages pt xx", "There is no list of words of the language 'xx'; there are ar, bg, bn,"),
        ("model out --languages pt --texts none.txt", "The texts none.txt can't be read"),
        ("model out --languages pt --texts blank.txt", "The file blank.txt holds no text"),
        ("model out --languages pt --texts latin.txt", "Give a file in UTF-8"),
    ],
)
def test_what_can_not_be_is_said_in_a_line(tiny_folder, tmp_path, monkeypatch, flags, fault):
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("\n \n", encoding="utf-8")
    Path("latin.txt").write_bytes("ação".encode("latin-1"))
    assert fault in stopped(*flags.split())
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    assert 'pip install "modeling-capivara[trim]"' in stopped("model", "out", "--languages", "pt")
    assert not Path("out").exists()


def test_any_unigram_vocabulary_splits_kept_texts_as_before_and_no_other_kind_is_cut():
    """Of random vocabularies with scores that often tie, some letters without a piece of their own."""
    draw, compared, differing = random.Random(0), 0, 0
    for _ in range(100):
        pieces = {"".join(draw.choices("abcd", k=draw.randint(1, 4))) for _ in range(25)} - {"a"}
        vocab = [("<unk>", 0.0), ("<pad>", 0.0), *((piece, -float(draw.randint(1, 9))) for piece in sorted(pieces))]
        lowest = min(range(len(vocab)), key=lambda number: vocab[number][1])
        kept = sorted({0, 1, lowest, *draw.sample(range(len(vocab)), len(vocab) // 2)})
        backend = Tokenizer(models.Unigram(vocab, unk_id=0))
        whole = CapivaraTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
        small = trim_tokenizer(whole, kept)
        for _ in range(20):
            text = "".join(draw.choices("abcde", k=12))
            ids, back = whole(text)["input_ids"], [kept[number] for number in small(text)["input_ids"]]
            compared += set(ids) <= set(kept)
            differing += ids != back
            assert ids == back or not set(ids) <= set(kept)
    assert compared > 30 and differing > 300
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "um": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="of the kind WordLevel"):
        trim_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), [0])


@pytest.mark.slow
def test_ten_thousand_sentences_with_the_real_vocabulary(xlmr, tmp_path):
    """Portuguese and English, through a narrow tower with the 250,002 pieces of XLM-R."""
    processor, _ = xlmr
    config = tiny_config(text_config={**TINY_TEXT, "vocab_size": 250_002})
    randomise(CapivaraModel(config)).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trim(tmp_path / "model", tmp_path / "small", ["pt", "en"], [20_000])
    whole, small = (load_processor(tmp_path / name) for name in ("model", "small"))
    ids, pieces = whole.tokenizer.get_vocab(), small.tokenizer.get_vocab()
    assert len(ids) == 250_002 and 20_000 < len(pieces) < 60_000
    order = [ids[piece] for piece in sorted(pieces, key=pieces.get)]
    pictures = [picture for found in load_concepts().values() for picture in found]
    names = {caption for picture in pictures for caption in (*picture.captions_pt, *picture.captions_en)}
    patterns = ("uma foto de {}", "vemos {} ao pôr do sol", "two people and {}")
    texts = [pattern.format(name) for name in sorted(names) for pattern in patterns]
    found, known = whole(text=texts)["input_ids"], set(order)
    kept = [text for text, tokens in zip(texts, found, strict=True) if known.issuperset(tokens)]
    check_tokenization(whole, small, order, texts)
    assert len(texts) > len(kept)
    assert len(kept) >= 10_000
    some = kept[::10]  # the splits of all are compared above
    torch.testing.assert_close(embeds(tmp_path / "small", some), embeds(tmp_path / "model", some), atol=1e-6, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_every_export_that_a_smaller_vocabulary_allows(trimmed, tmp_path, caplog):
    import open_clip

    from hub_upload.export import export_model
    from hub_upload.formats.onnx import open_session

    caplog.set_level("INFO", "capivara")
    export_model(trimmed, tmp_path / "repository")
    said = [line for line in caplog.messages if "open_clip" in line]
    assert len(said) == 1 and said[0].startswith("open_clip is left out") and "trimmed to" in said[0]
    expected = embeds(trimmed, KEPT[:3])
    torch.testing.assert_close(embeds(tmp_path / "repository", KEPT[:3]), expected, atol=1e-6, rtol=0)
    assert CapivaraConfig.from_pretrained(tmp_path / "repository").trimmed_vocabulary["of"] == 300
    graph = open_session(tmp_path / "repository/onnx/text_model.onnx")
    (found,) = graph.run(None, dict(load_processor(trimmed)(text=KEPT[:3], return_tensors="np")))
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)
    name = f"local-dir:{tmp_path / 'open_clip'}"  # of open_clip alone, with the text tower's configuration
    as_open_clip(trimmed, tmp_path / "open_clip")
    model, tokenize = open_clip.create_model(name), open_clip.get_tokenizer(name)
    found = model.eval().encode_text(tokenize(KEPT[:3]), normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
