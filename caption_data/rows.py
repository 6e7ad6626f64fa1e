"""Columns of caption rows, the choice of captions, and the record of rows that cannot be used.

A row is a dict with `captions-<language>` (list of original captions), `generated-captions-<language>` (list of
captions written by a model) and `similarities-<language>` (list of image-caption cosines under the base model: first
those of the original captions, then those of the generated captions). The caption strategies and their constants are
those of CAPIVARA, arXiv 2310.13683.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from datasets import List, Value

from capivara_common.cli import check_at_least, check_between, flag
from capivara_common.files import write_text
from capivara_common.image_files import BadRow

CAPTIONS_FEATURE = List(Value("string"))
SIMILARITIES_FEATURE = List(Value("float32"))
CAPTION_COLUMN_RE = re.compile(r"(generated-)?captions-[\w-]+")  # column names of the CAPIVARA authors
SIMILARITY_COLUMN_RE = re.compile(r"similarities-[\w-]+")
DATASET_HELP = (
    "Dataset: a saved Hugging Face dataset, a folder or glob pattern of parquet files or WebDataset tars, a folder of "
    "images with metadata.jsonl or metadata.csv, or a Hub id."
)
# Reason of a row that the pair filter or the caption strategy leaves out. Such a row does not count as bad.
NOT_CHOSEN = "not chosen"
STRATEGIES = ("none", "first", "all", "rank", "threshold", "diverse")
SIMILARITY_STRATEGIES = ("rank", "threshold", "diverse")
# A token is a run of characters other than white space and punctuation; a single letter is a token. `\w+` would split
# Hindi words at their vowel signs, which Python does not count as word characters.
TOKEN_PATTERN = r"[^\s!-/:-@\[-`{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u0964\u0965\u2010-\u2027\u2030-\u205e\u3000-\u303f]+"


@dataclass(frozen=True)
class SkippedRow:
    """One line of `skipped.jsonl`: a row, or the rest of a damaged archive, that is left out.

    Attributes:
        source: Name of the dataset.
        split: Name of the split.
        row: Number of the row in the split, from 0.
        reason: "not chosen", "no image", "unreadable image", "absurd image size", "no caption" or "damaged archive".
        detail: What is wrong, in words.
    """

    source: str
    split: str
    row: int
    reason: str
    detail: str


def normalize_captions(value: Any, column: str) -> list[str]:
    """Convert the captions of a row, in any form that a dataset may have, to a list of texts.

    Each caption keeps its position, so that similarities stay next to their captions. Lone surrogates are replaced:
    JSON can hold them, but no tokenizer or Arrow file accepts them.

    Args:
        value: A text, a list of texts and None, or None.
        column: Name of the column, for the error.

    Returns:
        One text per caption, "" for None.

    Raises:
        BadRow: If the value is something else than texts.
    """
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or any(not isinstance(text, str | None) for text in values):
        raise BadRow("no caption", f"{column!r} must hold a list of texts, got {value!r}")
    return [replace_surrogates(text or "") for text in values]


def json_digest(value: Any, sort_keys: bool = False) -> str:
    """Return the BLAKE2b-128 hex digest of a JSON value."""
    return blake2b(json.dumps(value, sort_keys=sort_keys).encode(), digest_size=16).hexdigest()


def rows_fingerprint(rows: Iterable[tuple[str, list[str]]]) -> str:
    """Return a hex digest of rows and their order; a row is the hex digest of its image and its captions."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates by "?"; JSON can hold them, but no Arrow file accepts them."""
    return text.encode("utf-8", "replace").decode()


def write_skipped_rows(path: Path, skipped: list[SkippedRow]) -> None:
    """Write skipped rows as JSON lines. An empty list writes no file."""
    if skipped:  # names of archive members need not be UTF-8: `json.dumps` escapes them
        write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in skipped))


