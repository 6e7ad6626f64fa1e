"""Read picture files: decode them upright, with their metadata and a thumbnail.

Each file is opened once, by `capivara_common.image_files`, which checks it and limits its size. A file that can't be
read raises BadImage, "reason: detail", whose reasons messages.yaml translates.
"""

import io
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import PIL.Image
from PIL.Image import Resampling

from capivara_common.image_files import (
    LARGE_IMAGE_LOCK,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    BadImage,
    check_byte_count,
    decode_upright,
    exif_orientation,
    open_image,
    open_regular_file,
)
from capivara_search.exif import read_exif
from capivara_search.folder_scan import RAW_SUFFIXES, FileState, to_absolute_path, to_bad_image
from capivara_search.messages import localized_error

# First bytes of JPEG and PNG files. A file that starts so is no RAW file, even if its name has the suffix of one.
NON_RAW_FILE_STARTS = (b"\xff\xd8\xff", b"\x89PNG")
TIFF_SUBFILE_TYPE = 254  # TIFF tag; its lowest bit marks a thumbnail of another image in the file
# Maximum size of a picture; the best camera phones take 16,320 x 12,240 pixels. Pictures above `MAX_IMAGE_PIXELS` are
# decoded one at a time and reduced at once.
MAX_PICTURE_PIXELS = 200_000_000
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its short side then still has this many times the pixels of the
# model's input. Embeddings then have a cosine of 0.999 with those of the full size; with a factor of 3, one photograph
# of 40 has only 0.997.
REDUCED_DECODE_FACTOR = 4
THUMBNAIL_SIDE = 256  # pixels of the longer side
# Measured on pictures of OpenMoji with the demo model: WebP at quality 90 takes 4.0 kB, and the embedding of the
# thumbnail has a cosine of 0.994 with that of the picture. JPEG at quality 85 takes 7.3 kB and reaches 0.950. The page
# searches with thumbnails, so a thumbnail has to find its picture.
THUMBNAIL_QUALITY = 90
# Encoder effort of WebP. A photograph takes 2.5 ms; the default of 4 takes 16 ms and saves only 1 % of the bytes.
THUMBNAIL_WEBP_METHOD = 2


@dataclass(frozen=True)
class Picture:
    """A decoded picture with its metadata."""

    digest: str  # BLAKE2b-128 digest of the file, in hexadecimal
    width: int  # pixels, after rotating the picture upright; of a RAW file: of the RAW picture, not of its preview
    height: int
    taken: datetime | None  # from the EXIF data, in the camera's local time
    latitude: float | None  # degrees
    longitude: float | None
    image: PIL.Image.Image  # RGB, upright, on a white background, for the model's image processor
    thumbnail: bytes  # WebP file, upright, longer side at most `THUMBNAIL_SIDE` pixels


def read_picture(
    file: FileState,
    image_size: int = 224,
    resize_filter: int | None = None,
    folders: Sequence[str | Path] | None = None,
) -> Picture:
    """Read a picture file once: digest, size, EXIF data, resized image and thumbnail. Thread-safe.

    A JPEG is decoded at reduced size if it is large enough (`REDUCED_DECODE_FACTOR`).

    Args:
        file: A file found by `find_pictures`.
        image_size: Side of the model's input in pixels. The image is resized as the model's image processor does it.
        resize_filter: PIL filter of an image processor that resizes both sides to `image_size`. None: the short side is
            resized to `image_size`, with the bicubic filter.
        folders: Real paths of folders. The real path of the file must lie in one of them. None: no check.

    Returns:
        The picture.

    Raises:
        BadImage: If the file can't be read, is damaged, too large or no longer exists.
    """
    data = _read_picture_bytes(file.path, folders)
    opened, size = _open_undecoded(data, file.path)
    shape = opened.size
    with LARGE_IMAGE_LOCK if shape[0] * shape[1] > MAX_IMAGE_PIXELS else nullcontext():
        min_short_side = max(REDUCED_DECODE_FACTOR * image_size, THUMBNAIL_SIDE)
        pixels = flatten_on_white(decode_upright(opened, "the file", min_short_side))
        if exif_orientation(opened) > 4:  # these orientations swap width and height
            size, shape = size[::-1], shape[::-1]
        image = resize_short_side(pixels, shape, image_size, resize_filter)
        small, thumbnail = limit_long_side(pixels, THUMBNAIL_SIDE), io.BytesIO()
        small.save(thumbnail, "WEBP", quality=THUMBNAIL_QUALITY, method=THUMBNAIL_WEBP_METHOD)
    digest = blake2b(data, digest_size=16).hexdigest()
    return Picture(digest, *size, *read_exif(opened), image, thumbnail.getvalue())


def open_query_picture(path: str | Path) -> PIL.Image.Image:
    """Decode a picture to search with: full size, upright, RGB, on a white background.

    Raises:
        ValueError: If the picture can't be read; the message names the path and the reason.
    """
    path = to_absolute_path(path)
    try:
        return decode_picture(_read_picture_bytes(path), str(path))
    except BadImage as error:
        raise localized_error(ValueError, "bad_picture", path=path, reason=error) from error


