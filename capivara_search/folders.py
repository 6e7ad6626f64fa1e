"""Manage the folders of an index: record them, load and save rules for ignoring files, and move or remove folders.

An index from another machine can't be trusted: its list of folders could contain "/" and so give access to every
picture on this machine. Therefore picture files are read only in folders that the user has named on this machine. A
file outside the index records these folders with their real paths (symbolic links resolved).
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from capivara_common.files import read_json, write_json
from capivara_search.folder_scan import to_absolute_path
from capivara_search.ignore_rules import IgnoreRules
from capivara_search.messages import log_message_from_code, make_error_from_code
from capivara_search.table import PICTURES_TABLE, SKIPPED_FILES_TABLE, PictureTable, folders_clause, quote_sql

RULES_KEY = "rules"  # key in the metadata of the index; the value is JSON with the rules for ignoring files


def load_requested_folders(table: PictureTable) -> dict[str, str]:
    """Load the list of folders that the user has added to an index on this machine.

    Folders that were added on another machine are not in the list.

    Args:
        table: LanceDB tables of the index.

    Returns:
        Dictionary from the path of each folder to its real path (with symbolic links resolved) when it was added. It is
        empty if this machine has no list for the index.
    """
    with suppress(OSError, ValueError):
        recorded = read_json(_get_requested_folders_file_path(table), folders=dict)["folders"]
        return {folder: real for folder, real in recorded.items() if isinstance(real, str)}
    return {}


def record_requested_folders(
    table: PictureTable, folders: Mapping[str | Path, str], moved_from: Path | None = None
) -> None:
    """Add folders to this machine's list of the folders that the user has added to an index.

    Pictures are read only in folders of this list. If the list can't be written, a message is logged, and no error is
    raised.

    Args:
        table: LanceDB tables of the index.
        folders: Dictionary `{path of the folder: its real path}`. In a real path, symbolic links are resolved.
        moved_from: Old path of a folder that was moved. This path and the paths inside it are removed from the list.
    """
    recorded = load_requested_folders(table)
    if moved_from:
        recorded = {path: real for path, real in recorded.items() if not Path(path).is_relative_to(moved_from)}
    recorded |= {str(folder): real for folder, real in folders.items()}
    try:
        write_json(_get_requested_folders_file_path(table), {"index": table.where, "folders": recorded})
    except OSError as error:
        log_message_from_code("thumbnails_alone", _get_requested_folders_file_path(table), error)


def _get_requested_folders_file_path(table: PictureTable) -> Path:
    """Return the path of the JSON file that records the folders of an index on this machine.

    The file is in the user's state directory. It is not in the index, because the index may come from another machine
    and can't be trusted. It is not in a cache, because users may empty a cache.
    """
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    where = table.where if table.is_remote else os.path.realpath(table.where)
    return Path(state, "capivara", "folders", f"{blake2b(where.encode(), digest_size=16).hexdigest()}.json")


def load_ignore_rules(table: PictureTable) -> IgnoreRules:
    """Load the rules for ignoring files and folders from an index, which stores them.

    The rules contain patterns in the syntax of `.gitignore`, and paths that the user has removed from the index.
    """
    stored = json.loads(table.read_metadata().get(RULES_KEY, "{}"))
    return IgnoreRules(tuple(stored.get("exclude", ())), frozenset(stored.get("forgotten", ())))


def save_ignore_rules(table: PictureTable, rules: IgnoreRules) -> None:
    """Store the rules for ignoring files and folders in an index, in place of its earlier rules.

    Args:
        table: LanceDB tables of the index.
        rules: The new rules. Nothing is written if they are equal to the stored rules.
    """
    if rules != load_ignore_rules(table):
        values = {"exclude": rules.exclude, "forgotten": sorted(rules.forgotten)}
        table.set_metadata({RULES_KEY: json.dumps(values, ensure_ascii=False)})


def load_ignored_counts_by_reason(table: PictureTable) -> Counter[str]:
    """Return how many files and folders of an index are ignored for each reason, summed over all indexed folders.

    The numbers come from the latest update of each whole folder.

    Args:
        table: LanceDB tables of the index.

    Returns:
        Counter with the reason as key. The reasons are "forgotten" (removed by the user), "excluded" (matched a
        pattern), "hidden" (the name starts with a dot), "system" (a name such as "node_modules"), "link" and "video".
    """
    counts = Counter[str]()
    for value in table.folders().values():
        # A value is "" until the first update of the folder ends, and in indexes of older versions. Such a value is not
        # JSON and is skipped.
        with suppress(ValueError, AttributeError):
            counts.update({reason: n for reason, n in json.loads(value).items() if type(n) is int})
    return counts


def resolve_folders_to_scan(
    table: PictureTable, folders: Mapping[Path, str], exclude: Sequence[str] = (), include: Sequence[str | Path] = ()
) -> dict[Path, str]:
    """Return the folders that an update of the index has to scan.

    Args:
        table: LanceDB tables of the index.
        folders: Folders that the user has given: `{absolute path: real path}`. Empty: all available folders that were
            added on this machine. A warning in the log lists the other folders of the index.
        exclude: Patterns of files and folders to ignore, in the syntax of `.gitignore`.
        include: What to stop ignoring: patterns of an earlier `exclude`, and paths that the user has removed from the
            index. A removed folder is scanned, too, unless a folder to scan or another indexed folder that was added on
            this machine contains it.

    Returns:
        Dictionary from the absolute path of each folder to its real path, in which symbolic links are resolved.

    Raises:
        ValueError: If there is no folder to scan, an entry of `exclude` is an invalid pattern or the path of a file or
            folder, or an entry of `include` is not ignored by the index.
    """
    rules = load_ignore_rules(table)
    rules.updated(exclude, include)  # the result is not used; the call raises an error if an argument is invalid
    known, paths = table.folders(), dict(folders)
    recorded = {folder: real for folder, real in load_requested_folders(table).items() if folder in known}
    if not folders:
        paths = {Path(folder): real for folder, real in recorded.items() if is_folder_available(folder, real)}
        if unavailable := sorted(set(known) - set(map(str, paths))):
            log_message_from_code("folders_away", ", ".join(unavailable), level=logging.WARNING)
    for path in map(to_absolute_path, include):
        # A forgotten folder is scanned as a folder of its own, unless a folder in `paths` or `recorded` contains it.
        is_inside = any(map(path.is_relative_to, [*recorded, *paths]))
        if not is_inside and path.is_dir() and rules.find_forgotten_parent(str(path)):
            paths[path] = os.path.realpath(path)
    if not paths:
        raise make_error_from_code(ValueError, "no_known_folder")
    for pattern in exclude:
        if _is_pattern_probably_a_mistaken_path(pattern, {*map(Path, known), *paths}):
            raise make_error_from_code(ValueError, "path_excluded", pattern=pattern)
    return paths


def _is_pattern_probably_a_mistaken_path(pattern: str, folders: Iterable[Path]) -> bool:
    """Return whether the user has probably given the path of a file or folder instead of a pattern to ignore.

    A pattern is relative to each indexed folder. So an absolute path, or a path relative to the working directory,
    usually matches nothing as a pattern.

    Args:
        pattern: Pattern in the syntax of `.gitignore`.
        folders: Absolute paths of the indexed folders.

    Returns:
        True if the pattern is the path of an existing file or folder inside one of the indexed folders, but does not
        match this file or folder as a pattern.
    """
    path = Path(os.path.abspath(os.path.expanduser(pattern)))
    parents = [folder for folder in folders if path.is_relative_to(folder)] if "/" in pattern.rstrip("/") else []
    matches = (IgnoreRules((pattern,)).reason(str(path), str(parent), path.is_dir()) for parent in parents)
    return bool(parents) and os.path.lexists(path) and not any(matches)


def is_folder_available(folder: str | Path, real_path: str, allow_empty: bool = False) -> bool:
    """Return whether a folder exists, can be read, and still has its recorded real path.

    By default, an empty folder counts as unavailable, because it may be the mount point of a disk that is not mounted.

    Args:
        folder: Path of the folder.
        real_path: Real path (with symbolic links resolved) that the folder had when the user added it.
        allow_empty: Whether an empty folder counts as available.

    Returns:
        True if the folder is available, otherwise False.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        # If the real path has changed, this is probably another folder, for example because a link was replaced.
        return os.path.realpath(folder) == real_path and (allow_empty or next(entries, None) is not None)
    return False


