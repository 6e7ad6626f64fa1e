"""Following folders: changes are indexed within seconds, and incomplete files are not read."""

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
from made_index import expect_error, logged_values, make_pictures
from page_process import PageClient as Asked

pytest.importorskip("watchfiles", reason="following folders needs watchfiles: pip install -e '.[search]'")

from capivara_search import picture_reading, watch
from capivara_search.index import PictureIndex
from capivara_search.results import IndexReport

PATIENCE_S = 60  # maximum wait on a busy machine; `benchmarks.search --parts follow` measures the usual time


@pytest.fixture
def folder(tmp_path) -> Path:
    make_pictures(tmp_path / "fotos", 10)
    return tmp_path / "fotos"


@pytest.fixture
def other_pictures(tmp_path) -> list[Path]:
    """Pictures outside of the folder."""
    return make_pictures(tmp_path / "spare", 10, seed=3)


class Follower:
    """Runs `PictureIndex.watch` in a thread and collects its reports."""

    def __init__(self, index: PictureIndex, *folders: Path, poll: bool | None = None):
        self.index, self.reports, self.stop = index, list[IndexReport](), threading.Event()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self.run, args=(folders, poll), daemon=True)
        self.thread.start()
        self.wait_until(lambda: self.reports)

    def run(self, folders, poll) -> None:
        try:
            for report in self.index.watch(*folders, poll=poll, stop=self.stop):
                self.reports.append(report)
        except Exception as error:
            self.error = error

    def wait_until(self, condition: Callable[[], object], seconds: float = PATIENCE_S) -> float:
        """Wait until a condition is true and return the elapsed seconds."""
        start = time.monotonic()
        while not condition():
            assert self.error is None, self.error
            assert time.monotonic() - start < seconds, self.reports
            time.sleep(0.05)
        return time.monotonic() - start

    def has(self, path: Path) -> bool:
        return self.index.get_picture(str(path)) is not None

    def sums(self) -> tuple[int, ...]:
        """Return the numbers of new, changed, moved, removed and embedded pictures in all reports after the first."""
        names = ("new", "changed", "moved", "removed", "embedded")
        return tuple(sum(getattr(report, name) for report in self.reports[1:]) for name in names)


@pytest.fixture
def follow(tmp_path, model):
    started = []

    def start(*folders: Path, poll: bool | None = None) -> Follower:
        started.append(Follower(PictureIndex.open(tmp_path / "i.lance", model=model), *folders, poll=poll))
        return started[-1]

    yield start
    for follower in started:
        follower.stop.set()
        follower.thread.join(30)
        assert not follower.thread.is_alive() and follower.error is None


@pytest.mark.slow
@pytest.mark.parametrize("poll", [False, True])
def test_new_changed_moved_and_removed_files_are_indexed(follow, folder, other_pictures, poll):
    follower = follow(folder, poll=poll)
    assert follower.reports[0].new == 10
    new = folder / "new" / "deep" / "a.png"
    new.parent.mkdir(parents=True)
    shutil.copy(other_pictures[0], new)
    (folder / "text.txt").write_text("no picture")
    follower.wait_until(lambda: follower.sums() == (1, 0, 0, 0, 1))
    assert follower.has(new)
    shutil.copy(other_pictures[1], new)
    row = follower.index.get_picture(str(new))
    follower.wait_until(lambda: follower.index.get_picture(str(new)) != row)
    moved = folder / "moved"
    (folder / "d0").rename(moved)
    follower.wait_until(lambda: follower.has(moved / "p0000.png") and not follower.has(folder / "d0" / "p0000.png"))
    shutil.rmtree(folder / "d1")
    follower.wait_until(lambda: follower.sums() == (1, 1, 2, 2, 2))
    assert len(follower.index) == 9
    time.sleep(2)
    assert len(follower.reports) <= 7, "there are reports without a change"


