"""A run that ends with a push to the Hub: access is checked first, and a failed push does not lose the run."""

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
    with hub_commands(tmp_path_factory.mktemp("training")) as runner:
        yield runner


@pytest.fixture
def hub(commands):
    commands.hub.faults = Faults()
    commands.hub.storage.repos.clear()
    return commands.hub


@pytest.fixture
def train(commands, hub, tiny_folder, tiny_dataset_folder, tmp_path):
    """Run the training command on a tiny model."""

    def run(name="out", token=TOKEN, **overrides):
        values = {"max_steps": 2, "warmup_steps": 0, "eval_steps": 2, **overrides}
        argv = flags(tiny_folder, os.path.relpath(tiny_dataset_folder), tmp_path / name, **values)
        return commands(*argv, token=token, call="train_accelerate:main")

    return run


def read_all_files(folder) -> str:
    """Return the contents of all files of a run as text."""
    return "".join(p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_run_ends_with_a_push(hub, train, tmp_path):
    done = train(**PUSH, hub_private="true")
    assert done.code == 0 and f"Pushed to {hub.url}/us/run/commit/" in done.err, done.err
    files, out = hub.files("us/run"), tmp_path / "out"
    assert {"model.safetensors", "config.json", "processor_config.json", "run.json", "README.md"} <= set(files)
    assert len(hub.commits("us/run")) == 1 and hub.repo("us/run").private
    local, pushed = load((out / "model.safetensors").read_bytes()), load(files["model.safetensors"])
    assert local.keys() == pushed.keys() and all(local[name].equal(pushed[name]) for name in local)
    assert str(tmp_path) not in "".join(data.decode("latin-1") for data in files.values())
    assert not (out / "repository").exists() and TOKEN not in read_all_files(out)
    repeated = train(**PUSH, hub_private="true", resume="auto")
    assert repeated.code == 0 and "us/run already has all files" in repeated.err and len(hub.commits("us/run")) == 1


# Reason -> flags, token, and what the error must name.
REFUSED_PUSHES = {
    "no id": ({"push_to_hub": "true"}, TOKEN, "hub_model_id"),
    "no token": (PUSH, None, "token"),
    "not of the organization": (PUSH, READ_TOKEN, "403"),
    "public": ({**PUSH, "hub_private": "true"}, TOKEN, "us/run"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", REFUSED_PUSHES)
def test_a_run_that_could_not_be_pushed_is_not_trained(hub, train, tmp_path, fault):
    overrides, token, named = REFUSED_PUSHES[fault]
    if fault == "public":
        hub.storage.create("models", "us/run", private=False)
    done = train(token=token, **overrides)
    assert done.code in (1, 2) and re.search(f"error: .*{named}", done.err), done.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_failed_push_keeps_the_run_and_can_be_repeated(commands, hub, train, tmp_path):
    hub.faults = Faults(quota_bytes=0)
    done = train(**PUSH)
    out = tmp_path / "out"
    assert done.code == 0 and re.search(r"us/run\b.*403.*Private repository storage limit", done.err), done.err
    assert str(out) in done.err and "CAPIVARA" in done.out
    assert (out / "model.safetensors").is_file() and TOKEN not in read_all_files(out) and not hub.commits("us/run")
    hub.faults = Faults()
    (printed_command,) = re.findall(r"python -m hub_upload\.push .*", done.err)
    repeated = commands(*shlex.split(printed_command)[3:])
    assert repeated.code == 0 and "model.safetensors" in hub.files("us/run"), repeated.err
