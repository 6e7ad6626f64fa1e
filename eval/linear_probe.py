"""Linear probe: logistic regression on frozen image embeddings, with all training images or a few per class.

    python -m eval.linear_probe --model MODEL --benchmark cifar-10 --images DATASET --output results/probe.json
    python -m eval.linear_probe --model MODEL --benchmark cifar-10 --images DATASET --shots 1 2 4 8 16 --output p.json

The L2 penalty is selected on the validation split, or on a fifth of the training images if there is none. Then the
regression is fitted to training and validation images (ELEVATER, arXiv 2204.08790, section 4). With `--shots`, it is
trained on a few training images per class, without the validation split. The result is the mean over several random
draws.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from tqdm.auto import tqdm

from capivara_common.cli import flag, run_main_and_report_user_errors
from capivara_common.environment import get_or_init_distributed_state
from capivara_common.files import check_output_file
from eval.classification import LabeledImageArguments, compute_chance_level, compute_classification_metrics
from eval.embeddings import CachedEmbedder, run_evaluation_command
from eval.prompts import load_prompts
from eval.records.result_files import Record

# Values of scikit-learn's C to choose from: 0.001, 0.01, and so on to 100,000. A smaller C is a stronger penalty on
# large weights.
INVERSE_PENALTIES = np.logspace(-3, 5, 9)
MAX_ITERATIONS = 1000  # largest number of iterations of scikit-learn's solver


@dataclass
class LinearProbeArguments(LabeledImageArguments):
    """Command-line arguments of `eval.linear_probe`, which fits a linear classifier to frozen image embeddings."""

    shots: list[int] = flag([], "Training images per class. Several numbers: one result each. Default: all images.")
    draws: int = flag(3, "Random draws of training images to average over (with --shots).")
    seed: int = flag(0, "Seed of the random draws, and of the choice of training images for validation.")
    train_split: str = flag("train", "Split to fit the logistic regression to.")
    validation_split: str | None = flag(
        None, "Split to select the L2 penalty on. Default: a fifth of the training split."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(shots < 1 for shots in self.shots) or self.draws < 1:
            raise ValueError(f"--shots and --draws must be at least 1, got {self.shots} and {self.draws}.")


# Tuple of image embeddings, (images, width), and the class index of each image, (images,).
LabeledFeatures = tuple[np.ndarray, np.ndarray]


def sample_few_shot(labels: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `shots` random training images of each class, for a few-shot classifier.

    A class with fewer images contributes all of them.

    Args:
        labels: Class index of each image (images,).
        shots: Images per class.
        rng: Random generator.

    Returns:
        Row numbers of the drawn images, grouped by class.
    """
    rows_by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([rng.permutation(rows)[:shots] for rows in rows_by_class])


