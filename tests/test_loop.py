"""Parts of the training loop, without a complete run."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import randomize
from towers import TOWER, VISION
from transformers import SiglipConfig, SiglipModel

from modeling_capivara.two_towers import compute_image_embeds, freeze_image_encoder
from training.arguments import RunArguments
from training.batches import MicroBatch, StepPlan
from training.checkpoints import TrainingState
from training.loop import TrainingLoop
from training.trainable import build_optimizer


def make_loop(model) -> TrainingLoop:
    """Make a training loop that is ready for a step. It has no data and no checkpoints."""
    args = RunArguments(model="m", dataset=["d"], weight_decay=0.0)
    loop = TrainingLoop(args, None, model, model, None, TrainingState())
    loop.accelerator, loop.prepared_model = Accelerator(cpu=True), model
    loop.optimizer = build_optimizer(model, args)
    return loop


@pytest.mark.parametrize(
    ("before", "gradient", "after"),
    [(4.6, -1.0, math.log(100)), (0.05, 1.0, 0.0), (2.0, 1.0, 1.9)],  # ln 100 is 4.605; Adam's first step is 0.1
)
def test_every_update_clamps_the_logit_scale(tiny_model, before, gradient, after):
    tiny_model.logit_scale.data.fill_(before)
    tiny_model.logit_scale.grad = torch.tensor(gradient)
    make_loop(tiny_model)._update_weights(learning_rate=0.1)
    assert tiny_model.logit_scale.item() == pytest.approx(after)


def test_images_of_a_step_are_embedded_without_dropout():
    """`train()` of transformers' own models puts a frozen image tower into training mode, too."""
    text = TOWER | {"vocab_size": 300, "projection_size": 32, "bos_token_id": 0, "eos_token_id": 1}
    config = SiglipConfig(text_config=text, vision_config=VISION | {"attention_dropout": 0.5})
    model, pixels = randomize(SiglipModel(config)).eval(), torch.randn(3, 3, 32, 32)
    freeze_image_encoder(model)
    with torch.no_grad():
        expected = compute_image_embeds(model, pixels)
        assert not torch.allclose(compute_image_embeds(model.train(), pixels), expected, atol=1e-3), (
            "dropout must make a difference"
        )
    places = np.arange(3)
    plan = StepPlan(0, places, places, places, ["um gato"] * 3, [MicroBatch(0, 0, torch.zeros(3, 1))])
    _, embeds = make_loop(model)._load_image_embeds(plan, iter([[*pixels]]))
    torch.testing.assert_close(embeds, expected)
