"""README's table of the places where a model runs: command, what was tried, measured difference, what was not tried.

    table = where_table(results, ENGLISH)  # results: name of a file of benchmarks/results -> what it holds

Figures and versions are those of the JSON files; "tests" are tolerances that the tests hold.
"""

import re
from typing import Any

from benchmarks.in_browser import largest_differences
from benchmarks.timing import table

FILES = ("exchange_text_side", "immich", "immich_miniature", "in_browser_demo", "static_page_full")
EXPORT = "python -m hub_upload.export --model MODEL --output FOLDER --formats"
# Of each row: place, command, tried with, difference to the model in Python, not tried. The first and the last two are
# the words of a language, and so are the columns' heads and the paragraph under the table.
ENGLISH = {
    "heads": ("Place", "Command", "Tried with", "Difference to the model in Python", "Not tried"),
    "stores": (
        "A vector store that the base has filled",
        "no picture embedded again; Portuguese recall {before} → {after} %",
        "a server: Qdrant ran in its client's local mode",
    ),
    "immich": (
        "[Immich](docs/immich.md)",
        "texts {texts:.0e}; pictures, cosine {pictures:.5f}, where its crop is a pixel off {beside:.2f}",
        "Docker, GPU, ARM NN, RKNN",
    ),
    "browser": (
        "transformers.js, in Node and browsers",
        "the demo, {images} photographs, {sentences} sentences, pixels included: probability {full:.2f}, "
        "8 bits {rounded:.2f}; logit {full_logit:.2f}, 8 bits {rounded_logit:.2f}",
        "WebGPU, Firefox, Safari",
    ),
    "page": (
        "A page without a server",
        "8 bits, cosine: pictures {images:.5f}, texts {texts:.4f}",
        "a graphics card, Firefox, Safari",
    ),
    "sentences": ("sentence-transformers", "1e-6 (tests)", '`backend="onnx"`: optimum wants an older transformers'),
    "mteb": ("[MIEB](docs/evaluation.md)", "recall within 1e-6 (tests)", "the leader board's own pictures"),
    "facts": "Full size with random weights where the demo's are not named; the recall is the demo's. "
    "[Publishing](docs/publishing.md) and [Benchmarks](docs/benchmarks.md) have the details.",
}
PORTUGUESE = {
    "heads": ("Lugar", "Comando", "Experimentado com", "Diferença para o modelo em Python", "Não experimentado"),
    "stores": (
        "Um banco de vetores que o modelo de base preencheu",
        "nenhuma imagem processada de novo; revocação em português {before} → {after} %",
        "um servidor: o Qdrant rodou no modo local do cliente",
    ),
    "immich": (
        "[Immich](docs/immich.md)",
        "textos {texts:.0e}; imagens, cosseno {pictures:.5f}, onde o recorte fica um pixel ao lado {beside:.2f}",
        "Docker, GPU, ARM NN, RKNN",
    ),
    "browser": (
        "transformers.js, no Node e em navegadores",
        "demonstração, {images} fotografias, {sentences} frases, com os pixels: probabilidade {full:.2f}, "
        "8 bits {rounded:.2f}; logit {full_logit:.2f}, 8 bits {rounded_logit:.2f}",
        "WebGPU, Firefox, Safari",
    ),
    "page": (
        "Uma página sem servidor",
        "8 bits, cosseno: imagens {images:.5f}, textos {texts:.4f}",
        "uma placa de vídeo, Firefox, Safari",
    ),
    "sentences": (
        "sentence-transformers",
        "1e-6 (testes)",
        '`backend="onnx"`: o optimum exige um transformers mais antigo',
    ),
    "mteb": ("[MIEB](docs/evaluation.md)", "revocação igual até 1e-6 (testes)", "as imagens da própria tabela"),
    "facts": "Tamanho completo com pesos aleatórios onde não se diz outra coisa; a revocação é a da demonstração. Os "
    "detalhes estão em [Publicação](docs/publishing.md) e [Benchmarks](docs/benchmarks.md), em inglês.",
}


def where_table(results: dict[str, Any], words: dict[str, Any], decimal: str) -> str:
    """The table in the words of a language, with its decimal mark."""
    values = figures(results)
    rows = []
    for name, (command, tried) in places(results).items():
        place, difference, untried = words[name]
        figure = difference.format(**values.get(name, {})).replace("e-0", "e-")
        rows.append((place, command, tried, figure if decimal == "." else _with_comma(figure), untried))
    return table(words["heads"], rows, words["facts"], len(words["heads"]))


def places(results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Place -> command, and the versions of the programs that it was tried with."""
    store, browser = results["exchange_text_side"]["versions"], results["in_browser_demo"]
    services = ", ".join(results[name]["service_version"] for name in ("immich", "immich_miniature"))
    chromium = results["static_page_full"]["runs"]["one_thread"]["chromium"].partition(".")[0]
    return {
        "stores": (
            f"`{EXPORT} drop_in --base BASE`",
            f"qdrant-client {store['qdrant-client']}, lancedb {store['lancedb']}, open_clip {store['open_clip_torch']}",
        ),
        "immich": (f"`{EXPORT} immich`", services),
        "browser": (
            f"`{EXPORT} transformers,transformers_js`",
            f"{browser['transformers.js']}, Node {browser['node'].removeprefix('v')}, Chromium {chromium}",
        ),
        "page": ("`python -m hub_upload.space --model MODEL --static FOLDER`", f"Chromium {chromium}"),
        "sentences": (
            f"`{EXPORT} transformers,sentence_transformers`",
            store["sentence-transformers"],
        ),
        "mteb": ("`mteb.evaluate`", "mteb 2.26"),
    }


def figures(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Place -> the figures of its difference."""
    recall = results["exchange_text_side"]["recall"]["Qdrant"]
    browser = results["in_browser_demo"]
    full, rounded = (largest_differences(browser, precision) for precision in ("fp32", "q8"))
    cosines = results["static_page_full"]["cosine_to_python"]
    immich = [results[name]["pictures"] for name in ("immich", "immich_miniature")]
    return {
        "stores": {
            "before": f"{100 * recall['base']['mean_recall']:.1f}",
            "after": f"{100 * recall['exchanged']['mean_recall']:.1f}",
        },
        "immich": {
            "texts": max(results[name]["texts"]["largest_difference"] for name in ("immich", "immich_miniature")),
            "pictures": min(pictures["lowest_cosine"] for pictures in immich),
            "beside": min(pictures["lowest_cosine_beside"] for pictures in immich),
        },
        "browser": {
            **{name: browser[name] for name in ("images", "sentences")},
            **{"full": full[0], "rounded": rounded[0], "full_logit": full[1], "rounded_logit": rounded[1]},
        },
        "page": {
            "images": min(cosines[size]["lowest"] for size in ("12_megapixels", "640x480")),
            "texts": cosines["texts"]["lowest"],
        },
    }


def _with_comma(text: str) -> str:
    """Decimal points between digits as commas."""
    return re.sub(r"(?<=\d)\.(?=\d)", ",", text)
