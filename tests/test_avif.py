"""The size of the frames in AVIF files: a file whose `ispe` box declares too few pixels is refused before decoding."""

import io
import struct

import numpy as np
import PIL.Image
import pytest

from capivara_common.avif import MAX_BOXES, _find_boxes, _read_size_from_sequence_header, largest_frame_size
from capivara_common.image_files import BadImage, check_and_open_image_without_decoding

SIZE, SMALL = (300, 200), (20, 20)


def encode(size=SIZE, mode="RGB", frames=1) -> bytes:
    """Return an AVIF file with noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (frames, size[1], size[0], len(mode)), dtype=np.uint8)
    images, stream = [PIL.Image.fromarray(frame, mode) for frame in pixels], io.BytesIO()
    images[0].save(stream, "AVIF", save_all=frames > 1, append_images=images[1:], quality=10, speed=10)
    return stream.getvalue()


def declare(data: bytes, size: tuple[int, int]) -> bytes:
    """Write a size into all `ispe` boxes of a file."""
    before, *boxes = data.split(b"ispe")
    return b"ispe".join([before, *(box[:4] + struct.pack(">II", *size) + box[12:] for box in boxes)])


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])  # an image with transparency has two items
@pytest.mark.parametrize("frames", [1, 2])  # two frames are tracks of an image sequence
def test_the_size_is_read_from_the_stream(mode, frames):
    data = encode(mode=mode, frames=frames)
    assert largest_frame_size(data) == SIZE
    assert largest_frame_size(declare(data, SMALL)) == SIZE
    without_items = data.replace(b"meta", b"free", 1)  # an image sequence also has its first frame as an item
    assert largest_frame_size(without_items) == (SIZE if frames > 1 else (0, 0))


def test_a_file_that_declares_too_few_pixels_is_refused_before_decoding():
    data = declare(encode(), SMALL)
    assert check_and_open_image_without_decoding(data, "a.avif", max_pixels=SIZE[0] * SIZE[1]).size == SMALL
    with pytest.raises(BadImage, match="300 x 200 pixels; at most 50,000 pixels") as caught:
        check_and_open_image_without_decoding(data, "a.avif", max_pixels=50_000)
    assert caught.value.reason == "absurd image size"


def test_a_size_that_cannot_be_read_does_not_refuse_a_file():
    """Only the file's `ispe` box counts then, and the image is decoded alone."""
    data = encode()
    start = data.index(b"mdat") + 4
    hidden = (
        data[:start] + bytes([0x7A, 0]) * 200 + data[start:]
    )  # empty padding before the stream, which is found no more
    assert largest_frame_size(hidden) == (0, 0)
    for cut in range(0, len(data), 7):  # no error, whatever is missing
        assert largest_frame_size(data[:cut]) in ((0, 0), SIZE)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = np.frombuffer(data[:450], np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 5)] = rng.integers(0, 256, 5)
        largest_frame_size(damaged.tobytes() + data[450:])


def bits(*fields: tuple[int, int]) -> bytes:
    """Return numbers, given as (value, number of bits), one after another, as the payload of a sequence header."""
    text = "".join(f"{value:0{width}b}" for value, width in fields)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8))


LAST = [(8, 4), (7, 4), (299, 9), (199, 8)]  # bits of width and height; width and height, minus one


@pytest.mark.parametrize(
    "fields",
    [
        [(0, 3), (1, 1), (1, 1), (4, 5)],  # reduced header of a still image
        [(0, 3), (0, 1), (0, 1), (0, 1), (0, 1), (0, 5), (0, 12), (8, 5), (1, 1)],  # a level that has a tier
        [  # timing and decoder model, and two operating points, the second with all that may be there
            *[(0, 3), (0, 1), (0, 1), (1, 1), (1, 32), (30, 32), (1, 1), (0b00101, 5), (1, 1)],
            *[(9, 5), (1, 32), (3, 5), (3, 5), (1, 1), (1, 5)],
            *[(0, 12), (7, 5), (0, 1), (0, 1)],
            *[(1, 12), (9, 5), (1, 1), (1, 1), (5, 10), (6, 10), (1, 1), (1, 1), (10, 4)],
        ],
    ],
)
def test_optional_fields_of_a_sequence_header_are_skipped(fields):
    assert _read_size_from_sequence_header(bits(*fields, *LAST)) == SIZE


def test_a_search_for_boxes_ends():
    """Otherwise a file of 100 MB, with twelve million empty boxes, would take many seconds."""
    data = encode()
    start = data.index(b"meta") - 4
    few, many = (data[:start] + struct.pack(">I4s", 8, b"free") * number + data[start:] for number in (9, MAX_BOXES))
    # The place of the stream, which the file states, is wrong now; the boxes are found, or not.
    assert len(list(_find_boxes(memoryview(few), b"meta"))) == 1
    assert not list(_find_boxes(memoryview(many), b"meta"))
