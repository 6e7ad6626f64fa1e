"""Define the base class of all stages. A stage is one step of building a caption dataset, such as the translation.

A stage reads the rows of a dataset, and writes them with new columns to parquet files in an output folder. This folder
is the dataset of the next stage. Several processes, called tasks, share the rows. An interrupted stage can be run
again, also with another number of tasks.

Example:
    StageArguments(dataset="images", output=Path("copy")).write_rows()  # copies the rows; subclasses add columns
"""

import itertools
import json
import logging
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image
from tqdm.auto import tqdm

from capivara_common.cli import check_at_least, flag, parse_arguments
from capivara_common.environment import package_versions, require_packages
from capivara_common.executors import PhaseStep, run_phases
from capivara_common.files import atomic_file, json_digest, read_json, write_json
from capivara_common.image_files import DECODER_THREADS, BadRow, ImageFileArguments, decode_image, read_image_bytes
from capivara_common.tasks import ExecutorArguments, Phase, split_rows
from caption_data.embedded import read_row_embedding
from caption_data.parquet_split import compute_split_content_digest, open_in_place
from caption_data.rows import (
    CAPTION_COLUMN_RE,
    CAPTIONS_FEATURE,
    DATASET_HELP,
    SkippedRow,
    convert_to_caption_list,
    write_skipped_rows,
)
from caption_data.sources import STAGE_FILE, Split, check_stage_is_finished, open_parquet

SPLIT_NAME_PATTERN = r"\w+([.-]\w+)*"  # valid split names; output file names begin with the split name
IMAGE_COLUMN = "image"  # name of the image column in every output, as in the datasets of the CAPIVARA authors
DECODED_KEY = "decoded image"  # key under which a stage finds the decoded image in a row
STAGE_VERSION = 1  # version of the format of output folders; increase it when the format of their files changes
# Keys of the record file `stage.json` whose values must be equal for all parts (parquet files) of an output folder. If
# a new run has other values than the file, its parts would not match the existing parts, so the stage raises an error.
IDENTITY_KEYS = ("version", "source", "rows_per_part", "settings", "columns")
# Keys of the dict "source" in `stage.json` whose values may differ between runs. The values contain the path of the
# source dataset, which may be different on each machine.
IGNORED_SOURCE_KEYS = ("name", "damaged")
# Key of `stage.json` -> type of its value, to detect damaged files.
RECORD_TYPES = {"version": int, "command": str, "source": dict, "rows_per_part": int}
RECORD_TYPES |= {"settings": dict, "columns": dict, "versions": dict}
MAX_ROWS = 10**9  # a dataset must have fewer rows than this, because file names state row numbers with nine digits
ROWS_PER_GROUP = 16  # number of rows in a parquet row group, the smallest unit that a reader of the file decodes
# Largest number of rows that a stage prepares at a time, for example by translating their captions. It limits the
# memory that the results need.
MAX_PREPARED_ROWS = 50_000
Row = dict[str, Any]  # one dataset row: a dict `{column name: value}`
# Function that takes rows, and returns for each row the values of the new columns, or a BadRow with the reason why the
# row must be skipped. The results must not depend on how rows are batched. A row has all columns of the dataset:
# - image column: dict with the keys "bytes" and "path"; missing if the dataset has no images; caption columns: lists;
# - `DECODED_KEY`: the decoded image if the stage has `decodes_images`, or the float32 embedding of an embedded dataset.
ProcessRows = Callable[[list[Row]], list[Row | BadRow]]

S = TypeVar("S", bound=Sized)
logger = logging.getLogger("capivara")


class Backend:
    """Base class of the backends of a stage. A backend is the model or service that does the work of the stage.

    For example, `captions.translate` has a backend that calls Google's service. Stages without a choice of backends use
    this base class itself. Its checks always pass, and its estimate is empty.

    Attributes:
        flags: Dataclass with the flags of the backend, which become flags of the stage.
    """

    flags: ClassVar[type]

    @classmethod
    def check_flags(cls, args: Any) -> None:
        """Check the flags of the backend, without network access and without loading a model.

        Args:
            args: Flags of the stage.

        Raises:
            ValueError: If a flag is invalid.
            ImportError: If a package is missing.
        """

    @classmethod
    def check(cls, args: Any) -> None:
        """Check that the backend can be used, for example that its server can be reached.

        `captions.build` calls this method before the first stage (step) runs, so that problems do not appear hours
        later.

        Args:
            args: Flags of the stage.

        Raises:
            ValueError, OSError: If the backend can't be used.
        """

    @classmethod
    def describe_work(cls, args: Any, stage: "RowStage") -> list[str]:
        """Estimate how many requests and tokens the stage will send to a server. A dry run prints this estimate.

        Args:
            args: Flags of the stage.
            stage: Access to the rows, which are read for the estimate.

        Returns:
            Lines of text to print. The list is empty if the backend uses no server.
        """
        return []

    @classmethod
    def load(cls, args: Any, stage: "RowStage") -> Self:
        """Load the backend, for example its model, or connect to its server.

        The default implementation calls the class with the flags.

        Args:
            args: Flags of the stage.
            stage: Access to the rows that will be processed.

        Returns:
            The backend, ready to process the rows.

        Raises:
            ValueError, OSError, ImportError: If the backend can't be used.
        """
        return cls(args)


