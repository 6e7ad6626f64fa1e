"""Files and folders that are written whole or not at all, what killed processes left of them; links that lead out."""

import errno
import fcntl
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
from pathlib import Path
from typing import Any

from capivara_common.cli import coded_error

RUN_MARKER = ".capivara-run"  # in the folder of an unfinished run
DIGEST_HEX_LENGTH = 64  # of SHA-256 in hexadecimal, which processors compute faster than BLAKE2
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one piece, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one piece: a reader, or a crash, sees the old file or the new one."""
    with atomic_file(path) as new:
        new.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON in one piece; NaN and infinity are errors, since JSON has neither."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, **fields: type) -> Any:
    """The JSON of a file: where `fields` are named, an object that has them, each of its type; else ValueError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if fields and not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object with {', '.join(fields)}, it holds a {type(data).__name__}")
    for name, kind in fields.items():
        if type(data.get(name)) is not kind:
            raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got {str(data.get(name))[:80]!r}")
    return data


def append_digest(path: Path) -> None:
    """Append the SHA-256 of a file to it, as `DIGEST_BYTES` letters, for `has_digest`."""
    with path.open("r+b") as file:
        file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())


def digest_matches(path: Path) -> bool:
    """Whether a file is there, and is as `add_digest` has left it: every byte is read."""
    with suppress(OSError, ValueError), path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        return data[-DIGEST_HEX_LENGTH:] == hashlib.sha256(memoryview(data)[:-DIGEST_HEX_LENGTH]).hexdigest().encode()
    return False


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file that becomes `path` when the block ends, and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _cleanup_on_error(path, lambda: new.unlink(missing_ok=True)):
        yield new
        new.replace(path)


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends, and vanishes when it fails.

    With `overwrite` it replaces what is at `path`, which stays until the new one is complete.

    Raises:
        ValueError: `path` is a file, or a folder that is not empty and may not be replaced.
        OSError: nothing could be written; with no space left the message says so.
    """
    path = path.resolve()  # through a link: the folder is replaced, not the link
    check_output_folder(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp-"))
    with _locked(new), _cleanup_on_error(path, lambda: shutil.rmtree(new, ignore_errors=True)):
        yield new
        _move_into_place(new, path, overwrite)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a folder from `remove_leftovers` of other processes, whatever it is renamed to."""
    with ExitStack() as stack:
        with suppress(OSError):  # a disk without locks
            stack.callback(os.close, lock_folder(folder))
        yield


@contextmanager
def _cleanup_on_error(path: Path, remove: Callable[[], object]) -> Iterator[None]:
    """Where the block fails, `remove` what it has made; that the disk is full is said of `path`."""
    try:
        yield
    except BaseException as error:
        remove()
        if is_disk_full(error):
            raise OSError(
                errno.ENOSPC, f"No space left on the disk while writing {path}; nothing was kept. Free some space"
            ) from error
        raise


def _move_into_place(new: Path, path: Path, overwrite: bool) -> None:
    """Rename `new` to `path`; at any moment the old or the new folder is whole, see `remove_leftovers`.

    Its files get the modes that new ones have: safetensors makes files that only their owner reads.
    """
    for each in [new, *new.rglob("*")]:
        if not each.is_symlink():
            each.chmod((0o777 if each.is_dir() else 0o666) & ~UMASK)
    if not (overwrite and path.exists()):
        new.rename(path)  # fails where somebody else has filled the folder in the meantime
        return
    old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
    with _locked(path):
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        with suppress(OSError):
            _remove_folder(old)


def _remove_folder(folder: Path) -> None:
    """Remove a replaced or unfinished folder, under a name that says that it is not whole."""
    doomed = folder.with_name(f"{folder.name[: -len('old-01234567')]}tmp-{folder.name[-8:]}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def partial_folder(path: Path) -> Path:
    """Where an unfinished run that shall be at `path` works."""
    path = path.resolve()
    return path.with_name(path.name + ".partial")


def seed_folders(folder: Path) -> list[Path]:
    """The finished runs of several seeds, `seed-0`, `seed-1` and so on. ValueError where `folder` is unfinished."""
    if folder.name.endswith(".partial") and (folder / RUN_MARKER).is_file():
        raise ValueError(f"{folder} is an unfinished run. Go on with it by --resume auto, or name a finished one.")
    return sorted(p for p in folder.glob("seed-*/") if p.name[5:].isdecimal())


def finish_folder(path: Path, overwrite: bool = False) -> None:
    """Rename the partial folder of `path` to `path`, in place of what is there if `overwrite` is set."""
    path, partial = path.resolve(), partial_folder(path)
    check_output_folder(path, overwrite)
    for left in partial.rglob(".*.tmp"):
        left.unlink()  # of writes that were killed
    _move_into_place(partial, path, overwrite)


def check_output_folder(path: Path, overwrite: bool = False) -> None:
    """Raise ValueError unless a folder can be written at `path` without losing anything; tidies up beside it."""
    path = path.resolve()
    remove_leftovers(path)
    fault = None
    if path.is_mount():
        fault = "is a mount point and can't be replaced. Choose a folder inside it"
    elif path.is_dir() and any(path.iterdir()) and not overwrite:
        fault = "is not empty. Choose another one, or replace it with --overwrite_output_dir"
    elif path.exists() and not path.is_dir():
        fault = "is a file. Choose another name"
    if fault:
        raise ValueError(f"The output folder {path} {fault}.")
    _check_writable(path, "folder")


def check_inputs_outside(output: Path, *inputs: str | Path | None) -> None:
    """Raise ValueError where what a command reads, or the working folder, lies in the output that it would replace."""
    for name in (*inputs, Path.cwd()):  # a Hub id is no place on this machine
        if name is not None and Path(name).exists() and Path(name).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"The output folder {output} holds {name}, which would be replaced. Choose another one.")


