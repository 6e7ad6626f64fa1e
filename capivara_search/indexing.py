"""Folders into the table of an index: what is new is embedded, what is known stays, what is gone goes.

A file whose size and time are those of its row is not read again, nor is one that was no picture then; what only could
not be opened is tried again. A picture whose content is known, of a file that was moved, copied or touched, keeps its
vector. Rows are written in commits of `COMMIT_ROWS` pictures or `COMMIT_S` seconds, and what is gone is removed at the
end: a kill at any moment loses no more than the last commit, and the next run does what is missing.
"""

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from capivara_common.cli import coded_error
from capivara_common.image_files import DECODER_THREADS, BadImage
from capivara_search.duplicates import color_signature
from capivara_search.estimates import ProgressCallback, RateEstimator
from capivara_search.folders import load_rules, record_requested_folders, save_rules
from capivara_search.messages import log_message
from capivara_search.picture_files import (
    RETRYABLE_REASONS,
    FileState,
    IgnoreRules,
    Picture,
    find_pictures,
    read_picture,
)
from capivara_search.results import IndexReport, SkippedFile
from capivara_search.table import (
    COLOR_SIGNATURE_COLUMN,
    FOLDER_KEY_PREFIX,
    PICTURES_TABLE,
    SKIPPED_FILES_TABLE,
    TABLE_SCHEMAS,
    PictureTable,
    folders_clause,
    in_clause,
    quote_sql,
    to_array,
    vector_column,
)

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

COMMIT_ROWS = 400  # pictures; with their thumbnails some 5 MB
COMMIT_INTERVAL_S = 20.0  # seconds
BATCH_SIZE = 32  # pictures that are classified at once
FIRST_BATCH_SIZE = 4  # pictures; each later one has twice as many

ReadResult = tuple[FileState, Picture | Exception]

# --- what there is to do ---------------------------------------------------------------------------------------------


class StoredRows:
    """What the table says of some paths, held in little memory: path -> (digest, is_current).

    `is_current`: the vector is of the model in use.
    """

    def __init__(self, rows: pa.Table, image_digest: str):
        self.sizes, self.times = rows["size"].to_numpy(), rows["mtime_ns"].to_numpy()
        self.digests = rows["digest"].combine_chunks()
        self.is_current = np.equal(rows["model"].to_numpy(zero_copy_only=False), image_digest)
        self.positions = {path: place for place, path in enumerate(rows["path"].to_pylist())}

    def __getitem__(self, path: str) -> tuple[str, bool] | None:
        place = self.positions.get(path)
        return None if place is None else (self.digests[place].as_py(), bool(self.is_current[place]))

    def is_done(self, file: FileState) -> bool:
        """Whether a file has the size and time that its row says, and its vector is of the model in use."""
        place = self.positions.get(file.path)
        is_as = place is not None and (self.sizes[place], self.times[place]) == (file.size, file.mtime_ns)
        return is_as and bool(self.is_current[place])


@dataclass
class IndexPlan:
    """What there is to do."""

    clause: str  # for the rows of what was looked at
    covers_folders: bool  # whether these are all rows of the folders
    roots: Sequence[str]  # real paths of the folders; nothing is read outside of them
    files: list[FileState]  # to be read: new and changed ones, and those whose vector is of another model
    stored_rows: StoredRows
    removed_paths: list[str]  # paths of rows whose file is no longer there, or left out
    unchanged: int  # rows that stay as they are
    unreadable: list[SkippedFile]  # could not even be looked at
    known_bad_files: set[FileState]  # could not be read an earlier time, and are as they were
    ignored_counts: dict[str, Counter[str]]  # of what rules leave out, by folder, as `find_pictures` fills them in


