"""Google's translation service by its official client: rate-limited, retried, and never dearer than allowed.

    export GOOGLE_API_KEY=…   # or GOOGLE_APPLICATION_CREDENTIALS, the file of a service account
    python -m captions.translate --backend google --price_per_million 20 --max_cost 5 …

It is version 2 of the service ("Basic"), which takes a key. The key travels in a header, not in the address, is sent to
no other host, and is removed from whatever an error says.
"""

import os
import random
import sys
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from capivara_common.cli import flag
from capivara_common.environment import require
from captions.translators.languages import find_code
from captions.translators.pieces import cut, groups

GOOGLE_MODULES = ("google.auth", "google.cloud.translate_v2")  # of the extra `google`
KEY, ACCOUNT = "GOOGLE_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS"
ENDPOINT = "https://translation.googleapis.com"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_SENTENCES = 128  # of a request, version 2 of the service
MAX_CHARACTERS = 5_000  # of a request, as Google advises
LONGEST_WAIT_S = 60.0  # Google's quotas are by the minute, cloud.google.com/translate/quotas
RETRIED = {408, 429, 500, 502, 503, 504}
REFUSED = {400, 401, 403}


@dataclass(kw_only=True)
class GoogleArguments:
    """How hard a task may try: flags of `captions.translate`. The pauses lose a random part."""

    characters_per_second: float = flag(10_000, "google: mean rate of a task.")
    max_tries: int = flag(8, "google: of a request, with pauses that double, before the run ends.")
    first_wait_s: float = flag(1.0, "google: seconds of the first pause.")
    timeout_s: float = flag(60.0, "google: seconds that an answer may take.")


class Incomplete(Exception):
    """The answer to one sentence has no translation."""


class GoogleTranslator:
    """The service, told the languages that it writes and reads; `wait` sleeps so many seconds.

    Raises:
        ValueError: no key is given, it is refused, or the service does not know a language.
        OSError: the service can't be reached.
    """

    name = "Google Translate"

    def __init__(
        self,
        language: str,
        source_language: str,
        limits: GoogleArguments,
        endpoint: str = ENDPOINT,
        wait: Callable[[float], None] = time.sleep,
    ):
        self.limits, self.max_characters, self.sent_characters, self._wait = limits, sys.maxsize, 0, wait
        self._next_s = 0.0  # when the rate allows the next request
        self._secrets: list[str] = []
        self._client = _client(endpoint, limits.timeout_s, self._secrets)
        languages = self._tried(self._client.get_languages)
        known = [entry["language"] for entry in languages if isinstance(entry, dict) and "language" in entry]
        self.code = find_code(language, known, self.name)
        self._source = find_code(source_language, known, self.name)
        self.fingerprint = {"backend": "google", "api": "v2", "source": self._source, "target": self.code}

    def translate(self, sentences: list[str]) -> list[str]:
        """One translation a sentence; one that is too long is translated in pieces, which are joined by blanks."""
        pieces = [cut(sentence, lambda text: len(text) <= MAX_CHARACTERS) for sentence in sentences]
        requests = groups([piece for some in pieces for piece in some], MAX_CHARACTERS, MAX_SENTENCES)
        made = iter([text for request in requests for text in self._translated(request)])
        return [" ".join(next(made) for _ in some) for some in pieces]

    def _translated(self, texts: list[str]) -> list[str]:
        """Of one request; what its answer leaves out is asked for again."""
        found = self._tried(lambda: self._answers(texts))
        missing = [i for i, text in enumerate(found) if text is None]
        # An answer of another length does not say which are missing, so each half is asked for anew.
        middle = len(missing) // 2 if len(missing) == len(texts) else 0
        for some in filter(None, (missing[:middle], missing[middle:])):
            for i, text in zip(some, self._translated([texts[i] for i in some]), strict=True):
                found[i] = text
        return found

    def _answers(self, texts: list[str]) -> list[str | None]:
        """One request: translations, None for those that are missing from the answer."""
        from google.api_core.exceptions import GoogleAPICallError

        characters = sum(map(len, texts))
        self._spend(characters)
        try:
            entries = self._client.translate(
                texts, target_language=self.code, source_language=self._source, format_="text"
            )
        except GoogleAPICallError:  # refused, so not charged; what is lost on the way may be
            self.sent_characters -= characters
            raise
        except ValueError as error:
            if not str(error.args[0]).startswith("Expected iterations"):  # the client's words for another length
                raise
            entries = [{}] * len(texts)
        texts_or_not = [entry.get("translatedText") for entry in entries]
        found = [text if isinstance(text, str) else None for text in texts_or_not]
        if found == [None]:
            raise Incomplete("it answered without a translation")
        return found

    def _spend(self, characters: int) -> None:
        """Wait until the rate allows so many, and count them."""
        if self.sent_characters + characters > self.max_characters:
            raise BudgetExceeded(
                f"{self.sent_characters:,} characters were sent to Google, and {characters:,} more would cost more "
                "than --max_cost allows this run. What is translated is kept; the same command goes on."
            )
        now = time.monotonic()
        start = max(now, self._next_s)
        if start > now:
            self._wait(start - now)
        self._next_s = start + characters / self.limits.characters_per_second
        self.sent_characters += characters

    def _tried(self, request: Callable[[], Any]) -> Any:
        """The result of a request, which is repeated while its failure may pass."""
        for number in range(self.limits.max_tries):
            try:
                return request()
            except BudgetExceeded:
                raise
            except Exception as error:  # of google, requests and urllib3, and of answers that are no JSON
                reason, is_passing, wait_s = self._failure(error)
            if not is_passing:
                raise ValueError(reason)  # here: an error that was raised in `except` would carry the first one
            if number + 1 < self.limits.max_tries:
                doubled = min(self.limits.first_wait_s * 2**number, LONGEST_WAIT_S)
                self._wait(max(doubled * random.uniform(0.5, 1.0), wait_s))
        raise ConnectionError(
            f"Google has failed {self.limits.max_tries} times, at last so: {reason}. What is translated is "
            "kept; the same command goes on."
        )

    def _failure(self, error: Exception) -> tuple[str, bool, float]:
        """Why a request got no answer, without the key; whether it may get one later; the wait that is asked for."""
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError
        from requests import exceptions

        said = self._without_key(f"{error or type(error).__name__}")
        if isinstance(error, GoogleAPICallError):
            asked = getattr(error.response, "headers", {}).get("Retry-After", "")
            wait_s = min(float(asked), LONGEST_WAIT_S) if asked.isdigit() else 0.0
            too_fast = error.code == 403 and "rate limit exceeded" in said.lower()  # 403 is for quotas, too
            if error.code in REFUSED and not too_fast:
                said = f"Google refuses the request; see to the key, its rights and its quota. It says: {said}"
            return said, error.code in RETRIED or too_fast, wait_s
        if isinstance(error, GoogleAuthError):
            return f"Google refuses the credentials: {said}", bool(getattr(error, "retryable", False)), 0.0
        passing = (exceptions.Timeout, exceptions.ConnectionError, exceptions.ChunkedEncodingError)
        garbled = (exceptions.JSONDecodeError, exceptions.ContentDecodingError, AttributeError, TypeError, Incomplete)
        return said, isinstance(error, passing + garbled), 0.0

    def _without_key(self, text: str) -> str:
        for secret in self._secrets:
            for form in (secret, urllib.parse.quote(secret, safe=""), repr(secret)[1:-1]):
                text = text.replace(form, "<key>")
        return text


