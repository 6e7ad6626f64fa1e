"""The gate: what images are opened, and how, for rows of data sets, the search's folders and the page's visitors.

A row may come from anybody, and so may the path in it. A file is opened where it lies, links resolved, in the data
set's own folder or in one that the user names (`open_regular_file`); no address is followed. Whatever is opened must
begin as an image within the limits (`open_image`) before it is `decoded`.
"""

import io
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

from capivara_common.cli import check_at_least, flag
from capivara_common.environment import process_state
from capivara_common.files import AllowedFolders

with suppress(ImportError):
    import pillow_heif  # extra `heic`

    pillow_heif.register_heif_opener()

# A side of one pixel is allowed: the image processor takes it, and the aspect limit keeps out what is a mere line.
MAX_IMAGE_SIDE = 30_000  # pixels; no camera or scanner of photographs reaches it, and JPEG ends at 65,535
MAX_IMAGE_PIXELS = 50_000_000  # of the default; 0.15 GB as RGB, and few cameras have more
MAX_ASPECT_RATIO = 50  # long side by short side; the square crop of the image tower would see 2 % of the image
MAX_IMAGE_BYTES = 100_000_000  # of a file; photographs have under 50 MB, and every row is held in memory
# What photographs come in. Not all that PIL opens: EPS starts Ghostscript on the file.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF")
# Of pictures in a folder, as names end
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".heic", ".heif"),
)
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
TIFF_INTEGER_FORMATS = {3: "H", 4: "I"}  # type of a TIFF tag, SHORT or LONG -> its `struct` format
DECODER_THREADS = 4  # threads
DECODE_CHUNK_IMAGES = 64  # images; a photograph of 12 million pixels takes 36 MB
EXIF_TRANSPOSES = {  # EXIF orientation -> how the pixels become upright
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip

# A folder on the way to a file; where the system can, one that may be passed through but not listed, too.
_FOLDER_OPEN_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_DETAIL_CHARACTERS = 300  # letters that are kept of what is wrong; a caption can be a book
# Held while an image that may take hundreds of megabytes is decoded. Reentrant: a caller may hold it for longer.
LARGE_IMAGE_LOCK = threading.RLock()
PIL.Image.init()
_AVAILABLE_FORMATS = tuple(name for name in IMAGE_FORMATS if name in PIL.Image.OPEN)  # PIL's build may lack AVIF


class BadRow(ValueError):
    """A row that can't be used, with the reason and detail of its `Skipped`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(
            reason, detail[:MAX_DETAIL_CHARACTERS]
        )  # by both it is pickled, as a result of a worker process
        self.reason, self.detail = self.args

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class BadImage(BadRow):
    """An image that can't be used."""

    @property
    def code(self) -> str:
        """By which the search has words for it."""
        return self.reason


@dataclass(frozen=True)
class ImageAccess:
    """Which images of a data set's rows may be opened."""

    allowed_folders: AllowedFolders | None = (
        None  # where local files may lie; None: no path is followed, a row must hold the bytes
    )
    max_pixels: int = MAX_IMAGE_PIXELS


BYTES_ONLY = ImageAccess()


@dataclass(kw_only=True)
class ImageFileArguments:
    """The flags of every command that reads images."""

    image_roots: list[Path] = flag([], "Folders outside of the data set that image paths and links in it may lead to.")
    max_pixels: int = flag(MAX_IMAGE_PIXELS, "Images of more pixels (width x height) are left out.")

    def check_image_files(self) -> None:
        """Raise ValueError where a root is no folder or the limit below 1."""
        self.image_roots = [Path(root).expanduser() for root in self.image_roots]
        for root in self.image_roots:
            if not root.is_dir():
                raise ValueError(f"image_roots must be folders that are there, got {root}.")
        check_at_least(self, 1, "max_pixels")

    def image_options(self) -> dict[str, Any]:
        """As keyword arguments of `caption_data.sources.open_split`."""
        return {"image_roots": self.image_roots, "max_pixels": self.max_pixels}

    def image_settings(self) -> dict[str, Any]:
        """The flags that decide which images are left out, folders by their names alone; empty by default."""
        roots = {"image_roots": [root.name for root in self.image_roots]} if self.image_roots else {}
        return roots | ({"max_pixels": self.max_pixels} if self.max_pixels != MAX_IMAGE_PIXELS else {})


def read_image_bytes(row_image: dict | None, access: ImageAccess = BYTES_ONLY) -> bytes:
    """The file of the image of a row, `{"bytes", "path"}`, from the row or from where its path points.

    With `{"path", "archive", "offset", "size"}` it is a piece of another file: a member of a plain tar. It begins as an
    image within the limits; its pixels may still be damaged.

    Raises:
        BadImage: there is none, it may not be opened, it can't be read, it is no image, or it is too large.
    """
    return _open_row_image(row_image, access)[0]


def decode_image(row_image: dict | None, access: ImageAccess = BYTES_ONLY) -> PIL.Image.Image:
    """The image of a row, `decoded`, its mode left as it is. Raises BadImage as `image_bytes` and `decoded`."""
    return decode_upright(*_open_row_image(row_image, access)[1:])


def _open_row_image(row_image: dict | None, access: ImageAccess) -> tuple[bytes, PIL.Image.Image, str]:
    """The file of a row's image, what `open_image` makes of it, and its name for messages."""
    image = row_image or {}
    kinds = {"bytes": bytes, "path": str, "archive": str, "offset": int, "size": int}
    if not isinstance(image, dict) or not all(isinstance(image.get(name), kind | None) for name, kind in kinds.items()):
        raise BadImage("unreadable image", f"bytes or a path are needed, got {str(image)[:80]!r}")
    data, path, archive, offset, size = map(image.get, kinds)
    if data is None and path:
        place = (path,) if archive is None else (archive, offset or 0, size or 0)
        data = _read_file_bytes(access.allowed_folders, *place)
    data = check_byte_count(data or b"", repr(path) if path else "what is in the row")
    name = repr(image_display_path(image)) if path else f"{len(data)} bytes"
    return data, open_image(data, name, access.max_pixels), name


def decode_images(
    rows: range, row_image: Callable[[int], dict | None], access: ImageAccess
) -> Iterator[tuple[int, PIL.Image.Image | BadImage]]:
    """Rows with their images or what is wrong with them, decoded some at once by a few threads."""

    def read(row: int) -> PIL.Image.Image | BadImage:
        try:
            return decode_image(row_image(row), access)
        except BadImage as bad:
            return bad

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // process_state().num_processes))) as threads:
        for start in range(0, len(rows), DECODE_CHUNK_IMAGES):
            part = rows[start : start + DECODE_CHUNK_IMAGES]
            yield from zip(part, threads.map(read, part), strict=True)


def open_image(
    data: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS, hint: str = " (--max_pixels raises it)"
) -> PIL.Image.Image:
    """The image that a file holds, within the limits, with nothing but its header decoded.

    `name` and `way_out`, what can be done where it has more than `max_pixels`, are for BadImage's message.
    """
    # PIL's own limit gives way to ours; here, since a task of an executor has flags that were checked elsewhere.
    PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_AVAILABLE_FORMATS)
        tile = _read_tile_size(data, image)
    except PIL.UnidentifiedImageError as error:
        heic = "" if "HEIF" in _AVAILABLE_FORMATS else "; the extra `heic` reads HEIC, too: pip install -e '.[heic]'"
        detail = f"{name} is no image of {', '.join(_AVAILABLE_FORMATS)}, or its beginning is damaged{heic}"
        raise BadImage("unreadable image", detail) from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise BadImage("absurd image size", f"{name}: {error}") from error
    except Exception as error:  # PIL raises a dozen kinds, SyntaxError among them
        raise BadImage("unreadable image", f"{name}: {error}") from error
    _check_dimensions(image, tile, name, max_pixels, hint)
    return image


