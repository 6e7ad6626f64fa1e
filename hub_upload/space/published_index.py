"""An index as it is published: a copy that names no folder of this machine and no place where a picture was taken.

    copied = publish_index(PictureIndex.open("fotos.lance"), Path("space/index.lance"), "models/mine")

Pictures are found by their names below the folders that were added; thumbnails stand for them.
"""

import json
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from capivara_search.adding import FOLDER_KEY
from capivara_search.index import PictureIndex
from capivara_search.table import PictureTable, vector_column


def publish_index(index: PictureIndex, where: Path, model: str, title: str = "") -> int:
    """Copy an index.

    Args:
        index: with rows.
        where: folder of the copy, which is not there yet.
        model: where the Space finds the model: a folder relative to the Space's, or a Hub id.
        title: name of the folder that stands for the one that was added, where it is only one.

    Returns:
        The number of pictures.

    Raises:
        ValueError: there is no picture that the index's model has embedded.
    """
    names = _new_folders(list(index.folders()), title)
    source, target, width = PictureTable(index.where), PictureTable(where), index.model.width
    target.create(width)
    kept, digest = target.pictures.schema, index.model.image_digest
    column, copied = vector_column(width), 0
    for batch in source.batches([field.name for field in kept], f"model = '{digest}'"):
        rows = pa.Table.from_batches([batch])
        renamed = pa.array([_renamed(path, names) for path in rows["path"].to_pylist()], pa.string())
        nowhere = pa.nulls(len(rows), pa.float64())
        changed: dict[str, Any] = {"path": renamed, "latitude": nowhere, "longitude": nowhere}
        target.merge(pa.Table.from_arrays([changed.get(f.name, rows[f.name]) for f in kept], schema=kept))
        copied += len(rows)
    if not copied:
        raise ValueError(f"The index {index.where} has no picture that {index.model.name} has embedded ({column}).")
    facts = {"source": model, "name": index.model.name, "width": width, "image_digest": digest}
    target.note({"model": json.dumps(facts), **{FOLDER_KEY + name: "" for name in names.values()}})
    return copied


def _new_folders(folders: list[str], title: str) -> dict[str, str]:
    """Folder that was added -> name in its place, the innermost first."""
    names: dict[str, str] = {}
    for folder in sorted(folders, key=len, reverse=True):
        name = "/" + ((title if len(folders) == 1 else "") or PurePath(folder).name or "pictures").replace("/", "-")
        while name in names.values():
            name += "-"
        names[folder] = name
    return names


def _renamed(path: str, names: dict[str, str]) -> str:
    for folder, name in names.items():
        if PurePath(path).is_relative_to(folder):
            return str(PurePath(name, PurePath(path).relative_to(folder)))
    return str(PurePath("/", PurePath(path).name))  # of a folder that is no longer listed
