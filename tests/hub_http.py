"""HTTP of the stand-in for the Hub: bodies chunk by chunk, JSON answers, connections that break."""

import http.server
import json
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

CHUNK = 2**20


class Dropped(Exception):
    """The connection was ended in the middle of a request."""


class HttpHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.head(status, {"Content-Type": "application/json", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def chunks(self) -> Iterator[bytes]:
        """The body of the request."""
        left = int(self.headers.get("Content-Length", 0))
        while left:
            chunk = self.rfile.read(min(CHUNK, left))
            if not chunk:
                raise ConnectionError("The client is gone.")
            left -= len(chunk)
            yield chunk

    def drop(self) -> NoReturn:
        """End the connection as a broken line does: at once, with what was underway lost."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise Dropped

    def log_message(self, *args) -> None:
        """Nothing."""


class HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request, client_address) -> None:
        """Silent where the client is gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
