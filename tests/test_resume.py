"""A run that was killed, stopped or has failed can be resumed, and ends with the same bits as an uninterrupted run.

The moments of the kills are random. The seed is printed; CAPIVARA_KILL_SEED=N sets another.
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
from test_train_accelerate import ROOT, error_of, flags

import train_accelerate
from capivara_common.files import RUN_MARKER
from modeling_capivara.loading import load_model
from training import whole_batch
from training.loop import TrainingLoop
from training.whole_batch import WholeBatch

KILL_SEED = int(os.environ.get("CAPIVARA_KILL_SEED", "0"))
# Phases of `tests/killed_process.py`, and how often each is reached at least. Each process resumes where the one before
# it was killed.
KILLS = [
    *[("cache-before", 2), ("cache-after", 1), ("forward", 6), ("step-before", 2), ("step-after", 2), ("save", 1)],
    *[("save-state", 1), ("rename-before", 1), ("rename-after", 1), ("forward", 6), ("old", 1), ("end", 1)],
    *[("finish", 1), ("finished", 1)],
]


pytestmark = pytest.mark.usefixtures("no_pictures")  # skips plots in this process, which takes less time


class Killed(BaseException):
    """Ends a run in this process, which is faster than starting another process and killing it."""


@pytest.fixture(scope="module")
def run(saved_tiny_folder, tiny_dataset_folder):
    """Return the flags of a run that saves every second step and keeps one checkpoint."""

    def make(output, dataset=tiny_dataset_folder, **overrides) -> list[str]:
        values = {"save_steps": 2, "eval_steps": 6, "keep_last": 1, **overrides}
        return flags(saved_tiny_folder, dataset, output, **values)

    return make


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory, saved_tiny_folder):
    """Folder of a run that nothing has interrupted."""
    config = load_model(saved_tiny_folder).config
    assert config.text_config.hidden_dropout_prob > 0, "without dropout the random states would not matter"
    return train_accelerate.main(run(tmp_path_factory.mktemp("uninterrupted") / "out"))


def process_options(cache: Path | None = None) -> dict:
    """Return the working directory and environment for a process of the repository."""
    cache_variable = {"CAPIVARA_CACHE": str(cache)} if cache else {}
    return {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", **cache_variable}}


def kill_run(argv: list[str], owner, name: str, count: int) -> None:
    """Run the command until the `count`-th call of `owner.name`, which raises `Killed`."""
    counter, original = itertools.count(1), getattr(owner, name)

    def wrapped(*args, **kwargs):
        if next(counter) == count:
            raise Killed
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, wrapped)
        train_accelerate.main(argv)


def read_weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def read_run(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def checkpoint_names(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(f"{out.name}.partial").glob("checkpoints/*"))


def assert_equals_uninterrupted(out: Path, expected: Path) -> None:
    """Check that a resumed run has the weights and the curve of an uninterrupted one, and left no temporary files."""
    assert read_weights(out) == read_weights(expected)
    curves = [
        [{key: p[key] for key in ("step", "loss", "gradient_norm", "validation") if key in p} for p in curve]
        for curve in (read_run(out)["curve"], read_run(expected)["curve"])
    ]
    assert curves[0] == curves[1], "each step is in the curve once, with the same values"
    assert [point["step"] for point in curves[0]] == list(range(len(curves[0])))
    assert not out.with_name(f"{out.name}.partial").exists()
    assert not list(out.rglob("tmp-*")) and not (out / RUN_MARKER).exists()


# ---- killed ----


@pytest.mark.slow
def test_a_run_killed_in_every_phase_is_resumed(run, uninterrupted, tmp_path):
    generator, out = random.Random(KILL_SEED), tmp_path / "out"
    kills = ",".join(f"{phase}:{generator.randint(1, most)}" for phase, most in KILLS)
    print(f"CAPIVARA_KILL_SEED={KILL_SEED}: killed at {kills}")
    command = [sys.executable, "tests/killed_process.py", kills, *run(out, resume="auto")]
    done = subprocess.run(command, **process_options(tmp_path / "cache"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    train_accelerate.main(run(out, resume="auto"))
    assert_equals_uninterrupted(out, uninterrupted)


@pytest.mark.slow
def test_a_run_killed_in_a_forward_pass_is_resumed(run, uninterrupted, tmp_path):
    out = tmp_path / "out"
    kill_run(run(out), WholeBatch, "_embed", 13)
    train_accelerate.main(run(out, resume="auto"))
    assert_equals_uninterrupted(out, uninterrupted)


VARIANTS = {
    "adapters, interpolation": {"lora_rank": 2, "interpolate": 0.5},
    "adamw, decay, views": {"optimizer": "adamw", "weight_decay": 0.3, "augmented_views": 3},
    "fresh views, all captions, bad images": {
        **{"augmented_views": 0, "image_embedding_cache": "off", "language": "en", "eval_languages": "en"},
        **{"max_bad_share": 0.2, "effective_batch_size": 8},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_training_is_resumed(run, tiny_dataset_folder, tmp_path, variant):
    expected, out, values = tmp_path / "expected", tmp_path / "out", VARIANTS[variant]
    if "max_bad_share" in values:
        values = values | {"dataset": altered(tiny_dataset_folder, tmp_path / "data", {3: NEGATIVE, 7: NEGATIVE})}
    train_accelerate.main(run(expected, **values))
    kill_run(run(out, **values), TrainingLoop, "_update_weights", 6)
    assert checkpoint_names(out) == ["step-00000004"]
    train_accelerate.main(run(out, resume="auto", **values))
    assert_equals_uninterrupted(out, expected)
    skipped = [path.read_text() if (path := folder / "skipped.jsonl").exists() else "" for folder in (out, expected)]
    assert skipped[0] == skipped[1] and skipped[0].count("unreadable image") == (2 if "max_bad_share" in values else 0)
    adapters = [sorted(folder.glob("adapter/*.safetensors")) for folder in (out, expected)]
    assert len(adapters[0]) == len(adapters[1]) == ("lora_rank" in values)
    assert [path.read_bytes() for path in adapters[0]] == [path.read_bytes() for path in adapters[1]]


# ---- stopped ----


def interrupt_run(argv: list[str], out: Path, launcher: Sequence[str]) -> str:
    """Send SIGINT to the process group of a run after its first checkpoint, and return what it prints."""
    command = [sys.executable, *launcher, "tests/killed_process.py", "held:300", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, **process_options(), **pipes, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not any("tmp" not in name for name in checkpoint_names(out)) and running.poll() is None:
            assert time.monotonic() < deadline, "the run has written no checkpoint"
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
    [(signal.SIGTERM, 2), (signal.SIGINT, 100)],  # with save_steps above max_steps, only the signal causes a checkpoint
)
def test_a_signal_stops_the_run_after_the_step_and_saves_it(
    run, uninterrupted, tmp_path, monkeypatch, capsys, number, save_steps
):
    out, update, calls = tmp_path / "out", TrainingLoop._update_weights, itertools.count(1)

    def signalled(*args):
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return update(*args)

    monkeypatch.setattr(TrainingLoop, "_update_weights", signalled)
    assert error_of(run(out, save_steps=save_steps)) == str(128 + number)
    assert re.search(r"step 3\b.*--resume auto --output_dir", capsys.readouterr().err)
    assert checkpoint_names(out) == ["step-00000003"]
    train_accelerate.main(run(out, resume="auto"))
    assert_equals_uninterrupted(out, uninterrupted)


@pytest.mark.slow
def test_two_processes_resume_after_ctrl_c_and_equal_one_process(run, uninterrupted, saved_tiny_folder, tmp_path):
    """With dropout. Ctrl-C reaches the processes twice, from the terminal and from torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    out = tmp_path / "out"
    output = interrupt_run(run(out), out, launcher)
    (saved,) = checkpoint_names(out)
    step = int(saved.split("-")[1])  # 2 if the signal came before step 3 began
    assert step in (2, 3) and re.search(rf"step {step}\b.*--resume auto", output), output
    command = [sys.executable, *launcher, "train_accelerate.py", *run(out, resume="auto")]
    subprocess.run(command, **process_options(), check=True, capture_output=True, timeout=300)
    before, single, double = (load_model(folder).state_dict() for folder in (saved_tiny_folder, uninterrupted, out))
    for name, weight in single.items():
        # The rounding error of a gradient near zero can change the sign of Adam's step.
        moved = (weight - before[name]).float().norm()
        assert (weight - double[name]).float().norm() <= 1e-2 * moved + 1e-6, name
    runs = [read_run(folder) for folder in (uninterrupted, out)]
    assert [run["processes"] for run in runs] == [1, 2]
    losses = [[point["loss"] for point in run["curve"] if "loss" in point] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_finished_training_is_not_lost(run, uninterrupted, tmp_path, monkeypatch):
    """Neither by Ctrl-C during the evaluation, nor by another program that writes into the output folder."""
    out, evaluate = tmp_path / "out", train_accelerate.evaluate_base_and_trained_and_write_results

    def evaluate_and_fill_output(*args) -> None:
        evaluate(*args)
        out.mkdir()
        (out / "theirs.txt").touch()

    with monkeypatch.context() as patch:
        patch.setattr(
            train_accelerate, "evaluate_base_and_trained_and_write_results", Mock(side_effect=KeyboardInterrupt)
        )
        assert error_of(run(out, save_steps=100)) == "130" and not checkpoint_names(out)
    monkeypatch.setattr(TrainingLoop, "train", None)  # nothing is trained again
    with monkeypatch.context() as patch:
        patch.setattr(train_accelerate, "evaluate_base_and_trained_and_write_results", evaluate_and_fill_output)
        assert str(out) in error_of(run(out, resume="auto"))
    (out / "theirs.txt").unlink()
    train_accelerate.main(run(out, resume="auto"))
    assert_equals_uninterrupted(out, uninterrupted)


# ---- other settings ----


def test_starting_over_or_resuming_with_other_settings_is_refused_and_changes_nothing(run, tmp_path):
    argv = run(tmp_path / "out")
    kill_run(argv, TrainingLoop, "_run_step", 4)
    before = sorted(path.name for path in (tmp_path / "out.partial").rglob("*"))
    assert re.search(r"out\.partial.*--resume auto.*--overwrite_output_dir", error_of(argv))
    message = error_of([*argv, "--resume", "auto", "--learning_rate", "2e-3", "--seed", "5", "--save_steps", "9"])
    assert "step-00000002" in message and "save_steps" not in message
    assert re.search(r"learning_rate: 0\.001\b.*\b0\.002\b.*seed: 0\b.*\b5\b", message)
    assert sorted(path.name for path in (tmp_path / "out.partial").rglob("*")) == before


@pytest.mark.slow
def test_a_run_resumes_from_an_earlier_checkpoint_if_the_latest_is_damaged(
    run, uninterrupted, tmp_path, monkeypatch, caplog
):
    """From its path, into another folder, with other settings that affect no weight. Other threads cause a warning."""
    first, out = tmp_path / "first", tmp_path / "out"
    kill_run(run(first, keep_last=2), TrainingLoop, "_run_step", 6)
    checkpoints = tmp_path / "first.partial/checkpoints"
    path = checkpoints / "step-00000004/optimizer.bin"
    flipped(path, path.stat().st_size // 2)
    message = error_of(run(first, keep_last=2, resume="auto"))
    assert re.search(r"step-00000004\b.*optimizer\.bin.*--resume auto", message)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    train_accelerate.main(run(out, resume=checkpoints / "step-00000002", keep_last=3, save_steps=1))
    assert "--num_threads 1" in caplog.text
    assert_equals_uninterrupted(out, uninterrupted)


# ---- best checkpoint, trackers ----


@pytest.mark.slow
def test_a_run_keeps_the_latest_checkpoints_and_the_best(run, tmp_path, monkeypatch):
    recalls = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])  # before training, then after every step

    def measure(loop):
        return dict.fromkeys(("text_to_image", "image_to_text", "mean_recall"), next(recalls)) | {"loss": 1.0}

    monkeypatch.setattr(TrainingLoop, "_measure_validation", measure)
    out = train_accelerate.main(run(tmp_path / "out", eval_steps=1, save_steps=1, max_steps=8, keep_last=2))
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000007", "step-00000008"]


