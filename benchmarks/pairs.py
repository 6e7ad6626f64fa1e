"""How long a table of CC3M's size takes to become pairs, and how much memory.

    python -m benchmarks.pairs
    python -m benchmarks.pairs --rows 3300000 --output benchmarks/results/pairs.json

A made data set: captions of realistic length, five generated ones and similarities a row, in parquet files; images are
small JPEG files, the same few again and again, so that the disk holds it. Its rows are opened and chosen from by the
strategy `rank`; a second run finds what the first has left. Each run is a process of its own, with a peak of memory of
its own; files that are mapped into memory count as far as they were read. JSON is the last line.
"""

import io
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from benchmarks.timing import conditions, finish, in_own_process, made_captions, peak_resident_bytes
from capivara_common.cli import at_least, flag, parse, run_command
from caption_data.pairs import pair_table, usable
from caption_data.rows import CaptionChoice
from caption_data.sources import open_split

IMAGES, GENERATED = 100, 5  # different images; generated captions a row
TEXTS, NUMBERS = List(Value("string")), List(Value("float32"))
FEATURES = Features(
    {"image": Image(), "captions-pt": TEXTS, "generated-captions-pt": TEXTS, "similarities-pt": NUMBERS}
)
ROWS_PER_FILE = 50_000


@dataclass
class PairsArguments:
    """Arguments of `benchmarks.pairs`."""

    rows: int = flag(100_000, "Rows of the made data set; 3,300,000 are as many as CC3M has.")
    folder: Path | None = flag(None, "Folder of a made data set: opened and made to pairs in this process.")
    output: Path | None = flag(None, "JSON file for the figures.")

    def __post_init__(self) -> None:
        at_least(self, 1, "rows")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(PairsArguments, __doc__, argv)
    finish(measure_here(args.folder) if args.folder else measure(args.rows), args.output)


def write_rows(folder: Path, rows: int) -> int:
    """Parquet files of so many rows; returns their bytes."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(IMAGES):
        pixels = PIL.Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels.save(file := io.BytesIO(), "JPEG", quality=30)
        pictures.append({"bytes": file.getvalue(), "path": None})
    texts = made_captions(5000, 11, deviation=3)
    for start in range(0, rows, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, rows - start)
        drawn = generator.integers(len(texts), size=(count, 1 + GENERATED))
        similar = generator.normal(0.25, 0.05, (count, 1 + GENERATED)).astype(np.float32)
        columns = {
            "image": [pictures[number] for number in generator.integers(IMAGES, size=count)],
            "captions-pt": [[f"{texts[first]} {start + row}"] for row, first in enumerate(drawn[:, 0])],
            "generated-captions-pt": [[texts[number] for number in more] for more in drawn[:, 1:]],
            "similarities-pt": similar.tolist(),
        }
        path = folder / f"train-{start:09d}.parquet"
        pq.write_table(pa.table(columns, schema=FEATURES.arrow_schema), path, row_group_size=1000)
    return sum(path.stat().st_size for path in folder.iterdir())


def measure_here(folder: Path) -> dict[str, Any]:
    """Seconds to open the rows and to make pairs of them, and the peak of this process's memory."""
    choice = CaptionChoice(caption_strategy="rank", min_pair_similarity=0.2)
    before, started = peak_resident_bytes(), time.perf_counter()
    split = open_split(str(folder), "train", "image")
    opened = time.perf_counter()
    columns, settings = choice.columns_of("pt"), {"strategy": "rank", "least": 0.2}
    pairs = usable(pair_table(split, columns, lambda row: choice.chosen(row, "pt"), settings))
    return {
        "pairs": len(pairs), "open_s": opened - started, "pairs_s": time.perf_counter() - opened,
        "peak_gib": peak_resident_bytes() / 2**30, "imports_gib": before / 2**30,
    }  # fmt: skip


def measure(rows: int) -> dict[str, Any]:
    """A first run, and a second one that finds what the first has left."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        written = write_rows(data, rows)
        os.environ |= {"HF_DATASETS_CACHE": f"{folder}/datasets", "CAPIVARA_CACHE": f"{folder}/capivara"}
        first, second = (in_own_process("benchmarks.pairs", folder=data) for _ in range(2))
        kept = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    seconds = [run["open_s"] + run["pairs_s"] for run in (first, second)]
    return {
        **conditions(), "rows": rows, "pairs": first["pairs"], "minutes": seconds[0] / 60,
        "rows_per_s": rows / seconds[0], "rows_per_s_to_pairs": rows / first["pairs_s"], "second_run_s": seconds[1],
        "peak_gib": first["peak_gib"], "peak_gib_second_run": second["peak_gib"], "imports_gib": first["imports_gib"],
        "parquet_gib": written / 2**30, "disk_gib": kept / 2**30,
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)
