"""Images and captions per second, against open_clip on the same weights, processors included.

    python -m benchmarks.encode --output benchmarks/results/encode.json

Both programs hold the full-size published architecture with the same random weights, and get the same PIL images and
the same texts of 20 tokens. Each figure is the median of alternating runs; the last line of the output is JSON.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from common.environment import device_description, package_versions
from common.files import write_json
from examples.openmoji.encoders import load_text_encoder
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from modeling_capivara.open_clip_mapping import build_open_clip, capivara_state_dict

WORDS = ["uma", "foto", "de", "um", "gato", "preto", "na", "mesa", "da", "casa", "azul", "com", "flores", "amarelas"]
IMAGE_SIZE = (320, 240)  # pixels, width and height


@dataclass
class EncodeArguments:
    images: int = field(default=32, metadata={"help": "Images of one run."})
    captions: int = field(default=64, metadata={"help": "Captions of one run."})
    tokens: int = field(default=20, metadata={"help": "Tokens of a caption, begin and end included."})
    runs: int = field(default=5, metadata={"help": "Runs of each program, alternating."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for the figures."})


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(EncodeArguments, description=__doc__).parse_args_into_dataclasses(argv)
    torch.manual_seed(0)
    config = CapivaraConfig()
    theirs = build_open_clip(config).eval().to(args.device)
    ours = CapivaraModel(config)
    ours.load_state_dict(capivara_state_dict(theirs.state_dict(), config))
    ours.eval().to(args.device)
    tokenizer = load_text_encoder()[1]
    steps = encoders(ours, theirs, tokenizer, args)
    results = {"device": device_description(args.device), "versions": package_versions(), "measured": {}}
    results |= {
        "runs": args.runs,
        "images": args.images,
        "image_size": IMAGE_SIZE,
        "captions": args.captions,
        "tokens": args.tokens,
    }
    for precision in ("float32", "bfloat16"):
        for what, number in (("images", args.images), ("captions", args.captions)):
            name = f"{what}_{precision}"
            results["measured"][name] = compare(*steps[what], number, precision, args.runs, args.device, name)
    if args.output:
        write_json(args.output, results)
    print(json.dumps(results))


def encoders(ours: CapivaraModel, theirs: torch.nn.Module, tokenizer, args: EncodeArguments) -> dict[str, tuple]:
    """What is timed: images, captions -> (ours, open_clip's), each from raw input to unit-length embeddings."""
    processor = CapivaraProcessor(CapivaraImageProcessor(), tokenizer)
    preprocess = image_transform_v2(PreprocessCfg(), is_train=False)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        tokenize = HFTokenizer(folder)
    noise = np.random.default_rng(0)
    shape = (args.images, IMAGE_SIZE[1], IMAGE_SIZE[0], 3)
    images = [Image.fromarray(pixels) for pixels in noise.integers(0, 256, shape, dtype=np.uint8)]
    texts = [caption_of(args.tokens, tokenizer, seed) for seed in range(args.captions)]

    def their_images():
        pixels = torch.stack([preprocess(image) for image in images]).to(args.device)
        return theirs.encode_image(pixels, normalize=True)

    def our_captions():
        return ours(**processor(text=texts, return_tensors="pt").to(args.device)).text_embeds

    def their_captions():
        return theirs.encode_text(tokenize(texts).to(args.device), normalize=True)

    def our_images():
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(args.device)
        return ours(pixel_values=pixel_values).image_embeds

    return {"images": (our_images, their_images), "captions": (our_captions, their_captions)}


def compare(ours: Callable, theirs: Callable, number: int, precision: str, runs: int, device: str, name: str) -> dict:
    """Rates of both in alternating runs, and the median of the ratios run by run.

    Returns:
        Items per second (median, slowest, fastest) of both, `ratio` of ours to theirs, and the largest difference of
        the embeddings.
    """
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    with torch.inference_mode(), autocast:
        difference = (ours().float() - theirs().float()).abs().max().item()  # and the warm-up of both
        seconds = {"ours": [], "open_clip": []}
        for _ in tqdm(range(runs), desc=name, unit="run"):
            for who, step in (("ours", ours), ("open_clip", theirs)):
                seconds[who].append(seconds_of(step, device))
    rates = {who: [number / s for s in measured] for who, measured in seconds.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["open_clip"], strict=True)]
    summary = {who: {"median": statistics.median(r), "slowest": min(r), "fastest": max(r)} for who, r in rates.items()}
    return {**summary, "unit": "per second", "ratio": statistics.median(ratios), "largest_difference": difference}


def seconds_of(step: Callable, device: str) -> float:
    """Wall-clock seconds of one call, the device's queue drained before and after."""
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    started = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - started


def caption_of(tokens: int, tokenizer, seed: int) -> str:
    """A Portuguese text of exactly `tokens` tokens, begin and end included."""
    words = [WORDS[i] for i in np.random.default_rng(seed).integers(0, len(WORDS), tokens)]
    while len(tokenizer(" ".join(words))["input_ids"]) > tokens:
        words.pop()
    while len(tokenizer(" ".join(words))["input_ids"]) < tokens:
        words.append("de")
    return " ".join(words)


if __name__ == "__main__":
    main()
