"""An index of pictures: folders go in, sentences and pictures find them.

For example:

    index = PictureIndex.open("fotos.lance", model="hiaac-nlp/CAPIVARA")
    index.add("~/Fotos")
    for hit in index.search("um gato dormindo", k=5):
        print(hit.path, hit.score)
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from capivara_search.adding import KnownRows, add_folders, asked_folders, embed_files
from capivara_search.duplicates import best_first, near_groups
from capivara_search.estimates import progress_of
from capivara_search.labelling import checked_labels, classify_vectors
from capivara_search.picture_files import FileState, absolute_folder, find_pictures, open_query_picture
from capivara_search.results import TEMPLATE, Added, Classified, Hit, LeftOut, Status
from capivara_search.storage import DamagedIndex
from capivara_search.table import PictureTable
from capivara_search.table_columns import (
    ABOUT,
    FOLDER_KEY,
    HIT_COLUMNS,
    LEFT_OUT,
    PICTURES,
    THUMBNAIL,
    VECTOR,
    all_of,
    as_array,
    quoted,
    taken_between,
    to_hits,
    vector_column,
    within,
)  # fmt: skip
from capivara_search.words import failure, note

if TYPE_CHECKING:
    from threading import Event

    from PIL import Image

    from capivara_search.models import SearchModel

TIES = 4  # more rows than wanted are asked for, so that which of equal ones comes last is decided by path


def default_place() -> str | Path:
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
            model: folder, Hub id, or a model; None: the index's own, or of a new one the default.
            device: such as cpu or cuda:1; None: the GPU where there is one.

        Raises:
            ValueError: something else lies there, or an index of a newer version.
            OSError: it may not be read.
        """
        table = PictureTable(default_place() if where == "auto" else where)
        with suppress(DamagedIndex):  # which `add` may mend
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
        only: Collection[str] | None = None,
    ) -> Added:
        """Bring the index up to date with folders: what is new is embedded, what has not changed is not read again.

        Args:
            folders: of pictures, with the folders in them; none: those that were added before on this machine.
            exact: decode at full size, where otherwise JPEG is decoded at a reduced size that serves the model.
            batch_size: pictures that the model sees at once.
            on_progress: called with how many pictures were read and how many are to be, again once the model is loaded.
            only: absolute paths in the folders, of files or folders that are there or were; nothing else is looked at.

        Raises:
            ValueError: no such folder, or no picture in it; then nothing is removed.
            OSError: no space left, no permission to write the index.
        """
        if only is None:
            self.mend()
        paths = [absolute_folder(folder) for folder in folders or self.asked_folders()]
        if not paths:
            raise ValueError("No folder was named, and none was added on this machine before. Name one of pictures.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        progress = on_progress or (lambda done, total: None)
        return add_folders(self._table, self.model, paths, exact, batch_size, progress, only)

    def watch(
        self,
        *folders: str | Path,
        poll: bool | None = None,
        stop: "Event | None" = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Added]:
        """Bring folders up to date, and follow them: what changes is in the index seconds later. Ctrl-C ends it.

        Args:
            folders, on_progress: as `add` has them.
            poll: look at all files every two seconds; None: where a folder lies on a file system of the network.
            stop: ends it when it is set.

        Yields:
            What was done: at first in the folders as a whole, then with each burst of changes.

        Raises:
            ImportError: the package watchfiles is not installed.
            ValueError: as `add`, at first; later a line of the log says what is wrong with a folder.
            OSError: no space left, no permission to write the index, or too many folders to be followed.
        """
        from capivara_search.watch import follow  # here: nothing else needs watchfiles

        def add(there: Iterable[Path], only: Collection[str] | None) -> Added:
            added = self.add(*there, only=only, on_progress=on_progress)
            self.model.prepare_images()  # now, so that the first change waits for none of it
            return added

        return follow(add, lambda: [absolute_folder(one) for one in folders or self.asked_folders()], poll, stop)

    def progress(self) -> dict[str, int | None] | None:
        """`done` and `total` pictures, and `left_s`, seconds, of an indexing that goes on in any process; else None."""
        return progress_of(self._table.where)

    def mend(self) -> None:
        """Take the newest version of a damaged index that can be read, or none; a line of the log says what is lost.

        Raises:
            ValueError: its record is whole but can't be read, as of a newer LanceDB.
        """
        with self._table.locked():
            self._table.mend()

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
        self._check_model()  # before the model is loaded
        vectors = [self.model.texts([text])] if text else []
        if like is not None:
            image = open_query_picture(like) if isinstance(like, str | Path) else like
            vectors.append(self.model.images([image]))
        mean = np.concatenate(vectors).mean(axis=0)
        return self.search_vector(mean, k, folder, since, until, exact, of_text=like is None)

    def search_vector(
        self,
        vector: np.ndarray,
        k: int = 12,
        folder: str | Path | None = None,
        since: date | None = None,
        until: date | None = None,
        exact: bool = False,
        of_text: bool = False,
    ) -> list[Hit]:
        """`search` by a vector (width,) of the model's; `of_text`: of a sentence, which decides the scale of scores."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if np.shape(vector) != (self.model.width,):
            raise ValueError(f"The vector must have {self.model.width} numbers, got the shape {np.shape(vector)}.")
        if since and until and since > until:
            raise ValueError(f"since must not be after until, got {since} and {until}.")
        vector, clause = unit(vector), all_of([*self._of_model(), *_filters(folder, since, until)])
        asked = k + TIES
        while True:
            found = self._table.nearest(vector, asked, clause, exact)
            scores = np.clip(unit(as_array(found[VECTOR])) @ vector, -1, 1)
            hits = sorted(to_hits(found, scores), key=lambda hit: (-hit.score, hit.path))
            if len(hits) < asked or hits[-1].score < hits[k - 1].score:
                break
            asked *= 4
        if not of_text:
            return hits[:k]
        own = self.model.on_own_scale(np.array([hit.score for hit in hits[:k]]))
        return [replace(hit, score=float(score)) for hit, score in zip(hits, own, strict=False)]

    def newest(
        self, k: int = 12, folder: str | Path | None = None, since: date | None = None, until: date | None = None
    ) -> list[Hit]:
        """The pictures that were taken last, latest first; by the file's time where no camera says when.

        Args:
            k: how many at most.
            folder, since, until: as `search` has them.
        """
        clauses = _filters(folder, since, until)
        rows = self._table.rows(["taken", "mtime_ns"], all_of(clauses))
        taken = rows["taken"].to_numpy().astype("datetime64[us]")
        here = time.localtime().tm_gmtoff * 1_000_000  # cameras tell the time of the place
        modified = (rows["mtime_ns"].to_numpy() // 1000 + here).astype("datetime64[us]")
        times = np.sort(np.where(np.isnat(taken), modified, taken))
        if len(times) > k:
            last = times[-k].astype(datetime)
            nanoseconds = (int(times[-k].astype(np.int64)) - here) * 1000
            clauses.append(f"(taken >= timestamp '{last}' OR (taken IS NULL AND mtime_ns >= {nanoseconds}))")
        hits = to_hits(self._table.rows(HIT_COLUMNS, all_of(clauses)))
        return sorted(hits, key=lambda hit: (-(hit.taken or hit.modified).timestamp(), hit.path))[:k]

    def _of_model(self) -> list[str]:
        """The clause that leaves out vectors of other models, where there are some."""
        if not (others := self._check_model()):
            return []
        note("not_yet_embedded", others, len(self), self.model.name, level=logging.WARNING)
        return [f"model = {quoted(self.model.image_digest)}"]

    def _check_model(self) -> int:
        """How many rows are of other models. Raises ValueError where all of them are."""
        digest = self.model.image_digest
        others, total = self._table.of_other_models(digest), len(self)
        if total and (others == total or self.model.width not in self._table.widths()):
            known = self._table.other_model(digest)
            values = {"model": self.model.name, "path": self.where, "known": known, "total": total}
            raise failure(ValueError, "other_model", **values)
        return others

    def thumbnail(self, path: str) -> bytes | None:
        """The small picture (WebP, at most 256 pixels long) of a row; None where there is no such row."""
        found = self._table.of_paths([THUMBNAIL], [str(path)])
        return found[THUMBNAIL][0].as_py() if found.num_rows else None

    def row(self, path: str) -> Hit | None:
        """What is known of one picture; None where there is no such row."""
        found = self._table.of_paths(HIT_COLUMNS, [str(path)])
        return to_hits(found)[0] if found.num_rows else None

    def vectors(self, paths: Sequence[str]) -> np.ndarray:
        """Vectors of rows: (paths, width), float32, unit length. Raises KeyError where a path has none."""
        known = self._known_vectors(paths)
        if missing := [path for path in paths if path not in known]:
            raise KeyError(f"{missing[0]} has no vector of {self.model.name} in the index {self.where}.")
        return np.stack([known[path] for path in paths]) if known else np.empty((0, self.model.width), np.float32)

    def _known_vectors(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Path -> vector, of those that have one of this model's."""
        column = vector_column(self.model.width)
        if not self._table.exists() or self.model.width not in self._table.widths():
            return {}
        found = self._table.of_paths(["path", "model", column], list(paths))
        found = found.filter(pc.equal(found["model"], self.model.image_digest))
        return dict(zip(found["path"].to_pylist(), unit(as_array(found[column])), strict=True))

    def forget(self, folder: str | Path) -> int:
        """Remove the rows of a folder, or of a file, and their thumbnails; returns how many. The files stay."""
        path = absolute_folder(folder)
        if not self._table.exists():
            return 0
        with self._table.locked():
            removed, _ = (self._table.remove_where(within(path), name) for name in (PICTURES, LEFT_OUT))
            inside = [FOLDER_KEY + folder for folder in self._table.folders() if Path(folder).is_relative_to(path)]
            self._table.remove(inside, ABOUT)
            self._table.purge()
            return removed

    def folders(self) -> dict[str, int]:
        """Folder that was added -> pictures in it and the folders in it."""
        return {folder: self._table.count(within(folder)) for folder in self._table.folders()}

    def asked_folders(self) -> dict[str, str]:
        """Folder that was added on this machine -> its real path. An index of somebody else's has none."""
        asked = asked_folders(self._table)
        return {folder: asked[folder] for folder in self._table.folders() if folder in asked}

    def status(self) -> Status:
        """What the index is."""
        first, last = self._table.first_and_last()
        left_out = self._table.rows(["path", "reason"], table=LEFT_OUT).to_pylist()
        model = self._table.model() or {}
        return Status(
            where=self.where,
            pictures=len(self),
            left_out=sorted((LeftOut(**row) for row in left_out), key=lambda one: one.path),
            folders=self.folders(),
            model=model.get("name"),
            bytes=self._table.bytes(),
            approximate=bool(model) and self._table.exists() and self._table.is_approximate(model["width"]),
            first=first,
            last=last,
        )

    def version(self) -> int:
        """A number that grows when the index changes."""
        return self._table.version()

    def __len__(self) -> int:
        return self._table.count()

    def classify(
        self, folder: "str | Path | Image.Image", labels: Sequence[str], template: str = TEMPLATE
    ) -> list[Classified]:
        """The label that fits each picture best, by the vectors of the index; other pictures are read, and not kept.

        Args:
            folder: of pictures, one picture's path, or a picture.
            labels: words, in Portuguese.
            template: sentence with `{}` where a label goes.

        Raises:
            ValueError: no label, one twice, or a template without `{}`; no such folder, or no picture in it.
        """
        labels = checked_labels(labels, template)
        if not isinstance(folder, str | Path):
            return classify_vectors(self.model, [""], self.model.images([folder]), labels, template)
        paths, vectors = self._vectors_in(absolute_folder(folder))
        return classify_vectors(self.model, paths, vectors, labels, template)

    def _vectors_in(self, place: Path) -> tuple[list[str], np.ndarray]:
        """Paths of the pictures of a folder, or of one, and their vectors."""
        files = [FileState.of(str(place))] if place.is_file() else find_pictures([place])[0]
        rows = self._table.rows(["path", "size", "mtime_ns", "digest", "model"], within(place))
        known = KnownRows(rows, self.model.image_digest)
        vectors = self._known_vectors([file.path for file in files if known.is_done(file)])
        vectors |= embed_files(self.model, [file for file in files if file.path not in vectors], place)
        paths = [file.path for file in files if file.path in vectors]
        return paths, np.stack([vectors[path] for path in paths]) if paths else np.empty((0, self.model.width))

    def duplicates(self, threshold: float = 0.97) -> list[list[Hit]]:
        """Groups of pictures that are nearly the same, the largest group first.

        Args:
            threshold: least cosine similarity of a picture to another one of its group, above 0 to 1.

        Returns:
            Of each group the picture with most pixels first, then by similarity to it, which is their score.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}.")
        if not self._table.exists():
            return []
        column = vector_column(self.model.width)
        rows = self._table.rows([*HIT_COLUMNS, column], all_of(self._of_model())).sort_by("path")
        vectors = as_array(rows[column])
        groups = near_groups(vectors, threshold)
        return [best_first(to_hits(rows.take(numbers)), unit(vectors[numbers])) for numbers in groups]

    def export(self, path: str | Path) -> int:
        """Write the rows to a .parquet file, with vectors, or a .csv file; returns how many there are.

        Raises:
            ValueError: another suffix, no file can be made there, or there is no index.
            OSError: no space left.
        """
        from capivara_search.exporting import export_rows

        if not self._table.exists():
            raise ValueError(f"There is no index at {self.where}, and nothing to export. Add a folder of pictures.")
        with self._table.locked():  # what is read is not tidied away meanwhile
            return export_rows(self._table, path)


def _filters(folder: str | Path | None, since: date | None, until: date | None) -> list[str]:
    """The clauses of a search."""
    return [*taken_between(since, until), *([] if folder is None else [within(absolute_folder(folder))])]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., width), of length 1, float32."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