@dataclass
class StageArguments(ImageFileArguments, ExecutorArguments):
    """Flags of a stage, and the methods that run it. A stage reads dataset rows and writes them with new columns.

    This base class copies the rows without new columns. Subclasses add columns, for example translated captions.

    Raises ValueError if the value of a flag is invalid.
    """

    backend_type = Backend  # class of the model or service that does the work; some stages let users choose it
    uses_model = False  # True if the stage runs a model; its tasks then get GPUs
    decodes_images = False  # True if the stage needs the decoded image of each row, under the key `DECODED_KEY`
    # True if the stage can also work on a dataset that contains embeddings instead of images. A stage with
    # `decodes_images` then gets the embedding of each row in place of the decoded image.
    accepts_embeds = True
    keeps_images = True  # False if the output has no images
    import_file = None  # path of a table that people fill with translations; only `captions.translate` has such a flag
    dataset: str = flag(..., f"{DATASET_HELP} Can be the output folder of another stage.")
    output: Path = flag(..., "Output folder. To finish an interrupted run, run the same command again.")
    split: str = flag("train", "Name of the dataset split to read. Output files are named after it.")
    image_column: str = flag("image", "Name of the image column.")
    rename: list[str] = flag([], "Columns to rename, as OLD=NEW, for example caption=captions-en.")
    batch_rows: int = flag(16, "Rows to process at the same time.")
    rows_per_part: int = flag(500, "Rows per output file. An interrupted task loses at most its unfinished file.")
    dry_run: bool = flag(False, "Check the flags, the data and the server, print what would be done, and exit.")

    def __post_init__(self) -> None:
        self.dataset, self.output = self.dataset.rstrip("/") or self.dataset, Path(self.output)
        check_at_least(self, 1, "batch_rows", "rows_per_part")
        if not re.fullmatch(SPLIT_NAME_PATTERN, self.split):
            raise ValueError(
                "split may have letters, digits and underscores, with single dots or dashes between them, got "
                f"{self.split!r}."
            )
        folder, output = Path(self.dataset).resolve(), self.output.resolve()
        # Refuse an output folder that is the dataset folder or lies directly in it. The stage would read its own output
        # as if it were part of the dataset.
        if Path(self.dataset).exists() and folder in (output, output.parent):
            raise ValueError(
                f"The output folder {self.output} must not be the dataset folder or lie in it. Choose another --output."
            )
        self.column_renames()
        self.check_image_files()
        self.check_executor()

    def column_renames(self) -> dict[str, str]:
        """Return the flag `rename` as a dict `{old name: new name}`. Raises ValueError if the flag is invalid."""
        pairs = [pair.split("=") for pair in self.rename]
        names = dict(pair for pair in pairs if len(pair) == 2 and all(pair))
        if len(names) < len(pairs) or len(set(names.values())) < len(names) or self.image_column in names:
            raise ValueError(
                f"rename must be OLD=NEW pairs such as caption=captions-en, with different names and without the image "
                f"column, got {self.rename}."
            )
        return names

    def required_columns(self) -> list[str]:
        """Return the names of the possible input columns of the stage. The dataset needs at least one of them.

        The names are those after the renaming with the flag `rename`. If the list is empty, the stage needs no input
        column.
        """
        return []

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Check that the dataset has an input column for the stage, and return the names of the new columns.

        Args:
            columns: Names of the columns of the dataset, after the renaming with the flag `rename`.
            where: Name of the dataset, for the error message.

        Returns:
            The names of the columns that the stage adds to the dataset.

        Raises:
            ValueError: If the dataset has none of the columns that `required_columns` returns.
        """
        needed = self.required_columns()
        if needed and set(columns).isdisjoint(needed):
            raise ValueError(
                f"{where} has no column {' or '.join(needed)}; its columns are {list(columns)}. If the column has "
                f"another name, rename it with --rename OLD={needed[0]}."
            )
        return []

    def known_settings(self) -> dict[str, Any]:
        """Return the settings of the stage that are known without loading a model, as a dict `{"name": value}`.

        They are compared with the recorded settings of existing output, to detect that the output is complete and up to
        date.
        """
        return {}

    def source(self) -> Split:
        """Open the dataset split from which the stage reads its rows.

        Raises ValueError if the split does not exist or is damaged.
        """
        return open_in_place(self.dataset, self.split, self.image_column, **self.image_options())

    def pending_manual_step(self) -> str:
        """Describe what a person must do before the stage can run, such as filling a translation table.

        A translation table is a TSV file of captions that people translate. Returns "" if there is nothing to do.
        """
        return ""

    def is_corrected(self) -> bool:
        """Return True if a person edited the translation table after the stage had written its output from the table.

        A translation table is a TSV file of captions that people translate. After such an edit, the output contains old
        translations. The base class uses no translation table and returns False.
        """
        return False

    def corrections(self) -> "Corrections | None":
        """Find the output rows and files that are outdated because a person corrected the translation table.

        A translation table is a TSV file of captions that people translate. Returns None if the table was not
        corrected. The base class uses no translation table and always returns None.
        """
        return None

    def prepare_processing(self, stage: "RowStage") -> tuple[Any, ...]:
        """Load everything that the stage needs to process rows, for example a model.

        Args:
            stage: Access to the rows that will be processed.

        Returns:
            The arguments of the method `RowStage.run`, as a tuple of three to five elements.

            - `columns`: dict `{new column: feature}`, where a feature is a column type of `datasets`.
            - `settings`: dict of everything that affects the new columns.
            - `process`: function that returns the new columns of a list of rows.
            - `prepare` (optional): function that is called before a group of output files is written.
            - `prepared_rows` (optional): largest number of rows per call of `prepare`, but at least one output file.
        """
        return {}, {}, lambda rows: [{} for _ in rows]

    def write_rows(self, rank: int = 0, world_size: int = 1) -> "StageReport":
        """Write one task's share of the output files of this stage. Existing files are kept.

        A stage is a step of the caption pipeline, such as translation. Its tasks are processes that share the rows.

        Args:
            rank: Index of the task, counted from 0.
            world_size: Number of tasks.

        Returns:
            The numbers of written and skipped rows of the task.

        Raises:
            ValueError: If the dataset can't be used, or the output folder was written by another stage or with other
                settings.
        """
        # Open the data before the model is loaded, so that errors in the data appear at once.
        stage = RowStage(self, rank, world_size)
        return stage.report() if stage.is_done else stage.run(*self.prepare_processing(stage))

    def command(self) -> str:
        """Return the shell command that runs the stage. Error messages show it, so that users can repeat it.

        The command omits flags that have their default value. It also omits the flags that choose where tasks run
        (`ExecutorArguments`).
        """
        words, executor_flags = ["python", "-m", type(self).__module__], vars(ExecutorArguments())
        for argument in fields(self):
            value = getattr(self, argument.name)
            default = argument.default_factory() if argument.default_factory is not MISSING else argument.default
            if argument.name in executor_flags or value == default or value is None or value is False:
                continue
            values = value if isinstance(value, list) else [value]
            words += [f"--{argument.name}", *([] if value is True else map(str, values))]
        return shlex.join(words)

    @property
    def phases(self) -> dict[str, Phase]:
        """The phases in which the stage runs, in order, as a dict `{name: phase}`.

        In the phase "rows", several tasks share the rows of the dataset, and each writes its share of the output. If
        the class has a method `report`, the phase "report" follows, in which a single task summarizes the output.
        """
        rows = Phase(StageArguments.write_rows, is_parallel=True, uses_model=self.uses_model)
        return {"rows": rows} | ({"report": Phase(type(self).report)} if hasattr(self, "report") else {})

    @property
    def stage_name(self) -> str:
        """Name of the stage, for example "translate"."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def title(self) -> str:
        """Name of the stage and the split for messages, for example "2-translate, train"."""
        return f"{self.output.parent.name}, {self.split}"


