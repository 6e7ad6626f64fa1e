"""A run that is killed, stopped or fails can go on, and ends with the bits of an undisturbed one.

The moments of the kills come from a seed that is printed; CAPIVARA_KILL_SEED=N draws others.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict, load_from_disk
from sampling import one_in
from test_checkpoints import flipped
from test_train_accelerate import flags
from tiny import randomise, tiny_config

import train_accelerate
from capivara_common.files import RUN_MARKER
from modeling_capivara import CapivaraModel
from training import whole_batch
from training.checkpoints import Checkpoints
from training.loop import Trainer
from training.whole_batch import WholeBatch

ROOT = Path(__file__).resolve().parent.parent
KILL_SEED = int(os.environ.get("CAPIVARA_KILL_SEED", "0"))
MICRO_BATCHES = 3 * 6  # of 10 pairs in fours, in six steps
# Phase -> how often an undisturbed run reaches it.
PHASES = {
    "cache-before": 2, "cache-after": 2, "forward": MICRO_BATCHES, "step-before": 6, "step-after": 6, "save": 2,
    "save-state": 2, "rename-before": 2, "rename-after": 2, "old": 1, "end": 1, "finish": 1,
}  # fmt: skip


class Killed(BaseException):
    """Ends a run within this process, which is quicker than to start another."""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("base") / "model"
    model = randomise(CapivaraModel(tiny_config()))
    assert model.config.text_config.hidden_dropout_prob > 0, "without dropout the random states would not matter"
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run(base_folder, tiny_dataset_folder):
    """Flags of a run that saves every second step and keeps one checkpoint."""

    def make(output, **overrides) -> list[str]:
        return flags(
            base_folder, tiny_dataset_folder, output, **{"save_steps": 2, "eval_steps": 6, "keep_last": 1, **overrides}
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(base_folder, tiny_dataset_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    train_accelerate.main(flags(base_folder, tiny_dataset_folder, out, save_steps=2, eval_steps=6, keep_last=1))
    return out


def process(argv: list[str], *phase, cache: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command(argv, *phase), **surroundings(cache), capture_output=True, text=True, timeout=300)


def command(argv: list[str], *phase) -> list[str]:
    script = ["tests/killed_process.py", *map(str, phase)] if phase else ["train_accelerate.py"]
    return [sys.executable, *script, *argv]


def surroundings(cache: Path | None = None) -> dict:
    own = {"CAPIVARA_CACHE": str(cache)} if cache else {}
    return {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **own}}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They are proven elsewhere, and take longer than a run; those of other processes are drawn."""
    for name in ("plot_training_curves", "plot_retrieval_sheet"):
        monkeypatch.setattr(train_accelerate, name, lambda *args, **options: None)


def kill_at(monkeypatch, owner, name: str, count: int) -> None:
    """Within the block, the `count`-th call of `owner.name` raises Killed."""
    counter, original = itertools.count(1), getattr(owner, name)

    def wrapped(*args, **kwargs):
        if next(counter) == count:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def killed_run(argv: list[str], owner, name: str, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, owner, name, count)
        train_accelerate.main(argv)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def assert_as_undisturbed(out: Path, expected: Path) -> None:
    assert weights(out) == weights(expected)
    curves = [
        [{key: p[key] for key in ("step", "loss", "gradient_norm", "validation") if key in p} for p in curve]
        for curve in (run_json(out)["curve"], run_json(expected)["curve"])
    ]
    assert curves[0] == curves[1], "each step once, with the same figures"
    assert [point["step"] for point in curves[0]] == list(range(len(curves[0])))
    assert not out.with_name(f"{out.name}.partial").exists()
    assert not list(out.rglob("tmp-*"))


