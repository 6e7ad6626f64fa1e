"""Pictures on the disk: which are found, what is read of each, and what is said of those that can't be."""

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
from made_raw import made_dng
from PIL.ExifTags import GPS, IFD, Base

from capivara_common import image_files
from capivara_common.image_files import EXIF_TRANSPOSES, BadImage, open_regular_file
from capivara_search import picture_files
from capivara_search.messages import Messages
from capivara_search.picture_files import (
    REDUCED_DECODE_FACTOR,
    FileState,
    Picture,
    find_pictures,
    open_query_picture,
    read_exif,
    read_picture,
)
from modeling_capivara import CapivaraImageProcessor

SLOW = pytest.mark.slow
RED, GREEN, BLUE, GREY = (220, 30, 30), (30, 200, 30), (30, 30, 220), (128, 128, 128)
# 16,384 x 12,200 pixels of gray in the AV1 stream, 100 x 100 in the `ispe` box; compressed by zlib.
LYING_AVIF = (
    "eNpjYGBQSCupLEgsy0xjAAIQnZuZZpibmZjm62joBBR6nZtaksgAAYoZKTlFUDZDQWZyCQMa4CvILMkFsxiBWC4zJz8ZxHEB8Rkh"
    "oozCDAzc7kC2RmZmXhpcrRSQk8oE5SWWGRg65+fkg+3KyiwoKgDS3pkFyflAWiSzuCAVal8KFAsUZFZkggSYOTg4gBRPYpmhc6M8"
    "D0hIODk/pygvOacCaDIvA1sDUEg8syAX5iegw1gYmZpZgK7yz01JLBFi4OKW/17/f9/cRUxSvBxGW8UkmwUfPiwvuexrsHGDAkPg"
    "+VNaT55f/hHVcPDjk4Q05tfyKmu7F/tG7WFMDWXl4bhi2TaTjfkmo99UwfvHDiyaqL5QPsr+WIbmvjtv1z1pLnuqWJuVf2zbm23u"
    "cZc5X2m5nl4YK9swauSokaNGjho5auSokaNG0snILCobmbBXfNWtA9+P6vAqn9/fcm/HrjU7NxaHcqRkdlS9GbVr1K7BYBcdrQIA"
    "Eaja1A=="
)
# Formats whose pictures may lie on their side, and how.
TURNED = [*(("JPEG", turn) for turn in range(1, 9)), *((kind, 6) for kind in ("PNG", "WEBP", "TIFF", "AVIF", "HEIF"))]


