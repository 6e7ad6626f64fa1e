"""The rotation that puts the most of an embedding first, and the widths that are refused."""

import copy
import re

import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image
from tiny import randomise, tiny_config
from torch.nn.functional import normalize

from modeling_capivara import CapivaraConfig, CapivaraModel
from modeling_capivara.loading import load_model
from training.interpolate import main as interpolate
from training.rotate import compute_principal_rotation, load_rotation, rotate_model_, save_rotation
from training.rotate import main as rotate


def space(images: int = 200, width: int = 24) -> torch.Tensor:
    """Unit vectors around a mean, some directions of more variance than others."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(2, 0.05, width)[torch.randperm(width, generator=generator)]
    return normalize(torch.randn(images, width, generator=generator) * spread + 0.3, dim=-1)


def test_the_rotation_is_orthogonal_and_puts_the_most_first():
    embeds = space()
    rotation = compute_principal_rotation(embeds)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(24), atol=1e-6, rtol=0)
    kept = (embeds @ rotation.T).square().mean(dim=0)
    assert (kept.diff() <= 1e-6).all() and kept[:6].sum() > embeds.square().mean(dim=0).topk(6).values.sum()
    torch.testing.assert_close(compute_principal_rotation(embeds.flip(0)), rotation, atol=1e-5, rtol=0)
    assert (rotation.gather(1, rotation.abs().argmax(dim=1, keepdim=True)) > 0).all()
    for fault in (torch.empty(0, 24), torch.full((3, 24), torch.nan)):
        with pytest.raises(ValueError, match="needs finite embeddings of images"):
            compute_principal_rotation(fault)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_turned_model_has_the_same_cosines(kind, tiny_processor, tmp_path):
    model = randomise(CapivaraModel(tiny_config(text_projection_type=kind))).eval()
    inputs = tiny_processor(text=["um gato", "a casa azul"], return_tensors="pt")
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    turned, rotation = copy.deepcopy(model), compute_principal_rotation(space())
    rotate_model_(turned, rotation)
    with torch.no_grad():
        before, after = model(**inputs), turned(**inputs)
    torch.testing.assert_close(after.logits_per_text, before.logits_per_text, atol=2e-5, rtol=0)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(getattr(before, name) @ rotation.T, getattr(after, name), atol=1e-6, rtol=0)
        assert (getattr(before, name) - getattr(after, name)).abs().max() > 0.1
    save_rotation(rotation, tmp_path)
    assert torch.equal(load_rotation(tmp_path), rotation)
    with pytest.raises(ValueError, match="of 16 dimensions, the model's embeddings are of 24"):
        rotate_model_(model, torch.eye(16))


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


def test_widths_are_kept_in_the_configuration_and_have_to_divide(tmp_path):
    assert tiny_config().matryoshka_dims is None
    tiny_config(matryoshka_dims=[6, 12, 24, 6]).save_pretrained(tmp_path)
    assert CapivaraConfig.from_pretrained(tmp_path).matryoshka_dims == [24, 12, 6]
    for dims, wrong in (([12, 9], 9), ([48], 48), ([0], 0)):
        message = f"matryoshka_dims must divide the embedding's width, 24, got {wrong}; choose of 24, 12, 8, 6"
        with pytest.raises(ValueError, match=re.escape(message)):
            tiny_config(matryoshka_dims=dims)


@pytest.mark.slow
def test_a_finished_model_is_turned_by_one_command(tiny_folder, tmp_path):
    draw = torch.Generator().manual_seed(0)  # more pictures than an embedding has numbers
    pictures = [Image.fromarray(torch.randint(256, (36, 40, 3), generator=draw).byte().numpy()) for _ in range(40)]
    data = Dataset.from_dict({"image": pictures, "captions-pt": [["foto"]] * 40})
    DatasetDict(train=data.cast_column("image", ImageFeature())).save_to_disk(tmp_path / "many")
    words = [str(tiny_folder), "--dataset", str(tmp_path / "many"), "--dims", "12", "8", "--output"]
    words.append(str(tmp_path / "turned"))
    rotate(words)
    before, after = load_model(tiny_folder).eval(), load_model(tmp_path / "turned").eval()
    rotation = load_rotation(tmp_path / "turned")
    assert after.config.matryoshka_dims == [12, 8]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = [model(pixel_values=pixels).image_embeds for model in (before, after)]
    torch.testing.assert_close(images[0] @ rotation.T, images[1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="is not empty"):
        rotate(words)
    with pytest.raises(ValueError, match="was turned before"):
        rotate([str(tmp_path / "turned"), *words[1:-1], str(tmp_path / "again")])
    interpolate([str(tiny_folder), str(tmp_path / "turned"), "--share", "0.5", "--output", str(tmp_path / "half")])
    half = load_model(tmp_path / "half").state_dict()
    for name, weight in after.state_dict().items():  # of the base, turned as the model is
        torch.testing.assert_close(half[name], weight, atol=1e-6, rtol=0)


def test_too_few_images_for_the_axes(tiny_folder, tiny_dataset_folder, tmp_path):
    words = [str(tiny_folder), "--dataset", str(tiny_dataset_folder), "--output", str(tmp_path / "turned"), "--dims"]
    with pytest.raises(ValueError, match=r"has 12 usable images, 24 axes are asked of them\. Give more"):
        rotate([*words, "12"])
    with pytest.raises(ValueError, match="must divide the embedding's width, 24, got 9"):
        rotate([*words, "9"])
    assert not (tmp_path / "turned").exists()
