"""Pairs per second and peak memory of a training step, against open_clip's own trainer, at full size.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --model siglip2 --parts programs --runs 3
    python -m benchmarks.train_step --parts recipe --beside ../capivara-before
    python -m benchmarks.train_step --parts demo --output benchmarks/results/main_job.json

Random weights, captions of 20 tokens, dropout on, the image tower frozen; whole steps, optimiser included, after an
untimed one. Every measurement is a process of its own, with its own peak of memory. Measured in alternating runs are

- `open_clip`: `open_clip_train` with `--lock-image --grad-checkpointing --accum-freq`; it pads to 77 tokens,
- `no_cache`: our engine, the images through the frozen tower at every step, from pixels in memory as open_clip's are,
- `cache`: our engine on embeddings of the images that were computed before,
- `cache_recomputed`: as `cache`, no graph kept, as where a batch of 2816 does not fit.

With `--beside CHECKOUT` `no_cache` and `cache` alone are measured, and the same of another checkout, with
a .venv of its own, in alternating runs; the ratio is to them. The recipe's step alternates likewise. `--parts demo` is
the main job, `make demo` after the installation, end to end: the first run and a second one of each checkout.

With `--model siglip2` it is SigLIP 2 B/16 under the sigmoid loss, beside open_clip's trainer with `--siglip` on its own
ViT-B-16-SigLIP2; texts are 64 random ids, since SigLIP's are always filled up, and neither has dropout.

All get the same batch; micro-batches are each program's own, and in the results. open_clip needs two of them at least:
with one there is no accumulation, and no batch of 2816. Its cost per pair does not depend on their number beyond that.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, SiglipConfig, SiglipModel

from benchmarks import timing
from capivara_common.cli import check_at_least, flag, parse_arguments, run_command
from capivara_common.environment import resolve_precision
from capivara_common.files import read_json
from modeling_capivara import CapivaraConfig, CapivaraModel, convert_open_clip
from modeling_capivara.two_towers import embedding_width, uses_sigmoid_loss
from training.arguments import RunArguments
from training.batches import MicroBatch
from training.inputs import embed_pixels
from training.trainable import build_optimizer, clamp_logit_scale, learning_rate_at, prepare_trainable
from training.whole_batch import StepReport, WholeBatch

PRECISION_NAMES = {"no": "float32", "bf16": "bfloat16"}  # Accelerate's names -> those of the results
PEER_PROGRAM = "open_clip"
RECOMPUTED_PROGRAM = "cache_recomputed"
PROGRAMS = (PEER_PROGRAM, "no_cache", "cache", RECOMPUTED_PROGRAM)
BEFORE_SUFFIX = "_before"  # ends the names of the other checkout's programs
RECIPE_SIZES = {"pairs": 2816, "micro": 64}  # CAPIVARA, arXiv 2310.13683, appendix
# --model -> what open_clip's trainer is told of it: its name of the architecture, and the loss
OPEN_CLIP_FLAGS = {"capivara": "--model xlm-roberta-base-ViT-B-32", "siglip2": "--model ViT-B-16-SigLIP2 --siglip"}
CAPTION_TOKENS = {"capivara": 20, "siglip2": 64}  # of a caption, on average; of SigLIP 2's, which are always filled up
SIGLIP_VOCABULARY_SIZE, DRAWN_TOKEN_COUNT = (
    256_000,
    2000,
)  # of its vocabulary, all drawn; of XLM-R's about as many as the demo's names have
PAD_TOKEN_ID, PEER_CONTEXT_LENGTH = 1, 77  # XLM-R's padding; what open_clip fills up to
LENGTH_SPREAD, MIN_LENGTH_TOKENS, MAX_LENGTH_TOKENS = (
    0.25,
    7,
    70,
)  # of the lengths: standard deviation over the mean, and limits, in tokens
OPEN_CLIP_PRECISIONS = {"no": "fp32", "bf16": "amp_bfloat16"}


@dataclass
class TrainStepArguments:
    """Arguments of `benchmarks.train_step`."""

    gone = {"device": "the figures are of a processor"}
    model: Literal["capivara", "siglip2"] = flag("capivara", "Architecture; siglip2 is SigLIP 2 B/16.")
    pairs: int = flag(96, "Pairs of one step, for all programs.")
    micro: int = flag(16, "Our micro-batch, pairs; the recipe's step has 64.")
    peer_micro: int = flag(48, "open_clip's --batch-size; pairs / it is its --accum-freq.")
    runs: int = flag(5, "Runs of each program, alternating.")
    steps: int = flag(1, "Timed steps of a run.")
    warmup: int = flag(1, "Untimed steps before them; ours alone, open_clip has 1.")
    parts: list[str] = flag(["recipe", "programs"], "recipe: one step of its 2816 pairs; programs; demo: see above.")
    output: Path | None = flag(None, "JSON file; train_step.json or train_step_siglip2.json if none.")
    beside: Path | None = flag(None, "Another checkout, with a .venv of its own, measured in the same runs.")
    worker: Literal["open_clip", "no_cache", "cache", "cache_recomputed"] | None = flag(
        None, "Measure once, in this process."
    )
    precision: Literal["no", "bf16"] = flag("no", "Autocast (worker).")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "micro", "peer_micro", "runs", "steps")
        if not self.parts or set(self.parts) - {"recipe", "programs", "demo"}:
            raise ValueError(f"parts must be some of recipe, programs and demo, got {self.parts}.")
        self.output = self.output or timing.RESULTS_FOLDER / f"train_step{'_siglip2' * (self.model == 'siglip2')}.json"
        if not self.worker and (self.pairs % self.peer_micro or self.pairs <= self.peer_micro):
            raise ValueError(
                f"pairs must be a multiple of peer_micro, {self.peer_micro}, and at least twice as many, lest "
                f"open_clip not accumulate; got {self.pairs}."
            )


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse_arguments(TrainStepArguments, __doc__, argv)
    if args.worker:
        timing.write_results(measure_open_clip(args) if args.worker == PEER_PROGRAM else measure_ours(args))
    else:
        timing.write_results(compare_programs(args), args.output)


def compare_programs(args: TrainStepArguments) -> dict[str, Any]:
    """All programs, and the recipe's step with nothing kept, in alternating runs."""
    ends = ["", BEFORE_SUFFIX] if args.beside else [""]
    names = [name + end for name in ("no_cache", "cache") for end in ends] if args.beside else PROGRAMS
    programs = {(title, name): {"precision": key} for key, title in PRECISION_NAMES.items() for name in names}
    sizes = RECIPE_SIZES | {"precision": resolve_precision("auto", torch.device("cpu"))}
    recipe = {("recipe", RECOMPUTED_PROGRAM + end): sizes | {"steps": 1, "warmup": 0} for end in ends}
    wanted = (recipe if "recipe" in args.parts else {}) | (programs if "programs" in args.parts else {})
    steps = {key: partial(run_program, key[1], args, **flags) for key, flags in wanted.items()}
    found = timing.run_alternating(steps, args.runs, "Training steps")
    results = timing.describe_conditions() | {"tokens": CAPTION_TOKENS[args.model], "measured": {}}
    results |= {name: getattr(args, name) for name in ("model", "runs", "pairs", "micro", "steps", "peer_micro")}
    results["peer_accum"] = args.pairs // args.peer_micro
    for (of, name), runs in found.items():
        one = summarize_runs(runs, found.get((of, PEER_PROGRAM)), found.get((of, name + BEFORE_SUFFIX)))
        if of == "recipe":  # a first step, which also allocates Adam's moments
            seconds = RECIPE_SIZES["pairs"] / one["pairs_per_second"]["median"]
            results[of + name.removeprefix(RECOMPUTED_PROGRAM)] = sizes | one | {"step_s": seconds}
        else:
            results["measured"].setdefault(of, {})[name] = one
    if "demo" in args.parts:
        trees = {"old": args.beside, "new": timing.CODE_ROOT}
        results["demo"] = {name: time_demo(tree.resolve()) for name, tree in trees.items() if tree}
    return results


