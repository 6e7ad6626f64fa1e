"""Measure the speed and peak memory of training steps at full model size, compared with open_clip's trainer.

    # default: the parts programs (96 pairs per step) and recipe (2816 pairs per step)
    python -m benchmarks.train_step
    # SigLIP 2 B/16 with a small batch
    python -m benchmarks.train_step --model siglip2 --parts programs --runs 3
    # measure batches of 352 and 704 pairs, and estimate the memory of 2816 pairs
    python -m benchmarks.train_step --model siglip2_so400m --parts recipe --pairs 704 --runs 1
    # compare with another checkout of this project, which needs its own .venv
    python -m benchmarks.train_step --parts recipe --beside ../capivara-before
    # time the commands of `make demo`, first without and then with their caches
    python -m benchmarks.train_step --parts demo --output benchmarks/results/main_job.json

All models have random weights and a frozen image tower. Speed is measured in image-text pairs per second. The part
`programs` compares these trainers on the same batches, in float32 and in bfloat16:

- `open_clip`: open_clip's trainer, with gradient accumulation and gradient checkpointing.
- `no_cache`: our trainer. Every step encodes the images again.
- `cache`: our trainer with precomputed image embeddings.
- `cache_recomputed`: the same as `cache`, but needs less memory: the backward pass recomputes all activations.

The part `recipe` measures `cache_recomputed` with 2816 pairs per step, as in the CAPIVARA paper. It measures the first
step. With `--pairs` and without the part `programs`, it measures the second step, which needs more memory.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, SiglipConfig, SiglipModel

from benchmarks import tools
from capivara_common.cli import check_at_least, flag, parse_arguments, run_main_and_report_user_errors
from capivara_common.environment import resolve_mixed_precision
from capivara_common.files import read_json
from modeling_capivara import CapivaraConfig, CapivaraModel, convert_open_clip
from modeling_capivara.two_towers import embedding_width, uses_sigmoid_loss
from training.arguments import RunArguments
from training.batches import MicroBatch
from training.inputs import embed_pixels
from training.trainable import build_optimizer, clamp_logit_scale, freeze_parameters_and_add_adapters, learning_rate_at
from training.whole_batch import StepReport, WholeBatch

PRECISION_NAMES = {"no": "float32", "bf16": "bfloat16"}  # names of precisions in the results, by Accelerate's names
PEER_PROGRAM = "open_clip"
RECOMPUTED_PROGRAM = "cache_recomputed"
# The programs "no_cache" and "cache" recompute only the autograd graphs that do not fit into memory. A batch of 2816
# pairs needs "cache_recomputed", because its graphs do not fit.
PROGRAMS = (PEER_PROGRAM, "no_cache", "cache", RECOMPUTED_PROGRAM)
BEFORE_SUFFIX = "_before"  # ends the name of a program that runs in the other checkout (flag --beside)
PROGRAM_PAIRS = 96  # image-caption pairs per step in the part `programs`, unless --pairs is given
# Image-caption pairs per step and per micro-batch in the part `recipe`. The 2816 pairs per step are from the appendix
# of the CAPIVARA paper (arXiv 2310.13683). The size of the micro-batch is our choice.
RECIPE_PAIRS, RECIPE_MICRO = 2816, 64
EXTRAPOLATION_RULE = (
    "Linear in the pairs, through the two measured batch sizes, each of at least two micro-batches. Weights, "
    "gradients, Adam's moments and the graph of a micro-batch do not depend on the batch. Token ids, embeddings and "
    "their gradients grow linearly. The logits of the loss grow with the square, up to 64 MiB for each copy. "
    "Differences between runs that have other causes are extrapolated too, so the result is more likely too high."
)
# Flags of open_clip's trainer for each value of our flag --model, with the same architecture and loss. Unlike CAPIVARA,
# the SigLIP models have no dropout.
OPEN_CLIP_FLAGS = {
    "capivara": "--model xlm-roberta-base-ViT-B-32",
    "siglip2": "--model ViT-B-16-SigLIP2 --siglip",
    "siglip2_large": "--model ViT-L-16-SigLIP2-256 --siglip",
    "siglip2_so400m": "--model ViT-SO400M-14-SigLIP2 --siglip",
}
SIGLIP_TOKENS = 64  # SigLIP pads every text to this number of tokens
# Average number of tokens per caption for each value of --model.
CAPTION_TOKENS = dict.fromkeys(OPEN_CLIP_FLAGS, SIGLIP_TOKENS) | {"capivara": 20}
SIGLIP_VOCABULARY_SIZE = 256_000  # number of tokens of SigLIP 2; random token ids are drawn from all of them
# Sizes of the SigLIP 2 models by value of --model: (config fields of both towers, further config fields of the image
# tower). A field that is missing here has the default of transformers, which is the value of the model B/16.
SIGLIP_SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "siglip2": ({}, {}),
    "siglip2_large": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        {"image_size": 256},
    ),
    "siglip2_so400m": (
        {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304},
        {"patch_size": 14},
    ),
}
DRAWN_TOKEN_COUNT = 2000  # random captions use this many different XLM-R tokens, about as many as the demo's captions
PAD_TOKEN_ID = 1  # id of XLM-R's padding token
PEER_CONTEXT_LENGTH = 77  # number of tokens to which open_clip pads all texts
LENGTH_SPREAD = 0.25  # standard deviation of the caption lengths, as a fraction of the mean length
MIN_LENGTH_TOKENS, MAX_LENGTH_TOKENS = 7, 70
OPEN_CLIP_PRECISIONS = {"no": "fp32", "bf16": "amp_bfloat16"}


@dataclass
class TrainStepArguments:
    """Command-line arguments of `benchmarks.train_step`, which measures speed and memory of training steps.

    Raises:
        ValueError: If a number is too small, if `parts` has an unknown value, or if `pairs` does not fit the parts.
    """

    model: Literal[*OPEN_CLIP_FLAGS] = flag("capivara", "Architecture: CAPIVARA, or SigLIP 2 B/16, L/16 or So400m/14.")
    pairs: int | None = flag(
        None,
        "Image-text pairs per training step. Default: 96 for the part programs, 2816 for the part recipe. If both "
        "parts are measured, the flag sets only the pairs of programs. For the part recipe alone, a value below 2816 "
        "measures a step of half as many pairs, too, and estimates the memory of 2816 pairs.",
    )
    micro: int = flag(16, "Pairs per micro-batch of this project's trainer. The part recipe always uses 64.")
    peer_micro: int = flag(
        48,
        "Pairs per micro-batch of open_clip's trainer. The pairs per step of the part programs must be at least twice "
        "this number, and a multiple of it.",
    )
    runs: int = flag(5, "Number of runs of each program. The programs run alternately.")
    steps: int = flag(1, "Timed training steps per run.")
    warmup: int = flag(1, "Untimed steps of our trainer before the timed steps. open_clip always has one untimed step.")
    parts: list[str] = flag(
        ["recipe", "programs"],
        "What to measure, one or more of: programs (a small batch), recipe (the paper's batch of 2816 pairs), demo "
        "(the commands of `make demo`).",
    )
    output: Path | None = flag(
        None,
        "JSON file for the results. Default: train_step.json; with --model, train_step_MODEL.json; for the recipe "
        "alone, train_step_recipe_MODEL.json.",
    )
    beside: Path | None = flag(None, "Folder of another checkout of the project, with its own .venv, to compare with.")
    worker: Literal[*PROGRAMS] | None = flag(None, "Internal: the program that a child process measures.")
    precision: Literal["no", "bf16"] = flag("no", "Mixed precision of the measured program (internal).")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "micro", "peer_micro", "runs", "steps")
        if not self.parts or set(self.parts) - {"recipe", "programs", "demo"}:
            raise ValueError(f"parts must be one or more of recipe, programs and demo, got {self.parts}.")
        recipe_only = self.parts == ["recipe"]
        suffix = "_recipe" * recipe_only + f"_{self.model}" * (recipe_only or self.model != "capivara")
        self.output = self.output or tools.RESULTS_FOLDER / f"train_step{suffix}.json"
        if self.worker:
            self.pairs = self.program_pairs
        elif "recipe" in self.parts and self.recipe_pairs[0] < 2 * RECIPE_MICRO:
            raise ValueError(
                f"pairs must be at least {4 * RECIPE_MICRO} for the part recipe, got {self.pairs}. A step of half as "
                "many pairs is measured, too, and needs at least two micro-batches."
            )
        pairs = self.program_pairs
        # With a single micro-batch, open_clip would not accumulate gradients, as it must for 2816 pairs. The number of
        # micro-batches hardly changes its time per pair.
        if not self.worker and "programs" in self.parts and (pairs % self.peer_micro or pairs <= self.peer_micro):
            raise ValueError(
                f"pairs must be a multiple of peer_micro ({self.peer_micro}) and at least {2 * self.peer_micro}, got "
                f"{pairs}. open_clip splits each step into at least two micro-batches of peer_micro pairs."
            )

    @property
    def program_pairs(self) -> int:
        """Image-text pairs per training step when the training programs are compared. Default: 96."""
        return self.pairs or PROGRAM_PAIRS

    @property
    def recipe_pairs(self) -> list[int]:
        """Batch sizes, in image-text pairs per training step, that the part `recipe` measures.

        [2816], the batch size of the CAPIVARA paper. If only `recipe` is requested and `pairs` has another value,
        [pairs / 2, pairs].
        """
        is_published = "programs" in self.parts or self.pairs in (None, RECIPE_PAIRS)
        return [RECIPE_PAIRS] if is_published else [self.pairs // 2, self.pairs]


def main(argv: list[str] | None = None) -> None:
    """Run the training step benchmark: time steps of our trainer and of open_clip, and print the results as JSON."""
    args = parse_arguments(TrainStepArguments, __doc__, argv)
    if args.worker:
        measure = measure_open_clip_trainer if args.worker == PEER_PROGRAM else measure_our_trainer
        tools.output_results_as_json(measure(args))
    else:
        tools.output_results_as_json(run_requested_benchmarks(args), args.output)


def run_requested_benchmarks(args: TrainStepArguments) -> dict[str, Any]:
    """Measure the training steps that `--parts` requests.

    Args:
        args: Command-line arguments of the benchmark.

    Returns:
        The content of the results file: the conditions of the measurement and these keys:

        - "measured": `{precision: {program: summary}}`, the speed and peak memory of each program.
        - "recipe", if requested: speed and memory of the largest measured batch.
        - "recipe_before", with `--beside`: the same for the other checkout.
        - "demo", if requested: `{"new": seconds and results of the demo's commands}`. With `--beside`, also "old", the
          same for the other checkout.
    """
    suffixes = ["", BEFORE_SUFFIX] if args.beside else [""]
    # Compared with another checkout, the programs are only "no_cache" and "cache".
    names = [name + suffix for name in ("no_cache", "cache") for suffix in suffixes] if args.beside else PROGRAMS
    programs = {(title, name): {"precision": key} for key, title in PRECISION_NAMES.items() for name in names}
    sizes = {"micro": RECIPE_MICRO, "precision": resolve_mixed_precision("auto", torch.device("cpu")), "steps": 1}
    # Adam allocates its moments at the end of the first step, so the full memory is needed only from the second step.
    # A step of 2816 pairs takes long. By default, only the first step is therefore measured, without a warm-up step.
    sizes["warmup"] = int(args.pairs is not None and "programs" not in args.parts)
    recipe = {
        ("recipe", RECOMPUTED_PROGRAM + suffix, pairs): sizes | {"pairs": pairs}
        for pairs, suffix in product(args.recipe_pairs, suffixes)
    }
    requested = (recipe if "recipe" in args.parts else {}) | (programs if "programs" in args.parts else {})
    steps = {key: partial(_measure_program_in_subprocess, key[1], args, **flags) for key, flags in requested.items()}
    measured = tools.run_alternating(steps, args.runs, "Training steps")
    results = tools.describe_measurement_conditions() | {"tokens": CAPTION_TOKENS[args.model], "measured": {}}
    results |= {name: getattr(args, name) for name in ("model", "runs", "micro", "steps", "peer_micro")}
    results |= {"pairs": args.program_pairs, "peer_accum": args.program_pairs // args.peer_micro}
    for (part, name, *pairs), runs in measured.items():
        peer, before = measured.get((part, PEER_PROGRAM)), measured.get((part, name + BEFORE_SUFFIX, *pairs))
        summary = _summarize_runs(runs, peer, before)
        if part == "recipe":
            # If two batch sizes were measured, the loop reaches the smaller one first, and its result is stored under
            # `key`. The larger one then replaces it, after the memory of 2816 pairs was extrapolated from both.
            key, step = part + name.removeprefix(RECOMPUTED_PROGRAM), requested[part, name, *pairs] | summary
            results[key] = _add_seconds_and_extrapolated_memory_to_step(step, results.get(key))
        else:
            results["measured"].setdefault(part, {})[name] = summary
    if "demo" in args.parts:
        trees = {"old": args.beside, "new": tools.CODE_ROOT}
        results["demo"] = {name: _time_demo_commands(tree.resolve()) for name, tree in trees.items() if tree}
    return results


def _add_seconds_and_extrapolated_memory_to_step(step: dict, smaller: dict | None) -> dict[str, Any]:
    """Add the seconds of a step of the part `recipe` to its summary, and extrapolate its memory to 2816 pairs.

    Args:
        step: Sizes of the step, and the summary of its runs from `_summarize_runs`.
        smaller: Result of this function for the smaller batch; None if no smaller batch was measured.

    Returns:
        `step` with "step_s", the median seconds of a step. With a smaller batch, also with "smaller", the argument, and
        "extrapolated", the memory of 2816 pairs with the rule that estimates it.
    """
    step = step | {"step_s": step["pairs"] / step["pairs_per_second"]["median"]}
    if smaller is None:
        return step
    growth = (step["peak_memory_bytes"] - smaller["peak_memory_bytes"]) / (step["pairs"] - smaller["pairs"])
    memory = step["peak_memory_bytes"] + round(growth * (RECIPE_PAIRS - step["pairs"]))
    extrapolated = {"pairs": RECIPE_PAIRS, "peak_memory_bytes": memory, "rule": EXTRAPOLATION_RULE}
    return step | {"smaller": smaller, "extrapolated": extrapolated}


def _time_demo_commands(checkout: Path) -> dict[str, Any]:
    """Run the commands of `make demo` twice in a checkout. The second run finds the caches of the first run.

    Args:
        checkout: Folder of the checkout.

    Returns:
        `{"first": result of the first run, "second": result of the second run}`. The result of a run is `{"seconds":
        {module of the command: seconds, "total": sum}, "records": evaluation records that the training wrote}`.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"CAPIVARA_CACHE": f"{folder}/cache", "PYTHONPATH": str(checkout)}
        # Both runs use these folders and the same cache folder, so that the second run finds what the first run stored.
        inputs = ["--model", f"{folder}/base", "--dataset", f"{folder}/dataset"]
        for run in ("first", "second"):
            flags = ["--config", "configs/openmoji.yaml", *inputs, "--output_dir", f"{folder}/{run}"]
            seconds = {}
            for words in (["examples.openmoji.prepare", *inputs], ["train_accelerate", *flags]):
                job = partial(subprocess.run, [sys.executable, "-m", *words], cwd=checkout, env=environment, check=True)
                seconds[words[0]] = tools.time_call(job)
            paths = sorted(Path(folder, run, "results").glob("*.json"))
            records = [record for path in paths for record in read_json(path, records=list)["records"]]
            results[run] = {"seconds": seconds | {"total": sum(seconds.values())}, "records": records}
    return results


