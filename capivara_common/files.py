"""Write files and folders atomically, clean up after killed processes, and confine links to allowed folders."""

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

RUN_MARKER = ".capivara-run"  # name of a file that marks the folder of an unfinished run
DIGEST_HEX_LENGTH = 64  # SHA-256 in hexadecimal; CPUs have instructions for it, so it is faster than BLAKE2
IS_WINDOWS = os.name == "nt"
CAN_OPEN_FOLDERS = hasattr(os, "O_DIRECTORY")  # False on Windows, where `os.open` refuses folders
# Names that are devices in every folder of Windows, also with any suffix, such as NUL.jpg.
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"
}
UMASK = os.umask(0)  # a process can only read its umask by setting it
os.umask(UMASK)


def write_text(path: Path, text: str) -> None:
    """Write text to a file as UTF-8, atomically (see `write_bytes`)."""
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
    """Return the content of a JSON file, after checking its fields.

    Args:
        path: The file.
        **fields: Name and exact type of each field that the JSON object must have, such as `splits=list`. Without
            fields, any JSON value is accepted.

    Returns:
        The parsed JSON value.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file is not JSON. If fields are given: also if the value is not an object, or a field is
            missing or of another type.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if fields and not isinstance(data, dict):
        raise ValueError(f"{path} must contain an object with {', '.join(fields)}, got a {type(data).__name__}.")
    for name, kind in fields.items():
        if type(data.get(name)) is not kind:
            raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got {str(data.get(name))[:80]!r}.")
    return data


def json_digest(value: Any, sort_keys: bool = False) -> str:
    """Return the BLAKE2b-128 hex digest of the JSON text of a value.

    Args:
        value: Any value that `json.dumps` accepts.
        sort_keys: Whether to sort dict keys first, so that their order does not change the digest.
    """
    return hashlib.blake2b(json.dumps(value, sort_keys=sort_keys).encode(), digest_size=16).hexdigest()


def append_digest(path: Path) -> None:
    """Append to a file the SHA-256 digest of its content, so that `matches_appended_digest` can detect damage."""
    with path.open("r+b") as file:
        file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())


def matches_appended_digest(path: Path) -> bool:
    """Return whether a file exists and is unchanged since `append_digest` was called. The whole file is read."""
    with suppress(OSError, ValueError), path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        return data[-DIGEST_HEX_LENGTH:] == hashlib.sha256(memoryview(data)[:-DIGEST_HEX_LENGTH]).hexdigest().encode()
    return False


def read_appended_digest(path: Path) -> str:
    """Return the hex digest that `append_digest` wrote at the end of a file, without checking the file against it."""
    with path.open("rb") as file:
        file.seek(-DIGEST_HEX_LENGTH, os.SEEK_END)
        return file.read().decode("ascii")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically through a temporary file next to `path`.

    When the block ends, the temporary file is renamed to `path`. If the block fails, the temporary file is removed.

    Args:
        path: Final path of the file. Missing parent folders are created.

    Yields:
        Path of the temporary file, which the block must create.

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
    """Yield a temporary folder that is renamed to `path` when the block ends, and removed if the block fails.

    Args:
        path: Final path of the folder.
        overwrite: Whether a folder that exists at `path` may be replaced. It stays until the new folder is complete.

    Yields:
        The temporary folder, next to `path`.

    Raises:
        ValueError: If `path` is a file, or a folder that is not empty and `overwrite` is not set.
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
    """Lock a folder for the `with` block, so that other processes don't mistake it for the rest of a killed process.

    `remove_or_restore_leftovers` leaves locked folders alone.

    Args:
        folder: The folder. It stays locked if the block renames it.
        leftover: Path under which other processes may find the folder. On Windows, this path is locked instead of the
            folder itself (see `acquire_folder_lock`).
    """
    with ExitStack() as stack:
        with suppress(OSError):  # some file systems have no locks
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
    if not CAN_OPEN_FOLDERS:  # Windows does not rename a folder to the name of an empty one
        with suppress(OSError):
            path.rmdir()
    if not (overwrite and path.exists()):
        new.rename(path)  # fails if another process has filled the folder in the meantime
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
    """Return the folder for the files of an unfinished run: the output folder `path` with the suffix ".partial"."""
    path = path.resolve()
    return path.with_name(path.name + ".partial")


