"""What can translate: models of transformers, Google's service, and a file that was translated elsewhere."""

from typing import Any, Protocol


class Translator(Protocol):
    """Turns sentences of one language into another.

    Attributes:
        name: for people.
        code: what the translator calls the target language.
        fingerprint: all that a translation depends on beside the sentence: the translation memory keeps what differs in
            it apart.
    """

    name: str
    code: str
    fingerprint: dict[str, Any]

    def translate(self, sentences: list[str]) -> list[str]:
        """One translation a sentence, in order. No sentence is blank."""
        ...
