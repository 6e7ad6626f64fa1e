"""Run the work of a command as parallel tasks with the library datatrove: in local processes, on Slurm or on Ray.

Example:
    run_phases(PhaseStep.from_phases(args, PHASES, "score"), args)

A command consists of phases (`Phase` in `tasks.py`), which run one after another. For example, a command first scores
rows and then merges the scores. The rows of a phase are split into tasks. A task skips the rows that are already in the
output, so an interrupted run can be resumed, even with another number of tasks. If a task fails, the file
`failures/RANK.txt` in the log folder of the phase says why. RANK is the index of the task, from 00000.
"""

import logging
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

# By default, loguru prints the values of local variables in tracebacks, and one of them may be an API key. loguru reads
# this setting when it is imported.
os.environ["LOGURU_DIAGNOSE"] = "NO"

import loguru
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import add_task_logger, close_task_logger

from capivara_common.environment import CODE_ROOT, require_packages
from capivara_common.files import write_text
from capivara_common.progress import disable_progress_bars, set_progress_bar_timing
from capivara_common.tasks import ExecutorArguments, Phase

MAX_NAMED_FAILURES = 8  # largest number of failed tasks that an error message lists
# What an error message says about a task, after "task 17: ", if the task raised no exception
NOT_FINISHED_MESSAGE = "has not ended: it is still running, or it was killed (out of memory?)"
UNKNOWN_OUTCOME_MESSAGE = "has not started, or could not report how it ended"
# How local worker processes are started. "fork" would be unsafe, because it copies the locks that threads hold.
# Windows has only "spawn".
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class PhaseStep(PipelineStep):
    """Adapter that lets datatrove run one phase of a command, that is, one step such as scoring rows.

    Args:
        phase: Phase to run. Its function must not be defined in `__main__`.
        args: Command-line arguments of the command, which the function of the phase gets.
        log_folder: Folder for the logs and failure reasons of all tasks.
        title: Name of the step for logs and error messages, such as "score: merge" (command and phase).
    """

    def __init__(self, phase: Phase, args: Any, log_folder: Path, title: str):
        # Tasks on other machines import the function of the phase by the name of its module.
        self.phase, self.args, self.log_folder, self.title = phase, args, log_folder, title
        self.package = phase.run.__module__.partition(".")[0]
        super().__init__()

    def __repr__(self) -> str:
        return self.title

    @classmethod
    def from_phases(cls, args: ExecutorArguments, phases: dict[str, Phase], title: str) -> "list[PhaseStep]":
        """Wrap each phase of a command as a datatrove step, so that `run_phases` can run the phases in order.

        Args:
            args: Command-line arguments of the command.
            phases: `{name: phase}`, in the order in which the phases run. The logs of a phase are written to the folder
                `args.log_folder / name`.
            title: Name of the command for logs and error messages.

        Returns:
            The steps, in the order of `phases`.
        """
        return [cls(phase, args, args.log_folder / name, f"{title}: {name}") for name, phase in phases.items()]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Run one task of the phase, and record on disk whether it has failed. datatrove calls this method.

        The file `failures/RANK.txt` in the log folder says that the task has not ended, or why it has failed. If the
        task succeeds, the file is removed.

        Args:
            data: Not used; datatrove passes the output of the previous step.
            rank: Index of the task, from 0.
            world_size: Total number of tasks.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        failure_file = self.log_folder / "failures" / f"{rank:05d}.txt"
        write_text(failure_file, NOT_FINISHED_MESSAGE)
        try:
            report = self.phase.run(self.args, rank, world_size)
        except Exception as error:
            reason = "; ".join(line.strip() for line in traceback.format_exception_only(error))
            with suppress(OSError):  # for example a full disk: `error` is raised anyway
                write_text(failure_file, f"{reason}\n\n{traceback.format_exc()}")
            raise
        failure_file.unlink()
        loguru.logger.debug(f"{self.title}, task {rank} of {world_size}: {report or 'done'}")


def read_task_failures(log_folder: Path) -> dict[int, str]:
    """Read from a log folder which parallel tasks of a command have failed or have not ended, and why.

    Args:
        log_folder: Log folder of a phase, that is, one step of a command.

    Returns:
        `{index of the task, from 0: reason on one line}`, without the tasks that ended successfully.
    """
    paths = sorted((log_folder / "failures").glob("*.txt"))
    return {int(path.stem): path.read_text(encoding="utf-8").split("\n\n")[0] for path in paths}


