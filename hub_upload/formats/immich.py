"""A folder that Immich's machine-learning service reads, as a model of open_clip's kind (read in 1.134 and 2.5).

    config.json                                   text_cfg: the tokens of a text, and how it is cleaned
    textual/model.onnx                            text (1, tokens), int32 -> embedding (1, width), unit length
    textual/tokenizer.json, tokenizer_config.json pad_token, which fills every text up
    visual/model.onnx                             image (1, 3, side, side), float32 -> embedding (1, width)
    visual/preprocess_cfg.json                    size, interpolation, mean, std, resize_mode

It lies as clip/NAME in Immich's model cache, under a name of its own list. With a base, `visual/` is left out: the rest
replaces that of the base. What was written is compared with the model. docs/immich.md has the steps.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from capivara_common.files import write_json
from hub_upload.formats import max_text_tokens, resolve_base_folder, write_tokenizer_json
from hub_upload.formats.onnx import check_difference, export_graph, open_session, weights_file
from modeling_capivara.convert_open_clip import to_preprocess_cfg
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import (
    compute_image_embeds,
    compute_text_embeds,
    embedding_width,
    pads_to_max_length,
    random_images,
    random_texts,
)

# In Immich's list, the published architecture of each kind.
IMMICH_MODEL_NAMES = {"capivara": "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k", "siglip": "ViT-B-16-SigLIP2__webli"}
logger = logging.getLogger("capivara")


class ImmichTower(nn.Module):
    """A tower as Immich asks it."""

    def __init__(self, model: PreTrainedModel, pad_id: int | None):
        super().__init__()
        self.model, self.pad_id = model, pad_id

    def forward(self, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """Ids of padded texts, (texts, tokens), int32, or pixels, (images, 3, side, side) -> (rows, width)."""
        if image is not None:
            return compute_image_embeds(self.model, image)
        ids = text.long()  # Immich gives no mask
        return compute_text_embeds(self.model, ids, None if self.pad_id is None else (ids != self.pad_id).long())


def write_immich(source: Path, folder: Path, config: PreTrainedConfig, base: str | None = None) -> None:
    """Write both towers of the model in `source` to `folder`; where there is a `base`, the text side alone.

    Raises ValueError where the model is damaged or can't be expressed, a tower has 2 GB, its graph differs by more than
    `TOLERANCE`, or its image side is not the base's.
    """
    if base is not None:
        resolve_base_folder(source, base)
    processor, is_own = load_processor(source), config.model_type == "capivara"
    # Nothing else is read of it. Of a SigLIP, Immich's own asks for punctuation to be taken away, which ours reads.
    about = {"embed_dim": embedding_width(config), "text_cfg": {"context_length": max_text_tokens(processor)}}
    write_json(folder / "config.json", about)
    ids = _write_tokenizer(processor, folder / "textual", is_own)
    model = load_model(source).eval()
    tower = ImmichTower(model, None if pads_to_max_length(processor) else processor.tokenizer.pad_token_id)
    _write_tower_graph(tower, "text", ids, folder / "textual/model.onnx")
    if base is None:
        steps = to_preprocess_cfg(processor.image_processor)
        pictures = [image.convert("RGB") for image in random_images()]
        pixels = processor(images=pictures, return_tensors="np")["pixel_values"]
        write_json(folder / "visual/preprocess_cfg.json", {"size": [*pixels.shape[2:]], "mode": "RGB", **steps})
        _write_tower_graph(tower, "image", [image[None] for image in pixels], folder / "visual/model.onnx")
    logger.info(
        "Immich reads it as clip/NAME of its cache: NAME is one of its own list, with embeddings of %d numbers, and %s "
        "for the published architecture.", embedding_width(config), IMMICH_MODEL_NAMES[config.model_type],
    )  # fmt: skip


def _write_tokenizer(processor: ProcessorMixin, textual: Path, is_capivara: bool) -> list[np.ndarray]:
    """Write the tokenizer; returns (1, tokens) ids of texts as Immich reads them by it, which are the model's own."""
    from tokenizers import Tokenizer

    tokenizer, length = processor.tokenizer, max_text_tokens(processor)
    if not tokenizer.is_fast:
        raise ValueError(f"A {type(tokenizer).__name__} has no tokenizer.json, which Immich reads.")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    write_tokenizer_json(textual, content | {"padding": None, "truncation": None}, is_capivara)
    write_json(textual / "tokenizer_config.json", {"pad_token": tokenizer.pad_token})
    written, texts = Tokenizer.from_file(str(textual / "tokenizer.json")), ["um gato", *random_texts()]
    written.enable_padding(length=length, pad_token=tokenizer.pad_token, pad_id=tokenizer.pad_token_id)
    written.enable_truncation(max_length=length)
    ids = [np.array([written.encode(text).ids], np.int32) for text in texts]
    wanted = tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
    for text, found, own in zip(texts, ids, wanted, strict=True):
        if found[0].tolist() != own:
            raise ValueError(
                f"Immich's tokenizer would read {text[:80]!r} otherwise than the model's; nothing was kept."
            )
    return ids


def _write_tower_graph(tower: ImmichTower, input_name: str, examples: list[np.ndarray], path: Path) -> None:
    """Write a tower as one file with its weights, and compare it with the model on examples of its input `name`."""
    import onnx

    with torch.inference_mode():
        expected = np.concatenate([tower(**{input_name: torch.from_numpy(example)}).numpy() for example in examples])
    export_graph(tower, {input_name: torch.from_numpy(examples[0])}, [f"{input_name}_embeds"], path)
    onnx.save(onnx.load(path), path)  # its external data, too
    weights_file(path).unlink()
    session = open_session(path)
    found = np.concatenate([session.run(None, {input_name: example})[0] for example in examples])
    check_difference(path, float(np.abs(found - expected).max()))
