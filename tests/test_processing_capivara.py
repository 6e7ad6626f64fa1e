"""Texts: the ids of open_clip's tokenizer, on the real XLM-R vocabulary."""

import itertools

import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from transformers import AutoProcessor

from modeling_capivara import CapivaraImageProcessor, CapivaraProcessor, repair_text

PIECES = [
    *("São João é um avião", "coração de mãe", "ação", "PINGÜIM", "a\u0303", "e\u0301 cedilha c\u0327"),
    *("SÃ£o JoÃ£o", "cora\u00c3\u00a7\u00c3\u00a3o", "doesnâ€™t", "âœ” No problems"),
    *("&amp;amp;lt;b&amp;gt;", "&#227;&ccedil;"),
    *("👩‍🚀🏽", "🇧🇷", "❤️‍🔥", "👨‍👩‍👧‍👦", "\u200b\u200d", "\ufeffBOM", "\u00a0nbsp\u00a0", "\t tab \n\n linha"),
    *("<s> </s>", "<mask>", "<pad>", "<unk>", "▁", "▁▁a", "…", "“aspas” ‘simples’", "ﬁ ligadura", "①②", "ＡＢＣ"),
    *("مرحبا بالعالم", "שלום", "你好，世界", "हिन्दी में", "ᎣᏏᏲ", "𝕌𝕟𝕚", "\x00\x07\x1b[31m"),
    *("a" * 400, "uma foto " * 90, ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory):
    from examples.openmoji.encoders import load_text_encoder

    folder = tmp_path_factory.mktemp("xlmr")
    tokenizer = load_text_encoder()[1]
    tokenizer.save_pretrained(folder)
    return CapivaraProcessor(CapivaraImageProcessor(), tokenizer), HFTokenizer(str(folder))


def awkward_strings() -> list[str]:
    pairs = itertools.islice(itertools.combinations(PIECES, 2), 0, None, 4)
    return [*PIECES, *(f"{a} {b}" for a, b in pairs), *(f"{piece}{piece}" for piece in PIECES), "   ", "\n"]


def test_ids_equal_open_clip(xlmr):
    processor, reference = xlmr
    strings = awkward_strings()
    assert len(set(strings)) >= 200
    actual = processor(text=strings, padding="max_length", return_tensors="pt")
    expected = reference(strings)
    different = [s for s, a, e in zip(strings, actual["input_ids"], expected, strict=True) if not torch.equal(a, e)]
    assert not different, different[:5]
    assert torch.equal(actual["attention_mask"], (expected != 1).long())
    assert max(actual["attention_mask"].sum(1)) == 77, "some strings must reach the limit"


def test_pads_to_the_longest_by_default(xlmr):
    processor, reference = xlmr
    texts = ["gato", "uma foto de um gato"]
    inputs = processor(text=texts, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == len(processor.tokenizer(texts[1])["input_ids"]) < 77
    assert torch.equal(inputs["input_ids"], reference(texts)[:, : inputs["input_ids"].shape[1]])


def test_save_and_load(tiny_processor, tmp_path):
    tiny_processor(text=["a"], padding="max_length")  # what the last call asked for must not be remembered
    tiny_processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, CapivaraProcessor) and isinstance(loaded.image_processor, CapivaraImageProcessor)
    assert dict(loaded.image_processor.size) == {"shortest_edge": 32}
    for text in (["São João &amp; cÃ£o"], ["um gato", "uma foto de uma capivara " * 40]):
        assert loaded(text=text)["input_ids"] == tiny_processor(text=text)["input_ids"]
    assert len(loaded(text="um gato")["input_ids"]) < 10


def test_a_single_text_and_both_modalities(tiny_processor):
    single = tiny_processor(text="um gato")
    assert single["input_ids"] == tiny_processor(text=["um gato"])["input_ids"][0]
    both = tiny_processor(images=torch.zeros(3, 40, 50), text=["um gato"], return_tensors="pt")
    assert set(both) == {"input_ids", "attention_mask", "pixel_values"}
    assert both["pixel_values"].shape == (1, 3, 32, 32)


def test_repair():
    assert repair_text("  SÃ£o   JoÃ£o &amp;amp; cia\n") == "São João & cia"


@pytest.mark.parametrize("text", [None, [None], [3], []])
def test_bad_text(tiny_processor, text):
    with pytest.raises(ValueError, match=r"must be a string|no text|at least one input"):
        tiny_processor(text=text)