def remove_from_index_and_ignore_path(table: PictureTable, path: Path) -> int:
    """Remove a folder or file from an index, and add its path to the ignore rules so that later updates skip it.

    Args:
        table: LanceDB tables of the index.
        path: Absolute path of the folder or file.

    Returns:
        The number of pictures that were removed from the index.
    """
    with table.locked():
        removed = table.delete_matching(folders_clause(path))
        skipped = table.delete_matching(folders_clause(path), SKIPPED_FILES_TABLE)
        if removed or skipped or os.path.lexists(path):
            rules = load_ignore_rules(table)
            save_ignore_rules(table, replace(rules, forgotten=rules.forgotten | {str(path)}))
        table.delete_folders(folder for folder in table.folders() if Path(folder).is_relative_to(path))
        table.purge()
    return removed


def update_paths_after_move(table: PictureTable, old: Path, new: Path) -> tuple[int, int]:
    """Rewrite the paths in an index after the user has moved or renamed a folder of pictures.

    No picture is read or embedded again. An interrupted call can be repeated.

    Args:
        table: LanceDB tables of the index.
        old: Absolute path of the folder before the move.
        new: Absolute path of the folder now.

    Returns:
        Tuple of two numbers: the pictures that the index had in the old folder, and how many of them exist as files in
        the new folder.

    Raises:
        ValueError: If the index does not know the old folder, none of its pictures exists in the new folder, or one
            folder lies inside the other.
    """
    if old == new or old in new.parents or new in old.parents:
        raise make_error_from_code(ValueError, "move_nested", old=old, new=new)
    with table.locked():
        paths = table.rows(["path"], folders_clause(old))["path"].to_pylist()
        folders, rules = table.folders(), load_ignore_rules(table)
        old_folders = [folder for folder in folders if Path(folder).is_relative_to(old)]
        if not paths and not old_folders:
            raise make_error_from_code(ValueError, "move_nothing", path=old)
        existing = sum(os.path.isfile(_moved_path(path, old, new)) for path in paths)
        if paths and not existing:
            example = _moved_path(paths[0], old, new)
            raise make_error_from_code(ValueError, "move_not_there", path=old, total=len(paths), example=example)
        for name in (PICTURES_TABLE, SKIPPED_FILES_TABLE):
            _update_rows_after_move(table, name, old, new)
        inside = {path for path in rules.forgotten if Path(path).is_relative_to(old)}
        forgotten = (rules.forgotten - inside) | {_moved_path(path, old, new) for path in inside}
        save_ignore_rules(table, replace(rules, forgotten=forgotten))
        new_folders = {_moved_path(folder, old, new): folders[folder] for folder in old_folders}
        if any(Path(folder) in old.parents for folder in folders) and not any(map(new.is_relative_to, folders)):
            # The old folder was inside an indexed folder. The new folder is outside of all indexed folders, so it is
            # added to the index as a folder of its own.
            new_folders[str(new)] = ""
        table.set_folders(new_folders)
        # The list of folders in the index is not trusted, because a manipulated index could name any private folder.
        # Therefore a folder is recorded as added by the user only if its real path is inside the new folder, which the
        # user has named.
        real_paths = {folder: os.path.realpath(folder) for folder in table.folders()}
        real_new = Path(os.path.realpath(new))
        requested = {folder: real for folder, real in real_paths.items() if Path(real).is_relative_to(real_new)}
        record_requested_folders(table, requested, old)
        table.delete_folders(old_folders)
        table.purge()
    return len(paths), existing


