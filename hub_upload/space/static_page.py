"""A page without a server: the search of one's own pictures in the browser, as a folder of plain files.

    npm install --ignore-scripts @huggingface/transformers          # version 4.3 or later
    python -m hub_upload.space --static page --model runs/mine --library node_modules
    cd page && python -m http.server

    index.html, en.html    the page, in Portuguese and in English
    static/                those of capivara_search's page, with our source.js in place of the server's
    library/               transformers.js and its onnxruntime, as npm gives them
    model/<digest>/        both towers in 8 bits, tokenizer and settings, as `hub_upload.export` makes them for it

Nothing is asked of another host: the page's own policy forbids it.
"""

import hashlib
import re
import tempfile
from pathlib import Path

from capivara_common.environment import require_packages
from capivara_common.files import atomic_folder, read_json, write_bytes, write_text
from capivara_common.privacy import short_name
from capivara_search.models import find_model
from capivara_search.page import server
from hub_upload.allowed_files import check_model_files, check_paths, check_secrets
from hub_upload.export import export_model
from hub_upload.formats import onnx, transformers_js
from hub_upload.space.publish_space import CODE_ROOT, copy_file, read_model_license, write_space_card

SOURCE_SCRIPT = Path(__file__).parent / "static" / "source.js"
PAGE_FILES = {
    "pt": ("index.html", "./", "en.html"),
    "en": ("en.html", "en.html", "./"),
}  # file, its address, the other's
LIBRARY_PACKAGE = "@huggingface/transformers"  # of npm
# File of the page -> where it lies in node_modules; the ends of their names are known to every file server.
LIBRARY_FILES = {
    "transformers.js": "@huggingface/transformers/dist/transformers.min.js",
    "onnxruntime.js": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
    "onnxruntime.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
}
MODEL_GRAPHS = tuple(f"onnx/{kind}_model_quantized.onnx{end}" for kind in ("text", "vision") for end in ("", "_data"))
PAGE_MODEL_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", *MODEL_GRAPHS)
SPACE_CARD_DATA = {  # of the page as a Space
    "title": "CAPIVARA: busca nas suas imagens",
    "sdk": "static",
    # With these two the browser gives the page several threads.
    "custom_headers": {"cross-origin-embedder-policy": "require-corp", "cross-origin-opener-policy": "same-origin"},
    "short_description": "Busca nas suas imagens, no seu navegador",
}


def write_static_page(model: str, folder: Path, library: Path) -> None:
    """Write the folder of the page.

    Args:
        model: folder or Hub id of a CAPIVARA model. A folder that `hub_upload.export` has made for transformers.js is
            taken as it is; of others the graphs are made, which takes minutes at full size.
        folder: where to; missing or empty.
        library: a `node_modules` that has `LIBRARY_PACKAGE`.

    Raises ValueError where transformers.js can't express the model, the library is not there, or a file names a path of
    this machine or a token; ImportError where a package that ONNX needs is missing.
    """
    require_packages("A page without a server", "onnx", *onnx.ONNX_PACKAGES)
    with atomic_folder(folder) as made, tempfile.TemporaryDirectory() as work:
        source = find_model(model).folder
        _write_library(library, made / "library")
        repository = source
        if not all((source / name).is_file() for name in PAGE_MODEL_FILES):
            repository = Path(work, "repository")
            export_model(source, repository, ["transformers"])
            transformers_js.write_converted_tokenizer(repository)
            onnx.write_onnx(repository)  # of transformers.js's nine graphs those that lead to the two of the page
            transformers_js.write_configs(repository)
        check_model_files(repository)
        digests = [hashlib.sha256((repository / name).read_bytes()).digest() for name in PAGE_MODEL_FILES]
        digest = hashlib.sha256(b"".join(digests)).hexdigest()[:16]  # browsers keep a model under its address
        for name in PAGE_MODEL_FILES:
            copy_file(repository / name, made / "model" / digest / name)
        size = sum(path.stat().st_size for path in (*made.glob("model/**/*.*"), made / "library" / "onnxruntime.wasm"))
        facts = {"id": digest, "name": short_name(model), "megabytes": round(size / 1e6)}
        facts["side"] = read_json(repository / "preprocessor_config.json")["size"]["shortest_edge"]
        for path in (server.PAGE_FOLDER / "static").iterdir():
            copy_file(SOURCE_SCRIPT if path.name == SOURCE_SCRIPT.name else path, made / "static" / path.name)
        copy_file(CODE_ROOT / "LICENSE", made / "LICENSE")
        for language, (page, *_) in PAGE_FILES.items():
            write_text(made / page, render_static_page(language, facts))
        licence, about = (
            read_model_license(source),
            SPACE_CARD_DATA | {"models": None if Path(model).is_dir() else [facts["name"]]},
        )
        version = read_json(library / LIBRARY_PACKAGE / "package.json", version=str)["version"]
        values = {"name": facts["name"], "model_licence": licence, "version": version}
        write_space_card(made, "static", about | {"license": licence or "other"}, **values)
        for path in (*made.glob("*.*"), *made.glob("static/*")):
            check_secrets(path, path.name)
            check_paths(path, path.name)


def render_static_page(language: str, model: dict[str, str | int]) -> str:
    """The page in a language, "pt" or "en", with what it says and needs to know of its model."""
    words = server.load_page_messages(language, is_static=True) | {"own_model": model}
    _, here, there = PAGE_FILES[language]
    return server.render_page_html(words, is_static=True, here=here, there=there, model=model)


def _write_library(node_modules: Path, target: Path) -> None:
    if missing := [name for name in LIBRARY_FILES.values() if not (node_modules / name).is_file()]:
        raise ValueError(
            f"--library {node_modules} has no {missing[0]}. It must be a node_modules with {LIBRARY_PACKAGE} of npm."
        )
    for name, source in LIBRARY_FILES.items():
        write_bytes(target / name, re.sub(rb"(?m)^//# sourceMappingURL=.*$", b"", (node_modules / source).read_bytes()))
    copy_file(node_modules / LIBRARY_PACKAGE / "LICENSE", target / "transformers.js-LICENSE")