def draw_random_validation_fold(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a random 20 % of the images of each class for validation, in the format of scikit-learn's `PredefinedSplit`.

    Classes with two to four images contribute one image, classes with a single image none.

    Args:
        labels: Class index of each image (images,).
        rng: Random generator.

    Returns:
        -1 for training images, 0 for validation images (images,).
    """
    fold = np.full(len(labels), -1)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        fold[rows[: max(len(rows) // 5, int(len(rows) > 1))]] = 0
    return fold


def tune_probe_and_score_images(
    train: LabeledFeatures,
    validation: LabeledFeatures | None,
    test: LabeledFeatures,
    class_count: int,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, float]:
    """Select the regularization of a logistic regression, fit it to image embeddings, and score the test images.

    The regularization is scikit-learn's C, the inverse of the L2 penalty. It is the value in `INVERSE_PENALTIES` with
    the highest validation accuracy, or 1 if there are too few images to select it.

    Args:
        train: Embeddings and labels of the training images.
        validation: The same of the validation images. None: a fifth of the training images is used.
        test: The same of the test images.
        class_count: Number of classes, including classes without training images.
        rng: Random generator that draws the validation fold.

    Returns:
        A tuple (scores, C): the scores of the test images (images, classes), and the selected C.

    Raises:
        ValueError: If the training images have fewer than two classes.
    """
    if len(np.unique(train[1])) < 2:
        raise ValueError(f"A linear probe needs at least two training classes, got {len(np.unique(train[1]))}.")
    if validation is None:
        fit_data, fold = train, draw_random_validation_fold(train[1], rng)
    else:
        fit_data = tuple(map(np.concatenate, zip(train, validation, strict=True)))
        fold = np.repeat([-1, 0], [len(train[1]), len(validation[1])])
    regression = LogisticRegression(max_iter=MAX_ITERATIONS)
    can_select = 0 in fold and len(np.unique(fit_data[1][fold < 0])) > 1
    # GridSearchCV selects the C with the highest validation accuracy, or the smallest of several equal ones. It then
    # fits a classifier with this C to training and validation images together.
    if can_select:
        regression = GridSearchCV(regression, {"C": INVERSE_PENALTIES.tolist()}, cv=PredefinedSplit(fold))
    regression.fit(*fit_data)
    # The classifier gives no score to classes without training images. Their score stays -1e9, so that they are never
    # predicted.
    scores = torch.full((len(test[1]), class_count), -1e9, dtype=torch.double)
    decision = regression.decision_function(test[0])
    # For two classes, scikit-learn returns only the score of the second class. The first class gets its negative.
    if decision.ndim == 1:
        decision = np.stack([-decision, decision], axis=1)
    scores[:, torch.as_tensor(regression.classes_)] = torch.from_numpy(decision).double()
    return scores, float(regression.best_params_["C"]) if can_select else 1.0


def evaluate_linear_probe_and_write_result(args: LinearProbeArguments) -> list[Record]:
    """Measure linear probes on a dataset, and write the result file.

    A linear probe is a linear classifier that is trained on frozen image embeddings. There is one measurement for each
    number in `args.shots`, or a single one with all training images.

    Returns:
        On the main process, one record per metric and measurement. On other processes, an empty list.

    Raises:
        ValueError: If an image has several labels, two splits hold the same images, or an argument is invalid.
    """
    check_output_file(args.output)
    prompts = load_prompts(args.benchmark)
    names = [args.train_split, args.split, *([args.validation_split] if args.validation_split else [])]
    loaded = {}
    for name in names:
        data = args.load_images(name, prompts.english_names)
        if any(isinstance(label, list) for label in data.labels):
            raise ValueError(f"The linear probe needs one label per image, but {args.images} has lists of labels.")
        for other_name, other in loaded.items():
            # If two splits held the same images, the classifier could be trained on the images that it is tested on.
            if other.images.image_digests == data.images.image_digests:
                raise ValueError(
                    f"Splits must hold different images, but {other_name!r} and {name!r} hold the same. "
                    "Give a folder with a subfolder per split, such as train/ and test/, each with a folder per class."
                )
        loaded[name] = data
    cached_embedder = CachedEmbedder.load(args)
    features, skipped = [], {}
    for name, data in loaded.items():
        images = cached_embedder.embed_images(data.images, f"Images, {name}")
        features.append((images.embeds.numpy(), np.array(data.labels)[images.rows.numpy()]))
        skipped |= {f"{name} {row}": reason for row, reason in images.skipped.items()}
    if not get_or_init_distributed_state().is_main_process:
        return []
    train, test, validation = (*features, None)[:3]
    records, chosen_penalties, labels, classes = [], {}, test[1].tolist(), len(prompts.names)
    shared = {"task": "linear_probe", "dataset": prompts.benchmark, "split": args.split, "n": len(labels)}
    shared |= {"language": "", "direction": "", "model": args.role, "model_folder": args.model}
    for shots in args.shots or [None]:
        name = f"{shots}-shot" if shots else "full"
        results, chosen_penalties[name] = [], []
        for draw in tqdm(range(args.draws if shots else 1), desc=f"Regression, {name}", unit="draw"):
            rng = np.random.default_rng([args.seed, draw, shots or 0])
            rows = sample_few_shot(train[1], shots, rng) if shots else slice(None)
            sample = train[0][rows], train[1][rows]
            scores, penalty = tune_probe_and_score_images(sample, validation if not shots else None, test, classes, rng)
            results.append(compute_classification_metrics(scores, labels, prompts.metric))
            chosen_penalties[name].append(penalty)
        for metric, value in pandas.DataFrame(results).mean(skipna=False).items():
            chance = compute_chance_level(metric, labels, classes)
            records.append(Record(**shared, protocol=name, metric=metric, value=float(value), chance=chance))
    metadata = {"dataset": args.images, "fingerprint": loaded[args.split].fingerprint(), "skipped": skipped}
    cached_embedder.write_result_file(args, records, **metadata, chosen_penalties=chosen_penalties)
    return records


main = partial(run_evaluation_command, LinearProbeArguments, __doc__, evaluate_linear_probe_and_write_result)

if __name__ == "__main__":
    run_main_and_report_user_errors(main, resumable=True)