def decode_picture(
    data: bytes, name: str, max_pixels: int = MAX_PICTURE_PIXELS, min_short_side: int = 0
) -> PIL.Image.Image:
    """Decode the bytes of a picture file to upright RGB on a white background.

    Args:
        data: Content of the file.
        name: File name. The suffix of a RAW format selects RAW decoding, unless the content is another image, such as
            a JPEG or TIFF.
        max_pixels: Maximum number of pixels.
        min_short_side: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if its short side keeps this many pixels.
            0: full size.

    Returns:
        The image.

    Raises:
        BadImage: If the file is damaged, too large or no picture.
    """
    return flatten_on_white(decode_upright(_open_undecoded(data, name, max_pixels)[0], "the file", min_short_side))


def _read_picture_bytes(path: str | Path, folders: Sequence[str | Path] | None = None) -> bytes:
    try:
        with open_regular_file(path, "it", folders) as file:
            return read_bounded(file)
    except OSError as error:
        raise to_bad_image(error) from error


def read_bounded(file: BinaryIO) -> bytes:
    """Read an open file.

    Raises:
        BadImage: If the file is empty or has more than `MAX_IMAGE_BYTES` bytes.
    """
    return check_byte_count(file.read(MAX_IMAGE_BYTES + 1), "the file")


def _open_undecoded(
    data: bytes, name: str, max_pixels: int = MAX_PICTURE_PIXELS
) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Return the image with only its header read, and the size of the picture. A RAW file yields its JPEG preview."""
    is_raw = name.lower().endswith(RAW_SUFFIXES) and not data.startswith(NON_RAW_FILE_STARTS)
    preview, size = (extract_raw_preview(data) if is_raw else None) or (data, None)
    image = open_image(preview, "the file", max_pixels, hint="")
    if is_raw and size is None and image.format == "TIFF" and image.tag_v2.get(TIFF_SUBFILE_TYPE, 0) & 1:
        # A damaged RAW file, or one of a camera that LibRaw does not know, begins with a thumbnail of the picture.
        raise BadImage("unreadable image", "the RAW file is damaged, or of an unknown camera; export it as JPEG")
    return image, size or image.size


def extract_raw_preview(data: bytes) -> tuple[bytes, tuple[int, int]] | None:
    """Return the largest JPEG preview of a RAW file, and (width, height) of the RAW picture before rotation.

    LibRaw adds EXIF data to a preview that has none.

    Args:
        data: Content of the file.

    Returns:
        Preview and size. None if LibRaw does not recognize the file as RAW: it may be another image, such as a TIFF.

    Raises:
        BadImage: If there is no such preview.
    """
    import rawpy  # imported late: only users with RAW files need it

    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            sizes, thumb = raw.sizes, raw.extract_thumb()
    except rawpy.LibRawFileUnsupportedError:
        return None
    except Exception as error:  # LibRaw raises its own errors, and errors of memory and files
        reason = error.args[0] if error.args else error
        if isinstance(reason, bytes):  # errors of LibRaw
            reason = reason.decode(errors="replace")
        detail = f"the RAW file has no preview that can be read: {reason}"
        raise BadImage("unreadable image", detail) from error
    if thumb.format != rawpy.ThumbFormat.JPEG:
        raise BadImage("unreadable image", "the RAW file has no JPEG preview; export it as JPEG")
    return thumb.data, (sizes.width, sizes.height)


def flatten_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image to RGB on a white background, as people see it.

    The image processor alone would show the model a black square for a transparent logo.
    """
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def limit_long_side(image: PIL.Image.Image, max_side: int) -> PIL.Image.Image:
    """Reduce an image so that its longer side has at most `max_side` pixels.

    Args:
        image: The image.
        max_side: Maximum length of the longer side, in pixels.

    Returns:
        The reduced image; the image itself if it is small enough.
    """
    long = max(image.size)
    if long <= max_side:
        return image
    size = tuple(max(1, round(length * max_side / long)) for length in image.size)
    return image.resize(size, Resampling.BICUBIC, reducing_gap=2.0)


def resize_short_side(
    image: PIL.Image.Image, size: tuple[int, int], image_size: int, resize_filter: int | None = None
) -> PIL.Image.Image:
    """Resize an image as the model's image processor does; a small image is returned unchanged.

    Args:
        image: The image, decoded at full or reduced size.
        size: (width, height) of the image in its file. It determines the proportions, because the sides of an image
            that was decoded at reduced size are rounded up.
        image_size: Length of the short side in pixels. Images whose short side is not longer are returned unchanged.
        resize_filter: PIL filter of an image processor that resizes both sides to `image_size`. None: only the short
            side gets this length, with the bicubic filter.

    Returns:
        The resized image.
    """
    short, long = min(size), max(size)
    if short <= image_size:
        return image
    long_side = int(image_size * long / short)  # truncated, as the image processor does
    new_size, resample = (
        ((image_size, long_side) if size[0] <= size[1] else (long_side, image_size)),
        Resampling.BICUBIC,
    )
    if resize_filter is not None:
        new_size, resample = (image_size, image_size), resize_filter
    scale = round(size[0] / image.width)  # reduction by the JPEG decoder: 1, 2, 4 or 8
    return image.resize(new_size, resample, box=(0, 0, size[0] / scale, size[1] / scale))
