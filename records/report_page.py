"""Pages for people: one HTML file that needs nothing else, and its pictures beside it as PNGs.

    pictures = Pictures(Path("report"))
    picture = pictures.draw("bars", "Bars of …", lambda path: plot_bars(rows, "", path))
    page = render_page(Path("eval/report.html.j2"), sections=[picture])

A template extends `report_page.html.j2`, which has the look, and macros for pictures and tables.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

CSS_PIXELS_PER_PIXEL = 96 / 130  # the figures have 130 dots per inch


@dataclass(frozen=True)
class Picture:
    """What an <img> needs; `file` is the name of its PNG, empty for a thumbnail."""

    uri: str
    alt: str
    width: int
    height: int
    file: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than a text."""

    text: str
    better: bool | None = None  # coloured as a gain where True, as a loss where False
    is_code: bool = False  # a name, such as a path
    notes: Sequence[str] = ()  # lines below it


class Pictures:
    """Draws the figures of a page into its folder and embeds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._anchors: set[str] = set()

    def anchor(self, *parts: str) -> str:
        """A new name for a file or a link within the page, of letters, digits and dashes alone."""
        plain = re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")[:80] or "part"
        name, number = plain, 2
        while name in self._anchors:
            name, number = f"{plain}-{number}", number + 1
        self._anchors.add(name)
        return name

    def draw(self, anchor: str, alt: str, draw: Callable[[Path], None]) -> Picture:
        """The figure that `draw` writes to the path it is given, in CSS pixels."""
        path = self.folder / f"{anchor}.png"
        draw(path)
        with Image.open(path) as image:
            width, height = (round(side * CSS_PIXELS_PER_PIXEL) for side in image.size)
        return Picture(_uri(path.read_bytes(), "png"), alt, width, height, path.name)


def thumbnail(image: Image.Image, alt: str) -> Picture:
    """A small picture as JPEG, encoded anew: nothing of its file but the pixels reaches the page."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=82)
    return Picture(_uri(encoded.getvalue(), "jpeg"), alt, *image.size)


def render_page(template: Path, **parts: Any) -> str:
    """The HTML of a template that extends `report_page.html.j2`; texts among its `parts` are escaped, as anybody's.

    Raises:
        jinja2.UndefinedError: the template asks for a part that is not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).render(**parts)
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair can't be written


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
