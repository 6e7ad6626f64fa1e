"""What a translator takes at once: captions that are too long are cut where sentences end, short ones are grouped."""

import re
from collections.abc import Callable, Iterator

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


def groups(texts: list[str], size: int, characters: int) -> Iterator[list[str]]:
    """Texts in their order, at most `size` at once and at most so many characters, but for a single text."""
    group: list[str] = []
    length = 0
    for text in texts:
        if group and (len(group) == size or length + len(text) > characters):
            yield group
            group, length = [], 0
        group.append(text)
        length += len(text)
    if group:
        yield group
