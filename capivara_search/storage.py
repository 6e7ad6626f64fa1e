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
from urllib.parse import urlsplit

from capivara_common.privacy import redact
from capivara_search.words import failure

FAILURES = (RuntimeError, OSError, ValueError)  # what LanceDB raises
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
NO_ADDRESS = re.compile(r'[^!-~]|["<>\\^`{|}]')  # letters that stand in none: the driver of object storage panics
# Of the engine's texts. The rest of them stands for a file that is missing or broken.
CONFLICT = re.compile(r"commit conflict|concurrent (writer|transaction|commit)|Too many concurrent|preempted", re.I)
ENGINE = re.compile(r"lance error|LanceError|Encountered corrupt|External error: Not found")
RUST_PLACE = re.compile(r",?\s*\S+\.rs(:\d+)+")  # of the engine's code, for its developers
DAMAGED_FILE = re.compile(r"\S+\.lance/((data|_deletions|_indices|_versions)/\S+?)[,:]?(\s|$)")
MAX_DETAIL = 200  # letters of the engine's own text
# Code, what the engine says, whether of object storage alone, and number of the error.
KNOWN = (
    ("index_full", r"No space left|os error 28|StorageFull|InsufficientCapacity", False, errno.ENOSPC),
    ("too_many_files", r"Too many open files|os error 24", False, errno.EMFILE),
    ("no_bucket", r"NoSuchBucket|(?i:bucket does not exist)", True, errno.ENOENT),
    # Without the number alone, which may be one of milliseconds.
    ("refused", r"Forbidden|AccessDenied|Unauthorized|status:? 40[13]|InvalidAccessKeyId|SignatureDoesNotMatch"
                r"|Permission denied", True, errno.EACCES),
    ("index_denied", r"Permission denied|not permitted|os error 13|os error 1\)|Read-only file system"
                     r"|os error 30", False, errno.EACCES),
    ("no_answer", r"error sending request|tcp connect|dns error|Connection refused|operation timed out"
                  r"|kind: (Connect|Timeout|Request|Unknown)|Failed to resolve region|instance metadata"
                  r"|CredentialsNotLoaded|BadScheme|URL scheme is not allowed", True, errno.EIO),
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
    if known := _of_storage(error, where):
        return known
    if is_conflict(error):
        return failure(partial(OSError, errno.EAGAIN), "conflict", path=where)
    if isinstance(error, RuntimeError | ValueError) and ENGINE.search(str(error)):
        code = "damaged_remote" if "://" in where else "damaged"
        return failure(DamagedIndex, code, path=where, part=part or "tables", detail=detail(error))
    hidden = redact(str(error))
    return error if hidden == str(error) else OSError(errno.EIO, hidden)


def is_conflict(error: Exception) -> bool:
    """Whether another process has written at the same moment, so that the same call may succeed now."""
    return bool(CONFLICT.search(str(error)))


def is_of_storage(error: Exception, where: str) -> bool:
    """Whether the disk or the object storage of an index has refused: what lies there may be whole."""
    return _of_storage(error, where) is not None


def _of_storage(error: Exception, where: str) -> OSError | None:
    # Without the name of the index, which may say anything.
    text = redact(" ".join(RUST_PLACE.sub("", str(error).replace(where, "")).split()))
    for code, pattern, is_remote, number in KNOWN:
        if ("://" in where or not is_remote) and re.search(pattern, text):
            # OSError makes a PermissionError of its number.
            return failure(partial(OSError, number), code, path=where, text=text[:MAX_DETAIL])
    return None


def detail(error: Exception) -> str:
    """What an error says of the part that is damaged, in a line: its file where that is named."""
    text = " ".join(RUST_PLACE.sub("", str(error)).split())
    named = DAMAGED_FILE.search(text)
    return named[1] if named else redact(text)[:MAX_DETAIL]


def storage_options() -> dict[str, str] | None:
    """For the driver of object storage: what boto's variables of the environment say and its own do not.

    Raises ValueError: the address of the storage is none; it is not repeated, since a password may stand in it.
    """
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return None
    try:
        parts = urlsplit(endpoint)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # of the port, which a password with a slash is taken for
        known = False
    if not known or NO_ADDRESS.search(endpoint):
        raise failure(ValueError, "storage_address", example="https://host:9000")
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
