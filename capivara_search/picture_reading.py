"""Read picture files: decode them, rotate them upright, read their metadata and make a thumbnail.

Each file is opened only once, by `capivara_common.image_files`, which validates the file and limits its size. If a file
can't be read, BadImage is raised. Its text is "reason: detail", and messages.yaml translates the reason.
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
    check_and_open_image_without_decoding,
    check_byte_count,
    decode_upright,
    exif_orientation,
    open_regular_file_safe_from_link_swaps,
)
from capivara_search.exif import read_exif_date_and_location
from capivara_search.folder_scan import RAW_SUFFIXES, FileState, convert_os_error_to_bad_image, to_absolute_path
from capivara_search.messages import make_error_from_code

# First bytes of JPEG and PNG files. A file that begins with these bytes is not decoded as RAW, even if its name has the
# suffix of a RAW format by mistake.
NON_RAW_FILE_STARTS = (b"\xff\xd8\xff", b"\x89PNG")
# TIFF tag that says what an image in a file shows. Its lowest bit is set if the image is only a thumbnail of another
# image.
TIFF_SUBFILE_TYPE = 254
# Maximum number of pixels of a picture, enough for phones whose cameras take 16,320 x 12,240 pixels. To limit the
# memory, pictures with more than `MAX_IMAGE_PIXELS` pixels are decoded one at a time and reduced immediately.
MAX_PICTURE_PIXELS = 200_000_000
# To save time, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size. The reduced short side must be at least this many
# times as long as the side of the model's input. The embedding then has a cosine of 0.999 with the embedding of the
# full-size picture. With a factor of 3, the cosine was only 0.997 for one of 40 photographs.
REDUCED_DECODE_FACTOR = 4
THUMBNAIL_SIDE = 256  # pixels of the longer side
# The web page searches with thumbnails, so the embedding of a thumbnail must be close to the embedding of its picture.
# Measured on pictures of OpenMoji with the model that `make demo` trains: WebP at quality 90 takes 4.0 kB, and the
# cosine between both embeddings is 0.994. JPEG at quality 85 takes 7.3 kB, and the cosine is 0.950.
THUMBNAIL_QUALITY = 90
# Effort of the WebP encoder, from 0 to 6. With 2, encoding the thumbnail of a photograph takes 2.5 ms. The default of 4
# takes 16 ms and saves only 1 % of the bytes.
THUMBNAIL_WEBP_METHOD = 2


@dataclass(frozen=True)
class Picture:
    """Everything that an index needs from a picture file: the resized image for the model, a thumbnail and metadata.

    The metadata are the digest of the file, the size in pixels, and the EXIF date and location.
    """

    digest: str  # BLAKE2b-128 digest of the file's content, in hexadecimal
    # Width and height in pixels after rotating the picture upright. For a RAW file, the size of the RAW picture, not of
    # the preview in the file.
    width: int
    height: int
    taken: datetime | None  # EXIF date, in the camera's local time
    latitude: float | None  # degrees, from the EXIF data; south is negative
    longitude: float | None  # degrees, from the EXIF data; west is negative
    image: PIL.Image.Image  # resized for the model's image processor: RGB, upright, on a white background
    thumbnail: bytes  # WebP file, upright, longer side at most `THUMBNAIL_SIDE` pixels


def read_picture_for_indexing(
    file: FileState,
    image_size: int = 224,
    resize_filter: int | None = None,
    folders: Sequence[str | Path] | None = None,
) -> Picture:
    """Read a picture file for an index: its digest, its metadata, a thumbnail, and the image resized for the model.

    This function is thread-safe.

    Args:
        file: Path, size and modification time of the file.
        image_size: Side of the model's input in pixels.
        resize_filter: PIL filter, if the model's image processor resizes both sides to `image_size`. None: the short
            side becomes `image_size` (bicubic), and the proportions are kept.
        folders: Real paths of the folders that may be read. The real path of the file must lie in one of them. None:
            any location is allowed.

    Returns:
        The decoded picture.

    Raises:
        BadImage: If the file can't be read, is damaged, is too large or no longer exists (reason "gone").
    """
    # `folders` keeps a symbolic link from leading to a file elsewhere.
    data = _read_picture_bytes(file.path, folders)
    opened, size = _open_undecoded_picture_or_raw_preview(data, file.path)
    shape = opened.size
    with LARGE_IMAGE_LOCK if shape[0] * shape[1] > MAX_IMAGE_PIXELS else nullcontext():
        min_short_side = max(REDUCED_DECODE_FACTOR * image_size, THUMBNAIL_SIDE)
        pixels = convert_image_to_rgb_on_white(decode_upright(opened, "the file", min_short_side))
        # Images with the EXIF orientations 5 to 8 are rotated by 90 degrees, so width and height are swapped.
        if exif_orientation(opened) > 4:
            size, shape = size[::-1], shape[::-1]
        image = _resize_like_image_processor(pixels, shape, image_size, resize_filter)
        small, thumbnail = limit_long_side(pixels, THUMBNAIL_SIDE), io.BytesIO()
        small.save(thumbnail, "WEBP", quality=THUMBNAIL_QUALITY, method=THUMBNAIL_WEBP_METHOD)
    digest = blake2b(data, digest_size=16).hexdigest()
    return Picture(digest, *size, *read_exif_date_and_location(opened), image, thumbnail.getvalue())


def open_query_picture(path: str | Path) -> PIL.Image.Image:
    """Read and decode a picture that is used as the query of a search.

    Args:
        path: Path of the picture file.

    Returns:
        The image at full size, upright, RGB, on a white background.

    Raises:
        ValueError: If the picture can't be read; the message names the path and the reason.
    """
    path = to_absolute_path(path)
    try:
        return decode_picture(_read_picture_bytes(path), str(path))
    except BadImage as error:
        raise make_error_from_code(ValueError, "bad_picture", path=path, reason=error) from error


def decode_picture(
    data: bytes, name: str, max_pixels: int = MAX_PICTURE_PIXELS, min_short_side: int = 0
) -> PIL.Image.Image:
    """Decode the bytes of a picture file to an upright RGB image on a white background.

    Args:
        data: Content of the file.
        name: File name, whose suffix tells whether the file is a RAW photo.
        max_pixels: Maximum number of pixels. A larger picture is refused.
        min_short_side: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its short side keeps at least
            this many pixels. 0: full size.

    Returns:
        The image.

    Raises:
        BadImage: If the content is damaged, too large or not a picture.
    """
    opened, _ = _open_undecoded_picture_or_raw_preview(data, name, max_pixels)
    return convert_image_to_rgb_on_white(decode_upright(opened, "the file", min_short_side))


def _read_picture_bytes(path: str | Path, folders: Sequence[str | Path] | None = None) -> bytes:
    """Read the content of a picture file.

    Args:
        path: Path of the file.
        folders: Real paths of the folders that are allowed to be read. None: the location of the file is not checked.

    Returns:
        The content of the file.

    Raises:
        BadImage: If the file can't be read, is empty or too large, or lies outside of the folders.
    """
    try:
        with open_regular_file_safe_from_link_swaps(path, "it", folders) as file:
            return read_bounded(file)
    except OSError as error:
        raise convert_os_error_to_bad_image(error) from error


def read_bounded(file: BinaryIO) -> bytes:
    """Read the whole content of an open file, and refuse an empty or very large file.

    Args:
        file: The file, opened in binary mode.

    Returns:
        The content of the file.

    Raises:
        BadImage: If the file is empty or has more than `MAX_IMAGE_BYTES` bytes.
    """
    return check_byte_count(file.read(MAX_IMAGE_BYTES + 1), "the file")


def _open_undecoded_picture_or_raw_preview(
    data: bytes, name: str, max_pixels: int = MAX_PICTURE_PIXELS
) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Open a picture without decoding its pixels.

    Args:
        data: Content of the file.
        name: File name, whose suffix tells whether the file is a RAW photo.
        max_pixels: Maximum number of pixels. A larger picture is refused.

    Returns:
        Tuple of the opened image, and the (width, height) of the picture before rotation. For a RAW file, the image is
        the JPEG preview in it, but the size is that of the RAW picture.

    Raises:
        BadImage: If the content is damaged, too large or not a picture.
    """
    # A name with a RAW suffix may belong to another image, such as a JPEG or TIFF, which is decoded as such.
    is_raw = name.lower().endswith(RAW_SUFFIXES) and not data.startswith(NON_RAW_FILE_STARTS)
    preview, size = (_extract_raw_preview_and_size(data) if is_raw else None) or (data, None)
    image = check_and_open_image_without_decoding(preview, "the file", max_pixels, hint="")
    if is_raw and size is None and image.format == "TIFF" and image.tag_v2.get(TIFF_SUBFILE_TYPE, 0) & 1:
        # LibRaw can't read this RAW file, because it is damaged or its camera is unknown. PIL reads such a file as a
        # TIFF file, but finds only the thumbnail of the picture.
        raise BadImage("unreadable image", "the RAW file is damaged, or its camera is unknown; export it as JPEG")
    return image, size or image.size


