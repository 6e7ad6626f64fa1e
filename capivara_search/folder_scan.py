"""Find the picture files in the user's folders, and report files and folders that can't be read.

Picture files are recognized by the suffix of their name. They are not opened here; `picture_reading` opens them.
"""

import os
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from capivara_common.cli import make_coded_error
from capivara_common.image_files import IMAGE_SUFFIXES, BadImage
from capivara_search.ignore_rules import SYSTEM_NAMES, IgnoreRules, resolve_parent_links
from capivara_search.messages import make_error_from_code
from capivara_search.results import SkippedFile

# Suffixes of RAW files of Adobe and phones, Canon, Nikon, Sony, Panasonic, Olympus, Fujifilm, Pentax and Samsung.
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".rw2", ".orf", ".raf", ".pef", ".srw")
PICTURE_SUFFIXES = (*IMAGE_SUFFIXES, *RAW_SUFFIXES)
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".3gp", ".mts", ".m2ts", ".wmv", ".mpg", ".mpeg", ".flv"),
)
# Reasons for skipping a file whose content could not be read at all. The file may be intact, so each update of the
# index tries to read it again. Only indexes of older versions contain "needs rawpy".
RETRYABLE_REASONS = ("no permission", "read error", "gone", "needs rawpy")


@dataclass(frozen=True)
class FileState:
    """Path, size and modification time of a file at a certain moment.

    The index stores the state of each file that it has read. In the next update, a file is read again only if its size
    or modification time has changed.
    """

    path: str  # absolute path of the file
    size: int  # size of the file in bytes
    mtime_ns: int  # modification time, in nanoseconds since 1970

    @classmethod
    def of(cls, path: str, state: os.stat_result | None = None) -> "FileState":
        """Determine the current size and modification time of a file.

        Args:
            path: Absolute path of the file.
            state: Result of `os.stat` for the path, if the caller already has it. None: `os.stat` is called now.

        Returns:
            The current state of the file.

        Raises:
            OSError: If `os.stat` fails.
        """
        state = state or os.stat(path)
        return cls(path, state.st_size, state.st_mtime_ns)


def to_absolute_path(folder: str | Path) -> Path:
    """Return the absolute path of a folder or file.

    `~` and `..` are resolved. Symbolic links are not resolved.

    Args:
        folder: Absolute path, or path relative to the working directory.

    Raises:
        ValueError: If the path is not valid UTF-8.
    """
    path = os.path.abspath(Path(folder).expanduser())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise make_error_from_code(ValueError, "folder_no_text", path=ascii(path)) from None
    return Path(path)


def to_absolute_path_with_disk_case(folder: str | Path) -> Path:
    """Return the absolute path of a folder or file, with upper and lower case as on the disk.

    `~` and `..` are resolved, but symbolic links are not. The case matters only on Windows. Do not pass a path that a
    visitor of the web page has sent, because the function looks the path up on the disk.

    Args:
        folder: Absolute path, or path relative to the working directory.

    Raises:
        ValueError: If the path is not valid UTF-8.
    """
    path = to_absolute_path(folder)
    real_path = os.path.realpath(path)
    # With the case of the disk, a folder always has the same path in the index.
    return Path(real_path) if os.path.normcase(path) == os.path.normcase(real_path) else path