def run_phases(steps: Iterable[PhaseStep], args: ExecutorArguments) -> bool:
    """Run the phases (steps) of a command one after another, each as several tasks on this machine or on a cluster.

    Args:
        steps: One step per phase, in order. A step starts only if the previous step is complete.
        args: Command-line arguments with the executor flags. `args.executor` says where all steps run. For the other
            flags, such as `workers`, a step may have its own values (`step.args`).

    Returns:
        True if all phases are complete. False if they were submitted to Slurm as jobs that run later.

    Raises:
        ValueError: If some of several tasks fail. The message lists the reasons. Later phases are not started.
        Exception: If the only task of a phase fails. Its error is raised unchanged.
    """
    previous = None
    for step in steps:
        # Remove the failures and completions that an earlier run recorded. They would be misleading if the earlier run
        # had another number of tasks, because its task numbers then stand for other rows.
        for folder in ("failures", "completions"):
            shutil.rmtree(step.log_folder / folder, ignore_errors=True)
        step_args = step.args if isinstance(step.args, ExecutorArguments) else args
        if args.executor == "slurm":
            previous = _submit_step_to_slurm(step, step_args, previous)
            continue
        executor = _run_step_locally(step, step_args) if args.executor == "local" else _run_step_on_ray(step, step_args)
        # datatrove writes a completion file for each task that ends successfully.
        if failed := executor.get_incomplete_ranks(skip_completed=True):
            reasons, named = read_task_failures(step.log_folder), failed[:MAX_NAMED_FAILURES]
            failures = [f"task {rank}: {reasons.get(rank, UNKNOWN_OUTCOME_MESSAGE)}" for rank in named]
            message = "\n  ".join([f"{step}: {len(failed)} tasks have failed:", *failures])
            raise ValueError(f"{message}\nLogs: {step.log_folder}. Run the same command again to do the rest.")
    return args.executor != "slurm"


def _run_step_locally(step: PhaseStep, args: ExecutorArguments) -> LocalPipelineExecutor:
    """Run all tasks of a step on this machine.

    The function starts `args.workers` worker processes, each pinned to one GPU if the machine has GPUs. A single worker
    runs in the current process. If a worker is killed, the other workers continue. datatrove's own process pool would
    wait for the killed worker forever, so it is not used.

    Args:
        step: The step to run.
        args: Command-line arguments with the executor flags `workers` and `tasks`.

    Returns:
        datatrove's executor. Its `get_incomplete_ranks` returns the ranks of the tasks that have failed.
    """
    # Keep datatrove's log lines out of the terminal, which shows only progress bars and errors.
    loguru.logger.disable("datatrove")
    gpus = _visible_gpus()
    workers = args.workers or len(gpus) or 1
    tasks = (args.tasks or workers) if step.phase.is_parallel else 1
    executor = LocalPipelineExecutor([step], tasks, logging_dir=str(step.log_folder))
    if (workers := min(workers, tasks)) == 1:
        _run_rank_sequence(executor, range(tasks))
        return executor
    context, main = multiprocessing.get_context(START_METHOD), getattr(sys.modules["__main__"].__spec__, "name", "")
    if START_METHOD == "forkserver":
        context.set_forkserver_preload([name for name in sys.modules if name.startswith(step.package) and name != main])
    # Workers are daemon processes, so that they end when Ctrl-C ends this process. The environment is passed
    # explicitly, because the fork server may have been started earlier, with other environment variables.
    processes = []
    for index in range(workers):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        arguments = (executor, range(index, tasks, workers), os.environ | gpu)
        processes.append(context.Process(target=_run_tasks_in_worker, args=arguments, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join()
    return executor


def _run_rank_sequence(executor: LocalPipelineExecutor, ranks: range) -> None:
    """Run tasks one after another in this process.

    If the executor has several tasks and a task fails, the remaining tasks still run, and no error is raised. If the
    executor has a single task, its error is raised.

    This function replaces `LocalPipelineExecutor.run`, which forks a `multiprocessing` Manager process in each call.
    Starting the Manager takes 0.2 s, the Manager survives if this process is killed, and forking is unsafe after
    lancedb has started threads.

    Args:
        executor: datatrove's executor with the step and the number of tasks.
        ranks: Ranks of the tasks to run.
    """
    for rank in ranks:
        # With local_rank=0, datatrove would also print information to the terminal; with 1, it prints only errors.
        log = add_task_logger(executor.logging_dir, rank, local_rank=1)
        try:
            executor.pipeline[0].run(None, rank, executor.tasks)
            executor.mark_rank_as_completed(rank)
        except Exception:  # `PhaseStep.run` has recorded the reason, so continue with the next task
            if executor.tasks == 1:
                raise
        finally:
            close_task_logger(log)


def _run_tasks_in_worker(executor: LocalPipelineExecutor, ranks: range, environment: dict[str, str]) -> None:
    """Run the tasks of one worker; this is the main function of a worker process.

    The process ends when its parent process ends.

    Args:
        executor: datatrove's executor with the step and the number of tasks.
        ranks: Ranks (numbers) of the tasks that this worker runs. The first rank is the number of the worker, and the
            step of the range is the number of workers. Only worker 0 shows progress bars.
        environment: Environment variables for this process. If the machine has GPUs, CUDA_VISIBLE_DEVICES names the GPU
            of this worker.
    """
    os.environ.update(environment)
    # Ctrl-C in a terminal reaches all processes. The worker ignores it, because the parent handles it and ends the
    # worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    # If the parent is killed, this worker must end. Otherwise it would write the same files as a second run of the
    # command.
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()
    loguru.logger.disable("datatrove")
    logging.basicConfig(format="%(message)s")  # print only warnings; tasks report progress in log files
    set_progress_bar_timing() if ranks.start == 0 else disable_progress_bars()
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.step))
    _run_rank_sequence(executor, ranks)


