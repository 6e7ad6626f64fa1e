"""Prefixes of embeddings: their loss and its gradients, the rotation before it, and the widths that are refused."""

import copy
import re
from dataclasses import fields

import pytest
import torch
from test_contrastive import by_two_processes, check_joined, sides
from tiny import randomise, tiny_config
from torch.nn.functional import normalize

from modeling_capivara import CapivaraConfig, CapivaraModel, clip_loss
from training.contrastive import contrastive_gradients
from training.images import TrainingImages
from training.inputs import Inputs
from training.matryoshka import load_rotation, matryoshka_gradients, principal_rotation, rotate_, save_rotation

DIMS = [8, 4, 1]


def plain_loss(texts, images, scale, widths) -> torch.Tensor:
    losses = [clip_loss(normalize(texts[:, :w], dim=-1), normalize(images[:, :w], dim=-1), scale) for w in widths]
    return torch.stack(losses).mean()


def space(images: int = 200, width: int = 24) -> torch.Tensor:
    """Unit vectors around a mean, some directions of more variance than others."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(2, 0.05, width)[torch.randperm(width, generator=generator)]
    return normalize(torch.randn(images, width, generator=generator) * spread + 0.3, dim=-1)


@pytest.mark.parametrize("tile", [3, None])
def test_gradients_are_those_of_the_plain_formula(tile):
    texts, images = sides(11)
    scale = torch.tensor(2.9, requires_grad=True)
    loss = plain_loss(texts, images, scale, [16, *DIMS])
    loss.backward()
    result = matryoshka_gradients(
        texts.detach(), images.detach(), scale.detach(), torch.arange(11), dims=DIMS, image_gradient=True,
        tile_rows=tile,
    )  # fmt: skip
    torch.testing.assert_close(result.loss, loss.detach())
    for name, wanted in {"text_embeds": texts, "image_embeds": images, "logit_scale": scale}.items():
        torch.testing.assert_close(getattr(result, name), wanted.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_prefix_that_counts_more_would_be_another_loss():
    texts, images = (side.detach() for side in sides(11))
    scale, pairs = torch.tensor(2.9), torch.arange(11)
    losses = [matryoshka_gradients(texts, images, scale, pairs, dims=dims).loss for dims in ([], [8], [8, 4])]
    assert losses[0] == contrastive_gradients(texts, images, scale, pairs).loss
    assert len({round(loss.item(), 4) for loss in losses}) == 3


@pytest.mark.parametrize("dims", [[], [16]])
def test_without_prefixes_it_is_the_loss_of_the_whole_to_the_bit(dims):
    texts, images = (side.detach() for side in sides(7))
    found, expected = (
        loss(texts, images, torch.tensor(2.0), torch.arange(7), **options)
        for loss, options in ((matryoshka_gradients, {"dims": dims}), (contrastive_gradients, {}))
    )
    assert torch.equal(found.text_embeds, expected.text_embeds) and found.image_embeds is None
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logit_scale, expected.logit_scale)


def test_two_processes_equal_one():
    check_joined(*by_two_processes(matryoshka_gradients, cut=4, dims=DIMS), rtol=1e-4, atol=1e-6)


def test_the_rotation_is_orthogonal_and_puts_the_most_first():
    embeds = space()
    rotation = principal_rotation(embeds)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(24), atol=1e-6, rtol=0)
    kept = (embeds @ rotation.T).square().mean(dim=0)
    assert (kept.diff() <= 1e-6).all() and kept[:6].sum() > embeds.square().mean(dim=0).topk(6).values.sum()
    torch.testing.assert_close(principal_rotation(embeds.flip(0)), rotation, atol=1e-5, rtol=0)
    assert (rotation.gather(1, rotation.abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("fault", [torch.empty(0, 24), torch.full((3, 24), torch.nan)])
def test_no_rotation_of_nothing(fault):
    with pytest.raises(ValueError, match="needs finite embeddings of images"):
        principal_rotation(fault)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_turned_model_has_the_same_cosines(kind, tiny_processor, tmp_path):
    model = randomise(CapivaraModel(tiny_config(text_projection_type=kind))).eval()
    inputs = tiny_processor(text=["um gato", "a casa azul"], return_tensors="pt")
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    turned, rotation = copy.deepcopy(model), principal_rotation(space())
    rotate_(turned, rotation)
    with torch.no_grad():
        before, after = model(**inputs), turned(**inputs)
    torch.testing.assert_close(after.logits_per_text, before.logits_per_text, atol=2e-5, rtol=0)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(getattr(before, name) @ rotation.T, getattr(after, name), atol=1e-6, rtol=0)
        assert (getattr(before, name) - getattr(after, name)).abs().max() > 0.1
    assert load_rotation(tmp_path) is None
    save_rotation(rotation, tmp_path)
    assert torch.equal(load_rotation(tmp_path), rotation)


def test_all_that_is_trained_and_validated_on_is_turned():
    """And nothing of the base, whose figures are those before."""
    rotation, embeds = principal_rotation(space()), space(5)
    empty = dict.fromkeys(field.name for field in fields(Inputs))
    given = {"images": TrainingImages([]), "validation_embeds": embeds, "teacher_validation": ([["a"]], embeds)}
    inputs = Inputs(**{**empty, **given, "test_embeds": embeds})
    inputs.turn(rotation)
    for turned in (inputs.validation_embeds, inputs.teacher_validation[1]):
        torch.testing.assert_close(turned, embeds @ rotation.T)
    assert inputs.images.rotation is inputs.rotation is rotation and inputs.test_embeds is embeds


def test_a_rotation_of_another_width_is_refused(tiny_model):
    with pytest.raises(ValueError, match="of 16 dimensions, the model's embeddings are of 24"):
        rotate_(tiny_model, torch.eye(16))


@pytest.mark.parametrize("side", ["text", "image"])
def test_features_are_cut(side, tiny_model):
    given = torch.randn(2, 3, 32, 32) if side == "image" else torch.tensor([[0, 9, 2], [0, 7, 2]])
    features = getattr(tiny_model, f"get_{side}_features")
    whole = features(given).pooler_output
    assert torch.equal(features(given, truncate_dim=5).pooler_output, whole[:, :5])
    assert torch.equal(features(given, truncate_dim=24).pooler_output, whole)
    for dim in (0, 25, -1):
        with pytest.raises(ValueError, match=f"truncate_dim must be from 1 to the embedding's width, 24, got {dim}"):
            features(given, truncate_dim=dim)


def test_widths_are_kept_in_the_configuration(tmp_path):
    assert tiny_config().matryoshka_dims is None
    tiny_config(matryoshka_dims=[6, 12, 24, 6]).save_pretrained(tmp_path)
    assert CapivaraConfig.from_pretrained(tmp_path).matryoshka_dims == [24, 12, 6]


@pytest.mark.parametrize(
    ("dims", "fault"), [([12, 9], "9 does not divide it"), ([48], "48 exceeds it"), ([0], "0 is below 1")]
)
def test_widths_that_do_not_divide_are_refused(dims, fault):
    message = f"matryoshka_dims must divide the embedding's width, 24, and {fault}; choose of 24, 12, 8, 6"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(matryoshka_dims=dims)
