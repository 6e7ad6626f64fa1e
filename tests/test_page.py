"""The page in a browser: search, large view and classification, in two languages and on a phone."""

import asyncio
import contextlib
import errno
import io
import os
import shutil
import socket
import sys
import threading
import time
import webbrowser
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import made_pictures
import pytest
from browser import Browser, open_browser, require_chromium
from in_browser import AXE, required_packages, serious_faults
from made_pictures import CAPTIONS, bomb, made_index, png, save_folder
from page_process import fetch, running, served
from PIL import Image
from tiny import randomize, tiny_config

pytest.importorskip("uvicorn", reason="the page needs uvicorn: pip install -e '.[search]'")

from capivara_common.files import write_json
from capivara_search.index import PictureIndex
from capivara_search.index_progress import PROGRESS_FILE
from capivara_search.messages import Messages
from capivara_search.page import server
from capivara_search.page.server import Credit, create_page_server
from capivara_search.table import PictureTable
from modeling_capivara import CapivaraModel

if TYPE_CHECKING:
    from playwright.sync_api import Page

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
ATTACK = "<img src=x onerror=alert(1)>"


# --- What is served --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_index(tmp_path_factory, saved_tiny_folder):
    folder = tmp_path_factory.mktemp("plain")
    return made_index(folder / "i.lance", save_folder(folder / "fotos"), saved_tiny_folder)


def test_the_language_of_the_page(plain_index):
    with served(plain_index, language="en") as client:
        for query, tag, word in (("", "en", "Search"), ("?lang=pt", "pt-BR", "Buscar"), ("?lang=xx", "en", "Search")):
            page = client.get(query)[2].decode()
            assert f'<html lang="{tag}">' in page and f">{word}</label>" in page and "<built-in" not in page
    with pytest.raises(ValueError, match=r"pt, en.*'fr'"):
        server.serve_index(plain_index, language="fr")


def test_a_free_port_is_used_if_the_default_port_is_taken(plain_index, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "DEFAULT_PORT", port)
        with served(plain_index, port=port) as client:
            assert client.port != port and client.get("")[0] == 200
        monkeypatch.setattr(server, "DEFAULT_PORT", 7860)
        with pytest.raises(OSError) as caught:
            server.serve_index(plain_index, port=port)
        assert caught.value.errno == errno.EADDRINUSE


def test_a_model_that_does_not_match_the_index_is_refused_before_the_page_opens(
    plain_index, saved_tiny_folder, tmp_path
):
    other = shutil.copytree(saved_tiny_folder, tmp_path / "outro")
    randomize(CapivaraModel(tiny_config()), seed=5).save_pretrained(other)
    with pytest.raises(ValueError, match="outro") as caught:
        server.serve_index(PictureIndex.open(plain_index.where, str(other)), port=0)
    assert caught.value.code == "other_model"


def test_the_page_answers_while_the_browser_program_runs(plain_index, tmp_path, monkeypatch):
    seen, servers = tmp_path / "seen", []
    (program := tmp_path / "browser.py").write_text(
        "import pathlib, sys, time, urllib.request\nseen = pathlib.Path(sys.argv[1])\n"
        "seen.write_bytes(urllib.request.urlopen(sys.argv[2], timeout=20).read())\n"
        "while seen.exists():\n    time.sleep(0.05)\n"
    )
    monkeypatch.setenv("BROWSER", f"{sys.executable} {program} {seen} %s")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # so that it reads the environment again

    def create_and_record(*args):
        servers.append(create_page_server(*args))
        return servers[0]

    monkeypatch.setattr(server, "create_page_server", create_and_record)
    visit = threading.Thread(target=server.serve_index, args=(plain_index, "127.0.0.1", 0), daemon=True)
    visit.start()
    for _ in range(200):
        if seen.exists() and b"</html>" in seen.read_bytes():
            break
        time.sleep(0.1)
    was_seen = seen.exists()
    servers[0][0].should_exit = True
    visit.join(20)
    seen.unlink(missing_ok=True)
    assert was_seen and not visit.is_alive()