def _visible_gpus() -> list[str]:
    """Return the numbers or ids of the GPUs that this process may use, in the format of CUDA_VISIBLE_DEVICES."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    # Imported here because the import takes seconds, and is not needed if CUDA_VISIBLE_DEVICES is set.
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _executor_options(step: PhaseStep, args: ExecutorArguments) -> dict[str, Any]:
    """Return the keyword arguments that are the same for datatrove's Slurm executor and its Ray executor.

    Args:
        step: The step to run.
        args: Command-line arguments with the executor flags.
    """
    return {
        "pipeline": [step],
        "tasks": args.tasks if step.phase.is_parallel else 1,
        "workers": args.workers or -1,
        "logging_dir": str(step.log_folder),
        "cpus_per_task": args.cpus_per_task,
        "mem_per_cpu_gb": args.mem_per_cpu_gb,
        "gpus_per_task": args.gpus_per_task if step.phase.uses_model else 0,
        "skip_completed": False,
    }


def _run_step_on_ray(step: PhaseStep, args: ExecutorArguments) -> RayPipelineExecutor:
    """Run all tasks of a step on a Ray cluster.

    The cluster is the one at the address in the environment variable RAY_ADDRESS, or a cluster that already runs on
    this machine. If there is neither, the function starts a cluster on this machine.

    Args:
        step: The step to run.
        args: Command-line arguments with the executor flags.

    Returns:
        datatrove's executor. Its `get_incomplete_ranks` returns the ranks of the tasks that have failed.
    """
    require_packages("--executor ray", "ray", "ray")
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(CODE_ROOT)}})
    executor = RayPipelineExecutor(**_executor_options(step, args))
    executor.run()
    return executor


def _submit_step_to_slurm(
    step: PhaseStep, args: ExecutorArguments, previous: SlurmPipelineExecutor | None
) -> SlurmPipelineExecutor:
    """Submit a step to Slurm as a job array.

    Args:
        step: The step to run.
        args: Command-line arguments with the executor flags.
        previous: Executor that this function returned for the previous step. The new job starts when the previous step
            is complete. None for the first step.

    Returns:
        datatrove's executor. Pass it as `previous` when you submit the next step.

    Raises:
        ValueError: If the command `sbatch` is missing on this machine, or sbatch refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "--executor slurm needs the program sbatch, which this machine lacks. Run the command on a login node."
        )
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": CODE_ROOT}
    setup = [f"export {name}={shlex.quote(str(path))}:${name}" for name, path in paths.items()]
    if args.node_script is not None and step.phase.uses_model:
        setup.append(f"source {shlex.quote(str(args.node_script.absolute()))}")
    executor = SlurmPipelineExecutor(
        time=args.time,
        partition=args.partition,
        qos="",
        job_name=re.sub(r"[^\w.-]+", "-", f"{step.package}-{step}"),
        env_command="; ".join(setup),
        # Without this option, a job would wait forever if the job of the previous step has failed.
        sbatch_args={"kill-on-invalid-dep": "yes"} | dict(option.partition("=")[::2] for option in args.sbatch),
        mail_type="NONE",
        depends=previous,
        **_executor_options(step, args),
    )
    try:
        executor.run()
    except subprocess.CalledProcessError as error:  # sbatch has printed its reason to the terminal
        raise ValueError(
            f"sbatch has refused {step}; its message is above. Check --partition, --time and --sbatch."
        ) from error
    return executor
