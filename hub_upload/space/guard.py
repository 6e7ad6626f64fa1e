"""What stands before gradio: who may ask, for which routes, with how much; nothing outside this machine is fetched."""

import asyncio
import json
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub_upload.space.turns import BUSY
from hub_upload.space.uploads import MAX_UPLOAD_BYTES, Uploads

MAX_BODY_BYTES = 200_000  # of a question; one has under 10 kB, and up to 256 wait
MAX_FORM_BYTES = MAX_UPLOAD_BYTES + 10_000  # of an upload with its form
UPLOADS_AT_ONCE = 8  # others wait
PLACE_S = 30  # for one of these places
RECEIVE_S = 60  # for an upload in its place, or for a question
STEP_BYTES, STEP_S = 100_000, 5  # of an upload, so many bytes, or its rest, must come within each such time
API = "/gradio_api"
QUESTION, UPLOAD, PROGRESS, FILE = f"{API}/run/predict", f"{API}/upload", f"{API}/upload_progress", f"{API}/file="
# The other routes of gradio are not the page's; among them are some that fetch addresses, or keep files for ever.
PAGES = {"/", "/config", "/theme.css", "/favicon.ico", f"{API}/startup-events"}  # the last is asked by `launch` itself
FOLDERS = ("/assets/", "/static/", FILE)
# gradio's page has inline scripts and styles, and compiles templates.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)


class Refused(Exception):
    """A request that is not answered, with the status and the reason, for a visitor."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.answer = JSONResponse({"error": reason}, status)  # as gradio's page reads it


class Guard:
    """ASGI middleware before all others: refuses what is not the page's, and puts its headers on every answer.

    `fits` says whether the page has a question of this number with such values. The name of a host that a header says
    was asked of a proxy is believed only `behind_proxy`.

    Slow uploads hold no place for long by a least rate rather than by a limit for each address: all visitors of a Space
    have its proxy's address, and what a header says of theirs can be made up where there is no proxy.
    """

    def __init__(self, app: ASGIApp, uploads: Uploads, fits: Callable[[int, list], bool], behind_proxy: bool):
        self.app, self.uploads, self.fits, self.behind_proxy = app, uploads, fits, behind_proxy
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
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        scope = {**scope, "query_string": b""}  # no route of the page reads it on the server
        try:
            await self._answer(scope, receive, send_guarded)
        except (Refused, TimeoutError) as error:
            if not started:
                refused = error if isinstance(error, Refused) else Refused(408, "O envio demorou demais.")
                await refused.answer(scope, receive, send_guarded)
        except ClientDisconnect:  # nobody is left to be answered
            pass

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        if any(_is_foreign(origin, headers, self.behind_proxy) for origin in headers.getlist("origin")):
            raise Refused(403, "Este pedido vem de outra página.")
        if method in ("GET", "HEAD") and path == PROGRESS:  # gradio would keep the name of each upload for ever
            await Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")(scope, receive, send)
        elif method in ("GET", "HEAD") and (path in PAGES or path.startswith(FOLDERS)):
            if path.startswith(FILE) and self.uploads.find(path.removeprefix(FILE)) is None:
                raise Refused(404, "Não há esse arquivo.")
            await self.app(scope, receive, send)
        elif method == "POST" and path == QUESTION:
            async with asyncio.timeout(RECEIVE_S):
                body = self._checked(await _body(receive))
            await self.app(scope, _paced([{"type": "http.request", "body": body}], receive), send)
        elif method == "POST" and path == UPLOAD:
            _check_length(headers)
            await self._upload(scope, receive, send)
        else:
            raise Refused(404, "A página não tem isso.")

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload on in a place, for which it waits with its first step, so that idle ones keep nobody away."""
        first = await _step(receive)
        try:
            async with asyncio.timeout(PLACE_S):
                await self._places.acquire()
        except TimeoutError:
            raise Refused(503, BUSY) from None
        try:
            async with asyncio.timeout(RECEIVE_S):
                await asyncio.to_thread(self.uploads.tidy)
                await self.app(scope, _paced(first, receive), send)
        except TypeError as error:  # gradio's, about a part of the form that is no file
            raise Refused(400, "O envio não é um formulário de arquivos.") from error
        finally:
            self._places.release()

    def _checked(self, body: bytes) -> bytes:
        """A question of the page, in which a path that is none of an upload is no picture at all. Raises Refused."""

        def only_uploads(value: dict) -> dict:
            if "data" in value:  # the question itself
                return value
            return {"path": value["path"]} if self.uploads.find(value.get("path")) else {}

        try:  # `int` raises ValueError for NaN and Infinity, which are no JSON
            question = json.loads(body, object_hook=only_uploads, parse_constant=int)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "O pedido não é JSON.") from error
        match question:  # written anew, so that gradio can't read it otherwise
            case {"fn_index": int(number), "data": list(values), "session_hash": str(session)}:
                if self.fits(number, values):
                    return json.dumps({"fn_index": number, "data": values, "session_hash": session}).encode()
        raise Refused(400, "O pedido não é uma pergunta desta página.")


def _is_foreign(origin: str, headers: Headers, behind_proxy: bool) -> bool:
    """Whether an origin is another host or port than the one asked, or than that of the proxy of a Space."""
    forwarded = headers.get("x-forwarded-host", "") if behind_proxy else ""
    asked = [headers.get("host", ""), *forwarded.split(",")]
    return origin.partition("://")[2].lower() not in {host.strip().lower() for host in asked if host.strip()}


def _check_length(headers: Headers) -> None:
    """Raise Refused where an upload is too long, or does not say how long it is; a server holds it to what it says."""
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not length.isdecimal():
        raise Refused(411, "O envio precisa dizer o seu tamanho.")
    if int(length) > MAX_FORM_BYTES:
        raise Refused(413, f"O arquivo é grande demais: o limite é de {MAX_UPLOAD_BYTES // 1_000_000} MB.")


async def _body(receive: Receive) -> bytes:
    """The whole body. Raises Refused where it is over the limit or the visitor has gone."""
    body, more = bytearray(), True
    while more:  # to its end, but what is over is not kept: who is cut off while sending reads no answer
        message = await receive()
        body += message.get("body", b"") if len(body) <= MAX_BODY_BYTES else b""
        more = message["type"] == "http.request" and message.get("more_body", False)
    if message["type"] != "http.request" or len(body) > MAX_BODY_BYTES:
        raise Refused(413, "O pedido é grande demais.")
    return bytes(body)


async def _step(receive: Receive) -> list[Message]:
    """The next messages of an upload, `STEP_BYTES` of it or its rest. Raises TimeoutError."""
    messages, size, more = [], 0, True
    async with asyncio.timeout(STEP_S):
        while more and size < STEP_BYTES:
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            more = messages[-1].get("more_body", False)
    return messages


def _paced(messages: list[Message], receive: Receive) -> Receive:
    """`receive` with these messages once more, and each step of the body after them in its time."""
    more = True

    async def paced() -> Message:
        nonlocal more
        if more and not messages:
            messages.extend(await _step(receive))
        message = messages.pop(0) if messages else await receive()
        more = message.get("more_body", False)
        return message

    return paced
