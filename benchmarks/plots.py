"""The two pictures of the speed benchmarks: a training step, and how its cost grows with the batch."""

from pathlib import Path

from matplotlib import pyplot as plt

from records.plots import BASELINE_COLOUR, MODEL_COLOUR, save_figure


def plot_train_step(results: dict, titles: dict[str, str], path: Path) -> None:
    """Pairs per second of every trainer in every precision, as bars with the ratio and the memory beside them.

    Args:
        results: of `benchmarks.train_step`.
        titles: name of a program in them -> in words.
        path: the PNG.
    """
    measured = results["measured"]
    figure, axes = plt.subplots(1, len(measured), figsize=(6 * len(measured), 3.2), layout="constrained", sharex=True)
    for axis, (precision, programs) in zip(axes, measured.items(), strict=True):
        rates = [found["pairs_per_second"]["median"] for found in programs.values()]
        colours = [BASELINE_COLOUR if "optimiser_s" not in found else MODEL_COLOUR for found in programs.values()]
        names = [titles[name] for name in programs]
        bars = axis.barh(names, rates, color=colours)
        labels = [
            f"{found['pairs_per_second']['median']:.2f} pairs/s"
            + (f", x {found['ratio']:.1f}" if "ratio" in found else "")
            + f"\n{found['peak_memory_bytes'] / 2**30:.1f} GiB"
            for found in programs.values()
        ]
        axis.bar_label(bars, labels, padding=4, fontsize=8.5)
        axis.set(xlabel="pairs per second", title=precision)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    rates = [found["pairs_per_second"]["median"] for programs in measured.values() for found in programs.values()]
    axes[0].set_xlim(0, 1.45 * max(rates))  # room for the labels
    figure.suptitle(f"One step of {results['pairs']} pairs, {results['device']}", fontsize=10)
    save_figure(figure, path)


def plot_scaling(results: dict, path: Path) -> None:
    """Cost per pair over the batch size, and the loss's memory and share of a step beyond.

    Args:
        results: of `benchmarks.scaling`.
        path: the PNG.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps, losses = results["steps"], results["loss_alone"]
    sizes = [step["pairs"] for step in steps]
    left.plot(sizes, [1e3 * s["seconds_per_pair"] for s in steps], "o-", color=MODEL_COLOUR, label="whole step")
    without = [1e3 * s["seconds_per_pair_without_optimiser"] for s in steps]
    left.plot(sizes, without, "o--", color=BASELINE_COLOUR, label="without the optimiser")
    left.set(ylabel="ms per pair", title="Towers, full size")
    left.set_ylim(0, 1.1e3 * max(s["seconds_per_pair"] for s in steps))
    left.legend(frameon=False)
    sizes = [loss["pairs"] for loss in losses]
    middle.plot(sizes, [loss["memory_over_embeddings_bytes"] / 2**20 for loss in losses], "o-", color=MODEL_COLOUR)
    all_logits = [loss["all_logits_bytes"] / 2**20 for loss in losses]
    middle.plot(sizes, all_logits, "--", color=BASELINE_COLOUR, label="one float32 matrix of all logits")
    middle.set(ylabel="MiB beside the embeddings (log)", title="Loss alone", yscale="log")
    middle.legend(frameon=False)
    right.plot(sizes, [100 * loss["loss_share_of_extrapolated_step"] for loss in losses], "o-", color=MODEL_COLOUR)
    right.set(ylabel="% of an extrapolated step", title="Loss's share of the time")
    right.set_ylim(bottom=0)
    for axis in (left, middle, right):
        ticks = steps if axis is left else losses
        axis.set(xscale="log", xlabel="pairs of the batch (log)")
        axis.set_xticks([t["pairs"] for t in ticks], [f"{t['pairs']:,}" for t in ticks], rotation=30, minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    save_figure(figure, path)
