"""An index on object storage, filled by several workers; and storage that refuses: 403, no permission, no space."""

import multiprocessing
import os
import re
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
from made_index import make_pictures, rows_of

from capivara_search import adding
from capivara_search.index import PictureIndex
from capivara_search.storage import explanation
from capivara_search.workers import WorkerArguments, add_with_workers

BUCKET, NOBODY, START = "fotos", "http://127.0.0.1:9", multiprocessing.get_context("forkserver")


# moto looks whether an object is there and then writes it; the storages of the world do both in one, as Lance needs.
SERVER = """
import sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

served, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

def answer(environment, start):
    with one_at_a_time:
        return list(served(environment, start))

run_simple("127.0.0.1", int(sys.argv[1]), answer, threaded=True, request_handler=MotoRequestHandler)
"""


def start_server(folder: Path, **environment: str) -> tuple[subprocess.Popen, str]:
    """A server of the S3 protocol on a free port of this machine."""
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
    """The address of a server with a bucket; the usual variables name it."""
    import boto3

    pytest.importorskip("moto.server")
    START.Process(target=int).start()  # by a server that forks, which has the environment of now
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


def test_an_index_in_a_bucket_is_as_one_in_a_folder(storage, tmp_path, model):
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
    added = remote.add(folder)
    assert (added.moved, added.embedded, added.unchanged) == (1, 0, 11)
    assert remote.status().bytes is None
    assert remote.forget(folder) == 12


@pytest.mark.slow
def test_two_workers_fill_one_table_as_one_does(storage, tmp_path, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 40)
    (folder / "broken.jpg").write_bytes(b"no picture")
    arguments = {"folders": [str(folder)], "model": model, "logging_dir": tmp_path / "logs", "batch_size": 1}
    both = WorkerArguments(where=f"s3://{BUCKET}/both", workers=2, tasks=3, **arguments)
    assert add_with_workers(both)
    alone = PictureIndex.open(tmp_path / "alone", model=model)
    alone.add(folder, batch_size=1)
    filled = PictureIndex.open(f"s3://{BUCKET}/both", model=alone.model)

    def check_same() -> None:
        """But for the last bit of a vector's number, which other threads may round otherwise."""
        known, found = rows_of(alone), rows_of(filled)
        assert {path: row[:-1] for path, row in found.items()} == {path: row[:-1] for path, row in known.items()}
        np.testing.assert_allclose(filled.vectors([*known]), alone.vectors([*known]), atol=1e-3)

    check_same()
    assert filled.status().left_out == alone.status().left_out
    assert filled.folders() == {str(folder): 40}

    (folder / "d1" / "p0001.png").unlink()
    (folder / "d2" / "p0002.png").rename(folder / "novo.png")
    filled.forget(folder / "d3")
    assert add_with_workers(replace(both, exclude=["d4/"]))
    assert add_with_workers(both), "the rules are kept in the bucket"
    alone.forget(folder / "d3")
    alone.add(folder, batch_size=1, exclude=["d4/"])
    check_same()
    assert len(filled) == 23
    assert filled.status().skipped == alone.status().skipped == {"excluded": 8, "forgotten": 8}


@pytest.mark.slow
def test_two_who_add_the_same_folder_to_a_bucket_leave_no_row_twice(storage, tmp_path, model, monkeypatch):
    folder, address = tmp_path / "fotos", f"s3://{BUCKET}/twice"
    make_pictures(folder, 30)
    monkeypatch.setattr(adding, "COMMIT_ROWS", 5)
    first, failures = PictureIndex.open(address, model=model), []
    first.model.images([PIL.Image.new("RGB", (32, 32))])  # loaded once, for all

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
    assert len(rows_of(PictureIndex.open(address))) == 30  # `rows_of` finds rows that are there twice


