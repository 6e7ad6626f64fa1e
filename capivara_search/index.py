"""An index of pictures: folders go in, sentences and pictures find them.

index = PictureIndex.open("fotos.lance", model="hiaac-nlp/CAPIVARA")
index.add("~/Fotos")
for hit in index.search("um gato dormindo", k=5):
    print(hit.path, hit.score)
"""

import logging
import os
from collections.abc import Callable, Sequence
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capivara_search.results import Added, Classified, Hit, LeftOut, Status
from capivara_search.table import (
    LEFT_OUT,
    PICTURES,
    PictureTable,
    among,
    is_remote,
    locked,
    quoted,
    taken_between,
    vector_column,
    within,
)

if TYPE_CHECKING:
    from PIL import Image

    from capivara_search.models import SearchModel

HIT_COLUMNS = ("path", "width", "height", "taken", "latitude", "longitude", "size", "mtime_ns")
TIES = 16  # more rows than wanted are asked for, so that which of equal ones comes last is decided by path

logger = logging.getLogger("capivara")


def default_place() -> Path:
    """Where an index lies that no place was named for: $CAPIVARA_INDEX, or in the user's data."""
    if named := os.environ.get("CAPIVARA_INDEX"):
        return named
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "capivara" / "pictures.lance"


class PictureIndex:
    """Pictures of folders, to be found by what is in them. Made by `PictureIndex.open`."""

    def __init__(self, table: PictureTable, model: "str | SearchModel | None", device: str | None):
        self._table, self._asked, self._device = table, model, device

    @classmethod
    def open(
        cls, where: str | Path = "auto", model: "str | SearchModel | None" = None, device: str | None = None
    ) -> "PictureIndex":
        """An index that is there, or a new one, which is made by the first `add`.

        Args:
            where: folder, or address of object storage such as s3://bucket/fotos; auto: `default_place`.
            model: CAPIVARA folder, Hub id, or a model; None: the index's own, or of a new one the default.
            device: such as cpu or cuda:1; None: the GPU where there is one.

        Raises:
            ValueError: something else lies there, or an index of a newer version.
            OSError: it may not be read.
        """
        table = PictureTable(default_place() if where == "auto" else where)
        table.exists()  # says now what is wrong with it
        return cls(table, model, device)

    @property
    def where(self) -> str:
        """Folder or address."""
        return self._table.where

    @cached_property
    def model(self) -> "SearchModel":
        """The model that texts and pictures are embedded with. Raises ValueError, OSError where there is none."""
        from capivara_search.models import SearchModel, find_model

        if isinstance(self._asked, SearchModel):
            return self._asked
        known = self._table.model() if self._asked is None else None
        return find_model(known["source"] if known else self._asked, self._device)

    def add(
        self,
        *folders: str | Path,
        exact: bool = False,
        batch_size: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Added:
        """Bring the index up to date with folders: what is new is embedded, what has not changed is not read again.

        Args:
            folders: of pictures, with the folders in them; none: those that were added before.
            exact: decode at full size, where otherwise JPEG is decoded at a reduced size that serves the model.
            batch_size: pictures that the model sees at once.
            on_progress: called with how many pictures were read, and how many are to be.

        Raises:
            ValueError: no such folder, or no picture in it; then nothing is removed.
            OSError: no space left, no permission to write the index.
        """
        from capivara_search.adding import add_folders

        paths = [Path(folder).expanduser().absolute() for folder in folders or self.folders()]
        if not paths:
            raise ValueError("No folder was named, and none was added before. Name a folder of pictures.")
        self._table.create(self.model.width)
        with locked(self._table):
            return add_folders(self._table, self.model, paths, exact, batch_size, on_progress)

    def search(
        self,
        text: str | None = None,
        like: "str | Path | Image.Image | None" = None,
        k: int = 12,
        folder: str | Path | None = None,
        since: date | None = None,
        until: date | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The pictures that fit a sentence, a picture, or both best.

        Args:
            text: in Portuguese.
            like: picture, or path of one.
            k: how many at most.
            folder: only those in it.
            since: only those taken on that day or later; by the file's time where no camera says when.
            until: only those taken on that day or before.
            exact: compare every picture, in an index of any size.

        Raises:
            ValueError: neither text nor picture, k below 1, or the model is not that of the index.
        """
        text = text.strip() if text else None
        if not text and like is None:
            raise ValueError("The query is empty. Give a sentence, a picture, or both.")
        vectors = [self.model.texts([text])[0]] if text else []
        if like is not None:
            vectors.append(self._vector_of(like))
        return self.search_vector(np.mean([unit(v) for v in vectors], axis=0), k, folder, since, until, exact)

    def _vector_of(self, like: "str | Path | Image.Image") -> np.ndarray:
        from capivara_search.picture_files import open_query_picture

        image = open_query_picture(like) if isinstance(like, str | Path) else like
        return self.model.images([image])[0]

    def search_vector(
        self,
        vector: np.ndarray,
        k: int = 12,
        folder: str | Path | None = None,
        since: date | None = None,
        until: date | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """`search` by a vector (width,) of the model's."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        vector = unit(vector)
        clauses = taken_between(since, until)
        if folder is not None:
            clauses.append(within(Path(folder).expanduser().absolute()))
        clauses += self._of_model()
        where, asked = " AND ".join(clauses) or None, k + TIES
        while True:
            found = self._table.nearest(vector, asked, HIT_COLUMNS, where, exact)
            hits = to_hits(found, vector)
            if len(hits) < asked or hits[-1].score < hits[k - 1].score:
                return sorted(hits, key=lambda hit: (-hit.score, hit.path))[:k]
            asked *= 4

    def _of_model(self) -> list[str]:
        """The clause that leaves out vectors of other models, where there are some."""
        digest = self.model.image_digest
        others, total = self._table.of_other_models(digest), self._table.count()
        if self.model.width not in self._table.widths() or (others == total and total):
            known = (self._table.model() or {}).get("name", "another model")
            raise ValueError(
                f"The pictures of {self.where} were embedded by {known}, whose image side {self.model.name} does not "
                "share. Search with that model, or add the folders again with this one, which embeds them anew."
            )
        if not others:
            return []
        logger.info("%d of %d pictures were not yet embedded by %s, and are not found.", others, total, self.model.name)
        return [f"model = {quoted(digest)}"]

    def thumbnail(self, path: str) -> bytes | None:
        """The small picture (WebP, at most 256 pixels long) of a row; None where there is no such row."""
        found = self._table.rows(["thumbnail"], f"path = {quoted(path)}")
        return found["thumbnail"][0].as_py() if found.num_rows else None

    def row(self, path: str) -> Hit | None:
        """What is known of one picture; None where there is no such row."""
        found = self._table.rows(HIT_COLUMNS, f"path = {quoted(path)}")
        return to_hits(found)[0] if found.num_rows else None

    def vectors(self, paths: Sequence[str]) -> np.ndarray:
        """Vectors (paths, width), unit length, of rows. Raises KeyError where a path has none of this model's."""
        column = vector_column(self.model.width)
        digest = quoted(self.model.image_digest)
        found = self._table.rows(["path", column], f"{among('path', paths)} AND model = {digest}")
        of_path = dict(zip(found["path"].to_pylist(), as_array(found[column]), strict=True))
        return np.stack([of_path[path] for path in paths]).astype(np.float32)

    def forget(self, folder: str | Path) -> int:
        """Remove the rows of a folder, or of a file; returns how many. The files stay."""
        path = Path(folder).expanduser().absolute()
        with locked(self._table):
            self._table.remove_where(within(path), LEFT_OUT)
            self._table.remove_where(f"key = {quoted('folder:' + str(path))}", "about")
            return self._table.remove_where(within(path), PICTURES)

    def folders(self) -> dict[str, int]:
        """Folder that was added -> pictures in it and its folders."""
        folders = sorted(key.removeprefix("folder:") for key in self._table.about() if key.startswith("folder:"))
        return {folder: self._table.count(within(folder)) for folder in folders}

    def status(self) -> Status:
        """What the index is."""
        taken = self._table.rows(["taken"], "taken IS NOT NULL")["taken"].to_pylist()
        left_out = self._table.rows(["path", "reason"], table=LEFT_OUT).to_pylist()
        size = None
        if not is_remote(self.where):
            size = sum(path.stat().st_size for path in Path(self.where).rglob("*") if path.is_file())
        return Status(
            where=self.where,
            pictures=len(self),
            left_out=[LeftOut(**row) for row in left_out],
            folders=self.folders(),
            model=(self._table.model() or {}).get("name"),
            bytes=size,
            first=min(taken, default=None),
            last=max(taken, default=None),
        )

    def version(self) -> int:
        """A number that grows when the index changes."""
        return self._table.version()

    def __len__(self) -> int:
        return self._table.count()

    def classify(
        self, folder: "str | Path | Image.Image", labels: Sequence[str], template: str = "uma imagem de {}"
    ) -> list[Classified]:
        """The label of each picture of a folder."""
        raise NotImplementedError

    def duplicates(self, threshold: float = 0.97) -> list[list[Hit]]:
        """Groups of pictures that are nearly the same."""
        raise NotImplementedError

    def export(self, path: str | Path) -> int:
        """Write the rows to a .parquet or .csv file."""
        raise NotImplementedError


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector, of length 1."""
    vector = np.asarray(vector, np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def as_array(column: Any) -> np.ndarray:
    """A column of vectors, (rows, width)."""
    column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def to_hits(found: Any, query: np.ndarray | None = None) -> list[Hit]:
    """Rows of the table as hits, with their similarity to a query where they have vectors."""
    scores = [0.0] * found.num_rows
    if query is not None and found.num_rows:
        scores = (as_array(found["vector"]).astype(np.float32) @ query).tolist()
        found = found.drop_columns(["vector"])
    hits = []
    for row, score in zip(found.select(list(HIT_COLUMNS)).to_pylist(), scores, strict=True):
        modified = datetime.fromtimestamp(row.pop("mtime_ns") / 1e9)
        hits.append(Hit(score=score, modified=modified, **row))
    return hits