@pytest.mark.slow
def test_a_file_is_read_when_it_is_complete_and_a_burst_is_one_update(follow, folder, other_pictures, monkeypatch):
    monkeypatch.setattr(watch, "SETTLED_MS", 2500)  # on a busy machine, the writer below may pause for a second
    follower, data = follow(folder), other_pictures[0].read_bytes()
    slow = folder / "slow.png"
    with open(slow, "wb", buffering=0) as file:
        for start in range(0, len(data), step := len(data) // 8 + 1):
            file.write(data[start : start + step])
            time.sleep(0.35)
            assert len(follower.reports) == 1, "the file was read while it was growing"
    follower.wait_until(lambda: follower.has(slow))
    for number, path in enumerate(other_pictures[1:]):
        shutil.copy(path, folder / f"burst{number}.png")
        time.sleep(0.05)
    follower.wait_until(lambda: follower.sums()[0] == 10)
    assert [report.new for report in follower.reports[1:]] == [1, 9]
    assert not any(report.skipped_files for report in follower.reports)


@pytest.mark.slow
def test_a_complete_file_does_not_wait_for_a_file_that_keeps_growing(follow, folder, other_pictures):
    follower, ended = follow(folder), threading.Event()

    def grow() -> None:
        with open(folder / "endless.png", "wb", buffering=0) as file:
            while not ended.wait(0.3):
                file.write(b"x")

    thread = threading.Thread(target=grow)
    thread.start()
    shutil.copy(other_pictures[0], folder / "whole.png")
    seconds = follower.wait_until(lambda: follower.has(folder / "whole.png"))
    ended.set()
    thread.join()
    assert seconds > watch.SETTLED_MS / 1000 and not follower.reports[-1].skipped_files
    follower.wait_until(lambda: follower.reports[-1].skipped_files)  # the file is no picture


@pytest.mark.slow
def test_an_unmounted_disk_keeps_its_rows_and_is_followed_again_when_it_is_back(follow, folder, other_pictures, caplog):
    follower, away = follow(folder), folder.with_name("away")
    folder.rename(away)
    follower.wait_until(lambda: logged_values(caplog, "not_there"))
    shutil.copy(other_pictures[0], away / "meanwhile.png")
    away.rename(folder)
    follower.wait_until(lambda: follower.has(folder / "meanwhile.png"))
    shutil.copy(other_pictures[1], folder / "after.png")
    follower.wait_until(lambda: follower.has(folder / "after.png"))
    for path in list(folder.iterdir()):
        path.rename(folder.parent / f"aside-{path.name}")
    follower.wait_until(lambda: logged_values(caplog, "not_followed"))
    assert len(follower.index) == 12, "rows of an emptied folder were removed"


@pytest.mark.slow
def test_known_folders_are_followed_as_they_come_and_go(follow, folder, other_pictures, model, tmp_path, caplog):
    """Without named folders: a disk is not mounted at the start, one folder is forgotten and one is added later."""
    disk, forgotten, later = (tmp_path / name for name in ("disk", "forgotten", "later"))
    for number, new_folder in enumerate((disk, forgotten, later)):
        make_pictures(new_folder, 3, seed=20 + number)
    other = PictureIndex.open(tmp_path / "i.lance", model=model)
    other.add(folder, disk, forgotten)
    disk.rename(away := tmp_path / "away"), disk.mkdir()
    follower = follow()
    assert len(follower.index) == 16 and (str(disk),) in logged_values(caplog, "not_there")
    other.forget(forgotten), other.add(later)
    follower.wait_until(lambda: len(follower.reports) == 2)
    shutil.copy(other_pictures[0], folder / "a.png"), shutil.copy(other_pictures[1], later / "b.png")
    shutil.copy(other_pictures[2], forgotten / "c.png")
    follower.wait_until(lambda: follower.has(folder / "a.png") and follower.has(later / "b.png"))
    disk.rmdir(), shutil.copy(other_pictures[3], away / "d.png"), away.rename(disk)
    follower.wait_until(lambda: follower.has(disk / "d.png"))
    assert not follower.has(forgotten / "c.png") and not logged_values(caplog, "not_followed")


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [True, False])
def test_a_folder_that_becomes_a_link_is_not_followed(follow, folder, tmp_path, model, caplog, is_named):
    private = make_pictures(tmp_path / "private", 3, seed=9)
    PictureIndex.open(tmp_path / "i.lance", model=model).add(folder)
    follower = follow(*[folder] * is_named)
    folder.rename(away := tmp_path / "away")
    folder.symlink_to(tmp_path / "private")
    follower.wait_until(lambda: logged_values(caplog, "not_there"))
    shutil.copy(private[0], tmp_path / "private" / "new.png")
    time.sleep(2 * watch.SETTLED_MS / 1000)
    assert not follower.has(folder / "new.png") and len(follower.index) == 10
    assert follower.index.requested_folders() == {str(folder): str(folder)}
    folder.unlink(), away.rename(folder)
    shutil.copy(private[1], folder / "back.png")
    follower.wait_until(lambda: follower.has(folder / "back.png"))


