"""Measure the memory and the start-up time of a training on a large dataset of precomputed image embeddings.

    python -m benchmarks.embedded_training
    python -m benchmarks.embedded_training --rows 100000 --work /tmp/embedded

The benchmark shows whether memory grows with the dataset. It writes a small and a large dataset of random image
embeddings, and trains a full-size model with random weights for a few steps on each. A second training on the large
dataset measures a start with full caches.

Memory-mapped files are not counted. Requires Linux.
"""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features, List, Value
from tqdm.auto import tqdm

import train_accelerate
from benchmarks import tools
from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import read_json, write_json
from caption_data import embedded
from modeling_capivara.loading import load_transformers_config
from modeling_capivara.two_towers import embedding_width
from training.loop import TrainingLoop

CAPTIONS_PER_ROW = 10
ROWS_PER_FILE = 50_000
EVALUATION_ROWS = 64  # number of rows in each of the splits validation and test
SAMPLE_INTERVAL_S = 0.1  # seconds between two readings of the memory that the training processes use
# Number of random texts. Each caption joins two of them, so that 100 million different captions are possible although
# few texts are generated.
HALF_CAPTIONS = 10_000
TRAINING_FLAGS = "--effective_batch_size 16 --micro_batch_size 8 --warmup_steps 0 --caption_strategy none"


@dataclass
class EmbeddedTrainingArguments:
    """Command-line arguments of `benchmarks.embedded_training`: speed and memory of training on image embeddings."""

    rows: int = flag(3_300_000, "Rows of the large dataset.")
    small_rows: int = flag(10_000, "Rows of the small dataset, to compare the memory with that of the large dataset.")
    steps: int = flag(3, "Optimizer steps of each run.")
    work: Path = flag(Path("runs/embedded_training"), "Folder for datasets, caches and runs. Needs 25 GB by default.")
    keep: bool = flag(False, "Keep the work folder. By default, it is removed at the end.")
    output: Path = flag(tools.RESULTS_FOLDER / "embedded_training.json", "JSON file for the results.")
    worker: Path | None = flag(None, "Dataset to train on in this process (internal).")

    def __post_init__(self) -> None:
        check_at_least(self, 100, "rows", "small_rows")
        check_at_least(self, 1, "steps")


