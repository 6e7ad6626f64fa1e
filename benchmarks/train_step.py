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
with one there is no accumulation, and no batch of 2816. Its cost a pair does not depend on their number beyond that.

Share of the matmul peak = FLOP of a step / its seconds / FLOP per second of the best `torch.mm` of the same run. With
T and I the elements of the weight matrices of the two encoders (85 million each), and 2 FLOP for each and for every
token that goes through, padding included:

    text forward F = 2 T tokens, image forward G = 2 I patches (class token and patch convolution included)
    ours: F + 2 F (backward), F more for a micro-batch whose graph is not kept; G without a cache
    open_clip: F without graph, F with, F again by checkpointing, 2 F (backward); 2 G

Scores of attention (0.4 % at 20 tokens), projections and loss are left out. The last line of the output is JSON.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from benchmarks.captions_pt import benchmark_captions
from common.environment import device_description, package_versions, peak_resident_bytes
from common.files import write_json
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

ROOT = Path(__file__).resolve().parent.parent
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
MATMUL_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
MATMUL_REPEATS = 5
PROFILED_OPS = 10


@dataclass
class TrainStepArguments:
    pairs: int = field(default=96, metadata={"help": "Pairs of one step, for all programs."})
    micro: int = field(default=16, metadata={"help": "Our micro-batch, pairs; the recipe's step has 64."})
    peer_micro: int = field(default=48, metadata={"help": "open_clip's --batch-size; pairs / it is its --accum-freq."})
    runs: int = field(default=5, metadata={"help": "Runs of each program, alternating."})
    steps: int = field(default=1, metadata={"help": "Timed steps of a run."})
    warmup: int = field(default=1, metadata={"help": "Untimed steps before them; ours alone, open_clip has 1."})
    tokens: int = field(default=20, metadata={"help": "Mean tokens of a caption, begin and end included."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda; on cuda open_clip is left out."})
    recipe: bool = field(default=True, metadata={"help": "Also one step of the recipe's 2816 pairs."})
    output: Path = field(default=ROOT / "benchmarks/results/train_step.json", metadata={"help": "JSON file."})
    plot: Path = field(default=ROOT / "docs/train_step.png", metadata={"help": "PNG file."})
    worker: Literal["ours"] | None = field(default=None, metadata={"help": "Measure once, in this process."})
    cache: Literal["on", "off"] = field(default="on", metadata={"help": "Image embeddings (worker)."})
    precision: Literal["no", "bf16"] = field(default="no", metadata={"help": "Autocast (worker)."})
    accumulation: Literal["auto", "keep", "recompute"] = field(default="auto", metadata={"help": "Graphs (worker)."})
    profile: bool = field(default=False, metadata={"help": "Also one profiled step, after the others (worker)."})

    def __post_init__(self) -> None:
        for name in ("micro", "peer_micro", "runs", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.worker and self.device == "cpu" and (self.pairs % self.peer_micro or self.pairs <= self.peer_micro):
            raise ValueError(
                f"pairs must be a multiple of peer_micro, {self.peer_micro}, and at least twice as many, lest "
                f"open_clip not accumulate; got {self.pairs}."
            )


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(TrainStepArguments, description=__doc__).parse_args_into_dataclasses(argv)
    if args.worker:
        print(json.dumps(measure_ours(args)))
        return
    from benchmarks.plots import plot_train_step  # here: the workers' memory shall not hold matplotlib

    results = compare(args)
    write_json(args.output, results)
    plot_train_step(results, TITLES, args.plot)
    print(markdown_table(results))
    print(json.dumps(results))


# ---- one measurement of ours ----


@dataclass
class Batch:
    """What one step trains on.

    Attributes:
        texts: the micro-batches.
        pairs: their captions, altogether.
        pixels: (pairs, 3, height, width) in memory, in the texts' order; None with a cache.
        image_embeds: (pairs, width), unit length; None without a cache.
    """

    texts: list[MicroBatch]
    pairs: int
    pixels: Tensor | None
    image_embeds: Tensor | None

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
        """One step; the seconds of its parts, the graphs it kept and its loss."""
        started = self._now()
        image_embeds = self._image_embeds(batch)
        embedded = self._now()
        set_training_mode(self.model)
        self.optimizer.zero_grad(set_to_none=False)
        cleared = self._now()
        report = self.step(number, batch.texts, batch.pairs, image_embeds)
        graded = self._now()
        self._update(number)
        ended = self._now()
        return {
            "step_s": ended - started,
            "images_s": embedded - started,
            "gradients_s": graded - cleared,
            "optimiser_s": (cleared - embedded) + (ended - graded),
            "graphs_kept": report.graphs_kept,
            "loss": report.loss,
        }

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
    noise = torch.Generator().manual_seed(0)
    if cached:
        embeds = F.normalize(torch.randn(len(captions), config.projection_dim, generator=noise), dim=-1)
        return Batch(texts, len(captions), None, embeds)
    size = config.vision_config.image_size
    return Batch(texts, len(captions), torch.randn(len(captions), 3, size, size, generator=noise), None)


def measure_ours(args: TrainStepArguments, config: CapivaraConfig | None = None, tokenizer=None) -> dict[str, Any]:
    """One run of our engine, with what it ran on.

    Args:
        args: those of the worker.
        config: of the model; the published one where None.
        tokenizer: of the captions; XLM-R's where None.

    Returns:
        `pairs_per_second` (median over the timed steps), the same without the optimiser, the steps' own seconds,
        `peak_memory_bytes` of the process or of the GPU, FLOP of a step, and the profile where it was asked for.
    """
    config = config or CapivaraConfig()
    tokenizer = tokenizer or load_text_encoder()[1]
    processor = CapivaraProcessor(CapivaraImageProcessor(), tokenizer)
    captions = benchmark_captions(args.pairs, tokenizer, args.tokens)
    batch = random_batch(config, processor, captions, args.micro, args.cache == "on")
    engine = Engine(config, args)
    setup_peak = peak_memory_bytes(args.device)
    with sparse_embedding_gradients(engine.model):
        steps = [engine(number, batch) for number in range(args.warmup + args.steps)][args.warmup :]
        peak = peak_memory_bytes(args.device)  # before the profiler's own
        profile = profile_of(lambda: engine(args.warmup + args.steps, batch), args.device) if args.profile else None
    seconds = statistics.median(step["step_s"] for step in steps)
    without = statistics.median(step["step_s"] - step["optimiser_s"] for step in steps)
    return {
        "program": "training.step.ExactStep",
        "device": device_description(args.device),
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ("pairs", "micro", "cache", "precision", "accumulation", "warmup")},
        "mean_tokens": sum(int(text.attention_mask.sum()) for text in batch.texts) / batch.pairs,
        "padding_share": padding_share(batch.texts),
        "pairs_per_second": batch.pairs / seconds,
        "pairs_per_second_without_optimiser": batch.pairs / without,
        "steps": steps,
        "flop_per_step": our_flop(config, batch, steps[-1]["graphs_kept"]),
        "peak_memory_bytes": peak,
        "setup_peak_memory_bytes": setup_peak,
        "profile": profile,
    }


def peak_memory_bytes(device: str) -> int:
    """The most this process has held: resident, or allocated on the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def profile_of(step: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """The ten ops that take most of a call's own CPU time (GPU time on cuda), and their shares, 0 to 1."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    name = "self_cpu_time_total"
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        name = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        step()
    times = {op.key: getattr(op, name) for op in profile.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=times.get, reverse=True)[:PROFILED_OPS]
    return [{"op": key, "share": times[key] / total} for key in largest]


# ---- arithmetic ----


def forward_flop(config: CapivaraConfig) -> tuple[int, int]:
    """FLOP of the text encoder a token, and of the image tower an image; see the module's text."""
    with torch.device("meta"):
        model = CapivaraModel(config)
    vision = model.vision_model
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    convolution = vision.embeddings.patch_embedding.weight.numel() * patches
    image = 2 * (_matrix_elements(vision.encoder) * (patches + 1) + convolution)
    return 2 * _matrix_elements(model.text_model.encoder), image


def _matrix_elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def our_flop(config: CapivaraConfig, batch: Batch, graphs_kept: int) -> int:
    text, image = forward_flop(config)
    again = sum(b.input_ids.numel() for b in batch.texts[graphs_kept:])
    return text * (3 * batch.tokens + again) + (image * batch.pairs if batch.pixels is not None else 0)


def peer_flop(config: CapivaraConfig, pairs: int, padded_tokens: int) -> int:
    """Of open_clip's step with more than one micro-batch."""
    text, image = forward_flop(config)
    return pairs * (5 * text * padded_tokens + 2 * image)


def matmul_peak(device: str) -> dict[str, float]:
    """FLOP per second of the best of several square `torch.mm`, by dtype."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        rates = []
        for size in MATMUL_SIZES[torch.device(device).type]:
            left, right = torch.randn(2, size, size, device=device).to(dtype)
            for _ in range(MATMUL_REPEATS):
                rates.append(2 * size**3 / seconds_of(lambda a=left, b=right: torch.mm(a, b), device))
        best[str(dtype).removeprefix("torch.")] = max(rates)
    return best


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Wall-clock seconds of one call, the device's queue drained before and after."""
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronise()
    started = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - started


# ---- all measurements ----


def compare(args: TrainStepArguments) -> dict[str, Any]:
    """All programs in alternating runs, the matmul peak before each round, and the recipe's step."""
    recipe = {"recipe": recipe_step(args)} if args.recipe else {}
    programs = [name for name in PROGRAMS if args.device == "cpu" or name != PEER]
    runs: dict[str, dict[str, list[dict]]] = {p: {name: [] for name in programs} for p in PRECISIONS.values()}
    peaks = []
    rounds = [(number, precision) for number in range(args.runs) for precision in PRECISIONS]
    for number, precision in tqdm(rounds, desc="Rounds", unit="round"):
        peaks.append(matmul_peak(args.device))
        for name in programs:
            result = in_own_process(command(name, precision, args, profile=number == 0))
            runs[PRECISIONS[precision]][name].append(result)
    best = {dtype: max(peak[dtype] for peak in peaks) for dtype in PRECISIONS.values()}
    results = {
        "device": device_description(args.device),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        **{name: getattr(args, name) for name in ("runs", "pairs", "micro", "steps", "tokens")},
        "matmul_flop_per_second": best,
        "measured": {p: {n: summary(n, of, best[p]) for n in of} for p, of in runs.items()},
    }
    if PEER in programs:
        for name, found in results["measured"]["bfloat16"].items():
            found["ratio_to_open_clip_float32"] = median_ratio(runs["bfloat16"][name], runs["float32"][PEER])
        results |= {"peer_micro": args.peer_micro, "peer_accum": args.pairs // args.peer_micro}
    return results | recipe


def command(name: str, precision: str, args: TrainStepArguments, profile: bool) -> list[str]:
    """Module and flags of one measurement."""
    shared = ["--pairs", str(args.pairs), "--steps", str(args.steps), "--tokens", str(args.tokens)]
    if name == PEER:
        sizes = ["--micro", str(args.peer_micro), "--accum", str(args.pairs // args.peer_micro)]
        peer_precision = {"no": "fp32", "bf16": "amp_bfloat16"}[precision]
        return ["benchmarks.open_clip_peer", *shared, *sizes, "--precision", peer_precision]
    ours = ["--worker", "ours", "--micro", str(args.micro), "--precision", precision, "--device", args.device]
    flags = [*PROGRAMS[name], "--warmup", str(args.warmup), *(["--profile"] if profile else [])]
    return ["benchmarks.train_step", *shared, *ours, *flags]


def in_own_process(module_and_flags: list[str]) -> dict[str, Any]:
    """The JSON in the last line that a module of this project prints."""
    done = subprocess.run(
        [sys.executable, "-m", *module_and_flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(module_and_flags)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(name: str, runs: dict[str, list[dict]], peak: float) -> dict[str, Any]:
    """Of one program in one precision: rates, memory, share of the peak, and the ratio to open_clip run by run."""
    own = runs[name]
    rates = [run["pairs_per_second"] for run in own]
    rate, last = statistics.median(rates), own[-1]
    if name == PEER:
        pairs, flop = (
            last["effective_batch"],
            peer_flop(CapivaraConfig(), last["effective_batch"], last["padded_tokens"]),
        )
    else:
        pairs, flop = last["pairs"], last["flop_per_step"]
    found = {
        "pairs_per_second": {"median": rate, "slowest": min(rates), "fastest": max(rates)},
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in own),
        "setup_peak_memory_bytes": max(run["setup_peak_memory_bytes"] for run in own),
        "flop_per_pair": flop / pairs,
        "share_of_matmul_peak": flop / pairs * rate / peak,
    }
    if PEER in runs:
        found["ratio"] = median_ratio(own, runs[PEER])
    if name != PEER:
        found["pairs_per_second_without_optimiser"] = statistics.median(
            run["pairs_per_second_without_optimiser"] for run in own
        )
        found["optimiser_s"] = statistics.median(step["optimiser_s"] for run in own for step in run["steps"])
        found |= {"graphs_kept": last["steps"][-1]["graphs_kept"], "padding_share": last["padding_share"]}
        found["profile"] = own[0]["profile"]
    return found


def median_ratio(own: list[dict], peer: list[dict]) -> float:
    """Of the rates, run by run."""
    return statistics.median(a["pairs_per_second"] / b["pairs_per_second"] for a, b in zip(own, peer, strict=True))


def recipe_step(args: TrainStepArguments) -> dict[str, Any]:
    """A step of 2816 pairs with nothing kept, in the precision that `auto` chooses; projected to the whole recipe.

    On a CPU it is the first step, which also allocates Adam's moments.
    """
    cuda = args.device != "cpu"
    flags = ["--precision", resolve_precision("auto", torch.device(args.device)), "--micro", str(RECIPE_MICRO)]
    flags += ["--pairs", str(RECIPE_PAIRS), "--steps", "3" if cuda else "1", "--warmup", "1" if cuda else "0"]
    flags += ["--device", args.device, "--tokens", str(args.tokens), "--cache", "on", "--accumulation", "recompute"]
    found = in_own_process(["benchmarks.train_step", "--worker", "ours", *flags])
    seconds = found["pairs"] / found["pairs_per_second"]
    kept = ("pairs", "micro", "precision", "accumulation", "warmup", "peak_memory_bytes", "steps", "padding_share")
    return {
        **{name: found[name] for name in kept},
        "step_s": seconds,
        "steps_per_second": 1 / seconds,
        "projected_hours": seconds * RECIPE_STEPS / 3600,
        "projected_steps": RECIPE_STEPS,
    }


def markdown_table(results: dict[str, Any]) -> str:
    """The README's table, out of the JSON."""
    lines = [
        "| trainer | precision | pairs/s | ratio | memory, GiB | of matmul peak |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for precision, programs in results["measured"].items():
        for name, found in programs.items():
            ratio = f"{found['ratio']:.1f}" if "ratio" in found else "-"
            lines.append(
                f"| {TITLES[name]} | {precision} | {found['pairs_per_second']['median']:.2f} | {ratio} "
                f"| {found['peak_memory_bytes'] / 2**30:.1f} | {found['share_of_matmul_peak']:.0%} |"
            )
    versions = results["versions"]
    peer = f", open_clip's {results['peer_micro']} x {results['peer_accum']}" if "peer_micro" in results else ""
    facts = (
        f"Full size, random weights, batches of {results['pairs']} pairs in micro-batches of {results['micro']}{peer}, "
        f"{results['tokens']} tokens a caption, median of {results['runs']} alternating runs on {results['device']}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, open_clip "
        f"{versions.get('open_clip_torch', 'not installed')}."
    )
    if recipe := results.get("recipe"):
        facts += (
            f" One step of {recipe['pairs']} pairs ({PRECISIONS[recipe['precision']]}, no graph kept): "
            f"{recipe['step_s']:.1f} s, {recipe['peak_memory_bytes'] / 2**30:.1f} GiB; {recipe['projected_steps']} "
            f"such steps would take {recipe['projected_hours']:.1f} hours."
        )
    return "\n".join([*lines, "", facts])


if __name__ == "__main__":
    main()
