"""Pairs per second and peak memory of a training step, against open_clip's own trainer, at full size.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --device cuda
    python -m benchmarks.train_step --worker ours --cache on --precision bf16 --pairs 64 --micro 32 --steps 1

Random weights, the real tokenizer, captions of 20 tokens, dropout on, the image tower frozen; whole steps, optimiser
included, after an untimed one. Every measurement is a process of its own, so that its peak memory is its own; programs
alternate, and a figure is the median of the runs. Measured are

- `open_clip`: `open_clip_train` with `--lock-image --grad-checkpointing --accum-freq` (benchmarks/open_clip_peer.py),
- `no_cache`: our engine, the images through the frozen tower at every step, from pixels in memory as open_clip's are,
- `cache`: our engine on embeddings of the images that were computed before,
- `cache_recomputed`: the same, no graph kept, as where a batch of 2816 does not fit.

All get the same batch; micro-batches are each program's own, and in the results. open_clip needs two of them at least:
with one there is no accumulation, and no batch of 2816. Its cost per pair does not depend on their number beyond that.

The share of the matmul peak is that of `benchmarks/flop.py`. The last line of the output is JSON.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.captions_pt import benchmark_captions
from benchmarks.flop import matmul_peak, our_flop, peer_flop
from common.cli import at_least, flag, parse
from examples.openmoji.encoders import load_text_encoder
from modeling_capivara import CapivaraConfig, CapivaraImageProcessor, CapivaraModel, CapivaraProcessor
from training.arguments import RunArguments
from training.optimiser import build_optimizer, clamp_logit_scale, learning_rate_at
from training.step import (
    ExactStep,
    MicroBatch,
    micro_batches,
    padding_share,
    resolve_precision,
    sparse_embedding_gradients,
)
from training.trainable import set_training_mode
from training.views import embed_pixels

PRECISIONS = {"no": "float32", "bf16": "bfloat16"}  # Accelerate's names -> those of the results
PEER = "open_clip"
PROGRAMS = {  # name -> flags of our worker; None is open_clip's
    PEER: None,
    "no_cache": ("--cache", "off", "--accumulation", "auto"),
    "cache": ("--cache", "on", "--accumulation", "auto"),
    "cache_recomputed": ("--cache", "on", "--accumulation", "recompute"),
}
TITLES = {
    PEER: "open_clip's trainer",
    "no_cache": "ours, no cache",
    "cache": "ours, cache",
    "cache_recomputed": "ours, cache, no graph kept",
}
RECIPE_PAIRS, RECIPE_MICRO, RECIPE_STEPS = 2816, 64, 5863  # CAPIVARA, arXiv 2310.13683, appendix


@dataclass
class TrainStepArguments:
    """Arguments of `benchmarks.train_step`."""

    pairs: int = flag(96, "Pairs of one step, for all programs.")
    micro: int = flag(16, "Our micro-batch, pairs; the recipe's step has 64.")
    peer_micro: int = flag(48, "open_clip's --batch-size; pairs / it is its --accum-freq.")
    runs: int = flag(5, "Runs of each program, timing.alternating.")
    steps: int = flag(1, "Timed steps of a run.")
    warmup: int = flag(1, "Untimed steps before them; ours alone, open_clip has 1.")
    tokens: int = flag(20, "Mean tokens of a caption, begin and end included.")
    device: str = flag("cpu", "cpu or cuda; on cuda open_clip is left out.")
    recipe: bool = flag(True, "Also one step of the recipe's 2816 pairs.")
    output: Path = flag(timing.RESULTS / "train_step.json", "JSON file.")
    plot: Path = flag(timing.ROOT / "docs/train_step.png", "PNG file.")
    worker: Literal["ours"] | None = flag(None, "Measure once, in this process.")
    cache: Literal["on", "off"] = flag("on", "Image embeddings (worker).")
    precision: Literal["no", "bf16"] = flag("no", "Autocast (worker).")
    accumulation: Literal["auto", "keep", "recompute"] = flag("auto", "Graphs (worker).")

    def __post_init__(self) -> None:
        at_least(self, 1, "micro", "peer_micro", "runs", "steps")
        if not self.worker and self.device == "cpu" and (self.pairs % self.peer_micro or self.pairs <= self.peer_micro):
            raise ValueError(
                f"pairs must be a multiple of peer_micro, {self.peer_micro}, and at least twice as many, lest "
                f"open_clip not accumulate; got {self.pairs}."
            )


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(TrainStepArguments, __doc__, argv)
    if args.worker:
        timing.finish(measure_ours(args))
        return
    from benchmarks.plots import plot_train_step  # here: the workers' memory shall not hold matplotlib

    results = compare(args)
    plot_train_step(results, TITLES, args.plot)
    print(train_step_table(results))
    timing.finish(results, args.output)


# ---- one measurement of ours ----


@dataclass
class Batch:
    """What one step trains on; either the pixels or the image embeddings are None."""

    texts: list[MicroBatch]
    pairs: int  # captions of all micro-batches
    pixels: Tensor | None  # (pairs, 3, height, width), in the order of the texts
    image_embeds: Tensor | None  # (pairs, width), unit length, as out of a cache

    @property
    def tokens(self) -> int:
        """That go through the text tower, padding included."""
        return sum(batch.input_ids.numel() for batch in self.texts)


class Engine:
    """The parts of `training.loop.Trainer` that make a step, on random weights; the loop around them is left out."""

    def __init__(self, config: CapivaraConfig, args: TrainStepArguments) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.precision)
        self.model = CapivaraModel(config).to(self.accelerator.device)
        self.model.freeze_image_tower()
        self.args = RunArguments(
            model="random weights", dataset=["random pixels"], effective_batch_size=args.pairs, max_steps=RECIPE_STEPS,
            micro_batch_size=args.micro, accumulation=args.accumulation, mixed_precision=args.precision,
        )  # fmt: skip
        self.prepared = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # autocast; see ExactStep
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(self.model, self.args))
        self.step = ExactStep(
            self.prepared, self.model.logit_scale, self.accelerator, self.args.seed, args.accumulation
        )

    def __call__(self, number: int, batch: Batch) -> dict[str, float]:
        """One step; its seconds, those of the optimiser among them, the graphs it kept and its loss."""
        started = self._now()
        image_embeds = self._image_embeds(batch)
        set_training_mode(self.model)
        embedded = self._now()
        self.optimizer.zero_grad(set_to_none=False)
        cleared = self._now()
        report = self.step(number, batch.texts, batch.pairs, image_embeds)
        graded = self._now()
        self._update(number)
        ended = self._now()
        optimiser_s = (cleared - embedded) + (ended - graded)
        times = {"step_s": ended - started, "optimiser_s": optimiser_s}
        return times | {"graphs_kept": report.graphs_kept, "loss": report.loss}

    def _image_embeds(self, batch: Batch) -> Tensor:
        if batch.pixels is None:
            return batch.image_embeds.to(self.accelerator.device)
        self.model.vision_model.eval()
        parts = batch.pixels.split(self.args.embedding_batch_size)
        embeds = torch.cat([embed_pixels(self.prepared, pixels, self.accelerator) for pixels in parts])
        return embeds.to(self.accelerator.device)

    def _update(self, number: int) -> None:
        """As `Trainer._update`, the gradient's norm included."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(number, self.args)
        torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()
        self.optimizer.step()
        clamp_logit_scale(self.model.logit_scale)

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def random_batch(
    config: CapivaraConfig, processor: CapivaraProcessor, captions: list[str], micro: int, cached: bool
) -> Batch:
    """Captions with random pixels, or with random embeddings as a cache would hold them."""
    texts, _ = micro_batches(processor, captions, micro)
    size, number = config.vision_config.image_size, len(captions)
    shape = (number, config.projection_dim) if cached else (number, 3, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return Batch(texts, number, None, F.normalize(images, dim=-1)) if cached else Batch(texts, number, images, None)


def measure_ours(args: TrainStepArguments, config: CapivaraConfig | None = None, tokenizer=None) -> dict[str, Any]:
    """One run of our engine.

    Args:
        args: those of the worker.
        config: of the model; the published one where None.
        tokenizer: of the captions; XLM-R's where None.

    Returns:
        `pairs_per_second` (median over the timed steps), the steps themselves, `peak_memory_bytes` of the process or of
        the GPU, the same before the first step (if it is no lower, it hides the training's), and the FLOP of a step.
    """
    config, tokenizer = config or CapivaraConfig(), tokenizer or load_text_encoder()[1]
    processor = CapivaraProcessor(CapivaraImageProcessor(), tokenizer)
    captions = benchmark_captions(args.pairs, tokenizer, args.tokens)
    cached = args.cache == "on"
    batch = random_batch(config, processor, captions, args.micro, cached)
    engine = Engine(config, args)
    setup_peak = timing.peak_memory_bytes(args.device)
    with sparse_embedding_gradients(engine.model):
        steps = [engine(number, batch) for number in range(args.warmup + args.steps)][args.warmup :]
    return {
        **{name: getattr(args, name) for name in ("pairs", "micro", "precision", "accumulation", "warmup")},
        "padding_share": padding_share(batch.texts),
        "pairs_per_second": batch.pairs / statistics.median(step["step_s"] for step in steps),
        "steps": steps,
        "flop_per_step": our_flop(config, batch.texts, cached, steps[-1]["graphs_kept"]),
        "peak_memory_bytes": timing.peak_memory_bytes(args.device),
        "setup_peak_memory_bytes": setup_peak,
    }


# ---- all measurements ----


def compare(args: TrainStepArguments) -> dict[str, Any]:
    """The recipe's step, then all programs in alternating runs with the matmul peak before each."""
    recipe = {"recipe": recipe_step(args)} if args.recipe else {}
    programs = [name for name in PROGRAMS if args.device == "cpu" or name != PEER]
    commands = {(precision, name): command(name, precision, args) for precision in PRECISIONS for name in programs}
    steps = {key: lambda run, of=own: timing.in_own_process(of) for key, own in commands.items()}
    found = timing.alternating({"peak": lambda run: matmul_peak(args.device), **steps}, args.runs, "Training steps")
    best = {dtype: max(peak[dtype] for peak in found["peak"]) for dtype in PRECISIONS.values()}
    runs = {title: {name: found[precision, name] for name in programs} for precision, title in PRECISIONS.items()}
    results = {
        **timing.conditions(args.device),
        **{name: getattr(args, name) for name in ("runs", "pairs", "micro", "steps", "tokens")},
        "matmul_flop_per_second": best,
        "measured": {p: {name: summary(name, of, best[p]) for name in programs} for p, of in runs.items()},
    }
    if PEER in programs:
        results |= {"peer_micro": args.peer_micro, "peer_accum": args.pairs // args.peer_micro}
    return results | recipe


def command(name: str, precision: str, args: TrainStepArguments) -> list[str]:
    """Module and flags of one measurement."""
    shared = ["--pairs", str(args.pairs), "--steps", str(args.steps), "--tokens", str(args.tokens)]
    if name == PEER:
        sizes = ["--micro", str(args.peer_micro), "--accum", str(args.pairs // args.peer_micro)]
        peer_precision = {"no": "fp32", "bf16": "amp_bfloat16"}[precision]
        return ["benchmarks.open_clip_peer", *shared, *sizes, "--precision", peer_precision]
    ours = ["--worker", "ours", "--micro", str(args.micro), "--precision", precision, "--device", args.device]
    return ["benchmarks.train_step", *shared, *ours, *PROGRAMS[name], "--warmup", str(args.warmup)]


def summary(name: str, runs: dict[str, list[dict]], peak: float) -> dict[str, Any]:
    """Of one program in one precision: rates, memory, share of the peak, and the ratio to open_clip run by run.

    Args:
        name: of the program.
        runs: name of a program -> its runs in this precision.
        peak: FLOP per second of the best matmul.
    """
    own, last, rates = runs[name], runs[name][-1], rates_of(runs[name])
    if name == PEER:
        pairs = last["effective_batch"]
        flop = peer_flop(CapivaraConfig(), pairs, last["padded_tokens"])
    else:
        pairs, flop = last["pairs"], last["flop_per_step"]
    found = {
        "pairs_per_second": {"median": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)},
        **{key: max(run[key] for run in own) for key in ("peak_memory_bytes", "setup_peak_memory_bytes")},
        "flop_per_pair": flop / pairs,
        "share_of_matmul_peak": flop / pairs * statistics.median(rates) / peak,
    }
    if PEER in runs:
        found["ratio"] = timing.median_ratio(rates, rates_of(runs[PEER]))
    if name != PEER:
        found["optimiser_s"] = statistics.median(step["optimiser_s"] for run in own for step in run["steps"])
        found |= {"graphs_kept": last["steps"][-1]["graphs_kept"], "padding_share": last["padding_share"]}
    return found


def rates_of(runs: list[dict]) -> list[float]:
    """Pairs per second of each run."""
    return [run["pairs_per_second"] for run in runs]


def recipe_step(args: TrainStepArguments) -> dict[str, Any]:
    """A step of 2816 pairs with nothing kept, in the precision that `auto` chooses; projected to the whole recipe.

    On a CPU it is the first step, which also allocates Adam's moments.
    """
    cuda = args.device != "cpu"
    flags = ["--precision", resolve_precision("auto", torch.device(args.device)), "--micro", str(RECIPE_MICRO)]
    flags += ["--pairs", str(RECIPE_PAIRS), "--steps", "3" if cuda else "1", "--warmup", "1" if cuda else "0"]
    flags += ["--device", args.device, "--tokens", str(args.tokens), "--cache", "on", "--accumulation", "recompute"]
    found = timing.in_own_process(["benchmarks.train_step", "--worker", "ours", *flags])
    seconds = found["pairs"] / found["pairs_per_second"]
    return {
        **found,
        "step_s": seconds,
        "projected_hours": seconds * RECIPE_STEPS / 3600,
        "projected_steps": RECIPE_STEPS,
    }


def train_step_table(results: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md, out of the JSON."""
    rows = [
        (
            TITLES[name],
            precision,
            f"{found['pairs_per_second']['median']:.2f}",
            f"{found['ratio']:.1f}" if "ratio" in found else "-",
            f"{found['peak_memory_bytes'] / 2**30:.1f}",
            f"{found['share_of_matmul_peak']:.0%}",
        )
        for precision, programs in results["measured"].items()
        for name, found in programs.items()
    ]
    peer = f", open_clip's {results['peer_micro']} x {results['peer_accum']}" if "peer_micro" in results else ""
    packages = [name for name in ("torch", "transformers", "open_clip_torch") if name in results["versions"]]
    facts = (
        f"Full size, random weights, batches of {results['pairs']} pairs in micro-batches of {results['micro']}{peer}, "
        f"{results['tokens']} tokens per caption, median of {results['runs']} alternating runs on {results['device']}; "
        f"{timing.software(results, *packages)}."
    )
    if recipe := results.get("recipe"):
        facts += (
            f" One step of {recipe['pairs']} pairs ({PRECISIONS[recipe['precision']]}, no graph kept): "
            f"{recipe['step_s']:.1f} s, {recipe['peak_memory_bytes'] / 2**30:.1f} GiB; {recipe['projected_steps']} "
            f"such steps would take {recipe['projected_hours']:.1f} hours."
        )
    heads = ("trainer", "precision", "pairs/s", "ratio", "memory, GiB", "of matmul peak")
    return timing.table(heads, rows, facts, text_columns=2)


if __name__ == "__main__":
    main()
