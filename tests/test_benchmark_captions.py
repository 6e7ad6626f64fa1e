"""The caption benchmark at small size: formulas count what is computed, and programs give the same tokens."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import blip2_proportions as blip2
from benchmarks.captions import PARTS, PROGRAMS, generation_steps, main
from captions import sentence_stage
from captions.captioner import Blip2Captioner, Decoding
from captions.generate import read_prefixes
from captions.stage_arguments import PREFIXES

SMALL = blip2.REAL.scaled(16, 12)
IMAGES, NEW_TOKENS = 2, 3


@pytest.fixture(scope="module")
def steps():
    prefixes = read_prefixes(PREFIXES)
    tokenizer = blip2.build_tokenizer(prefixes)
    model = blip2.build_model(SMALL, tokenizer)
    model.set_attn_implementation("eager")  # PyTorch does not count the FLOP of the CPU's fused attention
    captioner = Blip2Captioner(model, blip2.build_image_processor(), tokenizer, Decoding(max_new_tokens=NEW_TOKENS))
    assert max(len(captioner.prompt(prefix)) for prefix in prefixes) == 7
    return generation_steps(captioner, prefixes, IMAGES)


def test_programs_give_the_same_tokens(steps):
    tokens = [step(0) for step in steps.values()]
    assert tuple(steps) == PROGRAMS[:3]
    assert tokens[0].shape == (10 * IMAGES, NEW_TOKENS)
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("program", PROGRAMS[:3])
def test_formulas_count_what_the_model_computes(steps, program):
    with FlopCounterMode(display=False) as counter:
        steps[program](0)
    expected = IMAGES * blip2.flops(SMALL, 7, NEW_TOKENS)[program]
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_small_model_keeps_the_proportions():
    full, scaled = blip2.gains(blip2.REAL, 7, 12), blip2.gains(blip2.REAL.scaled(4, 6), 7, 12)
    assert full["encoded_once"] == pytest.approx(2.59, abs=0.05) and full["ours"] == pytest.approx(4.86, abs=0.1)
    for name, gain in full.items():
        assert scaled[name] == pytest.approx(gain, rel=0.08)


def test_whole_benchmark_at_small_size(tmp_path, capsys, monkeypatch):
    # The benchmark puts its own translator in place of this; other tests shall find it again.
    monkeypatch.setattr(sentence_stage, "open_translator", sentence_stage.open_translator)
    sizes = ["--widths", "16", "--layers", "12", "--images", "2", "--new_tokens", "3", "--translated_rows", "2"]
    main(["--parts", "generate", "translate", "select", *sizes, "--selected_rows", "20", "--runs", "1",
          "--output", str(tmp_path / "c.json")])  # fmt: skip
    results = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    measured = results["measured"]
    assert set(measured) == set(PARTS) - {"score", "engine"}
    assert measured["generate"]["same_tokens"] and measured["generate"]["gain_ours"]["predicted"] > 5
    assert measured["translate"]["gain_memory"]["predicted"] == 2
    rates = [rate for found in measured.values() for rate in found["rows_per_second"].values()]
    assert len(rates) == 8 and all(rate["median"] > 0 for rate in rates)


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="parts must be of generate, translate, score, select"):
        main(["--parts", "bake"])