@dataclass
class EncoderStageArguments(StageArguments):
    """Flags of a stage that embeds images with an image-text model that has two encoders, such as CLIP.

    Raises ValueError if a flag is missing or invalid. Raises ImportError if an open_clip model is chosen, but the
    package open_clip is not installed.
    """

    uses_model = decodes_images = True
    model: str | None = flag(
        None,
        "Model that embeds images (required): folder or Hub id of a CAPIVARA, SigLIP or CLIP model; or an open_clip "
        "model, as open_clip:NAME:PRETRAINED or open_clip:local-dir:FOLDER.",
    )
    embedding_batch_size: int = flag(
        32, "Images to embed at the same time. Captions are embedded in batches of twice this size."
    )
    precision: Literal["float32", "bf16", "auto"] = flag(
        "float32",
        "Data type of activations. bf16 is faster on most GPUs; auto: bf16 if a measurement shows that it is faster.",
    )
    device: str | None = flag(None, "cpu or cuda. Default: cuda if a GPU is available, otherwise cpu.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("--model is missing. Choose the model, for example the base model of the training.")
        check_at_least(self, 1, "embedding_batch_size")
        if self.model.startswith("open_clip:"):
            require_packages(f"The stage {self.stage_name}", "open-clip", "open_clip")

    def check_model(self) -> None:
        """Check that the model exists, without loading it. Raises ValueError if it does not exist.

        The dry run of a single stage and the command `captions.embed` call this method. `captions.build --dry_run` does
        not call it, so that users can check their data before they have converted the model from open_clip.
        """
        # This import loads torch, which is slow and which other stages do not need.
        from modeling_capivara.two_towers import check_model_exists

        check_model_exists(self.model)


def _check_and_get_copied_column_types(source: Split, args: StageArguments) -> Features:
    """Return the columns that a stage copies from its source to its output.

    Columns with an Arrow extension type are not copied.

    Args:
        source: The dataset split to read.
        args: Flags of the stage; `rename` and `image_column` are applied.

    Returns:
        A dict `{column name in the output: feature}`, where a feature is a column type of `datasets`.

    Raises:
        ValueError: If the source has no image column, or none of the columns in `args.required_columns()`. If it has
            embeddings and the stage needs images. If two columns would get the same name in the output.
    """
    names = args.column_renames() | ({} if source.is_embedded else {args.image_column: IMAGE_COLUMN})
    source.check_columns([*names, source.image_column])
    if source.is_embedded and not args.accepts_embeds:
        raise ValueError(
            f"{source.display_name} has embeddings instead of images, but this stage needs images. Use the dataset "
            "from which the embeddings were made."
        )
    features = Features()
    for old, feature in source.features.items():
        new = names.get(old, old)
        if new in features or (new != old and new in source.columns and new not in names):
            raise ValueError(
                f"{source.display_name}: two columns would be named {new!r}. Rename one of them with --rename OLD=NEW."
            )
        if CAPTION_COLUMN_RE.fullmatch(new):
            features[new] = CAPTIONS_FEATURE
        elif "extension<" not in str(Features({new: feature}).arrow_schema.field(new).type):
            features[new] = feature
    args.check_columns(features, source.display_name)
    if source.is_embedded:
        return features
    if not args.keeps_images:
        return Features({name: feature for name, feature in features.items() if name != IMAGE_COLUMN})
    return Features(features | {IMAGE_COLUMN: Image()})


# The functions and classes below write the output of a stage. A part gets its final name only when it is complete, so
# the file names show which rows are done. The next stage reads the files in place, without a copy in a cache.


@dataclass(frozen=True)
class StageReport:
    """How many rows a stage, or one task of a stage, has written and skipped.

    Attributes:
        rows: Number of written rows.
        skipped: Dict `{reason: number of skipped rows}`, the most frequent reason first.
    """

    rows: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        return f"{self.rows:,} rows written, {sum(self.skipped.values()):,} skipped{self.skip_reasons}"

    @property
    def skip_reasons(self) -> str:
        """Ending for a message that counts the skipped rows by reason, such as " (3 no caption)".

        It is "" if no row was skipped.
        """
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.skipped.items())
        return f" ({reasons})" if reasons else ""


