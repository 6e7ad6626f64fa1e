"""The files of Immich's folder, made of a model: each tower as one ONNX file, compared with the model.

Embeddings have unit length. The text graph makes its mask of the ids, since Immich gives none; the tokenizer makes
curly quotation marks plain.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from capivara_common.files import check_free_space, write_json, write_text
from hub_upload import source_model
from hub_upload.immich_folder import BASE_WIDTH, open_graph, padded_tokenizer
from hub_upload.loader_files import text_config_source, with_plain_quotes
from hub_upload.onnx_files import TOLERANCE, data_file, write_graph
from modeling_capivara import CapivaraConfig, CapivaraModel
from modeling_capivara.convert_open_clip import open_clip_model_cfg, preprocess_cfg_of
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.processing_capivara import CONTEXT_LENGTH
from modeling_capivara.two_towers import random_images, random_texts

LARGEST_GRAPH = 2**31 - 2**20  # bytes of weights: a protobuf message has fewer than 2 GiB


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


def write_towers(source: Path, folder: Path, output: Path, textual_only: bool) -> bool:
    """Write both towers, or the text side alone, of the model in `source` to `folder`, which becomes `output`.

    Returns whether the model has the architecture of the base that Immich knows. Raises ValueError where the model is
    damaged, can't be expressed, or its graph differs by more than `TOLERANCE`.
    """
    config, processor = source_model.read_config(source), load_processor(source)
    side, preprocess_cfg = preprocess_cfg_of(processor.image_processor)
    check_free_space(output, int(2.5 * sum(file.stat().st_size for file in source_model.weight_files(source))))
    if not textual_only:
        model_cfg = open_clip_model_cfg(config, text_config_source(config, None) or "", side)
        model_cfg["text_cfg"]["context_length"] = CONTEXT_LENGTH
        write_json(folder / "config.json", model_cfg)
        write_json(folder / "visual" / "preprocess_cfg.json", {"size": [side, side], "mode": "RGB", **preprocess_cfg})
    _write_tokenizer(processor.tokenizer, folder)
    model = load_model(source).eval()
    examples = {"textual": _padded_ids(folder, processor.tokenizer)}
    if not textual_only:
        examples["visual"] = [
            image[None] for image in processor(images=random_images(), return_tensors="np").pixel_values
        ]
    expected = _write_graphs(model, processor.tokenizer.pad_token_id, examples, folder)
    del model  # before graphs are in memory, whole
    for tower, wanted in expected.items():
        _make_one_file(folder / tower / "model.onnx")
        _compare(folder / tower / "model.onnx", examples[tower], wanted)
    return is_base(config)


def is_base(config: CapivaraConfig) -> bool:
    """Whether it is the architecture that Immich knows as `BASE_NAME`, with the whole vocabulary or a trimmed one."""
    base = CapivaraConfig()
    same = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    return (
        (config.trimmed_vocabulary or text_config_source(config, None)) is not None
        and config.projection_dim == BASE_WIDTH
        and config.vision_config.model_type == base.vision_config.model_type
        and all(getattr(config.vision_config, name) == getattr(base.vision_config, name) for name in same)
    )


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.eos_token, tokenizer.sep_token):
        raise ValueError(
            f"The tokenizer's padding token is {tokenizer.pad_token!r}; Immich gives no mask, so that it must be a "
            "token that no text has."
        )
    plain = with_plain_quotes(json.loads(tokenizer.backend_tokenizer.to_str()))
    plain |= {"padding": None, "truncation": None}
    write_text(folder / "textual" / "tokenizer.json", json.dumps(plain, ensure_ascii=False))
    write_json(folder / "textual" / "tokenizer_config.json", {"pad_token": tokenizer.pad_token})


def _padded_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """(1, 77) ids of texts by the written tokenizer, compared with the model's own."""
    written, texts = padded_tokenizer(folder), ["um gato", *random_texts()]
    ids = [np.array([written.encode(text).ids], np.int32) for text in texts]
    wanted = tokenizer(texts, padding="max_length", max_length=CONTEXT_LENGTH)["input_ids"]
    for text, found, own in zip(texts, ids, wanted, strict=True):
        if found[0].tolist() != own:
            raise ValueError(
                f"Immich's tokenizer would read {text[:80]!r} otherwise than the model's; nothing was kept."
            )
    return ids


@torch.inference_mode()
def _write_graphs(
    model: CapivaraModel, pad_id: int, examples: dict[str, list[np.ndarray]], folder: Path
) -> dict[str, np.ndarray]:
    """Write the graphs, weights beside them; tower -> embeddings (examples, width) of the model itself."""
    towers = {
        "textual": ("text", PaddedText(model, pad_id), "text_embeds"),
        "visual": ("image", Picture(model), "image_embeds"),
    }
    sizes = {"textual": model.text_model, "visual": model.vision_model}
    expected = {}
    for tower, rows in examples.items():
        size = 4 * sum(parameter.numel() for parameter in sizes[tower].parameters())
        if size > LARGEST_GRAPH:
            raise ValueError(
                f"The {tower} tower has {size / 1e9:.1f} GB; Immich's model.onnx is one file below 2.1 GB."
            )
        name, module, output = towers[tower]
        expected[tower] = np.concatenate([module(torch.from_numpy(row)).numpy() for row in rows])
        write_graph(module, {name: torch.from_numpy(rows[0])}, None, output, folder / tower / "model.onnx")
    return expected


def _make_one_file(path: Path) -> None:
    """Put a graph's weights, which the exporter has left beside it, into it."""
    import onnx

    model = onnx.load(path)  # its external data, too
    data_file(path).unlink()
    onnx.save(model, path)


def _compare(path: Path, examples: list[np.ndarray], expected: np.ndarray) -> None:
    session = open_graph(path)
    (name,) = (one.name for one in session.get_inputs())
    found = np.concatenate([session.run(None, {name: example})[0] for example in examples])
    difference = np.abs(found - expected).max()
    if not difference <= TOLERANCE:  # also when it is not a number
        raise ValueError(
            f"The graph {path.parent.name}/{path.name} differs from the model by {difference:.3g}, above "
            f"{TOLERANCE:g}; nothing was kept."
        )
