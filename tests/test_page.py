"""The page: what it serves and to whom, and a visitor in a browser."""

import contextlib
import io
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import made_space
import pytest
from browser import open_browser, require_chromium
from test_space import bomb

from hub_upload.space.answers import MAX_UPLOAD_BYTES, Demo
from hub_upload.space.collection import open_pictures
from hub_upload.space.index import build_index, open_album
from modeling_capivara.embedder import CapivaraEmbedder

gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")

ROOT = Path(__file__).resolve().parent.parent
LICENCE = "pretty_name: Áreas coloridas\nlicense: cc-by-sa-4.0\nattribution: Made for a test\n"
TABS = ["Buscar por texto", "Buscar por imagem", "Classificar", "Legendas parecidas"]
# What the server asks of the network is written to a file, and refused.
WATCHED = """
import ipaddress, runpy, socket, sys
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
runpy.run_module("hub_upload.space", run_name="__main__", alter_sys=True)
"""


def free_port() -> int:
    """Below the ports that the system gives to connections, of which one might take it before the server does."""
    for port in random.SystemRandom().sample(range(12_000, 32_000), 50):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port was found")


# --- What is served --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def album_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "areas"
    made_space.save_dataset(folder, LICENCE)
    return folder


@pytest.fixture
def demo(tiny_model, tiny_processor, album_folder, tmp_path):
    embedder = CapivaraEmbedder("tiny", tiny_model, tiny_processor, "float32")
    return Demo([build_index(open_album(open_pictures(str(album_folder)), tmp_path), embedder, tmp_path)])


@pytest.fixture
def served(demo):
    """A page that runs in this process, and its address."""
    from hub_upload.space.app import serve

    blocks = serve(demo, "127.0.0.1", port := free_port())
    yield demo, blocks, f"http://127.0.0.1:{port}"
    blocks.close()


