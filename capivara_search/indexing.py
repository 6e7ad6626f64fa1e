"""Update the tables of an index from folders: plan the work, then read and embed pictures and write their rows.

`PictureIndex.add` calls three functions, in this order:

1. `prepare_index_update` plans the work and prepares the tables.
2. `IndexWriter.run` embeds pictures and writes rows.
3. `IndexWriter.finish` removes the rows of files that are gone, and optimizes the tables.

If an update is killed, at most the rows since its last commit are lost, and the next update does the rest.
"""

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from capivara_common.cli import make_coded_error
from capivara_common.image_files import DECODER_THREADS, BadImage
from capivara_search.duplicates import compute_color_signature
from capivara_search.folder_scan import RETRYABLE_REASONS, FileState, find_pictures_and_unreadable_files
from capivara_search.folders import load_ignore_rules, record_requested_folders, save_ignore_rules
from capivara_search.ignore_rules import IgnoreRules
from capivara_search.index_progress import ProgressCallback, RateEstimator
from capivara_search.messages import log_message_from_code
from capivara_search.picture_reading import Picture, read_picture_for_indexing
from capivara_search.results import IndexReport, SkippedFile
from capivara_search.table import COLOR_SIGNATURE_COLUMN, PictureTable, folders_clause, vector_column

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

# Rows are collected in memory and written in commits of this many files (about 5 MB with thumbnails). Each commit adds
# a data file to the index, so smaller commits would make the index slower to read.
COMMIT_ROWS = 400
COMMIT_INTERVAL_S = 20.0  # maximum seconds between two commits, so that little work is lost if a slow machine crashes
CLASSIFY_BATCH_SIZE = 32  # batch size for classifying pictures that are not in the index
# Number of pictures in the first batch. Each later batch has twice as many pictures as the batch before it, until the
# batch size is reached. The first batches are small so that the remaining time can be estimated early.
FIRST_BATCH_SIZE = 4

# A file, and its decoded picture or the exception that was raised when it was read.
ReadResult = tuple[FileState, Picture | Exception]

# --- Planning --------------------------------------------------------------------------------------------------------


class StoredRows:
    """Rows of the table `pictures` in memory, for looking up quickly what the index knows about a path.

    `stored_rows[path]` is None if the path has no row. Otherwise it is a tuple: the digest (hash) of the file's
    content, and whether the stored vector was made with the model in use.

    Args:
        rows: Rows with the columns path, size, mtime_ns, digest and model.
        image_digest: Digest (hash) of the image encoder in use (`SearchModel.image_digest`).
    """

    def __init__(self, rows: pa.Table, image_digest: str):
        # Arrays need less memory than a Python object per row.
        self.sizes, self.times = rows["size"].to_numpy(), rows["mtime_ns"].to_numpy()
        self.digests = rows["digest"].combine_chunks()
        self.is_current = np.equal(rows["model"].to_numpy(zero_copy_only=False), image_digest)
        self.positions = {path: position for position, path in enumerate(rows["path"].to_pylist())}

    def __getitem__(self, path: str) -> tuple[str, bool] | None:
        """Look up the row of a picture.

        Args:
            path: Absolute path of the picture.

        Returns:
            Tuple (digest, is_current). `digest` is the hexadecimal digest (hash) of the file's content. `is_current` is
            True if the stored vector was made with the model in use. None instead of a tuple if the path has no row.
        """
        position = self.positions.get(path)
        return None if position is None else (self.digests[position].as_py(), bool(self.is_current[position]))

    def is_done(self, file: FileState) -> bool:
        """Return whether the row of a file is up to date, so that the file need not be read again.

        Args:
            file: Current state of the file.

        Returns:
            True if the row has the file's size and modification time, and a vector of the model in use. False
            otherwise.
        """
        position = self.positions.get(file.path)
        is_same = position is not None and (self.sizes[position], self.times[position]) == (file.size, file.mtime_ns)
        return bool(is_same and self.is_current[position])