def time_demo(checkout: Path) -> dict[str, Any]:
    """ "first" and "second" run of a checkout: seconds of the two commands of `make demo`, and what was measured."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        own = os.environ | {"CAPIVARA_CACHE": f"{folder}/cache", "PYTHONPATH": str(checkout)}
        made = ["--model", f"{folder}/base", "--dataset", f"{folder}/dataset"]
        for run in ("first", "second"):
            flags = ["--config", "configs/openmoji.yaml", *made, "--output_dir", f"{folder}/{run}"]
            seconds = {}
            for words in (["examples.openmoji.prepare", *made], ["train_accelerate", *flags]):
                job = partial(subprocess.run, [sys.executable, "-m", *words], cwd=checkout, env=own, check=True)
                seconds[words[0]] = timing.time_call(job)
            paths = sorted(Path(folder, run, "results").glob("*.json"))
            records = [record for path in paths for record in read_json(path, records=list)["records"]]
            found[run] = {"seconds": seconds | {"total": sum(seconds.values())}, "records": records}
    return found


def run_program(name: str, args: TrainStepArguments, **flags: Any) -> dict[str, Any]:
    """The result of one program, in a process of its own; `flags` win over those of `args`."""
    numbers = ("pairs", "steps", *(["peer_micro"] if name == PEER_PROGRAM else ["micro", "warmup"]))
    flags = {key: getattr(args, key) for key in numbers} | flags
    if args.model != "capivara":  # a checkout of before may have no such flag
        flags["model"] = args.model
    root = args.beside if name.endswith(BEFORE_SUFFIX) else timing.CODE_ROOT
    return timing.run_in_process("benchmarks.train_step", root, worker=name.removesuffix(BEFORE_SUFFIX), **flags)


def summarize_runs(runs: list[dict], peer: list[dict] | None, before: list[dict] | None) -> dict[str, Any]:
    """Rates and memory of a program's runs, and the ratios run by run to open_clip's and to another tree's."""
    rates = [run["pairs_per_second"] for run in runs]
    memory = max(run["peak_memory_bytes"] for run in runs)
    found = {"pairs_per_second": timing.summarize_rates(rates), "peak_memory_bytes": memory}
    for name, others in {"ratio": peer, "ratio_to_before": before}.items():
        if others:
            found[name] = timing.median_ratio(rates, [run["pairs_per_second"] for run in others])
    return found


