"""Generate captions of images with BLIP-2 (`--captioner blip2`): for each image, one caption per prefix.

A prefix is the beginning of a caption, for example "a photo of". The model continues it by greedy decoding. The file
captions/prefixes.json has the ten prefixes of the CAPIVARA authors; `--prefixes` selects another file.
"""

import copy
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from capivara_common.cli import flag
from capivara_common.environment import resolve_device
from capivara_common.files import read_json
from capivara_common.hub_cache import check_hub_model_reachable
from capivara_common.image_files import BadRow
from caption_data.rows import CAPTIONS_FEATURE
from captions.captioners.base import Captioner
from captions.stages import DECODED_KEY, Row
from captions.translators.seq2seq import DTYPES
from modeling_capivara.loading import load_transformers_config, weights_digest

DEFAULT_MODEL = "Salesforce/blip2-opt-2.7b-coco"  # the model of the CAPIVARA paper, arXiv 2310.13683
OUTPUT_COLUMN = "generated-captions-en"
# Reason that is recorded if an image is skipped because the scores of the language model were NaN.
NAN_REASON = "no finite scores"
PREFIXES_FILE = Path(__file__).parent.parent / "prefixes.json"


@dataclass(kw_only=True)
class Blip2Flags:
    """Flags of the backend that generates captions with BLIP-2 on this machine (`--captioner blip2`)."""

    max_new_tokens: int = flag(50, "Only for --captioner blip2: largest number of generated tokens per caption.")
    micro_batch_size: int = flag(
        160, "Captions that blip2 generates at the same time. Lower values need less memory and more time."
    )
    revision: str | None = flag(None, "Hub branch, tag or commit, only for --captioner blip2. Default: main.")
    prefixes: Path = flag(PREFIXES_FILE, "JSON file of prefixes for blip2, in the format of captions/prefixes.json.")
    precision: Literal["float32", "bf16", "fp16"] = flag(
        "float32", "Data type of the weights and activations of blip2. The CAPIVARA authors used fp16."
    )
    device: str | None = flag(None, "cpu or cuda, only for --captioner blip2. Default: cuda if there is a GPU.")


