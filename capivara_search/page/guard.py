"""Protect the server of the search page: check the Host headers of requests, and limit requests and connections.

Example:
    app = RequestGuard(app, list_allowed_hosts("127.0.0.1"), behind_proxy=False)  # refuses requests to other hosts
    uvicorn.Config(app, http=LimitedHttpProtocol, backlog=BACKLOG)  # limits connections
    answer = await QuestionQueue().ask(lambda: index.search("um gato"))  # answers one question at a time

A question is a POST request of the page, such as a search. Its body is a line of JSON, optionally followed by the bytes
of an uploaded picture.
"""

import asyncio
import ipaddress
import logging
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from capivara_common.interrupt import NATIVE_THREAD_NAME
from capivara_search.messages import make_error_from_code

try:
    import resource
except ImportError:  # the module exists only on Unix
    resource = None

MAX_UPLOAD_BYTES = 20_000_000  # limit for an uploaded picture; photos from phones have less than 15 MB
MAX_QUESTION_BYTES = 200_000  # limit for the JSON of a question, which usually has less than 10 kB
# Request bodies above MAX_QUESTION_BYTES contain uploaded pictures. At most this many of these large bodies are in
# memory at once (about 160 MB); further requests wait.
MAX_LARGE_BODIES = 8
BODY_SLOT_TIMEOUT_S = 30  # seconds that a large body waits while `MAX_LARGE_BODIES` other large bodies are in memory
BODY_TIMEOUT_S = 30  # seconds to receive a body; enough, because the page shrinks large pictures before it sends them
# Seconds to receive the headers of a request, counted from the start of the connection or from the end of the previous
# response. Without this limit, a client that sends nothing would occupy a connection forever.
HEADER_TIMEOUT_S = 10
# Seconds in which a client must read the part of a response that the server has buffered (64 to 320 KiB, plus the
# buffer of the operating system). Slower clients are disconnected.
READ_TIMEOUT_S = 60
MAX_CONNECTIONS = 400
# The operating system limits the number of file descriptors of a process, and each connection needs one or two. This
# many file descriptors are reserved for the index, the model and connections that were just accepted.
RESERVED_DESCRIPTORS = 128
BACKLOG = 64  # new connections that the operating system holds until the server accepts them
QUESTION_TIMEOUT_S = 20  # seconds to answer a question; usually, well under 1 s suffices
QUEUE_TIMEOUT_S = 30  # seconds that a question waits for its turn, because questions are answered one at a time
MAX_QUEUED_QUESTIONS = 64  # including the question that is being answered; further questions are refused at once
# A thread can't be stopped, so it continues to run after its question has timed out. If this many such threads are
# running, new questions are refused. Otherwise more and more threads could use up the CPU and the memory.
MAX_ABANDONED_THREADS = 3
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors "
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Without these two headers, other websites could embed pictures of this page and find out which paths exist.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

logger = logging.getLogger("capivara")


class RequestRefusedError(ValueError):
    """Error for a request that the server refuses to answer.

    Args:
        code: Code of the reason, such as "busy". The JSON files in `page/words` have its text under `errors`.
        status: HTTP status of the response.
        **values: Values of the placeholders in the text.
    """

    def __init__(self, code: str, status: int = 400, **values: object):
        super().__init__(code)
        self.code, self.status, self.values = code, status, values


