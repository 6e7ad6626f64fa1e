"""The page without a server: its folder, and a visit in Chromium with real pictures and a model of real encoders."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import ISOLATED, Browser, open_browser, served_folders
from in_browser import required_packages, serious_faults
from made_pictures import bomb
from PIL import Image

pytest.importorskip("uvicorn", reason="hub_upload.space needs uvicorn: pip install -e '.[app]'")

from capivara_search.index import PictureIndex
from capivara_search.miniature import get_miniature_folder
from capivara_search.page import server
from examples.openmoji.concepts import load_concepts
from examples.openmoji.dataset import render_png
from examples.real_images import CLASS_PHOTOGRAPHS, load_photo
from hub_upload.space import static_page
from hub_upload.space.__main__ import main
from hub_upload.space.static_page import SOURCE_SCRIPT, render_static_page, write_static_page

ATTACK = "<img src=x onerror=alert(1)>.png"
DRAWINGS = ["1F34C", "1F415", "1F692", "2708", "1F333", "1F34E", "1F422", "1F997", "1F6B2", "1F3B8"]
NUMBER = 50
MODEL = {"id": "0123456789abcdef", "name": "<b>m</b>", "megabytes": 5, "side": 224, "width": 512}


# --- The folder ------------------------------------------------------------------------------------------------------


def test_the_page_may_ask_no_other_host():
    page = render_static_page("pt", MODEL)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'" and "http" not in policy
    for text in (page, SOURCE_SCRIPT.read_text("utf-8")):
        assert not re.search(r"https?://|innerHTML|eval\(", text)
    assert "<b>m</b>" not in page and '<html lang="en">' in render_static_page("en", MODEL)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--static", "x", "--space", "y"], "or --static FOLDER alone"),
        (["--static", "x"], "--static FOLDER needs --library, the node_modules of `npm install"),
        (["--static", "x", "--library", "."], r"^--library \. has no @huggingface/transformers/.*of npm"),
    ],
)
def test_errors_are_one_line(tiny_folder, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        main(["--model", str(tiny_folder), *more])
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def library() -> Path:
    """npm's packages."""
    return required_packages()


@pytest.fixture(scope="module")
def page(library, tmp_path_factory) -> Path:
    """The folder of the page of the miniature."""
    folder = tmp_path_factory.mktemp("static") / "page"
    main(["--model", str(get_miniature_folder()), "--static", str(folder), "--library", str(library)])
    return folder


