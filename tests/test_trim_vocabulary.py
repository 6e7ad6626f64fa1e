"""A vocabulary of some languages: texts whose pieces are kept are embedded as before to the bit."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_TEXT, randomise, tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

from capivara_common.image_side_digest import image_side_digest
from capivara_search.text_tower import open_text_tower
from examples.openmoji.concepts import concept_rows
from modeling_capivara import CapivaraConfig, CapivaraModel, CapivaraProcessor, CapivaraTokenizer
from modeling_capivara.embedder import embed_texts
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.trim_vocabulary import (
    Trim,
    changed_texts,
    cut_tokenizer,
    main,
    report,
    tokenizer_state,
    trim,
    used_ids,
)

TABLE = "text_model.embeddings.word_embeddings.weight"
KEPT = ["uma foto de um gato", "São João, 24 de junho", "a cor de uma casa", "xyz 😀 &amp;", "", "<mask> e <pad>"]
WORDS = [20]  # of Portuguese: a, o, de, um and uma among them, no noun
CHOSEN = ["uma foto de um gato", "São João", "a casa"]


@pytest.fixture
def trimmed(tiny_folder, tmp_path):
    """A tiny model, trimmed to a few Portuguese words and the pieces of CHOSEN."""
    (tmp_path / "texts.txt").write_text("\n\n".join(CHOSEN), encoding="utf-8-sig")  # as Windows' editors write
    trim(tiny_folder, tmp_path / "small", ["pt"], WORDS, [tmp_path / "texts.txt"])
    return tmp_path / "small"


def embeds(folder: Path, texts: list[str]) -> torch.Tensor:
    """With the weights copied: the address of those in a file can decide on the last bit of a product."""
    model = load_model(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return embed_texts(model, load_processor(folder), texts)


def stopped(*words) -> str:
    """What the command says when it refuses."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert "\n" not in ended.value.code
    return ended.value.code


def test_texts_whose_pieces_are_kept_have_the_same_embedding(tiny_folder, trimmed):
    whole, small = load_processor(tiny_folder), load_processor(trimmed)
    pieces = small.tokenizer.get_vocab()
    assert "▁gato" in pieces and "▁uma" in pieces and "▁capivara" not in pieces and "▁árvore" not in pieces
    assert len(pieces) == load_model(trimmed).config.text_config.vocab_size < len(whole.tokenizer)
    torch.testing.assert_close(embeds(trimmed, KEPT), embeds(tiny_folder, KEPT), atol=1e-6, rtol=0)
    torch.testing.assert_close(embeds(trimmed, ["um gato"]), embeds(tiny_folder, ["um gato"]), atol=1e-6, rtol=0)
    assert not torch.allclose(embeds(trimmed, ["capivara"]), embeds(tiny_folder, ["capivara"]), atol=1e-3)


def test_whoever_loads_the_folder_has_the_small_vocabulary(trimmed):
    model, processor = AutoModel.from_pretrained(trimmed).eval(), AutoProcessor.from_pretrained(trimmed)
    assert isinstance(processor.tokenizer, CapivaraTokenizer)
    tokens = processor(text=KEPT, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).text_embeds, embeds(trimmed, KEPT), atol=1e-6, rtol=0)
    small = open_text_tower(trimmed)  # the search's, without torch
    assert torch.allclose(torch.from_numpy(small.embed(KEPT[:3])), embeds(trimmed, KEPT[:3]), atol=1e-5)


def test_indexes_of_pictures_stay_valid(tiny_folder, trimmed):
    assert image_side_digest(trimmed) == image_side_digest(tiny_folder)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, trimmed))
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {TABLE}


def test_the_card_says_what_was_done(tiny_folder, tmp_path):
    (tiny_folder / "README.md").write_text("---\nlicense: mit\nlanguage: [pt, en]\n---\n# Theirs\n", encoding="utf-8")
    trim(tiny_folder, tmp_path / "small", ["pt", "es"], WORDS)
    text = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "those are left that pt and es use" in text and "license: mit" in text and "convert_open_clip" not in text


