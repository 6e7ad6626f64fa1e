"""Long work on datatrove's executors: this machine's processes, job arrays of a Slurm cluster, or a Ray cluster.

    execute(Work.of(args), args)

Every phase of the work (`Phase` of `tasks.py`) is a datatrove pipeline of one step, `Task`, and depends on the phase
before. datatrove skips tasks with a completion file; here these files are made anew at every start, from the parts that
are on the disk, so that what is done stays done when the number of tasks changes, and what was removed is made again.
A task that fails leaves the others at work; why it failed is in `failures/RANK.txt` beside its log.
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
from dataclasses import dataclass
from functools import cached_property
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

from capivara_common.environment import require
from capivara_common.files import write_text
from capivara_common.progress import no_bars, prepare_bars
from capivara_common.tasks import ExecutorArguments, Phase

ROOT = Path(__file__).resolve().parents[1]  # that tasks on other machines import the code from
FAILURES_NAMED = 8
EXPECTED = (ValueError, OSError, ImportError)  # whose message is enough; of others the traceback is kept

logger = logging.getLogger("capivara")


class TaskFailed(Exception):
    """A task has raised `error`."""

    def __init__(self, text: str, error: Exception | None = None):
        super().__init__(text)
        self.error = error

    def __reduce__(self):  # Ray pickles it
        return type(self), (str(self),)


class TasksFailed(ValueError):
    """Some tasks of a phase have failed, the others are done; the text names them."""


@dataclass(frozen=True)
class Work:
    """One phase of a command's work.

    Attributes:
        module: that has the phase in its `PHASES`.
        phase: name.
        args: of the command.
        logs: folder of the logs, completions and failures of its tasks.
        title: for people.
    """

    module: str
    phase: str
    args: Any
    logs: Path
    title: str

    @classmethod
    def of(cls, args: ExecutorArguments, title: str = "") -> "list[Work]":
        """All phases of `args.module`."""
        title = title or args.module.rpartition(".")[2]
        phases = import_module(args.module).PHASES
        return [cls(args.module, name, args, args.logs / name, f"{title}: {name}") for name in phases]

    @property
    def package(self) -> str:
        """The room that the work is of."""
        return self.module.partition(".")[0]

    def definition(self) -> Phase:
        """What the module says of the phase."""
        return import_module(self.module).PHASES[self.phase]


class Task:
    """The step of a pipeline: one rank of a phase. It is pickled by names, so that other machines find its code."""

    def __init__(self, work: Work):
        self.work = work

    def __repr__(self) -> str:
        return self.work.title

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Raises TaskFailed, which holds no frame with the values of a failed call."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        path, failed = failure_path(self.work.logs, rank), None
        path.unlink(missing_ok=True)
        try:
            report = self.work.definition().run(self.work.args, rank, world_size)
            loguru.logger.info(f"{self.work.title}, task {rank} of {world_size}: {report or 'done'}")
        except Exception as error:
            failed = error
            text = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
            if not isinstance(error, EXPECTED):
                text = f"{type(error).__name__}: {text}\n\n{traceback.format_exc()}"
        if failed is not None:
            write_text(path, text)
            raise TaskFailed(text.split("\n\n")[0], failed)


def failure_path(logs: Path, rank: int) -> Path:
    """Where a task says why it has failed."""
    return logs / "failures" / f"{rank:05d}.txt"


def failures(logs: Path) -> dict[int, str]:
    """Rank -> why its task has failed, of those that have at their last run."""
    paths = sorted((logs / "failures").glob("*.txt"))
    return {int(path.stem): path.read_text(encoding="utf-8").split("\n\n")[0] for path in paths}


def execute(works: Sequence[Work], args: ExecutorArguments) -> bool:
    """Run phases one after the other; those that are done already are not started.

    Returns:
        Whether they are complete now. False: Slurm has taken the jobs.

    Raises:
        ValueError, OSError, ImportError: of a task that is alone.
        TasksFailed: some tasks of several have failed, and nothing that needs them was started.
    """
    last: PipelineExecutor | None = None
    for work in works:
        own = work.args if isinstance(work.args, ExecutorArguments) else args
        last = _executor(args.executor, work, own, last)
    if last is not None:
        last.run()
    return args.executor != "slurm"


def _executor(kind: str, work: Work, args: ExecutorArguments, before: PipelineExecutor | None) -> PipelineExecutor:
    phase = work.definition()
    options: dict[str, Any] = {"pipeline": [Task(work)], "logging_dir": str(work.logs), "depends": before}
    workers = -1 if args.workers is None else args.workers
    if kind == "local":
        workers = args.workers or len(_gpus()) or 1
        options["tasks"] = 1 if phase.finished is None else args.tasks or workers
        return LocalExecutor(workers=min(workers, options["tasks"]), **options)
    options |= {
        "tasks": 1 if phase.finished is None else args.tasks,
        "workers": workers,
        "cpus_per_task": args.cpus_per_task,
        "mem_per_cpu_gb": args.mem_per_cpu_gb,
        "gpus_per_task": args.gpus_per_task if phase.uses_model else 0,
    }
    if kind == "ray":
        return RayExecutor(**options)
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
    return SlurmExecutor(
        time=args.time,
        partition=args.partition,
        qos="",
        job_name=re.sub(r"[^\w.-]+", "-", f"{work.package}-{work.title}"),
        env_command="; ".join(f"export {name}={shlex.quote(str(path))}:${name}" for name, path in paths.items()),
        # A job whose predecessor has failed would wait for ever.
        sbatch_args={"kill-on-invalid-dep": "yes"} | dict(option.partition("=")[::2] for option in args.sbatch),
        mail_type="NONE",
        **options,
    )


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    if not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()):
        return []  # without torch, whose import takes seconds that a stage may do without
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class _Executor:
    """What the three executors below have in common."""

    @cached_property
    def work(self) -> Work:
        return self.pipeline[0].work

    def note_finished(self) -> None:
        """Let the completion files be those of the tasks with nothing left to do."""
        find = self.work.definition().finished
        finished = find(self.work.args, self.world_size) if find else []
        folder = self.work.logs / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for path in (self.work.logs / "failures").glob("*.txt"):  # of a start with other tasks, maybe
            path.unlink()
        for rank in finished:
            self.mark_rank_as_completed(rank)

    def run_before(self) -> None:
        """Run what this one depends on; it raises where tasks fail, and is not needed any longer."""
        before, self.depends = self.depends, None
        if before is not None:
            before.run()

    def check(self, killed: dict[int, str] | None = None) -> None:
        """Raises TasksFailed where tasks are incomplete."""
        reasons = (killed or {}) | failures(self.work.logs)
        if left := self.get_incomplete_ranks():
            named = [f"task {rank}: {reasons.get(rank, 'ended without a word')}" for rank in left[:FAILURES_NAMED]]
            more = f"\n  and {len(left) - FAILURES_NAMED} more" * (len(left) > FAILURES_NAMED)
            raise TasksFailed(
                f"{self.work.title}: {len(left)} of {self.world_size} tasks have failed, the others are done.\n  "
                + "\n  ".join(named)
                + f"{more}\nLogs: {self.work.logs}. The same command does what is missing."
            )


class LocalExecutor(_Executor, LocalPipelineExecutor):
    """Tasks in processes of their own: what happens to one, a SIGKILL included, leaves the others at work.

    datatrove's own pool ends all tasks when one raises, and waits for ever for one that was killed. With one worker the
    tasks run in this process.
    """

    def run(self) -> None:
        """Do the tasks that are not done yet, on this machine's processes."""
        self.run_before()
        self.note_finished()
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        loguru.logger.disable("datatrove")  # the terminal is for progress bars and errors
        self.save_executor_as_json()
        if self.workers > 1:
            self.check(self._run_in_processes(ranks))
            return
        for rank in ranks:
            try:
                self._run_for_rank(rank, local_rank=1)  # above 0 its log is not shown on the terminal
            except TaskFailed as failed:
                if self.world_size == 1:
                    raise failed.error from None
        self.check()

    def _run_in_processes(self, ranks: list[int]) -> dict[int, str]:
        """Returns rank -> signal, of those that were killed."""
        context = multiprocess.get_context(self.start_method)
        package = f"{self.work.package}."
        context.set_forkserver_preload([name for name in sys.modules if name.startswith(package)])  # once for all
        gpus = _gpus()
        left, slots, killed = ranks[::-1], [gpus[i % len(gpus)] if gpus else "" for i in range(self.workers)], {}
        running: dict[int, tuple[Any, int, str]] = {}  # sentinel -> process, rank, GPU
        try:
            while left or running:
                while left and slots:
                    rank, gpu = left.pop(), slots.pop()
                    # The server that forks them may be of an earlier start, with another environment.
                    process = context.Process(target=self._run_in_child, args=(rank, gpu, dict(os.environ)))
                    process.start()
                    running[process.sentinel] = process, rank, gpu
                for sentinel in wait(list(running)):
                    process, rank, gpu = running.pop(sentinel)
                    process.join()
                    slots.append(gpu)
                    if process.exitcode < 0:
                        killed[rank] = f"was killed by {signal.Signals(-process.exitcode).name}; out of memory?"
                    done = "done" if process.exitcode == 0 else "failed"
                    logger.info("%s: task %d of %d is %s.", self.work.title, rank, self.world_size, done)
        finally:
            for process, *_ in running.values():
                process.kill()
        return killed

    def _run_in_child(self, rank: int, gpu: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends its children
        threading.Thread(target=_end_with, args=(multiprocess.parent_process(),), daemon=True).start()
        loguru.logger.disable("datatrove")
        logging.basicConfig(format="%(message)s")  # warnings; what each task says of its work is in its log
        prepare_bars() if rank == 0 else no_bars()
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        elif "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, (os.cpu_count() or 1) // self.workers)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            if "torch" in sys.modules:  # it has read the variable
                sys.modules["torch"].set_num_threads(threads)
        try:
            self._run_for_rank(rank, local_rank=1)
        except TaskFailed:
            sys.exit(1)


class SlurmExecutor(_Executor, SlurmPipelineExecutor):
    """Submits a job array, which starts when the jobs it depends on are done."""

    def launch_job(self) -> None:
        """Submit the job array. Raises ValueError where there is no sbatch, or it refuses."""
        if shutil.which("sbatch") is None:
            raise ValueError(
                "--executor slurm needs sbatch, which this machine lacks. Run it where jobs are submitted."
            )
        self.note_finished()
        try:
            super().launch_job()
        except subprocess.CalledProcessError as error:  # sbatch has said why on the terminal
            raise ValueError(
                f"sbatch has refused {self.work.title}, for what it says above. Check --partition, --time and --sbatch."
            ) from error
        if self.job_id == -1 and self.depends_job_id:  # nothing to do: what comes next waits for what came before
            self.job_id = self.depends_job_id

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """datatrove's script, with what it does not quote: the values that sbatch reads, and the path."""
        logs = self.slurm_logs_folder  # "%j" in its name is no job's number
        texts = {name: str(value).replace(logs, logs.replace("%", "%%")) for name, value in sbatch_args.items()}
        quoted = {name: shlex.quote(text) if text else text for name, text in texts.items()}
        path = self.logging_dir.resolve_paths("executor.pik")
        return super().get_launch_file_contents(quoted, run_script.replace(path, shlex.quote(path)))

    def launch_merge_stats(self) -> None:
        """No job for datatrove's statistics: what was done is said by the parts."""

    def is_rank_completed(self, rank: int) -> bool:
        """In the job, too: when it was submitted the rows of the stage before were not known."""
        find = self.work.definition().finished
        return super().is_rank_completed(rank) or (find and rank in find(self.work.args, self.world_size))


class RayExecutor(_Executor, RayPipelineExecutor):
    """Tasks on the Ray cluster of RAY_ADDRESS or of this machine; without one, a cluster of this machine alone."""

    def run(self) -> None:
        """Do the tasks that are not done yet, on the Ray cluster."""
        require("--executor ray", "ray", "ray")
        import ray

        if not ray.is_initialized():
            ray.init(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
        self.run_before()
        self.note_finished()
        super().run()
        self.check()


def _end_with(parent: Any) -> None:
    """End this process when its parent ends, however that ends: a new start must not meet its tasks."""
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
