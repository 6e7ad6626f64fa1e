"""The page without a server: its folder, and a visit in Chromium with real pictures and a model of real encoders."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import ISOLATED, Browser, open_browser, require_chromium, served_with_headers
from made_pictures import bomb
from PIL import Image
from tokenizers import Tokenizer, normalizers

pytest.importorskip("uvicorn", reason="hub_upload.space needs uvicorn: pip install -e '.[app]'")

from capivara_search.index import PictureIndex
from capivara_search.miniature import miniature_folder
from examples.openmoji.concepts import concept_rows
from examples.openmoji.dataset import render_png
from examples.real_images import PHOTOS, photo
from hub_upload.export import export
from hub_upload.formats.transformers_js import NMT
from hub_upload.space import static_page
from hub_upload.space.__main__ import main
from hub_upload.space.static_page import (
    LIBRARIES,
    OURS,
    PAGES,
    RUNTIMES,
    SCRIPTS,
    SOURCES,
    made_graphs,
    model_name,
    npm_packages,
    page_html,
    pixel_facts,
    write_static_page,
)
from modeling_capivara import CapivaraImageProcessor

ATTACK = "<img src=x onerror=alert(1)>.png"
DRAWINGS = ["1F34C", "1F415", "1F692", "2708", "1F333", "1F34E", "1F422", "1F997", "1F6B2", "1F3B8"]
NUMBER = 50
# Buttons, links and fields that a screen reader would have no name for.
NAMELESS = """() => [...document.querySelectorAll("button, a[href], input, dialog, section, progress")]
  .filter((one) => !(one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.innerText?.trim()
    || one.closest("label")?.innerText.trim() || (one.id && document.querySelector(`label[for=${one.id}]`))))
  .map((one) => one.outerHTML.slice(0, 80))"""
VECTORS = """async () => (await import("./static/pictures.js")).newest(1000)
  .map(({ name, width, height, vector }) => ({ name, width, height, vector: [...vector] }))"""
KEPT = "caches.open('capivara-model').then((cache) => cache.keys()).then((keys) => keys.length)"


def require_npm() -> None:
    """Skip the test where npm is missing or its registry out of reach; with CI_REQUIRES_NODE=1 that fails."""
    answer, fault = pytest.fail if os.environ.get("CI_REQUIRES_NODE") == "1" else pytest.skip, None
    if shutil.which("npm") is None:
        fault = "npm is not installed (apt-get install npm)"
    elif subprocess.run(["npm", "view", "onnxruntime-web", "version"], capture_output=True).returncode:
        fault = "npm's registry can't be reached"
    if fault:
        answer(f"{fault}, so the page's libraries can't be fetched")


# --- The folder ------------------------------------------------------------------------------------------------------


def test_every_word_of_the_page_is_there_in_both_languages():
    words = {language: json.loads((OURS / f"{language}.json").read_text("utf-8")) for language in PAGES}
    assert list(words["pt"]) == list(words["en"]) and list(words["pt"]["errors"]) == list(words["en"]["errors"])
    said = set()
    for name in SCRIPTS:
        said |= set(re.findall(r'say\("(\w+)"', (OURS / name).read_text("utf-8")))
    for language in PAGES:
        page = page_html(language)
        assert "{{" not in page and f'<html lang="{"pt-BR" if language == "pt" else "en"}">' in page
        known = json.loads(re.search(r'id="words">(.*?)</script>', page)[1])
        assert not {key for key in said if key not in known and f"{key}_other" not in known}
        for key, text in words[language].items():
            if isinstance(text, str):
                assert re.findall(r"\{\w+\}", text) == re.findall(r"\{\w+\}", words["en"][key])


def test_every_error_has_its_words():
    codes = set()
    for name in (*SCRIPTS, "worker.js"):
        codes |= set(re.findall(r'(?:coded\(|code(?:: | \?\? ))"(\w+)"', (OURS / name).read_text("utf-8")))
    assert codes and codes == set(json.loads((OURS / "pt.json").read_text("utf-8"))["errors"])


def test_the_page_may_ask_no_other_host():
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page_html("pt"))[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'" and "http" not in policy
    for name in (*SCRIPTS, "worker.js", "index.html"):
        assert not re.search(r"https?://|innerHTML|eval\(", (OURS / name).read_text("utf-8")), name


def test_a_model_is_called_as_its_card_calls_it(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    assert model_name(str(folder), folder) == "repo"
    (folder / "README.md").write_text("---\nmodel-index:\n- name: CAPIVARA (pt)\n---\n")
    assert model_name(str(folder), folder) == "CAPIVARA (pt)"
    assert model_name("hiaac-nlp/CAPIVARA", folder) == "hiaac-nlp/CAPIVARA"


def test_a_processor_that_the_page_does_not_know_is_refused():
    facts = pixel_facts(CapivaraImageProcessor())
    assert facts["side"] == 224 and len(facts["mean"]) == len(facts["std"]) == 3
    for settings in ({"resample": 2}, {"size": {"shortest_edge": 256}}):
        with pytest.raises(ValueError, match="The page resizes by bicubic interpolation"):
            pixel_facts(CapivaraImageProcessor(**settings))
    for settings in ({"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            pixel_facts(CapivaraImageProcessor(**settings))


def test_a_tokenizer_that_no_browser_reads_is_refused(tiny_folder, tmp_path, stand_in):
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.ByteLevel()
    tokenizer.save(str(tiny_folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no normaliser ByteLevel.* or --static"):
        write_static_page(str(tiny_folder), tmp_path / "page", stand_in)
    assert not (tmp_path / "page").exists()


def test_the_smallest_graph_of_a_tower_is_taken(tmp_path):
    """Of today's exports and of older ones; a tower without one is named."""
    onnx = tmp_path / "onnx"
    onnx.mkdir()
    for name in ("vision_model", "vision_model_fp16", "text_model", "text_model_int8"):
        (onnx / f"{name}.onnx").write_bytes(b"graph")
        (onnx / f"{name}.onnx{'.data' if name.endswith('int8') else '_data'}").write_bytes(b"weights")
    assert [path.name for path in made_graphs(tmp_path, tmp_path).values()] == [
        "vision_model.onnx",
        "text_model_int8.onnx",
    ]
    for name in ("text_model_quantized.onnx", "text_model_quantized.onnx_data"):
        (onnx / name).write_bytes(b"graph")
    assert made_graphs(tmp_path, tmp_path)["text"].name == "text_model_quantized.onnx"
    (onnx / "text_model_quantized.onnx_data").write_bytes(b"x hf_" + b"aB3" * 11 + b"a x")
    with pytest.raises(ValueError, match="onnx_data, byte 2, holds"):
        made_graphs(tmp_path, tmp_path)
    (onnx / "vision_model.onnx").unlink()
    with pytest.raises(ValueError, match=r"has no vision_model\.onnx"):
        made_graphs(tmp_path, tmp_path)


