"""What Immich makes of an exported folder, beside the model: read by the layout as published, or by its own service.

    python -m benchmarks.immich_service --output benchmarks/results/immich.json
    MACHINE_LEARNING_CACHE_FOLDER=runs/immich python -m immich_ml   # in Immich's machine-learning/, on port 3003
    python -m benchmarks.immich_service --url http://127.0.0.1:3003 --service_version 2.5.6 --output OTHER.json

The model, and its export as clip/NAME, are made in `--work` where they are not there. `full` is the published
architecture with random weights and the real vocabulary: its texts show what the graph loses, its pictures little,
since random weights see them all alike. `miniature` has real encoders, for the pictures. Texts are Portuguese captions,
and some odd ones; pictures the photographs of scikit-image, each whole, high, wide and by an odd pixel less.
"""

import io
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import PIL.Image
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from benchmarks.captions_pt import benchmark_captions
from benchmarks.timing import conditions, finish, save_random_model
from capivara_common.cli import flag, parse, run_command
from capivara_search.miniature import miniature_folder
from examples.real_images import PHOTOS, photo
from hub_upload.export import ExportArguments, export_alone
from hub_upload.formats.immich import BASE_NAME
from modeling_capivara.loading import load_model, load_processor
from modeling_capivara.two_towers import embed_images, embed_texts

FILES = ("config.json", "textual/model.onnx", "textual/tokenizer.json", "visual/model.onnx")
# Each with what it is about.
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


@dataclass
class ImmichArguments:
    """Arguments of `benchmarks.immich_service`."""

    model: Literal["full", "miniature"] = flag("full", "Model that is exported.")
    work: Path = flag(Path("runs/immich"), "Folder of the model and its export; the model cache of Immich.")
    url: str | None = flag(None, "Of a service of Immich that has `work` as its cache; the layout is read without it.")
    service_version: str | None = flag(None, "Its version, for the record.")
    sentences: int = flag(200, "Portuguese captions.")
    pictures: int = flag(4 * len(PHOTOS), "Pictures.")
    output: Path | None = flag(None, "JSON file of the results.")


class Reader(Protocol):
    """What gives the embeddings that Immich keeps and searches by, (width,) each."""

    def text(self, text: str) -> np.ndarray:
        """Of a text that is searched for."""
        ...

    def picture(self, image: PIL.Image.Image) -> np.ndarray:
        """Of a picture."""
        ...


