"""Checkpoints of a run: written by Accelerate into a temporary folder, renamed when whole, read without pickles.

Digests of all files are kept beside them and compared before anything is loaded, so that a flipped byte is noticed.

Everything random in a run derives from its seed and the number of the step, so weights, optimiser and the curve are
all that a run needs to end with the same bits (Accelerate's own restored samplers and generators do not give that).
"""

import errno
import hashlib
import logging
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from capivara_common.files import no_space_left, read_json, write_bytes, write_json
from training.arguments import FIXED, GONE, RunArguments

OFF_BEFORE = {  # settings that have left the program, with the value at which they changed nothing
    **dict.fromkeys(("text_teacher", "parallel_text")),
    **dict.fromkeys(("anchor_share", "hard_negatives"), 0.0),
    **{"layer_decay": 1.0, "decay_towards": "zero", "towers": "text", "matryoshka_dims": [], "dataset_weights": []},
}
EARLIER = GONE.keys() - FIXED.keys()  # settings of another step, whose checkpoints have other names, too
BEFORE = "a876dd5"  # the last one that had them
NAME = re.compile(r"step-(\d{8})")
STATE = "trainer.json"
SUMS = "SHA256SUMS"  # of all other files, as sha256sum writes them; processors compute SHA-256 faster than BLAKE2
LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".json")  # what may be read of a checkpoint
DAMAGE_ERRORS = (EOFError, LookupError, RuntimeError, TypeError, AssertionError)  # what torch.load raises
FULL_BYTES = 2**20  # a disk with less is full: a buffered write needs no more to fail
# Settings that may differ between a run and its continuation: they change no weight.
FREE_SETTINGS = {"output_dir", "overwrite_output_dir", "resume", "save_steps", "keep_last", "tracker", "carbon_country"}
FREE_SETTINGS |= {"loading_workers", "num_threads", "interpolate", "gradient_checkpointing", "prepare"}
FREE_SETTINGS |= {"push_to_hub", "hub_model_id", "hub_strategy", "hub_private"}
DEFAULTS = {known.name: known.default for known in fields(RunArguments)}  # what a run had before there was a setting
logger = logging.getLogger("capivara")


@strict
@dataclass
class TrainerState:
    """How far a run is, and under which settings."""

    step: int = 0  # optimiser steps done
    curve: list[dict] = field(default_factory=list)  # an entry a step, see `eval.records.plots.plot_training_curves`
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)  # name -> fingerprint of what it trains on
    best_step: int | None = None  # of the highest validation recall so far; None before a measurement
    best_recall: float | None = None  # mean of both directions, a share from 0 to 1
    seconds: float = 0.0  # of training so far
    threads: int = 0  # of the CPU; another number gives other last bits
    device: str = ""  # in words, and the number of processes; others give other last bits, too

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step must be at least 0, got {self.step}")


class Checkpoints:
    """The checkpoints of a run: `step-00000100`, …; whole ones only, of which the last and the best are kept."""

    def __init__(self, folder: Path, keep_last: int, accelerator: Accelerator):
        self.folder, self.keep_last, self.accelerator = folder, keep_last, accelerator

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, the lowest first."""
        names = [NAME.fullmatch(path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def clean(self) -> None:
        """Remove what a kill left half written."""
        if self.accelerator.is_main_process:
            for path in self.folder.glob("tmp-*"):
                shutil.rmtree(path, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save(self, state: TrainerState) -> None:
        """Write a checkpoint of this step, unless it is there; then remove those that are no longer kept.

        Raises:
            OSError: the disk is full. The earlier checkpoints are untouched.
        """
        path = self.path(state.step)
        if path.exists():
            return
        temporary = self.folder / f"tmp-{path.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.accelerator.save_state(str(temporary))  # every process
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_json(temporary / STATE, asdict(state))
                write_bytes(temporary / SUMS, _sums(temporary))
                _flush(temporary)
                temporary.rename(path)
                _sync_folder(self.folder)
                self._remove_old(state)
            self.accelerator.wait_for_everyone()
        except BaseException as error:
            # torch.save does not name a full disk.
            unnamed = isinstance(error, RuntimeError) and shutil.disk_usage(self.folder).free < FULL_BYTES
            full = no_space_left(error) or unnamed
            shutil.rmtree(temporary, ignore_errors=True)
            if full:
                kept = self.steps()
                raise OSError(
                    errno.ENOSPC,
                    f"No space left on the disk for the checkpoint of step {state.step} in {self.folder}; "
                    + (f"that of step {kept[-1]} is whole. Free some space" if kept else "there is none. Free space")
                    + " and go on with --resume auto",
                ) from error
            raise

    def load(self, path: Path) -> TrainerState:
        """Weights and optimiser into what Accelerate has prepared; returns where the run was.

        Raises:
            ValueError: it is no checkpoint, is damaged, or holds more than tensors.
        """
        check_files(path)
        state = read_state(path)
        try:
            self.accelerator.load_state(str(path))  # safetensors, and torch.load with weights_only
        except (*DAMAGE_ERRORS, pickle.UnpicklingError, SafetensorError) as error:
            raise ValueError(
                f"The checkpoint {path} can't be loaded: it is damaged, or holds more than tensors "
                f"({type(error).__name__}). Remove it, and --resume auto goes on from an earlier one or from the start."
            ) from error
        return state

    def _remove_old(self, state: TrainerState) -> None:
        kept = {*self.steps()[-self.keep_last :], state.best_step}
        for step in set(self.steps()) - kept:
            doomed = self.folder / f"tmp-old-{step:08d}"  # never a half-removed checkpoint under a good name
            self.path(step).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def read_state(path: Path) -> TrainerState:
    """Where the run of a checkpoint was. Raises ValueError where `path` is none."""
    if not (path / STATE).is_file():
        raise ValueError(f"{path} is no checkpoint of a run: it has no {STATE}.")
    try:
        return TrainerState(**read_json(path / STATE, step=int))
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path / STATE} is not the state of a run of this version: {reason}. Remove the checkpoint."
        ) from error


def check_files(path: Path) -> None:
    """Raise ValueError, naming the files, where a checkpoint is not as it was written, or more would be loaded.

    It reads all of them once. A checkpoint of an earlier version has no digests, which is logged; a file that somebody
    else has put there, such as an editor's backup, is left alone where its name is none that is loaded.
    """
    if not (path / SUMS).is_file():
        if (path / STATE).is_file():
            logger.warning("%s has no %s: it is of an earlier version, and damage to it is not noticed.", path, SUMS)
        return
    written, found = ({*sums.split(b"\n")} for sums in ((path / SUMS).read_bytes(), _sums(path)))
    names = {line[66:].decode("utf-8", "replace") for line in written - found}
    names |= {name for line in found - written if (name := line[66:].decode()).endswith(LOADED_SUFFIXES)}
    if names:
        raise ValueError(
            f"The checkpoint {path} can't be loaded: {', '.join(sorted(names))} or {SUMS} is not as it was written. "
            "Remove it, and --resume auto goes on from an earlier one or from the start."
        )


def _sums(folder: Path) -> bytes:
    """A line a file, "digest, two blanks, name"; hidden files are of the file manager or the network disk."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS and not path.name.startswith("."):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()


