"""Many machines fill one index: the tasks of a Slurm cluster or a Ray cluster, each with a share of the files.

    python -m capivara_search.workers --where s3://bucket/fotos --folders ~/Fotos --executor slurm --tasks 100 \\
        --partition gpu --time 04:00:00 --logging_dir ~/logs

Each task embeds the files whose names fall to its share and writes them into the table; a last task removes what is
gone and tidies up. A task that was killed leaves what it has written, and the same command does what is missing.
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
    """What `PictureIndex.add` is told, and where its tasks run.

    Paths, and where links in them lead, must be the same on all machines.
    """

    real_paths: ClassVar[Mapping[Path, str]] = {}  # of `folders`, resolved once, before any task starts

    where: str = flag(..., "Folder or address of the index; one that all machines reach.")
    folders: list[str] = flag([], "Folders of pictures.")
    exclude: list[str] = flag([], "Patterns of what is left out of them from now on.")
    include: list[str] = flag([], "Patterns that no longer hold, and paths that come in.")
    model: str | None = flag(None, "CAPIVARA folder or Hub id; the index's own where none is given.")
    device: str | None = flag(None, "Device of the model; the GPU where there is one.")
    batch_size: int = flag(32, "Pictures that the model sees at once.")

    def __post_init__(self) -> None:
        self.check_executor()
        check_at_least(self, 1, "batch_size")
        if self.executor == "slurm" and self.logging_dir is None:
            raise ValueError("--executor slurm needs --logging_dir, a folder that all machines see.")

    @property
    def log_folder(self) -> Path:
        """Folder of the logs of all tasks."""
        name = blake2b(self.where.encode(), digest_size=8).hexdigest()
        return self.logging_dir or cache_home() / "index_logs" / name


def add_with_workers(arguments: WorkerArguments, real_paths: Mapping[Path, str] | None = None) -> bool:
    """`PictureIndex.add` by many tasks. Returns whether it is done; False: Slurm has taken the jobs.

    Args:
        arguments: of the command.
        real_paths: of its folders, by `PictureIndex.folders_to_add`; None: they are resolved now.

    Raises ValueError: as `add`; some tasks have failed, and are named. ImportError: datatrove is not installed.
    """
    require_packages("Adding pictures by several workers", "captions", "datatrove")
    from capivara_common.executors import PhaseStep, run_phases

    index = PictureIndex.open(arguments.where, arguments.model, arguments.device)
    arguments.real_paths = real_paths or {Path(one): os.path.realpath(one) for one in arguments.folders}
    with index._table.locked():
        start_indexing(index._table, index.model, arguments.real_paths, arguments.exclude, arguments.include)
        arguments.model = index.model.source  # so that all tasks have the same one
        return run_phases(PhaseStep.from_phases(arguments, PHASES, "index"), arguments)


def _load_plan(arguments: WorkerArguments) -> tuple[PictureTable, SearchModel, IndexPlan]:
    index = PictureIndex.open(arguments.where, arguments.model, arguments.device)
    plan = make_plan(index._table, index.model.image_digest, arguments.real_paths)
    return index._table, index.model, plan


def embed_share(arguments: WorkerArguments, rank: int, world_size: int) -> str:
    """Embed the share of a task."""
    table, model, plan = _load_plan(arguments)
    # By its name, so that all ranks agree on whose a file is whatever each of them sees.
    plan.files = [file for file in plan.files if zlib.crc32(file.path.encode()) % world_size == rank]
    added = IndexWriter(table, model, plan, arguments.batch_size).run()
    return f"{added.embedded} pictures embedded"


def finish_index(arguments: WorkerArguments, rank: int, world_size: int) -> str:
    """Remove what is gone, and tidy up; the command has the lock."""
    added = IndexReport()
    finish_indexing(*_load_plan(arguments), added)
    return f"{added.removed} rows removed"


PHASES = {"embed": Phase(run=embed_share, is_parallel=True, uses_model=True), "end": Phase(run=finish_index)}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(WorkerArguments, __doc__, argv)
    index = PictureIndex.open(args.where, args.model, args.device)
    index.repair()
    folders = index.folders_to_add(args.folders, args.exclude, args.include)
    args.folders = [*map(str, folders)]
    done = add_with_workers(args, folders)
    print(
        f"{len(index)} pictures are in the index."
        if done
        else f"Slurm has the jobs; their logs are in {args.log_folder}."
    )


if __name__ == "__main__":
    from capivara_search import workers  # by its name, as other machines find it

    run_command(workers.main, resumable=True)
