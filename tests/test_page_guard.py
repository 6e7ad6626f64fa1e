"""What the page refuses, bounds and gives up: attacks on a page that runs in this process."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import made_space
import pytest
from PIL import Image
from test_space_page import asked, free_port
from tiny import randomise, tiny_config

from capivara_search.common.image_files import decode_image
from hub_upload.space.answers import Demo, Refusal
from hub_upload.space.collection import open_pictures
from hub_upload.space.index import Index, build_index, open_album
from modeling_capivara import CapivaraModel
from modeling_capivara.embedder import CapivaraEmbedder

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")

import gradio as gr

from hub_upload.space import decoder, guard, turns, uploads
from hub_upload.space.app import SESSIONS_KEPT, serve

PICTURE_S = 2
FORM = "multipart/form-data; boundary=X"
PICTURE_QUESTIONS = {"search_by_image": [6], "similar_captions": [6], "classify": ["azul\nverde", "{}"]}


class Page:
    """A page, and what a program sends to it."""

    def __init__(self, blocks: gr.Blocks, port: int):
        self.blocks, self.port, self.url = blocks, port, f"http://127.0.0.1:{port}"
        self.folder = Path(blocks.app.uploaded_file_dir)
        self.numbers = {event.api_name: number for number, event in blocks.fns.items()}

    def ask(self, name: str, *data: object, session: str = "s", **headers: str) -> tuple[int, str]:
        question = {"data": data, "fn_index": self.numbers[name], "session_hash": session}
        status, _, body = self.post("/gradio_api/run/predict", json.dumps(question).encode(), **headers)
        return status, body.decode()

    def post(self, path: str, body: bytes, content_type: str = "application/json", **headers: str):
        return asked(self.url + path, body, Content_Type=content_type, **headers)

    def upload(self, file: bytes, name: str = "a.png", **headers: str) -> str:
        status, _, body = self.post("/gradio_api/upload", form(file, name), FORM, **headers)
        assert status == 200, body
        return json.loads(body)[0]

    def stored(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


def form(file: bytes, name: str = "a.png") -> bytes:
    head = f'--X\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + file + b"\r\n--X--\r\n"


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def slow_jpeg(scans: int = 5000) -> bytes:
    """A JPEG of 3,000 x 3,000 in some hundred kB, whose last scan comes again and again."""
    Image.new("L", (3000, 3000), 128).save(file := io.BytesIO(), "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("guard")
    made_space.save_dataset(folder / "areas")
    embedder = CapivaraEmbedder("tiny", randomise(CapivaraModel(tiny_config())).eval(), tiny_processor, "float32")
    return Demo([build_index(open_album(open_pictures(str(folder / "areas")), folder), embedder, folder)])


@pytest.fixture(scope="module")
def page(demo):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "PICTURE_S", PICTURE_S)
        blocks = serve(demo, "127.0.0.1", port := free_port())
    yield Page(blocks, port)
    uploaded = Path(blocks.app.uploaded_file_dir)
    blocks.close()
    assert not uploaded.exists(), "uploads outlived the page"


@pytest.fixture
def upload(page):
    """A picture that the page has got, as its browser names it."""
    return {"path": page.upload(png(made_space.made_pictures()[0])), "meta": {"_type": "gradio.FileData"}}


# --- Paths -----------------------------------------------------------------------------------------------------------


def outside(page: Page, tmp_path: Path) -> list[object]:
    """Paths that lead to no upload: each hangs, leaks or tells something where it is opened."""
    private, inside = tmp_path / "private.png", page.folder / "links"
    private.write_bytes(png(made_space.made_pictures()[7]))
    os.mkfifo(tmp_path / "fifo.png")
    inside.mkdir(exist_ok=True)
    for name, target in (("link.png", private), ("zero.png", "/dev/zero"), ("fd.png", "/proc/self/fd/1")):
        (inside / name).unlink(missing_ok=True)
        (inside / name).symlink_to(target)
    if not (inside / "fifo.png").exists():
        os.mkfifo(inside / "fifo.png")
    paths = [private, tmp_path / "missing.png", tmp_path / "fifo.png", inside, *sorted(inside.iterdir())]
    paths += [
        page.folder / "missing.png",
        f"{page.folder}/../{tmp_path.name}/private.png",
        f"{page.folder}/links/../..",
    ]
    paths += ["/etc/shadow", "/etc/passwd", "/proc/self/fd/1", "/proc/self/environ", "/dev/zero", "/dev/stdin", "/"]
    paths += [
        "http://127.0.0.1:9/x.png",
        "file:///etc/passwd",
        "a\0b",
        "\ud800",
        "x" * 5000,
        "",
        "setup.cfg",
        5,
        ["/etc"],
    ]
    return [path if isinstance(path, (str, int, list)) else str(path) for path in paths]


@pytest.mark.parametrize("name", PICTURE_QUESTIONS)
def test_only_uploads_are_opened(page, upload, tmp_path, name):
    for file in (upload, {"path": upload["path"]}):
        status, body = page.ask(name, file, *PICTURE_QUESTIONS[name])
        assert status == 200 and "<data>" in body, "an upload is not opened, so a refusal would prove nothing"
    meta, refused = {"meta": {"_type": "gradio.FileData"}}, set()
    for path in outside(page, tmp_path):
        for file in ({"path": path}, {"path": path, **meta, "orig_name": "a.png"}, {"nested": [{"path": path}]}):
            refused.add(page.ask(name, file, *PICTURE_QUESTIONS[name]))
    refused = {(status, json.loads(body)["data"][0]) for status, body in refused}
    assert len(refused) == 1 and "Envie uma imagem" in str(refused), "answers that differ tell which files there are"
    assert page.ask(name, upload, *PICTURE_QUESTIONS[name])[0] == 200


def test_what_two_parsers_could_read_differently_is_read_once(page, upload):
    number = page.numbers["search_by_image"]
    twice = f'{{"path": "/etc/passwd", "path": {json.dumps(upload["path"])}}}'
    body = f'{{"data": [{twice}, 6], "fn_index": {number}, "session_hash": "s"}}'.encode()
    status, _, answer = page.post("/gradio_api/run/predict", body)
    assert status == 200 and b"<data>" in answer


def test_only_uploads_are_served(page, upload, tmp_path):
    assert asked(f"{page.url}/gradio_api/file={upload['path']}")[0] == 200
    paths = [path for path in outside(page, tmp_path) if isinstance(path, str) and path.isascii() and "\0" not in path]
    answers = {(status, body) for status, _, body in (asked(f"{page.url}/gradio_api/file={path}") for path in paths)}
    assert len(answers) == 1 and answers.pop()[0] == 404


# --- Who asks for what -----------------------------------------------------------------------------------------------


def test_a_foreign_origin_is_refused_on_every_route(page):
    routers = [
        page.blocks.app,
        *(route.original_router for route in page.blocks.app.routes if not hasattr(route, "path")),
    ]
    routes = {route.path for router in routers for route in router.routes if hasattr(route, "path")} | {"/missing"}
    assert {"/", "/gradio_api/upload", "/gradio_api/queue/join"} <= routes, "gradio's routes were not found"
    preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    foreign = ["http://evil.example", "null", f"http://localhost:{page.port}", "http://127.0.0.1:1", "http://[::1"]
    for path in sorted(routes):
        for method, headers in (("GET", {}), ("POST", {}), ("HEAD", {}), ("OPTIONS", preflight)):
            origin = foreign[len(path) % len(foreign)]
            assert status_of(page, method, path.replace(" ", ""), Origin=origin, **headers) == 403, (method, path)
    before = page.stored()
    for origin in foreign:
        sent = page.post("/gradio_api/upload", form(b"x"), FORM, Origin=origin)
        assert sent[0] == 403 and "access-control-allow-origin" not in sent[1]
        assert page.ask("search_by_text", "azul", 6, Origin=origin)[0] == 403
    assert page.stored() == before
    assert page.ask("search_by_text", "azul", 6, Origin=page.url)[0] == 200


@pytest.mark.slow
def test_the_host_of_a_proxy_is_believed_only_by_a_page_that_may_have_one(page, demo):
    forwarded = {"Origin": "https://us-demo.hf.space", "X_Forwarded_Host": "us-demo.hf.space"}
    assert page.post("/gradio_api/upload", form(b"x"), FORM, **forwarded)[0] == 403
    assert page.ask("search_by_text", "azul", 6, **forwarded)[0] == 403
    blocks = serve(demo, "0.0.0.0", port := free_port())  # as a Space does
    try:
        opened = Page(blocks, port)
        assert opened.upload(b"x", **forwarded)
        assert opened.post("/gradio_api/upload", form(b"x"), FORM, Origin="https://other.hf.space")[0] == 403
    finally:
        blocks.close()


def status_of(page: Page, method: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_other_routes_of_gradio_are_closed(page):
    """They fetch addresses, keep files or sessions for ever, or hold connections."""
    api = "/gradio_api"
    for path in (
        f"{api}/queue/data?session_hash=a",
        f"{api}/heartbeat/a",
        f"{api}/deep_link?session_hash=s",
        "/logout",
    ):
        assert asked(page.url + path)[0] == 404
    for path in (
        f"{api}/queue/join",
        f"{api}/call/upload",
        f"{api}/run/upload",
        f"{api}/component_server",
        f"{api}/cancel",
    ):
        assert page.post(path, b"{}")[0] == 404
    status, _, body = asked(f"{page.url}{api}/upload_progress?upload_id=never")
    assert status == 200 and b"done" in body, "gradio's own waits, and keeps a note of every name"


# --- How much --------------------------------------------------------------------------------------------------------


def test_bodies_are_bounded(page):
    question = {"data": ["azul", 6], "fn_index": page.numbers["search_by_text"], "session_hash": "x" * 200_000}
    before = page.stored()
    for path, body, kind, expected in (
        ("run/predict", json.dumps(question).encode(), "application/json", 413),
        ("run/predict", chunks(300_000), "application/json", 413),
        ("run/predict", b"{", "application/json", 400),
        ("run/predict", b"[" * 90_000 + b"]" * 90_000, "application/json", 400),
    ):
        status, _, answer = page.post(f"/gradio_api/{path}", body, kind)
        assert status == expected and json.loads(answer)["error"], (path, status, answer[:100])
    unsaid = {"Content_Type": FORM, "Transfer_Encoding": "chunked"}
    assert status_of(page, "POST", "/gradio_api/upload", **unsaid) == 411
    several = {
        "Content_Type": FORM,
        "Content_Length": str(3 * 7_000_000),
    }  # each of which is within the limit of a file
    assert status_of(page, "POST", "/gradio_api/upload", **several) == 413
    assert page.stored() == before


def chunks(size: int):
    """A body that does not say how long it is."""
    yield from (b" " * 1000 for _ in range(size // 1000))


@contextlib.contextmanager
def begun(page: Page, first: bytes, length: int, path: str = "upload", kind: str = FORM):
    """The socket of a request that has sent its head and the first of its bytes."""
    head = f"POST /gradio_api/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {length}"
    with socket.create_connection(("127.0.0.1", page.port), timeout=20) as sent:
        sent.sendall(f"{head}\r\n\r\n".encode() + first)
        yield sent


def status_line(sent: socket.socket) -> bytes:
    return sent.recv(10_000).partition(b"\r\n")[0]


@pytest.mark.slow
def test_a_request_that_never_ends_is_given_up(page, monkeypatch):
    monkeypatch.setattr(guard, "RECEIVE_S", 1)
    monkeypatch.setattr(guard, "STEP_S", 1)
    for path, kind in (("upload", FORM), ("run/predict", "application/json")):
        with begun(page, b"--X\r\n", 1000, path, kind) as sent:
            assert b" 408 " in status_line(sent)


@pytest.mark.slow
def test_an_upload_that_comes_too_slowly_is_given_up(page, monkeypatch):
    """However little time is left to all of it, or however much: each step has its own."""
    monkeypatch.setattr(guard, "STEP_S", 0.8)
    data = form(bytes(600_000))
    for size, every, expected in ((100_000, 0.3, b" 200 "), (100, 0.1, b" 408 ")):
        with begun(page, data[:150_000], len(data)) as sent:
            sent.settimeout(every)
            started, rest, line = time.monotonic(), data[150_000:], b""
            while not line and time.monotonic() - started < 4:
                sent.sendall(rest[:size])
                rest = rest[size:]
                with contextlib.suppress(TimeoutError):
                    line = status_line(sent)
            assert expected in line, (line, len(rest))
    assert time.monotonic() - started < 3


@pytest.mark.slow
def test_a_fast_upload_has_a_limit_for_all_of_it(page, monkeypatch):
    monkeypatch.setattr(guard, "RECEIVE_S", 1)
    with begun(page, form(bytes(150_000))[:150_000], 2_000_000) as sent:
        sent.settimeout(0.1)
        started, line = time.monotonic(), b""
        while not line and time.monotonic() - started < 4:
            sent.sendall(bytes(guard.STEP_BYTES))
            with contextlib.suppress(TimeoutError):
                line = status_line(sent)
    assert b" 408 " in line


@pytest.mark.slow
def test_slow_visitors_keep_nobody_from_uploading(page, monkeypatch):
    """Eight hold all places and send nothing more: who waits too long is told so, and soon they are gone."""
    monkeypatch.setattr(guard, "STEP_S", 2)
    monkeypatch.setattr(guard, "PLACE_S", 0.5)
    data = form(bytes(300_000))
    with contextlib.ExitStack() as slow:
        for _ in range(guard.UPLOADS_AT_ONCE):
            slow.enter_context(begun(page, data[:200_000], len(data)))
        time.sleep(0.5)
        status, _, body = page.post("/gradio_api/upload", form(b"x"), FORM)
        assert status == 503 and json.loads(body)["error"] == turns.BUSY
        monkeypatch.setattr(guard, "PLACE_S", 10)
        started = time.monotonic()
        assert page.upload(b"x") and time.monotonic() - started < 3


def test_idle_visitors_stand_in_nobodys_way(page):
    """More than there are places, who have sent almost nothing: they wait for none."""
    with contextlib.ExitStack() as idle:
        for _ in range(10 * guard.UPLOADS_AT_ONCE):
            idle.enter_context(begun(page, b"--X\r\n", 1000))
        time.sleep(0.3)
        started = time.monotonic()
        assert page.upload(b"x") and time.monotonic() - started < 2


def malformed_questions(page: Page, path: str) -> list[str]:
    """Questions that are none of the page's; most made gradio fail, with its traceback in the log."""
    names = ("search_by_text", "search_by_image", "random_picture", "load_example")
    text, image, random, example = (page.numbers[name] for name in names)
    numbers = [10**6, -1, None, "1", 0.0, float("nan"), float("inf"), 10**400, [text], {}]
    counts = [None, "6", 6.0, True, 7, 10**400, [6], {}, float("nan"), float("-inf")]
    asked = [(number, ["azul", 6]) for number in numbers] + [(text, ["azul", count]) for count in counts]
    asked += [(text, [words, 6]) for words in (5, True, ["azul"], {"a": 1}, {"path": path}, float("nan"))]
    asked += [(text, data) for data in ([], ["azul"], ["azul", 6, 6], "azul", {}, None)]
    asked += [(image, [picture, 6]) for picture in ("x", path, 5, [], [{"path": path}], {"path": path, "data": 1})]
    asked += [(random, [1]), *((example, [number]) for number in ("a", 99, -1, None, 1.0))]
    questions = [{"data": data, "fn_index": number, "session_hash": "s"} for number, data in asked]
    questions += [{"data": ["azul", 6], "fn_index": text, "session_hash": session} for session in (5, ["s"], {}, None)]
    questions += [{"data": ["azul", 6]}, {"fn_index": text}, {}, [], 5, "azul", None]
    huge = [f'{{"data": ["azul", {n}], "fn_index": {text}, "session_hash": "s"}}' for n in ("1e999", "9" * 5000)]
    return [json.dumps(question) for question in questions] + huge


