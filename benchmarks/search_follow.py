"""A folder of photographs that is kept up to date; `benchmarks.search --parts follow` runs it.

By the command, in processes of its own, as its user meets it: how right the time is that an indexing says it will take,
an indexing that finds nothing new, and the page with a follower beside it. The photographs, of 640 x 480 pixels, are
made from real ones: crops, enlarged, with the noise of a sensor.
"""

import io
import json
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from tqdm.auto import tqdm

from benchmarks.timing import time_call
from capivara_common.files import write_bytes
from capivara_search import PictureIndex
from examples.real_images import CLASS_PHOTOGRAPHS, load_photo

PHOTO_SIZE, PIXEL_NOISE = (640, 480), 3.0  # pixels of a photograph; standard deviation of a pixel, of 255
INDEXING_SHARES = {
    "first": (0, 0.6),
    "second": (0.6, 0.8),
    "resumed": (0.8, 1),
}  # of the photographs, which come run by run
INTERRUPTION_SHARE = 0.4  # of the last share: so many are done when it is interrupted
ESTIMATE_START_S = 5  # from here on an estimate is asked for
POLL_INTERVAL_S = 0.25  # between two looks at what an indexing says of itself
QUESTION_COUNT, BURST_SIZE = 100, 200  # questions; photographs that come at once
QUESTION_TEXTS = ("um gato dormindo", "cachorro correndo na praia", "", "pôr do sol", "rua à noite")
WAIT_TIMEOUT_S = 120


def measure_following(work: Path, number: int, runs: int) -> dict[str, Any]:
    """All of it, on so many photographs; changes and runs without any are repeated `runs` times."""
    work = work.absolute()  # as the rows name their files
    folder, where = work / "followed", work / "followed.lance"
    photos = make_photos(work / "photographs", number + BURST_SIZE + runs)
    for old in (folder, where):
        shutil.rmtree(old, ignore_errors=True)
    burst, spare = photos[number:][:BURST_SIZE], photos[number + BURST_SIZE :]
    flags = ["--index", str(where), "--model", str(work / "model"), "--lang", "en"]
    words = ["index", str(folder), *flags]
    estimates = {}
    for name, (start, end) in tqdm(INDEXING_SHARES.items(), desc="Indexing", unit="run"):
        copy_photos(photos[round(number * start) : round(number * end)], folder)
        if name == "resumed":
            interrupt_indexing(words, where, round(number * (end - start) * INTERRUPTION_SHARE))
        estimates[name] = measure_estimate(words, where)
    nothing_new = [time_call(lambda: run_indexing(words)) for _ in range(runs)]
    index = PictureIndex.open(where)
    with serve_page(flags) as ask:
        found = [time_changes(index, folder, one, burst[0]) for one in tqdm(spare, desc="Changes")]
        idle = time_questions(ask, lambda done: done < QUESTION_COUNT)
        copy_photos(burst, folder)
        busy = time_questions(ask, lambda done: len(index) < number + BURST_SIZE)
    return {
        "pictures": number, "estimates": estimates, "nothing_new_s": nothing_new,
        "change_in_the_answers_s": {name: [one[name] for one in found] for name in found[0]},
        "page_ms": {"following": idle, "while_a_burst_is_read": busy}, "burst": BURST_SIZE,
    }  # fmt: skip


def make_photos(folder: Path, count: int) -> list[Path]:
    """So many photographs; those that are missing are made."""
    paths = [folder / f"IMG_{one:05d}.jpg" for one in range(count)]
    for one, path in enumerate(tqdm(paths, desc="Photographs", unit="picture")):
        if not path.is_file():
            make_photo(one).save(buffer := io.BytesIO(), "JPEG", quality=90)
            write_bytes(path, buffer.getvalue())
    return paths


@cache
def load_source_photos() -> list[PIL.Image.Image]:
    """The real photographs."""
    return [load_photo(name) for name in CLASS_PHOTOGRAPHS]


