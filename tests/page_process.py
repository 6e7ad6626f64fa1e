"""Serve the search page for tests, in this process or in another one, and send it requests."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Program of a page whose requests to other machines are written to a file and refused.
SERVER_PROGRAM = """
import ipaddress, socket, sys
connect, resolve, log = socket.socket.connect, socket.getaddrinfo, open(sys.argv.pop(1), "a", buffering=1)

def is_local(host):
    try:
        return host in (None, "", "localhost", b"localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def watched(self, address):
    if isinstance(address, tuple) and not is_local(address[0]):
        log.write(f"{address}\\n")
        raise OSError("refused by the test")
    return connect(self, address)

def resolved(host, *args, **kwargs):
    if not is_local(host) and host != "0.0.0.0":
        log.write(f"{host}\\n")
        raise OSError("refused by the test")
    return resolve(host, *args, **kwargs)

socket.socket.connect, socket.getaddrinfo = watched, resolved
from capivara_search.index import PictureIndex
from capivara_search.page import serve_index
serve_index(PictureIndex.open(*sys.argv[1:]), "127.0.0.1", 0, on_open=lambda url: print(url, flush=True))
"""


def fetch(url: str, data: bytes | None = None, **headers: str) -> tuple[int, dict, bytes]:
    """Send a request; return the status, headers and body of the response."""
    request = urllib.request.Request(url, data, {name.replace("_", "-"): text for name, text in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@dataclass
class PageClient:
    """A client of a page, which may run in this process."""

    url: str

    @property
    def port(self) -> int:
        return urllib.parse.urlsplit(self.url).port

    def post(self, name: str, body: Any, **headers: str) -> tuple[int, dict, bytes]:
        headers.setdefault("Content_Type", "application/octet-stream")
        return fetch(f"{self.url}/api/{name}", body, **headers)

    def ask(self, name: str, question: Any, picture: bytes = b"", **headers: str) -> tuple[int, Any]:
        """Ask a question; return the status and the JSON value of the answer."""
        status, _, body = self.post(name, json.dumps(question).encode() + b"\n" + picture, **headers)
        return status, json.loads(body)

    def get(self, route: str, path: str | None = None, **headers: str) -> tuple[int, dict, bytes]:
        """Get a route, with the path of a picture if one is given; return status, headers and body."""
        query = "" if path is None else "?" + urllib.parse.urlencode({"path": path}, errors="surrogatepass")
        return fetch(f"{self.url}/{route}{query}", **headers)

    def status_of(self, method: str, path: str, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
        with contextlib.closing(connection):
            return connection.getresponse().status


@contextlib.contextmanager
def served(index: Any, host: str = "127.0.0.1", port: int = 0, **options: Any) -> Iterator[PageClient]:
    """Serve the page of an index in this process, by default on a free port."""
    from capivara_search.page.server import create_page_server

    options = {"language": "pt", "credit": None, "allow_hosts": ()} | options
    server, listening, url = create_page_server(index, host, port, **options)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield PageClient(url.replace("0.0.0.0", "127.0.0.1"))
    finally:
        server.should_exit = True
        thread.join(15)


@contextlib.contextmanager
def running(tmp_path: Path, index: str, model: Path) -> Iterator[tuple[PageClient, Path]]:
    """Serve a page in another process; yield its client and the file with its requests to other machines."""
    log, output_file = tmp_path / "network.txt", tmp_path / "output.txt"
    environment = {name: text for name, text in os.environ.items() if name not in ("HF_HUB_OFFLINE", "DISPLAY")}
    log.touch()
    command = ["timeout", "-k", "60", "400", sys.executable, "-c", SERVER_PROGRAM, str(log), index, str(model)]
    with open(output_file, "w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        for _ in range(600):
            lines = output_file.read_text(encoding="utf-8").splitlines()
            if address := next((line for line in lines if line.startswith("http://")), None):
                break
            assert server.poll() is None, lines
            time.sleep(0.2)
        yield PageClient(address), log
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
