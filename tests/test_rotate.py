"""The rotation to principal axes keeps cosines, truncated embeddings lose little, and invalid input is refused."""

import copy
import re

import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import save_file
from tiny import randomize, tiny_config
from torch.nn.functional import normalize

from modeling_capivara import CapivaraConfig, CapivaraModel
from modeling_capivara.loading import load_model
from training.interpolate import main as interpolate
from training.rotate import ROTATION_FILE, compute_principal_rotation, load_rotation, rotate_model_
from training.rotate import main as rotate


def random_embeds(images: int = 200, width: int = 24) -> torch.Tensor:
    """Return unit vectors around a mean, with a different variance in each direction."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(2, 0.05, width)[torch.randperm(width, generator=generator)]
    return normalize(torch.randn(images, width, generator=generator) * spread + 0.3, dim=-1)


def test_the_rotation_is_orthogonal_and_sorts_axes_by_variance():
    embeds = random_embeds()
    rotation = compute_principal_rotation(embeds)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(24), atol=1e-6, rtol=0)
    power = (embeds @ rotation.T).square().mean(dim=0)
    assert (power.diff() <= 1e-6).all() and power[:6].sum() > embeds.square().mean(dim=0).topk(6).values.sum()
    torch.testing.assert_close(compute_principal_rotation(embeds.flip(0)), rotation, atol=1e-5, rtol=0)
    assert (rotation.gather(1, rotation.abs().argmax(dim=1, keepdim=True)) > 0).all()
    for fault in (torch.empty(0, 24), torch.full((3, 24), torch.nan)):
        with pytest.raises(ValueError, match=rf"\b{len(fault)}\b"):
            compute_principal_rotation(fault)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_rotated_model_has_the_same_cosines(kind, tiny_processor, tmp_path):
    model = randomize(CapivaraModel(tiny_config(text_projection_type=kind))).eval()
    inputs = tiny_processor(text=["um gato", "a casa azul"], return_tensors="pt")
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rotated, rotation = copy.deepcopy(model), compute_principal_rotation(random_embeds())
    rotate_model_(rotated, rotation)
    with torch.no_grad():
        before, after = model(**inputs), rotated(**inputs)
    torch.testing.assert_close(after.logits_per_text, before.logits_per_text, atol=2e-5, rtol=0)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(getattr(before, name) @ rotation.T, getattr(after, name), atol=1e-6, rtol=0)
        assert (getattr(before, name) - getattr(after, name)).abs().max() > 0.1
    save_file({"rotation": rotation}, tmp_path / ROTATION_FILE)
    assert torch.equal(load_rotation(tmp_path), rotation)
    with pytest.raises(ValueError, match=r"\b24\b.*\b16\b"):
        rotate_model_(model, torch.eye(16))


@pytest.mark.parametrize("side", ["text", "image"])
def test_features_are_truncated_to_the_first_dimensions(side, tiny_model):
    inputs = torch.randn(2, 3, 32, 32) if side == "image" else torch.tensor([[0, 9, 2], [0, 7, 2]])
    features = getattr(tiny_model, f"get_{side}_features")
    whole = features(inputs).pooler_output
    assert torch.equal(features(inputs, truncate_dim=5).pooler_output, whole[:, :5])
    assert torch.equal(features(inputs, truncate_dim=24).pooler_output, whole)
    for dim in (0, 25, -1):
        with pytest.raises(ValueError, match=rf"truncate_dim\b.*\b24\b.*{dim}\b"):
            features(inputs, truncate_dim=dim)


def test_the_configuration_stores_widths_that_divide_the_embedding(tmp_path):
    assert tiny_config().matryoshka_dims is None
    tiny_config(matryoshka_dims=[6, 12, 24, 6]).save_pretrained(tmp_path)
    assert CapivaraConfig.from_pretrained(tmp_path).matryoshka_dims == [24, 12, 6]
    for dims, wrong in (([12, 9], 9), ([48], 48), ([0], 0)):
        with pytest.raises(ValueError, match=rf"matryoshka_dims\b.*\b24\b.*\b{wrong}\b.*\b24, 12, 8, 6"):
            tiny_config(matryoshka_dims=dims)


@pytest.mark.slow
def test_the_command_rotates_a_trained_model(tiny_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixel_arrays = [torch.randint(256, (36, 40, 3), generator=generator).byte().numpy() for _ in range(40)]
    images = [Image.fromarray(pixels) for pixels in pixel_arrays]  # more images than dimensions
    data = Dataset.from_dict({"image": images, "captions-pt": [["foto"]] * 40})
    DatasetDict(train=data.cast_column("image", ImageFeature())).save_to_disk(tmp_path / "many")
    rotated = tmp_path / "rotated"
    argv = [str(tiny_folder), "--dataset", str(tmp_path / "many"), "--dims", "12", "8", "--output", str(rotated)]
    rotate(argv)
    before, after, rotation = load_model(tiny_folder).eval(), load_model(rotated).eval(), load_rotation(rotated)
    assert after.config.matryoshka_dims == [12, 8]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds = [model(pixel_values=pixels).image_embeds for model in (before, after)]
    torch.testing.assert_close(embeds[0] @ rotation.T, embeds[1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=re.escape(str(rotated))):
        rotate(argv)
    with pytest.raises(ValueError, match=r"rotated\b.*rotation\.safetensors"):
        rotate([str(rotated), *argv[1:-1], str(tmp_path / "again")])
    interpolate([str(tiny_folder), str(rotated), "--share", "0.5", "--output", str(tmp_path / "half")])
    half = load_model(tmp_path / "half").state_dict()
    for name, weight in after.state_dict().items():  # the base is rotated, too, so nothing differs
        torch.testing.assert_close(half[name], weight, atol=1e-6, rtol=0)


def test_too_few_images_or_an_invalid_width_are_refused(tiny_folder, tiny_dataset_folder, tmp_path):
    output = tmp_path / "rotated"
    argv = [str(tiny_folder), "--dataset", str(tiny_dataset_folder), "--output", str(output), "--dims"]
    with pytest.raises(ValueError, match=r"\b24\b.*\b12\b"):
        rotate([*argv, "12"])
    with pytest.raises(ValueError, match=r"\b24\b.*\b9\b"):
        rotate([*argv, "9"])
    assert not output.exists()