def asked(url: str, data: bytes | None = None, **headers: str) -> tuple[int, dict, bytes]:
    """Status, headers and body of an answer."""
    request = urllib.request.Request(url, data, {name.replace("_", "-"): text for name, text in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_only_this_machine_and_only_the_page_is_served(served):
    _, blocks, url = served
    status, headers, page = asked(url)
    assert status == 200 and "connect-src 'self'" in headers["content-security-policy"]
    assert b"fonts.googleapis" not in page and b"cdnjs" not in page
    assert not blocks.share and blocks.share_url is None and not blocks.analytics_enabled and not blocks.allowed_paths
    assert blocks.max_file_size == MAX_UPLOAD_BYTES and not blocks.api_open
    for host in ("evil.example", "evil.example:7860"):
        assert asked(url, Host=host)[0] == 400, "a foreign name for this machine was answered"
    for path in ("/docs", "/redoc", "/openapi.json", "/gradio_api/info", "/gradio_api/openapi.json"):
        assert asked(url + path)[0] == 404


@pytest.mark.slow
def test_an_upload_over_the_limit_is_not_kept(served):
    _, _, url = served
    for size, expected in ((1000, 200), (MAX_UPLOAD_BYTES + 1, 413)):
        parts = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(size)
        status, _, body = asked(
            f"{url}/gradio_api/upload", parts + b"\r\n--X--\r\n", Content_Type="multipart/form-data; boundary=X"
        )
        assert status == expected, body[:200]


def test_tabs_follow_the_pictures(demo, tmp_path):
    from hub_upload.space.app import build_page
    from hub_upload.space.uploads import Uploads

    def tabs(blocks):
        return [block.label for block in blocks.blocks.values() if isinstance(block, gradio.Tab)]

    assert tabs(build_page(demo, Uploads(tmp_path))) == TABS
    (tmp_path / "plain").mkdir()
    made_space.made_pictures()[0].save(tmp_path / "plain" / "a.png")
    album = open_album(open_pictures(str(tmp_path / "plain")), tmp_path)
    plain = build_page(Demo([build_index(album, demo.indexes[0].embedder, tmp_path)]), Uploads(tmp_path))
    assert tabs(plain) == TABS[:3]


def test_nothing_is_written_beside_the_sources():
    """gradio writes type files beside the module of every component class of one's own."""
    assert not [*(ROOT / "hub_upload").rglob("*.pyi")]


# --- A visitor -------------------------------------------------------------------------------------------------------


@contextmanager
def running(tmp_path: Path, *flags: object):
    """The command in a process of its own; address of the page, and the file of what it asked of the network."""
    log, port = tmp_path / "network.txt", free_port()
    environment = {name: text for name, text in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"CAPIVARA_CACHE": str(tmp_path / "cache"), "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    log.touch()
    command = [sys.executable, "-c", WATCHED, str(log), *map(str, flags), "--port", str(port)]
    with open(tmp_path / "said.txt", "w") as said:
        server = subprocess.Popen(
            ["timeout", "-k", "60", "400", *command], cwd=ROOT, env=environment, stdout=said, stderr=said
        )
    try:
        wait_for(f"http://127.0.0.1:{port}", server, tmp_path / "said.txt")
        yield f"http://127.0.0.1:{port}", log
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(url: str, server: subprocess.Popen, said: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, said.read_text(encoding="utf-8")
        try:
            asked(url)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(said.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("trained") / "treinado"
    made_space.save_trained_model(folder, tiny_processor)
    return folder


class Visitor:
    """What a visitor does and sees."""

    def __init__(self, page):
        self.page = page

    def open(self, url: str) -> None:
        self.page.goto(url, wait_until="load")
        self.page.wait_for_selector("#cap-query :is(textarea, input)", timeout=60_000)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def type(self, text: str) -> None:
        self.page.locator("#cap-query :is(textarea, input)").first.fill(text)

    def upload(self, tab: str, name: str, data: bytes) -> None:
        """Give a file, in place of the one before."""
        clear = self.page.locator(f"#cap-{tab}-upload button[aria-label='Remove Image']")
        if clear.count():
            clear.click()
            self.sees(f"#cap-{tab}-result .cap-empty", "aparecem aqui")
        files = [{"name": name, "mimeType": "image/png", "buffer": data}]
        self.page.locator(f"#cap-{tab}-upload input[type=file]").first.set_input_files(files)

    def sees(self, selector: str, text: str) -> None:
        self.page.locator(selector, has_text=text).first.wait_for(timeout=30_000)

    def first(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text().strip()


def png(number: int) -> bytes:
    made_space.made_pictures()[number].save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_uploads_go_with_a_page_that_ends_while_one_arrives(trained, album_folder, tmp_path):
    with running(tmp_path, "--model", trained, "--pictures", album_folder) as (url, _):
        assert [*(tmp_path / "gradio").glob("capivara-page-*")]
        threading.Thread(target=sends_slowly, args=(url,), daemon=True).start()
        time.sleep(2)
    assert not [*(tmp_path / "gradio").glob("capivara-page-*")], "uploads outlived the page"


def sends_slowly(url: str) -> None:
    """An upload of 9 MB at 130 kB/s, which is fast enough not to be given up, until the page ends."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection, contextlib.suppress(OSError):
        connection.sendall(
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 9000000\r\n"
            'Content-Type: multipart/form-data; boundary=X\r\n\r\n--X\r\nContent-Disposition: form-data; name="files"; '
            'filename="a.png"\r\n\r\n'.encode()
        )
        for _ in range(60):
            connection.sendall(bytes(130_000))
            time.sleep(1)


@pytest.mark.slow
def test_a_visit(trained, album_folder, tmp_path):
    require_chromium()
    with running(tmp_path, "--model", trained, "--pictures", album_folder) as (url, network), open_browser() as opened:
        visitor = Visitor(opened.page)
        visitor.open(url)
        assert opened.page.evaluate("document.documentElement.lang") == "pt-BR"
        visits_the_search(visitor)
        visits_the_uploads(visitor)
        visits_labels_and_captions(visitor)
        footer = visitor.first(".cap-footer")
        assert "Áreas coloridas" in footer and "CC BY-SA 4.0" in footer and "Made for a test" in footer
        for width in (1280, 390):
            opened.page.set_viewport_size({"width": width, "height": 900})
            for name in TABS:
                visitor.tab(name)
                assert not opened.scrolls_sideways(), f"{name} at {width} pixels"
        fonts = opened.page.evaluate("getComputedStyle(document.querySelector('.cap-header h1')).fontFamily")
        assert fonts.startswith("system-ui")
        visits_with_an_upload_that_is_gone(visitor, tmp_path / "gradio")
        assert not opened.errors
        visits_with_a_large_file(visitor)
        assert not opened.refused and not opened.dialogs
        assert all(request.startswith((url, "data:", "blob:")) for request in opened.requests)
    assert network.read_text() == "", "the server asked something of the network"
    assert not [*(tmp_path / "gradio").glob("capivara-page-*")], "uploads outlived the page"


def visits_the_search(visitor: Visitor) -> None:
    """A question, another one, none, a very long one."""
    for text in ("vermelho embaixo", "azul inteiro", "amarelo na direita"):
        visitor.type(text)
        visitor.page.keyboard.press("Enter")
        visitor.sees("#cap-text-result .cap-card:first-child .cap-title", text)
    assert visitor.page.locator("#cap-text-result .cap-card").count() == 12
    widths = visitor.page.evaluate(
        "Promise.all([...document.querySelectorAll('.cap-card img')].map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert widths == [32] * 12 and visitor.page.locator(".cap-card img:not([alt])").count() == 0
    visitor.page.locator("#cap-text-result summary").click()
    visitor.sees("#cap-text-result .cap-how p", "similaridade de cosseno")
    visitor.type("")
    visitor.page.click("#cap-search")
    visitor.sees("#cap-text-result .cap-erro", "Escreva o que você procura")
    visitor.type("verde em cima " * 5000)
    visitor.page.click("#cap-search")
    visitor.sees("#cap-text-result .cap-aviso", "77 tokens")
    visitor.page.get_by_label("6", exact=True).first.check()
    visitor.type("preto na esquerda")
    visitor.page.click("#cap-search")
    visitor.sees("#cap-text-result .cap-card:first-child .cap-title", "preto na esquerda")
    assert visitor.page.locator("#cap-text-result .cap-card").count() == 6


def visits_the_uploads(visitor: Visitor) -> None:
    """No picture, broken ones, and one that is found again."""
    visitor.tab("Buscar por imagem")
    visitor.page.click("#cap-image-ask")
    visitor.sees("#cap-image-result .cap-erro", "Envie uma imagem")
    visitor.upload("image", "ilegivel.png", b"\x89PNG\r\n\x1a\nnada disso")
    visitor.sees("#cap-image-result .cap-erro", "Não foi possível ler")
    visitor.upload("image", "bomba.png", bomb())
    visitor.sees("#cap-image-result .cap-erro", "pixels demais")
    visitor.upload("image", "boa.png", png(13))
    visitor.sees("#cap-image-result .cap-card:first-child .cap-title", made_space.CAPTIONS[13])
    assert visitor.first("#cap-image-result data") == "1,000"
    visitor.page.click("#cap-image-random")
    visitor.sees("#cap-image-result .cap-card:first-child", "1º")


def visits_with_a_large_file(visitor: Visitor) -> None:
    visitor.tab("Buscar por imagem")
    visitor.upload("image", "grande.png", bytes(MAX_UPLOAD_BYTES + 1))
    visitor.sees(".toast-message-text", "o limite é de 20 MB")


def visits_with_an_upload_that_is_gone(visitor: Visitor, folder: Path) -> None:
    visitor.tab("Buscar por imagem")
    visitor.upload("image", "boa.png", png(3))
    visitor.sees("#cap-image-result .cap-card:first-child .cap-title", made_space.CAPTIONS[3])
    for path in folder.rglob("*.png"):
        path.unlink()
    visitor.page.click("#cap-image-ask")
    visitor.sees("#cap-image-result .cap-erro", "Envie uma imagem (de novo")


def visits_labels_and_captions(visitor: Visitor) -> None:
    visitor.tab("Classificar")
    visitor.page.locator("#cap-labels textarea").fill("azul inteiro\nverde embaixo\npreto em cima")
    visitor.page.locator("#cap-template :is(textarea, input)").first.fill("{}")
    visitor.upload("label", "boa.png", png(made_space.CAPTIONS.index("verde embaixo")))
    visitor.sees("#cap-label-result li", "")
    visitor.page.click("#cap-label-ask")  # typed faster than by any visitor, the words may come after the picture
    visitor.sees("#cap-label-result li:first-child", "verde embaixo")
    assert visitor.first("#cap-label-result data").endswith(" %")
    visitor.page.locator("#cap-labels textarea").fill("um só")
    visitor.page.click("#cap-label-ask")
    visitor.sees("#cap-label-result .cap-erro", "pelo menos dois")
    visitor.tab("Legendas parecidas")
    visitor.upload("caption", "boa.png", png(22))
    visitor.sees("#cap-caption-result li:first-child", made_space.CAPTIONS[22])


@pytest.mark.slow
def test_two_models_side_by_side(trained, album_folder, tiny_folder, tmp_path):
    require_chromium()
    flags = ("--model", trained, "--compare", tiny_folder, "--pictures", album_folder)
    with running(tmp_path, *flags) as (url, _), open_browser() as opened:
        visitor = Visitor(opened.page)
        visitor.open(url)
        visitor.type("branco em cima")
        visitor.page.click("#cap-search")
        visitor.sees(".cap-model:first-child .cap-card:first-child", "branco em cima")
        assert [name.split("/")[-1] for name in opened.page.locator(".cap-model h3").all_inner_texts()] == [
            "treinado",
            "model",
        ]
        assert opened.page.locator(".cap-card").count() == 24
        for width, side_by_side in ((1280, True), (390, False)):
            opened.page.set_viewport_size({"width": width, "height": 900})
            first, second = (model.bounding_box() for model in opened.page.locator(".cap-model").all())
            assert (first["y"] == second["y"]) == side_by_side
            assert (second["x"] > first["x"]) == side_by_side and not opened.scrolls_sideways()
