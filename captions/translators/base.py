"""Define the interface of the backends that translate captions, and functions that split long sentences."""

import itertools
import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar

from captions.chat.answers import Answer
from captions.stages import Backend, iter_length_limited_batches

# Regular expressions for the positions at which a long text is split, in order of preference: between sentences (in
# Chinese and Japanese, no blank follows a sentence), between clauses, between words.
BOUNDARIES = (r"(?<=[.!?…।॥؟])\s+|(?<=[。！？])|\n+", r"(?<=[,;:،؛、])\s+|(?<=[，；：])", r"\s+")

# Translations are saved after every `SENTENCES_PER_ROW * batch_rows` sentences, so that a killed run loses only a few.
SENTENCES_PER_ROW = 8


class Translator(Backend):
    """Interface of the backends of `captions.translate`, which translate captions.

    The methods are called in this order: `check_flags`, `check`, `load`, and then `translate` any number of times. A
    subclass must implement `translate`.

    Attributes:
        needs_table: True if translations come from a table that people fill (`--import`).
        counts_tokens: True if the backend counts the tokens of its requests.
        name: Name of the translator for messages.
        fingerprint: Everything that affects a translation, except the sentence itself, as a dict of JSON values.
            Translators with equal fingerprints share their stored translations.
    """

    needs_table: ClassVar[bool] = False
    counts_tokens: ClassVar[bool] = False
    name: str
    fingerprint: dict[str, Any]

    def translate(self, sentences: list[str]) -> list[str]:
        """Translate sentences, and return one translation per sentence, in order.

        Args:
            sentences: Sentences to translate. None of them may be blank.
        """

    def describe_usage(self) -> str:
        """Return a note for the progress bar, for example tokens per second and cost.

        Returns "" if there is nothing to show.
        """
        return ""

    def on_answer(self, sentence: str, answer: Answer) -> None:
        """Handle an answer as soon as it arrives. The default implementation does nothing.

        A backend whose answers arrive one by one calls this method for each answer. `captions.translate` replaces it by
        a function that stores the answer and updates the progress bar.

        Args:
            sentence: Sentence that was translated.
            answer: The translation, with its problem and its number of tokens.
        """

    def batch_limits(self, args: Any) -> tuple[int, int]:
        """Return the size limits of a batch, the group of sentences that are translated before results are saved.

        Args:
            args: Flags of `captions.translate`.

        Returns:
            The tuple (largest number of sentences, largest number of characters).
        """
        return SENTENCES_PER_ROW * args.batch_rows, sys.maxsize


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Split a long text into pieces that are short enough for a translator. Each piece is as long as possible.

    The text is split between sentences if possible, otherwise between clauses or words, and in a word only if
    necessary.

    Args:
        text: The text.
        fits: Function that returns True if a text is short enough for the translator.

    Returns:
        The pieces in order. If the text is short enough, the list contains only the text.
    """
    if len(text) < 2 or fits(text):  # a single character can't be split, even if it is too long
        return [text]
    for boundary in BOUNDARIES:
        units = [unit for unit in re.split(boundary, text) if unit.strip()]
        if len(units) > 1:
            break
    else:  # a single word: split it in the middle
        return split_text(text[: len(text) // 2], fits) + split_text(text[len(text) // 2 :], fits)
    pieces: list[str] = []
    for unit in units:
        for part in split_text(unit, fits):
            if pieces and fits(f"{pieces[-1]} {part}"):
                pieces[-1] += f" {part}"
            else:
                pieces.append(part)
    return pieces


def translate_in_pieces(
    sentences: list[str],
    fits: Callable[[str], bool],
    translate_batch: Callable[[list[str]], list[str]],
    max_texts: int,
    max_characters: int = sys.maxsize,
) -> list[str]:
    """Translate sentences in batches, and split sentences that are too long for the translator.

    Args:
        sentences: Sentences to translate.
        fits: Function that returns True if a text is short enough for the translator.
        translate_batch: Function that returns the translations of a batch of texts, in order.
        max_texts: Largest number of texts in a batch.
        max_characters: Largest number of characters in a batch.

    Returns:
        One translation per sentence. The translations of its pieces are joined with blanks.
    """
    pieces = [split_text(sentence, fits) for sentence in sentences]
    batches = iter_length_limited_batches(itertools.chain.from_iterable(pieces), max_characters, max_texts)
    translations = (text for batch in batches for text in translate_batch(batch))
    return [" ".join(itertools.islice(translations, len(texts))).strip() for texts in pieces]
