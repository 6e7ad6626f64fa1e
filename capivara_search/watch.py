"""Folders that are followed: what changes in them is in the index seconds later.

`watchfiles` says which paths have changed. They wait until their size and time stand still, so that no half of a copy
is read, and all that have changed together go through `PictureIndex.add`, which looks at them alone.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from capivara_search.folders import kept_rules, lies_at
from capivara_search.picture_files import VIDEO_SUFFIXES, Rules, is_picture_name
from capivara_search.results import Added
from capivara_search.words import note

TICK_MS = 250  # between two looks at what is waited for
STILL_S = 1.0  # without a change, then a file is whole; one that goes on after all is read again
KNOWN_TICKS = 8  # between two looks at which folders are known: another process may add or forget some
BURST_S = 3.0  # that a whole file waits for others at most
POLL_MS = 2000  # between two looks at folders of whose changes the system does not tell
NETWORK = ("nfs.", "nfs4.", "cifs.", "smb", "9p.", "afs.", "ceph.", "virtiofs.", "vboxsf.", "fuse.")  # kinds, with "."
MOUNTS = Path("/proc/self/mountinfo")  # of Linux
ROOT = Path(__file__).resolve().parents[1]
AGAIN_S, AGAIN_MOST_S = 5, 600  # until one that has ended starts again, twice as long each time
ENDING_S = 15  # for a batch that is under way
PROGRAM = "from capivara_search import command, watch; watch.end_with_parent(); command.run()"
State = tuple[int, int] | None  # size and time of a file; None of one that is not there


def follow_index(
    index: Any,
    named: Sequence[Path],
    poll: bool | None,
    stop: threading.Event | None,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[Added]:
    """`PictureIndex.watch`; `index` is one."""
    from watchfiles import watch  # here: who looks at folders once does not need it

    def known() -> dict[Path, str]:
        """Folders to follow, with the real path of those that were not named now."""
        if not named:
            return {Path(one): real for one, real in index.asked_folders().items()}
        rules = Rules() if is_first else kept_rules(index._table)
        return {one: "" for one in named if not rules.forgotten_with(str(one))}

    def add(there: Iterable[Path], only: Collection[str] | None) -> Added:
        added = index.add(*there, only=only, on_progress=on_progress)
        index.model.prepare_images()  # now, so that the first change waits for none of it
        return added

    stop, is_first = stop or threading.Event(), True
    folders = known()
    if not (_present(folders) if named else folders):
        yield add(folders, None)  # says what is wrong, or waits for another process that adds the first folders
        is_first = False
    while not stop.is_set():
        folders = known()
        there, waiting, only = _present(folders), Waiting(), None
        if missing := [str(folder) for folder in folders if folder not in there]:
            note("not_there", ", ".join(missing), level=logging.WARNING)
        while not there and not stop.wait(POLL_MS / 1000):
            there = _present(folders := known())
        polling = any(map(is_remote, there)) if poll is None else poll
        all_changes = watch(
            *there, watch_filter=None, debounce=TICK_MS, rust_timeout=TICK_MS, yield_on_timeout=True, stop_event=stop,
            force_polling=polling, poll_delay_ms=POLL_MS, ignore_permission_denied=True,
        )  # fmt: skip
        for tick, changes in enumerate(all_changes, 1):
            waiting.take((change.name, path) for change, path in changes)
            if _present(folders) != there or ((changes or tick % KNOWN_TICKS == 0) and known() != folders):
                break
            if only is None or (only := waiting.whole()):  # all at first, since the watching has begun
                # Videos are counted by a look at all.
                whole = any(map(_is_video, only or ()))
                try:
                    yield add(there, None if whole else only)
                except ValueError as error:  # as of a folder that was emptied: the index keeps what it has of it
                    if is_first:
                        raise
                    note("not_followed", error, level=logging.WARNING)
                is_first, only = False, only or []


class Waiting:
    """Paths that have changed, until what lies there is whole."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[State, float]] = {}  # path -> its state, and since when it is so
        self._since = 0.0  # when the first of them came

    def take(self, changes: Iterable[tuple[str, str]]) -> None:
        """What is or may have been a picture, a video or a folder, of changes: "added", or another word, and a path."""
        now = time.monotonic()
        for kind, path in changes:
            inside = [path]
            if kind == "added" and os.path.isdir(path):  # whose files may have come before it was watched
                inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
            for one in inside:
                gone = not (os.path.lexists(one) or os.path.basename(one).startswith("."))
                if gone or is_picture_name(one) or _is_video(one):
                    self._since = self._since if self._seen else now
                    self._seen[one] = _state(one), now

    def whole(self) -> list[str]:
        """Those that stand still, once all do, or some have waited for `BURST_S`; they are no longer waited for."""
        now = time.monotonic()
        for path, (state, _) in self._seen.items():
            if (found := _state(path)) != state:
                self._seen[path] = found, now
        still = [path for path, (_, since) in self._seen.items() if now - since >= STILL_S]
        if len(still) < len(self._seen) and now - self._since < BURST_S:
            return []
        self._since = now
        for path in still:
            del self._seen[path]
        return still


def _is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_SUFFIXES)


def _state(path: str) -> State:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _present(folders: Mapping[Path, str]) -> dict[Path, tuple[int, int]]:
    """Those that are there, with device and number: where a disk was taken away, another folder is, or an empty one."""
    found = {}
    for folder, real in folders.items():
        with suppress(OSError):
            state = os.stat(folder)
            if not real or lies_at(str(folder), real):
                found[folder] = state.st_dev, state.st_ino
    return found


def is_remote(folder: Path) -> bool:
    """Whether a folder lies on a file system of the network, as far as Linux says it."""
    with suppress(OSError):
        device = os.stat(folder).st_dev
        for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split()
            if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                return f"{fields[fields.index('-') + 1]}.".startswith(NETWORK)
    return False


# --- beside the page -------------------------------------------------------------------------------------------------


@contextmanager
def follower(*flags: str) -> Iterator[None]:
    """`capivara watch` with these flags, in a process of its own, as long as the block and this process last.

    One that ends before, as by an error, whose line it has said, is started again.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, "-c", PROGRAM, "watch", *flags], os.environ | {"PYTHONPATH": path}
    # A group of its own: Ctrl-C is the page's. In the page's session: of two, Linux gives each half of the processor,
    # however nice one is, and the page would take a second to answer while pictures are read.
    ending, pause_s = threading.Event(), AGAIN_S

    def tend() -> None:
        nonlocal pause_s
        while not ending.is_set():
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, process_group=0)
            while not ending.wait(TICK_MS / 1000) and process.poll() is None:
                pass
            process.stdin.close()
            try:
                process.wait(ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()
            if not ending.is_set():
                note("follower_ended", process.returncode, pause_s, level=logging.WARNING)
            ending.wait(pause_s)
            pause_s = min(2 * pause_s, AGAIN_MOST_S)

    (thread := threading.Thread(target=tend, daemon=True)).start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def end_with_parent() -> None:
    """Let this process leave the processor to others, and end as by Ctrl-C when nobody holds the pipe of its stdin."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGINT)

    os.nice(10)
    threading.Thread(target=wait, daemon=True).start()
