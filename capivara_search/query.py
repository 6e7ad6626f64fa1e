"""What a question is made of beside its sentence: what pulls at it, and what no picture answers; labels for pictures.

`sample` are vectors of the index. Steering is arithmetic with vectors, and excludes nothing. Both were chosen by what
`python -m benchmarks.nothing_fits` measures (docs/search.md).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from capivara_common.files import read_json
from capivara_search.messages import localized_error
from capivara_search.results import Classification

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

MAX_FEEDBACK_WEIGHT = 4
FEEDBACK_STRENGTH = 0.5  # of a pull of weight 1; at twice that half of what is looked for goes with what shall sink
SAMPLE_ROWS = 2000  # vectors of an index
RELEVANCE_AUC_FILE = (
    "nothing_fits.json"  # in a model's folder: its `auc`, as `benchmarks.nothing_fits --keep` writes it
)
AUTO_THRESHOLD_MIN_AUC = 0.8  # from which on the line is drawn without being asked for
NEUTRAL_SENTENCES = (
    *("uma imagem", "uma foto", "uma fotografia de alguma coisa", "isto é uma imagem", "uma imagem qualquer", "algo"),
    *("uma foto comum", "uma imagem sem nada de especial", "o que se vê aqui", "imagem"),
)
BACKGROUND_QUANTILE = 0.25  # of the neutral sentences: low, for what fits and stands below the line is the worse error


def parse_feedback(text: str) -> tuple[float, str]:
    """Weight and words of "0.5:pessoas", or of "pessoas", whose weight is 1. Raises ValueError."""
    weight, words = 1.0, text.strip()
    before, colon, rest = text.partition(":")
    with suppress(ValueError):  # a word stands before the colon
        weight, words = (float(before.replace(",", ".")), rest.strip()) if colon else (weight, words)
    if not (words and 0 < weight <= MAX_FEEDBACK_WEIGHT):
        raise localized_error(ValueError, "bad_pull", text=text, most=MAX_FEEDBACK_WEIGHT)
    return weight, words


def apply_feedback(
    vector: np.ndarray | None, feedback: Iterable[tuple[float, np.ndarray]], sample: np.ndarray
) -> np.ndarray:
    """A query's vector (width,), pulled towards others, or away from them.

    Args:
        vector: (width,), of a sentence or picture; None where the pulls alone decide.
        pulls: weights, below 0 for away, and vectors (width,), of sentences or pictures.
        sample: (pictures, width), unit length. Each vector counts by how far it tells these apart: a picture does so
            much further than a sentence, and would drown it.
    """
    together = [(FEEDBACK_STRENGTH * weight, pull) for weight, pull in feedback]
    together += [] if vector is None else [(1.0, vector)]
    spread = [max((sample @ one).std(), 1e-6) if len(sample) else 1.0 for _, one in together]
    return sum(weight * one / much for (weight, one), much in zip(together, spread, strict=True))


def z_score(score: float, scores: np.ndarray) -> float:
    """How many standard deviations a score is above the mean of others."""
    return float((score - scores.mean()) / max(scores.std(), 1e-6))


def background_z_score(
    sample: np.ndarray, neutral_vectors: Sequence[np.ndarray], best_cosines: Sequence[float]
) -> float:
    """How many deviations above the mean the best picture is where there is nothing to find.

    By the vectors of neutral sentences, (width,), and the cosine of each with its best picture.
    """
    found = [z_score(one, sample @ vector) for vector, one in zip(neutral_vectors, best_cosines, strict=True)]
    return float(np.quantile(found, BACKGROUND_QUANTILE))


def supports_relevance_threshold(folder: Path) -> bool:
    """Whether a model, by its folder, was measured to tell well enough what is not there."""
    with suppress(OSError, ValueError, TypeError, KeyError):  # not there, or damaged
        return read_json(folder / RELEVANCE_AUC_FILE)["auc"] >= AUTO_THRESHOLD_MIN_AUC
    return False


def check_labels(labels: Sequence[str], template: str) -> list[str]:
    """The labels, without blanks around them.

    Raises ValueError: there is none, one is empty or there twice, or the template has no place for one.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of words, got the text {labels[:80]!r}. Write [{labels[:80]!r}].")
    labels = [" ".join(str(label).split()) for label in labels]
    times = Counter(label.casefold() for label in labels)
    if not labels or not all(labels):
        raise localized_error(ValueError, "empty_label")
    if twice := [label for label in labels if times[label.casefold()] > 1]:
        raise localized_error(ValueError, "label_twice", label=twice[0])
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise localized_error(ValueError, "bad_template", template=template)
    return labels


def classify_vectors(
    model: "SearchModel", paths: Sequence[str], vectors: np.ndarray, labels: Sequence[str], template: str
) -> list[Classification]:
    """The best label of each picture, by its vector (pictures, width), of unit length; none where `NEUTRAL` fits best.

    `labels` are as `checked_labels` returns them; in the sentence `template` they stand at `{}`.
    """
    texts = model.embed_texts([*(template.replace("{}", label) for label in labels), NEUTRAL_SENTENCES[0]])
    cosines = np.asarray(vectors, np.float32) @ texts.T  # (pictures, labels + 1)
    if model.logit_bias is None:
        own = model.logit_scale * (cosines[:, :-1] - cosines[:, :-1].max(axis=1, keepdims=True))
        shares = np.exp(own) / np.exp(own).sum(axis=1, keepdims=True)
    else:
        shares = model.scale_scores(cosines[:, :-1])
    found = []
    for path, row, share in zip(paths, cosines, shares, strict=True):
        best = int(row.argmax())
        label = labels[best] if best < len(labels) else None
        found.append(Classification(path, label, dict(zip(labels, share.tolist(), strict=True))))
    return found
