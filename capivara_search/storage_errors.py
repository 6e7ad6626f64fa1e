"""Convert errors of LanceDB, the disk and object storage to one-line messages for users.

A message says which index and which table has the problem, and what the user can do.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from capivara_common.privacy import redact_secrets
from capivara_search.messages import make_error_from_code

# Types of the errors that LanceDB raises, also from its Rust code. The texts are long and written for developers, and
# include responses of the object storage. So this module recognizes errors by patterns in the texts.
LANCEDB_ERRORS = (RuntimeError, OSError, ValueError)
# Environment variables that may contain the address of an object storage, and the form of a valid address. This package
# checks the variables itself, because LanceDB would crash on an invalid address without a clear message.
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
ENDPOINT_RE = re.compile(
    r"https?://([\w.~!$&'()*+,;=%:-]+@)?(\[[\da-fA-F:]+\]|[\w.-]+)(:\d{1,5})?(/[\w./~%-]*)?", re.ASCII
)
# `ADDRESS_RE` matches the addresses of object storage that LanceDB accepts. A location that begins like an address
# (`SCHEME_RE`) but does not match, such as "s3:/bucket", is refused: LanceDB would create a local folder for it, whose
# name would contain the access keys of the address.
SCHEME_RE = re.compile(r"[A-Za-z][\w+.-]+:/", re.ASCII)
ADDRESS_RE = re.compile(r"[A-Za-z][\w+.-]+://([^/@\s]*@)?[\w.%-]*(:\d{1,5})?([/?#].*)?", re.ASCII)
# Patterns in LanceDB's error texts:
# - `WRITE_CONFLICT_RE`: another process wrote at the same time. The write can succeed if it is repeated.
# - `LANCE_ERROR_RE`: any error of LanceDB. If no other pattern of this module matches, a file of the index is missing
#   or damaged.
WRITE_CONFLICT_RE = re.compile(
    r"commit conflict|concurrent (writer|transaction|commit)|Too many concurrent|preempted", re.I
)
LANCE_ERROR_RE = re.compile(
    r"lance error|LanceError|Encountered corrupt|External error: Not found|appear to be a Lance file"
)
# Locations in LanceDB's source code. They are removed from messages, because they help only LanceDB's developers.
RUST_LOCATION_RE = re.compile(r",?\s*\S+\.rs(:\d+)+")
MAX_DETAIL_CHARACTERS = 200  # maximum number of characters of LanceDB's text that a message quotes
# (Key of a message in messages.yaml, pattern in LanceDB's error text, errno of the OSError that is raised instead). The
# first entry that matches counts. "no_answer" applies only to object storage.
STORAGE_ERROR_PATTERNS = (
    ("index_full", r"No space left|os error 28|StorageFull|InsufficientCapacity", errno.ENOSPC),
    ("too_many_files", r"Too many open files|os error 24", errno.EMFILE),
    # A status code counts only after the word "status", because the number 403 may also be a duration in milliseconds.
    ("no_answer", r"NoSuchBucket|(?i:bucket does not exist)|Forbidden|AccessDenied|Unauthorized|status:? 40[13]"
                  r"|InvalidAccessKeyId|SignatureDoesNotMatch|Permission denied|error sending request|tcp connect"
                  r"|dns error|Connection refused|operation timed out|kind: (Connect|Timeout|Request|Unknown)|BadScheme"
                  r"|CredentialsNotLoaded|Failed to resolve region|instance metadata|URL scheme is not", errno.EIO),
    ("index_denied", r"Permission denied|not permitted|os error 13|os error 1\)|Read-only file system"
                     r"|os error 30", errno.EACCES),
)  # fmt: skip


class DamagedIndexError(ValueError):
    """Error for a missing or damaged file of an index. The message names the damaged table."""


@contextmanager
def wrap_storage_errors(where: str, part: str = "") -> Iterator[None]:
    """Convert LanceDB errors that are raised in the `with` block to errors with one-line messages.

    Args:
        where: Folder or address of the index.
        part: Name of the table, such as "pictures", for the message. Empty: the message says "tables".

    Yields:
        None.

    Raises:
        OSError: If the disk is full, the storage refuses access or does not answer, or a write conflicts with another
            process.
        DamagedIndexError: If a file of the index is missing or damaged.
    """
    try:
        yield
    except LANCEDB_ERRORS as error:
        if hasattr(error, "code"):  # the error was already converted, so it is not changed
            raise
        raise convert_lancedb_error(error, where, part) from error


def convert_lancedb_error(error: Exception, where: str, part: str = "") -> Exception:
    """Convert an error that LanceDB raised to an error with an error code and a one-line message.

    Args:
        error: The error.
        where: Folder or address of the index.
        part: Name of the table, such as "pictures", for the message. Empty: the message says "tables".

    Returns:
        The new error, for the caller to raise. An unknown error is returned unchanged, unless its text contains
        credentials. Then the new error is an OSError without the credentials.
    """
    if access_error := convert_storage_refusal_to_os_error_or_none(error, where):
        return access_error
    if WRITE_CONFLICT_RE.search(str(error)):
        return make_error_from_code(partial(OSError, errno.EAGAIN), "conflict", path=where)
    if isinstance(error, RuntimeError | ValueError) and LANCE_ERROR_RE.search(str(error)):
        code = "damaged_remote" if "://" in where else "damaged"
        detail = redact_secrets(" ".join(RUST_LOCATION_RE.sub("", str(error)).split()))[:MAX_DETAIL_CHARACTERS]
        return make_error_from_code(DamagedIndexError, code, path=where, part=part or "tables", detail=detail)
    redacted = redact_secrets(str(error))
    return error if redacted == str(error) else OSError(errno.EIO, redacted)


def convert_storage_refusal_to_os_error_or_none(error: Exception, where: str) -> OSError | None:
    """Convert an error to an OSError if the disk or the object storage refused access.

    Examples are a full disk and a missing permission. Such an error does not mean that the index is damaged.

    Args:
        error: Error that LanceDB raised.
        where: Folder or address of the index.

    Returns:
        The OSError, with an error code and a one-line message. None if the error has another cause.
    """
    # The location of the index is removed from the text, because the name of a folder could match a pattern.
    text = redact_secrets(" ".join(RUST_LOCATION_RE.sub("", str(error).replace(where, "")).split()))
    for code, pattern, number in STORAGE_ERROR_PATTERNS:
        if ("://" in where or code != "no_answer") and re.search(pattern, text):
            # OSError(errno, ...) creates an instance of the matching subclass, such as PermissionError for EACCES.
            return make_error_from_code(partial(OSError, number), code, path=where, text=text[:MAX_DETAIL_CHARACTERS])
    return None


def check_address(where: str) -> None:
    """Check that the location of an index is a local path or a valid address of an object storage.

    Args:
        where: Folder or address of the index.

    Raises:
        ValueError: If the location begins like an address but is not valid, such as "s3:/bucket".
    """
    if SCHEME_RE.match(where) and not ADDRESS_RE.fullmatch(where):
        # `redact_secrets` finds access keys only after "://", so a misspelled ":/" is corrected first.
        address = redact_secrets(re.sub(":/+", "://", where, count=1))
        raise make_error_from_code(ValueError, "index_address", path=address, example="s3://bucket/fotos")


def check_endpoints() -> None:
    """Validate the addresses of object storage in the environment variables `ENDPOINT_VARIABLES`.

    Without this check, LanceDB's Rust code would panic on an invalid address.

    Raises:
        ValueError: If an address is invalid. The message does not quote the address, because it may include a password.
    """
    if not all(ENDPOINT_RE.fullmatch(os.environ.get(name) or "http://none") for name in ENDPOINT_VARIABLES):
        raise make_error_from_code(ValueError, "storage_address", example="https://host:9000")