@pytest.mark.slow
@pytest.mark.parametrize("is_named", [True, False])
def test_a_folder_that_becomes_a_link_during_an_update_is_not_read(
    folder, tmp_path, model, monkeypatch, caplog, is_named
):
    private = {path.read_bytes() for path in make_pictures(tmp_path / "private", 3, seed=9)}
    index, contents, read_bounded = (
        PictureIndex.open(tmp_path / "i.lance", model=model),
        [],
        picture_reading.read_bounded,
    )
    index.add(folder)
    add = index.add

    def read_and_record(file):
        contents.append(read_bounded(file))
        return contents[-1]

    def swap_then_add(*args, **options):
        folder.rename(tmp_path / "away")
        folder.symlink_to(tmp_path / "private")
        return add(*args, **options)

    monkeypatch.setattr(picture_reading, "read_bounded", read_and_record)
    monkeypatch.setattr(index, "add", swap_then_add)
    with expect_error("folder_swapped", path=folder):
        next(index.watch(*[folder] * is_named))
    assert private.isdisjoint(contents)
    assert index.requested_folders() == {str(folder): str(folder)} and len(index) == 10


def test_missing_folders_are_refused_at_the_start(tmp_path, model, folder):
    index = PictureIndex.open(tmp_path / "i.lance", model=model)
    with expect_error("no_known_folder"):
        next(index.watch())
    with expect_error(None, path=tmp_path / "none"):
        next(index.watch(tmp_path / "none"))


def test_network_folders_are_recognized_by_their_file_system(tmp_path, monkeypatch):
    device = os.stat(tmp_path).st_dev
    monkeypatch.setattr(watch, "MOUNTINFO_FILE", tmp_path / "mounts")
    assert not watch.is_network_folder(tmp_path), "there is no list of mounts"
    device_number = f"{os.major(device)}:{os.minor(device)}"
    for kind, remote in {"ext4": False, "fuseblk": False, "nfs4": True, "cifs": True, "fuse.sshfs": True}.items():
        line = f"30 22 {device_number} / /mnt/f rw,relatime shared:1 - {kind} server:/f rw\n"
        (tmp_path / "mounts").write_text(f"22 1 9:9 / / rw - nfs x:/ rw\n{line}")
        assert watch.is_network_folder(tmp_path) == remote, kind


# --- The command, and the follower process of the page ---------------------------------------------------------------


@pytest.fixture
def started():
    """Start the command in a process that ends with the test."""
    environment = os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = []

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "capivara_search", *map(str, arguments)]
        processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_command_prints_a_line_per_update_and_ends_with_a_line(started, folder, other_pictures, tmp_path, model):
    flags = ("--index", tmp_path / "i.lance", "--model", model, "--lang", "pt")
    empty = started("seguir", *flags)
    assert "capivara indexar PASTA" in empty.communicate(timeout=60)[1] and empty.returncode == 3
    process = started("seguir", folder, *flags)
    assert process.stdout.readline().startswith("10 imagens novas (")
    assert process.stdout.readline() == "10 imagens no índice.\n"
    shutil.copy(other_pictures[0], folder / "a.png")
    assert process.stdout.readline().startswith("1 imagem nova (")
    second = started("indexar", folder, *flags)  # waits for the end of an update, not of the first process
    assert "Nada mudou" in second.communicate(timeout=60)[0]
    (folder / "a.png").unlink()
    assert process.stdout.readline().startswith("1 imagem saiu (")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert out == "" and error.splitlines()[-1] == "Encerrado."
    assert f"Seguindo {folder}; Ctrl-C termina." in error and process.returncode == 0


