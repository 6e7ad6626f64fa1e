"""The class `PictureIndex`: index folders of pictures, then search them by sentence or by picture.

`PictureIndex` combines the other modules. `folder_scan` finds picture files, `indexing` embeds them, `table` stores one
row per picture, `query` computes query vectors, and `duplicates` groups near-duplicates.
"""

import logging
import os
import re
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

from capivara_search import duplicates, folder_scan, indexing, query, table
from capivara_search import folders as known_folders
from capivara_search.folder_scan import to_absolute_path, to_absolute_path_with_disk_case
from capivara_search.index_progress import ProgressCallback, mirror_progress_to_file, read_progress_of_running_update
from capivara_search.messages import log_message_from_code, make_error_from_code
from capivara_search.picture_reading import open_query_picture
from capivara_search.results import DEFAULT_LABEL_TEMPLATE, Classification, Hit, IndexReport, IndexStatus
from capivara_search.storage_errors import DamagedIndexError
from capivara_search.watch import watch_folders_and_iter_index_updates

if TYPE_CHECKING:
    from threading import Event

    from PIL import Image

    from capivara_search.models import SearchModel

# A search that groups near-duplicates fetches this many rows per requested hit, because the rows of a group become one
# hit. If there are too few groups, the search fetches `OVERFETCH_GROWTH` times as many rows and groups them again.
DUPLICATE_OVERFETCH = 4
OVERFETCH_GROWTH = 16
# If at most this many rows match the filters of a search, their vectors are kept in memory, and the search compares all
# of them. If more rows match, LanceDB searches the files of the index.
MAX_CACHED_ROWS = 20_000

FolderFilter, DateFilter = str | Path | None, date | None


def _default_index_path() -> str | Path:
    """Return the default location of an index.

    This is the value of the environment variable CAPIVARA_INDEX if it is set. Otherwise it is the folder
    `capivara/pictures.lance` in the user's data directory ($XDG_DATA_HOME, by default ~/.local/share).
    """
    if configured := os.environ.get("CAPIVARA_INDEX"):
        return configured
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "capivara" / "pictures.lance"


class CachedRows:
    """Rows of the table `pictures` (one row per picture) in memory, for exact search and near-duplicate detection.

    Args:
        model: Model in use. A search ignores rows with vectors of other models.
        rows: Rows of an index with the columns that `table.comparison_columns` lists.

    Attributes:
        rows: The same rows, sorted by path.
    """

    def __init__(self, model: "SearchModel", rows: pa.Table):
        self.rows, self._model = rows.sort_by("path"), model
        self._vectors = table.extract_unit_vectors_of_model_or_zeros(model, self.rows)
        self._without_vector = ~self._vectors.any(axis=1)  # True for rows without a vector of this model

    @cached_property
    def comparison_vectors(self) -> np.ndarray:
        """Vectors of the rows for near-duplicate detection: array (rows, columns).

        Each vector combines the model's vector (embedding) and the color signature of a picture.
        """
        return duplicates.get_comparison_vectors(self._model, self.rows)

    def nearest(self, vector: np.ndarray, k: int) -> pa.Table:
        """Return the rows whose vectors are nearest to a query vector, by exact search.

        Args:
            vector: Query vector (width,), of unit length.
            k: Maximum number of rows.

        Returns:
            Rows with an additional column `score`, the cosine of the row's vector with the query vector. Rows are
            sorted by score, best first, then by path.
        """
        scores = np.clip(self._vectors @ vector, -1, 1)
        order = np.argsort(np.where(self._without_vector, np.inf, -scores), kind="stable")
        order = order[: min(k, len(order) - self._without_vector.sum())]
        return self.rows.take(order).append_column("score", pa.array(scores[order], pa.float64()))

    def newest(self, k: int) -> pa.Table:
        """Return the rows of the newest pictures, latest date first.

        The date is the EXIF date if there is one, otherwise the modification time of the file.

        Args:
            k: Maximum number of rows.

        Returns:
            At most k rows.
        """
        return self.rows.take(table.newest_first_order(self.rows)[:k])


