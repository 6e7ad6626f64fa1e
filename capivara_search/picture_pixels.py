"""What becomes of a picture's pixels: turned, put on white, made smaller, and a thumbnail.

    image = upright(on_white(PIL.Image.open("IMG_1234.png")), orientation=6)
    Path("small.webp").write_bytes(thumbnail_file(image))

They are opened by `capivara_common.image_files`, and read by `capivara_search.picture_files`.
"""

import io

import PIL.Image
from PIL.Image import Resampling

THUMBNAIL_SIDE = 256  # pixels of the longer side
# WebP at 90 takes 4.0 kB a picture of OpenMoji and has a cosine of 0.994 to it under the demo model; JPEG at 85 takes
# 7.3 kB and has 0.950. A random picture that the page draws is a thumbnail, so it had better be found again.
THUMBNAIL_QUALITY = 90
THUMBNAIL_METHOD = 2  # of WebP: takes 2.5 ms of a photograph where 4, the default, takes 16 ms, and 1 % more bytes
TURNS = {  # EXIF orientation -> how the pixels become upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)  # orientations whose width is the upright height


def upright(image: PIL.Image.Image, orientation: int | None) -> PIL.Image.Image:
    """An image turned as its EXIF orientation says."""
    turn = TURNS.get(orientation or 1)
    return image if turn is None else image.transpose(turn)


def thumbnail_file(image: PIL.Image.Image) -> bytes:
    """A thumbnail as WebP file, transparent images on white."""
    buffer = io.BytesIO()
    small = at_most(on_white(image), THUMBNAIL_SIDE)
    small.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY, method=THUMBNAIL_METHOD)
    return buffer.getvalue()


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image as RGB, transparent parts white: as people see it.

    The model's image processor leaves out transparency, and what it finds there is black most often: a logo in black
    would be a black square.
    """
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def at_most(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The longer side brought to `side` pixels where it has more."""
    long = max(image.size)
    if long <= side:
        return image
    size = tuple(max(1, round(length * side / long)) for length in image.size)
    return image.resize(size, Resampling.BICUBIC, reducing_gap=2.0)


def short_side(image: PIL.Image.Image, size: tuple[int, int], side: int) -> PIL.Image.Image:
    """The short side brought to `side` pixels where it has more, as the model's image processor does.

    Args:
        image: (width, height), perhaps decoded at reduced size.
        size: of the image in its file, which decides the shape: of reduced sides, rounded up, it would be another one.
        side: pixels.
    """
    short, long = min(size), max(size)
    if short <= side:
        return image
    long_side = int(side * long / short)  # as `resize_short_side`, which test_picture_files.py compares
    wanted = (side, long_side) if size[0] <= size[1] else (long_side, side)
    scale = round(size[0] / image.width)  # 1, 2, 4 or 8
    return image.resize(wanted, Resampling.BICUBIC, box=(0, 0, size[0] / scale, size[1] / scale))
