"""Run long work on datatrove's executors: local processes, Slurm or Ray.

Example:
    run_phases(PhaseStep.from_phases(args, PHASES, "score"), args)

Each phase (`Phase` in `tasks.py`) becomes a datatrove pipeline with a single step, `PhaseStep`, and starts when the
previous phase is complete. Progress is defined by the files on disk: a task whose share is finished returns at once,
so a run can be resumed with any number of tasks. A task without a completion file from the current start has failed
or is still running; the reason is in `failures/RANK.txt` next to its log.
"""

import itertools
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

# loguru would print the values of local variables in tracebacks, and one of them may be an API key.
os.environ["LOGURU_DIAGNOSE"] = "NO"

import loguru
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import add_task_logger, close_task_logger

from capivara_common.environment import require_packages
from capivara_common.files import write_text
from capivara_common.progress import configure_progress_bars, disable_progress_bars
from capivara_common.tasks import ExecutorArguments, Phase

CODE_ROOT = Path(__file__).resolve().parents[1]  # tasks on other machines import the code from this folder
MAX_NAMED_FAILURES = 8  # failed tasks that an error message lists
NOT_FINISHED_MESSAGE = "has not ended: it is still running, or it was killed (out of memory?)"
UNKNOWN_OUTCOME_MESSAGE = "has not started, or could not report how it ended"
START_METHOD = (
    "forkserver"  # how local worker processes are started: a fork of this process would copy its threads' locks
)


class PhaseStep(PipelineStep):
    """Pipeline step that runs one phase of a command.

    Tasks on other machines look up the function of the phase by its module name, so the module must not be `__main__`.

    Args:
        phase: Phase to run.
        args: The command's arguments, passed to the phase.
        log_folder: Folder for the logs and failure reasons of all tasks.
        title: Name for logs and error messages.
    """

    def __init__(self, phase: Phase, args: Any, log_folder: Path, title: str):
        self.phase, self.args, self.log_folder, self.title = phase, args, log_folder, title
        self.package = phase.run.__module__.partition(".")[0]
        super().__init__()

    def __repr__(self) -> str:
        return self.title

    @classmethod
    def from_phases(cls, args: ExecutorArguments, phases: dict[str, Phase], title: str) -> "list[PhaseStep]":
        """Create the steps of a command.

        Args:
            args: The command's arguments.
            phases: Phases by name, in order. Each gets a log folder of its name.
            title: Name of the command, for logs and error messages.
        """
        return [cls(phase, args, args.log_folder / name, f"{title}: {name}") for name, phase in phases.items()]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Run the task of one rank; if it raises, also write the reason to the folder `failures`."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        failure_file = self.log_folder / "failures" / f"{rank:05d}.txt"
        write_text(failure_file, NOT_FINISHED_MESSAGE)
        try:
            report = self.phase.run(self.args, rank, world_size)
        except Exception as error:
            reason = "; ".join(line.strip() for line in traceback.format_exception_only(error))
            with suppress(OSError):  # a full disk must not hide `error`
                write_text(failure_file, f"{reason}\n\n{traceback.format_exc()}")
            raise
        failure_file.unlink()
        loguru.logger.debug(f"{self.title}, task {rank} of {world_size}: {report or 'done'}")


def failure_reasons(log_folder: Path) -> dict[int, str]:
    """Return the failure reason of each task that failed or has not ended, keyed by rank."""
    paths = sorted((log_folder / "failures").glob("*.txt"))
    return {int(path.stem): path.read_text(encoding="utf-8").split("\n\n")[0] for path in paths}


def run_phases(steps: Iterable[PhaseStep], args: ExecutorArguments) -> bool:
    """Run phases one after another.

    Args:
        steps: Steps in order. A step starts only if the previous one is complete.
        args: Executor flags, used for steps whose own arguments have no executor flags.

    Returns:
        True if all phases are complete. False if jobs were submitted to Slurm and are still to run.

    Raises:
        ValueError: If several tasks failed; the message lists them with their reasons. Later phases are not started.
        ValueError, OSError, ImportError: If the only task of a phase failed; its own error.
    """
    previous = None
    for step in steps:
        for folder in ("failures", "completions"):  # left by an earlier start, maybe with another number of tasks
            shutil.rmtree(step.log_folder / folder, ignore_errors=True)
        step_args = step.args if isinstance(step.args, ExecutorArguments) else args
        if args.executor == "slurm":
            previous = submit_to_slurm(step, step_args, previous)
            continue
        executor = run_local(step, step_args) if args.executor == "local" else run_on_ray(step, step_args)
        if failed := executor.get_incomplete_ranks(skip_completed=True):
            reasons = failure_reasons(step.log_folder)
            failures = "".join(
                f"\n  task {rank}: {reasons.get(rank, UNKNOWN_OUTCOME_MESSAGE)}" for rank in failed[:MAX_NAMED_FAILURES]
            )
            raise ValueError(
                f"{step}: {len(failed)} tasks have failed:{failures}\n"
                f"Logs: {step.log_folder}. Run the same command again to do the rest."
            )
    return args.executor != "slurm"