def test_malformed_questions_are_refused_in_a_line(page, upload, capfd):
    capfd.readouterr()
    for question in malformed_questions(page, upload["path"]):
        status, _, body = page.post("/gradio_api/run/predict", question.encode())
        assert status == 400 and json.loads(body)["error"].startswith("O pedido não é"), (question[:200], status, body)
    more = {"size": "x", "url": 5, "meta": 5, "orig_name": []}  # of a picture, what the page does not need
    assert "<data>" in page.ask("search_by_image", {**upload, **more}, 6)[1]
    assert "Envie uma imagem" in page.ask("search_by_image", more, 6)[1]
    assert page.ask("load_example", 3)[0] == 200 and page.ask("search_by_text", None, 6)[0] == 200
    assert not "".join(capfd.readouterr()).strip(), "the log says something of them"


def test_broken_uploads_leave_nothing_in_the_log(page, capfd):
    capfd.readouterr()
    no_file = b'--X\r\nContent-Disposition: form-data; name="files"\r\n\r\nabc\r\n--X--\r\n'
    for body, kind in ((no_file, FORM), (b"x", FORM), (b"x", "multipart/form-data"), (b"x", "text/plain")):
        assert page.post("/gradio_api/upload", body, kind)[0] == 400
    with begun(page, form(b"x")[:50], 1000):
        time.sleep(0.2)
    time.sleep(0.3)  # the visitor has gone
    assert not "".join(capfd.readouterr()).strip()


