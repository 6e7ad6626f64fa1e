"""Pictures on the disk: found in folders, and each read once, with what it says of itself (EXIF) and its thumbnail.

What can't be read is said in one line, "reason: detail", whose reason has words in `words.yaml`. Files are opened by
`capivara_common.image_files` alone.
"""

import io
import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import PIL.Image
from PIL.ExifTags import GPS, IFD, Base
from PIL.Image import Resampling

from capivara_common.cli import coded_error
from capivara_common.image_files import (
    IMAGE_SUFFIXES,
    LARGE_IMAGE_LOCK,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    BadImage,
    check_byte_count,
    decode_upright,
    exif_orientation,
    open_image,
    open_regular_file,
)
from capivara_search.messages import localized_error
from capivara_search.results import SkippedFile

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

# Names end so: Adobe and phones, Canon, Nikon, Sony, Panasonic, Olympus, Fujifilm, Pentax, Samsung.
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".rw2", ".orf", ".raf", ".pef", ".srw")
NON_RAW_FILE_STARTS = (b"\xff\xd8\xff", b"\x89PNG")  # how a JPEG and a PNG begin that was given the name of a RAW file
# Of these nothing is known of the content: the file is tried again each time.
RETRYABLE_REASONS = (
    "no permission",
    "read error",
    "gone",
    "needs rawpy",
)  # the last one of an index that was made before
PICTURE_SUFFIXES = (*IMAGE_SUFFIXES, *RAW_SUFFIXES)
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".3gp", ".mts", ".m2ts", ".wmv", ".mpg", ".mpeg", ".flv"),
)
# Beside hidden ones: what file systems, NAS boxes, zip files of a Mac and programmers put among the pictures.
SYSTEM_NAMES = {
    *("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "node_modules")
}
# The best camera phones take 16,320 x 12,240. Above the gate's limit a picture is decoded alone, and reduced at once.
MAX_PICTURE_PIXELS = 200_000_000
# A JPEG is decoded at a half, a quarter or an eighth of its size where its short side is then still so many times that
# of the model's input: the embeddings of a trained tower keep a cosine of 0.999. At three times one photograph of 40
# keeps 0.997.
REDUCED_DECODE_FACTOR = 4
THUMBNAIL_SIDE = 256  # pixels of the longer side
# WebP at 90 takes 4.0 kB a picture of OpenMoji and has a cosine of 0.994 to it under the demo model; JPEG at 85 takes
# 7.3 kB and has 0.950. A random picture that the page draws is a thumbnail, so it had better be found again.
THUMBNAIL_QUALITY = 90
THUMBNAIL_WEBP_METHOD = 2  # of WebP: takes 2.5 ms of a photograph where 4, the default, takes 16 ms, and 1 % more bytes
FIRST_PHOTOGRAPH_YEAR = 1826  # year


@dataclass(frozen=True)
class FileState:
    """A file as it was when it was seen."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int  # when it was changed last, since 1970

    @classmethod
    def of(cls, path: str, state: os.stat_result | None = None) -> "FileState":
        """A file as it is now, or as it was when its state was asked for. Raises OSError."""
        state = state or os.stat(path)
        return cls(path, state.st_size, state.st_mtime_ns)


@dataclass(frozen=True)
class Picture:
    """A picture that was read."""

    digest: str  # BLAKE2b-128 of the file, in hexadecimal
    width: int  # pixels, upright; of a RAW file, of the RAW picture
    height: int
    taken: datetime | None  # by its EXIF data, in the camera's local time
    latitude: float | None  # degrees
    longitude: float | None
    image: PIL.Image.Image  # upright, RGB, transparent parts white, for the model's image processor
    thumbnail: bytes  # WebP file, upright, the longer side at most 256 pixels


# --- In folders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IgnoreRules:
    """What is left out of folders, beside hidden names and those of systems; an index keeps it (`kept_rules`)."""

    exclude: tuple[str, ...] = ()  # patterns, as of a `.gitignore` in each folder that is named
    forgotten: frozenset[str] = frozenset()  # paths of folders and pictures

    def updated(self, exclude: Sequence[str] = (), include: Sequence[str | Path] = ()) -> "IgnoreRules":
        """These with more patterns, and without those of them, and forgotten paths, that are included.

        Raises ValueError: `exclude` names what is no pattern, `include` what is left out by none of these rules.
        """
        for pattern in exclude:
            if pattern.startswith("!") and pattern != "!":
                raise localized_error(ValueError, "negated_pattern", pattern=pattern)
            if not _is_valid_pattern(pattern):
                raise localized_error(ValueError, "bad_pattern", pattern=pattern)
        forgotten = self.forgotten
        for one in include:
            place = os.path.abspath(Path(one).expanduser())
            kept = frozenset(path for path in forgotten if not Path(path).is_relative_to(place))
            if str(one) not in self.exclude:
                if above := IgnoreRules(forgotten=kept).find_forgotten_parent(place):
                    raise localized_error(ValueError, "folder_forgotten", path=place, forgotten=shlex.quote(above))
                if kept == forgotten:
                    raise localized_error(ValueError, "nothing_to_include", path=one)
            forgotten = kept
        patterns = dict.fromkeys([*self.exclude, *exclude])
        return IgnoreRules(tuple(one for one in patterns if one not in set(map(str, include))), forgotten)

    def find_forgotten_parent(self, path: str) -> str | None:
        """The forgotten path that a path, by this or its real name, is or lies in; the outermost of several."""
        names = {str(one) for name in (path, os.path.realpath(path)) for one in (Path(name), *Path(name).parents)}
        return min((one for one in self.forgotten if names & {one, _resolve_parent_links(one)}), default=None)

    def reason(self, path: str, root: str, is_folder: bool) -> str | None:
        """Why what lies in a folder that is looked through, below `root`, is left out; None where it is not."""
        name = os.path.basename(path)
        if path in self.forgotten:
            return "forgotten"
        if name.startswith("."):
            return "hidden"
        if name in SYSTEM_NAMES:
            return "system"
        relative = path[len(root) :].lstrip(os.sep) + os.sep * is_folder
        return "excluded" if self.exclude and self._gitignore_spec.match_file(relative) else None

    @cached_property
    def _gitignore_spec(self) -> "GitIgnoreSpec":
        from pathspec import GitIgnoreSpec  # extra `search`; only who has patterns waits for it

        return GitIgnoreSpec.from_lines(self.exclude)


def _is_valid_pattern(pattern: str) -> bool:
    with suppress(ValueError):
        return any(one.include is not None for one in IgnoreRules((pattern,))._gitignore_spec.patterns)
    return False


def _resolve_parent_links(path: str) -> str:
    """Where a path, which may be a link, lies."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def to_absolute_path(folder: str | Path) -> Path:
    """A folder as its pictures' paths begin: absolute, `~` and `..` resolved, links left as they are."""
    path = os.path.abspath(Path(folder).expanduser())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise localized_error(ValueError, "folder_no_text", path=ascii(path)) from None
    return Path(path)


def find_pictures(
    folders: Mapping[Path, str] | Sequence[str | Path],
    rules: IgnoreRules | None = None,
    ignored_counts: dict[str, Counter[str]] | None = None,
    only_paths: Collection[str] | None = None,
) -> tuple[list[FileState], list[SkippedFile]]:
    """The pictures in folders and below, by the ends of their names, and what could not be looked at, sorted by path.

    No link is followed, but for a folder that is named.
    Raises ValueError where a folder is not there, can't be opened, was forgotten, lies elsewhere than its recorded real
    path, or holds no picture but by the rules.

    Args:
        folders: to look through. A mapping also gives the real path that each must have.
        rules: of what is left out.
        counts: filled in, folder that was named -> what is left out of it: pictures by the reasons "forgotten" and
            "excluded" of `Rules.reason`, pictures and folders by its other reasons, and each "link" and "video".
        only: paths of files and folders in them; nothing else is looked at, and there may be no picture among them.
    """
    roots = [str(to_absolute_path(folder)) for folder in folders]
    for root in roots:
        if not os.path.isdir(root):
            fault = "is a file, not a folder" if os.path.exists(root) else "is not there"
            text = "The folder {path} {fault}. Name a folder of pictures."
            raise coded_error(ValueError, None, text, path=root, fault=fault)
    rules = rules or IgnoreRules()
    for root in roots:
        if forgotten := rules.find_forgotten_parent(root):
            raise localized_error(ValueError, "folder_forgotten", path=root, forgotten=shlex.quote(forgotten))
    walk = _FolderScan(roots, rules, only_paths)
    for root in roots:
        walk.scan_folder(root)
    for folder, real in folders.items() if isinstance(folders, Mapping) else ():
        if os.path.realpath(folder) != real:  # checked after the walk: what was seen may lie in another folder
            raise localized_error(ValueError, "folder_swapped", path=str(folder), real=real)
    if ignored_counts is not None:
        ignored_counts.update({root: +numbers for root, numbers in walk.ignored_counts.items()})
    left_out = {one.path: one for one in walk.skipped_files}
    for root in roots:
        if root in left_out:
            raise localized_error(ValueError, "folder_shut", path=root, reason=left_out[root])
        ruled = sum(
            walk.ignored_counts[root][why] for why in ("forgotten", "excluded", "link")
        )  # then it may well be empty
        if only_paths is None and not ruled and not _contains_any([*walk.pictures, *left_out], root):
            raise localized_error(ValueError, "no_picture", path=root, ends=", ".join(PICTURE_SUFFIXES))
    return sorted(walk.pictures.values(), key=lambda file: file.path), sorted(
        walk.skipped_files, key=lambda one: one.path
    )


def _contains_any(paths: Sequence[str], root: str) -> bool:
    if any(path.startswith(os.path.join(root, "")) for path in paths):
        return True
    real = Path(os.path.realpath(root))  # another root may lead to it by another name
    return any(Path(os.path.realpath(folder)).is_relative_to(real) for folder in {os.path.dirname(p) for p in paths})


class _FolderScan:
    """Looks through folders, each once."""

    def __init__(self, roots: Sequence[str], rules: IgnoreRules, only_paths: Collection[str] | None):
        # What was forgotten may have another name, by a link that was named.
        self.rules = IgnoreRules(rules.exclude, rules.forgotten | set(map(_resolve_parent_links, rules.forgotten)))
        self.ignored_counts = {root: Counter[str]() for root in roots}
        self.relevant_paths = {str(one) for path in only_paths or () for one in (path, *Path(path).parents)}
        self.relevant_prefixes = (
            ("",) if only_paths is None else tuple(os.path.join(one, "") for one in only_paths if os.path.isdir(one))
        )
        self.pictures: dict[str, FileState] = {}
        self.skipped_files: list[SkippedFile] = []
        self.visited_folders: set[tuple[int, int]] = set()  # folders, by device and number

    def scan_folder(self, root: str) -> None:
        """Look through a folder and all below."""
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            try:
                state = os.stat(folder)
                if (state.st_dev, state.st_ino) in self.visited_folders:
                    continue
                self.visited_folders.add((state.st_dev, state.st_ino))
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if not entry.path.startswith(self.relevant_prefixes) and entry.path not in self.relevant_paths:
                            continue
                        is_link = entry.is_symlink()
                        is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
                        if why := self.rules.reason(entry.path, root, is_folder) or "link" * is_link:
                            is_counted = is_folder and not is_link and why in ("forgotten", "excluded")
                            one = is_folder or is_picture_name(entry.name)
                            self.ignored_counts[root][why] += count_pictures(entry.path) if is_counted else one
                        elif is_folder:
                            waiting.append(entry.path)
                        elif is_picture_name(entry.name):
                            self.add_file(entry.path)
                        else:
                            self.ignored_counts[root]["video"] += entry.name.lower().endswith(VIDEO_SUFFIXES)
            except OSError as error:
                self.skip_file(folder, _to_bad_image(error))

    def add_file(self, path: str) -> None:
        """Note a file whose name is that of a picture."""
        try:
            state = os.stat(path)
        except OSError as error:  # gone since its folder was read
            return self.skip_file(path, _to_bad_image(error))
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            self.skip_file(path, BadImage("name is no text", "its name is not in UTF-8; rename it"))
        elif not stat.S_ISREG(state.st_mode):
            self.skip_file(path, BadImage("no regular file", "it is a pipe, a socket or a device"))
        elif not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            self.skip_file(path, _to_bad_image(PermissionError()))
        else:
            self.pictures[path] = FileState.of(path, state)

    def skip_file(self, path: str, fault: BadImage) -> None:
        """Note what can't be looked at, and why."""
        shown = path.encode(errors="surrogateescape").decode(errors="replace")
        self.skipped_files.append(SkippedFile(shown, fault.reason, fault.detail))


def count_pictures(folder: str) -> int:
    """Count the pictures in a folder and below by the ends of their names, without links, hidden and system folders."""
    number, waiting = 0, [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in SYSTEM_NAMES or entry.is_symlink():
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    number += is_picture_name(entry.name)
    return number


def is_picture_name(name: str) -> bool:
    """Whether a file is taken for a picture by the end of its name."""
    return name.lower().endswith(PICTURE_SUFFIXES)


# --- What a picture says of itself ------------------------------------------------------------------------------------


def extract_raw_preview(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """The largest preview in a RAW file, a JPEG, and the size of the RAW picture itself, as it lies in the file.

    LibRaw writes EXIF data into a preview that has none. Raises BadImage where there is no such preview.
    """
    import rawpy  # here: only who has such files waits for it

    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            sizes, thumb = raw.sizes, raw.extract_thumb()
    except Exception as error:  # LibRaw's own, and those of memory and files
        detail = f"the RAW file has no preview that can be read: {error}"
        raise BadImage("unreadable image", detail) from error
    if thumb.format != rawpy.ThumbFormat.JPEG:
        raise BadImage("unreadable image", "the RAW file has no preview of JPEG; export it as one")
    return thumb.data, (sizes.width, sizes.height)


def read_exif(image: PIL.Image.Image) -> tuple[datetime | None, float | None, float | None]:
    """When a loaded picture was taken, by the camera's local time, and where: degrees, the south and west negative.

    Programs write anything into EXIF data, for which PIL raises a dozen kinds; what is no date or place is None.
    """
    taken, place, dates, exif = None, (None, None), [], PIL.Image.Exif()
    with suppress(Exception):
        exif = image.getexif()
    with suppress(Exception):
        dates += map(exif.get_ifd(IFD.Exif).get, (Base.DateTimeOriginal, Base.DateTimeDigitized))
    with suppress(Exception):
        dates.append(exif.get(Base.DateTime))
    for text in reversed(dates):
        with suppress(Exception):  # "2023:12:31 23:59:59" and its like, with / or . too
            date = datetime.fromisoformat(re.sub("[:/.]", "-", text[:10]) + text[10:19])
            taken = date if date.year >= FIRST_PHOTOGRAPH_YEAR else taken
    with suppress(Exception):
        gps = exif.get_ifd(IFD.GPSInfo)
        latitude = _to_degrees(gps[GPS.GPSLatitude], {"N": 1, "S": -1}[gps[GPS.GPSLatitudeRef]], 90)
        longitude = _to_degrees(gps[GPS.GPSLongitude], {"E": 1, "W": -1}[gps[GPS.GPSLongitudeRef]], 180)
        place = (latitude, longitude) if latitude or longitude else place  # 0, 0 is what a phone without a fix writes
    return taken, *place


def _to_degrees(parts: Any, sign: int, limit: int) -> float:
    """Degrees, or with minutes, or seconds too, as degrees. Raises ValueError, and what else PIL's fractions raise."""
    parts = parts if isinstance(parts, tuple) else (parts / 1,)  # of degrees alone PIL makes a number
    degrees = sum(float(part) / unit for part, unit in zip(parts, (1, 60, 3600)[: len(parts) or 1], strict=True))
    if not 0 <= degrees <= limit:  # NaN, too
        raise ValueError(f"must be 0 to {limit}, got {degrees}")
    return sign * degrees


# --- One by one ------------------------------------------------------------------------------------------------------


def read_picture(
    file: FileState,
    image_size: int = 224,
    resize_filter: int | None = None,
    folders: Sequence[str | Path] | None = None,
) -> Picture:
    """Read a picture once: digest, size, EXIF data, pixels and thumbnail. May be called by many threads.

    A JPEG is decoded at reduced size (`REDUCED_SIDES`); the image is brought to `side` as the model's image processor
    does, by PIL's bicubic filter.

    Args:
        file: of `find_pictures`.
        side: pixels that the model's image processor brings the short side to.
        squash: PIL's filter, where it brings both sides to it.
        folders: real paths of those that it must lie in, as `open_regular_file` has them.

    Raises BadImage where it can't be read, is damaged, too large or gone.
    """
    data = _read_picture_bytes(file.path, folders)
    opened, size = _open_undecoded(data, file.path)
    shape = opened.size
    with LARGE_IMAGE_LOCK if shape[0] * shape[1] > MAX_IMAGE_PIXELS else nullcontext():
        pixels = flatten_on_white(
            decode_upright(opened, "the file", max(REDUCED_DECODE_FACTOR * image_size, THUMBNAIL_SIDE))
        )
        if exif_orientation(opened) > 4:  # by a quarter
            size, shape = size[::-1], shape[::-1]
        image = resize_short_side(pixels, shape, image_size, resize_filter)
        small, thumbnail = limit_long_side(pixels, THUMBNAIL_SIDE), io.BytesIO()
        small.save(thumbnail, "WEBP", quality=THUMBNAIL_QUALITY, method=THUMBNAIL_WEBP_METHOD)
    digest = blake2b(data, digest_size=16).hexdigest()
    return Picture(digest, *size, *read_exif(opened), image, thumbnail.getvalue())


def open_query_picture(path: str | Path) -> PIL.Image.Image:
    """A picture to search with, whole, upright, RGB, transparent parts white. Raises ValueError, which names it."""
    path = to_absolute_path(path)
    try:
        return decode_picture(_read_picture_bytes(path), str(path))
    except BadImage as error:
        raise localized_error(ValueError, "bad_picture", path=path, reason=error) from error


def decode_picture(
    data: bytes, name: str, max_pixels: int = MAX_PICTURE_PIXELS, min_short_side: int = 0
) -> PIL.Image.Image:
    """A picture of a file that was read, upright, RGB, transparent parts white; the rest as `decoded` has it.

    The end of its `name` says whether it is RAW; a JPEG or PNG with such a name is opened as what it is.
    """
    return flatten_on_white(decode_upright(_open_undecoded(data, name, max_pixels)[0], "the file", min_short_side))


def _read_picture_bytes(path: str | Path, folders: Sequence[str | Path] | None = None) -> bytes:
    try:
        with open_regular_file(path, "it", folders) as file:
            return read_bounded(file)
    except OSError as error:
        raise _to_bad_image(error) from error


def read_bounded(file: BinaryIO) -> bytes:
    """The bytes of an open file. Raises BadImage where there are none, or more than pictures have."""
    return check_byte_count(file.read(MAX_IMAGE_BYTES + 1), "the file")


def _to_bad_image(error: OSError) -> BadImage:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return BadImage("gone", "there is no file of this name")
    if isinstance(error, PermissionError):
        return BadImage("no permission", "it may not be read; its owner can allow it")
    return BadImage("read error", error.strerror or str(error))


def _open_undecoded(
    data: bytes, name: str, max_pixels: int = MAX_PICTURE_PIXELS
) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """The image with nothing but its header decoded, of RAW the preview, and the size of the picture itself."""
    is_raw = name.lower().endswith(RAW_SUFFIXES) and not data.startswith(NON_RAW_FILE_STARTS)
    data, size = extract_raw_preview(data) if is_raw else (data, None)
    image = open_image(data, "the file", max_pixels, hint="")
    return image, size or image.size


def flatten_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image as RGB, transparent parts white, as people see it: the processor would see a black square in a logo."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def limit_long_side(image: PIL.Image.Image, max_side: int) -> PIL.Image.Image:
    """The longer side brought to `side` pixels where it has more."""
    long = max(image.size)
    if long <= max_side:
        return image
    size = tuple(max(1, round(length * max_side / long)) for length in image.size)
    return image.resize(size, Resampling.BICUBIC, reducing_gap=2.0)


def resize_short_side(
    image: PIL.Image.Image, size: tuple[int, int], image_size: int, resize_filter: int | None = None
) -> PIL.Image.Image:
    """The short side brought to `side` pixels where it has more, as the model's image processor does.

    `size` is that of the image in its file, which decides the shape: of reduced sides, rounded up, it would be another.
    `squash`: PIL's filter, where the long side is brought to them, too.
    """
    short, long = min(size), max(size)
    if short <= image_size:
        return image
    long_side = int(image_size * long / short)  # as the processor's `resize_short_side`
    wanted, resample = ((image_size, long_side) if size[0] <= size[1] else (long_side, image_size)), Resampling.BICUBIC
    if resize_filter is not None:
        wanted, resample = (image_size, image_size), resize_filter
    scale = round(size[0] / image.width)  # 1, 2, 4 or 8
    return image.resize(wanted, resample, box=(0, 0, size[0] / scale, size[1] / scale))