# Killed


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_sigkill(run, undisturbed, tmp_path, phase):
    count = random.Random(f"{KILL_SEED} {phase}").randint(1, PHASES[phase])
    print(f"CAPIVARA_KILL_SEED={KILL_SEED}: killed at number {count} of {phase}")
    out, cache = tmp_path / "out", tmp_path / "cache"
    killed = process(run(out), phase, count, cache=cache)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    resumed = process(run(out, resume="auto"), cache=cache)
    assert resumed.returncode == 0, resumed.stderr
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.slow
def test_sigkill_again_and_again(run, undisturbed, tmp_path):
    """Every attempt is killed, at moments that go on; the last one is left alone."""
    generator = random.Random(f"{KILL_SEED} again")
    out, cache = tmp_path / "out", tmp_path / "cache"
    for phase, most in (
        ("cache-after", 2),
        ("forward", 6),
        ("rename-after", 1),
        ("step-after", 2),
        ("save", 1),
        ("end", 1),
    ):
        count = generator.randint(1, most)
        print(f"CAPIVARA_KILL_SEED={KILL_SEED}: killed at number {count} of {phase}")
        killed = process(run(out, resume="auto"), phase, count, cache=cache)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert process(run(out, resume="auto"), cache=cache).returncode == 0
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.parametrize("count", one_in(4, [13, 1, 8, 19]))
def test_killed_at_any_forward_pass(run, undisturbed, tmp_path, count):
    out = tmp_path / "out"
    killed_run(run(out), WholeBatch, "_embed", count)
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


VARIANTS = {
    "lora": {"lora_rank": 2},
    "interpolation": {"interpolate": 0.5},
    "adamw, decay": {"optimizer": "adamw", "weight_decay": 0.3},
    "views": {"augmented_views": 3},
    "fresh views": {"augmented_views": 0, "image_embedding_cache": "off"},
    "all captions": {"language": "en", "eval_languages": "en"},
}


QUICK = ("lora", "interpolation")


