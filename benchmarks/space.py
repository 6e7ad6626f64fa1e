"""How long the page takes to answer a text among 10,000 pictures: the text's embedding, the search, the page's HTML.

    OMP_NUM_THREADS=1 python -m benchmarks.space --output benchmarks/results/space.json

Two models: the demo's, out of its folder, and the full-size published architecture with random weights. The pictures
are points on the sphere, and their thumbnails a few made ones again and again: neither changes what is done with them.
Every question is another text. `wall` is what a visitor waits for the answer, `processor` what it takes of processors
(of all threads together), which other programs on the machine change less; where there are any, several threads would
wait for each other, hence one. The last line of the output is JSON.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from benchmarks.encode import caption_of
from common.environment import device_description, package_versions
from common.files import write_json
from examples.openmoji.encoders import load_text_encoder
from hub_upload.space.answers import Demo
from hub_upload.space.collection import Credit
from hub_upload.space.index import ROWS_PER_SHARD, Album, Index, thumbnail_file
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.embedder import CapivaraEmbedder, load_embedder

DISTINCT_THUMBNAILS = 64


@dataclass
class SpaceBenchmarkArguments:
    model: str = field(default="data/openmoji/base", metadata={"help": "Folder of the demo's model."})
    pictures: int = field(default=10_000, metadata={"help": "Pictures that are searched."})
    shown: int = field(default=12, metadata={"help": "Pictures that an answer shows."})
    questions: int = field(default=50, metadata={"help": "Texts, one after the other."})
    tokens: int = field(default=12, metadata={"help": "Tokens of a text, begin and end included."})
    full_size: bool = field(default=True, metadata={"help": "Measure the full-size architecture as well."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the figures."})


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(SpaceBenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)
    results = {"device": device_description("cpu"), "versions": package_versions(), "milliseconds": {}}
    results |= {name: getattr(args, name) for name in ("pictures", "shown", "questions", "tokens")}
    with tempfile.TemporaryDirectory() as folder:
        album = made_album(Path(folder), args.pictures)
        results["milliseconds"]["demo"] = measured(load_embedder(args.model, "cpu"), album, args, "Demo model")
        if args.full_size:
            results["milliseconds"]["full_size"] = measured(full_size_embedder(), album, args, "Full size")
    if args.output:
        write_json(args.output, results)
    print(json.dumps(results))


def full_size_embedder() -> CapivaraEmbedder:
    """The published architecture with random weights."""
    torch.manual_seed(0)
    processor = CapivaraProcessor(CapivaraImageProcessor(), load_text_encoder()[1])
    return CapivaraEmbedder("full size", CapivaraModel(CapivaraConfig()).eval(), processor, "float32")


def made_album(folder: Path, pictures: int) -> Album:
    """An album of smooth noise."""
    noise = np.random.default_rng(0)
    coarse = noise.integers(0, 256, (DISTINCT_THUMBNAILS, 8, 8, 3), dtype=np.uint8)
    files = [thumbnail_file(PIL.Image.fromarray(pixels).resize((256, 256))) for pixels in coarse]
    for number, start in enumerate(range(0, pictures, ROWS_PER_SHARD)):
        chosen = [files[row % DISTINCT_THUMBNAILS] for row in range(start, min(start + ROWS_PER_SHARD, pictures))]
        tensors = {
            "files": torch.frombuffer(bytearray(b"".join(chosen)), dtype=torch.uint8),
            "ends": torch.tensor([len(file) for file in chosen]).cumsum(0),
        }
        save_file(tensors, folder / f"thumbnails-{number:05d}.safetensors")
    captions = [[f"uma foto com o número {row}"] for row in range(pictures)]
    return Album(folder, captions, [""] * pictures, Credit("noise"), {})


def measured(embedder: CapivaraEmbedder, album: Album, args: SpaceBenchmarkArguments, name: str) -> dict[str, dict]:
    """Milliseconds of each part, and of the whole answer, which checks the text as well."""
    width = embedder.model.config.projection_dim
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(args.pictures, width, generator=generator), dim=-1)
    index = Index(album, embedder, torch.arange(args.pictures), points, points[:0])
    demo, tokenizer = Demo([index]), embedder.processor.tokenizer
    texts = [caption_of(args.tokens, tokenizer, seed) for seed in range(args.questions)]
    demo.search_by_text("aquecimento", args.shown)
    seconds: dict[str, list[tuple[float, float]]] = {"embedding": [], "search": [], "answer": []}
    for text in tqdm(texts, desc=name, unit="question"):
        query = _timed(lambda text=text: index.embed_text(text), seconds["embedding"])
        _timed(lambda query=query: index.search(query, args.shown), seconds["search"])
        _timed(lambda text=text: demo.search_by_text(text, args.shown), seconds["answer"])
    return {what: _summary(values) for what, values in seconds.items()}


def _timed(step: Callable[[], object], seconds: list[tuple[float, float]]) -> object:
    """The result of `step`; its seconds, of the wall clock and of the processor, are appended."""
    wall, processor = time.perf_counter(), time.process_time()
    result = step()
    seconds.append((time.perf_counter() - wall, time.process_time() - processor))
    return result


def _summary(seconds: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    summary = {}
    for name, values in zip(("wall", "processor"), zip(*seconds, strict=True), strict=True):
        milliseconds = [1000 * value for value in values]
        ninth_decile = statistics.quantiles(milliseconds, n=10)[-1]
        summary[name] = {"median": statistics.median(milliseconds), "ninth_decile": ninth_decile}
    return summary


if __name__ == "__main__":
    main()
