"""Folders that are followed: what changes in them is found within seconds, and nothing is read by halves."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made_index import make_pictures
from page_process import Asked

pytest.importorskip("watchfiles", reason="folders are followed by watchfiles: pip install -e '.[search]'")

from capivara_search import picture_reading, watch
from capivara_search.index import PictureIndex
from capivara_search.results import IndexReport

PATIENCE_S = 60  # on a busy machine; `benchmarks.search --parts follow` measures how long it takes


@pytest.fixture
def folder(tmp_path) -> Path:
    make_pictures(tmp_path / "fotos", 10)
    return tmp_path / "fotos"


@pytest.fixture
def spare(tmp_path) -> list[Path]:
    """Pictures beside the folder."""
    return make_pictures(tmp_path / "spare", 10, seed=3)


class Followed:
    """An index whose folder is followed in a thread."""

    def __init__(self, index: PictureIndex, *folders: Path, poll: bool | None = None):
        self.index, self.rounds, self.stop = index, list[IndexReport](), threading.Event()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self.run, args=(folders, poll), daemon=True)
        self.thread.start()
        self.until(lambda: self.rounds)

    def run(self, folders, poll) -> None:
        try:
            for added in self.index.watch(*folders, poll=poll, stop=self.stop):
                self.rounds.append(added)
        except Exception as error:
            self.error = error

    def until(self, true: Callable[[], object], seconds: float = PATIENCE_S) -> float:
        """Seconds until it is true."""
        start = time.monotonic()
        while not true():
            assert self.error is None, self.error
            assert time.monotonic() - start < seconds, self.rounds
            time.sleep(0.05)
        return time.monotonic() - start

    def has(self, path: Path) -> bool:
        return self.index.get_picture(str(path)) is not None

    def sums(self) -> tuple[int, ...]:
        """New, changed, moved, removed and embedded pictures, of all rounds but the first."""
        names = ("new", "changed", "moved", "removed", "embedded")
        return tuple(sum(getattr(one, name) for one in self.rounds[1:]) for name in names)


@pytest.fixture
def follow(tmp_path, model):
    started = []

    def start(*folders: Path, poll: bool | None = None) -> Followed:
        started.append(Followed(PictureIndex.open(tmp_path / "i.lance", model=model), *folders, poll=poll))
        return started[-1]

    yield start
    for one in started:
        one.stop.set()
        one.thread.join(30)
        assert not one.thread.is_alive() and one.error is None


@pytest.mark.slow
@pytest.mark.parametrize("poll", [False, True])
def test_new_changed_moved_and_removed_files(follow, folder, spare, poll):
    followed = follow(folder, poll=poll)
    assert followed.rounds[0].new == 10
    new = folder / "new" / "deep" / "a.png"
    new.parent.mkdir(parents=True)
    shutil.copy(spare[0], new)
    (folder / "text.txt").write_text("no picture")
    followed.until(lambda: followed.sums() == (1, 0, 0, 0, 1))
    assert followed.has(new)
    shutil.copy(spare[1], new)
    row = followed.index.get_picture(str(new))
    followed.until(lambda: followed.index.get_picture(str(new)) != row)
    moved = folder / "moved"
    (folder / "d0").rename(moved)
    followed.until(lambda: followed.has(moved / "p0000.png") and not followed.has(folder / "d0" / "p0000.png"))
    shutil.rmtree(folder / "d1")
    followed.until(lambda: followed.sums() == (1, 1, 2, 2, 2))
    assert len(followed.index) == 9
    time.sleep(2)
    assert len(followed.rounds) <= 7, "what has not changed makes no rounds"


@pytest.mark.slow
def test_a_file_is_read_when_it_is_whole_and_a_burst_is_one_round(follow, folder, spare, monkeypatch):
    monkeypatch.setattr(watch, "SETTLED_MS", 2500)  # on a busy machine a writer may rest for a second
    followed, data = follow(folder), spare[0].read_bytes()
    slow = folder / "slow.png"
    with open(slow, "wb", buffering=0) as file:
        for start in range(0, len(data), step := len(data) // 8 + 1):
            file.write(data[start : start + step])
            time.sleep(0.35)
            assert len(followed.rounds) == 1, "it is still growing"
    followed.until(lambda: followed.has(slow))
    for number, path in enumerate(spare[1:]):
        shutil.copy(path, folder / f"burst{number}.png")
        time.sleep(0.05)
    followed.until(lambda: followed.sums()[0] == 10)
    assert [one.new for one in followed.rounds[1:]] == [1, 9] and not any(one.skipped_files for one in followed.rounds)


@pytest.mark.slow
def test_a_whole_file_does_not_wait_for_one_that_never_ends(follow, folder, spare):
    followed, ended = follow(folder), threading.Event()

    def grow() -> None:
        with open(folder / "endless.png", "wb", buffering=0) as file:
            while not ended.wait(0.3):
                file.write(b"x")

    (thread := threading.Thread(target=grow)).start()
    shutil.copy(spare[0], folder / "whole.png")
    seconds = followed.until(lambda: followed.has(folder / "whole.png"))
    ended.set()
    thread.join()
    assert seconds > watch.SETTLED_MS / 1000 and not followed.rounds[-1].skipped_files
    followed.until(lambda: followed.rounds[-1].skipped_files)  # a picture it is not


@pytest.mark.slow
def test_a_disk_that_is_taken_away_keeps_its_rows_and_is_followed_when_it_is_back(follow, folder, spare, caplog):
    followed, away = follow(folder), folder.with_name("away")
    folder.rename(away)
    followed.until(lambda: "Not here" in caplog.text)
    shutil.copy(spare[0], away / "meanwhile.png")
    away.rename(folder)
    followed.until(lambda: followed.has(folder / "meanwhile.png"))
    shutil.copy(spare[1], folder / "after.png")
    followed.until(lambda: followed.has(folder / "after.png"))
    for path in list(folder.iterdir()):
        path.rename(folder.parent / f"aside-{path.name}")
    followed.until(lambda: "Nothing changes in the index" in caplog.text)
    assert len(followed.index) == 12, "a folder that has become empty removes nothing"


@pytest.mark.slow
def test_all_known_folders_are_followed_as_they_come_and_go(follow, folder, spare, model, tmp_path, caplog):
    """Without named ones: an unmounted disk at the start, one that is forgotten, one that is added meanwhile."""
    disk, forgotten, later = (tmp_path / name for name in ("disk", "forgotten", "later"))
    for number, one in enumerate((disk, forgotten, later)):
        make_pictures(one, 3, seed=20 + number)
    other = PictureIndex.open(tmp_path / "i.lance", model=model)
    other.add(folder, disk, forgotten)
    disk.rename(away := tmp_path / "away"), disk.mkdir()
    followed = follow()
    assert len(followed.index) == 16 and f"followed when it is back: {disk}" in caplog.text
    other.forget(forgotten), other.add(later)
    followed.until(lambda: len(followed.rounds) == 2)
    shutil.copy(spare[0], folder / "a.png"), shutil.copy(spare[1], later / "b.png")
    shutil.copy(spare[2], forgotten / "c.png")
    followed.until(lambda: followed.has(folder / "a.png") and followed.has(later / "b.png"))
    disk.rmdir(), shutil.copy(spare[3], away / "d.png"), away.rename(disk)
    followed.until(lambda: followed.has(disk / "d.png"))
    assert not followed.has(forgotten / "c.png") and "Nothing changes in the index" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [True, False])
def test_a_folder_that_is_swapped_for_a_link_is_not_followed(follow, folder, tmp_path, model, caplog, is_named):
    private = make_pictures(tmp_path / "private", 3, seed=9)
    PictureIndex.open(tmp_path / "i.lance", model=model).add(folder)
    followed = follow(*[folder] * is_named)
    folder.rename(away := tmp_path / "away")
    folder.symlink_to(tmp_path / "private")
    followed.until(lambda: "Not here" in caplog.text)
    shutil.copy(private[0], tmp_path / "private" / "new.png")
    time.sleep(2 * watch.SETTLED_MS / 1000)
    assert not followed.has(folder / "new.png") and len(followed.index) == 10
    assert followed.index.requested_folders() == {str(folder): str(folder)}
    folder.unlink(), away.rename(folder)
    shutil.copy(private[1], folder / "back.png")
    followed.until(lambda: followed.has(folder / "back.png"))


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [True, False])
def test_a_folder_that_is_swapped_within_a_round_is_not_read(folder, tmp_path, model, monkeypatch, caplog, is_named):
    private = {path.read_bytes() for path in make_pictures(tmp_path / "private", 3, seed=9)}
    index, opened, contents = PictureIndex.open(tmp_path / "i.lance", model=model), [], picture_reading.read_bounded
    index.add(folder)
    monkeypatch.setattr(picture_reading, "read_bounded", lambda file: opened.append(contents(file)) or opened[-1])
    add = index.add

    def add_after_swap(*args, **more):
        folder.rename(tmp_path / "away")
        folder.symlink_to(tmp_path / "private")
        return add(*args, **more)

    monkeypatch.setattr(index, "add", add_after_swap)
    with pytest.raises(ValueError) as error:
        next(index.watch(*[folder] * is_named))
    assert error.value.code == "folder_swapped" and private.isdisjoint(opened)
    assert index.requested_folders() == {str(folder): str(folder)} and len(index) == 10


def test_wrong_folders_are_named_at_once(tmp_path, model, folder):
    index = PictureIndex.open(tmp_path / "i.lance", model=model)
    for folders, text in ((), "No folder was named"), ([tmp_path / "none"], "does not exist"):
        with pytest.raises(ValueError, match=text):
            next(index.watch(*folders))


def test_folders_of_the_network_are_known_by_their_file_system(tmp_path, monkeypatch):
    device = os.stat(tmp_path).st_dev
    monkeypatch.setattr(watch, "MOUNTINFO_FILE", tmp_path / "mounts")
    assert not watch.is_network_folder(tmp_path), "nothing says so"
    place = f"{os.major(device)}:{os.minor(device)}"
    for kind, remote in {"ext4": False, "fuseblk": False, "nfs4": True, "cifs": True, "fuse.sshfs": True}.items():
        line = f"30 22 {place} / /mnt/f rw,relatime shared:1 - {kind} server:/f rw\n"
        (tmp_path / "mounts").write_text(f"22 1 9:9 / / rw - nfs x:/ rw\n{line}")
        assert watch.is_network_folder(tmp_path) == remote, kind


# ---- the command, and beside the page


@pytest.fixture
def started():
    """Starts the command, and ends what is left of it."""
    environment = os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = []

    def start(*words: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "capivara_search", *map(str, words)]
        processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_command_says_each_round_in_a_line_and_ends_in_one(started, folder, spare, tmp_path, model):
    flags = ("--index", tmp_path / "i.lance", "--model", model, "--lang", "pt")
    empty = started("seguir", *flags)
    assert "capivara indexar PASTA" in empty.communicate(timeout=60)[1] and empty.returncode == 3
    process = started("seguir", folder, *flags)
    assert process.stdout.readline().startswith("10 imagens novas (")
    assert process.stdout.readline() == "10 imagens no índice.\n"
    shutil.copy(spare[0], folder / "a.png")
    assert process.stdout.readline().startswith("1 imagem nova (")
    second = started("indexar", folder, *flags)  # who comes second waits for a round, not for the end
    assert "Nada mudou" in second.communicate(timeout=60)[0]
    (folder / "a.png").unlink()
    assert process.stdout.readline().startswith("1 imagem saiu (")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert out == "" and error.splitlines()[-1] == "Encerrado."
    assert f"Seguindo {folder}; Ctrl-C termina." in error and process.returncode == 0


@pytest.mark.slow
def test_the_page_answers_while_another_process_adds_and_follows_by_itself(started, tmp_path, model, spare):
    """`abrir` before the first picture is in the index, then with `--watch`."""
    where, folder = tmp_path / "i.lance", tmp_path / "fotos"
    make_pictures(folder, 1500)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--index", where, "--model", model, "--lang", "pt")
    adding = started("indexar", folder, *flags, "--batch-size", 1)
    index = PictureIndex.open(where, model=model)
    until(index.progress)
    assert not len(index), "nothing is written yet"
    page = started("abrir", "--no-open", "--watch", "--port", port, *flags)
    assert "A página está em" in page.stdout.readline()
    asked, seen, longest = Asked(f"http://127.0.0.1:{port}"), [], 0.0
    while adding.poll() is None:
        start = time.monotonic()
        status, found = asked.ask("status", {"language": "pt"})
        assert status == 200 and asked.ask("search", {"text": "um gato", "k": 5})[0] == 200
        longest = max(longest, time.monotonic() - start)
        seen.append(found["progress"])
        time.sleep(0.1)
    assert adding.communicate()[0].startswith("1.500 imagens novas")
    told = [one for one in seen if one]
    assert told and all(one["total"] == 1500 for one in told) and told[-1]["left_s"] is not None
    assert [one["done"] for one in told] == sorted(one["done"] for one in told) and longest < PATIENCE_S / 6
    shutil.copy(spare[0], folder / "a.png")
    until(lambda: asked.ask("status", {"language": "pt"})[1]["count"] == 1501)
    assert asked.ask("search", {"text": "", "k": 1})[1]["hits"][0]["path"] == str(folder / "a.png")
    tasks = Path(f"/proc/{page.pid}/task").iterdir()  # a thread starts it
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    commands = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children}
    follower = int(next(child for child, command in commands.items() if "end_with_parent" in command))
    assert os.getsid(follower) == os.getsid(page.pid) and os.getpgid(follower) == follower, "or its nice says nothing"
    assert os.getpriority(os.PRIO_PROCESS, follower) == os.getpriority(os.PRIO_PROCESS, page.pid) + 10
    page.kill()  # whose follower notices
    page.wait()
    until(lambda: not Path(f"/proc/{follower}").exists() or "Z" in Path(f"/proc/{follower}/stat").read_text())


def test_what_follows_beside_the_page_is_started_again_when_it_has_died(tmp_path, monkeypatch, caplog):
    (log := tmp_path / "log").touch()
    program = f"import os, sys; print(os.getpid(), file=open({str(log)!r}, 'a')); sys.stdin.read()"
    monkeypatch.setattr(watch, "FOLLOWER_PROGRAM", program)
    monkeypatch.setattr(watch, "RESTART_DELAY_S", 0.2)
    with watch.run_follower():
        until(lambda: log.read_text().endswith("\n"))
        os.kill(int(log.read_text()), signal.SIGKILL)
        until(lambda: log.read_text().count("\n") == 2)
        assert "the process that did has ended (code -9); another one starts in 0.2 s" in caplog.text
    assert not Path(f"/proc/{log.read_text().split()[1]}").exists() and caplog.text.count("has ended") == 1


def until(true: Callable[[], object], seconds: float = 60) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.05)