@dataclass
class IndexPlan:
    """Plan of one index update: the files to read, the rows to remove, and the results of the folder scan.

    `plan_index_update` makes the plan by comparing the files on disk with the rows of the index. `IndexWriter` then
    reads and embeds the files, and removes the rows.
    """

    clause: str  # SQL condition that selects the rows of the index that were compared with the files on disk
    covers_folders: bool  # True: whole folders were compared. False: only some paths in the folders.
    roots: Sequence[str]  # real paths (symbolic links resolved) of the folders; files outside of them are not read
    files: list[FileState]  # files to read: new, changed, or with a vector of another model
    stored_rows: StoredRows  # rows of the table `pictures` before the update
    removed_paths: list[str]  # paths of rows to remove, because the file is gone or is now ignored
    unchanged: int  # number of files that need no work
    unreadable: list[SkippedFile]  # files and folders that the folder scan could not read
    known_bad_files: set[FileState]  # files that could not be decoded in an earlier update and have not changed since
    ignored_counts: dict[str, Counter[str]]  # {folder: {reason: number of ignored files and folders}}


def plan_index_update(
    table: PictureTable,
    image_digest: str,
    folders: Mapping[Path, str],
    rules: IgnoreRules | None = None,
    only_paths: Collection[str] | None = None,
) -> IndexPlan:
    """Plan an index update by comparing the files in folders with the rows of the index.

    A folder that can't be used, for example because its disk is not mounted, usually raises an error. But if there are
    several folders, and the index lists all of them, the unusable folder is left out with a warning.

    Args:
        table: LanceDB tables of the index.
        image_digest: Digest (hash) of the image encoder in use.
        folders: Folders to compare: `{absolute path: expected real path}`. In a real path, symbolic links are resolved.
        rules: Rules for ignoring files. None: the rules that the index stores.
        only_paths: Absolute paths inside `folders`. Only these are compared. None: everything.

    Returns:
        The plan: the files to read and the rows to remove.

    Raises:
        ValueError: If a folder can't be opened, contains no picture, was removed from the index by the user, or has
            another real path than expected.
    """
    clause, counts = folders_clause(*folders if only_paths is None else only_paths), dict[str, Counter[str]]()
    rules = rules or load_ignore_rules(table)
    try:
        files, unreadable = find_pictures_and_unreadable_files(folders, rules, counts, only_paths)
    except ValueError as error:
        other_folders = {folder: real for folder, real in folders.items() if str(folder) != error.values["path"]}
        if other_folders and {*map(str, folders)} <= {*table.folders()}:
            log_message_from_code("left_as_it_is", error, level=logging.WARNING)
            return plan_index_update(table, image_digest, other_folders, rules, only_paths)
        if number := table.count(folders_clause(error.values["path"])):
            text = "{error} The index keeps its {number} pictures of this folder; `forget` removes them."
            raise make_coded_error(ValueError, error.code, text, error=error, number=number, **error.values) from error
        raise
    stored = StoredRows(table.rows(["path", "size", "mtime_ns", "digest", "model"], clause), image_digest)
    todo = [file for file in files if not stored.is_done(file)]
    skipped_files = table.skipped_files(clause).items()
    bad_files = {file for file, skipped in skipped_files if skipped.code not in RETRYABLE_REASONS}
    known_bad_files = bad_files & set(todo)
    present = {file.path for file in files} | {skipped.path for skipped in unreadable}
    folder_prefixes = tuple(os.path.join(folder, "") for folder in folders)
    # If a folder can't be read, its files possibly still exist, so their rows are not removed.
    unreadable_prefixes = tuple(skipped.path + os.sep for skipped in unreadable)
    missing = (path for path in stored.positions if path not in present and path.startswith(folder_prefixes))
    removed = [path for path in missing if not path.startswith(unreadable_prefixes)]
    for folder, prefix in zip(folders, folder_prefixes, strict=True) if only_paths is not None else ():
        has_files = any(file.path.startswith(prefix) for file in files)
        removed_count = sum(path.startswith(prefix) for path in removed)
        if not has_files and 0 < removed_count == table.count(folders_clause(folder)):
            # All pictures of the folder seem to be gone, perhaps because its disk was unmounted. Then their rows must
            # not be removed. So a plan for whole folders is made instead, which does not accept an empty folder.
            return plan_index_update(table, image_digest, folders, rules)
    return IndexPlan(
        clause=clause,
        covers_folders=only_paths is None,
        roots=[*folders.values()],
        files=[file for file in todo if file not in known_bad_files],
        stored_rows=stored,
        removed_paths=removed,
        unchanged=len(files) - len(todo),
        unreadable=unreadable,
        known_bad_files=known_bad_files,
        ignored_counts=counts,
    )


