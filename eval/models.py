"""Models that figures are taken of: CAPIVARA's, and as baselines open_clip's and transformers' CLIP."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from modeling_capivara.embedding import embed_images, embed_texts
from modeling_capivara.loading import load_model, load_processor


class Embedder(Protocol):
    """Texts and images in one space, (rows, width), unit length, float32, on the CPU."""

    name: str
    device: torch.device

    def images(self, images: Iterable[Image.Image], batch_size: int, description: str | None = None) -> Tensor: ...

    def texts(self, texts: Sequence[str], batch_size: int, description: str | None = None) -> Tensor: ...


@dataclass
class CapivaraEmbedder:
    """A CAPIVARA model with its processor."""

    name: str
    model: Any
    processor: Any

    @property
    def device(self) -> torch.device:
        return self.model.device

    def images(self, images: Iterable[Image.Image], batch_size: int, description: str | None = None) -> Tensor:
        return embed_images(self.model, self.processor, images, batch_size, description)

    def texts(self, texts: Sequence[str], batch_size: int, description: str | None = None) -> Tensor:
        return embed_texts(self.model, self.processor, texts, batch_size, description)


@dataclass
class PlainEmbedder:
    """Any model of two functions: a batch of PIL images, and a batch of texts, to their embeddings."""

    name: str
    device: torch.device
    encode_images: Any
    encode_texts: Any

    def images(self, images: Iterable[Image.Image], batch_size: int, description: str | None = None) -> Tensor:
        return _embedded(images, self.encode_images, batch_size, description, "image")

    def texts(self, texts: Sequence[str], batch_size: int, description: str | None = None) -> Tensor:
        return _embedded(texts, self.encode_texts, batch_size, description, "text")


def load_embedder(model: str, device: str | None = None, baseline: bool = False) -> Embedder:
    """A model by its folder or Hub id.

    Args:
        model: folder or Hub id of a CAPIVARA model. With `baseline` also `open_clip:NAME[:PRETRAINED]`,
            `open_clip:local-dir:FOLDER`, or folder or Hub id of a CLIP of transformers (`clip:…`).
        device: the GPU where there is one, else the CPU, where None.
        baseline: take the other kinds, too.

    Raises:
        ValueError: it is no CAPIVARA model; the message says how other kinds are named.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind, _, rest = model.partition(":")
    if kind in ("open_clip", "clip") and rest:
        if not baseline:
            raise ValueError(f"{model} is no CAPIVARA model; other kinds are taken as --baseline alone.")
        return _open_clip(rest, device) if kind == "open_clip" else _transformers_clip(rest, device)
    processor = load_processor(model)
    return CapivaraEmbedder(model, load_model(model).eval().to(device), processor)


def _open_clip(source: str, device: torch.device) -> PlainEmbedder:
    import open_clip

    name, pretrained = source, None
    if not source.startswith(("local-dir:", "hf-hub:")):
        name, _, pretrained = source.partition(":")
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained or None)
    model, tokenizer = model.eval().to(device), open_clip.get_tokenizer(name)
    return PlainEmbedder(
        f"open_clip:{source}",
        device,
        lambda images: model.encode_image(torch.stack([preprocess(image) for image in images]).to(device)),
        lambda texts: model.encode_text(tokenizer(list(texts)).to(device)),
    )


def _transformers_clip(source: str, device: torch.device) -> PlainEmbedder:
    from transformers import AutoModel, AutoProcessor

    if not Path(source).exists() and source.count("/") != 1:
        raise ValueError(f"{source!r} is neither a folder nor a Hub id such as 'openai/clip-vit-base-patch32'.")
    processor, model = AutoProcessor.from_pretrained(source), AutoModel.from_pretrained(source).eval().to(device)

    def encode_texts(texts):
        inputs = processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(device)
        return model.get_text_features(**inputs).pooler_output

    def encode_images(images):
        inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(device)
        return model.get_image_features(**inputs).pooler_output

    return PlainEmbedder(f"clip:{source}", device, encode_images, encode_texts)


@torch.inference_mode()
def _embedded(items: Iterable, encode, batch_size: int, description: str | None, unit: str) -> Tensor:
    embeds, batch = [], []
    total = len(items) if hasattr(items, "__len__") else None
    with tqdm(total=total, desc=description, unit=unit, disable=description is None) as bar:

        def run() -> None:
            embeds.append(torch.nn.functional.normalize(encode(batch).float(), dim=-1).cpu())
            bar.update(len(batch))
            batch.clear()

        for item in items:
            batch.append(item)
            if len(batch) == batch_size:
                run()
        if batch:
            run()
    return torch.cat(embeds)
