"""A page without a server: the search of one's own pictures in the browser, as a folder of plain files.

    python -m hub_upload.space --static page --model runs/mine     # then: cd page && python -m http.server

    index.html, en.html    the page, in Portuguese and in English
    static/                its scripts and style sheets: hub_upload/space/static, and what capivara_search's page has
    library/               onnxruntime-web and @huggingface/tokenizers, as npm gives them
    model/                 the quantised towers, tokenizer and WebAssembly in parts, and model.json, which lists them

Nothing is asked of another host: the page's own policy forbids it, to the worker that runs the model, too. Parts are
small enough for hosts with a limit, and an interrupted download goes on with the part where it was.
"""

import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from capivara_common.environment import require
from capivara_common.files import read_json, whole_folder, write_bytes, write_json, write_text
from capivara_common.privacy import short_name
from capivara_search.models import find_model
from hub_upload.allowed_files import check_paths, check_secrets
from hub_upload.formats.onnx import ONNX_PACKAGES, TOWERS, data_file, graphs
from hub_upload.formats.transformers_js import readable_tokenizer
from modeling_capivara import CapivaraImageProcessor
from modeling_capivara.loading import card_metadata, load_processor
from modeling_capivara.text_repair_capivara import CONTEXT_LENGTH

OURS, SEARCH_PAGE = Path(__file__).parent / "static", Path(__file__).parents[2] / "capivara_search" / "page"
SCRIPTS = ("search.js", "collect.js", "engine.js", "look.js", "model.js", "pictures.js", "pixels.js", "store.js")
SHARED = ("common.js", "dialog.js", "page.css", "icon.svg")  # of capivara_search's page
PAGES = {"pt": "index.html", "en": "en.html"}
# Of npm: package -> the versions that are taken. Tried: onnxruntime-web 1.30, @huggingface/tokenizers 0.2.
LIBRARIES = {"onnxruntime-web": ">=1.22 <2", "@huggingface/tokenizers": ">=0.2 <1"}
# File of the page -> where it lies in node_modules. Everything that a file server may not know the kind of ends in .js.
SOURCES = {
    "tokenizers.js": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "ort.wasm.js": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "ort.webgpu.js": "onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
}
RUNTIMES = {  # where the model runs -> its WebAssembly
    "wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "webgpu": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
}
PART_BYTES = 20 * 2**20  # some hosts take files of at most 25 MiB
TOKENIZER_SETTINGS = ("add_bos_token", "add_eos_token", "bos_token", "eos_token", "pad_token", "unk_token")
TITLE = "CAPIVARA: busca nas suas imagens"  # of the page as a Space
README = """
# {title}

Busca de imagens por palavras em português, no navegador de quem visita: as imagens não são enviadas a lugar nenhum.
Modelo: {name}, da família CAPIVARA ([artigo](https://arxiv.org/abs/2310.13683)).

A pasta funciona em qualquer servidor de arquivos, como `python -m http.server`.

## Licenças

O código é MIT. {model_licence} Em `library/`: {libraries}.
"""


def write_static_page(model: str, folder: Path, library: Path | None = None) -> list[Path]:
    """Write the folder of the page.

    Args:
        model: folder or Hub id of a CAPIVARA model. The graphs in the `onnx/` of a folder are taken, quantised where it
            has them; where it has none, and of a Hub id, they are made, which takes minutes at full size.
        folder: where to; missing or empty.
        library: a `node_modules` that has `LIBRARIES`; npm fetches them where None.

    Returns:
        The files, relative to `folder`, in order.

    Raises:
        ValueError: the model's pixels are made in a way that the page does not know, a graph is missing, npm is
            missing or fails, or a file names a path of this machine or a token.
        ImportError: a package that ONNX needs is missing.
    """
    require("A page without a server", "onnx", *ONNX_PACKAGES)
    with whole_folder(folder) as made, tempfile.TemporaryDirectory() as work:
        source = find_model(model).folder
        pixels, tokenizer = pixel_facts(load_processor(source).image_processor), _tokenizer(source)
        modules = library or npm_packages(Path(work), LIBRARIES)
        _write_library(modules, made / "library")
        towers = made_graphs(source, Path(work))
        facts = {
            "name": model_name(model, source),
            **pixels,
            "length": CONTEXT_LENGTH,
            **_probe(towers["vision"], pixels["side"]),
        }
        facts["weights"] = {kind: _weights(path).name for kind, path in towers.items()}  # as a graph calls its file
        contents = {kind: path.read_bytes() for kind, path in towers.items()}
        contents |= {f"{kind}_weights": _weights(path).read_bytes() for kind, path in towers.items()}
        image_side = contents["vision"] + contents["vision_weights"] + json.dumps(pixels).encode()
        facts["digest"] = hashlib.sha256(image_side).hexdigest()[:32]
        contents |= {kind: (modules / name).read_bytes() for kind, name in RUNTIMES.items()}
        contents["tokenizer"] = tokenizer
        facts["files"] = {name: _write_parts(made / "model", name, data) for name, data in contents.items()}
        write_json(made / "model" / "model.json", facts)
        _write_pages(made)
        write_text(made / "README.md", _readme(model, source, modules))
        for path in (*made.glob("*.*"), *made.glob("static/*"), made / "model" / "model.json"):
            check_secrets(path, path.name)
            check_paths(path, path.name)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def model_name(model: str, source: Path) -> str:
    """How the page calls a model: a Hub id as it is, a folder by the name on its card where that has one.

    Args:
        model: as it was asked for.
        source: its folder on this machine.
    """
    match card_metadata(source / "README.md").get("model-index"):
        case [{"name": str(name)}, *_] if Path(model).is_dir():
            return name
    return short_name(model)


