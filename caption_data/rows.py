"""Rows of captions: their columns, which captions of one are used, rows that cannot be, and digests of those that can.

A row is a dict with `captions-<language>` (list, the originals), `generated-captions-<language>` (list) and
`similarities-<language>` (list, the image-caption cosine under the base model: captions, then generated ones). The
strategies and their constants are those of CAPIVARA, arXiv 2310.13683.
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
CAPTION_COLUMN_RE = re.compile(r"(generated-)?captions-[\w-]+")  # the authors' names
SIMILARITY_COLUMN_RE = re.compile(r"similarities-[\w-]+")
DATASET_HELP = (
    "Saved HF dataset, folder or pattern of parquet files or WebDataset tars, folder of images with metadata.jsonl or "
    "metadata.csv, or a Hub id."
)
NOT_CHOSEN = "not chosen"  # reason: by the pair filter or the caption strategy; left out, but not bad
STRATEGIES = ("none", "first", "all", "rank", "threshold", "diverse")
SIMILARITY_STRATEGIES = ("rank", "threshold", "diverse")
# A token is a run of anything but blanks and punctuation, one letter included. `\w+` would cut Hindi words at their
# vowel signs, which Python does not count as word characters.
TOKEN_PATTERN = r"[^\s!-/:-@\[-`{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u0964\u0965\u2010-\u2027\u2030-\u205e\u3000-\u303f]+"


@dataclass(frozen=True)
class SkippedRow:
    """One line of `skipped.jsonl`: a row, or the rest of an archive, that is left out."""

    source: str
    split: str
    row: int
    # not chosen, no image, unreadable image, absurd image size, no caption, damaged archive
    reason: str
    detail: str


def normalize_captions(value: Any, column: str) -> list[str]:
    """The captions of a row, out of any column of a source: one text, a list of texts and None, or None.

    They are as many as there were, so that similarities stay beside theirs; "" for None. Lone surrogates, which JSON
    can hold and no tokenizer or Arrow file takes, are replaced. Raises BadRow where they are no texts.
    """
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or any(not isinstance(text, str | None) for text in values):
        raise BadRow("no caption", f"{column!r} must hold a list of texts, it is {value!r}")
    return [replace_surrogates(text or "") for text in values]


def json_digest(value: Any, sort_keys: bool = False) -> str:
    """Hex digest of a JSON value."""
    return blake2b(json.dumps(value, sort_keys=sort_keys).encode(), digest_size=16).hexdigest()


def rows_fingerprint(rows: Iterable[tuple[str, list[str]]]) -> str:
    """Hex digest of rows, of each the hex `image_digest` and the captions, in their order."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def replace_surrogates(text: str) -> str:
    """A text without lone surrogates, which JSON can hold and no Arrow file takes."""
    return text.encode("utf-8", "replace").decode()


def write_skipped_rows(path: Path, skipped: list[SkippedRow]) -> None:
    """One JSON object a line; no file where nothing was skipped."""
    if skipped:  # ASCII: names of archive members can hold what is not UTF-8
        write_text(path, "".join(json.dumps(asdict(line)) + "\n" for line in skipped))


