"""Measure time and memory of searches among a thousand to a million pictures, and how fast a followed folder updates.

    python -m benchmarks.search --parts index
    python -m benchmarks.search --parts index --sizes 1000 10000 --output /tmp/search.json
    python -m benchmarks.search --parts follow

The indexes contain generated vectors of width 512, in clusters, and all columns except thumbnails. Each index is
measured in a separate process, which has its own peak memory. The text encoder has the full published size and random
weights. `benchmarks/search_follow.py` measures the part `follow`. Results are in benchmarks/results/search.json and
search_follow.json; docs/reference/benchmarks.md shows them.
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

EMBEDDING_WIDTH = 512
CLUSTER_COUNT = 2000
NOISE_SPREAD = 1.0  # expected length of the noise that is added to a cluster center of length 1
QUERY_COUNT, K = 200, 10
WRITE_BATCH_ROWS = 100_000
ADDED_COUNTS = (1, 1000)  # pictures added to an index; 1000 only to the largest one
QUERY_TEXTS = ("um gato dormindo", "cachorro correndo na praia", "bolo de aniversário", "pôr do sol", "rua à noite")


@dataclass
class SearchArguments:
    """Command-line arguments of `benchmarks.search`."""

    parts: Literal["index", "follow"] = flag("index", "What to measure: indexes of all sizes, or a followed folder.")
    sizes: list[int] = flag([1_000, 10_000, 100_000, 1_000_000], "Number of pictures of each index.")
    followed: int = flag(10_000, "Number of photographs in the followed folder, 640 x 480 pixels each.")
    runs: int = flag(5, "Repetitions of short measurements: adding one picture, a new process, a change.")
    work: Path = flag(Path("runs/search"), "Folder for vectors, indexes, photographs and model; about 10 GB.")
    output: Path | None = flag(
        None, "JSON file for the results. Default: search.json or search_follow.json in benchmarks/results."
    )
    worker: Literal["fill", "index"] | None = flag(None, "Fill or measure one index in this process (internal).")
    rows: int = flag(1000, "Number of pictures of the worker's index (internal).")
    added: int = flag(1, "Largest number of pictures to add at once (internal).")


def main(argv: list[str] | None = None) -> None:
    """Run the command: measure the indexes or the followed folder (`--parts`), and print the results as JSON."""
    args = parse_arguments(SearchArguments, __doc__, argv)
    if args.worker:
        timing.report_results({"fill": fill_index, "index": measure_index}[args.worker](args))
        return
    from benchmarks import search_follow  # imported here, because a worker must not load torch

    timing.save_random_model(args.work / "model")
    if args.parts == "index":
        search_follow.make_photos(args.work / "photographs", max(ADDED_COUNTS))
        results = measure_indexes(args) | {"width": EMBEDDING_WIDTH, "k": K, "queries": QUERY_COUNT}
    else:
        results = search_follow.measure_following(args.work, args.followed, args.runs)
    name = "search.json" if args.parts == "index" else "search_follow.json"
    timing.report_results(
        timing.describe_conditions("lancedb") | {"runs": args.runs} | results,
        args.output or timing.RESULTS_FOLDER / name,
    )


def measure_indexes(args: SearchArguments) -> dict[str, Any]:
    """Measure an index of each size, and the first search of a new process on the largest index.

    Args:
        args: Command-line arguments.

    Returns:
        "index": the results of `fill_index` and `measure_index` by number of pictures, and under "approximate" whether
        the index is searched approximately. "first_search_s": the seconds from `time_first_searches`.
    """
    sizes = {}
    for rows in tqdm(args.sizes, desc="Indexes", unit="size"):
        make_vectors(args.work, rows)
        flags = {"rows": rows, "work": args.work, "runs": args.runs, "added": ADDED_COUNTS[rows == max(args.sizes)]}
        filled, measured = (
            timing.run_in_process("benchmarks.search", worker=worker, **flags) for worker in ("fill", "index")
        )
        sizes[str(rows)] = filled | measured | {"approximate": rows > MAX_EXACT_ROWS}
    return {"index": sizes, "first_search_s": time_first_searches(args, max(args.sizes))}


def time_first_searches(args: SearchArguments, rows: int) -> list[float]:
    """Measure how long the command `capivara search` takes, including the start of its process.

    Args:
        args: Command-line arguments: work folder and number of runs.
        rows: Number of pictures of the index to search.

    Returns:
        Seconds of each run, from the start to the end of a new process.

    Raises:
        RuntimeError: If the search finds nothing.
    """
    words = ["search", QUERY_TEXTS[0], "--index", str(index_path(args.work, rows)), "--model", str(args.work / "model")]
    command = [sys.executable, "-m", "capivara_search", *words, "--json"]
    if not json.loads(subprocess.check_output(command)):  # this call also brings the files into the page cache
        raise RuntimeError(f"{' '.join(command)} found nothing.")
    return [timing.time_call(lambda: subprocess.check_output(command)) for _ in range(args.runs)]


# ---- data ----


def index_path(work: Path, rows: int) -> Path:
    """Return the folder of the index that has `rows` rows, inside the work folder `work`."""
    return work / f"index-{rows}.lance"


def make_vectors(work: Path, rows: int) -> None:
    """Generate the vectors of an index and queries, unless their files exist.

    The file `vectors-ROWS.npy` contains float16 vectors of shape (rows, width). The file `answers-ROWS.npz` contains
    "queries" of shape (queries, width) and "nearest", the row numbers of the K most similar vectors of each query.

    Args:
        work: Folder for the files.
        rows: Number of vectors.
    """
    file, answers = work / f"vectors-{rows}.npy", work / f"answers-{rows}.npz"
    if answers.is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    centers = l2_normalize(rng.standard_normal((CLUSTER_COUNT, EMBEDDING_WIDTH), dtype=np.float32))
    vectors = np.lib.format.open_memmap(file, "w+", np.float16, (rows, EMBEDDING_WIDTH))
    starts = range(0, rows, WRITE_BATCH_ROWS)
    for start in starts:
        count = min(WRITE_BATCH_ROWS, rows - start)
        vectors[start : start + count] = sample_near_centers(centers, count, rng)
    queries = sample_near_centers(centers, QUERY_COUNT, rng)
    scores = np.concatenate([queries @ vectors[s : s + WRITE_BATCH_ROWS].astype(np.float32).T for s in starts], axis=1)
    np.savez(answers, queries=queries, nearest=np.argsort(-scores, axis=1, kind="stable")[:, :K])


def sample_near_centers(centers: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Sample unit vectors, each near a random cluster center.

    Args:
        centers: Unit vectors of shape (clusters, width).
        count: Number of vectors.
        rng: Random number generator.

    Returns:
        Vectors of shape (count, width).
    """
    noise = rng.standard_normal((count, EMBEDDING_WIDTH), dtype=np.float32) * (NOISE_SPREAD / EMBEDDING_WIDTH**0.5)
    return l2_normalize(centers[rng.integers(0, len(centers), count)] + noise)


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors of shape (rows, width) to unit length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def picture_path(row: int) -> str:
    """Return the path that is stored in row number `row` of a generated index. No such file exists."""
    return f"/fotos/{row // 1000:04d}/IMG_{row:07d}.jpg"


