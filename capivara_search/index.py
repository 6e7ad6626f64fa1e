"""The class `PictureIndex`: index folders of pictures, then search them by sentence or by picture.

It combines the modules of this package. `folder_scan` and `picture_reading` find and read files, `indexing` embeds them
and writes rows, `table` stores the rows, and `query` and `duplicates` rank and group what a search returns.
"""

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
from capivara_search.folder_scan import FileState, find_pictures, to_absolute_path
from capivara_search.indexing import IndexWriter, StoredRows, embed_files, finish_indexing, start_indexing
from capivara_search.messages import localized_error, log_message
from capivara_search.picture_reading import open_query_picture
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

# A search that groups near-duplicates fetches this many rows per wanted hit. If the rows form too few groups, the next
# attempt fetches `OVERFETCH_GROWTH` times as many.
DUPLICATE_OVERFETCH = 4
OVERFETCH_GROWTH = 16
# If a search is limited to at most this many rows (by its filters, or because the index is small), all of them are kept
# in memory and compared exactly.
MAX_CACHED_ROWS = 20_000

FolderFilter, DateFilter = str | Path | None, date | None


def default_index_path() -> str | Path:
    """Return the default location of an index: $CAPIVARA_INDEX, otherwise a folder in the user's data directory."""
    if configured := os.environ.get("CAPIVARA_INDEX"):
        return configured
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "capivara" / "pictures.lance"


