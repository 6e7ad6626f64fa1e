"""Define the columns of caption datasets, choose captions of an image, and record rows that can't be used.

A row of a caption dataset is a dict with these keys:

- `captions-<language>`: list of the original captions.
- `generated-captions-<language>`: list of the captions that a model wrote.
- `similarities-<language>`: list with the cosine similarity between the image and each caption, first for the original
  captions, then for the generated captions.

A caption strategy is a rule that selects some captions of a row. The strategies come from CAPIVARA, arXiv 2310.13683.
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
# The similarities in a row are computed with the base model, that is, the model before fine-tuning.
SIMILARITIES_FEATURE = List(Value("float32"))
# Names of caption columns, such as "captions-pt" and "generated-captions-pt" in the datasets of the CAPIVARA authors.
CAPTION_COLUMN_RE = re.compile(r"(generated-)?captions-[\w-]+")
SIMILARITY_COLUMN_RE = re.compile(r"similarities-[\w-]+")
DATASET_HELP = (
    "Dataset: a saved Hugging Face dataset, a folder or glob pattern of parquet files or WebDataset tars, a folder of "
    "images with metadata.jsonl or metadata.csv, or a Hub id."
)
# `SkippedRow.reason` of a row that is skipped because the pair filter or the caption strategy chooses none of its
# captions. Such a row does not count as bad, because its data is valid.
NOT_CHOSEN = "not chosen"
STRATEGIES = ("none", "first", "all", "rank", "threshold", "diverse")
SIMILARITY_STRATEGIES = ("rank", "threshold", "diverse")  # strategies that read the column `similarities-<language>`
# Words of a caption for the strategy `diverse`: one or more characters other than white space and punctuation. The
# pattern `\w+` would split Hindi words at their vowel signs, because Python does not count them as word characters.
TOKEN_PATTERN = r"[^\s!-/:-@\[-`{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u0964\u0965\u2010-\u2027\u2030-\u205e\u3000-\u303f]+"


@dataclass(frozen=True)
class SkippedRow:
    """A dataset row that a command skipped, with the reason. Commands write these rows to the file `skipped.jsonl`.

    Attributes:
        source: Path, glob pattern or Hub id of the dataset.
        split: Name of the split.
        row: Index of the row in the split. For a damaged archive: number of rows before the damage.
        reason: "not chosen", "no image", "unreadable image", "absurd image size", "invalid embedding" or "no caption".
            "damaged archive" stands for all unreadable rows of a tar or JSON Lines file.
        detail: Description of the problem for the user.
    """

    source: str
    split: str
    row: int
    reason: str
    detail: str


def convert_to_caption_list(value: Any, column: str) -> list[str]:
    """Convert the value of a caption column, which may be a text or a list, to a list of valid texts.

    Lone surrogates (halves of a UTF-16 pair) are replaced by "?".

    Args:
        value: Value of the column in one row: a text, a list whose entries are texts or None, or None.
        column: Name of the column, for the error message.

    Returns:
        One text per caption, in order; "" for a caption that is None. The list is empty if `value` is None or "".

    Raises:
        BadRow: If the value has another type.
    """
    # A missing caption (None) becomes "" and is not left out, so that captions stay at the positions of their
    # similarities.
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or any(not isinstance(text, str | None) for text in values):
        raise BadRow("no caption", f"{column!r} must hold a list of texts, got {value!r}")
    return [replace_surrogates(text or "") for text in values]


def compute_image_caption_rows_digest(rows: Iterable[tuple[str, list[str]]]) -> str:
    """Compute a single digest of all images and captions of a dataset, so that changed data can be detected.

    Args:
        rows: One tuple (hex digest of the image, list of captions) per row of the dataset.

    Returns:
        BLAKE2b-128 hex digest. It changes if an image, a caption or the order of the rows changes.
    """
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates (halves of a UTF-16 pair) in a text by "?".

    JSON can contain lone surrogates, but Arrow files do not accept them.
    """
    return text.encode("utf-8", "replace").decode()


