"""What a run starts with: processes, precision, log, optional packages, and the folder that it works in."""

import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from capivara_common.environment import handle_signals, processes, require
from capivara_common.files import (
    check_inputs_stay,
    check_output_folder,
    lock_folder,
    next_numbered_folder,
    partial_folder,
    remove_leftovers,
)
from training.arguments import RunArguments
from training.trainable import will_not_learn

PROCESS_TIMEOUT = timedelta(hours=24)  # the others wait while the main one prepares, checks and measures
MARKER = ".capivara-run"  # in a folder that a run may empty and rename
logger = logging.getLogger("capivara")


def set_up_logging() -> None:
    """Show the run's messages in the terminal, one line each; of libraries only warnings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("accelerate", "httpx", "httpx2"):  # the client of the Hub would show every request
        logging.getLogger(name).setLevel(logging.WARNING)


def join_processes() -> PartialState:
    """Accelerate's processes. Raises ValueError where it has not joined those that were started."""
    started = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun and of accelerate launch
    state = processes(PROCESS_TIMEOUT)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but Accelerate has joined {state.num_processes}: each would train on a "
            "batch of its own. Launch with --num_processes 1, or with one of configs/accelerate/."
        )
    return state


def create_accelerator(args: RunArguments, output_dir: Path) -> Accelerator:
    """Device, precision, processes and tracker of the run; nothing is written yet.

    Raises ValueError where codecarbon does not know the country, ImportError where a package is not installed.
    """
    # `accelerate launch` starts a lone process with one thread.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(args.num_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if (warning := will_not_learn(args)) and PartialState().is_main_process:
        logger.warning("Warning: %s", warning)
    if country := args.carbon_country:
        require("--carbon_country", "carbon", "codecarbon")
        from codecarbon.input import DataSource

        if country not in DataSource().get_global_energy_mix_data():  # it would take the world's without a word
            raise ValueError(f"carbon_country {country!r} is unknown to codecarbon: give a three-letter ISO code.")
    if args.lora_rank:
        require("--lora_rank", "lora", "peft")
    tracker = {}
    if args.tracker != "none":
        require(f"--tracker {args.tracker}", "trackers" if args.tracker == "tensorboard" else None, args.tracker)
        tracker = {"log_with": args.tracker, "project_dir": str(partial_folder(output_dir) / "trackers")}
    return Accelerator(mixed_precision=args.mixed_precision, **tracker)


def choose_output_dir(args: RunArguments, state: PartialState) -> Path:
    """The output folder of the run, the same on all processes; nothing is written yet.

    Raises ValueError where it is not empty, holds what the run reads, or an unfinished run lies beside it.
    """
    if args.output_dir is None:
        name = f"{Path(args.dataset[0]).parent.name or 'capivara'}-{args.language}"
        unfinished = sorted(Path("runs").glob(f"{name}-[0-9]*.partial")) if args.resume == "auto" else []
        chosen = unfinished[-1].with_suffix("") if unfinished else next_numbered_folder(Path("runs"), name)
        return broadcast_object_list([chosen])[0]
    if state.is_main_process:
        remove_leftovers(args.output_dir)  # before any process looks at what is there
    state.wait_for_everyone()
    if not is_complete(args, args.output_dir):
        check_output_folder(args.output_dir, args.overwrite_output_dir)
    if args.overwrite_output_dir:
        needed = [args.model, args.evaluation_dataset, *args.dataset]
        check_inputs_stay(args.output_dir, *needed, *(Path(name).parent for name in needed))  # that of `shards/*.tar`
    partial = partial_folder(args.output_dir)
    if args.resume is None and not args.overwrite_output_dir and can_resume(partial):
        raise ValueError(
            f"{partial} holds an unfinished run. Go on with it by --resume auto, or start anew with "
            "--overwrite_output_dir."
        )
    return args.output_dir


def is_complete(args: RunArguments, output_dir: Path) -> bool:
    """Whether `--resume auto` finds a complete run; one that is to replace it may be unfinished."""
    return args.resume == "auto" and (output_dir / "run.json").is_file() and not partial_folder(output_dir).exists()


def can_resume(folder: Path) -> bool:
    """Whether an unfinished run has left something that --resume can start from, or a batch to look at."""
    return any(any(folder.glob(name)) for name in ("checkpoints/step-*", "checkpoints/bad-batch-*", "run.json"))


@contextmanager
def run_folder(output_dir: Path, args: RunArguments, accelerator: Accelerator) -> Iterator[Path]:
    """The folder that a run works in, locked; it stays where it holds something to resume from.

    Raises SystemExit, in one line, where the run was stopped or its numbers failed, ValueError where another process
    works in it.
    """
    folder, lock = partial_folder(output_dir), None
    try:
        if accelerator.is_main_process:
            lock = _locked(folder)
            for left in [*folder.glob("checkpoints/tmp-*" if args.resume else "*")]:
                if left.name != MARKER:
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        accelerator.wait_for_everyone()
        with handle_signals(_stop, signal.SIGTERM):
            yield folder
    except KeyboardInterrupt as stop:  # after a step, with its words; before, between and after the steps
        number, message = stop.args or (signal.SIGINT, "Stopped.")
        way_out = f"Go on with --resume auto --output_dir {output_dir}."
        nothing = "Nothing was trained yet; run the same command again."
        print(f"\n{message} {way_out if can_resume(folder) else nothing}", file=sys.stderr)
        sys.exit(128 + number)
    except (FloatingPointError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    finally:
        if lock is not None:
            if folder.exists() and not can_resume(folder):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int:
    """The lock on the folder of a run, which is made where it is missing. ValueError where it is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ValueError(f"{folder}, where the run would work, holds files of something else. Move them.")
    (folder / MARKER).touch()
    try:
        return lock_folder(folder)
    except BlockingIOError:
        raise ValueError(
            f"another process is at work in {folder}. Wait for it, or choose another output_dir."
        ) from None


def _stop(number: int, frame: object) -> None:
    """End the work by SIGTERM as by Ctrl-C, temporary files removed; training steps handle both themselves."""
    raise KeyboardInterrupt(number, "Stopped.")
