"""Rules that decide which files and folders of the user's folders are ignored."""

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from capivara_search.messages import localized_error

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

# Names that file systems, NAS boxes, zip files made on a Mac and programming tools put between pictures. Files and
# folders with these names are ignored, as hidden ones are.
SYSTEM_NAMES = {
    *("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "node_modules")
}


@dataclass(frozen=True)
class IgnoreRules:
    """The user's rules for ignoring files and folders, which an index stores (`folders.load_rules`).

    Hidden files and `SYSTEM_NAMES` are ignored in addition.

    Attributes:
        exclude: Patterns in the syntax of `.gitignore`, relative to each indexed folder.
        forgotten: Paths of folders and pictures that the user has removed from the index.
    """

    exclude: tuple[str, ...] = ()
    forgotten: frozenset[str] = frozenset()

    def updated(self, exclude: Sequence[str] = (), include: Sequence[str | Path] = ()) -> "IgnoreRules":
        """Return a copy of the rules with patterns added, and patterns and forgotten paths removed.

        Args:
            exclude: Patterns to add.
            include: Patterns to remove, or paths. A forgotten path that is one of these paths, or lies in one of them,
                is removed.

        Returns:
            The new rules.

        Raises:
            ValueError: If `exclude` contains an invalid or negated pattern, or `include` contains an entry that no rule
                ignores, or a path inside a forgotten folder, which has to be included as a whole.
        """
        for pattern in exclude:
            if pattern.startswith("!") and pattern != "!":
                raise localized_error(ValueError, "negated_pattern", pattern=pattern)
            if not _is_valid_pattern(pattern):
                raise localized_error(ValueError, "bad_pattern", pattern=pattern)
        forgotten = self.forgotten
        for entry in include:
            target = os.path.abspath(Path(entry).expanduser())
            still_forgotten = frozenset(path for path in forgotten if not Path(path).is_relative_to(target))
            if str(entry) not in self.exclude:
                if parent := IgnoreRules(forgotten=still_forgotten).find_forgotten_parent(target):
                    raise localized_error(ValueError, "folder_forgotten", path=target, forgotten=shlex.quote(parent))
                if still_forgotten == forgotten:
                    raise localized_error(ValueError, "nothing_to_include", path=entry)
            forgotten = still_forgotten
        patterns, removed = dict.fromkeys([*self.exclude, *exclude]), set(map(str, include))
        return IgnoreRules(tuple(pattern for pattern in patterns if pattern not in removed), forgotten)

    def find_forgotten_parent(self, path: str) -> str | None:
        """Return the outermost forgotten path that is this path or a parent of it, or None.

        The path is compared as it is given and as its real path.
        """
        names = {str(parent) for name in (path, os.path.realpath(path)) for parent in (Path(name), *Path(name).parents)}
        matches = (forgotten for forgotten in self.forgotten if names & {forgotten, resolve_parent_links(forgotten)})
        return min(matches, default=None)

    def reason(self, path: str, root: str, is_folder: bool) -> str | None:
        """Return why a file or folder is ignored.

        Args:
            path: Path of the file or folder.
            root: Indexed folder that it lies in; patterns are relative to it.
            is_folder: Whether the path is a folder; some patterns match only folders.

        Returns:
            "forgotten", "hidden", "system" or "excluded"; None if it is not ignored.
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
        from pathspec import GitIgnoreSpec  # imported late: only users with patterns need it

        return GitIgnoreSpec.from_lines(self.exclude)


def _is_valid_pattern(pattern: str) -> bool:
    with suppress(ValueError):
        return any(parsed.include is not None for parsed in IgnoreRules((pattern,))._gitignore_spec.patterns)
    return False


def resolve_parent_links(path: str) -> str:
    """Return a path with the symbolic links in its parent folders resolved; the path itself may be a link."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
