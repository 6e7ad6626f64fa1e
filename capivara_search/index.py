"""An index of pictures: folders go in, sentences and pictures find them."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capivara_search import folders as known_folders
from capivara_search import query
from capivara_search.duplicates import (
    CachedRows,
    find_duplicate_groups,
    get_comparison_vectors,
    is_duplicate,
    newest_first_order,
    pairwise_similarity,
)
from capivara_search.estimates import estimate_for, read_progress
from capivara_search.indexing import IndexWriter, StoredRows, embed_files, finish_indexing, start_indexing
from capivara_search.messages import localized_error, log_message
from capivara_search.picture_files import FileState, find_pictures, open_query_picture, to_absolute_path
from capivara_search.results import (
    DEFAULT_LABEL_TEMPLATE,
    DUPLICATE_MIN_SIMILARITY,
    Classification,
    Hit,
    IndexReport,
    IndexStatus,
    SkippedFile,
)
from capivara_search.storage import DamagedIndexError
from capivara_search.table import (
    HIT_COLUMNS,
    MAX_PATHS_PER_CLAUSE,
    SKIPPED_FILES_TABLE,
    THUMBNAIL_COLUMN,
    PictureTable,
    comparison_columns,
    date_clauses,
    folders_clause,
    join_clauses,
    l2_normalize,
    quote_sql,
    to_array,
    to_hits,
    vector_column,
)  # fmt: skip

if TYPE_CHECKING:
    from threading import Event

    from PIL import Image

    from capivara_search.models import SearchModel

DUPLICATE_OVERFETCH = 4  # times the wanted hits are asked for where copies stand as one; more where that is not enough
OVERFETCH_GROWTH = 16  # times as many then
MAX_CACHED_ROWS = 20_000  # up to which all that a search is held to are compared, and looked at for copies, in memory

FolderFilter, DateFilter = str | Path | None, date | None  # that a search is held to


def default_index_path() -> str | Path:
    """Where an index lies that no place was named for: $CAPIVARA_INDEX, or in the user's data."""
    if named := os.environ.get("CAPIVARA_INDEX"):
        return named
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "capivara" / "pictures.lance"