class RowStage:
    """One task of a stage: a process that reads its share of the dataset rows, processes them, and writes them.

    The output is written in parts. A part is a parquet file with consecutive rows.

    Args:
        args: Flags of the stage.
        rank: Index of the task, counted from 0.
        world_size: Number of tasks that share the rows.

    Attributes:
        source: The dataset split that the stage reads.
        features: Columns that are copied to the output, as a dict `{column name: column type}`.
        record: Content of the file `stage.json` that is known before a model is loaded.
        parts: Ranges of row indices, one for each part of this task.
        path: Function that maps the row range of a part to the path of its file.
        bar: Progress bar, only while `run` is running.

    Raises:
        ValueError: If the dataset does not exist, is incomplete, or lacks required columns.
    """

    def __init__(self, args: StageArguments, rank: int = 0, world_size: int = 1):
        self.args, self.source, self.rank = args, args.source(), rank
        for damage in self.source.damaged_archives:
            logger.warning("Damaged archive; only the rows before the damage are read: %s", damage.detail)
        # Read the first row now: if its file is damaged, the error appears before a model is loaded or a paid service
        # is called.
        next(self.source.rows(), None)
        self.features = _check_and_get_copied_column_types(self.source, args)
        # Content of `stage.json`, without the keys that are only known after a model is loaded.
        self.record = {
            "version": STAGE_VERSION,
            "command": args.command(),
            "source": {
                "name": self.source.name,
                "split": self.source.split,
                "rows": len(self.source),
                "fingerprint": compute_split_content_digest(self.source),
                "damaged": [damage.detail for damage in self.source.damaged_archives],
            },
            "rows_per_part": args.rows_per_part,
        }
        self.path = partial(_part_path, args.output, self.source.split)  # function: row range of a part -> its path
        # Each task gets consecutive parts, so that it reads the files of the source one after the other.
        parts = split_rows(len(self.source), args.rows_per_part)
        self.parts = parts[len(parts) * rank // world_size : len(parts) * (rank + 1) // world_size]

    @property
    def is_done(self) -> bool:
        """True if the task has nothing left to do: all its output files exist, written with the current settings.

        Only the existence of the files is checked, not their content. If the flags, settings or source dataset differ
        from those in `stage.json`, the value is False.
        """
        if not (self.args.output / STAGE_FILE).is_file():
            return False
        recorded = read_stage_record(self.args.output)
        current = self.record | {"settings": recorded["settings"] | self.args.known_settings()}
        # Compare the flags of the two commands as sets, because earlier versions recorded them in another order.
        for record in (recorded, current):
            record["command"] = set(record["command"].split(" --"))
        return all(recorded[key] == current[key] for key in current) and not self.missing_parts()

    def missing_parts(self) -> list[range]:
        """Return the row ranges of the parts of this task whose parquet file does not exist yet."""
        return [part for part in self.parts if not self.path(part).is_file()]

    def run(
        self,
        columns: dict[str, Any],
        settings: dict[str, Any],
        process: ProcessRows,
        prepare: Callable[[list[range]], None] = lambda parts: None,
        prepared_rows: int = MAX_PREPARED_ROWS,
    ) -> StageReport:
        """Process the rows of this task, and write the parts (output files of consecutive rows) that do not exist.

        Args:
            columns: Dict `{new column: feature}`, where a feature is a column type of `datasets`. A new column replaces
                an existing column of the same name.
            settings: All settings that affect the new columns, as JSON values. They must be equal for all parts of a
                folder.
            process: Function that takes at most `args.batch_rows` rows. For each row, it returns a dict
                `{new column: value}`, or a BadRow with a reason if the row must be skipped. The results must not depend
                on how rows are batched. `ProcessRows` describes the rows.
            prepare: Function that is called before a group of parts is written, with the list of their row ranges.
            prepared_rows: Largest number of rows in such a group. A group has at least one part.

        Returns:
            The numbers of written and skipped rows of the task.

        Raises:
            ValueError: If the folder was written with other settings or from another source.
            OSError: If the disk is full. A new run writes only the missing parts.
        """
        features = Features(self.features | columns)
        added = {
            "settings": settings | self.args.image_settings(),
            "columns": {name: repr(feature) for name, feature in features.items()},
            "versions": package_versions(),
        }
        write_or_check_stage_record(self.args.output, self.record | added)
        missing = self.missing_parts()
        total, left = sum(map(len, self.parts)), sum(map(len, missing))
        title = self.args.stage_name.capitalize()
        with tqdm(total=total, initial=total - left, desc=title, unit="row", disable=self.rank > 0) as self.bar:
            for group in iter_length_limited_batches(missing, prepared_rows):
                prepare(group)
                for part in group:
                    try:
                        self._write_part(part, features.arrow_schema, process)
                    except Exception as error:
                        error.add_note(f"It happened in rows {part.start} to {part.stop - 1} of {self.source.split}.")
                        raise
        return self.report()

    def report(self) -> StageReport:
        """Count the written and skipped rows of the task, and delete temporary files that killed runs have left.

        A temporary file is deleted only if its finished parquet file exists. All other temporary files may belong to
        running tasks.
        """
        # The name of a temporary file is "." + name of the finished file + "." + random text + ".tmp".
        for path in self.args.output.glob(".*.parquet.*.tmp"):
            if path.with_name(re.sub(r"\.[^.]+\.tmp$", "", path.name[1:])).is_file():
                path.unlink(missing_ok=True)
        return _count_written_and_skipped_rows(self.args.output, self.record, self.parts)

    def _write_part(self, part: range, schema: pa.Schema, process: ProcessRows) -> None:
        """Write the parquet file of one part, and the list of its skipped rows if any row was skipped.

        Args:
            part: Row range of the part.
            schema: Columns of the parquet file.
            process: Function that returns the new columns of a batch of rows.
        """
        path, skipped = self.path(part), []
        try:
            with atomic_parquet(path, schema) as parquet:
                rows = self._process_rows(process, part, skipped)
                while row_group := list(itertools.islice(rows, ROWS_PER_GROUP)):
                    for row in row_group:
                        row[IMAGE_COLUMN] = row.get(self.args.image_column)
                    parquet.write_table(pa.Table.from_pylist(row_group, schema=schema))
                write_skipped_rows(_skipped_path(path), skipped)
                if not skipped:
                    # An earlier run that was killed may have left a list of skipped rows, which is now wrong.
                    _skipped_path(path).unlink(missing_ok=True)
        except FileNotFoundError:
            # The temporary file is gone. This is no error if the output file exists: another process has then written
            # it, and has deleted all temporary files that belong to it, including the file of this process.
            if not path.is_file():
                raise

    def _process_rows(self, process: ProcessRows, part: range, skipped: list[SkippedRow]) -> Iterator[Row]:
        """Iterate over the rows of a part with their new columns, without rows that can't be used.

        Args:
            process: Function that returns the new columns of a batch of rows.
            part: Row range of the part.
            skipped: List to which the function appends a record for each row that can't be used.
        """
        source = self.source
        rows = itertools.islice(source.rows(part.start), len(part))
        numbered = zip(part, rows, strict=True)  # `strict=True` raises an error if the source has lost rows
        while batch := list(itertools.islice(numbered, self.args.batch_rows)):
            # End the threads that decode images before the model computes: the end of the `with` block does this.
            # Otherwise, the decoding threads would slow down the threads of the model.
            with ThreadPoolExecutor(DECODER_THREADS) as threads:
                results = list(threads.map(self._prepare_row, (row for _, row in batch)))
            valid_rows = [row for row in results if not isinstance(row, BadRow)]
            processed = iter(process([dict(row) for row in valid_rows]) if valid_rows else [])
            for (number, _), row in zip(batch, results, strict=True):
                result = row if isinstance(row, BadRow) else next(processed)
                if isinstance(result, BadRow):
                    skipped.append(SkippedRow(source.name, source.split, number, result.reason, result.detail))
                else:
                    yield row | result
            self.bar.update(len(batch))

    def _prepare_row(self, row: Row) -> Row | BadRow:
        """Convert a row of the source to the form that the argument `process` of the method `run` takes.

        The columns are renamed, the image file is read (and decoded if the stage needs this), and captions become lists
        of texts. Returns a BadRow if the image or the captions are invalid.
        """
        names, column = self.args.column_renames(), self.args.image_column
        row = {names.get(old, old): value for old, value in row.items()}
        try:
            if self.source.is_embedded:
                row[DECODED_KEY] = read_row_embedding(row)
            else:
                data = read_image_bytes(row.get(column), self.source.image_access)
                row[column] = {"bytes": data, "path": Path(row[column].get("path") or "").name or None}
                if self.args.decodes_images:
                    row[DECODED_KEY] = decode_image(row[column], self.source.image_access)
            caption_columns = filter(CAPTION_COLUMN_RE.fullmatch, row)
            return row | {name: convert_to_caption_list(row[name], name) for name in caption_columns}
        except BadRow as bad:
            return bad


@contextmanager
def atomic_parquet(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Open a parquet file for writing, as a context manager that writes the file completely or not at all.

    If the `with` block raises an error, nothing is written to `path`.

    Args:
        path: Parquet file to write.
        schema: Names and types of the columns.

    Yields:
        The writer, to which the block passes the rows.

    Raises:
        OSError: If the disk is full.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        # Turn off parquet dictionaries and statistics: for image bytes, they cost time and have no benefit.
        with pq.ParquetWriter(file, schema, use_dictionary=False, write_statistics=False) as parquet:
            yield parquet
        file.flush()
        os.fsync(file.fileno())


def iter_length_limited_batches(items: Iterable[S], max_length: int, max_items: int = sys.maxsize) -> Iterator[list[S]]:
    """Group items into batches whose total length and number of items are limited. The order does not change.

    Args:
        items: Items with a length, for example texts or ranges.
        max_length: Largest sum of lengths in a batch. A longer item becomes a batch by itself.
        max_items: Largest number of items in a batch.

    Yields:
        The batches, as non-empty lists of items.
    """
    group: list[S] = []
    length = 0
    for item in items:
        if group and (len(group) == max_items or length + len(item) > max_length):
            yield group
            group, length = [], 0
        group.append(item)
        length += len(item)
    if group:
        yield group


# The functions and classes below read and check the output folder of a stage.


def _part_path(output: Path, split: str, part: range) -> Path:
    """Return the path of the parquet file of a part.

    Args:
        output: Output folder of the stage.
        split: Name of the split.
        part: Row range of the part.
    """
    return output / f"{split}-{part.start:09d}-{part.stop:09d}.parquet"


def _skipped_path(path: Path) -> Path:
    """Return the path of the list of skipped rows for the parquet file `path` of a part.

    The list exists only if rows of the part were skipped.
    """
    return path.with_suffix(".skipped.jsonl")


def read_stage_record(output: Path | str) -> dict[str, Any]:
    """Read `stage.json`, the file in the output folder of a stage that records its source dataset and its settings.

    A stage is one step of building a caption dataset, such as the translation.
    Raises ValueError if the file is missing or damaged.
    """
    path = Path(output) / STAGE_FILE
    if not path.is_file():
        raise ValueError(
            f"{output} is not the output folder of a stage, such as captions.translate: it has no {STAGE_FILE}."
        )
    try:
        record = read_json(path, **RECORD_TYPES)
        rows, split, size = record["source"].get("rows"), record["source"].get("split"), record["rows_per_part"]
        is_valid = type(rows) is int and 0 <= rows < MAX_ROWS and size >= 1
        if not is_valid or not re.fullmatch(SPLIT_NAME_PATTERN, str(split)):
            raise ValueError(f"{path} has invalid values: {rows!r} rows of split {split!r}, {size} rows per part")
    except ValueError as error:
        raise ValueError(f"{error}. Restore the file, or remove {output} and run its stage again.") from error
    return record


def write_or_check_stage_record(output: Path, record: dict[str, Any]) -> None:
    """Make sure that all files of an output folder are written with the same settings.

    A new folder gets the file `stage.json` with the settings. In an existing folder, this file is compared with them.

    Args:
        output: Output folder of the stage.
        record: Content of `stage.json` for the current run.

    Raises:
        ValueError: If the folder was made with other settings, or holds parquet files that no stage wrote.
    """
    path = output / STAGE_FILE
    if not path.is_file():
        if output.exists() and not output.is_dir():
            raise ValueError(f"The output folder {output} is a file. Choose another --output.")
        if any(output.glob("*.parquet")):
            raise ValueError(
                f"{output} holds parquet files but no {STAGE_FILE}: no stage wrote them. Choose another --output."
            )
        # Several tasks may write this file at the same time. If another task wrote other settings, the comparison below
        # raises an error.
        write_json(path, record)
    recorded = read_stage_record(output)
    # If rows of the source were corrected, `delete_parts_of_changed_rows_and_fingerprint` has set the fingerprint (hash
    # of the source data) to None. The new fingerprint is then accepted without an error.
    is_invalidated = recorded["source"].get("fingerprint") is None
    if is_invalidated:
        recorded["source"]["fingerprint"] = record["source"]["fingerprint"]
    if differences := describe_record_differences(recorded, record):
        raise ValueError(
            f"{output} was made from {recorded['source'].get('name')} with other settings, and all files of a folder "
            f"must have the same settings. {differences}. Use the old values, choose another --output, or remove this "
            "folder and everything that was made from it."
        )
    if is_invalidated:
        write_json(path, recorded)


def describe_record_differences(recorded: dict[str, Any], current: dict[str, Any]) -> str:
    """Describe how two versions of the file `stage.json` differ, for an error message.

    Values that may change between runs are ignored.

    Args:
        recorded: Content of `stage.json` in the existing folder.
        current: Content of `stage.json` for the current run.

    Returns:
        The differing values, for example "settings.model: 'a' there, 'b' now". "" if there are none.
    """
    old = flatten_dict(_get_fixed_stage_record_values(recorded))
    new = flatten_dict(_get_fixed_stage_record_values(json.loads(json.dumps(current))))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names)


@dataclass(frozen=True)
class Corrections:
    """Rows and files of a translation stage that are outdated because a person corrected the translation table.

    Attributes:
        output: Output folder of the stage.
        record: New content of `stage.json`, with the digest of the corrected table.
        parts: Parquet files of the stage with at least one changed row.
        rows: Indices of the changed rows in the output of the stage, counted from 0.
    """

    output: Path
    record: dict[str, Any]
    parts: list[Path]
    rows: list[int]

    def apply(self) -> None:
        """Delete the outdated parquet files, so that the next run writes them again, and update `stage.json`."""
        # Keep the lists of skipped rows, because corrections do not change which rows are skipped.
        for path in self.parts:
            path.unlink(missing_ok=True)
        # Write stage.json last. If this method is interrupted before, stage.json still has the digest of the old table,
        # so that the next run finds the same corrections again.
        write_json(self.output / STAGE_FILE, self.record)


def delete_parts_of_changed_rows_and_fingerprint(output: Path, rows: Iterable[int]) -> None:
    """Delete the output files that are outdated because rows of the source changed. The next run writes them again.

    The fingerprint (hash) of the source in `stage.json` becomes None, so that the next run accepts the changed source.

    Args:
        output: Output folder of the stage.
        rows: Indices of the changed rows in the source, counted from 0.
    """
    record = read_stage_record(output)
    write_json(output / STAGE_FILE, record | {"source": record["source"] | {"fingerprint": None}})
    size, total = record["rows_per_part"], record["source"]["rows"]
    for start in sorted({row // size * size for row in rows}):
        part = range(start, min(start + size, total))
        _part_path(output, record["source"]["split"], part).unlink(missing_ok=True)


def identity_digest(record: dict[str, Any]) -> str:
    """Compute a hex digest of everything that determines the output of a stage, to detect that the output has changed.

    `record` is the content of the file `stage.json`. The digest covers its values that affect the output, such as the
    settings. Other values, such as the path of the source, are not included.
    """
    return json_digest(_get_fixed_stage_record_values(record), sort_keys=True)


def _get_fixed_stage_record_values(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a stage record (content of `stage.json`) that must be equal for all files of a folder."""
    source = {key: value for key, value in record["source"].items() if key not in IGNORED_SOURCE_KEYS}
    return {key: record.get(key) for key in IDENTITY_KEYS} | {"source": source}


def flatten_dict(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one dict with dotted keys, for example `{"a": {"b": 1}}` to `{"a.b": 1}`.

    Args:
        data: The nested dict.
        prefix: Text that is put before each key.

    Returns:
        A dict `{keys joined with dots: value}` with all values that are not dicts.
    """
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def check_stage_and_count_rows(output: Path | str) -> StageReport:
    """Check that the output folder of a stage is complete, and count its written and skipped rows.

    A stage is one step of building a caption dataset, such as the translation.

    Raises ValueError if parquet files are missing or damaged. The message contains the command that writes the missing
    rows.
    """
    output, record = Path(output), read_stage_record(output)
    check_stage_is_finished(output)
    parts = split_rows(record["source"]["rows"], record["rows_per_part"])
    return _count_written_and_skipped_rows(output, record, parts)


def _count_written_and_skipped_rows(output: Path, record: dict[str, Any], parts: Iterable[range]) -> StageReport:
    """Count the written and skipped rows of parts (parquet files) of a stage.

    Args:
        output: Output folder of the stage.
        record: Content of `stage.json`.
        parts: Row ranges of the parts.

    Raises:
        ValueError: If a part is damaged, or its written and skipped rows do not add up to the length of its range.
    """
    rows, skipped, retry = 0, Counter(), f"and run again: {record['command']}"
    for part in parts:
        path = _part_path(output, record["source"]["split"], part)
        with open_parquet(path, f". Remove it, {retry}") as file:
            written = file.metadata.num_rows
        reasons = Counter(reason for _, reason in read_skipped_rows(path))
        if written + sum(reasons.values()) != len(part):
            raise ValueError(
                f"{path} has {written} rows, and its list of skipped rows has {sum(reasons.values())}; together, they "
                f"must have {len(part)} rows. Remove both files, {retry}"
            )
        rows, skipped = rows + written, skipped + reasons
    return StageReport(rows, dict(skipped.most_common()))


def read_skipped_rows(part: Path) -> list[tuple[int, str]]:
    """Read which rows a stage has skipped for one parquet file of its output, and why.

    Args:
        part: The parquet file.

    Returns:
        A list with a tuple (row index in the split, reason) for each skipped row.

    Raises:
        ValueError: If the list of skipped rows is damaged.
    """
    path = _skipped_path(part)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [(int(line["row"]), str(line["reason"])) for line in map(json.loads, lines)]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove it and its parquet file, and run the stage again."
        ) from error


# The functions below run a stage as a command.


def run_stage_command(
    arguments_type: type[StageArguments], description: str, argv: list[str] | None
) -> StageArguments | None:
    """Run a stage as a command: parse its flags, run it, and print the numbers of written and skipped rows.

    Args:
        arguments_type: Class of the stage's flags.
        description: Text of `--help`.
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Returns:
        The parsed flags if the stage is complete. None after a dry run, if a person must first fill a translation
        table, or if the jobs were submitted to Slurm.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    args = parse_arguments(arguments_type, description, argv)
    if args.dry_run:
        stage = RowStage(args)
        missing = sum(map(len, stage.missing_parts()))
        args.backend_type.check(args)
        if isinstance(args, EncoderStageArguments):
            args.check_model()
        work = args.backend_type.describe_work(args, stage)
        print("\n".join([f"{args.output}: {missing:,} rows are missing", *work]))
        return None
    if args.pending_manual_step():
        logger.info(
            f"Manual step: {args.request_manual_step()} Fill the last column of the table, then run the same command "
            "again."
        )
        return None
    if corrections := args.corrections():
        count = len(corrections.rows)
        logger.info(f"The table {args.import_file} was corrected; {count:,} rows are now written again.")
        corrections.apply()
    if not run_phases(PhaseStep.from_phases(args, args.phases, args.stage_name), args):
        return None
    print(f"{args.output}: {check_stage_and_count_rows(args.output)}")
    return args
