"""The model that is published: read without copying its weights, every tensor accounted for."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modeling_capivara import CapivaraConfig, CapivaraModel, loading

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: Path) -> CapivaraConfig:
    """The configuration of a model folder. Raises ValueError where it is none; a run's several seeds are named."""
    if not folder.is_dir():
        raise ValueError(f"The model folder {folder} does not exist.")
    if not (folder / "config.json").is_file():
        seeds = sorted(path.name for path in folder.glob("seed-*") if (path / "config.json").is_file())
        hint = f" It is a run of several seeds; name one of {', '.join(seeds)} in it." if seeds else ""
        raise ValueError(f"The folder {folder} holds no model (config.json is missing).{hint}")
    return loading.read_config(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ValueError where there is none, or one lacks that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"The folder {folder} holds no {WEIGHTS}. Weights in another format are not published: load the model "
            "and save it again with `save_pretrained`."
        )
    shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    files = [folder / Path(name).name for name in sorted(shards)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"The folder {folder} lacks the weights {', '.join(missing)}, which its index names.")
    return files


def mapped_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files, as views of them: the system reads each when it is used. Raises ValueError."""
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The weights {file} can't be read: {error}") from error
    return tensors


def mapped_model(folder: Path, config: CapivaraConfig) -> CapivaraModel:
    """The model of a folder, to be saved and not to be run: its weights are views of its files.

    Raises ValueError where weights are missing, surplus or of another shape; all are named.
    """
    with torch.device("meta"):
        model = CapivaraModel(config)
    try:
        model.load_state_dict(mapped_tensors(weight_files(folder)), assign=True)
    except RuntimeError as error:
        faults = " ".join(str(error).split()).partition(": ")[2]
        raise ValueError(f"The weights of {folder} do not fit its config. {faults}") from error
    return model.eval()


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
