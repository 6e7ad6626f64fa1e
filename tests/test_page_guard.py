"""Attacks on a page that runs in this process: what it refuses, limits and stops."""

import asyncio
import contextlib
import io
import json
import os
import socket
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pytest
from made_pictures import bomb, made_index, made_pictures, png, save_folder
from page_process import PageClient, served
from PIL import Image

pytest.importorskip("uvicorn", reason="the page needs uvicorn: pip install -e '.[search]'")

from starlette.testclient import TestClient
from uvicorn import Config
from uvicorn.server import ServerState

from capivara_common.image_files import BadImage, decode_image
from capivara_search.page import answers, decoder, guard, server
from capivara_search.page.guard import (
    MAX_QUESTION_BYTES,
    MAX_UPLOAD_BYTES,
    SECURITY_HEADERS,
    RequestGuard,
    RequestRefusedError,
)
from capivara_search.picture_reading import convert_image_to_rgb_on_white

DECODE_TIMEOUT_S = 2
LONG_BYTES = 30_000_000  # of a download that does not fit into the buffers of its sockets
LABELS = {"labels": ["azul", "verde"]}
FOREIGN_HOSTS = ("evil.example:80", "evil@localhost", "localhost.evil.example", "10.9.8.7", "[::2]", "")
FOREIGN = ("http://evil.example", "null", "http://localhost:7860", "http://127.0.0.1:1", "http://[::1")


def slow_jpeg(scans: int = 5000) -> bytes:
    """Create a JPEG of 3,000 x 3,000 pixels and some hundred kB that repeats its last scan many times."""
    Image.new("L", (3000, 3000), 128).save(file := io.BytesIO(), "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_folder(tmp_path_factory.mktemp("guard") / "fotos")
    (folder / "longa.png").write_bytes(png(3))
    os.truncate(folder / "longa.png", LONG_BYTES)  # bytes after the end of a picture are ignored
    return folder


@pytest.fixture(scope="module")
def index(folder, saved_tiny_folder):
    return made_index(folder.parent / "fotos.lance", folder, saved_tiny_folder)


@pytest.fixture(scope="module")
def page(index):
    with contextlib.ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "DECODE_TIMEOUT_S", DECODE_TIMEOUT_S)
            client = opened.enter_context(served(index))
        yield client


@pytest.fixture
def row(folder):
    """Return the path of a picture of the index."""
    return str(folder / "azul" / "azul inteiro.png")


# --- Paths -----------------------------------------------------------------------------------------------------------


def paths_outside(folder: Path, tmp_path: Path) -> list[str]:
    """Return paths that are not in the index. Opening them would block, or reveal something about this machine."""
    private = tmp_path / "private.png"
    private.write_bytes(png(7))
    os.mkfifo(tmp_path / "fifo.png")
    links = tmp_path / "links"
    links.mkdir()
    for name, target in (("link.png", private), ("zero.png", "/dev/zero"), ("fd.png", "/proc/self/fd/1")):
        (links / name).symlink_to(target)
    paths = [private, tmp_path / "missing.png", tmp_path / "fifo.png", folder, folder / "azul", *links.iterdir()]
    paths += [folder / "missing.png", folder.parent / "fotos.lance", f"{folder}/../{tmp_path.name}/private.png"]
    paths += [f"{folder}/./azul/azul inteiro.png", f"{folder}//azul/azul inteiro.png", "azul/azul inteiro.png"]
    paths += ["/etc/shadow", "/etc/passwd", "/proc/self/fd/1", "/proc/self/environ", "/dev/zero", "/dev/stdin", "/"]
    paths += ["http://127.0.0.1:9/x.png", "file:///etc/passwd", "a\0b", "x" * 5000, "", "setup.cfg"]
    return [*map(str, paths), "' OR path LIKE '%", "'; --", "%", "'"]


@pytest.mark.parametrize("route", ["thumbnail", "picture", "download"])
def test_only_pictures_of_the_index_are_opened(page, folder, row, tmp_path, route):
    status, headers, body = page.get(route, row)
    assert status == 200 and headers["content-type"].startswith("image/") and Image.open(io.BytesIO(body)).size[0] == 32
    answers = {page.get(route, path)[::2] for path in paths_outside(folder, tmp_path)} | {page.get(route)[::2]}
    assert len(answers) == 1 and answers.pop()[0] == 404, "different answers would reveal which files exist"


