"""Recall at 1, 5 and 10 in both directions, against clip-benchmark's own functions on the same embeddings.

    python -m benchmarks.eval_retrieval --output benchmarks/results/eval_retrieval.json
    python -m benchmarks.eval_retrieval --parts large   # 1,000,000 captions x 100,000 images, ours alone; half an hour

Random unit embeddings of width 512, five captions an image. Then the whole way from 64 JPEG files and five
captions of each to the recalls, by the published architecture at full size with random weights: our command beside
clip-benchmark's `evaluate` on open_clip's model of the same weights, in float32, nothing cached. Alternating runs,
medians; our peak memory over the embeddings is taken in a process of its own. JSON is the last line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.encode import caption_of
from common.environment import device_description, package_versions, peak_resident_bytes, restart_peak
from common.files import read_json, write_json
from eval.metrics import RECALL_CUTOFFS, cross_modal_ranks, recall_at_k
from eval.retrieval import RetrievalArguments
from eval.retrieval import evaluate as measure
from examples.openmoji.encoders import load_text_encoder
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.open_clip_mapping import build_open_clip, open_clip_state_dict

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 512
PARTS = ("scores", "end_to_end", "large")
CAPTIONS, TOKENS, SIZE = 5, 20, (500, 375)  # of the whole way: captions an image, their tokens, pixels of an image


def made(images: int, captions_per_image: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image embeddings, text embeddings near their image's, and the image of each text."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, WIDTH, generator=generator), dim=-1)
    image_of_text = torch.arange(images).repeat_interleave(captions_per_image)
    text_embeds = image_embeds[image_of_text]
    text_embeds += 0.3 * torch.randn(text_embeds.shape, generator=generator)  # in place: the largest tensor
    return image_embeds, torch.nn.functional.normalize(text_embeds, dim=-1), image_of_text


def ours(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> dict[str, float]:
    images = torch.arange(len(image_embeds))
    text_to_image, image_to_text = cross_modal_ranks(text_embeds, image_embeds, image_of_text, images)
    recalls = {f"text_to_image@{k}": recall_at_k(text_to_image, k) for k in RECALL_CUTOFFS}
    return recalls | {f"image_to_text@{k}": recall_at_k(image_to_text, k) for k in RECALL_CUTOFFS}


def clip_benchmark(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """What its `zeroshot_retrieval.evaluate` does once all is embedded, by its own functions, batches of 64."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k as theirs

    scores = text_embeds @ image_embeds.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_of_text] = True
    recalls = {}
    for name, s, p in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
        for k in RECALL_CUTOFFS:
            recalls[f"{name}@{k}"] = (batchify(theirs, s, p, 64, "cpu", k=k) > 0).float().mean().item()
    return recalls


def timed(call, *args) -> tuple[float, dict[str, float]]:
    started = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - started, result


def memory_over_embeddings(images: int, captions: int) -> tuple[int, float]:
    """Bytes and seconds of ours in a process of its own: the most it held, less what it held before."""
    flags = ["--images", str(images), "--captions", str(captions), "--worker"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.eval_retrieval", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found["bytes"], found["seconds"]


def worker(images: int, captions: int) -> dict[str, float]:
    sides = made(images, captions)
    ours(*made(64, captions))  # libraries are loaded
    before = restart_peak()  # making the embeddings held more than they are
    seconds, _ = timed(ours, *sides)
    return {"bytes": peak_resident_bytes() - before, "seconds": seconds}


def scores(images: int, captions: int, runs: int) -> dict:
    """Recalls out of embeddings, by both."""
    sides = made(images, captions)
    seconds: dict[str, list[float]] = {"ours": [], "clip_benchmark": []}
    difference = 0.0
    for _ in tqdm(range(runs), desc="Alternating runs", unit="run"):
        first, expected = timed(clip_benchmark, *sides)
        second, found = timed(ours, *sides)
        seconds["clip_benchmark"].append(first)
        seconds["ours"].append(second)
        difference = max(difference, *(abs(found[name] - expected[name]) for name in expected))
    ratios = [theirs / own for theirs, own in zip(seconds["clip_benchmark"], seconds["ours"], strict=True)]
    return {
        "images": images, "captions": images * captions, "width": WIDTH, "runs": runs,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios), "largest_difference_of_a_recall": difference,
        "memory_over_embeddings_bytes": memory_over_embeddings(images, captions)[0],
    }  # fmt: skip


def large(images: int = 100_000, captions: int = 10) -> dict:
    """Ours alone, where all scores would take 400 GB."""
    taken, seconds = memory_over_embeddings(images, captions)
    return {
        "images": images, "captions": images * captions, "seconds": seconds, "memory_over_embeddings_bytes": taken,
        "all_scores_bytes": 4 * images * images * captions,
    }  # fmt: skip


