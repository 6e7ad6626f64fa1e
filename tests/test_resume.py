"""A run that is killed, stopped or fails can go on, and ends with the bits of an undisturbed one.

The moments of the kills come from a seed that is printed; CAPIVARA_KILL_SEED=N draws others.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_checkpoints import flipped
from test_images import NEGATIVE, altered
from test_train_accelerate import ROOT, flags, refused

import train_accelerate
from capivara_common.files import RUN_MARKER
from modeling_capivara.loading import load_model
from training import whole_batch
from training.loop import TrainingLoop
from training.whole_batch import WholeBatch

KILL_SEED = int(os.environ.get("CAPIVARA_KILL_SEED", "0"))
# Phase, and how often it is reached at least; each process goes on from where the one before it was killed.
KILLS = [
    *[("cache-before", 2), ("cache-after", 1), ("forward", 6), ("step-before", 2), ("step-after", 2), ("save", 1)],
    *[("save-state", 1), ("rename-before", 1), ("rename-after", 1), ("forward", 6), ("old", 1), ("end", 1)],
    *[("finish", 1), ("finished", 1)],
]


pytestmark = pytest.mark.usefixtures("no_pictures")  # those of other processes are drawn


class Killed(BaseException):
    """Ends a run within this process, which is quicker than to start another."""


@pytest.fixture(scope="module")
def run(saved_tiny_folder, tiny_dataset_folder):
    """Flags of a run that saves every second step and keeps one checkpoint."""

    def make(output, dataset=tiny_dataset_folder, **overrides) -> list[str]:
        values = {"save_steps": 2, "eval_steps": 6, "keep_last": 1, **overrides}
        return flags(saved_tiny_folder, dataset, output, **values)

    return make


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory, saved_tiny_folder):
    config = load_model(saved_tiny_folder).config
    assert config.text_config.hidden_dropout_prob > 0, "without dropout the random states would not matter"
    return train_accelerate.main(run(tmp_path_factory.mktemp("undisturbed") / "out"))


def surroundings(cache: Path | None = None) -> dict:
    own = {"CAPIVARA_CACHE": str(cache)} if cache else {}
    return {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", **own}}


def killed_run(argv: list[str], owner, name: str, count: int) -> None:
    """Of this process: the `count`-th call of `owner.name` raises Killed."""
    counter, original = itertools.count(1), getattr(owner, name)

    def wrapped(*args, **kwargs):
        if next(counter) == count:
            raise Killed
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, wrapped)
        train_accelerate.main(argv)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def checkpoints_of(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(f"{out.name}.partial").glob("checkpoints/*"))


def assert_as_undisturbed(out: Path, expected: Path) -> None:
    assert weights(out) == weights(expected)
    curves = [
        [{key: p[key] for key in ("step", "loss", "gradient_norm", "validation") if key in p} for p in curve]
        for curve in (run_json(out)["curve"], run_json(expected)["curve"])
    ]
    assert curves[0] == curves[1], "each step once, with the same figures"
    assert [point["step"] for point in curves[0]] == list(range(len(curves[0])))
    assert not out.with_name(f"{out.name}.partial").exists()
    assert not list(out.rglob("tmp-*")) and not (out / RUN_MARKER).exists()


# Killed


@pytest.mark.slow
def test_sigkill_in_every_phase(run, undisturbed, tmp_path):
    generator, out = random.Random(KILL_SEED), tmp_path / "out"
    kills = ",".join(f"{phase}:{generator.randint(1, most)}" for phase, most in KILLS)
    print(f"CAPIVARA_KILL_SEED={KILL_SEED}: killed at {kills}")
    line = [sys.executable, "tests/killed_process.py", kills, *run(out, resume="auto")]
    done = subprocess.run(line, **surroundings(tmp_path / "cache"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


def test_killed_in_a_forward_pass(run, undisturbed, tmp_path):
    out = tmp_path / "out"
    killed_run(run(out), WholeBatch, "_embed", 13)
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


VARIANTS = {
    "adapters, interpolation": {"lora_rank": 2, "interpolate": 0.5},
    "adamw, decay, views": {"optimizer": "adamw", "weight_decay": 0.3, "augmented_views": 3},
    "fresh views, all captions, bad pictures": {
        **{"augmented_views": 0, "image_embedding_cache": "off", "language": "en", "eval_languages": "en"},
        **{"max_bad_share": 0.2, "effective_batch_size": 8},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_training_resumes(run, tiny_dataset_folder, tmp_path, variant):
    expected, out, values = tmp_path / "expected", tmp_path / "out", VARIANTS[variant]
    if "max_bad_share" in values:
        values = values | {"dataset": altered(tiny_dataset_folder, tmp_path / "data", {3: NEGATIVE, 7: NEGATIVE})}
    train_accelerate.main(run(expected, **values))
    killed_run(run(out, **values), TrainingLoop, "_update", 6)
    assert checkpoints_of(out) == ["step-00000004"]
    train_accelerate.main(run(out, resume="auto", **values))
    assert_as_undisturbed(out, expected)
    skipped = [path.read_text() if (path := folder / "skipped.jsonl").exists() else "" for folder in (out, expected)]
    assert skipped[0] == skipped[1] and skipped[0].count("unreadable image") == (2 if "max_bad_share" in values else 0)
    adapters = [sorted(folder.glob("adapter/*.safetensors")) for folder in (out, expected)]
    assert len(adapters[0]) == len(adapters[1]) == ("lora_rank" in values)
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*adapters, strict=True))


# Stopped


def ctrl_c(argv: list[str], out: Path, launcher: Sequence[str]) -> str:
    """What a run in a process group of its own says that gets SIGINT after its first checkpoint."""
    line = [sys.executable, *launcher, "tests/killed_process.py", "held:300", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(line, **surroundings(), **pipes, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not any("tmp" not in name for name in checkpoints_of(out)) and running.poll() is None:
            assert time.monotonic() < deadline, "the run did not get that far"
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        (out.parent / "signalled").touch()
        return running.communicate(timeout=300)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "save_steps"),
    [(signal.SIGTERM, 2), (signal.SIGINT, 100)],  # a run of so few steps has no checkpoints of its own
)
def test_a_signal_is_taken_after_the_step(run, undisturbed, tmp_path, monkeypatch, capsys, number, save_steps):
    out, update, calls = tmp_path / "out", TrainingLoop._update_weights, itertools.count(1)

    def signalled(*args):
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return update(*args)

    monkeypatch.setattr(TrainingLoop, "_update_weights", signalled)
    assert refused(run(out, save_steps=save_steps)) == str(128 + number)
    assert "Stopped at step 3, which is saved. Go on with --resume auto --output_dir" in capsys.readouterr().err
    assert checkpoints_of(out) == ["step-00000003"]
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_go_on_after_ctrl_c(run, undisturbed, saved_tiny_folder, tmp_path):
    """With dropout. Ctrl-C reaches the processes twice: from the terminal, and from torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    out = tmp_path / "out"
    said = ctrl_c(run(out), out, launcher)
    (saved,) = checkpoints_of(out)
    step = int(saved.split("-")[1])  # 2 where the signal came before step 3 began
    assert step in (2, 3) and f"Stopped at step {step}, which is saved. Go on with --resume auto" in said, said
    line = [sys.executable, *launcher, "train_accelerate.py", *run(out, resume="auto")]
    subprocess.run(line, **surroundings(), check=True, capture_output=True, timeout=300)
    before, one, two = (load_model(folder).state_dict() for folder in (saved_tiny_folder, undisturbed, out))
    for name in one:
        # the fifth digit of a gradient near zero can change the sign of Adam's step
        assert (one[name] - two[name]).float().norm() <= 1e-2 * (one[name] - before[name]).float().norm() + 1e-6, name
    runs = [run_json(folder) for folder in (undisturbed, out)]
    assert [run["processes"] for run in runs] == [1, 2]
    losses = [[point["loss"] for point in run["curve"] if "loss" in point] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_finished_training_is_not_lost(run, undisturbed, tmp_path, monkeypatch):
    """Ctrl-C while it is measured; another program writes to the folder that is to be."""
    out, measure = tmp_path / "out", train_accelerate.evaluate_models

    def filled(*args) -> None:
        measure(*args)
        out.mkdir()
        (out / "theirs.txt").touch()

    with monkeypatch.context() as patch:
        patch.setattr(train_accelerate, "evaluate_models", Mock(side_effect=KeyboardInterrupt))
        assert refused(run(out, save_steps=100)) == "130" and not checkpoints_of(out)
    monkeypatch.setattr(TrainingLoop, "train", None)  # nothing is trained again
    with monkeypatch.context() as patch:
        patch.setattr(train_accelerate, "evaluate_models", filled)
        assert "is not empty" in refused(run(out, resume="auto"))
    (out / "theirs.txt").unlink()
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


# Not the same run


def test_what_is_another_run_is_refused_and_changes_nothing(run, tmp_path):
    """Started over by mistake; with other settings, each of which is named."""
    argv = run(tmp_path / "out")
    killed_run(argv, TrainingLoop, "_one_step", 4)
    before = sorted(path.name for path in (tmp_path / "out.partial").rglob("*"))
    assert re.search(r"out\.partial holds an unfinished run.*--resume auto.*--overwrite_output_dir", refused(argv))
    message = refused([*argv, "--resume", "auto", "--learning_rate", "2e-3", "--seed", "5", "--save_steps", "9"])
    assert "step-00000002 is of another run" in message and "save_steps" not in message
    assert "learning_rate: 0.001 there, 0.002 now" in message and "seed: 0 there, 5 now" in message
    assert sorted(path.name for path in (tmp_path / "out.partial").rglob("*")) == before


@pytest.mark.slow
def test_an_earlier_checkpoint_goes_on_where_a_later_one_is_damaged(run, undisturbed, tmp_path, monkeypatch, caplog):
    """By its name, in another folder, with settings that change no weight; another number of threads is said."""
    first, out = tmp_path / "first", tmp_path / "out"
    killed_run(run(first, keep_last=2), TrainingLoop, "_one_step", 6)
    checkpoints = tmp_path / "first.partial/checkpoints"
    path = checkpoints / "step-00000004/optimizer.bin"
    flipped(path, path.stat().st_size // 2)
    message = refused(run(first, keep_last=2, resume="auto"))
    assert re.search(r"step-00000004 can't be loaded: optimizer.bin or .*--resume auto", message)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    train_accelerate.main(run(out, resume=checkpoints / "step-00000002", keep_last=3, save_steps=1))
    assert "with 1 CPU threads on " in caplog.text and "--num_threads 1 keep" in caplog.text
    assert_as_undisturbed(out, undisturbed)


# The best, trackers


@pytest.mark.slow
def test_the_last_checkpoints_and_the_best_stay(run, tmp_path, monkeypatch):
    recalls = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])  # at the start, and then every time

    def measured(trainer):
        return dict.fromkeys(("text_to_image", "image_to_text", "mean_recall"), next(recalls)) | {"loss": 1.0}

    monkeypatch.setattr(TrainingLoop, "_measure_validation", measured)
    out = train_accelerate.main(run(tmp_path / "out", eval_steps=1, save_steps=1, max_steps=8, keep_last=2))
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000007", "step-00000008"]