def remove_leftovers(path: Path) -> None:
    """Undo what killed processes left beside an output folder; one that was being replaced gets its name back.

    What a process that is alive works in is locked, and stays. On a disk without locks, everything stays.
    """
    path = path.resolve()
    name = re.compile(rf"\.{re.escape(path.name)}\.(old|tmp)-\w{{8}}")
    for left in sorted(path.parent.glob(".*")):  # the old output before unfinished new ones
        if not (match := name.fullmatch(left.name)):
            continue
        with suppress(OSError), ExitStack() as stack:  # it is locked, or another process has tidied up meanwhile
            stack.callback(os.close, lock_folder(left))
            if match[1] == "old" and not (path.exists() and any(path.iterdir())):
                left.rename(path)  # killed between the two renames of `_put_in_place`
            else:
                _remove_folder(left)


def check_output_file(path: Path) -> None:
    """Raise ValueError unless a file can be written at `path`; one that is there may be replaced."""
    path = path.absolute()
    if path.is_dir():
        text = "The output file {path} is a folder. Name a file in it, such as {path}/result.json."
        raise coded_error(ValueError, "output_is_folder", text, path=path)
    _check_writable(path, "file")


def _check_writable(path: Path, kind: str) -> None:
    """Raise ValueError where nothing can be written at a path; permissions alone do not tell, so it is tried."""
    existing = next(parent for parent in path.parents if parent.exists() or parent.is_symlink())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        fault = f"can't be written to ({error.strerror})" if existing.is_dir() else "is no folder"
        text = "The output {what} {path} can't be made: {place} {fault}. Choose another place."
        raise coded_error(ValueError, "no_output", text, what=kind, path=path, place=existing, fault=fault) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk is full; safetensors reports it as text, not as a number."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def lock_folder(folder: Path) -> int:
    """Lock a folder; returns the handle, which a process's end closes, too. BlockingIOError: another one has."""
    lock = os.open(folder, os.O_RDONLY)
    with ExitStack() as stack:
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stack.pop_all()
    return lock


class AllowedFolders:
    """Where the files of a data set may lie: in its folder, and in others that links in it may lead into.

    A link that leads out is refused, as the name of a file outside is; the folder may itself be reached by one. A
    snapshot of the Hub's cache is made of links into `blobs` of its repository, which counts as part of it.
    """

    def __init__(self, folder: Path, extra_folders: Sequence[Path] = ()):
        self.folder = folder
        self.folders = [Path(os.path.realpath(place)) for place in (folder, *extra_folders)]
        for place in (self.folders[0], *self.folders[0].parents):
            if place.name == "snapshots" and place.parent.name.startswith(("datasets--", "models--")):
                self.folders.append(place.parent / "blobs")

    def contains(self, path: Path) -> bool:
        """Whether a path ends within, all links followed."""
        try:
            real = Path(os.path.realpath(path))
        except ValueError:  # a name that no file can have: opening it raises the error
            return True
        return any(real.is_relative_to(place) for place in self.folders)

    def check(self, paths: Sequence[Path]) -> None:
        """Raise ValueError where a path leads out."""
        if out := [os.path.relpath(path, self.folder) for path in paths if not self.contains(path)]:
            fault = f"holds links to files outside of it, refused: {out[:3]}. Copy the files into it."
            raise ValueError(f"{self.folder} {fault}")


def check_links_stay_inside(folder: Path) -> None:
    """Raise ValueError where a link anywhere below the folder leads out of it, or a pipe or device lies there.

    For what others read as a whole: opening a pipe would wait for ever.
    """
    links = []
    for path in (Path(root, name) for root, *both in os.walk(folder) for names in both for name in names):
        if path.is_symlink():
            links.append(path)
        elif not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path} is no regular file, and can't be read. Remove it.")
    AllowedFolders(folder).check(links)
