"""Caption builds on two workers, a real Slurm and a real Ray give the same bytes, whatever process is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
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
TIMEOUT_S = 240  # longest time of a build on a cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_processor) -> Path:
    """Config of a build; the result of an uninterrupted build lies next to it."""
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
    """Output folder of the config. It does not exist before the test and is renamed after it."""
    folder = config.parent / "built"
    yield folder
    if folder.exists():
        folder.rename(config.parent / f"built-{time.monotonic_ns()}")


def run_build(config: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    options = surroundings()
    options["env"] |= variables
    command = [sys.executable, "-m", "captions.build", "--config", str(config), *flags]
    return subprocess.run(command, timeout=TIMEOUT_S, **options)


def run_killed_builds(config: Path, victim: str) -> list[tuple[int, str]]:
    """Run one build per stage, each with two workers and killed in that stage; return exit codes and stderr."""
    command = [sys.executable, "tests/killed_workers.py", str(config), *(f"{victim}:{place}" for place in PLACES)]
    process = subprocess.run(command, timeout=TIMEOUT_S, **surroundings())
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def check_same(built: Path) -> None:
    """Assert that a build has the same files as the uninterrupted one, with the same bytes."""
    expected, actual = files(built.parent / "undisturbed"), files(built)
    assert actual.keys() == expected.keys()
    assert {name for name in expected if actual[name] != expected[name]} == set()


def test_a_killed_worker_is_reported_and_the_same_command_resumes(config, built):
    """One worker is killed in every stage."""
    for place, (code, stderr) in zip(PLACES, run_killed_builds(config, "worker"), strict=True):
        assert code == 1, stderr
        assert re.search(rf"task [01]: {re.escape(executors.NOT_FINISHED_MESSAGE)}", stderr), place
    assert not (built / "dataset").exists() and list((built / PLACES[-1]).glob("*.parquet"))
    assert list((built / PLACES[-1]).glob(".*.tmp")), "the worker was killed while it wrote a part"
    assert run_build(config, "--workers", "2").returncode == 0
    check_same(built)


def test_a_killed_run_ends_its_workers_and_can_be_resumed(config, built):
    """The run is killed in every stage, and resumed with another number of tasks."""
    assert [code for code, _ in run_killed_builds(config, "run")] == [-signal.SIGKILL] * len(PLACES)
    assert not (built / "dataset").exists()
    assert run_build(config, "--tasks", "3", "--workers", "2").returncode == 0
    check_same(built)


def test_spawned_workers_give_the_same_bytes(config, built):
    """Windows can only spawn processes."""
    program = "executors.START_METHOD = 'spawn'; build.main(sys.argv[1:])"
    program = f"import sys; from capivara_common import executors; from captions import build; {program}"
    command = [sys.executable, "-c", program, "--config", str(config), "--workers", "2"]
    process = subprocess.run(command, timeout=TIMEOUT_S, **surroundings())
    assert process.returncode == 0, process.stderr
    check_same(built)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment variables of a Slurm cluster of one node."""
    if missing := missing_programs():
        if os.environ.get("CI_REQUIRES_SLURM"):
            pytest.fail(f"CI_REQUIRES_SLURM is set, but {', '.join(missing)} is missing")
        pytest.skip(f"{', '.join(missing)} is missing: apt-get install slurm-wlm munge slurm-wlm-basic-plugins")
    with slurm_node(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


def wait_for_jobs(variables: dict[str, str]) -> None:
    """Wait until Slurm has no jobs."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        listed = subprocess.run(
            ["squeue", "--noheader"], env={**os.environ, **variables}, capture_output=True, text=True, check=True
        )
        if not listed.stdout.strip():
            return
        time.sleep(0.5)
    raise TimeoutError(listed.stdout)


SLURM = ("--executor", "slurm", "--tasks", "2", "--partition", "main", "--time", "00:10:00", "--mem_per_cpu_gb", "1")


def test_tasks_import_the_code_of_this_checkout():
    assert executors.CODE_ROOT == ROOT  # PYTHONPATH of the tests would hide a wrong folder


def test_a_failed_slurm_job_stops_later_phases_and_can_be_resumed(config, built, slurm):
    """The first submission names a model that does not exist."""
    model = yaml.safe_load(config.read_text())["score"]["model"]
    changed(config, score={"model": f"{model}-not-there", "device": "cpu", "rows_per_part": 4})
    submitted = run_build(config, *SLURM, **slurm)
    assert submitted.returncode == 0, submitted.stderr
    wait_for_jobs(slurm)
    changed(config, score={"model": model, "device": "cpu", "rows_per_part": 4})
    logs = built / "logs" / "2-score" / "train" / "rows"
    reasons = executors.failure_reasons(logs)
    assert reasons.keys() == {0, 1} and "not-there" in reasons[0]
    assert len(list((built / "1-translate" / "train").glob("*.parquet"))) == 7
    assert not (built / "3-select").exists() and not (built / "dataset").exists()
    status = run_build(config, "--dry_run").stderr
    assert "2-score, train: rows: task 1: " in status and "1-translate, train: done" in status
    assert run_build(config, *SLURM, "--sbatch", "comment=a", **slurm).returncode == 0
    wait_for_jobs(slurm)
    check_same(built)
    assert "#SBATCH --comment=a\n" in (built / "logs" / "dataset" / "launch_script.slurm").read_text()


SERVER_SCRIPT = """
python -c "
from chat_server import FaultyServer
from examples.chat_server import ChatHandler, _Server
_Server(('127.0.0.1', {port}), type('Handler', (ChatHandler,), dict(chat_server=FaultyServer()))).serve_forever()
" &
SERVER=$!
trap 'kill "$SERVER"' EXIT
until curl --silent --fail --output /dev/null "http://127.0.0.1:{port}/v1/models"; do sleep 0.2; done
"""


def test_a_server_beside_a_slurm_task_translates(config, slurm, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "start.sh").write_text(SERVER_SCRIPT.format(port=port))
    translate = {"backend": "chat", "base_url": f"http://127.0.0.1:{port}/v1", "model": "stand-in"}
    translate["node_script"] = str(tmp_path / "start.sh")
    text = config.read_text()
    path = tmp_path / "config.yaml"
    path.write_text(text)
    changed(path, output=str(tmp_path / "built"), translate=translate, score=None, select=None)
    submitted = run_build(path, *SLURM, "--tasks", "1", **slurm)
    assert submitted.returncode == 0, submitted.stderr
    wait_for_jobs(slurm)
    rows = pq.read_table(next((tmp_path / "built" / "1-translate" / "train").glob("*.parquet"))).to_pylist()
    assert rows[0]["captions-xh"] == [text[::-1] for text in rows[0]["captions-en"]]
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass  # the server has ended with its job


def test_the_retrieval_job_of_the_cluster_page_runs(tiny_folder, tiny_dataset_folder, slurm, tmp_path):
    """The job of docs/how-to/cluster.md, changed to two processes on one machine without GPUs."""
    with socket.create_server(("127.0.0.1", 0)) as free_socket:
        port = free_socket.getsockname()[1]
    (job,) = re.findall(
        r"```bash\n(#!/bin/bash\n#SBATCH.*?)```",
        (ROOT / "docs/how-to/cluster.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    replacements = {
        "--nodes=4 --ntasks-per-node=1 --gpus-per-node=4 --time=01:00:00": "--ntasks=2 --time=00:05:00",
        "accelerate launch": f"{sys.executable} -m accelerate.commands.launch",
        "--num_machines 4 --num_processes 16": "--num_machines 2 --num_processes 2",
        "29500": str(port),
        " MODEL ": f" {tiny_folder} ",
        '"shards/*.parquet"': str(tiny_dataset_folder),
        "retrieval.json": str(tmp_path / "retrieval.json"),
    }
    for old, new in replacements.items():
        assert old in job, old
        job = job.replace(old, new)
    (tmp_path / "job.sh").write_text(job, encoding="utf-8")
    options = surroundings()
    options["env"] |= slurm | {"SCRATCH": str(tmp_path)}
    command = ["sbatch", "--wait", f"--output={tmp_path}/log", f"--chdir={ROOT}", str(tmp_path / "job.sh")]
    process = subprocess.run(command, timeout=TIMEOUT_S, **options)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0 and log.count("recall@5") == 2, log  # only one of the two processes prints


def test_a_build_on_ray_gives_the_same_bytes(config, built):
    pytest.importorskip("ray")
    process = run_build(config, "--executor", "ray", "--tasks", "2", "--mem_per_cpu_gb", "1", RAY_ADDRESS="local")
    assert process.returncode == 0, process.stderr[-5000:]
    check_same(built)
    logs = built / "logs" / "2-score" / "train" / "rows"
    assert "ray_remote_kwargs" in (logs / "executor.json").read_text(), "the build must run on Ray"
    assert "2-score, train: rows, task 1 of 2: " in (logs / "logs" / "task_00001.log").read_text()


@pytest.mark.parametrize("executor", ["slurm", "ray"])
def test_an_index_built_on_a_cluster_equals_one_of_a_single_process(executor, request, config, tmp_path):
    """With Slurm, the command also prints the folder of the logs."""
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
    process = subprocess.run(command, timeout=TIMEOUT_S, **options)
    assert process.returncode == 0, process.stderr[-5000:]
    if executor == "slurm":
        assert "logs" in process.stdout
        wait_for_jobs(variables)
    alone = PictureIndex.open(tmp_path / "one", model=model)
    alone.add(tmp_path / "fotos")
    assert rows_of(PictureIndex.open(tmp_path / "many")) == rows_of(alone)
    assert (tmp_path / "logs").is_dir()