def test_the_page_opens_inside_a_running_event_loop_and_on_open_can_end_it(plain_index):
    """A notebook has a running loop. KeyboardInterrupt ends the page quietly; other errors reach the caller."""
    answers = []

    async def notebook(error):
        def fetch_and_raise(url):
            answers.append((url, fetch(url)[0]))
            raise error

        server.serve_index(plain_index, port=0, open_browser=False, on_open=fetch_and_raise)

    asyncio.run(notebook(KeyboardInterrupt))
    with pytest.raises(BrokenPipeError):
        asyncio.run(notebook(BrokenPipeError))
    for url, status in answers:
        with pytest.raises(URLError):
            fetch(url)
        assert status == 200


def test_a_page_that_does_not_start_raises_an_error_with_its_address(plain_index, monkeypatch):
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda *_: None)
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:\d+") as caught:
        server.serve_index(plain_index, port=0, on_open=pytest.fail)
    assert caught.value.code == "no_start"


def test_browsers_may_cache_pictures_but_not_answers(plain_index):
    with served(plain_index) as client:
        path = plain_index.newest(1)[0].path
        assert "private, max-age" in client.get("thumbnail", path)[1]["cache-control"]
        for route in ("", "download", "static/page.js"):
            assert client.get(route, path)[1]["cache-control"] == "no-store"


# --- A visitor -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("trained") / "treinado"
    made_pictures.save_trained_model(folder, tiny_processor)
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory, trained):
    """Create colored areas that the model knows, photographs with date and place, and a name with HTML."""
    from skimage import data

    folder = save_folder(tmp_path_factory.mktemp("collection") / "fotos")
    (folder / "viagem").mkdir()
    for number, name in enumerate(PHOTOS):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2025:0{number + 1}:05 14:30:00"
        exif.get_ifd(0x8825).update({1: "S", 2: (12.0, 58.0, 15.0), 3: "W", 4: (38.0, 30.0, 36.0)})
        Image.fromarray(getattr(data, name)()).convert("RGB").save(folder / "viagem" / f"{name}.jpg", exif=exif)
    made_pictures.made_pictures()[12].save(folder / "viagem" / f"{ATTACK}.png")
    os.utime(folder / "viagem" / f"{ATTACK}.png", (datetime(2024, 6, 1).timestamp(),) * 2)
    made_index(folder.parent / "fotos.lance", folder, trained)
    return folder


class Visitor:
    """A visitor of the page in a browser: actions, and what the page shows."""

    def __init__(self, opened: Browser):
        self.opened, self.page = opened, opened.page

    def open(self, url: str) -> None:
        self.page.goto(url, wait_until="load")
        self.page.locator("#results .tile").first.wait_for(timeout=60_000)

    def sees(self, selector: str, text: str) -> None:
        self.page.locator(selector, has_text=text).first.wait_for(timeout=30_000)

    def first_is(self, name: str) -> None:
        self.page.locator(f"#results li:first-child > .tile[title='{name}']").wait_for(timeout=30_000)

    def gives(self, part: str, name: str, data: bytes) -> None:
        self.page.set_input_files(f"#{part}-file", [{"name": name, "mimeType": "image/png", "buffer": data}])

    def pastes(self, data: bytes) -> None:
        script = f"const clipboardData = new DataTransfer(), data = new Uint8Array({list(data)});"
        script += "clipboardData.items.add(new File([data], 'colada.png', { type: 'image/png' }));"
        self.page.evaluate(f"{{ {script} document.dispatchEvent(new ClipboardEvent('paste', {{ clipboardData }})); }}")

    def chooses(self, part: str, folder: Path) -> None:
        self.page.click(f"#{part} > button")
        self.page.click(f"#{part} .tree button[title='{folder}']")

    def tiles(self) -> int:
        return self.page.locator("#results .tile").count()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.id || document.activeElement.className")


@pytest.mark.slow
def test_a_visit(trained, collection, tmp_path):
    require_chromium()
    with (
        running(tmp_path, str(collection.parent / "fotos.lance"), trained) as (client, network),
        open_browser() as opened,
    ):
        visitor = Visitor(opened)
        visitor.open(client.url)
        assert opened.page.evaluate("document.documentElement.lang") == "pt-BR"
        searches(visitor)
        narrows_the_search(visitor, collection)
        looks_closely(visitor, collection)
        gives_feedback(visitor)
        searches_by_pictures(visitor)
        classifies(visitor)
        uses_the_keyboard(visitor)
        sees_the_index_grow(visitor, collection, trained)
        sees_how_far_an_indexing_is(visitor, collection.parent / "fotos.lance")
        uses_english_on_a_phone(visitor, client.url)
        assert not [error for error in opened.errors if "status of 400" not in error], (
            "no errors except for refused pictures"
        )
        assert not opened.refused and not opened.dialogs
        assert all(request.startswith((client.url, "data:", "blob:")) for request in opened.requests)
    assert network.read_text() == "", "the server made no request to other machines"


