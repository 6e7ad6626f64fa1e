"""What is wrong with a translation, as far as its letters tell: pure functions of a sentence and its translation.

    python -c "from captions.quality import flags; print(flags('a cat on a mat', 'a cat on a mat', 'pt'))"  # ['copy']

A flag is a suspicion, not a verdict: a name stays as it is, and a rhyme repeats. So thresholds leave what people write
alone, and catch what translators do when they fail.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from caption_data.selection import TOKEN_PATTERN
from captions.translators.languages import scripts_of

FLAGS = ("empty", "copy", "wrong script", "length", "repetition", "markup")
MAX_NAME_WORDS = 3  # so much may be a name: "Rio de Janeiro" is right in every language
MIN_SCRIPT_SHARE = 0.3  # of the letters; brands and names keep theirs, so that a Hindi caption may be half Latin
# Three times the letters, and a long word beside, say something else, and so does a third of them; "isilwane sasekhaya"
# for "cat" stays below.
MAX_LENGTH_RATIO = 3.0
SPARE_LETTERS = 20
DENSE_SCRIPTS = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}
DENSITY = 3.0  # letters of an alphabet that one sign of a dense script stands for, about
MIN_REPEATS = 3  # in a row; twice is emphasis ("muito muito", and isiXhosa doubles verbs: "hamba hamba")
MAX_REPEATED_WORDS = 6  # of a sequence that is repeated: longer ones are counted by their parts
MIN_LETTER_REPEATS = 4  # of two letters or more without a blank between: "hahaha" is laughter
MIN_TRIGRAM_SHARE = 0.5  # of the words that are in one and the same, as in loops that vary a word between rounds
# Character references and tags, and what translation models write when they have no word: the sign of sentencepiece for
# unknown, its mark for a blank, a letter that could not be decoded, and codes of languages.
MARKUP = re.compile(
    r"&(?:[a-zA-Z][a-zA-Z0-9]{1,9}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});|</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>|<!--"
    r"|\u2047|\u2581|\ufffd|>>[\w-]+<<|__[a-z]{2,3}__"
)


def flags(source: str, translation: str, language: str) -> list[str]:
    """Which of `FLAGS` a translation into `language` gets; none for one that looks right, or for a blank source."""
    if not source.strip():
        return []
    if not translation.strip() or (_has_letters(source) and not _has_letters(translation)):
        return ["empty"]
    found = {
        "copy": is_copy(source, translation),
        "wrong script": has_wrong_script(translation, language),
        "length": has_absurd_length(source, translation, language),
        "repetition": repeats(translation) and not repeats(source),
        "markup": bool(MARKUP.search(translation)),
    }
    return [name for name, is_so in found.items() if is_so]


def is_copy(source: str, translation: str) -> bool:
    """Whether the words are those of the source, and too many for a name."""
    words = _words(source)
    return len(words) > MAX_NAME_WORDS and words == _words(translation)


def has_wrong_script(text: str, language: str) -> bool:
    """Whether most letters are none of the language's; never so where its script is not known (`scripts_of`)."""
    right = scripts_of(language)
    scripts = [script for script in map(_script, text) if script]
    return bool(right and scripts) and sum(script in right for script in scripts) < MIN_SCRIPT_SHARE * len(scripts)


def has_absurd_length(source: str, translation: str, language: str) -> bool:
    """Whether one is far longer than the other, dense scripts allowed for."""
    one, other = _letters_of_an_alphabet(source), _letters_of_an_alphabet(translation)
    return max(one, other) > MAX_LENGTH_RATIO * min(one, other) + SPARE_LETTERS


def repeats(text: str) -> bool:
    """Whether a sequence of words or letters comes again and again."""
    words = _words(text)
    for size in range(1, MAX_REPEATED_WORDS + 1):
        run = 0  # words in a row that are those of `size` words before
        for i in range(size, len(words)):
            run = run + 1 if words[i] == words[i - size] else 0
            if run >= size * (MIN_REPEATS - 1):
                return True
    loops = re.finditer(rf"(\S{{2,20}}?)\1{{{MIN_LETTER_REPEATS - 1},}}", text.lower())
    if any(_has_letters(loop[1]) for loop in loops):
        return True
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    most = max(trigrams.values(), default=0)
    return most >= MIN_REPEATS and 3 * most >= MIN_TRIGRAM_SHARE * len(words)


def _words(text: str) -> list[str]:
    return re.findall(TOKEN_PATTERN, text.lower())


def _has_letters(text: str) -> bool:
    return any(map(str.isalnum, text))


def _letters_of_an_alphabet(text: str) -> float:
    return sum(DENSITY if _script(letter) in DENSE_SCRIPTS else 1.0 for letter in text)


@lru_cache(maxsize=10_000)
def _script(letter: str) -> str | None:
    """The first word of the name of a letter in Unicode; None for what is no letter."""
    if not unicodedata.category(letter).startswith("L"):
        return None
    # "FULLWIDTH LATIN …", "HALFWIDTH KATAKANA …" and "KATAKANA-HIRAGANA PROLONGED SOUND MARK" are of a script, too.
    words = unicodedata.name(letter, "").replace("-", " ").split()
    return next((word for word in words if word not in ("FULLWIDTH", "HALFWIDTH")), None)