def build_published_config(args: TrainStepArguments) -> PreTrainedConfig:
    """Of the architecture that `--model` names: CAPIVARA's, or SigLIP 2's B/16 at 224 pixels."""
    if args.model == "capivara":
        return CapivaraConfig()
    return SiglipConfig(
        text_config={"vocab_size": SIGLIP_VOCABULARY_SIZE, "max_position_embeddings": CAPTION_TOKENS[args.model]}
    )


def make_random_texts(config: PreTrainedConfig, pairs: int) -> Tensor:
    """(pairs, 77), ids in order of length, 20 on average, filled up; of SigLIP (pairs, 64), all of one length."""
    dice, siglip = torch.Generator().manual_seed(0), isinstance(config, SiglipConfig)
    shape = pairs, CAPTION_TOKENS["siglip2"] if siglip else PEER_CONTEXT_LENGTH
    pieces = min(SIGLIP_VOCABULARY_SIZE if siglip else DRAWN_TOKEN_COUNT, config.text_config.vocab_size)
    ids = torch.randint(PAD_TOKEN_ID + 1, pieces, shape, generator=dice)
    if not siglip:
        lengths = CAPTION_TOKENS["capivara"] * (1 + LENGTH_SPREAD * torch.randn(pairs, 1, generator=dice))
        ids[
            torch.arange(PEER_CONTEXT_LENGTH)
            >= lengths.round().clamp(MIN_LENGTH_TOKENS, MAX_LENGTH_TOKENS).sort(dim=0).values
        ] = PAD_TOKEN_ID
    return ids


def make_random_pixels(config: PreTrainedConfig, pairs: int) -> Tensor:
    """(pairs, 3, side, side), the images of a batch."""
    side = config.vision_config.image_size
    return torch.randn(pairs, 3, side, side, generator=torch.Generator().manual_seed(0))


# ---- one measurement of ours ----


class TrainingEngine:
    """The parts of `training.loop.TrainingLoop` that make a step, on random weights; the loop around them is left out.

    `budget` is how many bytes of graphs are kept; what fits where None.
    """

    def __init__(self, config: PreTrainedConfig, args: TrainStepArguments, budget: float | None = None) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, mixed_precision=args.precision)
        model_class = SiglipModel if isinstance(config, SiglipConfig) else CapivaraModel
        self.model = model_class(config)
        self.args = RunArguments(
            model="random weights", dataset=["random pixels"], effective_batch_size=args.pairs,
            micro_batch_size=args.micro, mixed_precision=args.precision,
        )  # fmt: skip
        prepare_trainable(self.model, self.args)
        self.prepared_model = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # see WholeBatch
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(self.model, self.args))
        self.step = WholeBatch(self.prepared_model, self.accelerator, self.args.seed, budget)

    def __call__(self, number: int, texts: list[MicroBatch], images: Tensor) -> StepReport:
        """One step on what `make_random_batch` has made."""
        if images.ndim == 4:  # pixels: no cache
            self.model.vision_model.eval()
            parts = images.split(self.args.embedding_batch_size)
            images = torch.cat([embed_pixels(self.prepared_model, pixels, self.accelerator) for pixels in parts])
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)
        report = self.step(number, texts, len(images), images)
        for group in self.optimizer.param_groups:  # as `TrainingLoop._update_weights`, the gradient's norm included
            group["lr"] = learning_rate_at(number, self.args)
        torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()
        self.optimizer.step()
        if not uses_sigmoid_loss(self.model):
            clamp_logit_scale(self.model.logit_scale)
        return report


