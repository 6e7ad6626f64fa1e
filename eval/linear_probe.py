"""Logistic regression on frozen image embeddings, with all training images or a few of each class.

    python -m eval.linear_probe --model MODEL --benchmark cifar-10 --images DATASET --output results/probe.json
    python -m eval.linear_probe --model MODEL --benchmark cifar-10 --images DATASET --shots 1 2 4 8 16 --output p.json

The penalty is chosen on the validation split, or on a fifth of the training images where there is none, then the
regression is fitted to both (ELEVATER, arXiv 2204.08790, section 4). Few-shot figures are means over draws.
"""

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from tqdm.auto import tqdm

from capivara_common.cli import flag, run_command
from capivara_common.environment import process_state
from capivara_common.files import check_output_file
from eval.classification import LabeledImageArguments, compute_chance, compute_classification_metrics, load_split
from eval.embeddings import open_store, run_evaluation, write_result
from eval.prompts import load_prompts
from eval.records.schema import Record

INVERSE_PENALTIES = np.logspace(-3, 5, 9)  # inverse strengths C, from strong to weak
MAX_ITERATIONS = 1000


@dataclass
class LinearProbeArguments(LabeledImageArguments):
    """Flags of `eval.linear_probe`."""

    shots: list[int] = flag([], "Images of each class; all where none is given.")
    draws: int = flag(3, "Draws of the few images, averaged.")
    seed: int = flag(0, "Seed of the draws and of the validation part.")
    train_split: str = flag("train", "Split that is fitted to.")
    validation_split: str | None = flag(None, "Split that the penalty is chosen on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(shots < 1 for shots in self.shots) or self.draws < 1:
            raise ValueError(f"shots and draws must be at least 1, got {self.shots} and {self.draws}.")


LabeledFeatures = tuple[np.ndarray, np.ndarray]  # embedded images (images, width) and their classes (images,)


def sample_few_shot(labels: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of `shots` images of each class, of all where a class has fewer."""
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([rng.permutation(of)[:shots] for of in rows])


def make_validation_fold(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(images,), -1 to fit and 0 to choose on: of each class a fifth, none of a class with a single image."""
    fold = np.full(len(labels), -1)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        fold[rows[: max(len(rows) // 5, int(len(rows) > 1))]] = 0
    return fold


def fit_and_score(
    train: LabeledFeatures,
    validation: LabeledFeatures | None,
    test: LabeledFeatures,
    class_count: int,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, float]:
    """(images, classes) of the test images, and the chosen C.

    That is the C of the highest accuracy, the strongest penalty of equal ones; 1 where there is nothing to choose on.
    ValueError where fewer than two classes occur in training.
    """
    if len(np.unique(train[1])) < 2:
        raise ValueError("A linear probe needs training images of at least two classes.")
    if validation is None:
        both, fold = train, make_validation_fold(train[1], rng)
    else:
        both = tuple(map(np.concatenate, zip(train, validation, strict=True)))
        fold = np.repeat([-1, 0], [len(train[1]), len(validation[1])])
    regression = LogisticRegression(max_iter=MAX_ITERATIONS)
    chooses = 0 in fold and len(np.unique(both[1][fold < 0])) > 1
    if chooses:  # and fits the best again, to both
        regression = GridSearchCV(regression, {"C": INVERSE_PENALTIES.tolist()}, cv=PredefinedSplit(fold))
    regression.fit(*both)
    scores = torch.full((len(test[1]), class_count), -1e9, dtype=torch.double)  # a class that was never seen
    decision = regression.decision_function(test[0])
    decision = np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision
    scores[:, torch.as_tensor(regression.classes_)] = torch.from_numpy(decision).double()
    return scores, float(regression.best_params_["C"]) if chooses else 1.0


def evaluate(args: LinearProbeArguments) -> list[Record]:
    """Measure and write; returns the records."""
    check_output_file(args.output)
    prompts = load_prompts(args.benchmark)
    names = [args.train_split, args.split, *([args.validation_split] if args.validation_split else [])]
    loaded = {}
    for name in names:
        data = load_split(args, name, prompts.english_names)
        if any(isinstance(label, list) for label in data.labels):
            raise ValueError("The linear probe needs one label an image; this data set has lists of labels.")
        if same := [
            other for other, known in loaded.items() if known.images.image_digests == data.images.image_digests
        ]:
            raise ValueError(  # such a figure would be of what was fitted
                f"The splits {same[0]!r} and {name!r} hold the same images. "
                "A linear probe needs a folder of splits, such as train/ and test/ with a folder a class in each."
            )
        loaded[name] = data
    store = open_store(args)
    started = time.perf_counter()
    features, skipped = [], {}
    for name, data in loaded.items():
        images = store.embed_images(data.images, f"Images, {name}")
        features.append((images.embeds.numpy(), np.array(data.labels)[images.rows.numpy()]))
        skipped |= {f"{name} {row}": why for row, why in images.skipped.items()}
    if not process_state().is_main_process:
        return []
    train, test, validation = (*features, None)[:3]
    records, chosen, labels, classes = [], {}, test[1].tolist(), len(prompts.names)
    for shots in args.shots or [None]:
        name = f"{shots}-shot" if shots else "full"
        results, chosen[name] = [], []
        for draw in tqdm(range(args.draws if shots else 1), desc=f"Regression, {name}", unit="draw"):
            generator = np.random.default_rng([args.seed, draw, shots or 0])
            rows = sample_few_shot(train[1], shots, generator) if shots else slice(None)
            part = train[0][rows], train[1][rows]
            scores, penalty = fit_and_score(part, validation if not shots else None, test, classes, generator)
            results.append(compute_classification_metrics(scores, labels, prompts.metric))
            chosen[name].append(penalty)
        for metric, value in pandas.DataFrame(results).mean(skipna=False).items():
            records.append(
                Record(
                    task="linear_probe", dataset=prompts.benchmark, split=args.split, language="", protocol=name,
                    direction="", metric=metric, value=float(value), n=len(labels), model=args.role,
                    model_folder=args.model, chance=compute_chance(metric, labels, classes),
                )
            )  # fmt: skip
    facts = {"dataset": args.images, "fingerprint": loaded[args.split].fingerprint(), "skipped": skipped}
    write_result(args, records, store, started, **facts, chosen_penalties=chosen)
    return records


main = partial(run_evaluation, LinearProbeArguments, __doc__, evaluate)

if __name__ == "__main__":
    run_command(main, resumable=True)
