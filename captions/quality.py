"""What is wrong with a translation, as far as its letters tell, and the counts of that over a whole data set.

    python -c "from captions.quality import flags; print(flags('a cat on a mat', 'a cat on a mat', 'pt'))"  # ['copy']
    python -c "from captions.quality import write_quality_report; print(write_quality_report('data/pt', 'pt'))"

A flag is a suspicion, not a verdict: a name stays as it is, and a rhyme repeats. So thresholds leave what people write
alone, and catch what translators do when they fail.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq
from datasets import List, Value

from capivara_common.files import read_json, write_json
from caption_data.rows import TOKEN_PATTERN
from captions.translators import language_parts, same_language

# Which letters a language is written with, by the first word of their names in Unicode; rare second scripts included,
# so that a right translation is never called wrong. A language that is not here is not checked.
_SCRIPTS = {
    "LATIN": "af ay az bm br bs ca ceb co cs cy da de ee en eo es et eu fi fil fo fr fy ga gd gl gn gv ha haw hr ht hu "
    "id ig is it jv kk ku la lb lg ln lt lv mg mi ms mt nb nl nn no nso ny oc om pl pt qu rm rn ro rw sg sk sl sm sn "
    "so sq sr ss st su sv sw tk tl tn to tr ts tw ty ug uz ve vi wo xh yo zu",
    "CYRILLIC": "ba be bg kk ky mk mn ru sr tg tk tt ug uk uz", "ARABIC": "ar az ckb fa ku pa ps sd ug ur",
    "DEVANAGARI": "hi mr ne sa bho mai", "BENGALI": "as bn", "GURMUKHI": "pa", "GUJARATI": "gu", "ORIYA": "or",
    "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml", "SINHALA": "si", "THAI": "th", "LAO": "lo",
    "KHMER": "km", "MYANMAR": "my", "TIBETAN": "bo dz", "ETHIOPIC": "am ti", "GEORGIAN": "ka", "ARMENIAN": "hy",
    "HEBREW": "he yi", "GREEK": "el", "HANGUL": "ko", "CJK": "ja zh yue", "HIRAGANA": "ja", "KATAKANA": "ja",
}  # fmt: skip
# Codes of ISO 15924, as in zh-Hant and por_Latn.
_SCRIPT_CODES = {
    "latn": "LATIN", "deva": "DEVANAGARI", "cyrl": "CYRILLIC", "arab": "ARABIC", "beng": "BENGALI", "guru": "GURMUKHI",
    "gujr": "GUJARATI", "orya": "ORIYA", "taml": "TAMIL", "telu": "TELUGU", "knda": "KANNADA", "mlym": "MALAYALAM",
    "sinh": "SINHALA", "thai": "THAI", "laoo": "LAO", "khmr": "KHMER", "mymr": "MYANMAR", "tibt": "TIBETAN",
    "ethi": "ETHIOPIC", "geor": "GEORGIAN", "armn": "ARMENIAN", "hebr": "HEBREW", "grek": "GREEK", "hang": "HANGUL",
    "hans": "CJK", "hant": "CJK",
}  # fmt: skip

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
REPORT_FILE = "quality.json"
EXAMPLES = 5  # of a flag
MAX_EXAMPLE = 200  # letters of a sentence; a caption can be a book
# The column `quality-<language>` of a row: how many captions were translated, and those that look wrong.
QUALITY = {
    "captions": Value("int32"),
    "flagged": List(
        {
            "column": Value("string"),
            "position": Value("int32"),  # among the source's captions
            "flags": List(Value("string")),
            "source": Value("string"),
            "translation": Value("string"),
        }
    ),
}


@lru_cache
def scripts_of(language: str) -> frozenset[str]:
    """First words of the Unicode names of its letters; empty for a language that is not in the table."""
    for part in language_parts(language)[1:]:
        if part in _SCRIPT_CODES:
            return frozenset({_SCRIPT_CODES[part]})
    names = same_language(language)
    return frozenset(script for script, known in _SCRIPTS.items() if names & set(known.split()))


def flags(source: str, translation: str, language: str) -> list[str]:
    """Which of `FLAGS` a translation into `language` gets; none for one that looks right, or for a blank source."""
    if not source.strip():
        return []
    if not translation.strip() or (_has_letters(source) and not _has_letters(translation)):
        return ["empty"]
    words, right = _words(source), scripts_of(language)
    scripts = [script for script in map(_script, translation) if script]
    one, other = (  # letters of an alphabet
        sum(DENSITY if _script(letter) in DENSE_SCRIPTS else 1.0 for letter in text) for text in (source, translation)
    )
    found = {
        "copy": len(words) > MAX_NAME_WORDS and words == _words(translation),
        # Never so where the language's script is not known.
        "wrong script": bool(right and scripts)
        and sum(script in right for script in scripts) < MIN_SCRIPT_SHARE * len(scripts),
        "length": max(one, other) > MAX_LENGTH_RATIO * min(one, other) + SPARE_LETTERS,
        "repetition": repeats(translation) and not repeats(source),
        "markup": bool(MARKUP.search(translation)),
    }
    return [name for name, is_so in found.items() if is_so]


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


@lru_cache(maxsize=10_000)
def _script(letter: str) -> str | None:
    """The first word of the name of a letter in Unicode; None for what is no letter."""
    if not unicodedata.category(letter).startswith("L"):
        return None
    # "FULLWIDTH LATIN …", "HALFWIDTH KATAKANA …" and "KATAKANA-HIRAGANA PROLONGED SOUND MARK" are of a script, too.
    words = unicodedata.name(letter, "").replace("-", " ").split()
    return next((word for word in words if word not in ("FULLWIDTH", "HALFWIDTH")), None)


def write_quality_report(output: Path | str, language: str) -> str:
    """Write `quality.json`, counts over all parts that are there and the first examples of each flag; returns what it
    says in a few lines."""
    output, column = Path(output), f"quality-{language}"
    report = {"language": language, "script_is_checked": bool(scripts_of(language)), "rows": 0, "captions": 0}
    report |= {"flagged": 0, "flags": {flag: {"captions": 0, "examples": []} for flag in FLAGS}}
    for path in sorted(output.glob("*.parquet")):
        qualities = pq.read_table(path, columns=[column])[column].to_pylist()
        report["rows"] += len(qualities)
        report["captions"] += sum(quality["captions"] for quality in qualities)
        for one in (one for quality in qualities for one in quality["flagged"]):
            report["flagged"] += 1
            for kind in (report["flags"][flag] for flag in one["flags"]):
                kind["captions"] += 1
                if len(kind["examples"]) < EXAMPLES:
                    kind["examples"].append({name: one[name][:MAX_EXAMPLE] for name in ("source", "translation")})
    write_json(output / REPORT_FILE, report)
    return quality_summary(output)


def quality_summary(output: Path) -> str:
    """A few lines of what `quality.json` of a folder says."""
    report = read_json(output / REPORT_FILE)
    lines = [f"{report['flagged']:,} of {report['captions']:,} translations look wrong, see {output / REPORT_FILE}."]
    lines += [f"{kind['captions']:12,}  {flag}" for flag, kind in report["flags"].items() if kind["captions"]]
    if not report["script_is_checked"]:
        lines.append(f"Letters were not checked: which script {report['language']!r} has is not known here.")
    return "\n".join(lines)
