"""Follow folders and keep an index up to date, within seconds of a change.

The package watchfiles reports changed paths in bursts. A path waits until its size and modification time have stayed
the same from one burst to the next, so that no file is read while it is still being copied. `PictureIndex.add` then
updates these paths only.
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

from capivara_search.folder_scan import FileState, is_picture_name
from capivara_search.folders import is_available, load_rules
from capivara_search.messages import log_message
from capivara_search.results import IndexReport

# A burst of changes ends after this time without a change. A file that changes later is read again.
SETTLED_MS = 1000
MAX_BURST_MS = 2000  # longest burst if changes never stop
POLL_INTERVAL_MS = 2000  # time between two scans of folders for which the system reports no changes
# File system types of /proc/self/mountinfo on which Linux reports no changes made by other machines. They are compared
# after adding a dot, so "nfs." is the type nfs alone and "fuse." also any subtype such as fuse.sshfs.
NETWORK_FILE_SYSTEMS = (*("nfs.", "nfs4.", "cifs.", "smb", "9p.", "afs.", "ceph.", "virtiofs.", "vboxsf.", "fuse."),)
MOUNTINFO_FILE = Path("/proc/self/mountinfo")  # exists on Linux only
RESTART_DELAY_S = 30  # time before a follower process that has ended is started again
SHUTDOWN_TIMEOUT_S = 15  # time for a follower process to finish its batch
FOLLOWER_PROGRAM = "from capivara_search import command, watch; watch.end_with_parent(); command.run()"


def follow_index(
    index: Any,
    named_folders: Sequence[Path],
    poll: bool | None,
    stop: threading.Event | None,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[IndexReport]:
    """Update an index from folders, then follow the folders until `stop` is set (`PictureIndex.watch`).

    Args:
        index: The PictureIndex.
        named_folders: Absolute paths of the folders to follow. Empty: those that were added on this machine.
        poll: Whether to scan the folders every two seconds instead of waiting for events of the operating system.
            None: only if a folder is on a network file system.
        stop: Ends the loop when it is set. None: the loop ends by Ctrl-C only.
        on_progress: Called with the number of processed pictures and the total.

    Yields:
        A report of the update of all folders, then one per burst of changes.

    Raises:
        ValueError: If a folder does not exist, was forgotten or contains no picture at the start. Later, such an error
            is logged, and the index keeps the rows.
        OSError: If the index can't be written, or there are too many folders for the operating system to follow.
        ImportError: If watchfiles is not installed.
    """
    from watchfiles import watch  # imported late because only this function needs it

    def known_folders() -> dict[Path, str]:
        """Return the folders to follow, each with its real path: recorded, or resolved when this call named them."""
        if not named_folders:
            return {Path(folder): real for folder, real in index.requested_folders().items()}
        if is_first:
            return dict(named_paths)
        rules = load_rules(index._table)
        return {folder: real for folder, real in named_paths.items() if not rules.find_forgotten_parent(str(folder))}

    def available_folders(folders: Mapping[Path, str]) -> dict[Path, tuple[int, int]]:
        return _available_folders(folders, allow_empty=bool(named_folders))

    def add(paths: Iterable[Path], only_paths: Collection[str] | None) -> IndexReport:
        report = index.add(*paths, only_paths=only_paths, on_progress=on_progress, real_paths=folders)
        index.model.prepare_images()  # loads the model now, so that the first change need not wait for it
        return report

    stop, is_first = stop or threading.Event(), True
    named_paths = {folder: os.path.realpath(folder) for folder in named_folders}
    folders = known_folders()
    if not (available_folders(folders) if named_folders else folders):
        # Raises an error that says what is wrong, unless another process is adding the first folders at the moment.
        yield add(folders, None)
        is_first = False
    while not stop.is_set():
        folders = known_folders()
        followed, waiting, only_paths = available_folders(folders), dict[str, FileState | None](), None
        if missing := [str(folder) for folder in folders if folder not in followed]:
            log_message("not_there", ", ".join(missing), level=logging.WARNING)
        while not followed and not stop.wait(POLL_INTERVAL_MS / 1000):
            folders = known_folders()
            followed = available_folders(folders)
        polling = any(map(is_network_folder, followed)) if poll is None else poll
        all_changes = watch(
            *followed, watch_filter=None, debounce=MAX_BURST_MS, step=SETTLED_MS, rust_timeout=SETTLED_MS,
            yield_on_timeout=True, stop_event=stop, force_polling=polling, poll_delay_ms=POLL_INTERVAL_MS,
            ignore_permission_denied=True,
        )  # fmt: skip
        for changes in all_changes:
            if available_folders(folders) != followed or known_folders() != folders:
                break  # for example, a disk was mounted or unmounted: follow the new set of folders
            is_full_update = (
                only_paths is None
            )  # the first update comes after the start of `watch`, so it misses nothing
            if not is_full_update:
                only_paths = pop_settled(waiting)
            if is_full_update or only_paths:
                try:
                    yield add(followed, only_paths)
                except ValueError as error:  # for example, a folder was emptied: the index keeps its rows
                    if is_first:
                        raise
                    log_message("not_followed", error, level=logging.WARNING)
                is_first, only_paths = False, only_paths or []
            for change, path in changes:
                waiting |= {affected: _file_state(affected) for affected in _affected_paths(change.name, path)}


def pop_settled(waiting: dict[str, FileState | None]) -> list[str]:
    """Remove and return the paths whose files have not changed since the previous call; update the others.

    Args:
        waiting: Path -> state of its file, None if there is no file.

    Returns:
        The settled paths.
    """
    states = {path: _file_state(path) for path in waiting}
    settled = [path for path, state in states.items() if state == waiting[path]]
    waiting |= states
    for path in settled:
        del waiting[path]
    return settled


def _affected_paths(change_type: str, path: str) -> Iterator[str]:
    """Yield the paths that a change affects, if they are pictures, or are gone and may have been pictures or folders.

    Args:
        change_type: Name of the change in watchfiles: "added", "modified" or "deleted".
        path: Changed path.
    """
    paths = [path]
    if change_type == "added" and os.path.isdir(path):
        # Files may have been created in a new folder before it was watched.
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for candidate in paths:
        is_gone = not (os.path.lexists(candidate) or os.path.basename(candidate).startswith("."))
        if is_gone or is_picture_name(candidate):
            yield candidate


def _file_state(path: str) -> FileState | None:
    """Return the state of a file, or None if it does not exist."""
    with suppress(OSError):
        return FileState.of(path)
    return None


def _available_folders(folders: Mapping[Path, str], allow_empty: bool) -> dict[Path, tuple[int, int]]:
    """Return the folders that are available, each with device and inode.

    Device and inode change if a disk is unmounted and another folder appears in its place.
    """
    available = {}
    for folder, real in folders.items():
        with suppress(OSError):
            state = os.stat(folder)
            if is_available(folder, real, allow_empty):
                available[folder] = state.st_dev, state.st_ino
    return available


def is_network_folder(folder: Path) -> bool:
    """Return whether a folder is on a network file system; always False on systems other than Linux."""
    with suppress(OSError):
        device = os.stat(folder).st_dev
        for line in MOUNTINFO_FILE.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split()
            if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                return f"{fields[fields.index('-') + 1]}.".startswith(NETWORK_FILE_SYSTEMS)
    return False


# --- Follower process of the page ------------------------------------------------------------------------------------


@contextmanager
def run_follower(*flags: str) -> Iterator[None]:
    """Run `capivara watch` in a separate process during the block.

    A process that ends earlier, for example because of an error, is started again. It ends with this process, too.

    Args:
        *flags: Flags of `capivara watch`.
    """
    # The follower has a process group of its own, because Ctrl-C is meant for the page. It stays in the session of the
    # page: Linux shares the CPU equally between sessions, whatever their nice values are, so in another session the
    # follower would delay the page by a second while it reads pictures.
    stopping, command = threading.Event(), [sys.executable, "-c", FOLLOWER_PROGRAM, "watch", *flags]

    def keep_running() -> None:
        while not stopping.is_set():
            process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
            while not stopping.wait(0.2) and process.poll() is None:
                pass
            process.stdin.close()  # asks the follower to end (`end_with_parent`)
            try:
                process.wait(SHUTDOWN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            if not stopping.is_set():
                log_message("follower_ended", process.returncode, RESTART_DELAY_S, level=logging.WARNING)
            stopping.wait(RESTART_DELAY_S)

    thread = threading.Thread(target=keep_running, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def end_with_parent() -> None:
    """Lower the priority of this process, and interrupt it as Ctrl-C does when its parent closes stdin or ends."""

    def wait() -> None:
        os.read(0, 1)  # returns when the other end of the pipe is closed
        os.kill(os.getpid(), signal.SIGINT)

    os.nice(10)
    threading.Thread(target=wait, daemon=True).start()
