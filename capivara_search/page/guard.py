"""Protect the page: who may ask, how much a request may send, how long it may take, and how many connections there are.

Example:
    app = RequestGuard(app, list_allowed_hosts("127.0.0.1"), behind_proxy=False)
    uvicorn.Config(app, http=LimitedHttpProtocol, backlog=BACKLOG)
    answer = await QuestionQueue().ask(lambda: index.search("um gato"))

A question is a POST request. Its body is a line of JSON, followed by the bytes of a picture or by nothing.
"""

import asyncio
import ipaddress
import logging
import re
import resource
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

from capivara_search.messages import localized_error

MAX_UPLOAD_BYTES = 20_000_000  # of a picture; photographs of phones have under 15 MB
MAX_QUESTION_BYTES = 200_000  # of the line of JSON; a usual question has under 10 kB
MAX_LARGE_BODIES = 8  # bodies above MAX_QUESTION_BYTES that are in memory until they are answered; others wait
BODY_SLOT_TIMEOUT_S = 30  # wait of a large body for one of these slots
BODY_TIMEOUT_S = 30  # to receive a body; the page shrinks large pictures before it sends them
HEADER_TIMEOUT_S = 10  # to receive the headers of a request, on a new connection or after an answer
READ_TIMEOUT_S = 60  # for a visitor to read the buffered part of an answer: 64 to 320 KiB, plus the system's buffer
MAX_CONNECTIONS = 400
RESERVED_DESCRIPTORS = 128  # file descriptors of the index, the model and connections that were just accepted
BACKLOG = 64  # connections that the system accepts before asyncio handles the first of them
QUESTION_TIMEOUT_S = 20  # for one question, which usually takes well under 1 s; then the next question is answered
QUEUE_TIMEOUT_S = 30  # wait of a question for its turn
MAX_QUEUED_QUESTIONS = 64  # including the one that is being answered; further questions are refused at once
MAX_ABANDONED_THREADS = 3  # of questions that took too long and still run, because a thread can't be ended
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors "
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Other websites can neither show a picture of this page nor find out by trying which paths exist.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

logger = logging.getLogger("capivara")


class RequestRefusedError(ValueError):
    """A request that is not answered.

    Args:
        code: Code of the reason; `page/words` has its text under `errors`.
        status: HTTP status of the response.
        **values: Values of the placeholders of the text.
    """

    def __init__(self, code: str, status: int = 400, **values: object):
        super().__init__(code)
        self.code, self.status, self.values = code, status, values


class RequestGuard:
    """ASGI middleware that validates the Host and Origin headers and adds security headers to every response.

    A request with an unknown Host header is refused. This prevents DNS rebinding: otherwise a foreign website whose own
    name resolves to this machine could read the pictures. `X-Forwarded-Host` is trusted only if `behind_proxy` is set
    and its value is in `hosts`.

    Args:
        app: Application that answers the valid requests.
        hosts: Names and addresses that the page answers to; "*" allows all.
        behind_proxy: Whether the page is open to other machines, and so may be behind a proxy, for example as a
            Hugging Face Space, whose site may then show it in a frame.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], behind_proxy: bool):
        self.app, self.hosts, self.behind_proxy = app, hosts, behind_proxy
        frame_ancestors = "'self' https://huggingface.co" if behind_proxy else "'none'"
        self._content_security_policy = CONTENT_SECURITY_POLICY + frame_ancestors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with an HTTP status and a code.

        Args:
            scope: ASGI scope of the request.
            receive: ASGI function that returns the parts of the request.
            send: ASGI function that sends the parts of the response.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
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
            await self.app(scope, receive, send_guarded)
            return
        except ClientDisconnect:  # there is nobody to answer
            return
        except RequestRefusedError as error:
            refusal = error
        except Exception:
            logger.exception("A request to %s has failed.", scope["path"])
            refusal = RequestRefusedError("failed", 500)
        if not started:  # otherwise a part of another response was sent already
            answer = JSONResponse({"error": refusal.code, "values": refusal.values}, refusal.status)
            await answer(scope, receive, send_guarded)

    def _is_allowed_host(self, host: str) -> bool:
        return "*" in self.hosts or parse_host(host) in self.hosts

    def _check_host(self, scope: Scope) -> None:
        """Raise RequestRefusedError if the Host header has neither an allowed name nor this machine's address."""
        host = Headers(scope=scope).get("host", "")
        address = (scope.get("server") or ("",))[0]  # address of this machine that the visitor has connected to
        if not self._is_allowed_host(host) and (not host or parse_host(host) != address):
            raise RequestRefusedError("unknown_host", 400, host=host, flag=f"--allow-host {parse_host(host)}")

    def _check_origin(self, scope: Scope) -> None:
        """Raise RequestRefusedError if another website makes the request. It may only link to the page."""
        headers = Headers(scope=scope)
        forwarded = headers.get("x-forwarded-host", "") if self.behind_proxy else ""
        hosts = {host.strip().lower() for host in forwarded.split(",") if self._is_allowed_host(host.strip())}
        hosts.add(headers.get("host", "").strip().lower())
        if any(origin.partition("://")[2].lower() not in hosts for origin in headers.getlist("origin")):
            raise RequestRefusedError("foreign", 403)
        # Browsers send no Origin header for a picture that another website embeds, but they send Sec-Fetch-Site.
        if scope["path"] != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise RequestRefusedError("foreign", 403)


