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
from capivara_search.words import failure

FAILURES = (RuntimeError, OSError, ValueError)  # what LanceDB raises
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
ADDRESS = re.compile(r"https?://([\w.~!$&'()*+,;=%:-]+@)?(\[[\da-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[\w./~%-]*)?", re.ASCII)
# Of the engine's texts. The rest of them stands for a file that is missing or broken.
CONFLICT = re.compile(r"commit conflict|concurrent (writer|transaction|commit)|Too many concurrent|preempted", re.I)
ENGINE = re.compile(r"lance error|LanceError|Encountered corrupt|External error: Not found|appear to be a Lance file")
RUST_PLACE = re.compile(r",?\s*\S+\.rs(:\d+)+")  # of the engine's code, for its developers
MAX_DETAIL = 200  # letters of the engine's own text
# Code, what the engine says, and number of the error; `no_answer` is of object storage alone.
KNOWN = (
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


class DamagedIndex(ValueError):
    """A part of an index can't be read; the text names the part."""


@contextmanager
def explained(where: str, part: str = "") -> Iterator[None]:
    """Let what LanceDB raises, of an index and one of its tables, become one line.

    Raises OSError: no space left, no permission, a refusal of the object storage, no answer, or others who write.
    DamagedIndex: a file of the index is missing or broken.
    """
    try:
        yield
    except DamagedIndex:
        raise
    except FAILURES as error:
        raise explanation(error, where, part) from error


def explanation(error: Exception, where: str, part: str = "") -> Exception:
    """The error in our words, with a code and values; itself where it is none of the known ones."""
    if hasattr(error, "code"):
        return error
    if refused := refusal(error, where):
        return refused
    if is_conflict(error):
        return failure(partial(OSError, errno.EAGAIN), "conflict", path=where)
    if isinstance(error, RuntimeError | ValueError) and ENGINE.search(str(error)):
        code = "damaged_remote" if "://" in where else "damaged"
        detail = redact(" ".join(RUST_PLACE.sub("", str(error)).split()))[:MAX_DETAIL]
        return failure(DamagedIndex, code, path=where, part=part or "tables", detail=detail)
    hidden = redact(str(error))
    return error if hidden == str(error) else OSError(errno.EIO, hidden)


def is_conflict(error: Exception) -> bool:
    """Whether another process has written at the same moment, so that the same call may succeed now."""
    return bool(CONFLICT.search(str(error)))


def refusal(error: Exception, where: str) -> OSError | None:
    """What the disk or the object storage of an index has refused, in our words: what lies there may be whole."""
    # Without the name of the index, which may say anything.
    text = redact(" ".join(RUST_PLACE.sub("", str(error).replace(where, "")).split()))
    for code, pattern, number in KNOWN:
        if ("://" in where or code != "no_answer") and re.search(pattern, text):
            # OSError makes a PermissionError of its number.
            return failure(partial(OSError, number), code, path=where, text=text[:MAX_DETAIL])
    return None


def check_address() -> None:
    """Raise ValueError where the storage's address is none, of which its driver panics; a password may stand in it."""
    if not all(ADDRESS.fullmatch(os.environ.get(name) or "http://none") for name in ENDPOINTS):
        raise failure(ValueError, "storage_address", example="https://host:9000")
