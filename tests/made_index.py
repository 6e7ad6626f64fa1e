"""Pictures of a few pixels, and helpers for the tests of the index."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

SIDE = 40  # pixels


def make_pictures(folder: Path, number: int, seed: int = 0) -> list[Path]:
    """Write PNG pictures of noise in different colors into five subfolders."""
    rng, paths = np.random.default_rng(seed), []
    for i in range(number):
        path = folder / f"d{i % 5}" / f"p{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.random((SIDE, SIDE + i % 7, 3)) * 120 + rng.random(3) * 120
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def rows_of(index) -> dict[str, tuple]:
    """Return all columns of each row of an index, by path."""
    rows = index._table.rows([field.name for field in index._table.columns()]).to_pylist()
    paths = [row["path"] for row in rows]
    assert len(paths) == len(set(paths)), "a path has two rows"
    return {row["path"]: tuple(str(value) for value in row.values()) for row in rows}


@contextmanager
def expect_error(code: str | None, error_type: type[Exception] = ValueError, **values: object) -> Iterator[None]:
    """Check that the block raises an error with this code, with these values among its own, in a single line."""
    with pytest.raises(error_type) as caught:
        yield
    error = caught.value
    assert error.code == code and "\n" not in str(error)
    assert {name: str(error.values[name]) for name in values} == {name: str(value) for name, value in values.items()}


def logged_values(caplog: pytest.LogCaptureFixture, code: str) -> list[tuple]:
    """Return the values of each message with this code in the log."""
    return [record.values for record in caplog.records if getattr(record, "code", None) == code]
