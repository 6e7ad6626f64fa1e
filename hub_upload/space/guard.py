"""What stands before gradio: nothing outside this machine is asked for, by the page or by the server."""

import json
from collections.abc import Iterator
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1_000_000  # of a request that is no upload; a question has under 10 kB
UPLOAD = "/upload"  # gradio itself holds what is sent there to `max_file_size`
# gradio's page has inline scripts and styles, and compiles templates.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)


class Guard:
    """ASGI middleware: a content security policy on every answer, and no question that names an address.

    gradio fetches the file of a question whose path is an address, from the server, for any component.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        if scope["method"] in ("GET", "HEAD", "OPTIONS") or scope["path"].endswith(UPLOAD):
            await self.app(scope, receive, send_guarded)
            return
        body = await _body(receive)
        fault = "O pedido é grande demais." if body is None else _fault(body)
        if fault:
            await PlainTextResponse(fault, status_code=413 if body is None else 400)(scope, receive, send_guarded)
            return
        await self.app(scope, _replayed(body, receive), send_guarded)


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None where it is over the limit or the visitor has gone."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body once more."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _fault(body: bytes) -> str:
    try:
        question = json.loads(body) if body.strip() else None
    except (ValueError, RecursionError):
        return "O pedido não é JSON."
    if any("://" in path for path in _paths(question)):
        return "Endereços não são buscados; envie o arquivo."
    return ""


def _paths(value: Any) -> Iterator[str]:
    """All texts under a key `path`, of objects within objects."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
