"""Measure the time and memory of searches in indexes of up to a million pictures, and the delay of index updates.

    python -m benchmarks.search --parts index                                # searches in indexes of several sizes
    python -m benchmarks.search --parts index --sizes 1000 10000 --output /tmp/search.json
    python -m benchmarks.search --parts follow                               # an index that follows a folder

The measured indexes have random vectors of width 512. The text encoder has the full published size and random weights.
`--parts follow` measures, for example, how soon a change of a folder is in the index (`capivara app --watch`).

The results are in benchmarks/results/search.json and search_follow.json. docs/reference/benchmarks.md shows them.
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

from benchmarks import tools
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_search import PictureIndex
from capivara_search.page.answers import PageAnswers, Question
from capivara_search.table import MAX_EXACT_ROWS, l2_normalize, pictures_schema, vector_column

EMBEDDING_WIDTH = 512
CLUSTER_COUNT = 2000
NOISE_SPREAD = 1.0  # expected length of the noise vector that is added to a cluster center, which has length 1
QUERY_COUNT, K = 200, 10
WRITE_BATCH_ROWS = 100_000
# Numbers of pictures that one timed call adds to an index. Adding 1000 is measured only with the largest index.
ADDED_COUNTS = (1, 1000)
QUERY_TEXTS = ("um gato dormindo", "cachorro correndo na praia", "bolo de aniversário", "pôr do sol", "rua à noite")


@dataclass
class SearchArguments:
    """Command-line arguments of `benchmarks.search`, which measures searches and updates of a picture index."""

    parts: Literal["index", "follow"] = flag("index", "index: measure searches. follow: measure a watched folder.")
    sizes: list[int] = flag([1_000, 10_000, 100_000, 1_000_000], "Number of pictures of each index.")
    followed: int = flag(10_000, "Number of photographs in the folder of --parts follow, 640 x 480 pixels each.")
    runs: int = flag(
        5,
        "How often each measurement is repeated. --parts index repeats adding a single picture and a search in a new "
        "process. --parts follow repeats each change of the folder and an update without new photographs.",
    )
    work: Path = flag(Path("runs/search"), "Folder for vectors, indexes, photographs and model. Needs about 10 GB.")
    output: Path | None = flag(
        None, "JSON file for the results. Default: search.json or search_follow.json in benchmarks/results."
    )
    worker: Literal["fill", "index"] | None = flag(None, "Internal: a worker process fills or measures one index.")
    rows: int = flag(1000, "Number of pictures in the index of a worker process (internal).")
    added: int = flag(1, "Number of pictures that one call adds to the index (internal).")


def main(argv: list[str] | None = None) -> None:
    """Run the search benchmark, and print and write its results as JSON.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.
    """
    args = parse_arguments(SearchArguments, __doc__, argv)
    if args.worker:
        measure = _measure_index_creation if args.worker == "fill" else _measure_searching_and_adding
        return tools.output_results_as_json(measure(args))
    # Imported here, because it loads torch, which would count in the measured memory of the worker processes above.
    from benchmarks import search_follow

    tools.save_random_model(args.work / "model")
    if args.parts == "index":
        search_follow.write_random_photos(args.work / "photographs", max(ADDED_COUNTS))
        results = _measure_indexes(args) | {"width": EMBEDDING_WIDTH, "k": K, "queries": QUERY_COUNT}
    else:
        results = search_follow.measure_indexing_watching_and_searches(args.work, args.followed, args.runs)
    name = "search.json" if args.parts == "index" else "search_follow.json"
    output = args.output or tools.RESULTS_FOLDER / name
    tools.output_results_with_conditions({"runs": args.runs} | results, output, "lancedb")


def _measure_indexes(args: SearchArguments) -> dict[str, Any]:
    """Measure an index of each size, and the first search of a new process on the largest index.

    Args:
        args: Command-line arguments.

    Returns:
        `{"index": {number of pictures: measurements}, "first_search_s": seconds of each first search}`. The measurement
        "approximate" says whether the index is searched approximately.
    """
    sizes = {}
    for rows in tqdm(args.sizes, desc="Indexes", unit="size"):
        write_random_vectors_and_queries(args.work, rows)
        flags = {"rows": rows, "work": args.work, "runs": args.runs, "added": ADDED_COUNTS[rows == max(args.sizes)]}
        # Separate processes, so that the peak memory of each index is known.
        filled = tools.run_module_in_subprocess("benchmarks.search", worker="fill", **flags)
        measured = tools.run_module_in_subprocess("benchmarks.search", worker="index", **flags)
        sizes[str(rows)] = filled | measured | {"approximate": rows > MAX_EXACT_ROWS}
    return {"index": sizes, "first_search_s": _time_search_commands(args, max(args.sizes))}


def _time_search_commands(args: SearchArguments, rows: int) -> list[float]:
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
    # This untimed call checks that the search works. It also fills the operating system's file cache, so that no timed
    # call is slower because of an empty cache.
    if not json.loads(subprocess.check_output(command)):
        raise RuntimeError(f"{' '.join(command)} found no picture. Run the benchmark again with a new --work folder.")
    return [tools.time_call(lambda: subprocess.check_output(command)) for _ in range(args.runs)]


# ---- data ----


def index_path(work: Path, rows: int) -> Path:
    """Return the path of the generated index with `rows` pictures. The index is a folder inside the work folder."""
    return work / f"index-{rows}.lance"


def write_random_vectors_and_queries(work: Path, rows: int) -> None:
    """Generate random image vectors and search queries with exact answers, unless their files exist.

    Two files are written:

    - `vectors-ROWS.npy`: float16 vectors of shape (rows, width).
    - `answers-ROWS.npz`: `{"queries": vectors of shape (queries, width), "nearest": row numbers of the K vectors most
      similar to each query, of shape (queries, K)}`.

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
        vectors[start : start + count] = _sample_near_centers(centers, count, rng)
    queries = _sample_near_centers(centers, QUERY_COUNT, rng)
    scores = np.concatenate([queries @ vectors[s : s + WRITE_BATCH_ROWS].astype(np.float32).T for s in starts], axis=1)
    np.savez(answers, queries=queries, nearest=np.argsort(-scores, axis=1, kind="stable")[:, :K])


