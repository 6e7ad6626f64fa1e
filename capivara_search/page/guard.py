"""What stands before the page: who may ask, with how much and in what time; nothing outside of this machine is fetched.

    app = Guard(app, allowed_hosts("127.0.0.1"), behind_proxy=False)
    uvicorn.Config(app, http=Connection, backlog=BACKLOG)
    answer = await Queue().ask(lambda: index.search("um gato"))

A question is a POST whose body is a line of JSON and, after it, the bytes of a picture or nothing.
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

MAX_UPLOAD_BYTES = 20_000_000  # of a picture; photographs of telephones have under 15 MB
MAX_QUESTION_BYTES = 200_000  # of its line of JSON; one has under 10 kB
MAX_LARGE_BODIES = 8  # bodies over MAX_QUESTION_BYTES in memory, until they are answered; others wait
BODY_SLOT_TIMEOUT_S = 30  # for one of these places
BODY_TIMEOUT_S = 30  # for a body; the page makes large pictures smaller before it sends them
HEADER_TIMEOUT_S = 10  # for the head of a request, of a new connection or after an answer
READ_TIMEOUT_S = 60  # for a visitor to read what is buffered for him: 64 KiB to 320 KiB, beside what the system holds
MAX_CONNECTIONS = 400
RESERVED_DESCRIPTORS = 128  # of the index, the model, and connections that were just accepted
BACKLOG = 64  # connections that are accepted at a time, before any of them is looked at
QUESTION_TIMEOUT_S = 20  # of a question, which takes well under 1 s; then it is given up, and the next one is answered
QUEUE_TIMEOUT_S = 30  # for the questions before it
MAX_QUEUED_QUESTIONS = 64  # questions in a queue, the current one included; others are refused at once
MAX_ABANDONED_THREADS = 3  # threads of questions that were given up and still run, as no thread can be ended
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors "
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Another page can neither show a picture of this one nor learn, by trying, which paths there are.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

logger = logging.getLogger("capivara")


class RequestRefusedError(ValueError):
    """A request that is not answered: code of the reason, whose text `page/words` has, status of HTTP, values of it."""

    def __init__(self, code: str, status: int = 400, **values: object):
        super().__init__(code)
        self.code, self.status, self.values = code, status, values


class RequestGuard:
    """ASGI middleware before all others: refuses what is not the page's, and puts its headers on every answer.

    The name of a host that a header says was asked of a proxy is believed only `behind_proxy`, and where it is one of
    `hosts`. A request by another name is refused: a foreign page whose own name resolves to this machine would pass for
    this one, and read the pictures.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], behind_proxy: bool):
        self.app, self.hosts, self.behind_proxy = app, hosts, behind_proxy
        self._content_security_policy = CONTENT_SECURITY_POLICY + (
            "'self' https://huggingface.co" if behind_proxy else "'none'"
        )  # which frames a Space

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with a status and a reason."""
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
        except ClientDisconnect:  # nobody is left to be answered
            return
        except RequestRefusedError as error:
            refusal = error
        except Exception:
            logger.exception("A request to %s has failed.", scope["path"])
            refusal = RequestRefusedError("failed", 500)
        if not started:  # the page has the words of its code in each language
            answer = JSONResponse({"error": refusal.code, "values": refusal.values}, refusal.status)
            await answer(scope, receive, send_guarded)

    def _is_allowed_host(self, host: str) -> bool:
        return "*" in self.hosts or parse_host(host) in self.hosts

    def _check_host(self, scope: Scope) -> None:
        """Raise Refusal where the page is asked for by a name that it does not have."""
        host = Headers(scope=scope).get("host", "")
        address = (scope.get("server") or ("",))[0]  # of this machine, to which the visitor has connected
        if not self._is_allowed_host(host) and (not host or parse_host(host) != address):
            raise RequestRefusedError("unknown_host", 400, host=host, flag=f"--allow-host {parse_host(host)}")

    def _check_origin(self, scope: Scope) -> None:
        """Raise Refusal where another page asks. It may only lead to this one, by a link."""
        headers = Headers(scope=scope)
        forwarded = headers.get("x-forwarded-host", "") if self.behind_proxy else ""
        hosts = {host.strip().lower() for host in forwarded.split(",") if self._is_allowed_host(host.strip())}
        hosts.add(headers.get("host", "").strip().lower())
        if any(origin.partition("://")[2].lower() not in hosts for origin in headers.getlist("origin")):
            raise RequestRefusedError("foreign", 403)
        if scope["path"] != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise RequestRefusedError("foreign", 403)  # a picture of this page in another one comes without an origin


@asynccontextmanager
async def acquire_slot(slots: asyncio.Semaphore, seconds: float) -> AsyncIterator[None]:
    """One of some places, for as long as it is needed. Raises Refusal where none is free in time."""
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
    """Receive the body of a question, and keep its place while it is answered if it is large. Raises Refusal."""
    length = request.headers.get("content-length", "")  # a server holds a body to that
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
    """Receive a body, and stop if its line of JSON exceeds `MAX_QUESTION_BYTES`. Raises Refusal."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_QUESTION_BYTES and body.find(b"\n", 0, MAX_QUESTION_BYTES + 1) < 0:
            raise RequestRefusedError("long_question", 413, kilobytes=MAX_QUESTION_BYTES // 1000)
    return body


class LimitedHttpProtocol(H11Protocol):
    """HTTP protocol of uvicorn with a connection limit and deadlines for visitors who neither ask nor read.

    At the limit, the connection that has waited longest for its visitor is closed: for the head of a request, or for
    the visitor to read an answer. If new connections were refused instead, whoever holds all of them could keep
    everybody out; if all were accepted, file descriptors would run out.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Accept a connection; at the limit, close another one."""
        super().connection_made(transport)
        self._restart_deadline()
        if len(self.connections) > connection_limit():
            longest = min((one for one in self.connections if one.is_waiting()), key=lambda one: one._since)
            self.connections.discard(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._deadline is not None:
            self._deadline.cancel()  # it would keep this object in memory for its time
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._restart_deadline()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait for the visitor to read."""
        super().pause_writing()
        self._restart_deadline()

    def resume_writing(self) -> None:
        """Wait anew, because the visitor has read most of what was buffered."""
        super().resume_writing()
        self._restart_deadline()

    def is_waiting(self) -> bool:
        """Whether the visitor has to act: no request has come since the last answer, or an answer is not read."""
        return self.flow.write_paused or self.cycle is None or self.cycle.response_complete

    def _restart_deadline(self) -> None:
        """Start the deadline again."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._waiting_since = self.loop.time()
        seconds = READ_TIMEOUT_S if self.transport.get_write_buffer_size() else HEADER_TIMEOUT_S
        self._deadline = self.loop.call_later(seconds, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.is_waiting():
            self.transport.abort()


def connection_limit() -> int:
    """How many there may be: a download takes two descriptors, and the process needs some beside."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else (limit - RESERVED_DESCRIPTORS) // 2
    return max(1, min(MAX_CONNECTIONS, most))


def list_allowed_hosts(host: str, extra_hosts: Sequence[str] = ()) -> list[str]:
    """The names that a page answers to, beside the addresses of this machine: those of `host`, which it is bound to.

    Raises ValueError where one of `more`, other names of the machine or of a proxy before it or "*" for any, is none.
    """
    own = ["localhost", "127.0.0.1", "::1", host.lower()]
    names = own + [name if name == "*" else parse_host(name) for name in extra_hosts]
    if "" in names:
        wrong = (name for name in extra_hosts if name != "*" and not parse_host(name))
        raise localized_error(ValueError, "bad_host", value=", ".join(wrong))
    if host in ("0.0.0.0", "::"):
        machine = socket.gethostname().lower()
        names += [machine, f"{machine.partition('.')[0]}.local"]  # as a network without a server of names finds it
    return list(dict.fromkeys(names))


def parse_host(host: str) -> str:
    """The name or address in a Host header, without its port; "" where there is none."""
    with suppress(ValueError):  # an address of IPv6 as people write it
        return str(ipaddress.IPv6Address(host))
    with suppress(ValueError):
        parts = urlsplit(f"//{host}")
        if not (parts.path or parts.query or parts.fragment or re.search(r"[@*\s]", host)):
            return parts.hostname or ""
    return ""


class QuestionQueue:
    """Questions one after another, each within a stated time: tokenizers are no good in two threads at once.

    A question is answered in a thread that is left to itself where it takes too long.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._queued_count = self._abandoned_count = 0

    async def ask(self, question: Callable[[], Any], seconds: float | None = None) -> Any:
        """The answer to a question, when its turn has come; it is given up after `seconds`, or else `QUERY_S`.

        Raises Refusal where `MAX_ASKED` are here already, its turn does not come within `WAIT_S`, or it took too long.
        """
        if self._abandoned_count >= MAX_ABANDONED_THREADS or self._queued_count >= MAX_QUEUED_QUESTIONS:
            raise RequestRefusedError("busy", 503)
        answer: Future[Any] = Future()

        def work() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        self._queued_count += 1
        try:
            async with acquire_slot(self._turn, QUEUE_TIMEOUT_S):
                waited = asyncio.wrap_future(answer)
                # A thread of its own, which, unlike those of a pool, no end of a process awaits.
                threading.Thread(target=work, daemon=True).start()
                if (await asyncio.wait([waited], timeout=seconds or QUESTION_TIMEOUT_S))[0]:
                    return waited.result()
        finally:
            self._queued_count -= 1
        self._abandoned_count += 1
        waited.add_done_callback(self._release_abandoned)
        raise RequestRefusedError("too_slow", 503)

    def _release_abandoned(self, answered: asyncio.Future) -> None:
        answered.exception()  # nobody waits for it any more
        self._abandoned_count -= 1
