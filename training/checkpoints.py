"""The folder that a run works in, and its checkpoints: Accelerate's state, in a folder that is renamed when whole.

Digests of all files lie beside them and are compared before anything is loaded. Everything random in a run derives from
its seed and the number of the step: weights, optimiser, fp16's scaler and the curve are all that it needs to end with
the same bits. Accelerate's `ProjectConfiguration` knows no best checkpoint, and a kill leaves a half-written one.
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
    check_inputs_outside,
    check_output_folder,
    lock_folder,
    partial_folder,
    read_json,
    remove_leftovers,
    seed_folders,
    write_bytes,
    write_json,
)
from training.arguments import GONE, GONE_SINCE, RunArguments

BEFORE = "a876dd5"  # the last commit with settings of another step, whose checkpoints have other names, too
STATE_FILE = "trainer.json"
CHECKSUM_FILE = (
    "SHA256SUMS"  # of all other files, as sha256sum writes them; processors compute SHA-256 faster than BLAKE2
)
LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".json")  # what may be read of a checkpoint
# Settings that may differ between a run and its continuation: they change no weight.
CHANGEABLE_SETTINGS = {
    *("output_dir", "overwrite_output_dir", "resume", "save_steps", "keep_last", "tracker"),
    *("loading_workers", "num_threads", "max_bad_share", "push_to_hub", "hub_model_id", "hub_private"),
    *GONE_SINCE,
}
SETTING_DEFAULTS = {
    known.name: known.default for known in fields(RunArguments)
}  # what a run had before there was a setting
logger = logging.getLogger("capivara")


@dataclass
class TrainingState:
    """How far a run is, and under which settings."""

    step: int = 0  # optimiser steps done
    curve: list[dict] = field(default_factory=list)  # an entry a step, see `eval.records.plots.plot_training_curves`
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)  # name -> fingerprint of what it trains on
    skipped: list[dict[str, Any]] = field(default_factory=list)  # rows whose image was found at a step to be bad
    best_step: int | None = None  # of the highest validation recall so far; None before a measurement
    best_recall: float | None = None  # mean of both directions, a share from 0 to 1
    seconds: float = 0.0  # of training so far
    threads: int = 0  # of the CPU; another number gives other last bits
    device: str = ""  # in words, and the number of processes; others give other last bits, too


@dataclass
class Checkpoints:
    """The checkpoints of a run: `step-00000100`, …; whole ones only, of which the last and the best are kept."""

    folder: Path
    keep_last: int
    accelerator: Accelerator

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, the lowest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-" + "[0-9]" * 8))

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def find_resume_checkpoint(self, args: RunArguments) -> Path | None:
        """The checkpoint to go on from, None for a new run; ValueError where it is damaged, or of other settings."""
        steps = self.steps()
        if args.resume is None or (args.resume == "auto" and not steps):
            return None
        path = self.path(steps[-1]) if args.resume == "auto" else Path(args.resume)
        check_same_run(read_training_state(path), args.to_dict(), {}, path)
        return path

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of this step, unless it is there; then remove those that are no longer kept.

        Raises OSError where it can't be written; the earlier checkpoints are untouched.
        """
        path = self.path(state.step)
        if path.exists():
            return
        temporary = self.folder / f"tmp-{path.name}"
        try:
            self.accelerator.save_state(str(temporary))  # every process
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_json(temporary / STATE_FILE, asdict(state))
                write_bytes(temporary / CHECKSUM_FILE, _compute_checksums(temporary))
                temporary.rename(path)
                for old in {*self.steps()[: -self.keep_last]} - {state.best_step}:
                    doomed = self.folder / f"tmp-old-{old:08d}"  # never a half-removed checkpoint under a good name
                    self.path(old).rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:  # as which torch and safetensors raise a full disk
            raise OSError(
                f"The checkpoint of step {state.step} can't be written to {self.folder}: {error}. The earlier ones are "
                "whole; go on with --resume auto when there is space."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def load(self, path: Path, current: TrainingState) -> TrainingState:
        """Weights and optimiser into what Accelerate has prepared; returns where the run was.

        Raises ValueError where it is damaged, holds more than tensors, or is of other settings or data than `now`.
        """
        saved = read_training_state(path)
        check_same_run(saved, current.config, current.data, path)
        try:
            self.accelerator.load_state(str(path))
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"The checkpoint {path} can't be loaded: it holds more than tensors ({type(error).__name__}). Remove "
                "it, and --resume auto goes on from an earlier one or from the start."
            ) from error
        logger.info("Going on from %s.", path)
        if (saved.device, saved.threads) != (current.device, current.threads):
            logger.warning(
                f"The run was computed with {saved.threads} CPU threads on {saved.device}, now there are {current.threads} "
                f"on {current.device}: its last bits will differ. The same device and --num_threads {saved.threads} keep "
                "them."
            )
        return saved


def read_training_state(path: Path) -> TrainingState:
    """Where the run of a checkpoint was, all files compared. Raises ValueError where `path` is none, or is damaged."""
    if not (path / STATE_FILE).is_file():
        raise ValueError(f"{path} is no checkpoint of a run: it has no {STATE_FILE}.")
    check_checkpoint_files(path)
    try:
        return TrainingState(**read_json(path / STATE_FILE, step=int, curve=list, config=dict, data=dict))
    except TypeError as error:
        raise ValueError(f"{path / STATE_FILE} is not the state of a run of this version: {error}.") from error


