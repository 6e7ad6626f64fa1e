"""Write a RAW file as small as LibRaw accepts it."""

import io
import struct

import numpy as np
import PIL.Image

FORMATS = {1: "B", 3: "H", 4: "I"}  # TIFF types of integers: 8, 16 and 32 bits; type 2 is text, 5 and 10 are fractions


class _Tiff:
    def __init__(self) -> None:
        self.file = bytearray(b"II*\0\0\0\0\0")

    def put(self, data: bytes) -> int:
        """Append data to the file and return their offset."""
        self.file += b"\0" * (-len(self.file) % 4)
        self.file += data
        return len(self.file) - len(data)

    def folder(self, tags: dict[int, tuple[int, object]]) -> int:
        """Append a directory of tag -> (type, values) and return its offset."""
        entries = b""
        for tag, (tag_type, values) in sorted(tags.items()):
            if tag_type == 2:
                data = values.encode() + b"\0"
            elif tag_type in FORMATS:
                data = struct.pack(f"<{len(values)}{FORMATS[tag_type]}", *values)
            else:
                data = b"".join(struct.pack("<ii", *fraction) for fraction in values)
            count = len(data) if tag_type == 2 else len(values)
            data = data if len(data) <= 4 else struct.pack("<I", self.put(data))
            entries += struct.pack("<HHI", tag, tag_type, count) + data.ljust(4, b"\0")
        return self.put(struct.pack("<H", len(tags)) + entries + bytes(4))


def made_dng(preview: bytes | None, orientation: int = 1, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return a DNG file of a gray sensor, taken on 9 July 2024 at 10:11:12.

    Args:
        preview: JPEG file in it. None: no preview.
        orientation: EXIF orientation, 1 to 8.
        size: Width and height of the sensor in pixels.
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
        main_tags = {**sensor, **camera}
    else:
        preview_width, preview_height = PIL.Image.open(io.BytesIO(preview)).size
        main_tags = {
            **camera,
            **{
                254: (4, [1]),
                256: (4, [preview_width]),
                257: (4, [preview_height]),
                258: (3, [8, 8, 8]),
                259: (3, [7]),
                262: (3, [6]),
            },
            **{273: (4, [tiff.put(preview)]), 277: (3, [3]), 278: (4, [preview_height]), 279: (4, [len(preview)])},
            330: (4, [tiff.folder(sensor)]),
        }
    struct.pack_into("<I", tiff.file, 4, tiff.folder(main_tags))
    return bytes(tiff.file)