class PictureIndex:
    """An index of the pictures in some folders, searchable by sentence or by picture.

    Call `PictureIndex.open` to create an instance. The picture files stay where they are. For each picture, the index
    stores its vector (embedding), a thumbnail and metadata.

    Attributes:
        relevance_threshold: Whether a search for a sentence marks each hit as relevant or not (`Hit.above_threshold`).
            A hit is relevant if its score reaches the score that the best picture reaches by chance. None, the default:
            hits are marked only if a measurement has shown that these marks are reliable for the model.

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

    def __init__(self, picture_table: table.PictureTable, model: "str | SearchModel | None", device: str | None):
        self._table, self._requested_model, self._device = picture_table, model, device

    @classmethod
    def open(
        cls, where: str | Path = "auto", model: "str | SearchModel | None" = None, device: str | None = None
    ) -> "PictureIndex":
        """Open an existing index, or prepare a new index.

        A new index is created on disk by the first call of `add`.

        Args:
            where: Folder of the index, or an address on object storage such as `s3://bucket/fotos`. "auto": the value
                of the environment variable `CAPIVARA_INDEX` if it is set, otherwise a folder in the user's data
                directory.
            model: Folder or Hub id of a model, or a `SearchModel`. None: the model that the index was built with, or
                the default model for a new index.
            device: Device of the model, for example "cuda:1". None: the GPU if there is one, otherwise the CPU.

        Returns:
            The index. The model is loaded when it is used for the first time.

        Raises:
            ValueError: If the location contains something other than an index, or an index of a newer version of this
                package.
            OSError: If there is no permission to read the location.
        """
        index = cls(table.PictureTable(_default_index_path() if where == "auto" else where), model, device)
        with suppress(DamagedIndexError):  # `add` may be able to repair a damaged index
            index._table.exists()  # the result is not used; an invalid index raises an error now, not at a later search
        return index

    @property
    def where(self) -> str:
        """Folder of the index, or its address on object storage."""
        return self._table.where

    @cached_property
    def model(self) -> "SearchModel":
        """The model that embeds texts and pictures, loaded on first access.

        Raises:
            ValueError: If the model does not exist, is not supported, or can't be downloaded.
            ImportError: If the model is the miniature (a small demo model), and a package for it is not installed.
            OSError: If there is not enough disk space for the model.
        """
        from capivara_search.models import SearchModel, resolve_search_model

        if isinstance(self._requested_model, SearchModel):
            return self._requested_model
        stored = self._table.model() if self._requested_model is None else {}
        return resolve_search_model(stored.get("source", self._requested_model), self._device)

    # --- Adding, moving and removing pictures

    def add(
        self,
        *folders: str | Path,
        batch_size: int = 32,
        on_progress: ProgressCallback | None = None,
        exclude: Sequence[str] = (),
        include: Sequence[str | Path] = (),
        only_paths: Collection[str] | None = None,
        real_paths: Mapping[Path, str] | None = None,
    ) -> IndexReport:
        """Update the index from folders: embed new and changed pictures, and remove the rows of deleted files.

        A file whose size and modification time have not changed is not read again.

        Args:
            *folders: Folders of pictures, including subfolders. If no folder is given, the folders that were added on
                this machine before are updated.
            batch_size: Number of pictures per batch of the model, at least 1.
            on_progress: Callback that takes the number of processed pictures and the total number. Two calls with the
                same numbers mark the start and the end of loading the model.
            exclude: Patterns of files and folders to ignore, in the syntax of `.gitignore`, relative to each folder.
                The index stores them for later updates.
            include: What to stop ignoring: patterns of an earlier `exclude`, and paths that were removed with `forget`.
            only_paths: Absolute paths inside `folders`. Only these files and folders are updated. None, or more than
                500 paths: everything is updated.
            real_paths: Result of an earlier call of `folders_to_add`. A folder is refused if its real path (with
                symbolic links resolved) has changed since then.

        Returns:
            Report of the update: numbers of embedded, new, changed, moved and removed pictures, and the skipped files.

        Raises:
            ValueError: If a folder does not exist, was removed with `forget`, or contains no picture. If another
                argument or the model is invalid. In all these cases, nothing is removed from the index.
            OSError: If there is no disk space left, or no permission to write the index.
        """
        # More paths don't fit into one SQL condition, so everything is updated.
        if only_paths is None or len(only_paths) > table.MAX_PATHS_PER_CLAUSE:
            only_paths = None
            self.repair()
        paths = self.folders_to_add(folders, exclude, include, real_paths)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        start = time.monotonic()
        with self._table.locked(), mirror_progress_to_file(self.where, on_progress) as progress:
            plan = indexing.prepare_index_update(self._table, self.model, paths, exclude, include, only_paths, progress)
            writer = indexing.IndexWriter(self._table, self.model, plan, batch_size, progress)
            writer.run()
            report = writer.finish()
        report.seconds = time.monotonic() - start
        return report

    def folders_to_add(
        self,
        folders: Sequence[str | Path] = (),
        exclude: Sequence[str] = (),
        include: Sequence[str | Path] = (),
        real_paths: Mapping[Path, str] | None = None,
    ) -> dict[Path, str]:
        """Return the folders that `add` would scan for pictures if it were called with these arguments.

        Args:
            folders: Folders of pictures. Empty: all available folders that were added on this machine before. A warning
                in the log lists the other folders of the index.
            exclude: Patterns of files and folders to ignore, in the syntax of `.gitignore`.
            include: What to stop ignoring: patterns of an earlier `exclude`, and paths that were removed with `forget`.
                A removed folder is scanned, too, unless one of these folders or another folder of the index that was
                added on this machine contains it.
            real_paths: Real paths that were resolved before: `{absolute path: real path}`. Other real paths are
                resolved now.

        Returns:
            A dictionary that maps the absolute path of each folder to its real path, in which symbolic links are
            resolved.

        Raises:
            ValueError: If there is no folder to scan, a pattern in `exclude` is invalid, or an entry of `include` is
                not ignored by the index.
        """
        recorded = real_paths or {}
        absolute_folders = map(to_absolute_path_with_disk_case, folders)
        named = {folder: recorded.get(folder) or os.path.realpath(folder) for folder in absolute_folders}
        return known_folders.resolve_folders_to_scan(self._table, named, exclude, include)

    def watch(
        self,
        *folders: str | Path,
        poll: bool | None = None,
        stop: "Event | None" = None,
        on_progress: ProgressCallback | None = None,
    ) -> Iterator[IndexReport]:
        """Update the index from folders as `add` does, then watch the folders and index changes within seconds.

        Args:
            *folders: Folders of pictures, including subfolders. If no folder is given, the folders that were added on
                this machine before are watched.
            poll: True: scan all files every two seconds. False: wait for events of the operating system. None: scan
                only if a folder is on a network file system.
            stop: Event that ends the iteration when it is set.
            on_progress: Callback that takes the number of processed pictures and the total number.

        Yields:
            One report for the initial update. Then one report for each change, or for several changes in quick
            succession.

        Raises:
            ValueError: If a folder does not exist, was removed with `forget`, or contains no picture.
            OSError: If the index can't be written, or the system can't watch so many folders.
            ImportError: If the package watchfiles is not installed.
        """
        named_folders = [*map(to_absolute_path_with_disk_case, folders)]
        return watch_folders_and_iter_index_updates(self, named_folders, poll, stop, on_progress)

    def progress(self) -> dict[str, int | None] | None:
        """Return the progress of an update of this index that is running in any process.

        Returns:
            A dictionary with the keys "done" (number of processed pictures), "total" (number of pictures to process)
            and "left_s" (estimated seconds left, or None while there is no estimate). None instead of a dictionary if
            no update is running.
        """
        return read_progress_of_running_update(self._table.where)

    def repair(self) -> None:
        """Restore the newest readable version of each damaged table of the index.

        If no version of a table can be read, the table's folder is renamed, and the next `add` creates the table again.
        Warnings in the log say what was lost. An index on object storage is not repaired.

        Raises:
            ValueError: If a table is complete, but the installed lancedb can't read it.
        """
        with self._table.locked():
            self._table.repair()

    def forget(self, folder: str | Path) -> int:
        """Remove a folder or a picture from the index, and keep it out of later updates.

        No file is deleted from the disk. To index the path again, pass it to `add` as `include`.

        Args:
            folder: Path of the folder or picture.

        Returns:
            The number of removed pictures.
        """
        if not self._table.exists():
            return 0
        return known_folders.remove_from_index_and_ignore_path(self._table, to_absolute_path_with_disk_case(folder))

    def move(self, old: str | Path, new: str | Path) -> tuple[int, int]:
        """Update the paths in the index after a folder of pictures was moved or renamed.

        No picture is read or embedded again.

        Args:
            old: Path of the folder before the move.
            new: Path of the folder now.

        Returns:
            Tuple of two numbers: the pictures that the index had in the old folder, and how many of them exist as files
            in the new folder.

        Raises:
            ValueError: If the index does not know the old folder, none of its pictures exists in the new folder, or one
                folder lies inside the other.
        """
        old, new = to_absolute_path_with_disk_case(old), to_absolute_path_with_disk_case(new)
        return known_folders.update_paths_after_move(self._table, old, new)

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
        """Return the pictures that best match a sentence, a picture, or both.

        Args:
            text: Sentence to search for, in a language of the model.
            like: Picture to search for, as an image or as the path of a file. With a sentence, the query is the mean of
                both vectors.
            k: Maximum number of hits, at least 1.
            folder: Return only pictures in this folder and its subfolders.
            since: Return only pictures of this day or later (`Hit.date`).
            until: Return only pictures of this day or earlier.
            exact: True: compare the query with every vector. False: search a large index approximately, which is
                faster.
            more: One or more texts to move the query towards (Rocchio relevance feedback). A text may begin with a
                weight, as in "0.5:praia". The default weight is 1.
            less: One or more texts to move the query away from, each with an optional weight. Pictures that show what a
                text says get a lower rank, but are not excluded.
            group_duplicates: Return only the best hit of each group of near-duplicates, and count the others in
                `Hit.copies`.

        Returns:
            Hits, best first.

        Raises:
            ValueError: If there is nothing to search for, `like` can't be read, `k` or a weight is out of range, or
                `since` is after `until`. If there is no index, or all its pictures were embedded with another model.
        """
        text = text.strip() if text else None
        more, less = ([argument] if isinstance(argument, str) else argument for argument in (more, less))
        feedback = [(weight, words) for weight, words in map(query.parse_weighted_feedback, more)]
        feedback += [(-weight, words) for weight, words in map(query.parse_weighted_feedback, less)]
        if not text and like is None and not feedback:
            raise make_error_from_code(ValueError, "empty_query")
        # The result is not used. If the index can't be searched, this call raises the error now, before the weights of
        # the model are loaded, which takes time.
        self._model_clause()
        vectors = [self.model.embed_texts([text])] if text else []
        if like is not None:
            image = open_query_picture(like) if isinstance(like, str | Path) else like
            vectors.append(self.model.embed_images([image]))
        vector = np.concatenate(vectors).mean(axis=0) if vectors else None
        if feedback:
            weights, texts = zip(*feedback, strict=True)
            vector = self.apply_feedback(vector, list(zip(weights, self.model.embed_texts(texts), strict=True)))
        is_text_query = like is None and not feedback
        return self.search_vector(vector, k, folder, since, until, exact, is_text_query, group_duplicates)

    def apply_feedback(self, vector: np.ndarray | None, feedback: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
        """Move a query towards or away from other vectors (Rocchio relevance feedback).

        Args:
            vector: Vector (width,) of the query. None: the feedback alone is the query.
            feedback: Pairs (weight, vector). A positive weight moves the query towards the vector (width,), a negative
                weight away from it.

        Returns:
            The new query vector (width,), not normalized.
        """
        return query.apply_feedback(vector, feedback, self._sample_vectors())

    def _sample_vectors(self) -> np.ndarray:
        """Return unit-length vectors (pictures, width) of pictures that are spread evenly over the index.

        At most `query.SAMPLE_ROWS` vectors are returned. They are cached until the index changes.
        """
        return self._table.cached("sample", lambda: self._table.sample(self.model, query.SAMPLE_ROWS))

    def _compute_relevance_threshold(self, vector: np.ndarray) -> float:
        """Compute the minimum cosine with a sentence that makes a picture count as relevant.

        The index has one threshold for all sentences: a z-score, which counts standard deviations above the mean
        (`query.estimate_relevance_z_score_threshold`). The z-score is converted to a cosine for this sentence, with the
        mean and the standard deviation of the cosines between the sentence and a sample of the pictures.

        Args:
            vector: Vector (width,) of the sentence, of unit length.

        Returns:
            The minimum cosine.
        """

        def background() -> float:
            """Compute the z-score that the best picture of the index reaches by chance.

            It is computed with neutral sentences: sentences such as "uma imagem" that describe no particular picture.
            """
            neutral_vectors = self.model.embed_texts(query.NEUTRAL_SENTENCES)
            nearest = self._make_nearest(self._model_clause())
            best_cosines = [nearest(neutral, 1)["score"][0].as_py() for neutral in neutral_vectors]
            return query.estimate_relevance_z_score_threshold(self._sample_vectors(), neutral_vectors, best_cosines)

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
            vector: Query vector (width,), made with the model of the index. It need not have unit length.
            k: Maximum number of hits, at least 1.
            folder: Return only pictures in this folder and its subfolders.
            since: Return only pictures of this day or later (`Hit.date`).
            until: Return only pictures of this day or earlier.
            exact: True: compare the query with every vector. False: search a large index approximately, which is
                faster.
            is_text_query: Whether the vector is the embedding of a sentence. If so, SigLIP models return probabilities
                as scores, and hits may be marked as relevant or not (`relevance_threshold`). Otherwise, scores are
                cosines, and no hit is marked.
            group_duplicates: Return only the best hit of each group of near-duplicates, and count the others in
                `Hit.copies`.

        Returns:
            Hits, best first.

        Raises:
            ValueError: If `vector` has the wrong shape, `k` is below 1, or `since` is after `until`. If there is no
                index, or all its pictures were embedded with another model.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if np.shape(vector) != (self.model.width,):
            raise ValueError(f"The vector must have {self.model.width} numbers, got the shape {np.shape(vector)}.")
        if since and until and since > until:
            raise ValueError(f"since must not be after until, got {since} and {until}.")
        if model_clause := self._model_clause():
            not_embedded = self._table.count_other_models(self.model.image_digest)
            log_message_from_code("not_yet_embedded", not_embedded, len(self), self.model.name, level=logging.WARNING)
        vector = table.l2_normalize(vector)
        clause = table.filter_clause(folder, since, until, model_clause)
        nearest = partial(self._make_nearest(clause, exact), vector)
        hits = self._group_hits(k, nearest, clause) if group_duplicates else table.convert_rows_to_hits(nearest(k))
        if not is_text_query or not hits:
            return hits
        uses_threshold = self.relevance_threshold
        if uses_threshold is None:
            uses_threshold = query.is_relevance_auc_of_model_high_enough(self.model.folder)
        if uses_threshold:
            threshold = self._compute_relevance_threshold(vector)
            hits = [replace(hit, above_threshold=hit.score >= threshold) for hit in hits]
        scores = self.model.scale_scores(np.array([hit.score for hit in hits]))
        return [replace(hit, score=float(score)) for hit, score in zip(hits, scores, strict=True)]

    def _load_cached_rows(self, clause: str | None) -> CachedRows | None:
        """Load the rows that match an SQL clause into memory.

        The rows stay in memory until the index changes or another clause is used.

        Args:
            clause: SQL condition. None: all rows.

        Returns:
            The rows, or None if more than `MAX_CACHED_ROWS` rows match.
        """
        cache, key = self._table.cached("cached_rows", dict), (self.model.image_digest, clause)
        if key not in cache:
            cache.clear()
            is_small, columns = self._table.count(clause) <= MAX_CACHED_ROWS, table.comparison_columns(self.model.width)
            cache[key] = CachedRows(self.model, self._table.rows(columns, clause)) if is_small else None
        return cache[key]

    def _make_nearest(self, clause: str | None, exact: bool = False) -> Callable[[np.ndarray, int], pa.Table]:
        """Return a function that finds the nearest rows among the rows that match an SQL clause.

        Args:
            clause: SQL condition. None: all rows.
            exact: True: compare every vector. False: use the approximate vector index if there is one.

        Returns:
            Function that takes a unit-length vector (width,) and a maximum number of rows. The function returns the
            nearest rows, best first. The column `score` of the rows contains the cosine with the vector.
        """
        cached = self._load_cached_rows(clause)
        return cached.nearest if cached else partial(self._table.nearest, clause=clause, exact=exact)

    def _group_hits(self, k: int, fetch_ranked: Callable[[int], pa.Table], clause: str | None) -> list[Hit]:
        """Return the first k hits of a ranking in which each group of near-duplicates appears only once.

        Each group is represented by its first hit in the ranking. `Hit.copies` is the number of near-duplicates of this
        hit. They are counted among all rows that match the clause if these rows are in memory, otherwise only among the
        rows that `fetch_ranked` returned.

        Args:
            k: Maximum number of hits.
            fetch_ranked: Function that takes a number of rows and returns the first rows of the ranking.
            clause: SQL condition for the rows among which near-duplicates are counted. It is the condition that
                `fetch_ranked` applies. None: no condition.

        Returns:
            Hits in the order of the ranking.
        """
        number, groups = DUPLICATE_OVERFETCH * k, list[np.ndarray]()
        while len(groups) < k:
            rows = fetch_ranked(number)
            vectors = duplicates.get_comparison_vectors(self.model, rows)
            groups = duplicates.cluster_near_duplicates(vectors, max_groups=k)
            if len(rows) < number:
                break
            number *= OVERFETCH_GROWTH
        first_rows = np.array([group[0] for group in groups], int)
        cached = self._load_cached_rows(clause)
        others = cached.comparison_vectors if cached else vectors
        copy_counts = duplicates.is_duplicate(vectors[first_rows], others).sum(axis=1) - 1
        hits = zip(table.convert_rows_to_hits(rows.take(first_rows)), copy_counts, strict=True)
        return [replace(hit, copies=max(0, int(copy_count))) for hit, copy_count in hits]

    def copies(
        self, path: str, k: int = 240, folder: FolderFilter = None, since: DateFilter = None, until: DateFilter = None
    ) -> list[Hit]:
        """Return the near-duplicates of a picture of the index: resized, re-encoded or slightly edited copies.

        Args:
            path: Path of the picture, as in `Hit.path`.
            k: Maximum number of hits.
            folder: Return only pictures in this folder and its subfolders.
            since: Return only pictures of this day or later (`Hit.date`).
            until: Return only pictures of this day or earlier.

        Returns:
            Hits without the picture itself, most similar first. The score is the similarity to the picture, at most 1,
            as near-duplicate detection computes it (`duplicates.compute_duplicate_similarity`).

        Raises:
            KeyError: If the picture is not indexed, or was embedded with another model.
        """
        vector, clause = self.vectors([path])[0], table.filter_clause(folder, since, until)
        picture = self._table.rows_of_paths(table.comparison_columns(self.model.width), [path])
        picture_vectors = duplicates.get_comparison_vectors(self.model, picture)  # one row, because there is one path
        cached = self._load_cached_rows(clause)
        rows = cached.rows if cached else self._table.nearest(vector, DUPLICATE_OVERFETCH * k, clause)
        others = cached.comparison_vectors if cached else duplicates.get_comparison_vectors(self.model, rows)
        copies = np.flatnonzero(duplicates.is_duplicate(picture_vectors, others)[0])
        similarities = duplicates.compute_duplicate_similarity(others[copies], picture_vectors)[:, 0]
        hits = table.convert_rows_to_hits(rows.take(copies), np.clip(similarities, -1, 1))
        return sorted((hit for hit in hits if hit.path != path), key=lambda hit: (-hit.score, hit.path))[:k]

    def newest(
        self,
        k: int = 12,
        folder: FolderFilter = None,
        since: DateFilter = None,
        until: DateFilter = None,
        group_duplicates: bool = False,
    ) -> list[Hit]:
        """Return the newest pictures of the index, latest first.

        The date of a picture is its EXIF date if there is one, otherwise the modification time of its file
        (`Hit.date`).

        Args:
            k: Maximum number of hits.
            folder: Return only pictures in this folder and its subfolders.
            since: Return only pictures of this day or later.
            until: Return only pictures of this day or earlier.
            group_duplicates: Return only the latest picture of each group of near-duplicates, and count the others in
                `Hit.copies`.

        Returns:
            Hits, latest first. Their score is 0.
        """
        clause = table.filter_clause(folder, since, until)
        if not group_duplicates:  # handled separately, because only grouping needs the model, which is slow to load
            return table.convert_rows_to_hits(self._fetch_newest(clause, table.HIT_COLUMNS, k))
        cached, columns = self._load_cached_rows(clause), table.comparison_columns(self.model.width)
        newest = cached.newest if cached else partial(self._fetch_newest, clause, columns)
        return self._group_hits(k, newest, clause)

    def _fetch_newest(self, clause: str | None, columns: Sequence[str], k: int) -> pa.Table:
        """Read the newest rows that match an SQL clause from the table.

        Args:
            clause: SQL condition. None: all rows.
            columns: Names of the columns to read.
            k: Maximum number of rows.

        Returns:
            The rows, latest first.
        """

        def paths_in_order() -> pa.ChunkedArray:
            """Return the paths of all rows that match the clause, latest first."""
            rows = self._table.rows(["path", "taken", "mtime_ns"], clause)
            return rows["path"].take(table.newest_first_order(rows))

        # Sorting a million rows takes a second, so the order of all rows of the index is cached.
        paths = paths_in_order() if clause else self._table.cached("newest", paths_in_order)
        rows = self._table.rows_of_paths(columns, paths[:k].to_pylist())
        return rows.take(pc.index_in(paths[:k], rows["path"]).drop_null())

    def _model_clause(self) -> str | None:
        """Check that a search is possible, and return the SQL condition for rows with vectors of the model in use.

        Returns:
            The SQL condition if the index also contains vectors of other models. None, which means no condition, if all
            vectors were made with the model in use.

        Raises:
            ValueError: If there is no index, or all vectors in the index were made with other models.
        """
        _ = self._table.pictures  # the result is not used; the property raises an error if there is no index
        digest, total = self.model.image_digest, len(self)
        other_count = self._table.count_other_models(digest)
        if total and (other_count == total or self.model.width not in self._table.widths()):
            names = {"model": self.model.name, "known": self._table.model().get("name")}
            raise make_error_from_code(ValueError, "other_model", path=self.where, total=total, **names)
        return f"model = {table.quote_sql(digest)}" if other_count else None

    def duplicates(self, threshold: float = duplicates.DUPLICATE_MIN_SIMILARITY) -> list[list[Hit]]:
        """Return all groups of near-duplicates in the index: copies that were resized, re-encoded or slightly edited.

        Args:
            threshold: Minimum similarity of a picture to the first picture of its group, above 0 and at most 1
                (`duplicates.compute_duplicate_similarity`).

        Returns:
            Groups of at least two hits, the largest group first. The first hit of a group is its picture with the most
            pixels. The score of each hit is its similarity to the first hit. The other hits are sorted by score, best
            first.

        Raises:
            ValueError: If the threshold is out of range, or all pictures in the index were embedded with another model.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}.")
        if not self._table.exists():
            return []
        rows = self._table.rows(table.comparison_columns(self.model.width), self._model_clause())
        rows = rows.append_column("pixels", pc.multiply(rows["width"], rows["height"]))
        # The first row of a group becomes its first hit, which should be the copy of the best quality. Therefore rows
        # are sorted by the number of pixels, then by the size of the file.
        rows = rows.sort_by([("pixels", "descending"), ("size", "descending"), ("path", "ascending")])
        vectors, groups = duplicates.get_comparison_vectors(self.model, rows), []
        for numbers in (group for group in duplicates.cluster_near_duplicates(vectors, threshold) if len(group) > 1):
            similarities = duplicates.compute_duplicate_similarity(vectors[numbers], vectors[numbers[:1]])[:, 0]
            leader, *others = table.convert_rows_to_hits(rows.take(numbers), np.clip(similarities, -1, 1))
            groups.append([leader, *sorted(others, key=lambda hit: (-hit.score, hit.path))])
        return sorted(groups, key=len, reverse=True)

    # --- Contents and metadata of the index

    def thumbnail(self, path: str) -> bytes | None:
        """Return the thumbnail of an indexed picture.

        Args:
            path: Path of the picture, as in `Hit.path`.

        Returns:
            The bytes of a WebP file. The longer side of the thumbnail has at most 256 pixels. None if the picture is
            not indexed.
        """
        rows = self._table.rows_of_paths([table.THUMBNAIL_COLUMN], [str(path)])
        return rows[table.THUMBNAIL_COLUMN][0].as_py() if rows.num_rows else None

    def get_picture(self, path: str) -> Hit | None:
        """Return the metadata of an indexed picture, such as its date, size and location.

        Args:
            path: Path of the picture, as in `Hit.path`.

        Returns:
            A hit with the score 0, or None if the picture is not indexed.
        """
        rows = self._table.rows_of_paths(table.HIT_COLUMNS, [str(path)])
        return table.convert_rows_to_hits(rows)[0] if rows.num_rows else None

    def vectors(self, paths: Sequence[str]) -> np.ndarray:
        """Return the stored vectors of pictures.

        Args:
            paths: Paths of the pictures, as in `Hit.path`.

        Returns:
            Array (paths, width), float32. Each vector has unit length.

        Raises:
            KeyError: If a picture is not indexed, or was embedded with another model.
        """
        stored = self._stored_vectors(paths)
        if missing := [path for path in paths if path not in stored]:
            raise KeyError(f"{missing[0]} has no vector of {self.model.name} in the index {self.where}.")
        return np.stack([stored[path] for path in paths]) if stored else np.empty((0, self.model.width), np.float32)

    def _stored_vectors(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Look up the stored vectors of pictures by their paths.

        Args:
            paths: Paths of pictures. The result does not contain a picture that is not indexed, or that was embedded
                with another model.

        Returns:
            Dictionary `{path: vector (width,)}`. Vectors are float32 and have unit length.
        """
        rows = self._table.rows_of_paths(["path", "model", table.vector_column(self.model.width)], list(paths))
        vectors = table.extract_unit_vectors_of_model_or_zeros(self.model, rows)
        return {path: vector for path, vector in zip(rows["path"].to_pylist(), vectors, strict=True) if vector.any()}

    def folders(self) -> dict[str, int]:
        """Return the number of pictures in each folder that was added to the index.

        Returns:
            A dictionary that maps the path of each folder to the number of pictures in the folder and its subfolders.
        """
        return {folder: self._table.count(table.folders_clause(folder)) for folder in self._table.folders()}

    def all_folders(self) -> dict[str, int]:
        """Return the number of pictures in each folder that was added to the index, and in each of its subfolders.

        Returns:
            A dictionary that maps the path of each folder or subfolder to the number of pictures in it, including its
            own subfolders. The dictionary is sorted by path.
        """
        added = self._table.folders()
        counts, separator = dict.fromkeys(added, 0), re.escape(os.sep)
        parents = pc.replace_substring_regex(self._table.rows(["path"])["path"], rf"{separator}[^{separator}]*$", "")
        for entry in pc.value_counts(parents.combine_chunks()).to_pylist():
            parent = Path(entry["values"] or os.sep)
            for folder in (parent, *parent.parents):
                if folder == parent or any(folder.is_relative_to(root) for root in added):
                    counts[str(folder)] = counts.get(str(folder), 0) + entry["counts"]
        return dict(sorted(counts.items()))

    def requested_folders(self) -> dict[str, str]:
        """Return the folders of the index that the user has added on this machine.

        `add` updates these folders if it is called without folders. Folders that were added on another machine are not
        returned.

        Returns:
            A dictionary that maps the path of each folder to its real path (with symbolic links resolved) when it was
            added.
        """
        recorded = known_folders.load_requested_folders(self._table)
        return {folder: recorded[folder] for folder in self._table.folders() if folder in recorded}

    def status(self) -> IndexStatus:
        """Return a summary of the index: number of pictures, folders, skipped files, model, size and ignore rules."""
        taken = pc.min_max(self._table.rows(["taken"], "taken IS NOT NULL")["taken"]).as_py()
        model, rules = self._table.model(), known_folders.load_ignore_rules(self._table)
        return IndexStatus(
            where=self.where,
            pictures=len(self),
            skipped_files=sorted(self._table.skipped_files().values(), key=lambda skipped: skipped.path),
            folders=self.folders(),
            model=model.get("name"),
            bytes=self._table.bytes(),
            approximate=bool(model) and table.vector_column(model["width"]) in self._table.indices(),
            first=taken["min"],
            last=taken["max"],
            exclude=list(rules.exclude),
            forgotten=sorted(rules.forgotten),
            ignored_counts=dict(known_folders.load_ignored_counts_by_reason(self._table)),
        )

    def version(self) -> int:
        """Return a number that grows with each change of the index, so that callers can discard outdated results."""
        return self._table.version()

    def __len__(self) -> int:
        return self._table.count()

    def classify(
        self, source: "str | Path | Image.Image", labels: Sequence[str], template: str = DEFAULT_LABEL_TEMPLATE
    ) -> list[Classification]:
        """Find the label that describes each picture best (zero-shot classification).

        Pictures that are not in the index are read and embedded, but not added to it.

        Args:
            source: Folder of pictures, path of one picture, or an image in memory.
            labels: Words or phrases to choose from, in a language of the model.
            template: Sentence in which each label replaces the placeholder `{}`, such as "uma imagem de {}".

        Returns:
            One classification per readable picture, sorted by path, with the best label and the probability of each
            label. The best label is None if the sentence "uma imagem" fits the picture better than every label.

        Raises:
            ValueError: If there is no label, a label is empty or occurs twice, or the template does not contain `{}`
                exactly once. If the folder does not exist or contains no picture.
        """
        labels = query.clean_and_check_labels(labels, template)
        if not isinstance(source, str | Path):
            return query.classify_vectors(self.model, [""], self.model.embed_images([source]), labels, template)
        paths, vectors = self._load_or_embed_vectors(to_absolute_path(source))
        return query.classify_vectors(self.model, paths, vectors, labels, template)

    def _load_or_embed_vectors(self, source: Path) -> tuple[list[str], np.ndarray]:
        """Return the vectors of a picture or of all pictures in a folder.

        Vectors that the index does not contain are computed now. Pictures that can't be read are not returned.

        Args:
            source: Absolute path of the picture or folder.

        Returns:
            Tuple of the sorted paths of the pictures, and the array (paths, width) of their vectors, of unit length.
        """
        if source.is_file():
            files = [folder_scan.FileState.of(str(source))]
        else:
            files, _ = folder_scan.find_pictures_and_unreadable_files([source])
        rows = self._table.rows(["path", "size", "mtime_ns", "digest", "model"], table.folders_clause(source))
        stored = indexing.StoredRows(rows, self.model.image_digest)
        vectors = self._stored_vectors([file.path for file in files if stored.is_done(file)])
        missing = [file for file in files if file.path not in vectors]
        vectors |= indexing.embed_files_without_indexing(self.model, missing, source)
        paths = [file.path for file in files if file.path in vectors]
        return paths, np.stack([vectors[path] for path in paths]) if paths else np.empty((0, self.model.width))

    def export(self, path: str | Path) -> int:
        """Export the metadata of all pictures, such as path, date and size, to a Parquet or CSV file.

        Args:
            path: File to write. Its suffix selects the format: .parquet for Parquet with vectors, .csv for CSV without
                vectors.

        Returns:
            The number of exported pictures.

        Raises:
            ValueError: If the suffix is neither .parquet nor .csv, or the file can't be created.
        """
        from capivara_search.index_export import export_all_rows

        # The export only reads. It holds the lock of the index so that no other process merges data files in the
        # meantime, because merging would delete files that the export still has to read.
        with self._table.locked():
            return export_all_rows(self._table, path)
