"""Read tensors of safetensors files through a memory map, without torch and without copying them first.

Only the parts that are used are read from the disk, for example the rows of a vocabulary that a text contains.
"""

import json
import math
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from capivara_common.cli import coded_error
from capivara_common.files import read_json


class TensorInfo(NamedTuple):
    """Type, shape and position of a tensor in its file.

    `dtype` is safetensors' name, such as "F32"; `start` and `end` are byte offsets from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFile:
    """A memory-mapped safetensors file.

    Attributes:
        path: Path of the file.
        tensors: `TensorInfo` of each tensor, by name.

    Raises:
        ValueError: If the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "np"), path.open("rb") as file:  # safe_open checks all sizes and offsets
                start = 8 + int.from_bytes(
                    file.read(8), "little"
                )  # the file begins with the header's length in 8 bytes
                header = json.loads(file.read(start - 8))
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The weights {path} can't be read: {error!s:.300}. Download or write them again."
            ) from error
        self.tensors = {
            name: TensorInfo(
                entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def raw_bytes(self, name: str) -> memoryview:
        """Return the bytes of a tensor, without copying them."""
        info = self.tensors[name]
        return memoryview(self._bytes)[info.start : info.end]

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a float32 array, maybe read-only. Raises ValueError unless it is F32, F16 or BF16."""
        info = self.tensors[name]
        return _to_float32(self.raw_bytes(name), info.dtype, name).reshape(info.shape)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Return rows of a matrix as float32. Other rows are not read from the disk.

        Args:
            name: Name of the tensor, of shape (rows, width).
            indices: Row numbers, of shape (n,).

        Returns:
            Array of shape (n, width).

        Raises:
            ValueError: If an index is out of range, or the tensor is not F32, F16 or BF16.
        """
        info = self.tensors[name]
        if len(indices) and not 0 <= indices.min() <= indices.max() < info.shape[0]:
            raise ValueError(f"{name} has {info.shape[0]} rows; got indices {indices.min()} to {indices.max()}.")
        raw_rows = np.frombuffer(self.raw_bytes(name), np.uint8).reshape(info.shape[0], -1)[indices]
        return _to_float32(raw_rows.data.cast("B"), info.dtype, name).reshape(len(indices), *info.shape[1:])


def read_scalar(folder: Path, name: str) -> float | None:
    """Return a weight that is a single number, or None if the model folder has no weight of that name.

    Args:
        folder: Model folder.
        name: Name of the weight, for example "logit_scale".

    Raises:
        ValueError: If the weight is not a single number, or the weight files are missing or damaged.
    """
    for weights in map(WeightFile, find_weight_files(folder)):
        if name in weights.tensors:
            shape = weights.tensors[name].shape
            size = math.prod(shape)
            if size != 1:
                raise ValueError(f"{name} must be one number, got {size} (shape {shape}) in {weights.path}.")
            return weights.array(name).item()
    return None


def _to_float32(raw: memoryview, dtype: str, name: str) -> np.ndarray:
    """Return the bytes of a tensor as a flat float32 array."""
    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"{name} must be of type F32, F16 or BF16, got {dtype}.")


def find_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder. Raises ValueError if a file or their index is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        text = (
            "The model folder {model} has no weights ({file} is missing). Weights in other formats are not supported: "
            "load the model with transformers and save it again with `save_pretrained`."
        )
        raise coded_error(ValueError, "not_a_model", text, model=folder, file="model.safetensors")
    names = sorted({str(name) for name in read_json(index, weight_map=dict)["weight_map"].values()})
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} must list files of its own folder, got {names[:3]}.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"The model folder {folder} lacks the weights {', '.join(missing)}, which its index names.")
    return [folder / name for name in names]