@dataclass(kw_only=True)
class CaptionChoice:
    """Which captions of a row are used: the flags of every command that chooses.

    `diverse` takes the captions of `threshold`, most similar first, and keeps one whose TF-IDF cosine with every kept
    one is at most `max_overlap`; it fills up to `min_kept` with the most similar of those that it dropped.
    """

    caption_strategy: Literal["none", "first", "all", "rank", "threshold", "diverse"] = flag(
        "none",
        "Which captions of an image are kept, or one is drawn from at every step of a training: none = the originals; "
        "first = these and the first `caption_count` generated; all; rank = the `caption_count` most similar to the "
        "image; threshold = those of `min_similarity` at least; diverse = of these, those unlike each other.",
    )
    caption_count: int = flag(5, "Captions of the strategies first and rank.")  # the released recipe
    min_similarity: float = flag(0.2, "Image-caption cosine that threshold and diverse ask for.")
    min_pair_similarity: float | None = flag(
        None, "Leave out images whose first caption is less similar to them; null, or none given: all stay."
    )
    max_overlap, min_kept = 0.3, 3  # no flags

    def check_choice(self) -> None:
        """Raise ValueError where a value is out of its range."""
        if self.caption_strategy not in STRATEGIES:
            raise ValueError(f"caption_strategy must be one of {', '.join(STRATEGIES)}, got {self.caption_strategy!r}.")
        check_at_least(self, 1, "caption_count")
        check_between(self, -1, 1, "min_similarity", "min_pair_similarity")

    def strategy_columns(self, language: str) -> list[str]:
        """The columns of a row that the strategy looks at."""
        names = [f"captions-{language}"]
        if self.caption_strategy != "none":
            names.append(f"generated-captions-{language}")
        if self.caption_strategy in SIMILARITY_STRATEGIES:
            names.append(f"similarities-{language}")
        return names

    def choose_captions(self, row: dict, language: str) -> list[str]:
        """The captions of a row that are used; it has the columns of `columns_of(language)`.

        A caption that occurs twice counts once, at its first position. `none`, `first` and `all` keep the order of the
        row, generated ones after originals; of the others the most similar are first, ties in the order of the row, NaN
        as the lowest. Empty when nothing passes, or where the first original caption is not as similar to the image as
        `min_pair_similarity` asks. Raises ValueError where a column is missing, or similarities are not one a caption.
        """
        strategy, captions = self.caption_strategy, _get_list_column(row, f"captions-{language}")
        if (least := self.min_pair_similarity) is not None:
            there = row.get(f"generated-captions-{language}")
            similarities = _get_similarities(row, language, len(captions), None if there is None else len(there))
            if not captions or similarities[0] < least:
                return []
        if strategy == "none":
            return _deduplicate(captions)
        texts = [*captions, *_get_list_column(row, f"generated-captions-{language}")]
        if strategy == "all":
            return _deduplicate(texts)
        if strategy == "first":
            return _deduplicate(texts)[: len(_deduplicate(captions)) + self.caption_count]
        similarities = _get_similarities(row, language, len(captions), len(texts) - len(captions))
        ranked = sorted(range(len(texts)), key=lambda i: -similarities[i])  # a stable sort: ties keep the row's order
        if strategy == "rank":
            return _deduplicate(texts[i] for i in ranked)[: self.caption_count]
        passed = _deduplicate(texts[i] for i in ranked if similarities[i] >= self.min_similarity)
        if strategy == "threshold" or len(passed) <= self.min_kept:
            return passed
        return _select_diverse(passed, _deduplicate(texts), self)


def _get_list_column(row: dict, name: str) -> list:
    if isinstance(row.get(name), str | None):
        raise ValueError(
            f"The column {name!r} must hold a list, this row has {row.get(name)!r} there, of {sorted(row)}. Add the "
            "column (an empty list is fine), or choose a strategy that does without: `none` needs the original "
            "captions alone."
        )
    return row[name]


def _get_similarities(row: dict, language: str, caption_count: int, generated_count: int | None) -> list[float]:
    """One number a caption, NaN and None as minus infinity; with `generated` None there may be more than captions."""
    name = f"similarities-{language}"
    similarities, needed = _get_list_column(row, name), caption_count + (generated_count or 0)
    if len(similarities) < needed or (generated_count is not None and len(similarities) > needed):
        raise ValueError(
            f"{name!r} has {len(similarities)} numbers for {needed} captions ({caption_count} original, {generated_count or 0} "
            "generated): it must hold one for each, in that order. Score the rows anew, or choose a strategy that "
            "needs no similarities: none, first or all."
        )
    return [-math.inf if value is None or math.isnan(value) else value for value in similarities]


def _deduplicate(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _select_diverse(ranked: list[str], corpus: list[str], choice: CaptionChoice) -> list[str]:
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
