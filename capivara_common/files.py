"""Write files and folders so that a crash never leaves incomplete output, and refuse links that leave a dataset folder.

To write atomically, a process writes a temporary file or folder, and renames it when it is complete. `AllowedFolders`
refuses paths and links that lead out of the folder of a dataset.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path, PureWindowsPath
from typing import Any

from filelock import lock_descriptor

from capivara_common.cli import make_coded_error

RUN_MARKER = ".capivara-run"  # name of a file that marks the folder of an unfinished training run
# Length of a SHA-256 digest in hexadecimal. CPUs have instructions for SHA-256, so it is faster than BLAKE2.
DIGEST_HEX_LENGTH = 64
IS_WINDOWS = os.name == "nt"
CAN_OPEN_FOLDERS = hasattr(os, "O_DIRECTORY")  # False on Windows, where `os.open` refuses folders
# Windows reads these names as devices in every folder, even with a suffix, such as NUL.jpg.
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"
}
# Permission bits that new files don't get. A process can read its umask only by setting it to another value, so the old
# value is restored at once.
UMASK = os.umask(0)
os.umask(UMASK)


def write_text(path: Path, text: str) -> None:
    """Write text to a file as UTF-8, and replace the file if it exists.

    The write is atomic: other processes see either the complete old content or the complete new content.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes to a file atomically, and replace the file if it exists.

    Other processes see either the complete old content or the complete new content, even if this process crashes.
    """
    with atomic_file(path) as new:
        new.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON to a file atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, **fields: type) -> Any:
    """Parse a JSON file, and check that it has the required fields.

    Args:
        path: The JSON file.
        **fields: Exact type of each required field. For example, `splits=list` requires a JSON object with a field
            "splits" whose value is a list. Without fields, any JSON value is accepted.

    Returns:
        The parsed JSON value.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file is not JSON, or a required field is missing or has another type.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if fields and not isinstance(data, dict):
        raise ValueError(f"{path} must contain a JSON object with {', '.join(fields)}, got a {type(data).__name__}.")
    for name, kind in fields.items():
        if type(data.get(name)) is not kind:
            raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got {str(data.get(name))[:80]!r}.")
    return data


def json_digest(value: Any, sort_keys: bool = False) -> str:
    """Return a hex digest (BLAKE2b-128) of a JSON value, for example to use settings as the key of a cache.

    Args:
        value: Any value that `json.dumps` accepts.
        sort_keys: Whether to sort dict keys first, so that their order does not change the digest.
    """
    return hashlib.blake2b(json.dumps(value, sort_keys=sort_keys).encode(), digest_size=16).hexdigest()


def append_digest(path: Path) -> None:
    """Append the SHA-256 digest of a file's content to the file, so that damage can be detected later.

    `matches_appended_digest` compares the content with the digest.
    """
    with path.open("r+b") as file:
        file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())


def matches_appended_digest(path: Path) -> bool:
    """Return whether a file is undamaged, that is, its content matches the digest that `append_digest` appended.

    False if the file is missing, can't be read or has no digest. The whole file is read.
    """
    with suppress(OSError, ValueError), path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        return data[-DIGEST_HEX_LENGTH:] == hashlib.sha256(memoryview(data)[:-DIGEST_HEX_LENGTH]).hexdigest().encode()
    return False


