"""Captions of images, each begun by a prefix: BLIP-2 with its image encoder run once an image.

    python -m captions.generate --dataset data/images --output data/generated
    python -m captions.generate --dataset data/images --output data/generated --precision fp16 --workers 4

Every row gets `generated-captions-en`: one caption a prefix, which is the prefix, a blank and the likeliest text that
goes on from it. The ten prefixes of CAPIVARA's authors are in captions/prefixes.json; --prefixes takes another file of
that form. Rows whose image can't be used are left out and listed. The same command does what is missing, with the same
captions.
"""

import copy
import inspect
import itertools
from collections.abc import Collection, Sequence
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

from capivara_common.cli import check_at_least, flag, run_command
from capivara_common.environment import resolve_device
from capivara_common.files import read_json
from capivara_common.hub_cache import check_reachable
from capivara_common.image_files import BadRow
from caption_data.rows import CAPTIONS_FEATURE
from captions.stages import DECODED_KEY, RowStage, StageArguments, run_stage_command
from captions.translators import DTYPES
from modeling_capivara.loading import load_config, weights_digest

OUTPUT_COLUMN = "generated-captions-en"
NOT_FINITE_REASON = "no finite scores"  # reason of a `BadRow`
PREFIXES_FILE = Path(__file__).parent / "prefixes.json"