def pixel_facts(processor: CapivaraImageProcessor) -> dict[str, Any]:
    """What the page must know to make `pixel_values`: side, mean and standard deviation of a colour.

    Raises ValueError where a processor does something else than the page: a bicubic resize and a crop of one side, of
    bytes that become numbers of 0 to 1 and are normalised.
    """
    side, crop = processor.size["shortest_edge"], processor.crop_size
    if not processor.resample == 3 or {side, crop["height"], crop["width"]} != {side}:
        raise ValueError(
            f"The page resizes by bicubic interpolation and crops a square of the same side; the model's processor has "
            f"resample {processor.resample}, size {side}, crop {crop['height']} x {crop['width']}."
        )
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not getattr(processor, step):
            raise ValueError(f"The page does all steps of a processor; the model's has {step} = False.")
    if not math.isclose(processor.rescale_factor, 1 / 255):
        raise ValueError(f"The page divides bytes by 255; the processor has rescale_factor {processor.rescale_factor}.")
    about = {"side": side, "mean": list(processor.image_mean), "std": list(processor.image_std)}
    return about | {"most": processor.max_resized_pixels}


# --- The model -------------------------------------------------------------------------------------------------------


def made_graphs(model: Path, work: Path) -> dict[str, Path]:
    """Tower -> graph, its weights in a file beside it, of a model's folder; made below `work` where it has none."""
    if not any(model.glob("onnx/*_model*.onnx")):
        from hub_upload.export import export

        export(model, work / "repository", ["transformers", "onnx"])
        model = work / "repository"
    found = graphs(model, "int8")
    if missing := next((kind for kind in TOWERS if kind not in found), None):
        raise ValueError(
            f"{model / 'onnx'} has no {missing}_model.onnx, nor a quantised one. Make the graphs by hub_upload.export, "
            "or take the folder away."
        )
    return {kind: _with_weights_apart(path, work) for kind, path in found.items()}


def _with_weights_apart(path: Path, work: Path) -> Path:
    """A graph whose weights lie beside it, where a browser holds them once; of older exports they are in it."""
    check_secrets(path, path.name)
    if weights := _weights(path):
        check_secrets(weights, weights.name)
        return path
    import onnx

    onnx.save(onnx.load(path), work / path.name, save_as_external_data=True, location=data_file(path).name)
    return work / path.name


def _weights(graph: Path) -> Path | None:
    """The file of weights beside a graph; `.data` is what older exports have."""
    return next((path for path in (data_file(graph), graph.with_name(f"{graph.name}.data")) if path.is_file()), None)


def _probe(vision: Path, side: int) -> dict[str, list[float]]:
    """What the image tower makes of given numbers, by which a browser sees whether it computes the same."""
    import onnxruntime

    numbers = (np.arange(3 * side * side) * 40503 % 65536 / 65536 * 4 - 2).astype(np.float32)
    session = onnxruntime.InferenceSession(vision, providers=["CPUExecutionProvider"])
    vector = session.run(["image_embeds"], {"pixel_values": numbers.reshape(1, 3, side, side)})[0][0]
    return {"width": len(vector), "probe": [round(float(value), 5) for value in vector / np.linalg.norm(vector)]}


def _tokenizer(model: Path) -> bytes:
    """Tokenizer and its settings, as @huggingface/tokenizers takes them. ValueError where it can't."""
    check_secrets(model / "tokenizer.json", "tokenizer.json")
    config = read_json(model / "tokenizer_config.json")
    settings = {name: config[name] for name in TOKENIZER_SETTINGS if isinstance(config.get(name), str | bool)}
    content = {"tokenizer": readable_tokenizer(model), "config": settings}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _write_parts(folder: Path, name: str, data: bytes) -> list[dict[str, Any]]:
    """Write `data` in parts; name, bytes and SHA-256 of each."""
    parts = []
    for number, start in enumerate(range(0, len(data), PART_BYTES)):
        part, file = data[start : start + PART_BYTES], f"{name}-{number:02d}.data"
        write_bytes(folder / file, part)
        parts.append({"name": file, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()})
    return parts


