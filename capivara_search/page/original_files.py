"""The files of the pictures: only those that are rows of the index, and only as pictures.

OriginalFiles(index, decoder).view("/home/ana/Fotos/praia.jpg")  # JPEG of at most 1600 pixels
"""

import mimetypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from capivara_common.image_files import BadImage, open_regular_file
from capivara_search.page.decoder import Decoder
from capivara_search.page.guard import Refusal
from capivara_search.picture_files import contents
from capivara_search.show import opened_by_system

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex


class OriginalFiles:
    """What is read from the disk for visitors. Every path is looked up first; one that is no row gets one answer."""

    def __init__(self, index: "PictureIndex", decoder: Decoder):
        self._index, self._decoder = index, decoder

    def thumbnail(self, path: str) -> bytes:
        """WebP of a row. Raises Refusal where there is none."""
        if path and (found := self._index.thumbnail(path)):
            return found
        raise Refusal("gone", 404)

    def _open(self, path: str) -> BinaryIO:
        """The file of a row, below a folder that `add` was told of on this machine. Raises Refusal."""
        if not path or self._index.row(path) is None:
            raise Refusal("gone", 404)
        try:
            return open_regular_file(path, repr(path), list(self._index.asked_folders().values()))
        except (BadImage, OSError, ValueError):
            raise Refusal("no_original", 404) from None

    def view(self, path: str) -> tuple[bytes, str]:
        """A row's picture, large, and its media type; its thumbnail where the file can't be read. Raises Refusal."""
        try:
            with self._open(path) as file:
                return self._decoder.view(contents(file), path), "image/jpeg"
        except (BadImage, Refusal, OSError):
            return self.thumbnail(path), "image/webp"

    def is_there(self, path: str) -> bool:
        """Whether the file of a row is on this machine. Raises Refusal where the path is no row."""
        try:
            self._open(path).close()
        except Refusal as refusal:
            if refusal.code == "gone":
                raise
            return False
        return True

    def file(self, path: str) -> tuple[BinaryIO, int, str]:
        """The file of a row, open, with its bytes and its media type. Raises Refusal where it is no picture, or no row.

        What can't be shown as a picture is not given away: what was decoded and what is sent are one open file.
        """
        file = self._open(path)
        try:
            self._decoder.view(contents(file), path)
            file.seek(0)
        except (BadImage, OSError):
            file.close()
            raise Refusal("no_original", 404) from None
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        return file, os.fstat(file.fileno()).st_size, kind

    def show(self, path: str) -> None:
        """Open the folder of a row in the file manager of this machine. Raises Refusal where that can't be done."""
        if not self.is_there(path) or not Path(path).is_absolute():
            raise Refusal("no_original", 404)
        is_mac = sys.platform == "darwin"  # where a folder may be a program: `open -R` shows the file in it
        if not opened_by_system(path if is_mac else str(Path(path).parent), options=["-R"] if is_mac else []):
            raise Refusal("no_file_manager", 501)