def read_appended_digest(path: Path) -> str:
    """Return the hex digest that `append_digest` wrote at the end of a file, without checking the file for damage."""
    with path.open("rb") as file:
        file.seek(-DIGEST_HEX_LENGTH, os.SEEK_END)
        return file.read().decode("ascii")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: the `with` block writes a temporary file, which is then renamed to `path`.

    If the `with` block raises an exception, the temporary file is removed, and an existing file stays unchanged.

    Args:
        path: Final path of the file. Missing parent folders are created.

    Yields:
        Path of the temporary file, which the `with` block must create.

    Raises:
        OSError: If writing fails. If the disk is full, the message says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _cleanup_on_error(path, lambda: new.unlink(missing_ok=True)):
        yield new
        new.replace(path)


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder atomically: the `with` block fills a temporary folder, which is then renamed to `path`.

    If the `with` block raises an exception, the temporary folder is removed.

    Args:
        path: Final path of the folder.
        overwrite: True: a folder that exists at `path` is replaced. False: such a folder must be empty.

    Yields:
        Path of the temporary folder, which exists and is empty.

    Raises:
        ValueError: If `path` is not empty (unless `overwrite` is True), is a file or mount point, or can't be written
            to.
        OSError: If writing fails. If the disk is full, the message says so.
    """
    path = path.resolve()  # if `path` is a link, replace the folder that it points to
    check_output_folder_and_clean_leftovers(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp-"))
    with _locked(new, new), _cleanup_on_error(path, lambda: shutil.rmtree(new, ignore_errors=True)):
        yield new
        _move_folder_into_place(new, path, overwrite)


@contextmanager
def _locked(folder: Path, leftover: Path) -> Iterator[None]:
    """Lock a folder for the `with` block, so that other processes don't mistake it for a killed process's leftover.

    `remove_or_restore_leftovers` leaves locked folders alone.

    Args:
        folder: The folder. It stays locked if the block renames it.
        leftover: Path under which other processes may find the folder. On Windows, this path is locked instead of the
            folder itself (see `acquire_folder_lock`).
    """
    with ExitStack() as stack:
        with suppress(OSError):  # some file systems have no locks; go on without one
            stack.callback(os.close, acquire_folder_lock(folder if CAN_OPEN_FOLDERS else leftover))
        yield


@contextmanager
def _cleanup_on_error(path: Path, remove: Callable[[], object]) -> Iterator[None]:
    """Remove the incomplete output if the `with` block fails.

    Args:
        path: Output that the block writes, for the error message.
        remove: Function that removes the incomplete output.

    Raises:
        OSError: If the block failed because the disk is full; the message says so. Any other exception of the block is
            raised unchanged.
    """
    try:
        yield
    except BaseException as error:
        remove()
        if is_disk_full(error):
            raise OSError(
                errno.ENOSPC, f"No space left on the disk while writing {path}; no output was kept. Free some space."
            ) from error
        raise


def _move_folder_into_place(new: Path, path: Path, overwrite: bool) -> None:
    """Rename the folder `new` to `path`, and remove the folder that was there.

    The old folder is renamed first and removed last, so at any moment the old or the new folder is complete on the
    disk. If the process is killed in between, `remove_or_restore_leftovers` renames the old folder back. Files and
    folders get the default permissions, because safetensors creates files that only their owner can read.

    Args:
        new: The complete new folder.
        path: Final path of the folder.
        overwrite: Whether a folder that exists at `path` is replaced.
    """
    for entry in [new, *new.rglob("*")]:
        if not entry.is_symlink():
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~UMASK)
    # Windows can't rename a folder to the name of a folder that exists, so an empty folder at `path` is removed first.
    if not CAN_OPEN_FOLDERS:
        with suppress(OSError):
            path.rmdir()
    if not (overwrite and path.exists()):
        new.rename(path)  # fails if another process has written files to `path` in the meantime
        return
    old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
    with _locked(path, old):
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        with suppress(OSError):
            _remove_leftover_folder(old)


def _remove_leftover_folder(folder: Path) -> None:
    """Remove a replaced or unfinished folder that lies next to an output folder.

    The folder is first renamed: ".old-" or ".tmp-" in its name becomes ".tmp-". If the process is killed before all
    files are deleted, `remove_or_restore_leftovers` then does not mistake the remaining files for a complete folder.
    """
    doomed = folder.with_name(f"{folder.name[: -len('old-01234567')]}tmp-{folder.name[-8:]}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def get_partial_folder_path(path: Path) -> Path:
    """Return the path of the folder to which a training run writes until it is finished: `path` plus ".partial".

    Args:
        path: Output folder of the run. When the run is finished, `rename_partial_folder` moves the files there.
    """
    path = path.resolve()
    return path.with_name(path.name + ".partial")


def list_seed_run_folders(folder: Path) -> list[Path]:
    """List the output folders of a training that was repeated with several random seeds, one folder per seed.

    Args:
        folder: Output folder of the finished training.

    Returns:
        Folders of the runs (`seed-0`, `seed-1`, …), sorted by name. Empty if the training had a single seed.

    Raises:
        ValueError: If the training is unfinished.
    """
    if folder.name.endswith(".partial") and (folder / RUN_MARKER).is_file():
        raise ValueError(f"{folder} is an unfinished run. Resume it with --resume auto, or use a finished run.")
    return sorted(p for p in folder.glob("seed-*/") if p.name[5:].isdecimal())


def rename_partial_folder(path: Path, overwrite: bool = False) -> None:
    """Move the files of a finished training run to its output folder, by renaming the folder that contains them.

    Args:
        path: Output folder of the run. The files are in the folder with the additional suffix ".partial".
        overwrite: True: a folder that exists at `path` is replaced. False: such a folder must be empty.

    Raises:
        ValueError: If `path` is a mount point or a file, can't be written to, or may not be replaced.
    """
    path, partial = path.resolve(), get_partial_folder_path(path)
    check_output_folder_and_clean_leftovers(path, overwrite)
    for leftover in partial.rglob(".*.tmp"):
        leftover.unlink()  # temporary file of a process that was killed
    _move_folder_into_place(partial, path, overwrite)


def check_output_folder_and_clean_leftovers(path: Path, overwrite: bool | None = None) -> None:
    """Check that a command can write its output folder, so that it fails at its start instead of after hours of work.

    Leftovers of killed processes are cleaned up first (see `remove_or_restore_leftovers`).

    Args:
        path: The output folder.
        overwrite: True: a folder that is not empty may be replaced. False: it is an error, and the message suggests
            `--overwrite_output_dir`. None: the same error without the suggestion.

    Raises:
        ValueError: If `path` is a mount point or a file, can't be written to, or may not be replaced.
    """
    path = path.resolve()
    remove_or_restore_leftovers(path)
    fault = None
    if os.path.ismount(path):  # Python 3.11 lacks `Path.is_mount` on Windows
        fault = "is a mount point and can't be replaced. Choose a folder inside it"
    elif path.is_dir() and any(path.iterdir()) and not overwrite:
        hint = "" if overwrite is None else ", or replace it with --overwrite_output_dir"
        fault = f"is not empty. Choose another one{hint}"
    elif path.exists() and not path.is_dir():
        fault = "is a file. Choose another name"
    if fault:
        raise ValueError(f"The output folder {path} {fault}.")
    _check_writable(path, "folder")


def check_inputs_outside(output: Path, *inputs: str | Path | None) -> None:
    """Check that no input of a command lies in its output folder, because replacing the folder would delete the input.

    Args:
        output: Output folder of the command.
        *inputs: Files and folders that the command reads. Hub ids and None are not checked.

    Raises:
        ValueError: If an input or the current folder lies in `output`.
    """
    for name in (*inputs, Path.cwd()):  # an input that is a Hub id does not exist as a path, so it passes
        if name is not None and Path(name).exists() and Path(name).resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"The output folder {output} contains {name}, which would be deleted. Choose another output folder."
            )


def remove_or_restore_leftovers(path: Path) -> None:
    """Clean up the hidden folders that killed processes have left next to an output folder.

    - An incomplete new folder is removed.
    - An old output folder that was being replaced is renamed back if the output folder is missing or empty. Otherwise
      it is removed.

    Folders that a running process uses are not changed.

    Args:
        path: The output folder. It need not exist.
    """
    path = path.resolve()
    name = re.compile(rf"\.{re.escape(path.name)}\.(old|tmp)-\w{{8}}")
    # The sorted order restores an old folder (".old-") before it removes incomplete new folders (".tmp-").
    for leftover in sorted(path.parent.glob(".*")):
        if not (match := name.fullmatch(leftover.name)):
            continue
        # Ignore OSError: the folder is locked, the file system has no locks, or another process has removed the folder.
        with suppress(OSError), ExitStack() as stack:
            stack.callback(os.close, acquire_folder_lock(leftover))
            if match[1] == "old" and not (path.exists() and any(path.iterdir())):
                leftover.rename(path)  # the process was killed between the two renames of `_move_folder_into_place`
            else:
                _remove_leftover_folder(leftover)


def check_output_file(path: Path) -> None:
    """Check that a command can write its output file, so that it fails at its start instead of after hours of work.

    Args:
        path: The output file. It may exist; it is not changed by the check.

    Raises:
        ValueError: If `path` is a folder, or no file can be created there.
    """
    path = path.absolute()
    if path.is_dir():
        text = "The output file {path} is a folder. Give a file name, such as {path}/result.json."
        raise make_coded_error(ValueError, "output_is_folder", text, path=path)
    _check_writable(path, "file")


def _check_writable(path: Path, kind: str) -> None:
    """Check that a file or folder can be created at `path`, by writing a temporary file to the nearest existing folder.

    Looking at permissions would not be enough: for example, the disk may be read-only.

    Args:
        path: Path of the output.
        kind: "file" or "folder", for the error message.

    Raises:
        ValueError: If the output can't be written.
    """
    existing = next(parent for parent in path.parents if parent.exists() or parent.is_symlink())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        fault = f"can't be written to ({error.strerror})" if existing.is_dir() else "is not a folder"
        text = "The output {what} {path} can't be written: {place} {fault}. Choose another place."
        raise make_coded_error(
            ValueError, "no_output", text, what=kind, path=path, place=existing, fault=fault
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception was raised because the disk is full.

    The exception is recognized by its error number. An exception of safetensors has no error number, so it is
    recognized by its message.
    """
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def acquire_folder_lock(folder: Path, wait: bool = False) -> int:
    """Lock a folder, so that only one process at a time works in it.

    Args:
        folder: The folder to lock. It must exist, except on Windows.
        wait: True: wait while another process holds the lock. False: raise an error.

    Returns:
        The locked file descriptor. The lock is released when the descriptor is closed or the process ends.

    Raises:
        BlockingIOError: If another process holds the lock, and `wait` is False.
        OSError: If the folder can't be opened, or the file system does not support locks.
    """
    # Windows can't open folders, so a file in the folder for temporary files is locked. It is never removed: otherwise
    # another process could lock a new file of the same name while this process holds the lock.
    if CAN_OPEN_FOLDERS:
        lock = os.open(folder, os.O_RDONLY)
    else:
        name = os.path.normcase(os.path.realpath(folder)).encode()
        lock_file = Path(tempfile.gettempdir(), f"capivara-{hashlib.sha256(name).hexdigest()}.lock")
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT)
    with ExitStack() as stack:
        stack.callback(os.close, lock)
        if not lock_descriptor(lock, blocking=wait):
            raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(folder))
        stack.pop_all()
    return lock