class PictureIndex:
    """An index of the pictures in some folders, searchable by sentence or by picture.

    Create one with `PictureIndex.open`. Pictures stay where they are; the index stores a vector, a thumbnail and the
    metadata of each of them.

    Attributes:
        relevance_threshold: Whether a search for a sentence sets `Hit.above_threshold`. The threshold is the score that
            the best pictures of the index reach for sentences without content. None: only for models that separate
            relevant from irrelevant pictures well enough (`query.supports_relevance_threshold`).

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from capivara_search import PictureIndex
        >>> Path("photos").mkdir()
        >>> Image.new("RGB", (64, 64), "red").save("photos/red.png")
        >>> Image.new("RGB", (64, 64), "blue").save("photos/blue.png")
        >>> index = PictureIndex.open("photos.lance", model="miniature")
        >>> report = index.add("photos")
        >>> report.new
        2
        >>> hits = index.search("uma imagem vermelha", k=2)
        >>> sorted(Path(hit.path).name for hit in hits)
        ['blue.png', 'red.png']
        >>> Path(index.search(like="photos/red.png", k=1)[0].path).name
        'red.png'
    """

    relevance_threshold: bool | None = None

    def __init__(self, table: PictureTable, model: "str | SearchModel | None", device: str | None):
        self._table, self._requested_model, self._device = table, model, device

    @classmethod
    def open(
        cls, where: str | Path = "auto", model: "str | SearchModel | None" = None, device: str | None = None
    ) -> "PictureIndex":
        """Open an index, or prepare a new one, which the first call of `add` creates.

        Args:
            where: Folder of the index, or an address on object storage such as `s3://bucket/fotos`. "auto" is the
                default location (`default_index_path`).
            model: Folder or Hub id of a model, or a loaded `SearchModel`. None: the model that the index was built
                with; for a new index the default model (`find_model`).
            device: Device of the model, for example "cuda:1". None: the GPU if there is one, otherwise the CPU.

        Returns:
            The index. The model is loaded when it is used for the first time.

        Raises:
            ValueError: If the location holds something other than an index, or an index of a newer version.
            OSError: If the location may not be read.
        """
        table = PictureTable(default_index_path() if where == "auto" else where)
        with suppress(DamagedIndexError):  # `add` may be able to repair a damaged index
            table.exists()  # raises every other error now, not at the first search
        return cls(table, model, device)

    @property
    def where(self) -> str:
        """Folder or address of the index."""
        return self._table.where

    @cached_property
    def model(self) -> "SearchModel":
        """The model that embeds texts and pictures, loaded on first access.

        Raises:
            ValueError: If the model does not exist, is of a kind that the search does not support, or can't be
                downloaded.
            ImportError: If a package of the miniature model is not installed.
            OSError: If there is no space left for the model.
        """
        from capivara_search.models import SearchModel, find_model

        if isinstance(self._requested_model, SearchModel):
            return self._requested_model
        stored = self._table.model() if self._requested_model is None else None
        return find_model(stored["source"] if stored else self._requested_model, self._device)

    # --- Adding, moving and removing pictures

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
        """Update the index from folders: embed new and changed pictures, drop the rows of files that are gone.

        A file whose size and modification time have not changed is not read again.

        Args:
            *folders: Folders of pictures; their subfolders are included. None given: the folders that
                `folders_to_add` returns, which are those that were added on this machine before.
            batch_size: Number of pictures per batch of the model, at least 1.
            on_progress: Called with the number of processed pictures and the total. It is called with the same
                numbers twice when the model has just been loaded.
            exclude: Patterns of files and folders to ignore, in the syntax of `.gitignore`, relative to each folder.
                The index stores them for later calls.
            include: Stored patterns to remove, and forgotten paths to index again.
            only_paths: Absolute paths of files or folders inside the folders, which exist or did exist. Only these are
                updated. None, or too many paths for one query: everything in the folders is updated.
            real_paths: Result of `folders_to_add` for these folders. A folder that now resolves to another real path
                is refused. None: the real paths are resolved now.

        Returns:
            What was done, as numbers of pictures.

        Raises:
            ValueError: If a folder does not exist, was forgotten or contains no picture (in these cases nothing is
                removed), if a pattern is invalid or not stored, if `batch_size` is below 1, or if there is no such
                model.
            OSError: If there is no space left or no permission to write the index.
        """
        if only_paths is None or len(only_paths) > MAX_PATHS_PER_CLAUSE:
            only_paths = None
            self.repair()
        paths = self.folders_to_add(folders, exclude, include, real_paths)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        start = time.monotonic()
        with self._table.locked(), estimate_for(self.where, on_progress or (lambda done, total: None)) as progress:
            plan = start_indexing(self._table, self.model, paths, exclude, include, only_paths, progress)
            writer = IndexWriter(self._table, self.model, plan, batch_size, progress)
            report = writer.run()
            finish_indexing(self._table, self.model, plan, report)
            if writer.reported < len(plan.files):
                progress(len(plan.files), len(plan.files))
        report.seconds = time.monotonic() - start
        return report

    def folders_to_add(
        self,
        folders: Sequence[str | Path] = (),
        exclude: Sequence[str] = (),
        include: Sequence[str | Path] = (),
        real_paths: Mapping[Path, str] | None = None,
    ) -> dict[Path, str]:
        """Return the folders that `add` would scan, each with its real path.

        These are the named folders, and included folders that lie in none of the known folders. If no folder is named,
        they are all folders that were added on this machine and still have the real path of that time; a warning in
        the log lists the others.

        Args:
            folders: Folders of pictures that the user names now.
            exclude: Patterns of files and folders to ignore, in the syntax of `.gitignore`.
            include: Stored patterns to remove, and forgotten paths to index again.
            real_paths: Real paths that are known already, by absolute folder. Those of other named folders are
                resolved now.

        Returns:
            Absolute path -> real path of each folder.

        Raises:
            ValueError: If there is no folder to scan, or a pattern is invalid or not stored.
        """
        recorded = real_paths or {}
        absolute_folders = map(to_absolute_path, folders)
        named = {folder: recorded.get(folder) or os.path.realpath(folder) for folder in absolute_folders}
        return known_folders.folders_to_add(self._table, named, exclude, include)

    def watch(
        self,
        *folders: str | Path,
        poll: bool | None = None,
        stop: "Event | None" = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[IndexReport]:
        """Update the index from folders as `add` does, then follow them: changes are indexed within seconds.

        Args:
            *folders: Folders of pictures; their subfolders are included. None given: the folders that were added on
                this machine before.
            poll: Whether to look at all files every two seconds, instead of waiting for events of the operating
                system. None: poll only if a folder is on a network file system.
            stop: Ends the loop when it is set, as Ctrl-C does.
            on_progress: Called with the number of processed pictures and the total.

        Yields:
            A report of the update of all folders, then one per burst of changes.

        Raises:
            ValueError: If a folder does not exist, was forgotten or contains no picture.
            OSError: If the index can't be written, or there are too many folders for the operating system to follow.
            ImportError: If the package watchfiles is not installed.
        """
        from capivara_search.watch import follow_index  # imported late because only this method needs watchfiles

        return follow_index(self, [*map(to_absolute_path, folders)], poll, stop, on_progress)

    def progress(self) -> dict[str, int | None] | None:
        """Return the progress of an update of this index that is running in any process, or None if there is none.

        Returns:
            `done` and `total`, numbers of pictures, and `left_s`, the estimated seconds left (None: not known yet).
        """
        return read_progress(self._table.where)

    def repair(self) -> None:
        """Restore the newest readable version of each damaged table.

        A table without a readable version is moved aside. Warnings in the log say what was lost.
        """
        with self._table.locked():
            self._table.repair()

    def forget(self, folder: str | Path) -> int:
        """Remove a folder or a file from the index and return the number of removed rows.

        The path stays out of the index until `add` is called with `include`.
        """
        return known_folders.forget_folder(self._table, to_absolute_path(folder)) if self._table.exists() else 0

    def move(self, old: str | Path, new: str | Path) -> tuple[int, int]:
        """Rewrite the paths of a folder whose pictures were moved to another folder. No picture is read again.

        Args:
            old: Folder that the pictures were in.
            new: Folder that they are in now.

        Returns:
            The number of rows of the folder, and the number of files that exist in the new folder.

        Raises:
            ValueError: If one folder lies in the other, the index knows nothing of the old folder, or none of its
                files exists in the new one.
        """
        return known_folders.move_folder(self._table, to_absolute_path(old), to_absolute_path(new))

    # --- Searching

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
        """Return the pictures that match a sentence, a picture, or both best.

        Args:
            text: Sentence, in a language of the model.
            like: Picture, or path of a picture. With a sentence, the mean of both vectors is searched for.
            k: Maximum number of hits, at least 1.
            folder: Only pictures in this folder and its subfolders.
            since: Only pictures of this day or later (`Hit.date`).
            until: Only pictures of this day or earlier.
            exact: Compare every vector, even in an index large enough for an approximate vector index.
            more: Words to move the query towards (Rocchio relevance feedback). A weight may come first, as in
                "0.5:praia"; the default is 1.
            less: Words to move the query away from. Pictures that show them sink in the ranking; none is excluded.
            group_duplicates: Return only the best hit of each group of near-duplicates (`DUPLICATE_MIN_SIMILARITY`);
                `Hit.copies` is the number of the others.

        Returns:
            Hits, best first.

        Raises:
            ValueError: If there is nothing to search for, `k` is below 1, `since` is after `until`, a weight is out
                of range, there is no index, or it was built with another model.
        """
        text = text.strip() if text else None
        signed_words = [
            (sign, words)
            for sign, argument in ((1, more), (-1, less))
            for words in ([argument] if isinstance(argument, str) else argument)
        ]
        feedback = [(sign, *query.parse_feedback(words)) for sign, words in signed_words]
        if not text and like is None and not feedback:
            raise localized_error(ValueError, "empty_query")
        self._model_clauses()  # raises errors of the index before the model is loaded, which takes seconds
        vectors = [self.model.embed_texts([text])] if text else []
        if like is not None:
            image = open_query_picture(like) if isinstance(like, str | Path) else like
            vectors.append(self.model.embed_images([image]))
        vector = np.concatenate(vectors).mean(axis=0) if vectors else None
        if feedback:
            feedback_vectors = self.model.embed_texts([words for *_, words in feedback])
            weights = [sign * weight for sign, weight, _ in feedback]
            vector = self.apply_feedback(vector, list(zip(weights, feedback_vectors, strict=True)))
        is_text_query = like is None and not feedback
        return self.search_vector(vector, k, folder, since, until, exact, is_text_query, group_duplicates)

    def apply_feedback(self, vector: np.ndarray | None, feedback: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
        """Move a query towards or away from other vectors (Rocchio relevance feedback).

        Args:
            vector: (width,), vector of the query. None: the feedback alone is the query.
            feedback: Pairs of weight and vector (width,). A negative weight moves the query away.

        Returns:
            (width,), the new query, not normalized.
        """
        return query.apply_feedback(vector, feedback, self._sample_vectors())

    def _sample_vectors(self) -> np.ndarray:
        """Return unit-length vectors (rows, width) of pictures sampled evenly from the index."""
        width, digest = self.model.width, self.model.image_digest
        return self._table.cached("sample", lambda: l2_normalize(self._table.sample(width, digest, query.SAMPLE_ROWS)))

    def _compute_relevance_threshold(self, vector: np.ndarray) -> float:
        """Return the cosine with a sentence's vector (width,) above which a picture counts as relevant."""

        def background() -> float:
            neutral_vectors = self.model.embed_texts(query.NEUTRAL_SENTENCES)
            nearest = self._make_nearest(join_clauses(self._model_clauses()))
            best_cosines = [nearest(neutral, 1)["score"][0].as_py() for neutral in neutral_vectors]
            return query.background_z_score(self._sample_vectors(), neutral_vectors, best_cosines)

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
        """Return the pictures whose vectors are nearest to a query vector.

        Args:
            vector: (width,), from the model of the index; need not be of unit length.
            k: Maximum number of hits, at least 1.
            folder: Only pictures in this folder and its subfolders.
            since: Only pictures of this day or later (`Hit.date`).
            until: Only pictures of this day or earlier.
            exact: Compare every vector, even in an index large enough for an approximate vector index.
            is_text_query: Whether the vector is that of a sentence. If so, scores of SigLIP models become
                probabilities, and the relevance threshold is applied.
            group_duplicates: Return only the best hit of each group of near-duplicates.

        Returns:
            Hits, best first.

        Raises:
            ValueError: If `k` is below 1, the vector has another width than the model, `since` is after `until`,
                there is no index, or it was built with another model.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if np.shape(vector) != (self.model.width,):
            raise ValueError(f"The vector must have {self.model.width} numbers, got the shape {np.shape(vector)}.")
        if since and until and since > until:
            raise ValueError(f"since must not be after until, got {since} and {until}.")
        if model_clauses := self._model_clauses():
            not_embedded = self._table.count_other_models(self.model.image_digest)
            log_message("not_yet_embedded", not_embedded, len(self), self.model.name, level=logging.WARNING)
        vector, clause = l2_normalize(vector), join_clauses([*model_clauses, *_filter_clauses(folder, since, until)])
        nearest = partial(self._make_nearest(clause, exact), vector)
        hits = self._group_hits(k, nearest, clause) if group_duplicates else to_hits(nearest(k))
        if not is_text_query or not hits:
            return hits
        uses_threshold = self.relevance_threshold
        if uses_threshold is None:
            uses_threshold = query.supports_relevance_threshold(self.model.folder)
        if uses_threshold:
            threshold = self._compute_relevance_threshold(vector)
            hits = [replace(hit, above_threshold=hit.score >= threshold) for hit in hits]
        scores = self.model.scale_scores(np.array([hit.score for hit in hits]))
        return [replace(hit, score=float(score)) for hit, score in zip(hits, scores, strict=True)]

    def _load_cached_rows(self, clause: str | None) -> CachedRows | None:
        """Return the rows that match a clause, or None if there are more than `MAX_CACHED_ROWS`.

        The rows of the latest clause stay in memory until the index changes.
        """
        cache, key = self._table.cached("cached_rows", dict), (self.model.image_digest, clause)
        if key not in cache:
            cache.clear()
            is_small, columns = self._table.count(clause) <= MAX_CACHED_ROWS, comparison_columns(self.model.width)
            cache[key] = CachedRows(self.model, self._table.rows(columns, clause)) if is_small else None
        return cache[key]

    def _make_nearest(self, clause: str | None, exact: bool = False) -> Callable[[np.ndarray, int], pa.Table]:
        """Return a function that takes a vector and k and returns the k nearest rows that match a clause."""
        cached = self._load_cached_rows(clause)
        return cached.nearest if cached else partial(self._table.nearest, clause=clause, exact=exact)

    def _group_hits(self, k: int, fetch_ranked: Callable[[int], pa.Table], clause: str | None) -> list[Hit]:
        """Return the first k hits of a ranking after grouping near-duplicates: each group keeps its first hit.

        `Hit.copies` counts near-duplicates among all rows that match the clause if these are cached in memory,
        otherwise among the rows that were fetched.

        Args:
            k: Maximum number of hits.
            fetch_ranked: Returns as many rows as its argument says, in the order of the ranking.
            clause: Filter that `fetch_ranked` applies.

        Returns:
            Hits in the order of the ranking.
        """
        number, groups = DUPLICATE_OVERFETCH * k, list[np.ndarray]()
        while len(groups) < k:
            rows = fetch_ranked(number)
            vectors = get_comparison_vectors(self.model, rows)
            groups = find_duplicate_groups(vectors, max_groups=k)
            if len(rows) < number:
                break
            number *= OVERFETCH_GROWTH
        first_rows = np.array([group[0] for group in groups], int)
        cached = self._load_cached_rows(clause)
        copy_counts = (
            is_duplicate(vectors[first_rows], cached.comparison_vectors if cached else vectors).sum(axis=1) - 1
        )
        hits = zip(to_hits(rows.take(first_rows)), copy_counts, strict=True)
        return [replace(hit, copies=max(0, int(copy_count))) for hit, copy_count in hits]

    def copies(
        self, path: str, k: int = 240, folder: FolderFilter = None, since: DateFilter = None, until: DateFilter = None
    ) -> list[Hit]:
        """Return the near-duplicates of a picture of the index, most similar first.

        Args:
            path: Path of the picture, as in `Hit.path`.
            k: Maximum number of hits.
            folder: Only pictures in this folder and its subfolders.
            since: Only pictures of this day or later (`Hit.date`).
            until: Only pictures of this day or earlier.

        Returns:
            Hits without the picture itself; scores are the similarities of `duplicates.pairwise_similarity`.

        Raises:
            KeyError: If the picture has no vector of this model.
        """
        vector, clause = self.vectors([path])[0], join_clauses(_filter_clauses(folder, since, until))
        picture = self._table.rows_of_paths(comparison_columns(self.model.width), [path])
        picture_vectors = get_comparison_vectors(self.model, picture)  # a single row
        cached = self._load_cached_rows(clause)
        rows = cached.rows if cached else self._table.nearest(vector, DUPLICATE_OVERFETCH * k, clause)
        others = cached.comparison_vectors if cached else get_comparison_vectors(self.model, rows)
        copies = np.flatnonzero(is_duplicate(picture_vectors, others)[0])
        hits = to_hits(rows.take(copies), np.clip(pairwise_similarity(others[copies], picture_vectors)[:, 0], -1, 1))
        return sorted((hit for hit in hits if hit.path != path), key=lambda hit: (-hit.score, hit.path))[:k]

    def newest(
        self,
        k: int = 12,
        folder: FolderFilter = None,
        since: DateFilter = None,
        until: DateFilter = None,
        group_duplicates: bool = False,
    ) -> list[Hit]:
        """Return the newest pictures, latest first (`Hit.date`).

        Args:
            k: Maximum number of hits.
            folder: Only pictures in this folder and its subfolders.
            since: Only pictures of this day or later.
            until: Only pictures of this day or earlier.
            group_duplicates: Return only the latest hit of each group of near-duplicates.

        Returns:
            Hits with the score 0.
        """
        clause = join_clauses(_filter_clauses(folder, since, until))
        if not group_duplicates:  # returns early because only grouping needs the model
            return to_hits(self._fetch_newest(clause, HIT_COLUMNS, k))
        cached = self._load_cached_rows(clause)
        newest = cached.newest if cached else partial(self._fetch_newest, clause, comparison_columns(self.model.width))
        return self._group_hits(k, newest, clause)

    def _fetch_newest(self, clause: str | None, columns: Sequence[str], k: int) -> pa.Table:
        """Return columns of the k newest rows that match a clause, latest first, from the table."""

        def paths_in_order() -> pa.ChunkedArray:
            rows = self._table.rows(["path", "taken", "mtime_ns"], clause)
            return rows["path"].take(newest_first_order(rows))

        # Sorting a million rows takes a second, so the order of the whole index is cached.
        paths = paths_in_order() if clause else self._table.cached("newest", paths_in_order)
        rows = self._table.rows_of_paths(columns, paths[:k].to_pylist())
        return rows.take(pc.index_in(paths[:k], rows["path"]).drop_null())

    def _model_clauses(self) -> list[str]:
        """Return the clause that excludes vectors of other models; an empty list if there are no such vectors.

        Raises ValueError if there is no index, or all of its vectors are of other models.
        """
        _ = self._table.pictures  # raises an error if there is no index
        digest, total = self.model.image_digest, len(self)
        other_count = self._table.count_other_models(digest)
        if total and (other_count == total or self.model.width not in self._table.widths()):
            known = (self._table.model() or {}).get("name")
            raise localized_error(
                ValueError, "other_model", model=self.model.name, path=self.where, known=known, total=total
            )
        return [f"model = {quote_sql(digest)}"] if other_count else []

    def duplicates(self, threshold: float = DUPLICATE_MIN_SIMILARITY) -> list[list[Hit]]:
        """Return groups of near-duplicates, the largest group first.

        A group starts with its picture of most pixels; the others follow, most similar to it first. Their scores are
        these similarities (`duplicates.pairwise_similarity`).

        Raises:
            ValueError: If the threshold is not above 0 and at most 1, or the index was built with another model.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}.")
        if not self._table.exists():
            return []
        rows = self._table.rows(comparison_columns(self.model.width), join_clauses(self._model_clauses()))
        rows = rows.append_column("pixels", pc.multiply(rows["width"], rows["height"]))
        # The first row of a group becomes its leader, so the best pictures come first.
        rows = rows.sort_by([("pixels", "descending"), ("size", "descending"), ("path", "ascending")])
        vectors, groups = get_comparison_vectors(self.model, rows), []
        for numbers in (group for group in find_duplicate_groups(vectors, threshold) if len(group) > 1):
            scores = np.clip(pairwise_similarity(vectors[numbers], vectors[numbers[:1]])[:, 0], -1, 1)
            leader, *others = to_hits(rows.take(numbers), scores)
            groups.append([leader, *sorted(others, key=lambda hit: (-hit.score, hit.path))])
        return sorted(groups, key=len, reverse=True)

    # --- Contents and metadata of the index

    def thumbnail(self, path: str) -> bytes | None:
        """Return the thumbnail of a picture (WebP, longer side at most 256 pixels), or None if it is not indexed."""
        rows = self._table.rows_of_paths([THUMBNAIL_COLUMN], [str(path)])
        return rows[THUMBNAIL_COLUMN][0].as_py() if rows.num_rows else None

    def get_picture(self, path: str) -> Hit | None:
        """Return the metadata of a picture as a hit with the score 0, or None if it is not indexed."""
        rows = self._table.rows_of_paths(HIT_COLUMNS, [str(path)])
        return to_hits(rows)[0] if rows.num_rows else None

    def vectors(self, paths: Sequence[str]) -> np.ndarray:
        """Return the stored vectors of pictures as (paths, width), float32, unit length.

        Raises:
            KeyError: If a path has no vector of this model.
        """
        stored = self._stored_vectors(paths)
        if missing := [path for path in paths if path not in stored]:
            raise KeyError(f"{missing[0]} has no vector of {self.model.name} in the index {self.where}.")
        return np.stack([stored[path] for path in paths]) if stored else np.empty((0, self.model.width), np.float32)

    def _stored_vectors(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the stored vectors of this model by path, without paths that have none."""
        column = vector_column(self.model.width)
        if not self._table.exists() or self.model.width not in self._table.widths():
            return {}
        rows = self._table.rows_of_paths(["path", "model", column], list(paths))
        rows = rows.filter(pc.equal(rows["model"], self.model.image_digest))
        return dict(zip(rows["path"].to_pylist(), l2_normalize(to_array(rows[column])), strict=True))

    def folders(self) -> dict[str, int]:
        """Return the number of pictures in each added folder, including its subfolders."""
        return {folder: self._table.count(folders_clause(folder)) for folder in self._table.folders()}

    def all_folders(self) -> dict[str, int]:
        """Return the number of pictures in each added folder and in each of their subfolders, sorted by path.

        Each number includes the pictures in subfolders.
        """
        added = self._table.folders()
        counts = dict.fromkeys(added, 0)
        parents = pc.replace_substring_regex(self._table.rows(["path"])["path"], f"{os.sep}[^{os.sep}]*$", "")
        for entry in pc.value_counts(parents.combine_chunks()).to_pylist():
            parent = Path(entry["values"] or os.sep)
            for folder in (parent, *parent.parents):
                if folder == parent or any(folder.is_relative_to(root) for root in added):
                    counts[str(folder)] = counts.get(str(folder), 0) + entry["counts"]
        return dict(sorted(counts.items()))

    def requested_folders(self) -> dict[str, str]:
        """Return the real path of each folder that was added on this machine, by its path.

        The result is empty for an index that was copied from another machine.
        """
        recorded = known_folders.requested_folders(self._table)
        return {folder: recorded[folder] for folder in self._table.folders() if folder in recorded}

    def status(self) -> IndexStatus:
        """Return a summary of the index."""
        taken = pc.min_max(self._table.rows(["taken"], "taken IS NOT NULL")["taken"]).as_py()
        skipped_rows = self._table.rows(["path", "reason"], table=SKIPPED_FILES_TABLE).to_pylist()
        model, rules = self._table.model() or {}, known_folders.load_rules(self._table)
        return IndexStatus(
            where=self.where,
            pictures=len(self),
            skipped_files=sorted(map(SkippedFile.from_row, skipped_rows), key=lambda skipped: skipped.path),
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
        """Return a number that grows whenever the index changes."""
        return self._table.version()

    def __len__(self) -> int:
        return self._table.count()

    def classify(
        self, source: "str | Path | Image.Image", labels: Sequence[str], template: str = DEFAULT_LABEL_TEMPLATE
    ) -> list[Classification]:
        """Find the best label of each picture (zero-shot classification).

        Vectors in the index are used. Pictures that are not in the index are read, but not added.

        Args:
            source: Folder of pictures, path of a picture, or a picture.
            labels: Labels, in a language of the model.
            template: Sentence around each label; contains `{}` once, where the label is inserted.

        Returns:
            A classification for each readable picture, sorted by path.

        Raises:
            ValueError: If there is no label, a label is empty or repeated, the template does not contain `{}` exactly
                once, or the folder does not exist or contains no picture.
        """
        labels = query.check_labels(labels, template)
        if not isinstance(source, str | Path):
            return query.classify_vectors(self.model, [""], self.model.embed_images([source]), labels, template)
        paths, vectors = self._load_or_embed_vectors(to_absolute_path(source))
        return query.classify_vectors(self.model, paths, vectors, labels, template)

    def _load_or_embed_vectors(self, source: Path) -> tuple[list[str], np.ndarray]:
        """Return the paths of the pictures at a path, which is a folder or a picture, and their vectors."""
        files = [FileState.of(str(source))] if source.is_file() else find_pictures([source])[0]
        rows = self._table.rows(["path", "size", "mtime_ns", "digest", "model"], folders_clause(source))
        stored = StoredRows(rows, self.model.image_digest)
        vectors = self._stored_vectors([file.path for file in files if stored.is_done(file)])
        vectors |= embed_files(self.model, [file for file in files if file.path not in vectors], source)
        paths = [file.path for file in files if file.path in vectors]
        return paths, np.stack([vectors[path] for path in paths]) if paths else np.empty((0, self.model.width))

    def export(self, path: str | Path) -> int:
        """Write all rows to a file and return their number.

        A .parquet file includes the vectors; a .csv file does not.

        Raises:
            ValueError: If the suffix is neither .parquet nor .csv, or the file can't be created.
        """
        from capivara_search.exporting import export_rows

        with self._table.locked():  # so that no other process compacts the files that are being read
            return export_rows(self._table, path)


def _filter_clauses(folder: FolderFilter, since: DateFilter, until: DateFilter) -> list[str]:
    """Return the SQL clauses that limit a search to a folder and to days."""
    clauses = date_clauses(since, until)
    return clauses if folder is None else [*clauses, folders_clause(to_absolute_path(folder))]
