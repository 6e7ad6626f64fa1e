"""A fake of version 2 of Google Cloud Translation on loopback, with its answers and its failures."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hub_http import HttpHandler, HttpServer

KEY = "AIzaTest-key_0123456789"
LANGUAGES = ("en", "es", "hi", "pt", "pt-PT", "xh", "yo", "zh-CN", "zh-TW")
PATH = "/language/translate/v2"


@dataclass
class GoogleService:
    """What the server will do, and what it received.

    Attributes:
        faults: Faults of the next translation requests, in order; later requests succeed. A number is an HTTP status;
            `timeout` never answers, `cut` ends in the middle of the JSON, `list` is other JSON, `fewer` lacks a
            translation; `quota` and `daily` are Google's two errors for an exceeded quota.
        requests: Bodies of the translation requests with the right key.
        headers: Headers of all requests.
        paths: Paths of all requests, with their queries.
        answered: How often each sentence was translated in a complete answer.
    """

    url: str = ""
    faults: list[int | str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)

    def sentences(self) -> list[str]:
        """Return all sentences that were sent, in order."""
        return [text for request in self.requests for text in request["q"]]


def translated(text: str, target: str) -> str:
    """Return the server's translation of a sentence."""
    return f"{target}: {text[::-1]}"


@contextmanager
def google_service() -> Iterator[GoogleService]:
    service = GoogleService()
    server = HttpServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": service}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    service.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


class _Handler(HttpHandler):
    service: GoogleService

    def do_GET(self) -> None:
        if self._is_allowed():
            self.json({"data": {"languages": [{"language": code} for code in LANGUAGES]}})

    def do_POST(self) -> None:
        body = json.loads(b"".join(self.chunks()))
        if not self._is_allowed():
            return
        self.service.requests.append(body)
        entries = [{"translatedText": translated(text, body["target"])} for text in body["q"]]
        fault = self.service.faults.pop(0) if self.service.faults else None
        if fault == "timeout":
            self.rfile.read(1)  # returns when the client disconnects
            return
        elif fault == "fewer":
            entries.pop(len(entries) // 2)
        elif fault == "quota":
            return self._fail(403, "User Rate Limit Exceeded", "userRateLimitExceeded")
        elif fault == "daily":
            return self._fail(403, "Daily Limit Exceeded", "dailyLimitExceeded")
        elif fault == "list":
            return self.json([1, 2])
        elif isinstance(fault, int):
            return self._fail(fault, f"status {fault} for {self.headers['x-goog-api-key']}", "backendError")
        self.service.answered.update(body["q"] if fault in (None, "none") else [])
        data = json.dumps({"data": {"translations": entries}}).encode()
        self.close_connection |= fault == "cut"
        self.head(200, {"Content-Type": "application/json"}, len(data))
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def _is_allowed(self) -> bool:
        self.service.headers.append(dict(self.headers))
        self.service.paths.append(self.path)
        if not self.path.startswith(PATH):
            self._fail(404, f"no such path {self.path}", "notFound")
        elif (key := self.headers.get("x-goog-api-key")) != KEY:  # like Google, but the message repeats the key
            self._fail(400, f"API key not valid: {key}. Please pass a valid API key.", "badRequest")
        else:
            return True
        return False

    def _fail(self, status: int, message: str, reason: str) -> None:
        error = {"code": status, "message": message, "errors": [{"message": message, "reason": reason}]}
        elsewhere = {"Location": "http://localhost:9/elsewhere"} if status == 302 else None
        self.json({"error": error}, status, elsewhere)
