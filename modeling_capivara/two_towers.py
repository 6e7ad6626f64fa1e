"""Embed texts and images with any two-tower model: CAPIVARA, the CLIP-like models of transformers, or open_clip.

    model, processor = load_model(folder), load_processor(folder)
    embed_texts(model, processor, ["uma foto de um gato"])  # (texts, width), unit length, float32, on the CPU
    load_embedder("open_clip:ViT-B-32:openai", baseline=True).embed_texts(["a photo of a cat"])

Models of transformers need the methods `get_text_features` and `get_image_features`, whose `pooler_output` is the
embedding before normalization. They also need the parameter `logit_scale`, and for SigLIP's loss (arXiv 2303.15343,
section 3) `logit_bias`.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from capivara_common import embedding_speed, environment
from capivara_common.files import read_json
from capivara_common.hub_cache import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHT_FILES, check_hub_model_reachable
from capivara_common.image_encoder_digest import IMAGE_ENCODER_PREFIXES
from capivara_common.model_kinds import KINDS

from .checks_capivara import NOT_FINITE_MESSAGE, check_config_ranges, wrap_tokenizer_errors
from .class_token import last_layer_for_class_token_only
from .loading import check_model_file_exists, load_model, load_processor, pads_to_max_length, weights_digest
from .modeling_capivara import l2_normalize
from .processing_capivara import CapivaraProcessor

# How progress is reported: a string is the title of a progress bar, a function is called with the number of items in
# each finished batch, and None reports nothing.
ProgressOption = str | Callable[[int], object] | None
PREPROCESSING_THREADS = 4


def uses_sigmoid_loss(model: nn.Module) -> bool:
    """Return whether a model is trained with SigLIP's sigmoid loss (True) or CLIP's softmax loss (False).

    Args:
        model: Two-tower model.
    """
    return getattr(model, "logit_bias", None) is not None


def describe_model(model: nn.Module) -> dict[str, str]:
    """Describe the class and loss of a model, for result files and model cards.

    Args:
        model: A two-tower model.

    Returns:
        A dictionary with the name of the Python class under "model_class" and the name of the loss under "loss". The
        loss is "sigmoid" for SigLIP's loss and "contrastive" for CLIP's loss.
    """
    return {"model_class": type(model).__name__, "loss": "sigmoid" if uses_sigmoid_loss(model) else "contrastive"}


def embedding_width(config: PreTrainedConfig) -> int:
    """Return the number of dimensions of a two-tower model's embeddings, which is the same for images and texts.

    Args:
        config: Configuration of the model.
    """
    return next(iter(KINDS[config.model_type].read_widths(config.to_dict()).values()))


def freeze_image_encoder(model: PreTrainedModel) -> None:
    """Freeze the parameters of the image tower and its projection, so that training does not change them.

    A later `model.train()` still switches the image tower to training mode, unless the model is a CAPIVARA model.

    Args:
        model: Two-tower model, which is changed.
    """
    if hasattr(model, "freeze_image_encoder"):
        return model.freeze_image_encoder()
    for name, parameter in model.named_parameters():
        if name.startswith(IMAGE_ENCODER_PREFIXES):
            parameter.requires_grad_(False)


def compute_text_embeds(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Compute the embeddings of tokenized texts, scaled to unit length.

    Args:
        model: Two-tower model, or a wrapper with the same methods, such as a PEFT model.
        input_ids: Token ids, (texts, tokens).
        attention_mask: (texts, tokens), 1 for a token and 0 for padding. Default: CAPIVARA models mask padding, SigLIP
            models do not.

    Returns:
        Embeddings, (texts, width), unit length, float32.
    """
    return l2_normalize(model.get_text_features(input_ids, attention_mask=attention_mask).pooler_output)