def make_random_batch(config: PreTrainedConfig, args: TrainStepArguments) -> tuple[list[MicroBatch], Tensor]:
    """Texts with random pixels, (pairs, 3, side, side), or with embeddings as a cache holds them, (pairs, width)."""
    texts = []
    for number, ids in enumerate(make_random_texts(config, args.pairs).split(args.micro)):
        ids = ids[:, : (ids != PAD_TOKEN_ID).sum(dim=1).max()].contiguous()  # to the longest of the micro-batch
        mask = None if isinstance(config, SiglipConfig) else (ids != PAD_TOKEN_ID).long()
        texts.append(MicroBatch(number, number * args.micro, ids, mask))
    if args.worker == "no_cache":
        return texts, make_random_pixels(config, args.pairs)
    vectors = torch.randn(args.pairs, embedding_width(config), generator=torch.Generator().manual_seed(0))
    return texts, F.normalize(vectors, dim=-1)


def measure_ours(args: TrainStepArguments) -> dict[str, Any]:
    """One run of our engine: `pairs_per_second` (median over the timed steps), the seconds of these, how many graphs
    each has kept, and `peak_memory_bytes` of the process."""
    config, seconds, reports = build_published_config(args), [], []
    batch = make_random_batch(config, args)
    engine = TrainingEngine(config, args, 0.0 if args.worker == RECOMPUTED_PROGRAM else None)
    for number in range(args.warmup + args.steps):
        step = partial(engine, number, *batch)
        seconds.append(timing.time_call(lambda step=step: reports.append(step())))
    return {
        "pairs_per_second": args.pairs / statistics.median(seconds[args.warmup :]),
        "step_s": seconds[args.warmup :],
        "graphs_kept": [report.graphs_kept for report in reports[args.warmup :]],
        "peak_memory_bytes": timing.peak_resident_bytes(),
    }


# ---- one measurement of open_clip's trainer ----


class PeerBatches(list):
    """Micro-batches as `train_one_epoch` reads them, which asks for `num_batches` and `num_samples`."""


def measure_open_clip(args: TrainStepArguments) -> dict[str, Any]:
    """One run of open_clip's trainer on its model of the same architecture; its result is as that of `measure_ours`."""
    from open_clip import create_loss, create_model
    from open_clip_train.data import DataInfo
    from open_clip_train.main import random_seed
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    config, theirs = build_published_config(args), parse_open_clip_arguments(args)
    steps = 1 + args.steps  # the optimiser makes its state in the first one
    random_seed(theirs.seed, theirs.rank)
    model = create_model(theirs.model) if args.model == "siglip2" else convert_open_clip.build_open_clip_model(config)
    model.output_dict = True
    model.lock_image_tower(theirs.lock_image_unlocked_groups, theirs.lock_image_freeze_bn_stats)
    model.set_grad_checkpointing()
    optimizer, ends = build_open_clip_optimizer(model, theirs), []
    optimizer.register_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    sides = make_random_pixels(config, args.pairs), make_random_texts(config, args.pairs)
    batches = PeerBatches([*zip(*(side.split(args.peer_micro) for side in sides), strict=True)] * steps)
    batches.num_batches, batches.num_samples = len(batches), steps * args.pairs
    scheduler, data = cosine_lr(optimizer, theirs.lr, theirs.warmup, steps), {"train": DataInfo(batches)}
    train_one_epoch(model, data, create_loss(theirs), 0, optimizer, None, scheduler, None, theirs)
    seconds = [end - start for start, end in pairwise(ends)]  # from one step's end to the next one's
    return {
        "padded_tokens": sides[1].shape[1],
        "pairs_per_second": args.pairs / statistics.median(seconds),
        "step_s": seconds,
        "peak_memory_bytes": timing.peak_resident_bytes(),
    }


def parse_open_clip_arguments(args: TrainStepArguments) -> Any:
    """open_clip's arguments by its own parser, with what its `main` adds to them."""
    from open_clip_train.distributed import init_distributed_device
    from open_clip_train.params import parse_args

    flags = f"{OPEN_CLIP_FLAGS[args.model]} --lock-image --grad-checkpointing --device cpu --dataset-type synthetic"
    flags += f" --epochs 1 --batch-size {args.peer_micro} --accum-freq {args.pairs // args.peer_micro}"
    theirs = parse_args([*flags.split(), "--precision", OPEN_CLIP_PRECISIONS[args.precision]])
    init_distributed_device(theirs)  # one process
    theirs.distill = theirs.wandb = False
    return theirs


def build_open_clip_optimizer(model: nn.Module, open_clip_args: Any) -> torch.optim.AdamW:
    """AdamW as in open_clip 3.3's `main`, which holds these lines in its midst and so cannot be called for them."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gain_or_bias = {n for n, p in trained if p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias", "logit_scale"))}
    groups = [
        {"params": [p for n, p in trained if n in gain_or_bias], "weight_decay": 0.0},
        {"params": [p for n, p in trained if n not in gain_or_bias], "weight_decay": open_clip_args.wd},
    ]
    return torch.optim.AdamW(
        groups, lr=open_clip_args.lr, betas=(open_clip_args.beta1, open_clip_args.beta2), eps=open_clip_args.eps
    )


if __name__ == "__main__":
    run_command(main)
