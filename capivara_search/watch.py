"""Watch folders of pictures and update an index within seconds of a change.

A changed file may still be copied, so it is read only when it has settled. A file has settled when its size and
modification time are the same in two successive bursts. A burst is the list of paths that have changed within one or
two seconds. It is empty if nothing has changed.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PureWindowsPath
from threading import Event, Thread
from typing import Any

from capivara_common.files import IS_WINDOWS
from capivara_search.folder_scan import FileState, is_picture_name
from capivara_search.folders import is_folder_available, load_ignore_rules
from capivara_search.index_progress import ProgressCallback
from capivara_search.messages import log_message_from_code
from capivara_search.results import IndexReport

# watchfiles collects changes in bursts. A burst ends after this many milliseconds without a change. If the program that
# writes a file pauses for longer, the unfinished file may be read. After its next change, it is read again.
SETTLED_MS = 1000
MAX_BURST_MS = 2000  # maximum duration of a burst in milliseconds, so that updates come even if changes never stop
# Milliseconds between two scans of folders for which the operating system reports no changes, such as network folders.
POLL_INTERVAL_MS = 2000
# File systems for which Linux does not report changes that other machines make. A dot is appended to the type in
# /proc/self/mountinfo, and the result must start with one of these texts. So "nfs." matches only the type nfs, whereas
# "fuse." also matches subtypes such as fuse.sshfs.
NETWORK_FILE_SYSTEMS = ("nfs.", "nfs4.", "cifs.", "smb", "9p.", "afs.", "ceph.", "virtiofs.", "vboxsf.", "fuse.")
MOUNTINFO_FILE = Path("/proc/self/mountinfo")  # exists on Linux only
# The follower is a child process of the web page's server. It runs `capivara watch`, which updates the index. The next
# two constants are times for starting and ending it.
RESTART_DELAY_S = 30  # seconds before a follower that has ended is started again
SHUTDOWN_TIMEOUT_S = 15  # seconds for a follower to finish its batch before it is killed
# The follower, the child process that updates the index, is started with `python -c` and this code.
FOLLOWER_PROGRAM = (
    "from capivara_search import command, watch; watch.end_with_parent_and_lower_priority(); command.run()"
)


def watch_folders_and_iter_index_updates(
    index: Any, named_folders: Sequence[Path], poll: bool | None, stop: Event | None, progress: ProgressCallback | None
) -> Iterator[IndexReport]:
    """Update an index from folders, then watch the folders and index each change within seconds.

    Args:
        index: The PictureIndex to update.
        named_folders: Absolute paths of the folders. Empty: all folders that were added on this machine.
        poll: True: scan the folders every two seconds. False: wait for events of the operating system. None: scan only
            if a folder is on a network file system.
        stop: Event that ends the iteration when it is set.
        progress: Function that is called with the number of processed pictures and the total number.

    Yields:
        One report for the first update of all folders, then one report per later update.

    Raises:
        ValueError: If a folder does not exist, contains no picture, or was removed from the index by the user. After
            the first update, a warning is logged instead.
        OSError: If the index can't be written, or there are too many folders to watch.
        ImportError: If watchfiles is not installed.
    """
    from watchfiles import watch  # imported late, because only `capivara watch` needs this package

    def known_folders() -> dict[Path, str]:
        """Return the folders to watch.

        Returns:
            Dictionary `{path: real path}`. The real path of a named folder was resolved when this generator started.
            The real path of any other folder is the one that it had when the user added it.
        """
        if not named_folders:
            return {Path(folder): real for folder, real in index.requested_folders().items()}
        if is_first:
            return dict(named_paths)
        rules = load_ignore_rules(index._table)
        return {folder: real for folder, real in named_paths.items() if not rules.find_forgotten_parent(str(folder))}

    def add(paths: Iterable[Path], only_paths: Collection[str] | None) -> IndexReport:
        """Update the index from the folders `paths`. If `only_paths` is given, update only these paths inside them."""
        report = index.add(*paths, only_paths=only_paths, on_progress=progress, real_paths=folders)
        index.model.prepare_images()  # load the model now, so that the first change does not have to wait for it
        return report

    available_folders = partial(_find_available_folders_with_inodes, allow_empty=bool(named_folders))
    stop, is_first = stop or Event(), True
    named_paths = {folder: os.path.realpath(folder) for folder in named_folders}
    folders = known_folders()
    if not (available_folders(folders) if named_folders else folders):
        # No folder is available, so this update is meant to raise an error that says why. The update succeeds only if
        # another process adds the first folders at this moment.
        yield add(folders, None)
        is_first = False
    while not stop.is_set():
        folders = known_folders()
        followed, waiting, only_paths = available_folders(folders), dict[str, FileState | None](), None
        if missing := [str(folder) for folder in folders if folder not in followed]:
            log_message_from_code("not_there", ", ".join(missing), level=logging.WARNING)
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
                # The set of folders has changed, for example because a disk was mounted. The outer loop then watches
                # the new set and updates all of its folders again.
                break
            # The first pass of this loop updates all folders (`only_paths` is None). `watch` has already started then,
            # so that no change is missed. Later passes update only the paths that have settled.
            if only_paths is not None:
                only_paths = _pop_settled_paths_and_update_states(waiting)
            if only_paths is None or only_paths:
                try:
                    yield add(followed, only_paths)
                except ValueError as error:
                    # The update was refused, for example because a folder was emptied. The index keeps its rows. The
                    # first update raises the error. A later update only logs it, and watching continues.
                    if is_first:
                        raise
                    log_message_from_code("not_followed", error, level=logging.WARNING)
                is_first, only_paths = False, only_paths or []
            for change, path in changes:
                waiting |= {affected: _file_state(affected) for affected in _affected_paths(change.name, path)}


def _pop_settled_paths_and_update_states(waiting: dict[str, FileState | None]) -> list[str]:
    """Remove the paths whose files have not changed since the previous call, and return them.

    Args:
        waiting: Dictionary `{path: state of the file in the previous call, or None if there was no file}`. It is
            changed in place: settled paths are removed, and the states of the remaining paths are updated.

    Returns:
        The settled paths, which were removed from `waiting`.
    """
    states = {path: _file_state(path) for path in waiting}
    settled = [path for path, state in states.items() if state == waiting[path]]
    waiting |= states
    for path in settled:
        del waiting[path]
    return settled


def _affected_paths(change_type: str, path: str) -> Iterator[str]:
    """Yield the paths that must be updated in the index after a change of a file or folder.

    Args:
        change_type: Type of the change as watchfiles names it: "added", "modified" or "deleted".
        path: Path of the changed file or folder.

    Yields:
        The path if it has the suffix of a picture, or if it no longer exists, because it was possibly a folder of
        pictures. If the path is a new folder, the paths of the pictures inside this folder.
    """
    paths = [path]
    if change_type == "added" and os.path.isdir(path):
        # Files may have been created in a new folder before watchfiles started to watch it.
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for candidate in paths:
        is_gone = not (os.path.lexists(candidate) or os.path.basename(candidate).startswith("."))
        if is_gone or is_picture_name(candidate):
            yield candidate


def _file_state(path: str) -> FileState | None:
    """Return the current state of a file (size and modification time), or None if the file can't be accessed."""
    with suppress(OSError):
        return FileState.of(path)
    return None


