"""Which captions of an image are trained on, and which pairs: pure functions of a row.

    python -c "from caption_data.selection import CaptionChoice; print(CaptionChoice('rank').columns('pt'))"

A row is a dict with `captions-<language>` (list, the originals), `generated-captions-<language>` (list) and
`similarities-<language>` (list, the image-caption cosine under the base model: captions, then generated ones). The
strategies and their constants are those of CAPIVARA, arXiv 2310.13683.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from common.cli import between, flag

STRATEGIES = ("none", "first", "all", "rank", "threshold", "diverse")
WITH_SIMILARITIES = ("rank", "threshold", "diverse")
# A token is a run of anything but blanks and punctuation, one letter included. `\w+` would cut Hindi words at their
# vowel signs, which Python does not count as word characters.
TOKEN_PATTERN = r"[^\s!-/:-@\[-`{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u0964\u0965\u2010-\u2027\u2030-\u205e\u3000-\u303f]+"


@dataclass(frozen=True)
class CaptionChoice:
    """Which captions of a row are used. Raises ValueError where a value is out of its range.

    `none` is the originals only; `first` adds the first `count` generated ones; `all` adds all generated ones; `rank`
    is the `count` most similar to the image, originals and generated ones alike; `threshold` is all whose similarity is
    at least `min_similarity`; `diverse` takes those, most similar first, and keeps a caption whose TF-IDF cosine with
    every kept one is at most `max_overlap`.
    """

    strategy: str = "none"
    count: int = 5  # captions of `first` and `rank`, at least 1; the released recipe, arXiv 2310.13683
    min_similarity: float = 0.2  # cosine of image and caption, -1 to 1
    max_overlap: float = 0.3  # TF-IDF cosine of two captions, 0 to 1
    min_kept: int = 3  # `diverse` fills up to so many, at least 1, with the most similar of those that it dropped

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}.")
        for name in ("count", "min_kept"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}.")
        for name, lowest in (("min_similarity", -1), ("max_overlap", 0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= 1:
                raise ValueError(f"{name} must be a number from {lowest} to 1, got {value!r}.")

    def columns(self, language: str) -> list[str]:
        """The columns of a row that the strategy looks at."""
        names = [f"captions-{language}"]
        if self.strategy != "none":
            names.append(f"generated-captions-{language}")
        if self.strategy in WITH_SIMILARITIES:
            names.append(f"similarities-{language}")
        return names


@dataclass(kw_only=True)
class CaptionChoiceArguments:
    """The flags of every command that chooses captions."""

    caption_strategy: Literal["none", "first", "all", "rank", "threshold", "diverse"] = flag(
        "none",
        "Which captions of an image are kept, or one is drawn from at every step of a training: none = the originals; "
        "first = these and the first `caption_count` generated; all; rank = the `caption_count` most similar to the "
        "image; threshold = those of `min_similarity` at least; diverse = of these, those unlike each other.",
    )
    caption_count: int = flag(5, "Captions of the strategies first and rank.")
    min_similarity: float = flag(0.2, "Image-caption cosine that threshold and diverse ask for.")
    min_pair_similarity: float | None = flag(
        None, "Leave out images whose first caption is less similar to them; all stay where none is given."
    )

    def check_choice(self) -> None:
        """Raise ValueError where a value is out of its range."""
        self.choice()
        between(self, -1, 1, "min_pair_similarity")

    def choice(self) -> CaptionChoice:
        return CaptionChoice(self.caption_strategy, self.caption_count, self.min_similarity)

    def chosen(self, row: dict, language: str) -> list[str]:
        """`choose_captions` of a row, none where it does not pass the pair filter. Raises ValueError as these do."""
        if self.min_pair_similarity is not None and not pair_passes(row, language, self.min_pair_similarity):
            return []
        return choose_captions(row, language, self.choice())


def choose_captions(row: dict, language: str, choice: CaptionChoice) -> list[str]:
    """The captions of a row that `choice` picks; it has the columns of `choice.columns(language)`.

    A caption that occurs twice counts once, at its first position: so `first` and `rank` give
    `count` different ones where there are as many.

    Returns:
        `none`, `first`, `all`: originals, then generated ones, in the order of the row. `rank`, `threshold`,
        `diverse`: the most similar first, ties in the order of the row, NaN as the lowest. Empty when nothing passes.

    Raises:
        ValueError: a column is missing, or the similarities are not one for each caption.
    """
    captions = _column(row, f"captions-{language}", choice.strategy)
    if choice.strategy == "none":
        return _distinct(captions)
    generated = _column(row, f"generated-captions-{language}", choice.strategy)
    if choice.strategy in ("first", "all"):
        originals, both = _distinct(captions), _distinct([*captions, *generated])
        return both if choice.strategy == "all" else both[: len(originals) + choice.count]

    similarities = _similarities(row, language, len(captions), len(generated), choice.strategy)
    texts = [*captions, *generated]
    ranked = sorted(range(len(texts)), key=lambda i: -similarities[i])  # a stable sort: ties keep the row's order
    if choice.strategy == "rank":
        return _distinct(texts[i] for i in ranked)[: choice.count]
    passed = _distinct(texts[i] for i in ranked if similarities[i] >= choice.min_similarity)
    if choice.strategy == "threshold" or len(passed) <= choice.min_kept:
        return passed
    return _diverse(passed, _distinct(texts), choice)


def pair_passes(row: dict, language: str, min_similarity: float) -> bool:
    """Whether the first original caption fits its image; a row without one, or with NaN for it, does not pass.

    CAPIVARA's `min_similarity` is 0.2. With generated captions there, all similarities are counted. Raises ValueError
    as `choose_captions`.
    """
    captions = _column(row, f"captions-{language}", "pair_passes")
    generated = row.get(f"generated-captions-{language}")
    surplus = None if generated is None else len(generated)
    similarities = _similarities(row, language, len(captions), surplus, "pair_passes")
    return bool(captions) and similarities[0] >= min_similarity


def _column(row: dict, name: str, user: str) -> list:
    if row.get(name) is None:
        raise ValueError(
            f"{user!r} needs the column {name!r}, which this row lacks; it has {sorted(row)}. Add the column (an empty "
            "list is fine), or choose a strategy that does without: `none` needs the original captions alone."
        )
    if isinstance(row[name], str):
        raise ValueError(f"The column {name!r} must hold a list, got the text {row[name]!r}. Put it in a list.")
    return row[name]


def _similarities(row: dict, language: str, captions: int, generated: int | None, user: str) -> list[float]:
    """One number a caption, NaN and None as minus infinity; with `generated` None there may be more than captions."""
    name = f"similarities-{language}"
    similarities = _column(row, name, user)
    needed = captions + (generated or 0)
    if len(similarities) < needed or (generated is not None and len(similarities) > needed):
        raise ValueError(
            f"{name!r} has {len(similarities)} numbers for {needed} captions ({captions} original, {generated or 0} "
            "generated): it must hold one for each, in that order. Score the rows anew, or choose a strategy that "
            "needs no similarities: none, first or all."
        )
    return [-math.inf if value is None or math.isnan(value) else value for value in similarities]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _diverse(ranked: list[str], corpus: list[str], choice: CaptionChoice) -> list[str]:
    """Those of `ranked`, most similar first, that repeat no kept one; term weights come from the whole `corpus`."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=TOKEN_PATTERN)
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in corpus):  # only punctuation: the vectorizer would refuse, and nothing overlaps
        return ranked
    vectors = vectorizer.fit(corpus).transform(ranked)  # (captions, terms), unit length, or zero without a term
    # Rounding takes the cosine of a caption with its copy a little over 1, which `max_overlap` 1 allows.
    overlaps = (vectors @ vectors.T).toarray().round(9)
    kept = []
    for i in range(len(ranked)):
        if all(overlaps[i, j] <= choice.max_overlap for j in kept):
            kept.append(i)
    dropped = [i for i in range(len(ranked)) if i not in kept]
    kept += dropped[: max(0, choice.min_kept - len(kept))]
    return [ranked[i] for i in sorted(kept)]
