"""Recall at 1, 5 and 10 in both directions, against clip-benchmark's own functions on the same embeddings.

    python -m benchmarks.eval_retrieval --output benchmarks/results/eval_retrieval.json
    python -m benchmarks.eval_retrieval --parts large   # 1,000,000 captions x 100,000 images, ours alone; half an hour

Random unit embeddings of width 512, five captions an image. Then the whole way from 64 JPEG files and five
captions of each to the recalls, by the published architecture at full size with random weights: our command beside
clip-benchmark's `evaluate` on open_clip's model of the same weights, in float32, nothing cached. Alternating runs,
medians; our peak memory over the embeddings is taken in a process of its own. JSON is the last line.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.captions_pt import caption_of
from benchmarks.loading import SIZE, photos
from benchmarks.timing import alternating, conditions, finish, in_own_process, median_ratio
from common.cli import flag, parse
from common.environment import peak_resident_bytes, restart_peak
from common.files import read_json
from eval.metrics import RECALL_CUTOFFS, cross_modal_ranks, recall_at_k
from eval.retrieval import RetrievalArguments, evaluate
from examples.openmoji.encoders import load_text_encoder
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.open_clip_mapping import build_open_clip, open_clip_state_dict

WIDTH = 512
PARTS = ("scores", "end_to_end", "large")
CAPTIONS, TOKENS = 5, 20  # of end_to_end: captions an image, and their tokens
Recalls = dict[str, float]  # such as "text_to_image@5" -> share from 0 to 1
Program = Callable[[int], tuple[float, Recalls]]  # number of the run -> seconds and recalls


@dataclass
class EvalRetrievalArguments:
    """Arguments of `benchmarks.eval_retrieval`."""

    images: int = flag(5000, "Images of the scores.")
    captions: int = flag(5, "Captions of each.")
    runs: int = flag(5, "Alternating runs.")
    parts: list[str] = flag(list(PARTS[:2]), f"Of {', '.join(PARTS)}.")
    end_to_end_images: int = flag(64, "Images of end_to_end.")
    worker: bool = flag(False, "Measure our memory, in this process.")
    output: Path | None = flag(None, "JSON file to put the parts into, beside those that it has.")

    def __post_init__(self) -> None:
        if not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts must be of {', '.join(PARTS)}, got {self.parts}.")


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(EvalRetrievalArguments, __doc__, argv)
    if args.worker:
        finish(measure_memory(args.images, args.captions))
        return
    measure = {
        "scores": lambda: compare_scores(args.images, args.captions, args.runs),
        "end_to_end": lambda: compare_end_to_end(args.end_to_end_images, args.runs),
        "large": measure_large,
    }
    kept = read_json(args.output) if args.output and args.output.is_file() else {}
    finish(kept | {part: measure[part]() | conditions() for part in args.parts}, args.output)


def random_embeddings(images: int, captions_per_image: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image embeddings, text embeddings near their image's, and the image of each text."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, WIDTH, generator=generator), dim=-1)
    image_of_text = torch.arange(images).repeat_interleave(captions_per_image)
    text_embeds = image_embeds[image_of_text]
    text_embeds += 0.3 * torch.randn(text_embeds.shape, generator=generator)  # in place: the largest tensor
    return image_embeds, torch.nn.functional.normalize(text_embeds, dim=-1), image_of_text


def our_recalls(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> Recalls:
    """Our recalls of the same embeddings."""
    images = torch.arange(len(image_embeds))
    text_to_image, image_to_text = cross_modal_ranks(text_embeds, image_embeds, image_of_text, images)
    recalls = {f"text_to_image@{k}": recall_at_k(text_to_image, k) for k in RECALL_CUTOFFS}
    return recalls | {f"image_to_text@{k}": recall_at_k(image_to_text, k) for k in RECALL_CUTOFFS}


def their_recalls(image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor) -> Recalls:
    """What clip-benchmark's `zeroshot_retrieval.evaluate` does once all is embedded, by its own functions."""
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


def compare(ours: Program, theirs: Program, runs: int) -> dict[str, Any]:
    """Median seconds of both after a warm-up, the ratio run by run, and how far their recalls are apart."""
    results = alternating({"clip_benchmark": theirs, "ours": ours}, runs, "Alternating runs", warmup=1)
    seconds = {name: [taken for taken, _ in found] for name, found in results.items()}
    pairs = zip(results["ours"], results["clip_benchmark"], strict=True)
    return {
        "runs": runs,
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "ratio": median_ratio(seconds["clip_benchmark"], seconds["ours"]),
        "largest_difference_of_a_recall": max(
            abs(found[name] - expected[name]) for (_, found), (_, expected) in pairs for name in expected
        ),
    }


def timed(call: Callable[..., Recalls], *args: Any) -> tuple[float, Recalls]:
    """Seconds of a call, and its recalls."""
    started = time.perf_counter()
    recalls = call(*args)
    return time.perf_counter() - started, recalls


