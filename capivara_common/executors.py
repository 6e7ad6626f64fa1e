"""Long work on datatrove's executors: `execute(Work.of(args, PHASES, "score"), args)`.

Every phase of the work (`Phase` of `tasks.py`) is a pipeline of one step, its `Work`, which starts when the phase
before is complete. What is done is what lies on the disk: a rank that finds nothing left to do returns at once, in any
number of tasks. A rank without datatrove's completion file, of this start, has failed or has not ended; why is in
`failures/RANK.txt` beside its log.
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

# loguru would write the values of all variables under a traceback, and one may be a key.
os.environ["LOGURU_DIAGNOSE"] = "NO"

import loguru
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import add_task_logger, close_task_logger

from capivara_common.environment import require_packages
from capivara_common.files import write_text
from capivara_common.progress import configure_progress_bars, disable_progress_bars
from capivara_common.tasks import ExecutorArguments, Phase

CODE_ROOT = Path(__file__).resolve().parents[1]  # that tasks on other machines import the code from
MAX_NAMED_FAILURES = 8
NOT_FINISHED_MESSAGE = "has not ended: it is at work, or it was killed; out of memory?"
UNKNOWN_OUTCOME_MESSAGE = "has not started, or could not say how it ended"
START_METHOD = "forkserver"  # of the processes of this machine


class PhaseStep(PipelineStep):
    """One phase of a command's work, called with `args` of the command; `logs` has all that its tasks say.

    Other machines find its function by the name of its module, which therefore must not be `__main__`.
    """

    def __init__(self, phase: Phase, args: Any, log_folder: Path, title: str):
        self.phase, self.args, self.log_folder, self.title = phase, args, log_folder, title
        self.package = phase.run.__module__.partition(".")[0]
        super().__init__()

    def __repr__(self) -> str:
        return self.title

    @classmethod
    def from_phases(cls, args: ExecutorArguments, phases: dict[str, Phase], title: str) -> "list[PhaseStep]":
        """All phases of a command, by their names."""
        return [cls(phase, args, args.log_folder / name, f"{title}: {name}") for name, phase in phases.items()]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """One rank; what it raises is in the folder of failures, too."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        note = self.log_folder / "failures" / f"{rank:05d}.txt"
        write_text(note, NOT_FINISHED_MESSAGE)
        try:
            report = self.phase.run(self.args, rank, world_size)
        except Exception as error:
            said = "; ".join(line.strip() for line in traceback.format_exception_only(error))
            with suppress(OSError):  # a full disk, which `error` says
                write_text(note, f"{said}\n\n{traceback.format_exc()}")
            raise
        note.unlink()
        loguru.logger.debug(f"{self.title}, task {rank} of {world_size}: {report or 'done'}")


def failure_reasons(log_folder: Path) -> dict[int, str]:
    """Rank -> why its task has failed, or that it has not ended."""
    paths = sorted((log_folder / "failures").glob("*.txt"))
    return {int(path.stem): path.read_text(encoding="utf-8").split("\n\n")[0] for path in paths}


def run_phases(steps: Iterable[PhaseStep], args: ExecutorArguments) -> bool:
    """Run phases one after the other; whether they are complete now: False where Slurm has taken the jobs.

    Raises:
        ValueError, OSError, ImportError: of a task that is alone; some of several have failed, which are named, and
            nothing that needs them was started.
    """
    before = None
    for work in steps:
        for folder in ("failures", "completions"):  # of a start with other tasks, maybe
            shutil.rmtree(work.log_folder / folder, ignore_errors=True)
        own = work.args if isinstance(work.args, ExecutorArguments) else args
        if args.executor == "slurm":
            before = submit_to_slurm(work, own, before)
            continue
        ended = run_local(work, own) if args.executor == "local" else run_on_ray(work, own)
        if failed := ended.get_incomplete_ranks(skip_completed=True):
            said = failure_reasons(work.log_folder)
            named = "".join(
                f"\n  task {rank}: {said.get(rank, UNKNOWN_OUTCOME_MESSAGE)}" for rank in failed[:MAX_NAMED_FAILURES]
            )
            raise ValueError(
                f"{work}: {len(failed)} tasks have failed:{named}\n"
                f"Logs: {work.log_folder}. The same command does what is missing."
            )
    return args.executor != "slurm"