@dataclass
class GenerateArguments(StageArguments):
    """Arguments of `captions.generate`."""

    uses_model = decodes_images = True
    max_new_tokens: int = flag(50, "Tokens of a generated text at most.")
    micro_batch_size: int = flag(160, "Captions that are generated at once; fewer need less memory and more time.")
    model: str = flag("Salesforce/blip2-opt-2.7b-coco", "Folder or Hub id of a BLIP-2 of transformers.")
    revision: str | None = flag(None, "Branch, tag or commit of a Hub id.")
    prefixes: Path = flag(PREFIXES_FILE, "JSON file of the form of captions/prefixes.json.")
    precision: Literal["float32", "bf16", "fp16"] = flag("float32", "Of weights and activations; the authors had fp16.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "max_new_tokens", "micro_batch_size")
        self.prefixes = Path(self.prefixes)

    def check_columns(self, columns: Collection[str], where: str) -> list[str]:
        """Return the column of generated captions; any dataset with images will do."""
        return [*super().check_columns(columns, where), OUTPUT_COLUMN]

    def prepare_processing(self, stage: RowStage) -> tuple[Any, ...]:
        """Captions of each row's image. Raises as `read_prefixes` and `load_captioner` do."""
        prefixes, captioner = read_prefixes(self.prefixes), load_captioner(self)
        settings = {
            "model": Path(self.model).name if Path(self.model).is_dir() else self.model,  # whatever folder it is in
            "revision": getattr(captioner.model.config, "_commit_hash", None),
            "weights": weights_digest(captioner.model),
            "prefixes": prefixes,
            "max_new_tokens": self.max_new_tokens,
            "precision": self.precision,
            "sampling": None,  # what earlier versions could do
        }
        return {OUTPUT_COLUMN: CAPTIONS_FEATURE}, settings, lambda rows: caption_rows(captioner, prefixes, rows)


# The model


@dataclass
class Captioner:
    """BLIP-2, in `eval()` on its device, whose vision encoder, Q-Former and reading of the image run once an image.

    The language model is given what the plain call gives it: the image's query block, padding, the prefix. It does not
    look ahead, so that keys and values of the block are the same for all prefixes, and are computed before them. A text
    has at most `max_new_tokens`; `micro_batch_size` of them are written at once.
    """

    model: Blip2ForConditionalGeneration
    image_processor: Any
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 50
    micro_batch_size: int = 160

    def __post_init__(self) -> None:
        self.device, self.language_model, tokenizer = self.model.device, self.model.language_model, self.tokenizer
        config = self.language_model.generation_config
        config.max_length = None  # else `generate` warns at every call that it has two limits
        if config.pad_token_id is None:  # a batch's texts end at different steps
            config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        known = inspect.signature(self.language_model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # before 5.24 of transformers

    def generate_captions(self, images: Sequence[PIL.Image.Image], prefixes: Sequence[str]) -> list[list[str] | BadRow]:
        """For every image, RGB, one caption a prefix, or why it has none: the prefix, a blank and what goes on from
        it."""
        return [
            self._decode_texts(tokens, prefixes)
            for tokens in self.generate_tokens(self.preprocess_images(images), prefixes)
        ]

    def preprocess_images(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """(images, 3, height, width)."""
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.language_model.dtype)

    @torch.inference_mode()
    def generate_tokens(self, pixel_values: Tensor, prefixes: Sequence[str]) -> list[list[Tensor | None]]:
        """Token ids that go on from every prefix, for every image, (images, 3, height, width).

        Each is (steps,), end token and padding included; None where a score was no number.
        """
        encoded, prompts = self.encode_images(pixel_values), self.tokenizer(list(prefixes))["input_ids"]
        found: list[Tensor | None] = []
        places = list(itertools.product(range(len(pixel_values)), prompts))
        for start in range(0, len(places), self.micro_batch_size):
            some = places[start : start + self.micro_batch_size]
            noise = torch.zeros(len(some), dtype=torch.bool, device=self.device)

            def noted(ids: Tensor, scores: Tensor, noise: Tensor = noise) -> Tensor:
                noise |= scores.isnan().any(-1)
                return scores

            images = torch.tensor([image for image, _ in some], device=self.device)
            options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
            options["logits_processor"] = LogitsProcessorList([noted])
            tokens = self.continue_prompts(encoded, images, [prompt for _, prompt in some], **options)
            found += [None if bad else row for row, bad in zip(tokens.cpu(), noise.tolist(), strict=True)]
        return [found[first : first + len(prompts)] for first in range(0, len(found), len(prompts))]

    def encode_images(self, pixel_values: Tensor) -> DynamicCache:
        """Keys and values of the language model at the query blocks of all images."""
        blocks = self.model.get_image_features(pixel_values=pixel_values).pooler_output  # (images, queries, text width)
        cache = DynamicCache(config=self.language_model.config)
        self.language_model.base_model(inputs_embeds=blocks, use_cache=True, **{self._cache_name: cache})
        return cache

    def continue_prompts(
        self, encoded: DynamicCache, images: Tensor, prompts: list[list[int]], **options: Any
    ) -> Tensor:
        """Token ids (texts, new tokens) that follow each prompt; `images` is the number of each text's image."""
        own = copy.deepcopy(encoded)
        own.batch_select_indices(images)
        ids, mask = self.pad_prompts(prompts)
        embeds = self.model.get_input_embeddings()(ids).to(self.language_model.dtype)
        unread = embeds.new_zeros(len(ids), own.get_seq_length(), embeds.shape[-1])  # the block, which the cache has
        return self.language_model.generate(
            inputs_embeds=torch.cat([unread, embeds], 1),
            attention_mask=torch.cat([mask.new_ones(unread.shape[:2]), mask], 1),
            **{self._cache_name: own},
            **options,
        )

    def pad_prompts(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(texts, tokens), token ids and their mask."""
        rows = [torch.tensor(prompt, device=self.device) for prompt in prompts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        return pad_sequence(rows, True, self.language_model.generation_config.pad_token_id, "left"), mask

    def _decode_texts(self, tokens: list[Tensor | None], prefixes: Sequence[str]) -> list[str] | BadRow:
        if any(row is None for row in tokens):
            return BadRow(
                NOT_FINITE_REASON, "the model's scores were no numbers; bf16 and float32 reach further than fp16"
            )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [f"{prefix} {text.strip()}".strip() for prefix, text in zip(prefixes, texts, strict=True)]


def load_captioner(args: GenerateArguments) -> Captioner:
    """The model of the arguments. Raises ValueError or OSError where it is none, or no BLIP-2."""
    check_reachable(args.model, revision=args.revision)
    config = load_config(args.model, revision=args.revision)
    if config.model_type != "blip-2" or config.text_config.is_encoder_decoder:
        raise ValueError(
            f"{args.model} is a model of the kind {config.model_type!r}, captions.generate takes BLIP-2 over a decoder "
            f"such as {GenerateArguments.model}. Captions of others come as the column {OUTPUT_COLUMN} of the data set."
        )
    source = {"pretrained_model_name_or_path": args.model, "revision": args.revision}
    model = Blip2ForConditionalGeneration.from_pretrained(**source, dtype=DTYPES[args.precision])
    processor, tokenizer = AutoImageProcessor.from_pretrained(**source), AutoTokenizer.from_pretrained(**source)
    model.eval().to(resolve_device(args.device))
    return Captioner(model, processor, tokenizer, args.max_new_tokens, args.micro_batch_size)


# Rows


def read_prefixes(path: Path) -> list[str]:
    """What captions begin with, from a file of the form of captions/prefixes.json. Raises ValueError, OSError."""
    given = read_json(path, prefixes=list)["prefixes"]
    prefixes = [prefix.strip() for prefix in given if isinstance(prefix, str)]
    if not prefixes or not all(prefixes) or len(set(prefixes)) < len(given):
        rule = 'must hold {"prefixes": [texts]}, one at least, none blank and none twice'
        raise ValueError(f"{path} {rule}, as captions/prefixes.json does; it holds {given}.")
    return prefixes


def caption_rows(
    captioner: Captioner, prefixes: list[str], rows: list[dict[str, Any]]
) -> list[dict[str, Any] | BadRow]:
    """Rows with an image -> their captions. Raises ValueError where the memory does not suffice."""
    images = [row[DECODED_KEY] for row in rows]
    images = [image.convert("LA") if image.mode == "La" else image for image in images]  # PIL has no way from La to RGB
    try:
        captions = captioner.generate_captions([image.convert("RGB") for image in images], prefixes)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(
            f"Out of memory with {len(rows)} images and {captioner.micro_batch_size} captions at once. Lower "
            f"--micro_batch_size, then --batch_rows, or take --precision bf16 or fp16. ({error})"
        ) from error
    return [texts if isinstance(texts, BadRow) else {OUTPUT_COLUMN: texts} for texts in captions]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    run_stage_command(GenerateArguments, __doc__, argv)


if __name__ == "__main__":
    from captions import generate  # by its name, as other machines find it

    run_command(generate.main, resumable=True)