# --- Reading, embedding, writing -------------------------------------------------------------------------------------


@dataclass
class IndexWriter:
    """Object that reads the files of a plan, embeds them in batches, and updates the rows of the index.

    `run` embeds the files and writes their rows. `finish` removes outdated rows and optimizes the table. If several
    processes share the work, each calls `run` for its files. After all have ended, one process calls `finish`.

    Args:
        table: LanceDB tables of the index.
        model: Model that embeds the pictures.
        plan: Plan of the update, which lists the files to read.
        batch_size: Number of pictures per batch of the model.
        progress: Callback that takes the number of processed files and the total number.

    Attributes:
        report: Report of the update up to now.
    """

    table: PictureTable
    model: "SearchModel"
    plan: IndexPlan
    batch_size: int
    progress: ProgressCallback = lambda done, total: None

    def __post_init__(self) -> None:
        table, model, plan = self.table, self.model, self.plan
        self.columns, self.image_digest, self.column = table.columns(), model.image_digest, vector_column(model.width)
        self.report, self.done_count, self.reported = IndexReport(unchanged=plan.unchanged), 0, 0
        self.estimate, self.write_s = RateEstimator(), 0.0
        new = sum(plan.stored_rows[file.path] is None for file in plan.files)
        self.optimize_s = table.estimate_optimize_seconds(model.width, table.count() + new)
        # {digest (hash) of a file's content: number of files with this content that are gone}. A new file with the same
        # content as a file that is gone counts as moved.
        self.removed_digests = Counter(plan.stored_rows[path][0] for path in plan.removed_paths)
        self._start_commit()

    def _start_commit(self) -> None:
        """Start to collect rows and skipped files for the next commit, and measure the time from now on."""
        self.rows: dict[str, dict[str, Any]] = {}
        self.vectors_by_digest: dict[str, np.ndarray] = {}
        self.skipped_files: dict[FileState, SkippedFile] = {}
        self.commit_start = time.monotonic()

    def run(self) -> IndexReport:
        """Read and embed all files of the plan, and write their rows to the index.

        If an exception is raised, for example by Ctrl-C, the rows of finished files are committed first.

        Returns:
            The report of this update. Rows of files that are gone are not counted yet, because `finish` removes them.
        """
        files, read = self.plan.files, _make_reader(self.model, self.plan.roots)
        self.progress(0, len(files))
        try:
            with closing(prefetch_pictures(files, read, self.batch_size)) as batches:
                for batch in batches:
                    self._embed_batch(batch)
                    self._report()
                    is_late = time.monotonic() - self.commit_start > COMMIT_INTERVAL_S
                    if len(self.rows) + len(self.skipped_files) >= COMMIT_ROWS or is_late:
                        self.commit()
        finally:  # also after Ctrl-C or an error: rows of embedded pictures must not be lost
            self.commit()
        return self.report

    def _report(self) -> None:
        """Call the progress callback with a number of processed files that leaves room for the work at the end.

        After the last picture is embedded, the last commit and `PictureTable.optimize` still have to run. If they need
        as much time as embedding n pictures, the number of processed files is multiplied by total / (total + n). So the
        reported number reaches the total only when everything is done.
        """
        self.estimate.update(self.done_count)
        total, remaining_s = len(self.plan.files), self.write_s + self.optimize_s
        reported = int(self.done_count * total / (total + remaining_s * (self.estimate.rate or 0)))
        # The same number must not be reported twice here. Otherwise `RateEstimator.update` would assume that the time
        # was spent on loading the model, and discard its measurements.
        if reported > self.reported:
            self.reported = reported
            self.progress(reported, total)

    def commit(self) -> None:
        """Write the rows and the skipped files that were collected since the last commit to the tables of the index."""
        start = time.monotonic()
        if self.rows:
            self.table.upsert(pa.Table.from_pylist(list(self.rows.values()), self.columns))
        if self.skipped_files:
            self.table.set_skipped_files(self.skipped_files)
            # A file that can't be decoded loses its row of an earlier update. A file that could not be opened or read
            # keeps its row, because the file may be intact.
            undecodable = [skipped for skipped in self.skipped_files.values() if skipped.code not in RETRYABLE_REASONS]
            self.table.delete_paths([skipped.path for skipped in undecodable])
            self.report.removed += sum(skipped.path in self.plan.stored_rows.positions for skipped in undecodable)
        self._start_commit()
        self.write_s = time.monotonic() - start

    def _embed_batch(self, batch: Sequence[ReadResult]) -> None:
        """Embed the pictures of a batch, and collect their rows for the next commit.

        If the index has a vector for the content of a picture already, the vector is reused. Files that could not be
        read are collected as skipped files.

        Args:
            batch: Pairs (file, result). The result is the decoded picture, or the exception that was raised when the
                file was read.

        Raises:
            Exception: If a result is an exception other than BadImage, this exception is raised.
        """
        pictures = dict[FileState, Picture]()
        for file, result in batch:
            if isinstance(result, Picture):
                pictures[file] = result
            elif not isinstance(result, BadImage):
                raise result
            elif result.reason != "gone":
                # A file that was deleted since the scan ("gone") is no error. The next update removes its row.
                self.skipped_files[file] = SkippedFile(file.path, result.reason, result.detail)
                self.report.skipped_files.append(self.skipped_files[file])
        digests = {picture.digest for picture in pictures.values()}
        vectors = self.table.vectors_of_digests(digests, self.model) | self.vectors_by_digest
        new = {picture.digest: picture.image for picture in pictures.values() if picture.digest not in vectors}
        if new and not self.report.embedded:
            self.model.prepare_images()
            self.estimate.update(self.done_count)
            # The callback gets the same number as in its last call. This tells it that the model was loaded since then,
            # so that it can leave the loading time out of the estimated speed.
            self.progress(self.reported, len(self.plan.files))
            self.embed = self.model.tune_image_embedding(len(self.plan.files), self.batch_size)
        if new:
            vectors |= dict(zip(new, self.embed(list(new.values())), strict=True))
        self.report.embedded += len(new)
        for file, picture in pictures.items():
            self._add_row(file, picture, vectors[picture.digest])
        self.done_count += len(batch)

    def _add_row(self, file: FileState, picture: Picture, vector: np.ndarray) -> None:
        """Collect the row of a picture for the next commit, and count the picture in the report.

        The picture counts as new, moved, changed, unchanged or reembedded. `IndexReport` explains these words.

        Args:
            file: State of the file when the folder was scanned.
            picture: The decoded picture with its metadata.
            vector: Vector (width,) of the picture.
        """
        digest, stored = picture.digest, self.plan.stored_rows[file.path]
        # The row stores the size and the modification time that the file had in the folder scan, before it was read. If
        # the file has changed since then, the next update notices the difference and reads the file again.
        row = vars(picture) | asdict(file) | {"model": self.image_digest, self.column: np.float16(vector)}
        row[COLOR_SIGNATURE_COLUMN] = compute_color_signature(row.pop("image"))
        self.rows[file.path] = row
        self.vectors_by_digest[digest] = vector
        if stored is None:
            kind = "moved" if self.removed_digests[digest] > 0 else "new"
        elif stored[0] != digest:
            kind = "changed"
        else:
            kind = "unchanged" if stored[1] else "reembedded"
        self.removed_digests[digest] -= kind == "moved"
        setattr(self.report, kind, getattr(self.report, kind) + 1)

    def finish(self) -> IndexReport:
        """Finish the update: remove outdated rows, store skipped files and ignored counts, and optimize the table.

        The progress callback is called with the total number of files at the end.

        Returns:
            The report of the whole update.
        """
        table, plan, report = self.table, self.plan, self.report
        table.delete_paths(plan.removed_paths)
        report.removed += len(plan.removed_paths) - report.moved
        report.ignored_counts = dict(sum(plan.ignored_counts.values(), Counter()))
        if plan.covers_folders:  # otherwise, the numbers of ignored files are incomplete
            counts = plan.ignored_counts.items()
            table.set_folders({folder: json.dumps(numbers, sort_keys=True) for folder, numbers in counts})
        report.skipped_files = self._update_and_list_skipped_files()
        if len(table.widths()) > 1 and not table.count_other_models(self.image_digest):
            # All rows have vectors of the model in use, so the vector columns of other widths are no longer needed.
            columns = [vector_column(width) for width in table.widths() if width != self.model.width]
            table.run_write(lambda opened: opened.drop_columns(columns))
        table.optimize(self.model.width)
        if self.reported < len(plan.files):
            self.progress(len(plan.files), len(plan.files))
        return report

    def _update_and_list_skipped_files(self) -> list[SkippedFile]:
        """Update the table of skipped files at the end of an index update.

        Rows of files that can be read now, or no longer exist, are removed. Files and folders that the folder scan
        could not read are added. Files that `run` could not read are in the table already.

        Returns:
            All skipped files among the paths that the plan compared, sorted by path.
        """
        plan, stored = self.plan, self.table.skipped_files(self.plan.clause)
        new_paths = {skipped.path for skipped in self.report.skipped_files}
        valid = {file: stored[file] for file in stored if file.path in new_paths or file in plan.known_bad_files}
        for skipped in plan.unreadable:
            # LanceDB stores only valid UTF-8, so the invalid characters of a file name are replaced by "?".
            path = skipped.path.encode("utf-8", "replace").decode()
            # No file has the size and time -1. So the row matches no file on disk, and each update tries to read the
            # path again.
            valid[FileState(path, -1, -1)] = replace(skipped, path=path)
        valid_paths = {file.path for file in valid}
        self.table.delete_skipped_files([file.path for file in stored if file.path not in valid_paths])
        if new := {file: skipped for file, skipped in valid.items() if stored.get(file) != skipped}:
            self.table.set_skipped_files(new)
        return sorted(valid.values(), key=lambda skipped: skipped.path)