@pytest.mark.slow
def test_tensorboard_gets_the_curves(run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = train_accelerate.main(run(tmp_path / "out", tracker="tensorboard"))
    (folder,) = {path.parent for path in out.rglob("events.out.tfevents.*") if path.parent.name == "capivara"}
    curves = events.EventAccumulator(str(folder)).Reload()
    losses = {point["step"]: point["loss"] for point in read_run(out)["curve"] if "loss" in point}
    assert {event.step: event.value for event in curves.Scalars("loss")} == pytest.approx(losses)
    assert {"validation/loss", "learning_rate", "gradient_norm"} <= set(curves.Tags()["scalars"])


@pytest.mark.slow
def test_a_nan_loss_stops_the_run_and_names_the_step(run, tmp_path, monkeypatch):
    original, calls = whole_batch.compute_contrastive_loss_share, itertools.count(1)

    def nan_at_step_4(*args):  # counts training steps only, not evaluations of the validation split
        return original(*args) * (float("nan") if torch.is_grad_enabled() and next(calls) == 4 else 1)

    monkeypatch.setattr(whole_batch, "compute_contrastive_loss_share", nan_at_step_4)
    assert "Step 4: The loss is nan." in error_of(run(tmp_path / "out"))
    assert checkpoint_names(tmp_path / "out") == ["step-00000002"]


@pytest.mark.slow
def test_an_old_run_stays_until_the_run_that_replaces_it_is_complete(run, uninterrupted, tmp_path):
    out, replacing = tmp_path / "out", {"overwrite_output_dir": "true"}
    old = read_weights(train_accelerate.main(run(out, max_steps=2)))
    kill_run(run(out, **replacing), TrainingLoop, "_run_step", 4)
    assert read_weights(out) == old and "--overwrite_output_dir" in error_of(run(out, resume="auto"))
    train_accelerate.main(run(out, resume="auto", **replacing))
    assert_equals_uninterrupted(out, uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