def test_the_order_of_the_special_tokens_stays_and_pieces_keep_their_scores(tiny_folder, trimmed):
    whole, small = (tokenizer_state(load_processor(folder).tokenizer) for folder in (tiny_folder, trimmed))
    assert small["model"]["vocab"][:4] == whole["model"]["vocab"][:4] and small["model"]["unk_id"] == 3
    scores = dict(map(tuple, whole["model"]["vocab"]))
    assert all(scores[piece] == score for piece, score in small["model"]["vocab"])
    assert min(scores.values()) in dict(map(tuple, small["model"]["vocab"])).values()
    config = json.loads((trimmed / "config.json").read_text(encoding="utf-8"))
    assert (config["trimmed_vocabulary"]["of"], config["trimmed_vocabulary"]["languages"]) == (300, ["pt"])
    assert config["text_config"]["pad_token_id"] == small["model"]["vocab"].index(["<pad>", 0.0]) == 1


def test_the_weights_keep_their_precision(tiny_folder, tmp_path):
    weights = {name: tensor.half() for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    done = trim(tiny_folder, tmp_path / "small", ["pt"], WORDS)
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert {tensor.dtype for tensor in small.values()} == {torch.float16}
    assert done.parameters[1] == sum(tensor.numel() for tensor in small.values())
    assert done.parameters[0] - done.parameters[1] == (done.pieces[0] - done.pieces[1]) * TINY_TEXT["hidden_size"]


def test_what_was_lost_is_measured_on_other_texts(tiny_folder, tmp_path, capsys):
    texts = [*KEPT[:4], "uma capivara", "a árvore verde"]
    (tmp_path / "others.txt").write_text("\n".join(texts), encoding="utf-8")
    files = [str(tmp_path / name) for name in ("small", "others.txt")]
    main([str(tiny_folder), files[0], "--languages", "pt", "--words", "20", "--held-out", files[1]])
    said = capsys.readouterr().out
    done = trim(tiny_folder, tmp_path / "again", ["pt"], WORDS, held_out=[tmp_path / "others.txt"])
    whole, small = load_processor(tiny_folder), load_processor(tmp_path / "small")
    lost = [text for text in texts if not set(pieces_of(whole, text)) <= set(small.tokenizer.get_vocab())]
    assert lost[-2:] == texts[-2:] and list(done.held_out.values()) == [(6, len(lost))]
    assert f"others.txt: {len(lost)} of 6 texts ({len(lost) / 6:.2%}) lost a piece" in said
    assert f"{done.pieces[1]} of 300 word pieces are kept." in said and said.endswith(f"{tmp_path / 'small'}\n")


def pieces_of(processor: CapivaraProcessor, text: str) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(processor(text=text)["input_ids"])


def test_the_report_of_a_trim():
    said = report(Trim((250_002, 4000), (366_000_000, 200_000_000), (4 * 10**8, 10**8), {"a.txt": (8, 0)}))
    assert "4,000 of 250,002" in said and "400.0 MB before, 100.0 MB after" in said and "a.txt: 0 of 8 texts" in said


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


def test_a_cut_that_would_drop_an_added_token_is_refused(tiny_processor):
    tokenizer = CapivaraTokenizer.from_tokenizer(tiny_tokenizer())
    tokenizer.add_tokens(["<bicho>"])
    with pytest.raises(ValueError, match="The added tokens <bicho> would be cut"):
        cut_tokenizer(tokenizer, range(10))


def test_an_added_token_without_a_row_is_named(tiny_folder, tmp_path):
    processor = load_processor(tiny_folder)
    processor.tokenizer.add_tokens([f"<bicho{number}>" for number in range(200)])
    processor.save_pretrained(tiny_folder)
    said = stopped(tiny_folder, tmp_path / "out", "--languages", "pt")
    assert "The added token '<bicho" in said and "has 300 rows" in said and not (tmp_path / "out").exists()


def test_a_language_that_is_named_twice_is_one(tiny_folder, tmp_path):
    once, twice = (trim(tiny_folder, tmp_path / "".join(codes), codes, [50, 1]) for codes in (["pt"], ["pt", "pt"]))
    assert once.pieces == twice.pieces
    assert CapivaraConfig.from_pretrained(tmp_path / "ptpt").trimmed_vocabulary["languages"] == ["pt"]


@pytest.mark.parametrize("facts", [{}, {"languages": "pt"}, {"languages": ["pt"], "words": [1], "tokenizer": 1}])
def test_damaged_facts_about_a_trim_are_one_line(trimmed, tmp_path, facts):
    config = json.loads((trimmed / "config.json").read_text(encoding="utf-8"))
    (trimmed / "config.json").write_text(json.dumps(config | {"trimmed_vocabulary": facts}), encoding="utf-8")
    said = stopped(trimmed, tmp_path / "out", "--languages", "pt")
    assert "is of no CAPIVARA model: trimmed_vocabulary must hold languages, words, " in said


def test_a_model_is_trimmed_once(trimmed, tmp_path):
    said = stopped(trimmed, tmp_path / "out", "--languages", "pt")
    assert "is trimmed already, for pt." in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--languages pt xx", "There is no list of words of the language 'xx'; there are ar, bg, bn,"),
        ("--languages pt --texts none.txt", "The texts none.txt can't be read"),
        ("--languages pt --texts blank.txt", "The file blank.txt holds no text"),
        ("--languages pt --held-out latin.txt", "Give a file in UTF-8"),
    ],
)
def test_what_can_not_be_is_said_in_a_line(tiny_folder, tmp_path, monkeypatch, flags, fault):
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("\n \n", encoding="utf-8")
    Path("latin.txt").write_bytes("ação".encode("latin-1"))
    assert fault in stopped("model", "out", *flags.split())
    assert not Path("out").exists()


