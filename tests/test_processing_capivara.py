"""The processor: token ids equal those of open_clip, and options of calls and loading."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from tiny import randomize, tiny_config, tiny_tokenizer
from towers import without_cleaning
from transformers import AutoProcessor, AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from modeling_capivara import CapivaraImageProcessor, CapivaraModel, CapivaraProcessor

PIECES = [
    *("São João é um avião", "coração de mãe", "ação", "PINGÜIM", "a\u0303", "e\u0301 cedilha c\u0327"),
    *("SÃ£o JoÃ£o", "cora\u00c3\u00a7\u00c3\u00a3o", "doesnâ€™t", "âœ” No problems"),
    *("&amp;amp;lt;b&amp;gt;", "&#227;&ccedil;"),
    *("👩‍🚀🏽", "🇧🇷", "❤️‍🔥", "👨‍👩‍👧‍👦", "\u200b\u200d", "\ufeffBOM", "\u00a0nbsp\u00a0", "\t tab \n\n linha"),
    *("<s> </s>", "<mask>", "<pad>", "<unk>", "▁", "▁▁a", "…", "“aspas” ‘simples’", "ﬁ ligadura", "①②", "ＡＢＣ"),
    *("مرحبا بالعالم", "שלום", "你好，世界", "हिन्दी में", "ᎣᏏᏲ", "𝕌𝕟𝕚", "\x00\x07\x1b[31m"),
    *("a" * 400, "uma foto " * 90, ""),
]  # fmt: skip


EXTRA = ["\ud800", "\u2028", "\u0085", "\xad", "\u202eabc\u202c", "e\u0301\u0302\u0303", "H₂O", "&bogus;"]
EXTRA.append("Ð¿Ñ€Ð¸Ð²ÐµÑ‚")


def awkward_strings() -> list[str]:
    """Return the pieces alone, in pairs, and in random mixtures."""
    rng = random.Random(0)
    pairs = itertools.islice(itertools.combinations(PIECES, 2), 0, None, 4)
    mixed = ["".join(rng.choices([*PIECES, *EXTRA], k=rng.randint(2, 6))) for _ in range(60)]
    return [*PIECES, *(f"{a} {b}" for a, b in pairs), *(f"{piece}{piece}" for piece in PIECES), "   ", "\n", *mixed]


@pytest.fixture
def tiny(tiny_processor, tmp_path):
    """Tuple of a CAPIVARA processor with a tiny vocabulary and open_clip's tokenizer for this vocabulary."""
    from open_clip.tokenizer import HFTokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    return tiny_processor, HFTokenizer(str(tmp_path))


@pytest.mark.parametrize("vocabulary", ["tiny", pytest.param("xlmr", marks=pytest.mark.slow)])
def test_ids_equal_open_clip(vocabulary, request):
    processor, reference = request.getfixturevalue(vocabulary)
    strings = awkward_strings()
    assert len(set(strings)) >= 250
    actual = processor(text=strings, padding="max_length", return_tensors="pt")
    expected = reference(strings)
    rows = zip(strings, actual["input_ids"], expected, strict=True)
    different = [text for text, ids, expected_ids in rows if not torch.equal(ids, expected_ids)]
    assert not different, different[:5]
    assert torch.equal(actual["attention_mask"], (expected != 1).long())
    assert max(actual["attention_mask"].sum(1)) == 77, "some strings must reach the limit"
    plain = without_cleaning(processor.tokenizer)(
        [text.encode(errors="replace").decode() for text in strings],
        padding="max_length", max_length=77, truncation=True, return_tensors="pt",
    )  # fmt: skip
    assert (plain["input_ids"] != expected).any(dim=1).sum() > 50, "the cleaning must matter"
    padded = processor(text=strings[:3], return_tensors="pt")["input_ids"]  # by default, to the longest text
    assert torch.equal(padded, expected[:3, : padded.shape[1]]) and padded.shape[1] < 77
    assert (padded != 1).all(dim=1).any()


def test_output_types_and_shapes(tiny_processor):
    """For a single text, several containers, both modalities, and different tensor types."""
    image, expected = np.zeros((40, 50, 3), np.uint8), tiny_processor(text=["um", "gato"])["input_ids"]
    assert isinstance(expected, list) and tiny_processor(text="um")["input_ids"] == expected[0]
    for texts in (("um", "gato"), np.array(["um", "gato"]), (word for word in ["um", "gato"])):
        assert tiny_processor(text=texts)["input_ids"] == expected
    both = tiny_processor(images=image, text=["um <pad> gato"], return_tensors="np")
    assert set(both) == {"input_ids", "attention_mask", "pixel_values"}
    assert both["attention_mask"].tolist() == [[1, 1, 1, 0, 1, 1]]
    assert {type(value) for value in both.values()} == {np.ndarray} and both["pixel_values"].shape == (1, 3, 32, 32)


