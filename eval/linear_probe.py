"""Logistic regression on frozen image embeddings, with all training images or a few of each class.

    python -m eval.linear_probe --model MODEL --benchmark cifar-10 --images DATASET --output results/probe.json
    python -m eval.linear_probe --model MODEL --benchmark cifar-10 --images DATASET --shots 1 2 4 8 16 --output p.json

The penalty is chosen on the validation split, or on a fifth of the training images where there is none, then the
regression is fitted to both (ELEVATER, arXiv 2204.08790, section 4). Few-shot figures are means over draws.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from capivara_common.cli import run_command
from capivara_common.environment import processes
from capivara_common.files import check_output_file
from caption_data.labelled_images import LabelledImages
from eval.classification import chance_of, classification_metrics, load_split
from eval.embeddings import EmbeddingStore
from eval.eval_arguments import LinearProbeArguments
from eval.measurement import open_store, run_evaluation, write_result
from eval.prompts import load_prompts
from records.schema import Record

PENALTIES = np.logspace(-3, 5, 9)  # inverse strengths C, from strong to weak
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Features:
    """Embedded images (images, width) and their classes (images,)."""

    embeds: np.ndarray
    labels: np.ndarray

    def subset(self, rows: np.ndarray) -> "Features":
        """The features of some images."""
        return Features(self.embeds[rows], self.labels[rows])


def embed(store: EmbeddingStore, data: LabelledImages, description: str) -> tuple[Features, dict[int, str]]:
    """The images that can be read, and why the others can't.

    Raises:
        ValueError: an image has several labels, which a regression for one label can't use.
    """
    images = store.images(data.images, description)
    labels = [data.labels[row] for row in images.rows.tolist()]
    if any(isinstance(label, list) for label in labels):
        raise ValueError("The linear probe needs one label an image; this data set has lists of labels.")
    return Features(images.embeds.numpy(), np.array(labels)), images.skipped


def few_of_each(labels: np.ndarray, shots: int, generator: np.random.Generator) -> np.ndarray:
    """Rows of `shots` images of each class, of all where a class has fewer."""
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([generator.permutation(of)[:shots] for of in rows])


def held_out(labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to choose on: a fifth of each class, none of a class with a single image."""
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        chosen[rows[: max(len(rows) // 5, int(len(rows) > 1))]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def probe_scores(
    train: Features, validation: Features | None, test: Features, classes: int, generator: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """(images, classes) of the test images, and the chosen C.

    Raises:
        ValueError: fewer than two classes occur in training.
    """
    if len(np.unique(train.labels)) < 2:
        raise ValueError("A linear probe needs training images of at least two classes.")
    part = both = train
    if validation is None:
        part, validation = map(train.subset, held_out(train.labels, generator))
    else:
        pairs = (train.embeds, validation.embeds), (train.labels, validation.labels)
        both = Features(*map(np.concatenate, pairs))
    best = _best_penalty(part, validation)
    fitted = _fitted(both, best)
    scores = torch.full((len(test.labels), classes), -1e9, dtype=torch.double)  # a class that was never seen
    decision = fitted.decision_function(test.embeds)
    decision = np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision
    scores[:, torch.as_tensor(fitted.classes_)] = torch.from_numpy(decision).double()
    return scores, best


def _best_penalty(train: Features, validation: Features) -> float:
    """The C of the highest accuracy, the strongest penalty of equal ones; 1 where there is nothing to choose on."""
    if not len(validation.labels) or len(np.unique(train.labels)) < 2:
        return 1.0
    rights = [(_fitted(train, c).predict(validation.embeds) == validation.labels).mean() for c in PENALTIES]
    return float(PENALTIES[int(np.argmax(rights))])


def evaluate(args: LinearProbeArguments) -> list[Record]:
    """Measure and write; returns the records."""
    check_output_file(args.output)
    prompts = load_prompts(args.benchmark)
    splits = [args.train_split, args.validation_split, args.split]
    loaded = [load_split(args, name, prompts.names_en) if name else None for name in splits]
    _check_apart(splits, loaded)
    store = open_store(args)
    started = time.perf_counter()
    embedded = [
        embed(store, data, f"Images, {name}") if data else (None, {}) for name, data in zip(splits, loaded, strict=True)
    ]
    store.close()
    if not processes().is_main_process:
        return []
    (train, _), (validation, _), (test, _) = embedded
    records, chosen = [], {}
    for shots in args.shots or [None]:
        name = f"{shots}-shot" if shots else "full"
        results, chosen[name] = [], []
        for draw in tqdm(range(args.draws if shots else 1), desc=f"Regression, {name}", unit="draw"):
            generator = np.random.default_rng([args.seed, draw, shots or 0])
            part = train.subset(few_of_each(train.labels, shots, generator)) if shots else train
            scores, penalty = probe_scores(part, validation if not shots else None, test, len(prompts.names), generator)
            results.append(classification_metrics(scores, test.labels.tolist(), prompts.metric))
            chosen[name].append(penalty)
        for metric in results[0]:
            records.append(
                Record(
                    task="linear_probe", dataset=prompts.benchmark, split=args.split, language="", protocol=name,
                    direction="", metric=metric, value=statistics.fmean(result[metric] for result in results),
                    n=len(test.labels), model=args.role, model_folder=args.model,
                    chance=chance_of(metric, test.labels.tolist(), len(prompts.names)),
                )
            )  # fmt: skip
    skipped = {
        f"{name} {row}": why for name, (_, bad) in zip(splits, embedded, strict=True) for row, why in bad.items()
    }
    parts = {"chosen_penalties": chosen, "skipped": skipped}
    write_result(args, records, args.images, loaded[2].fingerprint(), store, started, **parts)
    return records


def _check_apart(names: list[str | None], data: list[LabelledImages | None]) -> None:
    """Raise ValueError where two splits are the same images: such a figure would be of what was fitted."""
    seen: dict[str, int] = {}
    for number, images in enumerate(data):
        if images is not None and seen.setdefault(images.images.digest, number) != number:
            raise ValueError(
                f"The splits {names[seen[images.images.digest]]!r} and {names[number]!r} hold the same images. "
                "A linear probe needs a folder of splits, such as train/ and test/ with a folder a class in each."
            )


def _fitted(features: Features, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS).fit(features.embeds, features.labels)


main = partial(run_evaluation, LinearProbeArguments, __doc__, evaluate)

if __name__ == "__main__":
    run_command(main, resumes=True)
