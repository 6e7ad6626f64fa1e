"""The state of a repository on the Hub, calls with retries, and errors that say the way out.

Texts from the Hub are shown without control characters, and no message holds a token.
"""

import json
import logging
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id
from tqdm import tqdm

from capivara_common.privacy import redact
from hub_upload.limits import DEADLINE_HOURS, limit, time_limit

T = TypeVar("T")
logger = logging.getLogger("capivara")
WAITS_S = (1, 2, 4)  # before the second, third and fourth try of a call that the client itself does not repeat
TRY_AGAIN = {408, 429, 500, 502, 503, 504}
FULL = {402, 413, 507}  # the Hub itself says 403, with words
ANEW = "Run the same command again."
AGAIN = f"{ANEW[:-1]}: files that have arrived are not sent a second time."
CARD_BYTES = 2**21  # of a card on the Hub that is compared line by line


class PushError(OSError):
    """A push that was not made, in one line: why, and the way out. It holds no token."""

    def __init__(self, message: str):
        super().__init__(" ".join(plain(message).split()))


@dataclass
class Remote:
    """What a repository on the Hub holds, as far as the token sees."""

    exists: bool = False
    private: bool = False
    head: str | None = None  # commit of the branch or pull request; None where there is none of that name
    start: str | None = None  # commit that the branch would start at, which is the head of one that exists
    tags: dict[str, str] = field(default_factory=dict)  # name -> commit
    files: dict[str, RepoFile] = field(default_factory=dict)  # path -> size and hashes, at `start`


def look(repo_id: str, repo_type: str, revision: str) -> Remote:
    """What is on the Hub. Raises PushError where it can't be asked."""
    api = HfApi()
    with hub_errors(repo_id, repo_type):
        try:
            info = with_retries(lambda: api.repo_info(repo_id, repo_type=repo_type))
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Remote()
        refs = with_retries(lambda: api.list_repo_refs(repo_id, repo_type=repo_type, include_pull_requests=True))
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or []}
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        start = heads.get(revision) or heads.get("main") or info.sha
        _check_types(bool, info.private)
        _check_types(str, start, *heads, *heads.values(), *tags, *tags.values())
        there = files_at(repo_id, repo_type, start)
        return Remote(True, info.private, heads.get(revision), start, tags, there)


def files_at(repo_id: str, repo_type: str, revision: str) -> dict[str, RepoFile]:
    """Path -> size and hashes, at a revision; the client repeats this call by itself."""
    listed = HfApi().list_repo_tree(repo_id, repo_type=repo_type, revision=revision, recursive=True)
    files = {file.path: file for file in listed if isinstance(file, RepoFile)}
    _check_types(str, *files, *(file.lfs.sha256 for file in files.values() if file.lfs))
    _check_types(int, *(file.size for file in files.values()))
    return files


def user_name(repo_id: str, repo_type: str) -> str | None:
    """Whose token is used; None without one. Raises PushError where the Hub refuses it."""
    with hub_errors(repo_id, repo_type):
        token = get_token()
        return None if token is None else _name_of(token)


def remote_text(repo_id: str, repo_type: str, path: str, file: RepoFile, revision: str) -> str | None:
    """The text of a small file on the Hub; None where it is a large one."""
    if file.size > CARD_BYTES:
        return None
    url = hf_hub_url(repo_id, path, repo_type=repo_type, revision=revision)
    with hub_errors(repo_id, repo_type):
        answer = with_retries(lambda: get_session().get(url, headers=build_hf_headers()))
        hf_raise_for_status(answer)
        return answer.content.decode("utf-8", errors="replace")


def check_visibility(repo_id: str, remote: Remote, private: bool) -> None:
    """Raise PushError where what shall be private would be seen by everybody."""
    if private and remote.exists and not remote.private:
        raise PushError(
            f"{repo_id} is public, and --private makes new repositories private only. Change it in the settings of the "
            "repository first, or take another name."
        )


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless it is `owner/name` as the Hub takes it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(plain(f"The repository id {repo_id!r} is not one of the Hub: {error}")) from None
    if repo_id.count("/") != 1:
        raise ValueError(f"The repository id must be owner/name, such as my-name/my-model, got {plain(repo_id)!r}.")


def with_retries(call: Callable[[], T], may_succeed: Callable[[Exception], bool] | None = None) -> T:
    """The answer of a call, repeated after errors of which `may_succeed`, by default `is_transient`, says so."""
    for wait in WAITS_S:
        try:
            return call()
        except Exception as error:  # a malformed answer raises any kind
            if not (may_succeed or is_transient)(error):
                raise
            print(f"{one_line(error)} Trying again in {wait} s.", file=sys.stderr)
            time.sleep(wait)
    return call()


def is_unclear(error: BaseException) -> bool:
    """Whether a call that has raised it may have been carried out all the same."""
    return is_transient(error) or is_malformed(error)