def test_stored_uploads_are_bounded(page, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_STORED_BYTES", 1_000_000)
    monkeypatch.setattr(uploads, "MIN_COUNTED_BYTES", 50_000)
    pictures = [png(Image.effect_noise((300, 300), i + 1)) for i in range(25)]
    paths, most = [], 0
    for picture in pictures:
        paths.append(page.upload(picture))
        most = max(most, sum(path.stat().st_size for path in page.stored()))
    assert 500_000 < most < 1_200_000, "beside the bound there is the one that has just come"
    assert "<data>" in page.ask("search_by_image", {"path": paths[-1]}, 6)[1]
    assert "Envie uma imagem" in page.ask("search_by_image", {"path": paths[0]}, 6)[1]
    for i in range(40):
        page.upload(f"{i}".encode())
    page.upload(b"the last one")
    assert len(page.stored()) <= 21 and len([*page.folder.rglob("*")]) <= 45, "of small files there are many"


def test_old_uploads_go(page, upload):
    kept = page.upload(b"younger")
    old = time.time() - uploads.KEPT_S - 1
    os.utime(upload["path"], (old, old))
    uploads.Uploads(page.folder).tidy()
    assert not Path(upload["path"]).parent.exists() and Path(kept).exists()


def test_sessions_are_bounded(page):
    for number in range(3 * SESSIONS_KEPT):
        assert page.ask("search_by_text", "azul", 48, session=f"visitor-{number}")[0] == 200
    assert len(page.blocks.app.state_holder.session_data) == SESSIONS_KEPT
    queue = page.blocks._queue
    assert not queue.pending_messages_per_session and not queue.event_analytics and not page.blocks.app.iterators


# --- How long --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_picture_that_takes_too_long_is_given_up(page, upload):
    page.ask("search_by_image", upload, 6)  # the process that decodes has started
    slow = {"path": page.upload(slow_jpeg(), "a.jpg")}
    with ThreadPoolExecutor(2) as threads:
        started = time.monotonic()
        refused = threads.submit(page.ask, "search_by_image", slow, 6)
        time.sleep(0.3)
        status, body = threads.submit(page.ask, "search_by_text", "azul", 6).result()
        assert status == 200 and "<data>" in body
        assert "Não foi possível ler" in refused.result()[1] and time.monotonic() - started < PICTURE_S + 20
    assert "<data>" in page.ask("search_by_image", upload, 6)[1]


@pytest.mark.slow
def test_a_question_that_takes_too_long_is_given_up(page, monkeypatch):
    released, search = threading.Event(), Index.search

    def search_slowly(self, query, count):
        return released.wait(60) and search(self, query, count) if count == 24 else search(self, query, count)

    monkeypatch.setattr(Index, "search", search_slowly)
    monkeypatch.setattr(turns, "QUERY_S", 1)
    try:
        status, body = page.ask("search_by_text", "azul", 24)
        assert status == 200 and turns.TOO_SLOW in body and "<data>" not in body
        assert "<data>" in page.ask("search_by_text", "azul", 6)[1]
    finally:
        released.set()


def test_turns(monkeypatch):
    monkeypatch.setattr(turns, "QUERY_S", 0.3)
    monkeypatch.setattr(turns, "MAX_WAITING", 5)

    async def visits() -> None:
        queue, released, running = turns.Turns(), threading.Event(), []

        def alone() -> int:
            running.append(1)
            assert len(running) == 1
            time.sleep(0.01)
            return running.pop()

        answers = await asyncio.gather(*(queue.ask(alone) for _ in range(9)), return_exceptions=True)
        assert [answer for answer in answers if answer == 1] == [1] * 6, "one is answered while five wait"
        assert {str(answer) for answer in answers if answer != 1} == {turns.BUSY}
        with pytest.raises(ZeroDivisionError):
            await queue.ask(lambda: 1 / 0)
        for _ in range(turns.MAX_GIVEN_UP):
            with pytest.raises(Refusal, match="demorou demais"):
                await queue.ask(released.wait)
            if queue._given_up < turns.MAX_GIVEN_UP:
                assert await queue.ask(lambda: "next") == "next"
        with pytest.raises(Refusal, match="visitantes demais"):
            await queue.ask(lambda: "no thread is left")
        released.set()
        await asyncio.sleep(0.2)
        assert await queue.ask(lambda: "again") == "again"

    asyncio.run(visits())


@pytest.mark.slow
def test_the_decoding_process_gives_the_same_image():
    decode = decoder.Decoder()
    try:
        for mode, kind in (
            ("RGB", "JPEG"),
            ("CMYK", "JPEG"),
            ("LA", "PNG"),
            ("I;16", "PNG"),
            ("P", "PNG"),
            ("1", "PNG"),
        ):
            image = made_space.made_pictures()[11]
            image = Image.new(mode, (9, 7), 300) if mode == "I;16" else image.convert(mode)
            image.save(file := io.BytesIO(), kind, **({"transparency": 0} if mode == "P" else {}))
            there, here = decode(file.getvalue()), decode_image({"bytes": file.getvalue(), "path": None})
            assert (there.mode, there.size, there.tobytes()) == (here.mode, here.size, here.tobytes())
            assert there.getpalette() == here.getpalette()
        os.kill(decode._process.pid, 9)
        with pytest.raises(Exception, match="broke its reader"):
            decode(file.getvalue())
        assert decode(file.getvalue()).size == (32, 32)
    finally:
        decode.close()


@pytest.mark.slow
def test_load_benchmark(tiny_folder, tmp_path):
    from benchmarks.space_load import main

    made_space.save_dataset(tmp_path / "areas")
    flags = ["--model", str(tiny_folder), "--pictures", str(tmp_path / "areas"), "--output", str(tmp_path / "r.json")]
    flags += ["--warm_up", "5", "--at_once", "30", "--sessions", "50", "--most_growth_mb", "-1000"]
    with pytest.raises(SystemExit, match=r"error: grew by .* MB, 0 requests were not answered"):
        main(flags)
    figures = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert set(figures["answers"]) == {"200"} and figures["visitors"]["in_a_row"] == 50
    assert figures["milliseconds_in_a_row"]["median"] > 0
    assert figures["memory_mb"]["in_a_row"]["peak"] >= figures["memory_mb"]["in_a_row"]["after"] > 0