def list_seed_run_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs `seed-0`, `seed-1`, … of a finished training with several seeds.

    Args:
        folder: Output folder of the training.

    Returns:
        Folders of the runs, sorted by name; empty if the training had a single seed.

    Raises:
        ValueError: If the training is unfinished.
    """
    if folder.name.endswith(".partial") and (folder / RUN_MARKER).is_file():
        raise ValueError(f"{folder} is an unfinished run. Resume it with --resume auto, or give a finished run.")
    return sorted(p for p in folder.glob("seed-*/") if p.name[5:].isdecimal())


def rename_partial_folder(path: Path, overwrite: bool = False) -> None:
    """Rename the folder of a finished run from `get_partial_folder_path(path)` to its final path `path`.

    Args:
        path: Output folder of the run.
        overwrite: Whether a folder that exists at `path` and is not empty may be replaced.

    Raises:
        ValueError: If `path` can't be written (see `check_output_folder_and_clean_leftovers`).
    """
    path, partial = path.resolve(), get_partial_folder_path(path)
    check_output_folder_and_clean_leftovers(path, overwrite)
    for leftover in partial.rglob(".*.tmp"):
        leftover.unlink()  # its writer was killed
    _move_folder_into_place(partial, path, overwrite)


def check_output_folder_and_clean_leftovers(path: Path, overwrite: bool | None = None) -> None:
    """Check that an output folder can be written.

    Folders that killed processes left next to it are first cleaned up (see `remove_or_restore_leftovers`).

    Args:
        path: The output folder.
        overwrite: Whether a folder that exists and is not empty may be replaced. None means False; the error message
            then does not suggest `--overwrite_output_dir`, because the command has no such flag.

    Raises:
        ValueError: If `path` is a mount point or a file, can't be written to, or is a folder that may not be replaced.
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
    """Check that replacing an output folder would not delete inputs.

    Args:
        output: Output folder of a command.
        *inputs: Paths that the command reads. Hub ids and None are allowed.

    Raises:
        ValueError: If an input or the current folder lies in `output`.
    """
    for name in (*inputs, Path.cwd()):  # a Hub id does not exist as a path
        if name is not None and Path(name).exists() and Path(name).resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"The output folder {output} contains {name}, which would be deleted. Choose another output folder."
            )


def remove_or_restore_leftovers(path: Path) -> None:
    """Clean up the hidden folders that killed processes left next to the output folder `path`.

    Unfinished new folders are removed. If a process was killed while it replaced `path`, the old folder is renamed
    back. Folders that a running process uses are locked and stay. On a file system without locks, all folders stay.
    """
    path = path.resolve()
    name = re.compile(rf"\.{re.escape(path.name)}\.(old|tmp)-\w{{8}}")
    for leftover in sorted(path.parent.glob(".*")):  # sorted: ".old-" comes before ".tmp-"
        if not (match := name.fullmatch(leftover.name)):
            continue
        # OSError: the folder is locked, or another process has removed it in the meantime.
        with suppress(OSError), ExitStack() as stack:
            stack.callback(os.close, acquire_folder_lock(leftover))
            if match[1] == "old" and not (path.exists() and any(path.iterdir())):
                leftover.rename(path)  # the process was killed between the two renames of `_move_folder_into_place`
            else:
                _remove_leftover_folder(leftover)


