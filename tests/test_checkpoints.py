"""Checkpoints: whole or not there, the last ones and the best, read without running what is in them."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import training.checkpoints
from training.arguments import GONE_SINCE, RunArguments
from training.checkpoints import (
    CHANGEABLE_SETTINGS,
    CHECKSUM_FILE,
    STATE_FILE,
    Checkpoints,
    TrainingState,
    _compute_checksums,
    check_finished_run,
    check_same_run,
    next_numbered_folder,
    read_training_state,
)


@pytest.fixture
def checkpoints(tmp_path):
    """Of a small model after one step of Adam; `model` and `optimizer` are what is saved."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    model = accelerator.prepare_model(nn.Linear(5, 3), evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(torch.optim.Adam(model.parameters(), lr=0.1, fused=True))
    found = Checkpoints(tmp_path / "checkpoints", keep_last=2, accelerator=accelerator)
    found.model, found.optimizer = model, optimizer
    one_step(found)
    return found


def one_step(checkpoints: Checkpoints) -> None:
    checkpoints.optimizer.zero_grad()
    checkpoints.model(torch.ones(4, 5)).square().sum().backward()
    checkpoints.optimizer.step()


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_numbered_folders(tmp_path):
    assert next_numbered_folder(tmp_path, "x") == tmp_path / "x-001"
    (tmp_path / "x-001").mkdir()
    assert next_numbered_folder(tmp_path, "x") == tmp_path / "x-002"


def test_what_is_loaded_is_what_was_saved(checkpoints):
    curve = [{"step": 0, "validation": {"loss": 1.5}}, {"step": 1, "loss": 0.1 + 0.2}]
    state = TrainingState(1, curve, {"seed": 7}, {"data train": "abc"}, 1, 0.25, 12.5, 3)
    checkpoints.save(state)
    one_step(checkpoints)
    expected = {name: tensor.clone() for name, tensor in checkpoints.model.state_dict().items()}
    one_step(checkpoints)
    assert checkpoints.load(checkpoints.path(1), state) == state
    one_step(checkpoints)  # from the loaded moments of Adam
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoints.model.state_dict().items())


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [(2, [0] * 5, [4, 5]), (9, [0] * 5, [1, 2, 3, 4, 5]), (1, [0, 2, 2, 2, 2], [2, 5]), (1, [1, 1, 3, 3], [3, 4])],
)
def test_the_last_ones_and_the_best_are_kept(checkpoints, keep_last, best, kept):
    """`best` is the best step of so far, at each step; 0 before there is one."""
    checkpoints.keep_last = keep_last
    for step, best_step in enumerate(best, 1):
        checkpoints.save(TrainingState(step, best_step=best_step or None))
    assert checkpoints.steps() == kept
    assert names(checkpoints) == [f"step-{step:08d}" for step in kept], "nothing else is left"


def test_auto_resumes_from_the_newest_checkpoint(checkpoints):
    args = RunArguments(model="m", dataset=["d"], resume="auto")
    assert checkpoints.find_resume_checkpoint(args) is None
    for step in (8, 9, 10):
        checkpoints.save(TrainingState(step, config=args.to_dict(), best_step=8))
    assert checkpoints.steps() == [8, 9, 10] and checkpoints.find_resume_checkpoint(args) == checkpoints.path(10)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
def test_a_failed_save_leaves_the_one_before(checkpoints, monkeypatch, error):
    checkpoints.keep_last = 1
    checkpoints.save(TrainingState(1))
    monkeypatch.setattr(training.checkpoints, "write_json", Mock(side_effect=error))
    with pytest.raises((KeyboardInterrupt, OSError), match=r"^$|The earlier ones are whole; go on with --resume auto"):
        checkpoints.save(TrainingState(2))
    assert names(checkpoints) == ["step-00000001"]


class Malicious:
    """Runs code where it is unpickled without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_run(checkpoints, tmp_path, name, kind):
    checkpoints.save(TrainingState(1))
    proof, path = tmp_path / "proof", checkpoints.path(1) / name
    torch.save(Malicious(proof), path) if kind == "torch" else path.write_bytes(pickle.dumps(Malicious(proof)))
    (path.parent / CHECKSUM_FILE).write_bytes(_compute_checksums(path.parent))  # whoever means harm writes them, too
    if name == "random_states_0.pkl":  # Accelerate passes over it; no result depends on it
        checkpoints.load(checkpoints.path(1), TrainingState())
    else:
        with pytest.raises(ValueError, match=r"step-00000001 can't be loaded.*earlier"):
            checkpoints.load(checkpoints.path(1), TrainingState())
    assert not proof.exists()
    torch.load(path, weights_only=False) if kind == "torch" else pickle.loads(path.read_bytes())
    assert proof.exists(), "the file would have run its code"


def flipped(path: Path, place: int, mask: int = 1) -> None:
    """Change a byte of a file in place; twice is not at all."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ mask]))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", STATE_FILE, CHECKSUM_FILE]
)
def test_a_flipped_byte_is_not_loaded(checkpoints, name):
    checkpoints.save(TrainingState(1))
    one_step(checkpoints)
    moved = checkpoints.model.weight.clone()
    path = checkpoints.path(1) / name
    flipped(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"step-00000001 can't be loaded: .*{name}.* earlier one"):
        checkpoints.load(checkpoints.path(1), TrainingState())
    assert torch.equal(checkpoints.model.weight, moved)


