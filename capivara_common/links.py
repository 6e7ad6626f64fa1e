"""Links in a data set: one that leads out of it is refused, as the name of a file outside of it is.

A folder that is itself reached by a link is fine, and so are links within it. A snapshot of the Hub's cache is made of
links into the folder `blobs` of its repository, which counts as part of it.
"""

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path


class Bounds:
    """Where the files of a data set may lie: in its folder, and in others that links in it may lead into."""

    def __init__(self, folder: Path, others: Sequence[Path] = ()):
        self.folder = folder
        self.folders = [Path(os.path.realpath(place)) for place in (folder, *others)]
        for place in (self.folders[0], *self.folders[0].parents):
            if place.name == "snapshots" and place.parent.name.startswith(("datasets--", "models--")):
                self.folders.append(place.parent / "blobs")

    def hold(self, path: Path) -> bool:
        """Whether a path ends within, all links followed."""
        try:
            real = Path(os.path.realpath(path))
        except ValueError:  # a name that no file can have: opening it raises the error
            return True
        return any(real.is_relative_to(place) for place in self.folders)

    def check(self, paths: Sequence[Path]) -> None:
        """Raise ValueError where a path leads out."""
        if out := [os.path.relpath(path, self.folder) for path in paths if not self.hold(path)]:
            fault = f"holds links to files outside of it, refused: {out[:3]}. Copy the files into it."
            raise ValueError(f"{self.folder} {fault}")


def refuse_links_out(folder: Path) -> None:
    """Raise ValueError where a link anywhere below the folder leads out of it, or a pipe or device lies there.

    For what others read as a whole: opening a pipe would wait for ever.
    """
    links = []
    for path in (Path(root, name) for root, *names in os.walk(folder) for name in chain(*names)):
        if path.is_symlink():
            links.append(path)
        elif not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path} is no regular file, and can't be read. Remove it.")
    Bounds(folder).check(links)