def _sample_near_centers(centers: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
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


def picture_path(row: int) -> str:
    """Return the made-up file path of picture number `row` in a generated index. No such file exists."""
    return f"/fotos/{row // 1000:04d}/IMG_{row:07d}.jpg"


# ---- measurement of one index ----


def _measure_index_creation(args: SearchArguments) -> dict[str, Any]:
    """Create an index of `args.rows` rows and optimize it, as the search would for this number of rows.

    Returns:
        `{"written_s": seconds to write the rows, "optimised_s": seconds to optimize the index, "bytes": size of the
        index on disk}`.
    """
    where = index_path(args.work, args.rows)
    shutil.rmtree(where, ignore_errors=True)
    index = PictureIndex.open(where, model=str(args.work / "model"))
    table, digest = index._table, index.model.image_digest
    table.create(EMBEDDING_WIDTH)
    vectors = np.load(args.work / f"vectors-{args.rows}.npy", mmap_mode="r")

    def write() -> None:
        for start in range(0, args.rows, WRITE_BATCH_ROWS):
            table.pictures.add(build_picture_rows(vectors[start : start + WRITE_BATCH_ROWS], start, digest))

    return {
        "written_s": tools.time_call(write),
        # `optimize` compacts the table and, if the table is large, trains an approximate vector index.
        "optimised_s": tools.time_call(lambda: table.optimize(EMBEDDING_WIDTH)),
        "bytes": table.bytes(),
    }


def build_picture_rows(vectors: np.ndarray, start: int, digest: str) -> pa.Table:
    """Build rows for the table of a search index from random vectors, without any image files.

    Args:
        vectors: Image vectors of shape (rows, width).
        start: Index of the first row. The made-up path, size and date of each picture depend on it.
        digest: Digest of the image encoder, for the column `model`.

    Returns:
        Arrow table with the schema of the search index and one row for each vector. Columns without a value are null.
    """
    numbers, count, schema = range(start, start + len(vectors)), len(vectors), pictures_schema(EMBEDDING_WIDTH)
    # The rows have no thumbnails, colors or EXIF data.
    columns = dict.fromkeys(schema.names, [None] * count) | {
        "path": [picture_path(number) for number in numbers],
        "size": [3_000_000 + number for number in numbers],
        "mtime_ns": [1_600_000_000_000_000_000 + number * 10**9 for number in numbers],
        "digest": [f"{number:032x}" for number in numbers],
        "width": [4000] * count,
        "height": [3000] * count,
        "model": [digest] * count,
        vector_column(EMBEDDING_WIDTH): pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), EMBEDDING_WIDTH),
    }
    return pa.Table.from_pydict(columns, schema)