@pytest.mark.slow
def test_the_folder(page, library, tmp_path):
    known = json.loads(re.search(r'id="words">(.*?)</script>', (page / "index.html").read_text("utf-8"))[1])
    folder = page / "model" / known["own_model"]["id"]
    assert known["own_model"]["side"] == 224
    scripts = {path.name for path in (server.PAGE_FOLDER / "static").iterdir()}
    assert {path.name for path in (page / "static").iterdir()} == scripts
    assert (page / "static" / "source.js").read_bytes() == SOURCE_SCRIPT.read_bytes()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == set(static_page.PAGE_MODEL_FILES), "nothing else of the model is published"
    about = yaml.safe_load((page / "README.md").read_text("utf-8").split("---\n")[1])
    assert about["sdk"] == "static" and about["custom_headers"]["cross-origin-opener-policy"] == "same-origin"
    assert "models" not in about and "O modelo: cc-by-sa-4.0." in (page / "README.md").read_text("utf-8")
    assert "sourceMappingURL" not in (page / "library" / "onnxruntime.js").read_text()
    for path in page.rglob("*"):
        assert not path.is_file() or str(page.parent).encode() not in path.read_bytes(), f"{path} names this machine"
    # A folder that has been exported for transformers.js, which is taken as it is.
    exported = shutil.copytree(get_miniature_folder(), tmp_path / "exported")
    shutil.copytree(folder, exported, dirs_exist_ok=True)
    write_static_page(str(exported), tmp_path / "again", library)
    assert [path.name for path in (tmp_path / "again/model").iterdir()] == [folder.name], "or all is fetched again"
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    (exported / "tokenizer_config.json").write_text(json.dumps(settings | {"token": "hf_" + "aB3" * 11}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json, line 1, holds"):
        write_static_page(str(exported), tmp_path / "other", library)


# --- A visit ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fotos(tmp_path_factory) -> Path:
    """Fifty pictures: photographs of scikit-image as JPEG, one of them lying, and drawings of OpenMoji as PNG."""
    folder = tmp_path_factory.mktemp("fotos")
    for name in CLASS_PHOTOGRAPHS:
        image, exif = load_photo(name).convert("RGB"), Image.Exif()
        if name == "chelsea":
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / f"{name}.jpg", quality=92, exif=exif)
    emoji = [*DRAWINGS, *(pictures[0].emoji for pictures in load_concepts().values())]
    for code in list(dict.fromkeys(emoji))[: NUMBER - len(CLASS_PHOTOGRAPHS) - 1]:
        (folder / f"{code}.png").write_bytes(render_png(code))
    transparent = Image.new("RGBA", (300, 200))
    transparent.paste((200, 30, 40, 255), (60, 40, 240, 160))
    transparent.save(folder / ATTACK)
    assert len(list(folder.iterdir())) == NUMBER
    return folder


class Visitor:
    """What a visitor does and sees."""

    def __init__(self, opened: Browser, url: str):
        self.opened, self.page, self.url = opened, opened.page, url
        self.page.goto(url, wait_until="load")
        self.sees("#facts", "modelo")

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
def test_a_visit(page, fotos, tmp_path):
    files, model = sorted(fotos.iterdir()), get_miniature_folder()
    with served_folders({"/": page}) as url, open_browser() as opened:
        visitor = Visitor(opened, url)
        visitor.sees(".collect .hint", "é baixado uma vez")
        assert not [request for request in opened.requests if "/model/" in request], "it is fetched when needed"
        indexes(visitor, files)
        searches_as_python_does(visitor, model, fotos, tmp_path)
        looks_closely(visitor)
        has_a_telephone_and_reads_english(visitor, files)
        assert not opened.errors and not opened.refused
        assert all(request.startswith((url, "blob:" + url)) for request in opened.requests)


def indexes(visitor: Visitor, files: list[Path]) -> None:
    """Half of the pictures, some that are none, then all of them."""
    page = visitor.page
    visitor.picks(files[:25])
    visitor.sees("#progress-said", "Baixando o modelo")
    visitor.sees("#progress-said", "de 25")
    broken = [{"name": "ilegivel.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\nnada disso"}]
    broken += [{"name": "bomba.png", "mimeType": "image/png", "buffer": bomb()}]
    Image.new("RGB", (1, 30_000)).save(thread := io.BytesIO(), "PNG")  # the gate refuses it, too
    broken += [{"name": "fio.png", "mimeType": "image/png", "buffer": thread.getvalue()}]
    page.set_input_files("#files", broken)
    visitor.sees("#collected", "Nenhuma imagem nova. 3 não puderam ser lidas: ilegivel.png, bomba.png, fio.png")
    page.set_input_files("#files", [{"name": "notas.txt", "mimeType": "text/plain", "buffer": b"nada"}])
    visitor.sees("#collected", "Não há imagens entre os arquivos")
    visitor.picks(files)
    visitor.sees("#collected", f"{NUMBER - 25} imagens novas.")
    assert page.locator("#work").is_hidden()
    visitor.sees("#facts", f"{NUMBER} imagens, modelo")
    page.click("#more")
    page.locator("#results .tile").nth(NUMBER - 1).wait_for()
    assert ATTACK in page.locator(f".tile[title='{ATTACK}'] .caption").inner_text()


def searches_as_python_does(visitor: Visitor, model: Path, fotos: Path, tmp_path: Path) -> None:
    """Scores near to those of the index, by 8 bits and the canvas's filter, and the same pictures first."""
    index = PictureIndex.open(tmp_path / "fotos.lance", str(model))
    index.add(fotos)
    for text in ("uma banana", "um cachorro", "um foguete decolando"):
        found, shown = visitor.finds(text), visitor.page.locator("#results .score").all_text_contents()
        theirs = {Path(hit.path).name: hit.score for hit in index.search(text, k=NUMBER)}
        assert len(set(found[:5]) & set(list(theirs)[:5])) >= 4 and found[0] in list(theirs)[:2], (text, found, theirs)
        scores = np.array([float(one.replace(",", ".")) for one in shown])
        differences = np.abs(scores - [theirs[name] for name in found])
        assert differences.max() < 0.1 and np.median(differences) < 0.02
    assert visitor.finds("uma banana")[0] == "1F34C.png"
    visitor.page.fill("#text", "um gato " * 80)
    visitor.sees("#said", "só lê o começo")
    visitor.page.fill("#text", "")
    visitor.sees("#said", "As mais recentes")


def looks_closely(visitor: Visitor) -> None:
    page = visitor.page
    visitor.finds("um gato")
    page.click(".tile[title='chelsea.jpg']")
    page.wait_for_function(f"document.getElementById('viewer-picture').naturalWidth === {load_photo('chelsea').width}")
    width, height = load_photo("chelsea").size
    facts = page.locator("#viewer-facts").inner_text()
    assert "kB" in facts and "(arquivo)" in facts and f"{width} × {height} pixels" in facts, "turned upright"
    assert page.locator("#download").is_hidden(), "it is the visitor's own"
    page.keyboard.press("ArrowRight")
    page.locator("#viewer-title:not(:text-is('chelsea.jpg'))").wait_for()
    page.keyboard.press("ArrowLeft")
    visitor.sees("#viewer-title", "chelsea.jpg")
    page.click("#similar")
    visitor.sees("#said", "As mais parecidas com a imagem")
    assert not page.locator(".tile[title='chelsea.jpg']").count()
    page.fill("#text", "um gato")
    visitor.sees("#said", "As mais parecidas com “um gato” e a imagem")
    page.fill("#text", "")
    page.click("#feedback button")
    visitor.sees("#said", "As mais recentes")


def has_a_telephone_and_reads_english(visitor: Visitor, files: list[Path]) -> None:
    """A page that is opened again has forgotten the pictures, not the model."""
    page, before = visitor.page, len(visitor.opened.requests)
    page.set_viewport_size({"width": 390, "height": 844})
    page.click(".language")
    visitor.sees("#said", "There are no pictures here yet")
    assert page.evaluate("document.documentElement.lang") == "en" and not visitor.opened.scrolls_sideways()
    visitor.picks(files[:3])
    visitor.sees("#collected", "3 new pictures.")
    visitor.finds("um cachorro", "Closest to")
    assert not [request for request in visitor.opened.requests[before:] if ".onnx" in request], "it was kept"
    assert not visitor.opened.scrolls_sideways()
    page.click("#results .tile >> nth=0")
    assert not visitor.opened.scrolls_sideways()
    page.click("#close")
    page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.slow
def test_threads_a_broken_download_and_other_hosts(page, fotos, tmp_path):
    files = sorted(fotos.glob("*.png"))[:3]
    (weights,) = page.glob("model/*/onnx/vision_model_quantized.onnx_data")
    weights.rename(tmp_path / "weights")
    with served_folders({"/": page}, ISOLATED) as url, served_folders({"/": page}) as other, open_browser() as opened:
        visitor = Visitor(opened, url)
        visitor.picks(files)
        visitor.sees("#collected", "Não foi possível carregar o modelo")
        (tmp_path / "weights").rename(weights)
        visitor.picks(files)
        visitor.sees("#collected", "3 imagens novas")
        assert not serious_faults(opened.page)
        assert len(visitor.finds("um cachorro")) == 3 and not serious_faults(opened.page)
        workers = len(opened.page.workers)
        assert workers == min(opened.page.evaluate("navigator.hardwareConcurrency"), 8) - 1, "threads of onnxruntime"
        ask = "(url) => fetch(url).then(() => 'answered', () => 'refused')"
        assert opened.page.evaluate(ask, f"{url}index.html") == "answered"
        assert opened.page.evaluate(ask, f"{other}index.html") == "refused"