def corners(size: tuple[int, int] = (80, 60)) -> PIL.Image.Image:
    """Red, green, blue and grey quarters, from the upper left as one reads: any turn is seen."""
    image, (width, height) = PIL.Image.new("RGB", size), size
    for number, colour in enumerate((RED, GREEN, BLUE, GREY)):
        left, top = number % 2 * width // 2, number // 2 * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def as_upright(image: PIL.Image.Image) -> bool:
    """Whether an image shows `corners`."""
    width, height = image.size
    seen = [image.getpixel((x * width // 4, y * height // 4)) for y in (1, 3) for x in (1, 3)]
    return all(np.abs(np.subtract(a, b)).max() < 40 for a, b in zip(seen, (RED, GREEN, BLUE, GREY), strict=True))


def encoded(image: PIL.Image.Image, kind: str = "JPEG", **options) -> bytes:
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def saved(path: Path, data: bytes | PIL.Image.Image, **options) -> FileState:
    """A file, as `find_pictures` sees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else encoded(data, **options))
    state = path.stat()
    return FileState(str(path), state.st_size, state.st_mtime_ns)


def photograph(width: int, height: int) -> PIL.Image.Image:
    """A real one, scaled."""
    return PIL.Image.fromarray(skimage.data.astronaut()).resize((width, height), PIL.Image.Resampling.BICUBIC)


def exif_of(orientation: int | None = None, **dates: str) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    if orientation:
        exif[Base.Orientation] = orientation
    for name, date in dates.items():
        tag = Base[name]
        (exif if tag == Base.DateTime else exif.get_ifd(IFD.Exif))[tag] = date
    return exif


def found(*folders: Path) -> tuple[list[str], dict[str, str]]:
    """Names of pictures, and name -> reason of what was left out, below the first folder."""
    files, left_out = find_pictures(folders)
    return (
        [os.path.relpath(file.path, folders[0]) for file in files],
        {os.path.relpath(one.path, folders[0]): one.reason for one in left_out},
    )


def reason(path: Path) -> str:
    with pytest.raises(BadImage) as error:
        read_picture(FileState(str(path), 0, 0))
    assert Messages("pt").has(f"reason.{error.value.reason}") and str(path.parent) not in str(error.value)
    return str(error.value)


# --- In folders ------------------------------------------------------------------------------------------------------


def test_pictures_of_folders(tmp_path):
    names = ["b.JPG", "a/z.heic", "a/é.png", "a/b/c.CR2", "a.jpg", "férias 2024/IMG 1.jpeg"]
    others = [
        *("notes.txt", "jpg", ".hidden.jpg", "a/.thumbnails/x.jpg", "@eaDir/b.JPG/thumb.jpg", "__MACOSX/._b.jpg"),
        *("film.mp4", "a/b.jpg.part", "$RECYCLE.BIN/x.jpg"),
    ]
    states = [saved(tmp_path / name, b"anything") for name in names]
    for name in others:
        saved(tmp_path / name, b"anything")
    files, left_out = find_pictures([tmp_path])
    assert files == sorted(states, key=lambda file: file.path) and not left_out
    assert find_pictures([tmp_path / "a", tmp_path, str(tmp_path)])[0] == files, "each once, however often it is named"


def test_paths_are_absolute_and_named_as_the_user_names_them(tmp_path, monkeypatch):
    saved(tmp_path / "disk" / "fotos" / "a.jpg", b"x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "Fotos").symlink_to(tmp_path / "disk" / "fotos")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    path = str(tmp_path / "home" / "Fotos" / "a.jpg")
    for folder in ("~/Fotos", "Fotos", Path("../home/./Fotos/")):
        assert [file.path for file in find_pictures([folder])[0]] == [path]
    assert [file.path for file in find_pictures(["Fotos", tmp_path / "disk"])[0]] == [path], "once, though by two names"


def test_folders_that_are_none(tmp_path):
    saved(tmp_path / "a.jpg", b"x")
    saved(tmp_path / "empty" / "notes.txt", b"x")
    for folders, message in (
        ([tmp_path / "gone"], "gone is not there"),
        ([tmp_path / "a.jpg"], "a.jpg is a file, not a folder"),
        ([tmp_path, tmp_path / "empty"], r"empty holds no picture\. Names of pictures end in \.jpg, .*\.dng"),
    ):
        with pytest.raises(ValueError, match=message):
            find_pictures(folders)


def test_links_are_not_followed_but_counted(tmp_path):
    fotos = tmp_path / "fotos"
    saved(tmp_path / "private" / "secret.jpg", b"x")
    for name in ("a.jpg", ".annex/k1.jpg", "year/b.jpg"):
        saved(fotos / name, b"x")
    for link, target in (
        ("out.jpg", tmp_path / "private" / "secret.jpg"),
        ("out", tmp_path / "private"),
        ("notes", tmp_path / "private" / "secret.jpg"),  # no name of a picture: nobody misses it
        ("same.jpg", fotos / "a.jpg"),
        ("again", fotos / "year"),
        ("year/round", fotos),
        ("year/itself", fotos / "year" / "itself"),
        ("hidden.jpg", fotos / ".annex" / "k1.jpg"),
        ("lost.jpg", fotos / "nowhere.jpg"),
    ):
        (fotos / link).symlink_to(target)
    files, left_out = find_pictures([fotos], ignored_counts=(counts := {}))
    assert [file.path for file in files] == [str(fotos / "a.jpg"), str(fotos / "year/b.jpg")] and not left_out
    assert counts == {str(fotos): {"hidden": 1, "link": 7}}


def test_pipes_are_never_opened(tmp_path):
    saved(tmp_path / "a.jpg", b"x")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    names, left_out = found(tmp_path)
    assert names == ["a.jpg"] and left_out.keys() == {"pipe.jpg"}
    assert left_out["pipe.jpg"].startswith("no regular file: it is a pipe")
    assert reason(tmp_path / "pipe.jpg").startswith("no regular file")
    assert reason(tmp_path / "zero.jpg").startswith("no regular file")
    assert reason(tmp_path).startswith("no regular file")


@pytest.fixture
def of_somebody():
    """A folder whose permissions count: root, whom none stop, becomes nobody for the test."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_listed(of_somebody):
    readable, shut = saved(of_somebody / "a.jpg", corners()), saved(of_somebody / "shut.jpg", corners())
    saved(of_somebody / "closed" / "b.jpg", corners())
    saved(of_somebody / "root" / "b.jpg", corners())
    for name in ("shut.jpg", "closed", "root"):
        (of_somebody / name).chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    names, left_out = found(of_somebody)
    assert names == ["a.jpg"] and set(left_out) == {"shut.jpg", "closed", "root"}
    assert all(why.startswith("no permission: ") for why in left_out.values())
    with pytest.raises(ValueError, match=r"root can't be opened: no permission"):
        find_pictures([of_somebody / "root"])
    assert reason(Path(shut.path)).startswith("no permission")
    assert read_picture(readable).image.size == (80, 60)


def test_names_that_are_no_text(tmp_path):
    saved(tmp_path / "a.jpg", b"x")
    try:
        os.close(os.open(os.fsencode(tmp_path) + b"/f\xe9rias.jpg", os.O_CREAT))
    except OSError:
        pytest.skip("this disk takes UTF-8 alone")
    names, left_out = found(tmp_path)
    assert names == ["a.jpg"] and left_out == {"f�rias.jpg": "name is no text: its name is not in UTF-8; rename it"}


# --- What is read of a picture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF"])
def test_every_format(kind, tmp_path):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    file = saved(tmp_path / "a.jpg", corners((400, 300)), kind=kind)  # by what it holds, not by its name
    picture, whole = read_picture(file, image_size=64), open_query_picture(file.path)
    assert (picture.width, picture.height) == whole.size == (400, 300) and picture.image.size == (85, 64)
    assert picture.image.mode == whole.mode == "RGB" and as_upright(picture.image) and as_upright(whole)
    thumbnail = PIL.Image.open(io.BytesIO(picture.thumbnail))
    assert thumbnail.format == "WEBP" and thumbnail.size == (256, 192) and as_upright(thumbnail.convert("RGB"))
    assert picture.taken is picture.latitude is picture.longitude is None


@pytest.mark.parametrize(("kind", "orientation"), TURNED)
def test_pictures_are_upright(kind, orientation, tmp_path):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    # The size shows that the shape comes from the file, where reduced sides are rounded up.
    lying = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(orientation)  # the turn that undoes that of EXIF
    image = corners((1212, 900)) if lying is None else corners((1212, 900)).transpose(EXIF_TRANSPOSES[lying])
    file = saved(tmp_path / "a", image, kind=kind, exif=exif_of(orientation).tobytes())
    picture, whole = read_picture(file, image_size=32), open_query_picture(file.path)
    assert (picture.width, picture.height) == whole.size == (1212, 900) and picture.image.size == (43, 32)
    assert as_upright(picture.image) and as_upright(whole)
    assert as_upright(PIL.Image.open(io.BytesIO(picture.thumbnail)).convert("RGB"))


def test_animated_pictures_by_their_first_frame(tmp_path):
    frames = [PIL.Image.new("RGB", (60, 40), colour) for colour in (GREEN, RED, BLUE)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        image = read_picture(saved(tmp_path / "a.gif", data)).image
        assert image.size == (60, 40) and np.abs(np.subtract(image.getpixel((20, 20)), GREEN)).max() < 25, kind


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I", "F", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    """Lighter on the left, whatever there is of colours; what is transparent is white, as on the page."""
    grey = PIL.Image.fromarray(np.repeat([[230, 20]], 32, axis=1).astype(np.uint8).repeat(48, axis=0))
    if mode in ("I;16", "I", "F"):
        image = PIL.Image.fromarray(np.asarray(grey).astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode]))
        image = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else image
    else:
        image = grey.convert("RGB").convert(mode)
    assert image.mode == mode
    kinds = {"YCbCr": "JPEG"} | dict.fromkeys(("RGBA", "LA", "P", "L", "1", "I;16"), "PNG")
    read = read_picture(saved(tmp_path / "a", image, kind=kinds.get(mode, "TIFF"))).image
    left, right = np.asarray(read)[:, :30].mean(), np.asarray(read)[:, 34:].mean()
    assert read.mode == "RGB" and left > 200 and right < 50


def test_transparent_parts_are_white(tmp_path):
    logo = PIL.Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (100, 100, 200, 200))
    palette = PIL.Image.new("P", (300, 300), 1)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(0, (100, 100, 200, 200))
    for data in (encoded(logo, "PNG"), encoded(logo, "WEBP", lossless=True), encoded(palette, "GIF", transparency=1)):
        picture = read_picture(saved(tmp_path / "a.png", data), image_size=150)
        for image in (picture.image, PIL.Image.open(io.BytesIO(picture.thumbnail)).convert("RGB")):
            assert min(image.getpixel((5, 5))) > 245
            assert max(image.getpixel((image.width // 2, image.height // 2))) < 10


# --- Decoded at reduced size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(500, 333), *(pytest.param(size, marks=SLOW) for size in [(1805, 903), (1795, 3589)])]
)
def test_images_are_those_of_the_image_processor(size, tmp_path):
    """All pixels to the last bit, reduced JPEGs to half a level; and none is shifted by a rounded side."""
    processor = CapivaraImageProcessor()
    image = photograph(*size)
    for kind in ("PNG", "JPEG"):
        file = saved(tmp_path / "a", image, kind=kind)
        whole, reduced = open_query_picture(file.path), read_picture(file)
        assert whole.size == size == (reduced.width, reduced.height) and min(reduced.image.size) == 224
        wanted, got = processor([whole, reduced.image], do_normalize=False).pixel_values.numpy() * 255
        assert whole.tobytes() == PIL.Image.open(file.path).tobytes()
        difference = np.sqrt(np.square(wanted - got).mean())
        assert difference == 0 if kind == "PNG" or min(size) < 2 * REDUCED_DECODE_FACTOR * 224 else 0 < difference < 0.8


def test_pictures_of_the_largest_cameras(tmp_path, monkeypatch):
    """Above the limit of rows of data sets they are read one after another."""
    file = saved(tmp_path / "a.jpg", photograph(1600, 1200))
    monkeypatch.setattr(picture_files, "MAX_IMAGE_PIXELS", 1_000_000)
    picture = read_picture(file)
    assert (picture.width, picture.height) == (1600, 1200) and picture.image.size == (298, 224)
    assert waits_for_its_turn(file) == picture


def waits_for_its_turn(file: FileState) -> Picture:
    """Read a picture that must wait until no other large one is decoded."""
    with ThreadPoolExecutor(1) as threads:
        with image_files.LARGE_IMAGE_LOCK:
            waiting = threads.submit(read_picture, file)
            time.sleep(0.2)
            assert not waiting.done()
        return waiting.result()


def test_an_avif_of_any_size_waits_for_its_turn(tmp_path):
    """Its header may declare fewer pixels than its stream holds."""
    file = saved(tmp_path / "a.avif", photograph(64, 48), kind="AVIF")
    assert (waits_for_its_turn(file).width, read_picture(file).height) == (64, 48)


@SLOW
def test_avif_files_that_declare_fewer_pixels_than_they_hold():
    """Of 16,384 x 12,200 pixels, which take 409 MB; eight were held at once."""
    program = (
        "import base64, resource, sys, zlib\n"
        "from capivara_common.image_files import ImageFiles, decode_images\n"
        "data = zlib.decompress(base64.b64decode(sys.stdin.read()))\n"
        "images = list(decode_images(range(8), lambda row: {'bytes': data, 'path': None}, ImageFiles()))\n"
        "print({image.size for _, image in images}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], input=LYING_AVIF, capture_output=True, text=True, check=True)
    size, megabytes = done.stdout.rsplit(maxsplit=1)
    assert size == "{(100, 100)}" and int(megabytes) < 1_000


# --- RAW and HEIC ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_raw_by_its_preview(orientation, tmp_path):
    pytest.importorskip("rawpy")
    lying = {3: 3, 6: 8, 8: 6}.get(orientation)
    image = corners((640, 480)) if orientation in (1, 3) else corners((480, 640))
    preview = image if lying is None else image.transpose(EXIF_TRANSPOSES[lying])
    for exif in (None, exif_of(orientation, DateTimeOriginal="2001:01:01 00:00:00")):
        data = encoded(preview, exif=exif) if exif else encoded(preview)
        data = data[:2] + data[20:] if exif else data  # without JFIF; LibRaw writes EXIF where it does not come first
        file = saved(tmp_path / "IMG_1.DNG", made_dng(data, orientation, (66, 50)))
        picture = read_picture(file)
        assert (picture.width, picture.height) == ((66, 50) if orientation in (1, 3) else (50, 66))
        assert as_upright(picture.image)
        assert picture.taken == (datetime(2001, 1, 1) if exif else datetime(2024, 7, 9, 10, 11, 12))
        whole = open_query_picture(file.path)
        assert whole.size == image.size and as_upright(whole)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_with_the_name_of_a_raw_file_is_opened_as_what_it_is(kind, tmp_path):
    file = saved(tmp_path / "DSC01.ARW", encoded(corners((64, 48)), kind))
    picture = read_picture(file)
    assert (picture.width, picture.height) == (64, 48) and as_upright(picture.image)
    assert open_query_picture(file.path).size == (64, 48)


def test_raw_that_cannot_be_read(tmp_path):
    pytest.importorskip("rawpy")
    whole = made_dng(encoded(corners((640, 480))))
    bomb = made_dng(jpeg_of_size(encoded(corners()), 20_000, 20_000))
    for name, data, expected in (
        ("none.dng", made_dng(None), "unreadable image: the RAW file has no preview that can be read"),
        ("cut.nef", whole[:3000], "unreadable image: the RAW file has no preview that can be read"),
        ("text.cr2", b"a text" * 100, "unreadable image: the RAW file has no preview that can be read"),
        ("bomb.dng", bomb, "absurd image size"),
    ):
        saved(tmp_path / name, data)
        assert reason(tmp_path / name).startswith(expected)
    assert len(find_pictures([tmp_path])[0]) == 4, "a folder's pictures are counted whether they can be read or not"


# --- EXIF ------------------------------------------------------------------------------------------------------------


def said(exif: PIL.Image.Exif) -> tuple:
    """When and where, by EXIF data that no file need be able to hold."""
    return read_exif(SimpleNamespace(getexif=lambda: exif))


def test_when_a_picture_was_taken(tmp_path):
    original, digitized, changed = "2023:12:31 23:59:58", "2024:01:02 03:04:05", "2024:05:06 07:08:09"
    exif = exif_of(DateTimeOriginal=original, DateTimeDigitized=digitized, DateTime=changed)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "HEIF"):
        if kind in PIL.Image.SAVE:
            file = saved(tmp_path / "a", corners(), kind=kind, exif=exif.tobytes())
            assert read_picture(file).taken == datetime(2023, 12, 31, 23, 59, 58), kind
    assert said(exif_of(DateTimeDigitized=digitized, DateTime=changed))[0] == datetime(2024, 1, 2, 3, 4, 5)
    for date in ("2023/12/31 23:59:58", "2023.12.31 23:59:58"):
        assert said(exif_of(DateTimeOriginal=date))[0] == datetime(2023, 12, 31, 23, 59, 58)
    unset = exif_of(DateTimeOriginal="0000:00:00 00:00:00", DateTime=changed)
    assert said(unset)[0] == datetime(2024, 5, 6, 7, 8, 9)
    for date in (
        *("", "    :  :     :  :  ", "0000:00:00 00:00:00", "2023:02:30 10:00:00", "0001:01:01 00:00:00", "yesterday"),
        *("\0" * 20, "2023:١٢:31 10:00:00"),
    ):
        assert said(exif_of(DateTimeOriginal=date))[0] is None, date


def test_where_a_picture_was_taken(tmp_path):
    def placed(*values: object) -> PIL.Image.Exif:
        exif, tags = exif_of(), (GPS.GPSLatitude, GPS.GPSLatitudeRef, GPS.GPSLongitude, GPS.GPSLongitudeRef)
        exif.get_ifd(IFD.GPSInfo).update(zip(tags, values, strict=True))
        return exif

    exif = placed((22.0, 54.0, 21.6), "S", (47.0, 3.6, 0.0), "W")
    picture = read_picture(saved(tmp_path / "a.jpg", corners(), exif=exif))
    assert (picture.latitude, picture.longitude) == pytest.approx((-22.906, -47.06))
    assert not PIL.Image.open(io.BytesIO(picture.thumbnail)).getexif(), "it may be shown to others"
    good, zero, nothing = (10.0, 30.0, 0.0), (0.0, 0.0, 0.0), (None, None)
    assert said(placed(zero, "N", good, "E"))[1:] == (0.0, 10.5), "the equator"
    picture = read_picture(saved(tmp_path / "b.jpg", corners(), exif=placed((22.5,), "S", (47.0, 3.6), "W")))
    assert (picture.latitude, picture.longitude) == pytest.approx((-22.5, -47.06)), "of degrees alone, and with minutes"
    assert said(placed(zero, "N", zero, "E"))[1:] == nothing, "a phone without a fix"
    for bad in ((91.0, 0.0, 0.0), (-3.0, 0.0, 0.0), (float("nan"),) * 3, (float("inf"), 0, 0), (), "10", (1.0,) * 4):
        assert said(placed(bad, "N", good, "E"))[1:] == nothing, bad
    for side in (None, "", "X", 7, b"\xff"):
        assert said(placed(good, side, good, "E"))[1:] == said(placed(good, "N", good, side))[1:] == nothing, side
    assert said(placed(good, "N", (180.5, 0.0, 0.0), "W"))[1:] == nothing


def with_exif(exif: bytes) -> bytes:
    """A JPEG file with these bytes as its EXIF data."""
    data = encoded(corners((400, 300)))
    segment = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def test_broken_exif_never_fails_a_picture(tmp_path):
    exif = exif_of(6, DateTimeOriginal="2023:12:31 23:59:58")
    exif.get_ifd(IFD.GPSInfo)[GPS.GPSLatitude] = (1.0, 2.0, 3.0)
    good, generator = exif.tobytes()[6:], np.random.default_rng(0)
    assert read_picture(saved(tmp_path / "a.jpg", with_exif(good))).height == 400
    broken = [b"", b"x", b"II*\0", b"MM\0*\xff\xff\xff\xff", good[: len(good) // 2], b"II*\0\x08\0\0\0\xff\xff" + good]
    for _ in range(30):
        damaged = bytearray(good)
        for place in generator.integers(0, len(good), 4):
            damaged[place] = generator.integers(0, 256)
        broken.append(bytes(damaged))
    for data in broken:
        picture = read_picture(saved(tmp_path / "a.jpg", with_exif(data)))
        assert {picture.width, picture.height} == {400, 300}
    assert open_query_picture(tmp_path / "a.jpg").mode == "RGB"


# --- What is no picture ----------------------------------------------------------------------------------------------


def jpeg_of_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG file whose header says another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def png_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(PIL.Image.new("1", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def test_files_that_are_no_pictures(tmp_path, monkeypatch):
    whole = encoded(photograph(640, 480))
    for data, expected in (
        (b"", "no image: the file has 0 bytes"),
        ("não sou imagem".encode(), "unreadable image: the file is no image of JPEG, PNG.*or its beginning is damaged"),
        (whole[: len(whole) // 2], "unreadable image: the pixels of the file can't be decoded: .*truncated"),
        (encoded(photograph(640, 480), "PNG")[:5000], "unreadable image: the pixels of the file can't be decoded"),
        (encoded(photograph(64, 48), "WEBP")[:500], "unreadable image"),
        (encoded(corners(), "PCX"), "unreadable image"),  # not a format of photographs
        (jpeg_of_size(whole, 20_000, 15_000), "absurd image size: .* 20000 x 15000 pixels; all may be 200,000,000,"),
        (png_of_size(40_000, 50_000), "absurd image size"),
        (png_of_size(5, 1000), "absurd image size: the file has 5 x 1000 pixels; .* 50 times the shorter"),
    ):
        saved(tmp_path / "a.jpg", data)
        assert re.match(expected, reason(tmp_path / "a.jpg")), expected
        with pytest.raises(ValueError, match=f"^{tmp_path}/a.jpg can't be read as a picture: {expected}"):
            open_query_picture(tmp_path / "a.jpg")
    saved(tmp_path / "a.jpg", whole)
    for module in (picture_files, image_files):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", len(whole) - 1)
    assert reason(tmp_path / "a.jpg").startswith("absurd image size: the file has more than")


def test_a_file_that_is_gone(tmp_path):
    for path in (tmp_path / "gone.jpg", tmp_path / "gone" / "a.jpg"):
        assert reason(path) == "gone: there is no file of this name"


# --- Links that come in between --------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", ["2024/a.jpg", "2024", "."])
def test_what_becomes_a_link_before_it_is_opened_is_not_followed(swapped, tmp_path, monkeypatch):
    """Each step of the path is swapped when it has been checked, as somebody does who can write to the folder."""
    saved(tmp_path / "private" / "2024" / "a.jpg", b"secret")
    file = saved(tmp_path / "fotos" / "2024" / "a.jpg", corners())
    real = os.path.realpath

    def checked_then_swapped(path):
        found = real(path)
        os.rename(tmp_path / "fotos" / swapped, tmp_path / "away")
        (tmp_path / "fotos" / swapped).symlink_to(tmp_path / "private" / swapped)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "realpath", checked_then_swapped)
        with pytest.raises(OSError):
            open_regular_file(file.path, "it", [str(tmp_path / "fotos")])
    assert Path(file.path).read_bytes() == b"secret", "the swap has not happened"