def prepare_index_update(
    table: PictureTable,
    model: "SearchModel",
    folders: Mapping[Path, str],
    exclude: Sequence[str] = (),
    include: Sequence[str | Path] = (),
    only_paths: Collection[str] | None = None,
    progress: ProgressCallback | None = None,
) -> IndexPlan:
    """Plan an index update, create the tables if necessary, and store the folders, rules and model in the index.

    Args:
        table: LanceDB tables of the index.
        model: Model that embeds the pictures.
        folders: Folders to update: `{absolute path: expected real path}`. In a real path, symbolic links are resolved.
        exclude: Patterns of files and folders to ignore, in the syntax of `.gitignore`. The index stores them.
        include: What to stop ignoring: patterns of an earlier `exclude`, and paths that the user has removed from the
            index.
        only_paths: Absolute paths inside `folders`. Only these are updated. None: everything.
        progress: Callback that takes the number of processed files and the total number. If it is given, and files of a
            new index or for another model must be embedded, the model is loaded now. None: the model is not loaded.

    Returns:
        The plan: the files to read and the rows to remove.

    Raises:
        ValueError: If a folder, a pattern, an entry of `include` or the model can't be used. No index is created then,
            and an existing index keeps its model.
    """
    # The result is not used. This property raises an error if the search does not support the model's image processor,
    # and the error must come before the index is changed.
    _ = model.image_size
    rules = load_ignore_rules(table).updated(exclude, include)
    plan = plan_index_update(table, model.image_digest, folders, rules=rules, only_paths=only_paths)
    # Without `progress`, the model is loaded later, for example by other machines that do the work.
    if progress and plan.files and table.model().get("image_digest") != model.image_digest:
        # With this first report, the web page shows that the update is running while the model loads.
        progress(0, len(plan.files))
        model.prepare_images()  # loaded before the index is created or changed, because loading may fail
    table.create(model.width)
    record_requested_folders(table, folders)
    save_ignore_rules(table, rules)
    if plan.covers_folders:
        # New folders are recorded now, so that the index knows them even if this update is interrupted. Their value ""
        # is replaced in `IndexWriter.finish` by the numbers of ignored files.
        table.set_folders(dict.fromkeys(plan.ignored_counts.keys() - table.folders().keys(), ""))
    _record_current_model(table, model, plan)
    return plan