def check_output_file(path: Path) -> None:
    """Raise ValueError if no file can be written at `path`. A file that exists may be replaced."""
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
    """Return whether an error means that the disk is full, by its errno or, for errors of safetensors, its message."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def acquire_folder_lock(folder: Path, wait: bool = False) -> int:
    """Lock a folder, so that only one process at a time works in it.

    The folder itself is opened and locked, so no lock file is needed. Windows can't open folders. There, an empty file
    in the system's folder for temporary files is locked instead. Its name is a hash of the folder's path. This lock
    file is never removed: otherwise one process could lock the removed file while another process locks a new file of
    the same name.

    Args:
        folder: The folder.
        wait: Whether to wait while another process holds the lock.

    Returns:
        The locked file descriptor. The lock is released when the descriptor is closed or the process ends.

    Raises:
        BlockingIOError: If another process holds the lock, and `wait` is not set.
        OSError: If the folder can't be opened, or the file system does not support locks.
    """
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
    """Lock a folder for the `with` block. On a file system without locks, the block runs without a lock.

    Args:
        folder: The folder.
        wait: Whether to wait if another process holds the lock.

    Raises:
        BlockingIOError: If another process holds the lock, and `wait` is not set.
    """
    with ExitStack() as stack:
        try:
            stack.callback(os.close, acquire_folder_lock(folder, wait))
        except BlockingIOError:
            raise
        except OSError:  # some file systems have no locks
            pass
        yield


class AllowedFolders:
    """Folders in which the files of a dataset may lie.

    The rows and links of an untrusted dataset could otherwise lead to private files of the user. A path is accepted if
    it lies in one of these folders after all links are resolved. A snapshot in the Hub's cache consists of links to the
    `blobs` folder of its repository, so the `blobs` folder is allowed, too.

    Args:
        folder: Folder of the dataset. Its path may contain links.
        extra_folders: Further folders in which files may lie.
    """

    def __init__(self, folder: Path, extra_folders: Sequence[Path] = ()):
        self.folder = folder
        self.folders = [Path(os.path.realpath(allowed)) for allowed in (folder, *extra_folders)]
        for parent in (self.folders[0], *self.folders[0].parents):
            if parent.name == "snapshots" and parent.parent.name.startswith(("datasets--", "models--")):
                self.folders.append(parent.parent / "blobs")

    def contains(self, path: Path) -> bool:
        """Return whether a path lies in an allowed folder after all links are resolved."""
        if IS_WINDOWS and find_windows_path_fault(path, self.folders):
            return False
        try:
            real = Path(os.path.realpath(path))
        except ValueError:  # for example a NUL character; opening the file raises a better error
            return True
        return any(real.is_relative_to(allowed) for allowed in self.folders)

    def check(self, paths: Sequence[Path]) -> None:
        """Raise ValueError if a path leads out of the allowed folders."""
        if outside := [os.path.relpath(path, self.folder) for path in paths if not self.contains(path)]:
            raise ValueError(
                f"{self.folder} contains links to files outside of it: {outside[:3]}. Copy the files into the folder."
            )


def find_windows_path_fault(path: str | Path, folders: Sequence[str | Path] | None = None) -> str | None:
    r"""Return why a path must not be opened or looked up on Windows, or None if it is safe.

    Only the text of the path is checked, because looking up a network path is already dangerous: Windows sends the
    user's credentials to the server. Some names, such as NUL, are devices in every folder.

    Args:
        path: Path of the file.
        folders: Folders that may be read. A network path (`\\server\share`) or a path of a device (`\\.\`) is accepted
            only if one of the folders is on the same share or device. The prefix `\\?\`, which lifts the length limit
            of paths, is ignored. None: all drives, network shares and devices are accepted.

    Returns:
        The reason as the end of a sentence, such as "has the reserved name 'NUL'"; None if the path is safe.
    """
    drive, drives = _windows_drive(path), set(map(_windows_drive, folders or ()))
    if folders is not None and drive.startswith("\\") and drive not in drives:
        return "lies on another network share, or is a device"
    windows_path = PureWindowsPath(path)
    for part in windows_path.parts[bool(windows_path.anchor) :]:
        if part.split(".")[0].rstrip(" ").upper() in WINDOWS_DEVICES:
            return f"has the reserved name {part!r}"
        # ".." is the only name that Windows keeps although it ends with a dot.
        if ":" in part or (part != ".." and part.endswith((".", " "))):
            return f"has a name that Windows changes or reads as a stream: {part!r}"
    return None


def _windows_drive(path: str | Path) -> str:
    r"""Return the drive or network share of a Windows path in lowercase, without the prefix `\\?\` or `\\?\UNC\`."""
    drive = PureWindowsPath(path).drive.casefold()
    return drive.replace("\\\\?\\unc\\", "\\\\").removeprefix("\\\\?\\")


def check_folder_for_outside_links_and_pipes(folder: Path) -> None:
    """Raise ValueError if a folder contains a link that leads out of it, or a pipe or device, at any depth.

    Called before a library reads the whole folder, because opening a pipe would wait forever.
    """
    links = []
    for path in (Path(root, name) for root, *both in os.walk(folder) for names in both for name in names):
        if path.is_symlink():
            links.append(path)
        elif not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path} is not a regular file and can't be read. Remove it.")
    AllowedFolders(folder).check(links)