def _extract_raw_preview_and_size(data: bytes) -> tuple[bytes, tuple[int, int]] | None:
    """Extract the largest JPEG preview from a RAW file.

    LibRaw adds EXIF data to a preview that has none.

    Args:
        data: Content of the file.

    Returns:
        Tuple of the content of the preview's JPEG file, and the (width, height) of the RAW picture before rotation.
        None if LibRaw does not recognize the file as RAW, for example because it is a TIFF image.

    Raises:
        BadImage: If the file can't be decoded or contains no JPEG preview.
    """
    import rawpy  # imported late, because most users have no RAW files

    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            sizes, thumb = raw.sizes, raw.extract_thumb()
    except rawpy.LibRawFileUnsupportedError:
        return None
    except Exception as error:  # a damaged file may raise any error, for example a MemoryError or an OSError
        reason = error.args[0] if error.args else error
        if isinstance(reason, bytes):  # LibRaw's own errors have their text as bytes
            reason = reason.decode(errors="replace")
        raise BadImage("unreadable image", f"its RAW preview can't be read ({reason}); export it as JPEG") from error
    if thumb.format != rawpy.ThumbFormat.JPEG:
        raise BadImage("unreadable image", "the RAW file has no JPEG preview; export it as JPEG")
    return thumb.data, (sizes.width, sizes.height)