def _record_current_model(table: PictureTable, model: "SearchModel", plan: IndexPlan) -> None:
    """Store in the index which model it uses.

    If the index used another model before, a message is logged. If the image encoder is different, the message says how
    many pictures are embedded again. Otherwise it says that only the text encoder is different.

    Args:
        table: LanceDB tables of the index.
        model: Model that the index uses from now on.
        plan: Plan of the update, to count the pictures that will be embedded again.
    """
    stored_model, other_count = table.model(), table.count_other_models(model.image_digest)
    metadata = {"source": model.source, "name": model.name, "width": model.width, "image_digest": model.image_digest}
    stored_rows = [plan.stored_rows[file.path] for file in plan.files]
    to_reembed = sum(row is not None and not row[1] for row in stored_rows)
    is_new_image_encoder = stored_model.get("image_digest") != model.image_digest
    if other_count and (to_reembed or is_new_image_encoder):
        log_message_from_code("image_side", model.name, to_reembed, other_count)
    elif stored_model and stored_model != metadata and table.count():
        log_message_from_code("text_exchanged", model.name, stored_model.get("name"))
    table.set_metadata({"model": json.dumps(metadata)})


def embed_files_without_indexing(model: "SearchModel", files: list[FileState], folder: Path) -> dict[str, np.ndarray]:
    """Read and embed picture files without adding them to an index, for example to classify them.

    Args:
        model: Model that embeds the pictures.
        files: Files to read.
        folder: Folder that contains the files, or the path of the only file. Files whose real path (with symbolic links
            resolved) lies outside of it are not read.

    Returns:
        Dictionary from each path to its vector (width,), float32, of unit length. Files that can't be read are missing.
    """
    vectors, read = {}, _make_reader(model, [os.path.realpath(folder)])
    for batch in prefetch_pictures(files, read, CLASSIFY_BATCH_SIZE):
        pictures = {file.path: result.image for file, result in batch if isinstance(result, Picture)}
        vectors |= zip(pictures, model.embed_images(list(pictures.values())), strict=True)
    return vectors


