"""Work that is shared out to tasks: its flags and its phases. Light, so that `--help` answers at once."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capivara_common.cli import check_at_least, flag

TASK_SHARING_HINT = (
    "rows are shared out by --tasks and --workers on one machine, and by --executor slurm or ray on many"
)


@dataclass(kw_only=True)
class ExecutorArguments:
    """Where the tasks of a command run: the flags of datatrove's executors, under its names."""

    executor: Literal["local", "slurm", "ray"] = flag(
        "local", "local: this machine. slurm: job arrays of a Slurm cluster. ray: a Ray cluster."
    )
    tasks: int | None = flag(
        None, "Shares of the rows, each done by one process; any other number goes on. slurm and ray need it."
    )
    workers: int | None = flag(
        None, "Tasks that run at once. local: as many as GPUs, else 1, on all cores; slurm and ray: no limit."
    )
    partition: str | None = flag(None, "slurm: partition of the jobs.")
    time: str | None = flag(None, "slurm: limit of a task, as 04:00:00.")
    sbatch: list[str] = flag([], "slurm: other options of sbatch, as account=vision qos=gpu.")
    cpus_per_task: int = flag(1, "slurm, ray: cores of a task.")
    mem_per_cpu_gb: int = flag(4, "slurm, ray: GiB of memory a core.")
    gpus_per_task: int = flag(0, "slurm, ray: GPUs of a task, where its step has a model.")
    logging_dir: Path | None = flag(None, "Folder of the tasks' logs; OUTPUT.logs, of a build OUTPUT/logs, without.")

    @property
    def log_folder(self) -> Path:
        """Folder of the logs of all tasks."""
        return self.logging_dir or self.output.with_name(self.output.name + ".logs")

    def check_executor(self) -> None:
        """Raise ValueError where a flag of the executor breaks its rule."""
        check_at_least(self, 1, "tasks", "workers", "cpus_per_task", "mem_per_cpu_gb")
        check_at_least(self, 0, "gpus_per_task")
        if self.executor != "local" and self.tasks is None:
            raise ValueError(f"--executor {self.executor} needs --tasks, the number of shares of the rows.")
        if self.executor == "slurm" and not (self.partition and self.time):
            raise ValueError("--executor slurm needs --partition and --time, such as --partition gpu --time 04:00:00.")
        if self.executor == "slurm":  # datatrove writes these into the jobs' script as they are
            folder = (self.logging_dir or getattr(self, "output", None) or Path("logs")).absolute()
            given = [("partition", self.partition), ("time", self.time), ("The folder of the logs", str(folder))]
            for name, value in [*given, *(("sbatch", option) for option in self.sbatch)]:
                signs = "./+@,=:_-" + "%|&*" * (name == "sbatch")
                if re.search(rf"[^\w{re.escape(signs)}]", value):
                    rule = f"must have letters, digits and {signs} alone where Slurm runs the tasks"
                    raise ValueError(f"{name} {rule}, got {value!r}.")
        if not all(re.fullmatch(r"[a-z][a-z-]*(=.*)?", option) for option in self.sbatch):
            raise ValueError(f"sbatch must be options as KEY=VALUE, without dashes before them, got {self.sbatch}.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each process would do all rows
            raise ValueError(f"This command is not launched by Accelerate or torchrun: {TASK_SHARING_HINT}.")

    def executor_flags(self) -> dict[str, Any]:
        """The flags of this class that were given."""
        names = vars(ExecutorArguments()).items()
        return {name: value for name, default in names if (value := getattr(self, name)) != default}


@dataclass(frozen=True)
class Phase:
    """What the tasks of one datatrove pipeline do; a command's work is one or several, in order."""

    run: Callable[[Any, int, int], Any]  # of arguments, rank, world_size; returns at once where nothing is left to do
    is_parallel: bool = False  # among the tasks; else it is one task
    uses_model: bool = False  # a task needs a GPU


def split_rows(row_count: int, rows_per_part: int) -> list[range]:
    """Rows in parts of neighbours, which tasks share out."""
    return [range(start, min(start + rows_per_part, row_count)) for start in range(0, row_count, rows_per_part)]
