"""Sizes, scores and seconds of an export for transformers.js, in Node and in Chromium, at full size.

    python -m benchmarks.in_browser --output benchmarks/results/in_browser.json
    python -m benchmarks.in_browser --model runs/openmoji-pt-001 --output benchmarks/results/in_browser_demo.json

The published architecture with random weights is exported for transformers.js and loaded by its own code, from npm,
over HTTP as from the Hub, in every precision that each of the two takes: float32 alone is too much for a tab. What it
computes is compared with the model in PyTorch on the same tokens and pixels. The second command compares a trained
model's whole pipeline instead, on photographs and sentences, pixels and tokens included, and takes no times. Node, npm
and Chromium must be there; transformers.js is installed once, in ~/.cache/capivara-node. The last line of the output is
JSON.
"""

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from benchmarks.timing import ROOT, conditions, finish, in_own_process, table
from capivara_common.cli import at_least, flag, parse, run_command
from capivara_common.environment import peak_resident_bytes
from capivara_common.files import whole_folder
from capivara_common.privacy import short_name
from hub_upload.space.static_page import npm_packages
from modeling_capivara import CapivaraImageProcessor
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import random_images, random_texts

LIBRARY, RANGE = "@huggingface/transformers", ">=4.3 <5"
MIN_NODE = 20
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SCRIPT = ROOT / "benchmarks" / "in_browser.mjs"
NAME = "my-name/my-model"  # under which a repository is served
SENTENCES = (
    *("o retrato de uma astronauta", "um gato olhando para a câmera", "uma xícara de café", "um foguete antes do voo"),
    *("o fundo de um olho", "um cachorro na grama", "um prato de comida", "um céu azul", "uma flor", "uma rua à noite"),
)
LABELS, TEMPLATE = ["um gato", "um cachorro", "um céu azul"], "uma foto de {}"
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina")
ENDINGS = {"fp32": "", "fp16": "_fp16", "q8": "_quantized"}
PRECISIONS = {"node": ("fp32", "fp16", "q8"), "chromium": ("fp16", "q8")}
ELSEWHERE = re.compile(r"https?://(?!127\.0\.0\.1:)")  # whatever a page would fetch from there fails
ASK = """async request => {
  const { answer } = await import("/code/in_browser.mjs");
  return answer(await import(request.library), request);
}"""


@dataclass
class BrowserBenchmarkArguments:
    """Arguments of `benchmarks.in_browser`."""

    layers: int = flag(12, "Layers of both towers; 12 is the published architecture.")
    output: Path | None = flag(None, "JSON file for the figures.")
    folder: Path | None = flag(None, "Folder for the models; a temporary one if none.")
    model: Path | None = flag(None, "Folder of a trained model, whose pipeline alone is compared; no times are taken.")
    worker: str | None = flag(None, "Measure in this process: export.")

    def __post_init__(self) -> None:
        at_least(self, 1, "layers")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(BrowserBenchmarkArguments, __doc__, argv)
    if args.worker:
        finish(measure_export(args.folder))
        return
    with tempfile.TemporaryDirectory(prefix="capivara-in-browser-") as temporary:
        args.folder = Path(args.folder or temporary).resolve()
        finish(measure_pipeline(args.model, args.folder) if args.model else measure(args), args.output)


def measure(args: BrowserBenchmarkArguments) -> dict[str, Any]:
    """All figures, from the making of the model on."""
    packages = node_packages()
    where = ["--folder", str(args.folder), "--layers", str(args.layers)]
    made = in_own_process(["benchmarks.export", "--worker", "make", *where])
    exported = in_own_process(["benchmarks.in_browser", "--worker", "export", *where])
    repository = args.folder / "repository"
    inputs, expected = inputs_and_outputs(repository)
    files = save_photos(args.folder / "photos")
    runs: dict[str, dict[str, Any]] = {place: {} for place in PRECISIONS}
    pixels = {}
    with served({NAME: repository}, packages, photos=args.folder / "photos") as address:
        for place, precisions in PRECISIONS.items():
            for precision in tqdm(precisions, desc=place, unit="precision"):
                answer = ask(place, request(address, dtype=precision, inputs=inputs), packages)
                runs[place][precision] = compared(answer, expected) | {
                    "seconds": answer["seconds"],
                    "peak_bytes": answer.get("peak_bytes"),
                }
            answer = ask(place, request(address, pictures=[f"{address}photos/{file.name}" for file in files]), packages)
            pixels[place] = pixel_differences(answer["pixels"], files, load_processor(repository).image_processor)
    node = subprocess.check_output(["node", "--version"], text=True).strip()
    facts = {"transformers.js": answer["version"], "node": node, "layers": args.layers}
    facts |= {"texts": len(expected["text_embeds"]), "images": len(expected["image_embeds"])}
    return {**conditions(), **facts, **made, "export": exported, "runs": runs, "pixels": pixels}