class RequestGuard:
    """ASGI middleware that validates the Host and Origin headers and adds security headers to every response.

    A request with an unknown Host header is refused, which prevents DNS rebinding.

    Args:
        app: ASGI application that answers the valid requests.
        hosts: Allowed host names and addresses. "*" allows all of them.
        behind_proxy: Whether a proxy may forward the requests, as on a Hugging Face Space. If so, an `X-Forwarded-Host`
            that is in `hosts` counts as a valid origin, and huggingface.co may show the page in a frame.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], behind_proxy: bool):
        # The server passes `behind_proxy=True` if other machines can reach the page.
        self.app, self.hosts, self.behind_proxy = app, hosts, behind_proxy
        frame_ancestors = "'self' https://huggingface.co" if behind_proxy else "'none'"
        self._content_security_policy = CONTENT_SECURITY_POLICY + frame_ancestors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with an HTTP status and the code of the reason in JSON.

        Args:
            scope: ASGI scope of the request.
            receive: ASGI function that returns the parts of the request.
            send: ASGI function that sends the parts of the response.
        """
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS | {"Content-Security-Policy": self._content_security_policy})
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._check_host(scope)
            self._check_origin(scope)
            return await self.app(scope, receive, send_guarded)
        except ClientDisconnect:
            # The client has closed the connection, so nobody would receive a response.
            return
        except RequestRefusedError as error:
            refusal = error
        except Exception:
            logger.exception("A request to %s has failed.", scope["path"])
            refusal = RequestRefusedError("failed", 500)
        if not started:  # after the start of a response, no other response can be sent
            answer = JSONResponse({"error": refusal.code, "values": refusal.values}, refusal.status)
            await answer(scope, receive, send_guarded)

    def _is_allowed_host(self, host: str) -> bool:
        return "*" in self.hosts or _parse_host_name(host) in self.hosts

    def _check_host(self, scope: Scope) -> None:
        """Check the Host header of a request.

        Args:
            scope: ASGI scope of the request.

        Raises:
            RequestRefusedError: If the host is neither in `hosts` nor the address of this machine to which the client
                is connected.
        """
        # Without this check, another website could let its own name resolve to this machine and then read the pictures.
        host = Headers(scope=scope).get("host", "")
        address = (scope.get("server") or ("",))[0]  # the address of this machine to which the client has connected
        if not self._is_allowed_host(host) and (not host or _parse_host_name(host) != address):
            raise RequestRefusedError("unknown_host", 400, host=host, flag=f"--allow-host {_parse_host_name(host)}")

    def _check_origin(self, scope: Scope) -> None:
        """Check that no other website makes the request. Other websites are only allowed to link to the path "/".

        Args:
            scope: ASGI scope of the request.

        Raises:
            RequestRefusedError: If the Origin or Sec-Fetch-Site header names another website.
        """
        headers = Headers(scope=scope)
        forwarded = headers.get("x-forwarded-host", "") if self.behind_proxy else ""
        hosts = {host.strip().lower() for host in forwarded.split(",") if self._is_allowed_host(host.strip())}
        hosts.add(headers.get("host", "").strip().lower())
        if any(origin.partition("://")[2].lower() not in hosts for origin in headers.getlist("origin")):
            raise RequestRefusedError("foreign", 403)
        # Browsers send no Origin header when another website embeds a picture of this page, but the header
        # Sec-Fetch-Site shows that the request comes from another website.
        if scope["path"] != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise RequestRefusedError("foreign", 403)


@asynccontextmanager
async def _acquire_slot(slots: asyncio.Semaphore, seconds: float) -> AsyncIterator[None]:
    """Acquire a slot of a semaphore, and release it when the block ends.

    Args:
        slots: The semaphore.
        seconds: Maximum time to wait for a free slot.

    Yields:
        None.

    Raises:
        RequestRefusedError: If no slot becomes free in time ("busy").
    """
    try:
        async with asyncio.timeout(seconds):
            await slots.acquire()
    except TimeoutError:
        raise RequestRefusedError("busy", 503) from None
    try:
        yield
    finally:
        slots.release()


