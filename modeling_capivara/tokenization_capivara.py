"""Texts to token ids, with the text repair that open_clip's tokenizer does."""

import html
import re
from collections.abc import Iterable

import ftfy
import numpy as np
from ftfy.fixes import unescape_html
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CONTEXT_LENGTH = 77  # tokens, begin and end included; open_clip's default, kept by CAPIVARA
# What is read of a text, its long blanks counted as short ones. 77 tokens need a quarter of it even where every letter
# is written as an entity, and ftfy's time grows with the square of the length, and by the line.
MAX_CHARACTERS, MAX_LINES = 4096, 512
LONG_BLANK = re.compile(r"\s{6,}")
MANY_ENTITY_SIGNS = 8  # ftfy may need a round for each; with more of them the rounds are counted here
NESTED_LEVELS = 4  # entities within entities that are resolved one a round, as ftfy does; the deeper ones all in one


def repair_text(text: str) -> str:
    """Mojibake repaired, HTML entities resolved (also nested, as "&amp;amp;"), white space collapsed.

    The same steps as the `whitespace` cleaning of open_clip 3.3's `HFTokenizer`, on the first 4096 characters and 512
    lines; a blank of any length counts as five characters at most.

    Raises:
        ValueError: `text` is not a string.
    """
    checked_texts([text])
    if len(text) > MAX_CHARACTERS or text.count("\n") > MAX_LINES:
        text = _beginning(text)
    return " ".join(html.unescape(html.unescape(_fixed(text))).split())


def _beginning(text: str) -> str:
    """The first characters and lines of `text` with short blanks, up to the limits."""
    short = ""
    for start in range(0, len(text), MAX_CHARACTERS):
        short = LONG_BLANK.sub(_short_blank, short + text[start : start + MAX_CHARACTERS])
        if len(short) > MAX_CHARACTERS:
            break
    kept = "\n".join(short[:MAX_CHARACTERS].split("\n")[:MAX_LINES])
    if kept == short:
        return short
    # Cut behind an ASCII character, where there is one: half a letter of mojibake would hide what the line is.
    ends = range(len(kept), max(len(kept) - 256, 0), -1)
    return kept[: next((end for end in ends if kept[end - 1].isascii()), len(kept))]


def _short_blank(blank: re.Match) -> str:
    """What ftfy sees of a long blank: its ends, and whether it has a line break."""
    return blank[0][:2] + "\n" * ("\n" in blank[0]) + blank[0][-2:]


def _fixed(text: str) -> str:
    """`ftfy.fix_text` in a bounded number of rounds; its own are as many as entities are nested, a quadratic time."""
    if sum(map(text.count, "&;＆；")) <= MANY_ENTITY_SIGNS:
        return ftfy.fix_text(text)
    bracket = text.find("<")  # from its line on, ftfy leaves entities alone
    end = len(text) if bracket < 0 else text.rfind("\n", 0, bracket) + 1
    return "".join(map(_fixed_line, re.split("(?<=\n)", text[:end]))) + ftfy.fix_text(text[end:])


def _fixed_line(line: str) -> str:
    for unescape in (*[unescape_html] * NESTED_LEVELS, _unescape_nested):
        before, line = line, ftfy.fix_text_segment(unescape(line), unescape_html=False)
        if line == before:
            break
    return line


def _unescape_nested(text: str) -> str:
    """ftfy's `unescape_html`, all levels in one go."""
    done = ""
    for part in re.split("(?<=;)", text):
        done += part
        while (start := done.rfind("&", -27)) >= 0 and (resolved := unescape_html(done[start:])) != done[start:]:
            done = done[:start] + resolved
    return done


class CapivaraTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that gives the ids of open_clip's `HFTokenizer`, whoever calls it.

    Every text is repaired (`repair_text`) and truncated at 77 tokens; `max_length` and `truncation` override the latter
    as in transformers. The mask is 0 also for padding tokens that a text itself spells: open_clip makes its mask from
    the ids.
    """

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "CapivaraTokenizer":
        """The vocabulary and the rules of `tokenizer` behind the repair; itself where it is of this class already.

        Raises:
            ValueError: `tokenizer` is none of the tokenizers library.
        """
        if type(tokenizer).__name__ == cls.__name__:  # of the package, or of a folder's own copy of this file
            return tokenizer
        if not tokenizer.is_fast:
            raise ValueError(
                f"A CAPIVARA tokenizer must be one of the tokenizers library, got {type(tokenizer).__name__}; give one "
                "that is saved as tokenizer.json."
            )
        return cls(**_settings(tokenizer))

    def plain(self) -> PreTrainedTokenizerFast:
        """The same without repair, for programs that repair texts themselves, as open_clip does."""
        return PreTrainedTokenizerFast(**_settings(self))

    def _get_padding_truncation_strategies(self, padding=False, truncation=None, max_length=None, **kwargs):
        truncation = True if truncation is None else truncation
        if max_length is None and (truncation or padding == "max_length"):
            max_length = min(self.model_max_length, CONTEXT_LENGTH)
        return super()._get_padding_truncation_strategies(padding, truncation, max_length, **kwargs)

    def _encode_plus(self, text, text_pair=None, **kwargs) -> BatchEncoding:
        batch = super()._encode_plus(_repaired(text), text_pair and _repaired(text_pair), **kwargs)
        pad = self.pad_token_id
        if "attention_mask" in batch and pad not in (None, self.eos_token_id, self.sep_token_id):  # those end a text
            batch["attention_mask"] = _without_padding(batch["input_ids"], batch["attention_mask"], pad)
        return batch


def _settings(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Arguments that make a fast tokenizer of the same ids."""
    names = ("model_max_length", "model_input_names", "padding_side", "truncation_side", "extra_special_tokens")
    settings = {name: getattr(tokenizer, name) for name in names}
    return {"tokenizer_object": tokenizer.backend_tokenizer, **tokenizer.special_tokens_map, **settings}


def checked_texts(text: str | Iterable[str]) -> str | list[str]:
    """A text as it is, several as a list.

    Raises:
        ValueError: a text is not a string, or there is none.
    """
    if isinstance(text, str):
        return text
    texts = list(text) if isinstance(text, Iterable) and not isinstance(text, bytes) else [text]
    if not texts:
        raise ValueError("There is no text: got an empty list; give at least one text, or leave `text` out.")
    for t in texts:
        if not isinstance(t, str):
            raise ValueError(f"A text must be a string, got {type(t).__name__}: {repr(t)[:200]}.")
    return texts


def _repaired(text: str | Iterable) -> str | list | tuple:
    if isinstance(text, list | tuple) and any(isinstance(part, list | tuple) for part in text):
        return [type(part)(_repaired(part)) if isinstance(part, list | tuple) else _repaired(part) for part in text]
    text = checked_texts(text)  # one, several, a pair, or one that is split into words
    return repair_text(text) if isinstance(text, str) else [repair_text(t) for t in text]


def _without_padding(input_ids: list | np.ndarray | Tensor, mask: list | np.ndarray | Tensor, pad: int):
    """`mask` without the padding tokens that a text itself spells."""
    if not isinstance(input_ids, list):
        return mask * (input_ids != pad)
    if input_ids and isinstance(input_ids[0], list):
        return [_without_padding(ids, keep, pad) for ids, keep in zip(input_ids, mask, strict=True)]
    return [int(keep and token != pad) for token, keep in zip(input_ids, mask, strict=True)]
