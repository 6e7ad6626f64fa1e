"""Pictures of a report: PNGs in its folder, and the same as data: URIs in its page."""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from caption_data.rows import BadImage
from eval.report_page.files import open_picture

THUMBNAIL = 200  # pixels of the longer side
CSS_PIXELS_PER_PIXEL = 96 / 130  # the figures have 130 dots per inch


@dataclass(frozen=True)
class Picture:
    """What an <img> needs; `file` is the name of its PNG, empty for a thumbnail."""

    uri: str
    alt: str
    width: int
    height: int
    file: str = ""


class Pictures:
    """Draws the figures of a report into its folder and embeds them.

    Args:
        folder: of the report.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._anchors: set[str] = set()

    def anchor(self, *parts: str) -> str:
        """A new name for a file or a place in the page, of letters, digits and dashes alone."""
        plain = re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")[:80] or "part"
        name, number = plain, 2
        while name in self._anchors:
            name, number = f"{plain}-{number}", number + 1
        self._anchors.add(name)
        return name

    def draw(self, anchor: str, alt: str, draw: Callable[[Path], None]) -> Picture:
        """The figure that `draw` writes to the path it is given."""
        path = self.folder / f"{anchor}.png"
        draw(path)
        with Image.open(path) as image:
            width, height = (round(side * CSS_PIXELS_PER_PIXEL) for side in image.size)
        return Picture(_uri(path.read_bytes(), "png"), alt, width, height, path.name)


class Thumbnails:
    """Small copies of a folder's pictures, each opened once; those that can't be shown are in `refused`.

    Args:
        folder: resolved; nothing outside is opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refused: dict[str, str] = {}
        self._small: dict[str, Image.Image | None] = {}
        self._uris: dict[str, str] = {}

    def image(self, inside: str) -> Image.Image | None:
        if inside not in self._small:
            try:
                self._small[inside] = open_picture(self.folder, inside)
                self._small[inside].thumbnail((THUMBNAIL, THUMBNAIL))
            except ValueError as error:  # what a gallery's path says of this machine is not shown
                self._small[inside] = None
                self.refused[inside] = error.reason if isinstance(error, BadImage) else str(error)
        return self._small[inside]

    def picture(self, inside: str, alt: str) -> Picture | None:
        """As JPEG, encoded anew: nothing of the file but its pixels reaches the page."""
        image = self.image(inside)
        if image is None:
            return None
        if inside not in self._uris:
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=82)
            self._uris[inside] = _uri(encoded.getvalue(), "jpeg")
        return Picture(self._uris[inside], alt, *image.size)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
