"""Many workers fill one index: processes of this machine, job arrays of Slurm, or a Ray cluster.

    arguments = WorkerArguments(where="s3://bucket/fotos", folders=["/data/fotos"], executor="local", workers=4)
    added = add_with_workers(arguments)

Each task embeds the files whose names fall to its share and writes them into the table; a last task removes what is
gone and tidies up. A task that was killed leaves what it has written, and the same command does what is missing.
"""

import time
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

from capivara_common.cli import at_least, flag
from capivara_common.environment import cache_home, require
from capivara_common.files import read_json, write_json
from capivara_common.tasks import ExecutorArguments, Phase
from capivara_search.adding import Adding, finish, note_model
from capivara_search.index_plan import Plan, is_of_share, make_plan, note_asked
from capivara_search.models import SearchModel, find_model
from capivara_search.picture_files import absolute_folder
from capivara_search.results import Added, LeftOut
from capivara_search.table import PictureTable

COUNTS = ("embedded", "new", "changed", "moved", "unchanged")
COUNTS_FOLDER = "added"  # in that of the logs


@dataclass(kw_only=True)
class WorkerArguments(ExecutorArguments):
    """What `PictureIndex.add` is told, and where its tasks run. Paths must be the same on all machines."""

    where: str = flag(..., "Folder or address of the index; one that all machines reach.")
    folders: list[str] = flag([], "Folders of pictures.")
    model: str | None = flag(None, "CAPIVARA folder or Hub id; the index's own where none is given.")
    device: str | None = flag(None, "Device of the model; the GPU where there is one.")
    exact: bool = flag(False, "Decode pictures at full size.")
    batch_size: int = flag(32, "Pictures that the model sees at once.")

    module: ClassVar[str] = "capivara_search.workers"

    def __post_init__(self) -> None:
        self.check_executor()
        at_least(self, 1, "batch_size")
        self.folders = [str(absolute_folder(folder)) for folder in self.folders]
        if not self.folders:
            raise ValueError("No folder was named. Name a folder of pictures.")
        if self.executor == "slurm" and self.logging_dir is None:
            raise ValueError("--executor slurm needs --logging_dir, a folder that all machines see.")

    @property
    def logs(self) -> Path:
        """Folder of the logs of all tasks."""
        name = blake2b(self.where.encode(), digest_size=8).hexdigest()
        return self.logging_dir or cache_home() / "index_logs" / name

    def table(self) -> PictureTable:
        """The index."""
        return PictureTable(self.where)

    def search_model(self, table: PictureTable) -> SearchModel:
        """The model that pictures are embedded with."""
        known = table.model() if self.model is None else None
        return find_model(known["source"] if known else self.model, self.device)


def add_with_workers(arguments: WorkerArguments) -> Added | None:
    """`PictureIndex.add` by many tasks.

    Returns:
        What was done; None where Slurm has taken the jobs.

    Raises:
        ValueError: as `add`; some tasks have failed, and are named.
        ImportError: the packages of the executors are not installed.
    """
    require("Adding pictures by several workers", "captions", "datatrove")
    from capivara_common.executors import Work, execute

    start, table = time.monotonic(), arguments.table()
    with table.locked():
        table.mend()
        model = arguments.search_model(table)
        unchanged = _plan(arguments, table, model).unchanged  # says what is wrong with the folders
        table.create(model.width)
        note_asked(table, [Path(folder) for folder in arguments.folders])
        arguments.model = model.source  # so that all tasks have the same one
        note_model(table, model)
        for path in _counts(arguments):
            path.unlink()
        if not execute(Work.of(arguments, "index"), arguments):
            return None
    return replace(_sum(arguments, unchanged), seconds=time.monotonic() - start)


def _plan(arguments: WorkerArguments, table: PictureTable, model: SearchModel, share: tuple[int, int] = (0, 1)) -> Plan:
    return make_plan(table, model.image_digest, [Path(folder) for folder in arguments.folders], share)


def embed(arguments: WorkerArguments, rank: int, world_size: int) -> str:
    """Embed the share of a task."""
    table = arguments.table()
    model = arguments.search_model(table)
    plan = _plan(arguments, table, model, (rank, world_size))
    added = Adding(table, model, plan, arguments.batch_size).run(arguments.exact)
    counts = {name: getattr(added, name) for name in COUNTS} | {"unchanged": added.unchanged - plan.unchanged}
    write_json(arguments.logs / COUNTS_FOLDER / f"{rank:05d}.json", counts)
    return f"{added.embedded} pictures embedded"


def finished(arguments: WorkerArguments, world_size: int) -> list[int]:
    """The tasks whose share holds nothing that is not in the table."""
    table = arguments.table()
    files = _plan(arguments, table, arguments.search_model(table)).files
    busy = {rank for file in files for rank in range(world_size) if is_of_share(file.path, (rank, world_size))}
    return sorted(set(range(world_size)) - busy)


def end(arguments: WorkerArguments, rank: int, world_size: int) -> str:
    """Remove what is gone, and tidy up."""
    table = arguments.table()
    model = arguments.search_model(table)
    added = Added()
    finish(table, model, _plan(arguments, table, model), added)
    left_out = [asdict(one) for one in added.left_out]
    write_json(arguments.logs / COUNTS_FOLDER / "end.json", {"removed": added.removed, "left_out": left_out})
    return f"{added.removed} rows removed"


def _counts(arguments: WorkerArguments) -> list[Path]:
    return sorted((arguments.logs / COUNTS_FOLDER).glob("*.json"))


def _sum(arguments: WorkerArguments, unchanged: int) -> Added:
    """What all tasks have done."""
    added = Added(unchanged=unchanged)
    for path in _counts(arguments):
        facts = read_json(path)
        added.left_out += [LeftOut(**one) for one in facts.pop("left_out", [])]
        for name, number in facts.items():
            setattr(added, name, getattr(added, name) + number)
    copies = max(0, added.moved - added.removed)  # two tasks took the same file for one that had moved
    added.new, added.moved = added.new + copies, added.moved - copies
    added.removed -= added.moved
    return added


PHASES = {"embed": Phase(run=embed, finished=finished, uses_model=True), "end": Phase(run=end)}