class BudgetExceeded(ValueError):
    """One more request would be dearer than allowed."""


def _client(endpoint: str, timeout_s: float, secrets: list[str]) -> Any:
    """The official client, with the key or the account of the environment; what must not be shown joins `secrets`."""
    address = urllib.parse.urlsplit(endpoint)
    if address.scheme != "https" and not (address.scheme == "http" and address.hostname in LOOPBACK):
        raise ValueError(f"The key would travel unprotected to {endpoint!r}; it must begin with https://.")
    require("--backend google", "google", *GOOGLE_MODULES)
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import translate_v2

    class Session(AuthorizedSession):
        """The client sets no time-out of one's own, and `requests` would send the key on to where it is redirected."""

        def request(self, method: str, url: str, **options: Any) -> Any:
            return super().request(method, url, **options | {"timeout": timeout_s, "allow_redirects": False})

    credentials = _credentials(translate_v2.Client.SCOPE, secrets)
    session = Session(credentials, max_refresh_attempts=0 if secrets else 2)  # a refused key stays refused
    return translate_v2.Client(credentials=credentials, _http=session, client_options={"api_endpoint": endpoint})


def _credentials(scopes: tuple[str, ...], secrets: list[str]) -> Any:
    import google.auth
    from google.auth import api_key

    key = os.environ.get(KEY, "").strip()
    if key:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"The key in {KEY} has blanks, line breaks or letters that no key has. Copy it anew.")
        secrets.append(key)
        return api_key.Credentials(key)
    if not os.environ.get(ACCOUNT):
        raise ValueError(
            f"--backend google needs a key of Google Cloud's Translation API in the environment variable {KEY}, or the "
            f"file of a service account in {ACCOUNT}. Neither is set."
        )
    try:
        return google.auth.default(scopes=scopes)[0]
    except google.auth.exceptions.GoogleAuthError as error:
        raise ValueError(f"{ACCOUNT} names no usable account: {error}") from error
