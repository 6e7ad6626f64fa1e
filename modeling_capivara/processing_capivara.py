"""Processor that prepares texts and images for a CAPIVARA model."""

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .text_cleaning_capivara import CONTEXT_LENGTH, check_and_collect_texts, clean_text
from .tokenization_capivara import CapivaraTokenizer

__all__ = ["CONTEXT_LENGTH", "CapivaraProcessor", "clean_text"]


class CapivaraProcessor(ProcessorMixin):
    """Tokenizer and image processor of CAPIVARA models in one object.

    Texts are cleaned, truncated to 77 tokens (or to a smaller `model_max_length` of the tokenizer) and padded to the
    longest text of the batch. Padding does not change the embeddings. The arguments `max_length`, `padding` and
    `truncation` of a call override these defaults. The token ids equal those of open_clip's `HFTokenizer`.

    transformers' pipelines ignore `processor=`. With a loaded model, pass both parts of the processor by name::

        pipeline("zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
                 image_processor=processor.image_processor)

    Args:
        image_processor: A `CapivaraImageProcessor`.
        tokenizer: A fast tokenizer. It is converted to a `CapivaraTokenizer` with the same vocabulary and tokenization
            rules.
        **kwargs: Options of transformers' `ProcessorMixin`.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from modeling_capivara import CapivaraProcessor
        >>> processor = CapivaraProcessor.from_pretrained(folder)
        >>> image = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
        >>> inputs = processor(text=["um gato", "uma casa"], images=image, return_tensors="pt")
        >>> sorted(inputs)
        ['attention_mask', 'input_ids', 'pixel_values']
        >>> inputs["pixel_values"].shape[:2]  # (images, channels)
        torch.Size([1, 3])
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = CapivaraTokenizer.from_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """Prepare images, texts or both for the model.

        Args:
            images: A PIL image, array, tensor, path or URL, or a list of them.
            text: A text or a list of texts.
            **kwargs: Options of the tokenizer and the image processor, such as `max_length` and `return_tensors`.

        Returns:
            A dictionary-like `BatchFeature`. For texts, it has "input_ids" and "attention_mask", each (texts, tokens).
            For images, it has "pixel_values", (images, 3, height, width).

        Raises:
            ValueError: If there is neither a text nor an image, the list of texts is empty, a text is not a string, or
                an image is invalid.
        """
        if text is not None:
            text = check_and_collect_texts(text)
            # Set the defaults of options that neither the call nor the loading of the tokenizer has set. `max_length`
            # is not set here, because the tokenizer has its own default.
            explicit = {**self.tokenizer.init_kwargs, **kwargs}
            defaults = {name: True for name in ("padding", "truncation") if name not in explicit}
            kwargs["text_kwargs"] = {**defaults, **kwargs.get("text_kwargs", {})}
        return super().__call__(images=images, text=text, **kwargs)
