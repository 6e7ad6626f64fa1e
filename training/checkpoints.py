"""Checkpoints of a run: Accelerate writes its state into a temporary folder, which is renamed when it is whole.

Digests of all files lie beside them and are compared before anything is loaded: a flipped byte is noticed. Accelerate
loads safetensors, and the optimiser by `torch.load(weights_only=True)`. Its own `ProjectConfiguration` is not used: it
knows no best one, and a kill leaves a half-written folder under a good name.

Everything random in a run derives from its seed and the number of the step, so weights, optimiser, fp16's scaler and
the curve are all that a run needs to end with the same bits.
"""

import hashlib
import logging
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from capivara_common.files import read_json, write_bytes, write_json
from training.arguments import GONE, RunArguments

BEFORE = "a876dd5"  # the last commit with settings of another step, whose checkpoints have other names, too
STATE = "trainer.json"
SUMS = "SHA256SUMS"  # of all other files, as sha256sum writes them; processors compute SHA-256 faster than BLAKE2
LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".json")  # what may be read of a checkpoint
# Settings that may differ between a run and its continuation: they change no weight.
FREE_SETTINGS = {
    *("output_dir", "overwrite_output_dir", "resume", "save_steps", "keep_last", "tracker", "carbon_country"),
    *("loading_workers", "num_threads", "interpolate", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private"),
}
DEFAULTS = {known.name: known.default for known in fields(RunArguments)}  # what a run had before there was a setting
logger = logging.getLogger("capivara")


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

    def to_resume(self, args: RunArguments) -> Path | None:
        """The checkpoint to go on from, None for a new run; ValueError where it is damaged, or of other settings."""
        steps = self.steps()
        if args.resume is None or (args.resume == "auto" and not steps):
            return None
        path = self.path(steps[-1]) if args.resume == "auto" else Path(args.resume)
        check_same_run(read_state(path), args.to_dict(), {}, path)
        return path

    def save(self, state: TrainerState) -> None:
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
                write_json(temporary / STATE, asdict(state))
                write_bytes(temporary / SUMS, _sums(temporary))
                _sync(*temporary.iterdir(), temporary)
                temporary.rename(path)
                _sync(self.folder)
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

    def load(self, path: Path, now: TrainerState) -> TrainerState:
        """Weights and optimiser into what Accelerate has prepared; returns where the run was.

        Raises ValueError where it is damaged, holds more than tensors, or is of other settings or data than `now`.
        """
        saved = read_state(path)
        check_same_run(saved, now.config, now.data, path)
        try:
            self.accelerator.load_state(str(path))
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"The checkpoint {path} can't be loaded: it holds more than tensors ({type(error).__name__}). Remove "
                "it, and --resume auto goes on from an earlier one or from the start."
            ) from error
        logger.info("Going on from %s.", path)
        if (saved.device, saved.threads) != (now.device, now.threads):
            logger.warning(
                f"The run was computed with {saved.threads} CPU threads on {saved.device}, now there are {now.threads} "
                f"on {now.device}: its last bits will differ. The same device and --num_threads {saved.threads} keep "
                "them."
            )
        return saved


def read_state(path: Path) -> TrainerState:
    """Where the run of a checkpoint was, all files compared. Raises ValueError where `path` is none, or is damaged."""
    if not (path / STATE).is_file():
        raise ValueError(f"{path} is no checkpoint of a run: it has no {STATE}.")
    check_files(path)
    try:
        return TrainerState(**read_json(path / STATE, step=int, curve=list, config=dict, data=dict))
    except TypeError as error:
        raise ValueError(f"{path / STATE} is not the state of a run of this version: {error}.") from error


def check_files(path: Path) -> None:
    """Raise ValueError, naming the files, where a checkpoint is not as it was written, or more would be loaded.

    It reads all of them once. A file that somebody else has put there, such as an editor's backup, is left alone where
    its name is none that is loaded.
    """
    listed = (path / SUMS).read_bytes() if (path / SUMS).is_file() else b""
    written, found = ({*sums.split(b"\n")} for sums in (listed, _sums(path)))
    names = {line[66:].decode("utf-8", "replace") for line in written - found}
    names |= {name for line in found - written if (name := line[66:].decode()).endswith(LOADED_SUFFIXES)}
    if names:
        raise ValueError(
            f"The checkpoint {path} can't be loaded: {', '.join(sorted(names))} or {SUMS} is not as it was written. "
            "Remove it, and --resume auto goes on from an earlier one or from the start."
        )


def check_same_run(state: TrainerState, config: dict[str, Any], data: dict[str, str], path: Path) -> None:
    """Raise ValueError where a checkpoint or a finished run is of other settings or data; each difference is named."""
    if state.config.keys() & GONE.keys():
        raise ValueError(
            f"{path} is of an earlier version of the program, such as commit {BEFORE}. Go on with it by that one, or "
            "start anew by --overwrite_output_dir true in place of --resume."
        )
    # Where the cache lies changes nothing; whether there is one does: its embeddings are float16.
    old, new = ({**c, "image_embedding_cache": c.get("image_embedding_cache") != "off"} for c in (state.config, config))
    differing = {
        key: (state.config.get(key), config.get(key))
        for key in sorted({*old, *new} - FREE_SETTINGS)
        if old.get(key, DEFAULTS.get(key)) != new.get(key)
    }
    differing |= {f"data {key}": (state.data.get(key), data[key]) for key in data if state.data.get(key) != data[key]}
    if differing:
        lines = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())
        raise ValueError(f"{path} is of another run. {lines}. Give the same settings, or another output_dir.")


def check_finished_run(folder: Path, config: dict[str, Any], data: dict[str, str]) -> None:
    """Raise ValueError where the finished run in `folder` has other settings, or other `data` of those given."""
    finished = read_json(folder / "run.json", config=dict, dataset_fingerprints=dict)
    if finished["config"].keys() & GONE.keys():
        raise ValueError(
            f"The training of the run in {folder} is complete, by an earlier version of the program, and its model "
            "lies there; there is nothing to go on with. Train another one at another --output_dir."
        )
    state = TrainerState(config=finished["config"], data=finished["dataset_fingerprints"])
    check_same_run(state, config, data, folder)
    share, asked = (c.get("interpolate", DEFAULTS["interpolate"]) for c in (state.config, config))
    if share != asked:  # it may differ while the training goes on: its weights are made at the end
        raise ValueError(
            f"The training of the run in {folder} is complete, with interpolate {share}, not {asked}. Give "
            f"--interpolate {share} again, or make a model of other shares by `python -m training.interpolate`."
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


def _sync(*paths: Path) -> None:
    """Write files and folders through to the disk, before a folder gets the name of a whole one."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