# ---- measurement of one index ----


def fill_index(args: SearchArguments) -> dict[str, Any]:
    """Create an index of `args.rows` rows and optimize it, as the search would for this number of rows.

    Returns:
        "written_s": seconds to write the rows. "optimised_s": seconds to optimize the index. "bytes": size of the index
        on disk.
    """
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
        # Compaction of the table and, if the table is large, the training of an approximate vector index.
        "optimised_s": timing.time_call(lambda: table.optimize(EMBEDDING_WIDTH)),
        "bytes": sum(path.stat().st_size for path in where.rglob("*") if path.is_file()),
    }


def make_rows(vectors: np.ndarray, start: int, digest: str) -> pa.Table:
    """Build rows with the schema of the search index; columns without a value are null.

    Args:
        vectors: Vectors of shape (rows, width).
        start: Number of the first row.
        digest: Image encoder digest of the model.

    Returns:
        Table with one row for each vector.
    """
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
    arrays = [
        pa.array(columns.get(field.name, [None] * count), field.type) for field in pictures_schema(EMBEDDING_WIDTH)
    ]
    return pa.Table.from_arrays(arrays, schema=pictures_schema(EMBEDDING_WIDTH))


def measure_index(args: SearchArguments) -> dict[str, Any]:
    """Measure the searches of an index, the memory that they need, and the time to add pictures.

    Args:
        args: Command-line arguments: work folder, number of rows of the index, and largest number of pictures to add.

    Returns:
        "vector_ms", "text_ms", "page_ms" and "page_newest_ms": median and 95th percentile of the milliseconds of a
        search by vector, by text, by text through the search page, and of the newest pictures. "memory_bytes": peak
        resident memory after the searches by vector. "recall": fraction (0 to 1) of the exact K nearest rows that a
        search by vector finds. "added_s": by number of added pictures, the seconds to add them.
    """
    answers = np.load(args.work / f"answers-{args.rows}.npz")
    index = PictureIndex.open(index_path(args.work, args.rows), model=str(args.work / "model"))
    hits: list[set[str]] = []

    def search(query: np.ndarray) -> None:
        hits.append({hit.path for hit in index.search_vector(query, K)})

    measured = {"vector_ms": time_calls(search, answers["queries"]), "memory_bytes": timing.peak_resident_bytes()}
    nearest = [{picture_path(row) for row in rows} for rows in answers["nearest"]]
    measured["recall"] = statistics.mean(len(a & b) / K for a, b in zip(nearest, hits[-QUERY_COUNT:], strict=True))
    texts = [f"{QUERY_TEXTS[number % len(QUERY_TEXTS)]} {number}" for number in range(QUERY_COUNT)]
    measured["text_ms"] = time_calls(lambda text: index.search(text, k=K), texts)
    page = PageAnswers(index)
    measured["page_ms"] = time_calls(lambda text: page.search(Question(text=text), None), texts)
    measured["page_newest_ms"] = time_calls(lambda text: page.search(Question(), None), texts[:50])
    index.model.embed_images([PIL.Image.new("RGB", (64, 64))])  # loads the image encoder
    first = time_add(args, index, 1)
    median = statistics.median(time_add(args, index, 1) for _ in range(args.runs))
    measured["added_s"] = {"1": {"seconds": median, "first_s": first}}
    if args.added > 1:
        measured["added_s"][str(args.added)] = {"seconds": time_add(args, index, args.added)}
    return measured


