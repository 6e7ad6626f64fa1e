"""Batching must not change an embedding, nor its place."""

import pytest
import torch
from PIL import Image

from modeling_capivara.embedding import embed_images, embed_texts
from modeling_capivara.loading import load_model, load_processor

TEXTS = ["uma foto de uma capivara azul", "gato", "a casa verde", "são joão", "pão"]


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_texts(tiny_model, tiny_processor, batch_size):
    expected = torch.cat([tiny_model(**tiny_processor(text=[t], return_tensors="pt")).text_embeds for t in TEXTS])
    torch.testing.assert_close(embed_texts(tiny_model, tiny_processor, TEXTS, batch_size), expected.detach())


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_images(tiny_model, tiny_processor, batch_size):
    images = [Image.new("RGB", (40 + i, 33), (50 * i, 20, 200 - 40 * i)) for i in range(5)]
    expected = tiny_model(**tiny_processor(images=images, return_tensors="pt")).image_embeds.detach()
    torch.testing.assert_close(embed_images(tiny_model, tiny_processor, iter(images), batch_size), expected)


def test_loading(tiny_folder, tmp_path):
    assert load_model(str(tiny_folder)).dtype == torch.float32
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "none")
    (tiny_folder / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no processor.*save_pretrained"):
        load_processor(tiny_folder)
