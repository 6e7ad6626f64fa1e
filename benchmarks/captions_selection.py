"""Whether the selected captions train better than all of them: OpenMoji's, built by `examples.openmoji.captions`.

    python -m examples.openmoji.captions
    python -m benchmarks.captions_selection --runs 3 --output benchmarks/results/captions_selection.json

The demo's training (configs/openmoji.yaml) runs on the pairs that the selection kept, and on all that it chose from,
with the same steps, seeds, and test split. JSON is the last line; runs go to the folder --work.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import ROOT, conditions, finish, table
from capivara_common.files import read_json
from eval.records.schema import DIRECTIONS, read_records
from eval.records.tables import percent

FACTS = ("language", "direction", "model", "seed", "value", "n")  # that are kept of a record


def train(name: str, dataset: Path, args: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """Train on a data set, with `more` flags, where it is not done yet; returns the mean recalls of all seeds."""
    recalls = []
    for seed in range(args.runs):
        output = args.work / name / f"seed-{seed}"
        if not (output / "table.md").is_file():
            command = [
                sys.executable, "train_accelerate.py", "--config", str(args.config), "--dataset", str(dataset),
                "--evaluation_dataset", str(args.built / "dataset"), "--seed", str(seed),
                "--output_dir", str(output), "--resume", "auto", *more,
            ]  # fmt: skip
            subprocess.run(command, cwd=ROOT, check=True)
        records = [record for path in sorted(output.glob("results/*.json")) for record in read_records(path)]
        means = [one for one in records if one.metric == "mean_recall" and (one.model != "baseline" or not seed)]
        recalls += [{key: getattr(record, key) for key in FACTS} for record in means]
    return {"recalls": recalls}


def selection_table(result: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md: mean and standard deviation over the seeds, a row a training."""
    images = result["selection"]["images"]
    pairs = {"selected": images["kept"], "all": images["kept"] + images["not chosen"]}
    rows = []
    for language in dict.fromkeys(recall["language"] for recall in result["all"]["recalls"]):
        for name, model in (("", "baseline"), ("selected", "capivara"), ("all", "capivara")):
            of = [r for r in result[name or "all"]["recalls"] if (r["language"], r["model"]) == (language, model)]
            cells = [percent([r["value"] for r in of if r["direction"] == direction]) for direction in DIRECTIONS]
            title, number = (f"{name} captions", f"{pairs[name]:,}") if name else ("nothing: the base", "")
            rows.append((language, title, number, *cells))
    facts = f"Mean recall on the test split in per cent, {result['runs']} seeds, {result['device']}."
    return table(("language", "trained on", "pairs", "text-to-image", "image-to-text"), rows, facts, 2)


def main(argv: list[str] | None = None) -> None:
    """Train on both, print the table and the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, default=Path("data/openmoji/captions"), help="output of the build")
    parser.add_argument("--config", type=Path, default=Path("configs/openmoji.yaml"), help="of the training")
    parser.add_argument("--runs", type=int, default=3, help="seeds")
    parser.add_argument("--work", type=Path, default=Path("runs/captions_selection"), help="folder of the runs")
    parser.add_argument("--output", type=Path, help="JSON file")
    args, more = parser.parse_known_args(argv)
    selection = read_json(args.built / "3-select" / "train" / "report" / "selection.json")
    result = {
        "runs": args.runs,
        "selection": {key: selection[key] for key in ("caption_strategy", "min_pair_similarity", "images", "captions")},
        "selected": train("selected", args.built / "dataset", args, more),
        "all": train("all", args.built / "2-score" / "train", args, more),
        **conditions(),
    }
    print(selection_table(result))
    finish(result, args.output)


if __name__ == "__main__":
    main()
