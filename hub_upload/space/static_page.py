"""Write the search page as static files, which need no server program. Users search their own pictures in the browser.

    npm install --ignore-scripts @huggingface/transformers          # version 4.3 or later
    python -m hub_upload.space --static page --model runs/mine --library node_modules
    cd page && python -m http.server

    index.html, en.html    the page, in Portuguese and in English
    static/                scripts and styles of capivara_search's page, with a source.js that runs the model
    library/               transformers.js and onnxruntime, from npm
    model/<digest>/        both towers in int8, tokenizer and settings, as `hub_upload.export` writes them

The page's Content-Security-Policy forbids requests to other hosts, so the pictures stay on the user's device.
"""

import hashlib
import re
import tempfile
from pathlib import Path

from capivara_common.environment import require_packages
from capivara_common.files import atomic_folder, read_json, write_bytes, write_text
from capivara_common.privacy import get_publishable_model_or_dataset_name
from capivara_search.models import resolve_search_model
from capivara_search.page import server
from hub_upload.export import export_model
from hub_upload.formats import onnx, transformers_js
from hub_upload.space.docker_space import CODE_ROOT, copy_file, read_model_license, write_space_card
from hub_upload.upload_checks import check_file_for_secrets, check_model_files, check_paths

# Runs the model in the browser. It replaces the script source.js of capivara_search, which calls a search server.
SOURCE_SCRIPT = Path(__file__).parent / "static" / "source.js"
# Maps a language to a tuple: file of the page, relative URL of the page, and URL of the page in the other language.
PAGE_FILES = {"pt": ("index.html", "./", "en.html"), "en": ("en.html", "en.html", "./")}
LIBRARY_PACKAGE = "@huggingface/transformers"  # npm package
# Maps a file in the folder `library/` of the page to its source in node_modules. `.mjs` files get the suffix `.js`,
# because some file servers send `.mjs` files with a media type that browsers refuse to run.
LIBRARY_FILES = {
    "transformers.js": "@huggingface/transformers/dist/transformers.min.js",
    "onnxruntime.js": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
    "onnxruntime.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
}
MODEL_GRAPHS = tuple(f"onnx/{kind}_model_quantized.onnx{end}" for kind in ("text", "vision") for end in ("", "_data"))
PAGE_MODEL_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", *MODEL_GRAPHS)
# Front matter of README.md, from which the Hub reads the settings of the page if it is published as a Space.
SPACE_CARD_DATA = {
    "title": "CAPIVARA: busca nas suas imagens",
    "sdk": "static",
    # Browsers let a page run WebAssembly in several threads only if the page is sent with these headers.
    "custom_headers": {"cross-origin-embedder-policy": "require-corp", "cross-origin-opener-policy": "same-origin"},
    "short_description": "Busca nas suas imagens, no seu navegador",
}


def write_static_page(model: str, folder: Path, library: Path) -> None:
    """Write the picture search page as static files, which run the model in the browser of the user.

    Args:
        model: Folder or Hub id of a CAPIVARA model. An export for transformers.js is copied; another model is exported
            first, which takes minutes at full size.
        folder: Folder to write. It must be empty or not exist yet.
        library: Folder node_modules in which npm has installed transformers.js.

    Raises:
        ValueError: If transformers.js can't represent the model, `library` lacks a file, or a file to publish
            contains an access token or absolute path.
        ImportError: If a package for the ONNX export is missing.
    """
    require_packages("A page without a server", "onnx", *onnx.ONNX_PACKAGES)
    with atomic_folder(folder) as output, tempfile.TemporaryDirectory() as temporary:
        source = resolve_search_model(model).folder
        _copy_npm_libraries(library, output / "library")
        repository = source
        if not all((source / name).is_file() for name in PAGE_MODEL_FILES):
            repository = Path(temporary, "repository")
            export_model(source, repository, ["transformers"])
            transformers_js.convert_tokenizer_files_in_place(repository)
            onnx.write_onnx(repository)  # float32 and int8 graphs of both towers; the page uses the int8 graphs
            transformers_js.write_model_and_preprocessor_configs(repository)
        check_model_files(repository)
        digests = [hashlib.sha256((repository / name).read_bytes()).digest() for name in PAGE_MODEL_FILES]
        # The URL of the model files contains a hash of their content. Otherwise, browsers would use cached files of an
        # older model.
        digest = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
        for name in PAGE_MODEL_FILES:
            copy_file(repository / name, output / "model" / digest / name)
        downloads = (*output.glob("model/**/*.*"), output / "library" / "onnxruntime.wasm")
        megabytes = round(sum(path.stat().st_size for path in downloads) / 1e6)
        model_name = get_publishable_model_or_dataset_name(model)
        side = read_json(repository / "preprocessor_config.json")["size"]["shortest_edge"]
        page_model = {"id": digest, "name": model_name, "megabytes": megabytes, "side": side}
        for path in (server.PAGE_FOLDER / "static").iterdir():
            copy_file(SOURCE_SCRIPT if path.name == SOURCE_SCRIPT.name else path, output / "static" / path.name)
        copy_file(CODE_ROOT / "LICENSE", output / "LICENSE")
        for language, (page, *_) in PAGE_FILES.items():
            write_text(output / page, render_static_page(language, page_model))
        license = read_model_license(source)
        models = None if Path(model).is_dir() else [model_name]
        version = read_json(library / LIBRARY_PACKAGE / "package.json", version=str)["version"]
        card_data = SPACE_CARD_DATA | {"models": models, "license": license or "other"}
        write_space_card(output, "static", card_data, name=model_name, model_license=license, version=version)
        for path in (*output.glob("*.*"), *output.glob("static/*")):
            check_file_for_secrets(path, path.name)
            check_paths(path, path.name)


def render_static_page(language: str, model: dict[str, str | int]) -> str:
    """Render the HTML of the picture search page that runs the model in the browser, without a search server.

    Args:
        language: Language of the page, "pt" or "en".
        model: Dict with "id" (subfolder in model/), "name", "megabytes" (size of the download) and "side" (height and
            width of the model's input images in pixels).

    Returns:
        HTML of the page.
    """
    words = server.load_page_messages(language, is_static=True) | {"own_model": model}
    _, url, other_url = PAGE_FILES[language]
    return server.render_page_template(words, is_static=True, here=url, there=other_url, model=model)


def _copy_npm_libraries(node_modules: Path, target: Path) -> None:
    """Copy the scripts of transformers.js and onnxruntime, and the license of transformers.js.

    References to source maps (files for debugging) are removed from the scripts, because the page does not contain
    these files.

    Args:
        node_modules: Folder in which npm has installed `LIBRARY_PACKAGE` (transformers.js).
        target: Folder to write to.

    Raises:
        ValueError: If a script is missing.
    """
    if missing := [name for name in LIBRARY_FILES.values() if not (node_modules / name).is_file()]:
        raise ValueError(
            f"--library {node_modules} contains no {missing[0]}. It must be a node_modules folder in which npm has "
            f"installed {LIBRARY_PACKAGE}."
        )
    for name, source in LIBRARY_FILES.items():
        write_bytes(target / name, re.sub(rb"(?m)^//# sourceMappingURL=.*$", b"", (node_modules / source).read_bytes()))
    copy_file(node_modules / LIBRARY_PACKAGE / "LICENSE", target / "transformers.js-LICENSE")
