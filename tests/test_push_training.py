"""A run that ends with a push: its right is checked first, and no fault of the Hub costs the run anything."""

import os
import re
import shlex

import pytest
from hub_client import hub_commands
from hub_server import READ_TOKEN, TOKEN
from hub_storage import Faults
from safetensors.torch import load
from test_train_accelerate import flags

PUSH = {"push_to_hub": "true", "hub_model_id": "us/run"}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with hub_commands(tmp_path_factory.mktemp("training")) as found:
        yield found


@pytest.fixture
def hub(commands):
    commands.hub.faults = Faults()
    commands.hub.storage.repos.clear()
    return commands.hub


@pytest.fixture
def train(commands, hub, tiny_folder, tiny_dataset_folder, tmp_path):
    """The training command at toy width."""

    def run(name="out", token=TOKEN, **overrides):
        values = {"max_steps": 2, "warmup_steps": 0, "eval_steps": 2, **overrides}
        argv = flags(tiny_folder, os.path.relpath(tiny_dataset_folder), tmp_path / name, **values)
        return commands(*argv, token=token, call="train_accelerate:main")

    return run


def texts(folder) -> str:
    """All that a run has written, as text."""
    return "".join(p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_run_ends_with_a_push(hub, train, tmp_path):
    done = train(**PUSH, hub_private="true")
    assert done.code == 0 and f"Pushed to {hub.url}/us/run/commit/" in done.err, done.err
    files, out = hub.files("us/run"), tmp_path / "out"
    assert {"model.safetensors", "config.json", "processor_config.json", "run.json", "README.md"} <= set(files)
    assert len(hub.commits("us/run")) == 1 and hub.repo("us/run").private
    ours, theirs = load((out / "model.safetensors").read_bytes()), load(files["model.safetensors"])
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert str(tmp_path) not in "".join(data.decode("latin-1") for data in files.values())
    assert not (out / "repository").exists() and TOKEN not in texts(out)
    again = train(**PUSH, hub_private="true", resume="auto")
    assert again.code == 0 and "us/run has all of it already" in again.err and len(hub.commits("us/run")) == 1


REFUSED = {
    "no id": ({"push_to_hub": "true"}, TOKEN, "push_to_hub needs hub_model_id"),
    "no token": (PUSH, None, "There is no token"),
    "not of the organisation": (PUSH, READ_TOKEN, r"refuses it to the token \(403\)"),
    "public": ({**PUSH, "hub_private": "true"}, TOKEN, "us/run is public"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", REFUSED)
def test_what_could_not_be_pushed_is_not_trained(hub, train, tmp_path, fault):
    overrides, token, message = REFUSED[fault]
    if fault == "public":
        hub.storage.create("models", "us/run", private=False)
    done = train(token=token, **overrides)
    assert done.code in (1, 2) and re.search(f"error: .*{message}", done.err), done.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_push_that_fails_costs_nothing_and_is_made_later(commands, hub, train, tmp_path):
    hub.faults = Faults(quota_bytes=0)
    done = train(**PUSH)
    out = tmp_path / "out"
    assert (
        done.code == 0
        and "NOT PUSHED to us/run: The Hub refuses it to the token (403): Private repository storage limit" in done.err
    )
    assert f"The run is complete in {out}." in done.err and "CAPIVARA" in done.out
    assert (out / "model.safetensors").is_file() and TOKEN not in texts(out) and not hub.commits("us/run")
    hub.faults = Faults()
    (words,) = re.findall("Push it later: (.*)", done.err)
    command = shlex.split(words)
    assert command[:3] == ["python", "-m", "hub_upload.push"]
    later = commands(*command[3:])
    assert later.code == 0 and "model.safetensors" in hub.files("us/run"), later.err
