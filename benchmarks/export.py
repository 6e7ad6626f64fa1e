"""Measure how much memory and time the export of a full-size model to other libraries takes.

    python -m benchmarks.export --output benchmarks/results/export.json

A model with random weights is exported for transformers, open_clip and sentence-transformers, in a separate process.
The memory of the imports is not counted.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import tools
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from hub_upload.export import export_model

# Formats whose export is measured. ONNX is not among them, because the export to ONNX has to load the whole model.
EXPORTED_FORMATS = ("transformers", "open_clip", "sentence_transformers")


@dataclass
class ExportBenchmarkArguments:
    """Command-line arguments of `benchmarks.export`, which measures memory and time of a model export."""

    output: Path | None = flag(None, "JSON file for the results.")
    worker: Path | None = flag(None, "Folder of a model to export in this process (internal).")


def main(argv: list[str] | None = None) -> None:
    """Run the export benchmark: export a random full-size model, and print memory and time of the export as JSON."""
    args = parse_arguments(ExportBenchmarkArguments, __doc__, argv)
    if args.worker:
        before, target = tools.peak_resident_bytes(), args.worker.with_name("repository")
        seconds = tools.time_call(lambda: export_model(args.worker, target, EXPORTED_FORMATS))
        measured = {"after_imports_bytes": before, "peak_bytes": tools.peak_resident_bytes(), "seconds": seconds}
        return tools.output_results_as_json(measured)
    with tempfile.TemporaryDirectory(prefix="capivara-export-") as folder:
        weights = tools.save_random_model(Path(folder) / "model")
        measured = tools.run_module_in_subprocess("benchmarks.export", worker=f"{folder}/model")
    additional = measured["peak_bytes"] - measured["after_imports_bytes"]
    measured |= {"peak_over_imports_bytes": additional, "ratio_to_weights": additional / weights}
    tools.output_results_with_conditions({"weights_bytes": weights, "export": measured}, args.output)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
