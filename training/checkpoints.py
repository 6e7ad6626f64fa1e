"""Save and load checkpoints of a training run, and manage the folder that the run works in.

A checkpoint is a folder with the state that Accelerate saves. The folder gets its final name only when the checkpoint
is complete. SHA-256 checksums of all files are stored in the folder, and compared before a file is loaded. A checkpoint
holds weights, optimizer state, fp16 scaler and training curve. They are enough to resume with bit-identical results,
because everything random depends only on the seed and the step number. Accelerate's own
`ProjectConfiguration(automatic_checkpoint_naming=True)` is not used, because it does not keep the best checkpoint, and
a killed process would leave an incomplete checkpoint.
"""

import hashlib
import itertools
import logging
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from capivara_common.files import (
    RUN_MARKER,
    acquire_folder_lock,
    check_inputs_outside,
    list_seed_run_folders,
    partial_folder,
    prepare_output_folder,
    read_json,
    remove_or_restore_leftovers,
    write_bytes,
    write_json,
)
from training.arguments import RunArguments

STATE_FILE = "trainer.json"
# Checksums of all other files of a checkpoint, in the format of `sha256sum`. CPUs have instructions for SHA-256, which
# make it faster than BLAKE2 here.
CHECKSUM_FILE = "SHA256SUMS"
LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".json")  # files that loading a checkpoint may read
# Settings that may differ between a run and its continuation, because they do not affect the weights. `hub_strategy`
# and `carbon_country` no longer exist, but runs of earlier versions still have them.
CHANGEABLE_SETTINGS = {
    *("output_dir", "overwrite_output_dir", "resume", "save_steps", "keep_last", "tracker"),
    *("loading_workers", "num_threads", "max_bad_share", "push_to_hub", "hub_model_id", "hub_private"),
    *("hub_strategy", "carbon_country"),
}
# Default of every setting. If a run was started before a setting existed, it is compared with this default.
SETTING_DEFAULTS = {setting.name: setting.default for setting in fields(RunArguments)}
logger = logging.getLogger("capivara")


@dataclass
class TrainingState:
    """Progress of a training run, and the settings and data that the run started with.

    It is stored in the checkpoint's file trainer.json, with the names of the fields as keys.
    """

    step: int = 0  # optimizer steps completed
    curve: list[dict] = field(default_factory=list)  # one entry per step, see `eval.records.plots.plot_training_curves`
    config: dict[str, Any] = field(default_factory=dict)  # `RunArguments.to_dict()`
    data: dict[str, str] = field(default_factory=dict)  # name of a dataset or model -> fingerprint of its content
    skipped: list[dict[str, Any]] = field(default_factory=list)  # rows whose image turned out to be bad during training
    best_step: int | None = None  # step of the highest validation recall so far; None before the first evaluation
    best_recall: float | None = None  # mean recall of both directions at `best_step`, from 0 to 1
    seconds: float = 0.0  # training time so far
    threads: int = 0  # number of CPU threads; it affects the last bits of the result
    device: str = ""  # device and number of processes as a text; both affect the last bits of the result


