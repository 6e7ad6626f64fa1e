"""What is left out of folders: hidden names, those of systems, patterns by gitignore's rules, and what was forgotten.

They are kept with an index; see `adding.kept_rules`.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from capivara_search.words import failure

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

# Beside hidden ones: what file systems, NAS boxes, zip files of a Mac and programmers put among the pictures.
SKIPPED_NAMES = {
    *("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "node_modules")
}


@dataclass(frozen=True)
class Rules:
    """What is left out of folders."""

    exclude: tuple[str, ...] = ()  # patterns, as of a `.gitignore` in each folder that is named
    forgotten: frozenset[str] = frozenset()  # paths of folders and pictures

    def changed(self, exclude: Sequence[str] = (), include: Sequence[str | Path] = ()) -> "Rules":
        """These with more patterns, and without those of them, and forgotten paths, that are included.

        Raises ValueError: `exclude` names what is no pattern, `include` what is left out by none of these rules.
        """
        for pattern in exclude:
            if not _can_match(pattern):
                raise failure(ValueError, "bad_pattern", pattern=pattern)
        forgotten = self.forgotten
        for one in include:
            place = os.path.abspath(Path(one).expanduser())
            kept = frozenset(path for path in forgotten if not Path(path).is_relative_to(place))
            if kept == forgotten and str(one) not in self.exclude:
                raise failure(ValueError, "nothing_to_include", path=one)
            forgotten = kept
        patterns = dict.fromkeys([*self.exclude, *exclude])
        return Rules(tuple(one for one in patterns if one not in set(map(str, include))), forgotten)

    def is_forgotten(self, path: str) -> bool:
        """Whether a path was forgotten, or lies in a folder that was."""
        return not self.forgotten.isdisjoint((path, *map(str, Path(path).parents)))

    def reason(self, path: str, root: str, is_folder: bool) -> str | None:
        """Why what lies in a folder that is looked through, below `root`, is left out; None where it is not."""
        name = os.path.basename(path)
        if path in self.forgotten:
            return "forgotten"
        if name.startswith("."):
            return "hidden"
        if name in SKIPPED_NAMES:
            return "system"
        relative = path[len(root) :].lstrip(os.sep) + os.sep * is_folder
        return "excluded" if self.exclude and self._spec.match_file(relative) else None

    @cached_property
    def _spec(self) -> "GitIgnoreSpec":
        from pathspec import GitIgnoreSpec  # extra `search`; only who has patterns waits for it

        return GitIgnoreSpec.from_lines(self.exclude)


def _can_match(pattern: str) -> bool:
    with suppress(ValueError):
        return any(one.include is not None for one in Rules((pattern,))._spec.patterns)
    return False
