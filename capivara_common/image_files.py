"""Open untrusted images safely: images in dataset rows, in indexed folders, and in uploads to the search page.

A file is opened only if it lies in the folder of the dataset or in a folder that the user allows, after all links are
resolved. URLs are never downloaded. The format and size of an image are checked before its pixels are decoded.

The main functions are `decode_image` for one dataset row and `decode_row_images` for many rows.
"""

import errno
import io
import math
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
from PIL.Image import Transpose

from capivara_common.avif import largest_frame_size
from capivara_common.cli import check_at_least, flag
from capivara_common.environment import get_install_command_of_extra, get_or_init_distributed_state
from capivara_common.files import IS_WINDOWS, AllowedFolders, find_windows_path_fault

with suppress(ImportError):
    import pillow_heif  # optional package; the extra `heic` of this project installs it

    pillow_heif.register_heif_opener()

# There is no minimum side length: the image processor accepts one pixel, and `MAX_ASPECT_RATIO` excludes thin lines.
MAX_IMAGE_SIDE = 30_000  # pixels; photographs and scans are smaller, and JPEG allows at most 65,535
MAX_IMAGE_PIXELS = 50_000_000  # default of --max_pixels; takes 0.15 GB as RGB; few cameras have more pixels
MAX_ASPECT_RATIO = 50  # long side / short side; above this ratio, a square crop shows less than 2 % of the image
# Larger files are refused, because a file is read into memory as a whole. Photographs have under 50 MB.
MAX_IMAGE_BYTES = 100_000_000
# Allowed formats. Not all formats that PIL reads are safe: for EPS, PIL starts Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF")
# File name extensions of images in folders
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".heic", ".heif"),
)
TILE_WIDTH, TILE_LENGTH = 322, 323  # numbers of the TIFF tags with the width and height of a tile, in pixels
# Formats for `struct` of the integer types that a TIFF tag may have. TIFF numbers the types: 3 is SHORT, 4 is LONG.
TIFF_INTEGER_FORMATS = {3: "H", 4: "I"}
DECODER_THREADS = 4
DECODE_CHUNK_IMAGES = 64  # largest number of decoded images in memory; a photograph of 12 megapixels takes 36 MB
# {EXIF orientation: operation that makes the image upright}
EXIF_TRANSPOSES = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip

# Flags for `os.open`. Flags that the operating system lacks are left out. Without O_NONBLOCK, opening a named
# pipe would wait for a writer. Without O_BINARY, Windows would translate line ends.
_FILE_OPEN_FLAGS = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _FILE_OPEN_FLAGS |= getattr(os, _flag, 0)
# Flags for `os.open` that open the parent folders of a file without following links. None on Windows, where this is not
# possible. On Linux, O_PATH also opens folders that the user can't list (with execute but no read permission).
_FOLDER_OPEN_FLAGS = None
if hasattr(os, "O_DIRECTORY") and hasattr(os, "O_NOFOLLOW") and os.open in os.supports_dir_fd:
    _FOLDER_OPEN_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_DETAIL_CHARACTERS = 300  # longer error details are cut off, because they may quote texts of any length
# This lock is held while a large image is decoded, so that only one image at a time takes hundreds of megabytes.
# Callers may hold it longer, until they have processed the image.
LARGE_IMAGE_LOCK = threading.RLock()
PIL.Image.init()
# Formats that can be read on this machine: some builds of PIL lack AVIF, and HEIF needs the package pillow-heif.
_AVAILABLE_FORMATS = tuple(name for name in IMAGE_FORMATS if name in PIL.Image.OPEN)


class BadRow(ValueError):
    """Error for a dataset row that can't be used. Commands catch it and skip the row.

    Args:
        reason: Short reason from a fixed list, such as "unreadable image". Commands that skip the row write the reason
            to the file skipped.jsonl.
        detail: Explanation for the user. Only the first `MAX_DETAIL_CHARACTERS` characters are kept.
    """

    def __init__(self, reason: str, detail: str):
        # Pass both arguments to the base class, because worker processes return errors by pickling `args`.
        super().__init__(reason, detail[:MAX_DETAIL_CHARACTERS])
        self.reason, self.detail = self.args
        self.code = reason  # key of the message in the translations of `capivara_search`, the picture search

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class BadImage(BadRow):
    """Error for an image that can't be used, because it is missing, damaged, too large or not in an allowed folder."""