def test_options_of_a_call_override_defaults(tiny_processor):
    text = "um gato azul de casa"
    full = tiny_processor(text=[text], padding="max_length", return_tensors="pt")
    assert full["input_ids"].shape == (1, 77) and full["attention_mask"].sum() == 7
    assert len(tiny_processor(text=text, max_length=4)["input_ids"]) == 4
    assert len(tiny_processor(text=text, text_kwargs={"max_length": 5})["input_ids"]) == 5
    assert len(tiny_processor(text="gato " * 100, truncation=False)["input_ids"]) == 102
    assert [len(ids) for ids in tiny_processor(text=["um", text], padding=False)["input_ids"]] == [3, 7]
    smaller = tiny_processor(images=np.zeros((40, 50, 3), np.uint8), size=16, crop_size=16, return_tensors="pt")
    assert smaller["pixel_values"].shape == (1, 3, 16, 16)


def test_length_of_an_earlier_call_is_not_remembered(tmp_path):
    """A fast tokenizer stores length and padding of its last call. They are not saved, nor loaded from older files."""
    processor = CapivaraProcessor(CapivaraImageProcessor(), tiny_tokenizer())
    texts = ["um gato azul de casa", "gato " * 100]
    expected = processor(text=texts)["input_ids"]
    processor(text=texts, max_length=4, padding="max_length")
    assert processor(text=texts)["input_ids"] == expected
    processor(text=texts, max_length=4, padding="max_length")
    older = processor.tokenizer.backend_tokenizer.to_str()  # earlier versions saved this
    assert json.loads(older)["truncation"]["max_length"] == json.loads(older)["padding"]["strategy"]["Fixed"] == 4
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert saved["truncation"] is saved["padding"] is None
    for content in (json.dumps(saved), older):
        (tmp_path / "tokenizer.json").write_text(content, "utf-8")
        reloaded = AutoProcessor.from_pretrained(tmp_path)
        assert reloaded(text=texts)["input_ids"] == expected
        assert isinstance(reloaded, CapivaraProcessor) and isinstance(reloaded.image_processor, CapivaraImageProcessor)
        foreign = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert CapivaraProcessor(CapivaraImageProcessor(), foreign)(text=texts)["input_ids"] == expected
        # An explicit max_length is respected even if it equals the length of the last call.
        limited = AutoTokenizer.from_pretrained(tmp_path, max_length=4)
        assert len(CapivaraProcessor(CapivaraImageProcessor(), limited)(text=texts[1])["input_ids"]) == 4


def test_length_and_padding_of_a_configured_tokenizer_are_kept(tiny_folder, tmp_path):
    """As in transformers' other processors; options of a call override them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, max_length=20, padding="max_length")
    processor, text = CapivaraProcessor(CapivaraImageProcessor(), tokenizer), "um gato " * 50
    for _ in range(2):
        assert [len(processor(text=text)["input_ids"]) for text in (text, "um gato")] == [20, 20]
        assert [len(ids) for ids in processor(text=[text, "um"], padding=True, max_length=9)["input_ids"]] == [9, 9]
        assert len(processor(text="um gato", text_kwargs={"padding": False})["input_ids"]) == 4
        both = processor(text="um gato", images=np.zeros((40, 50, 3), np.uint8))
        assert len(both["input_ids"]) == 20 and len(both["pixel_values"]) == 1
        processor.save_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(("model_max_length", "expected_length"), [(40, 40), (512, 77)])
def test_texts_are_truncated_to_the_shorter_of_the_tokenizers_length_and_77(
    tiny_folder, model_max_length, expected_length
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, model_max_length=model_max_length)
    processor, text = CapivaraProcessor(CapivaraImageProcessor(), tokenizer), "um gato " * 50
    assert len(processor(text=text)["input_ids"]) == len(tokenizer(text)["input_ids"]) == expected_length
    assert len(processor(text=text, max_length=60)["input_ids"]) == 60


def test_token_types_of_bert_tokenizers_are_accepted():
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "um", "gato", "azul"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocab)})
    processor = CapivaraProcessor(CapivaraImageProcessor(size=32, crop_size=32), tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = {"model_type": "bert", "vocab_size": len(vocab), **sizes}
    model, texts = randomize(CapivaraModel(tiny_config(text_config=text_config))).eval(), ["um gato azul", "gato"]
    types = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=True)
    assert "token_type_ids" in types
    assert torch.equal(model(**types).text_embeds, model(**processor(text=texts, return_tensors="pt")).text_embeds)


BAD_TEXTS = {
    "number": (3, "int: 3"),
    "missing caption": (["um gato", None], "NoneType: None"),
    "empty list": ([], "empty list"),
    "none": (None, "at least one input"),  # an error of transformers
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_texts_are_refused_by_name(tiny_processor, kind):
    text, message = BAD_TEXTS[kind]
    with pytest.raises(ValueError, match=message):
        tiny_processor(text=text)
