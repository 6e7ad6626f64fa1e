"""Many texts or images through a model, in batches: what search and evaluation need."""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .modeling_capivara import CapivaraModel
from .processing_capivara import CapivaraProcessor

OnBatch = Callable[[int], object] | None
# Images that go through the tower at once: activations of more are new memory at every layer, half of the time.
CPU_IMAGES = 4


@torch.inference_mode()
def embed_texts(
    model: CapivaraModel,
    processor: CapivaraProcessor,
    texts: Sequence[str],
    batch_size: int = 64,
    description: str | None = None,
    on_batch: OnBatch = None,
) -> Tensor:
    """Embeddings of `texts`, in their order.

    Texts are batched by length, so that short ones are not padded to the longest of all.

    Args:
        model: put in evaluation mode by the caller.
        processor: the model's own.
        texts: at least one.
        batch_size: texts that go through at once.
        description: title of a progress bar; None shows none.
        on_batch: called after each batch with its size, for a bar of the caller's.

    Returns:
        (texts, projection_dim), unit length, float32, on the CPU.
    """
    tokens = [processor(text=text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]["input_ids"]))
    embeds = None
    with tqdm(total=len(texts), desc=description, unit="text", disable=description is None) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = processor.tokenizer.pad([dict(tokens[i]) for i in rows], return_tensors="pt")
            found = model(
                **{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            ).text_embeds
            if embeds is None:
                embeds = torch.empty(len(texts), found.shape[1])
            embeds[rows] = found.float().cpu()
            bar.update(len(rows))
            if on_batch is not None:
                on_batch(len(rows))
    return embeds


@torch.inference_mode()
def embed_images(
    model: CapivaraModel,
    processor: CapivaraProcessor,
    images: Iterable[Image.Image],
    batch_size: int = 32,
    description: str | None = None,
    on_batch: OnBatch = None,
) -> Tensor:
    """Embeddings of `images`, in their order: (images, projection_dim), unit length, float32, on the CPU.

    `images` is anything that yields PIL images, at least one; they are read batch by batch. The rest as `embed_texts`.
    """
    embeds, iterator = [], iter(images)
    total = len(images) if hasattr(images, "__len__") else None
    with tqdm(total=total, desc=description, unit="image", disable=description is None) as bar:
        while batch := list(islice(iterator, batch_size)):
            pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
            for part in image_parts(pixel_values, model.device):
                embeds.append(model(pixel_values=part).image_embeds.float().cpu())
            bar.update(len(batch))
            if on_batch is not None:
                on_batch(len(batch))
    return torch.cat(embeds)


def image_parts(pixel_values: Tensor, device: torch.device) -> Sequence[Tensor]:
    """`pixel_values`, (images, 3, height, width), on the device, in the parts and memory order that are fast there."""
    pixel_values = pixel_values.to(device, memory_format=torch.channels_last)
    return pixel_values.split(CPU_IMAGES if device.type == "cpu" else max(len(pixel_values), 1))


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
