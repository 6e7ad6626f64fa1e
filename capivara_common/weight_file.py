"""Tensors of a `model.safetensors`, read where they lie: torch is not needed, and no tensor is copied before its use.

The file is mapped into memory, so that the rows of a vocabulary that nobody asks for are never read from the disk.
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
    """Where a tensor lies in its file: `kind` as safetensors names it ("F32"), `start` and `end` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFile:
    """A safetensors file: name of a tensor -> where it lies. ValueError: it is missing, truncated, or none."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "np"), path.open("rb") as file:  # which checks all sizes and offsets
                start = 8 + int.from_bytes(file.read(8), "little")  # the header has its length before it
                header = json.loads(file.read(start - 8))
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"The weights {path} can't be read: {error!s:.300}. Fetch or write them again.") from error
        self.tensors = {
            name: TensorInfo(one["dtype"], tuple(one["shape"]), *(start + offset for offset in one["data_offsets"]))
            for name, one in header.items()
            if name != "__metadata__"
        }

    def raw_bytes(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        place = self.tensors[name]
        return memoryview(self._bytes)[place.start : place.end]

    def array(self, name: str) -> np.ndarray:
        """A tensor as float32, of its own shape; not to be written to. ValueError: it is neither F32, F16 nor BF16."""
        place = self.tensors[name]
        return _to_float32(self.raw_bytes(name), place.dtype, name).reshape(place.shape)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a matrix, (numbers, width), float32; the others are not read. ValueError: a number is too large."""
        place = self.tensors[name]
        if len(indices) and not 0 <= indices.min() <= indices.max() < place.shape[0]:
            raise ValueError(f"{name} has {place.shape[0]} rows; asked for {indices.min()} to {indices.max()}.")
        found = np.frombuffer(self.raw_bytes(name), np.uint8).reshape(place.shape[0], -1)[indices]
        return _to_float32(found.data.cast("B"), place.dtype, name).reshape(len(indices), *place.shape[1:])


def read_scalar(folder: Path, name: str) -> float | None:
    """Return a weight that is a single number; None if the model folder has none of that name.

    Raises ValueError: it is not a single number, or the weights are missing or damaged.
    """
    for weights in map(WeightFile, find_weight_files(folder)):
        if name in weights.tensors:
            if (size := math.prod(shape := weights.tensors[name].shape)) != 1:
                raise ValueError(f"{name} must be one number, got {size} (shape {shape}) in {weights.path}.")
            return weights.array(name).item()
    return None


def _to_float32(raw: memoryview, dtype: str, name: str) -> np.ndarray:
    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"{name} is of the kind {dtype}; weights are F32, F16 or BF16.")


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, one or several. ValueError: one or the index is missing or damaged."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        text = (
            "The model folder {model} has no weights ({file} is missing). Weights in another format are not read: load "
            "the model and save it again with `save_pretrained`."
        )
        raise coded_error(ValueError, "not_a_model", text, model=folder, file="model.safetensors")
    names = sorted({str(name) for name in read_json(index, weight_map=dict)["weight_map"].values()})
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} names no files of this folder.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"The model folder {folder} lacks the weights {', '.join(missing)}, which its index names.")
    return [folder / name for name in names]
