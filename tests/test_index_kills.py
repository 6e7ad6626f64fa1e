"""An index whose writer is killed, that two processes write, or that is read during a write."""

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
from capivara_search.messages import Messages

PICTURES = 200
KILLS = 20
PAUSE_S = 0.01  # per picture, so that the kills come during the work even on a fast machine


@pytest.fixture(scope="session")
def processes():
    """A context that starts processes in which torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["index_process"])
    multiprocessing.forkserver.ensure_running()
    return context


def start(processes, tmp_path, where: str, model: str, folder, **options):
    """Start a process that adds a folder, and return it once it has begun."""
    started = processes.Event()
    log = str(tmp_path / f"{where}.log")
    arguments = (str(tmp_path / where), model, str(folder), started, log)
    process = processes.Process(target=add, args=arguments, kwargs=options)
    process.start()
    assert started.wait(120), "the process has not started"
    return process


def embedded(tmp_path, where: str) -> list[int]:
    """Return the numbers of embedded pictures that the processes have logged."""
    return [int(number) for number in re.findall(r"embedded (\d+)", (tmp_path / f"{where}.log").read_text())]


@pytest.mark.slow
def test_an_update_that_is_killed_twenty_times_loses_and_repeats_nothing(tmp_path, processes, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, PICTURES)
    (folder / "broken.jpg").write_bytes(b"no picture")
    process, start_time = start(processes, tmp_path, "whole", model, folder, pause_s=PAUSE_S), time.monotonic()
    process.join()
    seconds = time.monotonic() - start_time
    assert process.exitcode == 0
    rng, kill_count, row_counts = random.Random(0), 0, set()
    for kill in range(KILLS):
        process = start(processes, tmp_path, "killed", model, folder, pause_s=PAUSE_S)
        process.join(rng.uniform(0, seconds / 6))
        process.kill()
        process.join()
        kill_count += process.exitcode == -signal.SIGKILL
        row_count = len(rows_of(PictureIndex.open(tmp_path / "killed")))  # checks that no row is there twice
        assert row_count >= max(row_counts, default=0), "rows that were written are lost"
        row_counts.add(row_count)
        if kill == KILLS // 2:  # indexed files move meanwhile
            shutil.move(folder / "d0", folder / "e0")
            shutil.move(folder / "e0", folder / "d0")
    process = start(processes, tmp_path, "killed", model, folder)
    process.join()
    assert process.exitcode == 0
    assert kill_count >= KILLS // 2, f"only {kill_count} kills came in time, so the test proves little"
    assert len(row_counts) > 5, f"the kills came only at {row_counts} rows"
    whole, resumed = PictureIndex.open(tmp_path / "whole"), PictureIndex.open(tmp_path / "killed")
    assert rows_of(resumed) == rows_of(whole)
    assert len(whole) == PICTURES
    assert resumed.status().skipped_files == whole.status().skipped_files != []


@pytest.mark.slow
def test_of_two_concurrent_updates_the_second_waits_and_has_nothing_to_do(tmp_path, processes, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 60)
    both = [start(processes, tmp_path, "both", model, folder, pause_s=0.06) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(rows_of(PictureIndex.open(tmp_path / "both"))) == 60
    assert sorted(embedded(tmp_path, "both")) == [0, 60]
    waiting = Messages("en")("note.waiting", tmp_path / "both")
    assert waiting in (tmp_path / "both.log").read_text()


@pytest.mark.slow
def test_a_reader_sees_complete_versions_during_a_write(tmp_path, processes, model):
    folder = tmp_path / "fotos"
    make_pictures(folder, 80)
    process = start(processes, tmp_path, "read", model, folder, commit_rows=4)
    index, row_counts = PictureIndex.open(tmp_path / "read", model=model), []
    vector = index.model.embed_texts(["um gato"])[0]
    while process.is_alive() or not row_counts or row_counts[-1] < 80:
        if index._table.exists():
            hits = index.search_vector(vector, k=100)
            assert all(hit.path.startswith(str(folder)) for hit in hits)
            assert len(hits) >= max(row_counts, default=0)
            row_counts.append(len(hits))
            assert index.duplicates(1.0) is not None
    assert process.exitcode == 0
    assert row_counts[-1] == 80
    assert len(set(row_counts)) > 3, f"the reader has seen only {set(row_counts)} rows"