def searches(visitor: Visitor) -> None:
    """Shows the newest pictures first; then searches while typing, and with Enter."""
    visitor.first_is("rocket")
    visitor.sees("#said", "As mais recentes")
    visitor.sees("#facts", "35 imagens, modelo treinado")
    assert visitor.tiles() == 34, "two of the 35 are near-duplicates"
    assert ATTACK in visitor.page.locator(f".tile[title='{ATTACK}'] .caption").inner_text()
    for text in ("vermelho embaixo", "azul inteiro"):
        visitor.page.fill("#text", text)  # without Enter
        visitor.first_is(text)
    visitor.page.fill("#text", "amarelo na direita")
    visitor.page.keyboard.press("Enter")
    visitor.first_is("amarelo na direita")
    assert "text=amarelo" in visitor.page.url
    visitor.page.go_back()
    visitor.page.reload()
    visitor.page.locator("#results .tile").first.wait_for()
    sees_that_a_search_is_slow(visitor.page)
    visitor.page.fill("#text", "um gato " * 80)
    visitor.sees("#said", "só lê o começo")
    visitor.page.fill("#text", "")
    visitor.first_is("rocket")


def sees_that_a_search_is_slow(page: "Page") -> None:
    page.route("**/api/search", lambda route: None)
    page.fill("#text", "azul inteiro")
    page.locator("#said[role=status]", has_text="Buscando…").wait_for()
    page.unroute("**/api/search")


def narrows_the_search(visitor: Visitor, folder: Path) -> None:
    visitor.page.fill("#since", "2024-01-03")
    visitor.page.fill("#until", "2024-01-05")
    visitor.page.locator("#results .tile").nth(3).wait_for(state="detached")
    assert visitor.tiles() == 3 and "since=2024-01-03" in visitor.page.url
    visitor.page.fill("#until", "2023-01-01")
    visitor.sees("#notice", server.load_page_messages("pt")["errors"]["dates"])
    visitor.page.click("#clear")
    visitor.first_is("rocket")
    assert visitor.page.locator("#notice").is_hidden()
    visitor.page.fill("#until", "2000-01-01")
    visitor.sees("#said", "Nenhuma imagem nesta pasta e nestas datas")
    visitor.page.click("#clear")
    visitor.first_is("rocket")
    visitor.chooses("folder", folder)
    visitor.first_is("rocket")
    visitor.page.click("#clear")
    goes_down_the_tree_by_keys(visitor, folder)


def goes_down_the_tree_by_keys(visitor: Visitor, folder: Path) -> None:
    """Opens the tree of folders with their counts and goes to a deep folder; Escape closes the tree."""
    page, press = visitor.page, visitor.page.keyboard.press
    page.focus("#folder > button")
    press("Enter")
    page.locator(f"#folder .tree button[title='{folder}']").wait_for()
    rows = page.locator("#folder .tree li > button[title]").all_inner_texts()
    assert [row.split("\n")[-2:] for row in rows][:2] == [[f"{folder.parent.name}/fotos", "35"], ["amarelo", "5"]]
    assert page.locator("#folder details[open] details").count() == 0
    press("Tab"), press("Tab"), press("Tab"), press("Enter")
    page.locator("#folder .tree li li").first.wait_for(state="hidden")
    press("Enter"), press("Escape")
    assert page.evaluate("document.activeElement.parentElement.id") == "folder"
    page.locator("#folder .tree li").first.wait_for(state="detached")
    press("Enter")
    page.locator(f"#folder .tree button[title='{folder / 'verde'}']").focus()
    press("Enter")
    page.locator("#results .tile").nth(5).wait_for(state="detached")
    assert visitor.tiles() == 5 and visitor.text("#folder > button").endswith("fotos/verde") and "verde" in page.url
    page.click("#clear")
    visitor.first_is("rocket")


