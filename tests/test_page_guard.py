"""What the page refuses, bounds and gives up: attacks on a page that runs in this process."""

import asyncio
import contextlib
import io
import json
import os
import resource
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
from page_process import Asked, served
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
from capivara_search.page.server import create_page_server
from capivara_search.picture_reading import flatten_on_white
from capivara_search.table import FOLDER_KEY_PREFIX

PICTURE_S = 2
LONG_BYTES = 30_000_000  # of a download, more than the buffers of its sockets hold
LABELS = {"labels": ["azul", "verde"]}
FOREIGN_HOSTS = ("evil.example:80", "evil@localhost", "localhost.evil.example", "10.9.8.7", "[::2]", "")
FOREIGN = ("http://evil.example", "null", "http://localhost:7860", "http://127.0.0.1:1", "http://[::1")


def slow_jpeg(scans: int = 5000) -> bytes:
    """A JPEG of 3,000 x 3,000 in some hundred kB, whose last scan comes again and again."""
    Image.new("L", (3000, 3000), 128).save(file := io.BytesIO(), "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_folder(tmp_path_factory.mktemp("guard") / "fotos")
    (folder / "longa.png").write_bytes(png(3))
    os.truncate(folder / "longa.png", LONG_BYTES)  # after its end, a picture may have what it likes
    return folder


@pytest.fixture(scope="module")
def index(folder, saved_tiny_folder):
    return made_index(folder.parent / "fotos.lance", folder, saved_tiny_folder)


@pytest.fixture(scope="module")
def page(index):
    with contextlib.ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "DECODE_TIMEOUT_S", PICTURE_S)
            asked = opened.enter_context(served(index))
        yield asked


@pytest.fixture
def row(folder):
    """Path of a picture of the index."""
    return str(folder / "azul" / "azul inteiro.png")


# --- Paths -----------------------------------------------------------------------------------------------------------


def outside(folder: Path, tmp_path: Path) -> list[str]:
    """Paths that are no rows: each hangs, leaks or tells something where it is opened."""
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
def test_only_rows_are_opened(page, folder, row, tmp_path, route):
    status, headers, body = page.get(route, row)
    assert status == 200 and headers["content-type"].startswith("image/") and Image.open(io.BytesIO(body)).size[0] == 32
    answers = {page.get(route, path)[::2] for path in outside(folder, tmp_path)} | {page.get(route)[::2]}
    assert len(answers) == 1 and answers.pop()[0] == 404, "answers that differ tell which files there are"


@pytest.mark.parametrize("name", ["search", "copies"])
def test_only_rows_are_asked_about(page, folder, tmp_path, name):
    answers = set()
    for path in (path for path in outside(folder, tmp_path) if path):
        answers.add(str(page.ask(name, {"like": path}, Origin=page.url)))
    assert answers == {"(404, {'error': 'gone', 'values': {}})"}


def test_a_row_whose_file_has_become_another_is_not_given_away(folder, saved_tiny_folder, tmp_path):
    """As in an index that somebody else has made, whose rows may name any file."""
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
    with served(index) as asked:
        for path in map(str, (*rows.values(), notes)):
            assert asked.get("download", path)[0] == 404
            status, headers, body = asked.get("picture", path)
            assert status == 200 and headers["content-type"] == "image/webp" and b"segredo" not in body


def test_folders_that_an_index_of_others_names_are_not_opened(folder, saved_tiny_folder, tmp_path, monkeypatch):
    """Its rows may name all pictures of this machine, and its folders "/"."""
    index = made_index(tmp_path / "i.lance", folder, saved_tiny_folder)
    index._table.set_metadata({FOLDER_KEY_PREFIX + "/": ""})
    row = str(folder / "azul" / "azul inteiro.png")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # as on another machine
    with served(index) as asked:
        assert asked.get("download", row)[0] == 404
        assert asked.get("picture", row)[1]["content-type"] == "image/webp"
        index.add(folder)
        assert asked.get("download", row)[0] == 200


