"""How long an indexing will take is right within a factor of two, and is told to other processes."""

import json
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest
from made_index import make_pictures
from tiny import save_model

from capivara_search import estimates, table
from capivara_search.estimates import PROGRESS_FILE, RateEstimator, estimate_for, read_progress
from capivara_search.index import PictureIndex
from capivara_search.models import SearchModel
from capivara_search.table import PictureTable

LOAD_S, EACH_S, READ_S = 14.0, 0.4, 0.01  # of a model; of a picture that is embedded, and of one that is only read


class Clock:
    """Seconds that pass where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(estimates, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """With a model that takes long to load, and some time for each picture."""
    clock, real, loaded = Clock(monkeypatch), SearchModel.embed_images, []

    def prepare(self) -> None:
        clock.now += LOAD_S * (not loaded)
        loaded.append(self)

    def images(self, given, batch_size=32):
        clock.now += EACH_S * len(given)
        return real(self, given, batch_size)

    monkeypatch.setattr(SearchModel, "prepare_images", prepare)
    monkeypatch.setattr(SearchModel, "embed_images", images)
    return clock


class Followed:
    """What an estimate says at each call of `on_progress`, and when that was."""

    def __init__(self, clock: Clock, last: int | None = None):
        self.clock, self.last, self.estimate, self.said = clock, last, RateEstimator(), []

    def __call__(self, done: int, total: int) -> None:
        self.clock.now += READ_S
        self.estimate.update(done)
        rate = self.estimate.rate
        self.said.append((self.clock.now, done, rate and (total - done) / rate))
        if done == self.last:
            raise KeyboardInterrupt

    def are_right(self) -> int:
        """Check all from the fifth second of embedding on; how many these are."""
        end, start = self.said[-1][0], max(now for now, done, _ in self.said if done == 0)
        checked = [(end - now, left) for now, _, left in self.said if now - start >= 5 and now < end]
        wrong = [pair for pair in checked if pair[1] is None or not pair[0] / 2 <= pair[1] <= pair[0] * 2]
        assert not wrong, wrong
        assert all(left is None for _, done, left in self.said if not done), "nothing is known yet"
        return len(checked)


def test_a_first_run_a_second_and_a_resumed_one(tmp_path, tiny_processor, clock):
    model = str(save_model(tmp_path / "model", tiny_processor))
    make_pictures(tmp_path / "fotos", 120)
    index = PictureIndex.open(tmp_path / "i.lance", model=model)
    index.add(tmp_path / "fotos", batch_size=16, on_progress=(first := Followed(clock)))
    assert first.are_right() >= 5
    make_pictures(tmp_path / "fotos" / "more", 60, seed=1)
    index.add(tmp_path / "fotos", batch_size=16, on_progress=(second := Followed(clock)))
    assert second.said[0][1] == 0 and second.are_right() >= 2, "what is known already counts for nothing"
    resumed = PictureIndex.open(tmp_path / "j.lance", model=model)
    with pytest.raises(KeyboardInterrupt):
        resumed.add(tmp_path / "fotos", batch_size=16, on_progress=Followed(clock, last=60))
    resumed.add(tmp_path / "fotos", batch_size=16, on_progress=(rest := Followed(clock)))
    assert len(resumed) == 180 and rest.are_right() >= 4
    for path in (tmp_path / "fotos").rglob("*.png"):
        os.utime(path, (1, 1))
    index.add(tmp_path / "fotos", batch_size=16, on_progress=(touched := Followed(clock)))
    assert touched.said[-1][0] - touched.said[0][0] < 1, "no model is loaded for what is only read"


def test_the_time_to_write_the_index_is_part_of_the_estimate(tmp_path, tiny_processor, clock, monkeypatch):
    """16 s after the last picture: nobody is told that none are left."""
    model = str(save_model(tmp_path / "model", tiny_processor))
    make_pictures(tmp_path / "fotos", 120)
    monkeypatch.setattr(table, "MAX_EXACT_ROWS", 100), monkeypatch.setattr(table, "TRAINING_S_PER_ROW", 16 / 120)

    def tidy(self, width: int) -> None:
        clock.now += 16 * self._must_train_index(width, self.count())

    monkeypatch.setattr(PictureTable, "optimize", tidy)
    index = PictureIndex.open(tmp_path / "i.lance", model=model)
    index.add(tmp_path / "fotos", batch_size=16, on_progress=(followed := Followed(clock)))
    assert followed.are_right() >= 5
    (before, *_), (now, done, _) = followed.said[-2:]
    assert done == 120 and now - before >= 16 and followed.said[-2][2] == pytest.approx(16, rel=0.3)


def test_a_rate_follows_what_changes_and_forgets_the_beginning(monkeypatch):
    clock, estimate, done = Clock(monkeypatch), RateEstimator(), 0
    assert estimate.rate is None
    estimate.update(0)
    for each, number in ((0.01, 300), (1.0, 60)):  # pictures that were read while the model was loaded, then others
        for _ in range(number):
            clock.now += each
            done += 1
            estimate.update(done)
    assert estimate.rate == pytest.approx(1.0, rel=0.1)
    for _ in range(20_000):
        clock.now += 0.5
        done += 1
        estimate.update(done)
    assert estimate.rate == pytest.approx(2.0)
    clock.now += 30
    estimate.update(done)  # a model was loaded
    assert estimate.rate is None


def _hold(where: str, held, ended) -> None:
    opened = PictureTable(where)
    with opened.locked(), estimate_for(opened.where, lambda done, total: None) as tell:
        tell(0, 3400)
        held.set()
        ended.wait(60)
        time.sleep(estimates.WRITE_INTERVAL_S)
        tell(120, 3400)
        os._exit(9)  # as by SIGKILL: the file stays


@pytest.mark.slow
def test_another_process_is_told_as_long_as_there_is_somebody_who_adds(tmp_path):
    where, context = str(tmp_path / "i.lance"), multiprocessing.get_context("spawn")
    held, ended = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(where, held, ended))
    assert read_progress(where) is None
    process.start()
    assert held.wait(60) and read_progress(where) == {"done": 0, "total": 3400, "left_s": None}
    ended.set()
    process.join()
    assert json.loads((tmp_path / "i.lance" / PROGRESS_FILE).read_text())["done"] == 120
    assert read_progress(where) is None, "who was killed adds nothing"
    opened = PictureTable(where)
    with opened.locked(), estimate_for(opened.where, lambda done, total: None) as tell:
        tell(0, 5)
        assert read_progress(where) == {"done": 0, "total": 5, "left_s": None}
        (tmp_path / "i.lance" / PROGRESS_FILE).write_text('{"done": 1, "total": 5, "left_s": 100}')
        os.utime(tmp_path / "i.lance" / PROGRESS_FILE, (time.time() - 30,) * 2)
        assert read_progress(where)["left_s"] in (69, 70), "since it was said, time has passed"
    assert read_progress(where) is None and not os.listdir(tmp_path)
