"""The page without a server: its files, and a visit in Chromium with real pictures and a real small model."""

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
from capivara_search.miniature_model import get_or_build_miniature_folder
from capivara_search.page import server
from examples.openmoji.concepts import load_emoji_by_concept
from examples.openmoji.dataset import render_openmoji_png
from examples.real_images import CLASS_PHOTOGRAPHS, load_example_photo
from hub_upload.space import static_page
from hub_upload.space.__main__ import main
from hub_upload.space.static_page import SOURCE_SCRIPT, render_static_page, write_static_page

ATTACK = "<img src=x onerror=alert(1)>.png"
DRAWINGS = ["1F34C", "1F415", "1F692", "2708", "1F333", "1F34E", "1F422", "1F997", "1F6B2", "1F3B8"]
NUMBER = 50
MODEL = {"id": "0123456789abcdef", "name": "<b>m</b>", "megabytes": 5, "side": 224, "width": 512}


# --- Written folder --------------------------------------------------------------------------------------------------


def test_the_policy_of_the_page_forbids_other_hosts():
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
        (["--static", "x", "--space", "y"], "--space FOLDER .*--static FOLDER"),
        (["--static", "x"], "--static .*--library.*npm install"),
        (["--static", "x", "--library", "."], r"^--library \. .*@huggingface/transformers/"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(tiny_folder, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        main(["--model", str(tiny_folder), *more])
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def library() -> Path:
    """The folder node_modules."""
    return required_packages()


@pytest.fixture(scope="module")
def page(library, tmp_path_factory) -> Path:
    """The folder of a page with the miniature model."""
    folder = tmp_path_factory.mktemp("static") / "page"
    main(["--model", str(get_or_build_miniature_folder()), "--static", str(folder), "--library", str(library)])
    return folder


@pytest.mark.slow
def test_the_folder_has_page_scripts_library_and_model(page, library, tmp_path):
    words = json.loads(re.search(r'id="words">(.*?)</script>', (page / "index.html").read_text("utf-8"))[1])
    folder = page / "model" / words["own_model"]["id"]
    assert words["own_model"]["side"] == 224
    scripts = {path.name for path in (server.PAGE_FOLDER / "static").iterdir()}
    assert {path.name for path in (page / "static").iterdir()} == scripts
    assert (page / "static" / "source.js").read_bytes() == SOURCE_SCRIPT.read_bytes()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == set(static_page.PAGE_MODEL_FILES), "other files of the model are published"
    card_data = yaml.safe_load((page / "README.md").read_text("utf-8").split("---\n")[1])
    assert card_data["sdk"] == "static" and card_data["custom_headers"]["cross-origin-opener-policy"] == "same-origin"
    assert "models" not in card_data and "O modelo: cc-by-sa-4.0." in (page / "README.md").read_text("utf-8")
    assert "sourceMappingURL" not in (page / "library" / "onnxruntime.js").read_text()
    for path in page.rglob("*"):
        assert not path.is_file() or str(page.parent).encode() not in path.read_bytes(), (
            f"{path} contains a path of this machine"
        )
    # A folder that was exported for transformers.js is copied without another export.
    exported = shutil.copytree(get_or_build_miniature_folder(), tmp_path / "exported")
    shutil.copytree(folder, exported, dirs_exist_ok=True)
    write_static_page(str(exported), tmp_path / "again", library)
    assert [path.name for path in (tmp_path / "again/model").iterdir()] == [folder.name], (
        "the URL of the model has changed, so browsers would download it again"
    )
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    (exported / "tokenizer_config.json").write_text(json.dumps(settings | {"token": "hf_" + "aB3" * 11}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json, line 1"):
        write_static_page(str(exported), tmp_path / "other", library)


# --- Visit in a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fotos(tmp_path_factory) -> Path:
    """Fifty pictures: photographs of scikit-image (JPEG, one rotated by EXIF) and drawings of OpenMoji (PNG)."""
    folder = tmp_path_factory.mktemp("fotos")
    for name in CLASS_PHOTOGRAPHS:
        image, exif = load_example_photo(name).convert("RGB"), Image.Exif()
        if name == "chelsea":
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / f"{name}.jpg", quality=92, exif=exif)
    emoji = [*DRAWINGS, *(pictures[0].emoji for pictures in load_emoji_by_concept().values())]
    for code in list(dict.fromkeys(emoji))[: NUMBER - len(CLASS_PHOTOGRAPHS) - 1]:
        (folder / f"{code}.png").write_bytes(render_openmoji_png(code))
    transparent = Image.new("RGBA", (300, 200))
    transparent.paste((200, 30, 40, 255), (60, 40, 240, 160))
    transparent.save(folder / ATTACK)
    assert len(list(folder.iterdir())) == NUMBER
    return folder


class Visitor:
    """Actions of a visitor on the page, and what the page shows."""

    def __init__(self, opened: Browser, url: str):
        self.opened, self.page, self.url = opened, opened.page, url
        self.page.goto(url, wait_until="load")
        self.sees("#facts", "modelo")

    def sees(self, selector: str, text: str, seconds: float = 60) -> None:
        """Wait until an element has a text."""
        self.page.locator(selector, has_text=text).first.wait_for(timeout=1000 * seconds)

    def picks(self, files: list[Path]) -> None:
        """Choose files on the page."""
        self.page.set_input_files("#files", files)

    def finds(self, text: str, heading: str = "As mais parecidas com") -> list[str]:
        """Search for a text and return the titles of the hits in order."""
        self.page.fill("#text", text)
        self.sees("#said", f"{heading} “{text}”")
        return self.page.locator("#results .tile").evaluate_all("tiles => tiles.map((tile) => tile.title)")


@pytest.mark.slow
def test_a_visitor_reads_pictures_and_searches_them(page, fotos, tmp_path):
    files, model = sorted(fotos.iterdir()), get_or_build_miniature_folder()
    with served_folders({"/": page}) as url, open_browser() as opened:
        visitor = Visitor(opened, url)
        visitor.sees(".collect .hint", "é baixado uma vez")
        assert not [request for request in opened.requests if "/model/" in request], (
            "the model is downloaded before it is needed"
        )
        check_indexing(visitor, files)
        check_search_against_python(visitor, model, fotos, tmp_path)
        check_picture_view(visitor)
        check_phone_and_english(visitor, files)
        assert not opened.errors and not opened.refused
        assert all(request.startswith((url, "blob:" + url)) for request in opened.requests)


def check_indexing(visitor: Visitor, files: list[Path]) -> None:
    """Choose half of the pictures, then unreadable files, then all pictures."""
    page = visitor.page
    visitor.picks(files[:25])
    visitor.sees("#progress-said", "Baixando o modelo")
    visitor.sees("#progress-said", "de 25")
    broken = [{"name": "ilegivel.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\nnada disso"}]
    broken += [{"name": "bomba.png", "mimeType": "image/png", "buffer": bomb()}]
    Image.new("RGB", (1, 30_000)).save(thread := io.BytesIO(), "PNG")  # refused because of its aspect ratio
    broken += [{"name": "fio.png", "mimeType": "image/png", "buffer": thread.getvalue()}]
    page.set_input_files("#files", broken)
    visitor.sees("#collected", "Nenhuma imagem nova. 3 imagens não puderam ser lidas: ilegivel.png, bomba.png, fio.png")
    page.set_input_files("#files", [{"name": "notas.txt", "mimeType": "text/plain", "buffer": b"nada"}])
    visitor.sees("#collected", "Nenhum dos arquivos escolhidos é uma imagem")
    visitor.picks(files)
    visitor.sees("#collected", f"{NUMBER - 25} imagens novas.")
    assert page.locator("#work").is_hidden()
    visitor.sees("#facts", f"{NUMBER} imagens, modelo")
    page.click("#more")
    page.locator("#results .tile").nth(NUMBER - 1).wait_for()
    assert ATTACK in page.locator(f".tile[title='{ATTACK}'] .caption").inner_text()


def check_search_against_python(visitor: Visitor, model: Path, fotos: Path, tmp_path: Path) -> None:
    """The first hits are the same as in Python. Scores differ slightly because of int8 and the filter of the canvas."""
    index = PictureIndex.open(tmp_path / "fotos.lance", str(model))
    index.add(fotos)
    for text in ("uma banana", "um cachorro", "um foguete decolando"):
        titles, shown = visitor.finds(text), visitor.page.locator("#results .score").all_text_contents()
        expected = {Path(hit.path).name: hit.score for hit in index.search(text, k=NUMBER)}
        best = list(expected)[:5]
        assert len({*titles[:5]} & {*best}) >= 4 and titles[0] in best[:2], (text, titles, expected)
        scores = np.array([float(score.replace(",", ".")) for score in shown])
        differences = np.abs(scores - [expected[name] for name in titles])
        assert differences.max() < 0.1 and np.median(differences) < 0.02
    assert visitor.finds("uma banana")[0] == "1F34C.png"
    visitor.page.fill("#text", "um gato " * 80)
    visitor.sees("#said", "só lê o começo")
    visitor.page.fill("#text", "")
    visitor.sees("#said", "As mais recentes")


def check_picture_view(visitor: Visitor) -> None:
    """Open a picture, move to its neighbors, and search for similar pictures."""
    page = visitor.page
    visitor.finds("um gato")
    page.click(".tile[title='chelsea.jpg']")
    width, height = load_example_photo("chelsea").size
    page.wait_for_function(f"document.getElementById('viewer-picture').naturalWidth === {width}")
    facts = page.locator("#viewer-facts").inner_text()
    assert "kB" in facts and "(arquivo)" in facts and f"{width} × {height} pixels" in facts, "EXIF rotation is ignored"
    assert page.locator("#download").is_hidden(), "visitors have the file already"
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


def check_phone_and_english(visitor: Visitor, files: list[Path]) -> None:
    """Open the English page on a small screen: the pictures are forgotten, the model is still cached."""
    page, before = visitor.page, len(visitor.opened.requests)
    page.set_viewport_size({"width": 390, "height": 844})
    page.click(".language")
    visitor.sees("#said", "There are no pictures here yet")
    assert page.evaluate("document.documentElement.lang") == "en" and not visitor.opened.scrolls_sideways()
    visitor.picks(files[:3])
    visitor.sees("#collected", "3 new pictures.")
    visitor.finds("um cachorro", "Closest to")
    assert not [request for request in visitor.opened.requests[before:] if ".onnx" in request], (
        "the model is downloaded again"
    )
    assert not visitor.opened.scrolls_sideways()
    page.click("#results .tile >> nth=0")
    assert not visitor.opened.scrolls_sideways()
    page.click("#close")
    page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.slow
def test_threads_a_failed_download_and_requests_to_other_hosts(page, fotos, tmp_path):
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
        assert workers == min(opened.page.evaluate("navigator.hardwareConcurrency"), 8) - 1, (
            "onnxruntime needs all threads"
        )
        fetch = "(url) => fetch(url).then(() => 'answered', () => 'refused')"
        assert opened.page.evaluate(fetch, f"{url}index.html") == "answered"
        assert opened.page.evaluate(fetch, f"{other}index.html") == "refused"
