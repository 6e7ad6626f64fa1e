"""Quality flags of translations: heuristics that find translations that look wrong.

The thresholds accept what people write, and detect how translators fail. They detect repetition loops only by their
length.
"""

import re
from functools import lru_cache

import regex

from caption_data.rows import TOKEN_PATTERN
from captions.translators import parse_language

QUALITY_FLAGS = ("empty", "copy", "wrong script", "length", "markup")
MAX_NAME_WORDS = 3  # an equal translation of up to 3 words may be a name, for example "Rio de Janeiro"
# Share of letters in the script of the language. Brands and names keep their script: a Hindi caption may be half Latin.
MIN_SCRIPT_SHARE = 0.3
TWO_SCRIPT_LANGUAGES = ("az", "kk", "ku", "pa", "sr", "tk", "ug", "uz")  # languages that are written in several scripts
# Unicode scripts of the script codes that combine several of them.
SCRIPT_PATTERNS = {
    "Hans": r"\p{Hani}",
    "Hant": r"\p{Hani}",
    "Jpan": r"\p{Hani}\p{Hira}\p{Kana}",
    "Kore": r"\p{Hang}\p{Hani}",
}
LETTER_RE, DENSE_SCRIPT_RE = regex.compile(r"\p{L}"), regex.compile(r"[\p{Hani}\p{Hira}\p{Kana}\p{Hang}]")
# A translation has a wrong length if it has more than 3 times the letters of the source plus 20, or the reverse. The
# slack of 20 letters allows "isilwane sasekhaya" for "cat". A character of Chinese, Japanese or Korean counts as 3
# letters.
MAX_LENGTH_RATIO, LENGTH_SLACK_LETTERS, LETTERS_PER_DENSE_SIGN = 3, 20, 3
# HTML entities and tags, and what translation models write when they fail: the unknown token of SentencePiece, its mark
# for a blank, the replacement character, and language tokens.
MARKUP_RE = re.compile(
    r"&(?:[a-zA-Z][a-zA-Z0-9]{1,9}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});|</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|<!--"
    r"|\u2047|\u2581|\ufffd|>>[\w-]+<<|__[a-z]{2,3}__"
)


def find_quality_flags(source: str, translation: str, language: str) -> list[str]:
    """Find signs that a translation is wrong.

    Args:
        source: The sentence.
        translation: Its translation.
        language: Code of the language of the translation.

    Returns:
        Names from `QUALITY_FLAGS`; empty if the translation looks right, or if the source is blank.
    """
    if not source.strip():
        return []
    if not translation.strip() or (_has_letters(source) and not _has_letters(translation)):
        return ["empty"]
    words, letters = _split_words(source), "".join(LETTER_RE.findall(translation))
    short, long = sorted(
        len(text) + (LETTERS_PER_DENSE_SIGN - 1) * len(DENSE_SCRIPT_RE.findall(text)) for text in (source, translation)
    )
    checks = {
        "copy": len(words) > MAX_NAME_WORDS and words == _split_words(translation),
        "wrong script": len(_script_pattern(language).findall(letters)) < MIN_SCRIPT_SHARE * len(letters),
        "length": long > MAX_LENGTH_RATIO * short + LENGTH_SLACK_LETTERS,
        "markup": bool(MARKUP_RE.search(translation)),
    }
    return [name for name, is_flagged in checks.items() if is_flagged]


def _split_words(text: str) -> list[str]:
    """Split a text into lowercase words."""
    return re.findall(TOKEN_PATTERN, text.lower())


def _has_letters(text: str) -> bool:
    """Tell whether a text has a letter or digit."""
    return any(map(str.isalnum, text))


@lru_cache
def _script_pattern(language: str) -> regex.Pattern:
    """Return a pattern for the letters of a language's script; any letter if the script is not known."""
    parsed = parse_language(language)
    if parsed is None or (parsed.language in TWO_SCRIPT_LANGUAGES and not parsed.script):
        return LETTER_RE
    script = parsed.maximize().script
    letters = SCRIPT_PATTERNS.get(script, rf"\p{{{script}}}")
    return regex.compile(f"[{letters}]")
