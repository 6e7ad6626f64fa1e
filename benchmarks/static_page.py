"""The page without a server in Chromium: seconds a picture, memory, and how near its vectors are to Python's.

    python -m benchmarks.static_page --output benchmarks/results/static_page.json
    python -m benchmarks.static_page --model runs/search/model --full_size_random --output static_page_full.json

Chromium (`chromium` on the path, driven by playwright) opens the page from a plain file server, without the headers
that would give it threads, and from one that sends them. Real pictures are chosen in the page: photographs of 12
megapixels and of 640 x 480 pixels (`benchmarks.search_photos`). A picture's seconds are those between two pictures,
once the model is loaded: decoding, resizing, the image tower, the thumbnail and the storage. The first text takes the
fetching (from this machine), the preparing and the run of the text tower; the others, the run alone. Memory is what
Chromium's processes hold beyond that of an empty page, sampled four times a second, shared pages counted by their
share. The last line of the output is JSON.
"""

import http.server
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.search_photos import make_photos, photo_path, small_photos
from benchmarks.timing import conditions, finish, save_random_model, table
from capivara_common.cli import at_least, flag, parse, run_command
from capivara_common.files import read_json
from capivara_common.privacy import short_name
from capivara_search.index import PictureIndex
from capivara_search.miniature import miniature_folder
from hub_upload.space.static_page import write_static_page

TEXTS = ("um gato dormindo", "uma pessoa com roupa de astronauta", "uma xícara de café na mesa", "um foguete decolando")
SAMPLE_S = 0.25
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
CHOSEN = """async (known) => {
  const { newest } = await import("./static/pictures.js");
  const made = newest(100000).filter(({ name }) => !known.includes(name));
  return made.map(({ name, vector }) => ({ name, vector: [...vector] }));
}"""
SEARCH = """async (text) => {
  const { work } = await import("./static/engine.js");
  const started = performance.now();
  const { vector } = await work("text", { text });
  return { seconds: (performance.now() - started) / 1000, vector: [...vector] };
}"""


@dataclass
class StaticPageArguments:
    """Arguments of `benchmarks.static_page`."""

    model: str | None = flag(None, "Folder of the model; the miniature of capivara_search where none is named.")
    full_size_random: bool = flag(
        False, "Make --model where it is missing: the published architecture, random weights."
    )
    page: Path | None = flag(None, "Folder of a page of that model that was made before; made where none is named.")
    library: Path | None = flag(None, "node_modules of the page; npm fetches it where none is named.")
    work: Path = flag(Path("runs/search"), "Folder of the photographs, made where they are missing.")
    photographs: int = flag(20, "Photographs of 12 megapixels, and as many small ones.")
    output: Path | None = flag(None, "JSON file for the figures.")

    def __post_init__(self) -> None:
        at_least(self, 3, "photographs")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(StaticPageArguments, __doc__, argv)
    if args.full_size_random:
        save_random_model(Path(args.model))
    model = args.model or str(miniature_folder())
    make_photos(args.work / "photos", args.photographs)
    small_photos(args.work / "small", args.photographs)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        page = args.page or work / "page"
        if not args.page:
            write_static_page(model, page, args.library)
        sets = {"12_megapixels": [], "640x480": []}
        for number in range(args.photographs):
            for name, source in (("12_megapixels", photo_path(args.work / "photos", number)),
                                 ("640x480", args.work / "small" / f"IMG_{number:05d}.jpg")):  # fmt: skip
                target = work / name / f"{name}-{number:03d}.jpg"
                target.parent.mkdir(exist_ok=True)
                sets[name].append(Path(shutil.copy(source, target)))
        title = "full size, random weights" if args.full_size_random else "miniature" if not args.model else model
        results = conditions() | {"title": short_name(title), "bytes": page_bytes(page)}
        results |= {"photographs": args.photographs, "runs": {}}
        for name, headers in (("one_thread", {}), ("isolated", ISOLATED)):
            with served(page, headers) as url:
                results["runs"][name], vectors = visit(url, sets)
        results["cosine_to_python"] = cosines(vectors, model, sets, work)
    for name in ("playwright", "onnxruntime"):
        results["versions"][name] = metadata.version(name)
    finish(results, args.output)


def page_bytes(page: Path) -> dict[str, int]:
    """Bytes of the model's files by name, and of all other files of the page."""
    files = read_json(page / "model" / "model.json")["files"]
    found = {name: sum(part["bytes"] for part in parts) for name, parts in files.items()}
    rest = [path for path in page.rglob("*") if path.is_file() and path.suffix != ".data"]
    return found | {"rest": sum(path.stat().st_size for path in rest)}


# ---- in the browser ----


