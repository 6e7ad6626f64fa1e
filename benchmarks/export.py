"""Memory and seconds of an export at full size.

    python -m benchmarks.export --output benchmarks/results/export.json

The published architecture with random weights is exported for transformers, open_clip and sentence-transformers, in a
process of its own, a worker: its peak of memory is taken after the imports and at the end. JSON is the last line.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import conditions, finish, in_own_process, save_random_model
from capivara_common.cli import at_least, flag, parse, run_command
from capivara_common.environment import peak_resident_bytes
from hub_upload.export import export

EXPORTED = ("transformers", "open_clip", "sentence_transformers")  # ONNX loads the model, and is not measured here


@dataclass
class ExportBenchmarkArguments:
    """Arguments of `benchmarks.export`."""

    layers: int = flag(12, "Layers of both towers; 12 is the published architecture.")
    output: Path | None = flag(None, "JSON file for the figures.")
    worker: Path | None = flag(None, "Folder of a model that is exported in this process.")

    def __post_init__(self) -> None:
        at_least(self, 1, "layers")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(ExportBenchmarkArguments, __doc__, argv)
    finish(measure_export(args.worker) if args.worker else measure(args.layers), args.output)


def measure(layers: int) -> dict[str, Any]:
    """All figures, from the making of the model on."""
    with tempfile.TemporaryDirectory(prefix="capivara-export-") as folder:
        made = save_random_model(Path(folder) / "model", layers)
        found = in_own_process(["benchmarks.export", "--worker", f"{folder}/model"])
    over = found["peak_bytes"] - found["after_imports_bytes"]
    found |= {"peak_over_imports_bytes": over, "ratio_to_weights": over / made["weights_bytes"]}
    return {**conditions(), "layers": layers, **made, "export": found}


def measure_export(source: Path) -> dict[str, Any]:
    """Memory and seconds of an export, and the size of what it wrote."""
    before, started = peak_resident_bytes(), time.perf_counter()
    files = export(source, source.with_name("repository"), EXPORTED)
    seconds = time.perf_counter() - started
    written = {"written_bytes": sum(size for _, size in files), "files": len(files)}
    return {"after_imports_bytes": before, "peak_bytes": peak_resident_bytes(), "seconds": seconds, **written}


if __name__ == "__main__":
    run_command(main)
