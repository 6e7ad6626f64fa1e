"""Texts and images to model inputs."""

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .text_cleaning_capivara import CONTEXT_LENGTH, check_texts, clean_text
from .tokenization_capivara import CapivaraTokenizer

__all__ = ["CONTEXT_LENGTH", "CapivaraProcessor", "clean_text"]
TEXT_KWARGS_DEFAULTS = {"padding": True, "truncation": True, "max_length": CONTEXT_LENGTH}


class CapivaraProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one, which gives the token ids of open_clip's `HFTokenizer`.

    Texts are cleaned, truncated to 77 tokens and padded to the longest text of the batch; embeddings do not depend on
    the padding. `max_length`, `padding` and `truncation` of a call override these defaults, and so do those that the
    tokenizer was loaded with: `AutoTokenizer.from_pretrained(folder, max_length=32, padding="max_length")`.

    Any fast tokenizer is converted to a `CapivaraTokenizer`, which cleans texts also when it is called without the
    processor. Its vocabulary and rules are kept, its length and padding are not.

    `pipeline(task, model=folder)` finds everything by itself. For a loaded model, transformers asks for the parts by
    name and does not look into `processor=`:

        pipeline("zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
                 image_processor=processor.image_processor)
        pipeline("image-feature-extraction", model=model, image_processor=processor.image_processor)

    Args:
        image_processor: A `CapivaraImageProcessor`.
        tokenizer: A fast tokenizer.

    Example:
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(text=["um gato", "uma casa"], images=image, return_tensors="pt")
        logits = model(**inputs).logits_per_image  # (1, 2)
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = CapivaraTokenizer.from_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """Prepare images, texts or both for the model.

        Args:
            images: PIL images, arrays, tensors, paths or URLs, one or a list.
            text: One text or a list of them.
            **kwargs: Options of the tokenizer and the image processor, such as `max_length`, `padding` and
                `return_tensors`.

        Returns:
            `input_ids` and `attention_mask`, (texts, tokens), if there are texts, and `pixel_values`,
            (images, 3, height, width), if there are images.

        Raises:
            ValueError: If a text is not a string, the list of texts is empty, or neither images nor texts are given.
        """
        if text is not None:
            text = check_texts(text)
            given = {**self.tokenizer.init_kwargs, **kwargs}
            defaults = {key: value for key, value in TEXT_KWARGS_DEFAULTS.items() if key not in given}
            kwargs["text_kwargs"] = {**defaults, **kwargs.get("text_kwargs", {})}
        return super().__call__(images=images, text=text, **kwargs)
