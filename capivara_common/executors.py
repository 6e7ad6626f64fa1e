"""Long work on datatrove's executors: this machine's processes, job arrays of a Slurm cluster, or a Ray cluster.

    execute(Work.of(args), args)

Every phase of the work (`Phase` of `tasks.py`) is a pipeline of one step, its `Work`, which starts when the phase
before is complete. What is done is what lies on the disk: a rank with nothing left to do returns at once, whatever the
number of tasks is and whatever datatrove's completion files say. Why a task has failed is in `failures/RANK.txt` beside
its log.
"""

import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# loguru would write the values of all variables under a traceback, and one may be a key.
os.environ["LOGURU_DIAGNOSE"] = "NO"

import loguru
import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from capivara_common.environment import require
from capivara_common.files import write_text
from capivara_common.progress import no_bars, prepare_bars
from capivara_common.tasks import ExecutorArguments, Phase

ROOT = Path(__file__).resolve().parents[1]  # that tasks on other machines import the code from
FAILURES_NAMED = 8
EXPECTED = (ValueError, OSError, ImportError)  # whose message is enough; of others the traceback is kept

logger = logging.getLogger("capivara")


class TaskFailed(Exception):
    """A rank has failed; the text says why, without the frames and values of the failed call."""


class TasksFailed(ValueError):
    """Some tasks of a phase have failed, the others are done; the text names them."""


class Work(PipelineStep):
    """One phase of a command's work: `phase` in the `PHASES` of `module`, called with `args` of the command.

    It is pickled by these names, so that other machines find the code. `logs` is the folder of all that its tasks say.
    """

    def __init__(self, module: str, phase: str, args: Any, logs: Path, title: str):
        self.module, self.phase, self.args, self.logs, self.title = module, phase, args, logs, title
        super().__init__()

    def __repr__(self) -> str:
        return self.title

    @classmethod
    def of(cls, args: ExecutorArguments, title: str = "") -> "list[Work]":
        """All phases of `args.module`."""
        title = title or args.module.rpartition(".")[2]
        phases = import_module(args.module).PHASES
        return [cls(args.module, name, args, args.logs / name, f"{title}: {name}") for name in phases]

    def definition(self) -> Phase:
        """What the module says of the phase."""
        return import_module(self.module).PHASES[self.phase]

    def finished(self, world_size: int) -> list[int]:
        """The ranks with nothing left to do."""
        find = self.definition().finished
        return find(self.args, world_size) if find else []

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """One rank. Raises TaskFailed; why is in the folder of failures, and in `error`, then."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        path, self.error = self.logs / "failures" / f"{rank:05d}.txt", None
        path.unlink(missing_ok=True)
        try:
            # On this machine such a rank is not started; when a job was submitted, the rows before were not known.
            is_done = os.environ.get("DATATROVE_EXECUTOR") != "LOCAL" and rank in self.finished(world_size)
            report = None if is_done else self.definition().run(self.args, rank, world_size)
            loguru.logger.info(f"{self.title}, task {rank} of {world_size}: {report or 'done'}")
        except Exception as error:
            self.error = error
            text = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
            if not isinstance(error, EXPECTED):
                text = f"{type(error).__name__}: {text}\n\n{traceback.format_exc()}"
        if self.error is not None:
            write_text(path, text)
            raise TaskFailed(text.split("\n\n")[0])


def failures(logs: Path) -> dict[int, str]:
    """Rank -> why its task has failed, of those that have at their last run."""
    paths = sorted((logs / "failures").glob("*.txt"))
    return {int(path.stem): path.read_text(encoding="utf-8").split("\n\n")[0] for path in paths}


def execute(works: Sequence[Work], args: ExecutorArguments) -> bool:
    """Run phases one after the other; ranks with nothing left to do are not started.

    Returns:
        Whether they are complete now. False: Slurm has taken the jobs.

    Raises:
        ValueError, OSError, ImportError: of a task that is alone.
        TasksFailed: some tasks of several have failed, and nothing that needs them was started.
    """
    run, before = {"local": run_here, "ray": run_in_ray, "slurm": submit}[args.executor], None
    for work in works:
        executor = make_executor(work, work.args if isinstance(work.args, ExecutorArguments) else args, args.executor)
        for name in ("completions", "failures"):  # of a start with other tasks, or other rows, maybe
            shutil.rmtree(work.logs / name, ignore_errors=True)
        finished = work.finished(executor.world_size)
        if len(finished) == executor.world_size:
            continue
        for rank in finished if args.executor != "ray" else ():  # Ray adds up the statistics of all ranks
            executor.mark_rank_as_completed(rank)
        executor.depends, before = before if args.executor == "slurm" else None, executor
        killed = run(executor) or {}
        if args.executor != "slurm" and (left := executor.get_incomplete_ranks()):
            reasons = killed | failures(work.logs)
            named = [f"task {rank}: {reasons.get(rank, 'ended without a word')}" for rank in left[:FAILURES_NAMED]]
            named += [f"and {len(left) - FAILURES_NAMED} more"] * (len(left) > FAILURES_NAMED)
            raise TasksFailed(
                f"{work}: {len(left)} of {executor.world_size} tasks have failed, the others are done.\n  "
                + "\n  ".join(named)
                + f"\nLogs: {work.logs}. The same command does what is missing."
            )
    return args.executor != "slurm"


def make_executor(work: Work, args: ExecutorArguments, kind: str) -> PipelineExecutor:
    """datatrove's executor of one phase."""
    phase = work.definition()
    options: dict[str, Any] = {"pipeline": [work], "logging_dir": str(work.logs)}
    if kind == "local":
        workers = args.workers or len(_gpus()) or 1
        tasks = 1 if phase.finished is None else args.tasks or workers
        return LocalPipelineExecutor(tasks=tasks, workers=min(workers, tasks), **options)
    options |= {
        "tasks": 1 if phase.finished is None else args.tasks,
        "workers": -1 if args.workers is None else args.workers,
        "cpus_per_task": args.cpus_per_task,
        "mem_per_cpu_gb": args.mem_per_cpu_gb,
        "gpus_per_task": args.gpus_per_task if phase.uses_model else 0,
    }
    if kind == "ray":
        return RayPipelineExecutor(**options)
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
    # A job whose predecessor has failed would wait for ever.
    sbatch = {"kill-on-invalid-dep": "yes"} | dict(option.partition("=")[::2] for option in args.sbatch)
    return SlurmPipelineExecutor(
        time=shlex.quote(args.time),  # datatrove writes values into the script as they are
        partition=shlex.quote(args.partition),
        qos="",
        job_name=re.sub(r"[^\w.-]+", "-", f"{work.module.partition('.')[0]}-{work}"),
        env_command="; ".join(f"export {name}={shlex.quote(str(path))}:${name}" for name, path in paths.items()),
        sbatch_args={name: value and shlex.quote(value) for name, value in sbatch.items()},
        mail_type="NONE",
        **options,
    )


