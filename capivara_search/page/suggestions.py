"""Words that are worth searching for: of some three hundred common nouns, those that stand out in the collection.

suggestions = Suggestions(index)
while suggestions.embed_more("pt"):  # a few words at a time
    pass
suggestions.best("pt")  # ["praia", "cachorro", ...]
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from capivara_search.results import TEMPLATE

if TYPE_CHECKING:
    from capivara_search.index import PictureIndex

NOUNS = Path(__file__).parent / "words" / "nouns.txt"  # a line each: Portuguese = English
AT_ONCE = 16  # words that are embedded in one turn, between the questions of visitors
PICTURES = 1000  # that are looked at, the newest
SHOWN = 10  # words
NEAREST = 3  # pictures that a word is judged by; fewer in a small collection
TEMPLATES = {"pt": TEMPLATE, "en": "an image of {}"}


class Suggestions:
    """Embeds the nouns once for each language, and ranks them anew where the index has changed."""

    def __init__(self, index: "PictureIndex"):
        self._index = index
        self._vectors: dict[str, list[np.ndarray]] = {language: [] for language in TEMPLATES}
        self.ended = False  # whether no more words will be embedded, for an error
        self._best: dict[str, tuple[int, list[str]]] = {}  # language -> version of the index, words

    def embed_more(self, language: str) -> bool:
        """Embed the next words; whether there were any."""
        done = self._vectors[language]
        start = len(done)
        words = nouns(language)[start : start + AT_ONCE]
        if words:  # at their own places: a turn that was given up may still end, after the one that came for it
            done[start : start + AT_ONCE] = self._index.model.texts([TEMPLATES[language].format(w) for w in words])
        return bool(words)

    def best(self, language: str) -> list[str] | None:
        """Words that stand out, best first; None where they are not embedded yet."""
        if len(self._vectors[language]) < len(nouns(language)):
            return [] if self.ended else None
        version = self._index.version()
        if self._best.get(language, (None,))[0] != version:
            paths = [hit.path for hit in self._index.newest(PICTURES)]
            try:
                pictures = self._index.vectors(paths) if paths else np.empty((0, self._index.model.width))
            except KeyError:  # some are about to be embedded anew, by this model
                return []
            words = standing_out(np.stack(self._vectors[language]), pictures)
            self._best[language] = (version, [nouns(language)[word] for word in words])
        return self._best[language][1]


@cache
def nouns(language: str) -> list[str]:
    """The words, "pt" or "en", each pair of languages at the same place."""
    lines = NOUNS.read_text(encoding="utf-8").splitlines()
    return [line.split(" = ")[language == "en"] for line in lines]


def standing_out(words: np.ndarray, pictures: np.ndarray, count: int = SHOWN) -> list[int]:
    """The words that some pictures fit much better than other words and other pictures do.

    Args:
        words: (words, width), unit length.
        pictures: (pictures, width), unit length.
        count: of words that are wanted.

    Returns:
        Rows of `words`, best first. They have different pictures, so that each leads elsewhere; there may be fewer.
    """
    if not len(pictures):
        return []
    scores = words @ pictures.T  # (words, pictures)
    scores = scores - scores.mean(axis=0)  # some pictures are near to all words
    if len(pictures) > 2 * NEAREST:
        scores -= scores.mean(axis=1, keepdims=True)  # and some words to all pictures
    near = min(NEAREST, max(1, len(pictures) // 4))
    nearest = np.argsort(-scores, axis=1)[:, :near]
    strength = np.take_along_axis(scores, nearest, axis=1).mean(axis=1)
    chosen: list[int] = []
    for word in np.argsort(-strength):
        if all(len(set(nearest[word]) & set(nearest[other])) <= near // 2 for other in chosen):
            chosen.append(int(word))
        if len(chosen) == count:
            break
    return chosen