def _measure_program_in_subprocess(name: str, args: TrainStepArguments, **flags: Any) -> dict[str, Any]:
    """Time the training steps of one program in a separate process.

    Args:
        name: Name in `PROGRAMS`. With `BEFORE_SUFFIX` appended, the program of the checkout `--beside` is measured.
        args: Command-line arguments of the benchmark.
        **flags: Flags of the worker that override `args`.

    Returns:
        The result of `measure_open_clip_trainer` or `measure_our_trainer` in that process.
    """
    numbers = ("steps", *(["peer_micro"] if name == PEER_PROGRAM else ["micro", "warmup"]))
    flags = {key: getattr(args, key) for key in numbers} | {"pairs": args.program_pairs} | flags
    if args.model != "capivara":
        # The default is not passed, because an older checkout in --beside may not know the flag --model.
        flags["model"] = args.model
    # A separate process, because its peak memory must not include other programs.
    root = args.beside if name.endswith(BEFORE_SUFFIX) else tools.CODE_ROOT
    flags["worker"] = name.removesuffix(BEFORE_SUFFIX)
    return tools.run_module_in_subprocess("benchmarks.train_step", root, **flags)


def _summarize_runs(runs: list[dict], peer: list[dict] | None, before: list[dict] | None) -> dict[str, Any]:
    """Summarize the runs of a program.

    Args:
        runs: Result of each run of the program, from `_measure_program_in_subprocess`.
        peer: Results of open_clip's trainer in the same runs; None if it was not measured.
        before: Results of the same program in the other checkout; None if it was not measured.

    Returns:
        A dict with these keys:

        - "pairs_per_second": median, slowest and fastest rate of the runs.
        - "peak_memory_bytes": largest peak memory of a run.
        - "ratio", with `peer`: median over the runs of the program's rate divided by open_clip's rate.
        - "ratio_to_before", with `before`: the same with the program's rate in the other checkout as the divisor.
    """
    rates = [run["pairs_per_second"] for run in runs]
    memory = max(run["peak_memory_bytes"] for run in runs)
    summary = {"pairs_per_second": tools.summarize_rates(rates), "peak_memory_bytes": memory}
    for name, others in {"ratio": peer, "ratio_to_before": before}.items():
        if others:
            summary[name] = tools.median_ratio(rates, [run["pairs_per_second"] for run in others])
    return summary