def write_skipped_rows(path: Path, skipped: list[SkippedRow]) -> None:
    """Write one line for each skipped row to a JSON Lines file. If no row was skipped, no file is written."""
    # `json.dumps` escapes all non-ASCII characters, because names of archive members may contain invalid UTF-8.
    if skipped:
        write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in skipped))


@dataclass(kw_only=True)
class CaptionChoice:
    """Command-line arguments that choose captions of an image; shared by all commands that select captions.

    The help text of `caption_strategy` describes the strategies. `diverse` takes the captions of `threshold`, from the
    most to the least similar to the image, and drops a caption that shares too many words with a caption kept before.
    If fewer than `min_kept` captions are kept, the most similar dropped captions are added.
    """

    caption_strategy: Literal["none", "first", "all", "rank", "threshold", "diverse"] = flag(
        "none",
        "Which captions of an image to use; training draws one at every step. none: the original captions. first: "
        "the original captions and the first `caption_count` generated ones. all: original and generated captions. "
        "rank: the `caption_count` captions most similar to the image. threshold: captions with a similarity of at "
        "least `min_similarity`. diverse: captions as for threshold that differ from each other.",
    )
    # The default values are the settings of the released CAPIVARA models.
    caption_count: int = flag(5, "Number of captions per image. Only for the strategies first and rank.")
    min_similarity: float = flag(0.2, "Lowest image-caption cosine that the strategies threshold and diverse accept.")
    min_pair_similarity: float | None = flag(
        None,
        "Pair filter: skip an image if its cosine with its first original caption is below this value. Default: no "
        "filter.",
    )
    # Constants of the strategy `diverse`; no flag changes them. `max_overlap` is the largest allowed cosine between the
    # TF-IDF vectors of two captions. At least `min_kept` captions are kept, even if they overlap more.
    max_overlap, min_kept = 0.3, 3

    def check_choice(self) -> None:
        """Check the values of the flags.

        Raises:
            ValueError: If the caption strategy is unknown, or a number is out of range.
        """
        if self.caption_strategy not in STRATEGIES:
            raise ValueError(f"caption_strategy must be one of {', '.join(STRATEGIES)}, got {self.caption_strategy!r}.")
        check_at_least(self, 1, "caption_count")
        check_between(self, -1, 1, "min_similarity", "min_pair_similarity")

    def strategy_columns(self, language: str) -> list[str]:
        """Return the names of the dataset columns that the caption strategy reads.

        If the filter `min_pair_similarity` is set, callers must add the column `similarities-<language>`.

        Args:
            language: Language code at the end of the column names, such as "pt" for the column `captions-pt`.
        """
        names = [f"captions-{language}"]
        if self.caption_strategy != "none":
            names.append(f"generated-captions-{language}")
        if self.caption_strategy in SIMILARITY_STRATEGIES:
            names.append(f"similarities-{language}")
        return names

    def choose_captions(self, row: dict, language: str) -> list[str]:
        """Choose the captions of one dataset row that training or evaluation uses, by the values of the flags.

        Args:
            row: A row with the columns of `strategy_columns(language)`. If `min_pair_similarity` is set, it must also
                have the column of similarities.
            language: Language code at the end of the column names.

        Returns:
            The chosen captions without duplicates. The strategies `rank`, `threshold` and `diverse` put the most
            similar caption first, and captions without a similarity (NaN or None) last. The others keep the order of
            the row, with generated captions last. Empty if no caption passes, or if the similarity of the first
            original caption is below `min_pair_similarity`.

        Raises:
            ValueError: If a column is missing, or the number of similarities differs from the number of captions.
        """
        strategy, captions = self.caption_strategy, _get_required_list(row, f"captions-{language}")
        if self.min_pair_similarity is not None:
            similarities = _get_similarities_with_nan_as_minus_infinity(row, language)
            if not captions or similarities[0] < self.min_pair_similarity:
                return []
        if strategy == "none":
            return _deduplicate(captions)
        texts = [*captions, *_get_required_list(row, f"generated-captions-{language}")]
        if strategy == "all":
            return _deduplicate(texts)
        if strategy == "first":
            return _deduplicate(texts)[: len(_deduplicate(captions)) + self.caption_count]
        similarities = _get_similarities_with_nan_as_minus_infinity(row, language)
        # The sort is stable, so ties keep the order of the row.
        ranked = sorted(range(len(texts)), key=lambda i: -similarities[i])
        if strategy == "rank":
            return _deduplicate(texts[i] for i in ranked)[: self.caption_count]
        passed = _deduplicate(texts[i] for i in ranked if similarities[i] >= self.min_similarity)
        if strategy == "threshold" or len(passed) <= self.min_kept:
            return passed
        return _select_diverse(passed, _deduplicate(texts), self)


