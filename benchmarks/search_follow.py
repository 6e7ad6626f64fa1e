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

from benchmarks.timing import seconds_of
from capivara_common.files import write_bytes
from capivara_search import PictureIndex
from examples.real_images import PHOTOS, photo

SIZE, NOISE = (640, 480), 3.0  # pixels of a photograph; standard deviation of a pixel, of 255
SHARES = {"first": (0, 0.6), "second": (0.6, 0.8), "resumed": (0.8, 1)}  # of the photographs, which come run by run
INTERRUPTED = 0.4  # of the last share: so many are done when it is interrupted
FIFTH_S = 5  # from here on an estimate is asked for
LOOK_S = 0.25  # between two looks at what an indexing says of itself
QUERIES, BURST = 100, 200  # questions; photographs that come at once
TEXTS = ("um gato dormindo", "cachorro correndo na praia", "", "pôr do sol", "rua à noite")
WAIT_S = 120


def measure(work: Path, number: int, runs: int) -> dict[str, Any]:
    """All of it, on so many photographs; changes and runs without any are repeated `runs` times."""
    work = work.absolute()  # as the rows name their files
    folder, where = work / "followed", work / "followed.lance"
    photos = make_photos(work / "photographs", number + BURST + runs)
    for old in (folder, where):
        shutil.rmtree(old, ignore_errors=True)
    burst, spare = photos[number:][:BURST], photos[number + BURST :]
    flags = ["--index", str(where), "--model", str(work / "model"), "--lang", "en"]
    words = ["index", str(folder), *flags]
    estimates = {}
    for name, (start, end) in tqdm(SHARES.items(), desc="Indexing", unit="run"):
        come(photos[round(number * start) : round(number * end)], folder)
        if name == "resumed":
            interrupted(words, where, round(number * (end - start) * INTERRUPTED))
        estimates[name] = estimated(words, where)
    nothing_new = [seconds_of(lambda: indexed(words)) for _ in range(runs)]
    index = PictureIndex.open(where)
    with page(flags) as ask:
        found = [changed(index, folder, one, burst[0]) for one in tqdm(spare, desc="Changes")]
        idle = asked(ask, lambda done: done < QUERIES)
        come(burst, folder)
        busy = asked(ask, lambda done: len(index) < number + BURST)
    return {
        "pictures": number, "estimates": estimates, "nothing_new_s": nothing_new,
        "change_in_the_answers_s": {name: [one[name] for one in found] for name in found[0]},
        "page_ms": {"following": idle, "while_a_burst_is_read": busy}, "burst": BURST,
    }  # fmt: skip


def make_photos(folder: Path, number: int) -> list[Path]:
    """So many photographs; those that are missing are made."""
    paths = [folder / f"IMG_{one:05d}.jpg" for one in range(number)]
    for one, path in enumerate(tqdm(paths, desc="Photographs", unit="picture")):
        if not path.is_file():
            made_photo(one).save(buffer := io.BytesIO(), "JPEG", quality=90)
            write_bytes(path, buffer.getvalue())
    return paths


@cache
def sources() -> list[PIL.Image.Image]:
    """The real photographs."""
    return [photo(name) for name in PHOTOS]


