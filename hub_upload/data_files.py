"""Which files of a data set may be uploaded: rows, images, card and licence, after a search for secrets in them."""

import io
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image

from capivara_common.image_files import IMAGE_FORMATS
from capivara_common.links import refuse_links_out
from capivara_common.privacy import SECRET_RE2, known_tokens, secret_in
from hub_upload.allowed_files import check_paths, check_regular, check_secrets

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
SUFFIXES = PICTURES | {".parquet", ".tar", ".arrow", ".json", ".jsonl", ".csv", ".tsv"}
NAMES = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md"}
RECORD_BYTES = 2**21  # JSON files that are not larger say how a data set was made; larger ones are rows
BATCH_BYTES = 2**25  # of rows that are looked at together
BUFFER_BYTES = 2**20  # of a column that is read at once
OUTSIDE = r"^(/|~|[A-Za-z]:[\\/]|file:)|(^|/)\.\.(/|$)"  # of the path of a picture
SECRET = "holds what looks like an access token or key. Take it out, and revoke it if it is real"


def data_files(folder: Path) -> list[Path]:
    """Files of a data set relative to its folder; hidden ones stay here, and whatever else lies there.

    Raises ValueError where a link leads out of the folder, or a file of a data set is no regular file.
    """
    refuse_links_out(folder)
    found = []
    for path in (path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder)
        is_sent = name.suffix in SUFFIXES or name.name in NAMES
        if is_sent and not any(part.startswith((".", "__")) for part in name.parts):
            check_regular(path)
            found.append(name)
    return found


def check_data(folder: Path, names: Sequence[Path]) -> None:
    """Raise ValueError, naming file, column and row but no secret, where a text, however nested, holds a token or key,
    an image path leads out of the folder, or image bytes are no image.
    """
    for name in names:
        path = folder / name
        if name.suffix in PICTURES:
            with path.open("rb") as file:
                if not _is_picture(file):
                    raise ValueError(f"{name} is no picture that can be read. Remove it.")
            check_secrets(path, name)
        elif name.suffix in (".parquet", ".arrow"):
            _check_rows(path, name)
        else:  # archives among them: only uncompressed ones are accepted
            check_secrets(path, name)
            if name.name in NAMES or (name.suffix == ".json" and path.stat().st_size <= RECORD_BYTES):
                check_paths(path, name)


def _check_rows(path: Path, name: Path) -> None:
    import pyarrow

    first = 0
    try:
        for batch in _batches(path):
            if not first and secret_in(f"{batch.schema} {batch.schema.metadata}"):
                raise ValueError(f"{name}, its header, {SECRET}.")
            for column, array in zip(batch.schema.names, batch.columns, strict=True):
                if _fault(array):
                    row = bisect_left(range(len(array)), True, key=lambda row, of=array: bool(_fault(of[: row + 1])))
                    fault = _fault(array[row : row + 1])
                    raise ValueError(f"{name}, column {column!r}, row {first + row}, {fault}.")
            first += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name} can't be read as a file of rows: {' '.join(str(error).split())}") from None


def _batches(path: Path) -> Iterator[Any]:
    """The rows of a file, some at a time; the first may be none."""
    import pyarrow
    from pyarrow import parquet

    if path.suffix == ".arrow":
        with pyarrow.memory_map(str(path)) as file:
            yield from pyarrow.ipc.open_stream(file)
        return
    with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
        yield pyarrow.RecordBatch.from_pylist([], file.schema_arrow)
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            rows = BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)
            yield from file.iter_batches(max(1, min(rows, 2**16)), [group])


def _fault(array: Any) -> str | None:
    """What must not be sent of the values of an array of pyarrow, however nested, in words; None where all may."""
    from pyarrow import ExtensionArray, ListArray, compute, types

    kind = array.type
    if isinstance(array, ExtensionArray):
        return _fault(array.storage)
    if types.is_dictionary(kind):
        return _fault(array.dictionary_decode())
    if types.is_struct(kind):
        parts = dict(zip([field.name for field in kind], array.flatten(), strict=True))
        fault = _picture_fault(parts["bytes"], parts["path"]) if set(parts) == {"bytes", "path"} else None
        return fault or next(filter(None, map(_fault, parts.values())), None)
    if types.is_map(kind):
        halves = [ListArray.from_arrays(array.offsets, half) for half in (array.keys, array.items)]
        return next(filter(None, map(_fault, halves)), None)
    if types.is_nested(kind):
        return _fault(array.flatten())
    if str(kind) not in ("string", "large_string", "binary", "large_binary"):
        if "string" not in str(kind) and "binary" not in str(kind):
            return None
        array = array.cast("large_binary")  # views, and bytes of one length
    pattern = "|".join([SECRET_RE2, *map(re.escape, known_tokens())])
    return SECRET if compute.any(compute.match_substring_regex(array, pattern)).as_py() else None


def _picture_fault(contents: Any, paths: Any) -> str | None:
    from pyarrow import compute, types

    if types.is_string(paths.type) and compute.any(compute.match_substring_regex(paths, OUTSIDE)).as_py():
        return "names the file of a picture by a path outside of the data set. Put the picture into it"
    if not all(_is_picture(io.BytesIO(content.as_buffer())) for content in contents if content.is_valid):
        return "has bytes that are no picture that can be read. Take the row out"
    return None


def _is_picture(file: BinaryIO) -> bool:
    """Whether the header is that of a picture; its pixels are not read."""
    PIL.Image.init()
    try:
        PIL.Image.open(file, formats=[name for name in IMAGE_FORMATS if name in PIL.Image.OPEN]).close()
    except Exception:  # PIL raises a dozen kinds
        return False
    return True
