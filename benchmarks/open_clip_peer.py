"""Pairs per second and peak memory of open_clip's own trainer, on CAPIVARA's task: the image tower locked.

    python -m benchmarks.open_clip_peer --pairs 16 --peer_micro 8 --precision no --steps 2

`open_clip_train.train.train_one_epoch` runs as installed, at the full published size with random weights, with
`--lock-image --grad-checkpointing --accum-freq`; every caption is padded to 77 tokens, as open_clip's tokenizer does.
Memory is that of the whole process, so each measurement wants a process of its own. The output is one line of JSON.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip import create_loss
from open_clip.tokenizer import HFTokenizer
from open_clip_train.data import DataInfo
from open_clip_train.distributed import init_distributed_device
from open_clip_train.main import random_seed
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn

from benchmarks.captions_pt import benchmark_captions
from benchmarks.timing import finish, peak_memory_bytes
from capivara_common.cli import flag, parse, run_command
from capivara_search.miniature_encoders import load_tokenizer
from modeling_capivara import CapivaraConfig
from modeling_capivara.convert_open_clip import build_open_clip

MODEL = "xlm-roberta-base-ViT-B-32"  # open_clip's name of CAPIVARA's architecture
IMAGE_SIZE = 224  # pixels a side
WARMUP_STEPS = 1  # untimed: the optimiser makes its state in the first step
PRECISIONS = {"no": "fp32", "bf16": "amp_bfloat16"}  # Accelerate's names -> open_clip's


@dataclass
class PeerArguments:
    """Arguments of `benchmarks.open_clip_peer`; `benchmarks.train_step` checks them."""

    pairs: int = flag(96, "Pairs of one step, a multiple of peer_micro.")
    peer_micro: int = flag(48, "Pairs of a micro-batch: open_clip's --batch-size; pairs / it is its --accum-freq.")
    precision: Literal["no", "bf16"] = flag("no", "open_clip's --precision: fp32 or amp_bfloat16.")
    steps: int = flag(1, "Timed optimiser steps, after one untimed.")
    tokens: int = flag(20, "Mean length of the captions before they are padded to 77.")


class InMemoryBatches:
    """Micro-batches of one batch, again at every step, as `train_one_epoch` reads them.

    The trainer asks for the first micro-batch of a step when it is done with the step before, and once more after the
    last step: so the differences of `started` are whole steps, optimiser included.
    """

    def __init__(self, pixels: Tensor, tokens: Tensor, micro: int, steps: int) -> None:
        self.batches = list(zip(pixels.split(micro), tokens.split(micro), strict=True))
        self.num_batches = steps * len(self.batches)
        self.num_samples = self.num_batches * micro
        self.started: list[float] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.num_batches // len(self.batches)):
            self.started.append(time.perf_counter())
            yield from self.batches
        self.started.append(time.perf_counter())

    def step_seconds(self) -> list[float]:
        """Seconds of each timed step."""
        seconds = [end - start for start, end in zip(self.started, self.started[1:], strict=False)]
        return seconds[WARMUP_STEPS:]


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    finish(measure(parse(PeerArguments, __doc__, argv)))


def measure(args: PeerArguments) -> dict[str, Any]:
    """One run of open_clip's trainer.

    Returns:
        `pairs_per_second` (median over the timed steps), `step_s` (each of them), `peak_memory_bytes` (resident, of the
        process), the same before the first step (if it is no lower, it hides the training's), and the sizes.
    """
    tokens = caption_tokens(args)
    pixels = torch.randn(len(tokens), 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    theirs = open_clip_arguments(args)
    model = open_clip_model(theirs)
    optimizer = open_clip_optimizer(model, theirs)
    batches = InMemoryBatches(pixels, tokens, args.peer_micro, WARMUP_STEPS + args.steps)
    scheduler = cosine_lr(optimizer, theirs.lr, theirs.warmup, WARMUP_STEPS + args.steps)
    setup_peak = peak_memory_bytes()
    train_one_epoch(
        model, {"train": DataInfo(batches)}, create_loss(theirs), 0, optimizer, None, scheduler, None, theirs
    )
    seconds = batches.step_seconds()
    return {
        "padded_tokens": tokens.shape[1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "pairs_per_second": len(tokens) / statistics.median(seconds),
        "step_s": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "setup_peak_memory_bytes": setup_peak,
    }


def caption_tokens(args: PeerArguments) -> Tensor:
    """Captions as open_clip's tokenizer hands them over, (pairs, 77)."""
    tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return HFTokenizer(folder)(benchmark_captions(args.pairs, tokenizer, args.tokens))


def open_clip_arguments(args: PeerArguments) -> Any:
    """open_clip's arguments by its own parser, with what its `main` adds to them."""
    flags = f"--model {MODEL} --lock-image --grad-checkpointing --device cpu --dataset-type synthetic --epochs 1"
    sizes = f"--batch-size {args.peer_micro} --accum-freq {args.pairs // args.peer_micro}"
    flags += f" {sizes} --precision {PRECISIONS[args.precision]}"
    theirs = parse_args(flags.split())
    init_distributed_device(theirs)  # one process
    theirs.distill = theirs.wandb = False
    return theirs


def open_clip_model(theirs: Any) -> nn.Module:
    """The model as open_clip's `main` makes it; only the text tower's configuration comes from here, not the Hub."""
    random_seed(theirs.seed, theirs.rank)
    model = build_open_clip(CapivaraConfig())  # its weights stay float32 under amp_bfloat16, as open_clip's do
    model.output_dict = True
    model.lock_image_tower(
        unlocked_groups=theirs.lock_image_unlocked_groups, freeze_bn_stats=theirs.lock_image_freeze_bn_stats
    )
    model.set_grad_checkpointing()
    return model


def open_clip_optimizer(model: nn.Module, theirs: Any) -> torch.optim.AdamW:
    """AdamW as in open_clip 3.3's `main`, which holds these lines in its midst and so cannot be called for them."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gain_or_bias = {n for n, p in trained if p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias", "logit_scale"))}
    groups = [
        {"params": [p for n, p in trained if n in gain_or_bias], "weight_decay": 0.0},
        {"params": [p for n, p in trained if n not in gain_or_bias], "weight_decay": theirs.wd},
    ]
    return torch.optim.AdamW(groups, lr=theirs.lr, betas=(theirs.beta1, theirs.beta2), eps=theirs.eps)


if __name__ == "__main__":
    run_command(main)
