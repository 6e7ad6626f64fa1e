"""How the cost of a training step grows with its batch: towers at full size, then the loss alone.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --device cuda

The towers' cost per pair is measured from 256 to 2816 pairs, on cached image embeddings, no graph kept (a small batch
could keep all and would be cheaper), one step each in a process of its own, after an untimed one. The optimiser's
seconds do not depend on the batch: the cost per pair is given with and without them. Beyond, to 32,768 pairs, the loss
is measured by itself on random embeddings of width 512, each size in its own process, and set against a step of that
size, which is extrapolated from the largest one measured. The last line of the output is JSON.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch.nn import functional as F

from benchmarks import timing, train_step
from capivara_common.cli import flag, parse
from training.contrastive import contrastive_gradients
from training.step import resolve_precision


@dataclass
class ScalingArguments:
    """Arguments of `benchmarks.scaling`."""

    step_pairs: list[int] = flag([256, 512, 1024, 2816], "Whole steps.")
    loss_pairs: list[int] = flag([2816, 4096, 8192, 16384, 32768], "The loss alone.")
    micro: int = flag(16, "Pairs of a micro-batch; with more, small batches are padded more than large ones.")
    tokens: int = flag(20, "Mean tokens of a caption, begin and end included.")
    precision: Literal["auto", "no", "bf16"] = flag("auto", "auto: bf16 where native.")
    device: str = flag("cpu", "cpu or cuda.")
    output: Path = flag(timing.RESULTS / "scaling.json", "JSON file.")
    worker: bool = flag(False, "Measure the loss of the first of loss_pairs, in this process.")

    def __post_init__(self) -> None:
        for name in ("step_pairs", "loss_pairs"):
            if not getattr(self, name) or min(getattr(self, name)) < 2:
                raise ValueError(f"{name} must be numbers of at least 2 pairs, got {getattr(self, name)}.")
        self.precision = resolve_precision(self.precision, torch.device(self.device))


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    args = parse(ScalingArguments, __doc__, argv)
    if args.worker:
        timing.finish(measure_loss(args.loss_pairs[0], args.device))
        return
    steps = [measure_step(pairs, args) for pairs in sorted(args.step_pairs)]
    worker = ["benchmarks.scaling", "--device", args.device, "--worker", "--loss_pairs"]
    losses = [timing.in_own_process([*worker, str(pairs)]) for pairs in args.loss_pairs]
    results = {
        **timing.conditions(args.device),
        **{name: getattr(args, name) for name in ("micro", "tokens", "precision")},
        **summary(steps, losses),
    }
    print(scaling_tables(results))
    timing.finish(results, args.output)


def measure_step(pairs: int, args: ScalingArguments) -> dict[str, Any]:
    """One whole step, in a process of its own."""
    of_step = train_step.TrainStepArguments(
        worker="cache_recomputed", pairs=pairs, micro=args.micro, tokens=args.tokens, device=args.device
    )
    found = train_step.measured("cache_recomputed", args.precision, of_step)
    return {
        "pairs": pairs,
        **{name: found[name] for name in ("padding_share", "peak_memory_bytes")},
        **found["steps"][0],
    }


def measure_loss(pairs: int, device: str, width: int = 512) -> dict[str, Any]:
    """Seconds of the loss and its gradients, and the memory they take beside the embeddings they are given."""
    noise = torch.Generator().manual_seed(0)
    texts, images = (F.normalize(torch.randn(pairs, width, generator=noise), dim=-1).to(device) for _ in range(2))
    scale, own = torch.tensor(2.66, device=device), torch.arange(pairs, device=device)
    cuda = device.startswith("cuda")
    contrastive_gradients(texts[:64], images[:64], scale, own[:64])  # warm-up
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
    seconds = timing.seconds_of(lambda: contrastive_gradients(texts, images, scale, own), device)
    return {
        "pairs": pairs,
        "width": width,
        "loss_s": seconds,
        "memory_over_embeddings_bytes": timing.peak_memory_bytes(device) - before,
    }


def summary(steps: list[dict[str, Any]], losses: list[dict[str, Any]]) -> dict[str, Any]:
    """Cost per pair and its spread over the sizes; the loss's share of a step, measured or extrapolated."""
    for step in steps:
        step["seconds_per_pair"] = step["step_s"] / step["pairs"]
        step["seconds_per_pair_without_optimiser"] = (step["step_s"] - step["optimiser_s"]) / step["pairs"]
    names, largest = ("seconds_per_pair", "seconds_per_pair_without_optimiser"), steps[-1]
    for loss in losses:
        # The towers' cost per pair is the largest measured step's, which holds that step's own small loss as well.
        towers_s = loss["pairs"] * largest["seconds_per_pair_without_optimiser"]
        loss["extrapolated_step_s"] = towers_s + largest["optimiser_s"] + loss["loss_s"]
        loss["loss_share_of_extrapolated_step"] = loss["loss_s"] / loss["extrapolated_step_s"]
    return {
        "steps": steps,
        "spread": {name: max(s[name] for s in steps) / min(s[name] for s in steps) - 1 for name in names},
        "loss_alone": losses,
    }


def scaling_tables(results: dict[str, Any]) -> str:
    """The two tables of docs/benchmarks.md, out of the JSON."""
    steps = [
        (
            f"{step['pairs']:,}",
            f"{1e3 * step['seconds_per_pair']:.1f}",
            f"{1e3 * step['seconds_per_pair_without_optimiser']:.1f}",
            f"{step['padding_share']:.0%}",
            f"{step['peak_memory_bytes'] / 2**30:.1f}",
        )
        for step in results["steps"]
    ]
    losses = [
        (
            f"{loss['pairs']:,}",
            f"{loss['loss_s']:.2f}",
            f"{loss['memory_over_embeddings_bytes'] / 2**20:.0f}",
            f"{loss['loss_share_of_extrapolated_step']:.1%}",
        )
        for loss in results["loss_alone"]
    ]
    spread = results["spread"]
    facts = (
        f"Full size, random weights, {results['precision']}, micro-batches of {results['micro']}, {results['tokens']} "
        f"tokens per caption, no graph kept, on {results['device']}; {timing.software(results, 'torch')}. The cost "
        f"per pair varies by {spread['seconds_per_pair']:.0%} between the sizes, by "
        f"{spread['seconds_per_pair_without_optimiser']:.0%} without the optimiser."
    )
    heads = ("pairs", "ms per pair", "without optimiser", "padding", "peak memory, GiB")
    loss_heads = ("pairs of the loss", "seconds", "MiB beside the embeddings", "share of a step (extrapolated)")
    return timing.table(heads, steps, "", 0) + timing.table(loss_heads, losses, facts, 0)


if __name__ == "__main__":
    main()
