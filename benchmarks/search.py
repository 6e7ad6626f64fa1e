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
from capivara_search.table import MAX_EXACT_ROWS, pictures_schema, vector_column

EMBEDDING_WIDTH, CLUSTER_COUNT, NOISE_SPREAD = (
    512,
    2000,
    1.0,
)  # numbers of a vector; clusters; noise beside a centre of length 1
QUERY_COUNT, K = 200, 10
WRITE_BATCH_ROWS = 100_000
ADDED_COUNTS = (1, 1000)  # pictures; a thousand to the largest index alone
QUERY_TEXTS = ("um gato dormindo", "cachorro correndo na praia", "bolo de aniversário", "pôr do sol", "rua à noite")


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
        timing.write_results({"fill": fill_index, "index": measure_index}[args.worker](args))
        return
    from benchmarks import search_follow  # here: a worker does without torch

    timing.save_random_model(args.work / "model")
    if args.parts == "index":
        search_follow.make_photos(args.work / "photographs", max(ADDED_COUNTS))
        found = measure_indexes(args) | {"width": EMBEDDING_WIDTH, "k": K, "queries": QUERY_COUNT}
    else:
        found = search_follow.measure_following(args.work, args.followed, args.runs)
    name = "search.json" if args.parts == "index" else "search_follow.json"
    timing.write_results(
        timing.describe_conditions("lancedb") | {"runs": args.runs} | found, args.output or timing.RESULTS_FOLDER / name
    )


def measure_indexes(args: SearchArguments) -> dict[str, Any]:
    """Our index at all sizes, and the first search of a new process at the largest."""
    sizes = {}
    for rows in tqdm(args.sizes, desc="Indexes", unit="size"):
        make_vectors(args.work, rows)
        flags = {"rows": rows, "work": args.work, "runs": args.runs, "added": ADDED_COUNTS[rows == max(args.sizes)]}
        found = [timing.run_in_process("benchmarks.search", worker=name, **flags) for name in ("fill", "index")]
        sizes[str(rows)] = found[0] | found[1] | {"approximate": rows > MAX_EXACT_ROWS}
    return {"index": sizes, "first_search_s": time_first_searches(args, max(args.sizes))}


def time_first_searches(args: SearchArguments, rows: int) -> list[float]:
    """Seconds of `capivara search` in a new process, from its start to its end."""
    words = ["search", QUERY_TEXTS[0], "--index", str(index_path(args.work, rows)), "--model", str(args.work / "model")]
    command = [sys.executable, "-m", "capivara_search", *words, "--json"]
    if not json.loads(subprocess.check_output(command)):  # which also reads the files from the disk
        raise RuntimeError(f"{' '.join(command)} has found nothing.")
    return [timing.time_call(lambda: subprocess.check_output(command)) for _ in range(args.runs)]


# ---- what is searched ----


def index_path(work: Path, rows: int) -> Path:
    """The index of so many pictures."""
    return work / f"index-{rows}.lance"


def make_vectors(work: Path, rows: int) -> None:
    """Vectors, float16, in files: `vectors-ROWS.npy`; queries, and the rows that are nearest to each by float32."""
    file, answers = work / f"vectors-{rows}.npy", work / f"answers-{rows}.npz"
    if answers.is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    dice = np.random.default_rng(0)
    centres = l2_normalize(dice.standard_normal((CLUSTER_COUNT, EMBEDDING_WIDTH), dtype=np.float32))
    vectors = np.lib.format.open_memmap(file, "w+", np.float16, (rows, EMBEDDING_WIDTH))
    starts = range(0, rows, WRITE_BATCH_ROWS)
    for start in starts:
        count = min(WRITE_BATCH_ROWS, rows - start)
        vectors[start : start + count] = sample_near_centers(centres, count, dice)
    queries = sample_near_centers(centres, QUERY_COUNT, dice)
    scores = np.concatenate([queries @ vectors[s : s + WRITE_BATCH_ROWS].astype(np.float32).T for s in starts], axis=1)
    np.savez(answers, queries=queries, nearest=np.argsort(-scores, axis=1, kind="stable")[:, :K])


def sample_near_centers(centers: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, width) vectors of unit length, each near one of the centres."""
    noise = rng.standard_normal((count, EMBEDDING_WIDTH), dtype=np.float32) * (NOISE_SPREAD / EMBEDDING_WIDTH**0.5)
    return l2_normalize(centers[rng.integers(0, len(centers), count)] + noise)


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
    """(rows, width), of unit length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def picture_path(row: int) -> str:
    """The name of a picture that is made; there is no such file."""
    return f"/fotos/{row // 1000:04d}/IMG_{row:07d}.jpg"


