"""Models of two towers of any kind, of this package, of transformers or open_clip, behind one protocol.

    model, processor = load_model(folder), load_processor(folder)
    embed_texts(model, processor, ["uma foto de um gato"])  # (texts, width), unit length, float32, on the CPU
    load_embedder("open_clip:ViT-B-32:openai", baseline=True).embed_texts(["a photo of a cat"])

The classes are transformers' own, without a wrapper: `get_text_features` and `get_image_features`, whose
`pooler_output` is the embedding before it is scaled to unit length, `logit_scale`, and `logit_bias` where the loss is
SigLIP's (arXiv 2303.15343, section 3).
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from capivara_common.environment import process_state, resolve_device
from capivara_common.files import read_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES, check_reachable
from capivara_common.image_encoder_digest import IMAGE_ENCODER_PREFIXES

from .checks_capivara import NOT_FINITE_MESSAGE, check_sizes, wrap_tokenizer_errors
from .loading import load_model, load_processor, pads_to_max_length, weights_digest
from .modeling_capivara import l2_normalize
from .processing_capivara import CapivaraProcessor

# Title of a bar, or what is called after each batch with its size; None for neither
ProgressOption = str | Callable[[int], object] | None
# Images that go through the tower at once: activations of more are new memory at every layer, half of the time.
CPU_CHUNK_IMAGES = 4


def uses_sigmoid_loss(model: nn.Module) -> bool:
    """Whether the loss of its training is SigLIP's, over pairs, and not CLIP's, over rows."""
    return getattr(model, "logit_bias", None) is not None


def describe_model(model: nn.Module) -> dict[str, str]:
    """What records and cards say of a model: its `model_class`, and its `loss`, "sigmoid" or "contrastive"."""
    return {"model_class": type(model).__name__, "loss": "sigmoid" if uses_sigmoid_loss(model) else "contrastive"}


def embedding_width(config: PreTrainedConfig) -> int:
    """Numbers of one embedding."""
    return config.text_config.projection_size if config.model_type == "siglip" else config.projection_dim


def freeze_image_encoder(model: PreTrainedModel) -> None:
    """Let the image tower and its projection get no gradient; CAPIVARA's also stays in evaluation mode, then."""
    if hasattr(model, "freeze_image_encoder"):
        return model.freeze_image_encoder()
    for name, parameter in model.named_parameters():
        if name.startswith(IMAGE_ENCODER_PREFIXES):
            parameter.requires_grad_(False)