# --- The page --------------------------------------------------------------------------------------------------------


def _write_pages(made: Path) -> None:
    for name in ("static.css", "worker.js", *SCRIPTS):
        write_bytes(made / "static" / name, (OURS / name).read_bytes())
    for name in SHARED:
        write_bytes(made / "static" / name, (SEARCH_PAGE / "static" / name).read_bytes())
    write_bytes(made / "LICENSE", (SEARCH_PAGE.parents[1] / "LICENSE").read_bytes())
    for language, page in PAGES.items():
        write_text(made / page, page_html(language))


def page_html(language: str) -> str:
    """The page in "pt" or "en"; what capivara_search's page says in the same words is taken from there."""
    shared = read_json(SEARCH_PAGE / "words" / f"{language}.json")
    words = {**shared, **read_json(OURS / f"{language}.json")}
    texts = {name: html.escape(text) for name, text in words.items() if isinstance(text, str)}
    texts["words"] = json.dumps(words, ensure_ascii=False).replace("<", "\\u003c")
    page, viewer = (path.read_text(encoding="utf-8") for path in (OURS / "index.html", SEARCH_PAGE / "viewer.html"))
    template = page.replace("{{viewer}}", viewer)
    return re.sub(r"\{\{(\w+)\}\}", lambda name: texts[name[1]], template)


def _readme(model: str, source: Path, modules: Path) -> str:
    licence = str(card_metadata(source / "README.md").get("license") or "")
    about = {
        "title": TITLE, "emoji": "🐾", "colorFrom": "green", "colorTo": "yellow", "sdk": "static", "pinned": False,
        "license": licence or "other",
        # With these two the browser gives the page several threads.
        "custom_headers": {
            "cross-origin-embedder-policy": "require-corp", "cross-origin-opener-policy": "same-origin"
        },
        "short_description": "Busca nas suas imagens, no seu navegador",
    }  # fmt: skip
    libraries = []
    for name in LIBRARIES:
        package = read_json(modules / name / "package.json", version=str)
        libraries.append(f"{name} {package['version']} ({package.get('license', '')})")
    said = f"O modelo: {licence}." if licence else "O modelo não declara licença."
    if not Path(model).is_dir():  # its card is not here
        repo_id = model.removeprefix("hf-hub:")
        about["models"] = [repo_id]
        said = f"A licença do modelo está em [{repo_id}](https://huggingface.co/{repo_id})."
    body = README.format(
        title=TITLE, name=model_name(model, source), model_licence=said, libraries=", ".join(libraries)
    )
    return f"---\n{yaml.safe_dump(about, allow_unicode=True, sort_keys=False)}---\n{body}"


# --- The libraries ---------------------------------------------------------------------------------------------------


def npm_packages(folder: Path, wanted: dict[str, str]) -> Path:
    """The `node_modules` that npm makes in a folder; no script of a package runs.

    Args:
        folder: is there.
        wanted: package -> range of its versions.

    Raises ValueError where there is no npm, or it fails.
    """
    npm, names = shutil.which("npm"), " ".join(wanted)
    if npm is None:
        raise ValueError(
            f"npm, which {names} come from, is not installed. Install Node.js (apt-get install nodejs npm); or run "
            f"`npm install --ignore-scripts {names}` on a machine that has it and name its node_modules by --library."
        )
    packages = [f"{name}@{versions}" for name, versions in wanted.items()]
    command = [
        npm,
        "install",
        "--ignore-scripts",
        "--no-save",
        "--no-audit",
        "--no-fund",
        "--prefix",
        folder,
        *packages,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.strip()), "it said nothing")
        raise ValueError(f"npm could not fetch {names}: {said} Or name a node_modules by --library.")
    return folder / "node_modules"


def _write_library(modules: Path, target: Path) -> None:
    missing = [name for name in (*SOURCES.values(), *RUNTIMES.values()) if not (modules / name).is_file()]
    if missing:
        raise ValueError(
            f"--library {modules} has no {missing[0]}. It must be the node_modules of `npm install --ignore-scripts "
            f"{' '.join(LIBRARIES)}`."
        )
    for name, source in SOURCES.items():
        code = (modules / source).read_text(encoding="utf-8")
        write_text(target / name, re.sub(r"(?m)^//# sourceMappingURL=.*$", "", code))
    for name in LIBRARIES:
        for licence in sorted((modules / name).glob("LICENSE*")):
            write_bytes(target / f"{name.replace('/', '-').lstrip('@')}-{licence.name}", licence.read_bytes())
