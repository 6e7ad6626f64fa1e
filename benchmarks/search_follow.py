"""Measure how well a search index keeps up with a changing folder of photographs (`benchmarks.search --parts follow`).

The benchmark starts the command `capivara` in separate processes. It measures:

- how accurately an indexing run estimates its remaining time;
- how long an indexing run without new photographs takes;
- how soon a change of the folder is in the index;
- how fast the search page answers meanwhile.
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

from benchmarks.tools import time_call
from capivara_common.files import write_bytes
from capivara_search import PictureIndex
from examples.real_images import CLASS_PHOTOGRAPHS, load_example_photo

PHOTO_SIZE = (640, 480)  # width and height in pixels
PIXEL_NOISE = 3.0  # standard deviation of the noise, like that of a camera sensor, for pixel values from 0 to 255
# (start, end) of the photographs that each indexing run adds, as fractions of all photographs, by the name of the run
INDEXING_SHARES = {"first": (0, 0.6), "second": (0.6, 0.8), "resumed": (0.8, 1)}
INTERRUPTION_SHARE = 0.4  # the run "resumed" is first interrupted after this fraction of its pictures
# Seconds after the first indexed picture during which estimates of the remaining time are not evaluated
ESTIMATE_START_S = 5
POLL_INTERVAL_S = 0.25  # seconds between two readings of the indexing progress
QUESTION_COUNT = 100  # number of searches that are sent to the search page, to time them
BURST_SIZE = 200  # photographs that are added to the folder at once, to time searches while they are indexed
QUESTION_TEXTS = ("um gato dormindo", "cachorro correndo na praia", "", "pôr do sol", "rua à noite")
WAIT_TIMEOUT_S = 120


def measure_indexing_watching_and_searches(work: Path, number: int, runs: int) -> dict[str, Any]:
    """Measure how soon a search index shows changes of a folder that it follows, and how fast the page answers.

    Args:
        work: Folder for the photographs and the index. Its subfolder `model` must contain the search model.
        number: Number of photographs in the followed folder.
        runs: Number of repetitions.

    Returns:
        The content of search_follow.json:

        - "pictures": number of photographs in the folder.
        - "estimates": duration of each indexing run, and how wrong its estimates of the remaining time were.
        - "nothing_new_s": seconds of each indexing run without new photographs.
        - "change_in_the_answers_s": `{kind of change: seconds of each run until the index shows the change}`.
        - "page_ms": search times in milliseconds, "following" an unchanged folder and "while_a_burst_is_read".
        - "burst": number of new photographs that are indexed at once.
    """
    work = work.absolute()  # absolute, because the index stores absolute paths
    folder, where = work / "followed", work / "followed.lance"
    photos = write_random_photos(work / "photographs", number + BURST_SIZE + runs)
    for outdated in (folder, where):
        shutil.rmtree(outdated, ignore_errors=True)
    burst, spare = photos[number:][:BURST_SIZE], photos[number + BURST_SIZE :]
    flags = ["--index", str(where), "--model", str(work / "model"), "--lang", "en"]
    words = ["index", str(folder), *flags]
    estimates = {}
    for name, (start, end) in tqdm(INDEXING_SHARES.items(), desc="Indexing", unit="run"):
        _copy_photos(photos[round(number * start) : round(number * end)], folder)
        if name == "resumed":
            _start_and_interrupt_indexing(words, where, round(number * (end - start) * INTERRUPTION_SHARE))
        estimates[name] = _index_and_measure_remaining_time_error(words, where)
    nothing_new = [time_call(lambda: _run_indexing(words)) for _ in range(runs)]
    index = PictureIndex.open(where)
    with _serve_search_page_and_follow_folder(flags) as search:
        bar = tqdm(spare, desc="Changes")
        changes = [_time_changes_reaching_index(index, folder, photo, burst[0]) for photo in bar]
        idle = _time_page_searches(search, lambda done: done < QUESTION_COUNT)
        _copy_photos(burst, folder)
        busy = _time_page_searches(search, lambda done: len(index) < number + BURST_SIZE)
    return {
        "pictures": number, "estimates": estimates, "nothing_new_s": nothing_new,
        "change_in_the_answers_s": {name: [change[name] for change in changes] for name in changes[0]},
        "page_ms": {"following": idle, "while_a_burst_is_read": busy}, "burst": BURST_SIZE,
    }  # fmt: skip


def write_random_photos(folder: Path, count: int) -> list[Path]:
    """Generate photographs as JPEG files, unless they exist. They serve as pictures to index.

    Args:
        folder: Folder for the files.
        count: Number of photographs.

    Returns:
        Paths of all `count` photographs.
    """
    paths = [folder / f"IMG_{number:05d}.jpg" for number in range(count)]
    for number, path in enumerate(tqdm(paths, desc="Photographs", unit="picture")):
        if not path.is_file():
            buffer = io.BytesIO()
            _make_noisy_photo_crop(number).save(buffer, "JPEG", quality=90)
            write_bytes(path, buffer.getvalue())
    return paths


@cache
def _load_source_photos() -> list[PIL.Image.Image]:
    """Return the real photographs whose crops are the generated photographs."""
    return [load_example_photo(name) for name in CLASS_PHOTOGRAPHS]


def _make_noisy_photo_crop(seed: int) -> PIL.Image.Image:
    """Generate a photograph of size `PHOTO_SIZE`: a random crop of a real photograph, resized, with noise.

    Args:
        seed: Seed of the random numbers. The same seed gives the same image.

    Returns:
        The image in mode RGB.
    """
    rng, image = np.random.default_rng(seed), _load_source_photos()[seed % len(CLASS_PHOTOGRAPHS)]
    width = int(min(image.width, image.height * 4 / 3) * rng.uniform(0.6, 1))
    height = width * 3 // 4
    left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    image = image.resize(PHOTO_SIZE, PIL.Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    pixels = np.asarray(image) + PIXEL_NOISE * rng.standard_normal((*PHOTO_SIZE[::-1], 3), dtype=np.float32)
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _copy_photos(paths: list[Path], folder: Path) -> None:
    """Copy photographs into a folder, which is created if necessary."""
    folder.mkdir(exist_ok=True)
    for path in paths:
        shutil.copy(path, folder)


def _start_capivara_command(words: list[str], stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    """Start the command `capivara` in a new process and return the process.

    Args:
        words: Arguments of the command, such as `["index", "FOLDER"]`.
        stderr: Where the error output goes, as for `subprocess.Popen`. By default, it is discarded.
    """
    words = [sys.executable, "-m", "capivara_search", *words]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def _run_indexing(words: list[str]) -> None:
    """Run `capivara index` to its end; raise RuntimeError if it fails."""
    if code := _start_capivara_command(words).wait():
        raise RuntimeError(f"capivara {' '.join(words)} ended with exit code {code}. Run it to see the error.")


def _start_and_interrupt_indexing(words: list[str], where: Path, done_count: int) -> None:
    """Start an indexing run, and interrupt the run by Ctrl-C after `done_count` pictures.

    Args:
        words: Arguments of the command `capivara`.
        where: Folder of the index.
        done_count: Number of pictures that the run has read when it is interrupted.
    """
    process, index = _start_capivara_command(words), PictureIndex.open(where)
    wait_until(lambda: process.poll() is not None or (index.progress() or {"done": 0})["done"] >= done_count, 3600)
    process.send_signal(signal.SIGINT)
    process.wait()


def _index_and_measure_remaining_time_error(words: list[str], where: Path) -> dict[str, Any]:
    """Run `capivara index`, and measure how wrong its estimates of the remaining time are.

    Args:
        words: Arguments of the command `capivara`.
        where: Folder of the index.

    Returns:
        `{"seconds": duration of the run, "looks": number of estimates, "factor_off": {"median": factor, "max":
        factor}}`. The factors, at least 1, are between the estimated and the actual remaining time. "factor_off" is
        None if there are no estimates.
    """
    process, index = _start_capivara_command(words), PictureIndex.open(where)
    start, readings = time.perf_counter(), []
    while process.poll() is None:
        if progress := index.progress():
            readings.append((time.perf_counter(), progress["done"], progress["left_s"]))
        time.sleep(POLL_INTERVAL_S)
    end = max((now for now, _, _ in readings), default=start)
    # Time of the last reading without a finished picture. Until then, the run loads the model, which must not count.
    first_picture = max((now for now, done, _ in readings if not done), default=start)
    first_estimate = first_picture + ESTIMATE_START_S
    estimates = [(end - now, left) for now, _, left in readings if now >= first_estimate and left is not None]
    # Estimates are whole seconds and may be 0. Both times count as at least 1 s, so that no ratio divides by 0.
    ratios = [max(actual, 1) / max(left, 1) for actual, left in estimates]
    factors = [max(ratio, 1 / ratio) for ratio in ratios]
    factor_off = {"median": statistics.median(factors), "max": max(factors)} if factors else None
    return {"seconds": end - start, "looks": len(estimates), "factor_off": factor_off}


def wait_until(condition: Callable[[], object], seconds: float = WAIT_TIMEOUT_S) -> float:
    """Wait until a condition is true, and return how long that took.

    Args:
        condition: Function without arguments. Waiting ends when it returns a true value.
        seconds: Longest time to wait, in seconds.

    Returns:
        Seconds from the call until the condition was true.

    Raises:
        RuntimeError: If the condition is still false after `seconds`.
    """
    start = time.perf_counter()
    while not condition():
        if time.perf_counter() - start > seconds:
            raise RuntimeError(f"The index did not change as expected within {seconds} s. Run the benchmark again.")
        time.sleep(0.02)
    return time.perf_counter() - start


def _time_changes_reaching_index(index: PictureIndex, folder: Path, photo: Path, other: Path) -> dict[str, float]:
    """Measure how long changes of a followed folder take to reach the index.

    Args:
        index: Index of the folder.
        folder: The followed folder.
        photo: Photograph of which a copy is added to the folder, and then changed, moved and removed.
        other: Photograph whose content replaces the content of the copy when the copy is changed.

    Returns:
        `{kind of change: seconds until the index shows the change}`, with the kinds "new", "changed", "moved" and
        "removed".
    """
    path, moved = folder / "changing.jpg", folder / "moved.jpg"

    def is_indexed(file: Path) -> bool:
        row = index.get_picture(str(file))
        return row is not None and row.size == file.stat().st_size

    seconds = {}
    for name, source in {"new": photo, "changed": other}.items():
        shutil.copy(source, path)
        seconds[name] = wait_until(lambda: is_indexed(path))
    path.rename(moved)
    seconds["moved"] = wait_until(lambda: is_indexed(moved) and index.get_picture(str(path)) is None)
    moved.unlink()
    return seconds | {"removed": wait_until(lambda: index.get_picture(str(moved)) is None)}


@contextmanager
def _serve_search_page_and_follow_folder(flags: list[str]) -> Iterator[Callable[[str], None]]:
    """Start the search page with a process that follows the indexed folder, and stop both at the end of the block.

    Args:
        flags: Flags of the command `capivara app`, which name the index and the model.

    Yields:
        Function that sends a text to the page as a search and waits for the results.

    Raises:
        RuntimeError: If the command ends without following the folder.
    """
    with socket.create_server(("127.0.0.1", 0)) as free_socket:
        port = free_socket.getsockname()[1]
    process = _start_capivara_command(["app", "--watch", "--no-open", "--port", str(port), *flags], subprocess.PIPE)

    def search(text: str) -> None:
        body = json.dumps({"text": text, "k": 48}).encode() + b"\n"
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/search", body, timeout=WAIT_TIMEOUT_S).read()

    try:
        if not any("Following" in line for line in process.stderr):
            raise RuntimeError("`capivara app --watch` ended before it followed the folder. Run it to see the error.")
        for text in QUESTION_TEXTS:
            search(text)
        yield search
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def _time_page_searches(search: Callable[[str], None], should_continue: Callable[[int], bool]) -> dict[str, float]:
    """Send searches to the page one after another, and time them.

    Args:
        search: Function that sends a text and waits for the results.
        should_continue: Function that is called with the number of finished searches; if it returns False, the
            measurement ends.

    Returns:
        `{"p50": median time of a search in milliseconds, "p95": its 95th percentile, "max": its maximum, "questions":
        number of searches}`.
    """
    times: list[float] = []
    while should_continue(len(times)):
        times.append(1000 * time_call(lambda: search(QUESTION_TEXTS[len(times) % len(QUESTION_TEXTS)])))
        time.sleep(0.05)
    percentiles = {f"p{share}": float(np.percentile(times, share)) for share in (50, 95)}
    return percentiles | {"max": max(times), "questions": len(times)}