@dataclass(kw_only=True)
class CaptionChoice:
    """Choice of the captions of a row: the flags of every command that selects captions.

    The strategy `diverse` takes the captions of `threshold` from the most to the least similar, and keeps a caption if
    its TF-IDF cosine with each caption kept before is at most `max_overlap`. If fewer than `min_kept` captions remain,
    it adds the most similar of the dropped captions.
    """

    caption_strategy: Literal["none", "first", "all", "rank", "threshold", "diverse"] = flag(
        "none",
        "Captions of an image to use; training draws one of them at every step. none: the original captions. first: "
        "the original captions and the first `caption_count` generated ones. all: original and generated captions. "
        "rank: the `caption_count` captions most similar to the image. threshold: captions with a similarity of at "
        "least `min_similarity`. diverse: captions of threshold that differ from each other.",
    )
    # The default values are those of the released CAPIVARA models.
    caption_count: int = flag(5, "Number of captions, for the strategies first and rank.")
    min_similarity: float = flag(0.2, "Lowest image-caption cosine that the strategies threshold and diverse accept.")
    min_pair_similarity: float | None = flag(
        None, "Leave out images whose cosine with their first caption is lower (pair filter). Default: no pair filter."
    )
    # Constants of the strategy `diverse`; no flag changes them.
    max_overlap, min_kept = 0.3, 3

    def check_choice(self) -> None:
        """Raise ValueError if the strategy is unknown or a number is out of range."""
        if self.caption_strategy not in STRATEGIES:
            raise ValueError(f"caption_strategy must be one of {', '.join(STRATEGIES)}, got {self.caption_strategy!r}.")
        check_at_least(self, 1, "caption_count")
        check_between(self, -1, 1, "min_similarity", "min_pair_similarity")

    def strategy_columns(self, language: str) -> list[str]:
        """Return the names of the columns that the strategy reads."""
        names = [f"captions-{language}"]
        if self.caption_strategy != "none":
            names.append(f"generated-captions-{language}")
        if self.caption_strategy in SIMILARITY_STRATEGIES:
            names.append(f"similarities-{language}")
        return names

    def choose_captions(self, row: dict, language: str) -> list[str]:
        """Return the captions of a row that the strategy and the pair filter choose.

        A repeated caption counts once, at its first position. `none`, `first` and `all` keep the order of the row, with
        the generated captions after the original ones. The other strategies put the most similar captions first; ties
        keep the order of the row, and NaN ranks lowest.

        Args:
            row: A row with the columns of `strategy_columns(language)`, and the similarities if `min_pair_similarity`
                is set.
            language: Language code at the end of the names of the columns.

        Returns:
            The captions in the order of the strategy. Empty if no caption passes, or if the similarity of the first
            original caption is below `min_pair_similarity`.

        Raises:
            ValueError: If a column is missing, or the number of similarities differs from the number of captions.
        """
        strategy, captions = self.caption_strategy, _get_list_column(row, f"captions-{language}")
        if self.min_pair_similarity is not None:
            generated = row.get(f"generated-captions-{language}")
            generated_count = None if generated is None else len(generated)
            similarities = _get_similarities(row, language, len(captions), generated_count)
            if not captions or similarities[0] < self.min_pair_similarity:
                return []
        if strategy == "none":
            return _deduplicate(captions)
        texts = [*captions, *_get_list_column(row, f"generated-captions-{language}")]
        if strategy == "all":
            return _deduplicate(texts)
        if strategy == "first":
            return _deduplicate(texts)[: len(_deduplicate(captions)) + self.caption_count]
        similarities = _get_similarities(row, language, len(captions), len(texts) - len(captions))
        # The sort is stable, so ties keep the order of the row.
        ranked = sorted(range(len(texts)), key=lambda i: -similarities[i])
        if strategy == "rank":
            return _deduplicate(texts[i] for i in ranked)[: self.caption_count]
        passed = _deduplicate(texts[i] for i in ranked if similarities[i] >= self.min_similarity)
        if strategy == "threshold" or len(passed) <= self.min_kept:
            return passed
        return _select_diverse(passed, _deduplicate(texts), self)


def _get_list_column(row: dict, name: str) -> list:
    """Return the list in a column. Raises ValueError if there is none."""
    if isinstance(row.get(name), str | None):
        raise ValueError(
            f"The column {name!r} must hold a list, got {row.get(name)!r} in a row with the columns {sorted(row)}. Add "
            "the column (empty lists are fine), or choose a caption strategy that does not need it: `none` needs only "
            "the original captions."
        )
    return row[name]


def _get_similarities(row: dict, language: str, caption_count: int, generated_count: int | None) -> list[float]:
    """Return one similarity per caption, with NaN and None as minus infinity.

    If `generated_count` is None, the number of generated captions is unknown, and there may be more similarities.
    """
    name = f"similarities-{language}"
    similarities, needed = _get_list_column(row, name), caption_count + (generated_count or 0)
    if len(similarities) < needed or (generated_count is not None and len(similarities) > needed):
        raise ValueError(
            f"{name!r} has {len(similarities)} numbers for {needed} captions ({caption_count} original, "
            f"{generated_count or 0} generated); it must hold one number for each caption, in that order. Run "
            "captions.score again, or choose a strategy that needs no similarities: none, first or all."
        )
    return [-math.inf if value is None or math.isnan(value) else value for value in similarities]


def _deduplicate(texts: Iterable[str]) -> list[str]:
    """Return the distinct texts in the order of their first occurrence."""
    return list(dict.fromkeys(texts))


def _select_diverse(ranked: list[str], corpus: list[str], choice: CaptionChoice) -> list[str]:
    """Return the captions that differ from each other, for the strategy `diverse` of `CaptionChoice`.

    `ranked` are the candidates, the most similar to the image first. The TF-IDF weights are those of `corpus`, all
    captions of the row.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=TOKEN_PATTERN)
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in corpus):  # only punctuation: the vectorizer would raise, and nothing overlaps
        return ranked
    # Shape: (captions, terms). Each row has unit length, or is zero if the caption has no term.
    vectors = vectorizer.fit(corpus).transform(ranked)
    # Floating-point error can make the cosine of two copies slightly larger than 1, which `max_overlap` 1 must allow.
    overlaps = (vectors @ vectors.T).toarray().round(9)
    kept_indices = []
    for i in range(len(ranked)):
        if all(overlaps[i, j] <= choice.max_overlap for j in kept_indices):
            kept_indices.append(i)
    dropped_indices = [i for i in range(len(ranked)) if i not in kept_indices]
    kept_indices += dropped_indices[: max(0, choice.min_kept - len(kept_indices))]
    return [ranked[i] for i in sorted(kept_indices)]