@asynccontextmanager
async def acquire_slot(slots: asyncio.Semaphore, seconds: float) -> AsyncIterator[None]:
    """Hold a slot of a semaphore while the block runs.

    Args:
        slots: The semaphore.
        seconds: Time to wait for a free slot.

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
async def receive_body(request: Request, slots: asyncio.Semaphore) -> AsyncIterator[bytearray]:
    """Receive the body of a question. A large body holds a slot while the block answers the question.

    Args:
        request: The request.
        slots: Semaphore that limits the large bodies in memory.

    Yields:
        The body.

    Raises:
        RequestRefusedError: If the body has no stated length, is too large or comes too slowly, or if no slot becomes
            free in time.
    """
    length = request.headers.get("content-length", "")  # uvicorn does not read beyond this length
    if "transfer-encoding" in request.headers or not length.isdecimal():
        raise RequestRefusedError("no_length", 411)
    if int(length) > MAX_UPLOAD_BYTES + MAX_QUESTION_BYTES:
        raise RequestRefusedError("too_large", 413, megabytes=MAX_UPLOAD_BYTES // 1_000_000)
    async with acquire_slot(slots, BODY_SLOT_TIMEOUT_S) if int(length) > MAX_QUESTION_BYTES else nullcontext():
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _read_body(request)
        except TimeoutError:
            raise RequestRefusedError("slow_upload", 408) from None
        yield body


async def _read_body(request: Request) -> bytearray:
    """Receive a body. Raise RequestRefusedError if its line of JSON is longer than `MAX_QUESTION_BYTES`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_QUESTION_BYTES and body.find(b"\n", 0, MAX_QUESTION_BYTES + 1) < 0:
            raise RequestRefusedError("long_question", 413, kilobytes=MAX_QUESTION_BYTES // 1000)
    return body


class LimitedHttpProtocol(H11Protocol):
    """HTTP protocol of uvicorn with a connection limit, and with deadlines for visitors who do not send or read.

    At the limit, the connection that has waited longest for its visitor is closed: for the headers of a request, or for
    the visitor to read an answer. If new connections were refused instead, a visitor who holds all connections could
    keep everybody else out. Without a limit, the process would run out of file descriptors.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Accept a connection; at the limit, close another one."""
        super().connection_made(transport)
        self._restart_deadline()
        if len(self.connections) > connection_limit():
            waiting = (connection for connection in self.connections if connection.is_waiting())
            longest = min(waiting, key=lambda connection: connection._waiting_since)
            self.connections.discard(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline of a closed connection, which would keep this object in memory."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the deadline for the next request when a response is complete."""
        self._restart_deadline()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the deadline for reading when the buffer for the visitor is full."""
        super().pause_writing()
        self._restart_deadline()

    def resume_writing(self) -> None:
        """Restart the deadline when the visitor has read most of the buffer."""
        super().resume_writing()
        self._restart_deadline()

    def is_waiting(self) -> bool:
        """Return whether the visitor must act next: send a request, or read an answer."""
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


def connection_limit() -> int:
    """Return how many connections the page accepts, from 1 to `MAX_CONNECTIONS`.

    A download needs two file descriptors, and the process needs `RESERVED_DESCRIPTORS` for everything else.
    """
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (descriptors - RESERVED_DESCRIPTORS) // 2))


def list_allowed_hosts(host: str, extra_hosts: Sequence[str] = ()) -> list[str]:
    """Return the names and addresses that the page answers to.

    Args:
        host: Address that the page is bound to. For 0.0.0.0 and ::, the name of this machine is allowed, too.
        extra_hosts: Further names of this machine or of a proxy before it; "*" allows all names.

    Returns:
        Distinct lowercase names and addresses; those of the local machine (localhost, 127.0.0.1, ::1) come first.

    Raises:
        ValueError: If a value of `extra_hosts` is neither a name nor an address.
    """
    names = ["localhost", "127.0.0.1", "::1", host.lower()]
    names += [name if name == "*" else parse_host(name) for name in extra_hosts]
    if "" in names:
        invalid_hosts = (name for name in extra_hosts if name != "*" and not parse_host(name))
        raise localized_error(ValueError, "bad_host", value=", ".join(invalid_hosts))
    if host in ("0.0.0.0", "::"):
        machine = socket.gethostname().lower()
        names += [
            machine,
            f"{machine.partition('.')[0]}.local",
        ]  # NAME.local is the name in networks without DNS (mDNS)
    return list(dict.fromkeys(names))


def parse_host(host: str) -> str:
    """Return the lowercase name or address in a Host header, without the port; "" if the header is invalid."""
    with suppress(ValueError):  # an IPv6 address without brackets, as people write it
        return str(ipaddress.IPv6Address(host))
    with suppress(ValueError):
        parts = urlsplit(f"//{host}")
        if not (parts.path or parts.query or parts.fragment or re.search(r"[@*\s]", host)):
            return parts.hostname or ""
    return ""


class QuestionQueue:
    """Answer questions one at a time, because tokenizers must not be used by two threads at once.

    Each question runs in a thread of its own. If it takes too long, it is refused and its thread is abandoned.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._queued_count = self._abandoned_count = 0

    async def ask(self, question: Callable[[], Any], seconds: float | None = None) -> Any:
        """Wait for the turn of a question and answer it.

        Args:
            question: Function that computes the answer.
            seconds: Time for the answer, without the wait for its turn; None for `QUESTION_TIMEOUT_S`.

        Returns:
            What `question` returns.

        Raises:
            RequestRefusedError: If `MAX_QUEUED_QUESTIONS` are waiting, `MAX_ABANDONED_THREADS` still run, the turn does
                not come within `QUEUE_TIMEOUT_S` ("busy"), or the answer takes too long ("too_slow").
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
            async with acquire_slot(self._turn, QUEUE_TIMEOUT_S):
                waiter = asyncio.wrap_future(answer)
                # A daemon thread instead of a thread pool: Python would wait for the threads of a pool when it exits.
                threading.Thread(target=run_question, daemon=True).start()
                if (await asyncio.wait([waiter], timeout=seconds or QUESTION_TIMEOUT_S))[0]:
                    return waiter.result()
        finally:
            self._queued_count -= 1
        self._abandoned_count += 1
        waiter.add_done_callback(self._release_abandoned)
        raise RequestRefusedError("too_slow", 503)

    def _release_abandoned(self, answered: asyncio.Future) -> None:
        answered.exception()  # asyncio would log an exception that nobody has retrieved
        self._abandoned_count -= 1