def visit(url: str, sets: dict[str, list[Path]]) -> tuple[dict[str, Any], dict[str, list]]:
    """Figures of one visit, and the vectors by file name and by text."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            page = chromium.new_page()
            page.goto("about:blank")
            with sampled() as memory:
                time.sleep(4 * SAMPLE_S)
            empty = max(memory)
            page.goto(url)
            page.locator("#collect").wait_for()
            found: dict[str, Any] = {"seconds_a_picture": {}, "memory_mb": {}}
            vectors: dict[str, list] = {}
            for name, files in sets.items():
                with sampled() as memory:
                    started = time.perf_counter()
                    times = chosen(page, files)
                if not found["seconds_a_picture"]:
                    found["first_picture_s"] = round(times[0] - started, 2)
                steps = [b - a for a, b in pairwise(times)]
                found["seconds_a_picture"][name] = round(statistics.median(steps), 3)
                found["memory_mb"][name] = round(max(memory) - empty)
                vectors |= {one["name"]: one["vector"] for one in page.evaluate(CHOSEN, list(vectors))}
            with sampled() as memory:
                texts = [page.evaluate(SEARCH, text) for text in (TEXTS[0], *TEXTS)]
            found["memory_mb"]["with_text_tower"] = round(max(memory) - empty)
            found["first_text_s"] = round(texts[0]["seconds"], 2)
            found["text_s"] = round(statistics.median(one["seconds"] for one in texts[1:]), 3)
            vectors |= {text: one["vector"] for text, one in zip(TEXTS, texts[1:], strict=True)}
            found["threads"] = int(re.search(r"(\d+) thread", page.locator("#facts").inner_text())[1])
            found["chromium"] = chromium.version
            return found, vectors
        finally:
            chromium.close()


def chosen(page: Any, files: list[Path]) -> list[float]:
    """Moments at which the page had read one picture more, of files that are chosen in it now."""
    counted = "() => import('./static/pictures.js').then((pictures) => pictures.count())"
    before, times = page.evaluate(counted), []
    page.set_input_files("#files", files)
    while len(times) < len(files):
        now = page.evaluate(counted) - before
        times += [time.perf_counter()] * (now - len(times))
        if not page.locator("#notice").is_hidden():
            raise RuntimeError(page.locator("#notice").inner_text())
        time.sleep(0.005)
    page.locator("#work").wait_for(state="hidden")
    return times


@contextmanager
def sampled() -> Iterator[list[float]]:
    """Megabytes that the child processes of this one hold, a sample now and then while the block runs."""
    samples, over = [], threading.Event()

    def sample() -> None:
        while not over.is_set():
            samples.append(_megabytes())
            over.wait(SAMPLE_S)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _megabytes() -> float:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        if found := re.search(r"^Pss: +(\d+) kB", rollup, re.MULTILINE):
            total += int(found[1]) * 1024
    return total / 1e6


@contextmanager
def served(folder: Path, headers: dict[str, str]) -> Iterator[str]:
    """The folder by a plain file server on this machine that sends these headers, too."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, text in headers.items():
                self.send_header(name, text)
            super().end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


# ---- beside Python ----


def cosines(vectors: dict[str, list], model: str, sets: dict[str, list[Path]], work: Path) -> dict[str, Any]:
    """Lowest and mean cosine of the page's vectors to those of `PictureIndex`, which computes in float32, by kind."""
    index = PictureIndex.open(work / "index.lance", model)
    found = {}
    for name, files in sets.items():
        index.add(files[0].parent, exact=True)
        found[name] = _compared(index.vectors([str(file) for file in files]), [vectors[file.name] for file in files])
    found["texts"] = _compared(index.model.texts(list(TEXTS)), [vectors[text] for text in TEXTS])
    return found


def _compared(expected: Any, made: list[list[float]]) -> dict[str, float]:
    one, other = (np.asarray(vectors, dtype=np.float64) for vectors in (expected, made))
    found = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return {"lowest": round(float(found.min()), 5), "mean": round(float(found.mean()), 5)}


# ---- what is said of it ----


def static_page_table(*results: dict[str, Any]) -> str:
    """A table of the runs of one or several models, and a paragraph under it."""
    heads = (
        "Model",
        "Threads",
        "12 megapixels, s",
        "640 x 480, s",
        "first text, s",
        "text, s",
        "images, MB",
        "both, MB",
    )
    rows, facts = [], []
    for found in results:
        for run in found["runs"].values():
            seconds, memory = run["seconds_a_picture"], run["memory_mb"]
            rows.append(
                (
                    found["title"],
                    str(run["threads"]),
                    f"{seconds['12_megapixels']:.2f}",
                    f"{seconds['640x480']:.2f}",
                    f"{run['first_text_s']:.1f}",
                    f"{run['text_s']:.2f}",
                    f"{max(memory['12_megapixels'], memory['640x480']):,}",
                    f"{memory['with_text_tower']:,}",
                )
            )
        near = found["cosine_to_python"]
        facts.append(
            f"{found['title']}: {sum(found['bytes'].values()) / 1e6:.0f} MB on the host; lowest cosine to Python's "
            f"float32 vectors {min(near['12_megapixels']['lowest'], near['640x480']['lowest']):.4f} for pictures, "
            f"{near['texts']['lowest']:.4f} for texts."
        )
    last = results[-1]
    facts.append(f"Chromium {last['runs']['one_thread']['chromium']} on {last['device']}, without WebGPU.")
    return table(heads, rows, " ".join(facts))


if __name__ == "__main__":
    run_command(main)