def _write_random_embeddings_dataset(folder: Path, rows: int, width: int, encoder: str) -> None:
    """Write a dataset of random image embeddings in the format of `captions.embed`, unless the folder exists.

    Args:
        folder: Folder of the dataset.
        rows: Rows of the split train.
        width: Width of the embeddings.
        encoder: Digest of the image encoder that the embeddings pretend to come from, stored in every row.
    """
    if folder.is_dir():
        return
    text = Value("string")
    types = {"captions-pt": List(text), embedded.EMBEDS_COLUMN: embedded.embeds_feature(width)}
    features = Features(types | {embedded.DIGEST_COLUMN: text, embedded.ENCODER_COLUMN: text})
    halves, rng = pa.array(tools.make_captions(HALF_CAPTIONS, words=9)), np.random.default_rng(0)
    sizes = [min(ROWS_PER_FILE, rows - start) for start in range(0, rows, ROWS_PER_FILE)]
    files = [("train", size) for size in sizes] + [(name, EVALUATION_ROWS) for name in ("validation", "test")]
    temporary = folder.with_name(folder.name + ".new")
    (temporary / "data").mkdir(parents=True, exist_ok=True)
    for number, (split, size) in enumerate(tqdm(files, desc=f"Writing {rows:,} rows", unit="file")):
        vectors = rng.standard_normal((size, width), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        first, second = (halves.take(rng.integers(HALF_CAPTIONS, size=size * CAPTIONS_PER_ROW)) for _ in range(2))
        ends = np.arange(size + 1, dtype=np.int32) * CAPTIONS_PER_ROW
        columns = [
            pa.ListArray.from_arrays(ends, pc.binary_join_element_wise(first, second, " ")),
            pa.FixedSizeListArray.from_arrays(vectors.astype(np.float16).ravel(), width),
            [f"{number:016x}{row:016x}" for row in range(size)],
            [encoder] * size,
        ]
        table = pa.table(columns, names=list(features)).cast(features.arrow_schema)
        pq.write_table(table, temporary / "data" / f"{split}-{number:05d}.parquet", row_group_size=1000)
    temporary.rename(folder)


def _sum_anonymous_memory_of_process_tree(process: psutil.Process) -> int:
    """Return the anonymous memory (`RssAnon`) of a process and all its descendants in bytes."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        # A process may end after it was listed. Its memory then counts as 0.
        with suppress(psutil.NoSuchProcess):
            memory = member.memory_info()
            # Without shared memory, so that memory-mapped files do not count.
            total += memory.rss - memory.shared
    return total


def _measure_training_in_subprocess(args: EmbeddedTrainingArguments, dataset: Path, name: str) -> dict[str, float]:
    """Train on a dataset in a separate process, and sample its memory.

    Args:
        args: Arguments of the benchmark.
        dataset: Folder of the dataset.
        name: Name of the run's folder and log file in the work folder.

    Returns:
        `{"peak_anonymous_bytes": largest sampled memory, "first_step_s": seconds from the start of the process to the
        start of the first optimizer step, "seconds": duration of the process, "step_s": mean duration of a step}`.

    Raises:
        RuntimeError: If the process fails. The message names its log file.
    """
    folder, log = args.work / name, args.work / f"{name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    flags = {"worker": dataset, "work": folder, "steps": args.steps}
    words = [f"--{key}={value}" for key, value in flags.items()]
    command = [sys.executable, "-m", "benchmarks.embedded_training", *words]
    caches = {"CAPIVARA_CACHE": args.work / "cache", "HF_HOME": args.work / "cache" / "huggingface"}
    environment = os.environ | {name: str(path.absolute()) for name, path in caches.items()}
    started, peak = time.perf_counter(), 0
    with log.open("w", encoding="utf-8") as file:
        process = psutil.Popen(command, cwd=tools.CODE_ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, _sum_anonymous_memory_of_process_tree(process))
            time.sleep(SAMPLE_INTERVAL_S)
    if process.returncode:
        raise RuntimeError(f"Training ended with exit code {process.returncode}. Its messages are in {log}.")
    result = {"peak_anonymous_bytes": peak, "seconds": time.perf_counter() - started}
    return result | read_json(folder / "steps.json")


def _train_and_write_step_times(args: EmbeddedTrainingArguments) -> None:
    """Train on the dataset `args.worker`, and write the times of the steps to steps.json in the work folder."""
    starts, run_step = [], TrainingLoop._run_step

    def timed_step(loop: TrainingLoop, *step_args: Any) -> dict[str, Any]:
        starts.append(time.time())
        return run_step(loop, *step_args)

    TrainingLoop._run_step = timed_step
    flags = f"--max_steps {args.steps} --eval_steps 1000 --save_steps 1000 {TRAINING_FLAGS}".split()
    paths = {"model": args.worker.parent / "model", "dataset": args.worker, "output_dir": args.work / "run"}
    flags += ["--min_pair_similarity=null", *(f"--{name}={path}" for name, path in paths.items())]
    run = train_accelerate.main(flags)
    step_s = read_json(run / "run.json")["seconds"]["training"] / args.steps
    first_step_s = starts[0] - psutil.Process().create_time()
    write_json(args.work / "steps.json", {"first_step_s": first_step_s, "step_s": step_s})


def _count_bytes(folder: Path) -> int:
    """Return the size of all files in a folder in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark: train on a small and on a large dataset of embeddings, and write memory and times as JSON."""
    args = parse_arguments(EmbeddedTrainingArguments, __doc__, argv)
    if args.worker:
        return _train_and_write_step_times(args)
    args.work = args.work.absolute()
    cache = args.work / "cache"
    args.work.mkdir(parents=True, exist_ok=True)
    tools.save_random_model(args.work / "model")
    width = embedding_width(load_transformers_config(args.work / "model"))
    encoder, runs, disk = embedded.resolve_image_encoder_digest(str(args.work / "model"), ""), {}, {}
    for name, rows in (("small", args.small_rows), ("large", args.rows)):
        dataset = args.work / f"dataset-{rows}"
        _write_random_embeddings_dataset(dataset, rows, width, encoder)
        before = _count_bytes(cache)
        runs[name] = _measure_training_in_subprocess(args, dataset, name)
        disk[name] = {"dataset_bytes": _count_bytes(dataset), "caches_bytes": _count_bytes(cache) - before}
    # The previous training has filled the caches, so this one should start sooner.
    runs["large, again"] = _measure_training_in_subprocess(args, dataset, "again")
    peak = max(runs[name]["peak_anonymous_bytes"] for name in ("large", "large, again"))
    results = {name: getattr(args, name) for name in ("rows", "small_rows", "steps")}
    results |= {"width": width, "captions_per_row": CAPTIONS_PER_ROW, "flags": TRAINING_FLAGS, "runs": runs}
    results |= {"anonymous_bytes_over_small": peak - runs["small"]["peak_anonymous_bytes"], "disk": disk}
    tools.output_results_with_conditions(results, args.output, "datasets", "pyarrow")
    if not args.keep:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