def time_add(args: SearchArguments, index: PictureIndex, count: int) -> float:
    """Add pictures of 640 x 480 pixels to an index, and remove them from the index afterwards.

    Args:
        args: Command-line arguments; the work folder contains the pictures.
        index: The index.
        count: Number of pictures to add.

    Returns:
        Seconds to add the pictures, without the time to remove them.

    Raises:
        RuntimeError: If the number of added pictures is not `count`.
    """
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((args.work / "photographs").iterdir())[:count]:
            shutil.copy(path, folder)
        seconds = timing.time_call(lambda: index.add(folder))
        if (removed := index.forget(folder)) != count:
            raise RuntimeError(f"Expected {count} added pictures, got {removed}.")
    return seconds


def time_calls(call: Callable[[Any], Any], inputs: Any) -> dict[str, float]:
    """Time the calls of a function, after untimed calls with the first tenth of the inputs.

    Args:
        call: Function of one argument.
        inputs: Sequence of arguments; the function is called once with each of them.

    Returns:
        Median ("p50") and 95th percentile ("p95") of the time of a call, in milliseconds.
    """
    for value in inputs[: len(inputs) // 10]:
        call(value)
    milliseconds = [1000 * timing.time_call(lambda value=value: call(value)) for value in inputs]
    return {f"p{share}": float(np.percentile(milliseconds, share)) for share in (50, 95)}


if __name__ == "__main__":
    run_command(main)
