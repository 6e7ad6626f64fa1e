"""Define what all translators have in common: their interface, and the translation of long sentences in pieces."""

import itertools
import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

from captions.chat.answers import Answer
from captions.stages import RowStage, iter_length_limited_batches

# Regular expressions of positions at which to split a long text, in order of preference: between sentences (in Chinese
# and Japanese, no blank follows a sentence), between clauses, between words.
BOUNDARIES = (r"(?<=[.!?…।॥؟])\s+|(?<=[。！？])|\n+", r"(?<=[,;:،؛、])\s+|(?<=[，；：])", r"\s+")

# Translations are saved after every `SENTENCES_PER_ROW * batch_rows` sentences.
SENTENCES_PER_ROW = 8


class Translator(Protocol):
    """Interface of the backends of `captions.translate`. A backend is a subclass in a module of its own.

    The methods of the class are called in this order: `check_flags`, `check`, `load`, and `translate` any number of
    times. Only `load` and `translate` have no default.

    Attributes:
        flags: Dataclass with the flags of the backend, which become flags of `captions.translate`.
        needs_table: Whether translations come from a table that people fill (`--import`). Otherwise, they are stored in
            the translation memory.
        counts_tokens: Whether the backend counts tokens, so that `describe_work` estimates them.
        name: Name for messages.
        fingerprint: Everything that affects a translation, except the sentence itself, as a dict of JSON values.
            Translators with equal fingerprints share their stored translations.
        on_answer: Function of the caller with the parameters sentence and answer, or None. A backend that waits for
            many separate answers should call it once for each sentence, so that a killed run loses only the requests in
            flight, and that progress is shown in between.
    """

    flags: ClassVar[type]
    needs_table: ClassVar[bool] = False
    counts_tokens: ClassVar[bool] = False
    name: str
    fingerprint: dict[str, Any]
    on_answer: Callable[[str, Answer], None] | None = None

    @classmethod
    def check_flags(cls, args: Any) -> None:
        """Check the flags, without a network and without loading anything. Raise ValueError or ImportError if wrong."""

    @classmethod
    def check(cls, args: Any) -> None:
        """Check, before any stage of a build runs, that the translator can be used.

        Raises ValueError or OSError if the translator cannot be used.
        """

    @classmethod
    def load(cls, args: Any, stage: RowStage) -> Self:
        """Load the translator.

        Args:
            args: Flags of `captions.translate` (`TranslateArguments`).
            stage: The task, with the rows that it processes.

        Returns:
            The translator, ready to translate.

        Raises:
            ValueError, OSError, ImportError: If the translator cannot be used.
        """
        ...

    def translate(self, sentences: list[str]) -> list[str]:
        """Translate sentences, and return one translation per sentence, in order. Sentences must not be blank."""
        ...

    @classmethod
    def describe_work(cls, args: Any, sentences: list[str]) -> list[str]:
        """Return lines for a dry run that say what will be requested from a server, such as requests and tokens.

        Args:
            args: Flags of `captions.translate`.
            sentences: Sentences to translate.
        """
        return []

    def describe_usage(self) -> str:
        """Return a note for the progress bar, such as tokens per second and cost; "" if there is nothing to say."""
        return ""

    def batch_limits(self, args: Any) -> tuple[int, int]:
        """Return the largest numbers of sentences and of characters to translate before the translations are saved."""
        return SENTENCES_PER_ROW * args.batch_rows, sys.maxsize


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Split a text into pieces that are short enough for a translator, each as long as possible.

    The text is split between sentences if possible, otherwise between clauses, then between words. A word that is too
    long is split in the middle. A single character is never split, even if it is too long.

    Args:
        text: The text.
        fits: Function that returns True if a text is short enough.

    Returns:
        The pieces in order. If the text is short enough, the list contains only the text.
    """
    if len(text) < 2 or fits(text):
        return [text]
    for boundary in BOUNDARIES:
        units = [unit for unit in re.split(boundary, text) if unit.strip()]
        if len(units) > 1:
            break
    else:
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
    """Translate sentences of any length in batches.

    A sentence that is too long for the translator is split into pieces, which are translated separately.

    Args:
        sentences: Sentences to translate.
        fits: Function that returns True if a text is short enough for the translator.
        translate_batch: Function that returns the translations of a batch of texts, in order.
        max_texts: Largest number of texts in a batch.
        max_characters: Largest number of characters in a batch.

    Returns:
        One translation per sentence. The translations of the pieces of a sentence are joined with blanks.
    """
    pieces = [split_text(sentence, fits) for sentence in sentences]
    batches = iter_length_limited_batches(itertools.chain.from_iterable(pieces), max_characters, max_texts)
    translations = (text for batch in batches for text in translate_batch(batch))
    return [" ".join(itertools.islice(translations, len(texts))).strip() for texts in pieces]
