"""An index that is killed, written by two at once, or read while it is written."""

import multiprocessing
import multiprocessing.forkserver
import random
import re
import shutil
import signal
import time

import pytest
from index_process import add
from made_index import make_pictures, rows_of

from capivara_search.index import PictureIndex

PICTURES = 200
KILLS = 20
PAUSE_S = 0.01  # a picture, so that the kills come while it works on any machine


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["index_process"])
    multiprocessing.forkserver.ensure_running()
    return context


def start(processes, tmp_path, where: str, model: str, folder, **options):
    """A process that adds a folder, once it has begun to."""
    started = processes.Event()
    log = str(tmp_path / f"{where}.log")
    arguments = (str(tmp_path / where), model, str(folder), started, log)
    process = processes.Process(target=add, args=arguments, kwargs=options)
    process.start()
    assert started.wait(120), "the process has not started"
    return process


def embedded(tmp_path, where: str) -> list[int]:
    return [int(number) for number in re.findall(r"embedded (\d+)", (tmp_path / f"{where}.log").read_text())]


@pytest.mark.slow
def test_killed_at_twenty_moments_it_goes_on_with_nothing_twice(tmp_path, processes, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, PICTURES)
    (folder / "broken.jpg").write_bytes(b"no picture")
    process, begun = start(processes, tmp_path, "whole", model, folder, pause_s=PAUSE_S), time.monotonic()
    process.join()
    seconds = time.monotonic() - begun
    assert process.exitcode == 0
    moments, killed, seen = random.Random(0), 0, set()
    for kill in range(KILLS):
        process = start(processes, tmp_path, "killed", model, folder, pause_s=PAUSE_S)
        process.join(moments.uniform(0, seconds / 6))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        rows = len(rows_of(PictureIndex.open(tmp_path / "killed")))  # each version can be read, and holds no row twice
        assert rows >= max(seen, default=0), "what was written is lost"
        seen.add(rows)
        if kill == KILLS // 2:  # and what is known moves meanwhile
            shutil.move(folder / "d0", folder / "e0")
            shutil.move(folder / "e0", folder / "d0")
    process = start(processes, tmp_path, "killed", model, folder)
    process.join()
    assert process.exitcode == 0
    assert killed >= KILLS // 2, f"only {killed} kills came in time: the test proves little"
    assert len(seen) > 5, f"the kills came at {seen} rows alone"
    whole, gone_on = PictureIndex.open(tmp_path / "whole"), PictureIndex.open(tmp_path / "killed")
    assert rows_of(gone_on) == rows_of(whole)
    assert len(whole) == PICTURES
    assert gone_on.status().skipped_files == whole.status().skipped_files != []


@pytest.mark.slow
def test_of_two_who_add_at_once_the_second_waits_and_has_nothing_to_do(tmp_path, processes, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 60)
    both = [start(processes, tmp_path, "both", model, folder, pause_s=0.06) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(rows_of(PictureIndex.open(tmp_path / "both"))) == 60
    assert sorted(embedded(tmp_path, "both")) == [0, 60]
    assert "Another process is adding to" in (tmp_path / "both.log").read_text()


def test_a_reader_sees_whole_versions_while_another_writes(tmp_path, processes, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 80)
    process = start(processes, tmp_path, "read", model, folder, commit_rows=4)
    index, seen = PictureIndex.open(tmp_path / "read", model=model), []
    vector = index.model.embed_texts(["um gato"])[0]
    while process.is_alive() or not seen or seen[-1] < 80:
        if index._table.exists():
            hits = index.search_vector(vector, k=100)
            assert all(hit.path.startswith(str(folder)) for hit in hits)
            assert len(hits) >= max(seen, default=0)
            seen.append(len(hits))
            assert index.duplicates(1.0) is not None
    assert process.exitcode == 0
    assert seen[-1] == 80
    assert len(set(seen)) > 3, f"the reader has seen {set(seen)} rows alone"