def compute_image_embeds(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Compute the embeddings of preprocessed images, scaled to unit length.

    Args:
        model: Two-tower model, or a wrapper with the same methods, such as a PEFT model.
        pixel_values: (images, 3, height, width), as the model's processor returns them.

    Returns:
        Embeddings, (images, width), unit length, float32.
    """
    return l2_normalize(model.get_image_features(pixel_values).pooler_output)


def tokenize(processor: ProcessorMixin, texts: Sequence[str]) -> list[dict[str, list[int]]]:
    """Tokenize texts without padding, so that they can be sorted by length before `pad_batch` pads them.

    Args:
        processor: Processor from `load_processor`. Texts are truncated to its maximum length.
        texts: At least one text.

    Returns:
        For each text a dictionary with the lists "input_ids" (the token ids) and "attention_mask" (a 1 for each token).
        For SigLIP models, the dictionary has only "input_ids", padded to the maximum length.
    """
    # SigLIP takes the state of the last token as the embedding of a text, so its texts must be padded to the maximum
    # length as in training. Other models need no padding here.
    is_padded, options = pads_to_max_length(processor), {}
    # Truncation is not set for a CapivaraProcessor, which truncates texts by default.
    if not isinstance(processor, CapivaraProcessor):
        options = {"truncation": True, "max_length": processor.tokenizer.model_max_length}
    tokens = processor(text=list(texts), padding="max_length" if is_padded else False, **options)
    names = ["input_ids"] if is_padded else ["input_ids", "attention_mask"]
    return [{name: list(tokens[name][i]) for name in names} for i in range(len(texts))]


def pad_batch(processor: ProcessorMixin, tokenized: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Pad tokenized texts to the length of the longest text, and convert them to tensors.

    Args:
        processor: Processor that `tokenize` was called with.
        tokenized: Tokenized texts, as `tokenize` returns them.

    Returns:
        A dictionary with the tensors "input_ids" and "attention_mask" (1 for a token, 0 for padding), each (texts,
        tokens). For a SigLIP model, it has only "input_ids".
    """
    options = {"return_tensors": "pt", "return_attention_mask": not pads_to_max_length(processor)}
    return dict(processor.tokenizer.pad([dict(row) for row in tokenized], **options))


@dataclass
class Embedder:
    """A loaded two-tower model of transformers or open_clip, with functions that embed images and texts.

    Attributes:
        name: Folder, Hub id or open_clip name of the model.
        device: Device of the model.
        precision: "float32", or "bf16" for autocast to bfloat16.
        fingerprint: Hash of everything that the embeddings depend on.
        image_fingerprint: Hash of everything that image embeddings depend on. Models with the same image encoder share
            it. For open_clip models, it equals `fingerprint`.
        width: Number of dimensions of an embedding.
        metadata: Dictionary with "model_class" (name of the Python class) and "loss" ("sigmoid" or "contrastive").
        embed_images: Function that takes PIL images, `batch_size`, `progress` (see `ProgressOption`) and, except for
            open_clip models, `chunk_images` (see `embed_images`). It returns (images, width), unit length, float32, on
            the CPU.
        embed_texts: Function that takes texts, `batch_size` and `progress`. It returns (texts, width), unit length,
            float32, on the CPU.
    """

    name: str
    device: torch.device
    precision: str
    fingerprint: str
    image_fingerprint: str
    width: int
    metadata: dict[str, str]
    embed_images: Callable[..., Tensor]
    embed_texts: Callable[..., Tensor]

    def __post_init__(self) -> None:
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        self.embed_images, self.embed_texts = autocast(self.embed_images), autocast(self.embed_texts)

    def tune_image_embedding(
        self, image_count: int, batch_size: int, record: Path
    ) -> Callable[[Sequence[Image.Image]], Tensor]:
        """Return a function that embeds images as fast as this CPU allows.

        The function's first call measures how many images per forward pass are fastest, unless an earlier run recorded
        the number. Nothing is measured on a GPU, for an open_clip model or for few images.

        Args:
            image_count: Number of images that will be embedded in total.
            batch_size: Number of images that are preprocessed at once.
            record: Folder in which the fastest number is recorded, for resumed runs.

        Returns:
            Function that embeds a list of at least one image. It returns (images, width), unit length, float32, on the
            CPU.
        """
        embed = partial(self.embed_images, batch_size=batch_size)
        # The `embed_images` of an open_clip model has no parameter `chunk_images`, so there is nothing to tune.
        if self.name.startswith("open_clip:"):
            return embed
        return embedding_speed.with_tuned_chunk_size(embed, image_count, self.device, self.image_fingerprint, record)


def load_embedder(
    model: str,
    device: str | None = None,
    baseline: bool = False,
    precision: str = "float32",
    record: Path | None = None,
) -> Embedder:
    """Load a two-tower model and its processor, to embed texts and images.

    Args:
        model: Folder or Hub id of a CAPIVARA model or of a CLIP-like model of transformers. With `baseline`, also an
            open_clip model: "open_clip:NAME:PRETRAINED", "open_clip:hf-hub:OWNER/NAME" or "open_clip:local-dir:FOLDER".
        device: "cpu", "cuda", or one GPU such as "cuda:1". Default: the GPU of this process, or the CPU if there is
            none.
        baseline: Allow open_clip models.
        precision: "float32", "bf16" (autocast to bfloat16), or "auto" for the faster of the two. For an open_clip
            model, "auto" selects float32.
        record: Folder in which the choice for "auto" is recorded, so that a resumed run makes the same choice.

    Returns:
        An `Embedder`, with the functions `embed_images` and `embed_texts`.

    Raises:
        ValueError: If there is no such model, or it is not a two-tower model that can be loaded.
        ImportError: If an open_clip model is requested and open_clip is not installed.

    Example:
        >>> from modeling_capivara.two_towers import load_embedder
        >>> embedder = load_embedder(folder, device="cpu")
        >>> texts = embedder.embed_texts(["uma foto de um gato", "uma casa"])
        >>> len(texts)
        2
        >>> similarities = texts @ texts.T  # cosines, because embeddings have unit length
    """
    torch_device = environment.resolve_device(device) if device else environment.get_or_init_distributed_state().device
    open_clip_name = _parse_open_clip_name(model)
    if not open_clip_name:
        processor, loaded = load_processor(model), load_model(model).eval().to(torch_device)
        if precision == "auto":
            precision = choose_fastest_precision(loaded, processor, record)
        return build_embedder(model, loaded, processor, precision)
    if not baseline:
        hint = "Pass it with --role baseline, or to eval.suite with --baseline"
        raise ValueError(f"{model} is a model of open_clip, which can only be used as a baseline. {hint}.")
    return _load_open_clip_embedder(open_clip_name, torch_device, "float32" if precision == "auto" else precision)


def check_model_exists(model: str) -> None:
    """Check that a model exists, without loading it, so that a long program can fail early.

    Args:
        model: Folder, Hub id or open_clip name.

    Raises:
        ValueError: If there is no such model, or the Hub can't be reached.
        ImportError: If an open_clip model is requested and open_clip is not installed.
    """
    if open_clip_name := _parse_open_clip_name(model):
        _find_open_clip_model(open_clip_name)
    else:
        check_model_file_exists(model, "config.json", "is not a model folder")


def _parse_open_clip_name(model: str) -> str:
    """Return the name of an open_clip model without the prefix "open_clip:"; "" for a model of transformers.

    Raises ValueError if the model has the prefix "clip:", which earlier versions used for models of transformers.
    """
    library, _, name = model.partition(":")
    if library == "clip" and name:
        raise ValueError(f'A model of transformers is named without "clip:": write {name} instead of {model}.')
    return name if library == "open_clip" else ""


def choose_fastest_precision(model: PreTrainedModel, processor: ProcessorMixin, record: Path | None = None) -> str:
    """Choose the precision in which a model embeds images fastest.

    A GPU gets "bf16" if it supports bf16. A CPU gets "bf16" only if a measurement shows that it is faster, with nearly
    the same embeddings as float32.

    Args:
        model: Two-tower model in evaluation mode, on its device.
        processor: The model's processor.
        record: Folder in which the choice is recorded, so that a resumed run makes the same choice.

    Returns:
        "bf16" or "float32".
    """
    supports_bf16 = environment.resolve_mixed_precision("auto", model.device) == "bf16"
    if not supports_bf16 or model.device.type != "cpu":
        return "bf16" if supports_bf16 else "float32"
    sample = list(islice(cycle(random_images()), embedding_speed.SAMPLE_IMAGES))
    embed = partial(embed_images, model, processor, sample)
    candidates = {"float32": embed, "bf16": torch.autocast("cpu", torch.bfloat16)(embed)}
    encoder = weights_digest(model, IMAGE_ENCODER_PREFIXES)
    return embedding_speed.load_or_measure_fastest_setting("precision", candidates, encoder, record)


def build_embedder(name: str, model: PreTrainedModel, processor: ProcessorMixin, precision: str) -> Embedder:
    """Wrap a loaded transformers model as an `Embedder`, which embeds images and texts.

    Args:
        name: Name of the model, as the user gave it.
        model: The model, in evaluation mode and on its device.
        processor: The model's processor.
        precision: "float32", or "bf16" for autocast to bfloat16.

    Returns:
        The embedder.
    """
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend:
        rules = backend.to_str()
    else:
        # The tokenizer of SigLIP 1 is written in Python and has no `backend_tokenizer`, so its vocabulary is listed.
        rules = json.dumps([tokenizer.get_vocab(), getattr(tokenizer, "do_lower_case", None)], sort_keys=True)
    rules += str(tokenizer.model_max_length)
    settings = model.config.to_json_string() + processor.image_processor.to_json_string()
    return Embedder(
        name=name,
        device=model.device,
        precision=precision,
        fingerprint=_digest_parts(weights_digest(model), settings, rules, precision),
        image_fingerprint=image_encoder_fingerprint(model, processor, precision),
        width=embedding_width(model.config),
        metadata=describe_model(model),
        embed_images=partial(embed_images, model, processor),
        embed_texts=partial(embed_texts, model, processor),
    )


def image_encoder_fingerprint(model: PreTrainedModel, processor: ProcessorMixin, precision: str) -> str:
    """Compute a hash of everything that image embeddings depend on: weights, settings and precision.

    Models with the same hash compute the same image embeddings.

    Args:
        model: Two-tower model of transformers.
        processor: The model's processor.
        precision: Precision in which images are embedded, such as "bf16".

    Returns:
        The hash as 32 hexadecimal digits.
    """
    settings = model.config.vision_config.to_json_string() + processor.image_processor.to_json_string()
    return _digest_parts(weights_digest(model, IMAGE_ENCODER_PREFIXES), settings, precision)


def _find_open_clip_model(source: str) -> tuple[str, str | None, str]:
    """Find a model of open_clip, without loading it.

    Args:
        source: "NAME:PRETRAINED", "hf-hub:OWNER/NAME" or "local-dir:FOLDER".

    Returns:
        A tuple of the arguments `model_name` and `pretrained` of open_clip's functions, and the Hub id of the weights.
        The Hub id is "" if the weights are not on the Hub.

    Raises:
        ValueError: If open_clip has no such weights, the folder has no model, or the Hub can't be reached.
        ImportError: If open_clip is not installed.
    """
    environment.require_packages(f"The model open_clip:{source}", "open-clip", "open_clip")
    import open_clip

    name, pretrained, repository = source, None, ""
    if source.startswith("hf-hub:"):
        repository = source.removeprefix("hf-hub:")
    elif not source.startswith("local-dir:"):
        name, _, pretrained = source.partition(":")
        settings = open_clip.get_pretrained_cfg(name, pretrained)
        # Without this error, open_clip would use randomly initialized weights.
        if not settings and not Path(pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            hint = f"write open_clip:{name}:TAG. Tags of {name}: {tags}"
            raise ValueError(f"open_clip:{source} names no known weights; {hint}.")
        repository = settings.get("hf_hub", "").strip("/")
    elif not Path(source.removeprefix("local-dir:"), OPEN_CLIP_CONFIG).is_file():
        raise ValueError(f"open_clip:{source} is not the folder of an open_clip model ({OPEN_CLIP_CONFIG} is missing).")
    # If the model has been downloaded before, one of these files is in the cache, and no network is needed.
    check_hub_model_reachable(repository, OPEN_CLIP_CONFIG, *OPEN_CLIP_WEIGHT_FILES)
    return name, pretrained, repository


def _load_open_clip_embedder(source: str, device: torch.device, precision: str) -> Embedder:
    name, pretrained, repository = _find_open_clip_model(source)
    # Imported here, because open_clip is an optional dependency. It is installed, because the model was found with it.
    import open_clip

    try:
        if pretrained is None:
            folder = source.removeprefix("local-dir:")
            config = hf_hub_download(repository, OPEN_CLIP_CONFIG) if repository else Path(folder, OPEN_CLIP_CONFIG)
            check_config_ranges(read_json(Path(config), model_cfg=dict))
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
        with wrap_tokenizer_errors("its tokenizer"):
            model, tokenizer = model.eval().to(device), open_clip.get_tokenizer(name)
    # For unknown names or tags and for damaged folders, open_clip raises errors of many types.
    except Exception as error:
        raise ValueError(f"open_clip can't load {source!r}: {' '.join(str(error).split())}") from error

    def encode_images(batch: list[Image.Image]) -> Tensor:
        return l2_normalize(model.encode_image(torch.stack([preprocess(image) for image in batch]).to(device)))

    def encode_texts(batch: list[str]) -> Tensor:
        return l2_normalize(model.encode_text(tokenizer(batch).to(device)))

    digest = _digest_parts("open_clip", source, weights_digest(model), repr(preprocess), precision)
    embed_texts = partial(_embed_in_batches, encode_texts)
    # The image fingerprint should cover only the image tower, but it is not known which parameters of an open_clip
    # model belong to this tower. So both fingerprints are the digest of the whole model.
    return Embedder(
        name=f"open_clip:{source}",
        device=device,
        precision=precision,
        fingerprint=digest,
        image_fingerprint=digest,
        width=embed_texts(["a"]).shape[-1],  # open_clip models state the width in different attributes
        metadata=describe_model(model),
        embed_images=partial(_embed_in_batches, encode_images),
        embed_texts=embed_texts,
    )


def _digest_parts(*parts: str) -> str:
    """Compute one digest of several strings.

    Args:
        *parts: Strings, whose order matters.

    Returns:
        The BLAKE2b digest as 32 hexadecimal digits.
    """
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def embed_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    batch_size: int = 64,
    progress: ProgressOption = None,
) -> Tensor:
    """Embed texts in batches, with a two-tower model and its processor.

    Args:
        model: Two-tower model in evaluation mode.
        processor: The model's processor, from `load_processor`.
        texts: At least one text.
        batch_size: Number of texts per forward pass.
        progress: Title of a progress bar, or a function that is called with the size of each finished batch.

    Returns:
        (texts, width), unit length, float32, on the CPU, in the order of `texts`.

    Raises:
        ValueError: If the tokenizer is damaged or an embedding is not finite.
    """
    with wrap_tokenizer_errors("The model's tokenizer"):
        tokens = tokenize(processor, texts)
    # Texts of similar length share a batch, so that they need little padding.
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
    chunk_images: int = embedding_speed.CHUNK_SIZES[0],
) -> Tensor:
    """Embed images in batches, with a two-tower model and its processor.

    Args:
        model: Two-tower model in evaluation mode.
        processor: The model's processor, from `load_processor`.
        images: At least one PIL image. An iterator is read batch by batch.
        batch_size: Number of images that are preprocessed at once. On a GPU, they are also embedded at once.
        progress: Title of a progress bar, or a function that is called with the size of each finished batch.
        chunk_images: Number of images per forward pass on a CPU.

    Returns:
        (images, width), unit length, float32, on the CPU, in the order of `images`.

    Raises:
        ValueError: If an image is invalid, preprocessed images differ in size, or an embedding is not finite.
    """

    def preprocess(part: list[Image.Image]) -> Tensor:
        return processor(images=part, return_tensors="pt")["pixel_values"]

    def encode(batch: list[Image.Image]) -> Tensor:
        # An image processor uses only one core, so each thread preprocesses a part of the batch.
        part_size = math.ceil(len(batch) / PREPROCESSING_THREADS)
        parts = [batch[start : start + part_size] for start in range(0, len(batch), part_size)]
        with ThreadPoolExecutor(PREPROCESSING_THREADS) as threads:
            pixel_values = [*threads.map(preprocess, parts)]
        if len(sizes := {tuple(part.shape[1:]) for part in pixel_values}) > 1:
            rule = "The image processor must give all images the same size. Check do_resize in preprocessor_config.json"
            raise ValueError(f"{rule}, got images of {sorted(sizes)} (channels, height, width).")
        return compute_image_embeds_in_chunks(model, torch.cat(pixel_values), model.device, chunk_images)

    return _embed_in_batches(encode, images, batch_size, progress)


