"""Whether the selected captions train better than all of them: OpenMoji's, built by `examples.openmoji.captions`.

    python -m examples.openmoji.captions
    python -m benchmarks.captions_selection --runs 3 --output benchmarks/results/captions_selection.json

The demo's training (configs/openmoji.yaml) runs on the pairs that the selection kept, and on all that it chose from,
with the same steps, seeds, and test split. JSON is the last line; runs go to the folder --work.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from common.environment import device_description, package_versions
from common.files import read_json, write_json
from records.schema import Record, read_records

ROOT = Path(__file__).resolve().parent.parent


def train(name: str, dataset: Path, args: argparse.Namespace, more: list[str]) -> dict:
    """A training; returns its mean recalls in both directions, and how many pairs it had.

    Args:
        name: of the folder of the run.
        dataset: that is trained on.
        args: of the command.
        more: further flags of the training.
    """
    output = args.work / name
    if not (output / "table.md").is_file():
        command = [
            sys.executable, "train_accelerate.py", "--config", str(args.config), "--dataset", str(dataset),
            "--evaluation_dataset", str(args.built / "dataset"), "--runs", str(args.runs),
            "--output_dir", str(output), "--resume", "auto", *more,
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True)
    records = [record for path in sorted(output.glob("results/*.json")) for record in read_records(path)]
    return {"recalls": [_facts(record) for record in records if record.metric == "mean_recall"]}


def measure(args: argparse.Namespace, more: list[str]) -> dict:
    """Both trainings, beside what the selection says of itself."""
    selection = read_json(args.built / "3-select" / "train" / "report" / "selection.json")
    kept = {key: selection[key] for key in ("caption_strategy", "min_pair_similarity", "images", "captions")}
    return {
        "runs": args.runs,
        "selection": kept,
        "selected": train("selected", args.built / "dataset", args, more),
        "all": train("all", args.built / "2-score" / "train", args, more),
        "device": device_description(),
        "versions": package_versions(),
    }


def markdown_table(result: dict) -> str:
    """The README's table: mean and standard deviation over the seeds, a row a training."""
    lines = ["| trained on | pairs | language | text-to-image | image-to-text |", "|---|---:|---|---:|---:|"]
    pairs = result["selection"]["images"]
    counts = {"selected": pairs["kept"], "all": pairs["kept"] + pairs["not chosen"]}
    languages = dict.fromkeys(recall["language"] for recall in result["all"]["recalls"])
    for language in languages:
        for name, model in (("", "baseline"), ("selected", "capivara"), ("all", "capivara")):
            found = [
                [r["value"] for r in result[name or "all"]["recalls"]
                 if (r["language"], r["model"], r["direction"]) == (language, model, direction)]
                for direction in ("text_to_image", "image_to_text")
            ]  # fmt: skip
            title = f"{name} captions" if name else "nothing: the base"
            cells = " | ".join(map(_spread, found))
            lines.append(f"| {title} | {format(counts[name], ',') if name else ''} | {language} | {cells} |")
    return "\n".join(
        [*lines, "", f"Mean recall on the test split in per cent, {result['runs']} seeds, {result['device']}."]
    )


def _spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _facts(record: Record) -> dict:
    return {key: getattr(record, key) for key in ("language", "direction", "model", "seed", "value", "n")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, default=Path("data/openmoji/captions"), help="output of the build")
    parser.add_argument("--config", type=Path, default=Path("configs/openmoji.yaml"), help="of the training")
    parser.add_argument("--runs", type=int, default=3, help="seeds")
    parser.add_argument("--work", type=Path, default=Path("runs/captions_selection"), help="folder of the runs")
    parser.add_argument("--output", type=Path, help="JSON file")
    args, more = parser.parse_known_args(argv)
    result = measure(args, more)
    if args.output:
        write_json(args.output, result)
    print(markdown_table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