def _get_required_list(row: dict, name: str) -> list:
    """Return the list in the column `name` of a row. Raises ValueError if the column is missing, None or a text."""
    if isinstance(row.get(name), str | None):
        raise ValueError(
            f"The column {name!r} must hold a list, got {row.get(name)!r} in a row with the columns {sorted(row)}. Add "
            "the column (empty lists are fine), or choose a caption strategy that does not need it: `none` needs only "
            "the original captions."
        )
    return row[name]


def _get_similarities_with_nan_as_minus_infinity(row: dict, language: str) -> list[float]:
    """Return the similarities of a row, with minus infinity instead of NaN and None.

    Args:
        row: A row with the columns `captions-<language>` and `similarities-<language>`. If it has no column
            `generated-captions-<language>`, it may have more similarities than original captions.
        language: Language code at the end of the column names.

    Returns:
        First the similarities of the original captions, then the similarities of the generated captions.

    Raises:
        ValueError: If the column is missing, or it does not hold one similarity per caption.
    """
    name = f"similarities-{language}"
    captions, generated = row[f"captions-{language}"], row.get(f"generated-captions-{language}")
    similarities, needed = _get_required_list(row, name), len(captions) + len(generated or [])
    if len(similarities) < needed or (generated is not None and len(similarities) > needed):
        raise ValueError(
            f"{name!r} has {len(similarities)} numbers for {needed} captions ({len(captions)} original, "
            f"{len(generated or [])} generated). It must have one number per caption, first for the original ones. Run "
            "captions.score again, or choose a caption strategy that needs no similarities: none, first or all."
        )
    return [-math.inf if value is None or math.isnan(value) else value for value in similarities]


def _deduplicate(texts: Iterable[str]) -> list[str]:
    """Return the distinct texts in the order of their first occurrence."""
    return list(dict.fromkeys(texts))


def _select_diverse(ranked: list[str], corpus: list[str], choice: CaptionChoice) -> list[str]:
    """Return captions that differ from each other, for the strategy `diverse` (see `CaptionChoice`).

    Args:
        ranked: Distinct captions to choose from, the most similar to the image first.
        corpus: All distinct captions of the row, from which the TF-IDF weights are computed.
        choice: Command-line arguments, of which the constants `max_overlap` and `min_kept` are used.

    Returns:
        The chosen captions, in the order of `ranked`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=TOKEN_PATTERN)
    analyze = vectorizer.build_analyzer()
    # The vectorizer raises an error if no text has a token. Texts without tokens do not overlap, so all are returned.
    if not any(analyze(text) for text in corpus):
        return ranked
    # TF-IDF vectors of shape (captions, terms). A vector has unit length, or is zero if the caption has no term.
    vectors = vectorizer.fit(corpus).transform(ranked)
    # Floating-point error can make the cosine of two equal vectors slightly larger than 1. Without rounding, a caption
    # could then be dropped even if `max_overlap` is 1, which allows any overlap.
    overlaps = (vectors @ vectors.T).toarray().round(9)
    kept_indices = []
    for i in range(len(ranked)):
        if all(overlaps[i, j] <= choice.max_overlap for j in kept_indices):
            kept_indices.append(i)
    dropped_indices = [i for i in range(len(ranked)) if i not in kept_indices]
    kept_indices += dropped_indices[: max(0, choice.min_kept - len(kept_indices))]
    return [ranked[i] for i in sorted(kept_indices)]