class PictureIndex:
    """Pictures of folders, to be found by what is in them. Made by `PictureIndex.open`.

    Attributes:
        line: whether hits of a sentence say if they are better than the background (`Hit.fits`); None: where the model
            was measured to tell (`capivara_search.asking.draws_line`).
    """

    relevance_threshold: bool | None = None

    def __init__(self, table: PictureTable, model: "str | SearchModel | None", device: str | None):
        self._table, self._requested_model, self._device = table, model, device

    @classmethod
    def open(
        cls, where: str | Path = "auto", model: "str | SearchModel | None" = None, device: str | None = None
    ) -> "PictureIndex":
        """An index that is there, or a new one, which is made by the first `add`.

        `where`: folder, or address such as s3://bucket/fotos; auto: `default_place`. `model`: folder, Hub id, a model;
        None: the index's own, or of a new one the default. `device`: such as cuda:1; None: the GPU where there is one.
        Raises ValueError where something else lies there, or an index of a newer version, OSError: it may not be read.
        """
        table = PictureTable(default_index_path() if where == "auto" else where)
        with suppress(DamagedIndexError):  # which `add` may mend
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

        if isinstance(self._requested_model, SearchModel):
            return self._requested_model
        known = self._table.model() if self._requested_model is None else None
        return find_model(known["source"] if known else self._requested_model, self._device)

    # --- what goes in

    def add(
        self,
        *folders: str | Path,
        batch_size: int = 32,
        on_progress: Callable[[int, int], None] | None = None,
        exclude: Sequence[str] = (),
        include: Sequence[str | Path] = (),
        only_paths: Collection[str] | None = None,
        real_paths: Mapping[Path, str] | None = None,
    ) -> IndexReport:
        """Bring the index up to date with folders: what is new is embedded, what has not changed is not read again.

        Args:
            folders: of pictures, with the folders in them; none: as `folders_to_add` has them.
            batch_size: pictures that the model sees at once.
            on_progress: called with how many pictures were read and how many are to be, again once the model is loaded.
            exclude: patterns of what is left out of each folder, as in its `.gitignore`; the index keeps them.
            include: patterns that no longer hold, and what was forgotten and comes in again.
            only: absolute paths in the folders, of files or folders that are there or were, at least one: of a few,
                nothing else is looked at.
            real_paths: of `folders_to_add`, where its folders are passed on: a folder whose real path has become
                another one since is refused. None: the real paths of `folders` are resolved now.

        Raises ValueError: no such folder, a forgotten one, or no picture in it; then nothing is removed. No such
        pattern. OSError: no space left, no permission to write the index.
        """
        if only_paths is None or len(only_paths) > MAX_PATHS_PER_CLAUSE:  # then all are looked at
            only_paths = None
            self.repair()
        paths = self.folders_to_add(folders, exclude, include, real_paths)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        start = time.monotonic()
        with self._table.locked(), estimate_for(self.where, on_progress or (lambda done, total: None)) as tell:
            plan = start_indexing(self._table, self.model, paths, exclude, include, only_paths, tell)
            writer = IndexWriter(self._table, self.model, plan, batch_size, tell)
            added = writer.run()
            finish_indexing(self._table, self.model, plan, added)
            if writer.reported < len(plan.files):
                tell(len(plan.files), len(plan.files))
        added.seconds = time.monotonic() - start
        return added

    def folders_to_add(
        self,
        folders: Sequence[str | Path] = (),
        exclude: Sequence[str] = (),
        include: Sequence[str | Path] = (),
        real_paths: Mapping[Path, str] | None = None,
    ) -> dict[Path, str]:
        """Return the folders that `add` looks through, each with its real path.

        These are the named folders and included folders that lie in no known one. Where none is named, all that were
        added on this machine and lie where they lay; a line of the log says which do not.

        Args:
            folders: as `add` takes them.
            exclude: patterns to be left out.
            include: patterns and paths that come in again.
            real_paths: real paths that are known already; of other named folders they are resolved now.

        Raises:
            ValueError: If there is no folder, or no such pattern.
        """
        known = real_paths or {}
        named = {one: known.get(one) or os.path.realpath(one) for one in map(to_absolute_path, folders)}
        return known_folders.folders_to_add(self._table, named, exclude, include)

    def watch(
        self,
        *folders: str | Path,
        poll: bool | None = None,
        stop: "Event | None" = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[IndexReport]:
        """Bring folders up to date, as `add` does, and follow them: what changes is in the index seconds later.

        `poll`: look at all files every two seconds; None: where a folder lies on a file system of the network. `stop`
        ends it when it is set, as Ctrl-C does. Yields what was done, at first in the folders as a whole, then with each
        burst of changes. Raises as `add`; OSError also of too many folders, ImportError without watchfiles.
        """
        from capivara_search.watch import follow_index  # here: nothing else needs watchfiles

        return follow_index(self, [*map(to_absolute_path, folders)], poll, stop, on_progress)

    def progress(self) -> dict[str, int | None] | None:
        """`done` and `total` pictures, and `left_s`, seconds, of an indexing that goes on in any process; else None."""
        return read_progress(self._table.where)

    def repair(self) -> None:
        """Take the newest version of a damaged index that can be read, or none; a line of the log says what is lost."""
        with self._table.locked():
            self._table.repair()

    def forget(self, folder: str | Path) -> int:
        """Remove the rows of a folder, or of a file; returns how many. They stay out, until `add` includes them."""
        return known_folders.forget_folder(self._table, to_absolute_path(folder)) if self._table.exists() else 0

    def move(self, old: str | Path, new: str | Path) -> tuple[int, int]:
        """Take the rows of a folder for those of another one, which its pictures were moved to; nothing is read again.

        Returns how many rows there are, and how many of their files are in the new folder. Raises ValueError where one
        folder lies in the other, nothing is known of the old one, or no file is in the new one.
        """
        return known_folders.move_folder(self._table, to_absolute_path(old), to_absolute_path(new))

    # --- what is found

    def search(
        self,
        text: str | None = None,
        like: "str | Path | Image.Image | None" = None,
        k: int = 12,
        folder: FolderFilter = None,
        since: DateFilter = None,
        until: DateFilter = None,
        exact: bool = False,
        more: str | Sequence[str] = (),
        less: str | Sequence[str] = (),
        group_duplicates: bool = False,
    ) -> list[Hit]:
        """The pictures that fit a sentence, a picture, or both best.

        Args:
            text: in Portuguese.
            like: picture, or path of one.
            k: how many at most.
            folder: only those in it.
            since, until: only those of that day or later, or before; by the file's time where no camera says when.
            exact: compare every picture, in an index of any size.
            more: words that the search is pulled towards, with a weight as in "0.5:praia", which is 1 otherwise.
            less: words that it is pulled away from. Pictures that show them sink; none is excluded.
            stacked: those that are nearly the same (`capivara_search.results.SAME`) stand as the best of them, which
                says how many `copies` it has.

        Raises ValueError: nothing is asked for, k below 1, a weight breaks its rule, or the model is not the index's.
        """
        text = text.strip() if text else None
        both = ((sign, [words] if isinstance(words, str) else words) for sign, words in ((1, more), (-1, less)))
        given = [(sign, *query.parse_feedback(one)) for sign, words in both for one in words]
        if not text and like is None and not given:
            raise localized_error(ValueError, "empty_query")
        self._model_clauses()  # before the model is loaded
        vectors = [self.model.embed_texts([text])] if text else []
        if like is not None:
            image = open_query_picture(like) if isinstance(like, str | Path) else like
            vectors.append(self.model.embed_images([image]))
        vector = np.concatenate(vectors).mean(axis=0) if vectors else None
        if given:
            pulls = zip(given, self.model.embed_texts([words for *_, words in given]), strict=True)
            vector = self.apply_feedback(vector, [(sign * weight, pull) for (sign, weight, _), pull in pulls])
        return self.search_vector(vector, k, folder, since, until, exact, like is None and not given, group_duplicates)

    def apply_feedback(self, vector: np.ndarray | None, feedback: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
        """A query's vector (width,), or none, pulled towards others (width,) by their weights, away by one below 0."""
        return query.apply_feedback(vector, feedback, self._sample_vectors())

    def _sample_vectors(self) -> np.ndarray:
        """Vectors of pictures (rows, width), unit length, spread over the index."""
        width, digest = self.model.width, self.model.image_digest
        return self._table.cached("sample", lambda: l2_normalize(self._table.sample(width, digest, query.SAMPLE_ROWS)))

    def _compute_relevance_threshold(self, vector: np.ndarray) -> float:
        """The cosine with a sentence's vector (width,) above which a picture is better than the background."""

        def background() -> float:
            neutral, nearest = (
                self.model.embed_texts(query.NEUTRAL_SENTENCES),
                self._make_nearest(join_clauses(self._model_clauses())),
            )
            best = [nearest(vector, 1)["score"][0].as_py() for vector in neutral]
            return query.background_z_score(self._sample_vectors(), neutral, best)

        scores = self._sample_vectors() @ vector
        return float(scores.mean() + self._table.cached("background", background) * scores.std())

    def search_vector(
        self,
        vector: np.ndarray,
        k: int = 12,
        folder: FolderFilter = None,
        since: DateFilter = None,
        until: DateFilter = None,
        exact: bool = False,
        is_text_query: bool = False,
        group_duplicates: bool = False,
    ) -> list[Hit]:
        """`search` by a vector (width,) of the model's; `of_text`: of a sentence, which decides the scale of scores."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if np.shape(vector) != (self.model.width,):
            raise ValueError(f"The vector must have {self.model.width} numbers, got the shape {np.shape(vector)}.")
        if since and until and since > until:
            raise ValueError(f"since must not be after until, got {since} and {until}.")
        if own := self._model_clauses():
            others = self._table.count_other_models(self.model.image_digest)
            log_message("not_yet_embedded", others, len(self), self.model.name, level=logging.WARNING)
        vector, clause = l2_normalize(vector), join_clauses([*own, *_filter_clauses(folder, since, until)])
        nearest = partial(self._make_nearest(clause, exact), vector)
        hits = self._group_hits(k, nearest, clause) if group_duplicates else to_hits(nearest(k))
        if not is_text_query or not hits:
            return hits
        if (
            query.supports_relevance_threshold(self.model.folder)
            if self.relevance_threshold is None
            else self.relevance_threshold
        ):
            line = self._compute_relevance_threshold(vector)
            hits = [replace(hit, above_threshold=hit.score >= line) for hit in hits]
        own = self.model.scale_scores(np.array([hit.score for hit in hits]))
        return [replace(hit, score=float(score)) for hit, score in zip(hits, own, strict=True)]

    def _load_cached_rows(self, clause: str | None) -> CachedRows | None:
        """The rows of a clause, kept until others are asked for or the index changes; None of very many."""
        kept, key = self._table.cached("held", dict), (self.model.image_digest, clause)
        if key not in kept:
            kept.clear()
            is_few, columns = self._table.count(clause) <= MAX_CACHED_ROWS, comparison_columns(self.model.width)
            kept[key] = CachedRows(self.model, self._table.rows(columns, clause)) if is_few else None
        return kept[key]

    def _make_nearest(self, clause: str | None, exact: bool = False) -> Callable[[np.ndarray, int], pa.Table]:
        """What finds so many rows of a clause that are nearest to a vector."""
        held = self._load_cached_rows(clause)
        return held.nearest if held else partial(self._table.nearest, where=clause, exact=exact)

    def _group_hits(self, k: int, fetch_ranked: Callable[[int], pa.Table], clause: str | None) -> list[Hit]:
        """Hits of an order of which `first` gives so many rows: of copies the first, with the number of the others.

        They are counted among all rows of the clause where these are held, else among those that were asked for.
        """
        asked, found = DUPLICATE_OVERFETCH * k, list[np.ndarray]()
        while len(found) < k:
            rows = fetch_ranked(asked)
            vectors = get_comparison_vectors(self.model, rows)
            found = find_duplicate_groups(vectors, max_groups=k)
            if len(rows) < asked:
                break
            asked *= OVERFETCH_GROWTH
        shown = np.array([group[0] for group in found], int)
        counted = held.comparison_vectors if (held := self._load_cached_rows(clause)) else vectors
        numbers = is_duplicate(vectors[shown], counted).sum(axis=1) - 1
        hits = zip(to_hits(rows.take(shown)), numbers, strict=True)
        return [replace(hit, copies=max(0, int(number))) for hit, number in hits]

    def copies(
        self, path: str, k: int = 240, folder: FolderFilter = None, since: DateFilter = None, until: DateFilter = None
    ) -> list[Hit]:
        """The other pictures that are nearly the same as one of the index, most similar first.

        Arguments are those of `search`. Raises KeyError where the picture has no vector of this model.
        """
        vector, clause = self.vectors([path])[0], join_clauses(_filter_clauses(folder, since, until))
        own = get_comparison_vectors(
            self.model, self._table.rows_of_paths(comparison_columns(self.model.width), [path])
        )
        held = self._load_cached_rows(clause)
        rows = held.rows if held else self._table.nearest(vector, DUPLICATE_OVERFETCH * k, clause)
        others = held.comparison_vectors if held else get_comparison_vectors(self.model, rows)
        near = np.flatnonzero(is_duplicate(own, others)[0])
        hits = to_hits(rows.take(near), np.clip(pairwise_similarity(others[near], own)[:, 0], -1, 1))
        return sorted((hit for hit in hits if hit.path != path), key=lambda hit: (-hit.score, hit.path))[:k]

    def newest(
        self,
        k: int = 12,
        folder: FolderFilter = None,
        since: DateFilter = None,
        until: DateFilter = None,
        group_duplicates: bool = False,
    ) -> list[Hit]:
        """The pictures of the latest `date`, latest first; of copies, the latest. Arguments are those of `search`."""
        clause = join_clauses(_filter_clauses(folder, since, until))
        if not group_duplicates:  # which needs no model
            return to_hits(self._fetch_newest(clause, HIT_COLUMNS, k))
        held = self._load_cached_rows(clause)
        newest = held.newest if held else partial(self._fetch_newest, clause, comparison_columns(self.model.width))
        return self._group_hits(k, newest, clause)

    def _fetch_newest(self, clause: str | None, columns: Sequence[str], k: int) -> pa.Table:
        """`HeldRows.newest`, of the table."""

        def paths_in_order() -> pa.ChunkedArray:
            rows = self._table.rows(["path", "taken", "mtime_ns"], clause)
            return rows["path"].take(newest_first_order(rows))

        paths = paths_in_order() if clause else self._table.cached("newest", paths_in_order)  # of a million, a second
        found = self._table.rows_of_paths(columns, paths[:k].to_pylist())
        return found.take(pc.index_in(paths[:k], found["path"]).drop_null())

    def _model_clauses(self) -> list[str]:
        """The clause that leaves out vectors of other models, where there are some. Raises ValueError where all are."""
        _ = self._table.pictures  # says where there is none
        digest, total = self.model.image_digest, len(self)
        others = self._table.count_other_models(digest)
        if total and (others == total or self.model.width not in self._table.widths()):
            known = (self._table.model() or {}).get("name")
            raise localized_error(
                ValueError, "other_model", model=self.model.name, path=self.where, known=known, total=total
            )
        return [f"model = {quote_sql(digest)}"] if others else []

    def duplicates(self, threshold: float = DUPLICATE_MIN_SIMILARITY) -> list[list[Hit]]:
        """Groups of pictures that are nearly the same, the largest group first.

        Of each the picture with most pixels comes first, then by similarity to it (`duplicates.compared`), their score.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}.")
        if not self._table.exists():
            return []
        rows = self._table.rows(comparison_columns(self.model.width), join_clauses(self._model_clauses()))
        rows = rows.append_column("pixels", pc.multiply(rows["width"], rows["height"]))
        # the best of a group leads it
        rows = rows.sort_by([("pixels", "descending"), ("size", "descending"), ("path", "ascending")])
        vectors, found = get_comparison_vectors(self.model, rows), []
        for numbers in (group for group in find_duplicate_groups(vectors, threshold) if len(group) > 1):
            scores = np.clip(pairwise_similarity(vectors[numbers], vectors[numbers[:1]])[:, 0], -1, 1)
            first, *others = to_hits(rows.take(numbers), scores)
            found.append([first, *sorted(others, key=lambda hit: (-hit.score, hit.path))])
        return sorted(found, key=len, reverse=True)

    # --- what is known

    def thumbnail(self, path: str) -> bytes | None:
        """The small picture (WebP, at most 256 pixels long) of a row; None where there is no such row."""
        found = self._table.rows_of_paths([THUMBNAIL_COLUMN], [str(path)])
        return found[THUMBNAIL_COLUMN][0].as_py() if found.num_rows else None

    def get_picture(self, path: str) -> Hit | None:
        """What is known of one picture; None where there is no such row."""
        found = self._table.rows_of_paths(HIT_COLUMNS, [str(path)])
        return to_hits(found)[0] if found.num_rows else None

    def vectors(self, paths: Sequence[str]) -> np.ndarray:
        """Vectors of rows: (paths, width), float32, unit length. Raises KeyError where a path has none."""
        known = self._stored_vectors(paths)
        if missing := [path for path in paths if path not in known]:
            raise KeyError(f"{missing[0]} has no vector of {self.model.name} in the index {self.where}.")
        return np.stack([known[path] for path in paths]) if known else np.empty((0, self.model.width), np.float32)

    def _stored_vectors(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Path -> vector, of those that have one of this model's."""
        column = vector_column(self.model.width)
        if not self._table.exists() or self.model.width not in self._table.widths():
            return {}
        found = self._table.rows_of_paths(["path", "model", column], list(paths))
        found = found.filter(pc.equal(found["model"], self.model.image_digest))
        return dict(zip(found["path"].to_pylist(), l2_normalize(to_array(found[column])), strict=True))

    def folders(self) -> dict[str, int]:
        """Folder that was added -> pictures in it and the folders in it."""
        return {folder: self._table.count(folders_clause(folder)) for folder in self._table.folders()}

    def all_folders(self) -> dict[str, int]:
        """Every folder, from those that were added downwards -> pictures in it and the folders in it; sorted."""
        added = self._table.folders()
        found = dict.fromkeys(added, 0)
        folders = pc.replace_substring_regex(self._table.rows(["path"])["path"], f"{os.sep}[^{os.sep}]*$", "")
        for one in pc.value_counts(folders.combine_chunks()).to_pylist():
            folder = Path(one["values"] or os.sep)
            for above in (folder, *folder.parents):
                if above == folder or any(above.is_relative_to(root) for root in added):
                    found[str(above)] = found.get(str(above), 0) + one["counts"]
        return dict(sorted(found.items()))

    def requested_folders(self) -> dict[str, str]:
        """Folder that was added on this machine -> its real path. An index of somebody else's has none."""
        asked = known_folders.requested_folders(self._table)
        return {folder: asked[folder] for folder in self._table.folders() if folder in asked}

    def status(self) -> IndexStatus:
        """What the index is."""
        taken = pc.min_max(self._table.rows(["taken"], "taken IS NOT NULL")["taken"]).as_py()
        left_out = self._table.rows(["path", "reason"], table=SKIPPED_FILES_TABLE).to_pylist()
        model, rules = self._table.model() or {}, known_folders.load_rules(self._table)
        return IndexStatus(
            where=self.where,
            pictures=len(self),
            skipped_files=sorted(map(SkippedFile.from_row, left_out), key=lambda one: one.path),
            folders=self.folders(),
            model=model.get("name"),
            bytes=self._table.bytes(),
            approximate=bool(model) and self._table.exists() and self._table.has_approximate_index(model["width"]),
            first=taken["min"],
            last=taken["max"],
            exclude=list(rules.exclude),
            forgotten=sorted(rules.forgotten),
            ignored_counts=dict(known_folders.load_ignored_counts(self._table)),
        )

    def version(self) -> int:
        """A number that grows when the index changes."""
        return self._table.version()

    def __len__(self) -> int:
        return self._table.count()

    def classify(
        self, source: "str | Path | Image.Image", labels: Sequence[str], template: str = DEFAULT_LABEL_TEMPLATE
    ) -> list[Classification]:
        """The label that fits each picture best, by the vectors of the index; other pictures are read, and not kept.

        `folder`: of pictures, one's path, or a picture; `labels` are Portuguese, and stand at `{}` in `template`.
        Raises ValueError where there is no label, one twice, no `{}`, no such folder, or no picture in it.
        """
        labels = query.check_labels(labels, template)
        if not isinstance(source, str | Path):
            return query.classify_vectors(self.model, [""], self.model.embed_images([source]), labels, template)
        paths, vectors = self._load_or_embed_vectors(to_absolute_path(source))
        return query.classify_vectors(self.model, paths, vectors, labels, template)

    def _load_or_embed_vectors(self, place: Path) -> tuple[list[str], np.ndarray]:
        """Paths of the pictures of a folder, or of one, and their vectors."""
        files = [FileState.of(str(place))] if place.is_file() else find_pictures([place])[0]
        rows = self._table.rows(["path", "size", "mtime_ns", "digest", "model"], folders_clause(place))
        known = StoredRows(rows, self.model.image_digest)
        vectors = self._stored_vectors([file.path for file in files if known.is_done(file)])
        vectors |= embed_files(self.model, [file for file in files if file.path not in vectors], place)
        paths = [file.path for file in files if file.path in vectors]
        return paths, np.stack([vectors[path] for path in paths]) if paths else np.empty((0, self.model.width))

    def export(self, path: str | Path) -> int:
        """Write the rows to a .parquet file, with vectors, or a .csv file; returns how many. Raises ValueError."""
        from capivara_search.exporting import export_rows

        with self._table.locked():  # what is read is not tidied away meanwhile
            return export_rows(self._table, path)


def _filter_clauses(folder: FolderFilter, since: DateFilter, until: DateFilter) -> list[str]:
    """The clauses of a search."""
    return [*date_clauses(since, until), *([] if folder is None else [folders_clause(to_absolute_path(folder))])]
