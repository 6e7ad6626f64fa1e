"""An index on object storage, indexing by several workers, and storage that refuses: 403, permissions, full disk."""

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_index import expect_error, make_pictures, rows_of

from capivara_search import indexing
from capivara_search.index import PictureIndex
from capivara_search.storage_errors import convert_lancedb_error
from capivara_search.workers import WorkerArguments, add_folders_with_workers

BUCKET, FORKSERVER = "fotos", multiprocessing.get_context("forkserver")
UNREACHABLE = "http://127.0.0.1:9"  # no server listens on this port

# moto checks whether an object exists and then writes it. Real storages do both in one step, which Lance requires, so
# this server handles one request at a time.
SERVER = """
import sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

application, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

def answer(environment, start):
    with lock:
        return list(application(environment, start))

run_simple("127.0.0.1", int(sys.argv[1]), answer, threaded=True, request_handler=MotoRequestHandler)
"""


def start_server(folder: Path, **environment: str) -> tuple[subprocess.Popen, str]:
    """Start a server of the S3 protocol on a free port and return its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(port)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return server, f"http://127.0.0.1:{port}"
        except OSError:
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.1)
    server.kill()
    raise TimeoutError("the server has not started")


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Address of a server with a bucket, which is set in the usual environment variables."""
    import boto3

    pytest.importorskip("moto.server")
    FORKSERVER.Process(target=int).start()  # starts the fork server now, with the environment from before
    server, endpoint = start_server(tmp_path_factory.mktemp("server"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=BUCKET)
        yield endpoint
    server.terminate()
    server.wait(30)


def test_an_index_in_a_bucket_equals_an_index_in_a_folder(storage, tmp_path, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 12)
    address = f"s3://{BUCKET}/one"
    remote = PictureIndex.open(address, model=model)
    assert (len(remote), remote.where) == (0, address)
    remote.add(folder)
    local = PictureIndex.open(tmp_path / "local", model=model)
    local.add(folder)
    assert rows_of(PictureIndex.open(address)) == rows_of(local)
    assert remote.search("um gato", k=3) == local.search("um gato", k=3)
    (folder / "d0" / "p0000.png").rename(folder / "novo.png")
    report = remote.add(folder)
    assert (report.moved, report.embedded, report.unchanged) == (1, 0, 11)
    assert remote.status().bytes is None
    assert remote.forget(folder) == 12


@pytest.mark.slow
def test_two_workers_write_the_rows_of_a_single_process(storage, tmp_path, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 40)
    (folder / "broken.jpg").write_bytes(b"no picture")
    arguments = {"folders": [str(folder)], "model": model, "logging_dir": tmp_path / "logs", "batch_size": 1}
    both = WorkerArguments(where=f"s3://{BUCKET}/both", workers=2, tasks=3, **arguments)
    assert add_folders_with_workers(both)
    alone = PictureIndex.open(tmp_path / "alone", model=model)
    alone.add(folder, batch_size=1)
    filled = PictureIndex.open(f"s3://{BUCKET}/both", model=alone.model)

    def check_same() -> None:
        """Compare all columns; vectors may differ in their last bits, because threads round differently."""
        expected, actual = rows_of(alone), rows_of(filled)
        assert {path: row[:-1] for path, row in actual.items()} == {path: row[:-1] for path, row in expected.items()}
        np.testing.assert_allclose(filled.vectors([*expected]), alone.vectors([*expected]), atol=1e-3)

    check_same()
    assert filled.status().skipped_files == alone.status().skipped_files
    assert filled.folders() == {str(folder): 40}

    (folder / "d1" / "p0001.png").unlink()
    (folder / "d2" / "p0002.png").rename(folder / "novo.png")
    filled.forget(folder / "d3")
    assert add_folders_with_workers(replace(both, exclude=["d4/"]))
    assert add_folders_with_workers(both), "the rules are not stored in the bucket"
    alone.forget(folder / "d3")
    alone.add(folder, batch_size=1, exclude=["d4/"])
    check_same()
    assert len(filled) == 23
    assert filled.status().ignored_counts == alone.status().ignored_counts == {"excluded": 8, "forgotten": 8}


@pytest.mark.slow
def test_concurrent_updates_of_a_bucket_write_each_row_once(storage, tmp_path, model, monkeypatch):
    folder, address = tmp_path / "fotos", f"s3://{BUCKET}/twice"
    make_pictures(folder, 30)
    monkeypatch.setattr(indexing, "COMMIT_ROWS", 5)
    first, failures = PictureIndex.open(address, model=model), []
    first.model.embed_images([PIL.Image.new("RGB", (32, 32))])  # loads the model once for all threads

    def add() -> None:
        try:
            PictureIndex.open(address, model=first.model).add(folder, batch_size=5)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(rows_of(PictureIndex.open(address))) == 30  # `rows_of` checks that no row is there twice


@pytest.mark.slow
def test_a_failed_task_is_reported_and_the_same_command_does_the_rest(tmp_path, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 10)
    options = {"folders": [str(folder)], "model": model, "workers": 1, "tasks": 3, "logging_dir": tmp_path / "logs"}
    arguments = WorkerArguments(where=str(tmp_path / "i"), **options)
    arguments.device = "nonsense"
    with pytest.raises(ValueError, match=r"(?s)index: embed: [123] .*nonsense"):
        add_folders_with_workers(arguments)
    arguments.device = "cpu"
    assert add_folders_with_workers(arguments)
    assert len(PictureIndex.open(tmp_path / "i")) == 10
    with expect_error(None, path=tmp_path / "no"):
        add_folders_with_workers(
            WorkerArguments(where=str(tmp_path / "i"), **{**options, "folders": [str(tmp_path / "no")]})
        )


@pytest.mark.parametrize(
    ("text", "code", "pattern"),
    [
        ("lance error: Retryable commit conflict for version 3", "conflict", "s3://b/403"),
        ("lance error: Error performing GET in 1.403s, 403 bytes: tcp connect error", "no_answer", "s3://b/403"),
        ("lance error: Client error with status 403 Forbidden", "no_answer", "403 Forbidden"),
        ("lance error: Encountered corrupt file after 1403 ms", "damaged_remote", "about"),
    ],
)
def test_errors_of_a_storage_are_distinguished(text, code, pattern):
    error = convert_lancedb_error(RuntimeError(text), "s3://b/403", "about")
    assert error.code == code and pattern in str(error) and "\n" not in str(error)


@pytest.mark.slow
def test_a_storage_that_refuses_or_does_not_answer_is_reported_in_one_line(storage, tmp_path, monkeypatch):
    server, endpoint = start_server(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="0")  # this server refuses every request
    try:
        for address, where in ((storage, "s3://nowhere/i"), (endpoint, "s3://fotos/i"), (UNREACHABLE, "s3://fotos/i")):
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            with expect_error("no_answer", OSError, path=where):
                PictureIndex.open(where)
    finally:
        server.terminate()
        server.wait(30)


PROGRAM = """
import os, sys
from pathlib import Path

import PIL.Image

from capivara_search import indexing
from capivara_search.index import PictureIndex

location, model, folder = sys.argv[1:]
indexing.COMMIT_ROWS = 10
index = PictureIndex.open(Path(location, "index"), model=model)
index.model.embed_images([PIL.Image.new("RGB", (32, 32))])
{before}
try:
    print(index.add(folder, batch_size=5))
except OSError as error:
    print(type(error).__name__, error.errno, error)
{after}
"""


def run_program(tmp_path, model, script: str, *prefix: str) -> list[str]:
    """Run a process that adds a folder to an index in the folder `location`, and return the lines that it prints."""
    make_pictures(tmp_path / "fotos", 60)
    (tmp_path / "location").mkdir()
    command = [*prefix, sys.executable, "-c", script, str(tmp_path / "location"), model, str(tmp_path / "fotos")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="needs permission to mount a small disk")
def test_a_full_disk_is_reported_and_the_next_run_does_the_rest(tmp_path, model):
    script = PROGRAM.format(
        before="Path(location, 'ballast').write_bytes(bytes(1_700_000))",
        after="""
print(len(index), len(index.search("um gato", k=100)))
Path(location, "ballast").unlink()
print(index.add(folder).new, len(index))
""",
    )
    mount = f'mount -t tmpfs -o size=2m tmpfs {tmp_path / "location"} && exec "$@"'
    lines = run_program(tmp_path, model, script, "unshare", "-rm", "sh", "-c", mount, "sh")
    assert lines[0].startswith("OSError 28 [Errno 28] ")
    written = int(lines[1].split()[0])
    assert 0 < written < 60
    assert lines[1:] == [f"{written} {written}", f"{60 - written} 60"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_missing_permission_is_reported_in_one_line(tmp_path, model):
    before = """
os.mkdir(location + "/new")
PictureIndex.open(location + "/new/i", model=index.model)
index.add(folder + "/d0")
os.seteuid(65534)
"""
    after = """
try:
    PictureIndex.open(location + "/new/i", model=index.model).add(folder)
except PermissionError as error:
    print(type(error).__name__, error.errno, error)
"""
    lines = run_program(tmp_path, model, PROGRAM.format(before=before, after=after))
    assert len(lines) == 2
    assert all(line.startswith("PermissionError 13 [Errno 13] ") for line in lines)
    assert str(tmp_path / "location" / "index") in lines[0] and str(tmp_path / "location" / "new") in lines[1]
