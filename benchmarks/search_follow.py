"""A folder of photographs that is kept up to date; `benchmarks.search --parts follow` runs it.

By the command, in processes of its own, as its user meets it: how right the time is that an indexing says it will take,
an indexing that finds nothing new, and the page with a follower beside it.
"""

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
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from benchmarks.search_photos import SMALL, make_photos, photo_path
from capivara_search import PictureIndex

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
    photos, folder, where = work / "followed", work / "followed-folder", work / "followed.lance"
    make_photos(photos, number + BURST + runs, SMALL)
    for old in (folder, where):
        shutil.rmtree(old, ignore_errors=True)
    spare = [photo_path(photos, one) for one in range(number, number + BURST + runs)]
    flags = ["--index", str(where), "--model", str(work / "model"), "--lang", "en"]
    index = ["index", str(folder), *flags]
    estimates = {}
    for name, (start, end) in tqdm(SHARES.items(), desc="Indexing", unit="run"):
        come(photos, folder, range(round(number * start), round(number * end)))
        if name == "resumed":
            interrupted(index, where, round(number * (end - start) * INTERRUPTED))
        estimates[name] = estimated(index, where)
    nothing_new = [seconds_of_command(index) for _ in tqdm(range(runs), desc="Nothing new", unit="run")]
    with page(flags) as ask:
        changes = {name: [] for name in ("new", "changed", "moved", "removed")}
        for run in tqdm(range(runs), desc="Changes", unit="run"):
            for name, seconds in changed(where, folder, spare[BURST + run], spare[run]).items():
                changes[name].append(seconds)
        idle = asked(ask, lambda done: done < QUERIES)
        come(photos, folder, range(number, number + BURST))
        index = PictureIndex.open(where)
        busy = asked(ask, lambda done: len(index) < number + BURST)
    return {
        "pictures": number, "estimates": estimates, "nothing_new_s": nothing_new, "change_in_the_answers_s": changes,
        "page_ms": {"following": idle, "while_a_burst_is_read": busy}, "burst": BURST,
    }  # fmt: skip


def come(photos: Path, folder: Path, numbers: range) -> None:
    """Photographs come into a folder."""
    for number in numbers:
        path = photo_path(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo_path(photos, number), path)


def started(words: list[str], **options: Any) -> subprocess.Popen:
    """The command, in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "capivara_search", *words], **options)


def seconds_of_command(words: list[str]) -> float:
    """Seconds of a command, from its start to its end."""
    began = time.perf_counter()
    if code := started(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait():
        raise RuntimeError(f"capivara {' '.join(words)} has ended with {code}.")
    return time.perf_counter() - began


def interrupted(words: list[str], where: Path, done: int) -> None:
    """Let an indexing be interrupted by Ctrl-C when so many are done."""
    process, index = started(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), PictureIndex.open(where)
    until(lambda: process.poll() is not None or (index.progress() or {"done": 0})["done"] >= done, 3600)
    process.send_signal(signal.SIGINT)
    process.wait()


def estimated(words: list[str], where: Path) -> dict[str, Any]:
    """How far what an indexing says of the time that is left was off, from its fifth second of reading pictures on."""
    process, index = started(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), PictureIndex.open(where)
    began, said = time.perf_counter(), []
    while process.poll() is None:
        if found := index.progress():
            said.append((time.perf_counter(), found["done"], found["left_s"]))
        time.sleep(LOOK_S)
    end = max(now for now, _, _ in said)
    reading = max(now for now, done, _ in said if not done)  # a model is loaded until then
    later = [(end - now, left) for now, _, left in said if now - reading >= FIFTH_S]
    known = [(true, left) for true, left in later if left is not None]
    factors = [max(true, 1) / max(left, 1) for true, left in known]  # it is told in whole seconds
    off = [max(factor, 1 / factor) for factor in factors]
    return {
        "seconds": end - began, "until_reading_s": reading - began,
        "looks": len(later), "unknown": len(later) - len(known),
        "factor_off": {"median": statistics.median(off), "max": max(off)} if off else None,
    }  # fmt: skip


def until(true: Callable[[], object], seconds: float = WAIT_S) -> float:
    """Seconds until something is true."""
    began = time.perf_counter()
    while not true():
        if time.perf_counter() - began > seconds:
            raise RuntimeError(f"What was waited for has not come in {seconds} s.")
        time.sleep(0.02)
    return time.perf_counter() - began


def changed(where: Path, folder: Path, photo: Path, other: Path) -> dict[str, float]:
    """Seconds until a photograph that comes, changes, moves and goes is found so in the index."""
    index, path, moved = PictureIndex.open(where), folder / "changing.jpg", folder / "moved.jpg"

    def has(one: Path) -> bool:
        row = index.row(str(one))
        return row is not None and row.size == one.stat().st_size

    found = {}
    for name, change in {"new": photo, "changed": other}.items():
        shutil.copy(change, path)
        found[name] = until(lambda: has(path))
    path.rename(moved)
    found["moved"] = until(lambda: has(moved) and index.row(str(path)) is None)
    moved.unlink()
    return found | {"removed": until(lambda: index.row(str(moved)) is None)}


@contextmanager
def page(flags: list[str]) -> Iterator[Callable[[str], None]]:
    """The page with a follower beside it, which has begun to follow; a function asks it for a text."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["app", "--watch", "--no-open", "--port", str(port), *flags]
    process = started(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

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
        began = time.perf_counter()
        ask(TEXTS[len(spent) % len(TEXTS)])
        spent.append(1000 * (time.perf_counter() - began))
        time.sleep(0.05)
    percentiles = {f"p{share}": float(np.percentile(spent, share)) for share in (50, 95)}
    return percentiles | {"max": max(spent), "questions": len(spent)}