@pytest.mark.parametrize("name", ["search", "copies"])
def test_only_pictures_of_the_index_can_be_query_pictures(page, folder, tmp_path, name):
    answers = set()
    for path in (path for path in paths_outside(folder, tmp_path) if path):
        answers.add(str(page.ask(name, {"like": path}, Origin=page.url)))
    assert answers == {"(404, {'error': 'gone', 'values': {}})"}


def test_a_row_whose_file_was_replaced_is_not_sent(folder, saved_tiny_folder, tmp_path):
    """The rows of an index from other people may name any file."""
    made = save_folder(tmp_path / "fotos")
    index = made_index(tmp_path / "i.lance", made, saved_tiny_folder)
    private, notes = tmp_path / "private.png", made / "notes.txt"
    for path in (private, notes):
        path.write_bytes(png(7) + b"segredo")
    rows = {"gone": made / "azul" / "azul inteiro.png", "other": made / "verde" / "verde inteiro.png"}
    rows |= {"fifo": made / "branco" / "branco inteiro.png", "text": made / "preto" / "preto inteiro.png"}
    row = index._table.rows(index._table.columns().names, f"path = '{rows['gone']}'")
    index._table.upsert(pa.Table.from_pylist([row.to_pylist()[0] | {"path": str(notes)}], row.schema))
    for path in rows.values():
        path.unlink()
    rows["other"].symlink_to(private)
    os.mkfifo(rows["fifo"])
    rows["text"].write_text("segredo", encoding="utf-8")
    with served(index) as client:
        for path in map(str, (*rows.values(), notes)):
            assert client.get("download", path)[0] == 404
            status, headers, body = client.get("picture", path)
            assert status == 200 and headers["content-type"] == "image/webp" and b"segredo" not in body


def test_originals_are_sent_only_from_folders_that_were_added_on_this_machine(
    folder, saved_tiny_folder, tmp_path, monkeypatch
):
    """An index from other people may name all pictures of this machine, and "/" as its folder."""
    index = made_index(tmp_path / "i.lance", folder, saved_tiny_folder)
    index._table.set_folders({"/": ""})
    row = str(folder / "azul" / "azul inteiro.png")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # as on another machine
    with served(index) as client:
        assert client.get("download", row)[0] == 404
        assert client.get("picture", row)[1]["content-type"] == "image/webp"
        index.add(folder)
        assert client.get("download", row)[0] == 200


def test_other_files_and_methods_are_not_served(page):
    for path in ("docs", "openapi.json", "static/", "static/../server.py", "static/%2e%2e/server.py", "words/pt.json"):
        assert page.get(path)[0] == 404
    for method, path in (("POST", "/"), ("PUT", "/api/search"), ("DELETE", "/picture"), ("GET", "/api/search")):
        assert page.status_of(method, path, Content_Length="0") in (404, 405)


# --- Host and Origin headers ----------------------------------------------------------------------------------------


ROUTES = ("/", "/static/page.js", "/api/search", "/api/status", "/picture", "/download", "/missing")