@torch.inference_mode()
def _embed_in_batches(
    encode: Callable, items: Iterable, batch_size: int = 32, progress: ProgressOption = None
) -> Tensor:
    """Embed items in batches.

    Args:
        encode: Function from a list of items to their embeddings, (items, width).
        items: Items to embed, such as images or texts; at least one.
        batch_size: Number of items per call of `encode`.
        progress: Title of a progress bar, or a function that is called with the size of each finished batch.

    Returns:
        Embeddings, (items, width), float32, on the CPU, in the order of `items`.

    Raises:
        ValueError: If an embedding is not finite.
    """
    total = len(items) if hasattr(items, "__len__") else None
    title = progress if isinstance(progress, str) else None
    embeds, iterator = [], iter(items)
    with tqdm(total=total, desc=title, disable=title is None) as bar:
        while batch := list(islice(iterator, batch_size)):
            embeds.append(check_finite(encode(batch).float().cpu()))
            (progress if callable(progress) else bar.update)(len(batch))
    return torch.cat(embeds)


def check_finite(embeds: Tensor) -> Tensor:
    """Check that embeddings contain no NaN or infinity, and return the embeddings unchanged.

    Args:
        embeds: Embeddings in any shape.

    Raises:
        ValueError: If a number is NaN or infinite. Similarities to such an embedding would be meaningless.
    """
    if not embeds.isfinite().all():
        raise ValueError(NOT_FINITE_MESSAGE)
    return embeds


