"""Arithmetic of queries: relevance feedback, the relevance threshold, and classification with free labels.

Relevance feedback moves the vector of a query towards or away from words or pictures. The relevance threshold separates
pictures that match a sentence from pictures that do not. Both compare vectors with a `sample`: an array of picture
vectors that were drawn from the index. The constants were chosen by `python -m benchmarks.nothing_fits`
(docs/how-to/search.md).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from capivara_common.files import read_json
from capivara_search.messages import make_error_from_code
from capivara_search.results import Classification

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

MAX_FEEDBACK_WEIGHT = 4
# Strength of feedback with the weight 1; the query itself has the strength 1. This strength was chosen with
# `benchmarks.nothing_fits`. With twice this strength, words that the user wants less of would worsen the rank not
# only of the pictures that show them, but also of half of the pictures that match the query.
FEEDBACK_STRENGTH = 0.5
SAMPLE_ROWS = 2000  # maximum number of vectors drawn from an index to estimate mean and standard deviation of scores
# File in a model's folder, written by `benchmarks.nothing_fits --keep`. Its key `auc` is an area under the ROC curve.
# It measures how well the score of the best picture tells whether any picture of an index matches a sentence.
RELEVANCE_AUC_FILE = "nothing_fits.json"
AUTO_THRESHOLD_MIN_AUC = 0.8  # models with at least this AUC use the relevance threshold by default
# Sentences that describe no particular picture. They are in Portuguese, like the captions that CAPIVARA was trained on.
NEUTRAL_SENTENCES = (
    *("uma imagem", "uma foto", "uma fotografia de alguma coisa", "isto é uma imagem", "uma imagem qualquer", "algo"),
    *("uma foto comum", "uma imagem sem nada de especial", "o que se vê aqui", "imagem"),
)
# Quantile of the neutral sentences' z-scores that becomes the threshold. The quantile is low, because marking a
# relevant picture as irrelevant is a worse error than marking an irrelevant picture as relevant.
BACKGROUND_QUANTILE = 0.25


def parse_weighted_feedback(text: str) -> tuple[float, str]:
    """Split feedback such as "0.5:pessoas" into its weight 0.5 and its words "pessoas".

    The words move a search towards (`--more`) or away from (`--less`) what they describe.

    Args:
        text: Words, optionally preceded by a weight and a colon. The weight can have a decimal point or comma.

    Returns:
        Tuple of the weight (default: 1) and the words.

    Raises:
        ValueError: If there are no words, or the weight is not above 0 and at most `MAX_FEEDBACK_WEIGHT`.
    """
    if not text.strip():
        raise make_error_from_code(ValueError, "empty_feedback")
    weight, words = 1.0, text.strip()
    prefix, colon, rest = text.partition(":")
    if colon:
        # If the text before the colon is not a number, the text has no weight, and the colon belongs to the words.
        with suppress(ValueError):
            weight, words = float(prefix.replace(",", ".")), rest.strip()
    if not (words and 0 < weight <= MAX_FEEDBACK_WEIGHT):
        raise make_error_from_code(ValueError, "bad_feedback", text=text, most=MAX_FEEDBACK_WEIGHT)
    return weight, words


def apply_feedback(
    vector: np.ndarray | None, feedback: Iterable[tuple[float, np.ndarray]], sample: np.ndarray
) -> np.ndarray:
    """Move a query vector towards or away from other vectors (Rocchio relevance feedback).

    Args:
        vector: Vector (width,) of the query. None: the feedback alone is the query.
        feedback: Pairs of a weight and the vector (width,) of a sentence or picture. A positive weight moves the query
            towards the vector, a negative weight away from it.
        sample: Vectors (pictures, width) drawn from the index, of unit length. They are needed to scale the other
            vectors. If the sample is empty, nothing is scaled.

    Returns:
        The new query vector (width,), not normalized: the weighted sum of all scaled vectors.
    """
    # Each vector is divided by the standard deviation of its cosines with the sample. A picture's cosines vary much
    # more than a sentence's cosines, so pictures would outweigh sentences without the division.
    weighted_vectors = [(FEEDBACK_STRENGTH * weight, direction) for weight, direction in feedback]
    weighted_vectors += [] if vector is None else [(1.0, vector)]
    spreads = [max((sample @ other).std(), 1e-6) if len(sample) else 1.0 for _, other in weighted_vectors]
    return sum(weight * other / spread for (weight, other), spread in zip(weighted_vectors, spreads, strict=True))


def z_score(score: float, scores: np.ndarray) -> float:
    """Compute how many standard deviations a score lies above the mean of a set of scores (z-score).

    Args:
        score: The score to convert.
        scores: Set of scores (pictures,), from which the mean and the standard deviation are computed.

    Returns:
        The z-score; negative if the score is below the mean.
    """
    return float((score - scores.mean()) / max(scores.std(), 1e-6))


def estimate_relevance_z_score_threshold(
    sample: np.ndarray, neutral_vectors: Sequence[np.ndarray], best_cosines: Sequence[float]
) -> float:
    """Estimate the relevance threshold of an index. A search marks pictures with a lower z-score as irrelevant.

    The z-score of a picture is its cosine with a sentence, in standard deviations above the mean of the sample's
    cosines. The threshold is the z-score that the best picture reaches by chance, for neutral sentences such as "uma
    imagem" ("an image").

    Args:
        sample: Vectors (pictures, width) drawn from the index, of unit length.
        neutral_vectors: Vector (width,) of each neutral sentence, of unit length.
        best_cosines: For each neutral sentence, its cosine with the nearest picture of the index.

    Returns:
        The threshold, a z-score.
    """
    # Cosines of different sentences are not comparable, so they are converted to z-scores.
    z_scores = [z_score(best, sample @ vector) for vector, best in zip(neutral_vectors, best_cosines, strict=True)]
    return float(np.quantile(z_scores, BACKGROUND_QUANTILE))


def is_relevance_auc_of_model_high_enough(folder: Path) -> bool:
    """Return whether the relevance threshold is reliable for a model. If so, searches apply it by default.

    Args:
        folder: Folder of the model. Its file `RELEVANCE_AUC_FILE` has the measured AUC (area under the ROC curve).

    Returns:
        True if the AUC is at least `AUTO_THRESHOLD_MIN_AUC`. False if it is lower, or if the file is missing or
        damaged.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):  # the file is missing or damaged
        return read_json(folder / RELEVANCE_AUC_FILE)["auc"] >= AUTO_THRESHOLD_MIN_AUC
    return False


