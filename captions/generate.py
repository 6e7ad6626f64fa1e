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
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from capivara_common.cli import at_least, flag, run_command
from capivara_common.environment import torch_device
from capivara_common.files import read_json
from capivara_common.hub_cache import check_reachable
from capivara_common.image_files import BadImage, BadRow, ImageFiles, by_threads, decode_image
from caption_data.rows import CAPTIONS
from captions.stages import Phase, RowStage, StageArguments, StageReport, stage_main
from captions.translators import DTYPES
from modeling_capivara.loading import checked_config, weights_digest

COLUMN = "generated-captions-en"
NOT_FINITE = "no finite scores"  # reason of a `BadRow`
PREFIXES = Path(__file__).parent / "prefixes.json"


@dataclass
class GenerateArguments(StageArguments):
    """Arguments of `captions.generate`."""

    max_new_tokens: int = flag(50, "Tokens of a generated text at most.")
    micro_batch_size: int = flag(160, "Captions that are generated at once; fewer need less memory and more time.")
    model: str = flag("Salesforce/blip2-opt-2.7b-coco", "Folder or Hub id of a BLIP-2 of transformers.")
    revision: str | None = flag(None, "Branch, tag or commit of a Hub id.")
    prefixes: Path = flag(PREFIXES, "JSON file of the form of captions/prefixes.json.")
    precision: Literal["float32", "bf16", "fp16"] = flag("float32", "Of weights and activations; the authors had fp16.")
    device: str | None = flag(None, "cpu or cuda; the GPU where there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_new_tokens", "micro_batch_size")
        self.prefixes = Path(self.prefixes)


# The model


