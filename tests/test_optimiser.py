"""The recipe's optimiser and schedule."""

import pytest
import torch

from training.arguments import parse_arguments
from training.trainable import build_optimizer, learning_rate_at


def arguments(**values):
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return parse_arguments(["--model", "m", "--dataset", "d", *flags], "")


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
    tiny_model.freeze_image_tower()
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
