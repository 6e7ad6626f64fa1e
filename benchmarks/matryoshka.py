"""What cut embeddings keep of the recall: plainly cut, rotated to the axes of the images, and trained to be cut.

    train="accelerate launch train_accelerate.py --config configs/openmoji.yaml --runs 3 --num_threads 1"
    $train --output_dir runs/cut
    $train --output_dir runs/cut-trained --matryoshka_dims 192 96 48
    python -m benchmarks.matryoshka --plain runs/cut --trained runs/cut-trained \
        --output benchmarks/results/matryoshka.json

Two runs of one recipe, the second with `--matryoshka_dims`, whose widths and rotation are used for all. Mean recall of
both directions (recall@1, @5 and @10) of the test split, embedded in float32. JSON is the last line.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.timing import conditions, finish, table
from capivara_common.cli import flag, parse, user_errors
from capivara_common.files import read_json
from eval.capivara_metrics.metrics import mean_recall
from eval.embeddings import RetrievalEmbeddings
from eval.eval_arguments import RetrievalArguments
from eval.measurement import open_store
from eval.retrieval import load_data
from records.schema import DIRECTIONS
from records.tables import percent
from training.matryoshka import load_rotation

ROWS = {  # key -> what was trained, and how it is cut
    "base, cut": "base, plainly cut",
    "base, turned": "base, rotated, then cut",
    "plain, cut": "trained without widths, plainly cut",
    "plain, turned": "trained without widths, rotated, then cut",
    "trained": "rotated, then trained with the widths",
}


@dataclass
class MatryoshkaArguments:
    """Arguments of `benchmarks.matryoshka`."""

    plain: Path = flag(..., "Folder of a run without matryoshka_dims, of one seed or several.")
    trained: Path = flag(..., "Folder of a run with them, of the same recipe and seeds.")
    language: str = flag("pt", "Language of the captions.")
    output: Path | None = flag(None, "JSON file for the figures.")


@user_errors
def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(MatryoshkaArguments, __doc__, argv)
    finish(measure(args), args.output)


def seed_folders(run: Path) -> list[Path]:
    """Of every model of a run. Raises ValueError where there is none."""
    folders = [path.parent for path in sorted((*run.glob("run.json"), *run.glob("seed-*/run.json")))]
    if not folders:
        raise ValueError(f"{run} is no folder of a finished training run: it has no run.json.")
    return folders


def measure(args: MatryoshkaArguments) -> dict[str, Any]:
    """Rows -> width -> mean recall of each seed, a share from 0 to 1; and what the runs were.

    Raises:
        ValueError: a folder is of no run, the runs differ in more than the widths, or the second has no rotation.
    """
    folders = {"plain": seed_folders(args.plain), "trained": seed_folders(args.trained)}
    runs = {name: [read_json(folder / "run.json") for folder in of] for name, of in folders.items()}
    check_runs(runs)
    config, rotation = runs["trained"][0]["config"], load_rotation(folders["trained"][0])
    if rotation is None:
        raise ValueError(f"{args.trained} has no rotation: train it with --matryoshka_dims and --towers text.")
    widths = sorted({*config["matryoshka_dims"], len(rotation)}, reverse=True)

    def embeddings(model: str) -> RetrievalEmbeddings:
        data = RetrievalArguments(
            model=model, dataset=config["evaluation_dataset"], output=Path("unused"), split=config["test_split"],
            language=args.language, caption_column=config["caption_column"], image_column=config["image_column"],
            recall_at=[1],
        )  # fmt: skip
        return load_data(data).embedded(open_store(data))[0]

    base = embeddings(config["model"])
    plain = [embeddings(str(folder)) for folder in folders["plain"]]
    trained = [embeddings(str(folder)) for folder in folders["trained"]]
    found = {
        "base, cut": [base],
        "base, turned": [turned(base, rotation)],
        "plain, cut": plain,
        "plain, turned": [turned(one, rotation) for one in plain],
        "trained": trained,
    }
    keys = ("steps", "seed", "device")
    return {
        "widths": widths,
        "recall": {row: {str(width): recalls(of, width) for width in widths} for row, of in found.items()},
        "language": args.language,
        "images": len(base.image_embeds),
        "captions": len(base.text_embeds),
        "runs": {name: [{key: run[key] for key in keys} for run in of] for name, of in runs.items()},
        "effective_batch_size": config["effective_batch_size"],
    } | conditions()


def check_runs(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Raise ValueError unless two runs differ in their widths alone, and have the same seeds."""
    free = ("matryoshka_dims", "output_dir", "overwrite_output_dir", "resume", "save_steps", "runs", "seed")
    kept = {
        name: [{k: v for k, v in run["config"].items() if k not in free} | {"its seed": run["seed"]} for run in of]
        for name, of in runs.items()
    }
    if kept["plain"] != kept["trained"]:
        pair = zip(kept["plain"], kept["trained"], strict=False)
        differ = sorted({key for one, other in pair for key in one if one[key] != other.get(key)}) or ["seeds"]
        raise ValueError(f"The two runs are to differ in matryoshka_dims alone, and differ in {', '.join(differ)}.")


def turned(embeddings: RetrievalEmbeddings, rotation: Tensor) -> RetrievalEmbeddings:
    """All embeddings after a rotation."""
    sides = {name: getattr(embeddings, name) @ rotation.T for name in ("text_embeds", "image_embeds")}
    return replace(embeddings, **sides)


def recalls(models: Iterable[RetrievalEmbeddings], width: int) -> list[float]:
    """Of each seed, the mean recall of both directions of embeddings that are cut."""
    return [statistics.mean(mean_recall(one.cut(width).ranks(way)) for way in DIRECTIONS) for one in models]


def matryoshka_table(found: dict[str, Any]) -> str:
    """Mean recall by width, and beneath each the share of the whole that it is."""
    rows = []
    for key, title in ROWS.items():
        of_widths = found["recall"][key]
        whole = statistics.mean(of_widths[str(found["widths"][0])])
        cells = [percent(of_widths[str(width)]) for width in found["widths"]]
        shares = [f"{statistics.mean(of_widths[str(width)]) / whole:.1%}" for width in found["widths"][1:]]
        rows.append((title, cells[0], *(f"{cell} ({share})" for cell, share in zip(cells[1:], shares, strict=True))))
    run, seeds = found["runs"]["trained"][0], len(found["runs"]["trained"])
    facts = (
        f"Mean recall (recall@1, @5 and @10, both directions) in per cent, in brackets the share of the same row's "
        f"recall with all dimensions; {found['language']}, {found['captions']} test captions of {found['images']} "
        f"images of concepts that were never trained, {seeds} seed(s), {run['steps']} steps of "
        f"{found['effective_batch_size']} pairs, on {run['device']}."
    )
    return table(("", *(f"{width} dimensions" for width in found["widths"])), rows, facts)


if __name__ == "__main__":
    main()
