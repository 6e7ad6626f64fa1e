"""BLIP-2 small enough for a benchmark, in the proportions of the real one, and the arithmetic that its captions cost.

    python -c "from benchmarks.blip2_proportions import REAL, gains; print(gains(REAL, prefix_tokens=5, new_tokens=12))"

FLOP of a caption's parts, 2 for each element of a weight matrix and each token that goes through it, and 4 x width for
each pair of positions in attention (scores, and their sum over the values):

    vision(image)       = all layers on 257 positions, and the patches' convolution
    qformer(image)      = all layers on 32 queries, every other one also on the 257 positions, and the projection
    language(a..b)      = all layers on the positions a to b, each in attention with those before it and itself
    head                = width x vocabulary, once a new token

    plain call, K prefixes  = K x (vision + qformer + language(0..32 + p + n - 1) + n head)
    encoded once            = vision + qformer + K x (language(0..32 + p + n - 1) + n head)
    ours                    = vision + qformer + language(0..32) + K x (language(32..32 + p + n - 1) + n head)

with p tokens of a prefix and n new ones, the last of which is not read again. Norms, softmax and copies are left out.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessor, PreTrainedTokenizerFast

IMAGE_SIDE, PATCH, QUERIES = 224, 14, 32
POSITIONS = (IMAGE_SIDE // PATCH) ** 2 + 1


@dataclass(frozen=True)
class Sizes:
    """Widths, layers, heads and inner widths of vision encoder, Q-Former and language model; and the vocabulary."""

    vision: tuple[int, int, int, int]
    qformer: tuple[int, int, int, int]
    language: tuple[int, int, int, int]
    vocabulary: int

    def scaled(self, widths: int, layers: int) -> "Sizes":
        """Widths, heads and vocabulary divided by `widths`, layers by `layers`; rounded down, for all three alike."""
        parts = [
            (width // widths, max(1, depth // layers), max(1, heads // widths), inner // widths)
            for width, depth, heads, inner in (self.vision, self.qformer, self.language)
        ]
        return Sizes(*parts, self.vocabulary // widths)


# Salesforce/blip2-opt-2.7b-coco: EVA ViT-g/14, BERT base's sizes, OPT-2.7b (their config.json)
REAL = Sizes((1408, 39, 16, 6144), (768, 12, 12, 3072), (2560, 32, 32, 10240), 50304)


def vision_flop(sizes: Sizes) -> float:
    """Of one image."""
    width, layers, _, inner = sizes.vision
    layer = 2 * POSITIONS * (4 * width**2 + 2 * width * inner) + 4 * POSITIONS**2 * width
    return layers * layer + 2 * (POSITIONS - 1) * 3 * PATCH**2 * width


def qformer_flop(sizes: Sizes) -> float:
    """Of one image, the projection to the language model included."""
    width, layers, _, inner = sizes.qformer
    seen = sizes.vision[0]
    layer = 2 * QUERIES * (4 * width**2 + 2 * width * inner) + 4 * QUERIES**2 * width
    cross = 2 * QUERIES * 2 * width**2 + 2 * POSITIONS * 2 * seen * width + 4 * QUERIES * POSITIONS * width
    return layers * layer + (layers + 1) // 2 * cross + 2 * QUERIES * width * sizes.language[0]


def language_flop(sizes: Sizes, start: int, stop: int) -> float:
    """Of the positions from `start` until before `stop` of one text."""
    width, layers, _, inner = sizes.language
    pairs = sum(range(start + 1, stop + 1))
    return layers * (2 * (stop - start) * (4 * width**2 + 2 * width * inner) + 4 * pairs * width)


def flops(sizes: Sizes, prefix_tokens: float, new_tokens: int, prefixes: int = 10) -> dict[str, float]:
    """Of one image's captions, by program; see the module."""
    image = vision_flop(sizes) + qformer_flop(sizes)
    stop = round(QUERIES + prefix_tokens + new_tokens - 1)
    head = 2 * new_tokens * sizes.language[0] * sizes.vocabulary
    text, block = language_flop(sizes, 0, stop) + head, language_flop(sizes, 0, QUERIES)
    rest = language_flop(sizes, QUERIES, stop) + head
    return {
        "plain": prefixes * (image + text),
        "encoded_once": image + prefixes * text,
        "ours": image + block + prefixes * rest,
    }


def gains(sizes: Sizes, prefix_tokens: float, new_tokens: int, prefixes: int = 10) -> dict[str, float]:
    """FLOP of the plain call over those of the others."""
    found = flops(sizes, prefix_tokens, new_tokens, prefixes)
    return {name: found["plain"] / flop for name, flop in found.items() if name != "plain"}


def build_model(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> Blip2ForConditionalGeneration:
    """Random weights that never end a text, so that every caption has the same length."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    vision, qformer, language = (
        dict(zip(names, part, strict=False)) for part in (sizes.vision, sizes.qformer, sizes.language)
    )
    vision |= {"intermediate_size": sizes.vision[3], "image_size": IMAGE_SIDE, "patch_size": PATCH}
    qformer |= {"intermediate_size": sizes.qformer[3], "vocab_size": len(tokenizer)}
    language |= {"model_type": "opt", "ffn_dim": sizes.language[3], "word_embed_proj_dim": sizes.language[0]}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    language |= {"vocab_size": sizes.vocabulary, "max_position_embeddings": 2048, **ids}
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=language, num_query_tokens=QUERIES,
        image_token_index=sizes.vocabulary - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # its own vision weights start at 1e-10
            torch.nn.init.normal_(parameter, std=0.02)
    model.language_model.generation_config.eos_token_id = None
    return model


def build_tokenizer(prefixes: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as OPT's, to which a word of the prefixes is one token, after the start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False, min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(prefixes, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )


def build_image_processor() -> BlipImageProcessor:
    """The real one, of BLIP-2's size."""
    return BlipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