def make_photo(seed: int) -> PIL.Image.Image:
    """The same number gives the same picture."""
    dice, image = np.random.default_rng(seed), load_source_photos()[seed % len(CLASS_PHOTOGRAPHS)]
    width = int(min(image.width, image.height * 4 / 3) * dice.uniform(0.6, 1))
    height = width * 3 // 4
    left, top = dice.integers(0, image.width - width + 1), dice.integers(0, image.height - height + 1)
    image = image.resize(PHOTO_SIZE, PIL.Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    pixels = np.asarray(image) + PIXEL_NOISE * dice.standard_normal((*PHOTO_SIZE[::-1], 3), dtype=np.float32)
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def copy_photos(paths: list[Path], folder: Path) -> None:
    """Photographs come into a folder."""
    folder.mkdir(exist_ok=True)
    for path in paths:
        shutil.copy(path, folder)


def start_command(words: list[str], stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    """The command, in a process of its own."""
    words = [sys.executable, "-m", "capivara_search", *words]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def run_indexing(words: list[str]) -> None:
    """Let an indexing run to its end."""
    if code := start_command(words).wait():
        raise RuntimeError(f"capivara {' '.join(words)} has ended with {code}.")


def interrupt_indexing(words: list[str], where: Path, done_count: int) -> None:
    """Let an indexing be interrupted by Ctrl-C when so many are done."""
    process, index = start_command(words), PictureIndex.open(where)
    wait_until(lambda: process.poll() is not None or (index.progress() or {"done": 0})["done"] >= done_count, 3600)
    process.send_signal(signal.SIGINT)
    process.wait()


def measure_estimate(words: list[str], where: Path) -> dict[str, Any]:
    """How far what an indexing says of the time that is left was off, from its fifth second of reading pictures on."""
    process, index = start_command(words), PictureIndex.open(where)
    began, said = time.perf_counter(), []
    while process.poll() is None:
        if found := index.progress():
            said.append((time.perf_counter(), found["done"], found["left_s"]))
        time.sleep(POLL_INTERVAL_S)
    end = max((now for now, _, _ in said), default=began)
    reading = max((now for now, done, _ in said if not done), default=began)  # a model is loaded until then
    later = [(end - now, left) for now, _, left in said if now - reading >= ESTIMATE_START_S and left is not None]
    factors = [max(true, 1) / max(left, 1) for true, left in later]  # it is told in whole seconds
    off = [max(factor, 1 / factor) for factor in factors]
    factor_off = {"median": statistics.median(off), "max": max(off)} if off else None
    return {"seconds": end - began, "looks": len(later), "factor_off": factor_off}


def wait_until(condition: Callable[[], object], seconds: float = WAIT_TIMEOUT_S) -> float:
    """Seconds until something is true."""
    began = time.perf_counter()
    while not condition():
        if time.perf_counter() - began > seconds:
            raise RuntimeError(f"What was waited for has not come in {seconds} s.")
        time.sleep(0.02)
    return time.perf_counter() - began


def time_changes(index: PictureIndex, folder: Path, photo: Path, other: Path) -> dict[str, float]:
    """Seconds until a photograph that comes, changes, moves and goes is found so in the index."""
    path, moved = folder / "changing.jpg", folder / "moved.jpg"

    def has(one: Path) -> bool:
        row = index.get_picture(str(one))
        return row is not None and row.size == one.stat().st_size

    found = {}
    for name, change in {"new": photo, "changed": other}.items():
        shutil.copy(change, path)
        found[name] = wait_until(lambda: has(path))
    path.rename(moved)
    found["moved"] = wait_until(lambda: has(moved) and index.get_picture(str(path)) is None)
    moved.unlink()
    return found | {"removed": wait_until(lambda: index.get_picture(str(moved)) is None)}


@contextmanager
def serve_page(flags: list[str]) -> Iterator[Callable[[str], None]]:
    """The page with a follower beside it, which has begun to follow; a function asks it for a text."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start_command(["app", "--watch", "--no-open", "--port", str(port), *flags], subprocess.PIPE)

    def ask(text: str) -> None:
        body = json.dumps({"text": text, "k": 48}).encode() + b"\n"
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/search", body, timeout=WAIT_TIMEOUT_S).read()

    try:
        if not any("Following" in line for line in process.stderr):
            raise RuntimeError("The folder is not followed.")
        for text in QUESTION_TEXTS:
            ask(text)
        yield ask
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def time_questions(ask: Callable[[str], None], should_continue: Callable[[int], bool]) -> dict[str, float]:
    """Milliseconds of answers of the page, one question after another as long as it goes on."""
    spent: list[float] = []
    while should_continue(len(spent)):
        spent.append(1000 * time_call(lambda: ask(QUESTION_TEXTS[len(spent) % len(QUESTION_TEXTS)])))
        time.sleep(0.05)
    percentiles = {f"p{share}": float(np.percentile(spent, share)) for share in (50, 95)}
    return percentiles | {"max": max(spent), "questions": len(spent)}
