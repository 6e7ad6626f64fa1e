"""Pictures and models of a few pixels and numbers, for the tests of the index."""

from pathlib import Path

import numpy as np
import PIL.Image

SIDE = 40  # pixels


def make_pictures(folder: Path, number: int, seed: int = 0) -> list[Path]:
    """Noise in different colours, in five folders, as PNG."""
    generator, paths = np.random.default_rng(seed), []
    for i in range(number):
        path = folder / f"d{i % 5}" / f"p{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.random((SIDE, SIDE + i % 7, 3)) * 120 + generator.random(3) * 120
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def rows_of(index) -> dict[str, tuple]:
    """Path -> all that the index holds of it."""
    rows = index._table.rows([field.name for field in index._table.columns()]).to_pylist()
    paths = [row["path"] for row in rows]
    assert len(paths) == len(set(paths)), "a row is there twice"
    return {row["path"]: tuple(str(value) for value in row.values()) for row in rows}
