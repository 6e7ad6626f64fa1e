"""A RAW file of a camera, as small as LibRaw takes it."""

import io
import struct

import numpy as np
import PIL.Image

FORMATS = {1: "B", 3: "H", 4: "I"}  # kinds of TIFF: bytes, 16 bits, 32 bits; 2 is text, 5 and 10 are fractions


class _Tiff:
    def __init__(self) -> None:
        self.file = bytearray(b"II*\0\0\0\0\0")

    def put(self, data: bytes) -> int:
        """Where the data are, from the file's start."""
        self.file += b"\0" * (-len(self.file) % 4)
        self.file += data
        return len(self.file) - len(data)

    def folder(self, tags: dict[int, tuple[int, object]]) -> int:
        """Where a folder of tag -> (kind, values) is."""
        entries = b""
        for tag, (kind, values) in sorted(tags.items()):
            if kind == 2:
                data = values.encode() + b"\0"
            elif kind in FORMATS:
                data = struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)
            else:
                data = b"".join(struct.pack("<ii", *fraction) for fraction in values)
            count = len(data) if kind == 2 else len(values)
            data = data if len(data) <= 4 else struct.pack("<I", self.put(data))
            entries += struct.pack("<HHI", tag, kind, count) + data.ljust(4, b"\0")
        return self.put(struct.pack("<H", len(tags)) + entries + bytes(4))


def made_dng(preview: bytes | None, orientation: int = 1, size: tuple[int, int] = (64, 48)) -> bytes:
    """A DNG file of a grey sensor, taken on 9 July 2024 at 10:11:12.

    Args:
        preview: JPEG file in it; none where None.
        orientation: 1 to 8, of EXIF.
        size: pixels of the sensor, width and height.
    """
    tiff, (width, height) = _Tiff(), size
    pixels = tiff.put(np.full((height, width), 2000, "<u2").tobytes())
    sensor = {
        **{254: (4, [0]), 256: (4, [width]), 257: (4, [height]), 258: (3, [16]), 259: (3, [1]), 262: (3, [32803])},
        **{273: (4, [pixels]), 277: (3, [1]), 278: (4, [height]), 279: (4, [width * height * 2]), 284: (3, [1])},
        **{33421: (3, [2, 2]), 33422: (1, [0, 1, 1, 2]), 50714: (3, [0]), 50717: (4, [4095])},
    }
    camera = {
        **{271: (2, "Capivara"), 272: (2, "Teste"), 274: (3, [orientation]), 50706: (1, [1, 4, 0, 0])},
        **{50708: (2, "Capivara Teste"), 50728: (5, [(1, 1)] * 3), 50778: (3, [21])},
        50721: (10, [(int(row == column), 1) for row in range(3) for column in range(3)]),
        34665: (4, [tiff.folder({36867: (2, "2024:07:09 10:11:12")})]),
    }
    if preview is None:
        first = {**sensor, **camera}
    else:
        wide, high = PIL.Image.open(io.BytesIO(preview)).size
        first = {
            **camera,
            **{254: (4, [1]), 256: (4, [wide]), 257: (4, [high]), 258: (3, [8, 8, 8]), 259: (3, [7]), 262: (3, [6])},
            **{273: (4, [tiff.put(preview)]), 277: (3, [3]), 278: (4, [high]), 279: (4, [len(preview)])},
            330: (4, [tiff.folder(sensor)]),
        }
    struct.pack_into("<I", tiff.file, 4, tiff.folder(first))
    return bytes(tiff.file)
