"""Save and load checkpoints of a training run.

A checkpoint is a folder with weights, optimizer state, fp16 scaler and training curve. A run that resumes from it gives
bit-identical results, because everything random depends only on the seed and the step number. The folder gets its final
name when it is complete. SHA-256 checksums of its files are compared before a file is loaded.
"""

import hashlib
import logging
import pickle
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from capivara_common.files import read_json, write_bytes, write_json
from training.arguments import RunArguments

STATE_FILE = "trainer.json"
# Checksums of all other files of a checkpoint, in the format of `sha256sum`. CPUs have instructions for SHA-256, which
# make it faster than BLAKE2 here.
CHECKSUM_FILE = "SHA256SUMS"
# Endings of files that may be read when a checkpoint is loaded. A checkpoint is refused if it has a file with such an
# ending that is not in its list of checksums, because this file could not be verified.
LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".json")
# Settings that may change when a run is resumed, because they do not affect the weights. `hub_strategy` and
# `carbon_country` no longer exist, but runs of earlier versions have stored them.
CHANGEABLE_SETTINGS = {
    *("output_dir", "overwrite_output_dir", "resume", "save_steps", "keep_last", "tracker"),
    *("loading_workers", "num_threads", "max_bad_share", "push_to_hub", "hub_model_id", "hub_private"),
    *("hub_strategy", "carbon_country"),
}
# Default of every setting. A run that was started before a setting existed did not store it, so the default is taken as
# its value.
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
    data: dict[str, str] = field(default_factory=dict)  # {name of a dataset split or model: digest of its content}
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
        """Return the numbers of the optimizer steps that have a checkpoint, in ascending order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-" + "[0-9]" * 8))

    def path(self, step: int) -> Path:
        """Return the folder that holds the checkpoint of a step, such as `checkpoints/step-00000100` for step 100."""
        return self.folder / f"step-{step:08d}"

    def find_resume_checkpoint(self, args: RunArguments) -> Path | None:
        """Return the folder of the checkpoint that the run should resume from, or None for a new run.

        Args:
            args: Arguments of the run. `args.resume` is None for a new run, the folder of a checkpoint, or "auto" for
                the latest checkpoint if there is one.

        Raises:
            ValueError: If the checkpoint is damaged, or was written with other settings.
        """
        steps = self.steps()
        if args.resume is None or (args.resume == "auto" and not steps):
            return None
        path = self.path(steps[-1]) if args.resume == "auto" else Path(args.resume)
        check_same_run(verify_checkpoint_and_read_state(path), args.to_dict(), {}, path)
        return path

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of the current step, then delete old checkpoints, but not the best one.

        Does nothing if the step already has a checkpoint. All processes must call this method.

        Args:
            state: State of the run after the current step.

        Raises:
            OSError: If the checkpoint can't be written. Earlier checkpoints are not changed.
        """
        path = self.path(state.step)
        if path.exists():
            return
        # Accelerate's option `automatic_checkpoint_naming` is not used: it does not keep the best checkpoint, and a
        # process that is killed would leave an incomplete checkpoint.
        temporary = self.folder / f"tmp-{path.name}"
        try:
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_json(temporary / STATE_FILE, asdict(state))
                write_bytes(temporary / CHECKSUM_FILE, build_sha256sum_content(temporary))
                temporary.rename(path)
                for old in {*self.steps()[: -self.keep_last]} - {state.best_step}:
                    # The folder is renamed before it is deleted. If the process is killed during deletion, an
                    # incomplete checkpoint would otherwise look valid.
                    outdated = self.folder / f"tmp-old-{old:08d}"
                    self.path(old).rename(outdated)
                    shutil.rmtree(outdated, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            # A full disk is reported as RuntimeError by torch and as SafetensorError by safetensors.
            raise OSError(
                f"The checkpoint of step {state.step} can't be written to {self.folder}: {error}. Earlier checkpoints "
                "are complete. Free some space and resume with --resume auto."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def load(self, path: Path, current: TrainingState) -> TrainingState:
        """Load a checkpoint into the model and the optimizer that Accelerate has prepared.

        Args:
            path: Folder of the checkpoint.
            current: State of the starting run, with which settings and data of the checkpoint are compared.

        Returns:
            The state of the run as it was when the checkpoint was saved.

        Raises:
            ValueError: If the checkpoint is damaged, holds pickled objects other than tensors, or belongs to a run with
                other settings or data.
        """
        saved = verify_checkpoint_and_read_state(path)
        check_same_run(saved, current.config, current.data, path)
        try:
            self.accelerator.load_state(str(path))
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"The checkpoint {path} can't be loaded: it is damaged, or holds Python objects other than tensors "
                f"({type(error).__name__}). Delete it. --resume auto then resumes from an earlier checkpoint or starts "
                "again."
            ) from error
        logger.info("Resuming from %s.", path)
        if (saved.device, saved.threads) != (current.device, current.threads):
            logger.warning(
                f"The run used {saved.threads} CPU threads on {saved.device} so far, and now uses {current.threads} on "
                f"{current.device}. The last bits of the result may differ from those of an uninterrupted run. To "
                f"avoid this, resume on the same device with --num_threads {saved.threads}."
            )
        return saved


def verify_checkpoint_and_read_state(path: Path) -> TrainingState:
    """Read the state of a run from the folder of a checkpoint, after checking that no file is damaged.

    The check compares the files with the SHA-256 checksums that are stored in the checkpoint.

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
    # Position of the file name in a line, after the digest (64 hexadecimal digits) and two spaces.
    name_start = 66
    names = {line[name_start:].decode("utf-8", "replace") for line in expected - actual}
    additional = [line[name_start:].decode() for line in actual - expected]
    names |= {name for name in additional if name.endswith(LOADED_SUFFIXES)}
    if names:
        raise ValueError(
            f"The checkpoint {path} can't be loaded: {', '.join(sorted(names))} or {CHECKSUM_FILE} has changed since "
            "it was written. Delete the checkpoint; --resume auto then resumes from an earlier one or starts again."
        )


def check_same_run(state: TrainingState, config: dict[str, Any], data: dict[str, str], path: Path) -> None:
    """Check that a checkpoint or a finished run was made with the same settings and data as the current run.

    Settings that do not affect the weights may differ, for example the output folder.

    Args:
        state: State of the checkpoint or the finished run.
        config: Settings of the current run, as `RunArguments.to_dict()` returns them.
        data: `{name of a dataset split or model: digest}` of the current run. Missing names are not compared.
        path: Folder of the checkpoint or the finished run, for messages.

    Raises:
        ValueError: If data or settings that affect the weights differ, or a setting is unknown. The message lists them.
    """
    if unknown := sorted(state.config.keys() - SETTING_DEFAULTS.keys() - CHANGEABLE_SETTINGS):
        raise ValueError(
            f"{path} was written by another version of the program. This version does not know its settings "
            f"{', '.join(unknown)}. A finished model in this folder can still be used. To train again, use another "
            "--output_dir."
        )
    # The location of the image cache may change, because it does not affect the result. Whether a cache is used does
    # affect it: cached embeddings are rounded to float16, others are not.
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
            f"{path} belongs to a run with other settings. {listed}. Use the same settings, or another --output_dir."
        )


def build_sha256sum_content(folder: Path) -> bytes:
    """Compute the SHA-256 checksums of all files of a checkpoint, to detect damaged files later.

    The result has the format of the command `sha256sum`: one line per file, with digest, two spaces and file name.
    Hidden files are ignored, because file managers and network drives create them.
    """
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUM_FILE and not path.name.startswith("."):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()
