"""A folder that Immich's machine-learning service reads, as a model of open_clip's kind (read in 1.134 and 2.5).

    config.json                                   text_cfg.context_length, the tokens of a text
    textual/model.onnx                            text (1, 77), int32 -> embedding (1, width)
    textual/tokenizer.json, tokenizer_config.json pad_token, which fills every text up
    visual/model.onnx                             image (1, 3, side, side), float32 -> embedding (1, width)
    visual/preprocess_cfg.json                    size, interpolation, mean, std, resize_mode

Immich finds it as clip/NAME in its model cache, under a name of its own list. The text side alone replaces that of the
base, whose embeddings of pictures stay, where both have the same image side. docs/immich.md has the steps. Embeddings
have unit length. The text graph makes its mask of the ids, since Immich gives none. What was written is compared with
the model: the ids of texts as Immich's tokenizer gives them, and the embeddings of each graph.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from capivara_common.environment import require
from capivara_common.files import write_json
from hub_upload.formats import base_of, read_config, write_plain_tokenizer
from hub_upload.formats.onnx import ONNX_PACKAGES, check_difference, data_file, open_graph, write_graph
from hub_upload.formats.open_clip import text_config_source
from modeling_capivara import CapivaraModel
from modeling_capivara.convert_open_clip import open_clip_model_cfg, preprocess_cfg_of
from modeling_capivara.embedder import random_images, random_texts
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.processing_capivara import CONTEXT_LENGTH

BASE_NAME = "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k"  # of the published architecture, in Immich's list
logger = logging.getLogger("capivara")


class PaddedText(nn.Module):
    """Ids of padded texts to embeddings of unit length."""

    def __init__(self, model: CapivaraModel, pad_id: int):
        super().__init__()
        self.model, self.pad_id = model, pad_id

    def forward(self, text: Tensor) -> Tensor:
        """(texts, tokens), int32 -> (texts, width)."""
        ids = text.long()
        return self.model(ids, (ids != self.pad_id).long()).text_embeds


class Picture(nn.Module):
    """Pixels to embeddings of unit length."""

    def __init__(self, model: CapivaraModel):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """(images, 3, side, side), normalised -> (images, width)."""
        return self.model(pixel_values=image).image_embeds


def write(source: Path, folder: Path, base: str | None = None) -> None:
    """Write both towers of the model in `source` to `folder`; of a `base` the text side alone.

    Raises:
        ValueError: the model is damaged or can't be expressed, a tower has 2 GB, its graph differs by more than
            `TOLERANCE`, or its image side is not the base's.
        ImportError: a package of ONNX is missing.
    """
    require("immich in --formats", "onnx", *ONNX_PACKAGES)
    if base is not None:
        base_of(source, base)
    config, processor = read_config(source, "Immich's folder"), load_processor(source)
    side, preprocess_cfg = preprocess_cfg_of(processor.image_processor)
    if base is None:
        model_cfg = open_clip_model_cfg(config, text_config_source(config, None) or "", side)
        model_cfg["text_cfg"]["context_length"] = CONTEXT_LENGTH
        write_json(folder / "config.json", model_cfg)
        write_json(folder / "visual" / "preprocess_cfg.json", {"size": [side, side], "mode": "RGB", **preprocess_cfg})
    _write_tokenizer(processor.tokenizer, folder / "textual")
    model = load_model(source).eval()
    ids = _padded_ids(folder / "textual", processor.tokenizer)
    _write_graph(PaddedText(model, processor.tokenizer.pad_token_id), "text", ids, folder / "textual/model.onnx")
    if base is None:
        pixels = processor(images=random_images(), return_tensors="np").pixel_values
        _write_graph(Picture(model), "image", [image[None] for image in pixels], folder / "visual/model.onnx")
    logger.info(
        "Immich reads it as clip/NAME of its cache: NAME is one of its own list, with embeddings of %d numbers, and %s "
        "for the published architecture.", config.projection_dim, BASE_NAME,
    )  # fmt: skip


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, textual: Path) -> None:
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.eos_token, tokenizer.sep_token):
        raise ValueError(
            f"The tokenizer's padding token is {tokenizer.pad_token!r}; Immich gives no mask, so that it must be a "
            "token that no text has."
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    write_plain_tokenizer(textual, content | {"padding": None, "truncation": None})
    write_json(textual / "tokenizer_config.json", {"pad_token": tokenizer.pad_token})


def _padded_ids(textual: Path, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """(1, 77) ids of texts by the written tokenizer as Immich sets it up, compared with the model's own."""
    from tokenizers import Tokenizer

    written, texts = Tokenizer.from_file(str(textual / "tokenizer.json")), ["um gato", *random_texts()]
    written.enable_padding(length=CONTEXT_LENGTH, pad_token=tokenizer.pad_token, pad_id=tokenizer.pad_token_id)
    written.enable_truncation(max_length=CONTEXT_LENGTH)
    ids = [np.array([written.encode(text).ids], np.int32) for text in texts]
    wanted = tokenizer(texts, padding="max_length", max_length=CONTEXT_LENGTH)["input_ids"]
    for text, found, own in zip(texts, ids, wanted, strict=True):
        if found[0].tolist() != own:
            raise ValueError(
                f"Immich's tokenizer would read {text[:80]!r} otherwise than the model's; nothing was kept."
            )
    return ids


def _write_graph(module: nn.Module, name: str, examples: list[np.ndarray], path: Path) -> None:
    """Write a tower as one file with its weights, and compare it with the model on examples of its input `name`."""
    import onnx

    with torch.inference_mode():
        expected = np.concatenate([module(torch.from_numpy(example)).numpy() for example in examples])
    write_graph(module, {name: torch.from_numpy(examples[0])}, [f"{name}_embeds"], path)
    onnx.save(onnx.load(path), path)  # its external data, too
    data_file(path).unlink()
    session = open_graph(path)
    found = np.concatenate([session.run(None, {name: example})[0] for example in examples])
    check_difference(path, float(np.abs(found - expected).max()))
