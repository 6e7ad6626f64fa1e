"""The folder where gradio keeps uploads and drawn pictures: which of its files may be opened, how much it may hold."""

import contextlib
import os
import stat
import time
from pathlib import Path

MAX_UPLOAD_BYTES = 20_000_000  # of a file; photographs of telephones have under 15 MB
MAX_STORED_BYTES = 240_000_000  # of all files together, beside those that are being received
MIN_COUNTED_BYTES = 100_000  # a smaller file counts as this, so that there are no more than a few thousand
KEPT_S = 1200  # a visitor asks about a picture as long as it is on the page


class Uploads:
    """The files of visitors. `folder` is the server's own: all that lies in it came from them or was drawn for them."""

    def __init__(self, folder: Path):
        self.folder = Path(os.path.realpath(folder))

    def find(self, path: object) -> Path | None:
        """The regular file in the folder that a path from outside leads to, links resolved; None for all else."""
        if not isinstance(path, str) or not os.path.normpath(path).startswith(f"{self.folder}{os.sep}"):
            return None  # before the disk is asked, so that nobody learns which files there are elsewhere
        try:
            real = Path(os.path.realpath(path, strict=True))
            return real if real.is_relative_to(self.folder) and stat.S_ISREG(real.stat().st_mode) else None
        except (OSError, ValueError):  # missing, or a name that no file can have
            return None

    def read(self, path: str | None) -> bytes | None:
        """The file that `find` finds, cut just above `MAX_UPLOAD_BYTES`; None where there is none."""
        if (found := self.find(path)) is None:
            return None
        with open(found, "rb") as file:
            return file.read(MAX_UPLOAD_BYTES + 1)

    def tidy(self) -> None:
        """Remove files older than `KEPT_S`, and the oldest of the others beyond `MAX_STORED_BYTES`."""
        files = []
        for path in (Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names):
            with contextlib.suppress(FileNotFoundError):  # removed, or given its name by gradio, since
                info = path.lstat()
                files.append((info.st_mtime, path, max(info.st_size, MIN_COUNTED_BYTES)))
        stored, oldest = 0, time.time() - KEPT_S
        for modified, path, size in sorted(files, reverse=True):
            stored += size
            if stored > MAX_STORED_BYTES or modified < oldest:
                path.unlink(missing_ok=True)
                if path.parent != self.folder:  # gradio makes a folder for each
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()