@pytest.mark.slow
def test_tensorboard(run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = train_accelerate.main(run(tmp_path / "out", tracker="tensorboard"))
    (folder,) = {path.parent for path in out.rglob("events.out.tfevents.*") if path.parent.name == "capivara"}
    curves = events.EventAccumulator(str(folder)).Reload()
    losses = {point["step"]: point["loss"] for point in run_json(out)["curve"] if "loss" in point}
    assert {event.step: event.value for event in curves.Scalars("loss")} == pytest.approx(losses)
    assert {"validation/loss", "learning_rate", "gradient_norm"} <= set(curves.Tags()["scalars"])


def test_a_loss_that_is_not_finite_stops_and_names_its_step(run, tmp_path, monkeypatch):
    original, calls = whole_batch.contrastive_loss, itertools.count(1)

    def bad(*args):  # but for that of the validation split
        return original(*args) * (float("nan") if torch.is_grad_enabled() and next(calls) == 4 else 1)

    monkeypatch.setattr(whole_batch, "contrastive_loss", bad)
    assert "Step 4: The loss is nan. Lower the learning rate" in refused(run(tmp_path / "out"))
    assert checkpoints_of(tmp_path / "out") == ["step-00000002"]


@pytest.mark.slow
def test_a_run_that_replaces_another_goes_on_and_the_old_one_stays_until_then(run, undisturbed, tmp_path):
    out, replacing = tmp_path / "out", {"overwrite_output_dir": "true"}
    old = weights(train_accelerate.main(run(out, max_steps=2)))
    killed_run(run(out, **replacing), TrainingLoop, "_one_step", 4)
    assert weights(out) == old and "--overwrite_output_dir" in refused(run(out, resume="auto"))
    train_accelerate.main(run(out, resume="auto", **replacing))
    assert_as_undisturbed(out, undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
