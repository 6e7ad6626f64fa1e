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
from capivara_common.files import check_free_space, write_json, write_text
from capivara_common.hub_cache import model_folder
from capivara_common.image_side_digest import image_difference
from capivara_common.weight_file import weight_files
from capivara_search.models import CONVERTER
from hub_upload.formats import read_config, with_plain_quotes
from hub_upload.formats.onnx import ONNX_PACKAGES, TOLERANCE, data_file, open_graph, write_graph
from hub_upload.formats.open_clip import text_config_source
from modeling_capivara import CapivaraConfig, CapivaraModel
from modeling_capivara.convert_open_clip import open_clip_model_cfg, preprocess_cfg_of
from modeling_capivara.embedder import random_images, random_texts
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.processing_capivara import CONTEXT_LENGTH

BASE_NAME, BASE_WIDTH = "XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k", 512  # of the base, in Immich's list
LARGEST_GRAPH = 2**31 - 2**20  # bytes of weights: a protobuf message has fewer than 2 GiB
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


def write(source: Path, folder: Path, output: Path, base: str | None = None) -> None:
    """Write both towers of the model in `source` to `folder`, which becomes `output`; of a `base` the text side alone.

    Raises:
        ValueError: the model is damaged or can't be expressed, its graph differs by more than `TOLERANCE`, or its image
            side is not the base's.
        ImportError: a package of ONNX is missing.
    """
    require("immich in --formats", "onnx", *ONNX_PACKAGES)
    if base is not None:
        check_image_side(source, base)
    config, processor = read_config(source), load_processor(source)
    side, preprocess_cfg = preprocess_cfg_of(processor.image_processor)
    check_free_space(output, int(2.5 * sum(file.stat().st_size for file in weight_files(source))))
    if base is None:
        model_cfg = open_clip_model_cfg(config, text_config_source(config, None) or "", side)
        model_cfg["text_cfg"]["context_length"] = CONTEXT_LENGTH
        write_json(folder / "config.json", model_cfg)
        write_json(folder / "visual" / "preprocess_cfg.json", {"size": [side, side], "mode": "RGB", **preprocess_cfg})
    _write_tokenizer(processor.tokenizer, folder / "textual")
    model = load_model(source).eval()
    examples = {"textual": _padded_ids(folder / "textual", processor.tokenizer)}
    if base is None:
        pixels = processor(images=random_images(), return_tensors="np").pixel_values
        examples["visual"] = [image[None] for image in pixels]
    expected = _write_graphs(model, processor.tokenizer.pad_token_id, examples, folder)
    del model  # before graphs are in memory, whole
    for tower, wanted in expected.items():
        _make_one_file(folder / tower / "model.onnx")
        _compare(folder / tower / "model.onnx", examples[tower], wanted)
    if is_base(config):
        name = f"clip/{BASE_NAME}" + "/textual" * (base is not None)
        logger.info("Immich: the folder%s takes the place of %s in its cache.", " textual/" * (base is not None), name)
    else:
        logger.info("Immich's list has no model of this architecture; one of the same width lends its name, if any.")


def check_image_side(model: Path, base: str) -> None:
    """Raise ValueError unless both models embed pictures alike, to the bit: tower, projection and preprocessing."""
    if difference := image_difference(model, model_folder(base, CONVERTER)):
        raise ValueError(
            f"The image side of {model} is not that of {base}: {difference}. Pictures that Immich has embedded with "
            "the base would not fit its texts. Leave --textual_only out, lay both towers into the cache, and run smart "
            "search for all."
        )


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


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, textual: Path) -> None:
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.eos_token, tokenizer.sep_token):
        raise ValueError(
            f"The tokenizer's padding token is {tokenizer.pad_token!r}; Immich gives no mask, so that it must be a "
            "token that no text has."
        )
    plain = with_plain_quotes(json.loads(tokenizer.backend_tokenizer.to_str()))
    plain |= {"padding": None, "truncation": None}
    write_text(textual / "tokenizer.json", json.dumps(plain, ensure_ascii=False))
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


@torch.inference_mode()
def _write_graphs(
    model: CapivaraModel, pad_id: int, examples: dict[str, list[np.ndarray]], folder: Path
) -> dict[str, np.ndarray]:
    """Write the graphs, weights beside them; tower -> embeddings (examples, width) of the model itself."""
    towers = {
        "textual": ("text", PaddedText(model, pad_id), "text_embeds", model.text_model),
        "visual": ("image", Picture(model), "image_embeds", model.vision_model),
    }
    expected = {}
    for tower, rows in examples.items():
        name, module, output, weights = towers[tower]
        size = 4 * sum(parameter.numel() for parameter in weights.parameters())
        if size > LARGEST_GRAPH:
            raise ValueError(
                f"The {tower} tower has {size / 1e9:.1f} GB; Immich's model.onnx is one file below 2.1 GB."
            )
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