def build_published_config(model: str) -> PreTrainedConfig:
    """Build the config of a model in its published size, so that it can be measured with random weights.

    Args:
        model: "capivara", or a key of `SIGLIP_SIZES` for a SigLIP 2 model, such as "siglip2_large".

    Returns:
        A `CapivaraConfig` or a `SiglipConfig`.
    """
    if model == "capivara":
        return CapivaraConfig()
    tower, images = SIGLIP_SIZES[model]
    text = {"vocab_size": SIGLIP_VOCABULARY_SIZE, "max_position_embeddings": SIGLIP_TOKENS}
    return SiglipConfig(text_config=tower | text, vision_config=tower | images)


def make_random_token_ids(config: PreTrainedConfig, pairs: int) -> Tensor:
    """Generate random token ids as a stand-in for tokenized captions. The same arguments give the same ids.

    Args:
        config: Config of the model, CAPIVARA or SigLIP.
        pairs: Number of captions.

    Returns:
        Token ids. For CAPIVARA, (pairs, 77): captions of 20 tokens on average, sorted by length and padded. For SigLIP,
        (pairs, 64), without padding.
    """
    generator, siglip = torch.Generator().manual_seed(0), isinstance(config, SiglipConfig)
    shape = pairs, SIGLIP_TOKENS if siglip else PEER_CONTEXT_LENGTH
    tokens = min(SIGLIP_VOCABULARY_SIZE if siglip else DRAWN_TOKEN_COUNT, config.text_config.vocab_size)
    ids = torch.randint(PAD_TOKEN_ID + 1, tokens, shape, generator=generator)
    if not siglip:
        lengths = CAPTION_TOKENS["capivara"] * (1 + LENGTH_SPREAD * torch.randn(pairs, 1, generator=generator))
        lengths = lengths.round().clamp(MIN_LENGTH_TOKENS, MAX_LENGTH_TOKENS).sort(dim=0).values
        ids[torch.arange(PEER_CONTEXT_LENGTH) >= lengths] = PAD_TOKEN_ID
    return ids