def looks_closely(visitor: Visitor, folder: Path) -> None:
    """Opens a picture large with its metadata, and uses the buttons of the large view."""
    page, path = visitor.page, folder / "viagem" / "coffee.jpg"
    page.click(".tile[title='coffee']")
    page.locator("#viewer-picture[src^='blob:']").wait_for()
    page.wait_for_function("document.getElementById('viewer-picture').naturalWidth === 600")
    metadata = visitor.text("#viewer-facts")
    assert (
        "5 de março de 2025" in metadata and "600 × 400 pixels" in metadata and "12,97083° S, 38,51000° O" in metadata
    )
    assert f"{round(path.stat().st_size / 1000)} kB" in metadata
    assert visitor.text("#viewer-path") == str(path) and visitor.text("#viewer-title") == "coffee"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    visitor.sees("#viewer-said", "Copiado.")
    assert page.evaluate("navigator.clipboard.readText()") == str(path)
    page.keyboard.press("ArrowRight")
    visitor.sees("#viewer-title", "chelsea")
    page.keyboard.press("ArrowLeft")
    visitor.sees("#viewer-title", "coffee")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "coffee.jpg"
    assert Path(download.value.path()).read_bytes() == path.read_bytes()
    page.keyboard.press("Escape")
    assert page.locator("#viewer").is_hidden()
    page.wait_for_function("document.activeElement.title === 'coffee'")  # the focus returns to the tile
    path.rename(folder / "away")
    page.keyboard.press("Enter")
    visitor.sees("#viewer-said", "O original não está nesta máquina")
    assert page.locator("#download").is_hidden()
    (folder / "away").rename(path)
    page.keyboard.press("Escape")
    page.click(".tile[title='azul inteiro']")
    page.click("#similar")
    visitor.sees("#said", "As mais parecidas")
    page.locator("#feedback img").wait_for()
    assert page.evaluate("document.activeElement.id") == "results", "the focus is on the results"
    assert not page.locator("#results .tile[title='azul inteiro']").count(), "the query picture is not a result"
    page.click("#feedback button")
    visitor.first_is("rocket")
    page.go_back()
    page.locator("#feedback img").wait_for()
    page.go_back()
    visitor.first_is("rocket")


def gives_feedback(visitor: Visitor) -> None:
    """Uses the buttons of the large view by keys alone; each picture of the feedback is shown and can be removed."""
    page = visitor.page

    def toggles_feedback(name: str, way: str) -> None:
        page.focus(f"#results .tile[title='{name}']")
        page.keyboard.press("Enter")
        page.focus(f"#feedback-{way}")
        page.keyboard.press("Enter")

    toggles_feedback("rocket", "less")
    visitor.sees("#said", "As mais diferentes primeiro, menos de rocket.")
    assert page.locator("#results .tile").last.get_attribute("title") == "rocket"
    page.get_by_role("button", name="Tirar “menos de rocket”").click()
    visitor.first_is("rocket")
    page.fill("#text", "azul")
    visitor.sees("#said", "As mais parecidas com “azul”.")
    first = page.locator("#results .tile").first
    name = first.get_attribute("title")
    score = page.locator(f"#results .tile[title='{name}'] .score")
    before = score.text_content()
    toggles_feedback(name, "less")
    visitor.sees("#said", f"As mais parecidas com “azul”, menos de {name}.")
    assert score.text_content() < before and visitor.focused() == "results"
    toggles_feedback("coffee", "more")
    visitor.sees("#said", f"mais de coffee, menos de {name}.")
    assert "more=" in page.url and "less=" in page.url
    page.reload()
    visitor.sees("#feedback li:first-child", "mais de coffee")
    page.get_by_role("button", name=f"Tirar “menos de {name}”").click()
    visitor.sees("#said", "As mais parecidas com “azul”, mais de coffee.")
    toggles_feedback("coffee", "more")  # a second time removes it
    visitor.sees("#said", "As mais parecidas com “azul”.")
    assert not page.locator("#feedback li").count()
    page.fill("#text", "")
    visitor.first_is("rocket")


