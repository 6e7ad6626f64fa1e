"""The folders of an index: which were named on this machine, what is left out of them, and where they went."""

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
from capivara_search.messages import localized_error, log_message
from capivara_search.picture_files import IgnoreRules, to_absolute_path
from capivara_search.table import (
    FOLDER_KEY_PREFIX,
    METADATA_TABLE,
    PICTURES_TABLE,
    RULES_KEY,
    SKIPPED_FILES_TABLE,
    PictureTable,
    folders_clause,
    quote_sql,
)


def requested_folders(table: PictureTable) -> dict[str, str]:
    """Folder -> its real path, of those that `add` was told of on this machine.

    What an index says of itself may be somebody else's word: "/" would make every picture of the machine one of its.
    """
    with suppress(OSError, ValueError):
        asked = read_json(_record_path(table), folders=dict)["folders"]
        return {folder: real for folder, real in asked.items() if isinstance(real, str)}
    return {}


def record_requested_folders(
    table: PictureTable, folders: Mapping[str | Path, str], moved_from: Path | None = None
) -> None:
    """Add folders to this machine's record of an index.

    Args:
        table: the index.
        folders: folder -> its real path, resolved when the user named the folder and not again.
        left: folders in it are removed from the record.
    """
    asked = {
        one: real
        for one, real in requested_folders(table).items()
        if not moved_from or not Path(one).is_relative_to(moved_from)
    }
    asked |= {str(folder): real for folder, real in folders.items()}
    try:
        write_json(_record_path(table), {"index": table.where, "folders": asked})
    except OSError as error:
        log_message("thumbnails_alone", _record_path(table), error)


