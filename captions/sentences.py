"""The sentences of a data set: its captions, each once."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from caption_data.columns import caption_texts
from caption_data.rows import BadRow
from caption_data.sources import Source
from captions.memory import TranslationMemory

LOOKED_UP = 10_000  # sentences at once


def sentences_of(row: dict[str, Any], columns: Iterable[str]) -> Iterator[str]:
    """The captions of a row that are not blank; none of columns that every stage refuses."""
    for column in columns:
        with contextlib.suppress(BadRow):
            yield from filter(str.strip, caption_texts(row.get(column), column))


def distinct_sentences(source: Source, columns: list[str], parts: Iterable[range]) -> Iterator[str]:
    """The captions of some rows in their order, each once; images are not read where the form of the data allows.

    Args:
        source: of the rows.
        columns: of captions, by the source's names.
        parts: the rows.
    """
    seen = set()
    for part in parts:
        for row in itertools.islice(source.rows(part.start, only=columns), len(part)):
            for sentence in sentences_of(row, columns):
                if sentence not in seen:
                    seen.add(sentence)
                    yield sentence


def unknown_characters(sentences: Iterable[str], memory: TranslationMemory) -> int:
    """How many characters the sentences have that the memory does not know."""
    total, rest = 0, iter(sentences)
    while some := list(itertools.islice(rest, LOOKED_UP)):
        total += sum(map(len, set(some) - memory.find(some).keys()))
    return total
