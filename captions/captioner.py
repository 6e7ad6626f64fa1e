"""Captions that go on from a prefix: BLIP-2 with what an image's prefixes share computed once, others by plain calls.

    captioner = Blip2Captioner(model, image_processor, tokenizer, max_new_tokens=20)
    captioner.captions([image], ["a photo of", "the picture shows"])

A caption is the likeliest text; the model is in `eval()`, on its device.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from capivara_common.image_files import BadRow

NOT_FINITE = "no finite scores"  # reason of a `BadRow`


class FiniteScores(LogitsProcessor):
    """Notes the texts with a score that is no number: what they say is noise."""

    def __init__(self, texts: int, device: torch.device):
        self.broken = torch.zeros(texts, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, unchanged."""
        self.broken |= scores.isnan().any(-1)
        return scores


class Captioner:
    """An image-to-text model, in `eval()` on its device, in its plain call, which encodes an image anew per prefix.

    A text has at most `max_new_tokens`; `micro_batch_size` of them are written at once.
    """

    pads = False  # whether prefixes of several lengths go into one call

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 50,
        micro_batch_size: int = 160,
    ):
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.max_new_tokens, self.micro_batch_size = max_new_tokens, micro_batch_size
        self.device, self.kind = model.device, model.config.model_type
        config = self.writer.generation_config
        config.max_length = None  # else `generate` warns at every call that it has two limits
        if config.pad_token_id is None:  # a batch's texts end at different steps
            config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def writer(self) -> PreTrainedModel:
        """The part whose `generate` writes the text."""
        return self.model.text_decoder if self.kind == "blip" else self.model

    def captions(self, images: Sequence[PIL.Image.Image], prefixes: Sequence[str]) -> list[list[str] | BadRow]:
        """For every image, RGB, one caption a prefix, or why it has none: the prefix, a blank and what goes on from
        it."""
        return self.written(self.pixels(images), prefixes) if images else []

    def written(self, pixel_values: Tensor, prefixes: Sequence[str]) -> list[list[str] | BadRow]:
        """`captions` of what `pixels` has prepared, (images, 3, height, width)."""
        return [self._texts(tokens, prefixes) for tokens in self.new_tokens(pixel_values, prefixes)]

    def pixels(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """(images, 3, height, width)."""
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.writer.dtype)

    @torch.inference_mode()
    def new_tokens(self, pixel_values: Tensor, prefixes: Sequence[str]) -> list[list[Tensor | None]]:
        """Token ids that go on from every prefix, for every image, (images, 3, height, width).

        Each is (steps,), end token and padding included; None where a score was no number.
        """
        encoded = self.encode(pixel_values)
        prompts = [self.prompt(prefix) for prefix in prefixes]
        found: list[list[Tensor | None]] = [[None] * len(prefixes) for _ in range(len(pixel_values))]
        for pairs in self._micro_batches(len(pixel_values), prompts):
            finite = FiniteScores(len(pairs), self.device)
            images = torch.tensor([image for image, _ in pairs], device=self.device)
            options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
            options["logits_processor"] = LogitsProcessorList([finite])
            tokens = self.continued(encoded, images, [prompts[prefix] for _, prefix in pairs], **options)
            for (image, prefix), row, broken in zip(pairs, tokens.cpu(), finite.broken.tolist(), strict=True):
                found[image][prefix] = None if broken else row
        return found

    def encode(self, pixel_values: Tensor) -> Any:
        """What all prefixes of an image share: here no more than its pixels."""
        return pixel_values

    def prompt(self, prefix: str) -> list[int]:
        """Token ids that a text begins with: the start token, and no end."""
        config = self.model.config
        if self.kind == "vision-encoder-decoder":
            start = config.decoder_start_token_id
        else:
            start = config.text_config.bos_token_id if self.kind == "blip" else self.tokenizer.cls_token_id
        return [start, *self.tokenizer(prefix, add_special_tokens=False)["input_ids"]]

    def continued(self, encoded: Any, images: Tensor, prompts: list[list[int]], **options: Any) -> Tensor:
        """The new token ids, (texts, steps), of `encode`d images, the number of each text's image, (texts,), and as
        many prompts, all of one length unless `pads`."""
        ids = torch.tensor(prompts, device=self.device)
        name = "decoder_input_ids" if self.kind == "vision-encoder-decoder" else "input_ids"
        # BLIP drops the last token, which it takes for the end of a text.
        given = torch.cat([ids, ids[:, -1:]], 1) if self.kind == "blip" else ids
        output = self.model.generate(pixel_values=encoded[images], **{name: given}, **options)
        return output[:, ids.shape[1] :]

    def _micro_batches(self, images: int, prompts: list[list[int]]) -> Iterator[list[tuple[int, int]]]:
        """Numbers of image and prefix, in order of the prefix's length, so that little is padded."""
        pairs = sorted(itertools.product(range(images), range(len(prompts))), key=lambda pair: len(prompts[pair[1]]))
        for _, group in itertools.groupby(pairs, key=lambda pair: 0 if self.pads else len(prompts[pair[1]])):
            while batch := list(itertools.islice(group, self.micro_batch_size)):
                yield batch

    def _texts(self, tokens: list[Tensor | None], prefixes: Sequence[str]) -> list[str] | BadRow:
        if any(row is None for row in tokens):
            return BadRow(NOT_FINITE, "the model's scores were no numbers; bf16 and float32 reach further than fp16")
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [f"{prefix} {text.strip()}".strip() for prefix, text in zip(prefixes, texts, strict=True)]


