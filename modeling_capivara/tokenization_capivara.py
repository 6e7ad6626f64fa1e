"""Texts to token ids, with the text repair that open_clip's tokenizer does."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checks_capivara import wrap_tokenizer_errors
from .text_cleaning_capivara import CONTEXT_LENGTH, check_texts, clean_text


class CapivaraTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that gives the token ids of open_clip's `HFTokenizer`, whoever calls it.

    Every text is cleaned (`repair_text`) and truncated to 77 tokens; `max_length` and `truncation` override the latter
    as in transformers. `pad_to_multiple_of` applies after truncation, so it changes the padding alone: with 8, texts of
    77 tokens are padded to 80. The mask is 0 also for padding tokens that are spelled in a text, because open_clip
    derives its mask from the ids.

    The length and padding of the last call, which the tokenizers library keeps in `tokenizer.json`, are neither saved
    nor loaded. Those that a tokenizer is loaded with are settings of `CapivaraProcessor`.
    """

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "CapivaraTokenizer":
        """Return `tokenizer` as one of this class, with its vocabulary and rules, or unchanged if it is one already."""
        if type(tokenizer).__name__ == cls.__name__:  # of the package, or of a folder's own copy of this file
            return tokenizer
        if not tokenizer.is_fast:
            found = f"{type(tokenizer).__name__}; give one that is saved as tokenizer.json"
            raise ValueError(f"A CAPIVARA tokenizer must be one of the tokenizers library, got {found}.")
        converted = cls(**_tokenizer_kwargs(tokenizer))
        converted.init_kwargs.pop("max_length", None)  # of the last call of `tokenizer`
        return converted

    def without_cleaning(self) -> PreTrainedTokenizerFast:
        """The same without repair, for programs that repair texts themselves, as open_clip does."""
        return PreTrainedTokenizerFast(**_tokenizer_kwargs(self))

    @classmethod
    def _from_pretrained(cls, *args, **kwargs):
        tokenizer = super()._from_pretrained(*args, **kwargs)
        # Earlier versions saved the length of the last call, which transformers reads as a setting.
        state = tokenizer.backend_tokenizer
        remembered = (state.truncation or {}).get("max_length"), (state.padding or {}).get("length")
        if "max_length" not in kwargs and tokenizer.init_kwargs.get("max_length") in remembered:
            tokenizer.init_kwargs.pop("max_length", None)
        return tokenizer

    def _save_pretrained(self, *args, **kwargs):
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        return super()._save_pretrained(*args, **kwargs)

    def _get_padding_truncation_strategies(
        self, padding=False, truncation=None, max_length=None, pad_to_multiple_of=None, **kwargs
    ):
        truncation = True if truncation is None else truncation
        if max_length is None and (truncation or padding == "max_length"):
            max_length = min(self.model_max_length, CONTEXT_LENGTH)
        # Without the multiple, which is only compared with the length here: it need not divide 77.
        return super()._get_padding_truncation_strategies(padding, truncation, max_length, **kwargs)

    def _encode_plus(self, text, text_pair=None, **kwargs) -> BatchEncoding:
        repaired = _clean(text), text_pair and _clean(text_pair)
        with wrap_tokenizer_errors(f"The tokenizer of {self.name_or_path or 'the model'}"):
            batch = super()._encode_plus(*repaired, **kwargs)
        pad = self.pad_token_id
        if "attention_mask" in batch and pad not in (None, self.eos_token_id, self.sep_token_id):  # those end a text
            batch["attention_mask"] = _mask_padding(batch["input_ids"], batch["attention_mask"], pad)
        return batch


def _tokenizer_kwargs(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Arguments that make a fast tokenizer of the same ids."""
    names = ("model_max_length", "model_input_names", "padding_side", "truncation_side", "extra_special_tokens")
    settings = {name: getattr(tokenizer, name) for name in names}
    return {"tokenizer_object": tokenizer.backend_tokenizer, **tokenizer.special_tokens_map, **settings}


def _clean(text: str | Iterable) -> str | list | tuple:
    if isinstance(text, list | tuple) and any(isinstance(part, list | tuple) for part in text):
        return [type(part)(_clean(part)) if isinstance(part, list | tuple) else _clean(part) for part in text]
    text = check_texts(text)  # one, several, a pair, or one that is split into words
    return clean_text(text) if isinstance(text, str) else [clean_text(t) for t in text]


def _mask_padding(input_ids: list | np.ndarray | Tensor, mask: list | np.ndarray | Tensor, pad_token_id: int):
    """`mask` without the padding tokens that a text itself spells."""
    if not isinstance(input_ids, list):
        return mask * (input_ids != pad_token_id)
    if input_ids and isinstance(input_ids[0], list):
        return [_mask_padding(ids, keep, pad_token_id) for ids, keep in zip(input_ids, mask, strict=True)]
    return [int(keep and token != pad_token_id) for token, keep in zip(input_ids, mask, strict=True)]