@dataclass(frozen=True)
class ImageAccess:
    """Rules that say which images of a dataset may be loaded: where their files may lie, and how large they may be.

    Attributes:
        allowed_folders: Folders in which image files may lie. None: rows must contain the bytes of their images.
        max_pixels: Largest number of pixels (width x height) of an image.
    """

    allowed_folders: AllowedFolders | None = None
    max_pixels: int = MAX_IMAGE_PIXELS


BYTES_ONLY = ImageAccess()  # rows must contain the bytes of their images; paths are refused


@dataclass(kw_only=True)
class ImageFileArguments:
    """Command-line arguments for reading the images of a dataset; shared by all commands that do so."""

    image_roots: list[Path] = flag([], "Folders outside the dataset to which its image paths and links may lead.")
    max_pixels: int = flag(MAX_IMAGE_PIXELS, "Skip images with more pixels (width x height).")

    def check_image_files(self) -> None:
        """Check the values of the flags, and replace `~` in `image_roots` by the home folder.

        Raises:
            ValueError: If an entry of `image_roots` is not an existing folder, or `max_pixels` is below 1.
        """
        self.image_roots = [Path(root).expanduser() for root in self.image_roots]
        for root in self.image_roots:
            if not root.is_dir():
                raise ValueError(f"image_roots must be existing folders, got {root}.")
        check_at_least(self, 1, "max_pixels")

    def image_options(self) -> dict[str, Any]:
        """Return the flags as keyword arguments of `open_split`, the function that opens a dataset.

        Returns:
            `{"image_roots": folders outside of the dataset in which images may lie, "max_pixels": largest number of
            pixels}`.
        """
        return {"image_roots": self.image_roots, "max_pixels": self.max_pixels}

    def image_settings(self) -> dict[str, Any]:
        """Return the flags that differ from their defaults, so that results can record them.

        Returns:
            `{name of the flag: value}`. For each folder in `image_roots`, the value has only the name of the folder,
            because a full path may reveal a person's name.
        """
        roots = {"image_roots": [root.name for root in self.image_roots]} if self.image_roots else {}
        return roots | ({"max_pixels": self.max_pixels} if self.max_pixels != MAX_IMAGE_PIXELS else {})


def read_image_bytes(row_image: dict | None, access: ImageAccess = BYTES_ONLY) -> bytes:
    """Return the encoded image file of a dataset row as bytes, after checking its format and size.

    Args:
        row_image: Value of the image column: `{"bytes": file content or None, "path": path or None}`. For an image in a
            tar, "path" is its name, and "archive" (path of the tar), "offset" and "size" (in bytes) say where it is.
        access: Folders in which image files may lie, and largest number of pixels. Default: the row must contain the
            bytes.

    Returns:
        Content of the image file. The header is valid, but the pixels may be damaged.

    Raises:
        BadImage: If the row has no image, or the image can't be read or is not allowed.
    """
    return _read_row_image_without_decoding(row_image, access)[0]


def decode_image(row_image: dict | None, access: ImageAccess = BYTES_ONLY) -> PIL.Image.Image:
    """Load and decode the image of a dataset row.

    Args:
        row_image: Value of the image column: `{"bytes": file content or None, "path": path or None}`. For an image in a
            tar, "path" is its name, and "archive" (path of the tar), "offset" and "size" (in bytes) say where it is.
        access: Folders in which image files may lie, and largest number of pixels. Default: the row must contain the
            bytes.

    Returns:
        The upright image with 8 bits per channel, in the PIL mode of the file, such as RGB or L.

    Raises:
        BadImage: If the row has no image, or the image can't be decoded or is not allowed.
    """
    return decode_upright(*_read_row_image_without_decoding(row_image, access)[1:])


