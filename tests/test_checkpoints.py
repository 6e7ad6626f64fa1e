"""Checkpoints are complete or absent, the latest and the best are kept, and loading one runs no code from it."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import training.checkpoints
from training.arguments import RunArguments
from training.checkpoints import (
    CHANGEABLE_SETTINGS,
    CHECKSUM_FILE,
    STATE_FILE,
    Checkpoints,
    TrainingState,
    build_sha256sum_content,
    check_same_run,
    verify_checkpoint_and_read_state,
)
from training.run_folder import check_matches_finished_run, find_free_numbered_folder


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints of a small model after one step of Adam, with the `model` and `optimizer` that are saved."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    model = accelerator.prepare_model(nn.Linear(5, 3), evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(torch.optim.Adam(model.parameters(), lr=0.1, fused=True))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2, accelerator=accelerator)
    checkpoints.model, checkpoints.optimizer = model, optimizer
    train_one_step(checkpoints)
    return checkpoints


def train_one_step(checkpoints: Checkpoints) -> None:
    checkpoints.optimizer.zero_grad()
    checkpoints.model(torch.ones(4, 5)).square().sum().backward()
    checkpoints.optimizer.step()


def folder_names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_next_numbered_folder_is_the_first_free_one(tmp_path):
    assert find_free_numbered_folder(tmp_path, "x") == tmp_path / "x-001"
    (tmp_path / "x-001").mkdir()
    assert find_free_numbered_folder(tmp_path, "x") == tmp_path / "x-002"


def test_a_loaded_checkpoint_continues_with_the_same_weights(checkpoints):
    curve = [{"step": 0, "validation": {"loss": 1.5}}, {"step": 1, "loss": 0.1 + 0.2}]
    state = TrainingState(1, curve, {"seed": 7}, {"data train": "abc"}, 1, 0.25, 12.5, 3)
    checkpoints.save(state)
    train_one_step(checkpoints)
    expected = {name: tensor.clone() for name, tensor in checkpoints.model.state_dict().items()}
    train_one_step(checkpoints)
    assert checkpoints.load(checkpoints.path(1), state) == state
    train_one_step(checkpoints)  # uses the loaded moments of Adam
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoints.model.state_dict().items())


@pytest.mark.parametrize(
    ("keep_last", "best_steps", "remaining"),
    [(2, [0] * 5, [4, 5]), (9, [0] * 5, [1, 2, 3, 4, 5]), (1, [0, 2, 2, 2, 2], [2, 5]), (1, [1, 1, 3, 3], [3, 4])],
)
def test_the_latest_checkpoints_and_the_best_are_kept(checkpoints, keep_last, best_steps, remaining):
    """`best_steps` holds the best step so far at each step, 0 before the first evaluation."""
    checkpoints.keep_last = keep_last
    for step, best_step in enumerate(best_steps, 1):
        checkpoints.save(TrainingState(step, best_step=best_step or None))
    assert checkpoints.steps() == remaining
    assert folder_names(checkpoints) == [f"step-{step:08d}" for step in remaining], "no other files are left"


def test_auto_resumes_from_the_newest_checkpoint(checkpoints):
    args = RunArguments(model="m", dataset=["d"], resume="auto")
    assert checkpoints.find_resume_checkpoint(args) is None
    for step in (8, 9, 10):
        checkpoints.save(TrainingState(step, config=args.to_dict(), best_step=8))
    assert checkpoints.steps() == [8, 9, 10] and checkpoints.find_resume_checkpoint(args) == checkpoints.path(10)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
def test_a_failed_save_keeps_the_previous_checkpoint(checkpoints, monkeypatch, error):
    checkpoints.keep_last = 1
    checkpoints.save(TrainingState(1))
    monkeypatch.setattr(training.checkpoints, "write_json", Mock(side_effect=error))
    with pytest.raises((KeyboardInterrupt, OSError), match=r"^$|step 2\b.*--resume auto"):
        checkpoints.save(TrainingState(2))
    assert folder_names(checkpoints) == ["step-00000001"]


class Malicious:
    """Creates a file when it is unpickled."""

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
    (path.parent / CHECKSUM_FILE).write_bytes(
        build_sha256sum_content(path.parent)
    )  # an attacker would update the checksums
    if name == "random_states_0.pkl":  # Accelerate ignores errors in this file; no result depends on it
        checkpoints.load(checkpoints.path(1), TrainingState())
    else:
        with pytest.raises(ValueError, match=r"step-00000001.*--resume auto"):
            checkpoints.load(checkpoints.path(1), TrainingState())
    assert not proof.exists()
    torch.load(path, weights_only=False) if kind == "torch" else pickle.loads(path.read_bytes())
    assert proof.exists(), "an unrestricted unpickler does run the code"


def flipped(path: Path, place: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file in place; a second call restores it."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ mask]))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", STATE_FILE, CHECKSUM_FILE]
)
def test_a_checkpoint_with_a_flipped_byte_is_not_loaded(checkpoints, name):
    checkpoints.save(TrainingState(1))
    train_one_step(checkpoints)
    current = checkpoints.model.weight.clone()
    path = checkpoints.path(1) / name
    flipped(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"step-00000001 .*{re.escape(name)}"):
        checkpoints.load(checkpoints.path(1), TrainingState())
    assert torch.equal(checkpoints.model.weight, current)


def remove_from_checksums(folder: Path) -> None:
    lines = (folder / CHECKSUM_FILE).read_text().splitlines(True)
    (folder / CHECKSUM_FILE).write_text("".join(line for line in lines if not line.endswith("  optimizer.bin\n")))


def add_file(name: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).parent.mkdir(exist_ok=True), (folder / name).write_text("not ours"))


CHANGES = [  # change of the folder, and the files that the error names; empty if the checkpoint can still be loaded
    (lambda folder: os.truncate(folder / "optimizer.bin", 100), "optimizer.bin"),
    (remove_from_checksums, "optimizer.bin"),
    (lambda folder: (folder / CHECKSUM_FILE).unlink(), "model.safetensors, optimizer.bin"),
    (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin"),
    (add_file("custom_checkpoint_0.pkl"), "custom_checkpoint_0.pkl"),  # Accelerate would load it
    *((add_file(name), "") for name in (".nfs0001", "trainer.json~", "sub/a.log")),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_changed_files_are_named_and_files_that_are_never_loaded_are_ignored(checkpoints, change, named):
    checkpoints.save(TrainingState(1))
    change(checkpoints.path(1))
    if not named:
        assert checkpoints.load(checkpoints.path(1), TrainingState()) == TrainingState(1)
        return
    with pytest.raises(ValueError, match=rf"step-00000001 .*: {re.escape(named)}.*SHA256SUMS"):
        checkpoints.load(checkpoints.path(1), TrainingState())


UNKNOWN_FIELD = '{"step": 1, "curve": [], "config": {}, "data": {}, "color": "blue"}'
INVALID_STATES = ["", '{"step": true}', '{"step": 1, "curve": {}}', "[" * 1000 + "]" * 1000, UNKNOWN_FIELD]


@pytest.mark.parametrize("content", INVALID_STATES)
def test_an_invalid_state_gives_an_error_of_one_line_that_names_the_file(tmp_path, content):
    with pytest.raises(ValueError, match=r"trainer\.json"):
        verify_checkpoint_and_read_state(tmp_path)
    (tmp_path / STATE_FILE).write_text(content)
    (tmp_path / CHECKSUM_FILE).write_bytes(build_sha256sum_content(tmp_path))
    with pytest.raises(ValueError, match=r"^[^\n]*trainer\.json[^\n]*$"):
        verify_checkpoint_and_read_state(tmp_path)


def test_every_different_setting_and_dataset_is_listed(tmp_path):
    config, data = {"learning_rate": 1e-3, "seed": 2, "optimizer": "adam"}, {"a train": "1", "b": "2"}
    saved = TrainingState(config=config, data=data)
    check_same_run(saved, {**config, "lora_alpha": 8.0}, data, tmp_path)  # equals the default of a setting not saved
    current = {"learning_rate": 1e-4, "lora_alpha": 0.5, "optimizer": "adam"}
    with pytest.raises(ValueError) as raised:
        check_same_run(saved, current, {"a train": "3", "b": "2", "c": "4"}, tmp_path)
    expected = [
        r"learning_rate: 0\.001 .*0\.0001", r"lora_alpha: None .*0\.5", "seed: 2 .*None", "data a train: '1' .*'3'",
        "data c: None .*'4'",
    ]  # fmt: skip
    differences = str(raised.value).partition(". ")[2].partition(". ")[0].split("; ")
    assert all(map(re.match, expected, differences)) and len(differences) == len(expected)


def test_a_finished_run_is_compared_and_unknown_settings_are_named(tmp_path):
    """Settings that this version does not know come from an earlier version; two of them never affected the weights."""
    finished = {"config": {"seed": 1}, "dataset_fingerprints": {"a train": "1"}}
    (tmp_path / "run.json").write_text(json.dumps(finished), encoding="utf-8")
    check_matches_finished_run(tmp_path, {"seed": 1}, {"a train": "1"})
    with pytest.raises(ValueError, match=r"data a train: '1' .*'2'"):
        check_matches_finished_run(tmp_path, {"seed": 1}, {"a train": "2"})
    finished["config"] |= {"hub_strategy": "end", "carbon_country": "BRA"}
    (tmp_path / "run.json").write_text(json.dumps(finished), encoding="utf-8")
    check_matches_finished_run(tmp_path, {"seed": 1}, {})
    finished["config"] |= {"text_teacher": "base", "runs": 3}
    (tmp_path / "run.json").write_text(json.dumps(finished), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]* runs, text_teacher\.[^\n]*$"):
        check_matches_finished_run(tmp_path, {"seed": 1}, {})


def test_settings_that_may_change_are_existing_flags_that_do_not_affect_weights():
    removed = {"hub_strategy", "carbon_country"}  # in runs on disk
    assert CHANGEABLE_SETTINGS - removed <= RunArguments.__dataclass_fields__.keys() - {"seed", "micro_batch_size"}