@pytest.mark.parametrize("variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
@pytest.mark.slow
def test_every_kind_of_training_resumes(run, tmp_path, variant):
    expected, out = tmp_path / "expected", tmp_path / "out"
    if "lora_rank" in VARIANTS[variant]:
        pytest.importorskip("peft")
    train_accelerate.main(run(expected, **VARIANTS[variant]))
    killed_run(run(out, **VARIANTS[variant]), Trainer, "_update", 6)
    assert [p.name for p in (tmp_path / "out.partial/checkpoints").iterdir()] == ["step-00000004"]
    train_accelerate.main(run(out, resume="auto", **VARIANTS[variant]))
    assert_as_undisturbed(out, expected)
    if variant == "lora":
        adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (out, expected)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


# Stopped


@contextlib.contextmanager
def started(argv: list[str], checkpoints: Path, launcher: tuple[str, ...] = ()):
    """A run in a process group of its own, that has saved its first checkpoint and waits to be signalled."""
    line = [sys.executable, *launcher, *command(argv, "held", 300)[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(line, **surroundings(), **pipes, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not any(checkpoints.glob("step-*")) and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any(checkpoints.glob("step-*")), "the run did not get that far"
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("save_steps", [2, 100])  # a run of so few steps has no checkpoints of its own
def test_a_signal_is_taken_after_the_step(run, undisturbed, tmp_path, monkeypatch, capsys, save_steps, number):
    out, update, calls = tmp_path / "out", Trainer._update, itertools.count(1)

    def signalled(*args):
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return update(*args)

    monkeypatch.setattr(Trainer, "_update", signalled)
    with pytest.raises(SystemExit) as stop:
        train_accelerate.main(run(out, save_steps=save_steps))
    assert stop.value.code == 128 + number
    assert "Stopped at step 3, which is saved. Go on with --resume auto --output_dir" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out.partial/checkpoints").iterdir()] == ["step-00000003"]
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_process(run, undisturbed, tmp_path, number):
    out, checkpoints = tmp_path / "out", tmp_path / "out.partial" / "checkpoints"
    with started(run(out), checkpoints) as running:
        running.send_signal(number)
        (tmp_path / "signalled").touch()
        _, stderr = running.communicate(timeout=300)
    assert running.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    (saved,) = checkpoints.iterdir()
    step = int(saved.name.split("-")[1])
    assert step in (2, 3) and f"Stopped at step {step}, which is saved. Go on with --resume auto --output_dir" in stderr
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.slow
def test_a_signal_to_two_processes_and_their_launcher(run, tmp_path):
    """Ctrl-C reaches the processes twice: from the terminal, and from torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    subprocess.run(
        [sys.executable, *launcher, *command(run(tmp_path / "expected"))[1:]],
        **surroundings(), check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    out, checkpoints = tmp_path / "out", tmp_path / "out.partial" / "checkpoints"
    with started(run(out), checkpoints, launcher) as running:
        os.killpg(running.pid, signal.SIGINT)
        (tmp_path / "signalled").touch()
        _, stderr = running.communicate(timeout=300)
    (saved,) = checkpoints.iterdir()
    step = int(saved.name.split("-")[1])  # 2 where the signal came before step 3 began
    assert step in (2, 3) and f"Stopped at step {step}, which is saved. Go on with --resume auto" in stderr, stderr
    subprocess.run(
        [sys.executable, *launcher, *command(run(out, resume="auto"))[1:]],
        **surroundings(), check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert_as_undisturbed(out, tmp_path / "expected")


@pytest.mark.slow
def test_ctrl_c_outside_of_the_steps(run, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_accelerate, "measure", interrupted)
        with pytest.raises(SystemExit) as stop:
            train_accelerate.main(run(out))
    assert stop.value.code == 130
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


# Failed


def test_a_loss_that_is_not_finite_stops_and_names_its_step(run, tmp_path, monkeypatch):
    original, calls = whole_batch.contrastive_loss, itertools.count(1)

    def bad(*args):
        return original(*args) * (float("nan") if next(calls) == 4 else 1)

    monkeypatch.setattr(whole_batch, "contrastive_loss", bad)
    with pytest.raises(SystemExit, match=r"Step 4: The loss is nan\. Lower the learning rate"):
        train_accelerate.main(run(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out.partial" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
@pytest.mark.parametrize("eval_steps", [1, 100])
def test_a_real_divergence(run, tmp_path, eval_steps):
    """Whichever notices it first, a loss or the measurement: the error says what happened, and nothing is poisoned."""
    argv = run(tmp_path / "out", learning_rate=1e30, warmup_steps=0, eval_steps=eval_steps, save_steps=1)
    with pytest.raises(SystemExit, match=r"( is |is )(nan|inf|NaN).*learning rate"):
        train_accelerate.main(argv)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, timeout=20
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
@pytest.mark.parametrize("full_in", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "trainer.json"])
@pytest.mark.slow
def test_disk_full_while_saving_keeps_the_checkpoint_before(run, undisturbed, small_disk, monkeypatch, full_in):
    out, checkpoints = small_disk / "out", small_disk / "out.partial" / "checkpoints"
    save = Checkpoints.save

    def with_little_room(self, state):
        if state.step == 4:
            sizes = {path.name: path.stat().st_size for path in (checkpoints / "step-00000002").iterdir()}
            names = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "trainer.json"]
            room = sum(-(-sizes[name] // 4096) for name in names[: names.index(full_in)]) * 4096
            room += sizes[full_in] // 2 // 4096 * 4096
            fill(small_disk, room)
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", with_little_room)
    with pytest.raises(SystemExit) as stop:
        train_accelerate.main(run(out))
    for part in ("The checkpoint of step 4 can't be written", "The earlier ones are whole", "--resume auto"):
        assert part in stop.value.code, stop.value.code
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True, timeout=20)
    monkeypatch.setattr(Checkpoints, "save", save)
    train_accelerate.main(run(out, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


def fill(disk: Path, room: int) -> None:
    """Leave so many bytes of a tmpfs."""
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(max(shutil.disk_usage(disk).free - room, 0)))
    assert shutil.disk_usage(disk).free == room


# Not the same run


def test_other_settings_are_listed(run, tmp_path):
    killed_run(run(tmp_path / "out"), Trainer, "_one_step", 4)
    before = sorted(path.name for path in (tmp_path / "out.partial").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train_accelerate.main(run(tmp_path / "out", resume="auto", learning_rate=2e-3, seed=5, micro_batch_size=2))
    for part in (
        "step-00000002 is of another run", "learning_rate: 0.001 there, 0.002 now", "seed: 0 there, 5 now",
        "micro_batch_size: 4 there, 2 now",
    ):  # fmt: skip
        assert part in stop.value.code
    assert "max_steps" not in stop.value.code and "save_steps" not in stop.value.code
    assert sorted(path.name for path in (tmp_path / "out.partial").rglob("*")) == before


def test_one_other_caption_is_another_data_set(run, base_folder, tiny_dataset_folder, tmp_path):
    dataset = tmp_path / "squares"
    shutil.copytree(tiny_dataset_folder, dataset)
    argv = flags(base_folder, dataset, tmp_path / "out", save_steps=2)
    killed_run(argv, Trainer, "_one_step", 4)
    splits = load_from_disk(tiny_dataset_folder)
    captions = splits["train"]["captions-pt"][:]
    captions[3] = ["foto 3 azul branca"]
    column = splits["train"].features["captions-pt"]
    changed = splits["train"].remove_columns("captions-pt").add_column("captions-pt", captions, feature=column)
    shutil.rmtree(dataset)
    DatasetDict(splits | {"train": changed}).save_to_disk(dataset)
    with pytest.raises(SystemExit) as stop:
        train_accelerate.main([*argv, "--resume", "auto"])
    assert f"data {dataset} train: '" in stop.value.code and "validation" not in stop.value.code


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
def test_a_flipped_byte_ends_the_run_before_any_work_and_an_earlier_checkpoint_goes_on(
    run, undisturbed, tmp_path, monkeypatch, name
):
    out = tmp_path / "out"
    killed_run(run(out, keep_last=2), Trainer, "_one_step", 6)
    checkpoint = tmp_path / "out.partial/checkpoints/step-00000004"
    flipped(checkpoint / name, (checkpoint / name).stat().st_size // 2)
    with monkeypatch.context() as patch:
        patch.setattr(train_accelerate, "load_inputs", None)
        with pytest.raises(SystemExit, match=rf"^error: .*step-00000004 can't be loaded: {name} or .*--resume auto"):
            train_accelerate.main(run(out, keep_last=2, resume="auto"))
    shutil.rmtree(checkpoint)
    train_accelerate.main(run(out, keep_last=2, resume="auto"))
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.slow
def test_settings_that_change_no_weight_may_change(run, undisturbed, tmp_path):
    out = tmp_path / "out"
    killed_run(run(out), Trainer, "_one_step", 4)
    train_accelerate.main(run(out, resume="auto", keep_last=3, save_steps=1))
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.slow
def test_another_number_of_threads_is_said(run, tmp_path, caplog, monkeypatch):
    killed_run(run(tmp_path / "out"), Trainer, "_one_step", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    train_accelerate.main(run(tmp_path / "out", resume="auto"))
    assert (
        "with 1 CPU threads on " in caplog.text
        and "now there are 2 on " in caplog.text
        and "--num_threads 1 keep" in caplog.text
    )


def test_a_checkpoint_by_its_name(run, undisturbed, tmp_path):
    killed_run(run(tmp_path / "first", keep_last=9), Trainer, "_one_step", 6)
    checkpoint = tmp_path / "first.partial" / "checkpoints" / "step-00000002"
    train_accelerate.main(run(tmp_path / "out", resume=checkpoint))
    assert_as_undisturbed(tmp_path / "out", undisturbed)
    with pytest.raises(SystemExit, match=r"no checkpoint of a run: it has no trainer\.json"):
        train_accelerate.main(run(tmp_path / "other", resume=tmp_path))
    assert not list(tmp_path.glob("other*"))


def test_a_complete_run_is_left_as_it_is(run, undisturbed, capsys):
    def state():
        return {path: path.stat().st_mtime_ns for path in [undisturbed.parent, *undisturbed.parent.rglob("*")]}

    before = state()
    assert train_accelerate.main(run(undisturbed, resume="auto")) == undisturbed
    assert "is complete; there is nothing to go on with" in capsys.readouterr().out
    assert state() == before


@pytest.mark.slow
def test_a_run_that_shall_replace_a_complete_one_goes_on(run, undisturbed, tmp_path):
    out = tmp_path / "out"
    train_accelerate.main(run(out, max_steps=2))
    killed_run(run(out, overwrite_output_dir="true"), Trainer, "_one_step", 4)
    with pytest.raises(SystemExit, match=r"not empty.*--overwrite_output_dir"):
        train_accelerate.main(run(out, resume="auto"))
    assert len(run_json(out)["curve"]) == 3
    train_accelerate.main(run(out, resume="auto", overwrite_output_dir="true"))
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.slow
def test_a_kill_after_the_rename_leaves_nothing_for_ever(run, tmp_path, monkeypatch):
    finish = train_accelerate.finish_folder

    def finish_and_die(*args):
        finish(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_accelerate, "finish_folder", finish_and_die)
        train_accelerate.main(run(tmp_path / "out"))
    assert (tmp_path / "out" / RUN_MARKER).is_file()
    train_accelerate.main(run(tmp_path / "out", resume="auto"))
    assert not (tmp_path / "out" / RUN_MARKER).exists()


@pytest.mark.slow
def test_sigkill_while_one_run_replaces_another(run, undisturbed, tmp_path):
    """The old one is there again under its name, until the new one, which goes on, takes its place."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    train_accelerate.main(run(out, max_steps=2))
    old = weights(out)
    killed = process(run(out, overwrite_output_dir="true"), "replace-before", 1, cache=cache)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists(), "the moment between the two renames"
    with pytest.raises(SystemExit, match="is not empty"):
        train_accelerate.main(run(out))
    assert weights(out) == old
    train_accelerate.main(run(out, overwrite_output_dir="true", resume="auto"))
    assert_as_undisturbed(out, undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_an_unfinished_run_is_not_started_over_by_mistake(run, tmp_path):
    killed_run(run(tmp_path / "out"), Trainer, "_one_step", 4)
    with pytest.raises(
        SystemExit, match=r"out\.partial holds an unfinished run.*--resume auto.*--overwrite_output_dir"
    ):
        train_accelerate.main(run(tmp_path / "out"))
    assert (tmp_path / "out.partial/checkpoints/step-00000002").is_dir()


@pytest.mark.slow
def test_a_finished_training_is_not_thrown_away_by_mistake(run, tmp_path):
    killed_run(run(tmp_path / "out", save_steps=100), train_accelerate, "measure", 1)
    assert not list((tmp_path / "out.partial").rglob("step-*"))
    with pytest.raises(SystemExit, match="holds an unfinished run"):
        train_accelerate.main(run(tmp_path / "out", save_steps=100))
    assert (tmp_path / "out.partial/run.json").is_file()


# The best


def recalls(monkeypatch, values: list[float]) -> None:
    """The recall that is measured at the start and then every time."""
    left = iter(values)

    def measured(trainer):
        return dict.fromkeys(("text_to_image", "image_to_text"), next(left)) | {"loss": 1.0}

    monkeypatch.setattr(Trainer, "_measured", measured)


@pytest.mark.slow
def test_the_last_checkpoints_and_the_best_stay(run, tmp_path, monkeypatch):
    recalls(monkeypatch, [0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    out = train_accelerate.main(run(tmp_path / "out", eval_steps=1, save_steps=1, max_steps=8, keep_last=2))
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000007", "step-00000008"]


# Trackers, pickles


@pytest.mark.slow
def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train_accelerate.main(run(tmp_path / "out", tracker="tensorboard"))
    (events,) = {path.parent for path in out.rglob("events.out.tfevents.*") if path.parent.name == "capivara"}
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"loss", "validation/loss", "learning_rate", "gradient_norm", "logit_scale", "pairs_per_second"} <= tags
    assert any(tag.startswith("validation/") and tag != "validation/loss" for tag in tags)
    losses = {event.step: event.value for event in accumulator.Scalars("loss")}
    curve = {point["step"]: point["loss"] for point in run_json(out)["curve"] if "loss" in point}
    assert losses == pytest.approx(curve)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    train_accelerate.main(run(out, tracker="tensorboard", resume="auto"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_tracker_leaves_nothing_where_the_run_can_not_start(run, tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(SystemExit, match="no column"):
        train_accelerate.main(run(tmp_path / "out", tracker="tensorboard", language="xh"))
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed(run, tmp_path, monkeypatch):
    monkeypatch.setattr("capivara_common.environment.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"--tracker wandb needs wandb, not installed yet: pip install wandb$"):
        train_accelerate.main(run(tmp_path / "out", tracker="wandb"))
