"""Read from the EXIF data of a photograph when and where it was taken."""

import re
from contextlib import suppress
from datetime import datetime
from typing import Any

import PIL.Image
from PIL.ExifTags import GPS, IFD, Base

FIRST_PHOTOGRAPH_YEAR = 1826  # year of the oldest surviving photograph; earlier dates must be errors


def read_exif_date_and_location(image: PIL.Image.Image) -> tuple[datetime | None, float | None, float | None]:
    """Read from the EXIF data of a picture when and where it was taken.

    Args:
        image: An image that was opened from a file.

    Returns:
        Tuple (date and time, latitude, longitude). The date and time are in the camera's local time. Latitude and
        longitude are in degrees, negative in the south and in the west. A missing or invalid value is None.
    """
    taken, position, dates, exif = None, (None, None), [], PIL.Image.Exif()
    # Each value is read in a `suppress` block of its own, because PIL raises a dozen kinds of errors for invalid EXIF
    # data, and an invalid value must not hide the valid values.
    with suppress(Exception):
        exif = image.getexif()
    with suppress(Exception):
        dates += map(exif.get_ifd(IFD.Exif).get, (Base.DateTimeOriginal, Base.DateTimeDigitized))
    with suppress(Exception):
        dates.append(exif.get(Base.DateTime))
    for text in reversed(dates):  # a valid date replaces those before it, so the best one (DateTimeOriginal) comes last
        with suppress(Exception):  # dates look like "2023:12:31 23:59:59"; some programs write / or . instead of colons
            date = datetime.fromisoformat(re.sub("[:/.]", "-", text[:10]) + text[10:19])
            taken = date if date.year >= FIRST_PHOTOGRAPH_YEAR else taken
    with suppress(Exception):
        gps = exif.get_ifd(IFD.GPSInfo)
        latitude = _to_degrees(gps[GPS.GPSLatitude], {"N": 1, "S": -1}[gps[GPS.GPSLatitudeRef]], 90)
        longitude = _to_degrees(gps[GPS.GPSLongitude], {"E": 1, "W": -1}[gps[GPS.GPSLongitudeRef]], 180)
        # A phone that does not know its position writes 0, 0, so these coordinates are ignored.
        position = (latitude, longitude) if latitude or longitude else position
    return taken, *position


def _to_degrees(parts: Any, sign: int, limit: int) -> float:
    """Convert an EXIF coordinate to signed decimal degrees.

    Args:
        parts: PIL's value of the coordinate: degrees, optionally followed by minutes and seconds.
        sign: 1 for north and east, -1 for south and west.
        limit: Largest valid number of degrees.

    Returns:
        The coordinate in decimal degrees.

    Raises:
        ValueError: If the coordinate is negative, above the limit or NaN. Values of an unexpected type raise other
            errors, which the caller suppresses, too.
    """
    parts = parts if isinstance(parts, tuple) else (parts / 1,)  # PIL returns degrees without minutes as one number
    degrees = sum(float(part) / unit for part, unit in zip(parts, (1, 60, 3600)[: len(parts) or 1], strict=True))
    if not 0 <= degrees <= limit:  # written with `not`, so that it also refuses NaN
        raise ValueError(f"A coordinate must be 0 to {limit} degrees, got {degrees}.")
    return sign * degrees
