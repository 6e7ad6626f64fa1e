"""Embedding models for scoring, evaluation and search: CAPIVARA's, and those of open_clip and transformers.

All put texts and images into one space, (rows, width), unit length, float32, on the CPU; `on_batch` is called after
each batch with its size. `fingerprint` is a digest of all that the embeddings depend on, `image_fingerprint` of what
those of images do: models that share their image tower share these.
"""

import atexit
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from capivara_common.files import read_json
from capivara_common.hub_cache import first_line

from .checks_capivara import check_sizes, tokenizer_errors
from .embedding import OnBatch, embed_images, embed_texts
from .loading import check_reachable, checked_config, load_model, load_processor, weights_digest
from .modeling_capivara import CapivaraModel
from .open_clip import OPEN_CLIP_CONFIG, WEIGHT_FILES
from .processing_capivara import CapivaraProcessor

OPEN_CLIP_FILES = (OPEN_CLIP_CONFIG, *WEIGHT_FILES)  # one of which the Hub has of a model of open_clip


@dataclass
class CapivaraEmbedder:
    """A CAPIVARA model with its processor."""

    name: str
    model: CapivaraModel
    processor: CapivaraProcessor
    precision: str

    def __post_init__(self) -> None:
        config, image_processor = self.model.config, self.processor.image_processor.to_json_string()
        tokenizer = self.processor.tokenizer.backend_tokenizer.to_str() + str(self.processor.tokenizer.model_max_length)
        whole = config.to_json_string() + image_processor
        self.fingerprint = _digest(weights_digest(self.model), whole, tokenizer, self.precision)
        vision = config.vision_config.to_json_string() + image_processor
        image_side = weights_digest(self.model, ("vision_model.", "visual_projection."))
        self.image_fingerprint = _digest(image_side, vision, self.precision)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def images(self, images: Sequence[Image.Image], batch_size: int = 32, on_batch: OnBatch = None) -> Tensor:
        """(images, width), `batch_size` at once."""
        with _autocast(self):
            return embed_images(self.model, self.processor, images, batch_size, on_batch=on_batch)

    def texts(self, texts: Sequence[str], batch_size: int = 64, on_batch: OnBatch = None) -> Tensor:
        """(texts, width), `batch_size` at once."""
        with _autocast(self):
            return embed_texts(self.model, self.processor, texts, batch_size, on_batch=on_batch)


@dataclass
class PlainEmbedder:
    """Any model of two functions: a batch of PIL images, and a batch of texts, to their embeddings."""

    name: str
    device: torch.device
    precision: str
    fingerprint: str
    encode_images: Callable[[Sequence[Image.Image]], Tensor]
    encode_texts: Callable[[Sequence[str]], Tensor]

    @property
    def image_fingerprint(self) -> str:
        """That of the whole model: which part the images need is not known."""
        return self.fingerprint

    def images(self, images: Sequence[Image.Image], batch_size: int = 32, on_batch: OnBatch = None) -> Tensor:
        """(images, width), `batch_size` at once."""
        return self._embedded(images, self.encode_images, batch_size, on_batch)

    def texts(self, texts: Sequence[str], batch_size: int = 64, on_batch: OnBatch = None) -> Tensor:
        """(texts, width), `batch_size` at once."""
        return self._embedded(texts, self.encode_texts, batch_size, on_batch)

    @torch.inference_mode()
    def _embedded(self, items: Sequence, encode: Callable, batch_size: int, on_batch: OnBatch) -> Tensor:
        embeds = []
        with _autocast(self):
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                embeds.append(torch.nn.functional.normalize(encode(batch).float(), dim=-1).cpu())
                if on_batch is not None:
                    on_batch(len(batch))
        return torch.cat(embeds)


Embedder = CapivaraEmbedder | PlainEmbedder


def load_embedder(
    model: str,
    device: str | None = None,
    baseline: bool = False,
    precision: str = "float32",
    trust_remote_code: bool = False,
) -> Embedder:
    """A model by its folder or Hub id.

    Args:
        model: folder or Hub id of a CAPIVARA model. With `baseline` also `open_clip:NAME[:PRETRAINED]`,
            `open_clip:local-dir:FOLDER`, or folder or Hub id of a CLIP of transformers (`clip:…`).
        device: the process's GPU where there is one, else the CPU, where None.
        baseline: take the other kinds, too.
        precision: "float32", or "bf16" for autocast.
        trust_remote_code: execute code that a `clip:` model brings along.

    Raises:
        ValueError: it is no CAPIVARA model; the message says how other kinds are named.
    """
    where = _device(device)
    kind, _, rest = model.partition(":")
    if kind in ("open_clip", "clip") and rest:
        if not baseline:
            raise ValueError(
                f"{model} is no CAPIVARA model; other kinds are taken as the baseline alone: --role baseline, or "
                "eval.suite's --baseline."
            )
        if kind == "open_clip":
            return _open_clip(rest, where, precision)
        return _transformers_clip(rest, where, precision, trust_remote_code)
    processor = load_processor(model)
    return CapivaraEmbedder(model, load_model(model).eval().to(where), processor, precision)


