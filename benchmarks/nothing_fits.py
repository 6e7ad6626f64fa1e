"""Measure whether the search can tell that no photograph matches a sentence, and how feedback changes results.

    git clone https://github.com/lightly-ai/coco128_yolo data/coco128
    python -m benchmarks.nothing_fits
    python -m benchmarks.nothing_fits --model MODEL --pictures ~/Fotos --sentences mine.yaml --output mine.json --keep

The last command measures another model on your own photographs. The file `mine.yaml` has two lists of sentences, as
benchmarks/nothing_fits.yaml does: under `there`, sentences that match a photograph; under `absent`, sentences that
match none. The result is an AUC: 1 if the search separates the two lists perfectly, 0.5 by chance.

If YOLO labels lie next to the photographs, the effect of feedback is measured, too: a simulated user asks for more or
less of an object.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from benchmarks import tools
from capivara_common.cli import flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.files import write_json
from capivara_search import query
from capivara_search.folder_scan import find_pictures_and_unreadable_files
from capivara_search.models import SearchModel, resolve_search_model
from capivara_search.picture_reading import open_query_picture
from examples.real_images import PHOTOGRAPHS, load_example_photo

TOP_K = 10  # number of first results of a search in which objects are counted
FEEDBACK_WEIGHTS = (0.25, 0.5, 1.0, 2.0)
BOOTSTRAP_RESAMPLES = 1000
# Key of the results for the AUC of the best hit's z-score. The z-score says by how many standard deviations the highest
# cosine lies above the mean cosine of all pictures. The search compares this z-score with its relevance threshold.
CHOSEN_STATISTIC = "best, in deviations"


@dataclass
class NothingFitsArguments:
    """Command-line arguments of `benchmarks.nothing_fits`, which measures how well missing matches are detected."""

    model: str | None = flag(None, "Folder or Hub id of the model. Default: the model that a new index gets.")
    pictures: Path = flag(Path("data/coco128/images"), "Folder of photographs.")
    sentences: Path = flag(
        Path(__file__).with_suffix(".yaml"),
        "YAML file with two lists of sentences: `there` (with a matching picture) and `absent` (without one).",
    )
    output: Path = flag(tools.RESULTS_FOLDER / "nothing_fits.json", "JSON file for the results.")
    keep: bool = flag(
        False,
        "Also save the results in the model's folder. If the AUC in them is at least 0.8, searches with this model use "
        "the relevance threshold by default.",
    )


def auc(present: np.ndarray, absent: np.ndarray) -> float:
    """Compute how well a score separates sentences with and without a matching image, as the area under the ROC curve.

    Args:
        present: Scores of the sentences with a matching image, of shape (n,).
        absent: Scores of the sentences without a matching image, of shape (m,).

    Returns:
        Probability, from 0 to 1, that a random value of `present` is larger than a random value of `absent`. A tie
        counts as 0.5.
    """
    return float(((present[:, None] > absent) + (present[:, None] == absent) / 2).mean())


def _compute_auc_with_interval(present: np.ndarray, absent: np.ndarray) -> dict[str, object]:
    """Measure how well a statistic separates sentences with and without a matching image.

    Args:
        present: Statistic of each sentence with a matching image, of shape (n,).
        absent: Statistic of each sentence without a matching image, of shape (m,).

    Returns:
        `{"auc": the AUC, "interval_95": [lower end, upper end] of its 95 % bootstrap interval, "halves": [AUC of the
        sentences with even index, AUC of the sentences with odd index]}`.
    """
    rng = np.random.default_rng(0)
    aucs = [auc(rng.choice(present, len(present)), rng.choice(absent, len(absent))) for _ in range(BOOTSTRAP_RESAMPLES)]
    halves = [auc(present[start::2], absent[start::2]) for start in (0, 1)]
    interval = np.quantile(aucs, [0.025, 0.975]).tolist()
    return {"auc": auc(present, absent), "interval_95": interval, "halves": halves}


def _read_classes_in_photograph(path: Path, class_names: dict[int, str]) -> set[str]:
    """Read the classes of the objects in a photograph from the YOLO label file of the photograph.

    Args:
        path: Path of the photograph, inside a folder `images`.
        class_names: Name of each class by its number in the label file.

    Returns:
        Names of the classes; empty if the photograph has no label file.
    """
    labels = Path(str(path).replace("/images/", "/object_detection/labels/")).with_suffix(".txt")
    if not labels.is_file():
        return set()
    return {class_names[int(line.split()[0])] for line in labels.read_text().splitlines()}


def _measure_feedback_effect_on_results(
    model: SearchModel, feedback_queries: list[dict], images: np.ndarray, classes: list[set[str]]
) -> Iterator[dict]:
    """Measure how feedback changes the first `TOP_K` results.

    Args:
        model: Model that embeds the texts.
        feedback_queries: Queries from the YAML file, each `{"text": sentence to search for, "each": {class of an
            object: words for the object}, "wanted": classes of objects that the results should show}`.
        images: Image embeddings of shape (images, width).
        classes: Classes of the objects in each image.

    Yields:
        A dict for each weight and for each way to give feedback:

        - "form": always "in deviations".
        - "by": "words" if the user names the object, "picture" if the user clicks on a result that shows it.
        - "weight": weight of the feedback; negative for less of the object.
        - "object": mean number of results that show the object, `[before feedback, after feedback]`.
        - "wanted": mean number of results that show a wanted object, `[before feedback, after feedback]`.
        - "cases": number of cases. "had": number of cases in which a result shows the object before feedback.
        - "gone": fraction (0 to 1) of the cases in "had" in which no result shows the object after feedback.
    """
    cases = [
        (entry["text"], object_class, words, set(entry["wanted"]))
        for entry in feedback_queries
        for object_class, words in entry["each"].items()
    ]
    sentences, words = (model.embed_texts([case[column] for case in cases]) for column in (0, 2))
    # For each entry of "each", one case is measured: a user who asks for more or less of this object. "in deviations"
    # below means that vectors are divided by a standard deviation (see `apply_feedback`).
    for weight, by in product([-weight for weight in FEEDBACK_WEIGHTS] + [*FEEDBACK_WEIGHTS], ("words", "picture")):
        counts = []
        for sentence, word, (_, object_class, _, wanted) in zip(sentences, words, cases, strict=True):
            before = np.argsort(-images @ sentence)
            # Simulate a user who clicks on the first result that shows the object.
            clicked = images[next(index for index in before if object_class in classes[index])]
            feedback = [(weight / query.FEEDBACK_STRENGTH, word if by == "words" else clicked)]
            after = np.argsort(-images @ query.apply_feedback(sentence, feedback, images))
            orders = product(({object_class}, wanted), (before[:TOP_K], after[:TOP_K]))
            counts.append([sum(bool(labels & classes[index]) for index in order) for labels, order in orders])
        # Shape (cases, 4), counted in the first `TOP_K` results. Columns: results that show the object, before and
        # after feedback; results that show any of the wanted classes, before and after feedback.
        table = np.array(counts, float)
        with_object = table[table[:, 0] > 0]
        object_means, wanted_means = table.mean(axis=0).reshape(2, 2).tolist()
        yield {
            "form": "in deviations", "by": by, "weight": weight, "object": object_means, "wanted": wanted_means,
            "gone": float((with_object[:, 1] == 0).mean()), "had": len(with_object), "cases": len(table),
        }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark: measure how well sentences without a matching image are detected, and the effect of feedback.

    Args:
        argv: Command-line arguments. Default: `sys.argv[1:]`.

    Raises:
        ValueError: If the folder has no images, or the YAML file lacks sentences.
    """
    args = parse_arguments(NothingFitsArguments, __doc__, argv)
    sentences = yaml.safe_load(args.sentences.read_text(encoding="utf-8"))
    files = [Path(file.path) for file in find_pictures_and_unreadable_files([args.pictures])[0]]
    if not files:
        raise ValueError(f"--pictures must be a folder with images, got {args.pictures}.")
    if not sentences.get("there") or not sentences.get("absent"):
        raise ValueError(f"--sentences must be YAML with the lists `there` and `absent`, got {args.sentences}.")
    model, pictures = resolve_search_model(args.model), [open_query_picture(path) for path in files]
    pictures += [load_example_photo(name) for name in PHOTOGRAPHS if sentences.get("photographs")]
    images, neutral_texts = model.embed_images(pictures), model.embed_texts(query.NEUTRAL_SENTENCES)
    kinds = [kind for kind in ("there", "absent", "nonsense") if sentences.get(kind)]
    scores = {kind: model.embed_texts(sentences[kind]) @ images.T for kind in kinds}
    best = {kind: np.array([query.z_score(row.max(), row) for row in rows]) for kind, rows in scores.items()}
    separation = _compute_auc_with_interval(best["there"], best["absent"])
    highest_neutral = (neutral_texts @ images.T).max(axis=1)
    relevance_threshold = query.estimate_relevance_z_score_threshold(images, neutral_texts, highest_neutral)
    results = tools.describe_measurement_conditions() | {"model": model.name, "pictures": len(images)}
    results |= {"sentences": {kind: len(rows) for kind, rows in scores.items()}, "chosen": CHOSEN_STATISTIC}
    results |= {"statistics": {CHOSEN_STATISTIC: separation}, "auc": separation["auc"]}
    results["above_the_line"] = {kind: float((values >= relevance_threshold).mean()) for kind, values in best.items()}
    config = args.pictures.parent / "object_detection" / "config.yaml"
    if sentences.get("steering") and config.is_file():
        names = yaml.safe_load(config.read_text(encoding="utf-8"))["names"]
        classes = [_read_classes_in_photograph(path, names) for path in files]
        effects = _measure_feedback_effect_on_results(model, sentences["steering"], images[: len(files)], classes)
        results["steering"] = list(effects)
    if args.keep:
        write_json(model.folder / query.RELEVANCE_AUC_FILE, results)
    tools.output_results_as_json(results, args.output)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
