r"""Build one index with many tasks, on this machine, a Slurm cluster or a Ray cluster.

    python -m capivara_search.workers --where s3://bucket/fotos --folders ~/Fotos --executor slurm --tasks 100 \
        --partition gpu --time 04:00:00 --logging_dir ~/logs

The tasks share the picture files, embed them in parallel and write their rows to the index. A final task removes the
rows of deleted files and optimizes the tables. If a task is killed, its written rows stay. Run the same command again
to index the remaining files.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import cache_home, require_packages
from capivara_common.tasks import ExecutorArguments, Phase
from capivara_search import indexing
from capivara_search.index import PictureIndex
from capivara_search.models import SearchModel
from capivara_search.table import PictureTable


@dataclass(kw_only=True)
class WorkerArguments(ExecutorArguments):
    """Command-line arguments of `capivara_search.workers`, which builds one index with several tasks in parallel.

    The tasks may run on several machines. Every folder of pictures must have the same path on all of these machines,
    also after symbolic links are resolved.
    """

    # {absolute path of a folder of pictures: its real path}. In a real path, symbolic links are resolved.
    # `add_folders_with_workers` sets this attribute before any task starts, so that all tasks use the same real paths.
    real_paths: ClassVar[Mapping[Path, str]] = {}

    where: str = flag(..., "Folder or object storage address of the index. All machines must be able to reach it.")
    folders: list[str] = flag([], "Folders of pictures. Default: the folders that were added on this machine before.")
    exclude: list[str] = flag([], "Patterns of files and folders to ignore from now on, in the syntax of .gitignore.")
    include: list[str] = flag([], "Exclusions to undo: --exclude patterns, and paths that `capivara forget` removed.")
    model: str | None = flag(None, "Folder or Hub id of the model. Default: the model that the index was built with.")
    device: str | None = flag(None, "Device of the model, for example cuda:1. Default: the GPU if there is one.")
    batch_size: int = flag(32, "Number of pictures per batch of the image encoder.")

    def __post_init__(self) -> None:
        self.check_executor()
        check_at_least(self, 1, "batch_size")
        if self.executor == "slurm" and self.logging_dir is None:
            raise ValueError("--executor slurm requires --logging_dir. Name a folder that all machines can reach.")

    @property
    def log_folder(self) -> Path:
        """Folder for the log files of all tasks: `logging_dir` if it is given, otherwise a folder in the cache."""
        name = blake2b(self.where.encode(), digest_size=8).hexdigest()
        return self.logging_dir or cache_home() / "index_logs" / name


def add_folders_with_workers(arguments: WorkerArguments) -> bool:
    """Update an index from folders as `PictureIndex.add` does, but with several tasks that run in parallel.

    Args:
        arguments: Command-line arguments. Their attributes `real_paths` and `model` are set for the tasks.

    Returns:
        True if all tasks have ended and the index is up to date. False if the tasks were submitted to Slurm and may
        still be waiting or running.

    Raises:
        ValueError: If a folder or a pattern can't be used, or tasks have failed.
        OSError: If the index can't be written.
        ImportError: If datatrove is not installed.
    """
    require_packages("Adding pictures by several workers", "captions", "datatrove")
    from capivara_common.executors import PhaseStep, run_phases

    index = PictureIndex.open(arguments.where, arguments.model, arguments.device)
    index.repair()
    exclude, include = arguments.exclude, arguments.include
    arguments.real_paths = index.folders_to_add(arguments.folders, exclude, include)
    with index._table.locked():
        indexing.prepare_index_update(index._table, index.model, arguments.real_paths, exclude, include)
        arguments.model = index.model.source  # recorded in the arguments, so that all tasks use the same model
        return run_phases(PhaseStep.from_phases(arguments, PHASES, "index"), arguments)


def _open_index_and_plan(arguments: WorkerArguments) -> tuple[PictureTable, SearchModel, indexing.IndexPlan]:
    """Open an index and plan the part of the update that is not done yet.

    Args:
        arguments: Command-line arguments, after `add_folders_with_workers` has set the real paths of the folders.

    Returns:
        Tuple (table of the index, model, plan).
    """
    index = PictureIndex.open(arguments.where, arguments.model, arguments.device)
    plan = indexing.plan_index_update(index._table, index.model.image_digest, arguments.real_paths)
    return index._table, index.model, plan


def _embed_and_store_share_of_pictures(arguments: WorkerArguments, rank: int, world_size: int) -> str:
    """Embed one task's share of the picture files and write their rows to the index.

    Args:
        arguments: Command-line arguments.
        rank: Index of the task, from 0.
        world_size: Number of tasks that share the files.

    Returns:
        A sentence for the log: the number of embedded pictures.
    """
    table, model, plan = _open_index_and_plan(arguments)
    # Each task finds its own list of files, and these lists differ if files were added or embedded in the meantime.
    # Therefore the checksum of a file's path decides which task embeds it. So each file belongs to exactly one task.
    plan.files = [file for file in plan.files if zlib.crc32(file.path.encode()) % world_size == rank]
    report = indexing.IndexWriter(table, model, plan, arguments.batch_size).run()
    return f"{report.embedded} pictures embedded"


def _prune_and_optimize_index(arguments: WorkerArguments, rank: int, world_size: int) -> str:
    """Remove the rows of deleted files from the index, and optimize the tables.

    Only one task runs this function, after all other tasks have ended.

    Args:
        arguments: Command-line arguments.
        rank: Index of the task, always 0.
        world_size: Number of tasks, always 1.

    Returns:
        A sentence for the log: the number of removed rows.
    """
    report = indexing.IndexWriter(*_open_index_and_plan(arguments), arguments.batch_size).finish()
    return f"{report.removed} rows removed"


# The two phases of the command, in order: many tasks embed the pictures, then one task removes the rows of deleted
# files and optimizes the tables.
PHASES = {
    "embed": Phase(run=_embed_and_store_share_of_pictures, is_parallel=True, uses_model=True),
    "end": Phase(run=_prune_and_optimize_index),
}


def main(argv: list[str] | None = None) -> None:
    """Run the command: update an index with several parallel tasks, and print the result.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(WorkerArguments, __doc__, argv)
    if add_folders_with_workers(args):
        print(f"The index has {len(PictureIndex.open(args.where))} pictures.")
    else:
        print(f"The jobs were submitted to Slurm. Their logs are in {args.log_folder}.")


if __name__ == "__main__":
    # This module is imported again under its real name, and the `main` of that import runs. Otherwise its functions
    # would belong to `__main__`, and tasks on other machines could not unpickle them.
    from capivara_search import workers

    run_main_and_report_user_errors(workers.main, resumable=True)
