"""What is taken at once: captions that are too long are cut where sentences end, short ones are grouped."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

S = TypeVar("S", bound=Sized)
# Where a text is cut, the best place first: ends of sentences, with no blank behind them in Chinese and Japanese; then
# of clauses; then of words.
BOUNDARIES = (r"(?<=[.!?…।॥؟])\s+|(?<=[。！？])|\n+", r"(?<=[,;:،؛、])\s+|(?<=[，；：])", r"\s+")


def cut(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Pieces of `text` that fit, as long as possible, in order; `text` itself where it fits.

    A word that does not fit is cut into halves. A single letter is a piece even if it does not fit.
    """
    if len(text) < 2 or fits(text):
        return [text]
    for boundary in BOUNDARIES:
        units = [unit for unit in re.split(boundary, text) if unit.strip()]
        if len(units) > 1:
            break
    else:
        return cut(text[: len(text) // 2], fits) + cut(text[len(text) // 2 :], fits)
    pieces: list[str] = []
    for unit in units:
        for part in cut(unit, fits):
            if pieces and fits(f"{pieces[-1]} {part}"):
                pieces[-1] += f" {part}"
            else:
                pieces.append(part)
    return pieces


def groups(items: Iterable[S], total: int, size: int = sys.maxsize) -> Iterator[list[S]]:
    """Items in their order, at most `size` at once and together no longer than `total`, but for a single one."""
    group: list[S] = []
    length = 0
    for item in items:
        if group and (len(group) == size or length + len(item) > total):
            yield group
            group, length = [], 0
        group.append(item)
        length += len(item)
    if group:
        yield group
