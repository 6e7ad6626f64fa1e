"""What can translate: models of transformers, Google's service, and a file that was translated elsewhere."""

from typing import Any, Protocol


class Translator(Protocol):
    """Turns sentences of one language into another."""

    name: str  # for people
    code: str  # what the translator calls the target language
    fingerprint: dict[str, Any]  # all that a translation depends on beside the sentence; the memory keeps these apart

    def translate(self, sentences: list[str]) -> list[str]:
        """One translation a sentence, in order. No sentence is blank."""
        ...
