"""Read the size of the frames in an AVIF file without decoding them.

A frame is one picture in the file, in compressed form. A hostile file can declare a small image and contain huge
frames, which would fill the memory during decoding. `image_files.py` refuses such a file before it is decoded.
"""

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, islice

# An AVIF file consists of nested boxes (ISO/IEC 14496-12 and 23008-12). The box `ispe` declares the size of the image,
# but the decoder allocates memory for the frames, which may be larger. Their size is in the sequence headers of the AV1
# streams (AV1 specification, section 5.5.1). A still image has one stream per tile, and further streams for
# transparency.

# Limits on the work for one file, so that a malicious file can't keep the parser busy for long. Valid files stay below
# them.
MAX_BOXES = 100_000  # number of child boxes (nested parts of an AVIF file) that are read in one box
# Number of OBUs (units of an AV1 stream) that are read per stream. A few suffice, because the sequence header, which
# states the frame size, precedes the first frame.
MAX_OBUS = 100
MAX_ITEM_TABLE_BYTES = 64_000  # size of the table of images and metadata; enough for 4,000 entries
MAX_STREAM_BYTES = 1_000_000  # number of bytes that are read from one AV1 stream
MAX_SEQUENCE_HEADER_BYTES = 512  # the longest possible sequence header takes about 400 bytes
# Type number of the OBUs (open bitstream units) that state the frame size
SEQUENCE_HEADER = 1
TRACK_PATH = (b"moov", b"trak", b"mdia", b"minf", b"stbl")  # nested boxes that lead to the list of frames of a sequence


def largest_frame_size(data: bytes) -> tuple[int, int]:
    """Return the size of the largest frame in an AVIF file, without decoding it, so that huge frames can be refused.

    Of an image sequence, only the first frame of each track is read.

    Args:
        data: Content of the whole file.

    Returns:
        (width, height) in pixels of the frame with the most pixels. (0, 0) if no size can be read.
    """
    file, sizes = memoryview(data), [(0, 0)]
    for find_streams in (_item_streams, _track_streams):
        with suppress(ValueError, IndexError, EOFError, struct.error):  # keep the sizes found before a damaged part
            for stream in find_streams(file):
                sizes.extend(_frame_sizes(stream))
    return max(sizes, key=lambda size: size[0] * size[1])


def _find_boxes(content: memoryview, *path: bytes) -> Iterator[memoryview]:
    """Yield the contents of all boxes at a path of box types, such as `b"moov", b"trak"`.

    The search in a box ends at the first child box that is damaged or does not fit into it.
    """
    start = 0
    for _ in range(MAX_BOXES):
        if start + 8 > len(content):
            return
        size, kind = struct.unpack_from(">I4s", content, start)
        header = 8
        if size == 1 and start + 16 <= len(content):  # size 1 means that the size follows in 64 bits
            size, header = *struct.unpack_from(">Q", content, start + 8), 16
        stop = start + size if size else len(content)  # size 0 means that the box extends to the end
        if not start + header <= stop <= len(content):
            return
        if kind == path[0]:
            inner = content[start + header : stop]
            yield from _find_boxes(inner, *path[1:]) if path[1:] else [inner]
        start = stop


def _item_streams(file: memoryview) -> Iterator[bytearray]:
    """Yield the AV1 stream of each item of a still image: of the image, its tiles and its transparency.

    Raises:
        ValueError: If a table of items is too large.
        EOFError: If a table of items is incomplete.
    """
    for meta in _find_boxes(file, b"meta"):
        idat = next(_find_boxes(meta[4:], b"idat"), memoryview(b""))  # skip 4 bytes: version and flags
        items = {
            int.from_bytes(entry[4:8] if entry[0] == 3 else entry[4:6])
            for table in _find_boxes(meta[4:], b"iinf")
            for entry in _find_boxes(table[8 if table[0] else 6 :], b"infe")
            if bytes(entry[10:14] if entry[0] == 3 else entry[8:12]) == b"av01"
        }
        for table in _find_boxes(meta[4:], b"iloc"):
            for item, extents in _item_locations(table):
                if item in items:
                    stream = bytearray()
                    for in_idat, start, size in extents:
                        piece = (idat if in_idat else file)[start:]
                        stream += piece[: min(size or len(piece), MAX_STREAM_BYTES - len(stream))]
                    yield stream


