"""What stands before gradio: who may ask, for which routes, with how much; nothing outside this machine is fetched."""

import asyncio
import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub_upload.space.uploads import MAX_UPLOAD_BYTES, Uploads

MAX_BODY_BYTES = 200_000  # of a question; one has under 10 kB, and up to 256 wait
MAX_FORM_BYTES = MAX_UPLOAD_BYTES + 10_000  # of an upload with its form
UPLOADS_AT_ONCE = 8  # others wait
RECEIVE_S = 60  # for an upload and for its turn, or for a question
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
    """ASGI middleware before all others: refuses what is not the page's, and puts its headers on every answer."""

    def __init__(self, app: ASGIApp, uploads: Uploads):
        self.app, self.uploads = app, uploads
        self._receiving = asyncio.Semaphore(UPLOADS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        if any(_is_foreign(origin, headers) for origin in headers.getlist("origin")):
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
            await self.app(scope, _replayed(body, receive), send)
        elif method == "POST" and path == UPLOAD:
            _check_length(headers)
            async with asyncio.timeout(RECEIVE_S), self._receiving:
                await asyncio.to_thread(self.uploads.tidy)
                await self.app(scope, receive, send)
        else:
            raise Refused(404, "A página não tem isso.")

    def _checked(self, body: bytes) -> bytes:
        """A question in which a path that is none of an upload is no picture at all. Raises Refused."""

        def only_uploads(value: dict) -> dict | None:
            return value if value.get("path") is None or self.uploads.find(value["path"]) else None

        try:  # written anew, so that gradio can't read it otherwise
            return json.dumps(json.loads(body, object_hook=only_uploads)).encode()
        except (ValueError, RecursionError) as error:
            raise Refused(400, "O pedido não é JSON.") from error


def _is_foreign(origin: str, headers: Headers) -> bool:
    """Whether an origin is another host or port than the one asked, or than that of the proxy of a Space."""
    asked = [headers.get("host", ""), *headers.get("x-forwarded-host", "").split(",")]
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


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body once more."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again
