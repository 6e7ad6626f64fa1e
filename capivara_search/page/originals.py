"""The files of the pictures: only those that are rows of the index, and only as pictures.

originals = Originals([index], decoder)
originals.view("/home/ana/Fotos/praia.jpg")  # JPEG of at most 1600 pixels
"""

import contextlib
import mimetypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from capivara_search.common.image_files import BadImage, open_regular_file
from capivara_search.page.decoder import Decoder
from capivara_search.page.turns import Refusal
from capivara_search.results import Hit

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

MANAGER_S = 5  # for a file manager to answer; one that takes longer is opening


class Originals:
    """What is read from the disk for visitors. Every path is looked up first; one that is no row gets one answer.

    Args:
        indexes: whose rows may be opened.
        decoder: that decodes them.
    """

    def __init__(self, indexes: Sequence["PictureIndex"], decoder: Decoder):
        self._indexes, self._decoder = indexes, decoder

    def row(self, path: str) -> Hit:
        """The row of a path. Raises Refusal where there is none."""
        for index in self._indexes:
            if path and (row := index.row(path)) is not None:
                return row
        raise Refusal("gone", 404)

    def thumbnail(self, path: str) -> bytes:
        """WebP of a row. Raises Refusal where there is none."""
        for index in self._indexes:
            if path and (found := index.thumbnail(path)):
                return found
        raise Refusal("gone", 404)

    def _is_within(self, path: str) -> bool:
        """Whether a row's file lies in a folder that was added, links followed: since then it may have become one."""
        real = os.path.realpath(path)
        folders = {os.path.realpath(folder) for index in self._indexes for folder in index.folders()}
        return any(real.startswith(os.path.join(folder, "")) for folder in folders)

    def view(self, path: str) -> tuple[bytes, str]:
        """A picture, large, and its media type; its thumbnail where the file can't be read any more.

        Raises:
            Refusal: the path is no row.
        """
        self.row(path)
        try:
            if not self._is_within(path):
                raise BadImage("unreadable image", "it leads out of the folders")
            return self._decoder.view(path), "image/jpeg"
        except BadImage:
            return self.thumbnail(path), "image/webp"

    def is_there(self, path: str) -> bool:
        """Whether the file of a row is on this machine. Raises Refusal where the path is no row."""
        self.row(path)
        return os.path.isfile(path) and self._is_within(path)

    def file(self, path: str) -> tuple[BinaryIO, int, str]:
        """The file of a row, open, with its bytes and its media type. Raises Refusal where it is no picture, or no row.

        An index may be somebody else's, and name any file: what can't be shown as a picture is not given away.
        """
        if not self.is_there(path):
            raise Refusal("no_original", 404)
        try:
            self._decoder.view(path)
            file = open_regular_file(path, repr(path))
        except (BadImage, OSError):
            raise Refusal("no_original", 404) from None
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        return file, os.fstat(file.fileno()).st_size, kind

    def show(self, path: str) -> None:
        """Open the folder of a row in the file manager of this machine. Raises Refusal where that can't be done."""
        if not self.is_there(path) or not Path(path).is_absolute():
            raise Refusal("no_original", 404)
        for command in _manager_commands(path):
            with contextlib.suppress(OSError):
                # Nothing of the path is a flag: it is absolute, or part of an address.
                opened = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
                try:
                    if opened.wait(MANAGER_S) == 0 or sys.platform == "win32":  # Explorer ends with 1
                        return
                except subprocess.TimeoutExpired:
                    return
        raise Refusal("no_file_manager", 501)


def _manager_commands(path: str) -> list[list[str]]:
    """Commands that show a file in its folder, the best first."""
    if sys.platform == "darwin":
        return [["open", "-R", path]]
    if sys.platform == "win32":
        return [["explorer", f"/select,{path}"]]
    uri = "file://" + quote(os.fsencode(path), safe="/")  # a comma would part it in two
    service, manager = "org.freedesktop.FileManager1", "/org/freedesktop/FileManager1"
    shown = ["dbus-send", "--session", "--print-reply", f"--dest={service}", manager, f"{service}.ShowItems"]
    return [[*shown, f"array:string:{uri}", "string:"], ["xdg-open", str(Path(path).parent)]]