def processes() -> PartialState:
    """Accelerate's state: this process's number, and its device. One process where nothing was launched."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not torch.distributed.is_initialized():
        atexit.register(_leave_processes)
    return PartialState(cpu=launched and not torch.cuda.is_available())


def _leave_processes() -> None:
    """End the threads of the process group, which may abort a process that ends beside them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device(name: str | None) -> torch.device:
    """Raises ValueError where there is no such device."""
    try:
        device = torch.device(name) if name else processes().device
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}; use cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"Device {name!r} was asked for, but there is no GPU that torch can use; use cpu.")
    return device


def _open_clip(source: str, device: torch.device, precision: str) -> PlainEmbedder:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"open_clip:{source} needs open_clip, not installed yet: pip install open_clip_torch"
        ) from error

    name, pretrained = source, None
    if not source.startswith(("local-dir:", "hf-hub:")):
        name, _, pretrained = source.partition(":")
        if not pretrained:  # open_clip would draw random weights
            known = open_clip.list_pretrained_tags_by_model(name)
            raise ValueError(f"open_clip:{source} names no weights; say open_clip:{name}:TAG, with a tag of {known}.")
        repository = open_clip.get_pretrained_cfg(name, pretrained).get("hf_hub", "").strip("/")
        if repository.count("/") == 1:
            check_reachable(repository, *OPEN_CLIP_FILES)
    elif source.startswith("hf-hub:"):
        check_reachable(source.removeprefix("hf-hub:"), *OPEN_CLIP_FILES)
    try:
        if source.startswith("local-dir:"):
            check_sizes(read_json(Path(source.removeprefix("local-dir:")) / OPEN_CLIP_CONFIG, model_cfg=dict))
        elif source.startswith("hf-hub:"):
            path = hf_hub_download(source.removeprefix("hf-hub:"), OPEN_CLIP_CONFIG)
            check_sizes(read_json(Path(path), model_cfg=dict))
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained or None)
        with tokenizer_errors("its tokenizer"):
            model, tokenizer = model.eval().to(device), open_clip.get_tokenizer(name)
    except Exception as error:  # a name or tag that open_clip does not know, or a damaged folder
        raise ValueError(f"open_clip can't load {source!r}: {' '.join(str(error).split())}") from error
    return PlainEmbedder(
        f"open_clip:{source}",
        device,
        precision,
        _digest("open_clip", source, weights_digest(model), repr(preprocess), precision),
        lambda images: model.encode_image(torch.stack([preprocess(image) for image in images]).to(device)),
        lambda texts: model.encode_text(tokenizer(list(texts)).to(device)),
    )


def _transformers_clip(source: str, device: torch.device, precision: str, trust_remote_code: bool) -> PlainEmbedder:
    if not Path(source).exists() and source.count("/") != 1:
        raise ValueError(f"{source!r} is neither a folder nor a Hub id such as 'openai/clip-vit-base-patch32'.")
    check_reachable(source)
    try:
        config = checked_config(source, trust_remote_code=trust_remote_code)
        with tokenizer_errors("its tokenizer"):
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_sizes(processor.image_processor.to_dict())
        model = AutoModel.from_pretrained(source, config=config, trust_remote_code=trust_remote_code)
        model = model.eval().to(device)
    except Exception as error:  # a damaged folder makes transformers raise anything at all
        raise ValueError(
            f"clip:{source} can't be loaded; it must hold a CLIP of transformers with its processor, such as "
            f"openai/clip-vit-base-patch32: {first_line(error)}"
        ) from error
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise ValueError(
            f"clip:{source} is a {type(model).__name__}, which does not embed texts and images as CLIP does."
        )

    # A tokenizer that was saved without a limit would give more tokens than the model has positions for.
    text_config = getattr(model.config, "text_config", model.config)
    longest = min(processor.tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", sys.maxsize))
    own = getattr(processor, "text_kwargs", {})  # Siglip2Processor's, say; most processors have no rule
    # SigLIP reads the last token of a text that was filled up to the end, unmasked: its processor does not say so, and
    # transformers' own pipeline asks for the model's kind, too.
    padding = "max_length" if "siglip" in model.config.model_type else own.get("padding") or True
    rule = {"padding": padding, "truncation": True, "max_length": min(longest, own.get("max_length", longest))}

    def encode_texts(texts: Sequence[str]) -> Tensor:
        with tokenizer_errors(f"The tokenizer of {source}"):
            inputs = processor(text=list(texts), return_tensors="pt", **rule).to(device)
        return model.get_text_features(**inputs).pooler_output

    def encode_images(images: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(device)
        return model.get_image_features(**inputs).pooler_output

    fingerprint = _digest("clip", source, weights_digest(model), processor.to_json_string(), precision)
    return PlainEmbedder(f"clip:{source}", device, precision, fingerprint, encode_images, encode_texts)


def _autocast(embedder: Embedder) -> torch.autocast:
    return torch.autocast(embedder.device.type, dtype=torch.bfloat16, enabled=embedder.precision == "bf16")


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
