"""The benchmark of trimmed vocabularies, with tiny models and small vocabularies."""

import json

import pytest
from tiny import tiny_tokenizer
from towers import TOWER
from transformers import MetaClip2Config, MetaClip2Model, SiglipConfig, SiglipModel

from benchmarks import tools
from benchmarks import trim_vocabulary as bench
from modeling_capivara.trim_vocabulary import frequent_words

SIZES = {"siglip2": 3000, "metaclip2": 400}
VISION = TOWER | {"patch_size": 32, "image_size": 224, "num_hidden_layers": 5}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Replace the published sizes, and run workers in this process."""
    words = [
        word for pair in zip(*(frequent_words(code, 1000) for code in ("pt", "de", "pl")), strict=True) for word in pair
    ]
    monkeypatch.setattr(bench, "iter_words_of_all_languages", lambda: iter(dict.fromkeys(words)))
    monkeypatch.setattr(bench, "load_tokenizer", tiny_tokenizer)
    monkeypatch.setattr(bench, "SIGLIP_VOCABULARY_SIZE", SIZES["siglip2"])
    monkeypatch.setattr(bench, "XLM_V_VOCABULARY_SIZE", SIZES["metaclip2"])

    def build(name):
        text = TOWER | {"vocab_size": SIZES[name], "max_position_embeddings": 64}
        if name == "siglip2":
            return SiglipModel, SiglipConfig(
                text_config=text | {"projection_size": VISION["hidden_size"]}, vision_config=VISION
            )
        return MetaClip2Model, MetaClip2Config(text_config=text | {"eos_token_id": 2}, vision_config=VISION)

    def run(module, models, **flags):
        return bench.build_or_measure_model(bench.TrimBenchmarkArguments(models=[models], **flags))

    monkeypatch.setattr(bench, "get_base_class_and_config", build)
    monkeypatch.setattr(
        tools,
        "run_module_in_subprocess",
        lambda module, folder, **flags: run(module, folder=bench.Path(folder), **flags),
    )


@pytest.mark.parametrize("name", [pytest.param("siglip2", marks=pytest.mark.slow), "metaclip2"])
def test_the_saving_is_that_of_the_removed_rows(name, tmp_path):
    output = tmp_path / "o.json"
    output.write_text(json.dumps({"capivara": {"kept": True}}), encoding="utf-8")
    bench.main(["--models", name, "--words", "100", "50", "--captions", "3", "--runs", "2", "--output", str(output)])
    results = json.loads(output.read_text(encoding="utf-8"))
    measured = results[name]
    assert results["capivara"] == {"kept": True}, "results of bases that were not measured are kept"
    before, after = measured["before"], measured["after"]
    assert before["tokens"] == SIZES[name] > 1.2 * after["tokens"] and measured["vocabulary"] == "synthesized"
    model_class, config = bench.get_base_class_and_config(name)
    assert before["parameters"] == model_class(config).num_parameters(), "with the published image tower"
    removed = (before["tokens"] - after["tokens"]) * TOWER["hidden_size"]
    assert before["parameters"] - after["parameters"] == removed
    assert before["download_bytes"] - after["download_bytes"] > 4 * removed, "the tokenizer has shrunk, too"
    assert measured["speed_ratio"] > 0 and measured["runs"] == 2 and before["memory_bytes"] > 0


def test_synthesized_tokenizers_have_the_requested_size_and_split_words():
    bpe = bench.synthesize_bpe_tokenizer(3000)
    assert len(bpe) == 3000 and bpe.tokenize(" não") == ["▁não"]
    assert bpe.tokenize(" 鮫") == ["▁", "<0xE9>", "<0xAE>", "<0xAB>"]
    known = len(tiny_tokenizer())
    unigram = bench.synthesize_unigram_tokenizer(400)
    assert len(unigram) == 400 > known and unigram.pad_token_id == 1 and unigram("não")["input_ids"][-1] == 2
    added = next(token for token, number in unigram.get_vocab().items() if number == 399)
    assert unigram.tokenize(added.removeprefix("▁")) == [added]


def test_unknown_bases_are_refused():
    with pytest.raises(ValueError, match=r"metaclip2.*'?nothing\b"):
        bench.TrimBenchmarkArguments(models=["nothing"])
