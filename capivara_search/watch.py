"""Folders that are followed: what changes in them is in the index seconds later.

`watchfiles` says which paths have changed, all of a burst together. They wait until their size and time are the same at
two looks, so that no half of a copy is read, and go through `PictureIndex.add`, which looks at them alone.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from capivara_search.folders import is_available, load_rules
from capivara_search.messages import log_message
from capivara_search.picture_files import FileState, is_picture_name
from capivara_search.results import IndexReport

SETTLED_MS = 1000  # without a change, then a burst is over, and a file whole; one that goes on after all is read again
MAX_BURST_MS = 2000  # between two looks, where changes go on and on
POLL_INTERVAL_MS = 2000  # between two looks at folders of whose changes the system does not tell
NETWORK_FILE_SYSTEMS = (
    "nfs.",
    "nfs4.",
    "cifs.",
    "smb",
    "9p.",
    "afs.",
    "ceph.",
    "virtiofs.",
    "vboxsf.",
    "fuse.",
)  # kinds, with "."
MOUNTINFO_FILE = Path("/proc/self/mountinfo")  # of Linux
RESTART_DELAY_S = 30  # until one that has ended starts again
SHUTDOWN_TIMEOUT_S = 15  # for a batch that is under way
FOLLOWER_PROGRAM = "from capivara_search import command, watch; watch.end_with_parent(); command.run()"


def follow_index(
    index: Any,
    named_folders: Sequence[Path],
    poll: bool | None,
    stop: threading.Event | None,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[IndexReport]:
    """`PictureIndex.watch`; `index` is one."""
    from watchfiles import watch  # here: who looks at folders once does not need it

    def known() -> dict[Path, str]:
        """Folders to follow, with the real path that was recorded, or resolved when this call named them."""
        if not named_folders:
            return {Path(one): real for one, real in index.requested_folders().items()}
        return {
            one: real
            for one, real in named_paths.items()
            if is_first or not load_rules(index._table).find_forgotten_parent(str(one))
        }

    def present(folders: Mapping[Path, str]) -> dict[Path, tuple[int, int]]:
        return _present_folders(folders, allow_empty=bool(named_folders))

    def add(there: Iterable[Path], only: Collection[str] | None) -> IndexReport:
        added = index.add(*there, only_paths=only, on_progress=on_progress, real_paths=folders)
        index.model.prepare_images()  # now, so that the first change waits for none of it
        return added

    stop, is_first, named_paths = stop or threading.Event(), True, {one: os.path.realpath(one) for one in named_folders}
    folders = known()
    if not (present(folders) if named_folders else folders):
        yield add(folders, None)  # says what is wrong, or waits for another process that adds the first folders
        is_first = False
    while not stop.is_set():
        folders = known()
        there, waiting, only = present(folders), dict[str, FileState | None](), None
        if missing := [str(folder) for folder in folders if folder not in there]:
            log_message("not_there", ", ".join(missing), level=logging.WARNING)
        while not there and not stop.wait(POLL_INTERVAL_MS / 1000):
            there = present(folders := known())
        polling = any(map(is_network_folder, there)) if poll is None else poll
        all_changes = watch(
            *there, watch_filter=None, debounce=MAX_BURST_MS, step=SETTLED_MS, rust_timeout=SETTLED_MS, yield_on_timeout=True,
            stop_event=stop, force_polling=polling, poll_delay_ms=POLL_INTERVAL_MS, ignore_permission_denied=True,
        )  # fmt: skip
        for changes in all_changes:
            if present(folders) != there or known() != folders:
                break
            if only is None or (only := pop_settled(waiting)):  # all at first, since the watching has begun
                try:
                    yield add(there, only)
                except ValueError as error:  # as of a folder that was emptied: the index keeps what it has of it
                    if is_first:
                        raise
                    log_message("not_followed", error, level=logging.WARNING)
                is_first, only = False, only or []
            waiting |= {
                path: _file_state(path) for change, path in changes for path in _affected_paths(change.name, path)
            }


def pop_settled(waiting: dict[str, FileState | None]) -> list[str]:
    """Those of some paths that are as they were at the last look; they are no longer waited for."""
    found = {path: _file_state(path) for path in waiting}
    whole = [path for path, state in found.items() if state == waiting[path]]
    waiting |= found
    for path in whole:
        del waiting[path]
    return whole


def _affected_paths(change_type: str, path: str) -> Iterator[str]:
    """What is or may have been a picture or a folder, of a path that was "added", or something else."""
    inside = [path]
    if change_type == "added" and os.path.isdir(path):  # whose files may have come before it was watched
        inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for one in inside:
        gone = not (os.path.lexists(one) or os.path.basename(one).startswith("."))
        if gone or is_picture_name(one):
            yield one


def _file_state(path: str) -> FileState | None:
    """None where nothing is there."""
    with suppress(OSError):
        return FileState.of(path)
    return None


def _present_folders(folders: Mapping[Path, str], allow_empty: bool) -> dict[Path, tuple[int, int]]:
    """Those that are there, with device and number: where a disk was taken away, another folder is, or an empty one."""
    found = {}
    for folder, real in folders.items():
        with suppress(OSError):
            state = os.stat(folder)
            if is_available(folder, real, allow_empty):
                found[folder] = state.st_dev, state.st_ino
    return found


def is_network_folder(folder: Path) -> bool:
    """Whether a folder lies on a file system of the network, as far as Linux says it."""
    with suppress(OSError):
        device = os.stat(folder).st_dev
        for line in MOUNTINFO_FILE.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split()
            if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                return f"{fields[fields.index('-') + 1]}.".startswith(NETWORK_FILE_SYSTEMS)
    return False


# --- beside the page -------------------------------------------------------------------------------------------------


@contextmanager
def run_follower(*flags: str) -> Iterator[None]:
    """`capivara watch` with these flags, in a process of its own, as long as the block and this process last.

    One that ends before, as by an error, whose line it has said, is started again.
    """
    # A group of its own: Ctrl-C is the page's. In the page's session: of two, Linux gives each half of the processor,
    # however nice one is, and the page would take a second to answer while pictures are read.
    ending, command = threading.Event(), [sys.executable, "-c", FOLLOWER_PROGRAM, "watch", *flags]

    def tend() -> None:
        while not ending.is_set():
            process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
            while not ending.wait(0.2) and process.poll() is None:
                pass
            process.stdin.close()
            try:
                process.wait(SHUTDOWN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            if not ending.is_set():
                log_message("follower_ended", process.returncode, RESTART_DELAY_S, level=logging.WARNING)
            ending.wait(RESTART_DELAY_S)

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