def decode_upright(image: PIL.Image.Image, name: str, min_short_side: int = 0) -> PIL.Image.Image:
    """The pixels of an image of `open_image`, upright by its EXIF orientation, of 8 bits, in its own mode.

    A JPEG may be decoded at a half, a quarter or an eighth of its size, its short side at least `reduced_to`. Images of
    more than `MAX_IMAGE_PIXELS` and AVIF images are decoded one at a time in a process. Raises BadImage where the
    pixels can't be decoded; data of EXIF that are broken fail no image.
    """
    # libavif allocates what the AV1 stream holds, up to 268 million pixels, whatever size the `ispe` box declares.
    is_large = image.format == "AVIF" or image.width * image.height > MAX_IMAGE_PIXELS
    try:
        with LARGE_IMAGE_LOCK if is_large else nullcontext():
            if min_short_side:
                image.draft(None, (min_short_side, min_short_side))
            image.load()
            if image.format == "AVIF":
                image._decoder = None  # holds the frame at the stream's size as long as the image lives
        turn = EXIF_TRANSPOSES.get(exif_orientation(image))
        image = to_8_bit(image)
        return image if turn is None else image.transpose(turn)
    except Exception as error:  # PIL raises a dozen kinds, SyntaxError among them
        detail = f"the pixels of {name} can't be decoded: {str(error) or type(error).__name__}"
        raise BadImage("unreadable image", detail) from error


