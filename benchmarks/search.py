"""The index at a thousand to a million pictures, beside faiss, and photographs a second.

    python -m benchmarks.search
    python -m benchmarks.search --sizes 1000 10000 --parts index peers --output /tmp/search.json
    python -m benchmarks.search --parts follow --output benchmarks/results/search_follow.json

Vectors of 512 numbers are made, in clusters; their rows have all columns but a thumbnail. Every figure of a program is
that of a process of its own, so that its peak of memory is its own. The text tower is of the full published size, with
random weights. Photographs are made and taken in by `benchmarks/search_photos.py`. The part `follow`, of a folder that
is kept up to date, is `benchmarks/search_follow.py`. The last line of the output is JSON, kept in
benchmarks/results/search.json; docs/benchmarks.md shows it.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
from tqdm.auto import tqdm

from benchmarks.timing import RESULTS, conditions, finish, in_own_process, peak_memory_bytes, save_random_model
from capivara_common.cli import flag, parse, run_command
from capivara_common.files import read_json, write_json
from capivara_search import PictureIndex
from capivara_search.page.answers import Answers, Question
from capivara_search.table import EXACT_ROWS
from capivara_search.table_columns import schema, vector_column

WIDTH, CLUSTERS, SPREAD = 512, 2000, 1.0  # numbers of a vector; clusters; noise beside a centre of length 1
QUERIES, K = 200, 10
ROWS_AT_ONCE = 100_000
ADDED = (1, 1000)  # pictures
QUERY_WORDS = ("um gato dormindo", "cachorro correndo na praia", "bolo de aniversário", "pôr do sol", "rua à noite")
PACKAGES, PEERS = ("lancedb", "faiss-cpu"), ("faiss_flat", "faiss_ivfpq")
LISTS, CODES, PROBES = 4096, 64, 64  # of faiss's IVF-PQ, as its guidelines have them for a million
PHOTO_PROGRAMS = ("open_clip", "index", "index_exact")


@dataclass
class SearchArguments:
    """Arguments of `benchmarks.search`."""

    sizes: list[int] = flag([1_000, 10_000, 100_000, 1_000_000], "Pictures of the indexes.")
    photographs: int = flag(2000, "Photographs of 12 megapixels.")
    parts: list[str] = flag(["index", "peers", "photographs"], "Parts to measure; the file keeps the others.")
    followed: int = flag(10_000, "Photographs, of 640 x 480, of the folder that is followed.")
    runs: int = flag(5, "Parts of the photographs, in which the programs take turns; runs of a new process.")
    work: Path = flag(Path("runs/search"), "Folder of vectors, indexes, photographs and model; some 10 GB.")
    output: Path = flag(RESULTS / "search.json", "JSON file.")
    worker: str | None = flag(None, "Measure one program, in this process.")
    rows: int = flag(1000, "Pictures (worker).")
    first: int = flag(0, "Number of the first photograph (worker).")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(SearchArguments, __doc__, argv)
    if args.worker:
        finish(WORKERS[args.worker](args))
        return
    from benchmarks.search_photos import SMALL, make_photos  # here: a worker of the index does without torch

    save_random_model(args.work / "model")
    if "index" in args.parts:
        make_photos(args.work / "small", max(ADDED), SMALL)
    results = read_json(args.output) if args.output.is_file() else {}
    results |= {**conditions(), "width": WIDTH, "k": K, "queries": QUERIES, "runs": args.runs}
    results["versions"] |= {name: metadata.version(name) for name in PACKAGES}
    for part in args.parts:  # a part that is measured later keeps the others of the file
        results |= json.loads(json.dumps(PARTS[part](args)))
        write_json(args.output, results)
    finish(results, args.output)


def index_part(args: SearchArguments) -> dict[str, Any]:
    """Our index at all sizes, and the first search of a new process at the largest."""
    sizes = {}
    for rows in tqdm(args.sizes, desc="Indexes", unit="size"):
        make_vectors(args.work, rows)
        found = own(args, "fill", rows) | own(args, "index", rows)
        sizes[str(rows)] = found | {"approximate": rows > EXACT_ROWS}
    return {"index": sizes, "first_search_s": first_searches(args, max(args.sizes))}


def peers_part(args: SearchArguments) -> dict[str, Any]:
    """All peers at the largest size."""
    rows = max(args.sizes)
    make_vectors(args.work, rows)
    peers = {}
    for name in tqdm(PEERS, desc="Peers", unit="program"):
        (args.work / f"{name}.faiss").unlink(missing_ok=True)
        peers[name] = own(args, name, rows)
        peers[name] |= own(args, name, rows)  # searched in another process, whose memory is that of searching
    return {"peers": peers, "peer_rows": rows}


def photographs_part(args: SearchArguments) -> dict[str, Any]:
    """Photographs into an index, and by open_clip's loop, in turns, each time the next ones; and how near ours are.

    With the machine, which may be another one than that of the other parts.
    """
    from benchmarks.search_photos import LARGE, make_photos, photo_path

    photos, count = args.work / "photos", args.photographs // args.runs
    make_photos(photos, args.photographs)
    seconds: dict[str, list[float]] = {name: [] for name in PHOTO_PROGRAMS}
    cosines: dict[str, list[float]] = {name: [] for name in PHOTO_PROGRAMS[1:]}
    for run in tqdm(range(args.runs), desc="Photographs", unit="run"):
        for name in PHOTO_PROGRAMS if run == 0 else PHOTO_PROGRAMS[:2]:  # once is enough to see what --exact costs
            seconds[name].append(own(args, f"photos_{name}", count, run * count)["seconds"])
            if name in cosines:
                ours, theirs = (np.load(args.work / f"photos_{one}.npy") for one in (name, PHOTO_PROGRAMS[0]))
                cosines[name] += (ours * theirs).sum(axis=1).tolist()
    sizes = [photo_path(photos, number).stat().st_size for number in range(args.photographs)]
    found = {
        "photographs": args.photographs, "photographs_a_run": count, "megapixels": LARGE[0] * LARGE[1] / 1e6,
        "megabytes_each": statistics.mean(sizes) / 1e6, "seconds": seconds,
        "cosine_to_open_clip": {n: {"lowest": min(c), "mean": statistics.mean(c)} for n, c in cosines.items()},
    }  # fmt: skip
    return {"photographs": conditions() | found}


def follow_part(args: SearchArguments) -> dict[str, Any]:
    """A folder that is indexed, followed and asked about."""
    from benchmarks.search_follow import measure

    return measure(args.work, args.followed, args.runs)


PARTS = {"index": index_part, "peers": peers_part, "photographs": photographs_part, "follow": follow_part}


def own(args: SearchArguments, worker: str, rows: int, first: int = 0) -> dict[str, Any]:
    """What a worker measures, in a process of its own."""
    numbers = ["--rows", str(rows), "--first", str(first), "--sizes", *map(str, args.sizes)]
    return in_own_process(["benchmarks.search", "--worker", worker, "--work", str(args.work), *numbers])


def first_searches(args: SearchArguments, rows: int) -> list[float]:
    """Seconds of `capivara search` in a new process, from its start to its end."""
    words = ["search", QUERY_WORDS[0], "--index", str(place(args.work, rows)), "--model", str(args.work / "model")]
    command, seconds = [sys.executable, "-m", "capivara_search", *words, "--json"], []
    for _ in range(args.runs + 1):  # the first reads the files from the disk
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        if not json.loads(done.stdout):
            raise RuntimeError(f"{' '.join(command)} has found nothing.")
    return seconds[1:]


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
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        vectors[start : start + count] = around(centres, count, dice)
    queries = around(centres, QUERIES, dice)
    scores = np.concatenate(
        [queries @ vectors[s : s + ROWS_AT_ONCE].astype(np.float32).T for s in range(0, rows, ROWS_AT_ONCE)], axis=1
    )
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


def answers(work: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries (queries, width), and the rows that are nearest to them (queries, K)."""
    found = np.load(work / f"answers-{rows}.npz")
    return found["queries"], found["nearest"]


