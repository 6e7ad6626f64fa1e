"""The shortened last layer of image towers: same embeddings, less work, and no trace after the `with` block."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from towers import MAKERS

from modeling_capivara import CapivaraConfig, CapivaraModel
from modeling_capivara.class_token import last_layer_for_class_token_only
from modeling_capivara.loading import load_model
from modeling_capivara.two_towers import compute_image_embeds, compute_image_embeds_in_chunks

SHORTENED = ("capivara", "clip", "chinese_clip", "altclip", "metaclip_2")


@pytest.fixture(params=["capivara", *MAKERS])
def model(request, tiny_folder, tmp_path):
    """A model of each kind in evaluation mode, with the name of its kind in the attribute `kind`."""
    if request.param != "capivara":
        MAKERS[request.param](tmp_path / "model")
    model = load_model(tiny_folder if request.param == "capivara" else tmp_path / "model").eval()
    model.kind = request.param
    return model


@torch.inference_mode()
def test_the_embeddings_stay_the_same(model):
    pixels = torch.randn(5, 3, 32, 32)
    expected = compute_image_embeds(model, pixels)
    embeds = compute_image_embeds_in_chunks(model, pixels, torch.device("cpu"), 2)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    assert torch.equal(compute_image_embeds(model, pixels), expected)


@torch.inference_mode()
def test_only_the_class_token_passes_the_last_mlp(model):
    layers = getattr(getattr(model.vision_model, "encoder", None), "layers", None)
    if layers is None:
        pytest.skip("this image tower has no list of CLIP layers")
    lengths = []
    layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    pixels = torch.randn(2, 3, 32, 32)
    compute_image_embeds_in_chunks(model, pixels, torch.device("cpu"))
    compute_image_embeds(model, pixels)
    assert lengths[1] > 1 and lengths[0] == (1 if model.kind in SHORTENED else lengths[1])


@torch.inference_mode()
def test_a_vit_b_32_needs_seven_percent_fewer_operations():
    """The figure of the module's docstring and the CHANGELOG, counted for the published sizes without memory."""
    operations = []
    with torch.device("meta"):
        model, pixels = CapivaraModel(CapivaraConfig()).eval(), torch.empty(2, 3, 224, 224)
    for context in (nullcontext(), last_layer_for_class_token_only(model)):
        with context, FlopCounterMode(display=False) as counter:
            compute_image_embeds(model, pixels)
        operations.append(counter.get_total_flops())
    assert 1 - operations[1] / operations[0] == pytest.approx(0.07, abs=0.005)


def test_an_error_in_the_block_restores_the_layer(tiny_folder):
    model = load_model(tiny_folder).eval()
    with pytest.raises(KeyError), last_layer_for_class_token_only(model):
        assert "forward" in vars(model.vision_model.encoder.layers[-1])
        raise KeyError
    assert "forward" not in vars(model.vision_model.encoder.layers[-1])
