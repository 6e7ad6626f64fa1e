"""Tensors of a `model.safetensors`, read where they lie: torch is not needed, and no tensor is copied before its use.

The file is mapped into memory, so that the rows of a vocabulary that nobody asks for are never read from the disk.
"""

import math
import mmap
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from capivara_common.cli import coded
from capivara_common.files import read_json


class TensorPlace(NamedTuple):
    """Where a tensor lies in its file: `kind` as safetensors names it ("F32"), `start` and `end` in bytes."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFile:
    """A safetensors file: name of a tensor -> where it lies. ValueError: it is missing, truncated, or none."""

    def __init__(self, path: Path):
        self.path, self.places = path, {}
        try:
            with safe_open(path, "np") as header:  # checks its sizes and offsets; the tensors lie without gaps
                parts = {name: header.get_slice(name) for name in header.offset_keys()}
                kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")  # the header has its length before it
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"The weights {path} can't be read: {error!s:.300}. Fetch or write them again.") from error
        for name, (kind, shape) in kinds.items():
            end = start + math.prod(shape) * _bits(kind) // 8
            self.places[name] = TensorPlace(kind, shape, start, end)
            start = end

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        place = self.places[name]
        return memoryview(self._bytes)[place.start : place.end]

    def array(self, name: str) -> np.ndarray:
        """A tensor as float32, of its own shape; not to be written to. ValueError: it is neither F32, F16 nor BF16."""
        place = self.places[name]
        return _float32(self.raw(name), place.kind, name).reshape(place.shape)

    def rows(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Rows of a matrix, (numbers, width), float32; the others are not read. ValueError: a number is too large."""
        place = self.places[name]
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < place.shape[0]:
            raise ValueError(f"{name} has {place.shape[0]} rows; asked for {numbers.min()} to {numbers.max()}.")
        items = np.frombuffer(self.raw(name), np.dtype(f"u{_bits(place.kind) // 8}")).reshape(place.shape)
        found = np.ascontiguousarray(items[numbers])
        return _float32(found.data.cast("B"), place.kind, name).reshape(found.shape)


def _bits(kind: str) -> int:
    """Of a number; its name tells, as "F8_E4M3" has 8."""
    return 8 if kind == "BOOL" else int(re.search(r"\d+", kind)[0])


def _float32(raw: memoryview, kind: str, name: str) -> np.ndarray:
    if kind == "F32":
        return np.frombuffer(raw, "<f4")
    if kind == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if kind == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"{name} is of the kind {kind}; weights are F32, F16 or BF16.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, one or several. ValueError: one or the index is missing or damaged."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        text = (
            "The model folder {model} has no weights ({file} is missing). Weights in another format are not read: load "
            "the model and save it again with `save_pretrained`."
        )
        raise coded(ValueError, "not_a_model", text, model=folder, file="model.safetensors")
    names = sorted({str(name) for name in read_json(index, weight_map=dict)["weight_map"].values()})
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} names no files of this folder.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"The model folder {folder} lacks the weights {', '.join(missing)}, which its index names.")
    return [folder / name for name in names]
