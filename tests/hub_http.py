"""HTTP layer of the test server for the Hub: chunked bodies, JSON answers, and broken connections."""

import http.server
import json
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

CHUNK = 2**20  # bytes that are read at a time


class Dropped(Exception):
    """Raised by the server after it has deliberately closed a connection in the middle of a request."""


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
        """Yield the body of the request in chunks of at most `CHUNK` bytes."""
        remaining = int(self.headers.get("Content-Length", 0))
        while remaining:
            chunk = self.rfile.read(min(CHUNK, remaining))
            if not chunk:
                raise ConnectionError("The client closed the connection.")
            remaining -= len(chunk)
            yield chunk

    def drop(self) -> NoReturn:
        """Reset the connection at once, as a network failure does. Data in transit is lost."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise Dropped

    def log_message(self, *args) -> None:
        """Log nothing, so that requests do not appear in the output of tests."""


class HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request, client_address) -> None:
        """Report an error of a request, unless it only means that the client has closed the connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