def whole_way(images: int, runs: int) -> dict:
    """Seconds from files to recalls of both programs, the ratio run by run, and how far their recalls are apart."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = made_files(folder, images)
        theirs = clip_benchmark_program(folder, texts)
        arguments = RetrievalArguments(
            str(folder / "model"), str(folder / "data"), folder / "r.json", cache_dir="off", gallery=0
        )
        seconds: dict[str, list[float]] = {"ours": [], "clip_benchmark": []}
        difference = 0.0
        for _ in tqdm(range(runs + 1), desc="End to end", unit="run"):  # the first one warms up
            first, expected = timed(theirs)
            started = time.perf_counter()
            records = measure(arguments)
            own = time.perf_counter() - started
            loading = own - read_json(arguments.output)["seconds"]  # of the model, which the other holds already
            seconds["clip_benchmark"].append(first)
            seconds["ours"].append(own - loading)
            found = {f"{r.direction}@{r.metric[7:]}": r.value for r in records if r.metric.startswith("recall@")}
            difference = max(difference, *(abs(found[key] - value) for key, value in expected.items()))
    ratios = [their / own for their, own in zip(seconds["clip_benchmark"][1:], seconds["ours"][1:], strict=True)]
    return {
        "images": images, "captions": CAPTIONS * images, "tokens": TOKENS, "image_size": SIZE, "precision": "float32",
        "runs": runs, "seconds": {name: statistics.median(values[1:]) for name, values in seconds.items()},
        "ratio": statistics.median(ratios), "largest_difference_of_a_recall": difference,
    }  # fmt: skip


def made_files(folder: Path, images: int) -> list[list[str]]:
    """Write model and data; returns the captions of each image."""
    torch.manual_seed(0)
    tokenizer = load_text_encoder()[1]
    CapivaraModel(CapivaraConfig()).save_pretrained(folder / "model")
    CapivaraProcessor(CapivaraImageProcessor(), tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")  # plain: open_clip repairs texts itself
    noise = np.random.default_rng(0)
    (folder / "data" / "test").mkdir(parents=True)
    texts, lines = [], []
    for number in range(images):
        coarse = noise.integers(0, 256, (SIZE[1] // 20, SIZE[0] // 20, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"data/test/{number}.jpg")
        texts.append([f"{number} {caption_of(TOKENS - 2, tokenizer, number * CAPTIONS + i)}" for i in range(CAPTIONS)])
        lines.append(json.dumps({"file_name": f"{number}.jpg", "captions-pt": texts[-1]}))
    (folder / "data" / "test" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return texts


def clip_benchmark_program(folder: Path, texts: list[list[str]]) -> Callable[[], dict[str, float]]:
    """clip-benchmark's evaluation on open_clip's model of the same weights, with its own preprocessing and loader."""
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate
    from open_clip.tokenizer import HFTokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = CapivaraConfig()
    model = build_open_clip(config).eval()
    model.load_state_dict(open_clip_state_dict(CapivaraModel.from_pretrained(folder / "model")))
    tokenizer = HFTokenizer(str(folder / "tokenizer"))
    preprocess = image_transform_v2(PreprocessCfg(), is_train=False)

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(texts)

        def __getitem__(self, number: int) -> tuple[Tensor, list[str]]:
            return preprocess(Image.open(folder / f"data/test/{number}.jpg")), texts[number]

    def program() -> dict[str, float]:
        collate = lambda rows: (torch.stack([pixels for pixels, _ in rows]), [captions for _, captions in rows])  # noqa: E731
        loader = torch.utils.data.DataLoader(Pictures(), batch_size=32, collate_fn=collate)
        found = evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=list(RECALL_CUTOFFS))
        names = {"image_retrieval_recall": "text_to_image", "text_retrieval_recall": "image_to_text"}
        return {f"{names[key.split('@')[0]]}@{key.split('@')[1]}": value for key, value in found.items()}

    return program


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2], help="what is measured")
    parser.add_argument("--end_to_end_images", type=int, default=64)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="also put the parts into this JSON file, beside those it has")
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(worker(args.images, args.captions)))
        return
    facts = {"device": device_description("cpu"), "versions": package_versions()}
    measure_part = {
        "scores": lambda: scores(args.images, args.captions, args.runs),
        "end_to_end": lambda: whole_way(args.end_to_end_images, args.runs),
        "large": large,
    }
    result = {part: measure_part[part]() | facts for part in args.parts}
    if args.output:
        write_json(args.output, (read_json(args.output) if args.output.is_file() else {}) | result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