def searches_by_pictures(visitor: Visitor) -> None:
    """Sends broken pictures, a picture of the index, a picture of several megabytes, and a picture with words."""
    for name, data, message in (
        ("ilegivel.png", b"\x89PNG\r\n\x1a\nnada disso", "Não foi possível ler"),
        ("bomba.png", bomb(), "pixels demais"),
    ):
        visitor.gives("search", name, data)
        visitor.sees("#notice", message)
    visitor.pastes(png(13))
    visitor.first_is(CAPTIONS[13])
    assert "1,00" in visitor.page.locator("#results .tile .score").first.inner_text()
    noise = Image.effect_noise((1500, 1500), 90).convert("RGB")
    noise.save(file := io.BytesIO(), "PNG")
    assert len(file.getvalue()) > 1_000_000
    with visitor.page.expect_request(lambda request: "api/search" in request.url) as request:
        visitor.gives("search", "grande.png", file.getvalue())
    assert len(request.value.post_data_buffer or b"") < len(file.getvalue()), (
        "a large picture is shrunk before it is sent"
    )
    visitor.sees("#said", "As mais parecidas")
    visitor.gives("search", "boa.png", png(0))
    visitor.first_is(CAPTIONS[0])
    visitor.page.fill("#text", CAPTIONS[0])
    visitor.first_is(CAPTIONS[0])
    visitor.page.fill("#text", "")
    visitor.page.click("#feedback button")
    visitor.first_is("rocket")


def classifies(visitor: Visitor) -> None:
    page = visitor.page
    page.click("label:has(#classifying)")
    assert page.locator("#search").is_hidden()
    page.click("#labels-form [type=submit]")
    visitor.sees("#notice", server.load_page_messages("pt")["errors"]["nothing_given"])
    page.fill("#labels", "azul inteiro\nverde embaixo\npreto em cima")
    page.fill("#template", "{}")
    visitor.gives("classify", "boa.png", png(CAPTIONS.index("verde embaixo")))
    visitor.sees("#classified li:first-child", "verde embaixo")
    assert visitor.page.locator("#classified data").first.inner_text().endswith(" %")
    page.fill("#labels", "um só")
    page.click("#labels-form [type=submit]")
    visitor.sees("#notice", "pelo menos dois")
    page.click(".parts label >> nth=0")


def uses_the_keyboard(visitor: Visitor) -> None:
    """Goes from the start of the page to the search button by Tab."""
    page = visitor.page
    page.reload()
    page.locator("#results .tile").first.wait_for()
    page.keyboard.press("Tab")
    assert visitor.focused() == "skip"
    order = []
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(visitor.focused())
    assert order.index("text") < order.index("search-file") < order.index("go main")


def sees_the_index_grow(visitor: Visitor, folder: Path, model: Path) -> None:
    """The results are updated and keep the focus; a video is reported as left out."""
    visitor.page.fill("#text", "azul na esquerda")
    visitor.first_is("azul na esquerda")
    visitor.page.focus("#results li:nth-child(2) .tile")
    second = visitor.page.evaluate("document.activeElement.title")
    made_pictures.made_pictures()[3].save(folder / "novissima.png")
    (folder / "filme.mp4").write_bytes(bytes(9))
    made_index(folder.parent / "fotos.lance", folder, model)
    visitor.sees("#results li:first-child .same", "2 iguais")
    assert visitor.page.evaluate("document.activeElement.title") == second
    visitor.sees("#facts", "36 imagens, 1 vídeo não é indexado")
    visitor.page.fill("#text", "")
    visitor.page.locator("#results li:first-child > .tile[title='novissima'] + .same").wait_for(timeout=30_000)
    shows_near_duplicates(visitor.page)


def shows_near_duplicates(page: "Page") -> None:
    """Shows the near-duplicates of a picture by its button, also by keys; they are pictures like any other."""
    count, copies = page.locator("#results .same").first, page.locator("#results .copy .tile")
    assert count.inner_text() == "2 iguais"
    assert count.get_attribute("aria-label") == "2 iguais: novissima"
    assert "novissima" in count.get_attribute("title")
    count.evaluate("button => (button.click(), button.click())")  # the second click comes before the answer
    copies.wait_for()
    assert count.get_attribute("aria-expanded") == "true" and copies.get_attribute("title") == "azul na esquerda"
    page.keyboard.press("Space")
    copies.wait_for(state="detached")
    assert count.get_attribute("aria-expanded") == "false"
    page.keyboard.press("Enter")
    copies.wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#viewer-title", has_text="azul na esquerda").wait_for()
    assert "4 de janeiro de 2024 às 12:00 (arquivo)" in page.locator("#viewer-facts").inner_text()
    page.keyboard.press("Escape")


