"""Texts before the vocabulary: the repair that open_clip's tokenizer does, and the length that is kept.

Neither torch nor transformers is needed for it.
"""

import html
import re
from collections.abc import Iterable

import ftfy
from ftfy.fixes import unescape_html

CONTEXT_LENGTH = 77  # tokens, begin and end included; open_clip's default, kept by CAPIVARA
# What is read of a text, its long blanks counted as short ones. 77 tokens need a quarter of it even where every letter
# is written as an entity, and ftfy's time grows with the square of the length, and by the line.
MAX_CHARACTERS, MAX_LINES = 4096, 512
LONG_WHITESPACE_RE = re.compile(r"\s{6,}")
MAX_FTFY_ENTITY_SIGNS = 8  # ftfy may need a round for each; with more of them the rounds are counted here
MAX_ENTITY_NESTING = (
    4  # entities within entities that are resolved one a round, as ftfy does; the deeper ones all in one
)


def clean_text(text: str) -> str:
    """Mojibake repaired, HTML entities resolved (also nested, as "&amp;amp;"), white space collapsed.

    The same steps as the `whitespace` cleaning of open_clip 3.3's `HFTokenizer`, on the first 4096 characters and 512
    lines; a blank of any length counts as five characters at most.
    """
    check_texts([text])
    if len(text) > MAX_CHARACTERS or text.count("\n") > MAX_LINES:
        text = _truncate_text(text)
    return " ".join(html.unescape(html.unescape(_fix_text(text))).split())


def _truncate_text(text: str) -> str:
    """The first characters and lines of `text`, its long blanks cut to their ends and a line break, if any."""
    shortened = lambda blank: blank[0][:2] + "\n" * ("\n" in blank[0]) + blank[0][-2:]  # noqa: E731
    short = LONG_WHITESPACE_RE.sub(shortened, text, count=MAX_CHARACTERS)  # each leaves four or five
    kept = "\n".join(short[:MAX_CHARACTERS].split("\n")[:MAX_LINES])
    if kept == short:
        return short
    # Cut behind an ASCII character, where there is one: half a letter of mojibake would hide what the line is.
    ends = range(len(kept), max(len(kept) - 256, 0), -1)
    return kept[: next((end for end in ends if kept[end - 1].isascii()), len(kept))]


def _fix_text(text: str) -> str:
    """`ftfy.fix_text` in a bounded number of rounds; its own are as many as entities are nested, a quadratic time."""
    if sum(map(text.count, "&;＆；")) <= MAX_FTFY_ENTITY_SIGNS:
        return ftfy.fix_text(text)
    bracket = text.find("<")  # from its line on, ftfy leaves entities alone
    end = len(text) if bracket < 0 else text.rfind("\n", 0, bracket) + 1
    return "".join(map(_fix_line, re.split("(?<=\n)", text[:end]))) + ftfy.fix_text(text[end:])


def _fix_line(line: str) -> str:
    for level in range(MAX_ENTITY_NESTING + 1):
        before, line = line, unescape_html(line)
        while level == MAX_ENTITY_NESTING and line != (deeper := unescape_html(line)):
            line = deeper
        line = ftfy.fix_text_segment(line, unescape_html=False)
        if line == before:
            break
    return line


def check_texts(text: str | Iterable[str]) -> str | list[str]:
    """A text as it is, several as a list; ValueError where one is not a string, or there is none."""
    if isinstance(text, str):
        return text
    texts = list(text) if isinstance(text, Iterable) and not isinstance(text, bytes) else [text]
    if not texts:
        raise ValueError("There is no text: got an empty list; give at least one text, or leave `text` out.")
    for t in texts:
        if not isinstance(t, str):
            raise ValueError(f"A text must be a string, got {type(t).__name__}: {repr(t)[:200]}.")
    return texts
