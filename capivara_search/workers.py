r"""Build one index with many tasks, on this machine, a Slurm cluster or a Ray cluster.

    python -m capivara_search.workers --where s3://bucket/fotos --folders ~/Fotos --executor slurm --tasks 100 \
        --partition gpu --time 04:00:00 --logging_dir ~/logs

Each task embeds its share of the files and writes the rows to the index. A final task removes rows of missing files and
optimizes the tables. If a task is killed, its rows stay, and running the same command again does the rest.
"""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

from capivara_common.cli import check_at_least, flag, parse_arguments, run_command
from capivara_common.environment import cache_home, require_packages
from capivara_common.tasks import ExecutorArguments, Phase
from capivara_search.index import PictureIndex
from capivara_search.indexing import IndexPlan, IndexWriter, finish_indexing, make_plan, start_indexing
from capivara_search.models import SearchModel
from capivara_search.results import IndexReport
from capivara_search.table import PictureTable


@dataclass(kw_only=True)
class WorkerArguments(ExecutorArguments):
    """Flags of the command. All machines must see the same folders under the same paths and real paths."""

    # Path -> real path of `folders`, resolved once, before any task starts.
    real_paths: ClassVar[Mapping[Path, str]] = {}

    where: str = flag(..., "Folder or address of the index. All machines must be able to reach it.")
    folders: list[str] = flag([], "Folders of pictures. Default: the folders that were added on this machine before.")
    exclude: list[str] = flag([], "Patterns of files and folders to ignore from now on, in the syntax of .gitignore.")
    include: list[str] = flag([], "Patterns to stop ignoring, and forgotten paths to index again.")
    model: str | None = flag(None, "Folder or Hub id of the model. Default: the model that the index was built with.")
    device: str | None = flag(None, "Device of the model, for example cuda:1. Default: the GPU if there is one.")
    batch_size: int = flag(32, "Pictures per batch of the model.")

    def __post_init__(self) -> None:
        self.check_executor()
        check_at_least(self, 1, "batch_size")
        if self.executor == "slurm" and self.logging_dir is None:
            raise ValueError("--executor slurm requires --logging_dir. Name a folder that all machines can reach.")

    @property
    def log_folder(self) -> Path:
        """Folder that holds the logs of all tasks."""
        name = blake2b(self.where.encode(), digest_size=8).hexdigest()
        return self.logging_dir or cache_home() / "index_logs" / name


def add_with_workers(arguments: WorkerArguments, real_paths: Mapping[Path, str] | None = None) -> bool:
    """Update an index from folders, as `PictureIndex.add` does, with several tasks.

    Args:
        arguments: Flags of the command.
        real_paths: Absolute path -> real path of its folders, from `PictureIndex.folders_to_add`. None: the real paths
            are resolved now.

    Returns:
        True if the index is up to date. False if jobs were submitted to Slurm and are still to run.

    Raises:
        ValueError: If a folder does not exist, was forgotten or contains no picture, a pattern is invalid, or tasks
            have failed; the message lists the failed tasks.
        OSError: If the index can't be written.
        ImportError: If datatrove is not installed.
    """
    require_packages("Adding pictures by several workers", "captions", "datatrove")
    from capivara_common.executors import PhaseStep, run_phases

    index = PictureIndex.open(arguments.where, arguments.model, arguments.device)
    arguments.real_paths = real_paths or {Path(folder): os.path.realpath(folder) for folder in arguments.folders}
    with index._table.locked():
        start_indexing(index._table, index.model, arguments.real_paths, arguments.exclude, arguments.include)
        arguments.model = index.model.source  # so that all tasks use the same model
        return run_phases(PhaseStep.from_phases(arguments, PHASES, "index"), arguments)


def _load_plan(arguments: WorkerArguments) -> tuple[PictureTable, SearchModel, IndexPlan]:
    """Return the table, the model and the plan of the work that is still to do."""
    index = PictureIndex.open(arguments.where, arguments.model, arguments.device)
    plan = make_plan(index._table, index.model.image_digest, arguments.real_paths)
    return index._table, index.model, plan


def embed_share(arguments: WorkerArguments, rank: int, world_size: int) -> str:
    """Embed the files of one task and write their rows.

    Args:
        arguments: Flags of the command.
        rank: Number of the task, from 0.
        world_size: Number of tasks.

    Returns:
        A summary for the log.
    """
    table, model, plan = _load_plan(arguments)
    # Files are assigned by a checksum of their path, so that tasks agree even if they see different lists of files.
    plan.files = [file for file in plan.files if zlib.crc32(file.path.encode()) % world_size == rank]
    report = IndexWriter(table, model, plan, arguments.batch_size).run()
    return f"{report.embedded} pictures embedded"


def finish_index(arguments: WorkerArguments, rank: int, world_size: int) -> str:
    """Remove rows of missing files and optimize the tables. The command holds the lock of the index.

    Args:
        arguments: Flags of the command.
        rank: Number of the task; there is only one.
        world_size: Number of tasks, 1.

    Returns:
        A summary for the log.
    """
    report = IndexReport()
    finish_indexing(*_load_plan(arguments), report)
    return f"{report.removed} rows removed"


PHASES = {"embed": Phase(run=embed_share, is_parallel=True, uses_model=True), "end": Phase(run=finish_index)}


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = parse_arguments(WorkerArguments, __doc__, argv)
    index = PictureIndex.open(args.where, args.model, args.device)
    index.repair()
    folders = index.folders_to_add(args.folders, args.exclude, args.include)
    args.folders = [*map(str, folders)]
    if add_with_workers(args, folders):
        print(f"The index has {len(index)} pictures.")
    else:
        print(f"The jobs were submitted to Slurm. Their logs are in {args.log_folder}.")


if __name__ == "__main__":
    from capivara_search import workers  # imported by name, because other machines can't unpickle `__main__`

    run_command(workers.main, resumable=True)