def _make_random_pixels(config: PreTrainedConfig, pairs: int) -> Tensor:
    """Generate random pixel values.

    Args:
        config: Config of the model, which defines the side of an image in pixels.
        pairs: Number of images.

    Returns:
        Standard normal numbers of shape (pairs, 3, side, side).
    """
    side = config.vision_config.image_size
    return torch.randn(pairs, 3, side, side, generator=torch.Generator().manual_seed(0))


# ---- one measurement of our trainer ----


class TrainingEngine:
    """A model with random weights and its optimizer. Each call runs one training step of this project's trainer.

    A step includes the forward and backward passes and the weight update, but no data loading.

    Args:
        config: Config of the model.
        args: Command-line arguments of the benchmark.
        budget: Memory in bytes for autograd graphs of micro-batches. The backward pass recomputes graphs that do not
            fit. 0: all graphs are recomputed. None: most of the free memory.
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
        freeze_parameters_and_add_adapters(self.model, self.args)
        # evaluation_mode=True keeps Accelerate from adding a DistributedDataParallel wrapper, which is not needed,
        # because WholeBatch sums the gradients of all processes itself.
        self.prepared_model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(self.model, self.args))
        self.step = WholeBatch(self.prepared_model, self.accelerator, self.args.seed, budget)

    def __call__(self, number: int, texts: list[MicroBatch], images: Tensor) -> StepReport:
        """Compute one training step.

        Args:
            number: Number of the step, from 0.
            texts: Micro-batches of token ids.
            images: Pixel values (pairs, 3, side, side), or cached image embeddings (pairs, width).

        Returns:
            Report of the step. It includes the number of micro-batches whose autograd graph was not recomputed.
        """
        if images.ndim == 4:
            # Without the cache of embeddings, `images` has pixel values, which must be embedded in every step.
            self.model.vision_model.eval()
            parts = images.split(self.args.embedding_batch_size)
            images = torch.cat([embed_pixels(self.prepared_model, pixels, self.accelerator) for pixels in parts])
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)
        report = self.step(number, texts, len(images), images)
        # The rest does the same work as `TrainingLoop._update_weights`. The norm of the gradient is not needed here. It
        # is computed because the trainer computes it in every step, so that its time counts.
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(number, self.args)
        torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()
        self.optimizer.step()
        if not uses_sigmoid_loss(self.model):
            clamp_logit_scale(self.model.logit_scale)
        return report


def make_random_batch(config: PreTrainedConfig, args: TrainStepArguments) -> tuple[list[MicroBatch], Tensor]:
    """Generate a training batch of random texts and images.

    Args:
        config: Config of the model.
        args: Command-line arguments of the benchmark: `pairs`, `micro` (texts per micro-batch) and `worker` (program).

    Returns:
        Tuple (micro-batches of token ids, images). The images are pixel values of shape (pairs, 3, side, side) for the
        program "no_cache". Otherwise, they are embeddings of shape (pairs, width) and unit length.
    """
    texts = []
    for number, ids in enumerate(make_random_token_ids(config, args.pairs).split(args.micro)):
        # Padding beyond the longest text of the micro-batch is removed, because our trainer does so, too.
        ids = ids[:, : (ids != PAD_TOKEN_ID).sum(dim=1).max()].contiguous()
        mask = None if isinstance(config, SiglipConfig) else (ids != PAD_TOKEN_ID).long()
        texts.append(MicroBatch(number, number * args.micro, ids, mask))
    if args.worker == "no_cache":
        # The pixels are in memory before the first step, as for open_clip.
        return texts, _make_random_pixels(config, args.pairs)
    vectors = torch.randn(args.pairs, embedding_width(config), generator=torch.Generator().manual_seed(0))
    return texts, F.normalize(vectors, dim=-1)


def measure_our_trainer(args: TrainStepArguments) -> dict[str, Any]:
    """Time training steps of this project's trainer in this process, and read the peak memory of the process.

    Args:
        args: Command-line arguments of the benchmark. `args.worker` is the program to measure, such as "cache".

    Returns:
        A dict with these keys:

        - "pairs_per_second": image-text pairs divided by the median seconds of the timed steps.
        - "step_s": seconds of each timed step.
        - "graphs_kept": for each timed step, number of micro-batches whose autograd graph was not recomputed.
        - "peak_memory_bytes": peak resident memory of the process.
    """
    config, seconds, reports = build_published_config(args.model), [], []
    batch = make_random_batch(config, args)
    engine = TrainingEngine(config, args, 0.0 if args.worker == RECOMPUTED_PROGRAM else None)
    for number in range(args.warmup + args.steps):
        seconds.append(tools.time_call(lambda number=number: reports.append(engine(number, *batch))))
    graphs_kept = [report.graphs_kept for report in reports[args.warmup :]]
    return _summarize_steps(args.pairs, seconds[args.warmup :]) | {"graphs_kept": graphs_kept}


def _summarize_steps(pairs: int, seconds: list[float]) -> dict[str, Any]:
    """Return the rate, the times and the peak memory of the timed steps (see `measure_our_trainer`).

    Args:
        pairs: Number of image-text pairs per step.
        seconds: Seconds of each timed step.
    """
    rate = pairs / statistics.median(seconds)
    return {"pairs_per_second": rate, "step_s": seconds, "peak_memory_bytes": tools.peak_resident_bytes()}


# ---- one measurement of open_clip's trainer ----


def measure_open_clip_trainer(args: TrainStepArguments) -> dict[str, Any]:
    """Time training steps of open_clip's trainer in this process, and read the peak memory of the process.

    Args:
        args: Command-line arguments of the benchmark.

    Returns:
        A dict with these keys:

        - "pairs_per_second": image-text pairs divided by the median seconds of the timed steps.
        - "step_s": seconds of each timed step.
        - "padded_tokens": number of tokens to which all texts are padded.
        - "peak_memory_bytes": peak resident memory of the process.
    """
    from open_clip import create_loss, create_model
    from open_clip_train.data import DataInfo
    from open_clip_train.main import random_seed
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    config, open_clip_args = build_published_config(args.model), build_open_clip_arguments(args)
    steps = 1 + args.steps  # the first step is not timed, because it also allocates the state of Adam
    random_seed(open_clip_args.seed, open_clip_args.rank)
    is_siglip = args.model in SIGLIP_SIZES
    model = create_model(open_clip_args.model) if is_siglip else convert_open_clip.new_open_clip_model(config)
    model.output_dict = True
    model.lock_image_tower(open_clip_args.lock_image_unlocked_groups, open_clip_args.lock_image_freeze_bn_stats)
    model.set_grad_checkpointing()
    optimizer, ends = build_open_clip_optimizer(model, open_clip_args), []
    optimizer.register_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    pixels, texts = _make_random_pixels(config, args.pairs), make_random_token_ids(config, args.pairs)
    micro_batches = zip(pixels.split(args.peer_micro), texts.split(args.peer_micro), strict=True)
    batches = DataLoader([*micro_batches] * steps, batch_size=None)
    # `train_one_epoch` of open_clip reads these two attributes, which open_clip adds to each DataLoader.
    batches.num_batches, batches.num_samples = len(batches), steps * args.pairs
    scheduler = cosine_lr(optimizer, open_clip_args.lr, open_clip_args.warmup, steps)
    data = {"train": DataInfo(batches)}
    train_one_epoch(model, data, create_loss(open_clip_args), 0, optimizer, None, scheduler, None, open_clip_args)
    # A step is timed from the end of the previous step to its own end, so the first step has no time.
    seconds = [end - start for start, end in pairwise(ends)]
    return _summarize_steps(args.pairs, seconds) | {"padded_tokens": texts.shape[1]}


def build_open_clip_arguments(args: TrainStepArguments) -> Any:
    """Translate this benchmark's arguments to the arguments of open_clip's trainer.

    Args:
        args: Command-line arguments of this benchmark.

    Returns:
        The namespace from open_clip's argument parser, with the fields that open_clip's `main` function adds to it.
    """
    from open_clip_train.distributed import init_distributed_device
    from open_clip_train.params import parse_args

    flags = f"{OPEN_CLIP_FLAGS[args.model]} --lock-image --grad-checkpointing --device cpu --dataset-type synthetic"
    flags += f" --epochs 1 --batch-size {args.peer_micro} --accum-freq {args.pairs // args.peer_micro}"
    open_clip_args = parse_args([*flags.split(), "--precision", OPEN_CLIP_PRECISIONS[args.precision]])
    init_distributed_device(open_clip_args)  # sets fields such as `rank`, which the parser leaves out
    open_clip_args.distill = open_clip_args.wandb = False
    return open_clip_args


def build_open_clip_optimizer(model: nn.Module, open_clip_args: Any) -> torch.optim.AdamW:
    """Build the same AdamW optimizer that open_clip 3.3 builds for its training.

    Args:
        model: open_clip's model. Only parameters with `requires_grad` are trained.
        open_clip_args: Arguments from `build_open_clip_arguments`.

    Returns:
        The optimizer. Biases, gains of normalization layers and the logit scale get no weight decay.
    """
    # open_clip has no function that builds the optimizer. This code is copied from the middle of its `main` function.
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gain_or_bias = {n for n, p in trained if p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias", "logit_scale"))}
    groups = [
        {"params": [p for n, p in trained if n in gain_or_bias], "weight_decay": 0.0},
        {"params": [p for n, p in trained if n not in gain_or_bias], "weight_decay": open_clip_args.wd},
    ]
    betas = (open_clip_args.beta1, open_clip_args.beta2)
    return torch.optim.AdamW(groups, lr=open_clip_args.lr, betas=betas, eps=open_clip_args.eps)


if __name__ == "__main__":
    run_main_and_report_user_errors(main)
