"""Find translations and captions that look wrong, with simple rules. A quality flag is the name of a problem.

The rules are chosen to accept translations by people, and to detect typical failures of translation models.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import regex

from capivara_common.files import read_json
from caption_data.rows import TOKEN_PATTERN
from captions.languages import parse_language

QUALITY_FILE = "quality.json"  # file with the number of texts with each quality flag, in the output folder of a stage
# Quality flags of unusable answers of a language model: the model refused the request, or its answer was cut off.
# `captions.chat.answers` sets them.
REFUSED, TRUNCATED = "refused", "truncated"
QUALITY_FLAGS = ("empty", "copy", "wrong script", "length", "markup", REFUSED, TRUNCATED)
# Largest length of a generated caption, as counted by `_count_letters`. A longer text gets the flag "length", because
# it is probably not a caption. CLIP reads only about 250 letters.
MAX_CAPTION_LETTERS = 600
# Texts of at most this number of words may be equal to their translation, because they may be names, for example "Rio
# de Janeiro". An equal translation of a longer text is flagged as a copy.
MAX_NAME_WORDS = 3
# Smallest share of letters that must be in the script of the language. The share is low because brands and names keep
# their script, so that half of the letters of a Hindi caption may be Latin.
MIN_SCRIPT_SHARE = 0.3
# Languages that are written in more than one script. If their code names no script, letters of any script are accepted.
TWO_SCRIPT_LANGUAGES = ("az", "kk", "ku", "pa", "sr", "tk", "ug", "uz")
# Script code of ISO 15924 -> characters of the script, for use in a regular expression. Most codes are also names of
# Unicode scripts. Only the other codes are listed here: combinations of several Unicode scripts (Jpan), and variants of
# a Unicode script (Hans).
SCRIPT_PATTERNS = {
    "Hans": r"\p{Hani}",
    "Hant": r"\p{Hani}",
    "Jpan": r"\p{Hani}\p{Hira}\p{Kana}",
    "Kore": r"\p{Hang}\p{Hani}",
}
LETTER_RE, DENSE_SCRIPT_RE = regex.compile(r"\p{L}"), regex.compile(r"[\p{Hani}\p{Hira}\p{Kana}\p{Hang}]")
# The length looks wrong if the longer of source and translation has more than `3 * length of the shorter + 20`
# characters, of which a Chinese, Japanese or Korean one counts as 3. The 20 allow for short words: "cat" in Zulu is
# "isilwane sasekhaya". Endless repetitions have this flag only, because there is no rule for repeated words.
MAX_LENGTH_RATIO, LENGTH_SLACK_LETTERS, LETTERS_PER_DENSE_SIGN = 3, 20, 3
# Markup that must not occur in a translation: HTML entities and tags, and symbols that translation models write by
# mistake. These symbols are SentencePiece's symbols for an unknown token and for a blank, the replacement character of
# Unicode, and language tokens such as `>>por<<`.
MARKUP_RE = re.compile(
    r"&(?:[a-zA-Z][a-zA-Z0-9]{1,9}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});|</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|<!--"
    r"|\u2047|\u2581|\ufffd|>>[\w-]+<<|__[a-z]{2,3}__"
)


def find_translation_quality_flags(source: str, translation: str, language: str) -> list[str]:
    """Find problems of a translation with simple rules.

    Args:
        source: Sentence that was translated.
        translation: Its translation.
        language: Language code of the translation.

    Returns:
        A list of the problems. It is empty if the translation looks right or the source is blank.

        - "empty": The translation is blank or, unlike the source, has no letter or digit.
        - "copy": The translation has the same words as the source, more than `MAX_NAME_WORDS`.
        - "wrong script": Too few letters are in the script of the language.
        - "length": The translation is much longer or shorter than the source.
        - "markup": The translation contains HTML, or symbols that models write by mistake.
    """
    if not source.strip():
        return []
    if not translation.strip() or (_has_letters(source) and not _has_letters(translation)):
        return ["empty"]
    words = _split_words(source)
    short, long = sorted(map(_count_letters, (source, translation)))
    checks = {
        "copy": len(words) > MAX_NAME_WORDS and words == _split_words(translation),
        "wrong script": _has_wrong_script(translation, language),
        "length": long > MAX_LENGTH_RATIO * short + LENGTH_SLACK_LETTERS,
        "markup": bool(MARKUP_RE.search(translation)),
    }
    return [name for name, is_flagged in checks.items() if is_flagged]


def find_caption_quality_flags(caption: str, language: str) -> list[str]:
    """Find problems of a generated caption with simple rules.

    Args:
        caption: The caption.
        language: Code of the language of the caption.

    Returns:
        A list of the problems. It is empty if the caption looks right.

        - "empty": The caption has no letter or digit.
        - "wrong script": Too few letters are in the script of the language.
        - "length": The caption is longer than `MAX_CAPTION_LETTERS`.
        - "markup": The caption contains HTML, or symbols that models write by mistake.
    """
    if not _has_letters(caption):
        return ["empty"]
    checks = {
        "wrong script": _has_wrong_script(caption, language),
        "length": _count_letters(caption) > MAX_CAPTION_LETTERS,
        "markup": bool(MARKUP_RE.search(caption)),
    }
    return [name for name, is_flagged in checks.items() if is_flagged]


def count_and_iter_row_qualities(report: dict[str, Any], output: Path, column: str) -> Iterator[dict[str, Any]]:
    """Yield the quality value of each row that was written, and add it to the totals in `report`.

    A quality value is a dict that says which texts of the row look wrong.

    Args:
        report: Content of the file `quality.json`. Its numbers "rows", "captions" and "flagged" are increased.
        output: Folder of parquet files.
        column: Name of the column of quality values. They have the keys "captions" (number of texts) and "flagged"
            (list of texts that look wrong).
    """
    for path in sorted(output.glob("*.parquet")):
        for quality in pq.read_table(path, columns=[column])[column].to_pylist():
            report["rows"] += 1
            report["captions"] += quality["captions"]
            report["flagged"] += len(quality["flagged"])
            yield quality


def summarize_quality_file(path: Path, noun: str) -> str:
    """Summarize the file `quality.json` as text for the terminal.

    The text says how many captions or translations look wrong, how many have each problem and, if a server wrote them,
    how many tokens were used.

    Args:
        path: The file.
        noun: What the file counts: "captions" or "translations".
    """
    report = read_json(path, captions=int, flagged=int, flags=dict)
    lines = [f"{report['flagged']:,} of {report['captions']:,} {noun} look wrong, see {path}."]
    lines += [f"{flag['captions']:12,}  {name}" for name, flag in report["flags"].items() if flag["captions"]]
    if usage := report.get("usage"):
        read, written, retried = (usage[name] for name in ("prompt_tokens", "completion_tokens", "retried"))
        lines.append(f"Tokens: {read:,} read, {written:,} written. Answers requested twice: {retried:,}.")
    return "\n".join(lines)


def _count_letters(text: str) -> int:
    """Return the length of a text. A Chinese, Japanese or Korean character counts as `LETTERS_PER_DENSE_SIGN`."""
    return len(text) + (LETTERS_PER_DENSE_SIGN - 1) * len(DENSE_SCRIPT_RE.findall(text))


def _has_wrong_script(text: str, language: str) -> bool:
    """Return True if less than `MIN_SCRIPT_SHARE` of the letters of a text are in the script of a language."""
    letters = "".join(LETTER_RE.findall(text))
    return len(_script_pattern(language).findall(letters)) < MIN_SCRIPT_SHARE * len(letters)


def _split_words(text: str) -> list[str]:
    """Return the words of a text in lowercase, without punctuation."""
    return re.findall(TOKEN_PATTERN, text.lower())


def _has_letters(text: str) -> bool:
    """Return True if a text contains at least one letter or digit."""
    return any(map(str.isalnum, text))


@lru_cache
def _script_pattern(language: str) -> regex.Pattern:
    """Return a regular expression for one letter of the script in which a language is written.

    If the code is invalid, or the language is written in several scripts and the code names none of them, the pattern
    matches any letter.
    """
    parsed = parse_language(language)
    if parsed is None or (parsed.language in TWO_SCRIPT_LANGUAGES and not parsed.script):
        return LETTER_RE
    script = parsed.maximize().script
    letters = SCRIPT_PATTERNS.get(script, rf"\p{{{script}}}")
    return regex.compile(f"[{letters}]")