@asynccontextmanager
async def receive_request_body_within_limits(request: Request, slots: asyncio.Semaphore) -> AsyncIterator[bytearray]:
    """Receive the body of a POST request within limits of size and time, as an async context manager.

    A body above `MAX_QUESTION_BYTES` waits for a slot of `slots`, and occupies it until the block ends.

    Args:
        request: The request.
        slots: Semaphore that limits the number of large bodies in memory.

    Yields:
        The body.

    Raises:
        RequestRefusedError: If the request does not state the length of the body, or the body is too large, is received
            too slowly, or gets no slot in time.
    """
    # Number of bytes in the body. uvicorn does not read more bytes than this, even if the client sends more.
    length = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or not length.isdecimal():
        raise RequestRefusedError("no_length", 411)
    if int(length) > MAX_UPLOAD_BYTES + MAX_QUESTION_BYTES:
        raise RequestRefusedError("too_large", 413, megabytes=MAX_UPLOAD_BYTES // 1_000_000)
    async with _acquire_slot(slots, BODY_SLOT_TIMEOUT_S) if int(length) > MAX_QUESTION_BYTES else nullcontext():
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _read_body(request)
        except TimeoutError:
            raise RequestRefusedError("slow_upload", 408) from None
        yield body


async def _read_body(request: Request) -> bytearray:
    """Receive the body of a request.

    Raises:
        RequestRefusedError: If the first line of the body, which is JSON, is longer than `MAX_QUESTION_BYTES`.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_QUESTION_BYTES and body.find(b"\n", 0, MAX_QUESTION_BYTES + 1) < 0:
            raise RequestRefusedError("long_question", 413, kilobytes=MAX_QUESTION_BYTES // 1000)
    return body


class LimitedHttpProtocol(H11Protocol):
    """HTTP protocol of uvicorn with a connection limit, and with deadlines for clients that do not send or read data.

    At the limit, the server closes the connection that has waited longest for its client, either to send the headers of
    a request or to read a response.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Accept a connection. If the limit is exceeded, close the connection that has waited longest.

        Args:
            transport: Transport of the new connection.
        """
        super().connection_made(transport)
        self._restart_deadline()
        if len(self.connections) > compute_connection_limit():
            # If new connections were refused instead, a single client could open all connections and lock out all other
            # clients. Without a limit, the process would run out of file descriptors.
            waiting = (connection for connection in self.connections if connection.is_waiting())
            longest = min(waiting, key=lambda connection: connection._waiting_since)
            self.connections.discard(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline of a closed connection, because its timer would keep this object in memory.

        Args:
            exc: Error that closed the connection; None if it was closed normally.
        """
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the deadline for the headers of the next request. uvicorn calls this when a response is complete."""
        self._restart_deadline()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the deadline for reading the response. asyncio calls this when the send buffer is full."""
        super().pause_writing()
        self._restart_deadline()

    def resume_writing(self) -> None:
        """Restart the deadline for reading. asyncio calls this when the client has read most of the send buffer."""
        super().resume_writing()
        self._restart_deadline()

    def is_waiting(self) -> bool:
        """Return whether the server is waiting for the client, either to send a request or to read a response."""
        return self.flow.write_paused or self.cycle is None or self.cycle.response_complete

    def _restart_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._waiting_since = self.loop.time()
        seconds = READ_TIMEOUT_S if self.transport.get_write_buffer_size() else HEADER_TIMEOUT_S
        self._deadline = self.loop.call_later(seconds, self._close_if_waiting)

    def _close_if_waiting(self) -> None:
        if self.is_waiting():
            self.transport.abort()


def compute_connection_limit() -> int:
    """Return the maximum number of connections that the server keeps open at once, from 1 to `MAX_CONNECTIONS`.

    The number depends on how many files the process is allowed to open. On Windows, it is always `MAX_CONNECTIONS`.
    """
    # Windows has no module `resource`, and allows thousands of open files. A connection that downloads a picture needs
    # two file descriptors.
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else None
    if descriptors is None or descriptors == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (descriptors - RESERVED_DESCRIPTORS) // 2))


def list_allowed_hosts(host: str, extra_hosts: Sequence[str] = ()) -> list[str]:
    """Return the host names and addresses that are allowed in the Host header of requests.

    Args:
        host: Address that the server listens on. For 0.0.0.0 and ::, the name of this machine is allowed, too.
        extra_hosts: Further names of this machine or of a proxy in front of it. "*" allows all names.

    Returns:
        Distinct lowercase names and addresses, beginning with localhost, 127.0.0.1 and ::1.

    Raises:
        ValueError: If a value of `extra_hosts` is neither a name nor an address.
    """
    names = ["localhost", "127.0.0.1", "::1", host.lower()]
    names += [name if name == "*" else _parse_host_name(name) for name in extra_hosts]
    if "" in names:
        invalid_hosts = (name for name in extra_hosts if name != "*" and not _parse_host_name(name))
        raise make_error_from_code(ValueError, "bad_host", value=", ".join(invalid_hosts))
    if host in ("0.0.0.0", "::"):
        machine = socket.gethostname().lower()
        # In a home network without a DNS server, other machines reach this machine as NAME.local (multicast DNS).
        names += [machine, f"{machine.partition('.')[0]}.local"]
    return list(dict.fromkeys(names))


def _parse_host_name(host: str) -> str:
    """Extract the host name or address from the value of a Host header.

    Args:
        host: Value of the header, such as "Fotos.local:7860".

    Returns:
        The name or address in lowercase, without the port; "" if the value is invalid.
    """
    # First try whether the value is an IPv6 address without brackets, such as ::1. `urlsplit` below would take the
    # text after its first colon for a port.
    with suppress(ValueError):
        return str(ipaddress.IPv6Address(host))
    with suppress(ValueError):
        parts = urlsplit(f"//{host}")
        if not (parts.path or parts.query or parts.fragment or re.search(r"[@*\s]", host)):
            return parts.hostname or ""
    return ""


class QuestionQueue:
    """Queue that answers questions (POST requests of the page) one at a time, each in a new thread.

    If an answer takes too long, its request is refused, and the next question begins. The thread of the refused request
    continues to run, but its result is ignored. If `MAX_ABANDONED_THREADS` such threads are running, new questions are
    refused.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)  # one question at a time, because two threads should not share a tokenizer
        self._queued_count = self._abandoned_count = 0

    async def ask(self, question: Callable[[], Any], seconds: float | None = None) -> Any:
        """Wait for the turn of a question, then compute its answer in a new thread.

        Args:
            question: Function that computes the answer.
            seconds: Time limit for the answer, without the time in the queue; None for `QUESTION_TIMEOUT_S`.

        Returns:
            The return value of `question`.

        Raises:
            RequestRefusedError: With the code "too_slow" if the answer exceeds the time limit. With the code "busy" if
                the queue is full, the wait exceeds `QUEUE_TIMEOUT_S` seconds, or too many earlier questions that
                exceeded their limit are still running.
        """
        if self._abandoned_count >= MAX_ABANDONED_THREADS or self._queued_count >= MAX_QUEUED_QUESTIONS:
            raise RequestRefusedError("busy", 503)
        answer: Future[Any] = Future()

        def run_question() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        self._queued_count += 1
        try:
            async with _acquire_slot(self._turn, QUEUE_TIMEOUT_S):
                waiter = asyncio.wrap_future(answer)
                # Python waits for all threads of a pool when it exits, so a question that takes forever would keep the
                # server from ending. It does not wait for a daemon thread.
                threading.Thread(target=run_question, name=NATIVE_THREAD_NAME, daemon=True).start()
                if (await asyncio.wait([waiter], timeout=seconds or QUESTION_TIMEOUT_S))[0]:
                    return waiter.result()
        finally:
            self._queued_count -= 1
        self._abandoned_count += 1
        waiter.add_done_callback(self._release_abandoned)
        raise RequestRefusedError("too_slow", 503)

    def _release_abandoned(self, answered: asyncio.Future) -> None:
        answered.exception()  # marks the exception as retrieved; otherwise asyncio would log it
        self._abandoned_count -= 1
