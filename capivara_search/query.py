"""Arithmetic of queries: relevance feedback, the relevance threshold, and classification with free labels.

Feedback moves the vector of a query towards or away from words or pictures (Rocchio relevance feedback) and excludes
nothing. The threshold is the score below which pictures are no closer to the sentence than to sentences without
content. The constants were chosen by `python -m benchmarks.nothing_fits` (docs/search.md). `sample` is always an array
of vectors that were drawn from the index.
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
# Strength of feedback of weight 1, relative to the query. At twice this value, half of the pictures that match the
# query would lose their place together with the pictures that `less` names (measured by benchmarks.nothing_fits).
FEEDBACK_STRENGTH = 0.5
SAMPLE_ROWS = 2000  # vectors that are drawn from an index
# In a model's folder, written by `benchmarks.nothing_fits --keep`: its `auc` measures how well the best score tells
# sentences that fit a picture of the index from sentences that fit none.
RELEVANCE_AUC_FILE = "nothing_fits.json"
AUTO_THRESHOLD_MIN_AUC = 0.8  # from this AUC on, the threshold is used without being asked for
NEUTRAL_SENTENCES = (  # sentences without content, in Portuguese like the captions that CAPIVARA was trained on
    *("uma imagem", "uma foto", "uma fotografia de alguma coisa", "isto é uma imagem", "uma imagem qualquer", "algo"),
    *("uma foto comum", "uma imagem sem nada de especial", "o que se vê aqui", "imagem"),
)
# Quantile over the neutral sentences. It is low, because a relevant picture below the threshold is the worse error.
BACKGROUND_QUANTILE = 0.25


def parse_feedback(text: str) -> tuple[float, str]:
    """Split "0.5:pessoas" into the weight 0.5 and the words "pessoas". Without a weight, as in "pessoas", it is 1.

    Raises:
        ValueError: If the text is empty, the weight is not above 0 and at most `MAX_FEEDBACK_WEIGHT`, or no words
            follow it.
    """
    if not text.strip():
        raise localized_error(ValueError, "empty_feedback")
    weight, words = 1.0, text.strip()
    prefix, colon, rest = text.partition(":")
    if colon:
        with suppress(ValueError):  # the text before the colon is not a number but words
            weight, words = float(prefix.replace(",", ".")), rest.strip()
    if not (words and 0 < weight <= MAX_FEEDBACK_WEIGHT):
        raise localized_error(ValueError, "bad_feedback", text=text, most=MAX_FEEDBACK_WEIGHT)
    return weight, words


def apply_feedback(
    vector: np.ndarray | None, feedback: Iterable[tuple[float, np.ndarray]], sample: np.ndarray
) -> np.ndarray:
    """Move a query vector towards or away from other vectors (Rocchio relevance feedback).

    Each vector is divided by the standard deviation of its cosines with the sample. Pictures differ much more in their
    cosine with another picture than in their cosine with a sentence, so that a picture would outweigh a sentence
    otherwise.

    Args:
        vector: Query (width,), of a sentence or a picture; None if the feedback alone makes the query.
        feedback: Weights and vectors (width,) of sentences or pictures. A negative weight moves the query away.
        sample: Vectors (pictures, width) of the index, of unit length.

    Returns:
        The new query vector (width,), not normalized.
    """
    weighted_vectors = [(FEEDBACK_STRENGTH * weight, direction) for weight, direction in feedback]
    weighted_vectors += [] if vector is None else [(1.0, vector)]
    spreads = [max((sample @ other).std(), 1e-6) if len(sample) else 1.0 for _, other in weighted_vectors]
    return sum(weight * other / spread for (weight, other), spread in zip(weighted_vectors, spreads, strict=True))


def z_score(score: float, scores: np.ndarray) -> float:
    """Return how many standard deviations a score is above the mean of other scores.

    Args:
        score: The score.
        scores: The other scores (pictures,).

    Returns:
        The standard score; negative if the score is below the mean.
    """
    return float((score - scores.mean()) / max(scores.std(), 1e-6))


def background_z_score(
    sample: np.ndarray, neutral_vectors: Sequence[np.ndarray], best_cosines: Sequence[float]
) -> float:
    """Return the standard score that the best picture reaches for a sentence without content.

    Args:
        sample: Vectors (pictures, width) of the index, of unit length.
        neutral_vectors: Vectors (width,) of the neutral sentences.
        best_cosines: Cosine of each neutral sentence with its best picture in the whole index.

    Returns:
        The quantile `BACKGROUND_QUANTILE` of the standard scores over the neutral sentences.
    """
    z_scores = [z_score(best, sample @ vector) for vector, best in zip(neutral_vectors, best_cosines, strict=True)]
    return float(np.quantile(z_scores, BACKGROUND_QUANTILE))


def supports_relevance_threshold(folder: Path) -> bool:
    """Return whether the model in a folder was measured to recognize sentences that fit no picture of an index."""
    with suppress(OSError, ValueError, TypeError, KeyError):  # the file is missing or damaged
        return read_json(folder / RELEVANCE_AUC_FILE)["auc"] >= AUTO_THRESHOLD_MIN_AUC
    return False


def check_labels(labels: Sequence[str], template: str) -> list[str]:
    """Check the labels and the sentence of a classification.

    Args:
        labels: Labels, one or more.
        template: Sentence with one {} that a label replaces.

    Returns:
        The labels without superfluous blanks.

    Raises:
        ValueError: If `labels` is a single text or empty, a label is empty or occurs twice, or the template does not
            have exactly one {}.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of words, got the text {labels[:80]!r}. Write [{labels[:80]!r}].")
    labels = [" ".join(str(label).split()) for label in labels]
    counts = Counter(label.casefold() for label in labels)
    if not labels or not all(labels):
        raise localized_error(ValueError, "empty_label")
    if repeated := [label for label in labels if counts[label.casefold()] > 1]:
        raise localized_error(ValueError, "label_twice", label=repeated[0])
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise localized_error(ValueError, "bad_template", template=template)
    return labels


def classify_vectors(
    model: "SearchModel", paths: Sequence[str], vectors: np.ndarray, labels: Sequence[str], template: str
) -> list[Classification]:
    """Find the label that describes each picture best (zero-shot classification).

    Args:
        model: Model that embedded the pictures.
        paths: Paths of the pictures.
        vectors: Vectors (pictures, width) of the pictures, of unit length.
        labels: Labels, as `check_labels` returns them.
        template: Sentence with one {} that a label replaces.

    Returns:
        One classification per picture. Its label is None if the first neutral sentence fits better than all labels.
    """
    texts = model.embed_texts([*(template.replace("{}", label) for label in labels), NEUTRAL_SENTENCES[0]])
    cosines = np.asarray(vectors, np.float32) @ texts.T  # (pictures, labels + 1)
    if model.logit_bias is None:
        logits = model.logit_scale * (cosines[:, :-1] - cosines[:, :-1].max(axis=1, keepdims=True))
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    else:
        shares = model.scale_scores(cosines[:, :-1])
    results = []
    for path, picture_cosines, picture_shares in zip(paths, cosines, shares, strict=True):
        best = int(picture_cosines.argmax())
        label = labels[best] if best < len(labels) else None
        shares_by_label = dict(zip(labels, picture_shares.tolist(), strict=True))
        results.append(Classification(path, label, shares_by_label))
    return results