def make_plan(
    table: PictureTable,
    image_digest: str,
    folders: Mapping[Path, str],
    rules: IgnoreRules | None = None,
    only_paths: Collection[str] | None = None,
) -> IndexPlan:
    """Compare folders, absolute paths with their real paths, with the table.

    `rules`, by default the index's own, leave out some; of paths that are not in `only` nothing is said. Raises
    ValueError where a folder is not there, or holds no picture; where all are known, as without named ones, and others
    are left, a line of the log says so.
    """
    clause, counts = folders_clause(*folders if only_paths is None else only_paths), dict[str, Counter[str]]()
    try:
        found, unseen = find_pictures(folders, rules or load_rules(table), counts, only_paths)
    except ValueError as error:
        others = {one: real for one, real in folders.items() if str(one) != error.values["path"]}
        if others and {*map(str, folders)} <= {*table.folders()}:
            log_message("left_as_it_is", error, level=logging.WARNING)
            return make_plan(table, image_digest, others, rules, only_paths)
        if kept := table.count(folders_clause(error.values["path"])):
            text = "{error} The index keeps its {kept} pictures of this folder; `forget` removes them."
            raise coded_error(ValueError, error.code, text, error=error, kept=kept, **error.values) from error
        raise
    columns = ["path", "size", "mtime_ns", "digest", "model"]
    known = StoredRows(table.rows(columns, clause), image_digest)
    left_out = table.rows([*columns[:3], "reason"], clause, SKIPPED_FILES_TABLE).to_pylist()
    broken = {
        FileState(*list(row.values())[:3])
        for row in left_out
        if SkippedFile.from_row(row).code not in RETRYABLE_REASONS
    }
    todo = [file for file in found if not known.is_done(file)]
    broken &= set(todo)
    there = {file.path for file in found} | {one.path for one in unseen}
    inside, unread = tuple(os.path.join(one, "") for one in folders), tuple(one.path + os.sep for one in unseen)
    missing = (path for path in known.positions if path not in there and path.startswith(inside))
    gone = [path for path in missing if not path.startswith(unread)]  # in such folders it may be there
    if only_paths is not None and any(_is_emptied(table, folder, gone, found) for folder in folders):
        return make_plan(table, image_digest, folders, rules)  # which refuses it
    files = [file for file in todo if file not in broken]
    roots = [*folders.values()]
    unchanged = len(found) - len(todo)
    return IndexPlan(clause, only_paths is None, roots, files, known, gone, unchanged, unseen, broken, counts)


def _is_emptied(table: PictureTable, folder: Path, gone: Sequence[str], found: Sequence[FileState]) -> bool:
    """Whether all rows of a folder would go, as of a disk that was taken away."""
    inside = os.path.join(folder, "")
    number = sum(path.startswith(inside) for path in gone)
    return 0 < number == table.count(folders_clause(folder)) and not any(file.path.startswith(inside) for file in found)


# --- reading, embedding, writing -------------------------------------------------------------------------------------


