"""The folder of a run: where it is, which process works in it, and what an unfinished run is resumed from."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from capivara_common.environment import handle_signals
from capivara_common.files import (
    check_output_folder,
    lock_folder,
    next_numbered_folder,
    no_space_left,
    partial_folder,
    remove_leftovers,
)
from training.arguments import RunArguments
from training.loop import Interrupted

RESUMABLE_FILES = ("checkpoints/step-*", "checkpoints/bad-batch-*", "records.json")  # what is kept of a stopped run
MARKER = ".capivara-run"  # in a folder that a run may empty and rename


def choose_output_dir(args: RunArguments, state: PartialState) -> Path:
    """The output folder of the run, the same on all processes; nothing is written yet.

    Raises:
        ValueError: the folder is not empty, holds what the run reads, or an unfinished run lies beside it.
    """
    if args.output_dir is None:
        name = f"{Path(args.dataset[0]).parent.name or 'capivara'}-{args.language}"
        unfinished = sorted(Path("runs").glob(f"{name}-[0-9]*.partial"))
        chosen = [next_numbered_folder(Path("runs"), name)]
        if args.resume == "auto" and unfinished:
            chosen = [unfinished[-1].with_suffix("")]
        return broadcast_object_list(chosen)[0]
    if state.is_main_process:
        remove_leftovers(args.output_dir)  # before any process looks at what is there
    state.wait_for_everyone()
    if not is_complete(args, args.output_dir):
        check_output_folder(args.output_dir, args.overwrite_output_dir)
    for needed in map(Path, (Path.cwd(), args.model, args.evaluation_dataset, *args.dataset)):
        if args.overwrite_output_dir and needed.resolve().is_relative_to(args.output_dir.resolve()):
            raise ValueError(
                f"The output folder {args.output_dir} holds {needed}, which the run needs. Choose another."
            )
    partial = partial_folder(args.output_dir)
    if args.resume is None and not args.overwrite_output_dir and can_resume(partial):
        raise ValueError(
            f"{partial} holds an unfinished run. Go on with it by --resume auto, or start anew with "
            "--overwrite_output_dir."
        )
    return args.output_dir


def is_complete(args: RunArguments, output_dir: Path) -> bool:
    """Whether `--resume auto` finds a complete run; one that is to replace it may be unfinished."""
    complete = (output_dir / "run.json").is_file()
    return args.resume == "auto" and complete and not partial_folder(output_dir).exists()


def can_resume(folder: Path) -> bool:
    """Whether an unfinished run has left something that --resume can start from."""
    return any(any(folder.rglob(name)) for name in RESUMABLE_FILES)


def remove_work_files(output_dir: Path) -> None:
    """Remove from a complete run what only an unfinished one needs."""
    for path in [output_dir / MARKER, *output_dir.rglob("records.json")]:
        path.unlink(missing_ok=True)


@contextmanager
def run_folder(output_dir: Path, args: RunArguments, accelerator: Accelerator) -> Iterator[Path]:
    """The folder that a run works in, locked; it stays where it holds something to resume from.

    Raises:
        SystemExit: the folder can't be made, another process works in it, the run was stopped, or its data, the
            numbers or the disk have failed; the message is one line.
    """
    folder, main_process = partial_folder(output_dir), accelerator.is_main_process
    with _claimed(folder) if main_process else nullcontext():
        if main_process and args.resume is None:
            for path in [path for path in folder.iterdir() if path.name != MARKER]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        accelerator.wait_for_everyone()
        try:
            with handle_signals(_stop, signal.SIGTERM):
                yield folder
        except (Interrupted, KeyboardInterrupt) as stop:  # after a step; before, between and after the steps
            message, number = "Stopped.", stop.args[0] if stop.args else signal.SIGINT
            if isinstance(stop, Interrupted):
                message, number = str(stop), stop.signal
            way_out = "Nothing was trained yet; run the same command again."
            if can_resume(folder):
                way_out = f"Go on with --resume auto --output_dir {output_dir}."
            print(f"\n{message} {way_out}", file=sys.stderr)
            sys.exit(128 + number)
        except (ValueError, FloatingPointError, OSError, ImportError, SafetensorError) as error:
            full = no_space_left(error) and "Free" not in str(error)
            sys.exit(f"error: {error}" + f". Free some space on the disk of {folder}" * full)
        finally:
            if main_process and folder.exists() and not can_resume(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """A lock on the folder of a run, which is made where it is missing. Exits where another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MARKER).exists():
            sys.exit(f"error: {folder}, where the run would work, holds files of something else. Move them.")
        (folder / MARKER).touch()
        lock = lock_folder(folder)
    except BlockingIOError:
        sys.exit(f"error: another process is at work in {folder}. Wait for it, or choose another output_dir.")
    except OSError as error:
        sys.exit(f"error: the folder {folder}, where the run would work, can't be made: {error}")
    try:
        yield
    finally:
        os.close(lock)


def _stop(number: int, frame: Any) -> None:
    """End the work by SIGTERM as by Ctrl-C, temporary files removed; training steps handle both themselves."""
    raise KeyboardInterrupt(number)
