"""Tokenizer that cleans texts as open_clip does and returns the same token ids."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checks_capivara import wrap_tokenizer_errors
from .text_cleaning_capivara import CONTEXT_LENGTH, check_and_collect_texts, clean_text


class CapivaraTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer that returns the same token ids as open_clip's `HFTokenizer`.

    Every text is cleaned (`clean_text`) and truncated to 77 tokens, or to a smaller `model_max_length`. The arguments
    `max_length` and `truncation` of a call override this limit.

    Padding follows truncation: `pad_to_multiple_of=8` pads 77 tokens to 80. The attention mask is 0 for every padding
    token ("<pad>"), even if a text itself contains it.

    A `max_length` or `padding` that is passed to `from_pretrained` becomes a default of `CapivaraProcessor`.
    """

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "CapivaraTokenizer":
        """Convert a fast tokenizer to a `CapivaraTokenizer` with the same vocabulary, tokenization rules and settings.

        Args:
            tokenizer: Fast tokenizer of any class. The converted tokenizer shares its vocabulary, without a copy.

        Returns:
            The converted tokenizer, or `tokenizer` itself if it is already a `CapivaraTokenizer`.

        Raises:
            ValueError: If `tokenizer` is not a fast tokenizer.
        """
        # The classes are compared by name, because the tokenizer's class may come from the copy of this file in a model
        # folder (`trust_remote_code=True`).
        if type(tokenizer).__name__ == cls.__name__:
            return tokenizer
        if not tokenizer.is_fast:
            hint = f"got {type(tokenizer).__name__}. Use one that is saved as tokenizer.json"
            raise ValueError(f"A CAPIVARA tokenizer must be a fast tokenizer (of the tokenizers library), {hint}.")
        names = ("model_max_length", "model_input_names", "padding_side", "truncation_side", "extra_special_tokens")
        settings = {name: getattr(tokenizer, name) for name in names}
        converted = cls(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map, **settings)
        # This value is left over from the last call of `tokenizer`, and transformers would read it as a setting.
        converted.init_kwargs.pop("max_length", None)
        return converted

    @classmethod
    def _from_pretrained(cls, *args, **kwargs):
        tokenizer = super()._from_pretrained(*args, **kwargs)
        # Earlier versions of this class saved the maximum length of the last call. transformers would read it as a
        # setting, so it is removed.
        backend = tokenizer.backend_tokenizer
        last_call_lengths = (backend.truncation or {}).get("max_length"), (backend.padding or {}).get("length")
        if "max_length" not in kwargs and tokenizer.init_kwargs.get("max_length") in last_call_lengths:
            tokenizer.init_kwargs.pop("max_length", None)
        return tokenizer

    def _save_pretrained(self, *args, **kwargs):
        # Otherwise, the tokenizers library would store the `max_length` and `padding` of the last call in
        # tokenizer.json.
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        return super()._save_pretrained(*args, **kwargs)

    def _get_padding_truncation_strategies(
        self, padding=False, truncation=None, max_length=None, pad_to_multiple_of=None, **kwargs
    ):
        truncation = True if truncation is None else truncation
        if max_length is None and (truncation or padding == "max_length"):
            max_length = min(self.model_max_length, CONTEXT_LENGTH)
            # Hide `pad_to_multiple_of` from a check of transformers. The check would fail, because the maximum length,
            # 77 by default, is usually not a multiple of it. The padding itself still uses `pad_to_multiple_of`.
            pad_to_multiple_of = None
        # If the call passes `max_length`, transformers requires that it is a multiple of `pad_to_multiple_of`.
        return super()._get_padding_truncation_strategies(padding, truncation, max_length, pad_to_multiple_of, **kwargs)

    def _encode_plus(self, text, text_pair=None, **kwargs) -> BatchEncoding:
        text, text_pair = _clean_tokenizer_input(text), text_pair and _clean_tokenizer_input(text_pair)
        with wrap_tokenizer_errors(f"The tokenizer of {self.name_or_path or 'the model'}"):
            batch = super()._encode_plus(text, text_pair, **kwargs)
        pad = self.pad_token_id
        # open_clip computes its mask from the token ids, so a padding token in a text is masked too.
        # In some tokenizers, the padding token also ends each text. Masking all padding tokens would then mask the end
        # of every text, so the attention mask stays as it is.
        if "attention_mask" in batch and pad not in (None, self.eos_token_id, self.sep_token_id):
            batch["attention_mask"] = _mask_padding(batch["input_ids"], batch["attention_mask"], pad)
        return batch


def _clean_tokenizer_input(text: str | Iterable) -> str | list | tuple:
    """Clean all strings in a tokenizer's input with `clean_text`, and return the input in the same structure.

    Args:
        text: A text, a list of texts, a list of pairs of texts, or a list of texts that are split into lists of words.
    """
    if isinstance(text, list | tuple) and any(isinstance(part, list | tuple) for part in text):
        cleaned = map(_clean_tokenizer_input, text)
        return [tuple(new) if isinstance(old, tuple) else new for old, new in zip(text, cleaned, strict=True)]
    text = check_and_collect_texts(text)
    return clean_text(text) if isinstance(text, str) else [clean_text(part) for part in text]


def _mask_padding(input_ids: list | np.ndarray | Tensor, mask: list | np.ndarray | Tensor, pad_token_id: int):
    """Return an attention mask that is 0 for every padding token, also for a padding token that is part of a text.

    Args:
        input_ids: Token ids of one text, (tokens,), or of several texts, (texts, tokens).
        mask: Attention mask in the same shape, 1 for a token and 0 for padding.
        pad_token_id: Id of the padding token.

    Returns:
        The new mask, in the same shape. It is a list if `input_ids` is a list.
    """
    if not isinstance(input_ids, list):
        return mask * (input_ids != pad_token_id)
    if input_ids and isinstance(input_ids[0], list):
        return [_mask_padding(ids, row_mask, pad_token_id) for ids, row_mask in zip(input_ids, mask, strict=True)]
    return [int(bit and token != pad_token_id) for token, bit in zip(input_ids, mask, strict=True)]