class IndexWriter:
    """Reads and embeds the files of a plan, a batch at once, and writes their rows in commits."""

    def __init__(
        self,
        table: PictureTable,
        model: "SearchModel",
        plan: IndexPlan,
        batch_size: int,
        progress: ProgressCallback = lambda done, total: None,
    ):
        self.table, self.model, self.plan = table, model, plan
        self.batch_size, self.progress = batch_size, progress
        self.columns, self.image_digest, self.column = table.columns(), model.image_digest, vector_column(model.width)
        self.report, self.done_count, self.reported = IndexReport(unchanged=plan.unchanged), 0, 0
        self.estimate, self.write_s = RateEstimator(), 0.0
        new = sum(plan.stored_rows[file.path] is None for file in plan.files)
        self.tidy_s = table.tidy_seconds(model.width, table.count() + new)
        self.removed_digests = Counter(plan.stored_rows[path][0] for path in plan.removed_paths)  # digests
        self._start_commit()

    def _start_commit(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.vectors_by_digest: dict[str, np.ndarray] = {}
        self.skipped_files: dict[FileState, SkippedFile] = {}
        self.commit_start = time.monotonic()

    def run(self) -> IndexReport:
        """Do it."""
        files = self.plan.files
        read = partial(
            read_picture,
            image_size=self.model.image_size,
            resize_filter=self.model.resize_filter,
            folders=self.plan.roots,
        )
        self.progress(0, len(files))
        try:
            with closing(prefetch_pictures(files, read, self.batch_size)) as batches:
                for batch in batches:
                    self._embed_batch(batch)
                    self._report()
                    if (
                        len(self.rows) + len(self.skipped_files) >= COMMIT_ROWS
                        or time.monotonic() - self.commit_start > COMMIT_INTERVAL_S
                    ):
                        self.commit()
        finally:  # what was embedded is kept, by Ctrl-C, too
            self.commit()
        return self.report

    def _report(self) -> None:
        """Report progress. What is left after the last picture, writing and `tidy`, counts as pictures of its time."""
        self.estimate.update(self.done_count)
        total, after = len(self.plan.files), (self.write_s + self.tidy_s) * (self.estimate.rate or 0)
        reported = int(self.done_count * total / (total + after))
        if reported > self.reported:  # the same number again would say that a model was loaded
            self.reported = reported
            self.progress(reported, total)

    def commit(self) -> None:
        """Write what was collected. A row whose file can't be read goes, but where it only could not be opened."""
        start = time.monotonic()
        if self.rows:
            self.table.upsert(pa.Table.from_pylist(list(self.rows.values()), self.columns))
        if self.skipped_files:
            rows = [asdict(file) | {"reason": one.reason} for file, one in self.skipped_files.items()]
            self.table.upsert(pa.Table.from_pylist(rows, TABLE_SCHEMAS[SKIPPED_FILES_TABLE]), SKIPPED_FILES_TABLE)
            bad = [one.path for one in self.skipped_files.values() if one.code not in RETRYABLE_REASONS]
            self.table.delete_paths(bad)
            self.report.removed += sum(path in self.plan.stored_rows.positions for path in bad)
        self._start_commit()
        self.write_s = time.monotonic() - start

    def _embed_batch(self, batch: Sequence[ReadResult]) -> None:
        """Embed pictures whose content is not known yet, and make the rows of all."""
        pictures = dict[FileState, Picture]()
        for file, picture in batch:
            if isinstance(picture, Picture):
                pictures[file] = picture
            elif not isinstance(picture, BadImage):
                raise picture
            elif picture.reason != "gone":  # else since it was found: the next run sees that
                self.skipped_files[file] = SkippedFile(file.path, picture.reason, picture.detail)
                self.report.skipped_files.append(self.skipped_files[file])
        known = self._load_vectors({one.digest for one in pictures.values()}) | self.vectors_by_digest
        new = {one.digest: one.image for one in pictures.values() if one.digest not in known}
        if new and not self.report.embedded:
            self.model.prepare_images()
            self.estimate.update(self.done_count)
            self.progress(
                self.reported, len(self.plan.files)
            )  # again: the seconds until here are not those of pictures
        known |= dict(zip(new, self.model.embed_images(list(new.values()), self.batch_size), strict=True))
        self.report.embedded += len(new)
        for file, picture in pictures.items():
            self._add_row(file, picture, known[picture.digest])
        self.done_count += len(batch)

    def _load_vectors(self, digests: Collection[str]) -> dict[str, np.ndarray]:
        """Digest -> vector, of contents that have one of this model's in the table."""
        if not digests:
            return {}
        clause = f"{in_clause('digest', digests)} AND model = {quote_sql(self.image_digest)}"
        rows = self.table.rows(["digest", self.column], clause)
        return dict(zip(rows["digest"].to_pylist(), to_array(rows[self.column]), strict=True))

    def _add_row(self, file: FileState, picture: Picture, vector: np.ndarray) -> None:
        """Add the row of a picture, and count what it is."""
        digest, known = picture.digest, self.plan.stored_rows[file.path]
        values = {name: value for name, value in vars(picture).items() if name != "image"}
        values |= {
            COLOR_SIGNATURE_COLUMN: color_signature(picture.image),
            "model": self.image_digest,
            self.column: np.float16(vector),
        }
        self.rows[file.path] = values | asdict(file)  # as it was found: what has changed since is read again
        self.vectors_by_digest[digest] = vector
        if known is None:
            kind = "moved" if self.removed_digests[digest] > 0 else "new"
        else:
            kind = "changed" if known[0] != digest else "unchanged" if known[1] else "again"
        self.removed_digests[digest] -= kind == "moved"
        setattr(self.report, kind, getattr(self.report, kind) + 1)


def start_indexing(
    table: PictureTable,
    model: "SearchModel",
    folders: Mapping[Path, str],
    exclude: Sequence[str] = (),
    include: Sequence[str | Path] = (),
    only_paths: Collection[str] | None = None,
    progress: ProgressCallback | None = None,
) -> IndexPlan:
    """What there is to do, and a table for it.

    Where there is a `progress`, of a run on this machine alone, another model is loaded. Raises ValueError as
    `make_plan`, or of the model or the rules: no table is left, nor one that names it.
    """
    _ = model.image_size  # before anything else, where its image processor does not fit
    rules = load_rules(table).updated(exclude, include)
    plan = make_plan(table, model.image_digest, folders, rules=rules, only_paths=only_paths)
    known = table.model()
    if progress and plan.files and (known is None or known["image_digest"] != model.image_digest):
        progress(0, len(plan.files))  # of a new index the page knows nothing yet
        model.prepare_images()  # says what else does not fit
    table.create(model.width)
    record_requested_folders(table, folders)
    save_rules(table, rules)
    if plan.covers_folders:  # now, so that they are known when this run is interrupted; `finish` knows more
        table.set_metadata({FOLDER_KEY_PREFIX + one: "" for one in plan.ignored_counts.keys() - set(table.folders())})
    record_model(table, model, plan)
    return plan


def record_model(table: PictureTable, model: "SearchModel", plan: IndexPlan) -> None:
    """Say what the model means for pictures that another one has embedded, then write that the index is of it."""
    before, others = table.model(), table.count_other_models(model.image_digest)
    facts = {"source": model.source, "name": model.name, "width": model.width, "image_digest": model.image_digest}
    again = sum(row is not None and not row[1] for row in (plan.stored_rows[file.path] for file in plan.files))
    if others and (again or (before or {}).get("image_digest") != model.image_digest):
        log_message("image_side", model.name, again, others)
    elif before and before != facts and table.count():
        log_message("text_exchanged", model.name, before.get("name"))
    table.set_metadata({"model": json.dumps(facts)})


def finish_indexing(table: PictureTable, model: "SearchModel", plan: IndexPlan, report: IndexReport) -> None:
    """Remove what is gone by a plan, note the folders and what was left out, and tidy up; fill in what was `added`."""
    table.delete_paths(plan.removed_paths)
    report.removed += len(plan.removed_paths) - report.moved
    report.ignored_counts = dict(sum(plan.ignored_counts.values(), Counter()))
    if plan.covers_folders:
        table.set_metadata(
            {
                FOLDER_KEY_PREFIX + one: json.dumps(numbers, sort_keys=True)
                for one, numbers in plan.ignored_counts.items()
            }
        )
    report.skipped_files = _update_skipped_files(table, plan, {one.path for one in report.skipped_files})
    if len(table.widths()) > 1 and not table.count_other_models(model.image_digest):
        columns = [vector_column(width) for width in table.widths() if width != model.width]
        table.run_write(PICTURES_TABLE, lambda opened: opened.drop_columns(columns))
    table.optimize(model.width)


def _update_skipped_files(table: PictureTable, plan: IndexPlan, new_paths: Collection[str]) -> list[SkippedFile]:
    """What was left out of the folders; the table of it is brought up to date."""
    columns = ["path", "size", "mtime_ns", "reason"]
    rows = table.rows(columns, plan.clause, SKIPPED_FILES_TABLE).to_pylist()
    known = {FileState(*list(row.values())[:3]): row for row in rows}
    true = {file.path: row for file, row in known.items() if file.path in new_paths or file in plan.known_bad_files}
    for one in plan.unreadable:  # without size and time, so that they are looked at each time
        path = one.path.encode("utf-8", "replace").decode()  # of a name that is no text
        true[path] = {"path": path, "size": -1, "mtime_ns": -1, "reason": one.reason}
    table.delete_paths([row["path"] for row in rows if row["path"] not in true], SKIPPED_FILES_TABLE)
    if unknown := [row for row in true.values() if row not in rows]:
        table.upsert(pa.Table.from_pylist(unknown, TABLE_SCHEMAS[SKIPPED_FILES_TABLE]), SKIPPED_FILES_TABLE)
    return [SkippedFile.from_row(true[path]) for path in sorted(true)]


def embed_files(model: "SearchModel", files: Sequence[FileState], folder: Path) -> dict[str, np.ndarray]:
    """Path -> vector, of files of a place that can be read; nothing is written."""
    found = {}
    read = partial(
        read_picture, image_size=model.image_size, resize_filter=model.resize_filter, folders=[os.path.realpath(folder)]
    )
    for batch in prefetch_pictures(files, read, BATCH_SIZE):
        pictures = {file.path: one for file, one in batch if isinstance(one, Picture)}
        found |= dict(zip(pictures, model.embed_images([one.image for one in pictures.values()]), strict=True))
    return found


def prefetch_pictures(
    files: Iterable[FileState], read: Callable[[FileState], Picture], batch_size: int
) -> Iterator[list[ReadResult]]:
    """Pictures, or what was wrong with them, in the order of their files, in batches; threads `read` while others work.

    The first batches are smaller, which says how long all take.
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