# ---- one index ----


def fill_index(args: SearchArguments) -> dict[str, Any]:
    """Write the rows, and build what the index needs for so many."""
    where, model = index_path(args.work, args.rows), args.work / "model"
    shutil.rmtree(where, ignore_errors=True)
    index = PictureIndex.open(where, model=str(model))
    table, digest = index._table, index.model.image_digest
    table.create(EMBEDDING_WIDTH)
    vectors = np.load(args.work / f"vectors-{args.rows}.npy", mmap_mode="r")

    def write() -> None:
        for start in range(0, args.rows, WRITE_BATCH_ROWS):
            table.pictures.add(make_rows(vectors[start : start + WRITE_BATCH_ROWS], start, digest))

    return {
        "written_s": timing.time_call(write),
        "optimised_s": timing.time_call(
            lambda: table.optimize(EMBEDDING_WIDTH)
        ),  # compaction, and the approximate index if there is one
        "bytes": sum(path.stat().st_size for path in where.rglob("*") if path.is_file()),
    }


def make_rows(vectors: np.ndarray, start: int, digest: str) -> pa.Table:
    """Rows as `capivara_search.table.pictures_schema` has them."""
    numbers, count = range(start, start + len(vectors)), len(vectors)
    columns = {
        "path": [picture_path(number) for number in numbers],
        "size": [3_000_000 + number for number in numbers],
        "mtime_ns": [1_600_000_000_000_000_000 + number * 10**9 for number in numbers],
        "digest": [f"{number:032x}" for number in numbers],
        "width": [4000] * count,
        "height": [3000] * count,
        "model": [digest] * count,
        vector_column(EMBEDDING_WIDTH): pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), EMBEDDING_WIDTH
        ),
    }
    arrays = [pa.array(columns.get(one.name, [None] * count), one.type) for one in pictures_schema(EMBEDDING_WIDTH)]
    return pa.Table.from_arrays(arrays, schema=pictures_schema(EMBEDDING_WIDTH))


def measure_index(args: SearchArguments) -> dict[str, Any]:
    """Time of queries, with and without the text tower; memory; recall; and what it costs to add."""
    known = np.load(args.work / f"answers-{args.rows}.npz")
    index = PictureIndex.open(index_path(args.work, args.rows), model=str(args.work / "model"))
    found: list[set[str]] = []
    timed = time_calls(
        lambda query: found.append({hit.path for hit in index.search_vector(query, K)}), known["queries"]
    )
    measured = {"vector_ms": timed, "memory_bytes": timing.peak_resident_bytes()}
    nearest = [{picture_path(row) for row in rows} for rows in known["nearest"]]
    measured["recall"] = statistics.mean(len(a & b) / K for a, b in zip(nearest, found[-QUERY_COUNT:], strict=True))
    words = [QUERY_TEXTS[number % len(QUERY_TEXTS)] + f" {number}" for number in range(QUERY_COUNT)]
    measured["text_ms"] = time_calls(lambda text: index.search(text, k=K), words)
    page = PageAnswers(index)
    measured["page_ms"] = time_calls(lambda text: page.search(Question(text=text), None), words)
    measured["page_newest_ms"] = time_calls(lambda text: page.search(Question(), None), words[:50])
    index.model.embed_images([PIL.Image.new("RGB", (64, 64))])  # loads the image tower
    first = time_add(args, index, 1)
    median = statistics.median(time_add(args, index, 1) for _ in range(args.runs))
    measured["added_s"] = {"1": {"seconds": median, "first_s": first}}
    if args.added > 1:
        measured["added_s"][str(args.added)] = {"seconds": time_add(args, index, args.added)}
    return measured


def time_add(args: SearchArguments, index: PictureIndex, count: int) -> float:
    """Seconds to add so many pictures of 640 x 480."""
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((args.work / "photographs").iterdir())[:count]:
            shutil.copy(path, folder)
        seconds = timing.time_call(lambda: index.add(folder))
        if (new := index.forget(folder)) != count:
            raise RuntimeError(f"{count} pictures were to be added, {new} were.")
    return seconds


def time_calls(call: Callable[[Any], Any], inputs: Any) -> dict[str, float]:
    """Median and 95th percentile of milliseconds, after a tenth of the calls that are not counted."""
    for one in inputs[: len(inputs) // 10]:
        call(one)
    milliseconds = [1000 * timing.time_call(lambda one=one: call(one)) for one in inputs]
    return {f"p{share}": float(np.percentile(milliseconds, share)) for share in (50, 95)}


if __name__ == "__main__":
    run_command(main)
