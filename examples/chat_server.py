"""A stand-in for a server that speaks OpenAI's protocol, for examples, benchmarks and tests without a language model.

    with run_chat_server(ChatServer(lambda messages: "um gato")) as server:
        print(server.url)  # for --base_url

The server runs in threads of this process, on loopback, until the end of the `with` block.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stand-in"  # name of the only model


@dataclass
class ChatServer:
    """A running stand-in server.

    Attributes:
        answer: Function that returns the answer to a list of messages.
        delay_s: Seconds until a request is answered.
        url: Address for `--base_url`; "" before the server runs.
    """

    answer: Callable[[list[dict[str, Any]]], str]
    delay_s: float = 0.0
    url: str = ""

    def handle(self, handler: "ChatHandler", body: dict[str, Any]) -> None:
        """Answer a request for a chat completion. A request for a single token is answered at once.

        Args:
            handler: The connection.
            body: Content of the request.
        """
        time.sleep(self.delay_s if body.get("max_tokens") != 1 else 0)
        handler.send_json(self.completion(body, self.answer(body["messages"])))

    def completion(self, body: dict[str, Any], text: str, finish_reason: str = "stop") -> dict[str, Any]:
        """Return a chat completion with a single choice.

        Args:
            body: Content of the request, which counts as ten tokens, and ten more for an image.
            text: The answer, of which each word counts as a token.
            finish_reason: Why the model stopped.
        """
        has_image = not isinstance(content := body["messages"][-1]["content"], str) and len(content) > 1
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 20 if has_image else 10, "completion_tokens": len(text.split())}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [choice],
            "usage": usage,
        }


class ChatHandler(BaseHTTPRequestHandler):
    """Connection to the stand-in server."""

    protocol_version = "HTTP/1.1"
    chat_server: ChatServer

    def do_GET(self) -> None:
        """List the model."""
        self.send_json({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "me"}]})

    def do_POST(self) -> None:
        """Answer a request for a chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.send_json({"error": {"message": f"there is no {self.path}"}}, 404)
        else:
            self.chat_server.handle(self, body)

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a JSON response.

        Args:
            content: JSON value.
            status: HTTP status code.
            headers: Additional headers.
        """
        data = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


class _Server(ThreadingHTTPServer):
    """Server whose threads do not keep the process alive, with a queue for many connections at the same time."""

    daemon_threads, block_on_close, request_queue_size = True, False, 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of a connection: clients close connections that they no longer need."""


@contextmanager
def run_chat_server(server: ChatServer) -> Iterator[ChatServer]:
    """Run a stand-in server during a `with` block.

    Args:
        server: The server. Its attribute `url` is set.
    """
    listener = _Server(("127.0.0.1", 0), type("Handler", (ChatHandler,), {"chat_server": server}))
    threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
