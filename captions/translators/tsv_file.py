"""Translations that were made elsewhere, in a table that `captions.tsv` wrote."""

import hashlib
from pathlib import Path

from captions.tsv import read_translations


class FileTranslator:
    """Looks sentences up in a table.

    Args:
        path: of the table that came back.
        sentences: all that it must have, in the order that they were written.
        language: it was translated into.

    Raises:
        ValueError: rows are missing, doubled, out of order or otherwise wrong; they are named.
    """

    name = "the table"

    def __init__(self, path: Path, sentences: list[str], language: str):
        self._translations = read_translations(path, sentences)
        self.code = language
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.fingerprint = {"backend": "file", "sha256": digest, "target": language}

    def translate(self, sentences: list[str]) -> list[str]:
        return [self._translations[sentence] for sentence in sentences]