class LayoutReader:
    """Written from the published layout of a model of open_clip's kind, with none of this project's code."""

    def __init__(self, folder: Path):
        import onnxruntime

        read = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))  # noqa: E731
        open_graph = partial(onnxruntime.InferenceSession, providers=["CPUExecutionProvider"])
        length, pad = read("config.json")["text_cfg"].get("context_length", 77), read("textual/tokenizer_config.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
        token = pad["pad_token"]
        self.tokenizer.enable_padding(length=length, pad_token=token, pad_id=self.tokenizer.token_to_id(token))
        self.tokenizer.enable_truncation(max_length=length)
        self.textual, self.visual = (open_graph(folder / name / "model.onnx") for name in ("textual", "visual"))
        self.settings = read("visual/preprocess_cfg.json")

    def ids(self, text: str) -> list[int]:
        """Token ids, always as many."""
        return self.tokenizer.encode(" ".join(text.split())).ids

    def text(self, text: str) -> np.ndarray:
        """See `Reader`."""
        return self.textual.run(None, {"text": np.array([self.ids(text)], dtype=np.int32)})[0][0]

    def picture(self, image: PIL.Image.Image) -> np.ndarray:
        """See `Reader`."""
        size = self.settings["size"]
        side = size[0] if isinstance(size, list) else size
        image = image.convert("RGB")
        shape = [int(length / min(image.size) * side) for length in image.size]
        shape[image.width >= image.height] = side  # the shorter one, whatever the quotient is rounded to
        image = image.resize(shape, PIL.Image.Resampling[self.settings["interpolation"].upper()])
        left, top = (int(length / 2 - side / 2) for length in shape)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
        pixels = (pixels - np.float32(self.settings["mean"])) / np.float32(self.settings["std"])
        return self.visual.run(None, {"image": pixels.transpose(2, 0, 1)[None]})[0][0]


class ServiceReader:
    """Immich's own service, by the request that its server sends."""

    def __init__(self, url: str):
        import httpx

        self.client = httpx.Client(base_url=url, timeout=300)

    def text(self, text: str) -> np.ndarray:
        """See `Reader`."""
        return self._predict("textual", data={"text": text})

    def picture(self, image: PIL.Image.Image) -> np.ndarray:
        """See `Reader`."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._predict("visual", files={"image": ("image.png", buffer.getvalue())})

    def _predict(self, kind: str, data: dict | None = None, files: dict | None = None) -> np.ndarray:
        entries = json.dumps({"clip": {kind: {"modelName": BASE_NAME, "options": {}}}})
        answer = self.client.post("/predict", data={"entries": entries, **(data or {})}, files=files)
        answer.raise_for_status()
        return np.array(json.loads(answer.json()["clip"]), dtype=np.float32)


def pictures() -> list[PIL.Image.Image]:
    """Photographs of scikit-image, each whole, high, wide, and by an odd pixel less: where crops may fall apart."""
    shapes = ((1, 1), (0.6, 1), (1, 0.45))
    found = []
    for name in PHOTOS:
        image = photo(name)
        found += [image.crop((0, 0, int(image.width * x), int(image.height * y))) for x, y in shapes]
        found.append(image.crop((0, 0, image.width - 1, image.height - 7)))
    return found


def is_cropped_beside(image: PIL.Image.Image, side: int = 224) -> bool:
    """Whether Immich crops a pixel beside open_clip: it rounds half the margin down, open_clip to the even number."""
    margins = [int(length / min(image.size) * side) - side for length in image.size]
    return any(margin % 4 == 3 for margin in margins)


def make_export(args: ImmichArguments) -> tuple[Path, Path]:
    """Folders of the model and of its export, made where they are not there."""
    if args.model == "miniature":
        source = miniature_folder()
    else:
        source = args.work / "model"
        save_random_model(source)
    folder = args.work / "clip" / BASE_NAME
    if not folder.exists():
        export_alone(ExportArguments(source, folder, formats="immich"))
    return source, folder


def measure(args: ImmichArguments) -> dict[str, Any]:
    """All figures of one reader."""
    source, folder = make_export(args)
    model, processor = load_model(source).eval(), load_processor(source)
    layout = LayoutReader(folder)
    reader: Reader = ServiceReader(args.url) if args.url else layout
    texts = benchmark_captions(args.sentences, processor.tokenizer)
    images = pictures()[: args.pictures]
    ours = embed_texts(model, processor, [*texts, *ODD_TEXTS.values()]).numpy()
    seen = embed_images(model, processor, images).numpy()
    theirs, text_s = _timed(reader.text, [*texts, *ODD_TEXTS.values()], "Texts")
    shown, picture_s = _timed(reader.picture, images, "Pictures")
    ids = processor.tokenizer([*texts, *ODD_TEXTS.values()], padding="max_length")["input_ids"]
    equal = [layout.ids(text) == own for text, own in zip([*texts, *ODD_TEXTS.values()], ids, strict=True)]
    odd = (ours[len(texts) :] * theirs[len(texts) :]).sum(axis=1)
    cosines = (seen * shown).sum(axis=1)
    beside = np.array([is_cropped_beside(image) for image in images])
    return {
        "model": args.model,
        "reader": "service" if args.url else "layout",
        "service_version": args.service_version,
        "texts": {
            "number": len(texts),
            "equal_ids": sum(equal[: len(texts)]),
            "largest_difference": float(np.abs(ours - theirs)[: len(texts)].max()),
            "mean_cosine_of_two": _mean_cosine(ours),
            "seconds": text_s,
        },
        "odd_texts": {
            name: {"equal_ids": same, "cosine": float(cosine)}
            for name, same, cosine in zip(ODD_TEXTS, equal[len(texts) :], odd, strict=True)
        },
        "pictures": {
            "number": len(images),
            "lowest_cosine": float(cosines[~beside].min(initial=1)),
            "cropped_beside": int(beside.sum()),
            "lowest_cosine_beside": float(cosines[beside].min(initial=1)),
            "mean_cosine_beside": float(cosines[beside].mean()) if beside.any() else None,
            "mean_cosine_of_two": _mean_cosine(seen),
            "seconds": picture_s,
        },
        "bytes": {name: (folder / name).stat().st_size for name in FILES},
        **conditions(),
    }


def _timed(embed: Any, items: list, title: str) -> tuple[np.ndarray, float]:
    """Embeddings (items, width), and the median of the seconds of one."""
    rows, seconds = [], []
    for item in tqdm(items, desc=title):
        started = time.perf_counter()
        rows.append(embed(item))
        seconds.append(time.perf_counter() - started)
    return np.stack(rows), float(np.median(seconds))


def _mean_cosine(rows: np.ndarray) -> float:
    """Of two different ones: how much a difference means."""
    cosines = rows @ rows.T
    return float((cosines.sum() - np.trace(cosines)) / (len(rows) * (len(rows) - 1)))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(ImmichArguments, __doc__, argv)
    finish(measure(args), args.output)


if __name__ == "__main__":
    run_command(main)