def check_same_run(state: TrainerState, config: dict[str, Any], data: dict[str, str], path: Path) -> None:
    """Raise ValueError where a checkpoint is of other settings or data; every difference is named."""
    if state.config.keys() & EARLIER:  # its step was another one, and some of its weights have other names
        raise ValueError(
            f"{path} is of an earlier version of the program. Go on with it by that one, commit {BEFORE}, or start "
            "anew by --overwrite_output_dir true in place of --resume."
        )
    # Where the cache lies changes nothing; whether there is one does: its embeddings are float16.
    old, new = (
        {**FIXED, **c, "image_embedding_cache": c.get("image_embedding_cache") != "off"} for c in (state.config, config)
    )
    differing = {
        key: (state.config.get(key), config.get(key))
        for key in sorted({*old, *new} - FREE_SETTINGS)
        if old.get(key, DEFAULTS.get(key)) != new.get(key)
    }
    differing |= {f"data {key}": (state.data.get(key), data[key]) for key in data if state.data.get(key) != data[key]}
    if differing:
        lines = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())
        raise ValueError(
            f"The checkpoint {path} is of another run. {lines}. Give the same settings, or another output_dir."
        )


def check_finished_run(folder: Path, config: dict[str, Any], data: dict[str, str]) -> None:
    """Raise ValueError where the finished run in `folder` has other settings, or other `data` of those given."""
    finished = read_json(folder / "run.json", config=dict, dataset_fingerprints=dict)
    if changed := [name for name, off in OFF_BEFORE.items() if finished["config"].get(name, off) != off]:
        raise ValueError(
            f"{folder} is of an earlier version of the program, with {', '.join(changed)}, which have left it. Commit "
            f"{BEFORE} repeats it; choose another output_dir."
        )
    known = {name: value for name, value in finished["config"].items() if name not in EARLIER}
    state = TrainerState(config=known, data=finished["dataset_fingerprints"])
    check_same_run(state, config, data, folder)


def check_settings_of_checkpoints(args: RunArguments, folder: Path) -> None:
    """Raise ValueError where the checkpoint to resume has other settings: before any long work; its data come later."""
    if args.resume is None:
        return
    paths = [Path(args.resume)] if args.resume != "auto" else sorted(folder.rglob("checkpoints/step-*"))[-1:]
    for path in paths:
        check_files(path)
        check_same_run(read_state(path), args.to_dict(), {}, path)


def checkpoint_to_resume(args: RunArguments, checkpoints: Checkpoints, now: TrainerState) -> Path | None:
    """The checkpoint to resume from; None for a run from the start.

    Raises:
        ValueError: the checkpoint is of other settings or data than `now`.
    """
    checkpoints.clean()
    if args.resume is None or (args.resume == "auto" and not checkpoints.steps()):
        return None
    path = checkpoints.path(checkpoints.steps()[-1]) if args.resume == "auto" else Path(args.resume)
    saved = read_state(path)
    check_same_run(saved, now.config, now.data, path)
    logger.info("Going on from %s.", path)
    if saved.device != now.device:
        logger.warning("The run was computed on %s, now on %s: its last bits will differ.", saved.device, now.device)
    if saved.threads != now.threads:
        logger.warning(
            "The run was computed with %s CPU threads, now there are %s: its last bits will differ. "
            "--num_threads %s keeps them.",
            saved.threads, now.threads, saved.threads,
        )  # fmt: skip
    return path


def _flush(folder: Path) -> None:
    """Write every file of a folder through to the disk, before the folder gets the name of a whole one."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
