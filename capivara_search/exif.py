"""Read the date and the position of a photograph from its EXIF data."""

import re
from contextlib import suppress
from datetime import datetime
from typing import Any

import PIL.Image
from PIL.ExifTags import GPS, IFD, Base

FIRST_PHOTOGRAPH_YEAR = 1826  # dates before the oldest surviving photograph are ignored


def read_exif(image: PIL.Image.Image) -> tuple[datetime | None, float | None, float | None]:
    """Return when and where a picture was taken.

    Programs write invalid values into EXIF data, for which PIL raises a dozen kinds of errors. Invalid values become
    None.

    Args:
        image: A loaded image.

    Returns:
        The date in the camera's local time, and latitude and longitude in degrees; south and west are negative.
    """
    taken, position, dates, exif = None, (None, None), [], PIL.Image.Exif()
    with suppress(Exception):
        exif = image.getexif()
    with suppress(Exception):
        dates += map(exif.get_ifd(IFD.Exif).get, (Base.DateTimeOriginal, Base.DateTimeDigitized))
    with suppress(Exception):
        dates.append(exif.get(Base.DateTime))
    for text in reversed(dates):  # the last valid date counts, and the original date comes last
        with suppress(Exception):  # dates look like "2023:12:31 23:59:59"; some programs write / or . for the colons
            date = datetime.fromisoformat(re.sub("[:/.]", "-", text[:10]) + text[10:19])
            taken = date if date.year >= FIRST_PHOTOGRAPH_YEAR else taken
    with suppress(Exception):
        gps = exif.get_ifd(IFD.GPSInfo)
        latitude = _to_degrees(gps[GPS.GPSLatitude], {"N": 1, "S": -1}[gps[GPS.GPSLatitudeRef]], 90)
        longitude = _to_degrees(gps[GPS.GPSLongitude], {"E": 1, "W": -1}[gps[GPS.GPSLongitudeRef]], 180)
        # A phone that does not know its position writes 0, 0.
        position = (latitude, longitude) if latitude or longitude else position
    return taken, *position


def _to_degrees(parts: Any, sign: int, limit: int) -> float:
    """Convert degrees, degrees and minutes, or degrees, minutes and seconds to signed degrees.

    Raises ValueError if the result is above the limit, and whatever PIL's fractions raise.
    """
    parts = parts if isinstance(parts, tuple) else (parts / 1,)  # PIL returns a single number for degrees alone
    degrees = sum(float(part) / unit for part, unit in zip(parts, (1, 60, 3600)[: len(parts) or 1], strict=True))
    if not 0 <= degrees <= limit:  # written so that NaN fails, too
        raise ValueError(f"must be 0 to {limit}, got {degrees}")
    return sign * degrees
