"""Read single tensors of safetensors files as NumPy arrays, without torch and without loading whole files.

The files are memory-mapped. For example, to embed a text, only the rows of its tokens are read from the token embedding
matrix.
"""

import json
import math
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from capivara_common.cli import make_coded_error
from capivara_common.files import read_json


class TensorInfo(NamedTuple):
    """Type, shape and position of one tensor in a safetensors file.

    Attributes:
        dtype: Name of the number type in safetensors, such as "F32".
        shape: Shape of the tensor.
        start: Offset of the first byte of the tensor in the file.
        end: Offset after the last byte of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFile:
    """A safetensors file that is opened as a memory map, so that single tensors or rows can be read quickly.

    Args:
        path: Path of the file.

    Attributes:
        path: Path of the file.
        tensors: `{name of the tensor: TensorInfo}`, with the type, shape and position of each tensor.

    Raises:
        ValueError: If the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # `safe_open` is called only because it checks all sizes and offsets in the file. The bytes are read by
            # `mmap`.
            with safe_open(path, "np"), path.open("rb") as file:
                # The file begins with the length of its JSON header, as an integer of 8 bytes.
                start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start - 8))
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The weights {path} can't be read: {error!s:.300}. Download or write them again."
            ) from error
        header.pop("__metadata__", None)
        self.tensors = {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            self.tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), start + first, start + end)

    def raw_bytes(self, name: str) -> memoryview:
        """Return the bytes of the tensor `name` as they are stored in the file, without copying them."""
        info = self.tensors[name]
        return memoryview(self._bytes)[info.start : info.end]

    def array(self, name: str) -> np.ndarray:
        """Return a whole tensor, converted to float32.

        Args:
            name: Name of the tensor.

        Returns:
            Array with the shape of the tensor. It is read-only if the tensor is stored as float32.

        Raises:
            ValueError: If the type of the tensor is not F32, F16 or BF16.
        """
        info = self.tensors[name]
        return _to_float32(self.raw_bytes(name), info.dtype, name).reshape(info.shape)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Return some rows of a matrix, converted to float32. The other rows are not read from the disk.

        Args:
            name: Name of the tensor, of shape (rows, width).
            indices: Indices of the rows, as an integer array of shape (n,).

        Returns:
            Array of shape (n, width).

        Raises:
            ValueError: If an index is out of range, or the type is not F32, F16 or BF16.
        """
        info = self.tensors[name]
        if len(indices) and not 0 <= indices.min() <= indices.max() < info.shape[0]:
            raise ValueError(f"{name} has {info.shape[0]} rows; got indices {indices.min()} to {indices.max()}.")
        raw_rows = np.frombuffer(self.raw_bytes(name), np.uint8).reshape(info.shape[0], -1)[indices]
        return _to_float32(raw_rows.data.cast("B"), info.dtype, name).reshape(len(indices), *info.shape[1:])


def read_scalar(folder: Path, name: str) -> float | None:
    """Read one weight of a model that is a single number, such as `logit_scale`, without loading the model.

    Args:
        folder: Model folder with safetensors files.
        name: Name of the weight.

    Returns:
        The number; None if the model has no weight of this name.

    Raises:
        ValueError: If the weight is not a single number of type F32, F16 or BF16, or a file is missing or damaged.
    """
    for weights in map(WeightFile, find_weight_files(folder)):
        if name in weights.tensors:
            shape = weights.tensors[name].shape
            size = math.prod(shape)
            if size != 1:
                raise ValueError(f"{name} must be one number, got {size} numbers (shape {shape}) in {weights.path}.")
            return weights.array(name).item()
    return None


def _to_float32(raw: memoryview, dtype: str, name: str) -> np.ndarray:
    """Convert the bytes of a tensor to a float32 array of shape (elements,).

    Args:
        raw: Bytes of the tensor in little-endian order.
        dtype: Name of the tensor's type in safetensors, such as "BF16".
        name: Name of the tensor for the error message.

    Raises:
        ValueError: If `dtype` is not F32, F16 or BF16.
    """
    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == "BF16":  # a bfloat16 number is the upper half of a float32 number
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"{name} must be of type F32, F16 or BF16, got {dtype}.")


def find_weight_files(folder: Path) -> list[Path]:
    """Find the safetensors files that hold the weights of a model.

    Args:
        folder: Model folder in transformers' format.

    Returns:
        Only model.safetensors if it exists; otherwise the files that model.safetensors.index.json lists.

    Raises:
        ValueError: If the folder has neither file, the index is invalid, or a listed file is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        text = (
            "The model folder {model} has no weights ({file} is missing). Weights in other formats are not supported: "
            "load the model with transformers and save it again with `save_pretrained`."
        )
        raise make_coded_error(ValueError, "not_a_model", text, model=folder, file="model.safetensors")
    names = sorted({str(name) for name in read_json(index, weight_map=dict)["weight_map"].values()})
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} must list files of its own folder, got {names[:3]}.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"The model folder {folder} lacks {', '.join(missing)}. Download the model again.")
    return [folder / name for name in names]
