"""What a picture says of itself (EXIF): when and where it was taken, and how it is turned.

Programs write anything into EXIF data; what is no date or place is None.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import PIL.Image
from PIL.ExifTags import GPS, IFD, Base

FIRST_PHOTOGRAPH = 1826  # year
DATE = re.compile(r"(\d{4})[:/.-](\d\d)[:/.-](\d\d)[ T](\d\d):(\d\d):(\d\d)", re.ASCII)


@dataclass(frozen=True)
class Details:
    """What the EXIF data say."""

    orientation: int | None = None  # 1 to 8, of which 1 is upright; None where they don't say
    taken: datetime | None = None  # when, in the camera's local time
    latitude: float | None = None  # degrees, the south is negative
    longitude: float | None = None  # degrees, the west is negative


def read_details(exif: PIL.Image.Exif) -> Details:
    """What EXIF data say, as far as it can be read."""
    camera, place = _tag(exif, IFD.Exif), _tag(exif, IFD.GPSInfo)
    orientation = _tag(exif, Base.Orientation)
    dates = (_tag(camera, Base.DateTimeOriginal), _tag(camera, Base.DateTimeDigitized), _tag(exif, Base.DateTime))
    latitude = _degrees(_tag(place, GPS.GPSLatitude), _tag(place, GPS.GPSLatitudeRef), "NS", 90)
    longitude = _degrees(_tag(place, GPS.GPSLongitude), _tag(place, GPS.GPSLongitudeRef), "EW", 180)
    if latitude is None or longitude is None or latitude == longitude == 0:  # 0, 0 is what a phone without a fix writes
        latitude = longitude = None
    return Details(
        orientation if orientation in range(1, 9) else None,
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


def _tag(block: Any, tag: int) -> Any:
    try:
        return block.get_ifd(tag) if tag in (IFD.Exif, IFD.GPSInfo) else block.get(tag)
    except Exception:  # PIL raises a dozen kinds; a value is decoded when it is asked for
        return {} if tag in (IFD.Exif, IFD.GPSInfo) else None


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