class Blip2Captioner(Captioner):
    """BLIP-2, whose vision encoder, Q-Former and reading of the image run once an image.

    The language model is given what the plain call gives it: the image's query block, padding, the prefix. It does not
    look ahead, so that keys and values of the block are the same for all prefixes, and are computed before them. An
    encoder-decoder such as T5 looks at block and prefix together and shares the block alone; its padding comes last,
    since it counts distances across the padding.
    """

    pads = True

    @property
    def writer(self) -> PreTrainedModel:
        """The language model."""
        return self.model.language_model

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, DynamicCache | None]:
        """(images, queries, text width), and the keys and values of a language model that reads forward alone."""
        blocks = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        if self.writer.config.is_encoder_decoder:
            return blocks, None
        cache = DynamicCache(config=self.writer.config)
        self.writer.base_model(inputs_embeds=blocks, use_cache=True, **{self._cache_name: cache})
        return blocks, cache

    def prompt(self, prefix: str) -> list[int]:
        """The token ids of a prefix."""
        return self.tokenizer(prefix)["input_ids"]

    def continued(
        self, encoded: tuple[Tensor, DynamicCache | None], images: Tensor, prompts: list[list[int]], **options: Any
    ) -> Tensor:
        """Token ids (texts, new tokens) that follow each prompt; `images` is the number of each text's image."""
        blocks, cache = encoded
        ids, mask = self.padded(prompts, left=cache is not None)
        embeds = self.model.get_input_embeddings()(ids).to(blocks.dtype)
        inputs_embeds = torch.cat([blocks[images], embeds], 1)  # (texts, tokens, text width)
        attention_mask = torch.cat([mask.new_ones(len(mask), blocks.shape[1]), mask], 1)
        if cache is not None:
            options[self._cache_name] = own = copy.deepcopy(cache)
            own.batch_select_indices(images)
        output = self.writer.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)
        return output if cache is not None else output[:, 1:]  # an encoder-decoder's start token

    def padded(self, prompts: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """(texts, tokens), token ids and their mask."""
        side, pad = "left" if left else "right", self.writer.generation_config.pad_token_id
        ids, mask = (
            pad_sequence([torch.tensor(prompt, device=self.device) for prompt in rows], True, value, side)
            for rows, value in ((prompts, pad), ([[1] * len(prompt) for prompt in prompts], 0))
        )
        return ids, mask

    @property
    def _cache_name(self) -> str:
        """What this release of transformers calls keys and values."""
        return "cache" if "cache" in inspect.signature(self.writer.forward).parameters else "past_key_values"


KINDS = {"blip-2": Blip2Captioner, "blip": Captioner, "git": Captioner, "vision-encoder-decoder": Captioner}
