"""What a storage says when it fails, as one line for people: which index, which part, what to do.

    with explained("s3://bucket/fotos", "pictures"):
        table.count_rows()

LanceDB raises the errors of its engine as RuntimeError or ValueError, with a text for developers over many lines; an
object storage's answers stand somewhere in it.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from capivara_common.files import no_space_left
from capivara_common.privacy import redact

# Of the engine's texts. The rest of them stands for a file that is missing or broken.
FULL = re.compile(r"No space left|os error 28|StorageFull|InsufficientCapacity")
NOT_ALLOWED = re.compile(r"Permission denied|os error 13|os error 1\)|Read-only file system|os error 30")
# Without the number alone, which may be one of milliseconds.
REFUSED = re.compile(r"Forbidden|AccessDenied|Unauthorized|status:? 40[13]|InvalidAccessKeyId|SignatureDoesNotMatch")
NO_BUCKET = re.compile(r"NoSuchBucket|bucket does not exist", re.IGNORECASE)
NO_ANSWER = re.compile(
    r"error sending request|tcp connect|dns error|Connection refused|kind: (Connect|Timeout|Request|Unknown)"
    r"|operation timed out|Failed to resolve region"
    r"|instance metadata|CredentialsNotLoaded|BadScheme|URL scheme is not allowed"
)
CONFLICT = re.compile(r"[Cc]ommit conflict|concurrent (writer|transaction|commit)|Too many concurrent|preempted", re.I)
ENGINE = re.compile(r"lance error|LanceError|Encountered corrupt|External error: Not found")
MAX_DETAIL = 200  # letters of the engine's own text


class DamagedIndex(ValueError):
    """A part of an index can't be read; the text names the part."""


def is_conflict(error: BaseException) -> bool:
    """Whether another process has written at the same moment, so that the same call may succeed now."""
    return bool(CONFLICT.search(str(error)))


def is_of_storage(error: BaseException, where: str) -> bool:
    """Whether the disk or the object storage of an index has refused: what lies there may be whole."""
    text = _text(error, where)
    known = isinstance(error, PermissionError) or no_space_left(error)
    remote = (REFUSED, NO_BUCKET, NO_ANSWER) if "://" in where else ()
    return known or any(found.search(text) for found in (FULL, NOT_ALLOWED, *remote))


def _text(error: BaseException, where: str) -> str:
    """What an error says, in a line, without secrets and without the name of the index, which may say anything."""
    return redact(" ".join(str(error).replace(where, "").split()))


def is_of_damage(error: BaseException) -> bool:
    """Whether the engine says that a file is missing or broken."""
    return bool(re.search(r"[Nn]ot found|[Cc]orrupt|[Mm]agic|LanceError|lance error|footer|manifest", str(error)))


@contextmanager
def explained(where: str, part: str = "") -> Iterator[None]:
    """Let what LanceDB raises become one line.

    Args:
        where: folder or address of the index.
        part: name of the table that is worked on.

    Raises:
        OSError: no space left, no permission, a refusal of the object storage, no answer, or others who write.
        DamagedIndex: a file of the index is missing or broken.
    """
    try:
        yield
    except DamagedIndex:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        raise explanation(error, where, part) from error


def explanation(error: Exception, where: str, part: str = "") -> Exception:
    """The error in our words; itself where it is none of the known ones."""
    text = _text(error, where)
    if no_space_left(error) or FULL.search(text):
        return OSError(
            errno.ENOSPC,
            f"No space left on the disk of the index {where}. Free some and run the same again; what was written stays",
        )
    if "://" in where and NO_BUCKET.search(text):
        return OSError(errno.ENOENT, f"There is no bucket for the index {where}. Make it, or check the name")
    if "://" in where and (isinstance(error, PermissionError) or REFUSED.search(text)):
        return PermissionError(
            errno.EACCES,
            f"The storage of {where} answers 403, access denied. Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "what they may do in the bucket",
        )
    if isinstance(error, PermissionError) or NOT_ALLOWED.search(text):
        return PermissionError(
            errno.EACCES, f"The index {where} can't be opened or written: no permission. Choose another place"
        )
    if "://" in where and NO_ANSWER.search(text):
        return OSError(
            errno.EIO,
            f"The storage of {where} can't be reached. Check AWS_ENDPOINT_URL, AWS_REGION, the keys and the network: "
            + text[:MAX_DETAIL],
        )
    if is_conflict(error):
        return BlockingIOError(
            errno.EAGAIN, f"Others write to the index {where} all the time. Run the same again; what was written stays"
        )
    if isinstance(error, RuntimeError | ValueError) and ENGINE.search(text):
        return DamagedIndex(
            f"The index {where} is damaged in its part {part or 'tables'}: {text[:MAX_DETAIL]}. Restore that folder "
            "from a copy, or remove it and add the pictures again."
        )
    hidden = redact(str(error))
    return error if hidden == str(error) else OSError(errno.EIO, hidden)
