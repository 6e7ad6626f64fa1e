"""One build on two workers, a real Slurm and a real Ray: the same bytes, whatever is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from caption_build import ROOT, changed, files, surroundings, write_config
from made_index import make_pictures, rows_of
from slurm_node import missing_programs, slurm_node
from tiny import save_model

from capivara_common import executors
from capivara_search import PictureIndex
from captions.build import BuildArguments, build_dataset

PLACES = ("1-translate/train/", "2-score/train", "3-select/train")
LONGEST_S = 240  # of a build on a cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_processor) -> Path:
    """A config, beside the undisturbed build that this process has made of it."""
    folder = tmp_path_factory.mktemp("executors")
    save_model(folder / "model", tiny_processor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        path = write_config(folder, folder / "model")
        changed(path, evaluation_splits=None)
        build_dataset(BuildArguments(path))
    (folder / "built").rename(folder / "undisturbed")
    return path


@pytest.fixture
def built(config) -> Path:
    """The output of the config, which is not there yet, and renamed after the test."""
    folder = config.parent / "built"
    yield folder
    if folder.exists():
        folder.rename(config.parent / f"built-{time.monotonic_ns()}")


def run(config: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    options = surroundings()
    options["env"] |= variables
    command = [sys.executable, "-m", "captions.build", "--config", str(config), *flags]
    return subprocess.run(command, timeout=LONGEST_S, **options)


def killed(config: Path, victim: str) -> list[tuple[int, str]]:
    """Exit code and stderr of one build of two workers after the other, each killed in another stage."""
    command = [sys.executable, "tests/killed_workers.py", str(config), *(f"{victim}:{place}" for place in PLACES)]
    done = subprocess.run(command, timeout=LONGEST_S, **surroundings())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_same(built: Path) -> None:
    """All files of the undisturbed build, with their bytes, and no other ones."""
    expected, found = files(built.parent / "undisturbed"), files(built)
    assert found.keys() == expected.keys()
    assert {name for name in expected if found[name] != expected[name]} == set()


def test_a_worker_killed_in_every_stage(config, built):
    """It is reported with its rank, and the same command does the rest."""
    for place, (code, said) in zip(PLACES, killed(config, "worker"), strict=True):
        assert code == 1 and "tasks have failed" in said, said
        assert re.search(r"task [01]: has not ended: .* killed; out of memory\?", said), place
    assert not (built / "dataset").exists() and list((built / PLACES[-1]).glob("*.parquet"))
    assert list((built / PLACES[-1]).glob(".*.tmp")), "a part was being written"
    assert run(config, "--workers", "2").returncode == 0
    check_same(built)


def test_the_whole_run_killed_in_every_stage(config, built):
    """Its workers end with it, and the same command does the rest, in another number of tasks."""
    assert [code for code, _ in killed(config, "run")] == [-signal.SIGKILL] * len(PLACES)
    assert not (built / "dataset").exists()
    assert run(config, "--tasks", "3", "--workers", "2").returncode == 0
    check_same(built)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The variables of a Slurm of one node."""
    if missing := missing_programs():
        if os.environ.get("CI_REQUIRES_SLURM"):
            pytest.fail(f"CI_REQUIRES_SLURM is set, and there is no {', '.join(missing)}")
        pytest.skip(f"there is no {', '.join(missing)}: apt-get install slurm-wlm munge slurm-wlm-basic-plugins")
    with slurm_node(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


def wait_for_jobs(variables: dict[str, str]) -> None:
    """Until Slurm has no job left."""
    end = time.monotonic() + LONGEST_S
    while time.monotonic() < end:
        listed = subprocess.run(
            ["squeue", "--noheader"], env={**os.environ, **variables}, capture_output=True, text=True, check=True
        )
        if not listed.stdout.strip():
            return
        time.sleep(0.5)
    raise TimeoutError(listed.stdout)


SLURM = ("--executor", "slurm", "--tasks", "2", "--partition", "main", "--time", "00:10:00", "--mem_per_cpu_gb", "1")


def test_tasks_on_other_machines_import_the_code_of_this_checkout():
    assert executors.CODE_ROOT == ROOT  # tests' own PYTHONPATH would hide another


def test_a_real_slurm(config, built, slurm):
    """A task without its model fails its job, and what depends on it is not run; the same command does the rest."""
    model = yaml.safe_load(config.read_text())["score"]["model"]
    changed(config, score={"model": f"{model}-not-there", "device": "cpu", "rows_per_part": 4})
    submitted = run(config, *SLURM, **slurm)
    assert submitted.returncode == 0 and "The jobs are submitted" in submitted.stderr, submitted.stderr
    wait_for_jobs(slurm)
    changed(config, score={"model": model, "device": "cpu", "rows_per_part": 4})
    logs = built / "logs" / "2-score" / "train" / "rows"
    assert (failed := executors.failure_reasons(logs)).keys() == {0, 1} and "not-there" in failed[0]
    assert len(list((built / "1-translate" / "train").glob("*.parquet"))) == 7
    assert not (built / "3-select").exists() and not (built / "dataset").exists()
    said = run(config, "--dry_run")
    assert "2-score, train: rows: task 1: " in said.stderr and "1-translate, train: done" in said.stderr
    assert run(config, *SLURM, "--sbatch", "comment=a", **slurm).returncode == 0
    wait_for_jobs(slurm)
    check_same(built)
    assert "#SBATCH --comment=a\n" in (built / "logs" / "dataset" / "launch_script.slurm").read_text()


def test_retrieval_by_the_job_of_the_page(tiny_folder, tiny_dataset_folder, slurm, tmp_path):
    """docs/cluster.md's job, for two machines that are one, without GPUs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (job,) = re.findall(
        r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/cluster.md").read_text(encoding="utf-8"), re.DOTALL
    )
    here = {
        "--nodes=4 --ntasks-per-node=1 --gpus-per-node=4 --time=01:00:00": "--ntasks=2 --time=00:05:00",
        "accelerate launch": f"{sys.executable} -m accelerate.commands.launch",
        "--num_machines 4 --num_processes 16": "--num_machines 2 --num_processes 2",
        "29500": str(port),
        " MODEL ": f" {tiny_folder} ",
        '"shards/*.parquet"': str(tiny_dataset_folder),
        "retrieval.json": str(tmp_path / "retrieval.json"),
    }
    for old, new in here.items():
        assert old in job, old
        job = job.replace(old, new)
    (tmp_path / "job.sh").write_text(job, encoding="utf-8")
    options = surroundings()
    options["env"] |= slurm | {"SCRATCH": str(tmp_path)}
    command = ["sbatch", "--wait", f"--output={tmp_path}/log", f"--chdir={ROOT}", str(tmp_path / "job.sh")]
    done = subprocess.run(command, timeout=LONGEST_S, **options)
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0 and said.count("recall@5") == 2, said  # one of the two processes prints


def test_a_real_ray(config, built):
    pytest.importorskip("ray")
    done = run(config, "--executor", "ray", "--tasks", "2", "--mem_per_cpu_gb", "1", RAY_ADDRESS="local")
    assert done.returncode == 0, done.stderr[-5000:]
    check_same(built)
    logs = built / "logs" / "2-score" / "train" / "rows"
    assert "ray_remote_kwargs" in (logs / "executor.json").read_text(), "Ray has done it"
    assert "2-score, train: rows, task 1 of 2: " in (logs / "logs" / "task_00001.log").read_text()


@pytest.mark.parametrize("executor", ["slurm", "ray"])
def test_an_index_on_a_cluster(executor, request, config, tmp_path):
    """The command's rows are those of one process; of the jobs that Slurm takes, it says where they write."""
    variables = request.getfixturevalue("slurm") if executor == "slurm" else {"RAY_ADDRESS": "local"}
    if executor == "ray":
        pytest.importorskip("ray")
    make_pictures(tmp_path / "fotos", 20)
    model = str(config.parent / "model")
    command = [sys.executable, "-m", "capivara_search.workers", "--folders", str(tmp_path / "fotos"), "--model", model]
    command += ["--where", str(tmp_path / "many"), "--logging_dir", str(tmp_path / "logs")]
    command += ["--executor", executor, "--tasks", "2", "--mem_per_cpu_gb", "1"]
    command += ["--partition", "main", "--time", "00:10:00"] if executor == "slurm" else []
    options = surroundings()
    options["env"] |= variables
    done = subprocess.run(command, timeout=LONGEST_S, **options)
    assert done.returncode == 0, done.stderr[-5000:]
    if executor == "slurm":
        assert "logs" in done.stdout
        wait_for_jobs(variables)
    alone = PictureIndex.open(tmp_path / "one", model=model)
    alone.add(tmp_path / "fotos")
    assert rows_of(PictureIndex.open(tmp_path / "many")) == rows_of(alone)
    assert (tmp_path / "logs").is_dir()
