"""A model of open_clip to a CAPIVARA folder, checked without open_clip.

    found = find_open_clip("hf-hub:hiaac-nlp/CAPIVARA")
    digest = write_capivara(found, folder)

`convert_open_clip.py` compares the outputs of both programs; it needs open_clip. Here every tensor that was written is
compared with the source's, and the outputs have to make sense.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capivara_common.hub_cache import Converter

from .configuration_capivara import CapivaraConfig
from .convert_open_clip_flags import BASE_TEXT_MODEL
from .embedding import embed_images, embed_texts
from .loading import load_model, load_processor, read_config, weights_digest
from .modeling_capivara import CapivaraModel
from .open_clip_mapping import (
    capivara_config,
    capivara_state_dict,
    image_processor_of,
    open_clip_model_cfg,
    open_clip_state_dict,
    square,
)
from .open_clip_source import OpenClipSource, find_open_clip, load_tokenizer, origin_card, read_open_clip_state
from .processing_capivara import CapivaraProcessor


@dataclass
class ReadModel:
    """A model of open_clip in memory: the tensors under open_clip's names, as they were stored."""

    config: CapivaraConfig
    processor: CapivaraProcessor
    state: dict[str, Tensor]
    notes: list[str]  # whole sentences for the person who asked


def read_open_clip(found: OpenClipSource, config: CapivaraConfig | None = None) -> ReadModel:
    """Read a model that was found; what can't be converted is refused before its weights are read.

    Args:
        found: the model; the `model_cfg` of a bare checkpoint is filled in.
        config: architecture of a bare checkpoint file; None is the published base.

    Raises:
        ValueError: its configuration is not supported, a tensor is missing or surplus, or the tokenizer does not fit.
    """
    if found.model_cfg is not None:
        config = capivara_config(found.model_cfg)
    else:
        config = config or CapivaraConfig()
        found.model_cfg = open_clip_model_cfg(config, BASE_TEXT_MODEL)
    image_processor = image_processor_of(found.preprocess_cfg, square(found.model_cfg["vision_cfg"]))
    state, notes = read_open_clip_state(found.weights, config)
    processor = CapivaraProcessor(image_processor, load_tokenizer(found.tokenizer, config))
    notes.insert(0, f"Weights: {found.weights}; tokenizer: {found.tokenizer}")
    return ReadModel(config, processor, state, notes)


def write_read(read: ReadModel, found: OpenClipSource, folder: Path) -> None:
    """Write a model that was read into a folder, in float32, with its processor and a card that names its origin."""
    ours = capivara_state_dict({name: in_float32(tensor) for name, tensor in read.state.items()}, read.config)
    CapivaraModel.from_pretrained(None, config=read.config, state_dict=ours).save_pretrained(folder)
    read.processor.save_pretrained(folder)
    if found.folder and (card := origin_card(found.folder, found.repo_id)):
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_capivara(found: OpenClipSource, folder: Path) -> str:
    """Convert a model that was found into an empty folder, and check what was written; open_clip is not needed.

    Returns:
        Hex digest of its weights.

    Raises:
        ValueError: it can't be converted (`read_open_clip`), a tensor came back other than it was, or embeddings are
            not what embeddings are.
    """
    read = read_open_clip(found)
    write_read(read, found, folder)
    model = load_model(folder).eval()  # every weight is accounted for
    _check_tensors(model, read.state)
    _check_outputs(model, load_processor(folder), found)
    return weights_digest(model)


def in_float32(tensor: Tensor) -> Tensor:
    """A tensor as it is written: floats in float32."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _check_tensors(model: CapivaraModel, state: dict[str, Tensor]) -> None:
    """Raise ValueError where a tensor, under open_clip's name again, is not the source's to the bit."""
    returned = open_clip_state_dict(model)
    changed = [
        name
        for name in sorted(returned.keys() | state.keys())
        if name not in returned or name not in state or not same(returned[name], in_float32(state[name]))
    ]
    if changed:
        raise ValueError(f"Tensors were changed by the conversion, nothing was kept: {', '.join(changed)}.")


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors hold the same numbers; not a number equals itself."""
    return ours.shape == theirs.shape and torch.equal(ours.nan_to_num(), theirs.nan_to_num().to(ours.dtype))


def _check_outputs(model: CapivaraModel, processor: CapivaraProcessor, found: OpenClipSource) -> None:
    """Raise ValueError where embeddings of random inputs are not finite, or the same for all inputs."""
    sides = {
        "images": embed_images(model, processor, random_images()),
        "texts": embed_texts(model, processor, random_texts()),
    }
    for name, embeds in sides.items():
        if not embeds.isfinite().all():
            raise ValueError(f"{found.weights}: the embeddings of random {name} are not finite; the file is damaged.")
        if (embeds[0] - embeds[1:]).abs().amax(dim=1).min() < 1e-6:
            raise ValueError(f"{found.weights}: different {name} have one embedding; the file holds no trained model.")


def random_images(seed: int = 0) -> list[Image.Image]:
    """Colour images of odd sizes, smaller and larger than towers take, one in grey and one with transparency."""
    numbers = np.random.default_rng(seed)
    shapes = [(37, 61, 3), (301, 199, 3), (224, 227, 3), (97, 450, 3), (130, 131), (259, 225, 4)]
    return [Image.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def random_texts(seed: int = 0) -> list[str]:
    """Portuguese-looking texts of 1 to 120 words: far below and above the length that is kept."""
    numbers = random.Random(seed)
    syllables = ("ca", "pi", "va", "ra", "ção", "ões", "nha", "lho", "ba", "tu", "gue", "mar", "é", "ão", "sol", "que")
    lengths = (1, 2, 5, 9, 30, 120)
    words = [["".join(numbers.choices(syllables, k=numbers.randint(1, 4))) for _ in range(n)] for n in lengths]
    return [" ".join(text) for text in words]


def _convert(source: str, folder: Path, revision: str | None) -> str:
    return write_capivara(find_open_clip(source, revision=revision), folder)


def _explain(folder: str) -> None:
    load_processor(folder)
    read_config(folder)


CONVERTER = Converter(_convert, _explain)  # for `capivara_common.hub_cache.model_folder`
