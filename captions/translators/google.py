"""Translate sentences with Google Cloud Translation (`--backend google`).

This module calls version 2 ("Basic") of the service's API, with Google's official client. The API key is sent in a
header, and only to the host of the service.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from capivara_common.cli import flag
from capivara_common.environment import require_packages
from captions.http_service import RETRYABLE_STATUS_CODES, Failure, Retries, check_key, check_service_url, hide_key
from captions.languages import find_translator_language_code
from captions.translators.base import Translator, translate_in_pieces

GOOGLE_MODULES = ("google.auth", "google.cloud.translate_v2")  # modules that the extra `google` installs
GOOGLE_MAX_CHARACTERS = 5_000  # largest number of characters per request that Google recommends
GOOGLE_MAX_SENTENCES = 128  # largest number of sentences per request that version 2 of Google's API accepts
GOOGLE_ENDPOINT = "https://translation.googleapis.com"
API_KEY_VARIABLE = "GOOGLE_API_KEY"
REQUEST_TIMEOUT_S = 60.0


@dataclass(kw_only=True)
class GoogleFlags:
    """Flags of the backend that translates with Google Cloud Translation (`--backend google`)."""

    google_endpoint: str | None = flag(None, "Only for --backend google: URL of the service. Default: Google's.")


class GoogleTranslator(Translator):
    """Translator that uses Google Cloud Translation, a paid service.

    The API key is read from the environment variable GOOGLE_API_KEY.

    Args:
        args: Flags of `captions.translate`.

    Attributes:
        code: Code of the target language in Google's spelling, for example "zh-TW".
        fingerprint: Everything that affects a translation, except the sentence itself, as a dict of JSON values.

    Raises:
        ValueError: If the key is missing or refused, or the service does not know a language.
        OSError: If the service can't be reached.
    """

    flags = GoogleFlags
    name = "Google Translate"

    @classmethod
    def check_flags(cls, args: Any) -> None:
        """Check that the packages for Google's service are installed.

        Raises ImportError if the packages of the extra `google` are missing.
        """
        require_packages("--backend google", "google", *GOOGLE_MODULES)

    def __init__(self, args: Any):
        self._key = os.environ.get(API_KEY_VARIABLE, "").strip()
        self._client = _make_client(args.google_endpoint or GOOGLE_ENDPOINT, self._key)
        codes = self._retry(lambda: [entry["language"] for entry in self._client.get_languages()])
        self.code = find_translator_language_code(args.language, codes, self.name)
        self._source_code = find_translator_language_code(args.source_language, codes, self.name)
        self.fingerprint = {"backend": "google", "api": "v2", "source": self._source_code, "target": self.code}

    def translate(self, sentences: list[str]) -> list[str]:
        """Translate sentences with Google's service, and return one translation per sentence, in order.

        Args:
            sentences: Sentences to translate. None of them may be blank.
        """

        def fits(text: str) -> bool:
            return len(text) <= GOOGLE_MAX_CHARACTERS

        def translate_batch(texts: list[str]) -> list[str]:
            return self._retry(lambda: self._request_translations(texts))

        return translate_in_pieces(sentences, fits, translate_batch, GOOGLE_MAX_SENTENCES, GOOGLE_MAX_CHARACTERS)

    def batch_limits(self, args: Any) -> tuple[int, int]:
        """Return the size limits of a batch, the group of sentences that are translated before results are saved.

        By default, a batch is at most as large as one request to the service.

        Args:
            args: Flags of `captions.translate`.

        Returns:
            The tuple (largest number of sentences, largest number of characters).
        """
        # Each paid translation is saved before the next request is sent.
        return args.batch_size or GOOGLE_MAX_SENTENCES, GOOGLE_MAX_CHARACTERS

    def _request_translations(self, texts: list[str]) -> list[str]:
        """Send one request, and return the translations of the texts, in order.

        Raises TypeError if the response does not contain one translation per text.
        """
        languages = {"target_language": self.code, "source_language": self._source_code}
        entries = self._client.translate(texts, format_="text", **languages)
        translations = [entry.get("translatedText") for entry in entries]
        if len(translations) != len(texts) or not all(isinstance(text, str) for text in translations):
            raise TypeError("the response contained no translation")
        return translations

    def _retry(self, request: Callable[[], Any]) -> Any:
        """Send a request, and send it again after a failure that may be temporary.

        Args:
            request: Function that sends the request and returns the result.

        Returns:
            The result of the function.

        Raises:
            ValueError: If Google refuses the request.
            ConnectionError: If the request has failed `captions.http_service.MAX_TRIES` times.
        """
        retries = Retries("Google", "Check the key, its permissions and its quota.")
        while True:
            try:
                return request()
            except Exception as error:  # the client and its HTTP libraries raise errors of many unrelated types
                failure = self._describe_failure(error)
            # After the last attempt, `seconds_before_next` raises an error. It must be called outside of the `except`
            # block: inside, Python would also show the original error, which may contain the API key.
            time.sleep(retries.seconds_before_next(failure))

    def _describe_failure(self, error: Exception) -> Failure:
        """Convert the exception that a request raised to a `Failure`, whose reason does not contain the API key."""
        from google.api_core.exceptions import GoogleAPICallError

        reason = hide_key(f"{error or type(error).__name__}", self._key)
        if isinstance(error, GoogleAPICallError):
            # Status 403 usually means that access is denied, and repeating the request does not help. But Google also
            # sends it if a rate limit is exceeded, which is temporary. Only the text of the message shows this.
            is_temporary = error.code in RETRYABLE_STATUS_CODES or "rate limit exceeded" in reason.lower()
            return Failure(reason, is_temporary)
        # The client raises errors of these types if a response is incomplete or not valid JSON. Their messages are
        # about the code of the client and would not help, so they are replaced.
        is_bad_response = isinstance(error, LookupError | AttributeError | TypeError | ValueError)
        if is_bad_response and not isinstance(error, OSError):
            reason = "the response contained no translation"
        return Failure(reason, is_temporary=True)


def _make_client(endpoint: str, key: str) -> Any:
    """Return the official client of Google Cloud Translation.

    Args:
        endpoint: URL of the service.
        key: API key.

    Raises:
        ValueError: If the key is missing or has invalid characters, or the URL is not encrypted (https).
    """
    check_service_url(endpoint, "google_endpoint")
    check_key(key, API_KEY_VARIABLE, "--backend google needs a key of the Google Cloud Translation API")
    from google.auth import api_key
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import translate_v2

    class Session(AuthorizedSession):
        """An HTTP session with a timeout and without redirects, which would forward the API key to another host."""

        def request(self, method: str, url: str, **options: Any) -> Any:
            return super().request(method, url, **options | {"timeout": REQUEST_TIMEOUT_S, "allow_redirects": False})

    credentials = api_key.Credentials(key)
    # If Google refuses the key, do not send the request again: an API key, unlike a token, can't be refreshed.
    session = Session(credentials, max_refresh_attempts=0)
    return translate_v2.Client(credentials=credentials, _http=session, client_options={"api_endpoint": endpoint})