def move_to_device_in_chunks(
    pixel_values: Tensor, device: torch.device, chunk_images: int = embedding_speed.CHUNK_SIZES[0]
) -> Sequence[Tensor]:
    """Move preprocessed images to the model's device, split into chunks that are fast to embed there.

    Args:
        pixel_values: (images, 3, height, width).
        device: Device of the model.
        chunk_images: Largest number of images per chunk on a CPU.

    Returns:
        Chunks of `pixel_values` in channels-last memory format. On a GPU, there is a single chunk.
    """
    # With large chunks on a CPU, every layer allocates new memory for its activations, which can double the time.
    pixel_values = pixel_values.to(device, memory_format=torch.channels_last)
    return pixel_values.split(chunk_images if device.type == "cpu" else max(len(pixel_values), 1))


def compute_image_embeds_in_chunks(
    model: nn.Module, pixel_values: Tensor, device: torch.device, chunk_images: int = embedding_speed.CHUNK_SIZES[0]
) -> Tensor:
    """Compute the embeddings of preprocessed images fast, for inference without gradients.

    The result differs from that of `compute_image_embeds` only by rounding errors in the last bits.

    Args:
        model: Two-tower model in evaluation mode.
        pixel_values: (images, 3, height, width), on any device.
        device: Device of the model.
        chunk_images: Number of images per forward pass on a CPU.

    Returns:
        Embeddings on `device`, (images, width), unit length, float32.
    """
    with last_layer_for_class_token_only(model):
        parts = move_to_device_in_chunks(pixel_values, device, chunk_images)
        return torch.cat([compute_image_embeds(model, part) for part in parts])


def random_images(seed: int = 0) -> list[Image.Image]:
    """Return six images with random pixels, to compare a converted model with the original model.

    The images have unusual sizes. Four are RGB, one is gray, and one is RGBA.

    Args:
        seed: Seed of the random numbers.
    """
    rng = np.random.default_rng(seed)
    shapes = [(37, 61, 3), (301, 199, 3), (224, 227, 3), (97, 450, 3), (130, 131), (259, 225, 4)]
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def random_texts(seed: int = 0) -> list[str]:
    """Return six random texts, to compare a converted model with the original model.

    The texts consist of Portuguese syllables and have 1 to 120 words. The longest has more than 77 tokens, so the
    tokenizer truncates it.

    Args:
        seed: Seed of the random choices.
    """
    rng = random.Random(seed)
    syllables = ("ca", "pi", "va", "ra", "ção", "ões", "nha", "lho", "ba", "tu", "gue", "mar", "é", "ão", "sol", "que")
    lengths = (1, 2, 5, 9, 30, 120)
    texts = [["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(length)] for length in lengths]
    return [" ".join(words) for words in texts]
