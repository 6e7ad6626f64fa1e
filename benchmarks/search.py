"""The index at a thousand to a million pictures, and a folder that is followed.

    python -m benchmarks.search --parts index
    python -m benchmarks.search --parts index --sizes 1000 10000 --output /tmp/search.json
    python -m benchmarks.search --parts follow

Vectors of 512 numbers are made, in clusters; their rows have all columns but a thumbnail. An index is measured in a
process of its own, so that its peak of memory is its own. The text tower is of the full published size, with random
weights. `benchmarks/search_follow.py` is the part `follow`. The JSON of the parts lies in benchmarks/results, as
search.json and search_follow.json; docs/benchmarks.md shows it.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import pyarrow as pa
from tqdm.auto import tqdm

from benchmarks import timing
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_search import PictureIndex
from capivara_search.page.answers import PageAnswers, Question
from capivara_search.table import MAX_EXACT_ROWS, schema, vector_column

WIDTH, CLUSTERS, SPREAD = 512, 2000, 1.0  # numbers of a vector; clusters; noise beside a centre of length 1
QUERIES, K = 200, 10
ROWS_AT_ONCE = 100_000
ADDED = (1, 1000)  # pictures; a thousand to the largest index alone
QUERY_WORDS = ("um gato dormindo", "cachorro correndo na praia", "bolo de aniversário", "pôr do sol", "rua à noite")


@dataclass
class SearchArguments:
    """Arguments of `benchmarks.search`."""

    gone = {"photographs": "those of 12 megapixels are not measured any more; --parts index and follow are"}
    parts: Literal["index", "follow"] = flag("index", "What is measured: indexes of all sizes, a folder followed.")
    sizes: list[int] = flag([1_000, 10_000, 100_000, 1_000_000], "Pictures of the indexes.")
    followed: int = flag(10_000, "Photographs, of 640 x 480, of the folder that is followed.")
    runs: int = flag(5, "Repetitions of what is short: one picture added, a new process, a change.")
    work: Path = flag(Path("runs/search"), "Folder of vectors, indexes, photographs and model; some 10 GB.")
    output: Path | None = flag(None, "JSON file; search.json or search_follow.json of benchmarks/results if none.")
    worker: Literal["fill", "index"] | None = flag(None, "Make or measure one index, in this process.")
    rows: int = flag(1000, "Its pictures.")
    added: int = flag(1, "How many pictures at most are added at once.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse_arguments(SearchArguments, __doc__, argv)
    if args.worker:
        timing.finish({"fill": fill, "index": search_index}[args.worker](args))
        return
    from benchmarks import search_follow  # here: a worker does without torch

    timing.save_random_model(args.work / "model")
    if args.parts == "index":
        search_follow.make_photos(args.work / "photographs", max(ADDED))
        found = indexes(args) | {"width": WIDTH, "k": K, "queries": QUERIES}
    else:
        found = search_follow.measure(args.work, args.followed, args.runs)
    name = "search.json" if args.parts == "index" else "search_follow.json"
    timing.finish(timing.conditions("lancedb") | {"runs": args.runs} | found, args.output or timing.RESULTS / name)


def indexes(args: SearchArguments) -> dict[str, Any]:
    """Our index at all sizes, and the first search of a new process at the largest."""
    sizes = {}
    for rows in tqdm(args.sizes, desc="Indexes", unit="size"):
        make_vectors(args.work, rows)
        flags = {"rows": rows, "work": args.work, "runs": args.runs, "added": ADDED[rows == max(args.sizes)]}
        found = [timing.in_own_process("benchmarks.search", worker=name, **flags) for name in ("fill", "index")]
        sizes[str(rows)] = found[0] | found[1] | {"approximate": rows > MAX_EXACT_ROWS}
    return {"index": sizes, "first_search_s": first_searches(args, max(args.sizes))}


def first_searches(args: SearchArguments, rows: int) -> list[float]:
    """Seconds of `capivara search` in a new process, from its start to its end."""
    words = ["search", QUERY_WORDS[0], "--index", str(place(args.work, rows)), "--model", str(args.work / "model")]
    command = [sys.executable, "-m", "capivara_search", *words, "--json"]
    if not json.loads(subprocess.check_output(command)):  # which also reads the files from the disk
        raise RuntimeError(f"{' '.join(command)} has found nothing.")
    return [timing.seconds_of(lambda: subprocess.check_output(command)) for _ in range(args.runs)]


# ---- what is searched ----


def place(work: Path, rows: int) -> Path:
    """The index of so many pictures."""
    return work / f"index-{rows}.lance"


def make_vectors(work: Path, rows: int) -> None:
    """Vectors, float16, in files: `vectors-ROWS.npy`; queries, and the rows that are nearest to each by float32."""
    file, answers = work / f"vectors-{rows}.npy", work / f"answers-{rows}.npz"
    if answers.is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    dice = np.random.default_rng(0)
    centres = unit(dice.standard_normal((CLUSTERS, WIDTH), dtype=np.float32))
    vectors = np.lib.format.open_memmap(file, "w+", np.float16, (rows, WIDTH))
    starts = range(0, rows, ROWS_AT_ONCE)
    for start in starts:
        count = min(ROWS_AT_ONCE, rows - start)
        vectors[start : start + count] = around(centres, count, dice)
    queries = around(centres, QUERIES, dice)
    scores = np.concatenate([queries @ vectors[s : s + ROWS_AT_ONCE].astype(np.float32).T for s in starts], axis=1)
    np.savez(answers, queries=queries, nearest=np.argsort(-scores, axis=1, kind="stable")[:, :K])


def around(centres: np.ndarray, count: int, dice: np.random.Generator) -> np.ndarray:
    """(count, width) vectors of unit length, each near one of the centres."""
    noise = dice.standard_normal((count, WIDTH), dtype=np.float32) * (SPREAD / WIDTH**0.5)
    return unit(centres[dice.integers(0, len(centres), count)] + noise)


def unit(vectors: np.ndarray) -> np.ndarray:
    """(rows, width), of unit length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def path_of(row: int) -> str:
    """The name of a picture that is made; there is no such file."""
    return f"/fotos/{row // 1000:04d}/IMG_{row:07d}.jpg"