def _find_available_folders_with_inodes(folders: Mapping[Path, str], allow_empty: bool) -> dict[Path, tuple[int, int]]:
    """Return the folders that exist, can be read and still have their recorded real path.

    Args:
        folders: Dictionary `{path of the folder: its recorded real path}`.
        allow_empty: Whether an empty folder counts as available.

    Returns:
        Dictionary `{path of an available folder: (device, inode)}`. If a disk is mounted or unmounted at this path, the
        device and inode change, so the caller can notice the change.
    """
    available = {}
    for folder, real in folders.items():
        with suppress(OSError):
            state = os.stat(folder)
            if is_folder_available(folder, real, allow_empty):
                available[folder] = state.st_dev, state.st_ino
    return available


def is_network_folder(folder: Path) -> bool:
    """Return whether a folder is on a network file system, for which the operating system reports no changes.

    On Linux, these are the file systems in `NETWORK_FILE_SYSTEMS`. On Windows, only UNC paths are recognized, which
    begin with two backslashes. On macOS, the answer is always False.

    Args:
        folder: Path of the folder.
    """
    if IS_WINDOWS and PureWindowsPath(folder).drive.startswith("\\\\"):
        return True
    with suppress(OSError):
        device = os.stat(folder).st_dev
        for line in MOUNTINFO_FILE.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split()
            if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                return f"{fields[fields.index('-') + 1]}.".startswith(NETWORK_FILE_SYSTEMS)
    return False


# --- Follower process of the web page --------------------------------------------------------------------------------


@contextmanager
def keep_watch_subprocess_running(*flags: str) -> Iterator[None]:
    """Update an index in the background: run `capivara watch` in a child process during the `with` block.

    If the child process ends early, it is started again after `RESTART_DELAY_S` seconds. If this process ends, the
    child process ends, too.

    Args:
        *flags: Command-line flags of `capivara watch`.
    """
    # The child process has its own process group, so that Ctrl-C in the terminal reaches only the web page's server. It
    # stays in the server's session, because Linux ignores nice values between sessions: in another session, it would
    # delay the server by a second while it reads pictures. Windows ignores `process_group` and has a flag instead.
    options = {"process_group": 0, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    stopping, command = Event(), [sys.executable, "-c", FOLLOWER_PROGRAM, "watch", *flags]

    def keep_running() -> None:
        """Start the child process `capivara watch`, and start it again whenever it ends, until `stopping` is set."""
        while not stopping.is_set():
            process = subprocess.Popen(command, stdin=subprocess.PIPE, **options)
            while not stopping.wait(0.2) and process.poll() is None:
                pass
            try:
                # This call closes the standard input of the child process, which then ends, and waits for the end.
                process.communicate(timeout=SHUTDOWN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            if not stopping.is_set():
                log_message_from_code("follower_ended", process.returncode, RESTART_DELAY_S, level=logging.WARNING)
            stopping.wait(RESTART_DELAY_S)

    thread = Thread(target=keep_running, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def end_with_parent_and_lower_priority() -> None:
    """Make this process end together with its parent process, and lower its CPU priority (not on Windows).

    When the parent closes the standard input of this process, or ends, this process receives SIGINT, as by Ctrl-C.
    """

    def wait() -> None:
        """Wait until the parent process closes the standard input or ends, then send SIGINT to this process."""
        os.read(0, 1)  # blocks until the parent closes its end of the pipe or ends; the parent never writes
        if IS_WINDOWS:  # on Windows, `os.kill` would end the process without cleaning up
            signal.raise_signal(signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    if hasattr(os, "nice"):
        os.nice(10)
    Thread(target=wait, daemon=True).start()