@pytest.mark.slow
def test_the_page_answers_during_an_update_and_follows_folders_afterwards(started, tmp_path, model, other_pictures):
    """The page is started with `--watch` before the first picture is in the index."""
    where, folder = tmp_path / "i.lance", tmp_path / "fotos"
    make_pictures(folder, 1500)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--index", where, "--model", model, "--lang", "pt")
    adding = started("indexar", folder, *flags, "--batch-size", 1)
    index = PictureIndex.open(where, model=model)
    wait_until(index.progress)
    assert not len(index), "pictures are written already, so the page starts too late for this test"
    page = started("abrir", "--no-open", "--watch", "--port", port, *flags)
    assert "A página está em" in page.stdout.readline()
    client, progress, longest = Asked(f"http://127.0.0.1:{port}"), [], 0.0
    while adding.poll() is None:
        start = time.monotonic()
        status, answer = client.ask("status", {"language": "pt"})
        assert status == 200 and client.ask("search", {"text": "um gato", "k": 5})[0] == 200
        longest = max(longest, time.monotonic() - start)
        progress.append(answer["progress"])
        time.sleep(0.1)
    assert adding.communicate()[0].startswith("1.500 imagens novas")
    progress = [entry for entry in progress if entry]
    assert progress and all(entry["total"] == 1500 for entry in progress) and progress[-1]["left_s"] is not None
    done_counts = [entry["done"] for entry in progress]
    assert done_counts == sorted(done_counts) and longest < PATIENCE_S / 6
    shutil.copy(other_pictures[0], folder / "a.png")
    wait_until(lambda: client.ask("status", {"language": "pt"})[1]["count"] == 1501)
    assert client.ask("search", {"text": "", "k": 1})[1]["hits"][0]["path"] == str(folder / "a.png")
    # A thread starts the follower, so it is not a child of the main thread.
    tasks = Path(f"/proc/{page.pid}/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    commands = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children}
    follower = int(
        next(child for child, command in commands.items() if "end_with_parent_and_lower_priority" in command)
    )
    assert os.getsid(follower) == os.getsid(page.pid) and os.getpgid(follower) == follower, (
        "its priority would not count in another session"
    )
    assert os.getpriority(os.PRIO_PROCESS, follower) == os.getpriority(os.PRIO_PROCESS, page.pid) + 10
    page.kill()  # the follower must notice and end
    page.wait()
    wait_until(lambda: not Path(f"/proc/{follower}").exists() or "Z" in Path(f"/proc/{follower}/stat").read_text())


def test_the_follower_of_the_page_is_started_again_after_it_was_killed(tmp_path, monkeypatch, caplog):
    log = tmp_path / "log"
    log.touch()
    program = f"import os, sys; print(os.getpid(), file=open({str(log)!r}, 'a')); sys.stdin.read()"
    monkeypatch.setattr(watch, "FOLLOWER_PROGRAM", program)
    monkeypatch.setattr(watch, "RESTART_DELAY_S", 0.2)
    with watch.keep_watch_subprocess_running():
        wait_until(lambda: log.read_text().endswith("\n"))
        os.kill(int(log.read_text()), signal.SIGKILL)
        wait_until(lambda: log.read_text().count("\n") == 2)
        assert logged_values(caplog, "follower_ended") == [(-9, 0.2)]
    assert not Path(f"/proc/{log.read_text().split()[1]}").exists()
    assert len(logged_values(caplog, "follower_ended")) == 1


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.05)
