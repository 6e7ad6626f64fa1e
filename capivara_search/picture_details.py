"""What a picture says of itself (EXIF): which way is up, when it was taken and where; and the preview in a RAW file.

    details = read_details(PIL.Image.open("IMG_1234.jpg").getexif())
    print(details.taken, details.latitude, details.longitude)

Cameras, phones and programs write all kinds of things there. What is no date or no place is None, and never an error.
"""

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import PIL.Image
from PIL.ExifTags import GPS, IFD, Base

from capivara_common.image_files import BadImage

try:
    import rawpy  # extra `search`
except ImportError:
    rawpy = None

# Names end so: Adobe and phones, Canon, Nikon, Sony, Panasonic, Olympus, Fujifilm, Pentax, Samsung.
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".rw2", ".orf", ".raf", ".pef", ".srw")
INSTALL = 'pip install "modeling-capivara[search]"'
FIRST_PHOTOGRAPH = 1826  # year
DATE = re.compile(r"(\d{4})[:/.-](\d\d)[:/.-](\d\d)[ T](\d\d):(\d\d):(\d\d)", re.ASCII)
ORIENTATIONS = range(1, 9)
RAW_ORIENTATIONS = {3: 3, 5: 8, 6: 6}  # LibRaw's `flip` -> EXIF orientation


@dataclass(frozen=True)
class Details:
    """What the EXIF data say.

    Attributes:
        orientation: 1 to 8, of which 1 is upright; None where they don't say.
        taken: when, in the camera's local time.
        latitude: degrees, the south is negative.
        longitude: degrees, the west is negative.
    """

    orientation: int | None = None
    taken: datetime | None = None
    latitude: float | None = None
    longitude: float | None = None


@dataclass(frozen=True)
class Preview:
    """The picture that a camera has put into its RAW file.

    Attributes:
        data: an image file.
        width: pixels of the RAW picture itself, as it lies in the file.
        height: pixels.
        orientation: 1 to 8, of a preview that does not say so itself.
    """

    data: bytes
    width: int
    height: int
    orientation: int


def read_details(exif: PIL.Image.Exif) -> Details:
    """What EXIF data say, as far as it can be read."""
    camera, place = _block(exif, IFD.Exif), _block(exif, IFD.GPSInfo)
    orientation = _tag(exif, Base.Orientation)
    dates = (_tag(camera, Base.DateTimeOriginal), _tag(camera, Base.DateTimeDigitized), _tag(exif, Base.DateTime))
    latitude = _degrees(_tag(place, GPS.GPSLatitude), _tag(place, GPS.GPSLatitudeRef), "NS", 90)
    longitude = _degrees(_tag(place, GPS.GPSLongitude), _tag(place, GPS.GPSLongitudeRef), "EW", 180)
    if latitude is None or longitude is None or latitude == longitude == 0:  # 0, 0 is what a phone without a fix writes
        latitude = longitude = None
    return Details(
        orientation if orientation in ORIENTATIONS else None,
        next((date for date in map(_date, dates) if date), None),
        latitude,
        longitude,
    )


def raw_exif(data: bytes) -> PIL.Image.Exif:
    """The EXIF data of a RAW file that is built as TIFF is, as those of most cameras are; else none."""
    exif = PIL.Image.Exif()
    if data[:2] in (b"II", b"MM"):
        # Olympus and Panasonic have letters of their own where TIFF has 42.
        magic = b"II*\0" if data[:2] == b"II" else b"MM\0*"
        try:
            exif.load(magic + data[4:])
        except Exception:  # PIL raises a dozen kinds
            return PIL.Image.Exif()
    return exif


def raw_preview(data: bytes) -> Preview:
    """The largest preview in a RAW file.

    Raises:
        BadImage: rawpy is not installed, it is no RAW file, or one without a preview.
    """
    if rawpy is None:
        raise BadImage("needs rawpy", f"RAW files of cameras are read by rawpy, which is not installed: {INSTALL}")
    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            sizes = raw.sizes
            thumb = raw.extract_thumb()
    except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError) as error:
        raise BadImage("no preview", "the RAW file holds no preview that can be read; export it as JPEG") from error
    except Exception as error:  # LibRaw's own, and those of memory and files
        text = error.args[0] if error.args else error
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        raise BadImage("damaged picture", f"the RAW file can't be read: {text}") from error
    preview = thumb.data if thumb.format == rawpy.ThumbFormat.JPEG else _ppm(thumb.data)
    return Preview(preview, sizes.width, sizes.height, RAW_ORIENTATIONS.get(sizes.flip, 1))


def _ppm(pixels: np.ndarray) -> bytes:
    """(height, width, 3), uint8, as an image file, which goes the way of all image files."""
    height, width = pixels.shape[:2]
    return f"P6 {width} {height} 255\n".encode() + np.ascontiguousarray(pixels).tobytes()


def _block(exif: PIL.Image.Exif, tag: int) -> Any:
    try:
        return exif.get_ifd(tag)
    except Exception:  # PIL raises a dozen kinds
        return {}


def _tag(block: Any, tag: int) -> Any:
    try:
        return block.get(tag)
    except Exception:  # a value is decoded when it is asked for
        return None


def _text(value: Any) -> str:
    value = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    return value.strip("\0 ") if isinstance(value, str) else ""


def _date(value: Any) -> datetime | None:
    """Of `2023:12:31 23:59:59` and its like; None where there is no such moment, or photographs were none yet."""
    if not (match := DATE.match(_text(value))):
        return None
    try:
        date = datetime(*map(int, match.groups()))
    except ValueError:
        return None
    return date if date.year >= FIRST_PHOTOGRAPH else None


def _degrees(value: Any, side: Any, sides: str, limit: int) -> float | None:
    """Degrees, minutes and seconds with the letter of their side, as degrees; None without the letter."""
    letter = _text(side).upper()[:1]
    if not letter or letter not in sides or not isinstance(value, Iterable) or isinstance(value, str | bytes):
        return None
    try:
        parts = [float(part) for part in value]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not 1 <= len(parts) <= 3 or not all(math.isfinite(part) and part >= 0 for part in parts):
        return None
    degrees = sum(part / unit for part, unit in zip(parts, (1, 60, 3600), strict=False))
    if degrees > limit:
        return None
    return -degrees if letter == sides[1] else degrees
