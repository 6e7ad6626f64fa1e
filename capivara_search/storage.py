"""Convert errors of LanceDB, the disk and object storage to one-line messages: which index, which part, what to do.

LanceDB raises the errors of its Rust code as RuntimeError or ValueError, with texts for developers over many lines. The
answers of an object storage are part of these texts.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from capivara_common.privacy import redact
from capivara_search.messages import localized_error

LANCEDB_ERRORS = (RuntimeError, OSError, ValueError)  # errors that LanceDB raises
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
ENDPOINT_RE = re.compile(
    r"https?://([\w.~!$&'()*+,;=%:-]+@)?(\[[\da-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[\w./~%-]*)?", re.ASCII
)
# A path that looks like an address, and the addresses that LanceDB accepts. It takes any other one for a folder.
SCHEME_RE = re.compile(r"[A-Za-z][\w+.-]+:/", re.ASCII)
ADDRESS_RE = re.compile(r"[A-Za-z][\w+.-]+://([^/@\s]*@)?[\w.%-]*(:\d{1,5})?([/?#].*)?", re.ASCII)
# Patterns in LanceDB's error texts. A text that matches only `LANCE_ERROR_RE` means a missing or damaged file.
WRITE_CONFLICT_RE = re.compile(
    r"commit conflict|concurrent (writer|transaction|commit)|Too many concurrent|preempted", re.I
)
LANCE_ERROR_RE = re.compile(
    r"lance error|LanceError|Encountered corrupt|External error: Not found|appear to be a Lance file"
)
RUST_LOCATION_RE = re.compile(r",?\s*\S+\.rs(:\d+)+")  # source locations, which are of use to LanceDB's developers only
MAX_DETAIL_CHARACTERS = 200  # characters of LanceDB's text in our message
# Error code of our message, pattern in LanceDB's text, and errno. "no_answer" applies only to object storage.
STORAGE_ERROR_PATTERNS = (
    ("index_full", r"No space left|os error 28|StorageFull|InsufficientCapacity", errno.ENOSPC),
    ("too_many_files", r"Too many open files|os error 24", errno.EMFILE),
    # A status code counts only after the word "status": a bare 403 may be a number of milliseconds.
    ("no_answer", r"NoSuchBucket|(?i:bucket does not exist)|Forbidden|AccessDenied|Unauthorized|status:? 40[13]"
                  r"|InvalidAccessKeyId|SignatureDoesNotMatch|Permission denied|error sending request|tcp connect"
                  r"|dns error|Connection refused|operation timed out|kind: (Connect|Timeout|Request|Unknown)|BadScheme"
                  r"|CredentialsNotLoaded|Failed to resolve region|instance metadata|URL scheme is not", errno.EIO),
    ("index_denied", r"Permission denied|not permitted|os error 13|os error 1\)|Read-only file system"
                     r"|os error 30", errno.EACCES),
)  # fmt: skip


class DamagedIndexError(ValueError):
    """Error for a missing or damaged file of an index; the message names the part of the index."""


@contextmanager
def wrap_storage_errors(where: str, part: str = "") -> Iterator[None]:
    """Convert errors of LanceDB in the block to errors with one-line messages.

    Args:
        where: Folder or address of the index.
        part: Name of the table, for the message.

    Yields:
        Nothing.

    Raises:
        OSError: If there is no space left, no permission, no answer or a refusal of the object storage, or other
            processes kept writing at the same time.
        DamagedIndexError: If a file of the index is missing or damaged.
    """
    try:
        yield
    except DamagedIndexError:
        raise
    except LANCEDB_ERRORS as error:
        raise to_index_error(error, where, part) from error


def to_index_error(error: Exception, where: str, part: str = "") -> Exception:
    """Convert an error of LanceDB to an error with a code and a one-line message.

    Args:
        error: Error of LanceDB.
        where: Folder or address of the index.
        part: Name of the table, for the message.

    Returns:
        The new error; the error itself if it is of no known kind and contains no credentials.
    """
    if hasattr(error, "code"):
        return error
    if access_error := to_access_error(error, where):
        return access_error
    if is_write_conflict(error):
        return localized_error(partial(OSError, errno.EAGAIN), "conflict", path=where)
    if isinstance(error, RuntimeError | ValueError) and LANCE_ERROR_RE.search(str(error)):
        code = "damaged_remote" if "://" in where else "damaged"
        detail = redact(" ".join(RUST_LOCATION_RE.sub("", str(error)).split()))[:MAX_DETAIL_CHARACTERS]
        return localized_error(DamagedIndexError, code, path=where, part=part or "tables", detail=detail)
    redacted = redact(str(error))
    return error if redacted == str(error) else OSError(errno.EIO, redacted)


def is_write_conflict(error: Exception) -> bool:
    """Return whether a write failed because another process wrote at the same time, so that a retry may succeed."""
    return bool(WRITE_CONFLICT_RE.search(str(error)))


def to_access_error(error: Exception, where: str) -> OSError | None:
    """Convert a refusal of the disk or the object storage to an OSError, or return None if it is another error.

    A refusal says nothing about the state of the index, which may be intact.

    Args:
        error: Error of LanceDB.
        where: Folder or address of the index.

    Returns:
        An error with a code and a one-line message, or None.
    """
    # The location of the index is removed, because its name could match a pattern.
    text = redact(" ".join(RUST_LOCATION_RE.sub("", str(error).replace(where, "")).split()))
    for code, pattern, number in STORAGE_ERROR_PATTERNS:
        if ("://" in where or code != "no_answer") and re.search(pattern, text):
            # OSError(errno, ...) returns the subclass for the number, such as PermissionError.
            return localized_error(partial(OSError, number), code, path=where, text=text[:MAX_DETAIL_CHARACTERS])
    return None


def check_address(where: str) -> None:
    """Raise ValueError if the location of an index begins like an address, such as `s3:/x`, but is not a valid one.

    LanceDB would create a local folder, whose name would repeat the keys in the address.
    """
    if SCHEME_RE.match(where) and not ADDRESS_RE.fullmatch(where):
        # `redact` finds the keys only after "://".
        address = redact(re.sub(":/+", "://", where, count=1))
        raise localized_error(ValueError, "index_address", path=address, example="s3://bucket/fotos")


def check_endpoints() -> None:
    """Validate the endpoint addresses of object storage in environment variables.

    LanceDB's driver panics on an invalid address.

    Raises:
        ValueError: If an address is invalid. The message does not contain it, because it may include a password.
    """
    if not all(ENDPOINT_RE.fullmatch(os.environ.get(name) or "http://none") for name in ENDPOINT_VARIABLES):
        raise localized_error(ValueError, "storage_address", example="https://host:9000")