def _read_row_image_without_decoding(row_image: dict | None, access: ImageAccess) -> tuple[bytes, PIL.Image.Image, str]:
    """Read and open the image of a dataset row without decoding its pixels.

    Args:
        row_image: Image entry of the row, as for `decode_image`.
        access: Rules for the files that may be opened.

    Returns:
        The tuple (content of the image file, opened image, name of the image for error messages).

    Raises:
        BadImage: If there is no image, it may not be opened or can't be read, it is not an image, or it is too large.
    """
    image = row_image or {}
    kinds = {"bytes": bytes, "path": str, "archive": str, "offset": int, "size": int}
    if not isinstance(image, dict) or not all(isinstance(image.get(name), kind | None) for name, kind in kinds.items()):
        raise BadImage("unreadable image", f"an image needs bytes or a path, got {str(image)[:80]!r}")
    data, path, archive, offset, size = map(image.get, kinds)
    if data is None and path:
        file, start, length = (path, 0, MAX_IMAGE_BYTES + 1) if archive is None else (archive, offset or 0, size or 0)
        data = _read_file_bytes(access.allowed_folders, file, start, length)
    data = check_byte_count(data or b"", repr(path) if path else "the image in the row")
    name = repr(image_display_path(image)) if path else f"{len(data)} bytes"
    return data, check_and_open_image_without_decoding(data, name, access.max_pixels), name


def decode_row_images(
    rows: Sequence[int],
    row_image: Callable[[int], dict | None],
    access: ImageAccess,
    describe_error: Callable[[int, BadImage], str] = lambda row, error: error.detail,
) -> Iterator[PIL.Image.Image | BadImage]:
    """Load and decode the images of several dataset rows with up to eight threads.

    Args:
        rows: Indices of the rows to decode.
        row_image: Function that takes a row index, and returns the row's image as `decode_image` takes it.
        access: Folders in which image files may lie, and largest number of pixels.
        describe_error: Function that takes a row index and its `BadImage` error, and returns the new `detail` of the
            error.

    Yields:
        The decoded images, in the order of `rows`. If an image can't be used, its `BadImage` error takes its place.
    """

    def read(row: int) -> PIL.Image.Image | BadImage:
        try:
            return decode_image(row_image(row), access)
        except BadImage as error:
            return BadImage(error.reason, describe_error(row, error))

    cpus = (os.cpu_count() or 2) // get_or_init_distributed_state().num_processes
    with ThreadPoolExecutor(max(1, min(8, cpus))) as threads:
        for start in range(0, len(rows), DECODE_CHUNK_IMAGES):
            yield from threads.map(read, rows[start : start + DECODE_CHUNK_IMAGES])


def check_and_open_image_without_decoding(
    data: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS, hint: str = " (--max_pixels raises it)"
) -> PIL.Image.Image:
    """Open an image with PIL and check its format and size, before its pixels are decoded.

    Args:
        data: Content of the image file.
        name: Name of the image for error messages.
        max_pixels: Largest number of pixels (width x height).
        hint: Advice that the error message adds directly after this limit. It must begin with a blank or punctuation.

    Returns:
        The opened image. Pass it to `decode_upright` to decode its pixels.

    Raises:
        BadImage: If the format is not in `IMAGE_FORMATS`, the header is damaged, or the image exceeds a limit.
    """
    # Only the header is read, so a malicious image of huge size is refused before it fills the memory.
    # PIL's own pixel limit must not be lower than `max_pixels`. It is set in this function, because worker processes
    # call it, too. They do not run the code that checks the command-line flags.
    PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_AVAILABLE_FORMATS)
        tile = _read_tiff_tile_size(data, image)
        frame = largest_frame_size(data) if image.format == "AVIF" else image.size
    except PIL.UnidentifiedImageError as error:
        heic = "" if "HEIF" in _AVAILABLE_FORMATS else f"; to read HEIC: {get_install_command_of_extra('heic')}"
        detail = f"{name} is not an image in {', '.join(_AVAILABLE_FORMATS)}, or its header is damaged{heic}"
        raise BadImage("unreadable image", detail) from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise BadImage("absurd image size", f"{name}: {error}") from error
    except Exception as error:  # PIL raises many types of errors, including SyntaxError
        raise BadImage("unreadable image", f"{name}: {error}") from error
    # libtiff decodes a whole tile at once, so the limit also applies to the pixels of a tile.
    if math.prod(tile) > max_pixels:
        detail = f"{name} has tiles of {tile[0]} x {tile[1]} pixels; at most {max_pixels:,} pixels are allowed"
        raise BadImage("absurd image size", detail)
    width, height = max(image.size, frame, key=math.prod)
    short, long = sorted((width, height))
    if long > MAX_IMAGE_SIDE or short * long > max_pixels or long > MAX_ASPECT_RATIO * short:
        limits = f"a side of {MAX_IMAGE_SIDE:,} pixels and a long side of {MAX_ASPECT_RATIO} times the short side"
        detail = f"{name} has {width} x {height} pixels; at most {max_pixels:,} pixels{hint}, {limits} are allowed"
        raise BadImage("absurd image size", detail)
    return image