class FiniteScores(LogitsProcessor):
    """Notes the texts with a score that is no number: what they say is noise."""

    def __init__(self, texts: int, device: torch.device):
        self.broken = torch.zeros(texts, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, unchanged."""
        self.broken |= scores.isnan().any(-1)
        return scores


class Captioner:
    """BLIP-2, in `eval()` on its device, whose vision encoder, Q-Former and reading of the image run once an image.

    The language model is given what the plain call gives it: the image's query block, padding, the prefix. It does not
    look ahead, so that keys and values of the block are the same for all prefixes, and are computed before them. An
    encoder-decoder such as T5 looks at block and prefix together and shares the block alone; its padding comes last,
    since it counts distances across the padding. A text has at most `max_new_tokens`; `micro_batch_size` of them are
    written at once.
    """

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 50,
        micro_batch_size: int = 160,
    ):
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.max_new_tokens, self.micro_batch_size = max_new_tokens, micro_batch_size
        self.device, self.writer = model.device, model.language_model
        config = self.writer.generation_config
        config.max_length = None  # else `generate` warns at every call that it has two limits
        if config.pad_token_id is None:  # a batch's texts end at different steps
            config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # What this release of transformers calls keys and values.
        known = inspect.signature(self.writer.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"

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
        encoded, prompts = self.encode(pixel_values), self.tokenizer(list(prefixes))["input_ids"]
        found: list[list[Tensor | None]] = [[None] * len(prompts) for _ in pixel_values]
        places = itertools.product(range(len(found)), range(len(prompts)))
        places = sorted(places, key=lambda place: len(prompts[place[1]]))  # so that little is padded
        for start in range(0, len(places), self.micro_batch_size):
            some = places[start : start + self.micro_batch_size]
            finite = FiniteScores(len(some), self.device)
            images = torch.tensor([image for image, _ in some], device=self.device)
            options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
            options["logits_processor"] = LogitsProcessorList([finite])
            tokens = self.continued(encoded, images, [prompts[prefix] for _, prefix in some], **options)
            for (image, prefix), row, broken in zip(some, tokens.cpu(), finite.broken.tolist(), strict=True):
                found[image][prefix] = None if broken else row
        return found

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, DynamicCache | None]:
        """(images, queries, text width), and the keys and values of a language model that reads forward alone."""
        blocks = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        if self.writer.config.is_encoder_decoder:
            return blocks, None
        cache = DynamicCache(config=self.writer.config)
        self.writer.base_model(inputs_embeds=blocks, use_cache=True, **{self._cache_name: cache})
        return blocks, cache

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
        rows = [torch.tensor(prompt, device=self.device) for prompt in prompts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
        return pad_sequence(rows, True, pad, side), mask

    def _texts(self, tokens: list[Tensor | None], prefixes: Sequence[str]) -> list[str] | BadRow:
        if any(row is None for row in tokens):
            return BadRow(NOT_FINITE, "the model's scores were no numbers; bf16 and float32 reach further than fp16")
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [f"{prefix} {text.strip()}".strip() for prefix, text in zip(prefixes, texts, strict=True)]


def load_captioner(args: GenerateArguments) -> Captioner:
    """The model of the arguments. Raises ValueError or OSError where it is none, or no BLIP-2."""
    if not Path(args.model).exists() and args.model.count("/") != 1:
        raise ValueError(f"{args.model!r} is neither a folder nor a Hub id such as {GenerateArguments.model}.")
    check_reachable(args.model, revision=args.revision)
    kind = checked_config(args.model, revision=args.revision).model_type
    if kind != "blip-2":
        raise ValueError(
            f"{args.model} is a model of the kind {kind!r}, captions.generate takes BLIP-2, such as "
            f"{GenerateArguments.model}. Captions of another model come as the column {COLUMN} of the data set."
        )
    source = {"pretrained_model_name_or_path": args.model, "revision": args.revision}
    model = Blip2ForConditionalGeneration.from_pretrained(**source, dtype=DTYPES[args.precision])
    processor, tokenizer = AutoImageProcessor.from_pretrained(**source), AutoTokenizer.from_pretrained(**source)
    model.eval().to(torch_device(args.device))
    return Captioner(model, processor, tokenizer, args.max_new_tokens, args.micro_batch_size)


# Rows


def read_prefixes(path: Path) -> list[str]:
    """What captions begin with, from a file of the form of captions/prefixes.json. Raises ValueError, OSError."""
    prefixes = read_json(path, prefixes=list)["prefixes"]
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise ValueError(f'{path} must hold {{"prefixes": [texts]}}, as captions/prefixes.json does.')
    prefixes = [prefix.strip() for prefix in prefixes]
    if not prefixes or not all(prefixes) or len(set(prefixes)) < len(prefixes):
        raise ValueError(f"{path} must hold one prefix at least, none blank and none twice; it holds {prefixes}.")
    return prefixes


@dataclass
class GenerateProcess:
    """Rows with an image -> their captions: a `Process`."""

    captioner: Captioner
    prefixes: list[str]
    args: GenerateArguments
    any_caption: bool = False  # since the start

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        """Raises ValueError where the memory does not suffice, or no image has got a caption since the start."""
        prepared = by_threads(self._prepared, rows)
        good = [image for image in prepared if not isinstance(image, BadRow)]
        if not good:
            return prepared
        try:
            captions = self.captioner.written(torch.cat(good), self.prefixes)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ValueError(
                f"Out of memory with {len(good)} images and {self.args.micro_batch_size} captions at "
                f"once. Lower --micro_batch_size, then --batch_rows, or take --precision bf16 or fp16. ({error})"
            ) from error
        self.any_caption = self.any_caption or any(not isinstance(texts, BadRow) for texts in captions)
        if not self.any_caption:
            raise ValueError(f"No image has got a caption: {captions[0]}. Does the model work in this --precision?")
        rest = iter(captions)
        found = [image if isinstance(image, BadRow) else next(rest) for image in prepared]
        return [texts if isinstance(texts, BadRow) else {COLUMN: texts} for texts in found]

    def _prepared(self, row: dict[str, Any]) -> Tensor | BadRow:
        """Pixels (1, 3, height, width), or why there are none; the image is not kept."""
        try:
            image = decode_image(row[self.args.image_column], ImageFiles(max_pixels=self.args.max_pixels))
            image = image.convert("LA") if image.mode == "La" else image  # PIL has no way from La to RGB
            return self.captioner.pixels([image.convert("RGB")])
        except BadRow as error:
            return error
        except (ValueError, OSError) as error:
            return BadImage("unreadable image", str(error))


def generate(args: GenerateArguments, rank: int = 0, world_size: int = 1) -> StageReport:
    """Write the parts of one task that are missing."""
    stage = RowStage(args, rank, world_size)  # before the model: what is wrong with the data is said at once
    if report := stage.done:
        return report
    prefixes = read_prefixes(args.prefixes)
    captioner = load_captioner(args)
    settings = {
        "model": Path(args.model).name if Path(args.model).is_dir() else args.model,  # whatever folder it is in
        "revision": getattr(captioner.model.config, "_commit_hash", None),
        "weights": weights_digest(captioner.model),
        "prefixes": prefixes,
        "max_new_tokens": args.max_new_tokens,
        "precision": args.precision,
        "sampling": None,  # what earlier versions could do
    }
    return stage.run({COLUMN: CAPTIONS}, settings, GenerateProcess(captioner, prefixes, args), "Captions")


PHASES = {"rows": Phase(generate, shared=True, uses_model=True)}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    stage_main(GenerateArguments, __doc__, argv, PHASES)


if __name__ == "__main__":
    from captions import generate  # by its name, as other machines find it

    run_command(generate.main, resumes=True)
