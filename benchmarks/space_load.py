"""The page under load: many visitors at once, then thousands one after another; its memory, and that no request hangs.

    python -m benchmarks.space_load --output benchmarks/results/space_load.json

Needs the embedded default (`python -m examples.openmoji.prepare`). The page is started in a process of its own, on this
machine alone, and ended afterwards. A visitor opens the page, searches by a text of one's own, gets the thumbnails of
the first pictures, and every tenth searches by a picture of one's own as well. Memory is what the page's processes hold
together, sampled four times a second; the first visitors, for whom libraries load, come before it is measured. The time
of a search is that of the visitors one after another. Ends with an error where memory has grown by more than
`--most_growth_mb`, or a request was not answered. The last line of the output is JSON.
"""

import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import psutil
from tqdm.auto import tqdm

from benchmarks.timing import conditions, finish
from capivara_common.cli import flag, parse, run_command
from capivara_search.index import PictureIndex
from hub_upload.space.collection import picture_folder

HANGS_S = 120  # a request without an answer: the page gives a question up after 50 s at most
SHOWN = 24  # pictures of an answer
THUMBNAILS = 4  # of them that a visitor gets
PICTURE_EVERY = 10  # visitors
ANSWERED = ("200", "503", "of them told to come back")  # statuses; 503: too many are waiting
PAGE = """
import sys
from capivara_search.index import PictureIndex
from capivara_search.page import serve_index
index = PictureIndex.open(*sys.argv[1:])
serve_index(index, port=0, open_browser=False, on_open=lambda url: print(url, flush=True))
"""


@dataclass
class SpaceLoadArguments:
    """Arguments of `benchmarks.space_load`."""

    model: str = flag("data/openmoji/base", "Folder of the page's model.")
    pictures: str = flag("data/openmoji/dataset", "Pictures that are searched.")
    warm_up: int = flag(300, "Visitors before memory is measured.")
    at_once: int = flag(200, "Visitors at the same time.")
    sessions: int = flag(5000, "Visitors one after another, after them.")
    most_growth_mb: float = flag(50, "Most megabytes by which memory may grow.")
    output: Path | None = flag(None, "JSON file for the figures.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(SpaceLoadArguments, __doc__, argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder, _ = picture_folder(args.pictures, Path(temporary))
        index = PictureIndex.open(Path(temporary) / "pictures.lance", args.model)
        index.add(folder)
        with started_page(index.where, args.model) as (process, url):
            measured = asyncio.run(load(process, url, args))
    results = conditions() | measured
    results["versions"] |= {name: metadata.version(name) for name in ("lancedb", "starlette", "uvicorn")}
    finish(results, args.output)
    if measured["growth_mb"] > args.most_growth_mb or measured["not_answered"]:
        sys.exit(f"error: grew by {measured['growth_mb']} MB, {measured['not_answered']} requests were not answered.")


@contextmanager
def started_page(where: str, model: str):
    """The page of an index in a process of its own, and its address."""
    process = subprocess.Popen([sys.executable, "-c", PAGE, where, model], stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"The page ended with {process.wait()}; its message is above.")
        yield psutil.Process(process.pid), url
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


async def load(process: psutil.Process, url: str, args: SpaceLoadArguments) -> dict:
    """Statuses of all answers, megabytes of memory before, at the peak of and after each part, and a search's time."""
    answers: Counter[str] = Counter()
    waits: list[float] = []  # seconds of each search
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=HANGS_S, limits=limits) as client:

        def visits(first: int, count: int) -> list:
            return [visit(client, number, answers, waits) for number in range(first, first + count)]

        async def in_a_row(first: int, count: int) -> None:
            for one in tqdm(visits(first, count), desc="One after another", unit="visitor", disable=None):
                await one

        await in_a_row(0, args.warm_up)
        at_once = asyncio.gather(*visits(1_000_000, args.at_once))
        parts = {"at_once": await _memory_during(process, at_once)}
        waits.clear()
        parts["in_a_row"] = await _memory_during(process, in_a_row(2_000_000, args.sessions))
    return {
        "visitors": {"warm_up": args.warm_up, "at_once": args.at_once, "in_a_row": args.sessions},
        "answers": dict(answers),
        "not_answered": sum(n for kind, n in answers.items() if kind not in ANSWERED),
        "milliseconds_in_a_row": {"median": round(1000 * statistics.median(waits), 1)},
        "memory_mb": parts,
        "growth_mb": round(parts["in_a_row"]["after"] - parts["at_once"]["before"], 1),
    }


async def visit(client: httpx.AsyncClient, number: int, answers: Counter[str], waits: list[float]) -> None:
    """One visitor; the status of each answer, or the kind of error, is counted, and a search's seconds are kept."""

    async def sent(method: str, path: str, **content) -> httpx.Response | None:
        try:
            answer = await client.request(method, path, **content)
            answers[str(answer.status_code)] += 1
            return answer
        except httpx.HTTPError as error:
            answers[type(error).__name__] += 1
            return None

    async def asked(text: str = "", picture: bytes = b"") -> list[dict]:
        question = json.dumps({"text": text, "k": SHOWN}).encode() + b"\n" + picture
        started = time.perf_counter()
        answer = await sent("POST", "/api/search", content=question)
        waits.append(time.perf_counter() - started)
        if answer is not None and answer.status_code == 503:
            answers["of them told to come back"] += 1
        found = answer.json()["models"][0]["hits"] if answer is not None and answer.status_code == 200 else []
        if answer is not None and answer.status_code == 200 and len(found) != SHOWN:
            answers["without pictures"] += 1
        return found

    await sent("GET", "/")
    for hit in (await asked(f"um gato na casa número {number}"))[:THUMBNAILS]:
        await sent("GET", "/thumbnail", params={"path": hit["path"]})
    if number % PICTURE_EVERY == 0:
        await asked(picture=_picture(number))


async def _memory_during(process: psutil.Process, work) -> dict[str, float]:
    samples = [_megabytes(process)]
    running = asyncio.ensure_future(work)
    while not running.done():
        await asyncio.wait([running], timeout=0.25)
        samples.append(_megabytes(process))
    await running
    await asyncio.sleep(2)
    return {"before": samples[0], "peak": max(samples), "after": _megabytes(process)}


def _megabytes(process: psutil.Process) -> float:
    found = [process, *process.children(recursive=True)]
    return round(sum(one.memory_info().rss for one in found if one.is_running()) / 1e6, 1)


def _picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


if __name__ == "__main__":
    run_command(main)
