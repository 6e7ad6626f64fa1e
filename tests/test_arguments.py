"""Arguments of a training run from a file and from flags, and the optimizer and schedule that they configure."""

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


def test_defaults_are_the_recipe_of_the_paper():
    args = parse_arguments(RunArguments, None, MINIMUM, config=True)
    assert (args.effective_batch_size, args.max_steps, args.warmup_steps) == (2816, 5863, 500)
    assert (args.learning_rate, args.min_learning_rate, args.weight_decay) == (5e-7, 1e-7, 0.2)
    assert (ADAM_BETAS, args.adam_epsilon) == ((0.9, 0.98), 1e-8)


def test_settings_are_json_compatible_even_with_paths(tmp_path):
    settings = arguments(image_roots=tmp_path, output_dir=tmp_path / "o").to_dict()
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["image_roots"], settings["output_dir"]) == ([str(tmp_path)], str(tmp_path / "o"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: m\ndataset: d\nlearning_rat: 1\n", "`learning_rat`.*`learning_rate`"),
        ("model: m\ndataset: d\ntowers: both\n", "`towers`"),
        ("model: m\ndataset: d\naugmented_views: 0\n", "augmented_views.* --image_embedding_cache off"),
        ("model: m\ndataset: d\nmax_steps: {a: 1}\n", "max_steps.*mapping"),
        ("- a\n- b\n", "run.yaml"),
        ("a: [", "^[^\\n]*YAML[^\\n]*$"),
        ("dataset: d\n", "`model`.*--model"),
        ("model: m\ndataset: d\neffective_batch_size: 1\n", r"effective_batch_size\b.*\b2\b.*\b1\b"),
        ("model: m\ndataset: d\nwarmup_steps: 9\nmax_steps: 5\n", r"warmup_steps\b.*\b0\b.*\b5\b.*\b9\b"),
        ("model: m\ndataset: d\nlearning_rate: 1e-8\n", "min_learning_rate.*1e-08.*1e-07"),
        ("model: m\ndataset: d\nadam_epsilon: 1\n", r"adam_epsilon\b.*\b0\b.*\b1\b.*\b1\b"),
    ],
)
def test_an_error_names_the_invalid_key_and_its_value(tmp_path, text, named):
    with pytest.raises(ValueError, match=named):
        parse_arguments(RunArguments, None, config(tmp_path, text), config=True)


def test_an_unknown_flag_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"`--lora_ranks`.*`--lora_rank`"):
        parse_arguments(RunArguments, None, [*MINIMUM, "--lora_ranks", "1"], config=True)


def test_help_lists_required_flags_first_and_every_flag_in_a_group(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(RunArguments, None, ["--help"], config=True)
    text = capsys.readouterr().out
    names = [f"\n  --{name}" for name in ("config", "model", "dataset", "language", "max_steps", "output_dir")]
    places = [text.index(name) for name in names]
    assert places == sorted(places), "options, required, data, …, batch, …, output"


def test_there_are_at_most_fifty_flags():
    assert len(RunArguments.__dataclass_fields__) < 50  # --config is one more


def test_the_learning_rate_warms_up_linearly_and_decays_as_a_cosine():
    args = arguments(learning_rate=5e-7, min_learning_rate=1e-7, warmup_steps=500, max_steps=5863)
    assert learning_rate_at(0, args) == 1e-7
    assert learning_rate_at(250, args) == pytest.approx(3e-7)
    assert learning_rate_at(500, args) == pytest.approx(5e-7)
    assert learning_rate_at((500 + 5863) / 2, args) == pytest.approx(3e-7)
    assert learning_rate_at(5863, args) == pytest.approx(1e-7)


@pytest.mark.parametrize(("name", "coupled"), [("adam", True), ("adamw", False)])
def test_weight_decay_is_coupled_in_adam_and_decoupled_in_adamw(tiny_model, name, coupled):
    """With zero gradients, coupled L2 moves a weight by the learning rate, decoupled decay by a small part of it."""
    tiny_model.freeze_image_encoder()
    optimizer = build_optimizer(tiny_model, arguments(learning_rate=1e-3, weight_decay=0.2, optimizer=name))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in tiny_model.parameters() if p.requires_grad}
    weight = tiny_model.text_projection[0].weight
    before = weight.detach().clone()
    for parameter in tiny_model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    large = before.abs() > 1e-3  # Adam's epsilon matters for smaller weights
    expected = -1e-3 * before[large].sign() if coupled else -1e-3 * 0.2 * before[large]
    torch.testing.assert_close((weight - before)[large], expected, rtol=2e-2, atol=1e-7)
