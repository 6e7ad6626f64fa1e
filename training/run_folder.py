"""Choose, check and lock the folder of a training run.

While a run is unfinished, it works in the folder `<output_dir>.partial`, which a single process locks. The folder is
renamed to `output_dir` when the run is finished.
"""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from capivara_common import files
from capivara_common.files import RUN_MARKER, get_partial_folder_path
from training.arguments import RunArguments
from training.checkpoints import TrainingState, check_same_run


def check_matches_finished_run(folder: Path, config: dict[str, Any], data: dict[str, str]) -> None:
    """Check that a finished run was made with the same settings and data as the current run.

    Settings that do not affect the weights may differ.

    Args:
        folder: Folder of the finished run.
        config: Settings of the current run, as `RunArguments.to_dict()` returns them.
        data: `{name of a dataset split or model: digest}` of the current run. With an empty dict, only the settings are
            compared.

    Raises:
        ValueError: If a digest differs, or if a setting that affects the weights differs.
    """
    finished = files.read_json(folder / "run.json", config=dict, dataset_fingerprints=dict)
    state = TrainingState(config=finished["config"], data=finished["dataset_fingerprints"])
    check_same_run(state, config, data, folder)


def choose_and_check_output_dir(args: RunArguments, state: PartialState) -> Path:
    """Choose and check the output folder of a run, without creating it. All processes get the same folder.

    Args:
        args: Arguments of the run. If `output_dir` is None, the folder is the next free one, such as `runs/NAME-001`.
            With `resume="auto"`, it is that of the latest unfinished run instead, if there is one.
        state: Accelerate's state, which connects the processes of the run.

    Returns:
        Folder in which the finished run will be.

    Raises:
        ValueError: In one of these cases:

            - The folder is not empty, and `args.overwrite_output_dir` is not set. A complete run is accepted if
              `args.resume` is "auto".
            - The folder is a file or a mount point, or it can't be written to.
            - `args.overwrite_output_dir` is set, but the folder has files that the run reads.
            - There is an unfinished run, and neither `args.resume` nor `args.overwrite_output_dir` is set.
            - `args.resume` is set, but the folder has finished runs of several seeds.
    """
    if args.output_dir is None:
        name = f"{Path(args.dataset[0]).parent.name or 'capivara'}-{args.language}"
        unfinished = sorted(Path("runs").glob(f"{name}-[0-9]*.partial")) if args.resume == "auto" else []
        chosen = unfinished[-1].with_suffix("") if unfinished else find_free_numbered_folder(Path("runs"), name)
        return broadcast_object_list([chosen])[0]
    if state.is_main_process:
        # If a run was killed while it renamed its folder, temporary folders are left over. They are removed or renamed
        # back here, before any process checks the output folder.
        files.remove_or_restore_leftovers(args.output_dir)
    state.wait_for_everyone()
    if args.resume and (seeds := files.list_seed_run_folders(args.output_dir)):
        names = ", ".join(folder.name for folder in seeds)
        raise ValueError(
            f"{args.output_dir} holds finished runs of several seeds ({names}), which can't be resumed together. "
            "To resume one of them, use its folder as --output_dir, and its --seed."
        )
    if not is_run_complete(args, args.output_dir):
        files.check_output_folder_and_clean_leftovers(args.output_dir, args.overwrite_output_dir)
    if args.overwrite_output_dir:
        needed = [args.model, args.evaluation_dataset, *args.dataset]
        # The parent folders are checked as well, because an input can be a file pattern such as `shards/*.tar`. The
        # files that match this pattern are in the folder `shards`.
        files.check_inputs_outside(args.output_dir, *needed, *(Path(name).parent for name in needed))
    partial = get_partial_folder_path(args.output_dir)
    if args.resume is None and not args.overwrite_output_dir and _can_resume(partial):
        raise ValueError(
            f"{partial} holds an unfinished run. Resume it with --resume auto, or start again with "
            "--overwrite_output_dir."
        )
    return args.output_dir