def _record_path(table: PictureTable) -> Path:
    """Not beside the index, which may have come whole from elsewhere, nor in a cache, which may be emptied."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    where = table.where if table.is_remote else os.path.realpath(table.where)
    return Path(state, "capivara", "folders", f"{blake2b(where.encode(), digest_size=16).hexdigest()}.json")


def load_rules(table: PictureTable) -> IgnoreRules:
    """What is left out of the folders of an index."""
    known = json.loads(table.read_metadata().get(RULES_KEY, "{}"))
    return IgnoreRules(tuple(known.get("exclude", ())), frozenset(known.get("forgotten", ())))


def save_rules(table: PictureTable, rules: IgnoreRules) -> None:
    """Keep rules with an index, in place of those that it has."""
    if rules != load_rules(table):
        kept = {"exclude": rules.exclude, "forgotten": sorted(rules.forgotten)}
        table.set_metadata({RULES_KEY: json.dumps(kept, ensure_ascii=False)})


def load_ignored_counts(table: PictureTable) -> Counter[str]:
    """`Added.skipped`, of all folders of an index."""
    counts = Counter[str]()
    for key, value in table.read_metadata().items():
        if key.startswith(FOLDER_KEY_PREFIX):
            with suppress(ValueError, AttributeError):  # older versions have kept nothing there
                counts.update({why: n for why, n in json.loads(value).items() if type(n) is int})
    return counts


def folders_to_add(
    table: PictureTable, folders: Mapping[Path, str], exclude: Sequence[str] = (), include: Sequence[str | Path] = ()
) -> dict[Path, str]:
    """`PictureIndex.folders_to_add`, of absolute paths with their real paths."""
    rules = load_rules(table)
    rules.updated(exclude, include)  # says now what is wrong with them
    known, paths = table.folders(), dict(folders)
    asked = {one: real for one, real in requested_folders(table).items() if one in known}
    if not folders:
        paths = {Path(one): real for one, real in asked.items() if is_available(one, real)}
        if away := sorted(set(known) - set(map(str, paths))):
            log_message("folders_away", ", ".join(away), level=logging.WARNING)
    for place in map(to_absolute_path, include):
        if (
            rules.find_forgotten_parent(str(place))
            and place.is_dir()
            and not any(map(place.is_relative_to, [*asked, *paths]))
        ):
            paths[place] = os.path.realpath(place)
    if not paths:
        raise localized_error(ValueError, "no_known_folder")
    if wrong := [one for one in exclude if _is_mistaken_path(one, {*map(Path, known), *paths})]:
        raise localized_error(ValueError, "path_excluded", pattern=wrong[0])
    return paths


def _is_mistaken_path(pattern: str, folders: Iterable[Path]) -> bool:
    """Whether a pattern is a path from here into one of these folders, and leaves nothing out, unlike what is meant."""
    place = Path(os.path.abspath(os.path.expanduser(pattern)))
    inside = [one for one in folders if place.is_relative_to(one)] if "/" in pattern.rstrip("/") else []
    excluded = (IgnoreRules((pattern,)).reason(str(place), str(one), place.is_dir()) for one in inside)
    return bool(inside) and os.path.lexists(place) and not any(excluded)


def is_available(folder: str | Path, real_path: str, allow_empty: bool = False) -> bool:
    """Return whether a folder has this real path and holds something, which an unmounted disk does not."""
    with suppress(OSError), os.scandir(folder) as entries:
        return os.path.realpath(folder) == real_path and (allow_empty or next(entries, None) is not None)
    return False


def forget_folder(table: PictureTable, path: Path) -> int:
    """`PictureIndex.forget`, of an absolute path."""
    with table.locked():
        removed, failed = (
            table.delete_matching(folders_clause(path), name) for name in (PICTURES_TABLE, SKIPPED_FILES_TABLE)
        )
        if removed or failed or os.path.lexists(path):
            rules = load_rules(table)
            save_rules(table, replace(rules, forgotten=rules.forgotten | {str(path)}))
        table.delete_paths(
            [FOLDER_KEY_PREFIX + one for one in table.folders() if Path(one).is_relative_to(path)], METADATA_TABLE
        )
        table.purge()
    return removed


def move_folder(table: PictureTable, old: Path, new: Path) -> tuple[int, int]:
    """`PictureIndex.move`. What is interrupted goes on by the same call: the rows come first, in one version."""
    if old == new or old in new.parents or new in old.parents:
        raise localized_error(ValueError, "move_nested", old=old, new=new)
    with table.locked():
        paths = table.rows(["path"], folders_clause(old))["path"].to_pylist()
        folders, about, rules = table.folders(), table.read_metadata(), load_rules(table)
        inside = [FOLDER_KEY_PREFIX + one for one in folders if Path(one).is_relative_to(old)]
        if not paths and not inside:
            raise localized_error(ValueError, "move_nothing", path=old)
        there = sum(os.path.isfile(_moved_path(path, old, new)) for path in paths)
        if paths and not there:
            raise localized_error(
                ValueError, "move_not_there", path=old, total=len(paths), example=_moved_path(paths[0], old, new)
            )
        for name in (PICTURES_TABLE, SKIPPED_FILES_TABLE):
            _move_rows(table, name, old, new)
        within_old = [one for one in rules.forgotten if Path(one).is_relative_to(old)]
        moved = frozenset(_moved_path(one, old, new) for one in within_old)
        save_rules(table, replace(rules, forgotten=(rules.forgotten - {*within_old}) | moved))
        values = {key.replace(str(old), str(new), 1): about[key] for key in inside}
        if any(Path(one) in old.parents for one in folders) and not any(map(new.is_relative_to, folders)):
            values[FOLDER_KEY_PREFIX + str(new)] = ""  # it was part of a folder that stays
        table.set_metadata(values)
        # What an index says of itself may lead out of the folder that was named.
        real_paths = {one: os.path.realpath(one) for one in table.folders()}
        inside_new = Path(os.path.realpath(new))
        record_requested_folders(
            table, {one: real for one, real in real_paths.items() if Path(real).is_relative_to(inside_new)}, old
        )
        table.delete_paths(inside, METADATA_TABLE)
        table.purge()
    return len(paths), there


def _moved_path(path: str, old: Path, new: Path) -> str:
    return str(new) + path[len(str(old)) :]


def _move_rows(table: PictureTable, name: str, old: Path, new: Path) -> None:
    """Rewrite the paths of a table; rows that are at the new place already are the newer ones."""
    clause, taken = folders_clause(old), set(table.rows(["path"], folders_clause(new), name)["path"].to_pylist())
    paths = table.rows(["path"], clause, name)["path"].to_pylist()
    table.delete_paths([path for path in paths if _moved_path(path, old, new) in taken], name)
    moved = f"concat({quote_sql(str(new))}, substr(path, {len(str(old)) + 1}))"
    if paths:
        table.run_write(name, lambda opened: opened.update(where=clause, values_sql={"path": moved}))