def decode_upright(image: PIL.Image.Image, name: str, min_short_side: int = 0) -> PIL.Image.Image:
    """Decode the pixels of an opened image, and rotate it upright by its EXIF data.

    Args:
        image: Image from `check_and_open_image_without_decoding`.
        name: Name of the image for error messages.
        min_short_side: To save time, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, if its short side keeps at
            least this many pixels. 0: full size.

    Returns:
        The upright image with 8 bits per channel, in the PIL mode of the file, such as RGB or L.

    Raises:
        BadImage: If the pixels can't be decoded.
    """
    # Every AVIF image counts as large, because libavif decodes up to 268 megapixels. The frame size was checked when
    # the image was opened, but a hostile file may hide or understate it.
    is_large = image.format == "AVIF" or image.width * image.height > MAX_IMAGE_PIXELS
    try:
        # To limit memory, threads decode large images one at a time.
        with LARGE_IMAGE_LOCK if is_large else nullcontext():
            if min_short_side:
                image.draft(None, (min_short_side, min_short_side))
            image.load()
            if image.format == "AVIF":
                # Free the decoder's copy of the frame, which would otherwise stay in memory as long as the image.
                image._decoder = None
        transpose = EXIF_TRANSPOSES.get(exif_orientation(image))
        image = to_8_bit(image)
        return image if transpose is None else image.transpose(transpose)
    except Exception as error:  # PIL raises many types of errors, including SyntaxError
        detail = f"the pixels of {name} can't be decoded: {str(error) or type(error).__name__}"
        raise BadImage("unreadable image", detail) from error