def find_free_numbered_folder(parent: Path, name: str) -> Path:
    """Return the first free folder of the sequence `parent/name-001`, `parent/name-002`, and so on.

    `parent/name-001` is free if neither this folder nor `parent/name-001.partial` exists. The second folder would
    belong to an unfinished run.
    """
    folders = (parent / f"{name}-{number:03d}" for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists() and not get_partial_folder_path(folder).exists())


def is_run_complete(args: RunArguments, output_dir: Path) -> bool:
    """Return whether a run that should be resumed is already complete, so that there is nothing left to train.

    The result is False if `args.resume` is not "auto", or if an unfinished run will replace the complete run.

    Args:
        args: Arguments of the run.
        output_dir: Folder of the run.
    """
    partial = get_partial_folder_path(output_dir)
    return args.resume == "auto" and (output_dir / "run.json").is_file() and not partial.exists()


def _can_resume(folder: Path) -> bool:
    """Return whether the folder of an unfinished run has a checkpoint or a trained model to resume from."""
    return any(folder.glob("checkpoints/step-*")) or (folder / "run.json").is_file()


@contextmanager
def handle_signals_temporarily(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Handle signals, such as SIGTERM, with `handler` inside of the `with` block, then restore the previous handlers.

    Does nothing outside of the main thread, because Python can set signal handlers only there.

    Args:
        handler: Function that gets the number of the signal and the current stack frame.
        numbers: Numbers of the signals.
    """
    previous_handlers = {}
    with suppress(ValueError):
        previous_handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)


@contextmanager
def lock_run_folder_and_exit_on_interrupt(
    output_dir: Path, args: RunArguments, accelerator: Accelerator
) -> Iterator[Path]:
    """Create and lock the working folder of a run, and end the program with a message if the run is interrupted.

    The `with` block unlocks the folder at its end, and deletes it if it has nothing to resume from.

    Args:
        output_dir: Folder of the finished run. The working folder is `output_dir.partial`.
        args: Arguments of the run. If `resume` is None, files of an earlier unfinished run are deleted.
        accelerator: Processes of the run; the main process holds the lock.

    Yields:
        The working folder.

    Raises:
        ValueError: If another process works in the folder, or it holds other files.
        SystemExit: If the run was interrupted, a loss or gradient was not finite, or a weights file was damaged.
    """
    folder, lock = get_partial_folder_path(output_dir), None
    try:
        if accelerator.is_main_process:
            lock = _create_and_lock_run_folder(folder)
            for leftover in [*folder.glob("checkpoints/tmp-*" if args.resume else "*")]:
                if leftover.name != RUN_MARKER:
                    shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
        accelerator.wait_for_everyone()
        with handle_signals_temporarily(_raise_interrupt, signal.SIGTERM):
            yield folder
    except KeyboardInterrupt as stop:
        # Usually, the exception has two arguments: the number of the signal and a message. It has none after a Ctrl-C
        # before or after training, or after a second Ctrl-C during training.
        number, message = stop.args or (signal.SIGINT, "Stopped.")
        hint = "Nothing has been trained yet; run the same command again."
        if _can_resume(folder):
            hint = f"Resume with --resume auto --output_dir {output_dir}."
        print(f"\n{message} {hint}", file=sys.stderr)
        sys.exit(128 + number)
    except (FloatingPointError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    finally:
        if lock is not None:
            if folder.exists() and not _can_resume(folder):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _create_and_lock_run_folder(folder: Path) -> int:
    """Lock the folder that a run works in, and return the file descriptor of the lock. Creates the folder if necessary.

    Raises:
        ValueError: If another process has the lock, or the folder holds files that do not belong to a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / RUN_MARKER).exists():
        raise ValueError(
            f"{folder}, the working folder of the run, holds files that are not from a training run. Move them away."
        )
    (folder / RUN_MARKER).touch()
    try:
        return files.acquire_folder_lock(folder)
    except BlockingIOError:
        raise ValueError(
            f"Another process is training in {folder}. Wait for it, or choose another output_dir."
        ) from None


def _raise_interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt for SIGTERM, so that temporary files are removed as after Ctrl-C.

    During training, the training loop replaces this handler.
    """
    raise KeyboardInterrupt(number, "Stopped.")
