"""Estimates of the time left are right within a factor of two, and other processes can read the progress."""

import json
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest
from made_index import make_pictures
from tiny import save_model

from capivara_search import index_progress, table
from capivara_search.index import PictureIndex
from capivara_search.index_progress import (
    PROGRESS_FILE,
    RateEstimator,
    mirror_progress_to_file,
    read_progress_of_running_update,
)
from capivara_search.models import SearchModel
from capivara_search.table import PictureTable

LOAD_S, EMBED_S, READ_S = 14.0, 0.4, 0.01  # to load a model, to embed a picture, and to read a file


class Clock:
    """A clock that a test advances."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(index_progress, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """A clock that a model advances when it is loaded and when it embeds pictures."""
    clock, embed_images, loaded = Clock(monkeypatch), SearchModel.embed_images, []

    def prepare(self) -> None:
        clock.now += LOAD_S * (not loaded)
        loaded.append(self)

    def embed(self, images, batch_size=32):
        clock.now += EMBED_S * len(images)
        return embed_images(self, images, batch_size)

    monkeypatch.setattr(SearchModel, "prepare_images", prepare)
    monkeypatch.setattr(SearchModel, "embed_images", embed)
    return clock


class ProgressLog:
    """Records each call of `on_progress` with its time and the estimated time left; interrupts at `last` pictures."""

    def __init__(self, clock: Clock, last: int | None = None):
        self.clock, self.last, self.estimate, self.entries = clock, last, RateEstimator(), []

    def __call__(self, done: int, total: int) -> None:
        self.clock.now += READ_S
        self.estimate.update(done)
        rate = self.estimate.rate
        self.entries.append((self.clock.now, done, rate and (total - done) / rate))
        if done == self.last:
            raise KeyboardInterrupt

    def check_estimates(self) -> int:
        """Check all estimates from the fifth second of embedding on, and return their number."""
        end, start = self.entries[-1][0], max(now for now, done, _ in self.entries if done == 0)
        checked = [(end - now, left) for now, _, left in self.entries if now - start >= 5 and now < end]
        wrong = [pair for pair in checked if pair[1] is None or not pair[0] / 2 <= pair[1] <= pair[0] * 2]
        assert not wrong, wrong
        assert all(left is None for _, done, left in self.entries if not done), "an estimate without a measurement"
        return len(checked)


@pytest.mark.slow
def test_index_progress_of_a_first_a_second_and_a_resumed_run(tmp_path, tiny_processor, clock):
    model = str(save_model(tmp_path / "model", tiny_processor))
    make_pictures(tmp_path / "fotos", 120)
    index = PictureIndex.open(tmp_path / "i.lance", model=model)
    index.add(tmp_path / "fotos", batch_size=16, on_progress=(first_log := ProgressLog(clock)))
    assert first_log.check_estimates() >= 5
    make_pictures(tmp_path / "fotos" / "more", 60, seed=1)
    index.add(tmp_path / "fotos", batch_size=16, on_progress=(second_log := ProgressLog(clock)))
    assert second_log.entries[0][1] == 0 and second_log.check_estimates() >= 2, (
        "pictures that are indexed already are not counted"
    )
    resumed = PictureIndex.open(tmp_path / "j.lance", model=model)
    with pytest.raises(KeyboardInterrupt):
        resumed.add(tmp_path / "fotos", batch_size=16, on_progress=ProgressLog(clock, last=60))
    resumed.add(tmp_path / "fotos", batch_size=16, on_progress=(resumed_log := ProgressLog(clock)))
    assert len(resumed) == 180 and resumed_log.check_estimates() >= 4
    for path in (tmp_path / "fotos").rglob("*.png"):
        os.utime(path, (1, 1))
    index.add(tmp_path / "fotos", batch_size=16, on_progress=(touched_log := ProgressLog(clock)))
    assert touched_log.entries[-1][0] - touched_log.entries[0][0] < 1, (
        "a model was loaded although no picture had to be embedded"
    )


def test_the_time_to_write_the_index_is_part_of_the_estimate(tmp_path, tiny_processor, clock, monkeypatch):
    """The index takes 16 s to write after the last picture, so the estimate must not be 0 before."""
    model = str(save_model(tmp_path / "model", tiny_processor))
    make_pictures(tmp_path / "fotos", 120)
    monkeypatch.setattr(table, "MAX_EXACT_ROWS", 100), monkeypatch.setattr(table, "TRAINING_S_PER_ROW", 16 / 120)

    def optimize(self, width: int) -> None:
        clock.now += 16 * self._must_train_index(width, self.count())

    monkeypatch.setattr(PictureTable, "optimize", optimize)
    index = PictureIndex.open(tmp_path / "i.lance", model=model)
    index.add(tmp_path / "fotos", batch_size=16, on_progress=(log := ProgressLog(clock)))
    assert log.check_estimates() >= 5
    (before, *_), (now, done, _) = log.entries[-2:]
    assert done == 120 and now - before >= 16 and log.entries[-2][2] == pytest.approx(16, rel=0.3)


def test_the_rate_follows_changes_and_forgets_the_beginning(monkeypatch):
    clock, estimate, done = Clock(monkeypatch), RateEstimator(), 0
    assert estimate.rate is None
    estimate.update(0)
    # Fast pictures that were read while the model was loaded, then slow ones.
    for seconds, number in ((0.01, 300), (1.0, 60)):
        for _ in range(number):
            clock.now += seconds
            done += 1
            estimate.update(done)
    assert estimate.rate == pytest.approx(1.0, rel=0.1)
    for _ in range(20_000):
        clock.now += 0.5
        done += 1
        estimate.update(done)
    assert estimate.rate == pytest.approx(2.0)
    clock.now += 30
    estimate.update(done)  # the same number: a model was loaded meanwhile
    assert estimate.rate is None


def _report_progress(where: str, reported, ended) -> None:
    opened = PictureTable(where)
    with opened.locked(), mirror_progress_to_file(opened.where, lambda done, total: None) as progress:
        progress(0, 3400)
        reported.set()
        ended.wait(60)
        time.sleep(index_progress.WRITE_INTERVAL_S)
        progress(120, 3400)
        os._exit(9)  # skips all cleanup, as SIGKILL does, so the file stays


@pytest.mark.slow
def test_another_process_reads_the_progress_while_an_update_runs(tmp_path):
    where, context = str(tmp_path / "i.lance"), multiprocessing.get_context("spawn")
    reported, ended = context.Event(), context.Event()
    process = context.Process(target=_report_progress, args=(where, reported, ended))
    assert read_progress_of_running_update(where) is None
    process.start()
    assert reported.wait(60) and read_progress_of_running_update(where) == {"done": 0, "total": 3400, "left_s": None}
    ended.set()
    process.join()
    assert json.loads((tmp_path / "i.lance" / PROGRESS_FILE).read_text())["done"] == 120
    assert read_progress_of_running_update(where) is None, "the process that was killed is not updating the index"
    opened = PictureTable(where)
    with opened.locked(), mirror_progress_to_file(opened.where, lambda done, total: None) as progress:
        progress(0, 5)
        assert read_progress_of_running_update(where) == {"done": 0, "total": 5, "left_s": None}
        (tmp_path / "i.lance" / PROGRESS_FILE).write_text('{"done": 1, "total": 5, "left_s": 100}')
        os.utime(tmp_path / "i.lance" / PROGRESS_FILE, (time.time() - 30,) * 2)
        assert read_progress_of_running_update(where)["left_s"] in (69, 70), (
            "the 30 seconds since the file was written are subtracted"
        )
    assert read_progress_of_running_update(where) is None and not os.listdir(tmp_path)
