"""Memory and seconds of an export at full size.

    python -m benchmarks.export --output benchmarks/results/export.json

The published architecture with random weights is exported for transformers, open_clip and sentence-transformers, in a
process of its own, a worker: its peak of memory is taken after the imports and at the end. JSON is the last line.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import (
    describe_conditions,
    peak_resident_bytes,
    run_in_process,
    save_random_model,
    time_call,
    write_results,
)
from capivara_common.cli import flag, parse_arguments, run_command
from hub_upload.export import export_model

EXPORTED_FORMATS = (
    "transformers",
    "open_clip",
    "sentence_transformers",
)  # ONNX loads the model, and is not measured here


@dataclass
class ExportBenchmarkArguments:
    """Arguments of `benchmarks.export`."""

    output: Path | None = flag(None, "JSON file for the figures.")
    worker: Path | None = flag(None, "Folder of a model that is exported in this process.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse_arguments(ExportBenchmarkArguments, __doc__, argv)
    if args.worker:
        before, target = peak_resident_bytes(), args.worker.with_name("repository")
        seconds = time_call(lambda: export_model(args.worker, target, EXPORTED_FORMATS))
        write_results({"after_imports_bytes": before, "peak_bytes": peak_resident_bytes(), "seconds": seconds})
        return
    with tempfile.TemporaryDirectory(prefix="capivara-export-") as folder:
        weights = save_random_model(Path(folder) / "model")
        found = run_in_process("benchmarks.export", worker=f"{folder}/model")
    over = found["peak_bytes"] - found["after_imports_bytes"]
    found |= {"peak_over_imports_bytes": over, "ratio_to_weights": over / weights}
    write_results(describe_conditions() | {"weights_bytes": weights, "export": found}, args.output)


if __name__ == "__main__":
    run_command(main)