def test_the_libraries_come_from_npm_or_a_folder(tiny_folder, tmp_path, monkeypatch):
    flags = ["--model", str(tiny_folder), "--static", str(tmp_path / "page")]
    with pytest.raises(SystemExit, match=r"^error: --library .* has no @huggingface/tokenizers/.*npm install"):
        main([*flags, "--library", str(tmp_path)])
    monkeypatch.setattr(static_page.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: npm, which onnxruntime-web .* come from, is not installed"):
        main(flags)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--static", "x", "--space", "y"], "leave --space and --compare out"),
        (["--static", "x", "--compare", "y"], "leave --space and --compare out"),
        (["--space", "y", "--library", "x"], "--library is of --static"),
        (["--static", "."], "not empty"),
        (["--static", "x", "--model", "./no-model"], "no-model"),
    ],
)
def test_errors_are_one_line(tiny_folder, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        main(["--model", str(tiny_folder), *more])
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A node_modules with the names of the libraries' files, for tests that open no page."""
    modules = tmp_path / "node_modules"
    for name in (*SOURCES.values(), *RUNTIMES.values()):
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_text("export default 1;\n//# sourceMappingURL=x.map\n")
    for name in LIBRARIES:
        (modules / name / "package.json").write_text('{"version": "1.2.3", "license": "MIT"}')
    return modules


@pytest.fixture(scope="module")
def small_model(saved_tiny_folder, tmp_path_factory) -> Path:
    """A tiny model with its graphs, as transformers.js reads them."""
    folder = tmp_path_factory.mktemp("small") / "model"
    export(saved_tiny_folder, folder, ["transformers", "transformers_js"])
    return folder


@pytest.mark.slow
def test_the_folder(small_model, stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(static_page, "PART_BYTES", 10_000)
    page = tmp_path / "page"
    main(["--model", str(small_model), "--static", str(page), "--library", str(stand_in), "--repo_id", "us/page"])
    said = capsys.readouterr().out
    assert "python -m http.server" in said and "Nothing was sent" in said and "model/model.json" in said
    assert "of the program" not in said and "of the index" not in said
    facts = json.loads((page / "model" / "model.json").read_text("utf-8"))
    assert facts["side"] == 32 and facts["width"] == len(facts["probe"]) == 24
    for name, parts in facts["files"].items():
        files = [page / "model" / part["name"] for part in parts]
        assert [file.stat().st_size for file in files] == [part["bytes"] for part in parts], name
        assert all(part["bytes"] <= 10_000 for part in parts)
    assert len(facts["files"]["text_weights"]) > 1
    about = yaml.safe_load((page / "README.md").read_text("utf-8").split("---\n")[1])
    assert about["sdk"] == "static" and about["custom_headers"]["cross-origin-opener-policy"] == "same-origin"
    assert "models" not in about and "O modelo não declara licença." in (page / "README.md").read_text("utf-8")
    said = static_page._readme("org/model", small_model, stand_in)  # whose card may well declare one
    assert "[org/model](https://huggingface.co/org/model)" in said and "não declara" not in said
    assert "sourceMappingURL" not in (page / "library" / "ort.wasm.js").read_text()
    for path in page.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), f"{path} names this machine"
    write_static_page(str(small_model), tmp_path / "again", stand_in)
    assert json.loads((tmp_path / "again/model/model.json").read_text())["digest"] == facts["digest"], "or all is lost"


def test_the_replacements_do_what_the_normaliser_does():
    """Each letter of Unicode's first plane, between two others."""
    letters = [chr(code) for code in range(1, 0x10000) if not 0xD800 <= code < 0xE000]
    text = "".join(f"a{letter}b" for letter in letters)
    expected = normalizers.Nmt().normalize_str(text)
    for pattern, replacement in NMT.items():
        text = re.sub(pattern, replacement, text)
    assert text == expected


# --- A visit ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Path:
    return miniature_folder()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    require_npm()
    require_chromium()
    return npm_packages(tmp_path_factory.mktemp("npm"), LIBRARIES)


@pytest.fixture(scope="module")
def page(model, library, tmp_path_factory) -> Path:
    """The page of the miniature."""
    folder = tmp_path_factory.mktemp("static") / "page"
    write_static_page(str(model), folder, library)
    return folder


@pytest.fixture(scope="module")
def small_page(small_model, library, tmp_path_factory) -> Path:
    """The page of a tiny model."""
    folder = tmp_path_factory.mktemp("small") / "page"
    write_static_page(str(small_model), folder, library)
    return folder


@pytest.fixture(scope="module")
def fotos(tmp_path_factory) -> Path:
    """Fifty pictures: photographs of scikit-image as JPEG, one of them lying, and drawings of OpenMoji as PNG."""
    folder = tmp_path_factory.mktemp("fotos")
    for name in PHOTOS:
        image, exif = photo(name).convert("RGB"), Image.Exif()
        if name == "chelsea":
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / f"{name}.jpg", quality=92, exif=exif)
    emoji = [*DRAWINGS, *(pictures[0].emoji for pictures in concept_rows().values())]
    for code in list(dict.fromkeys(emoji))[: NUMBER - len(PHOTOS) - 1]:
        (folder / f"{code}.png").write_bytes(render_png(code))
    transparent = Image.new("RGBA", (300, 200))
    transparent.paste((200, 30, 40, 255), (60, 40, 240, 160))
    transparent.save(folder / ATTACK)
    assert len(list(folder.iterdir())) == NUMBER
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder by Python's plain file server, in a process of its own; its address."""
    command = ["timeout", "-k", "5", "300", sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "-d", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = re.search(r"port (\d+)", server.stdout.readline())[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(timeout=30)


class Visitor:
    """What a visitor does and sees."""

    def __init__(self, opened: Browser, url: str):
        self.opened, self.page, self.url = opened, opened.page, url
        self.page.goto(url, wait_until="load")
        self.page.locator("#collect").wait_for(timeout=30_000)

    def sees(self, selector: str, text: str, seconds: float = 60) -> None:
        self.page.locator(selector, has_text=text).first.wait_for(timeout=1000 * seconds)

    def picks(self, files: list[Path]) -> None:
        self.page.set_input_files("#files", files)

    def finds(self, text: str, said: str = "As mais parecidas com") -> list[str]:
        """Searches; the titles of what is found, in order."""
        self.page.fill("#text", text)
        self.sees("#said", f"{said} “{text}”")
        return self.page.locator("#results .tile").evaluate_all("tiles => tiles.map((tile) => tile.title)")


@pytest.mark.slow
def test_a_visit(page, model, fotos, tmp_path):
    files = sorted(fotos.iterdir())
    with served(page) as url, open_browser() as opened:
        visitor = Visitor(opened, url)
        assert not opened.page.evaluate(NAMELESS)
        visitor.sees("#promise", "é baixado uma vez e fica neste navegador")
        assert not [request for request in opened.requests if ".data" in request], "the model is fetched when needed"
        indexes(visitor, files)
        searches_as_python_does(visitor, model, fotos, tmp_path)
        looks_closely(visitor)
        comes_back(visitor, files)
        has_a_telephone_and_reads_english(visitor)
        forgets(visitor)
        assert not opened.errors and not opened.dialogs and not opened.refused
        assert all(request.startswith((url, "blob:" + url)) for request in opened.requests)


def indexes(visitor: Visitor, files: list[Path]) -> None:
    """Half of the pictures, stopped; then all of them, with some that are none."""
    page = visitor.page
    visitor.picks(files[:25])
    visitor.sees("#progress-said", "Baixando o modelo")
    visitor.sees("#progress-said", "por segundo · falta")
    page.click("#stop")
    visitor.sees("#said", "escolha as mesmas imagens para continuar")
    there = int(re.search(r"\d+", page.locator("#invitation").inner_text())[0])
    assert 0 < there < 25
    broken = [{"name": "ilegivel.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\nnada disso"}]
    broken += [{"name": "bomba.png", "mimeType": "image/png", "buffer": bomb()}]
    Image.new("RGB", (1, 30_000)).save(thread := io.BytesIO(), "PNG")  # PIL's processor refuses it, too
    broken += [{"name": "fio.png", "mimeType": "image/png", "buffer": thread.getvalue()}]
    page.set_input_files("#files", broken)
    visitor.sees("#said", "Nenhuma imagem nova. 3 não puderam ser lidas: ilegivel.png, bomba.png, fio.png")
    page.set_input_files("#files", [{"name": "notas.txt", "mimeType": "text/plain", "buffer": b"nada"}])
    visitor.sees("#said", "Não há imagens entre os arquivos")
    visitor.picks(files)
    visitor.sees("#said", f"{NUMBER - there} imagens novas. {there} já estavam aqui.")
    visitor.sees("#invitation", f"{NUMBER} imagens neste navegador")
    assert page.locator("#work").is_hidden() and "quando for preciso" in page.locator("#promise").inner_text()
    assert ATTACK in page.locator(f".tile[title='{ATTACK}'] .caption").inner_text()


def searches_as_python_does(visitor: Visitor, model: Path, fotos: Path, tmp_path: Path) -> None:
    """The same vectors as those of the index, and the same pictures first."""
    index = PictureIndex.open(tmp_path / "fotos.lance", str(model))
    index.add(fotos, exact=True)
    made = {one["name"]: one for one in visitor.page.evaluate(VECTORS)}
    assert made.keys() == {path.name for path in fotos.iterdir()}
    expected = np.asarray(index.vectors([str(fotos / name) for name in made]), dtype=np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    cosines = dict(zip(made, (expected * np.array([one["vector"] for one in made.values()])).sum(axis=1), strict=True))
    assert min(cosines.values()) > 0.999, min(cosines, key=cosines.get)
    chelsea = Image.open(fotos / "chelsea.jpg")
    assert (made["chelsea.jpg"]["width"], made["chelsea.jpg"]["height"]) == chelsea.size[::-1], "turned upright"
    for text in ("uma banana", "um cachorro", "um foguete decolando"):
        found = visitor.finds(text)
        theirs = [Path(hit.path).name for hit in index.search(text, k=5)]
        assert len(set(found[:5]) & set(theirs)) >= 4 and found[0] in theirs[:2], (text, found[:5], theirs)
    assert visitor.finds("uma banana")[0] == "1F34C.png"
    visitor.page.fill("#text", "um gato " * 80)
    visitor.sees("#said", "só lê o começo")
    visitor.page.fill("#text", "")
    visitor.sees("#said", "As mais recentes")


def looks_closely(visitor: Visitor) -> None:
    page = visitor.page
    page.click(".tile[title='chelsea.jpg']")
    page.wait_for_function("document.getElementById('viewer-picture').naturalWidth > 256")
    shown = page.evaluate(
        "(({ naturalWidth: w, naturalHeight: h }) => [w, h])(document.getElementById('viewer-picture'))"
    )
    assert shown == list(photo("chelsea").size), "the file itself, upright"
    assert not page.evaluate(NAMELESS)
    page.keyboard.press("ArrowRight")
    page.locator("#viewer-title:not(:text-is('chelsea.jpg'))").wait_for()
    page.keyboard.press("ArrowLeft")
    visitor.sees("#viewer-title", "chelsea.jpg")
    page.click("#similar")
    visitor.sees("#said", "As mais parecidas com a imagem")
    assert not page.locator(".tile[title='chelsea.jpg']").count()
    page.click("#search-picture button")
    visitor.sees("#said", "As mais recentes")


def comes_back(visitor: Visitor, files: list[Path]) -> None:
    """The next day: nothing is fetched and nothing read again, and thumbnails stand for the pictures."""
    page, before = visitor.page, len(visitor.opened.requests)
    page.reload()
    visitor.sees("#invitation", f"{NUMBER} imagens neste navegador")
    assert visitor.finds("uma banana")[0] == "1F34C.png"
    assert not [request for request in visitor.opened.requests[before:] if ".data" in request], "it was kept"
    page.click(".tile[title='1F34C.png']")
    visitor.sees("#viewer-said", "só guarda a miniatura")
    page.keyboard.press("Escape")
    visitor.picks(files)
    visitor.sees("#said", f"Nenhuma imagem nova. {NUMBER} já estavam aqui.")
    page.click(".tile[title='1F34C.png']")
    assert not visitor.page.locator("#viewer-said").inner_text()
    page.click("#forget-one")
    visitor.sees("#invitation", f"{NUMBER - 1} imagens neste navegador")


def has_a_telephone_and_reads_english(visitor: Visitor) -> None:
    page = visitor.page
    page.set_viewport_size({"width": 390, "height": 844})
    page.click(".language")
    visitor.sees("#invitation", f"{NUMBER - 1} pictures in this browser")
    assert page.evaluate("document.documentElement.lang") == "en" and not visitor.opened.scrolls_sideways()
    visitor.finds("um cachorro", "Closest to")
    assert not visitor.opened.scrolls_sideways() and not page.evaluate(NAMELESS)
    page.click("#results .tile >> nth=0")
    assert not visitor.opened.scrolls_sideways()
    page.click("#close")
    page.click("#forget")
    assert not visitor.opened.scrolls_sideways()
    page.click("#keep")
    page.click(".language")
    visitor.sees("#invitation", f"{NUMBER - 1} imagens")
    page.set_viewport_size({"width": 1280, "height": 900})


def forgets(visitor: Visitor) -> None:
    page = visitor.page
    page.click("#forget")
    assert page.evaluate(KEPT) > 5
    page.click("#forget-all")
    visitor.sees("#said", "As imagens e o modelo foram esquecidos")
    page.reload()
    visitor.sees("#said", "Ainda não há imagens aqui")
    assert page.evaluate(KEPT) == 0 and page.evaluate(VECTORS) == []
    page.fill("#text", "um gato")
    visitor.sees("#said", "Escolha algumas imagens primeiro")


@pytest.mark.slow
def test_the_worker_reaches_no_other_origin(small_page):
    """Workers have the policy of the page only where they are made as this one is."""
    with served(small_page) as url, served(small_page) as other, open_browser() as opened:
        Visitor(opened, url)
        (worker,) = opened.page.workers
        ask = "(url) => fetch(url).then(() => 'answered', () => 'refused')"
        assert worker.evaluate(ask, f"{url}model/model.json") == "answered"
        assert worker.evaluate(ask, f"{other}model/model.json") == "refused"


@pytest.mark.slow
def test_threads_little_memory_and_a_damaged_part(small_page, fotos, tmp_path):
    files = sorted(fotos.glob("*.png"))[:3]
    damaged = shutil.copytree(small_page, tmp_path / "page")
    part = next((damaged / "model").glob("vision_weights-*"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with served_with_headers(damaged, ISOLATED) as url, open_browser() as opened:
        opened.page.add_init_script("Object.defineProperty(navigator, 'deviceMemory', { value: 1 })")
        visitor = Visitor(opened, url)
        visitor.picks(files)
        visitor.sees("#notice", "Não foi possível baixar vision_weights")
        part.write_bytes(whole)
        visitor.picks(files)
        visitor.sees("#said", "3 imagens novas")
        assert len(visitor.finds("um cachorro")) == 3
        visitor.picks(sorted(fotos.glob("*.jpg"))[:1])  # the image tower again, which the text tower had displaced
        visitor.sees("#invitation", "4 imagens")
        threads = min(opened.page.evaluate("navigator.hardwareConcurrency"), 8)
        visitor.sees("#facts", f"{threads} thread")
        visitor.sees("#facts", "uma metade do modelo por vez")
        visitor.sees("#facts", "não oferece WebGPU")


@pytest.mark.slow
def test_a_browser_that_computes_something_else(small_page, fotos, tmp_path):
    other = shutil.copytree(small_page, tmp_path / "page")
    facts = json.loads((other / "model/model.json").read_text("utf-8"))
    facts["probe"] = [-value for value in facts["probe"]]
    (other / "model/model.json").write_text(json.dumps(facts), encoding="utf-8")
    with served(other) as url, open_browser() as opened:
        visitor = Visitor(opened, url)
        visitor.picks(sorted(fotos.iterdir())[:1])
        visitor.sees("#notice", "O modelo não dá aqui o resultado que deveria")
        visitor.sees("#invitation", "Escolha imagens suas")


@pytest.mark.slow
def test_webgpu_by_software(small_page, fotos):
    """Chromium's software GPU stands for a graphics card: the same vectors as those of the processor."""
    from playwright.sync_api import sync_playwright

    software = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    files, made = sorted(fotos.glob("*.png"))[:3], {}
    for name, flags in (("wasm", []), ("webgpu", software)):
        with served(small_page) as url, sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=require_chromium(), args=["--no-sandbox", *flags])
            visitor = Visitor(Browser(chromium.new_page()), url)
            if name == "webgpu" and not visitor.page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
                pytest.skip("this Chromium has no WebGPU in software")
            visitor.picks(files)
            visitor.sees("#said", "3 imagens novas", seconds=240)  # a GPU of software compiles for a minute
            visitor.sees("#facts", "WebGPU" if name == "wasm" else "na placa de vídeo (WebGPU)")
            made[name] = {one["name"]: np.array(one["vector"]) for one in visitor.page.evaluate(VECTORS)}
            chromium.close()
    assert all(made["wasm"][name] @ made["webgpu"][name] > 0.999 for name in made["wasm"])


@pytest.mark.slow
def test_pixels_are_those_of_the_processor(small_page):
    """To the last bit, larger and smaller than the model's input, lying and standing.

    Of pictures that are more than twice as tall as wide, Pillow 13 takes the rows first: they differ by a level or so.
    """
    generator, processor = np.random.default_rng(0), CapivaraImageProcessor()
    facts = json.dumps(pixel_facts(processor))
    script = f"""async (file) => {{
      const {{ decoded, pixels }} = await import("./static/pixels.js");
      const bytes = Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
      return [...pixels(await decoded(new Blob([bytes])), {facts})];
    }}"""
    level = 1 / 255 / np.array(processor.image_std, dtype=np.float32)[:, None, None]  # of 256, of each colour
    sizes = ((640, 481), (481, 640), (224, 224), (97, 61), (1303, 1000), (700, 333), (333, 700))
    with served(small_page) as url, open_browser() as opened:
        Visitor(opened, url)
        for width, height in sizes:
            few = generator.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
            image = Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)
            image.save(file := io.BytesIO(), "PNG")
            made = opened.page.evaluate(script, base64.b64encode(file.getvalue()).decode())
            expected = processor(images=image, return_tensors="np")["pixel_values"][0]
            levels = np.abs(np.array(made, dtype=np.float32).reshape(expected.shape) - expected) / level
            if height > 2 * width:
                assert levels.mean() < 0.5 and levels.max() < 8
            else:
                assert levels.max() < 1e-3, (width, height)