def find_pictures_and_unreadable_files(
    folders: Mapping[Path, str] | Sequence[str | Path],
    rules: IgnoreRules | None = None,
    ignored_counts: dict[str, Counter[str]] | None = None,
    only_paths: Collection[str] | None = None,
) -> tuple[list[FileState], list[SkippedFile]]:
    """Find the picture files in folders and their subfolders, and the files and folders that can't be read.

    Symbolic links are not followed, but an element of `folders` may itself be a link.

    Args:
        folders: Folders to scan: a list of paths, or a dictionary `{path: expected real path}`. In a real path,
            symbolic links are resolved.
        rules: The user's rules for ignoring files. None: no rules. Hidden files and the names in `SYSTEM_NAMES` are
            always ignored.
        ignored_counts: Dictionary that is filled with `{folder: {reason: number}}`. The reasons are "forgotten"
            (removed from the index by the user) and "excluded" (by a rule), which count pictures; "hidden" and
            "system", which count pictures and folders (without their content); "link" and "video".
        only_paths: Absolute paths inside `folders`. Only these are scanned, and it is no error if they contain no
            picture. None: everything is scanned.

    Returns:
        Tuple (states of the picture files, files and folders that could not be read). Both are lists sorted by path.

    Raises:
        ValueError: If a folder does not exist, can't be opened, was removed from the index by the user, has another
            real path than expected, or contains no picture. A folder without pictures is accepted if something in it
            could not be read, or was ignored as a link or because of the user's rules.
    """
    roots, rules = [str(to_absolute_path(folder)) for folder in folders], rules or IgnoreRules()
    for root in roots:
        if not os.path.isdir(root):
            fault = "is a file, not a folder" if os.path.exists(root) else "does not exist"
            text = "The folder {path} {fault}. Give the path of a folder of pictures."
            raise make_coded_error(ValueError, None, text, path=root, fault=fault)
        rules.check_not_forgotten(root)
    scan = _FolderScan(roots, rules, only_paths)
    for root in roots:
        scan.scan_folder(root)
    for folder, real_path in folders.items() if isinstance(folders, Mapping) else ():
        # The real path is checked after the scan. If a folder was replaced by a link during the scan, files of another
        # folder may have been found.
        if os.path.realpath(folder) != real_path:
            raise make_error_from_code(ValueError, "folder_swapped", path=str(folder), real=real_path)
    if ignored_counts is not None:
        ignored_counts.update({root: +counts for root, counts in scan.ignored_counts.items()})
    skipped_files = {skipped.path: skipped for skipped in scan.skipped_files}
    for root in roots:
        if root in skipped_files:
            raise make_error_from_code(ValueError, "folder_shut", path=root, reason=skipped_files[root])
        # A folder without any picture is refused, because the user has probably named the wrong folder. Such a folder
        # is accepted if pictures in it were ignored because of the user's own rules, or if it contains links.
        ignored_count = sum(scan.ignored_counts[root][reason] for reason in ("forgotten", "excluded", "link"))
        if only_paths is None and not ignored_count and not _is_any_path_inside([*scan.pictures, *skipped_files], root):
            raise make_error_from_code(ValueError, "no_picture", path=root, ends=", ".join(PICTURE_SUFFIXES))
    pictures = sorted(scan.pictures.values(), key=lambda file: file.path)
    return pictures, sorted(scan.skipped_files, key=lambda skipped: skipped.path)


def _is_any_path_inside(paths: Sequence[str], root: str) -> bool:
    """Return whether at least one of several files lies inside a folder.

    The paths are compared twice: as they are given, and with symbolic links resolved.

    Args:
        paths: Absolute paths of the files.
        root: Absolute path of the folder.

    Returns:
        True if a path lies inside the folder in one of the two comparisons.
    """
    if any(path.startswith(os.path.join(root, "")) for path in paths):
        return True
    # The scan visits each folder only once. If two of the user's folders are the same folder on disk, for example
    # because one is a link to the other, its pictures are found under only one of the two paths. A comparison of real
    # paths (with links resolved) shows that the pictures lie in both.
    real = Path(os.path.realpath(root))
    return any(Path(os.path.realpath(folder)).is_relative_to(real) for folder in {os.path.dirname(p) for p in paths})


