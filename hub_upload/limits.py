"""Limits for a push: its calls end within a deadline, and no redirect leads to another host."""

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants

TIMEOUT_S = 300  # of silence; the client's own is none, and a line that died would hold a run for ever
DEADLINE_HOURS = 12.0  # of a push as a whole: 1.5 GB take 3.5 hours on a line of 1 Mbit/s
CHECKPOINT_HOURS = 1.0  # the training waits
GRACE_S = 60.0  # to end by itself, after which a program ends itself
WAITS = ("connect_tcp", "start_tls", "read", "write")  # of a connection
TIME_UP = (
    "The push has not ended in the time that it has (--deadline_hours, 12 if not given). Run the same command again: "
    "files that have arrived are not sent a second time."
)
_ends = math.inf  # on the clock of time.monotonic


@contextmanager
def time_limit(hours: float) -> Iterator[None]:
    """Within it no call to the Hub lasts beyond the limit, however slowly the server answers: it raises OSError."""
    global _ends
    before, _ends = _ends, min(_ends, time.monotonic() + 3600 * hours)
    try:
        yield
    finally:
        _ends = before


@contextmanager
def program_limit(hours: float) -> Iterator[None]:
    """As `time_limit`, for a program of its own: it is ended even where Xet waits, which knows no limit."""

    def end() -> None:
        print(f"\nerror: {TIME_UP}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of the client would be waited for

    timer = threading.Timer(3600 * hours + GRACE_S, end)
    timer.daemon = True
    timer.start()
    try:
        with time_limit(hours):
            yield
    finally:
        timer.cancel()


def limit(client: Any) -> None:
    """Give a client of the Hub the time limits, and refuse redirects to other hosts."""
    client.timeout = TIMEOUT_S
    if _check_redirect in client.event_hooks["response"]:
        return
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks["response"], _check_redirect]}
    for transport in (client._transport, *client._mounts.values()):  # the latter of proxies
        if pool := getattr(transport, "_pool", None):
            # Its own limits are of one wait; a letter in a while would be waited for without end.
            pool._network_backend = _Limited(pool._network_backend)


class _Limited:
    """A connection, or a factory of connections, whose waits end at the deadline of the push."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return (lambda *args, **options: self._limited(found, args, options)) if name in WAITS else found

    def _limited(self, call: Any, args: tuple, options: dict[str, Any]) -> Any:
        left = _ends - time.monotonic()
        if left <= 0:
            raise OSError(TIME_UP)
        if left < math.inf:
            options["timeout"] = min(left, options.get("timeout") or math.inf)
        result = call(*args, **options)
        return _Limited(result) if hasattr(result, "start_tls") else result


def _check_redirect(response: Any) -> None:
    """Raise OSError where a request, or an answer that is relied on, would go to another host than the Hub."""
    if _ends == math.inf or not response.has_redirect_location:
        return
    call, url = response.request.method, response.request.url
    where, reads = url.join(response.headers["location"]), call in ("GET", "HEAD")
    keeps_call = reads or (call != "PUT" and response.status_code in (307, 308))
    is_near = where.netloc == url.netloc or (reads and "/resolve/" in url.path)  # files lie in a store of their own
    if not keeps_call or not is_near or where.scheme not in ("http", "https"):
        raise OSError(
            f"{call} {url.path} was answered by a redirect ({response.status_code}) to {where.scheme}://{where.host}, "
            f"which is not followed. Does a proxy or a log-in page answer in place of {constants.ENDPOINT}? Check "
            "HF_ENDPOINT and the network, then run the same command again."
        )
