"""Define how translators and captioners call HTTP services: when to retry, and which addresses and API keys are valid.

`Retries` decides whether and when a failed request is repeated. The caller sends the requests and waits:

    retries = Retries("Google")
    while True:
        try:
            return send()
        except Exception as error:
            failure = describe(error)
        time.sleep(retries.seconds_before_next(failure))  # raises an error if there is no next attempt
"""

import random
import re
import time
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

# Largest number of attempts per request. The time between attempts doubles each time, with a random factor.
MAX_TRIES = 8
# First and longest time between two attempts, in seconds, before the random factor. One minute is long enough, because
# most services limit the requests per minute (for Google, see cloud.google.com/translate/quotas).
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0
MAX_RETRY_AFTER_S = 600.0  # upper limit in seconds for the wait that a service requests in the header Retry-After
RETRYABLE_STATUS_CODES = {408, 429, 500, 502, 503, 504}  # HTTP status codes of failures that may be temporary
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")  # names of this machine; calls to it may be unencrypted


@dataclass(frozen=True)
class Failure:
    """Why a request to an HTTP service failed, and whether the request may be repeated.

    Attributes:
        reason: Explanation that does not contain the API key.
        is_temporary: True if the same request may succeed later.
        retry_after_s: Seconds after which the service asks to repeat the request; None if it does not say.
    """

    reason: str
    is_temporary: bool
    retry_after_s: float | None = None


# This class does not send requests or wait, so that synchronous and asynchronous clients can use it.
class Retries:
    """Retry policy of one request to an HTTP service: decides whether and when a failed request is sent again.

    Args:
        service: Name of the service. Error messages begin with it.
        advice: What the user should check if the service refuses the request; part of the error message.
        max_tries: Largest number of attempts. Default: `MAX_TRIES`.
    """

    def __init__(self, service: str, advice: str = "", max_tries: int | None = None):
        self.service, self.advice, self.failed = service, advice, 0
        self.max_tries = MAX_TRIES if max_tries is None else max_tries

    def seconds_before_next(self, failure: Failure) -> float:
        """Count a failed attempt, and return how many seconds to wait before the next attempt.

        The time doubles with each attempt, from `FIRST_WAIT_S` to `MAX_WAIT_S`, with a random factor from 0.5 to 1. If
        the service asks for a longer time, this time is returned, up to `MAX_RETRY_AFTER_S`.

        Args:
            failure: Why the attempt failed.

        Raises:
            ValueError: If the failure is not temporary.
            ConnectionError: If the request has failed `max_tries` times.
        """
        self.failed += 1
        if not failure.is_temporary:
            advice = f" {self.advice}" if self.advice else ""
            raise ValueError(f"{self.service} refuses the request.{advice} Reason: {failure.reason}")
        if self.failed >= self.max_tries:
            reason = failure.reason.rstrip(".")
            raise ConnectionError(
                f"{self.service} has failed {self.failed} times. The last reason: {reason}. All finished work is "
                "saved; run the same command again to continue."
            )
        wait = min(FIRST_WAIT_S * 2 ** (self.failed - 1), MAX_WAIT_S) * random.uniform(0.5, 1.0)
        return max(wait, min(failure.retry_after_s or 0, MAX_RETRY_AFTER_S))


def parse_retry_after(value: str | None) -> float | None:
    """Parse the HTTP header Retry-After, with which a service says when to repeat a request.

    Args:
        value: Value of the header: a number of seconds, or a date. None if the header is missing.

    Returns:
        The time to wait in seconds. None if the header is missing or invalid.
    """
    with suppress(ValueError):
        return float(value or "")
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    return None


def hide_key(text: str, key: str) -> str:
    """Replace an API key in a text by "<key>", so that messages do not reveal it.

    Percent-encoded forms of the key, and forms that are escaped as in `repr`, are replaced, too.

    Args:
        text: The text.
        key: The API key. If it is empty, the text does not change.
    """
    for form in filter(None, (key, urllib.parse.quote(key, safe=""), repr(key)[1:-1])):
        text = text.replace(form, "<key>")
    return text


def is_loopback(url: str) -> bool:
    """Return True if a URL leads to this machine, that is, if its host is localhost, 127.0.0.1 or ::1."""
    return urllib.parse.urlsplit(url).hostname in LOOPBACK_HOSTS


def check_service_url(url: str, name: str, allow_http: bool = False) -> None:
    """Check that the address of an HTTP service is valid, contains no key, and is encrypted or on this machine.

    Args:
        url: The address.
        name: Name of the flag that holds the address, for error messages.
        allow_http: Also accept unencrypted addresses (http) of other machines.

    Raises:
        ValueError: If the address is not a URL, contains a user name, a query or a fragment, or leads to another
            machine without encryption and `allow_http` is False.
    """
    parts = urllib.parse.urlsplit(url)
    # A user name, query or fragment may be secret, but addresses appear in logs. This error message does not show the
    # address, because it may contain an API key.
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            f"{name} must not contain a user name, a key or a query. Set API keys as environment variables instead."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} must be an address such as https://example.org, got {url!r}.")
    if parts.scheme == "http" and not (allow_http or is_loopback(url)):
        raise ValueError(f"{name} must begin with https://, to protect the key and the data, got {url!r}.")


def check_key(key: str, variable: str, purpose: str) -> None:
    """Check that an API key is set, and that it can be sent in an HTTP header.

    Args:
        key: The API key.
        variable: Name of the environment variable that holds the key.
        purpose: First words of the error message, for example "--backend google needs a key".

    Raises:
        ValueError: If the key is missing, or contains blanks or special characters. The message does not show the key.
    """
    if not re.fullmatch(r"[!-~]+", key):
        state = "contains blanks or special characters" if key else "is not set"
        raise ValueError(f"{purpose} in the environment variable {variable}, which {state}.")
