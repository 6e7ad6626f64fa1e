"""`train_accelerate.py` in processes that kill themselves, as `kill -9` would, or in one that waits to be signalled.

    python tests/killed_process.py PHASE:COUNT[,PHASE:COUNT…] --model MODEL --dataset DATA …

The COUNT-th time (from 1) that PHASE is reached, the process gets SIGKILL, and the next one starts; all are forked from
this one, which has imported everything. `held` is this process itself: it waits in the forward passes after the first
checkpoint until `signalled` lies beside the output folder, for COUNT seconds at most.
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
from modeling_capivara import CapivaraModel
from training.whole_batch import WholeBatch

PLACES = {  # phase -> what is replaced, and whether the process ends before or after it
    "forward": (WholeBatch, "_embed", "before"),
    "step-before": (torch.optim.Adam, "step", "before"),
    "step-after": (torch.optim.Adam, "step", "after"),
    "save-state": (training.checkpoints, "write_json", "before"),  # all of a checkpoint but the state
    "end": (CapivaraModel, "save_pretrained", "before"),  # after training, in the middle of the result
    "finish": (train_accelerate, "finish_folder", "before"),  # all is written, but has not got its name
    "finished": (train_accelerate, "finish_folder", "after"),
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
            sys.exit(f"{phase}, time {count}, was not reached: the process ended by {code}.")


def prepare(phase: str, die: Callable[..., None]) -> None:
    if phase in PLACES:
        owner, name, moment = PLACES[phase]
        replace(owner, name, **{moment: die})
    elif phase == "save":  # after the model's file, in the middle of the optimiser's
        replace(accelerate.checkpointing, "save", before=lambda state, path, **_: cut(path, die))
    elif phase == "old":  # an old checkpoint, half removed
        replace(shutil, "rmtree", before=lambda path, **_: half_removed(Path(path), die))
    else:  # of a shard of the cache, or of a checkpoint
        thing, moment = phase.split("-")
        prefix = {"cache": ".shard-", "rename": "tmp-step-"}[thing]
        hit = lambda path, target: die() if Path(path).name.startswith(prefix) else None  # noqa: E731
        replace(*((os, "replace") if thing == "cache" else (Path, "rename")), **{moment: hit})


def hold(output: Path, deadline: float) -> None:
    saved = any(output.with_name(f"{output.name}.partial").glob("checkpoints/step-*"))
    while saved and not (output.parent / "signalled").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def countdown(count: int) -> Callable[..., None]:
    """A function whose `count`-th call is the process's end."""
    left = [count]

    def call(*args, **kwargs) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


def replace(owner: object, name: str, before: Callable | None = None, after: Callable | None = None) -> None:
    """Call `before` and `after` around `owner.name`, with its arguments."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def cut(path: Path, die: Callable[[], None]) -> None:
    if path.name == "optimizer.bin":
        path.write_bytes(b"PK\x03\x04, and no more")
        die()


def half_removed(path: Path, die: Callable[[], None]) -> None:
    if path.name.startswith("tmp-old-"):
        (path / "optimizer.bin").unlink()
        die()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
