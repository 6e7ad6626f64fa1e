"""Can it be told that no picture fits a sentence, and does steering steer? Measured on real photographs.

    git clone https://github.com/lightly-ai/coco128_yolo data/coco128
    python -m benchmarks.nothing_fits
    python -m benchmarks.nothing_fits --model MODEL --pictures ~/Fotos --sentences mine.yaml --output mine.json --keep

The last form is for another model and one's own pictures: `mine.yaml` lists sentences under `there` and `absent`, as
benchmarks/nothing_fits.yaml does. A statistic tells them apart as well as its AUC says: 0.5 is chance. Where boxes of
YOLO lie beside the pictures, it is counted how many of the first ten hold what is asked for less or more of. Statistics
and forms of steering that were measured and not taken have their figures in docs/benchmarks.md, with their commit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from benchmarks.timing import CODE_ROOT, RESULTS_FOLDER, describe_conditions, write_results
from capivara_common.cli import flag, parse_arguments, run_command
from capivara_common.files import write_json
from capivara_search.folder_scan import find_pictures
from capivara_search.models import SearchModel, find_model
from capivara_search.picture_reading import open_query_picture
from capivara_search.query import (
    FEEDBACK_STRENGTH,
    NEUTRAL_SENTENCES,
    RELEVANCE_AUC_FILE,
    apply_feedback,
    background_z_score,
    z_score,
)
from examples.real_images import PHOTOGRAPHS, load_photo

TOP_K, FEEDBACK_WEIGHTS, BOOTSTRAP_RESAMPLES = 10, (0.25, 0.5, 1.0, 2.0), 1000
CHOSEN_STATISTIC = "best, in deviations"  # what the line is drawn by: hits of a sentence keep their order


@dataclass
class NothingFitsArguments:
    """Arguments of `benchmarks.nothing_fits`."""

    model: str | None = flag(None, "Folder or Hub id; where none is given, that of a new index.")
    pictures: Path = flag(Path("data/coco128/images"), "Folder of photographs.")
    sentences: Path = flag(CODE_ROOT / "benchmarks" / "nothing_fits.yaml", "YAML file of the sentences.")
    output: Path = flag(RESULTS_FOLDER / "nothing_fits.json", "JSON file of the results.")
    keep: bool = flag(
        False, "Also leave the results in the model's folder, by which the search draws the line, or not."
    )


def auc(present: np.ndarray, absent: np.ndarray) -> float:
    """How probable it is that one of the first is above one of the second; a tie is a half."""
    return float(((present[:, None] > absent) + (present[:, None] == absent) / 2).mean())


def measure_separation(present: np.ndarray, absent: np.ndarray) -> dict[str, object]:
    """AUC of a statistic of sentences of both kinds, its interval, and that of each half of them, by turns."""
    dice = np.random.default_rng(0)
    drawn = [
        auc(dice.choice(present, len(present)), dice.choice(absent, len(absent))) for _ in range(BOOTSTRAP_RESAMPLES)
    ]
    halves = [auc(present[start::2], absent[start::2]) for start in (0, 1)]
    return {"auc": auc(present, absent), "interval_95": np.quantile(drawn, [0.025, 0.975]).tolist(), "halves": halves}


def read_box_classes(path: Path, class_names: dict[int, str]) -> set[str]:
    """The classes of a picture's boxes; none where it has no such file."""
    labels = Path(str(path).replace("/images/", "/object_detection/labels/")).with_suffix(".txt")
    return (
        {class_names[int(line.split()[0])] for line in labels.read_text().splitlines()} if labels.is_file() else set()
    )


def measure_feedback(
    model: SearchModel, feedback_queries: list[dict], images: np.ndarray, classes: list[set[str]]
) -> Iterator[dict]:
    """Of each weight and kind of pull: means of all queries, before and after, and how often none is left."""
    cases = [(one["text"], *pull, set(one["wanted"])) for one in feedback_queries for pull in one["each"].items()]
    queries, words = (model.embed_texts([case[place] for case in cases]) for place in (0, 2))
    for weight, by in product([-one for one in FEEDBACK_WEIGHTS] + [*FEEDBACK_WEIGHTS], ("words", "picture")):
        counts = []
        for query, word, (_, thing, _, wanted) in zip(queries, words, cases, strict=True):
            before = np.argsort(-images @ query)
            hit = images[next(place for place in before if thing in classes[place])]  # which is clicked at
            pull = word if by == "words" else hit
            after = np.argsort(-images @ apply_feedback(query, [(weight / FEEDBACK_STRENGTH, pull)], images))
            orders = product(({thing}, wanted), (before[:TOP_K], after[:TOP_K]))
            counts.append([sum(bool(kind & classes[place]) for place in order) for kind, order in orders])
        found = np.array(counts, float)  # (cases, object before, after, wanted before, after)
        had, (thing_held, wanted_held) = found[found[:, 0] > 0], found.mean(axis=0).reshape(2, 2).tolist()
        shown = {"form": "in deviations", "by": by, "weight": weight, "object": thing_held, "wanted": wanted_held}
        yield shown | {"gone": float((had[:, 1] == 0).mean()), "had": len(had), "cases": len(found)}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_arguments(NothingFitsArguments, __doc__, argv)
    given = yaml.safe_load(args.sentences.read_text(encoding="utf-8"))
    files = [Path(file.path) for file in find_pictures([args.pictures])[0]]
    if not files or not given.get("there") or not given.get("absent"):
        raise ValueError(f"{args.pictures} must hold pictures, {args.sentences} sentences under `there` and `absent`.")
    model, pictures = find_model(args.model), [open_query_picture(path) for path in files]
    pictures += [load_photo(name) for name in PHOTOGRAPHS if given.get("photographs")]
    images, neutral_texts = model.embed_images(pictures), model.embed_texts(NEUTRAL_SENTENCES)
    scores = {
        kind: model.embed_texts(given[kind]) @ images.T for kind in ("there", "absent", "nonsense") if given.get(kind)
    }
    counts = {"pictures": len(images), "sentences": {kind: len(found) for kind, found in scores.items()}}
    best = {kind: np.array([z_score(own.max(), own) for own in found]) for kind, found in scores.items()}
    told = measure_separation(best["there"], best["absent"])
    line = background_z_score(images, neutral_texts, (neutral_texts @ images.T).max(axis=1))
    results = describe_conditions() | {
        "model": model.name,
        **counts,
        "chosen": CHOSEN_STATISTIC,
        "statistics": {CHOSEN_STATISTIC: told},
    }
    results["auc"] = told["auc"]
    results["above_the_line"] = {kind: float((found >= line).mean()) for kind, found in best.items()}
    config = args.pictures.parent / "object_detection" / "config.yaml"
    if given.get("steering") and config.is_file():
        names = yaml.safe_load(config.read_text(encoding="utf-8"))["names"]
        classes = [read_box_classes(path, names) for path in files]
        results["steering"] = list(measure_feedback(model, given["steering"], images[: len(files)], classes))
    if args.keep:
        write_json(model.folder / RELEVANCE_AUC_FILE, results)
    write_results(results, args.output)


if __name__ == "__main__":
    run_command(main)
