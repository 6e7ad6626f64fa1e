"""Readers of an export for Immich (the published layout, or an Immich service), and example texts and images."""

import io
import json
import string
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
from tokenizers import Tokenizer

from examples.real_images import CLASS_PHOTOGRAPHS, load_example_photo

ODD_TEXTS = {
    "typographic quotation marks": "a placa \u201cproibido estacionar\u201d e o copo d\u2019água",
    "accents of their own": "a\u0301gua, cora\u00e7a\u0303o e avo\u0302",
    "white space": "  um \t gato\n\n dormindo ",
    "full width and ligature": "Ｓão João, ﬁm de festa",
    "emoji": "festa 🎉 na praia ☕",
    "longer than 77 tokens": "uma praia com areia branca e coqueiros ao pôr do sol, " * 12,
    "a padding token, spelled": "um <pad> gato",
    "mojibake": "SÃ£o JoÃ£o",
    "entities of HTML": "Tom &amp; Jerry",
}


class LayoutReader:
    """Embeds texts and images from an exported folder as Immich does, without using code of this project."""

    def __init__(self, folder: Path):
        import onnxruntime

        def read(name: str) -> dict:
            return json.loads((folder / name).read_text(encoding="utf-8"))

        open_graph = partial(onnxruntime.InferenceSession, providers=["CPUExecutionProvider"])
        text_cfg, pad = read("config.json")["text_cfg"], read("textual/tokenizer_config.json")
        length = text_cfg.get("context_length", 77)
        self.is_canonical = text_cfg.get("tokenizer_kwargs", {}).get("clean") == "canonicalize"
        self.tokenizer = Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
        token = pad["pad_token"]
        self.tokenizer.enable_padding(length=length, pad_token=token, pad_id=self.tokenizer.token_to_id(token))
        self.tokenizer.enable_truncation(max_length=length)
        self.textual, self.visual = (open_graph(folder / name / "model.onnx") for name in ("textual", "visual"))
        self.settings = read("visual/preprocess_cfg.json")

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, padded to the full length."""
        text = " ".join(text.split())
        if self.is_canonical:
            text = text.translate(str.maketrans("", "", string.punctuation)).lower()
        return self.tokenizer.encode(text).ids

    def text(self, text: str) -> np.ndarray:
        """Return the embedding of a text (width,)."""
        return self.textual.run(None, {"text": np.array([self.ids(text)], dtype=np.int32)})[0][0]

    def picture(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the embedding of an image (width,)."""
        size = self.settings["size"]
        side = size[0] if isinstance(size, list) else size
        image = image.convert("RGB")
        shape = [int(length / min(image.size) * side) for length in image.size]
        shape[image.width >= image.height] = side  # the shorter side exactly, in spite of rounding
        shape = [side, side] if self.settings["resize_mode"] == "squash" else shape
        image = image.resize(shape, PIL.Image.Resampling[self.settings["interpolation"].upper()])
        left, top = (int(length / 2 - side / 2) for length in shape)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
        pixels = (pixels - np.float32(self.settings["mean"])) / np.float32(self.settings["std"])
        return self.visual.run(None, {"image": pixels.transpose(2, 0, 1)[None]})[0][0]


class ServiceReader(LayoutReader):
    """Asks an Immich machine-learning service for embeddings. Token ids come from the exported folder."""

    def __init__(self, folder: Path, url: str):
        import httpx

        super().__init__(folder)
        self.name, self.client = folder.name, httpx.Client(base_url=url, timeout=300)

    def text(self, text: str) -> np.ndarray:
        """Return the embedding of a text (width,)."""
        return self._predict("textual", data={"text": text})

    def picture(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the embedding of an image (width,)."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._predict("visual", files={"image": ("image.png", buffer.getvalue())})

    def _predict(self, tower: str, data: dict | None = None, files: dict | None = None) -> np.ndarray:
        entries = json.dumps({"clip": {tower: {"modelName": self.name, "options": {}}}})
        answer = self.client.post("/predict", data={"entries": entries, **(data or {})}, files=files)
        answer.raise_for_status()
        return np.array(json.loads(answer.json()["clip"]), dtype=np.float32)


def pictures() -> list[PIL.Image.Image]:
    """Return scikit-image photographs: whole, tall, wide, and with odd sizes, for which crops may differ by a pixel."""
    shapes = ((1, 1), (0.6, 1), (1, 0.45))
    images = []
    for name in CLASS_PHOTOGRAPHS:
        image = load_example_photo(name)
        images += [image.crop((0, 0, int(image.width * x), int(image.height * y))) for x, y in shapes]
        images.append(image.crop((0, 0, image.width - 1, image.height - 7)))
    return images


def is_cropped_beside(image: PIL.Image.Image, side: int = 224) -> bool:
    """Return whether Immich crops one pixel beside open_clip: it rounds half a margin down, open_clip to even."""
    margins = [int(length / min(image.size) * side) - side for length in image.size]
    return any(margin % 4 == 3 for margin in margins)