# ---- scores of embeddings ----


def compare_scores(images: int, captions: int, runs: int) -> dict[str, Any]:
    """Recalls out of embeddings, by both."""
    sides = random_embeddings(images, captions)
    memory = in_own_process(memory_command(images, captions))["bytes"]
    sizes = {"images": images, "captions": images * captions, "width": WIDTH, "memory_over_embeddings_bytes": memory}
    return sizes | compare(lambda run: timed(our_recalls, *sides), lambda run: timed(their_recalls, *sides), runs)


def measure_large(images: int = 100_000, captions: int = 10) -> dict[str, Any]:
    """Ours alone, where all scores would take 400 GB."""
    found = in_own_process(memory_command(images, captions))
    return {
        "images": images, "captions": images * captions, "seconds": found["seconds"],
        "memory_over_embeddings_bytes": found["bytes"], "all_scores_bytes": 4 * images * images * captions,
    }  # fmt: skip


def memory_command(images: int, captions: int) -> list[str]:
    """Module and flags of `measure_memory`."""
    return ["benchmarks.eval_retrieval", "--images", str(images), "--captions", str(captions), "--worker"]


def measure_memory(images: int, captions: int) -> dict[str, float]:
    """Bytes and seconds of ours: the most this process holds, less what it held before."""
    sides = random_embeddings(images, captions)
    our_recalls(*random_embeddings(64, captions))  # libraries are loaded
    before = restart_peak()  # making the embeddings held more than they are
    seconds, _ = timed(our_recalls, *sides)
    return {"bytes": peak_resident_bytes() - before, "seconds": seconds}


# ---- from files to recalls ----


def compare_end_to_end(images: int, runs: int) -> dict[str, Any]:
    """Our command beside clip-benchmark's evaluation, from files to recalls."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_model_and_data(folder, images)
        arguments = RetrievalArguments(
            str(folder / "model"), str(folder / "data"), folder / "r.json", cache_dir="off", gallery=0
        )

        def ours(run: int) -> tuple[float, Recalls]:
            """The seconds are the command's own: without the loading of the model, which the other holds already."""
            records = evaluate(arguments)
            recalls = {f"{r.direction}@{r.metric[7:]}": r.value for r in records if r.metric.startswith("recall@")}
            return read_json(arguments.output)["seconds"], recalls

        theirs = clip_benchmark_program(folder, texts)
        found = compare(ours, lambda run: timed(theirs), runs)
    sizes = {"images": images, "captions": CAPTIONS * images, "tokens": TOKENS, "image_size": SIZE}
    return sizes | {"precision": "float32"} | found


def write_model_and_data(folder: Path, images: int) -> list[list[str]]:
    """Write `model`, `tokenizer` and `data` into the folder; returns the captions of each image."""
    torch.manual_seed(0)
    tokenizer = load_text_encoder()[1]
    CapivaraModel(CapivaraConfig()).save_pretrained(folder / "model")
    CapivaraProcessor(CapivaraImageProcessor(), tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")  # plain: open_clip repairs texts itself
    data = folder / "data" / "test"
    data.mkdir(parents=True)
    texts, lines = [], []
    for number, photo in enumerate(photos(images)):
        (data / f"{number}.jpg").write_bytes(photo)
        seeds = range(number * CAPTIONS, (number + 1) * CAPTIONS)
        texts.append([f"{number} {caption_of(TOKENS - 2, tokenizer, seed)}" for seed in seeds])
        lines.append(json.dumps({"file_name": f"{number}.jpg", "captions-pt": texts[-1]}))
    (data / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return texts


def clip_benchmark_program(folder: Path, texts: list[list[str]]) -> Callable[[], Recalls]:
    """clip-benchmark's evaluation on open_clip's model of the same weights, with its own preprocessing and loader."""
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate as evaluate_theirs
    from open_clip.tokenizer import HFTokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = build_open_clip(CapivaraConfig()).eval()
    model.load_state_dict(open_clip_state_dict(CapivaraModel.from_pretrained(folder / "model")))
    tokenizer, preprocess = HFTokenizer(str(folder / "tokenizer")), image_transform_v2(PreprocessCfg(), is_train=False)
    names = {"image_retrieval_recall": "text_to_image", "text_retrieval_recall": "image_to_text"}

    def collate(numbers: list[int]) -> tuple[Tensor, list[list[str]]]:
        images = [Image.open(folder / f"data/test/{number}.jpg") for number in numbers]
        return torch.stack([preprocess(image) for image in images]), [texts[number] for number in numbers]

    def program() -> Recalls:
        loader = torch.utils.data.DataLoader(range(len(texts)), batch_size=32, collate_fn=collate)
        found = evaluate_theirs(model, loader, tokenizer, "cpu", amp=False, recall_k_list=list(RECALL_CUTOFFS))
        return {f"{names[key.split('@')[0]]}@{key.split('@')[1]}": value for key, value in found.items()}

    return program


if __name__ == "__main__":
    main()
