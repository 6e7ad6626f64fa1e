"""The caption benchmark at small size: its programs give the same tokens."""

import json

import pytest

from benchmarks.captions import CaptionsArguments, main, scaled_captioner
from captions.generate import PREFIXES, read_prefixes


@pytest.mark.slow
def test_the_model_has_the_proportions_of_the_real_one():
    model = scaled_captioner(CaptionsArguments(), read_prefixes(PREFIXES)).model
    vision, language = model.config.vision_config, model.config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size) == (352, 6, 1536)
    assert (language.hidden_size, language.num_hidden_layers, language.vocab_size) == (640, 5, 12576)
    assert model.config.qformer_config.hidden_size == 192


def test_programs_give_the_same_tokens(tmp_path, capsys):
    sizes = ["--widths", "16", "--layers", "12", "--images", "2", "--new_tokens", "3", "--runs", "1"]
    main([*sizes, "--output", str(tmp_path / "c.json")])
    results = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    found = results["measured"]["generate"]
    assert found["same_tokens"] and found["prefixes"] == 10
    assert set(found["rows_per_second"]) == {"plain", "ours"} and found["gain_ours"]["measured"] > 0
