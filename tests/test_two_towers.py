"""Batching must not change an embedding, nor its place."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import randomise, tiny_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts, load_embedder

TEXTS = ["uma foto de uma capivara azul", "gato", "a casa verde", "são joão", "pão"]


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_batching_changes_nothing(tiny_model, tiny_processor, batch_size):
    expected = torch.cat([tiny_model(**tiny_processor(text=[t], return_tensors="pt")).text_embeds for t in TEXTS])
    torch.testing.assert_close(embed_texts(tiny_model, tiny_processor, TEXTS, batch_size), expected.detach())
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


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 16}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def siglip_folder(folder: Path) -> None:
    """As published: without a mask, and its processor says nothing of padding."""
    text = TOWER | {"vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 1, "projection_size": 32}
    randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names, tokenizer.model_max_length = ["input_ids"], 64
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


def clip_folder(folder: Path) -> None:
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    text = TOWER | {"vocab_size": len(pieces), "bos_token_id": 0, "eos_token_id": 1}
    randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION))).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)


FOLDERS = {"siglip": siglip_folder, "clip": clip_folder, "ours": None}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_text_is_embedded_alone_as_beside_a_longer_one(kind, tiny_folder, tmp_path):
    if kind == "ours":
        embedder = load_embedder(str(tiny_folder), "cpu")
    else:
        FOLDERS[kind](tmp_path / "clip")
        embedder = load_embedder(f"clip:{tmp_path / 'clip'}", "cpu", baseline=True)
    longer = " ".join(["uma foto de um gato azul na casa verde"] * 9)
    alone, both = embedder.texts(["um gato"]), embedder.texts(["um gato", longer])
    torch.testing.assert_close(alone[0], both[0], rtol=0, atol=1e-5)
    assert alone[0] @ both[1] < 0.999
    if kind == "siglip":  # filled up to the end, as in its training and in transformers' own pipeline
        model = SiglipModel.from_pretrained(tmp_path / "clip").eval()
        ids = tiny_tokenizer()(["um gato"], padding="max_length", max_length=64, return_tensors="pt").input_ids
        expected = torch.nn.functional.normalize(model.get_text_features(ids).pooler_output, dim=-1)
        torch.testing.assert_close(alone, expected.detach(), rtol=0, atol=1e-5)


FAULTS = {  # part of a file of a CLIP, what takes its place, and what is said
    "no heads": ("config.json text_config", {"num_attention_heads": 0}, "must be from 1 to 1000, got 0"),
    "a thousand million layers": ("config.json text_config", {"num_hidden_layers": 10**9}, "must be from 0"),
    "words for a table": ("config.json text_config", {"vocab_size": "x"}, "vocab_size"),
    "an exception": (
        "tokenizer.json pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        "its tokenizer can't be used: ",
    ),
    "a panic of Rust": (
        "tokenizer.json normalizer",
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        "its tokenizer can't be used: ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_clip_that_can_not_be_is_one_line(tmp_path, fault):
    place, change, message = FAULTS[fault]
    name, part = place.split()
    siglip_folder(tmp_path / "clip")
    path = tmp_path / "clip" / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {part: change if name == "tokenizer.json" else content[part] | change}))
    with pytest.raises(ValueError, match=rf"^clip:[^\n]*{message}[^\n]*$"):
        load_embedder(f"clip:{tmp_path / 'clip'}", "cpu", baseline=True)


def test_an_open_clip_whose_config_can_not_be_is_one_line(tmp_path):
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"layers": 10**9}, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    message = r"^open_clip[^\n]*: model_cfg\.vision_cfg\.layers must be from 0 to 1000[^\n]*$"
    with pytest.raises(ValueError, match=message):
        load_embedder(f"open_clip:local-dir:{tmp_path}", "cpu", baseline=True)
