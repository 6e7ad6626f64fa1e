"""The caption benchmark at small size: its programs give the same tokens."""

import json

import pytest
import torch

from benchmarks.captions import PARTS, PROGRAMS, CaptionsArguments, generation_steps, main, scaled_captioner
from captions import translate
from captions.generate import read_prefixes
from captions.stage_arguments import PREFIXES

IMAGES, NEW_TOKENS = 2, 3


@pytest.fixture(scope="module")
def steps():
    prefixes = read_prefixes(PREFIXES)
    sizes = CaptionsArguments(widths=16, layers=12, images=IMAGES, new_tokens=NEW_TOKENS)
    captioner = scaled_captioner(sizes, prefixes)
    assert max(len(captioner.prompt(prefix)) for prefix in prefixes) == 7
    return generation_steps(captioner, prefixes, IMAGES)


def test_programs_give_the_same_tokens(steps):
    tokens = [step(0) for step in steps.values()]
    assert tuple(steps) == PROGRAMS[:3]
    assert tokens[0].shape == (10 * IMAGES, NEW_TOKENS)
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


@pytest.mark.slow
def test_the_model_has_the_proportions_of_the_real_one():
    model = scaled_captioner(CaptionsArguments(), read_prefixes(PREFIXES)).model
    vision, language = model.config.vision_config, model.config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size) == (352, 6, 1536)
    assert (language.hidden_size, language.num_hidden_layers, language.vocab_size) == (640, 5, 12576)
    assert model.config.qformer_config.hidden_size == 192


@pytest.mark.slow
def test_whole_benchmark_at_small_size(tmp_path, capsys, monkeypatch):
    # The benchmark puts its own translator in place of this; other tests shall find it again.
    monkeypatch.setattr(translate, "open_translator", translate.open_translator)
    sizes = ["--widths", "16", "--layers", "12", "--images", "2", "--new_tokens", "3", "--translated_rows", "2"]
    main(["--parts", "generate", "translate", "select", *sizes, "--selected_rows", "20", "--runs", "1",
          "--output", str(tmp_path / "c.json")])  # fmt: skip
    results = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    measured = results["measured"]
    assert set(measured) == set(PARTS) - {"score"}
    assert measured["generate"]["same_tokens"]
    assert measured["generate"]["gain_ours"]["measured"] > 0 and measured["translate"]["gain_memory"]["measured"] > 0
    rates = [rate for found in measured.values() for rate in found["rows_per_second"].values()]
    assert len(rates) == 8 and all(rate["median"] > 0 for rate in rates)


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="invalid choice: 'bake'"):
        main(["--parts", "bake"])
