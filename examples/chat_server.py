"""Stand-in for a chat server with OpenAI's API, so that examples, benchmarks and tests need no language model.

    with run_stand_in_chat_server(ChatServer(lambda messages: "um gato")) as server:
        print(server.url)  # for --base_url

You pass a function that computes the answers. The server can be reached only from this machine, and stops at the end of
the `with` block.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stand-in"  # name of the only model that the server offers


@dataclass
class ChatServer:
    """Settings of a stand-in chat server, which `run_stand_in_chat_server` starts.

    Attributes:
        answer: Function that gets the messages of a request and returns the text of the answer.
        delay_s: Seconds until a request is answered.
        url: Address of the running server, for `--base_url`. "" before the server runs.
    """

    answer: Callable[[list[dict[str, Any]]], str]
    delay_s: float = 0.0
    url: str = ""

    def handle(self, handler: "ChatHandler", body: dict[str, Any]) -> None:
        """Answer one request for a chat completion, after a delay of `delay_s` seconds.

        A request for a single token is answered without delay.

        Args:
            handler: The connection that the answer is sent to.
            body: JSON content of the request.
        """
        # The delay simulates a language model. The caption commands check the connection with a request for one token,
        # which gets no delay.
        time.sleep(self.delay_s if body.get("max_tokens") != 1 else 0)
        handler.send_json(self.completion(body, self.answer(body["messages"])))

    def completion(self, body: dict[str, Any], text: str, finish_reason: str = "stop") -> dict[str, Any]:
        """Build the JSON response to a chat request in the format of OpenAI's API, with a single choice.

        Args:
            body: JSON content of the request.
            text: Text of the answer.
            finish_reason: Reason for the end of the answer, as in OpenAI's API.

        Returns:
            The response, with the keys of OpenAI's chat completion such as "choices" and "usage".
        """
        # An image counts as 10 more prompt tokens, and each word of the answer as one token.
        has_image = not isinstance(content := body["messages"][-1]["content"], str) and len(content) > 1
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 20 if has_image else 10, "completion_tokens": len(text.split())}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        head = {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL}
        return head | {"choices": [choice], "usage": usage}


class ChatHandler(BaseHTTPRequestHandler):
    """HTTP handler of one connection to the stand-in chat server. Its attribute `chat_server` makes the answers."""

    protocol_version = "HTTP/1.1"
    chat_server: ChatServer

    def do_GET(self) -> None:
        """Answer any GET request with the list of available models, which has a single entry."""
        self.send_json({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "me"}]})

    def do_POST(self) -> None:
        """Answer a POST request: a chat completion for `/v1/chat/completions`, and error 404 for any other path."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.send_json({"error": {"message": f"This server has no {self.path}."}}, 404)
        else:
            self.chat_server.handle(self, body)

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send an HTTP response with JSON content to the client.

        Args:
            content: JSON value.
            status: HTTP status code.
            headers: Additional HTTP headers, `{name: value}`. None adds no header.
        """
        data = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Do nothing. This overrides the standard handler, which would print every request to stderr."""


class _Server(ThreadingHTTPServer):
    """Server whose threads do not keep the process alive, with a queue for many connections at the same time."""

    daemon_threads, block_on_close, request_queue_size = True, False, 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of a connection, because clients close connections that they no longer need."""


@contextmanager
def run_stand_in_chat_server(server: ChatServer) -> Iterator[ChatServer]:
    """Run a chat server with prepared answers on this machine during a `with` block, to try programs without a model.

    Args:
        server: What the server answers, and after how many seconds. Its attribute `url` is set to the address of the
            running server.

    Yields:
        The argument `server`.
    """
    listener = _Server(("127.0.0.1", 0), type("Handler", (ChatHandler,), {"chat_server": server}))
    threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
