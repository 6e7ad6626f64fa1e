"""Texts and images to model inputs, with the text repair that open_clip's tokenizer does."""

import html
from collections.abc import Iterable

import ftfy
import numpy as np
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

CONTEXT_LENGTH = 77  # tokens, begin and end included; open_clip's default, kept by CAPIVARA
TEXT_DEFAULTS = {"padding": True, "truncation": True, "max_length": CONTEXT_LENGTH}


class CapivaraProcessor(ProcessorMixin):
    """Image processor and tokenizer in one, giving the ids that open_clip's `HFTokenizer` gives.

    Texts are repaired (`repair_text`), truncated at 77 tokens and padded to the longest of the batch, not always to
    77; embeddings are the same either way. `max_length`, `padding` and `truncation` override that as in transformers.

    Args:
        image_processor: a `CapivaraImageProcessor`.
        tokenizer: a transformers tokenizer, XLM-R's for the published model.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """Inputs of `CapivaraModel`.

        Args:
            images: PIL images, arrays, tensors, paths or URLs, one or a list.
            text: a text or a list of texts.
            kwargs: as in transformers, `return_tensors="pt"` above all.

        Returns:
            `input_ids` and `attention_mask` (texts, tokens), `pixel_values` (images, 3, height, width): of those, what
            was asked for.

        Raises:
            ValueError: a text is not a string, the list of texts is empty, or neither images nor texts are given.
        """
        if text is not None:
            text = _repaired(text)
        # Passed with every call: as attributes of the class, they would yield to the length and padding that a
        # tokenizer remembers from its last call and saves.
        defaults = {key: value for key, value in TEXT_DEFAULTS.items() if key not in kwargs}
        kwargs["text_kwargs"] = {**defaults, **kwargs.get("text_kwargs", {})}
        batch = super().__call__(images=images, text=text, **kwargs)
        if "attention_mask" in batch:
            tokenizer = self.tokenizer
            pad = tokenizer.pad_token_id
            if pad not in (None, tokenizer.eos_token_id, tokenizer.sep_token_id):  # those end a text, too
                batch["attention_mask"] = _without_padding(batch["input_ids"], batch["attention_mask"], pad)
        return batch


def _without_padding(input_ids: list | np.ndarray | Tensor, mask: list | np.ndarray | Tensor, pad: int):
    """`mask` without the padding tokens that a text itself spells: open_clip makes its mask from the ids."""
    if not isinstance(input_ids, list):
        return mask * (input_ids != pad)
    if input_ids and isinstance(input_ids[0], list):
        return [_without_padding(ids, keep, pad) for ids, keep in zip(input_ids, mask, strict=True)]
    return [int(keep and token != pad) for token, keep in zip(input_ids, mask, strict=True)]


def _repaired(text: str | list[str]) -> str | list[str]:
    if isinstance(text, str) or not isinstance(text, Iterable):
        return repair_text(text)
    texts = [repair_text(t) for t in text]
    if not texts:
        raise ValueError("There is no text: got an empty list; give at least one text, or leave `text` out.")
    return texts


def repair_text(text: str) -> str:
    """Mojibake repaired, HTML entities resolved (twice, as "&amp;amp;" needs), white space collapsed.

    The same steps as the `whitespace` cleaning of open_clip 3.3's `HFTokenizer`.

    Raises:
        ValueError: `text` is not a string.
    """
    if not isinstance(text, str):
        raise ValueError(f"A text must be a string, got {type(text).__name__}: {text!r}.")
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
