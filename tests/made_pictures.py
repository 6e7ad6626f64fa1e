"""Test data of the search page: thirty pictures of colored areas, and a tiny model that was trained on them."""

import io
import os
import struct
import zlib
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image as Pictures
from tiny import randomize, tiny_config

from capivara_search.index import PictureIndex
from modeling_capivara import CapivaraModel, CapivaraProcessor

COLORS = {
    "azul": (20, 40, 230), "verde": (20, 200, 40), "vermelho": (230, 20, 30), "branco": (250, 250, 250),
    "preto": (10, 10, 10), "amarelo": (240, 230, 20),
}  # fmt: skip
PLACES = {  # area of the color on a gray background: left, top, right, bottom
    "inteiro": (0, 0, 32, 32), "em cima": (0, 0, 32, 16), "embaixo": (0, 16, 32, 32), "na esquerda": (0, 0, 16, 32),
    "na direita": (16, 0, 32, 32),
}  # fmt: skip
CAPTIONS = [f"{color} {place}" for color in COLORS for place in PLACES]
STEPS = 260


def made_pictures() -> list[Pictures.Image]:
    """Return one picture for each caption."""
    pictures = []
    for color in COLORS.values():
        for place in PLACES.values():
            picture = Pictures.new("RGB", (32, 32), (128, 128, 128))
            picture.paste(color, place)
            pictures.append(picture)
    return pictures


def save_folder(folder: Path) -> Path:
    """Save the pictures as PNG files named by their captions, one folder per color; the last picture is the newest."""
    for number, (caption, picture) in enumerate(zip(CAPTIONS, made_pictures(), strict=True)):
        path = folder / caption.split()[0] / f"{caption}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        os.utime(path, (datetime(2024, 1, 1 + number, 12).timestamp(),) * 2)
    return folder


def made_index(where: Path, folder: Path, model: Path) -> PictureIndex:
    """Create an index of a folder."""
    index = PictureIndex.open(where, str(model))
    index.add(folder)
    return index


def png(number: int) -> bytes:
    """Return a picture as PNG bytes."""
    file = io.BytesIO()
    made_pictures()[number].save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """Return a decompression bomb: a PNG file of a few hundred bytes that claims 29,000 x 29,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 29_000, 29_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def save_trained_model(folder: Path, processor: CapivaraProcessor) -> None:
    """Train a tiny model until it finds each picture by its caption, and save it."""
    torch.manual_seed(0)
    model = randomize(CapivaraModel(tiny_config())).train()
    texts = processor(text=CAPTIONS, return_tensors="pt")
    pixel_values = processor(images=made_pictures(), return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**texts, pixel_values=pixel_values, return_loss=True).loss.backward()
        optimizer.step()
    with torch.inference_mode():
        best = model.eval()(**texts, pixel_values=pixel_values).logits_per_text.argmax(dim=1)
    assert best.tolist() == list(range(len(CAPTIONS))), "the model does not find all pictures"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
