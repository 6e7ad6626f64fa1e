"""What a disk or an object storage says when it fails, as one line for people: which index, which part, what to do.

LanceDB raises the errors of its engine as RuntimeError or ValueError, with a text for developers over many lines; an
object storage's answers stand somewhere in it.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from capivara_common.privacy import redact
from capivara_search.messages import localized_error

LANCEDB_ERRORS = (RuntimeError, OSError, ValueError)  # what LanceDB raises
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
ENDPOINT_RE = re.compile(
    r"https?://([\w.~!$&'()*+,;=%:-]+@)?(\[[\da-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[\w./~%-]*)?", re.ASCII
)
# Of the engine's texts. The rest of them stands for a file that is missing or broken.
WRITE_CONFLICT_RE = re.compile(
    r"commit conflict|concurrent (writer|transaction|commit)|Too many concurrent|preempted", re.I
)
LANCE_ERROR_RE = re.compile(
    r"lance error|LanceError|Encountered corrupt|External error: Not found|appear to be a Lance file"
)
RUST_LOCATION_RE = re.compile(r",?\s*\S+\.rs(:\d+)+")  # of the engine's code, for its developers
MAX_DETAIL_CHARACTERS = 200  # letters of the engine's own text
# Code, what the engine says, and number of the error; `no_answer` is of object storage alone.
STORAGE_ERROR_PATTERNS = (
    ("index_full", r"No space left|os error 28|StorageFull|InsufficientCapacity", errno.ENOSPC),
    ("too_many_files", r"Too many open files|os error 24", errno.EMFILE),
    # Without the number of a status alone, which may be one of milliseconds.
    ("no_answer", r"NoSuchBucket|(?i:bucket does not exist)|Forbidden|AccessDenied|Unauthorized|status:? 40[13]"
                  r"|InvalidAccessKeyId|SignatureDoesNotMatch|Permission denied|error sending request|tcp connect"
                  r"|dns error|Connection refused|operation timed out|kind: (Connect|Timeout|Request|Unknown)|BadScheme"
                  r"|CredentialsNotLoaded|Failed to resolve region|instance metadata|URL scheme is not", errno.EIO),
    ("index_denied", r"Permission denied|not permitted|os error 13|os error 1\)|Read-only file system"
                     r"|os error 30", errno.EACCES),
)  # fmt: skip


class DamagedIndexError(ValueError):
    """A part of an index can't be read; the text names the part."""


@contextmanager
def wrap_storage_errors(where: str, part: str = "") -> Iterator[None]:
    """Let what LanceDB raises, of an index and one of its tables, become one line.

    Raises OSError: no space left, no permission, a refusal of the object storage, no answer, or others who write.
    DamagedIndex: a file of the index is missing or broken.
    """
    try:
        yield
    except DamagedIndexError:
        raise
    except LANCEDB_ERRORS as error:
        raise to_index_error(error, where, part) from error


def to_index_error(error: Exception, where: str, part: str = "") -> Exception:
    """The error in our words, with a code and values; itself where it is none of the known ones."""
    if hasattr(error, "code"):
        return error
    if refused := to_access_error(error, where):
        return refused
    if is_write_conflict(error):
        return localized_error(partial(OSError, errno.EAGAIN), "conflict", path=where)
    if isinstance(error, RuntimeError | ValueError) and LANCE_ERROR_RE.search(str(error)):
        code = "damaged_remote" if "://" in where else "damaged"
        detail = redact(" ".join(RUST_LOCATION_RE.sub("", str(error)).split()))[:MAX_DETAIL_CHARACTERS]
        return localized_error(DamagedIndexError, code, path=where, part=part or "tables", detail=detail)
    hidden = redact(str(error))
    return error if hidden == str(error) else OSError(errno.EIO, hidden)


def is_write_conflict(error: Exception) -> bool:
    """Whether another process has written at the same moment, so that the same call may succeed now."""
    return bool(WRITE_CONFLICT_RE.search(str(error)))


def to_access_error(error: Exception, where: str) -> OSError | None:
    """What the disk or the object storage of an index has refused, in our words: what lies there may be whole."""
    # Without the name of the index, which may say anything.
    text = redact(" ".join(RUST_LOCATION_RE.sub("", str(error).replace(where, "")).split()))
    for code, pattern, number in STORAGE_ERROR_PATTERNS:
        if ("://" in where or code != "no_answer") and re.search(pattern, text):
            # OSError makes a PermissionError of its number.
            return localized_error(partial(OSError, number), code, path=where, text=text[:MAX_DETAIL_CHARACTERS])
    return None


def check_endpoints() -> None:
    """Raise ValueError where the storage's address is none, of which its driver panics; a password may stand in it."""
    if not all(ENDPOINT_RE.fullmatch(os.environ.get(name) or "http://none") for name in ENDPOINT_VARIABLES):
        raise localized_error(ValueError, "storage_address", example="https://host:9000")
