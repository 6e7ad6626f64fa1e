"""Offsets of the samples of a WebDataset tar: nothing is extracted, nothing is unpickled.

python -c "from caption_data.tars import samples; print(list(samples('shards/train-0000.tar')))"
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
COMPRESSED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd files begin


def refuse_compressed(files: list[Path]) -> None:
    """Raise ValueError where a tar is compressed: its samples have no offset to be read at."""
    for path in files:
        with path.open("rb") as file:
            if file.read(8).startswith(COMPRESSED):
                raise ValueError(
                    f"{path} is compressed, and only plain tars can be read in place. Unpack it to a .tar."
                )


def samples(path: Path) -> Iterator[dict[str, tuple[int, int]]]:
    """Samples of a tar: "image" and "json", as far as there are, with the offset and size of each.

    Members in a row with one folder and one name up to its first dot are a sample; a repeated extension begins a new
    one. A sample that the end of a damaged archive may have cut is left out.

    Raises:
        tarfile.ReadError: the archive is damaged; the samples before the damage were given.
    """
    key, extensions, sample = None, set(), {}
    try:
        for name, offset, size in _members(path):
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            if (folder, stem) != key or extension in extensions:
                if sample:
                    yield sample
                key, extensions, sample = (folder, stem), set(), {}
            extensions.add(extension)
            kind = "image" if extension in IMAGE_EXTENSIONS else extension
            if stem and kind in ("image", "json"):  # files with no stem are hidden ones, such as macOS's
                sample.setdefault(kind, (offset, size))
    except tarfile.TarError:
        if len(sample) == 2:
            yield sample
        raise
    if sample:
        yield sample


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the plain files of a tar; tarfile alone takes most damages for the end."""
    length = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep all of them
            if not member.offset_data <= member.offset_data + member.size <= length:
                raise tarfile.ReadError(f"cut off at byte {length}, within {member.name!r}")
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset} of {length}")
