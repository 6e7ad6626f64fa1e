"""Images of caption rows, decoded within limits; a row that can't be used is listed, not fatal."""

import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import fsspec
import PIL.Image
import PIL.ImageOps

from artifacts import write_text

# A side of one pixel is allowed: the image processor takes it, and the aspect limit keeps out what is a mere line.
MAX_IMAGE_SIDE = 30_000  # pixels; no camera or scanner of photographs reaches it, and JPEG ends at 65,535
MAX_IMAGE_PIXELS = 178_956_970  # where PIL raises DecompressionBombError; about 0.5 GB as RGB
MAX_ASPECT = 50  # long side by short side; the square crop of the image tower would see 2 % of the image
MAX_IMAGE_BYTES = 100_000_000  # of a file; photographs have under 50 MB, and every row is held in memory
# What photographs come in. Not all that PIL opens: EPS starts Ghostscript on the file.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_DETAIL = 300  # letters of a line of skipped.jsonl; a caption can be a book
NOT_CHOSEN = "not chosen"  # reason: by the pair filter or the caption strategy; left out, but not bad

PIL.Image.init()
_FORMATS = tuple(name for name in IMAGE_FORMATS if name in PIL.Image.OPEN)  # PIL's build may lack AVIF


@dataclass(frozen=True)
class Skipped:
    """One line of `skipped.jsonl`: a row, or the rest of an archive, that a run goes without."""

    source: str
    split: str
    row: int
    reason: (
        str  # not chosen, no image, unreadable image, absurd image size, no caption, missing column, damaged archive
    )
    detail: str


class BadRow(ValueError):
    """A row that can't be used, with the reason and detail of its `Skipped`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail[:MAX_DETAIL]

    def __reduce__(self):  # as a result of a worker process it is pickled
        return type(self), (self.reason, self.detail)


class BadImage(BadRow):
    """An image that can't be used."""


def image_bytes(row_image: dict | None) -> bytes:
    """The file of the image of a row, from the row or from where its path points.

    Raises:
        BadImage: there is none, it can't be read, or it is over `MAX_IMAGE_BYTES`.
    """
    if not isinstance(row_image, dict | None):
        raise BadImage("unreadable image", f"bytes or a path are needed, got {type(row_image).__name__}")
    data, path = (row_image or {}).get("bytes"), (row_image or {}).get("path")
    if data is None and path:
        data = _file_bytes(path)
    if not data:
        raise BadImage("no image", f"the file {path!r} is empty" if path else "neither bytes nor a path")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImage("absurd image size", f"{path!r} has more than {MAX_IMAGE_BYTES / 1e6:.0f} MB")
    return data


def decode_image(row_image: dict | None) -> PIL.Image.Image:
    """The image of a row, loaded, upright by its EXIF orientation as `datasets` gives it; its mode is left as it is.

    Raises:
        BadImage: it can't be read, or its size is absurd, which its header tells before any pixel is decoded.
    """
    data = image_bytes(row_image)
    where = repr(row_image.get("path")) if row_image.get("path") else f"{len(data)} bytes"
    stream = io.BytesIO(data)
    try:
        image = PIL.Image.open(stream, formats=_FORMATS)
        _check_size(image, where)
        image.load()
        if image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
    except BadImage:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise BadImage("absurd image size", f"{where}: {error}") from error
    except Exception as error:  # PIL raises a dozen kinds, SyntaxError among them
        said = str(error).replace(repr(stream), "it")  # PIL names the object by its address
        raise BadImage("unreadable image", f"{where}: {said}") from error
    return image


def image_digest(row_image: dict | None) -> bytes:
    """BLAKE2b-128 of the file of the image of a row. Raises BadImage as `image_bytes` does."""
    return blake2b(image_bytes(row_image), digest_size=16).digest()


def rows_fingerprint(rows: Iterable[tuple[str, list[str]]]) -> str:
    """Hex digest of images and captions in their order; where the files lie does not matter.

    Args:
        rows: of each row the hex `image_digest`, and its captions.
    """
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def write_skipped(path: Path, skipped: list[Skipped]) -> None:
    """One JSON object a line; no file where nothing was skipped."""
    if skipped:  # ASCII: names of archive members can hold what is not UTF-8
        write_text(path, "".join(json.dumps(asdict(line)) + "\n" for line in skipped))


def _file_bytes(path: str) -> bytes:
    scheme = path.partition("://")[0] if "://" in path else ""
    if scheme and "hf://" not in path:  # a data set must not send the trainer to any address
        raise BadImage("unreadable image", f"{path!r} is neither a local file nor on the Hub")
    try:
        if "://" not in path and not Path(path).is_file():
            raise FileNotFoundError("there is no such file")
        with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadImage("unreadable image", f"{path!r}: {error}") from error


def _check_size(image: PIL.Image.Image, where: str) -> None:
    short, long = sorted(image.size)
    if long > MAX_IMAGE_SIDE or short * long > MAX_IMAGE_PIXELS or long > MAX_ASPECT * short:
        raise BadImage(
            "absurd image size",
            f"{where} has {image.width} x {image.height} pixels; the longer side may have {MAX_IMAGE_SIDE} and "
            f"{MAX_ASPECT} times the shorter one, all {MAX_IMAGE_PIXELS}",
        )