def test_what_is_served_beside_pictures(page):
    for path in ("docs", "openapi.json", "static/", "static/../server.py", "static/%2e%2e/server.py", "words/pt.json"):
        assert page.get(path)[0] == 404
    for method, path in (("POST", "/"), ("PUT", "/api/search"), ("DELETE", "/picture"), ("GET", "/api/search")):
        assert page.status_of(method, path, Content_Length="0") in (404, 405)


# --- Who asks for what -----------------------------------------------------------------------------------------------


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
def test_another_page_can_show_no_picture_of_this_one(page, row, site):
    """A picture in a page, which comes without an origin, would tell by its size which files there are."""
    for route in ("thumbnail", "picture", "download"):
        assert page.get(route, row, Sec_Fetch_Site=site)[0] == 403
        status, headers, _ = page.get(route, row, Sec_Fetch_Site="same-origin")
        assert status == 200 and headers["cross-origin-resource-policy"] == "same-origin"
    status, headers, _ = page.get("", Sec_Fetch_Site=site)
    assert status == 200 and "frame-ancestors 'none'" in headers["content-security-policy"], "a link to it is fine"


def test_only_this_machine_is_answered(page):
    assert {page.get("", Host=host)[0] for host in FOREIGN_HOSTS} == {400}, "a foreign name was answered"
    assert page.get("", Host=f"localhost:{page.port}")[0] == 200
    policy = page.get("")[1]["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "http" not in policy


def test_on_a_network_a_page_answers_to_its_own_names(index):
    """A name of somebody else's that leads to this machine makes his page and this one the same to a browser."""
    with served(index, "0.0.0.0", allow_hosts=["Fotos.local"]) as asked:
        for host in FOREIGN_HOSTS:
            names = {"Host": host, "Origin": f"http://{host}"}
            assert asked.ask("search", {"text": "azul"}, **names)[0] == 400, host
            assert asked.ask("search", {"text": "azul"}, **names, X_Forwarded_Host="localhost")[0] == 400, host
            assert asked.get("", Host=host)[0] == 400, host
        for host in (socket.gethostname(), "localhost", "127.0.0.1", "fotos.local"):
            names = {"Host": f"{host}:{asked.port}", "Origin": f"http://{host}:{asked.port}"}
            assert asked.ask("search", {"text": "azul"}, **names)[0] == 200, host
        other = Asked(asked.url.replace("127.0.0.1", "127.0.0.2"))  # another address of this machine
        assert other.ask("search", {"text": "azul"}, Origin=other.url)[0] == 200
        assert asked.ask("search", {}, X_Forwarded_Host="fotos.local", Origin="https://fotos.local")[0] == 200
        assert asked.ask("search", {}, X_Forwarded_Host="evil.example", Origin="https://evil.example")[0] == 403
    for wrong in ("http://fotos.local", "fotos.local outro.local"):
        with pytest.raises(ValueError, match="--allow-host must be a name"):
            create_page_server(index, "0.0.0.0", 0, allow_hosts=[wrong])


@pytest.mark.slow
def test_a_page_that_is_open_to_a_network(index, page):
    forwarded = {"Origin": "https://us-demo.hf.space", "X_Forwarded_Host": "us-demo.hf.space"}
    assert page.ask("search", {"text": "azul"}, **forwarded)[0] == 403, "a proxy is believed where there may be none"
    with served(index, "0.0.0.0", allow_hosts=["*"]) as asked:  # as a Space does
        assert asked.ask("search", {"text": "azul"}, Host="10.9.8.7", **forwarded)[0] == 200
        assert asked.ask("search", {"text": "azul"}, png(3), **forwarded)[0] == 200
        assert asked.ask("search", {"text": "azul"}, **forwarded | {"Origin": "https://other.hf.space"})[0] == 403
        assert not asked.ask("status", {})[1]["local"]


def test_an_answer_that_fails_has_the_headers_too(caplog):
    async def broken(scope, receive, send):
        raise RuntimeError("of the program, not of the visitor")

    answer = TestClient(RequestGuard(broken, ["testserver"], behind_proxy=False)).get("/")
    assert (answer.status_code, answer.json()) == (500, {"error": "failed", "values": {}})
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert SECURITY_HEADERS.items() <= {key: answer.headers.get(key) for key in SECURITY_HEADERS}.items()
    assert "of the program" in caplog.text


# --- How much --------------------------------------------------------------------------------------------------------


def test_bodies_are_bounded(page):
    for body, status, said in (
        (b"{", 400, "bad_question"),
        (b"[" * 90_000 + b"]" * 90_000, 400, "bad_question"),
        (b'{"k": NaN}', 400, "bad_question"),
        (b'{"k": ' + b"9" * 5000 + b"}", 400, "bad_question"),
        (json.dumps({"text": "x" * 20_000}).encode(), 400, "long_text"),
        (b"\xff\xfe", 400, "bad_question"),
    ):
        found, _, answer = page.post("search", body)
        assert (found, json.loads(answer)["error"]) == (status, said)
    assert page.status_of("POST", "/api/search", Transfer_Encoding="chunked") == 411
    assert page.status_of("POST", "/api/search", Content_Length=str(MAX_UPLOAD_BYTES + MAX_QUESTION_BYTES + 1)) == 413
    for given, said in ((bomb(), "too_many_pixels"), (b"nada disso", "no_picture"), (bytes(5_000_000), "no_picture")):
        assert page.ask("search", {}, given) == (400, {"error": said, "values": {}})
    assert page.ask("classify", LABELS, bomb())[1]["error"] == "too_many_pixels"


@contextlib.contextmanager
def begun(page: Asked, first: bytes, length: int):
    """The socket of a question that has sent its head and the first of its bytes."""
    head = f"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}"
    with socket.create_connection(("127.0.0.1", page.port), timeout=20) as sent:
        sent.sendall(f"{head}\r\n\r\n".encode() + first)
        yield sent


def status_line(sent: socket.socket) -> bytes:
    return sent.recv(10_000).partition(b"\r\n")[0]


def test_the_line_of_a_question_is_bounded(page):
    """Before the rest of its body has come."""
    with begun(page, b'{"labels": [' + b"1," * (MAX_QUESTION_BYTES // 2), MAX_UPLOAD_BYTES) as sent:
        assert b" 413 " in status_line(sent)
    for blanks, status in ((MAX_QUESTION_BYTES - 2, 200), (MAX_QUESTION_BYTES - 1, 413)):
        found, _, answer = page.post("search", b"{}" + b" " * blanks + b"\n" + png(3))
        assert (found, json.loads(answer).get("error")) == (status, None if status == 200 else "long_question")


def test_others_are_answered_while_a_question_is_parsed(page, monkeypatch):
    begun, released, read = threading.Event(), threading.Event(), server._parse_body

    def waiting(body):
        begun.set(), released.wait(5)
        return read(body)

    monkeypatch.setattr(server, "_read_picture_bytes", waiting)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(page.ask, "search", {"text": "azul"})
        assert begun.wait(5)
        started = time.monotonic()
        assert page.get("")[0] == 200 and not asked.done() and time.monotonic() - started < 4
        released.set()
        assert asked.result()[0] == 200


def test_an_upload_has_a_time(page, monkeypatch):
    """However steadily it comes."""
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.8)
    with begun(page, b"{}\n" + bytes(150_000), 5_000_000) as sent:
        sent.settimeout(0.1)
        started, line = time.monotonic(), b""
        while not line and time.monotonic() - started < 4:
            sent.sendall(bytes(1000))
            with contextlib.suppress(TimeoutError):
                line = status_line(sent)
    assert b" 408 " in line


@pytest.mark.slow
def test_slow_visitors_keep_nobody_from_asking(page, monkeypatch):
    """Eight hold all places and send nothing more: who waits too long is told so, and soon they are gone."""
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 3)
    monkeypatch.setattr(guard, "BODY_SLOT_TIMEOUT_S", 0.5)
    large = png(3) + bytes(MAX_QUESTION_BYTES)  # after its end, a picture may have what it likes
    with contextlib.ExitStack() as slow:
        for _ in range(guard.MAX_LARGE_BODIES):
            slow.enter_context(begun(page, b"{}\n" + bytes(200_000), 300_000))
        time.sleep(0.5)
        assert page.ask("search", {}, large) == (503, {"error": "busy", "values": {}})
        assert page.ask("search", {"text": "azul"})[0] == page.ask("search", {}, png(3))[0] == 200, (
            "small ones need none"
        )
        monkeypatch.setattr(guard, "BODY_SLOT_TIMEOUT_S", 10)
        assert page.ask("search", {}, large)[0] == 200


@contextlib.contextmanager
def silent(page: Asked, number: int, first: bytes = b""):
    """Sockets of visitors who have sent `first`, and nothing more."""
    with contextlib.ExitStack() as stack:
        sockets = [socket.create_connection(("127.0.0.1", page.port), timeout=20) for _ in range(number)]
        for one in sockets:
            stack.enter_context(one).sendall(first)
        yield sockets


def has_ended(sent: socket.socket) -> bool:
    """Whether the page has closed a connection by now."""
    sent.settimeout(0.01)
    try:
        while sent.recv(100_000):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_silent_visitors_make_room(page, monkeypatch, capfd):
    """However many hold connections that ask nothing, the next one is answered."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (guard.RESERVED_DESCRIPTORS + 2 * 20,) * 2)
    with silent(page, 60), silent(page, 60, b"GET / HTTP/1.1\r\nHost: loc") as sockets:
        started = time.monotonic()
        assert page.ask("search", {"text": "azul"})[0] == 200 and time.monotonic() - started < 2
        time.sleep(0.1)
        assert sum(not has_ended(one) for one in sockets) == 19
    assert not "".join(capfd.readouterr())


@contextlib.contextmanager
def unread(page: Asked, folder: Path, number: int):
    """Sockets of visitors who have asked for a long download and read nothing of it."""
    target = "/download?" + urllib.parse.urlencode({"path": folder / "longa.png"})
    with silent(page, number, f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as sockets:
        yield sockets


def received(sent: socket.socket) -> int:
    """Bytes that come until the page is silent, or closes the connection."""
    sent.settimeout(0.5)
    number = 0
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := sent.recv(1_000_000):
            number += len(part)
    return number


def first_bytes(sent: socket.socket) -> bytes:
    """The first bytes of an answer; none if the page has closed the connection."""
    with contextlib.suppress(ConnectionError):
        return sent.recv(12)
    return b""


@pytest.mark.slow
def test_unread_downloads_make_room(page, folder, monkeypatch):
    """The one that has been unread for the longest time is closed."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (guard.RESERVED_DESCRIPTORS + 2 * 4,) * 2)
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(4):  # one after another, so that none waits for its turn
            sockets += stack.enter_context(unread(page, folder, 1))
            assert sockets[-1].recv(100).startswith(b"HTTP/1.1 200")
        time.sleep(0.2)  # the buffers are full
        assert page.ask("search", {"text": "azul"})[0] == 200
        assert [received(one) > LONG_BYTES for one in (sockets[0], sockets[3])] == [False, True]


def test_downloads_that_wait_for_their_turn_make_room(page, folder, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (guard.RESERVED_DESCRIPTORS + 2 * 8,) * 2)
    monkeypatch.setattr(guard, "MAX_QUEUED_QUESTIONS", 4)
    begun, released, original = threading.Event(), threading.Event(), server.PageSite._open_original

    def waiting(*args):
        begun.set(), released.wait(10)
        return original(*args)

    monkeypatch.setattr(server.PageSite, "_open_original", waiting)
    with unread(page, folder, 8) as sockets:
        assert begun.wait(5)
        time.sleep(0.2)  # the others have asked
        assert page.ask("search", {"text": "azul"})[0] == 200
        released.set()
        assert [first_bytes(one) for one in sockets].count(b"HTTP/1.1 200") == 4


@pytest.mark.slow
def test_a_download_that_is_not_read_is_given_up(page, folder, monkeypatch):
    """Who reads slowly is waited for."""
    monkeypatch.setattr(guard, "READ_TIMEOUT_S", 1)
    with unread(page, folder, 2) as (idle, slow):
        number, started = 0, time.monotonic()
        while time.monotonic() - started < 4:
            number += len(slow.recv(200_000))
            time.sleep(0.05)
        assert received(idle) < LONG_BYTES < number + received(slow)


def test_a_head_that_does_not_come_is_not_waited_for(page, monkeypatch):
    """Neither of a new connection, nor after an answer, nor where it comes letter by letter."""
    monkeypatch.setattr(guard, "HEADER_TIMEOUT_S", 0.4)
    asked = b"GET /static/icon.svg HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with silent(page, 2) as new, silent(page, 2, asked) as answered, silent(page, 2, asked + asked[:30]) as begun:
        for _ in range(8):
            time.sleep(0.1)
            for one in (new[0], answered[0], begun[0]):
                with contextlib.suppress(OSError):
                    one.sendall(b"G")
        assert all(map(has_ended, (*new, *answered, *begun)))


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a test moves on."""

    skipped_s = 0.0

    def time(self) -> float:
        return super().time() + self.skipped_s

    async def skip(self, seconds: float) -> None:
        self.skipped_s += seconds
        for _ in range(10):  # what is due by then is run
            await asyncio.sleep(0)


def test_every_answer_starts_the_time_for_the_next_head():
    """A connection that asks again in time stays, however old it is; one that does not end a head is closed."""

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
        for asked in (1, 2, 3):
            connection.data_received(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await loop.skip(0)  # the answer
            await loop.skip(0.4 * guard.HEADER_TIMEOUT_S)
            written = b"".join(call.args[0] for call in transport.write.call_args_list)
            assert written.count(b" 204 ") == asked and not transport.abort.called
        connection.data_received(b"GET / HT")
        await loop.skip(0.4 * guard.HEADER_TIMEOUT_S)
        assert not transport.abort.called
        await loop.skip(0.4 * guard.HEADER_TIMEOUT_S)
        assert transport.abort.called

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(visit(runner.get_loop()))


@pytest.mark.slow
def test_the_image_tower_is_loaded_when_the_page_opens(index, monkeypatch):
    """A visitor's picture waits for that, and is not given up for it; words do not wait."""
    monkeypatch.setattr(guard, "QUESTION_TIMEOUT_S", 2)
    begun, released = threading.Event(), threading.Event()
    monkeypatch.setattr(answers.PageAnswers, "prepare_images", lambda self: begun.set() or released.wait(30))
    with served(index) as asked, ThreadPoolExecutor(1) as threads:
        assert begun.wait(10)
        upload = threads.submit(asked.ask, "search", {}, png(3))
        assert asked.ask("search", {"text": "azul"})[0] == 200 and not upload.done()
        released.set()
        assert upload.result()[0] == 200


def test_what_is_broken_leaves_nothing_in_the_log(page, capfd):
    capfd.readouterr()
    for question in ({"k": 0}, None, {"like": "/etc/passwd"}, {"text": "'\"%;--"}, {"folder": "/\0"}):
        assert page.ask("search", question)[0] in (200, 400, 404)
    for path in ("a\0b", "\ud800", "'", "/" * 4000):
        page.get("picture", path)
    for sent in (b"{}\n", b"{}\n" + bytes(150_000)):
        with begun(page, sent, 500_000):
            time.sleep(0.2)
    time.sleep(0.3)  # the visitors have gone
    assert not "".join(capfd.readouterr()).strip()


# --- How long --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_picture_that_takes_too_long_is_given_up(page):
    page.ask("search", {}, png(3))  # the process that decodes has started
    with ThreadPoolExecutor(2) as threads:
        started = time.monotonic()
        refused = threads.submit(page.ask, "search", {}, slow_jpeg())
        time.sleep(0.3)
        assert threads.submit(page.ask, "search", {"text": "azul"}).result()[0] == 200
        assert not refused.done() or time.monotonic() - started > PICTURE_S, "who asks in words waits for no picture"
        assert refused.result()[1]["error"] == "no_picture" and time.monotonic() - started < PICTURE_S + 20
    assert page.ask("search", {}, png(3))[0] == 200


def test_the_queue(monkeypatch):
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


def test_a_queue_has_an_end(monkeypatch):
    monkeypatch.setattr(guard, "MAX_QUEUED_QUESTIONS", 5)

    async def visits() -> None:
        queue = guard.QuestionQueue()
        for _ in range(2):
            found = await asyncio.gather(*(queue.ask(lambda: "answered") for _ in range(7)), return_exceptions=True)
            assert found[:5] == ["answered"] * 5
            assert [(one.code, one.status) for one in found[5:]] == [("busy", 503)] * 2

    asyncio.run(visits())


@pytest.mark.slow
def test_the_decoding_process_gives_the_same_image(folder):
    decode = decoder.DecoderProcess()
    try:
        for mode in ("RGB", "CMYK", "LA", "I;16", "P", "1"):
            kind, image = "JPEG" if mode in ("RGB", "CMYK") else "PNG", made_pictures()[11]
            image = Image.new(mode, (9, 7), 300) if mode == "I;16" else image.convert(mode)
            image.save(file := io.BytesIO(), kind, **({"transparency": 0} if mode == "P" else {}))
            there, here = decode.decode(file.getvalue()), flatten_on_white(decode_image({"bytes": file.getvalue()}))
            assert (there.mode, there.size, there.tobytes()) == (here.mode, here.size, here.tobytes())
        os.kill(decode._process.pid, 9)
        with pytest.raises(BadImage, match="broke its reader"):
            decode.decode(file.getvalue())
        assert decode.decode(file.getvalue()).size == (32, 32)
    finally:
        decode.close()


@pytest.mark.slow
def test_a_large_picture_is_sent_upright_and_small(tmp_path, saved_tiny_folder):
    lying = Image.Exif()
    lying[0x0112] = 6  # a telephone that was held upright
    photo = Image.new("RGB", (4000, 3000), (200, 30, 30))
    photo.paste((30, 30, 200), (0, 0, 2000, 3000))  # its upper half
    (tmp_path / "fotos").mkdir()
    photo.save(tmp_path / "fotos" / "alta.jpg", exif=lying)
    with served(made_index(tmp_path / "i.lance", tmp_path / "fotos", saved_tiny_folder)) as asked:
        path = str(tmp_path / "fotos" / "alta.jpg")
        shown = Image.open(io.BytesIO(asked.get("picture", path)[2]))
        assert shown.size == (1200, 1600) and shown.getpixel((600, 300))[2] > 150 > shown.getpixel((600, 1300))[2]
        assert not shown.getexif(), "where it was taken is none of the browser's business"
        status, headers, body = asked.get("download", path)
        assert (status, body) == (200, Path(path).read_bytes())
        assert headers["content-disposition"].startswith("attachment;")


@pytest.mark.slow
def test_what_was_checked_is_what_is_sent(saved_tiny_folder, tmp_path, monkeypatch):
    """The file of a row is swapped for a link to a private picture while it is decoded."""
    made, private = save_folder(tmp_path / "fotos"), tmp_path / "private.png"
    private.write_bytes(png(7) + b"segredo")
    row, image = made / "azul" / "azul inteiro.png", decoder.DecoderProcess.decode
    data = row.read_bytes()

    def swapped(*args):
        row.unlink()
        row.symlink_to(private)
        return image(*args)

    with served(made_index(tmp_path / "i.lance", made, saved_tiny_folder)) as asked:
        monkeypatch.setattr(decoder.DecoderProcess, "decode", swapped)
        assert asked.get("download", str(row))[::2] == (200, data) and b"segredo" in row.read_bytes()
        assert asked.get("download", str(row))[0] == 404


def test_connections_are_fewer_where_fewer_files_may_be_open(monkeypatch):
    for limit, most in ((256, 64), (928, 400), (resource.RLIM_INFINITY, 400)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert guard.connection_limit() == most
