"""Picture files: which are found in folders, what is read of each, and why others are skipped."""

import base64
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import skimage.data
from made_index import expect_error
from made_raw import made_dng
from PIL.ExifTags import GPS, IFD, Base

from capivara_common import image_files
from capivara_common.image_files import EXIF_TRANSPOSES, BadImage, open_regular_file_safe_from_link_swaps
from capivara_search import picture_reading
from capivara_search.exif import read_exif_date_and_location
from capivara_search.folder_scan import FileState, find_pictures_and_unreadable_files
from capivara_search.messages import Messages
from capivara_search.picture_reading import (
    REDUCED_DECODE_FACTOR,
    Picture,
    open_query_picture,
    read_picture_for_indexing,
)
from modeling_capivara import CapivaraImageProcessor

SLOW = pytest.mark.slow
RED, GREEN, BLUE, GRAY = (220, 30, 30), (30, 200, 30), (30, 30, 220), (128, 128, 128)
# An AVIF file whose `ispe` box declares 100 x 100 pixels, but whose AV1 stream has 16,384 x 12,200; zlib and base64.
LYING_AVIF = (
    "eNpjYGBQSCupLEgsy0xjAAIQnZuZZpibmZjm62joBBR6nZtaksgAAYoZKTlFUDZDQWZyCQMa4CvILMkFsxiBWC4zJz8ZxHEB8Rkh"
    "oozCDAzc7kC2RmZmXhpcrRSQk8oE5SWWGRg65+fkg+3KyiwoKgDS3pkFyflAWiSzuCAVal8KFAsUZFZkggSYOTg4gBRPYpmhc6M8"
    "D0hIODk/pygvOacCaDIvA1sDUEg8syAX5iegw1gYmZpZgK7yz01JLBFi4OKW/17/f9/cRUxSvBxGW8UkmwUfPiwvuexrsHGDAkPg"
    "+VNaT55f/hHVcPDjk4Q05tfyKmu7F/tG7WFMDWXl4bhi2TaTjfkmo99UwfvHDiyaqL5QPsr+WIbmvjtv1z1pLnuqWJuVf2zbm23u"
    "cZc5X2m5nl4YK9swauSokaNGjho5auSokaNG0snILCobmbBXfNWtA9+P6vAqn9/fcm/HrjU7NxaHcqRkdlS9GbVr1K7BYBcdrQIA"
    "Eaja1A=="
)
# Formats with an EXIF orientation, and the orientations to test.
ORIENTED = [
    *(("JPEG", orientation) for orientation in range(1, 9)),
    *((kind, 6) for kind in ("PNG", "WEBP", "TIFF", "AVIF", "HEIF")),
]


