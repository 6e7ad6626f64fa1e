"""Arguments: a file and flags, read by the same code; every slip is named. The optimiser and schedule that they set."""

import json

import pytest
import torch

from capivara_common.cli import parse_arguments
from training.arguments import RunArguments
from training.trainable import ADAM_BETAS, build_optimizer, learning_rate_at

MINIMUM = ["--model", "m", "--dataset", "d"]


def config(tmp_path, text: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def arguments(**values):
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return parse_arguments(RunArguments, None, [*MINIMUM, *flags], config=True)


def test_defaults_are_the_paper_s_recipe():
    args = parse_arguments(RunArguments, None, MINIMUM, config=True)
    assert (args.effective_batch_size, args.max_steps, args.warmup_steps) == (2816, 5863, 500)
    assert (args.learning_rate, args.min_learning_rate, args.weight_decay) == (5e-7, 1e-7, 0.2)
    assert (ADAM_BETAS, args.adam_epsilon) == ((0.9, 0.98), 1e-8)


def test_settings_are_json_with_image_roots_and_all(tmp_path):
    settings = arguments(image_roots=tmp_path, output_dir=tmp_path / "o").to_dict()
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["image_roots"], settings["output_dir"]) == ([str(tmp_path)], str(tmp_path / "o"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ndataset: d\nlearning_rat: 1\n", "`learning_rat`. Did you mean `learning_rate`"),
        ("model: m\ndataset: d\naugmented_views: 0\n", "augmented_views 0 .* --image_embedding_cache off"),
        ("model: m\ndataset: d\nmax_steps: {a: 1}\n", "got a mapping"),
        ("- a\n- b\n", "must hold `key: value` lines"),
        ("a: [", "^[^\\n]* is not valid YAML[^\\n]*$"),
        ("dataset: d\n", "`model` is missing"),
        ("model: m\ndataset: d\neffective_batch_size: 1\n", "effective_batch_size must be at least 2, got 1"),
        ("model: m\ndataset: d\nwarmup_steps: 9\nmax_steps: 5\n", "warmup_steps must be from 0 to 5, got 9"),
        ("model: m\ndataset: d\nlearning_rate: 1e-8\n", "min_learning_rate must be from 0 to 1e-08, got 1e-07"),
        ("model: m\ndataset: d\nadam_epsilon: 1\n", "adam_epsilon must be a number above 0 and below 1, got 1"),
    ],
)
def test_bad_config(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(RunArguments, None, config(tmp_path, text), config=True)


@pytest.mark.parametrize("flag", sorted(RunArguments.gone))
def test_a_flag_of_before_is_answered_with_what_there_is(flag):
    with pytest.raises(ValueError, match=rf"^`--{flag}` is gone: [^\n]+\.$"):
        parse_arguments(RunArguments, None, [*MINIMUM, f"--{flag}", "1"], config=True)
    assert flag not in RunArguments.__dataclass_fields__


def test_there_are_no_more_flags_than_one_can_read():
    assert len(RunArguments.__dataclass_fields__) < 50  # with --config at most 50


def test_schedule():
    args = arguments(learning_rate=5e-7, min_learning_rate=1e-7, warmup_steps=500, max_steps=5863)
    assert learning_rate_at(0, args) == 1e-7
    assert learning_rate_at(250, args) == pytest.approx(3e-7)
    assert learning_rate_at(500, args) == pytest.approx(5e-7)
    assert learning_rate_at((500 + 5863) / 2, args) == pytest.approx(3e-7)
    assert learning_rate_at(5863, args) == pytest.approx(1e-7)


@pytest.mark.parametrize(("name", "coupled"), [("adam", True), ("adamw", False)])
def test_penalty_is_coupled_in_adam_and_decoupled_in_adamw(tiny_model, name, coupled):
    """A penalty alone moves a weight by the whole learning rate under Adam, by a tiny share of it under AdamW."""
    tiny_model.freeze_image_encoder()
    optimizer = build_optimizer(tiny_model, arguments(learning_rate=1e-3, weight_decay=0.2, optimizer=name))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in tiny_model.parameters() if p.requires_grad}
    weight = tiny_model.text_projection[0].weight
    before = weight.detach().clone()
    for parameter in tiny_model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    some = before.abs() > 1e-3
    expected = -1e-3 * before[some].sign() if coupled else -1e-3 * 0.2 * before[some]
    torch.testing.assert_close((weight - before)[some], expected, rtol=2e-2, atol=1e-7)