class _FolderScan:
    """Scan of folders for pictures. It collects pictures, skipped files and numbers of ignored files.

    Each folder is visited only once, even if it can be reached from several roots.

    Args:
        roots: Absolute paths of the folders to scan.
        rules: Rules for ignoring files.
        only_paths: Absolute paths of files and folders inside the roots. Only these are scanned. None: everything.

    Attributes:
        ignored_counts: `{root: {reason: number of ignored files and folders}}`.
        pictures: `{path of a picture that was found: state of its file}`.
        skipped_files: Files and folders that can't be read.
    """

    def __init__(self, roots: Sequence[str], rules: IgnoreRules, only_paths: Collection[str] | None):
        # Forgotten paths are paths that the user has removed from the index. Such a path may lead through a symbolic
        # link. The scan may reach the same file by its resolved path, so the resolved path is added to the rules.
        self.rules = IgnoreRules(rules.exclude, rules.forgotten | set(map(resolve_parent_links, rules.forgotten)))
        self.ignored_counts = {root: Counter[str]() for root in roots}
        self.relevant_paths = {str(entry) for path in only_paths or () for entry in (path, *Path(path).parents)}
        self.relevant_prefixes = ("",)
        if only_paths is not None:
            self.relevant_prefixes = tuple(os.path.join(path, "") for path in only_paths if os.path.isdir(path))
        self.pictures: dict[str, FileState] = {}
        self.skipped_files: list[SkippedFile] = []
        # (Device, inode) of each visited folder, so that a folder with several paths is visited only once.
        self.visited_folders: set[tuple[int, int]] = set()

    def scan_folder(self, root: str) -> None:
        """Scan one root and its subfolders, and add the results to the attributes of this object.

        Args:
            root: Absolute path of the folder, one of the roots.
        """
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            try:
                state = os.stat(folder)
                if (state.st_dev, state.st_ino) in self.visited_folders:
                    continue
                self.visited_folders.add((state.st_dev, state.st_ino))
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if not entry.path.startswith(self.relevant_prefixes) and entry.path not in self.relevant_paths:
                            continue
                        is_link = is_link_or_junction(entry)
                        is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
                        if reason := self.rules.reason(entry.path, root, is_folder) or "link" * is_link:
                            # In folders that the user ignores, pictures are counted. Other folders count as 1.
                            is_counted = is_folder and not is_link and reason in ("forgotten", "excluded")
                            is_entry = is_folder or is_picture_name(entry.name)
                            self.ignored_counts[root][reason] += _count_pictures(entry.path) if is_counted else is_entry
                        elif is_folder:
                            waiting.append(entry.path)
                        elif is_picture_name(entry.name):
                            self.add_file(entry.path)
                        else:
                            self.ignored_counts[root]["video"] += entry.name.lower().endswith(VIDEO_SUFFIXES)
            except OSError as error:
                self.skip_file(folder, convert_os_error_to_bad_image(error))

    def add_file(self, path: str) -> None:
        """Add a picture file to the attribute `pictures`, or to `skipped_files` if the file can't be read.

        Args:
            path: Absolute path of the file. Its name has the suffix of a picture.
        """
        try:
            state = os.stat(path)
        except OSError as error:  # for example, the file was deleted since its folder was listed
            return self.skip_file(path, convert_os_error_to_bad_image(error))
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            self.skip_file(path, BadImage("name is no text", "its name is not in UTF-8; rename it"))
        elif not stat.S_ISREG(state.st_mode):
            self.skip_file(path, BadImage("no regular file", "it is a pipe, a socket or a device"))
        elif not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            self.skip_file(path, convert_os_error_to_bad_image(PermissionError()))
        else:
            self.pictures[path] = FileState.of(path, state)

    def skip_file(self, path: str, fault: BadImage) -> None:
        """Add a file or folder that can't be read to the attribute `skipped_files`.

        Args:
            path: Absolute path of the file or folder. The path need not be valid UTF-8.
            fault: Reason why the file or folder can't be read.
        """
        printable_path = path.encode(errors="surrogateescape").decode(errors="replace")
        self.skipped_files.append(SkippedFile(printable_path, fault.reason, fault.detail))


def is_link_or_junction(entry: os.DirEntry) -> bool:
    """Return whether an entry of a folder is a symbolic link, or a junction of Windows (Python 3.12 or newer)."""
    return entry.is_symlink() or (hasattr(entry, "is_junction") and entry.is_junction())


def _count_pictures(folder: str) -> int:
    """Return the number of files in a folder and its subfolders that have the suffix of a picture.

    Hidden files and folders, the names in `SYSTEM_NAMES` and symbolic links are not counted. Folders that can't be read
    count as empty.

    Args:
        folder: Path of the folder.
    """
    number, waiting = 0, [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in SYSTEM_NAMES or is_link_or_junction(entry):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    number += is_picture_name(entry.name)
    return number


def is_picture_name(name: str) -> bool:
    """Return whether a file name or path ends with the suffix of a picture format, such as ".jpg" or ".JPG"."""
    return name.lower().endswith(PICTURE_SUFFIXES)


def convert_os_error_to_bad_image(error: OSError) -> BadImage:
    """Convert an error of the operating system to a BadImage error that says why a file is skipped.

    Args:
        error: Error raised when the file was opened or read.

    Returns:
        A BadImage with the reason "gone", "no permission" or "read error", for the caller to raise or to record.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return BadImage("gone", "the file does not exist")
    if isinstance(error, PermissionError):
        return BadImage("no permission", "there is no permission to read it; its owner can grant it")
    return BadImage("read error", error.strerror or str(error))