def run_local(step: PhaseStep, args: ExecutorArguments) -> LocalPipelineExecutor:
    """Run all tasks of a step on this machine.

    Starts `args.workers` processes, each pinned to one GPU; a single worker runs in this process. If a worker is
    killed, the others continue (datatrove's own pool would wait for it forever).

    Args:
        step: The step.
        args: Executor flags; `workers` and `tasks` are used.

    Returns:
        datatrove's executor, which knows the incomplete ranks.
    """
    loguru.logger.disable("datatrove")  # the terminal is for progress bars and errors
    gpus = _visible_gpus()
    workers = args.workers or len(gpus) or 1
    tasks = (args.tasks or workers) if step.phase.is_parallel else 1
    executor = LocalPipelineExecutor([step], tasks, logging_dir=str(step.log_folder))
    if (workers := min(workers, tasks)) == 1:
        _run_rank_sequence(executor, range(tasks))
        return executor
    context, main = multiprocessing.get_context(START_METHOD), getattr(sys.modules["__main__"].__spec__, "name", "")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith(step.package) and name != main])
    # Workers are daemons, so that Ctrl-C ends them. The fork server may be older than this start, so the environment is
    # passed explicitly.
    processes = [
        context.Process(target=_run_worker, args=(executor, index, workers, gpu, dict(os.environ)), daemon=True)
        for index, gpu in zip(range(workers), itertools.cycle(gpus or [""]), strict=False)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return executor


def _run_rank_sequence(executor: LocalPipelineExecutor, ranks: range) -> None:
    """Run ranks one after another in this process. If one of several tasks fails, the others still run.

    Replaces `LocalPipelineExecutor.run`, which forks a Manager process for each call: the Manager takes 0.2 s, survives
    if this process is killed, and forking is unsafe once lancedb has started its threads.
    """
    for rank in ranks:
        log = add_task_logger(executor.logging_dir, rank, local_rank=1)  # only rank 0 would log to the terminal
        try:
            executor.pipeline[0].run(None, rank, executor.tasks)
            executor.mark_rank_as_completed(rank)
        except Exception:  # the step has written the reason to the folder `failures`
            if executor.tasks == 1:
                raise
        finally:
            close_task_logger(log)


def _run_worker(
    executor: LocalPipelineExecutor, worker_index: int, worker_count: int, gpu: str, environment: dict[str, str]
) -> None:
    """Run every `worker_count`-th rank from `worker_index` on; the entry point of a worker process.

    The process ends when its parent ends. `gpu` is the value for CUDA_VISIBLE_DEVICES, or "" without GPUs.
    """
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    # If the parent is killed, this worker must not go on writing files that a new start also writes.
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()
    loguru.logger.disable("datatrove")
    logging.basicConfig(format="%(message)s")  # warnings only; tasks report progress in their logs
    configure_progress_bars() if worker_index == 0 else disable_progress_bars()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    elif "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // worker_count))
    _run_rank_sequence(executor, range(worker_index, executor.tasks, worker_count))


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    import torch  # imported here because it takes seconds

    return [str(number) for number in range(torch.cuda.device_count())]


def _executor_options(step: PhaseStep, args: ExecutorArguments) -> dict[str, Any]:
    """Return the options that datatrove's Slurm and Ray executors share."""
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


def run_on_ray(step: PhaseStep, args: ExecutorArguments) -> RayPipelineExecutor:
    """Run all tasks of a step on Ray.

    Uses the cluster of the environment variable RAY_ADDRESS or one that runs on this machine; otherwise starts a
    cluster on this machine.

    Args:
        step: The step.
        args: Executor flags.

    Returns:
        datatrove's executor, which knows the incomplete ranks.
    """
    require_packages("--executor ray", "ray", "ray")
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(CODE_ROOT)}})
    executor = RayPipelineExecutor(**_executor_options(step, args))
    executor.run()
    return executor


def submit_to_slurm(
    step: PhaseStep, args: ExecutorArguments, previous: SlurmPipelineExecutor | None
) -> SlurmPipelineExecutor:
    """Submit a step to Slurm as a job array.

    Args:
        step: The step.
        args: Executor flags.
        previous: Executor of the previous step; the job starts when that step is complete.

    Returns:
        datatrove's executor, to be passed as `previous` of the next step.

    Raises:
        ValueError: If this machine has no sbatch, or sbatch refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("--executor slurm needs sbatch, which this machine lacks. Run the command on a login node.")
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": CODE_ROOT}
    executor = SlurmPipelineExecutor(
        time=args.time,
        partition=args.partition,
        qos="",
        job_name=re.sub(r"[^\w.-]+", "-", f"{step.package}-{step}"),
        env_command="; ".join(f"export {name}={shlex.quote(str(path))}:${name}" for name, path in paths.items()),
        # Without this option, a job whose predecessor failed would wait forever.
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
