"""Rules that decide which files and subfolders of the indexed folders are ignored."""

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from capivara_search.messages import make_error_from_code

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

# Names of files and folders that are always ignored, because they were not made by the user. File systems, network
# storage devices, zip files made on a Mac and programming tools create them.
SYSTEM_NAMES = {
    *("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "node_modules")
}


@dataclass(frozen=True)
class IgnoreRules:
    """The user's rules that say which files and folders an index ignores.

    Hidden files, and system files and folders such as "node_modules" (`SYSTEM_NAMES`), are always ignored, even without
    a rule.

    Attributes:
        exclude: Patterns of files and folders to ignore, in the syntax of `.gitignore`, relative to each indexed
            folder.
        forgotten: Absolute paths of folders and pictures that the user has removed from the index.
    """

    exclude: tuple[str, ...] = ()
    forgotten: frozenset[str] = frozenset()

    def updated(self, exclude: Sequence[str] = (), include: Sequence[str | Path] = ()) -> "IgnoreRules":
        """Return a copy of the rules with new patterns to ignore, and without the rules that the user no longer wants.

        Args:
            exclude: Patterns to add.
            include: Rules to remove: patterns of `self.exclude`, and paths. A path is removed from `self.forgotten`
                together with all paths inside it.

        Returns:
            The new rules. `self` is not changed.

        Raises:
            ValueError: If a pattern of `exclude` is invalid or begins with "!". If an entry of `include` is not ignored
                by the rules, or is a path inside a forgotten folder.
        """
        for pattern in exclude:
            if pattern.startswith("!") and pattern != "!":
                raise make_error_from_code(ValueError, "negated_pattern", pattern=pattern)
            if not _is_valid_pattern(pattern):
                raise make_error_from_code(ValueError, "bad_pattern", pattern=pattern)
        forgotten = self.forgotten
        for entry in include:
            target = os.path.abspath(Path(entry).expanduser())
            still_forgotten = frozenset(path for path in forgotten if not Path(path).is_relative_to(target))
            if str(entry) not in self.exclude:
                # A forgotten folder can only be included as a whole.
                IgnoreRules(forgotten=still_forgotten).check_not_forgotten(target)
                if still_forgotten == forgotten:
                    raise make_error_from_code(ValueError, "nothing_to_include", path=entry)
            forgotten = still_forgotten
        patterns, removed = dict.fromkeys([*self.exclude, *exclude]), set(map(str, include))
        return IgnoreRules(tuple(pattern for pattern in patterns if pattern not in removed), forgotten)

    def check_not_forgotten(self, path: str) -> None:
        """Raise ValueError if the user has removed a file or folder, or one of its parent folders, from the index.

        Args:
            path: Absolute path of the file or folder.
        """
        if forgotten := self.find_forgotten_parent(path):
            raise make_error_from_code(ValueError, "folder_forgotten", path=path, forgotten=shlex.quote(forgotten))

    def find_forgotten_parent(self, path: str) -> str | None:
        """Find the forgotten path that makes the index ignore a file or folder.

        Forgotten paths are files and folders that the user has removed from the index. Everything inside a forgotten
        folder is ignored, too.

        Args:
            path: Absolute path of a file or folder.

        Returns:
            The forgotten path that is equal to `path` or is one of its parent folders, or None. If there are several
            such paths, the outermost folder.
        """
        # The path is compared both as it is given and with its symbolic links resolved.
        names = {str(parent) for name in (path, os.path.realpath(path)) for parent in (Path(name), *Path(name).parents)}
        matches = (forgotten for forgotten in self.forgotten if names & {forgotten, resolve_parent_links(forgotten)})
        return min(matches, default=None)

    def reason(self, path: str, root: str, is_folder: bool) -> str | None:
        """Return the reason why a file or folder is ignored.

        Args:
            path: Absolute path of the file or folder.
            root: Indexed folder that contains the path. Patterns are relative to this folder.
            is_folder: Whether the path is a folder. Some patterns match only folders.

        Returns:
            "forgotten" (the user removed the path from the index), "hidden" (the name starts with a dot), "system" (a
            name such as "node_modules") or "excluded" (a pattern matches). None if the path is not ignored.
        """
        name = os.path.basename(path)
        if path in self.forgotten:
            return "forgotten"
        if name.startswith("."):
            return "hidden"
        if name in SYSTEM_NAMES:
            return "system"
        relative = path[len(root) :].lstrip(os.sep) + os.sep * is_folder
        return "excluded" if self.exclude and self._gitignore_spec.match_file(relative) else None

    @cached_property
    def _gitignore_spec(self) -> "GitIgnoreSpec":
        """The patterns of `exclude`, compiled by the package pathspec."""
        from pathspec import GitIgnoreSpec  # imported late, because most users have no patterns

        return GitIgnoreSpec.from_lines(self.exclude)


def _is_valid_pattern(pattern: str) -> bool:
    """Return whether a text is a valid `.gitignore` pattern. Comments and blank lines do not count as patterns."""
    with suppress(ValueError):
        return any(parsed.include is not None for parsed in IgnoreRules((pattern,))._gitignore_spec.patterns)
    return False


def resolve_parent_links(path: str) -> str:
    """Resolve the symbolic links in the parent folders of a path, but not in its last component.

    If the path is a symbolic link, the result is the path of the link itself, not of its target.
    """
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
