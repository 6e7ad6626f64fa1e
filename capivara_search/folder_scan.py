"""Find the picture files in the user's folders, and report the files that can't be read.

Files are recognized by the suffix of their name. Nothing is opened here: `picture_reading` does that.
"""

import os
import shlex
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from capivara_common.cli import coded_error
from capivara_common.image_files import IMAGE_SUFFIXES, BadImage
from capivara_search.ignore_rules import SYSTEM_NAMES, IgnoreRules, resolve_parent_links
from capivara_search.messages import localized_error
from capivara_search.results import SkippedFile

# RAW files of Adobe and phones, Canon, Nikon, Sony, Panasonic, Olympus, Fujifilm, Pentax and Samsung.
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".rw2", ".orf", ".raf", ".pef", ".srw")
PICTURE_SUFFIXES = (*IMAGE_SUFFIXES, *RAW_SUFFIXES)
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".3gp", ".mts", ".m2ts", ".wmv", ".mpg", ".mpeg", ".flv"),
)
# Files that were skipped for these reasons are tried again in each run, because their content was never seen. Indexes
# of earlier versions may contain "needs rawpy".
RETRYABLE_REASONS = ("no permission", "read error", "gone", "needs rawpy")


@dataclass(frozen=True)
class FileState:
    """Path, size and modification time of a file when it was last seen. A file is read again if they change."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int  # last change, in nanoseconds since 1970

    @classmethod
    def of(cls, path: str, state: os.stat_result | None = None) -> "FileState":
        """Create the state of a file.

        Args:
            path: Absolute path of the file.
            state: Result of `os.stat` for the path. None: it is called now.

        Returns:
            The state.

        Raises:
            OSError: If `os.stat` fails.
        """
        state = state or os.stat(path)
        return cls(path, state.st_size, state.st_mtime_ns)


def to_absolute_path(folder: str | Path) -> Path:
    """Return the absolute path of a folder, with `~` and `..` resolved and symbolic links left as they are.

    Raises:
        ValueError: If the path is not valid UTF-8.
    """
    path = os.path.abspath(Path(folder).expanduser())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise localized_error(ValueError, "folder_no_text", path=ascii(path)) from None
    return Path(path)


def find_pictures(
    folders: Mapping[Path, str] | Sequence[str | Path],
    rules: IgnoreRules | None = None,
    ignored_counts: dict[str, Counter[str]] | None = None,
    only_paths: Collection[str] | None = None,
) -> tuple[list[FileState], list[SkippedFile]]:
    """Find the picture files in folders and their subfolders.

    Symbolic links are not followed, except if one is named as a folder.

    Args:
        folders: Folders to scan. In a mapping, the value is the real path that the folder must still have.
        rules: Rules for ignoring files. None: only hidden files and system names are ignored.
        ignored_counts: Filled in with the number of ignored entries, by folder and reason. The reasons "forgotten" and
            "excluded" count pictures, "hidden" and "system" count pictures and folders, "link" counts symbolic links
            and "video" counts video files.
        only_paths: Absolute paths of files and folders. Nothing else is scanned, and it is no error to find no picture.

    Returns:
        The picture files, and the files and folders that could not be read, each sorted by path.

    Raises:
        ValueError: If a folder does not exist, can't be opened, was forgotten, has another real path than the recorded
            one, or contains no picture although no rule ignores anything in it.
    """
    roots = [str(to_absolute_path(folder)) for folder in folders]
    for root in roots:
        if not os.path.isdir(root):
            fault = "is a file, not a folder" if os.path.exists(root) else "does not exist"
            text = "The folder {path} {fault}. Name a folder of pictures."
            raise coded_error(ValueError, None, text, path=root, fault=fault)
    rules = rules or IgnoreRules()
    for root in roots:
        if forgotten := rules.find_forgotten_parent(root):
            raise localized_error(ValueError, "folder_forgotten", path=root, forgotten=shlex.quote(forgotten))
    scan = _FolderScan(roots, rules, only_paths)
    for root in roots:
        scan.scan_folder(root)
    for folder, real_path in folders.items() if isinstance(folders, Mapping) else ():
        # Checked after the scan: a folder that was replaced meanwhile may have led the scan into another folder.
        if os.path.realpath(folder) != real_path:
            raise localized_error(ValueError, "folder_swapped", path=str(folder), real=real_path)
    if ignored_counts is not None:
        ignored_counts.update({root: +counts for root, counts in scan.ignored_counts.items()})
    skipped_files = {skipped.path: skipped for skipped in scan.skipped_files}
    for root in roots:
        if root in skipped_files:
            raise localized_error(ValueError, "folder_shut", path=root, reason=skipped_files[root])
        # A folder may well contain no picture if rules ignore something in it.
        ignored_count = sum(scan.ignored_counts[root][reason] for reason in ("forgotten", "excluded", "link"))
        if only_paths is None and not ignored_count and not _contains_any([*scan.pictures, *skipped_files], root):
            raise localized_error(ValueError, "no_picture", path=root, ends=", ".join(PICTURE_SUFFIXES))
    pictures = sorted(scan.pictures.values(), key=lambda file: file.path)
    return pictures, sorted(scan.skipped_files, key=lambda skipped: skipped.path)


def _contains_any(paths: Sequence[str], root: str) -> bool:
    """Return whether one of the paths lies in a folder, by its path or its real path."""
    if any(path.startswith(os.path.join(root, "")) for path in paths):
        return True
    # The scan visits each folder once, so its pictures may be listed under another root that leads to the same folder.
    real = Path(os.path.realpath(root))
    return any(Path(os.path.realpath(folder)).is_relative_to(real) for folder in {os.path.dirname(p) for p in paths})


class _FolderScan:
    """One pass over folders that visits each folder once, even if several roots lead to it."""

    def __init__(self, roots: Sequence[str], rules: IgnoreRules, only_paths: Collection[str] | None):
        # A root that is a symbolic link gives forgotten files other names, so their resolved paths are added.
        self.rules = IgnoreRules(rules.exclude, rules.forgotten | set(map(resolve_parent_links, rules.forgotten)))
        self.ignored_counts = {root: Counter[str]() for root in roots}
        self.relevant_paths = {str(entry) for path in only_paths or () for entry in (path, *Path(path).parents)}
        self.relevant_prefixes = ("",)
        if only_paths is not None:
            self.relevant_prefixes = tuple(os.path.join(path, "") for path in only_paths if os.path.isdir(path))
        self.pictures: dict[str, FileState] = {}
        self.skipped_files: list[SkippedFile] = []
        self.visited_folders: set[tuple[int, int]] = set()  # device and inode of each folder

    def scan_folder(self, root: str) -> None:
        """Scan a folder and its subfolders."""
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
                        is_link = entry.is_symlink()
                        is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
                        if reason := self.rules.reason(entry.path, root, is_folder) or "link" * is_link:
                            is_counted = is_folder and not is_link and reason in ("forgotten", "excluded")
                            is_entry = is_folder or is_picture_name(entry.name)
                            self.ignored_counts[root][reason] += count_pictures(entry.path) if is_counted else is_entry
                        elif is_folder:
                            waiting.append(entry.path)
                        elif is_picture_name(entry.name):
                            self.add_file(entry.path)
                        else:
                            self.ignored_counts[root]["video"] += entry.name.lower().endswith(VIDEO_SUFFIXES)
            except OSError as error:
                self.skip_file(folder, to_bad_image(error))

    def add_file(self, path: str) -> None:
        """Add a file with the name of a picture to the pictures, or to the skipped files if it can't be read."""
        try:
            state = os.stat(path)
        except OSError as error:  # for example, the file was deleted since its folder was listed
            return self.skip_file(path, to_bad_image(error))
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            self.skip_file(path, BadImage("name is no text", "its name is not in UTF-8; rename it"))
        elif not stat.S_ISREG(state.st_mode):
            self.skip_file(path, BadImage("no regular file", "it is a pipe, a socket or a device"))
        elif not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            self.skip_file(path, to_bad_image(PermissionError()))
        else:
            self.pictures[path] = FileState.of(path, state)

    def skip_file(self, path: str, fault: BadImage) -> None:
        """Record a file or folder that can't be read, and why."""
        printable_path = path.encode(errors="surrogateescape").decode(errors="replace")
        self.skipped_files.append(SkippedFile(printable_path, fault.reason, fault.detail))


def count_pictures(folder: str) -> int:
    """Count the pictures in a folder and its subfolders by their suffix, without links, hidden and system files."""
    number, waiting = 0, [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in SYSTEM_NAMES or entry.is_symlink():
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    number += is_picture_name(entry.name)
    return number


def is_picture_name(name: str) -> bool:
    """Return whether a file name has the suffix of a picture."""
    return name.lower().endswith(PICTURE_SUFFIXES)


def to_bad_image(error: OSError) -> BadImage:
    """Convert an error of reading a file to a reason for skipping it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return BadImage("gone", "the file does not exist")
    if isinstance(error, PermissionError):
        return BadImage("no permission", "there is no permission to read it; its owner can grant it")
    return BadImage("read error", error.strerror or str(error))