def exif_orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation of a loaded image, 1 to 8; where it says none, 1. PIL itself turns TIFF."""
    try:
        found = image.getexif().get(PIL.Image.ExifTags.Base.Orientation)
    except Exception:  # PIL raises a dozen kinds
        return 1
    return found if found in EXIF_TRANSPOSES else 1


def to_8_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of 16-bit, 32-bit or float pixels as 8-bit; others as they are.

    Whole numbers of 32 bits are taken as 8-bit when none exceeds 255, else as 16-bit; floats are shares from 0 to 1,
    or, when one exceeds 1, 0 to 255: as the model's image processor has it, which travels without this package.
    ValueError: a pixel is negative, too large or not finite.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    low, high, floating = float(pixels.min()), float(pixels.max()), pixels.dtype.kind == "f"
    limit = 255 if floating else 65535
    if not (low >= 0 and high <= limit):  # also False for NaN
        raise ValueError(f"Pixels must be 0 to {limit} for {pixels.dtype}, got {low:g} to {high:g}.")
    if floating:
        pixels = pixels * 255 if high <= 1 else pixels
    elif pixels.dtype.itemsize == 2 or high > 255:
        pixels = pixels / 257
    return PIL.Image.fromarray(np.rint(pixels).astype(np.uint8))


def check_byte_count(data: bytes, name: str) -> bytes:
    """The bytes of a file. Raises BadImage where there are none, or more than pictures have."""
    if not data:
        raise BadImage("no image", f"{name} has 0 bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImage("absurd image size", f"{name} has more than {MAX_IMAGE_BYTES / 1e6:.0f} MB")
    return data


def _read_file_bytes(
    allowed_folders: AllowedFolders | None, path: str, offset: int = 0, size: int = MAX_IMAGE_BYTES + 1
) -> bytes:
    """The regular file within `bounds` that a path leads to, or a piece of it; at most one byte too many, which
    `bounded` sees. A relative path is one of the data set's folder, or else of the current one."""
    try:
        if allowed_folders is None:
            raise PermissionError("a path of a row that should hold the bytes")
        if "://" in path:
            raise PermissionError("an address, which is not fetched")
        inside = [
            file
            for file in (*(folder / path for folder in allowed_folders.folders), Path(path))
            if allowed_folders.contains(file)
        ]
        if not inside:
            raise PermissionError("lies outside of the data set's folder; --image_roots names others that may be read")
        found = next((file for file in inside if file.is_file()), inside[0])
        with open_regular_file(found, "it", allowed_folders.folders) as file:
            file.seek(offset)
            return file.read(max(0, min(size, MAX_IMAGE_BYTES + 1)))
    except Exception as error:  # whatever a row names
        raise BadImage("unreadable image", f"{path!r}: {getattr(error, 'detail', error)}") from error