def measure_pipeline(model: Path, folder: Path) -> dict[str, Any]:
    """Largest differences of probabilities and scores between the pipelines of transformers.js and of transformers."""
    from hub_upload.export import export

    packages, repository = node_packages(), folder / "repository"
    export(model, repository, ["transformers", "transformers_js"])
    files = save_photos(folder / "photos")
    ours = pipeline_scores(repository, files)
    what = {"labels": SENTENCES, "template": "{}"}
    runs: dict[str, dict[str, Any]] = {place: {} for place in PRECISIONS}
    with served({NAME: repository}, packages, photos=folder / "photos") as address:
        what["pictures"] = [f"{address}photos/{file.name}" for file in files]
        for place in PRECISIONS:
            for precision in ENDINGS:
                answer = ask(place, request(address, dtype=precision, **what), packages)
                runs[place][precision] = pipeline_differences(answer, ours)
    node = subprocess.check_output(["node", "--version"], text=True).strip()
    facts = {"transformers.js": answer["version"], "node": node, "model": short_name(str(model))}
    return {**conditions(), **facts, "sentences": len(SENTENCES), "images": len(files), "runs": runs}


def pipeline_scores(repository: Path, files: list[Path]) -> np.ndarray:
    """(images, texts), the model's scores in PyTorch of photographs and `SENTENCES`."""
    model, processor = load_model(repository).eval(), load_processor(repository)
    pictures = [Image.open(file) for file in files]
    with torch.inference_mode():
        return model(**processor(images=pictures, text=list(SENTENCES), return_tensors="pt")).logits_per_image.numpy()


def pipeline_differences(answer: dict[str, Any], ours: np.ndarray) -> dict[str, float]:
    """Largest difference of a probability, of all sentences to a picture, and of a score, from the model's."""
    by_label = [{entry["label"]: entry["score"] for entry in entries} for entries in answer["classes"]]
    probabilities = np.array([[scores[sentence] for sentence in SENTENCES] for scores in by_label])
    expected = torch.from_numpy(ours).softmax(dim=-1).numpy()
    return {
        "largest_probability_difference": float(np.abs(probabilities - expected).max()),
        "largest_score_difference": float(np.abs(np.array(answer["logits"]) - ours).max()),
    }


def measure_export(folder: Path) -> dict[str, Any]:
    """Seconds and memory of the export, and bytes of every graph with its weights."""
    from hub_upload.export import export

    started = time.perf_counter()
    files = dict(export(folder / "model", folder / "repository", ["transformers", "transformers_js"], overwrite=True))
    graphs = {
        name.removeprefix("onnx/"): sum(size for part, size in files.items() if part.startswith(name))
        for name in files if name.endswith(".onnx")
    }  # fmt: skip
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": peak_resident_bytes(), "graphs": graphs}


