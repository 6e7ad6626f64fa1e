"""Define the executor flags and the class `Phase` for commands whose work is split into tasks.

A task is a share of the work. Tasks can run in parallel on this machine or on a cluster. `ExecutorArguments` has the
command-line flags that say where and how tasks run. A `Phase` is one step of a command. The module `executors` runs the
phases.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capivara_common.cli import check_at_least, flag

# This module imports no large library, so that `--help` answers at once.

# End of the error message if a distributed launcher has started a command that must not be started in this way
TASK_SHARING_HINT = (
    "to divide its work, use --tasks and --workers on one machine, or --executor slurm or ray on several machines"
)
# Titles under which `--help` lists the flags of `ExecutorArguments`
TASKS, CLUSTER = "tasks", "Slurm and Ray clusters"


@dataclass(kw_only=True)
class ExecutorArguments:
    """Command-line arguments that choose where the tasks of a command run: on this machine, a Slurm or a Ray cluster.

    A task is a share of the work of the command. datatrove, the library that runs the tasks, has most flags under the
    same names.
    """

    executor: Literal["local", "slurm", "ray"] = flag(
        "local", "Where tasks run: on this machine (local), a Slurm cluster or a Ray cluster.", group=TASKS
    )
    tasks: int | None = flag(
        None,
        "Number of tasks into which the rows are divided. Required for slurm and ray. Default: the number of workers "
        "(local). A resumed run may use another number.",
        group=TASKS,
    )
    workers: int | None = flag(
        None,
        "Number of tasks that run at the same time. Default: one per GPU, or 1 without GPUs (local); no limit (slurm, "
        "ray).",
        group=TASKS,
    )
    logging_dir: Path | None = flag(
        None, "Folder for task logs. Default: OUTPUT.logs, or OUTPUT/logs for captions.build.", group=TASKS
    )
    partition: str | None = flag(None, "Slurm partition. Required for slurm.", group=CLUSTER)
    time: str | None = flag(None, "Time limit of a task, for example 04:00:00. Required for slurm.", group=CLUSTER)
    sbatch: list[str] = flag(
        [], "Additional sbatch options, for example account=vision qos=gpu (slurm).", group=CLUSTER
    )
    cpus_per_task: int = flag(1, "CPU cores per task.", group=CLUSTER)
    mem_per_cpu_gb: int = flag(4, "Memory per CPU core in GiB.", group=CLUSTER)
    node_script: Path | None = flag(
        None,
        "Bash script that a Slurm job sources before its tasks, such as configs/slurm/start_vllm.sh, which starts a "
        "model server. It is used only with --executor slurm, and only for jobs that run a model.",
        group=CLUSTER,
    )
    gpus_per_task: int = flag(0, "GPUs per task, for tasks that run a model. Other tasks get none.", group=CLUSTER)

    @property
    def log_folder(self) -> Path:
        """Folder for the logs of all tasks: `logging_dir` or, by default, the output folder with the suffix ".logs"."""
        return self.logging_dir or self.output.with_name(self.output.name + ".logs")

    def check_executor(self) -> None:
        """Check the values of the flags.

        Raises:
            ValueError: If a flag is invalid or missing. Also if a distributed launcher (Accelerate, torchrun) has
                started the command, because each of its processes would do all the work.
        """
        check_at_least(self, 1, "tasks", "workers", "cpus_per_task", "mem_per_cpu_gb")
        check_at_least(self, 0, "gpus_per_task")
        if self.executor != "local" and self.tasks is None:
            raise ValueError(f"--executor {self.executor} needs --tasks, the number of tasks to split the rows into.")
        if self.executor == "slurm" and not (self.partition and self.time):
            raise ValueError("--executor slurm needs --partition and --time, such as --partition gpu --time 04:00:00.")
        # datatrove writes these values into the job script without quoting, so special characters would break the
        # script.
        if self.executor == "slurm":
            folder = (self.logging_dir or getattr(self, "output", None) or Path("logs")).absolute()
            values = [("partition", self.partition), ("time", self.time), ("The folder of the logs", str(folder))]
            if self.node_script is not None:
                if not self.node_script.is_file():
                    raise ValueError(f"node_script must be a file, got {self.node_script}.")
                values.append(("The path of node_script", str(self.node_script.absolute())))
            for name, value in [*values, *(("sbatch", option) for option in self.sbatch)]:
                signs = "./+@,=:_-" + "%|&*" * (name == "sbatch")
                if re.search(rf"[^\w{re.escape(signs)}]", value):
                    raise ValueError(
                        f"{name} may contain only letters, digits and {signs} with --executor slurm, got {value!r}."
                    )
        if not all(re.fullmatch(r"[a-z][a-z-]*(=.*)?", option) for option in self.sbatch):
            raise ValueError(f"sbatch options must be KEY or KEY=VALUE without leading dashes, got {self.sbatch}.")
        # If a launcher has started several processes, each of them would do all the work.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"This command must not be launched by Accelerate or torchrun: {TASK_SHARING_HINT}.")

    def executor_flags(self) -> dict[str, Any]:
        """Return the executor flags that differ from their defaults, for example to pass them on to another command.

        Returns:
            `{name of the flag: value}`.
        """
        defaults = vars(ExecutorArguments()).items()
        return {name: value for name, default in defaults if (value := getattr(self, name)) != default}


@dataclass(frozen=True)
class Phase:
    """One step of a command, such as scoring rows. Its work is divided among tasks that can run in parallel.

    Attributes:
        run: Function that does the work of one task. Its arguments are the command-line arguments, the index of the
            task (from 0), and the number of tasks. It returns at once if the task has no work left.
        is_parallel: True: all tasks share the work. False: a single task does all the work.
        uses_model: Whether the tasks run a model. On a cluster, each task then gets `gpus_per_task` GPUs, otherwise
            none.
    """

    run: Callable[[Any, int, int], Any]
    is_parallel: bool = False
    uses_model: bool = False


def split_rows(row_count: int, rows_per_part: int) -> list[range]:
    """Split the rows of a dataset into parts of consecutive rows, for example to write one output file per part.

    Args:
        row_count: Number of rows of the dataset.
        rows_per_part: Number of rows in each part. The last part may have fewer rows.

    Returns:
        One range of row indices per part. For 5 rows and 2 rows per part: `range(0, 2)`, `range(2, 4)`, `range(4, 5)`.
    """
    return [range(start, min(start + rows_per_part, row_count)) for start in range(0, row_count, rows_per_part)]