@dataclass
class Checkpoints:
    """Checkpoints of a training run, in folders named `step-00000100` and so on.

    The latest checkpoints and the checkpoint with the best validation recall are kept; other checkpoints are deleted.
    """

    folder: Path  # folder that holds the folders of all checkpoints
    keep_last: int  # number of latest checkpoints to keep
    accelerator: Accelerator  # holds the model and the optimizer that are saved and loaded

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in ascending order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-" + "[0-9]" * 8))

    def path(self, step: int) -> Path:
        """Return the folder for the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def find_resume_checkpoint(self, args: RunArguments) -> Path | None:
        """Return the folder of the checkpoint to resume from.

        Args:
            args: Arguments of the run. `args.resume` is None for a new run, "auto" for the latest checkpoint, or the
                folder of a checkpoint.

        Returns:
            The folder. None for a new run, and for "auto" if there is no checkpoint.

        Raises:
            ValueError: If the checkpoint is damaged, or was written with other settings.
        """
        steps = self.steps()
        if args.resume is None or (args.resume == "auto" and not steps):
            return None
        path = self.path(steps[-1]) if args.resume == "auto" else Path(args.resume)
        check_same_run(read_training_state(path), args.to_dict(), {}, path)
        return path

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of the current step, then delete old checkpoints except the best one.

        Does nothing if the step already has a checkpoint. All processes must call this method.

        Args:
            state: State of the run after the current step.

        Raises:
            OSError: If the checkpoint can't be written. Earlier checkpoints are not changed.
        """
        path = self.path(state.step)
        if path.exists():
            return
        temporary = self.folder / f"tmp-{path.name}"
        try:
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_json(temporary / STATE_FILE, asdict(state))
                write_bytes(temporary / CHECKSUM_FILE, build_sha256sum_content(temporary))
                temporary.rename(path)
                for old in {*self.steps()[: -self.keep_last]} - {state.best_step}:
                    # Renamed first, so that a process killed during deletion leaves no checkpoint that looks valid.
                    outdated = self.folder / f"tmp-old-{old:08d}"
                    self.path(old).rename(outdated)
                    shutil.rmtree(outdated, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch reports a full disk as RuntimeError, safetensors as SafetensorError.
            raise OSError(
                f"The checkpoint of step {state.step} can't be written to {self.folder}: {error}. Earlier checkpoints "
                "are complete. Free some space and resume with --resume auto."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def load(self, path: Path, current: TrainingState) -> TrainingState:
        """Load weights and optimizer state into the objects that Accelerate has prepared.

        Args:
            path: Folder of the checkpoint.
            current: State of the run that is starting; its settings and data must match the checkpoint's.

        Returns:
            The saved state of the run.

        Raises:
            ValueError: If the checkpoint is damaged, holds pickled objects other than tensors, or belongs to a run with
                other settings or data.
        """
        saved = read_training_state(path)
        check_same_run(saved, current.config, current.data, path)
        try:
            self.accelerator.load_state(str(path))
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"The checkpoint {path} can't be loaded: it holds more than tensors ({type(error).__name__}). Delete "
                "it; --resume auto then resumes from an earlier checkpoint or starts again."
            ) from error
        logger.info("Resuming from %s.", path)
        if (saved.device, saved.threads) != (current.device, current.threads):
            logger.warning(
                f"The run used {saved.threads} CPU threads on {saved.device} so far, and now uses {current.threads} on "
                f"{current.device}. The last bits of the result may differ from those of an uninterrupted run. To "
                f"avoid this, resume on the same device with --num_threads {saved.threads}."
            )
        return saved


def read_training_state(path: Path) -> TrainingState:
    """Read the state of a run from a checkpoint, after comparing the checksums of all its files.

    Raises:
        ValueError: If `path` is not a checkpoint, or is damaged.
    """
    if not (path / STATE_FILE).is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {STATE_FILE}. Give the folder of a checkpoint.")
    _check_checkpoint_files(path)
    try:
        return TrainingState(**read_json(path / STATE_FILE, step=int, curve=list, config=dict, data=dict))
    except TypeError as error:
        raise ValueError(
            f"{path / STATE_FILE} does not hold the state of a run of this version: {error}. Use another checkpoint."
        ) from error


def _check_checkpoint_files(path: Path) -> None:
    """Compare the files of a checkpoint with its checksums.

    Raises:
        ValueError: If a file is missing or has changed, or if the folder has an additional file that loading the
            checkpoint would read. The message names these files.
    """
    listed = (path / CHECKSUM_FILE).read_bytes() if (path / CHECKSUM_FILE).is_file() else b""
    expected, actual = ({*sums.split(b"\n")} for sums in (listed, build_sha256sum_content(path)))
    name_start = 66  # a line is the digest, 64 hexadecimal digits, then two spaces and the file name
    names = {line[name_start:].decode("utf-8", "replace") for line in expected - actual}
    additional = [line[name_start:].decode() for line in actual - expected]
    names |= {name for name in additional if name.endswith(LOADED_SUFFIXES)}
    if names:
        raise ValueError(
            f"The checkpoint {path} can't be loaded: {', '.join(sorted(names))} or {CHECKSUM_FILE} has changed since "
            "it was written. Delete the checkpoint; --resume auto then resumes from an earlier one or starts again."
        )


def check_same_run(state: TrainingState, config: dict[str, Any], data: dict[str, str], path: Path) -> None:
    """Check that a checkpoint or a finished run has the settings and data of the current run.

    Args:
        state: State of the checkpoint or the finished run.
        config: Settings of the current run, as `RunArguments.to_dict()` returns them.
        data: Fingerprints of the current run: name of a dataset split or model -> fingerprint. Names that are missing
            here are not compared.
        path: Folder of the checkpoint or the finished run, for messages.

    Raises:
        ValueError: If a fingerprint or a setting that affects the weights differs, or if the checkpoint or finished run
            has settings that this version does not know. The message names all of them.
    """
    if unknown := sorted(state.config.keys() - SETTING_DEFAULTS.keys() - CHANGEABLE_SETTINGS):
        raise ValueError(
            f"{path} has settings of an earlier version of the program, which this version does not know: "
            f"{', '.join(unknown)}. A finished model in it can still be used. To train again, use another --output_dir."
        )
    # Compare only whether an image cache is used, not its location: cached embeddings are float16, others are not.
    old, new = ({**c, "image_embedding_cache": c.get("image_embedding_cache") != "off"} for c in (state.config, config))
    differences = {
        key: (state.config.get(key), config.get(key))
        for key in sorted({*old, *new} - CHANGEABLE_SETTINGS)
        if old.get(key, SETTING_DEFAULTS.get(key)) != new.get(key)
    }
    differences |= {f"data {key}": (state.data.get(key), data[key]) for key in data if state.data.get(key) != data[key]}
    if differences:
        listed = "; ".join(f"{key}: {old!r} in that run, {new!r} now" for key, (old, new) in differences.items())
        raise ValueError(
            f"{path} belongs to a run with other settings. {listed}. Use the same, or another --output_dir."
        )


def check_matches_finished_run(folder: Path, config: dict[str, Any], data: dict[str, str]) -> None:
    """Check that a finished run has the settings and data of the current run.

    Args:
        folder: Folder of the finished run.
        config: Settings of the current run, as `RunArguments.to_dict()` returns them.
        data: Fingerprints of the current run: name of a dataset split or model -> fingerprint. With an empty dict, only
            the settings are compared.

    Raises:
        ValueError: If a fingerprint or a setting that affects the weights differs.
    """
    finished = read_json(folder / "run.json", config=dict, dataset_fingerprints=dict)
    check_same_run(
        TrainingState(config=finished["config"], data=finished["dataset_fingerprints"]), config, data, folder
    )


def choose_and_check_output_dir(args: RunArguments, state: PartialState) -> Path:
    """Choose and check the output folder of a run, without creating it. All processes get the same folder.

    Args:
        args: Arguments of the run. If `output_dir` is None, the next free folder such as `runs/NAME-001` is chosen. If
            there are unfinished runs and `resume` is "auto", the folder of the latest unfinished run is chosen instead.
        state: Processes of the run.

    Returns:
        Folder that the finished run will have.

    Raises:
        ValueError: If the folder is not empty or holds finished runs of several seeds, if it would be overwritten but
            contains files that the run reads, or if the new run would replace an unfinished run.
    """
    if args.output_dir is None:
        name = f"{Path(args.dataset[0]).parent.name or 'capivara'}-{args.language}"
        unfinished = sorted(Path("runs").glob(f"{name}-[0-9]*.partial")) if args.resume == "auto" else []
        chosen = unfinished[-1].with_suffix("") if unfinished else next_numbered_folder(Path("runs"), name)
        return broadcast_object_list([chosen])[0]
    if state.is_main_process:
        remove_or_restore_leftovers(args.output_dir)  # before any process checks the folder
    state.wait_for_everyone()
    if args.resume and (seeds := list_seed_run_folders(args.output_dir)):
        names = ", ".join(folder.name for folder in seeds)
        raise ValueError(
            f"{args.output_dir} holds finished runs of several seeds ({names}), which can't be resumed together. "
            "Choose one of these folders, with its --seed."
        )
    if not is_run_complete(args, args.output_dir):
        prepare_output_folder(args.output_dir, args.overwrite_output_dir)
    if args.overwrite_output_dir:
        needed = [args.model, args.evaluation_dataset, *args.dataset]
        # Check the parent folders as well, because an input can be a pattern such as `shards/*.tar`, whose files lie in
        # its parent folder.
        check_inputs_outside(args.output_dir, *needed, *(Path(name).parent for name in needed))
    partial = partial_folder(args.output_dir)
    if args.resume is None and not args.overwrite_output_dir and _can_resume(partial):
        raise ValueError(
            f"{partial} holds an unfinished run. Resume it with --resume auto, or start again with "
            "--overwrite_output_dir."
        )
    return args.output_dir


def next_numbered_folder(parent: Path, name: str) -> Path:
    """Return the first free folder of the sequence `parent/name-001`, `parent/name-002`, and so on.

    A folder is free if it does not exist and there is no unfinished run for it (`parent/name-001.partial`).
    """
    folders = (parent / f"{name}-{number:03d}" for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists() and not partial_folder(folder).exists())


def is_run_complete(args: RunArguments, output_dir: Path) -> bool:
    """Return whether there is nothing to resume, because the run in `output_dir` is complete.

    Args:
        args: Arguments of the run. The result is False unless `args.resume` is "auto".
        output_dir: Folder of the run.

    Returns:
        True if the folder holds a complete run, and there is no unfinished run that will replace it.
    """
    return args.resume == "auto" and (output_dir / "run.json").is_file() and not partial_folder(output_dir).exists()


def _can_resume(folder: Path) -> bool:
    """Return whether the folder of an unfinished run has a checkpoint or a trained model to resume from."""
    return any(folder.glob("checkpoints/step-*")) or (folder / "run.json").is_file()


@contextmanager
def handle_signals(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Handle signals with `handler` inside of the `with` block, then restore the previous handlers.

    Does nothing in other threads than the main thread, because Python sets signal handlers only there.

    Args:
        handler: Function that gets the number of the signal and the current stack frame.
        numbers: Numbers of the signals.
    """
    try:
        previous_handlers = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        previous_handlers = {}
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)


@contextmanager
def locked_run_folder(output_dir: Path, args: RunArguments, accelerator: Accelerator) -> Iterator[Path]:
    """Create and lock the folder that a run works in.

    At the end of the `with` block, the folder is unlocked. It is also deleted if it has nothing to resume from.

    Args:
        output_dir: Folder of the finished run. The run works in the folder `output_dir.partial`.
        args: Arguments of the run. If `resume` is None, files of an earlier unfinished run are deleted from the folder.
        accelerator: Processes of the run; the main process holds the lock.

    Yields:
        The folder that the run works in.

    Raises:
        ValueError: If another process works in the folder, or it holds files that do not belong to a run.
        SystemExit: If the run was interrupted, a loss or gradient was not finite, or a weights file was damaged. The
            user sees a message.
    """
    folder, lock = partial_folder(output_dir), None
    try:
        if accelerator.is_main_process:
            lock = _create_and_lock_run_folder(folder)
            for leftover in [*folder.glob("checkpoints/tmp-*" if args.resume else "*")]:
                if leftover.name != RUN_MARKER:
                    shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
        accelerator.wait_for_everyone()
        with handle_signals(_raise_interrupt, signal.SIGTERM):
            yield folder
    except KeyboardInterrupt as stop:
        # The training loop adds the signal and a message; Ctrl-C before or after training has neither.
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
            f"{folder}, the working folder of the run, holds files that are not from a training run. Move them."
        )
    (folder / RUN_MARKER).touch()
    try:
        return acquire_folder_lock(folder)
    except BlockingIOError:
        raise ValueError(
            f"Another process is training in {folder}. Wait for it, or choose another output_dir."
        ) from None


def _raise_interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt for SIGTERM, so that temporary files are removed as after Ctrl-C.

    During training, the training loop replaces this handler.
    """
    raise KeyboardInterrupt(number, "Stopped.")


def build_sha256sum_content(folder: Path) -> bytes:
    """Return the checksums of all files of a checkpoint in the format of `sha256sum`: digest, two spaces, file name.

    Hidden files are ignored, because file managers and network drives create them.
    """
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUM_FILE and not path.name.startswith("."):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()