def test_a_folder_that_is_there_and_one_that_is_no_model(tiny_folder, tmp_path):
    assert "exists and is not an empty folder" in stopped(tiny_folder, tiny_folder, "--languages", "pt")
    assert "does not exist" in stopped(tmp_path / "none", tmp_path / "out", "--languages", "pt")


def test_without_the_lists_of_words_their_package_is_named(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wordfreq", None)
    assert 'pip install "modeling-capivara[trim]"' in stopped(tiny_folder, tmp_path / "out", "--languages", "pt")


def test_a_vocabulary_of_another_kind_is_refused(tiny_folder, tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "um": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    CapivaraProcessor(load_processor(tiny_folder).image_processor, tokenizer).save_pretrained(tiny_folder)
    assert "of the kind WordLevel" in stopped(tiny_folder, tmp_path / "out", "--languages", "pt")


def test_any_unigram_vocabulary_splits_kept_texts_as_before():
    """Of random vocabularies with scores that often tie, some letters without a piece of their own."""
    draw, compared, differing = random.Random(0), 0, 0
    for _ in range(300):
        pieces = {"".join(draw.choices("abcd", k=draw.randint(1, 4))) for _ in range(25)} - {"a"}
        vocab = [("<unk>", 0.0), ("<pad>", 0.0), *((piece, -float(draw.randint(1, 9))) for piece in sorted(pieces))]
        lowest = min(range(len(vocab)), key=lambda number: vocab[number][1])
        kept = sorted({0, 1, lowest, *draw.sample(range(len(vocab)), len(vocab) // 2)})
        backend = Tokenizer(models.Unigram(vocab, unk_id=0))
        whole = CapivaraTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
        small = cut_tokenizer(whole, kept)
        for _ in range(20):
            text = "".join(draw.choices("abcde", k=12))
            ids, back = whole(text)["input_ids"], [kept[number] for number in small(text)["input_ids"]]
            compared += set(ids) <= set(kept)
            differing += ids != back
            assert ids == back or not set(ids) <= set(kept)
    assert compared > 100 and differing > 1000


@pytest.mark.slow
def test_ten_thousand_sentences_with_the_real_vocabulary(xlmr, tmp_path):
    """Half of them Portuguese, half English, through a narrow tower with the 250,002 pieces of XLM-R."""
    processor, _ = xlmr
    config = tiny_config(text_config={**TINY_TEXT, "vocab_size": 250_002})
    randomise(CapivaraModel(config)).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    done = trim(tmp_path / "model", tmp_path / "small", ["pt", "en"], [20_000])
    assert done.pieces[0] == 250_002 and 20_000 < done.pieces[1] < 60_000
    whole, small = (load_processor(tmp_path / name) for name in ("model", "small"))
    ids, pieces = whole.tokenizer.get_vocab(), small.tokenizer.get_vocab()
    order = [ids[piece] for piece in sorted(pieces, key=pieces.get)]
    known = set(order)
    names = [caption for found in concept_rows().values() for picture in found for caption in picture.captions_pt]
    english = [caption for found in concept_rows().values() for picture in found for caption in picture.captions_en]
    patterns = ("uma foto de {}", "na imagem aparece {}", "{} em cima da mesa", "vemos {} ao pôr do sol")
    captions = list(dict.fromkeys(pattern.format(name) for name in names for pattern in patterns))
    patterns = ("a photo of {}", "{} on the table", "we see {} at sunset", "two people and {}")
    others = list(dict.fromkeys(pattern.format(name) for name in english for pattern in patterns))
    compared = 0
    for texts in (captions, others):
        found = whole(text=texts)["input_ids"]
        kept = [text for text, tokens in zip(texts, found, strict=True) if known.issuperset(tokens)]
        assert len(changed_texts(whole, small, order, texts)) == len(texts) - len(kept) > 0
        torch.testing.assert_close(
            embeds(tmp_path / "small", kept), embeds(tmp_path / "model", kept), atol=1e-6, rtol=0
        )
        compared += len(kept)
    assert compared >= 10_000


@pytest.mark.slow
def test_every_export_that_a_smaller_vocabulary_allows(trimmed, tmp_path, caplog):
    from sentence_transformers import SentenceTransformer

    from hub_upload.export import export
    from hub_upload.formats.onnx import open_graph

    caplog.set_level("INFO", "capivara")
    export(trimmed, tmp_path / "repository")
    said = [line for line in caplog.messages if "open_clip" in line]
    assert len(said) == 1 and said[0].startswith("open_clip is left out") and "trimmed to" in said[0]
    expected = embeds(trimmed, KEPT[:3])
    torch.testing.assert_close(embeds(tmp_path / "repository", KEPT[:3]), expected, atol=1e-6, rtol=0)
    assert CapivaraConfig.from_pretrained(tmp_path / "repository").trimmed_vocabulary["of"] == 300
    found = SentenceTransformer(str(tmp_path / "repository"), trust_remote_code=True, device="cpu").encode(
        KEPT[:3], convert_to_tensor=True
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    graph = open_graph(tmp_path / "repository/onnx/text_model.onnx")
    (found,) = graph.run(None, dict(load_processor(trimmed)(text=KEPT[:3], return_tensors="np")))
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)
    assert max(used_ids(load_processor(trimmed), KEPT)) < len(load_processor(trimmed).tokenizer)


@pytest.mark.slow
def test_open_clip_loads_it_from_its_own_folder(trimmed, tmp_path, monkeypatch):
    import open_clip

    from hub_upload.export import export

    export(trimmed, tmp_path / "repository", ["transformers", "open_clip"], text_config=str(trimmed))
    monkeypatch.chdir(tmp_path / "repository")
    model, tokenize = open_clip.create_model("local-dir:."), open_clip.get_tokenizer("local-dir:.")
    with torch.no_grad():
        found = model.eval().encode_text(tokenize(KEPT[:3]), normalize=True)
    torch.testing.assert_close(found, embeds(trimmed, KEPT[:3]), atol=1e-5, rtol=0)