def run_local(step: PhaseStep, args: ExecutorArguments) -> LocalPipelineExecutor:
    """All ranks on this machine, by `workers` processes, each with a GPU of its own; by this one where there is one.

    datatrove's own pool would wait for ever for a process that was killed. Of one that was, the others go on.
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
    processes = [
        # Ctrl-C ends it. The server that forks it may be of an earlier start, with the environment of then.
        context.Process(target=_run_worker, args=(executor, number, workers, gpu, dict(os.environ)), daemon=True)
        for number, gpu in zip(range(workers), itertools.cycle(gpus or [""]), strict=False)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return executor


def _run_rank_sequence(executor: LocalPipelineExecutor, ranks: range) -> None:
    """One after the other, as `LocalPipelineExecutor.run` does but for the Manager that it forks for each call.

    That takes 0.2 s, outlives a kill, and is a fork of what lancedb runs. Of several tasks one that fails keeps none of
    the others from work.
    """
    for rank in ranks:
        log = add_task_logger(executor.logging_dir, rank, local_rank=1)  # above 0 it is not shown on the terminal
        try:
            executor.pipeline[0].run(None, rank, executor.tasks)
            executor.mark_rank_as_completed(rank)
        except Exception:  # which is in the folder of failures
            if executor.tasks == 1:
                raise
        finally:
            close_task_logger(log)


def _run_worker(
    executor: LocalPipelineExecutor, worker_index: int, worker_count: int, gpu: str, environment: dict[str, str]
) -> None:
    """Each `workers`-th rank from `number` on, in a process that ends with the one that has started it."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the parent hears
    parent = multiprocessing.parent_process()  # a new start must not meet the tasks of one that was killed
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()
    loguru.logger.disable("datatrove")
    logging.basicConfig(format="%(message)s")  # warnings; what each task says of its work is in its log
    configure_progress_bars() if worker_index == 0 else disable_progress_bars()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    elif "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // worker_count))
    _run_rank_sequence(executor, range(worker_index, executor.tasks, worker_count))


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    import torch  # here: its import takes seconds

    return [str(number) for number in range(torch.cuda.device_count())]


def _executor_options(step: PhaseStep, args: ExecutorArguments) -> dict[str, Any]:
    """Of datatrove's executors for clusters."""
    tasks, gpus = args.tasks if step.phase.is_parallel else 1, args.gpus_per_task if step.phase.uses_model else 0
    given = {"pipeline": [step], "tasks": tasks, "workers": args.workers or -1, "logging_dir": str(step.log_folder)}
    machine = {"cpus_per_task": args.cpus_per_task, "mem_per_cpu_gb": args.mem_per_cpu_gb, "gpus_per_task": gpus}
    return given | machine | {"skip_completed": False}


def run_on_ray(step: PhaseStep, args: ExecutorArguments) -> RayPipelineExecutor:
    """On the Ray cluster of RAY_ADDRESS or of this machine; without one, a cluster of this machine alone."""
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
    """Submit a job array, which starts when the one before is done. ValueError: there is no sbatch, or it refuses."""
    if shutil.which("sbatch") is None:
        raise ValueError("--executor slurm needs sbatch, which this machine lacks. Run it where jobs are submitted.")
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": CODE_ROOT}
    executor = SlurmPipelineExecutor(
        time=args.time,
        partition=args.partition,
        qos="",
        job_name=re.sub(r"[^\w.-]+", "-", f"{step.package}-{step}"),
        env_command="; ".join(f"export {name}={shlex.quote(str(path))}:${name}" for name, path in paths.items()),
        # A job whose predecessor has failed would wait for ever.
        sbatch_args={"kill-on-invalid-dep": "yes"} | dict(option.partition("=")[::2] for option in args.sbatch),
        mail_type="NONE",
        depends=previous,
        **_executor_options(step, args),
    )
    try:
        executor.run()
    except subprocess.CalledProcessError as error:  # sbatch has said why on the terminal
        raise ValueError(
            f"sbatch has refused {step}, for what it says above. Check --partition, --time and --sbatch."
        ) from error
    return executor
