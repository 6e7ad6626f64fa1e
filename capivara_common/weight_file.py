"""Tensors of a `model.safetensors`, read where they lie: torch is not needed, and no tensor is copied before its use.

    weights = WeightFile(folder / "model.safetensors")
    weights.array("text_projection.weight")  # (projection_dim, width), float32

The file is mapped into memory, so that the rows of a vocabulary that nobody asks for are never read from the disk.
"""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capivara_common.cli import coded

LENGTH_BYTES = 8  # of the header's own length, little endian; then the header as JSON, then the tensors
MAX_HEADER_BYTES = 100_000_000  # safetensors' own reader takes no more
MAX_RANK = 8  # of a tensor; those of models have at most 5
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in its file: `kind` as safetensors names it ("F32"), `start` and `end` in bytes."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFile:
    """A safetensors file, mapped into memory.

    Attributes:
        path: of the file.
        places: name of a tensor -> where it lies.

    Raises:
        ValueError: the file is missing, truncated, or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.places = self._read_places()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"The weights {path} can't be read: {error}. Fetch or write them again.") from error

    def _read_places(self) -> dict[str, TensorPlace]:
        size = int.from_bytes(self._bytes[:LENGTH_BYTES], "little")
        begin = LENGTH_BYTES + size
        if not 0 < size <= MAX_HEADER_BYTES or begin > len(self._bytes):
            raise ValueError(f"its header would have {size} bytes, the file has {len(self._bytes)}")
        places = {}
        for name, entry in json.loads(self._bytes[LENGTH_BYTES:begin]).items():
            if name == "__metadata__":
                continue
            kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            # Before anything is computed: a product of thousands of long numbers takes hours.
            whole = all(type(number) is int and 0 <= number <= len(self._bytes) for number in (*shape, start, end))
            if len(shape) > MAX_RANK or not whole:
                raise ValueError(
                    f"the shape of {name[:80]!r} must have at most {MAX_RANK} numbers; they and its offsets must be "
                    "whole and no larger than the file"
                )
            wanted = math.prod(shape) * ITEM_BYTES[kind] if kind in ITEM_BYTES else None
            if begin + end > len(self._bytes) or end - start != wanted:
                raise ValueError(f"{name[:80]!r} ({kind!s:.80}, {shape}) does not lie where the header says")
            places[name] = TensorPlace(kind, shape, begin + start, begin + end)
        return places

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        place = self.places[name]
        return memoryview(self._bytes)[place.start : place.end]

    def array(self, name: str) -> np.ndarray:
        """A tensor as float32, of its own shape; not to be written to.

        Raises:
            ValueError: it is of a kind other than float32, float16 and bfloat16.
        """
        place = self.places[name]
        return _float32(self.raw(name), place.kind, name).reshape(place.shape)

    def rows(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Some rows of a matrix, (numbers, width), float32; the others are not read.

        Raises:
            ValueError: as `array`, or a number is outside of the matrix.
        """
        place = self.places[name]
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < place.shape[0]:
            raise ValueError(f"{name} has {place.shape[0]} rows; asked for {numbers.min()} to {numbers.max()}.")
        items = np.frombuffer(self.raw(name), np.dtype(f"u{ITEM_BYTES[place.kind]}")).reshape(place.shape)
        return _float32(np.ascontiguousarray(items[numbers]).data.cast("B"), place.kind, name).reshape(
            len(numbers), *place.shape[1:]
        )


def _float32(raw: memoryview, kind: str, name: str) -> np.ndarray:
    if kind == "F32":
        return np.frombuffer(raw, "<f4")
    if kind == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if kind == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"{name} is of the kind {kind}; weights are F32, F16 or BF16.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the several that its index names.

    Raises:
        ValueError: there is none, the index is damaged, or a file that it names is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        text = (
            "The model folder {model} has no weights ({file} is missing). Weights in another format are not read: load "
            "the model and save it again with `save_pretrained`."
        )
        raise coded(ValueError, "not_a_model", text, model=folder, file="model.safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files of this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} can't be read: {error}") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"The model folder {folder} lacks the weights {', '.join(missing)}, which its index names.")
    return [folder / name for name in names]
