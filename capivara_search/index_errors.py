"""What a storage says when it fails, as one line for people: which index, which part, what to do.

with explained("s3://bucket/fotos", "pictures"):
    table.count_rows()
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager


class DamagedPart(ValueError):
    """A part of an index can't be read; `part` names it."""

    def __init__(self, message: str, part: str):
        super().__init__(message)
        self.part = part

    def __reduce__(self):
        return type(self), (str(self), self.part)


@contextmanager
def explained(where: str, part: str = "") -> Iterator[None]:
    """Let what LanceDB raises become one line.

    Raises:
        OSError: no space left, no permission, no answer of an object storage or a refusal.
        DamagedPart: a file of the index is missing or broken.
    """
    try:
        yield
    except (DamagedPart, KeyboardInterrupt):
        raise
    except (RuntimeError, OSError, ValueError) as error:
        raise explanation(error, where, part) from error


def explanation(error: Exception, where: str, part: str) -> Exception:
    """The error in our words; itself where it is none of the known ones."""
    text = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        return OSError(errno.ENOSPC, f"No space left on the disk of {where}. Free some; what was written stays")
    if number in (errno.EACCES, errno.EPERM) or "Permission denied" in text or "os error 13" in text:
        return PermissionError(errno.EACCES, f"{where} may not be opened or written. Ask its owner, or choose another")
    if re.search(r"\b403\b|Forbidden|AccessDenied", text):
        return PermissionError(
            errno.EACCES,
            f"The storage of {where} answers 403, access denied. Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "what the bucket allows",
        )
    return error