def clean_and_check_labels(labels: Sequence[str], template: str) -> list[str]:
    """Check the labels and the sentence template of a zero-shot classification, and normalize spaces in labels.

    Args:
        labels: Words or phrases to choose from, at least one.
        template: Sentence with the placeholder {} for the label, such as "uma imagem de {}".

    Returns:
        The labels, with single spaces between words and without spaces at both ends.

    Raises:
        ValueError: If `labels` is a string or empty, a label is empty or repeated (ignoring case), or the template does
            not have exactly one {}.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of words, got the text {labels[:80]!r}. Write [{labels[:80]!r}].")
    labels = [" ".join(str(label).split()) for label in labels]
    counts = Counter(label.casefold() for label in labels)
    if not labels or not all(labels):
        raise make_error_from_code(ValueError, "empty_label")
    if repeated := [label for label in labels if counts[label.casefold()] > 1]:
        raise make_error_from_code(ValueError, "label_twice", label=repeated[0])
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise make_error_from_code(ValueError, "bad_template", template=template)
    return labels


def classify_vectors(
    model: "SearchModel", paths: Sequence[str], vectors: np.ndarray, labels: Sequence[str], template: str
) -> list[Classification]:
    """Find the label that describes each picture best, by comparing vectors (zero-shot classification).

    Args:
        model: Model that embedded the pictures.
        paths: Path of each picture.
        vectors: Vectors (pictures, width) of the pictures, of unit length.
        labels: Labels, as `clean_and_check_labels` returns them.
        template: Sentence with the placeholder {} for the label, such as "uma imagem de {}".

    Returns:
        One classification per picture, in the order of `paths`. The label is None if the neutral sentence "uma imagem"
        ("an image") fits the picture better than every label.
    """
    texts = model.embed_texts([*(template.replace("{}", label) for label in labels), NEUTRAL_SENTENCES[0]])
    # Array (pictures, labels + 1). The last column belongs to the neutral sentence "uma imagem" ("an image").
    cosines = np.asarray(vectors, np.float32) @ texts.T
    if model.logit_bias is None:
        logits = model.logit_scale * (cosines[:, :-1] - cosines[:, :-1].max(axis=1, keepdims=True))
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    else:
        shares = model.scale_scores(cosines[:, :-1])
    choices = [*labels, None]  # None: the neutral sentence
    return [
        Classification(path, choices[best], dict(zip(labels, picture_shares, strict=True)))
        for path, best, picture_shares in zip(paths, cosines.argmax(axis=1), shares.tolist(), strict=True)
    ]