def exif_orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation of an image, from 1 to 8, which says how to rotate or mirror it. 1 means upright.

    The result is also 1 if the orientation is missing or invalid. It is always 1 for a TIFF image, which PIL itself
    rotates.
    """
    try:
        orientation = image.getexif().get(PIL.Image.ExifTags.Base.Orientation)
    except Exception:  # for damaged EXIF data, PIL raises many types of errors
        return 1
    return orientation if orientation in EXIF_TRANSPOSES else 1


def to_8_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image with 16-bit, 32-bit or float pixels to 8 bits; return any other image unchanged.

    The pixels are scaled to the range 0 to 255. Their original range is assumed to be:

    - 16-bit integers: 0 to 65,535;
    - 32-bit integers: 0 to 255 if no pixel exceeds 255, otherwise 0 to 65,535;
    - floats: 0 to 1 if no pixel exceeds 1, otherwise 0 to 255.

    Raises:
        ValueError: If a pixel is negative, too large or not finite.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    # The model's image processor, which is published without this package, scales pixels in the same way.
    low, high, floating = float(pixels.min()), float(pixels.max()), pixels.dtype.kind == "f"
    limit = 255 if floating else 65535
    if not (low >= 0 and high <= limit):  # written with `not`, so that NaN is refused too
        raise ValueError(f"Pixels must be 0 to {limit} for {pixels.dtype}, got {low:g} to {high:g}.")
    if floating:
        pixels = pixels * 255 if high <= 1 else pixels
    elif pixels.dtype.itemsize == 2 or high > 255:
        pixels = pixels / 257
    return PIL.Image.fromarray(np.rint(pixels).astype(np.uint8))


def check_byte_count(data: bytes, name: str) -> bytes:
    """Check that an image file is neither empty nor too large, before it is opened.

    Args:
        data: Content of the image file.
        name: Name of the image for error messages.

    Returns:
        `data`, unchanged.

    Raises:
        BadImage: If `data` is empty or has more than `MAX_IMAGE_BYTES` bytes.
    """
    if not data:
        raise BadImage("no image", f"{name} has 0 bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImage("absurd image size", f"{name} has more than {MAX_IMAGE_BYTES / 1e6:.0f} MB")
    return data


def _read_file_bytes(allowed_folders: AllowedFolders | None, path: str, offset: int, size: int) -> bytes:
    """Read a range of the bytes of a file, if the file lies in the allowed folders.

    At most `MAX_IMAGE_BYTES` + 1 bytes are read: one byte above the limit suffices for `check_byte_count` to detect a
    file that is too large.

    Args:
        allowed_folders: Folders in which the file may lie; checked after all links are resolved. None: every path is
            refused.
        path: Path of the file. A relative path is looked up in the allowed folders first, then in the current folder.
        offset: Position of the first byte to read.
        size: Number of bytes to read. If the file is shorter, all bytes up to its end are read.

    Raises:
        BadImage: If the path is a URL or lies outside the allowed folders, or the file can't be read.
    """
    try:
        if allowed_folders is None:
            raise PermissionError("the row has the path of a file, but must have the bytes of the image itself")
        if "://" in path:
            raise PermissionError("images are not downloaded from URLs")
        files = [*(folder / path for folder in allowed_folders.folders), Path(path)]
        inside = [file for file in files if allowed_folders.contains(file)]
        if not inside:
            raise PermissionError("the file lies outside the dataset's folder; allow its folder with --image_roots")
        existing = next((file for file in inside if file.is_file()), inside[0])
        with open_regular_file_safe_from_link_swaps(existing, "it", allowed_folders.folders) as file:
            file.seek(offset)
            return file.read(max(0, min(size, MAX_IMAGE_BYTES + 1)))
    except Exception as error:  # a path from a row is untrusted, and opening it can fail in many ways
        raise BadImage("unreadable image", f"{path!r}: {getattr(error, 'detail', error)}") from error


def open_regular_file_safe_from_link_swaps(
    path: str | Path, name: str, folders: Sequence[str | Path] | None = None
) -> BinaryIO:
    """Open a file for reading, but only if it lies in an allowed folder and is a regular file.

    The function also protects against an attacker who replaces a folder of the path by a link after the check.

    Args:
        path: The file.
        name: Name of the file for error messages.
        folders: Allowed folders, as paths without links. None: the file may lie anywhere.

    Returns:
        The file, opened in binary mode.

    Raises:
        BadImage: If the path leads to no regular file (reason "no regular file"), or out of `folders` (reason "link out
            of the folder").
        OSError: If the file can't be opened, or a folder on its path was replaced by a link.
        ValueError: If the path contains a NUL character.
    """
    if IS_WINDOWS and (fault := find_windows_path_fault(path, folders)):
        raise BadImage("no regular file", f"{name} {fault}")
    # All links are resolved once. The resulting path is then opened folder by folder without following links, so that
    # nobody can replace a folder by a link after the check (a time-of-check to time-of-use race).
    real = Path(os.path.realpath(path))
    if folders is not None and not any(real.is_relative_to(folder) for folder in folders):
        raise BadImage("link out of the folder", f"{name} leads out of the folders that may be read")
    no_file = BadImage("no regular file", f"{name} is a folder, a pipe, a socket or a device")
    if _FOLDER_OPEN_FLAGS is None and not stat.S_ISREG(os.lstat(real).st_mode):
        # Opening a pipe or device could wait forever, because Windows lacks O_NONBLOCK.
        raise no_file
    number = _open_and_check_no_link_followed(real) if _FOLDER_OPEN_FLAGS is None else _open_without_links(real)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise no_file
    return os.fdopen(number, "rb")


def _open_without_links(real: Path) -> int:
    """Open the path `real` folder by folder, and return the file descriptor. Raises OSError if a part of it is a link.

    All links in `real` were already resolved, so a link in it means that somebody has replaced a folder since then.
    """
    folder = os.open(real.anchor, _FOLDER_OPEN_FLAGS)
    try:
        for part in real.parent.parts[1:]:
            outer, folder = folder, os.open(part, _FOLDER_OPEN_FLAGS, dir_fd=folder)
            os.close(outer)
        return os.open(real.name or ".", _FILE_OPEN_FLAGS, dir_fd=folder)
    finally:
        os.close(folder)


def _open_and_check_no_link_followed(real: Path) -> int:
    """Open a file, and then check that no link was followed; for Windows, which can't open a file without links.

    The check compares the file before and after it is opened. An attacker who replaces a folder by a link and back
    several times, at the right moments, could still deceive the check.

    Args:
        real: Path of the file, with all links resolved.

    Returns:
        The file descriptor.

    Raises:
        OSError: If the file can't be opened, or the path led to another file before or after the file was opened.
    """
    before = os.lstat(real)
    number = os.open(real, _FILE_OPEN_FLAGS)
    try:
        opened, after = os.fstat(number), os.lstat(real)
        # `realpath` is needed because `lstat` does not report a junction (a kind of link on Windows) as a link.
        is_same = os.path.samestat(before, opened) and os.path.samestat(opened, after)
        if not is_same or os.path.realpath(real) != str(real):
            raise OSError(errno.ELOOP, "the file was replaced while it was opened", str(real))
    except BaseException:
        os.close(number)
        raise
    return number


def _read_tiff_tile_size(data: bytes, image: PIL.Image.Image) -> tuple[int, int]:
    """Return the width and height of the tiles of a TIFF image in pixels, so that huge tiles can be refused.

    PIL decodes the tiles with libtiff, which also reads directory entries that PIL skips. The sizes that PIL reports
    may therefore be wrong, so this function parses the TIFF directory itself.

    Args:
        data: Content of the whole file.
        image: The image that PIL has opened from `data`.

    Returns:
        (width, height) of a tile; (0, 0) if the image has no tiles or is not a TIFF image.

    Raises:
        ValueError: If the tile width or height is not a single SHORT or LONG, the types that TIFF 6.0 allows.
        struct.error: If the TIFF directory lies outside of the file.
    """
    if image.format != "TIFF":
        return 0, 0
    # A TIFF file begins with "II" if it is little-endian. The version number follows. It is 43 for BigTIFF, a variant
    # with larger fields.
    order, is_big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    head, entry, value_start = (f"{order}Q", f"{order}HHQ8s", 12) if is_big else (f"{order}H", f"{order}HHI4s", 8)
    (entries,) = struct.unpack_from(head, data, image.tag_v2.offset)
    start, size = image.tag_v2.offset + struct.calcsize(head), struct.calcsize(entry)
    sides = {TILE_WIDTH: 0, TILE_LENGTH: 0}
    for position in range(start, min(start + entries * size, len(data) - size + 1), size):
        tag, kind, count, _ = struct.unpack_from(entry, data, position)
        if tag in sides:
            if kind not in TIFF_INTEGER_FORMATS or count != 1:
                raise ValueError(f"TIFF tag {tag} must be one SHORT or LONG, got {count} of type {kind}.")
            (side,) = struct.unpack_from(order + TIFF_INTEGER_FORMATS[kind], data, position + value_start)
            sides[tag] = max(sides[tag], side)
    return sides[TILE_WIDTH], sides[TILE_LENGTH]


def image_display_path(row_image: dict | None) -> str:
    """Return the path of a dataset row's image, so that a message can say which image it is about.

    Args:
        row_image: Value of the image column in the row, as for `decode_image`.

    Returns:
        Path of the image file. For an image in a tar: path of the tar, a slash, and the name in the tar. "" if the row
        has no path.
    """
    image = row_image or {}
    return "/".join(filter(None, (image.get("archive"), image.get("path"))))