def _moved_path(path: str, old: Path, new: Path) -> str:
    """Return the new path of a file or folder after a folder was moved.

    Args:
        path: Absolute path of the file or folder before the move, equal to `old` or inside it.
        old: Absolute path of the moved folder before the move.
        new: Absolute path of the moved folder now.
    """
    return str(new) + path[len(str(old)) :]


def _update_rows_after_move(table: PictureTable, name: str, old: Path, new: Path) -> None:
    """Rewrite the paths in one table of the index after a folder was moved.

    If the table already has a row for the new path of a file, this row is newer, so it is kept, and the row with the
    old path is deleted.

    Args:
        table: LanceDB tables of the index.
        name: Name of the LanceDB table to change.
        old: Absolute path of the folder before the move.
        new: Absolute path of the folder now.
    """
    clause = folders_clause(old)
    existing_paths = set(table.rows(["path"], folders_clause(new), name)["path"].to_pylist())
    paths = table.rows(["path"], clause, name)["path"].to_pylist()
    table.delete_paths([path for path in paths if _moved_path(path, old, new) in existing_paths], name)
    moved_path_sql = f"concat({quote_sql(str(new))}, substr(path, {len(str(old)) + 1}))"
    if paths:
        table.run_write(lambda opened: opened.update(where=clause, values_sql={"path": moved_path_sql}), name)