def _item_locations(table: memoryview) -> Iterator[tuple[int, list[tuple[bool, int, int]]]]:
    """Yield the number and the extents (ranges of bytes) of each item that an `iloc` box lists.

    Args:
        table: Content of the `iloc` box.

    Yields:
        The tuple (item number, extents). Each extent is a tuple (in_idat, start, size). `in_idat` says whether `start`
        is an offset in the `idat` box instead of the file. `size` is in bytes; 0 means up to the end.

    Raises:
        ValueError: If the table is too large.
        EOFError: If the table is incomplete.
    """
    if len(table) > MAX_ITEM_TABLE_BYTES:
        raise ValueError(f"The AVIF item table must have at most {MAX_ITEM_TABLE_BYTES:,} bytes, got {len(table):,}.")
    stream = io.BytesIO(table)

    def read(size: int) -> int:
        if len(content := stream.read(size)) < size:
            raise EOFError("The item table of the AVIF file is incomplete.")
        return int.from_bytes(content)

    version, _, sizes = read(1), read(3), read(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    for _ in range(read(4 if version == 2 else 2)):
        item = read(4 if version == 2 else 2)
        in_idat = bool(version and read(2) & 15)
        read(2)  # skip the data reference, a field that the frame size does not need
        base, extents = read(base_size), []
        for _ in range(read(2)):
            if version:
                read(index_size)
            extents.append((in_idat, base + read(offset_size), read(length_size)))
        yield item, extents


def _track_streams(file: memoryview) -> Iterator[memoryview]:
    """Yield the first sample of each track of an image sequence.

    Raises:
        struct.error: If a table of samples is incomplete.
    """
    for table in _find_boxes(file, *TRACK_PATH):
        for name, number in ((b"stco", ">I"), (b"co64", ">Q")):
            for chunks, sizes in zip(_find_boxes(table, name), _find_boxes(table, b"stsz"), strict=False):
                (start,) = struct.unpack_from(number, chunks, 8)  # skip 8 bytes: version, flags and number of chunks
                (size,) = struct.unpack_from(">I", sizes, 4)  # size 0 means that the size of each sample follows
                size = size or struct.unpack_from(">I", sizes, 12)[0]
                yield file[start : start + size]


def _frame_sizes(stream: bytearray | memoryview) -> Iterator[tuple[int, int]]:
    """Yield (width, height) in pixels of each sequence header in an AV1 stream, up to the first damaged part."""
    position = 0
    with suppress(IndexError, ValueError):
        for _ in range(MAX_OBUS):
            header = stream[position]
            position += 2 if header & 4 else 1  # skip the header, and its extension byte if there is one
            size = len(stream)
            if header & 2:  # the size follows in LEB128: seven bits per byte, the least significant bits first
                size = 0
                for shift in range(0, 56, 7):
                    byte = stream[position]
                    position, size = position + 1, size | (byte & 127) << shift
                    if byte < 128:
                        break
            if header >> 3 & 15 == SEQUENCE_HEADER:
                end = position + min(size, MAX_SEQUENCE_HEADER_BYTES)
                yield _read_size_from_sequence_header(stream[position:end])
            position += size


def _read_size_from_sequence_header(payload: bytearray | memoryview) -> tuple[int, int]:
    """Return the largest width and height, in pixels, of the frames that an AV1 sequence header allows.

    Raises:
        ValueError: If the payload is too short.
    """
    bits = iter(f"{int.from_bytes(payload):0{8 * len(payload)}b}")

    def read(number: int) -> int:
        return int("".join(islice(bits, number)), 2)

    # The names in the comments are fields of the sequence header in the AV1 specification (section 5.5).
    read(4)  # skip seq_profile (3 bits) and still_picture (1 bit)
    if read(1):  # reduced_still_picture_header: the header has no timing information and no operating points
        read(5)  # skip seq_level_idx (5 bits), the level of the AV1 specification
    else:
        _skip_timing_and_operating_points(read)
    width_bits, height_bits = read(4) + 1, read(4) + 1
    return read(width_bits) + 1, read(height_bits) + 1


def _skip_timing_and_operating_points(read: Callable[[int], int]) -> None:
    """Skip the timing information and the operating points of an AV1 sequence header.

    Args:
        read: Function that takes a number of bits, reads that many bits, and returns them as an unsigned integer.
    """
    delay_bits = 0
    if read(1):  # timing_info_present_flag: timing information follows
        read(64)
        # The next bit is equal_picture_interval. If it is 1, a number in Exp-Golomb code follows: n zero bits, a one
        # bit, and n more bits. `next` reads up to the one bit and returns n. Then the n more bits are skipped.
        if read(1) and (zeros := next(number for number in count() if read(1))):
            read(zeros)
        if read(1):  # decoder_model_info_present_flag: information about a decoder model follows
            delay_bits = read(5) + 1
            read(42)
    has_display_delay = read(1)
    for _ in range(read(5) + 1):
        read(12)
        if read(5) > 7:  # seq_level_idx: levels above 7 are followed by one bit for the tier
            read(1)
        if delay_bits and read(1):  # decoder_model_present_for_this_op: decoder settings follow
            read(2 * delay_bits + 1)
        if has_display_delay and read(1):  # initial_display_delay_present_for_this_op: a display delay follows
            read(4)