def check_checkpoint_files(path: Path) -> None:
    """Raise ValueError, naming the files, where a checkpoint is not as it was written, or more would be loaded."""
    listed = (path / CHECKSUM_FILE).read_bytes() if (path / CHECKSUM_FILE).is_file() else b""
    written, found = ({*sums.split(b"\n")} for sums in (listed, _compute_checksums(path)))
    names = {line[66:].decode("utf-8", "replace") for line in written - found}
    names |= {name for line in found - written if (name := line[66:].decode()).endswith(LOADED_SUFFIXES)}
    if names:
        raise ValueError(
            f"The checkpoint {path} can't be loaded: {', '.join(sorted(names))} or {CHECKSUM_FILE} is not as it was written. "
            "Remove it, and --resume auto goes on from an earlier one or from the start."
        )


def check_same_run(state: TrainingState, config: dict[str, Any], data: dict[str, str], path: Path) -> None:
    """Raise ValueError where a checkpoint or a finished run is of other settings or data; each difference is named."""
    if state.config.keys() & GONE.keys():
        raise ValueError(
            f"{path} is of an earlier version of the program, such as commit {BEFORE}. A complete run has its model "
            "there; go on with another by that commit, or train anew at another --output_dir."
        )
    # Where the cache lies changes nothing; whether there is one does: its embeddings are float16.
    old, new = ({**c, "image_embedding_cache": c.get("image_embedding_cache") != "off"} for c in (state.config, config))
    differing = {
        key: (state.config.get(key), config.get(key))
        for key in sorted({*old, *new} - CHANGEABLE_SETTINGS)
        if old.get(key, SETTING_DEFAULTS.get(key)) != new.get(key)
    }
    differing |= {f"data {key}": (state.data.get(key), data[key]) for key in data if state.data.get(key) != data[key]}
    if differing:
        lines = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())
        raise ValueError(f"{path} is of another run. {lines}. Give the same settings, or another output_dir.")


def check_finished_run(folder: Path, config: dict[str, Any], data: dict[str, str]) -> None:
    """Raise ValueError where the finished run in `folder` has other settings, or other `data` of those given."""
    finished = read_json(folder / "run.json", config=dict, dataset_fingerprints=dict)
    check_same_run(
        TrainingState(config=finished["config"], data=finished["dataset_fingerprints"]), config, data, folder
    )


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
    if args.resume and (seeds := seed_folders(args.output_dir)):
        names = ", ".join(folder.name for folder in seeds)
        raise ValueError(
            f"{args.output_dir} holds finished runs of several seeds ({names}), which do not go on as one. "
            "Choose another folder, one a --seed."
        )
    if not is_run_complete(args, args.output_dir):
        check_output_folder(args.output_dir, args.overwrite_output_dir)
    if args.overwrite_output_dir:
        needed = [args.model, args.evaluation_dataset, *args.dataset]
        check_inputs_outside(
            args.output_dir, *needed, *(Path(name).parent for name in needed)
        )  # that of `shards/*.tar`
    partial = partial_folder(args.output_dir)
    if args.resume is None and not args.overwrite_output_dir and can_resume(partial):
        raise ValueError(
            f"{partial} holds an unfinished run. Go on with it by --resume auto, or start anew with "
            "--overwrite_output_dir."
        )
    return args.output_dir


def next_numbered_folder(parent: Path, name: str) -> Path:
    """The first of `parent/name-001`, `name-002`, … that does not exist and is no unfinished run."""
    folders = (parent / f"{name}-{number:03d}" for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists() and not partial_folder(folder).exists())


def is_run_complete(args: RunArguments, output_dir: Path) -> bool:
    """Whether `--resume auto` finds a complete run; one that is to replace it may be unfinished."""
    return args.resume == "auto" and (output_dir / "run.json").is_file() and not partial_folder(output_dir).exists()


def can_resume(folder: Path) -> bool:
    """Whether an unfinished run has left something that --resume can start from."""
    return any(folder.glob("checkpoints/step-*")) or (folder / "run.json").is_file()


@contextmanager
def handle_signals(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Let `handler` take these signals within the block; outside of the main thread none can be taken."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def locked_run_folder(output_dir: Path, args: RunArguments, accelerator: Accelerator) -> Iterator[Path]:
    """The folder that a run works in, locked; it stays where it holds something to resume from.

    Raises SystemExit where the run was stopped or its numbers failed, ValueError where another process works in it.
    """
    folder, lock = partial_folder(output_dir), None
    try:
        if accelerator.is_main_process:
            lock = _lock_run_folder(folder)
            for left in [*folder.glob("checkpoints/tmp-*" if args.resume else "*")]:
                if left.name != RUN_MARKER:
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        accelerator.wait_for_everyone()
        with handle_signals(_raise_interrupt, signal.SIGTERM):
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


def _lock_run_folder(folder: Path) -> int:
    """The lock on the folder of a run, which is made where it is missing. ValueError where it is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / RUN_MARKER).exists():
        raise ValueError(f"{folder}, where the run would work, holds files of something else. Move them.")
    (folder / RUN_MARKER).touch()
    try:
        return lock_folder(folder)
    except BlockingIOError:
        raise ValueError(
            f"another process is at work in {folder}. Wait for it, or choose another output_dir."
        ) from None


def _raise_interrupt(number: int, frame: object) -> None:
    """End the work by SIGTERM as by Ctrl-C, temporary files removed; training steps handle both themselves."""
    raise KeyboardInterrupt(number, "Stopped.")


def _compute_checksums(folder: Path) -> bytes:
    """A line a file, "digest, two blanks, name"; hidden files are of the file manager or the network disk."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUM_FILE and not path.name.startswith("."):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()