def sees_how_far_an_indexing_is(visitor: Visitor, where: Path) -> None:
    """The page shows the progress of another process, which holds the lock of the index."""
    texts = {None: "Indexando 120 de 3.400", 41: "falta menos de um minuto", 145: "faltam 2 min", 8500: "faltam 2 h"}
    with PictureTable(where).locked():
        for left_s, text in texts.items():
            write_json(where / PROGRESS_FILE, {"done": 120, "total": 3400, "left_s": left_s})
            visitor.page.get_by_text(text if left_s is None else f"{texts[None]}, {text}", exact=True).wait_for()
        assert visitor.page.locator("#progress").evaluate("bar => bar.value / bar.max") == 120 / 3400
    visitor.page.locator("#work").wait_for(state="hidden")


def uses_english_on_a_phone(visitor: Visitor, url: str) -> None:
    """The page in English, 390 pixels wide."""
    page = visitor.page
    page.set_viewport_size({"width": 390, "height": 844})
    page.click(".language")
    page.locator("#results .tile").first.wait_for()
    assert "lang=en" in page.url and page.evaluate("document.documentElement.lang") == "en"
    visitor.sees("#said", "Most recent first")
    page.set_viewport_size({"width": 390, "height": 664})  # a small phone, without the bars of the browser
    page.evaluate("text => document.querySelector('#note').textContent = text", Messages("en")("miniature"))
    assert page.locator("#results .tile").first.bounding_box()["y"] < 664 / 2
    short_height = page.locator("#note").bounding_box()["height"]
    page.click("#note")
    assert page.locator("#note").bounding_box()["height"] > short_height + 40, "a tap shows all of a long note"
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#text", "vermelho embaixo")
    visitor.first_is("vermelho embaixo")
    assert not visitor.opened.scrolls_sideways()
    page.click("#results .tile >> nth=0")
    visitor.sees("#similar", "More like this")
    assert not visitor.opened.scrolls_sideways() and "Similarity" in visitor.text("#viewer-facts")
    page.locator("#download").wait_for()
    assert page.locator("#download").bounding_box()["x"] < 390
    page.click("#close")
    page.click("label:has(#classifying)")
    page.fill("#labels", "azul inteiro, verde embaixo")
    visitor.gives("classify", "boa.png", png(0))
    visitor.sees("#classified h2", "It is: azul inteiro")
    assert not visitor.opened.scrolls_sideways()
    page.goto(f"{url}/?lang=pt")
    visitor.sees("#results .same", "2 iguais")
    page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_no_serious_accessibility_fault(width, scheme, trained, collection, tmp_path, monkeypatch):
    """In all states of the page, with the credit of a Space and with the relevance threshold."""
    required_packages(AXE)
    monkeypatch.setattr(PictureIndex, "_compute_relevance_threshold", lambda self, vector: 0.5)
    indices = [
        PictureIndex.open(where, str(trained)) for where in (tmp_path / "new", collection.parent / "fotos.lance")
    ]
    indices[1].relevance_threshold = True
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_browser(width))
        page, visitor = opened.page, Visitor(opened)
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for index in indices:
            page.goto(stack.enter_context(served(index, credit=Credit("Áreas", "cc-by-sa-4.0", "Feitas aqui."))).url)
            visitor.sees("#facts", "modelo treinado")
            assert not serious_faults(page)
        page.fill("#text", "azul inteiro")
        visitor.sees("#results .threshold", "Daqui para baixo, pouco parecidas")
        page.locator("#results .same").first.click()
        page.locator("#results .copy .tile").first.wait_for()
        assert not serious_faults(page)
        page.locator("#results .tile").first.click()
        page.click("#feedback-less")
        page.locator("#feedback li").wait_for()
        page.click("#folder > button")
        page.locator("#folder .tree li li").first.wait_for()
        assert not serious_faults(page) and not opened.scrolls_sideways()
        page.keyboard.press("Escape")
        page.locator("#results .tile").first.click()
        visitor.sees("#download", "Baixar original")
        assert not serious_faults(page)
        page.keyboard.press("Escape")
        page.click("label:has(#classifying)")
        visitor.gives("classify", "boa.png", png(0))
        visitor.sees("#classified h2", "")
        assert not serious_faults(page) and not opened.errors
        page.set_content("<img src=data:,><button></button>")
        assert "image-alt" in [rule for rule, *_ in serious_faults(page)]