def _measure_searching_and_adding(args: SearchArguments) -> dict[str, Any]:
    """Measure the searches of an index, the memory that they need, and the time to add pictures.

    Args:
        args: Command-line arguments: work folder, number of rows of the index, and largest number of pictures to add.

    Returns:
        A dict with these keys. Times of searches are results of `_measure_latency_percentiles`.

        - "vector_ms" and "text_ms": time of a search by vector and by text. The latter includes embedding the text.
        - "page_ms": time of a search by text as the search page makes it.
        - "page_newest_ms": time in which the search page finds the newest pictures.
        - "memory_bytes": peak resident memory after the searches by vector.
        - "recall": fraction (0 to 1) of the exact K nearest rows that a search by vector finds.
        - "added_s": `{number of added pictures: {"seconds": time}}`. A single picture is added several times: "seconds"
          is the median, and "first_s" the first time.
    """
    answers = np.load(args.work / f"answers-{args.rows}.npz")
    index = PictureIndex.open(index_path(args.work, args.rows), model=str(args.work / "model"))
    hits: list[set[str]] = []

    def search(query: np.ndarray) -> None:
        hits.append({hit.path for hit in index.search_vector(query, K)})

    measured = {"vector_ms": _measure_latency_percentiles(search, answers["queries"])}
    measured["memory_bytes"] = tools.peak_resident_bytes()
    nearest = [{picture_path(row) for row in rows} for rows in answers["nearest"]]
    measured["recall"] = statistics.mean(len(a & b) / K for a, b in zip(nearest, hits[-QUERY_COUNT:], strict=True))
    texts = [f"{QUERY_TEXTS[number % len(QUERY_TEXTS)]} {number}" for number in range(QUERY_COUNT)]
    measured["text_ms"] = _measure_latency_percentiles(lambda text: index.search(text, k=K), texts)
    page = PageAnswers(index, is_local=True)
    measured["page_ms"] = _measure_latency_percentiles(lambda text: page.search(Question(text=text), None), texts)
    measured["page_newest_ms"] = _measure_latency_percentiles(lambda text: page.search(Question(), None), texts[:50])
    index.model.embed_images([PIL.Image.new("RGB", (64, 64))])  # untimed: loads the image encoder
    first = _time_adding_pictures(args, index, 1)
    median = statistics.median(_time_adding_pictures(args, index, 1) for _ in range(args.runs))
    measured["added_s"] = {"1": {"seconds": median, "first_s": first}}
    if args.added > 1:
        measured["added_s"][str(args.added)] = {"seconds": _time_adding_pictures(args, index, args.added)}
    return measured


def _time_adding_pictures(args: SearchArguments, index: PictureIndex, count: int) -> float:
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
        seconds = tools.time_call(lambda: index.add(folder))
        if (removed := index.forget(folder)) != count:
            raise RuntimeError(f"Expected to add {count} pictures to the index, but {removed} were added.")
    return seconds


def _measure_latency_percentiles(call: Callable[[Any], Any], inputs: Any) -> dict[str, float]:
    """Time the calls of a function, after untimed calls with the first tenth of the inputs.

    Args:
        call: Function of one argument.
        inputs: Sequence of arguments; the function is called once with each of them.

    Returns:
        Median ("p50") and 95th percentile ("p95") of the time of a call, in milliseconds.
    """
    for value in inputs[: len(inputs) // 10]:
        call(value)
    milliseconds = [1000 * tools.time_call(lambda value=value: call(value)) for value in inputs]
    return {f"p{share}": float(np.percentile(milliseconds, share)) for share in (50, 95)}


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
