"""Measure how much retrieval results change if a dataset has image embeddings in float16 instead of images.

    python -m examples.openmoji.prepare
    python -m benchmarks.embedded_evaluation --output benchmarks/results/embedded_evaluation.json

`captions.embed` makes the dataset of embeddings. `eval.retrieval` then measures the same model on both datasets.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tools import output_results_with_conditions
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from captions import embed
from eval.retrieval import RetrievalArguments, evaluate_retrieval_and_write_result


@dataclass
class EmbeddedEvaluationArguments:
    """Command-line arguments of `benchmarks.embedded_evaluation`, which compares results from images and embeddings."""

    model: str = flag("data/openmoji/base", "Folder or Hub id of the model.")
    dataset: str = flag("data/openmoji/dataset", "Dataset with images.")
    split: str = flag("test", "Split of the dataset to measure.")
    languages: list[str] = flag(["pt", "en"], "Language codes of the captions to measure.")
    output: Path | None = flag(None, "JSON file for the results.")


def _measure_retrieval(args: EmbeddedEvaluationArguments, dataset: str, language: str, file: Path) -> dict[str, float]:
    """Measure retrieval with the model on one dataset, without the cache of embeddings.

    Args:
        args: Command-line arguments.
        dataset: Dataset with images or with embeddings.
        language: Language code of the captions.
        file: JSON file for the full result of `eval.retrieval`.

    Returns:
        `{direction and metric: value}`, such as `{"text_to_image recall@1": 0.25}`.
    """
    arguments = RetrievalArguments(args.model, dataset, file, language=language, split=args.split, cache_dir="off")
    records = evaluate_retrieval_and_write_result(arguments, draw_sheet=False)
    return {f"{record.direction} {record.metric}": record.value for record in records}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark: measure recall from the images and from their stored embeddings, and print both as JSON."""
    args = parse_arguments(EmbeddedEvaluationArguments, __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        embedded, result = Path(folder) / "embedded", Path(folder) / "result.json"
        # The images are evaluated first, because this refuses a language without captions. Otherwise, the error would
        # appear only after `embed` has computed all embeddings.
        from_images = {name: _measure_retrieval(args, args.dataset, name, result) for name in args.languages}
        words = ["--model", args.model, "--dataset", args.dataset, "--split", args.split, "--output", str(embedded)]
        embed.main([*words, "--license", "unknown"])  # the license has no effect, because the embeddings are deleted
        measured = {}
        for language in args.languages:
            images = from_images[language]
            embeddings = _measure_retrieval(args, str(embedded), language, result)
            # The only cause of a difference is rounding to float16. The rank of a query can change only if two
            # similarities differ by less than the rounding error.
            difference = {name: embeddings[name] - value for name, value in images.items()}
            measured[language] = {"images": images, "embeddings": embeddings, "difference": difference}
    results = {"model": args.model, "dataset": args.dataset, "split": args.split, "measured": measured}
    output_results_with_conditions(results, args.output)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