def convert_image_to_rgb_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image of any mode to RGB, with a white background behind transparent pixels.

    Without the white background, transparent pixels would become black, and the model would see a black logo on a
    transparent background as a black square.
    """
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def limit_long_side(image: PIL.Image.Image, max_side: int) -> PIL.Image.Image:
    """Reduce an image so that its longer side has at most `max_side` pixels. Its proportions are kept.

    Args:
        image: The image.
        max_side: Maximum length of the longer side, in pixels.

    Returns:
        The reduced image, or the image itself if it is small enough.
    """
    long = max(image.size)
    if long <= max_side:
        return image
    size = tuple(max(1, round(length * max_side / long)) for length in image.size)
    return image.resize(size, Resampling.BICUBIC, reducing_gap=2.0)


def _resize_like_image_processor(
    image: PIL.Image.Image, size: tuple[int, int], image_size: int, resize_filter: int | None = None
) -> PIL.Image.Image:
    """Resize an image as the model's image processor would do.

    Args:
        image: The image, which was decoded at full or reduced size.
        size: (width, height) of the image in its file.
        image_size: Length of the short side of the result in pixels.
        resize_filter: PIL filter, if the image processor resizes both sides to `image_size`. None: the short side
            becomes `image_size` (bicubic), and the proportions are kept.

    Returns:
        The resized image, or `image` itself if the short side in `size` has at most `image_size` pixels.
    """
    short_side = min(size)
    if short_side <= image_size:
        return image
    if resize_filter is None:
        # The long side is truncated, not rounded, to match the image processor of the model.
        new_size, resample = tuple(int(image_size * side / short_side) for side in size), Resampling.BICUBIC
    else:
        new_size, resample = (image_size, image_size), resize_filter
    # The proportions come from `size`, because the JPEG decoder rounds the sides of a reduced image up.
    scale = round(size[0] / image.width)  # 1, 2, 4 or 8: the JPEG decoder may have reduced the picture
    return image.resize(new_size, resample, box=(0, 0, size[0] / scale, size[1] / scale))