def corners(size: tuple[int, int] = (80, 60)) -> PIL.Image.Image:
    """Return an image with red, green, blue and gray quarters in reading order, so that any rotation is visible."""
    image, (width, height) = PIL.Image.new("RGB", size), size
    for number, color in enumerate((RED, GREEN, BLUE, GRAY)):
        left, top = number % 2 * width // 2, number // 2 * height // 2
        image.paste(color, (left, top, left + width // 2, top + height // 2))
    return image


def is_upright(image: PIL.Image.Image) -> bool:
    """Return whether an image has the colors of `corners` in their places."""
    width, height = image.size
    colors = [image.getpixel((x * width // 4, y * height // 4)) for y in (1, 3) for x in (1, 3)]
    return all(np.abs(np.subtract(a, b)).max() < 40 for a, b in zip(colors, (RED, GREEN, BLUE, GRAY), strict=True))


def encode(image: PIL.Image.Image, kind: str = "JPEG", **options) -> bytes:
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def write_file(path: Path, data: bytes | PIL.Image.Image, **options) -> FileState:
    """Write a file and return its state, as `find_pictures_and_unreadable_files` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else encode(data, **options))
    state = path.stat()
    return FileState(str(path), state.st_size, state.st_mtime_ns)


def photograph(width: int, height: int) -> PIL.Image.Image:
    """Return a real photograph, scaled."""
    return PIL.Image.fromarray(skimage.data.astronaut()).resize((width, height), PIL.Image.Resampling.BICUBIC)


def make_exif(orientation: int | None = None, **dates: str) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    if orientation:
        exif[Base.Orientation] = orientation
    for name, date in dates.items():
        tag = Base[name]
        (exif if tag == Base.DateTime else exif.get_ifd(IFD.Exif))[tag] = date
    return exif


def scan(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the pictures in a folder, and the reasons of skipped files, by path relative to the folder."""
    files, skipped_files = find_pictures_and_unreadable_files([folder])
    reasons = {os.path.relpath(skipped.path, folder): skipped.reason for skipped in skipped_files}
    return [os.path.relpath(file.path, folder) for file in files], reasons


def reason(path: Path) -> str:
    """Return the reason why a file can't be read, without the name of its folder and with a Portuguese translation."""
    with pytest.raises(BadImage) as error:
        read_picture_for_indexing(FileState(str(path), 0, 0))
    assert Messages("pt").has(f"reason.{error.value.reason}") and str(path.parent) not in str(error.value)
    return str(error.value)


# --- Scan of folders -------------------------------------------------------------------------------------------------


def test_pictures_are_found_by_suffix(tmp_path):
    names = ["b.JPG", "a/z.heic", "a/é.png", "a/b/c.CR2", "a.jpg", "férias 2024/IMG 1.jpeg"]
    others = [
        *("notes.txt", "jpg", ".hidden.jpg", "a/.thumbnails/x.jpg", "@eaDir/b.JPG/thumb.jpg", "__MACOSX/._b.jpg"),
        *("film.mp4", "a/b.jpg.part", "$RECYCLE.BIN/x.jpg"),
    ]
    states = [write_file(tmp_path / name, b"anything") for name in names]
    for name in others:
        write_file(tmp_path / name, b"anything")
    files, skipped_files = find_pictures_and_unreadable_files([tmp_path])
    assert files == sorted(states, key=lambda file: file.path) and not skipped_files
    assert find_pictures_and_unreadable_files([tmp_path / "a", tmp_path, str(tmp_path)])[0] == files, (
        "a folder that is named twice was scanned twice"
    )


def test_paths_are_absolute_and_keep_the_links_that_the_user_names(tmp_path, monkeypatch):
    write_file(tmp_path / "disk" / "fotos" / "a.jpg", b"x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "Fotos").symlink_to(tmp_path / "disk" / "fotos")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    path = str(tmp_path / "home" / "Fotos" / "a.jpg")
    for folder in ("~/Fotos", "Fotos", Path("../home/./Fotos/")):
        assert [file.path for file in find_pictures_and_unreadable_files([folder])[0]] == [path]
    assert [file.path for file in find_pictures_and_unreadable_files(["Fotos", tmp_path / "disk"])[0]] == [path], (
        "a folder with two names was scanned twice"
    )


def test_missing_and_empty_folders_are_refused(tmp_path):
    write_file(tmp_path / "a.jpg", b"x")
    write_file(tmp_path / "empty" / "notes.txt", b"x")
    for folders, code in (
        ([tmp_path / "gone"], None),
        ([tmp_path / "a.jpg"], None),
        ([tmp_path, tmp_path / "empty"], "no_picture"),
    ):
        with expect_error(code, path=folders[-1]):
            find_pictures_and_unreadable_files(folders)


def test_links_are_not_followed_but_counted(tmp_path):
    fotos = tmp_path / "fotos"
    write_file(tmp_path / "private" / "secret.jpg", b"x")
    for name in ("a.jpg", ".annex/k1.jpg", "year/b.jpg"):
        write_file(fotos / name, b"x")
    for link, target in (
        ("out.jpg", tmp_path / "private" / "secret.jpg"),
        ("out", tmp_path / "private"),
        ("notes", tmp_path / "private" / "secret.jpg"),  # without the suffix of a picture, so it is not counted
        ("same.jpg", fotos / "a.jpg"),
        ("again", fotos / "year"),
        ("year/round", fotos),
        ("year/itself", fotos / "year" / "itself"),
        ("hidden.jpg", fotos / ".annex" / "k1.jpg"),
        ("lost.jpg", fotos / "nowhere.jpg"),
    ):
        (fotos / link).symlink_to(target)
    files, skipped_files = find_pictures_and_unreadable_files([fotos], ignored_counts=(counts := {}))
    assert [file.path for file in files] == [str(fotos / "a.jpg"), str(fotos / "year/b.jpg")] and not skipped_files
    assert counts == {str(fotos): {"hidden": 1, "link": 7}}


def test_pipes_are_never_opened(tmp_path):
    write_file(tmp_path / "a.jpg", b"x")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    names, reasons = scan(tmp_path)
    assert names == ["a.jpg"] and reasons.keys() == {"pipe.jpg"}
    assert reasons["pipe.jpg"].startswith("no regular file: ")
    assert reason(tmp_path / "pipe.jpg").startswith("no regular file")
    assert reason(tmp_path / "zero.jpg").startswith("no regular file")
    assert reason(tmp_path).startswith("no regular file")


@pytest.fixture
def restricted_folder():
    """A folder whose permissions apply: a test that runs as root can become the user nobody."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_files_and_folders_without_permission_are_skipped(restricted_folder):
    readable, shut = (
        write_file(restricted_folder / "a.jpg", corners()),
        write_file(restricted_folder / "shut.jpg", corners()),
    )
    write_file(restricted_folder / "closed" / "b.jpg", corners())
    write_file(restricted_folder / "root" / "b.jpg", corners())
    for name in ("shut.jpg", "closed", "root"):
        (restricted_folder / name).chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    names, reasons = scan(restricted_folder)
    assert names == ["a.jpg"] and set(reasons) == {"shut.jpg", "closed", "root"}
    assert all(reason.startswith("no permission: ") for reason in reasons.values())
    with expect_error("folder_shut", path=restricted_folder / "root"):
        find_pictures_and_unreadable_files([restricted_folder / "root"])
    assert reason(Path(shut.path)).startswith("no permission")
    assert read_picture_for_indexing(readable).image.size == (80, 60)


def test_names_that_are_not_utf_8_are_skipped(tmp_path):
    write_file(tmp_path / "a.jpg", b"x")
    try:
        os.close(os.open(os.fsencode(tmp_path) + b"/f\xe9rias.jpg", os.O_CREAT))
    except OSError:
        pytest.skip("this file system accepts only UTF-8")
    names, reasons = scan(tmp_path)
    assert names == ["a.jpg"] and [*reasons] == ["f�rias.jpg"] and reasons["f�rias.jpg"].startswith("name is no text: ")


# --- Reading pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF"])
def test_every_format_is_read(kind, tmp_path):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    file = write_file(tmp_path / "a.jpg", corners((400, 300)), kind=kind)  # the content decides, not the name
    picture, whole = read_picture_for_indexing(file, image_size=64), open_query_picture(file.path)
    assert (picture.width, picture.height) == whole.size == (400, 300) and picture.image.size == (85, 64)
    assert picture.image.mode == whole.mode == "RGB" and is_upright(picture.image) and is_upright(whole)
    thumbnail = PIL.Image.open(io.BytesIO(picture.thumbnail))
    assert thumbnail.format == "WEBP" and thumbnail.size == (256, 192) and is_upright(thumbnail.convert("RGB"))
    assert picture.taken is picture.latitude is picture.longitude is None


@pytest.mark.parametrize(("kind", "orientation"), ORIENTED)
def test_pictures_are_upright(kind, orientation, tmp_path):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    # With this size, reduced sides are rounded up; the proportions must still be those of the file.
    inverse = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(orientation)  # orientation that undoes this one
    image = corners((1212, 900)) if inverse is None else corners((1212, 900)).transpose(EXIF_TRANSPOSES[inverse])
    file = write_file(tmp_path / "a", image, kind=kind, exif=make_exif(orientation).tobytes())
    picture, whole = read_picture_for_indexing(file, image_size=32), open_query_picture(file.path)
    assert (picture.width, picture.height) == whole.size == (1212, 900) and picture.image.size == (43, 32)
    assert is_upright(picture.image) and is_upright(whole)
    assert is_upright(PIL.Image.open(io.BytesIO(picture.thumbnail)).convert("RGB"))


def test_animated_pictures_are_read_by_their_first_frame(tmp_path):
    frames = [PIL.Image.new("RGB", (60, 40), color) for color in (GREEN, RED, BLUE)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        image = read_picture_for_indexing(write_file(tmp_path / "a.gif", data)).image
        assert image.size == (60, 40) and np.abs(np.subtract(image.getpixel((20, 20)), GREEN)).max() < 25, kind


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I", "F", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    """The left half is lighter in each mode."""
    gray = PIL.Image.fromarray(np.repeat([[230, 20]], 32, axis=1).astype(np.uint8).repeat(48, axis=0))
    if mode in ("I;16", "I", "F"):
        image = PIL.Image.fromarray(np.asarray(gray).astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode]))
        image = PIL.Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else image
    else:
        image = gray.convert("RGB").convert(mode)
    assert image.mode == mode
    kinds = {"YCbCr": "JPEG"} | dict.fromkeys(("RGBA", "LA", "P", "L", "1", "I;16"), "PNG")
    result = read_picture_for_indexing(write_file(tmp_path / "a", image, kind=kinds.get(mode, "TIFF"))).image
    left, right = np.asarray(result)[:, :30].mean(), np.asarray(result)[:, 34:].mean()
    assert result.mode == "RGB" and left > 200 and right < 50


def test_transparent_parts_become_white(tmp_path):
    logo = PIL.Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (100, 100, 200, 200))
    palette = PIL.Image.new("P", (300, 300), 1)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(0, (100, 100, 200, 200))
    for data in (encode(logo, "PNG"), encode(logo, "WEBP", lossless=True), encode(palette, "GIF", transparency=1)):
        picture = read_picture_for_indexing(write_file(tmp_path / "a.png", data), image_size=150)
        for image in (picture.image, PIL.Image.open(io.BytesIO(picture.thumbnail)).convert("RGB")):
            assert min(image.getpixel((5, 5))) > 245
            assert max(image.getpixel((image.width // 2, image.height // 2))) < 10


# --- Decoding at reduced size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(500, 333), *(pytest.param(size, marks=SLOW) for size in [(1805, 903), (1795, 3589)])]
)
def test_images_equal_those_of_the_image_processor(size, tmp_path):
    """Bit by bit; for JPEGs decoded at reduced size, up to a root mean square difference of 0.8 of 255."""
    processor = CapivaraImageProcessor()
    image = photograph(*size)
    for kind in ("PNG", "JPEG"):
        file = write_file(tmp_path / "a", image, kind=kind)
        whole, reduced = open_query_picture(file.path), read_picture_for_indexing(file)
        assert whole.size == size == (reduced.width, reduced.height) and min(reduced.image.size) == 224
        expected, actual = processor([whole, reduced.image], do_normalize=False).pixel_values.numpy() * 255
        assert whole.tobytes() == PIL.Image.open(file.path).tobytes()
        difference = np.sqrt(np.square(expected - actual).mean())
        assert difference == 0 if kind == "PNG" or min(size) < 2 * REDUCED_DECODE_FACTOR * 224 else 0 < difference < 0.8


def test_pictures_above_the_pixel_limit_of_datasets_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    file = write_file(tmp_path / "a.jpg", photograph(1600, 1200))
    monkeypatch.setattr(picture_reading, "MAX_IMAGE_PIXELS", 1_000_000)
    picture = read_picture_for_indexing(file)
    assert (picture.width, picture.height) == (1600, 1200) and picture.image.size == (298, 224)
    assert read_while_locked(file) == picture


def read_while_locked(file: FileState) -> Picture:
    """Read a picture while the lock for large images is held, and check that it waits."""
    with ThreadPoolExecutor(1) as threads:
        with image_files.LARGE_IMAGE_LOCK:
            waiting = threads.submit(read_picture_for_indexing, file)
            time.sleep(0.2)
            assert not waiting.done()
        return waiting.result()


def test_avif_files_of_any_size_are_decoded_one_at_a_time(tmp_path):
    """The header of an AVIF file may declare fewer pixels than its stream contains."""
    file = write_file(tmp_path / "a.avif", photograph(64, 48), kind="AVIF")
    assert (read_while_locked(file).width, read_picture_for_indexing(file).height) == (64, 48)


@SLOW
def test_avif_files_that_declare_too_few_pixels_take_little_memory():
    """Each of the eight files takes 409 MB while its 16,384 x 12,200 pixels are decoded, which this limit allows.

    The peak of `getrusage` would include the memory of the process that started this one.
    """
    with pytest.raises(BadImage, match="16384 x 12200 pixels"):
        image_files.check_and_open_image_without_decoding(zlib.decompress(base64.b64decode(LYING_AVIF)), "a.avif")
    program = (
        "import base64, re, sys, zlib\n"
        "from capivara_common.image_files import ImageAccess, decode_row_images\n"
        "data = zlib.decompress(base64.b64decode(sys.stdin.read()))\n"
        "access = ImageAccess(max_pixels=200_000_000)\n"
        "images = list(decode_row_images(range(8), lambda row: {'bytes': data, 'path': None}, access))\n"
        "peak = re.search(r'VmHWM: *(\\d+)', open('/proc/self/status').read().replace('\\t', ' '))\n"
        "print({image.size for image in images}, int(peak[1]) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], input=LYING_AVIF, capture_output=True, text=True, check=True)
    size, megabytes = done.stdout.rsplit(maxsplit=1)
    assert size == "{(100, 100)}" and int(megabytes) < 1_000


# --- RAW and HEIC ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_raw_files_are_read_by_their_preview(orientation, tmp_path):
    pytest.importorskip("rawpy")
    inverse = {3: 3, 6: 8, 8: 6}.get(orientation)
    image = corners((640, 480)) if orientation in (1, 3) else corners((480, 640))
    preview = image if inverse is None else image.transpose(EXIF_TRANSPOSES[inverse])
    for exif in (None, make_exif(orientation, DateTimeOriginal="2001:01:01 00:00:00")):
        data = encode(preview, exif=exif) if exif else encode(preview)
        # Without JFIF, because LibRaw adds EXIF data unless they come first.
        data = data[:2] + data[20:] if exif else data
        file = write_file(tmp_path / "IMG_1.DNG", made_dng(data, orientation, (66, 50)))
        picture = read_picture_for_indexing(file)
        assert (picture.width, picture.height) == ((66, 50) if orientation in (1, 3) else (50, 66))
        assert is_upright(picture.image)
        assert picture.taken == (datetime(2001, 1, 1) if exif else datetime(2024, 7, 9, 10, 11, 12))
        whole = open_query_picture(file.path)
        assert whole.size == image.size and is_upright(whole)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("suffix", ["ARW", "nef"])
def test_an_image_with_the_suffix_of_a_raw_file_is_read(kind, suffix, tmp_path):
    file = write_file(tmp_path / f"DSC01.{suffix}", encode(corners((64, 48)), kind))
    picture = read_picture_for_indexing(file)
    assert (picture.width, picture.height) == (64, 48) and is_upright(picture.image)
    assert open_query_picture(file.path).size == (64, 48)


def test_raw_files_without_a_readable_preview_are_skipped(tmp_path):
    pytest.importorskip("rawpy")
    whole = made_dng(encode(corners((640, 480))))
    bomb = made_dng(jpeg_of_size(encode(corners()), 20_000, 20_000))
    for name, data, expected in (
        ("none.dng", made_dng(None), "unreadable image: "),
        ("cut.nef", whole[:3000], "unreadable image: "),
        ("text.cr2", b"a text" * 100, "unreadable image: "),
        ("thumbnail.nef", encode(corners(), "TIFF", tiffinfo={254: 1}), "unreadable image: "),
        ("bomb.dng", bomb, "absurd image size"),
    ):
        write_file(tmp_path / name, data)
        assert reason(tmp_path / name).startswith(expected) and "b'" not in reason(tmp_path / name)
    assert len(find_pictures_and_unreadable_files([tmp_path])[0]) == 5, (
        "unreadable files are found by their suffix, too"
    )


# --- EXIF ------------------------------------------------------------------------------------------------------------


def read_tags(exif: PIL.Image.Exif) -> tuple:
    """Read date and position from EXIF data directly, because some values can't be written to a file."""
    return read_exif_date_and_location(SimpleNamespace(getexif=lambda: exif))


def test_the_date_is_read(tmp_path):
    original, digitized, changed = "2023:12:31 23:59:58", "2024:01:02 03:04:05", "2024:05:06 07:08:09"
    exif = make_exif(DateTimeOriginal=original, DateTimeDigitized=digitized, DateTime=changed)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "HEIF"):
        if kind in PIL.Image.SAVE:
            file = write_file(tmp_path / "a", corners(), kind=kind, exif=exif.tobytes())
            assert read_picture_for_indexing(file).taken == datetime(2023, 12, 31, 23, 59, 58), kind
    assert read_tags(make_exif(DateTimeDigitized=digitized, DateTime=changed))[0] == datetime(2024, 1, 2, 3, 4, 5)
    for date in ("2023/12/31 23:59:58", "2023.12.31 23:59:58"):
        assert read_tags(make_exif(DateTimeOriginal=date))[0] == datetime(2023, 12, 31, 23, 59, 58)
    unset = make_exif(DateTimeOriginal="0000:00:00 00:00:00", DateTime=changed)
    assert read_tags(unset)[0] == datetime(2024, 5, 6, 7, 8, 9)
    for date in (
        *("", "    :  :     :  :  ", "0000:00:00 00:00:00", "2023:02:30 10:00:00", "0001:01:01 00:00:00", "yesterday"),
        *("\0" * 20, "2023:١٢:31 10:00:00"),
    ):
        assert read_tags(make_exif(DateTimeOriginal=date))[0] is None, date


def test_the_position_is_read(tmp_path):
    def make_gps(*values: object) -> PIL.Image.Exif:
        exif, tags = make_exif(), (GPS.GPSLatitude, GPS.GPSLatitudeRef, GPS.GPSLongitude, GPS.GPSLongitudeRef)
        exif.get_ifd(IFD.GPSInfo).update(zip(tags, values, strict=True))
        return exif

    exif = make_gps((22.0, 54.0, 21.6), "S", (47.0, 3.6, 0.0), "W")
    picture = read_picture_for_indexing(write_file(tmp_path / "a.jpg", corners(), exif=exif))
    assert (picture.latitude, picture.longitude) == pytest.approx((-22.906, -47.06))
    assert not PIL.Image.open(io.BytesIO(picture.thumbnail)).getexif(), (
        "thumbnails may be shown to others, so they have no EXIF data"
    )
    good, zero, nothing = (10.0, 30.0, 0.0), (0.0, 0.0, 0.0), (None, None)
    assert read_tags(make_gps(zero, "N", good, "E"))[1:] == (0.0, 10.5), "the equator"
    picture = read_picture_for_indexing(
        write_file(tmp_path / "b.jpg", corners(), exif=make_gps((22.5,), "S", (47.0, 3.6), "W"))
    )
    assert (picture.latitude, picture.longitude) == pytest.approx((-22.5, -47.06)), (
        "degrees alone, and degrees with minutes"
    )
    assert read_tags(make_gps(zero, "N", zero, "E"))[1:] == nothing, (
        "0, 0 is written by a phone that does not know its position"
    )
    for bad in ((91.0, 0.0, 0.0), (-3.0, 0.0, 0.0), (float("nan"),) * 3, (float("inf"), 0, 0), (), "10", (1.0,) * 4):
        assert read_tags(make_gps(bad, "N", good, "E"))[1:] == nothing, bad
    for side in (None, "", "X", 7, b"\xff"):
        assert (
            read_tags(make_gps(good, side, good, "E"))[1:] == read_tags(make_gps(good, "N", good, side))[1:] == nothing
        ), side
    assert read_tags(make_gps(good, "N", (180.5, 0.0, 0.0), "W"))[1:] == nothing


def jpeg_with_exif(exif: bytes) -> bytes:
    """Return a JPEG file with these bytes as its EXIF data."""
    data = encode(corners((400, 300)))
    segment = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def test_broken_exif_never_fails_a_picture(tmp_path):
    exif = make_exif(6, DateTimeOriginal="2023:12:31 23:59:58")
    exif.get_ifd(IFD.GPSInfo)[GPS.GPSLatitude] = (1.0, 2.0, 3.0)
    valid, rng = exif.tobytes()[6:], np.random.default_rng(0)
    assert read_picture_for_indexing(write_file(tmp_path / "a.jpg", jpeg_with_exif(valid))).height == 400
    broken = [
        b"",
        b"x",
        b"II*\0",
        b"MM\0*\xff\xff\xff\xff",
        valid[: len(valid) // 2],
        b"II*\0\x08\0\0\0\xff\xff" + valid,
    ]
    for _ in range(30):
        damaged = bytearray(valid)
        for position in rng.integers(0, len(valid), 4):
            damaged[position] = rng.integers(0, 256)
        broken.append(bytes(damaged))
    for data in broken:
        picture = read_picture_for_indexing(write_file(tmp_path / "a.jpg", jpeg_with_exif(data)))
        assert {picture.width, picture.height} == {400, 300}
    assert open_query_picture(tmp_path / "a.jpg").mode == "RGB"


# --- Files that can't be read ----------------------------------------------------------------------------------------


def jpeg_of_size(data: bytes, width: int, height: int) -> bytes:
    """Return a JPEG file whose header declares another size."""
    offset = data.index(b"\xff\xc0") + 5
    return data[:offset] + struct.pack(">HH", height, width) + data[offset + 4 :]


def png_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(PIL.Image.new("1", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_damaged_and_oversized_files_are_skipped(tmp_path, monkeypatch):
    whole = encode(photograph(640, 480))
    for data, expected in (
        (b"", "no image: .* 0 bytes"),
        ("não sou imagem".encode(), "unreadable image: .*JPEG, PNG"),
        (whole[: len(whole) // 2], "unreadable image: .*truncated"),
        (encode(photograph(640, 480), "PNG")[:5000], "unreadable image: "),
        (encode(photograph(64, 48), "WEBP")[:500], "unreadable image"),
        (encode(corners(), "PCX"), "unreadable image"),  # a format that is not accepted
        (jpeg_of_size(whole, 20_000, 15_000), "absurd image size: .*20000 x 15000.*200,000,000"),
        (png_of_size(40_000, 50_000), "absurd image size"),
        (png_of_size(5, 1000), "absurd image size: .*5 x 1000.*50"),
    ):
        write_file(tmp_path / "a.jpg", data)
        assert re.match(expected, reason(tmp_path / "a.jpg")), expected
        with expect_error("bad_picture", path=tmp_path / "a.jpg", reason=reason(tmp_path / "a.jpg")):
            open_query_picture(tmp_path / "a.jpg")
    write_file(tmp_path / "a.jpg", whole)
    for module in (picture_reading, image_files):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", len(whole) - 1)
    assert reason(tmp_path / "a.jpg").startswith("absurd image size: ")


def test_missing_files_have_the_reason_gone(tmp_path):
    for path in (tmp_path / "gone.jpg", tmp_path / "gone" / "a.jpg"):
        assert reason(path).startswith("gone: ")


# --- Links created during the run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", ["2024/a.jpg", "2024", "."])
def test_a_path_that_becomes_a_link_before_it_is_opened_is_not_followed(swapped, tmp_path, monkeypatch):
    """Each part of the path is replaced by a link after it was checked, as an attacker with write access could do."""
    write_file(tmp_path / "private" / "2024" / "a.jpg", b"secret")
    file = write_file(tmp_path / "fotos" / "2024" / "a.jpg", corners())
    realpath = os.path.realpath

    def resolve_then_swap(path):
        real_path = realpath(path)
        os.rename(tmp_path / "fotos" / swapped, tmp_path / "away")
        (tmp_path / "fotos" / swapped).symlink_to(tmp_path / "private" / swapped)
        return real_path

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "realpath", resolve_then_swap)
        with pytest.raises(OSError):
            open_regular_file_safe_from_link_swaps(file.path, "it", [str(tmp_path / "fotos")])
    assert Path(file.path).read_bytes() == b"secret", "the path was not replaced, so the test proves nothing"