def test_a_foreign_origin_is_refused_on_every_route(page):
    preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    for number, path in enumerate(ROUTES):
        for method, headers in (("GET", {}), ("POST", {}), ("HEAD", {}), ("OPTIONS", preflight)):
            origin = FOREIGN[number % len(FOREIGN)]
            assert page.status_of(method, path, Origin=origin, **headers) == 403, (method, path)
    for origin in FOREIGN:
        status, headers, _ = page.post("search", b'{"text": "azul"}\n' + png(3), Origin=origin)
        assert status == 403 and "access-control-allow-origin" not in headers
    assert page.ask("search", {"text": "azul"}, Origin=page.url)[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_website_can_not_embed_a_picture(page, row, site):
    """Requests for embedded pictures have no Origin header. Their sizes would reveal which files exist."""
    for route in ("thumbnail", "picture", "download"):
        assert page.get(route, row, Sec_Fetch_Site=site)[0] == 403
        status, headers, _ = page.get(route, row, Sec_Fetch_Site="same-origin")
        assert status == 200 and headers["cross-origin-resource-policy"] == "same-origin"
    status, headers, _ = page.get("", Sec_Fetch_Site=site)
    assert status == 200 and "frame-ancestors 'none'" in headers["content-security-policy"], (
        "another website may link to the page"
    )


def test_a_local_page_answers_only_to_names_of_this_machine(page):
    assert {page.get("", Host=host)[0] for host in FOREIGN_HOSTS} == {400}, "a foreign name was answered"
    assert page.get("", Host=f"localhost:{page.port}")[0] == 200
    policy = page.get("")[1]["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "http" not in policy


def test_on_a_network_a_page_answers_only_to_its_own_names(index):
    """DNS rebinding: a browser would treat a foreign name that leads to this machine as the origin of the page."""
    with served(index, "0.0.0.0", allow_hosts=["Fotos.local"]) as client:
        for host in FOREIGN_HOSTS:
            names = {"Host": host, "Origin": f"http://{host}"}
            assert client.ask("search", {"text": "azul"}, **names)[0] == 400, host
            assert client.ask("search", {"text": "azul"}, **names, X_Forwarded_Host="localhost")[0] == 400, host
            assert client.get("", Host=host)[0] == 400, host
        for host in (socket.gethostname(), "localhost", "127.0.0.1", "fotos.local"):
            names = {"Host": f"{host}:{client.port}", "Origin": f"http://{host}:{client.port}"}
            assert client.ask("search", {"text": "azul"}, **names)[0] == 200, host
        other = PageClient(client.url.replace("127.0.0.1", "127.0.0.2"))  # another address of this machine
        assert other.ask("search", {"text": "azul"}, Origin=other.url)[0] == 200
        assert client.ask("search", {}, X_Forwarded_Host="fotos.local", Origin="https://fotos.local")[0] == 200
        assert client.ask("search", {}, X_Forwarded_Host="evil.example", Origin="https://evil.example")[0] == 403
    for invalid in ("http://fotos.local", "fotos.local outro.local"):
        with pytest.raises(ValueError) as caught:
            server.serve_index(index, "0.0.0.0", 0, allow_hosts=[invalid])
        assert (caught.value.code, caught.value.values) == ("bad_host", {"value": invalid})


@pytest.mark.slow
def test_a_page_on_a_network_trusts_its_proxy(index, page):
    forwarded = {"Origin": "https://us-demo.hf.space", "X_Forwarded_Host": "us-demo.hf.space"}
    assert page.ask("search", {"text": "azul"}, **forwarded)[0] == 403, "a local page must not trust a proxy"
    with served(index, "0.0.0.0", allow_hosts=["*"]) as client:  # as a Space does
        assert client.ask("search", {"text": "azul"}, Host="10.9.8.7", **forwarded)[0] == 200
        assert client.ask("search", {"text": "azul"}, png(3), **forwarded)[0] == 200
        assert client.ask("search", {"text": "azul"}, **forwarded | {"Origin": "https://other.hf.space"})[0] == 403
        assert not client.ask("status", {})[1]["local"]


def test_a_failed_request_has_the_security_headers_too(caplog):
    async def broken(scope, receive, send):
        raise RuntimeError("bug of the program")

    answer = TestClient(RequestGuard(broken, ["testserver"], behind_proxy=False)).get("/")
    assert (answer.status_code, answer.json()) == (500, {"error": "failed", "values": {}})
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert SECURITY_HEADERS.items() <= {key: answer.headers.get(key) for key in SECURITY_HEADERS}.items()
    assert "bug of the program" in caplog.text


# --- Sizes and connections ------------------------------------------------------------------------------------------


def test_bodies_are_limited(page):
    for body, expected_status, code in (
        (b"{", 400, "bad_question"),
        (b"[" * 90_000 + b"]" * 90_000, 400, "bad_question"),
        (b'{"k": NaN}', 400, "bad_question"),
        (b'{"k": ' + b"9" * 5000 + b"}", 400, "bad_question"),
        (json.dumps({"text": "x" * 20_000}).encode(), 400, "long_text"),
        (b"\xff\xfe", 400, "bad_question"),
    ):
        status, _, answer = page.post("search", body)
        assert (status, json.loads(answer)["error"]) == (expected_status, code)
    assert page.status_of("POST", "/api/search", Transfer_Encoding="chunked") == 411
    assert page.status_of("POST", "/api/search", Content_Length=str(MAX_UPLOAD_BYTES + MAX_QUESTION_BYTES + 1)) == 413
    for picture, code in ((bomb(), "too_many_pixels"), (b"nada disso", "no_picture"), (bytes(5_000_000), "no_picture")):
        assert page.ask("search", {}, picture) == (400, {"error": code, "values": {}})
    assert page.ask("classify", LABELS, bomb())[1]["error"] == "too_many_pixels"


@contextlib.contextmanager
def unfinished_question(page: PageClient, first: bytes, length: int):
    """Yield a socket that has sent the headers of a question and the first bytes of its body."""
    head = f"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}"
    with socket.create_connection(("127.0.0.1", page.port), timeout=20) as sent:
        sent.sendall(f"{head}\r\n\r\n".encode() + first)
        yield sent


def status_line(sent: socket.socket) -> bytes:
    return sent.recv(10_000).partition(b"\r\n")[0]


def test_the_line_of_a_question_is_limited(page):
    """It is refused before the rest of the body arrives."""
    with unfinished_question(page, b'{"labels": [' + b"1," * (MAX_QUESTION_BYTES // 2), MAX_UPLOAD_BYTES) as sent:
        assert b" 413 " in status_line(sent)
    for blanks, status in ((MAX_QUESTION_BYTES - 2, 200), (MAX_QUESTION_BYTES - 1, 413)):
        actual, _, answer = page.post("search", b"{}" + b" " * blanks + b"\n" + png(3))
        assert (actual, json.loads(answer).get("error")) == (status, None if status == 200 else "long_question")


def test_others_are_answered_while_a_question_is_parsed(page, monkeypatch):
    parsing, released, parse_body = threading.Event(), threading.Event(), server._split_question_and_upload

    def wait_and_parse(body):
        parsing.set(), released.wait(5)
        return parse_body(body)

    monkeypatch.setattr(server, "_split_question_and_upload", wait_and_parse)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(page.ask, "search", {"text": "azul"})
        assert parsing.wait(5)
        started = time.monotonic()
        assert page.get("")[0] == 200 and not answer.done() and time.monotonic() - started < 4
        released.set()
        assert answer.result()[0] == 200


def test_an_upload_has_a_deadline(page, monkeypatch):
    """The deadline holds even if bytes arrive steadily."""
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.8)
    with unfinished_question(page, b"{}\n" + bytes(150_000), 5_000_000) as sent:
        sent.settimeout(0.1)
        started, line = time.monotonic(), b""
        while not line and time.monotonic() - started < 4:
            sent.sendall(bytes(1000))
            with contextlib.suppress(TimeoutError):
                line = status_line(sent)
    assert b" 408 " in line


@pytest.mark.slow
def test_slow_uploads_do_not_block_other_visitors(page, monkeypatch):
    """Eight unfinished uploads hold all slots: another large upload is refused until their deadline has passed."""
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 3)
    monkeypatch.setattr(guard, "BODY_SLOT_TIMEOUT_S", 0.5)
    large = png(3) + bytes(MAX_QUESTION_BYTES)  # bytes after the end of a picture are ignored
    with contextlib.ExitStack() as slow:
        for _ in range(guard.MAX_LARGE_BODIES):
            slow.enter_context(unfinished_question(page, b"{}\n" + bytes(200_000), 300_000))
        time.sleep(0.5)
        assert page.ask("search", {}, large) == (503, {"error": "busy", "values": {}})
        assert page.ask("search", {"text": "azul"})[0] == page.ask("search", {}, png(3))[0] == 200, (
            "small questions need no slot"
        )
        monkeypatch.setattr(guard, "BODY_SLOT_TIMEOUT_S", 10)
        assert page.ask("search", {}, large)[0] == 200


@contextlib.contextmanager
def silent_visitors(page: PageClient, number: int, first: bytes = b""):
    """Yield sockets of visitors who have sent `first` and send nothing more."""
    with contextlib.ExitStack() as stack:
        sockets = [socket.create_connection(("127.0.0.1", page.port), timeout=20) for _ in range(number)]
        for connection in sockets:
            stack.enter_context(connection).sendall(first)
        yield sockets


def has_ended(sent: socket.socket) -> bool:
    """Return whether the page has closed a connection."""
    sent.settimeout(0.01)
    try:
        while sent.recv(100_000):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_silent_visitors_are_closed_for_new_ones(page, monkeypatch, capfd):
    """A new visitor is answered although many connections are open without a request."""
    monkeypatch.setattr(guard.resource, "getrlimit", lambda _: (guard.RESERVED_DESCRIPTORS + 2 * 20,) * 2)
    with silent_visitors(page, 60), silent_visitors(page, 60, b"GET / HTTP/1.1\r\nHost: loc") as sockets:
        started = time.monotonic()
        assert page.ask("search", {"text": "azul"})[0] == 200 and time.monotonic() - started < 2
        time.sleep(0.1)
        assert sum(not has_ended(connection) for connection in sockets) == 19
    assert not "".join(capfd.readouterr())


@contextlib.contextmanager
def unread_downloads(page: PageClient, folder: Path, number: int):
    """Yield sockets of visitors who have requested a long download and read nothing of it."""
    target = "/download?" + urllib.parse.urlencode({"path": folder / "longa.png"})
    with silent_visitors(page, number, f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as sockets:
        yield sockets


def received(sent: socket.socket) -> int:
    """Return the number of bytes that arrive until the page sends nothing more or closes the connection."""
    sent.settimeout(0.5)
    number = 0
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := sent.recv(1_000_000):
            number += len(part)
    return number


def first_bytes(sent: socket.socket) -> bytes:
    """Return the first bytes of an answer, b"" if the page has closed the connection."""
    with contextlib.suppress(ConnectionError):
        return sent.recv(12)
    return b""


def test_unread_downloads_are_closed_for_new_visitors(page, folder, monkeypatch):
    """The download that has been unread for the longest time is closed."""
    monkeypatch.setattr(guard.resource, "getrlimit", lambda _: (guard.RESERVED_DESCRIPTORS + 2 * 4,) * 2)
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(4):  # one after another, so that no download waits in the queue
            sockets += stack.enter_context(unread_downloads(page, folder, 1))
            assert sockets[-1].recv(100).startswith(b"HTTP/1.1 200")
        time.sleep(0.2)  # the buffers are full
        assert page.ask("search", {"text": "azul"})[0] == 200
        assert [received(connection) > LONG_BYTES for connection in (sockets[0], sockets[3])] == [False, True]


def test_downloads_in_the_queue_are_closed_for_new_visitors(page, folder, monkeypatch):
    monkeypatch.setattr(guard.resource, "getrlimit", lambda _: (guard.RESERVED_DESCRIPTORS + 2 * 8,) * 2)
    monkeypatch.setattr(guard, "MAX_QUEUED_QUESTIONS", 4)
    opening, released, open_original = threading.Event(), threading.Event(), server.PageSite._open_original

    def wait_and_open(*args):
        opening.set(), released.wait(10)
        return open_original(*args)

    monkeypatch.setattr(server.PageSite, "_open_original", wait_and_open)
    with unread_downloads(page, folder, 8) as sockets:
        assert opening.wait(5)
        time.sleep(0.2)  # the other downloads are in the queue
        assert page.ask("search", {"text": "azul"})[0] == 200
        released.set()
        assert [first_bytes(connection) for connection in sockets].count(b"HTTP/1.1 200") == 4


@pytest.mark.slow
def test_an_unread_download_is_closed(page, folder, monkeypatch):
    """A visitor who reads slowly gets the whole file."""
    monkeypatch.setattr(guard, "READ_TIMEOUT_S", 1)
    with unread_downloads(page, folder, 2) as (idle, slow):
        number, started = 0, time.monotonic()
        while time.monotonic() - started < 4:
            number += len(slow.recv(200_000))
            time.sleep(0.05)
        assert received(idle) < LONG_BYTES < number + received(slow)


def test_unfinished_request_headers_have_a_deadline(page, monkeypatch):
    """On a new connection, after an answer, and if they arrive byte by byte."""
    monkeypatch.setattr(guard, "HEADER_TIMEOUT_S", 0.4)
    request = b"GET /static/icon.svg HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        silent_visitors(page, 2) as new,
        silent_visitors(page, 2, request) as answered,
        silent_visitors(page, 2, request + request[:30]) as unfinished,
    ):
        for _ in range(8):
            time.sleep(0.1)
            for connection in (new[0], answered[0], unfinished[0]):
                with contextlib.suppress(OSError):
                    connection.sendall(b"G")
        assert all(map(has_ended, (*new, *answered, *unfinished)))


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a test can advance."""

    skipped_s = 0.0

    def time(self) -> float:
        return super().time() + self.skipped_s

    async def skip(self, seconds: float) -> None:
        self.skipped_s += seconds
        for _ in range(10):  # runs the callbacks that are due
            await asyncio.sleep(0)


def test_every_answer_restarts_the_deadline_for_headers():
    """A connection with a request in time stays open; a connection with unfinished headers is closed."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def visit(loop: SkippingLoop) -> None:
        transport = Mock(**{"is_closing.return_value": False, "get_extra_info.return_value": None})
        transport.get_write_buffer_size.return_value = 0
        config = Config(app, log_level="error", lifespan="off")
        config.load()
        connection = guard.LimitedHttpProtocol(config, ServerState(), {}, loop)
        connection.connection_made(transport)
        for number in (1, 2, 3):
            connection.data_received(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await loop.skip(0)  # the answer
            await loop.skip(0.4 * guard.HEADER_TIMEOUT_S)
            written = b"".join(call.args[0] for call in transport.write.call_args_list)
            assert written.count(b" 204 ") == number and not transport.abort.called
        connection.data_received(b"GET / HT")
        await loop.skip(0.4 * guard.HEADER_TIMEOUT_S)
        assert not transport.abort.called
        await loop.skip(0.4 * guard.HEADER_TIMEOUT_S)
        assert transport.abort.called

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(visit(runner.get_loop()))


@pytest.mark.slow
def test_the_image_encoder_is_loaded_when_the_page_opens(index, monkeypatch):
    """A picture of a visitor waits for it beyond the time limit of a question; searches by words do not wait."""
    monkeypatch.setattr(guard, "QUESTION_TIMEOUT_S", 2)
    loading, released = threading.Event(), threading.Event()
    monkeypatch.setattr(answers.PageAnswers, "prepare_images", lambda self: loading.set() or released.wait(30))
    with served(index) as client, ThreadPoolExecutor(1) as threads:
        assert loading.wait(10)
        upload = threads.submit(client.ask, "search", {}, png(3))
        assert client.ask("search", {"text": "azul"})[0] == 200 and not upload.done()
        released.set()
        assert upload.result()[0] == 200


def test_broken_requests_leave_nothing_in_the_log(page, capfd):
    capfd.readouterr()
    for question in ({"k": 0}, None, {"like": "/etc/passwd"}, {"text": "'\"%;--"}, {"folder": "/\0"}):
        assert page.ask("search", question)[0] in (200, 400, 404)
    for path in ("a\0b", "\ud800", "'", "/" * 4000):
        page.get("picture", path)
    for sent in (b"{}\n", b"{}\n" + bytes(150_000)):
        with unfinished_question(page, sent, 500_000):
            time.sleep(0.2)
    time.sleep(0.3)  # the connections are closed
    assert not "".join(capfd.readouterr()).strip()


# --- Times -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_picture_that_takes_too_long_is_refused(page):
    page.ask("search", {}, png(3))  # starts the decoder process
    with ThreadPoolExecutor(2) as threads:
        started = time.monotonic()
        refused = threads.submit(page.ask, "search", {}, slow_jpeg())
        time.sleep(0.3)
        assert threads.submit(page.ask, "search", {"text": "azul"}).result()[0] == 200
        assert not refused.done() or time.monotonic() - started > DECODE_TIMEOUT_S, (
            "a search by words does not wait for a picture"
        )
        assert refused.result()[1]["error"] == "no_picture" and time.monotonic() - started < DECODE_TIMEOUT_S + 20
    assert page.ask("search", {}, png(3))[0] == 200


@pytest.mark.slow
def test_questions_are_answered_one_at_a_time_and_abandoned_after_the_time_limit(monkeypatch):
    monkeypatch.setattr(guard, "QUESTION_TIMEOUT_S", 0.3)

    async def visits() -> None:
        queue, released, running = guard.QuestionQueue(), threading.Event(), []

        def alone() -> int:
            running.append(1)
            assert len(running) == 1
            time.sleep(0.01)
            return running.pop()

        answers = await asyncio.gather(*(queue.ask(alone) for _ in range(9)))
        assert answers == [1] * 9
        with pytest.raises(ZeroDivisionError):
            await queue.ask(lambda: 1 / 0)
        for _ in range(guard.MAX_ABANDONED_THREADS):
            with pytest.raises(RequestRefusedError, match="too_slow"):
                await queue.ask(released.wait)
            if queue._abandoned_count < guard.MAX_ABANDONED_THREADS:
                assert await queue.ask(lambda: "next") == "next"
        with pytest.raises(RequestRefusedError, match="busy"):
            await queue.ask(lambda: "no thread is left")
        released.set()
        await asyncio.sleep(0.2)
        assert await queue.ask(lambda: "again") == "again"

    asyncio.run(visits())


def test_a_full_queue_refuses_questions(monkeypatch):
    monkeypatch.setattr(guard, "MAX_QUEUED_QUESTIONS", 5)

    async def visits() -> None:
        queue = guard.QuestionQueue()
        for _ in range(2):
            results = await asyncio.gather(*(queue.ask(lambda: "answered") for _ in range(7)), return_exceptions=True)
            assert results[:5] == ["answered"] * 5
            assert [(error.code, error.status) for error in results[5:]] == [("busy", 503)] * 2

    asyncio.run(visits())


@pytest.mark.slow
def test_the_decoder_process_returns_the_same_image(folder):
    process = decoder.DecoderProcess()
    try:
        for mode in ("RGB", "CMYK", "LA", "I;16", "P", "1"):
            kind, image = "JPEG" if mode in ("RGB", "CMYK") else "PNG", made_pictures()[11]
            image = Image.new(mode, (9, 7), 300) if mode == "I;16" else image.convert(mode)
            image.save(file := io.BytesIO(), kind, **({"transparency": 0} if mode == "P" else {}))
            actual, expected = (
                process.decode(file.getvalue()),
                convert_image_to_rgb_on_white(decode_image({"bytes": file.getvalue()})),
            )
            assert (actual.mode, actual.size, actual.tobytes()) == (expected.mode, expected.size, expected.tobytes())
        os.kill(process._process.pid, 9)
        with pytest.raises(BadImage) as caught:
            process.decode(file.getvalue())
        assert caught.value.reason == "unreadable image"
        assert process.decode(file.getvalue()).size == (32, 32)
    finally:
        process.close()


@pytest.mark.slow
def test_a_large_picture_is_shown_upright_and_reduced(tmp_path, saved_tiny_folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation of a phone that was held upright
    photo = Image.new("RGB", (4000, 3000), (200, 30, 30))
    photo.paste((30, 30, 200), (0, 0, 2000, 3000))  # its upper half
    (tmp_path / "fotos").mkdir()
    photo.save(tmp_path / "fotos" / "alta.jpg", exif=exif)
    with served(made_index(tmp_path / "i.lance", tmp_path / "fotos", saved_tiny_folder)) as client:
        path = str(tmp_path / "fotos" / "alta.jpg")
        view = Image.open(io.BytesIO(client.get("picture", path)[2]))
        assert view.size == (1200, 1600) and view.getpixel((600, 300))[2] > 150 > view.getpixel((600, 1300))[2]
        assert not view.getexif(), "the view does not reveal where the picture was taken"
        status, headers, body = client.get("download", path)
        assert (status, body) == (200, Path(path).read_bytes())
        assert headers["content-disposition"].startswith("attachment;")


@pytest.mark.slow
def test_the_file_that_was_checked_is_the_file_that_is_sent(saved_tiny_folder, tmp_path, monkeypatch):
    """The file is replaced by a link to a private picture while it is decoded."""
    made, private = save_folder(tmp_path / "fotos"), tmp_path / "private.png"
    private.write_bytes(png(7) + b"segredo")
    row, decode = made / "azul" / "azul inteiro.png", decoder.DecoderProcess.decode
    data = row.read_bytes()

    def swap_and_decode(*args):
        row.unlink()
        row.symlink_to(private)
        return decode(*args)

    with served(made_index(tmp_path / "i.lance", made, saved_tiny_folder)) as client:
        monkeypatch.setattr(decoder.DecoderProcess, "decode", swap_and_decode)
        assert client.get("download", str(row))[::2] == (200, data) and b"segredo" in row.read_bytes()
        assert client.get("download", str(row))[0] == 404


def test_the_connection_limit_depends_on_the_file_descriptor_limit(monkeypatch):
    for limit, expected in ((256, 64), (928, 400), (guard.resource.RLIM_INFINITY, 400)):
        monkeypatch.setattr(guard.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert guard.compute_connection_limit() == expected
    monkeypatch.setattr(guard, "resource", None)
    assert guard.compute_connection_limit() == guard.MAX_CONNECTIONS
