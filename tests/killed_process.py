"""Run `train_accelerate.py` in processes that kill themselves, as `kill -9` would, or in one that waits for a signal.

    python tests/killed_process.py PHASE:COUNT[,PHASE:COUNT…] --model MODEL --dataset DATA …

Each process sends itself SIGKILL when it reaches PHASE for the COUNT-th time, counted from 1; then the next one starts.
All are forked from this process, which has imported everything. With `held:COUNT`, this process itself trains: after
the first checkpoint, every forward pass waits until a file `signalled` exists next to the output folder, for COUNT
seconds at most.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import accelerate.checkpointing
import torch

import train_accelerate
import training.checkpoints
from capivara_common import files
from modeling_capivara import CapivaraModel
from training.whole_batch import WholeBatch

PLACES = {  # phase -> function to replace (owner and name), and whether the process is killed before or after it
    "forward": (WholeBatch, "_embed", "before"),
    "step-before": (torch.optim.Adam, "step", "before"),
    "step-after": (torch.optim.Adam, "step", "after"),
    "save-state": (training.checkpoints, "write_json", "before"),  # the checkpoint is complete except for its state
    "end": (CapivaraModel, "save_pretrained", "before"),  # after training, while the result is written
    "finish": (files, "rename_partial_folder", "before"),  # all is written, but the folder is not renamed yet
    "finished": (files, "rename_partial_folder", "after"),
}


def main(kills: str, argv: list[str]) -> None:
    if kills.startswith("held:"):
        output, seconds = Path(argv[argv.index("--output_dir") + 1]), int(kills.removeprefix("held:"))
        replace(WholeBatch, "_embed", before=lambda *_: hold(output, time.monotonic() + seconds))
        return train_accelerate.main(argv)
    for phase, count in (kill.split(":") for kill in kills.split(",")):
        if not (child := os.fork()):
            prepare(phase, countdown(int(count)))
            return train_accelerate.main(argv)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            sys.exit(f"Phase {phase} was not reached {count} times: the process ended with exit code {code}.")


def prepare(phase: str, die: Callable[..., None]) -> None:
    """Make this process call `die` at a phase."""
    if phase in PLACES:
        owner, name, moment = PLACES[phase]
        replace(owner, name, **{moment: die})
    elif phase == "save":  # after the file of the model, in the middle of the file of the optimizer
        replace(accelerate.checkpointing, "save", before=lambda state, path, **_: truncate_optimizer(path, die))
    elif phase == "old":  # while an old checkpoint is deleted
        replace(shutil, "rmtree", before=lambda path, **_: delete_half(Path(path), die))
    else:  # when a shard of the cache or a checkpoint is renamed
        kind, moment = phase.split("-")
        prefix = {"cache": ".images-", "rename": "tmp-step-"}[kind]

        def die_at_rename(path, target) -> None:
            if Path(path).name.startswith(prefix):
                die()

        owner, name = (os, "replace") if kind == "cache" else (Path, "rename")
        replace(owner, name, **{moment: die_at_rename})


def hold(output: Path, deadline: float) -> None:
    """Wait for the file `signalled` once there is a checkpoint."""
    saved = any(output.with_name(f"{output.name}.partial").glob("checkpoints/step-*"))
    while saved and not (output.parent / "signalled").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def countdown(count: int) -> Callable[..., None]:
    """Return a function that kills the process at its `count`-th call."""
    remaining = count

    def call(*args, **kwargs) -> None:
        nonlocal remaining
        remaining -= 1
        if not remaining:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


def replace(owner: object, name: str, before: Callable | None = None, after: Callable | None = None) -> None:
    """Wrap `owner.name` so that `before` and `after` are called around it, with its arguments."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def truncate_optimizer(path: Path, die: Callable[[], None]) -> None:
    """Write the start of the optimizer's file instead of the whole file, and die."""
    if path.name == "optimizer.bin":
        path.write_bytes(b"PK\x03\x04, truncated")
        die()


def delete_half(path: Path, die: Callable[[], None]) -> None:
    """Delete one file of an old checkpoint instead of all, and die."""
    if path.name.startswith("tmp-old-"):
        (path / "optimizer.bin").unlink()
        die()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