def compute_text_embeds(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(texts, width), unit length, float32, of a model or a wrapper that has its methods, as peft's.

    `input_ids` and `attention_mask` are (texts, tokens), as `pad` gives them; without a mask padding is read as tokens.
    """
    return l2_normalize(model.get_text_features(input_ids, attention_mask=attention_mask).pooler_output)


def compute_image_embeds(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """(images, width), unit length, float32, of `pixel_values`, (images, 3, height, width)."""
    return l2_normalize(model.get_image_features(pixel_values).pooler_output)


def tokenize(processor: ProcessorMixin, texts: Sequence[str]) -> list[dict[str, list[int]]]:
    """`input_ids` of each text, and its `attention_mask` but for SigLIP, each of its own length.

    Texts are cut, and SigLIP's filled up, as the processor that `loading.load_processor` gives does it.
    """
    rule: dict[str, Any] = {"padding": False}  # of CAPIVARA's processor, which cuts by itself
    if not isinstance(processor, CapivaraProcessor):
        # SigLIP reads the last token of a text that was filled up, unmasked; transformers' own pipeline asks for it.
        padding = "max_length" if pads_to_max_length(processor) else False
        rule = {"padding": padding, "truncation": True, "max_length": processor.tokenizer.model_max_length}
    tokens = processor(text=list(texts), **rule)
    names = ["input_ids"] if pads_to_max_length(processor) else ["input_ids", "attention_mask"]
    return [{name: list(tokens[name][i]) for name in names} for i in range(len(texts))]


def pad_batch(processor: ProcessorMixin, tokenized: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of `tokenise` as one batch, (texts, tokens) each, padded to its longest."""
    if pads_to_max_length(processor):
        return {"input_ids": torch.tensor([row["input_ids"] for row in tokenized])}
    return dict(processor.tokenizer.pad([dict(row) for row in tokenized], return_tensors="pt"))


@dataclass
class Embedder:
    """A model of any kind."""

    name: str  # as it was asked for
    device: torch.device
    precision: str  # "float32", or "bf16" for autocast
    fingerprint: str  # digest of all that the embeddings depend on
    image_fingerprint: str  # of what those of images do; models that share their image tower share it
    metadata: dict[str, str]  # of `class_and_loss`
    embed_images: Callable[..., Tensor]  # embeds PIL images; then how many at once, and `Progress`
    embed_texts: Callable[..., Tensor]

    def __post_init__(self) -> None:
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        self.embed_images, self.embed_texts = autocast(self.embed_images), autocast(self.embed_texts)


def load_embedder(
    model: str, device: str | None = None, baseline: bool = False, precision: str = "float32"
) -> Embedder:
    """A model by its folder or Hub id; a `baseline` may be open_clip:NAME:PRETRAINED or open_clip:local-dir:FOLDER.

    Without a device it is on the process's GPU, else on the CPU; `precision` is "float32", or "bf16" for autocast.
    ValueError where it is no such model.
    """
    where = resolve_device(device) if device else process_state().device
    kind, _, rest = model.partition(":")
    if kind == "clip" and rest:
        raise ValueError(f"{model}: models of transformers are named as they are, {rest}, without `clip:`.")
    if kind != "open_clip" or not rest:
        processor = load_processor(model)
        return build_embedder(model, load_model(model).eval().to(where), processor, precision)
    if not baseline:
        raise ValueError(f"{model} is a model of open_clip, which needs --role baseline, or eval.suite's --baseline.")
    return _load_open_clip_embedder(rest, where, precision)


def build_embedder(name: str, model: PreTrainedModel, processor: ProcessorMixin, precision: str) -> Embedder:
    """A model that is loaded, in evaluation mode."""
    config, image_processor = model.config, processor.image_processor.to_json_string()
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)  # none of the first SigLIP's, which is sentencepiece's
    plain = [] if backend else [tokenizer.get_vocab(), getattr(tokenizer, "do_lower_case", None)]
    rules = (backend.to_str() if backend else json.dumps(plain, sort_keys=True)) + str(tokenizer.model_max_length)
    fingerprint = _digest_parts(weights_digest(model), config.to_json_string() + image_processor, rules, precision)
    image_side = weights_digest(model, IMAGE_ENCODER_PREFIXES)
    image_fingerprint = _digest_parts(image_side, config.vision_config.to_json_string() + image_processor, precision)
    towers = partial(embed_images, model, processor), partial(embed_texts, model, processor)
    return Embedder(name, model.device, precision, fingerprint, image_fingerprint, describe_model(model), *towers)


def _load_open_clip_embedder(source: str, device: torch.device, precision: str) -> Embedder:
    try:
        import open_clip
    except ImportError as error:
        fault = f"open_clip:{source} needs open_clip, not installed yet"
        raise ImportError(f"{fault}: pip install open_clip_torch") from error
    name, pretrained, repository = source, None, ""
    if source.startswith("hf-hub:"):
        repository = source.removeprefix("hf-hub:")
    elif not source.startswith("local-dir:"):
        name, _, pretrained = source.partition(":")
        if not pretrained:  # open_clip would draw random weights
            known = open_clip.list_pretrained_tags_by_model(name)
            raise ValueError(f"open_clip:{source} names no weights; say open_clip:{name}:TAG, with a tag of {known}.")
        repository = open_clip.get_pretrained_cfg(name, pretrained).get("hf_hub", "").strip("/")
    check_reachable(repository, OPEN_CLIP_CONFIG, *OPEN_CLIP_WEIGHT_FILES)  # one of them will be in the cache
    try:
        if pretrained is None:
            folder = source.removeprefix("local-dir:")
            config = hf_hub_download(repository, OPEN_CLIP_CONFIG) if repository else Path(folder, OPEN_CLIP_CONFIG)
            check_sizes(read_json(Path(config), model_cfg=dict))
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
        with wrap_tokenizer_errors("its tokenizer"):
            model, tokenizer = model.eval().to(device), open_clip.get_tokenizer(name)
    except Exception as error:  # a name or tag that open_clip does not know, or a damaged folder
        raise ValueError(f"open_clip can't load {source!r}: {' '.join(str(error).split())}") from error

    def encode_images(batch: list[Image.Image]) -> Tensor:
        return l2_normalize(model.encode_image(torch.stack([preprocess(image) for image in batch]).to(device)))

    images = partial(_embed_in_batches, encode_images)
    texts = partial(_embed_in_batches, lambda batch: l2_normalize(model.encode_text(tokenizer(batch).to(device))))
    digest = _digest_parts("open_clip", source, weights_digest(model), repr(preprocess), precision)
    # Which part of it the images need is not known: their fingerprint is that of the whole model.
    return Embedder(f"open_clip:{source}", device, precision, digest, digest, describe_model(model), images, texts)


