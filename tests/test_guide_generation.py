"""Guided image optimization: preprocessing equals the processor's, and the reported similarities are correct."""

import json

import pytest
import torch
from PIL import Image

from examples import guide_generation
from examples.guide_generation import convert_tensor_to_pil_image, preprocess_images_differentiably
from modeling_capivara import CapivaraModel
from modeling_capivara.two_towers import embed_images, embed_texts

SENTENCE = "um gato azul"


def test_differentiable_preprocessing_equals_the_processor(tiny_processor):
    """Except for the rounding to 8 bits, for images that are enlarged, reduced or have the right size."""
    for side in (32, 20, 80):
        smooth = torch.nn.functional.interpolate(
            torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size=(side, side), mode="bicubic"
        ).clamp(0, 1)
        theirs = tiny_processor(images=convert_tensor_to_pil_image(smooth), return_tensors="pt")["pixel_values"]
        ours = preprocess_images_differentiably(smooth, tiny_processor.image_processor)
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.03, side


@pytest.mark.slow
@pytest.mark.parametrize(("cells", "views"), [("10", "2"), ("40", "0")])
def test_the_image_becomes_more_similar_to_its_sentence(cells, views, tiny_folder, tmp_path, capsys, tiny_processor):
    flags = ["--model", str(tiny_folder), "--size", "40", "--steps", "15", "--views", views]
    flags += ["--others", "o pão", "a casa", "--cells", cells]
    guide_generation.main([*flags, "--sentence", SENTENCE, "--output_dir", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["picture.png", "results.json", "steps.png"]
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    cosines = results["cosines"]
    assert list(cosines) == [SENTENCE, "o pão", "a casa"]
    assert cosines[SENTENCE]["after"] > cosines[SENTENCE]["before"] + 0.05
    picture = Image.open(tmp_path / "out" / "picture.png")
    model = CapivaraModel.from_pretrained(tiny_folder).eval()
    cosine = embed_images(model, tiny_processor, [picture]) @ embed_texts(model, tiny_processor, [SENTENCE]).T
    assert cosines[SENTENCE]["after"] == pytest.approx(cosine.item(), abs=1e-6), "measured on the saved file"
    assert Image.open(tmp_path / "out" / "steps.png").size == (8 * 128, 128) and picture.size == (40, 40)
    assert f"{cosines[SENTENCE]['after']:6.3f}   {SENTENCE}" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