def open_regular_file(path: str | Path, name: str, folders: Sequence[str | Path] | None = None) -> BinaryIO:
    """A regular file, its links followed once, before it is opened: one that comes into its way then is refused.

    It must end in one of `folders`, real paths; None: the user has named the file itself. `name` is for messages.

    Raises:
        BadImage: it is no regular file ("no regular file"), or ends elsewhere ("link out of the folder").
        OSError: it is not there, or can't be opened; a folder or file of its real path has become a link.
        ValueError: there is a zero in its name.
    """
    real = Path(os.path.realpath(path))
    if folders is not None and not any(real.is_relative_to(folder) for folder in folders):
        raise BadImage("link out of the folder", f"{name} leads out of the folders that may be read")
    # Folder by folder from the root, no link anywhere: what was checked above is what is opened.
    folder = os.open(real.anchor, _FOLDER_OPEN_FLAGS)
    try:
        for part in real.parent.parts[1:]:
            outer, folder = folder, os.open(part, _FOLDER_OPEN_FLAGS, dir_fd=folder)
            os.close(outer)
        # Opening a FIFO would wait for a writer, and a device may never end; neither is waited for or read.
        number = os.open(real.name or ".", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise BadImage("no regular file", f"{name} is a folder, a pipe, a socket or a device")
    return os.fdopen(number, "rb")


def _read_tile_size(data: bytes, image: PIL.Image.Image) -> tuple[int, int]:
    """Return the width and height of the tiles of a TIFF image; zeros if the image has no tiles or another format.

    The directory is parsed here because PIL skips entries that libtiff, which decodes the tiles, reads.

    Args:
        data: the whole file.
        image: what PIL has opened from it.

    Raises:
        ValueError: If the tile width or height is not a single SHORT or LONG, the types that TIFF 6.0 allows.
        struct.error: If the directory lies outside of the file.
    """
    if image.format != "TIFF":
        return 0, 0
    order, is_big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]  # as libtiff tells BigTIFF
    head, entry, value_start = (f"{order}Q", f"{order}HHQ8s", 12) if is_big else (f"{order}H", f"{order}HHI4s", 8)
    (entries,) = struct.unpack_from(head, data, image.tag_v2.offset)
    start, size, sides = (
        image.tag_v2.offset + struct.calcsize(head),
        struct.calcsize(entry),
        {TILE_WIDTH: 0, TILE_LENGTH: 0},
    )
    for place in range(start, min(start + entries * size, len(data) - size + 1), size):
        tag, kind, count, _ = struct.unpack_from(entry, data, place)
        if tag in sides:
            if kind not in TIFF_INTEGER_FORMATS or count != 1:
                raise ValueError(f"TIFF tag {tag} must be one SHORT or LONG, got {count} of type {kind}.")
            (side,) = struct.unpack_from(order + TIFF_INTEGER_FORMATS[kind], data, place + value_start)
            sides[tag] = max(sides[tag], side)
    return sides[TILE_WIDTH], sides[TILE_LENGTH]


def _check_dimensions(image: PIL.Image.Image, tile: tuple[int, int], name: str, max_pixels: int, hint: str) -> None:
    """Raise BadImage if an image, or a tile of it, which is decoded whole, exceeds the limits."""
    (short, long), (width, height) = sorted(image.size), tile
    if width * height > max_pixels:
        detail = f"{name} has tiles of {width} x {height} pixels; all may be {max_pixels:,}"
        raise BadImage("absurd image size", detail)
    if long > MAX_IMAGE_SIDE or short * long > max_pixels or long > MAX_ASPECT_RATIO * short:
        rest = f"the longer side {MAX_IMAGE_SIDE:,} and {MAX_ASPECT_RATIO} times the shorter one"
        detail = f"{name} has {image.width} x {image.height} pixels; all may be {max_pixels:,}{hint}, {rest}"
        raise BadImage("absurd image size", detail)


def image_display_path(row_image: dict | None) -> str:
    """Where the image of a row lies, for people; empty where it is in the row alone."""
    image = row_image or {}
    return "/".join(filter(None, (image.get("archive"), image.get("path"))))
