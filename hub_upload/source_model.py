"""The model that is published: read without copying its weights, every tensor accounted for."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from capivara_common.files import seed_folders
from capivara_common.weight_file import weight_files
from modeling_capivara import CapivaraConfig, loading
from modeling_capivara.loading import WEIGHTS, mapped_model, mapped_tensors

__all__ = [
    "WEIGHTS",
    "check_tensors",
    "mapped_model",
    "mapped_tensors",
    "read_config",
    "tensor_digests",
    "weight_files",
]


def read_config(folder: Path) -> CapivaraConfig:
    """The configuration of a model folder. Raises ValueError where it is none; a run's several seeds are named."""
    if not folder.is_dir():
        raise ValueError(f"The model folder {folder} does not exist.")
    if not (folder / "config.json").is_file():
        seeds = [path.name for path in seed_folders(folder) if (path / "config.json").is_file()]
        hint = f" It is a run of several seeds; name one of {', '.join(seeds)} in it." if seeds else ""
        raise ValueError(f"The folder {folder} holds no model (config.json is missing).{hint}")
    return loading.read_config(folder)


def check_tensors(file: Path, tensors: Mapping[str, Tensor], expected: dict[str, str]) -> None:
    """Raise ValueError, naming them, where tensors read from `file` are not those of the digests."""
    found = tensor_digests(tensors)
    if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        raise ValueError(f"{file.name} does not hold the model as it was: {', '.join(wrong)} differ; nothing was kept.")


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hex digest of each tensor, of its type, shape and bytes."""
    digests = {}
    for name, tensor in tensors.items():
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
    return digests