def not_listed(folder: Path) -> None:
    lines = (folder / CHECKSUM_FILE).read_text().splitlines(True)
    (folder / CHECKSUM_FILE).write_text("".join(line for line in lines if not line.endswith("  optimizer.bin\n")))


def stray(name: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).parent.mkdir(exist_ok=True), (folder / name).write_text("of somebody"))


CHANGES = [  # what is done to a folder, and the files that are named then; none where it is loaded all the same
    (lambda folder: os.truncate(folder / "optimizer.bin", 100), "optimizer.bin"),
    (not_listed, "optimizer.bin"),
    (lambda folder: (folder / CHECKSUM_FILE).unlink(), "model.safetensors, optimizer.bin"),
    (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin"),
    (stray("custom_checkpoint_0.pkl"), "custom_checkpoint_0.pkl"),  # it would be loaded
    *((stray(name), "") for name in (".nfs0001", "trainer.json~", "sub/a.log")),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_a_changed_folder_is_named_unless_a_stray_file_is_not_loaded(checkpoints, change, named):
    checkpoints.save(TrainingState(1))
    change(checkpoints.path(1))
    if not named:
        assert checkpoints.load(checkpoints.path(1), TrainingState()) == TrainingState(1)
        return
    with pytest.raises(ValueError, match=rf"step-00000001 can't be loaded: {named}.* or SHA256SUMS is not.*earlier"):
        checkpoints.load(checkpoints.path(1), TrainingState())


COLOUR = '{"step": 1, "curve": [], "config": {}, "data": {}, "colour": "blue"}'


@pytest.mark.parametrize("content", ["", '{"step": true}', '{"step": 1, "curve": {}}', "[" * 1000 + "]" * 1000, COLOUR])
def test_a_state_that_is_none_is_one_line_that_names_it(tmp_path, content):
    with pytest.raises(ValueError, match=r"is no checkpoint of a run: it has no trainer\.json"):
        read_training_state(tmp_path)
    (tmp_path / STATE_FILE).write_text(content)
    (tmp_path / CHECKSUM_FILE).write_bytes(_compute_checksums(tmp_path))
    with pytest.raises(ValueError, match=r"^[^\n]*trainer\.json[^\n]*$"):
        read_training_state(tmp_path)


def test_every_difference_is_listed(tmp_path):
    config, data = {"learning_rate": 1e-3, "old": 2, "optimizer": "adam"}, {"a train": "1", "b": "2"}
    there = TrainingState(config=config, data=data)
    check_same_run(there, {**config, "lora_alpha": 8.0}, data, tmp_path)  # a new setting had its default
    now = {"learning_rate": 1e-4, "lora_alpha": 0.5, "optimizer": "adam"}
    with pytest.raises(ValueError) as raised:
        check_same_run(there, now, {"a train": "3", "b": "2", "c": "4"}, tmp_path)
    assert str(raised.value).partition(". ")[2].partition(". ")[0].split("; ") == [
        "learning_rate: 0.001 there, 0.0001 now", "lora_alpha: None there, 0.5 now", "old: 2 there, None now",
        "data a train: '1' there, '3' now", "data c: None there, '4' now",
    ]  # fmt: skip


def test_a_finished_run_has_its_data_and_one_of_an_earlier_version_is_said_to_be_so(tmp_path):
    """With the commit to use, and that the model of a complete one lies there."""
    finished = {"config": {"seed": 1}, "dataset_fingerprints": {"a train": "1"}}
    (tmp_path / "run.json").write_text(json.dumps(finished), encoding="utf-8")
    check_finished_run(tmp_path, {"seed": 1}, {"a train": "1"})
    with pytest.raises(ValueError, match="data a train: '1' there, '2' now"):
        check_finished_run(tmp_path, {"seed": 1}, {"a train": "2"})
    finished["config"]["text_teacher"] = "base"
    (tmp_path / "run.json").write_text(json.dumps(finished), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]*is of an earlier version[^\n]*a876dd5[^\n]* its model there[^\n]*$"):
        check_finished_run(tmp_path, {"seed": 1}, {})


def test_what_may_differ_is_a_setting():
    assert CHANGEABLE_SETTINGS - GONE_SINCE.keys() <= RunArguments.__dataclass_fields__.keys() - {
        "seed",
        "micro_batch_size",
    }
