"""A stand-in server of OpenAI's protocol that fails on request, and records what it receives."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from examples.chat_server import MODEL, ChatHandler, ChatServer, run_chat_server

KEY = "sk-Test/key+0123456789"


def reversed_text(messages: list[dict[str, Any]]) -> str:
    """Return the last message backwards; numbered lines keep their numbers."""
    content = messages[-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    if "\n1. " in text:
        lines = [line.partition(". ") for line in text.split("\n\n", 1)[1].split("\n")]
        return "\n".join(f"{number}. {rest[::-1]}" for number, _, rest in lines)
    return text[::-1]


@dataclass
class FaultyServer(ChatServer):
    """What the server will do, and what it received.

    Attributes:
        faults: Faults of the next requests, in order; None is a normal answer, and later requests succeed. A number is
            an HTTP status; `timeout` never answers, `slow` sends one byte at a time, `cut` closes the connection in the
            middle, `malformed` is broken JSON, `html` a page, `empty` has no choices, `length` and `refusal` are
            answers that can't be used, `lines` has another number of lines, `filter` is a refusal of a content filter.
        always: Fault of all requests that have no other.
        keys: Authorization headers of all requests.
        requests: Bodies of all requests for more than one token, in the order in which they arrived.
        redirect: Address to which the statuses 302 and 307 redirect.
        most: Largest number of requests at the same time.
        choices: Number of choices per answer; None for the requested number.
        model: Name of the model that answers report.
        takes_images: Whether the model sees images.
        refuses_images: Whether requests with images are refused if the model sees none; otherwise images are dropped.
        names: Names of the model that requests may use. Only `MODEL` is listed.
    """

    answer: Any = reversed_text
    faults: list[int | str | None] = field(default_factory=list)
    always: int | str | None = None
    keys: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    redirect: str = ""
    most: int = 0
    choices: int | None = None
    model: str = MODEL
    takes_images: bool = True
    refuses_images: bool = True
    names: tuple[str, ...] = (MODEL,)
    _active: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, handler: ChatHandler, body: dict[str, Any]) -> None:
        self.keys.append(handler.headers["Authorization"])
        if body["model"] not in self.names:
            return handler.send_json({"error": {"message": f"no model {body['model']}", "code": 404}}, 404)
        if not self.takes_images and "image_url" in json.dumps(body["messages"]):
            if self.refuses_images:
                return handler.send_json({"error": {"message": f"{MODEL} is not a multimodal model"}}, 400)
            body["messages"][-1]["content"] = body["messages"][-1]["content"][-1]["text"]
        with self._lock:
            is_probe = body["max_tokens"] == 1
            if not is_probe:
                self.requests.append(body)
            fault = self.faults.pop(0) if self.faults and not is_probe else self.always
            self._active += 1
            self.most = max(self.most, self._active)
        try:
            time.sleep(0 if is_probe else self.delay_s)
            self._respond(handler, body, fault)
        finally:
            with self._lock:
                self._active -= 1

    def _respond(self, handler: ChatHandler, body: dict[str, Any], fault: int | str | None) -> None:
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        if isinstance(fault, int):
            headers = {"Retry-After": "2"} if fault == 429 else {}
            if fault in (302, 307):
                headers = {"Location": self.redirect}
            return handler.send_json({"error": {"message": f"status {fault} for {key}"}}, fault, headers)
        if fault == "quota":
            return handler.send_json({"error": {"message": "no money", "code": "insufficient_quota"}}, 429)
        if fault == "filter":
            return handler.send_json({"error": {"message": "bad content", "code": "content_filter"}}, 400)
        if fault == "timeout":
            return handler.rfile.read(1)  # returns when the client disconnects
        text = self.answer(body["messages"])
        if fault == "refusal":
            text = "I'm sorry, but I can't help with that."
        elif fault == "lines":
            text = "\n".join(text.split("\n")[1:])
        completion = self.completion(body, text, "length" if fault == "length" else "stop") | {"model": self.model}
        completion["choices"] *= self.choices or body.get("n", 1)
        if fault == "empty":
            completion["choices"] = []
        data, kind = json.dumps(completion).encode(), "application/json"
        if fault == "malformed":
            data = data[:-10]
        elif fault == "html":
            data, kind = b"<html><body>Welcome</body></html>", "text/html"
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if fault == "slow":
            for place in range(len(data)):
                handler.wfile.write(data[place : place + 1])
                time.sleep(0.05)
        elif fault == "cut":
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        else:
            handler.wfile.write(data)


@contextmanager
def chat_service(**options: Any) -> Iterator[FaultyServer]:
    """Run a server during a `with` block."""
    with run_chat_server(FaultyServer(**options)) as server:
        yield server
