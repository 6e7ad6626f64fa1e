"""Memory of an export at full size, and cold loads of the result beside open_clip's.

    python -m benchmarks.export --output benchmarks/results/export.json

The published architecture with random weights is exported for transformers, open_clip and sentence-transformers, in a
process of its own: its peak of memory is taken after the imports and at the end. Then both programs load the exported
weights in fresh processes, in alternating runs, the weight files dropped from the page cache before each and the
imports done before the clock starts. transformers maps its file and reads a tensor at its first use, so the time with
every tensor read once is given beside that of the call. The last line of the output is JSON.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from transformers import AutoModel, CLIPVisionModel, XLMRobertaModel  # noqa: F401, else imported while a load is timed

from benchmarks.timing import alternating, conditions, finish, in_own_process, median_ratio, save_random_model
from capivara_common.cli import at_least, flag, parse, run_command
from capivara_common.environment import peak_resident_bytes
from hub_upload.export import export
from hub_upload.formats.open_clip import OPEN_CLIP_WEIGHTS
from modeling_capivara.loading import WEIGHTS

EXPORTED = ("transformers", "open_clip", "sentence_transformers")  # ONNX loads the model, and is not measured here
PROGRAMS = {"ours": WEIGHTS, "open_clip": OPEN_CLIP_WEIGHTS}
LOADERS = {
    "ours": lambda: AutoModel.from_pretrained("."),
    "open_clip": lambda: open_clip.create_model("local-dir:."),
}


@dataclass
class ExportBenchmarkArguments:
    """Arguments of `benchmarks.export`."""

    runs: int = flag(5, "Loads by each program, alternating.")
    layers: int = flag(12, "Layers of both towers; 12 is the published architecture.")
    output: Path | None = flag(None, "JSON file for the figures.")
    folder: Path | None = flag(None, "Folder for the models; a temporary one if none.")
    worker: Literal["export", "ours", "open_clip"] | None = flag(None, "Measure in this process.")

    def __post_init__(self) -> None:
        at_least(self, 1, "runs", "layers")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(ExportBenchmarkArguments, __doc__, argv)
    if args.worker:
        finish((measure_export if args.worker == "export" else measure_load)(args))
        return
    with tempfile.TemporaryDirectory(prefix="capivara-export-") as temporary:
        args.folder = Path(args.folder or temporary).resolve()
        finish(measure(args), args.output)


def measure(args: ExportBenchmarkArguments) -> dict[str, Any]:
    """All figures, from the making of the model on."""
    made = save_random_model(args.folder / "model", args.layers)
    exported = measured("export", args)
    over = exported["peak_bytes"] - exported["after_imports_bytes"]
    ratios = {"peak_over_imports_bytes": over, "ratio_to_weights": over / made["weights_bytes"]}
    settings = {"runs": args.runs, "layers": args.layers}
    return {**conditions(), **settings, **made, "export": exported | ratios, "load": compare_loads(args)}


def measured(worker: str, args: ExportBenchmarkArguments) -> dict[str, Any]:
    """The result of a worker, in a process of its own."""
    flags = ["--worker", worker, "--folder", str(args.folder), "--layers", str(args.layers)]
    return in_own_process(["benchmarks.export", *flags])


def measure_export(args: ExportBenchmarkArguments) -> dict[str, Any]:
    """Memory and seconds of an export, and the size of what it wrote."""
    before, started = peak_resident_bytes(), time.perf_counter()
    # The text tower's configuration beside it: open_clip must find it without the network.
    source = args.folder / "model"
    files = export(source, args.folder / "repository", EXPORTED, text_config=str(source), overwrite=True)
    seconds = time.perf_counter() - started
    written = {"written_bytes": sum(size for _, size in files), "files": len(files)}
    return {"after_imports_bytes": before, "peak_bytes": peak_resident_bytes(), "seconds": seconds, **written}


@torch.no_grad()
def measure_load(args: ExportBenchmarkArguments) -> dict[str, float]:
    """Seconds of a load by the worker's program, and of the load and one read of every tensor."""
    os.chdir(args.folder / "repository")
    started = time.perf_counter()
    model = LOADERS[args.worker]()
    loaded = time.perf_counter()
    for tensor in model.state_dict().values():
        tensor.sum()
    return {"load_s": loaded - started, "load_and_read_s": time.perf_counter() - started}


def compare_loads(args: ExportBenchmarkArguments) -> dict[str, Any]:
    """Alternating cold loads; `ratio` is ours to open_clip's, the median over the runs."""

    def load(name: str) -> dict[str, float]:
        drop_from_page_cache(args.folder / "repository" / PROGRAMS[name])
        return measured(name, args)

    runs = alternating({name: lambda run, name=name: load(name) for name in PROGRAMS}, args.runs, "Loads")
    found: dict[str, Any] = {"page_cache": "the weight file is dropped from it before each load"}
    for what in ("load", "load_and_read"):
        seconds = {name: [run[f"{what}_s"] for run in of] for name, of in runs.items()}
        found[what] = {
            name: {"median_s": statistics.median(s), "min_s": min(s), "max_s": max(s)} for name, s in seconds.items()
        }
        found[what]["ratio"] = median_ratio(seconds["ours"], seconds["open_clip"])
    return found


def drop_from_page_cache(path: Path) -> None:
    """Make the next read of a file come from the disk, where the file system heeds it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # pages that are not written yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


if __name__ == "__main__":
    run_command(main)