# ---- ours ----


def fill(args: SearchArguments) -> dict[str, Any]:
    """Write the rows, and build what the index needs for so many."""
    where, model = place(args.work, args.rows), args.work / "model"
    shutil.rmtree(where, ignore_errors=True)
    index = PictureIndex.open(where, model=str(model))
    table, digest = index._table, index.model.image_digest
    table.create(WIDTH)
    vectors, started = np.load(args.work / f"vectors-{args.rows}.npy", mmap_mode="r"), time.perf_counter()
    for start in range(0, args.rows, ROWS_AT_ONCE):
        table.pictures.add(made_rows(vectors[start : start + ROWS_AT_ONCE], start, digest))
    written = time.perf_counter()
    table.tidy(WIDTH)
    return {
        "written_s": written - started,
        "optimised_s": time.perf_counter() - written,  # compaction, and the approximate index where there is one
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
    arrays = [
        pa.array(columns[one.name], one.type) if one.name in columns else pa.nulls(count, one.type)
        for one in schema(WIDTH)
    ]
    return pa.Table.from_arrays(arrays, schema=schema(WIDTH))


def search_index(args: SearchArguments) -> dict[str, Any]:
    """Time of queries, with and without the text tower; memory; recall; and what it costs to add."""
    queries, nearest = answers(args.work, args.rows)
    index = PictureIndex.open(place(args.work, args.rows), model=str(args.work / "model"))
    found: list[list[str]] = []
    timed = times(lambda query: found.append([hit.path for hit in index.search_vector(query, K)]), queries)
    measured = {"vector_ms": timed, "memory_bytes": peak_memory_bytes()}
    expected = [[path_of(row) for row in rows] for rows in nearest]
    measured["recall"] = recall(found[-QUERIES:], expected)
    words = [QUERY_WORDS[number % len(QUERY_WORDS)] + f" {number}" for number in range(QUERIES)]
    measured["text_ms"] = times(lambda text: index.search(text, k=K), words)
    page = Answers(index)
    measured["page_ms"] = times(lambda text: page.search(Question(text=text), None), words)
    measured["page_newest_ms"] = times(lambda text: page.search(Question(), None), words[:50])
    measured["memory_with_text_tower_bytes"] = peak_memory_bytes()
    counts = ADDED if args.rows == max(args.sizes) else ADDED[:1]
    index.model.images([PIL.Image.new("RGB", (64, 64))])  # loads the image tower
    measured["added_s"] = {count: {"seconds": added(args, index, count)} for count in counts}
    first = measured["added_s"][1]["seconds"]
    median = statistics.median(added(args, index, 1) for _ in range(args.runs))
    measured["added_s"][1] = {"seconds": median, "first_s": first}
    return measured


def added(args: SearchArguments, index: PictureIndex, count: int) -> float:
    """Seconds to add so many pictures of 640 x 480."""
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((args.work / "small").rglob("*.jpg"))[:count]:
            shutil.copy(path, folder)
        started = time.perf_counter()
        result = index.add(folder)
        seconds = time.perf_counter() - started
        index.forget(folder)
        if result.new != count:
            raise RuntimeError(f"{count} pictures were to be added, {result.new} were.")
    return seconds


def times(call: Callable[[Any], Any], given: Any) -> dict[str, float]:
    """Median and 95th percentile of milliseconds, after a tenth of the calls that are not counted."""
    for one in given[: len(given) // 10]:
        call(one)
    seconds = []
    for one in given:
        started = time.perf_counter()
        call(one)
        seconds.append(1000 * (time.perf_counter() - started))
    return {"p50": statistics.median(seconds), "p95": float(np.percentile(seconds, 95))}


def recall(found: list[list[Any]], nearest: list[list[Any]]) -> float:
    """Mean share of the K nearest rows that were found."""
    return statistics.mean(len(set(a) & set(b)) / K for a, b in zip(found, nearest, strict=True))


# ---- peers ----


def faiss_peer(args: SearchArguments) -> dict[str, Any]:
    """faiss, on all cores: compare all, or by lists of product-quantised vectors. Built where its file is missing."""
    import faiss

    file = args.work / f"{args.worker}.faiss"
    if not file.is_file():
        vectors = np.load(args.work / f"vectors-{args.rows}.npy").astype(np.float32)
        started = time.perf_counter()
        if args.worker == "faiss_flat":
            index = faiss.IndexFlatIP(WIDTH)
        else:
            lists = min(LISTS, max(1, args.rows // 40))
            index = faiss.index_factory(WIDTH, f"IVF{lists},PQ{CODES}", faiss.METRIC_INNER_PRODUCT)
            index.train(vectors[: 50 * lists])
            index.nprobe = PROBES
        index.add(vectors)
        built = time.perf_counter() - started
        faiss.write_index(index, str(file))
        return {"built_s": built, "bytes": file.stat().st_size}
    index, (queries, nearest) = faiss.read_index(str(file)), answers(args.work, args.rows)
    found: list[list[int]] = []
    timed = times(lambda query: found.append(index.search(query[None], K)[1][0].tolist()), queries)
    measured = {"vector_ms": timed, "recall": recall(found[-QUERIES:], nearest.tolist())}
    return measured | {"memory_bytes": peak_memory_bytes()}


def take_in(args: SearchArguments) -> dict[str, Any]:
    """Photographs by one of the programs; their embeddings go into a file of the worker's name."""
    from benchmarks.search_photos import PROGRAMS, photo_path

    paths = [photo_path(args.work / "photos", number) for number in range(args.first, args.first + args.rows)]
    seconds, embeds = PROGRAMS[args.worker.removeprefix("photos_")](paths, args.work / "model")
    np.save(args.work / f"{args.worker}.npy", embeds)
    return {"seconds": seconds}


WORKERS = {"fill": fill, "index": search_index, **dict.fromkeys(PEERS, faiss_peer)}
WORKERS |= dict.fromkeys((f"photos_{name}" for name in PHOTO_PROGRAMS), take_in)

if __name__ == "__main__":
    run_command(main)