def _make_reader(model: "SearchModel", folders: Sequence[str]) -> Callable[[FileState], Picture]:
    """Return a function that reads a picture file inside `folders` and resizes the picture for the image encoder."""
    return partial(
        read_picture_for_indexing, image_size=model.image_size, resize_filter=model.resize_filter, folders=folders
    )


def prefetch_pictures(
    files: Iterable[FileState], read: Callable[[FileState], Picture], batch_size: int
) -> Iterator[list[ReadResult]]:
    """Read and decode picture files in background threads while the caller works on earlier batches.

    Args:
        files: Files to read.
        read: Function that reads one file, for example `read_picture_for_indexing`.
        batch_size: Maximum number of files per batch. The first batches are smaller.

    Yields:
        Batches in the order of the files. A batch is a list of tuples (file, result). The result is the return value of
        `read`, or the exception that `read` raised.
    """
    files, waiting = iter(files), deque[tuple[FileState, Future[Picture]]]()
    size = min(FIRST_BATCH_SIZE, batch_size)
    threads = ThreadPoolExecutor(DECODER_THREADS)
    try:
        while True:
            waiting.extend((file, threads.submit(read, file)) for file in islice(files, 2 * batch_size - len(waiting)))
            batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            if not batch:
                return
            yield [(file, future.exception() or future.result()) for file, future in batch]
            size = min(2 * size, batch_size)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
