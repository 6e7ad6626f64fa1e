"""Text cleaning and length limits that are applied before tokenization, with the same result as in open_clip.

This module imports neither torch nor transformers, so that `capivara_search` can use it without these packages.
"""

import html
import re
from collections.abc import Iterable

import ftfy
from ftfy.fixes import unescape_html

CONTEXT_LENGTH = 77  # largest number of tokens of a text, with begin and end token; the default of open_clip
# Largest numbers of characters and lines of a text that are used, to save time: the time of the library ftfy grows with
# the square of the number of characters, and with the number of lines. A quarter of the characters is enough for 77
# tokens, even if every letter is an HTML entity.
MAX_CHARACTERS = 4096
MAX_LINES = 512
LONG_WHITESPACE_RE = re.compile(r"\s{6,}")
# ftfy may make one pass over the text for each "&" or ";". A text with more of these signs than this number is cleaned
# by `_unescape_and_repair_line`, which limits the number of passes.
MAX_FTFY_ENTITY_SIGNS = 8
# Nested entities ("&amp;amp;") up to this depth are resolved one level per pass, as in ftfy. All deeper levels are
# resolved together in the last pass.
MAX_ENTITY_NESTING = 4


def clean_text(text: str) -> str:
    """Clean a text: repair mojibake (wrongly decoded characters), resolve HTML entities and collapse white space.

    The steps are those of open_clip 3.3's `HFTokenizer` with `clean="whitespace"`. Only the first 4096 characters and
    512 lines of a text are used, after long white space is shortened.

    Returns:
        The cleaned text on a single line, with single spaces between words.

    Raises:
        ValueError: If `text` is not a string.
    """
    check_and_collect_texts([text])
    if len(text) > MAX_CHARACTERS or text.count("\n") > MAX_LINES:
        text = _truncate_text(text)
    return " ".join(html.unescape(html.unescape(_fix_text_with_limited_ftfy_passes(text))).split())


def _truncate_text(text: str) -> str:
    """Shorten each long run of white space in a text, and then truncate the text.

    Args:
        text: Text of any length.

    Returns:
        The start of the shortened text, with at most `MAX_CHARACTERS` characters and `MAX_LINES` lines.
    """
    # At most `MAX_CHARACTERS` runs are shortened, to save time. Each shortened run still has at least four characters,
    # so the text after this many runs is beyond the first `MAX_CHARACTERS` characters and would be cut off anyway.
    shortened = LONG_WHITESPACE_RE.sub(_shorten_whitespace, text, count=MAX_CHARACTERS)
    truncated = "\n".join(shortened[:MAX_CHARACTERS].split("\n")[:MAX_LINES])
    if truncated == shortened:
        return shortened
    # If possible, the text is cut after an ASCII character. A cut through mojibake (wrongly decoded characters, such as
    # "Ã©" for "é") would keep ftfy from repairing the rest of the line.
    ends = range(len(truncated), max(len(truncated) - 256, 0), -1)
    return truncated[: next((end for end in ends if truncated[end - 1].isascii()), len(truncated))]


def _shorten_whitespace(match: re.Match) -> str:
    r"""Return a shortened run of white space: its first two and its last two characters.

    If the run contains a line break, "\n" is inserted between them, so that the text keeps its lines.

    Args:
        match: Match of `LONG_WHITESPACE_RE`.
    """
    return match[0][:2] + "\n" * ("\n" in match[0]) + match[0][-2:]


def _fix_text_with_limited_ftfy_passes(text: str) -> str:
    """Return the same result as `ftfy.fix_text`, but limit the number of passes over the text.

    ftfy makes one pass for each level of nested entities, so its time can be quadratic in the length of the text.

    Args:
        text: Text to repair.
    """
    if sum(map(text.count, "&;＆；")) <= MAX_FTFY_ENTITY_SIGNS:
        return ftfy.fix_text(text)
    # From the line with the first "<" on, ftfy resolves no HTML entities, because the text may be HTML. So only the
    # earlier lines need the limit.
    bracket = text.find("<")
    end = len(text) if bracket < 0 else text.rfind("\n", 0, bracket) + 1
    return "".join(map(_unescape_and_repair_line, re.split("(?<=\n)", text[:end]))) + ftfy.fix_text(text[end:])


def _unescape_and_repair_line(line: str) -> str:
    """Resolve HTML entities and repair mojibake in one line of text, in at most `MAX_ENTITY_NESTING` + 1 passes.

    Args:
        line: Line of text.

    Returns:
        The repaired line.
    """
    for level in range(MAX_ENTITY_NESTING + 1):
        # The last pass resolves all remaining levels.
        unescape = _unescape_all_levels if level == MAX_ENTITY_NESTING else unescape_html
        before, line = line, ftfy.fix_text_segment(unescape(line), unescape_html=False)
        if line == before:
            break
    return line


def _unescape_all_levels(line: str) -> str:
    resolved = unescape_html(line)
    while resolved != line:
        line, resolved = resolved, unescape_html(resolved)
    return line


def check_and_collect_texts(text: str | Iterable[str]) -> str | list[str]:
    """Check that the input of a tokenizer is one string or an iterable of strings, and collect the strings.

    Returns:
        The text itself if `text` is a single string, otherwise a list of the texts.

    Raises:
        ValueError: If a text is not a string, or there is no text.
    """
    if isinstance(text, str):
        return text
    texts = list(text) if isinstance(text, Iterable) and not isinstance(text, bytes) else [text]
    if not texts:
        raise ValueError("`text` is an empty list. Give at least one text, or leave `text` out.")
    for value in texts:
        if not isinstance(value, str):
            raise ValueError(f"A text must be a string, got {type(value).__name__}: {repr(value)[:200]}.")
    return texts