def submit(executor: SlurmPipelineExecutor) -> None:
    """Submit a job array. Raises ValueError where there is no sbatch, or it refuses."""
    if shutil.which("sbatch") is None:
        raise ValueError("--executor slurm needs sbatch, which this machine lacks. Run it where jobs are submitted.")
    try:
        executor.run()
    except subprocess.CalledProcessError as error:  # sbatch has said why on the terminal
        raise ValueError(
            f"sbatch has refused {executor.pipeline[0]}, for what it says above. Check --partition, --time and "
            "--sbatch."
        ) from error


def run_in_ray(executor: RayPipelineExecutor) -> None:
    """On the Ray cluster of RAY_ADDRESS or of this machine; without one, a cluster of this machine alone."""
    require("--executor ray", "ray", "ray")
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    executor.run()


def run_here(executor: LocalPipelineExecutor) -> dict[int, str]:
    """Each rank in a process of its own, `workers` at once: what happens to one, a SIGKILL included, leaves the others.

    datatrove's own pool ends all ranks when one raises, and waits for ever for one that was killed. With one worker the
    ranks run in this process, and the error of a rank that is alone is raised as it is.

    Returns:
        Rank -> signal, of those that were killed.
    """
    loguru.logger.disable("datatrove")  # the terminal is for progress bars and errors
    left, killed = executor.get_incomplete_ranks()[::-1], {}
    if executor.workers == 1:
        for rank in left[::-1]:
            try:
                executor._run_for_rank(rank, local_rank=1)  # above 0 its log is not shown on the terminal
            except TaskFailed:
                if executor.world_size == 1:
                    raise executor.pipeline[0].error from None
        return killed
    context = multiprocess.get_context(executor.start_method)
    package = executor.pipeline[0].module.partition(".")[0] + "."
    context.set_forkserver_preload([name for name in sys.modules if name.startswith(package)])  # once for all
    gpus = _gpus() or [""]
    slots = [gpus[i % len(gpus)] for i in range(executor.workers)]
    running: dict[int, tuple[Any, int, str]] = {}  # sentinel -> process, rank, GPU
    try:
        while left or running:
            while left and slots:
                rank, gpu = left.pop(), slots.pop()
                # The server that forks them may be of an earlier start, with another environment.
                process = context.Process(target=_run_in_child, args=(executor, rank, gpu, dict(os.environ)))
                process.start()
                running[process.sentinel] = process, rank, gpu
            for sentinel in wait(list(running)):
                process, rank, gpu = running.pop(sentinel)
                process.join()
                slots.append(gpu)
                if process.exitcode < 0:
                    killed[rank] = f"was killed by {signal.Signals(-process.exitcode).name}; out of memory?"
                done = "done" if process.exitcode == 0 else "failed"
                logger.info("%s: task %d of %d is %s.", executor.pipeline[0], rank, executor.world_size, done)
    finally:
        for process, *_ in running.values():
            process.kill()
    return killed


def _run_in_child(executor: LocalPipelineExecutor, rank: int, gpu: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends its children
    threading.Thread(target=_end_with, args=(multiprocess.parent_process(),), daemon=True).start()
    loguru.logger.disable("datatrove")
    logging.basicConfig(format="%(message)s")  # warnings; what each task says of its work is in its log
    prepare_bars() if rank == 0 else no_bars()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    elif "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // executor.workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:  # it has read the variable
            sys.modules["torch"].set_num_threads(threads)
    try:
        executor._run_for_rank(rank, local_rank=1)
    except TaskFailed:
        sys.exit(1)


def _end_with(parent: Any) -> None:
    """End this process when its parent ends, however that ends: a new start must not meet its tasks."""
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    if not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
        return []  # without torch, whose import takes seconds that a stage may do without
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