def inputs_and_outputs(repository: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What both get, as JSON, and what the model makes of it in PyTorch."""
    model, processor = load_model(repository).eval(), load_processor(repository)
    batch = processor(images=random_images(), text=random_texts(), return_tensors="pt")
    with torch.inference_mode():
        output = model(**batch)
    expected = {name: output[name].numpy() for name in ("image_embeds", "text_embeds", "logits_per_image")}
    pixels = batch["pixel_values"].numpy()
    data = base64.b64encode(np.ascontiguousarray(pixels, np.float32).tobytes()).decode()
    inputs = {name: batch[name].tolist() for name in ("input_ids", "attention_mask")}
    return inputs | {"pixel_values": {"data": data, "dims": list(pixels.shape)}}, expected


def compared(answer: dict[str, Any], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Distances of an answer to the model: lowest cosine of the embeddings, largest difference of scores."""
    found = {name: np.array(answer[name]) for name in expected}
    return {
        "lowest_image_cosine": float((found["image_embeds"] * expected["image_embeds"]).sum(axis=-1).min()),
        "lowest_text_cosine": float((found["text_embeds"] * expected["text_embeds"]).sum(axis=-1).min()),
        "largest_score_difference": float(np.abs(found["logits_per_image"] - expected["logits_per_image"]).max()),
    }


def save_photos(folder: Path) -> list[Path]:
    """Photographs of scikit-image as PNG, which every program reads alike."""
    from skimage import data

    folder.mkdir(exist_ok=True)
    for name in PHOTOS:
        Image.fromarray(getattr(data, name)()).convert("RGB").save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in PHOTOS]


def pixel_differences(answers: list[dict], files: list[Path], processor: CapivaraImageProcessor) -> dict[str, float]:
    """File -> mean absolute difference of `pixel_values` to our processor's, in steps of 255 to the full range."""
    found = {}
    for answer, file in zip(answers, files, strict=True):
        theirs = np.frombuffer(base64.b64decode(answer["data"]), np.float32).reshape(answer["dims"])[0]
        with Image.open(file) as picture:
            ours = processor(picture, return_tensors="np")["pixel_values"][0]
        steps = np.abs(theirs - ours) * (255 * np.array(processor.image_std)[:, None, None])
        found[file.stem] = float(steps.mean())
    return found


def node_packages() -> Path:
    """The folder `node_modules` with transformers.js, installed from npm where it is not there yet.

    No script of a package runs; binaries for the CPU lie in them.

    Raises:
        RuntimeError: node or npm is missing or too old, or the registry can't be reached.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise RuntimeError(f"{program} is not installed: apt-get install nodejs npm")
    version = subprocess.check_output(["node", "--version"], text=True).strip()
    if int(version.removeprefix("v").split(".")[0]) < MIN_NODE:
        raise RuntimeError(f"Node {version} is too old for {LIBRARY}'s pictures (sharp); install {MIN_NODE} or later")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capivara-node"
    folder = cache / f"transformers{RANGE}".translate({ord(sign): "-" for sign in ">=< "})
    if not folder.is_dir():
        try:
            with whole_folder(folder) as new:
                npm_packages(new, {LIBRARY: RANGE})
        except (ValueError, OSError) as error:
            if not folder.is_dir():  # else another process was first
                raise RuntimeError(str(error)) from error
    return folder / "node_modules"


@contextmanager
def served(repositories: dict[str, Path], packages: Path, **folders: Path) -> Iterator[str]:
    """Address of a server on this machine with repositories as on the Hub, npm's packages, and further folders."""
    mounts = {f"/{name}/resolve/main/": folder for name, folder in repositories.items()}
    mounts |= {"/npm/": packages, "/code/": SCRIPT.parent} | {f"/{name}/": folder for name, folder in folders.items()}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            for prefix, folder in mounts.items():
                if path.startswith(prefix):
                    self.directory = str(folder)
                    return super().translate_path("/" + path.removeprefix(prefix))
            return os.devnull + "/none"

        def do_GET(self) -> None:
            if self.path != "/":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><link rel=icon href=data:,><title>transformers.js</title>")

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def request(address: str, **what: Any) -> dict[str, Any]:
    """A request for `ask`; `what` is explained in in_browser.mjs."""
    return {"name": NAME, "env": {"remoteHost": address, "allowLocalModels": False}, **what}


def ask(place: str, request: dict[str, Any], packages: Path) -> dict[str, Any]:
    """The answer of transformers.js in "node" or "chromium"."""
    return (ask_node if place == "node" else ask_chromium)(request, packages)