@contextmanager
def locked_folder(folder: Path, wait: bool = False) -> Iterator[None]:
    """Lock a folder during a `with` block, so that only one process at a time works in it.

    If the folder can't be created or locked, for example because the file system has no locks, the block runs without a
    lock.

    Args:
        folder: The folder to lock. It is created if it does not exist.
        wait: True: wait while another process holds the lock. False: raise an error.

    Raises:
        BlockingIOError: If another process holds the lock, and `wait` is False.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, acquire_folder_lock(folder, wait))
        except BlockingIOError:
            raise
        except OSError:  # for example, the file system has no locks
            pass
        yield


class AllowedFolders:
    """Folders from which the files of a dataset may be read; paths that lead elsewhere are refused.

    A path or link in an untrusted dataset could lead to private files of the user. A path is accepted if it lies in one
    of the folders after all links are resolved.

    Args:
        folder: Folder of the dataset. Its path may contain links.
        extra_folders: Further folders from which files may be read.
    """

    def __init__(self, folder: Path, extra_folders: Sequence[Path] = ()):
        self.folder = folder
        self.folders = [Path(os.path.realpath(allowed)) for allowed in (folder, *extra_folders)]
        # The files of a dataset in the Hub's cache are links to the folder `blobs` of its repository.
        for parent in (self.folders[0], *self.folders[0].parents):
            if parent.name == "snapshots" and parent.parent.name.startswith(("datasets--", "models--")):
                self.folders.append(parent.parent / "blobs")

    def contains(self, path: Path) -> bool:
        """Return whether a path lies in one of the allowed folders after all links in the path are resolved."""
        if IS_WINDOWS and find_windows_path_fault(path, self.folders):
            return False
        try:
            real = Path(os.path.realpath(path))
        except ValueError:  # for example, the path has a NUL character; opening the file later raises a clearer error
            return True
        return any(real.is_relative_to(allowed) for allowed in self.folders)

    def check(self, paths: Sequence[Path]) -> None:
        """Check that all paths lie in the allowed folders after all links are resolved.

        Raises:
            ValueError: If a path leads out of the allowed folders. The message lists up to three such paths.
        """
        if outside := [os.path.relpath(path, self.folder) for path in paths if not self.contains(path)]:
            raise ValueError(
                f"{self.folder} contains links to files outside of it: {outside[:3]}. Copy the files into the folder."
            )


def find_windows_path_fault(path: str | Path, folders: Sequence[str | Path] | None = None) -> str | None:
    """Check whether an untrusted path can be opened safely on Windows, and return the reason if it can't.

    Unsafe are reserved names such as NUL, names that Windows changes, and network shares or device paths other than
    those of `folders`.

    Args:
        path: Path of the file. Only its text is checked.
        folders: Folders that may be read. None: all drives, network shares and device paths are accepted.

    Returns:
        The reason as the end of a sentence, such as "has the reserved name 'NUL'". None if the path is safe.
    """
    # Only the text is checked: just looking up a network path sends the user's credentials to the server.
    drive, drives = _windows_drive(path), set(map(_windows_drive, folders or ()))
    if folders is not None and drive.startswith("\\") and drive not in drives:
        return "lies on another network share, or is a device"
    windows_path = PureWindowsPath(path)
    for part in windows_path.parts[bool(windows_path.anchor) :]:
        if part.split(".")[0].rstrip(" ").upper() in WINDOWS_DEVICES:
            return f"has the reserved name {part!r}"
        # Windows removes dots and blanks at the end of a name, except in the name "..".
        if ":" in part or (part != ".." and part.endswith((".", " "))):
            return f"has a name that Windows changes or reads as a stream: {part!r}"
    return None


def _windows_drive(path: str | Path) -> str:
    r"""Return the drive or network share of a Windows path in lowercase, without the prefix `\\?\` or `\\?\UNC\`."""
    drive = PureWindowsPath(path).drive.casefold()
    return drive.replace("\\\\?\\unc\\", "\\\\").removeprefix("\\\\?\\")


def check_folder_for_outside_links_and_pipes(folder: Path) -> None:
    """Check that a folder and its subfolders have no pipes, and no links that lead out of the folder.

    A link could lead to private files, and opening a pipe would wait forever.

    Raises:
        ValueError: If a link leads out of the folder, or the folder contains a pipe, a socket or a device.
    """
    links = []
    for path in (Path(root, name) for root, *both in os.walk(folder) for names in both for name in names):
        if path.is_symlink():
            links.append(path)
        elif not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path} is not a regular file and can't be read. Remove it.")
    AllowedFolders(folder).check(links)