def made_photo(number: int) -> PIL.Image.Image:
    """The same number gives the same picture."""
    dice, image = np.random.default_rng(number), sources()[number % len(PHOTOS)]
    width = int(min(image.width, image.height * 4 / 3) * dice.uniform(0.6, 1))
    height = width * 3 // 4
    left, top = dice.integers(0, image.width - width + 1), dice.integers(0, image.height - height + 1)
    image = image.resize(SIZE, PIL.Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    pixels = np.asarray(image) + NOISE * dice.standard_normal((*SIZE[::-1], 3), dtype=np.float32)
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def come(paths: list[Path], folder: Path) -> None:
    """Photographs come into a folder."""
    folder.mkdir(exist_ok=True)
    for path in paths:
        shutil.copy(path, folder)


def started(words: list[str], stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    """The command, in a process of its own."""
    words = [sys.executable, "-m", "capivara_search", *words]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def indexed(words: list[str]) -> None:
    """Let an indexing run to its end."""
    if code := started(words).wait():
        raise RuntimeError(f"capivara {' '.join(words)} has ended with {code}.")


def interrupted(words: list[str], where: Path, done: int) -> None:
    """Let an indexing be interrupted by Ctrl-C when so many are done."""
    process, index = started(words), PictureIndex.open(where)
    until(lambda: process.poll() is not None or (index.progress() or {"done": 0})["done"] >= done, 3600)
    process.send_signal(signal.SIGINT)
    process.wait()


def estimated(words: list[str], where: Path) -> dict[str, Any]:
    """How far what an indexing says of the time that is left was off, from its fifth second of reading pictures on."""
    process, index = started(words), PictureIndex.open(where)
    began, said = time.perf_counter(), []
    while process.poll() is None:
        if found := index.progress():
            said.append((time.perf_counter(), found["done"], found["left_s"]))
        time.sleep(LOOK_S)
    end = max((now for now, _, _ in said), default=began)
    reading = max((now for now, done, _ in said if not done), default=began)  # a model is loaded until then
    later = [(end - now, left) for now, _, left in said if now - reading >= FIFTH_S and left is not None]
    factors = [max(true, 1) / max(left, 1) for true, left in later]  # it is told in whole seconds
    off = [max(factor, 1 / factor) for factor in factors]
    factor_off = {"median": statistics.median(off), "max": max(off)} if off else None
    return {"seconds": end - began, "looks": len(later), "factor_off": factor_off}


def until(true: Callable[[], object], seconds: float = WAIT_S) -> float:
    """Seconds until something is true."""
    began = time.perf_counter()
    while not true():
        if time.perf_counter() - began > seconds:
            raise RuntimeError(f"What was waited for has not come in {seconds} s.")
        time.sleep(0.02)
    return time.perf_counter() - began


def changed(index: PictureIndex, folder: Path, photo: Path, other: Path) -> dict[str, float]:
    """Seconds until a photograph that comes, changes, moves and goes is found so in the index."""
    path, moved = folder / "changing.jpg", folder / "moved.jpg"

    def has(one: Path) -> bool:
        row = index.get_picture(str(one))
        return row is not None and row.size == one.stat().st_size

    found = {}
    for name, change in {"new": photo, "changed": other}.items():
        shutil.copy(change, path)
        found[name] = until(lambda: has(path))
    path.rename(moved)
    found["moved"] = until(lambda: has(moved) and index.get_picture(str(path)) is None)
    moved.unlink()
    return found | {"removed": until(lambda: index.get_picture(str(moved)) is None)}


@contextmanager
def page(flags: list[str]) -> Iterator[Callable[[str], None]]:
    """The page with a follower beside it, which has begun to follow; a function asks it for a text."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = started(["app", "--watch", "--no-open", "--port", str(port), *flags], subprocess.PIPE)

    def ask(text: str) -> None:
        body = json.dumps({"text": text, "k": 48}).encode() + b"\n"
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/search", body, timeout=WAIT_S).read()

    try:
        if not any("Following" in line for line in process.stderr):
            raise RuntimeError("The folder is not followed.")
        for text in TEXTS:
            ask(text)
        yield ask
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def asked(ask: Callable[[str], None], goes_on: Callable[[int], bool]) -> dict[str, float]:
    """Milliseconds of answers of the page, one question after another as long as it goes on."""
    spent: list[float] = []
    while goes_on(len(spent)):
        spent.append(1000 * seconds_of(lambda: ask(TEXTS[len(spent) % len(TEXTS)])))
        time.sleep(0.05)
    percentiles = {f"p{share}": float(np.percentile(spent, share)) for share in (50, 95)}
    return percentiles | {"max": max(spent), "questions": len(spent)}