def test_a_failed_task_is_named_and_the_same_command_does_what_is_missing(tmp_path, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 10)
    options = {"folders": [str(folder)], "model": model, "workers": 1, "tasks": 3, "logging_dir": tmp_path / "logs"}
    arguments = WorkerArguments(where=str(tmp_path / "i"), **options)
    arguments.device = "nonsense"
    with pytest.raises(ValueError, match=r"(?s)index: embed: [123] tasks have failed.*device must be cpu"):
        add_with_workers(arguments)
    arguments.device = "cpu"
    assert add_with_workers(arguments)
    assert len(PictureIndex.open(tmp_path / "i")) == 10
    with pytest.raises(ValueError, match="is not there"):
        add_with_workers(WorkerArguments(where=str(tmp_path / "i"), **{**options, "folders": [str(tmp_path / "no")]}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lance error: Retryable commit conflict for version 3", "Others write to the index s3://b/403 all the time"),
        ("lance error: Error performing GET in 1.403s, 403 bytes: tcp connect error", "can't be reached"),
        ("lance error: Client error with status 403 Forbidden", "or refuses access.* 403 Forbidden$"),
        ("lance error: Encountered corrupt file", "is damaged in its part about: .*Restore it from a copy"),
    ],
)
def test_what_a_storage_says_is_told_apart(text, message):
    assert re.search(message, one_line(explanation(RuntimeError(text), "s3://b/403", "about")))


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.slow
def test_a_storage_that_refuses_or_does_not_answer_is_told_in_one_line(storage, tmp_path, monkeypatch):
    server, endpoint = start_server(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="0")  # nobody may do anything
    try:
        for address, where in ((storage, "s3://nowhere/i"), (endpoint, "s3://fotos/i"), (NOBODY, "s3://fotos/i")):
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            with pytest.raises(
                OSError, match=r"The storage of s3://\S+ can't be reached, or refuses access\."
            ) as caught:
                PictureIndex.open(where)
            one_line(caught.value)
    finally:
        server.terminate()
        server.wait(30)


REFUSED = """
import os, sys
from pathlib import Path

import PIL.Image

from capivara_search import adding
from capivara_search.index import PictureIndex

place, model, folder = sys.argv[1:]
adding.COMMIT_ROWS = 10
index = PictureIndex.open(Path(place, "index"), model=model)
index.model.images([PIL.Image.new("RGB", (32, 32))])
{before}
try:
    print(index.add(folder, batch_size=5))
except OSError as error:
    print(type(error).__name__, error.errno, error)
{after}
"""


def refused(tmp_path, model, script: str, *prefix: str) -> list[str]:
    """The lines that a process prints which adds a folder to an index in `place`."""
    make_pictures(tmp_path / "fotos", 60)
    (tmp_path / "place").mkdir()
    command = [*prefix, sys.executable, "-c", script, str(tmp_path / "place"), model, str(tmp_path / "fotos")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="a small disk can't be made here")
def test_a_full_disk_is_told_what_was_written_stays_and_the_rest_follows(tmp_path, model):
    script = REFUSED.format(
        before="Path(place, 'ballast').write_bytes(bytes(1_700_000))",
        after="""
print(len(index), len(index.search("um gato", k=100)))
Path(place, "ballast").unlink()
print(index.add(folder).new, len(index))
""",
    )
    mount = f'mount -t tmpfs -o size=2m tmpfs {tmp_path / "place"} && exec "$@"'
    lines = refused(tmp_path, model, script, "unshare", "-rm", "sh", "-c", mount, "sh")
    assert lines[0].startswith("OSError 28 [Errno 28] No space left on the disk of the index")
    kept = int(lines[1].split()[0])
    assert 0 < kept < 60
    assert lines[1:] == [f"{kept} {kept}", f"{60 - kept} 60"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_no_permission_is_told_in_one_line(tmp_path, model):
    before = """
os.mkdir(place + "/new")
PictureIndex.open(place + "/new/i", model=index.model)
index.add(folder + "/d0")
os.seteuid(65534)
"""
    after = """
try:
    PictureIndex.open(place + "/new/i", model=index.model).add(folder)
except PermissionError as error:
    print(type(error).__name__, error.errno, error)
"""
    lines = refused(tmp_path, model, REFUSED.format(before=before, after=after))
    assert len(lines) == 2
    assert all(line.startswith("PermissionError 13 [Errno 13] The index") for line in lines)
    assert all(line.endswith("no permission. Choose another place") for line in lines)