def is_transient(error: BaseException) -> bool:
    """Whether the connection broke or the Hub is in trouble: the same call may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRY_AGAIN
    return isinstance(error, HTTPError)  # of the transport: no connection, a broken one, a time-out


def is_malformed(error: BaseException) -> bool:
    """Whether an answer is not the Hub's: no JSON, or JSON of another form."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
        return True
    return not isinstance(error, HTTPError | OSError | ValueError | RuntimeError)


@contextmanager
def hub_errors(repo_id: str, repo_type: str) -> Iterator[None]:
    """Errors of calls to the Hub as PushError; within the block logs are plain, and the time is limited."""
    limit(get_session())
    with _plain_logs(), time_limit(DEADLINE_HOURS):
        try:
            yield
        except Exception as error:  # a malformed answer raises any kind
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()  # so that the next output begins a line
            if isinstance(error, PushError):
                raise
            logger.debug("A call to the Hub failed.", exc_info=True)
            while isinstance(error, RuntimeError) and error.__cause__ is not None:
                error = error.__cause__  # of an upload, which the client wraps
            raise PushError(explained(error, repo_id, repo_type)) from None


def explained(error: BaseException, repo_id: str, repo_type: str) -> str:
    """Why a call failed, and the way out."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is asked of the Hub. Unset it to push."
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"The connection to the Hub broke ({type(error).__name__}: {error}). {AGAIN}"
    if is_malformed(error):
        return (
            f"{constants.ENDPOINT} has answered in another form than the Hub does ({type(error).__name__}: {error}). "
            "Does a proxy or a log-in page answer in its place? Check HF_ENDPOINT and the network, then run the same "
            "command again."
        )
    if isinstance(error, RuntimeError):  # of Xet
        return f"The upload failed: {error}. {AGAIN}"
    if not isinstance(error, HfHubHTTPError):
        return str(error) or type(error).__name__
    status = error.response.status_code
    said = " ".join((error.server_message or str(error)).split()).rstrip(".")
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    if status == 401 and not (isinstance(error, RepositoryNotFoundError) and get_token() is None):
        return (
            f"The Hub refuses the token (401): it is wrong, or no longer valid. Make one that may write at {tokens}, "
            "and save it by `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated (403), and the token has no access to it. Ask for it on the repository's page."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no {repo_type} repository {repo_id} ({status}), or the token does not see it. Check the name, "
            "and that the token is of a member of its organisation."
        )
    if status in FULL or (status == 403 and re.search("storage|quota", said, re.IGNORECASE)):
        return (
            f"The Hub has no more space for {repo_id} ({status}): {said}. Delete old files or repositories, or ask for "
            "more storage; then run the same command again."
        )
    if status == 403:
        return (
            f"The token may not write to {repo_id} (403): {said}. Use one with write access, of a member of "
            f"{repo_id.split('/')[0]} ({tokens})."
        )
    if status in TRY_AGAIN:
        trouble = "takes no more requests" if status == 429 else "is in trouble"
        return f"The Hub {trouble} ({status}): {said}. {ANEW[:-1]} later."
    return f"The Hub refused ({status}): {said}."


def plain(text: str) -> str:
    """Text that can be shown: no token, and no character but line breaks that a terminal would obey."""
    text = redact(text)
    hidden = [sign for sign in {*text} - {*"\n\t"} if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in hidden})


def plain_line(text: str) -> str:
    """As `plain`, and on one line: a name."""
    return plain(text.replace("\n", "\\n").replace("\t", "\\t"))


def one_line(error: BaseException) -> str:
    """The first line of what an error says, to be shown."""
    lines = str(error).strip().splitlines()
    return plain(f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")).removesuffix(".") + "."


@cache
def _name_of(token: str) -> str:
    """Asked once: the Hub takes few such questions, and a run asks at every checkpoint."""
    name = with_retries(lambda: HfApi().whoami(token))["name"]
    _check_types(str, name)
    return name


def _check_types(kind: type, *values: object) -> None:
    if wrong := [value for value in values if not isinstance(value, kind)]:
        raise TypeError(f"{wrong[0]!r:.60} is no {kind.__name__}")


@contextmanager
def _plain_logs() -> Iterator[None]:
    """Log records and warnings of any library go through `plain`: those of the client hold addresses and answers."""
    make = logging.getLogRecordFactory()

    def made(*args, **kwargs) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with suppress(TypeError, ValueError):  # a message that does not fit its values; logging says so itself
            record.msg, record.args = plain(record.getMessage()), None
        return record

    def show(message, *args, **kwargs) -> None:
        print(f"warning: {plain(str(message))}", file=sys.stderr)

    logging.setLogRecordFactory(made)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logging.setLogRecordFactory(make)
