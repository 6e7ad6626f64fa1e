"""Which of some labels fits a picture best, and whether any does.

Beside the labels' sentences competes one that says nothing (`NEUTRAL`): where it fits a picture best, no label does.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from capivara_search.results import Classified
from capivara_search.words import failure

if TYPE_CHECKING:
    from capivara_search.models import SearchModel

NEUTRAL = "uma imagem"
MAX_LABELS = 1_000


def checked_labels(labels: Sequence[str], template: str) -> list[str]:
    """The labels, without blanks around them.

    Raises ValueError: there is none, too many, one is empty or there twice, or the template has no place for one.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of words, got the text {labels[:80]!r}. Write [{labels[:80]!r}].")
    labels = [" ".join(str(label).split()) for label in labels]
    times = Counter(label.casefold() for label in labels)
    if not labels or not all(labels):
        raise failure(ValueError, "empty_label")
    if twice := [label for label in labels if times[label.casefold()] > 1]:
        raise failure(ValueError, "label_twice", label=twice[0])
    if len(labels) > MAX_LABELS:
        raise failure(ValueError, "many_labels", most=MAX_LABELS, number=len(labels))
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise failure(ValueError, "bad_template", template=template)
    return labels


def classify_vectors(
    model: "SearchModel", paths: Sequence[str], vectors: np.ndarray, labels: Sequence[str], template: str
) -> list[Classified]:
    """The best label of each picture, by its vector (pictures, width), of unit length.

    `labels` are as `checked_labels` returns them; in the sentence `template` they stand at `{}`.
    """
    texts = model.texts([*(template.replace("{}", label) for label in labels), NEUTRAL])
    cosines = np.asarray(vectors, np.float32) @ texts.T  # (pictures, labels + 1)
    if model.logit_bias is None:
        own = model.logit_scale * (cosines[:, :-1] - cosines[:, :-1].max(axis=1, keepdims=True))
        shares = np.exp(own) / np.exp(own).sum(axis=1, keepdims=True)
    else:
        shares = model.on_own_scale(cosines[:, :-1])
    found = []
    for path, row, share in zip(paths, cosines, shares, strict=True):
        best = int(row.argmax())
        label = labels[best] if best < len(labels) else None
        found.append(Classified(path, label, dict(zip(labels, share.tolist(), strict=True))))
    return found
