"""Text cleaning and length limits applied before tokenization, equal to those of open_clip's tokenizer.

Imports neither torch nor transformers, so that the search can use it without them.
"""

import html
import re
from collections.abc import Iterable

import ftfy
from ftfy.fixes import unescape_html

CONTEXT_LENGTH = 77  # tokens, including the begin and end tokens; open_clip's default, which CAPIVARA uses
# Only this much of a text is read, after long white space is shortened. 77 tokens need a quarter of it even if every
# letter is written as an HTML entity. The limits are necessary because the time of ftfy grows with the square of the
# length, and with the number of lines.
MAX_CHARACTERS = 4096
MAX_LINES = 512
LONG_WHITESPACE_RE = re.compile(r"\s{6,}")
# ftfy may need one pass for each "&" or ";". A text with more of them is cleaned by `_fix_line`, which limits the
# passes.
MAX_FTFY_ENTITY_SIGNS = 8
# Nested entities ("&amp;amp;") up to this depth are resolved one level per pass, as ftfy does it. All deeper levels are
# resolved in the last pass.
MAX_ENTITY_NESTING = 4


def clean_text(text: str) -> str:
    """Repair mojibake, resolve HTML entities (also nested ones such as "&amp;amp;") and collapse white space.

    The steps equal the `whitespace` cleaning of open_clip 3.3's `HFTokenizer`. Only the first 4096 characters and 512
    lines are read; a run of white space counts as at most five characters.

    Raises:
        ValueError: If `text` is not a string.
    """
    check_texts([text])
    if len(text) > MAX_CHARACTERS or text.count("\n") > MAX_LINES:
        text = _truncate_text(text)
    return " ".join(html.unescape(html.unescape(_fix_text(text))).split())


def _truncate_text(text: str) -> str:
    """Shorten long white space, then return the first `MAX_CHARACTERS` and `MAX_LINES` of the text."""
    # Each replacement leaves at least four characters, so more than `MAX_CHARACTERS` of them can't be needed.
    shortened = LONG_WHITESPACE_RE.sub(_shorten_whitespace, text, count=MAX_CHARACTERS)
    truncated = "\n".join(shortened[:MAX_CHARACTERS].split("\n")[:MAX_LINES])
    if truncated == shortened:
        return shortened
    # If possible, end with an ASCII character: a sequence of mojibake that is cut in two would keep ftfy from
    # recognizing the mojibake in the rest of the line.
    ends = range(len(truncated), max(len(truncated) - 256, 0), -1)
    return truncated[: next((end for end in ends if truncated[end - 1].isascii()), len(truncated))]


def _shorten_whitespace(match: re.Match) -> str:
    """Return the first and last two characters of a run of white space, and a line break if the run has one."""
    return match[0][:2] + "\n" * ("\n" in match[0]) + match[0][-2:]


def _fix_text(text: str) -> str:
    """Apply `ftfy.fix_text` with a limited number of passes.

    ftfy itself makes one pass for each level of nested entities, so its time is quadratic in the length of the text.
    """
    if sum(map(text.count, "&;＆；")) <= MAX_FTFY_ENTITY_SIGNS:
        return ftfy.fix_text(text)
    bracket = text.find("<")  # ftfy resolves no entities from the line with the first "<" on
    end = len(text) if bracket < 0 else text.rfind("\n", 0, bracket) + 1
    return "".join(map(_fix_line, re.split("(?<=\n)", text[:end]))) + ftfy.fix_text(text[end:])


def _fix_line(line: str) -> str:
    """Resolve entities and repair mojibake in one line, in at most `MAX_ENTITY_NESTING` + 1 passes."""
    for level in range(MAX_ENTITY_NESTING + 1):
        before, line = line, unescape_html(line)
        if level == MAX_ENTITY_NESTING:  # the last pass resolves all remaining levels
            line = _unescape_all_levels(line)
        line = ftfy.fix_text_segment(line, unescape_html=False)
        if line == before:
            break
    return line


def _unescape_all_levels(line: str) -> str:
    resolved = unescape_html(line)
    while resolved != line:
        line, resolved = resolved, unescape_html(resolved)
    return line


def check_texts(text: str | Iterable[str]) -> str | list[str]:
    """Return a single text unchanged and several texts as a list.

    Raises:
        ValueError: If a text is not a string, or there is no text.
    """
    if isinstance(text, str):
        return text
    texts = list(text) if isinstance(text, Iterable) and not isinstance(text, bytes) else [text]
    if not texts:
        raise ValueError("There is no text: got an empty list; give at least one text, or leave `text` out.")
    for value in texts:
        if not isinstance(value, str):
            raise ValueError(f"A text must be a string, got {type(value).__name__}: {repr(value)[:200]}.")
    return texts
