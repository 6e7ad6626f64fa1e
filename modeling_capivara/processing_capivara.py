"""Texts and images to model inputs."""

from transformers import (
    BatchFeature,
    ImageFeatureExtractionPipeline,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ZeroShotImageClassificationPipeline,
)

from .text_repair_capivara import CONTEXT_LENGTH, checked_texts, repair_text
from .tokenization_capivara import CapivaraTokenizer

__all__ = ["CONTEXT_LENGTH", "CapivaraProcessor", "repair_text"]
TEXT_DEFAULTS = {"padding": True, "truncation": True, "max_length": CONTEXT_LENGTH}

# `pipeline(task, model=model, processor=processor)` would take tokenizer and image processor from the processor, but
# looks for them by the model's name first and fails without one. None, of transformers too, makes that no failure.
ZeroShotImageClassificationPipeline._load_tokenizer = None
ZeroShotImageClassificationPipeline._load_image_processor = None
ImageFeatureExtractionPipeline._load_image_processor = None


class CapivaraProcessor(ProcessorMixin):
    """Image processor and tokenizer in one, giving the ids that open_clip's `HFTokenizer` gives.

    Texts are repaired, truncated at 77 tokens and padded to the longest of the batch, not always to 77; embeddings are
    the same either way. `max_length`, `padding` and `truncation` override that as in transformers. Any fast tokenizer
    is made a `CapivaraTokenizer`, which repairs texts also where it is called without the processor.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = CapivaraTokenizer.from_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """`input_ids` and `attention_mask` (texts, tokens) and `pixel_values` (images, 3, height, width), as asked.

        Images are PIL images, arrays, tensors, paths or URLs, one or a list. ValueError where a text is not a string,
        the list of texts is empty, or neither images nor texts are given.
        """
        if text is not None:
            text = checked_texts(text)
        # Passed with every call: as attributes of the class, they would yield to the length and padding that a
        # tokenizer remembers from its last call and saves.
        defaults = {key: value for key, value in TEXT_DEFAULTS.items() if key not in kwargs}
        kwargs["text_kwargs"] = {**defaults, **kwargs.get("text_kwargs", {})}
        return super().__call__(images=images, text=text, **kwargs)
