"""What stands before the page: who may ask, with how much and in what time; nothing outside of this machine is fetched.

    app = Guard(app, behind_proxy=False)

A question is a POST whose body is a line of JSON and, after it, the bytes of a picture or nothing.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capivara_search.page.turns import Refusal

MAX_UPLOAD_BYTES = 20_000_000  # of a picture; photographs of telephones have under 15 MB
MAX_QUESTION_BYTES = 200_000  # of its line of JSON; one has under 10 kB, and up to 256 wait
UPLOADS_AT_ONCE = 8  # bodies over MAX_QUESTION_BYTES in memory, until they are answered; others wait
PLACE_S = 30  # for one of these places
RECEIVE_S = 60  # for a body in its place
STEP_BYTES, STEP_S = 100_000, 5  # of a body, so many bytes, or its rest, must come within each such time
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors "
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Another page can neither show a picture of this one nor learn, by trying, which paths there are.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

logger = logging.getLogger("capivara")


class Guard:
    """ASGI middleware before all others: refuses what is not the page's, and puts its headers on every answer.

    The name of a host that a header says was asked of a proxy is believed only `behind_proxy`.

    Slow uploads hold no place for long by a least rate rather than by a limit for each address: all visitors of a Space
    have its proxy's address, and what a header says of theirs can be made up where there is no proxy.
    """

    def __init__(self, app: ASGIApp, behind_proxy: bool):
        self.app, self.behind_proxy = app, behind_proxy
        self._policy = POLICY + ("'self' https://huggingface.co" if behind_proxy else "'none'")  # which frames a Space
        self._places = asyncio.Semaphore(UPLOADS_AT_ONCE)

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
                headers.update(HEADERS | {"Content-Security-Policy": self._policy})
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._check_origin(scope)
            if scope["method"] == "POST":
                await self._with_body(scope, receive, send_guarded)
            else:
                await self.app(scope, receive, send_guarded)
        except (Refusal, TimeoutError) as error:
            if not started:
                refusal = error if isinstance(error, Refusal) else Refusal("slow_upload", 408)
                await refused(refusal)(scope, receive, send_guarded)
        except ClientDisconnect:  # nobody is left to be answered
            pass
        except Exception:
            logger.exception("A request to %s has failed.", scope["path"])
            if not started:
                await refused(Refusal("failed", 500))(scope, receive, send_guarded)

    def _check_origin(self, scope: Scope) -> None:
        """Raise Refusal where another page asks. It may only lead to this one, by a link."""
        headers = Headers(scope=scope)
        forwarded = headers.get("x-forwarded-host", "") if self.behind_proxy else ""
        hosts = {host.strip().lower() for host in (headers.get("host", ""), *forwarded.split(",")) if host.strip()}
        if any(origin.partition("://")[2].lower() not in hosts for origin in headers.getlist("origin")):
            raise Refusal("foreign", 403)
        if scope["path"] != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refusal("foreign", 403)  # a picture of this page in another one comes without an origin

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a question on with its whole body; a large one in a place, for which it waits with its first step."""
        length = _length(Headers(scope=scope))
        body = await _step(receive, length)
        async with self._place(length):
            async with asyncio.timeout(RECEIVE_S):
                while len(body) < length:
                    body += await _step(receive, length - len(body))
            message = {"type": "http.request", "body": bytes(body), "more_body": False}
            del body
            waiting = [message]
            await self.app(scope, lambda: _next(waiting, receive), send)

    @asynccontextmanager
    async def _place(self, length: int) -> AsyncIterator[None]:
        if length <= MAX_QUESTION_BYTES:
            yield
            return
        try:
            async with asyncio.timeout(PLACE_S):
                await self._places.acquire()
        except TimeoutError:
            raise Refusal("busy", 503) from None
        try:
            yield
        finally:
            self._places.release()


def refused(refusal: Refusal) -> JSONResponse:
    """The answer to a request that is refused; the page has its words in each language."""
    return JSONResponse({"error": refusal.code, "values": refusal.values}, refusal.status)


def _length(headers: Headers) -> int:
    """Bytes of a body, as it says; a server holds it to that. Raises Refusal where it is too long or says nothing."""
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not length.isdecimal():
        raise Refusal("no_length", 411)
    if int(length) > MAX_UPLOAD_BYTES + MAX_QUESTION_BYTES:
        raise Refusal("too_large", 413, megabytes=MAX_UPLOAD_BYTES // 1_000_000)
    return int(length)


async def _step(receive: Receive, rest: int) -> bytearray:
    """The next `STEP_BYTES` of a body, or its rest. Raises TimeoutError, and ClientDisconnect."""
    body = bytearray()
    async with asyncio.timeout(STEP_S):
        while len(body) < min(rest, STEP_BYTES):
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnect
            body += message.get("body", b"")
    return body


async def _next(waiting: list[Message], receive: Receive) -> Message:
    return waiting.pop() if waiting else await receive()