# ---- one index ----


def fill(args: SearchArguments) -> dict[str, Any]:
    """Write the rows, and build what the index needs for so many."""
    where, model = place(args.work, args.rows), args.work / "model"
    shutil.rmtree(where, ignore_errors=True)
    index = PictureIndex.open(where, model=str(model))
    table, digest = index._table, index.model.image_digest
    table.create(WIDTH)
    vectors = np.load(args.work / f"vectors-{args.rows}.npy", mmap_mode="r")

    def write() -> None:
        for start in range(0, args.rows, ROWS_AT_ONCE):
            table.pictures.add(made_rows(vectors[start : start + ROWS_AT_ONCE], start, digest))

    return {
        "written_s": timing.seconds_of(write),
        "optimised_s": timing.seconds_of(
            lambda: table.optimize(WIDTH)
        ),  # compaction, and the approximate index if there is one
        "bytes": sum(path.stat().st_size for path in where.rglob("*") if path.is_file()),
    }


def made_rows(vectors: np.ndarray, start: int, digest: str) -> pa.Table:
    """Rows as `capivara_search.table.schema` has them."""
    numbers, count = range(start, start + len(vectors)), len(vectors)
    columns = {
        "path": [path_of(number) for number in numbers],
        "size": [3_000_000 + number for number in numbers],
        "mtime_ns": [1_600_000_000_000_000_000 + number * 10**9 for number in numbers],
        "digest": [f"{number:032x}" for number in numbers],
        "width": [4000] * count,
        "height": [3000] * count,
        "model": [digest] * count,
        vector_column(WIDTH): pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), WIDTH),
    }
    arrays = [pa.array(columns.get(one.name, [None] * count), one.type) for one in schema(WIDTH)]
    return pa.Table.from_arrays(arrays, schema=schema(WIDTH))


def search_index(args: SearchArguments) -> dict[str, Any]:
    """Time of queries, with and without the text tower; memory; recall; and what it costs to add."""
    known = np.load(args.work / f"answers-{args.rows}.npz")
    index = PictureIndex.open(place(args.work, args.rows), model=str(args.work / "model"))
    found: list[set[str]] = []
    timed = times(lambda query: found.append({hit.path for hit in index.search_vector(query, K)}), known["queries"])
    measured = {"vector_ms": timed, "memory_bytes": timing.peak_resident_bytes()}
    nearest = [{path_of(row) for row in rows} for rows in known["nearest"]]
    measured["recall"] = statistics.mean(len(a & b) / K for a, b in zip(nearest, found[-QUERIES:], strict=True))
    words = [QUERY_WORDS[number % len(QUERY_WORDS)] + f" {number}" for number in range(QUERIES)]
    measured["text_ms"] = times(lambda text: index.search(text, k=K), words)
    page = PageAnswers(index)
    measured["page_ms"] = times(lambda text: page.search(Question(text=text), None), words)
    measured["page_newest_ms"] = times(lambda text: page.search(Question(), None), words[:50])
    index.model.embed_images([PIL.Image.new("RGB", (64, 64))])  # loads the image tower
    first = added(args, index, 1)
    median = statistics.median(added(args, index, 1) for _ in range(args.runs))
    measured["added_s"] = {"1": {"seconds": median, "first_s": first}}
    if args.added > 1:
        measured["added_s"][str(args.added)] = {"seconds": added(args, index, args.added)}
    return measured


def added(args: SearchArguments, index: PictureIndex, count: int) -> float:
    """Seconds to add so many pictures of 640 x 480."""
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((args.work / "photographs").iterdir())[:count]:
            shutil.copy(path, folder)
        seconds = timing.seconds_of(lambda: index.add(folder))
        if (new := index.forget(folder)) != count:
            raise RuntimeError(f"{count} pictures were to be added, {new} were.")
    return seconds


def times(call: Callable[[Any], Any], given: Any) -> dict[str, float]:
    """Median and 95th percentile of milliseconds, after a tenth of the calls that are not counted."""
    for one in given[: len(given) // 10]:
        call(one)
    milliseconds = [1000 * timing.seconds_of(lambda one=one: call(one)) for one in given]
    return {f"p{share}": float(np.percentile(milliseconds, share)) for share in (50, 95)}


if __name__ == "__main__":
    run_command(main)