def _digest_parts(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def embed_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    batch_size: int = 64,
    progress: ProgressOption = None,
) -> Tensor:
    """(texts, width), unit length, float32, on the CPU, of at least one text, `batch_size` at once.

    They are batched by length, so that short ones are not padded to the longest. The caller has put the model in
    evaluation mode; `processor` is its own.
    """
    with wrap_tokenizer_errors("The model's tokenizer"):
        tokens = tokenize(processor, texts)
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]["input_ids"]))

    def encode(rows: list[int]) -> Tensor:
        batch = pad_batch(processor, [tokens[i] for i in rows])
        return compute_text_embeds(model, **{name: values.to(model.device) for name, values in batch.items()})

    embeds = _embed_in_batches(encode, order, batch_size, progress)
    return torch.empty_like(embeds).index_copy_(0, torch.tensor(order), embeds)


def embed_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image],
    batch_size: int = 32,
    progress: ProgressOption = None,
) -> Tensor:
    """(images, width), as `embed_texts`, of anything that yields PIL images; they are read batch by batch."""

    def encode(batch: list[Image.Image]) -> Tensor:
        pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
        return torch.cat([compute_image_embeds(model, part) for part in split_for_device(pixel_values, model.device)])

    return _embed_in_batches(encode, images, batch_size, progress)


@torch.inference_mode()
def _embed_in_batches(
    encode: Callable, items: Iterable, batch_size: int = 32, progress: ProgressOption = None
) -> Tensor:
    total, title = len(items) if hasattr(items, "__len__") else None, progress if isinstance(progress, str) else None
    embeds, iterator = [], iter(items)
    with tqdm(total=total, desc=title, disable=title is None) as bar:
        while batch := list(islice(iterator, batch_size)):
            embeds.append(check_finite(encode(batch).float().cpu()))
            (progress if callable(progress) else bar.update)(len(batch))
    return torch.cat(embeds)


def check_finite(embeds: Tensor) -> Tensor:
    """Return the embeddings. Raises ValueError if one is not finite, of which every score would be meaningless."""
    if not embeds.isfinite().all():
        raise ValueError(NOT_FINITE_MESSAGE)
    return embeds


def split_for_device(pixel_values: Tensor, device: torch.device) -> Sequence[Tensor]:
    """`pixel_values`, (images, 3, height, width), on the device, in the parts and memory order that are fast there."""
    pixel_values = pixel_values.to(device, memory_format=torch.channels_last)
    return pixel_values.split(CPU_CHUNK_IMAGES if device.type == "cpu" else max(len(pixel_values), 1))


def random_images(seed: int = 0) -> list[Image.Image]:
    """Colour images of odd sizes, smaller and larger than towers take, one in grey and one with transparency."""
    numbers = np.random.default_rng(seed)
    shapes = [(37, 61, 3), (301, 199, 3), (224, 227, 3), (97, 450, 3), (130, 131), (259, 225, 4)]
    return [Image.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def random_texts(seed: int = 0) -> list[str]:
    """Portuguese-looking texts of 1 to 120 words: far below and above the length that is kept."""
    numbers = random.Random(seed)
    syllables = ("ca", "pi", "va", "ra", "ção", "ões", "nha", "lho", "ba", "tu", "gue", "mar", "é", "ão", "sol", "que")
    lengths = (1, 2, 5, 9, 30, 120)
    words = [["".join(numbers.choices(syllables, k=numbers.randint(1, 4))) for _ in range(n)] for n in lengths]
    return [" ".join(text) for text in words]