@dataclass
class PrefixCaptioner:
    """A BLIP-2 model that completes several prefixes, such as "a photo of", to captions of the same image.

    Each image is encoded only once for all prefixes. The generated tokens are the same as with a separate call of
    `generate` for each prefix.

    Attributes:
        model: BLIP-2 with a decoder-only language model, in evaluation mode.
        image_processor: Image processor of the model.
        tokenizer: Tokenizer of the language model.
        max_new_tokens: Largest number of tokens that are generated after a prefix.
        micro_batch_size: Number of captions that are generated at the same time.
    """

    model: Blip2ForConditionalGeneration
    image_processor: Any
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 50
    micro_batch_size: int = 160

    def __post_init__(self) -> None:
        self.device, self.language_model, tokenizer = self.model.device, self.model.language_model, self.tokenizer
        config = self.language_model.generation_config
        # Unset `max_length`: if it and `max_new_tokens` were set, each call of `generate` would log a warning.
        config.max_length = None
        # `generate` pads the shorter texts of a batch with this token, so it must be set.
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        parameters = inspect.signature(self.language_model.forward).parameters
        # transformers 5.24 renamed the parameter `past_key_values` to `cache`. Support older and newer versions.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def generate_captions(self, images: Sequence[PIL.Image.Image], prefixes: Sequence[str]) -> list[list[str] | BadRow]:
        """Generate captions of images: for each image, one caption per prefix.

        Args:
            images: RGB images.
            prefixes: Beginnings of the captions, for example "a photo of".

        Returns:
            For each image, a list with one caption per prefix. If a score of the language model was NaN, a `BadRow`
            that holds the reason instead.
        """
        tokens = self.generate_tokens(self.preprocess_images(images), prefixes)
        return [self._decode_texts(image_tokens, prefixes) for image_tokens in tokens]

    def preprocess_images(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Convert RGB images to the pixel values that the model reads.

        Returns:
            A tensor (images, 3, height, width) on the device and in the data type of the model.
        """
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.language_model.dtype)

    @torch.inference_mode()
    def generate_tokens(self, pixel_values: Tensor, prefixes: Sequence[str]) -> list[list[Tensor | None]]:
        """Continue each prefix for each image, by greedy decoding.

        Args:
            pixel_values: Preprocessed images (images, 3, height, width).
            prefixes: Beginnings of the captions.

        Returns:
            For each image, a list with one element per prefix: the token ids of the continuation (tokens,), which may
            end with an end token and padding. None if a score of the language model was NaN.
        """
        encoded, prompts = self.encode_images(pixel_values), self.tokenizer(list(prefixes))["input_ids"]
        continuations: list[Tensor | None] = []
        pairs = list(itertools.product(range(len(pixel_values)), prompts))  # (index of image, token ids of prefix)
        for start in range(0, len(pairs), self.micro_batch_size):
            batch = pairs[start : start + self.micro_batch_size]
            has_nan = torch.zeros(len(batch), dtype=torch.bool, device=self.device)

            # `generate` calls this function at every step with the scores of all tokens (texts, vocabulary). It records
            # which texts have a NaN score, so that their images are skipped.
            def record_nan(ids: Tensor, scores: Tensor, has_nan: Tensor = has_nan) -> Tensor:
                has_nan |= scores.isnan().any(-1)
                return scores

            images = torch.tensor([image for image, _ in batch], device=self.device)
            options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
            options["logits_processor"] = LogitsProcessorList([record_nan])
            tokens = self.continue_prompts(encoded, images, [prompt for _, prompt in batch], **options)
            continuations += [None if bad else row for row, bad in zip(tokens.cpu(), has_nan.tolist(), strict=True)]
        count = len(prompts)
        return [continuations[first : first + count] for first in range(0, len(continuations), count)]

    def encode_images(self, pixel_values: Tensor) -> DynamicCache:
        """Encode images, and compute the keys and values with which the language model attends to them.

        Args:
            pixel_values: Preprocessed images (images, 3, height, width).

        Returns:
            A key-value cache of the language model, with one batch entry per image. It covers the query tokens, that
            is, the outputs of the Q-Former for the image.
        """
        # Query tokens: the form in which the language model reads an image. Shape: (images, queries, model width). The
        # language model is causal, so their keys and values do not depend on the prefix, and all prefixes share them.
        blocks = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        cache = DynamicCache(config=self.language_model.config)
        self.language_model.base_model(inputs_embeds=blocks, use_cache=True, **{self._cache_name: cache})
        return cache

    def continue_prompts(self, cache: DynamicCache, images: Tensor, prompts: list[list[int]], **options: Any) -> Tensor:
        """Generate the text that follows each prompt, given an image that has been encoded before.

        Args:
            cache: Keys and values of all images, from `encode_images`. The cache does not change.
            images: For each prompt, the index of its image in `cache` (prompts,).
            prompts: Token ids of each prompt.
            **options: Arguments of transformers' method `generate`.

        Returns:
            Token ids of the continuations (prompts, new tokens), without the prompts.
        """
        cache = copy.deepcopy(cache)
        cache.batch_select_indices(images)
        ids, mask = self.pad_prompts(prompts)
        embeds = self.model.get_input_embeddings()(ids).to(self.language_model.dtype)
        # `generate` needs embeddings for all positions, also for the positions of the image. Zeros are enough there:
        # `generate` does not read them, because the cache already holds the keys and values of the image.
        placeholder = embeds.new_zeros(len(ids), cache.get_seq_length(), embeds.shape[-1])
        return self.language_model.generate(
            inputs_embeds=torch.cat([placeholder, embeds], 1),
            attention_mask=torch.cat([mask.new_ones(placeholder.shape[:2]), mask], 1),
            **{self._cache_name: cache},
            **options,
        )

    def pad_prompts(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad prompts on the left to the same length, so that they form a batch.

        Args:
            prompts: Token ids of each prompt.

        Returns:
            A tuple (token ids, attention mask). Both tensors have the shape (prompts, tokens). The mask is 0 at
            padding.
        """
        rows = [torch.tensor(prompt, device=self.device) for prompt in prompts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        return pad_sequence(rows, True, self.language_model.generation_config.pad_token_id, "left"), mask

    def _decode_texts(self, tokens: list[Tensor | None], prefixes: Sequence[str]) -> list[str] | BadRow:
        """Convert the continuations of one image to captions.

        Args:
            tokens: Token ids of the continuation of each prefix, or None if a score of the language model was NaN.
            prefixes: Beginnings of the captions.

        Returns:
            One caption per prefix, or a BadRow if any element of `tokens` is None.
        """
        if any(row is None for row in tokens):
            return BadRow(NAN_REASON, "the scores of the model were NaN; --precision bf16 or float32 can avoid this")
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [f"{prefix} {text.strip()}".strip() for prefix, text in zip(prefixes, texts, strict=True)]


def load_captioner(args: Any) -> PrefixCaptioner:
    """Load the BLIP-2 model that generates captions.

    Args:
        args: Flags of `captions.generate`. The flags `model` and `revision` choose the model.

    Returns:
        The model, ready to generate captions.

    Raises:
        ValueError, OSError: If the model does not exist, or is not a BLIP-2 model with a decoder-only language model.
    """
    check_hub_model_reachable(args.model, revision=args.revision)
    config = load_transformers_config(args.model, revision=args.revision)
    if config.model_type != "blip-2" or config.text_config.is_encoder_decoder:
        raise ValueError(
            f"{args.model} has the model type {config.model_type!r}; it must be a BLIP-2 model with a decoder-only "
            f"language model, such as {DEFAULT_MODEL}. To use captions of another model, add them to the "
            f"dataset as the column {OUTPUT_COLUMN} and omit this stage."
        )
    source = {"pretrained_model_name_or_path": args.model, "revision": args.revision}
    model = Blip2ForConditionalGeneration.from_pretrained(**source, dtype=DTYPES[args.precision])
    processor, tokenizer = AutoImageProcessor.from_pretrained(**source), AutoTokenizer.from_pretrained(**source)
    model.eval().to(resolve_device(args.device))
    return PrefixCaptioner(model, processor, tokenizer, args.max_new_tokens, args.micro_batch_size)


# The code above completes caption prefixes for a list of images. The code below does this for the rows of a dataset.


def read_caption_prefixes(path: Path) -> list[str]:
    """Read the beginnings of captions, such as "a photo of", from a JSON file.

    The content of the file must be `{"prefixes": [texts]}`. Raises ValueError if the file has no prefixes, or if a
    prefix is blank or repeated.
    """
    values = read_json(path, prefixes=list)["prefixes"]
    prefixes = [prefix.strip() for prefix in values if isinstance(prefix, str)]
    if not prefixes or not all(prefixes) or len(set(prefixes)) < len(values):
        rule = 'must hold {"prefixes": [texts]} with at least one text, and without blank or repeated texts'
        raise ValueError(f"{path} {rule} (see captions/prefixes.json), got {values}.")
    return prefixes


class Blip2Captioner(Captioner):
    """Captioner that generates English captions with BLIP-2: the model completes prefixes, such as "a photo of".

    Args:
        args: Flags of `captions.generate`.
    """

    flags = Blip2Flags

    def __init__(self, args: Any):
        self._prefixes, self._model = read_caption_prefixes(args.prefixes), load_captioner(args)
        self.settings = {
            # For a local folder, record only its name. The folder can then be moved without a change of the settings.
            "model": Path(args.model).name if Path(args.model).is_dir() else args.model,
            "revision": getattr(self._model.model.config, "_commit_hash", None),
            "weights": weights_digest(self._model.model),
            "prefixes": self._prefixes,
            "max_new_tokens": args.max_new_tokens,
            "precision": args.precision,
            "sampling": None,  # unused; output folders of earlier versions have this key and must stay valid
        }

    @classmethod
    def check_flags(cls, args: Any) -> None:
        """Check the flags: BLIP-2 writes only English captions.

        Raises ValueError if captions in another language are requested.
        """
        if args.caption_language != "en":
            raise ValueError(
                f"caption_language must be en with --captioner blip2, got {args.caption_language!r}. Use --captioner "
                "chat for other languages, or translate the captions."
            )

    @classmethod
    def columns(cls, args: Any) -> dict[str, Any]:
        """Return the column that this backend adds to the dataset, as a dict `{"column name": feature}`.

        A feature is a column type of `datasets`.
        """
        return {OUTPUT_COLUMN: CAPTIONS_FEATURE}

    def caption_rows(self, rows: list[Row]) -> list[Row | BadRow]:
        """Generate captions of the images in dataset rows.

        Args:
            rows: Rows with a decoded image under the key `captions.stages.DECODED_KEY`.

        Returns:
            For each row, a dict `{"generated-captions-en": captions}`. If the scores of the model were NaN, a `BadRow`,
            so that the row is skipped.

        Raises:
            ValueError: If the memory of the GPU or CPU is insufficient.
        """
        images = [row[DECODED_KEY] for row in rows]
        # PIL can't convert the image mode La (grayscale with premultiplied alpha) to RGB directly, only by way of LA.
        images = [image.convert("LA") if image.mode == "La" else image for image in images]
        try:
            captions = self._model.generate_captions([image.convert("RGB") for image in images], self._prefixes)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(
                f"Out of memory with {len(rows)} images and {self._model.micro_batch_size} captions at the same time. "
                f"Lower --micro_batch_size, then --batch_rows, or use --precision bf16 or fp16. ({error})"
            ) from error
        return [texts if isinstance(texts, BadRow) else {OUTPUT_COLUMN: texts} for texts in captions]