def ask_node(request: dict[str, Any], packages: Path) -> dict[str, Any]:
    """The answer of a process of Node, with a cache of its own."""
    with tempfile.TemporaryDirectory(prefix="capivara-node-") as temporary:
        library = packages / LIBRARY / "dist" / "transformers.node.mjs"
        env = request["env"] | {"cacheDir": temporary}
        about = json.dumps(request | {"env": env, "library": library.as_uri()})  # in ASCII: texts may be no UTF-8
        (Path(temporary) / "request.json").write_text(about, encoding="ascii")
        done = subprocess.run(
            ["node", SCRIPT, f"{temporary}/request.json"], capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode:
            raise RuntimeError(f"Node ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1]) | {"said": done.stderr}


def ask_chromium(request: dict[str, Any], packages: Path) -> dict[str, Any]:
    """The answer of a fresh page of headless Chromium, on one thread, as without special headers."""
    from playwright.sync_api import sync_playwright

    executable = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            page = browser.new_page()
            page.set_default_timeout(900_000)
            page.route(ELSEWHERE, lambda route: route.abort())
            page.goto(request["env"]["remoteHost"])
            return page.evaluate(ASK, in_page(request))
        finally:
            browser.close()


def in_page(request: dict[str, Any]) -> dict[str, Any]:
    """A request as a page makes it: the library and its WebAssembly come from the same server."""
    env = request["env"] | {"wasmPaths": f"{request['env']['remoteHost']}npm/onnxruntime-web/dist/"}
    return request | {"env": env, "library": f"/npm/{LIBRARY}/dist/transformers.min.js"}


def largest_differences(found: dict[str, Any], precision: str) -> tuple[float, float]:
    """Of a probability and of a score in a precision, in Node or in Chromium; `found` is of `measure_pipeline`."""
    runs = [of[precision] for of in found["runs"].values()]
    probability, score = (max(run[f"largest_{what}_difference"] for run in runs) for what in ("probability", "score"))
    return probability, score


def in_browser_table(found: dict[str, Any], demo: dict[str, Any]) -> str:
    """Sizes, distances and seconds of every precision in Node and Chromium; `demo` is of `measure_pipeline`."""
    rows = []
    for place, runs in found["runs"].items():
        for dtype, run in runs.items():
            size, seconds = found["export"]["graphs"][f"model{ENDINGS[dtype]}.onnx"], run["seconds"]
            cosines = (run["lowest_text_cosine"], run["lowest_image_cosine"])
            times = (seconds["load_model"], seconds["texts"] / found["texts"], seconds["images"] / found["images"])
            rows.append(
                (
                    *(place.capitalize(), f"`{dtype}`", f"{size / 1e6:,.0f}"),
                    *(f"{cosine:.5f}" for cosine in cosines),
                    *(f"{run['largest_score_difference']:.4f}", *(f"{value:.2f}" for value in times)),
                )
            )
    pixels = "; ".join(
        f"{min(of.values()):.1f} to {max(of.values()):.1f} in {place.capitalize()}"
        for place, of in found["pixels"].items()
    )
    whole = "; ".join(
        "{:.3f} and {:.2f} in `{}`".format(*largest_differences(demo, precision), precision) for precision in ENDINGS
    )
    heads = ("where", "weights", "MB", "text cosine", "image cosine", "score", "load, s", "a text, s", "an image, s")
    facts = (
        f"Full size with random weights, {found['parameters'] / 1e6:.0f} million parameters, transformers.js "
        f"{found['transformers.js']}, Node {found['node']}, one thread in Chromium, on {found['device']}; lowest "
        f"cosine and largest difference of a score to PyTorch on the same tokens and pixels. Mean difference of the "
        f"pixels of {len(found['pixels']['node'])} photographs, in steps of 255: {pixels}. The demo's "
        f"whole pipeline, tokens and pixels included, {demo['images']} photographs and {demo['sentences']} sentences, "
        f"largest difference of a probability and of a score: {whole}."
    )
    return table(heads, rows, facts, text_columns=2)


if __name__ == "__main__":
    run_command(main)
